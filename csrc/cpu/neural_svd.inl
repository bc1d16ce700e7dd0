// Steps on the nested low-rank objective, matrix by matrix: all steps of one while its factors are in the cache.
// Included inside isa.inl.
#include "gram.inl"

namespace lomacs {
namespace LOMACS_ISA {
namespace {

// What one thread keeps of a matrix: F and G as rows and panels, Z = H^H G, and squares of L columns.
template <typename T>
struct Steps {
  Panels<T> F, G, C, P, Q, S;
  T *rows[2], *g, *z, *left, *other, *lengths, *weights, *sums;

  void plan(Arena<T>& arena, const NeuralSvd<T>& job) {
    const std::int64_t M = job.M, N = job.N, L = job.L;
    F = take_panels(arena, N, L);
    G = take_panels(arena, M, L);
    C = take_squares(arena, L, L);
    P = take_squares(arena, L, L);
    Q = take_squares(arena, L, L);
    S = take_squares(arena, L, L);
    for (T*& x : rows) x = arena.take(2 * N * L);
    g = arena.take(2 * M * L);
    z = arena.take(2 * N * L);
    left = arena.take(2 * L * L);
    other = arena.take(2 * L * L);
    lengths = take_row(arena, L);
    weights = take_row(arena, L);
    sums = take_row(arena, L);
  }
};

// z - product in place of z, and the square sums of its columns
template <typename T>
struct ToOutside {
  T *z, *squares;
  std::int64_t columns;

  template <int R, int V>
  LOMACS_INLINE void take(Vec<T> (&re)[R][V], Vec<T> (&im)[R][V], std::int64_t i0, std::int64_t vec) {
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      const std::int64_t column = (vec + j) * lanes<T>;
      Vec<T> part{};
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        T* p = z + 2 * ((i0 + i) * columns + column);
        Vec<T> zr, zi;
        load_complex(p, columns - column, zr, zi);
        zr -= re[i][j], zi -= im[i][j];
        store_complex(p, columns - column, zr, zi);
        part += zr * zr + zi * zi;
      }
      store(squares + column, load(squares + column) + part);
    }
  }
};

// product + z diag(weights), to rows and panels
template <typename T>
struct ToStep {
  ToRowsAndPanels<T> to;
  const T *z, *weights;
  std::int64_t columns;

  template <int R, int V>
  LOMACS_INLINE void take(Vec<T> (&re)[R][V], Vec<T> (&im)[R][V], std::int64_t i0, std::int64_t vec) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) {
        const std::int64_t column = (vec + j) * lanes<T>;
        const Vec<T> weight = load(weights + column);
        Vec<T> zr, zi;
        load_complex(z + 2 * ((i0 + i) * columns + column), columns - column, zr, zi);
        re[i][j] += weight * zr;
        im[i][j] += weight * zi;
      }
    to.template take<R, V>(re, im, i0, vec);
  }
};

// columns of complex rows into a new order
template <typename T>
LOMACS_TARGET void reorder(T* x, std::int64_t rows, std::int64_t n, const std::int64_t* order, T* row) {
  for (std::int64_t i = 0; i < rows; ++i, x += 2 * n) {
    for (std::int64_t k = 0; k < n; ++k) {
      row[2 * k] = x[2 * order[k]];
      row[2 * k + 1] = x[2 * order[k] + 1];
    }
    std::memcpy(x, row, sizeof(T) * 2 * static_cast<std::size_t>(n));
  }
}

// F, Z and G^H G by decreasing lengths of the columns of G; equal ones stay
template <typename T>
LOMACS_TARGET void by_length(const NeuralSvd<T>& job, const Steps<T>& x, T* rows, std::int64_t* order) {
  const std::int64_t L = job.L;
  bool sorted = true;
  for (std::int64_t k = 0; k < L; ++k) {
    const T s = *x.C.element(k, k);
    std::int64_t at = k;
    // NaN fails every comparison and stays
    for (; at > 0 && x.lengths[at - 1] < s; --at) {
      x.lengths[at] = x.lengths[at - 1];
      order[at] = order[at - 1];
      sorted = false;
    }
    x.lengths[at] = s;
    order[at] = k;
  }
  if (sorted) return;
  reorder(rows, job.N, L, order, x.left);
  reorder(x.z, job.N, L, order, x.left);
  rows_of(x.C, L, x.other);
  for (std::int64_t i = 0; i < L; ++i)
    for (std::int64_t j = 0; j < L; ++j) {
      const T* from = x.other + 2 * (order[i] * L + order[j]);
      T* to = x.C.element(i, j);
      to[0] = from[0];
      to[Panels<T>::imag] = from[1];
    }
}

