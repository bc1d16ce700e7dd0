"""The public functions, F-style: arguments are checked, then an op or the reference serves the call."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor

from . import ops, reference
from .ops.common import REAL, REAL_OF
from .reference import AEPlusTerms
from .reference.arguments import integer
from .reference.backbone import AttentionBlock, Block, ConvBlock, FoldedAttention
from .reference.frozen import FrozenAngular, FrozenWeights
from .reference.precision import autocast
from .reference.projected_attention import Grouped
from .reference.refine import SWEEPS

__all__ = [
    "AEPlusTerms",
    "AttentionBlock",
    "ConvBlock",
    "FoldedAttention",
    "aeplus_loss",
    "backbone",
    "bjorck",
    "column_normalize",
    "dual_view_project",
    "freq_gate",
    "gate_project",
    "gated_conv1d",
    "low_rank_loss",
    "neural_svd_steps",
    "ortho_refine",
    "ortho_refine_pair",
    "projected_attention",
    "refine_svd",
    "spectral_calibrate",
    "spectral_gate",
    "svd_heads",
    "svd_tail",
]

COMPLEX = tuple(REAL_OF)
HALF = (torch.bfloat16, torch.float16)
# torch 2.10 cannot trace a look at a union
BLOCKS = AttentionBlock, FoldedAttention, ConvBlock

Fn = TypeVar("Fn", bound=Callable[..., Any])


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)


def _tensor(
    name: str, value: Any, dtypes: Sequence[torch.dtype], shape: Sequence[int | str | None]
) -> Tensor:
    """Check dtype and shape.

    `None` is any size but 0, `"B"` any size, a leading `"..."` any number of batch dimensions of any size.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must be {_names(dtypes)}, got {str(value.dtype).removeprefix('torch.')}")
    sizes = shape[1:] if shape and shape[0] == "..." else shape
    given = value.shape[value.ndim - len(sizes) :] if len(sizes) <= value.ndim else ()
    exact = len(sizes) == len(shape)
    fits = len(given) == len(sizes) and (not exact or value.ndim == len(sizes))
    if fits:
        pairs = list(zip(sizes, given, strict=True))
        fits = all(want in (None, "B") or want == got for want, got in pairs)
    if not fits:
        wanted = ", ".join("*" if want is None else str(want) for want in shape) + "," * (len(shape) == 1)
        raise ValueError(f"{name} must have shape ({wanted}), got {tuple(value.shape)}")
    if any(want is None and got == 0 for want, got in pairs):
        raise ValueError(f"{name} must have no empty dimension but the batch, got {tuple(value.shape)}")
    return value


def _number(name: str, value: Any) -> None:
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a real number, got {type(value).__name__}")


def _scalar(name: str, value: Any) -> bool:
    """Check for a number or a real 0-d tensor; True for a number, whose value can be looked at for free."""
    if not isinstance(value, Tensor):
        if not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a real number or a 0-d tensor, got {type(value).__name__}")
        return True
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be real, got {_names([value.dtype])}")
    if value.ndim:
        raise ValueError(f"{name} must be a number or a 0-d tensor, got shape {tuple(value.shape)}")
    return False


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


def _weight(
    name: str, value: Any, other: tuple[str, Tensor], shape: Sequence[int | str | None], mixed: bool = False
) -> Tensor:
    """Check a real weight that must have the precision of `other`, unless `mixed` precisions are in order."""
    dtype = other[1].dtype
    # what fits is said quickly
    if isinstance(value, Tensor) and value.shape == shape and value.dtype == dtype in REAL + HALF:
        return value
    _tensor(name, value, REAL + HALF, shape)
    if not mixed:
        _like(name, value, other[0], REAL_OF.get(dtype, dtype))
    return value


def _norm(x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float, mixed: bool) -> None:
    """Check the layer normalisation of a residual block."""
    if norm_weight is None:
        if norm_bias is not None:
            raise ValueError("norm_bias must be left out where norm_weight is")
        return
    _affine(x, norm_weight, norm_bias, mixed)
    _eps(eps)


def _affine(x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, mixed: bool) -> None:
    for name, value in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if value is not None:
            _weight(name, value, ("x", x), (x.shape[-1],), mixed)


def _eps(eps: float) -> None:
    _number("eps", eps)
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")


