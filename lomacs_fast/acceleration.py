"""Modules of the published classes, wherever they were written, served by ours with the same parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .nn import (
    AEPlusLoss,
    AxialLowRankFreqGate,
    GatedConv1D,
    GroupedProjectedAttention,
    LoMACSSVDNet,
    NeuralOrthoRefiner,
)

__all__ = ["AccelerationReport", "accelerate"]

# largest relative L2 difference between a class and ours that is rounding: of values, of gradients
AGREE = {torch.float64: (1e-9, 1e-7), torch.float32: (1e-4, 1e-3)}
INTERNAL = frozenset(nn.Module().__dict__) - {"training"}


class _Different(Exception):
    """A module is not what its class name says; the message is the reason."""


class AccelerationReport:
    """What `accelerate` did.

    Attributes:
        swapped: names of the modules in the tree that are ours now, `""` for the tree itself.
        left: reason by name of every module that was left alone and is neither ours nor PyTorch's.
    """

    def __init__(self) -> None:
        self.swapped: list[str] = []
        self.left: dict[str, str] = {}
        self._kinds: dict[str, str] = {}
        self._undo: list[Callable[[], None]] = []

    def restore(self) -> None:
        """Give every swapped module its class back; parameters keep the values that they have by now."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    def __str__(self) -> str:
        def named(name: str) -> str:
            return f"{name or '(the module itself)'}: {self._kinds[name]}"

        lines = [f"swapped {named(name)}" for name in self.swapped]
        lines += [f"left alone {named(name)}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines) or "nothing to swap"


def accelerate(net: nn.Module) -> AccelerationReport:
    """Serve the modules of the published classes inside `net` by this package's, in place.

    A module is recognised by the name of its class (`LowMACS_SVDNet`, `LoMACSSVDNet`,
    `AxialLowRankFreqGate`, `GroupedProjectedAttention`, `GatedConv1D`, `NeuralOrthoRefiner`, `AEPlusLoss`)
    and by the names and shapes of its state, whoever wrote it. Before anything is changed, a copy of it and
    ours compute values and gradients on a random probe in double precision, in training and in evaluation;
    where they differ it is left alone and named. A swap changes the class of the module: the module, its
    parameters and its hooks stay the same objects, so optimisers and references to them stay valid.

    Returns:
        What was swapped and what was left alone, with reasons; `restore()` undoes it.

    Raises:
        TypeError: where `net` is not a module.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"net must be a torch.nn.Module, got {type(net).__name__}")
    report = AccelerationReport()
    ready: dict[nn.Module, nn.Module] = {}
    # children first: a network is served by ours only where all of its parts are
    for name, module in reversed(list(net.named_modules())):
        kind = type(module)
        report._kinds[name] = kind.__name__
        if kind.__module__.split(".")[0] == "torch" or _is_ours(module):
            continue
        try:
            ready[module] = _replacement(module, ready)
            report.swapped.append(name)
        except _Different as reason:
            report.left[name] = str(reason)
    report.swapped.reverse()
    report.left = dict(reversed(report.left.items()))
    for module, new in ready.items():
        report._undo.append(_swap(module, new, ready))
    return report


def _replacement(module: nn.Module, ready: dict[nn.Module, nn.Module]) -> nn.Module:
    """Ours for the module, with the values of its parameters, after the probe."""
    kind = type(module)
    recipe = RECIPES.get(kind.__name__)
    if recipe is None:
        raise _Different("its class is unknown")
    if "forward" in module.__dict__:
        raise _Different("its forward is replaced on the instance")
    for name, part in module.named_modules():
        if name and type(part).__name__ in RECIPES and part not in ready and not _is_ours(part):
            raise _Different(f"its {name} is left alone")
    reasons = []
    for config in _configs(recipe, module):
        # the constructors draw initial values
        with torch.random.fork_rng(devices=[]):
            new = recipe.ours(**config)
            _same_state(module, new)
            for path, part in module.named_modules():
                if path and part in ready:
                    new.set_submodule(path, copy.deepcopy(ready[part]))
            try:
                _probe(recipe, module, new)
                return new
            except _Different as reason:
                reasons.append(str(reason))
    raise _Different(reasons[0])


def _joined(ours: type[nn.Module], kind: type[nn.Module]) -> type[nn.Module]:
    """Our class, with what else the given one has: its other methods, and `isinstance`."""
    if issubclass(ours, kind):
        return ours
    if (ours, kind) in JOINED:
        return JOINED[ours, kind]
    body = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__reduce_ex__": _reduce}
    JOINED[ours, kind] = type(kind.__name__, (ours, kind), body)
    return JOINED[ours, kind]


JOINED: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def _reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    # a joined class has no place to be imported from
    ours, kind = type(module).__bases__
    return _rebuild, (ours, kind), module.__dict__


def _rebuild(ours: type[nn.Module], kind: type[nn.Module]) -> nn.Module:
    joined = _joined(ours, kind)
    return joined.__new__(joined)


def _is_ours(module: nn.Module) -> bool:
    kind = type(module)
    # what we have no published class of, as a frozen network
    other = kind.__module__.split(".")[0] == "lomacs_fast" and kind.__name__ not in RECIPES
    return kind in OURS or kind in JOINED.values() or other


def _configs(recipe: _Recipe, module: nn.Module) -> Iterator[dict[str, Any]]:
    try:
        yield from recipe.configs(module, dict(module.state_dict()))
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise _Different(f"its parameters are not those of the published class ({error})") from error


def _same_state(module: nn.Module, new: nn.Module) -> None:
    old, ours = ({name: tuple(x.shape) for name, x in m.state_dict().items()} for m in (module, new))
    if old != ours:
        different = sorted(name for name in old.keys() | ours.keys() if old.get(name) != ours.get(name))
        raise _Different(
            f"its state differs from the published class's in {', '.join(different[:3])}"
            + (" and more" if len(different) > 3 else "")
        )


def _probe(recipe: _Recipe, module: nn.Module, new: nn.Module) -> None:
    trouble = None
    for dtype in (torch.float64, torch.float32):
        try:
            # copies: a probe leaves no trace in buffers, hooks or gradients
            old = copy.deepcopy(module).to("cpu", dtype)
            ours = copy.deepcopy(new).to("cpu", dtype)
            ours.load_state_dict(old.state_dict())
            for part in old.modules():
                for hooks in (
                    "_forward_hooks",
                    "_forward_pre_hooks",
                    "_backward_hooks",
                    "_backward_pre_hooks",
                ):
                    getattr(part, hooks).clear()
            for training in (True, False):
                expected = _evaluate(recipe, old.train(training), dtype)
                _compare(_evaluate(recipe, ours.train(training), dtype), expected, *AGREE[dtype])
            return
        except _Different:
            raise
        except Exception as error:
            trouble = f"the probe failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    raise _Different(trouble)


def _evaluate(recipe: _Recipe, module: nn.Module, dtype: torch.dtype) -> tuple[list[Tensor], list[Any]]:
    """Outputs, and the gradients of their random sum for inputs and parameters."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, complex: bool = False) -> Tensor:
        drawn = torch.promote_types(dtype, torch.complex32) if complex else dtype
        return torch.randn(shape, dtype=drawn, generator=generator)

    inputs = recipe.probe(module, normal)
    leaves = [x.requires_grad_() for x in inputs if isinstance(x, Tensor) and x.dtype != torch.int64]
    with torch.enable_grad():
        out = module(*inputs)
        outputs = [out] if isinstance(out, Tensor) else list(out)
        total = sum((x * normal(*x.shape, complex=x.is_complex())).real.sum() for x in outputs)
        assert isinstance(total, Tensor)
        wanted = [*leaves, *(p for p in module.parameters() if p.requires_grad)]
        gradients = torch.autograd.grad(total, wanted, allow_unused=True)
    return [x.detach() for x in outputs], list(gradients)


def _compare(
    ours: tuple[list[Tensor], list[Any]], old: tuple[list[Tensor], list[Any]], values: float, gradients: float
) -> None:
    for what, bound, got, want in zip(("values", "gradients"), (values, gradients), ours, old, strict=True):
        if len(got) != len(want):
            raise _Different(f"it returns {len(want)} {what}, ours {len(got)}")
        for x, y in zip(got, want, strict=True):
            x, y = (torch.zeros(()) if z is None else z for z in (x, y))
            if x.shape != y.shape and x.ndim and y.ndim:
                raise _Different(f"its {what} have shape {tuple(y.shape)}, ours {tuple(x.shape)}")
            size = torch.linalg.vector_norm(y)
            difference = torch.linalg.vector_norm(x - y)
            if not difference <= bound * size:
                far = float(difference / size) if size else float(difference)
                raise _Different(f"its {what} differ from ours on a random probe, by {far:.1e}")


def _swap(module: nn.Module, new: nn.Module, ready: dict[nn.Module, nn.Module]) -> Callable[[], None]:
    """Make the module one of our class, in place; returns what undoes it."""
    before, kind = dict(module.__dict__), type(module)
    buffers, transient = dict(module._buffers), set(module._non_persistent_buffers_set)
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    for name, child in new._modules.items():
        _place(module, name, child, ready, replaced)
    ours = {*new._parameters, *new._buffers, *new._modules}
    kept = {name: value for name, value in before.items() if name not in ours}
    own = {name: value for name, value in new.__dict__.items() if name not in INTERNAL}
    module.__dict__.clear()
    module.__dict__.update(kept | own | {"training": before["training"]})
    for name, buffer in new._buffers.items():
        if name not in buffers:
            device = next((p.device for p in module.parameters()), None)
            module.register_buffer(name, buffer if buffer is None else buffer.to(device), persistent=False)
    module.__class__ = _joined(type(new), kind)

    def undo() -> None:
        now = dict(module.__dict__)
        module.__class__ = kind
        module.__dict__.clear()
        module.__dict__.update(before | {"training": now["training"]})
        for name in now["_buffers"].keys() - buffers:
            value = module._buffers.pop(name)
            # a number that became a buffer goes on with what it is by now
            if value is not None and isinstance(before.get(name), float):
                module.__dict__[name] = float(value)
        module._non_persistent_buffers_set.intersection_update(transient)
        for parent, name, old in reversed(replaced):
            for path, parameter in parent._modules[name].named_parameters():  # type: ignore[union-attr]
                owner, _, leaf = path.rpartition(".")
                old.get_submodule(owner)._parameters[leaf] = parameter
            parent._modules[name] = old

    return undo


def _place(
    parent: nn.Module,
    name: str,
    new: nn.Module | None,
    ready: dict[nn.Module, nn.Module],
    replaced: list[tuple[nn.Module, str, nn.Module]],
) -> None:
    """Where a part of `parent` is of another class than ours has there, put ours with the same parameters."""
    old = parent._modules[name]
    assert old is not None
    assert new is not None
    if old in ready or _is_ours(old):
        return
    if type(old) is type(new):
        for key, child in new._modules.items():
            _place(old, key, child, ready, replaced)
        return
    replaced.append((parent, name, old))
    parent._modules[name] = new
    for path, parameter in old.named_parameters():
        owner, _, leaf = path.rpartition(".")
        new.get_submodule(owner)._parameters[leaf] = parameter
    for path, part in old.named_modules():
        if part in ready:
            new.set_submodule(path, part)


class _Recipe(NamedTuple):
    """How a published class is rebuilt: constructor arguments out of its state, inputs of a probe."""

    ours: type[nn.Module]
    configs: Callable[[Any, dict[str, Tensor]], Iterator[dict[str, Any]]]
    probe: Callable[[Any, Callable[..., Tensor]], tuple[Any, ...]]


def _positive_numbers(module: nn.Module, default: float) -> list[float]:
    """Positive numbers that the module holds, whatever it calls them; the probe finds the right one."""
    found = [float(x) for x in vars(module).values() if type(x) in (int, float) and x > 0]
    return list(dict.fromkeys([*found, default]))


def _gate_configs(module: Any, state: dict[str, Tensor]) -> Iterator[dict[str, Any]]:
    hidden, M = state["row_mlp.0.weight"].shape
    config = {"M": M, "N": state["col_mlp.0.weight"].shape[1], "hidden": hidden}
    for temperature in _positive_numbers(module, 0.2):
        yield config | {"temperature": temperature}


def _gate_probe(module: Any, normal: Callable[..., Tensor]) -> tuple[Any, ...]:
    M, N = (module.state_dict()[f"{name}.0.weight"].shape[1] for name in ("row_mlp", "col_mlp"))
    return (normal(2, M, N, complex=True) / 10,)


def _attention_configs(module: Any, state: dict[str, Tensor]) -> Iterator[dict[str, Any]]:
    groups = sum(name.startswith("qs.") for name in state)
    (att_dim, g), (seq_len, k_len) = state["qs.0.weight"].shape, state["Pk.0"].shape
    yield {"dim": groups * g, "att_dim": att_dim, "groups": groups, "seq_len": seq_len, "k_len": k_len}


def _attention_probe(module: Any, normal: Callable[..., Tensor]) -> tuple[Any, ...]:
    state = module.state_dict()
    groups = sum(name.startswith("qs.") for name in state)
    return (normal(2, state["Pk.0"].shape[0], groups * state["qs.0.weight"].shape[1]),)


def _conv_configs(module: Any, state: dict[str, Tensor]) -> Iterator[dict[str, Any]]:
    double, _, k = state["dw.weight"].shape
    yield {"dim": double // 2, "k": k}


def _conv_probe(module: Any, normal: Callable[..., Tensor]) -> tuple[Any, ...]:
    return (normal(2, 13, module.state_dict()["pw.weight"].shape[0]),)


def _refiner_configs(module: Any, state: dict[str, Tensor]) -> Iterator[dict[str, Any]]:
    for scale in _positive_numbers(module, 0.5):
        if scale <= 0.5:
            yield {"init_scale": scale / 5, "max_scale": scale}


def _refiner_probe(module: Any, normal: Callable[..., Tensor]) -> tuple[Any, ...]:
    return tuple(normal(2, n, 3, complex=True) / n**0.5 for n in (9, 7))


def _loss_configs(module: Any, state: dict[str, Tensor]) -> Iterator[dict[str, Any]]:
    yield {"match": "mean"}
    yield {"match": "norm"}


def _loss_probe(module: Any, normal: Callable[..., Tensor]) -> tuple[Any, ...]:
    U, V, H = (normal(2, *shape, complex=True) / 3 for shape in ((9, 3), (7, 3), (9, 7)))
    return U, normal(2, 3).abs().sort(descending=True).values, V, H, 0.4, 0.3, 0.2, 0.1


def _network_sizes(state: dict[str, Tensor]) -> tuple[int, int, int, int]:
    M = state["pos"].shape[1]
    N = state["input_proj.weight"].shape[1] // 4
    return M, N, state["s_head.0.weight"].shape[0], state["scene_emb.weight"].shape[0]


def _network_configs(module: Any, state: dict[str, Tensor]) -> Iterator[dict[str, Any]]:
    M, N, r, n_scene = _network_sizes(state)
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    tau = getattr(module, "tau_s", 0.9)
    config = {
        "M": M,
        "N": N,
        "r": r,
        "n_scene": n_scene,
        "dim": state["pos"].shape[2],
        "depth": depth,
        "gate_hidden": state["freq_gate.row_mlp.0.weight"].shape[0],
        "tau_s": float(tau),
        "k_len": [state[f"blocks.{i}.1.Pk.0"].shape[1] for i in range(0, depth, 2)],
    }
    if depth > 0:
        config["groups"] = sum(name.startswith("blocks.0.1.qs.") for name in state)
    if depth > 1:
        config["kernel_size"] = state["blocks.1.1.dw.weight"].shape[2]
    yield config


def _network_probe(module: Any, normal: Callable[..., Tensor]) -> tuple[Any, ...]:
    M, N, _, n_scene = _network_sizes(module.state_dict())
    return normal(3, M, N, complex=True) / (M * N) ** 0.5, torch.arange(3) % n_scene


_NETWORK = _Recipe(LoMACSSVDNet, _network_configs, _network_probe)
RECIPES = {
    "LowMACS_SVDNet": _NETWORK,
    "LoMACSSVDNet": _NETWORK,
    "AxialLowRankFreqGate": _Recipe(AxialLowRankFreqGate, _gate_configs, _gate_probe),
    "GroupedProjectedAttention": _Recipe(GroupedProjectedAttention, _attention_configs, _attention_probe),
    "GatedConv1D": _Recipe(GatedConv1D, _conv_configs, _conv_probe),
    "NeuralOrthoRefiner": _Recipe(NeuralOrthoRefiner, _refiner_configs, _refiner_probe),
    "AEPlusLoss": _Recipe(AEPlusLoss, _loss_configs, _loss_probe),
}
OURS = frozenset(recipe.ours for recipe in RECIPES.values())
