"""How the native libraries are compiled: the one place that knows sources, compilers and flags.

Standard library alone and no import of torch or of the package: `setup.py` loads this file by its path.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

KINDS = ("cpu", "cuda")
SUFFIXES = {"cpu": (".cpp",), "cuda": (".cu", ".cpp")}
TEXTS = (".cpp", ".cu", ".h", ".hpp", ".cuh", ".inc", ".inl")
# the oldest torch whose stable ABI the libraries use: 2.10
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
ARCHITECTURES = ("80", "90", "100", "120")


class BuildError(RuntimeError):
    """A library could not be built; one sentence says why."""


def library_name(kind: str) -> str:
    """File name of the library; `.so` on every system that is served."""
    return f"liblomacs_{kind}.so"


def sources(csrc: Path, kind: str) -> list[Path]:
    """The files to compile for a library."""
    return sorted(p for p in (csrc / kind).glob("*") if p.suffix in SUFFIXES[kind])


def key_of_sources(csrc: Path, kind: str) -> str:
    """Hash of everything that a library is compiled from, by name and content: `csrc` less other kinds."""
    others = [csrc / other for other in KINDS if other != kind]
    digest = hashlib.sha256()
    for path in sorted(p for p in csrc.rglob("*") if p.suffix in TEXTS and not set(others) & set(p.parents)):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(csrc).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def torch_root() -> Path | None:
    """The folder of the torch package, without importing it."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def torch_versions(root: Path) -> tuple[str, str | None]:
    """Version of torch, and of the CUDA it was built with, without importing it."""
    spec = importlib.util.spec_from_file_location("_lomacs_torch_version", root / "version.py")
    if spec is None or spec.loader is None:
        raise BuildError(f"{root} holds no torch")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.__version__), getattr(module, "cuda", None)


def find_compiler(kind: str) -> list[str] | None:
    """The compiler's command: `CXX` (`NVCC`) where set, else the first one found; None without any."""
    variable, names = ("NVCC", ("nvcc",)) if kind == "cuda" else ("CXX", ("g++", "clang++", "c++"))
    if kind == "cpu" and sys.platform == "darwin":
        names = ("clang++", "c++")
    given = shlex.split(os.environ.get(variable, ""))
    if given:
        return given if shutil.which(given[0]) else None
    for name in names:
        if shutil.which(name):
            return [name]
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    nvcc = Path(home) / "bin" / "nvcc"
    return [str(nvcc)] if kind == "cuda" and nvcc.is_file() else None


@functools.lru_cache(maxsize=8)
def compiler_version(*command: str) -> str:
    """What the compiler says about itself."""
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{command[0]} does not run: {error}") from error
    return done.stdout.strip() or done.stderr.strip()


