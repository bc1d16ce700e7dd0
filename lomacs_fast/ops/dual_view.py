"""The dual view's projection, and the gate with it: schema, shapes, autograd, autocast, FLOPs, backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import reference
from . import common, freq_gate
from .common import REAL, library
from .dispatch import Backend, Op

PROJECTION = "Tensor weight, Tensor bias, Tensor pos"
library.define(f"dual_view_project(Tensor Hd, {PROJECTION}) -> Tensor X", tags=common.TAGS)
library.define(
    "dual_view_project_backward(Tensor gX, Tensor Hd, Tensor weight, bool gh, bool gw) -> "
    "(Tensor gHd, Tensor gweight, Tensor gbias, Tensor gpos)",
    tags=common.TAGS,
)
library.define(
    f"gate_project(Tensor H, {freq_gate.WEIGHTS}, {PROJECTION}) -> (Tensor X, Tensor Hd, Tensor norms)",
    tags=common.TAGS,
)
# the gradients of Hd, by the tokens and its own, meet inside
library.define(
    f"gate_project_backward(Tensor gX, Tensor? gHd, Tensor? gnorms, Tensor H, {freq_gate.WEIGHTS}, "
    "Tensor weight, Tensor Hd, bool gh, bool of_gate, bool of_projection) -> (Tensor gH, Tensor gr1, "
    "Tensor gr2, Tensor gc1, Tensor gc2, Tensor gweight, Tensor gbias, Tensor gpos)",
    tags=common.TAGS,
)
# where H wants no gradient: the spectrum times the slope of the gate, and what both perceptrons read
library.define(
    f"gate_project_kept(Tensor H, {freq_gate.WEIGHTS}, {PROJECTION}) "
    "-> (Tensor X, Tensor Hd, Tensor norms, Tensor kept)",
    tags=common.TAGS,
)
library.define(
    "gate_project_kept_backward(Tensor gX, Tensor? gHd, Tensor row_w2, Tensor col_w2, float temperature, "
    "Tensor weight, Tensor Hd, Tensor kept, bool of_projection) -> (Tensor gr1, Tensor gr2, Tensor gc1, "
    "Tensor gc2, Tensor gweight, Tensor gbias, Tensor gpos)",
    tags=common.TAGS,
)


def _check(name: str, Hd: Tensor, weight: Tensor, *others: Tensor) -> tuple[int, int, int]:
    """B, M and d of a projection's arguments, checked; in traced code too."""
    torch._check(
        Hd.ndim == 4 and Hd.shape[3] == 2,
        lambda: f"{name} must have shape (B, M, N, 2), got {tuple(Hd.shape)}",
    )
    torch._check(Hd.dtype in REAL, lambda: f"{name} must be float32 or float64, got {Hd.dtype}")
    B, M, N = Hd.shape[:3]
    torch._check(M > 1 and N > 1, lambda: f"{name} must be at least 2 x 2, got {M} x {N}")
    torch._check(weight.ndim == 2, lambda: f"weight must have 2 dimensions, got {tuple(weight.shape)}")
    d = weight.shape[0]
    shapes = {"weight": (d, 4 * N), "bias": (d,), "pos": (1, M, d)}
    for (own, shape), x in zip(shapes.items(), (weight, *others), strict=False):
        torch._check(x.shape == shape, lambda n=own, x=x, s=shape: f"{n} must be {s}, got {tuple(x.shape)}")
        torch._check(x.dtype == Hd.dtype, lambda n=own, x=x: f"{n} must be {Hd.dtype}, got {x.dtype}")
    return B, M, d


@torch.library.register_fake("lomacs::dual_view_project", lib=library)
def _fake(Hd: Tensor, weight: Tensor, bias: Tensor, pos: Tensor) -> Tensor:
    return Hd.new_empty(_check("Hd", Hd, weight, bias, pos))


