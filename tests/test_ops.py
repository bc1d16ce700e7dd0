"""Choice of backend, and the native library: found, built at first use, shared by processes, given up."""

import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import timeit
import types
import zipfile
from pathlib import Path

import pytest
import torch

import lomacs_fast
from lomacs_fast import BackendError, functional, use_backend
from lomacs_fast.ops import dispatch, native, toolchain

ROOT = Path(lomacs_fast.__file__).resolve().parents[1]
COMPILER = toolchain.find_compiler("cpu")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
needs_checkout = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="not a checkout")


@pytest.fixture
def op(monkeypatch):
    """An op whose fast backend takes floats on the CPU, and whose best takes nothing."""
    monkeypatch.setattr(dispatch, "OPS", {})
    monkeypatch.setattr(dispatch, "_said", set())

    def only_floats(x, _):
        return [] if x.dtype == torch.float32 else [f"x is {x.dtype}"]

    return dispatch.Op(
        "scale",
        [
            dispatch.Backend("triton", lambda *_: ["no device", "no Triton"], None),
            dispatch.Backend("cpp", only_floats, lambda x, k: x * k + 100),
            dispatch.Backend("eager", lambda *_: (), lambda x, k: x * k),
        ],
        ("x", "k"),
        lambda device: (torch.ones(2, device=device), 3),
    )


X = torch.ones(2)
XD = torch.ones(2, dtype=torch.float64)


def served_by(op, x=X):
    return "cpp" if op(x, 3)[0] > 100 else "eager"


def test_auto_takes_the_first_that_can(op):
    assert served_by(op) == "cpp"
    assert served_by(op, XD) == "eager"
    with use_backend("eager"):
        assert served_by(op) == "eager"
        with use_backend("auto"):
            assert served_by(op) == "cpp"
        assert served_by(op) == "eager"
    with use_backend("cpp"):
        assert served_by(op) == "cpp"
    assert served_by(op) == "cpp"


def test_an_error_restores_the_choice_and_a_context_serves_twice(op):
    eager = use_backend("eager")
    for _ in range(2):
        with pytest.raises(IndexError), eager, eager:
            "eager"[99 * (served_by(op) == "eager")]
        assert served_by(op) == "cpp"


def test_a_fallback_is_said_once(op, caplog):
    caplog.set_level(logging.INFO, "lomacs_fast")
    for _ in range(3):
        op(X, 3), op(XD, 3)
    words = [record.getMessage() for record in caplog.records]
    assert words == [
        "scale: served by cpp, because triton: no device; triton: no Triton",
        "scale: served by eager, because triton: no device; triton: no Triton; cpp: x is torch.float64",
    ]


def test_a_backend_asked_for_serves_or_tells_why(op, caplog):
    with use_backend("triton"), pytest.raises(BackendError) as error:
        op(X, 3)
    assert str(error.value) == (
        "scale(x=float32(2,) on cpu, k=3) cannot be served by triton\n  triton: no device; no Triton"
    )
    with (
        use_backend("cpp"),
        pytest.raises(ValueError, match=r"x=float64\(2,\) on cpu.*\n  cpp: x is torch.float64$"),
    ):
        op(XD, 3)
    op.backends = op.backends[1:]
    with use_backend("triton"), pytest.raises(BackendError, match="no such backend, it has cpp, eager"):
        op(X, 3)
    assert not caplog.records


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="backend must be one of auto, eager, cpp, triton, got 'fast'"):
        use_backend("fast")


def test_the_choice_is_the_threads_own(op):
    found = {}
    inside, leave = threading.Event(), threading.Event()

    def other():
        found["before"] = served_by(op)
        with use_backend("eager"):
            inside.set()
            leave.wait(30)
            found["inside"] = served_by(op)

    thread = threading.Thread(target=other)
    with use_backend("cpp"):
        thread.start()
        assert inside.wait(30)
        found["here"] = served_by(op)
        leave.set()
        thread.join()
    assert found == {"before": "cpp", "inside": "eager", "here": "cpp"}
    assert dispatch._traced is None or dispatch._traced == "cpp"
    dispatch._traced = None


def test_compiled_graphs_follow_the_choice(op):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: op(x, 3), fullgraph=True, backend="eager")
    inside = torch.compile(lambda x: within(op, x), fullgraph=True, backend="eager")
    for _ in range(2):
        assert compiled(X)[0] == 103
        assert compiled(XD)[0] == 3
        with use_backend("eager"):
            assert compiled(X)[0] == 3
        assert inside(X)[0] == 3
    assert op(X, 3)[0] == 103


