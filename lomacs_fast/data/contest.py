"""The contest's folder: `RoundYCfgDataX.txt` and its `.npy` files, Y the round and X the scenario.

==========================  =========================================================================
`RoundYCfgDataX.txt`        five lines: number of training samples, M, N, 2 (real, imaginary), r
`RoundYTrainDataX.npy`      float32 `(samples, M, N, 2)`, the noisy input
`RoundYTrainLabelX.npy`     float32 `(samples, M, N, 2)`, the clean channel
`RoundYTestDataX.npy`       float32 `(n_test, M, N, 2)`
`RoundYTestLabelX.npy`      float32 `(n_test, M, N, 2)`; not in the contest's own folders
==========================  =========================================================================
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from lomacs_fast.data.files import (
    NpyWriter,
    as_path,
    atomic_path,
    left_behind,
    naming,
    refuse_existing,
    remove_stale,
    replace_group,
    temporary_beside,
)
from lomacs_fast.data.layouts import Array, ChannelSource, open_channels, to_complex

__all__ = [
    "ContestConfig",
    "ContestScenario",
    "ContestWriter",
    "contest_path",
    "open_contest",
    "read_config",
    "write_config",
    "write_contest",
]

_CONFIG_LINES = ("the number of samples", "M", "N", "2 (real and imaginary part)", "r")
_KINDS = ("CfgData", "TrainData", "TrainLabel", "TestData", "TestLabel")
_NUMBER = "(0|[1-9][0-9]*)"
_NAME = re.compile(rf"Round{_NUMBER}({'|'.join(_KINDS)}){_NUMBER}\.(txt|npy)")

Channels = Tensor | Array


@dataclass(frozen=True)
class ContestConfig:
    """`samples` training matrices of `M x N`, to be decomposed at rank `r`; `ValueError` where impossible."""

    samples: int
    M: int
    N: int
    r: int

    def __post_init__(self) -> None:
        if self.samples < 0:
            raise ValueError(f"samples: expected at least 0, got {self.samples}")
        for name in ("M", "N"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name}: expected at least 2, got {getattr(self, name)}")
        if not 1 <= self.r <= min(self.M, self.N):
            raise ValueError(f"r: expected 1 to min(M, N) = {min(self.M, self.N)}, got {self.r}")


@dataclass(frozen=True)
class ContestScenario:
    """One scenario of a contest folder, its arrays opened and not read; None where a file is absent."""

    folder: Path
    round: int
    scenario: int
    config: ContestConfig
    train_input: ChannelSource | None
    train_label: ChannelSource | None
    test_input: ChannelSource | None
    test_label: ChannelSource | None


def contest_path(folder: str | os.PathLike[str], round: int, kind: str, scenario: int) -> Path:
    """`folder/RoundYKINDX.npy`, or `.txt` for the kind `CfgData`; `ValueError` for an unknown kind."""
    if kind not in _KINDS:
        raise ValueError(f"kind: expected one of {', '.join(_KINDS)}, got {kind!r}")
    suffix = "txt" if kind == "CfgData" else "npy"
    return as_path(folder, "a contest folder", "folder") / f"Round{round}{kind}{scenario}.{suffix}"


def read_config(path: str | os.PathLike[str]) -> ContestConfig:
    """Read a `RoundYCfgDataX.txt`.

    Raises `FileNotFoundError` for a missing file and `ValueError` naming the file, the line, what it should
    hold and what stands there, for a line that is missing, not an integer, impossible, or one too many.
    """
    path = as_path(path, "a RoundYCfgDataX.txt")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: expected five lines of text, got bytes that are not text ({error})"
        ) from None
    lines = text.rstrip().splitlines()
    values: list[int] = []
    for number, meaning in enumerate(_CONFIG_LINES, start=1):
        expected = f"{path}, line {number}: expected {meaning}"
        if number > len(lines):
            raise ValueError(f"{expected}, the file ends after line {len(lines)}")
        stands = lines[number - 1].strip()
        if not re.fullmatch(r"\d{1,18}", stands, flags=re.ASCII):
            raise ValueError(f"{expected} as an integer, got {stands!r}")
        value = int(stands)
        if number in (2, 3) and value < 2:
            raise ValueError(f"{expected} of at least 2, got {value}")
        if number == 4 and value != 2:
            raise ValueError(f"{expected}, got {value}")
        if number == 5 and not 1 <= value <= min(values[1], values[2]):
            raise ValueError(f"{expected} from 1 to min(M, N) = {min(values[1], values[2])}, got {value}")
        values.append(value)
    if len(lines) > len(_CONFIG_LINES):
        raise ValueError(f"{path}, line 6: expected five lines, got {lines[5].strip()!r} after them")
    samples, M, N, _, r = values
    return ContestConfig(samples, M, N, r)


def _config_text(config: ContestConfig) -> str:
    return f"{config.samples}\n{config.M}\n{config.N}\n2\n{config.r}\n"


def write_config(path: str | os.PathLike[str], config: ContestConfig, *, overwrite: bool = False) -> None:
    """Write a `RoundYCfgDataX.txt`, whole or not at all; `FileExistsError` unless `overwrite`."""
    with atomic_path(path, overwrite=overwrite) as temporary:
        temporary.write_text(_config_text(config), encoding="utf-8")


def _open_array(path: Path, config: ContestConfig, count: int | None, why: str) -> ChannelSource:
    """The float32 array at `path`, `(count, M, N, 2)`; `why` says where the count comes from."""
    source = open_channels(path, "real")
    dtype, shape = source.stored_dtype, source.stored_shape
    expected = f"({'n' if count is None else count}, {config.M}, {config.N}, 2)"
    if dtype.newbyteorder("=") != np.float32:
        raise TypeError(f"{path}: expected float32 {expected}, got {dtype} {shape}")
    if len(shape) != 4 or shape[1:3] != (config.M, config.N) or count not in (None, shape[0]):
        raise ValueError(f"{path}: expected shape {expected} by {why}, got {shape}")
    return source


def _list(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(numbers))) or "none"


def open_contest(
    folder: str | os.PathLike[str], *, scenarios: Sequence[int] | None = None, round: int | None = None
) -> list[ContestScenario]:
    """Open the scenarios of a contest folder, all of them or those named, sorted by number.

    `round` may be left out where the folder holds one round. Training input and label come together;
    a scenario may have training data, test data (with or without label), or both. Nothing is read but the
    headers; samples are checked for NaN and Inf when they are read.

    Raises `FileNotFoundError` for a missing folder, `TypeError` for arrays that are not float32, `ValueError`
    for an unknown scenario or round (listing those there are), a missing or malformed cfg, a missing partner
    file, and arrays that do not fit the cfg or each other. Every message names the file.
    """
    folder = as_path(folder, "a contest folder", "folder")
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a contest folder, got a file")
    there: dict[int, dict[int, set[str]]] = {}
    for name in os.listdir(folder):
        match = _NAME.fullmatch(name)
        if match and (match[4] == "txt") == (match[2] == "CfgData"):
            there.setdefault(int(match[1]), {}).setdefault(int(match[3]), set()).add(match[2])
    if not there:
        kept = sum(name.startswith(".Round") and ".old-" in name for name in os.listdir(folder))
        after = f"; an interrupted replacement left {kept} under hidden names (.Round*.old-*)" if kept else ""
        raise ValueError(
            f"{folder}: expected contest files such as Round1CfgData1.txt, there are none{after}"
        )
    if round is None:
        if len(there) > 1:
            raise ValueError(f"{folder}: holds the rounds {_list(there)}; name one with round (--round)")
        round = next(iter(there))
    if round not in there:
        raise ValueError(f"{folder}: has no round {round}; there are: {_list(there)}")
    offered = there[round]
    wanted = sorted(offered) if scenarios is None else sorted(set(scenarios))
    if not wanted:
        raise ValueError("scenarios: expected at least one, got none")
    for scenario in wanted:
        if scenario not in offered:
            raise ValueError(
                f"{folder}: has no scenario {scenario} in round {round}; there are: {_list(offered)}"
                f"{left_behind(contest_path(folder, round, 'CfgData', scenario))}"
            )
    return [_open_scenario(folder, round, scenario, offered[scenario]) for scenario in wanted]


def _open_scenario(folder: Path, round: int, scenario: int, kinds: set[str]) -> ContestScenario:
    paths = {kind: contest_path(folder, round, kind, scenario) for kind in _KINDS}
    if "CfgData" not in kinds:
        raise ValueError(
            f"{paths['CfgData']}: missing, it must describe {', '.join(paths[k].name for k in sorted(kinds))}"
            f"{left_behind(paths['CfgData'])}"
        )
    for one, other in (("TrainData", "TrainLabel"), ("TrainLabel", "TrainData"), ("TestLabel", "TestData")):
        if one in kinds and other not in kinds:
            raise ValueError(f"{paths[other]}: missing, {paths[one].name} needs it")
    if len(kinds) == 1:
        raise ValueError(f"{paths['CfgData']}: describes no data, {paths['TrainData'].name} is missing")
    config = read_config(paths["CfgData"])
    sources: dict[str, ChannelSource | None] = dict.fromkeys(_KINDS)
    for kind in ("TrainData", "TrainLabel"):
        if kind in kinds:
            sources[kind] = _open_array(paths[kind], config, config.samples, paths["CfgData"].name)
    if "TestData" in kinds:
        test = sources["TestData"] = _open_array(paths["TestData"], config, None, paths["CfgData"].name)
        if "TestLabel" in kinds:
            why = f"{paths['CfgData'].name} and {paths['TestData'].name}"
            sources["TestLabel"] = _open_array(paths["TestLabel"], config, len(test), why)
    return ContestScenario(
        folder,
        round,
        scenario,
        config,
        sources["TrainData"],
        sources["TrainLabel"],
        sources["TestData"],
        sources["TestLabel"],
    )


class ContestWriter:
    """Writes one scenario of a contest folder chunk by chunk, all of its files or none.

    A context manager: inside it, `train(input, label)` and `test(input, label)` append chunks of any size,
    complex `(b, M, N)` or real `(b, M, N, 2)`, stored as float32. The chunks go to temporary files in the
    folder (made where it does not exist); when the body ends with exactly `n_train` and `n_test` samples
    written, they replace the files of that scenario, the cfg last. When the body raises, the temporary files
    are removed and the folder is as before. A killed process leaves its temporary files, which the next
    writer of the scenario removes, and, if it was replacing files, those of before under the hidden names
    that `open_contest` tells; they go when the scenario is next written whole. With `test_label=False` no
    test label is written, and one that is there is removed.

    Raises `ValueError` for impossible sizes, counts that do not come true, shapes that do not fit, NaN and
    Inf; `FileExistsError` at the start if a file of the scenario exists, unless `overwrite`.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        scenario: int,
        *,
        round: int = 1,
        M: int,
        N: int,
        r: int,
        n_train: int,
        n_test: int = 0,
        test_label: bool = True,
        overwrite: bool = False,
    ) -> None:
        self.config = ContestConfig(n_train, M, N, r)
        for name, value in (("scenario", scenario), ("round", round), ("n_test", n_test)):
            if value < 0:
                raise ValueError(f"{name}: expected at least 0, got {value}")
        if n_train == n_test == 0:
            raise ValueError("n_train, n_test: expected samples to write, got 0 of both")
        self.folder = as_path(folder, "a folder to write", "folder")
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder}: expected a folder, got a file")
        self._paths = {kind: contest_path(self.folder, round, kind, scenario) for kind in _KINDS}
        self._sizes = {
            "TrainData": n_train,
            "TrainLabel": n_train,
            "TestData": n_test,
            "TestLabel": n_test if test_label else 0,
        }
        self._overwrite = overwrite
        self._refuse_existing()
        self._writers: dict[str, NpyWriter] = {}
        self._made_folder: list[Path] = []

    def _refuse_existing(self) -> None:
        for path in self._paths.values():
            refuse_existing(path, self._overwrite)

    def __enter__(self) -> ContestWriter:
        missing = [p for p in (self.folder, *self.folder.parents) if not p.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._made_folder = missing
        try:
            for path in self._paths.values():
                remove_stale(path)
            for kind, size in self._sizes.items():
                if size:
                    path, shape = self._paths[kind], (size, self.config.M, self.config.N, 2)
                    self._writers[kind] = NpyWriter(temporary_beside(path), shape, np.float32, target=path)
        except BaseException:
            self._discard()
            raise
        return self

    def train(self, input: Channels, label: Channels) -> None:
        """Append a chunk of training samples."""
        self._append("Train", input, label)

    def test(self, input: Channels, label: Channels | None = None) -> None:
        """Append a chunk of test samples, with their label unless `test_label=False`."""
        self._append("Test", input, label)

    def _append(self, part: str, input: Channels, label: Channels | None) -> None:
        if not self._writers:
            raise RuntimeError("ContestWriter: write inside its `with` block")
        pieces = {f"{part}Data": input}
        if self._sizes[f"{part}Label"] or label is not None:
            if label is None:
                raise ValueError(f"{part.lower()} label: expected one to every input, got None")
            if not self._sizes[f"{part}Label"] and self._sizes[f"{part}Data"]:
                raise ValueError(f"{part.lower()} label: expected none (test_label=False), got one")
            pieces[f"{part}Label"] = label
        rows = {kind: self._as_rows(kind, piece) for kind, piece in pieces.items()}
        counts = {kind: piece.shape[0] for kind, piece in rows.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"{part.lower()} chunk: expected as many labels as inputs, got {counts}")
        for kind, piece in rows.items():
            writer = self._writers.get(kind)
            start = 0 if writer is None else writer.rows_written
            if writer is None or start + piece.shape[0] > self._sizes[kind]:
                raise ValueError(
                    f"{self._paths[kind]}: expected {self._sizes[kind]} samples, "
                    f"got {start + piece.shape[0]} or more"
                )
            writer.write(start, piece)

    def _as_rows(self, kind: str, piece: Channels) -> Array:
        if not isinstance(piece, Tensor | np.ndarray):
            raise TypeError(f"{kind}: expected a tensor or a NumPy array, got {type(piece).__name__}")
        is_complex = piece.is_complex() if isinstance(piece, Tensor) else np.iscomplexobj(piece)
        M, N = self.config.M, self.config.N
        shape = tuple(piece.shape)
        if shape[1:] != ((M, N) if is_complex else (M, N, 2)):
            raise ValueError(f"{kind}: expected complex (b, {M}, {N}) or real (b, {M}, {N}, 2), got {shape}")
        if shape[0] == 0:
            return np.empty((0, M, N, 2), np.float32)
        x = to_complex(piece, "complex" if is_complex else "real", name=kind)
        parts = torch.view_as_real(x.detach()).to("cpu", torch.float32)
        if x.dtype == torch.complex128 and not bool(torch.isfinite(parts).all()):
            raise ValueError(f"{kind}: holds values beyond the range of float32")
        return parts.numpy()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            self._discard()

    def _commit(self) -> None:
        for name, writer in self._writers.items():
            if writer.missing is not None:
                raise ValueError(
                    f"{self._paths[name]}: expected {self._sizes[name]} samples, got {writer.rows_written}"
                )
            writer.close()
        self._refuse_existing()
        config = temporary_beside(self._paths["CfgData"])
        try:
            with naming(self._paths["CfgData"], config):
                config.write_text(_config_text(self.config), encoding="utf-8")
            pairs = [(writer.path, self._paths[name]) for name, writer in self._writers.items()]
            stale = [self._paths[name] for name in self._sizes if name not in self._writers]
            replace_group([*pairs, (config, self._paths["CfgData"])], remove=stale)
            self._made_folder = []
        finally:
            config.unlink(missing_ok=True)

    def _discard(self) -> None:
        for writer in self._writers.values():
            with contextlib.suppress(OSError):
                writer.close()
            with contextlib.suppress(OSError):
                writer.path.unlink(missing_ok=True)
        self._writers = {}
        for folder in self._made_folder:
            with contextlib.suppress(OSError):
                folder.rmdir()
        self._made_folder = []


def write_contest(
    folder: str | os.PathLike[str],
    scenario: int,
    *,
    round: int = 1,
    M: int,
    N: int,
    r: int,
    train: Iterable[tuple[Channels, Channels]] = (),
    n_train: int = 0,
    test: Iterable[tuple[Channels, Channels | None]] = (),
    n_test: int = 0,
    test_label: bool = True,
    overwrite: bool = False,
) -> None:
    """Write one scenario from chunks `(input, label)`; `ContestWriter` says what holds and what is raised."""
    with ContestWriter(
        folder,
        scenario,
        round=round,
        M=M,
        N=N,
        r=r,
        n_train=n_train,
        n_test=n_test,
        test_label=test_label,
        overwrite=overwrite,
    ) as writer:
        for input, label in train:
            writer.train(input, label)
        for input, test_target in test:
            writer.test(input, test_target)
