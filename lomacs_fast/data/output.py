"""Predicted decompositions as files: the contest's `.npz`, `.npy`, `.pt`.

========  =================================================================================================
`.npz`    the contest's form: float32 `U (n, M, r, 2)`, `S (n, r)`, `V (n, N, r, 2)` and the scalar `C`, the
          MACs in millions counted for the network; stored, not compressed
`.npy`    one structured array of n records with the fields `U` complex64 `(M, r)`, `S` float32 `(r,)`,
          `V` complex64 `(N, r)`: `np.load(path, mmap_mode="r")["U"]` is complex `(n, M, r)`
`.pt`     a dict of `U` complex64 `(n, M, r)`, `S` float32 `(n, r)`, `V` complex64 `(n, N, r)` and, where it
          was given, the float `macs`; loads with `torch.load(path, weights_only=True)`
========  =================================================================================================
"""

from __future__ import annotations

import contextlib
import os
import pickle
import zipfile
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lomacs_fast.data.files import (
    NpyWriter,
    as_path,
    atomic_path,
    naming,
    refuse_existing,
    remove_stale,
    temporary_beside,
)
from lomacs_fast.data.layouts import Array

__all__ = ["PredictionWriter", "load_predictions"]

_SUFFIXES = (".npz", ".npy", ".pt")


