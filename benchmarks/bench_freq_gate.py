"""The frequency gate, forward and forward+backward: ours against the eager reference, and against the floor.

`python benchmarks/bench_freq_gate.py [--json FILE] [--threads 2]` checks values and gradients against
float64, then times interleaved variants in one process. The floor is the arithmetic of the transforms, 5 n
log2 n flops each, two of them a multiply-add, and of the gate, over the measured rate of a float32 matrix
product in the same process.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lomacs_fast import functional, reference
from lomacs_fast.benchmarks import harness

SIZES = ((64, 64, 256), (128, 128, 64), (96, 100, 64), (64, 64, 1))
HIDDEN, TEMPERATURE = 32, 0.2


def floor_macs(M: int, N: int, hidden: int, backward: bool) -> int:
    """Real multiply-adds a sample: two transforms and both perceptrons, and their adjoints.

    What our backward computes again, one transform and the perceptrons, is no part of the floor.
    """
    transform = 5 * M * N * math.log2(M * N) / 2
    # magnitude, gate and their product: some ten flops a frequency
    forward = 2 * transform + 2 * hidden * (M + N) + 5 * M * N
    return round(3 * forward if backward else forward)


def inputs(M: int, N: int, batch: int) -> tuple[Tensor, ...]:
    """Normalised channels of a few paths in noise, and weights as the module draws them."""
    generator = torch.Generator().manual_seed(0)
    H = torch.randn(batch, M, N, dtype=torch.complex128, generator=generator) * 0.3
    for _ in range(4):
        left, right = (
            torch.exp(
                2j
                * math.pi
                * torch.rand(batch, 1, dtype=torch.float64, generator=generator)
                * torch.arange(n)
            )
            for n in (M, N)
        )
        H = H + left[:, :, None] * right[:, None, :]
    H = (H / torch.linalg.matrix_norm(H)[:, None, None]).to(torch.complex64)
    shapes = ((HIDDEN, M), (M, HIDDEN), (HIDDEN, N), (N, HIDDEN))
    weights = (torch.empty(s).uniform_(-1, 1, generator=generator) * (6 / sum(s)) ** 0.5 for s in shapes)
    return H, *weights


def call(module: Any, tensors: tuple[Tensor, ...], gradient: Tensor, backward: bool) -> tuple[Tensor, ...]:
    """Hd and, with backward, the gradients of the channel and of the weights."""
    if not backward:
        with torch.no_grad():
            return (module.freq_gate(*tensors, TEMPERATURE),)
    leaves = [x.detach().requires_grad_() for x in tensors]
    Hd = module.freq_gate(*leaves, TEMPERATURE)
    return (Hd.detach(), *torch.autograd.grad(Hd, leaves, gradient))


def cases(rate: float, budget: float) -> Iterator[dict[str, Any]]:
    for M, N, batch in SIZES:
        tensors = inputs(M, N, batch)
        gradient = torch.randn(batch, M, N, dtype=torch.complex64, generator=torch.Generator().manual_seed(1))
        doubled = tuple(x.to(torch.promote_types(x.dtype, torch.float64)) for x in tensors)
        for backward in (False, True):
            yield harness.measure(
                stem="freq_gate",
                op="freq_gate",
                backward=backward,
                size=f"{M}x{N}",
                batch=batch,
                eager=partial(call, reference, tensors, gradient, backward),
                ours=partial(call, functional, tensors, gradient, backward),
                exact=call(reference, doubled, gradient.to(torch.complex128), backward),
                macs=floor_macs(M, N, HIDDEN, backward),
                rate=rate,
                budget=budget,
            )


# an H200: bytes a second of a copy, float32 flops a second, TF32 multiply-adds a second
COPY, PLAIN, TENSOR = 4.3e12, 67e12, 247e12


def device_counts() -> None:
    """What both transforms of a sample cost on a device, in arithmetic: radix passes or matrix products."""
    print("\nBoth transforms on an H200, counted, not measured, nanoseconds a sample.")
    print("Radix passes are mostly plain additions, at half of the rate; with tf32x3 a product is three.")
    print(
        "| size | radix Mflop | product M multiply-adds | memory | radix | product, tf32 | product, tf32x3 |"
    )
    print("|---|---|---|---|---|---|---|")
    for M, N in ((64, 64), (63, 41), (128, 128), (256, 256)):
        flops = 2 * 5 * M * N * math.log2(M * N)
        macs = 8 * M * N * (M + N)
        times = (16 * M * N / COPY, 2 * flops / PLAIN, macs / TENSOR, 3 * macs / TENSOR)
        cells = (f"{M}x{N}", f"{flops / 1e6:.2f}", f"{macs / 1e6:.1f}", *(f"{1e9 * t:.0f}" for t in times))
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    harness.run(__doc__, cases)
    device_counts()
