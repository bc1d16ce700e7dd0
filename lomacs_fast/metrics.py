"""Measuring: approximation error, the two counts of multiply-adds, Score, the SVD baseline, timing."""

from __future__ import annotations

import functools
import math
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import reference
from .reference import refine_products
from .reference.frozen import blocks_of

__all__ = [
    "AETerms",
    "TrueMacCounter",
    "ae_terms",
    "architecture_macs",
    "chordal_distance",
    "contest_macs",
    "eager_twin",
    "evaluate",
    "lowrank_svd",
    "parameter_count",
    "register_macs",
    "score",
    "spectral_efficiency",
    "time_per_channel",
    "true_macs",
    "truncated_eigh",
    "truncated_svd",
    "water_filling",
]


class AETerms(NamedTuple):
    """The three terms of the approximation error, one value a sample, float64."""

    rec: Tensor
    ortho_u: Tensor
    ortho_v: Tensor

    @property
    def ae(self) -> Tensor:
        """`rec + ortho_u + ortho_v`, one value a sample."""
        return self.rec + self.ortho_u + self.ortho_v


def ae_terms(U: Tensor, S: Tensor, V: Tensor, H: Tensor) -> AETerms:
    """Terms of the approximation error of every sample, with `|.|` the Frobenius norm.

    - rec: `|H - U diag(S) V^H| / |H|`; where H is zero, the absolute `|U diag(S) V^H|`, so that S = 0 has
      error 0 and nothing is NaN
    - ortho_u: `|U^H U - I|`
    - ortho_v: `|V^H V - I|`

    AE of a sample is their sum, AE of a data set the mean over its samples. Evaluated in double precision
    whatever the input's, so that the measurement adds no error of its own.

    Args:
        U, V, H: complex or real `(..., M, r)`, `(..., N, r)`, `(..., M, N)`.
        S: real `(..., r)`.

    Returns:
        Three float64 tensors of the shape of the batch.

    Raises:
        ValueError: for shapes that do not fit each other. TypeError: for a complex S.
    """
    for name, X, least in (("U", U, 2), ("S", S, 1), ("V", V, 2), ("H", H, 2)):
        if X.ndim < least:
            raise ValueError(f"{name} must have at least {least} dimension(s), got shape {tuple(X.shape)}")
    if S.is_complex():
        raise TypeError(f"S must be real, got {S.dtype}")
    batch, (M, N), r = H.shape[:-2], H.shape[-2:], S.shape[-1]
    for name, X, shape in (("U", U, (*batch, M, r)), ("S", S, (*batch, r)), ("V", V, (*batch, N, r))):
        if X.shape != shape:
            raise ValueError(f"{name} must have shape {shape} to go with H and S, got {tuple(X.shape)}")
    U, V, H = (X.to(torch.complex128 if X.is_complex() else torch.float64) for X in (U, V, H))
    norm = torch.linalg.vector_norm
    residual = norm(H - (U * S.double().unsqueeze(-2)) @ V.mH, dim=(-2, -1))
    size = norm(H, dim=(-2, -1))
    identity = torch.eye(r, dtype=torch.float64, device=U.device)
    return AETerms(
        rec=residual / torch.where(size > 0, size, 1.0),
        ortho_u=norm(U.mH @ U - identity, dim=(-2, -1)),
        ortho_v=norm(V.mH @ V - identity, dim=(-2, -1)),
    )


def score(ae: float, macs_m: float) -> float:
    """The contest's Score, `100 AE + MACs`, with the contest's count of MACs a sample in millions."""
    return 100 * ae + macs_m


