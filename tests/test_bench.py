"""`lomacs-fast bench`: wrong variants get no time, rows say what they should, regressions are told."""

import copy
import dataclasses
import json
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from lomacs_fast import cli
from lomacs_fast.benchmarks import compare, report, stems, suite

REQUIRED = {
    "stem", "pass", "size", "batch", "device", "variant", "median_s", "ratio_to_eager", "floor_s", "error"
}  # fmt: skip


class Machine:
    product, copy = 1e9, 1e9
    floor = suite.Machine.floor


def case(**variants):
    exact = torch.ones(8, dtype=torch.float64)
    calls = {"eager": lambda: [exact.float() * (1 + 1e-6)], **variants}
    return suite.Case(
        "aeplus", "aeplus_loss", "8x8x4", 2, False, "cpu", calls, [exact], 2, 4e3, 1e3, alike=tuple(calls)
    )


def test_a_wrong_variant_gets_no_time():
    def fails():
        raise RuntimeError("no such thing")

    rows = suite.measure(
        case(
            ours=lambda: [torch.ones(8)],
            wrong=lambda: [torch.full((8,), 1.001)],
            nan=lambda: [torch.full((8,), float("nan"))],
            fails=fails,
        ),
        Machine(),
        0.01,
    )
    assert [(r["variant"], r["median_s"] is not None) for r in rows] == [
        ("eager", True),
        ("ours", True),
        ("wrong", False),
        ("nan", False),
        ("fails", False),
    ]
    assert rows[2]["trouble"].startswith("wrong: error 1.0e-03")
    assert rows[3]["trouble"].startswith("wrong")
    assert "no such thing" in rows[4]["trouble"]
    assert all(row.keys() >= REQUIRED for row in rows)
    assert json.dumps(rows)


def test_rounds_are_pooled_and_told_one_by_one(monkeypatch):
    made, took = case(ours=lambda: [torch.ones(8)]), {"ours": 1.0}
    names = {id(call): name for name, call in made.variants.items()}
    monkeypatch.setattr(suite, "timer", lambda call, *_: lambda: took[names[id(call)]])
    timing = suite.Timing(made, Machine())
    timing.check(made)
    for took["eager"] in (9.0, 5.0, 6.0):
        timing.time(made, 0.0, least=2)
    eager, ours = timing.rows()
    assert ours["ratios"] == [9.0, 5.0, 6.0]
    assert (ours["ratio_to_eager"], ours["repeats"]) == (6.0, 6)
    assert eager["median_s"] == 6.0


def test_every_round_measures_the_cases_again_but_no_sweep(monkeypatch):
    made, told = [], []

    def cases(options):
        made.append((options.compiled, options.sweeps))
        yield lambda: case(ours=lambda: [torch.ones(8)])
        if options.sweeps:
            yield lambda: dataclasses.replace(case(ours=lambda: [torch.ones(8)]), kind="batch")

    monkeypatch.setattr(suite, "cases", cases)
    monkeypatch.setattr(suite, "Machine", lambda device: Machine())
    result = suite.run(
        suite.Options(seconds=0.001, rounds=3), lambda number, rows: told.append((number, rows[0]["kind"]))
    )
    assert made == [(True, True), (False, False), (False, False)]
    assert told == [(1, "main"), (1, "batch"), (2, "main"), (3, "main")]
    assert [len(r["ratios"]) for r in result["cases"]] == [3, 3, 1, 1]
    assert result["rounds"] == 3


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no alarms here")
def test_a_compilation_without_end_is_left(monkeypatch):
    def compiling():
        while True:
            time.sleep(0.01)

    monkeypatch.setattr(suite, "PATIENCE", 0.1)
    before = signal.getsignal(signal.SIGALRM)
    rows = suite.measure(
        case(**{"torch.compile": compiling, "ours": lambda: [torch.ones(8)]}), Machine(), 0.01
    )
    assert "took more than 0.1 s" in rows[1]["trouble"]
    assert rows[2]["median_s"] is not None
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="processes are found in /proc")
def test_compilers_of_a_left_compilation_end(tmp_path):
    # a script's process has the name of its file
    compiler = tmp_path / "cc1plus"
    compiler.write_text("#!/bin/sh\nread line\n")
    compiler.chmod(0o755)
    shell = subprocess.Popen(["sh", "-c", f"{compiler}; true"], stdin=subprocess.PIPE)
    other = subprocess.Popen(["sleep", "60"])
    try:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and shell.poll() is None:
            suite.end_compilers()
            time.sleep(0.05)
        assert shell.poll() is not None
        assert other.poll() is None
    finally:
        for process in (shell, other):
            process.kill()
            process.wait()
        shell.stdin.close()


