// Products of complex matrices of which a multiplication serves two terms (Winograd 1968):
//   a1 b1 + a2 b2 = (a1 + b2) (b1 + a2) - a1 a2 - b1 b2,
// the last two summed once a row and once a column. A term then takes half the multiplications and two complex
// additions, which cost nothing where a processor has adders beside its multipliers. The error is that of
// (|a| + |b|)^2: factors must be brought to one scale. Included inside isa.inl after cmatmul.inl.

namespace lomacs {
namespace LOMACS_ISA {
namespace {

// rows of a block: one vector of columns beside them leaves registers for both right rows and the sums
constexpr std::int64_t pair_rows = 8;

// The left numbers a1 and a2 and the rows b1 and b2 of `depth` pairs. a2 lies interleaved, in rows of `row` numbers,
// and so does a1 where it is not in panels; conjugated ones are read by columns.
template <typename T>
struct Pairs {
  const T* a1;
  Panels<T> planar;
  const T* a2;
  std::int64_t row;
  Panels<T> b1, b2;
  std::int64_t depth;
};

// sums of a1 a2 a row and of b1 b2 a column
template <typename T>
struct PairSums {
  const T *row_re, *row_im, *re, *im;
};

// Scratch of products by pairs, and whether they are to be taken: sums by row and by column, what columns of a product
// are multiplied by, and a planar factor of so many rows.
template <typename T>
struct PairScratch {
  Panels<T> W;
  T *row_re, *row_im, *re, *im, *weight;
  bool wanted;

  void plan(Arena<T>& arena, std::int64_t rows, std::int64_t r, bool planar) {
    wanted = LOMACS_PRODUCTS == 3 && sizeof(T) == 4 && adds_beside() && r % (2 * lanes<T>) == 0;
    for (T** row : {&row_re, &row_im}) *row = take_row(arena, std::max(rows, r));
    for (T** row : {&re, &im, &weight}) *row = take_row(arena, std::max(rows, r));
    // as it stands or lying
    if (planar && wanted) W = {arena.take(std::max(Panels<T>::size(rows, r), Panels<T>::size(r, rows))), rows};
  }
  bool takes(std::int64_t rows) const { return wanted && rows % lanes<T> == 0; }
  PairSums<T> of_columns() const { return {re, im, re, im}; }
  PairSums<T> sums() const { return {row_re, row_im, re, im}; }
};

// whether columns of these square sums are near enough in size, and neither very large nor small
template <typename T>
bool of_one_size(const T* squares, std::int64_t r) {
  if (!(squares[0] >= 0)) return false;
  T least = squares[0], most = squares[0];
  for (std::int64_t k = 1; k < r; ++k) {
    // NaN is in no order
    if (!(squares[k] >= 0)) return false;
    least = std::min(least, squares[k]);
    most = std::max(most, squares[k]);
  }
  return least > T(1e-6) && most < T(1e6) && most <= 16 * least;
}

// a power of two near x, which is positive
template <typename T>
T power_of_two(double x) {
  return static_cast<T>(std::ldexp(1.0, std::ilogb(x)));
}

// whether numbers of this square sum have squares that T holds
inline bool of_common_size(double squares, std::int64_t count) {
  const double mean = squares / static_cast<double>(count);
  return mean > 1e-20 && mean < 1e20;
}

#if LOMACS_PRODUCTS == 3
template <bool CONJ, bool PLANAR, int R, typename X, typename T>
LOMACS_INLINE void multiply_pairs(X (&re)[R][1], X (&im)[R][1], const Pairs<T>& term, std::int64_t i0,
                                  std::int64_t vec, Ahead::Run& run) {
  using Loose = typename Simd<T, sizeof(X)>::Loose;
  constexpr std::int64_t skipped = (LOMACS_BYTES - sizeof(X)) / sizeof(T), imag = Panels<T>::imag;
  const std::int64_t row1 = PLANAR ? (CONJ ? 1 : Panels<T>::step) : CONJ ? 2 : term.row, row2 = CONJ ? 2 : term.row;
  const std::int64_t column1 = PLANAR ? (CONJ ? Panels<T>::step : 1) : CONJ ? term.row : 2;
  const std::int64_t column2 = CONJ ? term.row : 2, imag1 = PLANAR ? imag : 1;
  // rows of a planar factor go on in the next panel
  const std::int64_t chunk = PLANAR && !CONJ ? panel<T> : term.depth;
  const std::int64_t jump = PLANAR && !CONJ ? term.planar.rows * Panels<T>::step - panel<T> : 0;
  const T* p = !PLANAR ? term.a1 + i0 * row1 : CONJ ? term.planar.element(0, i0) : term.planar.at(i0, 0);
  const T* q = term.a2 + i0 * row2;
  const T *b = term.b1.at(0, vec) + skipped, *d = term.b2.at(0, vec) + skipped;
  for (std::int64_t depth = term.depth; depth > 0; depth -= chunk, p += jump)
    for (std::int64_t k = std::min(depth, chunk); k > 0;
         --k, p += column1, q += column2, b += Panels<T>::step, d += Panels<T>::step) {
      run.step();
      const X br = *reinterpret_cast<const Loose*>(b), bi = *reinterpret_cast<const Loose*>(b + imag);
      const X dr = *reinterpret_cast<const Loose*>(d), di = *reinterpret_cast<const Loose*>(d + imag);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        const X xr = with_number<false>(dr, p + i * row1), xi = with_number<CONJ>(di, p + i * row1 + imag1);
        const X yr = with_number<false>(br, q + i * row2), yi = with_number<CONJ>(bi, q + i * row2 + 1);
        re[i][0] += xr * yr;
        im[i][0] += xr * yi;
        re[i][0] -= xi * yi;
        im[i][0] += xi * yr;
      }
    }
}

template <bool CONJ, bool PLANAR, typename X, typename T, typename Sink>
LOMACS_INLINE void pair_block(const Pairs<T>& term, const PairSums<T>& sums, Sink& sink, std::int64_t i0,
                              std::int64_t vec, Ahead::Run& run) {
  constexpr int R = pair_rows;
  using Loose = typename Simd<T, sizeof(X)>::Loose;
  constexpr std::int64_t skipped = (LOMACS_BYTES - sizeof(X)) / sizeof(T);
  if constexpr (requires { sink.template prepare<R, 1>(i0, vec); }) sink.template prepare<R, 1>(i0, vec);
  X re[R][1] = {}, im[R][1] = {};
  multiply_pairs<CONJ, PLANAR>(re, im, term, i0, vec, run);
  const X sr = *reinterpret_cast<const Loose*>(sums.re + vec * lanes<T> + skipped);
  const X si = *reinterpret_cast<const Loose*>(sums.im + vec * lanes<T> + skipped);
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
    re[i][0] -= with_number<false>(sr, sums.row_re + i0 + i);
    im[i][0] -= with_number<CONJ>(si, sums.row_im + i0 + i);
  }
  if constexpr (sizeof(X) == LOMACS_BYTES) {
    sink.template take<R, 1>(re, im, i0, vec);
  } else {
    Vec<T> whole_re[R][1], whole_im[R][1];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) whole_re[i][0] = right_half<T>(re[i][0]), whole_im[i][0] = right_half<T>(im[i][0]);
    sink.template take<R, 1>(whole_re, whole_im, i0, vec);
  }
}

