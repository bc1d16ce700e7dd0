"""Refinement of an SVD as Triton kernels: interpreted against float64, compiled ahead for every chip."""

import pytest
import torch

pytest.importorskip("triton")

from test_kernels_ortho import (
    DEVICE,
    EPS,
    Errors,
    bytes_a_sample,
    check_compiled,
    check_scratch,
    draw,
    guarded,
    planes,
    single,
    with_gradients,
)

from lomacs_fast.kernels import ortho, refine, refine_gradient
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
    monkeypatch.setattr(ortho, "PROGRAMS", 2)
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
    names = ("TINY", "ROTATION")
    assert [getattr(refine, n).value for n in names] == [getattr(formula, n) for n in names]
    assert refine.ITERATIONS == formula.POLISH == formula.CLOSE
    assert refine.SOFT.value == formula.default_scalars(1, torch.zeros(1)).tolist()[0][0]


SCALARS = torch.tensor([[0.5, 0.02, 1.0, 2.0], [0.3, 0.05, 0.8, 0.6], [0.4, 0.01, 1.1, 0.2]]).double()


def formulas(hermitian, sweeps, order):
    """Outputs of the reference as a function of H, the factors and the scalars, columns in an order."""

    def run(H, U, *rest):
        V, scalars = (U, *rest)[-2:]
        X, norm = formula.unit_scale(H)
        U, V = formula.refine_span(X, U, V, scalars, sweeps, hermitian)
        U, S, V = formula.refine_close(X, U, V, scalars[-1, 0], sweeps, hermitian, order)
        return (U, S, norm.flatten()) if hermitian else (U, S, V, norm.flatten())

    return run


GRADIENTS = [
    # M, N, k, Hermitian, steps, sweeps
    (13, 10, 4, False, 1, 2),
    (11, 11, 5, True, 2, 1),
    # several tiles of rows, whole tiles of columns, a bound that binds
    (34, 18, 16, False, 2, 1),
    (35, 35, 17, True, 1, 1),
]


@pytest.mark.parametrize("case", GRADIENTS, ids=str)
def test_gradients_are_as_accurate_as_eager(case):
    M, N, k, hermitian, steps, sweeps = case
    errors, B, seeds = Errors(), 1, 3 if k < 16 else 1
    for seed in range(seeds):
        H, U, V = channels(M, N, seed, hermitian, B), start(M, k, seed + 7, B), start(N, k, seed + 8, B)
        given = (H, U) if hermitian else (H, U, V)
        scalars = SCALARS[3 - steps :]
        u, v = planes(U), None if hermitian else planes(V)
        order = refine.refine(planes(H), u, v, scalars.float().to(DEVICE), sweeps)[3]
        grads = [draw(B, M, k, seed=seed + 20), draw(B, k, seed=seed + 21).real]
        grads += [] if hermitian else [draw(B, N, k, seed=seed + 22)]
        grads += [draw(B, seed=seed + 23).real]
        run, count = formulas(hermitian, sweeps, order.cpu()), len(grads)
        exact = with_gradients(run, (*given, scalars), grads)[count:]
        eager = with_gradients(run, [single(x) for x in (*given, scalars)], [single(x) for x in grads])
        gU, gS, *gV, gnorm = (planes(x.contiguous()) for x in grads)
        arguments = gU, gS, gV[0] if gV else None, gnorm, planes(H), u, v, scalars.float().to(DEVICE), order
        kept = [x.clone() for x in arguments if x is not None]
        found = refine_gradient.refine_backward(*arguments, sweeps)
        for x, before in zip((x for x in arguments if x is not None), kept, strict=True):
            assert torch.equal(x, before)
        kinds = [x for x in found if x.ndim > 1]
        # four numbers of a single sample say little
        for x in (kinds, eager, exact) if seeds == 1 else ():
            x.pop()
        errors.add(kinds, eager[count:], exact)
    errors.check()


