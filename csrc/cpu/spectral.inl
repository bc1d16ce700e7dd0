// Spectral calibration and the tail of the network with their gradients, sample by sample. Included inside isa.inl.
#include "gram.inl"

namespace lomacs {
namespace LOMACS_ISA {
namespace {

// re + i im += column dots of x, conjugated, with the product; both arrays hold whole vectors
template <typename T>
struct ToDots {
  const T* x;
  std::int64_t columns;
  T *re, *im;

  template <int R, int V>
  LOMACS_INLINE void take(Vec<T> (&wr)[R][V], Vec<T> (&wi)[R][V], std::int64_t i0, std::int64_t vec) {
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      const std::int64_t column = (vec + j) * lanes<T>;
      Vec<T> rr{}, ii{}, ri{}, ir{};
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        Vec<T> xr, xi;
        load_complex(x + 2 * ((i0 + i) * columns + column), columns - column, xr, xi);
        rr += xr * wr[i][j];
        ii += xi * wi[i][j];
        ri += xr * wi[i][j];
        ir += xi * wr[i][j];
      }
      store(re + column, load(re + column) + (rr + ii));
      store(im + column, load(im + column) + (ri - ir));
    }
  }
};

template <typename T>
struct ToRowsAndDots {
  ToRows<T> rows;
  ToDots<T> dots;

  template <int R, int V>
  LOMACS_INLINE void take(Vec<T> (&re)[R][V], Vec<T> (&im)[R][V], std::int64_t i0, std::int64_t vec) {
    dots.template take<R, V>(re, im, i0, vec);
    rows.template take<R, V>(re, im, i0, vec);
  }
};

// product diag(s)
template <typename T>
struct ToScaledRows {
  T* c;
  std::int64_t columns;
  const T *re, *im;

  template <int R, int V>
  LOMACS_INLINE void take(Vec<T> (&wr)[R][V], Vec<T> (&wi)[R][V], std::int64_t i0, std::int64_t vec) {
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      const std::int64_t column = (vec + j) * lanes<T>;
      const Vec<T> sr = load(re + column), si = load(im + column);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        const Vec<T> r = wr[i][j] * sr - wi[i][j] * si, m = wr[i][j] * si + wi[i][j] * sr;
        store_complex(c + 2 * ((i0 + i) * columns + column), columns - column, r, m);
      }
    }
  }
};

// to = x diag(re + i im), the diagonal conjugated or not
template <bool CONJ, typename T>
LOMACS_TARGET void times_complex(const T* x, const T* re, const T* im, std::int64_t rows, std::int64_t columns, T* to) {
  for (std::int64_t j = 0; j < columns; j += lanes<T>) {
    const std::int64_t count = columns - j;
    const Vec<T> sr = load(re + j), si = CONJ ? -load(im + j) : load(im + j);
    for (std::int64_t i = 0; i < rows; ++i) {
      const std::int64_t at = 2 * (i * columns + j);
      Vec<T> xr, xi;
      load_complex(x + at, count, xr, xi);
      store_complex(to + at, count, xr * sr - xi * si, xr * si + xi * sr);
    }
  }
}

// z_k = (U^H H V)_kk on its way through S = (1 - tau) S_pred + tau |z| + 1e-6
template <typename T>
struct Diagonal {
  T *re, *im;

  void plan(Arena<T>& arena, std::int64_t r) {
    re = take_row(arena, r);
    im = take_row(arena, r);
  }
  void clear(std::int64_t r) const {
    const std::int64_t padded = whole<T>(r);
    std::fill(re, re + padded, T(0));
    std::fill(im, im + padded, T(0));
  }
  // `order` names the element of S_pred that stands k-th
  void calibrate(const T* S_pred, const std::int64_t* order, double tau, std::int64_t r, T* S) const {
    for (std::int64_t k = 0; k < r; ++k) {
      const double a = re[k], b = im[k];
      S[k] = static_cast<T>((1 - tau) * S_pred[order ? order[k] : k] + tau * std::sqrt(a * a + b * b) + 1e-6);
    }
  }
  // z becomes the gradient of z, with subgradient 0 at 0; returns that of tau
  double gradient(const T* gS, const T* S_pred, const std::int64_t* order, double tau, std::int64_t r,
                  T* gS_pred) const {
    double gtau = 0;
    for (std::int64_t k = 0; k < r; ++k) {
      const std::int64_t at = order ? order[k] : k;
      const double a = re[k], b = im[k], size = std::sqrt(a * a + b * b), g = gS[k];
      const double weight = size != 0 ? tau * g / size : 0.0;
      gtau += g * (size - S_pred[at]);
      gS_pred[at] = static_cast<T>((1 - tau) * g);
      re[k] = static_cast<T>(weight * a);
      im[k] = static_cast<T>(weight * b);
    }
    return gtau;
  }
};