@functools.lru_cache(maxsize=1)
def architectures() -> tuple[str, ...]:
    """Those of our architectures that the `nvcc` found can compile for; all where it does not say."""
    nvcc = find_compiler("cuda")
    if nvcc is None:
        return ARCHITECTURES
    try:
        done = subprocess.run([*nvcc, "--list-gpu-arch"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return ARCHITECTURES
    known = done.stdout.split()
    return tuple(a for a in ARCHITECTURES if f"compute_{a}" in known) or ARCHITECTURES


def compile_flags(kind: str, csrc: Path, root: Path) -> list[str]:
    """Flags that every source is compiled with; `LOMACS_FAST_CXXFLAGS` adds to them."""
    include = [f"-I{root / 'include'}", f"-I{csrc}"]
    extra = shlex.split(os.environ.get("LOMACS_FAST_CXXFLAGS", "")) if kind == "cpu" else []
    if kind == "cpu":
        return ["-O2", "-std=c++20", "-fPIC", TARGET, *include, *extra]
    known = architectures()
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in known]
    ptx = [f"-gencode=arch=compute_{a},code=compute_{a}" for a in known[-1:]]
    return ["-O3", "-std=c++20", "-Xcompiler=-fPIC", TARGET, "-DUSE_CUDA", *codes, *ptx, *include]


def link_flags(kind: str, root: Path) -> list[str]:
    """Flags of the link; torch's libraries are already loaded when ours is, so no path is recorded."""
    torch = "torch_cuda" if kind == "cuda" and list((root / "lib").glob("*torch_cuda*")) else None
    extra = shlex.split(os.environ.get("LOMACS_FAST_CXXFLAGS", "")) if kind == "cpu" else []
    return ["-shared", f"-L{root / 'lib'}", "-ltorch_cpu", *([f"-l{torch}"] if torch else []), *extra]


def commands(
    kind: str, compiler: list[str], csrc: Path, root: Path, output: Path, objects: Path
) -> tuple[list[list[str]], list[str]]:
    """The commands that compile one source each, and the one that links their objects to `output`."""
    flags = compile_flags(kind, csrc, root)
    pairs = [(source, objects / f"{source.name}.o") for source in sources(csrc, kind)]
    compiles = [[*compiler, *flags, "-c", str(source), "-o", str(target)] for source, target in pairs]
    link = [*compiler, *(str(target) for _, target in pairs), "-o", str(output), *link_flags(kind, root)]
    return compiles, link


def key_of_build(kind: str, compiler: list[str], csrc: Path, root: Path) -> str:
    """Hash of what decides how a library comes out: sources, torch, compiler, flags and machine."""
    flags = [*compile_flags(kind, Path("csrc"), Path("torch")), *link_flags(kind, root)[2:]]
    facts = [
        key_of_sources(csrc, kind),
        torch_versions(root)[0],
        *compiler,
        compiler_version(*compiler),
        *flags,
        platform.machine(),
        sys.platform,
    ]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


def _run(command: list[str]) -> None:
    # a sanitizer that was loaded into this process has no business in the compiler
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    except OSError as error:
        raise BuildError(f"{command[0]} does not run: {error}") from error
    if done.returncode:
        raise BuildError(f"{command[0]} failed: {_first_error(done.stderr) or f'exit {done.returncode}'}")


def _first_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "")


def _jobs() -> int:
    given = os.environ.get("MAX_JOBS", "")
    if given.isdigit() and int(given):
        return int(given)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def build(kind: str, csrc: Path, output: Path, *, compiler: list[str] | None = None) -> None:
    """Compile a library into `output`, which appears whole or not at all.

    Compilers run side by side, at most `MAX_JOBS` (all processors when not set) at once.

    Raises:
        BuildError: in one sentence, where torch, sources or a compiler are missing, or compiling fails.
        OSError: where the folder of `output` cannot be written.
    """
    root = torch_root()
    if root is None:
        raise BuildError("torch is not installed")
    if sys.platform == "win32":
        raise BuildError("Windows is not served")
    if not sources(csrc, kind):
        raise BuildError(f"{csrc / kind} holds no sources")
    compiler = compiler or find_compiler(kind)
    if compiler is None:
        raise BuildError(missing_compiler(kind))
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".build-") as folder:
        whole = Path(folder) / output.name
        compiles, link = commands(kind, compiler, csrc, root, whole, Path(folder))
        with ThreadPoolExecutor(_jobs()) as pool:
            list(pool.map(_run, compiles))
        _run(link)
        os.replace(whole, output)


def missing_compiler(kind: str) -> str:
    variable, what = ("NVCC", "nvcc") if kind == "cuda" else ("CXX", "C++ compiler")
    given = os.environ.get(variable)
    return f"{variable}={given} is not there" if given else f"no {what} found"


def wanted(root: Path) -> Iterator[str]:
    """What an installation should hold: CUDA's library beside a CUDA torch, or if `LOMACS_FAST_CUDA=1`."""
    yield "cpu"
    if torch_versions(root)[1] is not None or os.environ.get("LOMACS_FAST_CUDA") == "1":
        yield "cuda"
