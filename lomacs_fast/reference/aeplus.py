"""The AE+ loss on `M = U^H H V`: reconstruction, orthogonality, energy, diagonality and spectral match."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .ortho import gram_residual

EPS = 1e-8


class AEPlusTerms(NamedTuple):
    """The five unweighted terms, detached; 0-d from `aeplus_loss`, one a sample from `aeplus_terms`."""

    rec: Tensor
    ortho: Tensor
    energy: Tensor
    diag: Tensor
    match: Tensor


def frobenius(X: Tensor) -> Tensor:
    """Frobenius norm over the last two dimensions, with subgradient 0 at 0."""
    return torch.linalg.vector_norm(X, dim=(-2, -1))


def aeplus_terms(U: Tensor, S: Tensor, V: Tensor, H: Tensor, match: str = "norm") -> AEPlusTerms:
    """The five terms of every sample, with `M = U^H H V` and `|.|` the Frobenius norm.

    - rec: `|H - U diag(S) V^H| / |H|`
    - ortho: `|U^H U - I| + |V^H V - I|`
    - energy: `1 - |M| / |H|`
    - diag: `|M - diag M| / |H|`
    - match: `| |S| - |diag M| | / |H|` for `"norm"`, `mean_k |S_k - |M_kk|| / |H|` for `"mean"`

    Denominators carry + 1e-8. Shapes as in `aeplus_loss`; each term has the shape of the batch.
    """
    scale = 1 / (frobenius(H) + EPS)
    M = U.mH @ H @ V
    diagonal = M.diagonal(dim1=-2, dim2=-1)
    reconstruction = (U * S.unsqueeze(-2)) @ V.mH
    if match == "norm":
        gap = (torch.linalg.vector_norm(S, dim=-1) - torch.linalg.vector_norm(diagonal, dim=-1)).abs()
    elif match == "mean":
        gap = (S - diagonal.abs()).abs().mean(-1)
    else:
        raise ValueError(f'match must be "norm" or "mean", got {match!r}')
    return AEPlusTerms(
        rec=frobenius(H - reconstruction) * scale,
        ortho=frobenius(gram_residual(U)) + frobenius(gram_residual(V)),
        energy=1 - frobenius(M) * scale,
        diag=frobenius(M - torch.diag_embed(diagonal)) * scale,
        match=gap * scale,
    )


def aeplus_loss(
    U: Tensor,
    S: Tensor,
    V: Tensor,
    H: Tensor,
    *,
    lam: Tensor | float,
    w_energy: Tensor | float,
    w_diag: Tensor | float,
    w_match: Tensor | float,
    match: str = "norm",
) -> tuple[Tensor, AEPlusTerms]:
    """Batch mean of `rec + lam ortho + w_energy energy + w_diag diag + w_match match`.

    Args:
        U, V, H: complex or real `(..., M, r)`, `(..., N, r)`, `(..., M, N)`.
        S: real `(..., r)`.
        lam, w_energy, w_diag, w_match: real scalars.
        match: form of the last term, `"norm"` or `"mean"`; see `aeplus_terms`.

    Returns:
        The scalar loss, and the batch means of the five terms, detached, for logging. Every norm has
        subgradient 0 at 0, so an orthonormal U or a zero H give finite values and gradients.
    """
    terms = AEPlusTerms(*(term.mean() for term in aeplus_terms(U, S, V, H, match)))
    loss = (
        terms.rec + lam * terms.ortho + w_energy * terms.energy + w_diag * terms.diag + w_match * terms.match
    )
    # a 0-d float64 weight would promote the 0-d terms
    return loss.to(terms.rec.dtype), AEPlusTerms(*(term.detach() for term in terms))


class AEPlusLoss(nn.Module):
    """The AE+ loss as a module; `forward` returns the scalar, `terms` holds the five terms of the last call.

    Args:
        match: `"norm"` or `"mean"` (the published code); see `aeplus_terms`.
    """

    functions: ClassVar[Any] = SimpleNamespace(aeplus_loss=aeplus_loss)

    def __init__(self, match: str = "norm") -> None:
        super().__init__()
        if match not in ("norm", "mean"):
            raise ValueError(f'match must be "norm" or "mean", got {match!r}')
        self.match = match
        self.terms: AEPlusTerms | None = None

    def forward(
        self,
        U: Tensor,
        S: Tensor,
        V: Tensor,
        H: Tensor,
        w_energy: Tensor | float,
        w_diag: Tensor | float,
        w_match: Tensor | float,
        lam: Tensor | float,
    ) -> Tensor:
        loss, self.terms = self.functions.aeplus_loss(
            U, S, V, H, lam=lam, w_energy=w_energy, w_diag=w_diag, w_match=w_match, match=self.match
        )
        return loss

    def extra_repr(self) -> str:
        return f"match={self.match!r}"
