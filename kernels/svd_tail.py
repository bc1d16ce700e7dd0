"""The tail of the network fused: normalised columns, their order, refined factors, calibrated spectrum.

One program a sample; factors of more than 64x32 numbers go by tiles instead, see `tail_tiles`. Columns are
sorted where it is cheap: the r x r matrix P that refines a factor takes up the norms (D P) and the order
(columns of P), so that `U_raw (D P)` has sorted columns and no factor is permuted. Scratch as in `ortho`;
memory sees one read of every operand and one write of every result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tail_tiles
from .complex import adjoint_product_tile, load_tile, modulus, product_adjoint_tile, product_tile, store_tile
from .launch import Launch
from .ortho import (
    FASTER,
    THREADS,
    gram,
    programs,
    reciprocal_where,
    refine_core,
    refined_columns,
    refuse_sizes,
    tiles,
)
from .spectral import measured_columns, places, weight_of, weighted_outer


@triton.jit
def sort_columns(p_s, p_rank, p_order, r, zero, C: tl.constexpr):
    """Place of every column by falling S, stable, NaN first, and the column of every place."""
    for j0 in tl.range(zero * C, r, C, loop_unroll_factor=1):
        j = j0 + tl.arange(0, C)
        rank = places(p_s, j, r, zero, C)
        tl.store(p_rank + j, rank, mask=j < r)
        tl.store(p_order + rank, j, mask=j < r)
    tl.debug_barrier()


@triton.jit
def column_norms(p_x, p_norm, p_d, rows, r, zero, ROWS: tl.constexpr, C: tl.constexpr):
    """Norms of the columns, and 1 / (norm + 1e-8)."""
    for j0 in tl.range(zero * C, r, C, loop_unroll_factor=1):
        squares = tl.zeros((C,), tl.float32)
        for i0 in tl.range(zero, rows, ROWS, loop_unroll_factor=1):
            xr, xi = load_tile(p_x, rows, r, i0, j0, ROWS, C)
            squares += tl.sum(xr * xr + xi * xi, 0)
        norm = tl.sqrt(squares)
        j = j0 + tl.arange(0, C)
        tl.store(p_norm + j, norm, mask=j < r)
        tl.store(p_d + j, 1.0 / (norm + 1e-8), mask=j < r)
    tl.debug_barrier()


@triton.jit
def svd_tail_fwd_kernel(
    p_u,
    p_v,
    p_s,
    p_h,
    p_scalars,
    p_u_out,
    p_s_out,
    p_v_out,
    p_p,
    p_norms,
    p_places,
    B,
    M: tl.constexpr,
    N: tl.constexpr,
    r: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    p_p += pid * (r * r * 2)
    p_norms += pid * (r * 2)
    p_places += pid * (r * 2)
    p_order = p_places + r
    tau = tl.load(p_scalars + 2).to(tl.float32)
    for b in tl.range(pid, B, tl.num_programs(0), loop_unroll_factor=1):
        zero = tl.cast(b, tl.int32) // B
        sort_columns(p_s + b * r, p_places, p_order, r, zero, COLUMNS)
        for factor in tl.range(0, 2, loop_unroll_factor=1):
            zero = tl.cast(b, tl.int32) // (B + factor)
            a = tl.load(p_scalars + factor).to(tl.float32)
            rows = M
            p_x = p_u + b * (M * r * 2)
            p_y = p_u_out + b * (M * r * 2)
            if factor == 1:
                rows = N
                p_x = p_v + b * (N * r * 2)
                p_y = p_v_out + b * (N * r * 2)
            column_norms(p_x, p_norms, p_norms + r, rows, r, zero, ROWS, COLUMNS)
            gram(
                p_x,
                p_p,
                p_p,
                p_norms + r,
                p_places,
                1.0,
                -a,
                1.0,
                rows,
                r,
                zero,
                False,
                True,
                True,
                COLUMNS,
                CHUNK,
                PRECISION,
            )
            refined_columns(p_x, p_p, p_y, p_y, rows, r, zero, False, ROWS, COLUMNS, CHUNK, PRECISION)
        for j0 in tl.range(zero * COLUMNS, r, COLUMNS, loop_unroll_factor=1):
            dr, di = measured_columns(
                p_u_out + b * (M * r * 2),
                p_h + b * (M * N * 2),
                p_v_out + b * (N * r * 2),
                p_p,
                M,
                N,
                r,
                j0,
                zero,
                False,
                ROWS,
                COLUMNS,
                CHUNK,
                PRECISION,
            )
            j = j0 + tl.arange(0, COLUMNS)
            s = tl.load(p_s + b * r + tl.load(p_order + j, mask=j < r, other=0), mask=j < r, other=0.0)
            tl.store(p_s_out + b * r + j, (1.0 - tau) * s + tau * modulus(dr, di) + 1e-6, mask=j < r)
        tl.debug_barrier()


@triton.jit
def weight_of_columns(p_q, p_share, j0, r, C: tl.constexpr):
    """Columns from j0 on of what the calibration left: the weight q, and its share along a column."""
    j = j0 + tl.arange(0, C)
    qr = tl.load(p_q + 2 * j, mask=j < r, other=0.0)[None, :]
    qi = tl.load(p_q + 2 * j + 1, mask=j < r, other=0.0)[None, :]
    return qr, qi, tl.load(p_share + j, mask=j < r, other=0.0)


@triton.jit
def scale_and_share(p_x, p_g, p_norm, along, rows, r, j0, zero, ROWS: tl.constexpr, C: tl.constexpr):
    """Factors of g and of x in the gradient before columns x were divided by (norm + 1e-8), g that after."""
    for i0 in tl.range(zero, rows, ROWS, loop_unroll_factor=1):
        xr, xi = load_tile(p_x, rows, r, i0, j0, ROWS, C)
        gr, gi = load_tile(p_g, rows, r, i0, j0, ROWS, C)
        along += tl.sum(xr * gr + xi * gi, 0)
    j = j0 + tl.arange(0, C)
    norm = tl.load(p_norm + j, mask=j < r, other=0.0)
    return (1.0 / (norm + 1e-8))[None, :], (along * reciprocal_where(norm))[None, :]


@triton.jit
def svd_tail_bwd_kernel(
    p_gu,
    p_gs,
    p_gv,
    p_u,
    p_v,
    p_s,
    p_h,
    p_scalars,
    p_gu_out,
    p_gv_out,
    p_gs_out,
    p_gh_out,
    p_gscalars,
    p_scratch,
    p_places,
    B,
    M: tl.constexpr,
    N: tl.constexpr,
    r: tl.constexpr,
    SCRATCH: tl.constexpr,
    GH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    square: tl.constexpr = r * r * 2
    # registers run out: what would be kept over the samples is made anew for each
    ANEW: tl.constexpr = r > 32
    tau = 0.0
    if not ANEW:
        tau = tl.load(p_scalars + 2).to(tl.float32)
    p_places += pid * (r * 2)
    p_order = p_places + r
    for b in tl.range(pid, B, tl.num_programs(0), loop_unroll_factor=1):
        zero = tl.cast(b, tl.int32) // B
        # one pointer for all scratch: what lies at constant distances takes no registers
        p_p = p_scratch + pid * SCRATCH
        if ANEW:
            p_p = p_scratch + (pid + zero) * SCRATCH
        p_e = p_p + 2 * square
        p_c = p_e + 2 * square
        p_gw = p_c + square
        p_gw_v = p_gw + M * r * 2
        # for each factor: norms of the raw columns, their reciprocals, norms of the refined columns
        p_norms = p_gw_v + N * r * 2
        p_q = p_norms + r * 6
        p_share = p_q + r * 2
        # refined factors stand where their gradients will
        p_x = p_gu_out + b * (M * r * 2)
        p_y = p_gv_out + b * (N * r * 2)
        p_a = p_h + b * (M * N * 2)
        sort_columns(p_s + b * r, p_places, p_order, r, zero, COLUMNS)
        for factor in tl.range(0, 2, loop_unroll_factor=1):
            zero = tl.cast(b, tl.int32) // (B + factor)
            a = tl.load(p_scalars + factor).to(tl.float32)
            rows = M
            p_raw = p_u + b * (M * r * 2)
            p_refined = p_x
            if factor == 1:
                rows = N
                p_raw = p_v + b * (N * r * 2)
                p_refined = p_y
            p_n = p_norms + factor * 3 * r
            p_pf = p_p + factor * square
            column_norms(p_raw, p_n, p_n + r, rows, r, zero, ROWS, COLUMNS)
            gram(
                p_raw,
                p_e + factor * square,
                p_pf,
                p_n + r,
                p_places,
                1.0,
                -a,
                1.0,
                rows,
                r,
                zero,
                True,
                True,
                True,
                COLUMNS,
                CHUNK,
                PRECISION,
            )
            refined_columns(
                p_raw, p_pf, p_refined, p_n + 2 * r, rows, r, zero, True, ROWS, COLUMNS, CHUNK, PRECISION
            )
        zero = tl.cast(b, tl.int32) // (B + 2)
        gtau = 0.0
        for j0 in tl.range(0 if ANEW else zero * COLUMNS, r, COLUMNS, loop_unroll_factor=1):
            dr, di = measured_columns(
                p_x, p_a, p_y, p_gw, M, N, r, j0, zero, True, ROWS, COLUMNS, CHUNK, PRECISION
            )
            if ANEW:
                tau = tl.load(p_scalars + 2).to(tl.float32)
            j = j0 + tl.arange(0, COLUMNS)
            g = tl.load(p_gs + b * r + j, mask=j < r, other=0.0)
            order = tl.load(p_order + j, mask=j < r, other=0)
            s = tl.load(p_s + b * r + order, mask=j < r, other=0.0)
            size = modulus(dr, di)
            gtau += tl.sum(g * (size - s), 0)
            tl.store(p_gs_out + b * r + order, (1.0 - tau) * g, mask=j < r)
            qr, qi = weight_of(dr, di, size, g, tau)
            tl.store(p_q + 2 * j, qr, mask=j < r)
            tl.store(p_q + 2 * j + 1, qi, mask=j < r)
            # what the calibration hands on has the same share along u as along v
            tl.store(p_share + j, qr * dr + qi * di, mask=j < r)
        tl.store(p_gscalars + b * 3 + 2, gtau)
        tl.debug_barrier()
        # through the normalisation of the refined columns, a factor at a time: both at once spill registers
        zero = tl.cast(b, tl.int32) // (B + 3)
        for j0 in tl.range(zero * COLUMNS, r, COLUMNS, loop_unroll_factor=1):
            qr, qi, along = weight_of_columns(p_q, p_share, j0, r, COLUMNS)
            p_g = p_gu + b * (M * r * 2)
            scale, along = scale_and_share(p_x, p_g, p_norms + 2 * r, along, M, r, j0, zero, ROWS, COLUMNS)
            for i0 in tl.range(zero, M, ROWS, loop_unroll_factor=1):
                wr, wi = load_tile(p_gw, M, r, i0, j0, ROWS, COLUMNS)
                gr, gi = load_tile(p_g, M, r, i0, j0, ROWS, COLUMNS)
                gr += wr * qr + wi * qi
                gi += wi * qr - wr * qi
                xr, xi = load_tile(p_x, M, r, i0, j0, ROWS, COLUMNS)
                tl.debug_barrier()
                store_tile(
                    p_gw, gr * scale - xr * along, gi * scale - xi * along, M, r, i0, j0, ROWS, COLUMNS
                )
        zero = tl.cast(b, tl.int32) // (B + 4)
        for j0 in tl.range(zero * COLUMNS, r, COLUMNS, loop_unroll_factor=1):
            qr, qi, along = weight_of_columns(p_q, p_share, j0, r, COLUMNS)
            p_g = p_gv + b * (N * r * 2)
            scale, along = scale_and_share(p_y, p_g, p_norms + 5 * r, along, N, r, j0, zero, ROWS, COLUMNS)
            for i0 in tl.range(0, N, ROWS, loop_unroll_factor=1):
                zr, zi = adjoint_product_tile(
                    p_a, p_x, M, N, r, i0, j0, zero, ROWS, COLUMNS, CHUNK, PRECISION
                )
                gr, gi = load_tile(p_g, N, r, i0 + zero, j0, ROWS, COLUMNS)
                gr += zr * qr - zi * qi
                gi += zr * qi + zi * qr
                xr, xi = load_tile(p_y, N, r, i0 + zero, j0, ROWS, COLUMNS)
                gr = gr * scale - xr * along
                gi = gi * scale - xi * along
                store_tile(p_gw_v, gr, gi, N, r, i0 + zero, j0, ROWS, COLUMNS)
        tl.debug_barrier()
        if GH:
            zero = tl.cast(b, tl.int32) // (B + 5)
            weighted_outer(
                p_x, p_y, p_q, p_gh_out + b * (M * N * 2), M, N, r, zero, ROWS, COLUMNS, CHUNK, PRECISION
            )
            tl.debug_barrier()
        for factor in tl.range(0, 2, loop_unroll_factor=1):
            zero = tl.cast(b, tl.int32) // (B + 6 + factor)
            a = tl.load(p_scalars + factor).to(tl.float32)
            rows = M
            p_raw = p_u + b * (M * r * 2)
            p_g = p_gw
            p_out = p_x
            if factor == 1:
                rows = N
                p_raw = p_v + b * (N * r * 2)
                p_g = p_gw_v
                p_out = p_y
            p_n = p_norms + factor * 3 * r
            ga = refine_core(
                p_raw,
                p_g,
                p_e + factor * square,
                p_c,
                p_n + r,
                p_order,
                a,
                rows,
                r,
                zero,
                True,
                COLUMNS,
                CHUNK,
                PRECISION,
            )
            tl.store(p_gscalars + b * 3 + factor, ga)
            for j0 in tl.range(zero * COLUMNS, r, COLUMNS, loop_unroll_factor=1):
                along = tl.zeros((COLUMNS,), tl.float32)
                for i0 in tl.range(zero, rows, ROWS, loop_unroll_factor=1):
                    gr, gi = product_adjoint_tile(
                        p_g,
                        p_p + factor * square,
                        p_q,
                        rows,
                        r,
                        r,
                        i0,
                        j0,
                        zero,
                        False,
                        ROWS,
                        COLUMNS,
                        CHUNK,
                        PRECISION,
                    )
                    gr, gi = product_tile(
                        p_raw, p_c, gr, gi, rows, r, r, i0, j0, zero, ROWS, COLUMNS, CHUNK, PRECISION
                    )
                    xr, xi = load_tile(p_raw, rows, r, i0, j0, ROWS, COLUMNS)
                    along += tl.sum(xr * gr + xi * gi, 0)
                    store_tile(p_out, gr, gi, rows, r, i0, j0, ROWS, COLUMNS)
                j = j0 + tl.arange(0, COLUMNS)
                norm = tl.load(p_n + j, mask=j < r, other=0.0)
                along = (along * reciprocal_where(norm) / (norm + 1e-8))[None, :]
                # (the products had 1 / (norm + 1e-8) by D already)
                tl.debug_barrier()
                for i0 in tl.range(zero, rows, ROWS, loop_unroll_factor=1):
                    gr, gi = load_tile(p_out, rows, r, i0, j0, ROWS, COLUMNS)
                    xr, xi = load_tile(p_raw, rows, r, i0, j0, ROWS, COLUMNS)
                    tl.debug_barrier()
                    store_tile(p_out, gr - xr * along, gi - xi * along, rows, r, i0, j0, ROWS, COLUMNS)
            tl.debug_barrier()


def by_tiles(H: Tensor, S_pred: Tensor) -> bool:
    """Whether factors of this size are served by `tail_tiles`."""
    return max(H.shape[1:3]) * S_pred.shape[1] > FASTER


def svd_tail_launch(
    U_raw: Tensor, V_raw: Tensor, S_pred: Tensor, H: Tensor, scalars: Tensor
) -> tuple[Launch, tuple[Tensor, Tensor, Tensor]]:
    """The launch of `svd_tail`, and its outputs."""
    (B, r), (M, N) = S_pred.shape, H.shape[1:3]
    refuse_sizes(r, M, N)
    U, S, V = (torch.empty_like(x) for x in (U_raw, S_pred, V_raw))
    count = programs(H, 8 * r * r + 16 * r)
    arguments = {"p_u": U_raw, "p_v": V_raw, "p_s": S_pred, "p_h": H, "p_scalars": scalars}
    arguments |= {"p_u_out": U, "p_s_out": S, "p_v_out": V}
    arguments |= {"p_p": H.new_empty((count, r, r, 2)), "p_norms": H.new_empty((count, 2, r))}
    arguments |= {"p_places": H.new_empty((count, 2, r), dtype=torch.int32)}
    arguments["B"] = B
    # at 64 columns lower tiles leave room for the offsets that sm_80 would spill
    constants = tiles(r, most=64 if r <= 32 else 32, M=M, N=N)
    return Launch(svd_tail_fwd_kernel, (count,), arguments, constants, **THREADS), (U, S, V)


def svd_tail(
    U_raw: Tensor, V_raw: Tensor, S_pred: Tensor, H: Tensor, scalars: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Columns normalised, sorted by S_pred (largest first, stable), both factors refined, S calibrated on H.

    U_raw `(B, M, r, 2)`, V_raw `(B, N, r, 2)`, S_pred `(B, r)`, H `(B, M, N, 2)` contiguous float32; scalars
    float64 `(3,)` on their device: the steps a of U and b of V, and tau. One launch, three where a factor has
    more than `ortho.FASTER` numbers. Returns U, S, V. `ValueError` beyond `ortho.limit`.
    """
    if by_tiles(H, S_pred):
        return tail_tiles.svd_tail(U_raw, V_raw, S_pred, H, scalars)
    launch, outputs = svd_tail_launch(U_raw, V_raw, S_pred, H, scalars)
    launch.run()
    return outputs


