"""Real tiles: masked loads, products, sums kept in memory, the layer norm of tokens both ways."""

from __future__ import annotations

import triton
import triton.language as tl

# the interpreter multiplies bfloat16 as integers; there, what was rounded is multiplied as float32
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def tile(p, i0, j0, rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] of a row-major matrix from (i0, j0) on, zeros outside of (rows, columns)."""
    i = i0 + tl.arange(0, ROWS)[:, None]
    j = j0 + tl.arange(0, COLUMNS)[None, :]
    return tl.load(p + i * stride + j, mask=(i >= 0) & (i < rows) & (j < columns), other=0.0)


@triton.jit
def store_tile(p, x, i0, j0, rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] to a row-major matrix from (i0, j0) on, nothing outside of (rows, columns)."""
    i = i0 + tl.arange(0, ROWS)[:, None]
    j = j0 + tl.arange(0, COLUMNS)[None, :]
    tl.store(p + i * stride + j, x.to(p.dtype.element_ty), mask=(i >= 0) & (i < rows) & (j < columns))


@triton.jit
def accumulate(p, x, fresh, i0, j0, rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Add x to a tile that this program alone touches; where `fresh`, what lies there is not read."""
    i = i0 + tl.arange(0, ROWS)[:, None]
    j = j0 + tl.arange(0, COLUMNS)[None, :]
    mask = (i < rows) & (j < columns)
    tl.store(
        p + i * stride + j, x + tl.load(p + i * stride + j, mask=mask & (fresh == 0), other=0.0), mask=mask
    )


@triton.jit
def product(a, b, TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """Matrix product of operands in the inputs' precision, accumulated in float32."""
    a, b = a.to(TYPE), b.to(TYPE)
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def statistics(p_x, t0, T, d, EPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Mean and reciprocal deviation of tokens t0 on over their d channels, in two passes."""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for j0 in tl.range(0, d, COLUMNS, loop_unroll_factor=1, num_stages=1):
        total += tile(p_x, t0, j0, T, d, d, ROWS, COLUMNS).to(tl.float32)
    mean = tl.sum(total, 1) / d
    square = tl.zeros((ROWS, COLUMNS), tl.float32)
    for j0 in tl.range(0, d, COLUMNS, loop_unroll_factor=1, num_stages=1):
        x = tile(p_x, t0, j0, T, d, d, ROWS, COLUMNS).to(tl.float32) - mean[:, None]
        x = tl.where(j0 + tl.arange(0, COLUMNS)[None, :] < d, x, 0.0)
        square += x * x
    return mean, 1.0 / tl.sqrt_rn(tl.sum(square, 1) / d + EPS)


@triton.jit
def normalised(x, mean, rstd, p_w, p_b, t0, c0, T, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """`(x - mean) rstd` and that times w plus b, of channels c0 on; zeros outside, where x has none."""
    t = t0 + tl.arange(0, ROWS)[:, None]
    c = c0 + tl.arange(0, COLUMNS)
    w = tl.load(p_w + c, mask=c < columns, other=0.0).to(tl.float32)[None, :]
    b = tl.load(p_b + c, mask=c < columns, other=0.0).to(tl.float32)[None, :]
    inside = (t >= 0) & (t < T) & (c < columns)[None, :]
    x = tl.where(inside, (x.to(tl.float32) - mean[:, None]) * rstd[:, None], 0.0)
    return x, tl.where(inside, x * w + b, 0.0)


@triton.jit(noinline=True)
def norm_backward(
    p_ticket,
    count,
    p_g,
    p_x,
    p_gy,
    p_w,
    p_gx,
    T: tl.constexpr,
    d: tl.constexpr,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """`gx = gy + LayerNorm'(g)` of one sample, by the last of the `count` programs that wrote g.

    g is the gradient of what the norm put out; gx may lie where g does. The numbers are the same whichever
    program comes last. A function of its own: inlined into a loop over samples, its addresses fill registers.
    """
    # what the threads of this program wrote comes before its ticket
    tl.debug_barrier()
    last = tl.atomic_add(p_ticket, 1, sem="acq_rel") == count - 1
    end = tl.where(last, T, 0)
    j = tl.arange(0, COLUMNS)
    for t0 in tl.range(0, end, ROWS, loop_unroll_factor=1, num_stages=1):
        t = t0 + tl.arange(0, ROWS)[:, None]
        mean, rstd = statistics(p_x, t0, T, d, EPS, ROWS, COLUMNS)
        plain = tl.zeros((ROWS, COLUMNS), tl.float32)
        along = tl.zeros((ROWS, COLUMNS), tl.float32)
        for j0 in tl.range(0, d, COLUMNS, loop_unroll_factor=1, num_stages=1):
            inside = (t < T) & (j0 + j < d)[None, :]
            # other programs wrote g: past L1
            g = tl.load(p_g + t * d + j0 + j[None, :], mask=inside, other=0.0, cache_modifier=".cg")
            w = tl.load(p_w + j0 + j, mask=j0 + j < d, other=0.0).to(tl.float32)
            x = tile(p_x, t0, j0, T, d, d, ROWS, COLUMNS).to(tl.float32)
            plain += g * w[None, :]
            along += g * w[None, :] * (x - mean[:, None]) * rstd[:, None]
        plain_mean = tl.sum(plain, 1)[:, None] / d
        along_mean = tl.sum(along, 1)[:, None] / d
        tl.debug_barrier()
        for j0 in tl.range(0, d, COLUMNS, loop_unroll_factor=1, num_stages=1):
            inside = (t < T) & (j0 + j < d)[None, :]
            g = tl.load(p_g + t * d + j0 + j[None, :], mask=inside, other=0.0, cache_modifier=".cg")
            w = tl.load(p_w + j0 + j, mask=j0 + j < d, other=0.0).to(tl.float32)
            x = (tile(p_x, t0, j0, T, d, d, ROWS, COLUMNS).to(tl.float32) - mean[:, None]) * rstd[:, None]
            gx = (g * w[None, :] - plain_mean - x * along_mean) * rstd[:, None]
            gx += tile(p_gy, t0, j0, T, d, d, ROWS, COLUMNS).to(tl.float32)
            store_tile(p_gx, gx, t0, j0, T, d, d, ROWS, COLUMNS)
