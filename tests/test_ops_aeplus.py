"""The contract of `lomacs::aeplus`: schema, gradients, compiled graphs, autocast, FLOPs, views, refusals."""

import itertools
import types

import pytest
import torch
from memory import extra_memory
from torch.utils.flop_counter import FlopCounterMode

import lomacs_fast
from lomacs_fast import BackendError, functional, metrics, reference, use_backend
from lomacs_fast.ops import aeplus, common, native, toolchain

pytestmark = pytest.mark.skipif(
    toolchain.find_compiler("cpu") is None and bool(native.reasons("cpu")), reason="no C++ compiler"
)

OP = torch.ops.lomacs.aeplus.default
WEIGHTS = {"lam": 0.35, "w_energy": 0.4, "w_diag": 0.3, "w_match": 0.2}
SIZES = [(6, 5, 3), (11, 7, 7), (5, 9, 1), (1, 1, 1)]


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
    return U.to(dtype), S.to(dtype.to_real()), V.to(dtype), H.to(dtype)


def raw(*args, mean=False):
    """Arguments of the op itself, asking for the gradients that are required."""
    planes = [torch.view_as_real(x.detach()).contiguous() if x.is_complex() else x.detach() for x in args]
    planes = [x.requires_grad_(y.requires_grad) for x, y in zip(planes, args, strict=True)]
    flags = (x.requires_grad for x in args)
    return *planes, torch.tensor(list(WEIGHTS.values()), dtype=torch.float64), mean, *flags


def double(x):
    return x.to(torch.complex128 if x.is_complex() else torch.float64) if isinstance(x, torch.Tensor) else x


def value_and_gradients(fn, inputs):
    inputs = [x.detach().requires_grad_() for x in inputs]
    loss = fn(*inputs)[0]
    return [loss.detach(), *torch.autograd.grad(loss * 1.7, inputs)]


def close(got, want, factor=30):
    """Relative L2 error of each tensor, in units of the lowest precision among them."""
    eps = max(torch.finfo(x.dtype).eps for x in got)
    for x, y in zip(got, want, strict=True):
        size = torch.linalg.vector_norm(double(y)).clamp_min(1)
        error = torch.linalg.vector_norm(double(x) - double(y)) / size
        assert error <= factor * eps, (x.shape, error.item() / eps)


@pytest.mark.parametrize("needs", [(1, 1, 1, 1), (1, 1, 1, 0), (0, 1, 0, 0), (0, 0, 0, 0)])
@pytest.mark.parametrize(("M", "N", "r"), SIZES)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_opcheck(M, N, r, dtype, needs):
    args = [
        x.requires_grad_(bool(need)) for x, need in zip(problem(M, N, r, dtype=dtype), needs, strict=True)
    ]
    for mean in (False, True):
        torch.library.opcheck(OP, raw(*args, mean=mean))


@pytest.mark.parametrize("B", [0, 1])
def test_opcheck_of_small_batches(B):
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(OP, raw(*(x.requires_grad_() for x in problem(batch=(B,)))), test_utils=checks)


@pytest.mark.parametrize("match", ["norm", "mean"])
@pytest.mark.parametrize(("M", "N", "r"), SIZES)
def test_gradcheck(M, N, r, match):
    inputs = [x.requires_grad_() for x in problem(M, N, r, batch=(2,))]
    weights = [torch.tensor(w, dtype=torch.float64, requires_grad=True) for w in WEIGHTS.values()]

    def loss(*args):
        return functional.aeplus_loss(*args[:4], **dict(zip(WEIGHTS, args[4:], strict=True)), match=match)[0]

    assert torch.autograd.gradcheck(loss, [*inputs, *weights])


