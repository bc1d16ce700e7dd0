// One factor of tall columns: its Gram matrix, one refinement step and the step's gradient.
// Included inside isa.inl by the files that need it.
#include "cmatmul.inl"
#include "pairs.inl"
#include "upper.h"

namespace lomacs {
namespace LOMACS_ISA {
// internal: other libraries of kernels may use the same names for other things
namespace {

constexpr double normal_eps = 1e-8;

template <typename T>
struct ToRowsAndPanels {
  ToRows<T> rows;
  ToPanels<T> panels;

  template <int R, int V>
  LOMACS_INLINE void prepare(std::int64_t i0, std::int64_t vec) const {
    rows.template prepare<R, V>(i0, vec);
  }

  template <int R, int V>
  LOMACS_INLINE void take(Vec<T> (&re)[R][V], Vec<T> (&im)[R][V], std::int64_t i0, std::int64_t vec) {
    rows.template take<R, V>(re, im, i0, vec);
    panels.template take<R, V>(re, im, i0, vec);
  }
};

// rows, and the square sums of their columns in chains of a block's height
template <typename T>
struct ToRowsAndSquares {
  ToRows<T> rows;
  T* squares;

  template <int R, int V>
  LOMACS_INLINE void prepare(std::int64_t i0, std::int64_t vec) const {
    rows.template prepare<R, V>(i0, vec);
  }

  template <int R, int V>
  LOMACS_INLINE void take(Vec<T> (&re)[R][V], Vec<T> (&im)[R][V], std::int64_t i0, std::int64_t vec) {
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      Vec<T> part{};
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) part += re[i][j] * re[i][j] + im[i][j] * im[i][j];
      T* s = squares + (vec + j) * lanes<T>;
      store(s, load(s) + part);
    }
    rows.template take<R, V>(re, im, i0, vec);
  }
};

// x times the upper half of a product to panels, and that half itself to where it is kept, if anywhere
template <typename T>
struct ToMultipleAndUpper {
  ToPanels<T> panels;
  T x;
  Upper<T> kept;

