"""Shared by all tests: bounded threads, poisoned uninitialised memory, interpreted kernels without a device."""

import os
from pathlib import Path

import pytest

# graphs compiled by another state of the sources call ops by the schemas of then
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR", str(Path(__file__).resolve().parents[1] / "build" / "inductor")
)

# read when OpenMP is loaded: threads that spin while they wait take the cores of the process beside this one
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

# read when Triton is imported; a device runs kernels instead
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """`torch.empty` gives NaN, so that reading what nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
