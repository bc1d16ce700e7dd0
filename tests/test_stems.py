"""Every public function at once, on the CPU and on a device: accuracy, repeated bits, threads, graph capture."""

import pytest
import torch

from lomacs_fast import functional, reference, use_backend
from lomacs_fast.benchmarks import stems
from lomacs_fast.ops.dispatch import OPS

EPS = torch.finfo(torch.float32).eps
SIZES = [stems.Size(64, 64, 32), stems.Size(63, 41, 11), stems.Size(128, 128, 64)]
ON_DEVICE = "triton", "cpp"
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BATCH = {64: 4, 63: 4, 128: 2}


@pytest.fixture(params=DEVICES)
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


@pytest.fixture(params=stems.CASES, ids=lambda case: case.function)
def case(request):
    return request.param


def fastest(case, device):
    """The backend that is there for this function, asked for by name where `auto` does not take it yet."""
    names = [b.name for op in OPS.values() if op.name == case.function for b in op.backends]
    if device == "cpu":
        return "auto"
    return next((name for name in ON_DEVICE if name in names), "auto")


def ours(case, drawn, device, **flags):
    with use_backend(fastest(case, device)):
        return stems.call(case, functional, drawn, **flags)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_gradients_by_the_rule(case, device, size):
    pooled = None
    for seed in range(3):
        drawn = stems.tensors(case, BATCH[size.M], size, seed)
        exact = stems.call(case, reference, stems.cast(drawn, "cpu", double=True), True, everything=True)
        single = stems.cast(drawn, device)
        eager = stems.call(case, reference, single, True, everything=True)
        fast = ours(case, single, device, backward=True, everything=True)
        # inference may take another way: its outputs too
        alone = ours(case, single, device, backward=False)
        exact, eager, fast = (
            [*found, *of[: len(alone)]] for found, of in ((exact, exact), (eager, eager), (fast, alone))
        )
        runs = [
            [float((y.cpu() - x).abs().square().sum()) for y, x in zip(got, exact, strict=True)]
            for got in (eager, fast, [torch.zeros_like(x) for x in exact])
        ]
        pooled = runs if pooled is None else [
            [a + b for a, b in zip(p, q, strict=True)] for p, q in zip(pooled, runs, strict=True)
        ]  # fmt: skip
    for e, f, norm in zip(*pooled, strict=True):
        assert (f / norm) ** 0.5 <= 2 * (e / norm) ** 0.5 + 4 * EPS


def test_the_same_bits_again(case, device):
    drawn = stems.cast(stems.tensors(case, 33, stems.Size(64, 64, 32)), device)
    first, again = (ours(case, drawn, device, backward=True) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_inputs_are_left_as_they_are(case, device):
    drawn = stems.cast(stems.tensors(case, 2, stems.Size(24, 17, 5)), device)
    copies = {name: x.clone() for name, x in drawn.items()}
    ours(case, drawn, device, backward=True)
    assert all(torch.equal(x, copies[name]) for name, x in drawn.items())


@pytest.mark.gpu
def test_graph_capture(case):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    size = stems.Size(64, 64, 32)
    static, other = (stems.cast(stems.tensors(case, 5, size, seed), "cuda") for seed in range(2))
    ours(case, static, "cuda", backward=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ours(case, static, "cuda", backward=True)
    for name, x in static.items():
        x.copy_(other[name])
    graph.replay()
    torch.cuda.synchronize()
    want = ours(case, other, "cuda", backward=True)
    assert all(torch.equal(x, y) for x, y in zip(captured, want, strict=True))
