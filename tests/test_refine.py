"""Refinement of an SVD: the formula, convergence, degenerate input, starts of any rank, gradients, module."""

import re

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import lomacs_fast
from lomacs_fast import functional, reference
from lomacs_fast.reference import refine

FORMS = pytest.mark.parametrize("hermitian", [False, True], ids=["general", "hermitian"])


@pytest.fixture(params=[reference, functional], ids=["reference", "functional"])
def stem(request):
    return request.param


def normal(*shape, seed=0, dtype=torch.complex128):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def orthonormal(n, r, B=3, seed=0, dtype=torch.complex128):
    return torch.linalg.qr(normal(B, n, r, seed=seed, dtype=dtype))[0]


def spectrum(s, M, N, B=3, seed=0, hermitian=False, dtype=torch.complex128):
    s = torch.as_tensor(s, dtype=torch.float64)
    U = orthonormal(M, len(s), B, seed)
    V = U if hermitian else orthonormal(N, len(s), B, seed + 1)
    return ((U * s) @ V.mH).to(dtype)


def defect(U):
    return torch.linalg.matrix_norm(U.mH @ U - torch.eye(U.shape[-1], dtype=U.dtype)).max().item()


def residual(H, U, S, V):
    norm = torch.linalg.matrix_norm
    return norm(H - (U * S[..., None, :]) @ V.mH) / norm(H).clamp_min(1e-30)


def best(H, r):
    s = torch.linalg.svdvals(H)
    return s[..., r:].square().sum(-1).sqrt() / s.square().sum(-1).sqrt().clamp_min(1e-30)


def tangent(z, gap):
    return z / (gap + np.sqrt(gap**2 + abs(z) ** 2))


def unitary(X):
    X = X * min(1, 1.5 / np.sqrt(max(abs(X @ X).sum(1))))
    X4 = np.linalg.matrix_power(X, 4)
    one = np.eye(len(X))
    return (one + X + X @ X / 2) @ (one - X4 / 8 + 0.185 / 16 * X4 @ X4)


def polished(X, R):
    """Three Björck iterations from singular values between 1 and sqrt(1 + |R|^2)."""
    X = X * np.sqrt(2 / (2 + np.linalg.norm(R) ** 2))
    for _ in range(3):
        X = X @ (1.5 * np.eye(X.shape[1]) - 0.5 * X.conj().T @ X)
    return X


def stepped(H, U, V, scalars, hermitian):
    """A step with one sweep, pair by pair and column by column."""
    soft, mu, gain, bound = scalars
    W, Z, k = H @ V, H.conj().T @ U, U.shape[1]
    D = U.conj().T @ W
    P, Q = np.eye(k, dtype=complex), np.eye(k, dtype=complex)
    turn = np.eye(k) if hermitian else np.diag((np.diag(D) / abs(np.diag(D))).conj())
    D = D @ turn
    s = np.diag(D).real
    off = [(sum(abs(D[i]) ** 2) + sum(abs(D[:, i]) ** 2)) / 2 - s[i] ** 2 for i in range(k)]
    X, Y = np.zeros((k, k), dtype=complex), np.zeros((k, k), dtype=complex)
    for i in range(k):
        for j in set(range(k)) - {i}:
            more = soft * np.sqrt(off[i] + off[j])
            X[i, j] = np.sign(s[j] - s[i]) * tangent(D[i, j] + D[j, i].conj(), abs(s[j] - s[i]) + more)
            Y[i, j] = tangent(D[i, j] - D[j, i].conj(), s[i] + s[j] + more)
    if hermitian:
        P = Q = unitary(X)
    else:
        P, Q = unitary(X + Y), unitary(X - Y)
        after = np.diag(P.conj().T @ D @ Q)
        Q = turn @ Q @ np.diag((after / abs(after)).conj())
    core = P.conj().T @ U.conj().T @ W @ Q
    s = np.diag(core).real
    shift = np.where(s < 0, -1, 1) / (abs(s) + mu)
    out = []
    for A, B, E, rotated in ((U, W, core, (P, Q)), (V, Z, core.conj().T, (Q, P))):
        R = gain * (B @ rotated[1] - A @ rotated[0] @ E) * shift
        R = R * min(1, bound / np.linalg.norm(R))
        out.append(polished(A @ rotated[0] + R, R))
    return out


