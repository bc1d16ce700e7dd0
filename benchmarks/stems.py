"""One case a public function: inputs at the sizes of the design, and the call with values and gradients.

The same cases are checked by `tests/test_stems.py` on the CPU and on a device, and timed by
`benchmarks/gpu_acceptance.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lomacs_fast.functional import AttentionBlock, ConvBlock

Drawn = dict[str, Tensor]


class Size(NamedTuple):
    M: int
    N: int
    r: int

    def __str__(self) -> str:
        return f"{self.M}x{self.N}x{self.r}"


class Draw:
    """Seeded float64 draws; a case casts them to the precision that it runs in."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def real(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=self.generator)

    def complex(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.complex128, generator=self.generator)

    def columns(self, B: int, n: int, r: int) -> Tensor:
        """Nearly orthonormal columns, as in training, in rows as the heads leave them."""
        return torch.linalg.qr(self.complex(B, n, r))[0].contiguous() + 0.02 * self.complex(B, n, r)

    def spectrum(self, B: int, r: int) -> Tensor:
        drawn = torch.rand((B, r), dtype=torch.float64, generator=self.generator)
        return drawn.sort(-1, descending=True).values + 0.01


class Case(NamedTuple):
    """One function: `draw(Draw, batch, Size)` makes its tensors by name, `keywords` are the others."""

    stem: str
    function: str
    draw: Callable[[Draw, int, Size], Drawn]
    keywords: dict[str, Any]
    # arguments that take no gradient here, as in the network's training step
    constant: Sequence[str] = ()
    # the function's arguments from the tensors, where they do not go in by their names
    arguments: Callable[[Drawn], dict[str, Any]] = dict


def _gate(d: Draw, B: int, s: Size) -> Drawn:
    hidden = 32
    shapes = {
        "row_w1": (hidden, s.M),
        "row_w2": (s.M, hidden),
        "col_w1": (hidden, s.N),
        "col_w2": (s.N, hidden),
    }
    weights = {name: d.real(*shape) / math.sqrt(shape[1]) for name, shape in shapes.items()}
    return {"H": d.complex(B, s.M, s.N) / math.sqrt(s.M * s.N), **weights}


def _dual_view(d: Draw, B: int, s: Size) -> Drawn:
    return {
        "Hd": d.complex(B, s.M, s.N) / math.sqrt(s.M * s.N),
        "weight": d.real(64, 4 * s.N) / math.sqrt(s.N),
        "bias": d.real(64) / 10,
        "pos": d.real(1, s.M, 64) / 10,
    }


def _attention(d: Draw, B: int, s: Size) -> Drawn:
    G, g, k = 4, 16, 32
    a = min(s.r, 32)
    shapes = {"wq": (G, a, g), "wk": (G, a, g), "wv": (G, g, g), "wo": (G, g, g)}
    return {
        "x": d.real(B, s.M, G * g),
        **{name: d.real(*shape) / math.sqrt(g) for name, shape in shapes.items()},
        **{name: d.real(G, s.M, k) / math.sqrt(s.M) for name in ("pk", "pv")},
    }


def _conv(d: Draw, B: int, s: Size) -> Drawn:
    width = 64
    return {
        "x": d.real(B, s.M, width),
        "dw_weight": d.real(2 * width, 1, 3) / math.sqrt(3),
        "dw_bias": d.real(2 * width) / 10,
        "pw_weight": d.real(width, width, 1) / math.sqrt(width),
        "pw_bias": d.real(width) / 10,
    }


def _loss(d: Draw, B: int, s: Size) -> Drawn:
    U, V, S = d.columns(B, s.M, s.r), d.columns(B, s.N, s.r), d.spectrum(B, s.r)
    H = U * S[:, None] @ V.mH + 0.01 * d.complex(B, s.M, s.N)
    return {"U": U, "S": S, "V": V, "H": H}


def _calibrate(d: Draw, B: int, s: Size) -> Drawn:
    drawn = _loss(d, B, s)
    return {"U": drawn["U"], "H": drawn["H"], "V": drawn["V"], "S_pred": drawn["S"]}


def _factor(d: Draw, B: int, s: Size) -> Drawn:
    return {"U": d.columns(B, s.M, s.r)}


def _low_rank(d: Draw, B: int, s: Size) -> Drawn:
    return {
        "F": d.complex(B, s.N, s.r) / math.sqrt(s.N),
        "G": d.complex(B, s.M, s.r) / math.sqrt(s.M),
        "H": d.complex(B, s.M, s.N) / math.sqrt(s.M * s.N),
    }


def _front(d: Draw, B: int, s: Size) -> Drawn:
    view = _dual_view(d, B, s)
    return _gate(d, B, s) | {name: view[name] for name in ("weight", "bias", "pos")}


