"""The Triton kernels of the frequency gate, interpreted against float64, and compiled ahead for every target."""

import math

import pytest
import torch

pytest.importorskip("triton")

import aot

from lomacs_fast import reference
from lomacs_fast.kernels import freq_gate as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = torch.finfo(torch.float32).eps
NAMES = ("Hd", "norms", "gH", "gr1", "gr2", "gc1", "gc2")


def perceptrons(M, N, hidden, generator=None, device=DEVICE):
    rows, columns = hidden
    shapes = [(rows, M), (M, rows), (columns, N), (N, columns)]
    if device == "meta":
        return tuple(torch.empty(s, device="meta") for s in shapes)
    return tuple((torch.randn(s, generator=generator) / s[1] ** 0.5).to(device) for s in shapes)


def channels(kinds, M, N, generator):
    """A sample of each kind, complex64."""
    found = []
    for kind in kinds:
        H = torch.randn(M, N, dtype=torch.complex64, generator=generator)
        k = min(M, N)
        if kind == "ill":
            U, _, Vh = torch.linalg.svd(H, full_matrices=False)
            H = (U * torch.logspace(0, -10, k)) @ Vh
        elif kind == "orthonormal":
            U, _, Vh = torch.linalg.svd(H, full_matrices=False)
            H = U @ Vh + 1e-3 * H
        elif kind == "rank":
            H = H[:, :1] @ H[:1]
        elif kind == "zero":
            H = torch.zeros_like(H)
        found.append(H)
    return torch.stack(found)


def expected(H, weights, temperature, normalize, gHd, gnorms, dtype):
    """`NAMES` by the reference in a precision."""
    H = H.to(torch.promote_types(dtype, torch.complex32)).requires_grad_()
    weights = [w.to(dtype).requires_grad_() for w in weights]
    x, norms = H, None
    if normalize:
        norms = torch.linalg.vector_norm(torch.view_as_real(H).flatten(1), dim=-1)
        x = H / torch.where(norms > 0, norms, 1)[:, None, None]
    Hd = reference.freq_gate(x, *weights, temperature)
    loss = (torch.view_as_real(Hd) * gHd.to(dtype)).sum()
    if normalize:
        loss = loss + (norms * gnorms.to(dtype)).sum()
    gH, *gw = torch.autograd.grad(loss, [H, *weights])
    norms = norms.detach() if normalize else torch.empty((0,), dtype=dtype, device=H.device)
    return [torch.view_as_real(Hd.detach()), norms, torch.view_as_real(gH), *gw]


def served(H, weights, temperature, normalize, gHd, gnorms, gh=True, gw=True):
    h = torch.view_as_real(H).contiguous()
    forward = kernels.freq_gate(h, *weights, temperature, normalize)
    return [
        *forward,
        *kernels.freq_gate_backward(gHd, gnorms, h, *weights, temperature, normalize, gh, gw),
    ]


def cotangents(H, generator):
    gHd = torch.randn(*H.shape, 2, generator=generator).to(H.device)
    return gHd, torch.randn(len(H), generator=generator).to(H.device)


