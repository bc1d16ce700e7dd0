"""The command line: the documented calls, every refusal in one sentence with exit code 2."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml

from lomacs_fast.cli import COMMANDS, EXAMPLES, main
from lomacs_fast.data.output import load_predictions
from lomacs_fast.metrics import eager_twin, true_macs, truncated_svd
from lomacs_fast.training import load_network, read_checkpoint

SIZES = ["--size", "16x16x4"]
NET = ["--dim", "16", "--k-len", "8", "--gate-hidden", "8", "--batch-size", "32", "--progress", "false",
       "--accelerator", "cpu", "--lr", "0.003"]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "contest"
    assert (
        main(["generate", "--scenario", "1", "2", *SIZES, "--train", "60", "--test", "20", "--out", str(out)])
        == 0
    )
    return out


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
    out = tmp_path_factory.mktemp("trained") / "run"
    assert (
        main(["train", "--data", str(data), "--out", str(out), "--max-epochs", "3", "--seed", "0", *NET]) == 0
    )
    return out


@pytest.fixture
def broken(data, tmp_path):
    copy = tmp_path / "broken"
    shutil.copytree(data, copy)
    return copy


def refused(capsys, *words):
    """The one sentence with which a command is refused."""
    capsys.readouterr()
    try:
        code = main([str(w) for w in words])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    err = capsys.readouterr().err.strip()
    assert "Traceback" not in err
    last = re.split(r"[\r\n]", err)[-1]
    assert last.startswith("lomacs-fast: error: ")
    return last.removeprefix("lomacs-fast: error: ")


def test_generated_files_have_the_contest_layout(data):
    assert (data / "Round1CfgData2.txt").read_text().split() == ["60", "16", "16", "2", "4"]
    train = np.load(data / "Round1TrainData2.npy", allow_pickle=False)
    assert train.shape == (60, 16, 16, 2)
    assert train.dtype == np.float32
    test = np.load(data / "Round1TestData2.npy")
    assert test.shape == (20, 16, 16, 2)
    assert not any(np.array_equal(t, x) for t in test for x in train)


@pytest.mark.parametrize(("layout", "shape"), [("complex", (7, 12, 8)), ("real", (7, 12, 8, 2))])
def test_generate_other_layouts(tmp_path, layout, shape):
    words = [
        "generate",
        "--scenario",
        "3",
        "--size",
        "12x8x4",
        "--train",
        "7",
        "--test",
        "0",
        "--layout",
        layout,
    ]
    assert main([*words, "--out", str(tmp_path / "d")]) == 0
    names = sorted(os.listdir(tmp_path / "d"))
    assert names == ["scenario3_train_input.npy", "scenario3_train_label.npy"]
    assert np.load(tmp_path / "d" / names[0]).shape == shape


def test_training_run(trained):
    saved = yaml.safe_load((trained / "config.yaml").read_text())
    assert saved["max_epochs"] == 3
    net, info = load_network(trained / "best.ckpt")
    assert (net.M, net.N, net.r, net.n_scene) == (16, 16, 4, 2)
    assert info.scenarios == (1, 2)


def test_resume_goes_on_with_the_options_of_the_run(trained, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    assert main(["train", "--out", str(out), "--resume", "--max-epochs", "4"]) == 0
    assert read_checkpoint(out / "last.ckpt")["epoch"] == 3
    assert load_network(out / "last.ckpt")[0].dim == 16
    assert yaml.safe_load((out / "config.yaml").read_text())["max_epochs"] == 4


def test_yaml_and_overrides(data, tmp_path):
    (tmp_path / "c.yaml").write_text("max_epochs: 5\ndim: 8\ngroups: 2\nk_len: 4\nprogress: false\n")
    words = ["train", "--config", str(tmp_path / "c.yaml"), "--max-epochs", "1", "--data", str(data)]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (saved["max_epochs"], saved["dim"], saved["groups"]) == (1, 8, 2)


def test_evaluate_writes_the_promised_keys(trained, data, tmp_path, capsys):
    target = tmp_path / "out.json"
    words = ["evaluate", "--checkpoint", str(trained / "best.ckpt"), "--data", str(data), "--svd"]
    assert main([*words, "--json", str(target), "--figures", str(tmp_path / "figures")]) == 0
    result = json.loads(target.read_text())
    macs = {"profiler_macs_m", "true_macs_m", "fast_true_macs_m"}
    keys = {"ae", "rec", "ortho_u", "ortho_v", "score"} | macs
    for entry in (result, *result["scenarios"].values()):
        assert keys <= entry.keys()
        assert entry["ae"] == pytest.approx(entry["rec"] + entry["ortho_u"] + entry["ortho_v"])
        assert entry["score"] == pytest.approx(100 * entry["ae"] + entry["profiler_macs_m"])
    net, _ = load_network(trained / "best.ckpt")
    assert result["true_macs_m"] == true_macs(eager_twin(net)) / 1e6
    assert result["fast_true_macs_m"] == true_macs(net) / 1e6
    assert set(result["scenarios"]) == {"1", "2"}
    assert result["ae"] == pytest.approx(sum(s["ae"] for s in result["scenarios"].values()) / 2)
    assert result["svd"]["ae"] < 0.3
    assert sorted(os.listdir(tmp_path / "figures")) == [
        "channels.png",
        "gate.png",
        "gram.png",
        "spectrum.png",
    ]
    assert "| all " in capsys.readouterr().out
    assert "exists" in refused(capsys, *words, "--json", target)


def test_evaluation_is_that_of_the_formula(trained, data):
    from lomacs_fast.inference import decompose

    net, _ = load_network(trained / "best.ckpt")
    load = lambda name: torch.view_as_complex(torch.from_numpy(np.load(data / name)))  # noqa: E731
    H, label = load("Round1TestData2.npy"), load("Round1TestLabel2.npy")
    U, S, V = decompose(net, H, 1)
    norm, eye = torch.linalg.matrix_norm, torch.eye(4)
    ae = norm(label - U * S[:, None] @ V.mH) / norm(label) + norm(U.mH @ U - eye) + norm(V.mH @ V - eye)
    from lomacs_fast.data.contest import open_contest
    from lomacs_fast.evaluation import evaluate_network
    from lomacs_fast.training import NetworkInfo

    result = evaluate_network(net, NetworkInfo((1, 2)), open_contest(data), batch_size=7)
    assert result["scenarios"]["2"]["ae"] == pytest.approx(ae.mean().item(), rel=1e-5)


class TestPredict:
    @pytest.mark.parametrize("suffix", ["npz", "npy", "pt"])
    def test_from_a_contest_folder(self, trained, data, tmp_path, suffix):
        from lomacs_fast.inference import decompose

        out = tmp_path / f"out.{suffix}"
        words = [
            "predict",
            "--checkpoint",
            str(trained / "best.ckpt"),
            "--input",
            str(data),
            "--scenario",
            "2",
        ]
        assert main([*words, "--out", str(out), "--batch-size", "7"]) == 0
        U, S, V = load_predictions(out)
        H = torch.view_as_complex(torch.from_numpy(np.load(data / "Round1TestData2.npy")))
        expected = decompose(load_network(trained / "best.ckpt")[0], H, 1)
        for x, y in zip((U, S, V), expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
        if suffix == "npz":
            archive = np.load(out, allow_pickle=False)
            assert archive["U"].shape == (20, 16, 4, 2)
            assert archive["C"] > 0

    def test_spectrum_has_the_scale_of_the_input_and_zeros_are_served(self, trained, tmp_path):
        H = torch.randn(3, 16, 16, dtype=torch.complex64)
        H[1] = 0
        spectra = []
        for k, scale in enumerate((1.0, 1e-12, 1e12)):
            np.save(tmp_path / f"H{k}.npy", (scale * H).numpy())
            words = ["predict", "--checkpoint", str(trained / "best.ckpt"), "--scenario", "1"]
            words += ["--input", str(tmp_path / f"H{k}.npy"), "--out", str(tmp_path / f"o{k}.pt")]
            assert main(words) == 0
            U, S, V = load_predictions(tmp_path / f"o{k}.pt")
            assert (S[1] == 0).all()
            assert torch.linalg.matrix_norm(U.mH @ U - torch.eye(4)).max() < 4
            assert V.abs().isfinite().all()
            spectra.append(S / scale)
        torch.testing.assert_close(spectra[1], spectra[0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(spectra[2], spectra[0], rtol=1e-4, atol=1e-6)

    def test_refusals(self, trained, data, tmp_path, capsys):
        predict = ["predict", "--checkpoint", trained / "best.ckpt", "--out", tmp_path / "o.pt", "--input"]
        np.save(tmp_path / "H.npy", np.ones((2, 16, 16), np.complex64))
        assert "scenario (--scenario) must be one of those trained on (1, 2), got None" in refused(
            capsys, *predict, tmp_path / "H.npy"
        )
        assert "got 7" in refused(capsys, *predict, tmp_path / "H.npy", "--scenario", 7)
        np.save(tmp_path / "W.npy", np.ones((2, 8, 16), np.complex64))
        message = refused(capsys, *predict, tmp_path / "W.npy", "--scenario", 1)
        assert "holds 8x16 channels, the checkpoint takes 16x16" in message
        bad = np.ones((5, 16, 16), np.complex64)
        bad[3, 1, 1] = np.nan
        np.save(tmp_path / "N.npy", bad)
        message = refused(capsys, *predict, tmp_path / "N.npy", "--scenario", 1)
        assert "N.npy" in message
        assert "3" in message
        assert not (tmp_path / "o.pt").exists()
        np.save(tmp_path / "P.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
        assert "P.npy" in refused(capsys, *predict, tmp_path / "P.npy", "--scenario", 1)
        whole = (tmp_path / "H.npy").read_bytes()
        (tmp_path / "T.npy").write_bytes(whole[: len(whole) // 2])
        assert "T.npy" in refused(capsys, *predict, tmp_path / "T.npy", "--scenario", 1)
        (tmp_path / "o.pt").write_text("mine")
        assert "exists" in refused(capsys, *predict, tmp_path / "H.npy", "--scenario", 1)
        assert (tmp_path / "o.pt").read_text() == "mine"


class TestPrune:
    def test_by_number_with_finetuning_and_sweep(self, trained, data, tmp_path, capsys):
        out = tmp_path / "pruned"
        words = ["prune", "--checkpoint", str(trained / "best.ckpt"), "--data", str(data), "--out", str(out)]
        words += ["--k-len", "3", "--gate-hidden", "5", "--finetune-epochs", "1", "--progress", "false"]
        assert main([*words, "--sweep-k-len", "2", "8", "--sweep-gate-hidden", "4"]) == 0
        net, info = load_network(out / "pruned.ckpt")
        assert (net.k_len, net.gate_hidden, info.scenarios) == (3, 5, (1, 2))
        tuned, _ = load_network(out / "finetune" / "best.ckpt")
        assert tuned.config | {"tau_s": 0} == net.config | {"tau_s": 0}
        assert not torch.equal(tuned.pos, net.pos)
        report = json.loads((out / "prune.json").read_text())
        assert report["after"]["macs_m"] < report["before"]["macs_m"]
        assert [p["k_len"] for p in report["sweep"]] == [2, 8]
        assert (out / "pareto.png").stat().st_size > 5000
        assert "not empty" in refused(capsys, *words)

    def test_by_energy_and_budget(self, trained, tmp_path):
        words = ["prune", "--checkpoint", str(trained / "best.ckpt"), "--out"]
        assert main([*words, str(tmp_path / "e"), "--energy", "0.8"]) == 0
        assert load_network(tmp_path / "e" / "pruned.ckpt")[0].gate_hidden <= 8
        budget = json.loads((tmp_path / "e" / "prune.json").read_text())["after"]["macs_m"]
        assert main([*words, str(tmp_path / "m"), "--macs", str(budget)]) == 0
        report = json.loads((tmp_path / "m" / "prune.json").read_text())
        assert report["after"]["macs_m"] <= budget

    def test_refusals(self, trained, tmp_path, capsys):
        words = ["prune", "--checkpoint", trained / "best.ckpt", "--out", tmp_path / "x"]
        assert "expected a target" in refused(capsys, *words)
        assert "need --data" in refused(capsys, *words, "--k-len", 3, "--finetune-epochs", 2)
        assert "k_len" in refused(capsys, *words, "--k-len", 99)
        assert "least" in refused(capsys, *words, "--macs", 1e-6)
        assert "finetune-epochs must be at least 0" in refused(
            capsys, *words, "--k-len", 3, "--finetune-epochs", -1
        )
        assert not (tmp_path / "x").exists()

    def test_nothing_stale_stays_beside_a_new_network(self, trained, data, tmp_path, capsys):
        out = tmp_path / "p"
        words = ["prune", "--checkpoint", str(trained / "best.ckpt"), "--data", str(data), "--out", str(out)]
        finetune = ["--finetune-epochs", "1", "--progress", "false"]
        assert main([*words, "--k-len", "4", *finetune]) == 0
        assert "k_len" in refused(
            capsys, *words, "--k-len", "2", "--sweep-k-len", "99", "--overwrite", *finetune
        )
        assert load_network(out / "pruned.ckpt")[0].k_len == 4
        assert main([*words, "--k-len", "2", "--overwrite"]) == 0
        assert load_network(out / "pruned.ckpt")[0].k_len == 2
        assert not (out / "finetune").exists()


class TestAnalyze:
    def test_contest_folder(self, data, trained, tmp_path, capsys):
        words = ["analyze", "--data", str(data), "--out", str(tmp_path / "a"), "--checkpoint"]
        assert main([*words, str(trained / "best.ckpt")]) == 0
        summary = json.loads((tmp_path / "a" / "statistics.json").read_text())
        assert set(summary) == {"scenario 1", "scenario 2", "column_dictionary"}
        shares = summary["column_dictionary"]["blocks.0"]
        assert np.allclose(np.sum(shares, -1), 1)
        for figure in ("statistics.png", "column_dictionary.png"):
            assert (tmp_path / "a" / figure).stat().st_size > 5000
        out = capsys.readouterr().out
        assert "| mean of" in out
        assert "scenario 2" in out

    def test_any_file(self, tmp_path, capsys):
        H = torch.randn(6, 9, 7, dtype=torch.complex64)
        torch.save(H, tmp_path / "H.pt")
        assert main(["analyze", "--data", str(tmp_path / "H.pt")]) == 0
        assert "H.pt" in capsys.readouterr().out
        torch.save(H[:4], tmp_path / "L.pt")
        message = refused(capsys, "analyze", "--data", tmp_path / "H.pt", "--label", tmp_path / "L.pt")
        assert "expected 6 labels of 9x7, got 4 of 9x7" in message


class TestBadInput:
    """Each case of a broken folder, seen by `train`."""

    def train(self, capsys, data, tmp_path, *words):
        message = refused(
            capsys, "train", "--data", data, "--out", tmp_path / "run", "--max-epochs", 1, *NET, *words
        )
        assert not (tmp_path / "run").exists()
        return message

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("60\n16\n16\n2\n", "line 5"),
            ("60\n16\nsixteen\n2\n4\n", "line 3"),
            ("60\n16\n16\n2\n17\n", "from 1 to min(M, N) = 16, got 17"),
            ("60\n16\n16\n3\n4\n", "line 4"),
            ("60\n12\n16\n2\n4\n", "Round1TrainData1.npy"),
            ("61\n16\n16\n2\n4\n", "Round1TrainData1.npy"),
            ("", "line 1"),
        ],
    )
    def test_cfg(self, broken, tmp_path, capsys, text, words):
        (broken / "Round1CfgData1.txt").write_text(text)
        message = self.train(capsys, broken, tmp_path)
        assert words in message
        assert "Round1CfgData1.txt" in message

    def test_arrays(self, broken, tmp_path, capsys):
        file = broken / "Round1TrainLabel2.npy"
        good = np.load(file)
        np.save(file, good.astype(np.float64))
        assert "expected float32 (60, 16, 16, 2), got float64" in self.train(capsys, broken, tmp_path)
        np.save(file, good.astype(np.int32))
        assert "got dtype int32" in self.train(capsys, broken, tmp_path)
        np.save(file, np.array([None]), allow_pickle=True)
        assert "Round1TrainLabel2.npy" in self.train(capsys, broken, tmp_path)
        file.write_bytes(b"\x93NUMPY")
        assert "Round1TrainLabel2.npy" in self.train(capsys, broken, tmp_path)
        file.unlink()
        assert "Round1TrainLabel2.npy" in self.train(capsys, broken, tmp_path)

    def test_nan_names_file_and_index(self, broken, tmp_path, capsys):
        file = broken / "Round1TrainData2.npy"
        bad = np.load(file)
        bad[17, 3, 3, 1] = np.inf
        np.save(file, bad)
        words = ["train", "--data", broken, "--out", tmp_path / "run", "--max-epochs", 1, *NET]
        message = refused(capsys, *words)
        assert "Round1TrainData2.npy" in message
        assert "17" in message

    def test_unknown_scenario_and_missing_folder(self, data, tmp_path, capsys):
        assert "there are: 1, 2" in self.train(capsys, data, tmp_path, "--scenarios", 3)
        assert "no such folder" in self.train(capsys, tmp_path / "absent", tmp_path)
        message = refused(capsys, "generate", "--scenario", 9, "--out", tmp_path / "g")
        assert "scenario" in message
        assert "9" in message
        assert not (tmp_path / "g").exists()

    def test_checkpoint_that_does_not_fit(self, data, trained, tmp_path, capsys):
        assert main(["generate", "--scenario", "1", "--size", "12x12x4", "--train", "4", "--test", "4", "--out",
                     str(tmp_path / "small")]) == 0  # fmt: skip
        words = ["evaluate", "--checkpoint", trained / "best.ckpt", "--data"]
        assert "has M = 12, the checkpoint 16" in refused(capsys, *words, tmp_path / "small")
        assert main(["generate", "--scenario", "3", *SIZES, "--train", "4", "--test", "4", "--out",
                     str(tmp_path / "other")]) == 0  # fmt: skip
        assert "trained on (1, 2), got 3" in refused(capsys, *words, tmp_path / "other")
        message = refused(capsys, "evaluate", "--checkpoint", tmp_path / "no.ckpt", "--data", data)
        assert "no such checkpoint" in message

    def test_existing_output(self, data, trained, capsys):
        before = {p.name: p.stat().st_mtime_ns for p in data.iterdir()}
        words = ["generate", "--scenario", "1", "2", *SIZES, "--train", "5", "--test", "5", "--out", data]
        assert "--overwrite" in refused(capsys, *words)
        assert {p.name: p.stat().st_mtime_ns for p in data.iterdir()} == before
        words = ["train", "--data", data, "--out", trained, "--max-epochs", 1, *NET]
        assert "--resume or replace it with --overwrite" in refused(capsys, *words)

    def test_a_zero_channel_is_served_in_training_and_evaluation(self, broken, tmp_path):
        for name in ("Train", "Test"):
            for kind in ("Data", "Label"):
                file = broken / f"Round1{name}{kind}1.npy"
                x = np.load(file)
                x[[0, 3]] = 0
                np.save(file, x)
        out = tmp_path / "run"
        assert main(["train", "--data", str(broken), "--out", str(out), "--max-epochs", "1", *NET]) == 0
        words = ["evaluate", "--checkpoint", str(out / "last.ckpt"), "--data", str(broken)]
        assert main([*words, "--json", str(tmp_path / "e.json"), "--svd"]) == 0
        assert json.loads((tmp_path / "e.json").read_text())["ae"] < 5


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_a_working_example(command):
    done = subprocess.run(
        [sys.executable, "-m", "lomacs_fast", command, "--help"], capture_output=True, text=True, check=True
    )
    words = " ".join(done.stdout.split())
    assert f"Example: {EXAMPLES[command]}" in words


def test_examples_work_as_written(tmp_path, monkeypatch):
    """In order, in one folder, with the sizes cut down."""
    monkeypatch.chdir(tmp_path)
    smaller = {
        "generate": ["--size", "16x16x4", "--train", "40", "--test", "8"],
        "train": [
            "--max-epochs",
            "1",
            "--dim",
            "16",
            "--k-len",
            "16",
            "--gate-hidden",
            "16",
            "--progress",
            "false",
        ],
    }
    for name in ("generate", "analyze", "train", "prune", "evaluate", "predict", "svd", "info"):
        if name == "predict":
            np.save("H.npy", np.ones((3, 16, 16), np.complex64))
        program, command, *words = EXAMPLES[name].split()
        assert (program, command) == ("lomacs-fast", name)
        assert main([name, *words, *smaller.get(name, [])]) == 0
    assert {"RUN", "DIR", "REPORT", "PRUNED", "out.json", "out.npz", "svd.npz"} <= set(os.listdir())


def test_unknown_words(capsys):
    for words, sentence in [
        ([], "required: command"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        (["train", "--out", "x", "--max-epochz", "3"], "unrecognized arguments: --max-epochz 3"),
        (["train", "--out", "x", "--lr", "fast"], "--lr: invalid float value: 'fast'"),
        (["train", "--out", "x", "--progress", "maybe"], "expected true or false, got 'maybe'"),
        (["train", "--out", ""], "--out: expected a path, got nothing"),
        (["train"], "required: --out"),
    ]:
        assert sentence in refused(capsys, *words)
        assert len(capsys.readouterr().err.splitlines()) <= 1
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("lomacs_fast 0")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("max_epochs: many", "max_epochs must be an integer, got 'many'"),
        ("lr: null", "lr must be a number, got None"),
        ("lr: .nan", "lr must be positive, got nan"),
        ("scenarios: 1", "scenarios must be a list of integers, got 1"),
        ("progress: 1", "progress must be true or false, got 1"),
        ("lrr: 1", "unknown entries: lrr"),
        ("resume: true", "unknown entries: resume"),
        ("- 1", "expected names and values, got list"),
        ("a: [", "expected YAML"),
    ],
)
def test_yaml_that_is_refused(tmp_path, capsys, text, sentence):
    (tmp_path / "c.yaml").write_text(text)
    message = refused(capsys, "train", "--config", tmp_path / "c.yaml", "--out", tmp_path / "x")
    assert sentence in message
    assert "c.yaml" in message


def test_yaml_that_is_served(tmp_path, data):
    for k, text in enumerate(("", "lr: 1e-3\nscenarios: [1, 2]\n")):
        (tmp_path / "c.yaml").write_text(text)
        words = [
            "train",
            "--config",
            str(tmp_path / "c.yaml"),
            "--data",
            str(data),
            "--max-epochs",
            "1",
            *NET[:-2],
        ]
        assert main([*words, "--out", str(tmp_path / f"run{k}")]) == 0
    assert yaml.safe_load((tmp_path / "run1" / "config.yaml").read_text())["lr"] == 1e-3


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--threads", 0], "threads must be at least 1, got 0"),
        (["--accelerator", "gpu"], "accelerator"),
        (["--seed", "99999999999999999999"], "seed must lie between"),
        (["--finetune", "true"], "needs a trained network to start from (--init)"),
        (["--k-len", "1000000000000"], "not enough memory"),
        (["--batch-size", -1], "batch_size must be at least 1, got -1"),
        (["--lr", "inf"], "lr must be positive, got inf"),
    ],
)
def test_options_that_are_refused(tmp_path, data, capsys, words, sentence):
    if words == ["--accelerator", "gpu"] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = ["train", "--data", data, "--out", tmp_path / "run", *NET, *words]
    assert sentence in refused(capsys, *command)
    assert not (tmp_path / "run").exists()


def test_init_finetunes_a_checkpoint(trained, data, tmp_path, capsys):
    words = [
        "train",
        "--data",
        str(data),
        "--init",
        str(trained / "best.ckpt"),
        "--finetune",
        "--max-epochs",
        "1",
    ]
    words += ["--batch-size", "32", "--progress", "false", "--lr", "1e-3", "--out", str(tmp_path / "run")]
    assert main(words) == 0
    net, _ = load_network(tmp_path / "run" / "last.ckpt")
    assert (net.dim, net.config["tau_s"]) == (16, 0.6)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["dim"] == 16
    assert main(["train", "--out", str(tmp_path / "run"), "--resume", "--max-epochs", "2"]) == 0
    assert "expected one of them" in refused(capsys, *words, "--resume")


class TestOverwrite:
    """Replacing a run: only what a run wrote, and only once the new one has a checkpoint."""

    def words(self, data, out):
        return ["train", "--data", data, "--out", out, "--max-epochs", 1, "--overwrite", *NET]

    def test_files_of_the_user_stay(self, data, trained, tmp_path, capsys):
        project = tmp_path / "project"
        project.mkdir()
        (project / "config.yaml").write_text("max_epochs: 1\n")
        assert "no run of lomacs-fast train" in refused(capsys, *self.words(data, project))
        run = tmp_path / "run"
        shutil.copytree(trained, run)
        (run / "thesis.txt").write_text("years of work")
        assert "holds thesis.txt, which no run wrote" in refused(capsys, *self.words(data, run))
        assert (run / "thesis.txt").read_text() == "years of work"
        assert (run / "best.ckpt").is_file()

    def test_a_run_that_fails_leaves_the_one_before(self, trained, broken, tmp_path, capsys):
        run = tmp_path / "run"
        shutil.copytree(trained, run)
        before = {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()}
        file = broken / "Round1TrainData1.npy"
        x = np.load(file)
        x[:] = np.nan
        np.save(file, x)
        assert "Round1TrainData1.npy" in refused(capsys, *self.words(broken, run))
        assert {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()} == before
        assert os.listdir(tmp_path) in (["run", "broken"], ["broken", "run"])

    def test_a_run_that_works_replaces_it(self, trained, data, tmp_path):
        run = tmp_path / "run"
        shutil.copytree(trained, run)
        assert main([str(w) for w in self.words(data, run)]) == 0
        assert read_checkpoint(run / "last.ckpt")["epoch"] == 0
        assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_run_says_so(data, tmp_path, number, code):
    command = [
        sys.executable,
        "-m",
        "lomacs_fast",
        "train",
        "--data",
        str(data),
        "--out",
        str(tmp_path / "run"),
    ]
    process = subprocess.Popen(
        [*command, "--max-epochs", "100000", *NET],
        stderr=subprocess.PIPE,
        text=True,
        # tests in the background of a shell ignore SIGINT, and what they start inherits it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        while not (tmp_path / "run" / "last.ckpt").is_file():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == code, err
    finally:
        process.kill()
    assert "Traceback" not in err


def test_resume_keeps_what_decides_the_order(trained, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    for words, sentence in [
        (["--batch-size", 8], "batch_size (the run has 32, got 8)"),
        (["--val-fraction", 0.5], "val_fraction (the run has 0.1, got 0.5)"),
        (["--dim", 32], "dim (the run has 16, got 32)"),
        (["--seed", 3], "seed (the run has 0, got 3)"),
    ]:
        assert sentence in refused(capsys, "train", "--out", run, "--resume", *words)


def test_nan_with_workers_is_one_sentence(broken, tmp_path, capsys):
    file = broken / "Round1TrainData2.npy"
    x = np.load(file)
    x[5] = np.nan
    np.save(file, x)
    words = [
        "train",
        "--data",
        broken,
        "--out",
        tmp_path / "run",
        "--max-epochs",
        1,
        *NET,
        "--num-workers",
        2,
    ]
    message = refused(capsys, *words)
    assert "Round1TrainData2.npy" in message
    assert "Caught" not in message


def test_several_processes_by_the_launcher(data, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += [
        "lomacs_fast",
        "train",
        "--data",
        str(data),
        "--out",
        str(tmp_path / "run"),
        "--max-epochs",
        "1",
    ]
    done = subprocess.run([*command, *NET], capture_output=True, text=True, timeout=300, check=False,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert load_network(tmp_path / "run" / "best.ckpt")[1].scenarios == (1, 2)


def test_svd_baseline_is_the_truncated_svd(data):
    H = torch.view_as_complex(torch.from_numpy(np.load(data / "Round1TestData1.npy")))
    U, S, V = truncated_svd(H, 16)
    torch.testing.assert_close(U * S[:, None] @ V.mH, H, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("missing", "words", "extra"),
    [
        ("lightning", ["train", "--out", "x"], "lomacs_fast[train,cli]"),
        ("matplotlib", ["analyze", "--data", "H.npy", "--out", "figures"], "lomacs_fast[plots]"),
        ("h5py", ["analyze", "--data", "H.h5"], "lomacs_fast[data]"),
    ],
)
def test_a_missing_extra_is_one_sentence(tmp_path, missing, words, extra):
    np.save(tmp_path / "H.npy", np.ones((3, 8, 8), np.complex64))
    (tmp_path / "H.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    code = f"import sys; sys.modules[{missing!r}] = None; from lomacs_fast.cli import main; sys.exit(main({words!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 2
    assert f"pip install '{extra}'" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_refined_preset_trains_and_turns_its_knob(data, trained, tmp_path, capsys):
    out = tmp_path / "refined"
    small = [
        "--active",
        "3",
        "--refine-steps",
        "2",
        "--samples",
        "8",
        "--max-epochs",
        "1",
        "--progress",
        "false",
    ]
    words = ["train", "--preset", "refined", "--data", str(data), "--out", str(out), "--accelerator", "cpu"]
    assert main([*words, *small]) == 0
    saved = yaml.safe_load((out / "config.yaml").read_text())
    assert [saved[k] for k in ("head", "refine_steps", "array", "lam_max")] == ["angular", 2, "2x2x4", 0.0]
    net, _ = load_network(out / "best.ckpt")
    assert (net.trained_steps, net.refiner.active, net.hermitian) == (2, 3, True)
    assert main([*words, *small, "--resume"]) == 0

    capsys.readouterr()
    figures, file = tmp_path / "figures", tmp_path / "knob.json"
    words = [
        "evaluate",
        "--checkpoint",
        str(out / "best.ckpt"),
        "--data",
        str(data),
        "--refine-steps",
        "0",
        "3",
    ]
    words += ["--published", str(trained / "best.ckpt"), "--json", str(file), "--figures", str(figures)]
    assert main(words) == 0
    knob = {point["name"]: point for point in json.loads(file.read_text())["knob"]}
    assert {"0 steps", "3 steps", "svd", "svd, floor subtracted", "eigh", "published"} <= knob.keys()
    assert knob["3 steps"]["ae"] < knob["0 steps"]["ae"]
    assert knob["3 steps"]["profiler_macs_m"] > knob["0 steps"]["profiler_macs_m"]
    assert all(point["microseconds"] > 0 for point in knob.values())
    assert (figures / "knob.png").is_file()
    assert not (figures / "gate.png").exists()
    prediction = tmp_path / "p.npz"
    assert main(["predict", "--checkpoint", str(out / "best.ckpt"), "--input", str(data), "--scenario", "1",
                 "--out", str(prediction), "--progress", "false"]) == 0  # fmt: skip
    assert prediction.is_file()

    message = refused(capsys, "evaluate", "--checkpoint", trained / "best.ckpt", "--data", data,
                      "--refine-steps", "1")  # fmt: skip
    assert "--refine-steps needs a network with refinement" in message
    message = refused(capsys, "evaluate", "--checkpoint", out / "best.ckpt", "--data", data,
                      "--refine-steps", "-1")  # fmt: skip
    assert "at least 0, got -1" in message


def test_the_refined_preset_refuses_plain_channels(capsys, tmp_path):
    message = refused(capsys, "train", "--preset", "refined", "--size", "16x12x4", "--out", tmp_path / "x")
    assert "hermitian" in message
