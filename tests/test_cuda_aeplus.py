"""The CUDA source of the AE+ loss: its phases on the host thread by thread, its compiled code, and on a device."""

import ctypes
import itertools
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nvcc import CSRC, build, instructions, resources

from lomacs_fast import reference

WEIGHTS = {"lam": 0.35, "w_energy": 0.4, "w_diag": 0.3, "w_match": 0.2}
EPS = {torch.float32: 2.0**-23, torch.float64: 2.0**-52}
SCHEMA = (
    "aeplus(Tensor U, Tensor S, Tensor V, Tensor H, Tensor weights, bool mean, bool gu, bool gs, bool gv, bool gh)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
MAIN = ((64, 64, 32), (128, 128, 64))
NAMES = ("loss", "rec", "ortho", "energy", "diag", "match", "gU", "gS", "gV", "gH")
# shared memory of a block, and the levels that 64x64 r=32 and 128x128 r=64 take there
MAIN_LEVELS = {80: (3, 1), 90: (3, 2), 100: (3, 2), 120: (3, 0)}
SM = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}

HOST = r"""
#include <algorithm>
#include <limits>
#include <vector>
#include "aeplus_phases.cuh"

using namespace lomacs::aeplus;
using lomacs::Cx;

template <class T>
struct HostThreads {
  int count;
  bool backwards;
  std::vector<Acc<T>> acc;
  template <class Phase>
  void run(Phase&& phase) {
    for (int i = 0; i < count; ++i) {
      const int t = backwards ? count - 1 - i : i;
      phase(t, acc[t]);
    }
  }
};

template <class T, int Level>
void batch(const Args<T>& a, HostThreads<T>& threads, char* shared) {
  for (int64_t s = 0; s < a.batch; ++s) aeplus_sample<T, Level>(a, s, 0, shared, threads);
}

// 0, or 1 where the layout wrote past its end
template <class T>
int run(T* const* x, const double* weights, const int64_t* n, int level, int limit, bool backwards) {
  const int64_t B = n[0], M = n[1], N = n[2], r = n[3];
  const T nan = std::numeric_limits<T>::quiet_NaN();
  const int count = thread_count(M, N, r, limit);
  const Plan plan = make_plan(M, N, r, sizeof(T), count, level);
  const size_t bytes = size_t(plan.bytes), guard = 4096;
  std::vector<double> memory((bytes + guard) / 8 + 4, std::numeric_limits<double>::quiet_NaN());
  char* shared = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.data()) + 15) / 16 * 16);
  for (size_t i = 0; i < guard; ++i) shared[bytes + i] = 77;
  std::vector<Cx<T>> work(size_t(plan.far), Cx<T>{nan, nan});
  std::vector<T> terms(size_t(B) * 5 + 1, nan);
  HostThreads<T> threads{count, backwards, std::vector<Acc<T>>(size_t(count))};
  Args<T> a{};
  const auto complex = [](T* p) { return reinterpret_cast<Cx<T>*>(p); };
  a.U = complex(x[0]), a.S = x[1], a.V = complex(x[2]), a.H = complex(x[3]);
  a.gU = complex(x[4]), a.gS = x[5], a.gV = complex(x[6]), a.gH = complex(x[7]);
  a.weights = weights, a.terms = terms.data(), a.work = work.data();
  a.plan = plan, a.batch = B, a.M = int(M), a.N = int(N), a.r = int(r), a.mean = n[4] != 0;
  a.wide_panel = r % 2 == 0, a.wide_H = N % 2 == 0;
  switch (level) {
    case 0: batch<T, 0>(a, threads, shared); break;
    case 1: batch<T, 1>(a, threads, shared); break;
    case 2: batch<T, 2>(a, threads, shared); break;
    default: batch<T, 3>(a, threads, shared);
  }
  std::copy_n(terms.begin(), B * 5, x[10]);
  std::vector<double> sums(5 * kMeanThreads);
  HostThreads<T> mean{kMeanThreads, backwards, std::vector<Acc<T>>(kMeanThreads)};
  aeplus_mean(MeanArgs<T>{terms.data(), weights, x[8], x[9], B}, sums.data(), mean);
  for (size_t i = 0; i < guard; ++i) {
    if (shared[bytes + i] != 77) return 1;
  }
  return 0;
}

extern "C" int run_float(float* const* x, const double* w, const int64_t* n, int level, int limit, bool backwards) {
  return run(x, w, n, level, limit, backwards);
}
extern "C" int run_double(double* const* x, const double* w, const int64_t* n, int level, int limit, bool backwards) {
  return run(x, w, n, level, limit, backwards);
}
extern "C" int64_t bytes_of(int64_t M, int64_t N, int64_t r, int64_t element, int level) {
  return make_plan(M, N, r, int(element), thread_count(M, N, r, thread_limit(int(element), level)), level).bytes;
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
    library.bytes_of.restype = ctypes.c_int64
    library.bytes_of.argtypes = [ctypes.c_int64] * 4 + [ctypes.c_int]
    return library


def on_host(host, arguments, match="norm", wanted=(True,) * 4, level=3, limit=512, backwards=False):
    """loss, terms and gradients of the phases; complex in, complex out."""
    U, S, V, _ = arguments
    B, M, r = U.shape
    N = V.shape[1]
    wide = [torch.view_as_real(x.contiguous()) if x.is_complex() else x.contiguous() for x in arguments]
    gradients = [torch.full_like(x, float("nan")) if w else None for x, w in zip(wide, wanted, strict=True)]
    loss, terms, own = (torch.full(shape, float("nan"), dtype=S.dtype) for shape in ((), (5,), (B, 5)))
    pointers = [x.data_ptr() if x is not None else None for x in (*wide, *gradients, loss, terms, own)]
    weights = torch.tensor(list(WEIGHTS.values()), dtype=torch.float64)
    sizes = torch.tensor([B, M, N, r, match == "mean"], dtype=torch.int64)
    call = host.run_float if S.dtype == torch.float32 else host.run_double
    status = call(
        (ctypes.c_void_p * len(pointers))(*pointers),
        ctypes.c_void_p(weights.data_ptr()),
        ctypes.c_void_p(sizes.data_ptr()),
        level,
        limit,
        ctypes.c_bool(backwards),
    )
    assert status == 0, "wrote past the shared memory"
    gradients = [None if g is None else torch.view_as_complex(g) if g.dim() == 4 else g for g in gradients]
    return flat(loss, terms, gradients) | {"of samples": own}


def flat(loss, terms, gradients):
    return dict(zip(NAMES, (loss, *terms.unbind(), *gradients), strict=True))


def by_autograd(arguments, match="norm", dtype=torch.float64):
    """The reference and its gradients; float64 is the oracle, float32 the baseline."""
    wide = [x.to(dtype.to_complex() if x.is_complex() else dtype).requires_grad_() for x in arguments]
    loss, terms = reference.aeplus_loss(*wide, **WEIGHTS, match=match)
    own = torch.stack(reference.aeplus_terms(*wide, match=match), -1).detach()
    return flat(loss.detach(), torch.stack(terms), torch.autograd.grad(loss, wide)) | {"of samples": own}


def problem(M, N, r, B=2, seed=0, kind="random", dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    complex64 = {"dtype": torch.complex128, "generator": generator}
    U, V, H = (torch.randn(B, *s, **complex64) for s in ((M, r), (N, r), (M, N)))
    S = torch.rand(B, r, dtype=torch.float64, generator=generator) + 0.1
    U, V = U / M**0.5, V / N**0.5
    if kind in ("orthonormal", "near"):
        U, V = torch.linalg.qr(U)[0], torch.linalg.qr(V)[0]
    if kind == "near":
        # a relative residual of about 1e-4
        H = (U * S.unsqueeze(-2)) @ V.mH + 1e-4 * H / (M * N) ** 0.5
        U, V = (X + 1e-4 * torch.randn(X.shape, **complex64) / X.shape[1] for X in (U, V))
    if kind == "ill":
        H = H @ (torch.logspace(0, -10, N, dtype=torch.float64).diag() + 0j)
        U = U * torch.logspace(0, -5, r, dtype=torch.float64)
    if kind == "deficient":
        H = H[..., :1] @ H[..., :1, :]
        V[..., -1] = V[..., 0]
    return [x.to(dtype.to_complex() if x.is_complex() else dtype) for x in (U, S, V, H)]


def error(got, want):
    """Relative L2 error of pooled tensors, absolute where there is nothing to compare with."""
    got, want = (torch.cat([x.flatten().to(torch.complex128) for x in side]) for side in (got, want))
    return float((got - want).norm() / (want.norm() or 1))


def close(runs):
    """The rule: relative L2 error against float64 at most twice the eager float32 error plus 4 eps."""
    for name in NAMES:
        ours, eager, exact = ([run[i][name] for run in runs] for i in range(3))
        if ours[0] is None:
            continue
        mine, theirs = error(ours, exact), error(eager, exact)
        assert mine <= 2 * theirs + 4 * EPS[torch.float32], f"{name}: {mine:.3g}, eager {theirs:.3g}"


def compare(host, sizes, match="norm", seeds=(0, 1, 2), B=2, kind="random", **options):
    runs = []
    for seed in seeds:
        x = problem(*sizes, B=B, seed=seed, kind=kind)
        runs.append(
            (on_host(host, x, match, **options), by_autograd(x, match, torch.float32), by_autograd(x, match))
        )
    close(runs)


@pytest.mark.parametrize("match", ["norm", "mean"])
@pytest.mark.parametrize("kind", ["random", "near", "ill", "deficient", "orthonormal"])
def test_main_size_against_float64(host, match, kind):
    compare(host, (64, 64, 32), match, B=11, kind=kind)


def fitted(M, N, r, B, seed, kind, residual):
    """A channel at a relative residual from U S V^H, so that S and diag(U^H H V) nearly agree."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.complex128, generator=generator)  # noqa: E731
    U, V = (torch.linalg.qr(draw(B, n, r))[0] for n in (M, N))
    S = torch.rand(B, r, dtype=torch.float64, generator=generator) + 0.1
    if kind == "nearly orthonormal":
        U, V = (X + 0.02 * draw(*X.shape) for X in (U, V))
    if kind == "ill-conditioned":
        U, V = (X * torch.logspace(0, -3, r, dtype=torch.float64) for X in (U, V))
    H, noise = (U * S.unsqueeze(-2)) @ V.mH, draw(B, M, N)
    H = H + noise * residual * H.norm(dim=(1, 2), keepdim=True) / noise.norm(dim=(1, 2), keepdim=True)
    return [x.to(torch.complex64 if x.is_complex() else torch.float32) for x in (U, S, V, H)]


