"""Spectral calibration and the network's tail as ops: schema, shapes, autograd, autocast, FLOPs, backends."""

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
from .ortho import check_like, complex_of, flops_of_refine, gradient, native_reasons, triton_reasons

library.define(
    "spectral_calibrate(Tensor U, Tensor H, Tensor V, Tensor S_pred, Tensor tau) -> Tensor", tags=common.TAGS
)
library.define(
    "spectral_calibrate_backward(Tensor g, Tensor U, Tensor H, Tensor V, Tensor S_pred, Tensor tau, bool gu, "
    "bool gh, bool gv) -> (Tensor gU, Tensor gH, Tensor gV, Tensor gS, Tensor gtau)",
    tags=common.TAGS,
)
library.define(
    "svd_tail(Tensor U_raw, Tensor V_raw, Tensor S_pred, Tensor H, Tensor scalars) "
    "-> (Tensor U, Tensor S, Tensor V)",
    tags=common.TAGS,
)
library.define(
    "svd_tail_backward(Tensor gU, Tensor gS, Tensor gV, Tensor U_raw, Tensor V_raw, Tensor S_pred, Tensor H, "
    "Tensor scalars, bool gh) -> (Tensor gU_raw, Tensor gV_raw, Tensor gS_pred, Tensor gH, Tensor gscalars)",
    tags=common.TAGS,
)
# residuals and norms of both refinements, H V and the measured diagonal: with U and V what the gradients need
library.define(
    "svd_tail_kept(Tensor U_raw, Tensor V_raw, Tensor S_pred, Tensor H, Tensor scalars) "
    "-> (Tensor U, Tensor S, Tensor V, Tensor kept)",
    tags=common.TAGS,
)
library.define(
    "svd_tail_kept_backward(Tensor gU, Tensor gS, Tensor gV, Tensor U_raw, Tensor V_raw, Tensor S_pred, "
    "Tensor H, Tensor scalars, Tensor U, Tensor V, Tensor kept, bool gh) "
    "-> (Tensor gU_raw, Tensor gV_raw, Tensor gS_pred, Tensor gH, Tensor gscalars)",
    tags=common.TAGS,
)


def _check_problem(S_pred: Tensor, H: Tensor, left: tuple[str, Tensor], right: tuple[str, Tensor]) -> None:
    torch._check(S_pred.ndim == 2, lambda: f"S_pred must be (B, r), got {tuple(S_pred.shape)}")
    torch._check(H.ndim == 4, lambda: f"H must be (B, M, N, 2), got {tuple(H.shape)}")
    torch._check(S_pred.dtype in REAL, lambda: f"S_pred must be float32 or float64, got {S_pred.dtype}")
    (B, r), (M, N) = S_pred.shape, H.shape[1:3]
    check_like("H", H, (B, M, N, 2), "S_pred", S_pred)
    for (name, x), rows in ((left, M), (right, N)):
        check_like(name, x, (B, rows, r, 2), "S_pred", S_pred)


def _check_tau(tau: Tensor) -> None:
    right = tau.ndim < 2 and tau.numel() == 1 and tau.dtype == torch.float64
    torch._check(right, lambda: f"tau must be float64, 0-d or (1,), got {tau.dtype} {tuple(tau.shape)}")


def _check_scalars(scalars: Tensor) -> None:
    right = scalars.shape == (3,) and scalars.dtype == torch.float64
    torch._check(right, lambda: f"scalars must be float64 (3,), got {scalars.dtype} {tuple(scalars.shape)}")


@torch.library.register_fake("lomacs::spectral_calibrate", lib=library)
def _fake_calibrate(U: Tensor, H: Tensor, V: Tensor, S_pred: Tensor, tau: Tensor) -> Tensor:
    _check_problem(S_pred, H, ("U", U), ("V", V))
    _check_tau(tau)
    return S_pred.new_empty(S_pred.shape)


@torch.library.register_fake("lomacs::spectral_calibrate_backward", lib=library)
def _fake_calibrate_backward(
    g: Tensor,
    U: Tensor,
    H: Tensor,
    V: Tensor,
    S_pred: Tensor,
    tau: Tensor,
    gu: bool,
    gh: bool,
    gv: bool,
) -> tuple[Tensor, ...]:
    _check_problem(S_pred, H, ("U", U), ("V", V))
    _check_tau(tau)
    check_like("g", g, S_pred.shape, "S_pred", S_pred)
    wanted = ((U, gu), (H, gh), (V, gv), (S_pred, True), (tau, True))
    return tuple(x.new_empty(x.shape if want else (0,)) for x, want in wanted)