class PredictionWriter:
    """Writes `(U, S, V)` of n channels chunk by chunk; the suffix of `path` chooses the form.

    A context manager: inside it, `write(start, U, S, V)` puts chunks anywhere, in memory of one chunk. When
    the body ends and every sample was written, the file replaces `path`; when it raises, nothing is left
    behind and what stood at `path` stays. `macs` (millions) is required by the contest's form, kept by `.pt`
    and has no place in `.npy`.

    Raises `FileExistsError` at once if `path` exists, unless `overwrite`; `FileNotFoundError` if its folder
    does not exist; `ValueError` for another suffix, impossible sizes, missing `macs`, and, at the end,
    samples that were never written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        n: int,
        M: int,
        N: int,
        r: int,
        *,
        macs: float | None = None,
        overwrite: bool = False,
    ) -> None:
        self.path = as_path(path, f"a file ending in {', '.join(_SUFFIXES)}")
        self._form = self.path.suffix.lower()
        if self._form not in _SUFFIXES:
            raise ValueError(
                f"{path}: expected a file ending in {', '.join(_SUFFIXES)}, got {self._form or 'no suffix'}"
            )
        if min(n, M, N) < 1 or not 1 <= r <= min(M, N):
            raise ValueError(
                f"{path}: expected n, M, N >= 1 and 1 <= r <= min(M, N), got n={n}, M={M}, N={N}, r={r}"
            )
        if self._form == ".npz" and macs is None:
            raise ValueError(f"{path}: the contest's form stores the MACs as C, expected macs, got None")
        if macs is not None and not np.isfinite(macs):
            raise ValueError(f"{path}: expected finite macs, got {macs}")
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"{path}: the folder {self.path.parent} does not exist")
        refuse_existing(path, overwrite)
        self.n, self.M, self.N, self.r = n, M, N, r
        self.macs = None if macs is None else float(macs)
        self._overwrite = overwrite
        self._stack = contextlib.ExitStack()
        self._target: Path | None = None
        self._writers: dict[str, NpyWriter] = {}

    def __enter__(self) -> PredictionWriter:
        with contextlib.ExitStack() as stack:
            self._target = stack.enter_context(atomic_path(self.path, overwrite=self._overwrite))
            for name, shape, dtype in self._arrays():
                path = self._target
                if self._form != ".npy":
                    # These forms are put together from their parts at the end.
                    part = Path(os.path.realpath(self.path)).with_suffix(".npy")
                    remove_stale(part, name)
                    path = temporary_beside(part, name)
                    stack.callback(_remove, path)
                self._writers[name] = stack.enter_context(NpyWriter(path, shape, dtype, target=self.path))
            self._stack = stack.pop_all()
        return self

    def _arrays(self) -> list[tuple[str, tuple[int, ...], Any]]:
        n, M, N, r = self.n, self.M, self.N, self.r
        if self._form == ".npy":
            record = [("U", "<c8", (M, r)), ("S", "<f4", (r,)), ("V", "<c8", (N, r))]
            return [("USV", (n,), np.dtype(record))]
        if self._form == ".npz":
            return [("U", (n, M, r, 2), "<f4"), ("S", (n, r), "<f4"), ("V", (n, N, r, 2), "<f4")]
        return [("U", (n, M, r), "<c8"), ("S", (n, r), "<f4"), ("V", (n, N, r), "<c8")]

    def write(self, start: int, U: Tensor, S: Tensor, V: Tensor) -> None:
        """Put the samples `start` to `start + b`.

        `U` complex `(b, M, r)` or real `(b, M, r, 2)`, `S` real `(b, r)`, `V` as U with N; any device and
        floating precision, stored in single. Raises `TypeError` and `ValueError` for what does not fit and
        samples outside 0 to n; `ValueError`, naming file and sample, for NaN, Inf, values beyond the range of
        single precision, and singular values that would all vanish in it.
        """
        if not self._writers:
            raise RuntimeError("PredictionWriter: write inside its `with` block")
        b = _batch(U)
        pieces = {
            "U": _complex64(U, "U", (b, self.M, self.r)),
            "S": _float32(S, "S", (b, self.r)),
            "V": _complex64(V, "V", (b, self.N, self.r)),
        }
        if start < 0 or start + b > self.n:
            raise ValueError(
                f"{self.path}: samples {start} to {start + b} lie outside the {self.n} announced"
            )
        for (name, piece), given in zip(pieces.items(), (U, S, V), strict=True):
            self._check_range(name, piece, given, start)
        if self._form == ".npy":
            writer = self._writers["USV"]
            record = np.empty(b, dtype=writer.dtype)
            for name, piece in pieces.items():
                record[name] = piece
            writer.write(start, record)
            return
        for name, piece in pieces.items():
            if self._form == ".npz" and name != "S":
                piece = piece.view(np.float32).reshape(*piece.shape, 2)
            self._writers[name].write(start, piece)

    def _check_range(self, name: str, piece: Array, given: Tensor, start: int) -> None:
        """Refuse what is not finite, or not representable in single precision."""
        axes = tuple(range(1, piece.ndim))
        finite = np.isfinite(piece).all(axis=axes)
        if not finite.all():
            k = int(np.argmin(finite))
            holds = "NaN or Inf"
            if bool(given[k].detach().isfinite().all()):
                holds = "values beyond the range of float32"
            raise ValueError(f"{self.path}: {name}: sample {start + k} holds {holds}")
        if name == "S" and given.dtype == torch.float64:
            alive = (given.detach() != 0).any(1).cpu().numpy()
            lost = alive & ~piece.any(axis=axes)
            if lost.any():
                k = int(np.argmax(lost))
                raise ValueError(
                    f"{self.path}: S: sample {start + k} holds values below the range of float32 alone"
                )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stack, self._stack = self._stack, contextlib.ExitStack()
        if kind is not None:
            stack.__exit__(kind, error, trace)
            self._writers = {}
            return
        with stack, naming(self.path, *(writer.path for writer in self._writers.values())):
            self._finish()
        self._writers = {}

    def _finish(self) -> None:
        target = self._target
        assert target is not None
        for writer in self._writers.values():
            if writer.missing is not None:
                raise ValueError(
                    f"{self.path}: expected {self.n} samples, got {writer.rows_written}; "
                    f"sample {writer.missing} was never written"
                )
            writer.close()
        if self._form == ".npz":
            with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                for name, writer in self._writers.items():
                    archive.write(writer.path, f"{name}.npy")
                    writer.path.unlink()
                with archive.open("C.npy", "w") as stream:
                    np.lib.format.write_array(stream, np.asarray(self.macs, dtype=np.float64))
        elif self._form == ".pt":
            # Mapped, so that saving streams from the file; writable, since torch warns of read-only maps.
            content: dict[str, Any] = {
                name: torch.from_numpy(np.load(writer.path, mmap_mode="r+", allow_pickle=False))
                for name, writer in self._writers.items()
            }
            if self.macs is not None:
                content["macs"] = self.macs
            try:
                torch.save(content, target)
            except RuntimeError as error:
                raise OSError(f"{self.path}: cannot be written ({error})") from error


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _batch(U: Tensor) -> int:
    if not isinstance(U, Tensor) or U.ndim == 0:
        raise TypeError(f"U: expected a tensor (b, M, r), got {type(U).__name__}")
    return U.shape[0]


def _float32(x: Tensor, name: str, shape: tuple[int, ...]) -> Array:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(
            f"{name}: expected a real floating tensor {shape}, got {getattr(x, 'dtype', type(x))}"
        )
    if tuple(x.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(x.shape)}")
    return x.detach().to("cpu", torch.float32).contiguous().numpy()


def _complex64(x: Tensor, name: str, shape: tuple[int, ...]) -> Array:
    if isinstance(x, Tensor) and x.is_complex():
        if tuple(x.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape} or {(*shape, 2)}, got {tuple(x.shape)}")
        return x.detach().to("cpu", torch.complex64).resolve_conj().resolve_neg().contiguous().numpy()
    packed: Array = _float32(x, name, (*shape, 2)).view(np.complex64)[..., 0]
    return packed


def _parts(path: Path) -> dict[str, Any]:
    form = path.suffix.lower()
    if form == ".npy":
        record = np.load(path, allow_pickle=False)
        return {} if record.dtype.names is None else {name: record[name] for name in record.dtype.names}
    if form == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in ("U", "S", "V") if name in archive.files}
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        return {}
    return {name: x.numpy() for name, x in content.items() if isinstance(x, Tensor)}


def load_predictions(path: str | os.PathLike[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Read what `PredictionWriter` wrote, in any of its forms.

    Returns `U` complex64 `(n, M, r)`, `S` float32 `(n, r)`, `V` complex64 `(n, N, r)`. Raises
    `FileNotFoundError` for a missing file and `ValueError` for one of another form, damaged, or with shapes
    that do not belong together.
    """
    path = as_path(path, f"a file ending in {', '.join(_SUFFIXES)}")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix.lower() not in _SUFFIXES:
        raise ValueError(
            f"{path}: expected a file ending in {', '.join(_SUFFIXES)}, got {path.suffix or 'no suffix'}"
        )
    try:
        parts = _parts(path)
    except (ValueError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: expected predictions, this file cannot be read ({error})") from error
    if not {"U", "S", "V"} <= set(parts):
        raise ValueError(f"{path}: expected the arrays U, S and V, got {', '.join(parts) or 'none of them'}")
    U, S, V = (np.ascontiguousarray(parts[name]) for name in ("U", "S", "V"))
    if S.ndim != 2 or S.dtype.kind != "f":
        raise ValueError(f"{path}: expected S real (n, r), got {S.dtype} {S.shape}")
    return _factor(U, "U", S, path), torch.from_numpy(S), _factor(V, "V", S, path)


def _factor(x: Array, name: str, S: Array, path: Path) -> Tensor:
    n, r = S.shape
    if x.dtype == np.float32 and x.ndim == 4 and x.shape[-1] == 2:
        x = x.view(np.complex64)[..., 0]
    if x.dtype.kind != "c" or x.ndim != 3 or (x.shape[0], x.shape[2]) != (n, r):
        raise ValueError(f"{path}: expected {name} of {n} samples and rank {r}, got {x.dtype} {x.shape}")
    return torch.from_numpy(x)
