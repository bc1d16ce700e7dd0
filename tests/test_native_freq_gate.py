"""The CPU kernels of `lomacs::freq_gate`, compiled here from their sources: accuracy, transforms, threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lomacs_fast import ops, reference  # noqa: F401
from lomacs_fast.ops import native

ISAS = ("avx512", "avx2", "portable")
# every radix, several passes, one number, tails of every vector, sides that differ
SIZES = (
    *((1, 1, 1), (2, 3, 2), (4, 5, 17), (7, 8, 3), (9, 11, 4), (16, 12, 5), (63, 11, 3)),
    *((13, 37, 2), (49, 25, 33), (40, 64, 32), (128, 30, 6)),
)
NAMES = ("Hd", "norms", "gH", "gr1", "gr2", "gc1", "gc2")
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def ops_(request):
    if reasons := native.reasons("cpu"):
        pytest.skip(f"no native library: {'; '.join(reasons)}")
    return torch.ops.lomacs.freq_gate.default, torch.ops.lomacs.freq_gate_backward.default


@pytest.fixture(params=ISAS)
def isa(request, ops_, monkeypatch):
    monkeypatch.setenv("LOMACS_FAST_ISA", request.param)
    try:
        run(ops_, problem(2, 2, 1))
    except RuntimeError as error:
        if "lacks" not in str(error):
            raise
        pytest.skip(f"no {request.param} in this processor")
    return request.param


def problem(M, N, hidden, B=3, seed=0):
    """H, four weights, and the gradients of Hd and of the norms, in double precision."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(hidden, M), (M, hidden), (hidden, N), (N, hidden)]
    weights = [torch.randn(s, dtype=torch.float64, generator=generator) / s[1] ** 0.5 for s in shapes]
    H, gHd = torch.randn(2, B, M, N, dtype=torch.complex128, generator=generator)
    return H, *weights, gHd, torch.randn(B, dtype=torch.float64, generator=generator)


def cast(tensors, dtype=torch.float32):
    return [x.to(torch.promote_types(dtype, torch.complex32) if x.is_complex() else dtype) for x in tensors]


def run(ops_, tensors, temperature=0.7, normalize=False, gh=True, gw=True):
    """All outputs of forward and backward, complex again."""
    forward, backward = ops_
    H, *weights, gHd, gnorms = tensors
    planes = torch.view_as_real(H).contiguous()
    Hd, norms = forward(planes, *weights, temperature, normalize)
    gH, *gw_ = backward(
        torch.view_as_real(gHd).contiguous(), gnorms, planes, *weights, temperature, normalize, gh, gw
    )
    return torch.view_as_complex(Hd), norms, torch.view_as_complex(gH) if gh else gH, *gw_


def expected(tensors, temperature=0.7, normalize=False):
    *leaves, gHd, gnorms = tensors
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    out = reference.freq_gate(*leaves, temperature, normalize=normalize)
    outputs, gradients = (out, (gHd, gnorms)) if normalize else ((out,), (gHd,))
    norms = out[1] if normalize else gnorms.new_empty(0)
    return outputs[0].detach(), norms.detach(), *torch.autograd.grad(outputs, leaves, gradients)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_float64_equals_autograd_of_the_reference(ops_, isa, size, normalize):
    tensors = problem(*size)
    results = run(ops_, tensors, normalize=normalize), expected(tensors, normalize=normalize)
    scale = results[1][2].norm()
    for name, got, want in zip(NAMES, *results, strict=True):
        assert got.shape == want.shape, name
        assert got.dtype == want.dtype
        # at 1 x 1 the gradient through the norm cancels
        assert (got - want).norm() <= 2e-12 * max(want.norm(), 1e-3 * scale), name


@pytest.mark.parametrize("size", [(7, 8, 3), (63, 11, 3), (64, 64, 32), (96, 100, 8)])
def test_instruction_sets_agree_in_single_precision(ops_, isa, size):
    tensors = problem(*size)
    for name, got, want in zip(NAMES, run(ops_, cast(tensors)), expected(tensors), strict=True):
        assert (got - want).norm() <= 3e-6 * want.norm(), name