@pytest.mark.parametrize(("hermitian", "orthonormal"), [(False, False), (True, True)])
def test_the_op_on_a_device_has_the_gradients_of_start_and_completion(hermitian, orthonormal):
    """What the op runs on a device, interpreted: 5 columns of which 3 are active, no step."""
    from lomacs_fast.ops import native
    from lomacs_fast.ops.refine import relaunched

    if reasons := native.reasons("cpu"):
        pytest.skip(f"no native library: {'; '.join(reasons)}")
    n, B = 9, 2
    H, U, V = channels(n, n, 0, hermitian, B), start(n, 5, 7, B), start(n, 5, 8, B)
    if not orthonormal:
        U, V = 3 * U + 0.3 * draw(B, n, 5, seed=9), V + 0.3 * draw(B, n, 5, seed=10)
    scalars = torch.zeros(0, 4, device=DEVICE)
    tensors = draw(B, n, 5, seed=1), draw(B, 5, seed=2).real.contiguous(), draw(B, n, 5, seed=3), H, U, V
    gU, gS, gV, H, U, V = (planes(x) for x in tensors)
    order = launched_order(H, U, None if hermitian else V, scalars, orthonormal)
    rest = H, U, None if hermitian else V, scalars, order, 1, orthonormal
    found = relaunched(gU, gS, gV, *rest)
    host = [x if x is None else x.cpu() for x in (gU, gS, gV, *rest[:5])]
    double = [x.double() if x is not None and x.is_floating_point() else x for x in host]
    exact = torch.ops.lomacs.refine_svd_backward(*double, *rest[5:])
    for x, y in zip(found, exact, strict=True):
        assert x.shape == y.shape
        assert torch.linalg.vector_norm(x.cpu().double() - y) <= 1e-4 * torch.linalg.vector_norm(y)


def launched_order(H, U, V, scalars, orthonormal):
    from lomacs_fast.ops.refine import launched

    return launched(H, U, V, scalars, 3, 1, orthonormal)[3]


@pytest.mark.gpu
@FORMS
def test_on_a_device_at_the_main_size(hermitian):
    """Values and gradients of the op, 16 of 32 columns active, by the rule."""
    from lomacs_fast import functional, reference, use_backend

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    errors = Errors()
    for seed in range(3):
        H, U, V = (
            channels(64, 64, seed, hermitian, 12),
            start(64, 32, seed + 7, 12),
            start(64, 32, seed + 8, 12),
        )
        scalars = formula.default_scalars(4, H)
        given = [H, U, scalars] if hermitian else [H, U, V, scalars]
        grads = draw(12, 64, 64, seed=seed + 9), draw(12, 32, seed=seed + 10).real.contiguous()

        def run(H, U, *rest, module=reference):
            V, scalars = (U, *rest)[-2:]
            U, S, V = module.refine_svd(H, U, V, 4, active=16, hermitian=hermitian, scalars=scalars)
            return (U * S[:, None]) @ V.mH, S

        def ours(*given):
            with use_backend("triton"):
                return run(*given, module=functional)

        single_ = [single(x).cuda() for x in given], [single(x).cuda() for x in grads]
        exact = with_gradients(run, given, grads)
        eager, found = (with_gradients(f, *single_) for f in (run, ours))
        errors.add(
            [torch.view_as_real(x) if x.is_complex() else x for x in found], [x.cpu() for x in eager], exact
        )
    errors.check()


def gradient_launch(B, M, N, k, steps, hermitian, sweeps=2, device="meta"):
    H, U, V = (torch.zeros(B, *shape, 2, device=device) for shape in ((M, N), (M, k), (N, k)))
    S, norm, scalars = (torch.zeros(shape, device=device) for shape in ((B, k), (B,), (steps, 4)))
    order = torch.zeros((B, k), dtype=torch.int64, device=device)
    V = None if hermitian else V
    return refine_gradient.refine_backward_launch(U, S, V, norm, H, U, V, scalars, order, sweeps)