def _tail(d: Draw, B: int, s: Size) -> Drawn:
    drawn = _loss(d, B, s)
    # not sorted, as the heads leave it
    return {"U_raw": drawn["U"], "V_raw": drawn["V"], "S_pred": drawn["S"].flip(-1), "H": drawn["H"]}


def _refine(d: Draw, B: int, s: Size) -> Drawn:
    drawn = _loss(d, B, s)
    # apart from each other: vectors of close singular values are arbitrary in their span
    S = torch.linspace(1, 0.2, s.r, dtype=torch.float64)
    H = drawn["U"] * S @ drawn["V"].mH + 0.01 * d.complex(B, s.M, s.N)
    return {"H": H, "U": d.columns(B, s.M, s.r) + drawn["U"], "V": d.columns(B, s.N, s.r) + drawn["V"]}


def _backbone(d: Draw, B: int, s: Size) -> Drawn:
    """An attention block and a convolution block, as in the network, and the last norm."""
    attention, conv = _attention(d, B, s), _conv(d, B, s)
    x = attention.pop("x")
    width = x.shape[-1]
    norms = ("attention", "conv", "last")
    return {
        "x": x,
        **attention,
        **{name: w for name, w in conv.items() if name != "x"},
        **{f"{name}_weight": 1 + d.real(width) / 10 for name in norms},
        **{f"{name}_bias": d.real(width) / 10 for name in norms},
    }


def _blocks(drawn: Drawn) -> dict[str, Any]:
    def block(kind: Any, norm: str) -> Any:
        names = {"norm_weight": f"{norm}_weight", "norm_bias": f"{norm}_bias"}
        return kind(*(drawn[names.get(field, field)] for field in kind._fields))

    return {
        "x": drawn["x"],
        "blocks": (block(AttentionBlock, "attention"), block(ConvBlock, "conv")),
        "norm_weight": drawn["last_weight"],
        "norm_bias": drawn["last_bias"],
    }


WEIGHTS = {"lam": 0.2, "w_energy": 0.4, "w_diag": 0.3, "w_match": 0.3}
CASES = (
    Case("freq_gate", "freq_gate", _gate, {"temperature": 0.2}, ("H",)),
    Case("dual_view", "dual_view_project", _dual_view, {}),
    Case("dual_view", "gate_project", _front, {"temperature": 0.2}, ("H",)),
    Case("projected_attention", "projected_attention", _attention, {}),
    Case("gated_conv", "gated_conv1d", _conv, {}),
    Case("backbone", "backbone", _backbone, {}, arguments=_blocks),
    Case("ortho", "ortho_refine", _factor, {"step": 0.1}),
    Case("ortho", "bjorck", _factor, {"steps": 5}),
    Case("spectral", "spectral_calibrate", _calibrate, {"tau": 0.8}),
    Case("spectral", "svd_tail", _tail, {"a": 0.1, "b": 0.2, "tau": 0.8}),
    Case("aeplus", "aeplus_loss", _loss, WEIGHTS, ("H",)),
    Case("low_rank", "low_rank_loss", _low_rank, {"nesting": "joint"}, ("H",)),
    Case("refine", "refine_svd", _refine, {"steps": 2, "active": 4}),
)


def tensors(case: Case, batch: int, size: Size, seed: int = 0) -> Drawn:
    """The case's tensors in float64 and complex128 on the CPU."""
    return case.draw(Draw(seed), batch, size)


def cast(drawn: Drawn, device: str | torch.device, double: bool = False) -> Drawn:
    """Tensors in single precision, or double, on a device."""
    real, cplx = (torch.float64, torch.complex128) if double else (torch.float32, torch.complex64)
    return {name: x.to(device, cplx if x.is_complex() else real) for name, x in drawn.items()}


def call(case: Case, functions: Any, drawn: Drawn, backward: bool, everything: bool = False) -> list[Tensor]:
    """Outputs and, with backward, the gradients of a fixed weighting of them.

    `everything` asks for the gradient of every tensor, otherwise of those that training wants.
    """
    fn = getattr(functions, case.function)
    wanted = [name for name in drawn if everything or name not in case.constant] if backward else []
    arguments = {
        name: x.detach().requires_grad_() if name in wanted else x.detach() for name, x in drawn.items()
    }
    with torch.set_grad_enabled(backward):
        out = fn(**case.arguments(arguments), **case.keywords)
        # a loss comes with its terms, detached
        outputs = [x for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, Tensor)]
    if not backward:
        return outputs
    weights = [
        torch.linspace(-1, 1, x.numel(), device=x.device, dtype=torch.float64).cos().reshape(x.shape)
        for x in outputs
    ]
    gradients = torch.autograd.grad(
        outputs,
        [arguments[name] for name in wanted],
        [w.to(x.dtype) for w, x in zip(weights, outputs, strict=True)],
    )
    return [*(x.detach() for x in outputs), *gradients]