def _gate_weights(
    name: str, X: Tensor, row_w1: Tensor, row_w2: Tensor, col_w1: Tensor, col_w2: Tensor, temperature: float
) -> None:
    _tensor(name, X, COMPLEX, ("...", None, None))
    M, N = X.shape[-2:]
    _weight("row_w1", row_w1, (name, X), (None, M))
    _weight("row_w2", row_w2, (name, X), (M, row_w1.shape[0]))
    _weight("col_w1", col_w1, (name, X), (None, N))
    _weight("col_w2", col_w2, (name, X), (N, col_w1.shape[0]))
    _number("temperature", temperature)
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


@_specified_by(reference.spectral_gate)
def spectral_gate(
    Hf: Tensor, row_w1: Tensor, row_w2: Tensor, col_w1: Tensor, col_w2: Tensor, temperature: float
) -> Tensor:
    _gate_weights("Hf", Hf, row_w1, row_w2, col_w1, col_w2, temperature)
    return reference.spectral_gate(Hf, row_w1, row_w2, col_w1, col_w2, temperature)


def _boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")


@overload
def freq_gate(
    H: Tensor,
    row_w1: Tensor,
    row_w2: Tensor,
    col_w1: Tensor,
    col_w2: Tensor,
    temperature: float,
    *,
    normalize: Literal[False] = False,
) -> Tensor: ...


@overload
def freq_gate(
    H: Tensor,
    row_w1: Tensor,
    row_w2: Tensor,
    col_w1: Tensor,
    col_w2: Tensor,
    temperature: float,
    *,
    normalize: bool,
) -> Any: ...


@_specified_by(reference.freq_gate)
def freq_gate(
    H: Tensor,
    row_w1: Tensor,
    row_w2: Tensor,
    col_w1: Tensor,
    col_w2: Tensor,
    temperature: float,
    *,
    normalize: bool = False,
) -> Any:
    _gate_weights("H", H, row_w1, row_w2, col_w1, col_w2, temperature)
    _boolean("normalize", normalize)
    return ops.freq_gate(H, row_w1, row_w2, col_w1, col_w2, temperature, normalize)


def _projection_weights(name: str, Hd: Tensor, weight: Tensor, bias: Tensor, pos: Tensor) -> None:
    _tensor(name, Hd, COMPLEX, ("B", None, None))
    M, N = Hd.shape[-2:]
    if min(M, N) < 2:
        raise ValueError(f"{name} must be at least 2 x 2 (the coarse map pools 2x2), got {M} x {N}")
    _weight("weight", weight, (name, Hd), (None, 4 * N))
    _weight("bias", bias, (name, Hd), (weight.shape[0],))
    _weight("pos", pos, (name, Hd), (1, M, weight.shape[0]))


@_specified_by(reference.dual_view_project)
def dual_view_project(Hd: Tensor, weight: Tensor, bias: Tensor, pos: Tensor) -> Tensor:
    _projection_weights("Hd", Hd, weight, bias, pos)
    return ops.dual_view_project(Hd, weight, bias, pos)


@_specified_by(reference.gate_project)
def gate_project(
    H: Tensor,
    row_w1: Tensor,
    row_w2: Tensor,
    col_w1: Tensor,
    col_w2: Tensor,
    temperature: float,
    weight: Tensor,
    bias: Tensor,
    pos: Tensor,
    *,
    normalize: bool = False,
) -> tuple[Tensor, ...]:
    _projection_weights("H", H, weight, bias, pos)
    _gate_weights("H", H, row_w1, row_w2, col_w1, col_w2, temperature)
    _boolean("normalize", normalize)
    return ops.gate_project(H, row_w1, row_w2, col_w1, col_w2, temperature, weight, bias, pos, normalize)


def _grouped(
    name: str, value: Any, x: Tensor, G: int | None, shape: tuple[int | None, int | None], mixed: bool
) -> tuple[int, ...]:
    """Check one weight a group, stacked or in a list; the shape that they have stacked."""
    if isinstance(value, Tensor):
        return tuple(_weight(name, value, ("x", x), (G, *shape), mixed).shape)
    if not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a tensor or a sequence of tensors, got {type(value).__name__}")
    if not value or (G is not None and len(value) != G):
        wanted = "at least one group" if G is None else f"{G} groups as wq does"
        raise ValueError(f"{name} must hold {wanted}, got {len(value)}")
    sizes: Sequence[int | None] = shape
    dtype = x.dtype
    for i, weight in enumerate(value):
        # a name for every group would cost more than the look
        if not (isinstance(weight, Tensor) and weight.shape == sizes and weight.dtype == dtype):
            sizes = _weight(f"{name}[{i}]", weight, ("x", x), sizes, mixed).shape
    return (len(value), *value[0].shape)


