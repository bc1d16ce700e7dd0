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
    FLAT,
    FLOOR,
    LINK,
    ROTATION,
    SAFE,
    SOFT,
    TINY,
    adjoint,
    apply,
    back_through,
    column_sums,
    complex_sums,
    congruent,
    constants_of,
    core_of,
    diagonal_of,
    diagonalize,
    energies,
    expand,
    flat,
    generators,
    identity,
    keep,
    keep_real,
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
    through_scratch,
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


# What follows is cut into pieces of two or three products: longer ones keep more operands than there are
# registers. p_t are matrices of scratch side by side, which a gradient uses as it likes.


@triton.jit
def factor(er, ei, root, one):
    """The first factor of `inverse_root`, `root (I + E / 2)`."""
    return root * (one + 0.5 * er), root * (0.5 * ei)


@triton.jit(noinline=True)
def root_defects(p_g, p_t, square, k: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    """The defects before the first and the second iteration, and the gradient of the largest row of G^2.

    Returns the scaling by the bound, and the root of that row.
    """
    one = identity(k, K)
    gr, gi = square_of(p_g, K)
    hr, hi = cdot(gr, gi, gr, gi, PRECISION)
    top, ur, ui = row_gradient(hr, hi, k, K)
    row = tl.sqrt(top)
    safe = 1.0 / tl.maximum(row / (SAFE * SAFE), 1.0)
    scale = tl.minimum(square, safe)
    er, ei = one - gr * scale, -gi * scale
    hr, hi = one - (2 * gr - hr * scale) * scale, -(2 * gi - hi * scale) * scale
    keep(p_t, er, ei, K)
    keep(p_t + 4 * K * K, ur, ui, K)
    er, ei = cdot(hr, hi, 0.75 * one + 0.25 * er, 0.25 * ei, PRECISION)
    keep(p_t + 2 * K * K, er, ei, K)
    tl.debug_barrier()
    return safe, row


@triton.jit(noinline=True)
def last_defect_gradient(
    p_gf, p_t, p_b, p_w, root, k: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr
):
    """Of the last defect, to p_b, and the Hermitian part of that of F, to p_w."""
    er, ei = square_of(p_t, K)
    fr, fi = factor(er, ei, root, identity(k, K))
    ar, ai = square_of(p_t + 2 * K * K, K)
    br, bi = cdot(fr, fi, ar, ai, PRECISION)
    wr, wi = square_of(p_gf, K)
    wr, wi = hermitian_part(wr, wi)
    keep(p_w, wr, wi, K)
    br, bi = cdot(fr + 0.5 * br, fi + 0.5 * bi, wr, wi, PRECISION)
    br, bi = hermitian_part(0.5 * br, 0.5 * bi)
    keep(p_b, br, bi, K)
    tl.debug_barrier()


@triton.jit(noinline=True)
def last_factor_gradient(p_t, p_w, k: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    """Of the factor before the last, in the place of that of F."""
    ar, ai = square_of(p_t + 2 * K * K, K)
    hr, hi = cdot(ar, ai, ar, ai, PRECISION)
    hr, hi = cdot(hr, hi, 0.75 * identity(k, K) + 0.25 * ar, 0.25 * ai, PRECISION)
    wr, wi = square_of(p_w, K)
    hr, hi = cdot(wr, wi, hr, hi, PRECISION)
    hr, hi = hermitian_part(0.5 * hr, 0.5 * hi)
    tl.debug_barrier()
    keep(p_w, wr + hr, wi + hi, K)
    tl.debug_barrier()


@triton.jit(noinline=True)
def defect_gradient(p_b, p_e, K: tl.constexpr, PRECISION: tl.constexpr):
    """Of E from that of `E^2 (3 I + E) / 4`, in its place, all Hermitian."""
    gr, gi = square_of(p_b, K)
    er, ei = square_of(p_e, K)
    ar, ai = cdot(gr, gi, er, ei, PRECISION)
    cr, ci = cdot(er, ei, ar, ai, PRECISION)
    dr, di = cdot(ar, ai, er, ei, PRECISION)
    ar, ai = hermitian_part(1.5 * ar + 0.5 * dr, 1.5 * ai + 0.5 * di)
    tl.debug_barrier()
    keep(p_b, ar + 0.25 * cr, ai + 0.25 * ci, K)
    tl.debug_barrier()


@triton.jit(noinline=True)
def first_factor_gradient(p_t, p_b, p_w, root, k: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    """Of the defect and of the factor before the second iteration, in their places."""
    er, ei = square_of(p_t, K)
    fr, fi = factor(er, ei, root, identity(k, K))
    wr, wi = square_of(p_w, K)
    hr, hi = cdot(fr, fi, wr, wi, PRECISION)
    hr, hi = hermitian_part(0.5 * hr, 0.5 * hi)
    br, bi = square_of(p_b, K)
    tl.debug_barrier()
    keep(p_b, br + hr, bi + hi, K)
    ar, ai = square_of(p_t + 2 * K * K, K)
    hr, hi = cdot(wr, wi, ar, ai, PRECISION)
    hr, hi = hermitian_part(0.5 * hr, 0.5 * hi)
    tl.debug_barrier()
    keep(p_w, wr + hr, wi + hi, K)
    tl.debug_barrier()


@triton.jit(noinline=True)
def gram_gradient(
    p_g, p_t, p_b, p_w, p_gg, square, safe, row, k: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr
):
    """Of G, and of `square`, from those of the first defect and the first factor."""
    scale = tl.minimum(square, safe)
    root = tl.sqrt(scale)
    er, ei = square_of(p_t, K)
    wr, wi = square_of(p_w, K)
    br, bi = square_of(p_b, K)
    br, bi = br + 0.5 * root * wr, bi + 0.5 * root * wi
    gr, gi = square_of(p_g, K)
    along = (wr * (identity(k, K) + 0.5 * er) + wi * (0.5 * ei)) * (0.5 / root) - (br * gr + bi * gi)
    whole = tl.sum(through_scratch(p_gg, tl.sum(along, 1), K), 0)
    given = tl.where(square < safe, whole, tl.where(square == safe, 0.5 * whole, 0.0))
    # of the largest row, the square of `row`; safe is SAFE^2 / row where that is below 1
    slope = tl.where(row >= SAFE * SAFE, (given - whole) * (0.5 * SAFE * SAFE) / (row * row * row), 0.0)
    ur, ui = square_of(p_t + 4 * K * K, K)
    ur, ui = hermitian_part(ur * slope, ui * slope)
    ur, ui = cdot(ur, ui, gr, gi, PRECISION)
    ur, ui = hermitian_part(2 * ur, 2 * ui)
    tl.debug_barrier()
    keep(p_gg, ur - scale * br, ui - scale * bi, K)
    tl.debug_barrier()
    return given


@triton.jit
def root_gradient(p_g, p_gf, p_gg, p_t, square, k: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    """Of G to p_gg from that of `inverse_root` at p_gf; returns that of `square`."""
    p_b = p_t + 6 * K * K
    p_w = p_t + 8 * K * K
    safe, row = root_defects(p_g, p_t, square, k, K, PRECISION)
    root = tl.sqrt(tl.minimum(square, safe))
    last_defect_gradient(p_gf, p_t, p_b, p_w, root, k, K, PRECISION)
    last_factor_gradient(p_t, p_w, k, K, PRECISION)
    defect_gradient(p_b, p_t + 2 * K * K, K, PRECISION)
    first_factor_gradient(p_t, p_b, p_w, root, k, K, PRECISION)
    defect_gradient(p_b, p_t, K, PRECISION)
    return gram_gradient(p_g, p_t, p_b, p_w, p_gg, square, safe, row, k, K, PRECISION)


@triton.jit(noinline=True)
def unitary_factors(p_x, p_t, k: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    """X^2, the gradient of its largest row, X^4 as scaled, and the right factor of `unitary`; that row."""
    xr, xi = square_of(p_x, K)
    sr, si = cdot(xr, xi, xr, xi, PRECISION)
    row, ur, ui = row_gradient(sr, si, k, K)
    square = 1.0 / tl.maximum(row / (ROTATION * ROTATION), 1.0)
    keep(p_t, sr, si, K)
    keep(p_t + 2 * K * K, ur, ui, K)
    sr, si = sr * square, si * square
    sr, si = cdot(sr, si, sr, si, PRECISION)
    keep(p_t + 4 * K * K, sr, si, K)
    er, ei = cdot(sr, si, sr, si, PRECISION)
    er, ei = identity(k, K) - 0.125 * sr + (0.185 / 16) * er, -0.125 * si + (0.185 / 16) * ei
    keep(p_t + 6 * K * K, er, ei, K)
    tl.debug_barrier()
    return row


@triton.jit(noinline=True)
def factors_gradient(p_x, p_g, p_t, square, k: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    """Of the factors of `unitary`: of the right one to the place of both's, of the left one beside it."""
    gr, gi = square_of(p_g, K)
    er, ei = square_of(p_t + 6 * K * K, K)
    ar, ai = cdot(gr, gi, er, ei, PRECISION)
    root = tl.sqrt(square)
    xr, xi = square_of(p_x, K)
    sr, si = square_of(p_t, K)
    xr = identity(k, K) + xr * root + 0.5 * square * sr
    xr, xi = adjoint(xr, xi * root + 0.5 * square * si)
    gr, gi = cdot(xr, xi, gr, gi, PRECISION)
    gr, gi = hermitian_part(gr, gi)
    tl.debug_barrier()
    keep(p_t + 6 * K * K, ar, ai, K)
    keep(p_g, gr, gi, K)
    tl.debug_barrier()


@triton.jit(noinline=True)
def argument_gradient(p_x, p_g, p_t, row, K: tl.constexpr, PRECISION: tl.constexpr):
    """Of X from those of the factors."""
    square = 1.0 / tl.maximum(row / (ROTATION * ROTATION), 1.0)
    root = tl.sqrt(square)
    gr, gi = square_of(p_g, K)
    fr, fi = square_of(p_t + 4 * K * K, K)
    er, ei = cdot(fr, fi, gr, gi, PRECISION)
    er, ei = hermitian_part((0.37 / 16) * er, (0.37 / 16) * ei)
    er, ei = er - 0.125 * gr, ei - 0.125 * gi
    # of the square of X, and of X, both scaled
    sr, si = square_of(p_t, K)
    er, ei = cdot(2 * square * sr, 2 * square * si, er, ei, PRECISION)
    ar, ai = square_of(p_t + 6 * K * K, K)
    er, ei = hermitian_part(0.5 * ar + er, 0.5 * ai + ei)
    ar, ai = skew_part(ar, ai)
    xr, xi = square_of(p_x, K)
    along = (ar * xr + ai * xi) * (0.5 / root) + (er * sr + ei * si)
    whole = tl.sum(through_scratch(p_t + 8 * K * K, tl.sum(along, 1), K), 0)
    slope = tl.where(row >= ROTATION * ROTATION, -whole * (ROTATION * ROTATION) / (row * row), 0.0)
    ur, ui = square_of(p_t + 2 * K * K, K)
    ur, ui = hermitian_part(ur * slope, ui * slope)
    er, ei = cdot(er * square + ur, ei * square + ui, xr, xi, PRECISION)
    er, ei = skew_part(2 * er, 2 * ei)
    tl.debug_barrier()
    keep(p_g, ar * root - er, ai * root - ei, K)
    tl.debug_barrier()


@triton.jit
def unitary_gradient(p_x, p_g, p_t, k: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    """Of the skew-Hermitian X from that of `unitary`, in its place."""
    row = unitary_factors(p_x, p_t, k, K, PRECISION)
    factors_gradient(p_x, p_g, p_t, 1.0 / tl.maximum(row / (ROTATION * ROTATION), 1.0), k, K, PRECISION)
    argument_gradient(p_x, p_g, p_t, row, K, PRECISION)


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
def tied_turn_gradient(p_link, p_gd, p_ga, K: tl.constexpr, PRECISION: tl.constexpr):
    """Of D, in place, and of A, from that of `A^H D A`; all Hermitian but A."""
    dr, di = square_of(p_link, K)
    ar, ai = square_of(p_link + 6 * K * K, K)
    gr, gi = square_of(p_gd, K)
    gr, gi = hermitian_part(gr, gi)
    nr, ni = cdot(dr, di, ar, ai, PRECISION)
    nr, ni = cdot(2 * nr, 2 * ni, gr, gi, PRECISION)
    keep(p_ga, nr, ni, K)
    gr, gi = cdot(ar, ai, gr, gi, PRECISION)
    ar, ai = adjoint(ar, ai)
    gr, gi = cdot(gr, gi, ar, ai, PRECISION)
    tl.debug_barrier()
    keep(p_gd, gr, gi, K)
    tl.debug_barrier()


@triton.jit(noinline=True)
def turned_core(p_link, p_t, K: tl.constexpr, PRECISION: tl.constexpr):
    """D B, and A^H D B."""
    dr, di = square_of(p_link, K)
    br, bi = square_of(p_link + 8 * K * K, K)
    dr, di = cdot(dr, di, br, bi, PRECISION)
    keep(p_t, dr, di, K)
    ar, ai = square_of(p_link + 6 * K * K, K)
    ar, ai = adjoint(ar, ai)
    dr, di = cdot(ar, ai, dr, di, PRECISION)
    keep(p_t + 2 * K * K, dr, di, K)
    tl.debug_barrier()


@triton.jit(noinline=True)
def turned_phases(p_link, p_t, p_gd, p_gq, p_gb, K: tl.constexpr, PRECISION: tl.constexpr):
    """Of Q B by its phases to p_gb, through Q, and what the phases have of both gradients."""
    qr, qi = square_of(p_link + 4 * K * K, K)
    hr, hi = square_of(p_gq, K)
    qr, qi = adjoint(qr, qi)
    qr, qi = cdot(qr, qi, hr, hi, PRECISION)
    keep(p_gb, qr, qi, K)
    br, bi = square_of(p_link + 8 * K * K, K)
    nr, ni = square_of(p_t + 2 * K * K, K)
    gr, gi = square_of(p_gd, K)
    p_sums = p_t + 4 * K * K
    keep(p_sums, nr * gr + ni * gi + br * qr + bi * qi, nr * gi - ni * gr + br * qi - bi * qr, K)
    tl.debug_barrier()


@triton.jit(noinline=True)
def phases_gradient(p_link, p_t, p_gd, p_gq, p_gb, K: tl.constexpr, PRECISION: tl.constexpr):
    """Of `A^H D B`, of Q and, through Q B, of B, from those of the first and the last by their phases."""
    along, across = complex_sums(p_t + 4 * K * K, K)
    zr, zi = diagonal_of(p_t + 2 * K * K, K)
    ur, ui = phase(zr, zi)
    zr, zi = phase_gradient(zr, zi, along, across)
    gr, gi = square_of(p_gd, K)
    gr, gi = times(gr, gi, ur, ui, 1.0)
    gr, gi = on_diagonal(gr, gi, zr, zi, K)
    qr, qi = square_of(p_gb, K)
    qr, qi = times(qr, qi, ur, ui, 1.0)
    hr, hi = square_of(p_gq, K)
    br, bi = square_of(p_link + 8 * K * K, K)
    br, bi = times(br, bi, ur, -ui, 1.0)
    br, bi = adjoint(br, bi)
    hr, hi = cdot(hr, hi, br, bi, PRECISION)
    tl.debug_barrier()
    keep(p_gd, gr, gi, K)
    keep(p_gb, qr, qi, K)
    keep(p_gq, hr, hi, K)
    tl.debug_barrier()


@triton.jit(noinline=True)
def left_turn_gradient(p_t, p_gd, p_ga, K: tl.constexpr, PRECISION: tl.constexpr):
    """Of A from that of `A^H D B`."""
    gr, gi = square_of(p_gd, K)
    gr, gi = adjoint(gr, gi)
    nr, ni = square_of(p_t, K)
    nr, ni = cdot(nr, ni, gr, gi, PRECISION)
    keep(p_ga, nr, ni, K)
    tl.debug_barrier()


@triton.jit(noinline=True)
def right_turn_gradient(p_link, p_gd, p_gb, K: tl.constexpr, PRECISION: tl.constexpr):
    """Of D, in place, and of B, added, from that of `A^H D B`."""
    ar, ai = square_of(p_link + 6 * K * K, K)
    gr, gi = square_of(p_gd, K)
    gr, gi = cdot(ar, ai, gr, gi, PRECISION)
    ar, ai = square_of(p_link, K)
    ar, ai = adjoint(ar, ai)
    br, bi = square_of(p_gb, K)
    ar, ai = cdot_add(ar, ai, gr, gi, br, bi, PRECISION)
    br, bi = square_of(p_link + 8 * K * K, K)
    br, bi = adjoint(br, bi)
    gr, gi = cdot(gr, gi, br, bi, PRECISION)
    tl.debug_barrier()
    keep(p_gb, ar, ai, K)
    keep(p_gd, gr, gi, K)
    tl.debug_barrier()


@triton.jit(noinline=True)
def product_gradient(p_p, p_a, p_gp, p_ga, K: tl.constexpr, PRECISION: tl.constexpr):
    """Of P, in place, and of A, added, from that of P A."""
    pr, pi = square_of(p_p, K)
    gr, gi = square_of(p_gp, K)
    hr, hi = square_of(p_ga, K)
    pr, pi = adjoint(pr, pi)
    hr, hi = cdot_add(pr, pi, gr, gi, hr, hi, PRECISION)
    pr, pi = square_of(p_a, K)
    pr, pi = adjoint(pr, pi)
    gr, gi = cdot(gr, gi, pr, pi, PRECISION)
    tl.debug_barrier()
    keep(p_ga, hr, hi, K)
    keep(p_gp, gr, gi, K)
    tl.debug_barrier()


@triton.jit
def turn_gradient(
    p_link,
    p_gd,
    p_gp,
    p_gq,
    p_ga,
    p_gb,
    p_t,
    HERMITIAN: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of D, P and Q from those after `turn`, in their place; of A and B to p_ga and p_gb."""
    if HERMITIAN:
        tied_turn_gradient(p_link, p_gd, p_ga, K, PRECISION)
    else:
        turned_core(p_link, p_t, K, PRECISION)
        turned_phases(p_link, p_t, p_gd, p_gq, p_gb, K, PRECISION)
        phases_gradient(p_link, p_t, p_gd, p_gq, p_gb, K, PRECISION)
        left_turn_gradient(p_t, p_gd, p_ga, K, PRECISION)
        right_turn_gradient(p_link, p_gd, p_gb, K, PRECISION)
    product_gradient(p_link + 2 * K * K, p_link + 6 * K * K, p_gp, p_ga, K, PRECISION)


@triton.jit
def tangent_gradient(zr, zi, gap, gr, gi):
    """Of z and of the gap from that of `z / (gap + sqrt(gap^2 + |z|^2))`."""
    size = tl.sqrt(gap * gap + zr * zr + zi * zi)
    q = 1.0 / (gap + size)
    along = (zr * gr + zi * gi) * (q / size)
    return gr * q - zr * (along * q), gi * q - zi * (along * q), -along


@triton.jit(noinline=True)
def generators_gradient(p_d, p_ga, p_gb, p_gd, p_t, soft, HERMITIAN: tl.constexpr, K: tl.constexpr):
    """Adds that of D to p_gd, from those of X + Y and X - Y, or of X; returns that of soft."""
    dr, di = square_of(p_d, K)
    s, _ = diagonal_of(p_d, K)
    off = off_diagonal(p_d, s, K)
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
    of_soft = tl.sum(through_scratch(p_t + 2 * K * K, tl.sum(wide * root, 1), K), 0)
    keep(p_t, share + tl.trans(share), moved, K)
    tl.debug_barrier()
    shared, alone = complex_sums(p_t, K)
    shared = tl.where(off >= 0, shared, 0.0)
    both = shared[:, None] + shared[None, :]
    gr, gi = square_of(p_gd, K)
    gr, gi = gr + zr + dr * both, gi + zi + di * both
    gr, gi = on_diagonal(gr, gi, alone - 2 * s * shared, tl.zeros((K,), tl.float32), K)
    tl.debug_barrier()
    keep(p_gd, gr, gi, K)
    tl.debug_barrier()
    return of_soft


@triton.jit(noinline=True)
def begin_gradient(
    p_raw, p_gd, p_gq, p_t, p_graw, ADD: tl.constexpr, HERMITIAN: tl.constexpr, K: tl.constexpr
):
    """Of the core, or that added, from those of D and Q after `begin`."""
    gr, gi = square_of(p_gd, K)
    if HERMITIAN:
        gr, gi = hermitian_part(gr, gi)
    else:
        dr, di = square_of(p_raw, K)
        zr, zi = diagonal_of(p_raw, K)
        ur, ui = phase(zr, zi)
        keep(p_t, dr * gr + di * gi, dr * gi - di * gr, K)
        tl.debug_barrier()
        along, across = complex_sums(p_t, K)
        hr, hi = diagonal_of(p_gq, K)
        zr, zi = phase_gradient(zr, zi, along + hr, across + hi)
        gr, gi = times(gr, gi, ur, ui, 1.0)
        gr, gi = on_diagonal(gr, gi, zr, zi, K)
    if ADD:
        hr, hi = square_of(p_graw, K)
        gr, gi = gr + hr, gi + hi
    tl.debug_barrier()
    keep(p_graw, gr, gi, K)
    tl.debug_barrier()


# The places of K x K matrices in a program's scratch, after the core. GRAM to RIGHT are two each, one a side;
# those of P, Q and D lie side by side, to be cleared together.
GRAM = tl.constexpr(1)
ROOT = tl.constexpr(3)
NORMS = tl.constexpr(5)
RIGHT = tl.constexpr(7)
PHASED = tl.constexpr(9)
OF_P = tl.constexpr(10)
OF_Q = tl.constexpr(11)
OF_D = tl.constexpr(12)
OF_A = tl.constexpr(13)
OF_B = tl.constexpr(14)
OF_ROOT = tl.constexpr(15)
OF_GRAM = tl.constexpr(16)
OF_C = tl.constexpr(17)
OF_NORMS = tl.constexpr(18)
OF_CORE = tl.constexpr(19)
VECTORS = tl.constexpr(20)
TEMPORARY = tl.constexpr(21)
WORK = tl.constexpr(26)


@triton.jit(noinline=True)
def clear(p, COUNT: tl.constexpr, K: tl.constexpr):
    """Zeros in matrices of scratch that lie side by side."""
    nothing = tl.zeros((K, K), tl.float32)
    for i in tl.range(0, COUNT, loop_unroll_factor=1):
        keep(p + i * (2 * K * K), nothing, nothing, K)
    tl.debug_barrier()


@triton.jit(noinline=True)
def expand_gradient(
    p_y,
    p_t,
    p_g,
    p_f,
    p_gg,
    p_gt,
    p_along,
    p_sums,
    rows,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of `T = X C + Y diag(w)` from those of `T F` and of its Gram matrix, and what w has of it by Y."""
    fr, fi = square_of(p_f, K)
    hr, hi = square_of(p_gg, K)
    hr, hi = 2 * hr, 2 * hi
    products = tl.zeros((ROWS, K), tl.float32)
    for i0 in tl.range(0, rows, ROWS, loop_unroll_factor=1):
        gr, gi = load_tile(p_g, rows, K, i0, 0, ROWS, K)
        tr, ti = load_tile(p_t, rows, K, i0, 0, ROWS, K)
        gr, gi = cdot(gr, gi, fr, fi, PRECISION)
        gr, gi = cdot_add(tr, ti, hr, hi, gr, gi, PRECISION)
        store_tile(p_gt, gr, gi, rows, K, i0, 0, ROWS, K)
        yr, yi = load_tile(p_y, rows, K, i0, 0, ROWS, K)
        products += yr * gr + yi * gi
    keep_real(p_sums, products, ROWS, K)
    tl.store(p_along + tl.arange(0, K), column_sums(p_sums, ROWS, K))
    tl.debug_barrier()


@triton.jit(noinline=True)
def rotated_core(p_a, p_d, side, p_t, K: tl.constexpr, PRECISION: tl.constexpr):
    """A times the core as a side sees it."""
    ar, ai = square_of(p_a, K)
    er, ei = core_of(p_d, side, K)
    ar, ai = cdot(ar, ai, er, ei, PRECISION)
    keep(p_t, ar, ai, K)
    tl.debug_barrier()


@triton.jit(noinline=True)
def rotated_core_gradient(p_a, p_d, side, p_g, p_ga, p_gd, K: tl.constexpr, PRECISION: tl.constexpr):
    """Of A and of the core, added, from that of their product."""
    gr, gi = square_of(p_g, K)
    er, ei = core_of(p_d, side, K)
    er, ei = adjoint(er, ei)
    hr, hi = square_of(p_ga, K)
    hr, hi = cdot_add(gr, gi, er, ei, hr, hi, PRECISION)
    ar, ai = square_of(p_a, K)
    ar, ai = adjoint(ar, ai)
    gr, gi = cdot(ar, ai, gr, gi, PRECISION)
    if side == 1:
        gr, gi = adjoint(gr, gi)
    er, ei = square_of(p_gd, K)
    tl.debug_barrier()
    keep(p_ga, hr, hi, K)
    keep(p_gd, er + gr, ei + gi, K)
    tl.debug_barrier()


@triton.jit(noinline=True)
def weights_gradient(
    p_a,
    p_d,
    p_row,
    p_vectors,
    p_t,
    p_gc,
    p_ga,
    p_gd,
    p_grow,
    of_scaling,
    side,
    HERMITIAN: tl.constexpr,
    K: tl.constexpr,
):
    """Of A and of the core, part of both, and of the scalars, from those of C and w; C in the place of its.

    p_t holds A times the core; beside it comes what A and the core take of it.
    p_vectors holds the energies of Y and part of the gradient of w; then twice that of the energies, and w.
    """
    j = tl.arange(0, K)
    er, ei = core_of(p_d, side, K)
    s, _ = diagonal_of(p_d, K)
    gain = tl.load(p_row + 2)
    bound = tl.load(p_row + 3)
    inverse = shifted_inverse(s, tl.load(p_row + 1), HERMITIAN)
    rest = tl.load(p_vectors + j) - energies(p_d, side, K)
    outside = tl.maximum(rest, 0.0)
    squares = tl.sum(outside * inverse * inverse, 0)
    total = squares * gain * gain
    limit_square = bound * bound
    largest = tl.maximum(total, limit_square)
    share = limit_square / largest
    root = tl.sqrt(share)
    weight = inverse * (gain * root)
    ar, ai = square_of(p_a, K)
    br, bi = square_of(p_t, K)
    cr, ci = square_of(p_gc, K)
    keep_real(p_t + 4 * K * K, br * cr + bi * ci, K, K)
    of_weight = tl.load(p_vectors + K + j) - column_sums(p_t + 4 * K * K, K, K)
    keep(p_gc, ar - br * weight[None, :], ai - bi * weight[None, :], K)
    keep(p_t + 2 * K * K, cr * -weight[None, :], ci * -weight[None, :], K)
    hr, hi = square_of(p_ga, K)
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
    br, bi = er * -of_rest[None, :], ei * -of_rest[None, :]
    if side == 1:
        br, bi = adjoint(br, bi)
    br, bi = on_diagonal(br, bi, of_s, tl.zeros((K,), tl.float32), K)
    gr, gi = cr, ci
    cr, ci = square_of(p_gd, K)
    old_mu = tl.load(p_grow + 1, mask=side > 0, other=0.0)
    old_gain = tl.load(p_grow + 2, mask=side > 0, other=0.0)
    old_bound = tl.load(p_grow + 3, mask=side > 0, other=0.0)
    tl.debug_barrier()
    keep(p_ga, hr + gr, hi + gi, K)
    keep(p_gd, br + cr, bi + ci, K)
    tl.store(p_vectors + j, of_rest)
    tl.store(p_vectors + K + j, weight)
    tl.store(p_grow + 1, old_mu + of_mu)
    tl.store(p_grow + 2, old_gain + of_gain)
    tl.store(p_grow + 3, old_bound + of_bound)
    tl.debug_barrier()


@triton.jit(noinline=True)
def apply_adjoint(p_x, p_b, p_y, rows, K: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr):
    """`Y = X B^H` of K columns."""
    br, bi = square_of(p_b, K)
    br, bi = adjoint(br, bi)
    for i0 in tl.range(0, rows, ROWS, loop_unroll_factor=1):
        xr, xi = load_tile(p_x, rows, K, i0, 0, ROWS, K)
        xr, xi = cdot(xr, xi, br, bi, PRECISION)
        store_tile(p_y, xr, xi, rows, K, i0, 0, ROWS, K)
    tl.debug_barrier()


@triton.jit(noinline=True)
def rotated_gradient(p_y, p_gt, p_vectors, rows, K: tl.constexpr, ROWS: tl.constexpr):
    """Of Y in `T = X C + Y diag(w)` and the energies, in the place of that of T."""
    j = tl.arange(0, K)
    of_energy = tl.load(p_vectors + j)[None, :]
    weight = tl.load(p_vectors + K + j)[None, :]
    for i0 in tl.range(0, rows, ROWS, loop_unroll_factor=1):
        gr, gi = load_tile(p_gt, rows, K, i0, 0, ROWS, K)
        yr, yi = load_tile(p_y, rows, K, i0, 0, ROWS, K)
        gr, gi = gr * weight + yr * of_energy, gi * weight + yi * of_energy
        tl.debug_barrier()
        store_tile(p_gt, gr, gi, rows, K, i0, 0, ROWS, K)
    tl.debug_barrier()


@triton.jit(noinline=True)
def add_to(p_a, p_b, K: tl.constexpr):
    """`B <- B + A`."""
    ar, ai = square_of(p_a, K)
    br, bi = square_of(p_b, K)
    tl.debug_barrier()
    keep(p_b, ar + br, ai + bi, K)
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
    p_g,
    M: tl.constexpr,
    N: tl.constexpr,
    ADD: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`W V^H` to an M x N matrix or added to it."""
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
def gather(p_g, p_y, p_place, rows, k: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr):
    """Columns from their places, padded."""
    place = tl.load(p_place + tl.arange(0, K)).to(tl.int32)
    for i0 in tl.range(0, rows, ROWS, loop_unroll_factor=1):
        gr, gi = load_columns(p_g, i0 + tl.arange(0, ROWS), place, rows, k, K)
        store_tile(p_y, gr, gi, rows, K, i0, 0, ROWS, K)
    tl.debug_barrier()


@triton.jit(noinline=True)
def straighten_factors(p_t, k: tl.constexpr, K: tl.constexpr):
    """What the gradient of Z takes of that of `Z + Z (I - Z^H Z) / 2` and of Z, from products with Z^H."""
    hr, hi = square_of(p_t, K)
    cr, ci = square_of(p_t + 2 * K * K, K)
    cr, ci = hermitian_part(-cr, -ci)
    tl.debug_barrier()
    keep(p_t, 1.5 * identity(k, K) - 0.5 * hr, -0.5 * hi, K)
    keep(p_t + 2 * K * K, cr, ci, K)
    tl.debug_barrier()


@triton.jit(noinline=True)
def straighten_columns(p_y, p_g, p_t, rows, K: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr):
    """Of Z, in its place."""
    hr, hi = square_of(p_t, K)
    cr, ci = square_of(p_t + 2 * K * K, K)
    for i0 in tl.range(0, rows, ROWS, loop_unroll_factor=1):
        gr, gi = load_tile(p_g, rows, K, i0, 0, ROWS, K)
        gr, gi = cdot(gr, gi, hr, hi, PRECISION)
        xr, xi = load_tile(p_y, rows, K, i0, 0, ROWS, K)
        gr, gi = cdot_add(xr, xi, cr, ci, gr, gi, PRECISION)
        tl.debug_barrier()
        store_tile(p_y, gr, gi, rows, K, i0, 0, ROWS, K)
    tl.debug_barrier()


@triton.jit
def straighten_gradient(
    p_x,
    p_y,
    p_go,
    p_a,
    p_g,
    p_place,
    p_t,
    p_gx,
    p_ga,
    rows,
    k: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of X and of A from that of `Z + Z (I - Z^H Z) / 2`, Z = X A, columns in their order."""
    gather(p_g, p_go, p_place, rows, k, K, ROWS)
    apply(p_x, p_a, p_y, rows, False, K, ROWS, PRECISION)
    project(p_y, p_y, p_t, rows, K, CHUNK, PRECISION)
    project(p_y, p_go, p_t + 2 * K * K, rows, K, CHUNK, PRECISION)
    straighten_factors(p_t, k, K)
    straighten_columns(p_y, p_go, p_t, rows, K, ROWS, PRECISION)
    apply_adjoint(p_y, p_a, p_gx, rows, K, ROWS, PRECISION)
    project(p_x, p_y, p_ga, rows, K, CHUNK, PRECISION)


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
    p_z,
    p_gp,
    p_gq,
    p_t,
    k: tl.constexpr,
    HERMITIAN: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of s to p_z, and of P, added, from that of S; of Q from that of Q by its phases."""
    _pr, _pi, qr, qi, yr, yi, sr, si = spectrum(p_raw, p_p, p_q, HERMITIAN, K, PRECISION)
    j = tl.arange(0, K)
    place = tl.load(p_place + j).to(tl.int32)
    zr = tl.load(p_gs + place, mask=j < k, other=0.0)
    zi = tl.zeros((K,), tl.float32)
    if not HERMITIAN:
        hr, hi = square_of(p_gq, K)
        keep(p_t, qr * hr + qi * hi, qr * hi - qi * hr, K)
        tl.debug_barrier()
        along, across = complex_sums(p_t, K)
        cr, ci = phase(sr, si)
        hr, hi = times(hr, hi, cr, ci, 1.0)
        zr = zr / tl.sqrt(sr * sr + si * si + FLOOR)
        zr, zi = zr * sr, zr * si
        sr, si = phase_gradient(sr, si, along, across)
        zr, zi = zr + sr, zi + si
        tl.debug_barrier()
        keep(p_gq, hr, hi, K)
    tl.store(p_z + j, zr)
    tl.store(p_z + K + j, zi)
    gr, gi = square_of(p_gp, K)
    yr, yi = times(yr, yi, zr, -zi, 1.0)
    tl.debug_barrier()
    keep(p_gp, gr + yr, gi + yi, K)
    tl.debug_barrier()


@triton.jit(noinline=True)
def measured_core_gradient(
    p_raw,
    p_p,
    p_q,
    p_z,
    p_gq,
    p_graw,
    HERMITIAN: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of the core, and of Q, added, from that of `s = diag(P^H D Q)`."""
    zr, zi = tl.load(p_z + tl.arange(0, K)), tl.load(p_z + K + tl.arange(0, K))
    yr, yi = square_of(p_p, K)
    yr, yi = times(yr, yi, zr, zi, 1.0)
    tr, ti = square_of(p_q, K)
    tr, ti = adjoint(tr, ti)
    cr, ci = cdot(yr, yi, tr, ti, PRECISION)
    keep(p_graw, cr, ci, K)
    if not HERMITIAN:
        tr, ti = square_of(p_raw, K)
        tr, ti = adjoint(tr, ti)
        hr, hi = square_of(p_gq, K)
        hr, hi = cdot_add(tr, ti, yr, yi, hr, hi, PRECISION)
        tl.debug_barrier()
        keep(p_gq, hr, hi, K)
    tl.debug_barrier()


@triton.jit(noinline=True)
def congruent_factors(p_a, p_gg, p_t, p_gn, K: tl.constexpr, PRECISION: tl.constexpr):
    """From that of `A^H N A`, `N = X^H X`: what of N A there is in that of A, and of X in that of X."""
    ar, ai = square_of(p_a, K)
    hr, hi = square_of(p_gg, K)
    hr, hi = cdot(2 * ar, 2 * ai, hr, hi, PRECISION)
    keep(p_t, hr, hi, K)
    ar, ai = adjoint(ar, ai)
    hr, hi = cdot(hr, hi, ar, ai, PRECISION)
    keep(p_gn, hr, hi, K)
    tl.debug_barrier()


@triton.jit(noinline=True)
def congruent_gradient(p_ga, p_f, p_n, p_t, p_out, K: tl.constexpr, PRECISION: tl.constexpr):
    """Of A from those of A F and of `A^H N A`."""
    gr, gi = square_of(p_ga, K)
    fr, fi = square_of(p_f, K)
    gr, gi = cdot(gr, gi, fr, fi, PRECISION)
    fr, fi = square_of(p_n, K)
    hr, hi = square_of(p_t, K)
    gr, gi = cdot_add(fr, fi, hr, hi, gr, gi, PRECISION)
    keep(p_out, gr, gi, K)
    tl.debug_barrier()


@triton.jit(noinline=True)
def unit_gradient(p_x, p_g, p_sums, first, second, of_norm, count, COUNT: tl.constexpr):
    """Of H from that of `X = H / |H|` in its place, and from that of |H|; X is H times both factors.

    `count` is COUNT, as in `load_unit`.
    """
    step: tl.constexpr = FLAT * FLAT
    products = tl.zeros((FLAT, FLAT), tl.float32)
    for at in tl.range(0, count, step, loop_unroll_factor=1):
        i = flat(at)
        g = tl.load(p_g + i, mask=i < COUNT, other=0.0)
        products += g * tl.load(p_x + i, mask=i < COUNT, other=0.0)
    along = tl.sum(through_scratch(p_sums, tl.sum(products, 1), FLAT), 0)
    for at in tl.range(0, count, step, loop_unroll_factor=1):
        i = flat(at)
        g = tl.load(p_g + i, mask=i < COUNT, other=0.0)
        x = tl.load(p_x + i, mask=i < COUNT, other=0.0)
        tl.store(p_g + i, (g - x * along) * first * second + x * of_norm, mask=i < COUNT)
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


# The parts of the kernel are functions too, each with its own addresses, which together would fill the
# registers: all of a program's scratch lies at distances from its core that a step and constants make.


@triton.constexpr_function
def products_at(K):
    """H V, and H^H U after it."""
    return WORK * (2 * K * K)


@triton.constexpr_function
def tall_at(M, N, HERMITIAN, K):
    """Three matrices of the longer side's rows, one after another."""
    return products_at(K) + (M if HERMITIAN else M + N) * (2 * K)


@triton.constexpr_function
def gradients_at(M, N, HERMITIAN, K):
    """Those of the products with H; of the factors, before and after a step in turns, behind it."""
    return tall_at(M, N, HERMITIAN, K) + (M if M > N else N) * (6 * K)


@triton.constexpr_function
def unit_at(M, N, HERMITIAN, K):
    """`H / |H|`."""
    return gradients_at(M, N, HERMITIAN, K) + (M if HERMITIAN else M + N) * (6 * K)


@triton.constexpr_function
def chain_at(M, N, HERMITIAN, K):
    """The chain that makes a core diagonal."""
    return unit_at(M, N, HERMITIAN, K) + (2 * M * N + 3) // 4 * 4


@triton.jit
def factors_at(
    t, SWEEPS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, HERMITIAN: tl.constexpr, K: tl.constexpr
):
    """U and V after t steps."""
    states: tl.constexpr = chain_at(M, N, HERMITIAN, K) + (SWEEPS + 1) * LINK * (2 * K * K)
    return states + t * ((M if HERMITIAN else M + N) * (2 * K))


@triton.jit
def of_factors_at(t, M: tl.constexpr, N: tl.constexpr, HERMITIAN: tl.constexpr, K: tl.constexpr):
    """The gradients of U and V after t steps."""
    both: tl.constexpr = (M if HERMITIAN else M + N) * (2 * K)
    return gradients_at(M, N, HERMITIAN, K) + both + (t % 2) * both


@triton.jit(noinline=True)
def start_again(
    p_h,
    p_u,
    p_v,
    b,
    count,
    p_raw,
    SWEEPS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    k: tl.constexpr,
    HERMITIAN: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
):
    """`H / |H|`, the numbers of which it is H times both, and the first factors."""
    p_su = p_raw + factors_at(0, SWEEPS, M, N, HERMITIAN, K)
    b = tl.cast(b, tl.int64)
    pad(p_u + b * (2 * M * k), p_su, M, k, ROWS, K)
    if not HERMITIAN:
        pad(p_v + b * (2 * N * k), p_su + M * (2 * K), N, k, ROWS, K)
    p_x = p_raw + unit_at(M, N, HERMITIAN, K)
    first, second, _norm = load_unit(p_h + b * (2 * M * N), p_x, p_raw, count, 2 * M * N)
    p_vectors = p_raw + VECTORS * (2 * K * K) + 5 * K
    tl.store(p_vectors, first)
    tl.store(p_vectors + 1, second)
    tl.debug_barrier()


@triton.jit(noinline=True)
def step_again(
    p_raw,
    p_scalars,
    t,
    SWEEPS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    k: tl.constexpr,
    HERMITIAN: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The factors after a step."""
    p_row = p_scalars + 4 * t
    square: tl.constexpr = 2 * K * K
    left: tl.constexpr = M * (2 * K)
    factors: tl.constexpr = left if HERMITIAN else (M + N) * (2 * K)
    p_u = p_raw + factors_at(t, SWEEPS, M, N, HERMITIAN, K)
    p_v = p_u if HERMITIAN else p_u + left
    p_w = p_raw + products_at(K)
    step_forward(
        p_raw + unit_at(M, N, HERMITIAN, K), p_u, p_v, p_u + factors, p_v + factors, p_w, p_w + left, p_raw,
        p_raw + chain_at(M, N, HERMITIAN, K), p_raw + GRAM * square, p_raw + ROOT * square, p_row, SWEEPS,
        M, N, k, HERMITIAN, K, ROWS, CHUNK, PRECISION,
    )  # fmt: skip


@triton.jit
def soft_of(p_scalars, t, steps):
    """The softening of a step; the closing has that of the last."""
    t = tl.maximum(tl.minimum(t, steps - 1), 0)
    return tl.load(p_scalars + 4 * t, mask=steps > 0, other=SOFT)


@triton.jit
def gradient_row(p_gscalars, b, t, steps):
    """Where the gradients of the scalars of a step go."""
    return p_gscalars + (tl.cast(b, tl.int64) * steps + t) * 4


@triton.jit(noinline=True)
def core_again(
    p_raw,
    p_scalars,
    back,
    steps,
    CLOSING: tl.constexpr,
    SWEEPS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    k: tl.constexpr,
    HERMITIAN: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Products with H, the core, and the whole chain that makes it diagonal; room for its gradients."""
    t = steps - 1 - back
    soft = soft_of(p_scalars, t, steps)
    p_u = p_raw + factors_at(t, SWEEPS, M, N, HERMITIAN, K)
    p_v = p_u if HERMITIAN else p_u + M * (2 * K)
    p_w = p_raw + products_at(K)
    through(p_raw + unit_at(M, N, HERMITIAN, K), p_v, p_w, M, N, False, K, ROWS, CHUNK, PRECISION)
    project(p_u, p_w, p_raw, M, K, CHUNK, PRECISION)
    p_chain = p_raw + chain_at(M, N, HERMITIAN, K)
    diagonalize(p_raw, p_chain, LINK * (2 * K * K), soft, SWEEPS, k, HERMITIAN, K, PRECISION)
    if CLOSING:
        clear(p_raw + OF_D * (2 * K * K), 1, K)
    else:
        clear(p_raw + OF_P * (2 * K * K), 3, K)
        if not HERMITIAN:
            left: tl.constexpr = M * (2 * K)
            p_x = p_raw + unit_at(M, N, HERMITIAN, K)
            back_through(p_x, p_u, p_w + left, M, N, False, K, ROWS, CHUNK, PRECISION)


@triton.jit(noinline=True)
def diagonalize_gradient(
    p_raw,
    p_scalars,
    p_gscalars,
    b,
    back,
    steps,
    ADD: tl.constexpr,
    SWEEPS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    k: tl.constexpr,
    HERMITIAN: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of the core from those of what `diagonalize` left, and of soft; the closing has the last step's."""
    t = steps - 1 - back
    square: tl.constexpr = 2 * K * K
    p_ga = p_raw + OF_A * square
    p_gb = p_raw + OF_B * square
    p_gd = p_raw + OF_D * square
    p_gq = p_raw + OF_Q * square
    p_t = p_raw + TEMPORARY * square
    p_xa = p_raw + OF_NORMS * square
    p_xb = p_raw + OF_ROOT * square
    soft = soft_of(p_scalars, t, steps)
    of_soft = 0.0
    p_chain = p_raw + chain_at(M, N, HERMITIAN, K) + SWEEPS * LINK * square
    for _ in tl.range(0, SWEEPS, loop_unroll_factor=1):
        p_chain -= LINK * square
        turn_gradient(p_chain, p_gd, p_raw + OF_P * square, p_gq, p_ga, p_gb, p_t, HERMITIAN, K, PRECISION)
        generators(p_chain, p_xa, p_xb, soft, HERMITIAN, K)
        unitary_gradient(p_xa, p_ga, p_t, k, K, PRECISION)
        if not HERMITIAN:
            unitary_gradient(p_xb, p_gb, p_t, k, K, PRECISION)
        of_soft += generators_gradient(p_chain, p_ga, p_gb, p_gd, p_t, soft, HERMITIAN, K)
    begin_gradient(p_raw, p_gd, p_gq, p_t, p_raw + OF_CORE * square, ADD, HERMITIAN, K)
    p_soft = p_raw + VECTORS * square + 5 * K + 2
    if ADD:
        tl.store(p_soft, of_soft)
    else:
        p_grow = gradient_row(p_gscalars, b, t, steps)
        tl.store(p_grow, of_soft + tl.load(p_soft, mask=t == steps - 1, other=0.0))


@triton.jit(noinline=True)
def closing_again(
    p_raw,
    steps,
    side,
    unscaled,
    SWEEPS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    k: tl.constexpr,
    HERMITIAN: tl.constexpr,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What the closing makes of the rotations of a side, each matrix kept."""
    square: tl.constexpr = 2 * K * K
    p_x = p_raw + factors_at(steps, SWEEPS, M, N, HERMITIAN, K) + side * (M * (2 * K))
    p_r = p_raw + chain_at(M, N, HERMITIAN, K) + (SWEEPS * LINK + 1 + side) * square
    p_side = p_raw + side * square
    project(p_x, p_x, p_side + NORMS * square, tl.where(side == 1, N, M), K, CHUNK, PRECISION)
    congruent(p_side + NORMS * square, p_r, p_side + GRAM * square, K, PRECISION)
    take_root(p_side + GRAM * square, p_side + ROOT * square, unscaled, k, K, PRECISION)
    multiply_squares(p_r, p_side + ROOT * square, p_side + RIGHT * square, False, K, PRECISION)


@triton.jit(noinline=True)
def ends_again(
    p_raw, p_order, b, k: tl.constexpr, HERMITIAN: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr
):
    """The places of the columns, and what makes those of V."""
    square: tl.constexpr = 2 * K * K
    place_columns(p_order + tl.cast(b, tl.int64) * k, p_raw + VECTORS * square + 2 * K, k, K)
    if not HERMITIAN:
        p_a = p_raw + RIGHT * square
        phase_columns(p_raw, p_a, p_a + square, p_raw + PHASED * square, K, PRECISION)


@triton.jit(noinline=True)
def spectrum_gradient(
    p_raw, p_gs, b, k: tl.constexpr, HERMITIAN: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr
):
    """Of the rotations, and of the core, from those of S and of the phases."""
    square: tl.constexpr = 2 * K * K
    p_a = p_raw + RIGHT * square
    p_q = p_a if HERMITIAN else p_a + square
    p_place = p_raw + VECTORS * square + 2 * K
    measure_gradient(
        p_raw, p_a, p_q, p_gs + tl.cast(b, tl.int64) * k, p_place, p_place + K,
        p_raw + OF_A * square, p_raw + OF_B * square, p_raw + TEMPORARY * square, k, HERMITIAN, K, PRECISION,
    )  # fmt: skip
    measured_core_gradient(
        p_raw, p_a, p_q, p_place + K, p_raw + OF_B * square, p_raw + OF_CORE * square, HERMITIAN, K, PRECISION
    )


@triton.jit(noinline=True)
def columns_gradient(
    p_raw,
    steps,
    side,
    p_g,
    b,
    SWEEPS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    k: tl.constexpr,
    HERMITIAN: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of a factor before the closing and of its rotation, from that of its columns."""
    p_g += tl.cast(b, tl.int64) * tl.where(side == 1, 2 * N * k, 2 * M * k)
    square: tl.constexpr = 2 * K * K
    longest: tl.constexpr = (M if M > N else N) * (2 * K)
    at = side * (M * (2 * K))
    straighten_gradient(
        p_raw + factors_at(steps, SWEEPS, M, N, HERMITIAN, K) + at, p_raw + tall_at(M, N, HERMITIAN, K),
        p_raw + tall_at(M, N, HERMITIAN, K) + longest,
        p_raw + (RIGHT + (PHASED - RIGHT) * side) * square, p_g, p_raw + VECTORS * square + 2 * K,
        p_raw + TEMPORARY * square, p_raw + of_factors_at(steps, M, N, HERMITIAN, K) + at,
        p_raw + (OF_A + side) * square, tl.where(side == 1, N, M), k, K, ROWS, CHUNK, PRECISION,
    )  # fmt: skip


@triton.jit(noinline=True)
def closing_gradient(
    p_raw,
    steps,
    side,
    unscaled,
    SWEEPS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    k: tl.constexpr,
    HERMITIAN: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of a factor, added, and of P or Q, through what made the columns orthonormal."""
    square: tl.constexpr = 2 * K * K
    p_r = p_raw + chain_at(M, N, HERMITIAN, K) + (SWEEPS * LINK + 1 + side) * square
    p_side = p_raw + side * square
    multiply_squares(p_r, p_side + OF_A * square, p_raw + OF_ROOT * square, True, K, PRECISION)
    root_gradient(
        p_side + GRAM * square, p_raw + OF_ROOT * square, p_raw + OF_GRAM * square,
        p_raw + TEMPORARY * square, unscaled, k, K, PRECISION,
    )  # fmt: skip
    congruent_factors(
        p_r, p_raw + OF_GRAM * square, p_raw + TEMPORARY * square, p_raw + OF_NORMS * square, K, PRECISION
    )
    congruent_gradient(
        p_side + OF_A * square, p_side + ROOT * square, p_side + NORMS * square, p_raw + TEMPORARY * square,
        p_side + OF_P * square, K, PRECISION,
    )  # fmt: skip
    at = side * (M * (2 * K))
    apply(
        p_raw + factors_at(steps, SWEEPS, M, N, HERMITIAN, K) + at, p_raw + OF_NORMS * square,
        p_raw + of_factors_at(steps, M, N, HERMITIAN, K) + at, tl.where(side == 1, N, M),
        True, K, ROWS, PRECISION,
    )  # fmt: skip


@triton.jit(noinline=True)
def expand_again(
    p_raw,
    p_scalars,
    back,
    steps,
    side,
    SWEEPS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    k: tl.constexpr,
    HERMITIAN: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The columns before they are made orthonormal, and back to their Gram matrix; that of their scaling."""
    t = steps - 1 - back
    p_row = p_scalars + 4 * t
    square: tl.constexpr = 2 * K * K
    at = side * (M * (2 * K))
    rows = tl.where(side == 1, N, M)
    p_t = p_raw + tall_at(M, N, HERMITIAN, K) + (M if M > N else N) * (2 * K)
    p_end = p_raw + chain_at(M, N, HERMITIAN, K) + SWEEPS * LINK * square
    # in the Hermitian form P serves for Q
    p_q = p_end + square if HERMITIAN else p_end + (2 - side) * square
    scaling = expand(
        p_raw + factors_at(t, SWEEPS, M, N, HERMITIAN, K) + at, p_raw + products_at(K) + at,
        p_raw + tall_at(M, N, HERMITIAN, K), p_t, p_end + (1 + side) * square, p_q, p_end, p_row,
        p_raw + VECTORS * square, p_raw + TEMPORARY * square, rows, side, HERMITIAN, K, ROWS, PRECISION,
    )  # fmt: skip
    project(p_t, p_t, p_raw + GRAM * square, rows, K, CHUNK, PRECISION)
    take_root(p_raw + GRAM * square, p_raw + ROOT * square, scaling, k, K, PRECISION)
    project(
        p_t, p_raw + of_factors_at(t + 1, M, N, HERMITIAN, K) + at, p_raw + OF_ROOT * square, rows,
        K, CHUNK, PRECISION,
    )  # fmt: skip
    return root_gradient(
        p_raw + GRAM * square, p_raw + OF_ROOT * square, p_raw + OF_GRAM * square,
        p_raw + TEMPORARY * square, scaling, k, K, PRECISION,
    )  # fmt: skip


@triton.jit(noinline=True)
def side_gradient(
    p_raw,
    p_scalars,
    p_gscalars,
    b,
    back,
    steps,
    side,
    of_scaling,
    SWEEPS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    HERMITIAN: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of a factor and of its product with H, of P, Q, D and scalars, from that of the factor after a step."""
    t = steps - 1 - back
    p_row = p_scalars + 4 * t
    p_grow = gradient_row(p_gscalars, b, t, steps)
    square: tl.constexpr = 2 * K * K
    longest: tl.constexpr = (M if M > N else N) * (2 * K)
    at = side * (M * (2 * K))
    rows = tl.where(side == 1, N, M)
    p_y = p_raw + tall_at(M, N, HERMITIAN, K)
    p_end = p_raw + chain_at(M, N, HERMITIAN, K) + SWEEPS * LINK * square
    expand_gradient(
        p_y, p_y + longest, p_raw + of_factors_at(t + 1, M, N, HERMITIAN, K) + at, p_raw + ROOT * square,
        p_raw + OF_GRAM * square, p_y + 2 * longest, p_raw + VECTORS * square + K, p_raw + TEMPORARY * square,
        rows, K, ROWS, PRECISION,
    )  # fmt: skip
    p_x = p_raw + factors_at(t, SWEEPS, M, N, HERMITIAN, K) + at
    project(p_x, p_y + 2 * longest, p_raw + OF_C * square, rows, K, CHUNK, PRECISION)
    p_r = p_end + (1 + side) * square
    p_t = p_raw + TEMPORARY * square
    p_ga = p_raw + (OF_P + side) * square
    rotated_core(p_r, p_end, side, p_t, K, PRECISION)
    weights_gradient(
        p_r, p_end, p_row, p_raw + VECTORS * square, p_t, p_raw + OF_C * square, p_ga, p_raw + OF_D * square,
        p_grow, of_scaling, side, HERMITIAN, K,
    )  # fmt: skip
    rotated_core_gradient(p_r, p_end, side, p_t + square, p_ga, p_raw + OF_D * square, K, PRECISION)
    other = 0 if HERMITIAN else 1 - side
    apply_adjoint(
        p_y + 2 * longest, p_raw + OF_C * square, p_raw + of_factors_at(t, M, N, HERMITIAN, K) + at, rows,
        K, ROWS, PRECISION,
    )  # fmt: skip
    p_gt = p_y + 2 * longest
    rotated_gradient(p_y, p_gt, p_raw + VECTORS * square, rows, K, ROWS)
    apply_adjoint(
        p_gt, p_end + (1 + other) * square, p_raw + gradients_at(M, N, HERMITIAN, K) + at, rows,
        K, ROWS, PRECISION,
    )  # fmt: skip
    project(p_raw + products_at(K) + at, p_gt, p_t, rows, K, CHUNK, PRECISION)
    add_to(p_t, p_raw + (OF_P + other) * square, K)


@triton.jit(noinline=True)
def products_gradient(
    p_raw,
    p_gh,
    b,
    back,
    steps,
    CLOSING: tl.constexpr,
    SWEEPS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    HERMITIAN: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of the factors and of H, added, from those of the core and of products with H; the closing has one."""
    t = steps - 1 - back
    p_gx = p_gh + tl.cast(b, tl.int64) * (2 * M * N)
    square: tl.constexpr = 2 * K * K
    left: tl.constexpr = M * (2 * K)
    both: tl.constexpr = not (HERMITIAN or CLOSING)
    p_x = p_raw + unit_at(M, N, HERMITIAN, K)
    p_u = p_raw + factors_at(t, SWEEPS, M, N, HERMITIAN, K)
    p_v = p_u if HERMITIAN else p_u + left
    p_gw = p_raw + gradients_at(M, N, HERMITIAN, K)
    p_gu = p_raw + of_factors_at(t, M, N, HERMITIAN, K)
    p_gv = p_gu if HERMITIAN else p_gu + left
    project_gradient(
        p_u, p_raw + products_at(K), p_raw + OF_CORE * square, p_gu, p_gw, M, not CLOSING, K, ROWS, PRECISION
    )
    back_through(p_x, p_gw, p_gv, M, N, True, K, ROWS, CHUNK, PRECISION)
    if both:
        through(p_x, p_gw + left, p_gu, M, N, True, K, ROWS, CHUNK, PRECISION)
    outer(p_gw, p_v, p_gx, M, N, not CLOSING, K, ROWS, CHUNK, PRECISION)
    if both:
        outer(p_u, p_gw + left, p_gx, M, N, True, K, ROWS, CHUNK, PRECISION)


@triton.jit(noinline=True)
def start_gradient(
    p_raw,
    p_gh,
    p_gu,
    p_gv,
    p_gnorm,
    b,
    count,
    M: tl.constexpr,
    N: tl.constexpr,
    k: tl.constexpr,
    HERMITIAN: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Of the first factors and of H."""
    p_found = p_raw + of_factors_at(0, M, N, HERMITIAN, K)
    of_norm = tl.load(p_gnorm + b)
    b = tl.cast(b, tl.int64)
    unpad(p_found, p_gu + b * (2 * M * k), M, k, ROWS, K)
    if not HERMITIAN:
        unpad(p_found + M * (2 * K), p_gv + b * (2 * N * k), N, k, ROWS, K)
    p_gx = p_gh + b * (2 * M * N)
    p_vectors = p_raw + VECTORS * (2 * K * K) + 5 * K
    first, second = tl.load(p_vectors), tl.load(p_vectors + 1)
    p_x = p_raw + unit_at(M, N, HERMITIAN, K)
    unit_gradient(p_x, p_gx, p_raw, first, second, of_norm, count, 2 * M * N)


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
    count,
    B,
    SWEEPS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    k: tl.constexpr,
    HERMITIAN: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0)
    sides: tl.constexpr = 1 if HERMITIAN else 2
    # not a constant, which would make the functions anew
    unscaled = tl.full((), 1.0, tl.float32)
    p_raw = p_scratch + pid.to(tl.int64) * size
    # the parts find their operands themselves: addresses that this loop had would be kept for all of it
    for b in tl.range(pid, B, tl.num_programs(0), loop_unroll_factor=1):
        start_again(p_h, p_u, p_u if HERMITIAN else p_v, b, count, p_raw, SWEEPS, M, N, k, HERMITIAN, K, ROWS)
        for t in tl.range(0, steps, loop_unroll_factor=1):
            step_again(p_raw, p_scalars, t, SWEEPS, M, N, k, HERMITIAN, K, ROWS, CHUNK, PRECISION)
        # the closing, and back through it
        core_again(p_raw, p_scalars, -1, steps, True, SWEEPS, M, N, k, HERMITIAN, K, ROWS, CHUNK, PRECISION)
        for side in tl.range(0, sides, loop_unroll_factor=1):
            closing_again(p_raw, steps, side, unscaled, SWEEPS, M, N, k, HERMITIAN, K, CHUNK, PRECISION)
        ends_again(p_raw, p_order, b, k, HERMITIAN, K, PRECISION)
        for side in tl.range(0, sides, loop_unroll_factor=1):
            p_g = p_gu
            if not HERMITIAN:  # noqa: SIM102
                if side == 1:
                    p_g = p_gv
            columns_gradient(
                p_raw, steps, side, p_g, b,
                SWEEPS, M, N, k, HERMITIAN, K, ROWS, CHUNK, PRECISION,
            )  # fmt: skip
        spectrum_gradient(p_raw, p_gs, b, k, HERMITIAN, K, PRECISION)
        for side in tl.range(0, sides, loop_unroll_factor=1):
            closing_gradient(p_raw, steps, side, unscaled, SWEEPS, M, N, k, HERMITIAN, K, ROWS, PRECISION)
        diagonalize_gradient(
            p_raw, p_scalars, p_gscalars, b, -1, steps, True, SWEEPS, M, N, k, HERMITIAN, K, PRECISION
        )
        products_gradient(
            p_raw, p_gh_out, b, -1, steps, True, SWEEPS, M, N, HERMITIAN, K, ROWS, CHUNK, PRECISION
        )
        for back in tl.range(0, steps, loop_unroll_factor=1):
            core_again(
                p_raw, p_scalars, back, steps, False, SWEEPS, M, N, k, HERMITIAN, K, ROWS, CHUNK, PRECISION
            )
            for side in tl.range(0, sides, loop_unroll_factor=1):
                of_scaling = expand_again(
                    p_raw, p_scalars, back, steps, side, SWEEPS, M, N, k, HERMITIAN, K, ROWS, CHUNK, PRECISION
                )
                side_gradient(
                    p_raw, p_scalars, p_gscalars, b, back, steps, side, of_scaling,
                    SWEEPS, M, N, HERMITIAN, K, ROWS, CHUNK, PRECISION,
                )  # fmt: skip
            diagonalize_gradient(
                p_raw, p_scalars, p_gscalars, b, back, steps, False, SWEEPS, M, N, k, HERMITIAN, K, PRECISION
            )
            products_gradient(
                p_raw, p_gh_out, b, back, steps, False, SWEEPS, M, N, HERMITIAN, K, ROWS, CHUNK, PRECISION
            )
        start_gradient(
            p_raw, p_gh_out, p_gu_out, p_gu_out if HERMITIAN else p_gv_out, p_gnorm, b, count,
            M, N, k, HERMITIAN, K, ROWS,
        )  # fmt: skip


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
    # so that what lies in it is read in whole vectors
    scratch = (scratch + 15) // 16 * 16
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
    arguments |= {"size": scratch, "steps": steps, "count": 2 * M * N, "B": B}
    constants = {"SWEEPS": sweeps} | constants_of(M, N, k, V is None)
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
