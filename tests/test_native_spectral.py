"""The CPU kernels of `lomacs::spectral_calibrate` and `lomacs::svd_tail`: accuracy, instruction sets, edges."""

import itertools
import random

import pytest
import torch

from lomacs_fast import reference
from lomacs_fast.ops import native, spectral  # noqa: F401

SIZES = [(1, 1, 1), (2, 2, 2), (4, 7, 1), (6, 5, 3), (63, 41, 11), (17, 33, 17), (40, 70, 33), (64, 64, 32)]
ISAS = ("avx512", "avx2", "portable")
EPS = torch.finfo(torch.float32).eps
SCALARS = (0.1, 0.3, 0.7)


@pytest.fixture(scope="module", autouse=True)
def library():
    if reasons := native.reasons("cpu"):
        pytest.skip(f"no native library: {'; '.join(reasons)}")


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("LOMACS_FAST_ISA", request.param)
    try:
        calibrate(*problem(2, 2, 1))
    except RuntimeError as error:
        if "lacks" not in str(error):
            raise
        pytest.skip(f"no {request.param} in this processor")
    return request.param


def problem(M, N, r, B=3, dtype=torch.complex128, seed=0):
    """U, V, S_pred, H, and a gradient of U, of S and of V."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(B, *shape, dtype=dtype, generator=generator) / shape[0] ** 0.5

    S, g = (torch.rand(B, r, dtype=dtype.to_real(), generator=generator) for _ in range(2))
    return normal(M, r), normal(N, r), S, normal(M, N), normal(M, r), g, normal(N, r)


def real(x):
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def scalars(*values):
    return torch.tensor(values, dtype=torch.float64)


def calibrate(U, V, S, H, gU, gS, gV, flags=(True, True, True)):
    """S, and the gradients of U, H, V, S_pred and tau."""
    args = (real(U), real(H), real(V), S, scalars(SCALARS[2]))
    value = torch.ops.lomacs.spectral_calibrate(*args)
    return value, *torch.ops.lomacs.spectral_calibrate_backward(gS, *args, *flags)


def tail(U, V, S, H, gU, gS, gV, gh=True):
    """U, S, V, and the gradients of U_raw, V_raw, S_pred, H and the scalars."""
    args = (real(U), real(V), S, real(H), scalars(*SCALARS))
    values = torch.ops.lomacs.svd_tail(*args)
    return *values, *torch.ops.lomacs.svd_tail_backward(real(gU), gS, real(gV), *args, gh)


def kept(U, V, S, H, gU, gS, gV, gh=True):
    """The same by what the forward keeps for the backward."""
    args = (real(U), real(V), S, real(H), scalars(*SCALARS))
    *values, state = torch.ops.lomacs.svd_tail_kept(*args)
    backward = torch.ops.lomacs.svd_tail_kept_backward
    return *values, *backward(real(gU), gS, real(gV), *args, values[0], values[2], state, gh)


def expected(fn, U, V, S, H, gU, gS, gV):
    """The same by autograd of the reference."""
    U, V, S, H = (x.clone().requires_grad_() for x in (U, V, S, H))
    values = [x.clone().requires_grad_() for x in scalars(*SCALARS)]
    if fn is calibrate:
        out = reference.spectral_calibrate(U, H, V, S, values[2]).to(gS.dtype)
        return real(out.detach()), *map(real, torch.autograd.grad(out, (U, H, V, S, values[2]), gS))
    out = [x.to(g.dtype) for x, g in zip(reference.svd_tail(U, V, S, H, *values), (gU, gS, gV), strict=True)]
    *found, a, b, tau = torch.autograd.grad(out, (U, V, S, H, *values), (gU, gS, gV))
    return *(real(x.detach()) for x in out), *map(real, found), torch.stack([a, b, tau])


def close(got, want, bound=1e-10):
    for x, y in zip(got, want, strict=True):
        size = y.norm() if y.norm() > 1e-6 else torch.ones(())
        assert (x.reshape(y.shape) - y).norm() <= bound * size


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("fn", [calibrate, tail, kept])
def test_float64_equals_autograd_of_the_reference(isa, fn, size):
    tensors = problem(*size)
    close(fn(*tensors), expected(fn, *tensors))


def test_large_sizes():
    tensors = problem(256, 200, 128, B=1)
    close(tail(*tensors), expected(tail, *tensors))


def hard_case(kind, M, N, r, seed, B=32):
    U, V, S, H, *gradients = problem(M, N, r, B, seed=seed)
    draw = problem(M, N, min(M, N), B, seed=seed + 100)
    if kind == "ill-conditioned":
        left, right = torch.linalg.qr(draw[0])[0], torch.linalg.qr(draw[1])[0]
        H = left * torch.logspace(0, -10, min(M, N), dtype=torch.float64) @ right.mH
        U, V = (x * torch.logspace(2, -2, r, dtype=torch.float64) for x in (U, V))
    elif kind == "nearly orthonormal":
        U, V = (torch.linalg.qr(x)[0] + 1e-4 * x for x in (U, V))
    elif kind == "rank-deficient":
        H = draw[0][..., :2] @ draw[1][..., :2].mH
        U[..., -1] = U[..., 0]
        V[..., -1] = 0
    elif kind.startswith("zero"):
        U, V, S, H = (x * 0 if name == kind[-1] else x for name, x in zip("UVSH", (U, V, S, H), strict=True))
    tensors = (U, V, S, H, *gradients)
    return [x.to(torch.complex64 if x.is_complex() else torch.float32).contiguous() for x in tensors]


def double(tensors):
    return [x.to(torch.promote_types(x.dtype, torch.float64)) for x in tensors]


@pytest.mark.parametrize(
    "kind",
    [
        "random",
        "ill-conditioned",
        "nearly orthonormal",
        "rank-deficient",
        "zero U",
        "zero V",
        "zero S",
        "zero H",
    ],
)
@pytest.mark.parametrize("size", [(64, 64, 32), (63, 41, 11)])
@pytest.mark.parametrize("fn", [calibrate, tail, kept])
def test_float32_error_is_at_most_twice_eager(fn, size, kind):
    runs = []
    for seed in range(3):
        tensors = hard_case(kind, *size, seed)
        # one at a time: the gradients of the scalars are a number a sample
        for sample in zip(*(x.split(1) for x in tensors), strict=True):
            runs.append((expected(fn, *double(sample)), expected(fn, *sample), fn(*sample)))
    for i in range(len(runs[0][0])):
        want, base, got = (torch.cat([x[i].reshape(-1) for x in each]) for each in zip(*runs, strict=True))
        norm = want.norm() if want.norm() > 0 else torch.ones(())
        assert torch.isfinite(got).all(), i
        error, bound = (got - want).norm() / norm, 2 * (base - want).norm() / norm + 4 * EPS
        assert error <= bound, f"result {i}: {error:.2e}, allowed {bound:.2e}"


@pytest.mark.parametrize("kind", ["random", "ill-conditioned"])
@pytest.mark.parametrize("fn", [calibrate, tail, kept])
def test_every_size_keeps_the_rule(fn, kind):
    """M and N from 8 to 256, r from 1 to 128: the extremes, powers of two, their neighbours, and a draw."""
    generator, runs = random.Random(0), []
    sizes = [
        (8, 8, 1),
        (8, 9, 8),
        (256, 256, 128),
        (256, 8, 1),
        (255, 129, 127),
        (200, 100, 100),
        (33, 16, 15),
    ]
    while len(sizes) < 33:
        M, N = generator.randint(8, 256), generator.randint(8, 256)
        sizes.append((M, N, generator.randint(1, min(M, N, 128))))
    for seed, size in enumerate(sizes):
        tensors = hard_case(kind, *size, seed, B=1)
        runs.append((expected(fn, *double(tensors)), expected(fn, *tensors), fn(*tensors)))
    for i in range(len(runs[0][0])):
        # every size has the same weight, but for gradients of scalars, numbers that are often small
        norms = [want[i].norm() if want[i].numel() > 3 else torch.ones(()) for want, _, _ in runs]
        norms = [n if n > 0 else torch.ones(()) for n in norms]
        want, base, got = (
            torch.cat([x[i].reshape(-1) / n for x, n in zip(each, norms, strict=True)])
            for each in zip(*runs, strict=True)
        )
        assert torch.isfinite(got).all(), i
        error, bound = (got - want).norm() / want.norm(), 2 * (base - want).norm() / want.norm() + 4 * EPS
        assert error <= bound, f"result {i}: {error:.2e}, allowed {bound:.2e}"


@pytest.mark.parametrize("size", [(6, 5, 3), (63, 41, 11), (64, 64, 32)])
@pytest.mark.parametrize("fn", [calibrate, tail, kept])
def test_instruction_sets_agree(isa, fn, size):
    tensors = hard_case("random", *size, 0, B=3)
    close([x.double() for x in fn(*tensors)], expected(fn, *double(tensors)), 1e-5)


@pytest.mark.parametrize("fn", [calibrate, tail, kept])
def test_threads_and_repetition_do_not_change_a_bit(fn):
    tensors = hard_case("random", 63, 41, 17, 0, B=33)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(fn(*tensors))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_flags_leave_gradients_out_and_change_no_others():
    tensors = problem(7, 9, 4)
    everything = calibrate(*tensors)
    for flags in itertools.product([False, True], repeat=3):
        got = calibrate(*tensors, flags=flags)
        for a, b, wanted in zip(got, everything, [True, *flags, True, True], strict=True):
            assert torch.equal(a, b) if wanted else a.shape == (0,)
    for fn in (tail, kept):
        *values, gU, gV, gS, gH, gscalars = fn(*tensors, gh=False)
        assert gH.shape == (0,)
        rest = [x for i, x in enumerate(fn(*tensors)) if i != 6]
        assert all(torch.equal(a, b) for a, b in zip([*values, gU, gV, gS, gscalars], rest, strict=True))


@pytest.mark.parametrize("fn", [calibrate, tail, kept])
def test_inputs_are_not_written_to_and_may_lie_anywhere(fn):
    tensors = hard_case("random", 9, 7, 3, 0, B=3)
    copies, want = [x.clone() for x in tensors], fn(*tensors)
    assert all(torch.equal(x, y) for x, y in zip(tensors, copies, strict=True))
    shifted = []
    for x in tensors:
        # one element past an aligned address
        store = torch.empty(x.numel() + 1, dtype=x.dtype)
        store[1:] = x.reshape(-1)
        shifted.append(store[1:].view(x.shape))
    assert all(torch.equal(x, y) for x, y in zip(fn(*shifted), want, strict=True))


def test_the_order_is_that_of_a_stable_sort(isa):
    """Equal values stay in their order, NaN comes first: as torch sorts."""
    U, V, S, H, *gradients = problem(6, 5, 5)
    S[0] = torch.tensor([0.5, 2.0, 0.5, 2.0, 0.5])
    S[1] = 0
    S[2, 3] = float("nan")
    _, order = torch.sort(S, descending=True, stable=True)
    out, spectrum, _ = tail(U, V, S, H, *gradients)[:3]
    want, want_S, _ = reference.svd_tail(U, V, S, H, *SCALARS)
    assert order[2, 0] == 3
    close([torch.view_as_complex(out), spectrum[:2]], [want, want_S[:2]])
    assert spectrum[2].isnan().tolist() == [True, False, False, False, False]


@pytest.mark.parametrize("fn", [calibrate, tail, kept])
def test_zero_columns(isa, fn):
    """|0| and the norm of a zero column have subgradient 0."""
    tensors = [x.clone() for x in problem(6, 5, 3)]
    tensors[0][0, :, 1] = 0
    tensors[1][1] = 0
    tensors[3][2] = 0
    got = fn(*tensors)
    assert all(torch.isfinite(x).all() for x in got)
    close(got, expected(fn, *tensors))


@pytest.mark.parametrize("fn", [calibrate, tail, kept])
@pytest.mark.parametrize("size", [(4, 3, 2), (19, 18, 17)])
def test_nan_stays_in_its_sample(fn, size):
    tensors = problem(*size)
    tensors[3][1, 2, 1] = float("nan")
    *found, scalar = fn(*tensors)
    assert scalar.isnan().any()
    assert found[0 if fn is calibrate else 1][1].isnan().any()
    for x in found:
        assert torch.isfinite(x[[0, 2]]).all()


@pytest.mark.parametrize("fn", [calibrate, tail, kept])
def test_an_empty_batch(fn):
    *found, scalar = fn(*problem(4, 3, 2, B=0))
    assert (scalar == 0).all()
    assert all(len(x) == 0 for x in found)


def test_bad_arguments_are_named():
    U, V, S, H, *_ = problem(4, 3, 2)
    u, v, h, tau, three = real(U), real(V), real(H), scalars(0.5), scalars(*SCALARS)
    ops = torch.ops.lomacs
    for call, message in (
        (lambda: ops.spectral_calibrate(u[:, :3], h, v, S, tau), r"U must have shape \(3, 4, 2, 2\)"),
        (lambda: ops.spectral_calibrate(u, h, v, S.half(), tau), "S_pred must be float32 or float64"),
        (lambda: ops.spectral_calibrate(u, h, v, S, three), r"tau must have shape \(1\), got \(3\)"),
        (lambda: ops.spectral_calibrate(u, h, v, S, tau.float()), "tau must be float64"),
        (lambda: ops.spectral_calibrate(u, h.mT.contiguous().mT, v, S, tau), "H must be contiguous"),
        (lambda: ops.svd_tail(u, v[:2], S, h, three), "V_raw must have shape"),
        (lambda: ops.svd_tail(u, v, S, h, tau), "scalars must have shape"),
        (lambda: ops.svd_tail(u[:, :, :0], v[:, :, :0], S[:, :0], h, three), "no dimension but the batch"),
        (lambda: ops.svd_tail_backward(u, S, u, u, v, S, h, three, True), "gV must have shape"),
        (lambda: ops.svd_tail_backward(u.float(), S, v, u, v, S, h, three, True), "gU must be float64"),
        (lambda: ops.svd_tail_kept_backward(u, S, v, u, v, S, h, three, u, u, S, True), "V must have shape"),
        (
            lambda: ops.svd_tail_kept_backward(u, S, v, u, v, S, h, three, u, v, S, True),
            "kept must have shape",
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


def test_tau_of_no_dimension():
    U, V, S, H, *_ = problem(4, 3, 2)
    args = (real(U), real(H), real(V), S)
    value = torch.ops.lomacs.spectral_calibrate(*args, torch.tensor(0.7, dtype=torch.float64))
    assert torch.equal(value, torch.ops.lomacs.spectral_calibrate(*args, scalars(0.7)))
