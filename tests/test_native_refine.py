"""The CPU kernels of `lomacs::refine_svd` and `lomacs::approx_svd`: accuracy, instruction sets, edges, bits."""

import pytest
import torch

from lomacs_fast import approx_svd, functional, reference, use_backend
from lomacs_fast.data.generator import ChannelGenerator
from lomacs_fast.ops import native

ISAS = ("avx512", "avx2", "portable")
EPS = torch.finfo(torch.float32).eps
# M, N, columns, active
SIZES = [(1, 1, 1, 1), (6, 5, 3, 2), (16, 16, 8, 8), (13, 9, 9, 4), (63, 41, 21, 17), (40, 64, 40, 33)]


@pytest.fixture(scope="module", autouse=True)
def library():
    if reasons := native.reasons("cpu"):
        pytest.skip(f"no native library: {'; '.join(reasons)}")


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("LOMACS_FAST_ISA", request.param)
    try:
        approx_svd(normal(1, 2, 2), 1)
    except RuntimeError as error:
        if "lacks" not in str(error):
            raise
        pytest.skip(f"no {request.param} in this processor")
    return request.param


def normal(*shape, seed=0, dtype=torch.complex128):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def channels(M, N, B=3, seed=0, hermitian=False):
    """Some paths and noise, or the covariance of that."""
    H = normal(B, M, 4, seed=seed) @ normal(B, 4, N, seed=seed + 1) + 0.1 * normal(B, M, N, seed=seed + 2)
    return H @ H.mH if hermitian else H


def product(U, S, V):
    return (U * S[..., None, :]) @ V.mH


def defect(U):
    one = torch.eye(U.shape[-1], dtype=U.dtype)
    return torch.linalg.matrix_norm(U.mH @ U - one).max().item()


def close(got, want, bound=1e-9):
    for x, y in zip(got, want, strict=True):
        assert x.shape == y.shape
        assert (x - y).norm() <= bound * (1 + y.norm())


