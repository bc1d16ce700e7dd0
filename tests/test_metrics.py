"""Approximation error, both counts of multiply-adds, Score, the SVD baseline, evaluation and timing."""

import json
import math
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lomacs_fast import metrics, reference
from lomacs_fast.metrics import (
    TrueMacCounter,
    ae_terms,
    contest_macs,
    eager_twin,
    evaluate,
    parameter_count,
    register_macs,
    score,
    time_per_channel,
    true_macs,
    truncated_svd,
)

PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::convolution")


def channels(*shape, dtype=torch.complex64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def small_net(**kwargs):
    torch.manual_seed(0)
    sizes = {"M": 12, "N": 10, "r": 6, "n_scene": 4, "dim": 16, "groups": 2, "k_len": 8, "gate_hidden": 8}
    return reference.LoMACSSVDNet(**sizes | kwargs)


class TestApproximationError:
    def test_terms_are_the_formula(self):
        H, U, V = channels(3, 9, 7), channels(3, 9, 4, seed=1), channels(3, 7, 4, seed=2)
        S = torch.rand(3, 4)
        terms = ae_terms(U, S, V, H)
        for i in range(3):
            h, u, v = (x[i].numpy().astype(np.complex128) for x in (H, U, V))
            s = np.diag(S[i].numpy().astype(np.float64))
            expected = (
                np.linalg.norm(h - u @ s @ v.conj().T) / np.linalg.norm(h),
                np.linalg.norm(u.conj().T @ u - np.eye(4)),
                np.linalg.norm(v.conj().T @ v - np.eye(4)),
            )
            np.testing.assert_allclose([float(t[i]) for t in terms], expected, rtol=1e-13)
            assert float(terms.ae[i]) == pytest.approx(sum(expected), rel=1e-13)

    def test_truncated_svd_leaves_the_tail(self):
        H = channels(5, 9, 7, dtype=torch.complex128)
        U, S, V = truncated_svd(H, 4)
        s = torch.linalg.svdvals(H)
        terms = ae_terms(U, S, V, H)
        tail = s[:, 4:].norm(dim=-1) / s.norm(dim=-1)
        torch.testing.assert_close(terms.rec, tail, rtol=1e-12, atol=0)
        assert terms.ortho_u.max() < 1e-13
        assert terms.ortho_v.max() < 1e-13

    def test_zero_channel(self):
        H = torch.zeros(2, 6, 5, dtype=torch.complex64)
        U, _, V = truncated_svd(channels(2, 6, 5), 3)
        S = torch.tensor([[0.0, 0, 0], [3, 4, 0]])
        rec = ae_terms(U, S, V, H).rec
        assert rec[0] == 0
        assert float(rec[1]) == pytest.approx(5, rel=1e-6)

    def test_scale_of_the_channel_does_not_matter(self):
        H = channels(2, 6, 5)
        U, S, V = truncated_svd(H, 3)
        S = 0.9 * S
        expected = ae_terms(U, S, V, H).rec
        for scale in (1e-30, 1e25):
            torch.testing.assert_close(ae_terms(U, S * scale, V, H * scale).rec, expected, rtol=1e-5, atol=0)

    @pytest.mark.parametrize(
        ("name", "change"),
        [("U", (3, 8, 4)), ("S", (3, 1)), ("S", (2, 4)), ("V", (3, 9, 4)), ("V", (3, 7, 1)), ("H", (3,))],
    )
    def test_shapes_that_do_not_fit(self, name, change):
        shapes = {"U": (3, 9, 4), "S": (3, 4), "V": (3, 7, 4), "H": (3, 9, 7)} | {name: change}
        with pytest.raises(ValueError, match="must have"):
            ae_terms(*(torch.zeros(shapes[key]) for key in "USVH"))

    def test_complex_spectrum(self):
        with pytest.raises(TypeError, match="S must be real"):
            ae_terms(*(torch.zeros(shape, dtype=torch.cfloat) for shape in ((4, 2), (2,), (3, 2), (4, 3))))

    def test_score(self):
        assert score(0.25, 3.24) == pytest.approx(28.24)


class TestTruncatedSvd:
    @pytest.mark.parametrize(("M", "N", "r"), [(9, 7, 7), (5, 8, 3), (4, 4, 1)])
    def test_convention(self, M, N, r):
        H = channels(2, M, N, dtype=torch.complex128)
        U, S, V = truncated_svd(H, r)
        assert (U.shape, S.shape, V.shape) == ((2, M, r), (2, r), (2, N, r))
        torch.testing.assert_close((U.mH @ H @ V), torch.diag_embed(S).to(H.dtype), rtol=1e-12, atol=1e-12)
        assert not V.is_conj()
        assert (S.diff(dim=-1) <= 0).all()

    @pytest.mark.parametrize("r", [0, 6])
    def test_rank_out_of_range(self, r):
        with pytest.raises(ValueError, match="r must lie between 1 and"):
            truncated_svd(channels(7, 5), r)


class TestContestCount:
    @pytest.mark.parametrize(("size", "r", "published"), [(64, 32, 3.24), (128, 64, 12.40)])
    def test_published_figures(self, size, r, published):
        net = reference.LoMACSSVDNet(size, size, r, 4)
        assert contest_macs(net) / 1e6 == pytest.approx(published, rel=0.01)

    def test_leaves_everything_as_it_was(self):
        # sizes of its own: a count is measured once an architecture
        net = small_net(k_len=13).double().train()
        before, state = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
        environment = dict(os.environ)
        count = contest_macs(net)
        assert torch.equal(torch.get_rng_state(), state)
        assert count == contest_macs(small_net(k_len=[13], temperature=0.5))
        assert count > contest_macs(small_net(k_len=12))
        assert net.training
        assert dict(os.environ) == environment
        for key, value in net.state_dict().items():
            assert value.dtype == torch.float64
            assert torch.equal(value, before[key])

    def test_twin_has_the_same_weights(self):
        net = small_net().double()
        state = torch.get_rng_state()
        twin = eager_twin(net)
        assert torch.equal(torch.get_rng_state(), state)
        assert type(twin) is reference.LoMACSSVDNet
        assert not twin.training
        H = channels(2, 12, 10)
        for a, b in zip(twin(H, 1), net(H.to(torch.complex128), 1), strict=True):
            torch.testing.assert_close(a.to(b.dtype), b, rtol=1e-4, atol=1e-5)
        assert twin.pos.data_ptr() != net.pos.data_ptr()

    def test_says_nothing(self):
        code = (
            "from lomacs_fast.metrics import contest_macs; from lomacs_fast.reference import LoMACSSVDNet; "
            "print(contest_macs(LoMACSSVDNet(8, 8, 4, 1, dim=8, groups=2)) > 0)"
        )
        env = {key: value for key, value in os.environ.items() if not key.startswith("KINETO")}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120
        )
        assert (done.stdout.strip(), done.stderr) == ("True", "")


