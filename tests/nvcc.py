"""A CUDA source compiled to a library of its own, and what its machine code says."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
TORCH = Path(torch.__file__).resolve().parent


def build(folder, source, *architectures):
    """The library of one source by the one command; the last architecture's PTX goes along."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc not found")
    library = folder / "liblomacs_cuda.so"
    codes = [f"arch=compute_{a},code=sm_{a}" for a in architectures[:-1]]
    codes.append(
        f"arch=compute_{architectures[-1]},code=[sm_{architectures[-1]},compute_{architectures[-1]}]"
    )
    command = [nvcc, "-O3", "-std=c++20", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC", "-shared"]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
    command += [x for code in codes for x in ("-gencode", code)]
    command += [f"-I{TORCH / 'include'}", str(CSRC / source), "-o", str(library)]
    subprocess.run([*command, f"-L{TORCH / 'lib'}", "-ltorch_cpu"], check=True)
    return library


def cuobjdump():
    found = shutil.which("cuobjdump")
    if found is None:
        try:
            import triton
        except ImportError:
            pytest.skip("cuobjdump not found")
        found = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if not found.exists():
            pytest.skip("cuobjdump not found")
    return str(found)


def dump(library, *options):
    return subprocess.run(
        [cuobjdump(), *options, str(library)], check=True, capture_output=True, text=True
    ).stdout


def resources(library, kernel):
    """Of every architecture and kernel, registers, stack and so on; `kernel(name)` gives a key, or None."""
    usage, architecture, key = {}, None, None
    for line in dump(library, "--dump-resource-usage").splitlines():
        if found := re.search(r"arch = sm_(\d+)", line):
            architecture = int(found[1])
        elif found := re.search(r"Function (\S+):", line):
            key = kernel(found[1])
        elif key is not None and "REG:" in line:
            usage[architecture, *key] = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)}
            key = None
    return usage


def instructions(library, architecture, kernel):
    """Of every kernel, how often each opcode stands in it."""
    counts, key = {}, None
    for line in dump(library, "--dump-sass", "-arch", architecture).splitlines():
        if found := re.search(r"Function : (\S+)", line):
            key = kernel(found[1])
        elif found := re.search(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]*)", line):
            own = counts.setdefault(key, {})
            own[found[1]] = own.get(found[1], 0) + 1
    return counts
