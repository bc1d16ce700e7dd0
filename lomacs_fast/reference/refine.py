"""Refinement of an approximate SVD by matrix products, elementwise operations and column norms alone.

Inside a step every product is k x k or n x k, their number is fixed and choices are made by masks, so that
one program can hold a sample for all steps.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .arguments import integer

# a step's scalars: softening of its rotations; shift, gain and Frobenius bound of its residual
SCALARS = ("soft", "mu", "gain", "bound")
LIMITS = (4.0, 1.0, 2.0, 4.0)  # the learned ones lie between 0 and these
SHIFTS = (0.02, 0.02, 0.02, 0.01, 0.01, 0.005)  # mu a step, the last one repeats
SWEEPS = 2
ROTATION = 1.5  # the polynomial of `_unitary` is unitary within 3% up to this norm
POLISH = 3  # Björck's iterations on the Gram matrix, a step
CLOSE = 3  # and at the end, before one on the columns
FILL = 8  # and on the Gram matrix of columns of any condition
ROUNDS = 2  # in which directions without length are filled
TINY = 1e-20  # under eps^2, far above underflow


def default_scalars(steps: int, like: Tensor) -> Tensor:
    """The untrained scalars `(steps, 4)`, in the precision and on the device of a tensor."""
    rows = [(0.5, SHIFTS[min(t, len(SHIFTS) - 1)], 1.0, 2.0) for t in range(steps)]
    if like.is_cuda:
        # a graph that is captured takes nothing from the host
        numbers = [torch.full((), x, dtype=like.real.dtype, device=like.device) for row in rows for x in row]
        return torch.stack(numbers).reshape(steps, 4) if rows else like.real.new_zeros(0, 4)
    return torch.tensor(rows, dtype=like.real.dtype, device=like.device).reshape(steps, 4)


def _energy(X: Tensor) -> Tensor:
    """`|x|^2` of every entry."""
    return X.real.square() + X.imag.square()


def _eye(X: Tensor) -> Tensor:
    return torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)


def _diagonal(D: Tensor) -> Tensor:
    return D.diagonal(dim1=-2, dim2=-1)


def _scale(X: Tensor, factor: Tensor) -> Tensor:
    """X times a real factor, part by part."""
    return torch.complex(X.real * factor, X.imag * factor)


def _phase(z: Tensor) -> Tensor:
    """`z / |z|`, and 1 at 0."""
    square = _energy(z)
    known = square > TINY
    unit = _scale(z, torch.where(known, square, 1.0).rsqrt())
    return torch.where(known, unit, torch.ones_like(unit))


def unit_scale(H: Tensor) -> tuple[Tensor, Tensor]:
    """`H / |H|_F` and `|H|_F`, `(..., 1, 1)`, at any scale of H; a zero sample stays zero with norm 0."""
    peak = torch.maximum(H.real.abs(), H.imag.abs()).detach().amax((-2, -1), keepdim=True)
    peak = torch.where(peak > 0, peak, 1.0)
    # the power of two at or below the peak: dividing by it rounds nothing
    peak = peak / (2 * torch.frexp(peak).mantissa)
    H = torch.complex(H.real / peak, H.imag / peak)
    square = _energy(H).sum((-2, -1), keepdim=True)
    norm = torch.where(square > 0, square, 1.0).sqrt()
    return torch.complex(H.real / norm, H.imag / norm), torch.where(square > 0, norm, 0.0) * peak


def _unitary(X: Tensor) -> Tensor:
    """A nearly unitary polynomial of a skew-Hermitian X, which is first bounded; `exp(X)` to second order.

    `T = I + X + X^2/2` has `T^H T = I + X^4/4`; `I - X^4/8 + c X^8` stands for the inverse root of that.
    """
    X2 = X @ X
    # |X|_2^2 is at most the largest row sum of X^2
    row = (_energy(X2) + TINY).sqrt().sum(-1).amax(-1)[..., None, None]
    square = ROTATION**2 / row.clamp_min(ROTATION**2)
    X, X2 = _scale(X, square.sqrt()), _scale(X2, square)
    X4 = X2 @ X2
    one = _eye(X)
    return (one + X + 0.5 * X2) @ (one - 0.125 * X4 + (0.185 / 16) * (X4 @ X4))


def _tangent(z: Tensor, gap: Tensor) -> Tensor:
    """`tan(t) z / |z|` with `tan(2 t) = |z| / gap`, gap above 0."""
    return _scale(z, 1 / (gap + (gap * gap + _energy(z)).sqrt()))


def rotations(D: Tensor, soft: Tensor | float, hermitian: bool) -> tuple[Tensor, Tensor]:
    """P and Q that take `P^H D Q` towards a diagonal, all pairs at once; the diagonal `s` of D is real.

    The Hermitian part of D asks for `tan 2t = |D_ij + D_ji^*| / |s_j - s_i|` in both rotations alike, its
    skew part for `tan 2t = |D_ij - D_ji^*| / (s_i + s_j)` in opposite directions: the angles of one pair.
    Each denominator grows by `soft` times the root of the energy off the diagonal in rows and columns i and
    j, so that many rotations at once do not run away; that vanishes as D becomes diagonal. At a gap of zero
    the sign is +1 for i < j and -1 for i > j.
    """
    k = D.shape[-1]
    s, energy = _diagonal(D).real, _energy(D)
    off = (0.5 * (energy.sum(-1) + energy.sum(-2)) - s.square()).clamp_min(0)
    # the last term keeps a zero matrix from dividing by zero
    softening = soft * (off[..., :, None] + off[..., None, :] + TINY).sqrt() + 1e-12
    index = torch.arange(k, device=D.device)
    order = (index > index[:, None]).to(s.dtype) - (index < index[:, None]).to(s.dtype)
    gap = s[..., None, :] - s[..., :, None]
    sign = torch.where(gap == 0, order, gap.sign()) * order.abs()
    X = _scale(_tangent(D + D.mH, gap.abs() + softening), sign)
    if hermitian:
        P = _unitary(X)
        return P, P
    total = (s[..., None, :] + s[..., :, None]).clamp_min(0)
    Y = _scale(_tangent(D - D.mH, total + softening), order.abs())
    return _unitary(X + Y), _unitary(X - Y)


def _diagonalize(
    D: Tensor, soft: Tensor | float, sweeps: int, hermitian: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`P^H D Q, P, Q` after so many rotations, its diagonal real, and not negative unless Hermitian."""
    P: Tensor | None = None
    Q = P
    if hermitian:
        for _ in range(sweeps):
            A = rotations(D, soft, True)[0]
            D = A.mH @ D @ A
            D = 0.5 * (D + D.mH)
            P = A if P is None else P @ A
        assert P is not None
        return D, P, P
    turn = _phase(_diagonal(D)).conj()
    D = D * turn[..., None, :]
    for _ in range(sweeps):
        A, B = rotations(D, soft, False)
        D = A.mH @ D @ B
        again = _phase(_diagonal(D)).conj()[..., None, :]
        D, B = D * again, B * again
        P = A if P is None else P @ A
        Q = turn[..., :, None] * B if Q is None else Q @ B
    assert P is not None
    assert Q is not None
    return D, P, Q


