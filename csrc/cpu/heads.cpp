// lomacs::svd_heads on CPU: both linear heads on a batch of features, which is short and whose outputs are long; and
// lomacs::pooled_heads, which makes the features of tokens and scenes and takes the spectrum's head with them.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
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

// The strips of all heads, one after another; `parts` of them, by the sizes alone, sum the features' gradients.
template <typename T>
struct Heads {
  std::vector<Head<T>> heads;
  std::int64_t batch, d, parts;
  const T* feat;
  T* gfeat;

  std::int64_t strips(int head) const { return (heads[head].size + head_strip - 1) / head_strip; }
  std::int64_t strips() const {
    std::int64_t total = 0;
    for (int head = 0; head < static_cast<int>(heads.size()); ++head) total += strips(head);
    return total;
  }
  HeadStrip strip(std::int64_t n) const {
    int head = 0;
    for (; n >= strips(head); ++head) n -= strips(head);
    const std::int64_t from = n * head_strip;
    return {head, from, std::min(head_strip, heads[head].size - from)};
  }
  std::int64_t first(std::int64_t part) const { return part * strips() / parts; }
};

// Features of tokens x (batch, tokens, d): the mean over tokens, normalised, and the row of a table that a scene
// names. `feat` and what the gradients need: `unit`, the mean before weight and bias, and 1 / deviation.
template <typename T>
struct Pooled {
  std::int64_t batch, tokens, d, r;
  const T *x, *norm_weight, *norm_bias, *table;
  const std::int64_t* scene;
  double eps;
  // and the slope of softplus (batch, r)
  T *feat, *unit, *rate, *slope;
  // the features with a column of ones
  T* with_ones;
  // backward
  const T* gfeat;
  T* gx;
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

// features (batch, d + 1), the last column ones
template <typename T>
void forward(const Heads<T>& job, const T* feat) {
  const Isa isa = choose_isa();
  torch::stable::parallel_for(0, job.strips(), share_of(job.batch * job.d * head_strip),
                              [&](std::int64_t begin, std::int64_t end) {
                                LOMACS_DISPATCH(isa, heads_forward(job, feat, begin, end));
                              });
}

template <typename T>
void forward(const HeadChecks& z, const Tensor& feat, const Tensor (&weights)[2], const Tensor (&biases)[2],
             const Tensor (&out)[2]) {
  Heads<T> job{};
  job.batch = z.batch, job.d = z.d;
  for (int n = 0; n < 2; ++n)
    job.heads.push_back({z.sizes[n], pointer<T>(weights[n]), pointer<T>(biases[n]), nullptr, output<T>(out[n]), nullptr,
                         nullptr});
  const T* from = pointer<T>(feat);
  const Memory<T> with_ones(z.batch * (z.d + 1));
  for (std::int64_t b = 0; b < z.batch; ++b) {
    T* row = with_ones.p + b * (z.d + 1);
    std::copy(from + b * z.d, from + (b + 1) * z.d, row);
    row[z.d] = 1;
  }
  forward(job, with_ones.p);
}

// gradients of the heads, and of the features where `gfeat` is one
template <typename T>
void backward(Heads<T>& job, T* gfeat) {
  const std::int64_t size = job.batch * job.d;
  // their sums together stay near
  const std::int64_t many = std::clamp<std::int64_t>((1 << 21) / std::max<std::int64_t>(1, size), 4, 32);
  job.parts = std::min(many, job.strips());
  const Memory<T> partial(gfeat ? job.parts * size : 0);
  job.gfeat = gfeat ? partial.p : nullptr;
  const Isa isa = choose_isa();
  torch::stable::parallel_for(0, job.parts, 1, [&](std::int64_t begin, std::int64_t end) {
    LOMACS_DISPATCH(isa, heads_backward(job, begin, end));
  });
  if (!gfeat) return;
  torch::stable::parallel_for(0, size, share_of(job.parts), [&](std::int64_t begin, std::int64_t end) {
    sum_of_chunks(partial.p + begin, size, job.parts, end - begin, 1, gfeat + begin);
  });
}

template <typename T>
void backward(const HeadChecks& z, const Tensor (&g)[2], const Tensor& feat, const Tensor (&weights)[2], Tensor& gfeat,
              const Tensor (&gweights)[2], const Tensor (&gbiases)[2], bool gf, bool gw) {
  Heads<T> job{};
  job.batch = z.batch, job.d = z.d, job.feat = pointer<T>(feat);
  for (int n = 0; n < 2; ++n)
    job.heads.push_back({z.sizes[n], pointer<T>(weights[n]), nullptr, pointer<T>(g[n]), nullptr,
                         output<T>(gweights[n], gw), output<T>(gbiases[n], gw)});
  backward(job, output<T>(gfeat, gf));
}

std::tuple<Tensor, Tensor> svd_heads(const Tensor& feat, const Tensor& u_weight, const Tensor& u_bias,
                                     const Tensor& v_weight, const Tensor& v_bias) {
  const HeadChecks z("svd_heads", feat, u_weight, v_weight);
  z.checks.tensor("u_bias", u_bias, z.dtype, {z.sizes[0]});
  z.checks.tensor("v_bias", v_bias, z.dtype, {z.sizes[1]});
  const Tensor out[2] = {fresh(feat, {z.batch, z.sizes[0]}),
                         fresh(feat, {z.batch, z.sizes[1]})};
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
    return wanted ? fresh(feat, sizes) : fresh(feat, {0});
  };
  Tensor gfeat = make(gf, {z.batch, z.d});
  const Tensor gweights[2] = {make(gw, {z.sizes[0], z.d}), make(gw, {z.sizes[1], z.d})};
  const Tensor gbiases[2] = {make(gw, {z.sizes[0]}), make(gw, {z.sizes[1]})};
  if (z.dtype == ScalarType::Float)
    backward<float>(z, {gu, gv}, feat, {u_weight, v_weight}, gfeat, gweights, gbiases, gf, gw);
  else backward<double>(z, {gu, gv}, feat, {u_weight, v_weight}, gfeat, gweights, gbiases, gf, gw);
  return {gfeat, gweights[0], gbiases[0], gweights[1], gbiases[1]};
}