def truncated_svd(H: Tensor, r: int, *, floor: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The first r singular triplets by `torch.linalg.svd`, the baseline: `H ~ U diag(S) V^H`.

    H real or complex `(..., M, N)`, `1 <= r <= min(M, N)`; returns U `(..., M, r)`, S real `(..., r)` in
    descending order, and V `(..., N, r)`, not its conjugate transpose. With `floor` the median of all
    singular values is subtracted from S, not below 0. Raises ValueError for another r.
    """
    if H.ndim < 2:
        raise ValueError(f"H must have shape (..., M, N), got {tuple(H.shape)}")
    if not 1 <= r <= min(H.shape[-2:]):
        raise ValueError(f"r must lie between 1 and min(M, N) = {min(H.shape[-2:])}, got {r}")
    U, S, Vh = torch.linalg.svd(H, full_matrices=False)
    if floor:
        S = (S - S.median(-1, keepdim=True).values).clamp_min(0)
    return U[..., :r], S[..., :r], Vh[..., :r, :].mH.resolve_conj()


def truncated_eigh(H: Tensor, r: int, *, floor: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """As `truncated_svd`, of a Hermitian H by `torch.linalg.eigh`: `V = U sign(d)`, d the eigenvalues."""
    d, Q = torch.linalg.eigh(H)
    order = d.abs().argsort(dim=-1, descending=True)
    d, Q = d.gather(-1, order), Q.gather(-1, order[..., None, :].expand_as(Q))
    S = d.abs()
    if floor:
        S = (S - S.median(-1, keepdim=True).values).clamp_min(0)
    U = Q[..., :r]
    return U, S[..., :r], U * torch.where(d < 0, -1.0, 1.0)[..., None, :r]


def lowrank_svd(
    H: Tensor, r: int, q: int, *, floor: bool = False, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.svd_lowrank(H, q)`, padded with zero columns to r; a rank below r has no orthonormal completion.

    With `floor` the mean of what the q values leave of the trace, `(tr H - sum S) / (M - q)`, is subtracted
    from them, not below 0: it is meant for covariances.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        U, S, V = torch.svd_lowrank(H, q)
    if floor:
        rest = H.diagonal(dim1=-2, dim2=-1).real.sum(-1) - S.sum(-1)
        S = (S - (rest / (H.shape[-1] - q)).clamp_min(0)[..., None]).clamp_min(0)
    pad = torch.nn.functional.pad
    return pad(U, (0, r - q)), pad(S, (0, r - q)), pad(V, (0, r - q))


def water_filling(gains: Tensor, power: float | Tensor) -> Tensor:
    """Powers `p_k = max(0, w - 1 / g_k)` with `sum p = power`: the most of `sum log2(1 + p_k g_k)`.

    gains real `(..., k)`, not negative, signal over noise at unit power; power positive, a number or `(...)`.
    Where all gains are zero the power is shared equally.
    """
    order = gains.double().sort(dim=-1, descending=True)
    inverse = 1 / order.values.clamp_min(1e-30)
    count = torch.arange(1, gains.shape[-1] + 1, device=gains.device)
    power = torch.as_tensor(power, dtype=torch.float64, device=gains.device)[..., None]
    level = (power + inverse.cumsum(-1)) / count
    # the largest number of channels whose weakest still gets power
    used = (level > inverse).long().cumprod(-1).sum(-1, keepdim=True).clamp_min(1)
    p = (level.gather(-1, used - 1) - 1 / gains.double().clamp_min(1e-30)).clamp_min(0)
    share = power.expand_as(p) / gains.shape[-1]
    return torch.where((gains > 0).any(-1, keepdim=True), p, share)


def spectral_efficiency(
    U: Tensor, S: Tensor, V: Tensor, H: Tensor, snr_db: float, *, allocation: str = "equal"
) -> Tensor:
    """Bits a second and hertz of the streams that V precodes and U combines, through the clean channel H.

    `y = U^H (H V x + n)` with `|H|_F^2` scaled to M N and noise of unit power an antenna: stream k has
    `SINR_k = p_k |G_kk|^2 / (|u_k|^2 + sum_{j != k} p_j |G_kj|^2)`, `G = U^H H V`, interference is noise, and
    the sum of `log2(1 + SINR_k)` is returned, float64 `(...)`. The transmitted power
    `sum p_k |v_k|^2 = 10^(snr_db / 10)`.

    Args:
        U, S, V: factors `(..., M, r)`, `(..., r)`, `(..., N, r)`, S in the scale of H.
        H: clean channel `(..., M, N)`.
        snr_db: signal over noise in dB.
        allocation: `"equal"` power a stream, or `"water"`: water-filling on the gains `S^2` that the factors
            promise.

    Raises ValueError for another allocation.
    """
    if allocation not in ("equal", "water"):
        raise ValueError(f'allocation must be "equal" or "water", got {allocation!r}')
    U, V, H = (X.to(torch.complex128) for X in (U, V, H))
    size = torch.linalg.matrix_norm(H)
    scale = math.sqrt(H.shape[-2] * H.shape[-1]) / torch.where(size > 0, size, 1.0)
    own = (S.double() * scale[..., None]).square()
    power = 10 ** (snr_db / 10)
    sent = V.abs().square().sum(-2)
    r = S.shape[-1]
    p = torch.full_like(own, power / r) if allocation == "equal" else water_filling(own, power)
    p = p / torch.where(sent > 0, sent, 1.0)
    gain = (U.mH @ H @ V).abs().square() * scale[..., None, None].square() * p[..., None, :]
    signal = gain.diagonal(dim1=-2, dim2=-1)
    noise = U.abs().square().sum(-2) + gain.sum(-1) - signal
    return torch.log2(1 + signal / torch.where(noise > 0, noise, 1.0)).sum(-1)


def chordal_distance(A: Tensor, B: Tensor) -> Tensor:
    """Distance `sqrt(k - |Q_A^H Q_B|_F^2)` of the spans of two sets of k columns, float64 `(...)`.

    A, B real or complex `(..., n, k)`; orthonormalised in double precision first, by QR. 0 for the same span,
    sqrt(k) for orthogonal ones. Raises ValueError for shapes that differ.
    """
    if A.shape != B.shape or A.ndim < 2:
        raise ValueError(f"A and B must have one shape (..., n, k), got {tuple(A.shape)}, {tuple(B.shape)}")
    A, B = (torch.linalg.qr(X.to(torch.complex128))[0] for X in (A, B))
    return (A.shape[-1] - (A.mH @ B).abs().square().sum((-2, -1))).clamp_min(0).sqrt()


def eager_twin(net: reference.LoMACSSVDNet) -> reference.LoMACSSVDNet:
    """The reference network with the configuration and a copy of the weights of net: CPU, float32, eval mode.

    The global random state stays as it was.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        twin = reference.LoMACSSVDNet(**net.config)
    twin.load_state_dict(net.state_dict())
    twin.set_refine_steps(net.refine_steps)
    return twin.eval()


@contextmanager
def quiet_profiler() -> Iterator[None]:
    """Kineto reads its log level once, when the process first profiles; a level the user set stays."""
    name = "KINETO_LOG_LEVEL"
    before = os.environ.get(name)
    os.environ.setdefault(name, "6")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)


def contest_macs(net: reference.LoMACSSVDNet) -> float:
    """Multiply-adds a sample by the contest's count: `torch.profiler` with `with_flops` on CPU, flops / 2.

    Taken on the eager network of the same configuration, one sample, without gradients. The profiler sees mm,
    bmm, addmm, conv2d, add and mul alone and takes a complex product as one; see `true_macs` for everything.
    """
    return architecture_macs(net.config, net.refine_steps)


def architecture_macs(config: Mapping[str, Any], steps: int | None = None) -> float:
    """`contest_macs` of the network with these constructor arguments; measured once an architecture.

    `steps` of refinement where it is not the number in them.
    """
    sizes = {key: value for key, value in config.items() if key not in ("temperature", "tau_s")}
    sizes = {key: tuple(value) if isinstance(value, list) else value for key, value in sizes.items()}
    return _profiled_macs(steps, **sizes)


@functools.lru_cache(maxsize=1024)
def _profiled_macs(steps: int | None, **sizes: Any) -> float:
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        twin = reference.LoMACSSVDNet(**sizes).float().eval()
        twin.set_refine_steps(twin.refine_steps if steps is None else steps)
        H = torch.zeros(1, twin.M, twin.N, dtype=torch.complex64)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.no_grad(), quiet_profiler():
        # torch 2.10 and 2.11 warn unless the events of all cycles, here one, are kept
        with torch.profiler.profile(activities=activities, with_flops=True, acc_events=True) as profile:
            twin(H, 0)
        return sum(event.flops for event in profile.key_averages()) / 2


# Flops of a real scalar operation after McMahon, "The Livermore Fortran Kernels", UCRL-53745 (1986): add,
# subtract, multiply and compare 1, divide and square root 4, elementary functions 8.
DIV = SQRT = 4
EXP = 8

Formula = Callable[..., "float | None"]


def _size(x: Any) -> int:
    return sum(t.numel() for t in tree_leaves(x) if isinstance(t, Tensor))


