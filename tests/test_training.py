"""Training: schedules, order, exact resume, several processes, broken runs."""

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lomacs_fast import LoMACSSVDNet
from lomacs_fast.data.datasets import GeneratedPairs, TrainingPairs, epoch_order, split
from lomacs_fast.training import (
    PRESETS,
    Schedule,
    TrainConfig,
    cosine,
    load_network,
    read_checkpoint,
    read_history,
    train,
)
from lomacs_fast.training import run as run_module
from lomacs_fast.training.module import EpochBatches

SMALL = {
    "size": "12x12x4",
    "samples": 40,
    "max_epochs": 3,
    "batch_size": 16,
    "dim": 16,
    "k_len": 4,
    "gate_hidden": 4,
    "checkpoint_every": 2,
    "val_fraction": 0.2,
    "lr": 3e-3,
    "accelerator": "cpu",
    "progress": False,
    "threads": 1,
}  # 128 training samples: 8 steps an epoch

SCRIPT = """
import sys, time, yaml, warnings
warnings.filterwarnings("ignore")
from lomacs_fast.training import TrainConfig, train
from lomacs_fast.training.module import SVDNetModule
out, resume, pause = sys.argv[1], sys.argv[2] == "resume", float(sys.argv[3])
step = SVDNetModule.training_step
def slow(self, batch, batch_idx):
    time.sleep(pause)
    return step(self, batch, batch_idx)
SVDNetModule.training_step = slow
train(TrainConfig(**yaml.safe_load(sys.argv[4])), out, resume=resume)
"""


def config(**kwargs):
    return TrainConfig(**(SMALL | kwargs))


