"""What surrounds a module in PyTorch: processes, autocast, checkpointing, copies, hooks, meta device, counts."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import lomacs_fast
from lomacs_fast import audit, freeze, reference, use_backend
from lomacs_fast.metrics import TrueMacCounter, eager_twin, true_macs
from lomacs_fast.ops.native import reasons as native_reasons
from lomacs_fast.pruning import prune

CONFIG = {"M": 12, "N": 10, "r": 5, "n_scene": 3, "dim": 16, "k_len": 4, "gate_hidden": 6}
WEIGHTS = (0.4, 0.3, 0.3, 0.2)


def network(kind=lomacs_fast, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    net = kind.LoMACSSVDNet(**CONFIG | changes)
    # a cast to float32 would round tau
    return net if dtype == torch.float32 else net.to(dtype)


def channels(B=8, M=12, N=10, dtype=torch.complex64):
    generator = torch.Generator().manual_seed(1)
    H = torch.randn(B, M, N, dtype=torch.complex128, generator=generator)
    return (H / torch.linalg.vector_norm(H, dim=(1, 2), keepdim=True)).to(dtype)


def scenes(B=8):
    return torch.arange(B) % 3


def loss_of(net, H, sid, call=None):
    U, S, V, _ = (call or net)(H, sid)
    return lomacs_fast.AEPlusLoss()(U, S, V, H, *WEIGHTS)


def gradients(net, value):
    return list(torch.autograd.grad(value, list(net.parameters())))


def same(first, second):
    return len(first) == len(second) and all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.fixture
def native():
    if reasons := native_reasons("cpu"):
        pytest.skip(f"no native library: {'; '.join(reasons)}")


RANK = """
import sys, torch, torch.distributed as dist, lomacs_fast
from torch.nn.parallel import DistributedDataParallel
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
data = torch.load(f"{folder}/in.pt", weights_only=True)
torch.manual_seed(rank)
net = lomacs_fast.LoMACSSVDNet(**data["config"]).double()
if rank == 0:
    net.load_state_dict(data["state"])
net = DistributedDataParallel(net)
H, sid = (data[name].chunk(2)[rank] for name in ("H", "sid"))
for _ in range(2):
    net.zero_grad()
    U, S, V, _ = net(H, sid)
    lomacs_fast.AEPlusLoss()(U, S, V, H, *data["weights"]).backward()
torch.save({name: p.grad for name, p in net.module.named_parameters()}, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


def test_two_processes_have_the_gradients_of_one_with_the_double_batch(tmp_path):
    net, H, sid = network(dtype=torch.float64), channels(dtype=torch.complex128), scenes()
    data = {"config": net.config, "state": net.state_dict(), "H": H, "sid": sid, "weights": WEIGHTS}
    torch.save(data, tmp_path / "in.pt")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            _, error = rank.communicate(timeout=120)
            assert rank.returncode == 0, error
    finally:
        for rank in ranks:
            rank.kill()
    loss_of(net, H, sid).backward()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, p in net.named_parameters():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], p.grad, rtol=1e-9, atol=1e-12)


class TestAutocast:
    def cosine(self, x, y):
        x, y = (torch.cat([g.double().flatten() for g in grads]) for grads in (x, y))
        return float(x @ y / x.norm() / y.norm())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_gradients_stay_in_single_precision_and_near(self, dtype):
        net, H = network(M=32, N=32, r=8, dim=32, k_len=16), channels(M=32, N=32)
        exact = gradients(net, loss_of(net, H, scenes()))
        with torch.autocast("cpu", dtype):
            value = loss_of(net, H, scenes())
        cast = gradients(net, value)
        assert value.dtype == torch.float32
        assert all(g.dtype == torch.float32 for g in cast)
        assert 0.999 < self.cosine(cast, exact) < 1 - 1e-9
        # as near as the reference under the same autocast
        twin = eager_twin(net).train()
        with torch.autocast("cpu", dtype):
            value = loss_of(twin, H, scenes())
        eager = self.cosine(gradients(twin, value), exact)
        assert 1 - self.cosine(cast, exact) <= 4 * (1 - eager)

    def test_a_frozen_network_takes_no_part(self):
        frozen, H = freeze(network()), channels()
        exact = frozen(H, scenes())
        with torch.autocast("cpu", torch.bfloat16):
            assert same(frozen(H, scenes()), exact)

    def test_nothing_changes_in_double_precision(self):
        net, H = network(dtype=torch.float64), channels(dtype=torch.complex128)
        exact = net(H, scenes())
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            assert same(net(H, scenes()), exact)


