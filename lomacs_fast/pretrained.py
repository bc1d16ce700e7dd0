"""Trained networks that come with the package, as plain arrays."""

from __future__ import annotations

import json
import os
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .data.files import atomic_path
from .nn import LoMACSSVDNet

__all__ = ["load_pretrained", "load_weights", "pretrained_names", "save_weights"]

FORMAT = 1


def _folder() -> Any:
    return resources.files("lomacs_fast") / "weights"


def pretrained_names() -> list[str]:
    """The names that `load_pretrained` takes."""
    return sorted(f.name.removesuffix(".npz") for f in _folder().iterdir() if f.name.endswith(".npz"))


def load_pretrained(name: str) -> LoMACSSVDNet:
    """A trained refined network, in eval mode on the CPU: `"64x64x32"` or `"128x128x64"`.

    Trained by `benchmarks/accuracy.py` on covariances of the built-in generator; the card beside the weights,
    `lomacs_fast/weights/README.md`, says on what, how accurate, and where it fails. The attribute `facts` of
    the network holds the same numbers; scene k is scenario k + 1.

    Raises:
        TypeError, ValueError: for a name that there is not, listing those there are.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {type(name).__name__}")
    if name not in pretrained_names():
        raise ValueError(f"name must be one of {', '.join(pretrained_names())}, got {name!r}")
    with resources.as_file(_folder() / f"{name}.npz") as path:
        return load_weights(path)


def save_weights(
    net: LoMACSSVDNet, path: str | os.PathLike[str], facts: dict[str, Any], *, overwrite: bool = False
) -> None:
    """Write a network as one `.npz` of plain arrays and a JSON text, whole or not at all."""
    text = json.dumps({"format": FORMAT, "config": net.config, "facts": facts})
    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in net.state_dict().items()}
    with atomic_path(Path(path), overwrite=overwrite) as temporary, open(temporary, "wb") as file:
        np.savez(file, lomacs_fast=np.array(text), **arrays)


def load_weights(path: str | os.PathLike[str]) -> LoMACSSVDNet:
    """Read a file of `save_weights`; nothing in it is run.

    Raises:
        OSError: where it cannot be read. ValueError: where it holds something else, naming it.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            entry = json.loads(str(file["lomacs_fast"]))
            arrays = {name: torch.from_numpy(file[name]) for name in file.files if name != "lomacs_fast"}
        if entry["format"] != FORMAT:
            raise ValueError(f"its format is {entry['format']}")
        net = LoMACSSVDNet(**entry["config"])
        net.load_state_dict(arrays)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{os.fspath(path)} holds no network of this package: {error}") from error
    net.facts = entry["facts"]
    return net.eval()
