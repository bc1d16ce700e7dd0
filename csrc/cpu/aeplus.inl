// Terms and gradients of the AE+ loss, sample by sample. Included inside isa.inl.
#include "cmatmul.inl"
#include "pairs.inl"

namespace lomacs {
namespace LOMACS_ISA {
namespace {

template <typename T>
struct Scratch {
  // planar: U, V, V^H, and r x r: M^H, Gram matrices, coefficients
  Panels<T> U, V, Vh, Mh, Gu, Gv, A, B, C;
  // interleaved: H or E times V or U; U S, later U K; S times a Gram matrix; E
  T *X, *US, *SG, *E;
  T* s;
  PairScratch<T> pairs;
  Arena<T> arena;
  // diagonals of M or U^H E V, of U^H U and V^H V, of (U^H U) S (V^H V), and Re(U^H E V)_kk
  double *re, *im, *gu, *gv, *product_re, *product_im, *e;
  std::vector<double> diagonals;

  // columns and rows beyond the matrices enter sums and transposed squares, so they are zero
  explicit Scratch(const AEPlus<T>& job)
      : arena([&](Arena<T>& a) { plan(a, job); }, job.r % panel<T> || job.N % lanes<T>) {
    const std::int64_t n = whole<T>(job.r);
    diagonals.resize(static_cast<std::size_t>(7 * n));
    double* p = diagonals.data();
    for (double** row : {&re, &im, &gu, &gv, &product_re, &product_im, &e}) *row = p, p += n;
  }

  void plan(Arena<T>& arena, const AEPlus<T>& job) {
    const std::int64_t M = job.M, N = job.N, r = job.r;
    U = take_panels(arena, M, r);
    V = take_squares(arena, N, r);
    Vh = take_squares(arena, r, whole<T>(N));
    for (Panels<T>* square : {&Mh, &Gu, &Gv, &A, &B, &C}) *square = take_squares(arena, r, r);
    X = arena.take(2 * std::max(M, N) * r);
    US = arena.take(2 * M * r);
    SG = arena.take(2 * r * r);
    E = arena.take(2 * M * N);
    s = take_row(arena, r);
    pairs.plan(arena, std::max(M, N), r, true);
  }
};

template <typename T>
LOMACS_TARGET double square_sum(Panels<T> x, std::int64_t columns) {
  Vec<T> total[4] = {};
  const std::int64_t n = Panels<T>::size(x.rows, columns);
  // panels x rows x step: a multiple of four vectors, or of two
  std::int64_t i = 0;
  for (; i + 4 * lanes<T> <= n; i += 4 * lanes<T>)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Vec<T> v = load(x.data + i + j * lanes<T>);
      total[j] += v * v;
    }
  for (; i < n; i += lanes<T>) {
    const Vec<T> v = load(x.data + i);
    total[0] += v * v;
  }
  return sum<T>((total[0] + total[1]) + (total[2] + total[3]));
}

// in short chains: the sum has one sign and its error would show
template <typename T>
LOMACS_TARGET double square_sum(const T* x, std::int64_t n) {
  Vec<T> total[4] = {};
  std::int64_t i = 0;
  while (i + 4 * lanes<T> <= n) {
    Vec<T> part[4] = {};
    for (int k = 0; k < 8 && i + 4 * lanes<T> <= n; ++k, i += 4 * lanes<T>)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const Vec<T> v = load(x + i + j * lanes<T>);
        part[j] += v * v;
      }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) total[j] += part[j];
  }
  double rest = 0;
  for (; i < n; ++i) rest += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  return sum<T>((total[0] + total[1]) + (total[2] + total[3])) + rest;
}

// whether T is precise for a sum of n squares, and for sums of its parts' squares down to 1e-4 of the mean
template <typename T>
bool in_range(double squares, std::int64_t n) {
  using Range = std::numeric_limits<T>;
  // then what is 1e-4 of the mean number still has a square above the least normal one
  const double least = 1e8 * static_cast<double>(Range::min()) * static_cast<double>(n);
  return squares > least && squares <= static_cast<double>(Range::max());
}

