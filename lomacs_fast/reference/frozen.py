"""The network frozen for inference: weights folded where the algebra is exact, channels of any scale."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .angular_gate import angular_spectrum, filtered, gate_of_spectrum, lag_tables
from .backbone import ConvBlock, FoldedAttention, backbone
from .completion import complete_from_dft
from .dual_view import real_view
from .freq_gate import freq_gate
from .refine import SWEEPS, dft_start, refine_svd, rows_of, unit_scale
from .spectral import svd_tail


class FrozenWeights(NamedTuple):
    """What `frozen_svd` runs on; see `fold_network`.

    `raw` `(2N, d)` and `pooled` `(2 (N // 2), d)` are the halves of the projection, the second with the
    pooling and the upsampling of columns folded in; `pos` `(M, d)` holds its bias too. `head`
    `(d, 2Mr + 2Nr + r)` are the heads of U, V and S with the last norm's weight folded in, and `table`
    `(n_scene + 1, 2Mr + 2Nr + r)` their biases a scene, the mean scene last. `scalars` float64 `(3,)`: the
    two refinement steps and tau. `packed` holds all but the scalars, see `pack_weights`.
    """

    row_w1: Tensor
    row_w2: Tensor
    col_w1: Tensor
    col_w2: Tensor
    raw: Tensor
    pooled: Tensor
    pos: Tensor
    blocks: tuple[FoldedAttention | ConvBlock, ...]
    head: Tensor
    table: Tensor
    scalars: Tensor
    temperature: float
    eps: float
    packed: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """What `packed` holds, in its order."""
        first = [self.row_w1, self.row_w2, self.col_w1, self.col_w2, self.raw, self.pooled, self.pos]
        return [*first, self.head, self.table, *(x for block in self.blocks for x in block)]

    def sizes(self) -> list[int]:
        """The dimensions that M and N do not give: d, both hidden sizes, r, rows of `table`; then a block's,
        groups and k_len of attention, taps of convolution."""
        (d, out), M, N = self.head.shape, self.pos.shape[0], self.raw.shape[0] // 2
        found = [d, len(self.row_w1), len(self.col_w1), out // (2 * (M + N) + 1), len(self.table)]
        for block in self.blocks:
            if isinstance(block, FoldedAttention):
                found += [len(block.score), block.pk.shape[2]]
            else:
                found.append(block.dw_weight.shape[2])
        return found


def blocks_of(sizes: Sequence[int]) -> list[Sequence[int]]:
    """The part of every block in `FrozenWeights.sizes`: attention's two numbers, then convolution's one."""
    found: list[Sequence[int]] = []
    at = 5
    while at < len(sizes):
        width = 2 - len(found) % 2
        found.append(sizes[at : at + width])
        at += width
    return found


# numbers to whose multiples a tensor begins in `FrozenWeights.packed`: whole cache lines
LINE = 16


def _places(weights: FrozenWeights) -> tuple[list[int], int]:
    """Where each tensor begins in `packed`, and where the last one ends."""
    offsets, end = [], 0
    for x in weights.tensors():
        offsets.append(end)
        end += -(-x.numel() // LINE) * LINE
    return offsets, end


def is_packed(weights: FrozenWeights) -> bool:
    """Whether every tensor is the view of `packed` that `pack_weights` makes of it."""
    packed, parts = weights.packed, weights.tensors()
    if packed is None:
        return False
    offsets, end = _places(weights)
    place = packed.untyped_storage().data_ptr()
    return packed.numel() == end and all(
        x.untyped_storage().data_ptr() == place
        and x.storage_offset() == packed.storage_offset() + at
        and x.is_contiguous()
        and (x.dtype, x.device) == (packed.dtype, packed.device)
        for at, x in zip(offsets, parts, strict=True)
    )


def pack_weights(weights: FrozenWeights) -> FrozenWeights:
    """The same weights as views of one tensor, `packed`."""
    parts, (offsets, end) = weights.tensors(), _places(weights)
    packed = weights.pos.new_zeros(end)
    views = [packed[at : at + x.numel()].view(x.shape) for at, x in zip(offsets, parts, strict=True)]
    for view, x in zip(views, parts, strict=True):
        view.copy_(x)
    names = ("row_w1", "row_w2", "col_w1", "col_w2", "raw", "pooled", "pos", "head", "table")
    rest = iter(views[len(names) :])
    blocks = tuple(type(block)(*(next(rest) for _ in block)) for block in weights.blocks)
    first: dict[str, Any] = dict(zip(names, views[: len(names)], strict=True))
    return weights._replace(packed=packed, blocks=blocks, **first)


def upsampling(n: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """`(n, n // 2)`: bilinear upsampling of `n // 2` rows to n, `align_corners=False`."""
    eye = torch.eye(n // 2, dtype=dtype, device=device)
    return nn.functional.interpolate(eye[None], size=n, mode="linear", align_corners=False)[0].mT


@torch.no_grad()
def fold_network(net: Any) -> FrozenWeights:
    """Weights of a `LoMACSSVDNet` folded in double precision, in the precision of the network.

    Raises:
        ValueError: where the norms of the network differ in epsilon.
    """
    dtype, N = net.pos.dtype, net.N

    def cast(x: Tensor) -> Tensor:
        return x.to(dtype).contiguous().clone()

    norms = [block[0] for block in net.blocks] + [net.norm]
    if len({norm.eps for norm in norms}) != 1:
        raise ValueError(f"net must have one epsilon in its norms, got {sorted({n.eps for n in norms})}")
    weight = net.input_proj.weight.double()
    columns = upsampling(N, torch.float64, weight.device)
    coarse = weight[:, 2 * N :].unflatten(1, (N, 2))
    pooled = torch.einsum("dnp,nj->djp", coarse, columns).flatten(1) / 4
    blocks: list[FoldedAttention | ConvBlock] = []
    for norm, mixer in net.blocks:
        affine = cast(norm.weight), cast(norm.bias)
        if hasattr(mixer, "qs"):
            wq, wk, wv, wo, pk, pv = (torch.stack(list(w)).double() for w in mixer.weights)
            score, mix = wq.mT @ wk / mixer.att_dim**0.5, wv.mT @ wo.mT
            blocks.append(FoldedAttention(*affine, *map(cast, (score, mix, pk, pv))))
        else:
            blocks.append(ConvBlock(*affine, *map(cast, mixer.weights)))
    heads = [net.u_head, net.v_head, net.s_head[0]]
    head = torch.cat([h.weight for h in heads]).double()
    bias = torch.cat([h.bias for h in heads]).double()
    scenes = net.scene_emb.weight.double()
    scenes = torch.cat([scenes, scenes.mean(0, keepdim=True)])
    refiner = net.ortho_refine
    steps = [refiner.max_scale * torch.sigmoid(raw.double()) for raw in (refiner.a_raw, refiner.b_raw)]
    gate = net.freq_gate
    row_w1, row_w2, col_w1, col_w2 = map(cast, gate.weights)
    return FrozenWeights(
        row_w1=row_w1,
        row_w2=row_w2,
        col_w1=col_w1,
        col_w2=col_w2,
        raw=cast(weight[:, : 2 * N].mT),
        pooled=cast(pooled.mT),
        pos=cast(net.pos[0].double() + net.input_proj.bias.double()),
        blocks=tuple(blocks),
        head=cast((head * net.norm.weight.double()).mT),
        table=cast((scenes + net.norm.bias.double()) @ head.mT + bias),
        scalars=torch.stack([*steps, net.tau_s.double()]),
        temperature=gate.temperature,
        eps=net.norm.eps,
    )


STEMS = SimpleNamespace(freq_gate=freq_gate, backbone=backbone, svd_tail=svd_tail, refine_svd=refine_svd)


def frozen_svd(
    H: Tensor, scene: Tensor, weights: FrozenWeights, functions: Any = STEMS
) -> tuple[Tensor, Tensor, Tensor]:
    """`U, S, V` with `H ~ U diag(S) V^H`: the frozen network at `H / |H|_F`, S times `|H|_F`.

    Args:
        H: complex `(B, M, N)`, of any scale; a sample of zeros has S = 0.
        scene: rows of `weights.table`, integer `(B,)`.
        weights: of `fold_network`, in the precision of H.

    Returns:
        U complex `(B, M, r)`, S real `(B, r)`, V complex `(B, N, r)`.
    """
    w = weights
    (M, N), r = H.shape[-2:], w.head.shape[1] // (2 * sum(H.shape[-2:]) + 1)
    parts = real_view(H)
    # squares of large or small channels leave the precision: divide by a power of two first
    largest = parts.abs().flatten(1).amax(1) if parts.numel() else parts.new_empty(0)
    scale = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)
    parts = parts / scale[:, None, None, None]
    size = torch.linalg.vector_norm(parts.flatten(1), dim=1)
    X = torch.view_as_complex(parts / torch.where(size > 0, size, 1)[:, None, None, None])
    Hd = functions.freq_gate(X, w.row_w1, w.row_w2, w.col_w1, w.col_w2, w.temperature)
    raw = real_view(Hd).flatten(-2)
    blocks = Hd[:, : M // 2 * 2, : N // 2 * 2].unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).sum((2, 4))
    rows = upsampling(M, w.pos.dtype, H.device)
    x = raw @ w.raw + rows @ (real_view(blocks).flatten(-2) @ w.pooled) + w.pos
    feat = functions.backbone(x, w.blocks, None, None, w.eps)
    u, v, s = (feat @ w.head + w.table[scene]).split([2 * M * r, 2 * N * r, r], -1)
    U, V = (torch.view_as_complex(columns.contiguous().view(-1, n, r, 2)) for columns, n in ((u, M), (v, N)))
    a, b, tau = (scalar.to(w.pos.dtype) for scalar in w.scalars)
    U, S, V = functions.svd_tail(U, V, nn.functional.softplus(s) + 1e-6, Hd, a, b, tau)
    # one factor after the other: their product may overflow where S does not
    S = S * size[:, None] * scale[:, None]
    return U, S, V


class FrozenAngular(NamedTuple):
    """The angular head with its refinement, see `AngularGate` and `SpectralRefiner`.

    `first`, `second` `(hidden, 9)` are the taps of the gate's convolutions, `table (n_scene + 1, hidden)` the
    first one's biases a scene, the mean scene last; `numbers (6,)`: the floor in smallest entries of the
    spectrum, slope and bias of the gate, the second convolution's bias, the factor of S and the share of the
    floor taken off it. `scalars (steps, 4)` are those of the refinement. Without an `array` there is no gate,
    and the general form decomposes H as it is.
    """

    first: Tensor
    second: Tensor
    table: Tensor
    numbers: Tensor
    scalars: Tensor
    array: tuple[int, int, int] | None
    rank: int
    active: int
    sweeps: int = SWEEPS


@torch.no_grad()
def fold_angular(net: Any) -> FrozenAngular:
    """Weights of a `LoMACSSVDNet` with the angular head, for as many steps as it takes by now."""
    like, refiner = net.shrink, net.refiner
    shrink, hidden = net.shrink.double(), net.gate_hidden if net.hermitian else 0
    first, second = like.new_zeros(hidden, 9), like.new_zeros(hidden, 9)
    table = like.new_zeros(net.n_scene + 1, hidden)
    gate_numbers = like.new_zeros(4).double()
    if net.hermitian:
        gate = net.angular_gate
        first, second = (x.weight.reshape(hidden, 9).clone() for x in (gate.first, gate.second))
        scenes = gate.scene_bias.weight.double()
        scenes = torch.cat([scenes, scenes.mean(0, keepdim=True)])
        table = (scenes + gate.first.bias.double()).to(like.dtype)
        c, slope, shift = (x.double() for x in (gate.c_raw, gate.slope, gate.second.bias))
        gate_numbers = torch.cat([c.exp()[None], slope, shift])
    return FrozenAngular(
        first=first,
        second=second,
        table=table,
        numbers=torch.cat([gate_numbers, shrink[:1].exp(), shrink[1:]]).to(like.dtype),
        scalars=rows_of(refiner.scalars, net.refine_steps, like).contiguous(),
        array=None if net.array is None else (net.array[0], net.array[1], net.array[2]),
        rank=net.r,
        active=refiner.active,
        sweeps=refiner.sweeps,
    )


def frozen_angular_svd(
    H: Tensor, scene: Tensor, weights: FrozenAngular, functions: Any = STEMS
) -> tuple[Tensor, Tensor, Tensor]:
    """`U, S, V` with `H ~ U diag(S) V^H`: the refined angular head at `H / |H|_F`, S times `|H|_F`.

    Args:
        H: complex `(B, M, N)`, of any scale, M = N where there is a gate; a sample of zeros has S = 0.
        scene: rows of `weights.table`, integer `(B,)`.
        weights: of `fold_angular`, in the precision of H.

    Returns:
        U complex `(B, M, r)`, S real `(B, r)`, V complex `(B, N, r)`.
    """
    w, tied = weights, weights.array is not None
    X, norm = unit_scale(H)
    floor = X.real.new_zeros(len(X), 1)
    if w.array is not None:
        X = 0.5 * (X + X.mH)
        entries, lag = lag_tables(*w.array[1:], device=H.device)
        first, second = w.first.reshape(-1, 1, 3, 3), w.second.reshape(1, -1, 3, 3)
        P = angular_spectrum(X, w.array, entries)
        gate, floor = gate_of_spectrum(
            P, w.numbers[0], w.numbers[1:3], first, w.table[scene], second, w.numbers[3:4]
        )
        X = filtered(X, gate, floor, w.array, lag)
    U, V = dft_start(X, w.active)
    steps, options = len(w.scalars), {"hermitian": tied, "orthonormal": True}
    U, S, V = functions.refine_svd(X, U, V, steps, scalars=w.scalars, sweeps=w.sweeps, **options)
    rest = complete_from_dft(U, w.rank)
    other = rest if tied else complete_from_dft(V, w.rank)
    S = (S * w.numbers[4] - w.numbers[5] * floor).clamp_min(0)
    S = nn.functional.pad(S, (0, w.rank - w.active)) * norm[:, 0]
    return torch.cat([U, rest], -1), torch.where(norm[:, 0] == 0, 0, S), torch.cat([V, other], -1)
