"""The leading singular triplets of any batch of channels, untrained, by matrix products alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import functional
from .reference.arguments import integer
from .reference.refine import dft_basis, dft_start, orthonormal_fill, unit_scale
from .reference.refine_products import FIRST, SCOUT

__all__ = ["approx_svd"]

TAIL = 0.005  # relative residual with which they are enough
WHITE = 1.5  # the largest ratio of mean square to squared mean of a white residual's spectrum
ISOTROPIC = 0.4  # the largest share of its deviation on the diagonal
ABOVE = 4.0  # the largest singular value is at least so many floors
REFUSED = {
    -1: "H must be finite, sample {} holds NaN or Inf",
    -2: "H must be Hermitian where hermitian is True, sample {} is not",
}


def _square(X: Tensor) -> Tensor:
    """Squared Frobenius norm of every sample, `(n,)`."""
    return torch.linalg.vector_norm(X, dim=(-2, -1)).square()


def _diagonal(X: Tensor) -> Tensor:
    return X.diagonal(dim1=-2, dim2=-1).real


def _hermitian(X: Tensor) -> Tensor:
    """Which samples of unit norm are Hermitian, but for 100 eps."""
    if X.shape[-2] != X.shape[-1]:
        return torch.zeros(len(X), dtype=torch.bool, device=X.device)
    return _square(X - X.mH).sqrt() <= 100 * torch.finfo(X.dtype).eps


def _semidefinite(X: Tensor) -> Tensor:
    """Which Hermitian samples of unit norm may be positive semidefinite: no minor of two rows is negative."""
    d = _diagonal(X)
    minors = d[:, :, None] * d[:, None, :] - X.real.square() - X.imag.square()
    tiny = -100 * torch.finfo(X.dtype).eps
    return (d.amin(-1) >= tiny) & (minors.amin((-2, -1)) >= tiny)


def _floor(X: Tensor, U: Tensor) -> Tensor:
    """The floor under the active columns U, `(n,)`; 0 where a test fails. X Hermitian, of unit norm."""
    (M, k), eps = U.shape[-2:], torch.finfo(X.dtype).eps
    rest = M - k
    if rest < max(8, M // 2):
        return X.real.new_zeros(len(X))
    W = X @ U
    D = U.mH @ W
    cross = W @ U.mH
    E = X - cross - cross.mH + U @ D @ U.mH
    square, trace, active = _square(E), _diagonal(E).sum(-1), _diagonal(D)
    floor = trace / rest
    deviation = E + floor[:, None, None] * (U @ U.mH)
    deviation = deviation - torch.diag_embed(floor[:, None].expand(-1, M))
    # the diagonal in the antennas' domain, and in the DFT's
    bins = dft_basis(M, X)
    turned = (torch.fft.fft(deviation, dim=-2, norm="ortho") * bins.mT).sum(-1).real
    share = torch.maximum(_diagonal(deviation).square().sum(-1), turned.square().sum(-1))
    size = _square(deviation)
    passed = (
        (trace > 0)
        & (active.amin(-1) >= -100 * eps)
        & (square > (100 * eps) ** 2)
        & (rest * square <= WHITE * trace.square())
        & ((share <= ISOTROPIC * size) | (size <= 1e-3 * square))
        & (active.amax(-1) > ABOVE * floor)
    )
    return torch.where(passed, floor, 0)


def _enough(X: Tensor, U: Tensor, V: Tensor, hermitian: bool, denoise: bool) -> Tensor:
    """Which samples of unit norm the spans serve: what they leave is small, or a floor to be subtracted."""
    found = (_square(X) - _square(X @ V)).clamp_min(0) <= TAIL**2
    return found | (_floor(X, U) > 0) if hermitian and denoise else found


def _fixed(
    X: Tensor, U: Tensor, V: Tensor, rank: int, steps: int, k: int, hermitian: bool, orthonormal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    pad = rank - U.shape[-1]
    U, V = (torch.nn.functional.pad(x, (0, pad)) for x in (U, V))
    return functional.refine_svd(X, U, V, steps, active=k, hermitian=hermitian, orthonormal=orthonormal)


def _grown(
    X: Tensor, start: tuple[Tensor, Tensor] | None, rank: int, steps: int, hermitian: bool, denoise: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Refined with as many columns as each sample needs; also that number, `(n,)`."""
    k, left = min(FIRST, rank), steps
    index = torch.arange(len(X), device=X.device)
    given = start is not None
    U, V = dft_start(X, k) if start is None else (x[..., :k] for x in start)
    orthonormal = not given
    done: list[tuple[Tensor, ...]] = []
    while len(index):
        wait = torch.zeros(len(index), dtype=torch.bool, device=X.device)
        if k < rank:
            scout = min(SCOUT, max(left - 1, 0))
            U, _, V = functional.refine_svd(X, U, V, scout, hermitian=hermitian, orthonormal=orthonormal)
            left, orthonormal = left - scout, True
            wait = ~_enough(X, U, V, hermitian, denoise)
        go = ~wait
        if bool(go.any()):
            result = _fixed(X[go], U[go], V[go], rank, left, k, hermitian, orthonormal)
            count = torch.full((len(result[1]),), k, device=X.device)
            done.append((index[go], *result, count))
        index, X, U, V = index[wait], X[wait], U[wait], V[wait]
        if not len(index):
            break
        more = min(2 * k, rank) - k
        rest = X - U @ (U.mH @ X)
        rest = rest - (rest @ V) @ V.mH
        extra = dft_start(rest, more) if start is None else [x[index][..., k : k + more] for x in start]
        U = torch.cat([U, orthonormal_fill(extra[0], U)], -1)
        V = U if hermitian else torch.cat([V, orthonormal_fill(extra[1], V)], -1)
        k += more
    order = torch.cat([part[0] for part in done]).argsort()
    U, S, V, count = (torch.cat([part[i] for part in done])[order] for i in range(1, 5))
    return U, S, V, count


