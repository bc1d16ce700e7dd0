"""The contract of `lomacs::projected_attention`: gradients, graphs, autocast, FLOPs, lists a group, refusals."""

import copy
import importlib
import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lomacs_fast import BackendError, functional, metrics, nn, reference, use_backend
from lomacs_fast.ops import native, toolchain

pytestmark = pytest.mark.skipif(
    toolchain.find_compiler("cpu") is None and bool(native.reasons("cpu")), reason="no C++ compiler"
)

# the package gives the op under the module's name
stem = importlib.import_module("lomacs_fast.ops.projected_attention")
NAME = "projected_attention"
OP = torch.ops.lomacs.projected_attention.default
BACKWARD = torch.ops.lomacs.projected_attention_backward.default
SIZES = [(6, 2, 3, 4, 5), (1, 1, 2, 1, 1), (5, 3, 1, 2, 11)]
LARGE = (64, 4, 16, 32, 32)
ARGUMENTS = 9
function = functional.projected_attention


def problem(T=7, G=2, g=3, a=4, k=5, B=3, norm=True, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, T, G * g), (G, a, g), (G, a, g), (G, g, g), (G, g, g), (G, T, k), (G, T, k)]
    shapes += [(G * g,), (G * g,)] * norm
    return [torch.randn(s, dtype=torch.float64, generator=generator).to(dtype) for s in shapes]


def full(args):
    return (*args, *[None] * (9 - len(args)), 1e-5)


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


def lists_of(args):
    return [list(w.unbind()) for w in args[1:7]]


def test_opcheck_of_lists():
    args = problem()
    checks = ("test_schema", "test_faketensor")
    op = torch.ops.lomacs.projected_attention_groups.default
    torch.library.opcheck(op, (args[0], *lists_of(args), *args[7:], 1e-5), test_utils=checks)
    op = torch.ops.lomacs.projected_attention_groups_backward.default
    for flags in itertools.product([False, True], repeat=2):
        torch.library.opcheck(
            op, (args[0], args[0], *lists_of(args), *args[7:], 1e-5, *flags), test_utils=checks
        )


def test_lists_give_the_bits_of_stacks():
    args = problem(dtype=torch.float32)
    lists = lists_of(args)
    want = value_and_gradients(function, args)
    with torch.no_grad():
        assert torch.equal(function(args[0], *lists, *args[7:]), want[0])
        mixed = [args[1], lists[1], args[3], *lists[3:]]
        assert torch.equal(function(args[0], *mixed, *args[7:]), want[0])
    leaves = [w.detach().clone().requires_grad_() for group in lists for w in group]
    grouped = [leaves[i : i + 2] for i in range(0, 12, 2)]
    y = function(args[0], *grouped, *args[7:])
    assert torch.equal(y, want[0])
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape).float()
    (y * weights).sum().backward()
    for group, g in zip(grouped, want[2:8], strict=True):
        for w, part in zip(group, g, strict=True):
            assert torch.equal(w.grad, part)


def module(cls=nn.GroupedProjectedAttention, seed=0):
    torch.manual_seed(seed)
    return cls(dim=6, att_dim=4, groups=2, seq_len=7, k_len=5)


def test_gradients_of_the_parameters_are_their_own():
    """Each gradient has its parameter's layout and memory that it shares with nothing."""
    m = module()
    m(torch.randn(3, 7, 6)).sum().backward()
    storages = {p.grad.untyped_storage().data_ptr() for p in m.parameters()}
    assert len(storages) == len(list(m.parameters())) == 12
    for p in m.parameters():
        assert p.grad.stride() == p.stride()
        assert p.grad.untyped_storage().nbytes() == 4 * p.numel()


def test_inference_copies_no_parameter_and_holds_none(monkeypatch):
    m, x = module(), torch.randn(1, 7, 6)
    monkeypatch.setattr(torch, "stack", lambda *_: pytest.fail("a parameter was copied"))
    with torch.no_grad():
        before = m(x)
        # changed past autograd's version counter: nothing may be left over from the call before
        for p in m.parameters():
            p.data.mul_(0.5)
        after = m(x)
    monkeypatch.undo()
    with use_backend("eager"):
        torch.testing.assert_close(after, m(x).detach())
    assert not torch.allclose(before, after)


