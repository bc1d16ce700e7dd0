"""Two-dimensional transforms of a sample that stays in registers: radix passes between exchanges of tiles.

A side is `n = n1 n2`, index `j = n2 a + b`, frequency `k = k1 + n1 k2`: a transform of n1 points over a,
twiddles `exp(-2 pi i b k1 / n)`, a transform of n2 points over b. A plane is one tensor [T, P, Q] whose
first index runs over the points of the transform at hand: a layout by default keeps that index in a thread's
registers, so that butterflies are arithmetic between registers, and an exchange, a permutation that puts
another index first, is one pass through shared memory. Nothing is scaled. The inverse is the same on planes
that have changed places.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# a side as the points of its two passes
FACTORS = {8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16)}

ROOT_HALF = tl.constexpr(math.sqrt(0.5))
COS_PI_8 = tl.constexpr(math.cos(math.pi / 8))
SIN_PI_8 = tl.constexpr(math.sin(math.pi / 8))


@functools.lru_cache(maxsize=64)
def twiddle_table(n: int, device: torch.device) -> Tensor:
    """`exp(-2 pi i b k1 / n)` as planes `(2, n1, n2)`, from float64."""
    with torch.inference_mode(False), torch.no_grad():
        n1, n2 = FACTORS[n]
        angle = (torch.arange(n1)[:, None] * torch.arange(n2)[None, :]).double() * (-2 * math.pi / n)
        return torch.stack([angle.cos(), angle.sin()]).float().to(device)


@triton.jit
def halves(x, HIGH: tl.constexpr, LOW: tl.constexpr, P: tl.constexpr, Q: tl.constexpr):
    """Both halves [HIGH, LOW, P, Q] of the middle bit of the first index of x [2 HIGH LOW, P, Q]."""
    return tl.split(tl.permute(tl.reshape(x, (HIGH, 2, LOW, P, Q)), (0, 2, 3, 4, 1)))


@triton.jit
def whole(a, b, HIGH: tl.constexpr, LOW: tl.constexpr, P: tl.constexpr, Q: tl.constexpr):
    return tl.reshape(tl.permute(tl.join(a, b), (0, 4, 1, 2, 3)), (2 * HIGH * LOW, P, Q))


@triton.jit
def butterflies(r, i, STAGE: tl.constexpr, POINTS: tl.constexpr, P: tl.constexpr, Q: tl.constexpr):
    """A stage of radix 2, decimation in frequency; the compiler knows which rotation a register takes."""
    HIGH: tl.constexpr = 1 << STAGE
    LOW: tl.constexpr = POINTS // (2 * HIGH)
    ar, br = halves(r, HIGH, LOW, P, Q)
    ai, bi = halves(i, HIGH, LOW, P, Q)
    dr, di = ar - br, ai - bi
    j = tl.arange(0, LOW)[None, :, None, None]
    if LOW >= 2:
        quarter = j >= LOW // 2
        dr, di = tl.where(quarter, di, dr), tl.where(quarter, -dr, di)
    if LOW >= 4:
        eighth = j % (LOW // 2) >= LOW // 4
        dr, di = tl.where(eighth, ROOT_HALF * (dr + di), dr), tl.where(eighth, ROOT_HALF * (di - dr), di)
    if LOW >= 8:
        sixteenth = j % 2 == 1
        cr, ci = COS_PI_8 * dr + SIN_PI_8 * di, COS_PI_8 * di - SIN_PI_8 * dr
        dr, di = tl.where(sixteenth, cr, dr), tl.where(sixteenth, ci, di)
    return whole(ar + br, dr, HIGH, LOW, P, Q), whole(ai + bi, di, HIGH, LOW, P, Q)


@triton.jit
def reverse_bits(x, POINTS: tl.constexpr, P: tl.constexpr, Q: tl.constexpr):
    if POINTS == 4:
        x = tl.permute(tl.reshape(x, (2, 2, P, Q)), (1, 0, 2, 3))
    elif POINTS == 8:
        x = tl.permute(tl.reshape(x, (2, 2, 2, P, Q)), (2, 1, 0, 3, 4))
    elif POINTS == 16:
        x = tl.permute(tl.reshape(x, (2, 2, 2, 2, P, Q)), (3, 2, 1, 0, 4, 5))
    return tl.reshape(x, (POINTS, P, Q))


@triton.jit
def dft(r, i, POINTS: tl.constexpr, P: tl.constexpr, Q: tl.constexpr):
    """The transform of 2, 4, 8 or 16 points over the first index of planes, in natural order."""
    r, i = butterflies(r, i, 0, POINTS, P, Q)
    if POINTS >= 4:
        r, i = butterflies(r, i, 1, POINTS, P, Q)
    if POINTS >= 8:
        r, i = butterflies(r, i, 2, POINTS, P, Q)
    if POINTS >= 16:
        r, i = butterflies(r, i, 3, POINTS, P, Q)
    return reverse_bits(r, POINTS, P, Q), reverse_bits(i, POINTS, P, Q)


@triton.jit
def twiddle(r, i, p_w, s_k, s_b, K: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr):
    """Planes times the twiddles of their first index and, with ROWS, of their second, or else last one."""
    k, b = tl.arange(0, K), tl.arange(0, B)
    if ROWS:
        p_w += k[:, None, None] * s_k + b[None, :, None] * s_b
    else:
        p_w += k[:, None, None] * s_k + b[None, None, :] * s_b
    c, s = tl.load(p_w), tl.load(p_w + K * B)  # [K, B, 1] or [K, 1, B]
    return r * c - i * s, r * s + i * c


@triton.jit
def columns_to_rows(x, M1: tl.constexpr, M2: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr):
    """From [N2, M1 M2, N1] to [M1, M2, N1 N2]."""
    x = tl.permute(tl.reshape(x, (N2, M1, M2, N1)), (1, 2, 3, 0))
    return tl.reshape(x, (M1, M2, N1 * N2))


@triton.jit
def rows_to_columns(x, M1: tl.constexpr, M2: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr):
    """From [M1, M2, N1 N2] to [N2, M1 M2, N1]."""
    x = tl.permute(tl.reshape(x, (M1, M2, N1, N2)), (3, 0, 1, 2))
    return tl.reshape(x, (N2, M1 * M2, N1))


@triton.jit
def sample_offsets(M1: tl.constexpr, M2: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr):
    """Where [N1, M, 2 N2] numbers of a contiguous (M, N, 2) matrix lie."""
    a, i, b = tl.arange(0, N1), tl.arange(0, M1 * M2), tl.arange(0, 2 * N2)
    return i[None, :, None] * (2 * N1 * N2) + a[:, None, None] * (2 * N2) + b[None, None, :]


@triton.jit
def load_sample(p, M1: tl.constexpr, M2: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr):
    """The planes [N1, M, N2] of a contiguous (M, N, 2) matrix."""
    x = tl.load(p + sample_offsets(M1, M2, N1, N2))
    return tl.split(tl.reshape(x, (N1, M1 * M2, N2, 2)))


@triton.jit
def store_sample(p, r, i, M1: tl.constexpr, M2: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr):
    """Planes [N1, M, N2] to a contiguous (M, N, 2) matrix."""
    x = tl.reshape(tl.join(r, i), (N1, M1 * M2, 2 * N2))
    tl.store(p + sample_offsets(M1, M2, N1, N2), x)


@triton.jit
def transform(r, i, p_wm, p_wn, M1: tl.constexpr, M2: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr):
    """The 2-D transform of planes [N1, M, N2], as planes [M2, M1, N].

    At (t, p, q) with `q = k1 N2 + k2` they hold row frequency `p + M1 t`, column frequency `k1 + N1 k2`.
    """
    M: tl.constexpr = M1 * M2
    N: tl.constexpr = N1 * N2
    r, i = dft(r, i, N1, M, N2)
    r, i = twiddle(r, i, p_wn, N2, 1, N1, N2, False)
    r, i = dft(tl.permute(r, (2, 1, 0)), tl.permute(i, (2, 1, 0)), N2, M, N1)
    r, i = columns_to_rows(r, M1, M2, N1, N2), columns_to_rows(i, M1, M2, N1, N2)
    r, i = dft(r, i, M1, M2, N)
    r, i = twiddle(r, i, p_wm, M2, 1, M1, M2, True)
    return dft(tl.permute(r, (1, 0, 2)), tl.permute(i, (1, 0, 2)), M2, M1, N)


@triton.jit
def inverse_transform(
    r, i, p_wm, p_wn, M1: tl.constexpr, M2: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr
):
    """The way back, from planes [M2, M1, N] to [N1, M, N2]."""
    M: tl.constexpr = M1 * M2
    N: tl.constexpr = N1 * N2
    i, r = dft(i, r, M2, M1, N)
    i, r = twiddle(i, r, p_wm, 1, M2, M2, M1, True)
    i, r = dft(tl.permute(i, (1, 0, 2)), tl.permute(r, (1, 0, 2)), M1, M2, N)
    r, i = rows_to_columns(r, M1, M2, N1, N2), rows_to_columns(i, M1, M2, N1, N2)
    i, r = dft(i, r, N2, M, N1)
    i, r = twiddle(i, r, p_wn, 1, N2, N2, N1, False)
    i, r = dft(tl.permute(i, (2, 1, 0)), tl.permute(r, (2, 1, 0)), N1, M, N2)
    return r, i
