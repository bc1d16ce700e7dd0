"""The CPU kernels of the dual view's projection and of the fused front, compiled here from their sources."""

import pytest
import torch

from lomacs_fast import ops, reference  # noqa: F401
from lomacs_fast.ops import native

ISAS = ("avx512", "avx2", "portable")
# odd sides, which pooling cuts and upsampling stretches, and widths beside whole vectors
SIZES = ((2, 2, 1), (3, 2, 3), (2, 5, 17), (8, 6, 4), (5, 12, 5), (7, 33, 16), (63, 11, 3), (40, 63, 33))
NAMES = ("X", "gHd", "gweight", "gbias", "gpos")
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def ops_():
    if reasons := native.reasons("cpu"):
        pytest.skip(f"no native library: {'; '.join(reasons)}")
    namespace = torch.ops.lomacs
    return namespace.dual_view_project.default, namespace.dual_view_project_backward.default


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


def problem(M, N, d, B=3, seed=0):
    """Hd, weight, bias, pos, and the gradient of X, in double precision."""
    generator = torch.Generator().manual_seed(seed)
    Hd = torch.randn(B, M, N, dtype=torch.complex128, generator=generator)
    shapes = [(d, 4 * N), (d,), (1, M, d), (B, M, d)]
    weight, *rest = (torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes)
    return Hd, weight / (4 * N) ** 0.5, *rest


def cast(tensors, dtype=torch.float32):
    return [x.to(torch.promote_types(dtype, torch.complex32) if x.is_complex() else dtype) for x in tensors]


def run(ops_, tensors, gh=True, gw=True):
    forward, backward = ops_
    Hd, weight, bias, pos, gX = tensors
    planes = torch.view_as_real(Hd).contiguous()
    gHd, *rest = backward(gX, planes, weight, gh, gw)
    return forward(planes, weight, bias, pos), torch.view_as_complex(gHd) if gh else gHd, *rest


def expected(tensors):
    leaves = [x.detach().clone().requires_grad_() for x in tensors[:4]]
    X = reference.dual_view_project(*leaves)
    return X.detach(), *torch.autograd.grad(X, leaves, tensors[4])


@pytest.mark.parametrize("size", SIZES)
def test_float64_equals_autograd_of_the_reference(ops_, isa, size):
    tensors = problem(*size)
    for name, got, want in zip(NAMES, run(ops_, tensors), expected(tensors), strict=True):
        assert got.shape == want.shape, name
        assert got.dtype == want.dtype
        assert (got - want).norm() <= 1e-13 * want.norm(), name


def matrix(apply, n):
    """The matrix of a linear map of rows of n numbers, by applying it to the identity."""
    return apply(torch.eye(n, dtype=torch.float64))


def pool_and_stretch(n):
    """Torch's own pooling and upsampling along one axis, as an n x n matrix."""
    functional = torch.nn.functional

    def apply(x):
        # two equal rows: the other axis does nothing
        planes = x[:, None, None, :].expand(-1, 1, 2, -1)
        pooled = functional.avg_pool2d(planes, 2)
        return functional.interpolate(pooled, size=(2, n), mode="bilinear", align_corners=False)[:, 0, 0]

    return matrix(apply, n).T


@pytest.mark.parametrize(("M", "N"), [(2, 3), (7, 8), (9, 5), (64, 63), (6, 11)])
def test_the_folded_weights_are_the_banded_matrices_of_torch(ops_, M, N):
    """One-hot weights read the coarse map off: `A Hd C^T` with A and C from torch's functions on identities."""
    Hd, *_ = problem(M, N, 1)
    A, C = pool_and_stretch(M), pool_and_stretch(N)
    assert ((A != 0).sum(1) <= 4).all()
    weight = torch.zeros(2 * N, 4 * N, dtype=torch.float64)
    weight[:, 2 * N :] = torch.eye(2 * N, dtype=torch.float64)
    bias, pos = torch.zeros(2 * N, dtype=torch.float64), torch.zeros(1, M, 2 * N, dtype=torch.float64)
    X = ops_[0](torch.view_as_real(Hd).contiguous(), weight, bias, pos)
    coarse = torch.view_as_complex(X.view(3, M, N, 2))
    torch.testing.assert_close(coarse, A.to(Hd.dtype) @ Hd @ C.T.to(Hd.dtype), rtol=1e-12, atol=1e-12)


def hard_case(kind, M, N, d, seed, B=32):
    Hd, *rest = problem(M, N, d, B, seed)
    if kind == "ill-conditioned":
        U, _, V = torch.linalg.svd(Hd, full_matrices=False)
        Hd = U * torch.logspace(0, -10, min(M, N), dtype=torch.float64) @ V
    elif kind == "nearly orthonormal":
        Hd = torch.linalg.qr(Hd)[0] + 1e-4 * Hd
    elif kind == "rank-deficient":
        Hd = Hd[:, :, :1] @ Hd[:, :1]
    elif kind == "constant":
        Hd = Hd[:, :1, :1].expand(Hd.shape).clone()
    elif kind == "zero":
        Hd = Hd * 0
    return cast(cast([Hd, *rest]), torch.float64)


