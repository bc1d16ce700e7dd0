"""The contract of `lomacs::svd_heads`: values, gradients, graphs, FLOPs, views, refusals, and the network on it."""

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
OPS = torch.ops.lomacs
EPS = torch.finfo(torch.float32).eps
# widths of one strip, of several, of more than there are parts, and ragged ones; batches of one sample, of none, and
# beside whole vectors
SIZES = [
    (5, 3, 7, 1),
    (1, 1, 1, 1),
    (33, 64, 128, 260),
    (40, 17, 300, 129),
    (0, 4, 6, 5),
    (256, 64, 1000, 64),
    (9, 5, 5000, 3100),
]
SETS = ("avx512", "avx2", "portable")


@pytest.fixture(autouse=True)
def native_library():
    """Nothing here may pass because the reference served."""
    assert native.reasons("cpu") == ()
    with use_backend("cpp"):
        yield


@pytest.fixture(params=SETS)
def isa(request, monkeypatch):
    monkeypatch.setenv("LOMACS_FAST_ISA", request.param)
    try:
        functional.svd_heads(*problem(1, 1, 1, 1))
    except RuntimeError as error:
        if "lacks" not in str(error):
            raise
        pytest.skip(f"no {request.param} in this processor")


def problem(B=5, d=6, nu=20, nv=14, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, d), (nu, d), (nu,), (nv, d), (nv,))
    return [torch.randn(s, dtype=torch.float64, generator=generator).to(dtype) for s in shapes]


