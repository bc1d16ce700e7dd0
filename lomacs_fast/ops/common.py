"""What the ops share: real views, scalars as tensors, gradients handed on, and reasons of every backend."""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..reference.precision import autocast
from . import native
from .dispatch import chosen, constant_in_graphs

REAL = (torch.float32, torch.float64)
REAL_OF = {torch.complex64: torch.float32, torch.complex128: torch.float64}

library = torch.library.Library("lomacs", "FRAGMENT")
# opaque to compilers, and handed exactly the strides that the fakes promise
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


def planes(x: Tensor) -> Tensor:
    """Complex `(..., m, n)` as contiguous real `(B, m, n, 2)`; conjugate and negative bits resolved."""
    x = torch.view_as_real(x.resolve_conj().resolve_neg())
    if x.ndim != 4:
        x = x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])
    return x.contiguous()


def upper_half(n: int) -> int:
    """Numbers in the upper half of a Hermitian matrix as `csrc/cpu/upper.h` keeps it."""
    blocks = (n + 15) // 16
    return 256 * blocks * (blocks + 1)


def rows(x: Tensor) -> Tensor:
    """Real `(..., n)` as contiguous `(B, n)`."""
    x = x.resolve_neg()
    return (x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])).contiguous()


@functools.lru_cache(maxsize=64)
def _constants(*values: float) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return torch.tensor(values, dtype=torch.float64)


def scalars(values: Sequence[Tensor | float], device: torch.device) -> Tensor:
    """Scalars as one float64 tensor on the device; without a copy from the host for 0-d tensors there."""
    if device.type == "cpu" and not any(isinstance(value, Tensor) for value in values):
        numbers = [float(value) for value in values]
        traced = torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None
        return torch.tensor(numbers, dtype=torch.float64) if traced else _constants(*numbers)
    return torch.stack(
        [
            value.to(device, torch.float64)
            if isinstance(value, Tensor)
            else torch.full((), float(value), dtype=torch.float64, device=device)
            for value in values
        ]
    )


def plain(*tensors: Tensor) -> bool:
    """Whether a call runs as it stands: nothing traces or counts it, and its tensors are torch's own."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._is_tracing()
        and _get_current_dispatch_mode() is None
        and all(type(x) in (Tensor, torch.nn.Parameter) for x in tensors)
    )


def records(tensors: Iterable[Tensor | None]) -> bool:
    """Whether autograd will want the gradient of one of them."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


class Node(torch.autograd.Function):
    """A node of plain calls, applied without a search for wrappers of torch.func, which they have none of."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]


def differentiable(name: str, setup: Callable[..., None], backward: Callable[..., Any]) -> Callable[..., Any]:
    """Give an op its gradients, as `torch.library.register_autograd` does; returns the call that costs least.

    A plain call that records has a node of autograd's own, which costs a fraction of `torch.library`'s, and
    one that does not goes past autograd. Traced, counted or under autocast it is the op's.
    """
    torch.library.register_autograd(f"lomacs::{name}", backward, setup_context=setup, lib=library)
    op = getattr(torch.ops.lomacs, name)

    def forward(ctx: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            found = op.default(*args)
        setup(ctx, args, found)
        return found

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    node: Any = type(f"lomacs_{name}", (Node,), methods)

    def call(*args: Any) -> Any:
        tensors = [x for x in args if isinstance(x, Tensor)]
        if not plain(*tensors) or autocast(tensors[0].device.type):
            return op.default(*args)
        if records(tensors):
            return node.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op.default(*args)

    return call


def is_batched(x: Tensor) -> bool:
    """Whether a tensor stands for many, as under `torch.func.vmap` and `is_grads_batched`."""
    # autograd's `is_grads_batched` has a kind of its own, which reports no transform
    legacy: bool = torch._C._functorch.is_legacy_batchedtensor(x)
    return legacy or torch._C._are_functorch_transforms_active()


def is_one(grad: Tensor) -> bool:
    """Whether a gradient of a loss is 1, where looking costs nothing: on the CPU, outside any tracing."""
    readable = type(grad) is Tensor and grad.device.type == "cpu" and _get_current_dispatch_mode() is None
    return readable and not is_batched(grad) and grad.item() == 1


# shares memory until somebody writes: the caller may change its gradient in place, a second backward is right
share = getattr(torch, "_lazy_clone", torch.clone)


def refuse_second_derivatives(what: str) -> None:
    """Called in a backward: raises where that backward is recorded for a derivative of its own."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{what} has no second derivatives (its backward was asked to record a graph); "
            'lomacs_fast.use_backend("eager") has them'
        )


