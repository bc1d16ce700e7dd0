"""The tail of the network at large factors: a launch a step, a program a tile of both factors.

`svd_tail.py` gives a sample to one program, which leaves most of a device idle where samples are large and
few. Here three launches go forward and five backward, six where the gradient of H is wanted:

- `residual`: `E = D X^H X D - I`, its upper tiles mirrored; norms 1 / D of the raw columns, and their order.
- `refined`: `X D (I - a E)`, columns in order and divided by their norms: a program has all rows of its tile.
- `calibrated`: diag(U^H H V), and S from it.
- `normal`, backward after the first two: the diagonal again, and gW, what it and the normalisation of the
  columns hand on to `X D (I - a E)`. U takes the diagonal from H V, V takes it from H^H U: neither waits.
- `core`: `L = D D X^H gW D`, transposed and conjugated, and the gradient of a.
- `outer`: the gradient of H, `U diag(q) V^H`.
- `raw`: `gW (I - a E) D - a X (L + L^H)` and through the norms to the raw columns.

Where the forward is asked to keep what the first two launches leave, the backward begins at the third.

E is Hermitian, so its columns in order are its rows in order: no factor is permuted and every access is a
piece of a row. A complex product is one real product of interleaved matrices, `[re im] [[re im] [-im re]]`:
the left operand and the sums are as memory has them, and the right one is a tile and i times that tile.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .complex import interleave, load_rows, modulus, planes, store_rows
from .launch import Launch, block, precision
from .ortho import chip, reciprocal_where, refuse_sizes
from .spectral import places, weight_of

# rows and columns of a tile, and of what a product takes of its inner dimension at once
ROWS, COLUMNS, CHUNK = 128, 32, 16


@triton.jit
def _place(TILES: tl.constexpr, FACTORS: tl.constexpr):
    """Sample, factor and tile of this program."""
    pid = tl.program_id(0)
    return (pid // (TILES * FACTORS)).to(tl.int64), pid // TILES % FACTORS, pid % TILES


@triton.jit
def _kept(p_kept, b, r: tl.constexpr, STEP: tl.constexpr):
    """Where a sample's E are, of U and of V; norms of raw columns, of refined ones; the order."""
    p_e = p_kept + b * STEP
    return p_e, p_e + 4 * r * r, p_e + (4 * r * r + 4 * r)


