"""The CPU kernel of `lomacs::aeplus`, compiled here from its sources: accuracy, every instruction set, threads."""

import pathlib

import pytest
import torch

from lomacs_fast import ops, reference  # noqa: F401
from lomacs_fast.ops import aeplus, native  # noqa: F401

ROOT = pathlib.Path(__file__).resolve().parents[1]
WEIGHTS = {"lam": 0.35, "w_energy": 0.4, "w_diag": 0.3, "w_match": 0.2}
NAMES = ("loss", "terms", "U", "S", "V", "H")
SIZES = ((6, 5, 3), (1, 1, 1), (2, 2, 2), (4, 7, 1), (63, 41, 11), (17, 33, 17), (40, 70, 33), (64, 64, 32))
ISAS = ("avx512", "avx2", "portable")
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def op():
    if reasons := native.reasons("cpu"):
        pytest.skip(f"no native library: {'; '.join(reasons)}")
    return torch.ops.lomacs.aeplus.default


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


def problem(M, N, r, B=3, dtype=torch.complex128, seed=0):
    generator = torch.Generator().manual_seed(seed)
    U, V, H = (torch.randn(B, *s, dtype=dtype, generator=generator) for s in ((M, r), (N, r), (M, N)))
    return (
        U / M**0.5,
        torch.rand(B, r, dtype=U.real.dtype, generator=generator),
        V / N**0.5,
        H / (M * N) ** 0.5,
    )


def near(factors, residual, seed=1):
    """The same factors, with a channel at the given relative residual from their product."""
    U, S, V, H = factors
    product = (U * S.unsqueeze(-2)) @ V.mH
    noise = torch.randn(H.shape, dtype=H.dtype, generator=torch.Generator().manual_seed(seed))
    size = torch.linalg.vector_norm(product, dim=(1, 2)) / torch.linalg.vector_norm(noise, dim=(1, 2))
    return U, S, V, product + noise * (residual * size)[:, None, None]


def run(op, tensors, match="norm", flags=(True, True, True, True), weights=WEIGHTS):
    U, S, V, H = tensors
    values = torch.tensor(list(weights.values()), dtype=torch.float64)
    real = (torch.view_as_real(x) for x in (U, V, H))
    U, V, H = real
    return op(U, S, V, H, values, match == "mean", *flags)


def expected(tensors, match="norm", gradients=True, weights=WEIGHTS):
    inputs = [x.clone().requires_grad_(gradients) for x in tensors]
    loss, terms = reference.aeplus_loss(*inputs, **weights, match=match)
    grads = torch.autograd.grad(loss, inputs) if gradients else ()
    return loss.detach(), torch.stack(terms), *(torch.view_as_real(g) if g.is_complex() else g for g in grads)


def double(tensors):
    return tuple(x.to(torch.complex128 if x.is_complex() else torch.float64) for x in tensors)


def single(tensors):
    return tuple(x.to(torch.complex64 if x.is_complex() else torch.float32).contiguous() for x in tensors)


@pytest.mark.parametrize("match", ["norm", "mean"])
@pytest.mark.parametrize("residual", [None, 0.3])
@pytest.mark.parametrize("size", SIZES)
def test_float64_equals_autograd_of_the_reference(op, isa, size, residual, match):
    tensors = problem(*size)
    if residual is not None:
        tensors = near(tensors, residual)
    for name, got, want in zip(NAMES, run(op, tensors, match), expected(tensors, match), strict=True):
        assert got.shape == want.shape
        assert got.dtype == torch.float64
        assert (got - want).norm() <= 1e-10 * want.norm(), name


@pytest.mark.slow
@pytest.mark.parametrize("size", [(128, 128, 64), (256, 256, 128)])
def test_large_sizes(op, size):
    tensors = problem(*size, B=1)
    for name, got, want in zip(NAMES, run(op, tensors), expected(tensors), strict=True):
        assert (got - want).norm() <= 1e-10 * want.norm(), name


