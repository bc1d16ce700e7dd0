"""The low-rank objective of one matrix, whose minimiser spans its leading singular vectors."""

from __future__ import annotations

import torch
from torch import Tensor


def low_rank_loss(
    F: Tensor, G: Tensor, H: Tensor, nesting: str = "none", *, shape: tuple[int, int] | None = None
) -> Tensor:
    """`-2 Re tr(G^H H F) + tr(F^H F G^H G)`, which is `|H - G F^H|^2 - |H|^2`.

    Its minimiser is fixed only up to `G -> G A, F -> F A^-H`; nesting fixes the columns:

    - `"none"`: the objective as it stands.
    - `"joint"`: the mean over l = 1..L of the objective of the first l columns, i.e. column k of the first
      term weighs `(L - k) / L` (k from 0) and the pair (i, j) of the second `(L - max(i, j)) / L`.
    - `"sequential"`: the value of `"none"`, with the gradient by which column k learns beside the columns
      before it and these do not feel it; not the gradient of any scalar.

    Args:
        F, G: real or complex `(..., N, L)` and `(..., M, L)`, right and left factor.
        H: `(..., M, N)`.
        nesting: as above.
        shape: `(rows, columns)` of the whole matrix when F, G and H are sampled rows and the block of H at
            their crossings. All pairs of the block count, each term is scaled to an unbiased estimate of the
            full sum, given that rows and columns are drawn uniformly and independently of each other.

    Returns:
        One value a matrix, real, of the shape of the batch (0-d for one matrix).

    Source: Ryu et al., ICML 2024, "Operator SVD with Neural Networks via Nested Low-Rank Approximation".
    """
    rows, cols = shape or (1, 1)
    u = rows / G.shape[-2] if shape else 1.0
    v = cols / F.shape[-2] if shape else 1.0
    cross = (G.conj() * (H @ F)).sum(-2).real * (u * v)
    gram_f, gram_g = F.mH @ F * v, G.mH @ G * u
    L = F.shape[-1]
    if nesting == "none":
        pairs = gram_f * gram_g.mT
        return pairs.sum((-2, -1)).real - 2 * cross.sum(-1)
    if nesting == "joint":
        k = torch.arange(L, device=H.device)
        weight = (L - torch.arange(L, device=H.device)).to(cross.dtype) / L
        pairs = (gram_f * gram_g.mT).real * weight[torch.maximum(k[:, None], k[None, :])]
        return pairs.sum((-2, -1)) - 2 * (cross * weight).sum(-1)
    if nesting == "sequential":
        before_f, before_g = F.detach().mH @ F * v, G.detach().mH @ G * u
        diagonal = (gram_f * gram_g.mT).real.diagonal(dim1=-2, dim2=-1)
        earlier = (before_f * before_g.conj()).real.triu(1).sum((-2, -1))
        return diagonal.sum(-1) + 2 * earlier - 2 * cross.sum(-1)
    raise ValueError(f'nesting must be "none", "joint" or "sequential", got {nesting!r}')
