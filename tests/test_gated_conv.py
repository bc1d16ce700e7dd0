"""The gated convolution against loops over channels, tokens and taps, and its module."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lomacs_fast
from lomacs_fast import functional, reference


@pytest.fixture(params=[reference, functional], ids=["reference", "functional"])
def stem(request):
    return request.param


def problem(T, d, k, B=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, T, d), (2 * d, 1, k), (2 * d,), (d, d, 1), (d,)]
    return [torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes]


def oracle(x, dw_weight, dw_bias, pw_weight, pw_bias):
    T, d = x.shape
    k = dw_weight.shape[2]

    def depthwise(j, t):
        total = dw_bias[j]
        for tap in range(k):
            source = t + tap - k // 2
            if 0 <= source < T:
                total += dw_weight[j, 0, tap] * x[source, j // 2]
        return total

    out = np.zeros((T, d))
    for t in range(T):
        gated = [depthwise(c, t) / (1 + np.exp(-depthwise(d + c, t))) for c in range(d)]
        for c in range(d):
            out[t, c] = pw_bias[c] + sum(pw_weight[c, i, 0] * gated[i] for i in range(d))
    return out


@pytest.mark.parametrize(
    ("T", "d", "k"), [(6, 4, 3), (1, 1, 1), (2, 3, 7), (11, 5, 5), (63, 2, 3), (1, 4, 5)]
)
def test_equals_the_formula(stem, T, d, k):
    arguments = problem(T, d, k)
    out = stem.gated_conv1d(*arguments)
    assert out.shape == (2, T, d)
    for b in range(2):
        want = oracle(arguments[0][b].numpy(), *(w.numpy() for w in arguments[1:]))
        np.testing.assert_allclose(out[b], want, rtol=1e-11, atol=1e-12)


@given(T=st.integers(1, 9), d=st.integers(1, 6), half=st.integers(0, 3), seed=st.integers(0, 99))
@settings(derandomize=True, deadline=None, max_examples=15)
def test_any_size_equals_the_formula(T, d, half, seed):
    arguments = problem(T, d, 2 * half + 1, B=1, seed=seed)
    want = oracle(arguments[0][0].numpy(), *(w.numpy() for w in arguments[1:]))
    np.testing.assert_allclose(functional.gated_conv1d(*arguments)[0], want, rtol=1e-10, atol=1e-11)


def test_value_and_gate_read_their_own_channels(stem):
    x, dw_weight, dw_bias, _, pw_bias = problem(5, 4, 3)
    eye = torch.eye(4, dtype=torch.float64).unsqueeze(-1)
    out = stem.gated_conv1d(x, dw_weight, dw_bias, eye, pw_bias)
    for channel in range(4):
        changed = x.clone()
        changed[..., channel] += 1
        differs = (stem.gated_conv1d(changed, dw_weight, dw_bias, eye, pw_bias) - out).abs().amax(
            (0, 1)
        ) > 1e-9
        assert differs.tolist() == [channel in (c // 2, (4 + c) // 2) for c in range(4)]


def test_padding_is_zero_and_reach_is_half_the_taps(stem):
    arguments = problem(9, 3, 5)
    changed = arguments[0].clone()
    changed[:, 4] += 1
    differs = (stem.gated_conv1d(changed, *arguments[1:]) - stem.gated_conv1d(*arguments)).abs().amax((0, 2))
    assert (differs > 1e-9).tolist() == [False, False, True, True, True, True, True, False, False]


def test_zero_input_gives_what_the_biases_give(stem):
    x, dw_weight, dw_bias, pw_weight, pw_bias = problem(5, 4, 3)
    out = stem.gated_conv1d(torch.zeros_like(x), dw_weight, dw_bias, pw_weight, pw_bias)
    constant = pw_weight[..., 0] @ (dw_bias[:4] * torch.sigmoid(dw_bias[4:])) + pw_bias
    torch.testing.assert_close(out, constant.expand_as(out))


@pytest.mark.parametrize("namespace", [reference, lomacs_fast], ids=["reference", "lomacs_fast"])
def test_module(namespace):
    module = namespace.GatedConv1D(4, k=3)
    state = module.state_dict()
    shapes = {"dw.weight": (8, 1, 3), "dw.bias": (8,), "pw.weight": (4, 4, 1), "pw.bias": (4,)}
    assert {name: tuple(w.shape) for name, w in state.items()} == shapes
    assert (state["dw.bias"] == 0).all()
    assert (state["pw.bias"] == 0).all()
    assert 0 < state["dw.weight"].abs().max() <= 3**-0.5
    assert 0 < state["pw.weight"].abs().max() <= 4**-0.5
    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(module(x), reference.gated_conv1d(x, *state.values()))
    # the convolutions that hold the parameters compute the same when called themselves
    value, gate = module.dw(x.mT).chunk(2, 1)
    torch.testing.assert_close(module(x), module.pw(value * gate.sigmoid()).mT)
    assert namespace.GatedConv1D(4).dw.weight.shape == (8, 1, 5)
    for kwargs, words in [
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"dim": 4, "k": 4}, "k must be odd and positive, got 4"),
        ({"dim": 4, "k": -1}, "k must be odd and positive, got -1"),
    ]:
        with pytest.raises(ValueError, match=re.escape(words)):
            namespace.GatedConv1D(**kwargs)
