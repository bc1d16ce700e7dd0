// The gated convolution and its gradients, sample by sample. Included inside isa.inl.
// Channels are rows and tokens lie along vectors, with zeros on both sides: a tap is a shifted load.
#include "tokens.inl"

namespace lomacs {
namespace LOMACS_ISA {
namespace {

template <typename T>
struct ConvScratch : TokensAhead<T> {
  // d x tokens between margins: the input of the taps; without them: before the norm's weight
  T *x, *plain, *inverse;
  // d x tokens: the gated product, the result
  T *h, *out;
  // backward: values and gates, gradients of y and x; gradients of a value and of a gate between margins
  T *value, *gate, *gy, *gx, *dvalue = nullptr, *dgate = nullptr;
  std::int64_t row, margin, wide;

  LOMACS_TARGET void plan(const GatedConv<T>& job, bool backward, Arena<T>& arena) {
    row = vectors(job.tokens), margin = vectors(job.taps / 2), wide = row + 2 * margin;
    x = arena.take(job.d * wide) + margin;
    plain = job.norm_weight == nullptr ? nullptr : arena.take(job.d * row);
    inverse = arena.take(row);
    h = arena.take(job.d * row);
    out = backward ? nullptr : arena.take(job.d * row);
    if (!backward) return;
    for (T** p : {&value, &gate, &gy, &gx}) *p = arena.take(job.d * row);
    dvalue = arena.take(wide) + margin;
    dgate = arena.take(wide) + margin;
  }