def test_the_gradient_of_nan_stays_in_its_sample_and_programs_take_turns(monkeypatch):
    H, U, V = (planes(x) for x in (channels(7, 6, B=3), start(7, 3, 7, 3), start(6, 3, 8, 3)))
    scalars = SCALARS[:0].float().to(DEVICE)

    def gradients():
        order = refine.refine(H, U, V, scalars, 1)[3]
        ones = torch.ones(3, 3, device=DEVICE)
        return refine_gradient.refine_backward(U, ones, V, ones[0], H, U, V, scalars, order, 1)

    well = gradients()
    monkeypatch.setattr(ortho, "PROGRAMS", 2)
    H[1, 3, 4] = torch.nan
    found = gradients()
    assert found[0][1].isnan().all()
    for x, y in zip(found[:3], well[:3], strict=True):
        assert torch.equal(x[::2], y[::2])


@FORMS
def test_no_gradient_is_written_outside(hermitian):
    N = 5 if hermitian else 3
    launch, _ = gradient_launch(1, 5, N, 3, 1, hermitian, 1, DEVICE)
    launch.arguments["p_order"].copy_(torch.arange(3))
    for name, n in (("p_u", 5), *(() if hermitian else (("p_v", N),))):
        launch.arguments[name].copy_(planes(start(n, 3, 7, 1)))
    launch.arguments["p_h"].copy_(planes(channels(5, N, 0, hermitian, 1)))
    launch.arguments["p_scalars"].copy_(SCALARS[:1])
    launch, check = guarded(launch)
    launch.run()
    check()
    assert launch.arguments["p_gscalars"].isfinite().all()


def test_no_samples():
    launch, outputs = gradient_launch(0, 6, 5, 3, 2, False, device=DEVICE)
    launch.run()
    assert [tuple(x.shape) for x in outputs] == [(0, 6, 5, 2), (0, 6, 3, 2), (0, 5, 3, 2), (0, 2, 4)]


def forward_launch(B, M, N, k, steps, hermitian):
    H, U, V = (torch.empty(B, *shape, 2, device="meta") for shape in ((M, N), (M, k), (N, k)))
    scalars = torch.empty(steps, 4, device="meta")
    return refine.refine_launch(H, U, None if hermitian else V, scalars, 2)[0]


@pytest.mark.parametrize(("M", "N"), [(64, 64), (128, 96)])
def test_memory_sees_operands_and_results_alone(M, N):
    B, k = 2 * ortho.PROGRAMS, 16
    factors, matrix = 8 * (M + N) * k, 8 * M * N
    # S, the order and the norm
    assert bytes_a_sample(forward_launch(B, M, N, k, 6, False), B) == matrix + 2 * factors + 12 * k + 4
    backward = gradient_launch(B, M, N, k, 6, False)[0]
    assert bytes_a_sample(backward, B) == 2 * matrix + 3 * factors + 12 * k + 4 + 16 * 6


@pytest.mark.parametrize(("processors", "cache"), [(108, 40 << 20), (132, 50 << 20)])
def test_scratch_stays_in_the_cache_of_the_chip(monkeypatch, processors, cache):
    monkeypatch.setattr(ortho, "chip", lambda x: (processors, cache))
    for M in (64, 128):
        check_scratch(forward_launch(4096, M, M, 16, 6, False), 4096, processors, cache)
        check_scratch(gradient_launch(4096, M, M, 16, 6, False)[0], 4096, processors, cache)


def launches():
    found = {}
    for M in (64, 128):
        for name, hermitian in (("general", False), ("hermitian", True)):
            found[f"{name} forward {M}"] = forward_launch(256, M, M, 16, 6, hermitian)
            found[f"{name} backward {M}"] = gradient_launch(256, M, M, 16, 6, hermitian)[0]
    return found


# slow to compile: half a minute forward, more backward; `python tests/aot.py FILE --all` does the others
ONLY = {
    "hermitian forward 64": ("sm_90",),
    "general forward 128": ("sm_80",),
    "hermitian forward 128": (),
    "general backward 64": ("sm_80",),
    "hermitian backward 64": (),
    "general backward 128": ("sm_90",),
    "hermitian backward 128": ("sm_100",),
}


def test_what_is_compiled_ahead():
    # the rest are diagonals, sums of columns and columns at their places
    matrices = {"general forward": 53, "hermitian forward": 55}
    matrices |= {"general backward": 225, "hermitian backward": 180}
    check_compiled(__file__, matrices)