template <typename T>
LOMACS_TARGET void calibrate_samples(const Calibrate<T>& job, std::int64_t begin, std::int64_t end) {
  const std::int64_t M = job.M, N = job.N, r = job.r;
  Panels<T> U, V, Vh;
  Diagonal<T> z;
  T* Uz = nullptr;
  const bool ragged = r % lanes<T> != 0 || N % lanes<T> != 0;
  const auto plan = [&](Arena<T>& a) {
    V = take_squares(a, N, r);
    z.plan(a, r);
    if (job.gV) U = take_panels(a, M, r);
    if (!job.gH) return;
    Vh = take_squares(a, r, whole<T>(N));
    Uz = a.take(2 * M * r);
  };
  const Arena<T> arena(plan, ragged);
  for (std::int64_t b = begin; b < end; ++b) {
    const T *u = job.U + 2 * b * M * r, *h = job.H + 2 * b * M * N, *v = job.V + 2 * b * N * r;
    const T* s = job.S_pred + b * r;
    Ahead ahead;
    if (b + 1 < end) {
      ahead.add(u + 2 * M * r, sizeof(T) * static_cast<std::size_t>(2 * M * r));
      ahead.add(h + 2 * M * N, sizeof(T) * static_cast<std::size_t>(2 * M * N));
      ahead.add(v + 2 * N * r, sizeof(T) * static_cast<std::size_t>(2 * N * r));
    }
    z.clear(r);
    pack(v, N, r, V);
    const Term<T> measured[] = {{{h, N, 1}, V, N}};
    ToDots<T> dots{u, r, z.re, z.im};
    T* gU = job.gU ? job.gU + 2 * b * M * r : nullptr;
    if (gU) {
      ToRowsAndDots<T> both{{gU, r}, dots};
      product<false>(measured, both, M, r, ahead);
    } else {
      product<false>(measured, dots, M, r, ahead);
    }
    if (job.S) {
      z.calibrate(s, nullptr, job.tau, r, job.S + b * r);
      continue;
    }
    job.gtau[b] = z.gradient(job.g + b * r, s, nullptr, job.tau, r, job.gS + b * r);
    if (gU) times_complex<true>(gU, z.re, z.im, M, r, gU);
    if (job.gV) {
      pack(u, M, r, U);
      const Term<T> terms[] = {{{h, 1, N}, U, M}};
      ToScaledRows<T> sink{job.gV + 2 * b * N * r, r, z.re, z.im};
      product<true>(terms, sink, N, r, ahead);
    }
    if (job.gH) {
      times_complex<false>(u, z.re, z.im, M, r, Uz);
      adjoint(V, N, r, Vh);
      const Term<T> terms[] = {{{Uz, r, 1}, Vh, r}};
      ToRows<T> sink{job.gH + 2 * b * M * N, N};
      product<false>(terms, sink, M, N, ahead);
    }
  }
}

// Scratch of one factor of the tail at a time. By column: what normalises raw columns, the reciprocals of their norms,
// and the projections of a gradient on them.
template <typename T>
struct TailFactor {
  // rows that are put in order, or out of it, together
  static constexpr std::int64_t few = 8;

  Factor<T> x;
  T *columns, *some, *scale, *slope, *dots;

  // by column: what normalises raw and refined columns, and what their gradients take, one row after another
  void keep(std::int64_t r, T* to) const {
    for (std::int64_t k = 0; k < r; ++k) {
      to[k] = scale[k];
      to[r + k] = slope[k];
      to[2 * r + k] = x.scale[k];
      const double n = std::sqrt(static_cast<double>(x.squares[k]));
      to[3 * r + k] = static_cast<T>(n != 0 ? 1 / n : 0.0);
    }
  }
  void take(std::int64_t r, const T* from) const {
    std::copy(from, from + r, scale);
    std::copy(from + r, from + 2 * r, slope);
    std::copy(from + 2 * r, from + 3 * r, x.scale);
    std::copy(from + 3 * r, from + 4 * r, x.slope);
  }

  void plan(Arena<T>& arena, std::int64_t rows, std::int64_t r, bool backward) {
    x.plan(arena, rows, r, backward, true);
    columns = arena.take(2 * rows * r);
    some = arena.take(2 * few * r);
    scale = take_row(arena, r);
    slope = take_row(arena, r);
    dots = take_row(arena, r);
  }
};

