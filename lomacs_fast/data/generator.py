"""Seeded synthetic MIMO channels: spatial covariances and plain channels, with clean labels.

A cluster-and-ray model in the spirit of 3GPP TR 38.901 section 7.5, reduced to what fixes the spectrum, the
angular sparsity and the noise of the matrices. Real 3GPP channels come from Sionna; this imitates none.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .seeding import derive_seed

__all__ = ["SCENARIOS", "ChannelBatch", "ChannelGenerator"]

SCENARIOS = (1, 2, 3, 4)

# A covariance averages 768 vectors: 2 user antennas x 24 subcarriers x 16 repetitions.
VECTORS = 768
_SUBCARRIERS = 24
_USER_ANTENNAS = 2
_DISTINCT = _SUBCARRIERS * _USER_ANTENNAS
_BANDWIDTH = 20e6
_SNR_RANGE_DB = 3.0
_FADING_DB = 6.0
_SECTOR = math.radians(100.0)
_HORIZON = math.radians(95.0)
_GLOBALS = 10
_GAMMA_TRIES = 4
_CHUNK = 32


@dataclass(frozen=True)
class _Scenario:
    """Statistics of one scenario: powers in dB, angles in degrees, times in seconds."""

    snr_db: float
    channel_snr_db: float
    rician_db: float
    imbalance_db: float
    cross_polar_db: float
    azimuth_spread: float
    zenith_spread: float
    ray_spread: float
    delay_spread: float
    decay: float
    shadow_db: float
    diffuse_db: float
    rician_spread_db: float = 1.0
    imbalance_spread_db: float = 0.5
    ray_delay: float = 60e-9
    clusters: int = 20
    rays: int = 4
    diffuse_rays: int = 32

    @property
    def paths(self) -> int:
        return 1 + self.clusters * self.rays + self.diffuse_rays


# Fitted at 128x128 to the spectra, correlations, sparsity and noise that tests/test_generator.py holds; the
# channel SNR gives plain channels the relative error of the covariances.
_TABLE = {
    1: _Scenario(6.0, 23.0, 1.1, -1.9, 8.5, 9.7, 14.2, 11.0, 400e-9, 0.55, 0.5, -6.2),
    2: _Scenario(6.0, 21.0, -4.0, -1.5, 7.2, 9.4, 9.7, 6.7, 500e-9, 0.06, 0.2, -13.0),
    3: _Scenario(6.0, 23.0, 1.3, -2.1, 7.5, 17.2, 12.8, 8.4, 600e-9, 0.25, 2.3, -9.0),
    4: _Scenario(4.0, 18.5, -3.3, -2.5, 4.6, 8.3, 9.7, 6.7, 630e-9, 0.29, 2.2, -10.2),
}


@dataclass(frozen=True)
class ChannelBatch:
    """`input` (n, M, N) complex64 with noise, `label` (n, M, N) complex64 without, and their scenario."""

    input: Tensor
    label: Tensor
    scenario: int


class _Draws:
    """Hands out consecutive blocks of the standard normals `(n, total)` of n samples."""

    def __init__(self, normals: Tensor) -> None:
        self._normals, self._at = normals, 0

    def take(self, *shape: int) -> Tensor:
        size = math.prod(shape)
        block = self._normals[:, self._at : self._at + size]
        self._at += size
        return block.reshape(-1, *shape)


def _integer(name: str, value: object, least: int | None = None) -> int:
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def panel_shape(antennas: int) -> tuple[int, int, int]:
    """(polarisations, rows, columns) of a planar array: two polarisations if even, near square."""
    polarisations = 2 - antennas % 2
    elements = antennas // polarisations
    rows = max(d for d in range(1, math.isqrt(elements) + 1) if elements % d == 0)
    return polarisations, rows, elements // rows


# Bits must not depend on a sample's place in its batch. Real products and sums round the same in vector body
# and scalar tail, as do exp, log, sin, cos and bmm; pow and complex products need not, so they are not used.


def _power(db: Tensor) -> Tensor:
    return torch.exp(db * (math.log(10.0) / 10.0))


def _amplitude(db: Tensor) -> Tensor:
    return torch.exp(db * (math.log(10.0) / 20.0))


def _symmetric(normal: Tensor) -> Tensor:
    """Uniform in (-1, 1) from a standard normal."""
    return 2.0 * torch.special.ndtr(normal) - 1.0


def _exponential(normal: Tensor) -> Tensor:
    """Exponential of mean one from a standard normal."""
    return -torch.special.log_ndtr(normal)


def _steering(azimuth: Tensor, zenith: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine `(n, rows columns, P)` of a half-wavelength array; angles `(n, P)` in radians."""
    across = torch.sin(zenith) * torch.sin(azimuth) * math.pi
    down = torch.cos(zenith) * math.pi
    row = torch.arange(rows, dtype=torch.float32, device="cpu")[:, None, None]
    column = torch.arange(columns, dtype=torch.float32, device="cpu")[:, None]
    phase = (row * down[:, None, None] + column * across[:, None, None]).flatten(1, 2)
    return torch.cos(phase), torch.sin(phase)