class TestCheckpointing:
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_of_the_network(self, reentrant):
        net, H, sid = network(), channels(), scenes()
        plain, again = H.clone().requires_grad_(), H.clone().requires_grad_()
        want = loss_of(net, plain, sid)
        got = loss_of(net, again, sid, lambda *args: checkpoint(net, *args, use_reentrant=reentrant))
        assert torch.equal(got, want)
        # a reentrant one accumulates and knows no torch.autograd.grad
        want.backward()
        expected = [p.grad.clone() for p in net.parameters()]
        net.zero_grad()
        got.backward()
        assert same([p.grad for p in net.parameters()], expected)
        assert torch.equal(again.grad, plain.grad)

    def test_of_a_network_whose_input_has_no_gradient(self):
        net, H, sid = network(), channels(), scenes()
        want = gradients(net, loss_of(net, H, sid))
        value = loss_of(net, H, sid, lambda *args: checkpoint(net, *args, use_reentrant=False))
        assert same(gradients(net, value), want)

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("stem", ["gate", "attention", "conv", "refiner", "loss"])
    def test_of_a_stem(self, stem, reentrant):
        net, generator = network(), torch.Generator().manual_seed(2)

        def normal(*shape, dtype=torch.complex64):
            return torch.randn(shape, dtype=dtype, generator=generator).requires_grad_()

        tokens = normal(3, 12, 16, dtype=torch.float32)
        U, V, H = normal(3, 12, 5), normal(3, 10, 5), normal(3, 12, 10)
        loss = lomacs_fast.AEPlusLoss()
        call, inputs = {
            "gate": (net.freq_gate.filter, (H,)),
            "attention": (lambda x: net.blocks[0][1].residual(x, net.blocks[0][0]), (tokens,)),
            "conv": (lambda x: net.blocks[1][1].residual(x, net.blocks[1][0]), (tokens,)),
            "refiner": (net.ortho_refine, (U, V)),
            "loss": (lambda U, S, V, H: loss(U, S, V, H, *WEIGHTS), (U, normal(3, 5, dtype=torch.float32), V, H)),
        }[stem]  # fmt: skip

        def results(output):
            outputs = [output] if isinstance(output, torch.Tensor) else output
            torch.autograd.backward(outputs, [x.detach() for x in outputs])
            found = [x.grad for x in (*inputs, *net.parameters()) if x.grad is not None]
            for x in (*inputs, *net.parameters()):
                x.grad = None
            return [*(x.detach() for x in outputs), *found]

        want = results(call(*inputs))
        assert len(want) > 1
        assert same(results(checkpoint(call, *inputs, use_reentrant=reentrant)), want)


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.loss = network(), lomacs_fast.AEPlusLoss("mean")

    def forward(self, H, sid):
        U, S, V, _ = self.net(H, sid)
        return self.loss(U, S, V, H, *WEIGHTS)


def saved(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), saved])
class TestCopies:
    def test_of_a_trained_network_and_its_loss(self, way):
        outer, H, sid = Outer(), channels(), scenes()
        outer(H, sid).backward()
        other = way(outer)
        assert type(other.net) is lomacs_fast.LoMACSSVDNet
        assert torch.equal(other(H, sid), outer(H, sid))
        assert other.loss.match == "mean"
        other.net.set_tau_s(0.2)
        assert float(outer.net.tau_s) == 0.9
        with torch.no_grad():
            for p in other.parameters():
                p.zero_()
        assert all(p.any() for name, p in outer.named_parameters() if name.endswith("weight"))

    def test_of_a_frozen_network(self, way):
        frozen, H = freeze(network()), channels()
        want = frozen(H, 1)
        other = way(frozen)
        # what it remembers goes by the identities of the original's buffers
        assert other._last is None
        assert same(other(H, 1), want)
        other.table.zero_()
        assert not same(other(H, 1), want)
        assert same(frozen(H, 1), want)
        assert same(way(frozen.double())(H.to(torch.complex128), 1), frozen(H.to(torch.complex128), 1))

    def test_of_every_module(self, way):
        modules = [
            lomacs_fast.AxialLowRankFreqGate(6, 5, 4),
            lomacs_fast.GroupedProjectedAttention(8, 4, 2, 6, 3),
            lomacs_fast.GatedConv1D(8, 3),
            lomacs_fast.NeuralOrthoRefiner(steps=2),
            lomacs_fast.SpectralRefiner(3, 2),
        ]
        for module in modules:
            other = way(module)
            assert type(other) is type(module)
            assert repr(other) == repr(module)
            state = module.state_dict()
            assert list(other.state_dict()) == list(state)
            assert same(list(other.state_dict().values()), list(state.values()))


