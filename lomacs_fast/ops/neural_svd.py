"""Steps on the nested low-rank objective as one op: every matrix near its core for all steps of a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import reference
from ..reference.neural_svd import STEPS
from . import common, native
from .common import library
from .dispatch import Backend, Op

# H (B, M, N, 2), F (B, N, L, 2)
library.define(
    "neural_svd_steps(Tensor H, Tensor F, int steps, int watch) -> (Tensor F, Tensor change)",
    tags=common.TAGS,
)


@torch.library.register_fake("lomacs::neural_svd_steps", lib=library)
def _fake(H: Tensor, F: Tensor, steps: int, watch: int) -> tuple[Tensor, Tensor]:
    torch._check(H.ndim == 4 and H.shape[3] == 2, lambda: f"H must be (B, M, N, 2), got {tuple(H.shape)}")
    torch._check(H.dtype in common.REAL, lambda: f"H must be float32 or float64, got {H.dtype}")
    torch._check(F.ndim == 4, lambda: f"F must be (B, N, L, 2), got {tuple(F.shape)}")
    shape = (H.shape[0], H.shape[2], F.shape[2], 2)
    torch._check(F.shape == shape, lambda: f"F must be {shape}, got {tuple(F.shape)}")
    torch._check(F.dtype == H.dtype, lambda: f"F must be {H.dtype} as H is, got {F.dtype}")
    torch._check(F.shape[2] <= F.shape[1], lambda: f"F must have L <= N, got {tuple(F.shape)}")
    torch._check(steps >= 1, lambda: f"steps must be at least 1, got {steps}")
    torch._check(1 <= watch <= F.shape[2], lambda: f"watch must lie in 1 to L, got {watch}")
    return F.new_empty(F.shape), H.new_empty((H.shape[0],))


def _no_gradient(ctx: Any, *_: Any) -> Any:
    raise RuntimeError("neural_svd_steps has no gradient: detach H and F")


torch.library.register_autograd("lomacs::neural_svd_steps", _no_gradient, lib=library)
for _device in ("cpu", "cuda"):
    torch.library.register_autocast("lomacs::neural_svd_steps", _device, torch.float32, lib=library)


@register_flop_formula(torch.ops.lomacs.neural_svd_steps)
def _flops(H: Sequence[int], F: Sequence[int], steps: int, watch: int, *_: Any, **__: Any) -> int:
    """What `FlopCounterMode` counts on the reference; a complex product is one multiply-add.

    A step: `H F`, `H^H G`, `G^H G`, `F C`, `F X`; Björck's first Gram matrix, and a Gram
    matrix and two products in each of its steps of order 2.
    """
    (B, M, N), L = H[:3], F[2]
    iterations = STEPS
    return 2 * B * steps * (2 * M * N * L + M * L * L + N * L * L * (3 + 3 * iterations))


def _native(H: Tensor, F: Tensor, steps: int, watch: int) -> tuple[Tensor, Tensor]:
    found, change = torch.ops.lomacs.neural_svd_steps.default(
        common.planes(H.detach()), common.planes(F.detach()), steps, watch
    )
    return torch.view_as_complex(found).reshape(F.shape), change.reshape(H.shape[:-2])


def _native_reasons(H: Tensor, F: Tensor, steps: int, watch: int) -> list[str]:
    found = common.mixed_reasons(H=H, F=F) + common.transform_reasons()
    if not H.is_complex():
        found.append(f"H is {str(H.dtype).removeprefix('torch.')}, only complex matrices are served")
    (M, N), L = H.shape[-2:], F.shape[-1]
    found += common.size_reasons(2 * (M + N) * L + 4 * L * L)
    if H.device.type != "cpu":
        found.append(f"the C++ kernels run on CPUs, the tensors are on {H.device.type}")
    return found or list(native.reasons("cpu"))


def _nominal(device: torch.device) -> tuple[Any, ...]:
    H = torch.ones(1, 64, 64, dtype=torch.complex64, device=device)
    return H, torch.eye(64, 16, dtype=torch.complex64, device=device)[None], 1, 8


neural_svd_steps = Op(
    "neural_svd_steps",
    [
        Backend("cpp", _native_reasons, _native),
        Backend("eager", lambda *_: (), reference.neural_svd_steps),
    ],
    ("H", "F", "steps", "watch"),
    _nominal,
)
