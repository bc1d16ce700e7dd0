// lomacs::gated_conv1d on CPU: taps, gate and pointwise product of a sample in cache, forward and backward.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "simd.h"
#include "stages.h"
#include "tokens.h"

namespace lomacs {
namespace {

// Pointers to contiguous tensors; a gradient that is not wanted is null.
template <typename T>
struct GatedConv {
  const T *x, *gy, *dw_weight, *dw_bias, *pw_weight, *pw_bias, *norm_weight, *norm_bias;
  T *y, *gx;
  std::int64_t batch, tokens, d, taps;
  double eps;
  std::int64_t chunk;
  T* sums;

  std::int64_t chunks() const { return (batch + chunk - 1) / chunk; }
  std::int64_t size_of_sums() const { return d * vectors(d) + 16 * (2 * d * taps + 3 * d + 2 * d); }
};

// Sums over the samples of chunk n: the pointwise weight's gradient, transposed; of all else 16 parts a number.
template <typename T>
struct ConvSums {
  T *pw_weight = nullptr, *dw_weight = nullptr, *dw_bias = nullptr, *pw_bias = nullptr;
  T *weight = nullptr, *bias = nullptr;

  ConvSums(const GatedConv<T>& job, std::int64_t n) {
    if (job.sums == nullptr) return;
    pw_weight = job.sums + n * job.size_of_sums();
    dw_weight = pw_weight + job.d * vectors(job.d);
    dw_bias = dw_weight + 16 * 2 * job.d * job.taps;
    pw_bias = dw_bias + 16 * 2 * job.d;
    weight = pw_bias + 16 * job.d;
    bias = weight + 16 * job.d;
  }
};

}  // namespace
}  // namespace lomacs

#define LOMACS_KERNELS "gated_conv.inl"
#include "isa.inl"

