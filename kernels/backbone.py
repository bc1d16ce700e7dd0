"""The backbone for inference: one program a sample, all blocks, the mean over tokens and the last norm.

Each block reads the tokens that the one before wrote, in memory that the program alone touches: twice T x d
numbers, written once a block and read a few times, which stay in the caches. Weights are read where they lie,
tensor by tensor: the kernel takes their addresses, and is compiled for the row of blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gated_conv import convolve_tile
from .kinds import CONVOLUTION, FOLDED, tensors
from .launch import Launch, block, precision
from .projected_attention import attend_group, forward_blocks, whole_chunks
from .real import tile


@triton.jit
def _statistics(
    p_x, p_stats, T: tl.constexpr, d: tl.constexpr, EPS: tl.constexpr, TT: tl.constexpr, DB: tl.constexpr
):
    """Means of all tokens, then their reciprocal deviations, in memory."""
    for t0 in tl.range(0, T, TT, loop_unroll_factor=1, num_stages=1):
        x = tile(p_x, t0, 0, T, d, d, TT, DB).to(tl.float32)
        mean = tl.sum(x, 1) / d
        x = tl.where(tl.arange(0, DB)[None, :] < d, x - mean[:, None], 0.0)
        t = t0 + tl.arange(0, TT)
        tl.store(p_stats + t, mean, mask=t < T)
        tl.store(p_stats + T + t, 1.0 / tl.sqrt_rn(tl.sum(x * x, 1) / d + EPS), mask=t < T)


@triton.jit
def _attend(
    p_x,
    weights,
    p_stats,
    p_room,
    p_y,
    T: tl.constexpr,
    d: tl.constexpr,
    EPS: tl.constexpr,
    TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    DB: tl.constexpr,
    BLOCKS: tl.constexpr,
    AT: tl.constexpr,
):
    """An attention block of one sample, group by group."""
    FIRST: tl.constexpr = BLOCKS[AT][0]
    G: tl.constexpr = BLOCKS[AT][1]
    LISTED: tl.constexpr = BLOCKS[AT][2]
    FOLDED: tl.constexpr = BLOCKS[AT][3]
    a: tl.constexpr = BLOCKS[AT][4]
    k: tl.constexpr = BLOCKS[AT][5]
    g: tl.constexpr = d // G
    for group in tl.static_range(G):
        if LISTED:
            p_wq, p_wk = weights[FIRST + 2 + group], weights[FIRST + 2 + G + group]
            p_wv, p_wo = weights[FIRST + 2 + 2 * G + group], weights[FIRST + 2 + 3 * G + group]
            p_pk, p_pv = weights[FIRST + 2 + 4 * G + group], weights[FIRST + 2 + 5 * G + group]
        elif FOLDED:
            p_wq, p_wk = weights[FIRST + 2] + group * g * g, None
            p_wv, p_wo = weights[FIRST + 3] + group * g * g, None
            p_pk, p_pv = weights[FIRST + 4] + group * T * k, weights[FIRST + 5] + group * T * k
        else:
            p_wq, p_wk = weights[FIRST + 2] + group * a * g, weights[FIRST + 3] + group * a * g
            p_wv, p_wo = weights[FIRST + 4] + group * g * g, weights[FIRST + 5] + group * g * g
            p_pk, p_pv = weights[FIRST + 6] + group * T * k, weights[FIRST + 7] + group * T * k
        attend_group(
            p_x, p_wq, p_wk, p_wv, p_wo, p_pk, p_pv, weights[FIRST], weights[FIRST + 1], p_stats, p_room, p_y,
            group * g, T, d, g, a, k, EPS, BLOCKS[AT][6], True, FOLDED, TYPE, PRECISION,
            BLOCKS[AT][7], DB, BLOCKS[AT][8], BLOCKS[AT][9], BLOCKS[AT][10], BLOCKS[AT][11],
        )  # fmt: skip


@triton.jit
def _convolve(
    p_x,
    weights,
    p_stats,
    p_y,
    T: tl.constexpr,
    d: tl.constexpr,
    EPS: tl.constexpr,
    TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    R: tl.constexpr,
    DB: tl.constexpr,
    OUT: tl.constexpr,
    BLOCKS: tl.constexpr,
    AT: tl.constexpr,
):
    """A convolution block of one sample, tile by tile."""
    FIRST: tl.constexpr = BLOCKS[AT][0]
    for t0 in tl.range(0, T, R, loop_unroll_factor=1, num_stages=1):
        for j0 in tl.range(0, d, OUT, loop_unroll_factor=1, num_stages=1):
            convolve_tile(
                p_x, weights[FIRST + 2], weights[FIRST + 3], weights[FIRST + 4], weights[FIRST + 5],
                weights[FIRST], weights[FIRST + 1], p_stats, p_y, t0, j0,
                T, d, BLOCKS[AT][2], R, 0, EPS, True, TYPE, PRECISION, R, 16, DB, OUT,
            )  # fmt: skip


@triton.jit
def backbone_fwd_kernel(
    p_x,
    weights,
    p_nw,
    p_nb,
    p_tokens,
    p_stats,
    p_room,
    p_y,
    T: tl.constexpr,
    d: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROOM: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    TT: tl.constexpr,
    DB: tl.constexpr,
    R: tl.constexpr,
    OUT: tl.constexpr,
):
    TYPE: tl.constexpr = p_x.dtype.element_ty
    sample = tl.program_id(0).to(tl.int64)
    p_stats += sample * 2 * T
    if p_room is not None:
        p_room += sample * ROOM
    p_in = p_x + sample * T * d
    for i in tl.static_range(DEPTH):
        p_out = p_tokens + sample * 2 * T * d + i % 2 * T * d
        _statistics(p_in, p_stats, T, d, EPS, TT, DB)
        tl.debug_barrier()
        if BLOCKS[i][1] > 0:
            _attend(
                p_in, weights, p_stats, p_room, p_out, T, d, EPS, TYPE, PRECISION, DB, BLOCKS, i
            )  # fmt: skip
        else:
            _convolve(p_in, weights, p_stats, p_out, T, d, EPS, TYPE, PRECISION, R, DB, OUT, BLOCKS, i)
        tl.debug_barrier()
        p_in = p_out
    total = tl.zeros((DB,), tl.float32)
    for t0 in tl.range(0, T, TT, loop_unroll_factor=1, num_stages=1):
        total += tl.sum(tile(p_in, t0, 0, T, d, d, TT, DB).to(tl.float32), 0)
    j = tl.arange(0, DB)
    mean = total / T
    y = tl.where(j < d, mean - tl.sum(mean) / d, 0.0)
    y = y / tl.sqrt_rn(tl.sum(y * y) / d + EPS)
    if p_nw is not None:
        y *= tl.load(p_nw + j, mask=j < d, other=0.0).to(tl.float32)
    if p_nb is not None:
        y += tl.load(p_nb + j, mask=j < d, other=0.0).to(tl.float32)
    tl.store(p_y + sample * d + j, y.to(TYPE), mask=j < d)


def backbone_launch(
    x: Tensor,
    weights: Sequence[Tensor],
    kinds: Sequence[int],
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    y: Tensor,
) -> Launch:
    """The launch for at least one block, into y."""
    B, T, d = x.shape
    first, room, warps, blocks = 0, 0, 4, []
    for kind in kinds:
        own = weights[first + 2 :]
        if kind == CONVOLUTION:
            blocks.append((first, 0, own[0].shape[-1]))
        else:
            listed, folded = kind > 0, kind == FOLDED
            G = kind if listed else own[0].shape[0]
            a, k = own[0].shape[-2], own[4 * G if listed else 2 if folded else 4].shape[-1]
            sizes, own_warps = forward_blocks(T, d, d // G, a, k)
            warps = max(warps, own_warps)
            TT, GB, AB, KB, HELD = (sizes[name] for name in ("TT", "GB", "AB", "KB", "HELD"))
            if k > KB:
                room = max(room, 2 * whole_chunks(k, KB) * GB)
            blocks.append((first, G, listed, folded, a, k, 1.0 if folded else a**-0.5, TT, GB, AB, KB, HELD))
        first += tensors(kind)
    scratch = {"p_tokens": (B, 2, T, d), "p_stats": (B, 2, T)} | ({"p_room": (B, room)} if room else {})
    return Launch(
        backbone_fwd_kernel,
        (B if T else 0,),
        {
            "p_x": x,
            "weights": tuple(weights),
            "p_nw": norm_weight,
            "p_nb": norm_bias,
            "p_room": None,
            **{name: x.new_empty(shape, dtype=torch.float32) for name, shape in scratch.items()},
            "p_y": y,
        },
        {
            **{"T": T, "d": d, "DEPTH": len(blocks), "BLOCKS": tuple(blocks), "ROOM": room},
            "EPS": float(eps),
            "PRECISION": precision(),
            "TT": min(block(T), 32),
            "DB": block(d),
            "R": min(block(T), 32),
            "OUT": min(block(d), 64),
        },
        num_warps=warps,
        registers=255,
    )


def backbone(
    x: Tensor,
    weights: Sequence[Tensor],
    kinds: Sequence[int],
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> Tensor:
    """`(B, d)` of contiguous x `(B, T, d)`: all blocks, mean over tokens, norm.

    Args:
        weights: contiguous, block by block: the norm's weight and bias, then those of the mixer.
        kinds: of every block, see `kinds`. `CONVOLUTION`: `dw_weight, dw_bias, pw_weight, pw_bias`. A number
            of groups: `wq, wk, wv, wo, pk, pv`, each as many tensors. `STACKED`: the same, stacked over
            groups. `FOLDED`: `score, mix, pk, pv`, stacked, with `score = Wq^T Wk / sqrt(a)` and
            `mix = Wv^T Wo^T`.
    """
    y = x.new_empty(x.shape[0], x.shape[2])
    backbone_launch(x, weights, kinds, norm_weight, norm_bias, eps, y).run()
    return y
