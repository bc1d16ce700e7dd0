"""Factors of channels in their own scale, from a network that works on normalised ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .data.augmentation import unit_channels


@torch.no_grad()
def decompose(
    net: nn.Module, H: Tensor, sid: Tensor | int, *, first: int = 0, name: str = "H"
) -> tuple[Tensor, Tensor, Tensor]:
    """`U, S, V` with `H ~ U diag(S) V^H`: the network at `H / |H|_F`, S times `|H|_F`.

    Args:
        net: a `LoMACSSVDNet` or a `FrozenSVDNet`, of either precision.
        H: complex64 or complex128 `(B, M, N)`, of any scale and on any device. It is normalised in its own
            precision, then cast to that of the network.
        sid: scenes, integer `(B,)` or one integer for all.
        first: index of the first sample of H in its source, for messages.
        name: what messages call H, its file for example.

    Returns:
        U complex `(B, M, r)`, S real `(B, r)`, V complex `(B, N, r)`, in the precision and on the device of
        H. Where the product with `|H|_F` leaves that precision, S is 0 or Inf. A zero channel has S = 0 and
        the U and V that the network gives it.

    Raises:
        TypeError: for another H than such a tensor.
        ValueError: for NaN or Inf in H, naming the first such sample.
    """
    if not isinstance(H, Tensor) or H.dtype not in (torch.complex64, torch.complex128):
        came = str(H.dtype) if isinstance(H, Tensor) else type(H).__name__
        raise TypeError(f"{name} must be a complex64 or complex128 tensor, got {came}")
    if H.ndim != 3:
        raise ValueError(f"{name} must have shape (B, M, N), got {tuple(H.shape)}")
    finite = torch.view_as_real(H.resolve_conj()).isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        sample = first + int((~finite).nonzero()[0])
        raise ValueError(f"{name} must be finite, sample {sample} holds NaN or Inf")
    X, size, scale = unit_channels(H)
    like: Any = net.like
    X = X.to(like.device, torch.promote_types(like.dtype, torch.complex32))
    U, S, V, *_ = net(X, sid.to(like.device) if isinstance(sid, Tensor) else sid)
    # one factor after the other: their product may overflow where S does not
    S = S.to(H.device, H.real.dtype) * size[:, None] * scale[:, None]
    return U.to(H.device, H.dtype), S, V.to(H.device, H.dtype)
