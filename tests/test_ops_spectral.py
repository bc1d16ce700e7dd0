"""The contract of `lomacs::spectral_calibrate` and `lomacs::svd_tail`: gradients, graphs, FLOPs, views, refusals."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import lomacs_fast
from lomacs_fast import BackendError, functional, metrics, reference, use_backend
from lomacs_fast.ops import native, ortho, spectral, toolchain

pytestmark = pytest.mark.skipif(
    toolchain.find_compiler("cpu") is None and bool(native.reasons("cpu")), reason="no C++ compiler"
)
OPS = torch.ops.lomacs
SIZES = [(6, 5, 3), (4, 7, 4), (4, 4, 1), (1, 1, 1)]


@pytest.fixture(autouse=True)
def native_library():
    """Nothing here may pass because the reference served."""
    assert native.reasons("cpu") == ()
    with use_backend("cpp"):
        yield


def problem(M=6, N=5, r=3, batch=(3,), dtype=torch.complex128, seed=0):
    generator = torch.Generator().manual_seed(seed)
    U, V, H = (
        torch.randn(*batch, *s, dtype=torch.complex128, generator=generator) / s[0] ** 0.5
        for s in ((M, r), (N, r), (M, N))
    )
    S = torch.rand(*batch, r, dtype=torch.float64, generator=generator)
    scalars = [torch.tensor(x, dtype=torch.float64) for x in (0.1, 0.3, 0.7)]
    return U.to(dtype), V.to(dtype), S.to(dtype.to_real()), H.to(dtype), *scalars


def calibrate(module):
    return lambda U, V, S, H, a, b, tau: module.spectral_calibrate(U, H, V, S, tau)


def tail(module):
    return module.svd_tail


@pytest.fixture(params=[calibrate, tail], ids=["calibrate", "tail"])
def make(request):
    return request.param


def double(x):
    return x.to(torch.promote_types(x.dtype, torch.float64))


def results(fn, inputs):
    """Outputs, and the gradients of all inputs, zeros where there is none."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = fn(*inputs)
    out = list(out) if isinstance(out, tuple) else [out]
    gradients = []
    for i, x in enumerate(out):
        g = torch.randn(x.shape, dtype=torch.complex128, generator=torch.Generator().manual_seed(i))
        gradients.append((g if x.is_complex() else g.real).to(x.dtype))
    return [x.detach() for x in out] + list(
        torch.autograd.grad(out, inputs, gradients, allow_unused=True, materialize_grads=True)
    )


def close(got, want, factor=50):
    """Relative L2 error of each tensor, in units of the lowest precision among them."""
    eps = max(torch.finfo(x.dtype).eps for x in got)
    for x, y in zip(got, want, strict=True):
        norm = torch.linalg.vector_norm(double(y)).clamp_min(1)
        error = torch.linalg.vector_norm(double(x) - double(y)) / norm
        assert error <= factor * eps, (x.shape, error.item() / eps)


def raw(dtype, need, B=2):
    U, V, S, H, *_ = problem(batch=(B,), dtype=dtype)
    planes = [torch.view_as_real(x) if x.is_complex() else x for x in (U, V, S, H)]
    values = torch.tensor([0.1, 0.3, 0.7], dtype=torch.float64)
    return [x.requires_grad_(need) for x in (*planes, values)]


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_opcheck(dtype):
    U, V, S, H, values = raw(dtype, True)
    torch.library.opcheck(OPS.svd_tail.default, (U, V, S, H, values))
    torch.library.opcheck(OPS.svd_tail_kept.default, (U, V, S, H, values))
    tau = values[2:].detach().requires_grad_()
    torch.library.opcheck(OPS.spectral_calibrate.default, (U, H, V, S, tau))
    torch.library.opcheck(OPS.spectral_calibrate.default, (U.detach(), H.detach(), V, S, tau.detach()))
    U, V, S, H, values = (x.detach() for x in (U, V, S, H, values))
    u, _, v, kept = OPS.svd_tail_kept(U, V, S, H, values)
    for flag in (False, True):
        args = (U, S, V, U, V, S, H, values, u, v, kept, flag)
        torch.library.opcheck(OPS.svd_tail_kept_backward.default, args)
        torch.library.opcheck(OPS.svd_tail_backward.default, (U, S, V, U, V, S, H, values, flag))
        args = (S, U, H, V, S, values[2:], True, flag, not flag)
        torch.library.opcheck(OPS.spectral_calibrate_backward.default, args)


