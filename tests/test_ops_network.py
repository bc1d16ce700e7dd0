"""The network as one node of autograd: what the modules one by one give, where it serves, and where it must not."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import lomacs_fast
from lomacs_fast import reference, use_backend
from lomacs_fast.ops import native, toolchain

pytestmark = pytest.mark.skipif(
    toolchain.find_compiler("cpu") is None and bool(native.reasons("cpu")), reason="no C++ compiler"
)
NODE = "_NetworkBackward"
EPS = torch.finfo(torch.float32).eps


def network(kind=lomacs_fast, M=12, N=10, r=5, dtype=torch.float32, **options):
    torch.manual_seed(0)
    net = kind.LoMACSSVDNet(M, N, r, 3, **{"dim": 16, "k_len": 4, "gate_hidden": 6} | options).to(dtype)
    # at its first values a spectrum this small has gradients that are nothing
    with torch.no_grad():
        net.s_head[0].bias.fill_(-1)
        net.pos.normal_(std=0.1)
    return net


def one_by_one(net):
    """The same network, its modules called one by one."""
    other = copy.deepcopy(net)
    other._published = other._by_parts
    return other


def channels(B=4, M=12, N=10, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    H = torch.randn(B, M, N, dtype=torch.complex128, generator=generator)
    return H.to(torch.promote_types(dtype, torch.complex32))


def scenes(B=4):
    return torch.arange(B) % 3


def is_node(found):
    return all(x.grad_fn is not None and type(x.grad_fn).__name__ == NODE for x in found)


def sum_of(found, seed=5):
    generator = torch.Generator().manual_seed(seed)
    total = 0
    for x in found:
        parts = torch.view_as_real(x) if x.is_complex() else x
        weight = torch.randn(parts.shape, dtype=torch.float64, generator=generator)
        total = total + (parts * weight.to(parts.dtype)).sum()
    return total


def gradients(net, H, of=slice(None), of_channel=True):
    """Outputs, and the gradients of H and of all parameters."""
    leaf = H.detach().clone().requires_grad_(of_channel)
    found = net(leaf, scenes(len(H)))
    net.zero_grad()
    sum_of(found[of]).backward()
    return [*(x.detach() for x in found), leaf.grad, *(p.grad for p in net.parameters())]


def close(got, want, factor):
    for x, y in zip(got, want, strict=True):
        assert (x is None) == (y is None)
        if y is None:
            continue
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        assert (x - y).abs().square().sum().sqrt() <= factor * torch.finfo(x.dtype).eps * (
            y.abs().square().sum().sqrt() + 1e-3
        )


@pytest.mark.parametrize("of_channel", [True, False])
@pytest.mark.parametrize("depth", [0, 1, 2, 5])
def test_float64_equals_autograd_of_the_reference(depth, of_channel):
    net, eager = (network(kind, depth=depth, dtype=torch.float64) for kind in (lomacs_fast, reference))
    H = channels(dtype=torch.float64)
    assert is_node(net(H, scenes()))
    got, want = (gradients(one, H, of_channel=of_channel) for one in (net, eager))
    close(got, want, 3e4)


@pytest.mark.parametrize("of", [slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 4), slice(0, 3)])
def test_any_of_the_outputs_may_have_a_gradient(of):
    net = network(dtype=torch.float64)
    H = channels(dtype=torch.float64)
    # what has no gradient one by one may have zeros
    got, want = gradients(net, H, of), gradients(one_by_one(net), H, of)
    close([g if w is not None else None for g, w in zip(got, want, strict=True)], want, 3e4)
    for g, w in zip(got, want, strict=True):
        assert w is not None or g is None or not g.any()


@pytest.mark.parametrize("of_channel", [True, False])
@pytest.mark.parametrize("options", [{}, {"r": 10, "groups": 2}, {"M": 9, "N": 35, "k_len": 3}])
def test_float32_error_is_at_most_twice_that_of_the_modules(options, of_channel):
    sums = None
    for seed in range(3):
        net = network(**options)
        H = channels(M=net.M, N=net.N, seed=seed)
        double = network(reference, dtype=torch.float64, **options)
        exact, *runs = (
            [x for x in gradients(one, h, of_channel=of_channel) if x is not None]
            for one, h in ((double, H.to(torch.complex128)), (net, H), (one_by_one(net), H))
        )
        squares = [
            [(x - y).abs().square().sum().double() for x, y in zip(run, exact, strict=True)] for run in runs
        ]
        squares.append([y.abs().square().sum() for y in exact])
        new = torch.tensor(squares)
        sums = new if sums is None else sums + new
    ours, modules, size = sums.sqrt()
    assert (ours <= 2 * modules + 4 * EPS * size).all()


def test_inference_gives_the_values_of_training():
    net, H = network(), channels()
    trained = [x.detach() for x in net(H, scenes())]
    with torch.no_grad():
        close(net(H, scenes()), trained, 4)
        close(net(H, scenes()), one_by_one(net)(H, scenes()), 30)
    with torch.inference_mode():
        close(net(H, scenes()), trained, 4)


@pytest.mark.parametrize("of_channel", [True, False])
@pytest.mark.parametrize("part", ["freq_gate", "input_proj", "pos", "blocks", "norm", "scene_emb", "u_head"])
def test_what_is_frozen_has_no_gradient(part, of_channel):
    net = network(dtype=torch.float64)
    for name, p in net.named_parameters():
        p.requires_grad_(not name.startswith(part))
    H = channels(dtype=torch.float64)
    got, want = (gradients(one, H, of_channel=of_channel) for one in (net, one_by_one(net)))
    close(got, want, 3e4)


def test_one_trained_parameter():
    for name, _ in network().named_parameters():
        net = network(dtype=torch.float64)
        for other, p in net.named_parameters():
            p.requires_grad_(other == name)
        other = one_by_one(net)
        for one in (net, other):
            sum_of(one(channels(dtype=torch.float64), scenes())).backward()
        close([p.grad for p in net.parameters()], [p.grad for p in other.parameters()], 3e4)


def hooked(net):
    net.u_head.register_forward_hook(lambda *_: None)


def with_backward_hook(net):
    net.norm.register_full_backward_hook(lambda *_: None)


def derived(net):
    class Double(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    net.v_head.__class__ = Double


def assigned(net):
    net.s_head.forward = lambda x: 3 * net.s_head[0](x).exp()


def another_softplus(net):
    net.s_head[1] = nn.Softplus(beta=2)


def another_activation(net):
    net.s_head[1] = nn.ReLU()


def with_padding(net):
    net.scene_emb = nn.Embedding(3, 16, padding_idx=0)


def sparse(net):
    net.scene_emb = nn.Embedding(3, 16, sparse=True)


def wrapped(net):
    net.blocks[0] = nn.Sequential(net.blocks[0][0], nn.Sequential(net.blocks[0][1]))


def other_eps(net):
    net.blocks[1][0].eps = 1e-3


def no_bias(net):
    net.input_proj = nn.Linear(40, 16, bias=False).double()


def parametrised(net):
    class Half(nn.Module):
        def forward(self, x):
            return x / 2

    parametrize.register_parametrization(net.u_head, "weight", Half())


def more_steps(net):
    net.ortho_refine = lomacs_fast.NeuralOrthoRefiner(steps=2)


def another_residual(net):
    class Through(type(net.blocks[1][1])):
        def residual(self, x, norm):
            return x

    net.blocks[1][1].__class__ = Through


def another_tail(net):
    class Own(type(net)):
        def _columns(self, feat):
            return [2 * x for x in super()._columns(feat)]

    net.__class__ = Own


def trained_bound(net):
    net.ortho_refine.max_scale = nn.Parameter(torch.tensor(0.4, dtype=torch.float64))


def one_in_a_row(net):
    net.ortho_refine.a_raw = nn.Parameter(torch.zeros(1, dtype=torch.float64))


OTHERS = [
    another_residual,
    another_tail,
    trained_bound,
    hooked,
    with_backward_hook,
    derived,
    assigned,
    another_softplus,
    another_activation,
    with_padding,
    sparse,
    wrapped,
    other_eps,
    no_bias,
    parametrised,
    more_steps,
]


@pytest.mark.parametrize("change", OTHERS)
def test_a_network_of_other_parts_is_called_part_by_part(change):
    net = network(dtype=torch.float64)
    change(net)
    found = net(channels(dtype=torch.float64), scenes())
    assert not is_node(found)
    want = net._by_parts(channels(dtype=torch.float64), scenes())
    assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))


def test_parts_that_are_trained_alone_and_deep_networks_are_called_part_by_part():
    net = network()
    for p in net.freq_gate.parameters():
        p.requires_grad_(False)
    assert not is_node(net(channels(), scenes()))
    assert not is_node(network(depth=9)(channels(), scenes()))
    net = network()
    one_in_a_row(net.double())
    U, *_ = net(channels(dtype=torch.float64), scenes())
    U.abs().sum().backward()
    assert net.ortho_refine.a_raw.grad.shape == (1,)


def test_hd_alone_leaves_the_rest_without_a_gradient():
    for of_channel in (True, False):
        net = network(dtype=torch.float64)
        got, want = (
            gradients(one, channels(dtype=torch.float64), slice(3, 4), of_channel)
            for one in (net, one_by_one(net))
        )
        close(got, want, 3e4)


def test_gradients_of_both_sizes_are_tensors_of_their_own():
    net = network()
    with torch.no_grad():
        net.ortho_refine.a_raw.data = net.ortho_refine.a_raw.data.bfloat16()
    sum_of(net(channels(), scenes())).backward()
    a, b = net.ortho_refine.a_raw.grad, net.ortho_refine.b_raw.grad
    assert (a.dtype, b.dtype) == (torch.bfloat16, torch.float32)
    assert a.data_ptr() != b.data_ptr()
    x = torch.ones((), requires_grad=True)
    z = x * b
    a.zero_()
    z.backward()


def test_a_trace_holds_no_numbers_of_the_weights():
    net = network()
    with torch.no_grad():
        traced = torch.jit.trace(net, (channels(), scenes()), check_trace=False)
        net.tau_s.fill_(0.1)
        net.ortho_refine.a_raw.add_(3)
        close(traced(channels(), scenes()), net(channels(), scenes()), 100)


def test_errors_of_the_callers_own_code_are_raised():
    net, seen = network(), []

    def pack(x):
        seen.append(x)
        if len(seen) == 5:
            raise RuntimeError("no room")
        return x

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        pytest.raises(RuntimeError, match="no room"),
    ):
        net(channels(), scenes())


def test_scenes_of_other_integers_and_strides():
    net = network()
    want = net(channels(), scenes())
    for sid in (scenes().int(), scenes()[:, None].expand(4, 3)[:, 1], scenes().repeat_interleave(2)[::2]):
        found = net(channels(), sid)
        assert is_node(found)
        assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))


def test_a_hook_of_all_modules_sees_them():
    net, seen = network(), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        net(channels(), scenes())
    finally:
        handle.remove()
    assert net.s_head[1] in seen
    assert is_node(net(channels(), scenes()))


def test_hooks_and_changes_that_come_later_are_seen():
    net = network()
    assert is_node(net(channels(), scenes()))
    hooked(net)
    assert not is_node(net(channels(), scenes()))


def test_other_ways_of_running_are_left_to_the_ops():
    net, H = network(), channels()
    with use_backend("eager"):
        assert not is_node(net(H, scenes()))
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_node(net(H, scenes()))
    with FlopCounterMode(display=False) as counter:
        assert not is_node(net(H, scenes()))
    assert counter.get_total_flops() > 0
    found = torch.func.functional_call(net, dict(net.named_parameters()), (H, scenes()))
    close(found, net(H, scenes()), 30)
    torch.func.vmap(lambda x: net(x[None], 0)[1])(H)


def test_new_parameters_and_shapes_are_followed():
    net = network(dtype=torch.float64)
    net.pos = nn.Parameter(torch.randn(1, 12, 16, dtype=torch.float64))
    net.double()
    H = channels(dtype=torch.float64)
    close(net(H, scenes()), one_by_one(net)(H, scenes()), 3e4)


def test_scenes_out_of_range_are_named():
    net = network()
    for sid in (torch.tensor([0, 1, 2, 3]), torch.tensor([0, -1, 2, 0])):
        with pytest.raises(ValueError, match="sid must lie between 0 and n_scene - 1 = 2, got values from"):
            net(channels(), sid)
    close(net(channels(), scenes().int()), net(channels(), scenes()), 30)


def test_zeros_and_what_is_no_number_stay_in_their_sample():
    net, H = network(), channels()
    H[1] = 0
    H[2, 0, 0] = torch.nan
    U, S, V, Hd = net(H, scenes())
    assert is_node((U, V, Hd))
    assert not S[1].any()
    assert S[2].isnan().all()
    assert S[[0, 3]].isfinite().all()
    assert U[[0, 1, 3]].isfinite().all()


def test_weights_changed_between_forward_and_backward_are_found():
    net = network()
    loss = sum_of(net(channels(), scenes()))
    with torch.no_grad():
        net.v_head.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    U, S, V, Hd = net(channels(), scenes())
    V.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum_of((U, S, V, Hd)).backward()


def test_second_derivatives_are_refused():
    net = network()
    loss = sum_of(net(channels(), scenes()))
    with pytest.raises(RuntimeError, match=r'no second derivatives.*use_backend\("eager"\) has them'):
        torch.autograd.grad(loss, net.pos, create_graph=True)


def test_two_backwards_and_many_at_once():
    net = network(dtype=torch.float64)
    found = net(channels(dtype=torch.float64), scenes())
    loss, parameters = sum_of(found), list(net.parameters())
    first, second = (torch.autograd.grad(loss, parameters, retain_graph=True) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    S = found[1]
    Hd, gate = torch.view_as_real(found[3]), list(net.freq_gate.parameters())
    of_hd = torch.autograd.grad(Hd, gate, torch.stack([Hd, -Hd]), is_grads_batched=True, retain_graph=True)
    once = torch.autograd.grad(Hd, gate, Hd, retain_graph=True)
    close([x[0] for x in of_hd], once, 1e3)
    close([-x[1] for x in of_hd], once, 1e3)
    both = (found[1], Hd)
    many = [torch.stack([x, -x]) for x in both]
    of_both = torch.autograd.grad(both, parameters, many, is_grads_batched=True, retain_graph=True)
    close([-x[1] for x in of_both], torch.autograd.grad(both, parameters, both, retain_graph=True), 1e3)
    many = torch.eye(S.shape[1], dtype=S.dtype)[:, None].expand(-1, *S.shape)
    got = torch.autograd.grad(S, parameters, many, is_grads_batched=True, retain_graph=True)
    for k in range(S.shape[1]):
        want = torch.autograd.grad(S[:, k].sum(), parameters, retain_graph=True)
        close([x[k] for x in got], want, 1e3)


def test_checkpointing_computes_it_again():
    net = network(dtype=torch.float64)
    H = channels(dtype=torch.float64)
    want = gradients(net, H, of_channel=False)
    net.zero_grad()
    sum_of(checkpoint(net, H, scenes(), use_reentrant=False)).backward()
    for p, g in zip(net.parameters(), want[5:], strict=True):
        assert torch.equal(p.grad, g)


@pytest.mark.parametrize("raw", [-1000.0, -30.0, 0.0, 30.0, 1000.0])
def test_sizes_at_the_ends_of_their_range(raw):
    net = network(dtype=torch.float64)
    with torch.no_grad():
        net.ortho_refine.a_raw.fill_(raw)
    H = channels(dtype=torch.float64)
    close(gradients(net, H), gradients(one_by_one(net), H), 3e4)


def test_the_same_bits_for_any_number_of_threads():
    net, H = network(M=33, N=20, r=11), channels(B=40, M=33, N=20)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            found.append(gradients(net, H))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


def test_an_empty_batch():
    net = network()
    found = net(channels(0), scenes(0))
    assert [tuple(x.shape) for x in found] == [(0, 12, 5), (0, 5), (0, 10, 5), (0, 12, 10)]
    sum_of(found).backward()
    assert all(p.grad is None or not p.grad.any() for p in net.parameters())
