"""The contract of `lomacs::backbone`, the public function, and who calls it."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lomacs_fast import BackendError, LoMACSSVDNet, freeze, functional, metrics, reference, use_backend
from lomacs_fast.functional import AttentionBlock, ConvBlock, FoldedAttention
from lomacs_fast.ops import backbone as stem
from lomacs_fast.ops import dispatch, frozen

OP = torch.ops.lomacs.backbone.default
EPS = 1e-5
FORMS = ("lists", "stacked", "folded")


def problem(form="lists", B=3, T=7, G=2, g=4, a=3, k=5, taps=3, depth=3, dtype=torch.float64, seed=0):
    """Tokens, blocks and the last norm's weight and bias."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        x = torch.randn(shape, dtype=torch.float64, generator=generator) / max(shape[-1], 1) ** 0.5
        return x.to(dtype)

    d = G * g
    blocks = []
    for i in range(depth):
        norm = draw(d) + 1, draw(d)
        if i % 2:
            blocks.append(ConvBlock(*norm, draw(2 * d, 1, taps), draw(2 * d), draw(d, d, 1), draw(d)))
        elif form == "folded":
            blocks.append(FoldedAttention(*norm, *(draw(G, n, m) for n, m in [(g, g)] * 2 + [(T, k)] * 2)))
        else:
            shapes = [(a, g)] * 2 + [(g, g)] * 2 + [(T, k)] * 2
            weights = (draw(G, *shape) for shape in shapes)
            blocks.append(AttentionBlock(*norm, *(list(w) if form == "lists" else w for w in weights)))
    return draw(B, T, d), blocks, draw(d) + 1, draw(d)


def converted(blocks, dtype):
    return [
        type(b)(*([y.to(dtype) for y in w] if isinstance(w, list) else w.to(dtype) for w in b))
        for b in blocks
    ]


def direct(x, blocks, weight=None, bias=None):
    return OP(x, *stem.flattened(blocks), weight, bias, EPS)


def fused(x, blocks, weight=None, bias=None):
    return stem._fused(x, blocks, weight, bias, EPS)


def close(got, want, factor=30):
    error = (got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-300)
    assert error <= factor * torch.finfo(got.dtype).eps, error


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(form, dtype):
    x, blocks, *norm = problem(form, dtype=dtype)
    torch.library.opcheck(OP, (x, *stem.flattened(blocks), *norm, EPS))
    torch.library.opcheck(OP, (x[:0], *stem.flattened(blocks), None, None, EPS))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_op_and_function_are_the_formula(form, depth):
    x, blocks, *norm = problem(form, depth=depth)
    want = reference.backbone(x, blocks, *norm, EPS)
    y = x
    for block in blocks:
        normed = torch.nn.functional.layer_norm(y, y.shape[-1:], *block[:2], EPS)
        if isinstance(block, ConvBlock):
            y = y + reference.gated_conv1d(normed, *block[2:])
        elif isinstance(block, AttentionBlock):
            y = y + reference.projected_attention(normed, *block[2:])
        else:
            # queries that are the tokens themselves, scaled by sqrt(g), which the formula divides by
            eye = torch.eye(4, dtype=x.dtype).expand(2, 4, 4)
            score, mix, pk, pv = block[2:]
            y = y + reference.projected_attention(normed, eye * 2, score, mix.mT, eye, pk, pv)
    close(want, torch.nn.functional.layer_norm(y.mean(1), y.shape[-1:], *norm, EPS))
    close(direct(x, blocks, *norm), want)
    for backend in ("auto", "eager"):
        with use_backend(backend):
            close(functional.backbone(x, blocks, *norm, EPS), want)
            close(functional.backbone(x.mT.contiguous().mT, blocks, *norm, EPS), want)
    close(functional.backbone(x, blocks), reference.backbone(x, blocks))


@pytest.mark.parametrize("form", FORMS)
def test_gradients(form):
    x, blocks, *norm = problem(form, B=2, T=3, g=2, k=2, depth=2)
    weights, kinds = stem.flattened(blocks)

    def of(x, *weights):
        *weights, weight, bias = weights
        return functional.backbone(x, list(stem.nested(weights, kinds)), weight, bias)

    inputs = [w.detach().requires_grad_() for w in (x, *weights, *norm)]
    assert torch.autograd.gradcheck(of, inputs, fast_mode=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_in_one_graph(form, backend):
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend=backend)
    for B in (3, 2):
        arguments = problem(form, B=B, dtype=torch.float32)
        with torch.no_grad():
            close(compiled(*arguments), fused(*arguments))


