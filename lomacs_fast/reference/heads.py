"""The heads of the network: from a feature to the raw columns of both factors."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import embedding, layer_norm, linear, softplus


def svd_heads(
    feat: Tensor, u_weight: Tensor, u_bias: Tensor, v_weight: Tensor, v_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """`feat Wu^T + bu` and `feat Wv^T + bv`, the linear heads of both factors.

    Args:
        feat: features, real `(B, d)`.
        u_weight, u_bias: `(2Mr, d)` and `(2Mr,)`, of the dtype of `feat`.
        v_weight, v_bias: `(2Nr, d)` and `(2Nr,)`.

    Returns:
        `(B, 2Mr)` and `(B, 2Nr)`: real and imaginary parts of M, of N rows of r columns, interleaved.
    """
    return linear(feat, u_weight, u_bias), linear(feat, v_weight, v_bias)


def pooled_heads(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    scenes: Tensor,
    scene: Tensor,
    u_weight: Tensor,
    u_bias: Tensor,
    v_weight: Tensor,
    v_bias: Tensor,
    s_weight: Tensor,
    s_bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The heads of tokens: `f = layer_norm(mean_t x_t) + scenes[scene]`, its `svd_heads` and the spectrum.

    Args:
        x: tokens, real `(B, T, d)`.
        norm_weight, norm_bias, eps: of the layer normalisation, `(d,)`.
        scenes, scene: a row a scene, `(n, d)`; int64 `(B,)`.
        u_weight, u_bias, v_weight, v_bias: as in `svd_heads`.
        s_weight, s_bias: `(r, d)` and `(r,)`.

    Returns:
        `(B, 2Mr)`, `(B, 2Nr)` as from `svd_heads`, and `softplus(f Ws^T + bs) + 1e-6`, `(B, r)`.
    """
    feat = layer_norm(x.mean(1), x.shape[-1:], norm_weight, norm_bias, eps) + embedding(scene, scenes)
    s = softplus(linear(feat, s_weight, s_bias)) + 1e-6
    return *svd_heads(feat, u_weight, u_bias, v_weight, v_bias), s
