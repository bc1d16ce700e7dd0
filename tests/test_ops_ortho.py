"""The contract of `lomacs::ortho_refine` and `lomacs::bjorck`: schema, gradients, graphs, FLOPs, views, refusals."""

import copy
import itertools
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import lomacs_fast
from lomacs_fast import BackendError, functional, metrics, reference, use_backend
from lomacs_fast.ops import native, ortho, toolchain

pytestmark = pytest.mark.skipif(
    toolchain.find_compiler("cpu") is None and bool(native.reasons("cpu")), reason="no C++ compiler"
)


@pytest.fixture(autouse=True)
def native_library():
    """Nothing here may pass because the reference served."""
    assert native.reasons("cpu") == ()
    with use_backend("cpp"):
        yield


def matrices(M=6, r=3, batch=(3,), dtype=torch.complex128, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*batch, M, r, dtype=torch.complex128, generator=generator) / M**0.5).to(dtype)


def size(value, dtype=torch.float64):
    return torch.tensor(value, dtype=dtype)


# name: (public function of tensors, the same of the reference, its tensors of a batch and dtype)
def one(module):
    return lambda U, a: module.ortho_refine(U, a)


def both(module):
    return lambda U, V, a, b: module.ortho_refine_pair(U, V, a, b)


def iteration(order):
    return lambda module: lambda U: module.bjorck(U, 3, order)