namespace lomacs {
namespace {

template <typename T>
GatedConv<T> prepared(const Tensor& x, const Tensor (&w)[4], const std::optional<Tensor>& norm_weight,
                      const std::optional<Tensor>& norm_bias, double eps) {
  GatedConv<T> job{};
  job.x = pointer<T>(x);
  job.dw_weight = pointer<T>(w[0]), job.dw_bias = pointer<T>(w[1]);
  job.pw_weight = pointer<T>(w[2]), job.pw_bias = pointer<T>(w[3]);
  job.norm_weight = norm_weight ? pointer<T>(*norm_weight) : nullptr;
  job.norm_bias = norm_bias ? pointer<T>(*norm_bias) : nullptr;
  job.batch = x.size(0), job.tokens = x.size(1), job.d = x.size(2), job.taps = w[0].size(2), job.eps = eps;
  return job;
}

template <typename T>
Tensor forward(const Tensor& x, const Tensor (&w)[4], const std::optional<Tensor>& norm_weight,
               const std::optional<Tensor>& norm_bias, double eps) {
  Tensor y = fresh_like(x);
  GatedConv<T> job = prepared<T>(x, w, norm_weight, norm_bias, eps);
  if (job.batch == 0) return y;
  job.y = output<T>(y);
  const Isa isa = choose_isa();
  const std::int64_t work = job.tokens * job.d * (job.d + 2 * job.taps + 16);
  const std::int64_t grain = std::max<std::int64_t>(1, (1 << 18) / work);
  torch::stable::parallel_for(0, job.batch, grain, [&](std::int64_t begin, std::int64_t end) {
    LOMACS_DISPATCH(isa, conv_forward(job, begin, end));
  });
  return y;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T>
Gradients backward(const Tensor& gy, const Tensor& x, const Tensor (&w)[4], const std::optional<Tensor>& norm_weight,
                   const std::optional<Tensor>& norm_bias, double eps, bool gx, bool gw) {
  const auto like = [&](const Tensor& t, bool wanted) {
    return wanted ? fresh_like(t) : fresh(x, {0});
  };
  Tensor to_x = like(x, gx), to_dw = like(w[0], gw), to_dw_bias = like(w[1], gw);
  Tensor to_pw = like(w[2], gw), to_pw_bias = like(w[3], gw);
  Tensor to_norm_weight = like(norm_weight ? *norm_weight : x, gw && norm_weight);
  Tensor to_norm_bias = like(norm_bias ? *norm_bias : x, gw && norm_bias);
  GatedConv<T> job = prepared<T>(x, w, norm_weight, norm_bias, eps);
  job.gy = pointer<T>(gy);
  job.gx = output<T>(to_x, gx);
  job.chunk = tokens_chunk(job.batch);
  const std::int64_t size = job.size_of_sums(), chunks = job.chunks(), d = job.d;
  const Memory<T> sums(gw ? chunks * size : 0);
  job.sums = gw ? sums.p : nullptr;
  const Isa isa = choose_isa();
  if (job.batch > 0 && (gx || gw))
    torch::stable::parallel_for(0, chunks, 1, [&](std::int64_t begin, std::int64_t end) {
      LOMACS_DISPATCH(isa, conv_backward(job, begin, end));
    });
  if (gw) {
    const ConvSums<T> first(job, 0);
    T* to = output<T>(to_pw);
    torch::stable::parallel_for(0, d, 16, [&](std::int64_t begin, std::int64_t end) {
      std::vector<T> row(static_cast<std::size_t>(d));
      for (std::int64_t i = begin; i < end; ++i) {
        sum_of_chunks(first.pw_weight + i * vectors(d), size, chunks, d, 1, row.data());
        for (std::int64_t j = 0; j < d; ++j) to[j * d + i] = row[static_cast<std::size_t>(j)];
      }
    });
    sum_of_lanes(first.dw_weight, size, chunks, 2 * d * job.taps, output<T>(to_dw));
    sum_of_lanes(first.dw_bias, size, chunks, 2 * d, output<T>(to_dw_bias));
    sum_of_lanes(first.pw_bias, size, chunks, d, output<T>(to_pw_bias));
    if (norm_weight) sum_of_lanes(first.weight, size, chunks, d, output<T>(to_norm_weight));
    if (norm_bias) sum_of_lanes(first.bias, size, chunks, d, output<T>(to_norm_bias));
  }
  return {to_x, to_dw, to_dw_bias, to_pw, to_pw_bias, to_norm_weight, to_norm_bias};
}

void check(const RealChecks& checks, const Tensor& x, const Tensor (&w)[4], const std::optional<Tensor>& norm_weight,
           const std::optional<Tensor>& norm_bias, double eps) {
  checks.checks.expect(x.dim() == 3, "x must have shape (B, T, d)");
  const std::int64_t tokens = x.size(1), d = x.size(2);
  checks.checks.expect(w[0].dim() == 3, "dw_weight must have shape (2 d, 1, k)");
  const std::int64_t taps = w[0].size(2);
  checks.filled({tokens, d, taps});
  checks.checks.expect(taps % 2 == 1, "dw_weight must have an odd number of taps");
  checks.tensor("x", x, {x.size(0), tokens, d});
  checks.tensor("dw_weight", w[0], {2 * d, 1, taps}), checks.tensor("dw_bias", w[1], {2 * d});
  checks.tensor("pw_weight", w[2], {d, d, 1}), checks.tensor("pw_bias", w[3], {d});
  checks.norm(d, norm_weight, norm_bias, eps);
}

Tensor gated_conv1d(const Tensor& x, const Tensor& dw_weight, const Tensor& dw_bias, const Tensor& pw_weight,
                    const Tensor& pw_bias, const std::optional<Tensor>& norm_weight,
                    const std::optional<Tensor>& norm_bias, double eps) {
  const Tensor w[4] = {dw_weight, dw_bias, pw_weight, pw_bias};
  const RealChecks checks("gated_conv1d", x);
  check(checks, x, w, norm_weight, norm_bias, eps);
  if (checks.dtype == ScalarType::Double) return forward<double>(x, w, norm_weight, norm_bias, eps);
  const Tensor single[4] = {widened(w[0]), widened(w[1]), widened(w[2]), widened(w[3])};
  return narrowed(forward<float>(widened(x), single, widened(norm_weight), widened(norm_bias), eps), checks.dtype);
}

Gradients gated_conv1d_backward(const Tensor& gy, const Tensor& x, const Tensor& dw_weight, const Tensor& dw_bias,
                                const Tensor& pw_weight, const Tensor& pw_bias,
                                const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias,
                                double eps, bool gx, bool gw) {
  const Tensor w[4] = {dw_weight, dw_bias, pw_weight, pw_bias};
  const RealChecks checks("gated_conv1d_backward", x);
  check(checks, x, w, norm_weight, norm_bias, eps);
  checks.tensor("gy", gy, {x.size(0), x.size(1), x.size(2)});
  if (checks.dtype == ScalarType::Double) return backward<double>(gy, x, w, norm_weight, norm_bias, eps, gx, gw);
  const Tensor single[4] = {widened(w[0]), widened(w[1]), widened(w[2]), widened(w[3])};
  Gradients found =
      backward<float>(widened(gy), widened(x), single, widened(norm_weight), widened(norm_bias), eps, gx, gw);
  std::apply([&](auto&... t) { ((t = narrowed(t, checks.dtype)), ...); }, found);
  return found;
}

}  // namespace
}  // namespace lomacs

namespace lomacs {

template <typename T>
BlockStage<T> stages::conv(const ConvWeights<T>& w) {
  GatedConv<T> job{};
  job.norm_weight = w.norm_weight, job.norm_bias = w.norm_bias, job.eps = w.eps;
  job.dw_weight = w.dw_weight, job.dw_bias = w.dw_bias;
  job.pw_weight = w.pw_weight, job.pw_bias = w.pw_bias;
  job.tokens = w.tokens, job.d = w.d, job.taps = w.taps;
  const Isa isa = choose_isa();
  return {1, [job, isa](const T* x, std::int64_t begin, std::int64_t end, T* y) {
            GatedConv<T> own = job;
            own.x = x, own.y = y;
            LOMACS_DISPATCH(isa, conv_forward(own, begin, end));
          }};
}

template BlockStage<float> stages::conv(const ConvWeights<float>&);
template BlockStage<double> stages::conv(const ConvWeights<double>&);

}  // namespace lomacs

STABLE_TORCH_LIBRARY_IMPL(lomacs, CPU, m) {
  m.impl("gated_conv1d", TORCH_BOX(&lomacs::gated_conv1d));
  m.impl("gated_conv1d_backward", TORCH_BOX(&lomacs::gated_conv1d_backward));
}
