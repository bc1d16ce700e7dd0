"""The CPU kernels of `lomacs::ortho_refine` and `lomacs::bjorck`: accuracy, instruction sets, threads, edges."""

import random

import pytest
import torch

from lomacs_fast import reference
from lomacs_fast.ops import native, ortho  # noqa: F401

SIZES = [(1, 1), (2, 2), (7, 1), (8, 8), (63, 11), (17, 17), (40, 33), (64, 32)]
ISAS = ("avx512", "avx2", "portable")
EPS = torch.finfo(torch.float32).eps
KINDS = ("random", "ill-conditioned", "nearly orthonormal", "rank-deficient", "zero", "columns of any size")
ITERATIONS = [(order, steps) for order in (1, 2) for steps in (0, 1, 3, 4)]


@pytest.fixture(scope="module", autouse=True)
def library():
    if reasons := native.reasons("cpu"):
        pytest.skip(f"no native library: {'; '.join(reasons)}")


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("LOMACS_FAST_ISA", request.param)
    try:
        refine(matrices(2, 1))
    except RuntimeError as error:
        if "lacks" not in str(error):
            raise
        pytest.skip(f"no {request.param} in this processor")
    return request.param


def matrices(M, r, B=3, dtype=torch.complex128, seed=0):
    return torch.randn(B, M, r, dtype=dtype, generator=torch.Generator().manual_seed(seed)) / M**0.5


def real(x):
    return torch.view_as_real(x)


def scalars(*values):
    return torch.tensor(values, dtype=torch.float64)


def refine(U, step=0.3):
    return torch.view_as_complex(torch.ops.lomacs.ortho_refine(real(U), None, scalars(step))[0])


def refine_gradient(g, U, step=0.3):
    gU, gV, gstep = torch.ops.lomacs.ortho_refine_backward(real(g), None, real(U), None, scalars(step))
    assert gV.shape == (0,)
    return torch.view_as_complex(gU), gstep


def kept(g, U, step=0.3):
    """Value and gradients by what the forward keeps for the backward."""
    arguments = real(U), None, scalars(step)
    out, none, residuals, norms = torch.ops.lomacs.ortho_refine_kept(*arguments)
    gradients = torch.ops.lomacs.ortho_refine_kept_backward(
        real(g), None, *arguments, out, none, residuals, norms
    )
    return torch.view_as_complex(out), torch.view_as_complex(gradients[0]), gradients[2]


def bjorck(U, steps, order):
    return torch.view_as_complex(torch.ops.lomacs.bjorck(real(U), steps, order))


def bjorck_gradient(g, U, steps, order):
    return torch.view_as_complex(torch.ops.lomacs.bjorck_backward(real(g), real(U), steps, order))


def all_of(g, U, name, *rest):
    """Value and gradients by the kernels."""
    if name == "kept":
        return kept(g, U, *rest)
    if name == "refine":
        return refine(U, *rest), *refine_gradient(g, U, *rest)
    return bjorck(U, *rest), bjorck_gradient(g, U, *rest)


def expected(g, U, name, *rest):
    """Value and gradients by autograd of the reference."""
    U = U.clone().requires_grad_()
    if name in ("refine", "kept"):
        step = torch.tensor(*rest or [0.3], dtype=torch.float64, requires_grad=True)
        out = reference.ortho_refine(U, step)
        gU, gstep = torch.autograd.grad(out, (U, step), g)
        return out.detach(), gU, gstep.reshape(1)
    out = reference.bjorck(U, *rest)
    return out.detach(), *torch.autograd.grad(out, U, g)


def close(got, want, bound=1e-10):
    for x, y in zip(got, want, strict=True):
        assert x.shape == y.shape
        size = y.norm() if y.norm() > 1e-6 else torch.ones(())
        assert (x - y).norm() <= bound * size


@pytest.mark.parametrize("size", [*SIZES, (3, 7), (9, 40)])
def test_refinement_in_float64_equals_autograd_of_the_reference(isa, size):
    for scale in (1.0, 0.2):
        U, g = scale * matrices(*size), matrices(*size, seed=1)
        for name in ("refine", "kept"):
            close(all_of(g, U, name), expected(g, U, name))


