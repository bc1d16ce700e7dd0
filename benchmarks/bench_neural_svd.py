"""Batches of small matrices by optimisation: ours against the same loop in eager, and both against the floor.

`python benchmarks/bench_neural_svd.py [--json FILE] [--threads 2]` checks the steps against float64, then
times them interleaved in one process. Before that it prints how many steps reach a relative error within 1.01
of the truncated optimum, in every matrix, and what LAPACK takes for all of them. The floor is the arithmetic
of the steps over the measured rate of a float32 matrix product in the same process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lomacs_fast import functional, neural_svd, use_backend
from lomacs_fast.benchmarks import harness
from lomacs_fast.neural_svd.extraction import orthonormalize
from lomacs_fast.reference.neural_svd import STEPS

SIZES = ((64, 64, 8, 256), (128, 128, 8, 64))
GUARD = 8
WITHIN = 1.01


def inputs(M: int, N: int, L: int, batch: int) -> tuple[Tensor, Tensor]:
    """Matrices of independent entries, the flattest spectrum that there is, and a random start."""
    generator = torch.Generator().manual_seed(0)
    H = torch.randn(batch, M, N, dtype=torch.complex64, generator=generator)
    F = torch.randn(batch, N, L, dtype=torch.complex64, generator=generator)
    return H, orthonormalize(F).contiguous()


def floor_macs(M: int, N: int, L: int, steps: int) -> int:
    """Real multiply-adds a matrix: `H F`, `H^H G`, two Gram triangles, three products with L x L a step."""
    small = 3 * STEPS * L * L * L
    return 4 * steps * (2 * M * N * L + (M + N) * L * L // 2 + 3 * N * L * L + small)


def steps_needed(H: Tensor, rank: int) -> int:
    """Steps until every matrix is within `WITHIN` of its truncated optimum."""
    s = torch.linalg.svdvals(H)
    best = (s[:, rank:].square().sum(-1) / s.square().sum(-1)).sqrt()
    for steps in range(2, 41, 2):
        found = neural_svd(H, rank, method="optimize", max_steps=steps, tol=1e-9)
        if bool((found.rel_error <= WITHIN * best).all()):
            return steps
    raise SystemExit(f"not within {WITHIN} of the optimum after 40 steps")


def call(H: Tensor, F: Tensor, steps: int, backend: str) -> Sequence[Tensor]:
    with use_backend(backend):
        return functional.neural_svd_steps(H, F, steps)[:1]


def projectors(found: Sequence[Tensor], settled: Tensor) -> Sequence[Tensor]:
    """`F F^H` of the settled matrices."""
    return [(F @ F.mH)[settled] for F in found]


def settled(H: Tensor, F: Tensor, steps: int) -> Tensor:
    """Which matrices no rounding decides on: columns of equal lengths turn to either side, to other steps."""
    everything = torch.ones(len(H), dtype=torch.bool)
    (exact,) = projectors(call(H, F, steps, "eager"), everything)
    stable = everything
    for seed in range(4):
        noise = torch.randn(H.shape, dtype=H.dtype, generator=torch.Generator().manual_seed(seed))
        (found,) = projectors(call(H + 3e-6 * noise, F, steps, "eager"), everything)
        stable = stable & (torch.linalg.vector_norm(found - exact, dim=(-2, -1)) < 1e-3)
    return stable


def whole(H: Tensor, rank: int, steps: int, backend: str) -> Sequence[Tensor]:
    """The whole function, extraction and verification included."""
    with use_backend(backend):
        found = neural_svd(H, rank, method="optimize", max_steps=steps, tol=1e-9)
    return (found.S,)


def cases(rate: float, budget: float) -> Iterator[dict[str, Any]]:
    for M, N, rank, batch in SIZES:
        H, F = inputs(M, N, rank + GUARD, batch)
        steps = steps_needed(H, rank)
        lapack = min(harness.seconds(lambda H=H: torch.linalg.svd(H, full_matrices=False)) for _ in range(3))
        print(
            f"{batch} of {M}x{N}, rank {rank}: {steps} steps; LAPACK {1e6 * lapack / batch:.0f} us a matrix"
        )
        common: dict[str, Any] = {
            "stem": "neural_svd",
            "backward": False,
            "size": f"{M}x{N}x{rank}",
            "batch": batch,
            "rate": rate,
            "budget": budget,
        }
        double = H.to(torch.complex128), F.to(torch.complex128)
        compared = partial(projectors, settled=settled(*double, steps))
        yield harness.measure(
            op=f"{steps} steps",
            eager=partial(call, H, F, steps, "eager"),
            ours=partial(call, H, F, steps, "auto"),
            exact=compared(call(*double, steps, "eager")),
            macs=floor_macs(M, N, rank + GUARD, steps),
            # rounding grows through the steps, as through a network
            factor=4,
            compared=compared,
            **common,
        )
        yield harness.measure(
            op="neural_svd",
            eager=partial(whole, H, rank, steps, "eager"),
            ours=partial(whole, H, rank, steps, "auto"),
            exact=whole(H, rank, 2 * steps, "eager"),
            macs=floor_macs(M, N, rank + GUARD, steps),
            factor=4,
            **common,
        )


if __name__ == "__main__":
    harness.run(__doc__, cases)