// |x| out of the sum of its squares; where squares left the range in which T is precise, by parts of the largest
template <typename T>
double norm_of(double squares, const T* x, std::int64_t n) {
  using Range = std::numeric_limits<T>;
  if (in_range<T>(squares, n)) return std::sqrt(squares);
  double largest = 0, total = 0;
  for (std::int64_t i = 0; i < n; ++i) largest = std::max(largest, static_cast<double>(std::abs(x[i])));
  // NaN has failed every comparison
  if (largest == 0 || largest > static_cast<double>(Range::max())) return std::sqrt(squares);
  for (std::int64_t i = 0; i < n; ++i) {
    const double part = static_cast<double>(x[i]) / largest;
    total += part * part;
  }
  return largest * std::sqrt(total);
}

template <typename T>
LOMACS_TARGET double norm(Panels<T> x, std::int64_t columns) {
  return norm_of(square_sum(x, columns), x.data, Panels<T>::size(x.rows, columns));
}

// to = scale from
template <typename T>
LOMACS_TARGET void scaled(Panels<T> from, std::int64_t columns, T scale, Panels<T> to) {
  const std::int64_t n = Panels<T>::size(from.rows, columns);
  for (std::int64_t i = 0; i < n; i += lanes<T>) store(to.data + i, load(from.data + i) * splat(scale));
}

// to = diag(s) X diag(s) x
template <typename T>
LOMACS_TARGET void sandwich(Panels<T> X, const T* s, T x, std::int64_t r, Panels<T> to) {
  for (std::int64_t vec = 0; vec * lanes<T> < r; ++vec) {
    const Vec<T> right = load(s + vec * lanes<T>) * splat(x);
    for (std::int64_t k = 0; k < r; ++k) {
      const Vec<T> weight = right * splat(s[k]);
      const T* p = X.at(k, vec);
      T* o = to.at(k, vec);
      store(o, weight * load(p));
      store(o + Panels<T>::imag, weight * load(p + Panels<T>::imag));
    }
  }
}

// to += x X
template <typename T>
LOMACS_TARGET void add_scaled(Panels<T> X, std::int64_t columns, T x, Panels<T> to) {
  const std::int64_t n = Panels<T>::size(X.rows, columns);
  for (std::int64_t i = 0; i < n; i += lanes<T>)
    store(to.data + i, load(to.data + i) + load(X.data + i) * splat(x));
}

// diag(s) X, interleaved
template <typename T>
LOMACS_TARGET void scaled_rows(Panels<T> X, const T* s, std::int64_t r, T* to) {
  for (std::int64_t k = 0; k < r; ++k)
    for (std::int64_t j = 0; j < r; j += lanes<T>) {
      const T* p = X.at(k, j / lanes<T>);
      const Vec<T> weight = splat(s[k]);
      store_complex(to + 2 * (k * r + j), r - j, weight * load(p), weight * load(p + Panels<T>::imag));
    }
}

// (X diag(s) Y)_kk of Hermitian X and Y
template <typename T>
LOMACS_TARGET void weighted_dot(Panels<T> X, Panels<T> Y, const T* s, std::int64_t k, std::int64_t r, double& re,
                                double& im) {
  Vec<T> total_re{}, total_im{};
  for (std::int64_t vec = 0; vec * lanes<T> < r; ++vec) {
    const T *p = X.at(k, vec), *q = Y.at(k, vec);
    const Vec<T> weight = load(s + vec * lanes<T>);
    const Vec<T> xr = weight * load(p), xi = weight * load(p + Panels<T>::imag);
    const Vec<T> yr = load(q), yi = load(q + Panels<T>::imag);
    total_re += xr * yr + xi * yi;
    total_im += xi * yr - xr * yi;
  }
  re = sum<T>(total_re);
  im = sum<T>(total_im);
}

// a sum of vectors of T in double
template <typename T>
struct WideSum {
  static constexpr int halves = sizeof(double) / sizeof(T);
  Vec<double> part[halves] = {};

  LOMACS_INLINE void add(Vec<T> x) {
    typename Simd<T, LOMACS_BYTES / halves>::Vec half[halves];
    std::memcpy(half, &x, sizeof x);
#pragma GCC unroll 2
    for (int i = 0; i < halves; ++i) part[i] += __builtin_convertvector(half[i], Vec<double>);
  }
  LOMACS_INLINE void store_to(double* p) const {
#pragma GCC unroll 2
    for (int i = 0; i < halves; ++i) store(p + i * lanes<double>, part[i]);
  }
};

