// lomacs::svd_heads on CPU: both linear heads on a batch of features, which is short and whose outputs are long.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "simd.h"
#include "tokens.h"

namespace lomacs {
namespace {

// outputs that are made at once
constexpr std::int64_t head_strip = 128;

// weight (size, d), bias (size), out (batch, size) or its gradient g; a gradient that is not wanted is null
template <typename T>
struct Head {
  std::int64_t size;
  const T *weight, *bias, *g;
  T *out, *gweight, *gbias;
};

struct HeadStrip {
  int head;
  std::int64_t from, width;
};

// The strips of both heads, one after another; `parts` of them, by the sizes alone, sum the features' gradients.
template <typename T>
struct Heads {
  Head<T> heads[2];
  std::int64_t batch, d, parts;
  const T* feat;
  T* gfeat;

  std::int64_t strips(int head) const { return (heads[head].size + head_strip - 1) / head_strip; }
  std::int64_t strips() const { return strips(0) + strips(1); }
  HeadStrip strip(std::int64_t n) const {
    const int head = n < strips(0) ? 0 : 1;
    const std::int64_t from = (head == 0 ? n : n - strips(0)) * head_strip;
    return {head, from, std::min(head_strip, heads[head].size - from)};
  }
  std::int64_t first(std::int64_t part) const { return part * strips() / parts; }
};

}  // namespace
}  // namespace lomacs

#define LOMACS_KERNELS "heads.inl"
#include "isa.inl"

namespace lomacs {
namespace {

struct HeadChecks {
  Checks checks;
  ScalarType dtype;
  std::int64_t batch, d, sizes[2];