@pytest.mark.parametrize("match", ["norm", "mean"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_in_one_graph(dtype, match, backend):
    """Values and gradients against double precision: compiled complex gradients have been silently wrong."""
    torch._dynamo.reset()

    def loss(U, S, V, H, *weights):
        return functional.aeplus_loss(U, S, V, H, **dict(zip(WEIGHTS, weights, strict=True)), match=match)

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    weights = [torch.tensor(w, dtype=torch.float64) for w in WEIGHTS.values()]
    for seed in range(2):
        args = [*problem(9, 7, 4, dtype=dtype, seed=seed), *weights]
        with use_backend("eager"):
            want = value_and_gradients(loss, [double(x) for x in args])
        close(value_and_gradients(compiled, args), want)
        weights = [w / 2 for w in weights]


def test_other_weights_compile_nothing_anew():
    torch._dynamo.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda *a, lam: functional.aeplus_loss(*a, **WEIGHTS | {"lam": lam}), backend=count
    )
    losses = {compiled(*problem(), lam=torch.tensor(lam))[0].item() for lam in (0.1, 0.2, 0.3)}
    assert len(losses) == 3
    assert len(graphs) == 1
    targets = {str(node.target) for node in graphs[0].graph.nodes}
    assert "lomacs.aeplus.default" in targets


def test_compiled_with_any_batch():
    torch._dynamo.reset()
    loss = lambda *args: functional.aeplus_loss(*args, **WEIGHTS)  # noqa: E731
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for B in (3, 5, 2):
        args = problem(batch=(B,))
        close(value_and_gradients(compiled, args), value_and_gradients(loss, args))


def test_exported():
    class Loss(torch.nn.Module):
        def forward(self, U, S, V, H):
            return functional.aeplus_loss(U, S, V, H, **WEIGHTS)[0]

    args = problem()
    program = torch.export.export(Loss(), args)
    assert any("aeplus" in str(node.target) for node in program.graph.nodes)
    close([program.module()(*args)], [Loss()(*args)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_full_precision(dtype):
    args = problem(dtype=torch.complex64)
    want = value_and_gradients(lambda *a: functional.aeplus_loss(*a, **WEIGHTS), args)
    with torch.autocast("cpu", dtype):
        got = value_and_gradients(lambda *a: functional.aeplus_loss(*a, **WEIGHTS), args)
        # the op itself takes half precision from a caller as single
        planes, rest = raw(*args)[:4], raw(*args)[4:]
        loss = OP(planes[0].to(dtype), *planes[1:], *rest)[0]
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)
    assert loss.dtype == torch.float32


def flops(fn):
    with FlopCounterMode(display=False) as counter:
        fn()
    return counter.get_total_flops()


@pytest.mark.parametrize("batch", [(3,), (), (2, 2)])
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)))
def test_flop_formula(needs, batch):
    args = [x.requires_grad_(n) for x, n in zip(problem(7, 5, 3, batch), needs, strict=True)]

    def run(backward):
        loss = functional.aeplus_loss(*args, **WEIGHTS)[0]
        if backward and any(needs):
            loss.backward()

    both = {}
    for backend in ("eager", "cpp"):
        with use_backend(backend):
            with torch.no_grad():
                forward = flops(lambda: run(False))
            both[backend] = forward, flops(lambda: run(True))
    assert both["cpp"] == both["eager"]
    assert both["cpp"][0] > 0


def test_multiply_adds_are_counted():
    args = problem(64, 64, 32, batch=(2,), dtype=torch.complex64)
    counted = {}
    for backend in ("eager", "cpp"):
        inputs = [x.requires_grad_(i < 3) for i, x in enumerate(args)]
        with use_backend(backend), metrics.TrueMacCounter() as counter:
            functional.aeplus_loss(*inputs, **WEIGHTS)[0].backward()
        assert not counter.uncounted
        counted[backend] = counter.macs / 2
    assert 2.5e6 < counted["cpp"] < 3.6e6
    assert counted["cpp"] < 0.8 * counted["eager"]


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_second_derivatives_are_refused(scale):
    U, S, V, H = problem()
    U.requires_grad_()
    loss = functional.aeplus_loss(U, S, V, H, **WEIGHTS)[0] * scale
    with pytest.raises(RuntimeError, match=r'no second derivatives.*use_backend\("eager"\) has them'):
        torch.autograd.grad(loss, U, create_graph=True)
    with use_backend("eager"):
        loss = functional.aeplus_loss(U, S, V, H, **WEIGHTS)[0]
        (first,) = torch.autograd.grad(loss, U, create_graph=True)
        assert torch.autograd.grad(first.abs().sum(), U)[0].abs().sum() > 0


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)))
def test_only_what_is_asked_for_is_computed(needs, monkeypatch):
    asked = []

    class Recorded:
        def default(self, *args):
            asked.append(args[6:])
            return OP(*args)

    args = [x.requires_grad_(n) for x, n in zip(problem(), needs, strict=True)]
    loss = functional.aeplus_loss(*args, **WEIGHTS)[0]
    outputs = OP(*raw(*args))
    for x, gradient, need in zip(args, outputs[2:], needs, strict=True):
        assert gradient.shape == ((torch.view_as_real(x) if x.is_complex() else x).shape if need else (0,))
    assert loss.requires_grad == any(needs)
    if any(needs):
        loss.backward()
    with use_backend("eager"):
        every = value_and_gradients(lambda *a: functional.aeplus_loss(*a, **WEIGHTS), args)[1:]
    for x, want, need in zip(args, every, needs, strict=True):
        assert (x.grad is not None) == need
        if need:
            close([x.grad * 1.7], [want])
    monkeypatch.setattr(aeplus.torch.ops.lomacs, "aeplus", Recorded())
    functional.aeplus_loss(*args, **WEIGHTS)
    with torch.no_grad():
        functional.aeplus_loss(*args, **WEIGHTS)
    with torch.inference_mode():
        functional.aeplus_loss(*args, **WEIGHTS)
    assert [tuple(flags) for flags in asked] == [needs, (False,) * 4, (False,) * 4]


