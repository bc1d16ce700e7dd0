"""The backbone of the network: pre-norm residual blocks, the mean over tokens, a last norm."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .gated_conv import gated_conv1d
from .projected_attention import Grouped, projected_attention


class AttentionBlock(NamedTuple):
    """A pre-norm attention block: norm `(d,)` twice, and the weights of `projected_attention`."""

    norm_weight: Tensor
    norm_bias: Tensor
    wq: Grouped
    wk: Grouped
    wv: Grouped
    wo: Grouped
    pk: Grouped
    pv: Grouped


class FoldedAttention(NamedTuple):
    """A pre-norm attention block whose weights are folded.

    With `A = Wq^T Wk / sqrt(a)` and `C = Wv^T Wo^T` a group: `softmax(x A (P_k^T x)^T) (P_v^T x) C`.
    `norm_weight`, `norm_bias` `(d,)`; `score`, `mix` `(G, g, g)`; `pk`, `pv` `(G, T, k)`.
    """

    norm_weight: Tensor
    norm_bias: Tensor
    score: Tensor
    mix: Tensor
    pk: Tensor
    pv: Tensor


class ConvBlock(NamedTuple):
    """A pre-norm gated convolution block: norm `(d,)` twice, and the weights of `gated_conv1d`."""

    norm_weight: Tensor
    norm_bias: Tensor
    dw_weight: Tensor
    dw_bias: Tensor
    pw_weight: Tensor
    pw_bias: Tensor


Block = AttentionBlock | FoldedAttention | ConvBlock


def _folded(x: Tensor, block: FoldedAttention) -> Tensor:
    groups = []
    for xg, score, mix, pk, pv in zip(
        x.chunk(len(block.score), -1), block.score, block.mix, block.pk, block.pv, strict=True
    ):
        keys, values = pk.mT @ xg @ score.mT, pv.mT @ xg @ mix
        groups.append(torch.softmax(xg @ keys.mT, -1) @ values)
    return torch.cat(groups, -1)


def folded_attention(x: Tensor, block: FoldedAttention, eps: float) -> Tensor:
    """`x + attention(layer_norm(x))` of folded weights."""
    return x + _folded(nn.functional.layer_norm(x, x.shape[-1:], *block[:2], eps), block)


MIXERS = SimpleNamespace(projected_attention=projected_attention, gated_conv1d=gated_conv1d)


def backbone(
    x: Tensor,
    blocks: Sequence[Block],
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    functions: Any = MIXERS,
) -> Tensor:
    """`layer_norm(mean over tokens of x_n)`, with `x_i = x_(i-1) + mixer_i(layer_norm(x_(i-1)))`.

    Args:
        x: `(B, T, d)`, the tokens.
        blocks: in their order: `AttentionBlock`, `FoldedAttention` or `ConvBlock`, each with the norm before
            its mixer; any number of them.
        norm_weight, norm_bias: of the last norm, `(d,)`; either may be left out.
        eps: of all norms.

    Returns:
        `(B, d)`.
    """
    dtype = x.dtype
    for block in blocks:
        if isinstance(block, FoldedAttention):
            x = folded_attention(x, block, eps)
        elif isinstance(block, AttentionBlock):
            x = functions.projected_attention(x, *block[2:], *block[:2], eps)
        else:
            x = functions.gated_conv1d(x, *block[2:], *block[:2], eps)
    # a norm under autocast gives single precision on some devices
    return nn.functional.layer_norm(x.mean(1), x.shape[-1:], norm_weight, norm_bias, eps).to(dtype)
