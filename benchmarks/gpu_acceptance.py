"""The acceptance run on a device: see `gpu_acceptance.sh`. Standard library alone up to the first step.

Every step runs in a process of its own under a time limit, against a copy of the package; its log and its
JSON go to the folder given, and a step that fails stops no other.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PREBUILT = ROOT / "build" / "native"
# seconds; together under nine minutes
LIMITS = {"load": 150, "test": 120, "kernels": 90, "sanitize": 60, "bench": 110}


def build_ahead() -> None:
    """The libraries of this machine's torch and compilers into `build/native`, for machines without them."""
    sys.path.insert(0, str(ROOT / "lomacs_fast" / "ops"))
    import toolchain

    for kind in toolchain.KINDS:
        if toolchain.find_compiler(kind) is not None:
            target = PREBUILT / toolchain.library_name(kind)
            toolchain.build(kind, ROOT / "csrc", target)
            target.with_suffix(".key").write_text(
                toolchain.key_of_sources(ROOT / "csrc", kind), encoding="ascii"
            )
            print(target)


def stage(folder: Path) -> None:
    """The package as an installation lays it out, without installing anything."""
    package = folder / "lomacs_fast"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "lomacs_fast", package, ignore=ignore)
    shutil.copytree(ROOT / "kernels", package / "kernels", ignore=ignore)
    shutil.copytree(ROOT / "csrc", package / "_csrc", ignore=ignore)
    if PREBUILT.is_dir():
        shutil.copytree(PREBUILT, package / "_native")


