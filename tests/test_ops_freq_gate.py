"""The contract of `lomacs::freq_gate`: schema, gradients, compiled graphs, autocast, FLOPs, views, refusals."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import lomacs_fast
from lomacs_fast import BackendError, functional, metrics, reference, use_backend
from lomacs_fast.ops import native, toolchain

pytestmark = pytest.mark.skipif(
    toolchain.find_compiler("cpu") is None and bool(native.reasons("cpu")), reason="no C++ compiler"
)

OP = torch.ops.lomacs.freq_gate.default
T = 0.7


@pytest.fixture(autouse=True)
def native_library():
    """Nothing here may pass because the reference served."""
    assert native.reasons("cpu") == ()
    with use_backend("cpp"):
        yield


def problem(M=6, N=5, hidden=3, batch=(3,), dtype=torch.complex128, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(hidden, M), (M, hidden), (hidden, N), (N, hidden)]
    weights = [torch.randn(s, dtype=torch.float64, generator=generator) / s[1] ** 0.5 for s in shapes]
    H = torch.randn(*batch, M, N, dtype=torch.complex128, generator=generator)
    return H.to(dtype), *(w.to(dtype.to_real()) for w in weights)


def raw(*args, normalize=False):
    H, *weights = args
    planes = torch.view_as_real(H.detach()).contiguous().requires_grad_(H.requires_grad)
    return planes, *weights, T, normalize


def gate(*args, normalize=False):
    """Hd, and the norms where there are any, as a list."""
    out = functional.freq_gate(*args, T, normalize=normalize)
    return list(out) if normalize else [out]


def value_and_gradients(fn, inputs):
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = fn(*inputs)
    generator = torch.Generator().manual_seed(5)
    gradients = [
        torch.randn(x.shape, dtype=torch.promote_types(x.dtype, torch.float64), generator=generator).to(
            x.dtype
        )
        for x in outputs
    ]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, inputs, gradients)]


def double(tensors):
    return [x.to(torch.promote_types(x.dtype, torch.float64)) for x in tensors]


def close(got, want, factor=40):
    eps = max(torch.finfo(x.dtype).eps for x in got)
    for x, y in zip(got, want, strict=True):
        error = (x - y).norm() / y.norm().clamp_min(1)
        assert error <= factor * eps, (x.shape, error.item() / eps)


NEEDS = [(1, 1, 1, 1, 1), (1, 0, 0, 0, 0), (0, 0, 1, 0, 1), (0, 0, 0, 0, 0)]


@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("normalize", [False, True])
def test_opcheck(normalize, needs):
    for size, dtype in itertools.product([(6, 5, 3), (1, 7, 1)], [torch.complex64, torch.complex128]):
        args = problem(*size, dtype=dtype)
        args = [x.requires_grad_(bool(need)) for x, need in zip(args, needs, strict=True)]
        torch.library.opcheck(OP, raw(*args, normalize=normalize))


@pytest.mark.parametrize("normalize", [False, True])
def test_opcheck_of_the_backward(normalize):
    H, *weights = problem()
    planes = torch.view_as_real(H).contiguous()
    for gh, gw, gnorms in itertools.product([False, True], [False, True], [None, planes[:, 0, 0, 0].clone()]):
        args = (planes * 2, gnorms, planes, *weights, T, normalize, gh, gw)
        torch.library.opcheck(torch.ops.lomacs.freq_gate_backward.default, args)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("size", [(6, 5, 3), (7, 1, 2), (4, 9, 1)])
def test_gradcheck(size, normalize):
    inputs = [x.requires_grad_() for x in problem(*size, batch=(2,))]
    assert torch.autograd.gradcheck(lambda *a: tuple(gate(*a, normalize=normalize)), inputs)


def test_the_norms_alone_have_gradients():
    args = [x.requires_grad_() for x in problem()]
    gate(*args, normalize=True)[1].sum().backward()
    torch.testing.assert_close(
        args[0].grad, args[0].detach() / torch.linalg.matrix_norm(args[0])[:, None, None]
    )
    assert all((w.grad == 0).all() for w in args[1:])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_in_one_graph(dtype, backend):
    """Values and gradients against double precision: compiled complex gradients have been silently wrong."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: gate(*a, normalize=True) + gate(*a), fullgraph=True, backend=backend)
    args = problem(9, 7, 4, dtype=dtype)
    with use_backend("eager"):
        want = value_and_gradients(lambda *a: gate(*a, normalize=True) + gate(*a), double(args))
    close(value_and_gradients(compiled, args), want)


