"""The SVD of given matrices by optimisation: vectors, spans, conventions, ranks, edges, and what it refuses."""

import time

import pytest
import torch

from lomacs_fast import neural_svd


def orthonormal(n, r, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, r, dtype=dtype, generator=generator))[0]


def made(M, N, sigma, dtype=torch.complex64, seed=0):
    """A matrix with these singular values, and its vectors, in double precision and in the dtype."""
    wide = torch.complex128 if dtype.is_complex else torch.float64
    U, V = (orthonormal(n, len(sigma), wide, seed + k) for k, n in enumerate((M, N)))
    sigma = torch.as_tensor(sigma, dtype=torch.float64)
    return ((U * sigma) @ V.mH).to(dtype), U, sigma, V


def overlaps(X, exact):
    return (X.to(exact.dtype).conj() * exact[:, : X.shape[-1]]).sum(0).abs()


@pytest.fixture(scope="module")
def ratio():
    return made(256, 192, 0.9 ** torch.arange(192.0, dtype=torch.float64))


@pytest.mark.parametrize("nesting", ["joint", "sequential"])
def test_individual_vectors_of_a_slow_spectrum(ratio, nesting):
    H, U, sigma, V = ratio
    begin = time.perf_counter()
    found = neural_svd(H, rank=16, nesting=nesting, method="optimize")
    assert time.perf_counter() - begin < 60
    assert found.vectors == "individual"
    assert found.converged
    assert overlaps(found.U, U).min() >= 0.999
    assert overlaps(found.V, V).min() >= 0.999
    assert ((found.S - sigma[:16]).abs() <= 1e-3 * sigma[:16]).all()


def test_without_nesting_the_span_alone(ratio):
    H, U, sigma, V = ratio
    found = neural_svd(H, rank=16, nesting="none", method="optimize")
    assert found.vectors == "free"
    for X, exact in ((found.U, U), (found.V, V)):
        cosines = torch.linalg.svdvals(exact[:, :16].mH @ X.to(exact.dtype))
        assert cosines.min() >= 0.999
    best = (sigma[16:].square().sum() / sigma.square().sum()).sqrt()
    assert found.span_error == pytest.approx(float(best), rel=1e-3)
    # the vectors themselves are some rotation of the right ones
    assert overlaps(found.U, U).min() < 0.9


def best(sigma, k):
    sigma = torch.as_tensor(sigma, dtype=torch.float64)
    return float((sigma[k:].square().sum() / sigma.square().sum()).sqrt())