def test_what_the_gradients_need_is_kept_where_they_are_wanted(monkeypatch):
    """Without gradients no more than the results; with them the same bits and what the backward reads."""
    U, V, S, H, *scalars = problem(dtype=torch.complex64)
    called = []
    for name in ("svd_tail", "svd_tail_kept"):
        op = getattr(OPS, name).default
        monkeypatch.setattr(
            getattr(OPS, name), "default", lambda *x, op=op, name=name: called.append(name) or op(*x)
        )
    plain = functional.svd_tail(U, V, S, H, *scalars)
    leaf = S.clone().requires_grad_()
    wanted = functional.svd_tail(U, V, leaf, H, *scalars)
    with torch.no_grad():
        functional.svd_tail(U, V, leaf, H, *scalars)
    assert called == ["svd_tail", "svd_tail_kept", "svd_tail"]
    assert all(torch.equal(x, y) and y.requires_grad for x, y in zip(plain, wanted, strict=True))


def test_opcheck_of_no_samples():
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    U, V, S, H, values = raw(torch.complex64, True, B=0)
    torch.library.opcheck(OPS.svd_tail.default, (U, V, S, H, values), test_utils=checks)


@pytest.mark.parametrize("size", SIZES)
def test_gradcheck(make, size):
    inputs = [x.requires_grad_() for x in problem(*size, batch=(2,))]
    assert torch.autograd.gradcheck(make(functional), inputs)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_compiled_in_one_graph(make, dtype):
    """Values and gradients against double precision: compiled complex gradients have been silently wrong."""
    torch._dynamo.reset()
    compiled = torch.compile(make(functional), fullgraph=True, backend="aot_eager")
    for batch in ((3,), (2,)):
        args = problem(batch=batch, dtype=dtype)
        close(results(compiled, args), results(make(reference), [double(x) for x in args]))


def test_compiled_by_inductor():
    torch._dynamo.reset()
    args = problem(dtype=torch.complex64)
    compiled = torch.compile(functional.svd_tail, fullgraph=True)
    close(results(compiled, args), results(reference.svd_tail, [double(x) for x in args]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_full_precision(make, dtype):
    args = problem(dtype=torch.complex64)
    want = results(make(functional), args)
    with torch.autocast("cpu", dtype):
        got = results(make(functional), args)
        U, V, S, H, values = raw(torch.complex64, False)
        assert all(x.dtype == torch.float32 for x in OPS.svd_tail(U.to(dtype), V, S, H, values))
        assert OPS.spectral_calibrate(U.to(dtype), H, V, S, values[2:]).dtype == torch.float32
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def flops(fn):
    with FlopCounterMode(display=False) as counter:
        fn()
    return counter.get_total_flops()


@pytest.mark.parametrize("batch", [(3,), (), (2, 2)])
@pytest.mark.parametrize("needs", [*itertools.product([0, 1], repeat=4)])
def test_flop_formula(make, needs, batch):
    if make is tail and not (needs[0] and needs[1]):
        pytest.skip("the heads of the network feel both factors or none")
    counted = {}
    for backend in ("eager", "cpp"):
        args = problem(batch=batch)
        for x, need in zip(args[:4], needs, strict=True):
            x.requires_grad_(bool(need))

        def run(args=args):
            out = make(functional)(*args)
            out = out if isinstance(out, tuple) else (out,)
            if any(x.requires_grad for x in out):
                sum(x.abs().sum() for x in out).backward()

        with use_backend(backend), torch.no_grad():
            forward = flops(run)
        with use_backend(backend):
            counted[backend] = forward, flops(run)
    assert counted["cpp"] == counted["eager"]
    assert counted["cpp"][0] > 0


def test_multiply_adds_are_counted(make):
    args = [x.requires_grad_() for x in problem(16, 12, 6, dtype=torch.complex64)]
    counted = {}
    for backend in ("eager", "cpp"):
        with use_backend(backend), metrics.TrueMacCounter() as counter:
            out = make(functional)(*args)
            out = out if isinstance(out, tuple) else (out,)
            torch.autograd.grad(out, args, [x.detach() for x in out], allow_unused=True)
        assert not counter.uncounted
        counted[backend] = counter.macs
    # the gradient forms H V anew, which eager keeps
    assert 0 < counted["cpp"] < 1.2 * counted["eager"]


def test_second_derivatives_are_refused(make):
    U, *rest = problem()
    out = make(functional)(U.requires_grad_(), *rest)
    out = out[1] if isinstance(out, tuple) else out
    with pytest.raises(RuntimeError, match=r'no second derivatives.*use_backend\("eager"\) has them'):
        torch.autograd.grad(out.sum(), U, create_graph=True)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)))
