// lomacs::refine_svd_backward on CPU: the steps of a sample made anew and walked back in one visit.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "refine.h"
#include "simd.h"
#include "tensors.h"

namespace lomacs {
namespace {

// A batch with the gradients of what came out, and the places that its active columns had before they were sorted.
template <typename T>
struct RefineGradient {
  RefineSvd<T> refine;
  const T *gU, *gS, *gV;
  const std::int64_t* order;
  T *outH, *outU, *outV;
  double* partial;  // those of the scalars, sample by sample
};

}  // namespace
}  // namespace lomacs

#define LOMACS_KERNELS "refine_gradient.inl"
#include "isa.inl"

namespace lomacs {
namespace {

using Found = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <typename T>
Found walk_back(const Tensor& gU, const Tensor& gS, const Tensor& gV, const Tensor& H, const Tensor& U,
                const std::optional<Tensor>& V, const Tensor& scalars, const Tensor& order, std::int64_t sweeps,
                bool orthonormal) {
  const std::int64_t B = H.size(0), M = H.size(1), N = H.size(2), r = U.size(2), steps = scalars.size(0);
  Tensor outH = fresh(H, {B, M, N, 2}), outU = fresh(H, {B, M, r, 2});
  Tensor outV = V.has_value() ? fresh(H, {B, N, r, 2}) : fresh(H, {0});
  Tensor of_scalars = fresh(H, {steps, 4});
  std::vector<double> partial(static_cast<std::size_t>(4 * B * steps));
  RefineGradient<T> job{};
  RefineSvd<T>& x = job.refine;
  x.H = pointer<T>(H), x.U = pointer<T>(U), x.V = V.has_value() ? pointer<T>(*V) : nullptr;
  x.scalars = pointer<T>(scalars);
  x.batch = B, x.M = M, x.N = N, x.r = r, x.k = order.size(1), x.steps = steps, x.sweeps = sweeps;
  x.hermitian = !V.has_value(), x.orthonormal = orthonormal;
  tables_of(x);
  job.gU = pointer<T>(gU), job.gS = pointer<T>(gS), job.gV = pointer<T>(gV);
  job.order = pointer<std::int64_t>(order);
  job.outH = output<T>(outH), job.outU = output<T>(outU), job.outV = output<T>(outV), job.partial = partial.data();
  if (B > 0) {
    const Isa isa = choose_isa();
    const std::int64_t grain = std::max<std::int64_t>(1, (1 << 20) / (3 * macs_of(M, N, x.k, r, steps)));
    torch::stable::parallel_for(0, B, grain, [&](std::int64_t begin, std::int64_t end) {
      LOMACS_DISPATCH(isa, samples(job, begin, end));
    });
  }
  // in the order of the samples, whoever walked them
  T* sums = output<T>(of_scalars);
  for (std::int64_t i = 0; i < 4 * steps; ++i) {
    double total = 0;
    for (std::int64_t b = 0; b < B; ++b) total += partial[static_cast<std::size_t>(4 * steps * b + i)];
    sums[i] = static_cast<T>(total);
  }
  return {outH, outU, outV, of_scalars};
}

Found refine_svd_backward(const Tensor& gU, const Tensor& gS, const Tensor& gV, const Tensor& H, const Tensor& U,
                          const std::optional<Tensor>& V, const Tensor& scalars, const Tensor& order,
                          std::int64_t sweeps, bool orthonormal) {
  constexpr Checks checks{"refine_svd_backward"};
  const ScalarType dtype = H.scalar_type();
  const std::int64_t r = check_refinement(checks, H, U, V, scalars, sweeps);
  const std::int64_t B = H.size(0), M = H.size(1), N = H.size(2);
  checks.tensor("gU", gU, dtype, {B, M, r, 2});
  checks.tensor("gS", gS, dtype, {B, r});
  checks.tensor("gV", gV, dtype, {B, N, r, 2});
  checks.expect(order.dim() == 2 && order.size(1) >= 1 && order.size(1) <= r, "order must hold 1 to r columns");
  const std::int64_t k = order.size(1);
  checks.expect(order.scalar_type() == ScalarType::Long && order.is_cpu() && order.is_contiguous() && order.size(0) == B,
                "order must be a contiguous int64 tensor of B rows on the CPU");
  std::vector<bool> seen(static_cast<std::size_t>(k));
  const std::int64_t* places = pointer<std::int64_t>(order);
  for (std::int64_t b = 0; b < B; ++b) {
    seen.assign(seen.size(), false);
    for (std::int64_t j = 0; j < k; ++j) {
      const std::int64_t at = places[b * k + j];
      checks.expect(at >= 0 && at < k && !seen[static_cast<std::size_t>(at)], "order must hold every active column once");
      seen[static_cast<std::size_t>(at)] = true;
    }
  }
  if (dtype == ScalarType::Float) return walk_back<float>(gU, gS, gV, H, U, V, scalars, order, sweeps, orthonormal);
  return walk_back<double>(gU, gS, gV, H, U, V, scalars, order, sweeps, orthonormal);
}

}  // namespace
}  // namespace lomacs

STABLE_TORCH_LIBRARY_IMPL(lomacs, CPU, m) { m.impl("refine_svd_backward", TORCH_BOX(&lomacs::refine_svd_backward)); }
