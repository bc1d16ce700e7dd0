"""Checks of the constructors' arguments: each returns a plain number or says what came instead."""

from __future__ import annotations

import numbers
import operator
from typing import Any


def _shown(value: Any) -> str:
    kind = type(value).__name__
    return f"{kind} {value!r}" if isinstance(value, numbers.Number | str) else kind


def integer(name: str, value: Any, least: int | None = None) -> int:
    """An integer of any type, booleans excepted: `TypeError`; `ValueError` below `least`."""
    try:
        # a boolean is an integer to Python
        found = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = None
    if found is None:
        raise TypeError(f"{name} must be an integer, got {_shown(value)}")
    if least is not None and found < least:
        raise ValueError(f"{name} must be at least {least}, got {found}")
    return found


def number(name: str, value: Any) -> float:
    """A real number of any type, booleans excepted; else `TypeError`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a real number, got {_shown(value)}")
    return float(value)


def positive(name: str, value: Any) -> float:
    """A positive, finite real number: `TypeError` and `ValueError`."""
    found = number(name, value)
    if not 0 < found < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {found}")
    return found