def _factors(init: Any, H: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """The start as `(n, M, rank), (n, N, rank)`, None for the DFT's."""
    if isinstance(init, str):
        if init != "dft":
            raise ValueError(f'init must be "dft" or a pair U, V, got {init!r}')
        return None
    if not isinstance(init, Sequence) or len(init) != 2:
        raise TypeError(f'init must be "dft" or a pair U, V, got {type(init).__name__}')
    for name, x, n in (("U", init[0], H.shape[-2]), ("V", init[1], H.shape[-1])):
        if not isinstance(x, Tensor) or x.dtype != H.dtype:
            came = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} of init must be a tensor like H, {H.dtype}, got {came}")
        shape = (*H.shape[:-2], n, rank)
        if x.shape != shape:
            raise ValueError(f"{name} of init must have shape {shape}, got {tuple(x.shape)}")
    U, V = (x.reshape(-1, *x.shape[-2:]) for x in init)
    _finite("U of init", U)
    _finite("V of init", V)
    return U, V


def _finite(name: str, X: Tensor) -> None:
    finite = torch.view_as_real(X.resolve_conj()).isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        raise ValueError(REFUSED[-1].replace("H", name).format(int((~finite).nonzero()[0])))


def _accepted(state: Tensor) -> None:
    """Raise for the first sample that is refused."""
    if not state.numel() or int(state.min()) > 0:
        return
    for code in (-1, -2):
        if bool((state == code).any()):
            raise ValueError(REFUSED[code].format(int((state == code).nonzero()[0])))