def within(op, x):
    with use_backend("eager"):
        return op(x, 3)


def test_the_choice_takes_microseconds(op):
    op.backends = op.backends[1:]
    whole = min(timeit.repeat(lambda: op(X, 3), number=1000, repeat=7)) / 1000
    work = min(timeit.repeat(lambda: X * 3 + 100, number=1000, repeat=7)) / 1000
    assert whole - work < 10e-6


def python(code, **variables):
    """Run a program with these environment variables; None takes one away."""
    env = {k: v for k, v in (os.environ | variables).items() if v is not None}
    env["PYTHONPATH"] = str(ROOT) if (ROOT / "setup.py").is_file() else ""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=300, check=False
    )


CALL = """
import torch, lomacs_fast
H = torch.ones(1, 3, 2, dtype=torch.float64)
U, S, V = H[..., :1], torch.ones(1, 1, dtype=torch.float64), H[:, :2, :1]
print(lomacs_fast.functional.aeplus_loss(U, S, V, H, lam=1, w_energy=1, w_diag=1, w_match=1)[0].item())
"""


def test_environment_variable():
    served = python(CALL, LOMACS_FAST_BACKEND="eager")
    assert served.returncode == 0, served.stderr
    refused = python(CALL, LOMACS_FAST_BACKEND="cpp")
    assert "BackendError" in refused.stderr
    assert "cpp: H is float64" in refused.stderr
    wrong = python(CALL, LOMACS_FAST_BACKEND="fastest")
    assert (
        "ValueError: LOMACS_FAST_BACKEND must be one of auto, eager, cpp, triton, got 'fastest'"
        in wrong.stderr
    )
    assert python("import lomacs_fast", LOMACS_FAST_BACKEND="fastest").returncode == 0


def test_the_table_names_every_op_and_backend():
    rows = lomacs_fast.backend_table()
    on_cpu = [(row["op"], row["backend"]) for row in rows if row["device"] == "cpu"]
    assert on_cpu == [(name, b.name) for name, op in dispatch.OPS.items() for b in op.backends]
    for row in rows:
        assert row["backend"] != "eager" or row["reasons"] == []
        assert all(isinstance(reason, str) for reason in row["reasons"])


IMPORT = """
import os, subprocess, sys, torch
def never(*args, **kwargs):
    raise AssertionError(args)
subprocess.Popen = os.system = torch.ops.load_library = never
import lomacs_fast
from lomacs_fast.ops import native
assert all(library.state is None for library in native.libraries.values())
assert not torch.cuda.is_initialized()
assert not os.path.exists(os.environ["LOMACS_FAST_CACHE"])
"""


@pytest.mark.parametrize(
    ("cache", "words"),
    [
        pytest.param(True, "built at first use: ", marks=needs_compiler),
        (False, "not built: CXX=/nowhere/g++ is not there"),
    ],
)
def test_info_says_how_the_libraries_are_served(tmp_path, cache, words):
    ahead = ROOT / "lomacs_fast" / "_native" / toolchain.library_name("cpu")
    if ahead.exists():
        pytest.skip("a library was built ahead of time here")
    variables = {} if cache else {"CXX": "/nowhere/g++", "LOMACS_FAST_CACHE": str(tmp_path)}
    command = [sys.executable, "-m", "lomacs_fast", "info", "--json", str(tmp_path / "info.json")]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | variables, timeout=500, check=True
    )
    facts = json.loads((tmp_path / "info.json").read_text())
    assert facts["libraries"]["cpu"].startswith(words)
    assert set(facts["libraries"]) == {"cpu", "cuda"}
    assert [line for line in done.stdout.splitlines() if words in line and line.startswith("| cpu ")]
    # said once, by a warning where nothing serves
    assert done.stderr.count(words) == (not cache)


@needs_checkout
@pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="setuptools is not installed here")
def test_a_build_environment_too_old_is_one_sentence(tmp_path):
    before = "import setuptools; setuptools.__version__ = '65.5.0'"
    code = f"{before}\nimport runpy; runpy.run_path('setup.py')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "lomacs_fast is built by setuptools 77 or later, the build environment has 65.5.0\n"
    )


