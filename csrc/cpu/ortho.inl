// Refinement and Björck iterations with their gradients, sample by sample. Included inside isa.inl.
#include "gram.inl"

namespace lomacs {
namespace LOMACS_ISA {
namespace {

// U of every sample, then V of every sample
template <typename T>
LOMACS_TARGET void ortho_refine_factors(const OrthoRefine<T>& job, std::int64_t begin, std::int64_t end) {
  const std::int64_t r = job.r;
  Factor<T> x;
  const std::int64_t rows = std::max(job.factors[0].rows, job.factors[1].rows);
  const Arena<T> arena([&](Arena<T>& a) { x.plan(a, rows, r, job.backward, job.backward); }, r % lanes<T> != 0);
  for (std::int64_t n = begin; n < end; ++n) {
    const bool second = n >= job.batch;
    const FactorOf<T>& f = job.factors[second];
    const std::int64_t rows = f.rows, size = 2 * rows * r, b = second ? n - job.batch : n;
    Ahead ahead(f.refined ? 40 : f.residual ? 32 : 16);
    if (n + 1 < end && b + 1 < job.batch) {
      const std::size_t bytes = sizeof(T) * static_cast<std::size_t>(size);
      if (job.backward) ahead.add(f.g + (b + 1) * size, bytes);
      if (f.refined) {
        ahead.add(f.refined + (b + 1) * size, bytes);
        ahead.add(f.residual + (b + 1) * f.many, sizeof(T) * static_cast<std::size_t>(Upper<T>::size(r)));
      }
      ahead.add(f.x + (b + 1) * size, bytes);
    }
    const Upper<T> kept{f.residual ? f.residual + b * f.many : nullptr};
    // to be written
    if (kept.data && !job.backward) ahead.add(kept.data, sizeof(T) * static_cast<std::size_t>(Upper<T>::size(r)));
    x.U.rows = rows;
    const T* u = f.x + b * size;
    T* out = f.out + b * size;
    T* norms = f.norms ? f.norms + b * f.stride : nullptr;
    if (job.backward && kept.data) {
      for (std::int64_t k = 0; k < r; ++k) {
        const double n = norms[k];
        x.scale[k] = static_cast<T>(1 / (n + normal_eps));
        x.slope[k] = static_cast<T>(n != 0 ? 1 / n : 0.0);
      }
      const T* refined = f.refined + b * size;
      f.gsteps[b] = refine_gradient(u, refined, f.g + b * size, x, kept, rows, r, f.step, out, ahead);
    } else if (job.backward) {
      refine_columns(u, x, rows, r, f.step, x.Y, ahead, x.residual);
      f.gsteps[b] = refine_gradient(u, x.Y, f.g + b * size, x, x.residual, rows, r, f.step, out, ahead);
    } else {
      refine_columns(u, x, rows, r, f.step, out, ahead, kept);
      times_real(out, x.scale, rows, r, out);
      if (!kept.data) continue;
      for (std::int64_t k = 0; k < r; ++k) norms[k] = std::sqrt(x.squares[k]);
    }
  }
}

// product + x X to rows, and to panels where there are some
template <typename T>
struct ToMoreRowsAndPanels {
  ToRows<T> rows;
  ToPanels<T> panels;
  const T* X;
  T x;

  template <int R, int V>
  LOMACS_INLINE void prepare(std::int64_t i0, std::int64_t vec) const {
    rows.template prepare<R, V>(i0, vec);
  }

  template <int R, int V>
  LOMACS_INLINE void take(Vec<T> (&re)[R][V], Vec<T> (&im)[R][V], std::int64_t i0, std::int64_t vec) {
    const std::int64_t columns = rows.columns;
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) {
        const std::int64_t column = (vec + j) * lanes<T>;
        Vec<T> xr, xi;
        load_complex(X + 2 * ((i0 + i) * columns + column), columns - column, xr, xi);
        re[i][j] += x * xr;
        im[i][j] += x * xi;
      }
    rows.template take<R, V>(re, im, i0, vec);
    if (panels.c.data != nullptr) panels.template take<R, V>(re, im, i0, vec);
  }
};

// Scratch of Björck's iteration. With gradients every step keeps its matrices, else two take turns.
template <typename T>
struct Iterates {
  Panels<T> U, G, P, X, S, Z, W;
  T *rows, *g, *square, *sums;
  PairScratch<T> pairs;
  std::int64_t M, r, kept_rows, kept;