def test_compiled_graphs_hold_no_complex_arithmetic():
    torch._dynamo.reset()
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    args = [x.requires_grad_() for x in problem()]
    backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=keep, bw_compiler=keep)
    torch.compile(lambda *a: torch.view_as_real(gate(*a)[0]).sum(), fullgraph=True, backend=backend)(
        *args
    ).backward()
    assert len(graphs) == 2
    free = ("view", "reshape", "clone", "expand", "conj", "lomacs", "empty", "full")
    for graph in graphs:
        for node in graph.graph.nodes:
            value = node.meta.get("val")
            if node.op == "call_function" and isinstance(value, torch.Tensor) and value.is_complex():
                assert any(word in str(node.target) for word in free), node.target


def test_exported():
    class Gate(torch.nn.Module):
        def forward(self, *args):
            return functional.freq_gate(*args, T)

    args = problem()
    program = torch.export.export(Gate(), args)
    assert any("freq_gate" in str(node.target) for node in program.graph.nodes)
    close([program.module()(*args)], [Gate()(*args)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_full_precision(dtype):
    args = problem(dtype=torch.complex64)
    want = value_and_gradients(gate, args)
    planes, *rest = raw(*args)
    with torch.autocast("cpu", dtype):
        got = value_and_gradients(gate, args)
        # the op itself takes half precision from a caller as single
        assert OP(planes.to(dtype), *rest)[0].dtype == torch.float32
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)


def flops(fn):
    with FlopCounterMode(display=False) as counter:
        fn()
    return counter.get_total_flops()


@pytest.mark.parametrize("batch", [(3,), (2, 2)])
@pytest.mark.parametrize("needs", [(1, 1, 1, 1, 1), (1, 0, 0, 0, 0), (0, 1, 1, 1, 1)])
def test_flop_formula(needs, batch):
    args = [x.requires_grad_(bool(n)) for x, n in zip(problem(7, 5, 3, batch), needs, strict=True)]
    counted = {}
    for backend in ("eager", "cpp"):
        with use_backend(backend):
            with torch.no_grad():
                forward = flops(lambda: gate(*args))
            counted[backend] = forward, flops(lambda: gate(*args)[0].abs().sum().backward())
    assert counted["cpp"] == counted["eager"]
    assert counted["cpp"][0] > 0


def test_multiply_adds_are_counted():
    args = [x.requires_grad_() for x in problem(64, 64, 32, batch=(2,), dtype=torch.complex64)]
    gradient = torch.ones(2, 64, 64, dtype=torch.complex64)
    counted = {}
    for backend in ("eager", "cpp"):
        with use_backend(backend), metrics.TrueMacCounter() as counter:
            gate(*args)[0].backward(gradient)
        assert not counter.uncounted
        counted[backend] = counter.macs / 2
    # five transforms of 123 thousand, where eager takes four
    assert 0.6e6 < counted["cpp"] < 1.2 * counted["eager"]


def test_second_derivatives_are_refused():
    args = [x.requires_grad_() for x in problem()]
    with pytest.raises(RuntimeError, match=r'no second derivatives.*use_backend\("eager"\) has them'):
        torch.autograd.grad(gate(*args)[0].abs().sum(), args[0], create_graph=True)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)))
def test_only_what_is_asked_for_is_computed(needs, monkeypatch):
    """Gradients of H, of one weight and of another."""
    asked, original = [], torch.ops.lomacs.freq_gate_backward

    def recorded(*args):
        asked.append(args[-2:])
        return original(*args)

    flags = (needs[0], needs[1], False, False, needs[2])
    args = [x.requires_grad_(n) for x, n in zip(problem(), flags, strict=True)]
    Hd = gate(*args)[0]
    assert Hd.requires_grad == any(needs)
    if not any(needs):
        return
    monkeypatch.setattr(torch.ops.lomacs, "freq_gate_backward", recorded)
    Hd.abs().square().sum().backward()
    assert asked == [(needs[0], needs[1] or needs[2])]
    full = [x.detach().requires_grad_() for x in args]
    with use_backend("eager"):
        every = torch.autograd.grad(gate(*full)[0].abs().square().sum(), full)
    for x, want, need in zip(args, every, flags, strict=True):
        assert (x.grad is not None) == need
        if need:
            close([x.grad], [want])


def views(x):
    yield "strided", torch.stack([x, x * torch.nan], -1)[..., 0]
    yield "transposed", x.mT.contiguous().mT
    yield "sliced", torch.cat([x, x], -1)[..., : x.shape[-1]]
    yield "expanded", x[:1].expand(x.shape)
    yield "offset", torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    if x.is_complex():
        yield "conjugated", x.conj()
        yield "adjoint", x.mT.contiguous().mH
        yield "negated", torch._neg_view(x)
    else:
        yield "imaginary", torch.complex(x * 0, -x).conj().imag


