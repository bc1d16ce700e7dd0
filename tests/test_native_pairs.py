"""Products by pairs: as accurate as the rule asks, and not taken where columns or numbers are not of a size for them."""

import pytest
import torch

from lomacs_fast import functional, reference
from lomacs_fast.ops.native import reasons as native_reasons

EPS = torch.finfo(torch.float32).eps
GENERATOR = torch.Generator()


@pytest.fixture(autouse=True)
def pairs(monkeypatch):
    """A switch that turns them on or off, whatever the processor would choose."""
    if reasons := native_reasons("cpu"):
        pytest.skip(f"no native library: {'; '.join(reasons)}")
    GENERATOR.manual_seed(0)

    def switch(on):
        monkeypatch.setenv("LOMACS_FAST_PAIRS", str(int(on)))

    switch(True)
    return switch


def randn(*shape):
    return torch.randn(*shape, dtype=torch.complex128, generator=GENERATOR)


def rounded(x):
    """Numbers that single precision holds."""
    return x.to(torch.complex64 if x.is_complex() else torch.float32).to(x.dtype)


def columns(kind, B, M, r):
    q = torch.linalg.qr(randn(B, M, r))[0]
    near = reference.column_normalize(q + 0.02 * randn(B, M, r))
    if kind == "of sizes from 1 to 3":
        return near * (1 + 2 * torch.rand(r, dtype=torch.float64, generator=GENERATOR))
    if kind == "two equal":
        return torch.cat([near[..., :1], near[..., :-1]], -1)
    return {
        "near": near,
        "random": reference.column_normalize(randn(B, M, r)),
        "all equal": reference.column_normalize(randn(B, M, 1).expand(B, M, r).contiguous()),
        "of rank 4": reference.column_normalize(randn(B, M, 4) @ randn(B, 4, r)),
        "unit vectors": torch.eye(M, r, dtype=torch.complex128) + 1e-4 * randn(B, M, r),
        "raw": randn(B, M, r),
    }[kind]


def refined(module, U, V, g, dtype):
    u, v = (x.to(dtype, copy=True).requires_grad_() for x in (U, V))
    out = module.ortho_refine_pair(u, v, 0.3, 0.5)
    return [x.detach() for x in out] + list(torch.autograd.grad(out, (u, v), [x.to(dtype) for x in g]))


def loss(module, U, S, V, H, dtype):
    leaves = [x.to(dtype if x.is_complex() else dtype.to_real()).requires_grad_() for x in (U, S, V, H)]
    value = module.aeplus_loss(*leaves, lam=0.4, w_energy=0.3, w_diag=0.3, w_match=0.2)[0]
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def by_the_rule(call, tensors):
    exact, base = call(reference, *tensors, torch.complex128), call(reference, *tensors, torch.complex64)
    for i, (x, y, want) in enumerate(
        zip(call(functional, *tensors, torch.complex64), base, exact, strict=True)
    ):
        error, eager = (float((z - want).norm() / want.norm()) for z in (x, y))
        assert error <= 2 * eager + 4 * EPS, f"result {i}: {error:.2e}, eager {eager:.2e}"


@pytest.mark.parametrize("size", [(128, 64), (64, 32), (96, 96)])
@pytest.mark.parametrize(
    "kind",
    ["near", "random", "all equal", "of rank 4", "of sizes from 1 to 3", "two equal", "unit vectors", "raw"],
)
def test_refinement_by_the_rule(kind, size):
    U, V, *g = (rounded(x) for x in (*(columns(kind, 6, *size) for _ in range(2)), *randn(2, 6, *size)))
    by_the_rule(lambda module, *args: refined(module, *args[:2], args[2:4], args[4]), (U, V, *g))


@pytest.mark.parametrize("size", [(64, 64, 32), (96, 128, 96), (48, 64, 32)])
@pytest.mark.parametrize("distance", [0.1, 0.003])
def test_loss_by_the_rule(size, distance):
    M, N, r = size
    H = randn(4, M, N) / (M * N) ** 0.5
    U, S, Vh = torch.linalg.svd(H, full_matrices=False)
    U, V = (
        reference.column_normalize(x[..., :r] + distance * torch.linalg.qr(randn(4, len(x[0]), r))[0])
        for x in (U, Vh.mH)
    )
    by_the_rule(loss, [rounded(x) for x in (U, S[..., :r] * (1 + distance), V, H)])


def tail(module, U, V, S, H, gU, gS, gV, dtype):
    leaves = [x.to(dtype if x.is_complex() else dtype.to_real()).requires_grad_() for x in (U, V, S, H)]
    out = module.svd_tail(*leaves, 0.1, 0.2, 0.3)
    gradients = [g.to(x.dtype) for g, x in zip((gU, gS, gV), out, strict=True)]
    return [x.detach() for x in out] + list(torch.autograd.grad(out, leaves, gradients))