// sink <- a1 b1 + a2 b2 summed over the pairs, as `product` has it; whole blocks and vectors
template <bool CONJ, bool PLANAR, typename T, typename Sink>
LOMACS_TARGET __attribute__((noinline)) void product_by_pairs(const Pairs<T>& term, const PairSums<T>& sums, Sink& sink,
                                                              std::int64_t rows, std::int64_t columns, Ahead& ahead,
                                                              Part part = Part::all) {
  using Half = typename Simd<T, LOMACS_BYTES / 2>::Vec;
  for (std::int64_t vec = 0; vec * lanes<T> < columns; ++vec) {
    const std::int64_t diagonal = vec * lanes<T>;
    const std::int64_t stop = part == Part::upper ? std::min(diagonal + lanes<T>, rows) : rows;
    for (std::int64_t i0 = 0; i0 < stop; i0 += pair_rows) {
      Ahead::Run run = ahead.next(term.depth);
      // of a square on the diagonal the lower strip needs its right half alone
      if (part == Part::upper && i0 > diagonal)
        pair_block<CONJ, PLANAR, Half>(term, sums, sink, i0, vec, run);
      else
        pair_block<CONJ, PLANAR, Vec<T>>(term, sums, sink, i0, vec, run);
    }
  }
}

// base + c_j times the product's column j, handed on
template <typename T, typename Sink>
struct AddedTo {
  Panels<T> base;
  const T* c;
  Sink to;

  template <int R, int V>
  LOMACS_INLINE void prepare(std::int64_t i0, std::int64_t vec) const {
    if constexpr (requires { to.template prepare<R, V>(i0, vec); }) to.template prepare<R, V>(i0, vec);
  }

