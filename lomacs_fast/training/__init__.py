"""Training on Lightning: schedules, exact resume, checkpoints that carry their architecture.

`TrainConfig`, `load_network` and `save_network` need torch alone; `train` needs the `train` extra.
"""

from typing import Any

from .checkpoints import NetworkInfo, load_network, read_checkpoint, save_network
from .config import PRESETS, TrainConfig, parse_size
from .schedules import Schedule, cosine

__all__ = [
    "PRESETS",
    "NetworkInfo",
    "Schedule",
    "TrainConfig",
    "cosine",
    "load_network",
    "parse_size",
    "read_checkpoint",
    "read_config_file",
    "read_config_values",
    "read_history",
    "remove_run",
    "save_network",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in ("train", "read_history", "read_config_file", "read_config_values", "remove_run"):
        try:
            from . import run
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"training needs {error.name}: pip install 'lomacs_fast[train,cli]'"
            ) from error
        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
