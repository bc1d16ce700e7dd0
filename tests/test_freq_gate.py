"""The frequency gate against explicit DFT matrices, its symmetries and its module."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lomacs_fast
from lomacs_fast import evaluation, functional, reference, use_backend

SIZES = [(1, 1, 1), (1, 7, 2), (8, 8, 4), (11, 6, 5), (63, 11, 3)]


@pytest.fixture(params=[reference, functional], ids=["reference", "functional"])
def stem(request):
    return request.param


def problem(M, N, hidden, B=3, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(hidden, M), (M, hidden), (hidden, N), (N, hidden)]
    weights = [torch.randn(s, dtype=dtype, generator=generator) / s[1] ** 0.5 for s in shapes]
    return torch.randn(
        B, M, N, dtype=torch.promote_types(dtype, torch.complex32), generator=generator
    ), weights


def dft(n):
    j = np.arange(n)
    return np.exp(-2j * np.pi * np.outer(j, j) / n) / np.sqrt(n)


def oracle(H, row_w1, row_w2, col_w1, col_w2, temperature):
    """Gate and gated channel of one sample, sums written out."""
    M, N = H.shape
    rows, cols = dft(M), dft(N)
    Hf = rows @ H @ cols.T
    rho = [np.mean([abs(Hf[m, n]) for n in range(N)]) for m in range(M)]
    kappa = [np.mean([abs(Hf[m, n]) for m in range(M)]) for n in range(N)]
    a = row_w2 @ np.maximum(row_w1 @ rho, 0)
    b = col_w2 @ np.maximum(col_w1 @ kappa, 0)
    gate = np.array([[1 / (1 + np.exp(-(a[m] + b[n]) / temperature)) for n in range(N)] for m in range(M)])
    return gate, rows.conj().T @ (Hf * gate) @ cols.conj()


@pytest.mark.parametrize(("M", "N", "hidden"), SIZES)
def test_equals_the_formula(stem, M, N, hidden):
    H, weights = problem(M, N, hidden)
    out = stem.freq_gate(H, *weights, 0.3)
    gate = stem.spectral_gate(torch.fft.fft2(H, norm="ortho"), *weights, 0.3)
    for b in range(len(H)):
        want_gate, want = oracle(H[b].numpy(), *(w.numpy() for w in weights), 0.3)
        np.testing.assert_allclose(gate[b], want_gate, rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(out[b], want, rtol=1e-11, atol=1e-12)


@given(M=st.integers(1, 13), N=st.integers(1, 13), hidden=st.integers(1, 5), seed=st.integers(0, 99))
@settings(derandomize=True, deadline=None, max_examples=20)
def test_any_size_equals_the_formula(M, N, hidden, seed):
    H, weights = problem(M, N, hidden, B=1, seed=seed)
    _, want = oracle(H[0].numpy(), *(w.numpy() for w in weights), 0.7)
    np.testing.assert_allclose(functional.freq_gate(H, *weights, 0.7)[0], want, rtol=1e-10, atol=1e-12)


def test_any_number_of_batch_dimensions(stem):
    H, weights = problem(6, 5, 4, B=6)
    batched = stem.freq_gate(H, *weights, 0.2)
    torch.testing.assert_close(stem.freq_gate(H.view(2, 3, 6, 5), *weights, 0.2).view(6, 6, 5), batched)
    torch.testing.assert_close(stem.freq_gate(H[2], *weights, 0.2), batched[2])


def test_energy_is_that_of_the_gated_spectrum(stem):
    H, weights = problem(12, 9, 4)
    Hf = torch.fft.fft2(H, norm="ortho")
    gate = stem.spectral_gate(Hf, *weights, 0.2)
    assert ((gate >= 0) & (gate <= 1)).all()
    norm = torch.linalg.matrix_norm
    torch.testing.assert_close(norm(stem.freq_gate(H, *weights, 0.2)), norm(Hf * gate))


def test_linear_where_the_gate_is_fixed(stem):
    H, weights = problem(6, 8, 4)
    weights[0], weights[2] = -weights[0].abs(), -weights[2].abs()  # no hidden unit fires: the gate is 1/2
    torch.testing.assert_close(stem.freq_gate(H, *weights, 0.2), H / 2)
    # a gate that does not look at its input: the same multiplier for every spectrum of equal magnitude
    H, weights = problem(6, 8, 4)
    phases = torch.polar(torch.ones(3, 6, 8, dtype=torch.float64), H.real)
    x, y = torch.fft.ifft2(phases), torch.fft.ifft2(phases.conj().resolve_conj())
    gate = stem.spectral_gate(torch.fft.fft2(x, norm="ortho"), *weights, 0.2)
    both = stem.freq_gate(x, *weights, 0.2) + 2j * stem.freq_gate(y, *weights, 0.2)
    torch.testing.assert_close(torch.fft.fft2(both), torch.fft.fft2(x + 2j * y) * gate)


def test_commutes_with_shifts_and_phases(stem):
    H, weights = problem(7, 6, 4)
    out = stem.freq_gate(H, *weights, 0.2)
    shifted = stem.freq_gate(H.roll((2, 5), (1, 2)), *weights, 0.2)
    torch.testing.assert_close(shifted, out.roll((2, 5), (1, 2)))
    torch.testing.assert_close(stem.freq_gate(H * 1j, *weights, 0.2), out * 1j)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_channel(stem, dtype):
    H, weights = problem(6, 5, 4, dtype=dtype)
    H[1] = 0
    for x in (H, *weights):
        x.requires_grad_()
    out = stem.freq_gate(H, *weights, 0.2)
    assert (out[1] == 0).all()
    out.abs().sum().backward()
    assert all(x.grad.isfinite().all() for x in (H, *weights))
    assert (stem.spectral_gate(torch.zeros(6, 5, dtype=H.dtype), *weights, 0.2) == 0.5).all()


def test_saturated_gate_is_finite(stem):
    H, weights = problem(6, 5, 4, dtype=torch.float32)
    for scale in (1e4, -1e4):
        H.grad = None
        out = stem.freq_gate(H.requires_grad_(), weights[0], weights[1] * scale, *weights[2:], 1e-3)
        out.abs().sum().backward()
        assert out.isfinite().all()
        assert H.grad.isfinite().all()


def test_empty_batch_reaches_the_weights(stem):
    H, weights = problem(6, 5, 4, B=0)
    gradients = torch.autograd.grad(
        stem.freq_gate(H, *(w.requires_grad_() for w in weights), 0.2).real.sum(), weights
    )
    assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e20])
def test_the_gate_that_a_figure_shows(scale):
    """That of the channel as the network sees it: normalised, at any scale."""
    torch.manual_seed(0)
    net = lomacs_fast.LoMACSSVDNet(6, 5, 2, 1, dim=8, groups=2, k_len=3)
    H = problem(6, 5, 1, dtype=torch.float32)[0][0]
    gate = evaluation.gate_of(net, H * scale)
    want = net.freq_gate(torch.fft.fft2(H / torch.linalg.matrix_norm(H), norm="ortho"))
    assert not gate.requires_grad
    torch.testing.assert_close(gate, want.detach())


@pytest.mark.parametrize("namespace", [reference, lomacs_fast], ids=["reference", "lomacs_fast"])
def test_module(namespace):
    module = namespace.AxialLowRankFreqGate(6, 5, hidden=3, temperature=0.4)
    assert {name: tuple(w.shape) for name, w in module.state_dict().items()} == {
        "row_mlp.0.weight": (3, 6),
        "row_mlp.2.weight": (6, 3),
        "col_mlp.0.weight": (3, 5),
        "col_mlp.2.weight": (5, 3),
    }
    for w in module.parameters():
        assert 0 < w.abs().max() <= (6 / sum(w.shape)) ** 0.5
    H, _ = problem(6, 5, 3, dtype=torch.float32)
    weights = list(module.state_dict().values())
    Hf = torch.fft.fft2(H, norm="ortho")
    assert torch.equal(module(Hf), reference.spectral_gate(Hf, *weights, 0.4))
    with use_backend("eager"):
        assert torch.equal(module.filter(H), reference.freq_gate(H, *weights, 0.4))
    torch.testing.assert_close(module.filter(H), reference.freq_gate(H, *weights, 0.4))
    default = namespace.AxialLowRankFreqGate(6, 5)
    assert default.row_mlp[0].weight.shape == (32, 6)
    assert default.temperature == 0.2
    for kwargs, words in [
        ({"hidden": 0}, "hidden must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"temperature": float("nan")}, "temperature must be positive and finite, got nan"),
        ({"temperature": float("inf")}, "temperature must be positive and finite, got inf"),
    ]:
        with pytest.raises(ValueError, match=re.escape(words)):
            namespace.AxialLowRankFreqGate(6, 5, **kwargs)