// P = I + X, X the rotation of all pairs, and the weights of what lies outside the span, whose square sums are
// in x.sums; returns the change of the first columns
template <typename T>
LOMACS_TARGET double turn(const NeuralSvd<T>& job, const Steps<T>& x) {
  constexpr double floor = 1e-4, largest = 1, bound = 4;
  const std::int64_t L = job.L;
  const T tiny = std::numeric_limits<T>::min();
  const T top = x.lengths[0], damping = 16 * std::numeric_limits<T>::epsilon() * top;
  double change = 0;
  for (std::int64_t k = 0; k < L; ++k) {
    const T s = x.lengths[k], outside = std::sqrt(x.sums[k]);
    T a = 1 / std::max(s + damping, tiny);
    if (k < job.watch) {
      T inside = 0;
      for (std::int64_t j = k + 1; j < L; ++j) {
        const T *c = x.C.element(j, k), size = c[0] * c[0] + c[Panels<T>::imag] * c[Panels<T>::imag];
        inside = std::max(inside, size);
      }
      const double step = std::max(outside, std::sqrt(inside)) / std::max(s + static_cast<T>(floor) * top, tiny);
      if (!(step <= change)) change = step;
    }
    const T length = outside * a;
    if (length > static_cast<T>(largest)) a = a * (static_cast<T>(largest) / length);
    x.weights[k] = a;
  }
  double square = 0, longest = 0;
  for (std::int64_t k = 0; k < L; ++k) x.other[k] = 0;
  for (std::int64_t j = 0; j < L; ++j)
    for (std::int64_t k = 0; k < j; ++k) {
      const T *c = x.C.element(j, k), re = c[0], im = c[Panels<T>::imag];
      const T gap = std::abs(x.lengths[k] - x.lengths[j]), size = 4 * (re * re + im * im);
      const T factor = 2 / std::max(gap + std::sqrt(gap * gap + size) + damping, tiny);
      const T magnitude = factor * std::sqrt(size) / 2;
      square += static_cast<double>(magnitude) * magnitude;
      x.other[j] += magnitude;
      x.other[k] += magnitude;
      T *below = x.P.element(j, k), *above = x.P.element(k, j);
      below[0] = factor * re, below[Panels<T>::imag] = factor * im;
      above[0] = -factor * re, above[Panels<T>::imag] = factor * im;
    }
  for (std::int64_t k = 0; k < L; ++k) {
    T* p = x.P.element(k, k);
    p[0] = p[Panels<T>::imag] = 0;
    longest = std::max(longest, static_cast<double>(x.other[k]));
  }
  const double size = std::min(longest, std::sqrt(2 * square));
  const Vec<T> damped = splat(static_cast<T>(size > bound ? bound / size : 1.0));
  for (std::int64_t vec = 0; vec * lanes<T> < L; ++vec) {
    for (std::int64_t i = 0; i < L; ++i) {
      T* p = x.P.at(i, vec);
      store(p, damped * load(p));
      store(p + Panels<T>::imag, damped * load(p + Panels<T>::imag));
    }
  }
  add_identity(x.P, static_cast<T>(1), L);
  return change;
}

// left right for squares of L columns, the left one as rows; both commute, so the result is Hermitian
template <typename T>
LOMACS_TARGET void square_product(const T* left, Panels<T> right, std::int64_t L, Panels<T> to, Ahead& ahead) {
  const Term<T> terms[] = {{{left, L, 1}, right, L}};
  ToPanels<T> sink{to};
  product<false>(terms, sink, L, L, ahead, Part::upper);
  mirror(to, L);
}

