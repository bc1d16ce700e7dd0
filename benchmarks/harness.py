"""What every benchmark shares: numbers checked first, variants interleaved, the floor beside the time."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lomacs_fast.cli import processor_name

Call = Callable[[], Sequence[Tensor]]


def seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _kilobytes(name: str) -> int:
    """A line of what the system says about this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def peak_bytes(call: Callable[[], Any]) -> int | None:
    """What a call holds at most beyond what was held before it, scratch of kernels included.

    Resident memory, so make the call once before; None where the system does not tell.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
        # begins the peak anew
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = _kilobytes("VmRSS")
        call()
        return 1024 * (_kilobytes("VmHWM") - before)
    except (OSError, AttributeError):
        return None


def product_rate() -> float:
    """Multiply-adds a second of a float32 matrix product, the best of some."""
    a = torch.randn(1024, 1024)
    best = min(seconds(lambda: a @ a) for _ in range(10))
    return 1024**3 / best


def error(values: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest relative L2 error of the values."""
    norm = torch.linalg.vector_norm
    return max(float(norm(x - y) / norm(y)) for x, y in zip(values, exact, strict=True))


def measure(
    *,
    stem: str,
    op: str,
    backward: bool,
    size: str,
    batch: int,
    eager: Call,
    ours: Call,
    exact: Sequence[Tensor],
    macs: int,
    rate: float,
    budget: float,
    factor: float = 2,
    compared: Callable[[Sequence[Tensor]], Sequence[Tensor]] = list,
) -> dict[str, Any]:
    """Time eager and ours in turn for `budget` seconds; `macs` real multiply-adds a sample are the floor.

    `compared` makes of the outputs what is compared with `exact`; it is not timed.

    Raises:
        SystemExit: where ours is more than `factor` times as far from `exact` as eager, plus 4 eps: no time
            is given. Twice is the rule for an op; through a whole network rounding grows by more.
    """
    calls = {"eager": eager, "ours": ours}
    errors = {name: error(compared(call()), exact) for name, call in calls.items()}
    if not errors["ours"] <= factor * errors["eager"] + 4 * torch.finfo(torch.float32).eps:
        raise SystemExit(f"wrong: {op} at {size}: error {errors['ours']:.2e}, eager {errors['eager']:.2e}")
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin, k = time.perf_counter(), 0
    while time.perf_counter() - begin < budget or k < 5:
        for name in sorted(calls, reverse=k % 2 == 1):
            times[name].append(seconds(calls[name]))
        k += 1
    eager_s, ours_s = (median(times[name]) for name in ("eager", "ours"))
    floor = macs * batch / rate
    return {
        "stem": stem,
        "op": op,
        "pass": "forward+backward" if backward else "forward",
        "size": size,
        "batch": batch,
        "device": "cpu",
        "eager_us": 1e6 * eager_s / batch,
        "ours_us": 1e6 * ours_s / batch,
        "ratio_to_eager": median(e / o for e, o in zip(times["eager"], times["ours"], strict=True)),
        "floor_us": 1e6 * floor / batch,
        "times_the_floor": ours_s / floor,
        "error": errors["ours"],
        "eager_error": errors["eager"],
        "repeats": k,
    }


def run(description: str | None, cases: Callable[[float, float], Iterable[dict[str, Any]]]) -> None:
    """The command line of a benchmark; `cases(rate, budget)` measures, one dict a case."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing a case")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rate = product_rate()
    print(f"{args.threads} threads, float32 product {rate / 1e9:.0f} G multiply-adds/s")
    print("| op | size | batch | pass | eager us | ours us | ratio | floor us | x floor | error / eager's |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    found = []
    for c in cases(rate, args.seconds):
        found.append(c)
        relative = c["error"] / c["eager_error"] if c["eager_error"] else float(c["error"] > 0)
        cells = (
            c["op"],
            c["size"],
            c["batch"],
            c["pass"],
            *(f"{c[name]:.1f}" for name in ("eager_us", "ours_us", "ratio_to_eager", "floor_us")),
            *(f"{value:.2f}" for value in (c["times_the_floor"], relative)),
        )
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
    if args.json is not None:
        facts = {
            "date": str(date.today()),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": args.threads,
            "cores": os.cpu_count(),
            "processor": processor_name(),
            "product_gmacs": rate / 1e9,
            "cases": found,
        }
        args.json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
