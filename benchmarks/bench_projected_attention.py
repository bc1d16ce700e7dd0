"""Projected attention, forward and forward+backward: ours against the eager reference and the floor.

`python benchmarks/bench_projected_attention.py [--json FILE] [--threads 2]` checks values and gradients
against float64, then times interleaved variants of the module in one process; the reference loops over groups
as the published module does. The floor is the arithmetic of the reduced, folded form over the measured rate
of a float32 matrix product in the same process.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from lomacs_fast import nn, reference
from lomacs_fast.benchmarks import harness

# tokens, width, groups, width of queries, reduced rows, batch
SIZES = ((64, 64, 4, 32, 32, 256), (128, 64, 4, 32, 32, 64), (64, 64, 4, 32, 32, 1))


def floor_macs(T: int, d: int, G: int, k: int, backward: bool) -> int:
    """Multiply-adds a sample: reduced tokens, keys and values, logits, values mixed; then their gradients."""
    g = d // G
    tokens, rows = G * T * k * g, G * k * g * g
    return 4 * tokens + 2 * rows + (8 * tokens + 4 * rows if backward else 0)


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
    for T, d, G, a, k, batch in SIZES:
        torch.manual_seed(0)
        eager = reference.GroupedProjectedAttention(d, a, G, T, k)
        ours = nn.GroupedProjectedAttention(d, a, G, T, k)
        ours.load_state_dict(eager.state_dict())
        exact = reference.GroupedProjectedAttention(d, a, G, T, k).double()
        exact.load_state_dict(eager.state_dict())
        x = torch.randn(batch, T, d)
        for backward in (False, True):
            yield harness.measure(
                stem="projected_attention",
                op="projected_attention",
                backward=backward,
                size=f"T{T} d{d} G{G} a{a} k{k}",
                batch=batch,
                eager=partial(call, eager, x, backward),
                ours=partial(call, ours, x, backward),
                exact=call(exact, x.double(), backward),
                macs=floor_macs(T, d, G, k, backward),
                rate=rate,
                budget=budget,
            )


if __name__ == "__main__":
    harness.run(__doc__, cases)
