"""The backbone as one op for inference, where one sample's tokens stay near the processor: one launch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import reference
from ..kernels.kinds import CONVOLUTION, FOLDED, STACKED, tensors
from ..reference.backbone import AttentionBlock, Block, ConvBlock, FoldedAttention
from . import common, gated_conv, tokens
from .common import library
from .dispatch import Backend, Op, chosen
from .projected_attention import WIDEST, _products, projected_attention

# kinds of the blocks and the order of weights: see `kernels.kinds`; it has no gradient
library.define(
    "backbone(Tensor x, Tensor[] weights, int[] kinds, Tensor? norm_weight, Tensor? norm_bias, float eps) "
    "-> Tensor",
    tags=common.TAGS,
)

# T x d of which a sample's tokens, twice in float32, stay in the cache of a multiprocessor
TOKENS = 1 << 14
CHANNELS = 256
# addresses that a launch has room for
ADDRESSES = 400


def flattened(blocks: Sequence[Block]) -> tuple[list[Tensor], list[int]]:
    """Weights and kinds of blocks as the op takes them; nothing is copied that is contiguous."""
    weights: list[Tensor] = []
    kinds: list[int] = []
    for block in blocks:
        if isinstance(block, ConvBlock):
            kinds.append(CONVOLUTION)
        elif isinstance(block, FoldedAttention):
            kinds.append(FOLDED)
        else:
            listed = not any(isinstance(w, Tensor) for w in block[2:])
            kinds.append(len(block.wq) if listed else STACKED)
            if not listed:
                mixer = (w if isinstance(w, Tensor) else torch.stack(list(w)) for w in block[2:])
                block = AttentionBlock(*block[:2], *mixer)
        for w in block:
            weights += [w] if isinstance(w, Tensor) else w
    return [w.resolve_neg().contiguous() for w in weights], kinds


def nested(weights: Sequence[Any], kinds: Sequence[int]) -> Iterator[Block]:
    """The blocks of such weights, or of their shapes."""
    first = 0
    for kind in kinds:
        own = weights[first : first + tensors(kind)]
        if kind > 0:
            yield AttentionBlock(*own[:2], *(own[i : i + kind] for i in range(2, len(own), kind)))
        else:
            yield {CONVOLUTION: ConvBlock, STACKED: AttentionBlock, FOLDED: FoldedAttention}[kind](*own)
        first += len(own)


def _check(x: Tensor, weights: Sequence[Tensor], kinds: Sequence[int], *norm: Tensor | None) -> None:
    torch._check(x.ndim == 3, lambda: f"x must be (B, T, d), got {tuple(x.shape)}")
    torch._check(x.dtype in tokens.DTYPES, lambda: f"x must be real floating point, got {x.dtype}")
    count = sum(tensors(kind) for kind in kinds)
    torch._check(len(weights) == count, lambda: f"weights must be {count} tensors, got {len(weights)}")
    for w in (*weights, *norm):
        torch._check(w is None or w.dtype == x.dtype, lambda: f"weights must be {x.dtype} as x is")


@torch.library.register_fake("lomacs::backbone", lib=library)
def _fake(
    x: Tensor,
    weights: Sequence[Tensor],
    kinds: Sequence[int],
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> Tensor:
    _check(x, weights, kinds, norm_weight, norm_bias)
    return x.new_empty(x.shape[0], x.shape[2])


@torch.library.impl("lomacs::backbone", "CompositeExplicitAutograd", lib=library)
def _anywhere(x: Tensor, weights: Sequence[Tensor], kinds: Sequence[int], *rest: Any) -> Tensor:
    _check(x, weights, kinds, *rest[:2])
    return reference.backbone(x, list(nested(weights, kinds)), *rest)


@torch.library.impl("lomacs::backbone", "CUDA", lib=library)
def _cuda(*args: Any) -> Tensor:
    from ..kernels import backbone as kernels

    return kernels.backbone(*args)


tokens.register_autocast("backbone")


@register_flop_formula(torch.ops.lomacs.backbone)
def _flops(x: Sequence[int], weights: Sequence[Any], kinds: Sequence[int], *_: Any, **__: Any) -> int:
    """What `FlopCounterMode` counts on the reference."""
    B, T, _d = x
    total = 0
    for kind, block in zip(kinds, nested(weights, kinds), strict=True):
        if isinstance(block, ConvBlock):
            total += gated_conv._flops(x, block.dw_weight)  # type: ignore[arg-type]
        elif isinstance(block, FoldedAttention):
            (G, g, _g), k = block.score, block.pk[2]
            total += 2 * B * G * k * g * (4 * T + 2 * g)
        else:
            wq, pk = (block.wq[0], block.pk[0]) if kind > 0 else (block.wq[1:], block.pk[1:])
            G = kind if kind > 0 else block.wq[0]
            total += 2 * sum(_products(x, wq[0], pk[1], G))  # type: ignore[arg-type]
    return total


def _one_launch_reasons(
    x: Tensor, blocks: Sequence[Block], norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float
) -> list[str]:
    (T, d), found = x.shape[1:], tokens.triton_reasons(x)
    weights: list[Tensor | None] = []
    for block in blocks:
        for part in block:
            weights += part if isinstance(part, Sequence) else [part]
    if common.records((x, norm_weight, norm_bias, *weights)):
        found.append("gradients are wanted, the kernel has none")
    if any(w is None for w in weights):
        found.append("the norm of a block has no bias")
    if not blocks:
        found.append("there are no blocks")
    if T * d > TOKENS or d > CHANNELS:
        found.append(
            f"{T} tokens of {d} channels do not stay near the processor, at most {TOKENS} numbers in all and "
            f"{CHANNELS} a token do"
        )
    if len(weights) > ADDRESSES:
        found.append(f"a launch has room for {ADDRESSES} addresses, there are {len(weights)} weights")
    for block in blocks:
        if isinstance(block, ConvBlock):
            if d % 2:
                found.append(f"pairs of channels need an even number of them, got {d}")
            if block.dw_weight.shape[-1] > gated_conv.TAPS:
                found.append(f"at most {gated_conv.TAPS} taps, got {block.dw_weight.shape[-1]}")
        else:
            G, a, _ = (len(block[2]), *block[2][0].shape)
            if max(d // G, a) > WIDEST:
                found.append(f"{max(d // G, a)} channels a group are more than {WIDEST}")
    return list(dict.fromkeys(found))


def _fused(
    x: Tensor, blocks: Sequence[Block], norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float
) -> Tensor:
    x = x.resolve_neg().contiguous()
    weights, kinds = flattened(blocks)
    norm = [None if w is None else w.resolve_neg().contiguous() for w in (norm_weight, norm_bias)]
    named = {f"weight {i} of the blocks": w for i, w in enumerate(weights)}
    tokens.same_device(x, **named, norm_weight=norm[0], norm_bias=norm[1])
    return tokens.unrecorded(torch.ops.lomacs.backbone.default, x, weights, kinds, *norm, eps)


# a launch a block, each by what serves it
_BLOCKWISE = SimpleNamespace(projected_attention=projected_attention, gated_conv1d=gated_conv.gated_conv1d)


def _eager(x: Tensor, *rest: Any) -> Tensor:
    return reference.backbone(tokens.as_under_autocast(x), *rest)


def _nominal(device: torch.device) -> tuple[Any, ...]:
    def ones(*shape: int) -> Tensor:
        return torch.ones(shape, device=device)

    projections = ones(4, 64, 32), ones(4, 64, 32)
    attention = AttentionBlock(
        ones(64), ones(64), ones(4, 32, 16), ones(4, 32, 16), ones(4, 16, 16), ones(4, 16, 16), *projections
    )
    conv = ConvBlock(ones(64), ones(64), ones(128, 1, 3), ones(128), ones(64, 64, 1), ones(64))
    return ones(1, 64, 64), (attention, conv), ones(64), ones(64), 1e-5


_op = Op(
    "backbone",
    [Backend("triton", _one_launch_reasons, _fused), Backend("eager", lambda *_: (), _eager)],
    ("x", "blocks", "norm_weight", "norm_bias", "eps"),
    _nominal,
)


def backbone_at_once(
    x: Tensor, blocks: Sequence[Block], norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float
) -> Tensor | None:
    """The backbone in one launch; None where it takes a launch a block."""
    wanted, args = chosen(), (x, blocks, norm_weight, norm_bias, eps)
    if wanted in ("auto", "triton") and not _one_launch_reasons(*args):
        return _fused(*args)
    if wanted not in ("auto", "eager") and (
        not blocks or any(isinstance(block, FoldedAttention) for block in blocks)
    ):
        # no op of a block would refuse what is served by name here or not at all
        refused: Tensor = _op(*args)
        return refused
    return None


def backbone(
    x: Tensor, blocks: Sequence[Block], norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float
) -> Tensor:
    """The backbone in one launch where it can be, in a launch a block where not."""
    found = backbone_at_once(x, blocks, norm_weight, norm_bias, eps)
    if found is not None:
        return found
    return reference.backbone(x, blocks, norm_weight, norm_bias, eps, _BLOCKWISE)
