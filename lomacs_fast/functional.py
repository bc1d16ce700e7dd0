"""The public functions, F-style: arguments are checked, then the call is served by the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import reference
from .reference import AEPlusTerms

__all__ = [
    "AEPlusTerms",
    "aeplus_loss",
    "bjorck",
    "column_normalize",
    "dual_view_project",
    "freq_gate",
    "gated_conv1d",
    "low_rank_loss",
    "ortho_refine",
    "projected_attention",
    "spectral_calibrate",
    "spectral_gate",
]

REAL = (torch.float32, torch.float64)
COMPLEX = (torch.complex64, torch.complex128)
HALF = (torch.bfloat16, torch.float16)

Fn = TypeVar("Fn", bound=Callable[..., Any])


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)


def _tensor(
    name: str, value: Any, dtypes: Sequence[torch.dtype], shape: Sequence[int | str | None]
) -> Tensor:
    """Check dtype and shape; `None` is any size, a leading `"..."` any number of batch dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must be {_names(dtypes)}, got {str(value.dtype).removeprefix('torch.')}")
    sizes = shape[1:] if shape and shape[0] == "..." else shape
    given = value.shape[value.ndim - len(sizes) :] if len(sizes) <= value.ndim else ()
    exact = len(sizes) == len(shape)
    fits = len(given) == len(sizes) and (not exact or value.ndim == len(sizes))
    if not fits or any(want is not None and want != got for want, got in zip(sizes, given, strict=True)):
        wanted = ", ".join("*" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} must have shape ({wanted}), got {tuple(value.shape)}")
    return value


def _specified_by(specification: Callable[..., Any]) -> Callable[[Fn], Fn]:
    """Give a public function the docstring of its specification, and what it adds to it."""

    def decorate(fn: Fn) -> Fn:
        fn.__doc__ = (
            f"{(specification.__doc__ or '').rstrip()}\n\n    Raises:\n        TypeError, ValueError: for an "
            "argument of another type, dtype or shape, naming it.\n    "
        )
        return fn

    return decorate


def _like(name: str, value: Tensor, other_name: str, dtype: torch.dtype) -> None:
    if value.dtype != dtype:
        raise TypeError(
            f"{name} must be {_names([dtype])} to go with {other_name}, got {_names([value.dtype])}"
        )


def _gate_weights(
    M: int, N: int, row_w1: Tensor, row_w2: Tensor, col_w1: Tensor, col_w2: Tensor, temperature: float
) -> None:
    _tensor("row_w1", row_w1, REAL, (None, M))
    _tensor("row_w2", row_w2, REAL, (M, row_w1.shape[0]))
    _tensor("col_w1", col_w1, REAL, (None, N))
    _tensor("col_w2", col_w2, REAL, (N, col_w1.shape[0]))
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


@_specified_by(reference.spectral_gate)
def spectral_gate(
    Hf: Tensor, row_w1: Tensor, row_w2: Tensor, col_w1: Tensor, col_w2: Tensor, temperature: float
) -> Tensor:
    _tensor("Hf", Hf, COMPLEX, ("...", None, None))
    _gate_weights(Hf.shape[-2], Hf.shape[-1], row_w1, row_w2, col_w1, col_w2, temperature)
    return reference.spectral_gate(Hf, row_w1, row_w2, col_w1, col_w2, temperature)


@_specified_by(reference.freq_gate)
def freq_gate(
    H: Tensor, row_w1: Tensor, row_w2: Tensor, col_w1: Tensor, col_w2: Tensor, temperature: float
) -> Tensor:
    _tensor("H", H, COMPLEX, ("...", None, None))
    _gate_weights(H.shape[-2], H.shape[-1], row_w1, row_w2, col_w1, col_w2, temperature)
    return reference.freq_gate(H, row_w1, row_w2, col_w1, col_w2, temperature)


@_specified_by(reference.dual_view_project)
def dual_view_project(Hd: Tensor, weight: Tensor, bias: Tensor, pos: Tensor) -> Tensor:
    _tensor("Hd", Hd, COMPLEX, (None, None, None))
    M, N = Hd.shape[-2:]
    if min(M, N) < 2:
        raise ValueError(f"Hd must be at least 2 x 2 (the coarse map pools 2x2), got {M} x {N}")
    _tensor("weight", weight, REAL, (None, 4 * N))
    _tensor("bias", bias, REAL, (weight.shape[0],))
    _tensor("pos", pos, REAL, (1, M, weight.shape[0]))
    return reference.dual_view_project(Hd, weight, bias, pos)


