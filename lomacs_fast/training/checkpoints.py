"""Checkpoints that carry their architecture and load without running code from the file."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lomacs_fast.data.files import atomic_path
from lomacs_fast.nn import LoMACSSVDNet

FORMAT = 1
_KEY = "lomacs_fast"
_PREFIX = "net."


@dataclass(frozen=True)
class NetworkInfo:
    """What a checkpoint says beside the weights: the scenarios in the order of the scene embedding."""

    scenarios: tuple[int, ...]
    epoch: int | None = None
    step: int | None = None
    history: dict[str, Any] = field(default_factory=dict)

    def sid(self, scenario: int | None) -> int:
        """The scene of a scenario; None is allowed where there is one. `ValueError` lists those there are."""
        if scenario is None and len(self.scenarios) == 1:
            return 0
        if scenario not in self.scenarios:
            there = ", ".join(map(str, self.scenarios))
            raise ValueError(
                f"scenario (--scenario) must be one of those trained on ({there}), got {scenario}"
            )
        return self.scenarios.index(scenario)


def describe(net: LoMACSSVDNet, scenarios: tuple[int, ...], **history: Any) -> dict[str, Any]:
    """The entry that a checkpoint gains: format, architecture, scenarios and notes, all plain values."""
    if len(scenarios) != net.n_scene:
        raise ValueError(f"scenarios must name {net.n_scene} scenes, got {list(scenarios)}")
    return {
        "format": FORMAT,
        "network": "LoMACSSVDNet",
        "architecture": net.config,
        "scenarios": list(scenarios),
        "history": history,
    }


def write_checkpoint(checkpoint: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a checkpoint whole or not at all: a failed write leaves the file of before.

    Raises:
        OSError: naming the file, for example on a full disk.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()  # torch.save hides what a file system says behind a message of its own
    torch.save(checkpoint, buffer)
    try:
        with atomic_path(path) as temporary:
            temporary.write_bytes(buffer.getbuffer())
    except OSError as error:
        reason = f"checkpoint not written ({error.strerror})"
        reason += ", the one before it is whole" if path.exists() else ""
        raise OSError(error.errno, reason, os.fspath(path)) from error


def save_network(
    net: LoMACSSVDNet, path: str | os.PathLike[str], *, scenarios: tuple[int, ...], **history: Any
) -> None:
    """Save weights and architecture of a network; `load_network` reads it."""
    state = {_PREFIX + name: value for name, value in net.state_dict().items()}
    write_checkpoint({"state_dict": state, _KEY: describe(net, scenarios, **history)}, path)


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint with `weights_only=True`.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: naming the file, if it is truncated, no checkpoint, or none of this package.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, zipfile.BadZipFile, KeyError, OSError):
        raise ValueError(
            f"{path}: expected a checkpoint, the file cannot be read (damaged, or more than weights in it)"
        ) from None
    entry = checkpoint.get(_KEY) if isinstance(checkpoint, dict) else None
    if not isinstance(entry, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise ValueError(f"{path}: expected a checkpoint of lomacs_fast, got another file")
    kinds = {"format": int, "architecture": dict, "scenarios": list}
    for name, kind in kinds.items():
        if not isinstance(entry.get(name), kind):
            raise ValueError(f"{path}: malformed checkpoint, its {name} is {entry.get(name)!r}")
    if entry["format"] > FORMAT:
        raise ValueError(f"{path}: has format {entry['format']}, this version reads up to {FORMAT}")
    return checkpoint


def load_network(path: str | os.PathLike[str]) -> tuple[LoMACSSVDNet, NetworkInfo]:
    """The network of a checkpoint, in eval mode on the CPU, and what the checkpoint says of it.

    Raises `FileNotFoundError` and `ValueError` as `read_checkpoint`, and `ValueError` if weights and
    architecture do not fit each other.
    """
    checkpoint = read_checkpoint(path)
    entry = checkpoint[_KEY]
    try:
        net = LoMACSSVDNet(**entry["architecture"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: malformed checkpoint, its architecture is refused ({error})") from None
    state = {k.removeprefix(_PREFIX): v for k, v in checkpoint["state_dict"].items() if k.startswith(_PREFIX)}
    try:
        net.load_state_dict(state, strict=True)
    except RuntimeError as error:
        detail = " ".join(str(error).split())
        raise ValueError(f"{path}: weights and architecture do not fit ({detail})") from None
    info = NetworkInfo(
        scenarios=tuple(entry["scenarios"]),
        epoch=checkpoint.get("epoch"),
        step=checkpoint.get("global_step"),
        history=entry.get("history", {}),
    )
    return net.eval(), info
