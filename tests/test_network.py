"""The network: agreement with the published implementation, precision, initial values, clear refusals."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import foreign
import numpy as np
import pytest
import torch

import lomacs_fast
from lomacs_fast import reference
from lomacs_fast.ops.native import reasons as native_reasons

PARITY = Path(__file__).parent / "data" / "parity_small.npz"
CONFIG = ["M", "N", "r", "n_scene", "dim", "depth", "groups", "kernel_size", "temperature", "k_len"]
NAMESPACES = [reference, lomacs_fast]


def small(namespace=lomacs_fast, **kwargs):
    torch.manual_seed(0)
    config = {"M": 12, "N": 10, "r": 5, "n_scene": 3, "dim": 16, "k_len": 4, "gate_hidden": 6} | kwargs
    return namespace.LoMACSSVDNet(**config)


def channels(n, M=12, N=10, dtype=torch.complex64):
    return torch.randn(n, M, N, dtype=dtype, generator=torch.Generator().manual_seed(1))


def relative(x, y):
    return (torch.linalg.vector_norm(x - y) / torch.linalg.vector_norm(y)).item()


@pytest.fixture(scope="module")
def published():
    archive = np.load(PARITY)
    arrays = {
        key: torch.from_numpy(archive[key]) for key in archive.files if archive[key].dtype.kind in "fci"
    }
    return json.loads(str(archive["config"])), arrays


@pytest.fixture(params=NAMESPACES, ids=["reference", "lomacs_fast"])
def namespace(request):
    return request.param


class TestPublished:
    """Weights, inputs, outputs and gradients of the published implementation."""

    def run(self, namespace, published, dtype):
        config, data = published
        net = namespace.LoMACSSVDNet(
            **{k: config[k] for k in CONFIG}, tau_s=config["tau_s"], gate_hidden=config["gate_hidden"]
        ).to(dtype)
        state = {k.removeprefix("param/"): v.to(dtype) for k, v in data.items() if k.startswith("param/")}
        net.load_state_dict(state, strict=True)
        complex_dtype = torch.promote_types(dtype, torch.complex32)
        H = data["in/H"].to(complex_dtype, copy=True).requires_grad_()
        out = net(H, data["in/sid"])
        weights = config["loss"]
        loss = namespace.AEPlusLoss(match="mean")(
            *out[:3],
            data["in/label"].to(complex_dtype),
            weights["wE"],
            weights["wD"],
            weights["wS"],
            weights["lam"],
        )
        loss.backward()
        return net, H, out, loss

    @pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
    def test_agrees(self, namespace, published, dtype, bound):
        net, H, out, loss = self.run(namespace, published, dtype)
        data = published[1]
        for name, value in zip(("U", "S", "V", "Hd"), out, strict=True):
            assert relative(value, data[f"out/{name}"]) < bound, name
        assert loss.item() == pytest.approx(data["out/loss"].item(), rel=bound)
        gradients = {f"grad/{name}": p.grad for name, p in net.named_parameters()} | {"grad/H": H.grad}
        assert gradients.keys() == {k for k in data if k.startswith("grad/")}
        for name, grad in gradients.items():
            assert relative(grad, data[name]) < bound, name

    def test_ae(self, namespace, published):
        _, _, (U, S, V, _), _ = self.run(namespace, published, torch.float64)
        label = published[1]["in/label"]
        eye = torch.eye(U.shape[-1])
        norm = torch.linalg.matrix_norm
        ae = (
            norm(label - U * S[:, None] @ V.mH) / (norm(label) + 1e-8)
            + norm(U.mH @ U - eye)
            + norm(V.mH @ V - eye)
        )
        assert ae.mean().item() == pytest.approx(published[1]["out/ae"].item(), rel=1e-10)


def test_top_level_classes_are_the_reference_with_other_primitives():
    for name in (
        "LoMACSSVDNet",
        "AxialLowRankFreqGate",
        "GatedConv1D",
        "GroupedProjectedAttention",
        "NeuralOrthoRefiner",
        "AEPlusLoss",
    ):
        fast, slow = getattr(lomacs_fast, name), getattr(reference, name)
        assert issubclass(fast, slow)
        assert "__init__" not in vars(fast)
        assert fast.functions is lomacs_fast.functional
    assert lomacs_fast.LowMACS_SVDNet is lomacs_fast.LoMACSSVDNet
    net = small()
    assert all(type(m).__module__.startswith(("lomacs_fast.nn", "torch")) for m in net.modules())
    net = small(reference)
    assert all(type(m).__module__.startswith(("lomacs_fast.reference", "torch")) for m in net.modules())


def test_output_shapes_and_order():
    net, H = small(), channels(7)
    U, S, V, Hd = net(H, torch.tensor([0, 1, 2, 0, 1, 2, 0]))
    assert U.shape == (7, 12, 5)
    assert S.shape == (7, 5)
    assert V.shape == (7, 10, 5)
    assert Hd.shape == H.shape
    net.set_tau_s(0.0)
    S = net(H, 1)[1]
    assert (S.diff(dim=-1) <= 0).all()


def test_real_input_equals_complex_input():
    net, H = small(), channels(3)
    for x, y in zip(net(H, 1), net(torch.view_as_real(H), torch.ones(3, dtype=torch.long)), strict=True):
        assert torch.equal(x, y)


def test_conjugated_and_strided_inputs_equal_their_copies():
    net = small()
    for view in (channels(3).conj(), channels(3, 10, 12).mH, channels(3, 10, 12).mT, channels(6)[::2]):
        copied = torch.empty_like(view, memory_format=torch.contiguous_format).copy_(view)
        for x, y in zip(net(view, 0), net(copied, 0), strict=True):
            torch.testing.assert_close(x, y)


def test_empty_batch():
    U, S, _, _ = small()(channels(0), torch.zeros(0, dtype=torch.long))
    assert U.shape == (0, 12, 5)
    assert S.shape == (0, 5)


@pytest.mark.parametrize("size", [(2, 2, 1), (3, 2, 2), (7, 9, 3), (63, 41, 11)])
def test_small_and_odd_sizes(size):
    M, N, r = size
    U, S, V, _ = small(M=M, N=N, r=r)(channels(4, M, N), 0)
    assert all(torch.view_as_real(x).isfinite().all() for x in (U, V))
    assert S.isfinite().all()


def test_a_channel_whose_first_number_is_zero_keeps_its_spectrum():
    net, H, sid = small(), channels(3), torch.zeros(3, dtype=torch.long)
    H[0, 0, 0] = 0
    with torch.no_grad():
        want = net(H, sid)[1]
        H[1] = 0
        S = net(H, sid)[1]
    assert (want > 0).all()
    assert torch.equal(S[[0, 2]], want[[0, 2]])
    assert not S[1].any()


def test_zero_channel_has_zero_spectrum_and_finite_gradients():
    net, H = small(), channels(4)
    H[1] = 0
    H.requires_grad_()
    U, S, V, Hd = net(H, 0)
    assert (S[1] == 0).all()
    assert (S[0] > 0).all()
    (S.sum() + U.abs().sum() + V.abs().sum() + Hd.abs().sum()).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
    assert torch.view_as_real(H.grad).isfinite().all()


def test_initial_values():
    net = small(M=64, N=48, r=16, dim=64, k_len=32, groups=4, depth=2)
    assert all(
        (b == 0).all() for name, b in net.named_parameters() if name.endswith("bias") and "s_head" not in name
    )
    assert (net.s_head[0].bias == -5).all()
    assert (net.pos == 0).all()
    assert net.u_head.weight.abs().max() <= (6 / (64 + 2 * 64 * 16)) ** 0.5
    attention, conv = net.blocks[0][1], net.blocks[1][1]
    assert attention.Pk[0].std().item() == pytest.approx(64**-0.5, rel=0.1)
    assert conv.dw.weight.abs().max() <= 3**-0.5  # fan_in = 3 taps
    assert conv.pw.weight.abs().max() <= 64**-0.5
    a, b = net.ortho_refine.steps
    assert a.item() == pytest.approx(0.1)
    assert b.item() == pytest.approx(0.1)
    assert net.scene_emb.weight.std().item() == pytest.approx(1, rel=0.3)


def test_config_rebuilds_the_architecture():
    net = small(depth=3, k_len=[4, 7], tau_s=0.7)
    twin = type(net)(**net.config)
    twin.load_state_dict(net.state_dict(), strict=True)
    assert twin.config == net.config
    H = channels(2)
    assert torch.equal(twin(H, 0)[1], net(H, 0)[1])
    assert "tau_s" not in net.state_dict()


def test_tau_is_exact_in_double_precision():
    net = small(tau_s=0.8).double()
    assert net.tau_s.item() == 0.8


def test_deepcopy_and_repr():
    net = small()
    assert torch.equal(copy.deepcopy(net)(channels(2), 0)[0], net(channels(2), 0)[0])
    assert "k_len=4" in repr(net)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"M": 1}, "M must be at least 2"),
        ({"N": 1}, "N must be at least 2"),
        ({"r": 11}, "r must lie between 1 and min(M, N) = 10, got 11"),
        ({"r": 0}, "r must lie"),
        ({"n_scene": 0}, "n_scene"),
        ({"dim": 18}, "dim must be a positive multiple of groups=4, got 18"),
        ({"kernel_size": 4}, "odd"),
        ({"k_len": 0}, "k_len must be at least 1"),
        ({"k_len": [1, 2]}, "k_len"),
        ({"gate_hidden": 0}, "gate_hidden must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature"),
        ({"tau_s": 1.5}, "tau_s must lie in [0, 1], got 1.5"),
        ({"tau_s": float("nan")}, "tau_s must lie in [0, 1], got nan"),
        ({"temperature": float("inf")}, "temperature must be positive and finite, got inf"),
        ({"temperature": float("nan")}, "temperature must be positive and finite, got nan"),
        ({"dim": -4}, "dim must be a positive multiple of groups=4, got -4"),
        ({"dim": -4, "depth": 0}, "dim must be a positive multiple of groups=4, got -4"),
        ({"groups": 0}, "groups must be at least 1, got 0"),
        ({"groups": 0, "depth": 0}, "groups must be at least 1, got 0"),
        ({"kernel_size": 4, "depth": 1}, "kernel_size must be odd and positive, got 4"),
        ({"depth": -1}, "depth must be at least 0, got -1"),
        ({"k_len": [0]}, "k_len[0] must be at least 1, got 0"),
    ],
)
def test_refused_constructor_arguments(namespace, kwargs, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        small(namespace, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"M": 12.0}, "M must be an integer, got float 12.0"),
        ({"N": True}, "N must be an integer, got bool True"),
        ({"r": 2.0}, "r must be an integer, got float 2.0"),
        ({"n_scene": "3"}, "n_scene must be an integer, got str '3'"),
        ({"dim": None}, "dim must be an integer, got NoneType"),
        ({"depth": 2.5}, "depth must be an integer, got float 2.5"),
        ({"groups": 4.0}, "groups must be an integer, got float 4.0"),
        ({"kernel_size": 3.0}, "kernel_size must be an integer, got float 3.0"),
        ({"k_len": 2.5}, "k_len must be an integer, got float 2.5"),
        ({"k_len": [2.5]}, "k_len[0] must be an integer, got float 2.5"),
        ({"k_len": True}, "k_len must be an integer, got bool True"),
        ({"k_len": "4"}, "k_len must be an integer, got str '4'"),
        ({"gate_hidden": 6.0}, "gate_hidden must be an integer, got float 6.0"),
        ({"temperature": "0.2"}, "temperature must be a real number, got str '0.2'"),
        ({"temperature": True}, "temperature must be a real number, got bool True"),
        ({"tau_s": None}, "tau_s must be a real number, got NoneType"),
        ({"tau_s": 1j}, "tau_s must be a real number, got complex 1j"),
    ],
)
def test_refused_types_of_constructor_arguments(namespace, kwargs, words):
    with pytest.raises(TypeError, match=f"^{re.escape(words)}$"):
        small(namespace, **kwargs)


def test_modules_refuse_types(namespace):
    for name, kwargs, words in [
        ("AxialLowRankFreqGate", {"M": 6.0, "N": 5}, "M must be an integer, got float 6.0"),
        ("AxialLowRankFreqGate", {"M": 6, "N": 5, "hidden": True}, "hidden must be an integer"),
        ("AxialLowRankFreqGate", {"M": 6, "N": 5, "temperature": "x"}, "temperature must be a real number"),
        ("GatedConv1D", {"dim": 4.0}, "dim must be an integer"),
        ("GatedConv1D", {"dim": 4, "k": 3.0}, "k must be an integer"),
        ("NeuralOrthoRefiner", {"init_scale": "0.1"}, "init_scale must be a real number, got str '0.1'"),
        ("NeuralOrthoRefiner", {"max_scale": None}, "max_scale must be a real number, got NoneType"),
    ]:
        with pytest.raises(TypeError, match=re.escape(words)):
            getattr(namespace, name)(**kwargs)
    sizes = {"dim": 6, "att_dim": 4, "groups": 2, "seq_len": 5, "k_len": 7}
    for name in sizes:
        with pytest.raises(TypeError, match=f"^{name} must be an integer, got float 2.0$"):
            namespace.GroupedProjectedAttention(**sizes | {name: 2.0})
    with pytest.raises(ValueError, match="M must be at least 1, got 0"):
        namespace.AxialLowRankFreqGate(0, 5)


def test_numbers_of_other_libraries_are_numbers(namespace):
    net = small(
        namespace, M=np.int64(12), k_len=[np.int32(4)], temperature=np.float32(0.5), tau_s=np.float64(0.75)
    )
    assert json.loads(json.dumps(net.config)) == net.config
    assert [type(net.config[name]) for name in ("M", "k_len", "temperature")] == [int, int, float]
    H = channels(2)
    for one in (np.int64(1), np.array(1), np.uint8(1)):
        assert torch.equal(net(H, one)[1], net(H, 1)[1])


def test_refused_inputs():
    net = small()
    for H, sid, error, words in [
        (channels(2, 10, 12), 0, ValueError, "H must have shape (B, 12, 10), got (2, 10, 12)"),
        (channels(2).real, 0, ValueError, "H must be complex"),
        (channels(2).to(torch.complex128), 0, TypeError, "H must be torch.complex64"),
        (channels(2), 3, ValueError, "sid must lie between 0 and n_scene - 1 = 2, got 3"),
        (channels(2), torch.tensor([0, 9]), ValueError, "got values from 0 to 9"),
        (channels(2), torch.tensor([0]), ValueError, "sid must have shape (2,)"),
        (channels(2), torch.tensor([0.0, 1.0]), TypeError, "sid must be an integer tensor"),
        (
            channels(2).numpy(),
            0,
            TypeError,
            "H must be a tensor, complex (B, 12, 10) or real (B, 12, 10, 2), got ndarray",
        ),
        (channels(2).tolist(), 0, TypeError, "got list"),
        (channels(2), [0, 1], TypeError, "sid must be an integer or an integer tensor (B,), got list"),
        (
            channels(2),
            np.array([0, 1]),
            TypeError,
            "sid must be an integer or an integer tensor (B,), got ndarray",
        ),
        (channels(2), 1.0, TypeError, "sid must be an integer or an integer tensor (B,), got float"),
        (channels(2), True, TypeError, "sid must be an integer or an integer tensor (B,), got bool"),
        (channels(2), None, TypeError, "sid must be an integer or an integer tensor (B,), got NoneType"),
        (channels(2), np.int64(3), ValueError, "sid must lie between 0 and n_scene - 1 = 2, got 3"),
    ]:
        with pytest.raises(error, match=re.escape(words)):
            net(H, sid)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head", ["pooled", "angular"])
def test_parameters_of_half_precision_are_refused_whatever_the_channels(dtype, head, namespace):
    options = {"N": 12, "head": head, "refine_steps": 1} if head == "angular" else {}
    net = small(namespace, **options).to(dtype)
    words = f"the parameters must be float32 or float64 .*, got {dtype}"
    for of in (torch.complex32, torch.complex64):
        with pytest.raises(TypeError, match=words):
            net(torch.zeros(2, net.M, net.N, dtype=of), 0)
    if namespace is lomacs_fast:
        with pytest.raises(TypeError, match=f"the weights must be float32 or float64, got {dtype}"):
            lomacs_fast.freeze(net.float()).to(dtype)(torch.zeros(2, net.M, net.N, dtype=torch.complex64))


class TwiceNorm(torch.nn.LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


class TwiceAttention(lomacs_fast.nn.GroupedProjectedAttention):
    def forward(self, x):
        return 2 * super().forward(x)


class TwiceConv(lomacs_fast.nn.GatedConv1D):
    def forward(self, x):
        return 2 * super().forward(x)


class TwiceRefiner(lomacs_fast.nn.NeuralOrthoRefiner):
    def forward(self, U, V):
        U, V = super().forward(U, V)
        return 2 * U, V


class TwiceGate(lomacs_fast.nn.AxialLowRankFreqGate):
    def forward(self, Hf):
        return 2 * super().forward(Hf)


class TwiceLinear(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Wrapped(torch.nn.Sequential):
    def forward(self, x):
        return 2 * super().forward(x)


def twice(module):
    forward = module.forward
    module.forward = lambda *args: 2 * forward(*args)


def changed_blocks(net, change):
    block = net.blocks[0]
    if change == "no affine":
        block[0] = torch.nn.LayerNorm(16, elementwise_affine=False)
    elif change == "norm over tokens too":
        block[0] = torch.nn.LayerNorm((12, 16))
    elif change == "norm derived":
        block[0] = TwiceNorm(16)
    elif change == "attention derived":
        block[1] = TwiceAttention(16, 5, 4, 12, 4)
    elif change == "convolution derived":
        net.blocks[1][1] = TwiceConv(16, 3)
    elif change == "a third module":
        block.append(torch.nn.Linear(16, 16))
    elif change == "a wrapper":
        net.blocks[0] = Wrapped(*block)
    elif change == "forward of a block":
        twice(block)
    elif change == "forward of a mixer":
        twice(block[1])
    elif change == "one linear map":
        net.blocks[0] = torch.nn.Linear(16, 16)
    elif change == "last norm":
        net.norm = torch.nn.Identity()


CHANGES = [
    "none",
    "no affine",
    "norm over tokens too",
    "norm derived",
    "attention derived",
    "convolution derived",
    "a third module",
    "a wrapper",
    "forward of a block",
    "forward of a mixer",
    "one linear map",
    "last norm",
]


@pytest.mark.parametrize("launches", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_blocks_that_a_user_changed_are_called(change, launches, namespace, monkeypatch):
    monkeypatch.setattr(reference.network, "_launches", lambda x: launches)
    net, x = small(namespace), torch.randn(3, 12, 16, generator=torch.Generator().manual_seed(2))
    changed_blocks(net, change)
    with torch.no_grad():
        want = x
        for block in net.blocks:
            want = want + block(want)
        torch.testing.assert_close(net._backbone(x), net.norm(want.mean(1)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "kind"), [("freq_gate", TwiceGate), ("input_proj", TwiceLinear)])
def test_a_derived_front_is_called(name, kind):
    net, H = small(), channels(3)
    x, Hd = net._front(H)
    getattr(net, name).__class__ = kind
    changed = net._front(H)
    if name == "freq_gate":
        torch.testing.assert_close(changed[1], 2 * Hd)
    else:
        torch.testing.assert_close(changed[0], 2 * x - net.pos)


@pytest.mark.parametrize("kind", ["no bias", "sequential"])
def test_another_input_projection_is_called(kind):
    net, H = small(), channels(3)
    weight, bias = net.input_proj.weight, net.input_proj.bias
    want, _ = net._front(H)
    if kind == "no bias":
        net.input_proj = torch.nn.Linear(40, 16, bias=False)
        net.input_proj.weight = weight
    else:
        linear, net.input_proj = net.input_proj, torch.nn.Sequential()
        net.input_proj.append(linear)
    torch.testing.assert_close(net._front(H)[0] + (bias if kind == "no bias" else 0), want)


def test_a_derived_refiner_is_called():
    net, H = small(), channels(3)
    want = net(H, 0)[0]
    net.ortho_refine.__class__ = TwiceRefiner
    torch.testing.assert_close(net(H, 0)[0], 2 * want)


def test_hooks_of_all_modules_see_every_part():
    net, seen = small(), []
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        net(channels(2), 0)
    finally:
        hook.remove()
    parts = ["freq_gate", "input_proj", "blocks.0", "blocks.0.0", "blocks.0.1", "blocks.1.1", "ortho_refine"]
    assert all(net.get_submodule(name) in seen for name in parts)


def test_autocast_keeps_the_complex_part_in_single_precision():
    net, H = small(M=32, N=32, r=8, dim=32, k_len=16), channels(8, 32, 32)
    exact = net(H, 0)
    with torch.autocast("cpu", torch.bfloat16):
        cast = net(H, 0)
        assert torch.nn.functional.linear(torch.ones(1, 2), torch.ones(1, 2)).dtype == torch.bfloat16
    assert [x.dtype for x in cast] == [torch.complex64, torch.float32, torch.complex64, torch.complex64]
    assert torch.equal(cast[3], exact[3])
    assert 0 < relative(cast[0].abs(), exact[0].abs()) < 0.3


def test_shapes_on_the_meta_device():
    with torch.device("meta"):
        net = small()
        out = net(torch.empty(3, 12, 10, dtype=torch.complex64), torch.zeros(3, dtype=torch.long))
    assert [tuple(x.shape) for x in out] == [(3, 12, 5), (3, 5), (3, 10, 5), (3, 12, 10)]


def test_compiled_forward_in_one_graph():
    net, H = small(), channels(2)
    sid = torch.tensor([0, 2])
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for scenes in (sid, 0, 2, 1):
        for x, y in zip(compiled(H, scenes), net(H, scenes), strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.gpu
class TestOnADevice:
    @pytest.fixture(autouse=True)
    def device(self, monkeypatch):
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        monkeypatch.setenv("LOMACS_FAST_UNPROVED", "1")

    @staticmethod
    def problem(namespace=lomacs_fast, seed=0, device="cuda"):
        torch.manual_seed(seed)
        net = namespace.LoMACSSVDNet(64, 64, 32, 3, dim=32, k_len=16, gate_hidden=32).to(device)
        H = channels(16, 64, 64).to(device) / 64
        return net, H, torch.arange(16, device=device) % 3

    @staticmethod
    def gradients(namespace, net, H, sid, call=None):
        # a compiled module has no length to be true by
        U, S, V, _ = (net if call is None else call)(H, sid)
        value = namespace.AEPlusLoss()(U, S, V, H, 0.4, 0.3, 0.3, 0.2)
        found = torch.autograd.grad(value, list(net.parameters()))
        return torch.cat([value.detach()[None], *(g.flatten() for g in found)]).double().cpu()

    def test_a_step_by_the_rule(self):
        errors = np.zeros(2)
        for seed in range(3):
            net, H, sid = self.problem(reference, seed, "cpu")
            exact = self.gradients(reference, net.double(), H.to(torch.complex128), sid)
            for i, namespace in enumerate(NAMESPACES):
                errors[i] += relative(self.gradients(namespace, *self.problem(namespace, seed)), exact) ** 2
        eager, ours = np.sqrt(errors / 3)
        assert ours <= 2 * eager + 4 * torch.finfo(torch.float32).eps

    def test_compiled_in_one_graph(self):
        net, H, sid = self.problem()
        compiled = torch.compile(net, fullgraph=True)
        found, want = (self.gradients(lomacs_fast, net, H, sid, call) for call in (compiled, net))
        assert relative(found, want) < 1e-4

    def test_autocast(self):
        net, H, sid = self.problem()
        want = self.gradients(lomacs_fast, net, H, sid)
        with torch.autocast("cuda", torch.bfloat16):
            found = self.gradients(lomacs_fast, net, H, sid)
        assert torch.nn.functional.cosine_similarity(found, want, dim=0) > 0.99

    def test_accelerated(self):
        torch.manual_seed(0)
        net = foreign.LowMACS_SVDNet(64, 64, 32, 3, dim=32, groups=4, k_len=16, hidden=32).cuda()
        H, sid = self.problem()[1:]
        want = net(H, sid)
        report = lomacs_fast.accelerate(net)
        assert not report.left
        for x, y in zip(net(H, sid), want, strict=True):
            assert relative(x.abs(), y.abs()) < 1e-3


MEMORY = """
import sys
sys.path[:0] = sys.argv[1:]
import bench_network, harness, torch
import lomacs_fast
from lomacs_fast import reference

H = bench_network.channels(64, 64, 256).to(torch.complex64)
for module in (reference, lomacs_fast):
    step = bench_network.Step(module.LoMACSSVDNet, module.AEPlusLoss(), H, 32)
    step()
    print(harness.peak_bytes(step))
"""


def test_a_step_holds_at_most_half_of_what_eager_holds():
    if reasons := native_reasons("cpu"):
        pytest.skip(f"no native library: {'; '.join(reasons)}")
    root = Path(__file__).parents[1]
    # a process of its own: what other tests left would be used again, and counts for nothing
    command = [sys.executable, "-c", MEMORY, str(root), str(root / "benchmarks")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    eager, ours = done.stdout.split()
    if "None" in (eager, ours):
        pytest.skip("the system does not tell a process's peak memory")
    assert int(ours) <= int(eager) / 2
