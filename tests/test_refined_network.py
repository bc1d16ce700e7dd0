"""The network with refinement: accuracy, steps, what goes with it and what refuses it."""

import pytest
import torch

import lomacs_fast
from lomacs_fast import LoMACSSVDNet, audit, freeze, reference
from lomacs_fast.data.generator import SCENARIOS, ChannelGenerator
from lomacs_fast.inference import decompose
from lomacs_fast.metrics import ae_terms, contest_macs, score, truncated_svd
from lomacs_fast.pruning import prune
from lomacs_fast.training import PRESETS

SMALL = {"head": "angular", "refine_steps": 2, "active": 5, "hermitian": True, "array": (2, 2, 3)}


@pytest.fixture(scope="module")
def covariances():
    parts = [ChannelGenerator(64, 64, scenario=s, seed=7).batch(range(6)) for s in SCENARIOS]
    H, label = (torch.cat([getattr(p, name) for p in parts]) for name in ("input", "label"))
    return H, label, torch.arange(4).repeat_interleave(6)


def small(**kwargs):
    torch.manual_seed(0)
    return LoMACSSVDNet(12, 12, 8, 3, gate_hidden=2, **(SMALL | kwargs))


def sample(n=12, batch=4, dtype=torch.complex64):
    X = torch.randn(batch, n, 4, dtype=dtype, generator=torch.Generator().manual_seed(1))
    H = X @ X.mH + 0.1 * torch.eye(n)
    return H / torch.linalg.matrix_norm(H)[:, None, None]


def test_the_published_network_is_the_default():
    net = LoMACSSVDNet(12, 10, 5, 3)
    assert net.trained_steps == 0
    assert not [name for name in net.state_dict() if "refine" in name.replace("ortho_refine", "")]
    assert "refine_steps" not in net.config


def test_more_accurate_than_the_svd_even_untrained(covariances):
    H, label, sid = covariances
    net = LoMACSSVDNet(64, 64, 32, 4, gate_hidden=8, head="angular", refine_steps=4, active=24, hermitian=True,
                       array=(2, 4, 8)).eval()  # fmt: skip
    terms = ae_terms(*decompose(net, H, sid), label)
    base = ae_terms(*truncated_svd(H, 32), label).ae.mean()
    assert terms.ae.mean() < 0.75 * base
    assert (terms.ortho_u + terms.ortho_v).max() < 1e-5
    assert score(float(terms.ae.mean()), contest_macs(net) / 1e6) < 10


