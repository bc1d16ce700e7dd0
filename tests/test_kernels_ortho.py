"""Refinement and Björck's iteration as Triton kernels: interpreted against float64, compiled ahead for every chip."""

import math

import aot
import pytest
import torch

pytest.importorskip("triton")

from lomacs_fast import reference
from lomacs_fast.kernels import ortho

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = torch.finfo(torch.float32).eps


def draw(*shape, seed=0, scale=0.3):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, dtype=torch.complex128, generator=generator)


def conditioned(M, r, condition, seed=0):
    """Singular values from 1 to 1 / condition; a condition of infinity drops the rank by half."""
    left, right = (torch.linalg.qr(draw(2, n, r, seed=seed))[0] for n in (M, r))
    sigma = torch.logspace(0, -math.log10(condition), r, dtype=torch.float64) if condition < math.inf else 1.0
    if condition == math.inf:
        sigma = (torch.arange(r) < (r + 1) // 2).double()
    return left * sigma @ right.mH


KINDS = {
    "random": lambda M, r, seed: draw(2, M, r, seed=seed),
    "ill-conditioned": lambda M, r, seed: conditioned(M, r, 1e10, seed),
    "nearly orthonormal": lambda M, r, seed: conditioned(M, r, 1, seed) + 1e-4 * draw(2, M, r, seed=seed + 9),
    "rank-deficient": lambda M, r, seed: conditioned(M, r, math.inf, seed),
    "zero": lambda M, r, seed: torch.zeros(2, M, r, dtype=torch.complex128),
}


def planes(x):
    """Complex or real float64 as the kernels take it, float32."""
    x = x.detach().resolve_conj().to(DEVICE)
    return torch.view_as_real(x.to(torch.complex64)).contiguous() if x.is_complex() else x.float()


def single(x):
    return x.detach().to(torch.complex64 if x.is_complex() else torch.float32)


def like(found, expected):
    found = found.to("cpu")
    return torch.view_as_complex(found).to(torch.complex128) if expected.is_complex() else found.double()


class Errors:
    """Squared errors of kernels and of eager float32 against float64, pooled over calls, for each output."""

    def __init__(self):
        self.sums = {}

    def add(self, found, eager, exact):
        for i, (f, e, x) in enumerate(zip(found, eager, exact, strict=True)):
            f = like(f, x)
            assert f.shape == x.shape
            assert f.isfinite().all()
            sums = self.sums.setdefault(i, [0.0, 0.0, 0.0])
            for k, value in enumerate((f - x, e.to(x.dtype) - x, x)):
                sums[k] += float(value.abs().square().sum())

    def check(self):
        for i, sums in self.sums.items():
            ours, eager, size = (math.sqrt(s) for s in sums)
            assert ours <= 2 * eager + 4 * EPS * size, (
                f"output {i}: {ours / size} against eager {eager / size}"
            )


def with_gradients(function, inputs, grads):
    """Outputs and gradients of the reference, in float32 or float64 as the inputs are."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*inputs)
    return [x.detach() for x in (*outputs, *torch.autograd.grad(outputs, inputs, grads))]


def refine(U, V, steps):
    return reference.ortho.ortho_refine(U, steps[0]), reference.ortho.ortho_refine(V, steps[1])


def refined(U, V, steps, gU, gV):
    u, v, gu, gv = (planes(x) for x in (U, V, gU, gV))
    kept = [x.clone() for x in (u, v, gu, gv)]
    found = (*ortho.ortho_refine(u, v, steps), *ortho.ortho_refine_backward(gu, gv, u, v, steps))
    for x, before in zip((u, v, gu, gv), kept, strict=True):
        assert torch.equal(x, before)
    return found


@pytest.mark.parametrize(
    ("size", "kind"), [*(((63, 20, 11), kind) for kind in KINDS), ((17, 17, 17), "rank-deficient")]
)
def test_refinement_is_as_accurate_as_eager(size, kind):
    M, N, r = size
    errors = Errors()
    steps = torch.tensor([0.07, 0.45], dtype=torch.float64)
    for seed in range(3):
        U, V = KINDS[kind](M, r, seed), KINDS[kind](N, r, seed + 5)
        grads = draw(2, M, r, seed=seed + 20), draw(2, N, r, seed=seed + 30)
        exact = with_gradients(refine, (U, V, steps), grads)
        eager = with_gradients(refine, [single(x) for x in (U, V, steps)], [single(x) for x in grads])
        errors.add(refined(U, V, steps.to(DEVICE), *grads), eager, exact)
    errors.check()


@pytest.mark.parametrize("size", [(64, 32), (70, 33), (8, 1)])
def test_refinement_of_one_factor(size):
    M, r = size
    errors, steps = Errors(), torch.tensor([0.2], dtype=torch.float64)
    U, gU = draw(1, M, r), draw(1, M, r, seed=1)

    def one(U, steps):
        return (reference.ortho.ortho_refine(U, steps[0]),)

    exact = with_gradients(one, (U, steps), (gU,))
    eager = with_gradients(one, (single(U), single(steps)), (single(gU),))
    out, empty = ortho.ortho_refine(planes(U), None, steps.to(DEVICE))
    gu, gv, gsteps = ortho.ortho_refine_backward(planes(gU), None, planes(U), None, steps.to(DEVICE))
    assert empty.shape == gv.shape == (0,)
    assert gsteps.dtype == torch.float64
    # a single number of a single sample says little: the pooled test has the steps
    errors.add((out, gu), eager[:2], exact[:2])
    errors.check()


def one_bjorck(steps, order):
    return lambda U: (reference.bjorck(U, steps, order),)


@pytest.mark.parametrize(
    ("steps", "order", "size"),
    [
        (0, 1, (63, 11)),
        (1, 2, (63, 11)),
        (3, 1, (63, 11)),
        (2, 2, (63, 11)),
        (1, 2, (17, 17)),
        (2, 1, (17, 17)),
    ],
)
def test_bjorck_is_as_accurate_as_eager(steps, order, size):
    M, r = size
    for kind in KINDS if r == 11 else ("random",):
        errors = Errors()
        for seed in range(3):
            # twice as large: the scaling works
            U, g = 2 * KINDS[kind](M, r, seed), draw(2, M, r, seed=seed + 40)
            exact = with_gradients(one_bjorck(steps, order), (U,), (g,))
            eager = with_gradients(one_bjorck(steps, order), (single(U),), (single(g),))
            u, gu = planes(U), planes(g)
            found = ortho.bjorck(u, steps, order), ortho.bjorck_backward(gu, u, steps, order)
            assert torch.equal(u, planes(U))
            assert torch.equal(gu, planes(g))
            errors.add(found, eager, exact)
        errors.check()


@pytest.mark.parametrize(
    ("size", "B", "name"),
    [
        ((8, 1), 32, "refine"),
        ((8, 8), 32, "refine"),
        ((8, 1), 32, "bjorck"),
        ((8, 8), 32, "bjorck"),
        # entries enough to pool
        ((200, 100), 1, "refine"),
        ((256, 128), 1, "bjorck forward"),
    ],
)
def test_extreme_sizes(size, B, name):
    M, r = size
    steps = torch.tensor([0.2], dtype=torch.float64)
    U, g = 2 * draw(B, M, r), draw(B, M, r, seed=1)
    function = one_bjorck(1, 1) if name != "refine" else lambda U: (reference.ortho.ortho_refine(U, 0.2),)
    exact, eager = (with_gradients(function, (f(U),), (f(g),)) for f in (lambda x: x, single))
    u, gu = planes(U), planes(g)
    if name == "refine":
        found = [ortho.ortho_refine(u, None, steps.to(DEVICE))[0]]
        found += [ortho.ortho_refine_backward(gu, None, u, None, steps.to(DEVICE))[0]]
    else:
        found = [ortho.bjorck(u, 1, 1)]
        found += [ortho.bjorck_backward(gu, u, 1, 1)] if name == "bjorck" else []
    errors = Errors()
    errors.add(found, eager[: len(found)], exact[: len(found)])
    errors.check()


def test_ties_of_the_scaling_share_its_gradient():
    U = torch.eye(4, 3, dtype=torch.complex128)[None] * 3
    g = draw(1, 4, 3)
    exact = with_gradients(one_bjorck(1, 1), (U,), (g,))[1]
    found = ortho.bjorck_backward(planes(g), planes(U), 1, 1)
    torch.testing.assert_close(like(found, exact), exact, rtol=1e-5, atol=1e-6)


def test_bjorck_converges_from_condition_100():
    M, r = 40, 16
    out = like(
        ortho.bjorck(planes(conditioned(M, r, 100)[:1]), 20, 1), torch.zeros(1, dtype=torch.complex128)
    )
    assert torch.linalg.matrix_norm(out.mH @ out - torch.eye(r)).max() <= 1e-5 * math.sqrt(r)


def test_nan_stays_in_its_sample():
    U, g, steps = (
        draw(3, 17, 5),
        draw(3, 17, 5, seed=1),
        torch.tensor([0.3], dtype=torch.float64, device=DEVICE),
    )
    sick = U.clone()
    sick[1, 3, 2] = torch.nan
    for function in (
        lambda x: ortho.ortho_refine(planes(x), None, steps)[0],
        lambda x: ortho.ortho_refine_backward(planes(g), None, planes(x), None, steps)[0],
        lambda x: ortho.bjorck(planes(x), 2, 1),
        lambda x: ortho.bjorck_backward(planes(g), planes(x), 1, 2),
    ):
        well, found = function(U), function(sick)
        assert found[1].isnan().any()
        assert torch.equal(found[::2], well[::2])


def test_the_scaling_of_nan_is_nan():
    U = draw(1, 6, 2)
    U[0, 0, 0] = torch.nan
    assert ortho.bjorck(planes(U), 0, 1).isnan().all()


def test_more_samples_than_programs(monkeypatch):
    U, V, steps = draw(5, 9, 4), draw(5, 7, 4, seed=1), torch.tensor([0.1, 0.3], dtype=torch.float64)
    grads = draw(5, 9, 4, seed=2), draw(5, 7, 4, seed=3)
    whole = refined(U, V, steps.to(DEVICE), *grads)
    iterated = ortho.bjorck(planes(U), 3, 2), ortho.bjorck_backward(planes(grads[0]), planes(U), 3, 2)
    monkeypatch.setattr(ortho, "PROGRAMS", 2)
    for a, b in zip(refined(U, V, steps.to(DEVICE), *grads), whole, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(ortho.bjorck(planes(U), 3, 2), iterated[0])
    assert torch.equal(ortho.bjorck_backward(planes(grads[0]), planes(U), 3, 2), iterated[1])


def test_empty_batch():
    U, V, steps = (
        planes(draw(0, 6, 3)),
        planes(draw(0, 5, 3)),
        torch.ones(2, dtype=torch.float64, device=DEVICE),
    )
    assert [x.shape for x in ortho.ortho_refine(U, V, steps)] == [U.shape, V.shape]
    gU, gV, gsteps = ortho.ortho_refine_backward(U, V, U, V, steps)
    assert (gU.shape, gV.shape) == (U.shape, V.shape)
    assert gsteps.tolist() == [0, 0]
    assert ortho.bjorck(U, 2, 1).shape == ortho.bjorck_backward(U, U, 2, 1).shape == U.shape


def guarded(launch):
    """The launch with every tensor it writes inside a larger one full of 7; a check that the rest stays 7."""
    arguments, around = dict(launch.arguments), []
    for name, x in launch.arguments.items():
        if isinstance(x, torch.Tensor) and x.numel() and x.dtype in (torch.float32, torch.int32):
            buffer = torch.full((x.numel() + 256,), 7, dtype=x.dtype, device=x.device)
            inside = buffer[128:-128].view(x.shape)
            inside.copy_(x)
            arguments[name] = inside
            around.append((name, buffer))

    def check():
        for name, buffer in around:
            assert (buffer[:128] == 7).all(), name
            assert (buffer[-128:] == 7).all(), name

    return launch._replace(arguments=arguments), check


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (17, 17)])
def test_nothing_is_written_outside(size):
    M, r = size
    U, V = planes(draw(1, M, r)), planes(draw(1, M + 1, r))
    steps = torch.ones(2, dtype=torch.float64, device=DEVICE)
    for launch, _ in (
        ortho.ortho_refine_launch(U, V, steps),
        ortho.ortho_refine_backward_launch(U, V, U, V, steps),
        ortho.bjorck_launch(U, 1, 2),
        ortho.bjorck_backward_launch(U, U, 1, 2),
    ):
        launch, check = guarded(launch)
        launch.run()
        check()


def test_sizes_that_are_not_served_are_refused():
    assert ortho.limit(32, 64, 128) == []
    for U in (torch.zeros(1, 3, 4, 2), torch.zeros(1, 2048, 4, 2), torch.zeros(1, 300, 257, 2)):
        with pytest.raises(ValueError, match="do not serve"):
            ortho.bjorck(U, 1, 1)
    with pytest.raises(ValueError, match="3 rows are fewer than r = 4"):
        ortho.ortho_refine(torch.zeros(1, 4, 4, 2), torch.zeros(1, 3, 4, 2), torch.ones(2))


def launches():
    found, steps = {}, torch.empty(2, dtype=torch.float64, device="meta")
    for M, r in ((64, 32), (128, 64)):
        U = torch.empty(256, M, r, 2, device="meta")
        found |= {
            f"refine forward {M}": ortho.ortho_refine_launch(U, U, steps),
            f"refine backward {M}": ortho.ortho_refine_backward_launch(U, U, U, U, steps),
        }
        for order in (1, 2):
            found[f"bjorck {order} forward {M}"] = ortho.bjorck_launch(U, 5, order)
            found[f"bjorck {order} backward {M}"] = ortho.bjorck_backward_launch(U, U, 5, order)
    return {name: launch for name, (launch, _) in found.items()}


def bytes_a_sample(launch, B):
    """Of operands and results, each counted once; whatever else a launch has, its programs share."""
    tensors = [x for x in launch.arguments.values() if isinstance(x, torch.Tensor) and x.numel() > 3]
    assert all(x.shape[0] == B or x.shape[0] <= ortho.PROGRAMS for x in tensors)
    return sum(x.element_size() * x.numel() for x in tensors if x.shape[0] == B) / B


@pytest.mark.parametrize(("M", "r"), [(64, 32), (128, 64)])
def test_memory_sees_operands_and_results_alone(M, r):
    B = 2 * ortho.PROGRAMS
    U, steps = torch.empty(B, M, r, 2, device="meta"), torch.empty(2, dtype=torch.float64, device="meta")
    # both factors; backward the gradient of a step is a number a factor and a sample
    assert bytes_a_sample(ortho.ortho_refine_launch(U, U, steps)[0], B) == 2 * 16 * M * r
    backward = ortho.ortho_refine_backward_launch(U, U, U, U, steps)[0]
    assert bytes_a_sample(backward, B) == 2 * (24 * M * r + 4)
    for order in (1, 2):
        assert bytes_a_sample(ortho.bjorck_launch(U, 5, order)[0], B) == 16 * M * r
        assert bytes_a_sample(ortho.bjorck_backward_launch(U, U, 5, order)[0], B) == 24 * M * r


SCRATCH = (
    "p_p",
    "p_e",
    "p_c",
    "p_g",
    "p_gw",
    "p_other",
    "p_iterates",
    "p_scratch",
    "p_sums",
    "p_norms",
    "p_places",
    "p_q",
)


def check_scratch(launch, B, processors, cache):
    """All programs' scratch in L2, or no more than a program a multiprocessor; all samples of a small batch."""
    blocks = math.prod(launch.grid)
    scratch = [x for name, x in launch.arguments.items() if name in SCRATCH and x.shape[0] == launch.grid[0]]
    size = sum(x.element_size() * x.numel() for x in scratch if x.shape[0] < B)
    assert blocks >= min(B, processors)
    assert size <= cache or blocks <= processors, (launch.grid, size)


@pytest.mark.parametrize(("processors", "cache"), [(108, 40 << 20), (132, 50 << 20)])
@pytest.mark.parametrize(("M", "r"), [(64, 32), (128, 64), (256, 128)])
def test_scratch_stays_in_the_cache_of_the_chip(monkeypatch, M, r, processors, cache):
    monkeypatch.setattr(ortho, "chip", lambda x: (processors, cache))
    B = 4096
    U, steps = torch.empty(B, M, r, 2, device="meta"), torch.empty(2, dtype=torch.float64, device="meta")
    for launch, _ in (
        ortho.ortho_refine_launch(U, U, steps),
        ortho.ortho_refine_backward_launch(U, U, U, U, steps),
        ortho.bjorck_launch(U, 5, 1),
        ortho.bjorck_backward_launch(U, U, 5, 1),
    ):
        check_scratch(launch, B, processors, cache)


def check_compiled(file, matrices):
    """No spills, tensor cores, shared memory of any chip, operands in whole vectors."""
    for name, targets in aot.reports(file).items():
        for target, found in targets.items():
            assert found["spills"] == 0, (name, target, found)
            assert found["tensor"] > 0, (name, target)
            assert found["shared"] <= min(aot.SHARED[target], aot.CONSUMER), (name, target, found)
            if target != "gfx942":
                least = matrices.get(name) or matrices[name.rpartition(" ")[0]]
                assert found["wide_loads"] >= least, (name, target, found)


def test_what_is_compiled_ahead():
    # all but scalars and row sums are read 16 bytes at a time
    matrices = {"refine forward": 11, "refine backward": 34, "bjorck 1 forward": 14, "bjorck 1 backward": 38}
    check_compiled(__file__, matrices | {"bjorck 2 forward": 16, "bjorck 2 backward": 49})
