#!/usr/bin/env bash
# Everything a device can tell, in one call of at most nine minutes: builds, tests, sanitizes, measures.
#   benchmarks/gpu_acceptance.sh OUT              on a CUDA machine with PyTorch, Triton and pytest, no network
#   benchmarks/gpu_acceptance.sh OUT --dry-run    the same steps on a CPU at small sizes
# A library built ahead by `python benchmarks/gpu_acceptance.py --build` is used as it is.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" benchmarks/gpu_acceptance.py "$@"
