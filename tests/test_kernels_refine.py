"""Refinement of an SVD as a Triton kernel: values, interpreted against float64."""

import pytest
import torch

pytest.importorskip("triton")

from test_kernels_ortho import DEVICE, EPS, draw, guarded, planes, single

from lomacs_fast.kernels import refine
from lomacs_fast.reference import refine as formula

FORMS = pytest.mark.parametrize("hermitian", [False, True], ids=["general", "hermitian"])


def channels(M, N, seed=0, hermitian=False, B=2):
    H = draw(B, M, 4, seed=seed) @ draw(B, 4, N, seed=seed + 1) + 0.1 * draw(B, M, N, seed=seed + 2)
    return H @ H.mH if hermitian else H


def start(n, k, seed, B=2):
    return torch.linalg.qr(draw(B, n, k, seed=seed))[0]


def reference(H, U, V, scalars, hermitian, sweeps):
    X, norm = formula.unit_scale(H)
    U, V = formula.refine_span(X, U, U if hermitian else V, scalars, sweeps, hermitian)
    soft = scalars[-1, 0] if len(scalars) else formula.default_scalars(1, H)[0, 0]
    return *formula.refine_close(X, U, V, soft, sweeps, hermitian), norm.flatten()


def kernel(H, U, V, scalars, hermitian, sweeps=2):
    U, S, V, order, norm = refine.refine(
        planes(H), planes(U), None if hermitian else planes(V), scalars.float().to(DEVICE), sweeps
    )
    U = torch.view_as_complex(U).cpu()
    V = U if hermitian else torch.view_as_complex(V).cpu()
    return U, S.cpu(), V, order.cpu(), norm.cpu()


def compared(U, S, V, norm):
    return (U.to(torch.complex128) * S[:, None].double()) @ V.to(torch.complex128).mH, S, norm


def defect(U):
    return torch.linalg.matrix_norm(U.mH @ U - torch.eye(U.shape[-1])).max()


CASES = [
    ((24, 24, 5), False, 3, 2),
    ((23, 17, 5), False, 0, 2),
    ((24, 24, 16), False, 2, 1),
    ((24, 24, 5), True, 3, 2),
    ((17, 17, 16), True, 2, 3),
    ((40, 33, 20), False, 1, 2),
    ((64, 64, 16), True, 1, 2),
]


@pytest.mark.parametrize(("size", "hermitian", "steps", "sweeps"), CASES)
def test_values_are_as_accurate_as_eager(size, hermitian, steps, sweeps):
    M, N, k = size
    sums = torch.zeros(3, 3, dtype=torch.float64)
    for seed in range(3):
        H, U, V = channels(M, N, seed, hermitian), start(M, k, seed + 7), start(N, k, seed + 8)
        # unlike from row to row, the last one a bound that binds
        scalars = torch.tensor([[0.5, 0.02, 1.0, 2.0], [0.3, 0.05, 0.8, 0.6], [0.4, 0.01, 1.1, 0.2]]).double()
        scalars = scalars[:steps]
        exact = reference(H, U, V, scalars, hermitian, sweeps)
        eager = reference(*(single(x) for x in (H, U, V, scalars)), hermitian, sweeps)
        U, S, V, order, norm = kernel(H, U, V, scalars, hermitian, sweeps)
        assert max(defect(U), defect(V)) < 1e-5
        assert order.sort(-1).values.equal(torch.arange(k).expand(2, k))
        found = (compared(U, S, V, norm), compared(*eager), compared(*exact))
        for i, (f, e, x) in enumerate(zip(*found, strict=True)):
            sums[i] += torch.tensor([float(y.abs().square().sum()) for y in (f - x, e - x, x)])
    ours, eager, size = sums.sqrt().unbind(1)
    assert (ours <= 2 * eager + 4 * EPS * size).all(), (ours / size, eager / size)


@pytest.mark.parametrize(("hermitian", "orthonormal"), [(False, False), (True, True)])
def test_the_op_on_a_device_starts_and_completes_as_the_reference(hermitian, orthonormal):
    """What the op runs on a device, interpreted: 7 columns of which 3 are active."""
    from lomacs_fast.ops.refine import launched

    B, n = 33, 12
    H, U, V = channels(n, n, 0, hermitian, B), start(n, 7, 7, B), start(n, 7, 8, B)
    if not orthonormal:
        U, V = 3 * U + 0.3 * draw(B, n, 7, seed=9), V + 0.3 * draw(B, n, 7, seed=10)
    scalars = formula.default_scalars(1, H)
    exact = formula.refined(H, U, V, scalars, 3, 2, hermitian, orthonormal)
    eager = formula.refined(*(single(x) for x in (H, U, V, scalars)), 3, 2, hermitian, orthonormal)
    right = None if hermitian else planes(V)
    u, S, v, order = launched(planes(H), planes(U), right, scalars.float().to(DEVICE), 3, 2, orthonormal)
    assert order.shape == (B, 3)
    found = torch.view_as_complex(u).cpu(), S.cpu(), torch.view_as_complex(v).cpu()
    assert max(defect(found[0]), defect(found[2])) < 1e-5

    def product(U, S, V):
        return (U.to(torch.complex128) * S[:, None].double()) @ V.to(torch.complex128).mH

    for of in (product, lambda U, S, V: S.double()):
        x = of(*exact)
        ours, theirs = (
            torch.linalg.vector_norm(of(*y) - x) / torch.linalg.vector_norm(x) for y in (found, eager)
        )
        assert ours <= 2 * theirs + 4 * EPS