def test_hooks_of_the_state_are_called():
    net, other, seen = network(), network(), []
    net.register_state_dict_pre_hook(lambda module, prefix, keep: seen.append(("pre", prefix)))
    net.blocks[0][1].register_state_dict_post_hook(
        lambda module, state, prefix, local: state.update({f"{prefix}extra": torch.ones(1)})
    )

    def without_extra(module, state, prefix, *_):
        seen.append(("load", prefix))
        state.pop(f"{prefix}extra")

    other.blocks[0][1].register_load_state_dict_pre_hook(without_extra)
    other.register_load_state_dict_post_hook(lambda module, keys: seen.append(("loaded", keys.missing_keys)))
    outer, wrapped = nn.ModuleDict({"a": net}), nn.ModuleDict({"a": other})
    with torch.no_grad():
        net.pos.fill_(3.0)
    state = outer.state_dict()
    assert "a.blocks.0.1.extra" in state
    assert not any("tau" in name for name in state)
    wrapped.load_state_dict(state)
    assert seen == [("pre", "a."), ("load", "a.blocks.0.1."), ("loaded", [])]
    assert (other.pos == 3).all()


@pytest.mark.parametrize(
    "names",
    [
        ["freq_gate"],
        ["input_proj"],
        ["blocks.0", "blocks.1"],
        ["blocks.0.0", "blocks.0.1", "blocks.1.0", "blocks.1.1"],
        ["norm", "u_head", "v_head", "s_head", "ortho_refine"],
    ],
    ids=str,
)
def test_hooks_of_parts_are_called(names):
    net, seen, H = network(dtype=torch.float64), [], channels(dtype=torch.complex128)
    want = net(H, scenes())
    for name in names:
        net.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    got = net(H, scenes())
    assert sorted(seen) == sorted(names)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


def test_what_a_hook_returns_counts():
    net, H = network(), channels()
    net.input_proj.register_forward_hook(lambda module, args, out: out + 1)
    other = network()
    with torch.no_grad():
        other.pos += 1
    for x, y in zip(net(H, scenes()), other(H, scenes()), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)


class TestMeta:
    @pytest.mark.parametrize("kind", [lomacs_fast, reference], ids=["lomacs_fast", "reference"])
    def test_a_network_is_filled_from_a_state_dict(self, kind):
        net, H, sid = network(kind, tau_s=0.4), channels(), scenes()
        with torch.device("meta"):
            empty = nn.Sequential(kind.LoMACSSVDNet(**CONFIG, tau_s=0.4))
        assert all(x.is_meta for x in (*empty.parameters(), *empty.buffers()))
        assert empty[0].config == net.config
        empty.to_empty(device="cpu")
        empty[0].load_state_dict(net.state_dict())
        assert same(empty[0](H, sid), net(H, sid))
        assert empty[0].tau_s.dtype == torch.float64

    def test_a_schedule_on_the_meta_device_is_kept(self):
        with torch.device("meta"):
            net = lomacs_fast.LoMACSSVDNet(**CONFIG)
        net.set_tau_s(0.25)
        assert float(net.to_empty(device="cpu").tau_s) == 0.25

    def test_by_assignment(self):
        net, H = network(), channels()
        with torch.device("meta"):
            empty = lomacs_fast.LoMACSSVDNet(**CONFIG)
        empty.load_state_dict(net.state_dict(), assign=True)
        empty.tau_s = torch.tensor(0.9, dtype=torch.float64)
        assert same(empty(H, 1), net(H, 1))

    def test_a_frozen_network(self):
        frozen, H = freeze(network()), channels()
        with torch.device("meta"):
            empty = freeze(lomacs_fast.LoMACSSVDNet(**CONFIG))
        assert all(x.is_meta for x in empty.buffers())
        empty.to_empty(device="cpu")
        empty.load_state_dict(frozen.state_dict())
        assert same(empty(H, scenes()), frozen(H, scenes()))

    def test_every_stem(self):
        def stems():
            return nn.ModuleList(
                [
                    lomacs_fast.AxialLowRankFreqGate(6, 5, 4),
                    lomacs_fast.GroupedProjectedAttention(8, 4, 2, 6, 3),
                    lomacs_fast.GatedConv1D(8, 3),
                    lomacs_fast.NeuralOrthoRefiner(steps=2),
                    lomacs_fast.SpectralRefiner(3, 2),
                    lomacs_fast.AEPlusLoss(),
                ]
            )

        real = stems()
        with torch.device("meta"):
            empty = stems()
        empty.to_empty(device="cpu").load_state_dict(real.state_dict())
        for x, y in zip(real.modules(), empty.modules(), strict=True):
            assert repr(x) == repr(y)
            assert same(
                [*x.parameters(recurse=False), *x.buffers(recurse=False)],
                [*y.parameters(recurse=False), *y.buffers(recurse=False)],
            )


