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


torch.library.register_autograd("lomacs::svd_heads", _backward, setup_context=_setup, lib=library)
for _name in ("svd_heads", "svd_heads_backward"):
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
    found: tuple[Tensor, Tensor] = torch.ops.lomacs.svd_heads.default(*dense(*tensors))
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
