"""Which operators a network runs, and whether a decomposition, an inversion or a QR is among them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Audit", "audit"]

# parts of the names of operators that decompose, invert, solve or orthogonalise by elimination or reflection
FORBIDDEN = {
    "singular value decomposition": ("svd",),
    "eigenvalue decomposition": ("eig", "symeig"),
    "QR decomposition": ("qr", "householder", "orgqr", "ormqr", "geqrf"),
    "inversion": ("inverse", "linalg_inv", "pinv", "tensorinv"),
    "linear solver": ("solve", "lstsq", "lu_factor", "linalg_lu", "lu_unpack", "cholesky", "ldl"),
    "determinant": ("det",),
    "matrix function": ("matrix_exp", "matrix_power"),
}
KINDS = {
    "matrix product": ("mm", "matmul", "linear", "addmv", "mv", "dot", "conv", "baddbmm", "einsum"),
    "FFT": ("fft",),
    "sort": ("sort", "argsort", "topk"),
}
# what is inside the fused operators, all of it
FUSED = {
    "aeplus": "matrix products, norms",
    "low_rank": "matrix products, sums",
    "neural_svd_steps": "matrix products, column norms",
    "ortho_refine": "matrix products, column norms",
    "ortho_refine_kept": "matrix products, column norms",
    "bjorck": "matrix products, largest row sum",
    "spectral_calibrate": "matrix product, column dots",
    "svd_heads": "matrix products",
    "pooled_heads": "means, matrix products",
    "svd_tail": "matrix products, column norms, sort",
    "svd_tail_kept": "matrix products, column norms, sort",
    "refine_svd": "matrix products, column norms, largest row sum, FFT, sort",
    "approx_svd": "matrix products, column norms, largest row sum, FFT, sort",
    "freq_gate": "FFT, means, two perceptrons, elementwise",
    "gate_project": "FFT, means, two perceptrons, matrix product",
    "gate_project_kept": "FFT, means, two perceptrons, matrix product",
    "dual_view_project": "matrix product, bands of rows",
    "backbone": "norms, matrix products, softmax, taps, sigmoid, means",
    "frozen_angular_svd": "matrix products, convolutions, sigmoid, column norms, largest row sum, FFT, sort",
    "frozen_svd": "FFT, means, matrix products, softmax, norms, sort",
    "projected_attention": "matrix products, softmax",
    "projected_attention_groups": "matrix products, softmax",
    "gated_conv1d": "taps, sigmoid, matrix product",
}


class Operator(NamedTuple):
    """One operator: its name, how often it ran, what it is, and whether it is out of the rules."""

    name: str
    calls: int
    kind: str
    forbidden: bool


class Audit(NamedTuple):
    """Every operator that ran, the most frequent first."""

    operators: tuple[Operator, ...]

    @property
    def forbidden(self) -> tuple[Operator, ...]:
        """Decompositions, inversions, QR, solvers and matrix functions among them."""
        return tuple(operator for operator in self.operators if operator.forbidden)

    @property
    def verdict(self) -> str:
        if not self.forbidden:
            return f"{len(self.operators)} operators; no decomposition, inversion or QR is among them"
        return "out of the rules: " + ", ".join(f"{o.name} ({o.kind})" for o in self.forbidden)

    def __str__(self) -> str:
        width = max((len(o.name) for o in self.operators), default=0)
        lines = [f"{o.calls:5d}  {o.name:{width}}  {o.kind}" for o in self.operators]
        return "\n".join([*lines, self.verdict])


def _judge(name: str) -> tuple[str, bool]:
    namespace, _, bare = name.partition("::")
    bare = bare.removeprefix("_")
    if namespace == "lomacs":
        inside = FUSED.get(bare.removesuffix("_backward"))
        return (f"fused: {inside}", False) if inside else ("fused, of unknown contents", True)
    for kind, parts in FORBIDDEN.items():
        # the names of roots hold the letters of QR, that of detach those of det
        if any(part in bare.replace("sqrt", "root") for part in parts) and bare not in ("detach", "detach_"):
            return kind, True
    for kind, parts in KINDS.items():
        if any(part in bare for part in parts):
            return kind, False
    known = namespace in ("aten", "prim", "profiler", "c10d")
    return ("elementwise, reduction or layout", False) if known else ("of an unknown library", True)


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.calls[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def audit(net: nn.Module | Callable[..., Any], *inputs: Any, backward: bool = True) -> Audit:
    """Run `net(*inputs)`, and its backward, and list every operator that ran below autograd.

    Args:
        net: a module or a function.
        inputs: what it is called with; for a network, left out, one random channel of scene 0.
        backward: run the backward of the sum of squared outputs as well, where anything wants a gradient.

    Returns:
        The operators with their number of calls and kind; `verdict` says in a sentence whether a
        decomposition, an inversion, a solver or a QR is among them. An operator of a library that is not
        known here counts as out of the rules, since nobody has looked inside.

    Raises:
        TypeError: where inputs are left out and `net` does not say the size of its channel.
    """
    if not inputs:
        M, N = getattr(net, "M", None), getattr(net, "N", None)
        if not isinstance(M, int) or not isinstance(N, int):
            raise TypeError(f"inputs must be given for {type(net).__name__}, which names no M and N")
        # a frozen network has buffers alone
        held = (*net.parameters(), *net.buffers()) if isinstance(net, nn.Module) else ()
        first = next(iter(held), torch.empty(()))
        dtype = torch.promote_types(first.dtype, torch.complex32)
        generator = torch.Generator().manual_seed(0)
        H = torch.randn(1, M, N, dtype=dtype, generator=generator).to(first.device)
        inputs = (H, torch.zeros(1, dtype=torch.int64, device=first.device))
    gradients: list[Tensor | None] = []
    if isinstance(net, nn.Module):
        gradients = [p.grad for p in net.parameters()]
    with _Recorder() as recorder:
        out = net(*inputs)
        outputs = [x for x in ([out] if isinstance(out, Tensor) else out) if isinstance(x, Tensor)]
        recorded = [x for x in outputs if x.requires_grad]
        if backward and recorded:
            torch.autograd.backward(recorded, [x.detach() for x in recorded])
    if isinstance(net, nn.Module):
        for p, gradient in zip(net.parameters(), gradients, strict=True):
            p.grad = gradient
    found = [Operator(name, calls, *_judge(name)) for name, calls in recorder.calls.most_common()]
    return Audit(tuple(found))
