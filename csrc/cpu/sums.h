// Sums over the samples of a batch, in an order that no number of threads changes: chunks of a fixed size,
// each summed in order, then the chunks in order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace lomacs {

// samples of a chunk: few enough chunks that their sums stay small, enough for many threads
inline std::int64_t chunk_of(std::int64_t B) { return std::max<std::int64_t>(1, (B + 31) / 32); }

// the same where sums are as large as weights: a few samples share them, but there are eight chunks at least
inline std::int64_t chunk_of_weights(std::int64_t B) {
  return std::max(chunk_of(B), std::min<std::int64_t>(4, B / 8));
}

// tasks of this many operations that are worth a thread: about 20 us
inline std::int64_t share_of(std::int64_t operations) {
  return std::max<std::int64_t>(1, (1 << 19) / std::max<std::int64_t>(1, operations));
}

// to[0..n) = factor times the sum over chunks, `stride` apart, in their order
template <typename T, typename R>
void sum_of_chunks(const T* from, std::int64_t stride, std::int64_t chunks, std::int64_t n, double factor, R* to) {
  constexpr std::int64_t width = 64;
  for (std::int64_t i = 0; i < n; i += width) {
    double total[width] = {};
    const std::int64_t count = std::min(width, n - i);
    for (std::int64_t c = 0; c < chunks; ++c) {
      const T* p = from + c * stride + i;
      if (count == width)
        for (std::int64_t j = 0; j < width; ++j) total[j] += static_cast<double>(p[j]);
      else
        for (std::int64_t j = 0; j < count; ++j) total[j] += static_cast<double>(p[j]);
    }
    for (std::int64_t j = 0; j < count; ++j) to[i + j] = static_cast<R>(factor * total[j]);
  }
}

}  // namespace lomacs