ORDINARY = ("random", "ill", "orthonormal", "rank")
# kinds of samples a seed, three seeds; small sizes hold the 32 samples of the rule
PROBLEMS = {
    "8x8": (8, 8, (5, 3), (*ORDINARY, "zero", *ORDINARY, "random", "ill"), True, (0, 1, 2)),
    "16x9": (16, 9, (7, 40), ORDINARY, False, (0, 1, 2)),
    "63x41": (63, 41, (32, 32), ("random", "rank"), True, (0,)),
    "64x64": (64, 64, (32, 32), ("random", "ill"), False, (0,)),
    "5x150": (5, 150, (4, 6), ("random", "zero"), True, (0, 1)),
    "32x128": (32, 128, (8, 40), ("random", "zero"), True, (0,)),
    "128x64": (128, 64, (32, 7), ("random", "rank"), True, (0,)),
    "130x7": (130, 7, (33, 2), ("random", "rank"), False, (0,)),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_as_accurate_as_eager_float32(case):
    M, N, hidden, kinds, normalize, seeds = PROBLEMS[case]
    ours, eager, size = ([0.0] * 7 for _ in range(3))
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        H = channels(kinds, M, N, generator).to(DEVICE)
        weights = perceptrons(M, N, hidden, generator)
        g = cotangents(H, generator)
        want = expected(H, weights, 0.2, normalize, *g, torch.float64)
        single = expected(H, weights, 0.2, normalize, *g, torch.float32)
        found = served(H, weights, 0.2, normalize, *g)
        for i, (x, y, z) in enumerate(zip(found, single, want, strict=True)):
            assert x.shape == z.shape
            assert x.dtype == torch.float32
            ours[i] += float((x.double() - z).square().sum())
            eager[i] += float((y.double() - z).square().sum())
            size[i] += float(z.square().sum())
    for name, x, y, z in zip(NAMES, ours, eager, size, strict=True):
        limit = 2 * math.sqrt(y) + 4 * EPS * math.sqrt(z)
        assert math.sqrt(x) <= limit, f"{name}: {math.sqrt(x):.3g} above {limit:.3g}"


def test_a_size_that_is_no_power_of_two():
    generator = torch.Generator().manual_seed(3)
    H = channels(["random"], 96, 100, generator).to(DEVICE)
    weights = perceptrons(96, 100, (8, 8), generator)
    Hd, norms = kernels.freq_gate(torch.view_as_real(H), *weights, 0.3, False)
    want = torch.view_as_real(reference.freq_gate(H.cdouble(), *(w.double() for w in weights), 0.3))
    eager = torch.view_as_real(reference.freq_gate(H, *weights, 0.3))
    assert norms.shape == (0,)
    assert (Hd - want).norm() <= 2 * (eager - want).norm() + 4 * EPS * want.norm()


def without_direction(H, weights, gHd, dtype):
    """Hd and gradients where the magnitude of a bin that is rounding has subgradient 0."""
    H = H.to(torch.promote_types(dtype, torch.complex32)).requires_grad_()
    weights = [w.to(dtype).requires_grad_() for w in weights]
    Hf = torch.fft.fft2(H, norm="ortho")
    seen = torch.where(Hf.abs() < 1e-5, Hf.detach(), Hf)
    out = torch.fft.ifft2(Hf * reference.spectral_gate(seen, *weights, 0.2), norm="ortho")
    out = torch.view_as_real(out)
    gH, *gw = torch.autograd.grad((out * gHd.to(dtype)).sum(), [H, *weights])
    return [out.detach(), torch.view_as_real(gH), *gw]


@pytest.mark.parametrize("size", [(12, 9), (16, 8), (131, 6)])
def test_bins_of_zero_have_no_direction(size):
    M, N = size
    generator = torch.Generator().manual_seed(4)
    weights = perceptrons(M, N, (4, 4), generator)
    m, n = torch.arange(M).double()[:, None], torch.arange(N).double()[None, :]
    tone = torch.polar(torch.ones(M, N, dtype=torch.float64), 2 * math.pi * (3 * m / M + 2 * n / N))
    H = torch.stack([torch.full((M, N), 2 - 1j, dtype=torch.complex64), tone.cfloat(), 0 * tone.cfloat()])
    H = H.to(DEVICE)
    gHd, _ = cotangents(H, generator)
    Hd, _, gH, *gw = served(H, weights, 0.2, False, gHd, None)
    found = [Hd, gH, *gw]
    want, eager = (without_direction(H, weights, gHd, dtype) for dtype in (torch.float64, torch.float32))
    for x, y, z in zip(found, eager, want, strict=True):
        assert (x - z).norm() <= 2 * (y - z).norm() + 4 * EPS * z.norm()
    assert (Hd[2] == 0).all()


@pytest.mark.parametrize("size", [(9, 8), (8, 16), (3, 130)])
def test_what_is_not_wanted_is_empty(size):
    generator = torch.Generator().manual_seed(5)
    H = channels(["random", "random"], *size, generator).to(DEVICE)
    weights = perceptrons(*size, (3, 5), generator)
    gHd, gnorms = cotangents(H, generator)
    whole = served(H, weights, 0.4, True, gHd, gnorms)
    for gh, gw in [(True, False), (False, True), (False, False)]:
        part = served(H, weights, 0.4, True, gHd, gnorms, gh, gw)
        for name, x, y in zip(NAMES, part, whole, strict=True):
            wanted = gh if name == "gH" else gw if name[0] == "g" else True
            if not wanted:
                assert x.shape == (0,)
            else:
                # code of its own for every choice: on a device it may contract other products
                torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    plain = served(H, weights, 0.4, True, gHd, None)
    assert torch.equal(plain[3], whole[3])
    zero = served(H, weights, 0.4, True, gHd, torch.zeros_like(gnorms))
    assert torch.equal(plain[2], zero[2])


@pytest.mark.parametrize("size", [(8, 11), (16, 8), (3, 129)])
def test_nan_stays_in_its_sample_and_batches_do_not_meet(size):
    generator = torch.Generator().manual_seed(6)
    H = channels(["random"] * 3, *size, generator).to(DEVICE)
    weights = perceptrons(*size, (3, 2), generator)
    g = cotangents(H, generator)
    alone = served(H[2:], weights, 0.2, True, g[0][2:], g[1][2:])
    H[1, 2, 3] = torch.nan
    found = served(H, weights, 0.2, True, *g)
    for x, y in zip(found[:3], alone[:3], strict=True):
        assert x[1].isnan().all()
        assert torch.equal(x[2], y[0])
        assert x[0].isfinite().all()


@pytest.mark.parametrize("size", [(8, 8), (7, 8), (2, 160)])
def test_empty_batch(size):
    H = torch.zeros(0, *size, dtype=torch.complex64, device=DEVICE)
    weights = perceptrons(*size, (3, 2), torch.Generator().manual_seed(0))
    Hd, norms, gH, *gw = served(H, weights, 0.2, True, torch.view_as_real(H), H.real[:, 0, 0])
    assert Hd.shape == gH.shape == (0, *size, 2)
    assert norms.shape == (0,)
    for w, g in zip(weights, gw, strict=True):
        assert torch.equal(g, torch.zeros_like(w))


def guarded(launch):
    """The launch with every tensor inside a larger one of NaN, and a check that only its own part changed."""
    arguments, buffers = dict(launch.arguments), []
    for name, x in arguments.items():
        if isinstance(x, torch.Tensor):
            dtype, fill = (x.dtype, torch.nan) if x.is_floating_point() else (x.dtype, 1 << 30)
            buffer = torch.full((x.numel() + 512,), fill, dtype=dtype, device=x.device)
            arguments[name] = buffer[256 : 256 + x.numel()].view(x.shape).copy_(x)
            buffers.append((name, buffer, x))
    launch._replace(arguments=arguments).run()
    for _, buffer, x in buffers:
        outside = torch.cat([buffer[:256], buffer[256 + x.numel() :]])
        assert outside.isnan().all() if x.is_floating_point() else (outside == 1 << 30).all()
    return arguments


@pytest.mark.parametrize("size", [(7, 9), (16, 17), (32, 8)])
def test_nothing_outside_its_own_memory(size):
    M, N = size
    generator = torch.Generator().manual_seed(7)
    H = torch.view_as_real(channels(["random"] * 2, M, N, generator)).to(DEVICE)
    weights = perceptrons(M, N, (3, 34), generator)
    gHd = torch.randn(2, M, N, 2, generator=generator).to(DEVICE)
    inputs = [H.clone(), gHd.clone()]
    launches_ = [
        (kernels.forward_launch(H, weights, 0.2, True)[0], "p_hd"),
        (kernels.backward_launch(gHd, None, H, weights, 0.2, True, True)[0], "p_gh"),
        (kernels.spectral_forward_launch(H.clone(), weights, 0.2, True)[0], "p_z"),
        (kernels.spectral_backward_launch(gHd.clone(), None, H, weights, 0.2, True, True)[0], "p_g"),
    ]
    for launch, out in launches_:
        arguments = guarded(launch)
        assert arguments[out].isfinite().all()
    assert torch.equal(H, inputs[0])
    assert torch.equal(gHd, inputs[1])


# the largest sample that registers hold is compiled for the one chip whose limits the issue is about
ONLY = {"forward 128": ("sm_90",), "backward 128": ("sm_90",)}


def launches():
    found = {}
    norms = torch.empty((256,), device="meta")
    for M, N in ((64, 64), (128, 128), (96, 100)):
        H, weights = torch.empty((256, M, N, 2), device="meta"), perceptrons(M, N, (32, 32), device="meta")
        name = str(M) if M == N else f"{M}x{N}"
        found[f"backward {name}"] = kernels.backward_launch(H, norms, H, weights, 0.2, True, True)[0]
        if M == 64:
            projection = tuple(torch.empty(s, device="meta") for s in [(64, 256), (64,), (1, 64, 64)])
            found["front 64"] = kernels.forward_launch(H, weights, 0.2, True, projection)[0]
        if M == 128:
            found[f"forward {name}"] = kernels.forward_launch(H, weights, 0.2, True)[0]
    H, weights = torch.empty((64, 256, 300, 2), device="meta"), perceptrons(256, 300, (32, 32), device="meta")
    found["spectral"] = kernels.spectral_backward_launch(H, None, H, weights, 0.2, True, True)[0]
    return found


def test_a_sample_that_fits_stays_in_registers():
    for n in (8, 64, 128):
        H, weights = torch.empty((9, n, n, 2), device="meta"), perceptrons(n, n, (4, 4), device="meta")
        launch = kernels.forward_launch(H, weights, 0.2, True)[0]
        assert launch.grid == (9,)
        large = {
            k for k, x in launch.arguments.items() if isinstance(x, torch.Tensor) and x.numel() >= H.numel()
        }
        assert large == {"p_h", "p_hd"}
        launch = kernels.backward_launch(H, None, H, weights, 0.2, True, True)[0]
        large = {
            k for k, x in launch.arguments.items() if isinstance(x, torch.Tensor) and x.numel() >= H.numel()
        }
        assert large == {"p_h", "p_g", "p_gh"} | ({"p_z"} if n == 128 else set())


def test_compiled_ahead():
    for name, targets in aot.reports(__file__).items():
        for target, report in targets.items():
            where = f"{name} on {target}: {report}"
            assert report["shared"] <= 65536, where
            assert report["loads"] > 0, where
            assert report["registers"] <= 256, where
            if "96" in name:
                assert report["tensor"] > 0, where
                assert report["spills"] <= 16, where
            if "64" in name:
                assert report["shared"] <= 32768, where
                assert report["spills"] == 0, where
                # every thread's share of the sample, whole vectors of it: H, and gHd
                threads = 8 * aot.TARGETS[target][2]
                vectors = 64 * 64 * 2 // (4 * threads)
                assert report["wide_loads"] >= vectors * (2 if "backward" in name else 1), where
                assert report["wide_stores"] >= vectors, where
            if "128" in name:
                # 512 threads of 128 registers hold 64 numbers of it each; what spills is a few addresses
                assert report["spills"] <= 160, where