def scaled(grad: Tensor, gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """The gradients that a forward left, those needed, times that of the loss, 0-d or one a matrix."""
    if grad.ndim == 0 and is_one(grad):
        return [share(g) if need else None for need, g in zip(needs, gradients, strict=True)]
    factors = (grad.reshape(-1, *(1,) * (g.ndim - 1)) if grad.ndim else grad for g in gradients)
    return [g * f if need else None for need, g, f in zip(needs, gradients, factors, strict=True)]


class _Ready(Node):
    """Complex tensors in and out, and none of the cost of torch.library's autograd: see `ready`."""

    @staticmethod
    def forward(
        ctx: Any, evaluate: Callable[..., Any], outputs: int, what: str, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            found = evaluate(ctx.needs_input_grad[3:], *tensors)
        ctx.evaluate, ctx.outputs, ctx.what, ctx.gradients = evaluate, outputs, what, found[outputs:]
        ctx.mark_non_differentiable(*found[1:outputs])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        return found[:outputs]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives(ctx.what)
        needs = ctx.needs_input_grad[3:]
        if grad is None:
            return (None,) * (3 + len(needs))
        tensors, gradients, ctx.gradients = ctx.saved_tensors, ctx.gradients, None
        if gradients is None:
            # a second backward: the first one gave its gradients away
            with torch._C._AutoDispatchBelowAutograd():
                gradients = ctx.evaluate(needs, *tensors)[ctx.outputs :]
        if grad.ndim > 1:
            grad = grad.reshape(-1)
        own = type(grad) is Tensor and not is_batched(grad)
        if own and grad.ndim and grad.stride() == (0,) and grad.shape[0]:
            # what the sum or mean of the losses hands back
            grad = grad[0]
        one = own and grad.ndim == 0 and is_one(grad)
        returned: list[Tensor | None] = [None, None, None]
        for g, x, need in zip(gradients, tensors, needs, strict=True):
            if not need:
                returned.append(None)
                continue
            if not one:
                factor = grad.reshape(-1, *(1,) * (g.ndim - 1)) if grad.ndim else grad
                g = g.mul_(factor) if own else g * factor
            g = torch.view_as_complex(g) if x.is_complex() else g
            returned.append(g if g.shape == x.shape else g.reshape(x.shape))
        return tuple(returned)


def ready(
    evaluate: Callable[..., tuple[Tensor, ...]],
    outputs: int,
    what: str,
    *tensors: Tensor,
    traced: bool = False,
) -> tuple[Tensor, ...]:
    """The outputs of a loss op that leaves the gradients of these tensors ready, differentiable in them.

    Args:
        evaluate: `evaluate(flags, *tensors)` calls the op on the planes of the tensors; the flags say which
            gradients to make. It returns the loss, outputs that are not differentiable, and the gradients.
        outputs: how many of these come before the gradients.
        what: the op's name in errors.
        traced: leave the gradients to the op's own registration, as tracing does.
    """
    record = torch.is_grad_enabled()
    flags = tuple(record and x.requires_grad for x in tensors)
    if traced or not plain(*tensors):
        return evaluate(flags, *tensors)[:outputs]
    if any(flags):
        return _Ready.apply(evaluate, outputs, what, *tensors)
    with torch._C._AutoDispatchBelowAutograd():
        return evaluate(flags, *tensors)[:outputs]


# numbers a sample of the largest problem whose scratch a thread still keeps near; a larger one has its
# products alone to spread over the threads
LARGEST = 1 << 20


def size_reasons(numbers: int) -> list[str]:
    """Why a sample of so many numbers is not served by one thread."""
    return (
        [f"a sample of more than {LARGEST} numbers is too large for one thread"] if numbers > LARGEST else []
    )


def transform_reasons() -> list[str]:
    """Why an opaque op cannot serve inside torch.func or forward-mode derivatives; empty outside."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return ["torch.func transforms and forward-mode derivatives need the formula"]
    return []


# numbers up to which the detailed checks of a call would be felt
SMALL = 1 << 16


def small_native(x: Any) -> bool:
    """Whether a kernel of the CPU may be asked at once: one serves here, and x is small and of the CPU."""
    return (
        not torch.compiler.is_compiling()
        and isinstance(x, Tensor)
        and x.is_cpu
        and x.numel() <= SMALL
        and not transform_reasons()
        and chosen() in ("auto", "cpp")
        and not native.reasons("cpu")
    )


# compute capabilities of the devices that have run the kernels, see benchmarks/results/
PROVED = frozenset({(9, 0)})
# of the kernels that are newer than the last run on a device
NOWHERE: frozenset[tuple[int, int]] = frozenset()


@constant_in_graphs
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def triton_reasons(device: torch.device, proved: Collection[tuple[int, int]] = PROVED) -> list[str]:
    """Why Triton kernels cannot serve on this device; `auto` leaves them out until a device has run them.

    Args:
        device: of the tensors.
        proved: compute capabilities of the devices that have run this kernel.
    """
    if device.type != "cuda":
        return [f"Triton kernels run on GPUs, the tensors are on {device.type}"]
    if not _triton_installed():
        return ["Triton is not installed"]
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        return ["TRITON_INTERPRET=1 interprets kernels"]
    return unproved_reasons("triton", device, proved)


def single_triton_reasons(name: str, x: Tensor, proved: Collection[tuple[int, int]] = PROVED) -> list[str]:
    """Why Triton kernels cannot serve on the device and in the precision of a tensor of this name."""
    double = x.dtype in (torch.float64, torch.complex128)
    found = [f"the Triton kernels are single precision, {name} is {_name(x.dtype)}"] if double else []
    return found + triton_reasons(x.device, proved)


@constant_in_graphs
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def unproved_reasons(
    backend: str, device: torch.device, proved: Collection[tuple[int, int]] = PROVED
) -> list[str]:
    """Why `auto` passes a kernel by that no device of the kind has run yet; asked for by name it serves.

    `LOMACS_FAST_UNPROVED=1` lets `auto` take such kernels: for the run that proves them.
    """
    if chosen() != "auto" or os.environ.get("LOMACS_FAST_UNPROVED", "0") == "1":
        return []
    kind = _capability(device)
    if kind in proved and torch.version.hip is None:
        return []
    return [
        f"no device of compute capability {kind[0]}.{kind[1]} has run the kernel yet, it serves under "
        f'use_backend("{backend}") alone'
    ]


def mixed_reasons(**tensors: Tensor) -> list[str]:
    """Why tensors of several devices or precisions are not served together."""
    found, values = [], list(tensors.values())
    if any(x.device != values[0].device for x in values):
        found.append("devices differ: " + ", ".join(f"{name} {x.device}" for name, x in tensors.items()))
    real = REAL_OF.get(values[0].dtype, values[0].dtype)
    if any(REAL_OF.get(x.dtype, x.dtype) != real for x in values):
        found.append("dtypes differ: " + ", ".join(f"{n} {_name(x.dtype)}" for n, x in tensors.items()))
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