CASES = {
    "one": (one, lambda **k: [matrices(**k), size(0.3)]),
    "pair": (both, lambda **k: [matrices(**k), matrices(5, seed=1, **k), size(0.3), size(0.2)]),
    "bjorck 1": (iteration(1), lambda **k: [matrices(**k)]),
    "bjorck 2": (iteration(2), lambda **k: [3 * matrices(**k)]),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def double(x):
    return x.to(torch.promote_types(x.dtype, torch.float64))


def results(fn, inputs):
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = fn(*inputs)
    out = list(out) if isinstance(out, tuple) else [out]
    gradients = []
    for i, x in enumerate(out):
        generator = torch.Generator().manual_seed(i)
        g = torch.randn(x.shape, dtype=torch.complex128, generator=generator)
        gradients.append(g.to(x.dtype))
    return [x.detach() for x in out] + list(torch.autograd.grad(out, inputs, gradients))


def close(got, want, factor=30):
    """Relative L2 error of each tensor, in units of the lowest precision among them."""
    eps = max(torch.finfo(x.dtype).eps for x in got)
    for x, y in zip(got, want, strict=True):
        norm = torch.linalg.vector_norm(double(y)).clamp_min(1)
        error = torch.linalg.vector_norm(double(x) - double(y)) / norm
        assert error <= factor * eps, (x.shape, error.item() / eps)


OPS = torch.ops.lomacs


def raw(dtype, needs, B=2):
    """Arguments of the ops themselves."""
    U, V = (
        torch.view_as_real(matrices(M, 3, (B,), dtype, M)).requires_grad_(need)
        for M, need in zip((6, 5), needs[:2], strict=True)
    )
    return U, V, torch.tensor([0.3, 0.2], dtype=torch.float64, requires_grad=needs[2])


def test_batches_that_differ_are_named():
    U = matrices(6, 3, (2, 3), torch.complex64)
    for shape in ((3, 2), (6,), (1, 6), ()):
        V = matrices(5, 3, shape, torch.complex64)
        with pytest.raises(ValueError, match=r"V must have the batch of U, \(2, 3\)"):
            functional.ortho_refine_pair(U, V, 0.3, 0.3)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_factors_may_come_as_pairs_or_as_numbers(dtype):
    U, V, steps = raw(dtype, (False, False, False))
    u, v = (torch.view_as_complex(x) for x in (U, V))
    for name in ("ortho_refine", "ortho_refine_kept"):
        op = getattr(OPS, name).default
        torch.library.opcheck(op, (u.clone().requires_grad_(), v, steps))
        torch.library.opcheck(op, (u, None, steps[:1].clone().requires_grad_()))
        (Uo, Vo, *kept), (uo, vo, *same) = op(U, V, steps), op(u, v, steps)
        for x, y in zip((uo, vo, *same), (*map(torch.view_as_complex, (Uo, Vo)), *kept), strict=True):
            assert torch.equal(x, y)
    of_kept = OPS.ortho_refine_kept_backward
    for op, more in ((OPS.ortho_refine_backward, ((), ())), (of_kept, ((Uo, Vo, *kept), (uo, vo, *same)))):
        torch.library.opcheck(op.default, (u, v, u, v, steps, *more[1]))
        *want, gsteps = op(U, V, U, V, steps, *more[0])
        *got, found = op(u, v, u, v, steps, *more[1])
        assert torch.equal(found, gsteps)
        for x, y in zip(got, want, strict=True):
            assert torch.equal(x, torch.view_as_complex(y))
    for args, words in (
        ((u, V, steps), "V must have shape"),
        ((U, v, steps), "V must have shape"),
        ((U[0], None, steps[:1]), "U must have shape"),
        ((u[None], None, steps[:1]), "U must have shape"),
        (
            (u, v.to(torch.complex32 if dtype == torch.complex64 else torch.complex64), steps),
            "V must be complex",
        ),
    ):
        with pytest.raises(RuntimeError, match=words):
            OPS.ortho_refine(*args)
    with pytest.raises(RuntimeError, match=r"U must have shape \(B, M, r, 2\)"):
        OPS.bjorck(u, 2, 1)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_opcheck(dtype):
    for needs in ((True, True, True), (True, False, False), (False, False, True)):
        U, V, steps = raw(dtype, needs)
        torch.library.opcheck(OPS.ortho_refine.default, (U, V, steps))
        torch.library.opcheck(OPS.ortho_refine.default, (U, None, steps[:1].detach()))
    U, V, steps = raw(dtype, (False, False, False))
    torch.library.opcheck(OPS.ortho_refine_backward.default, (U, V, U, V, steps))
    torch.library.opcheck(OPS.ortho_refine_backward.default, (U, None, U, None, steps[:1]))
    for v, sizes in ((V, steps), (None, steps[:1])):
        kept = OPS.ortho_refine_kept(U, v, sizes)
        torch.library.opcheck(OPS.ortho_refine_kept_backward.default, (U, v, U, v, sizes, *kept))
        leaf = U.detach().clone().requires_grad_()
        torch.library.opcheck(OPS.ortho_refine_kept.default, (leaf, v, sizes))
    for order in (1, 2):
        torch.library.opcheck(OPS.bjorck.default, (U.detach().requires_grad_(), 2, order))
        torch.library.opcheck(OPS.bjorck_backward.default, (U, U, 2, order))


def test_what_the_gradients_need_is_kept_where_they_are_wanted(monkeypatch):
    """Without gradients no more than the results; with them the same bits and the residuals."""
    U, called = matrices(), []
    real = {name: getattr(OPS, name).default for name in ("ortho_refine", "ortho_refine_kept")}
    for name, op in real.items():
        monkeypatch.setattr(
            getattr(OPS, name), "default", lambda *x, op=op, name=name: called.append(name) or op(*x)
        )
    leaf, step = U.clone().requires_grad_(), size(0.3).requires_grad_()
    plain = functional.ortho_refine(U, 0.3)
    for out in (functional.ortho_refine(leaf, 0.3), functional.ortho_refine(U, step)):
        assert out.requires_grad
        assert torch.equal(out, plain)
    with torch.no_grad():
        assert torch.equal(functional.ortho_refine(leaf, step), plain)
    assert called == ["ortho_refine", "ortho_refine_kept", "ortho_refine_kept", "ortho_refine"]


def test_opcheck_of_no_samples():
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    U, V, steps = raw(torch.complex64, (True, True, True), B=0)
    torch.library.opcheck(OPS.ortho_refine.default, (U, V, steps), test_utils=checks)
    torch.library.opcheck(OPS.bjorck.default, (U, 2, 1), test_utils=checks)


@pytest.mark.parametrize("shape", [(6, 3), (4, 4), (5, 1), (1, 1)])
def test_gradcheck(case, shape):
    M, r = shape
    make, _ = case
    inputs = [matrices(M, r, (2,)), matrices(M + 2, r, (2,), seed=1), size(0.3), size(0.2)]
    count = len(case[1]())
    inputs = {1: inputs[:1], 2: [inputs[0], inputs[2]], 4: inputs}[count]
    assert torch.autograd.gradcheck(make(functional), [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_compiled_in_one_graph(case, dtype):
    """Values and gradients against double precision: compiled complex gradients have been silently wrong."""
    torch._dynamo.reset()
    make, inputs = case
    compiled = torch.compile(make(functional), fullgraph=True, backend="aot_eager")
    for batch in ((3,), (2,)):
        args = inputs(batch=batch, dtype=dtype)
        close(results(compiled, args), results(make(reference), [double(x) for x in args]))


def test_compiled_by_inductor():
    torch._dynamo.reset()
    make, inputs = CASES["pair"]
    compiled = torch.compile(make(functional), fullgraph=True)
    args = inputs(dtype=torch.complex64)
    close(results(compiled, args), results(make(reference), [double(x) for x in args]))


def test_other_sizes_compile_nothing_anew():
    torch._dynamo.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(functional.ortho_refine, backend=count)
    found = [compiled(matrices(), size(a)) for a in (0.1, 0.2, 0.3)]
    assert not torch.equal(found[0], found[1])
    assert len(graphs) == 1
    assert "lomacs.ortho_refine.default" in {str(node.target) for node in graphs[0].graph.nodes}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_full_precision(case, dtype):
    make, inputs = case
    args = inputs(dtype=torch.complex64)
    want = results(make(functional), args)
    with torch.autocast("cpu", dtype):
        got = results(make(functional), args)
        U = torch.view_as_real(args[0].detach())
        assert OPS.bjorck(U.to(dtype), 1, 1).dtype == torch.float32
        assert OPS.ortho_refine(U.to(dtype), None, torch.full((1,), 0.1).double())[0].dtype == torch.float32
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def flops(fn):
    with FlopCounterMode(display=False) as counter:
        fn()
    return counter.get_total_flops()


@pytest.mark.parametrize("batch", [(3,), (), (2, 2)])
def test_flop_formula(case, batch):
    make, inputs = case
    counted = {}
    for backend in ("eager", "cpp"):
        args = inputs(batch=batch)
        with use_backend(backend), torch.no_grad():
            forward = flops(lambda args=args: make(functional)(*args))
        with use_backend(backend):
            counted[backend] = forward, flops(lambda args=args: results(make(functional), args))
    assert counted["cpp"] == counted["eager"]
    assert counted["cpp"][0] > 0


def test_multiply_adds_are_counted(case):
    make, inputs = case
    args = [x.requires_grad_() for x in inputs(batch=(2,), dtype=torch.complex64)]
    counted = {}
    for backend in ("eager", "cpp"):
        with use_backend(backend), metrics.TrueMacCounter() as counter:
            out = make(functional)(*args)
            out = out if isinstance(out, tuple) else (out,)
            torch.autograd.grad(out, args, [x.detach() for x in out])
        assert not counter.uncounted
        counted[backend] = counter.macs
    assert 0 < counted["cpp"] < counted["eager"]


def test_second_derivatives_are_refused(case):
    make, inputs = case
    U, *rest = inputs()
    U.requires_grad_()
    out = make(functional)(U, *rest)
    out = out[0] if isinstance(out, tuple) else out
    with pytest.raises(RuntimeError, match=r'no second derivatives.*use_backend\("eager"\) has them'):
        torch.autograd.grad(out.abs().sum(), U, create_graph=True)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)))
