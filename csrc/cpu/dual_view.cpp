// lomacs::dual_view_project on CPU and its gradients: tokens of both views, the coarse map never built.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "dual_view.h"
#include "simd.h"
#include "tensors.h"
#include "tokens.h"

#define LOMACS_KERNELS "dual_view.inl"
#include "isa.inl"

namespace lomacs {
namespace {

struct Sizes {
  std::int64_t B, M, N, d;
};

Sizes sizes_of(const Checks& checks, const Tensor& Hd, const Tensor& weight) {
  checks.expect(Hd.dim() == 4, "Hd must have shape (B, M, N, 2)");
  checks.expect(weight.dim() == 2, "weight must have shape (d, 4N)");
  const Sizes s{Hd.size(0), Hd.size(1), Hd.size(2), weight.size(0)};
  checks.expect(s.M > 1 && s.N > 1 && s.d > 0, "M and N must be at least 2, d at least 1");
  checks.real("Hd", Hd.scalar_type());
  checks.tensor("Hd", Hd, Hd.scalar_type(), {s.B, s.M, s.N, 2});
  checks.tensor("weight", weight, Hd.scalar_type(), {s.d, 4 * s.N});
  return s;
}

template <typename T>
void forward(const Sizes& z, const Tensor& Hd, const Tensor& weight, const Tensor& bias, const Tensor& pos,
             Tensor& X) {
  Projection<T> job(pointer<T>(weight), z.M, z.N, z.d);
  job.forward(pointer<T>(bias), pointer<T>(pos));
  const T* from = pointer<T>(Hd);
  T* to = output<T>(X);
  const Isa isa = choose_isa();
  torch::stable::parallel_for(0, z.B, share_of(z.M * z.N * z.d), [&](std::int64_t begin, std::int64_t end) {
    LOMACS_DISPATCH(isa, project_samples(job, from, to, begin, end));
  });
}

template <typename T>
void backward(const Sizes& z, const Tensor& gX, const Tensor& Hd, const Tensor& weight, Tensor& gHd, Tensor& gweight,
              Tensor& gbias, Tensor& gpos, bool gh, bool gw) {
  Projection<T> job(pointer<T>(weight), z.M, z.N, z.d);
  job.chunk = chunk_of_weights(z.B);
  const std::int64_t chunks = (z.B + job.chunk - 1) / job.chunk;
  const Memory<T> partial(gw ? chunks * job.sums() : 0);
  const T *g = pointer<T>(gX), *x = pointer<T>(Hd);
  T *to = output<T>(gHd, gh), *sums = gw ? partial.p : nullptr;
  const Isa isa = choose_isa();
  torch::stable::parallel_for(
      0, chunks, share_of(job.chunk * z.M * z.N * z.d), [&](std::int64_t begin, std::int64_t end) {
        LOMACS_DISPATCH(isa, project_chunks_back(job, g, x, to, sums, z.B, begin, end));
      });
  if (!gw) return;
  projection_gradients(job, sums, chunks, output<T>(gweight), output<T>(gbias), output<T>(gpos));
}

Tensor dual_view_project(const Tensor& Hd, const Tensor& weight, const Tensor& bias, const Tensor& pos) {
  constexpr Checks checks{"dual_view_project"};
  const Sizes z = sizes_of(checks, Hd, weight);
  const ScalarType dtype = Hd.scalar_type();
  checks.tensor("bias", bias, dtype, {z.d});
  checks.tensor("pos", pos, dtype, {1, z.M, z.d});
  Tensor X = fresh(Hd, {z.B, z.M, z.d});
  if (dtype == ScalarType::Float) forward<float>(z, Hd, weight, bias, pos, X);
  else forward<double>(z, Hd, weight, bias, pos, X);
  return X;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dual_view_project_backward(const Tensor& gX, const Tensor& Hd,
                                                                      const Tensor& weight, bool gh, bool gw) {
  constexpr Checks checks{"dual_view_project_backward"};
  const Sizes z = sizes_of(checks, Hd, weight);
  const ScalarType dtype = Hd.scalar_type();
  checks.tensor("gX", gX, dtype, {z.B, z.M, z.d});
  const auto make = [&](bool wanted, const std::vector<std::int64_t>& sizes) {
    return wanted ? fresh(Hd, sizes) : fresh(Hd, {0});
  };
  Tensor gHd = make(gh, {z.B, z.M, z.N, 2}), gweight = make(gw, {z.d, 4 * z.N});
  Tensor gbias = make(gw, {z.d}), gpos = make(gw, {1, z.M, z.d});
  if (dtype == ScalarType::Float) backward<float>(z, gX, Hd, weight, gHd, gweight, gbias, gpos, gh, gw);
  else backward<double>(z, gX, Hd, weight, gHd, gweight, gbias, gpos, gh, gw);
  return {gHd, gweight, gbias, gpos};
}

}  // namespace
}  // namespace lomacs

STABLE_TORCH_LIBRARY_IMPL(lomacs, CPU, m) {
  m.impl("dual_view_project", TORCH_BOX(&lomacs::dual_view_project));
  m.impl("dual_view_project_backward", TORCH_BOX(&lomacs::dual_view_project_backward));
}