def paths(n):
    return draw(1, n, 1) @ draw(1, 1, n, seed=1)


DEGENERATE = {
    "zero": torch.zeros(1, 18, 18, dtype=torch.complex128),
    "one path": paths(18),
    "antidiagonal": torch.eye(18, dtype=torch.complex128).flip(-1)[None],
    "multiple of I": 3 * torch.eye(18, dtype=torch.complex128)[None],
    "tiny": 1e-30 * draw(1, 18, 18),
    "huge": 1e30 * draw(1, 18, 18),
}


@pytest.mark.parametrize("name", DEGENERATE)
@FORMS
def test_degenerate_input(name, hermitian):
    H = DEGENERATE[name]
    H = 0.5 * (H + H.mH) if hermitian else H
    U, S, V, _, norm = kernel(
        H, start(18, 6, 7, 1), start(18, 6, 8, 1), formula.default_scalars(2, H), hermitian
    )
    assert max(defect(U), defect(V)) < 1e-5
    assert S.isfinite().all()
    assert (S.abs().diff(dim=-1) <= 0).all()
    torch.testing.assert_close(norm.double(), torch.linalg.matrix_norm(H), rtol=1e-6, atol=0)


INDEFINITE = {
    # every gap of the first core is exactly zero, and must rotate
    "equal diagonals": lambda: (
        torch.eye(6, dtype=torch.complex128).flip(-1)[None],
        torch.eye(6, dtype=torch.complex128)[None],
    ),
    "both signs": lambda: (
        channels(18, 18, 0, True) - 0.6 * channels(18, 18, 3, True),
        start(18, 6, 7),
    ),
}


@pytest.mark.parametrize("name", INDEFINITE)
def test_eigenvalues_of_both_signs(name):
    H, U = INDEFINITE[name]()
    scalars = formula.default_scalars(2, H)
    exact, found = reference(H, U, U, scalars, True, 2), kernel(H, U, U, scalars, True)
    assert exact[1].abs().amax() > 0.1
    assert (exact[1] < 0).any()
    for f, x in zip(compared(*found[:3], found[4]), compared(*exact), strict=True):
        torch.testing.assert_close(f.to(x.dtype), x, rtol=1e-4, atol=1e-5)


def test_nan_stays_in_its_sample_and_programs_take_turns(monkeypatch):
    H, U, V = channels(18, 17, B=3), start(18, 5, 7, 3), start(17, 5, 8, 3)
    scalars = formula.default_scalars(1, H)
    well = kernel(H, U, V, scalars, False)
    monkeypatch.setattr(refine, "PROGRAMS", 2)
    H[1, 3, 4] = torch.nan
    found = kernel(H, U, V, scalars, False)
    assert found[1][1].isnan().all()
    for x, y in zip(found, well, strict=True):
        assert torch.equal(x[::2], y[::2])


@FORMS
@pytest.mark.parametrize("size", [(1, 1, 1), (19, 17, 3)])
def test_nothing_is_written_outside(size, hermitian):
    M, N, k = size
    N = M if hermitian else N
    H, U, V = (planes(x) for x in (channels(M, N, B=1), start(M, k, 7, 1), start(N, k, 8, 1)))
    launch, check = guarded(refine.refine_launch(H, U, None if hermitian else V, H.new_ones(1, 4), 1)[0])
    launch.run()
    check()


def test_sizes_that_are_not_served_are_refused():
    assert refine.limit(64, 128, 16) == []
    H, U = torch.zeros(1, 40, 40, 2), torch.zeros(1, 40, 33, 2)
    with pytest.raises(ValueError, match="33 active columns are not between 1 and 32"):
        refine.refine(H, U, U, torch.zeros(1, 4), 2)
    assert "2000 is more than" in refine.limit(2000, 9, 4)[0]
    assert "more than min(M, N) = 3" in refine.limit(5, 3, 4)[0]


def test_the_numbers_are_those_of_the_reference():
    names = ("TINY", "ROTATION", "POLISH", "CLOSE")
    assert [getattr(refine, n).value for n in names] == [getattr(formula, n) for n in names]
    assert refine.SOFT.value == formula.default_scalars(1, torch.zeros(1)).tolist()[0][0]
