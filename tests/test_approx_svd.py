"""SVD without decomposition or training: accuracy on channels, robustness, the floor, choices a sample."""

import re
from itertools import pairwise

import pytest
import torch

from lomacs_fast import approx_svd, functional
from lomacs_fast.approximation import _floor
from lomacs_fast.data.generator import ChannelGenerator
from lomacs_fast.metrics import ae_terms, truncated_svd


def normal(*shape, seed=0, dtype=torch.complex64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def generated(M, N, kind, n=2):
    batches = [ChannelGenerator(M, N, scenario=s, kind=kind, seed=3).batch(range(n)) for s in (1, 2, 3, 4)]
    return torch.cat([b.input for b in batches]), torch.cat([b.label for b in batches])


@pytest.fixture(scope="module")
def covariances():
    return generated(64, 64, "covariance")


def held(U, S, V, M, N, rank, bound=1e-5):
    assert U.shape[-2:] == (M, rank)
    assert V.shape[-2:] == (N, rank)
    assert S.isfinite().all()
    assert (S >= 0).all()
    assert (S.diff(dim=-1) <= 0).all()
    for X in (U, V):
        gram = X.mH @ X - torch.eye(rank)
        assert torch.linalg.matrix_norm(gram).max() < bound


@pytest.mark.parametrize(("M", "steps"), [(64, 1), (64, 10), (128, 10)])
def test_better_than_the_svd_of_the_noisy_covariance(M, steps, covariances):
    H, L = covariances if M == 64 else generated(M, M, "covariance", 1)
    found = approx_svd(H, M // 2, steps)
    held(*found, M, M, M // 2)
    ours, svd = ae_terms(*found, L), ae_terms(*truncated_svd(H, M // 2), L)
    assert steps == 1 or (ours.ae < svd.ae).all()
    assert ours.ae.mean() < 0.9 * svd.ae.mean()


@pytest.mark.parametrize(("M", "N", "rank"), [(64, 64, 32), (128, 128, 64), (64, 32, 16)])
def test_close_to_the_svd_of_a_clean_channel(M, N, rank):
    H = generated(M, N, "channel", 1)[1]
    found = approx_svd(H, rank, 15)
    held(*found, M, N, rank)
    ours, svd = ae_terms(*found, H), ae_terms(*truncated_svd(H, rank), H)
    assert (ours.rec < svd.rec + 0.01).all()
    for x, y in zip(found, approx_svd(H, rank, 15, denoise=False), strict=True):
        assert torch.equal(x, y)


def test_more_steps_more_accurate():
    H = generated(64, 32, "channel", 1)[1]
    errors = [ae_terms(*approx_svd(H, 16, steps), H).ae.mean() for steps in (0, 1, 2, 4, 8)]
    assert all(a > b for a, b in pairwise(errors))


def test_3gpp_covariance_and_channel():
    phy = pytest.importorskip("sionna.phy")
    from sionna.phy.channel import GenerateOFDMChannel, gen_single_sector_topology, tr38901
    from sionna.phy.ofdm import ResourceGrid

    phy.config.seed = 1
    array = {"polarization": "dual", "polarization_type": "cross", "carrier_frequency": 3.5e9}
    base, user = (
        tr38901.PanelArray(num_rows_per_panel=4, num_cols_per_panel=8, antenna_pattern=pattern, **array)
        for pattern in ("38.901", "omni")
    )
    model = tr38901.UMa(
        carrier_frequency=3.5e9, o2i_model="low", ut_array=user, bs_array=base, direction="uplink"
    )
    model.set_topology(*gen_single_sector_topology(3, 1, "uma", min_ut_velocity=0, max_ut_velocity=20))
    grid = ResourceGrid(num_ofdm_symbols=1, fft_size=24, subcarrier_spacing=20e6 / 24, num_tx=1)
    h = GenerateOFDMChannel(model, grid, normalize_channel=True)(3)[:, 0, :, 0, :, 0].to(torch.complex64)

    channel = h[..., 0].contiguous()
    found = approx_svd(channel, 32, 15)
    held(*found, 64, 64, 32)
    svd = ae_terms(*truncated_svd(channel, 32), channel)
    assert (ae_terms(*found, channel).rec < svd.rec + 0.01).all()

    vectors = h[:, :, :2].flatten(2)
    label = vectors @ vectors.mH / vectors.shape[-1]
    noise = vectors.abs().mean((1, 2))[:, None, None] * 10 ** (-6 / 20) * normal(3, 64, 768)
    received = vectors.repeat(1, 1, 768 // vectors.shape[-1]) + noise
    noisy = received @ received.mH / 768
    ours, svd = ae_terms(*approx_svd(noisy, 32, 10), label), ae_terms(*truncated_svd(noisy, 32), label)
    assert (ours.ae <= svd.ae).all()


def test_the_floor_leaves_a_noisy_covariance(covariances):
    H, _ = covariances
    U, S, V = approx_svd(H, 32, 8, active=32)
    U1, S1, V1 = approx_svd(H, 32, 8, active=32, denoise=False)
    assert torch.equal(U, U1)
    assert torch.equal(V, V1)
    floor = (H.diagonal(dim1=-2, dim2=-1).real.sum(-1) - S1.sum(-1)) / 32
    torch.testing.assert_close(S, (S1 - floor[:, None]).clamp_min(0), rtol=1e-4, atol=1e-5)
    assert (S < S1).all()
    refined = functional.refine_svd(H, U1, V1, 2, hermitian=True)[1]
    torch.testing.assert_close(refined, S1, rtol=0.02, atol=0.01 * float(S1.max()))
    assert (refined[:, -1] > S[:, -1] + 0.5 * floor).all()


def correlation(rho, M=64):
    i = torch.arange(M)
    return (rho ** (i - i[:, None]).abs()).to(torch.complex64)


def left_alone(covariances):
    noisy, clean = covariances
    wishart = normal(2, 64, 64) @ normal(2, 64, 64).mH
    yield "clean", clean, 32, None
    yield "smooth spectrum", torch.stack([correlation(rho) for rho in (0.5, 0.9, 0.97)]), 32, 32
    yield "diagonal", torch.diag_embed(torch.rand(2, 64)).to(torch.complex64), 32, 32
    yield "multiple of I", 3 * torch.eye(64, dtype=torch.complex64)[None], 32, 16
    yield "all columns", noisy[:2], 64, 64
    yield "few vectors", wishart, 32, 16
    yield (
        "indefinite",
        noisy[:2] - 0.05 * torch.linalg.matrix_norm(noisy[:2])[:, None, None] * torch.eye(64),
        32,
        32,
    )
    yield "channel", normal(2, 64, 32), 16, 8
    yield "zero", torch.zeros(1, 64, 64, dtype=torch.complex64), 32, 16


def test_what_is_no_noisy_covariance_is_left_as_it_is(covariances):
    for name, H, rank, active in left_alone(covariances):
        with_test, without = (approx_svd(H, rank, 4, active=active, denoise=d) for d in ("auto", False))
        assert torch.equal(with_test[1], without[1]), name


def test_each_condition_of_the_floor(covariances):
    """The strongest eigenvectors of covariances that break one condition, and one that breaks none."""
    H, _ = covariances
    H = H / torch.linalg.matrix_norm(H)[:, None, None]

    def floor(X, k=32):
        values, vectors = torch.linalg.eigh(X)
        return _floor(X, vectors[..., values.abs().sort(descending=True).indices[0]][..., :k])

    one = H[:1]
    assert floor(one) > 0
    assert floor(one, 33) == 0  # too few dimensions left
    assert floor(-one) == 0
    assert floor(one - 2 * floor(one) * torch.eye(64)) == 0  # a negative floor
    basis = torch.linalg.qr(normal(64, 64))[0]
    spread = torch.cat([torch.tensor([1.0] + [0.1] * 31), torch.linspace(0.05, 1e-4, 32) ** 2])
    assert floor((basis * (spread / spread.norm())) @ basis.mH[None]) == 0  # not flat
    assert floor(correlation(0.5)[None] / torch.linalg.matrix_norm(correlation(0.5))) == 0  # not isotropic
    assert floor(torch.eye(64, dtype=torch.complex64)[None] / 8) == 0  # nothing stands out


def mixed():
    A = normal(12, 12, seed=5)
    yield A
    yield A @ A.mH
    yield A + A.mH
    yield normal(12, 1) @ normal(1, 12, seed=1)
    yield torch.zeros(12, 12, dtype=torch.complex64)
    yield 2 * torch.eye(12, dtype=torch.complex64)
    yield torch.eye(12, dtype=torch.complex64).flip(-1)
    yield torch.ones(12, 12, dtype=torch.complex64)
    yield torch.diag_embed(torch.linspace(1, -1, 12)).to(torch.complex64)
    yield A - A.mH


def test_a_sample_does_not_depend_on_its_batch(covariances):
    for H, rank in (
        (torch.stack(list(mixed())), 6),
        (torch.cat([covariances[0][::4], normal(2, 64, 64)]), 32),
    ):
        together = approx_svd(H.reshape(2, -1, *H.shape[1:]), rank, 4)
        U, S, V = (x.flatten(0, 1) for x in together)
        for b in range(len(H)):
            U1, S1, V1 = approx_svd(H[b], rank, 4)
            torch.testing.assert_close(S1, S[b], rtol=2e-3, atol=2e-3 * float(S[b, 0]))
            torch.testing.assert_close(
                (U1 * S1) @ V1.mH, (U[b] * S[b]) @ V[b].mH, rtol=0, atol=1e-2 * float(S[b, 0])
            )


def test_eigenvalues_of_both_signs_settle():
    values = torch.tensor([1, -0.6, 0.36, -0.2, 0.1, 0.05, -0.01])
    basis = torch.linalg.qr(normal(32, 12, 7))[0]
    start = normal(32, 12, 6, seed=1), normal(32, 12, 6, seed=2)
    S = approx_svd(basis * values @ basis.mH, 6, 30, active=3, init=start)[1]
    torch.testing.assert_close(S[:, :3], values[:3].abs().expand(32, 3), rtol=1e-2, atol=0)


@pytest.mark.parametrize("rank", [12, 5])
def test_hostile_matrices(rank):
    H = torch.stack(list(mixed()))
    for scale in (1, 1e-20, 1e20):
        found = approx_svd(H * scale, rank, 12)
        held(*found, 12, 12, rank)
        U, S, V = found
        ours = ae_terms(U, S / scale, V, H)
        svd = ae_terms(*truncated_svd(H, rank), H)
        assert (ours.rec <= 1 + 1e-5).all()
        assert (ours.rec - svd.rec < (1e-3 if rank == 12 else 0.1)).all(), ours.rec - svd.rec


def test_ten_thousand_matrices():
    """Any conditioning, rank, repetition and norm: finite, orthonormal, never worse than nothing."""
    n, M, N = 10_000, 10, 8
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(normal(500, k, N, seed=k))[0].repeat(20, 1, 1) for k in (M, N))
    decay = torch.rand(n, 1, generator=draw) * 12 * torch.arange(N) / N
    s = 10**-decay
    s = torch.where(torch.arange(N) < torch.randint(1, N + 1, (n, 1), generator=draw), s, 0)
    repeated = torch.rand(n, 1, generator=draw) < 0.3
    s = torch.where(repeated, s[:, torch.arange(N) // 3 * 3], s)
    scale = 10 ** (torch.rand(n, 1, 1, generator=draw) * 40 - 20)
    H = (left * s[:, None]) @ right.mH
    U, S, V = approx_svd(H * scale, 4, 3)
    held(U, S, V, M, N, 4)
    error = ae_terms(U, S / scale[..., 0], V, H).rec
    assert (error <= 1 + 1e-5).all()
    assert error.mean() < 0.2


def test_start_by_the_user():
    H = generated(64, 32, "channel", 1)[1]
    U, S, V = truncated_svd(H, 24)
    exact = ae_terms(U, S, V, H).rec
    start = (U + 0.02 * normal(*U.shape), V + 0.02 * normal(*V.shape))
    near, cold = approx_svd(H, 24, 2, init=start), approx_svd(H, 24, 2)
    held(*near, 64, 32, 24)
    assert (ae_terms(*near, H).rec - exact).mean() < 0.5 * (ae_terms(*cold, H).rec - exact).mean()
    for broken in (U * 0, U[..., :1].expand_as(U)):
        held(*approx_svd(H, 24, 4, init=(broken, V)), 64, 32, 24)


@pytest.mark.parametrize("M", [1, 2, 7, 63])
def test_odd_sizes(M):
    for N in {M, max(1, M - 3)}:
        H = normal(2, M, N, dtype=torch.complex128)
        for rank in {1, (N + 1) // 2, N}:
            U, S, V = approx_svd(H, rank, 3)
            held(U, S, V, M, N, rank, 1e-12)
            assert S.dtype == torch.float64


def test_batches_and_views():
    H = normal(2, 3, 9, 9, dtype=torch.complex128)
    kept = H.clone()
    want = approx_svd(H.mH.contiguous(), 4, 3)
    for x, y in zip(approx_svd(H.mH, 4, 3), want, strict=True):
        torch.testing.assert_close(x, y)
    torch.testing.assert_close(approx_svd(H.conj(), 4, 3)[1], approx_svd(H.conj().resolve_conj(), 4, 3)[1])
    assert torch.equal(H, kept)
    assert [x.shape for x in approx_svd(H[:0], 4, 3)] == [(0, 3, 9, 4), (0, 3, 4), (0, 3, 9, 4)]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"H": torch.zeros(2, 6, 5)}, TypeError, "H must be complex64 or complex128, got float32"),
        ({"H": torch.full((2, 6, 5), torch.nan + 0j)}, ValueError, "H must be finite, sample 0 holds NaN"),
        ({"rank": 6}, ValueError, "rank must be at most min(M, N) = 5, got 6"),
        ({"rank": 0}, ValueError, "rank must be at least 1, got 0"),
        ({"steps": 2.0}, TypeError, "steps must be an integer, got float 2.0"),
        ({"active": 4}, ValueError, "active must be at most rank = 3, got 4"),
        ({"hermitian": 1}, TypeError, "hermitian must be True, False or None, got 1"),
        ({"hermitian": True}, ValueError, "H must be Hermitian where hermitian is True, sample 0 is not"),
        ({"denoise": True}, ValueError, 'denoise must be "auto" or False, got True'),
        ({"init": "random"}, ValueError, "init must be \"dft\" or a pair U, V, got 'random'"),
        ({"init": 3}, TypeError, 'init must be "dft" or a pair U, V, got int'),
        ({"init": (normal(2, 6, 3), normal(2, 5, 2))}, ValueError, "V of init must have shape (2, 5, 3)"),
        ({"init": (normal(2, 6, 3) * torch.inf, normal(2, 5, 3))}, ValueError, "U of init must be finite"),
    ],
)
def test_bad_arguments(change, error, words):
    arguments = {"H": normal(2, 6, 5), "rank": 3} | change
    with pytest.raises(error, match=re.escape(words)):
        approx_svd(**arguments)


def test_infinity_in_one_sample_is_named():
    H = normal(2, 2, 6, 5)
    H[1, 0, 3, 3] = complex(0, torch.inf)
    with pytest.raises(ValueError, match="H must be finite, sample 2 holds NaN or Inf"):
        approx_svd(H, 3)