@_specified_by(reference.projected_attention)
def projected_attention(
    x: Tensor,
    wq: Tensor | Sequence[Tensor],
    wk: Tensor | Sequence[Tensor],
    wv: Tensor | Sequence[Tensor],
    wo: Tensor | Sequence[Tensor],
    pk: Tensor | Sequence[Tensor],
    pv: Tensor | Sequence[Tensor],
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    y = ops.projected_attention_at_once(x, wq, wk, wv, wo, pk, pv, norm_weight, norm_bias, eps)
    if y is not None:
        return y
    _tensor("x", x, REAL + HALF, ("B", None, None))
    mixed = autocast(x.device.type)
    _attention_weights(x, wq, wk, wv, wo, pk, pv, mixed)
    _norm(x, norm_weight, norm_bias, eps, mixed)
    return ops.projected_attention(x, wq, wk, wv, wo, pk, pv, norm_weight, norm_bias, eps)


def _attention_weights(
    x: Tensor, wq: Grouped, wk: Grouped, wv: Grouped, wo: Grouped, pk: Grouped, pv: Grouped, mixed: bool
) -> None:
    T, d = x.shape[-2:]
    G, att_dim, _ = _grouped("wq", wq, x, None, (None, None), mixed)
    if d % G:
        raise ValueError(f"wq must hold a number of groups that divides d = {d}, got {G}")
    g = d // G
    _grouped("wq", wq, x, G, (att_dim, g), mixed)
    _grouped("wk", wk, x, G, (att_dim, g), mixed)
    _grouped("wv", wv, x, G, (g, g), mixed)
    _grouped("wo", wo, x, G, (g, g), mixed)
    k_len = _grouped("pk", pk, x, G, (T, None), mixed)[-1]
    _grouped("pv", pv, x, G, (T, k_len), mixed)


@_specified_by(reference.gated_conv1d)
def gated_conv1d(
    x: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor,
    pw_weight: Tensor,
    pw_bias: Tensor,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    y = ops.gated_conv1d_at_once(x, dw_weight, dw_bias, pw_weight, pw_bias, norm_weight, norm_bias, eps)
    if y is not None:
        return y
    _tensor("x", x, REAL + HALF, ("B", None, None))
    mixed = autocast(x.device.type)
    _conv_weights(x, dw_weight, dw_bias, pw_weight, pw_bias, mixed)
    _norm(x, norm_weight, norm_bias, eps, mixed)
    return ops.gated_conv1d(x, dw_weight, dw_bias, pw_weight, pw_bias, norm_weight, norm_bias, eps)


def _conv_weights(
    x: Tensor, dw_weight: Tensor, dw_bias: Tensor, pw_weight: Tensor, pw_bias: Tensor, mixed: bool
) -> None:
    d = x.shape[-1]
    _weight("dw_weight", dw_weight, ("x", x), (2 * d, 1, None), mixed)
    if dw_weight.shape[-1] % 2 == 0:
        raise ValueError(f"dw_weight must have an odd number of taps, got {dw_weight.shape[-1]}")
    _weight("dw_bias", dw_bias, ("x", x), (2 * d,), mixed)
    _weight("pw_weight", pw_weight, ("x", x), (d, d, 1), mixed)
    _weight("pw_bias", pw_bias, ("x", x), (d,), mixed)


def _folded_weights(x: Tensor, score: Tensor, mix: Tensor, pk: Tensor, pv: Tensor, mixed: bool) -> None:
    T, d = x.shape[-2:]
    G = _weight("score", score, ("x", x), (None, None, None), mixed).shape[0]
    if d % G:
        raise ValueError(f"score must hold a number of groups that divides d = {d}, got {G}")
    _weight("score", score, ("x", x), (G, d // G, d // G), mixed)
    _weight("mix", mix, ("x", x), (G, d // G, d // G), mixed)
    k_len = _weight("pk", pk, ("x", x), (G, T, None), mixed).shape[-1]
    _weight("pv", pv, ("x", x), (G, T, k_len), mixed)


_MIXERS = SimpleNamespace(projected_attention=projected_attention, gated_conv1d=gated_conv1d)


def _at_once(x: Tensor) -> bool:
    """Whether one launch may take all blocks; elsewhere one call for all of them gains nothing."""
    return x.is_cuda


@_specified_by(reference.backbone)
def backbone(
    x: Tensor,
    blocks: Sequence[Block],
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    _tensor("x", x, REAL + HALF, ("B", None, None))
    mixed = autocast(x.device.type)
    _affine(x, norm_weight, norm_bias, mixed)
    _eps(eps)
    # an iterator would be at its end after the look
    if not isinstance(blocks, Sequence):
        raise TypeError(f"blocks must be a sequence of blocks, got {type(blocks).__name__}")
    at_once = _at_once(x)
    for i, block in enumerate(blocks):
        if not isinstance(block, BLOCKS):
            raise TypeError(
                f"blocks must be AttentionBlock, FoldedAttention or ConvBlock, got {type(block).__name__}"
            )
        if block.norm_weight is None:
            # to a mixer it would say that the block has neither norm nor residual
            raise TypeError(f"norm_weight of blocks[{i}] must be a tensor, got NoneType")
        # what goes block by block is looked at there
        if at_once and isinstance(block, AttentionBlock):
            _attention_weights(x, *block[2:], mixed)
        elif at_once and isinstance(block, ConvBlock):
            _conv_weights(x, *block[2:], mixed)
        elif isinstance(block, FoldedAttention):
            _folded_weights(x, *block[2:], mixed)
        if at_once or isinstance(block, FoldedAttention):
            _norm(x, *block[:2], eps, mixed)
    y = ops.backbone_at_once(x, blocks, norm_weight, norm_bias, eps)
    if y is not None:
        return y
    if mixed and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return reference.backbone(x, blocks, norm_weight, norm_bias, eps, _MIXERS)


@_specified_by(reference.column_normalize)
def column_normalize(U: Tensor) -> Tensor:
    _tensor("U", U, REAL + COMPLEX, ("...", None, None))
    return reference.column_normalize(U)


def _step(name: str, value: Any) -> None:
    if _scalar(name, value) and not 0 < value <= 0.5:
        raise ValueError(f"{name} must lie in (0, 0.5], got {value}")


def _columns(name: str, value: Any) -> None:
    """Check a factor whose columns can be orthonormal."""
    # what fits is said quickly
    complex_matrix = isinstance(value, Tensor) and value.dtype in REAL_OF and value.ndim > 1
    if complex_matrix and value.shape[-2] >= value.shape[-1] > 0:
        return
    _tensor(name, value, REAL + COMPLEX, ("...", None, None))
    shape = tuple(value.shape)
    if shape[-2] < shape[-1]:
        raise ValueError(
            f"{name} must have at least as many rows as columns to be orthonormalised, got {shape}"
        )


@_specified_by(reference.ortho_refine)
def ortho_refine(U: Tensor, step: Tensor | float) -> Tensor:
    _columns("U", U)
    _step("step", step)
    found = ops.ortho_refine_at_once(U, None, step)
    return ops.ortho_refine(U, None, step, None)[0] if found is None else found[0]


@_specified_by(reference.ortho_refine_pair)
def ortho_refine_pair(U: Tensor, V: Tensor, a: Tensor | float, b: Tensor | float) -> tuple[Tensor, Tensor]:
    _columns("U", U)
    _columns("V", V)
    _step("a", a)
    _step("b", b)
    # batches that differ are named below
    found = ops.ortho_refine_at_once(U, V, a, b) if U.shape[:-2] == V.shape[:-2] else None
    if found is not None:
        return found[0], found[1]
    _tensor("V", V, REAL + COMPLEX, ("...", None, U.shape[-1]))
    _like("V", V, "U", U.dtype)
    if U.shape[:-2] != V.shape[:-2]:
        raise ValueError(f"V must have the batch of U, {tuple(U.shape[:-2])}, got shape {tuple(V.shape)}")
    return ops.ortho_refine(U, V, a, b)


@_specified_by(reference.bjorck)
def bjorck(U: Tensor, steps: int, order: int = 1) -> Tensor:
    _columns("U", U)
    steps, order = integer("steps", steps, 0), integer("order", order)
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order}")
    return ops.bjorck(U, steps, order)


def _matrix(name: str, value: Any, H: Tensor, rows: int, cols: int | None) -> Tensor:
    """Check a factor of H: its size, the dtype and the batch of H."""
    _tensor(name, value, REAL + COMPLEX, ("...", rows, cols))
    _like(name, value, "H", H.dtype)
    if value.shape[:-2] != H.shape[:-2]:
        raise ValueError(
            f"{name} must have the batch of H, {tuple(H.shape[:-2])}, got shape {tuple(value.shape)}"
        )
    return value


def _factors(
    U: Tensor, V: Tensor, H: Tensor, name: str, S: Tensor, names: tuple[str, str] = ("U", "V")
) -> None:
    """Check `U (..., M, r)`, `V (..., N, r)` and the spectrum `S (..., r)` against `H (..., M, N)`."""
    # what fits is said quickly
    if all(isinstance(x, Tensor) for x in (U, V, H, S)) and U.ndim > 1 and H.ndim > 1:
        (*batch, M, N), r, dtype = H.shape, U.shape[-1], H.dtype
        fits = U.shape == (*batch, M, r) and V.shape == (*batch, N, r) and S.shape == (*batch, r)
        same = dtype in REAL_OF and U.dtype == V.dtype == dtype and S.dtype == REAL_OF[dtype]
        if fits and same and M and N and r:
            return
    _tensor("H", H, REAL + COMPLEX, ("...", None, None))
    M, N = H.shape[-2:]
    r = _matrix(names[0], U, H, M, None).shape[-1]
    _matrix(names[1], V, H, N, r)
    _weight(name, S, ("H", H), (*H.shape[:-2], r))


def _share(name: str, value: Any) -> None:
    if _scalar(name, value) and not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")


@_specified_by(reference.refine_svd)
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
    _tensor("H", H, COMPLEX, ("...", None, None))
    batch, (M, N) = H.shape[:-2], H.shape[-2:]
    _tensor("U", U, [H.dtype], (*batch, M, None))
    r = U.shape[-1]
    _tensor("V", V, [H.dtype], (*batch, N, r))
    if r > min(M, N):
        raise ValueError(f"U must have at most min(M, N) = {min(M, N)} columns, got {r}")
    steps, sweeps = integer("steps", steps, 0), integer("sweeps", sweeps, 1)
    if active is not None and integer("active", active, 1) > r:
        raise ValueError(f"active must be at most r = {r}, got {active}")
    if not isinstance(hermitian, bool):
        raise TypeError(f"hermitian must be True or False, got {hermitian!r}")
    if hermitian and M != N:
        raise ValueError(f"H must be square where hermitian is True, got {M} x {N}")
    if scalars is not None:
        _weight("scalars", scalars, ("H", H), (None, 4))
    return ops.refine_svd(H, U, V, steps, active, hermitian, scalars, sweeps, orthonormal)


def fused_approximation(
    H: Tensor, rank: int, steps: int, active: int | None, hermitian: bool | None, denoise: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """All of `approx_svd` with the DFT's start in one pass, where a kernel serves it; None where none does.

    Arguments as checked there. Also the state of every sample: -1 where it is not finite, -2 where it is not
    Hermitian and should be, else twice its active columns and 1 more where one factor served both sides.
    """
    found: tuple[Tensor, Tensor, Tensor, Tensor] | None
    found = ops.approx_svd(H, rank, steps, active, hermitian, denoise)
    return found


@_specified_by(reference.spectral_calibrate)
def spectral_calibrate(U: Tensor, H: Tensor, V: Tensor, S_pred: Tensor, tau: Tensor | float) -> Tensor:
    _factors(U, V, H, "S_pred", S_pred)
    _share("tau", tau)
    return ops.spectral_calibrate(U, H, V, S_pred, tau)


@_specified_by(reference.svd_heads)
def svd_heads(
    feat: Tensor, u_weight: Tensor, u_bias: Tensor, v_weight: Tensor, v_bias: Tensor
) -> tuple[Tensor, Tensor]:
    _tensor("feat", feat, REAL + HALF, ("B", None))
    d = feat.shape[1]
    for name, weight, bias in (("u", u_weight, u_bias), ("v", v_weight, v_bias)):
        _weight(f"{name}_weight", weight, ("feat", feat), (None, d))
        _weight(f"{name}_bias", bias, ("feat", feat), (weight.shape[0],))
    found: tuple[Tensor, Tensor] = ops.svd_heads(feat, u_weight, u_bias, v_weight, v_bias)
    return found


@_specified_by(reference.svd_tail)
def svd_tail(
    U_raw: Tensor,
    V_raw: Tensor,
    S_pred: Tensor,
    H: Tensor,
    a: Tensor | float,
    b: Tensor | float,
    tau: Tensor | float,
) -> tuple[Tensor, Tensor, Tensor]:
    _factors(U_raw, V_raw, H, "S_pred", S_pred, ("U_raw", "V_raw"))
    _columns("U_raw", U_raw)
    _columns("V_raw", V_raw)
    _step("a", a)
    _step("b", b)
    _share("tau", tau)
    return ops.svd_tail(U_raw, V_raw, S_pred, H, a, b, tau)


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
    _factors(U, V, H, "S", S)
    for name, weight in (("lam", lam), ("w_energy", w_energy), ("w_diag", w_diag), ("w_match", w_match)):
        _scalar(name, weight)
    if match not in ("norm", "mean"):
        raise ValueError(f'match must be "norm" or "mean", got {match!r}')
    return ops.aeplus_loss(U, S, V, H, lam, w_energy, w_diag, w_match, match)


@_specified_by(reference.low_rank_loss)
def low_rank_loss(
    F: Tensor, G: Tensor, H: Tensor, nesting: str = "none", *, shape: tuple[int, int] | None = None
) -> Tensor:
    _tensor("H", H, REAL + COMPLEX, ("...", None, None))
    M, N = H.shape[-2:]
    L = _matrix("G", G, H, M, None).shape[-1]
    _matrix("F", F, H, N, L)
    if shape is not None:
        if not isinstance(shape, Sequence) or len(shape) != 2 or not all(isinstance(n, int) for n in shape):
            raise TypeError(f"shape must be a pair of integers, got {shape!r}")
        if shape[0] < M or shape[1] < N:
            raise ValueError(f"shape must be at least that of the block, {(M, N)}, got {tuple(shape)}")
    if nesting not in ("none", "joint", "sequential"):
        raise ValueError(f'nesting must be "none", "joint" or "sequential", got {nesting!r}')
    return ops.low_rank_loss(F, G, H, nesting, shape)


@_specified_by(reference.neural_svd_steps)
def neural_svd_steps(H: Tensor, F: Tensor, steps: int, watch: int | None = None) -> tuple[Tensor, Tensor]:
    _tensor("H", H, REAL + COMPLEX, ("...", None, None))
    N = H.shape[-1]
    L = _matrix("F", F, H, N, None).shape[-1]
    if L > N:
        raise ValueError(f"F must have at least as many rows as columns, got {tuple(F.shape)}")
    steps = integer("steps", steps, 1)
    watch = L if watch is None else integer("watch", watch, 1)
    return ops.neural_svd_steps(H, F, steps, min(watch, L))


def _scene_rows(scene: Tensor, H: Tensor) -> None:
    if not isinstance(scene, Tensor) or scene.dtype != torch.int64:
        raise TypeError(f"scene must be an int64 tensor, got {getattr(scene, 'dtype', type(scene).__name__)}")
    if scene.shape != H.shape[:1]:
        raise ValueError(f"scene must have shape ({H.shape[0]},) as H has, got {tuple(scene.shape)}")


@_specified_by(reference.frozen_svd)
def frozen_svd(H: Tensor, scene: Tensor, weights: FrozenWeights) -> tuple[Tensor, Tensor, Tensor]:
    M, N = weights.pos.shape[0], weights.raw.shape[0] // 2
    _tensor("H", H, COMPLEX, ("B", M, N))
    _like("weights", weights.pos, "H", REAL_OF[H.dtype])
    _scene_rows(scene, H)
    return ops.frozen_svd(H, scene, weights)


@_specified_by(reference.frozen_angular_svd)
def frozen_angular_svd(H: Tensor, scene: Tensor, weights: FrozenAngular) -> tuple[Tensor, Tensor, Tensor]:
    n = None if weights.array is None else math.prod(weights.array)
    _tensor("H", H, COMPLEX, ("B", n, n))
    _like("weights", weights.table, "H", REAL_OF[H.dtype])
    _scene_rows(scene, H)
    return ops.frozen_angular_svd(H, scene, weights)


flat_at_once, frozen_svd_at_once, chosen = ops.flat_at_once, ops.frozen_svd_at_once, ops.chosen
svd_network_at_once, serves_at_once = ops.svd_network_at_once, ops.serves_at_once
