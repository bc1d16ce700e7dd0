"""The acceptance run on a device: see `gpu_acceptance.sh`. Standard library alone up to the first step.

Every step runs in a process of its own under a time limit, against a copy of the package; its log and its
JSON go to the folder given, and a step that fails stops no other.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PREBUILT = ROOT / "build" / "native"
# seconds; together under nine minutes
LIMITS = {"load": 30, "test": 230, "sanitize": 60, "bench": 160, "latency": 30, "profile": 30}
# seconds that what ran into its limit has to report
PATIENCE = 8


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
    shutil.copytree(ROOT / "benchmarks", package / "benchmarks", ignore=shutil.ignore_patterns("results"))
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


def together(
    name: str, commands: dict[str, list[str]], out: Path, environment: dict[str, str], limit: int
) -> dict[str, Any]:
    """Run commands side by side, a log each: most of what a first test costs is compiling, a core each."""
    begin = time.monotonic()
    running = {}
    for label, command in commands.items():
        with (out / f"{name}-{label}.txt").open("wb") as file:
            running[label] = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=ROOT,
                start_new_session=True,
            )
    statuses: dict[str, int | str] = {}
    for label, process in running.items():
        try:
            statuses[label] = process.wait(max(0.1, limit - (time.monotonic() - begin)))
        except subprocess.TimeoutExpired:
            # asked first: pytest then tells what has failed
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
            # with the workers of its own, which may outlive it
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            statuses[label] = f"stopped after {limit} s"
    ends, parts = [], []
    for label in commands:
        log = out / f"{name}-{label}.txt"
        text = log.read_text(encoding="utf-8", errors="replace")
        log.unlink()
        parts.append(f"=== {label}: {statuses[label]}\n{text}")
        lines = text.splitlines()
        told = [found[0] for line in lines if (found := re.search(r"(FAILED|ERROR) \S+", line))]
        ends += [f"{label}: {statuses[label]}; {lines[-1] if lines else ''}", *dict.fromkeys(told)]
    (out / f"{name}.txt").write_text("\n".join(parts), encoding="utf-8")
    # pytest says 5 where nothing was selected
    wrong = [s for s in statuses.values() if s not in (0, 5)]
    return {
        "step": name,
        "status": wrong[0] if wrong else 0,
        "seconds": round(time.monotonic() - begin, 1),
        "end": ends,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--build", action="store_true")
    parser.add_argument("--only", nargs="+", choices=list(LIMITS), default=list(LIMITS), help="steps to run")
    parser.add_argument(
        "--stems", nargs="+", default=[], help="stems to measure; all of the suite's if not given"
    )
    parser.add_argument("--no-compile", action="store_true", help="measure without torch.compile")
    parser.add_argument(
        "--seconds", type=int, default=LIMITS["bench"], help="for bench, %(default)s if not given"
    )
    parser.add_argument("--step", choices=[*LIMITS], help=argparse.SUPPRESS)
    parser.add_argument("--function", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.build:
        build_ahead()
        return 0
    if args.out is None:
        parser.error("the folder for the results is missing")
    if args.step:
        device = "cpu" if args.dry_run else "cuda"
        if args.step == "sanitize":
            sanitize(device, args.function)
        else:
            STEPS[args.step](device, args)
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    if any(args.out.iterdir()):
        parser.error(f"{args.out} is not empty")
    with tempfile.TemporaryDirectory() as folder:
        stage(Path(folder))
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([folder, str(ROOT / "tests")]),
            "LOMACS_FAST_CACHE": str(Path(folder) / "cache"),
            # kernels that no device has run are what this run is for
            "LOMACS_FAST_UNPROVED": "1",
            "PYTHONUNBUFFERED": "1",
            # the staged package, not the checkout: pytest would put the current folder first
            "PYTHONSAFEPATH": "1",
        }
        return run_all(environment, args)


def functions() -> list[str]:
    """The functions that the suite has a case of, read from its source: nothing is imported."""
    text = (ROOT / "benchmarks" / "stems.py").read_text(encoding="utf-8")
    return re.findall(r'^    Case\("\w+", "(\w+)"', text, re.MULTILINE)


def tests(python: str, dry: bool) -> list[str]:
    """One run of pytest over what needs a device; most of its time compiles, a core each where xdist is."""
    command = [
        python,
        "-m",
        "pytest",
        "-v",
        "-o",
        "addopts=",
        "-p",
        "no:cacheprovider",
        "--tb=short",
        "--durations=25",
    ]
    folder = ROOT / "tests"
    if dry:
        return [*command, str(folder / "test_stems.py"), "-k", "aeplus_loss and 64x64x32"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(os.cpu_count()), "--dist", "worksteal"]
    kernels = sorted(folder.glob("test_kernels_*.py"))
    marked = [p for p in sorted(folder.glob("test_*.py")) if "mark.gpu" in p.read_text(encoding="utf-8")]
    # the interpreter's tests of kernels run on the device; what is compiled ahead needs none
    selected = "gpu or (test_kernels_ and not ahead and not compiled)"
    return [*command, *map(str, dict.fromkeys([*kernels, *marked])), "-k", selected]


def run_all(environment: dict[str, str], args: argparse.Namespace) -> int:
    python, out, dry = sys.executable, args.out, args.dry_run
    own = [python, __file__, str(out), *(["--dry-run"] if dry else []), "--step"]
    chosen = [
        *(["--stems", *args.stems] if args.stems else []),
        *(["--no-compile"] if args.no_compile else []),
    ]
    chosen += ["--seconds", str(args.seconds)]
    names = ["aeplus_loss"] if dry else functions()
    sanitizer = shutil.which("compute-sanitizer") if not dry else None
    watched = [sanitizer, "--error-exitcode", "9"] if sanitizer else []
    groups = {
        "test": {"tests": tests(python, dry)},
        "sanitize": {f: [*watched, *own, "sanitize", "--function", f] for f in names},
    }
    limits = LIMITS | {"bench": args.seconds}
    steps = [
        together(name, groups[name], out, environment, limits[name])
        if name in groups
        else step(name, [*own, name, *chosen], out, environment, limits[name])
        for name in LIMITS
        if name in args.only
    ]
    (out / "steps.json").write_text(json.dumps(steps, indent=1) + "\n", encoding="utf-8")
    for done in steps:
        print(f"--- {done['step']}: exit {done['status']} after {done['seconds']} s")
        print("\n".join(done["end"]))
    table = out / "bench.md"
    if table.is_file():
        print(table.read_text(encoding="utf-8"))
    return 0 if all(done["status"] == 0 for done in steps) else 1


def load(device: str, args: argparse.Namespace) -> None:
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
    (args.out / "environment.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in facts.items() if name != "table"}, indent=1))


def names_of(function: str) -> list[str]:
    """Backends of a function that a device has, ours first."""
    from lomacs_fast.ops.dispatch import OPS

    return [b.name for op in OPS.values() if op.name == function for b in op.backends if b.name != "eager"]


def sanitize(device: str, function: str) -> None:
    """A small odd size of a function once, under the sanitizer where it is there."""
    import torch

    import lomacs_fast
    from lomacs_fast import functional, use_backend
    from lomacs_fast.benchmarks import stems

    for case in (c for c in stems.CASES if c.function == function):
        drawn = stems.cast(stems.tensors(case, 3, stems.Size(19, 13, 5)), device)
        for name in names_of(case.function) if device == "cuda" else ["auto"]:
            try:
                with use_backend(name):
                    stems.call(case, functional, drawn, True, everything=True)
                    # what takes another way where nothing asks for gradients
                    stems.call(case, functional, drawn, False)
            except lomacs_fast.BackendError as refusal:
                # a backend of the CPU
                print(refusal, flush=True)
                continue
            print(case.function, name, flush=True)
    if device == "cuda":
        torch.cuda.synchronize()


def profile(device: str, args: argparse.Namespace) -> None:
    """What the time of a training step and of the frozen network goes to, kernel by kernel."""
    import torch

    from lomacs_fast import AEPlusLoss, LoMACSSVDNet, freeze
    from lomacs_fast.benchmarks import suite

    activity = torch.profiler.ProfilerActivity
    watched = [activity.CPU] if device == "cpu" else [activity.CPU, activity.CUDA]
    rows: list[dict[str, Any]] = []
    for size, main_batch in suite.MAIN:
        batch = 2 if device == "cpu" else main_batch
        H, sid = suite.channels(size, batch, device), torch.arange(batch, device=device) % 4
        net = suite.network(LoMACSSVDNet, size, device)
        frozen = freeze(net)
        # a replay would be one launch
        frozen.graphs = False
        stepper = suite._stepper(net, AEPlusLoss(), H, sid, device)
        for what, call in {"step": stepper, "frozen": functools.partial(frozen, H, sid)}.items():
            for _ in range(3):
                call()
            times = 5
            with torch.profiler.profile(activities=watched) as found:
                for _ in range(times):
                    call()
                if device == "cuda":
                    torch.cuda.synchronize()
            for event in found.key_averages():
                own = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
                if own and (device == "cpu" or event.device_type == torch.autograd.DeviceType.CUDA):
                    facts = {"what": what, "size": str(size), "batch": batch, "kernel": event.key[:200]}
                    rows.append(facts | {"count": event.count / times, "us": round(own / times, 2)})
    rows.sort(key=lambda row: (row["size"], row["what"], -row["us"]))
    (args.out / "profile.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print(
            f"{row['what']:7} {row['size']:10} {row['us']:8.1f} us {row['count']:6.1f}  {row['kernel'][:90]}"
        )


def latency(device: str, args: argparse.Namespace) -> None:
    """Wall time of a call of the frozen network, its CUDA graph and the launches, beside what it replaces."""
    import torch

    from lomacs_fast import LoMACSSVDNet, freeze, use_backend
    from lomacs_fast.benchmarks import suite

    def wall(call: Callable[[], Any], turns: int) -> float:
        for _ in range(3):
            call()
        return 1e6 * median(suite.seconds(call, device) for _ in range(turns))

    rows: list[dict[str, Any]] = []
    for (size, _), batches in zip(suite.MAIN, ((1, 16, 64, 256, 512, 4096), (1, 16, 64, 1024)), strict=True):
        net = suite.network(LoMACSSVDNet, size, device).eval()
        graph, launches = freeze(net), freeze(net)
        launches.graphs = False
        for batch in batches if device == "cuda" else (1,):
            H = suite.channels(size, batch, device)
            calls = {"graph": functools.partial(graph, H), "launches": functools.partial(launches, H)}
            if batch <= 16:
                calls["svd"] = functools.partial(torch.linalg.svd, H, full_matrices=False)
            turns = 30 if device == "cuda" else 2
            times = {name: wall(call, turns) for name, call in calls.items()}
            with use_backend("eager"), torch.no_grad():
                times["eager"] = wall(functools.partial(net, H, 0), 5)
            rows.append({"size": str(size), "batch": batch} | {k: round(x, 1) for k, x in times.items()})
            print(size, batch, *(f"{name} {x:.0f} us" for name, x in times.items()), flush=True)
    (args.out / "latency.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def bench(device: str, args: argparse.Namespace) -> None:
    """The suite of `lomacs-fast bench` until time is up, the network and the decompositions first."""
    import torch

    from lomacs_fast.benchmarks import report, suite

    torch.set_float32_matmul_precision("highest")
    out, rows = args.out, list[dict[str, Any]]()
    target = out / "suite.json"

    def keep(number: int, found: list[dict[str, Any]]) -> None:
        # what was measured stays, should the next case end the process
        rows.extend(found)
        (out / "rows.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")

    options = suite.Options(
        device,
        quick=device == "cpu",
        seconds=0.01 if device == "cpu" else 0.05,
        stems=("aeplus",) if device == "cpu" else tuple(args.stems),
        end=time.monotonic() + args.seconds - 20,
        sweeps=False,
        compiled=not (device == "cpu" or args.no_compile),
    )
    result = suite.run(options, keep)
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / "bench.md").write_text(report.markdown(result), encoding="utf-8")


STEPS = {"load": load, "bench": bench, "latency": latency, "profile": profile}

if __name__ == "__main__":
    sys.exit(main())
