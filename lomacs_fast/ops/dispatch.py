"""Choice of backend: every backend of an op says why it cannot take a call; the fastest that can serves."""

from __future__ import annotations

import contextvars
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

log = logging.getLogger("lomacs_fast")

BACKENDS = ("auto", "eager", "cpp", "triton")
VARIABLE = "LOMACS_FAST_BACKEND"


class BackendError(ValueError):
    """A backend asked for by name cannot take a call; the message holds the call and every reason."""


class Backend(NamedTuple):
    """One way to serve an op.

    `reasons(*args)` lists why it cannot take the call, empty when it can; `run(*args)` serves it.
    """

    name: str
    reasons: Callable[..., Sequence[str]]
    run: Callable[..., Any]


_thread: contextvars.ContextVar[str | None] = contextvars.ContextVar("lomacs_fast_backend", default=None)
_default = os.environ.get(VARIABLE) or "auto"
# Dynamo guards a module's variable but reads no context variable
_traced: str | None = None


class use_backend:
    """Serve every op by this backend: `with use_backend("eager"): ...`.

    `"auto"` takes the fastest backend that can; `"eager"` the reference in plain PyTorch, which alone has
    second derivatives; `"cpp"` the native library; `"triton"` the Triton kernels, on a GPU. Holds for the
    calling thread; a graph under `torch.compile` sees the latest choice of any thread, and is compiled anew
    for it. Outside, the environment variable `LOMACS_FAST_BACKEND` at import decides, `"auto"` where it is
    not set. Functions that have no second backend are not affected.

    Raises:
        ValueError: for another name. From a call inside: `ValueError` where the backend cannot serve it.
    """

    def __init__(self, name: str) -> None:
        if name not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
        self.name = name
        self._before: list[tuple[str | None, str | None]] = []

    def __enter__(self) -> None:
        global _traced
        if torch.compiler.is_dynamo_compiling():
            self._before.append((None, _traced))
        else:
            self._before.append((_thread.get(), _traced))
            _thread.set(self.name)
        _traced = self.name

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _traced
        thread, _traced = self._before.pop()
        if not torch.compiler.is_dynamo_compiling():
            _thread.set(thread)


def chosen() -> str:
    """The backend that holds here: that of the innermost `use_backend`, else of the environment variable."""
    name = (_traced if torch.compiler.is_dynamo_compiling() else _thread.get()) or _default
    if name not in BACKENDS:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def constant_in_graphs(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compiler.assume_constant_result`, without importing the compiler with the package."""
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn


_said: set[tuple[str, ...]] = set()


@constant_in_graphs
def _say_once(op: str, backend: str, *refused: str) -> None:
    key = (op, backend, *refused)
    if key not in _said:
        _said.add(key)
        log.info("%s: served by %s, because %s", op, backend, "; ".join(refused))


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{tuple(value.shape)} on {value.device}"
    if isinstance(value, list | tuple):
        name = type(value).__name__ if hasattr(value, "_fields") else ""
        return f"{name}({', '.join(map(_describe, value))})"
    return repr(value)


class Op:
    """An op and its backends, fastest first; called as they are.

    Args:
        name: its name in messages.
        backends: fastest first; the last, eager, takes every call.
        arguments: names of the arguments, for messages.
        nominal: `nominal(device)` makes the arguments of a typical call, for `backend_table`.
    """

    def __init__(
        self,
        name: str,
        backends: Sequence[Backend],
        arguments: Sequence[str],
        nominal: Callable[[torch.device], tuple[Any, ...]],
    ) -> None:
        self.name, self.backends, self.arguments, self.nominal = name, tuple(backends), arguments, nominal
        OPS[name] = self

    def __call__(self, *args: Any) -> Any:
        wanted = chosen()
        refused: list[str] = []
        for backend in self.backends:
            if wanted not in ("auto", backend.name):
                continue
            reasons = backend.reasons(*args)
            if not reasons:
                if refused:
                    _say_once(self.name, backend.name, *refused)
                return backend.run(*args)
            refused += [f"{backend.name}: {reason}" for reason in reasons]
        raise BackendError(self._refusal(wanted, args))

    def _refusal(self, wanted: str, args: tuple[Any, ...]) -> str:
        call = ", ".join(f"{n}={_describe(x)}" for n, x in zip(self.arguments, args, strict=True))
        lines = [
            f"{backend.name}: {'; '.join(backend.reasons(*args)) or 'can'}"
            for backend in self.backends
            if wanted in ("auto", backend.name)
        ]
        if not lines:
            names = ", ".join(backend.name for backend in self.backends)
            lines = [f"{wanted}: the op has no such backend, it has {names}"]
        return f"{self.name}({call}) cannot be served by {wanted}\n  " + "\n  ".join(lines)


OPS: dict[str, Op] = {}


def backend_table() -> list[dict[str, Any]]:
    """Which backend of which op can take a typical call, on the CPU and on CUDA where there is a device.

    Returns:
        A dict a row: `op`, `backend`, `device`, and `reasons`, the list of why not, empty where it can.
        Asking loads the native library, and builds it where it must.
    """
    return list(_rows())


def _rows() -> Iterator[dict[str, Any]]:
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for op in OPS.values():
        for device in devices:
            args = op.nominal(torch.device(device))
            for backend in op.backends:
                reasons = [str(reason) for reason in backend.reasons(*args)]
                yield {"op": op.name, "backend": backend.name, "device": device, "reasons": reasons}
