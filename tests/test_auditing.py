"""`audit`: every operator of a network is listed, and a decomposition does not hide."""

import pytest
import torch
from torch import nn

import lomacs_fast
from lomacs_fast import audit, functional, reference
from lomacs_fast.auditing import FUSED

SIZES = {"M": 8, "N": 6, "r": 3, "n_scene": 2, "dim": 8, "groups": 2, "k_len": 3, "gate_hidden": 4}


@pytest.mark.parametrize("kind", [lomacs_fast.LoMACSSVDNet, reference.LoMACSSVDNet])
def test_the_network_keeps_the_rules(kind):
    found = audit(kind(**SIZES))
    assert not found.forbidden
    assert found.verdict.endswith("no decomposition, inversion or QR is among them")
    names = {operator.name for operator in found.operators}
    assert len(names) > 5
    assert str(found).splitlines()[-1] == found.verdict


def test_forward_and_backward_are_seen():
    net = reference.LoMACSSVDNet(**SIZES)
    forward, both = audit(net, backward=False), audit(net)
    assert sum(o.calls for o in both.operators) > 1.5 * sum(o.calls for o in forward.operators)
    assert all(p.grad is None for p in net.parameters())
    assert any("fft" in o.name and o.kind == "FFT" for o in forward.operators)


@pytest.mark.parametrize(
    ("fn", "kind"),
    [
        (lambda H: torch.linalg.svd(H)[1], "singular value decomposition"),
        (lambda H: torch.linalg.eigh(H.mH @ H)[0], "eigenvalue decomposition"),
        (lambda H: torch.linalg.qr(H)[0], "QR decomposition"),
        (lambda H: torch.linalg.inv(H.mH @ H), "inversion"),
        (lambda H: torch.linalg.pinv(H), "inversion"),
        (lambda H: torch.linalg.solve(H.mH @ H, H.mH), "linear solver"),
        (lambda H: torch.linalg.cholesky(H.mH @ H), "linear solver"),
        (lambda H: torch.linalg.matrix_exp(H.mH @ H), "matrix function"),
        (lambda H: torch.linalg.det(H.mH @ H), "determinant"),
        (lambda H: torch.svd_lowrank(H, 2)[1], "QR decomposition"),
    ],
)
def test_what_is_out_of_the_rules_is_named(fn, kind):
    H = torch.randn(2, 6, 4, dtype=torch.complex64)
    found = audit(fn, H)
    assert kind in {operator.kind for operator in found.forbidden}
    assert found.verdict.startswith("out of the rules: ")


def test_a_decomposition_inside_a_network_is_found():
    class Cheat(nn.Module):
        M, N = 6, 4

        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, H, sid):
            return torch.linalg.svd(H * self.scale, full_matrices=False)

    assert audit(Cheat()).forbidden


def test_every_fused_operator_is_known():
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("Meta"):
        if name.startswith("lomacs::"):
            assert name.removeprefix("lomacs::").removesuffix("_backward") in FUSED


def test_a_loss_is_audited():
    U, V, H = (torch.randn(2, *s, dtype=torch.complex64) for s in ((6, 3), (5, 3), (6, 5)))
    U.requires_grad_()
    found = audit(
        lambda *a: functional.aeplus_loss(*a, lam=0.1, w_energy=0.1, w_diag=0.1, w_match=0.1)[0],
        U, torch.rand(2, 3), V, H,
    )  # fmt: skip
    assert not found.forbidden


def test_an_unknown_library_is_out_of_the_rules():
    torch.library.define("lomacs_test::anything", "(Tensor x) -> Tensor")
    torch.library.impl("lomacs_test::anything", "CPU", lambda x: x.clone())
    (operator,) = audit(torch.ops.lomacs_test.anything, torch.ones(2)).forbidden
    assert operator.kind == "of an unknown library"


def test_a_fused_operator_that_nobody_described_is_out_of_the_rules():
    from lomacs_fast.auditing import _judge

    assert _judge("lomacs::nobody") == ("fused, of unknown contents", True)
    assert _judge("lomacs::svd_tail_backward") == ("fused: matrix products, column norms, sort", False)


def test_a_module_without_sizes_needs_inputs():
    with pytest.raises(TypeError, match="inputs must be given for Linear"):
        audit(nn.Linear(2, 2))
    assert not audit(nn.Linear(2, 2), torch.ones(1, 2)).forbidden
