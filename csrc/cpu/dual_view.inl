// The projection of both views, sample by sample. Included inside isa.inl.
#include "matmul.inl"

namespace lomacs {
namespace LOMACS_ISA {
namespace {

template <typename T>
struct ProjectionScratch {
  std::vector<T> pooled, low, wide;

  explicit ProjectionScratch(const Projection<T>& job)
      : pooled(static_cast<std::size_t>(job.low() * job.narrow())),
        low(static_cast<std::size_t>(job.low() * job.d)),
        wide(static_cast<std::size_t>(job.low() * job.narrow())) {}
};

template <typename T, int... I>
LOMACS_INLINE Vec<T> sum_of_neighbours(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
  return LOMACS_SHUFFLE(T, a, b, (I / 2 * 4 + I % 2)...) + LOMACS_SHUFFLE(T, a, b, (I / 2 * 4 + I % 2 + 2)...);
}

// sums of the 2x2 blocks of an interleaved matrix, rows begin to end of them
template <typename T>
LOMACS_TARGET void pool(const Projection<T>& job, const T* x, std::int64_t begin, std::int64_t end, T* to) {
  const std::int64_t narrow = job.narrow();
  for (std::int64_t m = begin; m < end; ++m, to += narrow) {
    const T *p = x + 4 * m * job.N, *q = p + 2 * job.N;
    std::int64_t j = 0;
    for (; j + lanes<T> <= narrow; j += lanes<T>) {
      const Vec<T> a = load(p + 2 * j) + load(q + 2 * j);
      const Vec<T> b = load(p + 2 * j + lanes<T>) + load(q + 2 * j + lanes<T>);
      store(to + j, sum_of_neighbours<T>(a, b, Lanes<T>{}));
    }
    for (; j < narrow; ++j) {
      const std::int64_t i = 4 * (j / 2) + j % 2;
      to[j] = (p[i] + q[i]) + (p[i + 2] + q[i + 2]);
    }
  }
}

template <typename T, int... I>
LOMACS_INLINE Vec<T> doubled(Vec<T> a, std::integer_sequence<int, I...>) {
  return LOMACS_SHUFFLE(T, a, a, (I / 4 * 2 + I % 2)...);
}

template <typename T, int... I>
LOMACS_INLINE Vec<T> doubled_high(Vec<T> a, std::integer_sequence<int, I...>) {
  return LOMACS_SHUFFLE(T, a, a, (I / 4 * 2 + I % 2 + lanes<T> / 2)...);
}

// the adjoint of `pool`: every number to its four places, zero where no block reaches; plus `more` where there is some
template <bool MORE, typename T>
LOMACS_TARGET void spread(const Projection<T>& job, const T* from, const T* more, T* x) {
  const std::int64_t narrow = job.narrow(), row = 2 * job.N;
  for (std::int64_t m = 0; m < job.M; ++m, x += row, more += MORE ? row : 0) {
    const T* p = from + m / 2 * narrow;
    std::int64_t j = 0;
    if (m < 2 * job.low()) {
      if constexpr (lanes<T> >= 4)
        for (; j + lanes<T> <= narrow; j += lanes<T>) {
          const Vec<T> v = load(p + j);
          Vec<T> low = doubled<T>(v, Lanes<T>{}), high = doubled_high<T>(v, Lanes<T>{});
          if constexpr (MORE) low += load(more + 2 * j), high += load(more + 2 * j + lanes<T>);
          store(x + 2 * j, low);
          store(x + 2 * j + lanes<T>, high);
        }
      for (; j < narrow; ++j) {
        const std::int64_t i = 4 * (j / 2) + j % 2;
        x[i] = p[j] + (MORE ? more[i] : 0), x[i + 2] = p[j] + (MORE ? more[i + 2] : 0);
      }
    }
    for (j *= 2; j < row; ++j) x[j] = MORE ? more[j] : 0;
  }
}

// to = a + x u + y v
template <typename T>
LOMACS_TARGET void blend(const T* a, T x, const T* u, T y, const T* v, std::int64_t n, T* to) {
  std::int64_t j = 0;
  for (; j + lanes<T> <= n; j += lanes<T>)
    store(to + j, load(a + j) + splat(x) * load(u + j) + splat(y) * load(v + j));
  for (; j < n; ++j) to[j] = a[j] + x * u[j] + y * v[j];
}

// to += x u
template <typename T>
LOMACS_TARGET void add_times(T x, const T* u, std::int64_t n, T* to) {
  std::int64_t j = 0;
  for (; j + lanes<T> <= n; j += lanes<T>) store(to + j, load(to + j) + splat(x) * load(u + j));
  for (; j < n; ++j) to[j] += x * u[j];
}

// rows begin to end of the tokens. FETCH: meanwhile what `ahead` holds comes into the cache.
template <bool FETCH = false, typename T>
LOMACS_TARGET void project_rows(const Projection<T>& job, const T* Hd, std::int64_t begin, std::int64_t end, T* X,
                                ProjectionScratch<T>& s, Ahead* ahead = nullptr) {
  const std::int64_t d = job.d, narrow = job.narrow();
  const std::int64_t *low = job.rows.low.data(), *high = job.rows.high.data();
  const std::int64_t first = low[begin], count = high[end - 1] + 1 - first;
  pool(job, Hd, first, first + count, s.pooled.data());
  matmul<T>({s.pooled.data(), narrow, 1}, {job.w2t, d}, s.low.data(), d, count, d, narrow);
  for (std::int64_t m = begin; m < end; ++m) {
    const T share = static_cast<T>(job.rows.share[static_cast<std::size_t>(m)]);
    blend(job.base + m * d, 1 - share, s.low.data() + (low[m] - first) * d, share,
          s.low.data() + (high[m] - first) * d, d, X + m * d);
  }
  matmul<T, FETCH>({Hd + 2 * begin * job.N, 2 * job.N, 1}, {job.w1t, d}, X + begin * d, d, end - begin, d, 2 * job.N,
                   true, ahead);
}

// gHd where it is wanted, plus `more` where there is some, and this sample's part of the sums where they are; the
// first one begins them. FETCH: the products of the weight and of gHd bring into the cache what these two hold.
template <bool FETCH = false, typename T>
LOMACS_TARGET void project_sample_back(const Projection<T>& job, const T* gX, const T* Hd, const T* more, T* gHd,
                                       T* sums, bool first, ProjectionScratch<T>& s, Ahead* of_weight = nullptr,
                                       Ahead* of_channel = nullptr) {
  const std::int64_t M = job.M, N = job.N, d = job.d, narrow = job.narrow(), low = job.low();
  std::memset(s.low.data(), 0, sizeof(T) * static_cast<std::size_t>(low * d));
  for (std::int64_t m = 0; m < M; ++m) {
    const std::size_t i = static_cast<std::size_t>(m);
    const T share = static_cast<T>(job.rows.share[i]);
    add_times<T>(1 - share, gX + m * d, d, s.low.data() + job.rows.low[i] * d);
    add_times<T>(share, gX + m * d, d, s.low.data() + job.rows.high[i] * d);
  }
  if (sums != nullptr) {
    pool(job, Hd, 0, low, s.pooled.data());
    matmul<T, FETCH>({gX, 1, d}, {Hd, 2 * N}, sums, 2 * N, d, 2 * N, M, !first, of_weight);
    T *of_w2 = sums + d * 2 * N, *of_pos = of_w2 + d * narrow;
    matmul<T>({s.low.data(), 1, d}, {s.pooled.data(), narrow}, of_w2, narrow, d, narrow, low, !first);
    if (first) std::copy(gX, gX + M * d, of_pos);
    else add_times<T>(1, gX, M * d, of_pos);
  }
  if (gHd != nullptr) {
    matmul<T>({s.low.data(), d, 1}, {job.w2.data(), narrow}, s.wide.data(), narrow, low, narrow, d);
    if (more != nullptr) spread<true>(job, s.wide.data(), more, gHd);
    else spread<false>(job, s.wide.data(), more, gHd);
    matmul<T, FETCH>({gX, d, 1}, {job.weight, 4 * N}, gHd, 2 * N, M, 2 * N, d, true, of_channel);
  }
}

template <typename T>
LOMACS_TARGET void project_samples(const Projection<T>& job, const T* Hd, T* X, std::int64_t begin,
                                   std::int64_t end) {
  ProjectionScratch<T> scratch(job);
  for (std::int64_t b = begin; b < end; ++b)
    project_rows(job, Hd + 2 * b * job.M * job.N, 0, job.M, X + b * job.M * job.d, scratch);
}

template <typename T>
LOMACS_TARGET void project_chunks_back(const Projection<T>& job, const T* gX, const T* Hd, T* gHd, T* sums,
                                       std::int64_t B, std::int64_t begin, std::int64_t end) {
  ProjectionScratch<T> scratch(job);
  for (std::int64_t c = begin; c < end; ++c) {
    T* own = sums ? sums + c * job.sums() : nullptr;
    const std::int64_t from = c * job.chunk, stop = std::min(B, from + job.chunk);
    for (std::int64_t b = from; b < stop; ++b) {
      const std::int64_t at = 2 * b * job.M * job.N;
      const T* none = nullptr;
      project_sample_back(job, gX + b * job.M * job.d, Hd + at, none, gHd ? gHd + at : nullptr, own, b == from, scratch);
    }
  }
}

}  // namespace
}  // namespace LOMACS_ISA
}  // namespace lomacs