def test_a_gradient_that_was_not_asked_for_is_refused():
    U, S, V, H, weights, mean, *_ = raw(*problem())
    with pytest.raises(ValueError, match="U requires a gradient, so gu must be True"):
        OP(U.requires_grad_(), S, V, H, weights, mean, False, True, True, True)


def test_gradients_may_be_changed_in_place():
    """The op's own gradient is handed out without a copy where the loss's is 1: nobody may notice."""
    U, S, V, H = problem()
    U.requires_grad_()
    loss = functional.aeplus_loss(U, S, V, H, **WEIGHTS)[0]
    loss.backward(retain_graph=True)
    first = U.grad.clone()
    U.grad.zero_()
    for k in (1, 2, 3):
        loss.backward(retain_graph=k < 3)
        torch.testing.assert_close(U.grad, k * first)
    kept, U.grad = U.grad, None
    functional.aeplus_loss(U, S, V, H, **WEIGHTS)[0].backward()
    torch.testing.assert_close(kept, 3 * first)


def test_a_gradient_of_one_is_not_copied(monkeypatch):
    shared = []
    share = common.share
    monkeypatch.setattr(common, "share", lambda g: (shared.append(g.shape), share(g))[1])
    args = [x.requires_grad_() for x in problem()]
    OP(*raw(*args))[0].backward()
    assert len(shared) == 4
    (OP(*raw(*args))[0] * 2).backward()
    assert len(shared) == 4


@pytest.mark.parametrize("threads", [1, 2])
def test_peak_memory_is_the_gradients_and_a_few_blocks_a_thread(threads):
    M, N, r, B = 64, 48, 32, 1024
    U, S, V, H = (torch.rand(B, *shape, dtype=torch.complex64) for shape in ((M, r), (r,), (N, r), (M, N)))
    S = S.real.contiguous()
    leaves = [x.requires_grad_() for x in (U, S, V)]
    gradients, block = sum(x.nbytes for x in leaves), 8 * M * N
    before_threads = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        # what the first call loads, and the threads' own heaps, are not the op's
        functional.aeplus_loss(*(x[:8] for x in leaves), H[:8], **WEIGHTS)[0].backward()
        for x in leaves:
            x.grad = None
        extra = extra_memory(lambda: functional.aeplus_loss(*leaves, H, **WEIGHTS)[0].backward())
    finally:
        torch.set_num_threads(before_threads)
    assert all(x.grad is not None for x in leaves)
    assert extra <= gradients + 32 * block * threads + 2**21, (extra, gradients)


