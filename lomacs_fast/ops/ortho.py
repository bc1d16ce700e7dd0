"""Refinement and Björck's iteration as ops: schema, shapes, autograd, autocast, FLOPs, backends."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import reference
from . import common, native
from .common import REAL, library, plain
from .dispatch import Backend, Op, chosen

library.define("ortho_refine(Tensor U, Tensor? V, Tensor steps) -> (Tensor, Tensor)", tags=common.TAGS)
library.define(
    "ortho_refine_backward(Tensor gU, Tensor? gV, Tensor U, Tensor? V, Tensor steps) "
    "-> (Tensor gU, Tensor gV, Tensor gsteps)",
    tags=common.TAGS,
)
# the upper halves of U^H U - I and the norms of the columns are, with the results, what the gradients need
library.define(
    "ortho_refine_kept(Tensor U, Tensor? V, Tensor steps) "
    "-> (Tensor U_out, Tensor V_out, Tensor residuals, Tensor norms)",
    tags=common.TAGS,
)
library.define(
    "ortho_refine_kept_backward(Tensor gU, Tensor? gV, Tensor U, Tensor? V, Tensor steps, Tensor U_out, "
    "Tensor V_out, Tensor residuals, Tensor norms) -> (Tensor gU, Tensor gV, Tensor gsteps)",
    tags=common.TAGS,
)
library.define("bjorck(Tensor U, int steps, int order) -> Tensor", tags=common.TAGS)
library.define("bjorck_backward(Tensor g, Tensor U, int steps, int order) -> Tensor", tags=common.TAGS)


def check_like(name: str, x: Tensor, shape: tuple[Any, ...], other_name: str, other: Tensor) -> None:
    """For fakes: shape, and the dtype of another argument."""
    torch._check(x.shape == shape, lambda: f"{name} must be {tuple(shape)}, got {tuple(x.shape)}")
    torch._check(
        x.dtype == other.dtype, lambda: f"{name} must be {other.dtype} as {other_name} is, got {x.dtype}"
    )


def _check_factor(U: Tensor) -> None:
    torch._check(U.ndim == 4 and U.shape[-1] == 2, lambda: f"U must be (B, M, r, 2), got {tuple(U.shape)}")
    torch._check(U.dtype in REAL, lambda: f"U must be float32 or float64, got {U.dtype}")


def _check_refine(U: Tensor, V: Tensor | None, steps: Tensor) -> None:
    _check_factor(U)
    if V is not None:
        torch._check(V.ndim == 4, lambda: f"V must be (B, N, r, 2), got {tuple(V.shape)}")
        check_like("V", V, (U.shape[0], V.shape[1], U.shape[2], 2), "U", U)
    count = 1 if V is None else 2
    right = steps.shape == (count,) and steps.dtype == torch.float64
    torch._check(right, lambda: f"steps must be float64 ({count},), got {steps.dtype} {tuple(steps.shape)}")


def _pairs(x: Tensor) -> Tensor:
    """A factor as pairs of real numbers, which lie in memory as complex ones do: it may come as either."""
    return torch.view_as_real(x) if x.is_complex() else x


def _check_either(U: Tensor, V: Tensor | None, steps: Tensor) -> None:
    torch._check(V is None or V.is_complex() == U.is_complex(), lambda: "V must be complex where U is")
    _check_refine(_pairs(U), None if V is None else _pairs(V), steps)


@torch.library.register_fake("lomacs::ortho_refine", lib=library)
def _fake_refine(U: Tensor, V: Tensor | None, steps: Tensor) -> tuple[Tensor, Tensor]:
    _check_either(U, V, steps)
    return U.new_empty(U.shape), U.new_empty((0,) if V is None else V.shape)


@torch.library.register_fake("lomacs::ortho_refine_backward", lib=library)
def _fake_refine_backward(
    gU: Tensor, gV: Tensor | None, U: Tensor, V: Tensor | None, steps: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    _check_either(U, V, steps)
    check_like("gU", gU, U.shape, "U", U)
    torch._check((gV is None) == (V is None), lambda: "gV must be given where V is, and nowhere else")
    if gV is not None and V is not None:
        check_like("gV", gV, V.shape, "U", U)
    return U.new_empty(U.shape), U.new_empty((0,) if V is None else V.shape), steps.new_empty(steps.shape)


@torch.library.register_fake("lomacs::ortho_refine_kept", lib=library)
def _fake_refine_kept(U: Tensor, V: Tensor | None, steps: Tensor) -> tuple[Tensor, ...]:
    B, r, factors = U.shape[0], U.shape[2], 1 if V is None else 2
    real = _pairs(U)
    return (
        *_fake_refine(U, V, steps),
        real.new_empty((B, factors, common.upper_half(r))),
        real.new_empty((B, factors, r)),
    )


@torch.library.register_fake("lomacs::ortho_refine_kept_backward", lib=library)
def _fake_refine_kept_backward(
    gU: Tensor,
    gV: Tensor | None,
    U: Tensor,
    V: Tensor | None,
    steps: Tensor,
    U_out: Tensor,
    V_out: Tensor,
    residuals: Tensor,
    norms: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    found = _fake_refine_backward(gU, gV, U, V, steps)
    B, r, factors = U.shape[0], U.shape[2], 1 if V is None else 2
    check_like("U_out", U_out, U.shape, "U", U)
    if V is not None:
        check_like("V_out", V_out, V.shape, "U", U)
    check_like("residuals", residuals, (B, factors, common.upper_half(r)), "U", _pairs(U))
    check_like("norms", norms, (B, factors, r), "U", _pairs(U))
    return found


def _check_bjorck(U: Tensor, steps: int, order: int) -> None:
    _check_factor(U)
    torch._check(
        U.shape[1] >= U.shape[2],
        lambda: f"U must have at least as many rows as columns, got {tuple(U.shape)}",
    )
    torch._check(steps >= 0, lambda: f"steps must be at least 0, got {steps}")
    torch._check(order in (1, 2), lambda: f"order must be 1 or 2, got {order}")


@torch.library.register_fake("lomacs::bjorck", lib=library)
def _fake_bjorck(U: Tensor, steps: int, order: int) -> Tensor:
    _check_bjorck(U, steps, order)
    return U.new_empty(U.shape)


@torch.library.register_fake("lomacs::bjorck_backward", lib=library)
def _fake_bjorck_backward(g: Tensor, U: Tensor, steps: int, order: int) -> Tensor:
    _check_bjorck(U, steps, order)
    check_like("g", g, U.shape, "U", U)
    return U.new_empty(U.shape)


def gradient(g: Tensor | None, like: Tensor) -> Tensor:
    """An incoming gradient as the kernels take it; zeros where there is none."""
    return torch.zeros_like(like) if g is None else g.resolve_conj().resolve_neg().contiguous()


def _setup_refine(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    if inputs[1] is None:
        ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs)


def _backward_refine(ctx: Any, gU: Tensor | None, gV: Tensor | None) -> tuple[Tensor | None, ...]:
    common.refuse_second_derivatives("the fused refinement")
    U, V, steps = ctx.saved_tensors
    found = torch.ops.lomacs.ortho_refine_backward.default(
        gradient(gU, U), None if V is None else gradient(gV, V), U, V, steps
    )
    return tuple(g if need else None for g, need in zip(found, ctx.needs_input_grad, strict=True))


def _setup_refine_kept(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1 if inputs[1] is None else 2 :])
    ctx.save_for_backward(*inputs, *output)


def _backward_refine_kept(
    ctx: Any, gU: Tensor | None, gV: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    common.refuse_second_derivatives("the fused refinement")
    U, V, *rest = ctx.saved_tensors
    found = torch.ops.lomacs.ortho_refine_kept_backward.default(
        gradient(gU, U), None if V is None else gradient(gV, V), U, V, *rest
    )
    return tuple(g if need else None for g, need in zip(found, ctx.needs_input_grad, strict=True))


def _setup_bjorck(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    U, ctx.steps, ctx.order = inputs
    ctx.save_for_backward(U)


def _backward_bjorck(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
    common.refuse_second_derivatives("the fused iteration of Björck")
    (U,) = ctx.saved_tensors
    found = torch.ops.lomacs.bjorck_backward.default(gradient(g, U), U, ctx.steps, ctx.order)
    return found, None, None


_call = common.differentiable("ortho_refine", _setup_refine, _backward_refine)
_call_kept = common.differentiable("ortho_refine_kept", _setup_refine_kept, _backward_refine_kept)
_iterate = common.differentiable("bjorck", _setup_bjorck, _backward_bjorck)
for _name in (
    "ortho_refine",
    "ortho_refine_backward",
    "ortho_refine_kept",
    "ortho_refine_kept_backward",
    "bjorck",
    "bjorck_backward",
):
    # half precision of the caller's becomes single; float64 stays
    for _device in ("cpu", "cuda"):
        torch.library.register_autocast(f"lomacs::{_name}", _device, torch.float32, lib=library)


@register_flop_formula([torch.ops.lomacs.ortho_refine, torch.ops.lomacs.ortho_refine_kept])
def flops_of_refine(
    U: Sequence[int], V: Sequence[int] | None, steps: Sequence[int], *_: Any, **__: Any
) -> int:
    """What `FlopCounterMode` counts on the reference: `U^H U` and `U G`, a complex product as one."""
    (B, M, r), N = U[:3], 0 if V is None else V[1]
    return 2 * B * 2 * (M + N) * r * r


@register_flop_formula([torch.ops.lomacs.ortho_refine_backward, torch.ops.lomacs.ortho_refine_kept_backward])
def flops_of_refine_backward(
    gU: Sequence[int],
    gV: Sequence[int] | None,
    U: Sequence[int],
    V: Sequence[int] | None,
    steps: Sequence[int],
    *_: Any,
    **__: Any,
) -> int:
    """What `FlopCounterMode` counts on the reference where both factors ask: every product twice."""
    return 2 * flops_of_refine(U, V, steps)


@register_flop_formula(torch.ops.lomacs.bjorck)
def _flops_bjorck(U: Sequence[int], steps: int, order: int, *_: Any, **__: Any) -> int:
    """What `FlopCounterMode` counts on the reference: the scale's Gram matrix; a step's, and `U G ..`."""
    B, M, r, _two = U
    return 2 * B * M * r * r * (1 + steps * (1 + order))


@register_flop_formula(torch.ops.lomacs.bjorck_backward)
def _flops_bjorck_backward(
    g: Sequence[int], U: Sequence[int], steps: int, order: int, *_: Any, **__: Any
) -> int:
    """What `FlopCounterMode` counts on the reference: every product of the forward twice."""
    return 2 * _flops_bjorck(U, steps, order)


def _like_given(U: Tensor, found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The first two, factors, complex where U is."""
    if not U.is_complex():
        return found
    return *(torch.view_as_complex(x) if x.ndim == 4 else x.to(U.dtype) for x in found[:2]), *found[2:]