def step(name: str, command: list[str], out: Path, environment: dict[str, str], limit: int) -> dict[str, Any]:
    """Run one step; its status and the end of its log."""
    log = out / "log.txt"
    start = log.stat().st_size if log.exists() else 0
    begin = time.monotonic()
    with log.open("ab") as file:
        try:
            status: int | str = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, timeout=limit
            ).returncode
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit} s"
        except OSError as error:
            status = str(error)
    lines = log.read_bytes()[start:].decode(errors="replace").splitlines()
    return {"step": name, "status": status, "seconds": round(time.monotonic() - begin, 1), "end": lines[-15:]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--build", action="store_true")
    parser.add_argument("--step", choices=["load", "sanitize", "bench"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.build:
        build_ahead()
        return 0
    if args.out is None:
        parser.error("the folder for the results is missing")
    if args.step:
        STEPS[args.step](args.out, "cpu" if args.dry_run else "cuda")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    if any(args.out.iterdir()):
        parser.error(f"{args.out} is not empty")
    with tempfile.TemporaryDirectory() as folder:
        stage(Path(folder))
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([folder, str(ROOT / "benchmarks"), str(ROOT / "tests")]),
            "LOMACS_FAST_CACHE": str(Path(folder) / "cache"),
            # kernels that no device has run are what this run is for
            "LOMACS_FAST_UNPROVED": "1",
            "PYTHONUNBUFFERED": "1",
        }
        return run_all(args.out, args.dry_run, environment)


def run_all(out: Path, dry: bool, environment: dict[str, str]) -> int:
    python = sys.executable
    own = [python, __file__, str(out), *(["--dry-run"] if dry else []), "--step"]
    pytest = [python, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    kernels = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests").glob("test_kernels_*.py"))
    cuda = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests").glob("test_cuda_*.py"))
    # what is compiled ahead, or run by the host, needs no device
    marked = ["tests/test_stems.py", *cuda, "-m", "gpu", f"--junitxml={out / 'tests.xml'}"]
    sanitizer = shutil.which("compute-sanitizer") if not dry else None
    commands = {
        "load": [*own, "load"],
        "test": [*pytest, "tests/test_stems.py", "-k", "64x64x32"] if dry else [*pytest, *marked],
        "kernels": [*pytest, *(kernels[:1] if dry else kernels), "-k", "not ahead"],
        "sanitize": [*([sanitizer, "--error-exitcode", "9"] if sanitizer else []), *own, "sanitize"],
        "bench": [*own, "bench"],
    }
    steps = [step(name, command, out, environment, LIMITS[name]) for name, command in commands.items()]
    (out / "steps.json").write_text(json.dumps(steps, indent=1) + "\n", encoding="utf-8")
    for done in steps:
        print(f"--- {done['step']}: exit {done['status']} after {done['seconds']} s")
        print("\n".join(done["end"]))
    table = out / "bench.md"
    if table.is_file():
        print(table.read_text(encoding="utf-8"))
    return 0 if all(done["status"] == 0 for done in steps) else 1


def load(out: Path, device: str) -> None:
    """Load or build the libraries, and say what serves what."""
    import torch

    import lomacs_fast
    from lomacs_fast.ops import native

    facts: dict[str, Any] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "package": lomacs_fast.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "libraries": {kind: native.reasons(kind) or native.libraries[kind].state for kind in ("cpu", device)},
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {"device": properties.name, "memory": properties.total_memory, "cuda": torch.version.cuda}
    try:
        import triton

        facts["triton"] = triton.__version__
    except ImportError:
        facts["triton"] = None
    facts["table"] = lomacs_fast.backend_table()
    (out / "environment.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in facts.items() if name != "table"}, indent=1))


def names_of(function: str) -> list[str]:
    """Backends of a function that a device has, ours first."""
    from lomacs_fast.ops.dispatch import OPS

    return [b.name for op in OPS.values() if op.name == function for b in op.backends if b.name != "eager"]


def sanitize(out: Path, device: str) -> None:
    """Small odd sizes of everything once, under the sanitizer where it is there."""
    import stems
    import torch

    from lomacs_fast import functional, use_backend

    for case in stems.CASES:
        drawn = stems.cast(stems.tensors(case, 3, stems.Size(19, 13, 5)), device)
        for name in names_of(case.function) if device == "cuda" else ["auto"]:
            with use_backend(name):
                stems.call(case, functional, drawn, True, everything=True)
            print(case.function, name, flush=True)
    if device == "cuda":
        torch.cuda.synchronize()


def timed(call: Callable[[], Any], device: str) -> Callable[[], float]:
    """What measures one run of `call`: replays of a captured graph on a device, the clock on a CPU."""
    import torch

    if device == "cpu":

        def once() -> float:
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin

        return once
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def replay(times: int = 10) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(times):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / times

    return replay


def interleaved(variants: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, once in variants.items():
            times[name].append(once())
    return {name: median(values) for name, values in times.items()}


def bench(out: Path, device: str) -> None:
    """Every function, the training step and inference; a variant that is wrong gets no time."""
    import torch

    torch.set_float32_matmul_precision("highest")
    rows: list[dict[str, Any]] = []
    end = time.monotonic() + LIMITS["bench"] - 15
    for work in (bench_network, bench_functions):
        work(rows, device, end)
        (out / "bench.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    lines = ["| what | size | batch | pass | variant | us | ratio to eager | error |", "|---" * 8 + "|"]
    for row in rows:
        time_us = f"{1e6 * row['median_s']:.1f}" if row.get("median_s") else row["trouble"]
        ratio = f"{row['ratio_to_eager']:.2f}" if row.get("ratio_to_eager") else ""
        error = f"{row['error']:.1e}" if row.get("error") is not None else ""
        cells = (row["what"], row["size"], row["batch"], row["pass"], row["variant"], time_us, ratio, error)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    (out / "bench.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def collect(
    rows: list[dict[str, Any]],
    facts: dict[str, Any],
    calls: Mapping[str, Callable[[], Any]],
    errors: Mapping[str, float],
    bound: float | None,
    device: str,
) -> None:
    """Time the variants that are right and append a row each."""
    ready: dict[str, Callable[[], float]] = {}
    trouble: dict[str, str] = {}
    for name, call in calls.items():
        error = errors.get(name)
        if bound is not None and error is not None and not error <= bound:
            trouble[name] = "wrong"
            continue
        try:
            ready[name] = timed(call, device)
        except Exception as failure:
            trouble[name] = f"{type(failure).__name__}: {' '.join(str(failure).split())[:120]}"
    medians = interleaved(ready, 3 if device == "cpu" else 11)
    for name in calls:
        row = facts | {"variant": name, "device": device, "error": errors.get(name)}
        if name in medians:
            row["median_s"] = medians[name]
            row["ratio_to_eager"] = medians["eager"] / medians[name] if "eager" in medians else None
        else:
            row["trouble"] = trouble[name]
        rows.append(row)


def largest_error(call: Callable[[], Any], exact: list[Any]) -> float:
    """The largest relative L2 error of what a variant computes; NaN where it raises, saying why."""
    try:
        return max(float((x.detach() - y).norm() / y.norm()) for x, y in zip(call(), exact, strict=True))
    except Exception as failure:
        print(f"{type(failure).__name__}: {' '.join(str(failure).split())[:500]}", flush=True)
        return float("nan")


def bench_functions(rows: list[dict[str, Any]], device: str, end: float) -> None:
    import stems
    import torch

    from lomacs_fast import functional, reference, use_backend

    def served(name: str, case: Any, drawn: Any, backward: bool) -> list[Any]:
        with use_backend(name):
            return stems.call(case, functional, drawn, backward)

    eps = torch.finfo(torch.float32).eps
    sizes = [(stems.Size(64, 64, 32), 256), (stems.Size(128, 128, 64), 64)]
    if device == "cpu":
        sizes = [(stems.Size(16, 16, 4), 2)]
    cases = [(*size, case, backward) for size in sizes for case in stems.CASES for backward in (False, True)]
    for size, batch, case, backward in cases:
        if time.monotonic() > end:
            return
        drawn = stems.tensors(case, batch, size)
        single = stems.cast(drawn, device)
        exact = stems.call(case, reference, stems.cast(drawn, device, double=True), backward)
        calls = {"eager": partial(stems.call, case, reference, single, backward)}
        for name in names_of(case.function) if device == "cuda" else ["auto"]:
            calls[name] = partial(served, name, case, single, backward)
        errors = {name: largest_error(call, exact) for name, call in calls.items()}
        facts = {
            "what": case.function,
            "size": str(size),
            "batch": batch,
            "pass": "forward+backward" if backward else "forward",
        }
        collect(rows, facts, calls, errors, 2 * errors["eager"] + 4 * eps, device)


def train(net: Any, loss: Any, backend: str, H: Any, sid: Any) -> list[Any]:
    """Loss and gradients of a step."""
    import torch

    from lomacs_fast import use_backend

    with use_backend(backend):
        U, S, V, _ = net(H, sid)
        value = loss(U, S, V, H, 0.4, 0.3, 0.3, 0.2)
        return [value, *torch.autograd.grad(value, list(net.parameters()))]


def infer(net: Any, backend: str, H: Any, sid: Any) -> Any:
    import torch

    from lomacs_fast import use_backend

    with torch.no_grad(), use_backend(backend):
        return net(H, sid)


def bench_network(rows: list[dict[str, Any]], device: str, end: float) -> None:
    """The training step, and the factors of as many channels as a slot has, beside the decompositions."""
    import torch

    import lomacs_fast
    from lomacs_fast import reference

    sizes = [(64, 64, 32, 256, 4368), (128, 128, 64, 64, 1092)]
    if device == "cpu":
        sizes = [(8, 8, 3, 4, 6)]
    ours, theirs = lomacs_fast.AEPlusLoss(), reference.AEPlusLoss()
    for M, N, r, batch, slot in sizes:
        torch.manual_seed(0)
        eager = reference.LoMACSSVDNet(M, N, r, 4).to(device)
        fast = lomacs_fast.LoMACSSVDNet(M, N, r, 4).to(device)
        double = reference.LoMACSSVDNet(M, N, r, 4).to(device).double()
        for net in (fast, double):
            net.load_state_dict(eager.state_dict())
        H = torch.randn(slot, M, N, dtype=torch.complex64, device=device) / (M * N) ** 0.5
        sid = torch.zeros(slot, dtype=torch.int64, device=device)
        few = (H[:batch], sid[:batch])
        exact = train(double, theirs, "eager", few[0].to(torch.complex128), few[1])
        steps = {
            "eager": partial(train, eager, theirs, "eager", *few),
            "torch.compile": partial(train, torch.compile(eager), theirs, "eager", *few),
            "ours": partial(train, fast, ours, "auto", *few),
        }
        errors = {name: largest_error(call, [x.detach() for x in exact]) for name, call in steps.items()}
        facts = {"size": f"{M}x{N}x{r}", "batch": batch, "what": "training step", "pass": "forward+backward"}
        # rounding grows through the network; a wrong gradient is far larger
        collect(rows, facts, steps, errors, max(10 * errors["eager"], 1e-3), device)
        if time.monotonic() > end:
            return
        calls = {
            "eager": partial(infer, eager, "eager", H, sid),
            "ours": partial(infer, fast, "auto", H, sid),
        }
        facts = {"size": f"{M}x{N}x{r}", "batch": slot, "what": "inference", "pass": "forward"}
        collect(rows, facts, calls, {}, None, device)
        decompositions(rows, facts, H, device)


def decompositions(rows: list[dict[str, Any]], facts: dict[str, Any], H: Any, device: str) -> None:
    import torch

    # one after the other on a host loop: a part of the batch tells the time of one
    part = H[: max(1, len(H) // 64)]
    drivers = ["gesvd", "gesvdj", "gesvda"] if device == "cuda" else [None]
    for driver in drivers:
        begin = time.perf_counter()
        torch.linalg.svd(part, full_matrices=False, driver=driver)
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        torch.linalg.svd(part, full_matrices=False, driver=driver)
        if device == "cuda":
            torch.cuda.synchronize()
        took = (time.perf_counter() - begin) * len(H) / len(part)
        rows.append(facts | {"variant": f"svd {driver or 'LAPACK'}", "device": device, "median_s": took})


STEPS = {"load": load, "sanitize": sanitize, "bench": bench}

if __name__ == "__main__":
    sys.exit(main())
