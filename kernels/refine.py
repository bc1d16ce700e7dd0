"""Refinement of an SVD: all steps and the closing in one launch, one program a sample.

The k x k matrices (the core `D = U^H H V`, its rotations, Gram matrices and their roots), the factors, their
products with H and `H / |H|` go through scratch that a program uses again for all its samples: 82 KB at 64x64
with 16 columns, in L1 and L2. Columns are padded to 16 or 32 by zeros, which every formula leaves zero. The
gradients are in `refine_gradient`.

The angles of a rotation are taken by their tangent, `tan t = |n| / (g + sqrt(g^2 + |n|^2))` with
`tan 2t = |n| / g`: square roots alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .complex import (
    adjoint_product_tile,
    cdot,
    cdot_add,
    load_tile,
    product_tile,
    store_columns,
    store_tile,
)
from .launch import Launch, block, precision
from .ortho import THREADS, programs

# k x k matrices of more columns do not fit the registers of a program
LARGEST_ACTIVE = 32
LARGEST_SIDE = 1024
# of a tile of tall matrices: at 64 the compiler for sm_100 takes paths that fail inside functions
ROWS = 32
# numbers of the reference
TINY = tl.constexpr(1e-20)
ROTATION = tl.constexpr(1.5)
SAFE = tl.constexpr(1.6)
SOFT = tl.constexpr(0.5)
# of Björck's iteration on a Gram matrix, which is written out
ITERATIONS = 3
FLOOR = tl.constexpr(1e-36)
# K x K matrices of a program's scratch
SQUARES = tl.constexpr(8)


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
def diagonal_of(p, K: tl.constexpr):
    """The diagonal of a K x K matrix of scratch, loaded: a sum over the matrix takes registers for good."""
    i = (2 * K + 2) * tl.arange(0, K)
    return tl.load(p + i), tl.load(p + i + 1)


# A sum over several warps ends with loads by some threads alone, and a register that is not always written is
# kept from the kernel's start to its end: such sums go through scratch.


@triton.jit
def column_sums(p, rows: tl.constexpr, K: tl.constexpr):
    """Of a real (rows, K) matrix of scratch."""
    found = tl.zeros((K,), tl.float32)
    for i in tl.range(0, rows, loop_unroll_factor=8):
        found += tl.load(p + i * K + tl.arange(0, K))
    return found


@triton.jit
def complex_sums(p, K: tl.constexpr):
    """The sums of the columns of a K x K matrix of scratch."""
    re = tl.zeros((K,), tl.float32)
    im = tl.zeros((K,), tl.float32)
    for i in tl.range(0, K, loop_unroll_factor=8):
        q = p + i * (2 * K) + 2 * tl.arange(0, K)
        re += tl.load(q)
        im += tl.load(q + 1)
    return re, im


@triton.jit
def energies(p, side, K: tl.constexpr):
    """Of the columns of a K x K matrix of scratch, or of its rows."""
    down = tl.where(side == 1, 2, 2 * K)
    across = 2 * K + 2 - down
    found = tl.zeros((K,), tl.float32)
    for i in tl.range(0, K, loop_unroll_factor=8):
        q = p + i * down + across * tl.arange(0, K)
        re, im = tl.load(q), tl.load(q + 1)
        found += re * re + im * im
    return found


@triton.jit
def keep_real(p, x, ROWS: tl.constexpr, K: tl.constexpr):
    """A real tile to scratch, for `column_sums`."""
    tl.store(p + tl.arange(0, ROWS)[:, None] * K + tl.arange(0, K)[None, :], x)
    tl.debug_barrier()


@triton.jit
def through_scratch(p, x, ROWS: tl.constexpr):
    """A vector of at most 32 numbers by way of scratch: every warp has all of it then."""
    tl.store(p + tl.arange(0, ROWS), x)
    tl.debug_barrier()
    return tl.load(p + tl.arange(0, ROWS))


@triton.jit
def phase(re, im):
    """z / |z|, and 1 at 0."""
    square = re * re + im * im
    known = square > TINY
    inverse = 1.0 / tl.sqrt(tl.where(known, square, 1.0))
    return tl.where(known, re * inverse, 1.0), tl.where(known, im * inverse, 0.0)


@triton.jit
def conjugate_phases(p, K: tl.constexpr):
    """The conjugate phases of the diagonal of a matrix of scratch."""
    dr, di = diagonal_of(p, K)
    cr, ci = phase(dr, di)
    return cr, -ci


@triton.jit
def identity(k, K: tl.constexpr):
    """1 on the first k of the diagonal."""
    i = tl.arange(0, K)
    return tl.where((i[:, None] == i[None, :]) & (i[None, :] < k), 1.0, 0.0)


@triton.jit
def largest_row(re, im, k: tl.constexpr, K: tl.constexpr):
    """The largest row sum of the moduli of a matrix, as the reference has it."""
    inside = tl.arange(0, K)[None, :] < k
    sums = tl.sum(tl.where(inside, tl.sqrt(re * re + im * im + TINY), 0.0), 1)
    return tl.max(sums, 0)


@triton.jit
def unitary(xr, xi, k: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
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
def off_diagonal(p_d, s, K: tl.constexpr):
    """Half the energy of row and column j off the diagonal, as it is computed: it may be below zero."""
    return 0.5 * (energies(p_d, 0, K) + energies(p_d, 1, K)) - s * s


@triton.jit
def spread(off):
    """The root of the energy off the diagonal in rows i and j, what softens the rotations."""
    off = tl.maximum(off, 0.0)
    return tl.sqrt(off[:, None] + off[None, :] + TINY)


@triton.jit
def signs(s, K: tl.constexpr):
    """s_j - s_i, and its sign, +1 above and -1 below the diagonal where it is zero."""
    i = tl.arange(0, K)[:, None]
    j = tl.arange(0, K)[None, :]
    gap = s[None, :] - s[:, None]
    order = tl.where(i < j, 1.0, -1.0)
    sign = tl.where(gap > 0, 1.0, tl.where(gap < 0, -1.0, order))
    return gap, tl.where(i == j, 0.0, sign)


@triton.jit
def angles(dr, di, s, off, soft, HERMITIAN: tl.constexpr, K: tl.constexpr):
    """The skew-Hermitian X and Y of `rotations`; s is the diagonal of D."""
    softening = soft * spread(off) + 1e-12
    gap, sign = signs(s, K)
    tr, ti = adjoint(dr, di)
    g = tl.abs(gap) + softening
    nr, ni = dr + tr, di + ti
    w = sign / (g + tl.sqrt(g * g + nr * nr + ni * ni))
    xr, xi = nr * w, ni * w
    if HERMITIAN:
        return xr, xi, xr, xi
    g = tl.maximum(s[None, :] + s[:, None], 0.0) + softening
    nr, ni = dr - tr, di - ti
    w = tl.abs(sign) / (g + tl.sqrt(g * g + nr * nr + ni * ni))
    return xr, xi, nr * w, ni * w


@triton.jit
def square_of(p, K: tl.constexpr):
    """A K x K matrix of scratch."""
    return load_tile(p, K, K, 0, 0, K, K)


@triton.jit
def keep(p, re, im, K: tl.constexpr):
    """A K x K matrix to scratch."""
    store_tile(p, re, im, K, K, 0, 0, K, K)


# What follows to the kernel are functions of their own, from scratch to scratch: inlined, their addresses and
# matrices fill the registers. Each ends with a barrier, and has one before it writes where it read.


@triton.jit(noinline=True)
def begin(p_raw, p_d, p_p, p_q, k: tl.constexpr, HERMITIAN: tl.constexpr, K: tl.constexpr):
    """The core with a real diagonal to p_d; P and Q of that."""
    dr, di = square_of(p_raw, K)
    one = identity(k, K)
    nothing = tl.zeros((K, K), tl.float32)
    if HERMITIAN:
        tr, ti = adjoint(dr, di)
        dr, di = 0.5 * (dr + tr), 0.5 * (di + ti)
    else:
        cr, ci = conjugate_phases(p_raw, K)
        dr, di = times(dr, di, cr, ci, 1.0)
        keep(p_q, one * cr[None, :], one * ci[None, :], K)
    keep(p_d, dr, di, K)
    keep(p_p, one, nothing, K)
    tl.debug_barrier()


@triton.jit(noinline=True)
def generators(p_d, p_x, p_y, soft, HERMITIAN: tl.constexpr, K: tl.constexpr):
    """X + Y and X - Y of `angles`, or X alone."""
    dr, di = square_of(p_d, K)
    s, _ = diagonal_of(p_d, K)
    xr, xi, yr, yi = angles(dr, di, s, off_diagonal(p_d, s, K), soft, HERMITIAN, K)
    if HERMITIAN:
        keep(p_x, xr, xi, K)
    else:
        keep(p_x, xr + yr, xi + yi, K)
        keep(p_y, xr - yr, xi - yi, K)
    tl.debug_barrier()


@triton.jit(noinline=True)
def make_unitary(p_x, k: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    """`unitary` in place."""
    xr, xi = square_of(p_x, K)
    xr, xi = unitary(xr, xi, k, K, PRECISION)
    tl.debug_barrier()
    keep(p_x, xr, xi, K)
    tl.debug_barrier()


@triton.jit(noinline=True)
def turn(
    p_d,
    p_p,
    p_q,
    p_a,
    p_b,
    p_d_out,
    p_p_out,
    p_q_out,
    HERMITIAN: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`A^H D B`, P A and Q B, columns of the first and the last by conjugate phases."""
    dr, di = square_of(p_d, K)
    br, bi = square_of(p_b, K)
    ar, ai = square_of(p_a, K)
    dr, di = cdot(dr, di, br, bi, PRECISION)
    tr, ti = adjoint(ar, ai)
    dr, di = cdot(tr, ti, dr, di, PRECISION)
    pr, pi = square_of(p_p, K)
    pr, pi = cdot(pr, pi, ar, ai, PRECISION)
    tl.debug_barrier()
    keep(p_p_out, pr, pi, K)
    if HERMITIAN:
        tr, ti = adjoint(dr, di)
        keep(p_d_out, 0.5 * (dr + tr), 0.5 * (di + ti), K)
    else:
        keep(p_d_out, dr, di, K)
        qr, qi = square_of(p_q, K)
        qr, qi = cdot(qr, qi, br, bi, PRECISION)
        tl.debug_barrier()
        cr, ci = conjugate_phases(p_d_out, K)
        dr, di = times(dr, di, cr, ci, 1.0)
        qr, qi = times(qr, qi, cr, ci, 1.0)
        tl.debug_barrier()
        keep(p_d_out, dr, di, K)
        keep(p_q_out, qr, qi, K)
    tl.debug_barrier()


