"""One call that trains: data, network, trainer, checkpoints, resume."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from lomacs_fast.data.contest import open_contest
from lomacs_fast.data.datasets import ContestPairs, GeneratedPairs, Pairs
from lomacs_fast.data.files import atomic_path
from lomacs_fast.data.generator import SCENARIOS
from lomacs_fast.nn import LoMACSSVDNet

from .checkpoints import read_checkpoint
from .config import TrainConfig, parse_size
from .module import AtomicCheckpointIO, ChannelData, MovableCheckpoint, SVDNetModule

BEST, LAST, CONFIG = "best.ckpt", "last.ckpt", "config.yaml"


def open_pairs(config: TrainConfig) -> Pairs:
    """The training pairs that a configuration names: a contest folder, or the built-in generator."""
    if config.data is not None:
        return ContestPairs(open_contest(config.data, scenarios=config.scenarios, round=config.round))
    M, N, r = parse_size(config.size)
    return GeneratedPairs(
        config.scenarios or SCENARIOS,
        M,
        N,
        r,
        count=config.samples,
        seed=config.seed,
        fresh=config.fresh,
        kind="covariance" if M == N else "channel",
    )


def read_config_file(path: str | os.PathLike[str]) -> TrainConfig:
    """A `TrainConfig` from YAML; `ValueError` names the file and an unknown or malformed entry."""
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: expected YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected names and values, got {type(values).__name__}")
    unknown = sorted(set(values) - set(TrainConfig.__dataclass_fields__))
    if unknown:
        raise ValueError(f"{path}: unknown entries {', '.join(unknown)}")
    return TrainConfig(**values)


def _quiet() -> None:
    """Leave out the library's advice on this package's own choices; warnings of substance stay."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*exists and is not empty.*",
        ".*treespec.*is deprecated.*",
        ".*smaller than the logging interval.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def _first_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0 and int(os.environ.get("LOCAL_RANK", "0")) == 0


def _prepare(out: Path, config: TrainConfig, resume: bool, overwrite: bool) -> None:
    """Refuse, clear or keep the run's folder; only one of several processes touches it."""
    if not _first_process():
        return
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out}: expected a folder for the run, got a file")
    if not resume and out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise FileExistsError(f"{out} exists; resume it with --resume or replace it with --overwrite")
        if not (out / CONFIG).is_file():
            raise FileExistsError(f"{out} is no run of lomacs-fast train, it is not replaced")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    with atomic_path(out / CONFIG) as temporary:
        temporary.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False), encoding="utf-8")


def _callbacks(out: Path, config: TrainConfig) -> list[L.Callback]:
    common: dict[str, Any] = {
        "dirpath": out,
        "enable_version_counter": False,
        "auto_insert_metric_name": False,
    }
    callbacks: list[L.Callback] = [
        MovableCheckpoint(filename="last", every_n_train_steps=config.checkpoint_every, **common),
        MovableCheckpoint(filename="last", every_n_epochs=1, save_on_train_epoch_end=True, **common),
        MovableCheckpoint(
            filename="best", monitor="val/ae", mode="min", save_on_train_epoch_end=False, **common
        ),
    ]
    if config.progress:
        # a bar in a log file is one line a refresh
        callbacks.append(TQDMProgressBar(refresh_rate=1 if sys.stderr.isatty() else 50))
    return callbacks


def _loggers(out: Path, config: TrainConfig) -> list[Logger]:
    loggers: list[Logger] = []
    if config.logger in ("csv", "both"):
        loggers.append(CSVLogger(out, name="csv"))
    if config.logger in ("tensorboard", "both"):
        loggers.append(TensorBoardLogger(out, name="tensorboard"))
    return loggers