  // no sample writes there
  LOMACS_TARGET void clear_margins(std::int64_t d) {
    const auto clear = [&](T* row_of) {
      std::fill(row_of - margin, row_of, T(0));
      std::fill(row_of + row, row_of + row + margin, T(0));
    };
    for (std::int64_t c = 0; c < d; ++c) clear(x + c * wide);
    if (dvalue == nullptr) return;
    clear(dvalue);
    clear(dgate);
  }
};

// tokens beyond the last
template <typename T>
LOMACS_TARGET void clear_beyond(const GatedConv<T>& job, T* x, std::int64_t row, const ConvScratch<T>& s) {
  for (std::int64_t c = 0; c < job.d; ++c)
    for (std::int64_t t = job.tokens; t < s.row; ++t) x[c * row + t] = 0;
}

template <typename T>
LOMACS_TARGET void conv_tokens(const GatedConv<T>& job, std::int64_t b, ConvScratch<T>& s) {
  const T* x = job.x + b * job.tokens * job.d;
  if (job.norm_weight == nullptr) return tokens_to_rows(x, job.d, job.tokens, job.d, s.x, s.wide);
  tokens_to_rows(x, job.d, job.tokens, job.d, s.plain, s.row);
  normalise(s.plain, s.row, job.d, s.row, job.norm_weight, job.norm_bias, static_cast<T>(job.eps), s.inverse, s.x,
            s.wide);
  // the bias fell there too
  clear_beyond(job, s.x, s.wide, s);
}

// output j of the depthwise convolution at tokens t on, U vectors of them
template <int U, typename T>
LOMACS_INLINE void depthwise(const GatedConv<T>& job, const T* x, std::int64_t j, Vec<T> (&y)[U]) {
  const T* w = job.dw_weight + j * job.taps;
#pragma GCC unroll 4
  for (int u = 0; u < U; ++u) y[u] = splat(job.dw_bias[j]);
#pragma GCC unroll 1
  for (std::int64_t n = 0; n < job.taps; ++n) {
    const Vec<T> tap = splat(w[n]);
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) y[u] += tap * load(x + n + u * lanes<T>);
  }
}

template <bool KEEP, int U, typename T>
LOMACS_INLINE void gated(const GatedConv<T>& job, std::int64_t c, std::int64_t t, ConvScratch<T>& s) {
  const std::int64_t d = job.d, half = job.taps / 2;
  Vec<T> a[U], b[U];
  depthwise<U>(job, s.x + c / 2 * s.wide + t - half, c, a);
  depthwise<U>(job, s.x + (d + c) / 2 * s.wide + t - half, d + c, b);
#pragma GCC unroll 4
  for (int u = 0; u < U; ++u) {
    const Vec<T> open = sigmoid_of<T>(b[u]);
    const std::int64_t at = c * s.row + t + u * lanes<T>;
    store(s.h + at, a[u] * open);
    if constexpr (KEEP) {
      store(s.value + at, a[u]);
      store(s.gate + at, open);
    }
  }
}

template <bool KEEP, typename T>
LOMACS_TARGET __attribute__((noinline)) void conv_gate(const GatedConv<T>& job, ConvScratch<T>& s) {
  for (std::int64_t c = 0; c < job.d; ++c) {
    std::int64_t t = 0;
    for (; t + 4 * lanes<T> <= s.row; t += 4 * lanes<T>) gated<KEEP, 4>(job, c, t, s);
    for (; t < s.row; t += lanes<T>) gated<KEEP, 1>(job, c, t, s);
    s.ahead.fetch(s.lines);
  }
}

template <typename T>
LOMACS_TARGET void conv_forward(const GatedConv<T>& job, std::int64_t begin, std::int64_t end) {
  ConvScratch<T> s;
  const Arena<T> arena([&](Arena<T>& a) { s.plan(job, false, a); });
  s.clear_margins(job.d);
  const std::int64_t d = job.d;
  for (std::int64_t b = begin; b < end; ++b) {
    const std::int64_t at = b * job.tokens * d;
    conv_tokens(job, b, s);
    s.look_ahead(job, b, job.y, 2 * d);
    conv_gate<false>(job, s);
    for (std::int64_t c = 0; c < d; ++c) {
      for (std::int64_t t = 0; t < s.row; t += lanes<T>) store(s.out + c * s.row + t, splat(job.pw_bias[c]));
      s.ahead.fetch(s.lines);
    }
    matmul<T>({job.pw_weight, d, 1}, {s.h, s.row}, s.out, s.row, d, s.row, d, true);
    rows_to_tokens(s.out, s.row, job.tokens, d, job.norm_weight == nullptr ? nullptr : job.x + at, job.y + at, d);
  }
}

// From the gradient e of output j, between margins: that of input row q, and the sums of the taps and the bias.
template <typename T>
LOMACS_TARGET void depthwise_backward(const GatedConv<T>& job, ConvScratch<T>& s, const ConvSums<T>& sums,
                                      const T* e, std::int64_t j, bool wanted) {
  const std::int64_t taps = job.taps, half = taps / 2, q = j / 2;
  const T *w = job.dw_weight + j * taps, *x = s.x + q * s.wide;
  T* gx = s.gx + q * s.row;
  if (wanted)
    for (std::int64_t t = 0; t < s.row; t += lanes<T>) {
      // the first of the two outputs that read this input
      Vec<T> total = j % 2 ? load(gx + t) : Vec<T>{};
      for (std::int64_t n = 0; n < taps; ++n) total += splat(w[n]) * load(e + t + half - n);
      store(gx + t, total);
    }
  if (sums.dw_weight == nullptr) return;
  Vec<T> bias{};
  for (std::int64_t t = 0; t < s.row; t += lanes<T>) bias += load(e + t);
  T* to = sums.dw_bias + 16 * j;
  store(to, load(to) + bias);
  for (std::int64_t n = 0; n < taps; ++n) {
    Vec<T> total{};
    for (std::int64_t t = 0; t < s.row; t += lanes<T>) total += load(e + t) * load(x + t + n - half);
    to = sums.dw_weight + 16 * (j * taps + n);
    store(to, load(to) + total);
  }
}

template <typename T>
LOMACS_TARGET void conv_backward_sample(const GatedConv<T>& job, std::int64_t b, ConvScratch<T>& s,
                                        const ConvSums<T>& sums) {
  const std::int64_t d = job.d, at = b * job.tokens * d;
  const bool norm = job.norm_weight != nullptr, weights = sums.dw_weight != nullptr;
  const bool wanted = job.gx != nullptr || (norm && weights);
  conv_tokens(job, b, s);
  s.look_ahead(job, b, job.gx, 3 * d);
  conv_gate<true>(job, s);
  tokens_to_rows(job.gy + at, d, job.tokens, d, s.gy, s.row);
  if (weights) {
    matmul<T>({s.h, s.row, 1}, {job.gy + at, d}, sums.pw_weight, vectors(d), d, d, job.tokens, true);
    for (std::int64_t c = 0; c < d; ++c) {
      T* to = sums.pw_bias + 16 * c;
      Vec<T> total = load(to);
      for (std::int64_t t = 0; t < s.row; t += lanes<T>) total += load(s.gy + c * s.row + t);
      store(to, total);
    }
  }
  matmul<T>({job.pw_weight, 1, d}, {s.gy, s.row}, s.h, s.row, d, s.row, d);
  for (std::int64_t c = 0; c < d; ++c) {
    for (std::int64_t t = 0; t < s.row; t += lanes<T>) {
      const std::int64_t n = c * s.row + t;
      const Vec<T> e = load(s.h + n), open = load(s.gate + n);
      store(s.dvalue + t, e * open);
    }
    depthwise_backward(job, s, sums, s.dvalue, c, wanted);
    s.ahead.fetch(s.lines);
  }
  for (std::int64_t c = 0; c < d; ++c) {
    for (std::int64_t t = 0; t < s.row; t += lanes<T>) {
      const std::int64_t n = c * s.row + t;
      const Vec<T> open = load(s.gate + n);
      store(s.dgate + t, load(s.h + n) * load(s.value + n) * open * (splat<T>(1) - open));
    }
    depthwise_backward(job, s, sums, s.dgate, d + c, wanted);
    s.ahead.fetch(s.lines);
  }
  if (norm && wanted) {
    // taps reach there
    clear_beyond(job, s.gx, s.row, s);
    normalise_backward(s.gx, s.row, s.plain, s.row, d, s.row, job.norm_weight, s.inverse, sums.weight, sums.bias);
  }
  if (job.gx != nullptr) rows_to_tokens(s.gx, s.row, job.tokens, d, norm ? job.gy + at : nullptr, job.gx + at, d);
}

template <typename T>
LOMACS_TARGET void conv_backward(const GatedConv<T>& job, std::int64_t begin, std::int64_t end) {
  ConvScratch<T> s;
  const Arena<T> arena([&](Arena<T>& a) { s.plan(job, true, a); });
  s.clear_margins(job.d);
  for (std::int64_t n = begin; n < end; ++n) {
    const ConvSums<T> sums(job, n);
    if (job.sums != nullptr)
      std::memset(sums.pw_weight, 0, sizeof(T) * static_cast<std::size_t>(job.size_of_sums()));
    for (std::int64_t b = n * job.chunk; b < std::min((n + 1) * job.chunk, job.batch); ++b)
      conv_backward_sample(job, b, s, sums);
  }
}

}  // namespace
}  // namespace LOMACS_ISA
}  // namespace lomacs