@torch.library.impl("lomacs::ortho_refine", "CUDA", lib=library)
def _cuda_refine(U: Tensor, V: Tensor | None, steps: Tensor) -> Any:
    from ..kernels import ortho

    return _like_given(U, ortho.ortho_refine(_pairs(U), None if V is None else _pairs(V), steps))


@torch.library.impl("lomacs::ortho_refine_backward", "CUDA", lib=library)
def _cuda_refine_backward(gU: Tensor, gV: Tensor | None, U: Tensor, V: Tensor | None, steps: Tensor) -> Any:
    from ..kernels import ortho

    pairs = (None if x is None else _pairs(x) for x in (gU, gV, U, V))
    return _like_given(U, ortho.ortho_refine_backward(*pairs, steps))


@torch.library.impl("lomacs::bjorck", "CUDA", lib=library)
def _cuda_bjorck(U: Tensor, steps: int, order: int) -> Any:
    from ..kernels import ortho

    return ortho.bjorck(U, steps, order)


@torch.library.impl("lomacs::bjorck_backward", "CUDA", lib=library)
def _cuda_bjorck_backward(g: Tensor, U: Tensor, steps: int, order: int) -> Any:
    from ..kernels import ortho

    return ortho.bjorck_backward(g, U, steps, order)


# numbers that the gradient of Björck's iteration keeps of a sample
LARGEST_KEPT = 1 << 24


