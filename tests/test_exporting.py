"""Exported: ONNX in real arithmetic, `torch.export`, AOTInductor packages, whole graphs compiled with gradients."""

import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

import lomacs_fast
from lomacs_fast import export_onnx, freeze, functional, reference, use_backend
from lomacs_fast.exporting import Complex, real_twin
from lomacs_fast.ops.native import reasons as native_reasons
from lomacs_fast.pruning import prune

EPS = torch.finfo(torch.float32).eps
# the only operators of the traced network that give complex numbers: the same memory, read in pairs
VIEWS = {"aten.view_as_complex.default", "aten.resolve_conj.default", "aten.resolve_neg.default"}


def network(kind=lomacs_fast, dtype=torch.float32, **sizes):
    torch.manual_seed(0)
    config = {"M": 12, "N": 10, "r": 5, "n_scene": 3, "dim": 16, "groups": 2, "k_len": 4, "gate_hidden": 6}
    net = kind.LoMACSSVDNet(**config | sizes)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
        # spread, so that no rounding changes the order of the columns
        net.s_head[0].bias.copy_(torch.randperm(net.r) / 2.0 - 3)
    # a cast to float32 would round tau
    return (net if dtype == torch.float32 else net.to(dtype)).eval()


def channels(B=6, M=12, N=10, dtype=torch.complex128, seed=1):
    generator = torch.Generator().manual_seed(seed)
    H = torch.randn(B, M, N, dtype=torch.complex128, generator=generator)
    return (H / torch.linalg.vector_norm(H, dim=(1, 2), keepdim=True)).to(dtype)


def scenes(B=6):
    return torch.arange(B) % 3


def pairs(x):
    return torch.view_as_real(x) if x.is_complex() else x


def by_the_rule(runs):
    """Errors of every tensor against double precision, pooled over the runs `(got, eager, exact)`."""
    pooled = {}
    for got, eager, exact in runs:
        for i, (x, y, z) in enumerate(zip(got, eager, exact, strict=True)):
            squares = [float((w.detach() - z).abs().square().sum()) for w in (x, y, torch.zeros_like(z))]
            pooled[i] = [a + b for a, b in zip(pooled.get(i, (0, 0, 0)), squares, strict=True)]
    for ours, theirs, norm in pooled.values():
        assert (ours / norm) ** 0.5 <= 2 * (theirs / norm) ** 0.5 + 4 * EPS


@pytest.fixture
def native():
    if reasons := native_reasons("cpu"):
        pytest.skip(f"no native library: {'; '.join(reasons)}")


class TestTwin:
    @pytest.mark.parametrize(
        "sizes",
        [{}, {"M": 9, "N": 14, "depth": 3, "k_len": [3, 7]}, {"M": 3, "N": 2, "r": 1, "depth": 0}],
        ids=str,
    )
    def test_real_arithmetic_gives_the_network(self, sizes):
        net = network(reference, torch.float64, **sizes)
        H = channels(M=net.M, N=net.N)
        H[2] = 0
        got = real_twin(net, torch.float64)(torch.view_as_real(H), scenes())
        for x, y in zip(got, net(H, scenes()), strict=True):
            assert not x.is_complex()
            torch.testing.assert_close(x, pairs(y), rtol=1e-10, atol=1e-13)

    def test_a_network_with_other_parts_is_refused(self, tmp_path):
        net = network()
        net.ortho_refine = lomacs_fast.NeuralOrthoRefiner(steps=2)
        with pytest.raises(ValueError, match="net must have the state of a network of its config"):
            real_twin(net)
        net = network()
        net.norm.eps = 1.0
        with pytest.raises(ValueError, match=r"net must compute what its config and state say, its U diag"):
            export_onnx(net, tmp_path / "net.onnx")
        net = network()
        net.freq_gate.temperature = 3.0
        with pytest.raises(ValueError, match=r"its .* is off by"):
            export_onnx(net, tmp_path / "net.onnx")

    def test_what_the_arithmetic_lacks_is_an_error(self):
        z = Complex.of(torch.ones(3, 3, 2))
        with pytest.raises(TypeError):
            torch.linalg.svd(z)
        with pytest.raises(ValueError, match="norm must be"):
            torch.fft.fft2(z, norm="forward")