def approx_svd(
    H: Tensor,
    rank: int,
    steps: int = 8,
    active: int | None = None,
    hermitian: bool | None = None,
    denoise: str | bool = "auto",
    init: str | tuple[Tensor, Tensor] = "dft",
) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets, `H ~ U diag(S) V^H`, by `functional.refine_svd`; no decomposition.

    A sample's result does not depend on the others of its batch, rounding apart.

    Args:
        H: complex `(..., M, N)`, of any scale and rank.
        rank: columns returned, 1 to min(M, N).
        steps: at least 0. A step costs a product with H and one with `H^H` (Hermitian: one).
        active: columns that are refined, 1 to rank; the others are an orthonormal completion with S = 0. When
            not given: 16, or as long as that is not enough twice as many. They are enough after two steps
            when the residual `|H - H V V^H| / |H|` is at most 0.005, or where the floor may be subtracted.
        hermitian: whether all samples are. When not given, a sample is Hermitian where
            `|H - H^H| <= 100 eps |H|`. One factor then serves both sides, unless a minor of two rows
            shows that H is indefinite.
        denoise: `"auto"` subtracts the floor `f = tr E / (M - k)`, `E = (I - U U^H) H (I - U U^H)`, from the
            k active singular values, not below 0, where a sample is a covariance with white noise: Hermitian,
            no active eigenvalue negative, `f > 0`, `|E| > 100 eps |H|`, and E white: `(M - k) |E|^2 <=
            1.5 (tr E)^2`, and of the energy of `E - f (I - U U^H)` at most 0.4 on the diagonal of either the
            antennas' or the DFT's domain (all of it at a clean smooth spectrum, 1 / M in noise); further
            `S_1 > 4 f` and `M - k >= max(8, M / 2)`. False never subtracts.
        init: `"dft"`, the DFT columns with most energy on each side, or a pair U `(..., M, rank)`,
            V `(..., N, rank)`, the strongest columns first, of any condition.

    Returns:
        U complex `(..., M, rank)`, S real `(..., rank)`, not negative, largest first, V complex
        `(..., N, rank)`. Columns of U and V are orthonormal to rounding; a zero sample has S = 0.

    Raises:
        TypeError, ValueError: for an argument of another type, dtype, shape or value, naming it; for NaN or
            Inf, and for a sample that is not Hermitian where hermitian is True, naming the first.
    """
    functional._tensor("H", H, functional.COMPLEX, ("...", None, None))
    M, N = H.shape[-2:]
    rank, steps = integer("rank", rank, 1), integer("steps", steps, 0)
    if rank > min(M, N):
        raise ValueError(f"rank must be at most min(M, N) = {min(M, N)}, got {rank}")
    if active is not None and integer("active", active, 1) > rank:
        raise ValueError(f"active must be at most rank = {rank}, got {active}")
    if hermitian is not None and not isinstance(hermitian, bool):
        raise TypeError(f"hermitian must be True, False or None, got {hermitian!r}")
    if denoise is not False and denoise != "auto":
        raise ValueError(f'denoise must be "auto" or False, got {denoise!r}')
    start = _factors(init, H, rank)
    if start is None:
        fused = functional.fused_approximation(H, rank, steps, active, hermitian, denoise is not False)
        if fused is not None:
            _accepted(fused[3])
            return fused[:3]
    batch = H.shape[:-2]
    H = H.resolve_conj().resolve_neg().reshape(-1, M, N)
    _finite("H", H)
    X, norm = unit_scale(H)
    tied = _hermitian(X)
    if hermitian and not bool(tied.all()):
        raise ValueError(REFUSED[-2].format(int((~tied).nonzero()[0])))
    # where eigenvalues of both signs compete, two factors converge and one may not
    tied = torch.zeros_like(tied) if hermitian is False or M != N else tied & _semidefinite(X)

    done: list[tuple[Tensor, ...]] = []
    for form in (True, False):
        index = (tied == form).nonzero()[:, 0]
        if not len(index):
            continue
        part = X[index]
        given = None if start is None else (start[0][index], start[1][index])
        if active is None:
            U, S, V, k = _grown(part, given, rank, steps, form, denoise is not False)
        else:
            U, V = dft_start(part, active) if given is None else given
            U, S, V = _fixed(part, U, V, rank, steps, active, form, given is None)
            k = torch.full((len(part),), active, device=H.device)
        if form and denoise is not False:
            for count in k.unique().tolist():
                mine = (k == count).nonzero()[:, 0]
                floor = _floor(part[mine], U[mine, :, :count])
                S = S.index_put((mine,), (S[mine] - floor[:, None]).clamp_min(0))
        done.append((index, U, S, V))
    if not done:
        return (H.new_zeros(*batch, M, rank), X.real.new_zeros(*batch, rank), H.new_zeros(*batch, N, rank))
    order = torch.cat([found[0] for found in done]).argsort()
    U, S, V = (torch.cat([found[i] for found in done])[order] for i in (1, 2, 3))
    S = S * norm[:, 0]
    return U.reshape(*batch, M, rank), S.reshape(*batch, rank), V.reshape(*batch, N, rank)