  template <int R, int V>
  LOMACS_INLINE void take(Vec<T> (&re)[R][V], Vec<T> (&im)[R][V], std::int64_t i0, std::int64_t vec) {
    if (kept.data != nullptr) {
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) {
        const std::int64_t column = (vec + j) * lanes<T>;
        T* p = kept.at(i0, column);
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i, p += Upper<T>::step) {
          // strips of half a vector's rows end where the blocks do, others may not
          if (LOMACS_PRODUCTS != 3 && i0 + i >= Upper<T>::rows(column / Upper<T>::block)) break;
          store(p, re[i][j]);
          store(p + Upper<T>::imag, im[i][j]);
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) re[i][j] *= x, im[i][j] *= x;
    panels.template take<R, V>(re, im, i0, vec);
  }
};

// rows that passes over columns take at a time: sums in chains so short, and lines read one after another
constexpr std::int64_t chunk_rows = 8;

// x to panels, with the square sums of its columns in short chains: they have one sign and their error would show
template <typename T>
LOMACS_TARGET void pack_squares(const T* x, std::int64_t rows, std::int64_t columns, Panels<T> to, T* squares) {
  std::fill_n(squares, whole<T>(columns), T(0));
  for (std::int64_t i0 = 0; i0 < rows; i0 += chunk_rows) {
    const std::int64_t stop = std::min(i0 + chunk_rows, rows);
    for (std::int64_t j = 0; j < columns; j += lanes<T>) {
      T* p = to.at(i0, j / lanes<T>);
      Vec<T> part{};
      for (std::int64_t i = i0; i < stop; ++i, p += Panels<T>::step) {
        Vec<T> re, im;
        load_complex(x + 2 * (i * columns + j), columns - j, re, im);
        store(p, re);
        store(p + Panels<T>::imag, im);
        part += re * re + im * im;
      }
      store(squares + j, load(squares + j) + part);
    }
  }
}

// to = x diag(s), which may be x itself
template <typename T>
LOMACS_TARGET void times_real(const T* x, const T* s, std::int64_t rows, std::int64_t columns, T* to) {
  for (std::int64_t i0 = 0; i0 < rows; i0 += chunk_rows) {
    const std::int64_t stop = std::min(i0 + chunk_rows, rows);
    std::int64_t j = 0;
    for (; j + lanes<T> <= columns; j += lanes<T>) {
      const Vec<T> weight = load(s + j);
      const Vec<T> low = zip_low<T>(weight, weight, Lanes<T>{}), high = zip_high<T>(weight, weight, Lanes<T>{});
      for (std::int64_t i = i0; i < stop; ++i) {
        const std::int64_t at = 2 * (i * columns + j);
        const Vec<T> first = low * load(x + at), second = high * load(x + at + lanes<T>);
        store(to + at, first);
        store(to + at + lanes<T>, second);
      }
    }
    if (j == columns) continue;
    const Vec<T> weight = load(s + j);
    for (std::int64_t i = i0; i < stop; ++i) {
      const std::int64_t at = 2 * (i * columns + j);
      Vec<T> re, im;
      load_complex(x + at, columns - j, re, im);
      store_complex(to + at, columns - j, re * weight, im * weight);
    }
  }
}

// a planar square matrix as interleaved rows
template <typename T>
LOMACS_TARGET void rows_of(Panels<T> X, std::int64_t n, T* to) {
  for (std::int64_t j = 0; j < n; j += lanes<T>)
    for (std::int64_t i = 0; i < n; ++i) {
      const T* p = X.at(i, j / lanes<T>);
      store_complex(to + 2 * (i * n + j), n - j, load(p), load(p + Panels<T>::imag));
    }
}

// to = x X + y Y
template <typename T>
LOMACS_TARGET void combine(Panels<T> X, T x, Panels<T> Y, T y, std::int64_t n, Panels<T> to) {
  for (std::int64_t vec = 0; vec * lanes<T> < n; ++vec)
    for (std::int64_t i = 0; i < n; ++i) {
      const T *p = X.at(i, vec), *q = Y.at(i, vec);
      T* o = to.at(i, vec);
      store(o, x * load(p) + y * load(q));
      store(o + Panels<T>::imag, x * load(p + Panels<T>::imag) + y * load(q + Panels<T>::imag));
    }
}

// to = x X
template <typename T>
LOMACS_TARGET void multiple(Panels<T> X, T x, std::int64_t n, Panels<T> to) {
  for (std::int64_t vec = 0; vec * lanes<T> < n; ++vec)
    for (std::int64_t i = 0; i < n; ++i) {
      const T* p = X.at(i, vec);
      T* o = to.at(i, vec);
      store(o, x * load(p));
      store(o + Panels<T>::imag, x * load(p + Panels<T>::imag));
    }
}

template <typename T>
LOMACS_TARGET void add_identity(Panels<T> X, T x, std::int64_t n) {
  for (std::int64_t k = 0; k < n; ++k) *X.element(k, k) += x;
}

// to = x (X + X^H)
template <typename T>
LOMACS_TARGET void hermitian_sum(Panels<T> X, T x, std::int64_t n, Panels<T> to) {
  adjoint(X, n, n, to);
  combine(X, x, to, x, n, to);
}

// of row k of a square on the diagonal: 1 right of the diagonal, a half on it, nothing left of it
template <typename T>
LOMACS_INLINE Vec<T> right_of_diagonal(std::int64_t k) {
  Vec<T> place;
#pragma GCC unroll 16
  for (int i = 0; i < lanes<T>; ++i) place[i] = static_cast<T>(i);
  const Vec<T> at = splat(static_cast<T>(k));
  // a comparison is -1 where it holds
  return T(-0.5) * (__builtin_convertvector(place > at, Vec<T>) + __builtin_convertvector(place >= at, Vec<T>));
}

// One plane of squares (i, j) and (j, i) of x (X + X^H), of the imaginary parts x (X - X^T) = -(..)^T, in their place,
// each from both. Returns what the upper one's inner product with the rows of g is, before x.
template <typename T>
LOMACS_INLINE Vec<T> hermitian_squares(T* upper, T* lower, const T* g, std::int64_t rows, T x, T sign, bool diagonal) {
  Vec<T> y[lanes<T>], part{};
#pragma GCC unroll 16
  for (int k = 0; k < lanes<T>; ++k) y[k] = load(lower + k * Panels<T>::step);
  transpose_square<T>(y);
#pragma GCC unroll 16
  for (int k = 0; k < lanes<T>; ++k) {
    y[k] = load(upper + k * Panels<T>::step) + sign * y[k];
    if (k < rows) {
      const Vec<T> inner = y[k] * load(g + k * Upper<T>::step);
      part += diagonal ? right_of_diagonal<T>(k) * inner : inner;
    }
    y[k] *= x;
  }
#pragma GCC unroll 16
  for (int k = 0; k < lanes<T>; ++k) store(upper + k * Panels<T>::step, y[k]);
  if (diagonal) return part;
  transpose_square<T>(y);
#pragma GCC unroll 16
  for (int k = 0; k < lanes<T>; ++k) store(lower + k * Panels<T>::step, sign * y[k]);
  return part;
}

// X becomes x (X + X^H); returns the sum of Re(X_ij conj(G_ij)) for a Hermitian G: by its upper half, as X + X^H has
// all of them twice
template <typename T>
LOMACS_TARGET double hermitian_sum_and_inner(Panels<T> X, T x, Upper<T> G, std::int64_t n) {
  double total = 0;
  for (std::int64_t j = 0; j * lanes<T> < n; ++j)
    for (std::int64_t i = 0; i <= j; ++i) {
      const std::int64_t first = i * lanes<T>, rows = std::min<std::int64_t>(lanes<T>, n - first);
      T *upper = X.at(first, j), *lower = X.at(j * lanes<T>, i);
      const T* g = G.at(first, j * lanes<T>);
      const Vec<T> re = hermitian_squares<T>(upper, lower, g, rows, x, 1, i == j);
      const Vec<T> im = hermitian_squares<T>(upper + Panels<T>::imag, lower + Panels<T>::imag, g + Upper<T>::imag,
                                             rows, x, -1, i == j);
      total += sum<T>(re + im);
    }
  return total;
}

// to = x^H x by its upper half; `planar` is x
template <typename T>
LOMACS_TARGET void gram_matrix(const T* x, Panels<T> planar, std::int64_t rows, std::int64_t r, Panels<T> to,
                               Ahead& ahead) {
  const Term<T> terms[] = {{{x, 1, r}, planar, rows}};
  ToPanels<T> sink{to};
  product<true>(terms, sink, r, r, ahead, Part::upper);
  mirror(to, r);
}

// normal_gradient of rows from i0 to `stop` and V whole vectors of columns from j on: on interleaved numbers, which are
// parted as they are stored
template <int V, typename T>
LOMACS_INLINE void normal_gradient_of(const T* x, const T* g, const T* of_g, const T* of_x, std::int64_t i0,
                                      std::int64_t stop, std::int64_t columns, std::int64_t j, Panels<T> to) {
  Vec<T> a[2 * V], b[2 * V];
#pragma GCC unroll 4
  for (int n = 0; n < 2 * V; ++n) a[n] = load(of_g + n * lanes<T>), b[n] = load(of_x + n * lanes<T>);
  T* p = to.at(i0, j / lanes<T>);
  for (std::int64_t i = i0; i < stop; ++i, p += Panels<T>::step) {
    Vec<T> y[2 * V];
#pragma GCC unroll 4
    for (int n = 0; n < 2 * V; ++n) {
      const std::int64_t at = 2 * (i * columns + j) + n * lanes<T>;
      y[n] = a[n] * load(g + at) - b[n] * load(x + at);
    }
#pragma GCC unroll 2
    for (int n = 0; n < V; ++n) {
      store(p + n * lanes<T>, evens<T>(y[2 * n], y[2 * n + 1], Lanes<T>{}));
      store(p + n * lanes<T> + Panels<T>::imag, odds<T>(y[2 * n], y[2 * n + 1], Lanes<T>{}));
    }
  }
}

// Gradient of columns x that were divided by (norm + eps), given that of the quotients, g:
// to = g diag(a) - x diag(q Re(x^H g)), a = 1 / (norm + eps), q = a^2 / norm, or 1 / norm for x the quotients
template <typename T>
LOMACS_TARGET void normal_gradient(const T* x, const T* g, const T* a, const T* q, std::int64_t rows,
                                   std::int64_t columns, Panels<T> to) {
  // by interleaved numbers: the sums of so many, then what g and x are multiplied by
  constexpr int many = 8;
  alignas(LOMACS_BYTES) T dots[many * lanes<T>], of_g[many * lanes<T>];
  std::int64_t j0 = 0;
  for (std::int64_t width; columns - j0 >= lanes<T>; j0 += width) {
    width = std::min<std::int64_t>(many / 2, (columns - j0) / lanes<T>) * lanes<T>;
    const std::int64_t vecs = 2 * width / lanes<T>;
    std::fill_n(dots, many * lanes<T>, T(0));
    for (std::int64_t i0 = 0; i0 < rows; i0 += chunk_rows) {
      const std::int64_t stop = std::min(i0 + chunk_rows, rows);
      for (std::int64_t n = 0; n < vecs; n += 2) {
        Vec<T> low{}, high{};
        for (std::int64_t i = i0; i < stop; ++i) {
          const std::int64_t at = 2 * (i * columns + j0) + n * lanes<T>;
          low += load(x + at) * load(g + at);
          high += load(x + at + lanes<T>) * load(g + at + lanes<T>);
        }
        store(dots + n * lanes<T>, load(dots + n * lanes<T>) + low);
        store(dots + (n + 1) * lanes<T>, load(dots + (n + 1) * lanes<T>) + high);
      }
    }
    for (std::int64_t n = 0; n < vecs; n += 2) {
      const std::int64_t j = j0 + n / 2 * lanes<T>;
      T *of_column = dots + n * lanes<T>, *of_gradient = of_g + n * lanes<T>;
      const Vec<T> low = load(of_column), high = load(of_column + lanes<T>);
      const Vec<T> dot = evens<T>(low, high, Lanes<T>{}) + odds<T>(low, high, Lanes<T>{});
      const Vec<T> along = dot * load(q + j), scale = load(a + j);
      store(of_column, zip_low<T>(along, along, Lanes<T>{}));
      store(of_column + lanes<T>, zip_high<T>(along, along, Lanes<T>{}));
      store(of_gradient, zip_low<T>(scale, scale, Lanes<T>{}));
      store(of_gradient + lanes<T>, zip_high<T>(scale, scale, Lanes<T>{}));
    }
    // from the last rows back, which are the nearest
    for (std::int64_t i0 = (rows - 1) / chunk_rows * chunk_rows; i0 >= 0; i0 -= chunk_rows) {
      const std::int64_t stop = std::min(i0 + chunk_rows, rows);
      std::int64_t n = 0;
      for (; n + 2 * LOMACS_VECS <= vecs; n += 2 * LOMACS_VECS)
        normal_gradient_of<LOMACS_VECS>(x, g, of_g + n * lanes<T>, dots + n * lanes<T>, i0, stop, columns,
                                        j0 + n / 2 * lanes<T>, to);
      for (; n < vecs; n += 2)
        normal_gradient_of<1>(x, g, of_g + n * lanes<T>, dots + n * lanes<T>, i0, stop, columns,
                              j0 + n / 2 * lanes<T>, to);
    }
  }
  if (j0 == columns) return;
  const std::int64_t count = columns - j0;
  Vec<T> dot{};
  for (std::int64_t i = 0; i < rows;) {
    Vec<T> part{};
    for (const std::int64_t stop = std::min(i + chunk_rows, rows); i < stop; ++i) {
      const std::int64_t at = 2 * (i * columns + j0);
      Vec<T> xr, xi, gr, gi;
      load_complex(x + at, count, xr, xi);
      load_complex(g + at, count, gr, gi);
      part += xr * gr + xi * gi;
    }
    dot += part;
  }
  const Vec<T> scale = load(a + j0), along = dot * load(q + j0);
  T* p = to.at(0, j0 / lanes<T>);
  for (std::int64_t i = 0; i < rows; ++i, p += Panels<T>::step) {
    const std::int64_t at = 2 * (i * columns + j0);
    Vec<T> xr, xi, gr, gi;
    load_complex(x + at, count, xr, xi);
    load_complex(g + at, count, gr, gi);
    store(p, scale * gr - along * xr);
    store(p + Panels<T>::imag, scale * gi - along * xi);
  }
}

// Scratch of a factor: U, I - step (U^H U - I) and one more r x r, planar; U P, interleaved; and of U^H U - I the upper
// half, unless it is kept elsewhere.
template <typename T>
struct Factor {
  Panels<T> U, P, K;
  Upper<T> residual;
  T *Y, *squares, *scale, *slope;
  PairScratch<T> pairs;

