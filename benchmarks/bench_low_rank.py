"""The low-rank objective, forward and forward+backward: ours against the eager reference and the floor.

`python benchmarks/bench_low_rank.py [--json FILE] [--threads 2]` checks values and gradients against float64,
then times interleaved variants in one process. The floor is the arithmetic over the measured rate of a
float32 matrix product in the same process, a complex product taken as four real ones; where kernels make
it of three, three quarters of the floor bind.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from lomacs_fast import functional, reference
from lomacs_fast.benchmarks import harness

SIZES = ((256, 256, 32, 64), (256, 256, 32, 1), (4096, 4096, 64, 1))
DTYPES = {"complex": torch.complex64, "real": torch.float32}


def floor_macs(M: int, N: int, L: int, backward: bool, dtype: torch.dtype) -> int:
    """Real multiply-adds a matrix: H F and two Gram triangles; backward H^H G and products with L x L."""
    forward = M * N * L + (M + N) * L * L // 2
    both = forward + (M * N * L + (M + N) * L * L if backward else 0)
    return both * (4 if dtype.is_complex else 1)


def inputs(M: int, N: int, L: int, batch: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Factors half way to the minimiser of a low-rank matrix in noise."""
    generator = torch.Generator().manual_seed(0)
    F, G = (torch.randn(batch, n, L, dtype=dtype, generator=generator) / n**0.5 for n in (N, M))
    noise = torch.randn(batch, M, N, dtype=dtype, generator=generator) / (M * N) ** 0.5
    H = G @ F.mH + 0.1 * noise
    F, G = (
        x + 0.5 * torch.randn(x.shape, dtype=dtype, generator=generator) / x.shape[-2] ** 0.5 for x in (F, G)
    )
    return F, G, H


def call(module: Any, tensors: tuple[torch.Tensor, ...], backward: bool) -> tuple[torch.Tensor, ...]:
    """Values of all matrices and, with backward, the gradients of F and G of their mean."""
    if not backward:
        with torch.no_grad():
            return (module.low_rank_loss(*tensors),)
    F, G, H = tensors
    leaves = [x.detach().requires_grad_() for x in (F, G)]
    values = module.low_rank_loss(*leaves, H)
    return (values.detach(), *torch.autograd.grad(values.mean(), leaves))


def cases(rate: float, budget: float) -> Iterator[dict[str, Any]]:
    for name, dtype in DTYPES.items():
        for M, N, L, batch in SIZES:
            tensors = inputs(M, N, L, batch, dtype)
            doubled = tuple(x.to(torch.promote_types(x.dtype, torch.float64)) for x in tensors)
            for backward in (False, True):
                yield harness.measure(
                    stem="low_rank",
                    op=f"low_rank {name}",
                    backward=backward,
                    size=f"{M}x{N}x{L}",
                    batch=batch,
                    eager=partial(call, reference, tensors, backward),
                    ours=partial(call, functional, tensors, backward),
                    exact=call(reference, doubled, backward),
                    macs=floor_macs(M, N, L, backward, dtype),
                    rate=rate,
                    budget=budget,
                )


if __name__ == "__main__":
    harness.run(__doc__, cases)
