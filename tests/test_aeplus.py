"""The AE+ loss term by term in both forms, its invariances, its zeros and its module."""

import inspect

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lomacs_fast
from lomacs_fast import functional, reference

WEIGHTS = {"lam": 0.35, "w_energy": 0.4, "w_diag": 0.3, "w_match": 0.2}
TERMS = ("rec", "ortho", "energy", "diag", "match")


@pytest.fixture(params=[reference, functional], ids=["reference", "functional"])
def stem(request):
    return request.param


def problem(M, N, r, B=3, dtype=torch.complex128, seed=0):
    generator = torch.Generator().manual_seed(seed)
    U, V, H = (torch.randn(B, *s, dtype=dtype, generator=generator) for s in ((M, r), (N, r), (M, N)))
    return U / M**0.5, torch.rand(B, r, dtype=U.real.dtype, generator=generator), V / N**0.5, H


def exact(M=6, N=5, B=3, dtype=torch.complex128):
    """A channel and its own decomposition."""
    H = problem(M, N, 1, B, dtype)[3]
    U, S, Vh = torch.linalg.svd(H, full_matrices=False)
    return U, S, Vh.mH.resolve_conj(), H


def norm(x):
    return np.sqrt(np.sum(np.abs(x) ** 2))


def oracle(U, S, V, H, match):
    """The five terms of one sample."""
    r, size = len(S), norm(H) + 1e-8
    M = U.conj().T @ H @ V
    diagonal = np.array([M[k, k] for k in range(r)])
    estimate = sum(S[k] * np.outer(U[:, k], V[:, k].conj()) for k in range(r))
    if match == "norm":
        gap = abs(norm(S) - norm(diagonal))
    else:
        gap = sum(abs(S[k] - abs(M[k, k])) for k in range(r)) / r
    return (
        norm(H - estimate) / size,
        norm(U.conj().T @ U - np.eye(r)) + norm(V.conj().T @ V - np.eye(r)),
        1 - norm(M) / size,
        norm(M - np.diag(diagonal)) / size,
        gap / size,
    )


def weighted(terms):
    rec, ortho, energy, diag, match = terms
    return rec + 0.35 * ortho + 0.4 * energy + 0.3 * diag + 0.2 * match


@pytest.mark.parametrize("match", ["norm", "mean"])
@pytest.mark.parametrize("dtype", [torch.complex128, torch.float64])
@pytest.mark.parametrize(("M", "N", "r"), [(6, 5, 3), (1, 1, 1), (63, 11, 11), (4, 7, 1)])
def test_equals_the_formula(stem, M, N, r, dtype, match):
    arguments = problem(M, N, r, dtype=dtype)
    loss, terms = stem.aeplus_loss(*arguments, **WEIGHTS, match=match)
    want = np.array([oracle(*(x[b].numpy() for x in arguments), match) for b in range(3)])
    np.testing.assert_allclose(loss, weighted(want.mean(0)), rtol=1e-12)
    assert terms._fields == TERMS
    np.testing.assert_allclose(torch.stack(terms), want.mean(0), rtol=1e-11, atol=1e-14)
    samples = reference.aeplus_terms(*arguments, match=match)
    np.testing.assert_allclose(torch.stack(samples, 1), want, rtol=1e-11, atol=1e-14)


@given(M=st.integers(1, 9), N=st.integers(1, 9), r=st.integers(1, 9), seed=st.integers(0, 99))
@settings(derandomize=True, deadline=None, max_examples=15)
def test_any_size_equals_the_formula(M, N, r, seed):
    arguments = problem(M, N, min(r, M, N), B=1, seed=seed)
    for match in ("norm", "mean"):
        want = oracle(*(x[0].numpy() for x in arguments), match)
        loss, _ = functional.aeplus_loss(*arguments, **WEIGHTS, match=match)
        np.testing.assert_allclose(loss, weighted(want), rtol=1e-11)


