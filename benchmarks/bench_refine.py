"""Approximation error and time of `approx_svd` against steps, beside the truncated SVD and its kin.

`python benchmarks/bench_refine.py --times [--json FILE]` times 64x64 with 32 columns, 16 of them active, at
batch 256 and 1: the fused op, the eager formula, `torch.linalg.svd`, `eigh` and `svd_lowrank(q=16)` in turn,
and a step of op and formula, forward and with its gradients. With `--trained` it times the network of
`load_pretrained("64x64x32")`, frozen, at some numbers of columns and steps beside the decompositions, and
prints the AE of each over that of the truncated SVD. The floor is the products that the formula counts, four
real ones a complex product, over the measured rate of a float32 product, and thrice that with gradients; the
kernel takes three, halves Hermitian ones and stops iterations early, and may be below it.
With `--device` it estimates microseconds a channel of the Triton kernels at 64x64 and 128x128 with 16 columns
on an H100, from operations counted where the kernels are interpreted: no device is needed.
`python benchmarks/bench_refine.py [--samples 8] [--json FILE]` takes the generator's noisy covariances and
clean channels and, where Sionna is installed, 3GPP covariances and channels (UMi, UMa and RMa, TR 38.901).
Errors are against the clean label. Multiply-adds are true real ones a sample, of everything that runs; the
SVD's are those of Golub and Reinsch.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import harness
import torch
from torch import Tensor

from lomacs_fast import approx_svd, freeze, functional, load_pretrained, use_backend
from lomacs_fast.data.generator import SCENARIOS, ChannelGenerator
from lomacs_fast.inference import decompose
from lomacs_fast.metrics import ae_terms, true_macs, truncated_svd
from lomacs_fast.reference import refine_products
from lomacs_fast.reference.refine import SWEEPS, default_scalars, dft_start

STEPS = (0, 1, 2, 3, 4, 6, 8, 10, 15)
SIZES = ((64, 64, 32), (128, 128, 64), (64, 32, 16))
PANELS = {32: (4, 4), 64: (4, 8), 128: (8, 8)}
CARRIERS, VECTORS, SNR_DB = 24, 768, 6.0
KNOBS = ((16, 3), (16, 4), (24, 4))  # active columns and steps of the trained network, as shipped first


def generated(M: int, N: int, kind: str, samples: int) -> tuple[Tensor, Tensor]:
    """Input and label: noisy and clean covariances, or a clean channel twice."""
    parts = [ChannelGenerator(M, N, scenario=s, kind=kind, seed=5).batch(range(samples)) for s in SCENARIOS]
    label = torch.cat([p.label for p in parts])
    return (torch.cat([p.input for p in parts]) if kind == "covariance" else label), label


def responses(M: int, N: int, samples: int) -> Tensor:
    """3GPP frequency responses between panels of M and N antennas, complex64 `(n, M, N, carriers)`."""
    import sionna.phy as phy
    from sionna.phy.channel import GenerateOFDMChannel, gen_single_sector_topology, tr38901
    from sionna.phy.ofdm import ResourceGrid

    found = []
    array = {"polarization": "dual", "polarization_type": "cross", "carrier_frequency": 3.5e9}
    for seed, name in enumerate(("umi", "uma", "rma")):
        phy.config.seed = seed + 1
        base, user = (
            tr38901.PanelArray(
                num_rows_per_panel=PANELS[n][0],
                num_cols_per_panel=PANELS[n][1],
                antenna_pattern=pattern,
                **array,
            )
            for n, pattern in ((M, "38.901"), (N, "omni"))
        )
        options = {} if name == "rma" else {"o2i_model": "low"}
        model = {"umi": tr38901.UMi, "uma": tr38901.UMa, "rma": tr38901.RMa}[name](
            carrier_frequency=3.5e9, ut_array=user, bs_array=base, direction="uplink", **options
        )
        topology = gen_single_sector_topology(samples, 1, name, min_ut_velocity=0, max_ut_velocity=20)
        model.set_topology(*topology)
        grid = ResourceGrid(1, CARRIERS, 20e6 / CARRIERS, num_tx=1)
        h = GenerateOFDMChannel(model, grid, normalize_channel=True)(samples)
        found.append(h[:, 0, :, 0, :, 0].to(torch.complex64))
    return torch.cat(found)


def received(h: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy and clean covariance of two user antennas over all carriers."""
    vectors = h[:, :, :2].flatten(2)
    noise = torch.randn(*h.shape[:2], VECTORS, dtype=h.dtype, generator=torch.Generator().manual_seed(0))
    noise = noise * vectors.abs().mean((1, 2))[:, None, None] * 10 ** (-SNR_DB / 20)
    noisy = vectors.repeat(1, 1, VECTORS // vectors.shape[-1]) + noise
    return noisy @ noisy.mH / VECTORS, vectors @ vectors.mH / vectors.shape[-1]


def data(samples: int) -> Iterator[tuple[str, int, Tensor, Tensor]]:
    for M, N, rank in SIZES:
        if M == N:
            yield f"covariance {M}x{N}", rank, *generated(M, N, "covariance", samples)
        yield f"channel {M}x{N}", rank, *generated(M, N, "channel", samples)
        if importlib.util.find_spec("sionna") is not None:
            h = responses(M, N, samples)
            if M == N:
                yield f"3GPP covariance {M}x{N}", rank, *received(h)
            yield f"3GPP channel {M}x{N}", rank, h[..., 0], h[..., 0]


def row(name: str, rank: int, H: Tensor, label: Tensor) -> Iterator[dict[str, Any]]:
    for steps in (None, *STEPS):

        def decompose(H: Tensor, steps: int | None = steps) -> tuple[Tensor, Tensor, Tensor]:
            return truncated_svd(H, rank) if steps is None else approx_svd(H, rank, steps)

        U, S, V = decompose(H)
        terms = ae_terms(U, S, V, label)
        yield {
            "data": name,
            "rank": rank,
            "steps": steps,
            "ae": float(terms.ae.mean()),
            "rec": float(terms.rec.mean()),
            "ortho": float(torch.maximum(terms.ortho_u, terms.ortho_v).max()),
            "columns": float((S > 0).sum(-1).double().mean()),
            "macs": true_macs(decompose, H),
        }


def medians(calls: dict[str, Any], batch: int, seconds: float) -> tuple[dict[str, float], int]:
    """Microseconds a sample of every call, taken in turn, and how often."""
    for call in calls.values():
        call()
    found: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(found["svd"]) < 3:
        for name, call in calls.items():
            found[name].append(harness.seconds(call))
    return {name: 1e6 * median(times) / batch for name, times in found.items()}, len(found["svd"])


def decompositions(H: Tensor, hermitian: bool) -> dict[str, Any]:
    calls: dict[str, Any] = {
        "svd": lambda: torch.linalg.svd(H),
        "svd_lowrank 16": lambda: torch.svd_lowrank(H, 16),
    }
    return calls | ({"eigh": lambda: torch.linalg.eigh(H)} if hermitian else {})


def with_gradients(backend: str, H: Tensor, steps: int, hermitian: bool) -> None:
    """Forward and backward of `refine_svd` from the DFT's start, gradients of everything."""
    with use_backend(backend), torch.enable_grad():
        start = dft_start(H, 16)
        h, u, v = (x.clone().requires_grad_() for x in (H, *start))
        scalars = default_scalars(max(steps, 1), H).requires_grad_()
        U, S, V = functional.refine_svd(
            h, u, v, steps, hermitian=hermitian, scalars=scalars, orthonormal=True
        )
        torch.autograd.backward((S, U, V), (S.detach(), U.detach(), V.detach()))


def without_gradients(backend: str, H: Tensor, steps: int, hermitian: bool) -> None:
    """Forward of `refine_svd` from the DFT's start, without completion."""
    with use_backend(backend):
        functional.refine_svd(H, *dft_start(H, 16), steps, hermitian=hermitian, orthonormal=True)


def row_of(
    kind: str, batch: int, name: str, us: float, svd: float, repeats: int, **more: Any
) -> dict[str, Any]:
    step = name.endswith("step")
    facts = {"data": kind, "batch": batch, "call": name, "us": us, "svd_ratio": None if step else svd / us}
    return facts | {"floor_us": None, "repeats": repeats} | more


def timed(seconds: float, rate: float) -> Iterator[dict[str, Any]]:
    """Microseconds a sample of every way to the leading triplets, and of one refinement step."""
    for kind in ("covariance", "channel"):
        tied, whole = kind == "covariance", generated(64, 64, kind, 64)[0]
        for batch in (256, 1):
            H = whole[:batch].contiguous()
            calls = decompositions(H, tied)
            for steps in (0, 4, 8):
                calls[f"fused, {steps} steps"] = lambda H=H, t=steps: approx_svd(H, 32, t, active=16)
            calls["fused, 8 steps, columns found"] = lambda H=H: approx_svd(H, 32, 8)

            def eager(H: Tensor, steps: int) -> Any:
                with use_backend("eager"):
                    return approx_svd(H, 32, steps, active=16)

            for steps in (0, 4):
                calls[f"eager, {steps} steps"] = lambda H=H, t=steps, eager=eager: eager(H, t)
            for steps in (0, 4) if batch > 1 else ():
                for who, backend in (("fused", "cpp"), ("eager", "eager")):
                    calls[f"{who}, {steps} steps alone"] = partial(without_gradients, backend, H, steps, tied)
                    calls[f"{who}, {steps} steps and gradients"] = partial(
                        with_gradients, backend, H, steps, tied
                    )
            micro, repeats = medians(calls, batch, seconds)
            # at batch 1 a difference of two times is noise
            for who in ("fused", "eager") if batch > 1 else ():
                most, least = (micro.pop(f"{who}, {t} steps alone") for t in (4, 0))
                micro[f"{who}, a step"] = (most - least) / 4
                most, least = (micro.pop(f"{who}, {t} steps and gradients") for t in (4, 0))
                micro[f"{who}, with gradients, a step"] = (most - least) / 4
            step = 4 * refine_products.step_products(64, 64, 16, 2, tied)
            floors = {
                f"fused, {t} steps": 4 * refine_products.products(64, 64, 32, 16, t, 2, tied, True)
                for t in (0, 4, 8)
            }
            floors["fused, a step"] = step
            floors["fused, with gradients, a step"] = 3 * step
            for name, us in micro.items():
                floor = 1e6 * floors[name] / rate if name in floors else None
                yield row_of(kind, batch, name, us, micro["svd"], repeats, floor_us=floor)


def trained(seconds: float) -> Iterator[dict[str, Any]]:
    """Microseconds a sample of the trained network beside the decompositions, and its AE over the SVD's."""
    parts = [ChannelGenerator(64, 64, scenario=s, seed=12).batch(range(64)) for s in SCENARIOS]
    whole = torch.cat([p.input for p in parts])
    base = torch.cat([ae_terms(*truncated_svd(p.input, 32), p.label).ae for p in parts]).mean()
    net = load_pretrained("64x64x32")
    nets, shares = {}, {}
    for active, steps in KNOBS:
        net.set_refine_steps(steps, active)
        name = f"trained network, {active} columns, {steps} steps"
        nets[name] = freeze(net)
        ae = [ae_terms(*decompose(nets[name], p.input, i), p.label).ae for i, p in enumerate(parts)]
        shares[name] = float(torch.cat(ae).mean() / base)
    for batch in (256, 1):
        H, sid = whole[:batch].contiguous(), torch.arange(4).repeat_interleave(64)[:batch]
        calls = decompositions(H, True) | {name: partial(frozen, H, sid) for name, frozen in nets.items()}
        micro, repeats = medians(calls, batch, seconds)
        for name, us in micro.items():
            yield row_of("covariance", batch, name, us, micro["svd"], repeats, ae_ratio=shares.get(name))


def time_all(args: argparse.Namespace) -> None:
    rate = harness.product_rate()
    print(f"{args.threads} threads, float32 product {rate / 1e9:.0f} G multiply-adds/s")
    print("| data | batch | call | us | times faster than svd | floor us |")
    print("|---|---|---|---|---|---|")
    found = []
    for c in trained(args.seconds) if args.trained else timed(args.seconds, rate):
        found.append(c)
        floor = "" if c["floor_us"] is None else f"{c['floor_us']:.1f}"
        ratio = "" if c["svd_ratio"] is None else f"{c['svd_ratio']:.2f}"
        name = c["call"] if c.get("ae_ratio") is None else f"{c['call']}, AE {c['ae_ratio']:.2f} of the SVD's"
        cells = (c["data"], c["batch"], name, f"{c['us']:.1f}", ratio, floor)
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
    if args.json is not None:
        facts = {
            "date": str(date.today()),
            "torch": torch.__version__,
            "threads": args.threads,
            "cores": os.cpu_count(),
            "processor": harness.processor_name(),
            "product_gmacs": rate / 1e9,
            "cases": found,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


# of an H100 SXM, dense; the rate of L2 is what microbenchmarks find, and a product of tensor cores in float32
# accuracy is three
PROCESSORS, CLOCK, TENSOR, MEMORY, CACHE = 132, 1.755e9, 247e12, 3.35e12, 5.5e12
SPLIT = 3
# programs of 4 warps and 255 registers a thread at once on a multiprocessor, and rows that four warps cover
RESIDENT, COVERED = 2, 64
# cycles of a complex product that waits for the one before it: 12 tensor instructions in a row of 33 cycles
# each, and some 370 others a warp in the compiled code (loads, splits, exchanges between threads) of 2 each
WAIT = 12 * 33 + 2 * 370


def counted(launch: Any) -> dict[str, float]:
    """What one sample of an interpreted launch does: products, multiply-adds, bytes loaded and stored."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    found = {"products": 0.0, "macs": 0.0, "executed": 0.0, "bytes": 0.0}
    dot, load, store = builder.create_dot, builder.create_masked_load, builder.create_masked_store

    def create_dot(a: Any, b: Any, *rest: Any) -> Any:
        (rows, inner), columns = a.data.shape, b.data.shape[1]
        found["products"] += 1 / 4  # four real ones are a complex one
        found["macs"] += rows * inner * columns
        found["executed"] += SPLIT * max(rows, COVERED) * inner * columns
        return dot(a, b, *rest)

    def create_load(pointers: Any, mask: Any, *rest: Any) -> Any:
        found["bytes"] += 4 * mask.data.sum()
        return load(pointers, mask, *rest)

    def create_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        found["bytes"] += 4 * mask.data.sum()
        return store(pointers, value, mask, *rest)

    builder.create_dot, builder.create_masked_load, builder.create_masked_store = (
        create_dot, create_load, create_store
    )  # fmt: skip
    try:
        launch.run()
    finally:
        builder.create_dot, builder.create_masked_load, builder.create_masked_store = dot, load, store
    return found


def estimated(M: int, k: int, tied: bool, backward: bool) -> Iterator[dict[str, Any]]:
    """Microseconds a channel of a launch by what it multiplies, moves and waits for, linear in steps."""
    from lomacs_fast.kernels.refine import refine_launch
    from lomacs_fast.kernels.refine_gradient import refine_backward_launch

    H = generated(M, M, "covariance", 1)[0][:1]
    h, u = torch.view_as_real(H).contiguous(), torch.view_as_real(dft_start(H, k)[0].contiguous())
    v = None if tied else u.clone()

    def operations(steps: int) -> dict[str, float]:
        scalars = default_scalars(1, H)[:steps].contiguous()
        if not backward:
            return counted(refine_launch(h, u, v, scalars, SWEEPS)[0])
        order, s, norm = torch.arange(k)[None], h.new_ones(1, k), h.new_ones(1)
        return counted(refine_backward_launch(u, s, v, norm, h, u, v, scalars, order, SWEEPS)[0])

    ends, one = operations(0), operations(1)
    factors = u.nbytes * (1 if tied else 2)
    memory = (2 * h.nbytes + 3 * factors) if backward else h.nbytes + 2 * factors
    for steps in (4, 8):
        total = {name: ends[name] + steps * (one[name] - ends[name]) for name in ends}
        times = {
            "tensor_us": 1e6 * total["executed"] / TENSOR,
            "memory_us": 1e6 * memory / MEMORY,
            "cache_us": 1e6 * total["bytes"] / CACHE,
            "waiting_us": 1e6 * total["products"] * WAIT / CLOCK / (RESIDENT * PROCESSORS),
        }
        yield {"size": M, "tied": tied, "backward": backward, "steps": steps} | total | times


def estimate_all(args: argparse.Namespace) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        # it must be set before Triton is imported
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"TRITON_INTERPRET": "1"})
    header = "size", "form", "launch", "steps", "products in a row", "M multiply-adds", "M executed"
    header += "MB through scratch", "tensor us", "memory us", "L2 us", "waiting us", "us a channel"
    print(f"| {' | '.join(header)} |")
    print("|" + "---|" * len(header))
    found = []
    for M, tied, backward in itertools.product((64, 128), (True, False), (False, True)):
        for e in estimated(M, 16, tied, backward):
            found.append(e)
            names = ("tensor_us", "memory_us", "cache_us", "waiting_us")
            cells = [
                f"{M}x{M}",
                "Hermitian" if tied else "general",
                "backward" if backward else "forward",
                e["steps"],
                f"{e['products']:.0f}",
                f"{e['macs'] / 1e6:.2f}",
                f"{e['executed'] / 1e6:.1f}",
                f"{e['bytes'] / 1e6:.2f}",
                *(f"{e[name]:.3f}" for name in names),
                f"{max(e[name] for name in names):.2f}",
            ]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps({"estimated": found}, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=8, help="a scenario or model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--times", action="store_true", help="time it instead")
    parser.add_argument("--trained", action="store_true", help="time the trained network")
    parser.add_argument("--device", action="store_true", help="estimate the kernels' time on a device")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing a batch")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    if args.device:
        estimate_all(args)
        return
    if args.times or args.trained:
        time_all(args)
        return
    print("| data | rank | steps | AE | orthogonality | columns | M multiply-adds |")
    print("|---|---|---|---|---|---|---|")
    found = []
    for case in data(args.samples):
        for r in row(*case):
            found.append(r)
            steps = "SVD" if r["steps"] is None else r["steps"]
            print(
                f"| {r['data']} | {r['rank']} | {steps} | {r['ae']:.4f} | {r['ortho']:.1e} | "
                f"{r['columns']:.1f} | {r['macs'] / 1e6:.2f} |",
                flush=True,
            )
    if args.json is not None:
        args.json.write_text(json.dumps({"torch": torch.__version__, "cases": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
