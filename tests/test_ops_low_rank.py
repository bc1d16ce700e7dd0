"""The contract of `lomacs::low_rank`: schema, gradients, compiled graphs, autocast, FLOPs, views, refusals."""

import itertools
import types

import pytest
import torch
from memory import extra_memory
from torch.utils.flop_counter import FlopCounterMode

from lomacs_fast import BackendError, functional, use_backend
from lomacs_fast.ops import common, low_rank, native, toolchain

pytestmark = pytest.mark.skipif(
    toolchain.find_compiler("cpu") is None and bool(native.reasons("cpu")), reason="no C++ compiler"
)

OP = torch.ops.lomacs.low_rank.default
NESTINGS = low_rank.NESTINGS
DTYPES = [torch.complex64, torch.complex128, torch.float32, torch.float64]
loss_of = functional.low_rank_loss


@pytest.fixture(autouse=True)
def native_library():
    """Nothing here may pass because the reference served."""
    assert native.reasons("cpu") == ()
    with use_backend("cpp"):
        yield


def problem(M=6, N=5, L=3, batch=(3,), dtype=torch.complex128, seed=0):
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    sizes = ((N, L), (M, L), (M, N))
    return tuple(torch.randn(*batch, *s, dtype=wide, generator=generator).to(dtype) for s in sizes)


def raw(*args, nesting=0, shape=None):
    """Arguments of the op itself, asking for the gradients that are required."""
    planes = [torch.view_as_real(x.detach()).contiguous() if x.is_complex() else x.detach() for x in args]
    planes = [x.requires_grad_(y.requires_grad) for x, y in zip(planes, args, strict=True)]
    return *planes, *(shape or args[2].shape[-2:]), nesting, *(x.requires_grad for x in planes)