R, C = torch.float32, torch.complex64
CALLS = {
    "mm": (lambda a, b: a @ b, [(R, 3, 4), (R, 4, 5)], 60),
    "complex mm": (lambda a, b: a @ b, [(C, 3, 4), (C, 4, 5)], 240),
    "conjugate": (lambda a, b: a.mH @ b, [(C, 4, 3), (C, 4, 5)], 240),
    "bmm": (lambda a, b: a @ b, [(R, 2, 3, 4), (R, 2, 4, 5)], 120),
    "mv": (lambda a, b: a @ b, [(C, 3, 4), (C, 4)], 48),
    "linear": (torch.nn.functional.linear, [(R, 2, 4), (R, 3, 4), (R, 3)], 24),
    "scaled addmm": (lambda c, a, b: torch.addmm(c, a, b, beta=2), [(R, 3, 5), (R, 3, 4), (R, 4, 5)], 67.5),
    "grouped conv": (
        lambda x, w: torch.nn.functional.conv1d(x, w, padding=1, groups=2),
        [(R, 1, 4, 7), (R, 6, 2, 3)],
        6 * 7 * 2 * 3,
    ),
    "transposed conv": (torch.nn.functional.conv_transpose1d, [(R, 1, 4, 7), (R, 4, 5, 3)], 4 * 7 * 5 * 3),
    "fft2": (torch.fft.fft2, [(C, 3, 8, 16)], 3 * 128 * 5 * 7 / 2),
    "rfft": (torch.fft.rfft, [(R, 3, 16)], 3 * 16 * 2.5 * 4 / 2),
    "irfft": (torch.fft.irfft, [(C, 3, 9)], 3 * 16 * 2.5 * 4 / 2),
    "add": (torch.add, [(R, 4, 1), (R, 5)], 10),
    "complex add": (torch.add, [(C, 4), (C, 4)], 4),
    "scaled sub": (lambda a, b: torch.sub(a, b, alpha=2), [(R, 4), (R, 4)], 4),
    "mul": (torch.mul, [(R, 4), (R, 4)], 2),
    "mixed mul": (torch.mul, [(C, 4), (R, 4)], 4),
    "complex mul": (torch.mul, [(C, 4), (C, 4)], 12),
    "scalar mul": (lambda a: a * 2j, [(C, 4)], 12),
    "in place": (lambda a, b: a.mul_(b), [(R, 4), (R, 4)], 2),
    "out": (lambda a, b: torch.mul(a, b, out=torch.empty(4)), [(R, 4), (R, 4)], 2),
    "div": (torch.div, [(R, 4), (R, 4)], 8),
    "complex div": (torch.div, [(C, 4), (C, 4)], 34),
    "div by real": (torch.div, [(C, 4), (R, 4)], 16),
    "square": (torch.square, [(R, 4)], 2),
    "power": (lambda a: a**0.3, [(R, 4)], 32),
    "sqrt": (torch.sqrt, [(R, 4)], 8),
    "exp": (torch.exp, [(R, 4)], 16),
    "magnitude": (torch.abs, [(C, 4)], 14),
    "sigmoid": (torch.sigmoid, [(R, 4)], 28),
    "softmax": (lambda a: torch.softmax(a, -1), [(R, 2, 4)], 60),
    "sum": (torch.sum, [(R, 4, 5)], 10),
    "complex mean": (lambda a: a.mean(-1), [(C, 4, 5)], 20 + 16),
    "norm": (lambda a: torch.linalg.vector_norm(a, dim=-1), [(R, 4, 5)], 20 + 8),
    "complex norm": (lambda a: torch.linalg.vector_norm(a, dim=-1), [(C, 4, 5)], 40 + 8),
    "layer norm": (lambda a: torch.nn.functional.layer_norm(a, (8,)), [(R, 4, 8)], (7 * 32 + 17 * 4) / 2),
    "pooling": (lambda a: torch.nn.functional.avg_pool2d(a, 2), [(R, 1, 2, 4, 6)], 24),
    "interpolation": (
        lambda a: torch.nn.functional.interpolate(a, size=(4, 6), mode="bilinear"),
        [(R, 1, 2, 2, 3)],
        216,
    ),
    "sort": (lambda a: a.sort(dim=0), [(R, 8, 3)], 36),
    "comparison": (lambda a: a > 0, [(R, 4)], 2),
    "thin svd": (lambda a: torch.linalg.svd(a, full_matrices=False), [(R, 6, 3)], (14 * 54 + 8 * 27) / 2),
    "complex qr": (torch.linalg.qr, [(C, 6, 3)], 4 * 18 * 5 * 2 / 2),
    "movement": (
        lambda a: torch.cat([a.mH.clone().mT, a.roll(1)]).flatten()[::2].contiguous(),
        [(C, 4, 5)],
        0,
    ),
}


