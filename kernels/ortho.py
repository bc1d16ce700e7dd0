"""Orthogonality of factors: a refinement step and Björck's iteration, one program a factor of a sample.

Every kernel is a sequence of products over tiles of 16 columns, whatever the size. What later tiles need of
earlier ones (r x r matrices and, where columns have norms, a matrix of the size of a factor) goes through
scratch that a program uses again for all its samples: 8 KB at 64x32 forward, 40 KB backward, in L1 and L2. A
barrier of the program stands between writing and reading. Memory sees one read of every operand and one write
of every result: a refinement moves 16 M r bytes a factor forward and 24 M r backward.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .complex import adjoint_product_tile, load_tile, modulus, product_tile, store_columns, store_tile
from .launch import Launch, block, precision

# beyond it one program a sample is a poor choice; nothing breaks
LARGEST_ROWS, LARGEST_RANK = 1024, 256
# numbers of a factor up to which one program a sample is faster than eager: benchmarks/results/h100/
FASTER = 64 * 32
# programs that share the samples: enough for every chip; fewer where their scratch would not stay in L2
PROGRAMS = 1024
# multiprocessors and bytes of L2 of an A100, for what is compiled ahead or interpreted
A100 = 108, 40 << 20
THREADS = {"num_warps": 4, "registers": 255}


def limit(r: int, *rows: int) -> list[str]:
    """Why factors `(rows, r)` are not served; empty where they are."""
    found = [f"{n} rows are more than {LARGEST_ROWS}" for n in rows if n > LARGEST_ROWS]
    found += [f"{n} rows are fewer than r = {r}" for n in rows if n < r]
    if not 1 <= r <= LARGEST_RANK:
        found.append(f"r = {r} is not between 1 and {LARGEST_RANK}")
    return found


def refuse_sizes(r: int, *rows: int) -> None:
    """`ValueError` with every reason of `limit`."""
    found = limit(r, *rows)
    if found:
        raise ValueError("the Triton kernels do not serve these factors: " + "; ".join(found))


@functools.lru_cache(maxsize=16)
def _chip(device: torch.device) -> tuple[int, int]:
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, found.L2_cache_size


def chip(x: Tensor) -> tuple[int, int]:
    """Multiprocessors, and bytes of L2."""
    return _chip(x.device) if x.device.type == "cuda" else A100


def programs(x: Tensor, scratch: int, factors: int = 1) -> int:
    """How many share the samples of x, each with `scratch` bytes for every factor.

    At 255 registers a thread two blocks of four warps run at once on a multiprocessor. Where the scratch of
    `PROGRAMS` is more than L2, so many share the samples and use theirs again and again; where that of two a
    multiprocessor is more than L2, one.
    """
    processors, cache = chip(x)
    most = PROGRAMS
    if most * factors * scratch > cache:
        blocks = processors * (2 if 2 * processors * scratch <= cache else 1)
        most = min(most, max(1, blocks // factors))
    return min(x.shape[0], most)


def tiles(r: int, most: int = 64, **rows: int) -> dict[str, Any]:
    """Constants: sizes, and tiles; larger tiles spill registers at four warps, more warps narrow the loads.

    Sizes are constants so that what they make, strides and the offsets of scratch, takes no registers.
    """
    found = {"ROWS": min(block(max(rows.values())), most), "COLUMNS": 16, "CHUNK": 16}
    return {**rows, "r": r, **found, "PRECISION": precision()}


@triton.jit
def gram(
    p_x,
    p_g,
    p_p,
    p_d,
    p_rank,
    shift,
    alpha,
    beta,
    rows,
    r,
    zero,
    WANT_G: tl.constexpr,
    WANT_P: tl.constexpr,
    NORMALIZED: tl.constexpr,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """E = X^H X - shift I to p_g and P = alpha E + beta I to p_p; the lower tiles mirror the upper.

    NORMALIZED stands for X D in place of X, leaves D P in place of P, and column j of both at rank[j].
    """
    for i0 in tl.range(0, r, C, loop_unroll_factor=1):
        for j0 in tl.range(i0, r, C, loop_unroll_factor=1):
            er, ei = adjoint_product_tile(p_x, p_x, rows, r, r, i0, j0, zero, C, C, CHUNK, PRECISION)
            i = i0 + tl.arange(0, C)
            j = j0 + tl.arange(0, C)
            one = tl.where(i[:, None] == j[None, :], 1.0, 0.0)
            if NORMALIZED:
                di = tl.load(p_d + i, mask=i < r, other=0.0)
                dj = tl.load(p_d + j, mask=j < r, other=0.0)
                er = er * (di[:, None] * dj[None, :])
                ei = ei * (di[:, None] * dj[None, :])
            er = er - shift * one
            pr = alpha * er + beta * one
            pi = alpha * ei
            if NORMALIZED:
                ranks = tl.load(p_rank + j, mask=j < r, other=0)
                inside = (i < r)[:, None] & (j < r)[None, :]
                if WANT_G:
                    store_columns(p_g, er, ei, r, i, ranks, inside)
                store_columns(p_p, pr * di[:, None], pi * di[:, None], r, i, ranks, inside)
                if j0 > i0:
                    ranks = tl.load(p_rank + i, mask=i < r, other=0)
                    inside = (j < r)[:, None] & (i < r)[None, :]
                    if WANT_G:
                        store_columns(p_g, tl.trans(er), -tl.trans(ei), r, j, ranks, inside)
                    pr = tl.trans(pr * dj[None, :])
                    store_columns(p_p, pr, -tl.trans(pi * dj[None, :]), r, j, ranks, inside)
            else:
                if WANT_G:
                    store_tile(p_g, er, ei, r, r, i0 + zero, j0, C, C)
                if WANT_P:
                    store_tile(p_p, pr, pi, r, r, i0 + zero, j0, C, C)
                if j0 > i0:
                    if WANT_G:
                        store_tile(p_g, tl.trans(er), -tl.trans(ei), r, r, j0 + zero, i0, C, C)
                    if WANT_P:
                        store_tile(p_p, tl.trans(pr), -tl.trans(pi), r, r, j0 + zero, i0, C, C)
    tl.debug_barrier()


@triton.jit
def add_adjoint(p_c, p_b, scale, share, r, zero, WITH_B: tl.constexpr, C: tl.constexpr):
    """C <- scale (C + C^H) + share B, in place; B Hermitian."""
    for i0 in tl.range(0, r, C, loop_unroll_factor=1):
        for j0 in tl.range(i0, r, C, loop_unroll_factor=1):
            xr, xi = load_tile(p_c, r, r, i0 + zero, j0, C, C)
            yr, yi = load_tile(p_c, r, r, j0 + zero, i0, C, C)
            xr = scale * (xr + tl.trans(yr))
            xi = scale * (xi - tl.trans(yi))
            if WITH_B:
                br, bi = load_tile(p_b, r, r, i0 + zero, j0, C, C)
                xr += share * br
                xi += share * bi
            tl.debug_barrier()
            store_tile(p_c, xr, xi, r, r, i0 + zero, j0, C, C)
            if j0 > i0:
                store_tile(p_c, tl.trans(xr), -tl.trans(xi), r, r, j0 + zero, i0, C, C)
    tl.debug_barrier()


@triton.jit
def multiply(
    p_x,
    p_y,
    p_z,
    rows,
    inner,
    r,
    zero,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Z = X Y; X (rows, inner, 2), Y (inner, r, 2)."""
    for j0 in tl.range(0, r, C, loop_unroll_factor=1):
        for i0 in tl.range(zero, rows, ROWS, loop_unroll_factor=1):
            re = tl.zeros((ROWS, C), tl.float32)
            im = tl.zeros((ROWS, C), tl.float32)
            re, im = product_tile(p_x, p_y, re, im, rows, inner, r, i0, j0, zero, ROWS, C, CHUNK, PRECISION)
            store_tile(p_z, re, im, rows, r, i0, j0, ROWS, C)
    tl.debug_barrier()


