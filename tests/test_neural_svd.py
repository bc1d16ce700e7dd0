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
