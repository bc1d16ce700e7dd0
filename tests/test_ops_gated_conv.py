"""The contract of `lomacs::gated_conv1d`: schema, gradients, graphs, autocast, FLOPs, refusals."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lomacs_fast import BackendError, functional, metrics, nn, reference, use_backend
from lomacs_fast.ops import gated_conv, native, toolchain

pytestmark = pytest.mark.skipif(
    toolchain.find_compiler("cpu") is None and bool(native.reasons("cpu")), reason="no C++ compiler"
)

NAME = "gated_conv1d"
OP = torch.ops.lomacs.gated_conv1d.default
BACKWARD = torch.ops.lomacs.gated_conv1d_backward.default
SIZES = [(6, 4, 3), (1, 1, 1), (2, 3, 7)]
LARGE = (64, 64, 3)
ARGUMENTS = 7
function = functional.gated_conv1d


def problem(T=7, d=6, k=3, B=3, norm=True, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, T, d), (2 * d, 1, k), (2 * d,), (d, d, 1), (d,), *[(d,), (d,)] * norm]
    return [torch.randn(s, dtype=torch.float64, generator=generator).to(dtype) for s in shapes]


def full(args):
    return (*args, *[None] * (7 - len(args)), 1e-5)


@pytest.fixture(autouse=True)
def native_library():
    """Nothing here may pass because the reference served."""
    assert native.reasons("cpu") == ()
    with use_backend("cpp"):
        yield


def value_and_gradients(fn, inputs):
    inputs = [x.detach().requires_grad_() for x in inputs]
    y = fn(*inputs)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), inputs)]


def close(got, want, factor=30):
    """Relative L2 error of each tensor, in units of its own precision."""
    for x, y in zip(got, want, strict=True):
        eps = torch.finfo(x.dtype).eps
        size = torch.linalg.vector_norm(y.double()).clamp_min(1)
        error = torch.linalg.vector_norm(x.double() - y.double()) / size
        assert error <= factor * eps, (x.shape, error.item() / eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("needs", ["all", "x", "weights", "none"])
@pytest.mark.parametrize("norm", [False, True])
def test_opcheck(dtype, needs, norm):
    args = problem(norm=norm, dtype=dtype)
    for i, x in enumerate(args):
        x.requires_grad_(needs == "all" or ((needs == "x") == (i == 0) and needs != "none"))
    torch.library.opcheck(OP, full(args))


@pytest.mark.parametrize("B", [0, 1])
def test_opcheck_of_small_batches(B):
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(OP, full([x.requires_grad_() for x in problem(B=B)]), test_utils=checks)


def test_opcheck_of_the_backward():
    args = problem()
    checks = ("test_schema", "test_faketensor")
    for gx, gw in itertools.product([False, True], repeat=2):
        torch.library.opcheck(BACKWARD, (args[0] * 2, *full(args), gx, gw), test_utils=checks)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_gradcheck(size, norm):
    inputs = [x.requires_grad_() for x in problem(*size, norm=norm, B=2)]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=norm)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_in_one_graph(backend, norm):
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for seed in range(2):
        args = problem(norm=norm, dtype=torch.float32, seed=seed)
        with use_backend("eager"):
            want = value_and_gradients(function, [x.double() for x in args])
        close(value_and_gradients(compiled, args), want, factor=60)
    with torch.no_grad():
        close([compiled(*args)], want[:1], factor=60)


def test_compiled_with_any_batch():
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for B in (3, 5, 2):
        args = problem(B=B)
        close(value_and_gradients(compiled, args), value_and_gradients(function, args))


def test_exported():
    class Block(torch.nn.Module):
        def forward(self, *args):
            return function(*args)

    args = tuple(problem())
    program = torch.export.export(Block(), args)
    assert any(NAME in str(node.target) for node in program.graph.nodes)
    close([program.module()(*args)], [Block()(*args)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("backend", ["cpp", "eager"])
def test_autocast_takes_and_gives_its_dtype(dtype, norm, backend):
    """Tokens, weights and residual in the half type, whatever serves; sums in float32."""
    args = problem(norm=norm, dtype=torch.float32)
    lowered = [x.to(dtype) for x in args]
    exact = value_and_gradients(function, [x.float() for x in lowered])
    with use_backend(backend), torch.autocast("cpu", dtype):
        for inputs in (args, lowered, [lowered[0], *args[1:]], [args[0], *lowered[1:]]):
            got = value_and_gradients(function, inputs)
            assert [x.dtype for x in got] == [dtype, *(x.dtype for x in inputs)]
            with torch.no_grad():
                assert torch.equal(function(*inputs), got[0])
            for x, y in zip(got, exact, strict=True):
                assert (x - y).norm() <= 12 * torch.finfo(dtype).eps * y.norm().clamp_min(1)
            if backend == "cpp":
                assert torch.equal(got[0], exact[0].to(dtype))
    assert function(*args).dtype == torch.float32


@pytest.mark.parametrize("norm", [False, True])
def test_half_precision_without_autocast(norm):
    args = problem(norm=norm, dtype=torch.bfloat16)
    with use_backend("eager"):
        want = value_and_gradients(function, [x.double() for x in args])
    for x, y in zip(value_and_gradients(function, args), want, strict=True):
        assert x.dtype == torch.bfloat16
        assert (x - y).norm() <= 4 * torch.finfo(torch.bfloat16).eps * y.norm()


def flops(fn):
    with FlopCounterMode(display=False) as counter:
        fn()
    return counter.get_total_flops()


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("norm", [False, True])
def test_flop_formula(needs, norm):
    args = [x.requires_grad_(needs[i > 0]) for i, x in enumerate(problem(norm=norm))]
    both = {}
    for backend in ("eager", "cpp"):
        with use_backend(backend):
            with torch.no_grad():
                forward = flops(lambda: function(*args))
            if any(needs):
                forward = forward, flops(lambda: function(*args).sum().backward())
        both[backend] = forward
    assert both["cpp"] == both["eager"]
    assert both["cpp"]


def test_multiply_adds_are_counted():
    args = [x.requires_grad_() for x in problem(*LARGE, B=2, dtype=torch.float32)]
    counted = {}
    for backend in ("eager", "cpp"):
        with use_backend(backend), metrics.TrueMacCounter() as counter:
            function(*args).sum().backward()
            with torch.no_grad():
                function(*args)
        assert not counter.uncounted
        counted[backend] = counter.macs
    assert 0.2 * counted["eager"] < counted["cpp"] < 1.1 * counted["eager"]


def test_second_derivatives_are_refused():
    args = [x.requires_grad_() for x in problem()]
    with pytest.raises(RuntimeError, match=r'no second derivatives.*use_backend\("eager"\) has them'):
        torch.autograd.grad(function(*args).sum(), args[0], create_graph=True)


@pytest.mark.parametrize("position", range(ARGUMENTS))
def test_only_what_is_asked_for_is_computed(position):
    args = problem()
    want = value_and_gradients(function, args)
    args[position].requires_grad_()
    function(*args).mul(
        torch.linspace(-1, 1, want[0].numel(), dtype=torch.float64).reshape(want[0].shape)
    ).sum().backward()
    for i, (x, g) in enumerate(zip(args, want[1:], strict=True)):
        assert (x.grad is not None) == (i == position)
        if i == position:
            assert torch.equal(x.grad, g)


def test_small_calls_without_gradients_give_the_same_bits():
    """They go to the kernel unchecked; what it refuses is named as ever."""
    args = problem()
    recorded = value_and_gradients(function, args)[0]
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(function(*args), recorded)
            assert torch.equal(function(args[0].mT.contiguous().mT, *args[1:]), recorded)
            with pytest.raises(TypeError, match="must be float64 to go with x, got float32"):
                function(*args[:3], args[3].float(), *args[4:])
            with pytest.raises(ValueError, match="x must have shape"):
                function(args[0][0], *args[1:])
            with pytest.raises(TypeError, match="x must be a tensor, got int"):
                function(3, *args[1:])
            with use_backend("eager"):
                close([function(*args)], [recorded])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm_weight": None}, "norm_bias must be left out where norm_weight is"),
        ({"eps": 0.0}, "eps must be positive, got 0.0"),
        ({"norm_bias": torch.zeros(3, dtype=torch.float64)}, "norm_bias must have shape"),
    ],
)
@pytest.mark.parametrize("grad", [False, True])
def test_bad_norms_are_refused(changes, words, grad):
    names = {"norm_weight": problem()[-2], "norm_bias": problem()[-1]} | changes
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=words):
        function(*problem(norm=False), **names)


def test_calls_that_the_library_does_not_take():
    with pytest.raises(BackendError, match=r"cannot be served by cpp\n  cpp: no library for meta devices"):
        function(*(x.to("meta") for x in problem()))
    with (
        pytest.raises(BackendError, match="Triton kernels run on GPUs, the tensors are on cpu"),
        use_backend("triton"),
    ):
        function(*problem())
    with use_backend("auto"):
        assert function(*(x.to("meta") for x in problem())).is_meta


def test_weights_on_another_device_are_refused():
    args = problem()
    args[3] = args[3].to("meta")
    with pytest.raises(ValueError, match="must be on cpu as x is, got meta"):
        function(*args)


def test_transforms_take_the_formula():
    args = problem()
    with use_backend("auto"):
        got = torch.func.jvp(lambda x: function(x, *args[1:]), (args[0],), (args[0],))
        want = function(*args)
    torch.testing.assert_close(got[0], want)


def test_module_trains_as_the_reference_does():
    torch.manual_seed(0)
    m, r = nn.GatedConv1D(6, 3), reference.GatedConv1D(6, 3)
    r.load_state_dict(m.state_dict())
    x = torch.randn(4, 7, 6)
    optimisers = [torch.optim.AdamW(n.parameters(), lr=1e-2, eps=1e-3) for n in (m, r)]
    for _ in range(5):
        for n, optimiser in zip((m, r), optimisers, strict=True):
            optimiser.zero_grad()
            n(x).square().sum().backward()
            optimiser.step()
    torch.testing.assert_close(m(x), r(x), rtol=1e-4, atol=1e-5)


def test_a_large_sample_is_left_to_the_formula():
    x = torch.zeros(1, 1, 1).expand(1, 1 << 12, 1 << 10)
    assert any("too large" in reason for reason in gated_conv._native_reasons(x, torch.zeros(2048, 1, 3)))


@pytest.mark.parametrize(
    ("taps", "T", "fits"), [(31, 300, True), (33, 65, False), (33, 64, True), (129, 64, True)]
)
def test_triton_says_which_taps_reach_too_far(taps, T, fits):
    found = gated_conv._triton_reasons(torch.empty(2, T, 8), torch.empty(16, 1, taps))
    assert any(f"taps over more than 64 tokens, got {taps}" in reason for reason in found) is not fits


@pytest.mark.parametrize("where", ["dw", "pw"])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_parametrised_weight_is_asked_for_by_name(where, name):
    class Double(torch.nn.Module):
        def forward(self, w):
            return 2 * w

    m, x = nn.GatedConv1D(6, 3), torch.randn(2, 7, 6)
    torch.nn.init.normal_(getattr(getattr(m, where), name))
    want = [w * (2 if w is getattr(getattr(m, where), name) else 1) for w in m.weights]
    torch.nn.utils.parametrize.register_parametrization(getattr(m, where), name, Double())
    with torch.no_grad():
        close([m(x)], [function(x, *want)])
    assert len(m.weights) == 4


def test_module_compiled_with_its_gradients():
    torch._dynamo.reset()
    m = nn.GatedConv1D(6, 3)
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 7, 6)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(compiled(x), m(x))
    compiled(x).square().sum().backward()
    got = [p.grad.clone() for p in m.parameters()]
    m.zero_grad()
    m(x).square().sum().backward()
    close(got, [p.grad for p in m.parameters()])
