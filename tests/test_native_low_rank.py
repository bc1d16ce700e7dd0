"""The CPU kernel of `lomacs::low_rank`, compiled here from its sources: accuracy, every instruction set, threads."""

import pytest
import torch

from lomacs_fast import reference
from lomacs_fast.ops import low_rank, native

NAMES = ("loss", "F", "G", "H")
NESTINGS = low_rank.NESTINGS
# beyond one strip, one chain of sums, one panel; M != N; L larger than a side
SIZES = ((6, 5, 3), (1, 1, 1), (4, 7, 1), (63, 41, 11), (17, 33, 48), (130, 259, 33), (300, 140, 70))
ISAS = ("avx512", "avx2", "portable")
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def op():
    if reasons := native.reasons("cpu"):
        pytest.skip(f"no native library: {'; '.join(reasons)}")
    return torch.ops.lomacs.low_rank.default


@pytest.fixture(params=ISAS)
def isa(request, op, monkeypatch):
    monkeypatch.setenv("LOMACS_FAST_ISA", request.param)
    try:
        run(op, problem(2, 2, 1))
    except RuntimeError as error:
        if "lacks" not in str(error):
            raise
        pytest.skip(f"no {request.param} in this processor")
    return request.param


def problem(M, N, L, B=2, dtype=torch.complex128, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = ((N, L), (M, L), (M, N))
    F, G, H = (torch.randn(B, *s, dtype=dtype, generator=generator) for s in sizes)
    return F / N**0.5, G / M**0.5, H / (M * N) ** 0.5


def planes(x):
    return (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).contiguous()


def run(op, tensors, nesting="none", shape=None, flags=(True, True, True)):
    rows, columns = shape or tensors[2].shape[1:3]
    args = [planes(x) for x in tensors]
    return op(*args, rows, columns, NESTINGS.index(nesting), *flags)


def expected(tensors, nesting="none", shape=None):
    """Losses of the matrices, and the gradients of every one's own loss."""
    inputs = [x.clone().requires_grad_() for x in tensors]
    losses = reference.low_rank_loss(*inputs, nesting, shape=shape)
    return losses.detach(), *(planes(g) for g in torch.autograd.grad(losses.sum(), inputs))


def wider(x):
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


@pytest.mark.parametrize("dtype", [torch.complex128, torch.float64])
@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize("size", SIZES)
def test_float64_equals_autograd_of_the_reference(op, isa, size, nesting, dtype):
    tensors = problem(*size, dtype=dtype)
    shape = (2 * size[0] + 1, size[1] + 3)
    for got, want, name in zip(
        run(op, tensors, nesting, shape), expected(tensors, nesting, shape), NAMES, strict=True
    ):
        assert got.shape == want.shape
        assert got.dtype == torch.float64
        assert (got - want).norm() <= 1e-12 * want.norm(), name


@pytest.mark.parametrize("dtype", [torch.complex128, torch.float64])
@pytest.mark.parametrize("B", [1, 2])
def test_a_matrix_larger_than_a_cache(op, dtype, B):
    """Columns of H are copied before they are read, and every matrix is spread over all threads."""
    tensors = problem(411, 517, 5, B, dtype) if dtype.is_complex else problem(611, 717, 5, B, dtype)
    for got, want, name in zip(run(op, tensors), expected(tensors), NAMES, strict=True):
        assert (got - want).norm() <= 1e-12 * want.norm(), name


def hard_case(kind, M, N, L, seed, dtype, B=32):
    F, G, H = problem(M, N, L, B, dtype, seed)
    left, right, _ = problem(N, M, min(M, N), B, dtype, seed + 100)
    if kind == "ill-conditioned":
        spectrum = torch.logspace(0, -10, min(M, N), dtype=torch.float64)
        H = torch.linalg.qr(left)[0] * spectrum @ torch.linalg.qr(right)[0].mH
    elif kind == "nearly orthonormal":
        F, G = (torch.linalg.qr(x)[0] + 1e-4 * x for x in (F, G))
    elif kind == "rank-deficient":
        H = left[..., :2] @ right[..., :2].mH
        F[..., -1] = F[..., 0]
        G[..., -1] = 0
    elif kind == "columns of any size":
        scale = torch.logspace(2, -2, L, dtype=torch.float64)
        F, G = F * scale, G / scale
    elif kind.startswith("zero"):
        F, G, H = (x * 0 if name == kind[-1] else x for name, x in zip("FGH", (F, G, H), strict=True))
    elif kind.startswith("residual"):
        product = G @ F.mH
        H = product + float(kind.split()[1]) * H * product.norm() / H.norm()
    single = torch.complex64 if dtype.is_complex else torch.float32
    return tuple(x.to(single) for x in (F, G, H))


@pytest.mark.parametrize("dtype", [torch.complex128, torch.float64])
@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize(
    "kind",
    [
        "random",
        "ill-conditioned",
        "nearly orthonormal",
        "rank-deficient",
        "columns of any size",
        "zero F",
        "zero G",
        "zero H",
        "residual 1e-1",
        "residual 1e-4",
    ],
)
@pytest.mark.parametrize("size", [(64, 64, 16), (63, 41, 11)])
def test_float32_error_is_at_most_twice_eager(op, size, kind, nesting, dtype):
    exact, eager, ours = [], [], []
    for seed in range(3):
        tensors = hard_case(kind, *size, seed, dtype)
        exact.append(expected([wider(x) for x in tensors], nesting))
        eager.append(expected(tensors, nesting))
        ours.append(run(op, tensors, nesting))
    for i, name in enumerate(NAMES):
        want, base, got = (
            torch.cat([x[i].double().reshape(-1) for x in runs]) for runs in (exact, eager, ours)
        )
        size_of = want.norm() if want.norm() > 0 else torch.ones(())
        assert torch.isfinite(got).all(), name
        error, bound = (got - want).norm() / size_of, 2 * (base - want).norm() / size_of + 4 * EPS
        assert error <= bound, f"{name}: {error:.2e}, allowed {bound:.2e}"


@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.float32])
def test_float32_on_long_sums(op, dtype, nesting):
    tensors = problem(300, 700, 20, 1, dtype)
    figures = [
        expected([wider(x) for x in tensors], nesting),
        expected(tensors, nesting),
        run(op, tensors, nesting),
    ]
    for name, want, base, got in zip(NAMES, *figures, strict=True):
        error, bound = (got - want).norm(), 2 * (base - want).norm() + 4 * EPS * want.norm()
        assert error <= bound, f"{name}: {error:.2e}, allowed {bound:.2e}"


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float32])
def test_instruction_sets_agree(op, isa, dtype):
    tensors = problem(63, 141, 35, dtype=dtype)
    for nesting in NESTINGS:
        want = expected([wider(x) for x in tensors], nesting)
        for name, got, exact in zip(NAMES, run(op, tensors, nesting), want, strict=True):
            assert (got.double() - exact).norm() <= 3e-6 * exact.norm(), name


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float32])
@pytest.mark.parametrize(
    "size", [(6, 5, 3, 33), (63, 41, 11, 33), (150, 270, 20, 5), (300, 290, 9, 1), (411, 717, 5, 2)]
)
def test_threads_and_repetition_do_not_change_a_bit(op, size, dtype):
    tensors = problem(*size, dtype=dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(run(op, tensors))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float32])
