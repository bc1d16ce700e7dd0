"""The demonstration, cut down: the report is whole and its numbers are those of the files beside it."""

import json
import os
import re

import pytest

from lomacs_fast.demo import demo


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    facts = demo(out, size="16x16x4", train=40, test=8, epochs=2, finetune_epochs=1, k_len=8, gate_hidden=8)
    return out, facts


def test_report_has_figures_and_numbers(run):
    out, facts = run
    report = (out / "report.md").read_text()
    assert json.loads((out / "report.json").read_text()) == facts
    figures = re.findall(r"!\[.*\]\((.*)\)", report)
    assert len(figures) == 8
    assert all((out / name).stat().st_size > 5000 for name in figures)
    assert f"{facts['results']['network']['ae']:.4g}" in report
    for words in facts["commands"]:
        assert words in report


def test_results(run):
    out, facts = run
    results = facts["results"]
    assert set(results) == {"network", "pruned", "pruned, finetuned", "torch.linalg.svd"}
    evaluated = json.loads((out / "network.json").read_text())
    assert results["network"]["ae"] == pytest.approx(evaluated["ae"])
    for result in results.values():
        assert set(result["scenarios"]) == {"1", "2", "3", "4"}
        mean = sum(s["ae"] for s in result["scenarios"].values()) / 4
        assert result["ae"] == pytest.approx(mean)
    assert results["pruned"]["profiler_macs_m"] < results["network"]["profiler_macs_m"]
    assert results["torch.linalg.svd"]["ae"] < results["network"]["ae"]
    for name in ("network", "pruned, finetuned", "torch.linalg.svd"):
        assert facts["milliseconds_a_channel"][name]["batch_256"]["median"] > 0
    assert len(facts["sweep"]) == 4 * 3


def test_runs_again_over_its_own_output(run):
    out, _ = run
    before = set(os.listdir(out))
    demo(out, size="16x16x4", train=20, test=4, epochs=1, finetune_epochs=1, k_len=8, gate_hidden=8)
    assert set(os.listdir(out)) == before
