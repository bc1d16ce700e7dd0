"""Pruning: a smaller network of the same kind from the best columns and hidden channels, without masks."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import reference
from .metrics import architecture_macs, contest_macs, eager_twin, parameter_count, true_macs

__all__ = ["PruneReport", "column_scores", "hidden_scores", "prune", "sweep"]

Net = TypeVar("Net", bound=reference.LoMACSSVDNet)
KLen = int | Sequence[int]


@dataclass(frozen=True)
class PruneReport:
    """What pruning kept.

    Attributes:
        before, after: `k_len` (one an attention block), `gate_hidden`, `macs_m` (contest's count, millions a
            sample) and `parameters` of the original and of the pruned network.
        columns: kept columns of `P_k` and `P_v`, ascending, an attention block and group.
        hidden: kept hidden channels of the gate, ascending.
        column_share: share of the column scores kept, an attention block and group.
        hidden_share: share of the hidden channels' scores kept.
    """

    before: dict[str, Any]
    after: dict[str, Any]
    columns: list[list[list[int]]]
    hidden: list[int]
    column_share: list[list[float]]
    hidden_share: float

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and dictionaries, ready for JSON."""
        return asdict(self)


def _attentions(net: reference.LoMACSSVDNet) -> dict[int, Any]:
    """Attention modules by the index of their block."""
    return {i: block[1] for i, block in enumerate(net.blocks) if i % 2 == 0}  # type: ignore[index]


@torch.no_grad()
def column_scores(net: reference.LoMACSSVDNet, alpha: float = 1.0) -> list[Tensor]:
    """Scores of the reduced positions, `|P_k[:, j]|^2 + alpha |P_v[:, j]|^2`.

    One float64 tensor `(groups, k_len)` on the CPU for every attention block in order. Raises ValueError for
    a negative or non-finite alpha and for non-finite weights.
    """
    if not (math.isfinite(alpha) and alpha >= 0):
        raise ValueError(f"alpha must be a finite number of at least 0, got {alpha}")
    scores = []
    for i, attention in _attentions(net).items():
        pairs = zip(attention.Pk, attention.Pv, strict=True)
        block = torch.stack([_squares(k) + alpha * _squares(v) for k, v in pairs])
        scores.append(_finite(block, f"Pk and Pv of block {i}"))
    return scores


@torch.no_grad()
def hidden_scores(net: reference.LoMACSSVDNet) -> Tensor:
    """Scores of the gate's hidden channels, `|W1r[h, :]| |W2r[:, h]| + |W1c[h, :]| |W2c[:, h]|`.

    W1r, W2r are the two weights of the row perceptron, W1c, W2c of the column perceptron. Float64
    `(gate_hidden,)` on the CPU. Raises ValueError for non-finite weights.
    """
    row, col = net.freq_gate.row_mlp, net.freq_gate.col_mlp
    parts = [(_squares(mlp[0].weight.mT) * _squares(mlp[2].weight)).sqrt() for mlp in (row, col)]
    return _finite(parts[0] + parts[1], "the frequency gate")


def _squares(P: Tensor) -> Tensor:
    """Squared norm of every column."""
    return P.detach().to("cpu", torch.float64).square().sum(0)


def _finite(scores: Tensor, where: str) -> Tensor:
    if not bool(scores.isfinite().all()):
        raise ValueError(f"weights must be finite to be scored, got NaN or Inf in {where}")
    return scores


def _best(scores: Tensor, size: int) -> Tensor:
    """Indices of the largest scores in ascending order; of equals the first."""
    return torch.argsort(scores, descending=True, stable=True)[:size].sort().values


def _share(scores: Tensor, kept: Tensor) -> float:
    total = float(scores.sum())
    return float(scores[kept].sum()) / total if total > 0 else 1.0


def _least_size(scores: Tensor, energy: float) -> int:
    """Smallest number of columns with at least this share of the scores, to rounding."""
    kept = scores.sort(descending=True).values.cumsum(0)
    return 1 + int((kept < energy * kept[-1] * (1 - 1e-12)).sum())


