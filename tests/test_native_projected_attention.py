"""The CPU kernels of `lomacs::projected_attention`, compiled here: accuracy, instruction sets, threads, extremes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lomacs_fast import functional, reference, use_backend
from lomacs_fast.ops import native

ISAS = ("avx512", "avx2", "portable")
EPS = torch.finfo(torch.float32).eps
NAMES = ("x", "wq", "wk", "wv", "wo", "pk", "pv", "norm_weight", "norm_bias")
# tokens, groups, width of a group, of queries, reduced rows
SIZES = [(6, 2, 3, 4, 5), (1, 1, 1, 1, 1), (11, 4, 2, 3, 28), (63, 3, 5, 1, 11), (130, 2, 17, 7, 33)]


@pytest.fixture(scope="module", autouse=True)
def library():
    if reasons := native.reasons("cpu"):
        pytest.skip(f"no native library: {'; '.join(reasons)}")


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("LOMACS_FAST_ISA", request.param)
    try:
        run(problem(1, 1, 1, 1, 1))
    except RuntimeError as error:
        if "lacks" not in str(error):
            raise
        pytest.skip(f"no {request.param} in this processor")
    return request.param


def problem(T, G, g, a, k, B=3, norm=True, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, T, G * g), (G, a, g), (G, a, g), (G, g, g), (G, g, g), (G, T, k), (G, T, k)]
    shapes += [(G * g,), (G * g,)] * norm
    scales = [1, g**-0.5, g**-0.5, g**-0.5, g**-0.5, T**-0.5, T**-0.5, 1, 1]
    draws = (torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes)
    return [(x * scale).to(dtype) for x, scale in zip(draws, scales, strict=False)]


def run(args, eps=1e-5, upstream=None):
    """The ops themselves: value and every gradient."""
    tensors = [*args, *[None] * (9 - len(args)), eps]
    y = torch.ops.lomacs.projected_attention(*tensors)
    g = torch.ones_like(y) if upstream is None else upstream
    grads = torch.ops.lomacs.projected_attention_backward(g, *tensors, True, True)
    return [y, *grads[: len(args)]]


def expected(args, eps=1e-5, upstream=None):
    inputs = [x.clone().requires_grad_() for x in args]
    y = reference.projected_attention(*inputs, **({"eps": eps} if len(args) > 7 else {}))
    g = torch.ones_like(y) if upstream is None else upstream
    return [y.detach(), *torch.autograd.grad(y, inputs, g)]


def upstream(args, seed=7):
    draw = torch.randn(args[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return draw.to(args[0].dtype)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_float64_equals_autograd_of_the_reference(isa, size, norm):
    args = problem(*size, norm=norm, B=9)
    g = upstream(args)
    pairs = zip(("y", *NAMES), run(args, 0.1, g), expected(args, 0.1, g), strict=False)
    for name, got, want in pairs:
        assert got.shape == want.shape, name
        assert (got - want).norm() <= 1e-11 * want.norm() + 1e-13, name


@given(
    T=st.integers(1, 90), G=st.integers(1, 3), g=st.integers(1, 20), a=st.integers(1, 9), k=st.integers(1, 40),
    B=st.integers(0, 6), norm=st.booleans(),
)  # fmt: skip
@settings(derandomize=True, deadline=None, max_examples=25)
def test_any_size(T, G, g, a, k, B, norm):
    args = problem(T, G, g, a, k, B=B, norm=norm, seed=T)
    up = upstream(args)
    for got, want in zip(run(args, 0.1, up), expected(args, 0.1, up), strict=True):
        assert (got - want).norm() <= 1e-10 * want.norm() + 1e-12


def hard_case(kind, size, seed):
    args = problem(*size, B=11, seed=seed, norm=kind == "norm")
    if kind == "ill-conditioned":
        for i in range(1, 5):
            u, s, v = torch.linalg.svd(args[i], full_matrices=False)
            args[i] = u * torch.logspace(0, -10, s.shape[-1], dtype=torch.float64) @ v
    elif kind == "rank-deficient":
        args[0] = args[0][..., :1] * args[0][:, :1]
        args[1][:, 0] = args[1][:, -1]
    elif kind == "zero":
        args[0] = args[0] * 0
    elif kind == "constant tokens":
        args[0] = args[0][:, :1].expand_as(args[0]).contiguous()
    elif kind == "nearly orthonormal":
        T, k = args[5].shape[-2:]
        for i in (5, 6):
            args[i] = torch.linalg.qr(args[i])[0].contiguous() if k <= T else args[i]
    elif kind == "large logits":
        args[0] = args[0] * 100
    return [x.float() for x in args]


@pytest.mark.parametrize(
    "kind",
    ["random", "norm", "ill-conditioned", "rank-deficient", "zero", "constant tokens", "nearly orthonormal",
     "large logits"],
)  # fmt: skip
@pytest.mark.parametrize("size", [(64, 4, 16, 32, 32), (63, 3, 11, 5, 7)])
def test_float32_error_is_at_most_twice_eager(size, kind):
    runs = []
    for seed in range(3):
        args = hard_case(kind, size, seed)
        g = upstream(args, seed)
        exact = expected([x.double() for x in args], upstream=g.double())
        runs.append((exact, expected(args, upstream=g), run(args, upstream=g)))
    for i, name in enumerate(("y", *NAMES)[: len(runs[0][0])]):
        want, eager, ours = (torch.cat([r[j][i].double().reshape(-1) for r in runs]) for j in range(3))
        assert ours.isfinite().all(), name
        scale = want.norm() if want.norm() > 0 else torch.ones(())
        error, bound = (ours - want).norm() / scale, 2 * (eager - want).norm() / scale + 4 * EPS
        assert error <= bound, f"{name}: {error:.2e}, allowed {bound:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_ten_thousand_are_safe(isa, dtype):
    args = problem(17, 2, 8, 8, 12, norm=False, dtype=dtype)
    args[0] = args[0] * 1e4
    for got, want in zip(run(args), expected(args), strict=True):
        assert got.isfinite().all()
        assert want.isfinite().all()
    # rows far below the largest have no share at all: the winner's value alone comes out
    x = torch.zeros(1, 2, 1, dtype=dtype)
    x[0, 0], x[0, 1] = 100, 1
    one = torch.ones(1, 1, 1, dtype=dtype)
    y = torch.ops.lomacs.projected_attention(x, one, one, one, one, torch.eye(2, dtype=dtype)[None],
                                             torch.eye(2, dtype=dtype)[None], None, None, 1e-5)  # fmt: skip
    torch.testing.assert_close(y, x * 0 + 100)


def test_the_exponential_is_accurate(isa):
    """Two reduced rows: the first token's share is a logistic function of the logit, which is set freely."""
    for dtype in (torch.float32, torch.float64):
        logits = torch.linspace(-60, 60, 2001, dtype=dtype)
        # tokens (l, 1); the keys read the first channel, the values the second
        x = torch.stack([logits, torch.ones_like(logits)], -1)[None]
        wq, wk = torch.tensor([[[1, 0]]], dtype=dtype), torch.tensor([[[0, 1]]], dtype=dtype)
        eye = torch.eye(2, dtype=dtype)[None]
        p = torch.zeros(1, 2001, 2, dtype=dtype)
        p[0, 0] = torch.tensor([1, 0])
        y = torch.ops.lomacs.projected_attention(x, wq, wk, eye, eye, p, p, None, None, 1e-5)
        want = torch.sigmoid(logits.double())
        # a logit is rounded, so a share is no better than its size times eps
        bound = (4 + 2 * logits.double().abs()) * torch.finfo(dtype).eps
        assert ((y[0, :, 1] - want).abs() <= bound * want).all()


