"""The dual view against banded pooling and upsampling matrices and loops over tokens."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lomacs_fast import functional, reference

SIZES = [(2, 2, 1), (3, 2, 3), (8, 6, 4), (5, 12, 5), (63, 11, 3)]


@pytest.fixture(params=[reference, functional], ids=["reference", "functional"])
def stem(request):
    return request.param


def problem(M, N, d, B=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(d, 4 * N), (d,), (1, M, d)]
    weights = [torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes]
    return torch.randn(B, M, N, dtype=torch.complex128, generator=generator), weights


def coarsen(n):
    """The n x n matrix that averages pairs and interpolates linearly back, half-pixel centres."""
    half = n // 2
    pool = np.zeros((half, n))
    for i in range(half):
        pool[i, 2 * i] = pool[i, 2 * i + 1] = 0.5
    up = np.zeros((n, half))
    for i in range(n):
        centre = min(max((i + 0.5) * half / n - 0.5, 0), half - 1)
        low = int(np.floor(centre))
        up[i, low] += 1 - (centre - low)
        up[i, min(low + 1, half - 1)] += centre - low
    return up @ pool


def oracle(Hd, weight, bias, pos):
    M, N = Hd.shape
    coarse = coarsen(M) @ Hd @ coarsen(N).T
    tokens = np.zeros((M, len(bias)))
    for m in range(M):
        features = np.zeros(4 * N)
        for n in range(N):
            features[2 * n], features[2 * n + 1] = Hd[m, n].real, Hd[m, n].imag
            features[2 * N + 2 * n], features[2 * N + 2 * n + 1] = coarse[m, n].real, coarse[m, n].imag
        tokens[m] = weight @ features + bias + pos[0, m]
    return tokens


@pytest.mark.parametrize(("M", "N", "d"), SIZES)
def test_equals_the_formula(stem, M, N, d):
    Hd, weights = problem(M, N, d)
    out = stem.dual_view_project(Hd, *weights)
    assert out.shape == (2, M, d)
    for b in range(2):
        want = oracle(Hd[b].numpy(), *(w.numpy() for w in weights))
        np.testing.assert_allclose(out[b], want, rtol=1e-12, atol=1e-12)


@given(M=st.integers(2, 15), N=st.integers(2, 15), seed=st.integers(0, 99))
@settings(derandomize=True, deadline=None, max_examples=20)
def test_coarse_map_is_two_banded_matrices(M, N, seed):
    Hd, _ = problem(M, N, 1, seed=seed)
    coarse = reference.coarse_map(Hd)
    assert coarse.shape == (2, 2, M, N)
    for b in range(2):
        want = coarsen(M) @ Hd[b].numpy() @ coarsen(N).T
        np.testing.assert_allclose(coarse[b, 0], want.real, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(coarse[b, 1], want.imag, rtol=1e-12, atol=1e-13)


def test_coarse_map_keeps_a_constant():
    Hd = torch.full((1, 7, 10), 3 - 2j, dtype=torch.complex128)
    coarse = reference.coarse_map(Hd)
    torch.testing.assert_close(coarse, torch.view_as_real(Hd).permute(0, 3, 1, 2).contiguous())


def test_linear_in_the_channel(stem):
    (x, weights), (y, _) = problem(6, 5, 4), problem(6, 5, 4, seed=1)
    nothing = stem.dual_view_project(torch.zeros_like(x), *weights)
    torch.testing.assert_close(nothing, (weights[1] + weights[2]).expand_as(nothing))
    both = stem.dual_view_project(x + 2 * y, *weights) - nothing
    apart = [stem.dual_view_project(z, *weights) - nothing for z in (x, y)]
    torch.testing.assert_close(both, apart[0] + 2 * apart[1])