@torch.library.register_fake("lomacs::dual_view_project_backward", lib=library)
def _fake_backward(gX: Tensor, Hd: Tensor, weight: Tensor, gh: bool, gw: bool) -> tuple[Tensor, ...]:
    B, M, d = _check("Hd", Hd, weight)
    torch._check(gX.shape == (B, M, d), lambda: f"gX must be {(B, M, d)}, got {tuple(gX.shape)}")
    shapes = (weight.shape, (d,), (1, M, d))
    return Hd.new_empty(Hd.shape if gh else (0,)), *(Hd.new_empty(s if gw else (0,)) for s in shapes)


@torch.library.register_fake("lomacs::gate_project", lib=library)
def _fake_front(
    H: Tensor,
    row_w1: Tensor,
    row_w2: Tensor,
    col_w1: Tensor,
    col_w2: Tensor,
    temperature: float,
    normalize: bool,
    weight: Tensor,
    bias: Tensor,
    pos: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    freq_gate.check_gate(H, row_w1, row_w2, col_w1, col_w2, temperature)
    shape = _check("H", H, weight, bias, pos)
    return H.new_empty(shape), H.new_empty(H.shape), H.new_empty((H.shape[0] if normalize else 0,))


@torch.library.register_fake("lomacs::gate_project_backward", lib=library)
def _fake_front_backward(
    gX: Tensor,
    gHd: Tensor | None,
    gnorms: Tensor | None,
    H: Tensor,
    row_w1: Tensor,
    row_w2: Tensor,
    col_w1: Tensor,
    col_w2: Tensor,
    temperature: float,
    normalize: bool,
    weight: Tensor,
    Hd: Tensor,
    gh: bool,
    of_gate: bool,
    of_projection: bool,
) -> tuple[Tensor, ...]:
    gate = row_w1, row_w2, col_w1, col_w2
    freq_gate.check_gate(H, *gate, temperature)
    for name, x in (("Hd", Hd), ("gHd", gHd)):
        fits = x is None or x.shape == H.shape
        torch._check(fits, lambda n=name, x=x: f"{n} must be {tuple(H.shape)}, got {tuple(x.shape)}")
    _, *of_weights = _fake_backward(gX, Hd, weight, False, of_projection)
    of_gates = (w.new_empty(w.shape if of_gate else (0,)) for w in gate)
    return H.new_empty(H.shape if gh else (0,)), *of_gates, *of_weights


def _kept_shape(H: Tensor, row_w2: Tensor, col_w2: Tensor) -> tuple[int, int]:
    B, M, N = H.shape[:3]
    M, *rest = ((n + 15) // 16 * 16 for n in (M, N, row_w2.shape[1], col_w2.shape[1]))
    return B, 2 * M * N + M + sum(rest) + 16


@torch.library.register_fake("lomacs::gate_project_kept", lib=library)
def _fake_kept(H: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return *_fake_front(H, *args), H.new_empty(_kept_shape(H, args[1], args[3]))


@torch.library.register_fake("lomacs::gate_project_kept_backward", lib=library)
def _fake_kept_backward(
    gX: Tensor,
    gHd: Tensor | None,
    row_w2: Tensor,
    col_w2: Tensor,
    temperature: float,
    weight: Tensor,
    Hd: Tensor,
    kept: Tensor,
    of_projection: bool,
) -> tuple[Tensor, ...]:
    _, *of_weights = _fake_backward(gX, Hd, weight, False, of_projection)
    freq_gate.check_gate(Hd, row_w2.mT, row_w2, col_w2.mT, col_w2, temperature)
    for name, x, shape in (("gHd", gHd, Hd.shape), ("kept", kept, _kept_shape(Hd, row_w2, col_w2))):
        fits = x is None or x.shape == shape
        torch._check(fits, lambda n=name, x=x, s=shape: f"{n} must be {tuple(s)}, got {tuple(x.shape)}")
    of_gates = (w.new_empty(shape) for w in (row_w2, col_w2) for shape in (w.shape[::-1], w.shape))
    return *of_gates, *of_weights


@torch.library.impl("lomacs::dual_view_project", "CUDA", lib=library)
def _on_cuda(*args: Any) -> Tensor:
    from ..kernels import dual_view as kernels

    return kernels.dual_view_project(*args)


@torch.library.impl("lomacs::dual_view_project_backward", "CUDA", lib=library)
def _backward_on_cuda(gX: Tensor, Hd: Tensor, weight: Tensor, gh: bool, gw: bool) -> tuple[Tensor, ...]:
    from ..kernels import dual_view as kernels

    return kernels.dual_view_project_backward(gX, Hd, weight, gh, gw)


@torch.library.impl("lomacs::gate_project", "CUDA", lib=library)
def _front_on_cuda(*args: Any) -> tuple[Tensor, ...]:
    from ..kernels import freq_gate as kernels

    return kernels.gate_project(*args)


@torch.library.impl("lomacs::gate_project_backward", "CUDA", lib=library)
def _front_backward_on_cuda(
    gX: Tensor, gHd: Tensor | None, gnorms: Tensor | None, H: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    from ..kernels import dual_view, freq_gate

    *gate, weight, Hd, gh, of_gate, of_projection = args
    whole, *of_weights = dual_view.dual_view_project_backward(gX, Hd, weight, True, of_projection)
    if gHd is not None:
        whole.add_(gHd)
    return *freq_gate.freq_gate_backward(whole, gnorms, H, *gate, gh, of_gate), *of_weights


def _project_backward(
    needs: Sequence[bool], gX: Tensor | None, Hd: Tensor, weight: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of Hd, weight, bias and pos, None where `needs` wants none."""
    gh, gw = needs[0], any(needs[1:4])
    if gX is None or not (gh or gw):
        return (None,) * 4
    gradients = torch.ops.lomacs.dual_view_project_backward(gX.contiguous(), Hd, weight, gh, gw)
    return tuple(g if need else None for g, need in zip(gradients, needs, strict=True))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    Hd, weight, *_ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(Hd, weight)


def _backward(ctx: Any, gX: Tensor | None) -> tuple[Tensor | None, ...]:
    common.refuse_second_derivatives("the fused projection of both views")
    return _project_backward(ctx.needs_input_grad[:4], gX, *ctx.saved_tensors)


def _front_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *gate, ctx.temperature, ctx.normalize, weight, _, _ = inputs
    if not ctx.normalize:
        ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*gate, weight, output[1])


def _front_backward(
    ctx: Any, gX: Tensor | None, gHd: Tensor | None, gnorms: Tensor | None
) -> tuple[Tensor | None, ...]:
    common.refuse_second_derivatives("the fused front")
    return _front_gradients(ctx, ctx.saved_tensors, gX, gHd, gnorms)


def _front_gradients(
    ctx: Any, saved: Sequence[Tensor], gX: Tensor | None, gHd: Tensor | None, gnorms: Tensor | None
) -> tuple[Tensor | None, ...]:
    H, *weights, weight, Hd = saved
    needs = ctx.needs_input_grad
    of_gate, of_projection = needs[:5], needs[7:10]
    scalars = ctx.temperature, ctx.normalize
    if gX is None or not any(of_gate):
        found = freq_gate.gate_backward(of_gate, gHd, gnorms, H, weights, *scalars)
        return *found, None, None, *_project_backward((False, *of_projection), gX, Hd, weight)[1:]
    gHd = None if gHd is None else gHd.contiguous()
    gnorms = None if gnorms is None or not ctx.normalize else gnorms.contiguous()
    wanted = needs[0], any(needs[1:5]), any(of_projection)
    gradients = torch.ops.lomacs.gate_project_backward(
        gX.contiguous(), gHd, gnorms, H, *weights, *scalars, weight, Hd, *wanted
    )
    every = [g if need else None for g, need in zip(gradients, (*of_gate, *of_projection), strict=True)]
    return *every[:5], None, None, *every[5:]


def _kept_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *gate, ctx.temperature, ctx.normalize, weight, _, _ = inputs
    _, Hd, norms, kept = output
    ctx.mark_non_differentiable(*(kept,) if ctx.normalize else (norms, kept))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*gate, weight, Hd, kept)


def _kept_backward(
    ctx: Any, gX: Tensor | None, gHd: Tensor | None, gnorms: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    common.refuse_second_derivatives("the fused front")
    *saved, kept = ctx.saved_tensors
    needs = ctx.needs_input_grad
    of_gate, of_projection = needs[1:5], needs[7:10]
    if gX is None or needs[0] or not any(of_gate):
        return _front_gradients(ctx, saved, gX, gHd, gnorms)
    _, _, row_w2, _, col_w2, weight, Hd = saved
    gradients = torch.ops.lomacs.gate_project_kept_backward(
        gX.contiguous(),
        None if gHd is None else gHd.contiguous(),
        *(row_w2, col_w2, ctx.temperature, weight, Hd, kept, any(of_projection)),
    )
    every = [g if need else None for g, need in zip(gradients, (*of_gate, *of_projection), strict=True)]
    return None, *every[:4], None, None, *every[4:]


_call = common.differentiable("dual_view_project", _setup, _backward)
_call_front = common.differentiable("gate_project", _front_setup, _front_backward)
_call_front_kept = common.differentiable("gate_project_kept", _kept_setup, _kept_backward)
# Hd is complex: half precision of the caller's becomes single
for _device in ("cpu", "cuda"):
    for _name in (
        "dual_view_project",
        "dual_view_project_backward",
        "gate_project",
        "gate_project_backward",
        "gate_project_kept",
        "gate_project_kept_backward",
    ):
        torch.library.register_autocast(f"lomacs::{_name}", _device, torch.float32, lib=library)


@register_flop_formula(torch.ops.lomacs.dual_view_project)
def _flops(Hd: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """What `FlopCounterMode` counts on the reference: the product with the weight."""
    return 2 * Hd[0] * Hd[1] * weight[0] * weight[1]


@register_flop_formula(torch.ops.lomacs.dual_view_project_backward)
def _backward_flops(gX: Any, Hd: Any, weight: Any, gh: bool, gw: bool, *_: Any, **__: Any) -> int:
    return _flops(Hd, weight) * (gh + gw)


@register_flop_formula(torch.ops.lomacs.gate_project_backward)
def _front_backward_flops(gX: Any, gHd: Any, gnorms: Any, H: Any, *args: Any, **__: Any) -> int:
    row_w1, _, col_w1, _, _, _, weight, _, gh, of_gate, of_projection, *_ = args
    return freq_gate.gate_flops(H, row_w1, col_w1, 1 + gh + 2 * of_gate) + _flops(H, weight) * (
        1 + of_projection
    )


@register_flop_formula(torch.ops.lomacs.gate_project_kept_backward)
def _kept_backward_flops(
    gX: Any,
    gHd: Any,
    row_w2: Any,
    col_w2: Any,
    temperature: float,
    weight: Any,
    Hd: Any,
    kept: Any,
    *rest: Any,
    **__: Any,
) -> int:
    return freq_gate.gate_flops(Hd, row_w2, col_w2, 3) + _flops(Hd, weight) * (1 + rest[0])


@register_flop_formula([torch.ops.lomacs.gate_project, torch.ops.lomacs.gate_project_kept])
def _front_flops(
    H: Any,
    row_w1: Any,
    row_w2: Any,
    col_w1: Any,
    col_w2: Any,
    temperature: float,
    normalize: bool,
    weight: Any,
    *_: Any,
    **__: Any,
) -> int:
    return freq_gate.gate_flops(H, row_w1, col_w1, 2) + _flops(H, weight)


def _call_reasons(Hd: Tensor, weight: Tensor, bias: Tensor, pos: Tensor) -> list[str]:
    found = [] if Hd.is_complex() else [f"Hd is {Hd.dtype}, only complex64 and complex128 are served"]
    found += common.mixed_reasons(Hd=Hd, weight=weight, bias=bias, pos=pos)
    return found + common.transform_reasons()


def _cpp_reasons(*args: Tensor) -> list[str]:
    return _call_reasons(*args) or freq_gate.cpp_reasons(args[0].device)


def _triton_reasons(*args: Tensor) -> list[str]:
    return _call_reasons(*args) or common.single_triton_reasons("Hd", args[0])


def _run(Hd: Tensor, weight: Tensor, bias: Tensor, pos: Tensor) -> Tensor:
    found: Tensor = _call(common.planes(Hd), *freq_gate.dense(weight, bias, pos))
    return found


def _nominal_projection(device: torch.device) -> tuple[Tensor, ...]:
    return tuple(torch.ones(shape, device=device) for shape in ((64, 256), (64,), (1, 64, 64)))


dual_view_project = Op(
    "dual_view_project",
    [
        Backend("triton", _triton_reasons, _run),
        Backend("cpp", _cpp_reasons, _run),
        Backend("eager", lambda *_: (), reference.dual_view_project),
    ],
    ("Hd", "weight", "bias", "pos"),
    lambda device: (freq_gate.nominal_gate(device)[0], *_nominal_projection(device)),
)


def _front_call_reasons(
    H: Tensor,
    row_w1: Tensor,
    row_w2: Tensor,
    col_w1: Tensor,
    col_w2: Tensor,
    temperature: float,
    weight: Tensor,
    bias: Tensor,
    pos: Tensor,
    *_: Any,
) -> list[str]:
    gate = {"row_w1": row_w1, "row_w2": row_w2, "col_w1": col_w1, "col_w2": col_w2}
    return freq_gate.gate_call_reasons(H, **gate, weight=weight, bias=bias, pos=pos)


def _front_cpp_reasons(H: Tensor, *args: Any) -> list[str]:
    found = _front_call_reasons(H, *args) + freq_gate.cpu_gate_reasons(H)
    return found or freq_gate.cpp_reasons(H.device)


def _front_triton_reasons(H: Tensor, *args: Any) -> list[str]:
    return _front_call_reasons(H, *args) or common.single_triton_reasons("H", H)


def _front(
    H: Tensor,
    row_w1: Tensor,
    row_w2: Tensor,
    col_w1: Tensor,
    col_w2: Tensor,
    temperature: float,
    weight: Tensor,
    bias: Tensor,
    pos: Tensor,
    normalize: bool,
) -> tuple[Tensor, ...]:
    gate = freq_gate.dense(row_w1, row_w2, col_w1, col_w2)
    projection = freq_gate.dense(weight, bias, pos)
    arguments = common.planes(H), *gate, float(temperature), normalize, *projection
    # gradients of H read all that is computed again
    if H.device.type == "cpu" and common.records(gate) and not H.requires_grad:
        X, Hd, norms, _ = _call_front_kept(*arguments)
    else:
        X, Hd, norms = _call_front(*arguments)
    Hd = torch.view_as_complex(Hd)
    return (X, Hd, norms) if normalize else (X, Hd)


def _front_eager(*args: Any) -> tuple[Tensor, ...]:
    return reference.gate_project(*args[:-1], normalize=args[-1])


gate_project = Op(
    "gate_project",
    [
        Backend("triton", _front_triton_reasons, _front),
        Backend("cpp", _front_cpp_reasons, _front),
        Backend("eager", lambda *_: (), _front_eager),
    ],
    (
        *("H", "row_w1", "row_w2", "col_w1", "col_w2"),
        *("temperature", "weight", "bias", "pos", "normalize"),
    ),
    lambda device: (*freq_gate.nominal_gate(device), *_nominal_projection(device), False),
)
