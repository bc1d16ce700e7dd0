// Value and gradients of the low-rank objective. Included inside isa.inl.
#include "cmatmul.inl"
#include "panels.inl"

namespace lomacs {
namespace LOMACS_ISA {
namespace {

template <typename T>
struct OfComplex {
  using Number = T;
  using Planar = Panels<T>;
  using Product = Term<T>;
  static constexpr int parts = 2, rows = LOMACS_ROWS;
};

template <typename T>
struct OfReal {
  using Number = T;
  using Planar = RealPanels<T>;
  using Product = RealTerm<T>;
  static constexpr int parts = 1, rows = real_rows;
};

// rows, or columns, of H that are visited together, and the length of a chain of sums
constexpr std::int64_t strip = 128, chain = 128;

// c = product, or c += product
template <typename T>
struct ToSums {
  T* c;
  std::int64_t columns;
  bool add;

  template <int R, int V>
  LOMACS_INLINE void take(Vec<T> (&re)[R][V], Vec<T> (&im)[R][V], std::int64_t i0, std::int64_t vec) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) {
        const std::int64_t column = (vec + j) * lanes<T>;
        T* p = c + 2 * ((i0 + i) * columns + column);
        Vec<T> before_re{}, before_im{};
        if (add) load_complex(p, columns - column, before_re, before_im);
        store_complex(p, columns - column, before_re + re[i][j], before_im + im[i][j]);
      }
  }
  template <int R, int V>
  LOMACS_INLINE void take(Vec<T> (&x)[R][V], std::int64_t i0, std::int64_t vec) {
#pragma GCC unroll 12
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < V; ++j) {
        const std::int64_t column = (vec + j) * lanes<T>;
        T* p = c + (i0 + i) * columns + column;
        const Vec<T> before = add ? load_real(p, columns - column) : Vec<T>{};
        store_real(p, columns - column, before + x[i][j]);
      }
  }
};

// the same to panels
template <typename K>
struct ToPanelSums {
  using T = typename K::Number;
  typename K::Planar c;
  bool add;

  template <int R, int V>
  LOMACS_INLINE void take(Vec<T> (&re)[R][V], Vec<T> (&im)[R][V], std::int64_t i0, std::int64_t vec) {
    take(re, i0, vec, 0);
    take(im, i0, vec, K::Planar::imag);
  }
  template <int R, int V>
  LOMACS_INLINE void take(Vec<T> (&x)[R][V], std::int64_t i0, std::int64_t vec, std::int64_t offset = 0) {
    T* p = c.at(i0, vec) + offset;
#pragma GCC unroll 12
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) {
        T* to = p + i * K::Planar::step + j * lanes<T>;
        store(to, add ? load(to) + x[i][j] : x[i][j]);
      }
  }
};

// c = product + x diag(weights)
template <typename T>
struct ToWeighted {
  T* c;
  const T *x, *weights;
  std::int64_t columns;

  template <int R, int V>
  LOMACS_INLINE void take(Vec<T> (&re)[R][V], Vec<T> (&im)[R][V], std::int64_t i0, std::int64_t vec) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) {
        const std::int64_t column = (vec + j) * lanes<T>, at = 2 * ((i0 + i) * columns + column);
        const Vec<T> weight = load(weights + column);
        Vec<T> xr, xi;
        load_complex(x + at, columns - column, xr, xi);
        store_complex(c + at, columns - column, re[i][j] + weight * xr, im[i][j] + weight * xi);
      }
  }
  template <int R, int V>
  LOMACS_INLINE void take(Vec<T> (&y)[R][V], std::int64_t i0, std::int64_t vec) {
#pragma GCC unroll 12
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < V; ++j) {
        const std::int64_t column = (vec + j) * lanes<T>, at = (i0 + i) * columns + column;
        const Vec<T> before = load_real(x + at, columns - column);
        store_real(c + at, columns - column, y[i][j] + load(weights + column) * before);
      }
  }
};

// x diag(weights)
template <int PARTS, typename T>
LOMACS_TARGET void weigh(const T* x, const T* weights, std::int64_t rows, std::int64_t columns, T* to) {
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::int64_t j = 0; j < columns; ++j)
#pragma GCC unroll 2
      for (int part = 0; part < PARTS; ++part) {
        const std::int64_t at = PARTS * (i * columns + j) + part;
        to[at] = x[at] * weights[j];
      }
}

