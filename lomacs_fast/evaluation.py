"""A network on the scenarios of a contest folder: errors, costs, samples to look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from .data.augmentation import unit_channels
from .data.contest import ContestScenario
from .data.layouts import ChannelSource
from .freezing import freeze
from .inference import decompose
from .metrics import (
    contest_macs,
    eager_twin,
    evaluate,
    lowrank_svd,
    parameter_count,
    score,
    time_per_channel,
    true_macs,
    truncated_eigh,
    truncated_svd,
)
from .nn import LoMACSSVDNet
from .training.checkpoints import NetworkInfo

EvaluationBatch = tuple[int, int, Tensor, Tensor]


def labelled_part(scenario: ContestScenario, part: str) -> tuple[ChannelSource, ChannelSource]:
    """Input and label of `"train"` or `"test"`; `ValueError` where the folder has none."""
    pair = {
        "train": (scenario.train_input, scenario.train_label),
        "test": (scenario.test_input, scenario.test_label),
    }
    if part not in pair:
        raise ValueError(f'part must be "train" or "test", got {part!r}')
    input, label = pair[part]
    if input is None or label is None:
        raise ValueError(f"{scenario.folder}: scenario {scenario.scenario} has no labelled {part} data")
    return input, label


def batches(
    scenarios: Sequence[ContestScenario], info: NetworkInfo, *, part: str = "test", batch_size: int = 256
) -> Iterator[EvaluationBatch]:
    """`(scenario, sid, input, label)` of every labelled sample, read chunk by chunk."""
    for s in scenarios:
        input, label = labelled_part(s, part)
        sid = info.sid(s.scenario)
        for start in range(0, len(input), batch_size):
            chunk = slice(start, start + batch_size)
            yield s.scenario, sid, input.read(chunk), label.read(chunk)


def costs(net: LoMACSSVDNet) -> dict[str, float]:
    """Counts in millions a sample, and `parameters`.

    `profiler_macs_m` is the contest's count and `true_macs_m` all real multiply-adds, both of the eager twin;
    `fast_true_macs_m` is the latter of the network as it runs here, with what exact algebra saves.
    """
    with torch.no_grad():
        true, fast = (true_macs(module) for module in (eager_twin(net), net))
    return {
        "profiler_macs_m": contest_macs(net) / 1e6,
        "true_macs_m": true / 1e6,
        "fast_true_macs_m": fast / 1e6,
        "parameters": parameter_count(net),
    }


def check_size(net: LoMACSSVDNet, scenarios: Sequence[ContestScenario]) -> None:
    """`ValueError` where M, N or r of the folder are not those of the network."""
    for s in scenarios:
        for name in ("M", "N", "r"):
            if getattr(s.config, name) != getattr(net, name):
                raise ValueError(
                    f"{s.folder}: scenario {s.scenario} has {name} = {getattr(s.config, name)}, "
                    f"the checkpoint {getattr(net, name)}"
                )


def evaluate_network(
    net: LoMACSSVDNet,
    info: NetworkInfo,
    scenarios: Sequence[ContestScenario],
    *,
    part: str = "test",
    batch_size: int = 256,
) -> dict[str, Any]:
    """`ae`, `rec`, `ortho_u`, `ortho_v`, `samples`, the costs and `score`, overall and under `scenarios`."""
    check_size(net, scenarios)
    result = evaluate(
        lambda H, sid: decompose(net, H, sid), batches(scenarios, info, part=part, batch_size=batch_size)
    )
    cost = costs(net)
    for entry in (result, *result["scenarios"].values()):
        entry |= cost | {"score": score(entry["ae"], cost["profiler_macs_m"])}
    return result


def evaluate_svd(
    scenarios: Sequence[ContestScenario], r: int, *, part: str = "test", batch_size: int = 256
) -> dict[str, Any]:
    """The same errors for `torch.linalg.svd` of the noisy input, cut at rank r."""

    def source() -> Iterator[EvaluationBatch]:
        info = NetworkInfo(tuple(s.scenario for s in scenarios))
        yield from batches(scenarios, info, part=part, batch_size=batch_size)

    return evaluate(lambda H, _: truncated_svd(H, r), source())


Decompose = Callable[[Tensor, Any], tuple[Tensor, Tensor, Tensor]]

LOWRANK = 16  # values that `torch.svd_lowrank` is asked for


def _bound(fn: Callable[..., tuple[Tensor, Tensor, Tensor]], *args: int, **options: bool) -> Decompose:
    return lambda H, _: fn(H, *args, **options)


@contextmanager
def refined_by(net: LoMACSSVDNet, steps: int) -> Iterator[None]:
    """The network with another number of refinement steps for a while."""
    before = net.refine_steps
    net.set_refine_steps(steps)
    try:
        yield
    finally:
        net.set_refine_steps(before)


def baselines(r: int, hermitian: bool) -> dict[str, Decompose]:
    """What a user could take instead, by name, each also with the floor subtracted from S."""
    q = min(LOWRANK, r)
    found: dict[str, Decompose] = {}
    for name, floor in (("", False), (", floor subtracted", True)):
        found["svd" + name] = _bound(truncated_svd, r, floor=floor)
        if hermitian:
            found["eigh" + name] = _bound(truncated_eigh, r, floor=floor)
            found[f"svd_lowrank({q})" + name] = _bound(lowrank_svd, r, q, floor=floor)
    if not hermitian:
        found[f"svd_lowrank({q})"] = _bound(lowrank_svd, r, q)
    return found


def evaluate_knob(
    net: LoMACSSVDNet,
    info: NetworkInfo,
    scenarios: Sequence[ContestScenario],
    steps: Sequence[int],
    *,
    part: str = "test",
    batch_size: int = 256,
    repeats: int = 5,
) -> list[dict[str, Any]]:
    """AE, cost and time of a refined network at other numbers of steps, and of LAPACK beside it.

    Returns one dictionary a point, ready for JSON: `name`, `steps` (None for LAPACK), `ae` and the AE by
    scenario under `scenarios`, `microseconds` a channel of a batch of `batch_size` (at most what there is;
    of the frozen network where `freeze` takes it), and for the network `profiler_macs_m`, `true_macs_m` and
    `score`; `true_macs_m` of an SVD too. For svd_lowrank AE is the reconstruction alone: what is left of U
    and V has no columns.

    Raises ValueError for a network without a refiner.
    """
    if not net.trained_steps:
        raise ValueError("steps needs a network with refinement, got a published one (refine_steps = 0)")
    check_size(net, scenarios)
    H = next(batches(scenarios, info, part=part, batch_size=batch_size))[2]
    points: list[dict[str, Any]] = []
    calls: dict[str, Callable[[Tensor], Any]] = {}

    def at(count: int) -> Decompose:
        def run(H: Tensor, sid: Any) -> tuple[Tensor, Tensor, Tensor]:
            with refined_by(net, count):
                return decompose(net, H, sid)

        return run

    for count in steps:
        name, run = f"{count} steps", at(count)
        result = evaluate(run, batches(scenarios, info, part=part, batch_size=batch_size))
        with refined_by(net, count):
            cost = costs(net)
        points.append({"name": name, "steps": count, **_summary(result), **cost})
        points[-1]["score"] = score(result["ae"], cost["profiler_macs_m"])
        calls[name] = _frozen_at(net, count) or (lambda H, run=run: run(H, 0))  # type: ignore[misc]
    for name, run in baselines(net.r, net.hermitian).items():
        result = evaluate(run, batches(scenarios, info, part=part, batch_size=batch_size))
        point = {"name": name, "steps": None, **_summary(result)}
        if name.startswith("svd_lowrank"):
            point["ae"] = result["rec"]
            point["scenarios"] = {s: entry["rec"] for s, entry in result["scenarios"].items()}
        elif name.startswith("svd"):
            point["true_macs_m"] = true_macs(lambda H: torch.linalg.svd(H, full_matrices=False), H[:1]) / 1e6
        points.append(point)
        calls[name] = lambda H, run=run: run(H, 0)  # type: ignore[misc]
    with torch.no_grad():
        times = time_per_channel(calls, H, repeats=repeats, warmup=0.0)
    for point in points:
        point["microseconds"] = times[point["name"]]["median"] * 1e6
    return points


def _frozen_at(net: LoMACSSVDNet, steps: int) -> Callable[[Tensor], Any] | None:
    with refined_by(net, steps), suppress(ValueError):
        frozen = freeze(net)
        return lambda H: decompose(frozen, H, 0)
    return None


def published_point(
    net: LoMACSSVDNet,
    info: NetworkInfo,
    scenarios: Sequence[ContestScenario],
    *,
    part: str = "test",
    batch_size: int = 256,
) -> dict[str, Any]:
    """The same for a network without refinement, frozen."""
    result = evaluate_network(net, info, scenarios, part=part, batch_size=batch_size)
    H = next(batches(scenarios, info, part=part, batch_size=batch_size))[2]
    frozen = freeze(net)
    with torch.no_grad():
        times = time_per_channel({"it": lambda H: decompose(frozen, H, 0)}, H, repeats=5, warmup=0.0)
    keys = ("profiler_macs_m", "true_macs_m", "parameters", "score")
    point = {"name": "published", "steps": None, **_summary(result)} | {key: result[key] for key in keys}
    return point | {"microseconds": times["it"]["median"] * 1e6}


def _summary(result: dict[str, Any]) -> dict[str, Any]:
    return {"ae": result["ae"], "scenarios": {s: entry["ae"] for s, entry in result["scenarios"].items()}}


@torch.no_grad()
def gate_of(net: LoMACSSVDNet, H: Tensor) -> Tensor | None:
    """The frequency gate of one channel, complex `(M, N)` of any scale; real `(M, N)`, as `fft2` orders.

    None for the angular head, which has none.
    """
    if net.head == "angular":
        return None
    X, _, _ = unit_channels(H[None])
    X = X.to(net.pos.device, torch.promote_types(net.pos.dtype, torch.complex32))
    return net.freq_gate(torch.fft.fft2(X[0], norm="ortho"))


def sample_of_each(
    net: LoMACSSVDNet, info: NetworkInfo, scenarios: Sequence[ContestScenario], *, part: str = "test"
) -> list[dict[str, Any]]:
    """First sample of every scenario: `scenario`, `input`, `label`, `estimate`, `gate`, `U`, `S`, `V`,
    `S_true`."""
    samples = []
    for s in scenarios:
        input, label = (source.read([0]) for source in labelled_part(s, part))
        U, S, V = (x[0] for x in decompose(net, input, info.sid(s.scenario)))
        samples.append(
            {
                "scenario": s.scenario,
                "input": input[0],
                "label": label[0],
                "estimate": U * S @ V.mH,
                "gate": gate_of(net, input[0]),
                "U": U,
                "S": S,
                "V": V,
                "S_true": torch.linalg.svdvals(label[0])[: len(S)],
            }
        )
    return samples
