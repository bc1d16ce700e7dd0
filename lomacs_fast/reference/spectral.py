"""Spectral self-calibration, and the tail of the network that ends in it."""

from __future__ import annotations

import torch
from torch import Tensor

from .ortho import column_normalize, ortho_refine


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


def svd_tail(
    U_raw: Tensor,
    V_raw: Tensor,
    S_pred: Tensor,
    H: Tensor,
    a: Tensor | float,
    b: Tensor | float,
    tau: Tensor | float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The network's tail: from raw factors and a predicted spectrum to `U, S, V`.

    Columns of both factors divided by (norm + 1e-8); S_pred sorted, largest first, equal ones as they come,
    columns following; one step of `ortho_refine` on U by `a` and on V by `b`; `spectral_calibrate` on H.

    Args:
        U_raw, V_raw, H: real or complex `(..., M, r)`, `(..., N, r)`, `(..., M, N)`, r at most M and N.
        S_pred: real `(..., r)`.
        a, b: real scalars in (0, 0.5].
        tau: real scalar in [0, 1].

    Returns:
        U, V of the shapes of the raw ones, S real `(..., r)`.
    """
    S, order = torch.sort(S_pred, dim=-1, descending=True, stable=True)
    columns = order.unsqueeze(-2)
    U, V = (column_normalize(X).gather(-1, columns.expand_as(X)) for X in (U_raw, V_raw))
    U, V = ortho_refine(U, a), ortho_refine(V, b)
    return U, spectral_calibrate(U, H, V, S, tau), V
