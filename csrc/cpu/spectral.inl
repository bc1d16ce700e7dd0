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

// product diag(s), and more where it is given
template <typename T>
struct ToScaledRows {
  T* c;
  const T* more;
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
        const std::int64_t at = 2 * ((i0 + i) * columns + column);
        Vec<T> mr{}, mi{};
        if (more != nullptr) load_complex(more + at, columns - column, mr, mi);
        mr += wr[i][j] * sr - wi[i][j] * si;
        mi += wr[i][j] * si + wi[i][j] * sr;
        store_complex(c + at, columns - column, mr, mi);
      }
    }
  }
};

// to = x diag(re + i im), the diagonal conjugated or not, and more where it is given
template <bool CONJ, typename T>
LOMACS_TARGET void times_complex(const T* x, const T* re, const T* im, const T* more, std::int64_t rows,
                                 std::int64_t columns, T* to) {
  for (std::int64_t j = 0; j < columns; j += lanes<T>) {
    const std::int64_t count = columns - j;
    const Vec<T> sr = load(re + j), si = CONJ ? -load(im + j) : load(im + j);
    for (std::int64_t i = 0; i < rows; ++i) {
      const std::int64_t at = 2 * (i * columns + j);
      Vec<T> xr, xi, mr{}, mi{};
      load_complex(x + at, count, xr, xi);
      if (more != nullptr) load_complex(more + at, count, mr, mi);
      store_complex(to + at, count, mr + (xr * sr - xi * si), mi + (xr * si + xi * sr));
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
    if (gU) times_complex<true>(gU, z.re, z.im, static_cast<const T*>(nullptr), M, r, gU);
    if (job.gV) {
      pack(u, M, r, U);
      const Term<T> terms[] = {{{h, 1, N}, U, M}};
      ToScaledRows<T> sink{job.gV + 2 * b * N * r, nullptr, r, z.re, z.im};
      product<true>(terms, sink, N, r, ahead);
    }
    if (job.gH) {
      times_complex<false>(u, z.re, z.im, static_cast<const T*>(nullptr), M, r, Uz);
      adjoint(V, N, r, Vh);
      const Term<T> terms[] = {{{Uz, r, 1}, Vh, r}};
      ToRows<T> sink{job.gH + 2 * b * M * N, N};
      product<false>(terms, sink, M, N, ahead);
    }
  }
}

// Scratch of one factor of the tail, and where its columns come from and go to.
template <typename T>
struct TailFactor {
  Factor<T> x;
  T *columns, *g, *scale, *slope;

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
    x.plan(arena, rows, r, backward);
    columns = arena.take(2 * rows * r);
    scale = take_row(arena, r);
    slope = take_row(arena, r);
    if (backward) g = arena.take(2 * rows * r);
  }
};

template <typename T>
void in_order(const T* raw, const std::int64_t* order, std::int64_t rows, std::int64_t r, T* columns) {
  struct Pair {
    T re, im;
  };
  Pair* to = reinterpret_cast<Pair*>(columns);
  for (std::int64_t i = 0; i < rows; ++i, raw += 2 * r)
    for (std::int64_t k = 0; k < r; ++k) *to++ = Pair{raw[2 * order[k]], raw[2 * order[k] + 1]};
}

// The raw columns in this order, divided by (norm + eps); then refined: Y and the scale of its columns.
template <typename T>
LOMACS_TARGET void tail_columns(const T* raw, const std::int64_t* order, const TailFactor<T>& f, std::int64_t rows,
                                std::int64_t r, double step, T* Y, Ahead& ahead) {
  in_order(raw, order, rows, r, f.columns);
  pack_squares(f.columns, rows, r, f.x.U, f.scale);
  for (std::int64_t k = 0; k < r; ++k) {
    const double n = std::sqrt(static_cast<double>(f.scale[k]));
    f.scale[k] = static_cast<T>(1 / (n + normal_eps));
    f.slope[k] = static_cast<T>(n != 0 ? 1 / n : 0.0);
  }
  times_real(f.columns, f.scale, rows, r, f.columns);
  refine_columns(f.columns, f.x, rows, r, step, Y, ahead);
}

// What tail_columns leaves, from what the forward kept.
template <typename T>
LOMACS_TARGET void kept_columns(const T* raw, const std::int64_t* order, const TailFactor<T>& f, std::int64_t rows,
                                std::int64_t r, double step, const T* residual, const T* columns) {
  f.take(r, columns);
  in_order(raw, order, rows, r, f.columns);
  times_real(f.columns, f.scale, rows, r, f.columns);
  pack(residual, r, r, f.x.G);
  refine_polynomial(f.x, r, step);
}