  void plan(Arena<T>& arena, const Bjorck<T>& job) {
    M = job.M, r = job.r;
    kept_rows = job.backward ? std::max<std::int64_t>(job.steps, 1) : 2;
    kept = job.backward ? std::max<std::int64_t>(job.steps, 1) : 1;
    U = take_panels(arena, M, r);
    // side by side, each in whole squares
    G = {arena.take(kept * square_size()), whole<T>(r)};
    P = {arena.take(kept * square_size()), whole<T>(r)};
    X = take_squares(arena, r, r);
    S = take_squares(arena, r, r);
    Z = take_squares(arena, r, r);
    if (!job.together.empty()) W = take_squares(arena, r, r);
    rows = arena.take(kept_rows * 2 * M * r);
    square = arena.take(2 * r * r);
    sums = take_row(arena, r);
    pairs.plan(arena, M, r, false);
    if (job.backward) g = arena.take(2 * 2 * M * r);
  }
  std::int64_t square_size() const { return Panels<T>::size(whole<T>(r), r); }
  Panels<T> gram(std::int64_t i) const { return {G.data + i % kept * square_size(), G.rows}; }
  Panels<T> polynomial(std::int64_t i) const { return {P.data + i % kept * square_size(), P.rows}; }
  T* iterate(std::int64_t i) const { return rows + i % kept_rows * 2 * M * r; }
};

template <typename T>
LOMACS_INLINE Vec<T> magnitudes(Vec<T> re, Vec<T> im) {
  return square_root<T>(re * re + im * im);
}

// A power of two, 1 where no entry of a Gram matrix is so large that its square would overflow: none is larger than
// the largest on the diagonal.
template <typename T>
LOMACS_TARGET T unit_of(Panels<T> G, std::int64_t r) {
  constexpr int half = std::numeric_limits<T>::max_exponent / 2;
  const T limit = std::ldexp(T(1), half - 4);
  for (std::int64_t k = 0; k < r; ++k)
    if (G.at(k, k / lanes<T>)[k % lanes<T>] > limit) return std::ldexp(T(1), -half);
  return 1;
}

// sums of |G_ij| over i: by symmetry the row sums; the largest, or NaN
template <typename T>
LOMACS_TARGET double row_sums(const Iterates<T>& x, Panels<T> G) {
  double largest = 0;
  const T unit = unit_of(G, x.r);
  for (std::int64_t vec = 0; vec * lanes<T> < x.r; ++vec) {
    Vec<T> total{};
    for (std::int64_t i = 0; i < x.r; ++i) {
      const T* p = G.at(i, vec);
      total += magnitudes<T>(load(p) * unit, load(p + Panels<T>::imag) * unit);
    }
    store(x.sums + vec * lanes<T>, total / unit);
  }
  for (std::int64_t k = 0; k < x.r; ++k) {
    const double s = x.sums[k];
    if (!(s <= largest)) largest = s;
    if (s != s) return s;
  }
  return largest;
}

template <typename T>
LOMACS_TARGET void copy_scaled(const T* from, T s, std::int64_t n, T* to) {
  std::int64_t i = 0;
  for (; i + lanes<T> <= n; i += lanes<T>) store(to + i, s * load(from + i));
  for (; i < n; ++i) to[i] = s * from[i];
}

// to = A B for the A whose rows are in x.square
template <typename T>
LOMACS_TARGET void times_square(const Iterates<T>& x, Panels<T> B, Panels<T> to, Ahead& ahead,
                                Part part = Part::upper) {
  const Term<T> terms[] = {{{x.square, x.r, 1}, B, x.r}};
  ToPanels<T> sink{to};
  product<false>(terms, sink, x.r, x.r, ahead, part);
  if (part == Part::upper) mirror(to, x.r);
}

// to = A B of commuting Hermitian matrices, Hermitian itself: its upper half, mirrored, and then `to` may be A; or
// all of it
template <typename T>
LOMACS_TARGET void hermitian_product(const Iterates<T>& x, Panels<T> A, Panels<T> B, Panels<T> to, Ahead& ahead,
                                     Part part = Part::upper) {
  rows_of(A, x.r, x.square);
  times_square(x, B, to, ahead, part);
}

// The Gram matrix of u, by half of it or all: halves round differently, equal columns of all have equal entries.
template <typename T>
LOMACS_TARGET void iterate_gram(const Iterates<T>& x, const T* u, Panels<T> to, Part part, Ahead& ahead) {
  if (part == Part::upper) return gram_matrix(u, x.U, x.M, x.r, to, ahead);
  const Term<T> terms[] = {{{u, 1, x.r}, x.U, x.M}};
  ToPanels<T> sink{to};
  product<true>(terms, sink, x.r, x.r, ahead);
}

// The polynomial of a step without its constant: P = c1 G, or c1 G + c2 G^2
template <typename T>
LOMACS_TARGET void bjorck_polynomial(const Bjorck<T>& job, const Iterates<T>& x, Panels<T> G, Panels<T> P,
                                     Part part, Ahead& ahead) {
  const std::int64_t r = job.r;
  const T c1 = static_cast<T>(job.c[1]);
  if (job.order == 2) {
    hermitian_product(x, G, G, P, ahead, part);
    combine(P, static_cast<T>(job.c[2]), G, c1, r, P);
  } else {
    multiple(G, c1, r, P);
  }
}

// Two steps of order 1 as one polynomial: with G = I + X and S = X^2, P = I - X/2 + S (3/8 I - 5/16 X + 1/16 S).
// The powers of X, not those of G, keep their terms from cancelling where G is near I.
template <typename T>
LOMACS_TARGET void two_steps(const Iterates<T>& x, Panels<T> G, Panels<T> P, Ahead& ahead) {
  const std::int64_t r = x.r;
  add_identity(G, T(-1), r);
  hermitian_product(x, G, G, x.S, ahead);
  combine(G, T(-0.3125), x.S, T(0.0625), r, x.X);
  add_identity(x.X, T(0.375), r);
  hermitian_product(x, x.S, x.X, P, ahead);
  combine(P, T(1), G, T(-0.5), r, P);
  add_identity(P, T(1), r);
  add_identity(G, T(1), r);
}

// The product of the polynomials of `steps` steps, from the Gram matrix in x.G, which is spent
template <typename T>
LOMACS_TARGET Panels<T> product_of_steps(const Bjorck<T>& job, const Iterates<T>& x, std::int64_t steps,
                                         Ahead& ahead) {
  const std::int64_t r = x.r;
  const Panels<T> G = x.gram(0);
  bool first = true;
  while (steps > 0) {
    const Panels<T> P = first ? x.Z : x.polynomial(0);
    const bool two = job.order == 1 && steps > 1;
    if (two) {
      two_steps(x, G, P, ahead);
    } else {
      bjorck_polynomial(job, x, G, P, Part::upper, ahead);
      add_identity(P, static_cast<T>(job.c[0]), r);
    }
    steps -= two ? 2 : 1;
    if (steps > 0) {
      // P G P
      hermitian_product(x, G, P, x.X, ahead);
      hermitian_product(x, x.X, P, G, ahead);
    }
    if (!first) hermitian_product(x, x.Z, P, x.Z, ahead);
    first = false;
  }
  return x.Z;
}

// product + sum of c_i A_i to panels
template <typename T>
struct ToSumOfPanels {
  ToPanels<T> to;
  const Panels<T>* A;
  const double* c;
  int count;

