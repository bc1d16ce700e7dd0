"""Projected attention as one op each way: schema, shapes, autograd, autocast, FLOPs."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import reference
from ..reference.projected_attention import Grouped
from . import common, tokens
from .common import library
from .dispatch import Backend, Op

STACKED = "Tensor wq, Tensor wk, Tensor wv, Tensor wo, Tensor pk, Tensor pv"
NORM = "Tensor? norm_weight, Tensor? norm_bias, float eps"

library.define(f"projected_attention(Tensor x, {STACKED}, {NORM}) -> Tensor", tags=common.TAGS)
# weights one tensor a group, read where they lie; autograd has its gradient of the caller, see `ops.network`
LISTED = STACKED.replace("Tensor", "Tensor[]")
library.define(f"projected_attention_groups(Tensor x, {LISTED}, {NORM}) -> Tensor", tags=common.TAGS)
library.define(
    f"projected_attention_groups_backward(Tensor gy, Tensor x, {LISTED}, {NORM}, bool gx, bool gw) -> "
    "(Tensor gx, Tensor[] gw, Tensor gnorm_weight, Tensor gnorm_bias)",
    tags=common.TAGS,
)
library.define(
    f"projected_attention_backward(Tensor gy, Tensor x, {STACKED}, {NORM}, bool gx, bool gw) -> (Tensor gx, "
    "Tensor gwq, Tensor gwk, Tensor gwv, Tensor gwo, Tensor gpk, Tensor gpv, Tensor gnorm_weight, "
    "Tensor gnorm_bias)",
    tags=common.TAGS,
)

NAMES = ("wq", "wk", "wv", "wo", "pk", "pv")
Weights = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _expect(name: str, w: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    torch._check(tuple(w.shape) == shape, lambda: f"{name} must be {shape}, got {tuple(w.shape)}")
    torch._check(w.dtype == x.dtype, lambda: f"{name} must be {x.dtype} as x is, got {w.dtype}")


def _check(
    x: Tensor, weights: Sequence[Tensor], norm_weight: Tensor | None, norm_bias: Tensor | None
) -> None:
    wq, pk = weights[0], weights[4]
    torch._check(x.ndim == 3, lambda: f"x must be (B, T, d), got {tuple(x.shape)}")
    torch._check(x.dtype in tokens.DTYPES, lambda: f"x must be real floating point, got {x.dtype}")
    torch._check(wq.ndim == 3 and pk.ndim == 3, lambda: "weights must be stacked over groups")
    (G, a), k, (T, d) = wq.shape[:2], pk.shape[2], x.shape[1:]
    torch._check(G > 0 and d % G == 0, lambda: f"wq must hold groups that divide d = {d}, got {G}")
    g = d // G
    shapes = ((G, a, g), (G, a, g), (G, g, g), (G, g, g), (G, T, k), (G, T, k))
    for name, w, shape in zip(NAMES, weights, shapes, strict=True):
        _expect(name, w, x, shape)
    torch._check(norm_weight is not None or norm_bias is None, lambda: "norm_bias goes with norm_weight")
    for name, n in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if n is not None:
            _expect(name, n, x, (d,))


@torch.library.register_fake("lomacs::projected_attention", lib=library)
def _fake(x: Tensor, *rest: Any) -> Tensor:
    _check(x, rest[:6], *rest[6:8])
    return x.new_empty(x.shape)


@torch.library.register_fake("lomacs::projected_attention_groups", lib=library)
def _fake_groups(x: Tensor, *rest: Any) -> Tensor:
    _check(x, [torch.stack(w) for w in rest[:6]], *rest[6:8])
    return x.new_empty(x.shape)


@torch.library.register_fake("lomacs::projected_attention_backward", lib=library)
def _fake_backward(gy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    weights, norm, (_, gx, gw) = rest[:6], rest[6:8], rest[8:]
    _check(x, weights, *norm)
    _expect("gy", gy, x, tuple(x.shape))
    wanted = [(x, gx), *((w, gw) for w in (*weights, *norm))]
    return tuple(x.new_empty(w.shape if w is not None and g else (0,)) for w, g in wanted)


@torch.library.register_fake("lomacs::projected_attention_groups_backward", lib=library)
def _fake_groups_backward(gy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    weights, norm, (_, gx, gw) = rest[:6], rest[6:8], rest[8:]
    _check(x, [torch.stack(w) for w in weights], *norm)
    _expect("gy", gy, x, tuple(x.shape))

    def like(w: Tensor | None, wanted: bool) -> Tensor:
        return x.new_empty(w.shape if w is not None and wanted else (0,))

    return like(x, gx), [like(w, gw) for w in itertools.chain(*weights)], like(norm[0], gw), like(norm[1], gw)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    common.refuse_second_derivatives("the fused projected attention")
    needs = ctx.needs_input_grad
    found = torch.ops.lomacs.projected_attention_backward.default(
        grad.contiguous(), *ctx.saved_tensors, ctx.eps, needs[0], any(needs[1:9])
    )
    return (*(g if need else None for g, need in zip(found, needs, strict=False)), None)


_call = common.differentiable("projected_attention", _setup, _backward)
for _name in ("projected_attention", "projected_attention_groups"):
    tokens.register_autocast(_name)


def _products(x: Sequence[int], a: int, k: int, G: int) -> tuple[int, int, int, int]:
    """Multiply-adds of the reference: from x, by the projections, of queries and values, of the output."""
    B, T, d = x
    g = d // G
    each = B * T * G
    return each * (2 * g * a + g * g), each * k * (a + g), each * k * (a + g), each * g * g


@register_flop_formula(torch.ops.lomacs.projected_attention)
def _flops(x: Sequence[int], wq: Sequence[int], *rest: Any, **__: Any) -> int:
    """What `FlopCounterMode` counts on the reference, which multiplies before it reduces."""
    return 2 * sum(_products(x, wq[1], rest[3][2], wq[0]))


@register_flop_formula(torch.ops.lomacs.projected_attention_groups)
def _flops_groups(x: Sequence[int], wq: Sequence[Sequence[int]], *rest: Any, **__: Any) -> int:
    return 2 * sum(_products(x, wq[0][0], rest[3][0][1], len(wq)))


@register_flop_formula(torch.ops.lomacs.projected_attention_backward)
def _flops_backward(gy: Sequence[int], x: Sequence[int], wq: Sequence[int], *rest: Any, **__: Any) -> int:
    """What `FlopCounterMode` counts in the reference's backward for the gradients that the flags ask for."""
    pk, (gx, gw) = rest[3], rest[-2:]
    of_x, projected, core, out = _products(x, wq[1], pk[2], wq[0])
    if not (gx or gw):
        return 0
    # the norm's own gradients go by way of the tokens
    gx = gx or rest[5] is not None
    return 2 * ((gx + gw) * of_x + (1 + gw) * projected + 2 * core + (1 + gw) * out)


