"""The contract of `lomacs::dual_view_project` and of the fused front `lomacs::gate_project`."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import lomacs_fast
from lomacs_fast import BackendError, functional, metrics, use_backend
from lomacs_fast.ops import native, toolchain

pytestmark = pytest.mark.skipif(
    toolchain.find_compiler("cpu") is None and bool(native.reasons("cpu")), reason="no C++ compiler"
)

PROJECT, FRONT = torch.ops.lomacs.dual_view_project.default, torch.ops.lomacs.gate_project.default
T = 0.7


@pytest.fixture(autouse=True)
def native_library():
    """Nothing here may pass because the reference served."""
    assert native.reasons("cpu") == ()
    with use_backend("cpp"):
        yield


def problem(op, M=6, N=5, d=4, B=3, dtype=torch.complex128, seed=0):
    """Tensors of the projection, or of the front."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(d, 4 * N), (d,), (1, M, d)]
    if op == "front":
        shapes = [(3, M), (M, 3), (3, N), (N, 3), *shapes]
    weights = [torch.randn(s, dtype=torch.float64, generator=generator) / s[-1] ** 0.5 for s in shapes]
    H = torch.randn(B, M, N, dtype=torch.complex128, generator=generator)
    return H.to(dtype), *(w.to(dtype.to_real()) for w in weights)


def call(*args, normalize=False):
    """All outputs of whichever op the tensors are for."""
    if len(args) == 4:
        return [functional.dual_view_project(*args)]
    return list(functional.gate_project(*args[:5], T, *args[5:], normalize=normalize))


def normalized(*args):
    return call(*args, normalize=True)


def value_and_gradients(fn, inputs, skip=None, fixed=False):
    """Outputs and gradients; `skip` leaves one output without a gradient, `fixed` the channel."""
    inputs = [x.detach().requires_grad_(not fixed or i > 0) for i, x in enumerate(inputs)]
    outputs = fn(*inputs)
    generator = torch.Generator().manual_seed(5)
    total = 0
    for i, x in enumerate(outputs):
        double = torch.promote_types(x.dtype, torch.float64)
        w = torch.randn(x.shape, dtype=double, generator=generator).to(x.dtype)
        if i != skip:
            total = total + (x * w).real.sum()
    gradients = torch.autograd.grad(total, inputs[fixed:], allow_unused=True)
    return [*(x.detach() for x in outputs), *(g for g in gradients if g is not None)]


def double(tensors):
    return [x.to(torch.promote_types(x.dtype, torch.float64)) for x in tensors]


def close(got, want, factor=40):
    eps = max(torch.finfo(x.dtype).eps for x in got)
    for x, y in zip(got, want, strict=True):
        error = (x - y).norm() / y.norm().clamp_min(1)
        assert error <= factor * eps, (x.shape, error.item() / eps)


both = pytest.mark.parametrize("op", ["projection", "front"])


def raw(args, normalize=False):
    H, *weights = args
    planes = torch.view_as_real(H.detach()).contiguous().requires_grad_(H.requires_grad)
    return (planes, *weights) if len(args) == 4 else (planes, *weights[:4], T, normalize, *weights[4:])


@both
@pytest.mark.parametrize("grad", [True, False])
def test_opcheck(op, grad):
    for size, dtype in itertools.product([(6, 5, 4), (2, 3, 1)], [torch.complex64, torch.complex128]):
        args = [x.requires_grad_(grad) for x in problem(op, *size, dtype=dtype)]
        if op == "projection":
            torch.library.opcheck(PROJECT, raw(args))
        else:
            for normalize in (False, True):
                torch.library.opcheck(FRONT, raw(args, normalize))
                args[0].requires_grad_(grad and normalize)
                torch.library.opcheck(torch.ops.lomacs.gate_project_kept.default, raw(args, normalize))
                args[0].requires_grad_(grad)


def test_opcheck_of_the_backward():
    H, weight, _, pos = problem("projection")
    planes, gX = torch.view_as_real(H).contiguous(), pos.expand(3, 6, 4).contiguous()
    op = torch.ops.lomacs.dual_view_project_backward.default
    for gh, gw in itertools.product([False, True], repeat=2):
        torch.library.opcheck(op, (gX, planes, weight, gh, gw))


