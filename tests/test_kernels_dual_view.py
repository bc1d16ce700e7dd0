"""The Triton kernels of the dual view, interpreted against float64, and compiled ahead for every target."""

import aot
import pytest
import torch

pytest.importorskip("triton")

from lomacs_fast import reference
from lomacs_fast.kernels import dual_view as kernels
from lomacs_fast.kernels import freq_gate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = torch.finfo(torch.float32).eps
NAMES = ("X", "gHd", "gweight", "gbias", "gpos")


def problem(B, M, N, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, M, N, 2), (d, 4 * N), (d,), (1, M, d), (B, M, d)]
    scales = [1, (4 * N) ** -0.5, 1, 1, 1]
    return [(torch.randn(s, generator=generator) * c).to(DEVICE) for s, c in zip(shapes, scales, strict=True)]


def expected(Hd, weight, bias, pos, gX, dtype):
    inputs = [x.to(dtype).requires_grad_() for x in (Hd, weight, bias, pos)]
    X = reference.dual_view_project(torch.view_as_complex(inputs[0]), *inputs[1:])
    return [X.detach(), *torch.autograd.grad((X * gX.to(dtype)).sum(), inputs)]


def served(Hd, weight, bias, pos, gX, gh=True, gw=True):
    X = kernels.dual_view_project(Hd, weight, bias, pos)
    return [X, *kernels.dual_view_project_backward(gX, Hd, weight, gh, gw)]


def holds(found, eager, want):
    """Relative L2 errors of lists of tensors, pooled, at most twice eager's and 4 eps."""
    columns = (zip(*x, strict=True) for x in (found, eager, want))
    for name, xs, ys, zs in zip(NAMES, *columns, strict=True):
        assert all(x.shape == z.shape for x, z in zip(xs, zs, strict=True))
        ours = sum((x.double() - z).square().sum() for x, z in zip(xs, zs, strict=True)).sqrt()
        other = sum((y.double() - z).square().sum() for y, z in zip(ys, zs, strict=True)).sqrt()
        size = sum(z.square().sum() for z in zs).sqrt()
        assert ours <= 2 * other + 4 * EPS * size, f"{name}: {ours / size:.3g}, eager {other / size:.3g}"


@pytest.mark.parametrize(
    ("B", "M", "N", "d", "seeds"),
    [
        (11, 8, 8, 8, 3),
        (2, 2, 3, 1, 1),
        (2, 3, 2, 5, 1),
        (3, 5, 12, 17, 2),
        (2, 9, 16, 70, 1),
        (2, 63, 41, 24, 1),
        (2, 64, 64, 64, 1),
        (1, 131, 5, 3, 1),
    ],
)
def test_as_accurate_as_eager_float32(B, M, N, d, seeds):
    problems = [problem(B, M, N, d, seed) for seed in range(seeds)]
    want, eager = ([expected(*p, dtype) for p in problems] for dtype in (torch.float64, torch.float32))
    holds([served(*p) for p in problems], eager, want)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 7, 11, 64, 100])