def test_a_matrix_alone_has_the_bits_that_it_has_in_a_batch(op, dtype):
    tensors = problem(150, 140, 40, 3, dtype)
    whole = run(op, tensors)
    for b in range(3):
        for a, batch in zip(run(op, [x[b : b + 1] for x in tensors]), whole, strict=True):
            assert torch.equal(a, batch[b : b + 1])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float32])
def test_flags_leave_gradients_out_and_change_no_others(op, dtype):
    tensors = problem(7, 9, 4, dtype=dtype)
    everything = run(op, tensors)
    for bits in range(8):
        flags = [bool(bits >> i & 1) for i in range(3)]
        for a, b, wanted in zip(run(op, tensors, flags=flags), everything, [True, *flags], strict=True):
            assert torch.equal(a, b) if wanted else a.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float32])
def test_inputs_are_not_written_to_and_may_lie_anywhere(op, dtype):
    tensors = [planes(x) for x in problem(9, 7, 3, dtype=dtype)]
    copies = [x.clone() for x in tensors]
    want = op(*tensors, 9, 7, 0, True, True, True)
    for x, y in zip(tensors, copies, strict=True):
        assert torch.equal(x, y)
    shifted = []
    for x in tensors:
        room = torch.empty(x.numel() + 1)
        room[1:] = x.reshape(-1)
        shifted.append(room[1:].view(x.shape))
    for a, b in zip(op(*shifted, 9, 7, 0, True, True, True), want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float64])
def test_an_empty_batch(op, dtype):
    loss, *gradients = run(op, problem(4, 3, 2, B=0, dtype=dtype))
    assert loss.shape == (0,)
    pair = (2,) if dtype.is_complex else ()
    assert [tuple(g.shape) for g in gradients] == [(0, 3, 2, *pair), (0, 4, 2, *pair), (0, 4, 3, *pair)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("size", [(63, 41, 11), (140, 150, 20)])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.float32])
def test_what_is_not_finite_stays_in_its_matrix(op, isa, dtype, size, which, value):
    """No scratch of such a matrix reaches the next: the others keep their bits."""
    tensors = problem(*size, 3, dtype)
    clean = run(op, tensors, "joint")
    tensors[which][1, 2, 1] = value
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        got = run(op, tensors, "joint")
    finally:
        torch.set_num_threads(before)
    assert got[0].isfinite().tolist() == [True, False, True]
    for x, y in zip(got, clean, strict=True):
        assert torch.equal(x[[0, 2]], y[[0, 2]])
    if which == 2 and value != value:
        assert got[1][1, 1].isnan().all()
        assert got[2][1, 2].isnan().all()


def test_bad_arguments_are_named(op):
    F, G, H = problem(4, 3, 2)
    for bad, message in (
        ((F[:, :2], G, H), r"F must have shape \(2, 3, 2, 2\), got \(2, 2, 2, 2\)"),
        ((F, G[:1], H), "G must have shape"),
        ((F, G.to(torch.complex64), H), "G must be float64"),
        ((F.real, G, H), "F must have as many dimensions as H"),
        ((F[..., :0], G[..., :0], H), "no dimension but the batch may be empty"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(op, bad)
    strided = [planes(x) for x in (F, G)]
    with pytest.raises(RuntimeError, match="H must be contiguous"):
        op(*strided, torch.view_as_real(H.mT.contiguous().mT), 4, 3, 0, True, True, True)
    for rows, nesting, message in (
        (3, 0, "rows and columns must be at least"),
        (4, 3, "nesting must be 0, 1 or 2"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*strided, planes(H), rows, 3, nesting, True, True, True)