// square sums of the columns, in short chains
template <typename T>
LOMACS_TARGET void column_squares(const T* x, std::int64_t rows, std::int64_t columns, T* squares) {
  std::fill_n(squares, whole<T>(columns), T(0));
  for (std::int64_t i0 = 0; i0 < rows; i0 += chunk_rows) {
    const std::int64_t stop = std::min(i0 + chunk_rows, rows);
    for (std::int64_t j = 0; j < columns; j += lanes<T>) {
      Vec<T> part{};
      for (std::int64_t i = i0; i < stop; ++i) {
        Vec<T> re, im;
        load_complex(x + 2 * (i * columns + j), columns - j, re, im);
        part += re * re + im * im;
      }
      store(squares + j, load(squares + j) + part);
    }
  }
}

template <typename T>
struct Pair {
  T re, im;
};

// f.columns = the raw columns in this order times f.scale; with squares also in f.x.U, their square sums in f.x.squares
template <bool SQUARES, typename T>
LOMACS_TARGET void ordered_columns(const T* raw, const std::int64_t* order, const TailFactor<T>& f, std::int64_t rows,
                                   std::int64_t r) {
  if (SQUARES) std::fill_n(f.x.squares, whole<T>(r), T(0));
  for (std::int64_t i0 = 0; i0 < rows; i0 += f.few) {
    const std::int64_t many = std::min(f.few, rows - i0);
    const auto* from = reinterpret_cast<const Pair<T>*>(raw) + i0 * r;
    auto* to = reinterpret_cast<Pair<T>*>(f.some);
    for (std::int64_t i = 0; i < many; ++i, from += r)
      for (std::int64_t k = 0; k < r; ++k) *to++ = from[order[k]];
    for (std::int64_t j = 0; j < r; j += lanes<T>) {
      const Vec<T> weight = load(f.scale + j);
      T* p = SQUARES ? f.x.U.at(i0, j / lanes<T>) : nullptr;
      Vec<T> part{};
      for (std::int64_t i = 0; i < many; ++i) {
        Vec<T> re, im;
        load_complex(f.some + 2 * (i * r + j), r - j, re, im);
        re *= weight, im *= weight;
        store_complex(f.columns + 2 * ((i0 + i) * r + j), r - j, re, im);
        if (!SQUARES) continue;
        store(p, re);
        store(p + Panels<T>::imag, im);
        p += Panels<T>::step;
        part += re * re + im * im;
      }
      if (SQUARES) store(f.x.squares + j, load(f.x.squares + j) + part);
    }
  }
}

// to = x diag(s), which may be x itself, and in panels
template <typename T>
LOMACS_TARGET void times_real_packed(const T* x, const T* s, std::int64_t rows, std::int64_t columns, T* to,
                                     Panels<T> planar) {
  for (std::int64_t i0 = 0; i0 < rows; i0 += chunk_rows) {
    const std::int64_t stop = std::min(i0 + chunk_rows, rows);
    for (std::int64_t j = 0; j < columns; j += lanes<T>) {
      const std::int64_t count = columns - j;
      const Vec<T> weight = load(s + j);
      T* p = planar.at(i0, j / lanes<T>);
      for (std::int64_t i = i0; i < stop; ++i, p += Panels<T>::step) {
        const std::int64_t at = 2 * (i * columns + j);
        Vec<T> re, im;
        load_complex(x + at, count, re, im);
        re *= weight, im *= weight;
        store_complex(to + at, count, re, im);
        store(p, re);
        store(p + Panels<T>::imag, im);
      }
    }
  }
}

// The raw columns in this order, divided by (norm + eps); then refined: Y and the scale of its columns.
template <typename T>
LOMACS_TARGET void tail_columns(const T* raw, const std::int64_t* order, const TailFactor<T>& f, std::int64_t rows,
                                std::int64_t r, double step, T* Y, Ahead& ahead, Upper<T> kept = {}) {
  column_squares(raw, rows, r, f.dots);
  for (std::int64_t k = 0; k < r; ++k) {
    const double n = std::sqrt(static_cast<double>(f.dots[order[k]]));
    f.scale[k] = static_cast<T>(1 / (n + normal_eps));
    f.slope[k] = static_cast<T>(n != 0 ? 1 / n : 0.0);
  }
  ordered_columns<true>(raw, order, f, rows, r);
  refine_packed(f.columns, f.x, rows, r, step, Y, ahead, kept);
}