def test_ratio_and_floor_are_those_of_the_clock():
    def slow():
        time.sleep(0.02)
        return [torch.ones(8)]

    eager, ours = suite.measure(case(ours=slow), Machine(), 0.01)
    assert ours["ratio_to_eager"] < 0.1
    assert ours["median_s"] >= 0.02
    assert ours["floor_s"] == pytest.approx(4e-6)
    assert ours["bound"] == "arithmetic"
    assert ours["times_the_floor"] == pytest.approx(ours["median_s"] / 4e-6)
    assert eager["ratio_to_eager"] == 1


def test_peak_bytes_sees_what_lives_at_once():
    def two_at_once():
        a = torch.ones(1 << 20)
        b = a + 1
        del a
        return b + 1

    peak = suite.peak_bytes(two_at_once, "cpu")
    assert 2 * (4 << 20) <= peak < 2.5 * (4 << 20)


@pytest.mark.parametrize("stem", stems.CASES, ids=lambda c: c.function)
def test_every_function_is_counted(stem):
    # a floor of zero would flatter every kernel
    made = suite.function_case(stem, stems.Size(16, 16, 4), 2, True, "cpu", False, "main")
    assert made.macs > 2 * 16 * 16
    assert made.bytes > 0


def test_the_command_writes_rows_tables_and_figures(tmp_path, capsys):
    words = ["bench", "--quick", "--stem", "low_rank", "--seconds", "0.01", "--compile", "false"]
    out = ["--json", "a.json", "--markdown", "a.md", "--figures", "fig"]
    out = [w if w.startswith("--") else str(tmp_path / w) for w in out]
    assert cli.main([*words, *out]) == 0
    result = json.loads((tmp_path / "a.json").read_text())
    assert {r["variant"] for r in result["cases"]} == {"eager", "ours"}
    assert {(r["pass"], r["batch"]) for r in result["cases"]} == {
        (p, b) for p in ("forward", "forward+backward") for b in (256, 1)
    }
    assert all(r.keys() >= REQUIRED for r in result["cases"])
    assert "| low_rank: low_rank_loss |" in (tmp_path / "a.md").read_text()
    assert {p.name for p in (tmp_path / "fig").iterdir()} == {"stems.png", "roofline.png"}
    # nothing of the user's is replaced unasked, and that is said before anything is measured
    assert cli.main([*words, *out]) == 2
    assert "a.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--stem", "nothing"], "stem must be one of"),
        (["--seconds", "0"], "--seconds must be positive, got 0"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--json", "no/such/folder/a.json"], "does not exist"),
    ],
)
def test_what_cannot_be_served_is_one_sentence(words, told, capsys):
    assert cli.main(["bench", *words]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_no_device_is_said(capsys):
    assert cli.main(["bench", "--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def result_of(*ratios):
    rows = suite.measure(case(ours=lambda: [torch.ones(8)]), Machine(), 0.001)
    base = suite.facts("cpu") | {"product_gmacs": 1.0, "copy_gb": 1.0, "cases": []}
    for batch, ratio in enumerate(ratios):
        for row in rows:
            base["cases"].append(row | {"batch": batch + 1})
        base["cases"][-1]["ratio_to_eager"] = ratio
        base["cases"][-1].pop("ratios")
    return base


def test_a_fallen_ratio_is_a_regression(tmp_path, capsys):
    base, new = result_of(5.0, 5.0, 5.0), result_of(4.1, 3.9, None)
    for name, value in (("base", base), ("new", new)):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    paths = [str(tmp_path / "new.json"), str(tmp_path / "base.json")]
    assert compare.main(paths) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert re.search("batch 2.*3.90 times eager, it was 5.00", lines[0])
    assert "batch 3" in lines[1]
    assert compare.main([*paths, "--share", "0.5"]) == 1
    assert compare.main([paths[1], paths[1]]) == 0


def test_what_fell_in_one_round_alone_is_noise():
    base, new = result_of(5.0), result_of(3.9)
    new["cases"][-1]["ratios"] = [3.5, 3.9, 4.1]
    assert compare.regressions(new, base, 0.2) == []
    new["cases"][-1]["ratios"] = [3.5, 3.9, 3.9]
    assert len(compare.regressions(new, base, 0.2)) == 1


def test_results_of_another_machine_are_not_compared(tmp_path):
    new = result_of(5.0)
    other = copy.deepcopy(new) | {"processor": "another"}
    folder = tmp_path / "machine"
    folder.mkdir()
    (folder / "suite.json").write_text(json.dumps(other))
    assert compare.committed(new, tmp_path) is None
    (folder / "suite.json").write_text(json.dumps(new))
    assert compare.committed(new, tmp_path) == folder / "suite.json"


def test_where_an_alternative_is_faster_is_told():
    result = result_of(0.5)
    eager, ours = result["cases"]
    eager["median_s"], ours["median_s"] = 1e-3, 2e-3
    assert report.losses(result["cases"]) == [(ours, eager)]
    assert "Where an alternative is faster" in report.markdown(result)
    eager["median_s"] = 3e-3
    assert report.losses(result["cases"]) == []
