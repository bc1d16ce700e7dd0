"""Pruning against the masked original, targets, reports and the sweep."""

import copy
import itertools
import json
import math

import pytest
import torch

from lomacs_fast import nn as fast
from lomacs_fast import reference
from lomacs_fast.metrics import contest_macs, parameter_count, true_macs
from lomacs_fast.pruning import column_scores, hidden_scores, prune, sweep

SIZES = {"M": 12, "N": 9, "r": 6, "n_scene": 3, "dim": 16, "groups": 2, "k_len": 32, "gate_hidden": 10}


def make(cls=reference.LoMACSSVDNet, seed=0, **kwargs):
    torch.manual_seed(seed)
    net = cls(**SIZES | kwargs)
    with torch.no_grad():
        # weights away from their start, where some are zero
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net


def channels(batch=4, M=12, N=9, dtype=torch.complex128):
    return torch.randn(batch, M, N, dtype=dtype, generator=torch.Generator().manual_seed(5))


class MaskedAttention(torch.nn.Module):
    """The attention with the logits of the dropped columns at -inf."""

    def __init__(self, attention, columns):
        super().__init__()
        self.attention, self.columns = attention, columns

    def forward(self, x):
        a = self.attention
        out = []
        for g, xg in enumerate(x.chunk(a.groups, -1)):
            q, k, v = a.qs[g](xg), a.ks[g](xg), a.vs[g](xg)
            logits = q @ (a.Pk[g].T @ k).mT / math.sqrt(a.att_dim)
            dropped = torch.ones(a.k_len, dtype=torch.bool)
            dropped[self.columns[g]] = False
            weights = torch.softmax(logits.masked_fill(dropped, -math.inf), -1)
            out.append(a.os[g](weights @ (a.Pv[g].T @ v)))
        return torch.cat(out, -1)


def masked(net, report):
    net = copy.deepcopy(net)
    for i, columns in zip(range(0, len(net.blocks), 2), report.columns, strict=True):
        net.blocks[i][1] = MaskedAttention(net.blocks[i][1], columns)
    dropped = sorted(set(range(net.gate_hidden)) - set(report.hidden))
    with torch.no_grad():
        for mlp in (net.freq_gate.row_mlp, net.freq_gate.col_mlp):
            mlp[2].weight[:, dropped] = 0
    return net


def assert_same_function(actual, expected):
    for a, b in zip(actual(channels(), 1), expected(channels(), 1), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@torch.no_grad()
def naive_column_scores(net, alpha):
    blocks = []
    for block in list(net.blocks)[::2]:
        pairs = list(zip(block[1].Pk, block[1].Pv, strict=True))
        blocks.append(
            [
                [float((k[:, j] ** 2).sum() + alpha * (v[:, j] ** 2).sum()) for j in range(k.shape[1])]
                for k, v in pairs
            ]
        )
    return blocks


class TestScores:
    @pytest.mark.parametrize("alpha", [0.0, 1.0, 2.5])
    def test_columns(self, alpha):
        net = make(depth=3, k_len=[5, 7]).double()
        scores = column_scores(net, alpha)
        assert [tuple(s.shape) for s in scores] == [(2, 5), (2, 7)]
        for actual, expected in zip(scores, naive_column_scores(net, alpha), strict=True):
            torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))

    @torch.no_grad()
    def test_hidden(self):
        net = make().double()
        row, col = net.freq_gate.row_mlp, net.freq_gate.col_mlp
        expected = [
            sum(float(mlp[0].weight[h].norm() * mlp[2].weight[:, h].norm()) for mlp in (row, col))
            for h in range(10)
        ]
        torch.testing.assert_close(hidden_scores(net), torch.tensor(expected, dtype=torch.float64))

    @pytest.mark.parametrize("alpha", [-1.0, math.nan, math.inf])
    def test_bad_alpha(self, alpha):
        with pytest.raises(ValueError, match=r"alpha must be .*got"):
            prune(make(), k_len=3, alpha=alpha)

    @pytest.mark.parametrize("name", ["blocks.0.1.Pv.1", "freq_gate.col_mlp.0.weight"])
    def test_non_finite_weights(self, name):
        net = make()
        with torch.no_grad():
            net.get_parameter(name)[0, 0] = math.nan
        with pytest.raises(ValueError, match="weights must be finite"):
            prune(net, energy=0.9)