class TestTrueCount:
    @pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference"])
    @pytest.mark.parametrize("call", CALLS)
    def test_table(self, call, inference):
        fn, shapes, expected = CALLS[call]
        inputs = [torch.randn(*shape, dtype=dtype) for dtype, *shape in shapes]
        with torch.inference_mode(inference), torch.no_grad(), TrueMacCounter() as counter:
            fn(*inputs)
        assert not counter.uncounted
        assert counter.macs == pytest.approx(expected)
        assert sum(counter.by_op.values()) == pytest.approx(expected)

    def test_integers_count_nothing(self):
        a = torch.arange(6)
        with TrueMacCounter() as counter:
            (a * a + a).sum()
            torch.bitwise_xor(a, a)
        assert counter.macs == 0
        assert not counter.uncounted

    def test_unknown_op_is_reported(self):
        x = torch.rand(4)
        with TrueMacCounter() as counter:
            torch.special.bessel_j0(x)
            torch.special.bessel_j0(x)
            torch.linalg.vector_norm(x, 3)
        assert counter.uncounted == {"aten::special_bessel_j0": 2, "aten::linalg_vector_norm": 1}
        with pytest.warns(RuntimeWarning, match="aten::special_bessel_j0"):
            true_macs(torch.special.bessel_j0, x)

    def test_backward_is_counted(self):
        a, b = torch.randn(3, 4, requires_grad=True), torch.randn(4, 5, requires_grad=True)
        with TrueMacCounter() as counter:
            (a @ b).backward(torch.ones(3, 5))
        assert counter.by_op["aten::mm"] == 3 * 60

    def test_convolution_backward_is_counted(self):
        x, w = torch.randn(2, 4, 7, requires_grad=True), torch.randn(6, 2, 3, requires_grad=True)
        y = torch.nn.functional.conv1d(x, w, groups=2)
        with TrueMacCounter() as counter:
            y.backward(torch.ones_like(y))
        assert counter.macs == 2 * (2 * 6 * 5) * 2 * 3

    def test_products_agree_with_flop_counter(self):
        net = small_net(depth=4, k_len=7)
        blocks = net.blocks
        x = torch.randn(3, 12, 16)
        with torch.no_grad(), TrueMacCounter() as counter, FlopCounterMode(display=False) as flops:
            for block in blocks:
                x = block(x)
        products = sum(counter.by_op[name] for name in PRODUCTS)
        assert products == flops.get_total_flops() / 2
        assert products > 0

    def test_products_of_the_default_network_by_hand(self):
        M = N = T = 64
        r = a = k = 32
        d, g, groups, taps = 64, 16, 4, 3
        gate = 2 * 32 * (M + N)
        attention = groups * (2 * T * g * a + 2 * T * g * g + k * T * (a + g) + T * k * (a + g))
        conv = 2 * d * T * taps + T * d * d
        heads = d * (2 * M * r + 2 * N * r + r)
        refine = 4 * 2 * (M + N) * r * r
        calibrate = 4 * (r * M * N + r * N * r)
        net, H = reference.LoMACSSVDNet(M, N, r, 4), channels(2, M, N)
        with torch.no_grad(), TrueMacCounter() as counter:
            net(H, 0)
        assert not counter.uncounted
        products = sum(counter.by_op[name] for name in PRODUCTS) / 2
        assert products == gate + T * 4 * N * d + attention + conv + heads + refine + calibrate
        assert counter.by_op["aten::_fft_c2c"] / 2 == 2 * 2.5 * M * N * 12
        # everything else together is small, and is there
        rest = counter.macs / 2 - products - counter.by_op["aten::_fft_c2c"] / 2
        assert 0.02 * products < rest < 0.15 * products

    @pytest.mark.parametrize("inference", [False, True])
    @pytest.mark.parametrize("depth", [0, 1, 4])
    def test_network_leaves_nothing_uncounted(self, depth, inference):
        net = small_net(depth=depth)
        H = channels(3, 12, 10)
        with torch.inference_mode(inference), TrueMacCounter() as counter:
            net(H, torch.tensor([0, 1, 3]))
        assert not counter.uncounted
        assert counter.macs > 0

    def test_training_step_leaves_nothing_uncounted(self):
        net = small_net(depth=3)
        H = channels(3, 12, 10)
        with TrueMacCounter() as counter:
            U, S, V, _ = net(H, 0)
            forward = counter.macs
            weights = {"lam": 0.3, "w_energy": 0.4, "w_diag": 0.3, "w_match": 0.3}
            loss, _ = reference.aeplus_loss(U, S, V, H, **weights)
            loss.backward()
        assert not counter.uncounted
        assert counter.macs > 3 * forward

    def test_per_sample(self):
        net = small_net()
        one = true_macs(net)
        # only the two learned step sizes do not grow with the batch
        assert true_macs(net, channels(16, 12, 10), 0) == pytest.approx(one, rel=1e-3)
        assert true_macs(net, channels(1, 12, 10), 0) == one
        assert true_macs(net.double()) == one
        assert true_macs(torch.mul, torch.ones(4, 5), 2.0) == 2.5
        assert true_macs(lambda: torch.ones(4) * 2, samples=2) == 1
        with pytest.raises(ValueError, match="samples must be given"):
            true_macs(lambda: torch.ones(4) * 2)

    def test_custom_ops(self):
        @torch.library.custom_op("lomacs_test::twice", mutates_args=())
        def twice(x: torch.Tensor, times: int = 2) -> torch.Tensor:
            return x * times

        x = torch.ones(3, 4)
        with TrueMacCounter() as counter:
            twice(x)
        assert counter.uncounted == {"lomacs_test::twice": 1}
        assert counter.macs == 0
        packet = torch.ops.lomacs_test.twice
        for i, op in enumerate((twice, packet, packet.default, "lomacs_test::twice")):
            register_macs(op, lambda x, times=2, *, out, i=i: 100 * i + out.numel() * times)
            assert true_macs(twice, x, 5) == (100 * i + 60) / 3
        register_macs(packet, lambda *_, **__: None)
        with TrueMacCounter() as counter:
            twice(x)
        assert counter.uncounted == {"lomacs_test::twice": 1}
        with pytest.raises(ValueError, match="op must be an op"):
            register_macs("twice", lambda *_, **__: 0)

    def test_results_are_untouched(self):
        net = small_net()
        H = channels(2, 12, 10)
        expected = net(H, 0)
        with TrueMacCounter():
            actual = net(H, 0)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def batches(sizes=((1, 3), (2, 1), (1, 4), (2, 2)), M=9, N=7, scale=1.0):
    for seed, (scenario, size) in enumerate(sizes):
        label = scale * channels(size, M, N, seed=seed)
        H = label + 0.1 * scale * channels(size, M, N, seed=100 + seed)
        yield scenario, torch.full((size,), scenario - 1), H, label