def test_only_what_is_asked_for_gets_a_gradient(needs):
    args = [x.requires_grad_(need) for x, need in zip(CASES["pair"][1](), needs, strict=True)]
    out = functional.ortho_refine_pair(*args)
    assert all(x.requires_grad == any(needs) for x in out)
    want = results(both(reference), args)[2:]
    if any(needs):
        # only U's result is differentiated: V's incoming gradient is undefined
        generator = torch.Generator().manual_seed(0)
        g = torch.randn(out[0].shape, dtype=torch.complex128, generator=generator)
        out[0].backward(g)
    for i, (x, need) in enumerate(zip(args, needs, strict=True)):
        assert (x.grad is not None) == need
        if need:
            close([x.grad], [want[i] if i in (0, 2) else torch.zeros_like(x)])


def test_a_recorded_refinement_is_one_node_and_holds_what_it_needs():
    """Results may be changed in place, the gradient then says so; it may be asked for again, and for many at once."""
    args = [x.requires_grad_() for x in CASES["pair"][1]()]
    u, v = functional.ortho_refine_pair(*args)
    assert u.grad_fn is v.grad_fn
    assert [edge[0].variable is x for edge, x in zip(u.grad_fn.next_functions, args, strict=True)] == [
        True
    ] * 4
    grads = torch.randn(3, *u.shape, dtype=u.dtype, generator=torch.Generator().manual_seed(0))
    many = torch.autograd.grad(u, args, grads, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(u, args, g, retain_graph=True) for g in grads]
    for got, want in zip(many, zip(*one_by_one, strict=True), strict=True):
        assert torch.equal(got, torch.stack(want))
    v.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        u.abs().sum().backward()