class TestOracle:
    @pytest.mark.parametrize(
        ("cls", "depth", "k_len", "gate_hidden"),
        [
            (reference.LoMACSSVDNet, 0, None, 7),
            (reference.LoMACSSVDNet, 1, 11, 7),
            (reference.LoMACSSVDNet, 2, 28, None),
            (reference.LoMACSSVDNet, 2, None, 7),
            (reference.LoMACSSVDNet, 3, [28, 11], 3),
            (reference.LoMACSSVDNet, 4, 11, 1),
            (fast.LoMACSSVDNet, 2, 28, 7),
            (fast.LoMACSSVDNet, 4, [1, 32], 10),
        ],
    )
    def test_equals_the_masked_original(self, cls, depth, k_len, gate_hidden):
        net = make(cls, depth=depth, seed=depth).double()
        pruned, report = prune(net, k_len=k_len, gate_hidden=gate_hidden)
        assert type(pruned) is cls
        expected = k_len if isinstance(k_len, list) else [k_len or 32] * ((depth + 1) // 2)
        assert report.after["k_len"] == expected
        assert pruned.gate_hidden == report.after["gate_hidden"] == (gate_hidden or 10)
        assert_same_function(pruned, masked(net, report))
        pairs = zip(pruned(channels(), 1), net(channels(), 1), strict=True)
        assert max(float((a - b).detach().abs().max()) for a, b in pairs) > 1e-6

    @pytest.mark.parametrize("target", [{"energy": 0.8}, {"macs": 0.055}])
    def test_other_targets(self, target):
        net = make(depth=4).double()
        pruned, report = prune(net, **target)
        assert max(report.after["k_len"]) < 32
        assert_same_function(pruned, masked(net, report))

    def test_full_size_is_a_copy(self):
        net = make().double()
        pruned, report = prune(net, k_len=32, gate_hidden=10)
        assert report.before == report.after
        assert report.hidden_share == 1
        assert all(torch.equal(a, b) for a, b in zip(pruned(channels(), 1), net(channels(), 1), strict=True))

    def test_keeps_the_largest_in_order(self):
        net = make(depth=3, k_len=[9, 6])
        _, report = prune(net, k_len=4, gate_hidden=6, alpha=2.0)
        for groups, scores in zip(report.columns, naive_column_scores(net, 2.0), strict=True):
            for kept, score in zip(groups, scores, strict=True):
                best = sorted(range(len(score)), key=lambda j, score=score: -score[j])[:4]
                assert kept == sorted(best)
        share = sum(sorted(hidden_scores(net).tolist())[-6:]) / float(hidden_scores(net).sum())
        assert report.hidden_share == pytest.approx(share)
        assert len(report.hidden) == 6

    def test_twice_is_as_once(self):
        net = make(depth=3)
        step, _ = prune(net, k_len=20, gate_hidden=8)
        twice, _ = prune(step, k_len=11, gate_hidden=5)
        once, _ = prune(net, k_len=11, gate_hidden=5)
        for a, b in zip(twice.parameters(), once.parameters(), strict=True):
            assert torch.equal(a, b)


class TestCopy:
    def test_original_untouched_and_nothing_shared(self):
        net = make(depth=3)
        before = copy.deepcopy(net.state_dict())
        state = torch.get_rng_state()
        pruned, _ = prune(net, k_len=32, gate_hidden=7)
        assert torch.equal(torch.get_rng_state(), state)
        for p in [*pruned.parameters(), *pruned.buffers()]:
            p.detach().fill_(7)
        assert net.tau_s == SIZES.get("tau_s", 0.9)
        for key, value in net.state_dict().items():
            assert torch.equal(value, before[key])

    def test_states_are_kept(self):
        net = make(depth=3, temperature=0.3).double()
        net.set_tau_s(0.625)
        net.eval()
        net.blocks[1].train()
        net.u_head.weight.requires_grad_(False)
        net.blocks[0][1].Pk[1].requires_grad_(False)
        pruned, _ = prune(net, k_len=5)
        assert float(pruned.tau_s) == 0.625
        assert pruned.tau_s.dtype == net.tau_s.dtype
        assert pruned.freq_gate.temperature == 0.3
        for (name, a), b in zip(net.named_modules(), pruned.modules(), strict=True):
            assert a.training == b.training, name
        for (name, a), (other, b) in zip(net.named_parameters(), pruned.named_parameters(), strict=True):
            assert (name, a.requires_grad, a.dtype) == (other, b.requires_grad, b.dtype)

    def test_trains_and_reloads(self):
        pruned, _ = prune(make(depth=3), k_len=[11, 5], gate_hidden=7)
        U, S, V, _ = pruned(channels(dtype=torch.complex64), 0)
        (U.abs().sum() + S.sum() + V.abs().sum()).backward()
        assert all(p.grad is not None and p.grad.shape == p.shape for p in pruned.parameters())
        again = type(pruned)(**pruned.config)
        again.load_state_dict(pruned.state_dict(), strict=True)
        for a, b in zip(again(channels(dtype=torch.complex64), 0), (U, S, V), strict=False):
            assert torch.equal(a, b)


class TestTargets:
    @pytest.mark.parametrize("energy", [0.3, 0.9, 0.99])
    def test_energy_is_the_smallest_size(self, energy):
        net = make(depth=3)
        _, report = prune(net, energy=energy)
        knobs = [*column_scores(net), hidden_scores(net).unsqueeze(0)]
        shares = [*report.column_share, [report.hidden_share]]
        sizes = [*report.after["k_len"], report.after["gate_hidden"]]
        for scores, kept, size in zip(knobs, shares, sizes, strict=True):
            assert min(kept) >= energy
            less = scores.sort(-1, descending=True).values[:, : size - 1].sum(-1) / scores.sum(-1)
            assert less.min() < energy

    def test_whole_energy_drops_only_zeros(self):
        net = make()
        with torch.no_grad():
            for g in range(2):
                for P in (net.blocks[0][1].Pk, net.blocks[0][1].Pv):
                    P[g][:, 3 + g] = 0
        _, report = prune(net, energy=1.0)
        assert report.after["k_len"] == [31]
        assert report.after["gate_hidden"] == 10
        assert 3 not in report.columns[0][0]
        assert 4 not in report.columns[0][1]

    def test_equal_scores_follow_the_share(self):
        net = make(k_len=10)
        with torch.no_grad():
            for p in [*net.blocks[0][1].Pk, *net.blocks[0][1].Pv]:
                p.fill_(0.1)
        pruned, report = prune(net, energy=0.9)
        assert pruned.k_len == 9
        assert report.columns[0] == [list(range(9))] * 2

    @pytest.mark.parametrize("share", [0.2, 0.6, 0.9])
    def test_budget(self, share):
        net = make(depth=3)
        full, least = contest_macs(net), contest_macs(prune(net, k_len=1, gate_hidden=1)[0])
        budget = (least + share * (full - least)) / 1e6
        pruned, report = prune(net, macs=budget)
        assert contest_macs(pruned) / 1e6 == report.after["macs_m"] <= budget
        # undoing any one step of some knob goes above the budget
        sizes = [*report.after["k_len"], pruned.gate_hidden]
        above = []
        for i, most in enumerate([32, 32, 10]):
            more = [s + (i == j) for j, s in enumerate(sizes)]
            if more[i] <= most:
                larger, _ = prune(net, k_len=more[:2], gate_hidden=more[2])
                above.append(contest_macs(larger) / 1e6 > budget)
        assert any(above)

    def test_budget_takes_the_cheapest_columns(self):
        net = make(depth=3)
        with torch.no_grad():
            for g, j in itertools.product(range(2), range(12)):
                for P in (net.blocks[2][1].Pk, net.blocks[2][1].Pv):
                    P[g][:, j] *= 1e-6
        step = contest_macs(net) - contest_macs(prune(net, k_len=[32, 31])[0])
        pruned, _ = prune(net, macs=(contest_macs(net) - 12 * step) / 1e6)
        assert (pruned.k_len, pruned.gate_hidden) == ([32, 20], 10)

    def test_budget_bounds(self):
        net = make()
        full, least = contest_macs(net), contest_macs(prune(net, k_len=1, gate_hidden=1)[0])
        assert prune(net, macs=full / 1e6)[0].config == net.config
        smallest, _ = prune(net, macs=least / 1e6)
        assert (smallest.k_len, smallest.gate_hidden) == (1, 1)
        with pytest.raises(ValueError, match=rf"macs must be at least {least / 1e6:.6f}.*got"):
            prune(net, macs=0.99 * least / 1e6)

    def test_budget_of_a_network_without_attention(self):
        net = make(depth=0)
        pruned, report = prune(net, macs=(contest_macs(net) - 1) / 1e6)
        assert pruned.gate_hidden == 9
        assert report.columns == []

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({}, "prune needs one target.*got none"),
            ({"k_len": 3, "energy": 0.9}, "got k_len or gate_hidden and energy"),
            ({"gate_hidden": 3, "macs": 1.0}, "got k_len or gate_hidden and macs"),
            ({"energy": 0.9, "macs": 1.0}, "got energy and macs"),
            ({"k_len": 33}, "k_len must be a whole number between 1 and 32, got 33"),
            ({"k_len": 0}, "k_len must be .*got 0"),
            ({"k_len": 2.5}, "k_len must be .*got 2.5"),
            ({"k_len": True}, "k_len must be .*got True"),
            ({"k_len": [3]}, r"k_len must be a whole number or 2 of them, got \[3\]"),
            ({"k_len": [3, 40]}, r"k_len\[1\] must be a whole number between 1 and 32, got 40"),
            ({"gate_hidden": 11}, "gate_hidden must be a whole number between 1 and 10, got 11"),
            ({"gate_hidden": 0}, "gate_hidden must be .*got 0"),
            ({"energy": 0.0}, "energy must be a share .*got 0"),
            ({"energy": 1.5}, "energy must be .*got 1.5"),
            ({"energy": math.nan}, "energy must be .*got nan"),
            ({"macs": -1.0}, "macs must be a positive number of millions, got -1"),
            ({"macs": math.inf}, "macs must be .*got inf"),
            ({"macs": "3"}, "macs must be .*got '3'"),
        ],
    )
    def test_bad_input(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            prune(make(depth=3), **arguments)

    def test_no_attention_to_prune(self):
        with pytest.raises(ValueError, match="k_len must be left out"):
            prune(make(depth=0), k_len=3)


def test_report_counts_and_is_json():
    net = make(depth=3)
    pruned, report = prune(net, k_len=[5, 7], gate_hidden=4)
    assert report.after == {
        "k_len": [5, 7],
        "gate_hidden": 4,
        "macs_m": contest_macs(pruned) / 1e6,
        "parameters": parameter_count(pruned),
    }
    assert report.before["parameters"] - report.after["parameters"] == 2 * 2 * 12 * (27 + 25) + 2 * 21 * 6
    assert json.loads(json.dumps(report.as_dict())) == report.as_dict()


def test_sweep():
    net = make(depth=3)
    seen = []

    def evaluate_fn(pruned):
        seen.append((pruned.k_len, pruned.gate_hidden))
        return torch.tensor(0.5)

    points = sweep(net, evaluate_fn, iter([32, [5, 7]]), iter([10, 3]))
    assert seen == [(32, 10), (32, 3), ([5, 7], 10), ([5, 7], 3)]
    assert json.loads(json.dumps(points)) == points
    assert [(p["k_len"], p["gate_hidden"]) for p in points] == seen
    first, last = points[0], points[-1]
    assert set(first) == {"k_len", "gate_hidden", "macs_m", "true_macs_m", "parameters", "ae"}
    assert first["ae"] == 0.5
    assert first["macs_m"] == contest_macs(net) / 1e6
    assert first["true_macs_m"] == true_macs(net) / 1e6
    assert first["parameters"] == parameter_count(net)
    assert all(last[key] < first[key] for key in ("macs_m", "true_macs_m", "parameters"))
