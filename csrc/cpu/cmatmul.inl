// Products of small complex matrices. Included inside isa.inl: no guard, one copy an instruction set.
// The left factor is read where it lies, interleaved, by broadcasts; the right one is planar, in panels;
// the result goes to one of several sinks while it is still in registers.

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lomacs {
namespace LOMACS_ISA {
namespace {

#define LOMACS_INLINE LOMACS_TARGET inline __attribute__((always_inline))

template <typename T>
using Vec = typename Simd<T, LOMACS_BYTES>::Vec;

template <typename T>
constexpr int lanes = LOMACS_BYTES / static_cast<int>(sizeof(T));

// columns of a panel
template <typename T>
constexpr int panel = LOMACS_VECS * lanes<T>;

template <typename T>
using Lanes = std::make_integer_sequence<int, lanes<T>>;

template <typename T>
LOMACS_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Simd<T, LOMACS_BYTES>::Loose*>(p);
}

template <typename T>
LOMACS_INLINE void store(T* p, Vec<T> x) {
  *reinterpret_cast<typename Simd<T, LOMACS_BYTES>::Loose*>(p) = x;
}

template <typename T>
LOMACS_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};
}

template <typename T>
LOMACS_INLINE Vec<T> square_root(Vec<T> x) {
#if LOMACS_BYTES == 64
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_sqrt_ps((__m512)x);
  else return (Vec<T>)_mm512_sqrt_pd((__m512d)x);
#elif LOMACS_BYTES == 32
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm256_sqrt_ps((__m256)x);
  else return (Vec<T>)_mm256_sqrt_pd((__m256d)x);
#else
  for (int i = 0; i < lanes<T>; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

#if LOMACS_BYTES == 64
// the left half of a vector
template <typename T>
LOMACS_INLINE void store_left_half(T* p, Vec<T> x) {
  if constexpr (sizeof(T) == 4) _mm256_storeu_ps(p, _mm512_castps512_ps256((__m512)x));
  else _mm256_storeu_pd(p, _mm512_castpd512_pd256((__m512d)x));
}

// zeros, and x
template <typename T>
LOMACS_INLINE Vec<T> right_half(typename Simd<T, LOMACS_BYTES / 2>::Vec x) {
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_insertf32x8(_mm512_setzero_ps(), (__m256)x, 1);
  else return (Vec<T>)_mm512_insertf64x4(_mm512_setzero_pd(), (__m256d)x, 1);
}
#endif

template <typename T>
LOMACS_INLINE double sum(Vec<T> x) {
  double s = 0;
  for (int i = 0; i < lanes<T>; ++i) s += static_cast<double>(x[i]);
  return s;
}

template <typename T, int... I>
LOMACS_INLINE Vec<T> zip_low(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
  return LOMACS_SHUFFLE(T, a, b, (I / 2 + I % 2 * lanes<T>)...);
}

template <typename T, int... I>
LOMACS_INLINE Vec<T> zip_high(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
  return LOMACS_SHUFFLE(T, a, b, (I / 2 + I % 2 * lanes<T> + lanes<T> / 2)...);
}

template <typename T, int... I>
LOMACS_INLINE Vec<T> evens(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
  return LOMACS_SHUFFLE(T, a, b, (2 * I)...);
}

template <typename T, int... I>
LOMACS_INLINE Vec<T> odds(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
  return LOMACS_SHUFFLE(T, a, b, (2 * I + 1)...);
}

// apart, because the blocks would hold a copy for each of their vectors
template <typename T>
LOMACS_TARGET __attribute__((noinline)) void copy_part(const T* from, T* to, std::int64_t count) {
  std::memcpy(to, from, sizeof(T) * 2 * static_cast<std::size_t>(count));
}

// `count` interleaved numbers to planes, zeros beyond
template <typename T>
LOMACS_INLINE void load_complex(const T* p, std::int64_t count, Vec<T>& re, Vec<T>& im) {
  alignas(LOMACS_BYTES) T buffer[2 * lanes<T>];
  if (__builtin_expect(count < lanes<T>, 0)) {
    store(buffer, Vec<T>{});
    store(buffer + lanes<T>, Vec<T>{});
    copy_part(p, buffer, count);
    p = buffer;
  }
  const Vec<T> low = load(p), high = load(p + lanes<T>);
  re = evens<T>(low, high, Lanes<T>{});
  im = odds<T>(low, high, Lanes<T>{});
}

template <typename T>
LOMACS_INLINE void store_complex(T* p, std::int64_t count, Vec<T> re, Vec<T> im) {
  alignas(LOMACS_BYTES) T buffer[2 * lanes<T>];
  const bool part = __builtin_expect(count < lanes<T>, 0);
  T* to = part ? buffer : p;
  store(to, zip_low<T>(re, im, Lanes<T>{}));
  store(to + lanes<T>, zip_high<T>(re, im, Lanes<T>{}));
  if (part) copy_part(buffer, p, count);
}

// A planar matrix: panels of columns; a row of a panel is `panel` real parts, then as many imaginary parts.
template <typename T>
struct Panels {
  T* data;
  std::int64_t rows;

  static constexpr std::int64_t step = 2 * panel<T>, imag = panel<T>;

  static std::int64_t size(std::int64_t rows, std::int64_t columns) {
    return (columns + panel<T> - 1) / panel<T> * rows * step;
  }
  // real parts of row i, columns from `vec * lanes` on
  T* at(std::int64_t i, std::int64_t vec) const {
    return data + (vec / LOMACS_VECS * rows + i) * step + vec % LOMACS_VECS * lanes<T>;
  }
  T* element(std::int64_t i, std::int64_t j) const { return at(i, j / lanes<T>) + j % lanes<T>; }
};

template <typename T>
Panels<T> take_panels(Arena<T>& arena, std::int64_t rows, std::int64_t columns) {
  return {arena.take(Panels<T>::size(rows, columns)), rows};
}

template <typename T>
std::int64_t whole(std::int64_t n) {
  return (n + lanes<T> - 1) / lanes<T> * lanes<T>;
}

// in whole squares of vectors, as transposing takes them
template <typename T>
Panels<T> take_squares(Arena<T>& arena, std::int64_t rows, std::int64_t columns) {
  return take_panels(arena, whole<T>(rows), columns);
}

// whole vectors
template <typename T>
T* take_row(Arena<T>& arena, std::int64_t n) {
  return arena.take(whole<T>(n));
}

template <typename T>
LOMACS_TARGET void pack(const T* x, std::int64_t rows, std::int64_t columns, Panels<T> to) {
  for (std::int64_t j = 0; j < columns; j += lanes<T>) {
    T* p = to.at(0, j / lanes<T>);
    for (std::int64_t i = 0; i < rows; ++i, p += Panels<T>::step) {
      Vec<T> re, im;
      load_complex(x + 2 * (i * columns + j), columns - j, re, im);
      store(p, re);
      store(p + Panels<T>::imag, im);
    }
  }
}

// log2(lanes) rounds of zipping the two halves of the rows transpose a square of vectors
template <typename T>
LOMACS_INLINE void transpose_square(Vec<T> (&x)[lanes<T>]) {
#pragma GCC unroll 8
  for (int round = 1; round < lanes<T>; round *= 2) {
    Vec<T> y[lanes<T>];
#pragma GCC unroll 16
    for (int i = 0; i < lanes<T> / 2; ++i) {
      y[2 * i] = zip_low<T>(x[i], x[i + lanes<T> / 2], Lanes<T>{});
      y[2 * i + 1] = zip_high<T>(x[i], x[i + lanes<T> / 2], Lanes<T>{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes<T>; ++i) x[i] = y[i];
  }
}

template <typename T>
LOMACS_TARGET void transpose_plane(const T* from, T* to, T sign) {
  Vec<T> x[lanes<T>];
#pragma GCC unroll 16
  for (int i = 0; i < lanes<T>; ++i) x[i] = load(from + i * Panels<T>::step);
  transpose_square<T>(x);
#pragma GCC unroll 16
  for (int i = 0; i < lanes<T>; ++i) store(to + i * Panels<T>::step, x[i] * splat(sign));
}

// square (i, j) of lanes x lanes numbers of `from`, conjugate transposed, to square (j, i) of `to`
template <typename T>
LOMACS_INLINE void adjoint_square(Panels<T> from, std::int64_t i, std::int64_t j, Panels<T> to) {
  const T* p = from.at(i * lanes<T>, j);
  T* q = to.at(j * lanes<T>, i);
  transpose_plane<T>(p, q, 1);
  transpose_plane<T>(p + Panels<T>::imag, q + Panels<T>::imag, -1);
}

// to = from^H; both hold whole squares: rows rounded up to lanes
template <typename T>
LOMACS_TARGET void adjoint(Panels<T> from, std::int64_t rows, std::int64_t columns, Panels<T> to) {
  for (std::int64_t i = 0; i * lanes<T> < rows; ++i)
    for (std::int64_t j = 0; j * lanes<T> < columns; ++j) adjoint_square(from, i, j, to);
}

#if LOMACS_BYTES == 64
// the left half of the lower rows of a square on the diagonal from the right half of the upper ones
template <typename T>
LOMACS_TARGET void mirror_half(T* p, T sign) {
  Vec<T> x[lanes<T>];
#pragma GCC unroll 16
  for (int i = 0; i < lanes<T>; ++i) x[i] = load(p + i * Panels<T>::step);
  transpose_square<T>(x);
#pragma GCC unroll 8
  for (int i = lanes<T> / 2; i < lanes<T>; ++i) store_left_half(p + i * Panels<T>::step, x[i] * splat(sign));
}
#endif

// what a product left out of a Hermitian matrix: the lower squares, or more, from the upper ones
template <typename T>
LOMACS_TARGET void mirror(Panels<T> x, std::int64_t n) {
#if LOMACS_BYTES == 64
  for (std::int64_t j = 0; j * lanes<T> < n; ++j) {
    mirror_half<T>(x.at(j * lanes<T>, j), 1);
    mirror_half<T>(x.at(j * lanes<T>, j) + Panels<T>::imag, -1);
  }
#endif
  for (std::int64_t j = 1; j * lanes<T> < n; ++j)
    for (std::int64_t i = 0; i < j; ++i) adjoint_square(x, i, j, x);
}

// sum_m conj(x_mk) y_mk for every column k, in short chains: these sums have one sign and their error would show
template <typename T>
LOMACS_TARGET void column_dots(Panels<T> X, const T* y, std::int64_t rows, std::int64_t r, T* re, T* im) {
  for (std::int64_t j = 0; j < r; j += lanes<T>) {
    const T* p = X.at(0, j / lanes<T>);
    Vec<T> total_re{}, total_im{};
    for (std::int64_t m = 0; m < rows;) {
      Vec<T> rr{}, ii{}, ri{}, ir{};
      for (const std::int64_t stop = std::min<std::int64_t>(m + 8, rows); m < stop; ++m) {
        Vec<T> yr, yi;
        load_complex(y + 2 * (m * r + j), r - j, yr, yi);
        const Vec<T> xr = load(p + m * Panels<T>::step), xi = load(p + m * Panels<T>::step + Panels<T>::imag);
        rr += xr * yr;
        ii += xi * yi;
        ri += xr * yi;
        ir += xi * yr;
      }
      total_re += rr + ii;
      total_im += ri - ir;
    }
    store(re + j, total_re);
    store(im + j, total_im);
  }
}

template <typename T>
LOMACS_TARGET void scale_columns(const T* x, const T* s, std::int64_t rows, std::int64_t columns, T* to) {
  for (std::int64_t j = 0; j < columns; j += lanes<T>) {
    const std::int64_t count = columns - j;
    const Vec<T> weight = load(s + j);
    for (std::int64_t i = 0; i < rows; ++i) {
      Vec<T> re, im;
      load_complex(x + 2 * (i * columns + j), count, re, im);
      store_complex(to + 2 * (i * columns + j), count, re * weight, im * weight);
    }
  }
}

// A left factor: the real part of number (i, k) lies at a[unit (i row + k column)], and at `jump` more with every
// `chunk` of columns; the imaginary part lies `imag` further. A conjugated one is read by columns of interleaved rows,
// {a, 1, columns}.
template <typename T>
struct Left {
  const T* a;
  std::int64_t row, column;
  std::int64_t unit = 2, imag = 1, chunk = std::numeric_limits<std::int64_t>::max(), jump = 0;
};

template <typename T>
LOMACS_INLINE Left<T> left_of(Panels<T> x) {
  return {x.data, Panels<T>::step, 1, 1, Panels<T>::imag, panel<T>, x.rows * Panels<T>::step - panel<T>};
}

template <typename T>
struct Term {
  Left<T> left;
  Panels<T> right;
  std::int64_t depth;
};

#if LOMACS_PRODUCTS == 3
// a number in all lanes, by a load: GCC would add numbers and spread their sums by shuffles, in a multiplier's port
template <typename X, typename T>
LOMACS_INLINE X spread(const T* p) {
  X x;
  if constexpr (sizeof(T) == 4) asm("vbroadcastss %1, %0" : "=v"(x) : "m"(*p));
  else asm("vbroadcastsd %1, %0" : "=v"(x) : "m"(*p));
  return x;
}

// a + x or a - x, and total + b x, for a number x in all lanes, as an operand in memory: on some
// processors a broadcast to a register takes a multiplier's turn, one inside another instruction none
template <bool MINUS, typename X, typename T>
LOMACS_INLINE X with_number(X a, const T* x) {
  X sum;
  if constexpr (sizeof(X) == LOMACS_BYTES / 2) {
    if constexpr (sizeof(T) == 4 && MINUS) asm("vsubps %2%{1to8%}, %1, %0" : "=v"(sum) : "v"(a), "m"(*x));
    else if constexpr (sizeof(T) == 4) asm("vaddps %2%{1to8%}, %1, %0" : "=v"(sum) : "v"(a), "m"(*x));
    else if constexpr (MINUS) asm("vsubpd %2%{1to4%}, %1, %0" : "=v"(sum) : "v"(a), "m"(*x));
    else asm("vaddpd %2%{1to4%}, %1, %0" : "=v"(sum) : "v"(a), "m"(*x));
  } else if constexpr (sizeof(T) == 4 && MINUS) asm("vsubps %2%{1to16%}, %1, %0" : "=v"(sum) : "v"(a), "m"(*x));
  else if constexpr (sizeof(T) == 4) asm("vaddps %2%{1to16%}, %1, %0" : "=v"(sum) : "v"(a), "m"(*x));
  else if constexpr (MINUS) asm("vsubpd %2%{1to8%}, %1, %0" : "=v"(sum) : "v"(a), "m"(*x));
  else asm("vaddpd %2%{1to8%}, %1, %0" : "=v"(sum) : "v"(a), "m"(*x));
  return sum;
}

template <typename T>
LOMACS_INLINE Vec<T> with_multiple(Vec<T> total, Vec<T> b, const T* x) {
  if constexpr (sizeof(T) == 4) asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(total) : "v"(b), "m"(*x));
  else asm("vfmadd231pd %2%{1to8%}, %1, %0" : "+v"(total) : "v"(b), "m"(*x));
  return total;
}

// Three real products instead of four (Karatsuba): re += a_re b_re, im += a_im b_im, both += (a_re + a_im)
// (b_re + b_im), a_im with its sign turned in `both` where the left factor is conjugated. The real part is
// re - im (conjugated re + im), the imaginary part both - re - im (both - re + im). Normwise as accurate as four.
// X is a vector, or half of one: the right half of the columns of `vec`.
template <bool CONJ, int R, int V, typename X, typename T>
LOMACS_INLINE void multiply(X (&re)[R][V], X (&im)[R][V], X (&both)[R][V], const Term<T>& term, std::int64_t i0,
                            std::int64_t vec, Ahead::Run& run) {
  using Loose = typename Simd<T, sizeof(X)>::Loose;
  const Left<T>& left = term.left;
  const std::int64_t row = CONJ ? 2 : left.unit * left.row, imag = CONJ ? 1 : left.imag;
  const std::int64_t column = left.unit * left.column;
  const T* a = left.a + i0 * row;
  const T* b = term.right.at(0, vec) + (LOMACS_BYTES - sizeof(X)) / sizeof(T);
  for (std::int64_t depth = term.depth; depth > 0; depth -= left.chunk, a += left.jump)
    for (std::int64_t k = std::min(depth, left.chunk); k > 0; --k, a += column, b += Panels<T>::step) {
      run.step();
      X br[V], bi[V], bs[V];
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) {
        br[j] = *reinterpret_cast<const Loose*>(b + j * lanes<T>);
        bi[j] = *reinterpret_cast<const Loose*>(b + j * lanes<T> + Panels<T>::imag);
        bs[j] = br[j] + bi[j];
      }
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        const X ar = spread<X>(a + i * row);
        // the broadcasts of a single vector would take many turns
        if constexpr (V == 1 && sizeof(X) == LOMACS_BYTES) {
          re[i][0] += ar * br[0];
          im[i][0] = with_multiple<T>(im[i][0], bi[0], a + i * row + imag);
          both[i][0] += with_number<CONJ>(ar, a + i * row + imag) * bs[0];
          continue;
        }
        const X ai = spread<X>(a + i * row + imag), as = CONJ ? ar - ai : ar + ai;
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) {
          re[i][j] += ar * br[j];
          im[i][j] += ai * bi[j];
          both[i][j] += as * bs[j];
        }
      }
    }
}

