"""The contract of `lomacs::refine_svd` and `lomacs::approx_svd`: schema, gradients, graphs, FLOPs, refusals."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import lomacs_fast
from lomacs_fast import BackendError, approx_svd, functional, metrics, reference, use_backend
from lomacs_fast.ops import native, toolchain
from lomacs_fast.ops import refine as stem

pytestmark = pytest.mark.skipif(
    toolchain.find_compiler("cpu") is None and bool(native.reasons("cpu")), reason="no C++ compiler"
)
FORMS = pytest.mark.parametrize("hermitian", [False, True], ids=["general", "hermitian"])
OPS = torch.ops.lomacs


@pytest.fixture(autouse=True)
def native_library():
    """Nothing here may pass because the reference served."""
    assert native.reasons("cpu") == ()
    with use_backend("cpp"):
        yield


def normal(*shape, seed=0, dtype=torch.complex128):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def inputs(hermitian, dtype=torch.complex128, batch=(2,)):
    M, N = 6, 6 if hermitian else 5
    H = normal(*batch, M, N)
    H = H + H.mH if hermitian else H
    found = [H, normal(*batch, M, 3, seed=1), normal(*batch, N, 3, seed=2)]
    scalars = torch.tensor([[0.5, 0.1, 1.0, 0.6], [0.3, 0.1, 0.8, 2.0]], dtype=torch.float64)
    return [*(x.to(dtype) for x in found), scalars.to(dtype.to_real())]


def call(module, hermitian, active=None):
    def run(H, U, V, scalars):
        U, S, V = module.refine_svd(H, U, V, 2, hermitian=hermitian, active=active, scalars=scalars)
        return S, (U * S[..., None, :]) @ V.mH, U @ U.mH

    return run


def raw(hermitian, dtype=torch.float64, grad=True, B=2):
    H, U, V, scalars = inputs(hermitian, batch=(B,))
    H, U, V = (torch.view_as_real(x).to(dtype).requires_grad_(grad) for x in (H, U, V))
    return H, U, None if hermitian else V, scalars.to(dtype).requires_grad_(grad)


@FORMS
def test_opcheck(hermitian):
    for dtype in (torch.float32, torch.float64):
        args = (*raw(hermitian, dtype), 2, 2, False)
        torch.library.opcheck(OPS.refine_svd.default, args)
        H, U, V, scalars = raw(hermitian, dtype, grad=False)
        out = OPS.refine_svd(H, U, V, scalars, 2, 2, False)
        torch.library.opcheck(
            OPS.refine_svd_backward.default,
            (*(torch.ones_like(x) for x in out[:3]), H, U, V, scalars, out[3], 2, False),
        )
        for form in (-1, 0):
            torch.library.opcheck(OPS.approx_svd.default, (H, scalars, 3, 0, form, True))


def test_no_samples():
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(OPS.refine_svd.default, (*raw(False, B=0), 2, 2, False), test_utils=checks)
    U, S, V = approx_svd(normal(0, 3, 6, 5), 4)
    assert [tuple(x.shape) for x in (U, S, V)] == [(0, 3, 6, 4), (0, 3, 4), (0, 3, 5, 4)]


@FORMS
@pytest.mark.parametrize("active", [None, 2])
def test_gradients_equal_those_of_the_reference(hermitian, active):
    def gradients(module):
        args = [x.requires_grad_() for x in inputs(hermitian)]
        out = call(module, hermitian, active)(*args)
        seeds = [torch.ones_like(out[0]), *(normal(*x.shape, seed=1) for x in out[1:])]
        return torch.autograd.grad(out, args, seeds, allow_unused=True)

    for x, y in zip(gradients(functional), gradients(reference), strict=True):
        assert (x is None) == (y is None)
        if y is not None:
            torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-7)


@FORMS
def test_gradcheck(hermitian):
    args = [x.requires_grad_() for x in inputs(hermitian)]
    fn = call(functional, hermitian)
    assert torch.autograd.gradcheck(
        lambda H, *rest: fn(H + H.mH if hermitian else H, *rest), args, atol=1e-5, rtol=1e-4, fast_mode=True
    )


def test_second_derivatives_are_refused():
    H, U, V, scalars = (x.requires_grad_() for x in inputs(False))
    out = call(functional, False)(H, U, V, scalars)[0]
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(out.sum(), H, create_graph=True)


@FORMS
def test_compiled_in_one_graph_without_complex_arithmetic(hermitian):
    torch._dynamo.reset()
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    def run(H, U, V, scalars):
        return functional.refine_svd(H, U, V, 3, hermitian=hermitian, scalars=scalars)

    args = inputs(hermitian, torch.complex64)
    torch.compile(run, fullgraph=True, backend=keep)(*args)
    names = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    assert "lomacs.refine_svd.default" in names
    assert not {n for n in names if "mul" in n or "add" in n or "matmul" in n}
    torch._dynamo.reset()
    fn = torch.compile(call(functional, hermitian), fullgraph=True, backend="aot_eager")
    for batch in ((2,), (3,)):
        args = [x.requires_grad_() for x in inputs(hermitian, batch=batch)]
        found = [torch.autograd.grad(f(*args)[0].sum(), args[0])[0] for f in (fn, call(reference, hermitian))]
        torch.testing.assert_close(*found, rtol=1e-8, atol=1e-8)


def test_autocast_leaves_full_precision():
    args = inputs(False, torch.complex64)
    want = call(functional, False)(*args)
    with torch.autocast("cpu", torch.bfloat16):
        H, U, V, scalars = (x.to(torch.bfloat16) for x in raw(False, torch.float32, grad=False))
        assert OPS.refine_svd(H, U, V, scalars, 2, 2, False)[0].dtype == torch.float32
        assert OPS.approx_svd(H, scalars, 2, 0, -1, True)[1].dtype == torch.float32
        got = functional.refine_svd(args[0], args[1], args[2], 2, scalars=args[3])
    torch.testing.assert_close(got[1], want[0], rtol=1e-5, atol=1e-5)


def flops(fn):
    with FlopCounterMode(display=False) as counter:
        fn()
    return counter.get_total_flops()


@FORMS
@pytest.mark.parametrize(
    "options", [{}, {"active": 2}, {"active": 2, "orthonormal": True, "sweeps": 1}], ids=str
)
def test_flop_formula(hermitian, options):
    def run(backward):
        args = [x.requires_grad_(backward) for x in inputs(hermitian)]
        out = functional.refine_svd(*args[:3], 3, hermitian=hermitian, scalars=args[3], **options)
        if backward:
            torch.autograd.grad([x.abs().sum() for x in out], args, allow_unused=True)

    for backward in (False, True):
        counted = {}
        for backend in ("eager", "cpp"):
            with use_backend(backend):
                counted[backend] = flops(lambda: run(backward))  # noqa: B023
        assert counted["cpp"] == counted["eager"], backward
        assert counted["cpp"] > 0


def test_multiply_adds_are_counted():
    H = normal(2, 24, 20, dtype=torch.complex64)
    start = normal(2, 24, 8, dtype=torch.complex64)
    for fn in (lambda H: approx_svd(H, 18), lambda H: functional.refine_svd(H, start, start[:, :20], 2)):
        counted = {}
        for backend in ("eager", "cpp"):
            with use_backend(backend):
                counted[backend] = metrics.true_macs(fn, H)
        # the formula counts products, the reference what is between them too
        assert 0.7 < counted["cpp"] / counted["eager"] <= 1.0


def test_refusals_and_fallbacks():
    H = normal(1, 1100, 1100, dtype=torch.complex64)
    with pytest.raises(BackendError, match="too large for one thread"):
        approx_svd(H, 4)
    H = normal(2, 6, 5, dtype=torch.complex64).requires_grad_()
    with pytest.raises(BackendError, match="the native approximation has no gradient"):
        approx_svd(H, 4)
    with use_backend("auto"):
        approx_svd(H, 4)[1].sum().backward()
    assert H.grad.isfinite().all()
    with use_backend("auto"):
        grads = torch.func.grad(lambda x: functional.refine_svd(x, x[..., :3], x[:, :5, :3], 1)[1].sum())(
            H.detach()
        )
    assert grads.isfinite().all()


def test_the_table_names_both():
    rows = {(row["op"], row["backend"]): row["reasons"] for row in lomacs_fast.backend_table()}
    assert rows["refine_svd", "cpp"] == []
    assert rows["approx_svd", "cpp"] == []


def test_auto_takes_the_op_where_gradients_are_wanted_and_in_graphs():
    args = [x.requires_grad_() for x in inputs(False, torch.complex64)]
    with use_backend("auto"):
        found = functional.refine_svd(*args[:3], 2, scalars=args[3])
    name = found[1].grad_fn.name()
    assert "lomacs" in name
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    with use_backend("auto"):
        torch.compile(functional.refine_svd, fullgraph=True, backend=backend)(*args[:3], 2)
    assert any("refine_svd" in name for name in seen)


def test_columns_that_no_device_has_run_wait(monkeypatch):
    asked = []
    monkeypatch.setattr(
        stem.common, "single_triton_reasons", lambda name, x, proved: asked.append(proved) or []
    )
    H = torch.empty(3, 64, 64, dtype=torch.complex64)
    U = torch.empty(3, 64, 32, dtype=torch.complex64)
    for active in (16, 17):
        assert stem._triton_reasons(H, U, U, 3, active, False, None, 2, True) == []
    assert asked == [stem.common.PROVED, stem.common.NOWHERE]
