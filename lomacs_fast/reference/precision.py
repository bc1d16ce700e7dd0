"""Autocast, asked in words that Dynamo traces in every supported release of PyTorch.

`torch.amp.is_autocast_available` ends a graph in torch 2.10 and 2.11. Every device has autocast but `meta`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def autocast(device_type: str) -> bool:
    """Whether autocast is on for the device."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def full_precision(device_type: str) -> AbstractContextManager[Any]:
    """Autocast off, where the device has it: complex stems stay in full precision."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)