@register_flop_formula(torch.ops.lomacs.projected_attention_groups_backward)
def _flops_groups_backward(
    gy: Sequence[int], x: Sequence[int], wq: Sequence[Sequence[int]], *rest: Any, **__: Any
) -> int:
    of_wq, *stacked = ((len(w), *w[0]) for w in (wq, *rest[:5]))
    return _flops_backward(gy, x, of_wq, *stacked, *rest[5:])


def _cuda(name: str) -> None:
    @torch.library.impl(f"lomacs::{name}", "CUDA", lib=library)
    def kernel(*args: Any) -> Any:
        from ..kernels import projected_attention as kernels

        return getattr(kernels, name)(*args)


for _name in ("projected_attention", "projected_attention_groups", "projected_attention_backward"):
    _cuda(_name)


class _Stack(common.Node):
    """Weights stacked over groups; their gradients are tensors of their own, not views of a stack."""

    @staticmethod
    def forward(ctx: Any, groups: int, *weights: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.stack(weights[i : i + groups]) for i in range(0, len(weights), groups))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *(part for grad in grads for part in torch.ops.aten.unbind_copy.int(grad)))


def _stacked(weights: Sequence[Grouped]) -> Weights:
    found = [w if isinstance(w, Tensor) else None for w in weights]
    lists = [list(w) for w in weights if not isinstance(w, Tensor)]
    if lists:
        if torch.compiler.is_compiling() or not common.records(itertools.chain(*lists)):
            stacks = iter([torch.stack(w) for w in lists])
        else:
            stacks = iter(_Stack.apply(len(lists[0]), *functools.reduce(operator.iadd, lists, [])))
        found = [next(stacks) if w is None else w for w in found]
    return tuple(w.resolve_neg().contiguous() for w in found)  # type: ignore[union-attr, return-value]


