"""The axial low-rank frequency gate: a separable sigmoid mask on the 2-D spectrum of a channel."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar, Literal, cast, overload

import torch
from torch import Tensor, nn

from .arguments import integer, positive
from .precision import full_precision


def axial_mlp(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """`relu(x w1^T) w2^T`, without bias; x `(..., n)`, w1 `(hidden, n)`, w2 `(n, hidden)`."""
    return nn.functional.linear(torch.relu(nn.functional.linear(x, w1)), w2)


def spectral_gate(
    Hf: Tensor, row_w1: Tensor, row_w2: Tensor, col_w1: Tensor, col_w2: Tensor, temperature: float
) -> Tensor:
    """Gate of a spectrum, `sigmoid((row_mlp(rho)_m + col_mlp(kappa)_n) / T)`.

    `rho_m = mean_n |Hf|` and `kappa_n = mean_m |Hf|`; the magnitude has subgradient 0 at 0.

    Args:
        Hf: spectrum, complex `(..., M, N)`.
        row_w1, row_w2: real `(hidden, M)` and `(M, hidden)`.
        col_w1, col_w2: real `(hidden, N)` and `(N, hidden)`.
        temperature: `T`, positive.

    Returns:
        Gate in (0, 1), real `(..., M, N)`.
    """
    magnitude = Hf.abs()
    with full_precision(Hf.device.type):
        row = axial_mlp(magnitude.mean(-1), row_w1, row_w2)
        col = axial_mlp(magnitude.mean(-2), col_w1, col_w2)
    return torch.sigmoid((row.unsqueeze(-1) + col.unsqueeze(-2)) / temperature)


def unit_norm(H: Tensor) -> tuple[Tensor, Tensor]:
    """`X = H / |H|_F` a sample and the norms, as exact at any scale of H; a zero sample is divided by 1.

    H and X complex `(..., M, N)`, the norms real `(...)`.
    """
    parts = torch.view_as_real(H.resolve_conj().resolve_neg())
    dims = (-3, -2, -1)
    if parts.numel() == 0:
        return H * 1, parts.sum(dims)
    peak = parts.detach().abs().amax(dims, keepdim=True)
    peak = torch.where(peak > 0, peak, 1)
    # the power of two at or below the peak: dividing by it rounds nothing
    scale = peak / (2 * torch.frexp(peak).mantissa)
    parts = parts / scale
    size = torch.linalg.vector_norm(parts, dim=dims, keepdim=True)
    X = parts / torch.where(size > 0, size, 1)
    return torch.view_as_complex(X), (size * scale)[..., 0, 0, 0]


@overload
def freq_gate(
    H: Tensor,
    row_w1: Tensor,
    row_w2: Tensor,
    col_w1: Tensor,
    col_w2: Tensor,
    temperature: float,
    *,
    normalize: Literal[False] = False,
) -> Tensor: ...


@overload
def freq_gate(
    H: Tensor,
    row_w1: Tensor,
    row_w2: Tensor,
    col_w1: Tensor,
    col_w2: Tensor,
    temperature: float,
    *,
    normalize: bool,
) -> Any: ...


def freq_gate(
    H: Tensor,
    row_w1: Tensor,
    row_w2: Tensor,
    col_w1: Tensor,
    col_w2: Tensor,
    temperature: float,
    *,
    normalize: bool = False,
) -> Any:
    """Gated channel `Hd = IFFT2(FFT2(H) * gate(FFT2(H)))`, both transforms orthonormal.

    Args:
        H: complex `(..., M, N)`.
        row_w1, row_w2, col_w1, col_w2, temperature: as in `spectral_gate`.
        normalize: gate `H / |H|_F` in place of H; a zero sample stays zero, as if its norm were 1.

    Returns:
        Hd, like H; with `normalize` also the norms `|H|_F`, real `(...)`.
    """
    if normalize:
        X, norms = unit_norm(H)
        return freq_gate(X, row_w1, row_w2, col_w1, col_w2, temperature), norms
    if H.numel() == 0:  # MKL refuses an empty batch; its transform is itself
        return H * spectral_gate(H, row_w1, row_w2, col_w1, col_w2, temperature)
    Hf = torch.fft.fft2(H, norm="ortho")
    gate = spectral_gate(Hf, row_w1, row_w2, col_w1, col_w2, temperature)
    return torch.fft.ifft2(Hf * gate, norm="ortho")


class AxialLowRankFreqGate(nn.Module):
    """Parameters of the frequency gate; `forward(Hf)` returns the gate of a spectrum.

    Args:
        M, N: channel size.
        hidden: width of both perceptrons; pruning makes it smaller.
        temperature: divisor of the logits, positive and finite.

    Raises:
        TypeError, ValueError: for another type or value of an argument, naming it.

    Parameters: `row_mlp.0.weight (hidden, M)`, `row_mlp.2.weight (M, hidden)`, likewise `col_mlp` with N.
    """

    functions: ClassVar[Any] = SimpleNamespace(spectral_gate=spectral_gate, freq_gate=freq_gate)

    def __init__(self, M: int, N: int, hidden: int = 32, temperature: float = 0.2) -> None:
        super().__init__()
        M, N, hidden = integer("M", M, 1), integer("N", N, 1), integer("hidden", hidden, 1)
        temperature = positive("temperature", temperature)
        self.M, self.N, self.hidden, self.temperature = M, N, hidden, temperature
        self.row_mlp = nn.Sequential(
            nn.Linear(M, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, M, bias=False)
        )
        self.col_mlp = nn.Sequential(
            nn.Linear(N, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, N, bias=False)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights."""
        for weight in self.weights:
            nn.init.xavier_uniform_(weight)

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`row_w1, row_w2, col_w1, col_w2`, in the order the functions take them."""
        linears = (self.row_mlp[0], self.row_mlp[2], self.col_mlp[0], self.col_mlp[2])
        row_w1, row_w2, col_w1, col_w2 = (cast(nn.Linear, linear).weight for linear in linears)
        return row_w1, row_w2, col_w1, col_w2

    def forward(self, Hf: Tensor) -> Tensor:
        return self.functions.spectral_gate(Hf, *self.weights, self.temperature)

    def filter(self, H: Tensor) -> Tensor:
        """`H -> Hd`, both complex `(..., M, N)`."""
        return self.functions.freq_gate(H, *self.weights, self.temperature)

    def extra_repr(self) -> str:
        return f"M={self.M}, N={self.N}, hidden={self.hidden}, temperature={self.temperature}"
