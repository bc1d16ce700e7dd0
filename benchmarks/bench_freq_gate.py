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


# an H200: bytes a second of a copy and of shared memory (132 SMs, 128 bytes a clock), float32 flops a
# second, TF32 multiply-adds a second
COPY, SHARED, PLAIN, TENSOR = 4.3e12, 29e12, 67e12, 247e12
# float32 operations a number that tf32x3 takes to split it in two: round, subtract, round
SPLITTING = 3
# the points of the two passes of a side: what the kernel has, and what other sides would take
PASSES = {8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16)}
OTHERS = {96: (8, 12), 100: (10, 10)}


def device_counts() -> None:
    """What both transforms of a sample cost on a device, in arithmetic: radix passes or matrix products."""
    print(
        "\nBoth transforms on an H200, counted, not measured, nanoseconds a sample; * is what the "
        "kernel does.\n"
        "Radix passes are mostly plain additions, at half of the rate, and exchange both planes six\n"
        "times by way of shared memory, as factored products would. Products are with the whole DFT\n"
        "matrix, or factored, 8 x 8 and the like, as real tables of 16x16 and so on. With tf32x3 a\n"
        "product is three, and the float32 units split its operands: the second number. At 64x64 the\n"
        "compiled passes are 1,182 float32 instructions of 256 threads, 9 ns. So the passes are the\n"
        "cheapest at the highest precision; below it memory binds them all, and the passes stay\n"
        "exact. 96x100 would gain from factoring too; the sides of a tile in registers are powers of\n"
        "two, so it keeps whole products.\n"
    )
    print("| size | memory | exchanges | radix | product, tf32 | tf32x3 | factored, tf32 | tf32x3 |")
    print("|---|---|---|---|---|---|---|---|")
    for M, N in ((64, 64), (128, 128), (96, 100), (63, 41), (256, 256)):
        points, macs = M * N, 8 * M * N * (M + N)
        radix = 2 * 5 * points * math.log2(points) / (PLAIN / 2)
        cells = [
            f"{1e9 * 16 * points / COPY:.0f}",
            f"{1e9 * 6 * 16 * points / SHARED:.0f}",
            f"{1e9 * radix:.0f}",
        ]
        cells += [f"{1e9 * n * macs / TENSOR:.0f}" for n in (1, 3)]
        taken = PASSES | OTHERS
        if M in taken and N in taken:
            passes = taken[M] + taken[N]
            # p complex points are a real table of 2p, in eights, two of its columns a point
            factored = 2 * points * sum(2 * 8 * math.ceil(p / 4) for p in passes) / TENSOR
            split = 2 * points * 2 * SPLITTING * len(passes) / (PLAIN / 2)
            cells += [f"{1e9 * factored:.0f}", f"{3e9 * factored:.0f} + {1e9 * split:.0f}"]
        else:
            cells += ["-", "-"]
        if max(M, N) <= 128:
            for i in (1, 2) if M in PASSES and N in PASSES else (3, 4):
                cells[i] += " *"
        print(f"| {M}x{N} | {' | '.join(cells)} |")


if __name__ == "__main__":
    harness.run(__doc__, cases)
    device_counts()
