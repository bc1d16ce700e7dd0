// lomacs::dual_view_project on CPU and its gradients: tokens of both views, the coarse map never built.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "dual_view.h"
#include "simd.h"
#include "sums.h"
#include "tensors.h"

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
void backward(const Sizes& z, const Tensor& gX, const Tensor& Hd, const Tensor& weight, const T* more,
              Tensor& gHd, Tensor& gweight, Tensor& gbias, Tensor& gpos, bool gh, bool gw) {
  Projection<T> job(pointer<T>(weight), z.M, z.N, z.d);
  job.chunk = chunk_of(z.B);
  const std::int64_t chunks = (z.B + job.chunk - 1) / job.chunk, count = job.sums();
  std::vector<T> partial(static_cast<std::size_t>(gw ? chunks * count : 0));
  const T *g = pointer<T>(gX), *x = pointer<T>(Hd);
  T *to = output<T>(gHd, gh), *sums = gw ? partial.data() : nullptr;
  const Isa isa = choose_isa();
  torch::stable::parallel_for(
      0, chunks, share_of(job.chunk * z.M * z.N * z.d), [&](std::int64_t begin, std::int64_t end) {
        LOMACS_DISPATCH(isa, project_chunks_back(job, g, x, more, to, sums, z.B, begin, end));
      });
  if (!gw) return;

  const std::vector<double> total = sum_of_chunks(partial, count);
  const double *of_w2 = total.data() + z.d * 2 * z.N, *of_pos = of_w2 + z.d * job.narrow();
  T *w = output<T>(gweight), *b = output<T>(gbias), *p = output<T>(gpos);
  for (std::int64_t c = 0; c < z.d; ++c) {
    T* row = w + c * 4 * z.N;
    for (std::int64_t j = 0; j < 2 * z.N; ++j)
      row[j] = static_cast<T>(total[static_cast<std::size_t>(c * 2 * z.N + j)]);
    const double* folded = of_w2 + c * job.narrow();
    for (std::int64_t n = 0; n < z.N; ++n)
      for (std::int64_t part = 0; part < 2; ++part) {
        const std::size_t i = static_cast<std::size_t>(n);
        const double share = job.columns.share[i];
        const double low = folded[2 * job.columns.low[i] + part], high = folded[2 * job.columns.high[i] + part];
        row[2 * z.N + 2 * n + part] = static_cast<T>(0.25 * ((1 - share) * low + share * high));
      }
    double bias = 0;
    for (std::int64_t m = 0; m < z.M; ++m) bias += of_pos[m * z.d + c];
    b[c] = static_cast<T>(bias);
  }
  for (std::int64_t i = 0; i < z.M * z.d; ++i) p[i] = static_cast<T>(of_pos[i]);
}

Tensor dual_view_project(const Tensor& Hd, const Tensor& weight, const Tensor& bias, const Tensor& pos) {
  constexpr Checks checks{"dual_view_project"};
  const Sizes z = sizes_of(checks, Hd, weight);
  const ScalarType dtype = Hd.scalar_type();
  checks.tensor("bias", bias, dtype, {z.d});
  checks.tensor("pos", pos, dtype, {1, z.M, z.d});
  Tensor X = torch::stable::new_empty(Hd, {z.B, z.M, z.d});
  if (dtype == ScalarType::Float) forward<float>(z, Hd, weight, bias, pos, X);
  else forward<double>(z, Hd, weight, bias, pos, X);
  return X;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dual_view_project_backward(const Tensor& gX, const Tensor& Hd,
                                                                      const Tensor& weight, bool gh, bool gw,
                                                                      const std::optional<Tensor>& more) {
  constexpr Checks checks{"dual_view_project_backward"};
  const Sizes z = sizes_of(checks, Hd, weight);
  const ScalarType dtype = Hd.scalar_type();
  checks.tensor("gX", gX, dtype, {z.B, z.M, z.d});
  if (more) checks.tensor("more", *more, dtype, {z.B, z.M, z.N, 2});
  const auto make = [&](bool wanted, const std::vector<std::int64_t>& sizes) {
    return wanted ? torch::stable::new_empty(Hd, sizes) : torch::stable::new_empty(Hd, {0});
  };
  Tensor gHd = make(gh, {z.B, z.M, z.N, 2}), gweight = make(gw, {z.d, 4 * z.N});
  Tensor gbias = make(gw, {z.d}), gpos = make(gw, {1, z.M, z.d});
  const auto run = [&]<typename T>(T) {
    backward<T>(z, gX, Hd, weight, more ? pointer<T>(*more) : nullptr, gHd, gweight, gbias, gpos, gh, gw);
  };
  if (dtype == ScalarType::Float) run(float{});
  else run(double{});
  return {gHd, gweight, gbias, gpos};
}

}  // namespace
}  // namespace lomacs

STABLE_TORCH_LIBRARY_IMPL(lomacs, CPU, m) {
  m.impl("dual_view_project", TORCH_BOX(&lomacs::dual_view_project));
  m.impl("dual_view_project_backward", TORCH_BOX(&lomacs::dual_view_project_backward));
}