def double(x):
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def value_and_gradients(fn, inputs):
    """Losses, and gradients that differ from matrix to matrix."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    loss = fn(*inputs)
    weights = torch.arange(1, loss.numel() + 1, dtype=loss.dtype).reshape(loss.shape)
    return [loss.detach(), *torch.autograd.grad((loss * weights).sum(), inputs)]


def close(got, want, factor=30):
    """Relative L2 error of each tensor, in units of the lowest precision among them."""
    eps = max(torch.finfo(x.dtype).eps for x in got)
    for x, y in zip(got, want, strict=True):
        assert x.shape == y.shape
        error = torch.linalg.vector_norm(double(x) - double(y)) / torch.linalg.vector_norm(
            double(y)
        ).clamp_min(1)
        assert error <= factor * eps, (x.shape, error.item() / eps)


@pytest.mark.parametrize("needs", [(1, 1, 1), (1, 1, 0), (0, 1, 0), (0, 0, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype, needs):
    args = [x.requires_grad_(bool(need)) for x, need in zip(problem(dtype=dtype), needs, strict=True)]
    torch.library.opcheck(OP, raw(*args))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for nesting in (1, 2):
        torch.library.opcheck(OP, raw(*args, nesting=nesting, shape=(9, 5)), test_utils=checks)


@pytest.mark.parametrize("B", [0, 1])
def test_opcheck_of_small_batches(B):
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(OP, raw(*(x.requires_grad_() for x in problem(batch=(B,)))), test_utils=checks)


@pytest.mark.parametrize("nesting", ["none", "joint"])
@pytest.mark.parametrize("dtype", [torch.complex128, torch.float64])
@pytest.mark.parametrize(("M", "N", "L"), [(6, 5, 3), (5, 9, 1), (1, 1, 1)])
def test_gradcheck(M, N, L, nesting, dtype):
    inputs = [x.requires_grad_() for x in problem(M, N, L, batch=(2,), dtype=dtype)]
    for shape in (None, (M + 4, 3 * N)):
        assert torch.autograd.gradcheck(lambda *a, shape=shape: loss_of(*a, nesting, shape=shape), inputs)


@pytest.mark.parametrize("shape", [None, (12, 50)])
@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_reference(dtype, nesting, shape):
    """The gradient of sequential nesting is that of no scalar: the reference says what it is."""
    for batch in ((3,), (), (2, 2)):
        args = problem(7, 9, 4, batch, dtype)
        got = value_and_gradients(lambda *a: loss_of(*a, nesting, shape=shape), args)
        with use_backend("eager"):
            want = value_and_gradients(
                lambda *a: loss_of(*a, nesting, shape=shape), [double(x) for x in args]
            )
        close(got, want)


@pytest.mark.parametrize("reduce", [torch.sum, torch.mean])
def test_one_weight_for_all_matrices(reduce):
    args = [x.requires_grad_() for x in problem()]
    got = torch.autograd.grad(reduce(loss_of(*args)), args)
    with use_backend("eager"):
        want = torch.autograd.grad(reduce(loss_of(*args)), args)
    close(got, want)


@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_in_one_graph(dtype, nesting, backend):
    """Values and gradients against double precision: compiled complex gradients have been silently wrong."""
    if backend == "inductor" and (nesting != "joint" or dtype in (torch.complex128, torch.float64)):
        pytest.skip("compiling takes long")
    torch._dynamo.reset()
    fn = lambda *a: loss_of(*a, nesting, shape=(20, 30))  # noqa: E731
    compiled = torch.compile(fn, fullgraph=True, backend=backend)
    for seed in range(2):
        args = problem(9, 7, 4, dtype=dtype, seed=seed)
        with use_backend("eager"):
            want = value_and_gradients(fn, [double(x) for x in args])
        close(value_and_gradients(compiled, args), want)


def test_compiled_with_any_batch():
    torch._dynamo.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(loss_of, fullgraph=True, dynamic=True, backend=count)
    # no batch that another size might be taken for
    for B in (7, 4, 2):
        args = problem(batch=(B,))
        close(value_and_gradients(compiled, args), value_and_gradients(loss_of, args))
    assert len(graphs) == 1
    assert "lomacs.low_rank.default" in {str(node.target) for node in graphs[0].graph.nodes}


def test_exported():
    class Loss(torch.nn.Module):
        def forward(self, F, G, H):
            return loss_of(F, G, H, "joint")

    args = problem()
    program = torch.export.export(Loss(), args)
    assert any("low_rank" in str(node.target) for node in program.graph.nodes)
    close([program.module()(*args)], [Loss()(*args)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [torch.complex64, torch.float32])
def test_autocast_leaves_full_precision(kind, dtype):
    args = problem(dtype=kind)
    want = value_and_gradients(loss_of, args)
    with torch.autocast("cpu", dtype):
        got = value_and_gradients(loss_of, args)
        # the op itself takes half precision from a caller as single
        F, *rest = raw(*args)
        loss = OP(F.to(dtype), *rest)[0]
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize("dtype", [torch.complex128, torch.float64])
@pytest.mark.parametrize("batch", [(3,), (), (2, 2)])
def test_flop_formula(batch, dtype, nesting):
    for needs in itertools.product([False, True], repeat=3):
        args = [x.requires_grad_(n) for x, n in zip(problem(7, 5, 3, batch, dtype), needs, strict=True)]
        both = {}
        for backend in ("eager", "cpp"):
            with use_backend(backend):
                with FlopCounterMode(display=False) as forward, torch.no_grad():
                    loss_of(*args, nesting)
                with FlopCounterMode(display=False) as counter:
                    loss = loss_of(*args, nesting)
                    if any(needs):
                        loss.sum().backward()
            both[backend] = forward.get_total_flops(), counter.get_total_flops()
        assert both["cpp"] == both["eager"]
        assert both["cpp"][0] > 0


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_second_derivatives_are_refused(scale):
    F, G, H = problem()
    F.requires_grad_()
    for loss in (loss_of(F, G, H).sum() * scale, OP(*raw(F, G, H))[0].sum() * scale):
        leaf = F if loss.grad_fn is not None else None
        with pytest.raises(RuntimeError, match=r'no second derivatives.*use_backend\("eager"\) has them'):
            loss.backward(create_graph=True)
        assert leaf is not None
    with use_backend("eager"):
        (first,) = torch.autograd.grad(loss_of(F, G, H).sum(), F, create_graph=True)
        assert torch.autograd.grad(first.abs().sum(), F)[0].abs().sum() > 0


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)))
def test_only_what_is_asked_for_is_computed(needs, monkeypatch):
    asked = []

    class Recorded:
        def default(self, *args):
            asked.append(args[6:])
            return OP(*args)

    args = [x.requires_grad_(n) for x, n in zip(problem(), needs, strict=True)]
    loss = loss_of(*args).sum()
    assert loss.requires_grad == any(needs)
    if any(needs):
        loss.backward()
    with use_backend("eager"):
        leaves = [x.detach().requires_grad_() for x in args]
        every = torch.autograd.grad(loss_of(*leaves).sum(), leaves)
    for x, want, need in zip(args, every, needs, strict=True):
        assert (x.grad is not None) == need
        if need:
            close([x.grad], [want])
    monkeypatch.setattr(low_rank.torch.ops.lomacs, "low_rank", Recorded())
    loss_of(*args)
    with torch.no_grad():
        loss_of(*args)
    assert [tuple(flags) for flags in asked] == [needs, (False,) * 3]


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float32])
@pytest.mark.parametrize("threads", [1, 2])
def test_one_large_matrix_is_not_copied(dtype, threads):
    M, N, L = 2048, 1536, 32
    # touched, since pages that nobody wrote are not resident
    F, G, H = (torch.rand(s).to(dtype) for s in ((N, L), (M, L), (M, N)))
    F.requires_grad_(), G.requires_grad_()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        # what the first call loads is not the op's
        loss_of(F[:16], G[:16], H[:16, :16]).backward()
        F.grad = G.grad = None
        extra = extra_memory(lambda: loss_of(F, G, H).backward())
    finally:
        torch.set_num_threads(before)
    # gradients, factors by panels, and strips of every thread; H itself is six times as large
    assert extra <= 3 * (F.nbytes + G.nbytes) + 2**20 * threads, (extra, H.nbytes)
    assert extra < H.nbytes / 2


def test_a_gradient_that_was_not_asked_for_is_refused():
    F, G, H, rows, columns, nesting, *_ = raw(*problem())
    with pytest.raises(ValueError, match="F requires a gradient, so gf must be True"):
        OP(F.requires_grad_(), G, H, rows, columns, nesting, False, True, True)


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.complex128, torch.float64])
def test_a_second_backward_and_gradients_changed_in_place(dtype, scale):
    """The first backward gives the op's own gradients away: nobody may notice."""
    F, G, H = problem(dtype=dtype)
    F.requires_grad_()
    loss = loss_of(F, G, H).sum() * scale
    loss.backward(retain_graph=True)
    first = F.grad.clone()
    F.grad.zero_()
    for k in (1, 2, 3):
        loss.backward(retain_graph=k < 3)
        torch.testing.assert_close(F.grad, k * first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_a_second_backward_after_a_change_of_an_input_is_refused():
    F, G, H = problem()
    F.requires_grad_()
    loss = loss_of(F, G, H).sum()
    loss.backward(retain_graph=True)
    H.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_of_many_weights_at_once():
    F, G, H = problem()
    F.requires_grad_()
    losses = loss_of(F, G, H)
    (got,) = torch.autograd.grad(losses, F, torch.eye(3, dtype=losses.dtype), is_grads_batched=True)
    (each,) = torch.autograd.grad(loss_of(F, G, H).sum(), F)
    for b in range(3):
        torch.testing.assert_close(got[b, b], each[b])
        assert got[b].count_nonzero() == got[b, b].count_nonzero() > 0


def test_transforms_are_served_by_the_formula():
    args = problem()
    with use_backend("auto"):
        got = torch.func.vmap(loss_of)(*args)
        torch.testing.assert_close(got, loss_of(*args))
    with pytest.raises(BackendError, match="transforms"):
        torch.func.vmap(loss_of)(*args)


def views(x):
    yield "strided", torch.stack([x, x * torch.nan], -1)[..., 0]
    yield "transposed", x.mT.contiguous().mT
    yield "sliced", torch.cat([x, x], -1)[..., : x.shape[-1]]
    yield "expanded", x[:1].expand(x.shape)
    yield "offset", torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    yield "negated", torch._neg_view(x)
    if x.is_complex():
        yield "conjugated", x.conj()
        yield "adjoint", x.mT.contiguous().mH
        yield "both", torch._neg_view(x.conj())


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float32])
@pytest.mark.parametrize("position", range(3))
def test_views_give_the_bits_of_their_copies(position, dtype):
    args = problem(dtype=dtype)
    for name, view in views(args[position]):
        copy = torch.empty(view.shape, dtype=view.dtype).copy_(view)
        got, want = (
            value_and_gradients(loss_of, [x if i == position else y for i, y in enumerate(args)])
            for x in (view, copy)
        )
        for x, y in zip(got, want, strict=True):
            assert torch.equal(x.resolve_conj(), y), name