// real and imaginary parts in the place of the first two products
template <bool CONJ, int R, int V, typename X>
LOMACS_INLINE void parts_of_products(X (&re)[R][V], X (&im)[R][V], const X (&both)[R][V]) {
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      const X x = re[i][j], y = im[i][j];
      re[i][j] = CONJ ? x + y : x - y;
      im[i][j] = CONJ ? (both[i][j] - x) + y : (both[i][j] - x) - y;
    }
}
#else
// re + i im += (R rows of the left factor, conjugated or not) x (V vectors of columns of the right one)
template <bool CONJ, int R, int V, typename T>
LOMACS_INLINE void multiply(Vec<T> (&re)[R][V], Vec<T> (&im)[R][V], const Term<T>& term, std::int64_t i0,
                            std::int64_t vec, Ahead::Run& run) {
  const Left<T>& left = term.left;
  const std::int64_t row = left.unit * left.row, column = left.unit * left.column, imag = left.imag;
  const T* a = left.a + i0 * row;
  const T* b = term.right.at(0, vec);
  for (std::int64_t depth = term.depth; depth > 0; depth -= left.chunk, a += left.jump)
    for (std::int64_t k = std::min(depth, left.chunk); k > 0; --k, a += column, b += Panels<T>::step) {
      run.step();
      Vec<T> br[V], bi[V];
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) {
        br[j] = load(b + j * lanes<T>);
        bi[j] = load(b + j * lanes<T> + Panels<T>::imag);
      }
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        const Vec<T> ar = splat(a[i * row]), ai = splat(a[i * row + imag]);
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) {
          re[i][j] += ar * br[j];
          im[i][j] += ar * bi[j];
          if constexpr (CONJ) {
            re[i][j] += ai * bi[j];
            im[i][j] -= ai * br[j];
          } else {
            re[i][j] -= ai * bi[j];
            im[i][j] += ai * br[j];
          }
        }
      }
    }
}
#endif