@pytest.mark.parametrize("match", ["norm", "mean"])
@pytest.mark.parametrize("residual", [0.3, 1e-2, 1e-4])
@pytest.mark.parametrize("kind", ["nearly orthonormal", "orthonormal", "ill-conditioned"])
@pytest.mark.parametrize("sizes", [MAIN[0], (63, 41, 11), (40, 24, 1)])
def test_near_residuals_by_the_rule(host, sizes, kind, residual, match):
    runs = []
    for seed in range(3):
        x = fitted(*sizes, 11, seed, kind, residual)
        runs.append((on_host(host, x, match), by_autograd(x, match, torch.float32), by_autograd(x, match)))
    # means of a batch are too few to pool
    names = ("gU", "gS", "gV", "gH", *NAMES[1:6])
    for name in names:
        term = name in NAMES[1:6]
        at = NAMES.index(name) - 1
        ours, eager, exact = (
            [run[i]["of samples"][:, at] if term else run[i][name] for run in runs] for i in range(3)
        )
        mine, theirs = error(ours, exact), error(eager, exact)
        assert mine <= 2 * theirs + 4 * EPS[torch.float32], f"{name}: {mine:.3g}, eager {theirs:.3g}"


@pytest.mark.parametrize("level", [1, 3])
@pytest.mark.parametrize("sizes", [MAIN[0], (33, 17, 16)])
def test_ties_of_the_mean_form(host, sizes, level):
    """S_k and |M_kk| apart by less than float32 sums can tell: a wrong sign is a wrong gradient."""
    signs, wrong = 0, 0
    for seed in range(4):
        U, S, V, H = problem(*sizes, seed=seed, B=8)
        diagonal = torch.einsum("bmr,bmn,bnr->br", U.conj().cdouble(), H.cdouble(), V.cdouble()).abs()
        # the float32 numbers around |M_kk|, so some are ties and some are not
        S = diagonal.float() * (1 + torch.linspace(-4, 4, S.shape[1]).round() * EPS[torch.float32])
        x = [U, S, V, H]
        got, want = on_host(host, x, "mean", level=level), by_autograd(x, "mean")
        # orders of summation differ in float64 too: leave out what even that does not tell
        told = (S.double() - diagonal).abs() > 1e-12 * diagonal
        signs += int(told.sum())
        # by which a wrong sign moves the gradient of S, at the least
        own = 2 * WEIGHTS["w_match"] / S.shape[1] / H.abs().square().sum((1, 2)).sqrt().amax() / len(S)
        wrong += int(((got["gS"] - want["gS"]).abs() > own / 2)[told].sum())
    assert signs > 400
    assert wrong == 0