@pytest.mark.parametrize(("order", "steps"), ITERATIONS)
@pytest.mark.parametrize("size", SIZES)
def test_bjorck_in_float64_equals_autograd_of_the_reference(isa, size, order, steps):
    # the first is scaled, the second lies inside the bound
    for scale in (4.0, 0.05):
        U, g = scale * matrices(*size), matrices(*size, seed=1)
        close(all_of(g, U, "bjorck", steps, order), expected(g, U, "bjorck", steps, order))


@pytest.mark.parametrize("size", [(9, 5), (64, 32), (8, 1)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "scales"), [(torch.complex64, (1e9, 1e12, 1e18)), (torch.complex128, (1e80, 1e150))]
)
def test_bjorck_of_large_matrices(isa, size, dtype, scales):
    """Of which the squares of the Gram matrix's entries are beyond the largest number."""
    U, g, bound = matrices(*size), matrices(*size, seed=1), 2e-6 if dtype == torch.complex64 else 1e-10
    for order in (1, 2):
        want, of_u = expected(g, 1e9 * U, "bjorck", 4, order)
        for scale in scales:
            got, got_u = all_of(g.to(dtype), (scale * U).to(dtype), "bjorck", 4, order)
            assert (got - want).norm() <= bound * want.norm()
            # what it gives does not change with the scale, so its gradient falls by it
            assert (got_u * (scale / 1e9) - of_u).norm() <= bound * of_u.norm()


def test_large_sizes():
    U, g = matrices(256, 128, B=1), matrices(256, 128, B=1, seed=1)
    close(all_of(g, U, "refine"), expected(g, U, "refine"))
    close(all_of(g, U, "bjorck", 2, 2), expected(g, U, "bjorck", 2, 2))


@pytest.mark.parametrize("order", [1, 2])
def test_equal_row_sums_share_the_gradient_of_the_scale(isa, order):
    """Equal columns tie for the largest row sum; torch's `amax` gives each its part."""
    U = 3 * matrices(6, 1).expand(3, 6, 4).contiguous()
    g = matrices(6, 4, seed=1)
    for steps in (0, 2):
        close(all_of(g, U, "bjorck", steps, order), expected(g, U, "bjorck", steps, order))


def hard_case(kind, M, r, seed, B=32):
    U = matrices(M, r, B, seed=seed)
    if kind == "ill-conditioned":
        right = torch.linalg.qr(matrices(r, r, B, seed=seed + 100))[0]
        U = torch.linalg.qr(U)[0] * torch.logspace(0, -10, r, dtype=torch.float64) @ right.mH
    elif kind == "nearly orthonormal":
        U = torch.linalg.qr(U)[0] + 1e-4 * U
    elif kind == "rank-deficient":
        U[..., -1] = U[..., 0]
        U[..., 1] = 0
    elif kind == "zero":
        U = U * 0
    elif kind == "columns of any size":
        U = U * torch.logspace(2, -2, r, dtype=torch.float64)
    return U.to(torch.complex64).contiguous(), matrices(M, r, B, seed=seed + 200).to(torch.complex64)


def check_errors(names, runs):
    """Pooled error of ours against float64: at most twice that of eager, plus 4 eps."""
    for i, name in enumerate(names):
        want, base, got = (torch.cat([x[i].reshape(-1) for x in each]) for each in zip(*runs, strict=True))
        size = want.norm() if want.norm() > 0 else torch.ones(())
        assert torch.isfinite(real(got) if got.is_complex() else got).all(), name
        error, bound = (got - want).norm() / size, 2 * (base - want).norm() / size + 4 * EPS
        assert error <= bound, f"{name}: {error:.2e}, allowed {bound:.2e}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(64, 32), (63, 11)])