// the line of p, to be written: on a processor that has no such hint it does nothing
LOMACS_INLINE void prepare_line(const void* p) {
#if defined(__x86_64__)
  asm volatile("prefetchw %0" : : "m"(*static_cast<const char*>(p)));
#else
  __builtin_prefetch(p, 1, 3);
#endif
}

// Sinks. Each takes a block of R rows from i0 on and V vectors of columns from `vec` on. One that has `prepare` is
// told before the block is multiplied, so that its lines are there when they are written.

template <typename T>
struct ToRows {
  T* c;
  std::int64_t columns;

  template <int R, int V>
  LOMACS_INLINE void prepare(std::int64_t i0, std::int64_t vec) const {
    const T* p = c + 2 * (i0 * columns + vec * lanes<T>);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i, p += 2 * columns)
#pragma GCC unroll 8
      for (std::size_t at = 0; at < sizeof(T) * 2 * V * lanes<T>; at += 64)
        prepare_line(reinterpret_cast<const char*>(p) + at);
  }

  template <int R, int V>
  LOMACS_INLINE void take(Vec<T> (&re)[R][V], Vec<T> (&im)[R][V], std::int64_t i0, std::int64_t vec) {
    T* p = c + 2 * (i0 * columns + vec * lanes<T>);
    // one question a block, not one a vector: GCC keeps what waits for an answer in memory
    if (__builtin_expect((vec + V) * lanes<T> <= columns, 1)) {
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i, p += 2 * columns)
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) store_complex(p + 2 * j * lanes<T>, lanes<T>, re[i][j], im[i][j]);
      return;
    }
    Vec<T> real[R * V], imag[R * V];
