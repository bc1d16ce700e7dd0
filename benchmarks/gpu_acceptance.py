"""The acceptance run on a device: see `gpu_acceptance.sh`. Standard library alone up to the first step.

Every step runs in a process of its own under a time limit, against a copy of the package; its log and its
JSON go to the folder given, and a step that fails stops no other.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
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
            "PYTHONPATH": os.pathsep.join([folder, str(ROOT / "tests")]),
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
    import torch

    from lomacs_fast import functional, use_backend
    from lomacs_fast.benchmarks import stems

    for case in stems.CASES:
        drawn = stems.cast(stems.tensors(case, 3, stems.Size(19, 13, 5)), device)
        for name in names_of(case.function) if device == "cuda" else ["auto"]:
            with use_backend(name):
                stems.call(case, functional, drawn, True, everything=True)
            print(case.function, name, flush=True)
    if device == "cuda":
        torch.cuda.synchronize()


def bench(out: Path, device: str) -> None:
    """The suite of `lomacs-fast bench` until time is up, the network and the decompositions first."""
    import torch

    from lomacs_fast.benchmarks import report, suite

    torch.set_float32_matmul_precision("highest")
    rows: list[dict[str, Any]] = []
    target = out / "suite.json"

    def keep(found: list[dict[str, Any]]) -> None:
        # what was measured stays, should the next case end the process
        rows.extend(found)
        (out / "rows.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")

    end = time.monotonic() + LIMITS["bench"] - 20
    options = suite.Options(device, device == "cpu", 0.01 if device == "cpu" else 0.2, end=end, sweeps=False)
    if device == "cpu":
        options = dataclasses.replace(options, stems=("aeplus",), compiled=False)
    result = suite.run(options, keep)
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / "bench.md").write_text(report.markdown(result), encoding="utf-8")


STEPS = {"load": load, "sanitize": sanitize, "bench": bench}

if __name__ == "__main__":
    sys.exit(main())
