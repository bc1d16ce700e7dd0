"""Spectral calibration and the network's tail: ours against the eager reference, and both against the floor.

`python benchmarks/bench_spectral.py [--json FILE] [--threads 2]` checks values and gradients against float64,
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

SIZES = ((64, 64, 32, 256), (128, 128, 64, 64), (64, 64, 32, 1))


def calibrate_macs(M: int, N: int, r: int, backward: bool) -> int:
    """Real multiply-adds a sample: `H V`; backward `H^H U` and the gradient of H."""
    return (1 + 2 * backward) * 4 * M * N * r


def tail_macs(M: int, N: int, r: int, backward: bool) -> int:
    """Real multiply-adds a sample: both refinements and the calibration."""
    return (2 + 4 + (4 + 4 + 4) * backward) * (M + N) * r * r + calibrate_macs(M, N, r, backward)


def inputs(M: int, N: int, r: int, batch: int, dtype: torch.dtype) -> list[Tensor]:
    """Raw factors, spectrum and a noisy low-rank channel; then a gradient of each result."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.complex128, generator=generator)

    U, V = (torch.linalg.qr(normal(batch, n, r))[0] + 0.02 * normal(batch, n, r) for n in (M, N))
    S = torch.rand(batch, r, dtype=torch.float64, generator=generator)
    H = U * S[:, None] @ V.mH + 0.01 * normal(batch, M, N)
    found = [U, V, S, H, normal(batch, M, r), torch.rand_like(S), normal(batch, N, r)]
    return [x.to(dtype if x.is_complex() else dtype.to_real()).contiguous() for x in found]


def calibrate(module: Any, U: Tensor, V: Tensor, S: Tensor, H: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """The spectrum and, with backward, the gradients of all inputs."""
    _, g, _, backward = rest
    if not backward:
        with torch.no_grad():
            return (module.spectral_calibrate(U, H, V, S, 0.8),)
    leaves = [x.detach().requires_grad_() for x in (U, H, V, S)]
    out = module.spectral_calibrate(*leaves, 0.8)
    return out.detach(), *torch.autograd.grad(out, leaves, g)


def tail(module: Any, *tensors: Any) -> tuple[Tensor, ...]:
    """U, S, V and, with backward, the gradients of all inputs."""
    arguments, gradients, backward = tensors[:4], tensors[4:7], tensors[7]
    if not backward:
        with torch.no_grad():
            return tuple(module.svd_tail(*arguments, 0.1, 0.2, 0.8))
    leaves = [x.detach().requires_grad_() for x in arguments]
    out = module.svd_tail(*leaves, 0.1, 0.2, 0.8)
    return (*(x.detach() for x in out), *torch.autograd.grad(out, leaves, gradients))


def cases(rate: float, budget: float) -> Iterator[dict[str, Any]]:
    for M, N, r, batch in SIZES:
        tensors = inputs(M, N, r, batch, torch.complex64)
        double = [x.to(torch.promote_types(x.dtype, torch.float64)) for x in tensors]
        for op, call, macs in (("calibrate", calibrate, calibrate_macs), ("svd tail", tail, tail_macs)):
            for backward in (False, True):
                yield harness.measure(
                    stem="spectral",
                    op=op,
                    backward=backward,
                    size=f"{M}x{N}x{r}",
                    batch=batch,
                    eager=partial(call, reference, *tensors, backward),
                    ours=partial(call, functional, *tensors, backward),
                    exact=call(reference, *double, backward),
                    macs=macs(M, N, r, backward),
                    rate=rate,
                    budget=budget,
                )


if __name__ == "__main__":
    harness.run(__doc__, cases)
