"""Statistics of channel matrices against brute force in float64."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lomacs_fast.data import statistics as S


@pytest.fixture(autouse=True)
def one_thread():
    """Threads gain little at these sizes and wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random(*shape, dtype=torch.complex128, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def correlation(A, pairs):
    """Mean over pairs of columns of A, a list of loops."""
    values = []
    for i in range(A.shape[1]):
        for j in range(i + 1, A.shape[1]):
            if pairs == "all" or j == i + 1:
                size = np.linalg.norm(A[:, i]) * np.linalg.norm(A[:, j])
                if size > 0:
                    values.append(abs(np.vdot(A[:, i], A[:, j])) / size)
    return np.mean(values) if values else np.nan


def reference(A, label=None):
    """Every statistic of one matrix, as its definition reads."""
    M, N = A.shape
    power = np.linalg.svd(A, compute_uv=False) ** 2
    p = power / power.sum()
    bins = np.sort((np.abs(np.fft.fft2(A)) ** 2).ravel())[::-1]
    rows, columns = (np.abs(A) ** 2).sum(1), (np.abs(A) ** 2).sum(0)
    total = np.linalg.norm(A)
    if M == N:
        normal = np.linalg.norm(A @ A.conj().T - A.conj().T @ A) / total**2
        turned = [np.exp(1j * phi) * A for phi in np.linspace(0, np.pi, 20001)]
        hermitian = min(np.linalg.norm(B - B.conj().T) / (2 * total) for B in turned)
    else:
        normal = hermitian = np.nan
    out = {
        "cumulative_energy": np.cumsum(p),
        "effective_rank_99": next(k for k in range(1, len(p) + 1) if p[:k].sum() >= 0.99),
        "effective_rank_entropy": np.exp(-sum(x * np.log(x) for x in p if x > 0)),
        "condition_number": np.sqrt(power[0] / power[-1]),
        "fft_energy_top1": bins[: max(1, round(0.01 * M * N))].sum() / bins.sum(),
        "fft_energy_top5": bins[: max(1, round(0.05 * M * N))].sum() / bins.sum(),
        "column_correlation_adjacent": correlation(A, "adjacent"),
        "column_correlation_all": correlation(A, "all"),
        "row_correlation_adjacent": correlation(A.T, "adjacent"),
        "row_correlation_all": correlation(A.T, "all"),
        "row_power_variation": rows.std() / rows.mean(),
        "column_power_variation": columns.std() / columns.mean(),
        "normality": normal,
        "hermitian_distance": hermitian,
        "norm": total,
    }
    if label is not None:
        inner = np.vdot(label, A)
        out |= {
            "alignment": abs(inner) / total / np.linalg.norm(label),
            "amplitude_bias": total / np.linalg.norm(label) - 1,
            "phase_bias": np.angle(inner),
            "relative_error": np.linalg.norm(A - label) / np.linalg.norm(label),
        }
    return out


def compare(H, stats, label=None, rtol=1e-9, atol=1e-12):
    for n in range(len(H)):
        expected = reference(H[n].numpy(), None if label is None else label[n].numpy())
        assert set(stats) == set(expected)
        for name, value in expected.items():
            # the grid of phases is pi / 20000 wide, and only a minimum's neighbourhood is sampled
            slack = 2e-4 if name == "hermitian_distance" else atol
            np.testing.assert_allclose(stats[name][n], value, rtol=rtol, atol=slack, err_msg=name)


@pytest.mark.parametrize(("M", "N"), [(5, 5), (8, 3), (3, 8), (12, 12), (1, 4), (11, 1)])
def test_statistics_against_their_definitions(M, N):
    H = random(4, M, N) * torch.tensor([1.0, 1e-3, 7.0, 1e4])[:, None, None]
    label = H * (0.9 - 0.3j) + 0.2 * random(4, M, N, seed=1)
    compare(H, S.channel_statistics(H, label), label)
    compare(H, S.channel_statistics(H))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_other_dtypes(dtype):
    H = random(3, 9, 9, dtype=dtype)
    stats = S.channel_statistics(H)
    compare(H.to(torch.complex128), stats, rtol=2e-3 if dtype != torch.float64 else 1e-9, atol=1e-6)
    assert all(v.dtype == dtype.to_real() for v in stats.values())


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_any_shape(M, N, seed):
    H = random(2, M, N, seed=seed)
    compare(H, S.channel_statistics(H))


def test_views_give_the_numbers_of_their_copies():
    H = random(3, 7, 7)
    for view in (H.mH, H.conj(), H[:1].expand(3, 7, 7), H.mT):
        a, b = S.channel_statistics(view), S.channel_statistics(view.resolve_conj().clone())
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-12, atol=1e-12)


def test_input_and_label_are_told_apart():
    H, label = random(3, 6, 4), random(3, 6, 4, seed=1)
    a, b = S.channel_statistics(H, label), S.channel_statistics(label, input=H)
    for name in ("alignment", "amplitude_bias", "phase_bias", "relative_error"):
        assert torch.equal(a[name], b[name])
    assert torch.equal(b["norm"], torch.linalg.matrix_norm(label))
    with pytest.raises(ValueError, match="got both"):
        S.channel_statistics(H, label, input=H)