// dots = Re(x^H g) of the columns; x also to panels where there are some
template <typename T>
LOMACS_TARGET void real_dots(const T* x, const T* g, std::int64_t rows, std::int64_t columns, T* dots,
                             Panels<T> planar = {}) {
  for (std::int64_t j = 0; j < columns; j += lanes<T>) {
    const std::int64_t count = columns - j;
    T* p = planar.data == nullptr ? nullptr : planar.at(0, j / lanes<T>);
    Vec<T> total{};
    for (std::int64_t i = 0; i < rows;) {
      Vec<T> part{};
      for (const std::int64_t stop = std::min<std::int64_t>(i + 8, rows); i < stop; ++i) {
        const std::int64_t at = 2 * (i * columns + j);
        Vec<T> xr, xi, gr, gi;
        load_complex(x + at, count, xr, xi);
        load_complex(g + at, count, gr, gi);
        part += xr * gr + xi * gi;
        if (p == nullptr) continue;
        store(p, xr);
        store(p + Panels<T>::imag, xi);
        p += Panels<T>::step;
      }
      total += part;
    }
    store(dots + j, total);
  }
}

// The gradient of the refined columns from that of the normalised ones, y, which is g + w diag(z): g + w diag(z) times
// `scale`, less y times `along`
template <typename T>
struct OfNormal {
  const T *y, *g, *re, *im, *scale, *along;

  LOMACS_INLINE void apply(Vec<T>& wr, Vec<T>& wi, std::int64_t at, std::int64_t column, std::int64_t count) const {
    const Vec<T> zr = load(re + column), zi = load(im + column), a = load(scale + column), q = load(along + column);
    Vec<T> yr, yi, gr, gi;
    load_complex(y + at, count, yr, yi);
    load_complex(g + at, count, gr, gi);
    gr += wr * zr - wi * zi;
    gi += wr * zi + wi * zr;
    wr = a * gr - q * yr;
    wi = a * gi - q * yi;
  }
};

// of the product, to panels
template <typename T>
struct ToNormalGradient {
  OfNormal<T> of;
  ToPanels<T> to;
  std::int64_t columns;

  template <int R, int V>
  LOMACS_INLINE void take(Vec<T> (&re)[R][V], Vec<T> (&im)[R][V], std::int64_t i0, std::int64_t vec) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) {
        const std::int64_t column = (vec + j) * lanes<T>;
        of.apply(re[i][j], im[i][j], 2 * ((i0 + i) * columns + column), column, columns - column);
      }
    to.template take<R, V>(re, im, i0, vec);
  }
};

template <typename T>
LOMACS_TARGET void normal_gradient_of(const T* w, OfNormal<T> of, std::int64_t rows, std::int64_t columns,
                                      Panels<T> to) {
  for (std::int64_t j = 0; j < columns; j += lanes<T>) {
    T* p = to.at(0, j / lanes<T>);
    for (std::int64_t i = 0; i < rows; ++i, p += Panels<T>::step) {
      const std::int64_t at = 2 * (i * columns + j);
      Vec<T> re, im;
      load_complex(w + at, columns - j, re, im);
      of.apply(re, im, at, j, columns - j);
      store(p, re);
      store(p + Panels<T>::imag, im);
    }
  }
}

// rows of the product, and dots += Re(x^H product) of the columns
template <typename T>
struct ToRowsAndRealDots {
  ToRows<T> rows;
  const T* x;
  T* dots;

  template <int R, int V>
  LOMACS_INLINE void take(Vec<T> (&re)[R][V], Vec<T> (&im)[R][V], std::int64_t i0, std::int64_t vec) {
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      const std::int64_t column = (vec + j) * lanes<T>;
      Vec<T> part{};
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        Vec<T> xr, xi;
        load_complex(x + 2 * ((i0 + i) * rows.columns + column), rows.columns - column, xr, xi);
        part += xr * re[i][j] + xi * im[i][j];
      }
      store(dots + column, load(dots + column) + part);
    }
    rows.template take<R, V>(re, im, i0, vec);
  }
};

