"""Files that appear whole or not at all, and `.npy` files written in pieces."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import secrets
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

__all__ = [
    "NpyWriter",
    "as_path",
    "atomic_path",
    "left_behind",
    "naming",
    "refuse_existing",
    "remove_stale",
    "replace_group",
    "temporary_beside",
]


def as_path(path: str | os.PathLike[str], what: str, name: str = "path") -> Path:
    """`path` as a `Path`; `ValueError` for an empty one, which `Path` takes for the current folder."""
    if not os.fspath(path):
        raise ValueError(f"{name}: expected {what}, got an empty path")
    return Path(path)


def refuse_existing(path: str | os.PathLike[str], overwrite: bool) -> None:
    """Raise `FileExistsError` if `path` exists (a dangling link counts) and `overwrite` is false."""
    if not overwrite and os.path.lexists(path):
        raise FileExistsError(f"{os.fspath(path)} exists; it is replaced only with overwrite (--overwrite)")


def temporary_beside(target: str | os.PathLike[str], role: str = "tmp") -> Path:
    """An unused hidden name in the folder of `target`: `.STEM.ROLE-MACHINE-PROCESS-xxxxxxxxxxxx.SUFFIX`.

    The suffix is kept because `np.save` and others append theirs to a name that lacks it. Machine and process
    tell `remove_stale` whether somebody is still writing.
    """
    target = Path(target)
    unique = f"{_machine()}-{os.getpid()}-{secrets.token_hex(6)}"
    return target.with_name(f".{target.stem[:100]}.{role}-{unique}{target.suffix}")


def _machine() -> str:
    """Eight digits for the machine and the container in which the numbers of processes mean something."""
    namespace = ""
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return f"{zlib.crc32(f'{platform.node()} {namespace}'.encode()):08x}"


def _ended(machine: str, process: int) -> bool:
    """Whether a process is known to have ended; those of other machines never are."""
    # Windows would not ask but send a signal.
    if os.name != "posix" or machine != _machine():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _stale(target: Path, role: str) -> list[Path]:
    """What processes that have ended left under the names of `temporary_beside(target, role)`."""
    # A longer stem is cut in the name, which may then be that of another target.
    if len(target.stem) > 100:
        return []
    unique = "([0-9a-f]{8})-([0-9]{1,10})-[0-9a-f]{12}"
    name = re.compile(rf"{re.escape(f'.{target.stem}.{role}-')}{unique}{re.escape(target.suffix)}")
    try:
        matches = [name.fullmatch(entry) for entry in sorted(os.listdir(target.parent))]
    except OSError:
        return []
    return [target.with_name(m[0]) for m in matches if m and _ended(m[1], int(m[2]))]


def remove_stale(target: str | os.PathLike[str], role: str = "tmp") -> None:
    """Delete the temporaries of `target` that a killed process left; in doubt they stay.

    Deleted is a file under a name of `temporary_beside(target, role)` whose process, of this machine, has
    ended. What `replace_group` moved away (role `"old"`) stays while `target` is missing: it may be all that
    is left.
    """
    target = Path(target)
    if role == "old" and not os.path.lexists(target):
        return
    for path in _stale(target, role):
        with contextlib.suppress(OSError):
            path.unlink()


def left_behind(target: str | os.PathLike[str]) -> str:
    """To end a message that `target` is missing: where a killed process left what stood there, if one did."""
    kept = _stale(Path(target), "old")
    names = ", ".join(path.name for path in kept)
    return f"; an interrupted replacement left what stood there as {names}" if kept else ""


@contextlib.contextmanager
def naming(target: str | os.PathLike[str], *temporaries: str | os.PathLike[str]) -> Iterator[None]:
    """Raise an `OSError` of the body that names one of `temporaries`, or no file, as one of `target`."""
    names = {os.fspath(path) for path in temporaries}
    try:
        yield
    except OSError as error:
        if error.filename is None:
            # A full disk names no file; connections, processes and signals have classes of their own.
            about = type(error) is OSError and error.errno is not None
        else:
            about = isinstance(error.filename, str | os.PathLike) and os.fspath(error.filename) in names
        if not about:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(target)) from error


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
    `target` stays as it was. A link is followed: the file that it names is replaced, the link stays. What a
    killed process left under such a temporary name is removed first.

    Raises `FileExistsError` (before the body, and again before the rename) if `target` exists and
    `overwrite` is false, `FileNotFoundError` if its folder does not exist, `ValueError` if it is a folder or
    empty. An `OSError` of the body about the temporary name, or about no file (a full disk), names `target`.
    """
    as_path(target, "the name of a file to write", "target")
    refuse_existing(target, overwrite)
    final = Path(os.path.realpath(target))
    _check_target(final)
    remove_stale(final)
    temporary = temporary_beside(final)
    try:
        with naming(target, temporary):
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
    without it, never new files beside old ones under it, and the old files under their hidden names. These
    are not put back by themselves, since the group may be half new: whoever misses a target says where they
    are (`left_behind`), and the next group that replaces the same targets deletes them at its end.
    """
    for temporary, target in pairs:
        with naming(target, temporary):
            _sync(temporary)
    moved: list[tuple[Path, Path]] = []
    placed: list[tuple[Path, Path]] = []
    try:
        for target in [*(target for _, target in reversed(pairs)), *remove]:
            if os.path.lexists(target):
                backup = temporary_beside(target, "old")
                with naming(target, backup):
                    os.rename(target, backup)
                moved.append((backup, target))
        for temporary, target in pairs:
            with naming(target, temporary):
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
    for _, target in pairs:
        remove_stale(target)
        remove_stale(target, "old")


class NpyWriter:
    """A C-ordered `.npy` file of known shape and dtype, written row by row in any order.

    Rows go to the file at once, so memory stays at one chunk, and a full disk is an `OSError` (writing
    through a memory map would end the process instead). Errors name `target`, where `path` is a temporary
    that will become it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        shape: Sequence[int],
        dtype: npt.DTypeLike,
        *,
        target: str | os.PathLike[str] | None = None,
    ) -> None:
        self.path = as_path(path, "the name of a file to write")
        self.target = self.path if target is None else Path(target)
        self.shape = tuple(int(k) for k in shape)
        self.dtype = np.dtype(dtype)
        self._written = np.zeros(self.shape[0], dtype=bool)
        self._row = self.dtype.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))
        with naming(self.target, self.path):
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
                f"{self.target.name}: expected rows of shape {self.shape[1:]}, got {rows.shape[1:]}"
            )
        stop = start + rows.shape[0]
        if start < 0 or stop > self.shape[0]:
            raise ValueError(
                f"{self.target.name}: rows {start} to {stop} lie outside the {self.shape[0]} announced"
            )
        with naming(self.target, self.path):
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
        """Write what is buffered and close; closing twice does nothing."""
        with naming(self.target, self.path):
            self._file.close()

    def __enter__(self) -> NpyWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error the buffered rest may fail to be written again; the first error is the one to see.
        with contextlib.suppress(OSError) if kind is not None else contextlib.nullcontext():
            self.close()