def _whole(name: str, value: Any, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ValueError(f"{name} must be a whole number between 1 and {most}, got {value!r}")
    return value


def _k_lens(k_len: KLen, present: list[int]) -> list[int]:
    if not present:
        raise ValueError(f"k_len must be left out for a network without attention blocks, got {k_len!r}")
    if isinstance(k_len, int):
        return [_whole("k_len", k_len, most) for most in present]
    if isinstance(k_len, str) or not isinstance(k_len, Sequence) or len(k_len) != len(present):
        raise ValueError(f"k_len must be a whole number or {len(present)} of them, got {k_len!r}")
    return [_whole(f"k_len[{i}]", k, most) for i, (k, most) in enumerate(zip(k_len, present, strict=True))]


def _number(name: str, value: Any, expected: str, fits: Callable[[float], bool]) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not fits(value):
        raise ValueError(f"{name} must be {expected}, got {value!r}")
    return float(value)


def _contest_macs_at(config: dict[str, Any], sizes: Sequence[int]) -> float:
    """Contest's count at other sizes: k_len of every attention block, then gate_hidden."""
    return architecture_macs(config | {"k_len": list(sizes[:-1]), "gate_hidden": sizes[-1]})


def _sizes_within(config: dict[str, Any], sizes: list[int], scores: list[Tensor], budget: float) -> list[int]:
    """Greedy search of the sizes that meet a budget; see `prune`. Budget in multiply-adds."""
    count = _contest_macs_at(config, sizes)
    if count <= budget:
        return sizes
    least = _contest_macs_at(config, [1] * len(sizes))
    if least > budget:
        raise ValueError(
            f"macs must be at least {least / 1e6:.6f} (k_len and gate_hidden at 1), got {budget / 1e6:g}"
        )
    # the count is affine in every size, so one more measurement a knob gives what a step of it saves
    queue: list[tuple[float, int]] = []
    saves, losses = [], []
    for knob, (size, score) in enumerate(zip(sizes, scores, strict=True)):
        other = [1 if i == knob else s for i, s in enumerate(sizes)]
        saves.append((count - _contest_macs_at(config, other)) / (size - 1) if size > 1 else math.inf)
        ascending = score.sort().values.sum(0)
        losses.append((ascending / ascending.sum().clamp_min(1e-300)).tolist())
        if size > 1:
            heapq.heappush(queue, (losses[knob][0] / saves[knob], knob))
    full, sizes = list(sizes), list(sizes)
    # steps by the prediction, then the measured count decides
    while queue and (count > budget or (count := _contest_macs_at(config, sizes)) > budget):
        _, knob = heapq.heappop(queue)
        sizes[knob] -= 1
        count -= saves[knob]
        if sizes[knob] > 1:
            heapq.heappush(queue, (losses[knob][full[knob] - sizes[knob]] / saves[knob], knob))
    return sizes


def _describe(net: reference.LoMACSSVDNet) -> dict[str, Any]:
    return {
        "k_len": [attention.k_len for attention in _attentions(net).values()],
        "gate_hidden": net.gate_hidden,
        "macs_m": contest_macs(net) / 1e6,
        "parameters": parameter_count(net),
    }


def _rebuild(net: Net, columns: list[list[Tensor]], hidden: Tensor) -> Net:
    """A network of the same type with copies of the chosen columns and channels and of all other weights."""
    selections: dict[str, tuple[int, Tensor]] = {}
    for i, groups in zip(_attentions(net), columns, strict=True):
        for g, kept in enumerate(groups):
            selections[f"blocks.{i}.1.Pk.{g}"] = selections[f"blocks.{i}.1.Pv.{g}"] = (1, kept)
    for mlp in ("row_mlp", "col_mlp"):
        selections[f"freq_gate.{mlp}.0.weight"] = (0, hidden)
        selections[f"freq_gate.{mlp}.2.weight"] = (1, hidden)
    config = net.config | {"k_len": [len(groups[0]) for groups in columns], "gate_hidden": len(hidden)}
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        pruned = type(net)(**config)
    for name, p in net.named_parameters():
        parent, _, own = name.rpartition(".")
        if name in selections:
            dim, kept = selections[name]
            data = p.detach().index_select(dim, kept.to(p.device))
        else:
            data = p.detach().clone()
        pruned.get_submodule(parent).register_parameter(own, nn.Parameter(data, p.requires_grad))
    for name, buffer in net.named_buffers():
        parent, _, own = name.rpartition(".")
        setattr(pruned.get_submodule(parent), own, buffer.detach().clone())
    pruned.set_refine_steps(net.refine_steps)
    for name, module in net.named_modules():
        pruned.get_submodule(name).training = module.training
    return pruned


def prune(
    net: Net,
    *,
    k_len: KLen | None = None,
    gate_hidden: int | None = None,
    energy: float | None = None,
    macs: float | None = None,
    alpha: float = 1.0,
) -> tuple[Net, PruneReport]:
    """A smaller network of the same type, equal to net with the dropped columns and channels masked out.

    Every attention block keeps, group by group, the k_len columns of `P_k` and `P_v` of largest
    `column_scores`, in their order; the gate keeps the hidden channels of largest `hidden_scores`, the same
    for both perceptrons. Nothing else changes. Sizes are asked for in one of three ways:

    - by number: `k_len`, `gate_hidden` or both; what is not given stays;
    - by share: the smallest sizes that keep at least `energy` of the scores. The groups of a block share one
      k_len, the smallest at which each of them keeps that share;
    - by budget: greedily, one column (of every group of one block) or one hidden channel at a time, always
      the one that loses the least share of its own scores per multiply-add saved (of equals the earliest
      block, the gate last), until the contest's count is at or below `macs`.

    Args:
        net: left untouched. Weights are copied; dtype, device, tau_s, training mode and `requires_grad` stay.
        k_len: an integer, or one an attention block; at most what is there.
        gate_hidden: at most what is there.
        energy: share in (0, 1].
        macs: millions of multiply-adds a sample, by the contest's count (`lomacs_fast.metrics.contest_macs`).
        alpha: weight of `P_v` in the column scores, at least 0.

    Returns:
        The pruned network and a `PruneReport`.

    Raises:
        ValueError: for another head than the pooled one, no target or several ways at once, a size out of
            range, a budget below what k_len = 1 and gate_hidden = 1 need (naming it), or non-finite weights.
    """
    if net.head != "pooled":
        raise ValueError(
            f"prune needs a network with the pooled head, got the {net.head} one: it has neither columns nor "
            "hidden channels to score; choose fewer active columns or refine_steps"
        )
    ways = {"k_len or gate_hidden": (k_len, gate_hidden), "energy": (energy,), "macs": (macs,)}
    given = [name for name, values in ways.items() if any(value is not None for value in values)]
    if len(given) != 1:
        raise ValueError(
            "prune needs one target, by number (k_len, gate_hidden), by share (energy) or by budget (macs), "
            f"got {' and '.join(given) or 'none'}"
        )
    scores = [*column_scores(net, alpha), hidden_scores(net).unsqueeze(0)]
    sizes = [s.shape[-1] for s in scores]
    if energy is not None:
        energy = _number("energy", energy, "a share above 0 and at most 1", lambda x: 0 < x <= 1)
        sizes = [max(_least_size(group, energy) for group in block) for block in scores]
    elif macs is not None:
        macs = _number("macs", macs, "a positive number of millions", lambda x: 0 < x < math.inf)
        sizes = _sizes_within(net.config, sizes, scores, macs * 1e6)
    else:
        if k_len is not None:
            sizes[:-1] = _k_lens(k_len, sizes[:-1])
        if gate_hidden is not None:
            sizes[-1] = _whole("gate_hidden", gate_hidden, sizes[-1])
    kept = [[_best(group, size) for group in block] for block, size in zip(scores, sizes, strict=True)]
    shares = [
        [_share(group, indices) for group, indices in zip(block, chosen, strict=True)]
        for block, chosen in zip(scores, kept, strict=True)
    ]
    pruned = _rebuild(net, kept[:-1], kept[-1][0])
    report = PruneReport(
        before=_describe(net),
        after=_describe(pruned),
        columns=[[indices.tolist() for indices in block] for block in kept[:-1]],
        hidden=kept[-1][0].tolist(),
        column_share=shares[:-1],
        hidden_share=shares[-1][0],
    )
    return pruned, report


def sweep(
    net: reference.LoMACSSVDNet,
    evaluate_fn: Callable[[Any], float],
    k_lens: Iterable[KLen],
    gate_hiddens: Iterable[int],
    *,
    alpha: float = 1.0,
) -> list[dict[str, Any]]:
    """Prune net to every pair of sizes and measure, for a figure of AE against MACs.

    Args:
        net: left untouched; every point starts from it.
        evaluate_fn: `evaluate_fn(pruned) -> AE`; it may finetune the network it is handed first.
        k_lens, gate_hiddens: the sizes, as `prune` takes them; points run over k_lens first.
        alpha: as in `prune`.

    Returns:
        One dictionary a point, ready for JSON: `k_len`, `gate_hidden`, `macs_m` (contest's count) and
        `true_macs_m` (of the eager twin), both in millions a sample, `parameters` and `ae`.
    """
    points = []
    for k_len, gate_hidden in itertools.product(list(k_lens), list(gate_hiddens)):
        pruned, report = prune(net, k_len=k_len, gate_hidden=gate_hidden, alpha=alpha)
        points.append(
            {
                "k_len": pruned.k_len,
                "gate_hidden": gate_hidden,
                "macs_m": report.after["macs_m"],
                "true_macs_m": true_macs(eager_twin(pruned)) / 1e6,
                "parameters": report.after["parameters"],
                "ae": float(evaluate_fn(pruned)),
            }
        )
    return points
