// lomacs::frozen_svd on CPU: the whole network for inference, a few samples at a time, from channels to factors.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>
#include <vector>

#include "simd.h"
#include "stages.h"
#include "team.h"
#include "tokens.h"

#define LOMACS_KERNELS "frozen.inl"
#include "isa.inl"

namespace lomacs {
namespace {

constexpr Checks checks{"frozen_svd"};

// samples whose heads share one reading of the weights, while everything of theirs stays in cache
constexpr std::int64_t samples_at_once = 16;

template <typename T>
struct Network {
  std::int64_t M, N, r, d, out;
  FrontStage<T> front;
  std::vector<BlockStage<T>> blocks;
  TailStage<T> tail;
  const T *H, *head, *table;
  const std::int64_t* scene;
  T *U, *S, *V;
  double eps;
};

// columns of the heads that one thread takes at a time
constexpr std::int64_t columns_at_once = 512;

// The heads of one sample's feature, by `team` where there is one.
template <typename T>
void heads_of_one(const Network<T>& net, const T* feat, std::int64_t scene, T* out, Team* team) {
  const T* bias = net.table + scene * net.out;
  const Isa isa = choose_isa();
  const auto columns = [&](std::uint64_t i) {
    const std::int64_t from = static_cast<std::int64_t>(i) * columns_at_once;
    const std::int64_t end = std::min(net.out, from + columns_at_once);
    LOMACS_DISPATCH(isa, head_columns(feat, net.head, bias, net.d, net.out, from, end, out));
  };
  const auto shares = static_cast<std::uint64_t>((net.out + columns_at_once - 1) / columns_at_once);
  if (team != nullptr && shares < 0x8000) return team->share(shares, columns);
  for (std::uint64_t i = 0; i < shares; ++i) columns(i);
}

// samples begin to end; `team` shares the stages of a single one
template <typename T>
void run(const Network<T>& net, std::int64_t begin, std::int64_t end, Team* team = nullptr) {
  const std::int64_t M = net.M, N = net.N, r = net.r, d = net.d;
  const std::int64_t most = std::min(samples_at_once, end - begin);
  const Memory<T> memory(most * (2 * M * N + 1 + 2 * M * d + d + net.out));
  T *Hd = memory.p, *norms = Hd + most * 2 * M * N, *x = norms + most, *y = x + most * M * d;
  T *feat = y + most * M * d, *u = feat + most * d, *v = u + most * 2 * M * r, *s = v + most * 2 * N * r;
  const Isa isa = choose_isa();
  for (std::int64_t b = begin; b < end; b += most) {
    const std::int64_t n = std::min(most, end - b);
    if (team != nullptr) {
      net.front.gate(net.H, Hd, norms);
      team->share(2, [&](std::uint64_t i) {
        const auto half = static_cast<std::int64_t>(i);
        net.front.project(Hd, half * M / 2, (half + 1) * M / 2, x);
      });
    } else {
      net.front.run(net.H + 2 * b * M * N, n, Hd, norms, x);
    }
    for (const BlockStage<T>& block : net.blocks) {
      if (team != nullptr && block.parts > 1)
        team->share(2, [&](std::uint64_t i) {
          const auto half = static_cast<std::int64_t>(i);
          block.run(x, half * block.parts / 2, (half + 1) * block.parts / 2, y);
        });
      else block.run(x, 0, n * block.parts, y);
      std::swap(x, y);
    }
    LOMACS_DISPATCH(isa, features(x, n, M, d, net.eps, feat));
    if (most == 1) {
      // one sample's u, v and s lie one after the other
      heads_of_one(net, feat, net.scene[b], u, team);
    } else {
      std::int64_t from = 0;
      for (const auto& [width, to] : {std::pair{2 * M * r, u}, std::pair{2 * N * r, v}, std::pair{r, s}}) {
        LOMACS_DISPATCH(isa, head_product(feat, net.head, net.table, net.scene + b, n, d, net.out, from, width, to));
        from += width;
      }
    }
    for (std::int64_t i = 0; i < n * r; ++i) {
      const double z = static_cast<double>(s[i]);
      // softplus that neither overflows nor loses small values
      s[i] = static_cast<T>(std::max(z, 0.0) + std::log1p(std::exp(-std::abs(z))) + 1e-6);
    }
    T* S = net.S + b * r;
    net.tail(u, v, s, Hd, n, net.U + 2 * b * M * r, S, net.V + 2 * b * N * r, team);
    for (std::int64_t i = 0; i < n * r; ++i) S[i] *= norms[i / r];
  }
}

// One sample by two threads: the second fetches the heads' last columns, which will be its own, while it waits.
template <typename T>
void run_shared(const Network<T>& net) {
  Team team;
  torch::stable::parallel_for(0, 2, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      if (team.enter()) {
        struct Finish {
          Team& team;
          ~Finish() { team.finish(); }
        } finish{team};
        run(net, 0, 1, &team);
        continue;
      }
      constexpr std::int64_t line = 64 / sizeof(T), lines = 32;
      const std::int64_t middle = net.out / 2;
      std::int64_t row = 0, column = net.out;
      team.follow([&] {
        for (std::int64_t n = 0; n < lines && row < net.d; ++n) {
          column -= line;
          if (column < middle) column = net.out - line, ++row;
          __builtin_prefetch(net.head + std::min(row, net.d - 1) * net.out + column, 0, 2);
        }
      });
    }
  });
}