@pytest.mark.parametrize(
    "kind", ["random", "ill-conditioned", "nearly orthonormal", "rank-deficient", "constant", "zero"]
)
@pytest.mark.parametrize("size", [(64, 64, 64), (63, 11, 17)])
def test_float32_error_is_at_most_twice_eager(ops_, size, kind):
    runs = [[], [], []]
    for seed in range(3):
        tensors = hard_case(kind, *size, seed)
        runs[0].append(expected(tensors))
        runs[1].append(expected(cast(tensors)))
        runs[2].append(run(ops_, cast(tensors)))
    for i, name in enumerate(NAMES):
        want, base, got = (torch.cat([x[i].flatten() for x in r]).to(torch.complex128) for r in runs)
        size_of = want.norm() if want.norm() > 0 else torch.ones((), dtype=torch.float64)
        error, bound = (got - want).norm() / size_of, 2 * (base - want).norm() / size_of + 4 * EPS
        assert error <= bound, f"{name}: {error:.2e}, allowed {bound:.2e}"


@pytest.mark.parametrize("size", [(11, 63, 5), (64, 64, 64)])
def test_threads_and_repetition_do_not_change_a_bit(ops_, size):
    tensors = cast(problem(*size, B=67))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(run(ops_, tensors))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_flags_leave_gradients_out_and_change_no_others(ops_):
    tensors = problem(7, 9, 4)
    everything = run(ops_, tensors)
    for gh, gw in ((True, False), (False, True), (False, False)):
        got = run(ops_, tensors, gh, gw)
        for a, b, wanted in zip(got[1:], everything[1:], (gh, gw, gw, gw), strict=True):
            assert torch.equal(a, b) if wanted else a.shape == (0,)


def test_inputs_are_not_written_to_and_may_lie_anywhere(ops_):
    tensors = cast(problem(9, 7, 3))
    copies = [x.clone() for x in tensors]
    want = run(ops_, tensors)
    for x, y in zip(tensors, copies, strict=True):
        assert torch.equal(x, y)
    shifted = []
    for x in tensors:
        store = torch.empty(x.numel() + 1, dtype=x.dtype)
        store[1:] = x.reshape(-1)
        shifted.append(store[1:].view(x.shape))
    for a, b in zip(run(ops_, shifted), want, strict=True):
        assert torch.equal(a, b)