// sum_m conj(x_mk) y_mk for every column k, in double but for chains of four: what S lacks of the diagonal of M is the
// difference of two such sums
template <typename T>
LOMACS_TARGET void wide_dots(Panels<T> X, const T* y, std::int64_t rows, std::int64_t r, double* re, double* im) {
  for (std::int64_t j = 0; j < r; j += lanes<T>) {
    const T* p = X.at(0, j / lanes<T>);
    WideSum<T> total_re, total_im;
    for (std::int64_t m = 0; m < rows;) {
      Vec<T> rr{}, ii{}, ri{}, ir{};
      for (const std::int64_t stop = std::min<std::int64_t>(m + 4, rows); m < stop; ++m) {
        Vec<T> yr, yi;
        load_complex(y + 2 * (m * r + j), r - j, yr, yi);
        const Vec<T> xr = load(p + m * Panels<T>::step), xi = load(p + m * Panels<T>::step + Panels<T>::imag);
        rr += xr * yr;
        ii += xi * yi;
        ri += xr * yi;
        ir += xi * yr;
      }
      total_re.add(rr);
      total_re.add(ii);
      total_im.add(ri - ir);
    }
    total_re.store_to(re + j);
    total_im.store_to(im + j);
  }
}

// to = X^H X less its diagonal, which goes to `diagonal`; returns |X^H X - I|
template <typename T>
LOMACS_TARGET double gram(const T* x, Panels<T> planar, std::int64_t rows, std::int64_t r, Panels<T> to,
                          double* diagonal, double* unused, const PairScratch<T>& pairs, Ahead& ahead) {
  const Term<T> terms[] = {{{x, 1, r}, planar, rows}};
  ToPanels<T> sink{to};
  wide_dots(planar, x, rows, r, diagonal, unused);
#if LOMACS_PRODUCTS == 3
  if (pairs.takes(rows) && of_one_size(diagonal, r)) gram_by_pairs(x, planar, rows, r, pairs, sink, ahead);
  else
#endif
    product<true>(terms, sink, r, r, ahead, Part::upper);
  mirror(to, r);
  double square = 0;
  for (std::int64_t k = 0; k < r; ++k) {
    T* g = to.element(k, k);
    g[0] = g[Panels<T>::imag] = 0;
    square += (diagonal[k] - 1.0) * (diagonal[k] - 1.0);
  }
  const double off = norm(to, r);
  return std::sqrt(square + off * off);
}

// to += beta (X^H X - I), its diagonal in full precision
template <typename T>
LOMACS_TARGET void add_residual(Panels<T> X, std::int64_t r, double beta, Panels<T> to) {
  add_scaled(X, r, static_cast<T>(beta), to);
  for (std::int64_t k = 0; k < r; ++k) {
    const double g = *X.element(k, k);
    T* t = to.element(k, k);
    *t = static_cast<T>(static_cast<double>(*t) - beta * g + beta * (g - 1));
  }
}

// Whether Gram matrices and weights s beside a channel of norm h are far from where T loses the squares of some columns
// that count.
template <typename T>
bool moderate(Panels<T> Gu, Panels<T> Gv, const T* s, std::int64_t r, double h) {
  constexpr double most = 1e4;
  for (std::int64_t k = 0; k < r; ++k)
    if (!(*Gu.element(k, k) <= most && *Gv.element(k, k) <= most && std::abs(s[k]) <= most * h)) return false;
  return true;
}