def _is_complex(x: Any) -> bool:
    return x.is_complex() if isinstance(x, Tensor) else isinstance(x, complex)


def _macs(flops: float) -> float:
    """Two flops, one multiply and one add, are one multiply-add."""
    return flops / 2


def _products(a: Tensor, b: Tensor) -> int:
    """Real multiply-adds of one product with accumulation: real 1, real x complex 2, complex 4."""
    return (2 if a.is_complex() else 1) * (2 if b.is_complex() else 1)


def _matmul(a: Tensor, b: Tensor, *_: Any, out: Tensor, **__: Any) -> float:
    return out.numel() * a.shape[-1] * _products(a, b)


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1, out: Tensor) -> float:
    """The bias is the accumulator's first value and costs nothing; scaling by alpha or beta does."""
    scalings = (alpha != 1) * out.numel() + (beta not in (0, 1)) * bias.numel()
    return _matmul(a, b, out=out) + _macs(scalings * (2 if out.is_complex() else 1))


def _convolution(x: Tensor, weight: Tensor, *args: Any, out: Tensor, **kwargs: Any) -> float:
    """Taps on the zero padding included, as `FlopCounterMode` does; the bias starts the accumulator."""
    transposed = args[4] if len(args) > 4 else kwargs.get("transposed", False)
    outputs = x.numel() if transposed else out.numel()
    return outputs * weight.numel() / weight.shape[0] * _products(x, weight)


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, *args: Any, out: Any, **_: Any) -> float:
    transposed, needs = args[4], args[-1]
    one = (x if transposed else grad).numel() * weight.numel() / weight.shape[0] * _products(x, weight)
    bias = grad.numel() * (2 if grad.is_complex() else 1)
    return one * (needs[0] + needs[1]) + _macs(bias * needs[2])


def _fft(x: Tensor, dims: Sequence[int], *_: Any, out: Tensor, **__: Any) -> float:
    """5 n log2 n flops for n complex points over all transformed dimensions, half with a real side."""
    whole = out if x.is_complex() and not out.is_complex() else x
    n = math.prod(whole.shape[d] for d in dims)
    full = 5 if x.is_complex() and out.is_complex() else 2.5
    return _macs(full * whole.numel() * math.log2(n)) if n else 0.0


def _each(real: float, cplx: float | None = None) -> Formula:
    """Flops an element of the (broadcast) result."""

    def formula(*args: Any, out: Any, **_: Any) -> float | None:
        flops = cplx if _is_complex(out) or any(map(_is_complex, args)) else real
        return None if flops is None else _macs(flops * _size(out))

    return formula


def _reduction(
    real: float, cplx: float | None = None, end_real: float = 0, end_complex: float = 0
) -> Formula:
    """Flops an element of the first argument, and flops at the end for every element of the result."""

    def formula(x: Tensor, *_: Any, out: Any, **__: Any) -> float | None:
        flops, end = (cplx, end_complex) if x.is_complex() else (real, end_real)
        return None if flops is None else _macs(flops * x.numel() + end * _size(out))

    return formula


def _add(a: Any, b: Any, *args: Any, alpha: Any = 1, out: Tensor, **_: Any) -> float:
    both = _is_complex(a) and _is_complex(b)
    scaled = (args[0] if args else alpha) != 1
    return _macs(out.numel() * ((2 if both else 1) + scaled * (2 if _is_complex(b) else 1)))


def _mul(a: Any, b: Any, *, out: Tensor, **_: Any) -> float:
    return _macs(out.numel() * (1, 2, 6)[_is_complex(a) + _is_complex(b)])


def _div(a: Any, b: Any, *, out: Tensor, **_: Any) -> float:
    """By a complex number: times its conjugate, over its squared magnitude."""
    if _is_complex(b):
        return _macs(out.numel() * ((6 if _is_complex(a) else 2) + 3 + 2 * DIV))
    return _macs(out.numel() * DIV * (2 if _is_complex(a) else 1))


def _pow(base: Any, exponent: Any, *, out: Tensor, **_: Any) -> float | None:
    """Small whole powers by products, others by exp and log."""
    if isinstance(exponent, int | float) and exponent in (1, 2, 3, 4):
        products = (0, 1, 2, 2)[int(exponent) - 1]
        return _macs(out.numel() * products * (6 if out.is_complex() else 1))
    if exponent == 0.5 and not out.is_complex():
        return _macs(out.numel() * SQRT)
    return None if out.is_complex() else _macs(out.numel() * 2 * EXP)


def _vector_norm(x: Tensor, order: Any = 2, *_: Any, out: Tensor, **__: Any) -> float | None:
    magnitude = 3 + SQRT if x.is_complex() else 1
    if order == 2:
        return _macs(x.numel() * (4 if x.is_complex() else 2) + SQRT * out.numel())
    return _macs(x.numel() * (magnitude + 1)) if order in (1, math.inf, -math.inf) else None


def _clamp(x: Tensor, low: Any = None, high: Any = None, *, out: Tensor, **kwargs: Any) -> float:
    bounds = [low, high, kwargs.get("min"), kwargs.get("max")]
    return _macs(out.numel() * sum(bound is not None for bound in bounds))


def _layer_norm(x: Tensor, *_: Any, out: Any, **__: Any) -> float:
    """An element: sum, centre, square, sum, scale, weight, bias. A row: two divisions, + eps, 1 / sqrt."""
    return _macs(7 * x.numel() + (3 * DIV + SQRT + 1) * out[1].numel())


def _layer_norm_backward(grad: Tensor, *_: Any, out: Any, **__: Any) -> float:
    """An element: normalise 2, weight 1, two sums 3, result 4; gradients of weight 2 and bias 1."""
    return _macs(13 * grad.numel())


def _pool(x: Tensor, kernel: Sequence[int], *_: Any, out: Tensor, **__: Any) -> float:
    """The window's sum and one scaling."""
    return _macs(out.numel() * (kernel[0] * kernel[-1]))


def _pool_backward(grad: Tensor, x: Tensor, kernel: Sequence[int], *_: Any, **__: Any) -> float:
    return _macs(grad.numel() * (1 + kernel[0] * kernel[-1]))


def _sort(x: Tensor, dim: int = -1, *_: Any, out: Any, **kwargs: Any) -> float:
    """n log2 n comparisons a row."""
    dim = kwargs.get("dim", dim)
    return _macs(x.numel() * math.log2(max(x.shape[dim], 1))) if x.ndim and x.numel() else 0.0