#pragma GCC unroll 16
    for (int n = 0; n < R * V; ++n) real[n] = re[n / V][n % V], imag[n] = im[n / V][n % V];
#pragma GCC unroll 1
    for (int n = 0; n < R * V; ++n) {
      const std::int64_t column = (vec + n % V) * lanes<T>;
      store_complex(c + 2 * ((i0 + n / V) * columns + column), columns - column, real[n], imag[n]);
    }
  }
};

template <typename T>
struct ToPanels {
  Panels<T> c;

  template <int R, int V>
  LOMACS_INLINE void take(Vec<T> (&re)[R][V], Vec<T> (&im)[R][V], std::int64_t i0, std::int64_t vec) {
    T* p = c.at(i0, vec);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) {
        store(p + i * Panels<T>::step + j * lanes<T>, re[i][j]);
        store(p + i * Panels<T>::step + j * lanes<T> + Panels<T>::imag, im[i][j]);
      }
  }
};

// h - product: its square sum, and itself where it is wanted
template <typename T>
struct ToResidual {
  const T* h;
  T* e;
  std::int64_t columns;
  Vec<T> ee;

  template <int R, int V>
  LOMACS_INLINE void take(Vec<T> (&re)[R][V], Vec<T> (&im)[R][V], std::int64_t i0, std::int64_t vec) {
    Vec<T> es{};
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) {
        const std::int64_t column = (vec + j) * lanes<T>, at = 2 * ((i0 + i) * columns + column);
        Vec<T> hr, hi;
        load_complex(h + at, columns - column, hr, hi);
        const Vec<T> er = hr - re[i][j], ei = hi - im[i][j];
        es += er * er + ei * ei;
        if (e != nullptr) store_complex(e + at, columns - column, er, ei);
      }
    ee += es;
  }
};