@pytest.mark.parametrize("match", ["norm", "mean"])
@pytest.mark.parametrize("level", [1, 2])
def test_large_size_against_float64(host, match, level):
    compare(host, (128, 128, 64), match, B=1, seeds=(0,), level=level)


@pytest.mark.parametrize("match", ["norm", "mean"])
@pytest.mark.parametrize("level", [0, 1, 2, 3])
@pytest.mark.parametrize("sizes", [(63, 41, 11), (5, 70, 5), (70, 6, 6), (8, 8, 1), (1, 1, 1), (33, 17, 16)])
def test_other_sizes_against_float64(host, sizes, level, match):
    compare(host, sizes, match, B=11, level=level)


def test_more_tiles_than_threads(host):
    compare(host, (40, 72, 36), B=11, limit=128)


@pytest.mark.parametrize("match", ["norm", "mean"])
@pytest.mark.parametrize("sizes", [(9, 7, 4), (64, 64, 32), (12, 20, 1)])
def test_float64_equals_autograd(host, sizes, match):
    x = problem(*sizes, B=3, dtype=torch.float64)
    got, want = on_host(host, x, match, limit=256), by_autograd(x, match)
    for name in NAMES:
        assert error([got[name]], [want[name]]) < 1e-13, name


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=4)))
def test_flags_change_nothing_else(host, wanted):
    x = problem(13, 18, 6)
    every, some = on_host(host, x), on_host(host, x, wanted=wanted)
    for name in NAMES:
        if some[name] is not None:
            assert torch.equal(some[name], every[name]), name
    assert [some[name] is not None for name in ("gU", "gS", "gV", "gH")] == list(wanted)