def test_nan_stays_in_its_sample(ops_):
    tensors = problem(6, 9, 2)
    clean = run(ops_, tensors)
    tensors[0][1, 2, 1] = float("nan")
    tensors[4][1] = float("nan")
    got = run(ops_, tensors)
    assert got[0][1, 2].isnan().all()
    assert got[1][1].isnan().any()
    for x, y in zip(got[:2], clean[:2], strict=True):
        assert torch.equal(x[[0, 2]], y[[0, 2]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_empty_batch(ops_, dtype):
    X, gHd, *weights = run(ops_, cast(problem(4, 3, 2, B=0), dtype))
    assert X.shape == (0, 4, 2)
    assert gHd.shape == (0, 4, 3)
    assert [tuple(w.shape) for w in weights] == [(2, 12), (2,), (1, 4, 2)]
    assert all((w == 0).all() for w in weights)


def test_bad_arguments_are_named(ops_):
    Hd, weight, bias, pos, gX = problem(4, 3, 2)
    forward, backward = ops_
    planes = torch.view_as_real(Hd).contiguous()
    for bad, message in (
        ((planes[..., 0], weight, bias, pos), "Hd must have shape"),
        ((planes.half(), weight, bias, pos), "Hd must be float32 or float64"),
        ((planes[:, :1], weight, bias, pos[:, :1]), "at least 2"),
        ((planes[:, :, :1].contiguous(), weight[:, :4].contiguous(), bias, pos), "at least 2"),
        ((planes, weight[:, :11], bias, pos), r"weight must have shape \(2, 12\), got \(2, 11\)"),
        ((planes, weight.mT.contiguous().mT, bias, pos), "weight must be contiguous"),
        ((planes, weight, bias.float(), pos), "bias must be float64"),
        ((planes, weight, bias[:1], pos), "bias must have shape"),
        ((planes, weight, bias, pos[:, :3]), "pos must have shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            forward(*bad)
    with pytest.raises(RuntimeError, match="gX must have shape"):
        backward(gX[:2], planes, weight, True, True)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("size", [(2, 3, 4), (63, 11, 5), (64, 64, 32)])
def test_the_front_is_both_ops_to_the_bit(ops_, isa, size, normalize):
    M, N, d = size
    H, *projection, _ = cast(problem(M, N, d))
    generator = torch.Generator().manual_seed(1)
    gate = [torch.randn(s, generator=generator) for s in ((3, M), (M, 3), (3, N), (N, 3))]
    planes = torch.view_as_real(H).contiguous()
    X, Hd, norms = torch.ops.lomacs.gate_project.default(planes, *gate, 0.7, normalize, *projection)
    want_Hd, want_norms = torch.ops.lomacs.freq_gate.default(planes, *gate, 0.7, normalize)
    assert torch.equal(Hd, want_Hd)
    assert torch.equal(norms, want_norms)
    assert torch.equal(X, ops_[0](want_Hd, *projection))


def front_problem(M, N, d, B=3, seed=0, hidden=(3, 5)):
    """H, four weights of the gate, weight, bias, pos; gradients of X and of Hd; double precision."""
    H, *projection, gX = problem(M, N, d, B, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    shapes = [s for h, n in zip(hidden, (M, N), strict=True) for s in ((h, n), (n, h))]
    gate = [torch.randn(s, dtype=torch.float64, generator=generator) / s[1] ** 0.5 for s in shapes]
    return H, *gate, *projection, gX, torch.randn(H.shape, dtype=H.dtype, generator=generator)


def run_kept(tensors, normalize=True, with_gHd=True, of_projection=True, temperature=0.7):
    """X, Hd, norms, and the gradients of all weights, from what the forward keeps."""
    H, *weights, gX, gHd = tensors
    planes, gHd = (torch.view_as_real(x).contiguous() for x in (H, gHd))
    gate, projection = weights[:4], weights[4:]
    X, Hd, norms, kept = torch.ops.lomacs.gate_project_kept(
        planes, *gate, temperature, normalize, *projection
    )
    gradients = torch.ops.lomacs.gate_project_kept_backward(
        gX, gHd if with_gHd else None, gate[1], gate[3], temperature, projection[0], Hd, kept, of_projection
    )
    return X, torch.view_as_complex(Hd), norms, *gradients


def expected_front(tensors, normalize=True, with_gHd=True):
    H, *weights, gX, gHd = tensors
    leaves = [x.detach().clone().requires_grad_() for x in weights]
    X, Hd, *norms = reference.gate_project(H, *leaves[:4], 0.7, *leaves[4:], normalize=normalize)
    asked = ((X, Hd), (gX, gHd)) if with_gHd else ((X,), (gX,))
    gradients = torch.autograd.grad(asked[0], leaves, asked[1])
    return X.detach(), Hd.detach(), norms[0] if norms else gX.new_empty(0), *gradients


FRONT = ("X", "Hd", "norms", "gr1", "gr2", "gc1", "gc2", *NAMES[2:])
# sides of whole blocks of 16 and beside them, whole vectors and beside them, several passes of a transform
FRONTS = ((2, 3, 4, 3), (63, 11, 5, 37), (40, 63, 17, 3), (64, 32, 16, 9))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("size", FRONTS)
def test_gradients_from_what_is_kept_equal_autograd_of_the_reference(ops_, isa, size, normalize):
    tensors = front_problem(*size)
    for with_gHd in (True, False):
        got, want = (f(tensors, normalize, with_gHd) for f in (run_kept, expected_front))
        for name, x, y in zip(FRONT, got, want, strict=True):
            assert x.shape == y.shape, name
            assert (x - y).norm() <= 1e-12 * y.norm(), name


@pytest.mark.parametrize(
    "kind", ["random", "ill-conditioned", "rank-deficient", "zero", "large weights", "scaled"]
)
@pytest.mark.parametrize("size", [(64, 64, 32), (63, 11, 17)])
def test_kept_float32_error_is_at_most_twice_eager(ops_, size, kind):
    for normalize in (False, True):
        runs = [[], [], []]
        for seed in range(3):
            H, *rest = front_problem(*size, 32, seed, hidden=(8, 8))
            if kind == "large weights":
                rest[1], rest[3] = rest[1] * 300, rest[3] * 300
            elif kind == "scaled":
                H = H * torch.logspace(-15, 15, 32, dtype=torch.float64)[:, None, None]
            else:
                H = hard_case(kind, *size, seed)[0]
            tensors = cast(cast([H, *rest]), torch.float64)
            runs[0].append(expected_front(tensors, normalize))
            runs[1].append(expected_front(cast(tensors), normalize))
            runs[2].append(run_kept(cast(tensors), normalize))
        for i, name in enumerate(FRONT):
            want, base, got = (torch.cat([x[i].flatten() for x in r]).to(torch.complex128) for r in runs)
            size_of = want.norm() if want.norm() > 0 else torch.ones((), dtype=torch.float64)
            error, bound = (got - want).norm() / size_of, 2 * (base - want).norm() / size_of + 4 * EPS
            assert error <= bound, f"{name}: {error:.2e}, allowed {bound:.2e}"


@pytest.mark.parametrize("exponent", [-36, -20, 20, 34])
def test_gradients_from_what_is_kept_at_any_scale(ops_, exponent):
    H, *rest = front_problem(11, 8, 4)
    tensors = cast([H * 10.0**exponent, *rest])
    for normalize in (False, True):
        want = expected_front(cast(tensors, torch.float64), normalize)
        for name, x, y in zip(FRONT, run_kept(tensors, normalize), want, strict=True):
            # products of two such numbers leave the precision
            assert (x - y).norm() <= 1e-5 * y.norm() + 1e-42, name


@pytest.mark.parametrize("size", [(40, 11, 5), (63, 11, 5), (64, 64, 16)])
def test_what_is_kept_serves_every_instruction_set(ops_, isa, size, monkeypatch):
    """A strip is 16 frequencies everywhere, and none of it is left as it was found."""
    H, *weights, gX, _ = cast(front_problem(*size))
    gate, projection = weights[:4], weights[4:]
    arguments = torch.view_as_real(H).contiguous(), *gate, 0.7, True, *projection
    *values, kept = torch.ops.lomacs.gate_project_kept(*arguments)
    assert kept.isfinite().all()
    for x, y in zip(values, torch.ops.lomacs.gate_project(*arguments), strict=True):
        assert torch.equal(x, y)
    backward = torch.ops.lomacs.gate_project_kept_backward
    rest = gX, None, gate[1], gate[3], 0.7, projection[0], values[1], kept, False
    here = backward(*rest)
    monkeypatch.setenv("LOMACS_FAST_ISA", "portable")
    other = torch.ops.lomacs.gate_project_kept(*arguments)[-1]
    assert (other - kept).norm() <= 1e-5 * kept.norm()
    for x, y in zip(here[:4], backward(*rest)[:4], strict=True):
        assert (x - y).norm() <= 1e-5 * y.norm()


def test_kept_threads_and_repetition_do_not_change_a_bit(ops_):
    tensors = cast(front_problem(33, 24, 20, B=70))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5, 1):
            torch.set_num_threads(threads)
            results.append(run_kept(tensors))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    alone = run_kept(tensors, of_projection=False)
    assert all(torch.equal(a, b) for a, b in zip(alone[:7], results[0][:7], strict=True))
    assert all(x.shape == (0,) for x in alone[7:])


def test_kept_inputs_are_not_written_to(ops_):
    tensors = cast(front_problem(9, 7, 3))
    copies = [x.clone() for x in tensors]
    run_kept(tensors)
    assert all(torch.equal(x, y) for x, y in zip(tensors, copies, strict=True))


def test_kept_nan_and_no_samples(ops_):
    tensors = front_problem(6, 9, 2)
    clean = run_kept(tensors)
    tensors[0][1, 2, 1] = float("nan")
    got = run_kept(tensors)
    for x, y in zip(got[:3], clean[:3], strict=True):
        assert torch.equal(x[[0, 2]], y[[0, 2]])
    # as autograd has it, a hidden number that is not known passes nothing back
    assert got[0][1].isnan().all()
    assert all(x.isnan().any() for x in (got[4], got[6], got[7]))
    X, Hd, norms, *gradients = run_kept(front_problem(4, 3, 2, B=0))
    assert (X.shape, Hd.shape, norms.shape) == ((0, 4, 2), (0, 4, 3), (0,))
    assert all((g == 0).all() for g in gradients)
    assert [g.shape for g in gradients] == [w.shape for w in tensors_of_weights(4, 3, 2)]


def tensors_of_weights(*size):
    return front_problem(*size)[1:8]


def test_bad_arguments_of_the_kept_backward_are_named(ops_):
    H, *weights, gX, gHd = front_problem(4, 3, 2)
    planes, gHd = (torch.view_as_real(x).contiguous() for x in (H, gHd))
    _, Hd, _, kept = torch.ops.lomacs.gate_project_kept(planes, *weights[:4], 0.7, True, *weights[4:])
    good = [gX, gHd, weights[1], weights[3], 0.7, weights[4], Hd, kept, True]
    for position, bad, message in (
        (0, gX[:2], "gX must have shape"),
        (1, gHd[:2], "gHd must have shape"),
        (2, weights[1][:3], "row_w2 must have shape"),
        (3, weights[3].float(), "col_w2 must be float64"),
        (4, 0.0, "temperature must be positive"),
        (5, weights[4][:, :11], "weight must have shape"),
        (6, Hd[..., 0], "Hd must have shape"),
        (7, kept[:, 1:], "kept must have shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.lomacs.gate_project_kept_backward(*good[:position], bad, *good[position + 1 :])
