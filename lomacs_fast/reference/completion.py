"""An orthonormal completion that costs little where unused DFT columns are far from the span."""

from __future__ import annotations

import torch
from torch import Tensor

from .refine import FILL, _inverse_root, _least, _outside, complete, dft_basis

CLOSE = 1e-3  # defect before the last iteration, which squares it


@torch.no_grad()
def complete_from_dft(U: Tensor, columns: int) -> Tensor:
    """Columns orthonormal to U and each other, `(..., n, columns - k)`, from the unused DFT columns F.

    Björck's iteration on `X = F - U B`, `B = U^H F`, whose Gram matrix is `I - B^H B`: the iterate
    `X (I + B^H h B)` and its defect `B^H e B` need products of k x k matrices alone,
    `h <- h + e / 2 + h K e / 2` and `e <- 3/4 e K e + 1/4 e K e K e` with `K = B B^H`. No gradient flows.
    Where a combination of U lies in F, `complete` serves instead; so it does in traced code.

    U complex `(..., n, k)`, orthonormal, `k <= columns <= n`.
    """
    n, k = U.shape[-2:]
    c = columns - k
    if not c or not U.numel():
        return U.new_zeros(*U.shape[:-1], c)
    if torch.compiler.is_compiling():
        return complete(U, columns)[..., k:]
    free = _least(U, c)
    F = dft_basis(n, U).mT[free].mT
    turned = torch.fft.fft(U, dim=-2, norm="ortho")
    Bh = turned.gather(-2, free[..., :, None].expand(*free.shape, k))
    X = F - U @ Bh.mH
    one = torch.eye(min(c, k), dtype=U.dtype, device=U.device)
    if c <= k:
        X = X @ _inverse_root(one - Bh @ Bh.mH, FILL)[0]
    else:
        K = Bh.mH @ Bh
        h, e = 0.5 * one, 0.75 * K + 0.25 * (K @ K)
        for _ in range(FILL - 1):
            Ke = K @ e
            h = h + 0.5 * (e + h @ Ke)
            e2 = e @ Ke
            e = 0.75 * e2 + 0.25 * (e2 @ Ke)
        X = X + (X @ Bh) @ (h @ Bh.mH)
    X = _outside(X, U)
    G = X.mH @ X
    defect = (G - torch.eye(c, dtype=U.dtype, device=U.device)).abs().amax()
    short = 1.5 * X - 0.5 * (X @ G)
    if U.is_cuda and torch.cuda.is_current_stream_capturing():
        # a graph that is captured takes one way, whatever the values
        return torch.where(defect < CLOSE, short, complete(U, columns)[..., k:])
    return short if bool(defect < CLOSE) else complete(U, columns)[..., k:]