def start(out, mode, pause=0.0, **kwargs):
    command = [sys.executable, "-c", SCRIPT, str(out), mode, str(pause), str(SMALL | kwargs)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def launched(out, folder, **kwargs):
    """The same in two processes of the existing launcher."""
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(folder / "script.py"), str(out), "new", "0", str(SMALL | kwargs)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finished(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def same(x, y):
    """Bitwise equality of nested checkpoints."""
    if isinstance(x, torch.Tensor):
        return torch.equal(x, y)
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(same(x[k], y[k]) for k in x)
    if isinstance(x, list | tuple):
        return len(x) == len(y) and all(map(same, x, y))
    return x == y


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    train(config(), out)
    return out


def weights(path):
    checkpoint = read_checkpoint(path)
    return {k: checkpoint[k] for k in ("state_dict", "optimizer_states", "lr_schedulers", "global_step")}


def wait_for_step(path, step, process):
    for _ in range(3000):
        if path.is_file() and read_checkpoint(path)["global_step"] >= step:
            return read_checkpoint(path)["global_step"]
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    raise AssertionError("no checkpoint")


VALIDATION = """
validate = SVDNetModule.validation_step
def slow_validation(self, batch, batch_idx):
    print("validating", self.global_step, flush=True)
    time.sleep(5)
    return validate(self, batch, batch_idx)
SVDNetModule.validation_step = slow_validation
"""


def test_killed_in_validation_twice(tmp_path, undisturbed):
    """At steps 8 and 16, which end an epoch and are steps to save at."""
    out = tmp_path / "run"
    code = SCRIPT.replace("train(TrainConfig", VALIDATION + "train(TrainConfig")
    for mode, step in (("new", 8), ("resume", 16)):
        command = [sys.executable, "-c", code, str(out), mode, "0", str(SMALL)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for line in process.stdout:
            if line.split()[:1] == ["validating"]:
                reached = int(line.split()[1])
                if reached == step:
                    break
        process.send_signal(signal.SIGKILL)
        process.wait()
        if step == 8:
            continue
    finished(start(out, "resume"))
    assert same(weights(out / "last.ckpt"), weights(undisturbed / "last.ckpt"))
    assert same(weights(out / "best.ckpt"), weights(undisturbed / "best.ckpt"))
    assert read_history(out)["val/ae"] == read_history(undisturbed)["val/ae"]


@pytest.mark.parametrize("step", [2, 12, 16])
def test_killed_run_resumes_to_the_same_weights(tmp_path, undisturbed, step):
    out = tmp_path / "run"
    process = start(out, "new", 0.15)
    reached = wait_for_step(out / "last.ckpt", step, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert reached < 24
    finished(start(out, "resume"))
    assert same(weights(out / "last.ckpt"), weights(undisturbed / "last.ckpt"))
    assert same(weights(out / "best.ckpt"), weights(undisturbed / "best.ckpt"))
    history, whole = read_history(out), read_history(undisturbed)
    assert history["epoch"] == whole["epoch"] == [0, 1, 2]
    assert history["val/ae"][1:] == whole["val/ae"][1:]


@pytest.mark.parametrize("stop_after", range(1, 10))
def test_every_step_is_a_place_to_resume_from(tmp_path, undisturbed, stop_after, monkeypatch):
    """Stopped in process after any step of the first epoch and the first of the second."""
    out = tmp_path / "run"
    step = run_module.SVDNetModule.training_step
    seen = 0

    def interrupted(self, batch, batch_idx):
        nonlocal seen
        if seen == stop_after:
            raise KeyError("stopped")
        seen += 1
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(run_module.SVDNetModule, "training_step", interrupted)
        with pytest.raises(KeyError, match="stopped"):
            train(config(checkpoint_every=1), out)
    assert read_checkpoint(out / "last.ckpt")["global_step"] == stop_after
    train(config(checkpoint_every=1), out, resume=True)
    assert same(weights(out / "last.ckpt"), weights(undisturbed / "last.ckpt"))


def test_checkpoint_carries_its_architecture(undisturbed):
    net, info = load_network(undisturbed / "best.ckpt")
    assert (
        net.config
        == LoMACSSVDNet(12, 12, 4, 4, dim=16, k_len=4, gate_hidden=4, tau_s=net.config["tau_s"]).config
    )
    assert not net.training
    assert info.scenarios == (1, 2, 3, 4)
    assert info.sid(3) == 2
    with pytest.raises(ValueError, match=r"trained on \(1, 2, 3, 4\), got 9"):
        info.sid(9)
    last = load_network(undisturbed / "last.ckpt")[0]
    assert last.config["tau_s"] == pytest.approx(Schedule().at(2 / 3)["tau_s"])


def test_loss_falls_and_history_has_the_terms(undisturbed):
    history = read_history(undisturbed)
    assert history["val/ae"][-1] < history["val/ae"][0]
    for name in ("train/loss", "train/rec", "train/ortho", "train/energy", "train/diag", "train/match"):
        assert all(math.isfinite(x) for x in history[name]), name
    p = [Schedule().at(k / 3) for k in range(3)]
    assert history["lam"] == pytest.approx([x["lam"] for x in p])
    assert history["tau_s"] == pytest.approx([x["tau_s"] for x in p])


def test_two_processes_equal_one_with_the_whole_batch(tmp_path, undisturbed):
    """The existing launcher starts two processes; each takes half of every batch."""
    out = tmp_path / "run"
    finished(launched(out, tmp_path))
    state, whole = (weights(x / "last.ckpt")["state_dict"] for x in (out, undisturbed))
    for name, value in whole.items():
        torch.testing.assert_close(state[name], value, rtol=2e-3, atol=2e-4, msg=name)
    assert read_history(out)["val/ae"] == pytest.approx(read_history(undisturbed)["val/ae"], rel=1e-3)


def test_nonfinite_loss_stops_the_run_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    out = tmp_path / "run"
    step = run_module.SVDNetModule.training_step

    def broken(self, batch, batch_idx):
        if self.global_step == 11:
            with torch.no_grad():
                self.net.pos.fill_(float("nan"))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(run_module.SVDNetModule, "training_step", broken)
    with pytest.raises(FloatingPointError, match=r"loss became nan at step 11 \(epoch 1, batch 3\)"):
        train(config(), out)
    assert read_checkpoint(out / "last.ckpt")["global_step"] == 10
    assert all(p.isfinite().all() for p in load_network(out / "last.ckpt")[0].parameters())


def test_nonfinite_weights_are_never_saved(tmp_path, monkeypatch):
    step = run_module.SVDNetModule.optimizer_step

    def poisoned(self, *args, **kwargs):
        step(self, *args, **kwargs)
        if self.global_step == 11:
            with torch.no_grad():
                self.net.pos.fill_(float("inf"))

    monkeypatch.setattr(run_module.SVDNetModule, "optimizer_step", poisoned)
    with pytest.raises(FloatingPointError, match="a weight became non-finite before step 12"):
        train(config(), tmp_path / "run")
    assert read_checkpoint(tmp_path / "run" / "last.ckpt")["global_step"] == 10


def test_full_disk_keeps_the_previous_checkpoint(tmp_path):
    """A limit on the size of files stands for the full disk: the write fails in its middle."""
    out = tmp_path / "run"
    code = SCRIPT.replace(
        "train(TrainConfig",
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "slow_step = SVDNetModule.training_step\n"
        "def full(self, batch, batch_idx):\n"
        "    if self.global_step == 11:\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))\n"
        "    return slow_step(self, batch, batch_idx)\n"
        "SVDNetModule.training_step = full\n"
        "train(TrainConfig",
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(out), "new", "0", str(SMALL)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode != 0
    assert "checkpoint not written" in done.stderr
    assert "last.ckpt" in done.stderr
    assert read_checkpoint(out / "last.ckpt")["global_step"] == 10
    assert not [name for name in os.listdir(out) if name.startswith(".")]


def test_an_existing_run_is_not_overwritten_unasked(tmp_path, undisturbed):
    before = weights(undisturbed / "last.ckpt")
    with pytest.raises(FileExistsError, match="--resume or replace it with --overwrite"):
        train(config(), undisturbed)
    assert same(weights(undisturbed / "last.ckpt"), before)
    other = tmp_path / "notes"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="is no run of lomacs-fast train"):
        train(config(), other, overwrite=True)
    assert (other / "thesis.txt").read_text() == "years of work"
    with pytest.raises(FileNotFoundError, match=r"last.ckpt: no such checkpoint"):
        train(config(), tmp_path / "nothing", resume=True)


def test_a_copied_run_keeps_its_best_and_leaves_the_original_alone(tmp_path, undisturbed):
    """After the copy every epoch is worse: the best one stays, in both folders."""
    before = {p.name: p.read_bytes() for p in undisturbed.glob("*.ckpt")}
    out = tmp_path / "copy"
    shutil.copytree(undisturbed, out)
    train(config(max_epochs=4, lr=0.3), out, resume=True)
    assert read_history(out)["val/ae"][-1] > min(read_history(out)["val/ae"][:-1])
    assert read_checkpoint(out / "last.ckpt")["global_step"] == 32
    assert (out / "best.ckpt").read_bytes() == before["best.ckpt"]
    assert {p.name: p.read_bytes() for p in undisturbed.glob("*.ckpt")} == before


def test_resume_refuses_other_data(undisturbed):
    with pytest.raises(ValueError, match="has M = 12, the data 16"):
        train(config(size="16x16x4"), undisturbed, resume=True)
    with pytest.raises(ValueError, match="scenarios"):
        train(config(scenarios=[1, 2]), undisturbed, resume=True)


def test_finetuning_holds_the_end_of_the_schedule(tmp_path, undisturbed):
    net, info = load_network(undisturbed / "best.ckpt")
    out = train(config(max_epochs=1, finetune=True, lr=1e-3), tmp_path / "fine", init=net,
                init_scenarios=info.scenarios)  # fmt: skip
    tuned = load_network(out)[0]
    assert tuned.config["tau_s"] == 0.6
    history = read_history(tmp_path / "fine")
    assert history["lam"] == pytest.approx([0.35])
    assert history["val/ae"][0] < read_history(undisturbed)["val/ae"][-1]


def test_the_refined_preset_refines_a_share_of_the_columns(tmp_path):
    for r, active in ((8, 8), (12, 11)):
        values = {
            "size": f"16x16x{r}",
            "samples": 8,
            "max_epochs": 1,
            "progress": False,
            "accelerator": "cpu",
        }
        chosen = TrainConfig(**(PRESETS["refined"] | values))
        net, info = load_network(train(chosen, tmp_path / str(r)))
        assert (net.refiner.active, net.trained_steps) == (active, 3)
        assert info.history["training"]["active"] == active
        train(chosen, tmp_path / str(r), resume=True)
    general = TrainConfig(**values, head="angular", refine_steps=1)
    assert load_network(train(general, tmp_path / "general"))[0].refiner.active == 12


def test_bfloat16_and_tensorboard(tmp_path):
    out = tmp_path / "run"
    train(config(precision="bf16-mixed", logger="both", max_epochs=1), out)
    assert math.isfinite(read_history(out)["val/ae"][0])
    assert list((out / "tensorboard" / "version_0").glob("events.*"))


class TestSchedule:
    def test_published_values(self):
        s = Schedule()
        for p, lam, tau, share in [
            (0.0, 0.0, 0.9, 1.0),
            (0.275, 0.175, 0.8175, 1.0),
            (0.4, 0.35 * 0.4 / 0.55, 0.78, 1.0),
            (0.65, 0.35, 0.705, 0.6),
            (0.9, 0.35, 0.63, 0.2),
            (0.95, 0.35, 0.615, 0.05),
            (1.0, 0.35, 0.6, 0.05),
        ]:
            values = s.at(p)
            assert values["lam"] == pytest.approx(lam)
            assert values["tau_s"] == pytest.approx(tau)
            assert values["w_energy"] == pytest.approx(0.4 * share)
            assert values["w_diag"] == pytest.approx(0.3 * share)
            assert values["w_match"] == pytest.approx(0.3 * share)

    def test_direction_of_tau_is_configurable(self):
        assert Schedule(tau_start=0.6, tau_end=0.9).at(1.0)["tau_s"] == pytest.approx(0.9)

    def test_refused(self):
        with pytest.raises(ValueError, match="tau_end must lie in"):
            Schedule(tau_end=1.2)
        with pytest.raises(ValueError, match="hold must be at most decay_end"):
            Schedule(hold=0.95)

    def test_cosine(self):
        assert cosine(4e-4, 1e-6, 0) == pytest.approx(4e-4)
        assert cosine(4e-4, 1e-6, 1) == pytest.approx(1e-6)
        assert cosine(4e-4, 1e-6, 0.5) == pytest.approx((4e-4 + 1e-6) / 2)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"max_epochs": 0}, "max_epochs must be at least 1"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"val_fraction": 1.0}, "val_fraction must lie in"),
        ({"match": "median"}, "match must be one of norm, mean, got 'median'"),
        ({"size": "64x64"}, "size must be MxNxr"),
        ({"size": "8x8x9"}, "size must have"),
        ({"noise": -1.0}, "noise must be at least 0"),
        ({"lam_max": -1.0}, "lam_max must be at least 0"),
    ],
)
def test_refused_settings(kwargs, words):
    with pytest.raises(ValueError, match=words):
        config(**kwargs)


