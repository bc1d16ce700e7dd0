"""The frequency gate, from H to Hd: schema, shapes, autograd, autocast, FLOPs, backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import reference
from . import common, native
from .common import REAL, library
from .dispatch import Backend, Op

WEIGHTS = "Tensor row_w1, Tensor row_w2, Tensor col_w1, Tensor col_w2, float temperature, bool normalize"
library.define(f"freq_gate(Tensor H, {WEIGHTS}) -> (Tensor Hd, Tensor norms)", tags=common.TAGS)
library.define(
    f"freq_gate_backward(Tensor gHd, Tensor? gnorms, Tensor H, {WEIGHTS}, bool gh, bool gw) -> "
    "(Tensor gH, Tensor gr1, Tensor gr2, Tensor gc1, Tensor gc2)",
    tags=common.TAGS,
)


def check_gate(
    H: Tensor, row_w1: Tensor, row_w2: Tensor, col_w1: Tensor, col_w2: Tensor, temperature: float
) -> None:
    """The shapes and precisions of a gate's arguments, in traced code too."""
    torch._check(
        H.ndim == 4 and H.shape[3] == 2, lambda: f"H must have shape (B, M, N, 2), got {tuple(H.shape)}"
    )
    torch._check(H.dtype in REAL, lambda: f"H must be float32 or float64, got {H.dtype}")
    for name, w in (("row_w1", row_w1), ("col_w1", col_w1)):
        torch._check(w.ndim == 2, lambda n=name, w=w: f"{n} must have 2 dimensions, got {tuple(w.shape)}")
    M, N = H.shape[1:3]
    rows, cols = row_w1.shape[0], col_w1.shape[0]
    shapes = {"row_w1": (rows, M), "row_w2": (M, rows), "col_w1": (cols, N), "col_w2": (N, cols)}
    for (name, shape), w in zip(shapes.items(), (row_w1, row_w2, col_w1, col_w2), strict=True):
        torch._check(w.shape == shape, lambda n=name, w=w, s=shape: f"{n} must be {s}, got {tuple(w.shape)}")
        torch._check(w.dtype == H.dtype, lambda n=name, w=w: f"{n} must be {H.dtype}, got {w.dtype}")
    torch._check(temperature > 0, lambda: f"temperature must be positive, got {temperature}")