// product + x X + y Y
template <typename T>
struct ToSum {
  T* c;
  std::int64_t columns;
  const T *X, *Y;
  T x, y;

  template <int R, int V>
  LOMACS_INLINE void take(Vec<T> (&re)[R][V], Vec<T> (&im)[R][V], std::int64_t i0, std::int64_t vec) {
    // by way of memory: a loop that is not unrolled, in a sink that is seldom used
    Vec<T> real[R * V], imag[R * V];
#pragma GCC unroll 16
    for (int n = 0; n < R * V; ++n) real[n] = re[n / V][n % V], imag[n] = im[n / V][n % V];
#pragma GCC unroll 1
    for (int n = 0; n < R * V; ++n) {
      const std::int64_t column = (vec + n % V) * lanes<T>, at = 2 * ((i0 + n / V) * columns + column);
      Vec<T> xr, xi, yr, yi;
      load_complex(X + at, columns - column, xr, xi);
      load_complex(Y + at, columns - column, yr, yi);
      store_complex(c + at, columns - column, real[n] + x * xr + y * yr, imag[n] + x * xi + y * yi);
    }
  }
};

template <bool CONJ, int R, int V, typename T, typename Sink>
LOMACS_INLINE void block(const Term<T>* terms, int count, Sink& sink, std::int64_t i0, std::int64_t vec,
                         Ahead::Run& run) {
  if constexpr (requires { sink.template prepare<R, V>(i0, vec); }) sink.template prepare<R, V>(i0, vec);
  Vec<T> re[R][V] = {}, im[R][V] = {};
#if LOMACS_PRODUCTS == 3
  Vec<T> both[R][V] = {};
#pragma GCC unroll 1
  for (int t = 0; t < count; ++t) multiply<CONJ>(re, im, both, terms[t], i0, vec, run);
  parts_of_products<CONJ>(re, im, both);
#else
#pragma GCC unroll 1
  for (int t = 0; t < count; ++t) multiply<CONJ, R, V, T>(re, im, terms[t], i0, vec, run);
#endif
  sink.template take<R, V>(re, im, i0, vec);
}

