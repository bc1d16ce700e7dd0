"""Spectral self-calibration: the predicted spectrum is drawn to the one measured in the given bases."""

from __future__ import annotations

from torch import Tensor


def spectral_calibrate(U: Tensor, H: Tensor, V: Tensor, S_pred: Tensor, tau: Tensor | float) -> Tensor:
    """`S = (1 - tau) S_pred + tau |diag(U^H H V)| + 1e-6`.

    Args:
        U, H, V: real or complex `(..., M, r)`, `(..., M, N)`, `(..., N, r)`.
        S_pred: real `(..., r)`.
        tau: real scalar in [0, 1].

    Returns:
        Real `(..., r)`.
    """
    measured = (U.mH @ H @ V).diagonal(dim1=-2, dim2=-1).abs()
    return (1 - tau) * S_pred + tau * measured + 1e-6
