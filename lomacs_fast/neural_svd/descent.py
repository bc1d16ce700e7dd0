"""Descent of a table on the whole objective: one pass over the matrix a step, however large it is."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lomacs_fast import functional
from lomacs_fast.reference.neural_svd import DAMPING, ORDER, STEPS, neural_svd_update, stepsize

from .extraction import frobenius, orthonormalize
from .sources import MatrixSource

__all__ = ["Descent", "Held", "State", "Streamed", "descend"]

PATIENCE = 12  # steps without a tenth less of change, after which nothing more is expected
CHUNK = 2  # steps of a batch between two looks at their change


class Held:
    """Matrices `(..., M, N)` in memory."""

    def __init__(self, H: Tensor) -> None:
        self.H = H
        self.square = frobenius(H).double().square()

    def product(self, F: Tensor) -> Tensor:
        return self.H @ F

    def sweep(self, F: Tensor) -> tuple[Tensor, Tensor]:
        """`G = H F` and `H^H G`."""
        G = self.H @ F
        return G, self.H.mH @ G

    def residual(self, U: Tensor, S: Tensor, V: Tensor) -> Tensor:
        """`|H - U diag(S) V^H|`."""
        return frobenius(self.H - (U * S[..., None, :]) @ V.mH)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64


class Streamed:
    """A matrix read strip by strip, by every process its share of the rows; sums go through all."""

    def __init__(self, source: MatrixSource) -> None:
        self.source = source
        self.processes, self.rank = (dist.get_world_size(), dist.get_rank()) if _grouped() else (1, 0)
        M = source.shape[0]
        self.begin, self.end = (M * k // self.processes for k in (self.rank, self.rank + 1))
        self.square: Tensor | None = None

    def product(self, F: Tensor) -> Tensor:
        return self._pass(F, False)[0]

    def sweep(self, F: Tensor) -> tuple[Tensor, Tensor]:
        """`G = H F` and `H^H G` in one pass; the first pass also sums the squares of H."""
        return self._pass(F, True)

    def _pass(self, F: Tensor, both: bool) -> tuple[Tensor, Tensor]:
        (M, N), L = self.source.shape, F.shape[-1]
        G, Z = F.new_zeros(M, L), F.new_zeros(N, L if both else 0)
        if not self.source.has_blocks:
            G = self.source @ F
            return G, self.source.adjoint(G) if both else Z
        square = torch.zeros((), dtype=torch.float64) if self.square is None else None
        for i, X in self.source.strips(self.begin, self.end):
            part = torch.matmul(X, F, out=G[i : i + len(X)])
            if both:
                Z += X.mH @ part
            if square is not None:
                square += frobenius(X).double().square()
        self._sum(G)
        if both:
            self._sum(Z)
        if square is not None:
            self._sum(square)
            if not bool(square.isfinite()):
                raise ValueError("H must be finite, it holds NaN or Inf")
            self.square = square
        return G, Z

    def residual(self, U: Tensor, S: Tensor, V: Tensor) -> Tensor:
        """`|H - U diag(S) V^H|` in one pass; a NaN for a linear operator, which has no entries."""
        total = torch.zeros((), dtype=torch.float64)
        if not self.source.has_blocks:
            return total * float("nan")
        right = (V * S).mH
        for i, X in self.source.strips(self.begin, self.end):
            error = torch.addmm(X, U[i : i + len(X)], right, alpha=-1)
            total += frobenius(error).double().square()
        self._sum(total)
        return total.sqrt()

    def _sum(self, x: Tensor) -> None:
        if self.processes > 1:
            dist.all_reduce(torch.view_as_real(x) if x.is_complex() else x)


def _grouped() -> bool:
    """Whether there are other processes; under a launcher that left it to us, the group is made here."""
    if not dist.is_available():
        return False
    if not dist.is_initialized() and "TORCHELASTIC_RUN_ID" in os.environ:
        dist.init_process_group("gloo")
    return dist.is_initialized() and dist.get_world_size() > 1


def coupled(G: Tensor, nesting: str) -> tuple[Tensor, Tensor]:
    """The objective at `G = H F` with F orthonormal, and `G^H G`, by the fused objective.

    In the coordinates of F's columns the matrix is G and F is the identity: a problem of L columns whose
    gradient has `-2 (w_k - w_j) C_jk` below the diagonal, as the whole one has along `F_j`.
    """
    L = G.shape[-1]
    eye = torch.eye(L, dtype=G.dtype, device=G.device).expand(*G.shape[:-2], L, L)
    with torch.enable_grad():
        leaf = eye.detach().clone().requires_grad_()
        G = G.detach()
        loss = functional.low_rank_loss(leaf, G, G, "joint" if nesting == "joint" else "sequential")
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    below = gradient.tril(-1) / -2
    if nesting == "joint":
        k = torch.arange(L, device=G.device)
        apart = (k[:, None] - k[None, :]).clamp_min(1).to(loss.dtype)
        below = below * (L / apart)
    squares = torch.linalg.vector_norm(G, dim=-2).square()
    return loss.detach(), below + below.mH + torch.diag_embed(squares.to(G.dtype))


def _nested_step(F: Tensor, Z: Tensor, C: Tensor, watch: int) -> tuple[Tensor, Tensor]:
    D = Z - F @ C
    change = stepsize(torch.linalg.vector_norm(D, dim=-2), C, watch)
    return neural_svd_update(F, D, C, functional.bjorck), change


def _free_step(F: Tensor, Z: Tensor, C: Tensor, watch: int) -> tuple[Tensor, Tensor]:
    """A step without nesting, `F + (I - F F^H) Z C^-1`: the gradient over its curvature `2 C`."""
    wide = _wide(C.dtype)
    damping = DAMPING * torch.finfo(C.dtype).eps * C.diagonal(dim1=-2, dim2=-1).real.amax(-1)
    damping = damping.clamp_min(torch.finfo(damping.dtype).tiny).to(wide)[..., None, None]
    eye = torch.eye(C.shape[-1], dtype=wide, device=C.device)
    Y = (Z - F @ C) @ torch.linalg.inv(C.to(wide) + damping * eye).to(C.dtype)
    size = torch.linalg.vector_norm(Y, dim=-2)
    return functional.bjorck(F + Y / size.clamp_min(1)[..., None, :], STEPS, ORDER), size.amax(-1)


class State(NamedTuple):
    """A descent between two steps: all that the rest of it depends on."""

    F: Tensor
    step: int
    history: dict[str, list[float]]


class Descent(NamedTuple):
    F: Tensor
    G: Tensor
    history: dict[str, list[float]]
    steps: int
    converged: bool


def _stalled(changes: list[float]) -> bool:
    if len(changes) <= PATIENCE:
        return False
    return min(changes[-PATIENCE:]) > 0.9 * min(changes[:-PATIENCE])


def descend(
    H: Held | Streamed,
    F: Tensor,
    watch: int,
    nesting: str,
    *,
    tol: float,
    max_steps: int,
    state: State | None = None,
    after: Callable[[State, float], None] | None = None,
    together: bool = False,
) -> Descent:
    """Steps from F until the first `watch` columns change by less than `tol`, or do not improve any more.

    Args:
        H: the matrix or matrices.
        F: orthonormal `(..., N, L)`.
        watch: columns that are judged; the others speed them up.
        nesting: "none", "joint" or "sequential".
        tol, max_steps: when to end.
        state: where to go on instead of beginning from F.
        after: called after every step.
        together: a batch by the fused steps.
    """
    history: dict[str, list[float]] = {"loss": [], "change": []}
    step = 0
    if state is not None:
        F, step, history = state
    if together:
        assert isinstance(H, Held)
        converged = False
        while step < max_steps:
            count = min(CHUNK, max_steps - step)
            F, change = functional.neural_svd_steps(H.H, F, count, watch)
            step += count
            worst = float(change.amax()) if change.numel() else 0.0
            history["change"] += [worst] * count
            if after is not None:
                after(State(F, step, history), worst)
            converged = worst <= tol
            if converged or _stalled(history["change"]):
                break
        G = H.product(F)
        history["loss"].append(float(coupled(G, nesting)[0].sum()))
        return Descent(F, G, history, step, converged)
    while True:
        G, Z = H.sweep(F)
        loss, C = coupled(G, nesting)
        F_next, found = (_nested_step if nesting != "none" else _free_step)(F, Z, C, watch)
        worst = float(found.amax())
        history["loss"].append(float(loss.sum()))
        history["change"].append(worst)
        if worst <= tol or step >= max_steps or _stalled(history["change"]):
            return Descent(F, G, history, step, worst <= tol)
        F, step = F_next, step + 1
        if after is not None:
            after(State(F, step, history), worst)


def start(
    like: Tensor, batch: Any, n: int, L: int, generator: torch.Generator, given: Tensor | None = None
) -> Tensor:
    """Orthonormal `(..., n, L)`: the columns given, then random ones."""
    have = 0 if given is None else min(given.shape[-1], L)
    random = torch.randn(n, L - have, dtype=like.dtype, generator=generator).to(like.device)
    if given is None:
        # the same for every matrix, whatever else is in its batch
        return orthonormalize(random).expand(*batch, n, L).contiguous()
    X = given[..., :have].to(like.dtype)
    if have == L:
        return orthonormalize(X)
    return orthonormalize(torch.cat([X, random - X @ (X.mH @ random)], -1))