def test_top_names_the_shares():
    H = random(2, 10, 10)
    stats = S.channel_statistics(H, top=(2.5, 100))
    assert [k for k in stats if k.startswith("fft")] == ["fft_energy_top2.5", "fft_energy_top100"]
    np.testing.assert_allclose(stats["fft_energy_top100"], 1)
    assert torch.equal(stats["fft_energy_top2.5"], S.fft_energy(H, 2.5))


def test_plane_wave_fills_one_bin():
    phase = 2 * math.pi * 3 / 16 * torch.arange(16, dtype=torch.float64)
    a = torch.polar(torch.ones_like(phase), phase)
    stats = S.channel_statistics(torch.outer(a, a.conj())[None])
    for name in ("fft_energy_top1", "column_correlation_all", "row_correlation_adjacent"):
        assert stats[name].item() == pytest.approx(1)
    assert stats["effective_rank_99"].item() == 1
    assert stats["effective_rank_entropy"].item() == pytest.approx(1)
    assert stats["hermitian_distance"].item() < 1e-12


def test_effective_rank_counts_a_share_that_is_just_reached():
    H = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))
    assert S.effective_rank(H, 0.9) == 1
    assert S.effective_rank(H, 0.9001) == 2
    assert S.effective_rank(torch.eye(10), 0.7) == 7
    assert S.effective_rank(torch.eye(10), 1.0) == 10
    assert S.entropy_rank(torch.eye(10)) == pytest.approx(10)


def test_hermitian_distance():
    A = random(5, 8, 8)
    hermitian = A + A.mH
    phases = torch.polar(torch.ones(5, dtype=torch.float64), torch.linspace(-3, 3, 5, dtype=torch.float64))
    assert (S.hermitian_distance(hermitian * phases[:, None, None]) < 1e-14).all()
    assert (S.hermitian_distance(A - A.mH) < 1e-14).all()
    noise = 1e-9 * random(5, 8, 8, seed=1)
    small = S.hermitian_distance(hermitian + noise)
    assert (small < 1e-9).all()
    assert (small > 1e-11).all()
    # tr(H H) = 0 is as far from Hermitian as a matrix can be
    assert S.hermitian_distance(torch.tensor([[0.0, 1], [0, 0]])) == pytest.approx(math.sqrt(0.5))
    white = random(20, 64, 64)
    assert S.normality(white).mean() == pytest.approx(0.18, abs=0.01)
    assert S.hermitian_distance(white).mean() > 0.65
    assert (S.normality(hermitian) < 1e-14).all()


def test_amplitude_and_phase():
    label = random(4, 6, 5)
    c = torch.polar(torch.tensor([2.0, 0.5, 1.0, 1e-3]), torch.tensor([0.3, -3.0, 0.0, 1.5])).to(label.dtype)
    stats = S.channel_statistics(c[:, None, None] * label, label)
    np.testing.assert_allclose(stats["alignment"], 1, rtol=1e-12)
    np.testing.assert_allclose(stats["amplitude_bias"], c.abs() - 1, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(stats["phase_bias"], c.angle(), atol=1e-12)
    np.testing.assert_allclose(stats["relative_error"], (c - 1).abs(), rtol=1e-9, atol=1e-12)


def test_zero_rows_and_columns():
    H = random(1, 6, 6)
    H[:, :, 2] = 0
    H[:, 4] = 0
    stats = S.channel_statistics(H)
    expected = reference(H[0].numpy())
    for name in ("column_correlation_adjacent", "column_correlation_all", "row_correlation_adjacent"):
        assert stats[name].item() == pytest.approx(expected[name])
    assert stats["condition_number"].item() > 1e14


@pytest.mark.parametrize("shape", [(6, 6), (5, 3)])
def test_zero_matrices_leave_the_summary_finite(shape):
    H = random(3, *shape, dtype=torch.complex64)
    H[1] = 0
    stats = S.channel_statistics(H, H)
    alone = S.channel_statistics(H[[0, 2]], H[[0, 2]])
    summary, without = S.summarize(stats), S.summarize(alone)
    for name in ("effective_rank_99", "effective_rank_entropy", "norm"):
        assert stats[name][1] == 0
    for name in ("fft_energy_top1", "alignment", "phase_bias", "relative_error", "condition_number"):
        assert stats[name][1].isnan()
        assert summary[name]["mean"] == pytest.approx(without[name]["mean"], rel=1e-6, abs=1e-7)
        assert summary[name]["count"] == 2
    assert "NaN" not in json.dumps(summary)
    json.dumps(summary, allow_nan=False)
    if shape == (5, 3):
        assert summary["normality"] == {"mean": None, "median": None, "p5": None, "p95": None, "count": 0}
    nothing = S.summarize(S.channel_statistics(torch.zeros(2, *shape)))
    json.dumps(nothing, allow_nan=False)
    assert nothing["cumulative_energy"]["mean"] == [None] * min(shape)


def test_extreme_scales_change_only_the_norm():
    H = random(2, 6, 6, dtype=torch.complex64)
    a = S.channel_statistics(H, H)
    for scale in (1e-30, 1e30):
        b = S.channel_statistics(H * scale, H * scale)
        for name in set(a) - {"norm", "amplitude_bias", "relative_error"}:
            torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5)


