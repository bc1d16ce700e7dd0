"""Adam on the networks of one matrix: whole, or by minibatches of its rows and columns."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from lomacs_fast.data.seeding import derive_seed

from .factors import NeuralSVD
from .sources import MatrixSource

__all__ = ["fit"]

RATES = {"table": 0.05, "mlp": 0.01}
EPOCH = 100  # steps between QR projections, and between two looks at lam and at the loss
LAST = 0.01  # of the learning rate, at the end of its cosine


def sample(source: MatrixSource, batch: tuple[int, int], seed: int, step: int) -> tuple[Any, Any]:
    """Rows and columns of a step, uniform and independent; a pure function of seed and step."""
    picked: list[Any] = []
    for side, (n, size) in enumerate(zip(source.shape, batch, strict=True)):
        if size >= n:
            picked.append(slice(0, n))
            continue
        generator = torch.Generator().manual_seed(derive_seed(seed, step, side) & (2**63 - 1))
        picked.append(torch.randint(n, (size,), generator=generator))
    return picked[0], picked[1]


def fit(
    net: NeuralSVD,
    source: MatrixSource,
    scale: float,
    *,
    balance: bool,
    lr: float | None,
    steps: int,
    tol: float,
    batch: tuple[int, int],
    seed: int,
    state: dict[str, Any] | None = None,
    after: Callable[[dict[str, Any], float], None] | None = None,
) -> tuple[dict[str, list[float]], int, bool]:
    """Train the networks on `H / scale`; returns history, steps and whether the loss settled.

    The loss has settled when its mean over an epoch changed by less than `tol` relative to the one before,
    twice in a row.
    """
    rate = RATES[net.net] if lr is None else lr
    optimizer = torch.optim.Adam(net.parameters(), rate)
    history: dict[str, list[float]] = {"loss": [], "main": [], "orth": [], "lam": []}
    step, calm, means = 0, 0, []
    if state is not None:
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        step, history, net.lam = state["step"], state["history"], state["lam"]
        calm, means = state["calm"], state["means"]
    whole = source.tensor / scale if source.tensor is not None else None
    fixed = whole is not None and batch[0] >= source.shape[0] and batch[1] >= source.shape[1]
    while step < steps:
        rows, columns = sample(source, batch, seed, step)
        if fixed:
            assert whole is not None
            H = whole
        elif whole is not None:
            H = whole[rows][:, columns]
        else:
            H = source.block(rows, columns) / scale
        if balance and net.orth == "penalty" and step % EPOCH == 0:
            net.balance(H, rows, columns)
        for group in optimizer.param_groups:
            turn = (1 + math.cos(math.pi * step / steps)) / 2
            group["lr"] = rate * (LAST + (1 - LAST) * turn)
        loss, terms = net.loss(H, rows, columns)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value} at step {step}; a smaller lr may help")
        history["loss"].append(value)
        history["lam"].append(net.lam)
        for name, term in terms.items():
            history[name].append(float(term))
        if step % EPOCH == 0:
            if net.orth == "qr":
                net.project()
            means = [*means[-1:], sum(history["loss"][-EPOCH:]) / EPOCH]
            small = len(means) == 2 and abs(means[1] - means[0]) <= tol * abs(means[1])
            calm = calm + 1 if small else 0
        if after is not None:
            found = {
                "net": net.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "history": history,
                "lam": net.lam,
                "calm": calm,
                "means": means,
            }
            after(found, value)
        if calm >= 2:
            break
    return history, step, calm >= 2