// The gradient of the refined columns, in G, back to the raw ones; returns that of the step.
template <typename T>
LOMACS_TARGET double tail_gradient(const std::int64_t* order, const TailFactor<T>& f, Panels<T> G, Upper<T> residual,
                                   std::int64_t rows, std::int64_t r, double step, T* graw, Ahead& ahead) {
  std::fill_n(f.dots, whole<T>(r), T(0));
  const ToRowsAndRealDots<T> sink{{f.x.Y, r}, f.columns, f.dots};
  const double gstep = refine_product(f.columns, G, f.x, residual, rows, r, step, sink, ahead);
  for (std::int64_t j = 0; j < r; j += lanes<T>) store(f.dots + j, load(f.dots + j) * load(f.slope + j));
  for (std::int64_t i0 = 0; i0 < rows; i0 += f.few) {
    const std::int64_t many = std::min(f.few, rows - i0);
    for (std::int64_t j = 0; j < r; j += lanes<T>) {
      const Vec<T> of_g = load(f.scale + j), of_x = load(f.dots + j);
      for (std::int64_t i = 0; i < many; ++i) {
        const std::int64_t at = 2 * ((i0 + i) * r + j);
        Vec<T> xr, xi, gr, gi;
        load_complex(f.columns + at, r - j, xr, xi);
        load_complex(f.x.Y + at, r - j, gr, gi);
        store_complex(f.some + 2 * (i * r + j), r - j, of_g * gr - of_x * xr, of_g * gi - of_x * xi);
      }
    }
    const auto* from = reinterpret_cast<const Pair<T>*>(f.some);
    auto* to = reinterpret_cast<Pair<T>*>(graw) + i0 * r;
    for (std::int64_t i = 0; i < many; ++i, to += r)
      for (std::int64_t k = 0; k < r; ++k) to[order[k]] = *from++;
  }
  return gstep;
}

// to = diag(re + i im) x^H, planar, in whole squares of vectors
template <typename T>
LOMACS_TARGET void weighted_adjoint(const T* x, const T* re, const T* im, std::int64_t rows, std::int64_t columns,
                                    Panels<T> to) {
  for (std::int64_t j = 0; j < columns; j += lanes<T>) {
    const Vec<T> wr = load(re + j), wi = load(im + j);
    for (std::int64_t i0 = 0; i0 < rows; i0 += lanes<T>) {
      T* q = to.at(j, i0 / lanes<T>);
      for (int part = 0; part < 2; ++part, q += Panels<T>::imag) {
        Vec<T> y[lanes<T>];
#pragma GCC unroll 16
        for (int i = 0; i < lanes<T>; ++i) {
          Vec<T> xr{}, xi{};
          if (i0 + i < rows) load_complex(x + 2 * ((i0 + i) * columns + j), columns - j, xr, xi);
          y[i] = part == 0 ? xr * wr + xi * wi : xr * wi - xi * wr;
        }
        transpose_square<T>(y);
#pragma GCC unroll 16
        for (int i = 0; i < lanes<T>; ++i) store(q + i * Panels<T>::step, y[i]);
      }
    }
  }
}

// Scratch of the gradients of a sample: planar U and the gradient of its refined columns, and V^H or that of V's.
template <typename T>
struct TailGradients {
  TailFactor<T> f;
  Panels<T> U, V, Vh;
  Diagonal<T> z;
  // of the columns: the conjugate of z, Re(U^H gU), the gradient along those of U or V
  T *conjugate, *dots_of_U, *along;

  void plan(Arena<T>& arena, std::int64_t M, std::int64_t N, std::int64_t r, bool of_H) {
    f.plan(arena, std::max(M, N), r, true);
    U = f.x.U;
    V = take_panels(arena, N, r);
    if (of_H) Vh = take_squares(arena, r, whole<T>(N));
    z.plan(arena, r);
    conjugate = take_row(arena, r);
    dots_of_U = take_row(arena, r);
    along = take_row(arena, r);
  }
};

// Whether columns multiplied by so much are of norm 1: those of nearly nothing are not, and products with a column of
// nothing must be nothing, of which products by pairs make rounding.
template <typename T>
bool of_norm_one(const T* scale, std::int64_t r) {
  return std::all_of(scale, scale + r, [](T x) { return x < T(1e5); });
}