# five and six steps of order 1 and three and four of order 2 share Gram matrices in groups of every length; of
# more, the first go one at a time, since what they leave in directions of no singular value grows step by step
@pytest.mark.parametrize(
    "call",
    [
        ("refine", 0.1),
        ("kept", 0.1),
        ("kept", 0.5),
        *(("bjorck", *x) for x in ((5, 1), (6, 1), (14, 1), (20, 1), (3, 2), (4, 2), (14, 2))),
    ],
)
def test_float32_error_is_at_most_twice_eager(size, kind, call):
    runs = []
    for seed in range(3):
        U, g = hard_case(kind, *size, seed)
        # one at a time where the gradient of the step is a number a sample
        share = len(U) if call[0] == "bjorck" else 1
        for u, h in zip(U.split(share), g.split(share), strict=True):
            exact = expected(h.to(torch.complex128), u.to(torch.complex128), *call)
            runs.append((exact, expected(h, u, *call), all_of(h, u, *call)))
    check_errors(("value", "gU", "gstep")[: len(runs[0][0])], runs)


def drawn_sizes(count=24, seed=0):
    """M from 8 to 256 and r from 1 to 128, M >= r: the extremes, powers of two, their neighbours, and a draw."""
    generator = random.Random(seed)
    sizes = [
        (8, 1),
        (8, 8),
        (256, 1),
        (256, 128),
        (128, 128),
        (255, 127),
        (200, 100),
        (16, 16),
        (17, 15),
        (33, 32),
    ]
    while len(sizes) < 10 + count:
        M = generator.randint(8, 256)
        sizes.append((M, generator.randint(1, min(M, 128))))
    return sizes


@pytest.mark.parametrize("kind", ["random", "ill-conditioned", "columns of any size"])
@pytest.mark.parametrize("call", [("kept", 0.3), *(("bjorck", *x) for x in ((5, 1), (8, 1), (4, 2)))])
def test_every_size_keeps_the_rule(kind, call):
    runs = []
    for seed, size in enumerate(drawn_sizes()):
        U, g = hard_case(kind, *size, seed, B=1)
        exact = expected(g.to(torch.complex128), U.to(torch.complex128), *call)
        # every size has the same weight; the gradient of the step is a number, often a small one
        norms = [x.norm() if x.is_complex() else 1 for x in exact]
        run = exact, expected(g, U, *call), all_of(g, U, *call)
        runs.append([[x / n for x, n in zip(each, norms, strict=True)] for each in run])
    check_errors(("value", "gU", "gstep")[: len(runs[0][0])], runs)


@pytest.mark.parametrize("size", [(128, 64), (256, 128)])
def test_the_largest_factors_keep_the_rule(size):
    """Longest blocks of steps: rounding grows with the columns, and so do theirs."""
    runs = []
    for seed in range(3):
        U, _ = hard_case("columns of any size", *size, seed, B=11)
        runs.append(
            ((reference.bjorck(U.to(torch.complex128), 6),), (reference.bjorck(U, 6),), (bjorck(U, 6, 1),))
        )
    check_errors(("value",), runs)


# on either side of the ends of the three polynomials, whose bounds on the spectrum are nearly exact for one direction
@pytest.mark.parametrize("width", [0.26, 0.28, 0.32, 0.34, 0.42, 0.47, 0.49, 0.55, 0.57, 0.61, 0.63, 0.7])
@pytest.mark.parametrize(("steps", "order"), [(3, 1), (5, 1), (20, 1), (3, 2), (6, 2)])
def test_all_steps_at_once_near_orthonormal_columns_keep_the_rule(isa, width, steps, order):
    runs = []
    for sign in (-1, 1):
        left, right = (torch.linalg.qr(matrices(n, 11, seed=n))[0] for n in (63, 11))
        values = torch.ones(11, dtype=torch.float64)
        values[0] = (1 + sign * width) ** 0.5
        U = (left * values @ right.mH).to(torch.complex64).contiguous()
        exact = reference.bjorck(U.to(torch.complex128), steps, order)
        runs.append(((exact,), (reference.bjorck(U, steps, order),), (bjorck(U, steps, order),)))
    check_errors(("value",), runs)


# three steps still depend on the scale of the start, five do not; with the last columns some are beyond all polynomials
@pytest.mark.parametrize(("steps", "order"), [(3, 1), (4, 1), (5, 1), (20, 1), (3, 2)])
@pytest.mark.parametrize(("r", "noise"), [(64, 0.02), (64, 0.025), (63, 0.03), (63, 0.04)])
def test_scaled_columns_near_orthonormal_keep_the_rule(steps, order, r, noise):
    U = torch.linalg.qr(matrices(128, r, B=4))[0] + 128**0.5 * noise * matrices(128, r, B=4, seed=1)
    U = reference.column_normalize(U).to(torch.complex64).contiguous()
    assert ((U.mH @ U).abs().sum(-1).amax(-1) > 1.6**2).any()
    exact = reference.bjorck(U.to(torch.complex128), steps, order)
    check_errors(("value",), [((exact,), (reference.bjorck(U, steps, order),), (bjorck(U, steps, order),))])