def test_the_document_is_the_default(stem):
    arguments = problem(6, 5, 3)
    loss, default = stem.aeplus_loss(*arguments, **WEIGHTS)
    assert torch.equal(loss, stem.aeplus_loss(*arguments, **WEIGHTS, match="norm")[0])
    assert not torch.isclose(default.match, stem.aeplus_loss(*arguments, **WEIGHTS, match="mean")[1].match)


def test_tiny_channels_show_the_denominator(stem):
    U, S, V, H = exact(B=1)
    H = H / torch.linalg.vector_norm(H) * 1e-8
    _, terms = stem.aeplus_loss(U, S * 0, V, H, **WEIGHTS)
    assert terms.rec.item() == pytest.approx(0.5, rel=1e-10)
    assert terms.energy.item() == pytest.approx(0.5, rel=1e-10)


@pytest.mark.parametrize("match", ["norm", "mean"])
def test_a_decomposition_has_no_loss(stem, match):
    loss, terms = stem.aeplus_loss(*exact(), **WEIGHTS, match=match)
    assert loss.abs() < 1e-7
    assert all(term.abs() < 1e-7 for term in terms)


@pytest.mark.parametrize("match", ["norm", "mean"])
def test_paired_phases_and_order_do_not_count(stem, match):
    U, S, V, H = problem(6, 5, 3)
    expected, terms = stem.aeplus_loss(U, S, V, H, **WEIGHTS, match=match)
    phases = torch.polar(torch.ones(3, dtype=torch.float64), torch.tensor([0.3, 2.0, -1.0]).double())
    order = [2, 0, 1]
    left, right = (torch.linalg.qr(problem(n, n, n, 1, seed=n)[0][0])[0] for n in (6, 5))
    for same in (
        (U * phases, S, V * phases, H),
        (U[..., order], S[..., order], V[..., order], H),
        (left @ U, S, right @ V, left @ H @ right.mH),
        (U * 1j, S, V, H * 1j),
    ):
        loss, others = stem.aeplus_loss(*same, **WEIGHTS, match=match)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.stack(others), torch.stack(terms))
    # phases of U alone change the reconstruction and nothing else
    _, others = stem.aeplus_loss(U * phases, S, V, H, **WEIGHTS, match=match)
    assert not torch.isclose(others.rec, terms.rec)
    torch.testing.assert_close(torch.stack(others[1:]), torch.stack(terms[1:]))


def test_scale_does_not_count(stem):
    U, S, V, H = problem(6, 5, 3)
    loss, _ = stem.aeplus_loss(U, S, V, H, **WEIGHTS)
    torch.testing.assert_close(
        stem.aeplus_loss(U, S * 100, V, H * 100, **WEIGHTS)[0], loss, rtol=1e-7, atol=1e-7
    )


@pytest.mark.parametrize("match", ["norm", "mean"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.float32, torch.complex128])
def test_zeros_give_finite_values_and_gradients(stem, dtype, match):
    U, S, V, H = problem(6, 5, 3, dtype=dtype)
    zero = torch.zeros_like
    eye = torch.eye(6, 3, dtype=dtype).expand(3, 6, 3), torch.eye(5, 3, dtype=dtype).expand(3, 5, 3)
    diagonal = torch.eye(6, 5, dtype=dtype).expand(3, 6, 5)
    for case in (
        (zero(U), S, V, H),
        (U, zero(S), V, H),
        (U, S, zero(V), H),
        (U, S, V, zero(H)),
        (zero(U), zero(S), zero(V), zero(H)),
        (eye[0], S, eye[1], H),
        (eye[0], torch.ones_like(S), eye[1], diagonal),
    ):
        inputs = [x.clone().requires_grad_() for x in case]
        loss, terms = stem.aeplus_loss(*inputs, **WEIGHTS, match=match)
        assert loss.isfinite()
        assert all(term.isfinite() for term in terms)
        assert all(x.isfinite().all() for x in torch.autograd.grad(loss, inputs))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float32])