@pytest.mark.parametrize("size", [(64, 64, 32), (96, 128, 96), (48, 64, 32)])
def test_tail_by_the_rule(size):
    M, N, r = size
    S, gS = (torch.rand(4, r, dtype=torch.float64, generator=GENERATOR) for _ in range(2))
    H, gU, gV = (randn(4, *shape) / (M * N) ** 0.5 for shape in ((M, N), (M, r), (N, r)))
    # near singular vectors: the gradient of |z| turns with the phase of a z, which is rounded where z is small
    left, _, right = torch.linalg.svd(H, full_matrices=False)
    U, V = (x[..., :r] + 0.3 * randn(*x[..., :r].shape) / len(x[0]) ** 0.5 for x in (left, right.mH))
    by_the_rule(tail, [rounded(x) for x in (U, V, S, H, gU, gS, gV)])


def test_pairs_are_taken(pairs):
    """Otherwise the tests beside this one say nothing, where the instruction set has them."""
    U = columns("near", 2, 64, 32).to(torch.complex64)
    first = functional.ortho_refine_pair(U, U, 0.1, 0.2)[0]
    pairs(False)
    second = functional.ortho_refine_pair(U, U, 0.1, 0.2)[0]
    with open("/proc/cpuinfo", encoding="ascii") as file:
        if "avx512dq" not in file.read():
            pytest.skip("no avx512")
    assert not torch.equal(first, second)


OTHERS = {
    "a column of nothing": lambda U: U[..., 3].zero_(),
    "a column of another size": lambda U: U[..., 3].mul_(1e-3),
    "NaN": lambda U: U[3, 5].fill_(float("nan")),
    "tiny": lambda U: U.mul_(1e-12),
    "huge": lambda U: U.mul_(1e12),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_columns_are_multiplied_as_before_and_their_neighbours_by_pairs(pairs, kind):
    U, V = (columns("near", 3, 64, 32).to(torch.complex64) for _ in range(2))
    g = [x.to(torch.complex64) for x in randn(2, 3, 64, 32)]
    plain = refined(functional, U, V, g, torch.complex64)
    OTHERS[kind](U[1])
    found = refined(functional, U, V, g, torch.complex64)
    pairs(False)
    want = refined(functional, U, V, g, torch.complex64)
    for i, (x, y, before) in enumerate(zip(found, want, plain, strict=True)):
        if i % 2 == 0:
            assert torch.equal(x[1].nan_to_num(), y[1].nan_to_num())
        assert torch.equal(x[::2], before[::2])


@pytest.mark.parametrize("factor", [0.0, 1e-22, 1e30])
def test_gradients_of_other_sizes_are_multiplied_as_before(pairs, factor):
    U, V = (columns("near", 2, 64, 32).to(torch.complex64) for _ in range(2))
    g = [(factor * x).to(torch.complex64) for x in randn(2, 2, 64, 32)]
    pairs(False)
    U, V = functional.ortho_refine_pair(U, V, 0.1, 0.2)
    want = torch.ops.lomacs.ortho_refine_backward(*g, U, V, torch.tensor([0.1, 0.2], dtype=torch.float64))
    pairs(True)
    found = torch.ops.lomacs.ortho_refine_backward(*g, U, V, torch.tensor([0.1, 0.2], dtype=torch.float64))
    for x, y in zip(found[:2], want[:2], strict=True):
        # the columns themselves are refined by pairs, which the gradients see by their rounding
        x, y = x.to(torch.complex128), y.to(torch.complex128)
        assert (x - y).norm() <= 1e-5 * y.norm()


def test_a_column_of_nothing_measures_nothing():
    """A sum and a difference of rounded numbers would leave their rounding, and a phase with it."""
    U, V, H = randn(2, 64, 32), randn(2, 64, 32), randn(2, 64, 64)
    V[..., 5] = 0
    U, V, H = (x.to(torch.complex64) for x in (U, V, H))
    S = torch.rand(2, 32, generator=GENERATOR)
    found = functional.svd_tail(U, V, S, H, 0.1, 0.2, 0.5)
    place = S.argsort(dim=-1, descending=True, stable=True).tolist()
    for b in range(2):
        k = place[b].index(5)
        assert found[1][b, k] == 0.5 * S[b, 5] + 1e-6


def test_the_switch_is_0_or_1(monkeypatch):
    monkeypatch.setenv("LOMACS_FAST_PAIRS", "2")
    U = columns("near", 2, 64, 32).to(torch.complex64).contiguous()
    with pytest.raises(RuntimeError, match="LOMACS_FAST_PAIRS must be 0 or 1, got 2"):
        torch.ops.lomacs.ortho_refine(U, U, torch.tensor([0.1, 0.2], dtype=torch.float64))