  template <int R, int V>
  LOMACS_INLINE void take(Vec<T> (&re)[R][V], Vec<T> (&im)[R][V], std::int64_t i0, std::int64_t vec) {
    static_assert(V == 1);
    const Vec<T> weight = load(c + vec * lanes<T>);
    const T* p = base.at(i0, vec);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i, p += Panels<T>::step) {
      re[i][0] = load(p) + weight * re[i][0];
      im[i][0] = load(p + Panels<T>::imag) + weight * im[i][0];
    }
    to.template take<R, V>(re, im, i0, vec);
  }
};

template <typename T, int... I>
LOMACS_INLINE Vec<T> swapped(Vec<T> x, std::integer_sequence<int, I...>) {
  return LOMACS_SHUFFLE(T, x, x, (I ^ 1)...);
}

// the sum of every one of the vectors, in a vector
template <typename T>
LOMACS_INLINE Vec<T> sums_of(Vec<T> (&x)[lanes<T>]) {
  transpose_square<T>(x);
#pragma GCC unroll 16
  for (int half = lanes<T> / 2; half > 0; half /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  return x[0];
}

// sum over the upper half of the rows of x_m x_{m + rows / 2} for every column, in short chains
template <typename T>
LOMACS_TARGET void sums_of_row_pairs(Panels<T> X, std::int64_t rows, std::int64_t columns, T* re, T* im) {
  const std::int64_t half = rows / 2;
  for (std::int64_t vec = 0; vec * lanes<T> < columns; ++vec) {
    const T *p = X.at(0, vec), *q = X.at(half, vec);
    Vec<T> total_re{}, total_im{};
    for (std::int64_t m = 0; m < half;) {
      Vec<T> part_re{}, part_im{};
      for (const std::int64_t stop = std::min<std::int64_t>(m + 8, half); m < stop; ++m) {
        const T *a = p + m * Panels<T>::step, *b = q + m * Panels<T>::step;
        const Vec<T> ar = load(a), ai = load(a + Panels<T>::imag), br = load(b), bi = load(b + Panels<T>::imag);
        part_re += ar * br - ai * bi;
        part_im += ar * bi + ai * br;
      }
      total_re += part_re;
      total_im += part_im;
    }
    store(re + vec * lanes<T>, total_re);
    store(im + vec * lanes<T>, total_im);
  }
}

// sum over the left half of the columns of x_k x_{k + columns / 2} for every row
template <typename T>
LOMACS_TARGET void sums_of_column_pairs(Panels<T> X, std::int64_t rows, std::int64_t columns, T* re, T* im) {
  const std::int64_t half = columns / lanes<T> / 2;
  for (std::int64_t i0 = 0; i0 < rows; i0 += lanes<T>) {
    Vec<T> sum_re[lanes<T>], sum_im[lanes<T>];
#pragma GCC unroll 1
    for (int i = 0; i < lanes<T>; ++i) {
      Vec<T> part_re{}, part_im{};
      for (std::int64_t vec = 0; vec < half; ++vec) {
        const T *a = X.at(i0 + i, vec), *b = X.at(i0 + i, vec + half);
        const Vec<T> ar = load(a), ai = load(a + Panels<T>::imag), br = load(b), bi = load(b + Panels<T>::imag);
        part_re += ar * br - ai * bi;
        part_im += ar * bi + ai * br;
      }
      sum_re[i] = part_re, sum_im[i] = part_im;
    }
    store(re + i0, sums_of<T>(sum_re));
    store(im + i0, sums_of<T>(sum_im));
  }
}

// x to the panels W, and the sums of x g (not conjugated) for every row and every column; returns the square sum of g
template <typename T>
LOMACS_TARGET double pack_with_sums(const T* x, Panels<T> g, std::int64_t rows, std::int64_t columns,
                                    const PairScratch<T>& sums) {
  double squares = 0;
  T *re = sums.re, *im = sums.im;
  std::fill_n(re, columns, T(0));
  std::fill_n(im, columns, T(0));
  for (std::int64_t i0 = 0; i0 < rows; i0 += lanes<T>) {
    Vec<T> sum_re[lanes<T>], sum_im[lanes<T>];
#pragma GCC unroll 1
    for (int i = 0; i < lanes<T>; ++i) sum_re[i] = sum_im[i] = Vec<T>{};
    for (std::int64_t j = 0; j < columns; j += lanes<T>) {
      const T *from = x + 2 * (i0 * columns + j), *p = g.at(i0, j / lanes<T>);
      T* o = sums.W.at(i0, j / lanes<T>);
      Vec<T> part_re{}, part_im{}, part{};
#pragma GCC unroll 1
      for (int i = 0; i < lanes<T>; ++i, from += 2 * columns, p += Panels<T>::step, o += Panels<T>::step) {
        Vec<T> xr, xi;
        load_complex(from, lanes<T>, xr, xi);
        store(o, xr);
        store(o + Panels<T>::imag, xi);
        const Vec<T> gr = load(p), gi = load(p + Panels<T>::imag);
        const Vec<T> yr = xr * gr - xi * gi, yi = xr * gi + xi * gr;
        part_re += yr, part_im += yi;
        sum_re[i] += yr, sum_im[i] += yi;
        part += gr * gr + gi * gi;
      }
      squares += sum<T>(part);
      store(re + j, load(re + j) + part_re);
      store(im + j, load(im + j) + part_im);
    }
    store(sums.row_re + i0, sums_of<T>(sum_re));
    store(sums.row_im + i0, sums_of<T>(sum_im));
  }
  return squares;
}

// rows of a planar matrix from row i on
template <typename T>
Panels<T> below(Panels<T> x, std::int64_t i) {
  return {x.data + i * Panels<T>::step, x.rows};
}

// The upper half of x^H x, columns of one size, to the sink; `planar` is x
template <typename T, typename Sink>
LOMACS_INLINE void gram_by_pairs(const T* x, Panels<T> planar, std::int64_t rows, std::int64_t r,
                                 const PairScratch<T>& scratch, Sink& sink, Ahead& ahead) {
  sums_of_row_pairs(planar, rows, r, scratch.re, scratch.im);
  const Pairs<T> terms{x, {}, x + rows * r, 2 * r, planar, below(planar, rows / 2), rows / 2};
  product_by_pairs<true, false>(terms, scratch.of_columns(), sink, r, r, ahead, Part::upper);
}

// sums of x_k y_k over n columns of interleaved rows, `row` numbers from one to the next; returns the square sum of both
template <typename T>
LOMACS_TARGET double sums_of_products(const T* x, const T* y, std::int64_t row, std::int64_t rows, std::int64_t n, T* re,
                                    T* im) {
  // numbers of odd place are imaginary parts: their products have the other sign
  Vec<T> sign;
  for (int i = 0; i < lanes<T>; ++i) sign[i] = static_cast<T>(i % 2 ? -1 : 1);
  double squares = 0;
  for (std::int64_t i0 = 0; i0 < rows; i0 += lanes<T>) {
    Vec<T> sum_re[lanes<T>], sum_im[lanes<T>], total{};
#pragma GCC unroll 1
    for (int i = 0; i < lanes<T>; ++i) {
      const T *p = x + (i0 + i) * row, *q = y + (i0 + i) * row;
      Vec<T> part_re{}, part_im{}, part{};
      for (std::int64_t k = 0; k < 2 * n; k += lanes<T>) {
        const Vec<T> a = load(p + k), b = load(q + k);
        part += a * a + b * b;
        part_re += a * b;
        part_im += a * swapped<T>(b, Lanes<T>{});
      }
      sum_re[i] = sign * part_re, sum_im[i] = part_im;
      total += part;
    }
    store(re + i0, sums_of<T>(sum_re));
    store(im + i0, sums_of<T>(sum_im));
    squares += sum<T>(total);
  }
  return squares;
}

// sums of x_m x_{m + rows / 2} of the columns of interleaved rows, in short chains; returns the square sum
template <typename T>
LOMACS_TARGET double sums_of_row_pairs(const T* x, std::int64_t rows, std::int64_t columns, T* re, T* im) {
  const std::int64_t half = rows / 2;
  double squares = 0;
  std::fill_n(re, columns, T(0));
  std::fill_n(im, columns, T(0));
  for (std::int64_t m0 = 0; m0 < half; m0 += 8) {
    const std::int64_t stop = std::min<std::int64_t>(m0 + 8, half);
    Vec<T> total{};
    for (std::int64_t j = 0; j < columns; j += lanes<T>) {
      Vec<T> part_re{}, part_im{};
      for (std::int64_t m = m0; m < stop; ++m) {
        Vec<T> ar, ai, br, bi;
        load_complex(x + 2 * (m * columns + j), lanes<T>, ar, ai);
        load_complex(x + 2 * ((m + half) * columns + j), lanes<T>, br, bi);
        total += (ar * ar + ai * ai) + (br * br + bi * bi);
        part_re += ar * br - ai * bi;
        part_im += ar * bi + ai * br;
      }
      store(re + j, load(re + j) + part_re);
      store(im + j, load(im + j) + part_im);
    }
    squares += sum<T>(total);
  }
  return squares;
}

// x X in the scratch, and the sums of its row pairs
template <typename T>
LOMACS_TARGET Panels<T> scaled_with_sums(Panels<T> X, std::int64_t rows, std::int64_t columns, T x,
                                         const PairScratch<T>& scratch) {
  const Panels<T> to{scratch.W.data, X.rows};
  const std::int64_t n = Panels<T>::size(X.rows, columns);
  for (std::int64_t i = 0; i < n; i += lanes<T>) store(to.data + i, x * load(X.data + i));
  sums_of_row_pairs(to, rows, columns, scratch.re, scratch.im);
  return to;
}

// c_j times the product's column j, handed on
template <typename T, typename Sink>
struct ColumnMultiples {
  const T* c;
  Sink to;

  template <int R, int V>
  LOMACS_INLINE void prepare(std::int64_t i0, std::int64_t vec) const {
    if constexpr (requires { to.template prepare<R, V>(i0, vec); }) to.template prepare<R, V>(i0, vec);
  }

  template <int R, int V>
  LOMACS_INLINE void take(Vec<T> (&re)[R][V], Vec<T> (&im)[R][V], std::int64_t i0, std::int64_t vec) {
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      const Vec<T> weight = load(c + (vec + j) * lanes<T>);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) re[i][j] *= weight, im[i][j] *= weight;
    }
    to.template take<R, V>(re, im, i0, vec);
  }
};

