"""Gated convolution over tokens: depthwise taps, a sigmoid gate, a pointwise product."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .arguments import integer


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
    """`pointwise(a * sigmoid(b))` with `[a, b]` the halves of a depthwise convolution over tokens.

    The depthwise convolution has two outputs an input channel: output j reads input `j // 2`, so value c
    reads input `c // 2` and its gate reads `(d + c) // 2`. Zero padding of `k // 2` on both sides.
    With a norm the whole residual block, `x + pointwise(...)` of `layer_norm(x)`.

    Args:
        x: `(B, T, d)`.
        dw_weight, dw_bias: `(2d, 1, k)` with k odd, `(2d,)`.
        pw_weight, pw_bias: `(d, d, 1)`, `(d,)`.
        norm_weight, norm_bias, eps: of a layer normalisation over d before the taps, `(d,)`; its bias may be
            left out.

    Returns:
        `(B, T, d)`.
    """
    if norm_weight is not None:
        normed = nn.functional.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
        return x + gated_conv1d(normed, dw_weight, dw_bias, pw_weight, pw_bias)
    d = x.shape[-1]
    y = nn.functional.conv1d(x.mT, dw_weight, dw_bias, padding=dw_weight.shape[-1] // 2, groups=d)
    value, gate = y.chunk(2, dim=1)
    return nn.functional.conv1d(value * torch.sigmoid(gate), pw_weight, pw_bias).mT


class GatedConv1D(nn.Module):
    """Parameters of the gated convolution; `forward(x)` maps `(B, T, d)` to `(B, T, d)`.

    Args:
        dim: d.
        k: taps of the depthwise convolution, odd.

    Raises:
        TypeError, ValueError: for another type or value of an argument, naming it.

    Parameters: `dw.weight (2d, 1, k)`, `dw.bias (2d,)`, `pw.weight (d, d, 1)`, `pw.bias (d,)`.
    """

    functions: ClassVar[Any] = SimpleNamespace(gated_conv1d=gated_conv1d)

    def __init__(self, dim: int, k: int = 5) -> None:
        super().__init__()
        dim, k = integer("dim", dim, 1), integer("k", k)
        if k < 1 or k % 2 == 0:
            raise ValueError(f"k must be odd and positive, got {k}")
        self.dw = nn.Conv1d(dim, 2 * dim, k, groups=dim, padding=k // 2)
        self.pw = nn.Conv1d(dim, dim, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming-uniform weights (a = sqrt 5), zero biases."""
        for conv in (self.dw, self.pw):
            nn.init.kaiming_uniform_(conv.weight, a=math.sqrt(5))
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """`dw_weight, dw_bias, pw_weight, pw_bias`, in the order the function takes them."""
        dw, pw = self.dw, self.pw
        return dw.weight, dw.bias, pw.weight, pw.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        return self.functions.gated_conv1d(x, *self.weights)

    def residual(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """`x + forward(norm(x))`, the pre-norm block."""
        return self.functions.gated_conv1d(x, *self.weights, norm.weight, norm.bias, norm.eps)
