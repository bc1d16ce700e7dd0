"""Statistics of channel matrices: spectrum, angular sparsity, correlation, balance, symmetry and input error.

Every function takes `H` `(..., M, N)`, complex or real floating point, and gives one real value a matrix in
the real dtype of `H` unless it says otherwise. A zero matrix gives NaN where a share or ratio has no meaning;
`summarize` leaves out what is not finite. What needs singular values raises `torch.linalg.LinAlgError` for
a matrix that is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "alignment",
    "amplitude_bias",
    "channel_statistics",
    "column_correlation",
    "column_power_variation",
    "condition_number",
    "cumulative_energy",
    "dictionary_energy",
    "effective_rank",
    "entropy_rank",
    "fft_energy",
    "hermitian_distance",
    "normality",
    "phase_bias",
    "relative_error",
    "row_correlation",
    "row_power_variation",
    "summarize",
]


def _matrices(name: str, H: Tensor) -> Tensor:
    if not isinstance(H, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(H).__name__}")
    if not (H.is_complex() or H.is_floating_point()):
        raise TypeError(f"{name} must be complex or real floating point, got {H.dtype}")
    if H.dim() < 2 or 0 in H.shape[-2:]:
        raise ValueError(f"{name} must have shape (..., M, N), got {tuple(H.shape)}")
    return H


def _pair(H: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    _matrices("H", H)
    _matrices("label", label)
    if H.shape != label.shape:
        raise ValueError(f"label must have the shape of H, {tuple(H.shape)}, got {tuple(label.shape)}")
    dtype = torch.promote_types(H.dtype, label.dtype)
    return H.to(dtype), label.to(dtype)


def _norm(H: Tensor) -> Tensor:
    return torch.linalg.vector_norm(H, dim=(-2, -1))


def _unit(H: Tensor) -> Tensor:
    """H over its largest magnitude, so that no square under- or overflows; a zero matrix stays zero."""
    largest = H.abs().amax((-2, -1), keepdim=True)
    return H / torch.where(largest > 0, largest, torch.ones_like(largest))


def _inner(H: Tensor, G: Tensor) -> Tensor:
    return (H.conj() * G).sum((-2, -1))


def _energy(H: Tensor) -> Tensor:
    """Squared singular values, largest first, as shares of their sum; NaN for a zero matrix."""
    power = torch.linalg.svdvals(_unit(_matrices("H", H))).square()
    return power / power.sum(-1, keepdim=True)


def _cumulative(energy: Tensor) -> Tensor:
    # the last entry is 1 by definition, and rounding must not take any above it
    return torch.cumsum(energy.double(), -1).clamp_max(1.0).to(energy.dtype)


def _rank_of(energy: Tensor, share: float) -> Tensor:
    reached = torch.cumsum(energy.double(), -1)
    # a little less than the share, so that energy equal to it counts as reached after rounding
    rank = (reached < share - 4 * torch.finfo(energy.dtype).eps).sum(-1) + 1
    rank = rank.clamp_max(energy.shape[-1]).to(energy.dtype)
    return torch.where(energy[..., 0].isnan(), torch.zeros_like(rank), rank)


def _entropy_rank_of(energy: Tensor) -> Tensor:
    rank = torch.exp(-torch.special.xlogy(energy, energy).sum(-1))
    return torch.where(energy[..., 0].isnan(), torch.zeros_like(rank), rank)


def _condition_of(singular: Tensor) -> Tensor:
    return torch.where(singular[..., 0] > 0, singular[..., 0] / singular[..., -1], torch.nan)


def cumulative_energy(H: Tensor) -> Tensor:
    """`sum_{j <= k} s_j^2 / sum_j s_j^2` of the singular values, `(..., min(M, N))`; NaN at zero."""
    return _cumulative(_energy(H))


def effective_rank(H: Tensor, share: float = 0.99) -> Tensor:
    """Smallest k whose k largest squared singular values hold `share` of the energy; 0 for a zero matrix.

    Raises:
        ValueError: `share` outside (0, 1].
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share must lie in (0, 1], got {share}")
    return _rank_of(_energy(H), share)


def entropy_rank(H: Tensor) -> Tensor:
    """`exp(-sum p_k log p_k)` with `p_k = s_k^2 / sum s^2`; 0 for a zero matrix.

    The effective rank of Roy and Vetterli (2007), on energies instead of singular values.
    """
    return _entropy_rank_of(_energy(H))