// What multiplies interleaved rows x (rows, n) with columns y of numbers near `of_y`, its sums and multiples in the
// scratch; without right factors where the numbers of x are not of a size for it.
template <typename T>
LOMACS_TARGET Pairs<T> prepared_pairs(const T* x, Panels<T> y, double of_y, std::int64_t rows, std::int64_t n,
                                      std::int64_t columns, const PairScratch<T>& scratch) {
  const double squares = sums_of_products(x, x + n, 2 * n, rows, n / 2, scratch.row_re, scratch.row_im);
  if (!of_common_size(squares, rows * n)) return {};
  const T scale = power_of_two<T>(of_y / std::sqrt(squares / static_cast<double>(rows * n)));
  std::fill_n(scratch.weight, columns, scale);
  const Panels<T> right = scaled_with_sums(y, n, columns, 1 / scale, scratch);
  return {x, {}, x + n, 2 * n, right, below(right, n / 2), n / 2};
}

// x y to the sink; false where nothing was done
template <typename T, typename Sink>
LOMACS_TARGET bool multiplied_by_pairs(const T* x, Panels<T> y, double of_y, std::int64_t rows, std::int64_t n,
                                       std::int64_t columns, const PairScratch<T>& scratch, const Sink& sink,
                                       Ahead& ahead) {
  const Pairs<T> pairs = prepared_pairs(x, y, of_y, rows, n, columns, scratch);
  if (pairs.b1.data == nullptr) return false;
  ColumnMultiples<T, Sink> multiples{scratch.weight, sink};
  product_by_pairs<false, false>(pairs, scratch.sums(), multiples, rows, columns, ahead);
  return true;
}

