"""Spectral self-calibration: the diagonal of U^H H V from H V alone, one program a sample.

Forward an M x N by N x r product and column dots, no r x r matrix. Operands are read again tile by tile from
L1 and L2, memory sees them once: `8 (M N + (M + N) r)` bytes a sample forward, twice that backward with every
gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .complex import adjoint_product_tile, load_tile, modulus, product_adjoint_tile, product_tile, store_tile
from .launch import Launch
from .ortho import THREADS, programs, reciprocal_where, refuse_sizes, tiles


@triton.jit
def measured_columns(
    p_u,
    p_h,
    p_v,
    p_w,
    M,
    N,
    r,
    j0,
    zero,
    WANT_W: tl.constexpr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Columns from j0 on of diag(U^H W), W = H V, and W itself where wanted."""
    # as in weighted_outer
    r = r + 8 * zero
    N = N + 8 * zero
    dr = tl.zeros((C,), tl.float32)
    di = tl.zeros((C,), tl.float32)
    for i0 in tl.range(zero, M, ROWS, loop_unroll_factor=1):
        wr = tl.zeros((ROWS, C), tl.float32)
        wi = tl.zeros((ROWS, C), tl.float32)
        wr, wi = product_tile(p_h, p_v, wr, wi, M, N, r, i0, j0, zero, ROWS, C, CHUNK, PRECISION)
        ur, ui = load_tile(p_u, M, r, i0, j0, ROWS, C)
        dr += tl.sum(ur * wr + ui * wi, 0)
        di += tl.sum(ur * wi - ui * wr, 0)
        if WANT_W:
            store_tile(p_w, wr, wi, M, r, i0, j0, ROWS, C)
    return dr, di