class TestOrder:
    def pairs(self, count=10):
        return GeneratedPairs((1, 2), 8, 8, 3, count=count, seed=5)

    def test_split_covers_everything_once_and_every_scenario(self):
        pairs = self.pairs()
        training, validation = split(pairs, 0.2, seed=3)
        assert sorted(training + validation) == list(range(20))
        assert [int((pairs.sid[validation] == s).sum()) for s in (0, 1)] == [2, 2]
        assert split(pairs, 0.2, seed=3) == (training, validation)
        assert split(pairs, 0.2, seed=4) != (training, validation)

    def test_batches_of_two_processes_make_up_those_of_one(self):
        indices = list(range(100, 121))
        make = lambda rank, world, done=0: list(  # noqa: E731
            EpochBatches(indices, batch_size=8, seed=1, steps_done=lambda: done, rank=rank, world=world)
        )
        whole = make(0, 1)
        assert [len(b) for b in whole] == [8, 8, 5]
        assert sorted(i for b in whole for _, i in b) == indices
        for batch, first, second in zip(whole, make(0, 2), make(1, 2), strict=True):
            assert len(first) == len(second)
            assert set(first) | set(second) <= set(batch)
            assert len(set(first) | set(second)) == len(batch) // 2 * 2
        assert make(0, 1, done=5) == [[(1, i) for i in epoch_order(indices, seed=1, epoch=1)[16:]]]

    def test_any_batch_can_be_made_again(self):
        config_ = config()
        data = TrainingPairs(self.pairs(), seed=1, augmentation=config_.augmentation)
        batch = data.__getitems__([(2, 7), (2, 4), (2, 11)])
        alone = data[(2, 4)]
        assert torch.equal(batch.input[1], alone.input[0])
        assert torch.equal(batch.label[1], alone.label[0])
        other = data[(3, 4)]
        assert not torch.equal(other.input, alone.input)

    def test_zero_channels_are_left_out(self):
        pairs = self.pairs()
        read = pairs.read

        def with_zero(indices, epoch):
            input, label = read(indices, epoch)
            input[1] = 0
            return input, label

        pairs.read = with_zero
        batch = TrainingPairs(pairs, skip_zeros=True).__getitems__([(0, 1), (0, 2), (0, 5)])
        assert batch.sid.tolist() == [1, 1]
        assert torch.linalg.matrix_norm(batch.input).tolist() == pytest.approx([1, 1])
        whole = TrainingPairs(pairs).__getitems__([(0, 1), (0, 2), (0, 5)])
        assert (whole.input[1] == 0).all()
        assert torch.view_as_real(whole.label).isfinite().all()