def condition_number(H: Tensor) -> Tensor:
    """`s_max / s_min`: infinite for a singular matrix, NaN for a zero one.

    Singular values below `eps s_max` are rounding, and so is a condition number above `1 / eps`.
    """
    return _condition_of(torch.linalg.svdvals(_unit(_matrices("H", H))))


def fft_energy(H: Tensor, percent: float) -> Tensor:
    """Share of energy in the largest `percent` % of the 2-D FFT's bins, at least one; NaN at zero.

    Raises:
        ValueError: `percent` outside (0, 100].
    """
    _matrices("H", H)
    if not 0.0 < percent <= 100.0:
        raise ValueError(f"percent must lie in (0, 100], got {percent}")
    return _top_share(_fft_power(H), percent)


def _fft_power(H: Tensor) -> Tensor:
    if H.numel() == 0:  # the FFT library refuses an empty batch
        return H.new_zeros((*H.shape[:-2], H.shape[-2] * H.shape[-1]), dtype=H.dtype.to_real())
    F = torch.fft.fft2(_unit(H), norm="ortho")
    return torch.view_as_real(F).square().sum(-1).flatten(-2)


def _top_share(power: Tensor, percent: float) -> Tensor:
    bins = max(1, round(percent / 100 * power.shape[-1]))
    largest = torch.topk(power, bins, dim=-1, sorted=False).values.sum(-1)
    return (largest / power.sum(-1)).clamp_max(1.0)