def test_module_lives_as_the_reference_does():
    m, r = module(), module(reference.GroupedProjectedAttention)
    x = torch.randn(4, 7, 6)
    twin = copy.deepcopy(m)
    torch.testing.assert_close(twin(x), r(x))
    assert not any(p is q for p, q in zip(m.parameters(), twin.parameters(), strict=True))
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(1)
    torch.testing.assert_close(m(x), r(x))
    m.load_state_dict(twin.state_dict())
    assert torch.equal(m(x), twin(x))
    assert m.double()(x.double()).dtype == torch.float64
    m.float()
    m.load_state_dict({k: v.clone() for k, v in r.state_dict().items()}, assign=True)
    torch.testing.assert_close(m(x), r(x))
    # optimisers of both take the same steps
    optimisers = [torch.optim.AdamW(n.parameters(), lr=1e-2, eps=1e-3) for n in (m, r)]
    for _ in range(5):
        for n, optimiser in zip((m, r), optimisers, strict=True):
            optimiser.zero_grad()
            n(x).square().sum().backward()
            optimiser.step()
    torch.testing.assert_close(m(x), r(x), rtol=1e-4, atol=1e-5)


def test_a_parametrised_weight_is_asked_for_by_name():
    m, x = module(), torch.randn(2, 7, 6)
    torch.nn.utils.parametrizations.weight_norm(m.qs[1])
    with torch.no_grad():
        got = m(x)
    with use_backend("eager"):
        torch.testing.assert_close(got, m(x).detach())
    assert len(m.weights[0]) == 2


def test_module_compiled_with_its_gradients():
    torch._dynamo.reset()
    m = module()
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 7, 6)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(compiled(x), m(x))
    compiled(x).square().sum().backward()
    exact = copy.deepcopy(m).double()
    exact.zero_grad()
    with use_backend("eager"):
        exact(x.double()).square().sum().backward()
    close([p.grad for p in m.parameters()], [p.grad for p in exact.parameters()], factor=100)


def test_gradients_of_lists_record_nothing_in_inference():
    m = module()
    with torch.no_grad():
        assert not m(torch.randn(2, 7, 6)).requires_grad
    for p in m.parameters():
        p.requires_grad_(False)
    assert not m(torch.randn(2, 7, 6)).requires_grad
    assert m(torch.randn(2, 7, 6, requires_grad=True)).requires_grad


def test_a_large_sample_is_left_to_the_formula():
    reasons = stem._native_reasons(
        torch.zeros(1, 1, 1).expand(1, 1 << 12, 1 << 10), *[[torch.zeros(1, 1)]] * 6
    )
    assert any("too large" in reason for reason in reasons)


@pytest.mark.parametrize("k", [1, 11, 128, 300])
@pytest.mark.parametrize(
    ("g", "a", "words"),
    [
        (8, 64, None),
        (64, 64, None),
        (128, 128, None),
        (129, 4, "129 channels a group are more than the 128"),
        (8, 200, "200 wide queries are more than the 128"),
    ],
)
def test_triton_says_which_widths_have_no_room(g, a, k, words):
    groups = 2
    x, wq = torch.empty(3, 5, groups * g), torch.empty(groups, a, g)
    pk = torch.empty(groups, 5, k)
    found = stem._triton_reasons(x, wq, wq, wq, wq, pk, pk, None, None, 1e-5)
    found = [r for r in found if "shared memory" in r]
    assert [words in r for r in found] == ([True] if words else [])


def test_a_device_reads_lists_where_they_lie_once_it_has_run_that(monkeypatch):
    x = torch.empty(3, 5, 32, device="meta")
    for reasons in ([], ["none has run it"]):
        monkeypatch.setattr(stem.common, "triton_reasons", lambda device, proved, found=reasons: found)
        assert stem._where_they_lie(x, 4) is not bool(reasons)
        assert not stem._where_they_lie(x, 65)
    assert stem._where_they_lie(torch.empty(3), 65)