def test_opcheck_of_the_backward_of_the_front():
    H, *weights = problem("front")
    planes, gX = torch.view_as_real(H).contiguous(), weights[-1].expand(3, 6, 4).contiguous()
    op = torch.ops.lomacs.gate_project_backward.default
    norms = H.abs().sum((1, 2))
    for wanted in itertools.product([False, True], repeat=3):
        for gHd, gnorms in ((None, None), (planes, norms)):
            args = (gX, gHd, gnorms, planes, *weights[:4], T, True, weights[4], planes, *wanted)
            torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_opcheck_of_the_kept_backward():
    H, *weights = problem("front")
    planes, gX = torch.view_as_real(H).contiguous(), weights[-1].expand(3, 6, 4).contiguous()
    _, Hd, _, kept = torch.ops.lomacs.gate_project_kept(planes, *weights[:4], T, True, *weights[4:])
    op = torch.ops.lomacs.gate_project_kept_backward.default
    for gHd, of_projection in ((None, True), (planes, False)):
        torch.library.opcheck(op, (gX, gHd, weights[1], weights[3], T, weights[4], Hd, kept, of_projection))


def test_what_the_gradients_need_is_kept_where_they_are_wanted(monkeypatch):
    """Kept for gradients of weights alone; values have the same bits, gradients those that are computed again."""
    H, *weights = problem("front", 33, 24, 20, B=40, dtype=torch.complex64)
    called = []
    for name in ("gate_project", "gate_project_kept", "gate_project_backward", "gate_project_kept_backward"):
        packet = getattr(torch.ops.lomacs, name)
        real = packet.default
        monkeypatch.setattr(packet, "default", lambda *x, op=real, name=name: called.append(name) or op(*x))
    plain = normalized(H, *weights)
    leaves = [w.clone().requires_grad_() for w in weights]
    wanted = normalized(H, *leaves)
    with torch.no_grad():
        normalized(H, *leaves)
    of_projection = [x.requires_grad_(i >= 4) for i, x in enumerate(w.clone() for w in weights)]
    normalized(H, *of_projection)
    moved = H.clone().requires_grad_()
    again = normalized(moved, *leaves)
    assert called == ["gate_project", "gate_project_kept", *["gate_project"] * 3]
    for x, y, z in zip(plain, wanted, again, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x, z)
    gX, gHd = torch.randn(plain[0].shape), torch.randn(plain[1].shape, dtype=H.dtype)
    got, want = (torch.autograd.grad(x[:2], leaves, (gX, gHd)) for x in (wanted, again))
    for x, y in zip(got, want, strict=True):
        assert (x - y).norm() <= 1e-6 * y.norm()


@pytest.mark.parametrize("size", [(64, 64, 64), (9, 7, 17)])
def test_the_gradients_of_the_front_are_those_of_its_two_ops(size):
    """What meets inside is what the projection hands the gate, bit for bit; what Hd itself asks is added to it."""
    H, *weights = problem("front", *size, B=40, dtype=torch.complex64)
    planes, weight = torch.view_as_real(H).contiguous(), weights[4]
    gX, more = torch.randn(40, size[0], size[2]), torch.randn(planes.shape)
    ops = torch.ops.lomacs
    gHd, *of_projection = ops.dual_view_project_backward(gX, planes, weight, True, True)
    for gate_asks, whole in ((None, gHd), (more, gHd + more)):
        want = [
            *ops.freq_gate_backward(whole, None, planes, *weights[:4], T, False, True, True),
            *of_projection,
        ]
        got = ops.gate_project_backward(
            gX, gate_asks, None, planes, *weights[:4], T, False, weight, planes, True, True, True
        )
        for x, y in zip(got, want, strict=True):
            assert torch.equal(x, y) if gate_asks is None else (x - y).norm() <= 1e-5 * y.norm()


def test_the_gradients_of_the_front_have_the_same_bits_for_any_number_of_threads():
    args = problem("front", 33, 24, 20, B=70, dtype=torch.complex64)
    threads = torch.get_num_threads()
    for fixed in (False, True):
        found = []
        try:
            for n in (1, 2, 5):
                torch.set_num_threads(n)
                found.append(value_and_gradients(normalized, args, fixed=fixed))
        finally:
            torch.set_num_threads(threads)
        for other in found[1:]:
            assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