DTYPES = (torch.complex64, torch.complex128, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_whole_svd(dtype):
    H, U, sigma, _ = made(30, 20, torch.linspace(2, 0.1, 20), dtype)
    found = neural_svd(H, method="optimize")
    assert found.S.shape == (20,)
    eps = torch.finfo(dtype).eps
    tol = 1e-3 if eps > 1e-10 else 1e-6
    assert found.rel_error < tol
    assert found.ortho_error < 40 * eps
    assert ((found.S - sigma).abs() < tol * sigma).all()
    assert overlaps(found.U, U).min() > 1 - tol
    torch.testing.assert_close(found.U * found.S @ found.Vh, H, rtol=0, atol=5 * tol)


@pytest.mark.parametrize(
    ("net", "dtype"), [("table", torch.complex64), ("table", torch.float32), ("mlp", torch.complex64)]
)
@pytest.mark.parametrize(
    ("orth", "lam", "close"),
    [("bjorck", 1.0, 1.01), ("penalty", 1.0, 1.02), ("penalty", "balance", 1.05), ("qr", 1.0, 1.06)],
)
def test_everything_that_adam_trains(net, orth, lam, close, dtype):
    H, U, sigma, _ = made(28, 20, 0.7 ** torch.arange(20.0), dtype)
    found = neural_svd(
        H,
        3,
        net=net,
        orth=orth,
        lam=lam,
        lr=0.05 if net == "table" else 0.02,
        method="optimize",
        max_steps=400 if net == "table" else 700,
    )
    assert found.vectors == "individual"
    assert found.rel_error < close * best(sigma, 3)
    assert overlaps(found.U, U).min() > 0.97
    assert found.ortho_error < 1e-4
    assert set(found.history) == {"loss", "main", "orth", "lam"}
    assert len(found.history["loss"]) == found.steps


def test_minibatches_touch_blocks_alone():
    H, _, sigma, _ = made(60, 50, 0.5 ** torch.arange(50.0))
    seen = []

    def blocks(rows, columns):
        X = H[rows][:, columns]
        seen.append(X.shape)
        return X

    run = {"orth": "penalty", "method": "optimize", "max_steps": 800, "lr": 0.1, "shape": H.shape}
    found = neural_svd(blocks, 2, batch=(30, 35), **run)
    assert seen.count((30, 35)) == 800
    assert found.rel_error < 1.3 * best(sigma, 2)
    run["max_steps"] = 20
    first, again = (neural_svd(blocks, 2, batch=(30, 35), **run) for _ in range(2))
    assert torch.equal(first.U, again.U)


def test_rank_by_energy_by_chains_and_by_a_trimmed_start():
    H, _, sigma, _ = made(64, 48, 0.8 ** torch.arange(48.0))
    shares = sigma.square().cumsum(0) / sigma.square().sum()
    for energy in (0.9, 0.99, 0.99999):
        want = int((shares < energy).sum()) + 1
        for method in ("optimize", "svd"):
            found = neural_svd(H, energy=energy, method=method)
            assert found.S.shape == (want,)
            assert float(found.S.double().square().sum() / sigma.square().sum()) >= energy - 1e-5
    assert neural_svd(H, rank=(12, 5), method="optimize").S.shape == (5,)
    found = neural_svd(H, trim=0.1, method="optimize")
    assert found.S.shape == (int((sigma >= 0.1 * sigma[0]).sum()),)
    assert found.spectrum.shape == (48,)
    pytest.importorskip("matplotlib")
    from lomacs_fast.plots import plot_trim

    figure = plot_trim(found.spectrum, len(found.S))
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == [f"kept ({len(found.S)})", f"cut ({48 - len(found.S)})"]
    with pytest.raises(ValueError, match="kept must lie in 1 to 48, got 49"):
        plot_trim(found.spectrum, 49)


@pytest.mark.parametrize("net", ["table", "mlp"])
def test_sigma_by_norms(net):
    H, _, sigma, _ = made(24, 18, 0.6 ** torch.arange(18.0))
    found = neural_svd(H, 3, sigma="norms", method="optimize")
    torch.testing.assert_close(found.S.double(), sigma[:3], rtol=1e-3, atol=0)
    run = {"net": net, "lr": 0.03, "method": "optimize", "max_steps": 800, "sigma": "norms", "lam": 0.2}
    run["nesting"] = "sequential"
    for orth in ("bjorck", "penalty"):
        found = neural_svd(H, 3, orth=orth, **run)
        torch.testing.assert_close(found.S.double(), sigma[:3], rtol=0.05, atol=0.01)
    # orthonormal columns have norm 1 whatever the singular values
    with pytest.raises(ValueError, match="orthonormal columns have norm 1"):
        neural_svd(H, 3, orth="qr", **run)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float32])