// the same of x^H y, for interleaved x (m, rows)
template <typename T, typename Sink>
LOMACS_TARGET bool adjoint_multiplied_by_pairs(const T* x, Panels<T> y, double of_y, std::int64_t m, std::int64_t rows,
                                               std::int64_t columns, const PairScratch<T>& scratch, const Sink& sink,
                                               Ahead& ahead) {
  const double squares = sums_of_row_pairs(x, m, rows, scratch.row_re, scratch.row_im);
  if (!of_common_size(squares, m * rows)) return false;
  const T scale = power_of_two<T>(of_y / std::sqrt(squares / static_cast<double>(m * rows)));
  std::fill_n(scratch.weight, columns, scale);
  const Panels<T> right = scaled_with_sums(y, m, columns, 1 / scale, scratch);
  const Pairs<T> pairs{x, {}, x + m * rows, 2 * rows, right, below(right, m / 2), m / 2};
  ColumnMultiples<T, Sink> multiples{scratch.weight, sink};
  product_by_pairs<true, false>(pairs, scratch.sums(), multiples, rows, columns, ahead);
  return true;
}

// powers of two near x, for x from none to the largest; what is less than 2^-24 counts as that
template <typename T>
LOMACS_INLINE Vec<T> powers_of_two(Vec<T> x) {
  if constexpr (sizeof(T) == 4) {
    const __m512 power = _mm512_max_ps(_mm512_getexp_ps((__m512)x), _mm512_set1_ps(-24));
    return (Vec<T>)_mm512_scalef_ps(_mm512_set1_ps(1), power);
  } else {
    const __m512d power = _mm512_max_pd(_mm512_getexp_pd((__m512d)x), _mm512_set1_pd(-24));
    return (Vec<T>)_mm512_scalef_pd(_mm512_set1_pd(1), power);
  }
}