def hard_case(kind, M, N, seed, B=32):
    H, *rest = problem(M, N, 8, B, seed)
    generator = torch.Generator().manual_seed(seed)
    if kind == "ill-conditioned":
        U, _, V = torch.linalg.svd(H, full_matrices=False)
        H = U * torch.logspace(0, -10, min(M, N), dtype=torch.float64) @ V
    elif kind == "nearly orthonormal":
        H = torch.linalg.qr(H)[0] + 1e-4 * H
    elif kind == "rank-deficient":
        H = H[:, :, :1] @ H[:, :1]
    elif kind == "constant":
        H = H[:, :1, :1].expand(H.shape).clone()
    elif kind == "single tone":
        m, n = torch.arange(M)[:, None], torch.arange(N)
        bins = torch.randint(0, 6, (2, B, 1, 1), generator=generator)
        H = torch.exp(2j * torch.pi * (bins[0] * m / M + bins[1] * n / N).double())
    elif kind == "zero":
        H = H * 0
    elif kind == "large weights":
        rest[1], rest[3] = rest[1] * 300, rest[3] * 300
    elif kind == "scaled":
        H = H * torch.logspace(-30, 30, B, dtype=torch.float64)[:, None, None]
        # sums over samples would see the largest alone
        rest[4] = rest[4] / torch.logspace(-30, 30, B, dtype=torch.float64)[:, None, None]
    # what single precision sees is the problem
    return [x.to(torch.promote_types(x.dtype, torch.float64)) for x in cast([H, *rest])]


KINDS = ["random", "ill-conditioned", "nearly orthonormal", "rank-deficient", "zero", "large weights"]
SPECTRA = ["constant", "single tone"]


def within_the_rule(ops_, kind, size, normalize):
    runs = [[], [], []]
    for seed in range(3):
        tensors = hard_case(kind, *size, seed)
        runs[0].append(expected(tensors, normalize=normalize))
        runs[1].append(expected(cast(tensors), normalize=normalize))
        runs[2].append(run(ops_, cast(tensors), normalize=normalize))
    for i, name in enumerate(NAMES):
        want, base, got = (torch.cat([x[i].flatten() for x in r]).to(torch.complex128) for r in runs)
        size_of = want.norm() if want.norm() > 0 else torch.ones((), dtype=torch.float64)
        assert got.isfinite().all(), name
        error, bound = (got - want).norm() / size_of, 2 * (base - want).norm() / size_of + 4 * EPS
        assert error <= bound, f"{name}: {error:.2e}, allowed {bound:.2e}"


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(64, 64), (63, 11)])
def test_float32_error_is_at_most_twice_eager(ops_, size, kind, normalize):
    within_the_rule(ops_, kind, size, normalize)


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("size", [(64, 64), (63, 11)])
def test_empty_spectra_within_the_rule(ops_, size, kind):
    within_the_rule(ops_, kind, size, False)


@pytest.mark.parametrize("exponent", [-44, -38, -30, -12, 12, 30, 36])
def test_any_scale_of_the_channel(ops_, exponent):
    """No square leaves the precision, with and without the norm; gradients are those of a rescaled channel."""
    tensors = problem(11, 8, 4)
    tensors = [tensors[0] * 10.0**exponent, *tensors[1:]]
    single = cast(tensors)
    exact = [x.to(torch.promote_types(x.dtype, torch.float64)) for x in single]
    assert single[0].isfinite().all()
    for normalize in (False, True):
        got, want = run(ops_, single, normalize=normalize), expected(exact, normalize=normalize)
        for name, x, y in zip(NAMES, got, want, strict=True):
            if name == "gH" and normalize and abs(exponent) > 30:
                continue  # divided by the norm, it leaves the precision
            # denormal numbers have few digits
            few = 1e-2 if name == "norms" and exponent == -44 else 1e-5
            assert x.isfinite().all(), name
            assert (x - y).norm() <= few * y.norm() + 1e-42, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_any_size(ops_, dtype):
    """Row and column logits that cancel, though no exponential of either is finite."""
    *_, gHd, gnorms = problem(4, 4, 1)
    # rho and kappa are exactly 1 at frequency zero
    H = torch.ones(3, 4, 4, dtype=torch.complex128)
    wide, tall = torch.ones(1, 4, dtype=torch.float64), torch.ones(4, 1, dtype=torch.float64)
    tensors = cast([H, wide, 4096 * tall, wide, -4095.75 * tall, gHd, gnorms], dtype)
    exact = cast(tensors, torch.float64)
    got, want = run(ops_, tensors, temperature=0.2), expected(exact, temperature=0.2)
    assert 0.77 < want[0].real.min() <= want[0].real.max() < 0.78
    for name, x, y in zip(NAMES, got, want, strict=True):
        # an eps of a mean of magnitudes is 20,480 eps of a logit over T
        assert (x - y).norm() <= 1e5 * torch.finfo(dtype).eps * y.norm(), name


