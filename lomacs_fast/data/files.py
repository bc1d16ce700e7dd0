"""Files that appear whole or not at all, and `.npy` files written in pieces."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

__all__ = ["NpyWriter", "atomic_path", "refuse_existing", "replace_group", "temporary_beside"]


def refuse_existing(path: str | os.PathLike[str], overwrite: bool) -> None:
    """Raise `FileExistsError` if `path` exists (a dangling link counts) and `overwrite` is false."""
    if not overwrite and os.path.lexists(path):
        raise FileExistsError(f"{os.fspath(path)} exists; pass overwrite=True (--overwrite) to replace it")


def temporary_beside(target: str | os.PathLike[str], role: str = "tmp") -> Path:
    """An unused hidden name in the folder of `target` with the same suffix: `.STEM.ROLE-xxxxxxxx.SUFFIX`.

    The suffix is kept because `np.save` and others append theirs to a name that lacks it.
    """
    target = Path(target)
    return target.with_name(f".{target.stem[:100]}.{role}-{secrets.token_hex(6)}{target.suffix}")


def _check_target(target: Path) -> None:
    if target.is_dir():
        raise ValueError(f"{target}: expected the name of a file to write, got a folder")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target}: the folder {target.parent} does not exist")


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync_folder(folder: Path) -> None:
    # Some file systems refuse to sync a folder; the rename itself has happened by then.
    with contextlib.suppress(OSError):
        _sync(folder)


@contextlib.contextmanager
def atomic_path(target: str | os.PathLike[str], *, overwrite: bool = True) -> Iterator[Path]:
    """Write a file that replaces `target` only when it is whole.

    Yields a temporary name in the folder of `target` (nothing is there yet) for the body to write. When the
    body ends, the file is synced to disk and renamed to `target`; when the body raises, it is removed and
    `target` stays as it was. A link is followed: the file that it names is replaced, the link stays.

    Raises `FileExistsError` (before the body, and again before the rename) if `target` exists and
    `overwrite` is false, `FileNotFoundError` if its folder does not exist, `ValueError` if it is a folder.
    """
    refuse_existing(target, overwrite)
    final = Path(os.path.realpath(target))
    _check_target(final)
    temporary = temporary_beside(final)
    try:
        yield temporary
        _sync(temporary)
        refuse_existing(target, overwrite)
        os.replace(temporary, final)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _sync_folder(final.parent)


def replace_group(pairs: Sequence[tuple[Path, Path]], remove: Sequence[Path] = ()) -> None:
    """Rename every `(temporary, target)` of one folder in order and delete those in `remove`: all or nothing.

    What stood under the targets is first moved to hidden names, last target first, and moved back if any
    step raises. The last target marks the group as whole: a process killed in between leaves a folder
    without it, never new files beside old ones under it, and the old files under their hidden names.
    """
    for temporary, _ in pairs:
        _sync(temporary)
    moved: list[tuple[Path, Path]] = []
    placed: list[tuple[Path, Path]] = []
    try:
        for target in [*(target for _, target in reversed(pairs)), *remove]:
            if os.path.lexists(target):
                backup = temporary_beside(target, "old")
                os.rename(target, backup)
                moved.append((backup, target))
        for temporary, target in pairs:
            os.rename(temporary, target)
            placed.append((temporary, target))
    except BaseException:
        for temporary, target in reversed(placed):
            os.rename(target, temporary)
        for backup, target in reversed(moved):
            os.rename(backup, target)
        raise
    for folder in {target.parent for _, target in pairs}:
        _sync_folder(folder)
    for backup, _ in moved:
        with contextlib.suppress(OSError):
            backup.unlink()


class NpyWriter:
    """A C-ordered `.npy` file of known shape and dtype, written row by row in any order.

    Rows go to the file at once, so memory stays at one chunk, and a full disk is an `OSError` (writing
    through a memory map would end the process instead).
    """

    def __init__(self, path: str | os.PathLike[str], shape: Sequence[int], dtype: npt.DTypeLike) -> None:
        self.path = Path(path)
        self.shape = tuple(int(k) for k in shape)
        self.dtype = np.dtype(dtype)
        self._written = np.zeros(self.shape[0], dtype=bool)
        self._row = self.dtype.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))
        self._file: BinaryIO = open(self.path, "wb")  # noqa: SIM115
        np.lib.format.write_array_header_2_0(
            self._file,
            {
                "descr": np.lib.format.dtype_to_descr(self.dtype),
                "fortran_order": False,
                "shape": self.shape,
            },
        )
        self._start = self._file.tell()

    def write(self, start: int, rows: npt.NDArray[Any]) -> None:
        """Put `rows`, `(k, *shape[1:])`, at `start` to `start + k`; `ValueError` where they do not fit."""
        if rows.shape[1:] != self.shape[1:]:
            raise ValueError(
                f"{self.path.name}: expected rows of shape {self.shape[1:]}, got {rows.shape[1:]}"
            )
        stop = start + rows.shape[0]
        if start < 0 or stop > self.shape[0]:
            raise ValueError(
                f"{self.path.name}: rows {start} to {stop} lie outside the {self.shape[0]} announced"
            )
        self._file.seek(self._start + start * self._row)
        self._file.write(np.ascontiguousarray(rows, dtype=self.dtype).data)
        self._written[start:stop] = True

    @property
    def missing(self) -> int | None:
        """The first row that nobody wrote, or None."""
        gaps = np.flatnonzero(~self._written)
        return int(gaps[0]) if gaps.size else None

    @property
    def rows_written(self) -> int:
        return int(self._written.sum())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> NpyWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error the buffered rest may fail to be written again; the first error is the one to see.
        with contextlib.suppress(OSError) if kind is not None else contextlib.nullcontext():
            self.close()
