"""The low-rank objective: full, nested and by minibatches, from its definition."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lomacs_fast import functional, reference

DTYPES = [torch.complex128, torch.float64]
SIZES = [(6, 5, 3), (1, 1, 1), (4, 9, 1), (11, 63, 11)]


@pytest.fixture(params=[reference, functional], ids=["reference", "functional"])
def stem(request):
    return request.param


def problem(M, N, L, dtype=torch.complex128, seed=0, batch=()):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*batch, *s, dtype=dtype, generator=generator) for s in ((N, L), (M, L), (M, N))]


def objective(F, G, H):
    """`|H - G F^H|^2 - |H|^2`, entry by entry."""
    return np.sum(np.abs(H - G @ F.conj().T) ** 2) - np.sum(np.abs(H) ** 2)


def nested(F, G, H):
    L = F.shape[1]
    return sum(objective(F[:, :n], G[:, :n], H) for n in range(1, L + 1)) / L


def gradients(fn, F, G):
    inputs = [x.clone().requires_grad_() for x in (F, G)]
    return torch.autograd.grad(fn(*inputs), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "N", "L"), SIZES)
def test_values_equal_the_definitions(stem, M, N, L, dtype):
    F, G, H = problem(M, N, L, dtype)
    arrays = [x.numpy() for x in (F, G, H)]
    for nesting, want in (("none", objective), ("joint", nested), ("sequential", objective)):
        value = stem.low_rank_loss(F, G, H, nesting)
        assert value.shape == ()
        assert value.dtype == torch.float64
        np.testing.assert_allclose(value, want(*arrays), rtol=1e-11)
    assert torch.equal(stem.low_rank_loss(F, G, H), stem.low_rank_loss(F, G, H, "none"))


@given(M=st.integers(1, 9), N=st.integers(1, 9), L=st.integers(1, 9), seed=st.integers(0, 99))
@settings(derandomize=True, deadline=None, max_examples=15)
def test_any_size_equals_the_definitions(M, N, L, seed):
    F, G, H = problem(M, N, L, seed=seed)
    arrays = [x.numpy() for x in (F, G, H)]
    scale = np.sum(np.abs(arrays[1] @ arrays[0].conj().T) ** 2) + np.sum(np.abs(arrays[2]) ** 2)
    for nesting, want in (("none", objective), ("joint", nested), ("sequential", objective)):
        value = functional.low_rank_loss(F, G, H, nesting).item()
        assert value == pytest.approx(want(*arrays), abs=1e-12 * scale)


def central_differences(fn, x):
    """Gradient dL/dRe + i dL/dIm of a quadratic in x: central differences are exact but for rounding."""
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        for unit in (1, 1j) if np.iscomplexobj(x) else (1,):
            up, down = x.copy(), x.copy()
            up[index] += unit * 0.5
            down[index] -= unit * 0.5
            gradient[index] += unit * (fn(up) - fn(down))
    return gradient


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "N", "L"), [(4, 5, 3), (3, 2, 4), (2, 2, 1)])
def test_sequential_gradient_is_that_of_the_first_columns(stem, M, N, L, dtype):
    F, G, H = problem(M, N, L, dtype)
    f, g, h = (x.numpy() for x in (F, G, H))
    got_f, got_g = gradients(lambda F, G: stem.low_rank_loss(F, G, H, "sequential"), F, G)
    for k in range(L):

        def first(column_f, column_g, k=k):
            left, right = f[:, : k + 1].copy(), g[:, : k + 1].copy()
            left[:, k], right[:, k] = column_f, column_g
            return objective(left, right, h)

        want_f = central_differences(lambda x, k=k: first(x, g[:, k]), f[:, k])
        want_g = central_differences(lambda x, k=k: first(f[:, k], x), g[:, k])
        np.testing.assert_allclose(got_f[:, k], want_f, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(got_g[:, k], want_g, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_joint_gradient_by_finite_differences(stem, dtype):
    F, G, H = problem(4, 3, 3, dtype)
    f, g, h = (x.numpy() for x in (F, G, H))
    got_f, got_g = gradients(lambda F, G: stem.low_rank_loss(F, G, H, "joint"), F, G)
    np.testing.assert_allclose(got_f, central_differences(lambda x: nested(x, g, h), f), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(got_g, central_differences(lambda x: nested(f, x, h), g), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("replace", [False, True], ids=["distinct", "repeated"])
@pytest.mark.parametrize("nesting", ["none", "joint", "sequential"])
def test_minibatches_are_unbiased(stem, nesting, replace, dtype):
    M, N, L = 4, 3, 2
    F, G, H = problem(M, N, L, dtype)
    if replace:
        draws = [list(itertools.product(range(n), repeat=2)) for n in (M, N)]
    else:
        draws = [list(itertools.combinations(range(n), size)) for n, size in ((M, 3), (N, 2))]
    blocks = list(itertools.product(*draws))
    rows, cols = (torch.tensor([block[i] for block in blocks]) for i in (0, 1))

    def mean(F, G):
        sampled = H[rows[:, :, None], cols[:, None, :]]
        return stem.low_rank_loss(F[cols], G[rows], sampled, nesting, shape=(M, N)).mean()

    def full(F, G):
        return stem.low_rank_loss(F, G, H, nesting)

    assert len(blocks) == (16 * 9 if replace else 4 * 3)
    torch.testing.assert_close(mean(F, G), full(F, G))
    for got, want in zip(gradients(mean, F, G), gradients(full, F, G), strict=True):
        torch.testing.assert_close(got, want)


def test_the_whole_matrix_is_its_own_block(stem):
    F, G, H = problem(6, 5, 3)
    for nesting in ("none", "joint", "sequential"):
        torch.testing.assert_close(
            stem.low_rank_loss(F, G, H, nesting, shape=(6, 5)), stem.low_rank_loss(F, G, H, nesting)
        )


def test_batches_give_one_value_a_matrix(stem):
    F, G, H = problem(6, 5, 3, batch=(2, 3))
    for nesting in ("none", "joint", "sequential"):
        values = stem.low_rank_loss(F, G, H, nesting, shape=(9, 8))
        assert values.shape == (2, 3)
        for i, j in np.ndindex(2, 3):
            torch.testing.assert_close(
                values[i, j], stem.low_rank_loss(F[i, j], G[i, j], H[i, j], nesting, shape=(9, 8))
            )


@pytest.mark.parametrize("dtype", DTYPES)
def test_truncated_decomposition_is_the_minimiser(stem, dtype):
    _, _, H = problem(6, 5, 3, dtype)
    U, S, Vh = torch.linalg.svd(H, full_matrices=False)
    G, F = U[:, :3] * S[:3].sqrt(), Vh.mH[:, :3] * S[:3].sqrt()
    energy = S[:3].square()
    torch.testing.assert_close(stem.low_rank_loss(F, G, H), -energy.sum())
    torch.testing.assert_close(stem.low_rank_loss(F, G, H, "joint"), -energy.cumsum(0).mean())
    rotation = torch.linalg.qr(problem(3, 3, 3, dtype, seed=1)[0])[0]
    for nesting in ("none", "joint", "sequential"):
        size = max(
            x.abs().max()
            for x in gradients(lambda F, G, nesting=nesting: stem.low_rank_loss(F, G, H, nesting), F, G)
        )
        rotated = max(
            x.abs().max()
            for x in gradients(
                lambda F, G, nesting=nesting: stem.low_rank_loss(F, G, H, nesting), F @ rotation, G @ rotation
            )
        )
        assert size < 1e-12
        # the plain objective cannot tell a rotation of both factors; the nested ones can
        assert rotated < 1e-12 if nesting == "none" else rotated > 1e-2


@pytest.mark.parametrize("nesting", ["none", "joint", "sequential"])
def test_zeros(stem, nesting):
    F, G, H = problem(6, 5, 3, torch.complex64)
    for dead in range(3):
        inputs = [x.clone() for x in (F, G, H)]
        inputs[dead].zero_()
        inputs = [x.requires_grad_() for x in inputs]
        value = stem.low_rank_loss(*inputs, nesting)
        assert value == 0 if dead < 2 else value > 0
        assert all(x.isfinite().all() for x in torch.autograd.grad(value, inputs))