@FORMS
@pytest.mark.parametrize("scalars", [(0.5, 0.02, 1.0, 2.0), (0.1, 0.3, 0.7, 0.4)])
def test_a_step_equals_the_formula(hermitian, scalars):
    H = spectrum([0.8, 0.5, 0.3, -0.2, 0.05, 0.01], 9, 9 if hermitian else 7, hermitian=hermitian)
    H = H / torch.linalg.matrix_norm(H)[:, None, None]
    near = torch.linalg.svd(H)
    U = torch.linalg.qr(near.U[..., :4] + 0.1 * normal(3, 9, 4, seed=5))[0]
    V = U if hermitian else torch.linalg.qr(near.Vh.mH[..., :4] + 0.1 * normal(3, H.shape[-1], 4, seed=6))[0]
    got = refine.refine_step(H, U, V, torch.tensor(scalars, dtype=torch.float64), 1, hermitian)
    for b in range(3):
        want = stepped(H[b].numpy(), U[b].numpy(), V[b].numpy(), scalars, hermitian)
        for x, y in zip(got, want, strict=True):
            np.testing.assert_allclose(x[b], y, rtol=0, atol=1e-11)


@pytest.mark.parametrize("soft", [0.0, 0.5])
@FORMS
def test_rotations_diagonalize_any_core(hermitian, soft):
    """One pair too: antidiagonal, equal diagonals, skew, and a cyclic permutation."""
    pairs = [[[0, 1], [1, 0]], [[1, 0.5], [0.5, 1]], [[1, 0.1j], [-0.1j, 1]], [[0.2, 0], [0, 0.9]]]
    skew = [[[0, 1], [-1, 0]], [[0, 2j], [0.5, 0]]]
    cores = [torch.tensor(pairs + ([] if hermitian else skew), dtype=torch.complex128)]
    random = normal(6, 5, 5)
    cores.append(random + random.mH if hermitian else random)
    if not hermitian and soft:
        cores.append(torch.eye(5, dtype=torch.complex128).roll(1, -1)[None])
    for D in cores:
        exact = D
        for _ in range(30):
            _, P, Q = refine._diagonalize(exact, soft, 1, hermitian)
            P, Q = (reference.bjorck(x, 6) for x in (P, Q))
            exact = P.mH @ exact @ Q
        off = exact - torch.diag_embed(exact.diagonal(dim1=-2, dim2=-1))
        assert off.abs().max() < 1e-9
        diagonal = exact.diagonal(dim1=-2, dim2=-1)
        assert diagonal.imag.abs().max() < 1e-9
        assert hermitian or diagonal.real.min() > 0
        sigma = diagonal.real.abs().sort(descending=True).values
        torch.testing.assert_close(sigma, torch.linalg.svdvals(D), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("M", "N", "r"), [(11, 7, 3), (7, 11, 5), (20, 63, 11), (5, 5, 1), (1, 1, 1), (6, 6, 6)]
)
def test_converges_to_the_svd(stem, M, N, r):
    s = 0.9 ** torch.arange(min(M, N), dtype=torch.float64)
    s[r:] *= 0.02
    H = spectrum(s, M, N)
    U, S, V = stem.refine_svd(H, normal(3, M, r, seed=3), normal(3, N, r, seed=4), 30)
    torch.testing.assert_close(S, s[:r].expand(3, r), rtol=0, atol=1e-9)
    left, sigma, right = torch.linalg.svd(H, full_matrices=False)
    exact = (left[..., :r] * sigma[:, None, :r]) @ right[:, :r]
    torch.testing.assert_close((U * S[:, None]) @ V.mH, exact, rtol=0, atol=1e-7)
    assert max(defect(U), defect(V)) < 1e-12


