"""The linear heads of both factors: schema, shapes, autograd, autocast, FLOPs, backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import reference
from . import common
from .common import REAL, library
from .dispatch import Backend, Op
from .freq_gate import cpp_reasons, dense

library.define(
    "svd_heads(Tensor feat, Tensor u_weight, Tensor u_bias, Tensor v_weight, Tensor v_bias) "
    "-> (Tensor u, Tensor v)",
    tags=common.TAGS,
)
library.define(
    "svd_heads_backward(Tensor gu, Tensor gv, Tensor feat, Tensor u_weight, Tensor v_weight, bool gf, "
    "bool gw) -> (Tensor gfeat, Tensor gu_weight, Tensor gu_bias, Tensor gv_weight, Tensor gv_bias)",
    tags=common.TAGS,
)
POOLED = "Tensor norm_weight, Tensor norm_bias, float eps, Tensor scenes, Tensor scene"
# what the gradients need of the features is kept
library.define(
    f"pooled_heads(Tensor x, {POOLED}, Tensor u_weight, Tensor u_bias, Tensor v_weight, Tensor v_bias, "
    "Tensor s_weight, Tensor s_bias) -> (Tensor u, Tensor v, Tensor s, Tensor kept)",
    tags=common.TAGS,
)
library.define(
    "pooled_heads_backward(Tensor gu, Tensor gv, Tensor gs, SymInt tokens, Tensor norm_weight, "
    "SymInt scenes, Tensor scene, Tensor u_weight, Tensor v_weight, Tensor s_weight, Tensor kept, bool gw) "
    "-> (Tensor gx, Tensor gnorm_weight, Tensor gnorm_bias, Tensor gscenes, Tensor gu_weight, "
    "Tensor gu_bias, Tensor gv_weight, Tensor gv_bias, Tensor gs_weight, Tensor gs_bias)",
    tags=common.TAGS,
)


def _check(feat: Tensor, **heads: Tensor) -> None:
    """The shapes and precisions of a call, in traced code too; weights first."""
    torch._check(feat.ndim == 2, lambda: f"feat must be (B, d), got {tuple(feat.shape)}")
    torch._check(feat.dtype in REAL, lambda: f"feat must be float32 or float64, got {feat.dtype}")
    for name, x in heads.items():
        weight = heads[name[:2] + "weight"]
        torch._check(weight.ndim == 2, lambda n=name: f"{n[:2]}weight must have 2 dimensions")
        rows = weight.shape[0]
        shape = (rows, feat.shape[1]) if x is weight else (rows,) if "bias" in name else (feat.shape[0], rows)
        torch._check(x.shape == shape, lambda n=name, x=x, s=shape: f"{n} must be {s}, got {tuple(x.shape)}")
        torch._check(x.dtype == feat.dtype, lambda n=name, x=x: f"{n} must be {feat.dtype}, got {x.dtype}")


@torch.library.register_fake("lomacs::svd_heads", lib=library)
def _fake(
    feat: Tensor, u_weight: Tensor, u_bias: Tensor, v_weight: Tensor, v_bias: Tensor
) -> tuple[Tensor, Tensor]:
    _check(feat, u_weight=u_weight, v_weight=v_weight, u_bias=u_bias, v_bias=v_bias)
    return feat.new_empty(feat.shape[0], u_weight.shape[0]), feat.new_empty(feat.shape[0], v_weight.shape[0])


@torch.library.register_fake("lomacs::svd_heads_backward", lib=library)
def _fake_backward(
    gu: Tensor, gv: Tensor, feat: Tensor, u_weight: Tensor, v_weight: Tensor, gf: bool, gw: bool
) -> tuple[Tensor, ...]:
    _check(feat, u_weight=u_weight, v_weight=v_weight, u_grad=gu, v_grad=gv)
    shapes = (u_weight.shape, u_weight.shape[:1], v_weight.shape, v_weight.shape[:1])
    return feat.new_empty(feat.shape if gf else (0,)), *(feat.new_empty(s if gw else (0,)) for s in shapes)


@torch.library.register_fake("lomacs::pooled_heads", lib=library)
def _fake_pooled(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    scenes: Tensor,
    scene: Tensor,
    u_weight: Tensor,
    u_bias: Tensor,
    v_weight: Tensor,
    v_bias: Tensor,
    s_weight: Tensor,
    s_bias: Tensor,
) -> tuple[Tensor, ...]:
    torch._check(x.ndim == 3, lambda: f"x must be (B, T, d), got {tuple(x.shape)}")
    torch._check(eps > 0, lambda: f"eps must be positive, got {eps}")
    (B, _, d), weights = x.shape, (u_weight, v_weight, s_weight)
    _check(x[:, 0], u_weight=u_weight, v_weight=v_weight, u_bias=u_bias, v_bias=v_bias)
    _check(x[:, 0], s_weight=s_weight, s_bias=s_bias)
    shapes = ((norm_weight, (d,)), (norm_bias, (d,)), (scenes, (scenes.shape[0], d)), (scene, (B,)))
    for t, shape in shapes:
        torch._check(t.shape == shape, lambda s=shape, t=t: f"shape must be {s}, got {tuple(t.shape)}")
    return *(x.new_empty(B, w.shape[0]) for w in weights), x.new_empty(B, 2 * d + 1 + s_weight.shape[0])


@torch.library.register_fake("lomacs::pooled_heads_backward", lib=library)
def _fake_pooled_backward(
    gu: Tensor,
    gv: Tensor,
    gs: Tensor,
    tokens: int,
    norm_weight: Tensor,
    scenes: int,
    scene: Tensor,
    u_weight: Tensor,
    v_weight: Tensor,
    s_weight: Tensor,
    kept: Tensor,
    gw: bool,
) -> tuple[Tensor, ...]:
    B, d = gs.shape[0], norm_weight.shape[0]
    feat = gs.new_empty(B, d)
    _check(feat, u_weight=u_weight, v_weight=v_weight, u_grad=gu, v_grad=gv)
    _check(feat, s_weight=s_weight, s_grad=gs)
    width = 2 * d + 1 + s_weight.shape[0]
    torch._check(kept.shape == (B, width), lambda: f"kept must be {(B, width)}, got {tuple(kept.shape)}")
    heads = (s for w in (u_weight, v_weight, s_weight) for s in (w.shape, w.shape[:1]))
    shapes = ((d,), (d,), (scenes, d), *heads)
    return gs.new_empty(B, tokens, d), *(gs.new_empty(s if gw else (0,)) for s in shapes)


def _setup_pooled(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, norm_weight, _, _, scenes, scene, u_weight, _, v_weight, _, s_weight, _ = inputs
    ctx.mark_non_differentiable(output[3])
    ctx.tokens, ctx.scenes = x.shape[1], scenes.shape[0]
    ctx.save_for_backward(norm_weight, scene, u_weight, v_weight, s_weight, output[3])


def _backward_pooled(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    common.refuse_second_derivatives("the fused heads")
    norm_weight, scene, *weights, kept = ctx.saved_tensors
    needs = ctx.needs_input_grad
    gu, gv, gs = (g.resolve_neg().contiguous() for g in grads[:3])
    gx, *norm, gscenes, uw, ub, vw, vb, sw, sb = torch.ops.lomacs.pooled_heads_backward.default(
        gu, gv, gs, ctx.tokens, norm_weight, ctx.scenes, scene, *weights, kept, any(needs[1:])
    )
    found = (gx, *norm, None, gscenes, None, uw, ub, vw, vb, sw, sb)
    return tuple(g if need else None for g, need in zip(found, needs, strict=True))


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    feat, u_weight, _, v_weight, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(feat, u_weight, v_weight)


def _backward(ctx: Any, gu: Tensor | None, gv: Tensor | None) -> tuple[Tensor | None, ...]:
    common.refuse_second_derivatives("the fused heads")
    feat, u_weight, v_weight = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if gu is None and gv is None:
        return (None,) * 5
    gu, gv = (
        feat.new_zeros(feat.shape[0], w.shape[0]) if g is None else g.resolve_neg().contiguous()
        for g, w in ((gu, u_weight), (gv, v_weight))
    )
    gradients = torch.ops.lomacs.svd_heads_backward(
        gu, gv, feat, u_weight, v_weight, needs[0], any(needs[1:])
    )
    return tuple(g if need else None for g, need in zip(gradients, needs, strict=True))


_call = common.differentiable("svd_heads", _setup, _backward)
torch.library.register_autograd(
    "lomacs::pooled_heads", _backward_pooled, setup_context=_setup_pooled, lib=library
)
for _name in ("svd_heads", "svd_heads_backward", "pooled_heads", "pooled_heads_backward"):
    for _device in ("cpu", "cuda"):
        torch.library.register_autocast(f"lomacs::{_name}", _device, torch.float32, lib=library)


@register_flop_formula(torch.ops.lomacs.svd_heads)
def _flops(
    feat: Sequence[int], u_weight: Sequence[int], u_bias: Any, v_weight: Sequence[int], *_: Any, **__: Any
) -> int:
    """What `FlopCounterMode` counts on the reference: the products with the weights."""
    return 2 * feat[0] * feat[1] * (u_weight[0] + v_weight[0])


@register_flop_formula(torch.ops.lomacs.svd_heads_backward)
def _backward_flops(
    gu: Any, gv: Any, feat: Any, u_weight: Any, v_weight: Any, gf: bool, gw: bool, *_: Any, **__: Any
) -> int:
    return _flops(feat, u_weight, None, v_weight) * (gf + gw)


@register_flop_formula(torch.ops.lomacs.pooled_heads)
def _pooled_flops(
    x: Sequence[int],
    norm_weight: Any,
    norm_bias: Any,
    eps: float,
    scenes: Any,
    scene: Any,
    u_weight: Sequence[int],
    u_bias: Any,
    v_weight: Sequence[int],
    v_bias: Any,
    s_weight: Sequence[int],
    *_: Any,
    **__: Any,
) -> int:
    """What `FlopCounterMode` counts on the reference: the products with the weights."""
    return 2 * x[0] * x[2] * (u_weight[0] + v_weight[0] + s_weight[0])


@register_flop_formula(torch.ops.lomacs.pooled_heads_backward)
def _pooled_backward_flops(
    gu: Sequence[int],
    gv: Sequence[int],
    gs: Sequence[int],
    tokens: int,
    norm_weight: Sequence[int],
    *rest: Any,
    **__: Any,
) -> int:
    return 2 * gu[0] * norm_weight[0] * (gu[1] + gv[1] + gs[1]) * (1 + rest[-1])


def _cpp_reasons(
    feat: Tensor, u_weight: Tensor, u_bias: Tensor, v_weight: Tensor, v_bias: Tensor
) -> list[str]:
    found = [] if feat.dtype in REAL else [f"feat is {feat.dtype}, only float32 and float64 are served"]
    if feat.ndim != 2:
        found.append(f"feat has {feat.ndim} dimensions, only 2 are served")
    tensors = {"u_weight": u_weight, "u_bias": u_bias, "v_weight": v_weight, "v_bias": v_bias}
    found += common.mixed_reasons(feat=feat, **tensors) + common.transform_reasons()
    return found or cpp_reasons(feat.device)


def _run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = _call(*dense(*tensors))
    return found


def _nominal(device: torch.device) -> tuple[Tensor, ...]:
    weight, bias = torch.ones(4096, 64, device=device), torch.ones(4096, device=device)
    return torch.ones(1, 64, device=device), weight, bias, weight, bias


svd_heads = Op(
    "svd_heads",
    [Backend("cpp", _cpp_reasons, _run), Backend("eager", lambda *_: (), reference.svd_heads)],
    ("feat", "u_weight", "u_bias", "v_weight", "v_bias"),
    _nominal,
)
