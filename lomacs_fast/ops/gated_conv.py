"""The gated convolution as one op each way: schema, shapes, autograd, autocast, FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import reference
from . import common, tokens
from .common import library
from .dispatch import Backend, Op

WEIGHTS = "Tensor dw_weight, Tensor dw_bias, Tensor pw_weight, Tensor pw_bias"
NORM = "Tensor? norm_weight, Tensor? norm_bias, float eps"

library.define(f"gated_conv1d(Tensor x, {WEIGHTS}, {NORM}) -> Tensor", tags=common.TAGS)
library.define(
    f"gated_conv1d_backward(Tensor gy, Tensor x, {WEIGHTS}, {NORM}, bool gx, bool gw) -> (Tensor gx, "
    "Tensor gdw_weight, Tensor gdw_bias, Tensor gpw_weight, Tensor gpw_bias, Tensor gnorm_weight, "
    "Tensor gnorm_bias)",
    tags=common.TAGS,
)

NAMES = ("dw_weight", "dw_bias", "pw_weight", "pw_bias", "norm_weight", "norm_bias")


def _expect(name: str, w: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    torch._check(tuple(w.shape) == shape, lambda: f"{name} must be {shape}, got {tuple(w.shape)}")
    torch._check(w.dtype == x.dtype, lambda: f"{name} must be {x.dtype} as x is, got {w.dtype}")


def _check(x: Tensor, weights: Sequence[Tensor | None]) -> None:
    torch._check(x.ndim == 3, lambda: f"x must be (B, T, d), got {tuple(x.shape)}")
    torch._check(x.dtype in tokens.DTYPES, lambda: f"x must be real floating point, got {x.dtype}")
    d, taps = x.shape[2], weights[0].shape[-1]  # type: ignore[union-attr]
    torch._check(taps % 2 == 1, lambda: f"dw_weight must have an odd number of taps, got {taps}")
    torch._check(weights[4] is not None or weights[5] is None, lambda: "norm_bias goes with norm_weight")
    shapes = ((2 * d, 1, taps), (2 * d,), (d, d, 1), (d,), (d,), (d,))
    for name, w, shape in zip(NAMES, weights, shapes, strict=True):
        if w is not None:
            _expect(name, w, x, shape)


@torch.library.register_fake("lomacs::gated_conv1d", lib=library)
def _fake(x: Tensor, *rest: Any) -> Tensor:
    _check(x, rest[:6])
    return x.new_empty(x.shape)


@torch.library.register_fake("lomacs::gated_conv1d_backward", lib=library)
def _fake_backward(gy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    weights, (_, gx, gw) = rest[:6], rest[6:]
    _check(x, weights)
    _expect("gy", gy, x, tuple(x.shape))
    wanted = [(x, gx), *((w, gw) for w in weights)]
    return tuple(x.new_empty(w.shape if w is not None and g else (0,)) for w, g in wanted)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    common.refuse_second_derivatives("the fused gated convolution")
    needs = ctx.needs_input_grad
    found = torch.ops.lomacs.gated_conv1d_backward.default(
        grad.contiguous(), *ctx.saved_tensors, ctx.eps, needs[0], any(needs[1:7])
    )
    return (*(g if need else None for g, need in zip(found, needs, strict=False)), None)


_call = common.differentiable("gated_conv1d", _setup, _backward)
tokens.register_autocast("gated_conv1d")


def _products(x: Sequence[int], taps: int) -> tuple[int, int]:
    """Multiply-adds of the taps and of the pointwise product."""
    B, T, d = x
    return 2 * B * T * d * taps, B * T * d * d


@register_flop_formula(torch.ops.lomacs.gated_conv1d)
def _flops(x: Sequence[int], dw_weight: Sequence[int], *_: Any, **__: Any) -> int:
    """What `FlopCounterMode` counts on the reference."""
    return 2 * sum(_products(x, dw_weight[2]))


@register_flop_formula(torch.ops.lomacs.gated_conv1d_backward)
def _flops_backward(
    gy: Sequence[int], x: Sequence[int], dw_weight: Sequence[int], *rest: Any, **__: Any
) -> int:
    """What `FlopCounterMode` counts in the reference's backward for the gradients that the flags ask for.

    It takes the gradient of the taps for that of a convolution without groups, d times the true count.
    """
    gx, gw = rest[-2:]
    # the norm's own gradients go by way of the tokens
    gx = gx or (gw and rest[3] is not None)
    depthwise, pointwise = _products(x, dw_weight[2])
    return 2 * ((gx + gw * x[2]) * depthwise + ((gx or gw) + gw) * pointwise)


def _cuda(name: str) -> None:
    @torch.library.impl(f"lomacs::{name}", "CUDA", lib=library)
    def kernel(*args: Any) -> Any:
        from ..kernels import gated_conv as kernels

        return getattr(kernels, name)(*args)


_cuda("gated_conv1d")
_cuda("gated_conv1d_backward")


def _fused(
    x: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor,
    pw_weight: Tensor,
    pw_bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> Tensor:
    given = (x, dw_weight, dw_bias, pw_weight, pw_bias, norm_weight, norm_bias)
    args = [None if w is None else w.resolve_neg().contiguous() for w in given]
    tokens.same_device(x, **dict(zip(NAMES, args[1:], strict=True)))
    found: Tensor = _call(*args, eps)
    return found


def gated_conv1d_at_once(x: Tensor, *args: Any) -> Tensor | None:
    """See `tokens.at_once`."""
    return tokens.at_once(torch.ops.lomacs.gated_conv1d.default, x, *args)


def numbers(T: int, d: int, taps: int) -> int:
    """That a thread holds of a sample."""
    return 8 * T * d + d * (d + 32 * taps)


def _native_reasons(x: Tensor, dw_weight: Tensor, *_: Any) -> list[str]:
    T, d = x.shape[-2:]
    return tokens.reasons(x, numbers(T, d, dw_weight.shape[-1]))


# of a tile of 64 tokens that halos leave some tokens of its own, backward too
TAPS = 31


def _triton_reasons(x: Tensor, dw_weight: Tensor, *_: Any) -> list[str]:
    found, taps = tokens.triton_reasons(x), dw_weight.shape[-1]
    if taps > TAPS and x.shape[1] > 64:
        found.append(f"at most {TAPS} taps over more than 64 tokens, got {taps} over {x.shape[1]}")
    return found


def _eager(x: Tensor, *rest: Any) -> Tensor:
    # the residual too is in autocast's dtype, whatever serves
    return reference.gated_conv1d(tokens.as_under_autocast(x), *rest)


def _nominal(device: torch.device) -> tuple[Any, ...]:
    shapes = ((1, 64, 64), (128, 1, 3), (128,), (64, 64, 1), (64,))
    return (*(torch.ones(shape, device=device) for shape in shapes), None, None, 1e-5)


gated_conv1d = Op(
    "gated_conv1d",
    [
        Backend("triton", _triton_reasons, _fused),
        Backend("cpp", _native_reasons, _fused),
        Backend("eager", lambda *_: (), _eager),
    ],
    ("x", *NAMES, "eps"),
    _nominal,
)