def test_import_builds_and_loads_nothing(tmp_path):
    done = python(IMPORT, LOMACS_FAST_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A source tree of one tiny function, a cache of its own and no library built ahead."""
    csrc = tmp_path / "csrc"
    (csrc / "cpu").mkdir(parents=True)
    (csrc / "cpu" / "tiny.cpp").write_text(
        '#include "tiny.h"\nextern "C" int lomacs_tiny() { return TINY; }\n'
    )
    (csrc / "cpu" / "tiny.h").write_text("#define TINY 7\n")
    monkeypatch.setenv("LOMACS_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LOMACS_FAST_BUILD", raising=False)
    monkeypatch.setattr(native, "PACKAGE", tmp_path / "package")
    monkeypatch.setattr(native, "find_sources", lambda: csrc)
    return csrc


def messages(caplog, level=logging.INFO):
    return [record.getMessage() for record in caplog.records if record.levelno >= level]


@needs_compiler
def test_a_library_is_built_once_and_then_found(tree, tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "lomacs_fast")
    first = native.Library("cpu")
    assert first.state is None
    assert first.reasons() == ()
    assert first.state.startswith("built at first use: ")
    assert messages(caplog)[0] == f"building the cpu library once, with {' '.join(COMPILER[:1])} ..."
    assert len(messages(caplog)) == 3
    built = [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    assert sorted(p.name for p in built) == ["liblomacs_cpu.so", "lock"]

    monkeypatch.setattr(toolchain, "build", None)
    again = native.Library("cpu")
    assert again.reasons() == again.reasons() == ()
    assert len(messages(caplog)) == 4


@needs_compiler
@pytest.mark.parametrize("change", ["header", "flags", "torch"])
def test_whatever_it_is_built_from_is_in_the_key(tree, tmp_path, change, monkeypatch):
    assert native.Library("cpu").reasons() == ()
    if change == "header":
        (tree / "cpu" / "tiny.h").write_text("#define TINY 8\n")
    elif change == "flags":
        monkeypatch.setenv("LOMACS_FAST_CXXFLAGS", "-O1")
    else:
        monkeypatch.setattr(toolchain, "torch_versions", lambda root: ("99.0", None))
    (tree / "cuda").mkdir()
    (tree / "cuda" / "other.cu").write_text("of another library")
    assert native.Library("cpu").reasons() == ()
    assert len(list((tmp_path / "cache").rglob("*.so"))) == 2


@needs_compiler
def test_threads_build_once(tree, monkeypatch):
    builds, build = [], toolchain.build
    monkeypatch.setattr(toolchain, "build", lambda *a, **k: (builds.append(a), build(*a, **k)))
    library = native.Library("cpu")
    threads = [threading.Thread(target=library.reasons) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert library.reasons() == ()
    assert len(builds) == 1


PROCESS = """
import sys
from pathlib import Path
from lomacs_fast.ops import native
native.PACKAGE = Path("/nowhere")
native.find_sources = lambda: Path({csrc!r})
sys.exit(len(native.Library("cpu").reasons()))
"""


@needs_compiler
def test_two_processes_build_once(tree, tmp_path):
    wrapper, record = tmp_path / "slow-compiler", tmp_path / "record"
    wrapper.write_text(f'#!/bin/sh\necho "$@" >> {record}\nsleep 0.3\nexec {" ".join(COMPILER)} "$@"\n')
    wrapper.chmod(0o755)
    found = []
    run = lambda: found.append(python(PROCESS.format(csrc=str(tree)), CXX=str(wrapper)))  # noqa: E731
    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [done.returncode for done in found] == [0, 0], [done.stderr for done in found]
    assert sum(" -c " in f" {line}" for line in record.read_text().splitlines()) == 1
    assert len(list((tmp_path / "cache").rglob("*.so"))) == 1


def test_building_can_be_forbidden(tree, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "lomacs_fast")
    monkeypatch.setenv("LOMACS_FAST_BUILD", "0")
    monkeypatch.setattr(toolchain, "build", None)
    monkeypatch.setattr(toolchain, "find_compiler", lambda kind: [sys.executable])
    library = native.Library("cpu")
    wanted = "library not built: building at first use is off (LOMACS_FAST_BUILD=0)"
    assert library.reasons() == library.reasons() == (wanted,)
    assert messages(caplog) == [f"cpu {wanted}"]
    assert not messages(caplog, logging.WARNING)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"CXX": "/nowhere/g++"}, "not built: CXX=/nowhere/g++ is not there"),
        ({"CXX": "", "PATH": "/nowhere"}, "not built: no C++ compiler found"),
        ({"LOMACS_FAST_CACHE": "/dev/null/cache"}, "not built: /dev/null"),
        ({"CXX": "false"}, "not built: false failed: exit 1"),
    ],
)
def test_no_library_is_one_line(tree, caplog, monkeypatch, variables, words):
    if COMPILER is None and "LOMACS_FAST_CACHE" in variables:
        pytest.skip("no C++ compiler")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    library = native.Library("cpu")
    reasons = library.reasons()
    assert reasons == library.reasons()
    assert len(reasons) == 1
    assert words in reasons[0]
    lines = [line for line in messages(caplog, logging.WARNING) if not line.startswith("building")]
    assert len(lines) == 1
    assert "\n" not in lines[0]


@needs_compiler
def test_a_failed_build_is_remembered_and_leaves_nothing(tree, tmp_path, caplog, monkeypatch):
    (tree / "cpu" / "wrong.cpp").write_text("#error what is wrong here\n")
    library = native.Library("cpu")
    reasons = library.reasons()
    assert "what is wrong here" in reasons[0]
    monkeypatch.setattr(toolchain, "build", None)
    assert library.reasons() == reasons
    assert [p.name for p in (tmp_path / "cache").rglob("*") if p.is_file()] == ["lock"]


@needs_compiler
def test_a_library_built_ahead_is_taken_first(tree, tmp_path, caplog, monkeypatch):
    ahead = tmp_path / "package" / "_native" / "liblomacs_cpu.so"
    toolchain.build("cpu", tree, ahead)
    key = ahead.with_suffix(".key")
    key.write_text(toolchain.key_of_sources(tree, "cpu"))
    library = native.Library("cpu")
    assert library.reasons() == ()
    assert library.state == f"built ahead of time: {ahead}"
    assert not (tmp_path / "cache").exists()

    # of other sources: built anew
    key.write_text("0")
    library = native.Library("cpu")
    assert library.reasons() == ()
    assert "built at first use" in library.state
    assert "is of other sources" in library.state

    # no library at all: both are told
    monkeypatch.setattr(native, "PACKAGE", tmp_path / "other")
    (tmp_path / "other" / "_native").mkdir(parents=True)
    (tmp_path / "other" / "_native" / ahead.name).write_bytes(b"not a library")
    monkeypatch.setenv("LOMACS_FAST_CXXFLAGS", "-O1")
    monkeypatch.setenv("LOMACS_FAST_BUILD", "0")
    (reason,) = native.Library("cpu").reasons()
    assert "LOMACS_FAST_BUILD=0" in reason
    assert "liblomacs_cpu.so does not load" in reason


def test_devices_without_a_library(tree):
    assert native.reasons("meta") == ("no library for meta devices",)
    if torch.version.cuda is None:
        assert native.Library("cuda").reasons() == ("library not built: torch is built without CUDA",)


def test_without_sources_there_is_a_reason(tree, monkeypatch):
    monkeypatch.setattr(native, "find_sources", lambda: None)
    assert native.Library("cpu").reasons() == ("library not built: its sources are not installed",)


def test_a_stranger_named_csrc_is_not_taken(tmp_path, monkeypatch):
    (tmp_path / "csrc").mkdir()
    monkeypatch.setattr(native, "PACKAGE", tmp_path / "lomacs_fast")
    assert native.find_sources() is None
    (tmp_path / "lomacs_fast" / "_csrc").mkdir(parents=True)
    assert native.find_sources() == tmp_path / "lomacs_fast" / "_csrc"


def test_the_loss_goes_through_the_op(monkeypatch):
    seen = []
    op = dispatch.OPS["aeplus_loss"]
    eager = op.backends[-1]
    monkeypatch.setattr(op, "backends", (eager._replace(run=lambda *a: (seen.append(a), eager.run(*a))[1]),))
    x = torch.ones(2, 2, 2)
    module = lomacs_fast.AEPlusLoss("mean")
    module(x, x[0], x, x, 0.4, 0.3, 0.2, 0.1)
    functional.aeplus_loss(x, x[0], x, x, lam=0.1, w_energy=0.4, w_diag=0.3, w_match=0.2)
    assert [call[4:] for call in seen] == [(0.1, 0.4, 0.3, 0.2, "mean"), (0.1, 0.4, 0.3, 0.2, "norm")]


@pytest.mark.parametrize("name", ["aeplus_loss", "low_rank_loss"])
def test_a_device_without_the_library_takes_the_formula_with_one_line(name, caplog, monkeypatch):
    """`csrc/cuda` was not built beside a CUDA torch: said once, whatever the number of calls."""
    caplog.set_level(logging.INFO, "lomacs_fast")
    monkeypatch.setattr(dispatch, "_said", set())
    monkeypatch.setenv("LOMACS_FAST_UNPROVED", "1")
    asked = []
    monkeypatch.setattr(native, "reasons", lambda kind: asked.append(kind) or ("library not built: no nvcc",))
    op = dispatch.OPS[name]
    served = op.backends[-1]._replace(run=lambda *_: "formula")
    monkeypatch.setattr(op, "backends", (*op.backends[:-1], served))
    x = types.SimpleNamespace(
        device=torch.device("cuda"), dtype=torch.complex64, shape=(2, 4, 4), is_complex=lambda: True
    )
    rest = [None] * (len(op.arguments) - 3)
    assert [op(x, x, x, *((x, *rest[1:]) if name == "aeplus_loss" else rest)) for _ in range(3)] == [
        "formula"
    ] * 3
    assert set(asked) == {"cuda"}
    words = [record.getMessage() for record in caplog.records]
    assert words == [f"{name}: served by eager, because cpp: library not built: no nvcc"]


@pytest.mark.parametrize("name", ["aeplus", "low_rank"])
def test_autocast_is_registered_for_both_devices(name):
    for device in ("CPU", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lomacs::{name}", f"Autocast{device}")


WHEEL = """
import sys
{before}
from setuptools import build_meta
print(getattr(build_meta, {hook!r})({out!r}))
"""


def build_wheel(tmp_path, hook="build_wheel", before="", **variables):
    """Run the build backend in a copy of the checkout; the archive, and what was said."""
    source = tmp_path / "source"
    skip = shutil.ignore_patterns(
        ".*", "build", "dist", "runs", "*.egg-info", "__pycache__", "tests", "_native"
    )
    shutil.copytree(ROOT, source, ignore=skip)
    out = tmp_path / "out"
    out.mkdir()
    code = WHEEL.format(before=before, hook=hook, out=str(out))
    env = os.environ | variables
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=source,
        env=env,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (archive,) = out.iterdir()
    said = [line for line in done.stderr.splitlines() if line.startswith("lomacs_fast:")]
    return archive, said


needs_setuptools = pytest.mark.skipif(
    importlib.util.find_spec("setuptools") is None, reason="setuptools is not installed here"
)


@needs_checkout
@needs_setuptools
@pytest.mark.parametrize(
    ("before", "variables", "words"),
    [
        (
            "",
            {"CXX": "/nowhere/g++", "NVCC": "/nowhere/nvcc"},
            "not built ahead: CXX=/nowhere/g++ is not there",
        ),
        ("sys.modules['torch'] = None", {}, "not built ahead: torch is not in the build environment"),
    ],
    ids=["no compiler", "no torch"],
)
def test_a_wheel_without_the_library(tmp_path, before, variables, words):
    archive, said = build_wheel(tmp_path, before=before, **variables)
    assert archive.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(archive).namelist()
    assert "lomacs_fast/_csrc/cpu/aeplus.cpp" in names
    assert not any("_native" in name for name in names)
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"lomacs_fast"}
    cpu = [line for line in said if "cpu" in line]
    assert len(cpu) == 1
    assert words in cpu[0]


@pytest.mark.slow
@needs_checkout
@needs_setuptools
@needs_compiler
def test_a_wheel_with_the_library(tmp_path):
    archive, said = build_wheel(tmp_path)
    assert "-py3-none-any" not in archive.name
    assert "-py3-none-" in archive.name
    assert any("cpu library built against torch" in line for line in said)
    zipfile.ZipFile(archive).extractall(tmp_path / "site")
    code = "from lomacs_fast.ops import native as n; l = n.libraries['cpu']; print(l.reasons(), l.state)"
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "LOMACS_FAST_BUILD": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.stdout.startswith("() built ahead of time: "), done.stderr


@needs_checkout
@needs_setuptools
def test_the_source_archive_holds_the_sources(tmp_path):
    archive, _ = build_wheel(tmp_path, hook="build_sdist")
    with tarfile.open(archive) as files:
        names = {name.split("/", 1)[-1] for name in files.getnames()}
    assert {"setup.py", "csrc/cpu/aeplus.cpp", "lomacs_fast/ops/toolchain.py"} <= names
