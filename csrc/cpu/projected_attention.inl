// Projected attention and its gradients, sample by sample. Included inside isa.inl.
// Channels are rows and tokens lie along vectors: the softmax over the k reduced rows runs down columns.
#include "tokens.inl"

namespace lomacs {
namespace LOMACS_ISA {
namespace {

// tokens whose logits are held at once
constexpr std::int64_t strip_tokens = 64;

template <typename T>
struct AttentionScratch : TokensAhead<T> {
  // d x tokens: x, normalised where there is a norm; the same under the norm's weight and bias
  T *plain, *x, *inverse;
  // of one group, g x k: reduced tokens, keys and values; columns: logits, then their exponentials
  T *Xk, *Xv, *K, *V, *L, *sums;
  T* out;
  // backward: tokens x d, x as `x`; d x tokens, gradients of y and x; k x g and strips
  T *natural, *gy, *gx, *dK, *dV, *dXk, *dXv, *dS;
  std::int64_t kp, gp, row;

  LOMACS_TARGET void plan(const Attention<T>& job, bool backward, Arena<T>& arena) {
    const std::int64_t d = job.d, g = job.g, k = job.k;
    kp = vectors(k), gp = vectors(g), row = vectors(job.tokens);
    const bool norm = job.norm_weight != nullptr;
    plain = x = arena.take(d * row);
    if (norm && backward) x = arena.take(d * row);
    inverse = arena.take(row);
    for (T** p : {&Xk, &Xv, &K, &V}) *p = arena.take(g * kp);
    L = arena.take(k * strip_tokens);
    sums = arena.take(strip_tokens);
    out = backward ? nullptr : arena.take(g * row);
    if (!backward) return;
    natural = norm ? arena.take(job.tokens * d) : nullptr;
    gy = arena.take(d * row);
    gx = arena.take(d * row);
    for (T** p : {&dK, &dV, &dXk, &dXv}) *p = arena.take(k * gp);
    dS = arena.take(k * strip_tokens);
  }
};

template <typename T>
LOMACS_TARGET void attention_fold(const Attention<T>& job) {
  const std::int64_t g = job.g, a = job.a, k = job.k, row = vectors(job.tokens);
  const T scale = static_cast<T>(log2_e / std::sqrt(static_cast<double>(a)));
  for (std::int64_t i = 0; i < job.groups; ++i) {
    T* M = job.M + i * g * g;
    matmul<T>({job.wq[i], 1, g}, {job.wk[i], g}, M, g, g, g, a);
    for (std::int64_t n = 0; n < g * g; ++n) M[n] *= scale;
    matmul<T>({job.wo[i], g, 1}, {job.wv[i], g}, job.N + i * g * g, g, g, g, g);
    if (job.Pk != nullptr) {
      tokens_to_rows(job.pk[i], k, job.tokens, k, job.Pk + i * k * row, row);
      tokens_to_rows(job.pv[i], k, job.tokens, k, job.Pv + i * k * row, row);
    }
  }
}

// to = the scores' product for powers of two
template <typename T>
LOMACS_TARGET void attention_scores(const T* from, std::int64_t count, T* to) {
  const T scale = static_cast<T>(log2_e);
  std::int64_t n = 0;
  for (; n + lanes<T> <= count; n += lanes<T>) store(to + n, splat(scale) * load(from + n));
  for (; n < count; ++n) to[n] = scale * from[n];
}

template <typename T>
LOMACS_TARGET void attention_tokens(const Attention<T>& job, std::int64_t b, AttentionScratch<T>& s) {
  tokens_to_rows(job.x + b * job.tokens * job.d, job.d, job.tokens, job.d, s.plain, s.row);
  if (job.norm_weight != nullptr)
    normalise(s.plain, s.row, job.d, s.row, job.norm_weight, job.norm_bias, static_cast<T>(job.eps), s.inverse,
              s.x, s.row);
}

// reduced tokens, keys and values of group i
template <typename T>
LOMACS_TARGET void attention_keys(const Attention<T>& job, std::int64_t i, AttentionScratch<T>& s) {
  const std::int64_t g = job.g, k = job.k;
  const T* x = s.x + i * g * s.row;
  matmul<T>({x, s.row, 1}, {job.pk[i], k}, s.Xk, s.kp, g, k, job.tokens);
  s.ahead.fetch(s.lines);
  matmul<T>({x, s.row, 1}, {job.pv[i], k}, s.Xv, s.kp, g, k, job.tokens);
  s.ahead.fetch(s.lines);
  matmul<T>({job.M + i * g * g, g, 1}, {s.Xk, s.kp}, s.K, s.kp, g, k, g);
  s.ahead.fetch(s.lines);
  matmul<T>({job.N + i * g * g, job.across ? 1 : g, job.across ? g : 1}, {s.Xv, s.kp}, s.V, s.kp, g, k, g);
  s.ahead.fetch(s.lines);
}

// powers of two of the logits of tokens t0 on, less the largest of a token; 1 / their sums
template <typename T>
LOMACS_TARGET void attention_shares(const Attention<T>& job, const T* x, std::int64_t width, AttentionScratch<T>& s) {
  const std::int64_t k = job.k;
  matmul<T>({s.K, 1, s.kp}, {x, s.row}, s.L, strip_tokens, k, width, job.g);
  for (std::int64_t t = 0; t < width; t += lanes<T>) {
    T* const column = s.L + t;
    Vec<T> most = load(column);
    for (std::int64_t j = 1; j < k; ++j) {
      const Vec<T> x_j = load(column + j * strip_tokens);
      most = x_j > most ? x_j : most;
    }
    Vec<T> sum[2] = {};
    std::int64_t j = 0;
    for (; j + 2 <= k; j += 2)
#pragma GCC unroll 2
      for (int n = 0; n < 2; ++n) {
        T* p = column + (j + n) * strip_tokens;
        const Vec<T> e = exp2_of<T>(load(p) - most);
        store(p, e);
        sum[n] += e;
      }
    if (j < k) {
      const Vec<T> e = exp2_of<T>(load(column + j * strip_tokens) - most);
      store(column + j * strip_tokens, e);
      sum[0] += e;
    }
    store(s.sums + t, splat<T>(1) / (sum[0] + sum[1]));
  }
}

template <typename T>
LOMACS_TARGET void attention_forward(const Attention<T>& job, std::int64_t begin, std::int64_t end) {
  AttentionScratch<T> s;
  const Arena<T> arena([&](Arena<T>& a) { s.plan(job, false, a); });
  const std::int64_t g = job.g, d = job.d;
  for (std::int64_t n = begin; n < end; ++n) {
    const std::int64_t b = n / job.groups, i = n % job.groups, at = b * job.tokens * d + i * g;
    if (n == begin || i == 0) {
      attention_tokens(job, b, s);
      s.look_ahead(job, b, job.y, 6 * job.groups);
    }
    attention_keys(job, i, s);
    for (std::int64_t t0 = 0; t0 < s.row; t0 += strip_tokens) {
      const std::int64_t width = std::min(strip_tokens, s.row - t0);
      attention_shares(job, s.x + i * g * s.row + t0, width, s);
      s.ahead.fetch(s.lines);
      matmul<T>({s.V, s.kp, 1}, {s.L, strip_tokens}, s.out + t0, s.row, g, width, job.k);
      s.ahead.fetch(s.lines);
      for (std::int64_t c = 0; c < g; ++c)
        for (std::int64_t t = 0; t < width; t += lanes<T>) {
          T* p = s.out + c * s.row + t0 + t;
          store(p, load(p) * load(s.sums + t));
        }
    }
    rows_to_tokens(s.out, s.row, job.tokens, g, job.norm_weight == nullptr ? nullptr : job.x + at, job.y + at, d);
  }
}

template <typename T>
LOMACS_TARGET void attention_backward_sample(const Attention<T>& job, std::int64_t b, AttentionScratch<T>& s,
                                             const AttentionSums<T>& sums) {
  const std::int64_t g = job.g, d = job.d, k = job.k, tokens = job.tokens, at = b * tokens * d;
  const bool norm = job.norm_weight != nullptr, weights = sums.Pk != nullptr;
  const bool wanted = job.gx != nullptr || (norm && weights);
  attention_tokens(job, b, s);
  tokens_to_rows(job.gy + at, d, tokens, d, s.gy, s.row);
  s.look_ahead(job, b, job.gx, 10 * job.groups);
  const T* natural = job.x + at;
  if (norm) {
    rows_to_tokens(s.x, s.row, tokens, d, static_cast<const T*>(nullptr), s.natural, d);
    natural = s.natural;
  }
  for (std::int64_t i = 0; i < job.groups; ++i) {
    const T *x = s.x + i * g * s.row, *gy = s.gy + i * g * s.row;
    T* gx = s.gx + i * g * s.row;
    attention_keys(job, i, s);
    for (std::int64_t t0 = 0; t0 < s.row; t0 += strip_tokens) {
      const std::int64_t width = std::min(strip_tokens, s.row - t0), there = std::min(strip_tokens, tokens - t0);
      const std::int64_t from = at + t0 * d + i * g;
      attention_shares(job, x + t0, width, s);
      s.ahead.fetch(s.lines);
      matmul<T>({s.V, 1, s.kp}, {gy + t0, s.row}, s.dS, strip_tokens, k, width, g);
      s.ahead.fetch(s.lines);
      for (std::int64_t t = 0; t < width; t += lanes<T>) {
        const Vec<T> inverse = load(s.sums + t);
        Vec<T> dot[2] = {};
        for (std::int64_t j = 0; j < k; ++j) {
          T* p = s.L + j * strip_tokens + t;
          const Vec<T> share = load(p) * inverse;
          store(p, share);
          dot[j % 2] += share * load(s.dS + j * strip_tokens + t);
        }
        const Vec<T> mean = dot[0] + dot[1];
        for (std::int64_t j = 0; j < k; ++j) {
          T* p = s.dS + j * strip_tokens + t;
          store(p, load(s.L + j * strip_tokens + t) * splat(static_cast<T>(ln_2)) * (load(p) - mean));
        }
      }
      matmul<T>({s.L, strip_tokens, 1}, {job.gy + from, d}, s.dV, s.gp, k, g, there, t0 > 0);
      s.ahead.fetch(s.lines);
      matmul<T>({s.dS, strip_tokens, 1}, {natural + t0 * d + i * g, d}, s.dK, s.gp, k, g, there, t0 > 0);
      s.ahead.fetch(s.lines);
      if (wanted) matmul<T>({s.K, s.kp, 1}, {s.dS, strip_tokens}, gx + t0, s.row, g, width, k);
    }
    matmul<T>({s.dK, s.gp, 1}, {job.M + i * g * g, g}, s.dXk, s.gp, k, g, g);
    matmul<T>({s.dV, s.gp, 1}, {job.N + i * g * g, g}, s.dXv, s.gp, k, g, g);
    if (wanted) {
      matmul<T>({s.dXk, 1, s.gp}, {job.Pk + i * k * s.row, s.row}, gx, s.row, g, s.row, k, true);
      matmul<T>({s.dXv, 1, s.gp}, {job.Pv + i * k * s.row, s.row}, gx, s.row, g, s.row, k, true);
    }
    s.ahead.fetch(s.lines);
    if (weights) {
      matmul<T>({s.dXk, s.gp, 1}, {x, s.row}, sums.Pk + i * k * s.row, s.row, k, s.row, g, true);
      s.ahead.fetch(s.lines);
      matmul<T>({s.dXv, s.gp, 1}, {x, s.row}, sums.Pv + i * k * s.row, s.row, k, s.row, g, true);
      matmul<T>({s.Xk, s.kp, 1}, {s.dK, s.gp}, sums.M + i * g * g, g, g, g, k, true);
      matmul<T>({s.Xv, s.kp, 1}, {s.dV, s.gp}, sums.N + i * g * g, g, g, g, k, true);
    }
  }
  if (norm && wanted)
    normalise_backward(s.gx, s.row, s.plain, s.row, d, s.row, job.norm_weight, s.inverse, sums.weight, sums.bias);
  if (job.gx != nullptr)
    rows_to_tokens(s.gx, s.row, tokens, d, norm ? job.gy + at : nullptr, job.gx + at, d);
}

template <typename T>
LOMACS_TARGET void attention_backward(const Attention<T>& job, std::int64_t begin, std::int64_t end) {
  AttentionScratch<T> s;
  const Arena<T> arena([&](Arena<T>& a) { s.plan(job, true, a); });
  for (std::int64_t n = begin; n < end; ++n) {
    const AttentionSums<T> sums(job, n);
    if (sums.Pk != nullptr) std::memset(sums.Pk, 0, sizeof(T) * static_cast<std::size_t>(job.size_of_sums()));
    for (std::int64_t b = n * job.chunk; b < std::min((n + 1) * job.chunk, job.batch); ++b)
      attention_backward_sample(job, b, s, sums);
  }
}

// gradients of the weights of groups begin to end from the sums of all chunks
template <typename T>
LOMACS_TARGET void attention_weights(const Attention<T>& job, const AttentionGradients<T>& to, std::int64_t begin,
                                     std::int64_t end) {
  const std::int64_t g = job.g, a = job.a, k = job.k, tokens = job.tokens, row = vectors(tokens);
  const double scale = log2_e / std::sqrt(static_cast<double>(a));
  std::vector<T> plane(static_cast<std::size_t>(std::max(k * row, 3 * g * g)));
  T *transposed = plane.data() + g * g, *product = plane.data() + 2 * g * g;
  const AttentionSums<T> first(job, 0);
  const auto total = [&](const T* from, std::int64_t n, double factor) {
    sum_of_chunks(from, job.size_of_sums(), job.chunks(), n, factor, plane.data());
  };
  const auto transpose = [&](const T* from, T* out) {
    for (std::int64_t i = 0; i < g; ++i)
      for (std::int64_t j = 0; j < g; ++j) out[j * g + i] = from[i * g + j];
  };
  for (std::int64_t i = begin; i < end; ++i) {
    total(first.Pk + i * k * row, k * row, 1);
    rows_to_tokens(plane.data(), row, tokens, k, static_cast<const T*>(nullptr), to.pk[i], k);
    total(first.Pv + i * k * row, k * row, 1);
    rows_to_tokens(plane.data(), row, tokens, k, static_cast<const T*>(nullptr), to.pv[i], k);
    // the sums hold transposed gradients of Wq^T Wk and of Wo Wv
    total(first.M + i * g * g, g * g, scale);
    transpose(plane.data(), transposed);
    matmul<T>({job.wk[i], g, 1}, {plane.data(), g}, to.wq[i], g, a, g, g);
    matmul<T>({job.wq[i], g, 1}, {transposed, g}, to.wk[i], g, a, g, g);
    total(first.N + i * g * g, g * g, 1);
    transpose(plane.data(), transposed);
    matmul<T>({job.wo[i], 1, g}, {transposed, g}, to.wv[i], g, g, g, g);
    matmul<T>({job.wv[i], g, 1}, {plane.data(), g}, product, g, g, g, g);
    transpose(product, to.wo[i]);
  }
}

}  // namespace
}  // namespace LOMACS_ISA
}  // namespace lomacs