@pytest.mark.parametrize("active", [None, 3])
def test_hermitian_form_takes_the_signs_into_v(stem, active):
    values = torch.tensor([1, -0.6, 0.36, 0.1, -0.08, 0.06, -0.0005], dtype=torch.float64)
    H = spectrum(values, 12, 12, hermitian=True)
    U, S, V = stem.refine_svd(H, normal(3, 12, 6), normal(3, 12, 6), 40, hermitian=True, active=active)
    k = active or 6
    torch.testing.assert_close(S[:, :k], values[:k].abs().expand(3, k), rtol=0, atol=1e-6)
    assert (S[:, k:] == 0).all()
    sign = torch.ones(6, dtype=torch.float64)
    sign[:k] = values[:k].sign()
    torch.testing.assert_close(V, U * sign)
    assert defect(U) < 1e-12
    torch.testing.assert_close(residual(H, U, S, V), best(H, k), rtol=0, atol=1e-6)


def test_active_columns_are_those_refined(stem):
    s = 0.4 ** torch.arange(9, dtype=torch.float64)
    H, U0, V0 = spectrum(s, 14, 9), normal(3, 14, 7, seed=1), normal(3, 9, 7, seed=2)
    U, S, V = stem.refine_svd(H, U0, V0, 30, active=4)
    torch.testing.assert_close(S[:, :4], s[:4].expand(3, 4), rtol=0, atol=1e-8)
    assert (S[:, 4:] == 0).all()
    assert max(defect(U), defect(V)) < 1e-12
    other = stem.refine_svd(H, torch.cat([U0[..., :4], U0[..., 4:] * 9], -1), V0, 30, active=4)
    assert all(torch.equal(x, y) for x, y in zip((U, S, V), other, strict=True))


def test_mispaired_factors_find_each_other():
    """True singular vectors in another order, with other phases, on one side."""
    H = spectrum([0.9, 0.9, 0.5, 0.3, 0.2], 8, 7)
    left, _, right = torch.linalg.svd(H, full_matrices=False)
    U0, V0 = left[..., :5], right.mH[..., :5]
    for V1 in (V0.flip(-1), V0.roll(1, -1), -V0, 1j * V0.roll(2, -1) * torch.tensor([1, -1, 1, -1, 1])):
        U, S, V = reference.refine_svd(H, U0, V1, 12)
        assert (residual(H, U, S, V) < 1e-8).all()


