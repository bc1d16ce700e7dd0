"""The network frozen for inference: folded weights, no autograd, one safe file."""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Self, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import functional
from .data.files import atomic_path
from .nn import LoMACSSVDNet
from .reference.arguments import integer
from .reference.backbone import ConvBlock, FoldedAttention
from .reference.frozen import (
    FrozenAngular,
    FrozenWeights,
    fold_angular,
    fold_network,
    is_packed,
    pack_weights,
)
from .reference.network import replaced_parts

__all__ = ["FrozenSVDNet", "freeze"]

FORMAT = 1

Factors = tuple[Tensor, Tensor, Tensor]

# numbers of H above which a batch keeps a device busy for longer than its launches take
LARGEST = 1 << 22
# batch sizes that a network holds graphs of
MOST = 8


class _Graph(NamedTuple):
    """A captured CUDA graph, where it reads and where it writes."""

    graph: torch.cuda.CUDAGraph
    H: Tensor
    scene: Tensor
    factors: Factors


class _Graphs:
    """CUDA graphs of one network, the latest `MOST` of what was called twice, a pool of memory a stream."""

    def __init__(self) -> None:
        self._clear(None)
        # two threads must not write a graph's input between its copy and its replay
        self._lock = threading.Lock()

    def _clear(self, weights: Any) -> None:
        self._weights = weights
        self._graphs: OrderedDict[Hashable, _Graph | None] = OrderedDict()
        self._pools: dict[int, Any] = {}
        self._full = False

    def __call__(
        self, call: Callable[[Tensor, Tensor], Factors], H: Tensor, scene: Tensor, weights: Any
    ) -> Factors:
        """What `call(H, scene)` gives: the first time by it, the second captured, then replayed."""
        stream = torch.cuda.current_stream(H.device).cuda_stream
        # what the choice of kernels depends on, beside H
        precision = torch.get_float32_matmul_precision()
        how = functional.chosen(), precision, torch.are_deterministic_algorithms_enabled()
        key = H.shape[0], stream, H.device, how
        with self._lock:
            if weights is not self._weights:
                self._clear(weights)
            if key in self._graphs and not self._full:
                try:
                    found = self._graphs.pop(key) or self._capture(call, H, scene, stream)
                except torch.OutOfMemoryError:
                    # what a graph holds has no room beside what else is there
                    self._clear(weights)
                    self._full = True
                else:
                    # the latest is the last
                    self._graphs[key] = found
                    found.H.copy_(H)
                    found.scene.copy_(scene)
                    found.graph.replay()
                    # the next replay writes over them
                    U, S, V = (x.clone() for x in found.factors)
                    return U, S, V
        # it also compiles and loads what no capture may
        factors = call(H, scene)
        with self._lock:
            if weights is self._weights:
                self._graphs.setdefault(key, None)
            while len(self._graphs) > MOST:
                self._graphs.popitem(last=False)
        return factors

    def _capture(
        self, call: Callable[[Tensor, Tensor], Factors], H: Tensor, scene: Tensor, stream: int
    ) -> _Graph:
        # of no call's mode: later calls write them
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(H.device):
            static = torch.empty(H.shape, dtype=H.dtype, device=H.device).copy_(H)
            rows = torch.empty(scene.shape, dtype=scene.dtype, device=H.device).copy_(scene)
            if stream not in self._pools:
                self._pools[stream] = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # another thread's work on the device is no business of the capture
            with torch.cuda.graph(graph, pool=self._pools[stream], capture_error_mode="thread_local"):
                factors = call(static, rows)
        return _Graph(graph, static, rows, factors)