def test_the_public_function_compiles_with_gradients():
    torch._dynamo.reset()
    x, blocks, *norm = problem()
    compiled = torch.compile(functional.backbone, fullgraph=True, backend="aot_eager")
    for fn in (compiled, functional.backbone):
        leaf = x.clone().requires_grad_()
        fn(leaf, blocks, *norm).square().sum().backward()
        if fn is compiled:
            want = leaf.grad
    close(leaf.grad, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_autocast_takes_and_gives_its_dtype(dtype, form):
    x, blocks, *norm = problem(form, dtype=torch.float32)
    exact = reference.backbone(x.to(dtype), converted(blocks, dtype), *(n.to(dtype) for n in norm))
    with torch.autocast("cpu", dtype), torch.no_grad():
        found = [f(x, blocks, *norm) for f in (direct, fused, functional.backbone)]
        with use_backend("eager"):
            found.append(functional.backbone(x, blocks, *norm))
    for y in found:
        assert y.dtype == dtype
        assert (y - exact).norm() <= 12 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize("form", FORMS)
def test_flop_formula(form):
    x, blocks, *norm = problem(form, depth=3)
    counts = []
    for run in (direct, reference.backbone):
        with FlopCounterMode(display=False) as counter:
            run(x, blocks, *norm)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("form", FORMS)
def test_the_true_count_is_that_of_its_blocks(form):
    sizes = {"B": 2, "T": 33, "g": 8, "k": 6, "depth": 3, "dtype": torch.float32}
    x, blocks, *norm = problem(**sizes)
    with torch.no_grad():
        want = metrics.true_macs(lambda: functional.backbone(x, blocks, *norm), samples=1)
        _, blocks, *_ = problem(form, **sizes)
        assert metrics.true_macs(lambda: direct(x, blocks, *norm), samples=1) == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_weights_go_in_as_they_are(form):
    """No copy of a contiguous parameter on the way to the kernel, of none in any list."""
    blocks = problem(form)[1]
    weights, kinds = stem.flattened(blocks)
    given = [w for b in blocks for part in b for w in (part if isinstance(part, list) else [part])]
    assert all(a is b for a, b in zip(weights, given, strict=True))
    for got, want in zip(stem.nested(weights, kinds), blocks, strict=True):
        assert type(got) is type(want)
        assert all(
            torch.equal(torch.stack(list(a)), torch.stack(list(b))) for a, b in zip(got, want, strict=True)
        )


def test_some_lists_among_stacks():
    x, blocks, *norm = problem("stacked")
    mixed = [b._replace(wq=list(b.wq)) if isinstance(b, AttentionBlock) else b for b in blocks]
    assert torch.equal(direct(x, mixed, *norm), direct(x, blocks, *norm))


def reasons(x, blocks, *norm):
    return stem._one_launch_reasons(x, blocks, *(norm or (None, None)), EPS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"T": 64, "g": 32, "G": 2}, None),
        ({"T": 256, "g": 32, "G": 2, "k": 128}, None),
        ({"T": 257, "g": 32, "G": 2}, "at most 16384 numbers in all"),
        ({"T": 2, "G": 9, "g": 32}, "256 a token"),
        ({"g": 3, "G": 1}, "an even number of them, got 3"),
        ({"g": 3, "G": 1, "depth": 1}, None),
        ({"taps": 33}, "at most 31 taps, got 33"),
        ({"g": 130, "G": 1}, "130 channels a group"),
        ({"a": 200}, "200 channels a group"),
        ({"depth": 0}, "no blocks"),
        ({"G": 8, "g": 2, "depth": 20}, "room for 400 addresses"),
        ({"dtype": torch.float64}, "single precision"),
    ],
)
def test_reasons(changes, words):
    found = reasons(*problem(**{"dtype": torch.float32, **changes}))
    others = [r for r in found if "run on GPUs" not in r]
    assert [words in r for r in others] == ([True] if words else [])


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_for_a_launch_a_block(form):
    x, blocks, *norm = problem(form, dtype=torch.float32)
    weight = blocks[0][2][0] if form == "lists" else blocks[0][2]
    for leaf in (x, weight, norm[1]):
        leaf.requires_grad_()
        assert any("gradients are wanted" in r for r in reasons(x, blocks, *norm))
        with torch.no_grad():
            assert not any("gradients" in r for r in reasons(x, blocks, *norm))
        leaf.requires_grad_(False)
    assert not any("gradients" in r for r in reasons(x, blocks, *norm))