def _complex_reasons(x: Tensor) -> list[str]:
    if x.is_complex():
        return []
    return [f"U is {str(x.dtype).removeprefix('torch.')}, only complex64 and complex128 are served"]


def native_reasons(size: int, **tensors: Tensor) -> list[str]:
    """Why the C++ kernels cannot take complex tensors of `size` numbers a sample; U decides the dtype."""
    first = next(iter(tensors.values()))
    found = _complex_reasons(first) + common.mixed_reasons(**tensors)
    found += common.size_reasons(size)
    found += common.transform_reasons()
    if first.device.type != "cpu":
        found.append(f"the C++ kernels run on CPUs, the tensors are on {first.device.type}")
    return found or list(native.reasons("cpu"))


def triton_reasons(tiled: Collection[tuple[int, int]] | None = None, **tensors: Tensor) -> list[str]:
    """Why the Triton kernels cannot take complex tensors; U decides the dtype.

    Args:
        tiled: compute capabilities of the devices that have run the kernels of large factors; None where one
            program a sample serves all sizes.
        tensors: by name; those of U and V are factors.
    """
    first = next(iter(tensors.values()))
    # one reason is enough, and more would be felt in a call of a CPU
    if first.device.type == "cpu":
        return common.triton_reasons(first.device)
    found = _complex_reasons(first) + common.mixed_reasons(**tensors)
    found += common.transform_reasons()
    found += common.single_triton_reasons("U", first)
    if not found:
        from ..kernels.ortho import FASTER, limit

        rows = [x.shape[-2] for name, x in tensors.items() if name[0] in "UV"]
        found += limit(first.shape[-1], *rows)
        large = max(rows) * first.shape[-1] > FASTER
        if large and tiled is not None:
            found += common.unproved_reasons("triton", first.device, tiled)
        elif large and chosen() == "auto":
            found.append(
                f"factors of more than {FASTER} numbers: PyTorch's batched products are faster on an H100; "
                'the kernel serves under use_backend("triton") alone'
            )
    return found