# one link of the chain that makes a core diagonal: D, P, Q, and A and B that lead to the next
LINK = tl.constexpr(5)


@triton.jit
def diagonalize(
    p_raw,
    p_chain,
    link,
    soft,
    sweeps,
    k: tl.constexpr,
    HERMITIAN: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`P^H D Q` after so many rotations, its P and Q: the last link of a chain, its one where link is 0."""
    square: tl.constexpr = 2 * K * K
    second: tl.constexpr = 1 if HERMITIAN else 2
    begin(p_raw, p_chain, p_chain + square, p_chain + second * square, k, HERMITIAN, K)
    for _ in tl.range(0, sweeps, loop_unroll_factor=1):
        p_a = p_chain + 3 * square
        p_b = p_chain + (second + 2) * square
        generators(p_chain, p_a, p_b, soft, HERMITIAN, K)
        make_unitary(p_a, k, K, PRECISION)
        if not HERMITIAN:
            make_unitary(p_b, k, K, PRECISION)
        p_next = p_chain + link
        turn(
            p_chain, p_chain + square, p_chain + second * square, p_a, p_b,
            p_next, p_next + square, p_next + second * square, HERMITIAN, K, PRECISION,
        )  # fmt: skip
        p_chain = p_next
    return p_chain


@triton.jit
def inverse_root(gr, gi, square, k: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    """Björck's iteration on a Gram matrix scaled by `square` or, where that is safer, by its own bound."""
    hr, hi = cdot(gr, gi, gr, gi, PRECISION)
    row = tl.sqrt(largest_row(hr, hi, k, K))
    square = tl.minimum(square, 1.0 / tl.maximum(row / (SAFE * SAFE), 1.0))
    one = identity(k, K)
    er, ei = one - gr * square, -gi * square
    hr, hi = one - (2 * gr - hr * square) * square, -(2 * gi - hi * square) * square
    root = tl.sqrt(square)
    fr, fi = root * (one + 0.5 * er), root * (0.5 * ei)
    er, ei = cdot(hr, hi, 0.75 * one + 0.25 * er, 0.25 * ei, PRECISION)
    hr, hi = cdot(fr, fi, er, ei, PRECISION)
    fr, fi = fr + 0.5 * hr, fi + 0.5 * hi
    hr, hi = cdot(er, ei, er, ei, PRECISION)
    er, ei = cdot(hr, hi, 0.75 * one + 0.25 * er, 0.25 * ei, PRECISION)
    hr, hi = cdot(fr, fi, er, ei, PRECISION)
    return fr + 0.5 * hr, fi + 0.5 * hi


@triton.jit(noinline=True)
def take_root(p_g, p_f, square, k: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    """`inverse_root` of G to p_f."""
    gr, gi = square_of(p_g, K)
    fr, fi = inverse_root(gr, gi, square, k, K, PRECISION)
    keep(p_f, fr, fi, K)
    tl.debug_barrier()


@triton.jit
def shifted_inverse(s, mu, HERMITIAN: tl.constexpr):
    """`sign(s) / (|s| + mu)`, or `1 / (s + mu)`."""
    return tl.where(s < 0, -1.0, 1.0) / (tl.abs(s) + mu) if HERMITIAN else 1.0 / (s + mu)


@triton.jit
def core_of(p_d, side, K: tl.constexpr):
    """The rotated core as a side sees it, D or D^H."""
    dr, di = square_of(p_d, K)
    if side == 1:
        dr, di = adjoint(dr, di)
    return dr, di


@triton.jit(noinline=True)
def expand(
    p_x,
    p_raw,
    p_y,
    p_t,
    p_a,
    p_b,
    p_d,
    p_row,
    p_energy,
    p_sums,
    rows,
    side,
    HERMITIAN: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`Y = raw B` and `T = X A + R`, R what of Y is outside the span times the shifted inverse, bounded.

    The energies of the columns of Y to p_energy, by way of ROWS x K numbers at p_sums. Returns a scaling of T
    that brings its norm to 1.6 at most.
    raw, Y and T may be one.
    """
    squares = tl.zeros((ROWS, K), tl.float32)
    br, bi = square_of(p_b, K)
    for i0 in tl.range(0, rows, ROWS, loop_unroll_factor=1):
        yr, yi = load_tile(p_raw, rows, K, i0, 0, ROWS, K)
        yr, yi = cdot(yr, yi, br, bi, PRECISION)
        squares += yr * yr + yi * yi
        tl.debug_barrier()
        store_tile(p_y, yr, yi, rows, K, i0, 0, ROWS, K)
    keep_real(p_sums, squares, ROWS, K)
    energy = column_sums(p_sums, ROWS, K)
    tl.store(p_energy + tl.arange(0, K), energy)
    er, ei = core_of(p_d, side, K)
    gain = tl.load(p_row + 2)
    bound = tl.load(p_row + 3)
    s, _ = diagonal_of(p_d, K)
    inverse = shifted_inverse(s, tl.load(p_row + 1), HERMITIAN)
    outside = tl.maximum(energy - energies(p_d, side, K), 0.0)
    total = tl.sum(outside * inverse * inverse, 0) * gain * gain
    share = bound * bound / tl.maximum(total, bound * bound)
    weight = inverse * (gain * tl.sqrt(share))
    ar, ai = square_of(p_a, K)
    cr, ci = cdot(ar, ai, er, ei, PRECISION)
    cr, ci = ar - cr * weight[None, :], ai - ci * weight[None, :]
    tl.debug_barrier()
    for i0 in tl.range(0, rows, ROWS, loop_unroll_factor=1):
        yr, yi = load_tile(p_y, rows, K, i0, 0, ROWS, K)
        xr, xi = load_tile(p_x, rows, K, i0, 0, ROWS, K)
        yr, yi = cdot_add(xr, xi, cr, ci, yr * weight[None, :], yi * weight[None, :], PRECISION)
        tl.debug_barrier()
        store_tile(p_t, yr, yi, rows, K, i0, 0, ROWS, K)
    tl.debug_barrier()
    return 2.0 / (2.0 + total * share)


@triton.jit(noinline=True)
def apply(
    p_x,
    p_b,
    p_y,
    rows,
    ADD: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`Y = X B`, or Y and that, of K columns; Y may be X."""
    br, bi = square_of(p_b, K)
    for i0 in tl.range(0, rows, ROWS, loop_unroll_factor=1):
        xr, xi = load_tile(p_x, rows, K, i0, 0, ROWS, K)
        if ADD:
            yr, yi = load_tile(p_y, rows, K, i0, 0, ROWS, K)
            xr, xi = cdot_add(xr, xi, br, bi, yr, yi, PRECISION)
        else:
            xr, xi = cdot(xr, xi, br, bi, PRECISION)
        tl.debug_barrier()
        store_tile(p_y, xr, xi, rows, K, i0, 0, ROWS, K)
    tl.debug_barrier()


@triton.jit(noinline=True)
def project(p_x, p_y, p_d, rows, K: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr):
    """`D = X^H Y` of K columns."""
    dr, di = adjoint_product_tile(p_x, p_y, rows, K, K, 0, 0, 0, K, K, CHUNK, PRECISION)
    keep(p_d, dr, di, K)
    tl.debug_barrier()


@triton.jit(noinline=True)
def through(
    p_x,
    p_y,
    p_z,
    rows: tl.constexpr,
    inner: tl.constexpr,
    ADD: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`Z = X Y`, or Z and that; X (rows, inner, 2), Y (inner, K, 2)."""
    for i0 in tl.range(0, rows, ROWS, loop_unroll_factor=1):
        re = tl.zeros((ROWS, K), tl.float32)
        im = tl.zeros((ROWS, K), tl.float32)
        if ADD:
            re, im = load_tile(p_z, rows, K, i0, 0, ROWS, K)
        re, im = product_tile(p_x, p_y, re, im, rows, inner, K, i0, 0, 0, ROWS, K, CHUNK, PRECISION)
        store_tile(p_z, re, im, rows, K, i0, 0, ROWS, K)
    tl.debug_barrier()


@triton.jit(noinline=True)
def back_through(
    p_x,
    p_y,
    p_z,
    inner: tl.constexpr,
    rows: tl.constexpr,
    ADD: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`Z = X^H Y`, or Z and that; X (inner, rows, 2), Y (inner, K, 2)."""
    for i0 in tl.range(0, rows, ROWS, loop_unroll_factor=1):
        re, im = adjoint_product_tile(p_x, p_y, inner, rows, K, i0, 0, 0, ROWS, K, CHUNK, PRECISION)
        if ADD:
            zr, zi = load_tile(p_z, rows, K, i0, 0, ROWS, K)
            re, im = re + zr, im + zi
        store_tile(p_z, re, im, rows, K, i0, 0, ROWS, K)
    tl.debug_barrier()


@triton.jit(noinline=True)
def congruent(p_n, p_a, p_g, K: tl.constexpr, PRECISION: tl.constexpr):
    """`G = A^H N A`; G may be N."""
    ar, ai = square_of(p_a, K)
    gr, gi = square_of(p_n, K)
    gr, gi = cdot(gr, gi, ar, ai, PRECISION)
    ar, ai = adjoint(ar, ai)
    gr, gi = cdot(ar, ai, gr, gi, PRECISION)
    tl.debug_barrier()
    keep(p_g, gr, gi, K)
    tl.debug_barrier()


@triton.jit(noinline=True)
def multiply_squares(p_a, p_b, p_c, ADJOINT: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    """`C = A B` or `A^H B`; C may be one of them."""
    ar, ai = square_of(p_a, K)
    br, bi = square_of(p_b, K)
    if ADJOINT:
        ar, ai = adjoint(ar, ai)
    ar, ai = cdot(ar, ai, br, bi, PRECISION)
    tl.debug_barrier()
    keep(p_c, ar, ai, K)
    tl.debug_barrier()


@triton.jit(noinline=True)
def straighten(
    p_x,
    p_y,
    p_a,
    p_out,
    p_place,
    rows,
    k: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`Z + Z (I - Z^H Z) / 2` of Z = X A to p_out, columns in their order; Y is scratch."""
    ar, ai = square_of(p_a, K)
    gr = tl.zeros((K, K), tl.float32)
    gi = tl.zeros((K, K), tl.float32)
    for i0 in tl.range(0, rows, ROWS, loop_unroll_factor=1):
        xr, xi = load_tile(p_x, rows, K, i0, 0, ROWS, K)
        xr, xi = cdot(xr, xi, ar, ai, PRECISION)
        store_tile(p_y, xr, xi, rows, K, i0, 0, ROWS, K)
        tr, ti = adjoint(xr, xi)
        gr, gi = cdot_add(tr, ti, xr, xi, gr, gi, PRECISION)
    gr, gi = 0.5 * (identity(k, K) - gr), -0.5 * gi
    place = tl.load(p_place + tl.arange(0, K)).to(tl.int32)
    tl.debug_barrier()
    for i0 in tl.range(0, rows, ROWS, loop_unroll_factor=1):
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


# side of a tile of all numbers of a matrix
FLAT = tl.constexpr(32)


@triton.jit
def flat(at):
    """Places of a tile of numbers."""
    i = tl.arange(0, FLAT)
    return at + i[:, None] * FLAT + i[None, :]


# A loop of a known number of passes is unrolled, barriers or not, and loads what registers hold at once:
# `count` is a number that the compiler does not know.


@triton.jit(noinline=True)
def load_unit(p_h, p_x, p_sums, count, COUNT: tl.constexpr):
    """`X = H / |H|` to p_x at any scale; the factors of which X is H times both, and |H|, 0 at H = 0.

    H and X have COUNT real numbers, which is `count`.
    """
    step: tl.constexpr = FLAT * FLAT
    largest = tl.zeros((FLAT, FLAT), tl.float32)
    for at in tl.range(0, count, step, loop_unroll_factor=1):
        i = flat(at)
        largest = tl.maximum(largest, tl.abs(tl.load(p_h + i, mask=i < COUNT, other=0.0)))
    peak = tl.max(through_scratch(p_sums, tl.max(largest, 1), FLAT), 0)
    exponent = ((tl.cast(peak, tl.int32, bitcast=True) >> 23) & 255) - 127
    exponent = tl.where(peak > 0.0, exponent, 0)
    half = exponent >> 1
    # in two halves, which are numbers both
    first, second = power_of_two(-half), power_of_two(half - exponent)
    squares = tl.zeros((FLAT, FLAT), tl.float32)
    for at in tl.range(0, count, step, loop_unroll_factor=1):
        i = flat(at)
        h = tl.load(p_h + i, mask=i < COUNT, other=0.0) * first * second
        squares += h * h
    square = tl.sum(through_scratch(p_sums + FLAT, tl.sum(squares, 1), FLAT), 0)
    norm = tl.sqrt(tl.where(square == 0.0, 1.0, square))
    second = second / norm
    for at in tl.range(0, count, step, loop_unroll_factor=1):
        i = flat(at)
        h = tl.load(p_h + i, mask=i < COUNT, other=0.0)
        tl.store(p_x + i, h * first * second, mask=i < COUNT)
    tl.debug_barrier()
    size = norm * power_of_two(half) * power_of_two(exponent - half)
    return first, second, tl.where(square == 0.0, 0.0, size)


@triton.jit(noinline=True)
def pad(p_x, p_y, rows, k: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr):
    """k columns of X as the first of K of Y, zeros in the others."""
    for i0 in tl.range(0, rows, ROWS, loop_unroll_factor=1):
        xr, xi = load_tile(p_x, rows, k, i0, 0, ROWS, K)
        store_tile(p_y, xr, xi, rows, K, i0, 0, ROWS, K)
    tl.debug_barrier()


@triton.jit
def places(size, k: tl.constexpr, K: tl.constexpr):
    """The place of every column by falling size, stable, NaN first."""
    i = tl.arange(0, K)[:, None]
    j = tl.arange(0, K)[None, :]
    si, sj = size[:, None], size[None, :]
    larger = (si > sj) | ((si != si) & (sj == sj))
    equal = (si == sj) | ((si != si) & (sj != sj))
    before = (larger | (equal & (i < j))) & (i < k)
    return tl.sum(before.to(tl.int32), 0)


@triton.jit
def spectrum(p_raw, p_p, p_q, HERMITIAN: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    """P, Q, D Q (D + D^H times P in the Hermitian form) and `s = diag(P^H D Q)`."""
    pr, pi = square_of(p_p, K)
    qr, qi = square_of(p_q, K)
    yr, yi = square_of(p_raw, K)
    if HERMITIAN:
        tr, ti = adjoint(yr, yi)
        yr, yi = yr + tr, yi + ti
    yr, yi = cdot(yr, yi, qr, qi, PRECISION)
    sr = tl.sum(pr * yr + pi * yi, 0)
    si = tl.sum(pr * yi - pi * yr, 0)
    if HERMITIAN:
        sr, si = 0.5 * sr, 0.5 * si
    return pr, pi, qr, qi, yr, yi, sr, si


@triton.jit(noinline=True)
def measure(
    p_raw,
    p_p,
    p_q,
    p_q_out,
    p_s,
    p_order,
    p_place,
    k: tl.constexpr,
    HERMITIAN: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """S, the order of the columns, and Q by the conjugate phases of s."""
    _pr, _pi, qr, qi, _yr, _yi, sr, si = spectrum(p_raw, p_p, p_q, HERMITIAN, K, PRECISION)
    size = tl.abs(sr)
    if not HERMITIAN:
        cr, ci = phase(sr, si)
        qr, qi = times(qr, qi, cr, -ci, 1.0)
        tl.debug_barrier()
        keep(p_q_out, qr, qi, K)
        sr = tl.sqrt(sr * sr + si * si + FLOOR)
        size = sr
    place = places(size, k, K)
    j = tl.arange(0, K)
    tl.store(p_s + place, sr, mask=j < k)
    tl.store(p_order + place, j.to(tl.int64), mask=j < k)
    tl.store(p_place + j, place.to(tl.float32))
    tl.debug_barrier()


@triton.jit
def step_forward(
    p_x,
    p_u,
    p_v,
    p_u_out,
    p_v_out,
    p_w,
    p_z,
    p_raw,
    p_chain,
    p_g,
    p_f,
    p_row,
    sweeps,
    M: tl.constexpr,
    N: tl.constexpr,
    k: tl.constexpr,
    HERMITIAN: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A step of both factors, in place or not."""
    square: tl.constexpr = 2 * K * K
    sides: tl.constexpr = 1 if HERMITIAN else 2
    through(p_x, p_v, p_w, M, N, False, K, ROWS, CHUNK, PRECISION)
    project(p_u, p_w, p_raw, M, K, CHUNK, PRECISION)
    diagonalize(p_raw, p_chain, 0, tl.load(p_row), sweeps, k, HERMITIAN, K, PRECISION)
    if not HERMITIAN:
        back_through(p_x, p_u, p_z, M, N, False, K, ROWS, CHUNK, PRECISION)
    for side in tl.range(0, sides, loop_unroll_factor=1):
        p_in, p_out, p_y, p_a, p_b, rows = p_u, p_u_out, p_w, p_chain + square, p_chain + sides * square, M
        if side == 1:
            p_in, p_out, p_y, p_a, p_b, rows = (
                p_v,
                p_v_out,
                p_z,
                p_chain + sides * square,
                p_chain + square,
                N,
            )
        scaling = expand(
            p_in, p_y, p_y, p_y, p_a, p_b, p_chain, p_row, p_f, p_g, rows, side, HERMITIAN, K, ROWS, PRECISION
        )
        project(p_y, p_y, p_g, rows, K, CHUNK, PRECISION)
        take_root(p_g, p_f, scaling, k, K, PRECISION)
        apply(p_y, p_f, p_out, rows, False, K, ROWS, PRECISION)


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
    count,
    B,
    M: tl.constexpr,
    N: tl.constexpr,
    k: tl.constexpr,
    HERMITIAN: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    sides: tl.constexpr = 1 if HERMITIAN else 2
    square: tl.constexpr = 2 * K * K
    # one pointer for all scratch: what lies at constant distances takes no registers
    left: tl.constexpr = M * (2 * K)
    factors: tl.constexpr = left if HERMITIAN else (M + N) * (2 * K)
    p_chain = p_scratch + pid * (SQUARES * square + 2 * factors + (2 * M * N + 3) // 4 * 4)
    p_raw = p_chain + LINK * square
    p_g = p_raw + square
    p_f = p_g + square
    p_su = p_chain + SQUARES * square
    p_sv = p_su if HERMITIAN else p_su + left
    p_w = p_su + factors
    p_z = p_w + left
    p_x = p_w + factors
    # not a constant, which would make the function anew
    unscaled = tl.full((), 1.0, tl.float32)
    soft = tl.load(p_scalars + 4 * tl.maximum(steps - 1, 0), mask=steps > 0, other=SOFT)
    for b in tl.range(pid, B, tl.num_programs(0), loop_unroll_factor=1):
        _first, _second, norm = load_unit(p_h + b * (2 * M * N), p_x, p_chain, count, 2 * M * N)
        tl.store(p_norm + b, norm)
        pad(p_u + b * (2 * M * k), p_su, M, k, ROWS, K)
        if not HERMITIAN:
            pad(p_v + b * (2 * N * k), p_sv, N, k, ROWS, K)
        for t in tl.range(0, steps, loop_unroll_factor=1):
            step_forward(
                p_x, p_su, p_sv, p_su, p_sv, p_w, p_z, p_raw, p_chain, p_g, p_f, p_scalars + 4 * t, sweeps,
                M, N, k, HERMITIAN, K, ROWS, CHUNK, PRECISION,
            )  # fmt: skip
        through(p_x, p_sv, p_w, M, N, False, K, ROWS, CHUNK, PRECISION)
        project(p_su, p_w, p_raw, M, K, CHUNK, PRECISION)
        diagonalize(p_raw, p_chain, 0, soft, sweeps, k, HERMITIAN, K, PRECISION)
        for side in tl.range(0, sides, loop_unroll_factor=1):
            p_in, p_a, rows = p_su, p_chain + square, M
            if side == 1:
                p_in, p_a, rows = p_sv, p_chain + 2 * square, N
            project(p_in, p_in, p_g, rows, K, CHUNK, PRECISION)
            congruent(p_g, p_a, p_g, K, PRECISION)
            take_root(p_g, p_f, unscaled, k, K, PRECISION)
            multiply_squares(p_a, p_f, p_a, False, K, PRECISION)
        measure(
            p_raw, p_chain + square, p_chain + sides * square, p_chain + sides * square,
            p_s_out + b * k, p_order + b * k, p_f, k, HERMITIAN, K, PRECISION,
        )  # fmt: skip
        for side in tl.range(0, sides, loop_unroll_factor=1):
            p_in, p_y, p_a, rows, p_out = p_su, p_w, p_chain + square, M, p_u_out + b * (2 * M * k)
            if side == 1:
                p_in, p_y, p_a, rows, p_out = p_sv, p_z, p_chain + 2 * square, N, p_v_out + b * (2 * N * k)
            straighten(p_in, p_y, p_a, p_out, p_f, rows, k, K, ROWS, PRECISION)


def constants_of(M: int, N: int, k: int, tied: bool) -> dict[str, Any]:
    """The constants of a launch."""
    found = {"M": M, "N": N, "k": k, "HERMITIAN": tied, "K": block(k), "ROWS": ROWS, "CHUNK": 16}
    return found | {"PRECISION": precision()}


def refuse(M: int, N: int, k: int) -> None:
    """`ValueError` with every reason of `limit`."""
    found = limit(M, N, k)
    if found:
        raise ValueError("the Triton kernels do not serve these channels: " + "; ".join(found))


def refine_launch(
    H: Tensor, U: Tensor, V: Tensor | None, scalars: Tensor, sweeps: int
) -> tuple[Launch, tuple[Tensor, ...]]:
    """The launch of `refine`, its outputs."""
    (B, M, N, _), k = H.shape, U.shape[2]
    refuse(M, N, k)
    steps, K, both = len(scalars), block(k), M if V is None else M + N
    scratch = SQUARES.value * 2 * K * K + 4 * both * K + (2 * M * N + 3) // 4 * 4
    count = programs(H, 4 * scratch)
    S, norm = H.new_empty((B, k)), H.new_empty((B,))
    outputs = torch.empty_like(U), S, U.new_empty((0,)) if V is None else torch.empty_like(V)
    order = H.new_empty((B, k), dtype=torch.int64)
    arguments = {"p_h": H, "p_u": U, "p_v": V, "p_scalars": scalars, "p_u_out": outputs[0], "p_s_out": S}
    arguments |= {"p_v_out": outputs[2], "p_order": order, "p_norm": norm}
    arguments["p_scratch"] = H.new_empty((count, scratch))
    arguments |= {"steps": steps, "sweeps": sweeps, "count": 2 * M * N, "B": B}
    constants = constants_of(M, N, k, V is None)
    launch = Launch(refine_fwd_kernel, (count,), arguments, constants, **THREADS)
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