@torch.library.register_fake("lomacs::svd_tail", lib=library)
def _fake_tail(
    U_raw: Tensor, V_raw: Tensor, S_pred: Tensor, H: Tensor, scalars: Tensor
) -> tuple[Tensor, ...]:
    _check_problem(S_pred, H, ("U_raw", U_raw), ("V_raw", V_raw))
    _check_scalars(scalars)
    return tuple(x.new_empty(x.shape) for x in (U_raw, S_pred, V_raw))


@torch.library.register_fake("lomacs::svd_tail_backward", lib=library)
def _fake_tail_backward(
    gU: Tensor,
    gS: Tensor,
    gV: Tensor,
    U_raw: Tensor,
    V_raw: Tensor,
    S_pred: Tensor,
    H: Tensor,
    scalars: Tensor,
    gh: bool,
) -> tuple[Tensor, ...]:
    _check_problem(S_pred, H, ("U_raw", U_raw), ("V_raw", V_raw))
    _check_scalars(scalars)
    for name, g, x in (("gU", gU, U_raw), ("gS", gS, S_pred), ("gV", gV, V_raw)):
        check_like(name, g, x.shape, "S_pred", S_pred)
    wanted = ((U_raw, True), (V_raw, True), (S_pred, True), (H, gh), (scalars, True))
    return tuple(x.new_empty(x.shape if want else (0,)) for x, want in wanted)


def _kept_shape(U_raw: Tensor) -> tuple[int, int]:
    B, M, r = U_raw.shape[:3]
    return B, 2 * common.upper_half(r) + 2 * M * r + 10 * r