// The gradients of sample b from its columns u and v and what the forward kept.
template <typename T>
LOMACS_TARGET void tail_gradients(const Tail<T>& job, const std::int64_t* order, TailGradients<T>& x, std::int64_t b,
                                  const T* u, const T* v, const Kept<T>& kept, Ahead& ahead) {
  const std::int64_t M = job.M, N = job.N, r = job.r;
  const std::int64_t left = 2 * b * M * r, right = 2 * b * N * r, square = 2 * b * M * N;
  const TailFactor<T>& f = x.f;
  const Diagonal<T>& z = x.z;
  double* scalars = job.gscalars + 3 * b;
  [[maybe_unused]] const bool pairs =
      f.x.pairs.takes(M) && f.x.pairs.takes(N) && of_norm_one(kept.columns[0] + 2 * r, r);
  std::copy(kept.z, kept.z + r, z.re);
  std::copy(kept.z + r, kept.z + 2 * r, z.im);
  scalars[2] = z.gradient(job.gS + b * r, job.S_pred + b * r, order, job.tau, r, job.oS + b * r);
  for (std::int64_t k = 0; k < r; ++k) x.conjugate[k] = -z.im[k];
  // the columns have the diagonal of U^H H V in H V and H^H U: its part of the gradient along them is known
  const auto project = [&](const T* columns, const T* dots) LOMACS_TARGET {
    f.take(r, columns);
    for (std::int64_t k = 0; k < r; ++k)
      x.along[k] = f.x.slope[k] * (dots[k] + (kept.z[k] * z.re[k] + kept.z[r + k] * z.im[k]));
  };

  x.U.rows = M;
  real_dots(u, job.gU + left, M, r, x.dots_of_U, x.U);
  if (job.oH) {
    ToRows<T> sink{job.oH + square, N};
    weighted_adjoint(v, z.re, z.im, N, r, x.Vh);
#if LOMACS_PRODUCTS == 3
    double squares = 0;
    for (std::int64_t k = 0; k < r; ++k) squares += std::pow(z.re[k], 2.0) + std::pow(z.im[k], 2.0);
    const double of_Vh = std::sqrt(squares / static_cast<double>(N * r));
    if (!(pairs && of_common_size(squares, N * r) &&
          multiplied_by_pairs(u, x.Vh, of_Vh, M, r, N, f.x.pairs, sink, ahead)))
#endif
    {
      const Term<T> terms[] = {{{u, r, 1}, x.Vh, r}};
      product<false>(terms, sink, M, N, ahead);
    }
  }
  {
    real_dots(v, job.gV + right, N, r, f.dots);
    project(kept.columns[1], f.dots);
    ToNormalGradient<T> sink{{v, job.gV + right, z.re, z.im, f.x.scale, x.along}, {x.V}, r};
#if LOMACS_PRODUCTS == 3
    const double of_U = 1 / std::sqrt(static_cast<double>(M));
    if (!(pairs && adjoint_multiplied_by_pairs(job.H + square, x.U, of_U, M, N, r, f.x.pairs, sink, ahead)))
#endif
    {
      const Term<T> terms[] = {{{job.H + square, 1, N}, x.U, M}};
      product<true>(terms, sink, N, r, ahead);
    }
  }
  ordered_columns<false>(job.V + right, order, f, N, r);
  scalars[1] = tail_gradient(order, f, x.V, kept.residuals[1], N, r, job.b, job.oV + right, ahead);

  project(kept.columns[0], x.dots_of_U);
  const OfNormal<T> of{u, job.gU + left, z.re, x.conjugate, f.x.scale, x.along};
  normal_gradient_of(kept.W, of, M, r, x.U);
  ordered_columns<false>(job.U + left, order, f, M, r);
  scalars[0] = tail_gradient(order, f, x.U, kept.residuals[0], M, r, job.a, job.oU + left, ahead);
}

// largest first, NaN before all, equal ones as they come: torch's order
template <typename T>
void sort_columns(const T* S_pred, std::int64_t r, std::int64_t* order) {
  for (std::int64_t k = 0; k < r; ++k) order[k] = k;
  std::stable_sort(order, order + r, [S_pred](std::int64_t i, std::int64_t j) {
    return S_pred[i] > S_pred[j] || (S_pred[i] != S_pred[i] && S_pred[j] == S_pred[j]);
  });
}

// H V to the sink, for the normalised columns V, which f has refined
template <typename T, typename Sink>
LOMACS_TARGET void measure(const T* H, Panels<T> V, const TailFactor<T>& f, std::int64_t M, std::int64_t N,
                           std::int64_t r, Sink sink, Ahead& ahead) {
#if LOMACS_PRODUCTS == 3
  const double of_V = 1 / std::sqrt(static_cast<double>(N));
  if (f.x.pairs.takes(M) && f.x.pairs.takes(N) && of_norm_one(f.x.scale, r) &&
      multiplied_by_pairs(H, V, of_V, M, N, r, f.x.pairs, sink, ahead))
    return;
#endif
  const Term<T> measured[] = {{{H, N, 1}, V, N}};
  product<false>(measured, sink, M, r, ahead);
}

