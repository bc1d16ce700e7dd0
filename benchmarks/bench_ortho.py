"""Refinement and Björck's iteration: ours against the eager reference, and both against the floor.

`python benchmarks/bench_ortho.py [--json FILE] [--threads 2]` checks values and gradients against float64,
then times interleaved variants in one process. The floor is the arithmetic, half of every Gram matrix, over
the measured rate of a float32 matrix product in the same process, without what the backward computes again, a
complex product taken as four real ones; where kernels make it of three, or of two by pairs, three quarters of
the floor bind, or half.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lomacs_fast import functional, reference
from lomacs_fast.benchmarks import harness

SIZES = ((64, 32, 256), (128, 64, 64), (64, 32, 1))
STEPS = 5


def refine_macs(M: int, r: int, backward: bool) -> int:
    """Real multiply-adds a sample, both factors: `U^H U`, `U P`; backward `g^H U`, `g P`, `U C`."""
    return 2 * (2 + 4 + (4 + 4 + 4) * backward) * M * r * r


def bjorck_macs(M: int, r: int, backward: bool) -> int:
    """Real multiply-adds a sample, first order, of columns as near orthonormal as these.

    Forward `U^H U` and `U Q` once for all steps, and four triangles of `r x r` products for Q. Backward by
    steps: `U^H U` and `U P` but for the last, `U^H g`, `g P` and `U C`.
    """
    once = 6 * M * r * r + 4 * 2 * r**3
    return once + ((STEPS - 1) * 6 + STEPS * 12) * M * r * r * backward


def columns(M: int, r: int, batch: int, seed: int) -> Tensor:
    """Normalised columns some way from orthonormal: what the refinement sees in training."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(2, batch, M, r, dtype=torch.complex128, generator=generator)
    U = torch.linalg.qr(X[0])[0] + 0.02 * X[1]
    return reference.column_normalize(U).to(torch.complex64).contiguous()


def leaves(X: list[Tensor], backward: bool) -> list[Tensor]:
    """What a call is given, made once: both factors and both sizes."""
    sizes = [torch.tensor(x, dtype=torch.float64, requires_grad=backward) for x in (0.1, 0.2)]
    return [*(x.detach().requires_grad_(backward) for x in X[:2]), *sizes]


def refine(module: Any, given: list[Tensor], g: list[Tensor], backward: bool) -> tuple[Tensor, ...]:
    """Both factors and, with backward, their gradients; those of the two sizes are computed and left."""
    if not backward:
        with torch.no_grad():
            return tuple(module.ortho_refine_pair(*given))
    out = module.ortho_refine_pair(*given)
    return (*(x.detach() for x in out), *torch.autograd.grad(out, given[:2], g))


def bjorck(module: Any, U: Tensor, g: Tensor, backward: bool) -> tuple[Tensor, ...]:
    if not backward:
        with torch.no_grad():
            return (module.bjorck(U, STEPS),)
    out = module.bjorck(U, STEPS)
    return out.detach(), *torch.autograd.grad(out, U, g)


def cases(rate: float, budget: float) -> Iterator[dict[str, Any]]:
    for M, r, batch in SIZES:
        X = [columns(M, r, batch, seed) for seed in range(4)]
        double = [x.to(torch.complex128) for x in X]
        for backward in (False, True):
            single, exact = leaves(X, backward), leaves(double, backward)
            yield harness.measure(
                stem="ortho",
                op="refine both",
                backward=backward,
                size=f"{M}x{r}",
                batch=batch,
                eager=partial(refine, reference, single, X[2:], backward),
                ours=partial(refine, functional, single, X[2:], backward),
                exact=refine(reference, exact, double[2:], backward),
                macs=refine_macs(M, r, backward),
                rate=rate,
                budget=budget,
            )
        for backward in (False, True):
            single, exact = leaves(X, backward), leaves(double, backward)
            yield harness.measure(
                stem="ortho",
                op=f"bjorck {STEPS}",
                backward=backward,
                size=f"{M}x{r}",
                batch=batch,
                eager=partial(bjorck, reference, single[0], X[1], backward),
                ours=partial(bjorck, functional, single[0], X[1], backward),
                exact=bjorck(reference, exact[0], double[1], backward),
                macs=bjorck_macs(M, r, backward),
                rate=rate,
                budget=budget,
            )


if __name__ == "__main__":
    harness.run(__doc__, cases)