class TestEvaluate:
    def test_means_over_samples(self):
        result = evaluate(lambda H, sid: truncated_svd(H, 4), batches())
        assert json.loads(json.dumps(result)) == result
        terms = {1: [], 2: []}
        for scenario, _, H, label in batches():
            terms[scenario].append(torch.stack(ae_terms(*truncated_svd(H, 4), label)))
        everything = torch.cat([t for group in terms.values() for t in group], 1).mean(1)
        assert result["samples"] == 10
        for key, expected in zip(("rec", "ortho_u", "ortho_v"), everything, strict=True):
            assert result[key] == pytest.approx(float(expected), rel=1e-12)
        assert result["ae"] == pytest.approx(float(everything.sum()), rel=1e-12)
        assert list(result["scenarios"]) == ["1", "2"]
        for scenario, samples in ((1, 7), (2, 3)):
            part = result["scenarios"][str(scenario)]
            assert part["samples"] == samples
            mean = torch.cat(terms[scenario], 1).mean(1)
            assert part["ae"] == pytest.approx(float(mean.sum()), rel=1e-12)

    def test_own_scale_and_scenario_index(self):
        seen = []

        def decompose(H, sid):
            seen.extend(sid.tolist())
            return truncated_svd(H, 7)

        small = evaluate(decompose, batches(scale=1e-6))
        assert small["rec"] == pytest.approx(evaluate(decompose, batches())["rec"], rel=1e-4)
        assert seen[:10] == [0, 0, 0, 1, 0, 0, 0, 0, 1, 1]

    def test_no_gradients_and_zero_channels(self):
        def decompose(H, sid):
            assert not torch.is_grad_enabled()
            U, S, V = truncated_svd(channels(len(H), 5, 4), 3)
            return U, torch.zeros_like(S), V

        zero = torch.zeros(2, 5, 4, dtype=torch.complex64)
        result = evaluate(decompose, [(3, 0, zero, zero)])
        assert result["rec"] == 0
        assert result["ae"] < 1e-5

    @pytest.mark.parametrize("culprit", ["U", "S", "V", "label"])
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_non_finite(self, culprit, value):
        def broken():
            for scenario, sid, H, label in batches():
                if culprit == "label" and scenario == 2:
                    label[0, 1, 2] = value
                yield scenario, sid, H, label

        def decompose(H, sid):
            factors = dict(zip("USV", truncated_svd(H, 4), strict=True))
            if culprit in factors and sid[0] == 1:
                factors[culprit][0, ..., 1] = value
            return tuple(factors.values())

        with pytest.raises(ValueError, match=rf"in .*{culprit} at sample 0 of batch 1, scenario 2"):
            evaluate(decompose, broken())

    def test_nothing_to_evaluate(self):
        with pytest.raises(ValueError, match="at least one sample"):
            evaluate(lambda H, sid: truncated_svd(H, 2), batches([(1, 0)]))


