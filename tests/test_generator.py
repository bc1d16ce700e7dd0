"""The generator: determinism, the targets of its statistics at 128x128, and its noise against brute force."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import gamma, ks_2samp, kstest

from lomacs_fast.data import generator as module
from lomacs_fast.data.generator import SCENARIOS, ChannelGenerator
from lomacs_fast.data.statistics import fft_energy

CUMULATIVE = {1: (0.65, 0.92, 0.96), 2: (0.50, 0.76, 0.85), 3: (0.66, 0.92, 0.96), 4: (0.54, 0.78, 0.88)}
INPUT_ERROR = {1: 0.07, 2: 0.09, 3: 0.07, 4: 0.12}
TRUNCATED_AE = {1: 0.063, 2: 0.080, 3: 0.061, 4: 0.107}


@pytest.fixture(autouse=True)
def one_thread():
    """Threads gain little at these sizes and wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def frobenius(X):
    return torch.linalg.matrix_norm(X)


def same(a, b):
    return torch.equal(torch.view_as_real(a), torch.view_as_real(b))


def neighbours(H, across):
    """Mean correlation of columns of H that are neighbours on one polarisation of a 2 x 8 x 8 array."""
    X = (H / torch.linalg.vector_norm(H, dim=1, keepdim=True)).unflatten(2, (2, 8, 8))
    a, b = (X[..., :-1], X[..., 1:]) if across else (X[:, :, :, :-1], X[:, :, :, 1:])
    return (a.conj() * b).sum(1).abs().mean().item()


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_targets_at_128(scenario):
    parts = [ChannelGenerator(128, 128, scenario=scenario, seed=s).batch(range(128)) for s in (0, 1)]
    H = torch.cat([p.label for p in parts])
    Y = torch.cat([p.input for p in parts])
    assert same(H, H.mH.resolve_conj())
    assert same(Y, Y.mH.resolve_conj())
    energy = torch.linalg.eigvalsh(H).square().flip(-1)
    share = torch.cumsum(energy, -1) / energy.sum(-1, keepdim=True)
    np.testing.assert_allclose(share[:, :3].mean(0), CUMULATIVE[scenario], atol=0.03)
    assert 15 <= (share < 0.999).sum(-1).add(1).double().mean() <= 30
    assert neighbours(H, across=True) >= 0.95
    assert neighbours(H, across=False) >= 0.95
    assert 0.7 <= fft_energy(H, 1).mean() <= 0.9
    assert 0.92 <= fft_energy(H, 5).mean() <= 0.98

    error = (frobenius(Y - H) / frobenius(H)).mean().item()
    assert error == pytest.approx(INPUT_ERROR[scenario], rel=0.2)
    U, S, Vh = (x.narrow(d, 0, 64) for x, d in zip(torch.linalg.svd(Y), (2, 1, 1), strict=True))
    eye = torch.eye(64)
    ae = frobenius(H - (U * S[:, None]) @ Vh) / frobenius(H) + frobenius(U.mH @ U - eye)
    ae = (ae + frobenius(Vh @ Vh.mH - eye)).mean().item()
    assert ae == pytest.approx(TRUNCATED_AE[scenario], rel=0.15)
    # the noise's mean power is a ridge on the diagonal and a good part of the error
    ridge = (Y - H).diagonal(dim1=1, dim2=2).real.mean(-1)
    assert (ridge > 0).all()
    rest = frobenius(Y - H - ridge[:, None, None] * torch.eye(128)) / frobenius(H)
    assert rest.mean() < 0.9 * error


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_64_is_at_least_as_concentrated(scenario):
    H = ChannelGenerator(64, 64, scenario=scenario).batch(range(128)).label
    energy = torch.linalg.eigvalsh(H).square().flip(-1)
    share = (torch.cumsum(energy, -1) / energy.sum(-1, keepdim=True))[:, :3].mean(0)
    assert (share > torch.tensor(CUMULATIVE[scenario]) - 0.03).all()


SIZES = [
    ("covariance", 64, 64),
    ("covariance", 63, 63),
    ("covariance", 2, 2),
    ("channel", 63, 11),
    ("channel", 8, 3),
]


