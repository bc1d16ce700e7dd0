"""A gate in the angles of an antenna panel: it filters a covariance's noise where no path arrives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from .arguments import integer

FLOOR = 0.9  # the floor, in smallest entries of the angular spectrum, untrained
LEAST = 0.03  # an angle stands at least so far above the floor, in floors
SHARPNESS, BIAS = 1.0, 2.4  # untrained: `gate = x / (x + 0.09)`, x in floors


def panel(array: Sequence[int] | None, antennas: int) -> tuple[int, int, int]:
    """`(polarisations, rows, columns)` of a panel with so many antennas; one row when not given."""
    if array is None:
        return 1, 1, antennas
    if isinstance(array, str) or not isinstance(array, Sequence) or len(array) != 3:
        raise TypeError(f"array must be (polarisations, rows, columns), got {array!r}")
    p, a, b = (integer("array", n, 1) for n in array)
    if p * a * b != antennas:
        raise ValueError(f"array must have M = {antennas} antennas, got {p} x {a} x {b}")
    return p, a, b


def lag_tables(rows: int, columns: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Where entries of a matrix over a panel's elements lie by lag, and the lag of every entry.

    Lags `(di, dj)` are counted modulo `(2 rows, 2 columns)`. The first table `(4 e, e)`, e elements, holds
    flat indices into `(e, e)` and e^2 where there is no entry; the second `(e, e)` indices of lags.
    """
    e = rows * columns
    i = torch.arange(e, device=device)
    down = (i[:, None] // columns - i // columns).remainder(2 * rows)
    across = (i[:, None] % columns - i % columns).remainder(2 * columns)
    lag = down * (2 * columns) + across
    entries = torch.full((4 * e, e), e * e, device=device)
    entries[lag, i.expand(e, e)] = i[:, None] * e + i
    return entries, lag


def angular_spectrum(H: Tensor, array: tuple[int, int, int], entries: Tensor) -> Tensor:
    """The angular power spectrum `(B, 2 rows, 2 columns)` of a covariance; entries from `lag_tables`."""
    p, a, b = array
    e = a * b
    blocks = H.reshape(-1, p, e, p, e).diagonal(dim1=1, dim2=3).sum(-1) / p
    flat = nn.functional.pad(blocks.reshape(-1, e * e), (0, 1))
    lags = flat[:, entries].sum(-1).reshape(-1, 2 * a, 2 * b)
    return torch.fft.fft2(lags).real / e


def _around(z: Tensor) -> Tensor:
    # circular by slices: a panel of one row has fewer angles than the padding of torch wants
    z = torch.cat([z[..., -1:, :], z, z[..., :1, :]], -2)
    return torch.cat([z[..., -1:], z, z[..., :1]], -1)


def gate_of_spectrum(
    P: Tensor,
    c: Tensor,
    slope: Tensor,
    first: Tensor,
    bias: Tensor,
    second: Tensor,
    second_bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gate `(B, 2 rows, 2 columns)` and the floor `(B, 1)` of `AngularGate` from the spectrum.

    `c` and `slope (2,)` are its scalars, `first (hidden, 1, 3, 3)`, `second (1, hidden, 3, 3)` and
    `second_bias (1,)` its convolutions, `bias (B, hidden)` that of the first with the scene's.
    """
    floor = (c * P.flatten(1).amin(-1)).clamp_min(0)[:, None, None]
    # the last terms serve a covariance without noise, and zero
    above = P / (floor + 1e-6 * P.mean((-2, -1), keepdim=True).clamp_min(0) + 1e-20)
    x = (above - (1 - LEAST)).clamp_min(LEAST).log()
    f = nn.functional.conv2d(_around(x[:, None]), first) + bias[:, :, None, None]
    f = nn.functional.conv2d(_around(torch.relu(f)), second, second_bias)[:, 0]
    return torch.sigmoid(slope[0] * x + slope[1] + f), floor[..., 0]


def filtered(H: Tensor, gate: Tensor, floor: Tensor, array: tuple[int, int, int], lag: Tensor) -> Tensor:
    """`W (H - floor I) W^H` of `AngularGate`; lag from `lag_tables`."""
    taps = torch.fft.ifft2(torch.complex(gate, torch.zeros_like(gate))).flatten(1)
    W = taps[:, lag][:, None]
    p, e = array[0], lag.shape[0]
    n = p * e
    Y = H - torch.diag_embed(floor.expand(-1, n)).to(H.dtype)
    for _ in range(2):
        Y = (W @ Y.reshape(-1, p, e, n)).reshape(-1, n, n).mH
    return Y


class AngularGate(nn.Module):
    """`forward(H, scene) -> Y, floor`: a covariance without its noise floor, filtered by angle.

    With `C` the mean of the p diagonal blocks of H, one a polarisation, of e elements each:

    - spectrum `P_g = a_g^H C a_g` over a grid of twice as many angles as rows and columns, a_g the unit
      steering vectors: sums of C along equal lags, then one FFT;
    - `floor = c min_g P_g`, `x_g = max(P_g / floor - 1 + 0.03, 0.03)`;
    - `gate_g = sigmoid(s log x_g + b + f(log x)_g)`, f two circular 3x3 convolutions with a ReLU and a bias
      a scene between;
    - `W_ij` the inverse FFT of the gate at the lag of (i, j), block Toeplitz, one block a polarisation:
      `Y = W (H - floor I) W^H`.

    Args:
        array: polarisations, rows and columns of the panel; antennas are numbered in this order, the last
            fastest.
        n_scene: scenes.
        hidden: channels between the convolutions.

    Input: H complex `(B, M, M)`, Hermitian; scene integer `(B,)`. Output: Y complex `(B, M, M)`, Hermitian;
    floor real `(B, 1)`, not negative, in the scale of H.
    """

    entries: Tensor
    lag: Tensor

    def __init__(self, array: Sequence[int], n_scene: int, hidden: int = 8) -> None:
        super().__init__()
        self.array = panel(array, math.prod(array))
        hidden = integer("gate_hidden", hidden, 1)
        self.c_raw = nn.Parameter(torch.empty(()))
        self.slope = nn.Parameter(torch.empty(2))
        self.first = nn.Conv2d(1, hidden, 3)
        self.second = nn.Conv2d(hidden, 1, 3)
        self.scene_bias = nn.Embedding(n_scene, hidden)
        entries, lag = lag_tables(*self.array[1:])
        self.register_buffer("entries", entries, persistent=False)
        self.register_buffer("lag", lag, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The floor and slope of the untrained gate; the second convolution is zero."""
        nn.init.constant_(self.c_raw, math.log(FLOOR))
        with torch.no_grad():
            self.slope.copy_(torch.tensor([SHARPNESS, BIAS]))
        nn.init.kaiming_uniform_(self.first.weight, a=math.sqrt(5))
        for x in (self.first.bias, self.second.weight, self.second.bias, self.scene_bias.weight):
            nn.init.zeros_(x)  # type: ignore[arg-type]

    def spectrum(self, H: Tensor) -> Tensor:
        """The angular power spectrum `(B, 2 rows, 2 columns)` of a covariance."""
        return angular_spectrum(H, self.array, self.entries)

    def gate(self, H: Tensor, scene: Tensor) -> tuple[Tensor, Tensor]:
        """The gate `(B, 2 rows, 2 columns)` and the floor `(B, 1)`."""
        first, second = self.first, self.second
        bias = self.scene_bias(scene) + cast(Tensor, first.bias)
        return gate_of_spectrum(
            self.spectrum(H),
            self.c_raw.exp(),
            self.slope,
            first.weight,
            bias,
            second.weight,
            cast(Tensor, second.bias),
        )

    def forward(self, H: Tensor, scene: Tensor) -> tuple[Tensor, Tensor]:
        H = 0.5 * (H + H.mH)
        gate, floor = self.gate(H, scene)
        return filtered(H, gate, floor, self.array, self.lag), floor

    def extra_repr(self) -> str:
        return f"array={self.array}"