// Factors and spectrum of sample b, and what its gradients need where they are kept.
template <typename T>
LOMACS_TARGET void tail_of_sample(const Tail<T>& job, const std::int64_t* order, TailFactor<T>& f, Panels<T> V,
                                  const Diagonal<T>& z, std::int64_t b, T* u, T* v, T* S, const Kept<T>* kept,
                                  Ahead& ahead) {
  const std::int64_t M = job.M, N = job.N, r = job.r;
  f.x.U.rows = M;
  tail_columns(job.U + 2 * b * M * r, order, f, M, r, job.a, u, ahead, kept ? kept->residuals[0] : Upper<T>{});
  times_real(u, f.x.scale, M, r, u);
  if (kept) f.keep(r, kept->columns[0]);
  f.x.U.rows = N;
  tail_columns(job.V + 2 * b * N * r, order, f, N, r, job.b, v, ahead, kept ? kept->residuals[1] : Upper<T>{});
  times_real_packed(v, f.x.scale, N, r, v, V);
  if (kept) f.keep(r, kept->columns[1]);
  z.clear(r);
  const ToDots<T> dots{u, r, z.re, z.im};
  const T* H = job.H + 2 * b * M * N;
  if (kept) {
    measure(H, V, f, M, N, r, ToRowsAndDots<T>{{kept->W, r}, dots}, ahead);
    std::copy(z.re, z.re + r, kept->z);
    std::copy(z.im, z.im + r, kept->z + r);
  } else {
    measure(H, V, f, M, N, r, dots, ahead);
  }
  if (S) z.calibrate(job.S_pred + b * r, order, job.tau, r, S);
}

template <typename T>
LOMACS_TARGET void tail_samples(const Tail<T>& job, std::int64_t begin, std::int64_t end) {
  const std::int64_t M = job.M, N = job.N, r = job.r, many = Kept<T>::size(M, r);
  const bool backward = job.gU != nullptr, ragged = r % lanes<T> != 0 || N % lanes<T> != 0;
  const bool kept = job.kept != nullptr;
  TailGradients<T> x{};
  T *u_rows = nullptr, *v_rows = nullptr, *own = nullptr;
  const auto plan = [&](Arena<T>& a) {
    if (backward) {
      x.plan(a, M, N, r, job.oH != nullptr);
      if (kept) return;
      u_rows = a.take(2 * M * r);
      v_rows = a.take(2 * N * r);
      own = a.take(many);
    } else {
      x.f.plan(a, std::max(M, N), r, false);
      x.V = take_panels(a, N, r);
      x.z.plan(a, r);
    }
  };
  const Arena<T> arena(plan, ragged);
  std::vector<std::int64_t> order(static_cast<std::size_t>(r));
  for (std::int64_t b = begin; b < end; ++b) {
    const std::int64_t left = 2 * b * M * r, right = 2 * b * N * r;
    const Kept<T> of_sample = kept ? Kept<T>(job.kept + b * many, M, r) : own ? Kept<T>(own, M, r) : Kept<T>();
    Ahead ahead(40);
    if (b + 1 < end) {
      const auto bytes = [](std::int64_t count) { return sizeof(T) * static_cast<std::size_t>(count); };
      // the last is fetched first, in the order in which they are read
      if (kept && backward) {
        ahead.add(job.U + left + 2 * M * r, bytes(2 * M * r));
        ahead.add(job.kept + (b + 1) * many, bytes(many));
        ahead.add(job.V + right + 2 * N * r, bytes(2 * N * r));
        ahead.add(job.gV + right + 2 * N * r, bytes(2 * N * r));
        ahead.add(job.H + 2 * (b + 1) * M * N, bytes(2 * M * N));
        ahead.add(job.V_out + right + 2 * N * r, bytes(2 * N * r));
        ahead.add(job.gU + left + 2 * M * r, bytes(2 * M * r));
        ahead.add(job.U_out + left + 2 * M * r, bytes(2 * M * r));
      } else {
        ahead.add(job.H + 2 * (b + 1) * M * N, bytes(2 * M * N));
        ahead.add(job.V + right + 2 * N * r, bytes(2 * N * r));
        ahead.add(job.U + left + 2 * M * r, bytes(2 * M * r));
      }
    }
    // what this sample will write would be read too, line by line when it is written
    const auto written = [&](T* p, std::int64_t count) {
      if (p != nullptr) ahead.add(p + b * count, sizeof(T) * static_cast<std::size_t>(count));
    };
    if (!backward) {
      written(job.kept, many);
      written(job.oV, 2 * N * r);
      written(job.oU, 2 * M * r);
    } else {
      written(job.oU, 2 * M * r);
      written(job.oV, 2 * N * r);
      written(job.oH, 2 * M * N);
    }
    sort_columns(job.S_pred + b * r, r, order.data());
    if (!backward) {
      tail_of_sample(job, order.data(), x.f, x.V, x.z, b, job.oU + left, job.oV + right, job.oS + b * r,
                     kept ? &of_sample : nullptr, ahead);
      continue;
    }
    if (!kept) {
      tail_of_sample(job, order.data(), x.f, x.V, x.z, b, u_rows, v_rows, static_cast<T*>(nullptr), &of_sample, ahead);
    }
    tail_gradients(job, order.data(), x, b, kept ? job.U_out + left : u_rows, kept ? job.V_out + right : v_rows,
                   of_sample, ahead);
  }
}

