"""Normalisation and augmentation of channels; an augmentation is a pure function of its seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .seeding import derive_seed

_AUGMENTATION = 0x617567  # keeps these draws apart from those of the generator at the same seed


def frobenius_norm(H: Tensor) -> Tensor:
    """`|H|_F` a sample, real `(n,)`, also where squares would under- or overflow. H complex `(n, M, N)`."""
    parts = torch.view_as_real(H.resolve_conj()).flatten(1)
    if parts.shape[0] == 0:
        return parts.new_zeros(0)
    peak = parts.abs().amax(1)
    safe = torch.where(peak > 0, peak, 1)
    return peak * torch.linalg.vector_norm(parts / safe[:, None], dim=1)


def frobenius_normalize(H: Tensor, norm: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`H / |H|_F` a sample and the norms; a zero sample stays zero with norm 0.

    H complex `(n, M, N)`. With `norm` given, real `(n,)`, that one divides (the label is divided by the norm
    of its input).
    """
    norm = frobenius_norm(H) if norm is None else norm
    return H / torch.where(norm > 0, norm, 1)[:, None, None], norm


@dataclass(frozen=True)
class Augmentation:
    """Power-aware noise and antenna dropout on the network's input.

    Every entry gains complex white noise whose standard deviation is `noise` times the root mean square of
    its sample's entries; then every row vanishes with probability `row_dropout`, every column with
    `col_dropout`, independently.

    Raises `ValueError` for a negative noise or a probability outside [0, 1).
    """

    noise: float = 0.03
    row_dropout: float = 0.1
    col_dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.noise < 0:
            raise ValueError(f"noise must be at least 0, got {self.noise}")
        for name in ("row_dropout", "col_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")

    def __call__(self, H: Tensor, indices: Sequence[int], *, seed: int, epoch: int) -> Tensor:
        """Augment sample k with the draws of `(seed, epoch, indices[k])`; H complex64 `(n, M, N)` is kept."""
        if not (self.noise or self.row_dropout or self.col_dropout):
            return H
        n, M, N = H.shape
        noise, keep = torch.empty(n, M, N, 2), torch.empty(n, M + N)
        generator = torch.Generator()
        for k, index in enumerate(indices):
            generator.manual_seed(derive_seed(_AUGMENTATION, seed, epoch, index))
            noise[k].normal_(generator=generator)
            keep[k].uniform_(generator=generator)
        # the two parts share the power of an entry
        deviation = self.noise * frobenius_norm(H) / (2 * M * N) ** 0.5
        rows = keep[:, :M] >= self.row_dropout
        cols = keep[:, M:] >= self.col_dropout
        noisy = H + torch.view_as_complex(noise) * deviation[:, None, None]
        return noisy * (rows[:, :, None] & cols[:, None, :])