@pytest.mark.parametrize(("kind", "M", "N"), SIZES)
def test_a_sample_has_the_same_bits_in_any_batch(kind, M, N):
    g = ChannelGenerator(M, N, scenario=4, seed=-7, kind=kind)
    whole = g.batch(range(70), epoch=3)
    assert whole.input.shape == whole.label.shape == (70, M, N)
    assert whole.input.dtype == whole.label.dtype == torch.complex64
    assert whole.scenario == 4
    assert torch.isfinite(torch.view_as_real(whole.input)).all()
    torch.set_num_threads(2)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1))
    shuffled = g.batch(order, epoch=3)
    assert same(shuffled.input, whole.input[order])
    assert same(shuffled.label, whole.label[order])
    for i in (0, 31, 32, 69):
        single = ChannelGenerator(M, N, scenario=4, seed=-7, kind=kind).batch([i], epoch=3)
        assert same(single.input[0], whole.input[i])
        assert same(single.label[0], whole.label[i])
    twice = g.batch([5, 5], epoch=3)
    assert same(twice.input[0], twice.input[1])
    assert g.batch([]).input.shape == (0, M, N)


def test_same_bits_under_other_defaults():
    g = ChannelGenerator(8, 8, scenario=1)
    before = g.batch([3, 2**40])
    state = torch.get_rng_state()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            after = g.batch([3, 2**40])
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(before.input, after.input)
    assert same(before.label, after.label)
    assert torch.equal(state, torch.get_rng_state())


def test_same_bits_in_another_process():
    code = (
        "import torch; torch.set_num_threads(1);"
        "from lomacs_fast.data.generator import ChannelGenerator as G;"
        "x = G(64, 64, scenario=2, seed=5).batch([9, 4]).input;"
        "import hashlib; print(hashlib.sha256(x.numpy().tobytes()).hexdigest())"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True) for _ in range(2)]
    assert runs[0].stdout == runs[1].stdout != ""


def test_every_part_of_the_key_counts():
    def label(seed=0, scenario=2, epoch=0, index=0):
        return ChannelGenerator(8, 8, scenario=scenario, seed=seed).batch([index], epoch=epoch).label

    samples = [
        label(),
        label(seed=1),
        label(scenario=4),
        label(epoch=1),
        label(index=1),
        label(seed=2**64 - 1),
    ]
    for i, a in enumerate(samples):
        for b in samples[:i]:
            assert frobenius(a / frobenius(a) - b / frobenius(b)) > 1e-2


def test_labels_use_all_64_bits_of_the_seed(monkeypatch):
    monkeypatch.setattr(module, "derive_seed", lambda *keys: 12345 + (keys[-1] << 32))
    a = ChannelGenerator(8, 8, scenario=1).batch([0, 1]).label
    monkeypatch.setattr(module, "derive_seed", lambda *keys: keys[-1] + (12345 << 32))
    b = ChannelGenerator(8, 8, scenario=1).batch([0, 1]).label
    assert not same(a[0], a[1])
    assert not same(b[0], b[1])


def noisy_grams(g, variance, n, seed):
    """n noisy inputs of one clean covariance, drawn by the generator's own code."""
    g._noise_power = lambda vectors, snr: torch.full((len(vectors),), variance)
    normals = torch.randn(1, g._path_draws, generator=torch.Generator().manual_seed(seed)).expand(n, -1)
    noise = torch.randn(n, g._noise_draws, generator=torch.Generator().manual_seed(seed + 1))
    label, noisy = torch.empty(2, n, g.M, g.M, dtype=torch.complex64)
    g._fill_covariance(module._Draws(normals), module._Draws(noise), noisy, label)
    return label[0].to(torch.complex128), noisy.to(torch.complex128)


