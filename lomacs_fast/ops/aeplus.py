"""The AE+ loss as one op that leaves the gradients ready: schema, shapes, autograd, autocast, FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import reference
from ..reference import AEPlusTerms
from . import common, native
from .common import REAL, library
from .dispatch import Backend, Op

library.define(
    "aeplus(Tensor U, Tensor S, Tensor V, Tensor H, Tensor weights, bool mean, bool gu, bool gs, bool gv, "
    "bool gh) -> (Tensor loss, Tensor terms, Tensor gU, Tensor gS, Tensor gV, Tensor gH)",
    tags=common.TAGS,
)


@torch.library.register_fake("lomacs::aeplus", lib=library)
def _fake(
    U: Tensor,
    S: Tensor,
    V: Tensor,
    H: Tensor,
    weights: Tensor,
    mean: bool,
    gu: bool,
    gs: bool,
    gv: bool,
    gh: bool,
) -> tuple[Tensor, ...]:
    torch._check(
        S.ndim == 2 and H.ndim == 4, lambda: f"S must be (B, r), got {S.shape}; H (B, M, N, 2), got {H.shape}"
    )
    torch._check(S.dtype in REAL, lambda: f"S must be float32 or float64, got {S.dtype}")
    (B, r), (M, N) = S.shape, H.shape[1:3]
    for name, x, shape in (("U", U, (B, M, r, 2)), ("V", V, (B, N, r, 2)), ("H", H, (B, M, N, 2))):
        torch._check(x.shape == shape, lambda n=name, x=x, s=shape: f"{n} must be {s}, got {tuple(x.shape)}")
        torch._check(x.dtype == S.dtype, lambda n=name, x=x: f"{n} must be {S.dtype}, got {x.dtype}")
    right = weights.shape == (4,) and weights.dtype == torch.float64
    torch._check(right, lambda: f"weights must be float64 (4,), got {weights.dtype} {tuple(weights.shape)}")
    gradients = (x.new_empty(x.shape if g else (0,)) for x, g in ((U, gu), (S, gs), (V, gv), (H, gh)))
    return S.new_empty(()), S.new_empty((5,)), *gradients


NAMES = ("U", "S", "V", "H")
WHAT = "the fused AE+ loss"


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    for name, need, flag in zip(NAMES, ctx.needs_input_grad, inputs[6:], strict=False):
        if need and not flag:
            raise ValueError(f"{name} requires a gradient, so g{name.lower()} must be True")
    _, terms, *gradients = output
    ctx.mark_non_differentiable(terms, *gradients)
    # otherwise the engine fills zeros in place of the gradients of gU, gS, gV and gH
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(terms, *gradients)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    common.refuse_second_derivatives(WHAT)
    if grad is None:
        return (None,) * 10
    terms, *saved = ctx.saved_tensors
    needs = ctx.needs_input_grad
    weights = grad.double() * terms[1:].double() if needs[4] else None
    return (*common.scaled(grad, saved, needs[:4]), weights, None, None, None, None, None)


torch.library.register_autograd("lomacs::aeplus", _backward, setup_context=_setup, lib=library)
# half precision of the caller's becomes single; float64 stays
for _device in ("cpu", "cuda"):
    torch.library.register_autocast("lomacs::aeplus", _device, torch.float32, lib=library)


@register_flop_formula(torch.ops.lomacs.aeplus)
def _flops(
    U: Sequence[int],
    S: Sequence[int],
    V: Sequence[int],
    H: Sequence[int],
    weights: Sequence[int],
    mean: bool,
    gu: bool,
    gs: bool,
    gv: bool,
    gh: bool,
    *_: Any,
    **__: Any,
) -> int:
    """What `FlopCounterMode` counts on the reference, forward and the backward that the flags ask for.

    A complex product is one multiply-add. Forward: `U^H H`, `(U^H H) V`, `(U S) V^H`, `U^H U`, `V^H V`.
    """
    (B, r), (M, N) = S, H[1:3]
    large, right, left, core_u, core_v = r * M * N, r * r * N, r * N * M, r * r * M, r * r * N
    forward = left + right + large + core_u + core_v
    of_core = right * ((gu or gh) + gv) + left * (gu + gh)
    of_residual = large * ((gu or gs) + gv)
    return 2 * B * (forward + of_core + of_residual + 2 * core_u * gu + 2 * core_v * gv)


def _native(
    U: Tensor,
    S: Tensor,
    V: Tensor,
    H: Tensor,
    lam: Tensor | float,
    w_energy: Tensor | float,
    w_diag: Tensor | float,
    w_match: Tensor | float,
    match: str,
) -> tuple[Tensor, AEPlusTerms]:
    weights = common.scalars((lam, w_energy, w_diag, w_match), H.device)

    def evaluate(flags: Sequence[bool], U: Tensor, S: Tensor, V: Tensor, H: Tensor) -> tuple[Tensor, ...]:
        u, v, h, s = common.planes(U), common.planes(V), common.planes(H), common.rows(S)
        return torch.ops.lomacs.aeplus.default(u, s, v, h, weights, match == "mean", *flags)

    # the weights are differentiable by the registered op alone
    loss, terms = common.ready(evaluate, 2, WHAT, U, S, V, H, traced=weights.requires_grad)
    return loss, AEPlusTerms(*terms.unbind())


def _native_reasons(U: Tensor, S: Tensor, V: Tensor, H: Tensor, *_: Any) -> list[str]:
    found = []
    if not H.is_complex():
        found.append(f"H is {str(H.dtype).removeprefix('torch.')}, only complex64 and complex128 are served")
    found += common.mixed_reasons(U=U, S=S, V=V, H=H)
    (M, N), r = H.shape[-2:], S.shape[-1]
    found += common.size_reasons(M * N + (M + N) * r)
    found += common.transform_reasons()
    if H.device.type == "cuda":
        found += common.unproved_reasons("cpp", H.device)
    if not found:
        found += native.reasons(H.device.type)
    return found


def _eager(
    U: Tensor,
    S: Tensor,
    V: Tensor,
    H: Tensor,
    lam: Tensor | float,
    w_energy: Tensor | float,
    w_diag: Tensor | float,
    w_match: Tensor | float,
    match: str,
) -> tuple[Tensor, AEPlusTerms]:
    return reference.aeplus_loss(
        U, S, V, H, lam=lam, w_energy=w_energy, w_diag=w_diag, w_match=w_match, match=match
    )


def _nominal(device: torch.device) -> tuple[Any, ...]:
    def ones(*shape: int) -> Tensor:
        return torch.ones(shape, dtype=torch.complex64, device=device)

    return ones(1, 64, 32), ones(1, 32).real, ones(1, 64, 32), ones(1, 64, 64), 0.35, 0.4, 0.3, 0.3, "mean"


aeplus_loss = Op(
    "aeplus_loss",
    [Backend("cpp", _native_reasons, _native), Backend("eager", lambda *_: (), _eager)],
    ("U", "S", "V", "H", "lam", "w_energy", "w_diag", "w_match", "match"),
    _nominal,
)