  template <int R, int V>
  LOMACS_INLINE void take(Vec<T> (&re)[R][V], Vec<T> (&im)[R][V], std::int64_t i0, std::int64_t vec) {
    for (int n = 0; n < count; ++n) {
      const Vec<T> x = splat(static_cast<T>(c[n]));
      const T* p = A[n].at(i0, vec);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) {
          re[i][j] += x * load(p + i * Panels<T>::step + j * lanes<T>);
          im[i][j] += x * load(p + i * Panels<T>::step + j * lanes<T> + Panels<T>::imag);
        }
    }
    to.template take<R, V>(re, im, i0, vec);
  }
};

// to = sum of c_k A_k, k from 1 on, and c_0 I
template <typename T>
LOMACS_TARGET void combination(const double* c, const Panels<T>* A, int count, std::int64_t n, Panels<T> to) {
  for (std::int64_t vec = 0; vec * lanes<T> < n; ++vec)
    for (std::int64_t i = 0; i < n; ++i) {
      Vec<T> re{}, im{};
      for (int k = 0; k < count; ++k) {
        const Vec<T> x = splat(static_cast<T>(c[k + 1]));
        const T* p = A[k].at(i, vec);
        re += x * load(p);
        im += x * load(p + Panels<T>::imag);
      }
      T* o = to.at(i, vec);
      store(o, re);
      store(o + Panels<T>::imag, im);
    }
  add_identity(to, static_cast<T>(c[0]), n);
}

// Traces of the powers of a Hermitian X, from the zeroth on, with X^2 and, where there is one, X^3
template <typename T>
struct Moments {
  double trace[7] = {};
  int count;

