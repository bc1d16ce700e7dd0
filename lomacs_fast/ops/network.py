"""The published network at once: its kernels one after the other, as one node of autograd."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference import NetworkWeights
from ..reference.backbone import AttentionBlock
from . import common, native, tokens
from .dispatch import chosen
from .freq_gate import cpu_gate_reasons, gate_backward
from .gated_conv import numbers as numbers_of_conv
from .ortho import gradient
from .projected_attention import numbers as numbers_of_attention

Found = tuple[Tensor, Tensor, Tensor, Tensor]


# blocks: one node holds the tokens of all of them to its end
DEEPEST = 8


class _Plan(NamedTuple):
    """What is no tensor: groups of every block, 0 for a convolution, and the numbers."""

    groups: tuple[int, ...]
    temperature: float
    eps: float
    max_scale: float


def _flat(weights: NetworkWeights) -> list[Tensor]:
    found = [*weights.gate, *weights.projection]
    for block in weights.blocks:
        if isinstance(block, AttentionBlock):
            found.extend(block[:2])
            for part in block[2:]:
                found.extend(part)
        else:
            found.extend(block)
    found += weights.norm
    found.append(weights.scenes)
    found += weights.heads
    found += weights.spectrum
    found += weights.sizes
    return found


def _sigmoid(x: float) -> float:
    small = math.exp(-abs(x))
    return (small if x < 0 else 1) / (1 + small)


def _taken(block: list[Tensor], groups: int) -> list[Any]:
    """Weights as the block's op takes them: those of an attention in six lists."""
    return [block[i : i + groups] for i in range(2, len(block), groups)] if groups else block[2:]


def _forward(
    plan: _Plan, h: Tensor, scene: Tensor, tau: Tensor, flat: list[Tensor], keep: bool, of_gate: bool = False
) -> Any:
    """Results as the ops give them, and where they are kept for the backward all that it needs beside.

    `of_gate`: the gradients of the gate will be wanted, and that of H will not.
    """
    ops, rest = torch.ops.lomacs, flat[7:]
    front = ops.gate_project_kept if of_gate else ops.gate_project
    x, hd, _, *kept = front.default(h, *flat[:4], plan.temperature, False, *flat[4:7])
    at = 0
    for groups in plan.groups:
        count = 2 + 6 * groups if groups else 6
        block = rest[at : at + count]
        at += count
        op = ops.projected_attention_groups if groups else ops.gated_conv1d
        if keep:
            kept.append(x)
        x = op.default(x, *_taken(block, groups), *block[:2], plan.eps)
    *norm, scenes = rest[at : at + 3]
    u, v, s, of_heads = ops.pooled_heads.default(x, *norm, plan.eps, scenes, scene, *rest[at + 3 : -2])
    B, M, N, r = *h.shape[:3], s.shape[1]
    u, v = u.view(B, M, r, 2), v.view(B, N, r, 2)
    sizes = [plan.max_scale * _sigmoid(raw.item()) for raw in rest[-2:]]
    scalars = torch.tensor([*sizes, tau.item()], dtype=torch.float64, device="cpu")
    if not keep:
        return (*ops.svd_tail.default(u, v, s, hd, scalars), hd), ()
    U, S, V, of_tail = ops.svd_tail_kept.default(u, v, s, hd, scalars)
    # of the bound times a sigmoid
    slopes = torch.tensor(
        [size * (1 - size / plan.max_scale) for size in sizes], dtype=torch.float64, device="cpu"
    )
    return (U, S, V, hd), (*kept, u, v, s, scalars, slopes, U, V, hd, of_tail, of_heads)


def _complex(found: Any) -> Found:
    """Detached, because views of several outputs cannot be changed in place."""
    U, S, V, Hd = found
    return tuple(x if x is S else torch.view_as_complex(x).detach() for x in (U, S, V, Hd))  # type: ignore