template <typename T>
LOMACS_TARGET void aeplus_sample(const AEPlus<T>& job, std::int64_t b, const Scratch<T>& x, Ahead ahead) {
  const std::int64_t M = job.M, N = job.N, r = job.r;
  const T *U = job.U + 2 * b * M * r, *S = job.S + b * r, *V = job.V + 2 * b * N * r;
  const T* H = job.H + 2 * b * M * N;
  T* gS = job.gS ? job.gS + b * r : nullptr;
  T* gU = job.gU ? job.gU + 2 * b * M * r : nullptr;
  T* gV = job.gV ? job.gV + 2 * b * N * r : nullptr;
  T* gH = job.gH ? job.gH + 2 * b * M * N : nullptr;
  const bool backward = gU || gS || gV || gH;

  std::memcpy(x.s, S, sizeof(T) * static_cast<std::size_t>(r));
  pack(U, M, r, x.U);
  pack(V, N, r, x.V);
  const double ou = gram(U, x.U, M, r, x.Gu, x.gu, x.im, x.pairs, ahead);
  const double ov = gram(V, x.V, N, r, x.Gv, x.gv, x.im, x.pairs, ahead);
  double pp = 0;
  for (std::int64_t k = 0; k < r; ++k) {
    double re, im;
    weighted_dot(x.Gu, x.Gv, x.s, k, r, re, im);
    x.product_re[k] = re + x.gu[k] * x.s[k] * x.gv[k];
    x.product_im[k] = im;
    pp += x.s[k] * x.product_re[k];
  }
  for (std::int64_t k = 0; k < r; ++k) {
    *x.Gu.element(k, k) = static_cast<T>(x.gu[k]);
    *x.Gv.element(k, k) = static_cast<T>(x.gv[k]);
  }
  const double hh = square_sum(H, 2 * M * N), h = norm_of(hh, H, 2 * M * N), inv = 1 / (h + 1e-8);

  const auto size_of = [&](double square, std::int64_t rows) {
    return std::sqrt(square / static_cast<double>(rows * r));
  };
  [[maybe_unused]] const double of_U = size_of(std::accumulate(x.gu, x.gu + r, 0.0), M);
  [[maybe_unused]] const double of_V = size_of(std::accumulate(x.gv, x.gv + r, 0.0), N);
  [[maybe_unused]] const bool by_pairs = x.pairs.takes(M) && x.pairs.takes(N) && of_one_size(x.gu, r) && of_one_size(x.gv, r);
  const auto times_V = [&](const T* left) LOMACS_TARGET {
    ToRows<T> sink{x.X, r};
#if LOMACS_PRODUCTS == 3
    if (by_pairs && multiplied_by_pairs(left, x.V, of_V, M, N, r, x.pairs, sink, ahead))
      return wide_dots(x.U, x.X, M, r, x.re, x.im);
#endif
    const Term<T> terms[] = {{{left, N, 1}, x.V, N}};
    product<false>(terms, sink, M, r, ahead);
    wide_dots(x.U, x.X, M, r, x.re, x.im);
  };
  // |E|^2 = |H|^2 - 2 Re sum s_k M_kk + |U S V^H|^2, and E is not formed, where that is no small part of what it is the
  // difference of; tried where it would be if S were the diagonal of M
  const double both_squares = hh + pp;
  const auto expands = [&](double ee) {
    if (ee >= 0.54 * both_squares) return true;
    // the residual's gradients are rounded |H| / |E| times as much as by E V: where those of the other terms outweigh
    // them, that is nothing
    const double e = std::sqrt(ee);
    return ee >= 0.1 * both_squares && ou > 0 && ov > 0 && 8 * std::abs(job.lam) * e >= std::sqrt(pp) &&
           std::abs(job.w_match) * e * std::sqrt(static_cast<double>(M)) >= 0.02 * static_cast<double>(r) * h;
  };
  bool expanded =
      in_range<T>(hh, 2 * M * N) && moderate(x.Gu, x.Gv, x.s, r, h) && expands(std::abs(hh - pp));
  double e = 0;
  if (expanded) {
    times_V(H);
    double cross = 0;
    for (std::int64_t k = 0; k < r; ++k) cross += x.s[k] * x.re[k];
    const double ee = both_squares - 2 * cross;
    expanded = expands(ee);
    e = std::sqrt(ee);
  }
  if (!expanded) {
    adjoint(x.V, N, r, x.Vh);
    scale_columns(U, x.s, M, r, x.US);
    ToResidual<T> residual{H, x.E, N, Vec<T>{}};
    const Term<T> terms[] = {{{x.US, r, 1}, x.Vh, r}};
    product<false>(terms, residual, M, N, ahead);
    e = norm_of(sum<T>(residual.ee), x.E, 2 * M * N);
  }

  // E V and E^H U where E is no larger than H, and H V, H^H U where it is: the other way round the parts that
  // cancel in E, or in H = E + U S V^H, would do so after their products had been rounded
  const bool direct = !expanded && e < 1.5 * h;
  const T* left = direct ? x.E : H;
  if (!expanded) times_V(left);
  ToPanels<T> adjoint_of_M{x.Mh};
  if (direct) {
    scaled_rows(x.Gv, x.s, r, x.SG);
    const Term<T> terms[] = {{{x.X, 1, r}, x.U, M}, {{x.SG, 1, r}, x.Gu, r}};
    product<true>(terms, adjoint_of_M, r, r, ahead);
  } else {
    const Term<T> terms[] = {{{x.X, 1, r}, x.U, M}};
    product<true>(terms, adjoint_of_M, r, r, ahead);
  }

  double dd = 0, ss = 0, mean_gap = 0;
  for (std::int64_t k = 0; k < r; ++k) {
    T* m = x.Mh.element(k, k);
    m[0] = m[Panels<T>::imag] = 0;
    double re = x.re[k], im = x.im[k];
    const double s = x.s[k];
    // Re(U^H E V)_kk, all that the gradient of S needs of the residual
    x.e[k] = direct ? re : re - x.product_re[k];
    if (direct) re += x.product_re[k], im += x.product_im[k];
    x.re[k] = re;
    x.im[k] = im;
    dd += re * re + im * im;
    ss += s * s;
    mean_gap += std::abs(s - std::sqrt(re * re + im * im));
  }
  const double o = norm(x.Mh, r), m = std::sqrt(o * o + dd), dn = std::sqrt(dd), sn = std::sqrt(ss);
  const double gap = job.mean ? mean_gap / static_cast<double>(r) : std::abs(sn - dn);
  double* terms = job.terms + 5 * b;
  terms[0] = e * inv;
  terms[1] = ou + ov;
  terms[2] = 1 - m * inv;
  terms[3] = o * inv;
  terms[4] = gap * inv;
  if (!backward) return;

  // every factor is 0 where its norm is, so that a zero has subgradient 0; NaN passes
  const double scale = job.inv_batch;
  const auto over = [](double a, double n) { return n != 0 ? a / n : 0.0; };
  const auto sign = [](double a) { return static_cast<double>((a > 0) - (a < 0)); };
  const double alpha = over(scale * inv, e);
  const double c_m = over(-scale * job.w_energy * inv, m), c_o = over(scale * job.w_diag * inv, o);
  const double beta_u = over(2 * scale * job.lam, ou), beta_v = over(2 * scale * job.lam, ov);
  const double c_s = scale * job.w_match * inv * (job.mean ? 1 / static_cast<double>(r) : sign(sn - dn));

  // K = dL/dM less the residual's part: A = K^H, C = K
  const bool both = gV || gH;
  scaled(x.Mh, r, static_cast<T>(c_m + c_o), x.A);
  if (both) adjoint(x.A, r, r, x.C);
  for (std::int64_t k = 0; k < r; ++k) {
    const double re = x.re[k], im = x.im[k], s = x.s[k], size = std::sqrt(re * re + im * im);
    const double side = job.mean ? c_s * sign(s - size) : c_s;
    const double c = c_m - over(side, job.mean ? size : dn);
    if (gS) gS[k] = static_cast<T>((job.mean ? side : over(side * s, sn)) - alpha * x.e[k]);
    T* p = x.A.element(k, k);
    p[0] = static_cast<T>(c * re);
    p[Panels<T>::imag] = static_cast<T>(-c * im);
    if (both) {
      T* q = x.C.element(k, k);
      q[0] = p[0];
      q[Panels<T>::imag] = -p[Panels<T>::imag];
    }
  }
  if (gH) {
    const double loss = e - job.w_energy * m + job.w_diag * o + job.w_match * gap;
    const double of_H = -over(scale * inv * inv * loss, h);
    if (expanded) {
      // alpha E, of which H is a part and U S V^H goes with K
      adjoint(x.V, N, r, x.Vh);
      for (std::int64_t k = 0; k < r; ++k) *x.C.element(k, k) -= static_cast<T>(alpha * x.s[k]);
    }
    const Term<T> inner[] = {{{U, r, 1}, x.C, r}};
    ToRows<T> between{x.US, r};
    product<false>(inner, between, M, r, ahead);
    const Term<T> outer[] = {{{x.US, r, 1}, x.Vh, r}};
    ToSum<T> sink{gH, N, expanded ? H : x.E, H, static_cast<T>(alpha), static_cast<T>(of_H)};
    product<false>(outer, sink, M, N, ahead);
    if (expanded)
      for (std::int64_t k = 0; k < r; ++k) *x.C.element(k, k) = *x.A.element(k, k);
  }
  // to = X A + Y B, for the B in x.B
  const auto last_product = [&](const T* X, const T* Y, std::int64_t rows, double of_Y, Panels<T> A,
                                T* to) LOMACS_TARGET {
    ToRows<T> sink{to, r};
#if LOMACS_PRODUCTS == 3
    const double squares = by_pairs ? square_sum(X, 2 * rows * r) : 0.0;
    if (of_common_size(squares, rows * r)) {
      sums_of_products(X, Y, 2 * r, rows, r, x.pairs.row_re, x.pairs.row_im);
      scale_for_pairs(A, x.B, r, static_cast<T>(of_Y), static_cast<T>(size_of(squares, rows)), T(1), x.pairs);
      const Pairs<T> pairs{X, {}, Y, 2 * r, A, x.B, r};
      ColumnMultiples<T, ToRows<T>> multiples{x.pairs.weight, sink};
      return product_by_pairs<false, false>(pairs, x.pairs.sums(), multiples, rows, r, ahead);
    }
#endif
    const Term<T> outer[] = {{{X, r, 1}, A, r}, {{Y, r, 1}, x.B, r}};
    product<false>(outer, sink, rows, r, ahead);
  };
  if (gU) {
    if (direct) {
      const Term<T> inner[] = {{{x.SG, r, 1}, x.A, r}};
      ToPanels<T> sink{x.B};
      product<false>(inner, sink, r, r, ahead);
    } else {
      sandwich(x.Gv, x.s, static_cast<T>(alpha), r, x.B);
    }
    add_residual(x.Gu, r, beta_u, x.B);
    for (std::int64_t k = 0; k < r; ++k) *x.A.element(k, k) -= static_cast<T>(alpha * x.s[k]);
    last_product(x.X, U, M, of_U, x.A, gU);
  }
  if (gV) {
    ToRows<T> between{x.X, r};
#if LOMACS_PRODUCTS == 3
    if (!by_pairs || !adjoint_multiplied_by_pairs(left, x.U, of_U, M, N, r, x.pairs, between, ahead))
#endif
    {
      const Term<T> cross[] = {{{left, 1, N}, x.U, M}};
      product<true>(cross, between, N, r, ahead);
    }
    if (direct) {
      scaled_rows(x.Gu, x.s, r, x.SG);
      const Term<T> inner[] = {{{x.SG, r, 1}, x.C, r}};
      ToPanels<T> sink{x.B};
      product<false>(inner, sink, r, r, ahead);
    } else {
      sandwich(x.Gu, x.s, static_cast<T>(alpha), r, x.B);
    }
    add_residual(x.Gv, r, beta_v, x.B);
    for (std::int64_t k = 0; k < r; ++k) *x.C.element(k, k) -= static_cast<T>(alpha * x.s[k]);
    last_product(x.X, V, N, of_V, x.C, gV);
  }
}

