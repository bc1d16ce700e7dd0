"""The angular gate against its formula, and the completion from unused DFT columns."""

import math

import pytest
import torch

from lomacs_fast.data.generator import ChannelGenerator
from lomacs_fast.reference import AngularGate
from lomacs_fast.reference.completion import complete_from_dft
from lomacs_fast.reference.refine import dft_basis


def steering(array):
    """Unit steering vectors `(e, 2 rows, 2 columns)` of a panel, in double precision."""
    _, a, b = array
    i = torch.arange(a * b)
    g, h = torch.arange(2 * a)[:, None], torch.arange(2 * b)
    turns = (i // b)[:, None, None] * g.double() / (2 * a) + (i % b)[:, None, None] * h.double() / (2 * b)
    return torch.polar(torch.full_like(turns, 1 / math.sqrt(a * b)), 2 * math.pi * turns)


def covariance(batch, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(batch, n, 3, dtype=torch.complex128, generator=generator)
    return X @ X.mH / n + 0.1 * torch.eye(n)


@pytest.mark.parametrize("array", [(2, 2, 3), (1, 1, 11), (3, 1, 2), (1, 3, 1)])
def test_the_gate_is_its_formula(array):
    n = math.prod(array)
    H = covariance(3, n)
    H[2] = 0
    gate = AngularGate(array, 2, 3).double()
    with torch.no_grad():
        gate.second.weight.normal_(std=0.3)
        gate.scene_bias.weight.normal_()
    scene = torch.tensor([1, 0, 1])
    p, e = array[0], n // array[0]
    a = steering(array)
    C = sum(H[:, q * e : (q + 1) * e, q * e : (q + 1) * e] for q in range(p)) / p
    P = torch.einsum("igh,bij,jgh->bgh", a.conj(), C, a).real
    assert (gate.spectrum(H) - P).abs().max() < 1e-12
    weights, floor = gate.gate(H, scene)
    torch.testing.assert_close(floor[:, 0], gate.c_raw.exp() * P.flatten(1).amin(1), rtol=1e-6, atol=1e-12)
    # W = sum_g gate_g a_g a_g^H e / grid, the inverse FFT at every lag
    W = torch.einsum("bgh,igh,jgh->bij", weights.to(a.dtype), a, a.conj()) * (e / a[0].numel())
    W = torch.block_diag(*[torch.ones(1)] * p).to(W.dtype)[None, :, None, :, None] * W[:, None, :, None, :]
    W = W.reshape(3, n, n)
    Y, _ = gate(H, scene)
    expected = W @ (H - floor[..., None] * torch.eye(n)) @ W.mH
    torch.testing.assert_close(Y, expected, rtol=1e-10, atol=1e-12)
    assert Y[2].abs().max() == 0
    torch.testing.assert_close(Y, Y.mH, rtol=1e-10, atol=1e-12)


def test_gradients_of_the_gate():
    H = covariance(2, 4)
    gate = AngularGate((2, 1, 2), 2, 2).double()
    with torch.no_grad():
        gate.second.weight.normal_(std=0.3)
    names, values = zip(*gate.named_parameters(), strict=True)

    def call(*values):
        Y, floor = torch.func.functional_call(
            gate, dict(zip(names, values, strict=True)), (H, torch.tensor([0, 1]))
        )
        return torch.view_as_real(Y.resolve_conj()), floor

    assert torch.autograd.gradcheck(call, values)


@pytest.mark.parametrize(("n", "k", "columns"), [(16, 6, 8), (16, 3, 11), (12, 5, 5), (9, 1, 9)])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_a_completion_is_orthonormal(n, k, columns, dtype):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(5, n, k, dtype=torch.complex128, generator=generator)
    X[0] = dft_basis(n, X)[:, :k]
    U = torch.linalg.qr(X)[0].to(dtype)
    rest = complete_from_dft(U, columns)
    assert rest.shape == (5, n, columns - k)
    Q = torch.cat([U, rest], -1)
    error = (Q.mH @ Q - torch.eye(columns)).abs().amax()
    assert error < 40 * torch.finfo(dtype).eps * max(columns, 1)


def test_a_span_inside_the_unused_columns_is_completed_too():
    # every vector is spread over two DFT columns, so a combination lies among those of least energy
    n, k = 16, 6
    F = dft_basis(n, torch.zeros(1, dtype=torch.complex64))
    U = torch.stack([(F[:, 2 * i] + F[:, 2 * i + 1]) / math.sqrt(2) for i in range(k)], -1)[None]
    rest = complete_from_dft(U, 15)
    Q = torch.cat([U, rest], -1)
    assert (Q.mH @ Q - torch.eye(15)).abs().amax() < 1e-5


def test_the_floor_of_white_noise():
    noise = ChannelGenerator(16, 16, scenario=1, seed=3, snr_db=-60.0).batch([0, 1]).input
    gate = AngularGate((2, 2, 4), 1)
    power = noise.diagonal(dim1=1, dim2=2).real.mean(1)
    floor = gate(noise, torch.zeros(2, dtype=torch.long))[1][:, 0]
    assert ((floor / power - 0.85).abs() < 0.1).all()


@pytest.mark.parametrize("array", [(2, 4), "2x4x8", (2, 4, 0), 8])
def test_a_panel_that_is_none_is_refused(array):
    from lomacs_fast import LoMACSSVDNet

    with pytest.raises((TypeError, ValueError), match="array"):
        LoMACSSVDNet(64, 64, 8, 1, head="angular", refine_steps=1, hermitian=True, array=array)
