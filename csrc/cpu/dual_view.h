// The dual view's projection: what it reads and writes, and its weights folded and transposed once a call.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace lomacs {

// Bilinear upsampling from n / 2 numbers to n, as torch does it: number i is (1 - share) low + share high.
struct Taps {
  std::vector<std::int64_t> low, high;
  std::vector<double> share;

  explicit Taps(std::int64_t n) {
    const std::int64_t half = n / 2;
    for (auto* places : {&low, &high}) places->reserve(static_cast<std::size_t>(n));
    share.reserve(static_cast<std::size_t>(n));
    for (std::int64_t i = 0; i < n; ++i) {
      const double scale = static_cast<double>(half) / static_cast<double>(n);
      const double centre = std::max((static_cast<double>(i) + 0.5) * scale - 0.5, 0.0);
      const std::int64_t at = std::min(static_cast<std::int64_t>(centre), half - 1);
      low.push_back(at);
      high.push_back(std::min(at + 1, half - 1));
      share.push_back(centre - static_cast<double>(at));
    }
  }
};

// X = Hd W1^T + A (P W2^T) + bias + pos: P holds the sums of 2x2 blocks, W2 what pooling and the columns'
// upsampling leave of the second half of the weight, A the rows' upsampling.
template <typename T>
struct Projection {
  std::int64_t M, N, d;
  const T* weight;
  Taps rows, columns;
  // (2N, d), (2 (N / 2), d), (M, d): the caller's or `own`; (d, 2 (N / 2))
  const T *w1t = nullptr, *w2t = nullptr, *base = nullptr;
  std::vector<T> w2, own;
  std::int64_t chunk = 1;

  Projection(const T* w, std::int64_t M, std::int64_t N, std::int64_t d)
      : M(M), N(N), d(d), weight(w), rows(M), columns(N), w2(static_cast<std::size_t>(d * narrow())) {
    std::vector<double> folded(static_cast<std::size_t>(narrow()));
    for (std::int64_t c = 0; c < d; ++c) {
      std::fill(folded.begin(), folded.end(), 0.0);
      const T* half = w + c * 4 * N + 2 * N;
      for (std::int64_t n = 0; n < N; ++n)
        for (std::int64_t part = 0; part < 2; ++part) {
          const double x = 0.25 * static_cast<double>(half[2 * n + part]), share = columns.share[at(n)];
          folded[at(2 * columns.low[at(n)] + part)] += (1 - share) * x;
          folded[at(2 * columns.high[at(n)] + part)] += share * x;
        }
      for (std::int64_t j = 0; j < narrow(); ++j) w2[at(c * narrow() + j)] = static_cast<T>(folded[at(j)]);
    }
  }

  // folded already, for the forward alone
  Projection(std::int64_t M, std::int64_t N, std::int64_t d, const T* raw, const T* pooled, const T* base)
      : M(M),
        N(N),
        d(d),
        weight(nullptr),
        rows(M),
        columns(0),
        w1t(raw),
        w2t(pooled),
        base(base) {}
  Projection(const Projection&) = delete;

  void forward(const T* bias, const T* pos) {
    own.resize(at((2 * N + narrow() + M) * d));
    T *first = own.data(), *second = first + 2 * N * d, *third = second + narrow() * d;
    const auto transpose = [&](const T* from, std::int64_t stride, std::int64_t columns, T* to) {
      for (std::int64_t c = 0; c < d; ++c)
        for (std::int64_t j = 0; j < columns; ++j) to[j * d + c] = from[c * stride + j];
    };
    transpose(weight, 4 * N, 2 * N, first);
    transpose(w2.data(), narrow(), narrow(), second);
    for (std::int64_t m = 0; m < M; ++m)
      for (std::int64_t c = 0; c < d; ++c) third[m * d + c] = bias[c] + pos[m * d + c];
    w1t = first, w2t = second, base = third;
  }

  static std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }
  // numbers in a row of P, and its rows
  std::int64_t narrow() const { return N / 2 * 2; }
  std::int64_t low() const { return M / 2; }
  // numbers of the sums of one chunk: of W1, of W2 and of pos
  std::int64_t sums() const { return d * 2 * N + d * narrow() + M * d; }
};

}  // namespace lomacs