class FrozenSVDNet(nn.Module):
    """A network for inference alone; `frozen(H, sid=None)` gives `U, S, V` in the scale of H.

    Made by `freeze` or `load`. The weights are buffers, folded where the algebra is exact: keys and queries
    of attention into one product, values and outputs into another, the coarse view and the position into
    the projection, norm and scene embedding into the heads; of a refined network with the angular head the
    scene's bias into the gate's first convolution.

    On a GPU a batch of at most 4 Mi numbers (1,024 channels of 64 x 64) whose size comes again is served by a
    CUDA graph, captured at the second call and replayed from then on; 8 sizes are kept. Inside a capture of
    the caller's, and for larger batches, its kernels are launched one by one.

    Attributes:
        config: the constructor's arguments of the network it came from.
        scenarios: what the scenes stand for, in their order; None where nobody said.
        graphs: whether CUDA graphs are captured; they hold memory between calls.
    """

    def __init__(
        self,
        weights: FrozenWeights | FrozenAngular,
        config: dict[str, Any],
        scenarios: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.config, self.scenarios = dict(config), scenarios
        self.M, self.N, self.r = config["M"], config["N"], config["r"]
        self.n_scene = config["n_scene"]
        self._numbers = _numbers(weights)
        self._views: tuple[Tensor, ...] = ()
        self._last: tuple[list[Any], FrozenWeights | FrozenAngular, Sequence[Any]] | None = None
        self.graphs, self._captured = True, _Graphs()
        for name, tensor in _flat(weights).items():
            self.register_buffer(name, tensor)
        self._pack()
        self.eval()

    # Whether somebody may hold a weight, who can give it another place (`x.data = y`), of which nothing
    # tells: from then on every call looks at all of them, which takes a tenth of one channel's time.
    _lent = True

    # the buffers, not lent: by a name of its own, since tracers take `__dict__["_buffers"]` for the property
    _own: dict[str, Tensor | None]

    @property
    def _buffers(self) -> dict[str, Tensor | None]:
        if not torch.compiler.is_compiling():
            self._lent = True
        return self._own

    @_buffers.setter
    def _buffers(self, value: dict[str, Tensor | None]) -> None:
        # the base class looks into the first
        self.__dict__.update(_buffers=value, _own=value, _last=None, _lent=True)

    def _unlent(self) -> Self:
        """This module, whose weights nobody else holds."""
        self._lent = False
        return self

    def __getattr__(self, name: str) -> Any:
        # the base class would look into the dict itself
        return self._buffers[name] if name in self.__dict__.get("_own", ()) else super().__getattr__(name)

    def _pack(self) -> None:
        """Make the weights views of one buffer, which the kernel reads, where they are not."""
        self._last = None
        weights = _nested(self._buffers_of(), self._numbers)
        if not isinstance(weights, FrozenWeights):
            return
        if not is_packed(weights):
            # of no call's mode or graph: the weights outlive it
            with torch.inference_mode(False), torch.no_grad():
                weights = pack_weights(weights)
            self._own.update(_flat(weights))
            self.register_buffer("packed", weights.packed, persistent=False)
        self._views = tuple(_flat(weights).values())

    def _buffers_of(self) -> dict[str, Tensor]:
        # `named_buffers` leaves out what stands in two places
        return {name: x for name, x in self._own.items() if x is not None}

    def _arrays(self) -> dict[str, Tensor]:
        return {name: x for name, x in self._buffers_of().items() if name != "packed"}

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        scalars, lent = cast(Tensor, self._own["scalars"]), self._lent
        super()._apply(fn, recurse)
        found = cast(Tensor, self._own["scalars"])
        if "packed" in self._own and found.dtype != scalars.dtype:
            # numbers and no weights: in double precision whatever that of the module is
            self._own["scalars"] = scalars.to(found.device)
        self._pack()
        # what `to`, `double` and their like apply keeps no tensor, a function of the caller's may
        self._lent = lent or getattr(fn, "__module__", "") != nn.Module.__module__
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # at once: a tracer that comes next cannot see where tensors lie
        if name != "packed" and "_views" in self.__dict__ and name in self._own:
            self._lent = True
            if not self._loading:
                self._pack()

    # while weights are assigned one by one, which may come from another device
    _loading = False

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._loading = True
        try:
            super()._load_from_state_dict(*args, **kwargs)
        finally:
            self._loading = False
        # loaded in place they are views still, assigned they are not
        self._pack()

    @property
    def like(self) -> Tensor:
        """A weight: the precision and device of the module."""
        return self._like.detach()

    @property
    def _like(self) -> Tensor:
        found = self._own["numbers" if "numbers" in self._own else "pos"]
        assert found is not None
        return found

    @property
    def weights(self) -> FrozenWeights | FrozenAngular:
        """The folded weights, on the device and in the precision that the module has by now."""
        if not torch.compiler.is_compiling():
            self._lent = True
        return self._gathered()

    def _gathered(self) -> FrozenWeights | FrozenAngular:
        transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
        if not (torch.compiler.is_compiling() or transformed) and _get_current_dispatch_mode() is None:
            return self._kept()[1]
        # what is made under a tracer or a transform must not be kept
        weights = _nested(self._buffers_of(), self._numbers)
        if isinstance(weights, FrozenWeights) and not self._untouched():
            weights = weights._replace(packed=None)
        return weights

    def _kept(self) -> tuple[list[Any], FrozenWeights | FrozenAngular, Sequence[Any]]:
        """Places of the weights, they, and what the kernel takes: the last call's, anew if one moved."""
        last = self._last
        # the tensors of the last answer are held by it, so their places hold no others
        if last is None or (self._lent and last[0] != self._places()):
            # some may have been put in the place of others
            self._pack()
            # before the weights: what another thread changes in between is found the next time
            places = self._places()
            weights = _nested(self._buffers_of(), self._numbers)
            last = self._last = places, weights, functional.flat_at_once(weights, self.M, self.N)
        return last

    def _places(self) -> list[Any]:
        """Which tensors the weights are, and where: `x.data = y` gives a tensor another place or order."""
        weights = self._buffers_of().values()
        return [*map(id, weights), *map(Tensor.data_ptr, weights), *map(Tensor.stride, weights)]

    def _untouched(self) -> bool:
        """Whether no weight was put in the place of a view of `packed`."""
        now = (x for name, x in self._own.items() if name != "packed")
        return all(x is y for x, y in zip(now, self._views, strict=True))

    def __getstate__(self) -> dict[str, Any]:
        # identities mean nothing in a copy or another process, where every view would bring all of them
        buffers = {name: x.clone() for name, x in self._arrays().items()}
        state = self.__dict__ | {"_last": None, "_views": (), "_captured": None, "_buffers": buffers}
        del state["_own"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._buffers = self.__dict__["_buffers"]
        self._captured = _Graphs()
        self._pack()
        self._unlent()

    def forward(self, H: Tensor, sid: Tensor | int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """`U, S, V` with `H ~ U diag(S) V^H`.

        Args:
            H: complex `(B, M, N)` or real `(B, M, N, 2)`, of any scale. A sample of zeros has S = 0, one with
                NaN or Inf has NaN.
            sid: scenes, integer `(B,)` or one integer for all; None takes the mean scene embedding.

        Returns:
            U complex `(B, M, r)`, S real `(B, r)`, V complex `(B, N, r)`, without a graph.

        Raises:
            TypeError, ValueError: for another type, dtype, shape or scene, naming it.
        """
        # nothing of a compiled call comes here: it would be guarded
        if functional.serves_at_once(H):
            last = self._last
            if last is None or self._lent:
                last = self._kept()
            found = functional.frozen_svd_at_once(H, sid, self.n_scene, last[2])
            if found is not None:
                return found
        weights = self._gathered()
        with torch.no_grad():
            H = self._channels(H)
            scene = self._scenes(sid, H)

            def call(H: Tensor, scene: Tensor) -> Factors:
                if isinstance(weights, FrozenAngular):
                    return functional.frozen_angular_svd(H, scene, weights)
                return functional.frozen_svd(H, scene, weights)

            return self._captured(call, H, scene, weights) if self._repeats(H) else call(H, scene)

    def _repeats(self, H: Tensor) -> bool:
        """Whether a CUDA graph may serve H: not under a tracer, a transform, autocast or another capture."""
        return (
            H.is_cuda
            and self.graphs
            and not torch.compiler.is_compiling()
            and 0 < H.numel() <= LARGEST
            and torch.version.hip is None
            and not torch._C._are_functorch_transforms_active()
            and _get_current_dispatch_mode() is None
            and not torch.is_autocast_enabled("cuda")
            and not torch.cuda.is_current_stream_capturing()
        )

    def _channels(self, H: Tensor) -> Tensor:
        expected = f"complex (B, {self.M}, {self.N}) or real (B, {self.M}, {self.N}, 2)"
        if not isinstance(H, Tensor):
            raise TypeError(f"H must be a tensor, {expected}, got {type(H).__name__}")
        if not H.is_complex() and H.is_floating_point() and H.ndim == 4 and H.shape[-1] == 2:
            H = torch.view_as_complex(H.contiguous())
        if not H.is_complex() or H.shape[1:] != (self.M, self.N) or H.ndim != 3:
            raise ValueError(f"H must be {expected}, got {H.dtype} {tuple(H.shape)}")
        dtype = self._like.dtype
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"the weights must be float32 or float64, got {dtype}")
        wanted = torch.promote_types(dtype, torch.complex32)
        if H.dtype != wanted:
            raise TypeError(f"H must be {wanted} to go with {dtype} weights, got {H.dtype}")
        if H.device != self._like.device:
            raise ValueError(f"H must be on {self._like.device} as the weights are, got {H.device}")
        return H

    def _scenes(self, sid: Tensor | int | None, H: Tensor) -> Tensor:
        if sid is None:
            return torch.full(H.shape[:1], self.n_scene, device=H.device)
        if not isinstance(sid, Tensor):
            try:
                sid = integer("sid", sid)
            except TypeError:
                came = type(sid).__name__
                raise TypeError(f"sid must be an integer, an integer tensor or None, got {came}") from None
        sid = torch.as_tensor(sid)
        if sid.is_floating_point() or sid.is_complex() or sid.dtype == torch.bool:
            raise TypeError(f"sid must be an integer tensor, got {sid.dtype}")
        if sid.ndim and sid.shape != H.shape[:1]:
            raise ValueError(f"sid must have shape ({H.shape[0]},) as H has, got {tuple(sid.shape)}")
        # a traced value cannot be looked at, the op looks at it; nor one of a graph that is captured
        looked = sid.numel() and not torch.compiler.is_compiling() and not _capturing(sid)
        low, high = (int(x) for x in sid.aminmax()) if looked else (0, 0)
        if low < 0 or high >= self.n_scene:
            raise ValueError(f"sid must lie between 0 and {self.n_scene - 1}, got {low} to {high}")
        return sid.to(H.device, torch.int64).expand(H.shape[0])

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write one `.npz` of plain arrays, whole or not at all; nothing in it is code.

        Raises:
            FileExistsError: where the file is there and `overwrite` is false.
            OSError: where it cannot be written.
        """
        facts = {
            "format": FORMAT,
            "network": "FrozenSVDNet",
            "config": self.config,
            "scenarios": self.scenarios,
        } | self._numbers
        arrays = {name: tensor.cpu().numpy() for name, tensor in self._arrays().items()}
        with atomic_path(path, overwrite=overwrite) as temporary, open(temporary, "wb") as file:
            np.savez(file, facts=np.array(json.dumps(facts)), **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FrozenSVDNet:
        """Read a file of `save`; nothing in it is run.

        Raises:
            ValueError: where the file is not one of a frozen network, naming it.
            OSError: where it cannot be read.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                facts = json.loads(str(file["facts"]))
                if facts["network"] != "FrozenSVDNet" or facts["format"] != FORMAT:
                    raise ValueError(f"it is format {facts['format']} of {facts['network']}")
                arrays = {name: torch.from_numpy(file[name]) for name in file.files if name != "facts"}
            weights = _nested(arrays, facts)
            scenarios = facts["scenarios"] and tuple(facts["scenarios"])
            return cls(weights, facts["config"], scenarios)._unlent()
        except OSError:
            raise
        except Exception as error:
            raise ValueError(f"{os.fspath(path)} is not a frozen network: {error}") from error

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.config.items())


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def freeze(net: LoMACSSVDNet, scenarios: tuple[int, ...] | None = None) -> FrozenSVDNet:
    """Fold the weights of a network for inference; the network stays as it is.

    Args:
        net: a `LoMACSSVDNet`, published, pruned or with the angular head, of this package or its reference.
        scenarios: what the scenes stand for, in their order.

    Returns:
        A module on the network's device and in its precision that equals the network at `H / |H|_F`, with S
        times `|H|_F`, to rounding; hooks of the network and its parts stay behind. A refined one refines by
        the steps that the network takes by now.

    Raises:
        TypeError: where `net` is no such network.
        ValueError: where the network refines what the pooled head gives, parts of it were replaced by others,
            its norms differ in epsilon, or `scenarios` are not one a scene.
    """
    needed = ("n_scene", "config", "head", "like", "trained_steps")
    # of the class: a property would look at the parts
    if not isinstance(net, nn.Module) or not all(
        hasattr(type(net), name) or name in net.__dict__ for name in needed
    ):
        raise TypeError(f"net must be a LoMACSSVDNet, got {type(net).__name__}")
    if others := replaced_parts(net):
        raise ValueError(
            f"net must have the parts that it was made with, others are in the place of {', '.join(others)}"
        )
    if net.trained_steps and net.head == "pooled":
        raise ValueError(
            f"freeze takes the published network and the angular head, got the pooled head refined by "
            f"{net.trained_steps} steps: call it as it is, in eval mode"
        )
    if scenarios is not None and len(scenarios) != net.n_scene:
        raise ValueError(f"scenarios must name {net.n_scene} scenes, got {list(scenarios)}")
    fold = fold_angular if net.head == "angular" else fold_network
    return FrozenSVDNet(fold(net), net.config, scenarios)._unlent()


def _flat(weights: FrozenWeights | FrozenAngular) -> dict[str, Tensor]:
    found = {n: x for n, x in weights._asdict().items() if n != "packed" and isinstance(x, Tensor)}
    if isinstance(weights, FrozenWeights):
        for i, block in enumerate(weights.blocks):
            found |= {f"block{i}_{name}": x for name, x in block._asdict().items()}
    return found


def _numbers(weights: FrozenWeights | FrozenAngular) -> dict[str, Any]:
    """What is no tensor."""
    tensors = ("blocks", "packed")
    return {n: x for n, x in weights._asdict().items() if n not in tensors and not isinstance(x, Tensor)}


def _nested(tensors: dict[str, Tensor], numbers: dict[str, Any]) -> FrozenWeights | FrozenAngular:
    rest = {name: x for name, x in tensors.items() if not name.startswith("block")}
    if "rank" in numbers:
        array: Any = numbers["array"] and tuple(numbers["array"])
        rank, active, sweeps = (numbers[name] for name in ("rank", "active", "sweeps"))
        return FrozenAngular(array=array, rank=rank, active=active, sweeps=sweeps, **rest)
    blocks: list[FoldedAttention | ConvBlock] = []
    while f"block{len(blocks)}_norm_weight" in tensors:
        prefix = f"block{len(blocks)}_"
        kind = FoldedAttention if f"{prefix}score" in tensors else ConvBlock
        blocks.append(kind(*(tensors[prefix + name] for name in kind._fields)))
    return FrozenWeights(blocks=tuple(blocks), temperature=numbers["temperature"], eps=numbers["eps"], **rest)
