"""A hundred training steps, reference against fast: the same loss curve, and weights apart by rounding alone."""

import pytest
import torch
from torch import nn

import lomacs_fast
from lomacs_fast import reference

SIZES = {
    "M": 24,
    "N": 20,
    "r": 6,
    "n_scene": 3,
    "dim": 32,
    "depth": 3,
    "groups": 2,
    "k_len": 12,
    "gate_hidden": 8,
}
STEPS, BATCH = 100, 16


def channels():
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(shape, dtype=torch.complex128, generator=generator)

    H = normal(STEPS, BATCH, SIZES["M"], 4) @ normal(STEPS, BATCH, 4, SIZES["N"])
    H = H + 0.3 * normal(*H.shape)
    return H / torch.linalg.vector_norm(H, dim=(-2, -1), keepdim=True)


def train(kind, loss, dtype, kicks=0.0):
    """Losses of every step and the final weights; `kicks` perturbs the first weights by so much, relative."""
    torch.manual_seed(0)
    net = kind(**SIZES).to(dtype)
    if kicks:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(1 + kicks * torch.randn(p.shape, dtype=p.dtype, generator=generator))
    optimizer = torch.optim.AdamW(net.parameters(), lr=4e-4, weight_decay=1e-4)
    losses = []
    for H in channels().to(torch.promote_types(dtype, torch.complex32)):
        U, S, V, _ = net(H, torch.arange(BATCH) % 3)
        value = loss(U, S, V, H, 0.4, 0.3, 0.3, 0.2)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        losses.append(value.item())
    weights = torch.cat([p.detach().flatten().double() for p in net.parameters()])
    return torch.tensor(losses, dtype=torch.float64), weights


@pytest.fixture(scope="module")
def eager():
    return train(reference.LoMACSSVDNet, reference.AEPlusLoss(), torch.float32)


@pytest.fixture(scope="module")
def fast():
    return train(lomacs_fast.LoMACSSVDNet, lomacs_fast.AEPlusLoss(), torch.float32)


def test_the_loss_curve_is_the_same(eager, fast):
    assert eager[0][-10:].mean() < 0.95 * eager[0][:10].mean()
    assert ((fast[0] - eager[0]).abs() / eager[0]).max() <= 1e-3


def test_weights_part_no_further_than_rounding_grows(eager, fast):
    """The yardstick is the reference against itself, its first weights perturbed by one rounding."""
    norm = torch.linalg.vector_norm
    rounding = torch.finfo(torch.float32).eps / 2
    runs = [train(reference.LoMACSSVDNet, reference.AEPlusLoss(), torch.float32, kicks=rounding)]
    runs.append(train(reference.LoMACSSVDNet, reference.AEPlusLoss(), torch.float64))
    yardstick = max(norm(weights - eager[1]) for _, weights in runs)
    assert norm(fast[1] - eager[1]) <= 3 * yardstick


def test_in_double_precision_they_are_one():
    ours = train(lomacs_fast.LoMACSSVDNet, lomacs_fast.AEPlusLoss(), torch.float64)
    theirs = train(reference.LoMACSSVDNet, reference.AEPlusLoss(), torch.float64)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-9, atol=0)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-6, atol=1e-9)