def test_sizes_of_any_precision_get_gradients():
    U = matrices(dtype=torch.complex64)
    for dtype in (torch.float64, torch.float32):
        step = size(0.3, dtype).requires_grad_()
        out = functional.ortho_refine(U, step)
        assert out.dtype == torch.complex64
        out.real.sum().backward()
        assert step.grad.dtype == dtype
        assert step.grad.abs() > 0
    torch.testing.assert_close(functional.ortho_refine(U, 0.3), functional.ortho_refine(U, size(0.3)))


def views(x):
    yield "strided", torch.stack([x, x * torch.nan], -1)[..., 0]
    yield "transposed", x.mT.contiguous().mT
    yield "expanded", x[:1].expand(x.shape)
    yield "offset", torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    yield "conjugated", x.conj()
    yield "adjoint", x.mT.contiguous().mH
    yield "both", torch._neg_view(x.conj())


def test_views_give_the_bits_of_their_copies(case):
    make, inputs = case
    args = inputs(dtype=torch.complex64)
    for position in [i for i, x in enumerate(args) if x.ndim]:
        for name, view in views(args[position]):
            plain = torch.empty(view.shape, dtype=view.dtype).copy_(view)
            got, want = (
                results(make(functional), [x if i == position else y for i, y in enumerate(args)])
                for x in (view, plain)
            )
            assert all(torch.equal(x.resolve_conj(), y) for x, y in zip(got, want, strict=True)), name


def test_batch_dimensions(case):
    make, inputs = case
    flat = inputs(batch=(6,))
    want = make(functional)(*flat)
    for batch in ((2, 3), (1, 6, 1)):
        got = make(functional)(*(x.reshape(*batch, *x.shape[1:]) if x.ndim else x for x in flat))
        for x, y in zip(*((z if isinstance(z, tuple) else (z,)) for z in (got, want)), strict=True):
            assert x.shape == (*batch, *y.shape[1:])
            assert torch.equal(x.reshape(y.shape), y)
    single = make(functional)(*(x[0] if x.ndim else x for x in flat))
    for x, y in zip(*((z if isinstance(z, tuple) else (z,)) for z in (single, want)), strict=True):
        assert torch.equal(x, y[0])


@pytest.mark.parametrize("batch", [(0,), (2, 0)])
def test_no_samples(case, batch):
    make, inputs = case
    got, want = (results(make(module), inputs(batch=batch)) for module in (functional, reference))
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    ("U", "reason"),
    [
        (matrices().real, "cpp: U is float64, only complex64 and complex128 are served"),
        (matrices().to("meta"), "cpp: the C++ kernels run on CPUs, the tensors are on meta"),
        (torch.zeros(1, 1 << 18, 4, dtype=torch.complex64), "too large for one thread"),
    ],
)
def test_calls_that_the_library_does_not_take(U, reason):
    for call in (lambda: functional.ortho_refine(U, 0.1), lambda: functional.bjorck(U, 1)):
        with pytest.raises(BackendError, match="cannot be served by cpp") as error:
            call()
        assert reason in str(error.value)
        if not U.is_meta:
            with use_backend("auto"):
                assert call().isfinite().all()


def test_reasons():
    U = matrices(dtype=torch.complex64)
    (reason,) = ortho._refine_native_reasons(U, matrices(), 0.1, 0.1)
    assert reason == "dtypes differ: U complex64, V complex128"
    U.requires_grad_()
    assert not ortho._bjorck_native_reasons(U, 3, 1)
    assert "would keep" in ortho._bjorck_native_reasons(U, 1 << 20, 1)[0]
    with torch.no_grad():
        assert not ortho._bjorck_native_reasons(U, 1 << 20, 1)
    assert "single precision" in ortho.triton_reasons(U=matrices().to("meta"))[0]
    assert ortho.triton_reasons(U=matrices()) == ["Triton kernels run on GPUs, the tensors are on cpu"]
    for name in ("ortho_refine", "bjorck"):
        rows = [row for row in lomacs_fast.backend_table() if row["op"] == name and row["device"] == "cpu"]
        assert [row["backend"] for row in rows if not row["reasons"]] == ["cpp", "eager"]