template <typename T>
LOMACS_TARGET void aeplus_samples(const AEPlus<T>& job, std::int64_t begin, std::int64_t end) {
  const Scratch<T> scratch(job);
  const std::int64_t M = job.M, N = job.N, r = job.r;
  for (std::int64_t b = begin; b < end; ++b) {
    Ahead ahead;
    if (b + 1 < end) {
      // the last is fetched first, in the order in which they are read
      ahead.add(job.H + 2 * (b + 1) * M * N, sizeof(T) * static_cast<std::size_t>(2 * M * N));
      ahead.add(job.V + 2 * (b + 1) * N * r, sizeof(T) * static_cast<std::size_t>(2 * N * r));
      ahead.add(job.U + 2 * (b + 1) * M * r, sizeof(T) * static_cast<std::size_t>(2 * M * r));
    }
    // what this sample will write would be read too, line by line when it is written
    if (job.gV) ahead.add(job.gV + 2 * b * N * r, sizeof(T) * static_cast<std::size_t>(2 * N * r));
    if (job.gU) ahead.add(job.gU + 2 * b * M * r, sizeof(T) * static_cast<std::size_t>(2 * M * r));
    aeplus_sample(job, b, scratch, ahead);
  }
}

}  // namespace
}  // namespace LOMACS_ISA
}  // namespace lomacs