@given(M=st.integers(1, 40), N=st.integers(1, 40), seed=st.integers(0, 99))
@settings(derandomize=True, deadline=None, max_examples=25)
def test_parseval_and_linearity(M, N, seed):
    """With perceptrons that never fire the gate is 1/2: Hd = H / 2 exactly, the op is linear, energy stays."""
    if native.reasons("cpu"):
        pytest.skip("no native library")
    pair = torch.ops.lomacs.freq_gate.default, torch.ops.lomacs.freq_gate_backward.default
    x, *weights, gHd, gnorms = problem(M, N, 3, B=2, seed=seed)
    weights[0], weights[2] = -weights[0].abs(), -weights[2].abs()
    of_x = run(pair, [x, *weights, gHd, gnorms])
    torch.testing.assert_close(of_x[0], x / 2)
    torch.testing.assert_close(of_x[2], gHd / 2)
    torch.testing.assert_close(
        run(pair, [x + 2j * gHd, *weights, gHd, gnorms])[0], of_x[0] + 1j * gHd, rtol=1e-12, atol=1e-12
    )
    # any gate: the energy of Hd is that of the gated spectrum, and no more than that of H
    _, *weights, _, _ = problem(M, N, 3, seed=seed)
    Hf = torch.fft.fft2(x, norm="ortho")
    gated = Hf * reference.spectral_gate(Hf, *weights, 0.7)
    Hd = run(pair, [x, *weights, gHd, gnorms])[0]
    torch.testing.assert_close(Hd.abs().square().sum((1, 2)), gated.abs().square().sum((1, 2)))
    torch.testing.assert_close(torch.fft.fft2(Hd, norm="ortho"), gated, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("size", [(11, 63, 5), (64, 64, 32)])
def test_threads_and_repetition_do_not_change_a_bit(ops_, size):
    tensors = cast(problem(*size, B=67))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(run(ops_, tensors, normalize=True))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_a_sample_does_not_see_its_batch(ops_):
    tensors = cast(problem(11, 9, 4, B=5))
    H, *weights, gHd, gnorms = tensors
    whole = run(ops_, tensors, normalize=True)
    for b in range(5):
        own = slice(b, b + 1)
        alone = run(ops_, [H[own], *weights, gHd[own], gnorms[own]], normalize=True)
        for x, y in zip(whole[:3], alone[:3], strict=True):
            assert torch.equal(x[own], y)


@pytest.mark.parametrize("normalize", [False, True])
def test_flags_leave_gradients_out_and_change_no_others(ops_, normalize):
    tensors = problem(7, 9, 4)
    everything = run(ops_, tensors, normalize=normalize)
    for gh, gw in ((True, False), (False, True), (False, False)):
        got = run(ops_, tensors, normalize=normalize, gh=gh, gw=gw)
        for a, b, wanted in zip(got[2:], everything[2:], (gh, *[gw] * 4), strict=True):
            assert torch.equal(a, b) if wanted else a.shape == (0,)


def test_zero_magnitude_has_a_gradient_of_zero(ops_):
    """A zero channel, and a spectrum with zeros that are exact: finite, and 0 where torch says 0."""
    H, *rest = problem(8, 4, 3)
    H = torch.zeros_like(H)
    H[1] = 1  # one frequency
    H[2, 0, 0] = 1  # no frequency is zero
    for normalize in (False, True):
        tensors = [H, *rest]
        for dtype, close in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            got, want = (
                run(ops_, cast(tensors, dtype), normalize=normalize),
                expected(tensors, normalize=normalize),
            )
            for name, x, y in zip(NAMES, got, want, strict=True):
                assert x.isfinite().all(), name
                assert (x - y).norm() <= close * y.norm(), name
            assert (got[0][0] == 0).all()


def test_inputs_are_not_written_to_and_may_lie_anywhere(ops_):
    tensors = cast(problem(9, 7, 3))
    copies = [x.clone() for x in tensors]
    want = run(ops_, tensors, normalize=True)
    for x, y in zip(tensors, copies, strict=True):
        assert torch.equal(x, y)
    shifted = []
    for x in tensors:
        store = torch.empty(x.numel() + 1, dtype=x.dtype)
        store[1:] = x.reshape(-1)
        shifted.append(store[1:].view(x.shape))
    for a, b in zip(run(ops_, shifted, normalize=True), want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalize", [False, True])
def test_an_empty_batch(ops_, dtype, normalize):
    tensors = cast(problem(4, 3, 2, B=0), dtype)
    Hd, norms, gH, *weights = run(ops_, tensors, normalize=normalize)
    assert Hd.shape == gH.shape == (0, 4, 3)
    assert norms.shape == (0,)
    assert [w.shape for w in weights] == [w.shape for w in tensors[1:5]]
    assert all((w == 0).all() for w in weights)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("size", [(5, 9), (16, 16)])
def test_nan_stays_in_its_sample(ops_, normalize, bad, size):
    tensors = problem(*size, 2)
    clean = run(ops_, tensors, normalize=normalize)
    tensors[0][1, 2, 1] = bad
    got = run(ops_, tensors, normalize=normalize)
    for x, y in zip(got[:1] + got[2:3], clean[:1] + clean[2:3], strict=True):
        assert x[1].isnan().all()
        assert torch.equal(x[[0, 2]], y[[0, 2]])


def test_nan_in_the_weights_passes(ops_):
    tensors = problem(5, 9, 2)
    for position in (1, 2, 3, 4):
        for normalize in (False, True):
            broken = list(tensors)
            broken[position] = torch.full_like(tensors[position], float("nan"))
            assert run(ops_, broken, normalize=normalize)[0].isnan().all(), position


def test_bad_arguments_are_named(ops_):
    H, *weights, gHd, gnorms = problem(4, 3, 2)
    forward, backward = ops_
    planes, gradient = torch.view_as_real(H).contiguous(), torch.view_as_real(gHd).contiguous()
    transposed = planes.transpose(1, 2).contiguous().transpose(1, 2)
    for bad, message in (
        ((planes[..., 0], *weights), "H must have shape"),
        ((planes.half(), *weights), "H must be float32 or float64"),
        ((transposed, *weights), "H must be contiguous"),
        ((planes, weights[0].float(), *weights[1:]), "row_w1 must be float64"),
        (
            (planes, weights[0], weights[1][:3], *weights[2:]),
            r"row_w2 must have shape \(4, 2\), got \(3, 2\)",
        ),
        ((planes, *weights[:2], weights[2][:, :2], weights[3]), r"col_w1 must have shape \(2, 3\)"),
        ((planes, *weights[:3], weights[3][:, :1]), "col_w2 must have shape"),
        ((planes[:, :0], weights[0][:, :0], weights[1][:0], *weights[2:]), "may be empty"),
    ):
        with pytest.raises(RuntimeError, match=message):
            forward(*bad, 0.7, False)
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(RuntimeError, match="temperature must be positive"):
            forward(planes, *weights, temperature, False)
    with pytest.raises(RuntimeError, match="gHd must have shape"):
        backward(gradient[:2], gnorms, planes, *weights, 0.7, True, True, True)
    with pytest.raises(RuntimeError, match="gnorms must have shape"):
        backward(gradient, gnorms[:2], planes, *weights, 0.7, True, True, True)
