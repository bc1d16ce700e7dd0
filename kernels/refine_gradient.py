"""Gradients of the refinement of an SVD: one launch for all steps and the closing, one program a sample.

A program computes the factors after every step and keeps them; on the way back it computes the rest of a step
again. At 64x64 with 16 columns that is 16 KB a step, and 218 KB of scratch as in `refine`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .complex import cdot, cdot_add, load_tile, store_columns, store_tile
from .launch import Launch, block
from .ortho import THREADS, programs
from .refine import (
    FLOOR,
    LINK,
    ROTATION,
    SAFE,
    SOFT,
    TINY,
    adjoint,
    apply,
    back_through,
    congruent,
    constants_of,
    core_of,
    diagonal_of,
    diagonalize,
    expand,
    generators,
    identity,
    keep,
    load_unit,
    multiply_squares,
    off_diagonal,
    pad,
    phase,
    project,
    refuse,
    shifted_inverse,
    signs,
    spectrum,
    spread,
    square_of,
    step_forward,
    take_root,
    through,
    times,
)


@triton.jit
def hermitian_part(re, im):
    return 0.5 * (re + tl.trans(re)), 0.5 * (im - tl.trans(im))


@triton.jit
def skew_part(re, im):
    return 0.5 * (re - tl.trans(re)), 0.5 * (im + tl.trans(im))


# Gradients, `dL = Re sum conj(gX) dX`. What is Hermitian or skew has a gradient of that kind: the rest of it
# meets no change.


@triton.jit
def row_gradient(re, im, k: tl.constexpr, K: tl.constexpr):
    """`largest_row` and its gradient, shared evenly by rows that are equally large."""
    i = tl.arange(0, K)
    size = tl.sqrt(re * re + im * im + TINY)
    sums = tl.sum(tl.where((i < k)[None, :], size, 0.0), 1)
    top = tl.max(sums, 0)
    hit = tl.where((sums == top) & (i < k), 1.0, 0.0)
    share = (hit / tl.sum(hit, 0))[:, None] / size
    return top, re * share, im * share


@triton.jit
def cubic_gradient(gr, gi, er, ei, PRECISION: tl.constexpr):
    """Of E from that of `E^2 (3 I + E) / 4`, all Hermitian."""
    ar, ai = cdot(gr, gi, er, ei, PRECISION)
    cr, ci = cdot(er, ei, ar, ai, PRECISION)
    dr, di = cdot(ar, ai, er, ei, PRECISION)
    ar, ai = hermitian_part(1.5 * ar + 0.5 * dr, 1.5 * ai + 0.5 * di)
    return ar + 0.25 * cr, ai + 0.25 * ci


@triton.jit(noinline=True)
def root_gradient(p_g, p_gf, p_gg, square, k: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    """Of G to p_gg from that of `inverse_root` at p_gf; returns that of `square`."""
    gr, gi = square_of(p_g, K)
    hr, hi = cdot(gr, gi, gr, gi, PRECISION)
    top, ur, ui = row_gradient(hr, hi, k, K)
    row = tl.sqrt(top)
    safe = 1.0 / tl.maximum(row / (SAFE * SAFE), 1.0)
    scale = tl.minimum(square, safe)
    root = tl.sqrt(scale)
    one = identity(k, K)
    er, ei = one - gr * scale, -gi * scale
    hr, hi = one - (2 * gr - hr * scale) * scale, -(2 * gi - hi * scale) * scale
    fr, fi = root * (one + 0.5 * er), root * (0.5 * ei)
    ar, ai = cdot(hr, hi, 0.75 * one + 0.25 * er, 0.25 * ei, PRECISION)
    # of the last factor, (I + E / 2) with E of the iteration before
    hr, hi = cdot(ar, ai, ar, ai, PRECISION)
    hr, hi = cdot(hr, hi, 0.75 * one + 0.25 * ar, 0.25 * ai, PRECISION)
    wr, wi = square_of(p_gf, K)
    wr, wi = hermitian_part(wr, wi)
    br, bi = cdot(fr, fi, ar, ai, PRECISION)
    br, bi = cdot(fr + 0.5 * br, fi + 0.5 * bi, wr, wi, PRECISION)
    br, bi = hermitian_part(0.5 * br, 0.5 * bi)
    br, bi = cubic_gradient(br, bi, ar, ai, PRECISION)
    hr, hi = cdot(wr, wi, hr, hi, PRECISION)
    hr, hi = hermitian_part(0.5 * hr, 0.5 * hi)
    wr, wi = wr + hr, wi + hi
    # of the factor before it
    hr, hi = cdot(fr, fi, wr, wi, PRECISION)
    hr, hi = hermitian_part(0.5 * hr, 0.5 * hi)
    br, bi = br + hr, bi + hi
    hr, hi = cdot(wr, wi, ar, ai, PRECISION)
    hr, hi = hermitian_part(0.5 * hr, 0.5 * hi)
    wr, wi = wr + hr, wi + hi
    br, bi = cubic_gradient(br, bi, er, ei, PRECISION)
    br, bi = br + 0.5 * root * wr, bi + 0.5 * root * wi
    along = (wr * (one + 0.5 * er) + wi * (0.5 * ei)) * (0.5 / root) - (br * gr + bi * gi)
    whole = tl.sum(tl.sum(along, 0), 0)
    given = tl.where(square < safe, whole, tl.where(square == safe, 0.5 * whole, 0.0))
    # the root of the largest row: d safe / d row is -SAFE^2 / row^2
    slope = tl.where(row >= SAFE * SAFE, (given - whole) * (0.5 * SAFE * SAFE) / (row * row * row), 0.0)
    ur, ui = hermitian_part(ur * slope, ui * slope)
    ur, ui = cdot(ur, ui, gr, gi, PRECISION)
    ur, ui = hermitian_part(2 * ur, 2 * ui)
    keep(p_gg, ur - scale * br, ui - scale * bi, K)
    tl.debug_barrier()
    return given


@triton.jit(noinline=True)
def unitary_gradient(p_x, p_g, k: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    """Of the skew-Hermitian X from that of `unitary`, in its place."""
    xr, xi = square_of(p_x, K)
    sr, si = cdot(xr, xi, xr, xi, PRECISION)
    row, ur, ui = row_gradient(sr, si, k, K)
    square = 1.0 / tl.maximum(row / (ROTATION * ROTATION), 1.0)
    root = tl.sqrt(square)
    hr, hi = sr * square, si * square
    fr, fi = cdot(hr, hi, hr, hi, PRECISION)
    er, ei = cdot(fr, fi, fr, fi, PRECISION)
    one = identity(k, K)
    er, ei = one - 0.125 * fr + (0.185 / 16) * er, -0.125 * fi + (0.185 / 16) * ei
    gr, gi = square_of(p_g, K)
    # of the left factor, and of the right one
    ar, ai = cdot(gr, gi, er, ei, PRECISION)
    er, ei = adjoint(one + xr * root + 0.5 * hr, xi * root + 0.5 * hi)
    gr, gi = cdot(er, ei, gr, gi, PRECISION)
    gr, gi = hermitian_part(gr, gi)
    er, ei = cdot(fr, fi, gr, gi, PRECISION)
    er, ei = hermitian_part((0.37 / 16) * er, (0.37 / 16) * ei)
    er, ei = er - 0.125 * gr, ei - 0.125 * gi
    # of the square of X, and of X, both scaled
    er, ei = cdot(hr, hi, er, ei, PRECISION)
    er, ei = hermitian_part(0.5 * ar + 2 * er, 0.5 * ai + 2 * ei)
    ar, ai = skew_part(ar, ai)
    whole = tl.sum(tl.sum((ar * xr + ai * xi) * (0.5 / root) + (er * sr + ei * si), 0), 0)
    slope = tl.where(row >= ROTATION * ROTATION, -whole * (ROTATION * ROTATION) / (row * row), 0.0)
    ur, ui = hermitian_part(ur * slope, ui * slope)
    er, ei = cdot(er * square + ur, ei * square + ui, xr, xi, PRECISION)
    er, ei = skew_part(2 * er, 2 * ei)
    tl.debug_barrier()
    keep(p_g, ar * root - er, ai * root - ei, K)
    tl.debug_barrier()


@triton.jit
def phase_gradient(zr, zi, gr, gi):
    """Of z from that of its conjugate phase, 0 at z = 0."""
    square = zr * zr + zi * zi
    known = square > TINY
    inverse = tl.where(known, 1.0 / tl.sqrt(tl.where(known, square, 1.0)), 0.0)
    zr, zi = zr * inverse, zi * inverse
    # the phase turns: i z / |z| times Im(conj(z) conj(g))
    turn = -(zr * gi + zi * gr) * inverse
    return -zi * turn, zr * turn


@triton.jit
def on_diagonal(re, im, dr, di, K: tl.constexpr):
    """A matrix and, on its diagonal, that of another."""
    i = tl.arange(0, K)
    here = i[:, None] == i[None, :]
    return re + tl.where(here, dr[None, :], 0.0), im + tl.where(here, di[None, :], 0.0)


@triton.jit(noinline=True)
def turn_gradient(
    p_link, p_gd, p_gp, p_gq, p_ga, p_gb, HERMITIAN: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr
):
    """Of D, P and Q from those after `turn`, in their place; of A and B to p_ga and p_gb."""
    square: tl.constexpr = 2 * K * K
    dr, di = square_of(p_link, K)
    ar, ai = square_of(p_link + 3 * square, K)
    gr, gi = square_of(p_gd, K)
    if HERMITIAN:
        gr, gi = hermitian_part(gr, gi)
        nr, ni = cdot(dr, di, ar, ai, PRECISION)
        nr, ni = cdot(2 * nr, 2 * ni, gr, gi, PRECISION)
        gr, gi = cdot(ar, ai, gr, gi, PRECISION)
        tr, ti = adjoint(ar, ai)
        gr, gi = cdot(gr, gi, tr, ti, PRECISION)
    else:
        br, bi = square_of(p_link + 4 * square, K)
        mr, mi = cdot(dr, di, br, bi, PRECISION)
        tr, ti = adjoint(ar, ai)
        nr, ni = cdot(tr, ti, mr, mi, PRECISION)
        # the phases of the columns, of which p_ga holds the core
        keep(p_ga, nr, ni, K)
        qr, qi = square_of(p_link + 2 * square, K)
        hr, hi = square_of(p_gq, K)
        qr, qi = adjoint(qr, qi)
        qr, qi = cdot(qr, qi, hr, hi, PRECISION)
        tl.debug_barrier()
        zr, zi = diagonal_of(p_ga, K)
        ur, ui = phase(zr, zi)
        along = tl.sum(nr * gr + ni * gi + br * qr + bi * qi, 0)
        across = tl.sum(nr * gi - ni * gr + br * qi - bi * qr, 0)
        zr, zi = phase_gradient(zr, zi, along, across)
        # columns of Q B diag(conj u)
        tr, ti = times(br, bi, ur, -ui, 1.0)
        tr, ti = adjoint(tr, ti)
        hr, hi = cdot(hr, hi, tr, ti, PRECISION)
        qr, qi = times(qr, qi, ur, ui, 1.0)
        gr, gi = times(gr, gi, ur, ui, 1.0)
        gr, gi = on_diagonal(gr, gi, zr, zi, K)
        tr, ti = adjoint(gr, gi)
        nr, ni = cdot(mr, mi, tr, ti, PRECISION)
        gr, gi = cdot(ar, ai, gr, gi, PRECISION)
        tr, ti = adjoint(dr, di)
        qr, qi = cdot_add(tr, ti, gr, gi, qr, qi, PRECISION)
        tr, ti = adjoint(br, bi)
        gr, gi = cdot(gr, gi, tr, ti, PRECISION)
        tl.debug_barrier()
        keep(p_gq, hr, hi, K)
        keep(p_gb, qr, qi, K)
    pr, pi = square_of(p_link + square, K)
    hr, hi = square_of(p_gp, K)
    pr, pi = adjoint(pr, pi)
    nr, ni = cdot_add(pr, pi, hr, hi, nr, ni, PRECISION)
    tr, ti = adjoint(ar, ai)
    hr, hi = cdot(hr, hi, tr, ti, PRECISION)
    tl.debug_barrier()
    keep(p_ga, nr, ni, K)
    keep(p_gp, hr, hi, K)
    keep(p_gd, gr, gi, K)
    tl.debug_barrier()


@triton.jit
def tangent_gradient(zr, zi, gap, gr, gi):
    """Of z and of the gap from that of `z / (gap + sqrt(gap^2 + |z|^2))`."""
    size = tl.sqrt(gap * gap + zr * zr + zi * zi)
    q = 1.0 / (gap + size)
    along = (zr * gr + zi * gi) * (q / size)
    return gr * q - zr * (along * q), gi * q - zi * (along * q), -along


@triton.jit(noinline=True)
def generators_gradient(p_d, p_ga, p_gb, p_gd, soft, HERMITIAN: tl.constexpr, K: tl.constexpr):
    """Adds that of D to p_gd, from those of X + Y and X - Y, or of X; returns that of soft."""
    dr, di = square_of(p_d, K)
    s, _ = diagonal_of(p_d, K)
    off = off_diagonal(dr, di, s)
    root = spread(off)
    softening = soft * root + 1e-12
    gap, sign = signs(s, K)
    tr, ti = adjoint(dr, di)
    ar, ai = square_of(p_ga, K)
    br, bi = ar, ai
    if not HERMITIAN:
        br, bi = square_of(p_gb, K)
        ar, ai, br, bi = ar + br, ai + bi, ar - br, ai - bi
    zr, zi, wide = tangent_gradient(dr + tr, di + ti, tl.abs(gap) + softening, ar * sign, ai * sign)
    zr, zi = hermitian_part(2 * zr, 2 * zi)
    moved = wide * tl.where(gap == 0, 0.0, sign)
    moved = moved - tl.trans(moved)
    if not HERMITIAN:
        total = s[None, :] + s[:, None]
        there = tl.abs(sign)
        yr, yi, more = tangent_gradient(
            dr - tr, di - ti, tl.maximum(total, 0.0) + softening, br * there, bi * there
        )
        yr, yi = skew_part(2 * yr, 2 * yi)
        zr, zi = zr + yr, zi + yi
        wide += more
        more = tl.where(total >= 0, more, 0.0)
        moved += more + tl.trans(more)
    # the softening: soft, and the energy off the diagonal in rows and columns
    share = wide * (0.5 * soft) / root
    shared = tl.where(off >= 0, tl.sum(share + tl.trans(share), 0), 0.0)
    both = shared[:, None] + shared[None, :]
    gr, gi = square_of(p_gd, K)
    gr, gi = gr + zr + dr * both, gi + zi + di * both
    alone = tl.sum(moved, 0) - 2 * s * shared
    gr, gi = on_diagonal(gr, gi, alone, tl.zeros((K,), tl.float32), K)
    of_soft = tl.sum(tl.sum(wide * root, 0), 0)
    tl.debug_barrier()
    keep(p_gd, gr, gi, K)
    tl.debug_barrier()
    return of_soft


@triton.jit(noinline=True)
def begin_gradient(p_raw, p_gd, p_gq, p_graw, ADD: tl.constexpr, HERMITIAN: tl.constexpr, K: tl.constexpr):
    """Of the core, or that added, from those of D and Q after `begin`."""
    gr, gi = square_of(p_gd, K)
    if HERMITIAN:
        gr, gi = hermitian_part(gr, gi)
    else:
        dr, di = square_of(p_raw, K)
        zr, zi = diagonal_of(p_raw, K)
        ur, ui = phase(zr, zi)
        hr, hi = diagonal_of(p_gq, K)
        along = tl.sum(dr * gr + di * gi, 0) + hr
        across = tl.sum(dr * gi - di * gr, 0) + hi
        zr, zi = phase_gradient(zr, zi, along, across)
        gr, gi = times(gr, gi, ur, ui, 1.0)
        gr, gi = on_diagonal(gr, gi, zr, zi, K)
    if ADD:
        hr, hi = square_of(p_graw, K)
        gr, gi = gr + hr, gi + hi
    tl.debug_barrier()
    keep(p_graw, gr, gi, K)
    tl.debug_barrier()


@triton.jit
def diagonalize_gradient(
    p_raw,
    p_chain,
    link,
    p_gp,
    p_gq,
    p_gd,
    p_ga,
    p_gb,
    p_xa,
    p_xb,
    p_graw,
    soft,
    sweeps,
    ADD: tl.constexpr,
    k: tl.constexpr,
    HERMITIAN: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of the core from those of what `diagonalize` left, p_chain its last link; returns that of soft."""
    of_soft = 0.0
    for _ in tl.range(0, sweeps, loop_unroll_factor=1):
        p_chain -= link
        turn_gradient(p_chain, p_gd, p_gp, p_gq, p_ga, p_gb, HERMITIAN, K, PRECISION)
        generators(p_chain, p_xa, p_xb, soft, HERMITIAN, K)
        unitary_gradient(p_xa, p_ga, k, K, PRECISION)
        if not HERMITIAN:
            unitary_gradient(p_xb, p_gb, k, K, PRECISION)
        of_soft += generators_gradient(p_chain, p_ga, p_gb, p_gd, soft, HERMITIAN, K)
    begin_gradient(p_raw, p_gd, p_gq, p_graw, ADD, HERMITIAN, K)
    return of_soft


