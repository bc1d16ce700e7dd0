"""The frozen networks as one op each: no gradients, one visit a sample on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.flop_counter import register_flop_formula

from .. import reference
from ..reference import refine_products
from ..reference.backbone import FoldedAttention
from ..reference.frozen import FrozenAngular, FrozenWeights, blocks_of, pack_weights
from . import common, gated_conv, spectral
from .backbone import backbone
from .common import library
from .dispatch import Backend, Op
from .freq_gate import cpp_reasons, cpu_gate_reasons, freq_gate, gate_flops
from .ortho import flops_of_refine, native_reasons
from .refine import refine_svd

library.define(
    "frozen_svd(Tensor H, Tensor scene, Tensor packed, int[] sizes, Tensor scalars, float temperature, "
    "float eps) -> (Tensor U, Tensor S, Tensor V)",
    tags=common.TAGS,
)


def _factors_like(H: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Factors as an op gives them: complex where H is, else pairs of real numbers."""
    (B, M, N), pair = H.shape[:3], H.shape[3:]
    S = H.new_empty(B, r, dtype=H.real.dtype if H.is_complex() else H.dtype)
    return H.new_empty(B, M, r, *pair), S, H.new_empty(B, N, r, *pair)


@torch.library.register_fake("lomacs::frozen_svd", lib=library)
def _fake(
    H: Tensor,
    scene: Tensor,
    packed: Tensor,
    sizes: Sequence[int],
    scalars: Tensor,
    temperature: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _factors_like(H, sizes[3])


# what a small call goes by, never traced: a list of integers alone takes a twentieth of one channel's time
library.define(
    "frozen_svd.at_once(Tensor H, Tensor scene, Tensor packed, Tensor scalars, Tensor facts) -> "
    "(Tensor U, Tensor S, Tensor V)"
)


@register_flop_formula(torch.ops.lomacs.frozen_svd)
def _flops(
    H: Sequence[int], scene: Sequence[int], packed: Sequence[int], sizes: Sequence[int], *_: Any, **__: Any
) -> int:
    """What `FlopCounterMode` counts on the reference, whose weights are folded already."""
    (B, M, N), (d, row_hidden, col_hidden, r) = H[:3], sizes[:4]
    U, V, x = (B, M, r, 2), (B, N, r, 2), (B, M, d)
    products = M * 2 * N + (M // 2) * (2 * (N // 2) + M) + r * (2 * (M + N) + 1)
    total = gate_flops(H, (row_hidden, M), (col_hidden, N), 2) + 2 * B * d * products
    for block in blocks_of(sizes):
        if len(block) == 2:
            G, k = block
            total += 2 * B * k * d * (4 * M + 2 * (d // G))
        else:
            total += gated_conv._flops(x, (2 * d, 1, *block))
    return total + flops_of_refine(U, V, (2,)) + spectral._flops_calibrate(U, H, V)


Flat = Sequence[Any]


def _packed(w: FrozenWeights) -> Tensor:
    packed = w.packed if w.packed is not None else pack_weights(w).packed
    assert packed is not None
    return packed


def flat_weights(w: FrozenWeights | FrozenAngular) -> Flat:
    """The op that serves these weights on a CPU, and what it takes after channels and scenes."""
    if isinstance(w, FrozenAngular):
        weights = [w.first, w.second, w.table, w.numbers, w.scalars]
        op = torch.ops.lomacs.frozen_angular_svd.default
        return op, weights, w.array or (), w.rank, w.active, w.sweeps
    return torch.ops.lomacs.frozen_svd.default, _packed(w), w.sizes(), w.scalars, w.temperature, w.eps


def flat_at_once(w: FrozenWeights | FrozenAngular, M: int, N: int) -> Flat:
    """The same for `frozen_svd_at_once`, of tensors that want no gradients; nothing for another device.

    The op, the shape of a channel where the op does not look at it, and what it takes after the scenes.
    """
    if w.scalars.device.type != "cpu" or w.table.device.type != "cpu":
        return ()
    # of no call's mode or default device: it is kept
    with torch.inference_mode(False):
        if isinstance(w, FrozenAngular):
            op, weights, *rest = flat_weights(w)
            return op, (M, N), ([x.detach() for x in weights], *rest)
        facts = torch.tensor([M, N, w.temperature, w.eps, *w.sizes()], dtype=torch.float64, device="cpu")
        return torch.ops.lomacs.frozen_svd.at_once, None, (_packed(w).detach(), w.scalars.detach(), facts)


def _native(
    H: Tensor, scene: Tensor, weights: FrozenWeights | FrozenAngular
) -> tuple[Tensor, Tensor, Tensor]:
    op, *flat = flat_weights(weights)
    U, S, V = op(common.planes(H), scene.contiguous(), *flat)
    return torch.view_as_complex(U), S, torch.view_as_complex(V)


@functools.lru_cache(maxsize=64)
def _rows(row: int, B: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.full((B,), row, device="cpu")


def serves_at_once(H: Any) -> bool:
    """Whether `frozen_svd_at_once` may be asked: H small, plain, of the CPU, no mode, tracer or transform."""
    return (
        type(H) is Tensor
        and common.small_native(H)
        and _get_current_dispatch_mode() is None
        and torch._C._get_tracing_state() is None
        # without a graph: autograd is passed by elsewhere
        and not (H.requires_grad and torch.is_grad_enabled())
    )


def frozen_svd_at_once(H: Tensor, sid: Any, scenes: int, flat: Flat) -> tuple[Tensor, Tensor, Tensor] | None:
    """What the kernel answers to a small call that nobody has looked at yet; see `tokens.at_once`.

    Every step of Python is felt here: a call of one channel finds no cache warm.

    Args:
        H: channels that `serves_at_once` lets through.
        sid: scenes, as the module takes them; one integer, or what is out of range, is left to it.
        scenes: how many there are.
        flat: of `flat_at_once`.
    """
    if not flat:
        return None
    try:
        if sid is None:
            sid = _rows(scenes, H.shape[0])
        # the kernel takes the row behind the scenes too, their mean
        elif type(sid) is not Tensor or max(sid.tolist(), default=0) >= scenes:
            return None
        op, shape, rest = flat
        if shape is not None and H.shape[1:3] != shape:
            return None
        U, S, V = op(H, sid, *rest)
        return (U, S, V) if H.is_complex() else (torch.view_as_complex(U), S, torch.view_as_complex(V))
    except (RuntimeError, TypeError, IndexError):
        return None


def _reasons(H: Tensor, scene: Tensor, weights: FrozenWeights) -> list[str]:
    found = common.mixed_reasons(H=H, weights=weights.pos) + cpu_gate_reasons(H)
    if any(isinstance(b, FoldedAttention) != (i % 2 == 0) for i, b in enumerate(weights.blocks)):
        found.append("blocks must alternate, attention first")
    found += common.transform_reasons()
    return found or cpp_reasons(H.device)


def _refine(
    H: Tensor,
    U: Tensor,
    V: Tensor,
    steps: int,
    *,
    scalars: Tensor,
    sweeps: int,
    hermitian: bool,
    orthonormal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return refine_svd(H, U, V, steps, None, hermitian, scalars, sweeps, orthonormal)


# the stems on a device, each by what serves it
_STEMS = SimpleNamespace(
    freq_gate=lambda H, *weights: freq_gate(H, *weights, False),
    backbone=backbone,
    svd_tail=spectral.svd_tail,
    refine_svd=_refine,
)


def _without_autocast() -> torch.autocast:
    # as the op of the CPU: frozen weights take no part in it
    return torch.autocast("cuda", enabled=False)


def _stem_by_stem(H: Tensor, scene: Tensor, weights: FrozenWeights) -> tuple[Tensor, Tensor, Tensor]:
    with _without_autocast():
        return reference.frozen_svd(H, scene, weights, _STEMS)


def _device_reasons(H: Tensor, weight: Tensor) -> list[str]:
    """Why a network is not served stem by stem on a device; what a stem says itself comes from it."""
    found = common.mixed_reasons(H=H, weights=weight) + common.transform_reasons()
    return found + common.single_triton_reasons("H", H)


def _eager(H: Tensor, scene: Tensor, weights: FrozenWeights) -> tuple[Tensor, Tensor, Tensor]:
    return reference.frozen_svd(H, scene, weights)


def _nominal(device: torch.device) -> tuple[Any, ...]:
    net = reference.LoMACSSVDNet(8, 8, 4, 2, dim=16, gate_hidden=8, k_len=4).to(device)
    H = torch.ones(1, 8, 8, dtype=torch.complex64, device=device)
    return H, torch.zeros(1, dtype=torch.int64, device=device), reference.fold_network(net)


frozen_svd = Op(
    "frozen_svd",
    [
        Backend("triton", lambda H, _, w: _device_reasons(H, w.pos), _stem_by_stem),
        Backend("cpp", _reasons, _native),
        Backend("eager", lambda *_: (), _eager),
    ],
    ("H", "scene", "weights"),
    _nominal,
)


library.define(
    "frozen_angular_svd(Tensor H, Tensor scene, Tensor[] weights, int[] array, int rank, int active, "
    "int sweeps) -> (Tensor U, Tensor S, Tensor V)",
    tags=common.TAGS,
)


@torch.library.register_fake("lomacs::frozen_angular_svd", lib=library)
def _fake_angular(
    H: Tensor,
    scene: Tensor,
    weights: Sequence[Tensor],
    array: Sequence[int],
    rank: int,
    active: int,
    sweeps: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return _factors_like(H, rank)


@register_flop_formula(torch.ops.lomacs.frozen_angular_svd)
def _flops_angular(
    H: Sequence[int],
    scene: Sequence[int],
    weights: Sequence[Sequence[int]],
    array: Sequence[int],
    rank: int,
    active: int,
    sweeps: int,
    *_: Any,
    **__: Any,
) -> int:
    """What `FlopCounterMode` counts on the reference where every completion is the short one."""
    (B, M, N), hidden, steps = H[:3], weights[0][0], weights[4][0]
    total, tied, k, c = 0, bool(array), active, rank - active
    if tied:
        p, a, b = array
        total += 2 * p * (a * b) ** 2 * M + 2 * 9 * hidden * 4 * a * b
    total += refine_products.products(M, N, k, k, steps, sweeps, tied, True)
    for n in ((M,) if tied else (M, N)) if c else ():
        total += refine_products.short_completion(n, k, c)
    return 2 * B * total


def _angular_reasons(H: Tensor, scene: Tensor, weights: FrozenAngular) -> list[str]:
    M, N, r = *H.shape[-2:], weights.rank
    angles = 4 * M if weights.array is None else 4 * weights.array[1] * weights.array[2]
    size = 6 * M * N + 12 * (M + N) * r + 40 * r * r + angles * len(weights.first)
    return native_reasons(size, H=H, weights=weights.table)


def _angular_stem_by_stem(H: Tensor, scene: Tensor, weights: FrozenAngular) -> tuple[Tensor, Tensor, Tensor]:
    with _without_autocast():
        return reference.frozen_angular_svd(H, scene, weights, _STEMS)


def _angular_eager(H: Tensor, scene: Tensor, weights: FrozenAngular) -> tuple[Tensor, Tensor, Tensor]:
    return reference.frozen_angular_svd(H, scene, weights)


def _nominal_angular(device: torch.device) -> tuple[Any, ...]:
    net = reference.LoMACSSVDNet(8, 8, 4, 2, head="angular", refine_steps=1, hermitian=True).to(device)
    H = torch.ones(1, 8, 8, dtype=torch.complex64, device=device)
    return H, torch.zeros(1, dtype=torch.int64, device=device), reference.fold_angular(net)


frozen_angular_svd = Op(
    "frozen_angular_svd",
    [
        Backend("triton", lambda H, _, w: _device_reasons(H, w.table), _angular_stem_by_stem),
        Backend("cpp", _angular_reasons, _native),
        Backend("eager", lambda *_: (), _angular_eager),
    ],
    ("H", "scene", "weights"),
    _nominal_angular,
)
