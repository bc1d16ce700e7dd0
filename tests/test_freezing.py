"""The frozen network: equal to the network at the channel's own scale, saved as plain arrays, refusing bad input."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

import lomacs_fast
from lomacs_fast import FrozenSVDNet, freeze, freezing, reference, use_backend
from lomacs_fast.inference import decompose
from lomacs_fast.ops.native import reasons as native_reasons
from lomacs_fast.pruning import prune

EPS = torch.finfo(torch.float32).eps
SIZES = {
    "M": 12,
    "N": 10,
    "r": 4,
    "n_scene": 3,
    "dim": 16,
    "depth": 3,
    "groups": 2,
    "k_len": 5,
    "gate_hidden": 6,
}


def network(seed=0, dtype=torch.float64, kind=lomacs_fast.LoMACSSVDNet, **changes):
    torch.manual_seed(seed)
    net = kind(**SIZES | changes)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return net.to(dtype)


# of refined networks: covariances on panels of several shapes, and plain channels
ANGULAR = {
    "panel": {"array": (2, 2, 3), "active": 5},
    "all columns": {"array": (1, 4, 3), "active": 8},
    "one row": {"active": 3},
    "odd": {"M": 18, "N": 18, "array": (2, 3, 3), "r": 18, "active": 4},
    "wide": {"M": 34, "N": 34, "array": (1, 2, 17), "r": 20, "active": 17},
    "plain channels": {"N": 9, "hermitian": False, "active": 5},
}


def angular(seed=0, dtype=torch.float64, kind=lomacs_fast.LoMACSSVDNet, **changes):
    torch.manual_seed(seed)
    sizes = {"M": 12, "N": 12, "r": 8, "n_scene": 3, "hermitian": True, "refine_steps": 2, "gate_hidden": 3}
    net = kind(head="angular", **sizes | changes)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return net.to(dtype).eval()


def input_of(net, B=6, seed=1, dtype=torch.complex128):
    """What the network is for: covariances of a few paths and noise, or channels."""
    if not net.hermitian:
        return channels(B, net.M, net.N, seed, dtype)
    X = channels(B, net.M, 4, seed)
    return (X @ X.mH + 0.2 * torch.eye(net.M)).to(dtype)


def channels(B=6, M=12, N=10, seed=1, dtype=torch.complex128):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, M, N, dtype=dtype, generator=generator)


def product(U, S, V):
    return (U * S[:, None].to(U.dtype)) @ V.mH


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"depth": 0},
        {"depth": 1, "groups": 1},
        {"M": 9, "N": 14},
        {"M": 7, "N": 5, "r": 1},
        {"k_len": [3, 9], "kernel_size": 5, "temperature": 0.7, "tau_s": 0.35},
    ],
    ids=str,
)
def test_equal_to_the_network_at_unit_norm(changes):
    net = network(**changes)
    H, sid = channels(M=net.M, N=net.N), torch.arange(6) % 3
    frozen = freeze(net)
    for x, y in zip(frozen(H, sid), decompose(net, H, sid), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


def test_single_precision_by_the_rule():
    errors = np.zeros(2)
    for seed in range(3):
        net = network(seed, dtype=torch.float32)
        H, sid = channels(12, seed=seed), torch.arange(12) % 3
        exact = product(*decompose(network(seed, dtype=torch.float32).double(), H, sid))
        single = H.to(torch.complex64)
        for i, got in enumerate((decompose(net, single, sid), freeze(net)(single, sid))):
            errors[i] += float(torch.linalg.vector_norm(product(*got) - exact).square())
        size = float(torch.linalg.vector_norm(exact))
    eager, frozen = np.sqrt(errors) / size
    assert frozen <= 2 * eager + 4 * EPS


@pytest.mark.parametrize("backend", ["eager", "avx512", "avx2", "portable"])
@pytest.mark.parametrize("name", ANGULAR)
def test_a_refined_network_at_unit_norm(name, backend, monkeypatch):
    net = angular(**ANGULAR[name])
    H, sid, frozen = input_of(net), torch.arange(6) % 3, freeze(net)
    if backend != "eager":
        if reasons := native_reasons("cpu"):
            pytest.skip(f"no native library: {'; '.join(reasons)}")
        monkeypatch.setenv("LOMACS_FAST_ISA", backend)
    for steps in (2, 0, 3):
        net.set_refine_steps(steps)
        frozen = freeze(net)
        with use_backend("eager"):
            want = decompose(net, H, sid)
        try:
            with use_backend("eager" if backend == "eager" else "cpp"):
                got = frozen(H, sid)
        except RuntimeError as error:
            if "lacks" not in str(error):
                raise
            pytest.skip(f"no {backend} in this processor")
        torch.testing.assert_close(got[1], want[1], rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(product(*got), product(*want), rtol=1e-8, atol=1e-9)
        for X in (got[0], got[2]):
            one = torch.eye(net.r, dtype=X.dtype)
            assert (X.mH @ X - one).abs().max() < 1e-7


@pytest.mark.parametrize("hermitian", [True, False])
def test_a_refined_network_in_single_precision_by_the_rule(hermitian):
    errors, size = np.zeros(2), 0.0
    sizes = {"array": (2, 2, 3), "active": 5} if hermitian else {"N": 9, "hermitian": False, "active": 5}
    for seed in range(3):
        net, double = angular(seed, torch.float32, **sizes), angular(seed, torch.float32, **sizes).double()
        H, sid = input_of(net, 12, seed), torch.arange(12) % 3
        exact = product(*decompose(double, H, sid))
        single = H.to(torch.complex64)
        with use_backend("eager"):
            eager = decompose(net, single, sid)
        for i, got in enumerate((eager, freeze(net)(single, sid))):
            errors[i] += float(torch.linalg.vector_norm(product(*got) - exact).square())
        size += float(torch.linalg.vector_norm(exact).square())
    eager, frozen = np.sqrt(errors / size)
    assert frozen <= 2 * eager + 4 * EPS


def test_a_refined_network_of_any_scale_with_zero_and_nan(tmp_path):
    for sizes in (ANGULAR["panel"], ANGULAR["plain channels"]):
        net = angular(**sizes)
        frozen, H = freeze(net, (4, 5, 6)), input_of(net)
        U, S, V = frozen(H)
        for factor in (1e-200, 1e-30, 1e200):
            for x, y in zip(frozen(H * factor), (U, S * factor, V), strict=True):
                torch.testing.assert_close(x, y, rtol=1e-6, atol=0 if x is y else 1e-9 * float(y.abs().max()))
        H[1], H[4, 0, 0], H[5, 1, 1] = 0, torch.nan, torch.inf
        got = frozen(H)
        assert not got[1][1].any()
        assert got[0][1].isfinite().all()
        assert got[1][4:].isnan().all()
        for x, y in zip(got, (U, S, V), strict=True):
            assert torch.equal(x[[0, 2, 3]], y[[0, 2, 3]])
        frozen.save(tmp_path / f"{net.N}.npz")
        again = FrozenSVDNet.load(tmp_path / f"{net.N}.npz")
        assert all(torch.equal(x[:4], y[:4]) for x, y in zip(again(H), got, strict=True))
        assert (again.config, again.scenarios) == (net.config, (4, 5, 6))


def test_a_refined_network_without_a_scene_takes_the_mean():
    net = angular(**ANGULAR["panel"])
    H = input_of(net)
    got = freeze(net)(H)
    with torch.no_grad():
        net.angular_gate.scene_bias.weight[0] = net.angular_gate.scene_bias.weight.mean(0)
    want = decompose(net, H, 0)
    torch.testing.assert_close(got[1], want[1], rtol=1e-9, atol=1e-10)
    assert (freeze(net)(H, 1)[1] - got[1]).abs().max() > 1e-6


@pytest.fixture
def native():
    if reasons := native_reasons("cpu"):
        pytest.skip(f"no native library: {'; '.join(reasons)}")


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"M": 63, "N": 41, "r": 11},
        {"M": 2, "N": 3, "r": 1},
        {"depth": 0},
        {"depth": 5, "k_len": [1, 17, 4]},
    ],
    ids=str,
)
def test_the_native_op_equals_the_reference(changes, isa, monkeypatch):
    net = network(**changes)
    frozen, H = freeze(net), channels(35, M=net.M, N=net.N)
    with use_backend("eager"):
        want = frozen(H, torch.arange(35) % 3)
    monkeypatch.setenv("LOMACS_FAST_ISA", isa)
    try:
        with use_backend("cpp"):
            got = frozen(H, torch.arange(35) % 3)
    except RuntimeError as error:
        if "lacks" not in str(error):
            raise
        pytest.skip(f"no {isa} in this processor")
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


MADE = {
    "published": lambda: (
        freeze(network(dtype=torch.float32, M=40, N=30, r=10)),
        channels(40, 40, 30, dtype=torch.complex64),
    ),
    "refined": lambda: (
        freeze(angular(dtype=torch.float32, **ANGULAR["wide"])),
        input_of(angular(**ANGULAR["wide"]), 40, dtype=torch.complex64),
    ),
}


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_threads_and_company_do_not_change_a_bit(make):
    frozen, H = make()
    before = torch.get_num_threads()
    results, alone = [], []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with use_backend("cpp"):
                results.append(frozen(H, 1))
                # one sample is shared by two threads, who come as they please
                alone += [frozen(H[37:38], 1) for _ in range(20)]
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))
    for result in alone:
        assert all(torch.equal(x[0], y[37]) for x, y in zip(result, results[0], strict=True))


@pytest.mark.usefixtures("native")
def test_opcheck():
    from lomacs_fast.ops.frozen import flat_at_once, flat_weights

    w = freeze(network()).weights
    H, scene = torch.view_as_real(channels(3)), torch.tensor([0, 3, 1])
    args = (H, scene, *flat_weights(w)[1:])
    op = torch.ops.lomacs.frozen_svd
    torch.library.opcheck(op.default, args)
    torch.library.opcheck(op.default, (channels(3), *args[1:]))
    with pytest.raises(RuntimeError, match="scene must name a row of table"):
        op(H, scene + 1, *args[2:])
    with pytest.raises(RuntimeError, match=r"packed must have shape \(\d+\), got"):
        op(H, scene, args[2][:-1], *args[3:])
    for wrong, message in ((args[3][:4], "must hold d"), ([*args[3][:5], 5, 4], "groups that divide d")):
        with pytest.raises(RuntimeError, match=message):
            op(H, scene, args[2], wrong, *args[4:])
    for wrong in (H[..., 0], torch.view_as_complex(H)[0], torch.view_as_complex(H)[..., None]):
        with pytest.raises(
            RuntimeError, match=r"H must have shape \(B, M, N, 2\), or \(B, M, N\) and be complex"
        ):
            op(wrong, *args[1:])
    at_once = flat_at_once(w, 12, 10)[2]
    for x, y in zip(op.at_once(H, scene, *at_once), op(*args), strict=True):
        assert torch.equal(x, y)
    turned = at_once[2][[1, 0, *range(2, len(at_once[2]))]]
    for facts, message in (
        (at_once[2][:3], "must hold M, N, temperature, eps and sizes"),
        (at_once[2][:8], "must hold d"),
        (turned, "the M and N of facts"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op.at_once(H, scene, *at_once[:2], facts)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("make", [network, angular], ids=["published", "refined"])
def test_complex_and_real_channels_are_the_same_bits(make):
    net = make()
    frozen, H = freeze(net), input_of(net, 2)
    sid, pairs = torch.tensor([2, 0]), torch.view_as_real(H)
    want = frozen(torch.cat([H] * 400), sid.repeat(400))
    for x in (H, pairs, H.conj().resolve_conj().conj(), pairs.clone().requires_grad_()):
        for got, y in zip(frozen(x, sid), want, strict=True):
            assert torch.equal(got, y[:2])
            assert got.is_complex() == y.is_complex()
            assert not got.requires_grad


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("name", ["panel", "plain channels", "all columns", "odd"])
def test_contract_of_the_refined_op(name):
    from torch.utils.flop_counter import FlopCounterMode

    from lomacs_fast.ops.frozen import flat_weights

    net = angular(**ANGULAR[name])
    w, H, scene = freeze(net).weights, input_of(net, 3), torch.tensor([0, 3, 1])
    op = torch.ops.lomacs.frozen_angular_svd
    args = (torch.view_as_real(H), scene, *flat_weights(w)[1:])
    torch.library.opcheck(op.default, args)
    counted = {}
    for backend in ("eager", "cpp"):
        with use_backend(backend), FlopCounterMode(display=False) as counter:
            lomacs_fast.functional.frozen_angular_svd(H, scene, w)
        counted[backend] = counter.get_total_flops()
    assert counted["cpp"] == counted["eager"]
    for changed, words in (
        ((args[0], scene + 1, *args[2:]), "scene must name a row of table"),
        ((args[0], scene, args[2][:4], *args[3:]), "weights must hold 5 tensors"),
        ((args[0], scene, [args[2][3], *args[2][1:]], *args[3:]), "first, table and scalars"),
        ((*args[:3], (3, 2, 4), *args[4:]), "as many antennas"),
        ((*args[:4], net.M + 1, *args[5:]), "rank must be"),
        ((*args[:5], w.rank + 1, w.sweeps), "active must be"),
    ):
        with pytest.raises(RuntimeError, match=words):
            op(*changed)


@pytest.mark.usefixtures("native")
def test_weights_changed_by_any_way_are_those_that_the_kernel_reads():
    def check(frozen):
        with use_backend("cpp"):
            got = frozen(H, 1)
        with use_backend("eager"):
            want = frozen(H, 1)
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)
        return got[1]

    first, other = freeze(network(seed=0)), freeze(network(seed=5))
    H = channels()
    before, wanted = check(first), check(other)
    assert not torch.equal(before, wanted)
    for assign in (False, True):
        loaded = freeze(network(seed=0))
        check(loaded)
        loaded.load_state_dict(other.state_dict(), assign=assign)
        torch.testing.assert_close(check(loaded), wanted, rtol=1e-9, atol=0)
    first.pos.add_(0.5)
    changed = check(first)
    assert not torch.equal(changed, before)
    for copied in (copy.deepcopy(first), pickle.loads(pickle.dumps(first)), first.float().double()):
        torch.testing.assert_close(check(copied), changed, rtol=1e-3, atol=1e-6)
    first.table = first.table + 0.1
    assert not torch.equal(check(first), changed)
    place = first.packed.data_ptr()
    assert first.share_memory().packed.is_shared()
    assert first.pos.is_shared()
    first.table.add_(0.1)
    check(first)
    assert first.packed.data_ptr() != place
    # views, of which none brings the others along
    assert len(pickle.dumps(first)) < 2 * 8 * first.packed.numel()


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("kind", ["published", "refined"])
def test_compiled_in_one_graph_it_follows_its_weights(kind):
    def make(seed):
        return freeze(network(seed) if kind == "published" else angular(seed, **ANGULAR["panel"]))

    frozen, other = make(0), make(5)
    net = network() if kind == "published" else angular(**ANGULAR["panel"])
    H, sid = (channels(3) if kind == "published" else input_of(net, 3)), torch.tensor([0, 2, 1])
    compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        for x, y in zip(compiled(H, sid), frozen(H, sid), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)
        frozen.load_state_dict(other.state_dict())


def agree(frozen, H):
    """What the kernel gives, which is what the formula gives on the weights that the module shows."""
    with use_backend("cpp"):
        got = frozen(H, 1)
    with use_backend("eager"):
        want = frozen(H, 1)
    tight = H.dtype == torch.complex128
    torch.testing.assert_close(product(*got), product(*want), rtol=1e-9 if tight else 1e-3, atol=1e-5)
    return got[1]


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("by", ["float", "to", "double", "half"])
def test_another_precision_leaves_the_scalars_in_double(by):
    frozen, H = freeze(network(dtype=torch.float32)), channels(dtype=torch.complex64)
    scalars = frozen.scalars.clone()
    wanted = agree(frozen, H)
    converted = frozen.to(torch.float32) if by == "to" else getattr(frozen, by)()
    assert torch.equal(converted.scalars, scalars)
    rounded = by == "half"
    torch.testing.assert_close(agree(frozen.float(), H), wanted, rtol=0.05 if rounded else 1e-6, atol=1e-4)
    assert torch.equal(frozen.scalars, scalars)


def swapped(frozen):
    frozen.row_w1, frozen.col_w1 = frozen.col_w1, frozen.row_w1


def transposed(frozen):
    frozen.row_w1 = frozen.row_w1.T


def one_in_two_places(frozen):
    frozen.row_w1 = frozen.col_w1


def another_place(frozen):
    frozen.head.data = torch.rand_like(frozen.head)


def another_order(frozen):
    frozen.block0_score.data = frozen.block0_score.data.mT


def another_order_in_place(frozen):
    frozen.block0_score.transpose_(1, 2)


def registered_at_the_same_place(frozen):
    frozen.register_buffer("pos", frozen.pos[:1].expand_as(frozen.pos))


def all_at_once(frozen):
    other = freeze(network(5, N=12, gate_hidden=12)).state_dict()
    frozen._buffers = {name: x.clone() for name, x in other.items()}


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(
    "change",
    [
        swapped,
        transposed,
        one_in_two_places,
        another_place,
        another_order,
        another_order_in_place,
        registered_at_the_same_place,
        all_at_once,
    ],
)
def test_views_in_the_place_of_others_are_those_that_the_kernel_reads(change):
    frozen, H = freeze(network(N=12, gate_hidden=12)), channels(N=12)
    before = agree(frozen, H)
    change(frozen)
    assert not torch.equal(agree(frozen, H), before)


HOLD = {
    "attribute": lambda frozen: frozen.head,
    "named_buffers": lambda frozen: dict(frozen.named_buffers())["head"],
    "get_buffer": lambda frozen: frozen.get_buffer("head"),
    "dict": lambda frozen: frozen._buffers["head"],
    "state_dict": lambda frozen: frozen.state_dict(keep_vars=True)["head"],
    "weights": lambda frozen: frozen.weights.head,
    "applied": lambda frozen: applied(frozen, "head"),
}


def applied(frozen, name):
    held = []
    frozen._apply(lambda x: held.append(x) or x)
    # the order is that of any other
    return held[[name for name, _ in freeze(network()).named_buffers()].index(name)]


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("hold", HOLD)
@pytest.mark.parametrize("early", [True, False])
def test_whoever_holds_a_weight_may_give_it_another_place(hold, early):
    frozen, H = freeze(network()), channels()
    before = None if early else agree(frozen, H)
    head = HOLD[hold](frozen)
    assert head.shape == freeze(network()).head.shape
    before = agree(frozen, H) if early else before
    # nothing is asked of the module again
    head.data = torch.rand_like(head)
    changed = frozen(H, 1)
    assert not torch.equal(agree(frozen, H), before)
    assert torch.equal(changed[1], frozen(H, 1)[1])


@pytest.mark.usefixtures("native")
def test_weights_that_nobody_holds_are_not_looked_at(monkeypatch):
    frozen, H = freeze(network()), channels()
    frozen(H)
    copies = [frozen, copy.deepcopy(frozen), frozen.to(torch.float64)]
    asked = []
    places = FrozenSVDNet._places
    monkeypatch.setattr(FrozenSVDNet, "_places", lambda self: asked.append(self) or places(self))
    for one in copies:
        one(H)
        one(H)
        one.like  # noqa: B018
        before = len(asked)
        one(H)
        assert len(asked) == before
    assert frozen.head is not None
    before = len(asked)
    frozen(H)
    assert len(asked) > before


def test_weights_replaced_in_inference_mode_can_be_loaded_later():
    frozen, other, H = freeze(network()), freeze(network(5)), channels()
    with torch.inference_mode():
        frozen.table = frozen.table + 0.1
        frozen(H)
    assert not frozen.packed.is_inference()
    frozen.load_state_dict(other.state_dict())
    torch.testing.assert_close(frozen(H)[1], other(H)[1])


@pytest.mark.usefixtures("native")
class TestFunctionalCall:
    """`torch.func.functional_call`: the weights of one call, which leaves nothing behind."""

    def test_takes_weights_that_want_gradients(self):
        frozen, H = freeze(network()), channels()
        table, before = (frozen.table + 0.5).requires_grad_(), agree(frozen, H)
        U, S, V = torch.func.functional_call(frozen, {"table": table}, (H, 1))
        assert not any(x.requires_grad for x in (U, S, V, frozen.packed))
        assert not torch.equal(S, before)
        assert torch.equal(agree(frozen, H), before)

    def test_takes_a_view_of_the_weight_itself(self):
        frozen, H = freeze(network()), channels()
        before = agree(frozen, H)
        S = torch.func.functional_call(frozen, {"block0_score": frozen.block0_score.mT}, (H, 1))[1]
        assert not torch.equal(S, before)
        assert torch.equal(agree(frozen, H), before)

    def test_of_many_networks_at_once(self):
        many, H = [freeze(network(seed)) for seed in (0, 5)], channels()
        states = torch.utils._pytree.tree_map(
            lambda *x: torch.stack(x), *(dict(f.state_dict()) for f in many)
        )
        found = torch.vmap(lambda state: torch.func.functional_call(many[0], state, (H,)))(states)
        for i, frozen in enumerate(many):
            torch.testing.assert_close(found[1][i], frozen(H)[1], rtol=1e-9, atol=1e-11)

    def test_compiled(self):
        frozen, H, sid = freeze(network()), channels(3), torch.tensor([0, 2, 1])

        def call(H, table):
            return torch.func.functional_call(frozen, {"table": table}, (H, sid))

        table = frozen.table + 0.5
        for x, y in zip(torch.compile(call, backend="aot_eager")(H, table), call(H, table), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("native")
def test_a_weight_replaced_before_compilation_is_taken():
    frozen, H, sid = freeze(network()), channels(3), torch.tensor([0, 2, 1])
    frozen.table = frozen.table + 0.5
    compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")(H, sid)
    for x, y in zip(compiled, frozen(H, sid), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("make", [network, angular], ids=["published", "refined"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_traced_by_jit_it_can_be_called_again(make):
    net = make()
    frozen, H = freeze(net), input_of(net, 3)
    traced = torch.jit.trace(frozen, (H,))
    for _ in range(2):
        for x, y in zip(traced(H), frozen(H), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(
    ("net", "shape"),
    # of the first the weights of a transposed channel take as many numbers
    [
        (lambda: network(depth=1, groups=2, k_len=8, dim=16), (10, 12)),
        (lambda: angular(**ANGULAR["plain channels"]), (14, 11)),
    ],
    ids=["published", "refined"],
)
def test_channels_of_another_shape_are_refused(net, shape):
    frozen = freeze(net())
    with pytest.raises(ValueError, match=rf"H must be complex \(B, {frozen.M}, {frozen.N}\)"):
        frozen(channels(2, *shape))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("make", [network, angular], ids=["published", "refined"])
def test_moved_to_meta_it_refuses_channels_and_takes_weights(make):
    net = make()
    frozen, H = freeze(net).to("meta"), input_of(net, 3)
    with pytest.raises(ValueError, match="H must be on meta as the weights are, got cpu"):
        frozen(H)
    frozen.load_state_dict(freeze(net).state_dict(), assign=True)
    assert torch.equal(frozen(H)[1], freeze(net)(H)[1])


def test_scenes_of_other_libraries():
    frozen, H = freeze(network()), channels()
    for x, y in zip(frozen(H, np.int64(1)), frozen(H, 1), strict=True):
        assert torch.equal(x, y)


def test_decompose_takes_a_frozen_network():
    net = network(dtype=torch.float32)
    H = channels() * 1e200
    for x, y in zip(decompose(freeze(net), H, 1), decompose(net, H, 1), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("factor", [1e-200, 1e-30, 1.0, 1e30, 1e200])
def test_any_scale(factor):
    net = network()
    H, frozen = channels(), freeze(net)
    U, S, V = frozen(H, 1)
    for x, y in zip(frozen(H * factor, 1), (U, S * factor, V), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=0)


def test_zero_channels_and_nan_stay_in_their_sample():
    frozen = freeze(network())
    H = channels()
    want = frozen(H, 0)
    H[1], H[4, 0, 0] = 0, torch.nan
    U, S, V = frozen(H, 0)
    assert not S[1].any()
    assert U[1].isfinite().all()
    assert S[4].isnan().any()
    keep = [0, 2, 3, 5]
    for x, y in zip((U, S, V), want, strict=True):
        torch.testing.assert_close(x[keep], y[keep])


def test_no_scene_is_the_mean_scene():
    net = network()
    H = channels()
    got = freeze(net)(H)
    with torch.no_grad():
        net.scene_emb.weight[0] = net.scene_emb.weight.mean(0)
    for x, y in zip(got, decompose(net, H, 0), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


def test_scenes_and_layouts():
    frozen, H = freeze(network()), channels()
    sid = torch.tensor([0, 2, 1, 1, 0, 2])
    want = frozen(H, sid)
    for i, s in enumerate(sid.tolist()):
        for x, y in zip(frozen(H[i : i + 1], s), want, strict=True):
            torch.testing.assert_close(x[0], y[i])
    for same in (torch.view_as_real(H), H.conj().resolve_conj().conj(), H.mT.contiguous().mT):
        for x, y in zip(frozen(same, sid.int()), want, strict=True):
            torch.testing.assert_close(x, y)
    assert [x.shape[0] for x in frozen(H[:0], sid[:0])] == [0, 0, 0]


def test_the_network_is_left_as_it_is_and_no_graph_is_recorded():
    net = network()
    before = {name: x.clone() for name, x in net.state_dict().items()}
    frozen = freeze(net)
    assert not list(frozen.parameters())
    assert not any(x.requires_grad for x in frozen(channels().requires_grad_(), 0))
    with torch.no_grad():
        out = frozen(channels(), 0)
        for p in net.parameters():
            p.zero_()
    assert all(torch.equal(x, y) for x, y in zip(frozen(channels(), 0), out, strict=True))
    assert list(before) == list(net.state_dict())


def test_a_traced_call_leaves_nothing_behind():
    frozen, H = freeze(network()), channels(5)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for x in (mode.from_tensor(H), H):
            assert frozen(x)[1].shape == (5, 4)
    assert all(x.isfinite().all() for x in frozen(H))


def test_a_pruned_network_freezes():
    net = network()
    smaller, _ = prune(net, k_len=3, gate_hidden=2)
    H, sid = channels(), torch.arange(6) % 3
    for x, y in zip(freeze(smaller)(H, sid), decompose(smaller, H, sid), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


def test_another_precision_and_other_weights_are_taken_up():
    frozen, other = freeze(network(dtype=torch.float32)), freeze(network(1, dtype=torch.float64))
    frozen(channels(dtype=torch.complex64), 0)
    frozen.double()(channels(), 0)
    frozen.load_state_dict(other.state_dict())
    for x, y in zip(frozen(channels(), 0), other(channels(), 0), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-8)


def test_saved_as_plain_arrays(tmp_path):
    net = network(dtype=torch.float32)
    frozen = freeze(net, scenarios=(1, 3, 4))
    frozen.save(tmp_path / "net.npz")
    with np.load(tmp_path / "net.npz", allow_pickle=False) as file:
        assert all(file[name].dtype != object for name in file.files)
    again = FrozenSVDNet.load(tmp_path / "net.npz")
    H = channels(dtype=torch.complex64)
    assert all(torch.equal(x, y) for x, y in zip(again(H, 2), frozen(H, 2), strict=True))
    assert (again.config, again.scenarios) == (net.config, (1, 3, 4))
    with pytest.raises(FileExistsError):
        frozen.save(tmp_path / "net.npz")
    frozen.save(tmp_path / "net.npz", overwrite=True)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 nothing", b"text"])
def test_a_file_that_is_none_is_refused(tmp_path, content):
    path = tmp_path / "net.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"net\.npz is not a frozen network"):
        FrozenSVDNet.load(path)
    np.savez(path, a=np.ones(3))
    with pytest.raises(ValueError, match=r"net\.npz is not a frozen network"):
        FrozenSVDNet.load(path)
    with pytest.raises(FileNotFoundError):
        FrozenSVDNet.load(tmp_path / "nothing.npz")


@pytest.mark.parametrize(
    ("args", "error", "words"),
    [
        ((3,), TypeError, "H must be a tensor"),
        ((torch.ones(2, 12, 9, dtype=torch.complex128),), ValueError, r"H must be complex \(B, 12, 10\)"),
        ((torch.ones(2, 12, 10),), ValueError, "H must be complex"),
        ((channels(dtype=torch.complex64),), TypeError, "H must be torch.complex128"),
        ((channels(), 3), ValueError, "sid must lie between 0 and 2, got 3 to 3"),
        ((channels(), -1), ValueError, "sid must lie"),
        # the row of the mean scene is there, but no scene
        ((channels(), torch.full((6,), 3)), ValueError, "sid must lie between 0 and 2, got 3 to 3"),
        ((channels(), torch.zeros(5, dtype=torch.int64)), ValueError, r"sid must have shape \(6,\)"),
        ((channels(), torch.zeros(6)), TypeError, "sid must be an integer tensor"),
        ((channels(), "a"), TypeError, "sid must be an integer"),
    ],
)
def test_bad_input_is_named(args, error, words):
    with pytest.raises(error, match=words):
        freeze(network())(*args)


def test_what_cannot_be_frozen_is_refused():
    with pytest.raises(TypeError, match="net must be a LoMACSSVDNet, got Linear"):
        freeze(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="scenarios must name 3 scenes"):
        freeze(network(), scenarios=(1,))
    net = network()
    net.norm.eps = 1e-3
    with pytest.raises(ValueError, match="one epsilon"):
        freeze(net)


class TwiceNorm(torch.nn.LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


class TwiceConv(lomacs_fast.nn.GatedConv1D):
    def forward(self, x):
        return 2 * super().forward(x)


REPLACED = {
    "blocks": lambda net: net.blocks.append(copy.deepcopy(net.blocks[1])),
    "blocks.0": lambda net: setattr(net.blocks[0], "forward", lambda x: x),
    "blocks.0.0": lambda net: net.blocks[0].__setitem__(0, torch.nn.LayerNorm(16, elementwise_affine=False)),
    "blocks.1": lambda net: net.blocks[1].append(torch.nn.Linear(16, 16)),
    "blocks.1.1": lambda net: net.blocks[1].__setitem__(1, TwiceConv(16, 3)),
    "blocks.1.1.pw": lambda net: setattr(net.blocks[1][1], "pw", torch.nn.Conv1d(16, 16, 1, bias=False)),
    "blocks.2.0": lambda net: net.blocks[2].__setitem__(0, TwiceNorm(16)),
    "blocks.2.1": lambda net: net.blocks[2].__setitem__(1, torch.nn.Linear(16, 16)),
    "input_proj": lambda net: setattr(net, "input_proj", torch.nn.Linear(40, 16, bias=False)),
    "norm": lambda net: setattr(net, "norm", torch.nn.Identity()),
    "ortho_refine": lambda net: setattr(net, "ortho_refine", lomacs_fast.nn.NeuralOrthoRefiner(steps=2)),
    "s_head.1": lambda net: net.s_head.__setitem__(1, torch.nn.Softplus(beta=3)),
}


@pytest.mark.parametrize("name", REPLACED)
def test_a_network_with_other_parts_is_refused(name):
    net = network()
    REPLACED[name](net)
    words = f"net must have the parts that it was made with, others are in the place of {name}$"
    with pytest.raises(ValueError, match=words):
        freeze(net.double())


def test_parametrized_weights_are_those_of_the_network():
    net, H = network(), channels()
    for part in (net.blocks[0][1].qs[0], net.blocks[1][1].dw, net.blocks[2][0], net.input_proj, net.u_head):
        torch.nn.utils.parametrize.register_parametrization(part, "weight", torch.nn.Softplus())
    for x, y in zip(freeze(net)(H, 1), decompose(net, H, 1), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


class TestGraphs:
    """The bookkeeping of captured graphs, with what is captured replaced by a count."""

    @pytest.fixture
    def graphs(self, monkeypatch):
        def capture(self, call, H, scene, stream):
            class Graph:
                def replay(self):
                    for x, y in zip(found.factors, call(found.H, found.scene), strict=True):
                        x.copy_(y)

            self.made = getattr(self, "made", 0) + 1
            found = freezing._Graph(Graph(), H.clone(), scene.clone(), call(H, scene))
            return found

        stream = type("Stream", (), {"cuda_stream": 0})
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
        monkeypatch.setattr(freezing._Graphs, "_capture", capture)
        return freezing._Graphs()

    @staticmethod
    def call(H, scene):
        return H * 2, H.real[:, 0] + scene[:, None], H - 1

    def inputs(self, B, seed):
        return channels(B, 3, 3, seed, torch.complex64), torch.arange(B) + seed

    def test_the_second_call_captures_and_results_are_the_caller_s(self, graphs):
        weights, results = object(), []
        for seed in range(4):
            H, scene = self.inputs(5, seed)
            results.append((graphs(self.call, H, scene, weights), self.call(H, scene)))
            assert getattr(graphs, "made", 0) == min(seed, 1)
        for got, want in results:
            assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))

    def test_other_weights_and_other_ways_are_captured_anew(self, graphs):
        first, other = object(), object()
        for made, weights in ((1, first), (2, other), (3, first)):
            for seed in range(3):
                graphs(self.call, *self.inputs(5, seed), weights)
            assert graphs.made == made
        with use_backend("eager"):
            for seed in range(2):
                graphs(self.call, *self.inputs(5, seed), first)
        assert graphs.made == 4

    def test_the_latest_sizes_are_kept(self, graphs):
        weights = object()
        for B in range(1, freezing.MOST + 3):
            for seed in range(2):
                graphs(self.call, *self.inputs(B, seed), weights)
        assert [key[0] for key in graphs._graphs] == list(range(3, freezing.MOST + 3))
        # a size of its own every time captures none
        made = graphs.made
        for B in range(20, 40):
            graphs(self.call, *self.inputs(B, 0), weights)
        assert (graphs.made, len(graphs._graphs)) == (made, freezing.MOST)

    def test_without_room_calls_go_on(self, graphs, monkeypatch):
        asked = []

        def capture(*args):
            asked.append(args)
            raise torch.OutOfMemoryError("no room")

        monkeypatch.setattr(freezing._Graphs, "_capture", capture)
        weights = object()
        for seed in range(4):
            H, scene = self.inputs(5, seed)
            for x, y in zip(graphs(self.call, H, scene, weights), self.call(H, scene), strict=True):
                assert torch.equal(x, y)
        assert len(asked) == 1


def sized(kind, seed=0, dtype=torch.float32):
    if kind == "published":
        return network(seed, dtype, M=64, N=64, r=32, dim=32, groups=4, k_len=16, gate_hidden=32)
    sizes = {"M": 64, "r": 32, "active": 16}
    if kind == "covariances":
        return angular(seed, dtype, N=64, array=(2, 4, 8), **sizes)
    return angular(seed, dtype, N=48, hermitian=False, **sizes)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["published", "covariances", "channels"])
class TestOnADevice:
    @pytest.fixture(autouse=True)
    def device(self):
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")

    @staticmethod
    def inputs(net, B, seed):
        if hasattr(net, "hermitian"):
            H = input_of(net, B, seed, torch.complex64)
        else:
            H = channels(B, net.M, net.N, seed, torch.complex64)
        return H.cuda(), torch.arange(B, device="cuda") % 3

    @pytest.mark.parametrize("graphs", [False, True])
    def test_by_the_rule(self, kind, graphs):
        errors, size = np.zeros(2), 0.0
        for seed in range(3):
            net = sized(kind, seed)
            H, sid = self.inputs(net, 24, seed)
            exact = product(*decompose(copy.deepcopy(net).double(), H.cpu().to(torch.complex128), sid.cpu()))
            net, frozen = net.cuda(), freeze(net).cuda()
            frozen.graphs = graphs
            with use_backend("eager"):
                eager = decompose(net, H, sid)
            with use_backend("triton"):
                got = [frozen(H, sid) for _ in range(3)][-1]
            for i, found in enumerate((eager, got)):
                errors[i] += float(torch.linalg.vector_norm(product(*found).cpu() - exact).square())
            size += float(torch.linalg.vector_norm(exact).square())
            for X in (got[0], got[2]):
                assert (X.mH @ X - torch.eye(32, device="cuda")).abs().max() < 1e-4 or kind == "published"
        eager, ours = np.sqrt(errors / size)
        assert ours <= 2 * eager + 4 * EPS

    @pytest.mark.parametrize("backend", ["triton", "eager"])
    def test_replays_equal_launches(self, kind, backend):
        net, other = sized(kind).cuda(), sized(kind, 1).cuda()
        frozen, plain = freeze(net), freeze(net)
        plain.graphs = False

        def check(count, B=9, sid=True):
            for seed in range(3):
                H, scenes = self.inputs(net, B, seed)
                scenes = scenes if sid else None
                for x, y in zip(frozen(H, scenes), plain(H, scenes), strict=True):
                    assert torch.equal(x, y)
            assert sum(g is not None for g in frozen._captured._graphs.values()) == count

        with use_backend(backend):
            check(1)
            check(1, sid=False)
            check(2, B=1)
            for module in (frozen, plain):
                module.load_state_dict(freeze(other).state_dict())
            # written in place the weights are the graphs' own
            check(2)
            with torch.inference_mode():
                check(2)
            check(2)
            with torch.cuda.stream(torch.cuda.Stream()):
                check(3)
            again = pickle.loads(pickle.dumps(frozen))
            assert not again._captured._graphs
            H, _ = self.inputs(net, 9, 0)
            assert all(torch.equal(x, y) for x, y in zip(again(H), plain(H), strict=True))

    def test_inside_a_capture_of_the_caller_s(self, kind):
        frozen = freeze(sized(kind).cuda())
        H, sid = self.inputs(sized(kind), 7, 0)
        with use_backend("triton"):
            for _ in range(3):
                frozen(H, sid)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = frozen(H, sid)
            H.copy_(self.inputs(sized(kind), 7, 1)[0])
            graph.replay()
            assert all(torch.equal(x, y) for x, y in zip(captured, frozen(H, sid), strict=True))

    def test_autocast_takes_no_part(self, kind):
        frozen = freeze(sized(kind).cuda())
        H, sid = self.inputs(sized(kind), 7, 0)
        with use_backend("triton"):
            want = frozen(H, sid)
            with torch.autocast("cuda", torch.bfloat16):
                assert all(torch.equal(x, y) for x, y in zip(frozen(H, sid), want, strict=True))


def test_upsampling_is_torch_s():
    for n in (2, 3, 5, 8, 63):
        x = torch.randn(1, 1, n // 2, dtype=torch.float64)
        want = torch.nn.functional.interpolate(x, size=n, mode="linear", align_corners=False)
        got = reference.frozen.upsampling(n, torch.float64) @ x[0, 0]
        torch.testing.assert_close(got, want[0, 0])
