// The heads of the network, strip by strip of their outputs: no number of a weight or of a gradient is read twice.
// Included inside isa.inl.
#include "tokens.inl"

namespace lomacs {
namespace LOMACS_ISA {
namespace {

// strips begin to end of the results
template <typename T>
LOMACS_TARGET void heads_forward(const Heads<T>& job, const T* feat, std::int64_t begin, std::int64_t end) {
  const std::int64_t d = job.d;
  // the strip's weights transposed, and as a last row its bias, which the features' column of ones meets
  const Memory<T> memory((d + 1) * head_strip);
  for (std::int64_t n = begin; n < end; ++n) {
    const HeadStrip strip = job.strip(n);
    const Head<T>& head = job.heads[strip.head];
    tokens_to_rows(head.weight + strip.from * d, d, strip.width, d, memory.p, head_strip);
    std::copy(head.bias + strip.from, head.bias + strip.from + strip.width, memory.p + d * head_strip);
    // what is written lies in as many pages as there are rows, which nothing but this fetches ahead
    constexpr std::int64_t some = 48;
    Ahead ahead;
    const auto add = [&](const T* p, std::int64_t rows, std::int64_t width, std::int64_t row) {
      ahead.add(p, sizeof(T) * static_cast<std::size_t>(width), rows, sizeof(T) * static_cast<std::size_t>(row));
    };
    if (n + 1 < end) {
      const HeadStrip next = job.strip(n + 1);
      add(job.heads[next.head].weight + next.from * d, 1, next.width * d, 0);
    }
    add(head.out + strip.from, job.batch, strip.width, head.size);
    const std::int64_t lines = strip.width * static_cast<std::int64_t>(sizeof(T)) / 64 + 1;
    for (std::int64_t b = 0; b < job.batch; b += some) {
      ahead.fetch(2 * some * lines);
      T* out = head.out + strip.from + b * head.size;
      matmul<T>({feat + b * (d + 1), d + 1, 1}, {memory.p, head_strip}, out, head.size, std::min(some, job.batch - b),
                strip.width, d + 1);
    }
  }
}

// to (batch x width) = the strip of g, and the sums of its columns in short chains
template <typename T>
LOMACS_TARGET void head_columns_of(const T* g, std::int64_t row, std::int64_t batch, std::int64_t width, T* to,
                                   T* sums) {
  constexpr std::int64_t chain = 16;
  std::int64_t j = 0;
  for (; j + lanes<T> <= width; j += lanes<T>) {
    Vec<T> total{};
    for (std::int64_t b = 0; b < batch; b += chain) {
      Vec<T> part{};
      for (std::int64_t i = b; i < std::min(batch, b + chain); ++i) {
        const Vec<T> x = load(g + i * row + j);
        store(to + i * head_strip + j, x);
        part += x;
      }
      total += part;
    }
    if (sums != nullptr) store(sums + j, total);
  }
  for (; j < width; ++j) {
    T total = 0;
    for (std::int64_t b = 0; b < batch; b += chain) {
      T part = 0;
      for (std::int64_t i = b; i < std::min(batch, b + chain); ++i) part += to[i * head_strip + j] = g[i * row + j];
      total += part;
    }
    if (sums != nullptr) sums[j] = total;
  }
}

// parts begin to end, each some strips in order: gradients of their weights, and the part's share of the features'
template <typename T>
LOMACS_TARGET void heads_backward(const Heads<T>& job, std::int64_t begin, std::int64_t end) {
  const std::int64_t d = job.d, batch = job.batch;
  const Memory<T> memory(batch * head_strip);
  for (std::int64_t part = begin; part < end; ++part) {
    const std::int64_t first = job.first(part), stop = job.first(part + 1);
    for (std::int64_t n = first; n < stop; ++n) {
      const HeadStrip strip = job.strip(n);
      const Head<T>& head = job.heads[strip.head];
      T* bias = head.gbias == nullptr ? nullptr : head.gbias + strip.from;
      head_columns_of(head.g + strip.from, head.size, batch, strip.width, memory.p, bias);
      if (head.gweight != nullptr)
        matmul<T>({memory.p, 1, head_strip}, {job.feat, d}, head.gweight + strip.from * d, d, strip.width, d, batch);
      if (job.gfeat != nullptr)
        matmul<T>({memory.p, head_strip, 1}, {head.weight + strip.from * d, d}, job.gfeat + part * batch * d, d, batch,
                  d, strip.width, n > first);
    }
  }
}

// features of samples begin to end
template <typename T>
LOMACS_TARGET void pooled_features(const Pooled<T>& job, std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t chain = 16;
  const std::int64_t d = job.d, tokens = job.tokens;
  const Memory<T> sums(vectors(d));
  for (std::int64_t b = begin; b < end; ++b) {
    const T* x = job.x + b * tokens * d;
    for (std::int64_t j = 0; j < d; j += lanes<T>) {
      const std::int64_t width = std::min<std::int64_t>(lanes<T>, d - j);
      const Tail<T> tail(width % lanes<T>);
      Vec<T> total{};
      for (std::int64_t t = 0; t < tokens;) {
        Vec<T> part{};
        for (const std::int64_t stop = std::min(t + chain, tokens); t < stop; ++t)
          part += width == lanes<T> ? load(x + t * d + j) : tail.load(x + t * d + j);
        total += part;
      }
      store(sums.p + j, total / splat(static_cast<T>(tokens)));
    }
    double mean = 0, square = 0;
    for (std::int64_t k = 0; k < d; ++k) mean += static_cast<double>(sums.p[k]);
    mean /= static_cast<double>(d);
    for (std::int64_t k = 0; k < d; ++k) {
      const double x = static_cast<double>(sums.p[k]) - mean;
      square += x * x;
    }
    const double rate = 1 / std::sqrt(square / static_cast<double>(d) + job.eps);
    job.rate[b] = static_cast<T>(rate);
    T *unit = job.unit + b * d, *feat = job.feat + b * d, *row = job.with_ones + b * (d + 1);
    const T* scene = job.table + job.scene[b] * d;
    for (std::int64_t k = 0; k < d; ++k) {
      unit[k] = static_cast<T>((static_cast<double>(sums.p[k]) - mean) * rate);
      feat[k] = row[k] = job.norm_weight[k] * unit[k] + job.norm_bias[k] + scene[k];
    }
    row[d] = 1;
  }
}

// gradients of the tokens, which are the same for all of a sample, from those of the features
template <typename T>
LOMACS_TARGET void pooled_gradients(const Pooled<T>& job, std::int64_t begin, std::int64_t end) {
  const std::int64_t d = job.d;
  const Memory<T> row(d);
  for (std::int64_t b = begin; b < end; ++b) {
    const T *g = job.gfeat + b * d, *unit = job.unit + b * d;
    double mean = 0, along = 0;
    for (std::int64_t k = 0; k < d; ++k) {
      const double x = static_cast<double>(g[k] * job.norm_weight[k]);
      mean += x;
      along += x * static_cast<double>(unit[k]);
    }
    mean /= static_cast<double>(d), along /= static_cast<double>(d);
    const double rate = static_cast<double>(job.rate[b]) / static_cast<double>(job.tokens);
    for (std::int64_t k = 0; k < d; ++k)
      row.p[k] = static_cast<T>(
          rate * (static_cast<double>(g[k] * job.norm_weight[k]) - mean - along * static_cast<double>(unit[k])));
    T* to = job.gx + b * job.tokens * d;
    for (std::int64_t t = 0; t < job.tokens; ++t) std::copy(row.p, row.p + d, to + t * d);
  }
}

}  // namespace
}  // namespace LOMACS_ISA
}  // namespace lomacs
