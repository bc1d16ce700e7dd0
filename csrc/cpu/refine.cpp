// lomacs::refine_svd and lomacs::approx_svd on CPU: an SVD refined by matrix products, a sample in one visit.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <tuple>
#include <vector>

#include "simd.h"
#include "tensors.h"

namespace lomacs {
namespace {

// A batch: H and the start in, factors and the order of their columns out.
template <typename T>
struct RefineSvd {
  const T *H, *U, *V, *scalars;
  T *outU, *outS, *outV;
  std::int64_t* order;
  const T* roots[2];   // exp(2 pi i t / n) of either side
  const T* chirps[2];  // exp(2 pi i c j^2) of either side, for c of both rounds of filling
  std::int64_t batch, M, N, r, k, steps, sweeps;
  bool hermitian, orthonormal;
};

// A batch whose start and form are found from the data.
template <typename T>
struct ApproxSvd {
  RefineSvd<T> refine;
  std::int64_t active, form;  // 0 columns: as many as are needed; form 0 general, 1 Hermitian, -1 as it is
  bool denoise;
  std::int64_t* state;  // -1: not finite, -2: not Hermitian and should be; else twice the active columns, and 1 where tied
};

}  // namespace
}  // namespace lomacs

#define LOMACS_KERNELS "refine.inl"
#include "isa.inl"