template <bool CONJ, int V, typename T, typename Sink, int R = LOMACS_ROWS>
LOMACS_INLINE void block_of(std::int64_t rows, const Term<T>* terms, int count, Sink& sink, std::int64_t i0,
                            std::int64_t vec, Ahead::Run& run) {
  if constexpr (R > 1) {
    if (rows < R) return block_of<CONJ, V, T, Sink, R - 1>(rows, terms, count, sink, i0, vec, run);
  }
  // narrow halves of a low block lose little, and their code is there already
  if constexpr (V > 1 && 2 * R < LOMACS_ROWS) {
    for (int j = 0; j < V; ++j) block<CONJ, R, 1>(terms, count, sink, i0, vec + j, run);
  } else {
    block<CONJ, R, V>(terms, count, sink, i0, vec, run);
  }
}

enum class Part { all, upper };

template <bool CONJ, typename T, typename Sink>
LOMACS_TARGET __attribute__((noinline)) void blocks(const Term<T>* terms, int count, Sink& sink,
                                                    std::int64_t rows, std::int64_t columns, Ahead& ahead,
                                                    Part part) {
  const std::int64_t vecs = (columns + lanes<T> - 1) / lanes<T>;
  std::int64_t rounds = 0;
  for (int t = 0; t < count; ++t) rounds += terms[t].depth;
  // of nearly equal height: a low one would wait for its few accumulators
  const std::int64_t heights = (rows + LOMACS_ROWS - 1) / LOMACS_ROWS, low = rows / heights, higher = rows % heights;
  for (std::int64_t first = 0; first < vecs; first += LOMACS_VECS) {
    for (std::int64_t n = 0, i0 = 0, height = 0; n < heights; ++n, i0 += height) {
      height = low + (n < higher);
      const std::int64_t vec = part == Part::upper ? std::max(first, i0 / lanes<T>) : first;
      const std::int64_t width = std::min<std::int64_t>(first + LOMACS_VECS, vecs) - vec;
      if (width <= 0) continue;
      Ahead::Run run = ahead.next(rounds);
      if (width == LOMACS_VECS) block_of<CONJ, LOMACS_VECS>(height, terms, count, sink, i0, vec, run);
      else block_of<CONJ, 1>(height, terms, count, sink, i0, vec, run);
    }
  }
}