@torch.library.register_fake("lomacs::svd_tail_kept", lib=library)
def _fake_tail_kept(U_raw: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    return (*_fake_tail(U_raw, *rest), U_raw.new_empty(_kept_shape(U_raw)))


@torch.library.register_fake("lomacs::svd_tail_kept_backward", lib=library)
def _fake_tail_kept_backward(
    gU: Tensor,
    gS: Tensor,
    gV: Tensor,
    U_raw: Tensor,
    V_raw: Tensor,
    S_pred: Tensor,
    H: Tensor,
    scalars: Tensor,
    U: Tensor,
    V: Tensor,
    kept: Tensor,
    gh: bool,
) -> tuple[Tensor, ...]:
    found = _fake_tail_backward(gU, gS, gV, U_raw, V_raw, S_pred, H, scalars, gh)
    for name, x, shape in (
        ("U", U, U_raw.shape),
        ("V", V, V_raw.shape),
        ("kept", kept, _kept_shape(U_raw)),
    ):
        check_like(name, x, shape, "S_pred", S_pred)
    return found


def _setup_calibrate(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_calibrate(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    common.refuse_second_derivatives("the fused spectral calibration")
    U, H, V, S_pred, tau = ctx.saved_tensors
    needs = ctx.needs_input_grad
    found = torch.ops.lomacs.spectral_calibrate_backward.default(
        gradient(g, S_pred), U, H, V, S_pred, tau, *needs[:3]
    )
    return tuple(x if need else None for x, need in zip(found, needs, strict=True))


def _setup_tail(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _backward_tail(
    ctx: Any, gU: Tensor | None, gS: Tensor | None, gV: Tensor | None
) -> tuple[Tensor | None, ...]:
    common.refuse_second_derivatives("the fused tail of the network")
    U_raw, V_raw, S_pred, H, scalars = ctx.saved_tensors
    needs = ctx.needs_input_grad
    found = torch.ops.lomacs.svd_tail_backward.default(
        gradient(gU, U_raw),
        gradient(gS, S_pred),
        gradient(gV, V_raw),
        U_raw,
        V_raw,
        S_pred,
        H,
        scalars,
        needs[3],
    )
    return tuple(x if need else None for x, need in zip(found, needs, strict=True))


def _setup_tail_kept(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    U, _, V, kept = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(kept)
    ctx.save_for_backward(*inputs, U, V, kept)


def _backward_tail_kept(
    ctx: Any, gU: Tensor | None, gS: Tensor | None, gV: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    common.refuse_second_derivatives("the fused tail of the network")
    U_raw, V_raw, S_pred, *rest = ctx.saved_tensors
    needs = ctx.needs_input_grad
    found = torch.ops.lomacs.svd_tail_kept_backward.default(
        gradient(gU, U_raw),
        gradient(gS, S_pred),
        gradient(gV, V_raw),
        U_raw,
        V_raw,
        S_pred,
        *rest,
        needs[3],
    )
    return tuple(x if need else None for x, need in zip(found, needs, strict=True))


_call = common.differentiable("spectral_calibrate", _setup_calibrate, _backward_calibrate)
_call_tail = common.differentiable("svd_tail", _setup_tail, _backward_tail)
_call_tail_kept = common.differentiable("svd_tail_kept", _setup_tail_kept, _backward_tail_kept)
for _name in (
    "spectral_calibrate",
    "spectral_calibrate_backward",
    "svd_tail",
    "svd_tail_backward",
    "svd_tail_kept",
    "svd_tail_kept_backward",
):
    # half precision of the caller's becomes single; float64 stays
    for _device in ("cpu", "cuda"):
        torch.library.register_autocast(f"lomacs::{_name}", _device, torch.float32, lib=library)


@register_flop_formula(torch.ops.lomacs.spectral_calibrate)
def _flops_calibrate(U: Sequence[int], H: Sequence[int], V: Sequence[int], *_: Any, **__: Any) -> int:
    """What `FlopCounterMode` counts on the reference: `U^H H` and `(U^H H) V`, a complex product as one."""
    (B, M, r, _two), N = U, V[1]
    return 2 * B * (r * M * N + r * r * N)


@register_flop_formula(torch.ops.lomacs.spectral_calibrate_backward)
def _flops_calibrate_backward(
    g: Sequence[int],
    U: Sequence[int],
    H: Sequence[int],
    V: Sequence[int],
    S_pred: Sequence[int],
    tau: Sequence[int],
    gu: bool,
    gh: bool,
    gv: bool,
    *_: Any,
    **__: Any,
) -> int:
    """What `FlopCounterMode` counts on the reference for the gradients that are asked for."""
    (B, M, r, _two), N = U, V[1]
    return 2 * B * (r * M * N * (gu + gh) + r * r * N * ((gu or gh) + gv))


@register_flop_formula([torch.ops.lomacs.svd_tail, torch.ops.lomacs.svd_tail_kept])
def _flops_tail(
    U_raw: Sequence[int], V_raw: Sequence[int], S_pred: Sequence[int], H: Sequence[int], *_: Any, **__: Any
) -> int:
    """What `FlopCounterMode` counts on the reference: both refinements and the calibration."""
    return flops_of_refine(U_raw, V_raw, (2,)) + _flops_calibrate(U_raw, H, V_raw)


@register_flop_formula([torch.ops.lomacs.svd_tail_backward, torch.ops.lomacs.svd_tail_kept_backward])
def _flops_tail_backward(
    gU: Sequence[int],
    gS: Sequence[int],
    gV: Sequence[int],
    U_raw: Sequence[int],
    V_raw: Sequence[int],
    S_pred: Sequence[int],
    H: Sequence[int],
    *rest: Any,
    **__: Any,
) -> int:
    """What `FlopCounterMode` counts on the reference where all but H ask."""
    of_diagonal = _flops_calibrate_backward(gS, U_raw, H, V_raw, S_pred, (1,), True, rest[-1], True)
    return 2 * flops_of_refine(U_raw, V_raw, (2,)) + of_diagonal


@torch.library.impl("lomacs::spectral_calibrate", "CUDA", lib=library)
def _cuda_calibrate(U: Tensor, H: Tensor, V: Tensor, S_pred: Tensor, tau: Tensor) -> Any:
    from ..kernels import spectral

    return spectral.spectral_calibrate(U, H, V, S_pred, tau)


@torch.library.impl("lomacs::spectral_calibrate_backward", "CUDA", lib=library)
def _cuda_calibrate_backward(
    g: Tensor,
    U: Tensor,
    H: Tensor,
    V: Tensor,
    S_pred: Tensor,
    tau: Tensor,
    gu: bool,
    gh: bool,
    gv: bool,
) -> Any:
    from ..kernels import spectral

    return spectral.spectral_calibrate_backward(g, U, H, V, S_pred, tau, gu, gh, gv)


@torch.library.impl("lomacs::svd_tail", "CUDA", lib=library)
def _cuda_tail(U_raw: Tensor, V_raw: Tensor, S_pred: Tensor, H: Tensor, scalars: Tensor) -> Any:
    from ..kernels import svd_tail

    return svd_tail.svd_tail(U_raw, V_raw, S_pred, H, scalars)


@torch.library.impl("lomacs::svd_tail_backward", "CUDA", lib=library)
def _cuda_tail_backward(
    gU: Tensor,
    gS: Tensor,
    gV: Tensor,
    U_raw: Tensor,
    V_raw: Tensor,
    S_pred: Tensor,
    H: Tensor,
    scalars: Tensor,
    gh: bool,
) -> Any:
    from ..kernels import svd_tail

    return svd_tail.svd_tail_backward(gU, gS, gV, U_raw, V_raw, S_pred, H, scalars, gh)


@torch.library.impl("lomacs::svd_tail_kept", "CUDA", lib=library)
def _cuda_tail_kept(U_raw: Tensor, V_raw: Tensor, S_pred: Tensor, H: Tensor, scalars: Tensor) -> Any:
    from ..kernels import tail_tiles

    return tail_tiles.svd_tail_kept(U_raw, V_raw, S_pred, H, scalars, _kept_shape(U_raw)[1])


@torch.library.impl("lomacs::svd_tail_kept_backward", "CUDA", lib=library)
def _cuda_tail_kept_backward(
    gU: Tensor,
    gS: Tensor,
    gV: Tensor,
    U_raw: Tensor,
    V_raw: Tensor,
    S_pred: Tensor,
    H: Tensor,
    scalars: Tensor,
    U: Tensor,
    V: Tensor,
    kept: Tensor,
    gh: bool,
) -> Any:
    from ..kernels import tail_tiles

    return tail_tiles.svd_tail_backward(gU, gS, gV, U_raw, V_raw, S_pred, H, scalars, gh, (U, V, kept))


Scalar = Tensor | float


def _calibrate(U: Tensor, H: Tensor, V: Tensor, S_pred: Tensor, tau: Scalar) -> Tensor:
    u, h, v = common.planes(U), common.planes(H), common.planes(V)
    S: Tensor = _call(u, h, v, common.rows(S_pred), common.scalars((tau,), H.device))
    return S.reshape(S_pred.shape)


def _by_tiles(H: Tensor, S_pred: Tensor) -> bool:
    """Whether the kernels of large factors serve, which can keep what their gradients need."""
    from ..kernels.ortho import FASTER

    return max(H.shape[-2:]) * S_pred.shape[-1] > FASTER


def _tail(
    U_raw: Tensor, V_raw: Tensor, S_pred: Tensor, H: Tensor, a: Scalar, b: Scalar, tau: Scalar
) -> tuple[Tensor, Tensor, Tensor]:
    u, v, h = common.planes(U_raw), common.planes(V_raw), common.planes(H)
    arguments = u, v, common.rows(S_pred), h, common.scalars((a, b, tau), H.device)
    if common.records(arguments) and (H.device.type == "cpu" or _by_tiles(H, S_pred)):
        U, S, V, _ = _call_tail_kept(*arguments)
    else:
        U, S, V = _call_tail(*arguments)
    return complex_of(U, U_raw.shape), S.reshape(S_pred.shape), complex_of(V, V_raw.shape)


def _size(U: Tensor, V: Tensor, H: Tensor) -> int:
    (M, N), r = H.shape[-2:], U.shape[-1]
    return M * N + (M + N) * r


def _nominal_calibrate(device: torch.device) -> tuple[Any, ...]:
    def ones(*shape: int) -> Tensor:
        return torch.ones(shape, dtype=torch.complex64, device=device)

    return ones(1, 64, 32), ones(1, 64, 64), ones(1, 64, 32), ones(1, 32).real, 0.9


def _nominal_tail(device: torch.device) -> tuple[Any, ...]:
    U, H, V, S_pred, tau = _nominal_calibrate(device)
    return U, V, S_pred, H, 0.1, 0.1, tau


# capabilities of the devices that have run the tail of large factors, `kernels/tail_tiles.py`
TILED = common.NOWHERE

spectral_calibrate = Op(
    "spectral_calibrate",
    [
        Backend(
            "triton", lambda U, H, V, S_pred, _: triton_reasons(U=U, H=H, V=V, S_pred=S_pred), _calibrate
        ),
        Backend(
            "cpp",
            lambda U, H, V, S_pred, _: native_reasons(_size(U, V, H), U=U, H=H, V=V, S_pred=S_pred),
            _calibrate,
        ),
        Backend("eager", lambda *_: (), reference.spectral_calibrate),
    ],
    ("U", "H", "V", "S_pred", "tau"),
    _nominal_calibrate,
)
svd_tail = Op(
    "svd_tail",
    [
        Backend(
            "triton", lambda U, V, S, H, *_: triton_reasons(TILED, U_raw=U, V_raw=V, S_pred=S, H=H), _tail
        ),
        Backend(
            "cpp",
            lambda U, V, S, H, *_: native_reasons(_size(U, V, H), U_raw=U, V_raw=V, S_pred=S, H=H),
            _tail,
        ),
        Backend("eager", lambda *_: (), reference.svd_tail),
    ],
    ("U_raw", "V_raw", "S_pred", "H", "a", "b", "tau"),
    _nominal_tail,
)