@triton.jit
def adjoint_columns(
    p_h,
    p_u,
    p_q,
    p_g,
    p_z,
    M,
    N,
    r,
    zero,
    WANT_G: tl.constexpr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Z = H^H U diag(q), and G added where wanted."""
    for j0 in tl.range(0, r, C, loop_unroll_factor=1):
        j = j0 + tl.arange(0, C)
        qr = tl.load(p_q + 2 * j, mask=j < r, other=0.0)[None, :]
        qi = tl.load(p_q + 2 * j + 1, mask=j < r, other=0.0)[None, :]
        for i0 in tl.range(0, N, ROWS, loop_unroll_factor=1):
            zr, zi = adjoint_product_tile(p_h, p_u, M, N, r, i0, j0, zero, ROWS, C, CHUNK, PRECISION)
            zr, zi = zr * qr - zi * qi, zr * qi + zi * qr
            if WANT_G:
                gr, gi = load_tile(p_g, N, r, i0 + zero, j0, ROWS, C)
                zr += gr
                zi += gi
            store_tile(p_z, zr, zi, N, r, i0 + zero, j0, ROWS, C)


@triton.jit
def weighted_outer(
    p_u,
    p_v,
    p_q,
    p_z,
    M,
    N,
    r,
    zero,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Z = U diag(q) V^H, (M, N, 2)."""
    # strides that the compiler does not know: it would keep the offsets of these tiles all through a kernel
    r = r + 8 * zero
    N = N + 8 * zero
    for j0 in tl.range(zero * C, N, C, loop_unroll_factor=1):
        for i0 in tl.range(zero, M, ROWS, loop_unroll_factor=1):
            zr, zi = product_adjoint_tile(
                p_u, p_v, p_q, M, r, N, i0, j0, zero, True, ROWS, C, CHUNK, PRECISION
            )
            store_tile(p_z, zr, zi, M, N, i0, j0, ROWS, C)


@triton.jit
def weight_of(dr, di, size, g, tau):
    """Gradient of d from that of tau |d|; none at d = 0."""
    share = g * tau * reciprocal_where(size)
    return dr * share, di * share


@triton.jit
def places(p_s, j, r, zero, C: tl.constexpr):
    """Places of columns j by falling S, stable, NaN first."""
    sj = tl.load(p_s + j, mask=j < r, other=0.0)[None, :]
    place = tl.zeros((C,), tl.int32)
    for i0 in tl.range(zero * C, r, C, loop_unroll_factor=1):
        i = i0 + tl.arange(0, C)
        si = tl.load(p_s + i, mask=i < r, other=0.0)[:, None]
        larger = (si > sj) | ((si != si) & (sj == sj))
        equal = (si == sj) | ((si != si) & (sj != sj))
        before = (larger | (equal & (i[:, None] < j[None, :]))) & (i < r)[:, None]
        place += tl.sum(before.to(tl.int32), 0)
    return place


@triton.jit
def spectral_fwd_kernel(
    p_u,
    p_h,
    p_v,
    p_s,
    p_tau,
    p_out,
    B,
    M: tl.constexpr,
    N: tl.constexpr,
    r: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    tau = tl.load(p_tau).to(tl.float32)
    for b in tl.range(pid, B, tl.num_programs(0), loop_unroll_factor=1):
        zero = tl.cast(b, tl.int32) // B
        for j0 in tl.range(0, r, COLUMNS, loop_unroll_factor=1):
            dr, di = measured_columns(
                p_u + b * (M * r * 2),
                p_h + b * (M * N * 2),
                p_v + b * (N * r * 2),
                p_out,
                M,
                N,
                r,
                j0,
                zero,
                False,
                ROWS,
                COLUMNS,
                CHUNK,
                PRECISION,
            )
            j = j0 + tl.arange(0, COLUMNS)
            s = tl.load(p_s + b * r + j, mask=j < r, other=0.0)
            tl.store(p_out + b * r + j, (1.0 - tau) * s + tau * modulus(dr, di) + 1e-6, mask=j < r)


@triton.jit
def spectral_bwd_kernel(
    p_g,
    p_u,
    p_h,
    p_v,
    p_s,
    p_tau,
    p_gu,
    p_gh,
    p_gv,
    p_gs,
    p_gtau,
    p_q,
    B,
    M: tl.constexpr,
    N: tl.constexpr,
    r: tl.constexpr,
    GU: tl.constexpr,
    GH: tl.constexpr,
    GV: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    p_q += pid * (r * 2)
    tau = tl.load(p_tau).to(tl.float32)
    for b in tl.range(pid, B, tl.num_programs(0), loop_unroll_factor=1):
        zero = tl.cast(b, tl.int32) // B
        p_x = p_u + b * (M * r * 2)
        p_a = p_h + b * (M * N * 2)
        p_y = p_v + b * (N * r * 2)
        gtau = 0.0
        for j0 in tl.range(0, r, COLUMNS, loop_unroll_factor=1):
            dr, di = measured_columns(
                p_x, p_a, p_y, p_gu + b * (M * r * 2), M, N, r, j0, zero, GU, ROWS, COLUMNS, CHUNK, PRECISION
            )
            j = j0 + tl.arange(0, COLUMNS)
            g = tl.load(p_g + b * r + j, mask=j < r, other=0.0)
            s = tl.load(p_s + b * r + j, mask=j < r, other=0.0)
            size = modulus(dr, di)
            gtau += tl.sum(g * (size - s), 0)
            tl.store(p_gs + b * r + j, (1.0 - tau) * g, mask=j < r)
            qr, qi = weight_of(dr, di, size, g, tau)
            if GU:
                tl.debug_barrier()
                for i0 in tl.range(zero, M, ROWS, loop_unroll_factor=1):
                    wr, wi = load_tile(p_gu + b * (M * r * 2), M, r, i0, j0, ROWS, COLUMNS)
                    wr, wi = wr * qr[None, :] + wi * qi[None, :], wi * qr[None, :] - wr * qi[None, :]
                    tl.debug_barrier()
                    store_tile(p_gu + b * (M * r * 2), wr, wi, M, r, i0, j0, ROWS, COLUMNS)
            tl.store(p_q + 2 * j, qr, mask=j < r)
            tl.store(p_q + 2 * j + 1, qi, mask=j < r)
        tl.debug_barrier()
        tl.store(p_gtau + b, gtau)
        if GV:
            p_z = p_gv + b * (N * r * 2)
            adjoint_columns(p_a, p_x, p_q, p_z, p_z, M, N, r, zero, False, ROWS, COLUMNS, CHUNK, PRECISION)
        if GH:
            p_z = p_gh + b * (M * N * 2)
            weighted_outer(p_x, p_y, p_q, p_z, M, N, r, zero, ROWS, COLUMNS, CHUNK, PRECISION)
        tl.debug_barrier()


def spectral_calibrate_launch(
    U: Tensor, H: Tensor, V: Tensor, S_pred: Tensor, tau: Tensor
) -> tuple[Launch, Tensor]:
    """The launch of `spectral_calibrate`, and its output."""
    (B, r), (M, N) = S_pred.shape, H.shape[1:3]
    refuse_sizes(r, M, N)
    out = torch.empty_like(S_pred)
    arguments = {"p_u": U, "p_h": H, "p_v": V, "p_s": S_pred, "p_tau": tau, "p_out": out}
    arguments["B"] = B
    return Launch(spectral_fwd_kernel, (programs(U, 0),), arguments, tiles(r, M=M, N=N), **THREADS), out


def spectral_calibrate(U: Tensor, H: Tensor, V: Tensor, S_pred: Tensor, tau: Tensor) -> Tensor:
    """`(1 - tau) S_pred + tau |diag(U^H H V)| + 1e-6`, one launch.

    U `(B, M, r, 2)`, H `(B, M, N, 2)`, V `(B, N, r, 2)`, S_pred `(B, r)` contiguous float32; tau float64
    `(1,)` on their device. `ValueError` beyond `ortho.limit`.
    """
    launch, out = spectral_calibrate_launch(U, H, V, S_pred, tau)
    launch.run()
    return out


def spectral_calibrate_backward_launch(
    g: Tensor,
    U: Tensor,
    H: Tensor,
    V: Tensor,
    S_pred: Tensor,
    tau: Tensor,
    gu: bool,
    gh: bool,
    gv: bool,
) -> tuple[Launch, tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """The launch of `spectral_calibrate_backward`: gradients, that of tau sample by sample."""
    (B, r), (M, N) = S_pred.shape, H.shape[1:3]
    refuse_sizes(r, M, N)
    gU, gH, gV = (
        torch.empty_like(x) if wanted else x.new_empty((0,)) for x, wanted in ((U, gu), (H, gh), (V, gv))
    )
    gS, gtau = torch.empty_like(S_pred), S_pred.new_empty((B, 1))
    arguments = {"p_g": g, "p_u": U, "p_h": H, "p_v": V, "p_s": S_pred, "p_tau": tau}
    arguments |= {"p_gu": gU, "p_gh": gH, "p_gv": gV, "p_gs": gS, "p_gtau": gtau}
    count = programs(U, 8 * r)
    arguments |= {"p_q": U.new_empty((count, r, 2)), "B": B}
    constants = tiles(r, M=M, N=N) | {"GU": gu, "GH": gh, "GV": gv}
    launch = Launch(spectral_bwd_kernel, (count,), arguments, constants, **THREADS)
    return launch, (gU, gH, gV, gS, gtau)


def spectral_calibrate_backward(
    g: Tensor,
    U: Tensor,
    H: Tensor,
    V: Tensor,
    S_pred: Tensor,
    tau: Tensor,
    gu: bool,
    gh: bool,
    gv: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of U, H, V (`(0,)` where not wanted), S_pred and tau of `spectral_calibrate`; one launch.

    With d = diag(U^H H V) and q = tau g d / |d|, 0 at d = 0: `gU = H V diag(conj q)`, `gV = H^H U diag(q)`,
    `gH = U diag(q) V^H`, `gS_pred = (1 - tau) g`, `gtau = sum g (|d| - S_pred)`.
    """
    launch, (gU, gH, gV, gS, gtau) = spectral_calibrate_backward_launch(g, U, H, V, S_pred, tau, gu, gh, gv)
    launch.run()
    return gU, gH, gV, gS, gtau.sum(0, dtype=torch.float64)
