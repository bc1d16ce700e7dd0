"""The dual view: tokens from a channel beside its coarse map, projected to the feature width."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .freq_gate import freq_gate


def real_view(z: Tensor) -> Tensor:
    """Real and imaginary parts in a last dimension of 2; conjugated and negated views are resolved first."""
    return torch.view_as_real(z.resolve_conj().resolve_neg())


def coarse_map(Hd: Tensor) -> Tensor:
    """2x2 average pooling of the real and imaginary parts, then bilinear upsampling back to `M x N`.

    Hd complex `(B, M, N)`, M, N >= 2; the result is real `(B, 2, M, N)`. Odd sizes follow torch: the last
    row or column takes no part in the pooling, and upsampling (`align_corners=False`) stretches over it.
    """
    # parts stacked, not permuted: the gradient of a permuted view_as_real fails on an empty batch
    planes = torch.stack([Hd.real, Hd.imag], 1)
    pooled = nn.functional.avg_pool2d(planes, 2)
    return nn.functional.interpolate(pooled, size=Hd.shape[-2:], mode="bilinear", align_corners=False)


def both_views(Hd: Tensor) -> Tensor:
    """`[raw_m, coarse_m]` of every token, real `(B, M, 4N)`; see `dual_view_project`."""
    raw = real_view(Hd).flatten(-2)
    coarse = coarse_map(Hd).permute(0, 2, 3, 1).flatten(-2)
    return torch.cat([raw, coarse], -1)


def dual_view_project(Hd: Tensor, weight: Tensor, bias: Tensor, pos: Tensor) -> Tensor:
    """Tokens `X_m = W [raw_m, coarse_m] + b + pos_m`.

    `raw_m` holds the real and imaginary parts of row m of Hd interleaved (2N numbers), `coarse_m` the same
    of its coarse map.

    Args:
        Hd: complex `(B, M, N)`.
        weight: real `(d, 4N)`.
        bias: real `(d,)`.
        pos: real `(1, M, d)`.

    Returns:
        Real `(B, M, d)`.
    """
    return nn.functional.linear(both_views(Hd), weight, bias) + pos


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
    """From a channel to its tokens: `Hd = freq_gate(H)`, `X = dual_view_project(Hd)`, the network's front.

    Args:
        H: complex `(B, M, N)`, M, N >= 2.
        row_w1, row_w2, col_w1, col_w2, temperature, normalize: as in `freq_gate`.
        weight, bias, pos: as in `dual_view_project`.

    Returns:
        X real `(B, M, d)` and Hd complex `(B, M, N)`; with `normalize` also the norms, real `(B,)`.
    """
    gated: Any = freq_gate(H, row_w1, row_w2, col_w1, col_w2, temperature, normalize=normalize)
    Hd, *norms = gated if normalize else (gated,)
    return dual_view_project(Hd, weight, bias, pos), Hd, *norms