HERMITIAN = {
    "indefinite": (normal(3, 13, 13) + normal(3, 13, 13).mH),
    "signs": spectrum([1, -1] * 6, 13, 13, hermitian=True),
    "multiple of I": 3 * torch.eye(13, dtype=torch.complex128).expand(3, 13, 13),
    "antidiagonal": torch.eye(13, dtype=torch.complex128).flip(-1).expand(3, 13, 13),
    "covariance": normal(3, 13, 4) @ normal(3, 13, 4).mH,
}
DEGENERATE = {
    "zero": torch.zeros(3, 13, 11, dtype=torch.complex128),
    "one path": normal(3, 13, 1) @ normal(3, 1, 11),
    "constant": torch.full((3, 13, 11), 2 - 1j, dtype=torch.complex128),
    "one entry": torch.nn.functional.pad(torch.ones(3, 1, 1), (3, 7, 5, 7)).to(torch.complex128),
    "rank 2": spectrum([1, 0.5], 13, 11),
    "repeated": spectrum([1] * 4 + [0.5] * 4 + [0.1] * 3, 13, 11),
    "orthonormal": spectrum([1] * 11, 13, 11),
    "condition 1e10": spectrum(torch.logspace(0, -10, 11), 13, 11),
    "random": normal(3, 13, 11),
    "permutation": torch.eye(13, dtype=torch.complex128)[torch.randperm(13)].expand(3, 13, 13),
    **HERMITIAN,
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_input(name):
    H = DEGENERATE[name].to(torch.complex64)
    M, N = H.shape[-2:]
    for r, active in ((N, None), (6, 3)):
        U0, V0 = (normal(3, n, r, seed=n, dtype=torch.complex64) for n in (M, N))
        for form in (False, True) if name in HERMITIAN else (False,):
            for steps in (0, 12):
                U, S, V = functional.refine_svd(H, U0, V0, steps, active=active, hermitian=form)
                assert max(defect(U), defect(V)) < 1e-5
                assert S.isfinite().all()
                assert (S >= 0).all()
                assert (S.diff(dim=-1) <= 0).all()
                assert (residual(H, U, S, V) < 1 + 1e-5).all()
            # a flat spectrum has no leading columns to converge to: a slow, not a wrong answer
            short = residual(H, U, S, V) - best(H, active or r)
            assert (short < (1e-3 if r == N else 0.12)).all(), short


@pytest.mark.parametrize("name", ["zero", "equal", "tiny", "huge", "one dead", "ill-conditioned"])
def test_starts_of_any_rank(name):
    H = spectrum([1, 0.5, 0.2, 0.1, 0.05], 16, 12, dtype=torch.complex64)
    U0, V0 = (normal(3, n, 5, seed=n, dtype=torch.complex64) for n in (16, 12))
    match name:
        case "zero":
            U0, V0 = U0 * 0, V0 * 0
        case "equal":
            U0, V0 = (x[..., :1].expand_as(x) for x in (U0, V0))
        case "tiny":
            U0, V0 = U0 * 1e-8, V0 * 1e-8
        case "huge":
            U0, V0 = U0 * 1e8, V0 * 1e8
        case "one dead":
            U0[..., 2], V0[..., 4] = 0, 0
        case _:
            decay = torch.logspace(0, -7, 5)
            U0 = spectrum(decay, 16, 5, dtype=torch.complex64)
            V0 = spectrum(decay, 12, 5, seed=7, dtype=torch.complex64)
    U, S, V = functional.refine_svd(H, U0, V0, 20)
    assert max(defect(U), defect(V)) < 1e-5
    assert (residual(H, U, S, V) < 1e-3).all()


@pytest.mark.parametrize("n", [8, 63])
def test_completion_whatever_the_span(n):
    dft = refine.dft_basis(n, torch.zeros(1, dtype=torch.complex64))
    torch.testing.assert_close(dft.mH @ dft, torch.eye(n, dtype=dft.dtype), atol=1e-5, rtol=0)
    k = n // 4
    spans = {
        "leading DFT columns": dft[:, :k],
        "last DFT columns": dft[:, -k:],
        "antennas": torch.eye(n, dtype=torch.complex64)[:, :k],
        "every other antenna": torch.eye(n, dtype=torch.complex64)[:, : 2 * k : 2],
        "random": orthonormal(n, k, 1)[0].to(torch.complex64),
        "DFT and antenna": torch.linalg.qr(torch.cat([dft[:, :1], torch.eye(n)[:, : k - 1]], -1))[0],
    }
    U = torch.stack(list(spans.values()))
    for r in (k, k + 1, n // 2, n):
        full = refine.complete(U, r)
        assert full.shape == (len(U), n, r)
        assert torch.equal(full[..., :k], U)
        assert defect(full) < 1e-5


@pytest.mark.parametrize("exponent", [-20, -10, 10, 20])
def test_any_scale(exponent):
    H = spectrum(torch.logspace(0, -3, 6), 9, 8, dtype=torch.complex64)
    U0, V0 = (normal(3, n, 4, dtype=torch.complex64) for n in (9, 8))
    scale = 2.0 ** round(exponent / np.log10(2))
    U, S, V = functional.refine_svd(H, U0, V0, 6)
    U1, S1, V1 = functional.refine_svd(H * scale, U0, V0, 6)
    assert torch.equal(U1, U)
    assert torch.equal(S1, S * scale)
    assert torch.equal(V1, V)


def test_views_and_inputs_untouched(stem):
    H, U, V = normal(2, 9, 6), normal(2, 9, 3), normal(2, 6, 3)
    kept = [x.clone() for x in (H, U, V)]
    want = stem.refine_svd(H, U, V, 3)
    wide = normal(2, 9, 12)
    wide[..., ::2] = H
    for view in (H.mH.contiguous().mH, H.conj().resolve_conj().conj(), wide[..., ::2]):
        got = stem.refine_svd(view, U.mH.contiguous().mH, V.conj().resolve_conj().conj(), 3)
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y)
    expanded = stem.refine_svd(H[:1].expand(2, 9, 6), U[:1].expand(2, 9, 3), V[:1].expand(2, 6, 3), 3)
    torch.testing.assert_close(expanded[0][1], want[0][0])
    assert all(torch.equal(x, y) for x, y in zip((H, U, V), kept, strict=True))


def test_batches_of_any_shape(stem):
    H, U, V = normal(2, 3, 7, 5), normal(2, 3, 7, 2), normal(2, 3, 5, 2)
    want = stem.refine_svd(H[1, 2], U[1, 2], V[1, 2], 3)
    for x, y in zip(stem.refine_svd(H, U, V, 3), want, strict=True):
        torch.testing.assert_close(x[1, 2], y)
    empty = stem.refine_svd(H[:0], U[:0], V[:0], 3)
    assert [tuple(x.shape) for x in empty] == [(0, 3, 7, 2), (0, 3, 2), (0, 3, 5, 2)]


@FORMS
@pytest.mark.parametrize("active", [None, 2])
def test_gradients(hermitian, active):
    N = 5 if hermitian else 4
    H, U, V = normal(1, 5, N), normal(1, 5, 3, seed=1), normal(1, N, 3, seed=2)
    scalars = torch.tensor([[0.5, 0.1, 1.0, 0.6], [0.3, 0.1, 0.8, 2.0]], dtype=torch.float64)

    def products(H, U, V, scalars):
        H = H + H.mH if hermitian else H
        U, S, V = functional.refine_svd(H, U, V, 3, hermitian=hermitian, active=active, scalars=scalars)
        return S, (U * S[..., None, :]) @ V.mH, U @ U.mH

    inputs = [x.requires_grad_() for x in (H, U, V, scalars)]
    assert torch.autograd.gradcheck(products, inputs, atol=1e-5, rtol=1e-4, fast_mode=True)


@pytest.mark.parametrize(
    "name", ["zero", "one path", "multiple of I", "orthonormal", "one entry", "constant"]
)
def test_gradients_are_finite_where_they_degenerate(name):
    H = DEGENERATE[name].to(torch.complex64).clone().requires_grad_()
    start = [torch.eye(n, 4, dtype=torch.complex64).expand(3, n, 4) for n in H.shape[-2:]]
    U0, V0 = (x.clone().requires_grad_() for x in start)
    for form in (False, True) if name == "multiple of I" else (False,):
        U, S, V = functional.refine_svd(H, U0, V0, 2, hermitian=form)
        loss = S.sum() + ((U * S[..., None, :]) @ V.mH - H).abs().square().sum()
        for gradient in torch.autograd.grad(loss, (H, U0, V0), allow_unused=form):
            assert gradient is None or gradient.isfinite().all()


class Recorded(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def calls(*args, **kwargs):
    with Recorded() as recorded:
        reference.refine_svd(*args, **kwargs)
    return recorded.names


@FORMS
def test_products_alone_and_the_same_for_all_data(hermitian):
    U, V = normal(2, 9, 5), normal(2, 9, 5)
    inputs = [normal(2, 9, 9), torch.zeros(2, 9, 9, dtype=torch.complex128), HERMITIAN["signs"][:2, :9, :9]]
    names = [calls(H, U, V, 3, active=3, hermitian=hermitian) for H in inputs]
    assert names[0] == names[1] == names[2]
    assert not [
        n
        for n in names[0]
        if re.search(r"svd|linalg_(?!vector_norm)|geqrf|eig|inverse|solve|chol|householder", n)
    ]
    with FakeTensorMode() as mode:
        U, S, _ = functional.refine_svd(*map(mode.from_tensor, (inputs[0], U, V)), 2, hermitian=hermitian)
    assert (tuple(U.shape), S.dtype) == ((2, 9, 5), torch.float64)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"H": torch.zeros(2, 6, 5)}, TypeError, "H must be complex64 or complex128, got float32"),
        ({"U": normal(2, 6, 3)}, TypeError, "U must be complex64, got complex128"),
        ({"U": torch.zeros(2, 5, 3, dtype=torch.complex64)}, ValueError, "U must have shape (2, 6, *)"),
        ({"V": torch.zeros(2, 5, 2, dtype=torch.complex64)}, ValueError, "V must have shape (2, 5, 3)"),
        ({"steps": -1}, ValueError, "steps must be at least 0, got -1"),
        ({"steps": 1.5}, TypeError, "steps must be an integer, got float 1.5"),
        ({"active": 4}, ValueError, "active must be at most r = 3, got 4"),
        ({"active": 0}, ValueError, "active must be at least 1, got 0"),
        ({"sweeps": 0}, ValueError, "sweeps must be at least 1, got 0"),
        ({"hermitian": True}, ValueError, "H must be square where hermitian is True, got 6 x 5"),
        ({"hermitian": 1}, TypeError, "hermitian must be True or False, got 1"),
        ({"scalars": torch.ones(2, 3)}, ValueError, "scalars must have shape (*, 4), got (2, 3)"),
        ({"scalars": torch.ones(2, 4).double()}, TypeError, "scalars must be float32 to go with H"),
    ],
)
def test_bad_arguments(change, error, words):
    c = torch.complex64
    arguments = {"H": torch.zeros(2, 6, 5, dtype=c), "U": torch.zeros(2, 6, 3, dtype=c)}
    arguments |= {"V": torch.zeros(2, 5, 3, dtype=c), "steps": 2} | change
    with pytest.raises(error, match=re.escape(words)):
        functional.refine_svd(**arguments)