@pytest.mark.parametrize("method", ["optimize", "svd"])
def test_signs_and_phases(dtype, method):
    H, U, _, V = made(18, 14, 0.8 ** torch.arange(14.0), dtype)
    sigma = neural_svd(H, 4, method=method)
    d = (sigma.U.conj() * (H @ sigma.V)).sum(0)
    torch.testing.assert_close(d, sigma.S.to(dtype), rtol=0, atol=1e-5)
    largest = neural_svd(H, 4, method=method, phase="max")
    entries = largest.U.gather(0, largest.U.abs().argmax(0, keepdim=True))
    torch.testing.assert_close(entries, entries.abs().to(dtype), rtol=0, atol=1e-6)
    turned = U[:, :4].to(dtype), V[:, :4].to(dtype)
    if dtype.is_complex:
        turned = tuple(x * torch.exp(1j * torch.arange(4.0)) for x in turned)
    for reference in (turned, (-turned[0], -turned[1])):
        found = neural_svd(H, 4, method=method, phase="reference", reference=reference)
        torch.testing.assert_close(found.U, reference[0], rtol=0, atol=5e-3)
        torch.testing.assert_close(found.V, reference[1], rtol=0, atol=5e-3)
    for other in (largest, found):
        product = other.U * other.S @ other.Vh
        torch.testing.assert_close(product, sigma.U * sigma.S @ sigma.Vh, rtol=0, atol=2e-3)


def test_edges():
    c = torch.complex64
    for H in (torch.randn(1, 9, dtype=c), torch.randn(9, 1, dtype=c), torch.randn(1, 1, dtype=c)):
        found = neural_svd(H, method="optimize")
        torch.testing.assert_close(found.U * found.S @ found.Vh, H, rtol=0, atol=1e-5)
    for nesting in ("joint", "none"):
        found = neural_svd(torch.zeros(7, 5, dtype=c), 2, method="optimize", nesting=nesting)
        assert (found.S == 0).all()
        assert found.rel_error == 0
        assert found.ortho_error < 1e-5
    low = torch.randn(20, 3, dtype=c) @ torch.randn(3, 15, dtype=c)
    found = neural_svd(low, 6, method="optimize", tol=1e-5)
    assert found.rel_error < 1e-4
    assert found.ortho_error < 1e-5
    assert (found.S[3:] < 1e-4 * found.S[0]).all()
    repeated = torch.diag(torch.tensor([3.0, 3, 3, 1, 1, 1, 0.5, 0.5])).to(c)
    found = neural_svd(repeated, 4, method="optimize")
    torch.testing.assert_close(found.S, torch.tensor([3.0, 3, 3, 1]), rtol=1e-3, atol=0)
    # of equal singular values the span is right
    assert torch.linalg.vector_norm(found.V[:3, :3]) ** 2 == pytest.approx(3, abs=1e-3)
    for unit in (1e-30, 1e30):
        X = torch.randn(12, 10, dtype=c)
        found = neural_svd(unit * X, 3, method="optimize")
        torch.testing.assert_close(found.S / unit, torch.linalg.svdvals(X)[:3], rtol=1e-4, atol=0)
    decay = made(30, 24, torch.logspace(0, -12, 24, dtype=torch.float64), torch.complex128)
    found = neural_svd(decay[0], 10, method="optimize")
    torch.testing.assert_close(found.S, decay[2][:10], rtol=1e-3, atol=0)
    view = torch.randn(9, 12, dtype=c).mH
    torch.testing.assert_close(
        neural_svd(view, 3, method="optimize").S, torch.linalg.svdvals(view)[:3], rtol=1e-3, atol=0
    )


def test_batches():
    generator = torch.Generator().manual_seed(0)
    H = torch.randn(2, 6, 16, 12, dtype=torch.complex64, generator=generator)
    H[1, 2] = 0
    for X in (H, H.real.contiguous()):
        found = neural_svd(X, 3, method="optimize")
        exact = torch.linalg.svdvals(X)
        torch.testing.assert_close(found.S, exact[..., :3], rtol=1e-3, atol=1e-6)
        assert found.rel_error.shape == (2, 6)
        assert found.rel_error[1, 2] == 0
        assert (found.ortho_error < 1e-5).all()
    assert neural_svd(H[:, :0], 3, method="optimize").U.shape == (2, 0, 16, 3)
    assert neural_svd(H, 3, nesting="none", method="optimize").vectors == "free"