// Q of Björck's iteration: columns of Gram matrix x.C become orthonormal by Q; near I, so C serves as well as they
template <typename T>
LOMACS_TARGET void orthonormalizer(const NeuralSvd<T>& job, const Steps<T>& x, Ahead& ahead) {
  constexpr double c0 = 1.875, c1 = -1.25, c2 = 0.375, bound = 1.5;
  constexpr int iterations = 4;
  const std::int64_t L = job.L;
  double largest = 0;
  for (std::int64_t i = 0; i < L; ++i) {
    double sum = 0;
    for (std::int64_t j = 0; j < L; ++j) {
      const T* c = x.C.element(i, j);
      sum += std::sqrt(c[0] * c[0] + c[Panels<T>::imag] * c[Panels<T>::imag]);
    }
    if (!(sum <= largest)) largest = sum;
  }
  const T scale = static_cast<T>(largest < bound * bound ? 1.0 : bound / std::sqrt(largest));
  multiple(x.C, scale * scale, L, x.C);
  for (int i = 0; i < iterations; ++i) {
    rows_of(x.C, L, x.left);
    square_product(x.left, x.C, L, x.P, ahead);
    combine(x.P, static_cast<T>(c2), x.C, static_cast<T>(c1), L, x.P);
    add_identity(x.P, static_cast<T>(c0), L);
    if (i == 0) {
      multiple(x.P, scale, L, x.Q);
    } else {
      rows_of(x.Q, L, x.other);
      square_product(x.other, x.P, L, x.Q, ahead);
    }
    if (i + 1 == iterations) break;
    square_product(x.left, x.P, L, x.S, ahead);
    rows_of(x.S, L, x.left);
    square_product(x.left, x.P, L, x.C, ahead);
  }
}

template <typename T>
LOMACS_TARGET void neural_svd_matrices(const NeuralSvd<T>& job, std::int64_t begin, std::int64_t end) {
  const std::int64_t M = job.M, N = job.N, L = job.L;
  Steps<T> x{};
  const Arena<T> arena([&](Arena<T>& a) { x.plan(a, job); }, true);
  std::vector<std::int64_t> order(static_cast<std::size_t>(L));
  for (std::int64_t b = begin; b < end; ++b) {
    const T* H = job.H + 2 * b * M * N;
    T *rows = x.rows[0], *next = x.rows[1];
    std::memcpy(rows, job.F + 2 * b * N * L, sizeof(T) * 2 * static_cast<std::size_t>(N * L));
    pack(rows, N, L, x.F);
    double change = 0;
    Ahead ahead;
    for (std::int64_t step = 0; step < job.steps; ++step) {
      const Term<T> right[] = {{{H, N, 1}, x.F, N}};
      ToRowsAndPanels<T> to_g{{x.g, L}, {x.G}};
      product<false>(right, to_g, M, L, ahead);
      gram_matrix(x.g, x.G, M, L, x.C, ahead);
      const Term<T> adjoint_term[] = {{{H, 1, N}, x.G, M}};
      ToRows<T> to_z{x.z, L};
      product<true>(adjoint_term, to_z, N, L, ahead);
      by_length(job, x, rows, order.data());
      std::fill_n(x.sums, (L + lanes<T> - 1) / lanes<T> * lanes<T>, T(0));
      const Term<T> inside[] = {{{rows, L, 1}, x.C, L}};
      ToOutside<T> outside{x.z, x.sums, L};
      product<false>(inside, outside, N, L, ahead);
      change = turn(job, x);
      const Term<T> turned[] = {{{rows, L, 1}, x.P, L}};
      ToStep<T> to_next{{{next, L}, {x.F}}, x.z, x.weights, L};
      product<false>(turned, to_next, N, L, ahead);
      gram_matrix(next, x.F, N, L, x.C, ahead);
      orthonormalizer(job, x, ahead);
      const Term<T> last[] = {{{next, L, 1}, x.Q, L}};
      ToRowsAndPanels<T> to_f{{rows, L}, {x.F}};
      product<false>(last, to_f, N, L, ahead);
    }
    std::memcpy(job.out + 2 * b * N * L, rows, sizeof(T) * 2 * static_cast<std::size_t>(N * L));
    job.change[b] = static_cast<T>(change);
  }
}

}  // namespace
}  // namespace LOMACS_ISA
}  // namespace lomacs
