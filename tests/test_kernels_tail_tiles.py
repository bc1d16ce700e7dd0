"""The tail of large factors as Triton kernels: interpreted against float64, compiled ahead for every chip."""

import itertools

import aot
import pytest
import torch

pytest.importorskip("triton")

from test_kernels_ortho import Errors, check_compiled, guarded, planes, with_gradients
from test_kernels_spectral import both, flat, tail, tail_gradients, tail_inputs

from lomacs_fast.kernels import svd_tail, tail_tiles
from lomacs_fast.ops import spectral as op


@pytest.fixture
def small(monkeypatch):
    """Tiles so small that little factors have several, in rows, in columns and in what products go through."""
    monkeypatch.setattr(tail_tiles, "ROWS", 32)
    monkeypatch.setattr(tail_tiles, "COLUMNS", 16)


def everything(inputs, grads, gh=True):
    x = flat(inputs)
    kept = [y.clone() for y in x]
    given = [planes(g) for g in grads]
    found = *tail_tiles.svd_tail(*x), *tail_tiles.svd_tail_backward(*given, *x, gh)
    for y, before in zip(x + given, kept + [planes(g) for g in grads], strict=True):
        assert torch.equal(y, before)
    return found


@pytest.mark.parametrize(
    ("size", "kind"),
    [
        ((35, 20, 19), "random"),
        ((33, 34, 33), "random"),
        ((18, 20, 17), "ill-conditioned"),
        ((18, 20, 17), "nearly orthonormal"),
        ((18, 20, 17), "rank-deficient"),
        ((5, 66, 1), "random"),
        ((8, 8, 8), "random"),
    ],
)
def test_tiles_are_as_accurate_as_eager(small, size, kind):
    errors = Errors()
    # enough entries to pool in one
    for seed in range(1 if size[2] == 33 else 3):
        inputs, grads = tail_inputs(*size, seed, kind), tail_gradients(*size, seed)
        exact, eager = both(tail, inputs, grads)
        # a single column has no step to feel, what is left is rounding; few samples say little about scalars
        cut = 7 if size[2] in (1, 33) else 8
        errors.add(everything(inputs, grads)[:cut], eager[:cut], exact[:cut])
    errors.check()


def test_large_factors_go_by_tiles():
    errors, size = Errors(), (130, 72, 50)
    inputs, grads = tail_inputs(*size, 0, B=1), tail_gradients(*size, 0, B=1)
    exact, eager = both(tail, inputs, grads)
    x = flat(inputs)
    found = *svd_tail.svd_tail(*x), *svd_tail.svd_tail_backward(*(planes(g) for g in grads), *x, True)
    for a, b in zip(found, everything(inputs, grads), strict=True):
        assert torch.equal(a, b)
    # a sum over one sample says little about scalars: the pooled test has them
    errors.add(found[:7], eager[:7], exact[:7])
    errors.check()


def test_what_goes_by_tiles():
    def asked(M, N, r):
        return svd_tail.by_tiles(torch.empty(1, M, N, 2, device="meta"), torch.empty(1, r, device="meta"))

    assert not asked(64, 64, 32)
    assert asked(65, 64, 32)
    assert asked(64, 65, 32)
    assert asked(128, 128, 64)


def test_the_same_bits_again_and_without_the_gradient_of_h(small):
    inputs, grads = tail_inputs(18, 20, 17, 0), tail_gradients(18, 20, 17, 0)
    whole = everything(inputs, grads)
    for a, b in zip(everything(inputs, grads), whole, strict=True):
        assert torch.equal(a, b)
    found = everything(inputs, grads, gh=False)
    assert found[6].shape == (0,)
    for k in (0, 1, 2, 3, 4, 5, 7):
        assert torch.equal(found[k], whole[k])