@pytest.mark.parametrize(("name", "most", "best"), [("64x64x32", 0.72, 10.0), ("128x128x64", 0.82, 16.0)])
def test_the_pretrained_networks_keep_the_promise(name, most, best):
    M, _, r = map(int, name.split("x"))
    net = lomacs_fast.load_pretrained(name)
    found, base = [], []
    for sid, scenario in enumerate(SCENARIOS):
        pair = ChannelGenerator(M, M, scenario=scenario, seed=12).batch(range(6))
        found.append(ae_terms(*decompose(net, pair.input, sid), pair.label).ae)
        base.append(ae_terms(*truncated_svd(pair.input, r), pair.label).ae)
    ae = torch.cat(found).mean()
    assert ae < most * torch.cat(base).mean()
    assert score(float(ae), contest_macs(net) / 1e6) < best
    # what ships is what the preset makes, and what `benchmarks/bench_refine.py --trained` times
    assert (net.refiner.active, net.trained_steps) == (8 + r // 4, PRESETS["refined"]["refine_steps"])
    training = net.facts["training"]
    assert training["max_epochs"] * 4 * 0.9 * training["samples"] / training["batch_size"] >= 2000
    assert net.facts["ae"] == pytest.approx(float(ae), rel=0.15)


def test_pretrained_names_are_checked(tmp_path):
    with pytest.raises(ValueError, match="64x64x32, got 'x'"):
        lomacs_fast.load_pretrained("x")
    with pytest.raises(TypeError, match="name"):
        lomacs_fast.load_pretrained(64)
    (tmp_path / "bad.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"bad\.npz"):
        lomacs_fast.pretrained.load_weights(tmp_path / "bad.npz")


@pytest.mark.parametrize(
    "kwargs", [{}, {"hermitian": False, "array": None}, {"head": "pooled", "array": None}]
)
def test_refined_factors(kwargs):
    net, H = small(**kwargs), sample()
    H[3] = 0
    for n in (0, 1, 5):
        net.set_refine_steps(n)
        U, S, V, Hd = net(H, 0)
        if n or net.head == "angular":
            terms = ae_terms(U, S, V, Hd)
            assert (terms.ortho_u + terms.ortho_v).max() < 1e-4
            assert (S.diff(dim=-1) <= 0).all()
        assert (S >= 0).all()
        assert not S[3].any()
        assert U.isfinite().all()
    loss = (net(H[:3], 0)[1] ** 2).sum()
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
    assert net.refiner.raw.grad.abs().sum() > 0


def test_beyond_the_trained_steps_the_last_scalars_repeat():
    net, H = small(), sample()
    with torch.no_grad():
        net.refiner.raw.add_(torch.randn_like(net.refiner.raw))
    longer = small(refine_steps=4)
    state = net.state_dict()
    state["refiner.raw"] = torch.cat([state["refiner.raw"], state["refiner.raw"][-1:].expand(2, -1)])
    longer.load_state_dict(state)
    net.set_refine_steps(4)
    torch.testing.assert_close(net(H, 0)[:2], longer(H, 0)[:2], rtol=0, atol=0)


def test_fewer_columns_are_those_of_a_network_with_so_many():
    net, H = small(), sample()
    narrow = small(active=3)
    narrow.load_state_dict(net.state_dict())
    net.set_refine_steps(2, 3)
    assert net.config == narrow.config
    torch.testing.assert_close(net(H, 0)[:2], narrow(H, 0)[:2], rtol=0, atol=0)
    for active, error in ((9, ValueError), (0, ValueError), (2.0, TypeError)):
        with pytest.raises(error, match="active"):
            net.set_refine_steps(2, active)
    with pytest.raises(ValueError, match="refine_steps must be 0"):
        LoMACSSVDNet(12, 12, 8, 3).set_refine_steps(0, 2)


def test_single_precision_is_near_double():
    net, H = small(), sample(dtype=torch.complex128)
    U, S, V, _ = net(H.to(torch.complex64), 1)
    exact = net.double()(H, 1)
    torch.testing.assert_close(S.double(), exact[1], rtol=1e-3, atol=1e-5)
    product = [(u * s[:, None]) @ v.mH for u, s, v in ((U, S, V), exact[:3])]
    torch.testing.assert_close(product[0].to(torch.complex128), product[1], rtol=1e-3, atol=1e-4)


def test_config_state_and_reference_agree():
    net, H = small(), sample()
    twin = type(net)(**net.config)
    twin.load_state_dict(net.state_dict())
    assert twin.config == net.config
    plain = reference.LoMACSSVDNet(**net.config)
    plain.load_state_dict(net.state_dict())
    for x, y, z in zip(net(H, 2), twin(H, 2), plain(H, 2), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
        torch.testing.assert_close(x, z, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_keeps_it(tmp_path):
    from lomacs_fast.training import load_network, save_network

    net = small()
    save_network(net, tmp_path / "net.ckpt", scenarios=(1, 2, 3))
    other, _ = load_network(tmp_path / "net.ckpt")
    assert other.config == net.config
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_what_does_not_go_with_it_says_so():
    with pytest.raises(ValueError, match="freeze takes the published network"):
        freeze(small(head="pooled", array=None))
    with pytest.raises(ValueError, match="pooled head"):
        prune(small(), gate_hidden=1)
    with pytest.raises(ValueError, match="refine_steps must be 0"):
        LoMACSSVDNet(12, 12, 8, 3).set_refine_steps(1)


def test_the_pooled_head_is_pruned_with_its_refinement():
    net = small(head="pooled", array=None)
    net.set_refine_steps(3)
    pruned, report = prune(net, k_len=3)
    assert (pruned.trained_steps, pruned.refine_steps, pruned.refiner.active) == (2, 3, 5)
    assert torch.equal(pruned.refiner.raw, net.refiner.raw)
    assert report.after["macs_m"] < report.before["macs_m"]


def test_the_audit_covers_it():
    H = sample(batch=1)
    found = audit(small().eval(), H, torch.zeros(1, dtype=torch.long))
    assert not [op for op in found.operators if op.forbidden]


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"head": "token"}, "head"),
        ({"refine_steps": 0}, "refine_steps"),
        ({"refine_steps": -1}, "refine_steps"),
        ({"active": 9}, "active"),
        ({"active": 0}, "active"),
        ({"hermitian": 1}, "hermitian"),
        ({"array": (2, 2, 2)}, "array"),
        ({"head": "pooled"}, "array"),
        ({"N": 10}, "hermitian"),
    ],
)
def test_refused_arguments(kwargs, name):
    arguments = {"M": 12, "N": 12, "r": 8, "n_scene": 3} | SMALL | kwargs
    with pytest.raises((TypeError, ValueError), match=name):
        LoMACSSVDNet(**arguments)
