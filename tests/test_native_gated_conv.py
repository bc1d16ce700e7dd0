"""The CPU kernels of `lomacs::gated_conv1d`, compiled here: accuracy, instruction sets, threads, extremes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lomacs_fast import reference
from lomacs_fast.ops import native

ISAS = ("avx512", "avx2", "portable")
EPS = torch.finfo(torch.float32).eps
NAMES = ("x", "dw_weight", "dw_bias", "pw_weight", "pw_bias", "norm_weight", "norm_bias")
# tokens, width, taps
SIZES = [(6, 4, 3), (1, 1, 1), (2, 3, 7), (11, 5, 5), (63, 2, 3), (1, 4, 9), (70, 33, 9), (3, 2, 41)]


@pytest.fixture(scope="module", autouse=True)
def library():
    if reasons := native.reasons("cpu"):
        pytest.skip(f"no native library: {'; '.join(reasons)}")


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("LOMACS_FAST_ISA", request.param)
    try:
        run(problem(1, 1, 1))
    except RuntimeError as error:
        if "lacks" not in str(error):
            raise
        pytest.skip(f"no {request.param} in this processor")
    return request.param


def problem(T, d, k, B=3, norm=True, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, T, d), (2 * d, 1, k), (2 * d,), (d, d, 1), (d,), *[(d,), (d,)] * norm]
    scales = [1, k**-0.5, 1, d**-0.5, 1, 1, 1]
    draws = (torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes)
    return [(x * scale).to(dtype) for x, scale in zip(draws, scales, strict=False)]


def run(args, eps=1e-5, upstream=None):
    """The ops themselves: value and every gradient."""
    tensors = [*args, *[None] * (7 - len(args)), eps]
    y = torch.ops.lomacs.gated_conv1d(*tensors)
    g = torch.ones_like(y) if upstream is None else upstream
    grads = torch.ops.lomacs.gated_conv1d_backward(g, *tensors, True, True)
    return [y, *grads[: len(args)]]


def expected(args, eps=1e-5, upstream=None):
    inputs = [x.clone().requires_grad_() for x in args]
    y = reference.gated_conv1d(*inputs, **({"eps": eps} if len(args) > 5 else {}))
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
    for name, got, want in zip(("y", *NAMES), run(args, 0.1, g), expected(args, 0.1, g), strict=False):
        assert got.shape == want.shape, name
        assert (got - want).norm() <= 1e-11 * want.norm() + 1e-13, name


@given(
    T=st.integers(1, 90), d=st.integers(1, 40), half=st.integers(0, 5), B=st.integers(0, 6), norm=st.booleans()
)  # fmt: skip
@settings(derandomize=True, deadline=None, max_examples=25)
def test_any_size(T, d, half, B, norm):
    args = problem(T, d, 2 * half + 1, B=B, norm=norm, seed=T)
    g = upstream(args)
    for got, want in zip(run(args, 0.1, g), expected(args, 0.1, g), strict=True):
        assert (got - want).norm() <= 1e-10 * want.norm() + 1e-12


def hard_case(kind, size, seed):
    # few gates of large logits are neither open nor shut, and these few make the whole error
    args = problem(*size, B=64 if kind == "large gates" else 11, seed=seed, norm=kind == "norm")
    if kind == "ill-conditioned":
        u, s, v = torch.linalg.svd(args[3][..., 0])
        args[3] = (u * torch.logspace(0, -10, len(s), dtype=torch.float64) @ v)[..., None]
    elif kind == "rank-deficient":
        args[3][:, 1:] = args[3][:, :1]
    elif kind == "zero":
        args[0] = args[0] * 0
    elif kind == "constant tokens":
        args[0] = args[0][:, :1].expand_as(args[0]).contiguous()
    elif kind == "nearly orthonormal":
        args[3] = torch.linalg.qr(args[3][..., 0])[0][..., None].contiguous()
    elif kind == "large gates":
        args[0] = args[0] * 1e4
    return [x.float() for x in args]


@pytest.mark.parametrize(
    "kind",
    ["random", "norm", "ill-conditioned", "rank-deficient", "zero", "constant tokens", "nearly orthonormal",
     "large gates"],
)  # fmt: skip
@pytest.mark.parametrize("size", [(64, 64, 3), (63, 11, 5)])
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


def test_the_gate_is_accurate(isa):
    """One channel: the value is 1, the gate's logit is the token, the product the sigmoid itself."""
    for dtype, bound in ((torch.float32, 3e-7), (torch.float64, 8e-16)):
        x = torch.linspace(-80, 80, 4001, dtype=dtype).reshape(1, -1, 1)
        weights = torch.tensor([0, 1], dtype=dtype).reshape(2, 1, 1)
        one = torch.ones(1, 1, 1, dtype=dtype)
        bias = torch.tensor([1, 0], dtype=dtype)
        y = torch.ops.lomacs.gated_conv1d(x, weights, bias, one, one[0, 0] * 0, None, None, 1e-5)
        want = torch.sigmoid(x.double())
        assert ((y - want).abs() / want).max() <= bound
        far = torch.tensor([-1e30, -200, 200, 1e30], dtype=dtype).reshape(1, -1, 1)
        y = torch.ops.lomacs.gated_conv1d(far, weights, bias, one, one[0, 0] * 0, None, None, 1e-5)
        torch.testing.assert_close(y.flatten(), torch.tensor([0, 0, 1, 1], dtype=dtype))


