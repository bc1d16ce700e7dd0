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
  const Arena<T> arena(r % lanes<T> != 0, [&](Arena<T>& a) {
    x.plan(a, std::max(job.factors[0].rows, job.factors[1].rows), r, job.backward);
  });
  for (std::int64_t n = begin; n < end; ++n) {
    const bool second = n >= job.batch;
    const FactorOf<T>& f = job.factors[second];
    const std::int64_t rows = f.rows, size = 2 * rows * r, b = second ? n - job.batch : n;
    Ahead ahead;
    if (n + 1 < end && b + 1 < job.batch) {
      if (job.backward) ahead.add(f.g + (b + 1) * size, sizeof(T) * static_cast<std::size_t>(size));
      ahead.add(f.x + (b + 1) * size, sizeof(T) * static_cast<std::size_t>(size));
    }
    x.U.rows = rows;
    const T* u = f.x + b * size;
    T* out = f.out + b * size;
    if (job.backward) {
      refine_columns(u, x, rows, r, f.step, x.Y, ahead);
      f.gsteps[b] = refine_gradient(u, f.g + b * size, x, rows, r, f.step, out, ahead);
    } else {
      refine_columns(u, x, rows, r, f.step, out, ahead);
      times_real(out, x.scale, rows, r, out);
    }
  }
}

// Scratch of Björck's iteration. With gradients every step keeps its matrices, else two take turns.
template <typename T>
struct Iterates {
  Panels<T> U, G, P, X, S, Z;
  T *rows, *g, *square, *sums;
  std::int64_t M, r, kept_rows, kept;

  void plan(Arena<T>& arena, const Bjorck<T>& job) {
    M = job.M, r = job.r;
    kept_rows = job.backward ? std::max<std::int64_t>(job.steps, 1) : 2;
    kept = job.backward ? std::max<std::int64_t>(job.steps, 1) : 1;
    U = arena.panels(M, r);
    // side by side, each in whole squares
    G = {arena.take(kept * square_size()), padded()};
    P = {arena.take(kept * square_size()), padded()};
    X = arena.squares(r, r);
    S = arena.squares(r, r);
    Z = arena.squares(r, r);
    rows = arena.take(kept_rows * 2 * M * r);
    square = arena.take(2 * r * r);
    sums = arena.row(r);
    if (job.backward) g = arena.take(2 * 2 * M * r);
  }
  std::int64_t padded() const { return (r + lanes<T> - 1) / lanes<T> * lanes<T>; }
  std::int64_t square_size() const { return Panels<T>::size(padded(), r); }
  Panels<T> gram(std::int64_t i) const { return {G.data + i % kept * square_size(), G.rows}; }
  Panels<T> polynomial(std::int64_t i) const { return {P.data + i % kept * square_size(), P.rows}; }
  T* iterate(std::int64_t i) const { return rows + i % kept_rows * 2 * M * r; }
};

#if defined(__clang__)
#define LOMACS_VECTOR_SQRT
#else
// without errno the loop becomes vectors
#define LOMACS_VECTOR_SQRT __attribute__((optimize("no-math-errno,tree-vectorize"), noinline))
#endif

template <typename T>
LOMACS_TARGET LOMACS_VECTOR_SQRT void magnitudes_of(const T* re, const T* im, int n, T* out) {
  for (int k = 0; k < n; ++k) out[k] = std::sqrt(re[k] * re[k] + im[k] * im[k]);
}

// sums of |G_ij| over i: by symmetry the row sums; the largest, or NaN
template <typename T>
LOMACS_TARGET double row_sums(const Iterates<T>& x, Panels<T> G) {
  double largest = 0;
  for (std::int64_t vec = 0; vec * lanes<T> < x.r; ++vec) {
    Vec<T> total{};
    for (std::int64_t i = 0; i < x.r; ++i) {
      const T* p = G.at(i, vec);
      T* m = x.X.at(i, vec);
      magnitudes_of(p, p + Panels<T>::imag, lanes<T>, m);
      total += load(m);
    }
    store(x.sums + vec * lanes<T>, total);
  }
  for (std::int64_t k = 0; k < x.r; ++k) {
    const double s = x.sums[k];
    if (!(s <= largest)) largest = s;
    if (s != s) return s;
  }
  return largest;
}

