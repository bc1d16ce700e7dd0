"""Refinement of an SVD as op: schema, shapes, autograd, autocast, FLOPs, backends."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import reference
from ..reference import refine as formula
from ..reference.refine_products import products
from . import common
from .common import REAL, library
from .dispatch import Backend, Op
from .ortho import check_like, complex_of, gradient, native_reasons

library.define(
    "refine_svd(Tensor H, Tensor U, Tensor? V, Tensor scalars, int active, int sweeps, bool orthonormal) "
    "-> (Tensor U, Tensor S, Tensor V, Tensor order)",
    tags=common.TAGS,
)
library.define(
    "refine_svd_backward(Tensor gU, Tensor gS, Tensor gV, Tensor H, Tensor U, Tensor? V, Tensor scalars, "
    "Tensor order, int sweeps, bool orthonormal) -> (Tensor gH, Tensor gU, Tensor gV, Tensor gscalars)",
    tags=common.TAGS,
)


def _check(H: Tensor, U: Tensor, V: Tensor | None, scalars: Tensor, active: int, sweeps: int) -> None:
    torch._check(H.ndim == 4 and H.shape[-1] == 2, lambda: f"H must be (B, M, N, 2), got {tuple(H.shape)}")
    torch._check(H.dtype in REAL, lambda: f"H must be float32 or float64, got {H.dtype}")
    torch._check(U.ndim == 4, lambda: f"U must be (B, M, r, 2), got {tuple(U.shape)}")
    B, M, N, _ = H.shape
    r = U.shape[2]
    check_like("U", U, (B, M, r, 2), "H", H)
    if V is None:
        torch._check(M == N, lambda: f"H must be square where V is not given, got {M} x {N}")
    else:
        check_like("V", V, (B, N, r, 2), "H", H)
    torch._check(scalars.ndim == 2, lambda: f"scalars must be (steps, 4), got {tuple(scalars.shape)}")
    check_like("scalars", scalars, (scalars.shape[0], 4), "H", H)
    torch._check(r <= M and r <= N, lambda: f"U must have at most min(M, N) columns, got {r}")
    torch._check(active >= 1, lambda: f"active must be at least 1, got {active}")
    torch._check(active <= r, lambda: f"active must be at most r = {r}, got {active}")
    torch._check(sweeps >= 1, lambda: f"sweeps must be at least 1, got {sweeps}")


@torch.library.register_fake("lomacs::refine_svd", lib=library)
def _fake(
    H: Tensor, U: Tensor, V: Tensor | None, scalars: Tensor, active: int, sweeps: int, orthonormal: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(H, U, V, scalars, active, sweeps)
    B, _, N, _ = H.shape
    r = U.shape[2]
    order = H.new_empty((B, active), dtype=torch.int64)
    return H.new_empty(U.shape), H.new_empty((B, r)), H.new_empty((B, N, r, 2)), order


@torch.library.register_fake("lomacs::refine_svd_backward", lib=library)
def _fake_backward(
    gU: Tensor,
    gS: Tensor,
    gV: Tensor,
    H: Tensor,
    U: Tensor,
    V: Tensor | None,
    scalars: Tensor,
    order: Tensor,
    sweeps: int,
    orthonormal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(H, U, V, scalars, order.shape[1], sweeps)
    check_like("gU", gU, U.shape, "H", H)
    check_like("gS", gS, (U.shape[0], U.shape[2]), "H", H)
    check_like("gV", gV, (H.shape[0], H.shape[2], U.shape[2], 2), "H", H)
    factor = H.new_empty((0,) if V is None else V.shape)
    return H.new_empty(H.shape), H.new_empty(U.shape), factor, H.new_empty(scalars.shape)


def _started(X: Tensor, active: int, orthonormal: bool) -> Tensor:
    """The active columns, orthonormal, as the kernels take them."""
    columns = torch.view_as_complex(X)[..., :active]
    columns = columns if orthonormal else formula.orthonormal_fill(columns)
    return torch.view_as_real(columns.contiguous())


def _finished(u: Tensor, S: Tensor, v: Tensor | None, norm: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Completion, scale and signs around what the kernels found; v None in the Hermitian form."""
    left = torch.view_as_complex(u)
    right = left if v is None else torch.view_as_complex(v)
    return formula.finish(left, S, right, norm[:, None, None], r, v is None)


