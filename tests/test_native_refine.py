"""The CPU kernels of `lomacs::refine_svd`, its gradient and `lomacs::approx_svd`: accuracy, instruction sets, edges."""

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


def gradients(module, tensors, steps, seeds, **options):
    """Those of H, U, V and the scalars where U, S and V have the gradients `seeds`; None counts as zeros."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = module.refine_svd(*leaves[:3], steps, scalars=leaves[3], **options)
    seeds = seeds(out) if callable(seeds) else seeds
    found = torch.autograd.grad(out, leaves, seeds, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


def seeds_of(out):
    return [normal(*x.shape, seed=20 + i, dtype=x.dtype) for i, x in enumerate(out)]


def rows(*rows):
    return torch.tensor(rows, dtype=torch.float64)


# turning both ways, bounded and not
SCALARS = rows([0.5, 0.1, 1.0, 0.6], [0.3, 0.05, 0.8, 2.0], [0.01, 0.03, 1.1, 4.0])


@pytest.mark.parametrize("hermitian", [False, True], ids=["general", "hermitian"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gradients_in_float64_equal_those_of_the_reference(isa, size, hermitian):
    M, N, r, k = size
    N, r, k = (M, r, k) if hermitian else (N, r, k)
    H, U, V = channels(M, N, 2, hermitian=hermitian), normal(2, M, r, seed=7), normal(2, N, r, seed=8)
    for steps, options in ((0, {}), (3, {"sweeps": 3}), (2, {"orthonormal": True, "sweeps": 1})):
        if "orthonormal" in options:
            U, V = (torch.linalg.qr(x)[0] for x in (U, V))
        options |= {"active": k, "hermitian": hermitian}
        with use_backend("cpp"):
            got = gradients(functional, (H, U, V, SCALARS), steps, seeds_of, **options)
        close(got, gradients(reference, (H, U, V, SCALARS), steps, seeds_of, **options), 1e-11)


def test_gradients_of_more_steps_than_are_kept():
    H, U, V = channels(41, 35, 1), normal(1, 41, 33, seed=7), normal(1, 35, 33, seed=8)
    with use_backend("cpp"):
        got = gradients(functional, (H, U, V, SCALARS), 9, seeds_of)
    close(got, gradients(reference, (H, U, V, SCALARS), 9, seeds_of), 1e-9)


@pytest.mark.parametrize("hermitian", [False, True], ids=["general", "hermitian"])
def test_gradients_count_iterations_that_values_do_not_need(hermitian):
    H = channels(16, 16, 2, hermitian=hermitian)
    P, _, Q = torch.linalg.svd(H)
    # nothing turns, and a defect whose square is below rounding is not below it itself
    U, V = (x[..., :6] + 2e-10 * normal(2, 16, 6, seed=9) for x in (P, Q.mH))
    options = {"hermitian": hermitian, "orthonormal": True}
    with use_backend("cpp"):
        got = gradients(functional, (H, U, V, SCALARS), 0, seeds_of, **options)
    want = gradients(reference, (H, U, V, SCALARS), 0, seeds_of, **options)
    close(got, want, 1e-12)


def near(n, k, seed, noise=1e-3):
    """Columns that are nearly orthonormal."""
    return torch.linalg.qr(normal(2, n, k, seed=seed))[0] + noise * normal(2, n, k, seed=seed + 1)


STARTS = {
    "equal columns": (lambda: channels(12, 10, 2), lambda n: normal(2, n, 5)[..., [0, 1, 1, 2, 0]]),
    "ill-conditioned": (
        lambda: channels(12, 10, 2),
        lambda n: near(n, 5, 3) @ normal(2, 5, 5) * torch.logspace(0, -2, 5),
    ),
    "diagonal": (
        lambda: torch.eye(12, 10).to(torch.complex128) * torch.linspace(1, 0.1, 10) + 0 * channels(12, 10, 2),
        lambda n: near(n, 5, 1, 0) * 3,
    ),
    # every pair of columns turns far: the rotations are bounded
    "equal values": (lambda: near(12, 10, 5), lambda n: normal(2, n, 9, seed=n)),
    "zero": (lambda: 0 * channels(12, 10, 2), lambda n: near(n, 5, 3)),
}


@pytest.mark.parametrize("name", STARTS)
def test_gradients_of_degenerate_input_equal_those_of_the_reference(name):
    channel, start = STARTS[name]
    H = channel()
    for hermitian in (False, True):
        X = H @ H.mH if hermitian else H
        tensors = X, start(12), start(X.shape[-1]), SCALARS
        for active in (4, None):
            options = {"hermitian": hermitian, "active": active}
            with use_backend("cpp"):
                got = gradients(functional, tensors, 2, seeds_of, **options)
            want = gradients(reference, tensors, 2, seeds_of, **options)
            for x, y in zip(got, want, strict=True):
                assert (x - y).norm() <= 1e-6 * y.norm() + 1e-9


def test_gradients_of_eigenvalues_of_both_signs():
    H, U = normal(2, 12, 12), near(12, 6, 3)
    H = H + H.mH
    for active in (4, None):
        options = {"hermitian": True, "active": active}
        with use_backend("cpp"):
            got = gradients(functional, (H, U, U, SCALARS), 3, seeds_of, **options)
        close(got, gradients(reference, (H, U, U, SCALARS), 3, seeds_of, **options))


def smooth_seeds(out):
    """Gradients of products that no turn of a column changes, and of S."""
    U, S, V = out
    with torch.enable_grad():
        leaves = [x.detach().to(torch.complex128 if x.is_complex() else torch.float64) for x in out]
        u, s, v = (x.requires_grad_() for x in leaves)
        terms = product(u, s, v), u @ u.mH, v @ v.mH, s
        loss = sum((x * normal(*x.shape, seed=30 + i, dtype=x.dtype)).real.sum() for i, x in enumerate(terms))
        found = torch.autograd.grad(loss, (u, s, v))
    return [g.to(x.dtype) for g, x in zip(found, (U, S, V), strict=True)]


@pytest.mark.parametrize("hermitian", [False, True], ids=["general", "hermitian"])
@pytest.mark.parametrize(
    ("size", "steps"), [((64, 32, 16, 8), 4), ((63, 41, 11, 11), 6), ((20, 14, 1, 1), 2)], ids=str
)
def test_gradients_in_float32_by_the_rule(size, steps, hermitian):
    M, N, r, k = size
    N = M if hermitian else N
    errors = {"ours": [0.0] * 4, "eager": [0.0] * 4}
    norms = [0.0] * 4
    scalars = rows([0.5, 0.07, 1.0, 0.8]).float()
    options = {"hermitian": hermitian, "active": k}
    for seed in range(3):
        H, U, V = (
            channels(M, N, 11, seed, hermitian),
            normal(11, M, r, seed=seed + 5),
            normal(11, N, r, seed=seed + 6),
        )
        single = [x.to(torch.complex64) for x in (H, U, V)] + [scalars]
        double = [x.to(torch.complex128) for x in single[:3]] + [scalars.double()]
        want = gradients(reference, double, steps, smooth_seeds, **options)
        for name, module in (("ours", functional), ("eager", reference)):
            with use_backend("cpp"):
                got = gradients(module, single, steps, smooth_seeds, **options)
            for i in range(4):
                errors[name][i] += float((got[i] - want[i]).abs().square().sum())
        for i in range(4):
            norms[i] += float(want[i].abs().square().sum())
    for i in range(4):
        if norms[i] > 0:
            ours, eager = ((errors[name][i] / norms[i]) ** 0.5 for name in ("ours", "eager"))
            assert ours <= 2 * eager + 4 * EPS, "HUVs"[i]


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


def test_gradients_do_not_depend_on_threads_batch_or_repetition():
    H, U, V = (
        x.to(torch.complex64) for x in (channels(33, 21, 9), normal(9, 33, 8), normal(9, 21, 8, seed=1))
    )
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(gradients(functional, (H, U, V, SCALARS.float()), 3, seeds_of, active=5))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))
    alone = gradients(
        functional,
        (H[4:5], U[4:5], V[4:5], SCALARS.float()),
        3,
        lambda _: [
            x[4:5] for x in seeds_of(functional.refine_svd(H, U, V, 3, scalars=SCALARS.float(), active=5))
        ],
        active=5,
    )
    assert all(torch.equal(x[0], y[4]) for x, y in zip(alone[:3], results[0][:3], strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_of_nan_and_inf_stay_in_their_sample(bad):
    H, U = channels(12, 10).to(torch.complex64), normal(3, 12, 6, dtype=torch.complex64)
    want = gradients(functional, (H, U, U[:, :10], SCALARS.float()), 2, seeds_of, active=4)
    H[1, 3, 4] = bad
    got = gradients(functional, (H, U, U[:, :10], SCALARS.float()), 2, seeds_of, active=4)
    for x, y in zip(got[:3], want[:3], strict=True):
        assert torch.equal(x[[0, 2]], y[[0, 2]])
    assert not got[0][1].isfinite().all()


def test_no_samples_have_gradients():
    H, U, V = normal(0, 6, 5), normal(0, 6, 3), normal(0, 5, 3)
    found = gradients(functional, (H, U, V, SCALARS), 3, seeds_of, active=2)
    assert [tuple(x.shape) for x in found] == [(0, 6, 5), (0, 6, 3), (0, 5, 3), (3, 4)]
    assert not found[3].any()


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
    out = call(H, U, V, scalars, 2, 2, False)
    order = out[3]
    backward = torch.ops.lomacs.refine_svd_backward
    for args, words in [
        ((*out[:3], H, U, None, scalars, order, 2, False), "square"),
        ((out[0][:1], *out[1:3], H, U, V, scalars, order, 2, False), "gU must have shape"),
        ((*out[:3], H, U, V, scalars, order[:, :0], 2, False), "order must hold 1 to r"),
        ((*out[:3], H, U, V, scalars, order[:1], 2, False), "order must be a contiguous"),
        ((*out[:3], H, U, V, scalars, order + 1, 2, False), "every active column once"),
        ((*out[:3], H, U, V, scalars, order * 0, 2, False), "every active column once"),
    ]:
        with pytest.raises(RuntimeError, match=words):
            backward(*args)