class _Network(common.Node):
    """One node for all, because those of autograd between the kernels cost more than what they do."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, H: Tensor, scene: Tensor, tau: Tensor, *flat: Tensor) -> Found:
        with torch._C._AutoDispatchBelowAutograd():
            h = common.planes(H)
            needs = ctx.needs_input_grad
            of_gate = any(needs[4:8]) and not needs[1]
            found, kept = _forward(plan, h, scene, tau, list(flat), True, of_gate)
            out = _complex(found)
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.weights, ctx.of_gate = plan, len(flat), of_gate
        ctx.save_for_backward(h, scene, *flat, *kept)
        return out

    @staticmethod
    def backward(
        ctx: Any, gU: Tensor | None, gS: Tensor | None, gV: Tensor | None, gHd: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        common.refuse_second_derivatives("the fused network")
        ops, plan, needs = torch.ops.lomacs, ctx.plan, ctx.needs_input_grad
        h, scene, *saved = ctx.saved_tensors
        flat, kept = saved[: ctx.weights], saved[ctx.weights :]
        if gU is None and gS is None and gV is None:
            # Hd alone: nothing else has a gradient
            g = None if gHd is None else common.planes(gHd)
            of_front = gate_backward(needs[1:2] + needs[4:8], g, None, h, flat[:4], plan.temperature, False)
            of_channel = None if of_front[0] is None else torch.view_as_complex(of_front[0])
            return None, of_channel, None, None, *of_front[1:], *(None,) * (len(flat) - 4)
        *blocks, u, v, s, scalars, slopes, U, V, hd, of_tail, of_heads = kept
        norm_weight, _, scenes, u_weight, _, v_weight, _, s_weight, *_ = flat[-11:]
        grads = (
            gradient(None if g is None else common.planes(g) if g.is_complex() else g, x)
            for g, x in ((gU, U), (gS, s), (gV, V))
        )
        gu, gv, gs, ghd, gscalars = ops.svd_tail_kept_backward.default(
            *grads, u, v, s, hd, scalars, U, V, of_tail, True
        )
        if gHd is not None:
            added = common.planes(gHd)
            ghd = ghd + added if common.is_batched(added) else ghd.add_(added)
        of_sizes = [
            g.to(raw.dtype, copy=True)
            for g, raw in zip(gscalars[:2].mul(slopes).unbind(), flat[-2:], strict=True)
        ]
        B, M = h.shape[:2]
        gx, *of_pooled = ops.pooled_heads_backward.default(
            gu.view(B, u_weight.shape[0]),
            gv.view(B, v_weight.shape[0]),
            gs,
            M,
            norm_weight,
            scenes.shape[0],
            scene,
            u_weight,
            v_weight,
            s_weight,
            of_heads,
            any(needs[-11:-2]),
        )
        of_blocks: list[Tensor] = []
        end = len(flat) - 11
        for groups in reversed(plan.groups):
            count = 2 + 6 * groups if groups else 6
            of_weights = any(needs[4 + end - count : 4 + end])
            end -= count
            block, x = flat[end : end + count], blocks.pop()
            args = *block[:2], plan.eps, True, of_weights
            weights = _taken(block, groups)
            if not groups:
                gx, *found, gw, gb = ops.gated_conv1d_backward.default(gx, x, *weights, *args)
            elif not common.is_batched(gx):
                gx, found, gw, gb = ops.projected_attention_groups_backward.default(gx, x, *weights, *args)
            else:
                # nothing batches an op of lists
                stacks = (torch.stack(w) for w in weights)
                gx, *found, gw, gb = ops.projected_attention_backward.default(gx, x, *stacks, *args)
                found = [part for g in found for part in g.unbind()]
            of_blocks = [gw, gb, *found, *of_blocks]
        *gate, weight, _, _ = flat[:7]
        of_h, *wanted = needs[1], any(needs[4:8]), any(needs[8:11])
        gH = None
        if ctx.of_gate:
            of_front = ops.gate_project_kept_backward.default(
                gx, ghd, gate[1], gate[3], plan.temperature, weight, hd, *blocks, wanted[1]
            )
        else:
            gH, *of_front = ops.gate_project_backward.default(
                gx, ghd, None, h, *gate, plan.temperature, False, weight, hd, of_h, *wanted
            )
        gradients = *of_front, *of_blocks, *of_pooled, *of_sizes
        of_flat = (g if need else None for g, need in zip(gradients, needs[4:], strict=True))
        return None, None if gH is None or not of_h else torch.view_as_complex(gH), None, None, *of_flat


def _fits(H: Tensor, weights: NetworkWeights) -> bool:
    """Whether the kernels of every stem would be chosen for samples of this size."""
    (M, N), d = H.shape[-2:], weights.scenes.shape[1]
    r = weights.spectrum[1].shape[0]
    sizes = [
        numbers_of_attention(M, d, len(b.pk), b.pk[0].shape[-1])
        if isinstance(b, AttentionBlock)
        else numbers_of_conv(M, d, b[2].shape[-1])
        for b in weights.blocks
    ]
    few = M * N + (M + N) * r <= common.LARGEST and max(sizes, default=0) <= tokens.LARGEST
    return few and not cpu_gate_reasons(H)


def svd_network_at_once(H: Tensor, scene: Tensor, tau: Tensor, weights: NetworkWeights) -> Found | None:
    """U, S, V and Hd of the published network on a CPU, one call for all stems; None where none serves.

    The kernels check their arguments. What they refuse is for the caller to serve another way, or to name.
    """
    flat = _flat(weights)
    trained = sum(x.requires_grad for x in flat)
    served = (
        H.is_cpu
        and chosen() in ("auto", "cpp")
        # where a part is trained alone its own nodes are fewer
        and trained in (0, len(flat))
        and len(weights.blocks) <= DEEPEST
        and all(x.is_contiguous() for x in flat)
        and common.plain(H, scene, tau, *flat)
        and not torch.is_autocast_enabled("cpu")
        and not common.transform_reasons()
        and not tau.requires_grad
        and _fits(H, weights)
        and not native.reasons("cpu")
    )
    if not served:
        return None
    groups = tuple(len(b.pk) if isinstance(b, AttentionBlock) else 0 for b in weights.blocks)
    plan = _Plan(groups, float(weights.temperature), weights.eps, weights.max_scale)
    scene = scene.to(torch.int64).contiguous()
    try:
        if common.records((H, *flat)):
            found: Found = _Network.apply(plan, H, scene, tau, *flat)
            return found
        with torch._C._AutoDispatchBelowAutograd():
            return _complex(_forward(plan, common.planes(H), scene, tau, flat, False)[0])
    except RuntimeError as error:
        # what a kernel refuses; all else is the caller's
        if "lomacs::" not in str(error):
            raise
        return None