def _inverse_root(G: Tensor, iterations: int, square: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Björck's iteration on a Gram matrix `X^H X`: F with `X F` nearer to orthonormal, and the last defect.

    X is thought scaled by the root of `square`, at most 1, that is to bring its spectral norm to 1.6 at most;
    where it is not given or might not, by `1.6 / |X|` with `|X|^4` at most the largest row sum of `G^2`. As
    accurate as the iteration on X itself where the columns of X are nearly orthonormal. The defect
    `E = I - X^H X` goes to `E^2 (3 I + E) / 4` as X goes to `X (I + E / 2)`; that before the last of the
    iterations is returned.
    """
    one = _eye(G)
    G2 = G @ G
    row = (_energy(G2) + TINY).sqrt().sum(-1).amax(-1)[..., None, None].sqrt()
    safe = 1.6**2 / row.clamp_min(1.6**2)
    square = safe if square is None else torch.minimum(square, safe)
    E = one - _scale(G, square)
    E2 = one - _scale(2 * G - _scale(G2, square), square)
    F = _scale(one + 0.5 * E, square.sqrt())
    for i in range(iterations - 1):
        E = (E @ E if i else E2) @ (0.75 * one + 0.25 * E)
        F = F + 0.5 * (F @ E)
    return F, E


def _straighten(X: Tensor) -> Tensor:
    """One iteration of Björck on nearly orthonormal columns."""
    return 1.5 * X - 0.5 * (X @ (X.mH @ X))


def _expand(
    X: Tensor, Y: Tensor, A: Tensor, E: Tensor, inverse: Tensor, gain: Tensor, bound: Tensor
) -> Tensor:
    """`X A + R` made orthonormal, `R = (Y - X A E) diag(inverse)` bounded in norm.

    Y is the product with H, rotated. As X is orthonormal, `|R_j|^2 = (|Y_j|^2 - |E_j|^2) inverse_j^2`, and
    the singular values of `X A + R` lie between 1 and `sqrt(1 + |R|^2)`.
    """
    square = (_energy(Y).sum(-2) - _energy(E).sum(-2)).clamp_min(0) * inverse.square()
    total = square.sum(-1, keepdim=True) * gain.square()
    share = bound.square() / torch.maximum(total, bound.square())
    inverse = (inverse * gain * share.sqrt())[..., None, :]
    middle = 2 / (2 + total * share)
    X = X @ (A - _scale(A @ E, inverse)) + _scale(Y, inverse)
    return X @ _inverse_root(X.mH @ X, POLISH, middle[..., None])[0]


def refine_step(
    H: Tensor, U: Tensor, V: Tensor, scalars: Tensor, sweeps: int = SWEEPS, hermitian: bool = False
) -> tuple[Tensor, Tensor]:
    """One step on orthonormal factors of `|H|_F = 1`: rotations inside the spans, then what lies outside.

    With `D = U^H H V`, `P^H D Q` nearly diagonal with diagonal s:

    - `R_u = (H V Q - U D Q) diag(1 / (s + mu))`, `R_v` likewise with `H^H`; gain and bound are applied,
    - `U <- Björck(U P + R_u)`, `V <- Björck(V Q + R_v)`.

    Hermitian: one factor, s of either sign, and `s + mu` becomes `sign(s) (|s| + mu)`.
    """
    soft, mu, gain, bound = scalars.unbind(-1)
    W = H @ V
    D = U.mH @ W
    if hermitian:
        D, P, Q = _diagonalize(0.5 * (D + D.mH), soft, sweeps, True)
        s = _diagonal(D).real
        inverse = torch.where(s < 0, -1.0, 1.0) / (s.abs() + mu)
        U = _expand(U, W @ P, P, D, inverse, gain, bound)
        return U, U
    Z = H.mH @ U
    D, P, Q = _diagonalize(D, soft, sweeps, False)
    inverse = 1 / (_diagonal(D).real + mu)
    return (
        _expand(U, W @ Q, P, D, inverse, gain, bound),
        _expand(V, Z @ P, Q, D.mH, inverse, gain, bound),
    )


def refine_close(
    H: Tensor,
    U: Tensor,
    V: Tensor,
    soft: Tensor | float,
    sweeps: int = SWEEPS,
    hermitian: bool = False,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A last rotation, orthonormality to rounding, the measured `S = diag(U^H H V)`, signed if Hermitian.

    Columns ordered by `|S|`, largest first, or by the indices that are given.
    """

    def orthonormalized(X: Tensor, A: Tensor) -> Tensor:
        """A such that the columns of X A are orthonormal, X and A being nearly so."""
        return A @ _inverse_root(A.mH @ (X.mH @ X) @ A, CLOSE)[0]

    W = H @ V
    D = U.mH @ W
    if hermitian:
        _, P, _ = _diagonalize(0.5 * (D + D.mH), soft, sweeps, True)
        P = orthonormalized(U, P)
        S = (P.conj() * (D @ P)).sum(-2).real
        U = _straighten(U @ P)
        V = U
    else:
        _, P, Q = _diagonalize(D, soft, sweeps, False)
        P, Q = orthonormalized(U, P), orthonormalized(V, Q)
        s = (P.conj() * (D @ Q)).sum(-2)
        U, V = _straighten(U @ P), _straighten(V @ (Q * _phase(s).conj()[..., None, :]))
        S = (_energy(s) + 1e-36).sqrt()  # differentiable at 0
    if order is None:
        order = S.detach().abs().sort(dim=-1, descending=True, stable=True).indices
    S = S.gather(-1, order)
    U = U.gather(-1, order[..., None, :].expand_as(U))
    V = U if hermitian else V.gather(-1, order[..., None, :].expand_as(V))
    return U, S, V


def dft_basis(n: int, like: Tensor, chirp: float = 0.0) -> Tensor:
    """Orthonormal `exp(2 pi i (j m / n + chirp j^2)) / sqrt(n)`, complex `(n, n)`; chirp 0 is the DFT."""
    j = torch.arange(n, dtype=torch.float64, device=like.device)
    turns = torch.outer(j, j).remainder(n) / n + (chirp * j.square()).remainder(1)[:, None]
    phase = 2 * math.pi * turns
    return (torch.complex(phase.cos(), phase.sin()) / math.sqrt(n)).to(like.dtype)


def _columns(basis: Tensor, value: Tensor, count: int) -> Tensor:
    """The columns of `(n, n)` with the largest value `(..., n)`; of equal ones the first."""
    index = value.detach().sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return basis.mT[index].mT


def dft_start(H: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k DFT columns with most energy of H on the left and on the right, `(..., M, k)`, `(..., N, k)`."""
    F, T = (dft_basis(n, H) for n in H.shape[-2:])
    return (
        _columns(F, _energy(torch.fft.fft(H, dim=-2, norm="ortho")).sum(-1), k),
        _columns(T, _energy(torch.fft.ifft(H, dim=-1, norm="ortho")).sum(-2), k),
    )


def orthonormal_fill(X: Tensor, U: Tensor | None = None) -> Tensor:
    """Orthonormal columns near those of X and orthogonal to those of U, whatever the rank of X.

    Björck's iteration on `X - U U^H X`; the directions that it leaves without length are given columns of a
    chirped DFT with little energy in the span, and it begins anew, twice. X `(..., n, r)` with `r + k <= n`;
    U `(..., n, k)` orthonormal.
    """
    X = _scale(X, (_energy(X).sum(-2, keepdim=True) + TINY).rsqrt())
    return _filled(_outside(X, U), U)


def _outside(X: Tensor, U: Tensor | None) -> Tensor:
    return X if U is None else X - U @ (U.mH @ X)


def _least(span: Tensor, columns: int, chirp: float = 0.0) -> Tensor:
    """Which columns of a DFT basis have the least energy in the span, `(..., columns)`."""
    with torch.no_grad():
        turn = dft_basis(span.shape[-2], span, chirp)[:, :1].conj() * math.sqrt(span.shape[-2])
        # the FFT refuses an empty batch
        turned = torch.fft.fft(span * turn, dim=-2, norm="ortho") if span.numel() else span
        energy = _energy(turned).sum(-1)
        return energy.sort(dim=-1, stable=True).indices[..., :columns]


def _filled(X: Tensor, U: Tensor | None) -> Tensor:
    """`orthonormal_fill` of columns of norm at most 1 outside U."""
    for turn in range(ROUNDS):
        F, E = _inverse_root(X.mH @ X, FILL)
        left, X = E @ E @ (0.75 * _eye(E) + 0.25 * E), X @ F
        chirp = (turn + 1) * 0.381966
        free = _least(X if U is None else torch.cat([U, X], -1), X.shape[-1], chirp)
        X = _outside(X + dft_basis(X.shape[-2], X, chirp).mT[free].mT @ left, U)
    X = _outside(X @ _inverse_root(X.mH @ X, FILL)[0], U)
    return _straighten(_straighten(X))


def complete(U: Tensor, columns: int) -> Tensor:
    """U `(..., n, k)`, orthonormal, and after its columns others, orthonormal to it and each other.

    They start from the DFT columns with the least energy in the span of U.
    """
    if columns == U.shape[-1]:
        return U
    n, k = U.shape[-2:]
    free = _least(U, columns - k)
    X = dft_basis(n, U).mT[free].mT
    return torch.cat([U, _filled(_outside(X, U), U)], -1)


def refine_span(
    H: Tensor, U: Tensor, V: Tensor, scalars: Tensor, sweeps: int = SWEEPS, hermitian: bool = False
) -> tuple[Tensor, Tensor]:
    """A step for each row of scalars; H of norm 1, U and V orthonormal."""
    for row in scalars.unbind(-2):
        U, V = refine_step(H, U, V, row, sweeps, hermitian)
    return U, V


def refine_svd(
    H: Tensor,
    U: Tensor,
    V: Tensor,
    steps: int,
    *,
    active: int | None = None,
    hermitian: bool = False,
    scalars: Tensor | None = None,
    sweeps: int = SWEEPS,
    orthonormal: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Singular triplets of H from approximate ones, by matrix products: `H ~ U diag(S) V^H`.

    The columns handed in are made orthonormal, with others in place of dependent ones; then `steps` times
    `refine_step` on the first `active` of them, at `H / |H|_F`; then one more rotation, orthonormality to
    rounding, and the measured S. The other columns are an orthonormal completion with S = 0. No step
    diverges: its rotations are nearly unitary, what it adds is orthogonal to the span and bounded. Nothing
    is denoised.

    Args:
        H: complex `(..., M, N)`, of any scale.
        U, V: complex `(..., M, r)`, `(..., N, r)`, r at most min(M, N), of any condition.
        steps: at least 0; with 0 the columns are only rotated inside their span.
        active: columns to refine, 1 to r; all when not given.
        hermitian: H is Hermitian: one factor serves both sides, V is not looked at, and V comes out as
            `U sign(d)` with `S = |d|`, d the eigenvalues. Where eigenvalues of both signs and like size
            compete for the last active columns, these may not settle; the general form has no such trouble.
        scalars: real `(rows, 4)`: softening of the rotations, shift mu, gain and bound of the residual, all
            positive; the last row serves all further steps. The untrained ones when not given.
        sweeps: rotations a step.
        orthonormal: the active columns of U and V are orthonormal already and are taken as they are.

    Returns:
        U complex `(..., M, r)`, S real `(..., r)`, not negative, largest first, V complex `(..., N, r)`. A
        zero sample has S = 0. NaN and Inf spread over their sample.

    Source: the first-order corrections of Ogita and Aishima, "Iterative refinement for singular value
    decomposition based on matrix multiplication", J. Comput. Appl. Math. 369 (2020), with the angles of
    Kogbetliantz (1955) for all pairs at once.
    """
    k = U.shape[-1] if active is None else active
    return refined(H, U, V, rows_of(scalars, steps, H), k, sweeps, hermitian, orthonormal)


def rows_of(scalars: Tensor | None, steps: int, like: Tensor) -> Tensor:
    """A row a step: the last one repeats, the untrained ones where none are given."""
    if scalars is None:
        return default_scalars(steps, like)
    return scalars[torch.arange(steps, device=scalars.device).clamp_max(len(scalars) - 1)]


def refined(
    H: Tensor,
    U: Tensor,
    V: Tensor,
    scalars: Tensor,
    k: int,
    sweeps: int,
    hermitian: bool,
    orthonormal: bool,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`refine_svd` with a row of scalars a step, and with the order of the columns where it is given."""
    r, steps = U.shape[-1], len(scalars)
    X, norm = unit_scale(H)
    U, V = U[..., :k], V[..., :k]
    if not orthonormal:
        U, V = orthonormal_fill(U), V if hermitian else orthonormal_fill(V)
    if hermitian:
        V = U
    U, V = refine_span(X, U, V, scalars, sweeps, hermitian)
    soft = scalars[-1, 0] if steps else default_scalars(1, H)[0, 0]
    U, S, V = refine_close(X, U, V, soft, sweeps, hermitian, order)
    return finish(U, S, V, norm, r, hermitian)


def finish(
    U: Tensor, S: Tensor, V: Tensor, norm: Tensor, columns: int, hermitian: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The completion, S back in the scale of H, and its signs moved into V."""
    U = complete(U, columns)
    sign = torch.where(S < 0, -1.0, 1.0)
    S, sign = (
        nn.functional.pad(x, (0, columns - S.shape[-1]), value=v) for x, v in ((S.abs(), 0), (sign, 1))
    )
    V = _scale(U, sign[..., None, :]) if hermitian else complete(V, columns)
    return U, S * norm[..., 0], V


class SpectralRefiner(nn.Module):
    """`refine_svd` with learned scalars, four a step; `forward(H, U, V)` returns U, S, V.

    Beyond the trained number of steps the last step's scalars repeat.

    Args:
        steps: trained steps, at least 1.
        rank: columns of U and V.
        active: columns to refine, at most rank; all when not given.
        hermitian: the tied form.
        sweeps: rotations a step.

    Raises:
        TypeError, ValueError: for another type or value of an argument, naming it.
    """

    functions: ClassVar[Any] = SimpleNamespace(refine_svd=refine_svd)

    def __init__(
        self,
        steps: int,
        rank: int,
        active: int | None = None,
        *,
        hermitian: bool = False,
        sweeps: int = SWEEPS,
    ) -> None:
        super().__init__()
        self.steps, self.rank = integer("steps", steps, 1), integer("rank", rank, 1)
        self.active = self.rank if active is None else integer("active", active, 1)
        if self.active > self.rank:
            raise ValueError(f"active must be at most rank = {rank}, got {active}")
        if not isinstance(hermitian, bool):
            raise TypeError(f"hermitian must be True or False, got {hermitian!r}")
        self.hermitian, self.sweeps = hermitian, integer("sweeps", sweeps, 1)
        self.raw = nn.Parameter(torch.empty(self.steps, len(SCALARS)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The untrained scalars."""
        with torch.no_grad():
            share = default_scalars(self.steps, self.raw) / self.raw.new_tensor(LIMITS)
            self.raw.copy_(torch.logit(share))

    @property
    def scalars(self) -> Tensor:
        """`(steps, 4)`, each between 0 and its limit."""
        return torch.sigmoid(self.raw) * self.raw.new_tensor(LIMITS)

    def forward(
        self, H: Tensor, U: Tensor, V: Tensor, steps: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if U.shape[-1] != self.rank:
            raise ValueError(f"U must have rank = {self.rank} columns, got {U.shape[-1]}")
        return self.functions.refine_svd(
            H,
            U,
            V,
            self.steps if steps is None else steps,
            active=self.active,
            hermitian=self.hermitian,
            scalars=self.scalars,
            sweeps=self.sweeps,
        )

    def extra_repr(self) -> str:
        return (
            f"steps={self.steps}, rank={self.rank}, active={self.active}, hermitian={self.hermitian}, "
            f"sweeps={self.sweeps}"
        )
