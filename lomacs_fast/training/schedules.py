"""What changes over a run: the loss weights, the share of the measured spectrum, the learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Loss weights and tau as functions of the progress p = epoch / epochs in [0, 1].

    - lam: 0 to `lam_max` linearly until `lam_ramp`, then constant.
    - tau_s: `tau_start` to `tau_end` linearly.
    - w_energy, w_diag, w_match: constant until `hold`, linear to `decayed` of their value at `decay_end`,
      then `final` of it.
    """

    lam_max: float = 0.35
    lam_ramp: float = 0.55
    tau_start: float = 0.9
    tau_end: float = 0.6
    w_energy: float = 0.4
    w_diag: float = 0.3
    w_match: float = 0.3
    hold: float = 0.4
    decay_end: float = 0.9
    decayed: float = 0.2
    final: float = 0.05

    def __post_init__(self) -> None:
        for name in ("lam_max", "w_energy", "w_diag", "w_match", "decayed", "final"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("lam_ramp", "tau_start", "tau_end", "hold", "decay_end"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.hold > self.decay_end:
            raise ValueError(f"hold must be at most decay_end = {self.decay_end}, got {self.hold}")

    def at(self, progress: float) -> dict[str, float]:
        """`lam`, `w_energy`, `w_diag`, `w_match` and `tau_s` at a progress."""
        p = min(max(progress, 0.0), 1.0)
        if p <= self.hold:
            share = 1.0
        elif p <= self.decay_end:
            share = 1 + (self.decayed - 1) * (p - self.hold) / (self.decay_end - self.hold)
        else:
            share = self.final
        return {
            "lam": self.lam_max * (min(p / self.lam_ramp, 1.0) if self.lam_ramp else 1.0),
            "w_energy": self.w_energy * share,
            "w_diag": self.w_diag * share,
            "w_match": self.w_match * share,
            "tau_s": self.tau_start + (self.tau_end - self.tau_start) * p,
        }


def cosine(lr: float, min_lr: float, progress: float) -> float:
    """Learning rate `min_lr + (lr - min_lr) (1 + cos(pi p)) / 2`."""
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * progress))