@pytest.mark.parametrize("batch", [(0,), (2, 0), (0, 3)])
def test_no_matrices(batch):
    args = problem(batch=batch)
    got = value_and_gradients(loss_of, args)
    assert got[0].shape == batch
    for x, y in zip(got[1:], args, strict=True):
        assert x.shape == y.shape


def test_other_devices_and_mixed_precisions_are_left_to_the_formula():
    F, G, H = problem()
    assert low_rank._native_reasons(F, G.to(torch.complex64), H, "none", None)
    meta = [x.to("meta") for x in (F, G, H)]
    with pytest.raises(BackendError, match="no library for meta devices"):
        loss_of(*meta)
    with use_backend("auto"):
        assert loss_of(*meta).shape == (3,)


@pytest.mark.parametrize(("kind", "left"), [((8, 0), True), ((9, 0), False)])
def test_auto_leaves_cuda_to_the_reference_until_a_device_of_the_kind_has_run_the_kernel(
    kind, left, monkeypatch
):
    monkeypatch.setattr(common, "_capability", lambda device: kind)
    x = types.SimpleNamespace(device=torch.device("cuda"), dtype=torch.complex64)
    for backend, there in (("auto", left), ("cpp", False)):
        with use_backend(backend):
            reasons = low_rank._native_reasons(x, x, x, "none", None)
        assert any("has run the kernel yet" in reason for reason in reasons) == there
