"""The AE+ loss, forward and forward+backward: ours against the eager reference, and both against the floor.

`python benchmarks/bench_aeplus.py [--json FILE] [--threads 2]` checks values and gradients against float64,
then times interleaved variants in one process. The floor is the arithmetic of the loss over the measured rate
of a float32 matrix product in the same process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lomacs_fast import functional, reference
from lomacs_fast.cli import processor_name

SIZES = ((64, 64, 32, 256), (128, 128, 64, 64), (64, 64, 32, 1))
WEIGHTS = {"lam": 0.2, "w_energy": 0.4, "w_diag": 0.3, "w_match": 0.3}
TERMS = ("rec", "ortho", "energy", "diag", "match")


def floor_macs(M: int, N: int, r: int, backward: bool) -> int:
    """Real multiply-adds a sample: H V, residual, M, two Gram triangles; backward H^H U, r x r algebra."""
    forward = 2 * 4 * M * N * r + 4 * M * r * r + 2 * (M + N) * r * r
    return forward + (4 * M * N * r + 2 * 4 * (M + N) * r * r if backward else 0)


def product_rate() -> float:
    """Multiply-adds a second of a float32 matrix product, the best of some."""
    a = torch.randn(1024, 1024)
    best = min(_seconds(lambda: a @ a) for _ in range(10))
    return 1024**3 / best


def _seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def inputs(
    M: int, N: int, r: int, batch: int, dtype: torch.dtype = torch.complex64
) -> tuple[torch.Tensor, ...]:
    """Nearly orthonormal factors of a noisy low-rank channel: what the loss sees in training."""
    generator = torch.Generator().manual_seed(0)
    real = torch.float64 if dtype == torch.complex128 else torch.float32

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.complex128, generator=generator)

    U, V = (torch.linalg.qr(normal(batch, n, r))[0] + 0.02 * normal(batch, n, r) for n in (M, N))
    S = torch.rand(batch, r, dtype=torch.float64, generator=generator).sort(-1, descending=True).values
    H = U * S[:, None] @ V.mH + 0.01 * normal(batch, M, N)
    return U.to(dtype), S.to(real), V.to(dtype), H.to(dtype)


def call(module: Any, tensors: tuple[torch.Tensor, ...], backward: bool) -> tuple[torch.Tensor, ...]:
    """Loss and, with backward, the gradients of U, S and V."""
    if not backward:
        with torch.no_grad():
            return (module.aeplus_loss(*tensors, **WEIGHTS)[0],)
    U, S, V, H = tensors
    leaves = [x.detach().requires_grad_() for x in (U, S, V)]
    loss, _ = module.aeplus_loss(*leaves, H, **WEIGHTS)
    return (loss.detach(), *torch.autograd.grad(loss, leaves))


def error(values: tuple[torch.Tensor, ...], exact: tuple[torch.Tensor, ...]) -> float:
    """The largest relative L2 error of the values."""
    norm = torch.linalg.vector_norm
    return max(float(norm(x - y) / norm(y)) for x, y in zip(values, exact, strict=True))


def measure(
    M: int, N: int, r: int, batch: int, backward: bool, rate: float, seconds: float
) -> dict[str, Any]:
    tensors = inputs(M, N, r, batch)
    exact = call(
        reference, tuple(x.to(torch.promote_types(x.dtype, torch.float64)) for x in tensors), backward
    )
    variants = {"eager": reference, "ours": functional}
    errors = {name: error(call(module, tensors, backward), exact) for name, module in variants.items()}
    if errors["ours"] > 2 * errors["eager"] + 4 * torch.finfo(torch.float32).eps:
        raise SystemExit(f"wrong at {M}x{N}x{r}: error {errors['ours']:.2e}, eager {errors['eager']:.2e}")
    times: dict[str, list[float]] = {name: [] for name in variants}
    begin, k = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds or k < 5:
        for name in sorted(variants, reverse=k % 2 == 1):
            times[name].append(_seconds(lambda name=name: call(variants[name], tensors, backward)))
        k += 1
    eager, ours = (median(times[name]) for name in ("eager", "ours"))
    floor = floor_macs(M, N, r, backward) * batch / rate
    return {
        "stem": "aeplus",
        "pass": "forward+backward" if backward else "forward",
        "size": f"{M}x{N}x{r}",
        "batch": batch,
        "device": "cpu",
        "eager_us": 1e6 * eager / batch,
        "ours_us": 1e6 * ours / batch,
        "ratio_to_eager": median(e / o for e, o in zip(times["eager"], times["ours"], strict=True)),
        "floor_us": 1e6 * floor / batch,
        "times_the_floor": ours / floor,
        "error": errors["ours"],
        "eager_error": errors["eager"],
        "repeats": k,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing a case")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rate = product_rate()
    cases = [measure(*size, backward, rate, args.seconds) for size in SIZES for backward in (False, True)]
    print(f"{args.threads} threads, float32 product {rate / 1e9:.0f} G multiply-adds/s")
    print("| size | batch | pass | eager us | ours us | ratio | floor us | x floor | error / eager's |")
    print("|---|---|---|---|---|---|---|---|---|")
    for c in cases:
        print(
            f"| {c['size']} | {c['batch']} | {c['pass']} | {c['eager_us']:.1f} | {c['ours_us']:.1f} | "
            f"{c['ratio_to_eager']:.1f} | {c['floor_us']:.1f} | {c['times_the_floor']:.2f} | "
            f"{c['error'] / c['eager_error']:.2f} |"
        )
    if args.json is not None:
        facts = {
            "date": str(date.today()),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": args.threads,
            "cores": os.cpu_count(),
            "processor": processor_name(),
            "product_gmacs": rate / 1e9,
            "cases": cases,
        }
        args.json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