def _svd(x: Tensor, full_matrices: bool = False, compute_uv: bool = True, *_: Any, **__: Any) -> float:
    """Golub and Van Loan, Matrix Computations, section 8.6: Golub-Reinsch; complex counts four times."""
    n, m = sorted(x.shape[-2:])
    if not compute_uv:
        flops = 4 * m * n**2 - 4 * n**3 / 3
    elif full_matrices:
        flops = 4 * m**2 * n + 8 * m * n**2 + 9 * n**3
    else:
        flops = 14 * m * n**2 + 8 * n**3
    return _macs(flops * math.prod(x.shape[:-2])) * (4 if x.is_complex() else 1)


def _qr(x: Tensor, mode: str = "reduced", *_: Any, **__: Any) -> float | None:
    """Householder, `2 n^2 (m - n / 3)` flops for R and as many for a thin Q; complex counts four times."""
    m, n = x.shape[-2:]
    if m < n or mode not in ("reduced", "r"):
        return None
    flops = 2 * n**2 * (m - n / 3) * (1 if mode == "r" else 2)
    return _macs(flops * math.prod(x.shape[:-2])) * (4 if x.is_complex() else 1)


def _on_source(position: int) -> Formula:
    """One addition an element of the argument at this position."""

    def formula(*args: Any, **_: Any) -> float:
        x = args[position]
        return _macs(x.numel() * (2 if x.is_complex() else 1))

    return formula


_COMPARE = _each(1, 2)
_ELEMENTARY = _each(EXP)
_PICK = _reduction(1)

_FORMULAS: dict[str, Formula] = {
    "mm": _matmul,
    "bmm": _matmul,
    "mv": _matmul,
    "dot": _matmul,
    "vdot": _matmul,
    "addmm": _addmm,
    "addmv": _addmm,
    "baddbmm": _addmm,
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "_fft_c2c": _fft,
    "_fft_r2c": _fft,
    "_fft_c2r": _fft,
    "add": _add,
    "sub": _add,
    "rsub": _add,
    "mul": _mul,
    "div": _div,
    "pow": _pow,
    "neg": _each(1, 2),
    "frexp": _reduction(1),
    "remainder": _each(DIV + 2),
    "abs": _each(1, 3 + SQRT),
    "sgn": _each(1, 3 + SQRT + 2 * DIV),
    "sign": _each(1),
    "reciprocal": _each(DIV, 3 + 2 * DIV),
    "sqrt": _each(SQRT),
    "rsqrt": _each(SQRT + DIV),
    "exp": _each(EXP, 3 * EXP + 2),
    "angle": _each(1, EXP),
    "polar": _each(2 * EXP + 2, 2 * EXP + 2),
    **dict.fromkeys(
        ("log", "log1p", "log2", "log10", "expm1", "sin", "cos", "tan", "atan", "atan2", "tanh", "erf"),
        _ELEMENTARY,
    ),
    "sigmoid": _each(2 + EXP + DIV),
    "silu": _each(3 + EXP + DIV),
    "softplus": _each(1 + 2 * EXP),
    "relu": _each(1),
    "threshold_backward": _each(1),
    "sigmoid_backward": _each(3),
    "tanh_backward": _each(3),
    "softplus_backward": _each(3 + EXP + DIV),
    # compare for the maximum, subtract, exp, sum, divide
    "_softmax": _each(3 + EXP + DIV),
    "_safe_softmax": _each(3 + EXP + DIV),
    "_softmax_backward_data": _each(4),
    "clamp": _clamp,
    "clamp_min": _each(1),
    "clamp_max": _each(1),
    "maximum": _each(1),
    "minimum": _each(1),
    **dict.fromkeys(("eq", "ne", "lt", "le", "gt", "ge", "isfinite", "isinf", "isnan"), _COMPARE),
    "sum": _reduction(1, 2),
    "cumsum": _reduction(1, 2),
    "prod": _reduction(1, 6),
    "mean": _reduction(1, 2, DIV, 2 * DIV),
    "var": _reduction(4, None, DIV),
    "std": _reduction(4, None, DIV + SQRT),
    "linalg_vector_norm": _vector_norm,
    "any": _reduction(1, 2),
    "all": _reduction(1, 2),
    **dict.fromkeys(("amax", "amin", "max", "min", "argmax", "argmin"), _PICK),
    "aminmax": _reduction(2),
    "sort": _sort,
    "argsort": _sort,
    "native_layer_norm": _layer_norm,
    "native_layer_norm_backward": _layer_norm_backward,
    "avg_pool2d": _pool,
    "avg_pool2d_backward": _pool_backward,
    # six products and three sums a result, the weights of the grid given; backward scatters four products
    "upsample_bilinear2d": _each(9),
    "upsample_bilinear2d_backward": lambda grad, *_, **__: _macs(10 * grad.numel()),
    "embedding_dense_backward": _on_source(0),
    "scatter_add": _on_source(3),
    "index_add": _on_source(3),
    "_linalg_svd": _svd,
    "linalg_qr": _qr,
}

# Data movement and constants; views are known by their schema. A conjugate rides with the copy.
_FREE = frozenset(
    """
    _local_scalar_dense _reshape_alias _resize_output _to_copy _unsafe_view arange cat clone complex
    conj_physical constant_pad_nd copy diag_embed diagonal_backward diagonal_scatter embedding empty
    empty_like empty_permuted empty_strided eye fill flip full full_like gather index index_copy index_select
    lift_fresh linspace masked_fill masked_select new_empty
    new_empty_strided new_full new_ones new_zeros ones ones_like repeat resize roll
    scalar_tensor scatter select_backward select_scatter slice_backward slice_scatter stack take tril triu
    unbind_copy where zero zeros zeros_like
    """.split()  # noqa: SIM905
)
_REGISTERED: dict[str, Formula] = {}


