"""One call that trains: data, network, trainer, checkpoints, resume."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lomacs_fast.data.contest import open_contest
from lomacs_fast.data.datasets import ContestPairs, GeneratedPairs, Pairs
from lomacs_fast.data.files import atomic_path, temporary_beside
from lomacs_fast.data.generator import SCENARIOS, panel_shape
from lomacs_fast.nn import LoMACSSVDNet

from .checkpoints import read_checkpoint
from .config import TrainConfig, parse_size
from .module import AtomicCheckpointIO, ChannelData, RunCheckpoint, SVDNetModule

BEST, LAST, CONFIG = "best.ckpt", "last.ckpt", "config.yaml"
HEADER = "# The settings of a run of lomacs-fast train"
OWN = (BEST, LAST, CONFIG, "csv", "tensorboard")


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


def read_config_values(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Names and values of a YAML file of settings; `ValueError` names the file and what is wrong with it."""
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected YAML ({' '.join(str(error).split())})") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected names and values, got {type(values).__name__}")
    unknown = sorted(str(name) for name in set(values) - set(TrainConfig.__dataclass_fields__))
    if unknown:
        raise ValueError(f"{path}: unknown entries: {', '.join(unknown)}")
    try:
        TrainConfig(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    return values


def read_config_file(path: str | os.PathLike[str]) -> TrainConfig:
    """The settings of a YAML file; raises as `read_config_values`."""
    return TrainConfig(**read_config_values(path))


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


def _own_entries(out: Path) -> list[Path]:
    """What a run wrote into its folder; `FileExistsError` if there is anything else, or no run."""
    header = ""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        header = (out / CONFIG).read_text(encoding="utf-8").partition("\n")[0]
    if header != HEADER:
        raise FileExistsError(f"{out} is no run of lomacs-fast train, it is not replaced")
    entries = sorted(out.iterdir())
    foreign = [p.name for p in entries if p.name not in OWN and not p.name.startswith((".last.", ".best."))]
    if foreign:
        raise FileExistsError(f"{out} holds {', '.join(foreign)}, which no run wrote; it is not replaced")
    return entries


def remove_run(out: str | os.PathLike[str]) -> None:
    """Remove the folder of a run; `FileExistsError` if anything in it is not of the run."""
    out = Path(out)
    _own_entries(out)
    shutil.rmtree(out)


@contextlib.contextmanager
def _run_folder(out: Path, config: TrainConfig, resume: bool, overwrite: bool) -> Iterator[None]:
    """The folder of a run while it trains; only the first of several processes touches it.

    A run that is replaced stands aside under a hidden name until the new one has a checkpoint, and comes
    back if that never happens.
    """
    if not _first_process():
        yield
        return
    aside: Path | None = None
    if not resume and out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise FileExistsError(f"{out} exists; resume it with --resume or replace it with --overwrite")
        _own_entries(out)
        aside = temporary_beside(out, "old")
        os.rename(out, aside)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with atomic_path(out / CONFIG) as temporary:
            settings = yaml.safe_dump(config.to_dict(), sort_keys=False)
            temporary.write_text(f"{HEADER}\n{settings}", encoding="utf-8")
        yield
    except BaseException:
        if not (out / LAST).is_file() and not resume:
            shutil.rmtree(out, ignore_errors=True)
            if aside is not None:
                os.rename(aside, out)
                aside = None
        raise
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)


def _refuse_not_hermitian(pairs: Pairs) -> None:
    first = [int((pairs.sid == s).nonzero()[0]) for s in pairs.sid.unique()]
    H, _ = pairs.read(first, 0)
    square = H.shape[-1] == H.shape[-2]
    if not square or bool((torch.linalg.matrix_norm(H - H.mH) > 1e-3 * torch.linalg.matrix_norm(H)).any()):
        raise ValueError(
            "hermitian (--hermitian) is true, so data must be covariances, H = H^H, and these are not"
        )


def _callbacks(out: Path, config: TrainConfig) -> list[L.Callback]:
    common: dict[str, Any] = {
        "dirpath": out,
        "enable_version_counter": False,
        "auto_insert_metric_name": False,
    }
    callbacks: list[L.Callback] = [
        RunCheckpoint(filename="last", every_n_train_steps=config.checkpoint_every, **common),
        RunCheckpoint(filename="last", every_n_epochs=1, save_on_train_epoch_end=True, **common),
        RunCheckpoint(filename="best", monitor="val/ae", mode="min", save_on_train_epoch_end=False, **common),
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
        overwrite: replace a finished or broken run in `out`, once the new one has a checkpoint.
        init: network to start from instead of a new one (finetuning); it is trained in place.
        init_scenarios: the scenarios it was trained on.

    Raises:
        FileExistsError: if `out` holds something and neither `resume` nor `overwrite` is set.
        FileNotFoundError: if there is nothing to resume.
        FloatingPointError: if loss or weights become non-finite; the last checkpoint is kept.
        ValueError: for data that does not fit the configuration, the checkpoint or the network.
        OSError: if a checkpoint cannot be written; the one before it is whole.
    """
    out = Path(os.path.realpath(out))
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out}: expected a folder for the run, got a file")
    if config.finetune and init is None and not resume:
        raise ValueError(
            "finetune holds the end of the schedule and needs a trained network to start from (--init)"
        )
    if config.data is not None:
        config = replace(config, data=os.path.abspath(config.data))
    pairs = open_pairs(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if init is None and config.hermitian:
        _refuse_not_hermitian(pairs)
        if config.head == "angular" and config.array is None:
            config = replace(config, array="x".join(map(str, panel_shape(pairs.M))))
        if config.head == "angular" and config.active is None:
            # energy of a covariance lies in few angles, and their number grows slower than the antennas'
            config = replace(config, active=min(pairs.r, 8 + pairs.r // 4))
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
        changed = config.changes_that_a_resumed_run_refuses(saved["history"].get("training", {}))
        if changed:
            raise ValueError(f"{last}: a resumed run keeps its {', '.join(changed)}")
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
        names = ["dim", "depth", "groups", "kernel_size", "temperature", "k_len", "gate_hidden"]
        names += ["refine_steps", "head", "active", "hermitian", "array"]
        mine: dict[str, Any] = {"refine_steps": 0, "head": "pooled", "active": None, "hermitian": False}
        mine["array"] = None
        mine = {name: value for name, value in (mine | net.config).items() if name in names}
        if mine["array"] is not None:
            mine["array"] = "x".join(map(str, mine["array"]))
        if not isinstance(mine.get("k_len", 0), int):
            del mine["k_len"]
        config = replace(config, **mine)
    else:
        torch.manual_seed(config.seed)
        net = LoMACSSVDNet(pairs.M, pairs.N, pairs.r, len(pairs.scenarios), **config.architecture)
    data = ChannelData(pairs, config)
    _quiet()
    try:
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
    except MisconfigurationException as error:
        raise ValueError(f"accelerator or devices cannot be served ({error})") from None
    module = SVDNetModule(net, config, pairs.scenarios)
    with _run_folder(out, config, resume, overwrite):
        # the library ends an interrupted run by SystemExit, or by returning
        with contextlib.suppress(SystemExit):
            trainer.fit(module, data, ckpt_path=last if resume else None, weights_only=True)
        if trainer.received_sigterm:
            raise SystemExit(128 + signal.SIGTERM)
        if trainer.interrupted:
            raise KeyboardInterrupt
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