def test_what_the_forward_keeps_is_what_the_backward_computes_again(small):
    inputs, grads = tail_inputs(18, 20, 17, 0), tail_gradients(18, 20, 17, 0)
    whole = everything(inputs, grads)
    x, given = flat(inputs), [planes(g) for g in grads]
    # the op promises the size that the kernels of the CPU need
    shape = op._kept_shape(x[0])
    U, S, V, kept = tail_tiles.svd_tail_kept(*x, shape[1])
    assert kept.shape == shape
    before = kept.clone()
    found = U, S, V, *tail_tiles.svd_tail_backward(*given, *x, True, (U, V, kept))
    for a, b in zip(found, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert torch.equal(kept.nan_to_num(), before.nan_to_num())
    fewer, _ = tail_tiles.svd_tail_backward_launches(*given, *x, False, (U, V, kept))
    assert len(fewer) == 3


@pytest.mark.parametrize(("M", "r"), [(1, 1), (17, 17), (65, 64), (256, 256)])
def test_what_is_kept_has_room(M, r):
    assert tail_tiles._least(r) <= op._kept_shape(torch.empty(1, M, r, 2, device="meta"))[1]


def test_narrow_tiles_measure_what_wide_ones_do(monkeypatch):
    inputs = flat(tail_inputs(35, 20, 19, 0))
    narrow = tail_tiles.svd_tail_launches(*inputs)[0][-1]
    assert (narrow.constants["COLUMNS"], narrow.grid) == (16, (4,))
    monkeypatch.setattr(tail_tiles, "chip", lambda x: (1, 0))
    wide, (_, S, *_) = tail_tiles.svd_tail_launches(*inputs)
    assert (wide[-1].constants["COLUMNS"], wide[-1].grid) == (32, (2,))
    for launch in wide:
        launch.run()
    expected = tail_tiles.svd_tail(*inputs)[1]
    torch.testing.assert_close(S, expected, rtol=1e-6, atol=1e-6)


def test_columns_of_equal_value_keep_their_order_and_nan_comes_first(small):
    inputs = tail_inputs(24, 20, 18, 0)
    S = torch.tensor([0.2, 0.5, 0.2, 0.5, 0.1, 0.2, 0.9, 0.1, 0.5]).double().repeat(2, 2)
    S[1] = S[1].flip(0).mul(10).round()
    S[1, :3] = torch.tensor([0.0, -0.0, 0.0])
    inputs[2] = S
    exact = tail(*inputs)
    for f, x in zip(tail_tiles.svd_tail(*flat(inputs)), exact, strict=True):
        f = f.double().cpu()
        torch.testing.assert_close(torch.view_as_complex(f) if x.is_complex() else f, x, rtol=1e-4, atol=1e-6)
    S[0, 4] = S[0, 17] = torch.nan
    exact, found = tail(*inputs), tail_tiles.svd_tail(*flat(inputs))
    assert found[1].isnan().cpu().equal(exact[1].isnan())
    torch.testing.assert_close(torch.view_as_complex(found[0].double().cpu()), exact[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("zeros", ["all", "a column", "nearly a column"])
def test_a_tail_of_zeros(small, zeros):
    size = 20, 19, 17
    inputs, grads = tail_inputs(*size, 0), tail_gradients(*size, 0)
    if zeros == "all":
        inputs = [x if x.ndim == 1 else torch.zeros_like(x) for x in inputs]
    else:
        # a norm of the size of what is added to it, or none
        scale = 0 if zeros == "a column" else 1e-8
        inputs[0][0, :, 3] *= scale
        inputs[1][1, :, 16] *= scale
    exact = with_gradients(tail, inputs, grads)
    for f, e in zip(everything(inputs, grads), exact, strict=True):
        e = torch.view_as_real(e.resolve_conj()) if e.is_complex() else e
        # gradients of zero columns are as large as 1e8
        for a, b in zip(f.double().cpu(), e, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * max(1.0, float(b.abs().max())))


def test_nan_stays_in_its_sample():
    inputs, grads = tail_inputs(9, 7, 4, 0), tail_gradients(9, 7, 4, 0)
    well = everything(inputs, grads)[:7]
    for k in range(4):
        sick = [x.clone() for x in inputs]
        sick[k][1].view(-1)[1] = torch.nan
        x = flat(sick)
        found = *tail_tiles.svd_tail(*x), *tail_tiles.svd_tail_backward(*(planes(g) for g in grads), *x, True)
        for part in (found[:3], found[3:7]):
            # the gradients of a predicted value that is NaN are finite
            assert k == 2 or any(x[1].isnan().any() for x in part)
        for a, b in zip(well, found, strict=False):
            assert torch.equal(a[0], b[0])


def test_empty_batch():
    inputs = flat([x[:0] if x.ndim > 1 else x for x in tail_inputs(6, 5, 3, 0)])
    U, V, S = inputs[:3]
    assert [x.shape for x in tail_tiles.svd_tail(*inputs)] == [U.shape, S.shape, V.shape]
    found = tail_tiles.svd_tail_backward(U, S, V, *inputs, False)
    assert [x.shape for x in found] == [U.shape, V.shape, S.shape, (0,), (3,)]
    assert found[4].tolist() == [0, 0, 0]


@pytest.mark.parametrize("size", [(1, 2, 1), (34, 18, 17)])
def test_nothing_is_written_outside(small, size):
    U, V, S, H, scalars = flat([x[:1] if x.ndim > 1 else x for x in tail_inputs(*size, 0)])
    forward, _ = tail_tiles.svd_tail_launches(U, V, S, H, scalars)
    backward, _ = tail_tiles.svd_tail_backward_launches(U, S, V, U, V, S, H, scalars, True)
    assert (len(forward), len(backward)) == (3, 6)
    for launch in forward + backward:
        inside, check = guarded(launch)
        inside.run()
        check()
        # the next one reads what this one writes
        launch.run()


def test_sizes_that_are_not_served_are_refused():
    with pytest.raises(ValueError, match="2000 rows are more than"):
        svd_tail.svd_tail(
            torch.zeros(1, 2000, 4, 2),
            torch.zeros(1, 6, 4, 2),
            torch.zeros(1, 4),
            torch.zeros(1, 2000, 6, 2),
            None,
        )


def of(M, N, r, B):
    U, V, H = (torch.empty(B, *shape, 2, device="meta") for shape in ((M, r), (N, r), (M, N)))
    S, scalars = torch.empty(B, r, device="meta"), torch.empty(3, dtype=torch.float64, device="meta")
    forward, _ = tail_tiles.svd_tail_launches(U, V, S, H, scalars)
    backward, _ = tail_tiles.svd_tail_backward_launches(U, S, V, U, V, S, H, scalars, True)
    return forward, backward


def test_programs_fill_the_chip(monkeypatch):
    # two of eight warps run at once on a multiprocessor, three of four
    monkeypatch.setattr(tail_tiles, "chip", lambda x: (132, 50 << 20))
    for launch in itertools.chain(*of(128, 128, 64, 64)):
        assert launch.grid[0] >= 0.95 * 132 * (2 if launch.num_warps == 8 else 2.9)
        assert launch.registers * 32 * launch.num_warps * (2 if launch.num_warps == 8 else 3) <= 65536


# the other sizes on one chip: factors of unequal heights, and rows of several tiles
ONLY = {
    f"{name} {size}": ["sm_90"] for name in ("refined", "normal", "raw") for size in ("128x96", "256x256")
}


def launches():
    found = {}
    for (M, N, r), B in (((128, 128, 64), 64), ((128, 96, 64), 64), ((256, 256, 128), 64)):
        forward, backward = of(M, N, r, B)
        for launch in forward + backward[2:]:
            name = f"{launch.kernel.__name__.removesuffix('_kernel')} {M}x{N}"
            if name in ONLY or M == 128 == N:
                found[name] = launch
    return found


def test_what_is_compiled_ahead():
    # the rest are vectors of r
    matrices = {
        "residual": 8,
        "refined": 10,
        "calibrated": 12,
        "normal": 52,
        "core": 12,
        "outer": 10,
        "raw": 30,
    }
    check_compiled(__file__, matrices)


def test_tensor_cores_take_whole_tiles_of_two_programs():
    for name, targets in aot.reports(__file__).items():
        for target, found in targets.items():
            if target.startswith("sm_") and name.endswith("128x128"):
                assert found["registers"] <= (168 if name.startswith(("residual", "core")) else 128)
                assert 3 * found["shared"] <= aot.SHARED[target]
