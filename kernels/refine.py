"""Refinement of an SVD: all steps and the closing in one launch, one program a sample.

The k x k algebra runs in registers; the core `D = U^H H V`, P and Q between their uses, the factors, their
products with H and `H / |H|` go through scratch that a program uses again for all its samples: 70 KB at 64x64
with 16 columns, in L1 and L2. Columns are padded to 16 or 32 by zeros, which every formula leaves zero. The
forward alone: gradients are the reference's.

The angles of a rotation are taken by their tangent, `tan t = |n| / (g + sqrt(g^2 + |n|^2))` with
`tan 2t = |n| / g`: square roots alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .complex import (
    adjoint_product_tile,
    cdot,
    cdot_add,
    load_tile,
    store_columns,
    store_tile,
)
from .launch import Launch, block, precision
from .ortho import adjoint_multiply, multiply

# k x k matrices of more columns do not fit the registers of a program
LARGEST_ACTIVE = 32
LARGEST_SIDE = 1024
# programs that share the samples: their scratch stays in L2
PROGRAMS = 1024
# numbers of the reference
TINY = tl.constexpr(1e-20)
ROTATION = tl.constexpr(1.5)
SAFE = tl.constexpr(1.6)
SOFT = tl.constexpr(0.5)
POLISH = tl.constexpr(3)
CLOSE = tl.constexpr(3)


def limit(M: int, N: int, k: int) -> list[str]:
    """Why channels M x N with k active columns are not served; empty where they are."""
    found = [f"{n} is more than {LARGEST_SIDE}" for n in dict.fromkeys((M, N)) if n > LARGEST_SIDE]
    if not 1 <= k <= LARGEST_ACTIVE:
        found.append(f"{k} active columns are not between 1 and {LARGEST_ACTIVE}")
    if k > min(M, N):
        found.append(f"{k} active columns are more than min(M, N) = {min(M, N)}")
    return found


@triton.jit
def adjoint(re, im):
    return tl.trans(re), -tl.trans(im)


@triton.jit
def times(ar, ai, br, bi, c):
    """A diag(c) of a complex diagonal (br, bi) and a real factor c."""
    br, bi = (br * c)[None, :], (bi * c)[None, :]
    return ar * br - ai * bi, ar * bi + ai * br


@triton.jit
def diagonal(x, K: tl.constexpr):
    """The diagonal along columns."""
    i = tl.arange(0, K)
    return tl.sum(tl.where(i[:, None] == i[None, :], x, 0.0), 0)


@triton.jit
def upright(x, K: tl.constexpr):
    """A vector along columns as one along rows."""
    i = tl.arange(0, K)
    return tl.sum(tl.where(i[:, None] == i[None, :], x[None, :], 0.0), 1)


@triton.jit
def phase(re, im):
    """z / |z|, and 1 at 0."""
    square = re * re + im * im
    known = square > TINY
    inverse = 1.0 / tl.sqrt(tl.where(known, square, 1.0))
    return tl.where(known, re * inverse, 1.0), tl.where(known, im * inverse, 0.0)


@triton.jit
def conjugate_phases(dr, di, K: tl.constexpr):
    """The conjugate phases of the diagonal of D."""
    cr, ci = phase(diagonal(dr, K), diagonal(di, K))
    return cr, -ci


@triton.jit
def identity(k, K: tl.constexpr):
    """1 on the first k of the diagonal."""
    i = tl.arange(0, K)
    return tl.where((i[:, None] == i[None, :]) & (i[None, :] < k), 1.0, 0.0)


@triton.jit
def largest_row(re, im, k, K: tl.constexpr):
    """The largest row sum of the moduli of a matrix, as the reference has it."""
    inside = tl.arange(0, K)[None, :] < k
    sums = tl.sum(tl.where(inside, tl.sqrt(re * re + im * im + TINY), 0.0), 1)
    return tl.max(sums, 0)


@triton.jit
def unitary(xr, xi, k, K: tl.constexpr, PRECISION: tl.constexpr):
    """The polynomial of a skew-Hermitian X that is nearly unitary, X bounded first."""
    sr, si = cdot(xr, xi, xr, xi, PRECISION)
    square = 1.0 / tl.maximum(largest_row(sr, si, k, K) / (ROTATION * ROTATION), 1.0)
    root = tl.sqrt(square)
    sr, si = sr * square, si * square
    fr, fi = cdot(sr, si, sr, si, PRECISION)
    er, ei = cdot(fr, fi, fr, fi, PRECISION)
    one = identity(k, K)
    er = one - 0.125 * fr + (0.185 / 16) * er
    ei = -0.125 * fi + (0.185 / 16) * ei
    return cdot(one + xr * root + 0.5 * sr, xi * root + 0.5 * si, er, ei, PRECISION)


@triton.jit
def spread(dr, di, s, soft, K: tl.constexpr):
    """What softens the rotations: soft times the root of the energy off the diagonal in rows i and j."""
    energy = dr * dr + di * di
    off_j = 0.5 * (tl.sum(energy, 0) + tl.sum(tl.trans(energy), 0)) - s * s
    off_j = tl.maximum(off_j, 0.0)
    return soft * tl.sqrt(upright(off_j, K)[:, None] + off_j[None, :] + TINY) + 1e-12


@triton.jit
def signs(s, K: tl.constexpr):
    """s_j - s_i, and its sign, +1 above and -1 below the diagonal where it is zero."""
    i = tl.arange(0, K)[:, None]
    j = tl.arange(0, K)[None, :]
    gap = s[None, :] - upright(s, K)[:, None]
    order = tl.where(i < j, 1.0, -1.0)
    sign = tl.where(gap > 0, 1.0, tl.where(gap < 0, -1.0, order))
    return gap, tl.where(i == j, 0.0, sign)


@triton.jit
def angles(dr, di, soft, HERMITIAN: tl.constexpr, K: tl.constexpr):
    """The skew-Hermitian X and Y of `rotations`; the diagonal of D is real."""
    s = diagonal(dr, K)
    softening = spread(dr, di, s, soft, K)
    gap, sign = signs(s, K)
    tr, ti = adjoint(dr, di)
    g = tl.abs(gap) + softening
    nr, ni = dr + tr, di + ti
    w = sign / (g + tl.sqrt(g * g + nr * nr + ni * ni))
    xr, xi = nr * w, ni * w
    if HERMITIAN:
        return xr, xi, xr, xi
    g = tl.maximum(s[None, :] + upright(s, K)[:, None], 0.0) + softening
    nr, ni = dr - tr, di - ti
    w = tl.abs(sign) / (g + tl.sqrt(g * g + nr * nr + ni * ni))
    return xr, xi, nr * w, ni * w


@triton.jit
def square_of(p, K: tl.constexpr):
    """A K x K matrix of scratch."""
    return load_tile(p, K, K, 0, 0, K, K)


@triton.jit
def keep_square(p, re, im, K: tl.constexpr):
    """A K x K matrix to scratch that all threads are done with; they see it at once."""
    tl.debug_barrier()
    store_tile(p, re, im, K, K, 0, 0, K, K)
    tl.debug_barrier()


@triton.jit
def diagonalize(
    dr, di, p_p, p_q, soft, sweeps, k, HERMITIAN: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr
):
    """`P^H D Q` after so many rotations of D; P to p_p, and Q to p_q but for the phases of its columns."""
    one = identity(k, K)
    keep_square(p_p, one, tl.zeros((K, K), tl.float32), K)
    if HERMITIAN:
        tr, ti = adjoint(dr, di)
        dr, di = 0.5 * (dr + tr), 0.5 * (di + ti)
        cr, ci = diagonal(one, K), tl.zeros((K,), tl.float32)
    else:
        keep_square(p_q, one, tl.zeros((K, K), tl.float32), K)
        cr, ci = conjugate_phases(dr, di, K)
        dr, di = times(dr, di, cr, ci, 1.0)
    for _ in tl.range(0, sweeps, loop_unroll_factor=1):
        xr, xi, yr, yi = angles(dr, di, soft, HERMITIAN, K)
        if HERMITIAN:
            ar, ai = unitary(xr, xi, k, K, PRECISION)
            dr, di = cdot(dr, di, ar, ai, PRECISION)
            tr, ti = adjoint(ar, ai)
            dr, di = cdot(tr, ti, dr, di, PRECISION)
            tr, ti = adjoint(dr, di)
            dr, di = 0.5 * (dr + tr), 0.5 * (di + ti)
            pr, pi = square_of(p_p, K)
            pr, pi = cdot(pr, pi, ar, ai, PRECISION)
            keep_square(p_p, pr, pi, K)
        else:
            # D <- D B, its adjoint times A, and the adjoint of that
            for side in tl.range(0, 2, loop_unroll_factor=1):
                sign = tl.where(side == 0, -1.0, 1.0)
                ar, ai = unitary(xr + sign * yr, xi + sign * yi, k, K, PRECISION)
                dr, di = cdot(dr, di, ar, ai, PRECISION)
                dr, di = adjoint(dr, di)
                p_r = p_q
                if side == 1:
                    p_r = p_p
                    cr, ci = diagonal(one, K), tl.zeros((K,), tl.float32)
                pr, pi = square_of(p_r, K)
                pr, pi = times(pr, pi, cr, ci, 1.0)
                pr, pi = cdot(pr, pi, ar, ai, PRECISION)
                keep_square(p_r, pr, pi, K)
            cr, ci = conjugate_phases(dr, di, K)
            dr, di = times(dr, di, cr, ci, 1.0)
    return dr, di, cr, ci


@triton.jit
def inverse_root(gr, gi, square, iterations, k, K: tl.constexpr, PRECISION: tl.constexpr):
    """Björck's iteration on a Gram matrix scaled by `square` or, where that is safer, by its own bound."""
    hr, hi = cdot(gr, gi, gr, gi, PRECISION)
    row = tl.sqrt(largest_row(hr, hi, k, K))
    square = tl.minimum(square, 1.0 / tl.maximum(row / (SAFE * SAFE), 1.0))
    one = identity(k, K)
    er, ei = one - gr * square, -gi * square
    hr, hi = one - (2 * gr - hr * square) * square, -(2 * gi - hi * square) * square
    root = tl.sqrt(square)
    fr, fi = root * (one + 0.5 * er), root * (0.5 * ei)
    for i in tl.range(0, iterations - 1, loop_unroll_factor=1):
        if i > 0:
            hr, hi = cdot(er, ei, er, ei, PRECISION)
        er, ei = cdot(hr, hi, 0.75 * one + 0.25 * er, 0.25 * ei, PRECISION)
        hr, hi = cdot(fr, fi, er, ei, PRECISION)
        fr, fi = fr + 0.5 * hr, fi + 0.5 * hi
    return fr, fi