def test_norms_have_zero_subgradient_at_zero(stem, dtype):
    U = torch.eye(6, 3, dtype=dtype).expand(2, 6, 3).clone().requires_grad_()
    V = torch.eye(5, 3, dtype=dtype).expand(2, 5, 3).clone().requires_grad_()
    S = torch.ones(2, 3, requires_grad=True)
    H = torch.eye(6, 5, dtype=dtype) * torch.tensor([1.0, 1, 1, 0, 0])
    H = H.expand(2, 6, 5).clone()
    nothing = {"lam": 0.0, "w_energy": 0.0, "w_diag": 0.0, "w_match": 0.0}
    # every one of these terms sits at the kink of its norm
    for name in ("lam", "w_diag", "w_match", None):
        for match in ("norm", "mean"):
            weights = nothing | ({name: 1.0} if name else {})
            loss, _ = stem.aeplus_loss(U, S, V, H, **weights, match=match)
            assert loss == 0
            for x in torch.autograd.grad(loss, (U, S, V)):
                assert (x == 0).all(), (name, match)


def test_gradients_of_the_weights_are_the_terms(stem):
    arguments = problem(6, 5, 3)
    weights = {name: torch.tensor(w, dtype=torch.float64, requires_grad=True) for name, w in WEIGHTS.items()}
    loss, terms = stem.aeplus_loss(*(x.requires_grad_() for x in arguments), **weights)
    loss.backward()
    assert not any(term.requires_grad for term in terms)
    for name, term in zip(WEIGHTS, ("ortho", "energy", "diag", "match"), strict=True):
        torch.testing.assert_close(weights[name].grad, getattr(terms, term))


def test_double_weights_do_not_promote_the_loss(stem):
    arguments = problem(6, 5, 3, dtype=torch.complex64)
    weights = {name: torch.tensor(w, dtype=torch.float64, requires_grad=True) for name, w in WEIGHTS.items()}
    loss, terms = stem.aeplus_loss(*arguments, **weights)
    assert loss.dtype == terms.rec.dtype == torch.float32
    loss.backward()
    assert all(w.grad.dtype == torch.float64 for w in weights.values())


def test_mean_over_the_batch(stem):
    arguments = problem(6, 5, 3, B=4)
    losses = [stem.aeplus_loss(*(x[b] for x in arguments), **WEIGHTS)[0] for b in range(4)]
    torch.testing.assert_close(stem.aeplus_loss(*arguments, **WEIGHTS)[0], torch.stack(losses).mean())
    grid = [x.view(2, 2, *x.shape[1:]) for x in arguments]
    torch.testing.assert_close(stem.aeplus_loss(*grid, **WEIGHTS)[0], torch.stack(losses).mean())


@pytest.mark.parametrize("namespace", [reference, lomacs_fast], ids=["reference", "lomacs_fast"])
def test_module(namespace):
    module = namespace.AEPlusLoss()
    assert module.match == "norm"
    assert module.terms is None
    assert module.state_dict() == {}
    names = list(inspect.signature(module.forward).parameters)
    assert names == ["U", "S", "V", "H", "w_energy", "w_diag", "w_match", "lam"]
    arguments = problem(6, 5, 3)
    for match in ("norm", "mean"):
        module = namespace.AEPlusLoss(match=match)
        loss = module(*arguments, 0.4, 0.3, 0.2, 0.35)
        expected, terms = reference.aeplus_loss(*arguments, **WEIGHTS, match=match)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.stack(module.terms), torch.stack(terms))
    with pytest.raises(ValueError, match='match must be "norm" or "mean", got \'max\''):
        namespace.AEPlusLoss("max")


def test_module_compiles_in_one_graph():
    module, arguments = lomacs_fast.AEPlusLoss(), problem(6, 5, 3)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    lam = torch.tensor(0.35, dtype=torch.float64)
    torch.testing.assert_close(
        compiled(*arguments, 0.4, 0.3, 0.2, lam), module(*arguments, 0.4, 0.3, 0.2, lam)
    )