// The dimensions and tensors of a network: see FrozenWeights in lomacs_fast/reference/frozen.py.
struct Layout {
  // hidden sizes of the gate's two sides, rows of table; then groups and k_len of attention, taps of convolution
  std::int64_t d, row_hidden, col_hidden, r, scenes;
  const std::int64_t *blocks, *end;
};

Layout layout_of(const std::vector<std::int64_t>& sizes) {
  checks.expect(sizes.size() >= 5, "sizes must hold d, both hidden sizes, r and the rows of table");
  for (const std::int64_t n : sizes) checks.expect(n > 0, "no dimension in sizes may be empty");
  return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes.data() + 5, sizes.data() + sizes.size()};
}

// Walks through the packed weights; each tensor begins at a cache line.
template <typename T>
struct Walk {
  const T* p;
  std::int64_t end = 0;

  const T* take(std::int64_t n) {
    const T* found = p == nullptr ? nullptr : p + end;
    end += (n + 15) / 16 * 16;
    return found;
  }
};

// The stages on weights from p on, null to count them; returns their number.
template <typename T>
std::int64_t assemble(const T* p, std::int64_t M, std::int64_t N, const Layout& z, double temperature, double eps,
                      Network<T>* net) {
  Walk<T> walk{p};
  const std::int64_t d = z.d, out = z.r * (2 * (M + N) + 1);
  FrontWeights<T> front{M, N, d, z.row_hidden, z.col_hidden, {}, {}, {}, {}, {}, {}, {}, temperature};
  front.row_w1 = walk.take(z.row_hidden * M), front.row_w2 = walk.take(M * z.row_hidden);
  front.col_w1 = walk.take(z.col_hidden * N), front.col_w2 = walk.take(N * z.col_hidden);
  front.raw = walk.take(2 * N * d), front.pooled = walk.take(N / 2 * 2 * d), front.pos = walk.take(M * d);
  const T *head = walk.take(d * out), *table = walk.take(z.scenes * out);
  if (net != nullptr) net->front = stages::front<T>(front), net->head = head, net->table = table, net->out = out;
  bool attention = true;
  for (const std::int64_t* n = z.blocks; n < z.end; n += attention ? 2 : 1, attention = !attention) {
    const T *norm_weight = walk.take(d), *norm_bias = walk.take(d);
    if (attention) {
      checks.expect(n + 1 < z.end && d % n[0] == 0, "sizes must give groups that divide d, and k_len, of attention");
      const std::int64_t fold = d / n[0] * d, reduce = n[0] * M * n[1];
      const T *score = walk.take(fold), *mix = walk.take(fold), *pk = walk.take(reduce), *pv = walk.take(reduce);
      if (net != nullptr)
        net->blocks.push_back(
            stages::attention<T>({M, d, n[0], n[1], norm_weight, norm_bias, score, mix, pk, pv, eps}));
    } else {
      checks.expect(n[0] % 2 == 1, "sizes must give an odd number of taps");
      const T *dw = walk.take(2 * d * n[0]), *dw_bias = walk.take(2 * d), *pw = walk.take(d * d);
      const T* pw_bias = walk.take(d);
      if (net != nullptr)
        net->blocks.push_back(stages::conv<T>({M, d, n[0], norm_weight, norm_bias, dw, dw_bias, pw, pw_bias, eps}));
    }
  }
  return walk.end;
}