def test_wrong_arguments_of_the_backward_of_the_front():
    H, *weights = problem("front")
    planes, gX = torch.view_as_real(H).contiguous(), weights[-1].expand(3, 6, 4).contiguous()
    args = [gX, planes, None, planes, *weights[:4], T, False, weights[4], planes, True, True, True]
    for position, words in ((0, "gX must"), (1, "gHd must"), (10, "weight must"), (11, "Hd must")):
        wrong = [x[:1, :5] if i == position else x for i, x in enumerate(args)]
        with pytest.raises(RuntimeError, match=words):
            torch.ops.lomacs.gate_project_backward(*wrong)


@both
@pytest.mark.parametrize("size", [(6, 5, 4), (3, 2, 1)])
def test_gradcheck(op, size):
    inputs = [x.requires_grad_() for x in problem(op, *size, B=2)]
    assert torch.autograd.gradcheck(lambda *a: tuple(call(*a)), inputs)
    if op == "front":
        assert torch.autograd.gradcheck(lambda *a: tuple(normalized(*a)), inputs)
        H, *weights = inputs
        assert torch.autograd.gradcheck(lambda *a: tuple(normalized(H.detach(), *a)[:2]), weights)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("skip", [0, 1, 2])
def test_an_output_without_a_gradient(skip, fixed):
    args = problem("front")
    with use_backend("eager"):
        want = value_and_gradients(normalized, args, skip, fixed)
    close(value_and_gradients(normalized, args, skip, fixed), want)


@both
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_in_one_graph(op, dtype, backend, fixed):
    """Values and gradients against double precision: compiled complex gradients have been silently wrong."""
    torch._dynamo.reset()
    args = problem(op, 9, 7, 4, dtype=dtype)
    compiled = torch.compile(lambda *a: normalized(*a), fullgraph=True, backend=backend)
    with use_backend("eager"):
        want = value_and_gradients(normalized, double(args), fixed=fixed)
    close(value_and_gradients(compiled, args, fixed=fixed), want)


@both
def test_exported(op):
    class Module(torch.nn.Module):
        def forward(self, *args):
            return call(*args)[0]

    args = problem(op)
    program = torch.export.export(Module(), args)
    assert any("project" in str(node.target) for node in program.graph.nodes)
    close([program.module()(*args)], [Module()(*args)])


@both
def test_autocast_leaves_full_precision(op):
    args = problem(op, dtype=torch.complex64)
    want = value_and_gradients(call, args)
    with torch.autocast("cpu", torch.bfloat16):
        got = value_and_gradients(call, args)
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)


def flops(fn):
    with FlopCounterMode(display=False) as counter:
        fn()
    return counter.get_total_flops()


@both
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_flop_formula(op, needs):
    args = problem(op, 7, 5, 3)
    args = [x.requires_grad_(needs[0] if i == 0 else needs[1]) for i, x in enumerate(args)]
    counted = {}
    for backend in ("eager", "cpp"):
        with use_backend(backend):
            with torch.no_grad():
                forward = flops(lambda: call(*args))
            counted[backend] = forward, flops(lambda: call(*args)[0].square().sum().backward())
    assert counted["cpp"] == counted["eager"]
    assert counted["cpp"][0] > 0


def test_multiply_adds_are_counted():
    args = [x.requires_grad_() for x in problem("front", 64, 64, 64, B=2, dtype=torch.complex64)]
    counted = {}
    for backend in ("eager", "cpp"):
        with use_backend(backend), metrics.TrueMacCounter() as counter:
            call(*args)[0].square().sum().backward()
        assert not counter.uncounted
        counted[backend] = counter.macs / 2
    assert counted["cpp"] < 0.85 * counted["eager"]


@both
def test_second_derivatives_are_refused(op):
    args = [x.requires_grad_() for x in problem(op)]
    for first in (args[0], args[0].detach()):
        with pytest.raises(RuntimeError, match=r'no second derivatives.*use_backend\("eager"\) has them'):
            torch.autograd.grad(call(first, *args[1:])[0].square().sum(), args[1], create_graph=True)


