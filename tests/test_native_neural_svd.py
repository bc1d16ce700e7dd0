"""The steps on the nested objective as an op: the CPU kernel against the reference, every instruction set, threads."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lomacs_fast import functional, reference, use_backend
from lomacs_fast.ops import native

# M != N, one column, as many columns as rows, more than a vector and more than a panel
SIZES = ((6, 5, 3), (1, 1, 1), (4, 7, 1), (7, 5, 5), (63, 41, 11), (17, 33, 16), (64, 40, 40))
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(params=["avx512", "avx2", "portable"])
def isa(request, monkeypatch):
    if reasons := native.reasons("cpu"):
        pytest.skip(f"no native library: {'; '.join(reasons)}")
    monkeypatch.setenv("LOMACS_FAST_ISA", request.param)
    try:
        ours(*problem(2, 2, 1), 1)
    except RuntimeError as error:
        if "lacks" not in str(error):
            raise
        pytest.skip(f"no {request.param} in this processor")
    return request.param


def problem(M, N, L, B=2, dtype=torch.complex128, seed=0):
    generator = torch.Generator().manual_seed(seed)
    H = torch.randn(B, M, N, dtype=dtype, generator=generator)
    # lengths of G out of order, so that the columns are sorted
    F = torch.linalg.qr(torch.randn(B, N, L, dtype=dtype, generator=generator))[0]
    return H, F.contiguous()


def ours(H, F, steps, watch=None):
    with use_backend("cpp"):
        return functional.neural_svd_steps(H, F, steps, watch)


@pytest.mark.parametrize("size", SIZES)
def test_float64_equals_the_reference(isa, size):
    H, F = problem(*size)
    for steps in (1, 3):
        watch = max(1, size[2] // 2)
        for got, want in zip(
            ours(H, F, steps, watch), reference.neural_svd_steps(H, F, steps, watch), strict=True
        ):
            assert got.shape == want.shape
            assert (got - want).norm() <= 1e-10 * want.norm() + 1e-13


def test_float32_by_the_rule(isa):
    for size in ((64, 64, 16), (63, 41, 11), (128, 128, 40)):
        error = torch.zeros(2, 2, dtype=torch.float64)
        for seed in range(3):
            H, F = problem(*size, B=11, seed=seed)
            exact = reference.neural_svd_steps(H, F, 1)
            single = H.to(torch.complex64), F.to(torch.complex64)
            for k, run in enumerate((ours, reference.neural_svd_steps)):
                for i, (got, want) in enumerate(zip(run(*single, 1), exact, strict=True)):
                    error[k, i] += ((got - want).norm() / want.norm()) ** 2
        assert (error[0].sqrt() <= 2 * error[1].sqrt() + 4 * EPS).all()


def test_zeros_nan_and_no_matrices(isa):
    H, F = (x.to(torch.complex64) for x in problem(9, 7, 3, B=3))
    H[1] = 0
    found, change = ours(H, F, 2)
    torch.testing.assert_close(found[1].mH @ found[1], torch.eye(3, dtype=F.dtype), rtol=0, atol=1e-5)
    assert change[1] == 0
    H[2, 0, 0] = float("nan")
    found, _ = ours(H, F, 2)
    assert found[2].isnan().any()
    assert not found[:2].isnan().any()
    found, change = ours(H[:0], F[:0], 2)
    assert found.shape == (0, 7, 3)
    assert change.shape == (0,)


def test_the_same_bits_at_any_number_of_threads(isa):
    H, F = (x.to(torch.complex64) for x in problem(32, 24, 9, B=13))
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            runs += [ours(H, F, 3), ours(H, F, 3)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for run in runs for x, y in zip(runs[0], run, strict=True))


def test_opcheck_views_and_flops(isa):
    H, F = problem(6, 5, 3)
    planes = torch.view_as_real(H), torch.view_as_real(F)
    torch.library.opcheck(torch.ops.lomacs.neural_svd_steps.default, (*planes, 2, 2))
    want = ours(H, F, 2)
    got = ours(H.conj().resolve_conj().conj(), F.mT.contiguous().mT, 2)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    counts = []
    for backend in ("cpp", "eager"):
        with FlopCounterMode(display=False) as counter, use_backend(backend):
            functional.neural_svd_steps(H, F, 2)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_what_is_refused():
    H, F = problem(6, 5, 3)
    with pytest.raises(ValueError, match="at least as many rows"):
        functional.neural_svd_steps(H, torch.zeros(2, 5, 6, dtype=H.dtype), 1)
    with pytest.raises(TypeError, match="F must be complex128"):
        functional.neural_svd_steps(H, F.to(torch.complex64), 1)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        functional.neural_svd_steps(H, F, 0)
    with pytest.raises(ValueError, match="watch must be at least 1"):
        functional.neural_svd_steps(H, F, 1, 0)
    with pytest.raises(ValueError, match="only complex matrices"), use_backend("cpp"):
        functional.neural_svd_steps(H.real, F.real, 1)
    found, change = functional.neural_svd_steps(H.clone().requires_grad_(), F, 1)
    assert not found.requires_grad
    assert not change.requires_grad