struct PooledChecks {
  Checks checks;
  ScalarType dtype;
  std::int64_t batch, tokens, d, r, sizes[3];

  PooledChecks(const char* op, ScalarType dtype, std::int64_t batch, std::int64_t tokens, const Tensor& norm_weight,
               const Tensor& scene, std::int64_t scenes, const Tensor* (&&weights)[3])
      : checks{op}, dtype(dtype), batch(batch), tokens(tokens) {
    checks.real("x", dtype);
    checks.expect(norm_weight.dim() == 1 && norm_weight.size(0) > 0 && tokens > 0,
                  "x must have shape (B, T, d), norm_weight (d,), and neither T nor d may be 0");
    d = norm_weight.size(0);
    checks.tensor("norm_weight", norm_weight, dtype, {d});
    checks.scenes(scene, batch, scenes);
    const char* names[] = {"u_weight", "v_weight", "s_weight"};
    for (int n = 0; n < 3; ++n) {
      checks.expect(weights[n]->dim() == 2 && weights[n]->size(0) > 0, "weights must have shape (n, d)");
      sizes[n] = weights[n]->size(0);
      checks.tensor(names[n], *weights[n], dtype, {sizes[n], d});
    }
    r = sizes[2];
  }

  std::int64_t kept() const { return 2 * d + 1 + r; }

  // feat (B, d), unit (B, d), slope (B, r), rate (B), one after the other
  template <typename T>
  void place(T* p, Pooled<T>& job) const {
    job.batch = batch, job.tokens = tokens, job.d = d, job.r = r;
    job.feat = p, job.unit = p + batch * d, job.slope = p + 2 * batch * d, job.rate = job.slope + batch * r;
  }
};