template <typename T>
LOMACS_TARGET void tail_factor(const T* raw, const std::int64_t* order, const TailFactor<T>& f, std::int64_t rows,
                               std::int64_t r, double step, T* to, Panels<T> planar = {}) {
  Ahead ahead;
  tail_columns(raw, order, f, rows, r, step, to, ahead);
  if (planar.data != nullptr) times_real_packed(to, f.x.scale, rows, r, to, planar);
  else times_real(to, f.x.scale, rows, r, to);
}

// columns from `vec * lanes` on of (U^H H V)_kk, so many
template <typename T>
LOMACS_TARGET void measure_columns(const Tail<T>& job, Panels<T> V, const Diagonal<T>& z, std::int64_t vec,
                                   std::int64_t columns, const Pairs<T>& pairs, const PairScratch<T>& scratch) {
  Ahead ahead;
  const std::int64_t first = vec * lanes<T>;
  ToDots<T> dots{job.oU + 2 * first, job.r, z.re + first, z.im + first};
#if LOMACS_PRODUCTS == 3
  if (pairs.b1.data != nullptr) {
    Pairs<T> some = pairs;
    some.b1.data = pairs.b1.at(0, vec);
    some.b2.data = pairs.b2.at(0, vec);
    const PairSums<T> sums{scratch.row_re, scratch.row_im, scratch.re + first, scratch.im + first};
    ColumnMultiples<T, ToDots<T>> multiples{scratch.weight + first, dots};
    return product_by_pairs<false, false>(some, sums, multiples, job.M, columns, ahead);
  }
#endif
  const Term<T> measured[] = {{{job.H, job.N, 1}, {V.at(0, vec), V.rows}, job.N}};
  product<false>(measured, dots, job.M, columns, ahead);
}

// The tail of one sample by a team, bit for bit what `tail_samples` gives.
template <typename T>
LOMACS_TARGET void tail_of_one(const Tail<T>& job, Team& team) {
  const std::int64_t M = job.M, N = job.N, r = job.r;
  TailFactor<T> fu, fv;
  Panels<T> V;
  Diagonal<T> z;
  const auto plan = [&](Arena<T>& a) {
    fu.plan(a, M, r, false);
    fv.plan(a, std::max(M, N), r, false);
    V = take_squares(a, N, r);
    z.plan(a, r);
  };
  const Arena<T> arena(plan, r % lanes<T> != 0 || N % lanes<T> != 0);
  std::vector<std::int64_t> order(static_cast<std::size_t>(r));
  sort_columns(job.S_pred, r, order.data());
  team.share(2, [&](std::uint64_t i) {
    if (i == 0) return tail_factor(job.U, order.data(), fu, M, r, job.a, job.oU);
    tail_factor(job.V, order.data(), fv, N, r, job.b, job.oV, V);
  });
  z.clear(r);
  const PairScratch<T>& scratch = fv.x.pairs;
  Pairs<T> pairs{};
#if LOMACS_PRODUCTS == 3
  if (scratch.takes(M) && scratch.takes(N) && of_norm_one(fv.x.scale, r))
    pairs = prepared_pairs(job.H, V, 1 / std::sqrt(static_cast<double>(N)), M, N, r, scratch);
#endif
  // a vector that is not whole stays with the rest
  const std::int64_t shares = r % lanes<T> == 0 ? r / lanes<T> : 1;
  team.share(static_cast<std::uint64_t>(shares), [&](std::uint64_t i) {
    measure_columns(job, V, z, static_cast<std::int64_t>(i), r / shares, pairs, scratch);
  });
  z.calibrate(job.S_pred, order.data(), job.tau, r, job.oS);
}

}  // namespace
}  // namespace LOMACS_ISA
}  // namespace lomacs