Size = Tensor | float


def _numbers(x: Tensor) -> Tensor:
    """Complex `(..., m, n)` as contiguous `(B, m, n)`; conjugate and negative bits resolved."""
    x = x.resolve_conj().resolve_neg()
    return (x if x.ndim == 3 else x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])).contiguous()


def _numbers_of(sizes: Sequence[Size]) -> Tensor:
    numbers = [x.item() if isinstance(x, Tensor) else float(x) for x in sizes]
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")


class _Refine(common.Node):
    """Complex tensors in and out, one node, and none of the cost of torch.library's autograd."""

    @staticmethod
    def forward(ctx: Any, U: Tensor, V: Tensor | None, *sizes: Size) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            u, v, steps = _numbers(U), None if V is None else _numbers(V), _numbers_of(sizes)
            found = torch.ops.lomacs.ortho_refine_kept.default(u, v, steps)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(u, v, steps, *found)
        shapes = [x.shape for x in (U, V) if x is not None]
        ctx.shapes, ctx.dtypes = shapes, [x.dtype if isinstance(x, Tensor) else None for x in sizes]
        # detached, because views of several outputs cannot be changed in place
        return tuple(
            x if len(shape) == 3 else x.reshape(shape).detach()
            for x, shape in zip(found, shapes, strict=False)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        common.refuse_second_derivatives("the fused refinement")
        u, v, *rest = ctx.saved_tensors
        gu, gv = (
            torch.zeros_like(x) if g is None and x is not None else None if g is None else _numbers(g)
            for g, x in zip((*grads, None), (u, v), strict=False)
        )
        *found, gsteps = torch.ops.lomacs.ortho_refine_kept_backward.default(gu, gv, u, v, *rest)
        of_u, of_v, *of_steps = ctx.needs_input_grad
        factors = [
            None if not need else g if len(shape) == 3 else g.reshape(shape)
            for g, shape, need in zip(found, ctx.shapes, (of_u, of_v), strict=False)
        ]
        steps = [
            (g if dtype is g.dtype else g.to(dtype)) if need else None
            for g, dtype, need in zip(gsteps.unbind(), ctx.dtypes, of_steps, strict=True)
        ]
        return (*factors, *(None,) * (v is None), *steps)


def ortho_refine_at_once(U: Any, V: Any, *sizes: Size) -> tuple[Tensor, ...] | None:
    """What the kernel of the CPU answers to a call of which the columns alone were looked at.

    It checks the rest itself. What it refuses, or None, is for the caller to look at: to name what is wrong,
    or to serve it another way.
    """
    tensors = [x for x in (U, V, *sizes) if isinstance(x, Tensor)]
    served = (
        plain(*tensors)
        and all(x.is_cpu for x in tensors)
        and chosen() in ("auto", "cpp")
        and not common.transform_reasons()
        and not native.reasons("cpu")
        and max(x.shape[-2] * x.shape[-1] + x.shape[-1] ** 2 for x in tensors if x.ndim > 1) <= common.LARGEST
    )
    if not served:
        return None
    try:
        if common.records(tensors):
            return _Refine.apply(U, V, *sizes)
        with torch._C._AutoDispatchBelowAutograd():
            u, v = _numbers(U), None if V is None else _numbers(V)
            found = torch.ops.lomacs.ortho_refine.default(u, v, _numbers_of(sizes))
        given = (x.shape for x in (U, V) if x is not None)
        return tuple(x if len(s) == 3 else x.reshape(s) for x, s in zip(found, given, strict=False))
    except RuntimeError as error:
        # what the kernel refuses; all else is the caller's
        if "lomacs::" not in str(error):
            raise
        return None


def _refine(U: Tensor, V: Tensor | None, a: Size, b: Size | None) -> tuple[Tensor, Tensor | None]:
    sizes = (a,) if b is None else (a, b)
    u, v = common.planes(U), None if V is None else common.planes(V)
    steps = common.scalars(sizes, U.device)
    if U.device.type == "cpu" and common.records((u, v, steps)):
        u, v, *_ = _call_kept(u, v, steps)
    else:
        u, v = _call(u, v, steps)
    return complex_of(u, U.shape), v if V is None else complex_of(v, V.shape)


def complex_of(x: Tensor, shape: torch.Size) -> Tensor:
    """Real `(B, m, n, 2)` as complex, with the batch dimensions of `shape`."""
    x = torch.view_as_complex(x)
    return x if len(shape) == 3 else x.reshape(shape)


def _given(U: Tensor, V: Tensor | None) -> dict[str, Tensor]:
    return {"U": U} if V is None else {"U": U, "V": V}


def _refine_native_reasons(U: Tensor, V: Tensor | None, *_: Any) -> list[str]:
    r, rows = U.shape[-1], max(x.shape[-2] for x in _given(U, V).values())
    return native_reasons(rows * r + r * r, **_given(U, V))


def _refine_triton_reasons(U: Tensor, V: Tensor | None, *_: Any) -> list[str]:
    return triton_reasons(**_given(U, V))


def _refine_eager(U: Tensor, V: Tensor | None, a: Size, b: Size | None) -> tuple[Tensor, ...]:
    if V is None or b is None:
        return (reference.ortho_refine(U, a),)
    return reference.ortho_refine_pair(U, V, a, b)


def _bjorck(U: Tensor, steps: int, order: int) -> Tensor:
    return complex_of(_iterate(common.planes(U), steps, order), U.shape)


def _bjorck_native_reasons(U: Tensor, steps: int, order: int) -> list[str]:
    M, r = U.shape[-2:]
    found = native_reasons(M * r + r * r, U=U)
    if torch.is_grad_enabled() and U.requires_grad and steps * (M * r + 2 * r * r) > LARGEST_KEPT:
        found.append(f"the gradient would keep more than {LARGEST_KEPT} numbers of a sample")
    return found


def _nominal_refine(device: torch.device) -> tuple[Any, ...]:
    U = torch.ones(1, 64, 32, dtype=torch.complex64, device=device)
    return U, U, 0.1, 0.1


def _nominal_bjorck(device: torch.device) -> tuple[Any, ...]:
    return torch.ones(1, 64, 32, dtype=torch.complex64, device=device), 5, 1


ortho_refine = Op(
    "ortho_refine",
    [
        Backend("triton", _refine_triton_reasons, _refine),
        Backend("cpp", _refine_native_reasons, _refine),
        Backend("eager", lambda *_: (), _refine_eager),
    ],
    ("U", "V", "a", "b"),
    _nominal_refine,
)
bjorck = Op(
    "bjorck",
    [
        Backend("triton", lambda U, *_: triton_reasons(U=U), _bjorck),
        Backend("cpp", _bjorck_native_reasons, _bjorck),
        Backend("eager", lambda *_: (), reference.bjorck),
    ],
    ("U", "steps", "order"),
    _nominal_bjorck,
)