template <typename T>
void pooled(const PooledChecks& z, Pooled<T>& job, const Tensor (&weights)[3], const Tensor (&biases)[3],
            const Tensor (&out)[3], const Tensor& kept) {
  z.place(output<T>(kept), job);
  const Memory<T> with_ones(z.batch * (z.d + 1)), logits(z.batch * z.r);
  job.with_ones = with_ones.p;
  const Isa isa = choose_isa();
  torch::stable::parallel_for(0, z.batch, share_of(z.tokens * z.d), [&](std::int64_t begin, std::int64_t end) {
    LOMACS_DISPATCH(isa, pooled_features(job, begin, end));
  });
  Heads<T> heads{};
  heads.batch = z.batch, heads.d = z.d;
  T* to[] = {output<T>(out[0]), output<T>(out[1]), logits.p};
  for (int n = 0; n < 3; ++n)
    heads.heads.push_back({z.sizes[n], pointer<T>(weights[n]), pointer<T>(biases[n]), nullptr, to[n], nullptr, nullptr});
  forward(heads, with_ones.p);
  T* s = output<T>(out[2]);
  // some 40 operations each
  torch::stable::parallel_for(0, z.batch * z.r, share_of(40), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const T x = logits.p[i], e = std::exp(-std::abs(x)), rest = 1 / (1 + e);
      // above, softplus is the number itself, as in PyTorch
      const bool above = x > 20;
      s[i] = (above ? x : std::max(x, T(0)) + std::log1p(e)) + static_cast<T>(1e-6);
      job.slope[i] = above ? 1 : x < 0 ? e * rest : rest;
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pooled_heads(const Tensor& x, const Tensor& norm_weight,
                                                        const Tensor& norm_bias, double eps, const Tensor& scenes,
                                                        const Tensor& scene, const Tensor& u_weight,
                                                        const Tensor& u_bias, const Tensor& v_weight,
                                                        const Tensor& v_bias, const Tensor& s_weight,
                                                        const Tensor& s_bias) {
  constexpr Checks named{"pooled_heads"};
  named.expect(x.dim() == 3 && scenes.dim() == 2, "x must have shape (B, T, d), scenes (n, d)");
  named.expect(eps > 0, "eps must be positive");
  const PooledChecks z(named.op, x.scalar_type(), x.size(0), x.size(1), norm_weight, scene, scenes.size(0),
                       {&u_weight, &v_weight, &s_weight});
  named.tensor("x", x, z.dtype, {z.batch, z.tokens, z.d});
  named.tensor("norm_bias", norm_bias, z.dtype, {z.d});
  named.tensor("scenes", scenes, z.dtype, {scenes.size(0), z.d});
  const Tensor weights[3] = {u_weight, v_weight, s_weight}, biases[3] = {u_bias, v_bias, s_bias};
  const char* names[] = {"u_bias", "v_bias", "s_bias"};
  for (int n = 0; n < 3; ++n) named.tensor(names[n], biases[n], z.dtype, {z.sizes[n]});
  const auto make = [&](std::int64_t n) { return fresh(x, {z.batch, n}); };
  const Tensor out[3] = {make(z.sizes[0]), make(z.sizes[1]), make(z.r)}, kept = make(z.kept());
  const auto run = [&](auto number) {
    using T = decltype(number);
    Pooled<T> job{};
    job.x = pointer<T>(x), job.norm_weight = pointer<T>(norm_weight), job.norm_bias = pointer<T>(norm_bias);
    job.table = pointer<T>(scenes), job.scene = static_cast<const std::int64_t*>(scene.const_data_ptr());
    job.eps = eps;
    pooled(z, job, weights, biases, out, kept);
  };
  if (z.dtype == ScalarType::Float) run(float{});
  else run(double{});
  return {out[0], out[1], out[2], kept};
}

using PooledGradients =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T>
void pooled_backward(const PooledChecks& z, Pooled<T>& job, const Tensor (&g)[3], const Tensor (&weights)[3],
                     const Tensor (&gweights)[3], const Tensor (&gbiases)[3], const Tensor& gx,
                     const Tensor (&gnorm)[2], const Tensor& gscenes, const Tensor& kept, bool gw) {
  // read alone
  z.place(const_cast<T*>(pointer<T>(kept)), job);
  const Memory<T> of_logits(z.batch * z.r), of_features(z.batch * z.d);
  const T* gs = pointer<T>(g[2]);
  for (std::int64_t i = 0; i < z.batch * z.r; ++i) of_logits.p[i] = gs[i] * job.slope[i];
  Heads<T> heads{};
  heads.batch = z.batch, heads.d = z.d, heads.feat = job.feat;
  const T* from[] = {pointer<T>(g[0]), pointer<T>(g[1]), of_logits.p};
  for (int n = 0; n < 3; ++n)
    heads.heads.push_back({z.sizes[n], pointer<T>(weights[n]), nullptr, from[n], nullptr, output<T>(gweights[n], gw),
                           output<T>(gbiases[n], gw)});
  backward(heads, of_features.p);
  job.gfeat = of_features.p, job.gx = output<T>(gx);
  const Isa isa = choose_isa();
  torch::stable::parallel_for(0, z.batch, share_of(z.tokens * z.d), [&](std::int64_t begin, std::int64_t end) {
    LOMACS_DISPATCH(isa, pooled_gradients(job, begin, end));
  });
  if (!gw) return;
  T *weight = output<T>(gnorm[0]), *bias = output<T>(gnorm[1]), *table = output<T>(gscenes);
  std::fill(table, table + gscenes.numel(), T(0));
  std::vector<double> sums(static_cast<std::size_t>(2 * z.d));
  for (std::int64_t b = 0; b < z.batch; ++b) {
    const T *of = of_features.p + b * z.d, *unit = job.unit + b * z.d;
    T* row = table + job.scene[b] * z.d;
    for (std::int64_t k = 0; k < z.d; ++k) {
      sums[static_cast<std::size_t>(k)] += static_cast<double>(of[k]) * static_cast<double>(unit[k]);
      sums[static_cast<std::size_t>(z.d + k)] += static_cast<double>(of[k]);
      row[k] += of[k];
    }
  }
  for (std::int64_t k = 0; k < z.d; ++k) {
    weight[k] = static_cast<T>(sums[static_cast<std::size_t>(k)]);
    bias[k] = static_cast<T>(sums[static_cast<std::size_t>(z.d + k)]);
  }
}

PooledGradients pooled_heads_backward(const Tensor& gu, const Tensor& gv, const Tensor& gs, std::int64_t tokens,
                                      const Tensor& norm_weight, std::int64_t scenes, const Tensor& scene,
                                      const Tensor& u_weight, const Tensor& v_weight, const Tensor& s_weight,
                                      const Tensor& kept, bool gw) {
  constexpr Checks named{"pooled_heads_backward"};
  named.expect(gs.dim() == 2 && scenes > 0, "gs must have shape (B, r), scenes must be positive");
  const PooledChecks z(named.op, gs.scalar_type(), gs.size(0), tokens, norm_weight, scene, scenes,
                       {&u_weight, &v_weight, &s_weight});
  const Tensor g[3] = {gu, gv, gs}, weights[3] = {u_weight, v_weight, s_weight};
  const char* names[] = {"gu", "gv", "gs"};
  for (int n = 0; n < 3; ++n) named.tensor(names[n], g[n], z.dtype, {z.batch, z.sizes[n]});
  named.tensor("kept", kept, z.dtype, {z.batch, z.kept()});
  const auto make = [&](bool wanted, const std::vector<std::int64_t>& sizes) {
    return wanted ? fresh(gs, sizes) : fresh(gs, {0});
  };
  const Tensor gx = make(true, {z.batch, tokens, z.d}), gnorm[2] = {make(gw, {z.d}), make(gw, {z.d})};
  const Tensor gscenes = make(gw, {scenes, z.d});
  const Tensor gweights[3] = {make(gw, {z.sizes[0], z.d}), make(gw, {z.sizes[1], z.d}), make(gw, {z.r, z.d})};
  const Tensor gbiases[3] = {make(gw, {z.sizes[0]}), make(gw, {z.sizes[1]}), make(gw, {z.r})};
  const auto run = [&](auto number) {
    using T = decltype(number);
    Pooled<T> job{};
    job.norm_weight = pointer<T>(norm_weight);
    job.scene = static_cast<const std::int64_t*>(scene.const_data_ptr());
    pooled_backward(z, job, g, weights, gweights, gbiases, gx, gnorm, gscenes, kept, gw);
  };
  if (z.dtype == ScalarType::Float) run(float{});
  else run(double{});
  return {gx,          gnorm[0],    gnorm[1],   gscenes,     gweights[0],
          gbiases[0],  gweights[1], gbiases[1], gweights[2], gbiases[2]};
}

}  // namespace
}  // namespace lomacs

STABLE_TORCH_LIBRARY_IMPL(lomacs, CPU, m) {
  m.impl("svd_heads", TORCH_BOX(&lomacs::svd_heads));
  m.impl("svd_heads_backward", TORCH_BOX(&lomacs::svd_heads_backward));
  m.impl("pooled_heads", TORCH_BOX(&lomacs::pooled_heads));
  m.impl("pooled_heads_backward", TORCH_BOX(&lomacs::pooled_heads_backward));
}