class TestOnnx:
    def run(self, path, H, sid):
        runtime = pytest.importorskip("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = 1
        session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        inputs = {"H": torch.view_as_real(H.to(torch.complex64)).numpy(), "sid": sid.numpy()}
        return [x.name for x in session.get_outputs()], session.run(None, inputs)

    def check(self, path, net, B):
        H, sid = channels(B, net.M, net.N), scenes(B)
        if B > 2:
            H[2] = 0
        with torch.no_grad():
            want = [pairs(x).numpy() for x in net.double()(H, sid)]
        names, got = self.run(path, H, sid)
        assert names == ["U", "S", "V", "Hd"]
        for x, y in zip(got, want, strict=True):
            assert x.dtype == np.float32
            assert np.linalg.norm(x - y) <= 1e-4 * np.linalg.norm(y)
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-4 * np.abs(y).max())

    def test_the_runtime_agrees_at_any_batch(self, tmp_path):
        net = network(M=16, N=16, tau_s=0.6)
        before = {name: x.clone() for name, x in net.state_dict().items()}
        export_onnx(net, tmp_path / "net.onnx")
        assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]
        assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())
        for B in (1, 2, 7):
            self.check(tmp_path / "net.onnx", net, B)
        with pytest.raises(Exception, match="out of"):
            self.run(tmp_path / "net.onnx", channels(1, 16, 16), torch.tensor([3]))
        with pytest.raises(FileExistsError):
            export_onnx(net, tmp_path / "net.onnx")

    def test_odd_sizes_and_a_pruned_network(self, tmp_path):
        net, _ = prune(network(M=13, N=9), k_len=3, gate_hidden=2)
        export_onnx(net, tmp_path / "net.onnx", batch=4)
        self.check(tmp_path / "net.onnx", net, 4)
        with pytest.raises(Exception, match="invalid dimensions"):
            self.run(tmp_path / "net.onnx", channels(3, 13, 9), scenes(3))

    def test_at_the_published_size(self, tmp_path):
        net = network(M=64, N=64, r=32, dim=64, groups=4, k_len=32, gate_hidden=32)
        export_onnx(net, tmp_path / "net.onnx", batch=3)
        self.check(tmp_path / "net.onnx", net, 3)

    def test_equal_singular_values_keep_their_order(self, tmp_path):
        net = network(depth=0)
        with torch.no_grad():
            net.s_head[0].weight.zero_()
            net.s_head[0].bias.fill_(-1.0)
        export_onnx(net, tmp_path / "net.onnx", batch=3)
        self.check(tmp_path / "net.onnx", net, 3)

    @pytest.mark.parametrize(
        ("net", "options", "error", "words"),
        [
            (torch.nn.Linear(2, 2), {}, TypeError, "net must be a LoMACSSVDNet, got Linear"),
            (network(), {"batch": 0}, ValueError, "batch must be at least 1, got 0"),
            (network(), {"batch": 2.0}, TypeError, "batch must be an integer, got float 2.0"),
        ],
    )
    def test_bad_arguments_are_named(self, tmp_path, net, options, error, words):
        with pytest.raises(error, match=re.escape(words)):
            export_onnx(net, tmp_path / "net.onnx", **options)

    def test_a_file_appears_whole_or_not_at_all(self, tmp_path, monkeypatch):
        def broken(*args, **kwargs):
            raise RuntimeError("halfway")

        monkeypatch.setattr(torch.onnx, "export", broken)
        with pytest.raises(RuntimeError, match="halfway"):
            export_onnx(network(), tmp_path / "net.onnx")
        assert not list(tmp_path.iterdir())
        with pytest.raises(FileNotFoundError, match="does not exist"):
            export_onnx(network(), tmp_path / "nowhere" / "net.onnx")

    @pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
    def test_without_onnx(self, tmp_path, monkeypatch, missing):
        monkeypatch.setitem(sys.modules, missing, None)
        with pytest.raises(ImportError, match=r"pip install 'lomacs_fast\[onnx\]'"):
            export_onnx(network(), tmp_path / "net.onnx")


def complex_operators(graph):
    found = set()
    for node in graph.nodes:
        value = node.meta.get("val")
        values = value if isinstance(value, tuple | list) else [value]
        if node.op == "call_function" and any(isinstance(x, torch.Tensor) and x.is_complex() for x in values):
            found.add(str(node.target))
    return found


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("layout", ["complex", "real"])
@pytest.mark.parametrize("kind", ["network", "frozen"])
def test_exported_whole(kind, layout, tmp_path, monkeypatch):
    # the graph has the ops of the modules, whose bits are those of the modules called one by one
    monkeypatch.setattr(functional, "svd_network_at_once", lambda *_: None)
    net = network()
    module = freeze(net) if kind == "frozen" else net
    H = channels(dtype=torch.complex64)
    H = torch.view_as_real(H) if layout == "real" else H
    batch = {0: torch.export.Dim("B", min=1)}
    with torch.no_grad():
        program = torch.export.export(module, (H, scenes()), dynamic_shapes=(batch, batch))
        program = program.run_decompositions({})
        names = {str(node.target) for node in program.graph.nodes}
        assert ("lomacs.frozen_svd.default" if kind == "frozen" else "lomacs.svd_tail.default") in names
        assert complex_operators(program.graph) <= VIEWS
        torch.export.save(program, tmp_path / "net.pt2")
        loaded = torch.export.load(tmp_path / "net.pt2").module()
        for B in (6, 1):
            for x, y in zip(loaded(H[:B], scenes(B)), module(H[:B], scenes(B)), strict=True):
                assert torch.equal(x, y)


