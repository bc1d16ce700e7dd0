// lomacs::projected_attention on CPU: a sample's tokens stay in cache, forward and backward.
// With X the g columns of a group: reduced tokens P^T X first; the weights meet as Wq^T Wk and Wo Wv, g x g.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <tuple>
#include <vector>

#include "simd.h"
#include "stages.h"
#include "tokens.h"

namespace lomacs {
namespace {

// Pointers to contiguous tensors, weights one a group; a gradient that is not wanted is null.
template <typename T>
struct Attention {
  const T *x, *gy, *norm_weight, *norm_bias;
  std::vector<const T*> wq, wk, wv, wo, pk, pv;
  T *y, *gx;
  std::int64_t batch, tokens, d, groups, g, a, k;
  double eps;
  // made by attention_fold: Wq^T Wk log2(e) / sqrt(a), Wo Wv; for a gradient of x also P_k^T and P_v^T
  T *M, *N, *Pk, *Pv;
  // N is transposed, for the forward alone
  bool across;
  std::int64_t chunk;
  T* sums;

  std::int64_t chunks() const { return (batch + chunk - 1) / chunk; }
  std::int64_t size_of_sums() const {
    return groups * (2 * k * vectors(tokens) + vectors(2 * g * g)) + (norm_weight == nullptr ? 0 : 32 * d);
  }
};

// Sums over the samples of chunk n: gradients of P_k^T, P_v^T, of the folded weights, transposed, and of the
// norm, 16 parts a channel.
template <typename T>
struct AttentionSums {
  T *Pk = nullptr, *Pv = nullptr, *M = nullptr, *N = nullptr, *weight = nullptr, *bias = nullptr;

  AttentionSums(const Attention<T>& job, std::int64_t n) {
    if (job.sums == nullptr) return;
    const std::int64_t plane = job.groups * job.k * vectors(job.tokens), square = job.groups * job.g * job.g;
    Pk = job.sums + n * job.size_of_sums();
    Pv = Pk + plane;
    if (job.norm_weight != nullptr) {
      weight = Pv + plane;
      bias = weight + 16 * job.d;
    }
    M = Pv + plane + (job.norm_weight == nullptr ? 0 : 32 * job.d);
    N = M + square;
  }
};

// one pointer a group
template <typename T>
struct AttentionGradients {
  std::vector<T*> wq, wk, wv, wo, pk, pv;
};

}  // namespace
}  // namespace lomacs

#define LOMACS_KERNELS "projected_attention.inl"
#include "isa.inl"

