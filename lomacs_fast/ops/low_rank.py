"""The low-rank objective as one op that leaves the gradients ready: schema, autograd, autocast, FLOPs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import reference
from . import common, native
from .common import REAL, library
from .dispatch import Backend, Op

# complex matrices are (B, m, n, 2), real ones (B, m, n); rows and columns are those of the whole matrix
library.define(
    "low_rank(Tensor F, Tensor G, Tensor H, SymInt rows, SymInt columns, int nesting, bool gf, bool gg, "
    "bool gh) -> (Tensor loss, Tensor gF, Tensor gG, Tensor gH)",
    tags=common.TAGS,
)

NESTINGS = ("none", "joint", "sequential")
WHAT = "the fused low-rank objective"


@torch.library.register_fake("lomacs::low_rank", lib=library)
def _fake(
    F: Tensor, G: Tensor, H: Tensor, rows: int, columns: int, nesting: int, gf: bool, gg: bool, gh: bool
) -> tuple[Tensor, ...]:
    torch._check(H.ndim in (3, 4), lambda: f"H must be (B, M, N) or (B, M, N, 2), got {H.shape}")
    torch._check(H.dtype in REAL, lambda: f"H must be float32 or float64, got {H.dtype}")
    torch._check(F.ndim == H.ndim, lambda: f"F must have as many dimensions as H, got {F.shape}")
    (B, M, N), L, pair = H.shape[:3], F.shape[2], H.shape[3:]
    for name, x, matrices in (("F", F, (B, N, L)), ("G", G, (B, M, L)), ("H", H, (B, M, N))):
        shape = (*matrices, *(2 for _ in pair))
        torch._check(x.shape == shape, lambda n=name, x=x, s=shape: f"{n} must be {s}, got {tuple(x.shape)}")
        torch._check(x.dtype == H.dtype, lambda n=name, x=x: f"{n} must be {H.dtype}, got {x.dtype}")
    torch._check(0 <= nesting < len(NESTINGS), lambda: f"nesting must be 0, 1 or 2, got {nesting}")
    gradients = (x.new_empty(x.shape if g else (0,)) for x, g in ((F, gf), (G, gg), (H, gh)))
    return H.new_empty((B,)), *gradients


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    for name, need, flag in zip("FGH", ctx.needs_input_grad, inputs[6:], strict=False):
        if need and not flag:
            raise ValueError(f"{name} requires a gradient, so g{name.lower()} must be True")
    _, *gradients = output
    ctx.mark_non_differentiable(*gradients)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*gradients)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    common.refuse_second_derivatives(WHAT)
    if grad is None:
        return (None,) * 9
    return (*common.scaled(grad, ctx.saved_tensors, ctx.needs_input_grad[:3]), *(None,) * 6)


torch.library.register_autograd("lomacs::low_rank", _backward, setup_context=_setup, lib=library)
# half precision of the caller's becomes single; float64 stays
for _device in ("cpu", "cuda"):
    torch.library.register_autocast("lomacs::low_rank", _device, torch.float32, lib=library)


@register_flop_formula(torch.ops.lomacs.low_rank)
def _flops(
    F: Sequence[int],
    G: Sequence[int],
    H: Sequence[int],
    rows: int,
    columns: int,
    nesting: int,
    gf: bool,
    gg: bool,
    gh: bool,
    *_: Any,
    **__: Any,
) -> int:
    """What `FlopCounterMode` counts on the reference, forward and the backward that the flags ask for.

    A complex product is one multiply-add. Forward: `H F`, `F^H F`, `G^H G`, the last two once more with the
    first factor detached for sequential nesting.
    """
    (B, M, N), L = H[:3], F[2]
    large, core_f, core_g = M * N * L, L * L * N, L * L * M
    again = nesting == NESTINGS.index("sequential")
    forward = large + (1 + again) * (core_f + core_g)
    return 2 * B * (forward + large * (gf + gh) + (2 + again) * (core_f * gf + core_g * gg))


def _native(F: Tensor, G: Tensor, H: Tensor, nesting: str, shape: tuple[int, int] | None) -> Tensor:
    rows, columns = shape or H.shape[-2:]

    def evaluate(flags: Sequence[bool], F: Tensor, G: Tensor, H: Tensor) -> tuple[Tensor, ...]:
        args = (_matrices(F), _matrices(G), _matrices(H), rows, columns, NESTINGS.index(nesting))
        return torch.ops.lomacs.low_rank.default(*args, *flags)

    (loss,) = common.ready(evaluate, 1, WHAT, F, G, H)
    return loss if H.ndim == 3 else loss.reshape(H.shape[:-2])


def _matrices(x: Tensor) -> Tensor:
    """Contiguous real `(B, m, n, 2)` of complex `(..., m, n)`, `(B, m, n)` of real."""
    if x.is_complex():
        return common.planes(x)
    x = x.resolve_neg()
    return (x if x.ndim == 3 else x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])).contiguous()


def _native_reasons(F: Tensor, G: Tensor, H: Tensor, nesting: str, shape: Any) -> list[str]:
    found = common.mixed_reasons(F=F, G=G, H=H) + common.transform_reasons()
    if H.device.type == "cuda":
        found += common.unproved_reasons("cpp", H.device)
    if not found:
        found += native.reasons(H.device.type)
    return found


def _eager(F: Tensor, G: Tensor, H: Tensor, nesting: str, shape: tuple[int, int] | None) -> Tensor:
    return reference.low_rank_loss(F, G, H, nesting, shape=shape)


def _nominal(device: torch.device) -> tuple[Any, ...]:
    def ones(*shape: int) -> Tensor:
        return torch.ones(shape, dtype=torch.complex64, device=device)

    return ones(1, 256, 32), ones(1, 256, 32), ones(1, 256, 256), "none", None


low_rank_loss = Op(
    "low_rank_loss",
    [Backend("cpp", _native_reasons, _native), Backend("eager", lambda *_: (), _eager)],
    ("F", "G", "H", "nesting", "shape"),
    _nominal,
)