  void plan(Arena<T>& arena, std::int64_t rows, std::int64_t r, bool backward, bool planar) {
    pairs.plan(arena, rows, r, planar);
    U = take_panels(arena, rows, r);
    P = take_squares(arena, r, r);
    squares = take_row(arena, r);
    scale = take_row(arena, r);
    slope = take_row(arena, r);
    if (!backward) return;
    K = take_squares(arena, r, r);
    Y = arena.take(2 * rows * r);
    residual.data = arena.take(Upper<T>::size(r));
  }
};

// P = x G from the upper half of G
template <typename T>
LOMACS_TARGET void from_upper(Upper<T> G, std::int64_t r, T x, Panels<T> P) {
  for (std::int64_t j = 0; j < r; j += lanes<T>) {
    const T* p = G.at(0, j);
    T* o = P.at(0, j / lanes<T>);
    for (std::int64_t i = std::min(j + lanes<T>, r); i > 0; --i, p += Upper<T>::step, o += Panels<T>::step) {
      store(o, x * load(p));
      store(o + Panels<T>::imag, x * load(p + Upper<T>::imag));
    }
  }
  mirror(P, r);
}

// The diagonal of x.P, a (U^H U - I) + b, and of what is kept of U^H U - I, from the square sums, which become 0
template <typename T>
LOMACS_TARGET void diagonal_of_squares(const Factor<T>& x, std::int64_t r, T a, T b, Upper<T> kept) {
  for (std::int64_t k = 0; k < r; ++k) {
    const T g = x.squares[k] - 1;
    T* p = x.P.element(k, k);
    p[0] = a * g + b;
    p[Panels<T>::imag] = 0;
    x.squares[k] = 0;
    if (kept.data == nullptr) continue;
    T* q = kept.at(k, k);
    q[0] = g;
    q[Upper<T>::imag] = 0;
  }
}

#if LOMACS_PRODUCTS == 3
// refine_packed's residual and refined columns by pairs; columns of u are of one size
template <typename T>
LOMACS_TARGET void refine_by_pairs(const T* u, const Factor<T>& x, std::int64_t rows, std::int64_t r, double step, T* Y,
                                   Ahead& ahead, Upper<T> kept) {
  double total = 0;
  for (std::int64_t k = 0; k < r; ++k) total += static_cast<double>(x.squares[k]);
  const T unit = static_cast<T>(std::sqrt(total / static_cast<double>(rows * r)));
  ToMultipleAndUpper<T> upper{{x.P}, 1, kept};
  gram_by_pairs(u, x.U, rows, r, x.pairs, upper, ahead);
  mirror(x.P, r);
  diagonal_of_squares(x, r, T(1), T(0), kept);
  scale_for_pairs(x.P, r, unit, static_cast<T>(-step), x.pairs.weight, x.pairs.re, x.pairs.im);
  sums_of_column_pairs(x.U, rows, r, x.pairs.row_re, x.pairs.row_im);
  const Pairs<T> refined{u, {}, u + r, 2 * r, x.P, below(x.P, r / 2), r / 2};
  AddedTo<T, ToRowsAndSquares<T>> sink{x.U, x.pairs.weight, {{Y, r}, x.squares}};
  product_by_pairs<false, false>(refined, x.pairs.sums(), sink, rows, r, ahead);
}

// refine_product by pairs: with E = U^H U - I and S = U^H G + G^H U, of which s_ij is the sum of
// (conj(u_i) + u_j) (g_j + conj(g_i)) less what depends on i or j alone, it is G - step (G E + U S). False where the
// numbers are not of a size for it.
template <typename T, typename Sink>
LOMACS_TARGET bool refine_product_by_pairs(const T* u, Panels<T> G, const Factor<T>& x, Upper<T> residual,
                                           std::int64_t rows, std::int64_t r, double step, const Sink& sink,
                                           Ahead& ahead, double& gstep) {
  double total = 0;
  for (std::int64_t k = 0; k < r; ++k) {
    x.squares[k] = *residual.at(k, k) + 1;
    total += static_cast<double>(x.squares[k]);
  }
  if (!of_one_size(x.squares, r)) return false;
  const double many = static_cast<double>(rows * r);
  const double squares = pack_with_sums(u, G, rows, r, x.pairs);
  if (!of_common_size(squares, rows * r)) return false;
  const Pairs<T> cross{nullptr, G, u, 2 * r, x.pairs.W, G, rows};
  ToPanels<T> to{x.K};
  product_by_pairs<true, true>(cross, x.pairs.of_columns(), to, r, r, ahead, Part::upper);
  mirror(x.K, r);
  from_upper(residual, r, T(1), x.P);
  const T of_u = static_cast<T>(std::sqrt(total / many)), of_g = static_cast<T>(std::sqrt(squares / many));
  gstep = -0.5 * scale_for_pairs(x.P, x.K, r, of_u, of_g, static_cast<T>(-step), x.pairs);
  const Pairs<T> both{nullptr, G, u, 2 * r, x.P, x.K, r};
  AddedTo<T, Sink> added{G, x.pairs.weight, sink};
  product_by_pairs<false, true>(both, x.pairs.sums(), added, rows, r, ahead);
  return true;
}
#endif

// 1 / (norm + eps) of refined columns to x.scale, and what their gradient takes to x.slope
template <typename T>
LOMACS_TARGET void refined_scales(const Factor<T>& x, std::int64_t r) {
  for (std::int64_t k = 0; k < r; ++k) {
    const double n = std::sqrt(static_cast<double>(x.squares[k])), a = 1 / (n + normal_eps);
    x.scale[k] = static_cast<T>(a);
    x.slope[k] = static_cast<T>(n != 0 ? a * a / n : 0.0);
  }
}

// Y = U - step U (U^H U - I) for the u that is in x.U too, the square sums of its columns in x.squares; leaves
// 1 / (norm + eps) of Y's columns in x.scale and, where it is to be kept, the upper half of U^H U - I
template <typename T>
LOMACS_TARGET void refine_packed(const T* u, const Factor<T>& x, std::int64_t rows, std::int64_t r, double step, T* Y,
                                 Ahead& ahead, Upper<T> kept = {}) {
#if LOMACS_PRODUCTS == 3
  if (x.pairs.takes(rows) && of_one_size(x.squares, r)) {
    refine_by_pairs(u, x, rows, r, step, Y, ahead, kept);
    return refined_scales(x, r);
  }
#endif
  // what no vector of a product reaches
  if (kept.data != nullptr && (lanes<T> != Upper<T>::block || r % Upper<T>::block != 0))
    std::fill_n(kept.data, Upper<T>::size(r), T(0));
  const Term<T> gram[] = {{{u, 1, r}, x.U, rows}};
  ToMultipleAndUpper<T> upper{{x.P}, static_cast<T>(-step), kept};
  product<true>(gram, upper, r, r, ahead, Part::upper);
  mirror(x.P, r);
  diagonal_of_squares(x, r, static_cast<T>(-step), T(1), kept);
  const Term<T> terms[] = {{{u, r, 1}, x.P, r}};
  ToRowsAndSquares<T> sink{{Y, r}, x.squares};
  product<false>(terms, sink, rows, r, ahead);
  refined_scales(x, r);
}

template <typename T>
LOMACS_TARGET void refine_columns(const T* u, const Factor<T>& x, std::int64_t rows, std::int64_t r, double step,
                                  T* Y, Ahead& ahead, Upper<T> kept = {}) {
  pack_squares(u, rows, r, x.U, x.squares);
  refine_packed(u, x, rows, r, step, Y, ahead, kept);
}

// To the sink the gradient of u from that of its refined columns, which is in G; returns that of the step.
template <typename T, typename Sink>
LOMACS_TARGET double refine_product(const T* u, Panels<T> G, const Factor<T>& x, Upper<T> residual, std::int64_t rows,
                                    std::int64_t r, double step, Sink sink, Ahead& ahead) {
#if LOMACS_PRODUCTS == 3
  double of_step = 0;
  if (x.pairs.takes(rows) && refine_product_by_pairs(u, G, x, residual, rows, r, step, sink, ahead, of_step))
    return of_step;
#endif
  from_upper(residual, r, static_cast<T>(-step), x.P);
  add_identity(x.P, static_cast<T>(1), r);
  const Term<T> cross[] = {{{u, 1, r}, G, rows}};
  ToPanels<T> of_gram{x.K};
  product<true>(cross, of_gram, r, r, ahead);
  const double gstep = -hermitian_sum_and_inner(x.K, static_cast<T>(-step), residual, r);
  const Term<T> terms[] = {{left_of(G), x.P, r}, {{u, r, 1}, x.K, r}};
  product<false>(terms, sink, rows, r, ahead);
  return gstep;
}

// gU from the gradient g of the normalised columns; returns that of the step. After refine_columns into x.Y, which
// is `columns`; or those normalised, and then x.slope has 1 / norm.
template <typename T>
LOMACS_TARGET double refine_gradient(const T* u, const T* columns, const T* g, const Factor<T>& x, Upper<T> residual,
                                     std::int64_t rows, std::int64_t r, double step, T* gU, Ahead& ahead) {
  normal_gradient(columns, g, x.scale, x.slope, rows, r, x.U);
  return refine_product(u, x.U, x, residual, rows, r, step, ToRows<T>{gU, r}, ahead);
}

}  // namespace
}  // namespace LOMACS_ISA
}  // namespace lomacs
