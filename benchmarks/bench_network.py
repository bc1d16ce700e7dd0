"""The network: training step, forward and frozen inference, against the eager reference and LAPACK.

`python benchmarks/bench_network.py [--json FILE] [--threads 2]`. The step is forward, AE+ loss, backward,
clipping and AdamW, fused for both sides. Before it is timed its gradients are compared with double precision.
The floor is the arithmetic of the architecture, a complex product four real ones, over the measured rate of a
float32 product. `peak_MB` is what a step holds at most beyond weights, gradients and moments, the kernels'
scratch included.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import lomacs_fast
from lomacs_fast import reference
from lomacs_fast.benchmarks import harness

SIZES = ((64, 64, 32, 256), (128, 128, 64, 64), (64, 64, 32, 1))
WEIGHTS = (0.4, 0.3, 0.3, 0.2)


def channels(M: int, N: int, batch: int) -> Tensor:
    """Noisy channels of a few paths at unit norm."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.complex128, generator=generator)

    H = normal(batch, M, 6) @ normal(batch, 6, N) + 0.3 * normal(batch, M, N)
    return H / torch.linalg.vector_norm(H, dim=(1, 2), keepdim=True)


def network(kind: type[nn.Module], M: int, N: int, r: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return kind(M, N, r, 4).to(dtype)


class Step:
    """A training step; called, it makes one and returns the loss and the gradients it had."""

    def __init__(
        self, kind: type[nn.Module], loss: nn.Module, H: Tensor, r: int, dtype: torch.dtype = torch.float32
    ) -> None:
        self.net, self.loss, self.H = network(kind, *H.shape[1:], r, dtype), loss, H
        self.sid = torch.arange(len(H)) % 4
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=0.0, weight_decay=1e-4, fused=True)

    def __call__(self) -> Sequence[Tensor]:
        self.optimizer.zero_grad()
        U, S, V, _ = self.net(self.H, self.sid)
        value = self.loss(U, S, V, self.H, *WEIGHTS)
        value.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        return [value.detach(), *(p.grad for p in self.net.parameters() if p.grad is not None)]


def joined(results: Sequence[Tensor]) -> Sequence[Tensor]:
    """The loss, and all gradients as one."""
    value, *gradients = results
    return [value, torch.cat([g.flatten() for g in gradients])]


def forward(net: nn.Module, H: Tensor, sid: Tensor) -> Sequence[Tensor]:
    with torch.no_grad():
        return net(H, sid)


def product(factors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The reconstruction: columns of close singular values may change places between precisions."""
    U, S, V, *_ = factors
    return [(U * S[:, None].to(U.dtype)) @ V.mH]


def floor_macs(M: int, N: int, r: int) -> int:
    """Real multiply-adds of a forward at the published sizes, reductions by exact algebra included."""
    d, G, k, a, taps, hidden = 64, 4, 32, min(r, 32), 3, 32
    g = d // G
    fft = 2 * 5 * M * N * (M * N).bit_length() // 2
    gate = 2 * hidden * (M + N)
    tokens = 2 * N * 2 * d * M
    attention = G * (2 * k * M * g + 2 * k * g * max(a, g) + M * g * a + M * k * a + M * k * g + M * g * g)
    conv = 2 * d * taps * M + d * d * M
    heads = d * (2 * M * r + 2 * N * r + r)
    tail = 4 * (M + N) * r * r * 3 // 2 + 4 * M * N * r
    return fft + gate + tokens + attention + conv + heads + tail


def cases(rate: float, budget: float) -> Iterator[dict[str, Any]]:
    for M, N, r, batch in SIZES:
        H = channels(M, N, batch)
        single, sid = H.to(torch.complex64), torch.arange(batch) % 4
        eager, ours = (network(kind, M, N, r) for kind in (reference.LoMACSSVDNet, lomacs_fast.LoMACSSVDNet))
        double = network(reference.LoMACSSVDNet, M, N, r).double()
        common = {"stem": "network", "size": f"{M}x{N}x{r}", "batch": batch, "rate": rate, "budget": budget}
        macs = floor_macs(M, N, r)
        case = harness.measure(
            op="forward",
            backward=False,
            eager=partial(forward, eager, single, sid),
            ours=partial(forward, ours, single, sid),
            exact=product(forward(double, H, sid)),
            compared=product,
            macs=macs,
            factor=4,
            **common,
        )
        frozen = harness.measure(
            op="frozen",
            backward=False,
            eager=partial(forward, eager, single, sid),
            ours=partial(forward, lomacs_fast.freeze(ours), single, sid),
            exact=product(forward(double, H, sid)),
            compared=product,
            macs=macs,
            factor=4,
            **common,
        )
        svd = [harness.seconds(partial(torch.linalg.svd, single, full_matrices=False)) for _ in range(5)]
        lapack = {"lapack_us": 1e6 * sorted(svd)[2] / batch}
        yield case | lapack
        yield frozen | lapack
        steps = [
            Step(reference.LoMACSSVDNet, reference.AEPlusLoss(), single, r),
            Step(lomacs_fast.LoMACSSVDNet, lomacs_fast.AEPlusLoss(), single, r),
        ]
        exact = Step(reference.LoMACSSVDNet, reference.AEPlusLoss(), H, r)
        exact.net.load_state_dict(double.state_dict())
        exact.net.double()
        step = harness.measure(
            op="training step",
            backward=True,
            eager=steps[0],
            ours=steps[1],
            exact=joined(exact()),
            compared=joined,
            macs=3 * macs,
            factor=4,
            **common,
        )
        del exact
        yield step | {"peak_MB": peaks(steps)}


def peaks(steps: Sequence[Step]) -> dict[str, float] | None:
    """Peak memory of a step, eager and ours."""
    found = [harness.peak_bytes(step) for step in steps]
    return {name: x / 1e6 for name, x in zip(("eager", "ours"), found, strict=True) if x is not None} or None


if __name__ == "__main__":
    harness.run(__doc__, cases)