// blocks of a product with this many rows, and as many columns as the factors have
template <typename K>
std::int64_t blocks_of(std::int64_t rows, std::int64_t L) {
  using Planar = typename K::Planar;
  return (rows + K::rows - 1) / K::rows * (Planar::size(1, L) / Planar::step);
}

// fetches what the next visit of H reads, this many stretches of so many numbers, over the blocks of this one
template <typename K, typename T = typename K::Number>
Ahead ahead_of(const T* from, std::int64_t count, std::int64_t stretches, std::int64_t stride,
               std::int64_t blocks) {
  const std::size_t number = sizeof(T) * K::parts;
  Ahead ahead(static_cast<std::int64_t>(number) * count * stretches / 64 / blocks + 1);
  if (stretches > 0)
    ahead.add(from, number * static_cast<std::size_t>(count), stretches, number * static_cast<std::size_t>(stride));
  return ahead;
}

// What all strips of a matrix need: planar factors, and the coefficients of the gradients.
template <typename K>
struct Factors {
  using T = typename K::Number;
  using Planar = typename K::Planar;

  Planar F, G, Fh;
  // Gram matrices, first as they are, then masked and scaled: of G for the gradient of F, of F for that of G
  Planar of_G, of_F;
  T *weights, *mask;
  Arena<T> arena;

  explicit Factors(const LowRank<T>& job)
      : arena([&](Arena<T>& a) { plan(a, job); }, job.L % Planar::step || job.N % lanes<T>) {}

  void plan(Arena<T>& arena, const LowRank<T>& job) {
    const auto planar = [&](std::int64_t rows, std::int64_t columns) {
      return Planar{arena.take(Planar::size(rows, columns)), rows};
    };
    F = planar(whole<T>(job.N), job.L);
    G = planar(job.M, job.L);
    Fh = planar(whole<T>(job.L), job.gH ? whole<T>(job.N) : 0);
    of_G = planar(whole<T>(job.L), job.L);
    of_F = planar(whole<T>(job.L), job.L);
    weights = take_row(arena, job.L);
    mask = take_row(arena, job.L);
  }
};

// What one thread needs of a strip: the product with H, diagonals, a tile of H.
template <typename K>
struct StripScratch {
  using T = typename K::Number;

  T *X, *re, *im, *tile;
  Arena<T> arena;

  explicit StripScratch(const LowRank<T>& job)
      : arena([&](Arena<T>& a) {
          X = a.take(K::parts * strip * job.L);
          re = take_row(a, job.L);
          im = take_row(a, job.L);
          tile = a.take(job.copied ? K::parts * strip * chain : 0);
        }) {}
};

template <typename Planar>
LOMACS_INLINE Planar from_row(Planar x, std::int64_t i) {
  return {x.data + i * Planar::step, x.rows};
}

// planar = x, to = x^H x
template <typename K, typename T = typename K::Number>
LOMACS_TARGET void pack_and_gram(const T* x, std::int64_t rows, std::int64_t L, typename K::Planar planar,
                                 typename K::Planar to, Ahead& ahead) {
  pack(x, rows, L, planar);
  for (std::int64_t k = 0; k < rows; k += chain) {
    const typename K::Product terms[] = {
        {{x + K::parts * k * L, 1, L}, from_row(planar, k), std::min(chain, rows - k)}};
    ToPanelSums<K> sink{to, k > 0};
    product<true>(terms, sink, L, L, ahead, Part::upper);
  }
  mirror(to, L);
}

template <typename K, typename T = typename K::Number>
LOMACS_TARGET void prepare_side(const LowRank<T>& job, std::int64_t b, bool left, Factors<K>& x, Ahead& ahead) {
  const std::int64_t M = job.M, N = job.N, L = job.L;
  if (left) return pack_and_gram<K>(job.G + K::parts * b * M * L, M, L, x.G, x.of_G, ahead);
  pack_and_gram<K>(job.F + K::parts * b * N * L, N, L, x.F, x.of_F, ahead);
  if (job.gH) adjoint(x.F, N, L, x.Fh);
}

