"""`accelerate`: a user's own modules of the published classes served by ours, and left alone where they differ."""

import copy
import pickle

import foreign
import pytest
import torch
from torch import nn

import lomacs_fast
from lomacs_fast import accelerate


def network(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {
        "M": 12,
        "N": 10,
        "r": 4,
        "n_scene": 3,
        "dim": 16,
        "depth": 3,
        "groups": 2,
        "k_len": 5,
        "hidden": 6,
    }
    return foreign.LowMACS_SVDNet(**sizes | changes)


def channels(B=5, M=12, N=10, seed=1, dtype=torch.complex64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, M, N, dtype=dtype, generator=generator) / (M * N) ** 0.5, torch.arange(B) % 3


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = network()
        self.loss = foreign.AEPlusLoss()
        self.scale = nn.Linear(2, 2)

    def forward(self, H, sid):
        U, S, V, _ = self.net(H, sid)
        return self.loss(U, S, V, H, 0.4, 0.3, 0.3, 0.2)


def test_a_whole_model_is_served_by_ours():
    model = Model()
    H, sid = channels()
    before, modules = model(H, sid), list(model.modules())
    report = accelerate(model)
    assert set(report.swapped) == {
        "loss",
        "net",
        "net.freq_gate",
        "net.ortho_refine",
        *(f"net.blocks.{i}.1" for i in range(3)),
    }
    assert report.left == {"": "its class is unknown"}
    assert list(model.modules()) == modules
    assert isinstance(model.net, lomacs_fast.LoMACSSVDNet)
    assert isinstance(model.net, foreign.LowMACS_SVDNet)
    assert isinstance(model.loss, lomacs_fast.AEPlusLoss)
    assert model.loss.match == "mean"
    torch.testing.assert_close(model(H, sid), before, rtol=1e-5, atol=0)
    assert str(report).count("swapped") == 7
    assert "left alone (the module itself): Model: its class is unknown" in str(report)


def test_ours_runs_after_a_swap_and_theirs_after_restore(monkeypatch):
    net = network()
    calls = []
    for name in ("LowMACS_SVDNet", "GatedConv1D", "GroupedProjectedAttention", "AxialLowRankFreqGate"):
        kind = getattr(foreign, name)
        forward = kind.forward
        monkeypatch.setattr(
            kind, "forward", lambda *a, name=name, forward=forward: (calls.append(name), forward(*a))[1]
        )
    report = accelerate(net)
    calls.clear()
    net(*channels())
    assert not calls
    report.restore()
    net(*channels())
    assert set(calls) == {
        "LowMACS_SVDNet",
        "GatedConv1D",
        "GroupedProjectedAttention",
        "AxialLowRankFreqGate",
    }
    assert type(net) is foreign.LowMACS_SVDNet


def test_parameters_and_optimisers_stay():
    net, twin = network(), network()
    parameters = list(net.parameters())
    optimizer, other = (torch.optim.SGD(m.parameters(), lr=0.05) for m in (net, twin))
    accelerate(net)
    assert [id(p) for p in net.parameters()] == [id(p) for p in parameters]
    assert list(net.state_dict()) == list(twin.state_dict())
    H, sid = channels()
    loss = lomacs_fast.AEPlusLoss()
    for _ in range(5):
        for m, o in ((net, optimizer), (twin, other)):
            U, S, V, _ = m(H, sid)
            o.zero_grad()
            loss(U, S, V, H, 0.4, 0.3, 0.3, 0.2).backward()
            o.step()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-4, atol=1e-5)