@pytest.mark.parametrize("match", ["norm", "mean"])
def test_order_of_threads_and_samples(host, match):
    """A missing barrier, or one sample's memory in another, would show in the bits."""
    x = problem(24, 37, 9, B=3)
    first = on_host(host, x, match)
    for other in (on_host(host, x, match, backwards=True), on_host(host, x, match, level=0, backwards=True)):
        for name in NAMES:
            assert torch.equal(first[name], other[name]), name
    for b in range(3):
        alone = on_host(host, [t[b : b + 1] for t in x], match)
        for name in ("gU", "gV", "gS", "gH"):
            torch.testing.assert_close(alone[name][0] / 3, first[name][b], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("match", ["norm", "mean"])
@pytest.mark.parametrize("what", ["H", "S", "U", "V", "all", "unit"])
def test_zeros_give_zero_subgradients(host, match, what):
    x = problem(10, 6, 4)
    for t, name in zip(x, "USVH", strict=True):
        if what in (name, "all"):
            t.zero_()
    if what == "unit":
        x = [*(torch.eye(n, 4, dtype=torch.complex64).repeat(2, 1, 1) for n in (10, 6)), x[1], x[3]]
        x = [x[0], x[2], x[1], x[3]]
    got, want = on_host(host, x, match), by_autograd(x, match)
    for name in NAMES:
        assert torch.isfinite(torch.view_as_real(got[name] + 0j)).all(), name
        assert error([got[name]], [want[name]]) < 1e-5, name


def test_exact_decomposition_has_a_finite_gradient(host):
    _, S, _, _ = problem(9, 9, 5)
    U = torch.eye(9, 5, dtype=torch.complex64).repeat(2, 1, 1)
    x = [U, S, U.clone(), (U * S.unsqueeze(-2)) @ U.mH]
    got = on_host(host, x)
    assert got["rec"] == 0
    assert got["ortho"] == 0
    for name in NAMES:
        assert torch.isfinite(torch.view_as_real(got[name] + 0j)).all(), name


def test_empty_batch(host):
    got = on_host(host, problem(4, 4, 2, B=0))
    assert got["loss"].isnan()
    assert got["gU"].shape == (0, 4, 2)


def test_layouts_fit_the_devices(host):
    """Shared memory of a block: 64x64 r=32 whole everywhere, 128x128 r=64 by what must stay in global memory."""
    main, large = ([host.bytes_of(*sizes, 4, level) for level in range(4)] for sizes in MAIN)
    assert (main[3], large[2], large[1], large[0]) == (75264, 221056, 153472, 77696)
    for architecture, limit in SM.items():
        taken = tuple(max(level for level in range(4) if x[level] <= limit) for x in (main, large))
        assert taken == MAIN_LEVELS[architecture]
    # three blocks a multiprocessor of sm_90
    assert 3 * (main[3] + 1024) <= 228 * 1024


def formula(M, N, r, element, level):
    """Bytes as the header states them."""
    up = lambda x, n: -(-x // n) * n  # noqa: E731
    c, e, q = 2 * element, element, up(r, 4)
    width, PM, PN = q + 2, up(M, 8), up(N, 8)
    threads = min(max(up(max(PM, PN) // 4 * (q // 4), 32), 128), 512 if element == 4 and level > 0 else 256)
    panels = c * width * ((level >= 1) * PM + (level >= 2) * PN + (level >= 3) * PM)
    gram = c * (q * width + max(q * width, 16 * PN, 20 * PM - q * width))
    return panels + gram + c * q + 1024 + 32 * e + e * q + 8 * e * threads


def test_bytes_follow_the_stated_formula(host):
    for M, N, r in [(64, 64, 32), (128, 128, 64), (63, 41, 11), (1, 1, 1), (300, 7, 7), (9, 500, 3)]:
        for element, level in itertools.product((4, 8), range(4)):
            assert host.bytes_of(M, N, r, element, level) == formula(M, N, r, element, level)


def kernel(name):
    """(dtype, level) of a mangled `aeplus_fwd_kernel`, else None."""
    found = re.search(r"aeplus_fwd_kernelI([fd])Li(\d)E", name)
    return (found[1], int(found[2])) if found else None


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    library = build(tmp_path_factory.mktemp("cuda"), "aeplus.cu", 80, 90, 100, 120)
    return SimpleNamespace(library=library, usage=resources(library, kernel))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_compiled_resources(compiled):
    assert {key[0] for key in compiled.usage} == set(SM)
    assert len(compiled.usage) == 4 * 2 * 4
    for (architecture, dtype, level), used in compiled.usage.items():
        where = (architecture, dtype, level, used)
        main = dtype == "f" and level in MAIN_LEVELS[architecture]
        assert used["STACK"] <= (0 if main else 16), where
        assert used["LOCAL"] == 0, where
        assert used["REG"] <= (128 if dtype == "f" and level > 0 else 255), where


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_compiled_instructions(compiled):
    counts = instructions(compiled.library, "sm_90", kernel)
    assert not [op for own in counts.values() for op in own if re.match(r"RED\b|ATOM", op)]
    # 64x64 r=32 takes level 3, 128x128 r=64 level 2
    for level in (2, 3):
        found = counts["f", level]
        total = {
            k: sum(n for op, n in found.items() if re.match(k, op))
            for k in ("FFMA", "LDL", "STL", "LD$", "LD\\.")
        }
        assert total["LDL"] == total["STL"] == total["LD$"] == total["LD\\."] == 0, found
        wide = {
            k: sum(n for op, n in found.items() if op.startswith(k) and "128" in op)
            for k in ("LDG", "STG", "LDS", "LDGSTS")
        }
        assert all(wide.values()), wide
        # 16-byte loads of an inner loop serve 16 multiply-adds each
        assert total["FFMA"] > 15 * wide["LDS"], found


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    major, minor = torch.cuda.get_device_capability()
    library = build(tmp_path_factory.mktemp("device"), "aeplus.cu", f"{major}{minor}")
    fragment = None
    if not hasattr(torch.ops.lomacs, "aeplus"):
        fragment = torch.library.Library("lomacs", "FRAGMENT")
        fragment.define(SCHEMA)
    if not torch._C._dispatch_has_kernel_for_dispatch_key("lomacs::aeplus", "CUDA"):
        torch.ops.load_library(str(library))
    yield torch.ops.lomacs.aeplus
    del fragment


def on_device(op, arguments, match="norm", wanted=(True,) * 4):
    # QR gives columns in another order of memory
    wide = [(torch.view_as_real(x) if x.is_complex() else x).contiguous().cuda() for x in arguments]
    weights = torch.tensor(list(WEIGHTS.values()), dtype=torch.float64, device="cuda")
    return op(*wide, weights, match == "mean", *wanted)


def named(result):
    loss, terms, *gradients = (x.cpu() for x in result)
    return flat(loss, terms, [torch.view_as_complex(g) if g.dim() == 4 else g for g in gradients])


@pytest.mark.gpu
@pytest.mark.parametrize("match", ["norm", "mean"])
@pytest.mark.parametrize(
    ("sizes", "kind"),
    [(sizes, "random") for sizes in (*MAIN, (63, 41, 11), (256, 256, 64), (9, 7, 1), (1, 1, 1))]
    # elsewhere S and |diag M| of this kind are too close for the sign of their difference
    + [(MAIN[0], "near")],
)
def test_device_against_float64(device, sizes, kind, match):
    runs = []
    for seed in range(3):
        x = problem(*sizes, B=11, seed=seed, kind=kind)
        eager, exact = by_autograd(x, match, torch.float32), by_autograd(x, match)
        runs.append((named(on_device(device, x, match)), eager, exact))
    close(runs)


@pytest.mark.gpu
def test_device_float64(device):
    x = problem(63, 41, 11, B=3, dtype=torch.float64)
    got, want = named(on_device(device, x)), by_autograd(x)
    for name in NAMES:
        assert error([got[name]], [want[name]]) < 1e-13, name


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(64, 64, 32), (128, 128, 64)])
def test_device_repeats_its_bits(device, sizes):
    x = problem(*sizes, B=700)
    first, second = on_device(device, x), on_device(device, x)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
def test_device_flags(device):
    x = problem(16, 12, 5, B=4)
    result = on_device(device, x, wanted=(False, True, False, False))
    assert [g.numel() for g in result[2:]] == [0, 20, 0, 0]
    assert torch.equal(result[3], on_device(device, x)[3])


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(64, 64, 32), (128, 128, 64)])
def test_device_graph_capture(device, sizes):
    first, second = problem(*sizes, B=5), problem(*sizes, B=5, seed=1)
    static = [(torch.view_as_real(x) if x.is_complex() else x).cuda() for x in first]
    weights = torch.tensor(list(WEIGHTS.values()), dtype=torch.float64, device="cuda")
    device(*static, weights, False, True, True, True, True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = device(*static, weights, False, True, True, True, True)
    for target, source in zip(static, second, strict=True):
        target.copy_(torch.view_as_real(source) if source.is_complex() else source)
    graph.replay()
    torch.cuda.synchronize()
    for got, want in zip(result, on_device(device, second), strict=True):
        assert torch.equal(got, want)


@pytest.mark.gpu
def test_device_current_stream(device):
    x = problem(64, 64, 32, B=300)
    want = on_device(device, x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        wide = [(torch.view_as_real(t) if t.is_complex() else t).cuda() for t in x]
        weights = torch.tensor(list(WEIGHTS.values()), dtype=torch.float64, device="cuda")
        # inputs are still being written on this stream when the call is made
        torch.cuda._sleep(20_000_000)
        shifted = [t + 0 for t in wide]
        got = device(*shifted, weights, False, True, True, True, True)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.gpu
def test_device_refuses_what_does_not_fit(device):
    with pytest.raises(RuntimeError, match="shared memory"):
        on_device(device, problem(400, 400, 400, B=1))
    wide = [(torch.view_as_real(t) if t.is_complex() else t).cuda() for t in problem(4, 4, 2)]
    with pytest.raises(RuntimeError, match="weights"):
        device(*wide, torch.zeros(4, device="cuda"), False, True, True, True, True)


def test_problem_is_what_it_says():
    U, S, V, H = problem(12, 10, 4, kind="near", dtype=torch.float64)
    residual = (H - (U * S.unsqueeze(-2)) @ V.mH).norm() / H.norm()
    assert 1e-5 < residual < 1e-3
    assert np.isclose(float((U.mH @ U - torch.eye(4)).norm()), 0, atol=1e-3)
