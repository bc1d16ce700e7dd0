"""The AE+ loss, forward and forward+backward: ours against the eager reference, and both against the floor.

`python benchmarks/bench_aeplus.py [--json FILE] [--threads 2]` checks values and gradients against float64,
then times interleaved variants in one process. The floor is the arithmetic of the loss over the measured rate
of a float32 matrix product in the same process, a complex product taken as four real ones; where the kernels
make it of three, or of two by pairs, three quarters of the floor bind, or half.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from lomacs_fast import functional, reference
from lomacs_fast.benchmarks import harness

SIZES = ((64, 64, 32, 256), (128, 128, 64, 64), (64, 64, 32, 1))
WEIGHTS = {"lam": 0.2, "w_energy": 0.4, "w_diag": 0.3, "w_match": 0.3}


def floor_macs(M: int, N: int, r: int, backward: bool) -> int:
    """Real multiply-adds a sample: H V, residual, M, two Gram triangles; backward H^H U, r x r algebra."""
    forward = 2 * 4 * M * N * r + 4 * M * r * r + 2 * (M + N) * r * r
    return forward + (4 * M * N * r + 2 * 4 * (M + N) * r * r if backward else 0)


def inputs(
    M: int, N: int, r: int, batch: int, dtype: torch.dtype = torch.complex64
) -> tuple[torch.Tensor, ...]:
    """Nearly orthonormal factors of a noisy low-rank channel, contiguous: what the loss sees in training."""
    generator = torch.Generator().manual_seed(0)
    real = torch.float64 if dtype == torch.complex128 else torch.float32

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.complex128, generator=generator)

    U, V = (torch.linalg.qr(normal(batch, n, r))[0] + 0.02 * normal(batch, n, r) for n in (M, N))
    S = torch.rand(batch, r, dtype=torch.float64, generator=generator).sort(-1, descending=True).values
    H = U * S[:, None] @ V.mH + 0.01 * normal(batch, M, N)
    # a QR factor lies column by column: left so, its copies would be timed with the loss
    return U.to(dtype).contiguous(), S.to(real), V.to(dtype).contiguous(), H.to(dtype)


def call(module: Any, tensors: tuple[torch.Tensor, ...], backward: bool) -> tuple[torch.Tensor, ...]:
    """Loss and, with backward, the gradients of U, S and V."""
    if not backward:
        with torch.no_grad():
            return (module.aeplus_loss(*tensors, **WEIGHTS)[0],)
    U, S, V, H = tensors
    leaves = [x.detach().requires_grad_() for x in (U, S, V)]
    loss, _ = module.aeplus_loss(*leaves, H, **WEIGHTS)
    return (loss.detach(), *torch.autograd.grad(loss, leaves))


def cases(rate: float, budget: float) -> Iterator[dict[str, Any]]:
    for M, N, r, batch in SIZES:
        tensors = inputs(M, N, r, batch)
        doubled = tuple(x.to(torch.promote_types(x.dtype, torch.float64)) for x in tensors)
        for backward in (False, True):
            yield harness.measure(
                stem="aeplus",
                op="aeplus",
                backward=backward,
                size=f"{M}x{N}x{r}",
                batch=batch,
                eager=partial(call, reference, tensors, backward),
                ours=partial(call, functional, tensors, backward),
                exact=call(reference, doubled, backward),
                macs=floor_macs(M, N, r, backward),
                rate=rate,
                budget=budget,
            )


if __name__ == "__main__":
    harness.run(__doc__, cases)