def column_correlation(H: Tensor, pairs: str = "adjacent") -> Tensor:
    """Mean of `|h_i^H h_j| / (|h_i| |h_j|)` over pairs of columns; NaN with fewer than two columns.

    A pair with a zero column is left out; with no pair left the mean is NaN. The adjacent pairs are
    `(j, j + 1)`, across the seams of an array's rows and polarisations too.

    Raises:
        ValueError: `pairs` is neither "adjacent" nor "all".
    """
    _matrices("H", H)
    if pairs not in ("adjacent", "all"):
        raise ValueError(f'pairs must be "adjacent" or "all", got {pairs!r}')
    H = _unit(H)
    norm = torch.linalg.vector_norm(H, dim=-2)
    valid = norm > 0
    X = H / torch.where(valid, norm, torch.ones_like(norm)).unsqueeze(-2)
    if pairs == "adjacent":
        value = (X[..., :-1].conj() * X[..., 1:]).sum(-2).abs()
        counted = valid[..., :-1] & valid[..., 1:]
        return (value * counted).sum(-1) / counted.sum(-1)
    value = (X.mH @ X).abs().triu(1)
    number = valid.sum(-1)
    return value.sum((-2, -1)) / (number * (number - 1) // 2)


def row_correlation(H: Tensor, pairs: str = "adjacent") -> Tensor:
    """`column_correlation` of the transposed matrix."""
    return column_correlation(_matrices("H", H).mT, pairs)


def column_power_variation(H: Tensor) -> Tensor:
    """Coefficient of variation (population deviation over mean) of column powers `|h_j|^2`; NaN at zero."""
    power = torch.linalg.vector_norm(_unit(_matrices("H", H)), dim=-2).square()
    mean = power.mean(-1, keepdim=True)
    return (power - mean).square().mean(-1).sqrt() / mean.squeeze(-1)


def row_power_variation(H: Tensor) -> Tensor:
    """`column_power_variation` of the transposed matrix."""
    return column_power_variation(_matrices("H", H).mT)


def _undefined(H: Tensor) -> Tensor:
    return H.new_full(H.shape[:-2], math.nan, dtype=H.dtype.to_real())


def normality(H: Tensor) -> Tensor:
    """`|H H^H - H^H H|_F / |H|_F^2`, 0 for a normal matrix; NaN where M != N and for a zero matrix.

    It says little about symmetry: a large white matrix scores near `sqrt(2 / M)`.
    """
    _matrices("H", H)
    if H.shape[-2] != H.shape[-1]:
        return _undefined(H)
    H = _unit(H)
    return _norm(H @ H.mH - H.mH @ H) / _norm(H).square()


def hermitian_distance(H: Tensor) -> Tensor:
    """`min over phi of |A - A^H|_F / (2 |A|_F)`, `A = e^{i phi} H`: 0 (Hermitian up to a phase) to 0.707.

    `|A - A^H|^2 = 2 |H|^2 - 2 Re(e^{2 i phi} tr(H H))` is least where `e^{2 i phi} tr(H H)` is positive: the
    value is `sqrt((1 - |tr(H H)| / |H|^2) / 2)`, computed on the turned matrix since that cancels near 0.
    NaN where M != N and for a zero matrix. A large white matrix scores near the largest value, 1/sqrt(2).
    """
    _matrices("H", H)
    if H.shape[-2] != H.shape[-1]:
        return _undefined(H)
    A = _unit(H)
    if not A.is_complex():
        A = torch.complex(A, torch.zeros_like(A))
    angle = torch.angle((A * A.mT).sum((-2, -1)))
    A = A * torch.polar(torch.ones_like(angle), -0.5 * angle)[..., None, None]
    return _norm(A - A.mH) / (2 * _norm(A))


def alignment(H: Tensor, label: Tensor) -> Tensor:
    """`|<H, label>| / (|H| |label|)`, 1 when they agree up to a complex factor; NaN where either is zero."""
    H, label = _pair(H, label)
    H, label = _unit(H), _unit(label)
    return (_inner(H, label).abs() / (_norm(H) * _norm(label))).clamp_max(1.0)


def amplitude_bias(H: Tensor, label: Tensor) -> Tensor:
    """`|H|_F / |label|_F - 1`: how much stronger the input is; NaN for a zero label."""
    H, label = _pair(H, label)
    norm = _norm(label)
    return torch.where(norm > 0, _norm(H) / norm - 1, torch.nan)


def phase_bias(H: Tensor, label: Tensor) -> Tensor:
    """`arg <label, H>` in radians in (-pi, pi]: the phase that turns label onto input; NaN at zero."""
    H, label = _pair(H, label)
    inner = _inner(_unit(label), _unit(H))
    return torch.where(inner == 0, torch.nan, torch.angle(inner))


def relative_error(H: Tensor, label: Tensor) -> Tensor:
    """`|H - label|_F / |label|_F`; NaN where the label is zero."""
    H, label = _pair(H, label)
    norm = _norm(label)
    return torch.where(norm > 0, _norm(H - label) / norm, torch.nan)


def dictionary_energy(pk: Tensor, pv: Tensor, alpha: float = 1.0) -> Tensor:
    """Shares of the scores `|P_k[:, c]|^2 + alpha |P_v[:, c]|^2` of the attention's columns, group by group.

    Args:
        pk, pv: `(groups, T, k_len)` or `(T, k_len)`, real floating point: the projections of keys and values.
        alpha: weight of the values, finite and at least 0.

    Returns:
        `(groups, k_len)` or `(k_len,)`, non-negative, each group summing to 1; NaN in a group of zeros.

    Raises:
        TypeError: not real floating-point tensors.
        ValueError: shapes that differ or have no columns, or `alpha` out of range.
    """
    for name, P in (("pk", pk), ("pv", pv)):
        if not isinstance(P, Tensor) or not P.is_floating_point():
            got = P.dtype if isinstance(P, Tensor) else type(P).__name__
            raise TypeError(f"{name} must be a real floating-point tensor, got {got}")
    if pk.shape != pv.shape or pk.dim() < 2 or 0 in pk.shape:
        raise ValueError(
            f"pk and pv must have one shape (groups, T, k_len), got {tuple(pk.shape)} and {tuple(pv.shape)}"
        )
    if not 0.0 <= alpha < math.inf:
        raise ValueError(f"alpha must be finite and at least 0, got {alpha}")
    score = pk.square().sum(-2) + alpha * pv.square().sum(-2)
    return score / score.sum(-1, keepdim=True)


def channel_statistics(
    H: Tensor, label: Tensor | None = None, *, input: Tensor | None = None, top: Sequence[float] = (1, 5)
) -> dict[str, Tensor]:
    """All statistics of a batch, one value a matrix: chunks of a large file concatenate along dimension 0.

    Args:
        H: `(n, M, N)`, complex or real floating point: the matrices described.
        label: `(n, M, N)`; `H` is then the input that belongs to it.
        input: `(n, M, N)`; `H` is then the label that belongs to it. At most one of the two.
        top: percentages of the FFT bins.

    Returns:
        `cumulative_energy` `(n, min(M, N))`, and `(n,)` each: `effective_rank_99`, `effective_rank_entropy`,
        `condition_number`, `fft_energy_top1`, `fft_energy_top5` (by `top`), `column_correlation_adjacent`,
        `column_correlation_all`, `row_correlation_adjacent`, `row_correlation_all`, `row_power_variation`,
        `column_power_variation`, `normality`, `hermitian_distance` (both NaN where M != N), `norm`; with a
        label or an input also `alignment`, `amplitude_bias`, `phase_bias`, `relative_error` of the input.

    Raises:
        TypeError: not a tensor, or an integer one.
        ValueError: `H` is not three-dimensional, shapes differ, both `label` and `input` are given, or `top`
            is out of range.
    """
    _matrices("H", H)
    if H.dim() != 3:
        raise ValueError(f"H must have shape (n, M, N), got {tuple(H.shape)}")
    if label is not None and input is not None:
        raise ValueError("expected label or input beside H, got both")
    for percent in top:
        if not 0.0 < percent <= 100.0:
            raise ValueError(f"top must hold percentages in (0, 100], got {percent}")
    singular = torch.linalg.svdvals(_unit(H))
    power = singular.square()
    energy = power / power.sum(-1, keepdim=True)
    bins = _fft_power(H)
    stats = {
        "cumulative_energy": _cumulative(energy),
        "effective_rank_99": _rank_of(energy, 0.99),
        "effective_rank_entropy": _entropy_rank_of(energy),
        "condition_number": _condition_of(singular),
        **{f"fft_energy_top{percent:g}": _top_share(bins, percent) for percent in top},
        "column_correlation_adjacent": column_correlation(H),
        "column_correlation_all": column_correlation(H, "all"),
        "row_correlation_adjacent": row_correlation(H),
        "row_correlation_all": row_correlation(H, "all"),
        "row_power_variation": row_power_variation(H),
        "column_power_variation": column_power_variation(H),
        "normality": normality(H),
        "hermitian_distance": hermitian_distance(H),
        "norm": _norm(H),
    }
    if label is not None or input is not None:
        noisy, clean = H if input is None else input, H if label is None else label
        for function in (alignment, amplitude_bias, phase_bias, relative_error):
            stats[function.__name__] = function(noisy, clean)
    return stats


def summarize(stats: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """`mean`, `median`, `p5`, `p95` and `count` of the finite values of every statistic, ready for JSON.

    `(n,)` gives numbers, `(n, k)` lists of k numbers; None where no value is finite. `count` is the number of
    finite values. Quantiles interpolate linearly.

    Raises:
        TypeError: a statistic is no real tensor.
        ValueError: a statistic has neither one nor two dimensions.
    """
    out: dict[str, dict[str, Any]] = {}
    for name, values in stats.items():
        if not isinstance(values, Tensor) or values.is_complex():
            raise TypeError(f"stats[{name!r}] must be a real tensor")
        if values.dim() not in (1, 2):
            raise ValueError(f"stats[{name!r}] must have shape (n,) or (n, k), got {tuple(values.shape)}")
        values = values.detach().cpu().double()
        if values.dim() == 1:
            out[name] = _summary(values)
        else:
            columns = [_summary(column) for column in values.T]
            keys = columns[0] if columns else _summary(values.new_zeros(0))
            out[name] = {key: [column[key] for column in columns] for key in keys}
    return out


def _summary(values: Tensor) -> dict[str, Any]:
    values = values[values.isfinite()].sort().values
    count = len(values)
    if count == 0:
        return {"mean": None, "median": None, "p5": None, "p95": None, "count": 0}

    def quantile(q: float) -> float:
        at = q * (count - 1)
        low = min(int(at), count - 1)
        return torch.lerp(values[low], values[min(low + 1, count - 1)], at - low).item()

    # the mean of halves cannot overflow where the values do not
    mean = (values / count).sum().item()
    median, low, high = quantile(0.5), quantile(0.05), quantile(0.95)
    return {"mean": mean, "median": median, "p5": low, "p95": high, "count": count}