def test_only_what_is_asked_for_gets_a_gradient(make, needs):
    args = list(problem())
    args[:4] = [x.requires_grad_(need) for x, need in zip(args[:4], needs, strict=True)]
    out = make(functional)(*args)
    out = out if isinstance(out, tuple) else (out,)
    assert all(x.requires_grad == any(needs) for x in out)
    if any(needs):
        # S alone: the other incoming gradients are undefined
        (out[0] if len(out) == 1 else out[1]).sum().backward()
    inputs = [x.detach().requires_grad_() for x in args]
    want = make(reference)(*inputs)
    S = want[1] if isinstance(want, tuple) else want
    gradients = torch.autograd.grad(S.sum(), inputs[:4], allow_unused=True, materialize_grads=True)
    for x, gradient, need in zip(args[:4], gradients, needs, strict=True):
        assert (x.grad is not None) == need
        if need:
            close([x.grad], [gradient])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scalars_get_gradients(dtype):
    U, V, S, H, *scalars = problem(dtype=torch.complex64)
    scalars = [x.to(dtype).requires_grad_() for x in scalars]
    u, s, v = functional.svd_tail(U, V, S, H, *scalars)
    assert (u.dtype, s.dtype, v.dtype) == (torch.complex64, torch.float32, torch.complex64)
    (u.real.sum() + s.sum() + v.real.sum()).backward()
    assert all(x.grad.dtype == dtype and x.grad.abs() > 0 for x in scalars)


def views(x):
    yield "strided", torch.stack([x, x * torch.nan], -1)[..., 0]
    yield "transposed", x.mT.contiguous().mT if x.ndim > 2 else x
    yield "expanded", x[:1].expand(x.shape)
    yield "offset", torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    if x.is_complex():
        yield "conjugated", x.conj()
        yield "adjoint", x.mT.contiguous().mH
        yield "both", torch._neg_view(x.conj())
    else:
        yield "imaginary", torch.complex(x * 0, -x).conj().imag


@pytest.mark.parametrize("position", range(4))
def test_views_give_the_bits_of_their_copies(make, position):
    args = problem(dtype=torch.complex64)
    for name, view in views(args[position]):
        plain = torch.empty(view.shape, dtype=view.dtype).copy_(view)
        got, want = (
            results(make(functional), [x if i == position else y for i, y in enumerate(args)])
            for x in (view, plain)
        )
        assert all(torch.equal(x.resolve_conj(), y) for x, y in zip(got, want, strict=True)), name


def test_batch_dimensions(make):
    flat = problem(batch=(6,))
    want = make(functional)(*flat)
    want = want if isinstance(want, tuple) else (want,)
    for batch in ((2, 3), (1, 6, 1)):
        got = make(functional)(*(x.reshape(*batch, *x.shape[1:]) if x.ndim else x for x in flat))
        for x, y in zip(got if isinstance(got, tuple) else (got,), want, strict=True):
            assert x.shape == (*batch, *y.shape[1:])
            assert torch.equal(x.reshape(y.shape), y)


@pytest.mark.parametrize("batch", [(0,), (2, 0)])
def test_no_samples(make, batch):
    got, want = (results(make(module), problem(batch=batch)) for module in (functional, reference))
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)


def test_the_tail_is_its_parts():
    U, V, S, H, a, b, tau = problem(9, 8, 4)
    order = S.argsort(dim=-1, descending=True, stable=True)
    sort = lambda X: X.gather(-1, order.unsqueeze(-2).expand_as(X))  # noqa: E731
    u = functional.ortho_refine(sort(functional.column_normalize(U)), a)
    v = functional.ortho_refine(sort(functional.column_normalize(V)), b)
    s = functional.spectral_calibrate(u, H, v, S.gather(-1, order), tau)
    close(functional.svd_tail(U, V, S, H, a, b, tau), (u, s, v))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda U, V, S, H: (U.real, V.real, S, H.real), "is float64, only complex64 and complex128"),
        (lambda *args: [x.to("meta") for x in args], "the C++ kernels run on CPUs, the tensors are on meta"),
        (lambda U, V, S, H: (U.to("meta"), V, S, H), "devices differ: "),
        (lambda *_: problem(1200, 1000, 1, batch=(1,))[:4], "too large"),
    ],
)
def test_calls_that_the_library_does_not_take(make, change, reason):
    args = [*change(*problem()[:4]), 0.1, 0.2, 0.3]
    with pytest.raises(BackendError, match="cannot be served by cpp") as error:
        make(functional)(*args)
    assert reason in str(error.value)
    if not any(isinstance(x, torch.Tensor) and x.is_meta for x in args):
        with use_backend("auto"):
            make(functional)(*args)