@_specified_by(reference.projected_attention)
def projected_attention(
    x: Tensor,
    wq: Tensor | Sequence[Tensor],
    wk: Tensor | Sequence[Tensor],
    wv: Tensor | Sequence[Tensor],
    wo: Tensor | Sequence[Tensor],
    pk: Tensor | Sequence[Tensor],
    pv: Tensor | Sequence[Tensor],
) -> Tensor:
    dtypes = REAL + HALF
    _tensor("x", x, dtypes, (None, None, None))
    T, d = x.shape[-2:]
    G = len(wq)
    if G < 1 or d % G:
        raise ValueError(f"wq must hold a number of groups that divides d = {d}, got {G}")
    g = d // G
    att_dim, k_len = wq[0].shape[0], pk[0].shape[-1]
    shapes = {"wq": (att_dim, g), "wk": (att_dim, g), "wv": (g, g), "wo": (g, g)}
    shapes |= {"pk": (T, k_len), "pv": (T, k_len)}
    weights = {"wq": wq, "wk": wk, "wv": wv, "wo": wo, "pk": pk, "pv": pv}
    for name, shape in shapes.items():
        group = weights[name]
        if len(group) != G:
            raise ValueError(f"{name} must hold {G} groups as wq does, got {len(group)}")
        if isinstance(group, Tensor):
            _tensor(name, group, dtypes, (G, *shape))
        else:
            for i, weight in enumerate(group):
                _tensor(f"{name}[{i}]", weight, dtypes, shape)
    return reference.projected_attention(x, wq, wk, wv, wo, pk, pv)


@_specified_by(reference.gated_conv1d)
def gated_conv1d(x: Tensor, dw_weight: Tensor, dw_bias: Tensor, pw_weight: Tensor, pw_bias: Tensor) -> Tensor:
    dtypes = REAL + HALF
    _tensor("x", x, dtypes, (None, None, None))
    d = x.shape[-1]
    _tensor("dw_weight", dw_weight, dtypes, (2 * d, 1, None))
    if dw_weight.shape[-1] % 2 == 0:
        raise ValueError(f"dw_weight must have an odd number of taps, got {dw_weight.shape[-1]}")
    _tensor("dw_bias", dw_bias, dtypes, (2 * d,))
    _tensor("pw_weight", pw_weight, dtypes, (d, d, 1))
    _tensor("pw_bias", pw_bias, dtypes, (d,))
    return reference.gated_conv1d(x, dw_weight, dw_bias, pw_weight, pw_bias)


@_specified_by(reference.column_normalize)
def column_normalize(U: Tensor) -> Tensor:
    _tensor("U", U, REAL + COMPLEX, ("...", None, None))
    return reference.column_normalize(U)


@_specified_by(reference.ortho_refine)
def ortho_refine(U: Tensor, step: Tensor | float) -> Tensor:
    _tensor("U", U, REAL + COMPLEX, ("...", None, None))
    return reference.ortho_refine(U, step)


@_specified_by(reference.bjorck)
def bjorck(U: Tensor, steps: int, order: int = 1) -> Tensor:
    _tensor("U", U, REAL + COMPLEX, ("...", None, None))
    if U.shape[-2] < U.shape[-1]:
        raise ValueError(
            f"U must have at least as many rows as columns to be orthonormalised, got {tuple(U.shape)}"
        )
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}")
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order}")
    return reference.bjorck(U, steps, order)


def _factors(U: Tensor, V: Tensor, H: Tensor) -> int:
    """Check `U (..., M, r)`, `V (..., N, r)` against `H (..., M, N)`; the number of columns."""
    _tensor("H", H, REAL + COMPLEX, ("...", None, None))
    M, N = H.shape[-2:]
    for name, X, size in (("U", U, M), ("V", V, N)):
        _tensor(name, X, REAL + COMPLEX, ("...", size, U.shape[-1]))
        _like(name, X, "H", H.dtype)
    return U.shape[-1]


@_specified_by(reference.spectral_calibrate)
def spectral_calibrate(U: Tensor, H: Tensor, V: Tensor, S_pred: Tensor, tau: Tensor | float) -> Tensor:
    _tensor("S_pred", S_pred, REAL, ("...", _factors(U, V, H)))
    return reference.spectral_calibrate(U, H, V, S_pred, tau)


@_specified_by(reference.aeplus_loss)
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
    _tensor("S", S, REAL, ("...", _factors(U, V, H)))
    return reference.aeplus_loss(
        U, S, V, H, lam=lam, w_energy=w_energy, w_diag=w_diag, w_match=w_match, match=match
    )


@_specified_by(reference.low_rank_loss)
def low_rank_loss(
    F: Tensor, G: Tensor, H: Tensor, nesting: str = "none", *, shape: tuple[int, int] | None = None
) -> Tensor:
    _tensor("H", H, REAL + COMPLEX, ("...", None, None))
    M, N = H.shape[-2:]
    _tensor("G", G, REAL + COMPLEX, ("...", M, None))
    _tensor("F", F, REAL + COMPLEX, ("...", N, G.shape[-1]))
    if shape is not None and (shape[0] < M or shape[1] < N):
        raise ValueError(f"shape must be at least that of the block, {(M, N)}, got {tuple(shape)}")
    return reference.low_rank_loss(F, G, H, nesting, shape=shape)
