"""The import rules: which layer may import which, what importing the package brings, and no stray names."""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import lomacs_fast

PACKAGE = Path(lomacs_fast.__file__).parent
LOWEST = {"kernels", "csrc", "reference"}
# what a layer may import of the package, itself apart; layers not named stand above nn. `functional` imports
# `reference` for docstrings and for the stems that have no op yet; the package itself exports `use_backend`
ALLOWED = {
    "reference": set(),
    "kernels": set(),
    "csrc": set(),
    "ops": LOWEST,
    "functional": {"ops", "reference"},
    "nn": {"functional", "reference"},
    "": {
        "functional",
        "reference",
        "nn",
        "ops",
        "acceleration",
        "approximation",
        "auditing",
        "exporting",
        "freezing",
        "neural_svd",
        "pretrained",
    },
}
THIRD_PARTIES = {
    "reference": {"torch"},
    "kernels": {"torch", "triton"},
    "csrc": {"torch"},
    "ops": {"torch"},
    "functional": {"torch"},
    "nn": {"torch"},
    "": {"torch"},
}
HIDDEN = {"ops", "kernels", "csrc"}
BLOCKED = [
    "lightning",
    "matplotlib",
    "scipy",
    "h5py",
    "jsonargparse",
    "yaml",
    "tqdm",
    "tensorboard",
    "sionna",
    "onnx",
    "onnxscript",
    "onnxruntime",
]


def imported(name, source, is_package, submodules):
    """Absolute names of the modules that a source imports; `from package import x` is x where that is one."""
    parents = name.split(".") if is_package else name.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "lomacs_fast":
                for alias in node.names:
                    yield f"lomacs_fast.{alias.name}" if alias.name in submodules else "lomacs_fast"
            else:
                yield module
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "__import__",
            "importlib.import_module",
        ):
            argument = node.args[0] if node.args else None
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                target = argument.value
                yield ".".join(parents) + target if target.startswith(".") else target


def layer(name):
    return name.split(".")[1] if "." in name else ""


def violations(name, source, is_package=False, submodules=frozenset()):
    own = layer(name)
    found = []
    for target in imported(name, source, is_package, submodules):
        top = target.split(".")[0]
        if top == "lomacs_fast":
            other = layer(target)
            if other == own and own:
                continue
            allowed = other not in HIDDEN if own not in ALLOWED else other in ALLOWED[own]
            if not allowed:
                found.append(f"{name} imports {target}")
        elif top not in sys.stdlib_module_names:
            if own in THIRD_PARTIES and top not in THIRD_PARTIES[own]:
                found.append(f"{name} imports {target}")
            if top == "kernels":
                found.append(f"{name} imports the package named kernels")
    return found


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ["lomacs_fast", *path.relative_to(PACKAGE).with_suffix("").parts]
        is_package = parts[-1] == "__init__"
        yield ".".join(parts[:-1] if is_package else parts), path, is_package


SUBMODULES = frozenset(layer(name) for name, _, _ in modules()) - {""}


def test_layers_import_downwards_only():
    names = [name for name, _, _ in modules()]
    assert {
        "lomacs_fast",
        "lomacs_fast.functional",
        "lomacs_fast.nn.network",
        "lomacs_fast.reference",
    } <= set(names)
    found = [
        violation
        for name, path, is_package in modules()
        for violation in violations(name, path.read_text(encoding="utf-8"), is_package, SUBMODULES)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("lomacs_fast.reference.ortho", "import numpy"),
        ("lomacs_fast.reference.ortho", "from lomacs_fast import functional"),
        ("lomacs_fast.reference.ortho", "from .. import functional"),
        ("lomacs_fast.reference.ortho", "from ..functional import bjorck"),
        ("lomacs_fast.reference.ortho", "import lomacs_fast"),
        ("lomacs_fast.reference.ortho", "def f():\n    import scipy.linalg"),
        ("lomacs_fast.ops.ortho", "from lomacs_fast.functional import bjorck"),
        ("lomacs_fast.ops.ortho", "import triton"),
        ("lomacs_fast.functional", "from .nn import LoMACSSVDNet"),
        ("lomacs_fast.functional", "from .kernels import ortho"),
        ("lomacs_fast.nn.network", "from lomacs_fast.ops import ortho"),
        ("lomacs_fast.nn.network", "from .. import ops"),
        ("lomacs_fast.nn.network", "from lomacs_fast import pruning"),
        ("lomacs_fast.nn.network", "from lomacs_fast import LoMACSSVDNet"),
        ("lomacs_fast.data.layouts", "from ..ops.ortho import bjorck"),
        (
            "lomacs_fast.data.layouts",
            "import importlib\nimportlib.import_module('lomacs_fast.kernels.ortho')",
        ),
        ("lomacs_fast.cli", "from lomacs_fast import csrc"),
        ("lomacs_fast.plots", "import kernels"),
    ],
)
def test_a_breach_is_found(name, source):
    assert violations(name, source, submodules=SUBMODULES | {"ops", "kernels", "csrc", "pruning"})


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("lomacs_fast.reference.ortho", "import math\nimport torch.nn\nfrom .spectral import x"),
        ("lomacs_fast.ops.ortho", "from lomacs_fast import reference\nfrom lomacs_fast.kernels import ortho"),
        ("lomacs_fast.kernels.ortho", "import triton.language"),
        ("lomacs_fast.nn.network", "from lomacs_fast import functional, reference\nfrom .ortho import x"),
        ("lomacs_fast.cli", "from . import __version__, metrics\nimport jsonargparse\nfrom .nn import x"),
        ("lomacs_fast.data.layouts", "import numpy\nfrom .files import x\nfrom ..functional import y"),
    ],
)
def test_what_is_in_order_is_not_found(name, source):
    assert not violations(name, source, submodules=SUBMODULES | {"metrics"})


IMPORT = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Blocked())
import numpy, torch, torch.utils.flop_counter, sysconfig
sysconfig.get_config_vars()
before = {{name.split(".")[0] for name in sys.modules}}
import lomacs_fast
after = {{name.split(".")[0] for name in sys.modules}}
assert not torch.cuda.is_initialized()
assert "torch._dynamo" not in sys.modules
print(*sorted(after - before - sys.stdlib_module_names))
"""


@pytest.mark.parametrize("blocked", [[], BLOCKED], ids=["installed", "blocked"])
def test_import_brings_torch_and_numpy_alone(tmp_path, blocked):
    done = subprocess.run(
        [sys.executable, "-I", "-c", IMPORT.format(blocked=blocked)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["lomacs_fast"]


def test_one_top_level_name():
    tops = importlib.metadata.packages_distributions()
    ours = {name for name, owners in tops.items() if {"lomacs_fast", "lomacs-fast"} & set(owners)}
    assert "lomacs_fast" in ours
    assert all(name == "lomacs_fast" or name.startswith("__editable__") for name in ours), ours


def test_the_name_kernels_is_left_to_others(tmp_path):
    code = "import importlib.util as u; print(u.find_spec('kernels'))"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert str(PACKAGE.parent) not in done.stdout