def test_transforms_take_the_formula():
    U = matrices()
    with use_backend("auto"):
        gradient = torch.func.grad(lambda u: functional.bjorck(u, 2).abs().sum())(U)
        rows = torch.func.vmap(lambda u: functional.ortho_refine(u, 0.3))(U)
    close([rows], [functional.ortho_refine(U, 0.3)])
    U.requires_grad_()
    close([gradient], torch.autograd.grad(functional.bjorck(U, 2).abs().sum(), U))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda U, s: OPS.ortho_refine(U[0], None, s), "U must"),
        (lambda U, s: OPS.ortho_refine(U, U, s), "steps must"),
        (lambda U, s: OPS.ortho_refine(U, U[:1], s.expand(2).clone()), "V must"),
        (lambda U, s: OPS.ortho_refine_backward(U, U, U, None, s), "gV must be given where V is"),
        (
            lambda U, s: OPS.ortho_refine_kept_backward(U, None, U, None, s, U[:1], U, U, U),
            "U_out must",
        ),
        (
            lambda U, s: OPS.ortho_refine_kept_backward(U, None, U, None, s, U, U, U, U),
            "residuals must",
        ),
        (lambda U, s: OPS.bjorck(U[:, :2].contiguous(), 1, 1), "at least as many rows as columns"),
        (lambda U, s: OPS.bjorck(U, 1, 3), "order must be 1 or 2"),
        (lambda U, s: OPS.bjorck_backward(U[:1], U, 1, 1), "g must"),
    ],
)
def test_wrong_arguments_of_the_ops(call, words):
    U, s = torch.view_as_real(matrices()), torch.full((1,), 0.1, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=words):
        call(U, s)
    with (
        torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode,
        pytest.raises(RuntimeError, match=words),
    ):
        call(mode.from_tensor(U), mode.from_tensor(s))


@pytest.mark.parametrize("changes", [{"V": matrices(5, 2)}, {"V": matrices(5)[:2]}, {"a": 0.7}, {"b": 0.0}])
def test_a_pair_that_does_not_fit_is_named(changes):
    arguments = {"U": matrices(), "V": matrices(5), "a": 0.1, "b": 0.1} | changes
    (name,) = changes
    with pytest.raises(ValueError, match=f"^{name} must"):
        functional.ortho_refine_pair(**arguments)
    with pytest.raises(TypeError, match="V must be complex128 to go with U"):
        functional.ortho_refine_pair(matrices(), matrices(5).to(torch.complex64), 0.1, 0.1)


@pytest.mark.parametrize("namespace", [reference, lomacs_fast], ids=["reference", "lomacs_fast"])
def test_a_refiner_of_several_steps(namespace):
    module = namespace.NeuralOrthoRefiner(0.2, 0.4, steps=3)
    assert {n: tuple(p.shape) for n, p in module.state_dict().items()} == {"a_raw": (3,), "b_raw": (3,)}
    assert "steps=3" in repr(module)
    with torch.no_grad():
        module.a_raw.copy_(torch.tensor([0.3, -1.0, 0.1]))
    U, V = matrices(dtype=torch.complex64), matrices(5, dtype=torch.complex64)
    u, v = module(U, V)
    (a, b), want_u, want_v = module.steps, U, V
    for k in range(3):
        want_u, want_v = reference.ortho_refine(want_u, a[k]), reference.ortho_refine(want_v, b[k])
    close([u.detach(), v.detach()], [want_u.detach(), want_v.detach()])
    u.real.sum().backward()
    assert (module.a_raw.grad != 0).all()
    assert module.b_raw.grad is None or (module.b_raw.grad == 0).all()
    twin = copy.deepcopy(module)
    twin.load_state_dict(module.state_dict(), strict=True)


@pytest.mark.parametrize("namespace", [reference, lomacs_fast], ids=["reference", "lomacs_fast"])
def test_a_refiner_of_one_step_is_the_published_module(namespace):
    module = namespace.NeuralOrthoRefiner(steps=1)
    assert all(p.ndim == 0 for p in module.parameters())
    assert repr(module).endswith("(init_scale=0.1, max_scale=0.5)")
    for steps, error, words in (
        (0, ValueError, "steps must be at least 1, got 0"),
        (1.5, TypeError, "steps must be an integer, got float 1.5"),
        (True, TypeError, "steps must be an integer, got bool True"),
    ):
        with pytest.raises(error, match=re.escape(words)):
            namespace.NeuralOrthoRefiner(steps=steps)


def test_the_refiner_makes_one_call(monkeypatch):
    seen, op = [], OPS.ortho_refine_kept.default
    monkeypatch.setattr(OPS.ortho_refine_kept, "default", lambda *a: (seen.append(a), op(*a))[1])
    lomacs_fast.NeuralOrthoRefiner()(matrices(dtype=torch.complex64), matrices(5, dtype=torch.complex64))
    assert len(seen) == 1
    assert seen[0][1] is not None