def register_macs(op: Any, formula: Formula) -> None:
    """Let `TrueMacCounter` count an op, above all a custom one; a later registration replaces an earlier.

    Args:
        op: `torch.ops.lomacs.name`, an overload of it, a custom op, or the qualified name `"lomacs::name"`.
        formula: called as `formula(*args, out=result, **kwargs)` with the op's own arguments; returns the
            real multiply-adds of the whole call (flops / 2 where it is not made of products), or None where
            it cannot tell, which leaves that call uncounted.

    Raises:
        ValueError: where op is no op.
    """
    if isinstance(op, torch._ops.OpOverload):
        op = op._schema.name
    name = getattr(op, "_qualified_op_name", None) or getattr(op, "_qualname", op)
    if not isinstance(name, str) or "::" not in name:
        raise ValueError(f'op must be an op or its qualified name "namespace::name", got {op!r}')
    _REGISTERED[name] = formula


def _aeplus(
    U: Tensor, S: Tensor, V: Tensor, H: Tensor, weights: Tensor, mean: bool, *flags: bool, out: Any
) -> float:
    """The native op's own products and its passes over H; sums over r x r and M x r elements are left out.

    Forward: `H V`, `U^H (H V)`, half of each Gram matrix, `U S V^H`. Gradients by r x r matrices A..D, K:
    `(H V) A + U B`, `(H^H U) C + V D`, `a H + (U K) V^H + b E`.
    """
    (B, r), (M, N) = S.shape, H.shape[1:3]
    gu, _, gv, gh = flags
    large, left, right = M * N * r, M * r * r, N * r * r
    forward = 2 * large + left + (left + right) / 2
    backward = 2 * left * gu + (large + 2 * right) * gv + (left + large) * gh
    # |H|^2 and |E|^2 4 flops an element each, E = H - U S V^H 2; the gradient of H 6
    return B * (4 * (forward + backward) + _macs((10 + 6 * gh) * M * N))


register_macs("lomacs::aeplus", _aeplus)


def _low_rank(
    F: Tensor, G: Tensor, H: Tensor, rows: int, columns: int, nesting: int, *flags: bool, out: Any
) -> float:
    """`H F` and half of each Gram matrix; gradients `H^H G`, `F (G^H G)`, `G (F^H F)` and `G F^H`."""
    (B, M, N), L = H.shape[:3], F.shape[2]
    gf, gg, gh = flags
    products = M * N * L * (1 + gf + gh) + (M + N) * L * L / 2 + L * L * (N * gf + M * gg)
    return B * products * (4 if H.ndim == 4 else 1)


register_macs("lomacs::low_rank", _low_rank)


def _attention(x: Sequence[int], k: int, G: int, norm: bool, backward: bool, gx: bool, gw: bool) -> float:
    """The native op's own products: tokens reduced first, weights folded to g x g, nothing else per token."""
    B, T, d = x
    g = d // G
    tokens, rows = B * G * T * k * g, B * G * k * g * g
    shares = _macs(B * G * T * (15 + 10 * backward) * k) + _macs(B * T * (7 + 15 * backward) * d) * norm
    if not backward:
        return 4 * tokens + 2 * rows + shares
    return (5 + 3 * gx + 3 * gw) * tokens + (4 + 2 * gw) * rows + shares


def _projected_attention(x: Tensor, *rest: Any, out: Any) -> float:
    w, pk = rest[0], rest[4]
    return _attention(x.shape, pk[0].shape[-1], len(w), rest[6] is not None, False, False, False)


def _projected_attention_backward(gy: Tensor, x: Tensor, *rest: Any, out: Any) -> float:
    w, pk = rest[0], rest[4]
    return _attention(x.shape, pk.shape[-1], len(w), rest[6] is not None, True, *rest[-2:])


def _conv(x: Sequence[int], taps: int, norm: bool) -> tuple[float, float, float]:
    """Multiply-adds of the taps, of the pointwise product, and of gate and norm."""
    B, T, d = x
    return 2.0 * B * T * d * taps, float(B * T * d * d), _macs(B * T * d * (15 + 7 * norm))


def _gated_conv(x: Tensor, *rest: Any, out: Any) -> float:
    return sum(_conv(x.shape, rest[0].shape[-1], rest[4] is not None))


def _gated_conv_backward(gy: Tensor, x: Tensor, *rest: Any, out: Any) -> float:
    taps, product, gate = _conv(x.shape, rest[0].shape[-1], rest[4] is not None)
    gx, gw = rest[-2:]
    return (1 + gx + gw) * taps + (1 + gw) * product + 2 * gate


def _backbone(x: Tensor, weights: Sequence[Tensor], kinds: Sequence[int], *_: Any, out: Any) -> float:
    """Its blocks, whose kinds are 0 a convolution, n lists of n groups, -1 stacks, -2 folded stacks."""
    B, T, d = x.shape
    # the mean over tokens and the last norm
    total, first = _macs(B * (T * d + 7 * d)), 2
    for kind in kinds:
        w = weights[first]
        if kind == 0:
            total += sum(_conv(x.shape, w.shape[-1], True))
            first += 2 + 4
            continue
        G = kind if kind > 0 else w.shape[0]
        projections, count = (2, 4) if kind == -2 else (4, 6) if kind == -1 else (4 * G, 6 * G)
        k = weights[first + projections].shape[-1]
        total += _attention(x.shape, k, G, True, False, False, False)
        first += 2 + count
    return total


for _name, _formula in (
    ("backbone", _backbone),
    ("projected_attention", _projected_attention),
    ("projected_attention_groups", _projected_attention),
    ("projected_attention_backward", _projected_attention_backward),
    ("projected_attention_groups_backward", _projected_attention_backward),
    ("gated_conv1d", _gated_conv),
    ("gated_conv1d_backward", _gated_conv_backward),
):
    register_macs(f"lomacs::{_name}", _formula)


def _gate_macs(H: Tensor, row_w1: Tensor, col_w1: Tensor, transforms: int, layers: int, flops: int) -> float:
    """Transforms of a sample, products with so many layers of both perceptrons, flops a frequency."""
    B, M, N = H.shape[:3]
    transform = _macs(5 * M * N * math.log2(M * N))
    layer = row_w1.numel() + col_w1.numel()
    return B * (transforms * transform + layers * layer + _macs(flops * M * N))


def _freq_gate(H: Tensor, *args: Any, out: Any) -> float:
    """The native op's own: two transforms, both perceptrons; a frequency takes 3 flops for the square of
    its magnitude, 4 for the root, 2 for the means, 7 for the gate (two products, one sum, one division), 2
    for the product with it. The norm of `normalize` takes 4 more.
    """
    row_w1, _, col_w1, _, _, normalize = args
    return _gate_macs(H, row_w1, col_w1, 2, 2, 18 + 4 * normalize)


