// lomacs::aeplus on CPU: the AE+ loss, its five terms and its gradients in one visit of every sample.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <new>
#include <tuple>
#include <vector>

#include "simd.h"

namespace lomacs {
namespace {

// Pointers to contiguous batches; a gradient that is not wanted is null.
template <typename T>
struct AEPlus {
  const T *U, *S, *V, *H;
  T *gU, *gS, *gV, *gH;
  double* terms;
  std::int64_t M, N, r;
  double lam, w_energy, w_diag, w_match, inv_batch;
  bool mean;
};

constexpr std::align_val_t cache_line{64};

template <typename T>
T* allocate(std::int64_t n) {
  return static_cast<T*>(::operator new(sizeof(T) * static_cast<std::size_t>(n), cache_line));
}

inline void release(void* p) { ::operator delete(p, cache_line); }

}  // namespace
}  // namespace lomacs

#define LOMACS_KERNELS "aeplus.inl"
#include "isa.inl"

namespace lomacs {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void expect(bool ok, const std::string& message) {
  if (!ok) throw std::runtime_error("lomacs::aeplus: " + message);
}

std::string shape_of(const std::vector<std::int64_t>& sizes) {
  std::string text = "(";
  for (std::size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + ")";
}

void check(const char* name, const Tensor& x, ScalarType dtype, const std::vector<std::int64_t>& sizes) {
  const auto given = x.sizes();
  const std::vector<std::int64_t> got(given.begin(), given.end());
  expect(got == sizes, std::string(name) + " must have shape " + shape_of(sizes) + ", got " + shape_of(got));
  expect(x.scalar_type() == dtype, std::string(name) + " must be " +
                                       (dtype == ScalarType::Float ? "float32" : "float64") +
                                       " to go with the other arguments");
  expect(x.is_cpu(), std::string(name) + " must be on the CPU");
  expect(x.is_contiguous(), std::string(name) + " must be contiguous");
}

template <typename T>
void run(const AEPlus<T>& job, std::int64_t B) {
  const Isa isa = choose_isa();
  // a share of less than about 20 us is not worth a thread
  const std::int64_t grain = std::max<std::int64_t>(1, (1 << 17) / (job.M * job.N * job.r));
  torch::stable::parallel_for(0, B, grain, [&](std::int64_t begin, std::int64_t end) {
#if defined(__x86_64__)
    if (isa == Isa::avx512) return avx512::aeplus_samples(job, begin, end);
    if (isa == Isa::avx2) return avx2::aeplus_samples(job, begin, end);
#endif
    portable::aeplus_samples(job, begin, end);
  });
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> evaluate(const Tensor& U, const Tensor& S,
                                                                    const Tensor& V, const Tensor& H,
                                                                    const double* w, bool mean, bool gu,
                                                                    bool gs, bool gv, bool gh) {
  const std::int64_t B = S.size(0);
  const auto like = [&](const Tensor& x, bool wanted) {
    return wanted ? torch::stable::new_empty(S, x.sizes()) : torch::stable::new_empty(S, {0});
  };
  Tensor gU = like(U, gu), gS = like(S, gs), gV = like(V, gv), gH = like(H, gh);
  Tensor loss = torch::stable::new_empty(S, {}), terms = torch::stable::new_empty(S, {5});
  const auto in = [](const Tensor& x) { return static_cast<const T*>(x.const_data_ptr()); };
  const auto out = [](const Tensor& x, bool wanted) {
    return wanted ? static_cast<T*>(x.mutable_data_ptr()) : nullptr;
  };
  std::vector<double> samples(static_cast<std::size_t>(5 * B));
  AEPlus<T> job{};
  job.U = in(U), job.S = in(S), job.V = in(V), job.H = in(H);
  job.gU = out(gU, gu), job.gS = out(gS, gs), job.gV = out(gV, gv), job.gH = out(gH, gh);
  job.terms = samples.data();
  job.M = U.size(1), job.N = V.size(1), job.r = S.size(1);
  job.lam = w[0], job.w_energy = w[1], job.w_diag = w[2], job.w_match = w[3];
  job.inv_batch = 1 / static_cast<double>(B);
  job.mean = mean;
  if (B > 0) run(job, B);

  // in the order of the samples, whatever thread had them; an empty batch gives 0 / 0
  double means[5] = {};
  for (std::int64_t b = 0; b < B; ++b)
    for (int i = 0; i < 5; ++i) means[i] += samples[static_cast<std::size_t>(5 * b + i)];
  for (double& mean_of : means) mean_of /= static_cast<double>(B);
  T* t = out(terms, true);
  for (int i = 0; i < 5; ++i) t[i] = static_cast<T>(means[i]);
  *out(loss, true) =
      static_cast<T>(means[0] + w[0] * means[1] + w[1] * means[2] + w[2] * means[3] + w[3] * means[4]);
  return {loss, terms, gU, gS, gV, gH};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> aeplus(const Tensor& U, const Tensor& S,
                                                                  const Tensor& V, const Tensor& H,
                                                                  const Tensor& weights, bool mean, bool gu,
                                                                  bool gs, bool gv, bool gh) {
  const ScalarType dtype = S.scalar_type();
  expect(dtype == ScalarType::Float || dtype == ScalarType::Double, "S must be float32 or float64");
  expect(S.dim() == 2, "S must have shape (B, r)");
  expect(H.dim() == 4, "H must have shape (B, M, N, 2)");
  const std::int64_t B = S.size(0), r = S.size(1), M = H.size(1), N = H.size(2);
  expect(M > 0 && N > 0 && r > 0, "no dimension but the batch may be empty");
  check("U", U, dtype, {B, M, r, 2});
  check("S", S, dtype, {B, r});
  check("V", V, dtype, {B, N, r, 2});
  check("H", H, dtype, {B, M, N, 2});
  check("weights", weights, ScalarType::Double, {4});
  const double* w = static_cast<const double*>(weights.const_data_ptr());
  if (dtype == ScalarType::Float) return evaluate<float>(U, S, V, H, w, mean, gu, gs, gv, gh);
  return evaluate<double>(U, S, V, H, w, mean, gu, gs, gv, gh);
}

}  // namespace
}  // namespace lomacs

STABLE_TORCH_LIBRARY_IMPL(lomacs, CPU, m) { m.impl("aeplus", TORCH_BOX(&lomacs::aeplus)); }