def hard_case(kind, M, N, r, seed, B=32):
    U, S, V, H = problem(M, N, r, B, seed=seed)
    draw = problem(M, N, min(M, N), B, seed=seed + 100)
    if kind == "ill-conditioned":
        left, right = torch.linalg.qr(draw[0])[0], torch.linalg.qr(draw[2])[0]
        H = left * torch.logspace(0, -10, min(M, N), dtype=torch.float64) @ right.mH
    elif kind == "nearly orthonormal":
        U, V = (torch.linalg.qr(x)[0] + 1e-4 * x for x in (U, V))
    elif kind == "rank-deficient":
        H = draw[0][..., :2] @ draw[2][..., :2].mH
        U[..., -1] = U[..., 0]
        V[..., -1] = 0
    elif kind == "large S":
        S = S * 100
    elif kind.startswith("zero"):
        U, S, V, H = (x * 0 if name == kind[-1] else x for name, x in zip("USVH", (U, S, V, H), strict=True))
    elif kind.startswith("columns of any size"):
        scale = torch.logspace(2, -2, r, dtype=torch.float64)
        U, S, V, H = near((U * scale, S / scale**2, V * scale, H), 1e-2, seed)
    elif kind.startswith("truncated"):
        # leading columns, nearly, with a share of the energy: E V and E^H U vanish, E does not
        share = float(kind.split()[1])
        left, s, right = torch.linalg.svd(H, full_matrices=False)
        inside, outside = (x.square().sum(1, keepdim=True) for x in (s[:, :r], s[:, r:]))
        s = torch.cat([s[:, :r] * (share / inside).sqrt(), s[:, r:] * ((1 - share) / outside).sqrt()], 1)
        H = left * s[:, None] @ right
        U, S, V = left[..., :r] + 0.01 * U, 0.995 * s[:, :r], right.mH[..., :r] + 0.01 * V
    elif kind.startswith("residual"):
        U, S, V, H = near((U, S, V, H), float(kind.split()[1]), seed)
    return single((U, S, V, H))


def eager_figures(tensors, match, weights=WEIGHTS):
    """Loss and terms of every sample, and the gradients of the batch."""
    terms = reference.aeplus_terms(*tensors, match=match)
    loss = terms[0] + sum(w * term for w, term in zip(weights.values(), terms[1:], strict=True))
    return [x.double() for x in (loss, *terms, *expected(tensors, match, weights=weights)[2:])]


@pytest.mark.parametrize("match", ["norm", "mean"])
@pytest.mark.parametrize(
    "kind",
    [
        "random",
        "ill-conditioned",
        "nearly orthonormal",
        "rank-deficient",
        "large S",
        "zero U",
        "zero S",
        "zero V",
        "zero H",
        "columns of any size",
        "residual 1.2",
        "residual 0.5",
        "residual 1e-2",
        "residual 1e-4",
        "truncated 0.3",
        "truncated 0.79",
        "truncated 0.3, the residual alone",
        "truncated 0.79, the residual alone",
    ],
)
@pytest.mark.parametrize("size", [(64, 64, 32), (63, 41, 11)])
def test_float32_error_is_at_most_twice_eager(op, size, kind, match):
    exact, eager, ours = [], [], []
    weights = dict.fromkeys(WEIGHTS, 0.0) if kind.endswith("alone") else WEIGHTS
    kind = kind.split(",")[0]
    for seed in range(3):
        tensors = hard_case(kind, *size, seed)
        exact.append(eager_figures(double(tensors), match, weights))
        eager.append(eager_figures(tensors, match, weights))
        ours.append(native_figures(op)(tensors, match, weights))
    names = ("loss", *reference.AEPlusTerms._fields, "gU", "gS", "gV", "gH")
    for i, name in enumerate(names):
        want, base, got = (torch.cat([x[i].reshape(-1) for x in runs]) for runs in (exact, eager, ours))
        size_of = want.norm() if want.norm() > 0 else torch.ones(())
        assert torch.isfinite(got).all(), name
        error, bound = (got - want).norm() / size_of, 2 * (base - want).norm() / size_of + 4 * EPS
        assert error <= bound, f"{name}: {error:.2e}, allowed {bound:.2e}"


