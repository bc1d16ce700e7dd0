"""Kernels compiled ahead for chips that are not here, and what the machine code shows.

`python tests/aot.py FILE` prints a JSON report of every launch in the dict that `launches()` of a test file returns,
on every target or on those of its `ONLY`; with `--all` on every target all the same, a line each as it is ready.
`reports(__file__)` gives a test the same. A process of its own, since the tests' interprets kernels.
"""

import functools
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
# shared memory a block may have, bytes
SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
CONSUMER = 101376
TYPES = {
    "float32": "*fp32",
    "float64": "*fp64",
    "bfloat16": "*bf16",
    "float16": "*fp16",
    "int64": "*i64",
    "int32": "*i32",
}


@functools.lru_cache(maxsize=8)
def reports(file):
    """`{launch: {target: {registers, spills, shared, tensor, loads, wide_loads, stores, wide_stores, reads}}}`."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__, file], capture_output=True, text=True, env=environment, timeout=550
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def compiled(launch, target):
    """The launch compiled for a target; products on HIP are exact, as `lomacs_fast.kernels.launch.precision`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = dict(launch.constants)
    if target == "gfx942":
        constants = {k: "ieee" if v in ("tf32x3", "tf32") else v for k, v in constants.items()}
    signature, attributes = {}, {}
    for i, name in enumerate(launch.kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        value = launch.arguments[name]
        if value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, int):
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, tuple):
            signature[name] = tuple(TYPES[str(x.dtype).removeprefix("torch.")] for x in value)
            attributes |= {(i, j): [["tt.divisibility", 16]] for j in range(len(value))}
        else:
            signature[name] = TYPES[str(value.dtype).removeprefix("torch.")]
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = launch.options(target == "gfx942")
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)


def _tool(*command):
    import triton

    folder = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return subprocess.run(
        [folder / command[0], *command[1:]], capture_output=True, text=True, check=True
    ).stdout


def reads(text, pointer):
    """Loads from a pointer, by name, that are left in Triton's last form: `{function: [[shape, loops around]]}`."""
    found = {}
    for function in re.split(r"\n  tt\.func ", text)[1:]:
        name = re.search(r'@"?(?:\w+\.)*_*(\w+?)(?:__|["(])', function)[1]
        comes_from, loops = {}, []
        for line in function.splitlines():
            indent = len(line) - len(line.lstrip())
            loops = [start for start in loops if start < indent]
            if "scf.for" in line:
                loops.append(indent)
            done = re.match(r"\s*(?:(%\w+)(?::\d+)? = )?([\w.]+) (%\w+)", line)
            if not done:
                continue
            result, op, operand = done.groups()
            comes_from[result] = comes_from.get(operand, operand)
            if op == "tt.load" and comes_from[result] == f"%{pointer}":
                shape = re.search(r"tensor<([\dx]+)x!tt", line)[1]
                found.setdefault(name, []).append([shape, len(loops)])
    return found


def report(launch, target):
    done = compiled(launch, target)
    found = {"shared": done.metadata.shared, "reads": reads(done.asm["ttgir"], "p_x")}
    if target == "gfx942":
        text = done.asm["amdgcn"]
        numbers = dict(re.findall(r"\.(\w+_count):\s*(\d+)", text))
        found["registers"] = int(numbers["vgpr_count"])
        found["spills"] = int(numbers["vgpr_spill_count"])
        patterns = {
            "tensor": r"v_mfma",
            "loads": r"(?:global|buffer)_load_",
            "wide_loads": r"(?:global|buffer)_load_dwordx4",
            "stores": r"(?:global|buffer)_store_",
            "wide_stores": r"(?:global|buffer)_store_dwordx4",
        }
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(done.asm["cubin"])
            file.flush()
            usage = _tool("cuobjdump", "-res-usage", file.name)
            text = _tool("cuobjdump", "-sass", file.name)
        found["registers"] = int(re.search(r"REG:(\d+)", usage)[1])
        # loads from local memory: what ptxas put there for want of registers
        found["spills"] = len(re.findall(r"\bLDL", text)) + len(re.findall(r"\bSTL", text))
        patterns = {
            "tensor": r"\b(?:HMMA|QMMA|HGMMA|UTC\w*MMA)",
            "loads": r"\b(?:LDG|LDGSTS)\b",
            "wide_loads": r"\b(?:LDG|LDGSTS)\b[.\w]*\.128",
            "stores": r"\bSTG\b",
            "wide_stores": r"\bSTG\b[.\w]*\.128",
        }
    return found | {key: len(re.findall(pattern, text)) for key, pattern in patterns.items()}


def main(file, everything=False):
    spec = importlib.util.spec_from_file_location(pathlib.Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if everything:
        for name, launch in module.launches().items():
            for target in TARGETS:
                found = {key: n for key, n in report(launch, target).items() if key != "reads"}
                print(json.dumps({"launch": name, "target": target} | found), flush=True)
        return
    # what is slow to compile names the targets that matter
    only = getattr(module, "ONLY", {})
    found = {
        name: {target: report(launch, target) for target in only.get(name, TARGETS)}
        for name, launch in module.launches().items()
    }
    json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main(sys.argv[1], "--all" in sys.argv[2:])