@pytest.mark.parametrize(("M", "r"), [(64, 32), (128, 64), (63, 11)])
def test_float32_reaches_orthonormal_columns_from_condition_100(isa, M, r):
    left, right = (torch.linalg.qr(matrices(n, r, B=4, seed=n))[0] for n in (M, r))
    U = left * torch.logspace(0, -2, r, dtype=torch.float64) @ right.mH
    out = bjorck(U.to(torch.complex64).contiguous(), 20, 1).to(torch.complex128)
    defect = torch.linalg.matrix_norm(out.mH @ out - torch.eye(r, dtype=out.dtype))
    assert (defect <= 1e-5 * r**0.5).all()
    # nearer than the iteration on the Gram matrix comes, 3e-5
    assert (out - left @ right.mH).norm() <= 3e-6 * (4 * r) ** 0.5


@pytest.mark.parametrize("size", [(6, 3), (63, 41), (64, 32)])
def test_instruction_sets_agree(isa, size):
    U, g = (matrices(*size, seed=s).to(torch.complex64) for s in (0, 1))
    for call in (("refine", 0.3), ("bjorck", 3, 1), ("bjorck", 3, 2)):
        want = expected(g.to(torch.complex128), U.to(torch.complex128), *call)
        close([x.to(y.dtype) for x, y in zip(all_of(g, U, *call), want, strict=True)], want, 5e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("r", [1, 7, 16, 20, 37, 48])
def test_what_one_instruction_set_keeps_any_other_reads(isa, monkeypatch, r, dtype):
    U, gU = (real(matrices(50, r, seed=s)).to(dtype) for s in (0, 1))
    arguments = U, None, scalars(0.3)
    forward = torch.ops.lomacs.ortho_refine_kept(*arguments)
    want = torch.ops.lomacs.ortho_refine_kept_backward(gU, None, *arguments, *forward)
    # every number of it is written, so that the same input keeps the same bits
    assert forward[2].isfinite().all()
    for other in ISAS[ISAS.index(isa) :]:
        monkeypatch.setenv("LOMACS_FAST_ISA", other)
        found = torch.ops.lomacs.ortho_refine_kept_backward(gU, None, *arguments, *forward)
        close((found[0], found[2]), (want[0], want[2]), 20 * torch.finfo(dtype).eps)


def kept_pair(U, V, gU, gV):
    arguments = real(U), real(V), scalars(0.3, 0.2)
    forward = torch.ops.lomacs.ortho_refine_kept(*arguments)
    backward = torch.ops.lomacs.ortho_refine_kept_backward(real(gU), real(gV), *arguments, *forward)
    return *forward[:2], *backward


def pair(U, V, gU, gV):
    steps = scalars(0.3, 0.2)
    forward = torch.ops.lomacs.ortho_refine(real(U), real(V), steps)
    return *forward, *torch.ops.lomacs.ortho_refine_backward(real(gU), real(gV), real(U), real(V), steps)


@pytest.mark.parametrize(("name", "pair"), [("refine", pair), ("kept", kept_pair)])
def test_both_factors_in_one_call_give_the_bits_of_two(name, pair):
    U, V, gU, gV = (matrices(n, 5, B=9, seed=s) for s, n in enumerate((33, 17, 33, 17)))
    u, v, gu, gv, gsteps = pair(U, V, gU, gV)
    for x, g, step, out, gradient, gstep in (
        (U, gU, 0.3, u, gu, gsteps[:1]),
        (V, gV, 0.2, v, gv, gsteps[1:]),
    ):
        for a, b in zip(all_of(g, x, name, step), (out, gradient, gstep), strict=True):
            assert torch.equal(real(a) if a.is_complex() else a, b)


def test_threads_and_repetition_do_not_change_a_bit():
    single = [matrices(n, 32, B=33, seed=s).to(torch.complex64) for s, n in enumerate((64, 63, 64, 63))]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            more = [real(x) for order in (1, 2) for x in all_of(single[2], single[0], "bjorck", 3, order)]
            results.append([*pair(*single), *kept_pair(*single), *more])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_inputs_are_not_written_to_and_may_lie_anywhere():
    tensors = [matrices(n, 3, seed=s).to(torch.complex64) for s, n in enumerate((9, 7, 9, 7))]
    copies = [x.clone() for x in tensors]
    calls = (("bjorck", 2, 1), ("bjorck", 2, 2))
    want = [*pair(*tensors), *(real(x) for c in calls for x in all_of(tensors[2], tensors[0], *c))]
    assert all(torch.equal(x, y) for x, y in zip(tensors, copies, strict=True))
    shifted = []
    for x in tensors:
        # one element past an aligned address
        store = torch.empty(x.numel() + 1, dtype=x.dtype)
        store[1:] = x.reshape(-1)
        shifted.append(store[1:].view(x.shape))
    got = [*pair(*shifted), *(real(x) for c in calls for x in all_of(shifted[2], shifted[0], *c))]
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_zero_columns_stay_zero(isa):
    U, g = matrices(5, 3), matrices(5, 3, seed=1)
    U[0], U[1, :, 1] = 0, 0
    for call in (("refine", 0.3), ("kept", 0.3), ("bjorck", 3, 1), ("bjorck", 3, 2)):
        got = all_of(g, U, *call)
        assert (got[0][U == 0] == 0).all()
        close(got, expected(g, U, *call))


@pytest.mark.parametrize("size", [(4, 2), (19, 17)])
def test_nan_stays_in_its_sample(size):
    U, g = matrices(*size), matrices(*size, seed=1)
    U[1, 2, 1] = float("nan")
    for call in (("refine", 0.3), ("kept", 0.3), ("bjorck", 0, 1), ("bjorck", 2, 1), ("bjorck", 2, 2)):
        value, gradient, *_ = all_of(g, U, *call)
        for x in (value, gradient):
            assert x[1].isnan().any()
            assert torch.isfinite(real(x[[0, 2]])).all()
    assert refine_gradient(g, U)[1].isnan()


def test_an_empty_batch():
    U = matrices(4, 3, B=0)
    for name in ("refine", "kept"):
        value, gradient, gstep = all_of(U, U, name)
        assert value.shape == gradient.shape == U.shape
        assert gstep == 0
    assert all(x.shape == U.shape for x in all_of(U, U, "bjorck", 2, 1))


def test_bad_arguments_are_named():
    U, step = real(matrices(4, 3)), scalars(0.1)
    ops = torch.ops.lomacs
    for call, message in (
        (lambda: ops.ortho_refine(U.half(), None, step), "U must be float32 or float64"),
        (lambda: ops.ortho_refine(U, None, step.float()), "steps must be float64"),
        (lambda: ops.ortho_refine(U, U, step), r"steps must have shape \(2\), got \(1\)"),
        (lambda: ops.ortho_refine(U, U[:2], scalars(0.1, 0.1)), r"V must have shape \(3, 4, 3, 2\)"),
        (lambda: ops.ortho_refine(U.mT.contiguous().mT, None, step), "U must be contiguous"),
        (lambda: ops.ortho_refine(U[:, :, :0], None, step), "no dimension but the batch may be empty"),
        (lambda: ops.ortho_refine_backward(U, U, U, None, step), "gV must be given where V is"),
        (lambda: ops.ortho_refine_backward(U[:, :2], None, U, None, step), "gU must have shape"),
        (lambda: ops.ortho_refine_kept_backward(U, None, U, None, step, U, U, U, U), "residuals must have"),
        (lambda: ops.bjorck(U[:, :2].contiguous(), 2, 1), "at least as many rows as columns"),
        (lambda: ops.bjorck(U, -1, 1), "steps must be at least 0, got -1"),
        (lambda: ops.bjorck(U, 1, 3), "order must be 1 or 2, got 3"),
        (lambda: ops.bjorck_backward(U.float(), U, 1, 1), "g must be float64"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
