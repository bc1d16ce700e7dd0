// lomacs::low_rank on CPU: the low-rank objective of every matrix, and its gradients in the same call.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "simd.h"
#include "tensors.h"

namespace lomacs {
namespace {

enum class Nesting : std::int64_t { none, joint, sequential };

// Pointers to contiguous batches; a gradient that is not wanted is null.
template <typename T>
struct LowRank {
  const T *F, *G, *H;
  T *loss, *gF, *gG, *gH;
  std::int64_t B, M, N, L;
  double scale;
  Nesting nesting;
  // interleaved complex numbers; every matrix by all threads; columns of H copied before they are read
  bool complex, spread, copied;
};

// shares of less than about 20 us are not worth a thread: how many of this many multiply-adds make one
std::int64_t worth_a_thread(std::int64_t macs) { return std::max<std::int64_t>(1, (1 << 17) / macs); }

}  // namespace
}  // namespace lomacs

#define LOMACS_KERNELS "low_rank.inl"
#include "isa.inl"

namespace lomacs {
namespace {

constexpr Checks checks{"low_rank"};

template <typename T>
void run(const LowRank<T>& job) {
  const Isa isa = choose_isa();
  LOMACS_DISPATCH(isa, low_rank_matrices(job));
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor> evaluate(const Tensor& F, const Tensor& G, const Tensor& H,
                                                    LowRank<T> job, bool gf, bool gg, bool gh) {
  const auto like = [&](const Tensor& x, bool wanted) {
    return wanted ? fresh_like(x) : fresh(H, {0});
  };
  Tensor loss = fresh(H, {job.B});
  Tensor gF = like(F, gf), gG = like(G, gg), gH = like(H, gh);
  job.F = pointer<T>(F), job.G = pointer<T>(G), job.H = pointer<T>(H);
  job.loss = output<T>(loss), job.gF = output<T>(gF, gf), job.gG = output<T>(gG, gg), job.gH = output<T>(gH, gh);
  // a matrix that a core's cache does not hold
  job.copied = job.M * job.N * (job.complex ? 2 : 1) * static_cast<std::int64_t>(sizeof(T)) > 1 << 20;
  job.spread = job.copied || job.B == 1;
  if (job.B > 0) run(job);
  return {loss, gF, gG, gH};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> low_rank(const Tensor& F, const Tensor& G, const Tensor& H,
                                                    std::int64_t rows, std::int64_t columns,
                                                    std::int64_t nesting, bool gf, bool gg, bool gh) {
  const ScalarType dtype = H.scalar_type();
  checks.real("H", dtype);
  checks.expect(H.dim() == 3 || H.dim() == 4, "H must have shape (B, M, N) or (B, M, N, 2)");
  checks.expect(F.dim() == H.dim(), "F must have as many dimensions as H");
  const std::int64_t B = H.size(0), M = H.size(1), N = H.size(2), L = F.size(2);
  checks.expect(M > 0 && N > 0 && L > 0, "no dimension but the batch may be empty");
  const auto shape = [&](std::int64_t m, std::int64_t n) {
    std::vector<std::int64_t> sizes{B, m, n};
    if (H.dim() == 4) sizes.push_back(2);
    return sizes;
  };
  checks.tensor("F", F, dtype, shape(N, L));
  checks.tensor("G", G, dtype, shape(M, L));
  checks.tensor("H", H, dtype, shape(M, N));
  checks.expect(rows >= M && columns >= N, "rows and columns must be at least those of H");
  checks.expect(nesting >= 0 && nesting < 3, "nesting must be 0, 1 or 2");
  const auto evaluated = [&](auto zero) {
    LowRank<decltype(zero)> job{};
    job.B = B, job.M = M, job.N = N, job.L = L;
    job.scale = static_cast<double>(rows) / static_cast<double>(M) *
                (static_cast<double>(columns) / static_cast<double>(N));
    job.nesting = static_cast<Nesting>(nesting);
    job.complex = H.dim() == 4;
    return evaluate(F, G, H, job, gf, gg, gh);
  };
  return dtype == ScalarType::Float ? evaluated(0.0F) : evaluated(0.0);
}

}  // namespace
}  // namespace lomacs

STABLE_TORCH_LIBRARY_IMPL(lomacs, CPU, m) { m.impl("low_rank", TORCH_BOX(&lomacs::low_rank)); }