@pytest.mark.parametrize("position", range(5))
def test_views_give_the_bits_of_their_copies(position):
    args = problem(6, 5, 3, dtype=torch.complex64)
    for name, view in views(args[position]):
        copy = torch.empty(view.shape, dtype=view.dtype).copy_(view)
        got, want = (
            value_and_gradients(gate, [x if i == position else y for i, y in enumerate(args)])
            for x in (view, copy)
        )
        for x, y in zip(got, want, strict=True):
            assert torch.equal(x.resolve_conj(), y), name


@pytest.mark.parametrize("normalize", [False, True])
def test_batch_dimensions(normalize):
    H, *weights = problem(batch=(6,))
    Hd, *norms = gate(H, *weights, normalize=normalize)
    for batch in ((2, 3), (1, 6, 1), (6,)):
        got, *got_norms = gate(H.view(*batch, 6, 5), *weights, normalize=normalize)
        assert torch.equal(got, Hd.view(*batch, 6, 5))
        for x, y in zip(got_norms, norms, strict=True):
            assert torch.equal(x, y.view(batch))
    one = gate(H[0], *weights, normalize=normalize)
    assert torch.equal(one[0], Hd[0])
    assert all(x.shape == () for x in one[1:])
    empty = gate(H.view(6, 1, 6, 5)[:0], *weights, normalize=normalize)
    assert empty[0].shape == (0, 1, 6, 5)
    assert all(x.shape == (0, 1) for x in empty[1:])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda *args: [x.to("meta") for x in args],
            "the C++ kernels run on the CPU, the tensors are on meta",
        ),
        (lambda *_: problem(2048, 1024, 1, batch=(1,)), "too large for one thread"),
        (lambda *_: problem(4, 127, 2, batch=(1,)), "127 has the prime factor 127"),
    ],
)
def test_calls_that_the_library_does_not_take(change, reason):
    args = change(*problem())
    with pytest.raises(BackendError, match=r"^freq_gate\(H=.*cannot be served by cpp\n") as error:
        gate(*args)
    assert reason in str(error.value)
    if not any(x.is_meta for x in args):
        with use_backend("auto"):
            assert gate(*args)[0].isfinite().all()


def test_transforms_take_the_formula():
    H, *weights = problem()
    with use_backend("auto"):
        mapped = torch.func.vmap(lambda h: gate(h, *weights)[0])(H)
    close([mapped], gate(H, *weights))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({0: torch.zeros(3, 6, 5)}, "H must have shape"),
        ({0: torch.zeros(3, 6, 5, 2, dtype=torch.float16)}, "H must be float32 or float64"),
        ({1: torch.zeros(3, 5)}, "row_w1 must"),
        ({4: torch.zeros(5, 4)}, "col_w2 must"),
        ({2: torch.zeros(6, 3, dtype=torch.float64)}, "row_w2 must"),
        ({5: 0.0}, "temperature must be positive"),
    ],
)
def test_wrong_arguments_of_the_op(changes, words):
    args = list(raw(*problem(dtype=torch.complex64)))
    for position, value in changes.items():
        args[position] = value
    with pytest.raises(RuntimeError, match=words):
        OP(*args)
    with (
        torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True),
        pytest.raises(RuntimeError, match=words),
    ):
        OP(*args)


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_normalize_is_a_boolean(value):
    with pytest.raises(TypeError, match="normalize must be True or False, got"):
        gate(*problem(), normalize=value)


@pytest.mark.parametrize("exponent", [-40, 0, 35])
def test_the_reference_normalises_at_any_scale(exponent):
    """A scale that squares would not survive; zero samples stay zero."""
    H = problem(dtype=torch.complex64)[0]
    H[1] = 0
    X, norms = reference.unit_norm(H * 10.0**exponent)
    want, _ = reference.unit_norm(H.to(torch.complex128))
    assert (X[1] == 0).all()
    assert norms[1] == 0
    assert (X - want).norm() <= (1e-6 if exponent > -38 else 1e-3) * want.norm()
    torch.testing.assert_close(
        norms[[0, 2]].double() / 10.0**exponent,
        torch.linalg.matrix_norm(H.to(torch.complex128))[[0, 2]],
        rtol=1e-6 if exponent > -38 else 1e-3,
        atol=0,
    )


def test_the_module_is_served_by_the_library():
    module = lomacs_fast.AxialLowRankFreqGate(6, 5, 3)
    H = problem(dtype=torch.complex64)[0]
    with metrics.TrueMacCounter() as counter:
        Hd = module.filter(H)
    assert counter.by_op["lomacs::freq_gate"] > 0
    # the gate itself is still to be had
    Hf = torch.fft.fft2(H, norm="ortho")
    close([Hd.detach()], [torch.fft.ifft2(Hf * module(Hf), norm="ortho").detach()])