def relative_errors(scaled, scale, size, match, figures):
    """Of every figure against float64, pooled, with some of the inputs scaled."""
    want, got = [], []
    for seed in range(3):
        drawn = zip("USVH", problem(*size, 32, seed=seed), strict=True)
        tensors = single([x * scale if name in scaled else x for name, x in drawn])
        want.append(eager_figures(double(tensors), match))
        got.append(figures(tensors, match))
    pooled = (
        [torch.cat([x.reshape(-1) for x in each]) for each in zip(*runs, strict=True)] for runs in (want, got)
    )
    return [((y - x).norm() / x.norm()).item() for x, y in zip(*pooled, strict=True)]


def native_figures(op):
    def figures(tensors, match, weights=WEIGHTS):
        alone = [
            run(op, [x[b : b + 1] for x in tensors], match, [False] * 4, weights)[:2]
            for b in range(len(tensors[0]))
        ]
        values = torch.stack([torch.cat([loss.reshape(1), terms]) for loss, terms in alone])
        return [*values.double().T, *(x.double() for x in run(op, tensors, match, weights=weights)[2:])]

    return figures


@pytest.mark.parametrize("match", ["norm", "mean"])
# where eager's squares leave its range, its error is that of a scale at which they do not
@pytest.mark.parametrize(
    ("scaled", "scale", "of_eager"),
    [
        ("SH", 1e-20, 1e-15),
        ("SH", 1e-12, 1e-12),
        ("SH", 1e18, 1e15),
        ("UV", 1e-18, 1e-6),
        ("UV", 1e-10, 1e-6),
        ("UV", 1e9, 1e6),
        ("S", 1e18, 1e15),
        ("H", 1e18, 1e15),
    ],
)
def test_any_scale_by_the_rule(op, isa, scaled, scale, of_eager, match):
    names = ("loss", *reference.AEPlusTerms._fields, "gU", "gS", "gV", "gH")
    ours = relative_errors(scaled, scale, (17, 23, 9), match, native_figures(op))
    eager = relative_errors(scaled, of_eager, (17, 23, 9), match, eager_figures)
    for name, mine, theirs in zip(names, ours, eager, strict=True):
        assert mine <= 2 * theirs + 4 * EPS, f"{name}: {mine:.2e}, eager {theirs:.2e}"


@pytest.mark.parametrize("match", ["norm", "mean"])
@pytest.mark.parametrize("size", [(6, 5, 3), (63, 41, 11), (64, 64, 32)])
def test_instruction_sets_agree(op, isa, size, match):
    tensors = single(near(problem(*size), 0.5))
    for name, got, want in zip(NAMES, run(op, tensors, match), expected(double(tensors), match), strict=True):
        assert (got.double() - want).norm() <= 3e-6 * want.norm(), name


def test_the_widest_instruction_set_serves_unasked(op, monkeypatch):
    tensors, found = single(problem(63, 41, 11)), []
    for name in ISAS:
        monkeypatch.setenv("LOMACS_FAST_ISA", name)
        try:
            found.append(run(op, tensors))
        except RuntimeError as error:
            if "lacks" not in str(error):
                raise
    monkeypatch.delenv("LOMACS_FAST_ISA")
    unasked = run(op, tensors)
    same = [all(torch.equal(a, b) for a, b in zip(unasked, each, strict=True)) for each in found]
    # sums of other widths have other bits
    assert same == [True, *[False] * (len(found) - 1)]


def test_an_unknown_instruction_set_is_refused(op, monkeypatch):
    monkeypatch.setenv("LOMACS_FAST_ISA", "mmx")
    with pytest.raises(RuntimeError, match="LOMACS_FAST_ISA must be portable, avx2 or avx512, got mmx"):
        run(op, problem(2, 2, 1))


@pytest.mark.parametrize("size", [(6, 5, 3), (63, 41, 11), (64, 64, 32)])
def test_threads_and_repetition_do_not_change_a_bit(op, size):
    tensors = single(problem(*size, B=33))
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


