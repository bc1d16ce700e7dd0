// lomacs::refine_svd, lomacs::approx_svd and lomacs::frozen_angular_svd on CPU: an SVD refined by matrix products, a
// sample in one visit.
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

// The frozen network with the angular head; see FrozenAngular in lomacs_fast/reference/frozen.py.
template <typename T>
struct AngularSvd {
  RefineSvd<T> refine;
  const T *first, *second, *table, *numbers;
  const T* roots[2];  // exp(2 pi i t / n) for twice as many angles as rows and columns of the panel
  const std::int64_t* scene;
  std::int64_t hidden, polarisations, rows, columns;
};

constexpr double least_above = 0.03;  // LEAST of the reference

}  // namespace
}  // namespace lomacs

#define LOMACS_KERNELS "frozen_angular.inl"
#include "isa.inl"

namespace lomacs {
namespace {

template <typename T, typename Job>
void run(const Job& job, const RefineSvd<T>& x) {
  const Isa isa = choose_isa();
  const std::int64_t grain = std::max<std::int64_t>(1, (1 << 20) / macs_of(x.M, x.N, x.k, x.r, x.steps));
  torch::stable::parallel_for(0, x.batch, grain, [&](std::int64_t begin, std::int64_t end) {
    LOMACS_DISPATCH(isa, samples(job, begin, end));
  });
}

using Found = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <typename T>
Found refine(const Tensor& H, const Tensor& U, const std::optional<Tensor>& V, const Tensor& scalars,
             std::int64_t active, std::int64_t sweeps, bool orthonormal) {
  const std::int64_t B = H.size(0), M = H.size(1), N = H.size(2), r = U.size(2);
  Tensor outU = fresh(H, {B, M, r, 2}), outV = fresh(H, {B, N, r, 2});
  Tensor outS = fresh(H, {B, r});
  Tensor order = fresh(H, {B, active}, ScalarType::Long);
  RefineSvd<T> job{};
  job.H = pointer<T>(H), job.U = pointer<T>(U), job.V = V.has_value() ? pointer<T>(*V) : nullptr;
  job.scalars = pointer<T>(scalars);
  job.outU = output<T>(outU), job.outS = output<T>(outS), job.outV = output<T>(outV);
  job.order = output<std::int64_t>(order);
  job.batch = B, job.M = M, job.N = N, job.r = r, job.k = active;
  job.steps = scalars.size(0), job.sweeps = sweeps;
  job.hermitian = !V.has_value(), job.orthonormal = orthonormal;
  tables_of(job);
  if (B > 0) run(job, job);
  return {outU, outS, outV, order};
}

Found refine_svd(const Tensor& H, const Tensor& U, const std::optional<Tensor>& V, const Tensor& scalars,
                 std::int64_t active, std::int64_t sweeps, bool orthonormal) {
  constexpr Checks checks{"refine_svd"};
  const std::int64_t r = check_refinement(checks, H, U, V, scalars, sweeps);
  checks.expect(active >= 1 && active <= r, "active must be 1 to r, got " + std::to_string(active));
  if (H.scalar_type() == ScalarType::Float) return refine<float>(H, U, V, scalars, active, sweeps, orthonormal);
  return refine<double>(H, U, V, scalars, active, sweeps, orthonormal);
}

template <typename T>
Found approximate(const Tensor& H, const Tensor& scalars, std::int64_t rank, std::int64_t active, std::int64_t form,
                  bool denoise) {
  const std::int64_t B = H.size(0), M = H.size(1), N = H.size(2);
  Tensor outU = fresh(H, {B, M, rank, 2}), outV = fresh(H, {B, N, rank, 2});
  Tensor outS = fresh(H, {B, rank}), state = fresh(H, {B}, ScalarType::Long);
  ApproxSvd<T> job{};
  RefineSvd<T>& x = job.refine;
  x.H = pointer<T>(H), x.scalars = pointer<T>(scalars);
  x.outU = output<T>(outU), x.outS = output<T>(outS), x.outV = output<T>(outV);
  x.batch = B, x.M = M, x.N = N, x.r = rank, x.k = active > 0 ? active : rank;
  x.steps = scalars.size(0), x.sweeps = 2, x.orthonormal = true;
  job.active = active, job.form = form, job.denoise = denoise, job.state = output<std::int64_t>(state);
  tables_of(x);
  if (B > 0) run(job, x);
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

// What the op takes after the scenes.
enum Position { first, second, table, numbers, rows_of_scalars, weights };

template <typename T>
std::tuple<Tensor, Tensor, Tensor> evaluate(const Tensor& H, const Tensor& scene, const std::vector<Tensor>& w,
                                            const std::vector<std::int64_t>& array, std::int64_t rank,
                                            std::int64_t active, std::int64_t sweeps) {
  const std::int64_t B = H.size(0), M = H.size(1), N = H.size(2);
  Tensor outU = fresh(H, shape_as(H, B, M, rank)), outV = fresh(H, shape_as(H, B, N, rank));
  Tensor outS = fresh(H, {B, rank}, real_of(H)), order = fresh(H, {B, active}, ScalarType::Long);
  AngularSvd<T> job{};
  RefineSvd<T>& x = job.refine;
  x.H = pointer<T>(H), x.scalars = pointer<T>(w[rows_of_scalars]);
  x.outU = output<T>(outU), x.outS = output<T>(outS), x.outV = output<T>(outV), x.order = output<std::int64_t>(order);
  x.batch = B, x.M = M, x.N = N, x.r = rank, x.k = active;
  x.steps = w[rows_of_scalars].size(0), x.sweeps = sweeps, x.orthonormal = true, x.hermitian = !array.empty();
  tables_of(x);
  job.first = pointer<T>(w[first]), job.second = pointer<T>(w[second]), job.table = pointer<T>(w[table]);
  job.numbers = pointer<T>(w[numbers]), job.hidden = w[first].size(0);
  job.scene = pointer<std::int64_t>(scene);
  if (x.hermitian) {
    job.polarisations = array[0], job.rows = array[1], job.columns = array[2];
    job.roots[0] = tables<T>(2 * array[1]).data(), job.roots[1] = tables<T>(2 * array[2]).data();
  }
  if (B > 0) run(job, x);
  return {outU, outS, outV};
}

std::tuple<Tensor, Tensor, Tensor> frozen_angular_svd(const Tensor& H, const Tensor& scene, const std::vector<Tensor>& w,
                                                      const std::vector<std::int64_t>& array, std::int64_t rank,
                                                      std::int64_t active, std::int64_t sweeps) {
  constexpr Checks checks{"frozen_angular_svd"};
  const ScalarType dtype = real_of(H);
  checks.channels(H);
  const std::int64_t B = H.size(0), M = H.size(1), N = H.size(2);
  checks.expect(M > 0 && N > 0, "no dimension but the batch may be empty");
  checks.tensor("H", H, H.scalar_type(), shape_as(H, B, M, N));
  checks.expect(rank >= 1 && rank <= std::min(M, N), "rank must be 1 to min(M, N), got " + std::to_string(rank));
  checks.expect(active >= 1 && active <= rank, "active must be 1 to rank, got " + std::to_string(active));
  checks.expect(sweeps >= 1, "sweeps must be at least 1, got " + std::to_string(sweeps));
  checks.expect(w.size() == weights, "weights must hold 5 tensors, got " + std::to_string(w.size()));
  checks.expect(w[first].dim() == 2 && w[table].dim() == 2 && w[rows_of_scalars].dim() == 2,
                "first, table and scalars must have two dimensions");
  const std::int64_t hidden = w[first].size(0);
  checks.tensor("first", w[first], dtype, {hidden, 9});
  checks.tensor("second", w[second], dtype, {hidden, 9});
  checks.tensor("table", w[table], dtype, {w[table].size(0), hidden});
  checks.tensor("numbers", w[numbers], dtype, {6});
  checks.tensor("scalars", w[rows_of_scalars], dtype, {w[rows_of_scalars].size(0), 4});
  if (!array.empty()) {
    checks.expect(array.size() == 3 && array[0] > 0 && array[1] > 0 && array[2] > 0,
                  "array must hold polarisations, rows and columns");
    checks.expect(M == N && array[0] <= M && array[1] <= M && array[2] <= M && array[0] * array[1] * array[2] == M,
                  "array must have as many antennas as H has rows and columns");
  }
  checks.scenes(scene, B, w[table].size(0));
  if (dtype == ScalarType::Float) return evaluate<float>(H, scene, w, array, rank, active, sweeps);
  return evaluate<double>(H, scene, w, array, rank, active, sweeps);
}

}  // namespace
}  // namespace lomacs

STABLE_TORCH_LIBRARY_IMPL(lomacs, CPU, m) {
  m.impl("refine_svd", TORCH_BOX(&lomacs::refine_svd));
  m.impl("approx_svd", TORCH_BOX(&lomacs::approx_svd));
  m.impl("frozen_angular_svd", TORCH_BOX(&lomacs::frozen_angular_svd));
}