def svd_tail_backward_launch(
    gU: Tensor,
    gS: Tensor,
    gV: Tensor,
    U_raw: Tensor,
    V_raw: Tensor,
    S_pred: Tensor,
    H: Tensor,
    scalars: Tensor,
    gh: bool,
) -> tuple[Launch, tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """The launch of `svd_tail_backward`: gradients of U_raw, V_raw, S_pred, H, and of scalars a sample."""
    (B, r), (M, N) = S_pred.shape, H.shape[1:3]
    refuse_sizes(r, M, N)
    gU_raw, gV_raw, gS_pred = (torch.empty_like(x) for x in (U_raw, V_raw, S_pred))
    gH, gscalars = torch.empty_like(H) if gh else H.new_empty((0,)), H.new_empty((B, 3))
    arguments = {"p_gu": gU, "p_gs": gS, "p_gv": gV, "p_u": U_raw, "p_v": V_raw, "p_s": S_pred, "p_h": H}
    arguments |= {"p_scalars": scalars, "p_gu_out": gU_raw, "p_gv_out": gV_raw, "p_gs_out": gS_pred}
    arguments |= {"p_gh_out": gH, "p_gscalars": gscalars}
    # five r x r matrices, both factors' gradients, nine numbers a column
    scratch = 10 * r * r + 2 * (M + N) * r + 9 * r
    count = programs(H, 4 * scratch + 8 * r)
    arguments["p_scratch"] = H.new_empty((count, scratch))
    arguments |= {"p_places": H.new_empty((count, 2, r), dtype=torch.int32)}
    arguments["B"] = B
    constants = tiles(r, M=M, N=N) | {"GH": gh, "SCRATCH": scratch}
    launch = Launch(svd_tail_bwd_kernel, (count,), arguments, constants, **THREADS)
    return launch, (gU_raw, gV_raw, gS_pred, gH, gscalars)


def svd_tail_backward(
    gU: Tensor,
    gS: Tensor,
    gV: Tensor,
    U_raw: Tensor,
    V_raw: Tensor,
    S_pred: Tensor,
    H: Tensor,
    scalars: Tensor,
    gh: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of U_raw, V_raw, S_pred, H (`(0,)` where not wanted) and scalars of `svd_tail`.

    One launch; where a factor has more than `ortho.FASTER` numbers five, and six if that of H is wanted.
    Everything is computed again from the inputs; the order of the columns is data, as `torch.sort` has it.
    """
    if by_tiles(H, S_pred):
        return tail_tiles.svd_tail_backward(gU, gS, gV, U_raw, V_raw, S_pred, H, scalars, gh)
    launch, (*gradients, gscalars) = svd_tail_backward_launch(
        gU, gS, gV, U_raw, V_raw, S_pred, H, scalars, gh
    )
    launch.run()
    gU_raw, gV_raw, gS_pred, gH = gradients
    return gU_raw, gV_raw, gS_pred, gH, gscalars.sum(0, dtype=torch.float64)