@pytest.mark.usefixtures("native")
def test_a_frozen_network_exports_with_the_mean_scene():
    frozen, H = freeze(network()), channels(dtype=torch.complex64)
    frozen(H)
    with warnings.catch_warnings():
        # said where tracing leaves something of its own in the module
        warnings.simplefilter("error", UserWarning)
        loaded = torch.export.export(frozen, (H,)).module()
    for x, y in zip(loaded(H), frozen(H), strict=True):
        assert torch.equal(x, y)


RUN = """
import sys, torch, lomacs_fast
if torch.__version__ < "2.11":
    # which looks for it and does not import it
    import torch._inductor.codecache
inputs = torch.load(sys.argv[2], weights_only=True)
package = torch._inductor.aoti_load_package(sys.argv[1])
if sys.argv[4] == "load":
    lomacs_fast.load_ops()
torch.save([package(*some) for some in inputs], sys.argv[3])
"""


@pytest.mark.usefixtures("native")
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["network", "frozen"])
def test_an_aotinductor_package_runs_in_another_process(kind, tmp_path):
    net, double = network(), network(reference).double()
    frozen = kind == "frozen"
    module = freeze(net) if frozen else net
    batch = {0: torch.export.Dim("B", min=1)}
    sizes = ((32, 1), (32, 2), (32, 3), (1, 4))
    inputs = [(channels(B, dtype=torch.complex64, seed=seed), scenes(B)) for B, seed in sizes]
    with torch.no_grad():
        program = torch.export.export(module, inputs[0], dynamic_shapes=(batch, batch))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "net.pt2"))
    torch.save(inputs, tmp_path / "in.pt")

    def run(load):
        arguments = [package, str(tmp_path / "in.pt"), str(tmp_path / "out.pt"), load]
        return subprocess.run(
            [sys.executable, "-c", RUN, *arguments], capture_output=True, text=True, timeout=300
        )

    if not frozen:
        without = run("leave")
        assert without.returncode
        assert "lomacs::" in without.stderr
    done = run("load")
    assert done.returncode == 0, done.stderr
    exact = freeze(double) if frozen else double
    with use_backend("eager"), torch.no_grad():
        by_the_rule(
            (got, module(H, sid), exact(H.to(torch.complex128), sid))
            for (H, sid), got in zip(inputs, torch.load(tmp_path / "out.pt"), strict=True)
        )


def test_missing_ops_are_named(monkeypatch):
    from lomacs_fast.ops import native

    monkeypatch.setattr(native, "reasons", lambda kind: ("library not built: no compiler",))
    with pytest.raises(ImportError, match="no C\\+\\+ kernels of lomacs_fast for the CPU: library not built"):
        lomacs_fast.load_ops()


def step(net, loss, H, sid, lam):
    """Value and gradients of forward and loss, H left out: its label and its input are one tensor."""
    U, S, V, _ = net(H, sid)
    return loss(U, S, V, H, 0.4, 0.3, 0.3, lam)


def gradients(call, net, loss, H):
    value = call(net, loss, H, scenes(len(H)), torch.tensor(0.2))
    return [value.detach(), *torch.autograd.grad(value, list(net.parameters()))]


def runs(compiled, net, **changes):
    """The compiled step, the eager one and the eager one in double precision, on some batches."""
    eager = network(reference, **changes)
    double = network(reference, **changes).double()
    for seed in range(3):
        H = channels(32, seed=seed)
        single = H.to(torch.complex64)
        yield (
            gradients(compiled, net, lomacs_fast.AEPlusLoss(), single),
            gradients(step, eager, reference.AEPlusLoss(), single),
            gradients(step, double, reference.AEPlusLoss(), H),
        )


@pytest.mark.usefixtures("native")
def test_no_complex_arithmetic_in_the_graph_of_a_step():
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def keep(graph, example):
        graphs.append(graph.graph)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
    by_the_rule(runs(compiled, network()))
    assert len(graphs) == 2
    assert all(complex_operators(graph) <= VIEWS for graph in graphs)


@pytest.mark.usefixtures("native")
@pytest.mark.slow
def test_a_compiled_step_has_the_gradients_of_double_precision():
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True)
    net = network()
    by_the_rule(runs(compiled, net))
    # a schedule changes numbers, no graph
    with torch._dynamo.config.patch(error_on_recompile=True):
        net.set_tau_s(0.3)
        by_the_rule(runs(compiled, net, tau_s=0.3))