@triton.jit(noinline=True)
def clear(p, COUNT: tl.constexpr, K: tl.constexpr):
    """Zeros in matrices of scratch that lie side by side."""
    nothing = tl.zeros((K, K), tl.float32)
    for i in tl.range(0, COUNT, loop_unroll_factor=1):
        keep(p + i * (2 * K * K), nothing, nothing, K)
    tl.debug_barrier()


@triton.jit(noinline=True)
def expand_gradient(
    p_x,
    p_y,
    p_t,
    p_g,
    p_f,
    p_gg,
    p_gt,
    p_gc,
    p_along,
    rows,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of T from that of `T F` and of its Gram matrix; of C in `T = X C + Y diag(w)`, and part of w's."""
    fr, fi = square_of(p_f, K)
    hr, hi = square_of(p_gg, K)
    hr, hi = 2 * hr, 2 * hi
    cr = tl.zeros((K, K), tl.float32)
    ci = tl.zeros((K, K), tl.float32)
    along = tl.zeros((K,), tl.float32)
    for i0 in tl.range(0, rows, ROWS, loop_unroll_factor=1):
        gr, gi = load_tile(p_g, rows, K, i0, 0, ROWS, K)
        tr, ti = load_tile(p_t, rows, K, i0, 0, ROWS, K)
        gr, gi = cdot(gr, gi, fr, fi, PRECISION)
        gr, gi = cdot_add(tr, ti, hr, hi, gr, gi, PRECISION)
        store_tile(p_gt, gr, gi, rows, K, i0, 0, ROWS, K)
        xr, xi = load_tile(p_x, rows, K, i0, 0, ROWS, K)
        xr, xi = adjoint(xr, xi)
        cr, ci = cdot_add(xr, xi, gr, gi, cr, ci, PRECISION)
        yr, yi = load_tile(p_y, rows, K, i0, 0, ROWS, K)
        along += tl.sum(yr * gr + yi * gi, 0)
    keep(p_gc, cr, ci, K)
    tl.store(p_along + tl.arange(0, K), along)
    tl.debug_barrier()


@triton.jit(noinline=True)
def weights_gradient(
    p_a,
    p_d,
    p_row,
    p_vectors,
    p_gc,
    p_ga,
    p_gd,
    p_grow,
    of_scaling,
    side,
    HERMITIAN: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of A and of the core, added, and of the scalars, from those of C and w; C in the place of its gradient.

    p_vectors holds the energies of Y and part of the gradient of w; then twice that of the energies, and w.
    """
    j = tl.arange(0, K)
    er, ei = core_of(p_d, side, K)
    s, _ = diagonal_of(p_d, K)
    gain = tl.load(p_row + 2)
    bound = tl.load(p_row + 3)
    inverse = shifted_inverse(s, tl.load(p_row + 1), HERMITIAN)
    rest = tl.load(p_vectors + j) - tl.sum(er * er + ei * ei, 0)
    outside = tl.maximum(rest, 0.0)
    squares = tl.sum(outside * inverse * inverse, 0)
    total = squares * gain * gain
    limit_square = bound * bound
    largest = tl.maximum(total, limit_square)
    share = limit_square / largest
    root = tl.sqrt(share)
    weight = inverse * (gain * root)
    ar, ai = square_of(p_a, K)
    br, bi = cdot(ar, ai, er, ei, PRECISION)
    cr, ci = square_of(p_gc, K)
    of_weight = tl.load(p_vectors + K + j) - tl.sum(br * cr + bi * ci, 0)
    tl.debug_barrier()
    keep(p_gc, ar - br * weight[None, :], ai - bi * weight[None, :], K)
    br, bi = cr * -weight[None, :], ci * -weight[None, :]
    tr, ti = adjoint(er, ei)
    hr, hi = square_of(p_ga, K)
    hr, hi = cdot_add(br, bi, tr, ti, hr + cr, hi + ci, PRECISION)
    ar, ai = adjoint(ar, ai)
    br, bi = cdot(ar, ai, br, bi, PRECISION)
    # w = inverse gain sqrt(share), share = bound^2 / max(total, bound^2); scaling = 2 / (2 + total share)
    along = tl.sum(of_weight * inverse, 0)
    of_product = -2.0 * of_scaling / ((2.0 + total * share) * (2.0 + total * share))
    of_share = along * gain * (0.5 / root) + of_product * total
    of_largest = -of_share * share / largest
    beyond = tl.where(total > limit_square, 1.0, tl.where(total == limit_square, 0.5, 0.0))
    of_total = of_product * share + of_largest * beyond
    of_gain = along * root + 2.0 * gain * of_total * squares
    of_bound = 2.0 * bound * (of_share / largest + of_largest * (1.0 - beyond))
    of_square = of_total * gain * gain
    of_rest = tl.where(rest >= 0, 2.0 * of_square * inverse * inverse, 0.0)
    of_inverse = of_weight * (gain * root) + 2.0 * of_square * outside * inverse
    of_s = -of_inverse * inverse * inverse
    of_mu = tl.sum(tl.where(inverse < 0, -of_s, of_s), 0)
    br, bi = br - er * of_rest[None, :], bi - ei * of_rest[None, :]
    if side == 1:
        br, bi = adjoint(br, bi)
    br, bi = on_diagonal(br, bi, of_s, tl.zeros((K,), tl.float32), K)
    cr, ci = square_of(p_gd, K)
    old_mu = tl.load(p_grow + 1, mask=side > 0, other=0.0)
    old_gain = tl.load(p_grow + 2, mask=side > 0, other=0.0)
    old_bound = tl.load(p_grow + 3, mask=side > 0, other=0.0)
    tl.debug_barrier()
    keep(p_ga, hr, hi, K)
    keep(p_gd, br + cr, bi + ci, K)
    tl.store(p_vectors + j, of_rest)
    tl.store(p_vectors + K + j, weight)
    tl.store(p_grow + 1, old_mu + of_mu)
    tl.store(p_grow + 2, old_gain + of_gain)
    tl.store(p_grow + 3, old_bound + of_bound)
    tl.debug_barrier()


@triton.jit(noinline=True)
def rotated_gradient(
    p_raw,
    p_y,
    p_gt,
    p_b,
    p_c,
    p_vectors,
    p_gx,
    p_graw,
    p_gb,
    rows,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of X and of raw in `T = X C + raw B diag(w)` and the energies, from that of T; that of B is added."""
    j = tl.arange(0, K)
    of_energy = tl.load(p_vectors + j)[None, :]
    weight = tl.load(p_vectors + K + j)[None, :]
    br, bi = square_of(p_b, K)
    br, bi = adjoint(br, bi)
    cr, ci = square_of(p_c, K)
    cr, ci = adjoint(cr, ci)
    hr, hi = square_of(p_gb, K)
    for i0 in tl.range(0, rows, ROWS, loop_unroll_factor=1):
        gr, gi = load_tile(p_gt, rows, K, i0, 0, ROWS, K)
        tr, ti = cdot(gr, gi, cr, ci, PRECISION)
        store_tile(p_gx, tr, ti, rows, K, i0, 0, ROWS, K)
        yr, yi = load_tile(p_y, rows, K, i0, 0, ROWS, K)
        gr, gi = gr * weight + yr * of_energy, gi * weight + yi * of_energy
        tr, ti = cdot(gr, gi, br, bi, PRECISION)
        store_tile(p_graw, tr, ti, rows, K, i0, 0, ROWS, K)
        yr, yi = load_tile(p_raw, rows, K, i0, 0, ROWS, K)
        yr, yi = adjoint(yr, yi)
        hr, hi = cdot_add(yr, yi, gr, gi, hr, hi, PRECISION)
    tl.debug_barrier()
    keep(p_gb, hr, hi, K)
    tl.debug_barrier()


@triton.jit(noinline=True)
def project_gradient(
    p_x,
    p_y,
    p_g,
    p_gx,
    p_gy,
    rows,
    ADD: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of X, added, and of Y, or that added, from that of `X^H Y`."""
    cr, ci = square_of(p_g, K)
    tr, ti = adjoint(cr, ci)
    for i0 in tl.range(0, rows, ROWS, loop_unroll_factor=1):
        yr, yi = load_tile(p_y, rows, K, i0, 0, ROWS, K)
        gr, gi = load_tile(p_gx, rows, K, i0, 0, ROWS, K)
        gr, gi = cdot_add(yr, yi, tr, ti, gr, gi, PRECISION)
        store_tile(p_gx, gr, gi, rows, K, i0, 0, ROWS, K)
        gr = tl.zeros((ROWS, K), tl.float32)
        gi = tl.zeros((ROWS, K), tl.float32)
        if ADD:
            gr, gi = load_tile(p_gy, rows, K, i0, 0, ROWS, K)
        xr, xi = load_tile(p_x, rows, K, i0, 0, ROWS, K)
        gr, gi = cdot_add(xr, xi, cr, ci, gr, gi, PRECISION)
        store_tile(p_gy, gr, gi, rows, K, i0, 0, ROWS, K)
    tl.debug_barrier()


@triton.jit(noinline=True)
def outer(
    p_w,
    p_v,
    p_u,
    p_z,
    p_g,
    M: tl.constexpr,
    N: tl.constexpr,
    BOTH: tl.constexpr,
    ADD: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`W V^H`, or `W V^H + U Z^H`, to an M x N matrix or added to it."""
    for i0 in tl.range(0, M, ROWS, loop_unroll_factor=1):
        for j0 in tl.range(0, N, C, loop_unroll_factor=1):
            gr = tl.zeros((ROWS, C), tl.float32)
            gi = tl.zeros((ROWS, C), tl.float32)
            if ADD:
                gr, gi = load_tile(p_g, M, N, i0, j0, ROWS, C)
            wr, wi = load_tile(p_w, M, K, i0, 0, ROWS, K)
            vr, vi = load_tile(p_v, N, K, j0, 0, C, K)
            vr, vi = adjoint(vr, vi)
            gr, gi = cdot_add(wr, wi, vr, vi, gr, gi, PRECISION)
            if BOTH:
                wr, wi = load_tile(p_u, M, K, i0, 0, ROWS, K)
                vr, vi = load_tile(p_z, N, K, j0, 0, C, K)
                vr, vi = adjoint(vr, vi)
                gr, gi = cdot_add(wr, wi, vr, vi, gr, gi, PRECISION)
            store_tile(p_g, gr, gi, M, N, i0, j0, ROWS, C)
    tl.debug_barrier()


@triton.jit(noinline=True)
def place_columns(p_order, p_place, k: tl.constexpr, K: tl.constexpr):
    """The place of every column in an order."""
    i = tl.arange(0, K)
    tl.store(p_place + i, i.to(tl.float32))
    tl.debug_barrier()
    tl.store(p_place + tl.load(p_order + i, mask=i < k, other=0), i.to(tl.float32), mask=i < k)
    tl.debug_barrier()


@triton.jit
def load_columns(p, i, place, rows, k: tl.constexpr, K: tl.constexpr):
    """Rows i of a (rows, k, 2) matrix, its columns at their places, zeros beyond."""
    inside = (i < rows)[:, None] & (tl.arange(0, K) < k)[None, :]
    p += i[:, None] * (2 * k) + 2 * place[None, :]
    return tl.load(p, mask=inside, other=0.0), tl.load(p + 1, mask=inside, other=0.0)


@triton.jit(noinline=True)
def straighten_gradient(
    p_x,
    p_y,
    p_a,
    p_g,
    p_place,
    p_gx,
    p_ga,
    rows,
    k: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of X and of A from that of `Z + Z (I - Z^H Z) / 2`, Z = X A, columns in their order; Y is scratch."""
    ar, ai = square_of(p_a, K)
    place = tl.load(p_place + tl.arange(0, K)).to(tl.int32)
    hr = tl.zeros((K, K), tl.float32)
    hi = tl.zeros((K, K), tl.float32)
    cr = tl.zeros((K, K), tl.float32)
    ci = tl.zeros((K, K), tl.float32)
    for i0 in tl.range(0, rows, ROWS, loop_unroll_factor=1):
        xr, xi = load_tile(p_x, rows, K, i0, 0, ROWS, K)
        xr, xi = cdot(xr, xi, ar, ai, PRECISION)
        store_tile(p_y, xr, xi, rows, K, i0, 0, ROWS, K)
        gr, gi = load_columns(p_g, i0 + tl.arange(0, ROWS), place, rows, k, K)
        tr, ti = adjoint(xr, xi)
        hr, hi = cdot_add(tr, ti, xr, xi, hr, hi, PRECISION)
        cr, ci = cdot_add(tr, ti, gr, gi, cr, ci, PRECISION)
    hr, hi = 1.5 * identity(k, K) - 0.5 * hr, -0.5 * hi
    cr, ci = hermitian_part(-cr, -ci)
    ar, ai = adjoint(ar, ai)
    br = tl.zeros((K, K), tl.float32)
    bi = tl.zeros((K, K), tl.float32)
    tl.debug_barrier()
    for i0 in tl.range(0, rows, ROWS, loop_unroll_factor=1):
        gr, gi = load_columns(p_g, i0 + tl.arange(0, ROWS), place, rows, k, K)
        gr, gi = cdot(gr, gi, hr, hi, PRECISION)
        xr, xi = load_tile(p_y, rows, K, i0, 0, ROWS, K)
        gr, gi = cdot_add(xr, xi, cr, ci, gr, gi, PRECISION)
        xr, xi = cdot(gr, gi, ar, ai, PRECISION)
        store_tile(p_gx, xr, xi, rows, K, i0, 0, ROWS, K)
        xr, xi = load_tile(p_x, rows, K, i0, 0, ROWS, K)
        xr, xi = adjoint(xr, xi)
        br, bi = cdot_add(xr, xi, gr, gi, br, bi, PRECISION)
    keep(p_ga, br, bi, K)
    tl.debug_barrier()


@triton.jit(noinline=True)
def phase_columns(p_raw, p_p, p_q, p_out, K: tl.constexpr, PRECISION: tl.constexpr):
    """Q by the conjugate phases of `diag(P^H D Q)`."""
    _pr, _pi, qr, qi, _yr, _yi, sr, si = spectrum(p_raw, p_p, p_q, False, K, PRECISION)
    cr, ci = phase(sr, si)
    qr, qi = times(qr, qi, cr, -ci, 1.0)
    keep(p_out, qr, qi, K)
    tl.debug_barrier()


@triton.jit(noinline=True)
def measure_gradient(
    p_raw,
    p_p,
    p_q,
    p_gs,
    p_place,
    p_gp,
    p_gq,
    p_graw,
    k: tl.constexpr,
    HERMITIAN: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of P, added, of the core, and of Q from that of Q by its phases, and from that of S."""
    pr, pi, qr, qi, yr, yi, sr, si = spectrum(p_raw, p_p, p_q, HERMITIAN, K, PRECISION)
    j = tl.arange(0, K)
    place = tl.load(p_place + j).to(tl.int32)
    zr = tl.load(p_gs + place, mask=j < k, other=0.0)
    zi = tl.zeros((K,), tl.float32)
    hr, hi = pr, pi
    if not HERMITIAN:
        hr, hi = square_of(p_gq, K)
        along = tl.sum(qr * hr + qi * hi, 0)
        across = tl.sum(qr * hi - qi * hr, 0)
        cr, ci = phase(sr, si)
        hr, hi = times(hr, hi, cr, ci, 1.0)
        zr = zr / tl.sqrt(sr * sr + si * si + FLOOR)
        zr, zi = zr * sr, zr * si
        sr, si = phase_gradient(sr, si, along, across)
        zr, zi = zr + sr, zi + si
    gr, gi = square_of(p_gp, K)
    yr, yi = times(yr, yi, zr, -zi, 1.0)
    gr, gi = gr + yr, gi + yi
    yr, yi = times(pr, pi, zr, zi, 1.0)
    tr, ti = adjoint(qr, qi)
    cr, ci = cdot(yr, yi, tr, ti, PRECISION)
    if not HERMITIAN:
        tr, ti = square_of(p_raw, K)
        tr, ti = adjoint(tr, ti)
        hr, hi = cdot_add(tr, ti, yr, yi, hr, hi, PRECISION)
    tl.debug_barrier()
    keep(p_gp, gr, gi, K)
    if not HERMITIAN:
        keep(p_gq, hr, hi, K)
    keep(p_graw, cr, ci, K)
    tl.debug_barrier()


@triton.jit(noinline=True)
def congruent_gradient(p_ga, p_f, p_n, p_a, p_gg, p_out, p_gn, K: tl.constexpr, PRECISION: tl.constexpr):
    """Of A from those of A F and of `A^H N A`, and the factor of X in that of X, `N = X^H X`."""
    gr, gi = square_of(p_ga, K)
    fr, fi = square_of(p_f, K)
    gr, gi = cdot(gr, gi, fr, fi, PRECISION)
    ar, ai = square_of(p_a, K)
    hr, hi = square_of(p_gg, K)
    hr, hi = cdot(2 * ar, 2 * ai, hr, hi, PRECISION)
    fr, fi = square_of(p_n, K)
    gr, gi = cdot_add(fr, fi, hr, hi, gr, gi, PRECISION)
    ar, ai = adjoint(ar, ai)
    hr, hi = cdot(hr, hi, ar, ai, PRECISION)
    keep(p_out, gr, gi, K)
    keep(p_gn, hr, hi, K)
    tl.debug_barrier()


@triton.jit(noinline=True)
def unit_gradient(
    p_x, p_g, first, second, of_norm, M: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr
):
    """Of H from that of `X = H / |H|` in its place, and from that of |H|; X is H times both factors."""
    along = 0.0
    for i0 in tl.range(0, M, ROWS, loop_unroll_factor=1):
        for j0 in tl.range(0, N, C, loop_unroll_factor=1):
            gr, gi = load_tile(p_g, M, N, i0, j0, ROWS, C)
            xr, xi = load_tile(p_x, M, N, i0, j0, ROWS, C)
            along += tl.sum(tl.sum(gr * xr + gi * xi, 1), 0)
    for i0 in tl.range(0, M, ROWS, loop_unroll_factor=1):
        for j0 in tl.range(0, N, C, loop_unroll_factor=1):
            gr, gi = load_tile(p_g, M, N, i0, j0, ROWS, C)
            xr, xi = load_tile(p_x, M, N, i0, j0, ROWS, C)
            gr = (gr - xr * along) * first * second + xr * of_norm
            gi = (gi - xi * along) * first * second + xi * of_norm
            tl.debug_barrier()
            store_tile(p_g, gr, gi, M, N, i0, j0, ROWS, C)
    tl.debug_barrier()


@triton.jit(noinline=True)
def unpad(p_x, p_y, rows, k: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr):
    """The first k of K columns."""
    for i0 in tl.range(0, rows, ROWS, loop_unroll_factor=1):
        xr, xi = load_tile(p_x, rows, K, i0, 0, ROWS, K)
        i = i0 + tl.arange(0, ROWS)
        j = tl.arange(0, K)
        store_columns(p_y, xr, xi, k, i, j, (i < rows)[:, None] & (j < k)[None, :])
    tl.debug_barrier()


# K x K matrices of a backward program's scratch, beside the chain
WORK = tl.constexpr(21)


@triton.jit
def refine_bwd_kernel(
    p_gu,
    p_gs,
    p_gv,
    p_gnorm,
    p_h,
    p_u,
    p_v,
    p_scalars,
    p_order,
    p_gh_out,
    p_gu_out,
    p_gv_out,
    p_gscalars,
    p_scratch,
    size,
    steps,
    sweeps,
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
    link: tl.constexpr = LINK * square
    left: tl.constexpr = M * (2 * K)
    factors: tl.constexpr = left if HERMITIAN else (M + N) * (2 * K)
    longest: tl.constexpr = (M if M > N else N) * (2 * K)
    p_raw = p_scratch + pid * size
    # two each, one a side
    p_g = p_raw + square
    p_f = p_raw + 3 * square
    p_n = p_raw + 5 * square
    p_a = p_raw + 7 * square
    p_qc = p_raw + 9 * square
    # side by side, to be cleared together
    p_gp = p_raw + 10 * square
    p_gq = p_raw + 11 * square
    p_gd = p_raw + 12 * square
    p_ga = p_raw + 13 * square
    p_gb = p_raw + 14 * square
    p_gf = p_raw + 15 * square
    p_gg = p_raw + 16 * square
    p_gc = p_raw + 17 * square
    p_gn = p_raw + 18 * square
    p_graw = p_raw + 19 * square
    p_vectors = p_raw + 20 * square
    p_place = p_vectors + 2 * K
    p_w = p_raw + WORK * square
    p_z = p_w + left
    p_y = p_w + factors
    p_t = p_y + longest
    p_gt = p_t + longest
    p_gw = p_gt + longest
    p_gz = p_gw + left
    p_x = p_gw + 3 * factors
    p_chain = p_x + (2 * M * N + 3) // 4 * 4
    p_states = p_chain + (sweeps + 1) * link
    p_last = p_states + steps * factors
    closing = tl.load(p_scalars + 4 * tl.maximum(steps - 1, 0), mask=steps > 0, other=SOFT)
    for b in tl.range(pid, B, tl.num_programs(0), loop_unroll_factor=1):
        first, second, _norm = load_unit(p_h + b * (2 * M * N), p_x, M, N, ROWS, CHUNK)
        pad(p_u + b * (2 * M * k), p_states, M, k, ROWS, K)
        if not HERMITIAN:
            pad(p_v + b * (2 * N * k), p_states + left, N, k, ROWS, K)
        for t in tl.range(0, steps, loop_unroll_factor=1):
            p_su = p_states + t * factors
            p_sv = p_su if HERMITIAN else p_su + left
            step_forward(
                p_x, p_su, p_sv, p_su + factors, p_sv + factors, p_w, p_z, p_raw, p_chain, p_g, p_f,
                p_scalars + 4 * t, sweeps, M, N, k, HERMITIAN, K, ROWS, CHUNK, PRECISION,
            )  # fmt: skip
        # the closing, and back through it
        p_su = p_last
        p_sv = p_su if HERMITIAN else p_su + left
        through(p_x, p_sv, p_w, M, N, False, K, ROWS, CHUNK, PRECISION)
        project(p_su, p_w, p_raw, M, K, CHUNK, PRECISION)
        p_end = diagonalize(p_raw, p_chain, link, closing, sweeps, k, HERMITIAN, K, PRECISION)
        for side in tl.range(0, sides, loop_unroll_factor=1):
            p_in, p_r, rows = p_su, p_end + square, M
            if side == 1:
                p_in, p_r, rows = p_sv, p_end + 2 * square, N
            at = side * square
            project(p_in, p_in, p_n + at, rows, K, CHUNK, PRECISION)
            congruent(p_n + at, p_r, p_g + at, K, PRECISION)
            take_root(p_g + at, p_f + at, 1.0, k, K, PRECISION)
            multiply_squares(p_r, p_f + at, p_a + at, False, K, PRECISION)
        p_second = p_a if HERMITIAN else p_a + square
        if not HERMITIAN:
            phase_columns(p_raw, p_a, p_second, p_qc, K, PRECISION)
        place_columns(p_order + b * k, p_place, k, K)
        p_now = p_gw + factors
        p_next = p_now + factors
        for side in tl.range(0, sides, loop_unroll_factor=1):
            p_in, p_r, p_o, p_gi, p_gm, rows = p_su, p_a, p_gu + b * (2 * M * k), p_now, p_ga, M
            if side == 1:
                p_in, p_r, p_o, p_gi, p_gm, rows = p_sv, p_qc, p_gv + b * (2 * N * k), p_now + left, p_gb, N
            straighten_gradient(p_in, p_y, p_r, p_o, p_place, p_gi, p_gm, rows, k, K, ROWS, PRECISION)
        measure_gradient(
            p_raw, p_a, p_second, p_gs + b * k, p_place, p_ga, p_gb, p_graw, k, HERMITIAN, K, PRECISION
        )
        clear(p_gd, 1, K)
        for side in tl.range(0, sides, loop_unroll_factor=1):
            p_in, p_r, p_gi, p_gm, p_to, rows = p_su, p_end + square, p_now, p_ga, p_gp, M
            if side == 1:
                p_in, p_r, p_gi, p_gm, p_to, rows = p_sv, p_end + 2 * square, p_now + left, p_gb, p_gq, N
            at = side * square
            multiply_squares(p_r, p_gm, p_gf, True, K, PRECISION)
            root_gradient(p_g + at, p_gf, p_gg, 1.0, k, K, PRECISION)
            congruent_gradient(p_gm, p_f + at, p_n + at, p_r, p_gg, p_to, p_gn, K, PRECISION)
            apply(p_in, p_gn, p_gi, rows, True, K, ROWS, PRECISION)
        of_soft = diagonalize_gradient(
            p_raw, p_end, link, p_gp, p_gq, p_gd, p_ga, p_gb, p_gn, p_gf, p_graw, closing, sweeps,
            True, k, HERMITIAN, K, PRECISION,
        )  # fmt: skip
        project_gradient(p_su, p_w, p_graw, p_now, p_gw, M, False, K, ROWS, PRECISION)
        p_gx = p_gh_out + b * (2 * M * N)
        back_through(p_x, p_gw, p_now if HERMITIAN else p_now + left, M, N, True, K, ROWS, CHUNK, PRECISION)
        outer(p_gw, p_sv, p_su, p_gz, p_gx, M, N, False, False, K, ROWS, CHUNK, PRECISION)
        for back in tl.range(0, steps, loop_unroll_factor=1):
            t = steps - 1 - back
            p_row = p_scalars + 4 * t
            p_grow = p_gscalars + (b * steps + t) * 4
            soft = tl.load(p_row)
            p_su = p_states + t * factors
            p_sv = p_su if HERMITIAN else p_su + left
            through(p_x, p_sv, p_w, M, N, False, K, ROWS, CHUNK, PRECISION)
            project(p_su, p_w, p_raw, M, K, CHUNK, PRECISION)
            p_end = diagonalize(p_raw, p_chain, link, soft, sweeps, k, HERMITIAN, K, PRECISION)
            if not HERMITIAN:
                back_through(p_x, p_su, p_z, M, N, False, K, ROWS, CHUNK, PRECISION)
            clear(p_gp, 3, K)
            for side in tl.range(0, sides, loop_unroll_factor=1):
                p_in, p_product, p_o, p_gi, p_gp_in, rows = p_su, p_w, p_now, p_next, p_gw, M
                p_r, p_q, p_gm, p_gn_side = (
                    p_end + square,
                    p_end + sides * square,
                    p_gp,
                    p_gp + (sides - 1) * square,
                )
                if side == 1:
                    p_in, p_product, p_o, p_gi, p_gp_in, rows = (
                        p_sv,
                        p_z,
                        p_now + left,
                        p_next + left,
                        p_gz,
                        N,
                    )
                    p_r, p_q, p_gm, p_gn_side = p_end + 2 * square, p_end + square, p_gq, p_gp
                scaling = expand(
                    p_in, p_product, p_y, p_t, p_r, p_q, p_end, p_row, p_g, p_vectors, rows, side,
                    HERMITIAN, K, ROWS, PRECISION,
                )  # fmt: skip
                take_root(p_g, p_f, scaling, k, K, PRECISION)
                project(p_t, p_o, p_gf, rows, K, CHUNK, PRECISION)
                of_scaling = root_gradient(p_g, p_gf, p_gg, scaling, k, K, PRECISION)
                expand_gradient(
                    p_in, p_y, p_t, p_o, p_f, p_gg, p_gt, p_gc, p_vectors + K, rows, K, ROWS, PRECISION
                )
                weights_gradient(
                    p_r, p_end, p_row, p_vectors, p_gc, p_gm, p_gd, p_grow, of_scaling, side,
                    HERMITIAN, K, PRECISION,
                )  # fmt: skip
                rotated_gradient(
                    p_product,
                    p_y,
                    p_gt,
                    p_q,
                    p_gc,
                    p_vectors,
                    p_gi,
                    p_gp_in,
                    p_gn_side,
                    rows,
                    K,
                    ROWS,
                    PRECISION,
                )
            of_soft += diagonalize_gradient(
                p_raw, p_end, link, p_gp, p_gq, p_gd, p_ga, p_gb, p_gn, p_gf, p_graw, soft, sweeps,
                False, k, HERMITIAN, K, PRECISION,
            )  # fmt: skip
            # the closing has the scalars of the last step
            tl.store(p_grow, of_soft)
            of_soft = 0.0
            project_gradient(p_su, p_w, p_graw, p_next, p_gw, M, True, K, ROWS, PRECISION)
            back_through(
                p_x, p_gw, p_next if HERMITIAN else p_next + left, M, N, True, K, ROWS, CHUNK, PRECISION
            )
            if not HERMITIAN:
                through(p_x, p_gz, p_next, M, N, True, K, ROWS, CHUNK, PRECISION)
            outer(p_gw, p_sv, p_su, p_gz, p_gx, M, N, not HERMITIAN, True, K, ROWS, CHUNK, PRECISION)
            p_now, p_next = p_next, p_now
        unpad(p_now, p_gu_out + b * (2 * M * k), M, k, ROWS, K)
        if not HERMITIAN:
            unpad(p_now + left, p_gv_out + b * (2 * N * k), N, k, ROWS, K)
        unit_gradient(p_x, p_gx, first, second, tl.load(p_gnorm + b), M, N, ROWS, CHUNK)


def refine_backward_launch(
    gU: Tensor,
    gS: Tensor,
    gV: Tensor | None,
    gnorm: Tensor,
    H: Tensor,
    U: Tensor,
    V: Tensor | None,
    scalars: Tensor,
    order: Tensor,
    sweeps: int,
) -> tuple[Launch, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The launch of `refine_backward`: gradients of H, U and V, and of the scalars sample by sample."""
    (B, M, N, _), k = H.shape, U.shape[2]
    refuse(M, N, k)
    steps, K, both = len(scalars), block(k), M if V is None else M + N
    longest = M if V is None else max(M, N)
    squares = WORK.value + (sweeps + 1) * LINK.value
    scratch = squares * 2 * K * K + ((5 + steps) * both + 3 * longest) * 2 * K + (2 * M * N + 3) // 4 * 4
    count = programs(H, 4 * scratch)
    outputs = (
        torch.empty_like(H),
        torch.empty_like(U),
        U.new_empty((0,)) if V is None else torch.empty_like(V),
    )
    gscalars = H.new_empty((B, steps, 4))
    arguments = {"p_gu": gU, "p_gs": gS, "p_gv": gV, "p_gnorm": gnorm, "p_h": H, "p_u": U, "p_v": V}
    arguments |= {"p_scalars": scalars, "p_order": order, "p_gh_out": outputs[0], "p_gu_out": outputs[1]}
    arguments |= {"p_gv_out": outputs[2], "p_gscalars": gscalars, "p_scratch": H.new_empty((count, scratch))}
    arguments |= {"size": scratch, "steps": steps, "sweeps": sweeps, "B": B}
    constants = constants_of(M, N, k, V is None)
    return Launch(refine_bwd_kernel, (count,), arguments, constants, **THREADS), (*outputs, gscalars)


def refine_backward(
    gU: Tensor,
    gS: Tensor,
    gV: Tensor | None,
    gnorm: Tensor,
    H: Tensor,
    U: Tensor,
    V: Tensor | None,
    scalars: Tensor,
    order: Tensor,
    sweeps: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of H, U, V and the scalars of `refine`, in one launch, columns in the order that it found.

    Arguments as those of `refine`, and the gradients of its U, S, V (None where V is) and |H|. The factors
    after every step are computed again and kept, the rest of a step computed again on the way back.
    """
    launch, (gH, gu, gv, gscalars) = refine_backward_launch(
        gU, gS, gV, gnorm, H, U, V, scalars, order, sweeps
    )
    launch.run()
    return gH, gu, gv, gscalars.sum(0, dtype=torch.float64).to(scalars.dtype)