@torch.library.register_fake("lomacs::freq_gate", lib=library)
def _fake(
    H: Tensor,
    row_w1: Tensor,
    row_w2: Tensor,
    col_w1: Tensor,
    col_w2: Tensor,
    temperature: float,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    check_gate(H, row_w1, row_w2, col_w1, col_w2, temperature)
    return H.new_empty(H.shape), H.new_empty((H.shape[0] if normalize else 0,))


@torch.library.register_fake("lomacs::freq_gate_backward", lib=library)
def _fake_backward(
    gHd: Tensor,
    gnorms: Tensor | None,
    H: Tensor,
    row_w1: Tensor,
    row_w2: Tensor,
    col_w1: Tensor,
    col_w2: Tensor,
    temperature: float,
    normalize: bool,
    gh: bool,
    gw: bool,
) -> tuple[Tensor, ...]:
    check_gate(H, row_w1, row_w2, col_w1, col_w2, temperature)
    torch._check(gHd.shape == H.shape, lambda: f"gHd must be {tuple(H.shape)}, got {tuple(gHd.shape)}")
    weights = (row_w1, row_w2, col_w1, col_w2)
    return H.new_empty(H.shape if gh else (0,)), *(w.new_empty(w.shape if gw else (0,)) for w in weights)


@torch.library.impl("lomacs::freq_gate", "CUDA", lib=library)
def _on_cuda(*args: Any) -> tuple[Tensor, Tensor]:
    from ..kernels import freq_gate as kernels

    return kernels.freq_gate(*args)


@torch.library.impl("lomacs::freq_gate_backward", "CUDA", lib=library)
def _backward_on_cuda(*args: Any) -> tuple[Tensor, ...]:
    from ..kernels import freq_gate as kernels

    return kernels.freq_gate_backward(*args)


def gate_backward(
    needs: Sequence[bool],
    gHd: Tensor | None,
    gnorms: Tensor | None,
    H: Tensor,
    weights: Sequence[Tensor],
    temperature: float,
    normalize: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of H and of the four weights, None where `needs` wants none."""
    gh, gw = needs[0], any(needs[1:5])
    if (gHd is None and gnorms is None) or not (gh or gw):
        return (None,) * 5
    gHd = torch.zeros_like(H) if gHd is None else gHd.contiguous()
    gnorms = None if gnorms is None or not normalize else gnorms.contiguous()
    gradients = torch.ops.lomacs.freq_gate_backward(gHd, gnorms, H, *weights, temperature, normalize, gh, gw)
    return tuple(g if need else None for g, need in zip(gradients, needs, strict=False))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.temperature, ctx.normalize = inputs
    if not ctx.normalize:
        ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, gHd: Tensor | None, gnorms: Tensor | None) -> tuple[Tensor | None, ...]:
    common.refuse_second_derivatives("the fused frequency gate")
    H, *weights = ctx.saved_tensors
    gradients = gate_backward(
        ctx.needs_input_grad[:5], gHd, gnorms, H, weights, ctx.temperature, ctx.normalize
    )
    return (*gradients, None, None)


_call = common.differentiable("freq_gate", _setup, _backward)
for _device in ("cpu", "cuda"):
    for _name in ("freq_gate", "freq_gate_backward"):
        torch.library.register_autocast(f"lomacs::{_name}", _device, torch.float32, lib=library)


def gate_flops(H: Sequence[int], row_w1: Sequence[int], col_w1: Sequence[int], products: int) -> int:
    """FLOPs of so many products a layer of both perceptrons; `FlopCounterMode` counts no transform."""
    return 2 * H[0] * (row_w1[0] * row_w1[1] + col_w1[0] * col_w1[1]) * products


@register_flop_formula(torch.ops.lomacs.freq_gate)
def _flops(H: Any, row_w1: Any, row_w2: Any, col_w1: Any, *_: Any, **__: Any) -> int:
    """What `FlopCounterMode` counts on the reference: two layers, twice."""
    return gate_flops(H, row_w1, col_w1, 2)


@register_flop_formula(torch.ops.lomacs.freq_gate_backward)
def _backward_flops(
    gHd: Any,
    gnorms: Any,
    H: Any,
    row_w1: Any,
    row_w2: Any,
    col_w1: Any,
    col_w2: Any,
    temperature: float,
    normalize: bool,
    gh: bool,
    gw: bool,
    *_: Any,
    **__: Any,
) -> int:
    """The same of its backward, where all weights want a gradient; what is computed again counts once."""
    return gate_flops(H, row_w1, col_w1, 1 + gh + 2 * gw)


# the largest prime factor of a side: the direct sum over 61 points leaves us 1.8 times as fast as the
# library's transform, and falls off with the prime
LARGEST_PRIME = 61


def _largest_prime(n: int) -> int:
    largest, p = 1, 2
    while n > 1:
        if n % p:
            p += 1
        else:
            largest, n = p, n // p
    return largest


def cpu_gate_reasons(H: Tensor) -> list[str]:
    """Why the C++ kernels cannot take this channel."""
    M, N = H.shape[-2:]
    found = common.size_reasons(M * N)
    for n in (M, N):
        if n <= common.LARGEST and (p := _largest_prime(int(n))) > LARGEST_PRIME:
            found.append(
                f"{n} has the prime factor {p}, above {LARGEST_PRIME} the library's transform is faster"
            )
    return found


def cpp_reasons(device: torch.device) -> list[str]:
    """Why the library cannot serve on this device; last, since it is loaded, or built, to be asked."""
    if device.type != "cpu":
        return [f"the C++ kernels run on the CPU, the tensors are on {device.type}"]
    return list(native.reasons("cpu"))


def gate_call_reasons(H: Tensor, **others: Tensor) -> list[str]:
    """Why no op can take this call."""
    found = [] if H.is_complex() else [f"H is {H.dtype}, only complex64 and complex128 are served"]
    return found + common.mixed_reasons(H=H, **others) + common.transform_reasons()


def _call_reasons(
    H: Tensor, row_w1: Tensor, row_w2: Tensor, col_w1: Tensor, col_w2: Tensor, *_: Any
) -> list[str]:
    return gate_call_reasons(H, row_w1=row_w1, row_w2=row_w2, col_w1=col_w1, col_w2=col_w2)


def _cpp_reasons(H: Tensor, *args: Any) -> list[str]:
    found = _call_reasons(H, *args) + cpu_gate_reasons(H)
    return found or cpp_reasons(H.device)


def _triton_reasons(H: Tensor, *args: Any) -> list[str]:
    return _call_reasons(H, *args) or common.single_triton_reasons("H", H)


def dense(*weights: Tensor) -> list[Tensor]:
    """Weights as the kernels read them."""
    return [w.resolve_neg().contiguous() for w in weights]


def _run(
    H: Tensor,
    row_w1: Tensor,
    row_w2: Tensor,
    col_w1: Tensor,
    col_w2: Tensor,
    temperature: float,
    normalize: bool,
) -> Any:
    weights = dense(row_w1, row_w2, col_w1, col_w2)
    Hd, norms = _call(common.planes(H), *weights, float(temperature), normalize)
    Hd = torch.view_as_complex(Hd)
    if H.ndim != 3:
        Hd = Hd.view(H.shape)
    return (Hd, norms.view(H.shape[:-2])) if normalize else Hd


def _eager(
    H: Tensor,
    row_w1: Tensor,
    row_w2: Tensor,
    col_w1: Tensor,
    col_w2: Tensor,
    temperature: float,
    normalize: bool,
) -> Any:
    return reference.freq_gate(H, row_w1, row_w2, col_w1, col_w2, temperature, normalize=normalize)


def nominal_gate(device: torch.device) -> tuple[Any, ...]:
    """Arguments of a typical gate."""
    H = torch.ones(1, 64, 64, dtype=torch.complex64, device=device)
    wide, tall = torch.ones(32, 64, device=device), torch.ones(64, 32, device=device)
    return H, wide, tall, wide, tall, 0.2


freq_gate = Op(
    "freq_gate",
    [
        Backend("triton", _triton_reasons, _run),
        Backend("cpp", _cpp_reasons, _run),
        Backend("eager", lambda *_: (), _eager),
    ],
    ("H", "row_w1", "row_w2", "col_w1", "col_w2", "temperature", "normalize"),
    lambda device: (*nominal_gate(device), False),
)
