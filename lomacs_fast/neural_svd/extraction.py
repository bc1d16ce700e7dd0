"""From trained factors to U, S and V: orthonormal columns, singular values, order, signs and phases."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lomacs_fast import functional
from lomacs_fast.reference.ortho import gram_residual

__all__ = ["PHASES", "align", "orthogonality", "orthonormalize"]

PHASES = ("sigma", "max", "reference")
NEAR = 0.1  # off-diagonal size of normalised columns up to which Björck's iteration moves none of them far


def numbers(X: Tensor) -> Tensor:
    """Every matrix as the list of its real numbers: reductions over complex ones are several times slower."""
    X = torch.view_as_real(X.resolve_conj()).flatten(-2) if X.is_complex() else X
    return X.flatten(-2)


def frobenius(X: Tensor) -> Tensor:
    """`|X|` of every matrix."""
    return torch.linalg.vector_norm(numbers(X), dim=-1)


def orthogonality(X: Tensor) -> Tensor:
    """`|X^H X - I|` of every matrix."""
    return frobenius(gram_residual(X))


def _qr(X: Tensor) -> Tensor:
    Q, R = torch.linalg.qr(X)
    d = R.diagonal(dim1=-2, dim2=-1)
    turn = torch.where(d.abs() > 0, torch.sgn(d), torch.ones_like(d))
    return Q * turn[..., None, :]


def orthonormalize(X: Tensor) -> Tensor:
    """Orthonormal columns near those of X `(..., n, L)`, `L <= n`, of any scale and rank.

    Björck's iteration where the normalised columns are near orthogonal; else QR, by which a column depends
    on those before it alone: the leading ones are not moved by what is arbitrary in the last.
    """
    length = torch.linalg.vector_norm(torch.view_as_real(X) if X.is_complex() else X[..., None], dim=(-3, -1))
    scale = 1 / (length + torch.finfo(length.dtype).tiny)
    X = X * torch.where(scale.isfinite(), scale, torch.zeros_like(scale))[..., None, :]
    residual = gram_residual(X).abs().amax((-2, -1))
    near = residual < NEAR
    if bool(near.all()):
        return functional.bjorck(X, 4, 2)
    Q = _qr(X)
    return Q if not bool(near.any()) else torch.where(near[..., None, None], functional.bjorck(X, 4, 2), Q)


def _sign(x: Tensor) -> Tensor:
    """`x / |x|`, 1 at 0."""
    return torch.where(x.abs() > 0, torch.sgn(x), torch.ones_like(x))


def align(
    U: Tensor, V: Tensor, d: Tensor, phase: str, reference: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Signs or phases of the pairs `(u_k, v_k)` by a convention, given `d_k = u_k^H H v_k`.

    - `"sigma"`: U stays, `v_k <- v_k e^(-i arg d_k)`, so that `S = |d|`.
    - `"max"`: after that, both columns turned until the largest entry of `u_k` is real and positive.
    - `"reference"`: after that, both turned until `u_ref^H u_k` is real and positive, `u_ref` being the
      column of the reference's U with the largest `|u_ref^H u_k|`.

    Nothing of this changes `U diag(S) V^H`. Columns whose number is zero stay.
    """
    V = V * _sign(d).conj()[..., None, :]
    turn: Tensor | None = None
    if phase == "max":
        largest = U.abs().argmax(-2, keepdim=True)
        turn = _sign(U.gather(-2, largest)).conj()
    elif phase == "reference":
        assert reference is not None
        overlap = reference[0].to(U.dtype).mH @ U
        turn = _sign(overlap.gather(-2, overlap.abs().argmax(-2, keepdim=True))).conj()
    if turn is not None:
        U, V = U * turn, V * turn
    return U, d.abs(), V


Product = Callable[[Tensor], Tensor]


def decompose(
    F: Tensor,
    G: Tensor | None,
    product: Product,
    sigma: str = "rayleigh",
    phase: str = "sigma",
    reference: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """U, S, V of the trained factors F `(..., N, L)` and G `(..., M, L)`, and `H V`; S largest first.

    Args:
        F, G: right and left factor, columns of any length. Without G it is `H V`, the objective's minimiser
            at an orthonormal V.
        product: `product(V)` is `H V`.
        sigma: `"rayleigh"`, `|diag(U^H H V)|`; `"norms"`, `|f_k| |g_k|`.
        phase, reference: as `align`.
    """
    V = orthonormalize(F)
    W = product(V)
    if G is None:
        F, G = V, W
    U = orthonormalize(G)
    d = (U.conj() * W).sum(-2)
    S = d.abs()
    if sigma == "norms":
        S = torch.linalg.vector_norm(F, dim=-2) * torch.linalg.vector_norm(G, dim=-2)
    S, order = S.sort(dim=-1, descending=True, stable=True)
    column = order[..., None, :]
    U, V, W = (x.gather(-1, column.expand_as(x)) for x in (U, V, W))
    # the columns of W turn with those of V
    U, _, VW = align(U, torch.cat([V, W], -2), d.gather(-1, order), phase, reference)
    V, W = VW.split([V.shape[-2], W.shape[-2]], -2)
    return U, S, V.contiguous(), W
