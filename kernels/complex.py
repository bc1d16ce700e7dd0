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