def test_refused_values():
    U, V, S, H, *_ = problem()
    for args, words in (
        ((U[:, :5], V, S, H, 0.1, 0.1, 0.5), "U_raw must have shape"),
        ((U, V[:2], S, H, 0.1, 0.1, 0.5), "V_raw must have the batch of H"),
        ((U, V, S[:, :2], H, 0.1, 0.1, 0.5), "S_pred must have shape"),
        ((U, V, S, H, 0.0, 0.1, 0.5), r"a must lie in \(0, 0.5\], got 0.0"),
        ((U, V, S, H, 0.1, 0.6, 0.5), r"b must lie in \(0, 0.5\], got 0.6"),
        ((U, V, S, H, 0.1, 0.1, 1.5), r"tau must lie in \[0, 1\], got 1.5"),
    ):
        with pytest.raises(ValueError, match=words):
            functional.svd_tail(*args)


def test_transforms_take_the_formula(make):
    U, *rest = problem()

    def total(u):
        out = make(functional)(u, *rest)
        return (out[1] if isinstance(out, tuple) else out).sum()

    with use_backend("auto"):
        gradient = torch.func.grad(total)(U)
    U.requires_grad_()
    close([gradient], torch.autograd.grad(total(U), U))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda U, V, S, H, x: OPS.svd_tail(U[0], V, S, H, x), "U_raw must"),
        (lambda U, V, S, H, x: OPS.svd_tail(U, V, S, H, x[:2]), "scalars must"),
        (lambda U, V, S, H, x: OPS.svd_tail(U, V, S[0], H, x), "S_pred must"),
        (lambda U, V, S, H, x: OPS.spectral_calibrate(U, H, V.float(), S, x[:1]), "V must"),
        (lambda U, V, S, H, x: OPS.spectral_calibrate(U, H, V, S, x), "tau must"),
        (lambda U, V, S, H, x: OPS.svd_tail_backward(U, S, U, U, V, S, H, x, True), "gV must"),
    ],
)
def test_wrong_arguments_of_the_ops(call, words):
    args = [x.detach() for x in raw(torch.complex128, False)]
    with pytest.raises(RuntimeError, match=words):
        call(*args)
    with (
        torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode,
        pytest.raises(RuntimeError, match=words),
    ):
        call(*(mode.from_tensor(x) for x in args))


def test_factors_that_no_device_has_run_wait(monkeypatch):
    pytest.importorskip("triton")
    asked = []
    monkeypatch.setattr(ortho.common, "single_triton_reasons", lambda *_: [])
    monkeypatch.setattr(
        ortho.common, "unproved_reasons", lambda name, device, proved: asked.append(proved) or []
    )
    (triton, *_) = (b for b in spectral.svd_tail.backends if b.name == "triton")
    for M, r in ((64, 32), (65, 32)):
        U, H = (torch.empty(1, M, n, dtype=torch.complex64, device="meta") for n in (r, M))
        S = torch.empty(1, r, device="meta")
        assert triton.reasons(U, U, S, H, 0.1, 0.1, 0.5) == []
        with use_backend("auto"):
            found = ortho.triton_reasons(U=U, H=H, V=U, S_pred=S)
        assert found == [] if M == 64 else "batched products are faster" in found[0]
    assert asked == [spectral.TILED]


def test_the_table_of_backends():
    for name in ("spectral_calibrate", "svd_tail"):
        rows = [row for row in lomacs_fast.backend_table() if row["op"] == name and row["device"] == "cpu"]
        assert [row["backend"] for row in rows] == ["triton", "cpp", "eager"]
        assert [row["backend"] for row in rows if not row["reasons"]] == ["cpp", "eager"]