def _fused(
    x: Tensor,
    wq: Grouped,
    wk: Grouped,
    wv: Grouped,
    wo: Grouped,
    pk: Grouped,
    pv: Grouped,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> Tensor:
    x = x.resolve_neg().contiguous()
    norm_weight, norm_bias = (
        None if w is None else w.resolve_neg().contiguous() for w in (norm_weight, norm_bias)
    )
    weights = (wq, wk, wv, wo, pk, pv)
    lists = not any(isinstance(w, Tensor) for w in weights)
    if lists and not torch.compiler.is_compiling() and _where_they_lie(x, len(wq)):
        grouped: Any = weights
        if not common.records((x, norm_weight, norm_bias, *itertools.chain(*grouped))):
            return _listed(x, grouped, norm_weight, norm_bias, eps)
    stacked = _stacked(weights)
    tokens.same_device(
        x, **dict(zip(NAMES, stacked, strict=True)), norm_weight=norm_weight, norm_bias=norm_bias
    )
    found: Tensor = _call(x, *stacked, norm_weight, norm_bias, eps)
    return found


# groups whose weights' addresses a launch has room for
GROUPS = 64


def _where_they_lie(x: Tensor, groups: int) -> bool:
    """Whether a kernel reads lists of weights."""
    return x.device.type == "cpu" or (groups <= GROUPS and not tokens.triton_reasons(x))


def _listed(
    x: Tensor,
    weights: Sequence[Sequence[Tensor]],
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Without gradients each weight is read where it lies: nothing is stacked, nothing can go stale."""
    lists = [[w.resolve_neg().contiguous() for w in group] for group in weights]
    if x.device.type != "cpu":
        named = {f"{n}[{i}]": w for n, ws in zip(NAMES, lists, strict=True) for i, w in enumerate(ws)}
        tokens.same_device(x, **named, norm_weight=norm_weight, norm_bias=norm_bias)
    op = torch.ops.lomacs.projected_attention_groups.default
    return tokens.unrecorded(op, x, *lists, norm_weight, norm_bias, eps)


def projected_attention_at_once(x: Tensor, *args: Any) -> Tensor | None:
    """See `tokens.at_once`."""
    ops = torch.ops.lomacs
    op = ops.projected_attention if isinstance(args[0], Tensor) else ops.projected_attention_groups
    return tokens.at_once(op.default, x, *args)


def _shape(pk: Grouped) -> tuple[int, int]:
    """Groups and reduced rows."""
    return len(pk), pk[0].shape[-1]


# widest group, and widest queries, that the Triton kernel has room for; T and k_len go in tiles
WIDEST = 128


def numbers(T: int, d: int, G: int, k: int) -> int:
    """That a thread holds of a sample."""
    g = d // G
    return 4 * T * d + 2 * G * k * T + 6 * k * g + 4 * g * d


def _native_reasons(
    x: Tensor, wq: Grouped, wk: Grouped, wv: Grouped, wo: Grouped, pk: Grouped, *_: Any
) -> list[str]:
    (T, d), (G, k) = x.shape[-2:], _shape(pk)
    return tokens.reasons(x, numbers(T, d, G, k))


def _triton_reasons(
    x: Tensor,
    wq: Grouped,
    wk: Grouped,
    wv: Grouped,
    wo: Grouped,
    pk: Grouped,
    pv: Grouped,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> list[str]:
    g, a = x.shape[-1] // len(wq), wq[0].shape[0]
    found = tokens.triton_reasons(x)
    for what, n in (("channels a group", g), ("wide queries", a)):
        if n > WIDEST:
            found.append(f"{n} {what} are more than the {WIDEST} that a program's shared memory holds")
    return found


def _eager(x: Tensor, *rest: Any) -> Tensor:
    # the residual too is in autocast's dtype, whatever serves
    return reference.projected_attention(tokens.as_under_autocast(x), *rest)


def _nominal(device: torch.device) -> tuple[Any, ...]:
    shapes = ((1, 64, 64), (4, 32, 16), (4, 32, 16), (4, 16, 16), (4, 16, 16), (4, 64, 32), (4, 64, 32))
    return (*(torch.ones(shape, device=device) for shape in shapes), None, None, 1e-5)


projected_attention = Op(
    "projected_attention",
    [
        Backend("triton", _triton_reasons, _fused),
        Backend("cpp", _native_reasons, _fused),
        Backend("eager", lambda *_: (), _eager),
    ],
    ("x", *NAMES, "norm_weight", "norm_bias", "eps"),
    _nominal,
)