@pytest.mark.parametrize("scale", [1, 0.5])
def test_eager_calls_hand_the_gradients_of_the_op_over(scale, monkeypatch):
    made = []

    class Recorded:
        def default(self, *args):
            outputs = OP(*args)
            made.append([x.data_ptr() for x in outputs[2:]])
            return outputs

    monkeypatch.setattr(aeplus.torch.ops.lomacs, "aeplus", Recorded())
    args = [x.requires_grad_() for x in problem()]
    loss = functional.aeplus_loss(*args, **WEIGHTS)[0] * scale
    loss.backward(retain_graph=True)
    assert [x.grad.data_ptr() for x in args] == made[0]
    first = [x.grad.clone() for x in args]
    loss.backward()
    assert len(made) == 2
    for x, once in zip(args, first, strict=True):
        torch.testing.assert_close(x.grad, 2 * once)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_gradients_of_the_weights(dtype):
    args = problem(dtype=dtype)
    for values in (
        [torch.tensor(w, dtype=torch.float64, requires_grad=True) for w in WEIGHTS.values()],
        [torch.tensor(w, dtype=torch.float32, requires_grad=True) for w in WEIGHTS.values()],
        [torch.tensor(0.35, requires_grad=True), 0.4, torch.tensor(0.3), 0.2],
    ):
        loss, terms = functional.aeplus_loss(*args, **dict(zip(WEIGHTS, values, strict=True)))
        assert loss.dtype == dtype.to_real()
        (loss * 3).backward()
        for value, term in zip(values, terms[1:], strict=True):
            assert not term.requires_grad
            if isinstance(value, torch.Tensor) and value.requires_grad:
                assert value.grad.dtype == value.dtype
                torch.testing.assert_close(value.grad.double(), 3 * term.double(), rtol=1e-6, atol=0)


def test_gradients_of_many_weights_at_once():
    args = [x.requires_grad_() for x in problem()]
    loss = functional.aeplus_loss(*args, **WEIGHTS)[0]
    many = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    got = torch.autograd.grad(loss, args, many, is_grads_batched=True)
    each = torch.autograd.grad(functional.aeplus_loss(*args, **WEIGHTS)[0], args)
    for x, y in zip(got, each, strict=True):
        torch.testing.assert_close(x, torch.stack([y, -2 * y, 0 * y]))


def test_a_weight_changed_in_place_counts():
    args, lam = problem(), torch.tensor(0.35)
    before = functional.aeplus_loss(*args, **WEIGHTS | {"lam": lam})[0]
    lam.fill_(0.7)
    after, terms = functional.aeplus_loss(*args, **WEIGHTS | {"lam": lam})
    torch.testing.assert_close(after - before, 0.35 * terms.ortho, rtol=1e-6, atol=0)


def views(x):
    yield "contiguous", x
    yield "strided", torch.stack([x, x * torch.nan], -1)[..., 0]
    yield "transposed", x.mT.contiguous().mT if x.ndim > 2 else x
    yield "sliced", torch.cat([x, x], -1)[..., : x.shape[-1]]
    yield "expanded", x[:1].expand(x.shape)
    yield "offset", torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    if x.is_complex():
        yield "conjugated", x.conj()
        yield "adjoint", x.mT.contiguous().mH
        yield "negated", torch._neg_view(x)
        yield "both", torch._neg_view(x.conj())
    else:
        yield "imaginary", torch.complex(x * 0, -x).conj().imag


@pytest.mark.parametrize("position", range(4))
def test_views_give_the_bits_of_their_copies(position):
    args = problem(6, 5, 3, dtype=torch.complex64)
    fn = lambda *a: functional.aeplus_loss(*a, **WEIGHTS)  # noqa: E731
    for name, view in views(args[position]):
        copy = torch.empty(view.shape, dtype=view.dtype).copy_(view)
        got, want = (
            value_and_gradients(fn, [x if i == position else y for i, y in enumerate(args)])
            for x in (view, copy)
        )
        for x, y in zip(got, want, strict=True):
            assert torch.equal(x.resolve_conj(), y), name


def test_batch_dimensions():
    flat = problem(batch=(6,))
    fn = lambda *a: functional.aeplus_loss(*a, **WEIGHTS)  # noqa: E731
    want = value_and_gradients(fn, flat)
    for batch in ((2, 3), (1, 6, 1), (6,)):
        got = value_and_gradients(fn, [x.reshape(*batch, *x.shape[1:]) for x in flat])
        for x, y in zip(got, want, strict=True):
            assert torch.equal(x.reshape(y.shape), y)
    one = value_and_gradients(fn, [x[0] for x in flat])
    for x, y in zip(one, value_and_gradients(fn, [x[:1] for x in flat]), strict=True):
        assert torch.equal(x.reshape(y.shape), y)


