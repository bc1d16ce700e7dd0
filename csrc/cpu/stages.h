// The stems as stages of one visit: each is prepared once a call and then run by any thread on a few samples
// whose arrays are its own. Defined beside the ops that they are taken from; for float and double.
#pragma once

#include <cstdint>
#include <functional>

#include "team.h"

namespace lomacs {

template <typename T>
struct FrontWeights {
  std::int64_t M, N, d, row_hidden, col_hidden;
  // (hidden, n) and (n, hidden) a side
  const T *row_w1, *row_w2, *col_w1, *col_w2;
  // the projection's halves, transposed, the second folded to the sums of 2x2 blocks: (2N, d), (2 (N / 2), d);
  // position and bias (M, d)
  const T *raw, *pooled, *pos;
  double temperature;
};

template <typename T>
struct AttentionWeights {
  std::int64_t tokens, d, groups, k;
  // Wq^T Wk / sqrt(a) and Wv^T Wo^T (groups, g, g); (groups, tokens, k)
  const T *norm_weight, *norm_bias, *score, *mix, *pk, *pv;
  double eps;
};

template <typename T>
struct ConvWeights {
  std::int64_t tokens, d, taps;
  const T *norm_weight, *norm_bias, *dw_weight, *dw_bias, *pw_weight, *pw_bias;
  double eps;
};

// Channels (M, N, 2) of any scale to the gated ones at unit norm, their norms, and tokens (M, d).
template <typename T>
struct FrontStage {
  // n samples
  std::function<void(const T* H, std::int64_t n, T* Hd, T* norms, T* X)> run;
  // one sample in two steps, the second for rows begin to end
  std::function<void(const T* H, T* Hd, T* norm)> gate;
  std::function<void(const T* Hd, std::int64_t begin, std::int64_t end, T* X)> project;
};
// x + mixer(norm(x)) of parts begin to end of samples' tokens, each sample in so many parts; y is not x
template <typename T>
struct BlockStage {
  std::int64_t parts;
  std::function<void(const T* x, std::int64_t begin, std::int64_t end, T* y)> run;
};
// raw columns and predicted spectrum to the factors: normalised, sorted, refined, calibrated on Hd; a single sample
// may be shared by a team
template <typename T>
using TailStage = std::function<void(const T* U, const T* V, const T* S, const T* Hd, std::int64_t n, T* oU, T* oS,
                                T* oV, Team* team)>;

namespace stages {

template <typename T>
FrontStage<T> front(const FrontWeights<T>& w);
template <typename T>
BlockStage<T> attention(const AttentionWeights<T>& w);
template <typename T>
BlockStage<T> conv(const ConvWeights<T>& w);
template <typename T>
TailStage<T> tail(std::int64_t M, std::int64_t N, std::int64_t r, double a, double b, double tau);

}  // namespace stages
}  // namespace lomacs