// masks and scales both Gram matrices; returns the second term of the objective
template <typename K, typename T = typename K::Number>
LOMACS_TARGET double couple(const LowRank<T>& job, Factors<K>& x) {
  const std::int64_t L = job.L;
  const bool joint = job.nesting == Nesting::joint;
  const double scale = job.scale;
  for (std::int64_t k = 0; k < L; ++k) {
    const double weight = joint ? static_cast<double>(L - k) / static_cast<double>(L) : 1.0;
    x.mask[k] = static_cast<T>(weight);
    x.weights[k] = static_cast<T>(-2 * scale * weight);
  }
  double pairs = 0;
  for (std::int64_t i = 0; i < L; ++i) {
    // the pair (i, j) weighs as the later of the two does; column j learns beside the columns before it
    if (joint) std::fill(x.mask, x.mask + i, x.mask[i]);
    else if (job.nesting == Nesting::sequential && i > 0) x.mask[i - 1] = 0;
    Vec<T> total{};
    for (std::int64_t vec = 0; vec * lanes<T> < L; ++vec) {
      const Vec<T> mask = load(x.mask + vec * lanes<T>), factor = mask * splat(static_cast<T>(2 * scale));
      Vec<T> sums{};
#pragma GCC unroll 2
      for (int part = 0; part < K::parts; ++part) {
        T *f = x.of_F.at(i, vec) + part * K::Planar::imag, *g = x.of_G.at(i, vec) + part * K::Planar::imag;
        const Vec<T> of_F = load(f), of_G = load(g);
        sums += of_F * of_G;
        store(f, factor * of_F);
        store(g, factor * of_G);
      }
      total += joint ? mask * sums : sums;
    }
    pairs += sum<T>(total);
  }
  return scale * pairs;
}

// Rows of H from i0 on: their part of the first term, and rows of the gradients of G and H.
template <typename K, typename T = typename K::Number>
LOMACS_TARGET double right_strip(const LowRank<T>& job, std::int64_t b, std::int64_t i0, const Factors<K>& x,
                                 const StripScratch<K>& s, Ahead& ahead) {
  const std::int64_t M = job.M, N = job.N, L = job.L, rows = std::min(strip, M - i0);
  const T* H = job.H + K::parts * (b * M + i0) * N;
  const T* G = job.G + K::parts * (b * M + i0) * L;
  for (std::int64_t k = 0; k < N; k += chain) {
    const typename K::Product terms[] = {
        {{H + K::parts * k, N, 1}, from_row(x.F, k), std::min(chain, N - k)}};
    ToSums<T> sink{s.X, L, k > 0};
    if (job.copied) {
      const bool last = k + chain >= N;
      const std::int64_t next = last ? 0 : k + chain;
      ahead = ahead_of<K>(H + K::parts * (last ? rows * N : next), std::min(chain, N - next),
                          last ? std::min(strip, M - i0 - rows) : rows, N, blocks_of<K>(rows, L));
    }
    product<false>(terms, sink, rows, L, ahead);
  }
  column_dots(from_row(x.G, i0), s.X, rows, L, s.re, s.im);
  double cross = 0;
  for (std::int64_t k = 0; k < L; ++k) cross += static_cast<double>(x.weights[k]) * s.re[k];
  if (job.gG) {
    const typename K::Product terms[] = {{{G, L, 1}, x.of_F, L}};
    ToWeighted<T> sink{job.gG + K::parts * (b * M + i0) * L, s.X, x.weights, L};
    product<false>(terms, sink, rows, L, ahead);
  }
  if (job.gH) {
    weigh<K::parts>(G, x.weights, rows, L, s.X);
    const typename K::Product terms[] = {{{s.X, L, 1}, x.Fh, L}};
    ToSums<T> sink{job.gH + K::parts * (b * M + i0) * N, N, false};
    product<false>(terms, sink, rows, N, ahead);
  }
  return cross;
}

// Columns of H from j0 on: rows of the gradient of F.
template <typename K, typename T = typename K::Number>
LOMACS_TARGET void left_strip(const LowRank<T>& job, std::int64_t b, std::int64_t j0, const Factors<K>& x,
                              const StripScratch<K>& s, Ahead& ahead) {
  const std::int64_t M = job.M, N = job.N, L = job.L, columns = std::min(strip, N - j0);
  const T* F = job.F + K::parts * (b * N + j0) * L;
  for (std::int64_t k = 0; k < M; k += chain) {
    const std::int64_t depth = std::min(chain, M - k);
    const T* from = job.H + K::parts * ((b * M + k) * N + j0);
    Left<T> left{from, 1, N};
    if (job.copied) {
      for (std::int64_t m = 0; m < depth; ++m)
        std::memcpy(s.tile + K::parts * m * columns, from + K::parts * m * N,
                    sizeof(T) * static_cast<std::size_t>(K::parts * columns));
      left = {s.tile, 1, columns};
      const bool last = k + chain >= M;
      const std::int64_t next = last ? 0 : k + chain;
      ahead = ahead_of<K>(job.H + K::parts * ((b * M + next) * N + j0 + (last ? columns : 0)),
                          last ? std::min(strip, N - j0 - columns) : columns, std::min(chain, M - next), N,
                          blocks_of<K>(columns, L));
    }
    const typename K::Product terms[] = {{left, from_row(x.G, k), depth}};
    ToSums<T> sink{s.X, L, k > 0};
    product<true>(terms, sink, columns, L, ahead);
  }
  const typename K::Product terms[] = {{{F, L, 1}, x.of_G, L}};
  ToWeighted<T> sink{job.gF + K::parts * (b * N + j0) * L, s.X, x.weights, L};
  product<false>(terms, sink, columns, L, ahead);
}

