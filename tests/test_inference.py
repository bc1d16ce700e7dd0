"""Factors in the input's own scale and precision, whatever they are."""

import re

import numpy as np
import pytest
import torch

import lomacs_fast
from lomacs_fast.data.augmentation import frobenius_norm, frobenius_normalize, unit_channels
from lomacs_fast.inference import decompose

M, N, R = 7, 5, 3


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return lomacs_fast.LoMACSSVDNet(M, N, R, 2, dim=8, k_len=3, gate_hidden=4).eval()


def channels(n=4, dtype=torch.complex128, seed=1):
    """Entries whose real and imaginary parts are at most 1."""
    H = torch.randn(n, M, N, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    return H / H.abs().amax() if n else H


def scaled(H, factor):
    return torch.view_as_complex(torch.view_as_real(H) * factor)


def relative(x, y):
    return (torch.linalg.vector_norm(x - y) / torch.linalg.vector_norm(y)).item()


@pytest.mark.parametrize("scale", [1e-310, 1e-60, 1.0, 1e60, 1.7e308])
def test_any_scale_of_double_precision(net, scale):
    H = channels()
    U, S, V = decompose(net, H, 1)
    got = decompose(net, scaled(H, scale), 1)
    assert [x.dtype for x in got] == [torch.complex128, torch.float64, torch.complex128]
    assert relative(got[0], U) < 1e-6
    assert relative(got[2], V) < 1e-6
    assert (S > 0).all()
    assert relative(got[1] / scale, S) < 1e-6


@pytest.mark.parametrize(("scale", "bound"), [(1e-42, 1e-2), (1e-38, 1e-5), (1.0, 1e-6), (3e38, 1e-5)])
def test_any_scale_of_single_precision(net, scale, bound):
    H = channels(dtype=torch.complex64)
    U, S, V = decompose(net, H, 0)
    got = decompose(net, scaled(H, scale), 0)
    assert [x.dtype for x in got] == [torch.complex64, torch.float32, torch.complex64]
    assert relative(got[0], U) < bound
    assert relative(got[2], V) < bound
    assert relative(got[1].double() / scale, S.double()) < 10 * bound


def test_spectrum_beyond_single_precision(net):
    """The norm of such a sample lies beyond float32 and still divides it rightly."""
    H = torch.full((1, M, N), 3e38 + 3e38j, dtype=torch.complex64)
    assert frobenius_norm(H).isinf()
    U, S, V = decompose(net, H, 0)
    ones = decompose(net, torch.full((1, M, N), 1 + 1j), 0)
    assert relative(U, ones[0]) < 1e-5
    assert relative(V, ones[2]) < 1e-5
    assert torch.equal(S.isinf(), 3e38 * ones[1].double() > torch.finfo(torch.float32).max)


def test_one_extreme_sample_leaves_the_others_as_they_are(net):
    H = channels()
    plain = decompose(net, H, 0)
    mixed = H.clone()
    mixed[2] = 1e300
    mixed[3] = 0
    got = decompose(net, mixed, 0)
    for x, y in zip(got, plain, strict=True):
        assert torch.equal(x[:2], y[:2])
        assert torch.view_as_real(x + 0j).isfinite().all()
    assert (got[1][2] > 1e299).all()
    assert (got[1][3] == 0).all()


def test_precision_of_network_and_input_are_independent(net):
    H = channels(dtype=torch.complex64)
    double = lomacs_fast.LoMACSSVDNet(**net.config).double()
    double.load_state_dict(net.state_dict())
    for x, y in zip(decompose(double, H, 0), decompose(net, H, 0), strict=True):
        assert x.dtype == y.dtype
        assert relative(x, y) < 1e-4


def test_equals_the_network_on_the_normalised_channel(net):
    H = channels(dtype=torch.complex64)
    norm = torch.linalg.matrix_norm(H)
    sid = torch.tensor([0, 1, 1, 0])
    with torch.no_grad():
        U, S, V, _ = net(H / norm[:, None, None], sid)
    for x, y in zip(decompose(net, H, sid), (U, S * norm[:, None], V), strict=True):
        torch.testing.assert_close(x, y)


def test_views_and_empty_batches(net):
    for view in (channels().conj(), channels().mT.contiguous().mT, channels(8)[::2]):
        copied = torch.empty_like(view, memory_format=torch.contiguous_format).copy_(view)
        for x, y in zip(decompose(net, view, 0), decompose(net, copied, 0), strict=True):
            torch.testing.assert_close(x, y)
    U, S, V = decompose(net, channels(0), 0)
    assert (U.shape, S.shape, V.shape) == ((0, M, R), (0, R), (0, N, R))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), complex(0, float("-inf"))])
def test_not_finite_is_named_in_its_source(net, bad):
    H = channels()
    H[2, 1, 1] = bad
    with pytest.raises(ValueError, match=r"^H must be finite, sample 2 holds NaN or Inf$"):
        decompose(net, H, 0)
    with pytest.raises(ValueError, match=r"^channels\.npy must be finite, sample 258 holds NaN or Inf$"):
        decompose(net, H, 0, first=256, name="channels.npy")


def test_refused(net):
    for H, error, words in [
        (channels().numpy(), TypeError, "H must be a complex64 or complex128 tensor, got ndarray"),
        (channels().real, TypeError, "got torch.float64"),
        (channels()[0], ValueError, f"H must have shape (B, M, N), got ({M}, {N})"),
        (channels().mT, ValueError, f"H must have shape (B, {M}, {N})"),
    ]:
        with pytest.raises(error, match=re.escape(words)):
            decompose(net, H, 0)
    with pytest.raises(TypeError, match="sid must be an integer"):
        decompose(net, channels(), [0, 1, 0, 1])


@pytest.mark.parametrize("scale", [1e-45, 1e-42, 1e-38, 1.0, 3e38])
def test_normalising_equals_double_precision(scale):
    H = scaled(channels(dtype=torch.complex64), scale)
    wide = H.to(torch.complex128)
    norm = torch.linalg.vector_norm(wide.flatten(1), dim=1)
    X, got = frobenius_normalize(H)
    alive = norm > 0
    np.testing.assert_allclose(
        X[alive].abs(), (wide / norm[:, None, None])[alive].abs(), rtol=1e-6, atol=1e-7
    )
    assert (X[~alive] == 0).all()
    assert torch.equal(got, frobenius_norm(H))
    finite = got.isfinite()
    np.testing.assert_allclose(got[finite].double(), norm[finite], rtol=1e-6, atol=1e-45)
    X, size, power = unit_channels(H)
    assert torch.equal(torch.frexp(power).mantissa, torch.full_like(power, 0.5))
    np.testing.assert_allclose(size.double() * power.double(), norm, rtol=1e-6)


def test_a_label_by_the_norm_of_its_input():
    """Real division: a complex one would invert a denormal norm to Inf."""
    H = scaled(channels(dtype=torch.complex64), 1e-40)
    _, norm = frobenius_normalize(H)
    assert (norm < torch.finfo(torch.float32).tiny).all()
    half, same = frobenius_normalize(scaled(H, 0.5), norm)
    assert same is norm
    np.testing.assert_allclose(frobenius_norm(half), 0.5, rtol=1e-3)


def test_normalising_is_differentiable():
    H = channels().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: torch.view_as_real(frobenius_normalize(x)[0]), (H,))
    assert torch.autograd.gradcheck(frobenius_norm, (H,))
