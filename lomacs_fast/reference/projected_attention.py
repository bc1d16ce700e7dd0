"""Grouped attention over keys and values that a learned projection reduces to k_len rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from .arguments import integer

Grouped = Tensor | Sequence[Tensor]


def projected_attention(
    x: Tensor,
    wq: Grouped,
    wk: Grouped,
    wv: Grouped,
    wo: Grouped,
    pk: Grouped,
    pv: Grouped,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Projected attention, group by group, the groups concatenated.

    With X the g columns of one group: `Q = X Wq^T`, `K = X Wk^T`, `V = X Wv^T`, `K_red = P_k^T K`,
    `V_red = P_v^T V`, `softmax(Q K_red^T / sqrt(a)) V_red Wo^T`. With a norm the whole residual block,
    `x + attention(layer_norm(x))`.

    Args:
        x: `(B, T, d)` with `d = G g`.
        wq, wk: `(G, a, g)`.
        wv, wo: `(G, g, g)`.
        pk, pv: `(G, T, k_len)`.
        norm_weight, norm_bias, eps: of a layer normalisation over d before the attention, `(d,)`; its bias
            may be left out.
        Each weight but the norm's is stacked over groups in its first dimension, or a sequence of one tensor
        a group.

    Returns:
        `(B, T, d)`.
    """
    if norm_weight is not None:
        normed = nn.functional.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
        return x + projected_attention(normed, wq, wk, wv, wo, pk, pv)
    groups = []
    for xg, q, k, v, o, p, s in zip(x.chunk(len(wq), -1), wq, wk, wv, wo, pk, pv, strict=True):
        query, key, value = xg @ q.mT, xg @ k.mT, xg @ v.mT
        logits = query @ (p.mT @ key).mT / math.sqrt(q.shape[0])
        groups.append(torch.softmax(logits, -1) @ (s.mT @ value) @ o.mT)
    return torch.cat(groups, -1)


class GroupedProjectedAttention(nn.Module):
    """Parameters of projected attention; `forward(x)` maps `(B, T, d)` to `(B, T, d)`.

    Args:
        dim: d, a multiple of `groups`.
        att_dim: width of queries and keys.
        groups: G.
        seq_len: T.
        k_len: rows of the reduced keys and values, any positive number.

    Raises:
        TypeError, ValueError: for another type or value of an argument, naming it.

    Parameters: `qs.{i}.weight`, `ks.{i}.weight` `(att_dim, g)`, `vs.{i}.weight`, `os.{i}.weight` `(g, g)`,
    `Pk.{i}`, `Pv.{i}` `(T, k_len)`; no bias.
    """

    functions: ClassVar[Any] = SimpleNamespace(projected_attention=projected_attention)

    def __init__(self, dim: int, att_dim: int, groups: int, seq_len: int, k_len: int) -> None:
        super().__init__()
        att_dim, groups = integer("att_dim", att_dim, 1), integer("groups", groups, 1)
        seq_len, k_len = integer("seq_len", seq_len, 1), integer("k_len", k_len, 1)
        dim = integer("dim", dim)
        if dim < 1 or dim % groups:
            raise ValueError(f"dim must be a positive multiple of groups={groups}, got {dim}")
        self.dim, self.att_dim, self.groups, self.seq_len, self.k_len = dim, att_dim, groups, seq_len, k_len
        g = dim // groups
        self.qs = nn.ModuleList(nn.Linear(g, att_dim, bias=False) for _ in range(groups))
        self.ks = nn.ModuleList(nn.Linear(g, att_dim, bias=False) for _ in range(groups))
        self.vs = nn.ModuleList(nn.Linear(g, g, bias=False) for _ in range(groups))
        self.os = nn.ModuleList(nn.Linear(g, g, bias=False) for _ in range(groups))
        self.Pk = nn.ParameterList(nn.Parameter(torch.empty(seq_len, k_len)) for _ in range(groups))
        self.Pv = nn.ParameterList(nn.Parameter(torch.empty(seq_len, k_len)) for _ in range(groups))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights; projections normal with standard deviation `1 / sqrt(T)`."""
        for linears in (self.qs, self.ks, self.vs, self.os):
            for linear in linears:
                nn.init.xavier_uniform_(cast(nn.Linear, linear).weight)
        for projections in (self.Pk, self.Pv):
            for p in projections:
                nn.init.normal_(p, std=self.seq_len**-0.5)

    @property
    def weights(self) -> tuple[Sequence[Tensor], ...]:
        """`wq, wk, wv, wo, pk, pv`, in the order the function takes them, one tensor a group."""
        linears = tuple([linear.weight for linear in m] for m in (self.qs, self.ks, self.vs, self.os))
        return (*linears, list(self.Pk), list(self.Pv))

    def forward(self, x: Tensor) -> Tensor:
        return self.functions.projected_attention(x, *self.weights)

    def residual(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """`x + forward(norm(x))`, the pre-norm block."""
        return self.functions.projected_attention(x, *self.weights, norm.weight, norm.bias, norm.eps)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, att_dim={self.att_dim}, groups={self.groups}, "
            f"seq_len={self.seq_len}, k_len={self.k_len}"
        )
