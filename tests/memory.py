"""What a call adds to the memory of this process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def _resident(name: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at most since the last reset."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])


def extra_memory(call: Callable[[], Any]) -> int:
    """Bytes that the call holds at most beyond what was resident before it; skips where no system tells."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        pytest.skip(f"the peak cannot be reset: {error}")
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before
