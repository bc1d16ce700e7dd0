// The problem of a refinement of an SVD and the tables that it reads, for its kernels and those of its gradient.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

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
inline std::int64_t macs_of(std::int64_t M, std::int64_t N, std::int64_t k, std::int64_t r, std::int64_t steps) {
  return (steps + 1) * (8 * M * N * k + 20 * (M + N) * k * k) + 24 * (M + N) * r * r;
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

// what forward and backward take alike; returns the number of columns
inline std::int64_t check_refinement(const Checks& checks, const Tensor& H, const Tensor& U,
                                     const std::optional<Tensor>& V, const Tensor& scalars, std::int64_t sweeps) {
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
  checks.expect(sweeps >= 1, "sweeps must be at least 1, got " + std::to_string(sweeps));
  return r;
}

}  // namespace
}  // namespace lomacs
