"""Pairs of noisy input and clean label: read from a contest folder, or generated as they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .augmentation import Augmentation, frobenius_normalize
from .contest import ContestScenario
from .generator import ChannelGenerator
from .layouts import ChannelSource
from .seeding import derive_seed

_SPLIT, _ORDER = 0x73706C, 0x6F7264


class Batch(NamedTuple):
    """`input` and `label` complex64 `(b, M, N)`, both divided by the input's norm; `sid` int64 `(b,)`."""

    input: Tensor
    label: Tensor
    sid: Tensor


class Pairs(Protocol):
    """A numbered collection of `(input, label)` pairs of one size."""

    M: int
    N: int
    r: int
    scenarios: tuple[int, ...]
    sid: Tensor

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int], epoch: int) -> tuple[Tensor, Tensor]:
        """Input and label, complex64 `(n, M, N)`, in the order asked for."""


class ContestPairs:
    """The training (or labelled test) pairs of several scenarios of a contest folder, one after another.

    Raises `ValueError` if a scenario lacks that part or differs in size from the first.
    """

    def __init__(self, scenarios: Sequence[ContestScenario], part: str = "train") -> None:
        self._sources: list[tuple[ChannelSource, ChannelSource]] = []
        for s in scenarios:
            inputs, labels = (
                (s.train_input, s.train_label) if part == "train" else (s.test_input, s.test_label)
            )
            if inputs is None or labels is None:
                raise ValueError(f"{s.folder}: scenario {s.scenario} has no labelled {part} data")
            first = scenarios[0].config
            for name in ("M", "N", "r"):
                if getattr(s.config, name) != getattr(first, name):
                    raise ValueError(
                        f"{s.folder}: scenario {s.scenario} has {name} = {getattr(s.config, name)}, "
                        f"scenario {scenarios[0].scenario} has {getattr(first, name)}; expected one size"
                    )
            self._sources.append((inputs, labels))
        self.M, self.N, self.r = first.M, first.N, first.r
        self.scenarios = tuple(s.scenario for s in scenarios)
        sizes = torch.tensor([len(inputs) for inputs, _ in self._sources])
        self.sid = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        self._start = torch.cumsum(sizes, 0) - sizes

    def __len__(self) -> int:
        return len(self.sid)

    def read(self, indices: Sequence[int], epoch: int = 0) -> tuple[Tensor, Tensor]:
        wanted = torch.as_tensor(indices, dtype=torch.long)
        input = torch.empty(len(wanted), self.M, self.N, dtype=torch.complex64)
        label = torch.empty_like(input)
        for sid, sources in enumerate(self._sources):
            there = torch.nonzero(self.sid[wanted] == sid).flatten()
            if len(there):
                local = (wanted[there] - self._start[sid]).tolist()
                for out, source in zip((input, label), sources, strict=True):
                    out[there] = source.read(local).to(torch.complex64)
        return input, label


class GeneratedPairs:
    """`count` pairs a scenario from the built-in generator; with `fresh`, other ones in every epoch.

    Pair i is a pure function of (seed, epoch, i); scenarios alternate.
    """

    def __init__(
        self,
        scenarios: Sequence[int],
        M: int,
        N: int,
        r: int,
        *,
        count: int,
        seed: int = 0,
        kind: str = "covariance",
        fresh: bool = True,
    ) -> None:
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        self._generators = [ChannelGenerator(M, N, scenario=s, seed=seed, kind=kind) for s in scenarios]
        self.M, self.N, self.r, self.scenarios, self.fresh = M, N, r, tuple(scenarios), fresh
        self.sid = torch.arange(len(scenarios)).repeat(count)

    def __len__(self) -> int:
        return len(self.sid)

    def read(self, indices: Sequence[int], epoch: int = 0) -> tuple[Tensor, Tensor]:
        input = torch.empty(len(indices), self.M, self.N, dtype=torch.complex64)
        label = torch.empty_like(input)
        scenes = len(self._generators)
        for sid, generator in enumerate(self._generators):
            there = [k for k, i in enumerate(indices) if i % scenes == sid]
            if there:
                batch = generator.batch([indices[k] // scenes for k in there], epoch=epoch * self.fresh)
                input[there], label[there] = batch.input, batch.label
        return input, label


class TrainingPairs(Dataset[Batch]):
    """Normalised, augmented batches of pairs, addressed by `(epoch, index)`.

    Both matrices are divided by the input's Frobenius norm, then the input is augmented: a pure function of
    (seed, epoch, index), so that any batch of any epoch can be made again. With `skip_zeros`, a pair with a
    zero matrix is left out of its batch, which may leave it empty: it has no relative error to learn from.
    """

    def __init__(
        self,
        pairs: Pairs,
        *,
        seed: int = 0,
        augmentation: Augmentation | None = None,
        skip_zeros: bool = False,
    ) -> None:
        self.pairs, self.seed, self.augmentation, self.skip_zeros = pairs, seed, augmentation, skip_zeros

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        return self.__getitems__([key])

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> Batch:
        indices = [index for _, index in keys]
        epoch = keys[0][0] if keys else 0
        raw_input, raw_label = self.pairs.read(indices, epoch)
        if self.skip_zeros:
            alive = raw_input.flatten(1).any(1) & raw_label.flatten(1).any(1)
            if not bool(alive.all()):
                raw_input, raw_label = raw_input[alive], raw_label[alive]
                indices = [index for index, keep in zip(indices, alive.tolist(), strict=True) if keep]
        input, norm = frobenius_normalize(raw_input)
        label, _ = frobenius_normalize(raw_label, norm)
        if self.augmentation is not None:
            input = self.augmentation(input, indices, seed=self.seed, epoch=epoch)
        return Batch(input, label, self.pairs.sid[torch.as_tensor(indices, dtype=torch.long)])


def split(pairs: Pairs, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices for training and for validation: `fraction` of every scenario, at least one pair of each.

    A pure function of (seed, sizes). Raises `ValueError` for a fraction outside (0, 1), or a scenario too
    small to be split.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"val_fraction must lie in (0, 1), got {fraction}")
    training: list[int] = []
    validation: list[int] = []
    for sid, scenario in enumerate(pairs.scenarios):
        there = torch.nonzero(pairs.sid == sid).flatten()
        if len(there) < 2:
            raise ValueError(f"scenario {scenario} has {len(there)} samples, expected at least 2 to split")
        generator = torch.Generator().manual_seed(derive_seed(_SPLIT, seed, sid))
        order = there[torch.randperm(len(there), generator=generator)].tolist()
        size = min(max(1, round(fraction * len(there))), len(there) - 1)
        validation += order[:size]
        training += order[size:]
    return sorted(training), sorted(validation)


def epoch_order(indices: Sequence[int], *, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch visits its samples, a pure function of (seed, epoch, indices)."""
    generator = torch.Generator().manual_seed(derive_seed(_ORDER, seed, epoch))
    return [indices[k] for k in torch.randperm(len(indices), generator=generator).tolist()]