  HeadChecks(const char* op, const Tensor& feat, const Tensor& u_weight, const Tensor& v_weight)
      : checks{op}, dtype(feat.scalar_type()) {
    checks.real("feat", dtype);
    checks.expect(feat.dim() == 2 && u_weight.dim() == 2 && v_weight.dim() == 2,
                  "feat must have shape (B, d), weights (n, d)");
    batch = feat.size(0), d = feat.size(1), sizes[0] = u_weight.size(0), sizes[1] = v_weight.size(0);
    checks.expect(d > 0 && sizes[0] > 0 && sizes[1] > 0, "no dimension but the batch may be empty");
    checks.tensor("feat", feat, dtype, {batch, d});
    checks.tensor("u_weight", u_weight, dtype, {sizes[0], d});
    checks.tensor("v_weight", v_weight, dtype, {sizes[1], d});
  }
};

template <typename T>
void forward(const HeadChecks& z, const Tensor& feat, const Tensor (&weights)[2], const Tensor (&biases)[2],
             const Tensor (&out)[2]) {
  Heads<T> job{};
  job.batch = z.batch, job.d = z.d;
  for (int n = 0; n < 2; ++n)
    job.heads[n] = {z.sizes[n], pointer<T>(weights[n]), pointer<T>(biases[n]), nullptr, output<T>(out[n]), nullptr,
                    nullptr};
  const T* from = pointer<T>(feat);
  const Memory<T> with_ones(z.batch * (z.d + 1));
  for (std::int64_t b = 0; b < z.batch; ++b) {
    T* row = with_ones.p + b * (z.d + 1);
    std::copy(from + b * z.d, from + (b + 1) * z.d, row);
    row[z.d] = 1;
  }
  const Isa isa = choose_isa();
  torch::stable::parallel_for(0, job.strips(), share_of(z.batch * z.d * head_strip),
                              [&](std::int64_t begin, std::int64_t end) {
                                LOMACS_DISPATCH(isa, heads_forward(job, with_ones.p, begin, end));
                              });
}

template <typename T>
void backward(const HeadChecks& z, const Tensor (&g)[2], const Tensor& feat, const Tensor (&weights)[2], Tensor& gfeat,
              const Tensor (&gweights)[2], const Tensor (&gbiases)[2], bool gf, bool gw) {
  Heads<T> job{};
  job.batch = z.batch, job.d = z.d, job.feat = pointer<T>(feat);
  for (int n = 0; n < 2; ++n)
    job.heads[n] = {z.sizes[n], pointer<T>(weights[n]), nullptr, pointer<T>(g[n]), nullptr, output<T>(gweights[n], gw),
                    output<T>(gbiases[n], gw)};
  // their sums together stay near
  const std::int64_t many = std::clamp<std::int64_t>((1 << 21) / std::max<std::int64_t>(1, z.batch * z.d), 4, 32);
  job.parts = std::min(many, job.strips());
  const std::int64_t size = z.batch * z.d;
  const Memory<T> partial(gf ? job.parts * size : 0);
  job.gfeat = gf ? partial.p : nullptr;
  const Isa isa = choose_isa();
  torch::stable::parallel_for(0, job.parts, 1, [&](std::int64_t begin, std::int64_t end) {
    LOMACS_DISPATCH(isa, heads_backward(job, begin, end));
  });
  if (!gf) return;
  T* to = output<T>(gfeat);
  torch::stable::parallel_for(0, size, share_of(job.parts), [&](std::int64_t begin, std::int64_t end) {
    sum_of_chunks(partial.p + begin, size, job.parts, end - begin, 1, to + begin);
  });
}

std::tuple<Tensor, Tensor> svd_heads(const Tensor& feat, const Tensor& u_weight, const Tensor& u_bias,
                                     const Tensor& v_weight, const Tensor& v_bias) {
  const HeadChecks z("svd_heads", feat, u_weight, v_weight);
  z.checks.tensor("u_bias", u_bias, z.dtype, {z.sizes[0]});
  z.checks.tensor("v_bias", v_bias, z.dtype, {z.sizes[1]});
  const Tensor out[2] = {torch::stable::new_empty(feat, {z.batch, z.sizes[0]}),
                         torch::stable::new_empty(feat, {z.batch, z.sizes[1]})};
  if (z.dtype == ScalarType::Float) forward<float>(z, feat, {u_weight, v_weight}, {u_bias, v_bias}, out);
  else forward<double>(z, feat, {u_weight, v_weight}, {u_bias, v_bias}, out);
  return {out[0], out[1]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> svd_heads_backward(const Tensor& gu, const Tensor& gv,
                                                                      const Tensor& feat, const Tensor& u_weight,
                                                                      const Tensor& v_weight, bool gf, bool gw) {
  const HeadChecks z("svd_heads_backward", feat, u_weight, v_weight);
  z.checks.tensor("gu", gu, z.dtype, {z.batch, z.sizes[0]});
  z.checks.tensor("gv", gv, z.dtype, {z.batch, z.sizes[1]});
  const auto make = [&](bool wanted, const std::vector<std::int64_t>& sizes) {
    return wanted ? torch::stable::new_empty(feat, sizes) : torch::stable::new_empty(feat, {0});
  };
  Tensor gfeat = make(gf, {z.batch, z.d});
  const Tensor gweights[2] = {make(gw, {z.sizes[0], z.d}), make(gw, {z.sizes[1], z.d})};
  const Tensor gbiases[2] = {make(gw, {z.sizes[0]}), make(gw, {z.sizes[1]})};
  if (z.dtype == ScalarType::Float)
    backward<float>(z, {gu, gv}, feat, {u_weight, v_weight}, gfeat, gweights, gbiases, gf, gw);
  else backward<double>(z, {gu, gv}, feat, {u_weight, v_weight}, gfeat, gweights, gbiases, gf, gw);
  return {gfeat, gweights[0], gbiases[0], gweights[1], gbiases[1]};
}

}  // namespace
}  // namespace lomacs

STABLE_TORCH_LIBRARY_IMPL(lomacs, CPU, m) {
  m.impl("svd_heads", TORCH_BOX(&lomacs::svd_heads));
  m.impl("svd_heads_backward", TORCH_BOX(&lomacs::svd_heads_backward));
}