namespace lomacs {
namespace {

using Weights = std::vector<Tensor>;

template <typename T>
std::vector<const T*> pointers(const Tensor& stacked) {
  const std::int64_t groups = stacked.size(0), size = stacked.size(1) * stacked.size(2);
  std::vector<const T*> found(static_cast<std::size_t>(groups));
  for (std::int64_t i = 0; i < groups; ++i) found[static_cast<std::size_t>(i)] = pointer<T>(stacked) + i * size;
  return found;
}

template <typename T>
std::vector<const T*> pointers(const Weights& weights) {
  std::vector<const T*> found;
  for (const Tensor& w : weights) found.push_back(pointer<T>(w));
  return found;
}

// multiply-adds of one group of one sample, forward
template <typename T>
std::int64_t work(const Attention<T>& job) {
  return job.k * job.g * (4 * job.tokens + 2 * job.g);
}

template <typename T, typename W>
Attention<T> prepared(const Tensor& x, const W (&w)[6], const std::optional<Tensor>& norm_weight,
                      const std::optional<Tensor>& norm_bias, double eps, std::int64_t a, std::int64_t k) {
  Attention<T> job{};
  job.x = pointer<T>(x);
  job.norm_weight = norm_weight ? pointer<T>(*norm_weight) : nullptr;
  job.norm_bias = norm_bias ? pointer<T>(*norm_bias) : nullptr;
  job.wq = pointers<T>(w[0]), job.wk = pointers<T>(w[1]), job.wv = pointers<T>(w[2]);
  job.wo = pointers<T>(w[3]), job.pk = pointers<T>(w[4]), job.pv = pointers<T>(w[5]);
  job.batch = x.size(0), job.tokens = x.size(1), job.d = x.size(2);
  job.groups = static_cast<std::int64_t>(job.wq.size());
  job.g = job.d / job.groups, job.a = a, job.k = k, job.eps = eps;
  return job;
}

template <typename T, typename W>
Tensor forward(const Tensor& x, const W (&w)[6], const std::optional<Tensor>& norm_weight,
               const std::optional<Tensor>& norm_bias, double eps, std::int64_t a, std::int64_t k) {
  Tensor y = fresh_like(x);
  Attention<T> job = prepared<T>(x, w, norm_weight, norm_bias, eps, a, k);
  if (job.batch == 0) return y;
  job.y = output<T>(y);
  const std::int64_t squares = job.groups * job.g * job.g;
  const Memory<T> folded(2 * squares);
  job.M = folded.p, job.N = folded.p + squares;
  const Isa isa = choose_isa();
  LOMACS_DISPATCH(isa, attention_fold(job));
  // a share of less than some microseconds is not worth a thread
  const std::int64_t grain = std::max<std::int64_t>(1, (1 << 18) / work(job));
  torch::stable::parallel_for(0, job.batch * job.groups, grain, [&](std::int64_t begin, std::int64_t end) {
    LOMACS_DISPATCH(isa, attention_forward(job, begin, end));
  });
  return y;
}

using Gradients =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Tensor gradient_of(const Tensor& t, const Tensor& x, bool wanted) {
  return wanted ? fresh_like(t) : fresh(x, {0});
}

// in the places of the weights: a stack, or one tensor a group
Tensor gradients_of(const Tensor& w, const Tensor& x, bool wanted) { return gradient_of(w, x, wanted); }

Weights gradients_of(const Weights& w, const Tensor& x, bool wanted) {
  Weights found;
  for (const Tensor& t : w) found.push_back(gradient_of(t, x, wanted));
  return found;
}

template <typename T>
std::vector<T*> outputs(const Tensor& stacked) {
  const std::int64_t groups = stacked.size(0), size = stacked.size(1) * stacked.size(2);
  std::vector<T*> found(static_cast<std::size_t>(groups));
  for (std::int64_t i = 0; i < groups; ++i) found[static_cast<std::size_t>(i)] = output<T>(stacked) + i * size;
  return found;
}

template <typename T>
std::vector<T*> outputs(const Weights& weights) {
  std::vector<T*> found;
  for (const Tensor& w : weights) found.push_back(output<T>(w));
  return found;
}

// gradients of x, of norm weight and bias, and of the weights in their order
template <typename W>
struct Found {
  Tensor x, norm_weight, norm_bias;
  W w[6];
};

template <typename T, typename W>
Found<W> backward(const Tensor& gy, const Tensor& x, const W (&w)[6], const std::optional<Tensor>& norm_weight,
                  const std::optional<Tensor>& norm_bias, double eps, std::int64_t a, std::int64_t k, bool gx,
                  bool gw) {
  const Tensor to_x = gradient_of(x, x, gx);
  const Tensor to_norm_weight = gradient_of(norm_weight ? *norm_weight : x, x, gw && norm_weight);
  const Tensor to_norm_bias = gradient_of(norm_bias ? *norm_bias : x, x, gw && norm_bias);
  Found<W> found{to_x, to_norm_weight, to_norm_bias,
                 {gradients_of(w[0], x, gw), gradients_of(w[1], x, gw), gradients_of(w[2], x, gw),
                  gradients_of(w[3], x, gw), gradients_of(w[4], x, gw), gradients_of(w[5], x, gw)}};
  Attention<T> job = prepared<T>(x, w, norm_weight, norm_bias, eps, a, k);
  job.gy = pointer<T>(gy);
  job.gx = output<T>(to_x, gx);
  const bool norm = norm_weight.has_value();
  const std::int64_t squares = job.groups * job.g * job.g, plane = job.groups * job.k * vectors(job.tokens);
  job.chunk = tokens_chunk(job.batch);
  const Memory<T> folded(2 * squares), projections(2 * plane), sums(gw ? job.chunks() * job.size_of_sums() : 0);
  job.M = folded.p, job.N = folded.p + squares;
  job.Pk = projections.p, job.Pv = projections.p + plane;
  job.sums = gw ? sums.p : nullptr;
  const Isa isa = choose_isa();
  if (job.batch > 0 && (gx || gw)) {
    LOMACS_DISPATCH(isa, attention_fold(job));
    torch::stable::parallel_for(0, job.chunks(), 1, [&](std::int64_t begin, std::int64_t end) {
      LOMACS_DISPATCH(isa, attention_backward(job, begin, end));
    });
  }
  if (gw) {
    const AttentionGradients<T> to{outputs<T>(found.w[0]), outputs<T>(found.w[1]), outputs<T>(found.w[2]),
                                   outputs<T>(found.w[3]), outputs<T>(found.w[4]), outputs<T>(found.w[5])};
    torch::stable::parallel_for(0, job.groups, 1, [&](std::int64_t begin, std::int64_t end) {
      LOMACS_DISPATCH(isa, attention_weights(job, to, begin, end));
    });
    const AttentionSums<T> first(job, 0);
    if (norm) sum_of_lanes(first.weight, job.size_of_sums(), job.chunks(), job.d, output<T>(to_norm_weight));
    if (norm_bias) sum_of_lanes(first.bias, job.size_of_sums(), job.chunks(), job.d, output<T>(to_norm_bias));
  }
  return found;
}

struct AttentionChecks : RealChecks {
  std::int64_t groups, d, tokens, a, k;

