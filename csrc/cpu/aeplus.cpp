// lomacs::aeplus on CPU: the AE+ loss, its five terms and its gradients in one visit of every sample.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

#include "simd.h"
#include "tensors.h"

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

}  // namespace
}  // namespace lomacs

#define LOMACS_KERNELS "aeplus.inl"
#include "isa.inl"

namespace lomacs {
namespace {

constexpr Checks checks{"aeplus"};

template <typename T>
void run(const AEPlus<T>& job, std::int64_t B) {
  const Isa isa = choose_isa();
  // a share of less than about 20 us is not worth a thread
  const std::int64_t grain = std::max<std::int64_t>(1, (1 << 17) / (job.M * job.N * job.r));
  torch::stable::parallel_for(0, B, grain, [&](std::int64_t begin, std::int64_t end) {
    LOMACS_DISPATCH(isa, aeplus_samples(job, begin, end));
  });
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> evaluate(const Tensor& U, const Tensor& S,
                                                                    const Tensor& V, const Tensor& H,
                                                                    const double* w, bool mean, bool gu,
                                                                    bool gs, bool gv, bool gh) {
  const std::int64_t B = S.size(0);
  const auto like = [&](const Tensor& x, bool wanted) {
    return wanted ? fresh_like(x) : fresh(S, {0});
  };
  Tensor gU = like(U, gu), gS = like(S, gs), gV = like(V, gv), gH = like(H, gh);
  Tensor loss = fresh(S, {}), terms = fresh(S, {5});
  std::vector<double> samples(static_cast<std::size_t>(5 * B));
  AEPlus<T> job{};
  job.U = pointer<T>(U), job.S = pointer<T>(S), job.V = pointer<T>(V), job.H = pointer<T>(H);
  job.gU = output<T>(gU, gu), job.gS = output<T>(gS, gs);
  job.gV = output<T>(gV, gv), job.gH = output<T>(gH, gh);
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
  T* t = output<T>(terms);
  for (int i = 0; i < 5; ++i) t[i] = static_cast<T>(means[i]);
  *output<T>(loss) =
      static_cast<T>(means[0] + w[0] * means[1] + w[1] * means[2] + w[2] * means[3] + w[3] * means[4]);
  return {loss, terms, gU, gS, gV, gH};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> aeplus(const Tensor& U, const Tensor& S,
                                                                  const Tensor& V, const Tensor& H,
                                                                  const Tensor& weights, bool mean, bool gu,
                                                                  bool gs, bool gv, bool gh) {
  const ScalarType dtype = S.scalar_type();
  checks.real("S", dtype);
  checks.expect(S.dim() == 2, "S must have shape (B, r)");
  checks.expect(H.dim() == 4, "H must have shape (B, M, N, 2)");
  const std::int64_t B = S.size(0), r = S.size(1), M = H.size(1), N = H.size(2);
  checks.expect(M > 0 && N > 0 && r > 0, "no dimension but the batch may be empty");
  checks.tensor("U", U, dtype, {B, M, r, 2});
  checks.tensor("S", S, dtype, {B, r});
  checks.tensor("V", V, dtype, {B, N, r, 2});
  checks.tensor("H", H, dtype, {B, M, N, 2});
  checks.tensor("weights", weights, ScalarType::Double, {4});
  const double* w = static_cast<const double*>(weights.const_data_ptr());
  if (dtype == ScalarType::Float) return evaluate<float>(U, S, V, H, w, mean, gu, gs, gv, gh);
  return evaluate<double>(U, S, V, H, w, mean, gu, gs, gv, gh);
}

}  // namespace
}  // namespace lomacs

STABLE_TORCH_LIBRARY_IMPL(lomacs, CPU, m) { m.impl("aeplus", TORCH_BOX(&lomacs::aeplus)); }
