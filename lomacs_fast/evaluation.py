"""A network on the scenarios of a contest folder: errors, costs, samples to look at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .data.augmentation import unit_channels
from .data.contest import ContestScenario
from .data.layouts import ChannelSource
from .inference import decompose
from .metrics import (
    contest_macs,
    eager_twin,
    evaluate,
    parameter_count,
    score,
    true_macs,
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


@torch.no_grad()
def gate_of(net: LoMACSSVDNet, H: Tensor) -> Tensor:
    """The frequency gate of one channel, complex `(M, N)` of any scale; real `(M, N)`, as `fft2` orders."""
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