@pytest.mark.parametrize("size", [(6, 4, 3), (64, 64, 3)])
def test_instruction_sets_agree(isa, size):
    args = problem(*size, dtype=torch.float32)
    exact = expected([x.double() for x in args])
    for got, want in zip(run(args), exact, strict=True):
        assert (got.double() - want).norm() <= 3e-6 * want.norm() + 1e-6


@pytest.mark.parametrize("B", [1, 3, 33])
def test_threads_and_repetition_do_not_change_a_bit(B):
    args = problem(63, 20, 5, B=B, dtype=torch.float32)
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


def test_samples_do_not_see_each_other():
    args = problem(19, 5, 7, B=4, norm=False)
    y, gx, *_ = run(args)
    for b in range(4):
        alone = run([args[0][b : b + 1], *args[1:]])
        assert torch.equal(alone[0][0], y[b])
        assert torch.equal(alone[1][0], gx[b])


def test_flags_leave_gradients_out_and_change_no_others():
    tensors = [*problem(7, 5, 3), 1e-5]
    g = torch.ones_like(tensors[0])
    backward = torch.ops.lomacs.gated_conv1d_backward
    everything = backward(g, *tensors, True, True)
    for gx in (False, True):
        for gw in (False, True):
            got = backward(g, *tensors, gx, gw)
            for a, b, wanted in zip(got, everything, [gx, *[gw] * 6], strict=True):
                assert torch.equal(a, b) if wanted else a.shape == (0,)


def test_a_norm_without_bias():
    args = problem(7, 5, 3)[:6]
    for got, want in zip(run(args), expected(args), strict=True):
        torch.testing.assert_close(got, want)


def test_inputs_are_not_written_to_and_may_lie_anywhere():
    args = problem(9, 7, 3, dtype=torch.float32)
    copies, want = [x.clone() for x in args], run(args)
    assert all(torch.equal(x, y) for x, y in zip(args, copies, strict=True))
    shifted = []
    for x in args:
        store = torch.empty(x.numel() + 1)
        store[1:] = x.reshape(-1)
        shifted.append(store[1:].view(x.shape))
    assert all(torch.equal(a, b) for a, b in zip(run(shifted), want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_empty_batch(dtype):
    y, *gradients = run(problem(4, 6, 3, B=0, dtype=dtype))
    assert y.shape == (0, 4, 6)
    assert y.dtype == dtype
    assert all((g == 0).all() for g in gradients)


def test_nan_reaches_as_far_as_the_taps():
    args = problem(20, 6, 3, norm=False)
    args[0][1, 4, 2] = float("nan")
    y, gx, *_ = run(args)
    assert y[1].isnan().any(-1).nonzero().flatten().tolist() == [3, 4, 5]
    assert y[[0, 2]].isfinite().all()
    assert gx[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", [False, True])
def test_half_precision_is_the_single_precision_of_its_values(dtype, norm):
    args = problem(21, 7, 5, norm=norm, dtype=dtype)
    g = upstream(args)
    wide = run([x.float() for x in args], upstream=g.float())
    for got, want in zip(run(args, upstream=g), wide, strict=True):
        assert got.dtype == dtype
        assert torch.equal(got, want.to(dtype))


def test_bad_arguments_are_named():
    tensors = dict(zip(NAMES, problem(4, 6, 3), strict=True)) | {"eps": 1e-5}
    x, dw = tensors["x"], tensors["dw_weight"]
    for changes, message in (
        ({"dw_weight": dw[..., :2]}, "dw_weight must have an odd number of taps"),
        ({"dw_weight": dw[:5]}, r"dw_weight must have shape \(12, 1, 3\), got \(5, 1, 3\)"),
        ({"dw_bias": tensors["dw_bias"].float()}, "dw_bias must be float64 as x is, got float32"),
        ({"pw_weight": tensors["pw_weight"][0]}, r"pw_weight must have shape \(6, 6, 1\), got \(6, 1\)"),
        ({"pw_bias": tensors["pw_bias"][:2]}, r"pw_bias must have shape \(6\)"),
        ({"x": x.mT.contiguous().mT}, "x must be contiguous"),
        ({"x": x.int()}, "x must be float32, float64, bfloat16 or float16"),
        ({"x": x[0]}, r"x must have shape \(B, T, d\)"),
        ({"x": x[:, :0]}, "no dimension but the batch may be empty"),
        ({"norm_weight": None}, "norm_bias goes with norm_weight"),
        ({"eps": 0.0}, "eps must be positive"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.lomacs.gated_conv1d(*(tensors | changes).values())