def test_tables_are_those_of_the_interpolation(n):
    cpu = torch.device("cpu")
    eye = torch.eye(n // 2, dtype=torch.float64)[None, None]
    up = torch.nn.functional.interpolate(eye, size=(n, n // 2), mode="bilinear", align_corners=False)[0, 0]
    low, share = kernels.row_table(n, cpu)
    found = torch.zeros(n, n // 2, dtype=torch.float64)
    for i in range(n):
        found[i, low[i]] += 1 - share[i]
        found[i, min(int(low[i]) + 1, n // 2 - 1)] += share[i]
    torch.testing.assert_close(found, up, rtol=0, atol=EPS)
    first, weights = kernels.transposed_table(n, cpu)
    assert weights.shape[0] == n - n // 2
    back = torch.zeros(n - n // 2, n + weights.shape[1], dtype=torch.float64)
    for i in range(len(first)):
        back[i, first[i] : first[i] + weights.shape[1]] = weights[i].double()
    torch.testing.assert_close(back[: n // 2, :n], up.T, rtol=0, atol=EPS)
    assert (back[:, n:] == 0).all()
    assert (back[n // 2 :] == 0).all()


@pytest.mark.parametrize("size", [(8, 6, 4), (9, 5, 3), (16, 8, 4), (130, 4, 2)])
def test_the_front_of_the_network(size):
    M, N, d = size
    Hd, weight, bias, pos, _ = problem(3, M, N, d)
    Hd[1] = 0
    generator = torch.Generator().manual_seed(1)
    shapes = [(4, M), (M, 4), (5, N), (N, 5)]
    gate = [(torch.randn(s, generator=generator) / s[1] ** 0.5).to(DEVICE) for s in shapes]
    for normalize in (True, False):
        X, found, norms = freq_gate.gate_project(Hd, *gate, 0.3, normalize, weight, bias, pos)
        gated, lengths = freq_gate.freq_gate(Hd, *gate, 0.3, normalize)
        assert torch.equal(found, gated)
        assert torch.equal(norms, lengths)
        assert torch.equal(X, kernels.dual_view_project(gated, weight, bias, pos))
        torch.testing.assert_close(X[1], bias + pos[0], rtol=0, atol=EPS)


def test_what_is_not_wanted_is_empty():
    p = problem(2, 7, 6, 5)
    whole = served(*p)
    for gh, gw in [(True, False), (False, True), (False, False)]:
        for name, x, y in zip(NAMES, served(*p, gh, gw), whole, strict=True):
            wanted = name == "X" or (gh if name == "gHd" else gw)
            assert torch.equal(x, y) if wanted else x.shape == (0,)


@pytest.mark.parametrize("M", [8, 9])
def test_a_row_of_nan_or_infinity_reaches_its_neighbours_alone(M):
    # every column is in a pair: the folded weight of one that is not holds zeros, times NaN
    Hd, weight, bias, pos, gX = problem(3, M, 6, 4)
    whole = served(Hd, weight, bias, pos, gX)
    for bad in (torch.nan, torch.inf):
        h, g = Hd.clone(), gX.clone()
        h[1, 6, 1], g[1, 6, 1] = bad, bad
        want = expected(h, weight, bias, pos, g, torch.float64)
        X, gHd, *_ = served(h, weight, bias, pos, g)
        for x, y, z in ((X, whole[0], want[0]), (gHd, whole[1], want[1])):
            assert torch.equal(x.isfinite(), z.isfinite())
            assert torch.equal(x[0], y[0])
            assert torch.equal(x[2], y[2])


def test_empty_batch():
    p = problem(0, 6, 5, 4)
    X, gHd, *rest = served(*p)
    assert X.shape == (0, 6, 4)
    assert gHd.shape == (0, 6, 5, 2)
    for g, x in zip(rest, p[1:4], strict=True):
        assert torch.equal(g, torch.zeros_like(x))
    H = p[0]
    gate = [torch.zeros(s, device=DEVICE) for s in [(2, 6), (6, 2), (2, 5), (5, 2)]]
    X, Hd, norms = freq_gate.gate_project(H, *gate, 0.2, True, *p[1:4])
    assert X.shape == (0, 6, 4)
    assert Hd.shape == H.shape
    assert norms.shape == (0,)


def test_the_sum_over_samples_does_not_depend_on_what_runs_beside_it(monkeypatch):
    p = problem(5, 4, 6, 3)
    whole = served(*p)
    assert all(torch.equal(x, y) for x, y in zip(whole, served(*p), strict=True))
    # fewer programs than samples: each keeps a sum, and a scratch, of its own
    monkeypatch.setattr(kernels, "PARTIALS", 2)
    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    monkeypatch.setattr(freq_gate, "PROGRAMS", 2)
    want, eager = ([expected(*p, dtype)] for dtype in (torch.float64, torch.float32))
    holds([served(*p)], eager, want)
    assert torch.equal(served(*p)[0], whole[0])
    gate = [torch.ones(s, device=DEVICE) / 9 for s in [(2, 4), (4, 2), (2, 6), (6, 2)]]
    few = freq_gate.gate_project(p[0], *gate, 0.2, True, *p[1:4])
    gradients = freq_gate.freq_gate_backward(p[0], few[2], p[0], *gate, 0.2, True, False, True)
    monkeypatch.setattr(freq_gate, "PROGRAMS", 5)
    many = freq_gate.gate_project(p[0], *gate, 0.2, True, *p[1:4])
    again = freq_gate.freq_gate_backward(p[0], few[2], p[0], *gate, 0.2, True, False, True)
    assert all(torch.equal(x, y) for x, y in zip(few + gradients, many + again, strict=True))


@pytest.mark.parametrize("size", [(9, 5, 18), (2, 16, 16)])
def test_nothing_outside_its_own_memory(size):
    Hd, weight, bias, pos, gX = problem(2, *size)
    folded = kernels.fold(weight, size[1])
    for launch, out in (
        kernels.forward_launch(Hd, folded, bias, pos),
        kernels.backward_launch(gX, folded, size[1]),
        kernels.weight_launch(gX, Hd),
    ):
        arguments, buffers = dict(launch.arguments), []
        for name, x in arguments.items():
            if isinstance(x, torch.Tensor):
                fill = torch.nan if x.is_floating_point() else 1 << 30
                buffer = torch.full((x.numel() + 512,), fill, dtype=x.dtype, device=x.device)
                arguments[name] = buffer[256 : 256 + x.numel()].view(x.shape).copy_(x)
                buffers.append((buffer, x, out is x))
        launch._replace(arguments=arguments).run()
        for buffer, x, written in buffers:
            outside = torch.cat([buffer[:256], buffer[256 + x.numel() :]])
            assert outside.isnan().all() if x.is_floating_point() else (outside == 1 << 30).all()
            if written:
                assert buffer[256 : 256 + x.numel()].isfinite().all()


def launches():
    found = {}
    for n in (64, 128):
        Hd, gX = (torch.empty(s, device="meta") for s in [(256, n, n, 2), (256, n, 64)])
        folded, bias, pos = (torch.empty(s, device="meta") for s in [(64, 4 * n), (64,), (1, n, 64)])
        found[f"forward {n}"] = kernels.forward_launch(Hd, folded, bias, pos)[0]
        if n == 64:
            found["backward"] = kernels.backward_launch(gX, folded, n)[0]
            found["weight"] = kernels.weight_launch(gX, Hd)[0]
    return found


def test_compiled_ahead():
    for name, targets in aot.reports(__file__).items():
        for target, report in targets.items():
            where = f"{name} on {target}: {report}"
            assert report["spills"] == 0, where
            assert report["shared"] <= 16640, where
            assert report["tensor"] > 0, where
            assert report["registers"] <= 256, where
            assert report["stores"] == report["wide_stores"], where