  AttentionChecks(const char* op, const Tensor& x, std::int64_t groups_of, const Tensor& wq, const Tensor& pk)
      : RealChecks(op, x), groups(groups_of) {
    checks.expect(x.dim() == 3, "x must have shape (B, T, d)");
    checks.expect(wq.dim() >= 2 && pk.dim() >= 2, "wq must be (G, a, g) and pk (G, T, k)");
    tokens = x.size(1), d = x.size(2), a = wq.size(wq.dim() - 2), k = pk.size(pk.dim() - 1);
    filled({tokens, d, a, k});
    checks.expect(groups > 0 && d % groups == 0, "the number of groups must divide the width of x");
    tensor("x", x, {x.size(0), tokens, d});
  }

  void stacked(const Tensor (&w)[6]) const {
    const std::int64_t g = d / groups;
    tensor("wq", w[0], {groups, a, g}), tensor("wk", w[1], {groups, a, g});
    tensor("wv", w[2], {groups, g, g}), tensor("wo", w[3], {groups, g, g});
    tensor("pk", w[4], {groups, tokens, k}), tensor("pv", w[5], {groups, tokens, k});
  }

  void listed(const Weights (&w)[6]) const {
    const std::int64_t g = d / groups;
    const char* names[] = {"wq", "wk", "wv", "wo", "pk", "pv"};
    const std::int64_t rows[] = {a, a, g, g, tokens, tokens}, columns[] = {g, g, g, g, k, k};
    for (int n = 0; n < 6; ++n) {
      checks.expect(static_cast<std::int64_t>(w[n].size()) == groups,
                    "every weight must hold one tensor a group");
      for (const Tensor& t : w[n]) tensor(names[n], t, {rows[n], columns[n]});
    }
  }
};

Tensor projected_attention(const Tensor& x, const Tensor& wq, const Tensor& wk, const Tensor& wv, const Tensor& wo,
                           const Tensor& pk, const Tensor& pv, const std::optional<Tensor>& norm_weight,
                           const std::optional<Tensor>& norm_bias, double eps) {
  const Tensor w[6] = {wq, wk, wv, wo, pk, pv};
  const AttentionChecks checks("projected_attention", x, wq.dim() ? wq.size(0) : 0, wq, pk);
  checks.stacked(w);
  checks.norm(checks.d, norm_weight, norm_bias, eps);
  if (checks.dtype == ScalarType::Double) return forward<double>(x, w, norm_weight, norm_bias, eps, checks.a, checks.k);
  const Tensor single[6] = {widened(wq), widened(wk), widened(wv),
                            widened(wo), widened(pk), widened(pv)};
  return narrowed(forward<float>(widened(x), single, widened(norm_weight), widened(norm_bias), eps, checks.a,
                                 checks.k),
                  checks.dtype);
}

Tensor projected_attention_groups(const Tensor& x, Weights wq, Weights wk, Weights wv, Weights wo, Weights pk,
                                  Weights pv, const std::optional<Tensor>& norm_weight,
                                  const std::optional<Tensor>& norm_bias, double eps) {
  const Checks named{"projected_attention_groups"};
  named.expect(!wq.empty() && !pk.empty(), "wq and pk must hold one tensor a group");
  const AttentionChecks checks(named.op, x, static_cast<std::int64_t>(wq.size()), wq[0], pk[0]);
  Weights w[6] = {std::move(wq), std::move(wk), std::move(wv), std::move(wo), std::move(pk), std::move(pv)};
  checks.listed(w);
  checks.norm(checks.d, norm_weight, norm_bias, eps);
  if (checks.dtype == ScalarType::Double) return forward<double>(x, w, norm_weight, norm_bias, eps, checks.a, checks.k);
  if (is_half(checks.dtype))
    for (Weights& one : w)
      for (Tensor& t : one) t = widened(t);
  return narrowed(forward<float>(widened(x), w, widened(norm_weight), widened(norm_bias), eps, checks.a,
                                 checks.k),
                  checks.dtype);
}

Gradients projected_attention_backward(const Tensor& gy, const Tensor& x, const Tensor& wq, const Tensor& wk,
                                       const Tensor& wv, const Tensor& wo, const Tensor& pk, const Tensor& pv,
                                       const std::optional<Tensor>& norm_weight,
                                       const std::optional<Tensor>& norm_bias, double eps, bool gx, bool gw) {
  const Tensor w[6] = {wq, wk, wv, wo, pk, pv};
  const AttentionChecks checks("projected_attention_backward", x, wq.dim() ? wq.size(0) : 0, wq, pk);
  checks.stacked(w);
  checks.norm(checks.d, norm_weight, norm_bias, eps);
  checks.tensor("gy", gy, {x.size(0), checks.tokens, checks.d});
  const auto gradients = [](const Found<Tensor>& f) -> Gradients {
    return {f.x, f.w[0], f.w[1], f.w[2], f.w[3], f.w[4], f.w[5], f.norm_weight, f.norm_bias};
  };
  if (checks.dtype == ScalarType::Double)
    return gradients(backward<double>(gy, x, w, norm_weight, norm_bias, eps, checks.a, checks.k, gx, gw));
  const Tensor single[6] = {widened(wq), widened(wk), widened(wv),
                            widened(wo), widened(pk), widened(pv)};
  Gradients found = gradients(backward<float>(widened(gy), widened(x), single, widened(norm_weight),
                                              widened(norm_bias), eps, checks.a, checks.k, gx, gw));
  std::apply([&](auto&... t) { ((t = narrowed(t, checks.dtype)), ...); }, found);
  return found;
}

std::tuple<Tensor, Weights, Tensor, Tensor> projected_attention_groups_backward(
    const Tensor& gy, const Tensor& x, Weights wq, Weights wk, Weights wv, Weights wo, Weights pk, Weights pv,
    const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias, double eps, bool gx, bool gw) {
  const Checks named{"projected_attention_groups_backward"};
  named.expect(!wq.empty() && !pk.empty(), "wq and pk must hold one tensor a group");
  const AttentionChecks checks(named.op, x, static_cast<std::int64_t>(wq.size()), wq[0], pk[0]);
  Weights w[6] = {std::move(wq), std::move(wk), std::move(wv), std::move(wo), std::move(pk), std::move(pv)};
  checks.listed(w);
  checks.norm(checks.d, norm_weight, norm_bias, eps);
  checks.tensor("gy", gy, {x.size(0), checks.tokens, checks.d});
  const bool half = is_half(checks.dtype);
  for (Weights& one : w)
    for (Tensor& t : one)
      if (half) t = widened(t);
  Found<Weights> found =
      checks.dtype == ScalarType::Double
          ? backward<double>(gy, x, w, norm_weight, norm_bias, eps, checks.a, checks.k, gx, gw)
          : backward<float>(widened(gy), widened(x), w, widened(norm_weight), widened(norm_bias), eps, checks.a,
                            checks.k, gx, gw);
  Weights weights;
  for (const Weights& one : found.w)
    for (const Tensor& t : one) weights.push_back(narrowed(t, checks.dtype));
  return {narrowed(found.x, checks.dtype), weights, narrowed(found.norm_weight, checks.dtype),
          narrowed(found.norm_bias, checks.dtype)};
}

}  // namespace
}  // namespace lomacs