def _freq_gate_backward(gHd: Tensor, gnorms: Tensor | None, H: Tensor, *args: Any, out: Any) -> float:
    """Three transforms, the perceptrons forward again and back; a frequency takes 16 flops for magnitude,
    means and gate, 8 for the gradient of the gate and its sums, 10 for that of the channel.
    """
    row_w1, _, col_w1, _, _, normalize, gh, gw = args
    return _gate_macs(H, row_w1, col_w1, 2 + gh, 3 + gh + 2 * gw, 24 + 10 * gh + 4 * normalize)


def _project_macs(Hd: Tensor, weight: Tensor, products: int) -> float:
    """Products of the channel and of the sums of its 2x2 blocks; 6 flops a block, 4 a token's blend."""
    (B, M, N), d = Hd.shape[:3], weight.shape[0]
    low = (M // 2) * (N // 2)
    return B * products * (2 * (M * N + low) * d + _macs(6 * low + 4 * M * d))


def _gate_project(H: Tensor, *args: Any, out: Any) -> float:
    return _freq_gate(H, *args[:6], out=out) + _project_macs(H, args[6], 1)


def _gate_project_backward(
    gX: Tensor, gHd: Tensor | None, gnorms: Tensor | None, H: Tensor, *args: Any, out: Any
) -> float:
    *gate, weight, _, gh, of_gate, of_projection = args
    front = _freq_gate_backward(gX, gnorms, H, *gate, gh, of_gate, out=out)
    return front + _project_macs(H, weight, 1 + of_projection)


def _gate_project_kept(H: Tensor, *args: Any, out: Any) -> float:
    """And the spectrum times the slope of the gate: 4 flops a frequency."""
    return _gate_project(H, *args, out=out) + _macs(4 * H.numel() // 2)


def _gate_project_kept_backward(gX: Tensor, gHd: Tensor | None, *args: Any, out: Any) -> float:
    """One transform, 5 flops a frequency for the gradient of the logits, one layer back and both weights'."""
    row_w2, col_w2, _, weight, Hd, _, of_projection = args
    return _gate_macs(Hd, row_w2, col_w2, 1, 3, 5) + _project_macs(Hd, weight, 1 + of_projection)


register_macs("lomacs::freq_gate", _freq_gate)
register_macs("lomacs::freq_gate_backward", _freq_gate_backward)
register_macs("lomacs::dual_view_project", lambda Hd, weight, *_, **__: _project_macs(Hd, weight, 1))
register_macs(
    "lomacs::dual_view_project_backward",
    lambda gX, Hd, weight, gh, gw, *_, **__: _project_macs(Hd, weight, gh + gw),
)
register_macs("lomacs::gate_project", _gate_project)
register_macs("lomacs::gate_project_backward", _gate_project_backward)
register_macs("lomacs::gate_project_kept", _gate_project_kept)
register_macs("lomacs::gate_project_kept_backward", _gate_project_kept_backward)


register_macs("lomacs::svd_heads", lambda feat, u, bu, v, bv, out: len(feat) * (u.numel() + v.numel()))
register_macs(
    "lomacs::svd_heads_backward",
    lambda gu, gv, feat, u, v, gf, gw, out: len(feat) * (u.numel() + v.numel()) * (gf + gw),
)


def _pooled_heads(x: Tensor, *rest: Any, out: Any) -> float:
    """The mean over tokens, the norm, and the heads."""
    return len(x) * (sum(w.numel() for w in rest[5::2]) + _macs((x.shape[1] + 8) * x.shape[2]))


def _pooled_heads_backward(*args: Any, out: Any) -> float:
    gu, weights, d, gw = args[0], args[7:10], args[4].numel(), args[-1]
    return len(gu) * (sum(w.numel() for w in weights) * (1 + gw) + _macs(12 * d))


register_macs("lomacs::pooled_heads", _pooled_heads)
register_macs("lomacs::pooled_heads_backward", _pooled_heads_backward)


def _refine(M: int, r: int, backward: bool) -> float:
    """One refinement step: half of `U^H U`, `U P`, norms; backward also `g^H U`, `g P + U C`, dots."""
    return 4 * (1.5 + 3 * backward) * M * r * r + _macs((6 + 12 * backward) * M * r)


def _refinement(U: Tensor, V: Tensor | None, backward: bool) -> float:
    (B, _, r), N = U.shape[:3], 0 if V is None else V.shape[1]
    return B * _refine(U.shape[1] + N, r, backward)


def _bjorck(U: Tensor, steps: int, order: int, backward: bool) -> float:
    """A step: half of `U^H U` and `G^2`, `U P`; backward also `U^H g`, `g P + U C` and, of order 2, `G S`."""
    B, M, r = U.shape[:3]
    square = (0.5 + backward) * r**3 * (order - 1)
    products = M * r * r * (0.5 + steps * (1 + 0.5 * (steps > 0) + 3 * backward)) + steps * square
    return B * (4 * products + _macs(2 * M * r + 9 * r * r))


def _calibrate(U: Tensor, V: Tensor, wanted: int) -> float:
    """`H V` and its dots with U; `H^H U` and `U diag(z) V^H` where they are asked for."""
    B, M, r = U.shape[:3]
    return B * (4 * M * V.shape[1] * r * (1 + wanted) + _macs(8 * M * r))


for _name in ("ortho_refine", "ortho_refine_kept"):
    register_macs(f"lomacs::{_name}", lambda U, V, steps, out: _refinement(U, V, False))
register_macs("lomacs::ortho_refine_backward", lambda gU, gV, U, V, steps, out: _refinement(U, V, True))
register_macs(
    "lomacs::ortho_refine_kept_backward",
    lambda gU, gV, U, V, *_, out: _refinement(U, V, True) - _refinement(U, V, False),
)
register_macs("lomacs::bjorck", lambda U, steps, order, out: _bjorck(U, steps, order, False))
register_macs("lomacs::bjorck_backward", lambda g, U, steps, order, out: _bjorck(U, steps, order, True))
register_macs("lomacs::spectral_calibrate", lambda U, H, V, *_, out: _calibrate(U, V, 0))
register_macs(
    "lomacs::spectral_calibrate_backward",
    lambda g, U, H, V, S, tau, gu, gh, gv, out: _calibrate(U, V, gh + gv),
)
for _name in ("svd_tail", "svd_tail_kept"):
    register_macs(
        f"lomacs::{_name}", lambda U, V, S, H, x, out: _refinement(U, V, False) + _calibrate(U, V, 0)
    )
register_macs(
    "lomacs::svd_tail_backward",
    lambda gU, gS, gV, U, V, S, H, x, gh, out: _refinement(U, V, True) + _calibrate(U, V, 1 + gh),
)


register_macs(
    "lomacs::svd_tail_kept_backward",
    lambda gU, gS, gV, U, V, S, H, x, oU, oV, kept, gh, out: (
        _refinement(U, V, True) - _refinement(U, V, False) + _calibrate(U, V, gh)
    ),
)


def _frozen_svd(H: Tensor, scene: Tensor, packed: Tensor, sizes: Sequence[int], *_: Any, out: Any) -> float:
    """The stages of the native op on folded weights: front, blocks, heads, tail."""
    (B, M, N), (d, row_hidden, col_hidden, r), (U, S, V) = H.shape[:3], sizes[:4], out
    gate = H.new_empty(row_hidden, M), H.new_empty(col_hidden, N)
    total = _gate_macs(H, *gate, 2, 2, 22) + _project_macs(H, H.new_empty(d, M), 1)
    x = (B, M, d)
    for block in blocks_of(sizes):
        if len(block) == 2:
            G, k = block
            total += _attention(x, k, G, True, False, False, False)
        else:
            total += sum(_conv(x, block[0], True))
    # mean and norm of the features, softplus of the spectrum, its scale
    total += B * (d * r * (2 * (M + N) + 1) + _macs((M + 7) * d + 17)) + _macs(19 * S.numel())
    return total + _refinement(U, V, False) + _calibrate(U, V, 0)


register_macs("lomacs::frozen_svd", _frozen_svd)


def _refine_svd(
    H: Tensor, U: Tensor, V: Tensor | None, scalars: Tensor, k: int, sweeps: int, given: bool
) -> float:
    """Products alone, as many as the reference has: the kernel stops iterations that change nothing."""
    (B, M, N), r = H.shape[:3], U.shape[2]
    return 4 * B * refine_products.products(M, N, r, k, len(scalars), sweeps, V is None, given)


def _approx_svd(
    H: Tensor, scalars: Tensor, rank: int, active: int, form: int, denoise: bool, out: Any
) -> float:
    """Products alone, by the columns that every sample took."""
    M, N = H.shape[1:3]
    taken = Counter(int(code) for code in out[3] if code > 0)
    return 4 * sum(
        times
        * refine_products.approx_products(M, N, rank, len(scalars), active, code // 2, code % 2 == 1, denoise)
        for code, times in taken.items()
    )


register_macs("lomacs::refine_svd", lambda *args, out: _refine_svd(*args))
register_macs(
    "lomacs::refine_svd_backward",
    lambda gU, gS, gV, H, U, V, x, order, sweeps, given, out: (
        3 * _refine_svd(H, U, V, x, order.shape[1], sweeps, given)
    ),
)
register_macs("lomacs::approx_svd", _approx_svd)


class TrueMacCounter(TorchDispatchMode):
    """Counts the real multiply-adds of every op that runs inside it, forward or backward.

    A matrix product or convolution counts one multiply-add a real product, two real x complex, four complex;
    its bias is the accumulator's first value and is free. Everything else counts flops / 2:

    - FFT of n complex points `5 n log2 n` flops, half with a real side
    - a real add, subtract, multiply or compare 1; divide or square root 4; exp, log, tanh, ... 8 (McMahon,
      "The Livermore Fortran Kernels", UCRL-53745, 1986)
    - a complex add 2, multiply 6 (2 by a real number), divide 17 (8 by a real number), magnitude 7
    - an element of: a sigmoid 14, softplus 17, softmax 15, layer normalisation 7 (and 17 a row), sum or mean
      1 (complex 2; a mean's division once a result), 2-norm 2 (complex 4; a square root once a result),
      bilinear interpolation 9, 2x2 average pooling 4, sorting log2 n
    - SVD and QR by the flops of Golub-Reinsch and Householder, four times for complex input

    Views, copies, gathers, fills and operations on integers count nothing.

    Attributes:
        macs: real multiply-adds so far.
        by_op: the same, an op.
        uncounted: calls, an op, of floating-point ops without a formula: these miss from `macs`. Register one
            with `register_macs`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0.0
        self.by_op: Counter[str] = Counter()
        self.uncounted: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        qualified = func._schema.name
        namespace, _, name = qualified.partition("::")
        formula = _REGISTERED.get(qualified)
        known = formula is not None
        if namespace == "aten" and not known:
            name = name if name in _FORMULAS or name in _FREE else name.rstrip("_")
            formula = _FORMULAS.get(name)
            known = formula is not None or name in _FREE or func.is_view
        if not known and qualified != "prim::device":
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if formula is not None:
            self._count(qualified, args, kwargs, out, formula)
        elif not known and _touches_floats(args, kwargs, out):
            self.uncounted[qualified] += 1
        return out

    def _count(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, formula: Formula
    ) -> None:
        if not _touches_floats(args, kwargs, out):
            return
        options = {key: value for key, value in kwargs.items() if key != "out"}
        macs = formula(*args, out=out, **options)
        if macs is None:
            self.uncounted[name] += 1
        else:
            self.macs += macs
            self.by_op[name] += macs  # type: ignore[assignment]


def _touches_floats(*trees: Any) -> bool:
    leaves = (leaf for leaf in tree_leaves(trees) if isinstance(leaf, Tensor))
    return any(leaf.is_floating_point() or leaf.is_complex() for leaf in leaves)


def true_macs(fn_or_net: Callable[..., Any], *inputs: Any, samples: int | None = None) -> float:
    """Real multiply-adds a sample of everything that `fn_or_net(*inputs)` runs, by `TrueMacCounter`.

    Args:
        fn_or_net: a function or module; a network may come without inputs and is then run on one sample.
        inputs: its arguments.
        samples: by what to divide; the first dimension of the first tensor among the inputs when not given.

    Warns:
        RuntimeWarning: where floating-point ops without a formula ran, naming them: the count lacks these.

    Raises:
        ValueError: where the number of samples is neither given nor to be seen.
    """
    alone = False
    if not inputs and isinstance(fn_or_net, reference.LoMACSSVDNet):
        alone = True
        weight = fn_or_net.like
        zeros = torch.zeros(1, fn_or_net.M, fn_or_net.N, 2, dtype=weight.dtype, device=weight.device)
        inputs = (zeros, 0)
    if samples is None:
        tensors = [x for x in inputs if isinstance(x, Tensor) and x.ndim]
        samples = tensors[0].shape[0] if tensors else 0
    if samples < 1:
        raise ValueError(f"samples must be given where inputs hold no batch of tensors, got {samples}")
    # a network alone is counted as it serves: what is kept for gradients is work of training
    recorded = torch.is_grad_enabled() and not alone
    with TrueMacCounter() as counter, torch.set_grad_enabled(recorded):
        fn_or_net(*inputs)
    if counter.uncounted:
        names = ", ".join(sorted(counter.uncounted))
        warnings.warn(f"no formula for {names}: the count lacks these", RuntimeWarning, stacklevel=2)
    return counter.macs / samples


Batch = tuple[int, Any, Tensor, Tensor]


class _Sums:
    """Running sums of the three terms in float64."""

    def __init__(self) -> None:
        self.terms = np.zeros(3, dtype=np.float64)
        self.samples = 0

    def add(self, terms: np.ndarray, samples: int) -> None:
        self.terms += terms
        self.samples += samples

    def as_dict(self) -> dict[str, Any]:
        rec, ortho_u, ortho_v = (float(x) for x in self.terms / self.samples)
        return {
            "ae": rec + ortho_u + ortho_v,
            "rec": rec,
            "ortho_u": ortho_u,
            "ortho_v": ortho_v,
            "samples": self.samples,
        }


def _raise_non_finite(index: int, scenario: int, terms: Tensor, tensors: Mapping[str, Tensor]) -> None:
    sample = int((~terms.isfinite()).any(0).nonzero()[0])
    culprits = [name for name, x in tensors.items() if not bool(x[sample].isfinite().all())]
    what = ", ".join(culprits) or "the approximation error"
    raise ValueError(
        f"decompose and labels must be finite, got NaN or Inf in {what} "
        f"at sample {sample} of batch {index}, scenario {scenario}"
    )


def evaluate(
    decompose: Callable[[Tensor, Any], tuple[Tensor, Tensor, Tensor]], batches: Iterable[Batch]
) -> dict[str, Any]:
    """Approximation error of a decomposition over a data set, overall and a scenario, in one pass.

    Args:
        decompose: `decompose(H, sid) -> U, S, V` of a batch, S in the scale of H; called without gradients.
        batches: `(scenario, sid, input, label)`: the scenario's number, whatever decompose takes as sid, and
            input and label complex `(b, M, N)`. The error is taken against the label.

    Returns:
        Means over samples `ae`, `rec`, `ortho_u`, `ortho_v` (see `ae_terms`) and the number of `samples`;
        under `scenarios`, by the scenario's number as a string, the same. Plain numbers, ready for JSON.

    Raises:
        ValueError: for NaN or Inf in a result or label, naming batch, sample and tensor; for no samples.
    """
    total = _Sums()
    scenarios: dict[int, _Sums] = {}
    for index, (scenario, sid, H, label) in enumerate(batches):
        if not len(H):
            continue
        with torch.no_grad():
            U, S, V = decompose(H, sid)
            label = label.to(U.device)
            terms = torch.stack(ae_terms(U, S, V, label))
        if not bool(terms.isfinite().all()):
            tensors = {"the label": label, "U": U, "S": S, "V": V}
            _raise_non_finite(index, int(scenario), terms, tensors)
        sums = terms.sum(1).cpu().numpy()
        for part in (total, scenarios.setdefault(int(scenario), _Sums())):
            part.add(sums, len(H))
    if not total.samples:
        raise ValueError("batches must hold at least one sample, got none")
    return total.as_dict() | {"scenarios": {str(key): scenarios[key].as_dict() for key in sorted(scenarios)}}


def time_per_channel(
    fns: Mapping[str, Callable[..., Any]],
    batch: Tensor | tuple[Any, ...],
    *,
    repeats: int = 15,
    warmup: float = 0.2,
    least: float = 2e-3,
) -> dict[str, dict[str, float]]:
    """Wall time a channel of several functions on the same batch, in seconds.

    Each is first called at least three times and for `warmup` seconds; then the functions take turns, each
    round starting with another one, so that drift of the clock and load fall on all alike. A measurement
    repeats the call until it lasts about `least` seconds, and waits for the CUDA device where the batch lies
    on one. Gradients are recorded or not as the caller has set.

    Args:
        fns: functions by name, called `fn(batch)`, or `fn(*batch)` for a tuple.
        batch: a tensor or a tuple with one; the first dimension of the first tensor counts the channels.
        repeats: measurements a function.
        warmup: seconds of warm-up a function.
        least: least duration of one measurement in seconds.

    Returns:
        By name: `median`, quartiles `q25` and `q75`, `min`, all in seconds a channel, and `repeats` and
        `calls` (calls a measurement).

    Raises:
        ValueError: for no functions, no channels or repeats below 1.
    """
    args = batch if isinstance(batch, tuple) else (batch,)
    tensors = [x for x in args if isinstance(x, Tensor) and x.ndim]
    if not tensors or not len(tensors[0]):
        raise ValueError("batch must be a tensor with at least one channel, or a tuple with one")
    if not fns:
        raise ValueError("fns must name at least one function, got none")
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    device = tensors[0].device

    def seconds(fn: Callable[..., Any], calls: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            fn(*args)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    calls = {}
    for name, fn in fns.items():
        until = time.perf_counter() + warmup
        spent: list[float] = []
        while len(spent) < 3 or time.perf_counter() < until:
            spent.append(seconds(fn, 1))
        calls[name] = max(1, math.ceil(least / max(min(spent), 1e-9)))
    names = list(fns)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            times[name].append(seconds(fns[name], calls[name]) / calls[name] / len(tensors[0]))
    result = {}
    for name in names:
        q25, median, q75 = np.quantile(times[name], (0.25, 0.5, 0.75))
        result[name] = {
            "median": float(median),
            "q25": float(q25),
            "q75": float(q75),
            "min": min(times[name]),
            "repeats": repeats,
            "calls": calls[name],
        }
    return result


def parameter_count(net: nn.Module) -> int:
    """Number of parameters, trainable or not."""
    return sum(p.numel() for p in net.parameters())