def test_backend_by_name():
    x, blocks, *norm = problem(dtype=torch.float32)
    with pytest.raises(BackendError, match="Triton kernels run on GPUs"), use_backend("triton"):
        functional.backbone(x, blocks, *norm)
    with (
        pytest.raises(
            BackendError, match=r"(?s)^backbone\(x=float32\(3, 7, 8\) on cpu, blocks=\(Attention.*run on GPUs"
        ),
        use_backend("triton"),
    ):
        dispatch.OPS["backbone"](x, blocks, *norm, EPS)
    assert {row["backend"] for row in dispatch.backend_table() if row["op"] == "backbone"} == {
        "triton",
        "eager",
    }


@pytest.fixture
def launches(monkeypatch):
    """Calls of the op, on a machine where nothing speaks against it."""
    calls = []

    def op(*arguments):
        calls.append(arguments)
        return OP(*arguments)

    monkeypatch.setattr(stem, "_one_launch_reasons", lambda *_: [])
    monkeypatch.setattr(stem._op, "backends", (stem._op.backends[0]._replace(reasons=lambda *_: ()),))
    monkeypatch.setattr(stem.tokens, "unrecorded", lambda op_, *arguments: op(*arguments))
    return calls


@pytest.mark.parametrize("form", FORMS)
def test_one_launch_where_nothing_speaks_against_it(launches, form):
    x, blocks, *norm = problem(form)
    want = reference.backbone(x, blocks, *norm)
    close(stem.backbone(x, blocks, *norm, EPS), want)
    assert len(launches) == 1
    with use_backend("eager"):
        assert stem.backbone_at_once(x, blocks, *norm, EPS) is None
    assert len(launches) == 1


def test_by_name_it_serves_or_refuses_what_no_block_would():
    x, blocks, *norm = problem("folded", dtype=torch.float32)
    for backend, words in (("triton", "run on GPUs"), ("cpp", "no such backend")):
        for given in (blocks, ()):
            with use_backend(backend), pytest.raises(BackendError, match=words):
                functional.backbone(x, given, *norm)
            with use_backend(backend), pytest.raises(BackendError, match=words):
                stem.backbone(x, given, *norm, EPS)
    with use_backend("eager"):
        functional.backbone(x, blocks, *norm)


@pytest.mark.parametrize(
    ("position", "value", "error", "words"),
    [
        (0, 3, TypeError, "x must be a tensor, got int"),
        (0, torch.zeros(2, 3), ValueError, r"x must have shape \(B, \*, \*\), got \(2, 3\)"),
        (
            2,
            torch.zeros(3, dtype=torch.float64),
            ValueError,
            r"norm_weight must have shape \(8,\), got \(3,\)",
        ),
        (3, torch.zeros(8), TypeError, "norm_bias must be float64"),
        (1, [(1, 2)], TypeError, "blocks must be AttentionBlock, FoldedAttention or ConvBlock, got tuple"),
        (1, None, TypeError, "blocks must be a sequence of blocks, got NoneType"),
        (1, iter(()), TypeError, "blocks must be a sequence of blocks, got tuple_iterator"),
    ],
)
def test_bad_arguments_are_refused(position, value, error, words):
    arguments = list(problem())
    arguments[position] = value
    with pytest.raises(error, match=words):
        functional.backbone(*arguments)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cuda", [False, True])
def test_bad_weights_are_refused(form, cuda, monkeypatch):
    """In the same words whether blocks are looked at one by one or all at once."""
    if cuda:
        monkeypatch.setattr(functional, "_at_once", lambda x: True)
    x, blocks, *norm = problem(form)
    names = {"lists": "wk", "stacked": "wk", "folded": "mix"}
    for i, name in ((0, names[form]), (1, "pw_weight"), (2, "norm_bias")):
        whole = getattr(blocks[i], name)
        wrong = (
            [w[:1] for w in whole]
            if isinstance(whole, list)
            else whole[..., :1, :]
            if whole.ndim > 1
            else whole[:1]
        )
        changed = [*blocks[:i], blocks[i]._replace(**{name: wrong}), *blocks[i + 1 :]]
        with pytest.raises(ValueError, match=f"{name}.* must have shape"):
            functional.backbone(x, changed, *norm)
    with pytest.raises(ValueError, match="eps must be positive"):
        functional.backbone(x, blocks, *norm, eps=0.0)


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_block_without_a_norm_is_refused(form, cuda, monkeypatch):
    monkeypatch.setattr(functional, "_at_once", lambda x: cuda)
    x, blocks, *norm = problem(form)
    for i, block in enumerate(blocks):
        changed = [*blocks[:i], block._replace(norm_weight=None, norm_bias=None), *blocks[i + 1 :]]
        with pytest.raises(TypeError, match=rf"norm_weight of blocks\[{i}\] must be a tensor, got NoneType"):
            functional.backbone(x, changed, *norm)


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_the_norm_of_a_block_may_have_no_bias(form, cuda, monkeypatch):
    monkeypatch.setattr(functional, "_at_once", lambda x: cuda)
    x, blocks, *norm = problem(form)
    blocks = [block._replace(norm_bias=None) for block in blocks]
    got, want = functional.backbone(x, blocks, *norm), reference.backbone(x, blocks, *norm)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    assert "the norm of a block has no bias" in stem._one_launch_reasons(x, blocks, *norm, EPS)