@pytest.mark.parametrize("hermitian", [False, True], ids=["general", "hermitian"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_in_float64_equal_to_the_reference(isa, size, hermitian):
    M, N, r, k = size
    N, r, k = (M, r, k) if hermitian else (N, r, k)
    H, U, V = channels(M, N, hermitian=hermitian), normal(3, M, r, seed=7), normal(3, N, r, seed=8)
    scalars = torch.tensor([[0.5, 0.1, 1.0, 0.6], [0.3, 0.05, 0.8, 2.0]], dtype=torch.float64)
    for steps, options in ((0, {}), (3, {"scalars": scalars, "sweeps": 3}), (2, {"orthonormal": True})):
        if "orthonormal" in options:
            U, V = (torch.linalg.qr(x)[0] for x in (U, V))
        options |= {"active": k, "hermitian": hermitian}
        with use_backend("cpp"):
            got = functional.refine_svd(H, U, V, steps, **options)
        close(got, reference.refine_svd(H, U, V, steps, **options))


def covariances(n=2):
    parts = [
        ChannelGenerator(32, 32, scenario=s, kind="covariance", seed=3).batch(range(n)) for s in (1, 2, 3, 4)
    ]
    return torch.cat([p.input for p in parts]).to(torch.complex128)


APPROXIMATIONS = {
    "covariances": (covariances, 20, {}),
    "active": (covariances, 20, {"active": 6}),
    "as they are": (covariances, 12, {"denoise": False}),
    "general": (covariances, 20, {"hermitian": False}),
    "grown": (lambda: normal(3, 40, 44), 40, {}),
    "tall": (lambda: channels(44, 24), 20, {}),
    "odd": (lambda: channels(37, 21).mH, 19, {}),
    "indefinite": (lambda: covariances()[:3] - covariances()[3:6], 18, {"hermitian": True}),
    "batches": (lambda: channels(9, 7, 6).reshape(2, 3, 9, 7), 5, {}),
}


@pytest.mark.parametrize("name", APPROXIMATIONS)
def test_approximation_in_float64_equal_to_the_formula(isa, name):
    make, rank, options = APPROXIMATIONS[name]
    H = make()
    for steps in (0, 5):
        with use_backend("cpp"):
            got = approx_svd(H, rank, steps, **options)
        with use_backend("eager"):
            want = approx_svd(H, rank, steps, **options)
        close((got[1], product(*got)), (want[1], product(*want)))
        assert max(defect(got[0]), defect(got[2])) < 1e-12


@pytest.mark.parametrize("hermitian", [False, True], ids=["general", "hermitian"])
def test_float32_by_the_rule(hermitian):
    errors = {"ours": 0.0, "eager": 0.0}
    norm = 0.0
    for seed in range(3):
        H = channels(64, 64, 16, seed, hermitian)
        U, V = normal(16, 64, 16, seed=seed + 5), normal(16, 64, 16, seed=seed + 6)
        want = product(*reference.refine_svd(H, U, V, 4, hermitian=hermitian, active=8))
        single = [x.to(torch.complex64) for x in (H, U, V)]
        for name, module in (("ours", functional), ("eager", reference)):
            got = module.refine_svd(*single, 4, hermitian=hermitian, active=8)
            errors[name] += float((product(*got) - want).abs().square().sum())
        norm += float(want.abs().square().sum())
    ours, eager = ((errors[name] / norm) ** 0.5 for name in ("ours", "eager"))
    assert ours <= 2 * eager + 4 * EPS


DEGENERATE = {
    "zero": torch.zeros(2, 24, 24, dtype=torch.complex64),
    "one path": normal(2, 24, 1, dtype=torch.complex64) @ normal(2, 1, 24, dtype=torch.complex64),
    "constant": torch.full((2, 24, 24), 2 - 1j, dtype=torch.complex64),
    "multiple of I": 3 * torch.eye(24, dtype=torch.complex64).expand(2, 24, 24),
    "antidiagonal": torch.eye(24, dtype=torch.complex64).flip(-1).expand(2, 24, 24),
    "permutation": torch.eye(24, dtype=torch.complex64)[torch.randperm(24)].expand(2, 24, 24),
    "tiny": 1e-30 * normal(2, 24, 24, dtype=torch.complex64),
    "subnormal": 1e-42 * normal(2, 24, 24, dtype=torch.complex64),
    "huge": 1e30 * normal(2, 24, 24, dtype=torch.complex64),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_input(isa, name):
    H = DEGENERATE[name]
    for rank in (1, 9, 24):
        for steps in (0, 6):
            U, S, V = approx_svd(H, rank, steps)
            assert max(defect(U), defect(V)) < 1e-5
            assert S.isfinite().all()
            assert (S >= 0).all()
            assert (S.diff(dim=-1) <= 0).all()


def test_starts_of_any_rank(isa):
    H = channels(18, 14).to(torch.complex64)
    whole = normal(3, 18, 9, dtype=torch.complex64)
    for U in (
        0 * whole,
        whole[..., :1].expand(3, 18, 9),
        1e-12 * whole,
        1e12 * whole,
        whole * torch.logspace(0, -12, 9),
    ):
        found = functional.refine_svd(H, U, U[:, :14], 3, active=7)
        assert max(defect(found[0]), defect(found[2])) < 1e-5


def test_a_sample_does_not_depend_on_its_batch():
    H = torch.cat([covariances(), channels(32, 32, 5), channels(32, 32, 4, hermitian=True)]).to(
        torch.complex64
    )
    whole = approx_svd(H, 20)
    assert all(torch.equal(x, y) for x, y in zip(whole, approx_svd(H, 20), strict=True))
    for i in range(0, len(H), 3):
        assert all(torch.equal(x[0], y[i]) for x, y in zip(approx_svd(H[i : i + 1], 20), whole, strict=True))
    U = normal(len(H), 32, 8, dtype=torch.complex64)
    whole = functional.refine_svd(H, U, U, 3)
    alone = functional.refine_svd(H[4:5], U[4:5], U[4:5], 3)
    assert all(torch.equal(x[0], y[4]) for x, y in zip(alone, whole, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf(isa, bad):
    H = channels(12, 10).to(torch.complex64)
    H[1, 3, 4] = bad
    with pytest.raises(ValueError, match="H must be finite, sample 1 holds NaN or Inf"):
        approx_svd(H, 4)
    U, S, V = functional.refine_svd(H, H[..., :4], normal(3, 10, 4, dtype=torch.complex64), 2)
    for x in (U, S, V):
        assert x[[0, 2]].isfinite().all()
    assert S[1].isnan().all()


def test_raw_ops_refuse_what_they_cannot_take():
    H, U = torch.zeros(2, 5, 4, 2), torch.zeros(2, 5, 3, 2)
    V, scalars = torch.zeros(2, 4, 3, 2), torch.zeros(1, 4)
    call, approximate = torch.ops.lomacs.refine_svd, torch.ops.lomacs.approx_svd
    for args, words in [
        ((H, U, None, scalars, 2, 2, False), "square"),
        ((H, U, V, scalars, 4, 2, False), "active must be"),
        ((H, U, V, scalars, 2, 0, False), "sweeps must be"),
        ((H, U, V[:1], scalars, 2, 2, False), "V must have shape"),
        ((H, U, V, scalars.double(), 2, 2, False), "scalars must be"),
        ((H.transpose(0, 1), U, V, scalars, 2, 2, False), "must"),
    ]:
        with pytest.raises(RuntimeError, match=words):
            call(*args)
    for args, words in [((H, scalars, 5, 0, -1, True), "rank"), ((H, scalars, 2, 3, -1, True), "active")]:
        with pytest.raises(RuntimeError, match=words):
            approximate(*args)