class TestCounts:
    """The contest counts on the reference; the fast network has to report the same, and its own beside it."""

    def flops(self, net, H, backward):
        with FlopCounterMode(display=False) as counter:
            value = loss_of(net, H, scenes()) if backward else net(H, scenes())[1].sum()
            if backward:
                value.backward()
        return counter.get_total_flops()

    @pytest.mark.usefixtures("native")
    @pytest.mark.parametrize("of_input", [False, True])
    @pytest.mark.parametrize("changes", [{}, {"depth": 0}, {"depth": 3, "k_len": [3, 7]}], ids=str)
    def test_the_formulas_give_the_count_of_the_eager_twin(self, changes, of_input):
        net = network(**changes)
        twin = eager_twin(net).train()
        H = channels().requires_grad_(of_input)
        for backward in (False, True):
            # the loss is counted on the reference too
            with use_backend("eager"):
                want = self.flops(twin, H, backward)
            assert self.flops(net, H, backward) == want > 0

    @pytest.mark.usefixtures("native")
    def test_a_pruned_network_counts_less_as_its_twin_does(self):
        net, H = network(), channels()
        pruned, _ = prune(net, k_len=2, gate_hidden=2)
        for backward in (False, True):
            assert self.flops(pruned, H, backward) == self.flops(eager_twin(pruned).train(), H, backward)
            assert self.flops(pruned, H, backward) < self.flops(net, H, backward)

    @pytest.mark.usefixtures("native")
    @pytest.mark.parametrize("changes", [{}, {"M": 9, "N": 7}, {"depth": 0}, {"depth": 3, "kernel_size": 5}], ids=str)  # fmt: skip
    def test_a_frozen_network_counts_as_its_reference(self, changes):
        net = network(**changes)
        frozen, H = freeze(net), channels(M=net.M, N=net.N)
        counted = {}
        for backend in ("eager", "cpp"):
            with use_backend(backend), FlopCounterMode(display=False) as counter:
                frozen(H, 1)
            counted[backend] = counter.get_total_flops()
        assert counted["eager"] == counted["cpp"] > 0

    @pytest.mark.usefixtures("native")
    @pytest.mark.parametrize("changes", [{}, {"M": 64, "N": 64, "r": 32, "dim": 64, "k_len": 32}], ids=str)
    def test_the_true_count_is_there_for_eager_fast_and_frozen(self, changes):
        net = network(**changes)
        H = channels(2, net.M, net.N)
        counts = {}
        for name, module in (("eager", eager_twin(net)), ("fast", net), ("frozen", freeze(net))):
            with TrueMacCounter() as counter, torch.no_grad():
                module(H, 1)
            assert not counter.uncounted, name
            counts[name] = counter.macs / 2
            with torch.no_grad():
                assert true_macs(module, H, 1) == counts[name]
        # what exact algebra saves, and what folding saves on top; the norm of the channel is the frozen one's
        assert counts["fast"] < counts["eager"]
        assert abs(counts["frozen"] - counts["fast"]) < 0.02 * counts["fast"] + 3 * net.M * net.N

    @pytest.mark.usefixtures("native")
    def test_the_true_count_of_a_step_is_whole(self):
        H = channels()
        for net in (network(), eager_twin(network()).train()):
            with TrueMacCounter() as counter:
                loss_of(net, H, scenes()).backward()
            assert not counter.uncounted
            assert counter.macs > 0


@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_an_audit_of_a_frozen_network(backend):
    if backend == "cpp" and native_reasons("cpu"):
        pytest.skip("no native library")
    with use_backend(backend):
        found = audit(freeze(network()))
        assert not found.forbidden
        assert found.verdict.endswith("no decomposition, inversion or QR is among them")
        names = {operator.name for operator in found.operators}
        assert ("lomacs::frozen_svd" in names) == (backend == "cpp")
        assert not audit(freeze(network(dtype=torch.float64))).forbidden