def test_either_part_of_the_last_norm_may_be_left_out():
    x, blocks, weight, bias = problem()[:4]
    for norm in ((None, None), (weight, None), (None, bias)):
        got, want = functional.backbone(x, blocks, *norm), reference.backbone(x, blocks, *norm)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("eps", "error"), [(0.0, ValueError), (-1.0, ValueError), (float("nan"), ValueError), ("1", TypeError)]
)
def test_a_bad_epsilon_is_refused_without_a_last_norm(eps, error):
    x, blocks = problem("folded")[:2]
    with pytest.raises(error, match="eps must be"):
        functional.backbone(x, [], eps=eps)
    with pytest.raises(error, match="eps must be"):
        functional.backbone(x, blocks, eps=eps)


@pytest.mark.parametrize("form", FORMS)
def test_double_precision_stays_under_autocast(form):
    arguments = problem(form)
    assert arguments[0].dtype == torch.float64
    want = functional.backbone(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        got = functional.backbone(*arguments)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def network(dtype=torch.float64, **changes):
    torch.manual_seed(0)
    options = {"M": 6, "N": 4, "r": 3, "n_scene": 2, "dim": 8, "depth": 3, "groups": 2, "k_len": 5} | changes
    net = LoMACSSVDNet(**options, gate_hidden=4).to(dtype)
    return net, torch.randn(3, 6, 4, dtype=torch.promote_types(dtype, torch.complex64))


launches_alone = reference.network._launches


def counting(monkeypatch):
    """Calls of the function by networks that look as if they were on a device."""
    monkeypatch.setattr(reference.network, "_launches", lambda x: True)
    calls = []
    real = functional.backbone
    monkeypatch.setattr(functional, "backbone", lambda *a: calls.append(a) or real(*a))
    return calls


def test_the_network_calls_it_in_inference(monkeypatch):
    calls = counting(monkeypatch)
    net, H = network()
    want = net(H, 1)
    assert not calls
    with torch.no_grad():
        got = net(H, 1)
    assert len(calls) == 1
    _, blocks, *norm, eps = calls[0]
    assert [type(b) for b in blocks] == [AttentionBlock, ConvBlock, AttentionBlock]
    assert blocks[0].wq[1] is net.blocks[0][1].qs[1].weight
    assert norm == [net.norm.weight, net.norm.bias]
    assert eps == net.norm.eps
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y.detach())


@pytest.mark.parametrize(
    "change",
    [
        "hook on a block",
        "hook on a norm",
        "hook on a mixer",
        "hook on the last norm",
        "epsilon",
        "mixer",
        "plain norm",
    ],
)
def test_the_network_calls_modules_that_one_call_would_pass_by(change, monkeypatch):
    calls = counting(monkeypatch)
    net, H = network()
    seen = []
    targets = {
        "hook on a block": net.blocks[1],
        "hook on a norm": net.blocks[1][0],
        "hook on a mixer": net.blocks[0][1],
        "hook on the last norm": net.norm,
    }
    if change in targets:
        targets[change].register_forward_hook(lambda *_: seen.append(1))
    elif change == "epsilon":
        net.blocks[2][0].eps = 1e-3
    elif change == "mixer":
        net.blocks[1][1] = reference.GatedConv1D(8, 3).double()
    else:
        net.blocks[0][0] = torch.nn.LayerNorm(8, elementwise_affine=False).double()
    want = net(H, 1)
    with torch.no_grad():
        got = net(H, 1)
    assert not calls
    assert len(seen) == (2 if change in targets else 0)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y.detach())