def _processes(config: TrainConfig) -> dict[str, Any]:
    """Devices and strategy; under an existing launcher its numbers count."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        local, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
        return {"devices": local, "num_nodes": world // local, "strategy": "ddp"}
    return {"devices": config.devices, "strategy": "ddp" if config.devices > 1 else "auto"}


def train(
    config: TrainConfig,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    init: LoMACSSVDNet | None = None,
    init_scenarios: tuple[int, ...] | None = None,
) -> Path:
    """Train a network and return the path of its best checkpoint.

    The folder `out` gains `config.yaml`, `last.ckpt` (every `checkpoint_every` steps and at the end of every
    epoch), `best.ckpt` (smallest AE on the validation samples) and the logs. A run that was killed at any
    moment goes on with `resume=True` from `last.ckpt`, with the configuration given, and ends with the same
    weights as an undisturbed one, at the same number of threads and processes.

    Args:
        config: the settings.
        out: folder of the run.
        resume: go on with the run in `out`.
        overwrite: replace a finished or broken run in `out`.
        init: network to start from instead of a new one (finetuning); it is trained in place.
        init_scenarios: the scenarios it was trained on.

    Raises:
        FileExistsError: if `out` holds something and neither `resume` nor `overwrite` is set.
        FileNotFoundError: if there is nothing to resume.
        FloatingPointError: if loss or weights become non-finite; the last checkpoint is kept.
        ValueError: for data that does not fit the configuration, the checkpoint or the network.
        OSError: if a checkpoint cannot be written; the one before it is whole.
    """
    out = Path(out)
    pairs = open_pairs(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    last = out / LAST
    if resume:
        saved = read_checkpoint(last)["lomacs_fast"]
        if saved["scenarios"] != list(pairs.scenarios):
            raise ValueError(f"{last}: has scenarios {saved['scenarios']}, the data {list(pairs.scenarios)}")
        for name in ("M", "N", "r"):
            if saved["architecture"][name] != getattr(pairs, name):
                raise ValueError(
                    f"{last}: has {name} = {saved['architecture'][name]}, the data {getattr(pairs, name)}"
                )
        net = LoMACSSVDNet(**saved["architecture"])
    elif init is not None:
        if init_scenarios is not None and tuple(init_scenarios) != pairs.scenarios:
            raise ValueError(
                f"the network was trained on scenarios {list(init_scenarios)}, "
                f"the data has {list(pairs.scenarios)}"
            )
        if (init.M, init.N, init.r) != (pairs.M, pairs.N, pairs.r):
            raise ValueError(
                f"the network takes {init.M}x{init.N}x{init.r}, the data is {pairs.M}x{pairs.N}x{pairs.r}"
            )
        net = init.train()
    else:
        torch.manual_seed(config.seed)
        net = LoMACSSVDNet(pairs.M, pairs.N, pairs.r, len(pairs.scenarios), **config.architecture)
    _prepare(out, config, resume, overwrite)
    _quiet()
    trainer = L.Trainer(
        accelerator=config.accelerator,
        **_processes(config),
        precision=config.precision,  # type: ignore[arg-type]
        max_epochs=config.max_epochs,
        gradient_clip_val=config.clip,
        callbacks=_callbacks(out, config),
        logger=_loggers(out, config),
        log_every_n_steps=config.log_every,
        plugins=[AtomicCheckpointIO()],
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        enable_progress_bar=config.progress,
        deterministic="warn",
    )
    module = SVDNetModule(net, config, pairs.scenarios)
    trainer.fit(module, ChannelData(pairs, config), ckpt_path=last if resume else None, weights_only=True)
    return out / BEST


def read_history(run: str | os.PathLike[str]) -> dict[str, list[float]]:
    """One row an epoch from the CSV logs of a run; a resumed run replaces the epochs that it repeats.

    Columns: `epoch`, `train/loss`, the five terms `train/rec` ... `train/match`, `val/ae`, `lam`, `tau_s`;
    NaN where nothing was logged. Empty lists where a run has no CSV log.
    """
    import csv

    names = {"train/loss_epoch": "train/loss", "schedule/lam": "lam", "schedule/tau_s": "tau_s"}
    columns = ["train/loss", *(f"train/{t}" for t in ("rec", "ortho", "energy", "diag", "match"))]
    columns += ["val/ae", "val/rec", "val/ortho_u", "val/ortho_v", "lam", "tau_s"]
    rows: dict[int, dict[str, float]] = {}
    versions = Path(run).glob("csv/version_*/metrics.csv")
    for path in sorted(versions, key=lambda p: int(p.parent.name.removeprefix("version_"))):
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for key, text in row.items():
                    name = names.get(key, key)
                    if text and name in columns:
                        rows.setdefault(int(row["epoch"]), {})[name] = float(text)
    epochs = sorted(rows)
    history = {name: [rows[e].get(name, float("nan")) for e in epochs] for name in columns}
    return {"epoch": [float(e) for e in epochs], **history}