@triton.jit
def adjoint_multiply(
    p_x,
    p_y,
    p_z,
    inner,
    rows,
    r,
    zero,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Z = X^H Y; X (inner, rows, 2), Y (inner, r, 2)."""
    for j0 in tl.range(0, r, C, loop_unroll_factor=1):
        for i0 in tl.range(0, rows, ROWS, loop_unroll_factor=1):
            re, im = adjoint_product_tile(p_x, p_y, inner, rows, r, i0, j0, zero, ROWS, C, CHUNK, PRECISION)
            store_tile(p_z, re, im, rows, r, i0 + zero, j0, ROWS, C)
    tl.debug_barrier()


@triton.jit
def multiply_two(
    p_x,
    p_y,
    p_w,
    p_v,
    p_z,
    rows,
    r,
    zero,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Z = X Y + W V; X and W (rows, r, 2), Y and V (r, r, 2)."""
    for j0 in tl.range(0, r, C, loop_unroll_factor=1):
        for i0 in tl.range(zero, rows, ROWS, loop_unroll_factor=1):
            re = tl.zeros((ROWS, C), tl.float32)
            im = tl.zeros((ROWS, C), tl.float32)
            re, im = product_tile(p_x, p_y, re, im, rows, r, r, i0, j0, zero, ROWS, C, CHUNK, PRECISION)
            re, im = product_tile(p_w, p_v, re, im, rows, r, r, i0, j0, zero, ROWS, C, CHUNK, PRECISION)
            store_tile(p_z, re, im, rows, r, i0, j0, ROWS, C)
    tl.debug_barrier()


@triton.jit
def copy_scaled(p_x, p_y, scale, rows, r, zero, ROWS: tl.constexpr, C: tl.constexpr):
    """Y = scale X."""
    for j0 in tl.range(0, r, C, loop_unroll_factor=1):
        for i0 in tl.range(zero, rows, ROWS, loop_unroll_factor=1):
            re, im = load_tile(p_x, rows, r, i0, j0, ROWS, C)
            store_tile(p_y, re * scale, im * scale, rows, r, i0, j0, ROWS, C)
    tl.debug_barrier()


@triton.jit
def refined_columns(
    p_x,
    p_p,
    p_y,
    p_norm,
    rows,
    r,
    zero,
    WANT_NORM: tl.constexpr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Y = X P, columns divided by (norm + 1e-8); the norms too where wanted."""
    for j0 in tl.range(0, r, C, loop_unroll_factor=1):
        squares = tl.zeros((C,), tl.float32)
        for i0 in tl.range(zero, rows, ROWS, loop_unroll_factor=1):
            wr = tl.zeros((ROWS, C), tl.float32)
            wi = tl.zeros((ROWS, C), tl.float32)
            wr, wi = product_tile(p_x, p_p, wr, wi, rows, r, r, i0, j0, zero, ROWS, C, CHUNK, PRECISION)
            squares += tl.sum(wr * wr + wi * wi, 0)
            store_tile(p_y, wr, wi, rows, r, i0, j0, ROWS, C)
        norm = tl.sqrt(squares)
        scale = 1.0 / (norm + 1e-8)
        if WANT_NORM:
            j = j0 + tl.arange(0, C)
            tl.store(p_norm + j, norm, mask=j < r)
        tl.debug_barrier()
        for i0 in tl.range(zero, rows, ROWS, loop_unroll_factor=1):
            wr, wi = load_tile(p_y, rows, r, i0, j0, ROWS, C)
            tl.debug_barrier()
            store_tile(p_y, wr * scale[None, :], wi * scale[None, :], rows, r, i0, j0, ROWS, C)
    tl.debug_barrier()


@triton.jit
def refine_core(
    p_x,
    p_gw,
    p_e,
    p_c,
    p_d,
    p_order,
    a,
    rows,
    r,
    zero,
    NORMALIZED: tl.constexpr,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """K = -a (C + C^H) of C = X^H gW, to p_c; returns the gradient of a, -Re sum conj(C) E.

    NORMALIZED stands for X D in place of X and leaves D K D; columns of gW and E come in the sorted order.
    """
    ga = 0.0
    for i0 in tl.range(0, r, C, loop_unroll_factor=1):
        for j0 in tl.range(0, r, C, loop_unroll_factor=1):
            cr, ci = adjoint_product_tile(p_x, p_gw, rows, r, r, i0, j0, zero, C, C, CHUNK, PRECISION)
            er, ei = load_tile(p_e, r, r, i0 + zero, j0, C, C)
            if NORMALIZED:
                i = i0 + tl.arange(0, C)
                j = j0 + tl.arange(0, C)
                di = tl.load(p_d + i, mask=i < r, other=0.0)[:, None]
                ga -= tl.sum(tl.sum((cr * er + ci * ei) * di, 1), 0)
                order = tl.load(p_order + j, mask=j < r, other=0)
                dj = tl.load(p_d + order, mask=j < r, other=0.0)[None, :]
                inside = (i < r)[:, None] & (j < r)[None, :]
                # X D K D takes D C D of C = D X^H gW
                di = di * di * dj
                store_columns(p_c, cr * di, ci * di, r, i, order, inside)
            else:
                ga -= tl.sum(tl.sum(cr * er + ci * ei, 1), 0)
                store_tile(p_c, cr, ci, r, r, i0 + zero, j0, C, C)
    tl.debug_barrier()
    add_adjoint(p_c, p_c, -a, 0.0, r, zero, False, C)
    return ga


@triton.jit
def reciprocal_where(x):
    """1 / x, and 0 where x is 0: no gradient flows along the norm of a zero column."""
    return tl.where(x == 0.0, 0.0, 1.0 / tl.where(x == 0.0, 1.0, x))


@triton.jit
def ortho_refine_fwd_kernel(
    p_u,
    p_v,
    p_steps,
    p_u_out,
    p_v_out,
    p_p,
    B,
    M: tl.constexpr,
    N: tl.constexpr,
    r: tl.constexpr,
    FACTORS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    factor = tl.program_id(1)
    p_p += (pid * FACTORS + factor) * (r * r * 2)
    rows = M
    a = tl.load(p_steps).to(tl.float32)
    if FACTORS == 2:  # noqa: SIM102
        if factor == 1:
            p_u = p_v
            p_u_out = p_v_out
            rows = N
            a = tl.load(p_steps + 1).to(tl.float32)
    for b in tl.range(pid, B, tl.num_programs(0), loop_unroll_factor=1):
        zero = tl.cast(b, tl.int32) // B
        p_x = p_u + b * (rows * r * 2)
        p_y = p_u_out + b * (rows * r * 2)
        gram(
            p_x,
            p_p,
            p_p,
            p_p,
            p_p,
            1.0,
            -a,
            1.0,
            rows,
            r,
            zero,
            False,
            True,
            False,
            COLUMNS,
            CHUNK,
            PRECISION,
        )
        refined_columns(p_x, p_p, p_y, p_y, rows, r, zero, False, ROWS, COLUMNS, CHUNK, PRECISION)


@triton.jit
def ortho_refine_bwd_kernel(
    p_gu,
    p_gv,
    p_u,
    p_v,
    p_steps,
    p_gu_out,
    p_gv_out,
    p_gsteps,
    p_gw,
    p_p,
    p_e,
    p_c,
    B,
    M: tl.constexpr,
    N: tl.constexpr,
    r: tl.constexpr,
    FACTORS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    factor = tl.program_id(1)
    slot = pid * FACTORS + factor
    p_p += slot * (r * r * 2)
    p_e += slot * (r * r * 2)
    p_c += slot * (r * r * 2)
    rows = M
    a = tl.load(p_steps).to(tl.float32)
    if FACTORS == 2:
        p_gw += slot * (tl.maximum(M, N) * r * 2)
        if factor == 1:
            p_u = p_v
            p_gu = p_gv
            p_gu_out = p_gv_out
            rows = N
            a = tl.load(p_steps + 1).to(tl.float32)
    else:
        p_gw += slot * (M * r * 2)
    for b in tl.range(pid, B, tl.num_programs(0), loop_unroll_factor=1):
        zero = tl.cast(b, tl.int32) // B
        p_x = p_u + b * (rows * r * 2)
        p_g = p_gu + b * (rows * r * 2)
        gram(
            p_x, p_e, p_p, p_p, p_p, 1.0, -a, 1.0, rows, r, zero, True, True, False, COLUMNS, CHUNK, PRECISION
        )
        for j0 in tl.range(0, r, COLUMNS, loop_unroll_factor=1):
            squares = tl.zeros((COLUMNS,), tl.float32)
            along = tl.zeros((COLUMNS,), tl.float32)
            for i0 in tl.range(zero, rows, ROWS, loop_unroll_factor=1):
                wr = tl.zeros((ROWS, COLUMNS), tl.float32)
                wi = tl.zeros((ROWS, COLUMNS), tl.float32)
                wr, wi = product_tile(
                    p_x, p_p, wr, wi, rows, r, r, i0, j0, zero, ROWS, COLUMNS, CHUNK, PRECISION
                )
                gr, gi = load_tile(p_g, rows, r, i0, j0, ROWS, COLUMNS)
                squares += tl.sum(wr * wr + wi * wi, 0)
                along += tl.sum(wr * gr + wi * gi, 0)
                store_tile(p_gw, wr, wi, rows, r, i0, j0, ROWS, COLUMNS)
            norm = tl.sqrt(squares)
            scale = 1.0 / (norm + 1e-8)
            along = along * scale * scale * reciprocal_where(norm)
            tl.debug_barrier()
            for i0 in tl.range(zero, rows, ROWS, loop_unroll_factor=1):
                wr, wi = load_tile(p_gw, rows, r, i0, j0, ROWS, COLUMNS)
                gr, gi = load_tile(p_g, rows, r, i0, j0, ROWS, COLUMNS)
                gr = gr * scale[None, :] - wr * along[None, :]
                gi = gi * scale[None, :] - wi * along[None, :]
                tl.debug_barrier()
                store_tile(p_gw, gr, gi, rows, r, i0, j0, ROWS, COLUMNS)
        tl.debug_barrier()
        ga = refine_core(p_x, p_gw, p_e, p_c, p_p, p_p, a, rows, r, zero, False, COLUMNS, CHUNK, PRECISION)
        p_y = p_gu_out + b * (rows * r * 2)
        multiply_two(p_gw, p_p, p_x, p_c, p_y, rows, r, zero, ROWS, COLUMNS, CHUNK, PRECISION)
        tl.store(p_gsteps + b * FACTORS + factor, ga)


@triton.jit
def bjorck_scale(
    p_x,
    p_g,
    p_sums,
    rows,
    r,
    zero,
    ORDER: tl.constexpr,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """G = X^H X and the row sums of |G| to scratch; min(1, c / sqrt(largest)), the largest, and c^2."""
    bound = 2.56 if ORDER == 1 else 2.25
    gram(p_x, p_g, p_g, p_g, p_g, 0.0, 0.0, 0.0, rows, r, zero, True, False, False, C, CHUNK, PRECISION)
    largest = 0.0
    for i0 in tl.range(0, r, C, loop_unroll_factor=1):
        sums = tl.zeros((C,), tl.float32)
        for j0 in tl.range(0, r, C, loop_unroll_factor=1):
            gr, gi = load_tile(p_g, r, r, i0 + zero, j0, C, C)
            sums += tl.sum(modulus(gr, gi), 1)
        i = i0 + tl.arange(0, C)
        tl.store(p_sums + i, sums, mask=i < r)
        # a maximum may pass NaN by
        nan = tl.sum(tl.where(sums != sums, 1, 0), 0)
        largest = tl.where(
            nan > 0, float("nan"), tl.maximum(largest, tl.max(sums, 0), propagate_nan=tl.PropagateNan.ALL)
        )
    tl.debug_barrier()
    scale = tl.where(largest < bound, 1.0, tl.sqrt(bound / largest))
    return scale, largest, bound


@triton.jit
def bjorck_matrix(
    p_x,
    p_g,
    p_p,
    rows,
    r,
    zero,
    ORDER: tl.constexpr,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The polynomial in G = X^H X that X is multiplied by, to p_p; G to p_g for order 2."""
    if ORDER == 1:
        gram(p_x, p_g, p_p, p_p, p_p, 0.0, -0.5, 1.5, rows, r, zero, False, True, False, C, CHUNK, PRECISION)
    else:
        gram(p_x, p_g, p_p, p_p, p_p, 0.0, 0.0, 0.0, rows, r, zero, True, False, False, C, CHUNK, PRECISION)
        for i0 in tl.range(0, r, C, loop_unroll_factor=1):
            for j0 in tl.range(0, r, C, loop_unroll_factor=1):
                i = i0 + tl.arange(0, C)[:, None]
                j = j0 + tl.arange(0, C)[None, :]
                re, im = load_tile(p_g, r, r, i0 + zero, j0, C, C)
                re = re * (-1.25 / 0.375) + tl.where(i == j, 1.875 / 0.375, 0.0)
                im = im * (-1.25 / 0.375)
                re, im = product_tile(p_g, p_g, re, im, r, r, r, i0 + zero, j0, zero, C, C, CHUNK, PRECISION)
                store_tile(p_p, re * 0.375, im * 0.375, r, r, i0 + zero, j0, C, C)
        tl.debug_barrier()


@triton.jit
def bjorck_fwd_kernel(
    p_u,
    p_out,
    p_other,
    p_g,
    p_p,
    p_sums,
    steps,
    B,
    M: tl.constexpr,
    r: tl.constexpr,
    ORDER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    p_other += pid * (M * r * 2)
    p_g += pid * (r * r * 2)
    p_p += pid * (r * r * 2)
    p_sums += pid * r
    for b in tl.range(pid, B, tl.num_programs(0), loop_unroll_factor=1):
        zero = tl.cast(b, tl.int32) // B
        p_x = p_u + b * (M * r * 2)
        # two places in turn, so that the last iterate lands in the output
        p_now = p_out + b * (M * r * 2)
        p_next = p_other
        if steps % 2 == 1:
            p_next = p_now
            p_now = p_other
        scale, _, _ = bjorck_scale(p_x, p_g, p_sums, M, r, zero, ORDER, COLUMNS, CHUNK, PRECISION)
        copy_scaled(p_x, p_now, scale, M, r, zero, ROWS, COLUMNS)
        for _ in tl.range(0, steps, loop_unroll_factor=1):
            bjorck_matrix(p_now, p_g, p_p, M, r, zero, ORDER, COLUMNS, CHUNK, PRECISION)
            multiply(p_now, p_p, p_next, M, r, r, zero, ROWS, COLUMNS, CHUNK, PRECISION)
            p_now, p_next = p_next, p_now


@triton.jit
def bjorck_bwd_kernel(
    p_g,
    p_u,
    p_out,
    p_other,
    p_iterates,
    p_scratch,
    p_sums,
    steps,
    B,
    M: tl.constexpr,
    r: tl.constexpr,
    ORDER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    size = M * r * 2
    p_other += pid * size
    p_iterates += pid * steps * size
    # G of the input; for each step G, P, C and, for order 2, the product of C + C^H with G
    p_gram = p_scratch + pid * 5 * (r * r * 2)
    p_q = p_gram + r * r * 2
    p_p = p_q + r * r * 2
    p_c = p_p + r * r * 2
    p_z = p_c + r * r * 2
    p_sums += pid * r
    for b in tl.range(pid, B, tl.num_programs(0), loop_unroll_factor=1):
        zero = tl.cast(b, tl.int32) // B
        p_x = p_u + b * size
        scale, largest, bound = bjorck_scale(
            p_x, p_gram, p_sums, M, r, zero, ORDER, COLUMNS, CHUNK, PRECISION
        )
        if steps > 0:
            copy_scaled(p_x, p_iterates, scale, M, r, zero, ROWS, COLUMNS)
        p_now = p_g + b * size
        p_next = p_other
        p_spare = p_out + b * size
        # iterates forward to the last but one, then gradients back through all of them
        for t in tl.range(0, 2 * steps - 1, loop_unroll_factor=1):
            if ORDER == 2:
                zero = tl.cast(b, tl.int32) // (B + t)
            k = tl.minimum(t, 2 * steps - 2 - t)
            p_k = p_iterates + k * size
            bjorck_matrix(p_k, p_q, p_p, M, r, zero, ORDER, COLUMNS, CHUNK, PRECISION)
            if t < steps - 1:
                multiply(p_k, p_p, p_k + size, M, r, r, zero, ROWS, COLUMNS, CHUNK, PRECISION)
            else:
                p_step = p_c
                adjoint_multiply(p_k, p_now, p_c, M, r, r, zero, COLUMNS, COLUMNS, CHUNK, PRECISION)
                if ORDER == 1:
                    add_adjoint(p_c, p_c, -0.5, 0.0, r, zero, False, COLUMNS)
                else:
                    # with K = C + C^H the step hands on g P + U (c1 K + c2 (K G + G K))
                    add_adjoint(p_c, p_c, 1.0, 0.0, r, zero, False, COLUMNS)
                    multiply(p_c, p_q, p_z, r, r, r, zero, COLUMNS, COLUMNS, CHUNK, PRECISION)
                    add_adjoint(p_z, p_c, 0.375, -1.25, r, zero, True, COLUMNS)
                    p_step = p_z
                multiply_two(p_now, p_p, p_k, p_step, p_next, M, r, zero, ROWS, COLUMNS, CHUNK, PRECISION)
                p_now = p_next
                p_next = p_spare
                p_spare = p_now
        zero = tl.cast(b, tl.int32) // (B + steps)
        # the scaling: shared by all entries, moved by the rows whose sums are the largest
        along = 0.0
        for j0 in tl.range(0, r, COLUMNS, loop_unroll_factor=1):
            for i0 in tl.range(zero, M, ROWS, loop_unroll_factor=1):
                gr, gi = load_tile(p_now, M, r, i0, j0, ROWS, COLUMNS)
                xr, xi = load_tile(p_x, M, r, i0, j0, ROWS, COLUMNS)
                along += tl.sum(tl.sum(gr * xr + gi * xi, 1), 0)
        ties = 0.0
        for i0 in tl.range(0, r, COLUMNS, loop_unroll_factor=1):
            i = i0 + tl.arange(0, COLUMNS)
            sums = tl.load(p_sums + i, mask=i < r, other=-1.0)
            ties += tl.sum(tl.where(sums == largest, 1.0, 0.0), 0)
        weight = tl.where(largest < bound, 0.0, -0.5 * along * scale / (largest * ties))
        for i0 in tl.range(0, r, COLUMNS, loop_unroll_factor=1):
            for j0 in tl.range(0, r, COLUMNS, loop_unroll_factor=1):
                i = i0 + tl.arange(0, COLUMNS)
                j = j0 + tl.arange(0, COLUMNS)
                wi = tl.where(tl.load(p_sums + i, mask=i < r, other=-1.0) == largest, weight, 0.0)
                wj = tl.where(tl.load(p_sums + j, mask=j < r, other=-1.0) == largest, weight, 0.0)
                gr, gi = load_tile(p_gram, r, r, i0 + zero, j0, COLUMNS, COLUMNS)
                share = (wi[:, None] + wj[None, :]) * reciprocal_where(modulus(gr, gi))
                store_tile(p_c, gr * share, gi * share, r, r, i0 + zero, j0, COLUMNS, COLUMNS)
        tl.debug_barrier()
        p_y = p_out + b * size
        for j0 in tl.range(0, r, COLUMNS, loop_unroll_factor=1):
            for i0 in tl.range(zero, M, ROWS, loop_unroll_factor=1):
                gr, gi = load_tile(p_now, M, r, i0, j0, ROWS, COLUMNS)
                gr, gi = product_tile(
                    p_x, p_c, gr * scale, gi * scale, M, r, r, i0, j0, zero, ROWS, COLUMNS, CHUNK, PRECISION
                )
                # where the gradient stands in the output already
                tl.debug_barrier()
                store_tile(p_y, gr, gi, M, r, i0, j0, ROWS, COLUMNS)
        tl.debug_barrier()


def ortho_refine_launch(U: Tensor, V: Tensor | None, steps: Tensor) -> tuple[Launch, tuple[Tensor, Tensor]]:
    """The launch of `ortho_refine`, and its outputs."""
    B, M, r = U.shape[:3]
    N = M if V is None else V.shape[1]
    refuse_sizes(r, M, N)
    factors = 1 if V is None else 2
    count = programs(U, 8 * r * r, factors)
    outputs = torch.empty_like(U), U.new_empty((0,)) if V is None else torch.empty_like(V)
    arguments = {"p_u": U, "p_v": V, "p_steps": steps, "p_u_out": outputs[0], "p_v_out": outputs[1]}
    arguments |= {"p_p": U.new_empty((count, factors, r, r, 2)), "B": B}
    constants = tiles(r, M=M, N=N) | {"FACTORS": factors}
    return Launch(ortho_refine_fwd_kernel, (count, factors), arguments, constants, **THREADS), outputs


def ortho_refine(U: Tensor, V: Tensor | None, steps: Tensor) -> tuple[Tensor, Tensor]:
    """`U (I - a (U^H U - I))`, columns divided by (norm + 1e-8), and the same of V with its own step.

    U `(B, M, r, 2)` and V `(B, N, r, 2)` or None, contiguous float32; steps float64 `(1,)` or `(2,)` on their
    device. One launch. Returns both, `(0,)` in place of V where it is None. `ValueError` beyond `limit`.
    """
    launch, outputs = ortho_refine_launch(U, V, steps)
    launch.run()
    return outputs


def ortho_refine_backward_launch(
    gU: Tensor, gV: Tensor | None, U: Tensor, V: Tensor | None, steps: Tensor
) -> tuple[Launch, tuple[Tensor, Tensor, Tensor]]:
    """The launch of `ortho_refine_backward`: gradients of U, of V, and of the steps sample by sample."""
    B, M, r = U.shape[:3]
    N = M if V is None else V.shape[1]
    refuse_sizes(r, M, N)
    factors = 1 if V is None else 2
    count = programs(U, 8 * (3 * r * r + max(M, N) * r), factors)
    gU_out, gV_out = torch.empty_like(U), U.new_empty((0,)) if V is None else torch.empty_like(V)
    gsteps = U.new_empty((B, factors))
    arguments = {"p_gu": gU, "p_gv": gV, "p_u": U, "p_v": V, "p_steps": steps}
    arguments |= {"p_gu_out": gU_out, "p_gv_out": gV_out, "p_gsteps": gsteps}
    arguments["p_gw"] = U.new_empty((count, factors, max(M, N), r, 2))
    arguments |= {name: U.new_empty((count, factors, r, r, 2)) for name in ("p_p", "p_e", "p_c")}
    arguments["B"] = B
    constants = tiles(r, M=M, N=N) | {"FACTORS": factors}
    launch = Launch(ortho_refine_bwd_kernel, (count, factors), arguments, constants, **THREADS)
    return launch, (gU_out, gV_out, gsteps)


def ortho_refine_backward(
    gU: Tensor, gV: Tensor | None, U: Tensor, V: Tensor | None, steps: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of U, V and steps of `ortho_refine`, in one launch; all is computed again from U and V.

    With E = U^H U - I, P = I - a E and gW what the normalisation of the columns hands on to U P:
    `C = U^H gW`, `gU = gW P - a U (C + C^H)`, `ga = -Re sum conj(C) E`.
    """
    launch, (gU_out, gV_out, gsteps) = ortho_refine_backward_launch(gU, gV, U, V, steps)
    launch.run()
    return gU_out, gV_out, gsteps.sum(0, dtype=torch.float64)


def bjorck_launch(U: Tensor, steps: int, order: int) -> tuple[Launch, Tensor]:
    """The launch of `bjorck`, and its output."""
    B, M, r = U.shape[:3]
    refuse_sizes(r, M)
    count, out = programs(U, 8 * (M * r + 2 * r * r) + 4 * r), torch.empty_like(U)
    arguments = {"p_u": U, "p_out": out, "p_other": U.new_empty((count, M, r, 2))}
    arguments |= {name: U.new_empty((count, r, r, 2)) for name in ("p_g", "p_p")}
    arguments |= {"p_sums": U.new_empty((count, r)), "steps": steps, "B": B}
    constants = tiles(r, most=64 if order == 1 else 32, M=M) | {"ORDER": order}
    return Launch(bjorck_fwd_kernel, (count,), arguments, constants, **THREADS), out


def bjorck(U: Tensor, steps: int, order: int) -> Tensor:
    """Björck's iteration after the safe scaling, as `reference.bjorck`: any number of steps in one launch.

    U `(B, M, r, 2)` contiguous float32, steps at least 0, order 1 or 2. `ValueError` beyond `limit`.
    """
    launch, out = bjorck_launch(U, steps, order)
    launch.run()
    return out


def bjorck_backward_launch(g: Tensor, U: Tensor, steps: int, order: int) -> tuple[Launch, Tensor]:
    """The launch of `bjorck_backward`, and its output."""
    B, M, r = U.shape[:3]
    refuse_sizes(r, M)
    count, out = programs(U, 8 * ((steps + 1) * M * r + 5 * r * r) + 4 * r), torch.empty_like(U)
    arguments = {"p_g": g, "p_u": U, "p_out": out, "p_other": U.new_empty((count, M, r, 2))}
    arguments["p_iterates"] = U.new_empty((count, steps, M, r, 2))
    arguments["p_scratch"] = U.new_empty((count, 5, r, r, 2))
    arguments |= {"p_sums": U.new_empty((count, r)), "steps": steps, "B": B}
    constants = tiles(r, most=32, M=M) | {"ORDER": order}
    return Launch(bjorck_bwd_kernel, (count,), arguments, constants, **THREADS), out


def bjorck_backward(g: Tensor, U: Tensor, steps: int, order: int) -> Tensor:
    """Gradient of U of `bjorck`, in one launch; the iterates are computed again and kept in scratch.

    A step `U P(G)`, `G = U^H U`, hands on `g P + U K`: with `C = U^H g`, `K = c1 (C + C^H)` for order 1, and
    `c1 K1 + c2 (K1 G + G K1)`, `K1 = C + C^H`, for order 2. The scaling as autograd has it, ties
    shared evenly.
    """
    launch, out = bjorck_backward_launch(g, U, steps, order)
    launch.run()
    return out
