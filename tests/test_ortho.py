"""Column normalisation, the refiner and Björck's iteration: formulas, convergence, bounds, zeros, module."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lomacs_fast
from lomacs_fast import functional, reference

SIZES = [(6, 4), (5, 5), (1, 1), (63, 11), (4, 1)]
DTYPES = [torch.complex128, torch.float64]


@pytest.fixture(params=[reference, functional], ids=["reference", "functional"])
def stem(request):
    return request.param


def matrices(M, r, B=3, dtype=torch.complex128, seed=0):
    return torch.randn(B, M, r, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def conditioned(M, r, condition, B=3, dtype=torch.complex128):
    """Singular values from 1 down to 1 / condition; the matrices, and the nearest orthonormal ones."""
    left, right = (torch.linalg.qr(matrices(n, r, B, dtype, seed=n))[0] for n in (M, r))
    sigma = torch.logspace(0, -math.log10(condition), r, dtype=torch.float64)
    return left * sigma @ right.mH, left @ right.mH


def defect(U):
    return torch.linalg.matrix_norm(U.mH @ U - torch.eye(U.shape[-1], dtype=U.dtype))


def normalized(U):
    """Columns of one matrix divided by (norm + 1e-8)."""
    out = np.zeros_like(U)
    for k in range(U.shape[1]):
        out[:, k] = U[:, k] / (np.sqrt(sum(abs(u) ** 2 for u in U[:, k])) + 1e-8)
    return out


def refined(U, a):
    r = U.shape[1]
    G = np.array([[np.vdot(U[:, i], U[:, j]) - (i == j) for j in range(r)] for i in range(r)])
    sym = np.array([[(G[i, j] + np.conj(G[j, i])) / 2 for j in range(r)] for i in range(r)])
    return normalized(U - a * U @ sym)


def scaled(U, order):
    c = {1: 1.6, 2: 1.5}[order]
    gram = U.conj().T @ U
    return U * min(1, c / np.sqrt(max(sum(abs(g) for g in row) for row in gram)))


def iterated(U, steps, order):
    U, eye = scaled(U, order), np.eye(U.shape[1])
    for _ in range(steps):
        G = U.conj().T @ U
        U = U @ (1.5 * eye - 0.5 * G if order == 1 else 15 / 8 * eye - 5 / 4 * G + 3 / 8 * G @ G)
    return U


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "r"), SIZES)
def test_normalize_and_refine_equal_the_formulas(stem, M, r, dtype):
    U = matrices(M, r, dtype=dtype)
    out, steps = stem.column_normalize(U), stem.ortho_refine(U, 0.3)
    for b in range(len(U)):
        np.testing.assert_allclose(out[b], normalized(U[b].numpy()), rtol=1e-13)
        np.testing.assert_allclose(steps[b], refined(U[b].numpy(), 0.3), rtol=1e-10, atol=1e-13)


def test_denominator_is_the_norm_and_a_hundred_millionth(stem):
    U = torch.full((1, 1), 1e-8, dtype=torch.float64)
    assert stem.column_normalize(U).item() == pytest.approx(0.5, rel=1e-12)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "r"), SIZES)
def test_bjorck_equals_the_formula(stem, M, r, dtype, order):
    for U in (matrices(M, r, dtype=dtype), matrices(M, r, dtype=dtype) / (3 * M)):
        for steps in (0, 1, 3):
            out = stem.bjorck(U, steps, order)
            for b in range(len(U)):
                np.testing.assert_allclose(
                    out[b], iterated(U[b].numpy(), steps, order), rtol=1e-11, atol=1e-13
                )


def test_first_order_is_the_default(stem):
    U = matrices(6, 4)
    assert torch.equal(stem.bjorck(U, 2), stem.bjorck(U, 2, 1))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_zero_steps_return_the_scaled_input(stem, dtype, order):
    inside = matrices(6, 4, dtype=dtype) / 50
    assert torch.equal(stem.bjorck(inside, 0, order), inside)
    outside = matrices(6, 4, dtype=dtype) * 50
    shrunk = stem.bjorck(outside, 0, order)
    ratio = (shrunk / outside).real
    torch.testing.assert_close(ratio, ratio[:, :1, :1].expand_as(ratio))
    assert torch.equal(stem.bjorck(inside, 0, order) * 0, torch.zeros_like(inside))


@pytest.mark.parametrize(("order", "c", "radius"), [(1, 1.6, 3**0.5), (2, 1.5, (7 / 3) ** 0.5)])
def test_spectral_norm_after_scaling(stem, order, c, radius):
    generator = torch.Generator().manual_seed(2)
    equal = matrices(8, 1).expand(3, 8, 5)
    signs = torch.randn(3, 8, 8, dtype=torch.float64, generator=generator).sign()
    hostile = {
        "random": matrices(8, 5) * 10,
        "square": matrices(9, 9) * 10,
        "equal columns": equal * 7,
        "ones": torch.ones(8, 8, dtype=torch.float64),
        "signs": signs,
        "one entry": torch.eye(8, 5, dtype=torch.float64) * torch.tensor([1e6, 1, 1, 1, 1e-6]),
        "one large column": matrices(8, 5) * torch.tensor([1e5, 1, 1, 1, 1]),
        "rank one": matrices(8, 1) @ matrices(5, 1, seed=1).mH * 1e3,
        "phases": torch.polar(torch.ones(8, 8, dtype=torch.float64), signs[0] * 2) * 1e4,
        "orthogonal": torch.linalg.qr(matrices(8, 8))[0] * 1e4,
    }
    for name, U in hostile.items():
        norm = torch.linalg.matrix_norm(stem.bjorck(U, 0, order), 2)
        assert (norm <= c * (1 + 1e-12)).all(), name
        assert (norm < radius).all(), name
        assert stem.bjorck(U, 8, order).isfinite().all(), name
    # the bound is met where all columns are one, and where they are orthogonal
    for name in ("equal columns", "ones", "orthogonal"):
        norm = torch.linalg.matrix_norm(stem.bjorck(hostile[name], 0, order), 2)
        torch.testing.assert_close(norm, torch.full_like(norm, c), rtol=1e-10, atol=0)


@given(
    M=st.integers(1, 12),
    drop=st.integers(0, 11),
    scale=st.floats(-6, 6),
    skew=st.floats(0, 6),
    seed=st.integers(0, 999),
)
@settings(derandomize=True, deadline=None, max_examples=40)
def test_spectral_norm_after_scaling_anywhere(M, drop, scale, skew, seed):
    r = max(1, M - drop)
    U = matrices(M, r, B=1, seed=seed) * 10**scale
    U = U * torch.logspace(0, -skew, r, dtype=torch.float64)
    for order, c in ((1, 1.6), (2, 1.5)):
        out = functional.bjorck(U, 0, order)
        assert (torch.linalg.matrix_norm(out, 2) <= c * (1 + 1e-12)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_bjorck_converges_to_the_nearest_orthonormal_matrix(stem, dtype):
    U, nearest = conditioned(12, 6, 100, dtype=dtype)
    for order, steps in ((1, 20), (2, 14)):
        out = stem.bjorck(U, steps, order)
        assert (defect(out) < 1e-10).all()
        torch.testing.assert_close(out, nearest, rtol=0, atol=1e-10)
    # one step leaves (3 + e) e^2 / 4 of a defect e at first order, (5/8) e^3 or so at second
    near, _ = conditioned(12, 6, 1.02, dtype=dtype)
    before = defect(near)
    assert (defect(stem.bjorck(near, 1, 1)) < before**2).all()
    assert (defect(stem.bjorck(near, 1, 2)) < before**3).all()


def test_orthonormal_columns_stay(stem):
    U = torch.linalg.qr(matrices(9, 4))[0]
    torch.testing.assert_close(stem.bjorck(U, 5, 1), U)
    torch.testing.assert_close(stem.bjorck(U, 5, 2), U)
    torch.testing.assert_close(stem.ortho_refine(U, 0.5), U / (1 + 1e-8), rtol=1e-13, atol=1e-15)


def test_rank_is_not_created(stem):
    U = matrices(8, 2) @ matrices(4, 2, seed=1).mH
    out = stem.bjorck(U, 30)
    sigma = torch.linalg.svdvals(out)
    torch.testing.assert_close(sigma[:, :2], torch.ones(3, 2, dtype=torch.float64), rtol=0, atol=1e-10)
    assert (sigma[:, 2:] < 1e-6).all()


@pytest.mark.parametrize("step", [0.01, 0.05, 0.1])
def test_refinement_decreases_the_defect(stem, step):
    generator = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(matrices(16, 6, B=32))[0]
    noise = 0.1 * torch.randn(32, 16, 6, dtype=basis.dtype, generator=generator)
    U = stem.column_normalize(basis + noise)
    refined_once = stem.ortho_refine(U, step)
    assert (defect(refined_once) < defect(U)).all()
    # to first order a step takes 2 a of the defect
    share = 1 - defect(refined_once) / defect(U)
    torch.testing.assert_close(share, torch.full_like(share, 2 * step), rtol=0.6, atol=0)


def test_refinement_commutes_with_rotations_and_column_phases(stem):
    U = matrices(7, 4)
    rotation = torch.linalg.qr(matrices(7, 7, B=1, seed=1)[0])[0]
    phases = torch.polar(torch.ones(4, dtype=torch.float64), torch.arange(4.0).double())
    for fn in (lambda x: stem.ortho_refine(x, 0.2), lambda x: stem.bjorck(x, 3), stem.column_normalize):
        torch.testing.assert_close(fn(rotation @ U), rotation @ fn(U))
        torch.testing.assert_close(fn(U * phases), fn(U) * phases)
        torch.testing.assert_close(fn(U[..., [2, 0, 3, 1]]), fn(U)[..., [2, 0, 3, 1]])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float32, torch.complex128])
def test_zeros(stem, dtype):
    zero, one_dead = torch.zeros(2, 5, 3, dtype=dtype), matrices(5, 3, B=2, dtype=dtype)
    one_dead[..., 1] = 0
    for U in (zero, one_dead):
        for fn in (
            stem.column_normalize,
            lambda x: stem.ortho_refine(x, 0.3),
            lambda x: stem.bjorck(x, 3, 1),
            lambda x: stem.bjorck(x, 3, 2),
        ):
            x = U.clone().requires_grad_()
            out = fn(x)
            assert (out[x == 0] == 0).all()
            assert out.isfinite().all()
            (gradient,) = torch.autograd.grad((out * torch.arange(3)).real.sum(), x)
            assert gradient.isfinite().all()


def test_more_columns_than_rows_are_refused():
    with pytest.raises(ValueError, match=re.escape("got (3, 4, 5)")):
        functional.bjorck(matrices(4, 5), 2)


@pytest.mark.parametrize("namespace", [reference, lomacs_fast], ids=["reference", "lomacs_fast"])
def test_module(namespace):
    module = namespace.NeuralOrthoRefiner()
    assert {name: tuple(p.shape) for name, p in module.state_dict().items()} == {"a_raw": (), "b_raw": ()}
    assert [s.item() for s in module.steps] == pytest.approx([0.1, 0.1])
    U, V = matrices(6, 3).to(torch.complex64), matrices(5, 3).to(torch.complex64)
    with torch.no_grad():
        module.a_raw.fill_(0.4)
        module.b_raw.fill_(-1.2)
    a, b = (0.5 / (1 + math.exp(-x)) for x in (0.4, -1.2))
    for got, want in zip(
        module(U, V), (reference.ortho_refine(U, a), reference.ortho_refine(V, b)), strict=True
    ):
        torch.testing.assert_close(got, want)
    module(U, V)[0].abs().sum().backward()
    assert module.a_raw.grad.abs() > 0
    assert not module.b_raw.grad
    assert namespace.NeuralOrthoRefiner(0.2, 0.4).steps[0].item() == pytest.approx(0.2)
    for kwargs, words in [
        ({"max_scale": 0.6}, "max_scale must lie in (0, 0.5], got 0.6"),
        ({"init_scale": 0.5}, "init_scale must lie in (0, max_scale=0.5), got 0.5"),
        ({"init_scale": 0.0}, "init_scale must lie in (0, max_scale=0.5), got 0.0"),
    ]:
        with pytest.raises(ValueError, match=re.escape(words)):
            namespace.NeuralOrthoRefiner(**kwargs)
