// Products of small real matrices. Included inside isa.inl: no guard, one copy an instruction set; it brings
// cmatmul.inl along, so a file includes one of the two.
// The left factor is read where it lies, by broadcasts, at any two strides; the right one and the result have
// contiguous rows at any distance. Nothing outside the matrices is read or written, and nothing is packed.
#include "cmatmul.inl"

namespace lomacs {
namespace LOMACS_ISA {
namespace {

// The first `count` lanes of a vector: of memory beyond them nothing is touched.
template <typename T>
struct Tail {
  std::int64_t count;
#if LOMACS_BYTES == 64
  unsigned bits;
#elif LOMACS_BYTES == 32
  typename Simd<T, LOMACS_BYTES>::Mask mask;
#endif

  LOMACS_INLINE explicit Tail(std::int64_t n) : count(n) {
#if LOMACS_BYTES == 64
    bits = (1u << n) - 1;
#elif LOMACS_BYTES == 32
    for (int i = 0; i < lanes<T>; ++i) mask[i] = i < n ? -1 : 0;
#endif
  }

  LOMACS_INLINE Vec<T> load(const T* p) const {
#if LOMACS_BYTES == 64
    if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_maskz_loadu_ps(static_cast<__mmask16>(bits), p);
    else return (Vec<T>)_mm512_maskz_loadu_pd(static_cast<__mmask8>(bits), p);
#elif LOMACS_BYTES == 32
    if constexpr (sizeof(T) == 4) return (Vec<T>)_mm256_maskload_ps(p, (__m256i)mask);
    else return (Vec<T>)_mm256_maskload_pd(p, (__m256i)mask);
#else
    Vec<T> x{};
    for (int i = 0; i < lanes<T> - 1; ++i)
      if (i < count) x[i] = p[i];
    return x;
#endif
  }

  LOMACS_INLINE void store(T* p, Vec<T> x) const {
#if LOMACS_BYTES == 64
    if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, static_cast<__mmask16>(bits), (__m512)x);
    else _mm512_mask_storeu_pd(p, static_cast<__mmask8>(bits), (__m512d)x);
#elif LOMACS_BYTES == 32
    if constexpr (sizeof(T) == 4) _mm256_maskstore_ps(p, (__m256i)mask, (__m256)x);
    else _mm256_maskstore_pd(p, (__m256i)mask, (__m256d)x);
#else
    for (int i = 0; i < lanes<T> - 1; ++i)
      if (i < count) p[i] = x[i];
#endif
  }
};

// A left factor: number (i, k) lies at x[i row + k column].
template <typename T>
struct Factor {
  const T* x;
  std::int64_t row, column;
};

// A right factor: number (k, j) lies at x[k row + j].
template <typename T>
struct Rows {
  const T* x;
  std::int64_t row;
};

template <typename T>
struct Product {
  Factor<T> left;
  Rows<T> right;
  T* c;
  std::int64_t c_row, depth;
  bool add;
  // what the loops bring into the cache meanwhile
  Ahead* ahead;
};

// R rows of the result from i0 on, V vectors of columns from j0 on; TAIL: one vector, and not all of it
template <int R, int V, bool TAIL, bool FETCH, typename T>
LOMACS_INLINE void tile(const Product<T>& p, std::int64_t i0, std::int64_t j0, const Tail<T>& tail) {
  static_assert(!TAIL || V == 1);
  const auto fetch = [&](const T* at) LOMACS_TARGET __attribute__((always_inline)) {
    if constexpr (TAIL) return tail.load(at);
    else return load(at);
  };
  Vec<T> sum[R][V] = {};
  const std::int64_t row = p.left.row, column = p.left.column, step = p.right.row;
  const T *a = p.left.x + i0 * row, *b = p.right.x + j0;
  Ahead::Run run{};
  if constexpr (FETCH) run = p.ahead->next(p.depth);
#pragma GCC unroll 1
  for (std::int64_t k = p.depth; k > 0; --k, a += column, b += step) {
    if constexpr (FETCH) run.step();
    Vec<T> right[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) right[j] = fetch(b + j * lanes<T>);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const Vec<T> left = splat(a[i * row]);
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) sum[i][j] += left * right[j];
    }
  }
  T* c = p.c + i0 * p.c_row + j0;
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i, c += p.c_row) {
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      if (p.add) sum[i][j] += fetch(c + j * lanes<T>);
      if constexpr (TAIL) tail.store(c, sum[i][j]);
      else store(c + j * lanes<T>, sum[i][j]);
    }
  }
}