@pytest.mark.parametrize("position", [None, 0, 3, 5, 7])
def test_only_what_is_asked_for_is_computed(position):
    """One tensor of the front at a time: H, a weight of the gate, one of the projection, pos."""
    args = [x.requires_grad_(i == position) for i, x in enumerate(problem("front"))]
    X, Hd = call(*args)
    if position is None:
        assert not X.requires_grad
        return
    (X.square().sum() + Hd.abs().square().sum()).backward()
    full = [x.detach().requires_grad_() for x in args]
    with use_backend("eager"):
        X, Hd = call(*full)
        want = torch.autograd.grad(X.square().sum() + Hd.abs().square().sum(), full)
    for i, x in enumerate(args):
        assert (x.grad is not None) == (i == position)
    close([args[position].grad], [want[position]])


def views(x):
    yield "strided", torch.stack([x, x * torch.nan], -1)[..., 0]
    yield "transposed", x.mT.contiguous().mT if x.ndim > 1 else x.flip(0).flip(0)
    yield "sliced", torch.cat([x, x], -1)[..., : x.shape[-1]]
    yield "expanded", x[:1].expand(x.shape)
    if x.is_complex():
        yield "adjoint", x.mT.contiguous().mH
        yield "negated", torch._neg_view(x)
    else:
        yield "imaginary", torch.complex(x * 0, -x).conj().imag


@pytest.mark.parametrize("position", range(8))
def test_views_give_the_bits_of_their_copies(position):
    args = problem("front", dtype=torch.complex64)
    for name, view in views(args[position]):
        copy = torch.empty(view.shape, dtype=view.dtype).copy_(view)
        for fn in (call, lambda *a: call(a[0], *a[5:])):
            got, want = (
                value_and_gradients(fn, [x if i == position else y for i, y in enumerate(args)])
                for x in (view, copy)
            )
            for x, y in zip(got, want, strict=True):
                assert torch.equal(x.resolve_conj(), y), name


@both
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda args: [x.to("meta") for x in args],
            "the C++ kernels run on the CPU, the tensors are on meta",
        ),
        (lambda args: [args[0].to("meta"), *args[1:]], "devices differ: "),
    ],
)
def test_calls_that_the_library_does_not_take(op, change, reason):
    with pytest.raises(BackendError, match="cannot be served by cpp\n") as error:
        call(*change(problem(op)))
    assert reason in str(error.value)


def test_transforms_take_the_formula():
    H, *weights = problem("projection")
    with use_backend("auto"):
        mapped = torch.func.vmap(lambda h: call(h[None], *weights)[0][0])(H)
    close([mapped], call(H, *weights))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({0: torch.zeros(3, 6, 5)}, "Hd must have shape"),
        ({0: torch.zeros(3, 1, 5, 2)}, "at least 2"),
        ({1: torch.zeros(4, 19)}, "weight must"),
        ({2: torch.zeros(5)}, "bias must"),
        ({3: torch.zeros(1, 6, 4, dtype=torch.float64)}, "pos must"),
    ],
)
def test_wrong_arguments_of_the_op(changes, words):
    args = list(raw(problem("projection", dtype=torch.complex64)))
    for position, value in changes.items():
        args[position] = value
    with pytest.raises(RuntimeError, match=words):
        PROJECT(*args)
    with (
        torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True),
        pytest.raises(RuntimeError, match=words),
    ):
        PROJECT(*args)


def test_the_network_is_served_by_the_library():
    torch.manual_seed(0)
    net = lomacs_fast.LoMACSSVDNet(6, 5, 2, 1, dim=8, groups=2, k_len=3)
    H = problem("projection", dtype=torch.complex64)[0]
    with use_backend("auto"), metrics.TrueMacCounter() as counter:
        got = net(H, 0)
    assert counter.by_op["lomacs::gate_project_kept"] > 0
    with use_backend("eager"):
        want = net(H, 0)
    close([got[1].detach(), got[3].detach()], [want[1].detach(), want[3].detach()], factor=100)