class TestTiming:
    def test_interleaves_and_divides_by_channels(self):
        order = []

        def slow(x, y):
            order.append("slow")
            time.sleep(0.004)

        def fast(x, y):
            order.append("fast")

        batch = (torch.zeros(8, 3), 1)
        result = time_per_channel({"slow": slow, "fast": fast}, batch, repeats=5, warmup=0.0, least=0.0)
        assert json.loads(json.dumps(result)) == result
        assert order[:6] == ["slow"] * 3 + ["fast"] * 3
        assert order[6:] == ["slow", "fast", "fast", "slow"] * 2 + ["slow", "fast"]
        slow_time = result["slow"]
        assert slow_time["min"] >= 0.004 / 8
        assert slow_time["min"] <= slow_time["q25"] <= slow_time["median"] <= slow_time["q75"]
        assert slow_time["median"] > 5 * result["fast"]["median"]

    def test_short_calls_are_repeated(self):
        result = time_per_channel({"add": lambda x: x + 1}, torch.zeros(4), repeats=2, warmup=0.0, least=0.01)
        assert result["add"]["calls"] > 10
        assert result["add"]["median"] < 0.01

    @pytest.mark.parametrize(
        ("fns", "batch", "repeats", "message"),
        [
            ({}, torch.zeros(2), 1, "fns must name"),
            ({"a": abs}, torch.zeros(0, 3), 1, "batch must"),
            ({"a": abs}, (1, 2), 1, "batch must"),
            ({"a": abs}, torch.zeros(2), 0, "repeats must be at least 1, got 0"),
        ],
    )
    def test_bad_input(self, fns, batch, repeats, message):
        with pytest.raises(ValueError, match=message):
            time_per_channel(fns, batch, repeats=repeats)