#if LOMACS_PRODUCTS == 3
// as many rows of the right half of a vector of columns; what the sink gets left of them is nothing
template <bool CONJ, typename T, typename Sink>
LOMACS_INLINE void half_block(const Term<T>* terms, int count, Sink& sink, std::int64_t i0, std::int64_t vec,
                              Ahead::Run& run) {
  constexpr int R = lanes<T> / 2;
  using Half = typename Simd<T, LOMACS_BYTES / 2>::Vec;
  Half re[R][1] = {}, im[R][1] = {}, both[R][1] = {};
#pragma GCC unroll 1
  for (int t = 0; t < count; ++t) multiply<CONJ>(re, im, both, terms[t], i0, vec, run);
  parts_of_products<CONJ>(re, im, both);
  Vec<T> whole_re[R][1], whole_im[R][1];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) whole_re[i][0] = right_half<T>(re[i][0]), whole_im[i][0] = right_half<T>(im[i][0]);
  sink.template take<R, 1>(whole_re, whole_im, i0, vec);
}

// Blocks on the diagonal and right of it, strips of half a square's rows; of the diagonal's squares the lower strip
// needs the right half alone.
template <bool CONJ, typename T, typename Sink>
LOMACS_TARGET __attribute__((noinline)) void upper_blocks(const Term<T>* terms, int count, Sink& sink, std::int64_t n,
                                                          Ahead& ahead) {
  constexpr std::int64_t strip = lanes<T> / 2;
  const std::int64_t vecs = (n + lanes<T> - 1) / lanes<T>;
  std::int64_t rounds = 0;
  for (int t = 0; t < count; ++t) rounds += terms[t].depth;
  for (std::int64_t first = 0; first < vecs; first += LOMACS_VECS) {
    const std::int64_t end = std::min<std::int64_t>(first + LOMACS_VECS, vecs);
    for (std::int64_t i0 = 0; i0 < std::min(end * lanes<T>, n); i0 += strip) {
      const std::int64_t height = std::min(strip, n - i0);
      std::int64_t vec = std::max(first, i0 / lanes<T>);
      if (vec == i0 / lanes<T> && i0 % lanes<T> != 0 && height == strip) {
        Ahead::Run run = ahead.next(rounds);
        half_block<CONJ>(terms, count, sink, i0, vec, run);
        ++vec;
      }
      if (vec == end) continue;
      if (end - vec < LOMACS_VECS && height == strip) {
        Ahead::Run run = ahead.next(rounds);
        block<CONJ, strip, 1>(terms, count, sink, i0, vec, run);
        continue;
      }
      const std::int64_t heights = (height + LOMACS_ROWS - 1) / LOMACS_ROWS;
      for (std::int64_t k = 0; k < heights; ++k) {
        const std::int64_t at = i0 + k * height / heights, high = i0 + (k + 1) * height / heights - at;
        Ahead::Run run = ahead.next(rounds);
        if (end - vec == LOMACS_VECS) block_of<CONJ, LOMACS_VECS>(high, terms, count, sink, at, vec, run);
        else block_of<CONJ, 1>(high, terms, count, sink, at, vec, run);
      }
    }
  }
}
#endif

// sink <- sum of left right over the terms, left conjugated or not; upper: the square matrix that `mirror` completes
template <bool CONJ, int TERMS, typename T, typename Sink>
LOMACS_INLINE void product(const Term<T> (&terms)[TERMS], Sink& sink, std::int64_t rows, std::int64_t columns,
                           Ahead& ahead, Part part = Part::all) {
#if LOMACS_PRODUCTS == 3
  if (part == Part::upper) return upper_blocks<CONJ>(terms, TERMS, sink, rows, ahead);
#endif
  blocks<CONJ>(terms, TERMS, sink, rows, columns, ahead, part);
}

}  // namespace
}  // namespace LOMACS_ISA
}  // namespace lomacs
