"""Pruned networks: training step, forward and frozen inference against k_len and the gate's hidden width.

`python benchmarks/bench_pruning.py [--json FILE] [--threads 2]` prunes one network to every size, checks each
against its own eager twin in double precision, then times all sizes in turn: their differences are small, so
they have to see the same clock and load. The floor is the true count of real multiply-adds of the frozen
network, for the step three times as many, over the measured rate of a float32 product. A line a pass says how
far counts and time fall, and where a time rises by more than noise. The hidden width is a small part of the
count, and of the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor

import lomacs_fast
from lomacs_fast import reference
from lomacs_fast.benchmarks import harness
from lomacs_fast.benchmarks.bench_network import Step, channels, forward, joined, product
from lomacs_fast.metrics import contest_macs, eager_twin, true_macs
from lomacs_fast.pruning import prune

M, N, R, BATCH = 64, 64, 32, 64
# k_len and the gate's hidden width, from the network as it is built to a sixteenth of its attention
SIZES = ((64, 32), (32, 32), (16, 32), (8, 32), (4, 32), (4, 4))
# times of equal work differ by so much in one run
NOISE = 0.02
ROUNDS = 5


def pruned_step(net: Any, kind: Any, loss: Any, H: Tensor) -> Step:
    """A training step of `bench_network` with another network in it."""
    step = Step.__new__(Step)
    step.net = kind(**net.config)
    step.net.load_state_dict(net.state_dict())
    step.loss, step.H, step.sid = loss, H, torch.arange(len(H)) % 4
    if H.dtype == torch.complex128:
        step.net.double()
    step.optimizer = torch.optim.AdamW(step.net.parameters(), lr=0.0, weight_decay=1e-4)
    return step


def in_turn(calls: dict[Any, Callable[[], Any]], budget: float) -> dict[Any, list[float]]:
    """Times of all calls, interleaved for some rounds; those of ours for `budget` seconds more."""
    times: dict[Any, list[float]] = {name: [] for name in calls}
    begin, k = time.perf_counter(), 0
    while k < ROUNDS or time.perf_counter() - begin < budget:
        if k == ROUNDS:
            calls = {name: call for name, call in calls.items() if name[0] == "ours"}
            begin = time.perf_counter()
        for name in list(calls)[:: -1 if k % 2 else 1]:
            times[name].append(harness.seconds(calls[name]))
        k += 1
    return times


def checked(op: str, size: Any, eager: Any, ours: Any, exact: Any) -> tuple[float, float]:
    """Errors of ours and of eager; SystemExit where ours is wrong."""
    found = harness.error(ours, exact), harness.error(eager, exact)
    if not found[0] <= 4 * found[1] + 4 * torch.finfo(torch.float32).eps:
        raise SystemExit(f"wrong: {op} at {size}: error {found[0]:.2e}, eager {found[1]:.2e}")
    return found


def cases(rate: float, budget: float) -> Iterator[dict[str, Any]]:
    H = channels(M, N, BATCH)
    single, sid = H.to(torch.complex64), torch.arange(BATCH) % 4
    torch.manual_seed(0)
    whole = lomacs_fast.LoMACSSVDNet(M, N, R, 4, k_len=SIZES[0][0], gate_hidden=SIZES[0][1])
    nets = {(k, hidden): prune(whole, k_len=k, gate_hidden=hidden)[0] for k, hidden in SIZES}
    twins = {size: eager_twin(net) for size, net in nets.items()}
    frozen = {size: lomacs_fast.freeze(net) for size, net in nets.items()}
    macs = {size: true_macs(net, single, sid) for size, net in frozen.items()}
    facts = {
        size: {
            "k_len": size[0],
            "gate_hidden": size[1],
            "contest_macs_m": contest_macs(net) / 1e6,
            "true_macs_m": true_macs(net, single, sid) / 1e6,
            "frozen_true_macs_m": macs[size] / 1e6,
        }
        for size, net in nets.items()
    }
    ours_of: dict[str, dict[Any, Callable[[], Sequence[Tensor]]]] = {
        "forward": {size: partial(forward, net, single, sid) for size, net in nets.items()},
        "frozen": {size: partial(forward, net, single, sid) for size, net in frozen.items()},
        "training step": {
            size: pruned_step(net, lomacs_fast.LoMACSSVDNet, lomacs_fast.AEPlusLoss(), single)
            for size, net in nets.items()
        },
    }
    for op, ours in ours_of.items():
        step = op == "training step"
        eager: dict[Any, Callable[[], Sequence[Tensor]]] = {}
        errors = {}
        for size, net in nets.items():
            if step:
                eager[size] = pruned_step(net, reference.LoMACSSVDNet, reference.AEPlusLoss(), single)
                exact = joined(pruned_step(net, reference.LoMACSSVDNet, reference.AEPlusLoss(), H)())
                errors[size] = checked(op, size, joined(eager[size]()), joined(ours[size]()), exact)
            else:
                eager[size] = partial(forward, twins[size], single, sid)
                exact = product(forward(eager_twin(net).double(), H, sid))
                errors[size] = checked(op, size, product(eager[size]()), product(ours[size]()), exact)
        calls = {("ours", size): call for size, call in ours.items()}
        calls |= {("eager", size): call for size, call in eager.items()}
        times = in_turn(calls, 4 * budget if step else budget)
        us = {name: 1e6 * median(found) / BATCH for name, found in times.items()}
        # of the same round, which load and clock take alike
        first, last = SIZES[0], SIZES[-1]
        share = {
            size: median(a / b for a, b in zip(times["ours", size], times["ours", first], strict=True))
            for size in SIZES
        }
        for size in nets:
            floor = 1e6 * macs[size] * (3 if step else 1) / rate
            yield {
                "stem": "pruning",
                "op": op,
                "pass": "forward+backward" if step else "forward",
                "size": f"{M}x{N}x{R} k{size[0]} h{size[1]}",
                "batch": BATCH,
                "device": "cpu",
                "eager_us": us["eager", size],
                "ours_us": us["ours", size],
                "ratio_to_eager": us["eager", size] / us["ours", size],
                "floor_us": floor,
                "times_the_floor": us["ours", size] / floor,
                "error": errors[size][0],
                "eager_error": errors[size][1],
                "repeats": len(times["ours", size]),
                "share_of_the_whole": share[size],
            } | facts[size]
        rises = [b for a, b in pairwise(SIZES) if share[b] > (1 + NOISE) * share[a]]
        counted, true = (facts[last][name] / facts[first][name] for name in ("contest_macs_m", "true_macs_m"))
        print(
            f"{op}: the smallest has {counted:.2f} of the contest's count, {true:.2f} of the true one and "
            f"{share[last]:.2f} of the time; "
            + (f"time rises at {rises}" if rises else "no size takes longer than one with more to do")
            + "; shares "
            + " ".join(f"k{k}h{hidden} {share[k, hidden]:.3f}" for k, hidden in SIZES),
            flush=True,
        )


if __name__ == "__main__":
    harness.run(__doc__, cases)