template <int R, int V, bool TAIL, bool FETCH, typename T>
LOMACS_INLINE void tile_of(std::int64_t height, const Product<T>& p, std::int64_t i0, std::int64_t j0,
                           const Tail<T>& tail) {
  if constexpr (R > 1) {
    if (height < R) return tile_of<R - 1, V, TAIL, FETCH>(height, p, i0, j0, tail);
  }
  tile<R, V, TAIL, FETCH>(p, i0, j0, tail);
}

// rows of a tile of V vectors that leave registers for the right factor
template <int V>
constexpr int tile_rows = V == 4 ? 6 : V == 2 && LOMACS_BYTES == 64 ? 8 : V == 1 ? 8 : LOMACS_ROWS;

template <int V, bool TAIL, bool FETCH, typename T>
LOMACS_TARGET __attribute__((noinline)) void strip(const Product<T>& p, std::int64_t rows, std::int64_t j0,
                                                   Tail<T> tail) {
  // of nearly equal height: a low one would wait for its few accumulators
  const std::int64_t heights = (rows + tile_rows<V> - 1) / tile_rows<V>;
  std::int64_t i0 = 0;
  for (std::int64_t n = 0; n < heights; ++n) {
    const std::int64_t end = (n + 1) * rows / heights;
    tile_of<tile_rows<V>, V, TAIL, FETCH>(end - i0, p, i0, j0, tail);
    i0 = end;
  }
}

// how many blocks such a product is made of
template <typename T>
LOMACS_INLINE std::int64_t blocks_of(std::int64_t rows, std::int64_t columns) {
  const auto heights = [&](std::int64_t tall) { return (rows + tall - 1) / tall; };
  const std::int64_t four = LOMACS_BYTES == 64 ? columns / (4 * lanes<T>) : 0;
  columns -= four * 4 * lanes<T>;
  const std::int64_t two = columns / (2 * lanes<T>);
  columns -= two * 2 * lanes<T>;
  return four * heights(tile_rows<4>) + two * heights(tile_rows<2>) +
         (columns + lanes<T> - 1) / lanes<T> * heights(tile_rows<1>);
}

// Stretches of memory, those that there are, for a product of so many rows and columns to bring into the cache
// evenly, the last one first.
template <typename T>
struct Stretch {
  const T* p;
  std::int64_t count;
};
template <typename T>
LOMACS_TARGET Ahead ahead_of(std::int64_t rows, std::int64_t columns, std::initializer_list<Stretch<T>> all) {
  std::size_t bytes = 0;
  for (const Stretch<T>& x : all) bytes += x.p ? sizeof(T) * static_cast<std::size_t>(x.count) : 0;
  Ahead ahead(static_cast<std::int64_t>(bytes) / 64 / blocks_of<T>(rows, columns) + 1);
  for (const Stretch<T>& x : all)
    if (x.p) ahead.add(x.p, sizeof(T) * static_cast<std::size_t>(x.count));
  return ahead;
}

// c = or += left right, c with contiguous rows c_row apart. The factors may be empty; c overlaps neither.
template <typename T, bool FETCH = false>
LOMACS_TARGET void matmul(Factor<T> left, Rows<T> right, T* c, std::int64_t c_row, std::int64_t rows,
                          std::int64_t columns, std::int64_t depth, bool add = false, Ahead* ahead = nullptr) {
  const Product<T> p{left, right, c, c_row, depth, add, ahead};
  const Tail<T> tail(columns % lanes<T>);
  std::int64_t j = 0;
  if constexpr (LOMACS_BYTES == 64) {
    for (; j + 4 * lanes<T> <= columns; j += 4 * lanes<T>) strip<4, false, FETCH>(p, rows, j, tail);
  }
  for (; j + 2 * lanes<T> <= columns; j += 2 * lanes<T>) strip<2, false, FETCH>(p, rows, j, tail);
  for (; j + lanes<T> <= columns; j += lanes<T>) strip<1, false, FETCH>(p, rows, j, tail);
  if (j < columns) strip<1, true, FETCH>(p, rows, j, tail);
}

}  // namespace
}  // namespace LOMACS_ISA
}  // namespace lomacs
