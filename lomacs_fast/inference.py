"""Factors of channels in their own scale, from a network that works on normalised ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .data.augmentation import frobenius_normalize


@torch.no_grad()
def decompose(net: nn.Module, H: Tensor, sid: Tensor | int) -> tuple[Tensor, Tensor, Tensor]:
    """`U, S, V` with `H ~ U diag(S) V^H`: the network at `H / |H|_F`, S times `|H|_F`.

    Args:
        net: a `LoMACSSVDNet`.
        H: complex `(B, M, N)`, of any scale and on any device.
        sid: scenes, integer `(B,)` or one integer for all.

    Returns:
        U complex `(B, M, r)`, S real `(B, r)`, V complex `(B, N, r)`, on the device of H. A zero channel has
        S = 0 and the U and V that the network gives it.

    Raises:
        ValueError: for NaN or Inf in H, naming the first such sample.
    """
    finite = torch.view_as_real(H.resolve_conj()).isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        raise ValueError(f"H must be finite, sample {int((~finite).nonzero()[0])} holds NaN or Inf")
    parameter: Any = next(net.parameters())
    normalized, norm = frobenius_normalize(H.to(parameter.device))
    U, S, V, _ = net(normalized, sid.to(parameter.device) if isinstance(sid, Tensor) else sid)
    return U.to(H.device), (S * norm[:, None]).to(H.device), V.to(H.device)