@triton.jit
def expanded(
    p_x,
    p_y,
    p_a,
    p_b,
    er,
    ei,
    inverse,
    gain,
    bound,
    rows,
    zero,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`X A + R` to p_y, R the part of `Y B` outside the span times diag(inverse), bounded.

    E is the rotated core. Returns the Gram matrix of that, and a scaling that brings its norm to 1.6 at most.
    """
    energy = tl.zeros((K,), tl.float32)
    br, bi = square_of(p_b, K)
    for i0 in tl.range(zero, rows, ROWS, loop_unroll_factor=1):
        yr, yi = load_tile(p_y, rows, K, i0, 0, ROWS, K)
        yr, yi = cdot(yr, yi, br, bi, PRECISION)
        energy += tl.sum(yr * yr + yi * yi, 0)
        tl.debug_barrier()
        store_tile(p_y, yr, yi, rows, K, i0, 0, ROWS, K)
    outside = tl.maximum(energy - tl.sum(er * er + ei * ei, 0), 0.0)
    total = tl.sum(outside * inverse * inverse, 0) * gain * gain
    share = bound * bound / tl.maximum(total, bound * bound)
    weight = inverse * (gain * tl.sqrt(share))
    ar, ai = square_of(p_a, K)
    cr, ci = cdot(ar, ai, er, ei, PRECISION)
    cr, ci = ar - cr * weight[None, :], ai - ci * weight[None, :]
    gr = tl.zeros((K, K), tl.float32)
    gi = tl.zeros((K, K), tl.float32)
    tl.debug_barrier()
    for i0 in tl.range(zero, rows, ROWS, loop_unroll_factor=1):
        yr, yi = load_tile(p_y, rows, K, i0, 0, ROWS, K)
        xr, xi = load_tile(p_x, rows, K, i0, 0, ROWS, K)
        yr, yi = cdot_add(xr, xi, cr, ci, yr * weight[None, :], yi * weight[None, :], PRECISION)
        tl.debug_barrier()
        store_tile(p_y, yr, yi, rows, K, i0, 0, ROWS, K)
        tr, ti = adjoint(yr, yi)
        gr, gi = cdot_add(tr, ti, yr, yi, gr, gi, PRECISION)
    tl.debug_barrier()
    return gr, gi, 2.0 / (2.0 + total * share)


@triton.jit
def straightened(
    p_x,
    p_y,
    p_a,
    p_out,
    place,
    rows,
    k,
    zero,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`Z + Z (I - Z^H Z) / 2` of Z = X A to p_out, columns at their places; Y is scratch."""
    ar, ai = square_of(p_a, K)
    gr = tl.zeros((K, K), tl.float32)
    gi = tl.zeros((K, K), tl.float32)
    for i0 in tl.range(zero, rows, ROWS, loop_unroll_factor=1):
        xr, xi = load_tile(p_x, rows, K, i0, 0, ROWS, K)
        xr, xi = cdot(xr, xi, ar, ai, PRECISION)
        store_tile(p_y, xr, xi, rows, K, i0, 0, ROWS, K)
        tr, ti = adjoint(xr, xi)
        gr, gi = cdot_add(tr, ti, xr, xi, gr, gi, PRECISION)
    gr, gi = 0.5 * (identity(k, K) - gr), -0.5 * gi
    tl.debug_barrier()
    for i0 in tl.range(zero, rows, ROWS, loop_unroll_factor=1):
        xr, xi = load_tile(p_y, rows, K, i0, 0, ROWS, K)
        xr, xi = cdot_add(xr, xi, gr, gi, xr, xi, PRECISION)
        i = i0 + tl.arange(0, ROWS)
        inside = (i < rows)[:, None] & (tl.arange(0, K) < k)[None, :]
        store_columns(p_out, xr, xi, k, i, place, inside)
    tl.debug_barrier()


@triton.jit
def power_of_two(exponent):
    """2^exponent, exponent from -126 to 127."""
    return tl.cast((exponent + 127) << 23, tl.float32, bitcast=True)


@triton.jit
def load_unit(p_h, p_x, M, N, zero, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """`X = H / |H|` to p_x at any scale; the factors of which X is H times both, and |H|, 0 at H = 0."""
    peak = 0.0
    for i0 in tl.range(zero, M, ROWS, loop_unroll_factor=1):
        for j0 in tl.range(0, N, COLUMNS, loop_unroll_factor=1):
            hr, hi = load_tile(p_h, M, N, i0, j0, ROWS, COLUMNS)
            peak = tl.maximum(peak, tl.max(tl.max(tl.maximum(tl.abs(hr), tl.abs(hi)), 1), 0))
    exponent = ((tl.cast(peak, tl.int32, bitcast=True) >> 23) & 255) - 127
    exponent = tl.where(peak > 0.0, exponent, 0)
    half = exponent >> 1
    # in two halves, which are numbers both
    first, second = power_of_two(-half), power_of_two(half - exponent)
    square = 0.0
    for i0 in tl.range(zero, M, ROWS, loop_unroll_factor=1):
        for j0 in tl.range(0, N, COLUMNS, loop_unroll_factor=1):
            hr, hi = load_tile(p_h, M, N, i0, j0, ROWS, COLUMNS)
            hr, hi = hr * first * second, hi * first * second
            square += tl.sum(tl.sum(hr * hr + hi * hi, 1), 0)
    norm = tl.sqrt(tl.where(square == 0.0, 1.0, square))
    second = second / norm
    for i0 in tl.range(zero, M, ROWS, loop_unroll_factor=1):
        for j0 in tl.range(0, N, COLUMNS, loop_unroll_factor=1):
            hr, hi = load_tile(p_h, M, N, i0, j0, ROWS, COLUMNS)
            store_tile(p_x, hr * first * second, hi * first * second, M, N, i0, j0, ROWS, COLUMNS)
    tl.debug_barrier()
    size = norm * power_of_two(half) * power_of_two(exponent - half)
    return first, second, tl.where(square == 0.0, 0.0, size)


@triton.jit
def padded(p_x, p_y, rows, k, zero, ROWS: tl.constexpr, K: tl.constexpr):
    """k columns of X as the first of K of Y, zeros in the others."""
    for i0 in tl.range(zero, rows, ROWS, loop_unroll_factor=1):
        xr, xi = load_tile(p_x, rows, k, i0, 0, ROWS, K)
        store_tile(p_y, xr, xi, rows, K, i0, 0, ROWS, K)
    tl.debug_barrier()


@triton.jit
def places(size, k, K: tl.constexpr):
    """The place of every column by falling size, stable, NaN first."""
    i = tl.arange(0, K)[:, None]
    j = tl.arange(0, K)[None, :]
    si, sj = upright(size, K)[:, None], size[None, :]
    larger = (si > sj) | ((si != si) & (sj == sj))
    equal = (si == sj) | ((si != si) & (sj != sj))
    before = (larger | (equal & (i < j))) & (i < k)
    return tl.sum(before.to(tl.int32), 0)


@triton.jit
def refine_fwd_kernel(
    p_h,
    p_u,
    p_v,
    p_scalars,
    p_u_out,
    p_s_out,
    p_v_out,
    p_order,
    p_norm,
    p_scratch,
    steps,
    sweeps,
    B,
    M,
    N,
    k,
    HERMITIAN: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    sides: tl.constexpr = 1 if HERMITIAN else 2
    square: tl.constexpr = 2 * K * K
    left = M * (2 * K)
    both = M if HERMITIAN else M + N
    factors = both * (2 * K)
    p_p = p_scratch + pid * (3 * square + 2 * M * N + 2 * factors)
    p_q = p_p if HERMITIAN else p_p + square
    p_d = p_p + 2 * square
    p_x = p_p + 3 * square
    p_su = p_x + 2 * M * N
    p_sv = p_su if HERMITIAN else p_su + left
    p_w = p_su + factors
    p_z = p_w + left
    for b in tl.range(pid, B, tl.num_programs(0), loop_unroll_factor=1):
        zero = tl.cast(b, tl.int32) // B
        _first, _second, norm = load_unit(p_h + b * (2 * M * N), p_x, M, N, zero, ROWS, CHUNK)
        tl.store(p_norm + b, norm)
        padded(p_u + b * (2 * M * k), p_su, M, k, zero, ROWS, K)
        if not HERMITIAN:
            padded(p_v + b * (2 * N * k), p_sv, N, k, zero, ROWS, K)
        # the last round closes
        for t in tl.range(0, steps + 1, loop_unroll_factor=1):
            zero = tl.cast(b, tl.int32) // (B + t)
            multiply(p_x, p_sv, p_w, M, N, K, zero, ROWS, K, CHUNK, PRECISION)
            dr, di = adjoint_product_tile(p_su, p_w, M, K, K, 0, 0, zero, K, K, CHUNK, PRECISION)
            keep_square(p_d, dr, di, K)
            row = p_scalars + 4 * tl.minimum(t, tl.maximum(steps - 1, 0))
            soft = tl.load(row, mask=steps > 0, other=SOFT)
            dr, di, cr, ci = diagonalize(dr, di, p_p, p_q, soft, sweeps, k, HERMITIAN, K, PRECISION)
            if not HERMITIAN:
                qr, qi = square_of(p_q, K)
                qr, qi = times(qr, qi, cr, ci, 1.0)
                keep_square(p_q, qr, qi, K)
            s = diagonal(dr, K)
            if t < steps:
                if not HERMITIAN:
                    adjoint_multiply(p_x, p_su, p_z, M, N, K, zero, ROWS, K, CHUNK, PRECISION)
                keep_square(p_d, dr, di, K)
            mu = tl.load(row + 1, mask=steps > 0, other=1.0)
            gain = tl.load(row + 2, mask=steps > 0, other=1.0)
            bound = tl.load(row + 3, mask=steps > 0, other=1.0)
            inverse = tl.where(s < 0, -1.0, 1.0) / (tl.abs(s) + mu) if HERMITIAN else 1.0 / (s + mu)
            for side in tl.range(0, sides, loop_unroll_factor=1):
                p_f, p_y, p_a, p_b, rows = p_su, p_w, p_p, p_q, M
                if side == 1:
                    p_f, p_y, p_a, p_b, rows = p_sv, p_z, p_q, p_p, N
                scaling = 1.0
                if t < steps:
                    er, ei = square_of(p_d, K)
                    if side == 1:
                        er, ei = adjoint(er, ei)
                    gr, gi, scaling = expanded(
                        p_f, p_y, p_a, p_b, er, ei, inverse, gain, bound, rows, zero, K, ROWS, PRECISION
                    )
                else:
                    gr, gi = adjoint_product_tile(p_f, p_f, rows, K, K, 0, 0, zero, K, K, CHUNK, PRECISION)
                    ar, ai = square_of(p_a, K)
                    gr, gi = cdot(gr, gi, ar, ai, PRECISION)
                    ar, ai = adjoint(ar, ai)
                    gr, gi = cdot(ar, ai, gr, gi, PRECISION)
                iterations = tl.where(t < steps, POLISH, CLOSE)
                fr, fi = inverse_root(gr, gi, scaling, iterations, k, K, PRECISION)
                if t < steps:
                    for i0 in tl.range(zero, rows, ROWS, loop_unroll_factor=1):
                        yr, yi = load_tile(p_y, rows, K, i0, 0, ROWS, K)
                        yr, yi = cdot(yr, yi, fr, fi, PRECISION)
                        store_tile(p_f, yr, yi, rows, K, i0, 0, ROWS, K)
                else:
                    ar, ai = square_of(p_a, K)
                    ar, ai = cdot(ar, ai, fr, fi, PRECISION)
                    keep_square(p_a, ar, ai, K)
                tl.debug_barrier()
        # what the closing left: the core in p_d, in p_p and p_q what makes the columns
        zero = tl.cast(b, tl.int32) // (B + steps + 1)
        dr, di = square_of(p_d, K)
        qr, qi = square_of(p_q, K)
        dr, di = cdot(dr, di, qr, qi, PRECISION)
        pr, pi = square_of(p_p, K)
        sr = tl.sum(pr * dr + pi * di, 0)
        si = tl.sum(pr * di - pi * dr, 0)
        size = tl.abs(sr)
        spectrum = sr
        if not HERMITIAN:
            cr, ci = phase(sr, si)
            qr, qi = times(qr, qi, cr, -ci, 1.0)
            keep_square(p_q, qr, qi, K)
            size = tl.sqrt(sr * sr + si * si + 1e-36)
            spectrum = size
        place = places(size, k, K)
        j = tl.arange(0, K)
        tl.store(p_s_out + b * k + place, spectrum, mask=j < k)
        tl.store(p_order + b * k + place, j.to(tl.int64), mask=j < k)
        for side in tl.range(0, sides, loop_unroll_factor=1):
            p_f, p_y, p_a, rows, p_out = p_su, p_w, p_p, M, p_u_out + b * (2 * M * k)
            if side == 1:
                p_f, p_y, p_a, rows, p_out = p_sv, p_z, p_q, N, p_v_out + b * (2 * N * k)
            straightened(p_f, p_y, p_a, p_out, place, rows, k, zero, K, ROWS, PRECISION)


def _threads(K: int) -> dict[str, int]:
    return {"num_warps": 1 if K == 16 else 4, "registers": 255}


def refine_launch(
    H: Tensor, U: Tensor, V: Tensor | None, scalars: Tensor, sweeps: int
) -> tuple[Launch, tuple[Tensor, ...]]:
    """The launch of `refine`, its outputs."""
    (B, M, N, _), k = H.shape, U.shape[2]
    found = limit(M, N, k)
    if found:
        raise ValueError("the Triton kernels do not serve these channels: " + "; ".join(found))
    steps, K, programs = len(scalars), block(k), min(B, PROGRAMS)
    both = M if V is None else M + N
    S, norm = H.new_empty((B, k)), H.new_empty((B,))
    outputs = torch.empty_like(U), S, U.new_empty((0,)) if V is None else torch.empty_like(V)
    order = H.new_empty((B, k), dtype=torch.int64)
    arguments = {"p_h": H, "p_u": U, "p_v": V, "p_scalars": scalars, "p_u_out": outputs[0], "p_s_out": S}
    arguments |= {"p_v_out": outputs[2], "p_order": order, "p_norm": norm}
    arguments["p_scratch"] = H.new_empty((programs, 6 * K * K + 2 * M * N + 4 * both * K))
    arguments |= {"steps": steps, "sweeps": sweeps, "B": B, "M": M, "N": N, "k": k}
    constants = {"HERMITIAN": V is None, "K": K, "ROWS": 16, "CHUNK": 16}
    constants["PRECISION"] = precision()
    launch = Launch(refine_fwd_kernel, (programs,), arguments, constants, **_threads(K))
    return launch, (*outputs, order, norm)


def refine(
    H: Tensor, U: Tensor, V: Tensor | None, scalars: Tensor, sweeps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`refine_span` and `refine_close` of `H / |H|`, one launch for all steps.

    H `(B, M, N, 2)`, U `(B, M, k, 2)` and V `(B, N, k, 2)`, their columns orthonormal, or None where H is
    Hermitian; scalars `(steps, 4)`; contiguous float32. Returns U, S (signed where V is None), V (`(0,)`
    where it is None), the order of the columns int64 `(B, k)`, and |H| `(B,)`. `ValueError` beyond `limit`.
    """
    launch, outputs = refine_launch(H, U, V, scalars, sweeps)
    launch.run()
    U, S, V, order, norm = outputs
    return U, S, V, order, norm
