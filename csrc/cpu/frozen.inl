// The heads of a few samples: mean over tokens, norm, one product a head. Included inside isa.inl.
#include "matmul.inl"

namespace lomacs {
namespace LOMACS_ISA {
namespace {

// feat = (mean over tokens - its mean) / its deviation, a row a sample
template <typename T>
LOMACS_TARGET void features(const T* X, std::int64_t n, std::int64_t tokens, std::int64_t d, double eps, T* feat) {
  for (std::int64_t b = 0; b < n; ++b, X += tokens * d, feat += d) {
    std::fill(feat, feat + d, T(0));
    // short chains: the mean of many tokens keeps its digits
    for (std::int64_t t = 0; t < tokens; t += 8) {
      const std::int64_t stop = std::min<std::int64_t>(8, tokens - t);
      std::int64_t j = 0;
      for (; j + lanes<T> <= d; j += lanes<T>) {
        Vec<T> part{};
        for (std::int64_t i = 0; i < stop; ++i) part += load(X + (t + i) * d + j);
        store(feat + j, load(feat + j) + part);
      }
      for (; j < d; ++j) {
        T part = 0;
        for (std::int64_t i = 0; i < stop; ++i) part += X[(t + i) * d + j];
        feat[j] += part;
      }
    }
    double mean = 0, square = 0;
    for (std::int64_t j = 0; j < d; ++j) mean += static_cast<double>(feat[j]);
    mean /= static_cast<double>(d);
    for (std::int64_t j = 0; j < d; ++j) {
      const double x = static_cast<double>(feat[j]) - mean;
      square += x * x;
    }
    // sums over tokens, not means: their count is divided out here
    const double count = static_cast<double>(tokens);
    const double scale = 1 / std::sqrt(square / static_cast<double>(d) + eps * count * count);
    for (std::int64_t j = 0; j < d; ++j) feat[j] = static_cast<T>((static_cast<double>(feat[j]) - mean) * scale);
  }
}

// out (n, width) = bias of every sample's scene + feat (n, d) times `width` columns of head from `from` on
template <typename T>
LOMACS_TARGET void head_product(const T* feat, const T* head, const T* table, const std::int64_t* scene,
                                std::int64_t n, std::int64_t d, std::int64_t all, std::int64_t from,
                                std::int64_t width, T* out) {
  for (std::int64_t b = 0; b < n; ++b)
    std::memcpy(out + b * width, table + scene[b] * all + from, sizeof(T) * static_cast<std::size_t>(width));
  matmul<T>({feat, d, 1}, {head + from, all}, out, width, n, width, d, true);
}

// Columns from to end of one sample's row of `all`, as head_product gives them, each row of head read along its
// length: a product's tiles would wait for 64 numbers of every row in turn, which no prefetcher foresees.
template <typename T>
LOMACS_TARGET void head_columns(const T* feat, const T* head, const T* bias, std::int64_t d, std::int64_t all,
                                std::int64_t from, std::int64_t end, T* out) {
  constexpr int together = 8;
  for (std::int64_t k = 0; k < d; k += together) {
    const int rows = static_cast<int>(std::min<std::int64_t>(together, d - k));
    const bool first = k == 0, last = k + together >= d;
    const T* w = head + k * all;
    std::int64_t j = from;
    if (rows == together) {
      Vec<T> x[together];
#pragma GCC unroll 8
      for (int n = 0; n < together; ++n) x[n] = splat(feat[k + n]);
      for (; j + lanes<T> <= end; j += lanes<T>) {
        Vec<T> sum = first ? Vec<T>{} : load(out + j);
#pragma GCC unroll 8
        for (int n = 0; n < together; ++n) sum += x[n] * load(w + n * all + j);
        store(out + j, last ? sum + load(bias + j) : sum);
      }
    }
    for (; j < end; ++j) {
      T sum = first ? T(0) : out[j];
      for (int n = 0; n < rows; ++n) sum += feat[k + n] * w[n * all + j];
      out[j] = last ? sum + bias[j] : sum;
    }
  }
}

}  // namespace
}  // namespace LOMACS_ISA
}  // namespace lomacs
