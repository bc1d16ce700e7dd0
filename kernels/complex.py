"""Complex tiles: loads and stores of interleaved parts in whole vectors, and products of planar tiles."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_complex(p, rows, columns, i0, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows from i0 on of a contiguous (rows, columns, 2) matrix as planes [ROWS, COLUMNS], zeros beyond."""
    i = i0 + tl.arange(0, ROWS)[:, None]
    j = tl.arange(0, 2 * COLUMNS)[None, :]
    x = tl.load(p + i * (2 * columns) + j, mask=(i < rows) & (j < 2 * columns), other=0.0)  # [R, 2C]
    return tl.split(tl.reshape(x, (ROWS, COLUMNS, 2)))


@triton.jit
def store_complex(p, re, im, rows, columns, i0, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Planes [ROWS, COLUMNS] to rows from i0 on of a contiguous (rows, columns, 2) matrix."""
    i = i0 + tl.arange(0, ROWS)[:, None]
    j = tl.arange(0, 2 * COLUMNS)[None, :]
    x = tl.reshape(tl.join(re, im), (ROWS, 2 * COLUMNS))
    tl.store(p + i * (2 * columns) + j, x, mask=(i < rows) & (j < 2 * columns))  # [R, 2C]


@triton.jit
def cdot(ar, ai, br, bi, PRECISION: tl.constexpr):
    """Complex product of planar tiles, four real products accumulated in float32."""
    re = tl.dot(ar, br, input_precision=PRECISION)
    im = tl.dot(ar, bi, input_precision=PRECISION)
    re = tl.dot(-ai, bi, acc=re, input_precision=PRECISION)
    im = tl.dot(ai, br, acc=im, input_precision=PRECISION)
    return re, im


@triton.jit
def load_tile(p, rows, columns, i0, j0, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows from i0, columns from j0 on of a contiguous (rows, columns, 2) matrix as planes, zeros beyond."""
    i = i0 + tl.arange(0, ROWS)[:, None]
    j = 2 * j0 + tl.arange(0, 2 * COLUMNS)[None, :]
    x = tl.load(p + i * (2 * columns) + j, mask=(i < rows) & (j < 2 * columns), other=0.0)  # [R, 2C]
    return tl.split(tl.reshape(x, (ROWS, COLUMNS, 2)))


@triton.jit
def store_tile(p, re, im, rows, columns, i0, j0, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Planes [ROWS, COLUMNS] to rows from i0, columns from j0 on of a (rows, columns, 2) matrix."""
    i = i0 + tl.arange(0, ROWS)[:, None]
    j = 2 * j0 + tl.arange(0, 2 * COLUMNS)[None, :]
    x = tl.reshape(tl.join(re, im), (ROWS, 2 * COLUMNS))
    tl.store(p + i * (2 * columns) + j, x, mask=(i < rows) & (j < 2 * columns))  # [R, 2C]


@triton.jit
def store_columns(p, re, im, columns, i, j, mask):
    """Planes to rows i and columns j, in any order, of a contiguous (rows, columns, 2) matrix."""
    q = p + i[:, None] * (2 * columns) + 2 * j[None, :]
    tl.store(q, re, mask=mask)
    tl.store(q + 1, im, mask=mask)


@triton.jit
def cdot_add(ar, ai, br, bi, re, im, PRECISION: tl.constexpr):
    """Complex product of planar tiles added to (re, im), four real products accumulated in float32."""
    re = tl.dot(ar, br, acc=re, input_precision=PRECISION)
    im = tl.dot(ar, bi, acc=im, input_precision=PRECISION)
    re = tl.dot(-ai, bi, acc=re, input_precision=PRECISION)
    im = tl.dot(ai, br, acc=im, input_precision=PRECISION)
    return re, im


# Products of matrices in memory, a tile at a time, over chunks of the inner dimension: whole operands unroll
# into more registers than there are. They read operands again for every tile; a sample stays in L1 and L2
# meanwhile, memory sees it once. `zero` is 0 by a way that the compiler does not see through: otherwise the
# offsets of every tile of a kernel are moved out of its loop over samples, into registers that are wanted.


@triton.jit
def product_tile(
    p_x,
    p_y,
    re,
    im,
    rows,
    inner,
    columns,
    i0,
    j0,
    zero,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(re, im) + X Y at rows i0 and columns j0; X (rows, inner, 2), Y (inner, columns, 2)."""
    for k in tl.range(0, inner, CHUNK, loop_unroll_factor=1, num_stages=1):
        xr, xi = load_tile(p_x, rows, inner, i0, k, ROWS, CHUNK)
        yr, yi = load_tile(p_y, inner, columns, k + zero, j0, CHUNK, COLUMNS)
        re, im = cdot_add(xr, xi, yr, yi, re, im, PRECISION)
    return re, im


@triton.jit
def adjoint_product_tile(
    p_x,
    p_y,
    inner,
    rows,
    columns,
    i0,
    j0,
    zero,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """X^H Y at rows i0 and columns j0; X (inner, rows, 2), Y (inner, columns, 2)."""
    re = tl.zeros((ROWS, COLUMNS), tl.float32)
    im = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in tl.range(0, inner, CHUNK, loop_unroll_factor=1, num_stages=1):
        xr, xi = load_tile(p_x, inner, rows, k + zero, i0, CHUNK, ROWS)
        yr, yi = load_tile(p_y, inner, columns, k + zero, j0, CHUNK, COLUMNS)
        re, im = cdot_add(tl.trans(xr), -tl.trans(xi), yr, yi, re, im, PRECISION)
    return re, im


@triton.jit
def product_adjoint_tile(
    p_x,
    p_y,
    p_q,
    rows,
    inner,
    columns,
    i0,
    j0,
    zero,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """X Y^H, or X diag(q) Y^H, at rows i0 and columns j0; X (rows, inner, 2), Y (columns, inner, 2)."""
    re = tl.zeros((ROWS, COLUMNS), tl.float32)
    im = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in tl.range(0, inner, CHUNK, loop_unroll_factor=1, num_stages=1):
        xr, xi = load_tile(p_x, rows, inner, i0, k, ROWS, CHUNK)
        yr, yi = load_tile(p_y, columns, inner, j0 + zero, k, COLUMNS, CHUNK)
        if WEIGHTED:
            j = k + tl.arange(0, CHUNK)
            qr = tl.load(p_q + 2 * j, mask=j < inner, other=0.0)[None, :]
            qi = tl.load(p_q + 2 * j + 1, mask=j < inner, other=0.0)[None, :]
            yr, yi = yr * qr + yi * qi, yi * qr - yr * qi
        re, im = cdot_add(xr, xi, tl.trans(yr), -tl.trans(yi), re, im, PRECISION)
    return re, im


@triton.jit
def modulus(re, im):
    """|re + i im| without overflow or underflow of the squares; NaN stays."""
    large = tl.maximum(tl.abs(re), tl.abs(im))
    safe = tl.where(large == 0.0, 1.0, large)
    re, im = re / safe, im / safe
    return large * tl.sqrt(re * re + im * im)


@triton.jit
def planes(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Real and imaginary part [ROWS, COLUMNS] of an interleaved tile [ROWS, 2 COLUMNS]."""
    return tl.split(tl.reshape(x, (ROWS, COLUMNS, 2)))


@triton.jit
def interleave(re, im, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The tile [ROWS, 2 COLUMNS] of planes [ROWS, COLUMNS]."""
    return tl.reshape(tl.join(re, im), (ROWS, 2 * COLUMNS))


@triton.jit
def load_rows(p, step, width, i, k0, rows, WIDTH: tl.constexpr):
    """Rows i, each `step` numbers after the last, columns from k0 on below `width`; zeros beyond."""
    k = k0 + tl.arange(0, WIDTH)[None, :]
    return tl.load(p + i[:, None] * step + k, mask=(i[:, None] < rows) & (k < width), other=0.0)  # [R, W]


@triton.jit
def load_transposed(p, step, k0, j0, inner, outer, INNER: tl.constexpr, OUTER: tl.constexpr):
    """The tile [INNER, OUTER] at (k0, j0) of the transpose of an (outer, inner) matrix; zeros beyond."""
    k = k0 + tl.arange(0, INNER)[:, None]
    j = j0 + tl.arange(0, OUTER)[None, :]
    return tl.load(p + j * step + k, mask=(j < outer) & (k < inner), other=0.0)  # [K, J]


@triton.jit
def store_rows(p, x, step, width, i, k0, rows, WIDTH: tl.constexpr):
    """A tile [R, WIDTH] to rows i, each `step` numbers after the last, columns from k0 on below `width`."""
    k = k0 + tl.arange(0, WIDTH)[None, :]
    tl.store(p + i[:, None] * step + k, x, mask=(i[:, None] < rows) & (k < width))  # [R, W]


@triton.jit
def store_swapped(p, x, rows, columns, i0, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows from i0 on of an interleaved (rows, columns, 2) matrix, to a contiguous (columns, rows, 2) one."""
    x = tl.reshape(tl.permute(tl.reshape(x, (ROWS, COLUMNS, 2)), (1, 0, 2)), (COLUMNS, 2 * ROWS))
    store_rows(p, x, 2 * rows, 2 * rows, tl.arange(0, COLUMNS), 2 * i0, columns, 2 * ROWS)