  LOMACS_TARGET Moments(Panels<T> X, Panels<T> squared, Panels<T> cubed, std::int64_t n)
      : count(cubed.data == nullptr ? 5 : 7) {
    trace[0] = static_cast<double>(n);
    for (std::int64_t k = 0; k < n; ++k) trace[1] += *X.element(k, k);
    Vec<T> total[5] = {};
    for (std::int64_t vec = 0; vec * lanes<T> < n; ++vec) {
      // above the diagonal's square every number stands for two
      const std::int64_t first = vec * lanes<T>, stop = std::min(first + lanes<T>, n);
      for (std::int64_t i = 0; i < stop; ++i) {
        const Panels<T> powers[] = {X, squared, count == 7 ? cubed : squared};
        const T weight = i < first ? 2 : 1;
        Vec<T> re[3], im[3];
        for (int k = 0; k < 3; ++k) {
          const T* p = powers[k].at(i, vec);
          re[k] = load(p);
          im[k] = load(p + Panels<T>::imag);
        }
#pragma GCC unroll 5
        for (int k = 0; k < 5; ++k) {
          const int a = k / 2, b = (k + 1) / 2;
          total[k] += weight * (re[a] * re[b] + im[a] * im[b]);
        }
      }
    }
    for (int k = 2; k < count; ++k) trace[k] = sum<T>(total[k - 2]);
  }

