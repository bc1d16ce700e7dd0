"""The settings of a training run: the published configuration by default."""

from __future__ import annotations

import contextlib
import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, get_args, get_type_hints

from lomacs_fast.data.augmentation import Augmentation

from .schedules import Schedule


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class TrainConfig:
    """Everything that decides a run, one field an option; `to_dict` and the YAML file have the same names.

    Raises `ValueError` naming the field for a value that is out of range.
    """

    data: str | None = _option(None, "folder in the contest's layout; without it the built-in generator")
    scenarios: list[int] | None = _option(None, "scenarios to train on; all of the folder, or 1 to 4")
    round: int | None = _option(None, "round of the contest folder, where it holds several")
    size: str = _option("64x64x32", "MxNxr for the built-in generator; a data folder says its own")
    samples: int = _option(1500, "samples a scenario and epoch, for the built-in generator")
    fresh: bool = _option(True, "built-in generator: other samples in every epoch")

    dim: int = _option(64, "feature width of the network")
    depth: int = _option(2, "number of blocks")
    groups: int = _option(4, "groups of the attention")
    kernel_size: int = _option(3, "taps of the gated convolution")
    temperature: float = _option(0.2, "temperature of the frequency gate")
    k_len: int = _option(32, "rows of the reduced keys and values")
    gate_hidden: int = _option(32, "hidden width of the frequency gate, channels of the angular gate")
    refine_steps: int = _option(0, "steps of refinement by matrix products; 0 is the published network")
    head: str = _option("pooled", 'what the refinement starts from, "pooled" (published) or "angular"')
    active: int | None = _option(
        None,
        "columns to refine, at most r; when not given all, and 8 + r/4 for the angular head of covariances",
    )
    hermitian: bool = _option(False, "the channels are covariances: one factor serves both sides")
    array: str | None = _option(
        None,
        "panel of the angular gate, polarisations x rows x columns, such as 2x4x8; near square, of two "
        "polarisations where M is even, when not given",
    )

    max_epochs: int = _option(400, "epochs")
    batch_size: int = _option(256, "samples a step, all processes together")
    lr: float = _option(4e-4, "learning rate of AdamW at the start")
    min_lr: float = _option(1e-6, "learning rate at the end of the cosine")
    weight_decay: float = _option(1e-4, "weight decay of AdamW")
    clip: float = _option(1.0, "bound on the norm of the gradient")
    match: str = _option("norm", 'form of the spectral match term, "norm" or "mean"')

    lam_max: float = _option(0.35, "weight of the orthogonality term after its ramp")
    lam_ramp: float = _option(0.55, "share of the run over which that weight rises from 0")
    tau_start: float = _option(0.9, "share of the measured spectrum in S at the start")
    tau_end: float = _option(0.6, "the same at the end")
    w_energy: float = _option(0.4, "weight of the energy term")
    w_diag: float = _option(0.3, "weight of the diagonality term")
    w_match: float = _option(0.3, "weight of the spectral match term")
    hold: float = _option(0.4, "share of the run over which these three stay constant")
    decay_end: float = _option(0.9, "share of the run at which they have fallen to `decayed`")
    decayed: float = _option(0.2, "what is left of them there")
    final: float = _option(0.05, "what is left of them after it")
    finetune: bool = _option(False, "hold the schedule at its end: lam, tau and weights are the final ones")

    noise: float = _option(0.03, "noise on the input, relative to its root mean square")
    row_dropout: float = _option(0.1, "probability that a row of the input vanishes")
    col_dropout: float = _option(0.1, "probability that a column vanishes")
    val_fraction: float = _option(0.1, "share of every scenario kept for validation")

    seed: int = _option(0, "seed of weights, split, order, augmentation and generation")
    threads: int | None = _option(None, "threads of torch a process")
    accelerator: str = _option("auto", "auto, cpu or gpu")
    devices: int = _option(1, "devices to use; under torchrun its processes count")
    precision: str = _option("32-true", "32-true or bf16-mixed (real-valued stems in bfloat16)")
    num_workers: int = _option(0, "processes that load data")
    checkpoint_every: int = _option(50, "steps between checkpoints; one more at the end of every epoch")
    log_every: int = _option(10, "steps between log lines")
    logger: str = _option("csv", "csv, tensorboard or both")
    progress: bool = _option(True, "show a progress bar")

    def __post_init__(self) -> None:
        hints = get_type_hints(TrainConfig)
        for f in fields(self):
            setattr(self, f.name, _typed(f.name, getattr(self, f.name), hints[f.name]))
        for name in ("max_epochs", "batch_size", "samples", "devices", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be at least 1, got {self.threads}")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed must lie between 0 and 2^63 - 1, got {self.seed}")
        if self.scenarios is not None and not self.scenarios:
            raise ValueError("scenarios must name at least one, got none")
        for name in ("lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("min_lr", "weight_decay", "num_workers"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must lie in (0, 1), got {self.val_fraction}")
        choices = {
            "match": ("norm", "mean"),
            "head": ("pooled", "angular"),
            "precision": ("32-true", "bf16-mixed"),
            "logger": ("csv", "tensorboard", "both"),
            "accelerator": ("auto", "cpu", "gpu"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        parse_size(self.size)
        if self.array is not None:
            parse_panel(self.array)
        _ = self.schedule, self.augmentation

    @property
    def schedule(self) -> Schedule:
        return Schedule(**{f.name: getattr(self, f.name) for f in fields(Schedule)})

    @property
    def augmentation(self) -> Augmentation:
        return Augmentation(**{f.name: getattr(self, f.name) for f in fields(Augmentation)})

    @property
    def architecture(self) -> dict[str, Any]:
        """The constructor arguments of the network that the data does not decide."""
        names = ["dim", "depth", "groups", "kernel_size", "temperature", "k_len", "gate_hidden"]
        if self.refine_steps or self.head != "pooled":
            names += ["refine_steps", "head", "active", "hermitian"]
        values = {name: getattr(self, name) for name in names} | {"tau_s": self.tau_start}
        return values if self.array is None else values | {"array": parse_panel(self.array)}

    def changes_that_a_resumed_run_refuses(self, saved: dict[str, Any]) -> list[str]:
        """What decides data, order or architecture and is not as it was when the run began."""
        names: tuple[str, ...] = (
            "scenarios",
            "round",
            "size",
            "samples",
            "fresh",
            "batch_size",
            "seed",
            "val_fraction",
        )
        names += ("finetune", *(name for name in self.architecture if name != "tau_s"))
        names += ("refine_steps", "head")
        return [
            f"{name} (the run has {saved[name]}, got {getattr(self, name)})"
            for name in names
            if name in saved and saved[name] != getattr(self, name)
        ]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# few weights and a loss of reconstruction alone: factors are orthonormal by themselves, and the noise of a
# covariance is its own augmentation
PRESETS: dict[str, dict[str, Any]] = {
    "published": {},
    "refined": {
        "head": "angular",
        "refine_steps": 3,
        "hermitian": True,
        "gate_hidden": 8,
        "max_epochs": 16,
        "samples": 1120,
        "batch_size": 32,
        "lr": 1e-2,
        "min_lr": 1e-5,
        "weight_decay": 0.0,
        "lam_max": 0.0,
        "w_energy": 0.0,
        "w_diag": 0.0,
        "w_match": 0.0,
        "noise": 0.0,
        "row_dropout": 0.0,
        "col_dropout": 0.0,
    },
}


def _typed(name: str, value: Any, hint: Any) -> Any:
    """A value of the type that a field wants, or `TypeError`; `1e-3` is text in YAML 1.1 and served."""
    if hint in (str | None, int | None, list[int] | None):
        if value is None:
            return None
        hint = next(kind for kind in get_args(hint) if kind is not type(None))
    if hint is float and isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint in (bool, str) and isinstance(value, hint):
        return value
    if hint == list[int] and isinstance(value, list | tuple):
        return [_typed(name, item, int) for item in value]
    kinds = {float: "a number", int: "an integer", bool: "true or false", str: "text"}
    raise TypeError(f"{name} must be {kinds.get(hint, 'a list of integers')}, got {value!r}")


def parse_panel(array: str) -> list[int]:
    """`"2x4x8"` as [polarisations, rows, columns]; `ValueError` unless all are positive."""
    try:
        sizes = [int(part) for part in array.lower().split("x")]
    except ValueError:
        sizes = []
    if len(sizes) != 3 or min(sizes) < 1:
        raise ValueError(f"array must be polarisations x rows x columns, such as 2x4x8, got {array!r}")
    return sizes


def parse_size(size: str) -> tuple[int, int, int]:
    """`"64x64x32"` as (M, N, r); `ValueError` unless M, N >= 2 and 1 <= r <= min(M, N)."""
    try:
        M, N, r = (int(part) for part in size.lower().split("x"))
    except ValueError:
        raise ValueError(f"size must be MxNxr, such as 64x64x32, got {size!r}") from None
    if min(M, N) < 2 or not 1 <= r <= min(M, N):
        raise ValueError(f"size must have M, N of at least 2 and r from 1 to min(M, N), got {size!r}")
    return M, N, r