template <typename T>
LOMACS_INLINE Vec<T> column_squares_of(Panels<T> X, std::int64_t rows, std::int64_t vec) {
  Vec<T> total{};
  const T* p = X.at(0, vec);
  for (std::int64_t i = 0; i < rows; ++i, p += Panels<T>::step) {
    const Vec<T> re = load(p), im = load(p + Panels<T>::imag);
    total += re * re + im * im;
  }
  return total;
}

// The right factor E of a product whose left factor's numbers are of size `unit`: columns to that size, by powers of
// two, c = x over what they were multiplied by, and the sums of e_k e_{k + r / 2}
template <typename T>
LOMACS_TARGET void scale_for_pairs(Panels<T> E, std::int64_t r, T unit, T x, T* c, T* re, T* im) {
  for (std::int64_t vec = 0; vec * lanes<T> < r; ++vec) {
    const Vec<T> size = square_root<T>(column_squares_of(E, r, vec) / static_cast<T>(r));
    const Vec<T> power = powers_of_two<T>(size / unit), inverse = T(1) / power;
    store(c + vec * lanes<T>, x * power);
    Vec<T> total_re{}, total_im{};
    T *p = E.at(0, vec), *q = E.at(r / 2, vec);
    for (std::int64_t k = r / 2; k > 0; --k, p += Panels<T>::step, q += Panels<T>::step) {
      const Vec<T> ar = inverse * load(p), ai = inverse * load(p + Panels<T>::imag);
      const Vec<T> br = inverse * load(q), bi = inverse * load(q + Panels<T>::imag);
      store(p, ar);
      store(p + Panels<T>::imag, ai);
      store(q, br);
      store(q + Panels<T>::imag, bi);
      total_re += ar * br - ai * bi;
      total_im += ar * bi + ai * br;
    }
    store(re + vec * lanes<T>, total_re);
    store(im + vec * lanes<T>, total_im);
  }
}

// The same for two, E beside numbers of size `of_e` and S beside such of `of_s`, and the sums of s_k e_k; returns the
// inner product of what they were, which are Hermitian
template <typename T>
LOMACS_TARGET double scale_for_pairs(Panels<T> E, Panels<T> S, std::int64_t r, T of_e, T of_s, T x,
                                     const PairScratch<T>& sums) {
  double inner = 0;
  for (std::int64_t vec = 0; vec * lanes<T> < r; ++vec) {
    const Vec<T> n = splat(static_cast<T>(r));
    const Vec<T> first = square_root<T>(column_squares_of(E, r, vec) / n) / of_e;
    const Vec<T> second = square_root<T>(column_squares_of(S, r, vec) / n) / of_s;
    const Vec<T> power = powers_of_two<T>(first > second ? first : second), inverse = T(1) / power;
    store(sums.weight + vec * lanes<T>, x * power);
    Vec<T> total_re{}, total_im{}, total{};
    T *p = E.at(0, vec), *q = S.at(0, vec);
    for (std::int64_t k = r; k > 0; --k, p += Panels<T>::step, q += Panels<T>::step) {
      const Vec<T> ar = load(p), ai = load(p + Panels<T>::imag), br = load(q), bi = load(q + Panels<T>::imag);
      total += ar * br + ai * bi;
      const Vec<T> er = inverse * ar, ei = inverse * ai, sr = inverse * br, si = inverse * bi;
      store(p, er);
      store(p + Panels<T>::imag, ei);
      store(q, sr);
      store(q + Panels<T>::imag, si);
      total_re += er * sr - ei * si;
      total_im += er * si + ei * sr;
    }
    store(sums.re + vec * lanes<T>, total_re);
    store(sums.im + vec * lanes<T>, total_im);
    inner += sum<T>(total);
  }
  return inner;
}
#endif

}  // namespace
}  // namespace LOMACS_ISA
}  // namespace lomacs
