"""What the ops on tokens share: the rule for half precision, calls that record nothing, reasons."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from ..reference.precision import autocast
from . import common, native

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def lowered(value: Any, device: str) -> Any:
    """As autocast does before a product: tensors of the device in its dtype, all else as it is."""
    if isinstance(value, Tensor):
        fits = value.is_floating_point() and value.dtype != torch.float64 and value.device.type == device
        return value.to(torch.get_autocast_dtype(device)) if fits else value
    return [lowered(x, device) for x in value] if isinstance(value, list | tuple) else value


def as_under_autocast(x: Tensor) -> Tensor:
    """x in autocast's dtype where that is on."""
    device = x.device.type
    lower: Tensor = lowered(x, device) if autocast(device) else x
    return lower


def register_autocast(name: str) -> None:
    """Under autocast the op takes and gives its dtype, tokens, weights and residual; sums are in float32."""
    op = getattr(torch.ops.lomacs, name).default

    def register(device: str, key: str) -> None:
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def kernel(*args: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return op(*(lowered(value, device) for value in args))

        common.library.impl(name, kernel, key)

    for device, key in KEYS.items():
        register(device, key)


def unrecorded(op: Any, *args: Any) -> Any:
    """A call whose inputs ask for no gradient, past autograd's kernel, which costs more than one sample."""
    if torch.compiler.is_compiling():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def at_once(op: Any, x: Any, *args: Any) -> Tensor | None:
    """What the kernel of the CPU answers to a small call without gradients that nobody has looked at yet.

    It checks every argument itself. What it refuses, or None, is for the caller to look at: to name what is
    wrong, or to serve it another way.
    """
    if torch.is_grad_enabled() or not common.small_native(x) or torch.is_autocast_enabled("cpu"):
        return None
    try:
        with torch._C._AutoDispatchBelowAutograd():
            return op(x, *args)
    except (RuntimeError, TypeError):
        return None


# numbers of a sample whose scratch a thread still keeps near
LARGEST = 1 << 22


def reasons(x: Tensor, numbers: int) -> list[str]:
    """Why the native library does not serve tokens x, of which a thread holds so many numbers a sample."""
    found = []
    if x.dtype not in DTYPES:
        found.append(f"x is {str(x.dtype).removeprefix('torch.')}, only real floating point is served")
    if numbers > LARGEST:
        found.append(f"a sample of more than {LARGEST} numbers is too large for one thread")
    found += common.transform_reasons()
    if x.device.type == "cuda":
        found.append("the native library has no kernel of this op for CUDA")
    return found or list(native.reasons(x.device.type))


def triton_reasons(x: Tensor, proved: Collection[tuple[int, int]] = common.PROVED) -> list[str]:
    """Why Triton does not serve tokens x; `proved` as in `common.triton_reasons`."""
    return common.single_triton_reasons("x", x, proved) + common.transform_reasons()


def same_device(x: Tensor, **others: Tensor | None) -> None:
    """Raises ValueError where a weight is on another device than x: a kernel sees pointers alone."""
    for name, other in others.items():
        if other is not None and other.device != x.device:
            raise ValueError(f"{name} must be on {x.device} as x is, got {other.device}")