def results(fn, args, seed=3):
    """Outputs, and the gradients of all tensors."""
    leaves = [x.detach().requires_grad_() for x in args]
    outputs = fn(*leaves)
    generator = torch.Generator().manual_seed(seed)
    total = sum(
        (x * torch.randn(x.shape, dtype=torch.float64, generator=generator).to(x.dtype)).sum()
        for x in outputs
    )
    return [*(x.detach() for x in outputs), *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize("size", SIZES)
def test_float64_equals_autograd_of_the_reference(isa, size):
    args = problem(*size)
    for got, want in zip(
        results(functional.svd_heads, args), results(reference.svd_heads, args), strict=True
    ):
        assert got.shape == want.shape
        assert (got - want).norm() <= 1e-13 * want.norm() + 1e-14


@pytest.mark.parametrize("kind", ["random", "constant", "rank-deficient", "large", "zero"])
def test_float32_error_is_at_most_twice_eager(isa, kind):
    runs = []
    for seed in range(3):
        args = problem(48, 64, 700, 333, seed=seed)
        if kind == "constant":
            args[0] = args[0][:1].expand_as(args[0])
        elif kind == "rank-deficient":
            args[1] = args[1][:, :1] * args[1][:1]
        elif kind == "large":
            args[0] = args[0] * 1e18
        elif kind == "zero":
            args[0] = args[0] * 0
        single = [x.float() for x in args]
        exact = results(reference.svd_heads, [x.double() for x in single], seed)
        runs.append(
            [exact, results(reference.svd_heads, single, seed), results(functional.svd_heads, single, seed)]
        )
    for i in range(len(runs[0][0])):
        want, eager, ours = (torch.cat([run[j][i].double().flatten() for run in runs]) for j in range(3))
        norm = want.norm().clamp_min(1e-300)
        assert (ours - want).norm() / norm <= 2 * (eager - want).norm() / norm + 4 * EPS


def test_the_same_bits_for_any_number_of_threads():
    args = problem(70, 64, 2000, 1500, dtype=torch.float32)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            found.append(results(functional.svd_heads, args))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


def test_a_number_that_is_none_stays_where_it_is():
    args = problem(40, 6, 300, 20, dtype=torch.float32)
    args[0][3, 2] = torch.nan
    u, v, gfeat, *_ = results(functional.svd_heads, args)
    rows = torch.arange(40) == 3
    assert torch.equal(u.isnan().any(1), rows)
    assert torch.equal(v.isnan().all(1), rows)
    assert gfeat.isfinite().all()


@pytest.mark.parametrize("grad", [True, False])
def test_opcheck(grad):
    for dtype in (torch.float32, torch.float64):
        torch.library.opcheck(OPS.svd_heads.default, [x.requires_grad_(grad) for x in problem(dtype=dtype)])


def test_opcheck_of_the_backward():
    feat, wu, _, wv, _ = problem()
    gu, gv = feat @ wu.mT, feat @ wv.mT
    for gf, gw in itertools.product([False, True], repeat=2):
        torch.library.opcheck(OPS.svd_heads_backward.default, (gu, gv, feat, wu, wv, gf, gw))


def test_gradcheck():
    args = [x.requires_grad_() for x in problem(3, 2, 5, 4)]
    assert torch.autograd.gradcheck(functional.svd_heads, args)


@pytest.mark.parametrize("position", range(5))
def test_only_what_is_asked_for_is_computed(position):
    args = [x.requires_grad_(i == position) for i, x in enumerate(problem())]
    # the other head has no gradient at all
    functional.svd_heads(*args)[position > 2].square().sum().backward()
    want = [x.detach().requires_grad_() for x in args]
    reference.svd_heads(*want)[position > 2].square().sum().backward()
    for i, (x, y) in enumerate(zip(args, want, strict=True)):
        assert (x.grad is not None) == (i == position)
        if i == position:
            torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_in_one_graph(backend):
    torch._dynamo.reset()
    args = problem()
    compiled = torch.compile(lambda *a: functional.svd_heads(*a), fullgraph=True, backend=backend)
    for x, y in zip(results(compiled, args), results(reference.svd_heads, args), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_flop_formula(needs):
    args = [x.requires_grad_(needs[0] if i == 0 else needs[1]) for i, x in enumerate(problem())]
    counted = []
    for backend in ("eager", "cpp"):
        with use_backend(backend), FlopCounterMode(display=False) as counter:
            sum(x.square().sum() for x in functional.svd_heads(*args)).backward()
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0


def test_multiply_adds_are_counted():
    args = [x.requires_grad_() for x in problem()]
    with metrics.TrueMacCounter() as counter:
        sum(x.sum() for x in functional.svd_heads(*args)).backward()
    # values, gradients of the features and of the weights
    assert counter.by_op["lomacs::svd_heads"] == 5 * 6 * 34
    assert counter.by_op["lomacs::svd_heads_backward"] == 2 * 5 * 6 * 34


@pytest.mark.parametrize("position", range(5))
def test_views_give_the_bits_of_their_copies(position):
    args = problem(dtype=torch.float32)
    x = args[position]
    views = {
        "strided": torch.stack([x, x * torch.nan], -1)[..., 0],
        "sliced": torch.cat([x, x], -1)[..., : x.shape[-1]],
        "expanded": x[:1].expand(x.shape),
        "imaginary": torch.complex(x * 0, -x).conj().imag,
    }
    for name, view in views.items():
        copy = torch.empty(view.shape, dtype=view.dtype).copy_(view)
        got, want = (
            results(functional.svd_heads, [y if i == position else z for i, z in enumerate(args)])
            for y in (view, copy)
        )
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), name


def test_calls_that_the_library_does_not_take():
    for args, reason in (
        ([x.to("meta") for x in problem()], "the C++ kernels run on the CPU, the tensors are on meta"),
        ([x.half() for x in problem()], "feat is torch.float16"),
    ):
        with pytest.raises(BackendError, match="cannot be served by cpp\n") as error:
            functional.svd_heads(*args)
        assert reason in str(error.value)


@pytest.mark.parametrize(
    ("position", "value", "words"),
    [
        (0, torch.zeros(2, 3, 6), "feat must"),
        (1, torch.zeros(20, 5), "u_weight must"),
        (2, torch.zeros(19), "u_bias must"),
        (3, torch.zeros(14, 6, dtype=torch.float64), "v_weight must"),
        (4, torch.zeros(1), "v_bias must"),
    ],
)
def test_wrong_arguments(position, value, words):
    args = problem(dtype=torch.float32)
    args[position] = value
    with pytest.raises((TypeError, ValueError), match=words):
        functional.svd_heads(*args)
    with pytest.raises(RuntimeError, match=r"must have shape|to go with"):
        OPS.svd_heads(*args)
    with (
        torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True),
        pytest.raises(RuntimeError, match=words),
    ):
        OPS.svd_heads(*args)