def test_the_network_under_autocast_calls_its_modules(monkeypatch):
    calls = counting(monkeypatch)
    net, H = network(torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        net(H, 1)
    assert not calls


def test_the_network_on_a_cpu_calls_its_modules(monkeypatch):
    calls = counting(monkeypatch)
    monkeypatch.setattr(reference.network, "_launches", launches_alone)
    net, H = network()
    with torch.no_grad():
        net(H, 1)
    assert not calls


def test_the_network_in_one_launch(launches, monkeypatch):
    monkeypatch.setattr(functional, "_at_once", lambda x: True)
    monkeypatch.setattr(reference.network, "_launches", lambda x: True)
    net, H = network()
    want = net(H, 1)
    with torch.no_grad():
        got = net(H, 1)
    assert len(launches) == 1
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y.detach())


def test_the_network_in_inference_compiles_in_one_graph(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(reference.network, "_launches", lambda x: True)
    net, H = network(torch.float32)
    sid = torch.tensor([0, 1, 1])
    with torch.no_grad():
        for x, y in zip(
            torch.compile(net, fullgraph=True, backend="aot_eager")(H, sid), net(H, sid), strict=True
        ):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("taken", [False, True])
def test_the_frozen_network_stem_by_stem(taken, request):
    launches = request.getfixturevalue("launches") if taken else []
    net, H = network()
    weights = freeze(net).weights
    scene = torch.tensor([1, 0, 2])
    got = frozen._stem_by_stem(H, scene, weights)
    assert len(launches) == taken
    for x, y in zip(got, reference.frozen_svd(H, scene, weights), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.gpu
class TestOnADevice:
    @pytest.fixture(autouse=True)
    def device(self):
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        with use_backend("triton"), torch.no_grad():
            yield

    @staticmethod
    def on_device(form, B=64, T=64, dtype=torch.float32, seed=0, depth=2):
        x, blocks, *norm = problem(form, B, T, 4, 16, 32, 32, 3, depth, torch.float64, seed)
        weights, kinds = stem.flattened(blocks)
        weights = [w.to("cuda", dtype) for w in weights]
        return x.to("cuda", dtype), list(stem.nested(weights, kinds)), *(n.to("cuda", dtype) for n in norm)

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("T", [64, 63, 128])
    def test_by_the_rule(self, form, T):
        errors = [0.0, 0.0]
        for seed in range(3):
            x, blocks, *norm = arguments = self.on_device(form, T=T, seed=seed)
            assert not reasons(*arguments)
            weights, kinds = stem.flattened(blocks)
            wide = list(stem.nested([w.double() for w in weights], kinds))
            exact = reference.backbone(x.double(), wide, *(n.double() for n in norm))
            for i, f in enumerate((functional.backbone, reference.backbone)):
                errors[i] += float((f(*arguments) - exact).square().sum() / exact.square().sum()) / 3
        assert errors[0] ** 0.5 <= 2 * errors[1] ** 0.5 + 4 * torch.finfo(torch.float32).eps

    def test_one_launch(self):
        arguments = self.on_device("lists")
        functional.backbone(*arguments)
        # what poisons new memory is a launch too
        torch.utils.deterministic.fill_uninitialized_memory = False
        with torch.profiler.profile() as profile:
            functional.backbone(*arguments)
            torch.cuda.synchronize()
        kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        assert [name for name in kernels if "backbone" in name] == ["backbone_fwd_kernel"]
        assert not [name for name in kernels if "backbone" not in name and "Mem" not in name]

    def test_the_same_bits_again_and_captured(self):
        static, other = (self.on_device("lists", seed=seed) for seed in range(2))
        want = functional.backbone(*other)
        assert torch.equal(functional.backbone(*other), want)
        functional.backbone(*static)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = functional.backbone(*static)
        for a, b in zip(stem.flattened(static[1])[0], stem.flattened(other[1])[0], strict=True):
            a.copy_(b)
        for i in (0, 2, 3):
            static[i].copy_(other[i])
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, want)

    def test_networks(self):
        torch.manual_seed(0)
        net = LoMACSSVDNet(64, 64, 32, 2).cuda()
        H = torch.randn(4, 64, 64, dtype=torch.complex64, device="cuda")
        for run in (net, freeze(net)):
            got = run(H, 1)
            with use_backend("eager"):
                want = run(H, 1)
            for x, y in zip(got, want, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)