// The gradient g of the tail's columns back to the raw ones; returns that of the step. `refined` are the columns
// before they are normalised; or those normalised, and then x.slope has 1 / norm.
template <typename T>
LOMACS_TARGET double tail_gradient(const std::int64_t* order, const T* refined, const TailFactor<T>& f,
                                   std::int64_t rows, std::int64_t r, double step, T* graw, Ahead& ahead) {
  const double gstep = refine_gradient(f.columns, refined, f.g, f.x, rows, r, step, f.g, ahead);
  normal_gradient(f.columns, f.g, f.scale, f.slope, rows, r, f.g);
  const T* from = f.g;
  for (std::int64_t i = 0; i < rows; ++i, graw += 2 * r)
    for (std::int64_t k = 0; k < r; ++k, from += 2) {
      graw[2 * order[k]] = from[0];
      graw[2 * order[k] + 1] = from[1];
    }
  return gstep;
}

// The gradients of sample b from its columns u and v, as they were before they were normalised or not (uy, vy),
// W = H V and the diagonal z; `room`, which may be W, where H asks for a gradient.
template <typename T>
LOMACS_TARGET void tail_gradients(const Tail<T>& job, const std::int64_t* order, const TailFactor<T>& fu,
                                  const TailFactor<T>& fv, const Diagonal<T>& z, Panels<T> U, Panels<T> V,
                                  Panels<T> Vh, std::int64_t b, const T* u, const T* v, const T* uy, const T* vy,
                                  const T* W, T* room, Ahead& ahead) {
  const std::int64_t M = job.M, N = job.N, r = job.r;
  const std::int64_t left = 2 * b * M * r, right = 2 * b * N * r, square = 2 * b * M * N;
  double* scalars = job.gscalars + 3 * b;
  scalars[2] = z.gradient(job.gS + b * r, job.S_pred + b * r, order, job.tau, r, job.oS + b * r);
  times_complex<true>(W, z.re, z.im, job.gU + left, M, r, fu.g);
  pack(u, M, r, U);
  {
    const Term<T> terms[] = {{{job.H + square, 1, N}, U, M}};
    ToScaledRows<T> sink{fv.g, job.gV + right, r, z.re, z.im};
    product<true>(terms, sink, N, r, ahead);
  }
  if (job.oH) {
    times_complex<false>(u, z.re, z.im, static_cast<const T*>(nullptr), M, r, room);
    pack(v, N, r, V);
    adjoint(V, N, r, Vh);
    const Term<T> terms[] = {{{room, r, 1}, Vh, r}};
    ToRows<T> sink{job.oH + square, N};
    product<false>(terms, sink, M, N, ahead);
  }
  scalars[0] = tail_gradient(order, uy, fu, M, r, job.a, job.oU + left, ahead);
  scalars[1] = tail_gradient(order, vy, fv, N, r, job.b, job.oV + right, ahead);
}

// largest first, NaN before all, equal ones as they come: torch's order
template <typename T>
void sort_columns(const T* S_pred, std::int64_t r, std::int64_t* order) {
  for (std::int64_t k = 0; k < r; ++k) order[k] = k;
  std::stable_sort(order, order + r, [S_pred](std::int64_t i, std::int64_t j) {
    return S_pred[i] > S_pred[j] || (S_pred[i] != S_pred[i] && S_pred[j] == S_pred[j]);
  });
}