namespace lomacs {
namespace {

constexpr double turn = 6.283185307179586476925;

template <typename T>
void unit_circle(double turns, T* out) {
  out[0] = static_cast<T>(std::cos(turn * turns));
  out[1] = static_cast<T>(std::sin(turn * turns));
}

// made once a size: at batch 1 they would take as long as a step
template <typename T>
const std::vector<T>& tables(std::int64_t n) {
  static std::mutex lock;
  static std::map<std::int64_t, std::vector<T>> made;
  const std::lock_guard<std::mutex> guard(lock);
  std::vector<T>& out = made[n];
  if (!out.empty()) return out;
  out.resize(static_cast<std::size_t>(6 * n));
  for (std::int64_t j = 0; j < n; ++j) {
    const double x = static_cast<double>(j), size = static_cast<double>(n);
    unit_circle(x / size, out.data() + 2 * j);
    for (int c = 1; c < 3; ++c) unit_circle(std::fmod(c * 0.381966 * x * x, 1.0), out.data() + 2 * (c * n + j));
  }
  return out;
}

// real multiply-adds of a sample, about
std::int64_t macs_of(std::int64_t M, std::int64_t N, std::int64_t k, std::int64_t r, std::int64_t steps) {
  return (steps + 1) * (8 * M * N * k + 20 * (M + N) * k * k) + 24 * (M + N) * r * r;
}

template <typename T>
void run(const RefineSvd<T>& job) {
  const Isa isa = choose_isa();
  const std::int64_t macs = macs_of(job.M, job.N, job.k, job.r, job.steps);
  const std::int64_t grain = std::max<std::int64_t>(1, (1 << 20) / macs);
  torch::stable::parallel_for(0, job.batch, grain, [&](std::int64_t begin, std::int64_t end) {
#if defined(__x86_64__)
    if (isa == Isa::avx512) return avx512::refine_samples(job, begin, end);
    if (isa == Isa::avx2) return avx2::refine_samples(job, begin, end);
#endif
    portable::refine_samples(job, begin, end);
  });
}

template <typename T>
void run(const ApproxSvd<T>& job) {
  const Isa isa = choose_isa();
  const RefineSvd<T>& x = job.refine;
  const std::int64_t grain = std::max<std::int64_t>(1, (1 << 20) / macs_of(x.M, x.N, x.k, x.r, x.steps));
  torch::stable::parallel_for(0, x.batch, grain, [&](std::int64_t begin, std::int64_t end) {
#if defined(__x86_64__)
    if (isa == Isa::avx512) return avx512::approx_samples(job, begin, end);
    if (isa == Isa::avx2) return avx2::approx_samples(job, begin, end);
#endif
    portable::approx_samples(job, begin, end);
  });
}

using Found = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <typename T>
Found refine(const Tensor& H, const Tensor& U, const std::optional<Tensor>& V, const Tensor& scalars,
             std::int64_t active, std::int64_t sweeps, bool orthonormal) {
  const std::int64_t B = H.size(0), M = H.size(1), N = H.size(2), r = U.size(2);
  Tensor outU = torch::stable::new_empty(H, {B, M, r, 2}), outV = torch::stable::new_empty(H, {B, N, r, 2});
  Tensor outS = torch::stable::new_empty(H, {B, r});
  Tensor order = torch::stable::new_empty(H, {B, active}, ScalarType::Long);
  const std::vector<T>&left = tables<T>(M), &right = tables<T>(N);
  RefineSvd<T> job{};
  job.H = pointer<T>(H), job.U = pointer<T>(U), job.V = V.has_value() ? pointer<T>(*V) : nullptr;
  job.scalars = pointer<T>(scalars);
  job.outU = output<T>(outU), job.outS = output<T>(outS), job.outV = output<T>(outV);
  job.order = output<std::int64_t>(order);
  job.roots[0] = left.data(), job.roots[1] = right.data();
  job.chirps[0] = left.data() + 2 * M, job.chirps[1] = right.data() + 2 * N;
  job.batch = B, job.M = M, job.N = N, job.r = r, job.k = active;
  job.steps = scalars.size(0), job.sweeps = sweeps;
  job.hermitian = !V.has_value(), job.orthonormal = orthonormal;
  if (B > 0) run(job);
  return {outU, outS, outV, order};
}

Found refine_svd(const Tensor& H, const Tensor& U, const std::optional<Tensor>& V, const Tensor& scalars,
                 std::int64_t active, std::int64_t sweeps, bool orthonormal) {
  constexpr Checks checks{"refine_svd"};
  checks.real("H", H.scalar_type());
  checks.expect(H.dim() == 4 && H.size(3) == 2, "H must have shape (B, M, N, 2)");
  checks.expect(H.size(1) > 0 && H.size(2) > 0, "no dimension but the batch may be empty");
  const ScalarType dtype = H.scalar_type();
  const std::int64_t B = H.size(0), M = H.size(1), N = H.size(2);
  checks.tensor("H", H, dtype, {B, M, N, 2});
  checks.expect(U.dim() == 4, "U must have shape (B, M, r, 2)");
  const std::int64_t r = U.size(2);
  checks.tensor("U", U, dtype, {B, M, r, 2});
  if (V.has_value()) checks.tensor("V", *V, dtype, {B, N, r, 2});
  else checks.expect(M == N, "H must be square where V is not given");
  checks.expect(scalars.dim() == 2, "scalars must have shape (steps, 4)");
  checks.tensor("scalars", scalars, dtype, {scalars.size(0), 4});
  checks.expect(r >= 1 && r <= std::min(M, N), "r must be 1 to min(M, N), got " + std::to_string(r));
  checks.expect(active >= 1 && active <= r, "active must be 1 to r, got " + std::to_string(active));
  checks.expect(sweeps >= 1, "sweeps must be at least 1, got " + std::to_string(sweeps));
  if (dtype == ScalarType::Float) return refine<float>(H, U, V, scalars, active, sweeps, orthonormal);
  return refine<double>(H, U, V, scalars, active, sweeps, orthonormal);
}

template <typename T>
Found approximate(const Tensor& H, const Tensor& scalars, std::int64_t rank, std::int64_t active, std::int64_t form,
                  bool denoise) {
  const std::int64_t B = H.size(0), M = H.size(1), N = H.size(2);
  Tensor outU = torch::stable::new_empty(H, {B, M, rank, 2}), outV = torch::stable::new_empty(H, {B, N, rank, 2});
  Tensor outS = torch::stable::new_empty(H, {B, rank}), state = torch::stable::new_empty(H, {B}, ScalarType::Long);
  const std::vector<T>&left = tables<T>(M), &right = tables<T>(N);
  ApproxSvd<T> job{};
  RefineSvd<T>& x = job.refine;
  x.H = pointer<T>(H), x.scalars = pointer<T>(scalars);
  x.outU = output<T>(outU), x.outS = output<T>(outS), x.outV = output<T>(outV);
  x.roots[0] = left.data(), x.roots[1] = right.data();
  x.chirps[0] = left.data() + 2 * M, x.chirps[1] = right.data() + 2 * N;
  x.batch = B, x.M = M, x.N = N, x.r = rank, x.k = active > 0 ? active : rank;
  x.steps = scalars.size(0), x.sweeps = 2, x.orthonormal = true;
  job.active = active, job.form = form, job.denoise = denoise, job.state = output<std::int64_t>(state);
  if (B > 0) run(job);
  return {outU, outS, outV, state};
}

Found approx_svd(const Tensor& H, const Tensor& scalars, std::int64_t rank, std::int64_t active, std::int64_t form,
                 bool denoise) {
  constexpr Checks checks{"approx_svd"};
  checks.real("H", H.scalar_type());
  checks.expect(H.dim() == 4 && H.size(3) == 2, "H must have shape (B, M, N, 2)");
  checks.expect(H.size(1) > 0 && H.size(2) > 0, "no dimension but the batch may be empty");
  const std::int64_t B = H.size(0), M = H.size(1), N = H.size(2);
  checks.tensor("H", H, H.scalar_type(), {B, M, N, 2});
  checks.expect(scalars.dim() == 2, "scalars must have shape (steps, 4)");
  checks.tensor("scalars", scalars, H.scalar_type(), {scalars.size(0), 4});
  checks.expect(rank >= 1 && rank <= std::min(M, N), "rank must be 1 to min(M, N), got " + std::to_string(rank));
  checks.expect(active >= 0 && active <= rank, "active must be 0 to rank, got " + std::to_string(active));
  checks.expect(form >= -1 && form <= 1, "form must be -1, 0 or 1, got " + std::to_string(form));
  if (H.scalar_type() == ScalarType::Float) return approximate<float>(H, scalars, rank, active, form, denoise);
  return approximate<double>(H, scalars, rank, active, form, denoise);
}

}  // namespace
}  // namespace lomacs

STABLE_TORCH_LIBRARY_IMPL(lomacs, CPU, m) {
  m.impl("refine_svd", TORCH_BOX(&lomacs::refine_svd));
  m.impl("approx_svd", TORCH_BOX(&lomacs::approx_svd));
}