  // Whether all eigenvalues lie between low and high. Polynomials q of degree 3 (2 without the cube) with q(t) = 1
  // have a sum of q^2 over all eigenvalues of at least 1 / |p(t)|^2, p the orthonormal polynomials of that sum, and
  // one takes it; at an eigenvalue it is no less than 1. Left of all zeros of p, where their signs take turns, and
  // right of them it falls outwards: a t there with less than 1 has no eigenvalue beyond it.
  bool within(double low, double high) const {
    const int size = (count + 1) / 2;
    const double unit = std::max(-low, high), grain = 1e-5 * trace[0];
    double moments[7], root[4][4], over = 1, third = 1;
    // points of little weight at the unit and a third of it, of both signs, keep the measure from having too few
    for (int k = 0; k < count; ++k, over /= unit, third /= 3)
      moments[k] = trace[k] * over + (k % 2 ? 0.0 : 2 * grain * (1 + third));
    for (int i = 0; i < size; ++i)
      for (int j = 0; j <= i; ++j) {
        double x = moments[i + j];
        for (int k = 0; k < j; ++k) x -= root[i][k] * root[j][k];
        root[i][j] = i == j ? std::sqrt(x) : x / root[j][j];
      }
    for (const double end : {low, high}) {
      const double t = end / unit;
      double p[4], power = 1, square = 0;
      bool beyond = true;
      for (int i = 0; i < size; ++i, power *= t) {
        p[i] = power;
        for (int k = 0; k < i; ++k) p[i] -= root[i][k] * p[k];
        p[i] /= root[i][i];
        square += p[i] * p[i];
        beyond = beyond && (end < 0 && i % 2 ? -p[i] : p[i]) > 0;
      }
      // NaN is beyond nothing
      if (!(beyond && square > 1)) return false;
    }
    return true;
  }
};

// whether columns of any spectrum within the polynomial's range come as near orthonormal by the steps as its error,
// the scale of the start or none: then it is not needed, and without it they lie nearer
template <typename T>
bool settled(const Bjorck<T>& job, const Polynomial& fit, double scale) {
  for (const double end : {1 + fit.low, 1 + fit.high}) {
    double g = scale * scale * end, value = std::sqrt(g);
    for (std::int64_t i = 0; i < job.steps && std::abs(value - 1) > 1e-9; ++i) {
      const double q = job.c[0] + g * (job.c[1] + g * job.c[2]);
      value *= q;
      g *= q * q;
    }
    if (!(std::abs(value - 1) <= 1e-8)) return false;
  }
  return true;
}

// to = left right, Hermitian matrices that commute
template <typename T, typename Sink>
LOMACS_TARGET void hermitian_into(Panels<T> left, Panels<T> right, Sink sink, std::int64_t r, Panels<T> to,
                                  Ahead& ahead) {
  const Term<T> terms[] = {{left_of(left), right, r}};
  product<false>(terms, sink, r, r, ahead, Part::upper);
  mirror(to, r);
}

// The polynomial of all steps, and the scale, at the Gram matrix in x.G, which is spent, where its eigenvalues are
// near enough 1; else nothing, and x.G is left.
template <typename T>
LOMACS_TARGET Panels<T> all_steps_at_once(const Bjorck<T>& job, const Iterates<T>& x, T scale, Ahead& ahead) {
  if (job.together.empty()) return {};
  const std::int64_t r = x.r;
  const Panels<T> powers[] = {x.W, x.S, x.X, x.gram(0)}, X = powers[0], B = x.polynomial(0), A = x.Z;
  const Polynomial* fit = nullptr;
  int ready = 1;
  const auto raise = [&](int power) LOMACS_TARGET {
    for (; ready < power; ++ready)
      hermitian_into(X, powers[ready - 1], ToPanels<T>{powers[ready]}, r, powers[ready], ahead);
  };
  T taken = 1;
  for (const T start : {T(1), scale}) {
    if (fit != nullptr || (start == 1 && ready > 1)) break;
    bool begun = false;
    for (const Polynomial& candidate : job.together) {
      if (start != scale && !settled(job, candidate, scale)) continue;
      if (!begun) {
        multiple(x.gram(0), start * start, r, X);
        add_identity(X, T(-1), r);
        ready = 1;
        begun = true;
      }
      raise(std::min(candidate.power, 3));
      const Moments<T> moments(X, powers[1], ready > 2 ? powers[2] : Panels<T>{}, r);
      if (!moments.within(candidate.low, candidate.high)) continue;
      fit = &candidate;
      taken = start;
      break;
    }
  }
  if (fit == nullptr) return {};
  raise(fit->power);
  // A + C and A - C, then the product of these in the place of the last power
  double plus[5], twice[5];
  for (int k = 0; k < 5; ++k) plus[k] = fit->added[k] + fit->half[k], twice[k] = -2 * fit->half[k];
  combination(fit->base.data(), powers, fit->power, r, B);
  hermitian_into(B, B, ToSumOfPanels<T>{{A}, powers, plus + 1, fit->power}, r, A, ahead);
  add_identity(A, static_cast<T>(plus[0]), r);
  combination(twice, powers, fit->power, r, B);
  combine(B, T(1), A, T(1), r, B);
  const Panels<T> all = powers[3];
  hermitian_into(B, A, ToSumOfPanels<T>{{all}, powers, fit->rest.data() + 1, fit->power}, r, all, ahead);
  add_identity(all, static_cast<T>(fit->rest[0]), r);
  if (taken != 1) multiple(all, taken, r, all);
  return all;
}

// The Gram matrix of u and the sums of its magnitudes, the largest of which is `largest`; returns the scale of the
// start, of which the Gram matrix is not yet. `unit` becomes the size of the numbers of u where it was formed by pairs.
template <typename T>
LOMACS_TARGET T bjorck_start(const Bjorck<T>& job, const Iterates<T>& x, const T* u, double& largest, T& unit,
                             Part part, Ahead& ahead) {
  pack_squares(u, job.M, job.r, x.U, x.sums);
#if LOMACS_PRODUCTS == 3
  if (part == Part::upper && x.pairs.takes(job.M) && of_one_size(x.sums, job.r)) {
    ToPanels<T> sink{x.gram(0)};
    gram_by_pairs(u, x.U, job.M, job.r, x.pairs, sink, ahead);
    mirror(x.gram(0), job.r);
    double total = 0;
    for (std::int64_t k = 0; k < job.r; ++k) {
      T* g = x.gram(0).element(k, k);
      g[0] = x.sums[k];
      g[Panels<T>::imag] = 0;
      total += static_cast<double>(g[0]);
    }
    unit = static_cast<T>(std::sqrt(total / static_cast<double>(job.M * job.r)));
  } else
#endif
    iterate_gram(x, u, x.gram(0), part, ahead);
  largest = row_sums(x, x.gram(0));
  const double bound = job.bound;
  // NaN fails every comparison and passes on
  return static_cast<T>(largest < bound * bound ? 1.0 : bound / std::sqrt(largest));
}

// What a step leaves in directions of no singular value grows 1.5-fold with every later step of order 1 and
// 1.875-fold with one of order 2. Before the last so many, steps are therefore taken one at a time as
// `c0 U + U (c1 G + c2 G^2)`, G whole: rounding is less, and equal columns stay equal to the bit.
template <typename T>
std::int64_t first_that_may_be_rough(const Bjorck<T>& job) {
  return std::max<std::int64_t>(job.steps - (job.order == 1 ? 6 : 4), 0);
}

// Steps that share a Gram matrix before the next is formed from U anew: errors of its smallest eigenvalues grow
// 2.25-fold a step of order 1 and 3.5-fold one of order 2. So many keep to the error of the iteration on U itself
// at every condition; five and three do not at 1e10, nor three of order 1 beyond 64 columns. Wide factors gain
// nothing by it.
template <typename T>
std::int64_t steps_at_once(const Bjorck<T>& job) {
  if (2 * job.M < 3 * job.r) return 1;
  return job.order == 1 && job.r <= 64 ? 3 : 2;
}

template <typename T>
LOMACS_TARGET void bjorck_forward(const Bjorck<T>& job, const Iterates<T>& x, const T* u, T* out, Ahead& ahead) {
  const std::int64_t M = job.M, r = job.r, most = steps_at_once(job), fine = first_that_may_be_rough(job);
  const std::int64_t rough = job.steps - fine, groups = (rough + most - 1) / most;
  double largest = 0;
  T unit = 0, scale = bjorck_start(job, x, u, largest, unit, fine > 0 ? Part::all : Part::upper, ahead);
  if (job.steps == 0) return copy_scaled(u, scale, 2 * M * r, out);
  const Panels<T> all = all_steps_at_once(job, x, scale, ahead);
#if LOMACS_PRODUCTS == 3
  if (all.data != nullptr && unit > 0) {
    // u + u (all - I), which is small
    add_identity(all, T(-1), r);
    scale_for_pairs(all, r, unit, T(1), x.pairs.weight, x.pairs.re, x.pairs.im);
    sums_of_column_pairs(x.U, M, r, x.pairs.row_re, x.pairs.row_im);
    const Pairs<T> terms{u, {}, u + r, 2 * r, all, below(all, r / 2), r / 2};
    AddedTo<T, ToRows<T>> sink{x.U, x.pairs.weight, {out, r}};
    return product_by_pairs<false, false>(terms, x.pairs.sums(), sink, M, r, ahead);
  }
#endif
  if (all.data != nullptr) {
    const Term<T> terms[] = {{{u, r, 1}, all, r}};
    ToRows<T> sink{out, r};
    return product<false>(terms, sink, M, r, ahead);
  }
  if (scale != 1) multiple(x.gram(0), scale * scale, r, x.gram(0));
  const T* now = u;
  for (std::int64_t i = 0; i < fine; ++i) {
    if (i > 0) iterate_gram(x, now, x.gram(0), Part::all, ahead);
    const Panels<T> P = x.polynomial(0);
    bjorck_polynomial(job, x, x.gram(0), P, Part::all, ahead);
    if (i == 0) multiple(P, scale, r, P);
    const Term<T> terms[] = {{{now, r, 1}, P, r}};
    T* next = x.iterate(i);
    ToMoreRowsAndPanels<T> sink{{next, r}, {x.U}, now, scale * static_cast<T>(job.c[0])};
    product<false>(terms, sink, M, r, ahead);
    now = next;
    scale = 1;
  }
  for (std::int64_t n = 0; n < groups; ++n) {
    if (now != u) iterate_gram(x, now, x.gram(0), Part::upper, ahead);
    const std::int64_t together = (n + 1) * rough / groups - n * rough / groups;
    const Panels<T> Q = product_of_steps(job, x, together, ahead);
    // Q has its eigenvalues between 1 and c0^steps: from their middle it rounds less
    const T middle = static_cast<T>(0.5 * (1 + std::pow(job.c[0], together)));
    add_identity(Q, -middle, r);
    if (scale != 1) multiple(Q, scale, r, Q);
    T* next = n + 1 < groups ? x.iterate(fine + n) : out;
    const Term<T> terms[] = {{{now, r, 1}, Q, r}};
    ToMoreRowsAndPanels<T> sink{{next, r}, {n + 1 < groups ? x.U : Panels<T>{}}, now, scale * middle};
    product<false>(terms, sink, M, r, ahead);
    now = next;
    scale = 1;
  }
}

// Iterates, Gram matrices and polynomials of all steps into the scratch, for the backward. Returns the scale of
// the start; the sums of |U^H U| that it follows from stay in x.sums and `largest`.
template <typename T>
LOMACS_TARGET T bjorck_iterate(const Bjorck<T>& job, const Iterates<T>& x, const T* u, double& largest,
                               Ahead& ahead) {
  const std::int64_t M = job.M, r = job.r, fine = first_that_may_be_rough(job);
  // all of it: equal columns must have equal sums to share a gradient
  T unit = 0;
  const T scale = bjorck_start(job, x, u, largest, unit, Part::all, ahead);
  if (scale != 1) multiple(x.gram(0), scale * scale, r, x.gram(0));
  copy_scaled(u, scale, 2 * M * r, x.iterate(0));
  for (std::int64_t i = 0; i < job.steps; ++i) {
    const T* now = x.iterate(i);
    const Part part = i < fine ? Part::all : Part::upper;
    if (i > 0) iterate_gram(x, now, x.gram(i), part, ahead);
    bjorck_polynomial(job, x, x.gram(i), x.polynomial(i), part, ahead);
    if (i + 1 == job.steps) break;
    const Term<T> terms[] = {{{now, r, 1}, x.polynomial(i), r}};
    ToMoreRowsAndPanels<T> sink{{x.iterate(i + 1), r}, {x.U}, now, static_cast<T>(job.c[0])};
    product<false>(terms, sink, M, r, ahead);
  }
  return scale;
}

template <typename T>
LOMACS_TARGET double real_dot(const T* x, const T* y, std::int64_t n) {
  double total = 0;
  std::int64_t i = 0;
  while (i + lanes<T> <= n) {
    Vec<T> part{};
    for (int k = 0; k < 8 && i + lanes<T> <= n; ++k, i += lanes<T>) part += load(x + i) * load(y + i);
    total += sum<T>(part);
  }
  for (; i < n; ++i) total += static_cast<double>(x[i]) * static_cast<double>(y[i]);
  return total;
}

template <typename T>
LOMACS_TARGET void bjorck_gradient(const Bjorck<T>& job, const Iterates<T>& x, const T* u, const T* g, T* gU,
                                   Ahead& ahead) {
  const std::int64_t M = job.M, r = job.r, size = 2 * M * r;
  double largest = 0;
  const T scale = bjorck_iterate(job, x, u, largest, ahead);
  const bool scaled = !(largest < job.bound * job.bound);
  if (job.steps > 0) pack(g, M, r, x.U);
  const T* now = g;
  for (std::int64_t i = job.steps - 1; i >= 0; --i) {
    const T* iterate = x.iterate(i);
    const Term<T> cross[] = {{{iterate, 1, r}, x.U, M}};
    ToPanels<T> of_gram{x.X};
    product<true>(cross, of_gram, r, r, ahead);
    hermitian_sum(x.X, static_cast<T>(1), r, x.S);
    const T c1 = static_cast<T>(job.c[1]);
    if (job.order == 2) {
      // S <- c1 S + c2 (G S + S G)
      rows_of(x.gram(i), r, x.square);
      const Term<T> inner[] = {{{x.square, r, 1}, x.S, r}};
      product<false>(inner, of_gram, r, r, ahead);
      hermitian_sum(x.X, static_cast<T>(job.c[2]), r, x.Z);
      combine(x.S, c1, x.Z, static_cast<T>(1), r, x.S);
    } else {
      multiple(x.S, c1, r, x.S);
    }
    const Term<T> terms[] = {{{now, r, 1}, x.polynomial(i), r}, {{iterate, r, 1}, x.S, r}};
    T* next = i == 0 && !scaled ? gU : x.g + i % 2 * size;
    ToMoreRowsAndPanels<T> sink{{next, r}, {x.U}, now, static_cast<T>(job.c[0])};
    product<false>(terms, sink, M, r, ahead);
    now = next;
  }
  if (!scaled) {
    if (job.steps == 0) copy_scaled(g, static_cast<T>(1), size, gU);
    return;
  }

  // through the scale c / sqrt(sum): the largest sum, its ties in equal parts, then |G_ij| with subgradient 0 at 0
  double ties = 0;
  for (std::int64_t k = 0; k < r; ++k) ties += x.sums[k] == static_cast<T>(largest);
  const double slope = -0.5 * job.bound / largest * (real_dot(now, u, size) / std::sqrt(largest));
  const T share = static_cast<T>(slope / ties);
  for (std::int64_t k = 0; k < r; ++k) x.sums[k] = x.sums[k] == static_cast<T>(largest) ? share : T(0);
  for (std::int64_t vec = 0; vec * lanes<T> < r; ++vec)
    for (std::int64_t i = 0; i < r; ++i) {
      const T* p = x.gram(0).at(i, vec);
      T* s = x.S.at(i, vec);
      const Vec<T> m = magnitudes<T>(load(p), load(p + Panels<T>::imag));
      // a comparison is -1 where it holds
      const Vec<T> least = m - __builtin_convertvector(m == Vec<T>{}, Vec<T>);
      const Vec<T> weight = (load(x.sums + vec * lanes<T>) + splat(x.sums[i])) / least;
      store(s, weight * load(p));
      store(s + Panels<T>::imag, weight * load(p + Panels<T>::imag));
    }
  const Term<T> terms[] = {{{u, r, 1}, x.S, r}};
  ToSum<T> sink{gU, r, now, now, scale, T(0)};
  product<false>(terms, sink, M, r, ahead);
}

template <typename T>
LOMACS_TARGET void bjorck_samples(const Bjorck<T>& job, std::int64_t begin, std::int64_t end) {
  const std::int64_t size = 2 * job.M * job.r;
  Iterates<T> x{};
  const Arena<T> arena([&](Arena<T>& a) { x.plan(a, job); }, job.r % lanes<T> != 0);
  for (std::int64_t b = begin; b < end; ++b) {
    Ahead ahead;
    if (b + 1 < end) {
      if (job.backward) ahead.add(job.g + (b + 1) * size, sizeof(T) * static_cast<std::size_t>(size));
      ahead.add(job.U + (b + 1) * size, sizeof(T) * static_cast<std::size_t>(size));
    }
    if (job.backward) bjorck_gradient(job, x, job.U + b * size, job.g + b * size, job.out + b * size, ahead);
    else bjorck_forward(job, x, job.U + b * size, job.out + b * size, ahead);
  }
}

}  // namespace
}  // namespace LOMACS_ISA
}  // namespace lomacs
