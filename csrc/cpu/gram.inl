// One factor of tall columns: its Gram matrix, one refinement step and the step's gradient.
// Included inside isa.inl by the files that need it.
#include "cmatmul.inl"

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

// x to panels, with the square sums of its columns in short chains: they have one sign and their error would show
template <typename T>
LOMACS_TARGET void pack_squares(const T* x, std::int64_t rows, std::int64_t columns, Panels<T> to, T* squares) {
  for (std::int64_t j = 0; j < columns; j += lanes<T>) {
    T* p = to.at(0, j / lanes<T>);
    Vec<T> total{};
    for (std::int64_t i = 0; i < rows;) {
      Vec<T> part{};
      for (const std::int64_t stop = std::min<std::int64_t>(i + 8, rows); i < stop; ++i, p += Panels<T>::step) {
        Vec<T> re, im;
        load_complex(x + 2 * (i * columns + j), columns - j, re, im);
        store(p, re);
        store(p + Panels<T>::imag, im);
        part += re * re + im * im;
      }
      total += part;
    }
    store(squares + j, total);
  }
}

// to = x diag(s), which may be x itself
template <typename T>
LOMACS_TARGET void times_real(const T* x, const T* s, std::int64_t rows, std::int64_t columns, T* to) {
  for (std::int64_t j = 0; j < columns; j += lanes<T>) {
    const std::int64_t count = columns - j;
    const Vec<T> weight = load(s + j);
    for (std::int64_t i = 0; i < rows; ++i) {
      const std::int64_t at = 2 * (i * columns + j);
      Vec<T> re, im;
      load_complex(x + at, count, re, im);
      store_complex(to + at, count, re * weight, im * weight);
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

// to = x (X + X^H); returns the sum of Re(X_ij conj(G_ij)) for a Hermitian G, which X + X^H has twice
template <typename T>
LOMACS_TARGET double hermitian_sum_and_inner(Panels<T> X, T x, Panels<T> G, std::int64_t n, Panels<T> to) {
  double total = 0;
  for (std::int64_t j = 0; j * lanes<T> < n; ++j)
    for (std::int64_t i = 0; i <= j; ++i) {
      adjoint_square(X, j, i, to);
      Vec<T> part{};
      const std::int64_t stop = std::min((i + 1) * lanes<T>, n);
      for (std::int64_t k = i * lanes<T>; k < stop; ++k) {
        const T *p = X.at(k, j), *g = G.at(k, j);
        T* o = to.at(k, j);
        const Vec<T> re = load(p) + load(o), im = load(p + Panels<T>::imag) + load(o + Panels<T>::imag);
        part += re * load(g) + im * load(g + Panels<T>::imag);
        store(o, x * re);
        store(o + Panels<T>::imag, x * im);
      }
      total += (i == j ? 0.5 : 1.0) * sum<T>(part);
      if (i < j) adjoint_square(to, i, j, to);
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

// normal_gradient of V whole vectors of columns from j on: on interleaved numbers, which are parted as they are stored
template <int V, typename T>
LOMACS_INLINE void normal_gradient_of(const T* x, const T* g, const T* a, const T* q, std::int64_t rows,
                                      std::int64_t columns, std::int64_t j, T* to, Panels<T> planar) {
  Vec<T> dot[2 * V] = {};
  for (std::int64_t i = 0; i < rows;) {
    Vec<T> part[2 * V] = {};
    for (const std::int64_t stop = std::min<std::int64_t>(i + 8, rows); i < stop; ++i)
#pragma GCC unroll 4
      for (int n = 0; n < 2 * V; ++n) {
        const std::int64_t at = 2 * (i * columns + j) + n * lanes<T>;
        part[n] += load(x + at) * load(g + at);
      }
#pragma GCC unroll 4
    for (int n = 0; n < 2 * V; ++n) dot[n] += part[n];
  }
  Vec<T> of_g[2 * V], of_x[2 * V];
#pragma GCC unroll 2
  for (int n = 0; n < V; ++n) {
    const Vec<T> low = dot[2 * n], high = dot[2 * n + 1];
    const Vec<T> real = evens<T>(low, high, Lanes<T>{}) + odds<T>(low, high, Lanes<T>{});
    const Vec<T> of_gradient = load(a + j + n * lanes<T>), of_column = real * load(q + j + n * lanes<T>);
    of_g[2 * n] = zip_low<T>(of_gradient, of_gradient, Lanes<T>{});
    of_g[2 * n + 1] = zip_high<T>(of_gradient, of_gradient, Lanes<T>{});
    of_x[2 * n] = zip_low<T>(of_column, of_column, Lanes<T>{});
    of_x[2 * n + 1] = zip_high<T>(of_column, of_column, Lanes<T>{});
  }
  for (std::int64_t i = 0; i < rows; ++i) {
    Vec<T> y[2 * V];
#pragma GCC unroll 4
    for (int n = 0; n < 2 * V; ++n) {
      const std::int64_t at = 2 * (i * columns + j) + n * lanes<T>;
      y[n] = of_g[n] * load(g + at) - of_x[n] * load(x + at);
      if (to != nullptr) store(to + at, y[n]);
    }
    if (planar.data == nullptr) continue;
    T* p = planar.at(i, j / lanes<T>);
#pragma GCC unroll 2
    for (int n = 0; n < V; ++n) {
      store(p + n * lanes<T>, evens<T>(y[2 * n], y[2 * n + 1], Lanes<T>{}));
      store(p + n * lanes<T> + Panels<T>::imag, odds<T>(y[2 * n], y[2 * n + 1], Lanes<T>{}));
    }
  }
}

// Gradient of columns x that were divided by (norm + eps), given that of the quotients, g:
// to = g diag(a) - x diag(q Re(x^H g)), a = 1 / (norm + eps), q = a^2 / norm, or 1 / norm for x the quotients;
// to may be x or g; as rows, in panels, or both, whatever there is
template <typename T>
LOMACS_TARGET void normal_gradient(const T* x, const T* g, const T* a, const T* q, std::int64_t rows,
                                   std::int64_t columns, T* to, Panels<T> planar = {}) {
  std::int64_t j = 0;
  for (; j + panel<T> <= columns; j += panel<T>)
    normal_gradient_of<LOMACS_VECS>(x, g, a, q, rows, columns, j, to, planar);
  for (; j < columns; j += lanes<T>) {
    const std::int64_t count = columns - j;
    if (count >= lanes<T>) {
      normal_gradient_of<1>(x, g, a, q, rows, columns, j, to, planar);
      continue;
    }
    Vec<T> dot{};
    for (std::int64_t i = 0; i < rows;) {
      Vec<T> part{};
      for (const std::int64_t stop = std::min<std::int64_t>(i + 8, rows); i < stop; ++i) {
        const std::int64_t at = 2 * (i * columns + j);
        Vec<T> xr, xi, gr, gi;
        load_complex(x + at, count, xr, xi);
        load_complex(g + at, count, gr, gi);
        part += xr * gr + xi * gi;
      }
      dot += part;
    }
    const Vec<T> of_g = load(a + j), of_x = dot * load(q + j);
    for (std::int64_t i = 0; i < rows; ++i) {
      const std::int64_t at = 2 * (i * columns + j);
      Vec<T> xr, xi, gr, gi;
      load_complex(x + at, count, xr, xi);
      load_complex(g + at, count, gr, gi);
      const Vec<T> re = of_g * gr - of_x * xr, im = of_g * gi - of_x * xi;
      if (to != nullptr) store_complex(to + at, count, re, im);
      if (planar.data == nullptr) continue;
      T* p = planar.at(i, j / lanes<T>);
      store(p, re);
      store(p + Panels<T>::imag, im);
    }
  }
}

// Scratch of a factor: U, U^H U - I, I - step (U^H U - I) and two more r x r, planar; U P, interleaved.
template <typename T>
struct Factor {
  Panels<T> U, G, P, K, C;
  T *Y, *squares, *scale, *slope;

  void plan(Arena<T>& arena, std::int64_t rows, std::int64_t r, bool backward) {
    U = take_panels(arena, rows, r);
    G = take_squares(arena, r, r);
    P = take_squares(arena, r, r);
    squares = take_row(arena, r);
    scale = take_row(arena, r);
    slope = take_row(arena, r);
    if (!backward) return;
    K = take_squares(arena, r, r);
    C = take_squares(arena, r, r);
    Y = arena.take(2 * rows * r);
  }
};

template <typename T>
LOMACS_TARGET void refine_polynomial(const Factor<T>& x, std::int64_t r, double step) {
  multiple(x.G, static_cast<T>(-step), r, x.P);
  add_identity(x.P, static_cast<T>(1), r);
}

// Y = U - step U (U^H U - I) for the u that is in x.U too, the square sums of its columns in x.squares; leaves
// 1 / (norm + eps) of Y's columns in x.scale
template <typename T>
LOMACS_TARGET void refine_packed(const T* u, const Factor<T>& x, std::int64_t rows, std::int64_t r, double step, T* Y,
                                 Ahead& ahead) {
  gram_matrix(u, x.U, rows, r, x.G, ahead);
  for (std::int64_t k = 0; k < r; ++k) {
    T* g = x.G.element(k, k);
    g[0] = x.squares[k] - 1;
    g[Panels<T>::imag] = 0;
    x.squares[k] = 0;
  }
  refine_polynomial(x, r, step);
  const Term<T> terms[] = {{{u, r, 1}, x.P, r}};
  ToRowsAndSquares<T> sink{{Y, r}, x.squares};
  product<false>(terms, sink, rows, r, ahead);
  for (std::int64_t k = 0; k < r; ++k) {
    const double n = std::sqrt(static_cast<double>(x.squares[k])), a = 1 / (n + normal_eps);
    x.scale[k] = static_cast<T>(a);
    x.slope[k] = static_cast<T>(n != 0 ? a * a / n : 0.0);
  }
}

template <typename T>
LOMACS_TARGET void refine_columns(const T* u, const Factor<T>& x, std::int64_t rows, std::int64_t r, double step,
                                  T* Y, Ahead& ahead) {
  pack_squares(u, rows, r, x.U, x.squares);
  refine_packed(u, x, rows, r, step, Y, ahead);
}

// To the sink the gradient of u from that of its refined columns, which is in G; returns that of the step.
template <typename T, typename Sink>
LOMACS_TARGET double refine_product(const T* u, Panels<T> G, const Factor<T>& x, std::int64_t rows, std::int64_t r,
                                    double step, Sink sink, Ahead& ahead) {
  const Term<T> cross[] = {{{u, 1, r}, G, rows}};
  ToPanels<T> of_gram{x.K};
  product<true>(cross, of_gram, r, r, ahead);
  const double gstep = -hermitian_sum_and_inner(x.K, static_cast<T>(-step), x.G, r, x.C);
  const Term<T> terms[] = {{left_of(G), x.P, r}, {{u, r, 1}, x.C, r}};
  product<false>(terms, sink, rows, r, ahead);
  return gstep;
}

// gU from the gradient g of the normalised columns; returns that of the step. After refine_columns into x.Y, which
// is `columns`; or those normalised, and then x.slope has 1 / norm.
template <typename T>
LOMACS_TARGET double refine_gradient(const T* u, const T* columns, const T* g, const Factor<T>& x, std::int64_t rows,
                                     std::int64_t r, double step, T* gU, Ahead& ahead) {
  normal_gradient(columns, g, x.scale, x.slope, rows, r, static_cast<T*>(nullptr), x.U);
  return refine_product(u, x.U, x, rows, r, step, ToRows<T>{gU, r}, ahead);
}

}  // namespace
}  // namespace LOMACS_ISA
}  // namespace lomacs
