"""The native libraries: found ahead-of-time built, or built at first use, or given up, each said once."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from . import toolchain
from .dispatch import constant_in_graphs

log = logging.getLogger("lomacs_fast")

PACKAGE = Path(__file__).resolve().parents[1]


def find_sources() -> Path | None:
    """`csrc`, as shipped inside the package, or beside it in a checkout."""
    shipped, checkout = PACKAGE / "_csrc", PACKAGE.parent
    if shipped.is_dir():
        return shipped
    # a folder of this name beside an installed package is somebody else's
    ours = (checkout / "pyproject.toml").is_file() and (checkout / "setup.py").is_file()
    return checkout / "csrc" if ours and (checkout / "csrc").is_dir() else None


def cache_folder() -> Path:
    """Where libraries built at first use are kept: `LOMACS_FAST_CACHE`, else the user's cache folder."""
    given = os.environ.get("LOMACS_FAST_CACHE")
    if given:
        return Path(given)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "lomacs_fast"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lomacs_fast"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; without a lock where the file system has none, since a library appears whole."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("a") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Library:
    """A native library, `"cpu"` or `"cuda"`: nothing is looked for before `reasons` is first called.

    Attributes:
        state: one sentence, how it is served or why not; None before the first use.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.state: str | None = None
        self._reasons: tuple[str, ...] | None = None
        self._lock = threading.Lock()

    def reasons(self) -> tuple[str, ...]:
        """Loads the library, building it if it must; why it is not there, empty when it is."""
        known = self._reasons
        if known is None:
            with self._lock:
                if self._reasons is None:
                    self._reasons = self._load()
                known = self._reasons
        return known

    def _load(self) -> tuple[str, ...]:
        try:
            self.state = self._find()
        except (toolchain.BuildError, OSError, RuntimeError) as error:
            self.state = f"not built: {_sentence(error)}"
            refused = isinstance(error, _Refused)
            log.log(logging.INFO if refused else logging.WARNING, "%s library %s", self.kind, self.state)
            return (f"library {self.state}",)
        log.info("%s library %s", self.kind, self.state)
        return ()

    def _find(self) -> str:
        if self.kind == "cuda" and torch.version.cuda is None:
            raise _Refused("torch is built without CUDA")
        csrc = find_sources()
        ahead = PACKAGE / "_native" / toolchain.library_name(self.kind)
        trouble = ""
        if ahead.is_file():
            trouble = self._ahead(ahead, csrc)
            if not trouble:
                return f"built ahead of time: {ahead}"
        try:
            return self._first_use(csrc) + trouble
        except (toolchain.BuildError, OSError) as error:
            raise type(error)(_sentence(error) + trouble) from error

    def _ahead(self, path: Path, csrc: Path | None) -> str:
        """Load the library inside the package; what is wrong with it, or nothing."""
        stamp = path.with_suffix(".key")
        if csrc is not None and stamp.is_file():
            current = toolchain.key_of_sources(csrc, self.kind)
            if stamp.read_text(encoding="ascii").strip() != current:
                return f"; {path} is of other sources"
        try:
            torch.ops.load_library(str(path))
        except (OSError, RuntimeError) as error:
            return f"; {path} does not load: {_sentence(error)}"
        return ""

    def _first_use(self, csrc: Path | None) -> str:
        if csrc is None or not toolchain.sources(csrc, self.kind):
            raise _Refused("its sources are not installed")
        root = Path(torch.__file__).parent
        compiler = toolchain.find_compiler(self.kind)
        if compiler is None:
            raise toolchain.BuildError(toolchain.missing_compiler(self.kind))
        key = toolchain.key_of_build(self.kind, compiler, csrc, root)[:32]
        path = cache_folder() / key / toolchain.library_name(self.kind)
        if not path.is_file():
            if os.environ.get("LOMACS_FAST_BUILD", "") == "0":
                raise _Refused("building at first use is off (LOMACS_FAST_BUILD=0)")
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with _locked(path.parent / "lock"):
                if not path.is_file():
                    start = time.monotonic()
                    log.warning("building the %s library once, with %s ...", self.kind, compiler[0])
                    toolchain.build(self.kind, csrc, path, compiler=compiler)
                    log.info("built in %.0f s", time.monotonic() - start)
        torch.ops.load_library(str(path))
        return f"built at first use: {path}"


class _Refused(toolchain.BuildError):
    """The library is absent by somebody's choice, which deserves no warning."""


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{os.fspath(error.filename)}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


libraries = {kind: Library(kind) for kind in toolchain.KINDS}


def load_ops() -> None:
    """Load the C++ kernels of the `lomacs::` ops now, building them where it must.

    `import lomacs_fast` registers the ops; their kernels come with the first call of a public function. A
    process that never makes one, since it runs an exported program or an AOTInductor package, asks for them:

        import torch, lomacs_fast
        lomacs_fast.load_ops()
        package = torch._inductor.aoti_load_package("net.pt2")
        U, S, V, Hd = package(H, sid)

    Raises:
        ImportError: where the library for the CPU is not there and cannot be built, with the reason.
    """
    missing = reasons("cpu")
    if missing:
        raise ImportError(f"no C++ kernels of lomacs_fast for the CPU: {'; '.join(missing)}")
    if torch.cuda.is_available():
        # without it the ops of the device are Triton's
        reasons("cuda")


def library_states() -> dict[str, str]:
    """How the native library of each device type is served, or why it is not: a sentence each.

    Asking loads the libraries, and builds them where it must; that of CUDA where there is a device alone.
    """
    reasons("cpu")
    if torch.cuda.is_available():
        reasons("cuda")
    return {kind: library.state or "not asked for: no CUDA device" for kind, library in libraries.items()}


# a library is there or not for the life of the process, so a graph may hold the answer as a constant
@constant_in_graphs
def reasons(kind: str) -> tuple[str, ...]:
    """Why the library of this device type cannot serve; empty when it is loaded."""
    library = libraries.get(kind)
    return (f"no library for {kind} devices",) if library is None else library.reasons()
