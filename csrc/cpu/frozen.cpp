// lomacs::frozen_svd on CPU: the whole network for inference, a few samples at a time, from channels to factors.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
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

// What the op takes after the channels: see FrozenWeights in lomacs_fast/reference/frozen.py.
enum Position { row_w1, row_w2, col_w1, col_w2, raw, pooled, pos, head, table, first_block };

template <typename T>
void evaluate(const Tensor& H, const Tensor& scene, const std::vector<Tensor>& w, const double* scalars,
              double temperature, double eps, Tensor& U, Tensor& S, Tensor& V) {
  const std::int64_t B = H.size(0), M = H.size(1), N = H.size(2), r = S.size(1), d = w[pos].size(1);
  const auto at = [&](std::size_t i) { return pointer<T>(w[i]); };
  Network<T> net{};
  net.M = M, net.N = N, net.r = r, net.d = d, net.out = w[head].size(1), net.eps = eps;
  net.front = stages::front<T>({M, N, d, w[row_w1].size(0), w[col_w1].size(0), at(row_w1), at(row_w2), at(col_w1),
                                at(col_w2), at(raw), at(pooled), at(pos), temperature});
  for (std::size_t i = first_block; i + 5 < w.size(); i += 6) {
    if ((i - first_block) / 6 % 2 == 0)
      net.blocks.push_back(stages::attention<T>({M, d, w[i + 2].size(0), w[i + 4].size(2), at(i), at(i + 1), at(i + 2),
                                                 at(i + 3), at(i + 4), at(i + 5), eps}));
    else
      net.blocks.push_back(stages::conv<T>({M, d, w[i + 2].size(2), at(i), at(i + 1), at(i + 2), at(i + 3), at(i + 4),
                                            at(i + 5), eps}));
  }
  net.tail = stages::tail<T>(M, N, r, scalars[0], scalars[1], scalars[2]);
  net.H = pointer<T>(H), net.head = at(head), net.table = at(table);
  net.scene = static_cast<const std::int64_t*>(scene.const_data_ptr());
  net.U = output<T>(U), net.S = output<T>(S), net.V = output<T>(V);
  if (B == 1 && torch::stable::get_num_threads() > 1) return run_shared(net);
  torch::stable::parallel_for(0, B, 1, [&](std::int64_t begin, std::int64_t end) { run(net, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor> frozen_svd(const Tensor& H, const Tensor& scene, const std::vector<Tensor>& w,
                                              const Tensor& scalars, double temperature, double eps) {
  const ScalarType dtype = H.scalar_type();
  checks.real("H", dtype);
  checks.expect(H.dim() == 4, "H must have shape (B, M, N, 2)");
  const std::int64_t B = H.size(0), M = H.size(1), N = H.size(2);
  checks.expect(M > 1 && N > 1, "M and N must be at least 2");
  checks.tensor("H", H, dtype, {B, M, N, 2});
  if (w.size() < first_block || (w.size() - first_block) % 6 != 0)
    checks.fail("weights must hold 9 tensors and 6 a block, got " + std::to_string(w.size()));
  checks.expect(w[pos].dim() == 2 && w[row_w1].dim() == 2 && w[col_w1].dim() == 2 && w[head].dim() == 2 &&
                    w[table].dim() == 2,
                "pos, row_w1, col_w1, head and table must have two dimensions");
  const std::int64_t d = w[pos].size(1), row_hidden = w[row_w1].size(0), col_hidden = w[col_w1].size(0);
  const std::int64_t out = w[head].size(1), r = out / (2 * (M + N) + 1);
  checks.expect(d > 0 && row_hidden > 0 && col_hidden > 0 && r > 0 && temperature > 0 && eps > 0,
                "no dimension may be empty, temperature and eps must be positive");
  checks.tensor("row_w1", w[row_w1], dtype, {row_hidden, M});
  checks.tensor("row_w2", w[row_w2], dtype, {M, row_hidden});
  checks.tensor("col_w1", w[col_w1], dtype, {col_hidden, N});
  checks.tensor("col_w2", w[col_w2], dtype, {N, col_hidden});
  checks.tensor("raw", w[raw], dtype, {2 * N, d});
  checks.tensor("pooled", w[pooled], dtype, {N / 2 * 2, d});
  checks.tensor("pos", w[pos], dtype, {M, d});
  checks.tensor("head", w[head], dtype, {d, r * (2 * (M + N) + 1)});
  checks.tensor("table", w[table], dtype, {w[table].size(0), out});
  for (std::size_t i = first_block; i < w.size(); i += 6) {
    checks.tensor("norm_weight", w[i], dtype, {d});
    checks.tensor("norm_bias", w[i + 1], dtype, {d});
    checks.expect(w[i + 2].dim() == 3, "score and dw_weight must have three dimensions");
    if ((i - first_block) / 6 % 2 == 0) {
      const std::int64_t groups = w[i + 2].size(0);
      checks.expect(groups > 0 && d % groups == 0, "score must hold a number of groups that divides d");
      checks.expect(w[i + 4].dim() == 3 && w[i + 4].size(2) > 0, "pk must have shape (groups, M, k)");
      const std::int64_t g = d / groups, k = w[i + 4].size(2);
      checks.tensor("score", w[i + 2], dtype, {groups, g, g});
      checks.tensor("mix", w[i + 3], dtype, {groups, g, g});
      checks.tensor("pk", w[i + 4], dtype, {groups, M, k});
      checks.tensor("pv", w[i + 5], dtype, {groups, M, k});
    } else {
      const std::int64_t taps = w[i + 2].size(2);
      checks.expect(taps % 2 == 1, "dw_weight must have an odd number of taps");
      checks.tensor("dw_weight", w[i + 2], dtype, {2 * d, 1, taps});
      checks.tensor("dw_bias", w[i + 3], dtype, {2 * d});
      checks.tensor("pw_weight", w[i + 4], dtype, {d, d, 1});
      checks.tensor("pw_bias", w[i + 5], dtype, {d});
    }
  }
  checks.tensor("scalars", scalars, ScalarType::Double, {3});
  checks.expect(scene.scalar_type() == ScalarType::Long && scene.is_cpu() && scene.is_contiguous() &&
                    scene.dim() == 1 && scene.size(0) == B,
                "scene must be a contiguous int64 tensor (B,) on the CPU");
  const auto* scenes = static_cast<const std::int64_t*>(scene.const_data_ptr());
  for (std::int64_t b = 0; b < B; ++b)
    checks.expect(scenes[b] >= 0 && scenes[b] < w[table].size(0), "scene must name a row of table");
  Tensor U = torch::stable::new_empty(H, {B, M, r, 2}), S = torch::stable::new_empty(H, {B, r});
  Tensor V = torch::stable::new_empty(H, {B, N, r, 2});
  const auto* numbers = static_cast<const double*>(scalars.const_data_ptr());
  if (B > 0) {
    if (dtype == ScalarType::Float) evaluate<float>(H, scene, w, numbers, temperature, eps, U, S, V);
    else evaluate<double>(H, scene, w, numbers, temperature, eps, U, S, V);
  }
  return {U, S, V};
}

}  // namespace
}  // namespace lomacs

STABLE_TORCH_LIBRARY_IMPL(lomacs, CPU, m) { m.impl("frozen_svd", TORCH_BOX(&lomacs::frozen_svd)); }