def test_second_derivatives_are_refused():
    args = [x.requires_grad_() for x in problem()]
    with pytest.raises(RuntimeError, match=r'no second derivatives.*use_backend\("eager"\) has them'):
        torch.autograd.grad(functional.svd_heads(*args)[0].square().sum(), args[0], create_graph=True)


def pooled(B=5, T=3, d=6, nu=20, nv=14, r=4, scenes=3, dtype=torch.float64, seed=0):
    """Arguments of `pooled_heads`, the integers and eps apart."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, T, d), (d,), (d,), (scenes, d), (nu, d), (nu,), (nv, d), (nv,), (r, d), (r,))
    return [torch.randn(s, dtype=torch.float64, generator=generator).to(dtype) for s in shapes]


def with_numbers(args, eps=1e-5):
    x, weight, bias, table, *heads = args
    return x, weight, bias, eps, table, torch.arange(len(x)) % len(table), *heads


def pooled_results(fn, args, seed=3):
    return results(lambda *a: fn(*with_numbers(a))[:3], args, seed)


@pytest.mark.parametrize("size", [(5, 3, 6, 20, 14, 4), (1, 1, 1, 1, 1, 1), (9, 17, 33, 260, 129, 40)])
def test_pooled_heads_in_float64_equal_autograd_of_the_reference(isa, size):
    args = pooled(*size)
    for got, want in zip(
        pooled_results(OPS.pooled_heads, args), pooled_results(reference.pooled_heads, args), strict=True
    ):
        assert got.shape == want.shape
        assert (got - want).norm() <= 1e-12 * want.norm() + 1e-12


@pytest.mark.parametrize("kind", ["random", "even", "shifted", "large", "steep"])
def test_pooled_heads_in_float32_are_at_most_twice_as_far_as_eager(isa, kind):
    runs = []
    for seed in range(3):
        args = pooled(48, 37, 64, 300, 200, 32, seed=seed)
        if kind == "even":
            # a mean of nearly equal numbers, which the norm divides by little but eps
            args[0] = 1 + 1e-3 * args[0]
        elif kind == "shifted":
            args[0] += 50
        elif kind == "large":
            args[0] *= 1e15
        elif kind == "steep":
            args[8] *= 40
        single = [x.float() for x in args]
        exact = pooled_results(reference.pooled_heads, [x.double() for x in single], seed)
        fast = pooled_results(OPS.pooled_heads, single, seed)
        runs.append([exact, pooled_results(reference.pooled_heads, single, seed), fast])
    for i in range(len(runs[0][0])):
        want, eager, ours = (torch.cat([run[j][i].double().flatten() for run in runs]) for j in range(3))
        norm = want.norm().clamp_min(1e-300)
        assert (ours - want).norm() / norm <= 2 * (eager - want).norm() / norm + 4 * EPS


def test_pooled_heads_have_the_same_bits_for_any_number_of_threads():
    args = pooled(70, 64, 64, 1000, 700, 32, dtype=torch.float32)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            found.append(pooled_results(OPS.pooled_heads, args))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


def test_pooled_heads_beyond_the_ends_of_the_spectrum():
    args = pooled(dtype=torch.float32)
    args[9] = torch.tensor([-200.0, -90.0, 25.0, 1e4])
    for got, want in zip(
        pooled_results(OPS.pooled_heads, args), pooled_results(reference.pooled_heads, args), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    args[0][2] = torch.nan
    s = OPS.pooled_heads(*with_numbers(args))[2]
    assert torch.equal(s.isnan().all(1), torch.arange(5) == 2)
    assert torch.equal(s.isnan().any(1), torch.arange(5) == 2)


@pytest.mark.parametrize("grad", [True, False])
def test_opcheck_of_pooled_heads(grad):
    for dtype in (torch.float32, torch.float64):
        args = [x.requires_grad_(grad) for x in pooled(dtype=dtype)]
        torch.library.opcheck(OPS.pooled_heads.default, with_numbers(args))


def test_opcheck_of_the_backward_of_pooled_heads():
    x, weight, _, _, table, scene, wu, _, wv, _, ws, _ = inputs = with_numbers(pooled())
    *grads, kept = OPS.pooled_heads(*inputs)
    for gw in (False, True):
        args = (*grads, x.shape[1], weight, len(table), scene, wu, wv, ws, kept, gw)
        torch.library.opcheck(OPS.pooled_heads_backward.default, args)


def test_gradcheck_of_pooled_heads():
    args = [x.requires_grad_() for x in pooled(3, 2, 4, 3, 2, 2)]
    assert torch.autograd.gradcheck(lambda *a: OPS.pooled_heads(*with_numbers(a))[:3], args)


def test_flops_and_multiply_adds_of_pooled_heads():
    args = [x.requires_grad_() for x in pooled()]
    counted = []
    for fn in (reference.pooled_heads, OPS.pooled_heads):
        with FlopCounterMode(display=False) as counter:
            sum(x.square().sum() for x in fn(*with_numbers(args))[:3]).backward()
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0
    with metrics.TrueMacCounter() as counter:
        sum(x.sum() for x in OPS.pooled_heads(*with_numbers(args))[:3]).backward()
    assert 5 * 6 * 38 < counter.by_op["lomacs::pooled_heads"] < 2 * 5 * 6 * 38
    assert 2 * 5 * 6 * 38 < counter.by_op["lomacs::pooled_heads_backward"] < 3 * 5 * 6 * 38


@pytest.mark.parametrize(
    ("position", "value", "words"),
    [
        (0, torch.zeros(5, 3, 7), r"x must have shape|must have"),
        (1, torch.zeros(5), "norm_weight must|must have"),
        (3, 0.0, "eps must be positive"),
        (4, torch.zeros(3, 5), "scenes must have shape"),
        (5, torch.tensor([0, 1, 3, 0, 0]), "scene must name a row"),
        (5, torch.zeros(5, dtype=torch.int32), "scene must be a contiguous int64"),
        (8, torch.zeros(14, 5), "v_weight must have shape"),
        (9, torch.zeros(14, dtype=torch.float64), "v_bias must be float32"),
        (10, torch.zeros(4), r"weights must have shape \(n, d\)"),
    ],
)
def test_wrong_arguments_of_pooled_heads(position, value, words):
    args = list(with_numbers(pooled(dtype=torch.float32)))
    args[position] = value
    with pytest.raises(RuntimeError, match=words):
        OPS.pooled_heads(*args)


def network():
    torch.manual_seed(0)
    return lomacs_fast.LoMACSSVDNet(6, 5, 2, 1, dim=8, groups=2, k_len=3)


def calls_of(net):
    H = torch.randn(3, 6, 5, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    with use_backend("auto"), metrics.TrueMacCounter() as counter:
        net(H, 0)
    return "lomacs::svd_heads" in counter.by_op


def test_the_network_calls_past_its_heads_only_where_nobody_sees():
    assert calls_of(network())
    seen, net = [], network()
    net.u_head.register_forward_hook(lambda *_: seen.append(1))
    assert not calls_of(net)
    assert seen == [1]

    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    net = network()
    net.v_head = Doubled(8, 20)
    assert not calls_of(net)
    net = network()
    net.v_head = torch.nn.Linear(8, 20, bias=False)
    assert not calls_of(net)
    with torch.autocast("cpu", torch.bfloat16):
        assert not calls_of(network())
