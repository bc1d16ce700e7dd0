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
