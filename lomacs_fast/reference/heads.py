"""The heads of the network: from a feature to the raw columns of both factors."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear


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
