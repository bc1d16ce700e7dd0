"""Spectral calibration against triple loops, its ends, symmetries and zeros."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lomacs_fast import functional, reference


@pytest.fixture(params=[reference, functional], ids=["reference", "functional"])
def stem(request):
    return request.param


def problem(M, N, r, B=2, dtype=torch.complex128, seed=0):
    generator = torch.Generator().manual_seed(seed)
    U, V, H = (torch.randn(B, *s, dtype=dtype, generator=generator) for s in ((M, r), (N, r), (M, N)))
    return U, H, V, torch.rand(B, r, dtype=torch.float64, generator=generator)


def oracle(U, H, V, S_pred, tau):
    """One sample; the k-th measured value is |sum_mn conj(U_mk) H_mn V_nk|."""
    (M, N), r = H.shape, len(S_pred)
    out = np.zeros(r)
    for k in range(r):
        measured = abs(sum(np.conj(U[m, k]) * H[m, n] * V[n, k] for m in range(M) for n in range(N)))
        out[k] = (1 - tau) * S_pred[k] + tau * measured + 1e-6
    return out


@pytest.mark.parametrize("dtype", [torch.complex128, torch.float64])
@pytest.mark.parametrize(("M", "N", "r"), [(6, 5, 3), (1, 1, 1), (11, 63, 11), (7, 3, 1)])
def test_equals_the_formula(stem, M, N, r, dtype):
    arguments = problem(M, N, r, dtype=dtype)
    out = stem.spectral_calibrate(*arguments, 0.7)
    assert out.dtype == torch.float64
    for b in range(2):
        want = oracle(*(x[b].numpy() for x in arguments), 0.7)
        np.testing.assert_allclose(out[b], want, rtol=1e-12)


@given(M=st.integers(1, 9), N=st.integers(1, 9), r=st.integers(1, 9), tau=st.floats(0, 1))
@settings(derandomize=True, deadline=None, max_examples=15)
def test_any_size_equals_the_formula(M, N, r, tau):
    arguments = problem(M, N, r, B=1)
    want = oracle(*(x[0].numpy() for x in arguments), tau)
    np.testing.assert_allclose(functional.spectral_calibrate(*arguments, tau)[0], want, rtol=1e-11)


def test_ends_of_tau(stem):
    U, H, V, S_pred = problem(6, 5, 3)
    torch.testing.assert_close(stem.spectral_calibrate(U, H, V, S_pred, 0.0), S_pred + 1e-6)
    P, sigma, Qh = torch.linalg.svd(H, full_matrices=False)
    exact = stem.spectral_calibrate(P, H, Qh.mH, torch.zeros_like(sigma), 1.0)
    torch.testing.assert_close(exact, sigma + 1e-6)


def test_phases_of_columns_do_not_count(stem):
    U, H, V, S_pred = problem(6, 5, 3)
    phases = torch.polar(torch.ones(3, dtype=torch.float64), torch.tensor([0.3, 2.0, -1.0]).double())
    torch.testing.assert_close(
        stem.spectral_calibrate(U * phases, H, V, S_pred, 0.5), stem.spectral_calibrate(U, H, V, S_pred, 0.5)
    )


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float32])
def test_zeros(stem, dtype):
    U, H, V, S_pred = problem(6, 5, 3, dtype=dtype)
    for dead in range(4):
        arguments = [x.clone() for x in (U, H, V, S_pred.float())]
        arguments[dead].zero_()
        inputs = [x.requires_grad_() for x in arguments]
        out = stem.spectral_calibrate(*inputs, 0.5)
        assert (out >= 1e-6).all()
        if dead < 3:
            torch.testing.assert_close(out, 0.5 * inputs[3] + 1e-6)
        gradients = torch.autograd.grad(out.sum(), inputs)
        assert all(x.isfinite().all() for x in gradients)
        if dead < 3:
            # |0| has subgradient 0: only S_pred is felt
            assert all((x == 0).all() for x in gradients[:3])
            assert (gradients[3] == 0.5).all()