def test_covariance_noise_against_averaging_768_vectors():
    M, n, variance = 6, 4000, 2.0
    H, fast = noisy_grams(ChannelGenerator(M, M, scenario=2), variance, n, seed=3)
    # the Gram matrix of noisy vectors depends on the clean ones through their Gram matrix alone
    root = torch.linalg.cholesky(768 * H + 1e-9 * torch.eye(M))
    clean = torch.cat([root, torch.zeros(M, 768 - M)], 1)
    random = torch.Generator().manual_seed(11)
    brute = []
    for _ in range(n // 100):
        draw = torch.randn(100, M, 768, dtype=torch.complex128, generator=random)
        X = clean + math.sqrt(variance) * draw
        brute.append(X @ X.mH / 768)
    brute = torch.cat(brute)

    power = H.diagonal().real
    expected = (variance * (power[:, None] + power) + variance**2) / 768
    for Y in (fast, brute):
        standard_error = torch.sqrt(expected / n)
        assert (((Y.mean(0) - H - variance * torch.eye(M)).abs() / standard_error) < 4.5).all()
        np.testing.assert_allclose((Y - Y.mean(0)).abs().square().mean(0), expected, rtol=0.15)
    a, b = (torch.linalg.eigvalsh(Y).numpy() for Y in (fast, brute))
    for k in range(M):
        assert ks_2samp(a[:, k], b[:, k]).pvalue > 1e-4
    for i, j in ((0, 0), (5, 5), (0, 1), (2, 5)):
        x, y = fast[:, i, j], brute[:, i, j]
        assert ks_2samp(x.real.numpy(), y.real.numpy()).pvalue > 1e-4
        if i != j:
            assert ks_2samp(x.imag.numpy(), y.imag.numpy()).pvalue > 1e-4


def test_diagonal_of_the_bartlett_factor_is_gamma():
    g = ChannelGenerator(720, 720, scenario=1)
    normals = torch.randn(4000, 2, 4, 720, generator=torch.Generator().manual_seed(0))
    values = g._gamma(normals).double().numpy()
    for i in (0, 300, 700, 715, 718):
        assert kstest(values[:, i], gamma(720 - i).cdf).pvalue > 1e-4
    assert (values > 0).all()


def test_noise_of_more_antennas_than_degrees_of_freedom():
    M, variance = 724, 0.5
    H, Y = noisy_grams(ChannelGenerator(M, M, scenario=1), variance, 1, seed=5)
    E = Y[0] - H - variance * torch.eye(M)
    assert E.diagonal().real.mean().abs() < 5 * variance * 2 / math.sqrt(768 * M)
    power = H.diagonal().real
    expected = (variance * (power[:, None] + power) + variance**2).sum() / 768
    assert E.abs().square().sum() == pytest.approx(expected.item(), rel=0.05)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_channel_noise_follows_the_mean_magnitude(scenario):
    g = ChannelGenerator(48, 64, scenario=scenario, kind="channel", snr_db=12.0, timing_offset=0.0)
    b = g.batch(range(300))
    noise = (b.input - b.label).abs().square().mean((1, 2))
    snr = 10 * torch.log10(b.label.abs().mean((1, 2)).square() / noise)
    assert snr.mean() == pytest.approx(12.0, abs=0.4)
    assert snr.min() == pytest.approx(9.0, abs=0.3)
    assert snr.max() == pytest.approx(15.0, abs=0.3)
    assert kstest(snr.numpy(), "uniform", args=(9, 6)).pvalue > 1e-3


def test_covariance_noise_power():
    g = ChannelGenerator(64, 64, scenario=1, snr_db=0.0)
    vectors = torch.randn(5, 64, 48, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    vectors = vectors * torch.logspace(-3, 3, 5)[:, None, None]
    low = g._noise_power(vectors, torch.full((5,), -30.0))
    high = g._noise_power(vectors, torch.full((5,), 30.0))
    middle = g._noise_power(vectors, torch.zeros(5))
    np.testing.assert_allclose(middle, vectors.abs().mean((1, 2)).square(), rtol=1e-4)
    np.testing.assert_allclose(low / middle, np.full(5, 10**0.3), rtol=1e-4)
    np.testing.assert_allclose(high / middle, np.full(5, 10**-0.3), rtol=1e-4)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_channels_have_the_relative_error_of_covariances(scenario):
    b = ChannelGenerator(64, 32, scenario=scenario, kind="channel", timing_offset=0.0).batch(range(200))
    error = (frobenius(b.input - b.label) / frobenius(b.label)).mean().item()
    assert error == pytest.approx(INPUT_ERROR[scenario], rel=0.2)


@pytest.mark.parametrize("kind", ["covariance", "channel"])
def test_infinite_snr_leaves_the_input_clean(kind):
    b = ChannelGenerator(16, 16, scenario=3, kind=kind, snr_db=math.inf, timing_offset=0.0).batch(range(20))
    assert (frobenius(b.input - b.label) / frobenius(b.label)).max() < 1e-6


def test_timing_offset_turns_a_channel_and_cancels_in_a_covariance():
    def make(kind, offset):
        g = ChannelGenerator(10, 10, scenario=2, kind=kind, snr_db=math.inf, timing_offset=offset)
        return g.batch(range(200))

    b = make("channel", 2e-9)
    inner = (b.label.conj() * b.input).sum((1, 2))
    turn = torch.polar(torch.ones(200), inner.angle())
    assert (frobenius(b.input - turn[:, None, None] * b.label) / frobenius(b.label)).max() < 1e-5
    largest = 2 * math.pi * 10e6 * 2e-9
    assert 0.6 * largest < inner.angle().abs().max() <= largest
    assert inner.angle().mean().abs() < 4 * largest / 3 / math.sqrt(200)
    assert same(make("channel", 0.0).label, b.label)
    assert same(make("covariance", 0.0).input, make("covariance", 1e-6).input)


@pytest.mark.parametrize("kind", ["covariance", "channel"])
def test_scale_varies_between_samples(kind):
    H = ChannelGenerator(16, 16, scenario=2, kind=kind).batch(range(400)).label
    power = H.diagonal(dim1=1, dim2=2).real if kind == "covariance" else H.abs().square().mean(1)
    level = 10 * torch.log10(power.mean(1))
    assert 4 < level.std() < 8
    assert abs(level.mean()) < 1.5
    assert 6 < level.max() < 30
    assert -30 < level.min() < -6
    assert (frobenius(H) > 0).all()


def test_labels_are_positive_semidefinite_and_of_the_rank_of_their_vectors():
    H = ChannelGenerator(64, 64, scenario=4).batch(range(50)).label.to(torch.complex128)
    values = torch.linalg.eigvalsh(H)
    assert (values[:, 0] > -1e-6 * values[:, -1]).all()
    assert (values[:, : 64 - 48].abs() < 1e-6 * values[:, -1:]).all()


def test_covariance_is_the_mean_over_subcarriers_and_user_antennas():
    g = ChannelGenerator(12, 12, scenario=2)
    normals = torch.randn(3, g._path_draws, generator=torch.Generator().manual_seed(2))
    draws = module._Draws(normals)
    _, delay, real, imag = g._paths(draws)
    azimuth, zenith = (x.double().numpy() for x in module._angles(draws, g._statistics, 1.0))
    assert draws._at == g._path_draws
    label = g.batch([0, 1, 2]).label
    noisy = torch.empty_like(label)
    g._fill_covariance(module._Draws(normals), module._Draws(torch.zeros(3, g._noise_draws)), noisy, label)
    gains = torch.complex(real, imag).numpy().astype(complex)
    for n in range(3):
        expected = np.zeros((12, 12), complex)
        for k in range(24):
            turn = np.exp(-2j * np.pi * (k - 11.5) * 20e6 / 24 * delay[n].double().numpy())
            for u in range(2):
                h = np.zeros((2, 2, 3), complex)
                for b in range(2):
                    for r in range(2):
                        for c in range(3):
                            w, v = np.cos(zenith[n]), np.sin(zenith[n]) * np.sin(azimuth[n])
                            h[b, r, c] = (
                                np.exp(1j * np.pi * (r * w + c * v)) * gains[n, :, b, u] * turn
                            ).sum()
                expected += np.outer(h.ravel(), h.ravel().conj()) / 48
        np.testing.assert_allclose(label[n], expected, atol=1e-5 * np.abs(expected).max())


def test_channel_is_a_sum_of_planar_waves():
    g = ChannelGenerator(6, 5, scenario=3, kind="channel")
    normals = torch.randn(2, g._path_draws, generator=torch.Generator().manual_seed(4))
    draws = module._Draws(normals)
    common, delay, real, imag = g._paths(draws)
    ends = [module._angles(draws, g._statistics, scale) for scale in (1.0, 2.0)]
    label, noisy = torch.empty(2, 2, 6, 5, dtype=torch.complex64)
    g._fill_channel(module._Draws(normals), module._Draws(torch.zeros(2, g._noise_draws)), noisy, label)
    (ra, rz), (ta, tz) = [[x.double().numpy() for x in end] for end in ends]
    gains = torch.complex(real, imag).numpy().astype(complex)
    tone = 10e6 * (2 * torch.special.ndtr(common[:, 5].double()) - 1).numpy()
    for n in range(2):
        turn = np.exp(-2j * np.pi * tone[n] * delay[n].double().numpy())
        for i in range(6):
            for j in range(5):
                # M = 6: two polarisations of 1 x 3; N = 5: one of 1 x 5
                b, c = divmod(i, 3)
                receive = np.exp(1j * np.pi * c * np.sin(rz[n]) * np.sin(ra[n]))
                transmit = np.exp(1j * np.pi * j * np.sin(tz[n]) * np.sin(ta[n]))
                value = (gains[n, :, b, 0] * receive * transmit.conj() * turn).sum()
                assert abs(label[n, i, j].item() - value) < 1e-5 * label[n].abs().max()


@given(st.integers(2, 40), st.integers(2, 40), st.sampled_from(SCENARIOS), st.integers(0, 2**63 - 1))
@settings(max_examples=25, deadline=None)
def test_any_size(M, N, scenario, index):
    for kind, width in (("covariance", M), ("channel", N)):
        b = ChannelGenerator(M, width, scenario=scenario, kind=kind).batch([index])
        assert b.label.shape == (1, M, width)
        for X in (b.input, b.label):
            assert torch.isfinite(torch.view_as_real(X)).all()
            assert frobenius(X) > 0
        assert frobenius(b.input - b.label) < frobenius(b.label)


@pytest.mark.parametrize(
    ("antennas", "array"),
    [(2, (2, 1, 1)), (63, (1, 7, 9)), (64, (2, 4, 8)), (128, (2, 8, 8)), (14, (2, 1, 7))],
)
def test_arrays(antennas, array):
    assert module.panel_shape(antennas) == array


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"N": 6}, ValueError, "N must equal M = 8 for a covariance, got 6"),
        ({"M": 1, "N": 1}, ValueError, "M must be at least 2, got 1"),
        ({"N": 0}, ValueError, "N must be at least 2, got 0"),
        ({"M": 8.0}, TypeError, "M must be an integer, got 8.0"),
        ({"M": True}, TypeError, "M must be an integer, got True"),
        ({"scenario": 5}, ValueError, r"scenario must be one of \(1, 2, 3, 4\), got 5"),
        ({"seed": "a"}, TypeError, "seed must be an integer, got 'a'"),
        ({"kind": "gram"}, ValueError, r"kind must be .* got 'gram'"),
        ({"snr_db": math.nan}, ValueError, "snr_db must be above -100, got nan"),
        ({"snr_db": "6"}, TypeError, "snr_db must be a number, got '6'"),
        ({"timing_offset": -1e-9}, ValueError, "timing_offset must be finite and at least 0"),
        ({"timing_offset": None}, TypeError, "timing_offset must be a number, got None"),
    ],
)
def test_refusals(arguments, error, words):
    with pytest.raises(error, match=words):
        ChannelGenerator(**{"M": 8, "N": 8, "scenario": 1} | arguments)


def test_refused_indices():
    g = ChannelGenerator(4, 4, scenario=1)
    with pytest.raises(ValueError, match="an index must be at least 0, got -1"):
        g.batch([0, -1])
    with pytest.raises(TypeError, match=r"an index must be an integer, got 0\.5"):
        g.batch([0.5])
    with pytest.raises(TypeError, match="an index must be an integer"):
        g.batch(torch.ones(2))
    with pytest.raises(ValueError, match=r"one-dimensional, got shape \(1, 2\)"):
        g.batch(torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="epoch must be at least 0, got -1"):
        g.batch([0], epoch=-1)
    with pytest.raises(ValueError, match=r"below 2\^63"):
        g.batch([2**63])