template <typename K, typename T = typename K::Number>
LOMACS_TARGET void one_by_one(const LowRank<T>& job, std::int64_t begin, std::int64_t end) {
  Factors<K> factors(job);
  const StripScratch<K> scratch(job);
  for (std::int64_t b = begin; b < end; ++b) {
    const std::int64_t M = job.M, N = job.N, L = job.L, blocks = blocks_of<K>(M + (job.gF ? N : 0), L);
    Ahead ahead(static_cast<std::int64_t>(K::parts * sizeof(T)) * (M * N + (M + N) * L) / 64 / blocks + 1);
    if (b + 1 < end) {
      ahead.add(job.H + K::parts * (b + 1) * M * N, K::parts * sizeof(T) * static_cast<std::size_t>(M * N));
      ahead.add(job.G + K::parts * (b + 1) * M * L, K::parts * sizeof(T) * static_cast<std::size_t>(M * L));
      ahead.add(job.F + K::parts * (b + 1) * N * L, K::parts * sizeof(T) * static_cast<std::size_t>(N * L));
    }
    prepare_side<K>(job, b, false, factors, ahead);
    prepare_side<K>(job, b, true, factors, ahead);
    double loss = couple<K>(job, factors);
    for (std::int64_t i = 0; i < job.M; i += strip) loss += right_strip<K>(job, b, i, factors, scratch, ahead);
    for (std::int64_t j = 0; job.gF && j < job.N; j += strip)
      left_strip<K>(job, b, j, factors, scratch, ahead);
    job.loss[b] = static_cast<T>(loss);
  }
}

// every matrix by all threads: the same strips in the same order, so the same bits
template <typename K, typename T = typename K::Number>
void strip_by_strip(const LowRank<T>& job) {
  Factors<K> x(job);
  const std::int64_t right = (job.M + strip - 1) / strip, left = job.gF ? (job.N + strip - 1) / strip : 0;
  const std::int64_t grain = worth_a_thread(strip * std::max(job.M, job.N) * job.L);
  std::vector<double> cross(static_cast<std::size_t>(right));
  for (std::int64_t b = 0; b < job.B; ++b) {
    torch::stable::parallel_for(0, 2, worth_a_thread(job.L * job.L * std::min(job.M, job.N)),
                                [&](std::int64_t begin, std::int64_t end) {
                                  Ahead ahead;
                                  for (; begin < end; ++begin) prepare_side<K>(job, b, begin, x, ahead);
                                });
    double loss = couple<K>(job, x);
    torch::stable::parallel_for(0, right, grain, [&](std::int64_t begin, std::int64_t end) {
      const StripScratch<K> scratch(job);
      Ahead ahead;
      for (; begin < end; ++begin)
        cross[static_cast<std::size_t>(begin)] = right_strip<K>(job, b, begin * strip, x, scratch, ahead);
    });
    torch::stable::parallel_for(0, left, grain, [&](std::int64_t begin, std::int64_t end) {
      const StripScratch<K> scratch(job);
      Ahead ahead;
      for (; begin < end; ++begin) left_strip<K>(job, b, begin * strip, x, scratch, ahead);
    });
    for (const double part : cross) loss += part;
    job.loss[b] = static_cast<T>(loss);
  }
}

template <typename T>
void low_rank_matrices(const LowRank<T>& job) {
  if (job.spread) {
    if (job.complex) strip_by_strip<OfComplex<T>>(job);
    else strip_by_strip<OfReal<T>>(job);
    return;
  }
  const std::int64_t grain = worth_a_thread(job.M * job.N * job.L);
  torch::stable::parallel_for(0, job.B, grain, [&](std::int64_t begin, std::int64_t end) {
    if (job.complex) one_by_one<OfComplex<T>>(job, begin, end);
    else one_by_one<OfReal<T>>(job, begin, end);
  });
}

}  // namespace
}  // namespace LOMACS_ISA
}  // namespace lomacs
