"""Projected attention against loops with an explicit softmax, its symmetries and its module."""

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


def problem(T, G, g, a, k, B=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, T, G * g), (G, a, g), (G, a, g), (G, g, g), (G, g, g), (G, T, k), (G, T, k)]
    return [torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes]


def oracle(x, wq, wk, wv, wo, pk, pv):
    """One sample, token by token and group by group."""
    T, G, g, a = len(x), len(wq), wv.shape[1], wq.shape[1]
    out = np.zeros((T, G * g))
    for i in range(G):
        tokens = [x[t, i * g : (i + 1) * g] for t in range(T)]
        keys = [sum(pk[i, t, j] * (wk[i] @ tokens[t]) for t in range(T)) for j in range(pk.shape[2])]
        values = [sum(pv[i, t, j] * (wv[i] @ tokens[t]) for t in range(T)) for j in range(pk.shape[2])]
        for t in range(T):
            logits = np.array([(wq[i] @ tokens[t]) @ key for key in keys]) / np.sqrt(a)
            share = np.exp(logits - logits.max())
            share /= share.sum()
            mixed = sum(p * value for p, value in zip(share, values, strict=True))
            out[t, i * g : (i + 1) * g] = wo[i] @ mixed
    return out


@pytest.mark.parametrize(
    ("T", "G", "g", "a", "k"), [(6, 2, 3, 4, 5), (1, 1, 1, 1, 1), (11, 4, 2, 3, 28), (63, 3, 5, 1, 11)]
)
def test_equals_the_formula(stem, T, G, g, a, k):
    arguments = problem(T, G, g, a, k)
    out = stem.projected_attention(*arguments)
    for b in range(2):
        want = oracle(arguments[0][b].numpy(), *(w.numpy() for w in arguments[1:]))
        np.testing.assert_allclose(out[b], want, rtol=1e-10, atol=1e-10)


@given(
    T=st.integers(1, 9), G=st.integers(1, 3), g=st.integers(1, 4), a=st.integers(1, 5), k=st.integers(1, 12)
)
@settings(derandomize=True, deadline=None, max_examples=15)
def test_any_size_equals_the_formula(T, G, g, a, k):
    arguments = problem(T, G, g, a, k, B=1)
    want = oracle(arguments[0][0].numpy(), *(w.numpy() for w in arguments[1:]))
    np.testing.assert_allclose(functional.projected_attention(*arguments)[0], want, rtol=1e-10, atol=1e-10)


def test_lists_equal_stacked_weights(stem):
    x, *weights = problem(6, 2, 3, 4, 5)
    assert torch.equal(
        stem.projected_attention(x, *(list(w) for w in weights)), stem.projected_attention(x, *weights)
    )


def test_reduced_rows_have_no_order(stem):
    x, *weights, pk, pv = problem(7, 2, 3, 4, 5)
    order = [3, 0, 4, 1, 2]
    torch.testing.assert_close(
        stem.projected_attention(x, *weights, pk[..., order], pv[..., order]),
        stem.projected_attention(x, *weights, pk, pv),
    )


def test_tokens_move_with_their_projections(stem):
    x, *weights, pk, pv = problem(5, 2, 3, 4, 6)
    order = [4, 2, 0, 1, 3]
    torch.testing.assert_close(
        stem.projected_attention(x[:, order], *weights, pk[:, order], pv[:, order]),
        stem.projected_attention(x, *weights, pk, pv)[:, order],
    )


def test_groups_do_not_see_each_other(stem):
    x, *weights = problem(5, 2, 3, 4, 6)
    other = x.clone()
    other[..., 3:] += 1
    out, changed = stem.projected_attention(x, *weights), stem.projected_attention(other, *weights)
    assert torch.equal(out[..., :3], changed[..., :3])
    assert not torch.isclose(out[..., 3:], changed[..., 3:]).any()


def test_large_logits_are_finite(stem):
    arguments = [x.float() for x in problem(6, 2, 3, 4, 5)]
    x = (arguments[0] * 1e4).requires_grad_()
    out = stem.projected_attention(x, *arguments[1:])
    out.sum().backward()
    assert out.isfinite().all()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("namespace", [reference, lomacs_fast], ids=["reference", "lomacs_fast"])
def test_module(namespace):
    module = namespace.GroupedProjectedAttention(dim=6, att_dim=4, groups=2, seq_len=5, k_len=7)
    shapes = {"qs": (4, 3), "ks": (4, 3), "vs": (3, 3), "os": (3, 3)}
    expected = {f"{name}.{i}.weight": shape for name, shape in shapes.items() for i in range(2)}
    expected |= {f"{name}.{i}": (5, 7) for name in ("Pk", "Pv") for i in range(2)}
    state = module.state_dict()
    assert {name: tuple(w.shape) for name, w in state.items()} == expected
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    stacked = [
        torch.stack([state[f"{name}.{i}{'.weight' if name in shapes else ''}"] for i in range(2)])
        for name in ("qs", "ks", "vs", "os", "Pk", "Pv")
    ]
    torch.testing.assert_close(module(x), reference.projected_attention(x, *stacked))
    for name, value in [("att_dim", 0), ("groups", 0), ("seq_len", 0), ("k_len", 0)]:
        sizes = {"dim": 6, "att_dim": 4, "groups": 2, "seq_len": 5, "k_len": 7} | {name: value}
        with pytest.raises(ValueError, match=re.escape(f"{name} must be at least 1, got 0")):
            namespace.GroupedProjectedAttention(**sizes)
    with pytest.raises(ValueError, match=re.escape("dim must be a positive multiple of groups=2, got 7")):
        namespace.GroupedProjectedAttention(7, 4, 2, 5, 7)
