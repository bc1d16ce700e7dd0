// lomacs::refine_svd, lomacs::approx_svd and lomacs::frozen_angular_svd on CPU: an SVD refined by matrix products, a
// sample in one visit.
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

template <typename T, typename Job>
void run(const Job& job, const RefineSvd<T>& x) {
  const Isa isa = choose_isa();
  const std::int64_t grain = std::max<std::int64_t>(1, (1 << 20) / macs_of(x.M, x.N, x.k, x.r, x.steps));
  torch::stable::parallel_for(0, x.batch, grain, [&](std::int64_t begin, std::int64_t end) {
    LOMACS_DISPATCH(isa, samples(job, begin, end));
  });
}

template <typename T>
void tables_of(RefineSvd<T>& job) {
  const std::int64_t sizes[] = {job.M, job.N};
  for (int side = 0; side < 2; ++side) {
    const std::vector<T>& found = tables<T>(sizes[side]);
    job.roots[side] = found.data();
    job.chirps[side] = found.data() + 2 * sizes[side];
  }
}

using Found = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <typename T>
Found refine(const Tensor& H, const Tensor& U, const std::optional<Tensor>& V, const Tensor& scalars,
             std::int64_t active, std::int64_t sweeps, bool orthonormal) {
  const std::int64_t B = H.size(0), M = H.size(1), N = H.size(2), r = U.size(2);
  Tensor outU = torch::stable::new_empty(H, {B, M, r, 2}), outV = torch::stable::new_empty(H, {B, N, r, 2});
  Tensor outS = torch::stable::new_empty(H, {B, r});
  Tensor order = torch::stable::new_empty(H, {B, active}, ScalarType::Long);
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
  Tensor outU = torch::stable::new_empty(H, {B, M, rank, 2}), outV = torch::stable::new_empty(H, {B, N, rank, 2});
  Tensor outS = torch::stable::new_empty(H, {B, rank}), order = torch::stable::new_empty(H, {B, active}, ScalarType::Long);
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
  const ScalarType dtype = H.scalar_type();
  checks.real("H", dtype);
  checks.expect(H.dim() == 4, "H must have shape (B, M, N, 2)");
  const std::int64_t B = H.size(0), M = H.size(1), N = H.size(2);
  checks.expect(M > 0 && N > 0, "no dimension but the batch may be empty");
  checks.tensor("H", H, dtype, {B, M, N, 2});
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