@pytest.mark.parametrize("size", [(6, 2, 3, 4, 5), (64, 4, 16, 32, 32)])
def test_instruction_sets_agree(isa, size):
    args = problem(*size, dtype=torch.float32)
    exact = expected([x.double() for x in args])
    for got, want in zip(run(args), exact, strict=True):
        assert (got.double() - want).norm() <= 3e-6 * want.norm() + 1e-6


@pytest.mark.parametrize("B", [1, 3, 33])
def test_threads_and_repetition_do_not_change_a_bit(B):
    args = problem(63, 4, 5, 6, 11, B=B, dtype=torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(run(args))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_flags_leave_gradients_out_and_change_no_others():
    tensors = [*problem(7, 2, 3, 4, 5), 1e-5]
    g = torch.ones_like(tensors[0])
    backward = torch.ops.lomacs.projected_attention_backward
    everything = backward(g, *tensors, True, True)
    for gx in (False, True):
        for gw in (False, True):
            got = backward(g, *tensors, gx, gw)
            for a, b, wanted in zip(got, everything, [gx, *[gw] * 8], strict=True):
                assert torch.equal(a, b) if wanted else a.shape == (0,)


def test_a_norm_without_bias():
    args = problem(7, 2, 3, 4, 5)[:8]
    for got, want in zip(run(args), expected(args), strict=True):
        torch.testing.assert_close(got, want)


def test_inputs_are_not_written_to_and_may_lie_anywhere():
    args = problem(9, 2, 5, 3, 7, dtype=torch.float32)
    copies, want = [x.clone() for x in args], run(args)
    assert all(torch.equal(x, y) for x, y in zip(args, copies, strict=True))
    shifted = []
    for x in args:
        store = torch.empty(x.numel() + 1)
        store[1:] = x.reshape(-1)
        shifted.append(store[1:].view(x.shape))
    assert all(torch.equal(a, b) for a, b in zip(run(shifted), want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_batch(dtype):
    y, *gradients = run(problem(4, 2, 3, 2, 5, B=0, dtype=dtype))
    assert y.shape == (0, 4, 6)
    assert y.dtype == dtype
    assert all((g == 0).all() for g in gradients)


def test_nan_stays_in_its_sample_and_group():
    args = problem(20, 2, 3, 4, 5, norm=False)
    args[0][1, 4, 2] = float("nan")
    y, gx, *gw = run(args)
    for out in (y, gx):
        assert out[1, :, :3].isnan().all()
        assert out[[0, 2]].isfinite().all()
        assert out[1, :, 3:].isfinite().all()
    for g in gw:
        assert g[0].isnan().any()
        assert g[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", [False, True])
def test_half_precision_is_the_single_precision_of_its_values(dtype, norm):
    args = problem(21, 2, 6, 4, 9, norm=norm, dtype=dtype)
    g = upstream(args)
    wide = run([x.float() for x in args], upstream=g.float())
    for got, want in zip(run(args, upstream=g), wide, strict=True):
        assert got.dtype == dtype
        assert torch.equal(got, want.to(dtype))


def test_lists_give_the_bits_of_stacks():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x, *weights = problem(21, 3, 6, 4, 9, dtype=dtype)
        stacked = torch.ops.lomacs.projected_attention(x, *weights, 1e-5)
        lists = [list(w.unbind()) for w in weights[:6]]
        assert torch.equal(
            torch.ops.lomacs.projected_attention_groups(x, *lists, *weights[6:], 1e-5), stacked
        )
        for flags in ((True, True), (True, False), (False, True)):
            rest = *weights[6:], 1e-5, *flags
            gx, *want, gn, gb = torch.ops.lomacs.projected_attention_backward(x, x, *weights[:6], *rest)
            found = torch.ops.lomacs.projected_attention_groups_backward(x, x, *lists, *rest)
            alone = [part for g in want for part in (g.unbind() if flags[1] else [g] * 3)]
            assert len(found[1]) == 18
            for g, y in zip((*found[1], found[0], *found[2:]), (*alone, gx, gn, gb), strict=True):
                assert torch.equal(g, y)


def test_a_pruned_attention_equals_the_masked_original():
    """Dropped columns count for nothing exactly: their number alone changes the result by nothing else."""
    x, *weights, pk, pv = problem(30, 2, 4, 4, 28, norm=False)
    kept = [1, 2, 5, 8, 13, 21, 27, 3, 4, 6, 26]
    with use_backend("cpp"):
        pruned = functional.projected_attention(x, *weights, pk[..., kept], pv[..., kept])
    q, k = (x[0, :, :4] @ w[0].T for w in weights[:2])
    logits = q @ (pk[0].T @ k).T / 4**0.5
    mask = torch.full_like(logits, -torch.inf)
    mask[:, kept] = 0
    masked = torch.softmax(logits + mask, -1) @ (pv[0].T @ x[0, :, :4] @ weights[2][0].T) @ weights[3][0].T
    torch.testing.assert_close(pruned[0, :, :4], masked, rtol=1e-12, atol=1e-13)


def test_bad_arguments_are_named():
    x, wq, wk, wv, wo, pk, pv, nw, nb = problem(4, 2, 3, 5, 6)

    def call(**changes):
        names = dict(zip(NAMES, (x, wq, wk, wv, wo, pk, pv, nw, nb), strict=True)) | {"eps": 1e-5}
        return torch.ops.lomacs.projected_attention(*(names | changes).values())

    for changes, message in (
        ({"wk": wk[:, :4]}, r"wk must have shape \(2, 5, 3\), got \(2, 4, 3\)"),
        ({"wv": wv.float()}, "wv must be float64 as x is, got float32"),
        ({"pk": pk[:, :3]}, r"pk must have shape \(2, 4, 6\)"),
        ({"x": x[..., :5]}, "the number of groups must divide"),
        ({"x": x.mT.contiguous().mT}, "x must be contiguous"),
        ({"x": x.int()}, "x must be float32, float64, bfloat16 or float16"),
        ({"x": x[:, :0]}, "no dimension but the batch may be empty"),
        ({"norm_weight": None}, "norm_bias goes with norm_weight"),
        ({"norm_bias": nb[:2]}, r"norm_bias must have shape \(6\), got \(2\)"),
        ({"eps": 0.0}, "eps must be positive"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(**changes)
    lists = [list(w) for w in (wq, wk, wv, wo, pk, pv)]
    lists[2] = lists[2][:1]
    with pytest.raises(RuntimeError, match="one tensor a group"):
        torch.ops.lomacs.projected_attention_groups(x, *lists, None, None, 1e-5)
    lists[2] = [wv[0], wv[1][:2]]
    with pytest.raises(RuntimeError, match=r"wv must have shape \(3, 3\), got \(2, 3\)"):
        torch.ops.lomacs.projected_attention_groups(x, *lists, None, None, 1e-5)
    rest = None, None, 1e-5, True, True
    with pytest.raises(RuntimeError, match=r"wv must have shape \(3, 3\), got \(2, 3\)"):
        torch.ops.lomacs.projected_attention_groups_backward(x, x, *lists, *rest)
    lists[2] = [wv[0], wv[1]]
    with pytest.raises(RuntimeError, match="gy must have shape"):
        torch.ops.lomacs.projected_attention_groups_backward(x[:1], x, *lists, *rest)