@triton.jit
def _turned(x, sign, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Every row of an interleaved tile [ROWS, 2 COLUMNS], and below it `sign` i times that row."""
    re, im = planes(x, ROWS, COLUMNS)
    y = interleave(-sign * im, sign * re, ROWS, COLUMNS)
    return tl.reshape(tl.permute(tl.join(x, y), (0, 2, 1)), (2 * ROWS, 2 * COLUMNS))


@triton.jit
def _swapped(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The interleaved transpose [COLUMNS, 2 ROWS] of an interleaved tile [ROWS, 2 COLUMNS]."""
    return tl.reshape(tl.permute(tl.reshape(x, (ROWS, COLUMNS, 2)), (1, 0, 2)), (COLUMNS, 2 * ROWS))


@triton.jit
def _both(x, COLUMNS: tl.constexpr):
    """A number a column, for both parts of it."""
    return tl.reshape(tl.join(x, x), (2 * COLUMNS,))


@triton.jit
def _of_columns(x, COLUMNS: tl.constexpr):
    """Sums over the rows and both parts of an interleaved tile."""
    return tl.sum(tl.reshape(tl.sum(x, 0), (COLUMNS, 2)), 1)


@triton.jit
def _polynomial(p_e, p_norm, a, i, j0, r, COLUMNS: tl.constexpr):
    """Rows i and columns from j0 on of (I - a E) D, interleaved."""
    j = 2 * j0 + tl.arange(0, 2 * COLUMNS)
    e = load_rows(p_e, 2 * r, 2 * r, i, 2 * j0, r, 2 * COLUMNS)
    one = tl.where(2 * i[:, None] == j[None, :], 1.0, 0.0)
    norm = tl.load(p_norm + j // 2, mask=j < 2 * r, other=1.0)
    return (one - a * e) * (1.0 / (norm + 1e-8))[None, :]


@triton.jit
def _product(
    p_x,
    p_y,
    inner,
    columns: tl.constexpr,
    x_step,
    rows,
    i0,
    j0,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """X Y at rows i0 and columns j0, interleaved; X (rows, inner, 2), Y (inner, columns, 2)."""
    found = tl.zeros((ROWS, 2 * COLUMNS), tl.float32)
    for k in tl.range(0, inner, CHUNK, num_stages=STAGES):
        x = load_rows(p_x, x_step, x_step, i0 + tl.arange(0, ROWS), 2 * k, rows, 2 * CHUNK)
        y = load_rows(p_y, 2 * columns, 2 * columns, k + tl.arange(0, CHUNK), 2 * j0, inner, 2 * COLUMNS)
        found = tl.dot(x, _turned(y, 1.0, CHUNK, COLUMNS), found, input_precision=PRECISION)
    return found


@triton.jit
def _adjoint_product(
    p_x,
    p_y,
    inner,
    columns: tl.constexpr,
    x_step,
    i0,
    j0,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """X^H Y at rows i0 and columns j0, interleaved; X (inner, x_step), Y (inner, columns, 2)."""
    found = tl.zeros((ROWS, 2 * COLUMNS), tl.float32)
    for k in tl.range(0, inner, CHUNK, num_stages=STAGES):
        rows = k + tl.arange(0, CHUNK)
        x = load_rows(p_x, x_step, x_step, rows, 2 * i0, inner, 2 * ROWS)
        y = load_rows(p_y, 2 * columns, 2 * columns, rows, 2 * j0, inner, 2 * COLUMNS)
        x = _swapped(x, CHUNK, ROWS)
        found = tl.dot(x, _turned(y, -1.0, CHUNK, COLUMNS), found, input_precision=PRECISION)
    return found


@triton.jit
def residual_kernel(
    p_u,
    p_v,
    p_s,
    p_kept,
    M: tl.constexpr,
    N: tl.constexpr,
    r: tl.constexpr,
    STEP: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    T: tl.constexpr = (r + COLUMNS - 1) // COLUMNS
    b, factor, tile = _place(T * (T + 1) // 2, 2)
    # the upper tiles row by row
    above = 0
    for k in tl.static_range(1, T):
        above += (tile >= k * T - k * (k - 1) // 2).to(tl.int32)
    beside = tile - (above * T - above * (above - 1) // 2) + above
    i0, j0 = above * COLUMNS, beside * COLUMNS
    rows = M
    p_x = p_u + b * (M * r * 2)
    if factor == 1:
        rows = N
        p_x = p_v + b * (N * r * 2)
    p_e, p_norms, p_order = _kept(p_kept, b, r, STEP)
    p_e += factor * (r * r * 2)
    found = tl.zeros((COLUMNS, 2 * COLUMNS), tl.float32)
    of_i = tl.zeros((CHUNK, 2 * COLUMNS), tl.float32)
    of_j = tl.zeros((CHUNK, 2 * COLUMNS), tl.float32)
    for k in tl.range(0, rows, CHUNK, num_stages=STAGES):
        m = k + tl.arange(0, CHUNK)
        x = load_rows(p_x, 2 * r, 2 * r, m, 2 * i0, rows, 2 * COLUMNS)
        y = load_rows(p_x, 2 * r, 2 * r, m, 2 * j0, rows, 2 * COLUMNS)
        of_i += x * x
        of_j += y * y
        x = _swapped(x, CHUNK, COLUMNS)
        found = tl.dot(x, _turned(y, -1.0, CHUNK, COLUMNS), found, input_precision=PRECISION)
    i, j = i0 + tl.arange(0, COLUMNS), j0 + tl.arange(0, COLUMNS)
    norm = tl.sqrt(_of_columns(of_j, COLUMNS))
    di, dj = 1.0 / (tl.sqrt(_of_columns(of_i, COLUMNS)) + 1e-8), 1.0 / (norm + 1e-8)
    scale = di[:, None] * dj[None, :]
    re, im = planes(found, COLUMNS, COLUMNS)
    re = re * scale - tl.where(i[:, None] == j[None, :], 1.0, 0.0)
    im = im * scale
    store_rows(p_e, interleave(re, im, COLUMNS, COLUMNS), 2 * r, 2 * r, i, 2 * j0, r, 2 * COLUMNS)
    if beside > above:
        mirrored = interleave(tl.trans(re), -tl.trans(im), COLUMNS, COLUMNS)
        store_rows(p_e, mirrored, 2 * r, 2 * r, j, 2 * i0, r, 2 * COLUMNS)
    else:
        tl.store(p_norms + factor * r + j, norm, mask=j < r)
        if factor == 0:
            place = places(p_s + b * r, j, r, 0, COLUMNS)
            tl.store(p_order + place, j.to(tl.float32), mask=j < r)


@triton.jit
def refined_kernel(
    p_u,
    p_v,
    p_scalars,
    p_kept,
    p_u_out,
    p_v_out,
    M: tl.constexpr,
    N: tl.constexpr,
    r: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    T: tl.constexpr = (r + COLUMNS - 1) // COLUMNS
    WHOLE: tl.constexpr = M <= ROWS and N <= ROWS
    b, factor, tile = _place(T, 2)
    rows = M
    p_x = p_u + b * (M * r * 2)
    p_y = p_u_out + b * (M * r * 2)
    if factor == 1:
        rows = N
        p_x = p_v + b * (N * r * 2)
        p_y = p_v_out + b * (N * r * 2)
    a = tl.load(p_scalars + factor).to(tl.float32)
    p_e, p_norms, p_order = _kept(p_kept, b, r, STEP)
    p_e += factor * (r * r * 2)
    p_norms += factor * r
    j0 = tile * COLUMNS
    j = j0 + tl.arange(0, COLUMNS)
    order = tl.load(p_order + j, mask=j < r, other=r).to(tl.int32)
    squares = tl.zeros((COLUMNS,), tl.float32)
    w = tl.zeros((ROWS, 2 * COLUMNS), tl.float32)
    for i0 in tl.range(0, ROWS if WHOLE else rows, ROWS, num_stages=1, loop_unroll_factor=1):
        w = tl.zeros((ROWS, 2 * COLUMNS), tl.float32)
        for k in tl.range(0, r, CHUNK, num_stages=STAGES):
            x = load_rows(p_x, 2 * r, 2 * r, i0 + tl.arange(0, ROWS), 2 * k, rows, 2 * CHUNK)
            q = _turned(_polynomial(p_e, p_norms, a, order, k, r, CHUNK), 1.0, COLUMNS, CHUNK)
            w = tl.dot(x, tl.trans(q), w, input_precision=PRECISION)
        squares += _of_columns(w * w, COLUMNS)
        if not WHOLE:
            store_rows(p_y, w, 2 * r, 2 * r, i0 + tl.arange(0, ROWS), 2 * j0, rows, 2 * COLUMNS)
    norm = tl.sqrt(squares)
    tl.store(p_norms + 2 * r + j, norm, mask=j < r)
    scale = _both(1.0 / (norm + 1e-8), COLUMNS)[None, :]
    # also so that what was read above is read again, not kept in registers
    tl.debug_barrier()
    for i0 in tl.range(0, ROWS if WHOLE else rows, ROWS, num_stages=1, loop_unroll_factor=1):
        i = i0 + tl.arange(0, ROWS)
        if not WHOLE:
            w = load_rows(p_y, 2 * r, 2 * r, i, 2 * j0, rows, 2 * COLUMNS)
            tl.debug_barrier()
        store_rows(p_y, w * scale, 2 * r, 2 * r, i, 2 * j0, rows, 2 * COLUMNS)


@triton.jit
def calibrated_kernel(
    p_u,
    p_v,
    p_s,
    p_h,
    p_scalars,
    p_kept,
    p_s_out,
    M: tl.constexpr,
    N: tl.constexpr,
    r: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    T: tl.constexpr = (r + COLUMNS - 1) // COLUMNS
    b, _, tile = _place(T, 1)
    _, _, p_order = _kept(p_kept, b, r, STEP)
    p_u += b * (M * r * 2)
    p_v += b * (N * r * 2)
    p_h += b * (M * N * 2)
    j0 = tile * COLUMNS
    dr = tl.zeros((COLUMNS,), tl.float32)
    di = tl.zeros((COLUMNS,), tl.float32)
    for i0 in tl.range(0, M, ROWS, num_stages=1, loop_unroll_factor=1):
        w = _product(p_h, p_v, N, r, 2 * N, M, i0, j0, ROWS, COLUMNS, CHUNK, STAGES, PRECISION)
        wr, wi = planes(w, ROWS, COLUMNS)
        u = load_rows(p_u, 2 * r, 2 * r, i0 + tl.arange(0, ROWS), 2 * j0, M, 2 * COLUMNS)
        ur, ui = planes(u, ROWS, COLUMNS)
        dr += tl.sum(ur * wr + ui * wi, 0)
        di += tl.sum(ur * wi - ui * wr, 0)
    j = j0 + tl.arange(0, COLUMNS)
    tau = tl.load(p_scalars + 2).to(tl.float32)
    order = tl.load(p_order + j, mask=j < r, other=0).to(tl.int32)
    s = tl.load(p_s + b * r + order, mask=j < r, other=0.0)
    tl.store(p_s_out + b * r + j, (1.0 - tau) * s + tau * modulus(dr, di) + 1e-6, mask=j < r)


@triton.jit
def normal_kernel(
    p_gu,
    p_gs,
    p_gv,
    p_u,
    p_v,
    p_s,
    p_h,
    p_scalars,
    p_kept,
    p_gw,
    p_q,
    p_gs_out,
    p_shares,
    M: tl.constexpr,
    N: tl.constexpr,
    r: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    T: tl.constexpr = (r + COLUMNS - 1) // COLUMNS
    WHOLE: tl.constexpr = M <= ROWS and N <= ROWS
    b, factor, tile = _place(T, 2)
    _, p_norms, p_order = _kept(p_kept, b, r, STEP)
    p_h += b * (M * N * 2)
    rows = M
    p_x = p_u + b * (M * r * 2)
    p_y = p_v + b * (N * r * 2)
    p_g = p_gu + b * (M * r * 2)
    p_gw += b * ((M + N) * r * 2)
    if factor == 1:
        rows = N
        p_x = p_v + b * (N * r * 2)
        p_y = p_u + b * (M * r * 2)
        p_g = p_gv + b * (N * r * 2)
        p_gw += M * r * 2
    j0 = tile * COLUMNS
    # diag(X^H W) of W = H Y: d of U, the conjugate of d of V
    dr = tl.zeros((COLUMNS,), tl.float32)
    di = tl.zeros((COLUMNS,), tl.float32)
    along = tl.zeros((COLUMNS,), tl.float32)
    w = tl.zeros((ROWS, 2 * COLUMNS), tl.float32)
    for i0 in tl.range(0, ROWS if WHOLE else rows, ROWS, num_stages=1, loop_unroll_factor=1):
        if factor == 0:
            w = _product(p_h, p_y, N, r, 2 * N, M, i0, j0, ROWS, COLUMNS, CHUNK, STAGES, PRECISION)
        else:
            w = _adjoint_product(p_h, p_y, M, r, 2 * N, i0, j0, ROWS, COLUMNS, CHUNK, STAGES, PRECISION)
        i = i0 + tl.arange(0, ROWS)
        wr, wi = planes(w, ROWS, COLUMNS)
        x = load_rows(p_x, 2 * r, 2 * r, i, 2 * j0, rows, 2 * COLUMNS)
        xr, xi = planes(x, ROWS, COLUMNS)
        dr += tl.sum(xr * wr + xi * wi, 0)
        di += tl.sum(xr * wi - xi * wr, 0)
        along += _of_columns(x * load_rows(p_g, 2 * r, 2 * r, i, 2 * j0, rows, 2 * COLUMNS), COLUMNS)
        if not WHOLE:
            store_rows(p_gw, w, 2 * r, 2 * r, i, 2 * j0, rows, 2 * COLUMNS)
    tau = tl.load(p_scalars + 2).to(tl.float32)
    j = j0 + tl.arange(0, COLUMNS)
    g = tl.load(p_gs + b * r + j, mask=j < r, other=0.0)
    size = modulus(dr, di)
    qr, qi = weight_of(dr, di, size, g, tau)
    if factor == 0:
        order = tl.load(p_order + j, mask=j < r, other=0).to(tl.int32)
        s = tl.load(p_s + b * r + order, mask=j < r, other=0.0)
        tl.store(p_gs_out + b * r + order, (1.0 - tau) * g, mask=j < r)
        tl.store(p_q + (b * r + j) * 2, qr, mask=j < r)
        tl.store(p_q + (b * r + j) * 2 + 1, qi, mask=j < r)
        tl.store(p_shares + b * (T * (2 * T + 1)) + 2 * T * T + tile, tl.sum(g * (size - s), 0))
    norm = tl.load(p_norms + (2 + factor) * r + j, mask=j < r, other=0.0)
    scale = _both(1.0 / (norm + 1e-8), COLUMNS)[None, :]
    along = (along + (qr * dr + qi * di)) * reciprocal_where(norm)
    along = _both(along, COLUMNS)[None, :]
    qr, qi = qr[None, :], qi[None, :]
    # also so that what was read above is read again, not kept in registers
    tl.debug_barrier()
    for i0 in tl.range(0, ROWS if WHOLE else rows, ROWS, num_stages=1, loop_unroll_factor=1):
        i = i0 + tl.arange(0, ROWS)
        if not WHOLE:
            w = load_rows(p_gw, 2 * r, 2 * r, i, 2 * j0, rows, 2 * COLUMNS)
            tl.debug_barrier()
        wr, wi = planes(w, ROWS, COLUMNS)
        given = interleave(wr * qr + wi * qi, wi * qr - wr * qi, ROWS, COLUMNS)
        given += load_rows(p_g, 2 * r, 2 * r, i, 2 * j0, rows, 2 * COLUMNS)
        x = load_rows(p_x, 2 * r, 2 * r, i, 2 * j0, rows, 2 * COLUMNS)
        store_rows(p_gw, given * scale - x * along, 2 * r, 2 * r, i, 2 * j0, rows, 2 * COLUMNS)


@triton.jit
def core_kernel(
    p_u,
    p_v,
    p_kept,
    p_gw,
    p_l,
    p_shares,
    M: tl.constexpr,
    N: tl.constexpr,
    r: tl.constexpr,
    STEP: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    T: tl.constexpr = (r + COLUMNS - 1) // COLUMNS
    b, factor, tile = _place(T * T, 2)
    i0, j0 = tile // T * COLUMNS, tile % T * COLUMNS
    rows = M
    p_x = p_u + b * (M * r * 2)
    p_gw += b * ((M + N) * r * 2)
    if factor == 1:
        rows = N
        p_x = p_v + b * (N * r * 2)
        p_gw += M * r * 2
    p_e, p_norms, p_order = _kept(p_kept, b, r, STEP)
    p_e += factor * (r * r * 2)
    p_l += (b * 2 + factor) * (r * r * 2)
    p_norms += factor * r
    # rows in the sorted order, columns in that of X
    found = _adjoint_product(p_gw, p_x, rows, r, 2 * r, i0, j0, COLUMNS, COLUMNS, CHUNK, STAGES, PRECISION)
    i = i0 + tl.arange(0, COLUMNS)
    order = tl.load(p_order + i, mask=i < r, other=r).to(tl.int32)
    e = load_rows(p_e, 2 * r, 2 * r, order, 2 * j0, r, 2 * COLUMNS)
    j = 2 * j0 + tl.arange(0, 2 * COLUMNS)
    dj = (1.0 / (tl.load(p_norms + j // 2, mask=j < 2 * r, other=1.0) + 1e-8))[None, :]
    found = found * dj
    share = -tl.sum(tl.sum(found * e, 1), 0)
    tl.store(p_shares + b * (T * (2 * T + 1)) + factor * T * T + tile, share)
    di = (1.0 / (tl.load(p_norms + order, mask=order < r, other=1.0) + 1e-8))[:, None]
    store_rows(p_l, found * dj * di, 2 * r, 2 * r, order, 2 * j0, r, 2 * COLUMNS)


@triton.jit
def outer_kernel(
    p_u,
    p_v,
    p_q,
    p_gh_out,
    M: tl.constexpr,
    N: tl.constexpr,
    r: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    T: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    b, down, tile = _place(T, (M + ROWS - 1) // ROWS)
    p_u += b * (M * r * 2)
    p_v += b * (N * r * 2)
    p_q += b * (r * 2)
    i, j0 = down * ROWS + tl.arange(0, ROWS), tile * COLUMNS
    found = tl.zeros((ROWS, 2 * COLUMNS), tl.float32)
    for k0 in tl.range(0, r, CHUNK, num_stages=STAGES):
        x = load_rows(p_u, 2 * r, 2 * r, i, 2 * k0, M, 2 * CHUNK)
        y = load_rows(p_v, 2 * r, 2 * r, j0 + tl.arange(0, COLUMNS), 2 * k0, N, 2 * CHUNK)
        k = k0 + tl.arange(0, CHUNK)
        qr = tl.load(p_q + 2 * k, mask=k < r, other=0.0)[None, :]
        qi = tl.load(p_q + 2 * k + 1, mask=k < r, other=0.0)[None, :]
        yr, yi = planes(y, COLUMNS, CHUNK)
        y = interleave(yr * qr + yi * qi, yi * qr - yr * qi, COLUMNS, CHUNK)
        y = _turned(y, 1.0, COLUMNS, CHUNK)
        found = tl.dot(x, tl.trans(y), found, input_precision=PRECISION)
    store_rows(p_gh_out + b * (M * N * 2), found, 2 * N, 2 * N, i, 2 * j0, M, 2 * COLUMNS)


@triton.jit
def raw_kernel(
    p_u,
    p_v,
    p_scalars,
    p_kept,
    p_gw,
    p_l,
    p_shares,
    p_gu_out,
    p_gv_out,
    p_gscalars,
    M: tl.constexpr,
    N: tl.constexpr,
    r: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    T: tl.constexpr = (r + COLUMNS - 1) // COLUMNS
    WHOLE: tl.constexpr = M <= ROWS and N <= ROWS
    b, factor, tile = _place(T, 2)
    rows = M
    p_x = p_u + b * (M * r * 2)
    p_y = p_gu_out + b * (M * r * 2)
    p_gw += b * ((M + N) * r * 2)
    if factor == 1:
        rows = N
        p_x = p_v + b * (N * r * 2)
        p_y = p_gv_out + b * (N * r * 2)
        p_gw += M * r * 2
    a = tl.load(p_scalars + factor).to(tl.float32)
    p_e, p_norms, p_order = _kept(p_kept, b, r, STEP)
    p_e += factor * (r * r * 2)
    p_l += (b * 2 + factor) * (r * r * 2)
    p_norms += factor * r
    j0 = tile * COLUMNS
    j = j0 + tl.arange(0, COLUMNS)
    along = tl.zeros((COLUMNS,), tl.float32)
    g = tl.zeros((ROWS, 2 * COLUMNS), tl.float32)
    for i0 in tl.range(0, ROWS if WHOLE else rows, ROWS, num_stages=1, loop_unroll_factor=1):
        i = i0 + tl.arange(0, ROWS)
        g = tl.zeros((ROWS, 2 * COLUMNS), tl.float32)
        for k0 in tl.range(0, r, CHUNK, num_stages=STAGES):
            k = k0 + tl.arange(0, CHUNK)
            order = tl.load(p_order + k, mask=k < r, other=r).to(tl.int32)
            w = load_rows(p_gw, 2 * r, 2 * r, i, 2 * k0, rows, 2 * CHUNK)
            q = _polynomial(p_e, p_norms, a, order, j0, r, COLUMNS)
            g = tl.dot(w, _turned(q, 1.0, CHUNK, COLUMNS), g, input_precision=PRECISION)
        for k0 in tl.range(0, r, CHUNK, num_stages=STAGES):
            k = k0 + tl.arange(0, CHUNK)
            x = load_rows(p_x, 2 * r, 2 * r, i, 2 * k0, rows, 2 * CHUNK)
            given = load_rows(p_l, 2 * r, 2 * r, k, 2 * j0, r, 2 * COLUMNS)
            other = load_rows(p_l, 2 * r, 2 * r, j, 2 * k0, r, 2 * CHUNK)
            lr, li = planes(given, CHUNK, COLUMNS)
            other_r, other_i = planes(_swapped(other, COLUMNS, CHUNK), CHUNK, COLUMNS)
            given = interleave(-a * (lr + other_r), -a * (li - other_i), CHUNK, COLUMNS)
            g = tl.dot(x, _turned(given, 1.0, CHUNK, COLUMNS), g, input_precision=PRECISION)
        along += _of_columns(g * load_rows(p_x, 2 * r, 2 * r, i, 2 * j0, rows, 2 * COLUMNS), COLUMNS)
        if not WHOLE:
            store_rows(p_y, g, 2 * r, 2 * r, i, 2 * j0, rows, 2 * COLUMNS)
    norm = tl.load(p_norms + j, mask=j < r, other=0.0)
    # (g has 1 / (norm + 1e-8) by D already)
    along = _both(along * reciprocal_where(norm) / (norm + 1e-8), COLUMNS)[None, :]
    # also so that what was read above is read again, not kept in registers
    tl.debug_barrier()
    for i0 in tl.range(0, ROWS if WHOLE else rows, ROWS, num_stages=1, loop_unroll_factor=1):
        i = i0 + tl.arange(0, ROWS)
        if not WHOLE:
            g = load_rows(p_y, 2 * r, 2 * r, i, 2 * j0, rows, 2 * COLUMNS)
            tl.debug_barrier()
        x = load_rows(p_x, 2 * r, 2 * r, i, 2 * j0, rows, 2 * COLUMNS)
        store_rows(p_y, g - x * along, 2 * r, 2 * r, i, 2 * j0, rows, 2 * COLUMNS)
    if tile == 0:
        p_shares += b * (T * (2 * T + 1))
        total = 0.0
        for k in tl.range(0, T * T, num_stages=1):
            total += tl.load(p_shares + factor * T * T + k)
        tl.store(p_gscalars + b * 3 + factor, total)
        if factor == 0:
            total = 0.0
            for k in tl.range(0, T, num_stages=1):
                total += tl.load(p_shares + 2 * T * T + k)
            tl.store(p_gscalars + b * 3 + 2, total)


def _tiles(M: int, N: int, r: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants and threads of the launches whose programs own all rows of their columns."""
    rows = block(max(M, N))
    # rows that do not fit one tile go through memory on their way, and that takes registers
    sizes = {"M": M, "N": N, "r": r, "ROWS": rows if rows <= ROWS else ROWS // 2}
    found = sizes | {"COLUMNS": min(block(r), COLUMNS), "CHUNK": CHUNK, "STAGES": 2, "PRECISION": precision()}
    if found["ROWS"] <= 64:
        return found, {"num_warps": 4, "registers": 255}
    # two programs a multiprocessor: one has the tensor cores while the other prepares its operands
    return found, {"num_warps": 8, "registers": 128}


def _squares(constants: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same of the launches whose programs own a tile of an r x r matrix."""
    found = {name: value for name, value in constants.items() if name != "ROWS"}
    # three programs a multiprocessor
    return found, {"num_warps": 4, "registers": 168}


def _least(r: int) -> int:
    """Numbers a sample where the first two launches leave E and norms of both factors, and the order."""
    return 4 * r * r + 8 * r


def refined_launches(
    U_raw: Tensor, V_raw: Tensor, S_pred: Tensor, scalars: Tensor, U: Tensor, V: Tensor, kept: Tensor
) -> list[Launch]:
    """The launches that leave the refined factors in U and V, and the rest in `kept` `(B, STEP)`."""
    (B, r), M, N = S_pred.shape, U.shape[1], V.shape[1]
    constants, threads = _tiles(M, N, r)
    constants["STEP"] = kept.shape[1]
    of_squares, fewer = _squares(constants)
    T = -(-r // constants["COLUMNS"])
    raw = {"p_u": U_raw, "p_v": V_raw}
    first = raw | {"p_s": S_pred, "p_kept": kept}
    second = raw | {"p_scalars": scalars, "p_kept": kept, "p_u_out": U, "p_v_out": V}
    return [
        Launch(residual_kernel, (B * T * (T + 1),), first, of_squares, **fewer),
        Launch(refined_kernel, (B * 2 * T,), second, constants, **threads),
    ]


def svd_tail_launches(
    U_raw: Tensor, V_raw: Tensor, S_pred: Tensor, H: Tensor, scalars: Tensor, numbers: int | None = None
) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The launches of `svd_tail` in their order; its outputs, and `numbers` a sample for its gradients."""
    (B, r), (M, N) = S_pred.shape, H.shape[1:3]
    refuse_sizes(r, M, N)
    U, S, V = (torch.empty_like(x) for x in (U_raw, S_pred, V_raw))
    kept = H.new_empty((B, numbers or _least(r)))
    found = refined_launches(U_raw, V_raw, S_pred, scalars, U, V, kept)
    constants, threads = _tiles(M, N, r)
    constants["STEP"] = kept.shape[1]
    # one factor's columns alone: narrower where wide tiles leave multiprocessors with less than two programs
    if B * -(-r // constants["COLUMNS"]) < 2 * chip(H)[0]:
        constants["COLUMNS"] = 16
    arguments = {
        "p_u": U,
        "p_v": V,
        "p_s": S_pred,
        "p_h": H,
        "p_scalars": scalars,
        "p_kept": kept,
        "p_s_out": S,
    }
    count = B * -(-r // constants["COLUMNS"])
    found.append(Launch(calibrated_kernel, (count,), arguments, constants, **threads))
    return found, (U, S, V, kept)


def svd_tail(
    U_raw: Tensor, V_raw: Tensor, S_pred: Tensor, H: Tensor, scalars: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `kernels.svd_tail.svd_tail`, for large factors: three launches."""
    return svd_tail_kept(U_raw, V_raw, S_pred, H, scalars)[:3]


def svd_tail_kept(
    U_raw: Tensor, V_raw: Tensor, S_pred: Tensor, H: Tensor, scalars: Tensor, numbers: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`svd_tail`, and what its gradients need: `numbers` a sample, at least 4 r^2 + 8 r, which are used."""
    launches, outputs = svd_tail_launches(U_raw, V_raw, S_pred, H, scalars, numbers)
    for launch in launches:
        launch.run()
    return outputs


def svd_tail_backward_launches(
    gU: Tensor,
    gS: Tensor,
    gV: Tensor,
    U_raw: Tensor,
    V_raw: Tensor,
    S_pred: Tensor,
    H: Tensor,
    scalars: Tensor,
    gh: bool,
    kept: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """The launches of `svd_tail_backward` in their order; gradients, those of scalars a sample.

    `kept` is U, V and the last output of `svd_tail_kept`; None computes them again.
    """
    (B, r), (M, N) = S_pred.shape, H.shape[1:3]
    refuse_sizes(r, M, N)
    gU_raw, gV_raw, gS_pred = (torch.empty_like(x) for x in (U_raw, V_raw, S_pred))
    gH, gscalars = torch.empty_like(H) if gh else H.new_empty((0,)), H.new_empty((B, 3))
    launches = []
    if kept is None:
        # refined factors stand where their gradients will
        kept = gU_raw, gV_raw, H.new_empty((B, _least(r)))
        launches = refined_launches(U_raw, V_raw, S_pred, scalars, *kept)
    constants, threads = _tiles(M, N, r)
    T = -(-r // constants["COLUMNS"])
    outer = {"p_u": kept[0], "p_v": kept[1], "p_q": H.new_empty((B, r, 2)), "p_gh_out": gH}
    # of p_shares those of a and b tile by tile of r x r, then those of tau tile by tile of columns
    shared = {"p_kept": kept[2], "p_gw": H.new_empty((B, (M + N) * r, 2))}
    shared["p_shares"] = H.new_empty((B, T * (2 * T + 1)))
    normal = {"p_gu": gU, "p_gs": gS, "p_gv": gV, "p_u": kept[0], "p_v": kept[1], "p_s": S_pred, "p_h": H}
    normal |= shared | {"p_scalars": scalars, "p_q": outer["p_q"], "p_gs_out": gS_pred}
    core = shared | {"p_u": U_raw, "p_v": V_raw, "p_l": H.new_empty((B, 2, r, r, 2))}
    raw = core | {"p_scalars": scalars, "p_gu_out": gU_raw, "p_gv_out": gV_raw, "p_gscalars": gscalars}
    stepped = constants | {"STEP": kept[2].shape[1]}
    of_squares, fewer = _squares(stepped)
    launches.append(Launch(normal_kernel, (B * 2 * T,), normal, stepped, **threads))
    launches.append(Launch(core_kernel, (B * 2 * T * T,), core, of_squares, **fewer))
    if gh:
        count = B * -(-M // constants["ROWS"]) * -(-N // constants["COLUMNS"])
        launches.append(Launch(outer_kernel, (count,), outer, constants, **threads))
    launches.append(Launch(raw_kernel, (B * 2 * T,), raw, stepped, **threads))
    return launches, (gU_raw, gV_raw, gS_pred, gH, gscalars)


def svd_tail_backward(
    gU: Tensor,
    gS: Tensor,
    gV: Tensor,
    U_raw: Tensor,
    V_raw: Tensor,
    S_pred: Tensor,
    H: Tensor,
    scalars: Tensor,
    gh: bool,
    kept: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `kernels.svd_tail.svd_tail_backward`, for large factors: five launches, six with gradients of H.

    Two less with `kept`: U, V and the last output of `svd_tail_kept`.
    """
    launches, (*gradients, gscalars) = svd_tail_backward_launches(
        gU, gS, gV, U_raw, V_raw, S_pred, H, scalars, gh, kept
    )
    for launch in launches:
        launch.run()
    gU_raw, gV_raw, gS_pred, gH = gradients
    return gU_raw, gV_raw, gS_pred, gH, gscalars.sum(0, dtype=torch.float64)