namespace lomacs {

template <typename T>
BlockStage<T> stages::attention(const AttentionWeights<T>& w) {
  Attention<T> job{};
  job.norm_weight = w.norm_weight, job.norm_bias = w.norm_bias, job.eps = w.eps;
  job.tokens = w.tokens, job.d = w.d, job.groups = w.groups, job.g = w.d / w.groups, job.k = w.k;
  for (std::int64_t i = 0; i < job.groups; ++i)
    job.pk.push_back(w.pk + i * w.tokens * w.k), job.pv.push_back(w.pv + i * w.tokens * w.k);
  const Isa isa = choose_isa();
  const std::int64_t squares = job.groups * job.g * job.g;
  const auto scores = std::make_shared<std::vector<T>>(static_cast<std::size_t>(squares));
  LOMACS_DISPATCH(isa, attention_scores(w.score, squares, scores->data()));
  // read alone
  job.M = scores->data(), job.N = const_cast<T*>(w.mix), job.across = true;
  return {job.groups, [job, scores, isa](const T* x, std::int64_t begin, std::int64_t end, T* y) {
            Attention<T> own = job;
            own.x = x, own.y = y;
            LOMACS_DISPATCH(isa, attention_forward(own, begin, end));
          }};
}

template BlockStage<float> stages::attention(const AttentionWeights<float>&);
template BlockStage<double> stages::attention(const AttentionWeights<double>&);

}  // namespace lomacs

STABLE_TORCH_LIBRARY_IMPL(lomacs, CPU, m) {
  m.impl("projected_attention", TORCH_BOX(&lomacs::projected_attention));
  m.impl("projected_attention_groups", TORCH_BOX(&lomacs::projected_attention_groups));
  m.impl("projected_attention_backward", TORCH_BOX(&lomacs::projected_attention_backward));
  m.impl("projected_attention_groups_backward", TORCH_BOX(&lomacs::projected_attention_groups_backward));
}