// P = c0 I + c1 G, or c0 I + c1 G + c2 G^2
template <typename T>
LOMACS_TARGET void bjorck_polynomial(const Bjorck<T>& job, const Iterates<T>& x, Panels<T> G, Panels<T> P,
                                     Ahead& ahead) {
  const std::int64_t r = job.r;
  const T c1 = static_cast<T>(job.c[1]);
  if (job.order == 2) {
    rows_of(G, r, x.square);
    const Term<T> terms[] = {{{x.square, r, 1}, G, r}};
    ToPanels<T> sink{P};
    product<false>(terms, sink, r, r, ahead, Part::upper);
    mirror(P, r);
    combine(P, static_cast<T>(job.c[2]), G, c1, r, P);
  } else {
    multiple(G, c1, r, P);
  }
  add_identity(P, static_cast<T>(job.c[0]), r);
}

template <typename T>
LOMACS_TARGET void copy_scaled(const T* from, T s, std::int64_t n, T* to) {
  for (std::int64_t i = 0; i < n; ++i) to[i] = s * from[i];
}

// Iterates, Gram matrices and polynomials into the scratch, the last iterate to `out` where there is one.
// Returns the scale of the start; the sums of |U^H U| that it follows from stay in x.sums and `largest`.
template <typename T>
LOMACS_TARGET T bjorck_iterate(const Bjorck<T>& job, const Iterates<T>& x, const T* u, T* out, double& largest,
                               Ahead& ahead) {
  const std::int64_t M = job.M, r = job.r;
  pack(u, M, r, x.U);
  if (job.backward) {
    // all of it: the halves round differently, and equal columns must have equal sums to share a gradient
    const Term<T> terms[] = {{{u, 1, r}, x.U, M}};
    ToPanels<T> sink{x.gram(0)};
    product<true>(terms, sink, r, r, ahead);
  } else {
    gram_matrix(u, x.U, M, r, x.gram(0), ahead);
  }
  largest = row_sums(x, x.gram(0));
  const double bound = job.bound;
  // NaN fails every comparison and passes on
  const T scale = static_cast<T>(largest < bound * bound ? 1.0 : bound / std::sqrt(largest));
  T* first = job.steps == 0 && out != nullptr ? out : x.iterate(0);
  copy_scaled(u, scale, 2 * M * r, first);
  multiple(x.gram(0), scale * scale, r, x.gram(0));
  for (std::int64_t i = 0; i < job.steps; ++i) {
    const T* now = x.iterate(i);
    if (i > 0) gram_matrix(now, x.U, M, r, x.gram(i), ahead);
    bjorck_polynomial(job, x, x.gram(i), x.polynomial(i), ahead);
    const Term<T> terms[] = {{{now, r, 1}, x.polynomial(i), r}};
    if (i + 1 < job.steps) {
      ToRowsAndPanels<T> sink{{x.iterate(i + 1), r}, {x.U}};
      product<false>(terms, sink, M, r, ahead);
    } else if (out != nullptr) {
      ToRows<T> sink{out, r};
      product<false>(terms, sink, M, r, ahead);
    }
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
  const T scale = bjorck_iterate(job, x, u, static_cast<T*>(nullptr), largest, ahead);
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
    ToRowsAndPanels<T> sink{{next, r}, {x.U}};
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
  const double slope = -0.5 * job.bound / (largest * std::sqrt(largest)) * real_dot(now, u, size);
  const T share = static_cast<T>(slope / ties);
  for (std::int64_t k = 0; k < r; ++k) x.sums[k] = x.sums[k] == static_cast<T>(largest) ? share : T(0);
  for (std::int64_t vec = 0; vec * lanes<T> < r; ++vec)
    for (std::int64_t i = 0; i < r; ++i) {
      const T* p = x.gram(0).at(i, vec);
      T* s = x.S.at(i, vec);
      magnitudes_of(p, p + Panels<T>::imag, lanes<T>, s);
      const Vec<T> m = load(s);
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
  const Arena<T> arena(job.r % lanes<T> != 0, [&](Arena<T>& a) { x.plan(a, job); });
  for (std::int64_t b = begin; b < end; ++b) {
    Ahead ahead;
    if (b + 1 < end) {
      if (job.backward) ahead.add(job.g + (b + 1) * size, sizeof(T) * static_cast<std::size_t>(size));
      ahead.add(job.U + (b + 1) * size, sizeof(T) * static_cast<std::size_t>(size));
    }
    double largest = 0;
    if (job.backward) bjorck_gradient(job, x, job.U + b * size, job.g + b * size, job.out + b * size, ahead);
    else bjorck_iterate(job, x, job.U + b * size, job.out + b * size, largest, ahead);
  }
}

}  // namespace
}  // namespace LOMACS_ISA
}  // namespace lomacs
