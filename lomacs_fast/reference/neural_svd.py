"""Steps on the nested low-rank objective of a given matrix: a preconditioned gradient, then Björck."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .ortho import bjorck

DAMPING = 16  # eps of the largest squared singular value, in the step's denominators
LARGEST = 1.0  # norm of a column's step out of the span
FLOOR = 1e-4  # of the largest squared singular value: the change of shorter columns counts against it
TURN = 4.0  # bound on the rotation inside the span, in the smaller of Frobenius norm and row sum
STEPS, ORDER = 4, 2  # of Björck's iteration: a step leaves F within |F^H F| of 1 + LARGEST^2


def by_length(C: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
    """The Gram matrix C `(..., L, L)` and factors `(..., n, L)`, longest column of G first; ties stay."""
    order = C.diagonal(dim1=-2, dim2=-1).real.argsort(dim=-1, descending=True, stable=True)
    column = order[..., None, :]
    C = C.gather(-1, column.expand_as(C)).gather(-2, order[..., None].expand_as(C))
    return C, *(x.gather(-1, column.expand_as(x)) for x in factors)


def rotation(C: Tensor) -> Tensor:
    """Skew X `(..., L, L)` that turns every pair (j, k), j > k, by the angle that makes `C_jk` zero.

    `X_jk = 2 C_jk / (gap + sqrt(gap^2 + 4 |C_jk|^2) + damping)`, `gap = |C_kk - C_jj|`, the tangent of
    Jacobi's angle but for the damping; all pairs at once, bounded by `TURN`.
    """
    s = C.diagonal(dim1=-2, dim2=-1).real
    gap = (s[..., None, :] - s[..., :, None]).abs()
    below = C.tril(-1)
    tiny = torch.finfo(s.dtype).tiny
    size = below.real.square() + (below.imag.square() if below.is_complex() else 0)
    damping = DAMPING * torch.finfo(s.dtype).eps * s.amax(-1)[..., None, None]
    X = below * (2 / (gap + (gap.square() + 4 * size).sqrt() + damping).clamp_min(tiny))
    X = X - X.mH
    row = X.abs().sum(-1).amax(-1)
    bound = torch.minimum(row, torch.linalg.vector_norm(X, dim=(-2, -1))).clamp_min(TURN)
    return X * (TURN / bound)[..., None, None]


def neural_svd_update(
    F: Tensor, D: Tensor, C: Tensor, bjorck: Callable[[Tensor, int, int], Tensor] = bjorck
) -> Tensor:
    """One step of F, sorted by length, from `D = (I - F F^H) H^H G` and `C = G^H G` at `G = H F`."""
    C, F, D = by_length(C, F, D)
    s = C.diagonal(dim1=-2, dim2=-1).real
    info = torch.finfo(s.dtype)
    a = 1 / (s + DAMPING * info.eps * s.amax(-1, keepdim=True)).clamp_min(info.tiny)
    Y = D * a[..., None, :]
    Y = Y * (LARGEST / torch.linalg.vector_norm(Y, dim=-2, keepdim=True).clamp_min(LARGEST))
    return bjorck(F + F @ rotation(C) + Y, STEPS, ORDER)


def stepsize(outside: Tensor, C: Tensor, watch: int) -> Tensor:
    """The largest step of the first columns, against their lengths: one number a matrix.

    Over k < watch the largest of `|(I - F F^H) Z_k| / (C_kk + floor)` and `|C_jk| / (C_kk + floor)`, j > k,
    `floor = 1e-4 max_k C_kk`; `outside` is the first numerator. C and `outside` sorted or not.
    """
    s = C.diagonal(dim1=-2, dim2=-1).real
    tiny = torch.finfo(s.dtype).tiny
    a = 1 / (s + FLOOR * s.amax(-1, keepdim=True)).clamp_min(tiny)
    inside = C.tril(-1).abs().amax(-2)
    return (torch.maximum(outside, inside) * a)[..., :watch].amax(-1)


def neural_svd_steps(H: Tensor, F: Tensor, steps: int, watch: int | None = None) -> tuple[Tensor, Tensor]:
    """Steps on the nested low-rank objective of H, from columns F that Björck keeps orthonormal.

    Given an orthonormal F, the objective of `low_rank_loss` is least at `G = H F`. There its gradient in F
    is, with the weights w of joint nesting (all 1 for sequential), `C = G^H G` and `Z = H^H G`,

        gF_k = -2 w_k Z_k + 2 sum_j max-weighted F_j C_jk,

    that is `-2 w_k` times `(I - F F^H) Z_k` out of the span of F, and `-2 (w_k - w_j) C_jk` along `F_j`,
    j > k, inside it. Each part is divided by the curvature of the objective along it: `2 w_k C_kk` out of the
    span, `2 (w_k - w_j) (C_kk - C_jj)` inside, where Jacobi's angle takes the place of the quotient. What
    is left depends on w no more, so joint and sequential nesting make the same step:

        F <- Bjoerck(F (I + X) + (I - F F^H) Z diag(1 / C_kk)),

    X of `rotation`, columns of the last term at most 1 long, columns sorted by `C_kk` before every step.
    Four steps of Björck's iteration of order 2 a step. At a fixed point the columns are right singular
    vectors, those of the largest singular values first.

    Args:
        H: real or complex `(..., M, N)`.
        F: `(..., N, L)`, orthonormal to some percent, `L <= N`.
        steps: at least 1.
        watch: how many of the columns the change is measured of; all where it is not given.

    Returns:
        F after the steps, orthonormal to rounding once the steps are small, columns in the order that the
        last step took; and the change `(...)` that the last step found, `stepsize`. No gradient passes.

    Source: the objective as in `low_rank_loss`; Jacobi's angle as in Golub and Van Loan, "Matrix
    Computations", section 8.5.
    """
    watch = F.shape[-1] if watch is None else watch
    F, H = F.detach(), H.detach()
    for _ in range(steps):
        G = H @ F
        C, F, Z = by_length(G.mH @ G, F, H.mH @ G)
        D = Z - F @ C
        change = stepsize(torch.linalg.vector_norm(D, dim=-2), C, watch)
        F = neural_svd_update(F, D, C)
    return F, change