@pytest.mark.parametrize("residual", [None, 0.3])
def test_flags_leave_gradients_out_and_change_no_others(op, residual):
    tensors = problem(7, 9, 4) if residual is None else near(problem(7, 9, 4), residual)
    everything = run(op, tensors)
    for bits in range(16):
        flags = [bool(bits >> i & 1) for i in range(4)]
        got = run(op, tensors, flags=flags)
        for a, b, wanted in zip(got, everything, [True, True, *flags], strict=True):
            assert torch.equal(a, b) if wanted else a.shape == (0,)


def test_inputs_are_not_written_to_and_may_lie_anywhere(op):
    tensors = single(problem(9, 7, 3))
    copies = [x.clone() for x in tensors]
    want = run(op, tensors)
    for x, y in zip(tensors, copies, strict=True):
        assert torch.equal(x, y)
    # one element past an aligned address, and read-only to the kernel for all it can know
    shifted = []
    for x in tensors:
        store = torch.empty(x.numel() + 1, dtype=x.dtype)
        store[1:] = x.reshape(-1)
        shifted.append(store[1:].view(x.shape))
    for a, b in zip(run(op, shifted), want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("match", ["norm", "mean"])
def test_exactly_orthonormal_factors(op, isa, match):
    H = single(problem(6, 5, 3))[3]
    U = torch.eye(6, 3, dtype=torch.complex64).repeat(3, 1, 1)
    V = torch.eye(5, 3, dtype=torch.complex64).repeat(3, 1, 1)
    for S in (torch.ones(3, 3), torch.zeros(3, 3)):
        for channel in (H, H * 0, (U * S.unsqueeze(-2)) @ V.mH):
            tensors = (U, S, V, channel)
            for name, got, want in zip(NAMES, run(op, tensors, match), expected(tensors, match), strict=True):
                assert torch.isfinite(got).all(), name
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_an_empty_batch(op, dtype):
    loss, terms, *gradients = run(op, problem(4, 3, 2, B=0, dtype=dtype))
    assert loss.isnan()
    assert terms.shape == (5,)
    assert terms.isnan().all()
    assert [tuple(g.shape) for g in gradients] == [(0, 4, 2, 2), (0, 2), (0, 3, 2, 2), (0, 4, 3, 2)]


@pytest.mark.parametrize("match", ["norm", "mean"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("size", [(4, 3, 2), (33, 16, 40), (64, 64, 32)])
def test_what_is_not_finite_stays_in_its_sample(op, isa, size, which, value, match):
    """No scratch of a sample with NaN or infinity reaches the next: the others keep their bits."""
    tensors = single(problem(*size))
    clean = run(op, tensors, match)
    tensors[which][1].view(-1)[min(5, tensors[which][1].numel() - 1)] = value
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        loss, terms, *gradients = run(op, tensors, match)
    finally:
        torch.set_num_threads(before)
    assert not loss.isfinite()
    assert not (terms if which == 3 else terms[[0, 4]]).isfinite()[0]
    for g, other in zip(gradients, clean[2:], strict=True):
        assert not torch.isfinite(g[1]).all()
        assert torch.equal(g[[0, 2]], other[[0, 2]])
    if which == 3 and value != value:
        assert terms[[0, 2, 3, 4]].isnan().all()
        assert all(g[1].isnan().all() for g in gradients)


def test_bad_arguments_are_named(op):
    U, S, V, H = problem(4, 3, 2)
    for bad, message in (
        ((U[:, :3], S, V, H), r"U must have shape \(3, 4, 2, 2\), got \(3, 3, 2, 2\)"),
        ((U, S.float(), V, H), "U must be float32"),
        ((U, S.half(), V, H), "S must be float32 or float64"),
        ((U, S, V, H.mT.contiguous().mT), "H must be contiguous"),
        ((U, S, V[:2], H), "V must have shape"),
        ((U[..., :0], S[..., :0], V[..., :0], H), "no dimension but the batch may be empty"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(op, bad)