REFUSED = [
    ({"rank": 0}, ValueError, "rank must be at least 1"),
    ({"rank": 6}, ValueError, r"rank must be at most min\(M, N\) = 5, got 6"),
    ({"rank": 1.5}, TypeError, "rank must be an integer"),
    ({"rank": (1, 2, 3)}, ValueError, "a pair of transmit and receive chains"),
    ({"energy": 1.2}, ValueError, r"energy must lie in \(0, 1\)"),
    ({"energy": 0.5, "rank": 2}, ValueError, "energy chooses the rank"),
    ({"net": "x"}, ValueError, "net must be one of table, mlp, got 'x'"),
    ({"phase": "reference"}, ValueError, "go together"),
    ({"lam": "x"}, ValueError, "lam must be one of balance"),
    ({"lam": -1}, ValueError, "lam must be at least 0"),
    ({"tol": 0}, ValueError, "tol must be positive"),
    ({"trim": 2.0}, ValueError, "trim must lie"),
    ({"seed": -1}, ValueError, "seed must be at least 0"),
    ({"init": 3}, TypeError, "init must be a result"),
    ({"init": (torch.zeros(4, 2), torch.zeros(5, 2))}, ValueError, "U of init must have shape"),
    ({"lr": 0}, ValueError, "lr must be positive"),
    ({"resume": True}, ValueError, "resume needs the path"),
    ({"batch": (1, 2, 3), "lr": 0.1}, ValueError, "batch must be a number or a pair"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), REFUSED, ids=lambda x: str(x)[:24])
def test_what_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        neural_svd(
            torch.randn(6, 5),
            **({"rank": 2} if "energy" not in arguments and "trim" not in arguments else {}) | arguments,
            method="optimize",
        )


@pytest.mark.parametrize("method", ["auto", "optimize"])
def test_matrices_that_are_refused(method):
    for value in (float("nan"), float("inf")):
        H = torch.randn(5, 5)
        H[1, 2] = value
        with pytest.raises(ValueError, match="H must be finite"):
            neural_svd(H, 2, method=method)
        with pytest.raises(ValueError, match=r"H must be finite.*matrix 1"):
            neural_svd(torch.stack([torch.zeros(5, 5), H]), 2, method=method)
        with pytest.raises(ValueError, match="H must be finite"):
            neural_svd(H.numpy(), 2, method=method)
    with pytest.raises(ValueError, match="without an empty side"):
        neural_svd(torch.zeros(0, 5), method=method)
    with pytest.raises(TypeError, match="got int64"):
        neural_svd(torch.ones(4, 4, dtype=torch.int64), method=method)
    with pytest.raises(TypeError, match="got str"):
        neural_svd("x", method=method)
    with pytest.raises(ValueError, match="shape must be given"):
        neural_svd(lambda rows, columns: 0, 2, method=method)
    with pytest.raises(ValueError, match=r"a block of shape \(6, 5\)"):
        neural_svd(lambda rows, columns: torch.zeros(2, 2), 2, shape=(6, 5), method=method)


def test_honest_advice():
    small = neural_svd(torch.randn(40, 30), 5)
    assert small.method == "svd"
    assert "LAPACK" in small.advice
    assert "LAPACK" in neural_svd(torch.randn(40, 30), 5, method="optimize").advice
    low = neural_svd(torch.randn(600, 4) @ torch.randn(4, 560), 4)
    assert low.method == "lowrank"
    assert low.rel_error < 1e-4
    assert neural_svd(torch.randn(16, 32, 32, dtype=torch.complex64), 4).method == "optimize"
    outside = neural_svd(torch.randn(40, 30).numpy(), 5)
    assert outside.method == "optimize"
    assert "not in memory" in outside.advice
    with pytest.raises(ValueError, match="needs the matrix in memory"):
        neural_svd(torch.randn(40, 30).numpy(), 5, method="svd")
