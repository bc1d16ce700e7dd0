"""Builds the native libraries ahead of time where torch and a compiler are at hand."""

import importlib.util
import shutil
import sys
from pathlib import Path

from setuptools import __version__, find_packages, setup
from setuptools.command.build_py import build_py

# without isolation pip takes what is there, whatever pyproject.toml asks for
if int(__version__.partition(".")[0]) < 77:
    sys.exit(f"lomacs_fast is built by setuptools 77 or later, the build environment has {__version__}")

from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
spec = importlib.util.spec_from_file_location("toolchain", ROOT / "lomacs_fast" / "ops" / "toolchain.py")
toolchain = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toolchain)


def say(kind, sentence):
    print(f"lomacs_fast: {kind} library {sentence}", file=sys.stderr, flush=True)


def build_native(folder):
    """Whether a library was built into the folder; what was not is one line each."""
    shutil.rmtree(folder, ignore_errors=True)
    root = toolchain.torch_root()
    if root is None:
        say("cpu", "not built ahead: torch is not in the build environment; it is built at first use")
        return False
    built = False
    for kind in toolchain.wanted(root):
        target = folder / toolchain.library_name(kind)
        try:
            toolchain.build(kind, ROOT / "csrc", target)
        except (toolchain.BuildError, OSError) as error:
            say(kind, f"not built ahead: {error}")
            continue
        target.with_suffix(".key").write_text(toolchain.key_of_sources(ROOT / "csrc", kind), encoding="ascii")
        say(kind, f"built against torch {toolchain.torch_versions(root)[0]}")
        built = True
    return built


class Build(build_py):
    native = False

    def run(self):
        super().run()
        if self.editable_mode:
            say("cpu", "not built ahead in an editable installation: it is built at first use")
        else:
            self.native = build_native(Path(self.build_lib) / "lomacs_fast" / "_native")


class Wheel(bdist_wheel):
    """`py3-none-<platform>` with a library inside, since it uses no Python API; `py3-none-any` without."""

    native = False

    def run(self):
        self.run_command("build")
        self.native = self.get_finalized_command("build_py").native
        self.root_is_pure = not self.native
        # setuptools chooses the folder inside the wheel by this
        self.distribution.has_ext_modules = lambda: self.native
        super().run()

    def get_tag(self):
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if self.native else (python, abi, platform)


setup(
    packages=[
        *find_packages(include=["lomacs_fast", "lomacs_fast.*"]),
        "lomacs_fast._csrc",
        "lomacs_fast.benchmarks",
        "lomacs_fast.kernels",
    ],
    package_dir={
        "lomacs_fast._csrc": "csrc",
        "lomacs_fast.benchmarks": "benchmarks",
        "lomacs_fast.kernels": "kernels",
    },
    package_data={
        "lomacs_fast": ["py.typed", "weights/*.npz", "weights/README.md"],
        "lomacs_fast._csrc": [f"{folder}*{suffix}" for folder in ("", "*/") for suffix in toolchain.TEXTS],
    },
    cmdclass={"build_py": Build, "bdist_wheel": Wheel},
)