def launched(
    H: Tensor, U: Tensor, V: Tensor | None, scalars: Tensor, active: int, sweeps: int, orthonormal: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Steps and closing in one Triton launch; start and completion are the reference's, around it."""
    from ..kernels.refine import refine

    starts = [None if X is None else _started(X, active, orthonormal) for X in (U, V)]
    u, S, v, order, norm = refine(H, starts[0], starts[1], scalars, sweeps)
    left, S, right = _finished(u, S, None if V is None else v, norm, U.shape[2])
    return torch.view_as_real(left.contiguous()), S, torch.view_as_real(right.contiguous()), order


def relaunched(
    gU: Tensor,
    gS: Tensor,
    gV: Tensor,
    H: Tensor,
    U: Tensor,
    V: Tensor | None,
    scalars: Tensor,
    order: Tensor,
    sweeps: int,
    orthonormal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Back through steps and closing in one Triton launch; through start and completion by the reference."""
    from ..kernels.refine import refine
    from ..kernels.refine_gradient import refine_backward

    with torch.inference_mode(False), torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (U, V) if x is not None]
        starts = [_started(x, order.shape[1], orthonormal) for x in leaves]
        u, v, *_ = *(x.detach() for x in starts), None
        # what the completion starts from: cheaper to find again than to keep
        ends = [
            x.detach().requires_grad_() for x in refine(H, u, v, scalars, sweeps) if x.is_floating_point()
        ]
        out = _finished(ends[0], ends[1], None if V is None else ends[2], ends[3], U.shape[2])
        grads = torch.view_as_complex(gU), gS, torch.view_as_complex(gV)
        found = torch.autograd.grad(out, ends, grads, allow_unused=True, materialize_grads=True)
        gu, gs, gv, gnorm = (x.contiguous() for x in found)
        gH, gu, gv, gscalars = refine_backward(
            gu, gs, None if V is None else gv, gnorm, H, u, v, scalars, order, sweeps
        )
        made = torch.autograd.grad(starts, leaves, (gu,) if V is None else (gu, gv))
    return gH, made[0], H.new_empty(0) if V is None else made[1], gscalars


@torch.library.impl("lomacs::refine_svd_backward", "CUDA", lib=library)
def _relaunched(gU: Tensor, gS: Tensor, gV: Tensor, H: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    # on a thread of its own, where autograd records as it does outside of an op and no tracer looks on
    stream = torch.cuda.current_stream(H.device)

    def follow() -> tuple[Tensor, ...]:
        # a new thread has a stream of its own
        with torch.cuda.stream(stream):
            return relaunched(gU, gS, gV, H, *rest)

    with ThreadPoolExecutor(1) as aside:
        return aside.submit(follow).result()


torch.library.impl("lomacs::refine_svd", "CUDA", launched, lib=library)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    H, U, V, scalars, _, ctx.sweeps, ctx.orthonormal = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[3])
    ctx.shapes = [tuple(x.shape) for x in output[:3]]
    ctx.save_for_backward(H, U, V, scalars, output[3])


def _backward(
    ctx: Any, gU: Tensor | None, gS: Tensor | None, gV: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    common.refuse_second_derivatives("the fused refinement of an SVD")
    H, U, V, scalars, order = ctx.saved_tensors
    given = (
        H.new_zeros(shape) if g is None else gradient(g, H)
        for g, shape in zip((gU, gS, gV), ctx.shapes, strict=True)
    )
    found = torch.ops.lomacs.refine_svd_backward.default(
        *given, H, U, V, scalars, order, ctx.sweeps, ctx.orthonormal
    )
    needs = ctx.needs_input_grad[:4]
    return (*(g if need else None for g, need in zip(found, needs, strict=True)), None, None, None)


_call = common.differentiable("refine_svd", _setup, _backward)
for _name in ("refine_svd", "refine_svd_backward"):
    for _device in ("cpu", "cuda"):
        torch.library.register_autocast(f"lomacs::{_name}", _device, torch.float32, lib=library)


@functools.lru_cache(maxsize=64)
def _untrained(steps: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return formula.default_scalars(steps, torch.empty(0, dtype=dtype, device=device))


def _rows(scalars: Tensor | None, steps: int, H: Tensor) -> Tensor:
    if scalars is None:
        if common.plain(H):
            return _untrained(steps, common.REAL_OF[H.dtype], H.device)
        return formula.default_scalars(steps, H)
    return formula.rows_of(scalars, steps, H).contiguous()


def _refine_svd(
    H: Tensor,
    U: Tensor,
    V: Tensor,
    steps: int,
    active: int | None,
    hermitian: bool,
    scalars: Tensor | None,
    sweeps: int,
    orthonormal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    k = U.shape[-1] if active is None else active
    h, u, v = common.planes(H), common.planes(U), None if hermitian else common.planes(V)
    u, S, v, _ = _call(h, u, v, _rows(scalars, steps, H), k, sweeps, orthonormal)
    S = S if H.ndim == 3 else S.reshape(*H.shape[:-2], S.shape[-1])
    return complex_of(u, U.shape), S, complex_of(v, V.shape)


@register_flop_formula(torch.ops.lomacs.refine_svd)
def flops_of_refine_svd(
    H: Sequence[int],
    U: Sequence[int],
    V: Sequence[int] | None,
    scalars: Sequence[int],
    active: int,
    sweeps: int,
    orthonormal: bool,
    *_: Any,
    **__: Any,
) -> int:
    """What `FlopCounterMode` counts on the reference, a complex product as one."""
    B, M, N, _two = H
    return 2 * B * products(M, N, U[2], active, scalars[0], sweeps, V is None, orthonormal)


@register_flop_formula(torch.ops.lomacs.refine_svd_backward)
def _flops_backward(
    gU: Sequence[int],
    gS: Sequence[int],
    gV: Sequence[int],
    H: Sequence[int],
    U: Sequence[int],
    V: Sequence[int] | None,
    scalars: Sequence[int],
    order: Sequence[int],
    sweeps: int,
    orthonormal: bool,
    *_: Any,
    **__: Any,
) -> int:
    """What `FlopCounterMode` counts on the reference: products twice, those with a DFT basis once."""
    (B, M, N, _two), r, k = H, U[2], order[1]
    forward = flops_of_refine_svd(H, U, V, scalars, k, sweeps, orthonormal)
    constant = 0
    for n in (M,) if V is None else (M, N):
        constant += 0 if orthonormal else formula.ROUNDS * n * k * k
        constant += formula.ROUNDS * n * (r - k) ** 2 + n * k * (r - k)
    # the closing has no use for its rotated core, the general form for the phases of that
    constant += 4 * k**3 if V is None else 0
    return 2 * forward - 2 * B * constant


library.define(
    "approx_svd(Tensor H, Tensor scalars, int rank, int active, int form, bool denoise) "
    "-> (Tensor U, Tensor S, Tensor V, Tensor state)",
    tags=common.TAGS,
)


@torch.library.register_fake("lomacs::approx_svd", lib=library)
def _fake_approx(
    H: Tensor, scalars: Tensor, rank: int, active: int, form: int, denoise: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch._check(H.ndim == 4 and H.shape[-1] == 2, lambda: f"H must be (B, M, N, 2), got {tuple(H.shape)}")
    torch._check(H.dtype in REAL, lambda: f"H must be float32 or float64, got {H.dtype}")
    B, M, N, _ = H.shape
    check_like("scalars", scalars, (scalars.shape[0], 4), "H", H)
    torch._check(1 <= rank <= min(M, N), lambda: f"rank must be 1 to min(M, N), got {rank}")
    torch._check(0 <= active <= rank, lambda: f"active must be 0 to rank, got {active}")
    torch._check(form in (-1, 0, 1), lambda: f"form must be -1, 0 or 1, got {form}")
    state = H.new_empty((B,), dtype=torch.int64)
    return H.new_empty((B, M, rank, 2)), H.new_empty((B, rank)), H.new_empty((B, N, rank, 2)), state


for _device in ("cpu", "cuda"):
    torch.library.register_autocast("lomacs::approx_svd", _device, torch.float32, lib=library)


def _approx(
    H: Tensor, rank: int, steps: int, active: int | None, hermitian: bool | None, denoise: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    form = -1 if hermitian is None else int(hermitian)
    scalars = _rows(None, steps, H)
    with torch.no_grad():
        U, S, V, state = torch.ops.lomacs.approx_svd.default(
            common.planes(H), scalars, rank, active or 0, form, denoise
        )
    batch = H.shape[:-2]
    U, V = (torch.view_as_complex(x) for x in (U, V))
    if len(batch) != 1:
        U, S, V = (x.reshape(*batch, *x.shape[1:]) for x in (U, S, V))
    return U, S, V, state


def _approx_reasons(H: Tensor, rank: int, *_: Any) -> list[str]:
    M, N = H.shape[-2:]
    found = native_reasons(4 * M * N + 12 * (M + N) * rank + 40 * rank * rank, H=H)
    if torch.is_grad_enabled() and H.requires_grad:
        found.append("the native approximation has no gradient")
    return [reason.replace("U is", "H is") for reason in found]


def _nominal_approx(device: torch.device) -> tuple[Any, ...]:
    return torch.ones(1, 64, 64, dtype=torch.complex64, device=device), 32, 8, None, None, True


approx_svd = Op(
    "approx_svd",
    [Backend("cpp", _approx_reasons, _approx), Backend("eager", lambda *_: (), lambda *_: None)],
    ("H", "rank", "steps", "active", "hermitian", "denoise"),
    _nominal_approx,
)


# active columns up to which nothing spills; no device has run the gradients of more
COLUMNS = 16


def _native_reasons(
    H: Tensor,
    U: Tensor,
    V: Tensor,
    steps: int,
    active: int | None,
    hermitian: bool,
    scalars: Tensor | None,
    *_: Any,
) -> list[str]:
    M, N, r = *H.shape[-2:], U.shape[-1]
    found = native_reasons(M * N + 8 * (M + N) * r + 30 * r * r, H=H, U=U, V=V)
    return [reason.replace("U is", "H is") for reason in found]


def _triton_reasons(
    H: Tensor,
    U: Tensor,
    V: Tensor,
    steps: int,
    active: int | None,
    hermitian: bool,
    scalars: Tensor | None,
    *_: Any,
) -> list[str]:
    k = U.shape[-1] if active is None else active
    proved = common.PROVED if k <= COLUMNS else common.NOWHERE
    found = common.single_triton_reasons("H", H, proved) + common.mixed_reasons(H=H, U=U, V=V)
    if found:
        return found
    from ..kernels.refine import limit

    return limit(*H.shape[-2:], k) + common.transform_reasons()


def _eager(
    H: Tensor,
    U: Tensor,
    V: Tensor,
    steps: int,
    active: int | None,
    hermitian: bool,
    scalars: Tensor | None,
    sweeps: int,
    orthonormal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.refine_svd(
        H,
        U,
        V,
        steps,
        active=active,
        hermitian=hermitian,
        scalars=scalars,
        sweeps=sweeps,
        orthonormal=orthonormal,
    )


def _nominal(device: torch.device) -> tuple[Any, ...]:
    H = torch.ones(1, 64, 64, dtype=torch.complex64, device=device)
    return H, H[..., :32], H[..., :32], 8, 16, False, None, formula.SWEEPS, False


refine_svd = Op(
    "refine_svd",
    [
        Backend("triton", _triton_reasons, _refine_svd),
        Backend("cpp", _native_reasons, _refine_svd),
        Backend("eager", lambda *_: (), _eager),
    ],
    ("H", "U", "V", "steps", "active", "hermitian", "scalars", "sweeps", "orthonormal"),
    _nominal,
)
