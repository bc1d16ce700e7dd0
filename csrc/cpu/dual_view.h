// The dual view's projection: what it reads and writes, and its weights folded and transposed once a call.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "sums.h"
#include "tensors.h"

namespace lomacs {

// Bilinear upsampling from n / 2 numbers to n, as torch does it: number i is (1 - share) low + share high.
struct Taps {
  std::vector<std::int64_t> low, high;
  std::vector<double> share;

  explicit Taps(std::int64_t n)
      : low(static_cast<std::size_t>(n)), high(static_cast<std::size_t>(n)), share(static_cast<std::size_t>(n)) {
    const std::int64_t half = n / 2;
    const double scale = static_cast<double>(half) / static_cast<double>(n);
    for (std::int64_t i = 0; i < n; ++i) {
      const double centre = std::max((static_cast<double>(i) + 0.5) * scale - 0.5, 0.0);
      const std::int64_t at = std::min(static_cast<std::int64_t>(centre), half - 1);
      const auto place = static_cast<std::size_t>(i);
      low[place] = at, high[place] = std::min(at + 1, half - 1), share[place] = centre - static_cast<double>(at);
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
    // scattered, a hundred times as long as the same number of operations on vectors
    torch::stable::parallel_for(0, d, share_of(200 * N), [&](std::int64_t begin, std::int64_t end) {
      std::vector<double> folded(static_cast<std::size_t>(narrow()));
      for (std::int64_t c = begin; c < end; ++c) {
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
    });
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
    torch::stable::parallel_for(0, d, share_of(200 * N), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t c = begin; c < end; ++c) {
        for (std::int64_t j = 0; j < 2 * N; ++j) first[j * d + c] = weight[c * 4 * N + j];
        for (std::int64_t j = 0; j < narrow(); ++j) second[j * d + c] = w2[at(c * narrow() + j)];
      }
    });
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

// Gradients of weight, bias and pos from the sums of all chunks.
template <typename T>
void projection_gradients(const Projection<T>& job, const T* partial, std::int64_t chunks, T* gweight, T* gbias,
                          T* gpos) {
  const std::int64_t M = job.M, N = job.N, d = job.d, narrow = job.narrow(), count = job.sums();
  const std::int64_t w2 = d * 2 * N, pos = w2 + d * narrow;
  const auto shared = [&](std::int64_t rows, std::int64_t width, const auto& work) {
    torch::stable::parallel_for(0, rows, share_of(chunks * width), work);
  };
  shared(d, 2 * N + narrow, [&](std::int64_t begin, std::int64_t end) {
    std::vector<double> own(static_cast<std::size_t>(2 * N + narrow));
    double *raw = own.data(), *folded = raw + 2 * N;
    for (std::int64_t c = begin; c < end; ++c) {
      sum_of_chunks(partial + c * 2 * N, count, chunks, 2 * N, 1, raw);
      sum_of_chunks(partial + w2 + c * narrow, count, chunks, narrow, 1, folded);
      T* row = gweight + c * 4 * N;
      for (std::int64_t j = 0; j < 2 * N; ++j) row[j] = static_cast<T>(raw[j]);
      for (std::int64_t n = 0; n < N; ++n)
        for (std::int64_t part = 0; part < 2; ++part) {
          const std::size_t i = static_cast<std::size_t>(n);
          const double share = job.columns.share[i];
          const double low = folded[2 * job.columns.low[i] + part], high = folded[2 * job.columns.high[i] + part];
          row[2 * N + 2 * n + part] = static_cast<T>(0.25 * ((1 - share) * low + share * high));
        }
    }
  });
  std::vector<double> of_pos(static_cast<std::size_t>(M * d));
  shared(M, d, [&](std::int64_t begin, std::int64_t end) {
    sum_of_chunks(partial + pos + begin * d, count, chunks, (end - begin) * d, 1, of_pos.data() + begin * d);
  });
  std::vector<double> bias(static_cast<std::size_t>(d));
  for (std::int64_t i = 0; i < M * d; ++i) {
    gpos[i] = static_cast<T>(of_pos[static_cast<std::size_t>(i)]);
    bias[static_cast<std::size_t>(i % d)] += of_pos[static_cast<std::size_t>(i)];
  }
  for (std::int64_t c = 0; c < d; ++c) gbias[c] = static_cast<T>(bias[static_cast<std::size_t>(c)]);
}

}  // namespace lomacs