def test_more_columns_than_fit_are_refused():
    c = torch.complex64
    with pytest.raises(ValueError, match=re.escape("at most min(M, N) = 5 columns, got 6")):
        functional.refine_svd(*(torch.zeros(*s, dtype=c) for s in ((6, 5), (6, 6), (5, 6))), 2)


@pytest.mark.parametrize("namespace", [reference, lomacs_fast], ids=["reference", "lomacs_fast"])
def test_module(namespace):
    module = namespace.SpectralRefiner(3, 4, 2)
    assert {name: tuple(p.shape) for name, p in module.state_dict().items()} == {"raw": (3, 4)}
    H = spectrum(0.6 ** torch.arange(8), 10, 8, dtype=torch.complex64)
    U, V = normal(3, 10, 4, dtype=torch.complex64), normal(3, 8, 4, dtype=torch.complex64)
    torch.testing.assert_close(module.scalars, refine.default_scalars(3, H))
    for got, want in zip(module(H, U, V), reference.refine_svd(H, U, V, 3, active=2), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        module.raw[-1, 1] -= 1
    rows = module.scalars[[0, 1, 2, 2, 2]]
    served = reference if namespace is reference else functional
    longer = served.refine_svd(H, U, V, 5, active=2, scalars=rows)
    for got, want in zip(module(H, U, V, 5), longer, strict=True):
        assert torch.equal(got, want)
    U, S, V = module(H, U, V)
    residual(H, U, S, V).sum().backward()
    assert (module.raw.grad[:, 0] != 0).all()
    assert module.raw.grad.isfinite().all()
    with pytest.raises(ValueError, match=re.escape("U must have rank = 4 columns, got 3")):
        module(H, U[..., :3], V[..., :3])
    for arguments, error, words in [
        ((0, 4), ValueError, "steps must be at least 1, got 0"),
        ((2, 4, 5), ValueError, "active must be at most rank = 4, got 5"),
        ((2, True), TypeError, "rank must be an integer, got bool True"),
    ]:
        with pytest.raises(error, match=re.escape(words)):
            namespace.SpectralRefiner(*arguments)


def test_scalars_learn():
    module = lomacs_fast.SpectralRefiner(2, 3)
    H = spectrum(0.6 ** torch.arange(8), 10, 8, B=16, dtype=torch.complex64)
    U, V = (normal(16, n, 3, dtype=torch.complex64) for n in (10, 8))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    losses = []
    for _ in range(15):
        U1, S1, V1 = module(H, U, V)
        loss = residual(H, U1, S1, V1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1e-3
