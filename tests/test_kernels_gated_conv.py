"""The Triton kernels of the gated convolution, interpreted where there is no device, and compiled ahead."""

import functools

import pytest
import torch

pytest.importorskip("triton")

from aot import SHARED, reports
from hypothesis import given, settings
from hypothesis import strategies as st

from lomacs_fast import reference
from lomacs_fast.kernels import gated_conv as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
NAMES = ("x", "dw_weight", "dw_bias", "pw_weight", "pw_bias", "norm_weight", "norm_bias")


# code of its own for every choice: on a device it may contract other products
same = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)


def problem(B, T, d, k, norm=True, seed=0):
    """Float64 arguments at the scale of a network's."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, T, d), (2 * d, 1, k), (2 * d,), (d, d, 1), (d,), (d,), (d,)]
    scales = [1, k**-0.5, 1, d**-0.5, 1, 1, 1]
    found = [
        c * torch.randn(s, dtype=torch.float64, generator=generator)
        for s, c in zip(shapes, scales, strict=True)
    ]
    return found if norm else [*found[:5], None, None]


def formula(x, *weights):
    *weights, w, b = weights
    if w is None:
        return reference.gated_conv1d(x, *weights)
    normed = torch.nn.functional.layer_norm(x, x.shape[-1:], w, b, EPS)
    return x + reference.gated_conv1d(normed, *weights)


def cast(arguments, dtype):
    return [None if x is None else x.to(DEVICE, dtype) for x in arguments]


def eager(gy, arguments):
    leaves = [None if x is None else x.detach().requires_grad_() for x in arguments]
    y = formula(*leaves)
    return [y.detach(), *torch.autograd.grad(y, [x for x in leaves if x is not None], gy)]


def fused(gy, arguments, gx=True, gw=True):
    y = kernels.gated_conv1d(*arguments, EPS)
    gradients = kernels.gated_conv1d_backward(gy, *arguments, EPS, gx, gw)
    return [y, *(g for g, x in zip(gradients, arguments, strict=True) if x is not None)]


def held_to_the_rule(problems, dtype):
    """Relative error against float64, pooled over problems, at most twice eager's plus 4 eps, tensor by tensor."""
    ours, theirs, size = 0.0, 0.0, 0.0
    for arguments in problems:
        low = cast(arguments, dtype)
        exact = cast(low, torch.float64)
        generator = torch.Generator().manual_seed(9)
        gy = torch.randn(low[0].shape, generator=generator).to(DEVICE, dtype)
        want = eager(gy.double(), exact)

        def squares(found, want=want):
            return torch.stack([(a.double() - b).square().sum() for a, b in zip(found, want, strict=True)])

        ours = ours + squares(fused(gy, low))
        theirs = theirs + squares(eager(gy, low))
        size = size + torch.stack([b.square().sum() for b in want])
    bound = 2 * (theirs / size).sqrt() + 4 * torch.finfo(dtype).eps
    error = (ours / size.clamp_min(1e-300)).sqrt()
    bound = torch.where(size > 0, bound, 0)
    for name, e, b in zip(("y", *NAMES), error.tolist(), bound.tolist(), strict=False):
        assert e <= b, f"{name}: {e:.2e} against {b:.2e}"


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_as_accurate_as_eager(norm, monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", 10)
    held_to_the_rule((problem(11, 64, 40, 3, norm, seed) for seed in range(3)), torch.float32)


@pytest.mark.parametrize(
    ("B", "T", "d", "k"),
    [(2, 63, 36, 3), (3, 1, 8, 1), (2, 20, 64, 9), (2, 150, 20, 5), (2, 20, 11, 3), (2, 3, 2, 9)],
)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_any_size(B, T, d, k, norm, monkeypatch):
    # programs that keep sums over several samples
    monkeypatch.setattr(kernels, "PROGRAMS", 1)
    held_to_the_rule([problem(B, T, d, k, norm)], torch.float32)


@given(T=st.integers(1, 80), d=st.integers(1, 40), half=st.integers(0, 4), norm=st.booleans())
@settings(derandomize=True, deadline=None, max_examples=1 if DEVICE == "cuda" else 5)
def test_random_sizes(T, d, half, norm):
    draws = 32 if DEVICE == "cuda" else 1
    held_to_the_rule([problem(1, T, d, 2 * half + 1, norm, seed) for seed in range(draws)], torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("d", "norm"), [(20, False), (20, True), (11, True)])
def test_half_precision(dtype, d, norm):
    held_to_the_rule([problem(3, 40, d, 3, norm)], dtype)


def test_half_tokens_with_single_weights():
    x, *weights = problem(2, 17, 16, 3)
    x = x.to(DEVICE, torch.bfloat16)
    weights = [w.to(DEVICE, torch.bfloat16).float() for w in weights]
    gy = torch.randn(x.shape).to(x)
    low = [x, *(w.to(x.dtype) for w in weights)]
    y, *gradients = fused(gy, [x, *weights])
    want, *others = fused(gy, low)
    assert torch.equal(y, want)
    assert [g.dtype for g in gradients] == [x.dtype] + [torch.float32] * 6
    for one, other in zip(gradients, others, strict=True):
        assert torch.equal(one.to(other.dtype), other)


def test_constant_tokens():
    x, *weights = problem(2, 9, 16, 3)
    held_to_the_rule([[torch.ones_like(x) * 0.75, *weights]], torch.float32)


def test_saturated_gates():
    x, dw, *others = problem(3, 20, 16, 3, norm=False)
    held_to_the_rule([[x, dw * 1e4, *others]], torch.float32)


def test_batch_of_none():
    arguments = cast(problem(0, 7, 16, 3), torch.float32)
    y, gx, *gw = fused(arguments[0], arguments)
    assert y.shape == gx.shape == (0, 7, 16)
    assert all(g.shape == w.shape and not g.any() for g, w in zip(gw, arguments[1:], strict=True))


def test_gradients_not_wanted_are_empty():
    arguments = cast(problem(2, 7, 16, 3), torch.float32)
    gy = torch.randn_like(arguments[0])
    full = kernels.gated_conv1d_backward(gy, *arguments, EPS, True, True)
    gx, *none = kernels.gated_conv1d_backward(gy, *arguments, EPS, True, False)
    same(gx, full[0])
    assert all(g.shape == (0,) for g in none)
    none, *gw = kernels.gated_conv1d_backward(gy, *arguments, EPS, False, True)
    assert none.shape == (0,)
    for one, other in zip(gw, full[1:], strict=True):
        same(one, other)
    assert all(g.shape == (0,) for g in kernels.gated_conv1d_backward(gy, *arguments, EPS, False, False))


@pytest.mark.parametrize("d", [8, 5])
def test_a_norm_without_a_bias_is_one_of_zeros(d):
    x, *weights, bias = cast(problem(3, 20, d, 3), torch.float32)
    gy = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    without, zeros = (x, *weights, None, EPS), (x, *weights, torch.zeros_like(bias), EPS)
    same(kernels.gated_conv1d(*without), kernels.gated_conv1d(*zeros))
    for flags in ((True, True), (True, False), (False, True)):
        *found, last = kernels.gated_conv1d_backward(gy, *without, *flags)
        *wanted, _ = kernels.gated_conv1d_backward(gy, *zeros, *flags)
        assert last.shape == (0,)
        for g, h in zip(found, wanted, strict=True):
            same(g, h)


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_nan_stays_in_its_sample(norm):
    arguments = cast(problem(3, 9, 16, 3, norm), torch.float32)
    gy = torch.randn_like(arguments[0])
    clean = fused(gy, arguments)[:2]
    arguments[0] = arguments[0].clone()
    arguments[0][1, 4, 3] = torch.nan
    for found, want in zip(fused(gy, arguments)[:2], clean, strict=True):
        assert found[1].isnan().any()
        assert torch.equal(found[[0, 2]], want[[0, 2]])


def test_same_bits_every_time_and_inputs_untouched():
    arguments = cast(problem(3, 9, 40, 3), torch.float32)
    before = [x.clone() for x in arguments]
    gy = torch.randn_like(arguments[0])
    first, second = fused(gy, arguments), fused(gy, arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


def test_nothing_is_written_outside(monkeypatch):
    """Every buffer that a launch gets lies between guards that stay as they were."""
    arguments = cast(problem(3, 33, 38, 3), torch.float32)
    gy = torch.randn_like(arguments[0])
    want = fused(gy, arguments)
    guarded = []
    monkeypatch.setattr(
        kernels.Launch, "run", functools.partialmethod(between_guards, kernels.Launch.run, guarded)
    )
    found = fused(gy, arguments)
    for whole, size in guarded:
        assert torch.all(whole[:64] == 7)
        assert torch.all(whole[64 + size :] == 7)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    assert len(guarded) > 15


def between_guards(launch, run, guarded):
    moved, back = dict(launch.arguments), []
    copies = {}
    for name, x in launch.arguments.items():
        if not isinstance(x, torch.Tensor):
            continue
        key = (x.data_ptr(), x.dtype, x.numel())
        if key not in copies:
            whole = torch.full((x.numel() + 128,), 7, dtype=x.dtype, device=x.device)
            whole[64 : 64 + x.numel()] = x.flatten()
            guarded.append((whole, x.numel()))
            copies[key] = whole[64 : 64 + x.numel()].view(x.shape)
            back.append((x, copies[key]))
        moved[name] = copies[key]
    run(launch._replace(arguments=moved))
    for x, copy in back:
        x.copy_(copy)


SIZES = {"64": (64, 64, 3), "128": (128, 64, 3), "9 taps": (64, 128, 9)}


def launches():
    found = {}
    for name, size in SIZES.items():
        arguments = [x.to("meta", torch.float32) for x in problem(1, *size)]
        x = torch.empty((256, *arguments[0].shape[1:]), device="meta")
        found[f"forward {name}"] = kernels.gated_conv1d_launch(x, *arguments[1:], EPS, torch.empty_like(x))
        if name != "9 taps":
            found[f"backward {name}"] = kernels.gated_conv1d_backward_launch(
                x, x, *arguments[1:], EPS, torch.empty_like(x), True
            )[0]
    return found


def test_compiled_ahead():
    for name, targets in reports(__file__).items():
        for target, found in targets.items():
            where = f"{name}, {target}: {found}"
            assert found["shared"] <= SHARED[target], where
            assert found["tensor"] > 0, where
            if "taps" not in name and target != "gfx942":
                assert found["spills"] == 0, where
