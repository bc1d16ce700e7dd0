"""Orthogonality without decompositions: column normalisation, the neural refiner, Björck iterations."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .arguments import integer, number

# (coefficients of I, G, G^2; bound on |U|_2 that the scaling guarantees): converges below sqrt(3), sqrt(7/3)
BJORCK = {1: ((1.5, -0.5), 1.6), 2: ((1.875, -1.25, 0.375), 1.5)}


def gram_residual(U: Tensor) -> Tensor:
    """`U^H U - I`, `(..., r, r)`."""
    return U.mH @ U - torch.eye(U.shape[-1], dtype=U.dtype, device=U.device)


def column_normalize(U: Tensor) -> Tensor:
    """Columns divided by (norm + 1e-8); a zero column stays zero. U real or complex `(..., M, r)`."""
    return U / (torch.linalg.vector_norm(U, dim=-2, keepdim=True) + 1e-8)


def ortho_refine(U: Tensor, step: Tensor | float) -> Tensor:
    """One refinement step, `column_normalize(U - step * U sym(U^H U - I))`, `sym(G) = (G + G^H) / 2`.

    U real or complex `(..., M, r)`, M >= r; step a real scalar in (0, 0.5].
    """
    residual = gram_residual(U)
    return column_normalize(U - step * (U @ (0.5 * (residual + residual.mH))))


def ortho_refine_pair(U: Tensor, V: Tensor, a: Tensor | float, b: Tensor | float) -> tuple[Tensor, Tensor]:
    """One step of `ortho_refine` on both factors, U by `a` and V by `b`.

    U, V real or complex `(..., M, r)` and `(..., N, r)` of one batch, rank and dtype, r at most M and N; a, b
    real scalars in (0, 0.5].
    """
    return ortho_refine(U, a), ortho_refine(V, b)


def bjorck(U: Tensor, steps: int, order: int = 1) -> Tensor:
    """Björck's iteration towards the nearest matrix with orthonormal columns.

    First `U <- U min(1, c / sqrt(max row sum of |U^H U|))`, which brings the spectral norm to at most c,
    inside the region of convergence; then `steps` times, with `G = U^H U`,

    - order 1 (c = 1.6): `U <- U (3/2 I - 1/2 G)`,
    - order 2 (c = 1.5): `U <- U (15/8 I - 5/4 G + 3/8 G^2)`.

    U real or complex `(..., M, r)`, M >= r; zero steps return the scaled input. Source: Björck and Bowie,
    SIAM J. Numer. Anal. 8 (1971), "An iterative algorithm for computing the best estimate of an orthogonal
    matrix".
    """
    coefficients, bound = BJORCK[order]
    row_sum = (U.mH @ U).abs().sum(-1).amax(-1)[..., None, None]
    U = U * (bound / row_sum.clamp_min(bound * bound).sqrt())
    for _ in range(steps):
        G = U.mH @ U
        power, update = U, coefficients[0] * U
        for c in coefficients[1:]:
            power = power @ G
            update = update + c * power
        U = update
    return U


class NeuralOrthoRefiner(nn.Module):
    """Refinement steps on each factor with learned sizes; `forward(U, V)` returns both.

    `a = max_scale * sigmoid(a_raw)` for U and `b` from `b_raw` for V, all in (0, max_scale). The parameters
    are 0-d for one step, the published module, and `(steps,)` for more, one size a step in order.

    Args:
        init_scale: first value of all sizes, in (0, max_scale).
        max_scale: their upper bound, at most 0.5.
        steps: refinement steps, at least 1.

    Raises:
        TypeError, ValueError: for another type or value of an argument, naming it.
    """

    functions: ClassVar[Any] = SimpleNamespace(ortho_refine_pair=ortho_refine_pair)

    def __init__(self, init_scale: float = 0.1, max_scale: float = 0.5, steps: int = 1) -> None:
        super().__init__()
        init_scale, max_scale = number("init_scale", init_scale), number("max_scale", max_scale)
        if not 0 < max_scale <= 0.5:
            raise ValueError(f"max_scale must lie in (0, 0.5], got {max_scale}")
        if not 0 < init_scale < max_scale:
            raise ValueError(f"init_scale must lie in (0, max_scale={max_scale}), got {init_scale}")
        self.init_scale, self.max_scale = init_scale, max_scale
        steps = integer("steps", steps, 1)
        shape = () if steps == 1 else (steps,)
        self.a_raw = nn.Parameter(torch.empty(shape))
        self.b_raw = nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All sizes at `init_scale`."""
        share = self.init_scale / self.max_scale
        for raw in (self.a_raw, self.b_raw):
            nn.init.constant_(raw, math.log(share / (1 - share)))

    @property
    def steps(self) -> tuple[Tensor, Tensor]:
        """The step sizes a and b, each of its parameter's shape."""
        return self.max_scale * torch.sigmoid(self.a_raw), self.max_scale * torch.sigmoid(self.b_raw)

    def forward(self, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
        a, b = (sizes.reshape(-1).unbind() for sizes in self.steps)
        for of_u, of_v in zip(a, b, strict=True):
            U, V = self.functions.ortho_refine_pair(U, V, of_u, of_v)
        return U, V

    def extra_repr(self) -> str:
        more = f", steps={self.a_raw.numel()}" if self.a_raw.ndim else ""
        return f"init_scale={self.init_scale}, max_scale={self.max_scale}{more}"
