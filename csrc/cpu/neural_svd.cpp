// lomacs::neural_svd_steps on CPU: steps of a batch of matrices on the nested low-rank objective.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "simd.h"
#include "tensors.h"

namespace lomacs {
namespace {

template <typename T>
struct NeuralSvd {
  const T *H, *F;
  T *out, *change;
  std::int64_t M, N, L, steps, watch;
};

}  // namespace
}  // namespace lomacs

#define LOMACS_KERNELS "neural_svd.inl"
#include "isa.inl"

namespace lomacs {
namespace {

constexpr Checks checks{"neural_svd_steps"};

template <typename T>
std::tuple<Tensor, Tensor> steps_of(const Tensor& H, const Tensor& F, std::int64_t steps, std::int64_t watch) {
  const std::int64_t B = H.size(0);
  Tensor out = fresh_like(F), change = fresh(H, {B});
  NeuralSvd<T> job{pointer<T>(H), pointer<T>(F), output<T>(out), output<T>(change), H.size(1), H.size(2), F.size(2),
                   steps,         watch};
  const Isa isa = choose_isa();
  // a matrix is worth a thread
  torch::stable::parallel_for(0, B, 1, [&](std::int64_t begin, std::int64_t end) {
#if defined(__x86_64__)
    if (isa == Isa::avx512) return avx512::neural_svd_matrices(job, begin, end);
    if (isa == Isa::avx2) return avx2::neural_svd_matrices(job, begin, end);
#endif
    portable::neural_svd_matrices(job, begin, end);
  });
  return {out, change};
}

std::tuple<Tensor, Tensor> neural_svd_steps(const Tensor& H, const Tensor& F, std::int64_t steps,
                                            std::int64_t watch) {
  const ScalarType dtype = H.scalar_type();
  checks.real("H", dtype);
  checks.expect(H.dim() == 4 && H.size(3) == 2, "H must have shape (B, M, N, 2)");
  checks.expect(F.dim() == 4, "F must have shape (B, N, L, 2)");
  const std::int64_t B = H.size(0), M = H.size(1), N = H.size(2), L = F.size(2);
  checks.expect(M > 0 && N > 0 && L > 0, "no dimension but the batch may be empty");
  checks.expect(L <= N, "F must have at least as many rows as columns");
  checks.tensor("H", H, dtype, {B, M, N, 2});
  checks.tensor("F", F, dtype, {B, N, L, 2});
  checks.expect(steps > 0, "steps must be at least 1");
  checks.expect(watch > 0 && watch <= L, "watch must lie in 1 to L");
  return dtype == ScalarType::Float ? steps_of<float>(H, F, steps, watch) : steps_of<double>(H, F, steps, watch);
}

}  // namespace
}  // namespace lomacs

STABLE_TORCH_LIBRARY_IMPL(lomacs, CPU, m) { m.impl("neural_svd_steps", TORCH_BOX(&lomacs::neural_svd_steps)); }