template <typename T>
void evaluate(const Tensor& H, const Tensor& scene, const Tensor& packed, const Layout& z, const double* scalars,
              double temperature, double eps, Tensor& U, Tensor& S, Tensor& V) {
  const std::int64_t B = H.size(0), M = H.size(1), N = H.size(2);
  Network<T> net{};
  net.M = M, net.N = N, net.r = z.r, net.d = z.d, net.eps = eps;
  assemble<T>(pointer<T>(packed), M, N, z, temperature, eps, &net);
  net.tail = stages::tail<T>(M, N, z.r, scalars[0], scalars[1], scalars[2]);
  net.H = pointer<T>(H), net.scene = static_cast<const std::int64_t*>(scene.const_data_ptr());
  net.U = output<T>(U), net.S = output<T>(S), net.V = output<T>(V);
  if (B == 1 && torch::stable::get_num_threads() > 1) return run_shared(net);
  torch::stable::parallel_for(0, B, 1, [&](std::int64_t begin, std::int64_t end) { run(net, begin, end); });
}

using Factors = std::tuple<Tensor, Tensor, Tensor>;

// U and V are complex where H is
Factors frozen_svd(const Tensor& H, const Tensor& scene, const Tensor& packed, const std::vector<std::int64_t>& sizes,
                   const Tensor& scalars, double temperature, double eps) {
  const ScalarType dtype = real_of(H);
  checks.channels(H);
  const std::int64_t B = H.size(0), M = H.size(1), N = H.size(2);
  checks.expect(M > 1 && N > 1, "M and N must be at least 2");
  checks.tensor("H", H, H.scalar_type(), shape_as(H, B, M, N));
  const Layout z = layout_of(sizes);
  checks.expect(temperature > 0 && eps > 0, "temperature and eps must be positive");
  checks.tensor("packed", packed, dtype, {assemble<float>(nullptr, M, N, z, temperature, eps, nullptr)});
  checks.tensor("scalars", scalars, ScalarType::Double, {3});
  checks.scenes(scene, B, z.scenes);
  Tensor U = fresh(H, shape_as(H, B, M, z.r)), S = fresh(H, {B, z.r}, dtype), V = fresh(H, shape_as(H, B, N, z.r));
  const auto* numbers = static_cast<const double*>(scalars.const_data_ptr());
  if (B > 0) {
    if (dtype == ScalarType::Float) evaluate<float>(H, scene, packed, z, numbers, temperature, eps, U, S, V);
    else evaluate<double>(H, scene, packed, z, numbers, temperature, eps, U, S, V);
  }
  return {U, S, V};
}

// The same on arguments that cost little to hand over: `facts` holds M, N, temperature and eps, then the sizes.
Factors frozen_svd_at_once(const Tensor& H, const Tensor& scene, const Tensor& packed, const Tensor& scalars,
                           const Tensor& facts) {
  checks.expect(facts.dim() == 1 && facts.size(0) >= 4, "facts must hold M, N, temperature, eps and sizes");
  checks.tensor("facts", facts, ScalarType::Double, {facts.size(0)});
  const auto* p = static_cast<const double*>(facts.const_data_ptr());
  checks.channels(H);
  // nothing else tells a channel of another shape whose weights would take as much
  checks.expect(static_cast<double>(H.size(1)) == p[0] && static_cast<double>(H.size(2)) == p[1],
                "H must have the M and N of facts");
  return frozen_svd(H, scene, packed, {p + 4, p + facts.size(0)}, scalars, p[2], p[3]);
}

}  // namespace
}  // namespace lomacs

STABLE_TORCH_LIBRARY_IMPL(lomacs, CPU, m) {
  m.impl("frozen_svd", TORCH_BOX(&lomacs::frozen_svd));
  m.impl("frozen_svd.at_once", TORCH_BOX(&lomacs::frozen_svd_at_once));
}