def test_parameter_count():
    net = small_net()
    net.pos.requires_grad_(False)
    assert parameter_count(net) == sum(math.prod(value.shape) for value in net.state_dict().values())


def test_water_filling_is_the_best_split():
    gains = torch.tensor([[4.0, 1.0, 0.1], [0.0, 0.0, 0.0], [2.0, 2.0, 0.0]])
    p = metrics.water_filling(gains, 1.0)
    torch.testing.assert_close(p.sum(-1), torch.ones(3, dtype=torch.float64))
    # by hand: the level is (1 + 1/4 + 1) / 2
    torch.testing.assert_close(p[0], torch.tensor([0.875, 0.125, 0.0], dtype=torch.float64))
    torch.testing.assert_close(p[2], torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64))
    rate = torch.log2(1 + p[0] * gains[0]).sum()
    draws = torch.rand(200, 3, generator=torch.Generator().manual_seed(0)).double()
    others = torch.log2(1 + draws / draws.sum(-1, keepdim=True) * gains[0]).sum(-1)
    assert (others <= rate + 1e-12).all()


def test_spectral_efficiency_of_the_exact_factors():
    H = torch.randn(3, 6, 5, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    U, S, V = metrics.truncated_svd(H, 5)
    gains = (S * (30**0.5 / torch.linalg.matrix_norm(H))[:, None]).square()
    for snr in (-10.0, 30.0):
        power = 10 ** (snr / 10)
        equal = torch.log2(1 + power / 5 * gains).sum(-1)
        torch.testing.assert_close(metrics.spectral_efficiency(U, S, V, H, snr), equal)
        water = metrics.spectral_efficiency(U, S, V, H, snr, allocation="water")
        p = metrics.water_filling(gains, power)
        torch.testing.assert_close(water, torch.log2(1 + p * gains).sum(-1))
        assert (water >= equal - 1e-12).all()
    # columns of another length are the same precoder and combiner, mixed ones interfere
    torch.testing.assert_close(metrics.spectral_efficiency(3 * U, S, 2 * V, H, 30.0), equal)
    Q = torch.linalg.qr(torch.randn(5, 5, dtype=torch.complex128))[0]
    assert (metrics.spectral_efficiency(U, S, V @ Q, H, 30.0) < equal).all()
    with pytest.raises(ValueError, match="allocation"):
        metrics.spectral_efficiency(U, S, V, H, 0.0, allocation="fair")


def test_chordal_distance():
    eye = torch.eye(6, dtype=torch.complex128)
    A, B = eye[:, :2], eye[:, 1:3]
    mixed = A @ torch.tensor([[2.0, 1.0], [0.0, 3.0]], dtype=torch.complex128)
    assert metrics.chordal_distance(A, mixed) < 1e-7
    assert float(metrics.chordal_distance(A, B)) == pytest.approx(1)
    assert float(metrics.chordal_distance(A, eye[:, 4:])) == pytest.approx(2**0.5)
    with pytest.raises(ValueError, match="one shape"):
        metrics.chordal_distance(A, eye)


def test_baselines_with_the_floor_subtracted():
    X = torch.randn(2, 8, 3, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    clean = X @ X.mH
    H = clean + 0.5 * torch.eye(8)
    for found in (metrics.truncated_svd, metrics.truncated_eigh):
        U, S, V = found(H, 4, floor=True)
        torch.testing.assert_close((U * S[:, None]) @ V.mH, clean)
        U, S, V = found(H, 8)
        torch.testing.assert_close((U * S[:, None]) @ V.mH, H)
    U, S, V = metrics.truncated_eigh(-H, 8)
    torch.testing.assert_close((U * S[:, None]) @ V.mH, -H)
    U, S, V = metrics.lowrank_svd(H, 6, 4, floor=True)
    assert U.shape == (2, 8, 6)
    # random projections: near the best four, not exactly them
    torch.testing.assert_close((U * S[:, None]) @ V.mH, clean, rtol=1e-2, atol=1e-2)
