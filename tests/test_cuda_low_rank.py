"""The CUDA source of the low-rank objective: its phases on the host thread by thread, its compiled code, a device."""

import ctypes
import itertools
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from nvcc import CSRC, build, instructions, resources

from lomacs_fast import reference

SCHEMA = (
    "low_rank(Tensor F, Tensor G, Tensor H, SymInt rows, SymInt columns, int nesting, bool gf, bool gg, bool gh)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
MAIN = ((256, 256, 32), (64, 64, 16))
NAMES = ("loss", "gF", "gG", "gH")
NESTINGS = ("none", "joint", "sequential")
COMPLEX = {torch.complex64: torch.float32, torch.complex128: torch.float64}
DTYPES = (torch.float32, torch.complex64, torch.float64, torch.complex128)
EPS = torch.finfo(torch.float32).eps
ALL = (True,) * 3

HOST = r"""
#include <limits>
#include <vector>
#include "low_rank_phases.cuh"

using namespace lomacs::low_rank;
using lomacs::Cx;

template <class E>
struct HostThreads {
  int count;
  bool backwards;
  std::vector<Sums<E>> sums;
  template <class Phase>
  void run(Phase&& phase) {
    for (int i = 0; i < count; ++i) {
      const int t = backwards ? count - 1 - i : i;
      phase(t, sums[size_t(t)]);
    }
  }
};

// 0, or 1 where the workspace was written past its end
template <class E, int C>
int run(void* const* x, const int64_t* n, double scale, bool backwards) {
  const int64_t B = n[0], M = n[1], N = n[2], L = n[3];
  Args<E> a{};
  a.F = static_cast<E*>(x[0]), a.G = static_cast<E*>(x[1]), a.H = static_cast<E*>(x[2]);
  a.gF = static_cast<E*>(x[3]), a.gG = static_cast<E*>(x[4]), a.gH = static_cast<E*>(x[5]);
  a.loss = static_cast<Real<E>*>(x[6]);
  a.plan = make_plan(B, M, N, L, C, a.gF != nullptr, a.gG != nullptr, a.gH != nullptr);
  a.scale = scale, a.nesting = static_cast<Nesting>(n[4]);
  a.wide_L = L % kVec<E> == 0, a.wide_N = N % kVec<E> == 0;
  const size_t each = sizeof(E) / sizeof(Real<E>), size = size_t(B * a.plan.work) * each, guard = 1024;
  std::vector<Real<E>> work(size + guard, std::numeric_limits<Real<E>>::quiet_NaN());
  for (size_t i = 0; i < guard; ++i) work[size + i] = 77;
  std::vector<double> cross(size_t(B * a.plan.items_W) + 1, std::numeric_limits<double>::quiet_NaN());
  a.work = reinterpret_cast<E*>(work.data()), a.cross = cross.data();
  HostThreads<E> threads{kThreads<C>, backwards, std::vector<Sums<E>>(size_t(kThreads<C>))};
  std::vector<double> memory(sizeof(Shared<E, C>) / 8 + 4, std::numeric_limits<double>::quiet_NaN());
  auto& shared = *reinterpret_cast<Shared<E, C>*>((reinterpret_cast<uintptr_t>(memory.data()) + 15) / 16 * 16);
  const auto launch = [&](int64_t items, auto&& item) {
    for (int64_t i = 0; i < items; ++i) item(backwards ? items - 1 - i : i);
  };
  launch(B * a.plan.products, [&](int64_t i) { product_item(a, i, shared, threads); });
  launch(B * a.plan.gradients, [&](int64_t i) { gradient_item(a, i, shared, threads); });
  for (size_t i = 0; i < guard; ++i) {
    if (work[size + i] != 77) return 1;
  }
  return 0;
}

extern "C" int run_low_rank(void* const* x, const int64_t* n, double scale, bool backwards) {
  const bool complex = n[5] != 0, wide = n[6] == 8;
  if (n[7] == 16) return complex ? run<Cx<float>, 16>(x, n, scale, backwards) : run<float, 16>(x, n, scale, backwards);
  if (wide) return complex ? run<Cx<double>, 32>(x, n, scale, backwards) : run<double, 32>(x, n, scale, backwards);
  return complex ? run<Cx<float>, 32>(x, n, scale, backwards) : run<float, 32>(x, n, scale, backwards);
}
extern "C" int64_t shared_bytes(int complex, int element, int columns) {
  if (columns == 16) return complex ? sizeof(Shared<Cx<float>, 16>) : sizeof(Shared<float, 16>);
  if (element == 8) return complex ? sizeof(Shared<Cx<double>, 32>) : sizeof(Shared<double, 32>);
  return complex ? sizeof(Shared<Cx<float>, 32>) : sizeof(Shared<float, 32>);
}
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """The phases built by the host's compiler, with the sanitizer of undefined behaviour."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ not found")
    folder = tmp_path_factory.mktemp("host")
    (folder / "host.cpp").write_text(HOST)
    flags = (
        "-std=c++20 -O2 -Wall -Wextra -Werror -fPIC -shared -fsanitize=undefined -fno-sanitize-recover=all"
    )
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and " fma " in cpuinfo.read_text():
        # a device contracts products and sums
        flags += " -mfma -ffp-contract=fast"
    subprocess.run(
        [compiler, *flags.split(), f"-I{CSRC}", "host.cpp", "-o", "libhost.so"], cwd=folder, check=True
    )
    library = ctypes.CDLL(str(folder / "libhost.so"))
    library.shared_bytes.restype = ctypes.c_int64
    return library


def planes(x):
    return torch.view_as_real(x.contiguous()) if x.is_complex() else x.contiguous()


def whole(x):
    return torch.view_as_complex(x) if x.ndim == 4 else x


def on_host(host, x, nesting="none", shape=None, wanted=ALL, columns=None, backwards=False):
    """Losses and gradients of the phases, by name."""
    F, _, H = x
    (B, M, N), L = H.shape, F.shape[2]
    real = COMPLEX.get(H.dtype, H.dtype)
    wide = [planes(t) for t in x]
    gradients = [torch.full_like(t, float("nan")) if w else None for t, w in zip(wide, wanted, strict=True)]
    loss = torch.full((B,), float("nan"), dtype=real)
    pointers = [t.data_ptr() if t is not None else None for t in (*wide, *gradients, loss)]
    rows, cols = shape or (M, N)
    if columns is None:
        columns = 16 if real == torch.float32 and L <= 16 else 32
    sizes = (B, M, N, L, NESTINGS.index(nesting), H.is_complex(), real.itemsize, columns)
    status = host.run_low_rank(
        (ctypes.c_void_p * len(pointers))(*pointers),
        (ctypes.c_int64 * len(sizes))(*sizes),
        ctypes.c_double(rows / M * (cols / N)),
        ctypes.c_bool(backwards),
    )
    assert status == 0, "wrote past the workspace"
    return named((loss, *gradients))


def named(result):
    return {name: None if x is None else whole(x) for name, x in zip(NAMES, result, strict=True)}


def by_autograd(x, nesting="none", shape=None, dtype=torch.float64):
    """The reference and its gradients; float64 is the oracle, float32 the baseline."""
    leaves = [t.to(dtype.to_complex() if t.is_complex() else dtype).requires_grad_() for t in x]
    loss = reference.low_rank_loss(*leaves, nesting, shape=shape)
    return named((loss.detach(), *map(planes, torch.autograd.grad(loss.sum(), leaves))))


def problem(M, N, L, B=2, seed=0, kind="random", dtype=torch.complex64):
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    F, G, H = (torch.randn(B, *s, dtype=wide, generator=generator) for s in ((N, L), (M, L), (M, N)))
    if kind == "near":
        # at the minimum the two terms of every gradient cancel
        H = G @ F.mH + 1e-3 * H
    if kind == "ill":
        H = H * torch.logspace(0, -10, N, dtype=torch.float64)
        F = F * torch.logspace(0, -5, L, dtype=torch.float64)
    if kind == "deficient":
        H = H[..., :1] @ H[..., :1, :]
        G[..., -1] = G[..., 0]
    if kind == "zero":
        H.zero_()
    return [x.to(dtype) for x in (F, G, H)]


def error(got, want):
    """Relative L2 error of pooled tensors, absolute where there is nothing to compare with."""
    got, want = (torch.cat([x.flatten().to(torch.complex128) for x in side]) for side in (got, want))
    return float((got - want).norm() / (want.norm() or 1))


def close(runs):
    """The rule: relative L2 error against float64 at most twice the eager float32 error plus 4 eps."""
    for name in NAMES:
        ours, eager, exact = ([run[i][name] for run in runs] for i in range(3))
        mine, theirs = error(ours, exact), error(eager, exact)
        assert mine <= 2 * theirs + 4 * EPS, f"{name}: {mine:.3g}, eager {theirs:.3g}"


def compare(
    host, sizes, nesting="none", shape=None, seeds=(0, 1, 2), B=2, kind="random", dtype=torch.complex64, **k
):
    runs = []
    for seed in seeds:
        x = problem(*sizes, B=B, seed=seed, kind=kind, dtype=dtype)
        ours = on_host(host, x, nesting, shape, **k)
        runs.append((ours, by_autograd(x, nesting, shape, torch.float32), by_autograd(x, nesting, shape)))
    close(runs)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("kind", ["random", "near", "ill", "deficient", "zero"])
@pytest.mark.parametrize("nesting", NESTINGS)
def test_small_main_size_against_float64(host, nesting, kind, dtype):
    compare(host, MAIN[1], nesting, B=11, kind=kind, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("nesting", NESTINGS)
def test_large_main_size_against_float64(host, nesting, dtype):
    compare(host, MAIN[0], nesting, B=1, dtype=dtype)


@pytest.mark.parametrize("columns", [16, 32])
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("nesting", NESTINGS)
# beyond a tile, a strip, a part; M != N; L larger than a side
@pytest.mark.parametrize(
    "sizes", [(63, 41, 11), (1, 1, 1), (4, 7, 1), (17, 33, 48), (9, 66, 70), (130, 20, 33), (8, 600, 4)]
)
def test_other_sizes_against_float64(host, sizes, nesting, dtype, columns):
    M, N, _ = sizes
    compare(host, sizes, nesting, (M + 3, 2 * N), B=11, dtype=dtype, columns=columns)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_many_parts(host, dtype):
    """The summed index in eight parts, as for one large matrix, several of which sum more than one chain."""
    compare(host, (2100, 70, 20), "joint", B=1, seeds=(0,), dtype=dtype)
    compare(host, (70, 2100, 20), "sequential", B=1, seeds=(0,), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES[2:])
@pytest.mark.parametrize("shape", [None, (90, 700)])
@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize("sizes", [(9, 7, 4), (70, 300, 37), (12, 20, 1)])
def test_float64_equals_autograd(host, sizes, nesting, shape, dtype):
    x = problem(*sizes, B=3, dtype=dtype)
    got, want = on_host(host, x, nesting, shape), by_autograd(x, nesting, shape)
    for name in NAMES:
        assert error([got[name]], [want[name]]) < 1e-13, name


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)))
def test_flags_change_nothing_else(host, wanted):
    x = problem(13, 300, 6)
    every, some = on_host(host, x, "joint"), on_host(host, x, "joint", wanted=wanted)
    for name in NAMES:
        if some[name] is not None:
            assert torch.equal(some[name], every[name]), name
    assert [some[name] is not None for name in NAMES[1:]] == list(wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_order_of_threads_and_blocks(host, dtype):
    """A missing barrier, or one block's memory in another, would show in the bits."""
    x = problem(70, 300, 35, B=3, dtype=dtype)
    first, other = on_host(host, x, "sequential"), on_host(host, x, "sequential", backwards=True)
    for name in NAMES:
        assert torch.equal(first[name], other[name]), name
    for b in range(3):
        alone = on_host(host, [t[b : b + 1] for t in x], "sequential")
        for name in NAMES:
            assert torch.equal(alone[name][0], first[name][b]), name


def test_empty_batch(host):
    got = on_host(host, problem(4, 4, 2, B=0))
    assert got["loss"].shape == (0,)
    assert got["gF"].shape == (0, 4, 2)


def test_shared_memory_follows_the_stated_formula(host):
    for columns, complex_, real in ((16, 0, 4), (16, 1, 4), (32, 0, 4), (32, 1, 4), (32, 0, 8), (32, 1, 8)):
        stated = 16 * (64 + columns) * real * (1 + complex_) + 512 + 32 * columns
        assert host.shared_bytes(complex_, real, columns) == stated
        # what a block has without asking for more
        assert stated <= 48 * 1024


def kernel(name):
    """(kernel, element, columns) of a mangled kernel, else None."""
    found = re.search(r"low_rank_(products|gradients)_kernelI(?:NS_2CxI([fd])EE|([fd]))Li(\d+)E", name)
    return (found[1], f"complex {found[2]}" if found[2] else found[3], int(found[4])) if found else None


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    library = build(tmp_path_factory.mktemp("cuda"), "low_rank.cu", 80, 90, 100, 120)
    return SimpleNamespace(library=library, usage=resources(library, kernel))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_compiled_resources(compiled):
    """256x256 L=32 takes strips of 32 columns, 64x64 L=16 of 16: neither spills."""
    assert {key[0] for key in compiled.usage} == {80, 90, 100, 120}
    assert len(compiled.usage) == 4 * 2 * 6
    for where, used in compiled.usage.items():
        assert used["LOCAL"] == used["STACK"] == 0, (where, used)
        assert used["SHARED"] <= 48 * 1024, (where, used)
        # 512 threads a multiprocessor of real float32, 384 of complex
        assert used["REG"] <= {"f": 128, "complex f": 168}.get(where[2], 255), (where, used)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_compiled_instructions(compiled):
    counts = instructions(compiled.library, "sm_90", kernel)
    assert not [op for own in counts.values() for op in own if re.match(r"RED\b|ATOM", op)]
    for name, element, columns in itertools.product(("products", "gradients"), ("f", "complex f"), (16, 32)):
        found = counts[name, element, columns]
        local = [op for op in found if re.match(r"LDL|STL|LD$|LD\.|ST$|ST\.", op)]
        assert not local, (name, element, columns, local)
        wide = {
            k: sum(n for op, n in found.items() if op.startswith(k) and "128" in op)
            for k in ("LDG", "STG", "LDS", "STS")
        }
        assert all(wide.values()), (name, element, columns, wide)
        # 16-byte loads of the inner loop serve 16 multiply-adds each, 8 of real numbers
        products = sum(n for op, n in found.items() if op.startswith("FFMA"))
        assert products >= (16 if element != "f" else 8) * wide["LDS"], (name, element, columns, found)


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    major, minor = torch.cuda.get_device_capability()
    library = build(tmp_path_factory.mktemp("device"), "low_rank.cu", f"{major}{minor}")
    fragment = None
    if not hasattr(torch.ops.lomacs, "low_rank"):
        fragment = torch.library.Library("lomacs", "FRAGMENT")
        fragment.define(SCHEMA)
    if not torch._C._dispatch_has_kernel_for_dispatch_key("lomacs::low_rank", "CUDA"):
        torch.ops.load_library(str(library))
    yield torch.ops.lomacs.low_rank
    del fragment


def on_device(op, x, nesting="none", shape=None, wanted=ALL):
    return op(*(planes(t).cuda() for t in x), *(shape or x[2].shape[1:]), NESTINGS.index(nesting), *wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize("sizes", [*MAIN, (63, 41, 11), (17, 33, 48), (1, 1, 1), (600, 900, 70)])
def test_device_against_float64(device, sizes, nesting, dtype):
    runs = []
    for seed in range(3):
        x = problem(*sizes, B=11, seed=seed, dtype=dtype)
        ours = named([t.cpu() for t in on_device(device, x, nesting)])
        runs.append((ours, by_autograd(x, nesting, None, torch.float32), by_autograd(x, nesting)))
    close(runs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[2:])
def test_device_float64(device, dtype):
    x = problem(63, 41, 11, B=3, dtype=dtype)
    got, want = named([t.cpu() for t in on_device(device, x)]), by_autograd(x)
    for name in NAMES:
        assert error([got[name]], [want[name]]) < 1e-13, name


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [*MAIN, (4096, 4096, 64)])
def test_device_repeats_its_bits(device, sizes):
    x = problem(*sizes, B=1 if sizes[0] == 4096 else 64)
    first, second = on_device(device, x), on_device(device, x)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
def test_device_flags(device):
    x = problem(16, 12, 5, B=4)
    result = on_device(device, x, wanted=(False, True, False))
    assert [g.numel() for g in result[1:]] == [0, 4 * 16 * 5 * 2, 0]
    assert torch.equal(result[2], on_device(device, x)[2])


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", MAIN)
def test_device_graph_capture(device, sizes):
    first, second = problem(*sizes, B=5), problem(*sizes, B=5, seed=1)
    static = [planes(t).cuda() for t in first]
    rest = (*sizes[:2], 1, *ALL)
    device(*static, *rest)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = device(*static, *rest)
    for target, source in zip(static, second, strict=True):
        target.copy_(planes(source))
    graph.replay()
    torch.cuda.synchronize()
    for got, want in zip(result, on_device(device, second, "joint"), strict=True):
        assert torch.equal(got, want)


@pytest.mark.gpu
def test_device_current_stream(device):
    x = problem(64, 64, 16, B=300)
    want = on_device(device, x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        wide = [planes(t).cuda() for t in x]
        # inputs are still being written on this stream when the call is made
        torch.cuda._sleep(20_000_000)
        got = device(*(t + 0 for t in wide), 64, 64, 0, *ALL)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
