"""The gated convolution, forward and forward+backward: ours against the eager reference and the floor.

`python benchmarks/bench_gated_conv.py [--json FILE] [--threads 2]` checks values and gradients against
float64, then times interleaved variants of the module in one process. The floor is the arithmetic of taps and
pointwise product, without the gate, over the measured rate of a float32 matrix product in the same process.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from lomacs_fast import nn, reference
from lomacs_fast.benchmarks import harness

# tokens, width, taps, batch
SIZES = ((64, 64, 3, 256), (128, 64, 3, 64), (64, 64, 3, 1))


def floor_macs(T: int, d: int, k: int, backward: bool) -> int:
    """Multiply-adds a sample: taps and the pointwise product; then the gradients of both factors of each."""
    return (T * d * d + 2 * T * d * k) * (3 if backward else 1)


def call(module: Any, x: torch.Tensor, backward: bool) -> tuple[torch.Tensor, ...]:
    """Value and, with backward, the gradients of x and of every parameter."""
    if not backward:
        with torch.no_grad():
            return (module(x),)
    x = x.detach().requires_grad_()
    y = module(x)
    gradients = torch.autograd.grad(y, [x, *module.parameters()], torch.ones_like(y))
    return (y.detach(), *gradients)


def cases(rate: float, budget: float) -> Iterator[dict[str, Any]]:
    for T, d, k, batch in SIZES:
        torch.manual_seed(0)
        eager, ours = reference.GatedConv1D(d, k), nn.GatedConv1D(d, k)
        ours.load_state_dict(eager.state_dict())
        exact = reference.GatedConv1D(d, k).double()
        exact.load_state_dict(eager.state_dict())
        x = torch.randn(batch, T, d)
        for backward in (False, True):
            yield harness.measure(
                stem="gated_conv",
                op="gated_conv1d",
                backward=backward,
                size=f"T{T} d{d} k{k}",
                batch=batch,
                eager=partial(call, eager, x, backward),
                ours=partial(call, ours, x, backward),
                exact=call(exact, x.double(), backward),
                macs=floor_macs(T, d, k, backward),
                rate=rate,
                budget=budget,
            )


if __name__ == "__main__":
    harness.run(__doc__, cases)
