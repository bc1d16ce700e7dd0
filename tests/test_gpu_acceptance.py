"""The acceptance run on a device, as far as it needs none."""

import os
import subprocess
import sys

import pytest

from lomacs_fast.benchmarks import gpu_acceptance, stems


def test_the_staged_package_imports_whole(tmp_path):
    gpu_acceptance.stage(tmp_path)
    code = "import lomacs_fast, lomacs_fast.benchmarks.suite, lomacs_fast.kernels, lomacs_fast.ops.native as n; print(lomacs_fast.__file__, n.find_sources())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        timeout=60,
        check=True,
    )
    assert done.stdout.split() == [
        str(tmp_path / "lomacs_fast" / "__init__.py"),
        str(tmp_path / "lomacs_fast" / "_csrc"),
    ]


def test_a_step_that_fails_or_hangs_stops_no_other(tmp_path):
    run = [sys.executable, "-c"]
    failed = gpu_acceptance.step(
        "a", [*run, "print('x'); raise SystemExit(3)"], tmp_path, dict(os.environ), 30
    )
    hung = gpu_acceptance.step("b", [*run, "import time; time.sleep(60)"], tmp_path, dict(os.environ), 1)
    absent = gpu_acceptance.step("c", [str(tmp_path / "nothing")], tmp_path, dict(os.environ), 1)
    assert (failed["status"], failed["end"]) == (3, ["x"])
    assert hung["status"] == "stopped after 1 s"
    assert "No such file" in absent["status"]


def test_what_runs_into_its_limit_may_report(tmp_path):
    code = """
import time
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("FAILED tests/test_a.py::test_b")
"""
    done = gpu_acceptance.together("t", {"a": [sys.executable, "-c", code]}, tmp_path, dict(os.environ), 1)
    assert done["status"] == "stopped after 1 s"
    assert done["end"][1] == "FAILED tests/test_a.py::test_b"


def test_results_are_not_overwritten(tmp_path, monkeypatch, capsys):
    (tmp_path / "bench.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["gpu_acceptance.py", str(tmp_path)])
    with pytest.raises(SystemExit):
        gpu_acceptance.main()
    assert "is not empty" in capsys.readouterr().err


def test_every_function_of_the_suite_is_accepted():
    assert gpu_acceptance.functions() == [case.function for case in stems.CASES]
    assert set(gpu_acceptance.names_of("backbone")) == {"triton"}


def test_what_needs_a_device_is_selected():
    command = gpu_acceptance.tests(sys.executable, dry=False)
    plain = [word for word in command if word not in ("-v", "-n", "--dist", "worksteal", str(os.cpu_count()))]
    done = subprocess.run(
        [*plain, "--collect-only", "-q"], capture_output=True, text=True, timeout=120, check=True
    )
    found = done.stdout
    for part in (
        "test_stems.py::test_values_and_gradients_by_the_rule[aeplus_loss-cuda-64x64x32]",
        "test_kernels_refine.py::test_on_a_device_at_the_main_size",
        "test_kernels_ortho.py::",
        "test_freezing.py::TestOnADevice",
    ):
        assert part in found
    for part in ("-cpu-", "test_gpu_acceptance", "ahead"):
        assert part not in found


def test_limits_leave_room_in_nine_minutes():
    assert sum(gpu_acceptance.LIMITS.values()) <= 9 * 60