@pytest.mark.parametrize("batch", [(0,), (2, 0), (0, 3)])
def test_no_samples(batch):
    fn = lambda *a: functional.aeplus_loss(*a, **WEIGHTS)  # noqa: E731
    args = problem(batch=batch)
    got = value_and_gradients(fn, args)
    with use_backend("eager"):
        want = value_and_gradients(fn, args)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, equal_nan=True)


def test_repeated_calls_give_the_same_bits():
    args = problem(33, 17, 9, batch=(20,), dtype=torch.complex64)
    fn = lambda *a: functional.aeplus_loss(*a, **WEIGHTS)  # noqa: E731
    first = value_and_gradients(fn, args)
    for _ in range(3):
        assert all(torch.equal(x, y) for x, y in zip(value_and_gradients(fn, args), first, strict=True))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda U, S, V, H: (U.real, S, V.real, H.real), "cpp: H is float64, only complex64 and complex128"),
        (lambda *args: [x.to("meta") for x in args], "cpp: no library for meta devices"),
        (lambda U, S, V, H: (U.to("meta"), S, V, H), "devices differ: U meta, S cpu, V cpu, H cpu"),
        (lambda *_: problem(1200, 1000, 1, batch=(1,)), "too large"),
    ],
)
def test_calls_that_the_library_does_not_take(change, reason):
    args = change(*problem())
    with pytest.raises(BackendError, match=r"^aeplus_loss\(U=.*cannot be served by cpp\n") as error:
        functional.aeplus_loss(*args, **WEIGHTS)
    assert reason in str(error.value)
    if not any(x.is_meta for x in args):
        with use_backend("auto"):
            assert functional.aeplus_loss(*args, **WEIGHTS)[0].isfinite()


def test_mixed_dtypes_are_a_reason():
    U, S, V, H = problem()
    (reason,) = aeplus._native_reasons(U.to(torch.complex64), S, V, H)
    assert reason == "dtypes differ: U complex64, S float64, V complex128, H complex128"


def test_transforms_take_the_formula():
    U, S, V, H = problem()
    with use_backend("auto"):
        gradient = torch.func.grad(lambda u: functional.aeplus_loss(u, S, V, H, **WEIGHTS)[0])(U)
        single = torch.func.vmap(lambda *a: functional.aeplus_loss(*a, **WEIGHTS)[0])(U, S, V, H)
        _, tangent = torch.func.jvp(lambda s: functional.aeplus_loss(U, s, V, H, **WEIGHTS)[0], (S,), (S,))
    U.requires_grad_(), S.requires_grad_()
    loss = functional.aeplus_loss(U, S, V, H, **WEIGHTS)[0]
    of_u, of_s = torch.autograd.grad(loss, (U, S))
    close([gradient, single.mean(), tangent], [of_u, loss.detach(), (of_s * S).sum().detach()])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({0: torch.zeros(3, 6, 3)}, "U must"),
        ({2: torch.zeros(3, 6, 3, 2)}, "V must"),
        ({3: torch.zeros(3, 6, 5)}, "H"),
        ({1: torch.zeros(3, 3, dtype=torch.float16)}, "S must be float32 or float64"),
        ({4: torch.zeros(4)}, "weights must"),
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


def test_the_module_is_served_by_the_library():
    module, args = lomacs_fast.AEPlusLoss("mean"), problem(dtype=torch.complex64)
    U = args[0].requires_grad_()
    loss = module(*args, 0.4, 0.3, 0.2, 0.35)
    assert type(loss.grad_fn).__name__ == "_ReadyBackward"
    loss.backward()
    assert U.grad.isfinite().all()
    want, terms = reference.aeplus_loss(*map(double, args), **WEIGHTS, match="mean")
    close([loss.detach(), *module.terms], [want.detach(), *terms])


@pytest.mark.parametrize(("kind", "proved"), [((8, 0), False), ((9, 0), True)])
def test_auto_takes_cuda_where_a_device_has_run_the_kernel(kind, proved, monkeypatch):
    monkeypatch.setattr(common, "_capability", lambda device: kind)
    cuda = torch.device("cuda")
    x = types.SimpleNamespace(device=cuda, dtype=torch.complex64, shape=(1, 4, 4), is_complex=lambda: True)
    for backend in ("auto", "cpp"):
        with use_backend(backend):
            reasons = aeplus._native_reasons(x, x, x, x)
        said = any("has run the kernel yet" in reason for reason in reasons)
        assert said == (backend == "auto" and not proved)