template <typename T>
LOMACS_TARGET void tail_samples(const Tail<T>& job, std::int64_t begin, std::int64_t end) {
  const std::int64_t M = job.M, N = job.N, r = job.r;
  const bool backward = job.gU != nullptr, ragged = r % lanes<T> != 0 || N % lanes<T> != 0;
  const bool kept = job.kept != nullptr;
  TailFactor<T> fu, fv;
  Panels<T> U, V, Vh;
  Diagonal<T> z;
  T *u_rows = nullptr, *v_rows = nullptr, *W = nullptr;
  const auto plan = [&](Arena<T>& a) {
    fu.plan(a, M, r, backward);
    fv.plan(a, N, r, backward);
    V = take_squares(a, N, r);
    z.plan(a, r);
    if (!backward) return;
    U = take_panels(a, M, r);
    if (!kept) u_rows = a.take(2 * M * r);
    if (!kept) v_rows = a.take(2 * N * r);
    if (!kept || job.oH) W = a.take(2 * M * r);
    if (job.oH) Vh = take_squares(a, r, whole<T>(N));
  };
  const Arena<T> arena(plan, ragged);
  std::vector<std::int64_t> order(static_cast<std::size_t>(r));
  for (std::int64_t b = begin; b < end; ++b) {
    const std::int64_t left = 2 * b * M * r, right = 2 * b * N * r, square = 2 * b * M * N;
    const T *h = job.H + square, *s = job.S_pred + b * r;
    const std::int64_t many = kept ? Kept<T>::size(M, r) : 0;
    const Kept<T> of_sample = kept ? Kept<T>(job.kept + b * many, M, r) : Kept<T>();
    Ahead ahead(kept && backward ? 40 : 16);
    if (b + 1 < end) {
      const auto bytes = [](std::int64_t count) { return sizeof(T) * static_cast<std::size_t>(count); };
      if (kept && backward) {
        ahead.add(job.V_out + right + 2 * N * r, bytes(2 * N * r));
        ahead.add(job.U_out + left + 2 * M * r, bytes(2 * M * r));
        ahead.add(job.gV + right + 2 * N * r, bytes(2 * N * r));
        ahead.add(job.gU + left + 2 * M * r, bytes(2 * M * r));
        ahead.add(job.kept + (b + 1) * many, bytes(many));
      }
      ahead.add(h + 2 * M * N, bytes(2 * M * N));
      ahead.add(job.V + right + 2 * N * r, bytes(2 * N * r));
      ahead.add(job.U + left + 2 * M * r, bytes(2 * M * r));
    }
    sort_columns(s, r, order.data());
    if (kept && backward) {
      kept_columns(job.U + left, order.data(), fu, M, r, job.a, of_sample.residuals[0], of_sample.columns[0]);
      kept_columns(job.V + right, order.data(), fv, N, r, job.b, of_sample.residuals[1], of_sample.columns[1]);
      std::copy(of_sample.z, of_sample.z + r, z.re);
      std::copy(of_sample.z + r, of_sample.z + 2 * r, z.im);
      const T *u = job.U_out + left, *v = job.V_out + right;
      tail_gradients(job, order.data(), fu, fv, z, U, V, Vh, b, u, v, u, v, of_sample.W, W, ahead);
      continue;
    }
    T *u = backward ? u_rows : job.oU + left, *v = backward ? v_rows : job.oV + right;
    T *uy = backward ? fu.x.Y : u, *vy = backward ? fv.x.Y : v;
    tail_columns(job.U + left, order.data(), fu, M, r, job.a, uy, ahead);
    times_real(uy, fu.x.scale, M, r, u);
    tail_columns(job.V + right, order.data(), fv, N, r, job.b, vy, ahead);
    times_real(vy, fv.x.scale, N, r, v);
    z.clear(r);
    pack(v, N, r, V);
    const Term<T> measured[] = {{{h, N, 1}, V, N}};
    ToDots<T> dots{u, r, z.re, z.im};
    if (!backward && !kept) {
      product<false>(measured, dots, M, r, ahead);
      z.calibrate(s, order.data(), job.tau, r, job.oS + b * r);
      continue;
    }
    ToRowsAndDots<T> both{{kept ? of_sample.W : W, r}, dots};
    product<false>(measured, both, M, r, ahead);
    if (backward) {
      tail_gradients(job, order.data(), fu, fv, z, U, V, Vh, b, u, v, uy, vy, W, W, ahead);
      continue;
    }
    rows_of(fu.x.G, r, of_sample.residuals[0]);
    rows_of(fv.x.G, r, of_sample.residuals[1]);
    fu.keep(r, of_sample.columns[0]);
    fv.keep(r, of_sample.columns[1]);
    std::copy(z.re, z.re + r, of_sample.z);
    std::copy(z.im, z.im + r, of_sample.z + r);
    z.calibrate(s, order.data(), job.tau, r, job.oS + b * r);
  }
}

template <typename T>
LOMACS_TARGET void tail_factor(const T* raw, const std::int64_t* order, const TailFactor<T>& f, std::int64_t rows,
                               std::int64_t r, double step, T* to) {
  Ahead ahead;
  tail_columns(raw, order, f, rows, r, step, to, ahead);
  times_real(to, f.x.scale, rows, r, to);
}

// columns from `vec * lanes` on of (U^H H V)_kk, so many
template <typename T>
LOMACS_TARGET void measure_columns(const Tail<T>& job, Panels<T> V, const Diagonal<T>& z, std::int64_t vec,
                                   std::int64_t columns) {
  Ahead ahead;
  const std::int64_t first = vec * lanes<T>;
  const Term<T> measured[] = {{{job.H, job.N, 1}, {V.at(0, vec), V.rows}, job.N}};
  ToDots<T> dots{job.oU + 2 * first, job.r, z.re + first, z.im + first};
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
    fv.plan(a, N, r, false);
    V = take_squares(a, N, r);
    z.plan(a, r);
  };
  const Arena<T> arena(plan, r % lanes<T> != 0 || N % lanes<T> != 0);
  std::vector<std::int64_t> order(static_cast<std::size_t>(r));
  sort_columns(job.S_pred, r, order.data());
  team.share(2, [&](std::uint64_t i) {
    if (i == 0) return tail_factor(job.U, order.data(), fu, M, r, job.a, job.oU);
    tail_factor(job.V, order.data(), fv, N, r, job.b, job.oV);
    pack(job.oV, N, r, V);
  });
  z.clear(r);
  // a vector that is not whole stays with the rest
  const std::int64_t shares = r % lanes<T> == 0 ? r / lanes<T> : 1;
  team.share(static_cast<std::uint64_t>(shares), [&](std::uint64_t i) {
    measure_columns(job, V, z, static_cast<std::int64_t>(i), r / shares);
  });
  z.calibrate(job.S_pred, order.data(), job.tau, r, job.oS);
}

}  // namespace
}  // namespace LOMACS_ISA
}  // namespace lomacs