def test_chunks_concatenate_to_the_whole():
    H, label = random(10, 6, 6), random(10, 6, 6, seed=1)
    whole = S.channel_statistics(H, label)
    parts = [S.channel_statistics(H[s], label[s]) for s in (slice(0, 3), slice(3, 3), slice(3, 10))]
    for name, value in whole.items():
        torch.testing.assert_close(torch.cat([p[name] for p in parts]), value, rtol=1e-12, atol=1e-13)


def test_summary_of_numbers_and_curves():
    x = random(101, dtype=torch.float64)
    curve = random(101, 4, dtype=torch.float32)
    summary = S.summarize({"x": x, "curve": curve})
    for key, expected in (("mean", np.mean), ("median", np.median)):
        assert summary["x"][key] == pytest.approx(expected(x.numpy()))
        np.testing.assert_allclose(summary["curve"][key], expected(curve.double().numpy(), 0))
    for key, q in (("p5", 5), ("p95", 95)):
        assert summary["x"][key] == pytest.approx(np.percentile(x.numpy(), q))
        np.testing.assert_allclose(summary["curve"][key], np.percentile(curve.double().numpy(), q, 0))
    broken = torch.tensor([1.0, math.nan, 3.0, math.inf, -math.inf])
    assert S.summarize({"b": broken})["b"] == {"mean": 2.0, "median": 2.0, "p5": 1.1, "p95": 2.9, "count": 2}
    large = torch.full((4,), 1.7e308, dtype=torch.float64)
    assert S.summarize({"l": large})["l"]["mean"] == pytest.approx(1.7e308)
    assert S.summarize({"e": torch.empty(0)})["e"]["mean"] is None


def test_dictionary_energy():
    pk, pv = random(3, 10, 7, dtype=torch.float32), random(3, 10, 7, dtype=torch.float32, seed=1)
    for alpha in (0.0, 1.0, 2.5):
        shares = S.dictionary_energy(pk, pv, alpha)
        for g in range(3):
            score = [(pk[g, :, c].double() ** 2 + alpha * pv[g, :, c].double() ** 2).sum() for c in range(7)]
            np.testing.assert_allclose(shares[g], torch.stack(score) / sum(score), rtol=1e-5)
        torch.testing.assert_close(S.dictionary_energy(pk[1], pv[1], alpha), shares[1])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: S.channel_statistics([[1.0]]), TypeError, "H must be a tensor, got list"),
        (lambda: S.channel_statistics(torch.ones(2, 2, 2, dtype=torch.int)), TypeError, "got torch.int32"),
        (lambda: S.channel_statistics(torch.ones(2, 2)), ValueError, r"shape \(n, M, N\), got \(2, 2\)"),
        (lambda: S.normality(torch.ones(2, 0, 2)), ValueError, r"shape \(..., M, N\), got \(2, 0, 2\)"),
        (
            lambda: S.alignment(torch.ones(2, 2), torch.ones(2, 3)),
            ValueError,
            r"label must have the shape of H",
        ),
        (lambda: S.effective_rank(torch.eye(2), 0.0), ValueError, r"share must lie in \(0, 1\], got 0.0"),
        (lambda: S.fft_energy(torch.eye(2), 101), ValueError, r"percent must lie in \(0, 100\], got 101"),
        (
            lambda: S.channel_statistics(torch.ones(1, 2, 2), top=(0,)),
            ValueError,
            "top must hold percentages",
        ),
        (lambda: S.column_correlation(torch.eye(2), "some"), ValueError, 'pairs must be "adjacent" or "all"'),
        (
            lambda: S.dictionary_energy(torch.ones(2, 3), torch.ones(2, 4)),
            ValueError,
            r"got \(2, 3\) and \(2, 4\)",
        ),
        (
            lambda: S.dictionary_energy(torch.ones(2, 3).cfloat(), torch.ones(2, 3)),
            TypeError,
            "pk must be a real",
        ),
        (
            lambda: S.dictionary_energy(torch.ones(2, 3), torch.ones(2, 3), -1),
            ValueError,
            "alpha must be finite",
        ),
        (lambda: S.summarize({"x": torch.ones(2).cfloat()}), TypeError, "must be a real tensor"),
        (lambda: S.summarize({"x": torch.ones(2, 2, 2)}), ValueError, r"\(n,\) or \(n, k\), got \(2, 2, 2\)"),
    ],
)
def test_refusals(call, error, words):
    with pytest.raises(error, match=words):
        call()