def test_restore_keeps_what_was_learned():
    net = network()
    names = list(net.__dict__)
    buffers = dict(net.named_buffers())
    report = accelerate(net)
    with torch.no_grad():
        net.pos.add_(1)
    net.set_tau_s(0.25)
    net.eval()
    out = net(*channels())
    report.restore()
    assert list(net.__dict__) == names
    assert dict(net.named_buffers()) == buffers
    assert net.tau_s == 0.25
    assert not net.training
    for x, y in zip(net(*channels()), out, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
    assert set(accelerate(net).swapped) == set(report.swapped)


def test_tau_is_taken_over_and_may_be_assigned():
    net = network(tau_s=0.35)
    accelerate(net)
    assert float(net.tau_s) == 0.35
    net.tau_s = 0.5
    assert float(net.tau_s) == 0.5
    with pytest.raises(ValueError, match="tau_s must lie"):
        net.tau_s = 2


def test_hooks_stay_and_do_not_run_in_the_probe():
    net = network()
    seen = []
    net.blocks[1][1].register_forward_hook(lambda *_: seen.append("old"))
    accelerate(net)
    assert not seen
    net.blocks[1][1].register_forward_hook(lambda *_: seen.append("new"))
    net(*channels())
    assert seen == ["old", "new"]


def test_a_probe_leaves_no_trace():
    net = network()
    state = copy.deepcopy(net.state_dict())
    torch.manual_seed(5)
    accelerate(net)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    assert all(torch.equal(x, state[name]) for name, x in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert net.training


class Scaled(foreign.GatedConv1D):
    def forward(self, x):
        return super().forward(x) * 1.0001


class Dropping(foreign.GatedConv1D):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.1, self.training)


class Detached(foreign.GatedConv1D):
    def forward(self, x):
        return super().forward(x.detach() + 0 * x)


class Residual(foreign.GatedConv1D):
    def __init__(self, dim, k=5):
        super().__init__(dim, k)
        self.gain = nn.Parameter(torch.ones(dim))


class Broken(foreign.GatedConv1D):
    def forward(self, x):
        raise RuntimeError("boom")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Scaled, "values differ from ours on a random probe, by 1.0e-04"),
        (Dropping, "values differ"),
        (Detached, "gradients differ"),
        (Residual, "its state differs from the published class's in gain"),
        (Broken, "the probe failed: RuntimeError: boom"),
    ],
)
def test_an_altered_class_is_left_alone_with_what_holds_it(kind, reason):
    net = network()
    altered = type("GatedConv1D", (kind,), {})(16, 3)
    net.blocks[1][1] = altered
    report = accelerate(net)
    assert reason in report.left["blocks.1.1"]
    assert report.left[""] == "its blocks.1.1 is left alone"
    assert type(net.blocks[1][1]) is type(altered)
    assert type(net) is foreign.LowMACS_SVDNet
    assert "blocks.0.1" in report.swapped
    net.train(False)
    if kind is not Broken:
        net(*channels())


def test_a_patched_instance_is_left_alone():
    conv = foreign.GatedConv1D(8, 3)
    conv.forward = lambda x: x
    assert accelerate(conv).left == {"": "its forward is replaced on the instance"}


def test_other_constructor_arguments_are_found():
    gate, refiner = (
        foreign.AxialLowRankFreqGate(6, 5, 4, temperature=0.7),
        foreign.NeuralOrthoRefiner(0.05, 0.2),
    )
    both = nn.ModuleList([gate, refiner])
    report = accelerate(both)
    assert report.swapped == ["0", "1"]
    assert gate.temperature == 0.7
    assert refiner.max_scale == 0.2


def test_a_gate_in_a_network_keeps_its_temperature():
    net = network()
    net.freq_gate.temp = 1.5
    H, sid = channels()
    before = net(H, sid)
    assert "" in accelerate(net).swapped
    torch.testing.assert_close(net(H, sid)[3], before[3], rtol=1e-4, atol=1e-6)


class Block(nn.Module):
    """A block of the user's own class, with the names that a Sequential gives."""

    def __init__(self, norm, mixer):
        super().__init__()
        self.add_module("0", norm)
        self.add_module("1", mixer)

    def forward(self, x):
        return self.get_submodule("1")(self.get_submodule("0")(x))


def test_parts_of_other_classes_are_replaced_and_given_back():
    net = network()
    net.blocks[0] = Block(*net.blocks[0])
    block, parameters = net.blocks[0], list(net.parameters())
    report = accelerate(net)
    assert "" in report.swapped
    assert [id(p) for p in net.parameters()] == [id(p) for p in parameters]
    net(*channels())
    report.restore()
    assert net.blocks[0] is block
    net(*channels())


def test_copies_and_pickles():
    net = network()
    accelerate(net)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert isinstance(other, lomacs_fast.LoMACSSVDNet)
        assert isinstance(other, foreign.LowMACS_SVDNet)
        for x, y in zip(other(*channels()), net(*channels()), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_extra_methods_stay():
    refiner = foreign.NeuralOrthoRefiner()
    accelerate(refiner)
    U = torch.randn(2, 6, 3, dtype=torch.complex64)
    torch.testing.assert_close(refiner.step(U, 0.1), lomacs_fast.functional.ortho_refine(U, 0.1))


def test_ours_are_not_touched_and_the_reference_is_swapped():
    ours = lomacs_fast.LoMACSSVDNet(8, 8, 3, 2, dim=8, groups=2, k_len=4)
    report = accelerate(ours)
    assert not report.swapped
    assert not report.left
    assert str(report) == "nothing to swap"
    report = accelerate(nn.ModuleList([lomacs_fast.freeze(ours), lomacs_fast.SpectralRefiner(3, 2)]))
    assert not report.left
    eager = lomacs_fast.reference.LoMACSSVDNet(8, 8, 3, 2, dim=8, groups=2, k_len=4)
    report = accelerate(eager)
    assert "" in report.swapped
    assert type(eager) is lomacs_fast.LoMACSSVDNet


def test_half_of_a_device_pair_and_double_precision_are_served():
    net = network().double()
    assert "" in accelerate(net).swapped
    net(*channels(dtype=torch.complex128))


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"net must be a torch\.nn\.Module, got int"):
        accelerate(3)