def test_a_batch_of_zeros_is_a_step_without_a_gradient(tmp_path, monkeypatch):
    """Batches of one sample, some of them zero channels; nothing but zeros is refused."""
    read = GeneratedPairs.read

    def some(self, indices, epoch=0):
        input, label = read(self, indices, epoch)
        input[torch.as_tensor(indices) % 3 == 0] = 0
        return input, label

    settings = {"samples": 2, "batch_size": 1, "max_epochs": 2, "val_fraction": 0.5}
    monkeypatch.setattr(GeneratedPairs, "read", some)
    train(config(**settings), tmp_path / "some")
    assert all(p.isfinite().all() for p in load_network(tmp_path / "some" / "last.ckpt")[0].parameters())
    assert read_checkpoint(tmp_path / "some" / "last.ckpt")["global_step"] == 8

    monkeypatch.setattr(
        GeneratedPairs, "read", lambda self, indices, epoch=0: tuple(0 * x for x in read(self, indices))
    )
    with pytest.raises(ValueError, match="all training samples of epoch 0 are zero channels"):
        train(config(**settings), tmp_path / "all")


def test_validation_of_uneven_processes_is_that_of_one(tmp_path):
    """33 validation samples on two processes."""
    settings = {"size": "8x8x4", "scenarios": [1], "samples": 99, "val_fraction": 1 / 3, "max_epochs": 1}
    history = []
    for devices in (1, 2):
        out = tmp_path / f"run{devices}"
        finished(
            start(out, "new", devices=devices, **settings)
            if devices == 1
            else launched(out, tmp_path, **settings)
        )
        history.append(read_history(out))
    assert history[1]["val/ae"] == pytest.approx(history[0]["val/ae"], rel=2e-3)


class TestCheckpointFiles:
    def test_truncated_and_foreign_files(self, tmp_path, undisturbed):
        data = (undisturbed / "best.ckpt").read_bytes()
        for name, content, words in [
            ("cut.ckpt", data[: len(data) // 2], "cannot be read"),
            ("empty.ckpt", b"", "cannot be read"),
            ("text.ckpt", b"hello", "cannot be read"),
        ]:
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ValueError, match=words):
                load_network(tmp_path / name)
        torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
        with pytest.raises(ValueError, match="a checkpoint of lomacs_fast, got another file"):
            load_network(tmp_path / "other.pt")
        with pytest.raises(FileNotFoundError, match="no such checkpoint"):
            load_network(tmp_path / "absent.ckpt")

    def test_code_in_a_file_does_not_run(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return Path.touch, (tmp_path / "ran",)

        torch.save({"state_dict": Evil(), "lomacs_fast": {}}, tmp_path / "evil.ckpt")
        with pytest.raises(ValueError, match="cannot be read"):
            load_network(tmp_path / "evil.ckpt")
        assert not (tmp_path / "ran").exists()
