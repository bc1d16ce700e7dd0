"""Normalisation and augmentation of channels; an augmentation is a pure function of its seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .seeding import derive_seed

_AUGMENTATION = 0x617567  # keeps these draws apart from those of the generator at the same seed


def _divide(parts: Tensor, divisor: Tensor) -> Tensor:
    """Parts `(n, M, N, 2)` by one real number a sample, which complex division would square or invert."""
    return parts / torch.where(divisor > 0, divisor, 1)[:, None, None, None]


def _scaled(H: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`parts (n, M, N, 2)` with entries of at most 2, their norm, and the power of two that brings back H."""
    parts = torch.view_as_real(H.resolve_conj())
    if parts.numel() == 0:
        return parts, parts.new_zeros(len(parts)), parts.new_ones(len(parts))
    peak = parts.detach().flatten(1).abs().amax(1)
    peak = torch.where(peak > 0, peak, 1)
    # the power of two at or below the peak: dividing by it rounds nothing
    scale = peak / (2 * torch.frexp(peak).mantissa)
    parts = _divide(parts, scale)
    return parts, torch.linalg.vector_norm(parts.flatten(1), dim=1), scale


def unit_channels(H: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`X, size, scale` with `H = X size scale` a sample and `|X|_F = 1`, as exact at any scale of H.

    H complex `(n, M, N)`; X like H; `scale` a power of two, `size` at most `2 sqrt(2 M N)`, both real `(n,)`.
    Their product is `|H|_F`, which may lie outside the precision of H where its entries do not. A zero sample
    has X = 0 and size 0.
    """
    parts, size, scale = _scaled(H)
    return torch.view_as_complex(_divide(parts, size).contiguous()), size, scale


def frobenius_norm(H: Tensor) -> Tensor:
    """`|H|_F` a sample, real `(n,)`, also where squares would under- or overflow. H complex `(n, M, N)`."""
    _, size, scale = _scaled(H)
    return size * scale


def frobenius_normalize(H: Tensor, norm: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`H / |H|_F` a sample and the norms; a zero sample stays zero with norm 0.

    H complex `(n, M, N)`, of any scale. With `norm` given, real `(n,)`, that one divides (the label is
    divided by the norm of its input).
    """
    if norm is None:
        X, size, scale = unit_channels(H)
        return X, size * scale
    return torch.view_as_complex(_divide(torch.view_as_real(H.resolve_conj()), norm).contiguous()), norm


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