def _angles(draws: _Draws, s: _Scenario, scale: float) -> tuple[Tensor, Tensor]:
    """Azimuth and zenith `(n, paths)` in radians at one end: line of sight, then rays, then diffuse rays."""
    centre, cluster = draws.take(2), draws.take(2, s.clusters)
    ray, diffuse = draws.take(2, s.clusters, s.rays), draws.take(2, s.diffuse_rays)
    found = []
    spreads = (s.azimuth_spread, s.zenith_spread)
    starts = (_symmetric(centre[:, 0]) * (_SECTOR / 2), centre[:, 1] * math.radians(5.0) + _HORIZON)
    far = (_symmetric(diffuse[:, 0]) * math.radians(60.0), diffuse[:, 1] * math.radians(15.0) + _HORIZON)
    for i, ray_scale in enumerate((1.0, 0.5)):
        middle = starts[i][:, None] + cluster[:, i] * math.radians(spreads[i] * scale)
        rays = middle[..., None] + ray[:, i] * math.radians(s.ray_spread * ray_scale * scale)
        found.append(torch.cat([starts[i][:, None], rays.flatten(1), far[i]], 1))
    return found[0], found[1]


class ChannelGenerator:
    """Pairs of a noisy input and its clean label, from clusters of paths, in one of four scenarios.

    A path p has angles, a delay tau_p and a polarisation matrix: one line of sight (Rician factor), clusters
    of Rayleigh rays around it, and weak diffuse rays over the sector. An end with an even number of antennas
    is a half-wavelength planar array of two polarisations, antenna index = (polarisation, row, column); with
    an odd number it has one polarisation. Samples are scaled by a log-normal gain (6 dB, cut at 18 dB).

    `kind="covariance"`: with the vectors `h_{k,u} = sum_p a(p) x_{p,u} exp(-2 pi i f_k tau_p)` over 24
    subcarriers of 20 MHz and 2 user antennas, the label is the mean of `h h^H`, exactly Hermitian. The input
    is distributed as the mean of 768 `(h + n)(h + n)^H`, each vector received 16 times with fresh noise.
    `kind="channel"`: the label is one subcarrier between N transmit and M receive antennas, the input is
    `exp(-2 pi i f delta) H + noise`.

    The noise variance of a sample is `(mean |h|)^2 10^(-snr/10)`: the SNR refers to the mean magnitude of the
    entries (about 1 dB under their mean power), and is uniform within 3 dB of `snr_db`.

    Sample i is a pure function of (seed, scenario, epoch, i) and the constructor's arguments: on one machine
    and one build of torch, the same bits in any batch and any order.

    Args:
        M, N: receive and transmit antennas, at least 2; equal for a covariance.
        scenario: 1 to 4. 1 and 3 have a strong line of sight, 2 and 4 a weak one; 4 is also noisier.
        seed: any integer, taken modulo 2^64.
        kind: "covariance" or "channel".
        snr_db: mean SNR in dB instead of the scenario's (6, 6, 6, 4 for covariances, 23, 21, 23, 18.5 for
            channels); `inf` leaves the input clean.
        timing_offset: delta is uniform within this many seconds. In a covariance it turns all entries of a
            vector alike and cancels in `h h^H`.

    Raises:
        TypeError: an argument that should be an integer or a number is not.
        ValueError: an argument outside of its range, or M != N for a covariance.
    """

    def __init__(
        self,
        M: int,
        N: int,
        *,
        scenario: int,
        seed: int = 0,
        kind: str = "covariance",
        snr_db: float | None = None,
        timing_offset: float = 2e-9,
    ) -> None:
        self.M, self.N = _integer("M", M, 2), _integer("N", N, 2)
        self.scenario, self.seed = _integer("scenario", scenario), _integer("seed", seed)
        if self.scenario not in SCENARIOS:
            raise ValueError(f"scenario must be one of {SCENARIOS}, got {scenario}")
        if kind not in ("covariance", "channel"):
            raise ValueError(f'kind must be "covariance" or "channel", got {kind!r}')
        if kind == "covariance" and self.M != self.N:
            raise ValueError(f"N must equal M = {self.M} for a covariance, got {self.N}")
        for name, value in (("snr_db", snr_db), ("timing_offset", timing_offset)):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number and not (name == "snr_db" and value is None):
                raise TypeError(f"{name} must be a number, got {value!r}")
        if snr_db is not None and not snr_db > -100.0:
            raise ValueError(f"snr_db must be above -100, got {snr_db}")
        if not 0.0 <= timing_offset < math.inf:
            raise ValueError(f"timing_offset must be finite and at least 0 (seconds), got {timing_offset}")
        self.kind, self.timing_offset = kind, float(timing_offset)
        s = self._statistics = _TABLE[self.scenario]
        default = s.snr_db if kind == "covariance" else s.channel_snr_db
        self.snr_db = default if snr_db is None else float(snr_db)

        ends = 1 if kind == "covariance" else 2
        end = 2 + 2 * (s.clusters + s.clusters * s.rays + s.diffuse_rays)
        scatter = 2 * s.clusters + s.clusters * s.rays + s.diffuse_rays
        self._path_draws = _GLOBALS + scatter + ends * end + 8 * (s.paths - 1)
        self._freedom = VECTORS - _DISTINCT
        self._bartlett = self._freedom >= self.M
        if kind == "channel":
            self._noise_draws = 2 * self.M * self.N
        elif self._bartlett:
            self._noise_draws = self.M * (2 * _DISTINCT + self.M + 2 * _GAMMA_TRIES)
        else:
            self._noise_draws = 2 * self.M * VECTORS

    def batch(self, indices: Sequence[int] | Tensor, *, epoch: int = 0) -> ChannelBatch:
        """Samples `indices` (n integers from 0 to 2^63 - 1, repeats allowed) of an epoch, in their order.

        Raises:
            TypeError: an index or the epoch is not an integer.
            ValueError: an index or the epoch is negative or too large, or `indices` is not one-dimensional.
        """
        if isinstance(indices, Tensor):
            if indices.dim() != 1:
                raise ValueError(f"indices must be one-dimensional, got shape {tuple(indices.shape)}")
            indices = indices.tolist()
        wanted = [_integer("an index", i, 0) for i in indices]
        epoch = _integer("epoch", epoch, 0)
        if max([epoch, *wanted]) >= 1 << 63:
            raise ValueError(f"indices and epoch must be below 2^63, got {max([epoch, *wanted])}")
        label = torch.empty(len(wanted), self.M, self.N, dtype=torch.complex64, device="cpu")
        noisy = torch.empty_like(label)
        fill = self._fill_covariance if self.kind == "covariance" else self._fill_channel
        with torch.no_grad():
            for start in range(0, len(wanted), _CHUNK):
                chunk = slice(start, start + _CHUNK)
                path_normals, noise_normals = self._normals(wanted[chunk], epoch)
                fill(_Draws(path_normals), _Draws(noise_normals), noisy[chunk], label[chunk])
        return ChannelBatch(noisy, label, self.scenario)

    def _normals(self, indices: list[int], epoch: int) -> tuple[Tensor, Tensor]:
        n, paths = len(indices), self._path_draws
        first = torch.empty(n, paths, dtype=torch.float32, device="cpu")
        second = torch.empty(n, paths + self._noise_draws, dtype=torch.float32, device="cpu")
        generator = torch.Generator("cpu")
        for k, i in enumerate(indices):
            key = derive_seed(self.seed, self.scenario, epoch, i)
            # torch's Mersenne Twister keeps 32 bits of a seed: two streams hold all 64, no channel recurs
            first[k].normal_(generator=generator.manual_seed(key & 0xFFFFFFFF))
            second[k].normal_(generator=generator.manual_seed(key >> 32))
        return (first + second[:, :paths]) * math.sqrt(0.5), second[:, paths:]

    def _paths(self, draws: _Draws) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Globals `(n, 10)`, delays `(n, P)`, real and imaginary gains `(n, P, 2, 2)` by polarisations."""
        s = self._statistics
        common, cluster = draws.take(_GLOBALS), draws.take(2, s.clusters)
        ray_delay, diffuse_delay = draws.take(s.clusters, s.rays), draws.take(s.diffuse_rays)
        scattered = draws.take(s.paths - 1, 2, 2, 2) * math.sqrt(0.5)

        arrival = _exponential(cluster[:, 0])
        share = torch.exp(-s.decay * arrival) * _power(cluster[:, 1] * s.shadow_db)
        share = share / share.sum(-1, keepdim=True)
        delay = arrival[..., None] * s.delay_spread + _exponential(ray_delay) * s.ray_delay
        diffuse = _exponential(diffuse_delay) * (2 * s.delay_spread)
        delay = torch.cat([torch.zeros_like(common[:, :1]), delay.flatten(1), diffuse], 1)

        rician = _power(common[:, 0] * s.rician_spread_db + s.rician_db)
        diffuse_share = 1.0 / (1.0 + 10.0 ** (-s.diffuse_db / 10.0))
        rays = (share * ((1.0 - diffuse_share) / s.rays))[..., None].expand(-1, -1, s.rays).flatten(1)
        rest = torch.full_like(diffuse, diffuse_share / s.diffuse_rays)
        spread = torch.sqrt(torch.cat([rays, rest], 1) / (rician + 1.0)[:, None])
        direct = torch.sqrt(rician / (rician + 1.0))

        leak = 10.0 ** (-s.cross_polar_db / 20.0)
        mixing = spread.new_tensor([[1.0, leak], [leak, 1.0]])
        turn = _symmetric(common[:, 1]) * math.pi
        c, d = torch.cos(turn) * direct, torch.sin(turn) * direct
        sight = torch.stack([c, -d, d, c], -1).reshape(-1, 1, 2, 2)
        weight = spread[:, :, None, None] * mixing
        imbalance = _amplitude(common[:, 2] * s.imbalance_spread_db + s.imbalance_db)
        # two polarisations share a path's power: twice of it gives entries of about unit power
        gain = _amplitude(common[:, 3].clamp(-3.0, 3.0) * _FADING_DB) * math.sqrt(2.0)
        user = torch.stack([gain, gain * imbalance], -1)[:, None, None]
        real = torch.cat([sight, scattered[..., 0] * weight], 1) * user
        imag = torch.cat([torch.zeros_like(sight), scattered[..., 1] * weight], 1) * user
        return common, delay, real, imag

    def _respond(
        self, angles: tuple[Tensor, Tensor], gains: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]
    ) -> Tensor:
        """`sum_p a(p) x(p) right(p)`, `(n, M, u R)`: angles (n, P), gains (n, P, b, u), right (n, P, R)."""
        polarisations, rows, columns = panel_shape(self.M)
        a, b = _steering(*angles, rows, columns)
        c, d = (g[:, :, :polarisations, :, None] for g in gains)
        e, f = (r[:, :, None, None] for r in right)
        mixed = torch.complex(c * e - d * f, c * f + d * e)
        n, P, _, users, R = mixed.shape
        out = torch.bmm(torch.complex(a, b), mixed.reshape(n, P, -1))
        out = out.reshape(n, rows * columns, polarisations, users * R)
        return out.transpose(1, 2).reshape(n, self.M, users * R)

    def _noise_power(self, entries: Tensor, snr: Tensor) -> Tensor:
        real, imag = entries.real, entries.imag
        magnitude = torch.sqrt(real * real + imag * imag).sum(-1).sum(-1) / entries[0].numel()
        snr = _symmetric(snr) * _SNR_RANGE_DB + self.snr_db
        return magnitude * magnitude * _power(-snr)

    def _fill_covariance(self, paths: _Draws, noise: _Draws, noisy: Tensor, label: Tensor) -> None:
        common, delay, real, imag = self._paths(paths)
        f = torch.arange(_SUBCARRIERS, dtype=torch.float32, device="cpu")
        f = (f - (_SUBCARRIERS - 1) / 2) * (-2.0 * math.pi * _BANDWIDTH / _SUBCARRIERS)
        phase = delay[..., None] * f
        angles = _angles(paths, self._statistics, 1.0)
        vectors = self._respond(angles, (real, imag), (torch.cos(phase), torch.sin(phase)))
        variance = self._noise_power(vectors, common[:, 4])
        # the factors carry sqrt(1/2), so that G + G^H is the mean Gram matrix and Hermitian to the last bit
        clean = vectors * math.sqrt(0.5 / _DISTINCT)
        gram = torch.bmm(clean, clean.mH)
        torch.add(gram, gram.mH, out=label)

        # The 768 clean vectors are L Q, Q with D = 48 orthonormal rows; noise is N Q + N', N (M x D) and N'
        # independent, N' Q^H = 0. So the Gram matrix is (L + N)(L + N)^H plus a Wishart matrix of 768 - D
        # degrees of freedom, by Bartlett T T^H: T lower triangular, |T_ii|^2 ~ Gamma(768 - D - i).
        n, M, D = len(common), self.M, _DISTINCT
        scale = torch.sqrt(variance * (0.25 / VECTORS))[:, None, None]
        width = min(M, self._freedom)
        factor = torch.empty(n, M, D + width, 2, dtype=torch.float32, device="cpu")
        near = noise.take(M, D, 2) * scale[..., None]
        torch.add(torch.view_as_real(clean), near, out=factor[:, :, :D])
        if not self._bartlett:
            factor[:, :, D:] = noise.take(M, width, 2) * scale[..., None]
        else:
            square = noise.take(M, M) * scale
            factor[:, :, D:, 0] = square.tril(-1)
            factor[:, :, D:, 1] = square.triu(1).mT
            gamma = self._gamma(noise.take(2, _GAMMA_TRIES, M))
            diagonal = factor[:, :, D:, 0].diagonal(dim1=1, dim2=2)
            diagonal.copy_(torch.sqrt(gamma) * (scale[:, 0] * math.sqrt(2.0)))
        joined = torch.view_as_complex(factor)
        gram = torch.bmm(joined, joined.mH)
        torch.add(gram, gram.mH, out=noisy)

    def _gamma(self, normals: Tensor) -> Tensor:
        """Gamma(768 - 48 - i, 1), i < M, `(n, M)`: Marsaglia and Tsang (2000), first accepted of 4 proposals.

        At most 5% of the proposals fail, at shape 1, and far fewer at the shapes in use.
        """
        x, accept = normals.unbind(1)
        shape = self._freedom - torch.arange(self.M, dtype=torch.float32, device="cpu")
        d = shape - 1.0 / 3.0
        root = x / torch.sqrt(d * 9.0) + 1.0
        v = (root * root * root).clamp_min(1e-30)
        good = torch.special.log_ndtr(accept) < x * x * 0.5 + d * (1.0 - v + torch.log(v))
        found = v[:, -1]
        for k in reversed(range(_GAMMA_TRIES - 1)):
            found = torch.where(good[:, k], v[:, k], found)
        return found * d

    def _fill_channel(self, paths: _Draws, noise: _Draws, noisy: Tensor, label: Tensor) -> None:
        s = self._statistics
        common, delay, real, imag = self._paths(paths)
        receive, transmit = _angles(paths, s, 1.0), _angles(paths, s, 2.0)
        polarisations, rows, columns = panel_shape(self.N)
        tone = _symmetric(common[:, 5]) * (-math.pi * _BANDWIDTH)
        turn = (delay * tone[:, None])[..., None]
        c, d = torch.cos(turn), torch.sin(turn)
        a, b = (x.mT for x in _steering(*transmit, rows, columns))
        right = (c * a + d * b, d * a - c * b)
        gains = (real[..., :polarisations], imag[..., :polarisations])
        label.copy_(self._respond(receive, gains, right))

        scale = torch.sqrt(self._noise_power(label, common[:, 4]) * 0.5)[:, None, None, None]
        late = tone * (_symmetric(common[:, 6]) * self.timing_offset)
        c, d = torch.cos(late)[:, None, None], torch.sin(late)[:, None, None]
        x, y = label.real, label.imag
        turned = torch.stack([x * c - y * d, x * d + y * c], -1)
        noisy.copy_(torch.view_as_complex(turned + noise.take(self.M, self.N, 2) * scale))
