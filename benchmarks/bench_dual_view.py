"""The front of the network, H to tokens X, and its projection alone: ours against eager, and the floor.

`python benchmarks/bench_dual_view.py [--json FILE] [--threads 2]` checks values and gradients against
float64, then times interleaved variants in one process. The floor is the arithmetic that has to be done over
the measured rate of a float32 matrix product: two products, of the channel and of its sums over 2x2 blocks,
and for the front what `bench_freq_gate.py` counts. `gate_project of data` is the front as training calls it:
H wants no gradient, so backward is one transform.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lomacs_fast import functional, reference
from lomacs_fast.benchmarks import bench_freq_gate as gate
from lomacs_fast.benchmarks import harness

SIZES = ((64, 64, 256), (128, 128, 64), (64, 64, 1))
WIDTH = 64


def floor_macs(M: int, N: int, d: int, backward: bool) -> int:
    """Real multiply-adds a sample of the projection; a gradient of the channel and one of the weight."""
    forward = M * 2 * N * d + (M // 2) * 2 * (N // 2) * d
    return forward * (3 if backward else 1)


def project(module: Any, tensors: tuple[Tensor, ...], gradients: tuple[Tensor, ...], backward: bool) -> Any:
    """X and, with backward, the gradients of Hd, weight, bias and pos."""
    if not backward:
        with torch.no_grad():
            return (module.dual_view_project(*tensors),)
    leaves = [x.detach().requires_grad_() for x in tensors]
    X = module.dual_view_project(*leaves)
    return (X.detach(), *torch.autograd.grad(X, leaves, gradients[0]))


def front(module: Any, tensors: tuple[Tensor, ...], gradients: tuple[Tensor, ...], backward: bool) -> Any:
    """X and Hd and, with backward, the gradients of everything; in training both X and Hd have one."""
    arguments = (*tensors[:5], gate.TEMPERATURE, *tensors[5:])
    if not backward:
        with torch.no_grad():
            return module.gate_project(*arguments)
    leaves = [x.detach().requires_grad_() for x in tensors]
    outputs = module.gate_project(*leaves[:5], gate.TEMPERATURE, *leaves[5:])
    return (*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, gradients))


def of_data(module: Any, tensors: tuple[Tensor, ...], gradients: tuple[Tensor, ...], backward: bool) -> Any:
    """X and Hd, and the gradients of all weights."""
    H, *weights = tensors
    leaves = [x.detach().requires_grad_() for x in weights]
    outputs = module.gate_project(H, *leaves[:4], gate.TEMPERATURE, *leaves[4:])
    return (*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, gradients))


def cases(rate: float, budget: float) -> Iterator[dict[str, Any]]:
    for M, N, batch in SIZES:
        generator = torch.Generator().manual_seed(2)
        channel = gate.inputs(M, N, batch)
        weight = torch.empty(WIDTH, 4 * N).uniform_(-1, 1, generator=generator) * (6 / (WIDTH + 4 * N)) ** 0.5
        bias, pos = (0.1 * torch.randn(s, generator=generator) for s in ((WIDTH,), (1, M, WIDTH)))
        projection = (weight, bias, pos)
        gradients = (
            torch.randn(batch, M, WIDTH, generator=generator),
            torch.randn(batch, M, N, dtype=torch.complex64, generator=generator),
        )
        for op, run, tensors in (
            ("dual_view_project", project, (channel[0], *projection)),
            ("gate_project", front, (*channel, *projection)),
            ("gate_project of data", of_data, (*channel, *projection)),
        ):
            doubled, exact_gradients = (
                tuple(x.to(torch.promote_types(x.dtype, torch.float64)) for x in xs)
                for xs in (tensors, gradients)
            )
            for backward in (True,) if run is of_data else (False, True):
                macs = floor_macs(M, N, WIDTH, backward)
                if run is not project:
                    macs += gate.floor_macs(M, N, gate.HIDDEN, backward)
                if run is of_data:
                    macs -= round(5 * M * N * math.log2(M * N) / 2)
                yield harness.measure(
                    stem="dual_view",
                    op=op,
                    backward=backward,
                    size=f"{M}x{N}x{WIDTH}",
                    batch=batch,
                    eager=partial(run, reference, tensors, gradients, backward),
                    ours=partial(run, functional, tensors, gradients, backward),
                    exact=run(reference, doubled, exact_gradients, backward),
                    macs=macs,
                    rate=rate,
                    budget=budget,
                )


if __name__ == "__main__":
    harness.run(__doc__, cases)
