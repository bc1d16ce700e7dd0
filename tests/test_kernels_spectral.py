"""Calibration and the fused tail as Triton kernels: interpreted against float64, compiled ahead for every chip."""

import pytest
import torch

pytest.importorskip("triton")

from test_kernels_ortho import (
    DEVICE,
    KINDS,
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

from lomacs_fast import reference
from lomacs_fast.kernels import ortho, spectral, svd_tail


def real(*shape, seed=0):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def calibrated(U, H, V, S, tau):
    return (reference.spectral_calibrate(U, H, V, S, tau[0]),)


def tail(U, V, S, H, scalars):
    """The reference, as the network has it."""
    U, V = reference.column_normalize(U), reference.column_normalize(V)
    S, order = torch.sort(S, dim=-1, descending=True, stable=True)
    columns = order.unsqueeze(-2)
    U, V = U.gather(-1, columns.expand_as(U)), V.gather(-1, columns.expand_as(V))
    U, V = reference.ortho.ortho_refine(U, scalars[0]), reference.ortho.ortho_refine(V, scalars[1])
    return U, reference.spectral_calibrate(U, H, V, S, scalars[2]), V


def both(function, inputs, grads):
    exact = with_gradients(function, inputs, grads)
    return exact, with_gradients(function, [single(x) for x in inputs], [single(x) for x in grads])


def flat(inputs):
    """As the kernels take them: the last, scalars, in float64."""
    return [*(planes(x) for x in inputs[:-1]), inputs[-1].to(DEVICE)]


def spectral_inputs(M, N, r, seed, kind="random", B=2):
    U, V = KINDS[kind](M, r, seed)[:B], KINDS[kind](N, r, seed + 1)[:B]
    tau = torch.tensor([0.7], dtype=torch.float64)
    return [U, draw(B, M, N, seed=seed + 2), V, real(B, r, seed=seed + 3), tau]


def tail_inputs(M, N, r, seed, kind="random", B=2):
    U, H, V, S, tau = spectral_inputs(M, N, r, seed, kind, B)
    return [U, V, S, H, torch.cat([torch.tensor([0.1, 0.4], dtype=torch.float64), tau])]


@pytest.mark.parametrize("size", [(63, 20, 11), (17, 40, 17), (8, 70, 1)])
def test_calibration_is_as_accurate_as_eager(size):
    r, errors = size[2], Errors()
    for seed in range(3):
        inputs, g = spectral_inputs(*size, seed), real(2, r, seed=seed + 9) - 0.3
        exact, eager = both(calibrated, inputs, (g,))
        x = flat(inputs)
        kept = [y.clone() for y in x]
        found = (
            spectral.spectral_calibrate(*x),
            *spectral.spectral_calibrate_backward(planes(g), *x, True, True, True),
        )
        for y, before in zip(x, kept, strict=True):
            assert torch.equal(y, before)
        errors.add(found, eager, exact)
    errors.check()


def test_zeros_get_no_gradient_and_no_nan():
    inputs = spectral_inputs(6, 5, 3, 0)
    inputs[1] = torch.zeros_like(inputs[1])
    g = torch.ones(2, 3, dtype=torch.float64)
    exact = with_gradients(calibrated, inputs, (g,))
    found = spectral.spectral_calibrate_backward(planes(g), *flat(inputs), True, True, True)
    for f, x in zip(found, exact[1:], strict=True):
        torch.testing.assert_close(
            f.double().cpu(), torch.view_as_real(x.resolve_conj()) if x.is_complex() else x, rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("exponent", [-25, 17])
def test_the_modulus_of_tiny_and_huge_values(exponent):
    inputs = spectral_inputs(6, 5, 3, 0)
    inputs[1] = inputs[1] * 10.0**exponent
    g = torch.ones(2, 3, dtype=torch.float64)
    exact = with_gradients(calibrated, inputs, (g,))[1:4]
    found = spectral.spectral_calibrate_backward(planes(g), *flat(inputs), True, True, True)[:3]
    for f, x in zip(found, exact, strict=True):
        assert (torch.view_as_complex(f.double().cpu()) - x).norm() <= 1e-5 * x.norm()


def test_gradients_that_are_not_wanted_are_left_out():
    inputs, g = spectral_inputs(9, 7, 3, 0), planes(real(2, 3))
    whole = spectral.spectral_calibrate_backward(g, *flat(inputs), True, True, True)
    for k in range(3):
        wanted = [i == k for i in range(3)]
        found = spectral.spectral_calibrate_backward(g, *flat(inputs), *wanted)
        for i in range(3):
            assert torch.equal(found[i], whole[i]) if wanted[i] else found[i].shape == (0,)
        assert torch.equal(found[3], whole[3])
        assert torch.equal(found[4], whole[4])


def tail_gradients(M, N, r, seed, B=2):
    return draw(B, M, r, seed=seed + 4), real(B, r, seed=seed + 5) - 0.3, draw(B, N, r, seed=seed + 6)


@pytest.mark.parametrize(
    ("size", "kind"),
    [
        ((63, 20, 11), "random"),
        ((17, 18, 17), "random"),
        ((18, 12, 9), "ill-conditioned"),
        ((18, 12, 9), "nearly orthonormal"),
        ((18, 12, 9), "rank-deficient"),
        ((5, 66, 1), "random"),
        ((8, 8, 8), "random"),
    ],
)
def test_the_tail_is_as_accurate_as_eager(size, kind):
    errors = Errors()
    for seed in range(3):
        inputs, grads = tail_inputs(*size, seed, kind), tail_gradients(*size, seed)
        exact, eager = both(tail, inputs, grads)
        x = flat(inputs)
        kept = [y.clone() for y in x]
        found = *svd_tail.svd_tail(*x), *svd_tail.svd_tail_backward(*(planes(g) for g in grads), *x, True)
        for y, before in zip(x, kept, strict=True):
            assert torch.equal(y, before)
        # a single column has no step to feel: what is left is rounding
        cut = 7 if size[2] == 1 else 8
        errors.add(found[:cut], eager[:cut], exact[:cut])
    errors.check()


@pytest.mark.parametrize(("size", "samples"), [((8, 9, 1), 32), ((60, 50, 34), 1), ((200, 100, 66), 1)])
def test_extreme_sizes(size, samples):
    errors = Errors()
    for seed in range(0, samples, 2):
        B = min(2, samples)
        inputs, grads = tail_inputs(*size, seed, B=B), tail_gradients(*size, seed, B=B)
        exact, eager = both(tail, inputs, grads)
        x = flat(inputs)
        found = *svd_tail.svd_tail(*x), *svd_tail.svd_tail_backward(*(planes(g) for g in grads), *x, True)
        errors.add(found[:7], eager[:7], exact[:7])
    errors.check()


def test_columns_of_equal_value_keep_their_order_and_nan_comes_first():
    inputs = tail_inputs(12, 10, 9, 0)
    S = torch.tensor(
        [[0.2, 0.5, 0.2, 0.5, 0.1, 0.2, 0.9, 0.1, 0.5], [0.0, -0.0, 1, 1, 1, 0, 2, 2, 0]]
    ).double()
    inputs[2] = S
    exact = tail(*inputs)
    for f, x in zip(svd_tail.svd_tail(*flat(inputs)), exact, strict=True):
        f = f.double().cpu()
        torch.testing.assert_close(torch.view_as_complex(f) if x.is_complex() else f, x, rtol=1e-4, atol=1e-6)
    S[0, 4] = S[0, 2] = torch.nan
    exact, found = tail(*inputs), svd_tail.svd_tail(*flat(inputs))
    assert found[1].isnan().cpu().equal(exact[1].isnan())
    torch.testing.assert_close(torch.view_as_complex(found[0].double().cpu()), exact[0], rtol=1e-4, atol=1e-6)


def test_a_tail_of_zeros():
    M, N, r = 7, 6, 3
    inputs = [x if x.ndim == 1 else torch.zeros_like(x) for x in tail_inputs(M, N, r, 0)]
    grads = tail_gradients(M, N, r, 0)
    exact = with_gradients(tail, inputs, grads)
    x = flat(inputs)
    found = *svd_tail.svd_tail(*x), *svd_tail.svd_tail_backward(*(planes(g) for g in grads), *x, True)
    for f, e in zip(found, exact, strict=True):
        e = torch.view_as_real(e.resolve_conj()) if e.is_complex() else e
        torch.testing.assert_close(f.double().cpu(), e, rtol=1e-5, atol=1e-9)


def test_nan_stays_in_its_sample():
    inputs, grads = tail_inputs(9, 7, 4, 0), [planes(g) for g in tail_gradients(9, 7, 4, 0)]
    for k in range(4):
        sick = [x.clone() for x in inputs]
        sick[k][1].view(-1)[1] = torch.nan
        for function in (
            svd_tail.svd_tail,
            lambda *x: svd_tail.svd_tail_backward(*grads, *x, True)[:4],
        ):
            well, found = function(*flat(inputs)), function(*flat(sick))
            # the gradients of a predicted value that is NaN are finite
            assert k == 2 or any(x[1].isnan().any() for x in found)
            for a, b in zip(well, found, strict=True):
                assert torch.equal(a[0], b[0])


def test_more_samples_than_programs(monkeypatch):
    inputs, grads = tail_inputs(9, 7, 4, 0), [planes(g) for g in tail_gradients(9, 7, 4, 0)]
    x = flat(inputs)
    g = grads[1]

    def everything():
        U, V, S, H, scalars = x
        return (
            *svd_tail.svd_tail(*x),
            *svd_tail.svd_tail_backward(*grads, *x, True),
            spectral.spectral_calibrate(U, H, V, S, scalars[2:]),
            *spectral.spectral_calibrate_backward(g, U, H, V, S, scalars[2:], True, True, True),
        )

    whole = everything()
    monkeypatch.setattr(ortho, "PROGRAMS", 1)
    for a, b in zip(everything(), whole, strict=True):
        assert torch.equal(a, b)


def test_empty_batch():
    inputs = flat([x[:0] if x.ndim > 1 else x for x in tail_inputs(6, 5, 3, 0)])
    U, V, S, H, scalars = inputs
    assert [x.shape for x in svd_tail.svd_tail(*inputs)] == [U.shape, S.shape, V.shape]
    found = svd_tail.svd_tail_backward(U, S, V, *inputs, False)
    assert [x.shape for x in found] == [U.shape, V.shape, S.shape, (0,), (3,)]
    assert found[4].tolist() == [0, 0, 0]
    assert spectral.spectral_calibrate(U, H, V, S, scalars[2:]).shape == S.shape
    found = spectral.spectral_calibrate_backward(S, U, H, V, S, scalars[2:], True, False, True)
    assert [x.shape for x in found] == [U.shape, (0,), V.shape, S.shape, (1,)]


@pytest.mark.parametrize("size", [(1, 2, 1), (18, 17, 17)])
def test_nothing_is_written_outside(size):
    U, V, S, H, scalars = flat([x[:1] if x.ndim > 1 else x for x in tail_inputs(*size, 0)])
    for launch, _ in (
        spectral.spectral_calibrate_launch(U, H, V, S, scalars[2:]),
        spectral.spectral_calibrate_backward_launch(S, U, H, V, S, scalars[2:], True, True, True),
        svd_tail.svd_tail_launch(U, V, S, H, scalars),
        svd_tail.svd_tail_backward_launch(U, S, V, U, V, S, H, scalars, True),
    ):
        launch, check = guarded(launch)
        launch.run()
        check()


def test_sizes_that_are_not_served_are_refused():
    with pytest.raises(ValueError, match="3 rows are fewer than r = 4"):
        svd_tail.svd_tail(
            torch.zeros(1, 3, 4, 2), torch.zeros(1, 6, 4, 2), torch.zeros(1, 4), torch.zeros(1, 3, 6, 2), None
        )
    assert "2000 rows are more than" in ortho.limit(4, 2000)[0]


def launches():
    found = {}
    for M, r in ((64, 32), (128, 64)):
        U, H = torch.empty(256, M, r, 2, device="meta"), torch.empty(256, M, M, 2, device="meta")
        S, scalars = torch.empty(256, r, device="meta"), torch.empty(3, dtype=torch.float64, device="meta")
        found |= {
            f"calibrate forward {M}": spectral.spectral_calibrate_launch(U, H, U, S, scalars),
            f"calibrate backward {M}": spectral.spectral_calibrate_backward_launch(
                S, U, H, U, S, scalars, True, True, True
            ),
        }
        # larger factors go by tiles
        if M * r <= ortho.FASTER:
            found[f"tail forward {M}"] = svd_tail.svd_tail_launch(U, U, S, H, scalars)
            found[f"tail backward {M}"] = svd_tail.svd_tail_backward_launch(
                U, S, U, U, U, S, H, scalars, True
            )
    return {name: launch for name, (launch, _) in found.items()}


@pytest.mark.parametrize(("M", "N", "r"), [(64, 64, 32), (128, 96, 64)])
def test_memory_sees_operands_and_results_alone(M, N, r):
    B = 2 * ortho.PROGRAMS
    U, V, H = (torch.empty(B, *shape, 2, device="meta") for shape in ((M, r), (N, r), (M, N)))
    S, scalars = torch.empty(B, r, device="meta"), torch.empty(3, dtype=torch.float64, device="meta")
    factors, matrix, spectrum = 8 * (M + N) * r, 8 * M * N, 4 * r
    calibrate = spectral.spectral_calibrate_launch(U, H, V, S, scalars)[0]
    assert bytes_a_sample(calibrate, B) == factors + matrix + 2 * spectrum
    backward = spectral.spectral_calibrate_backward_launch(S, U, H, V, S, scalars, True, True, True)[0]
    assert bytes_a_sample(backward, B) == 2 * (factors + matrix) + 3 * spectrum + 4
    tail = svd_tail.svd_tail_launch(U, V, S, H, scalars)[0]
    assert bytes_a_sample(tail, B) == 2 * factors + matrix + 2 * spectrum
    backward = svd_tail.svd_tail_backward_launch(U, S, V, U, V, S, H, scalars, True)[0]
    assert bytes_a_sample(backward, B) == 3 * factors + 2 * matrix + 3 * spectrum + 12


@pytest.mark.parametrize(("processors", "cache"), [(108, 40 << 20), (132, 50 << 20)])
@pytest.mark.parametrize(("M", "r"), [(64, 32), (128, 64), (256, 128)])
def test_scratch_stays_in_the_cache_of_the_chip(monkeypatch, M, r, processors, cache):
    monkeypatch.setattr(ortho, "chip", lambda x: (processors, cache))
    B = 4096
    U, H = torch.empty(B, M, r, 2, device="meta"), torch.empty(B, M, M, 2, device="meta")
    S, scalars = torch.empty(B, r, device="meta"), torch.empty(3, dtype=torch.float64, device="meta")
    for launch, _ in (
        spectral.spectral_calibrate_backward_launch(S, U, H, U, S, scalars, True, True, True),
        svd_tail.svd_tail_launch(U, U, S, H, scalars),
        svd_tail.svd_tail_backward_launch(U, S, U, U, U, S, H, scalars, True),
    ):
        check_scratch(launch, B, processors, cache)


def test_what_is_compiled_ahead():
    # the rest are vectors of r, and entries of r x r matrices in the order of the columns
    matrices = {"calibrate forward": 9, "calibrate backward": 23, "tail forward": 24, "tail backward": 97}
    check_compiled(__file__, matrices)
