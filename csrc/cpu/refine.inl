// Refinement of an SVD, everything of a sample in one visit. Included inside isa.inl.
// Iterations stop where what they would still change is below rounding.
#include "planar.inl"

namespace lomacs {
namespace LOMACS_ISA {
namespace {

constexpr double least_energy = 1e-20;  // TINY of the reference
constexpr double largest_rotation = 1.5 * 1.5;
constexpr int polish_iterations = 3, close_iterations = 3, fill_iterations = 8;

// below it a square sum of relative corrections changes nothing
template <typename T>
constexpr double negligible = 0.5 * static_cast<double>(std::numeric_limits<T>::epsilon());

// 1 / (g + sqrt(g^2 + |z|^2)): half an angle's tangent, but for |z|
template <typename T>
LOMACS_INLINE Vec<T> half_tangent(Vec<T> g, Vec<T> re, Vec<T> im) {
  return splat(T(1)) / (g + square_root<T>(g * g + (re * re + im * im)));
}

// What one row of the rotations is made of.
template <typename T>
struct Angles {
  const T *s, *off, *index;
  T soft;

  LOMACS_INLINE Vec<T> softening(Index i, Index j) const {
    const Vec<T> both = splat(off[i]) + load(off + j) + splat(T(least_energy));
    return splat(soft) * square_root<T>(both) + splat(T(1e-12));
  }
};

// row i of X, from D and D^H
template <typename T>
LOMACS_TARGET void rotation_row(const Angles<T>& x, Planar<T> D, Planar<T> DH, Index i, Planar<T> X) {
  const Vec<T> none{}, one = splat(T(1));
  for (Index j = 0; j < D.width; j += lanes<T>) {
    const Vec<T> re = load(D.row(i) + j) + load(DH.row(i) + j), im = load(D.imag(i) + j) + load(DH.imag(i) + j);
    const Vec<T> gap = load(x.s + j) - splat(x.s[i]);
    const Vec<T> order = gap == none ? load(x.index + j) - splat(x.index[i]) : gap;
    const Vec<T> sign = order > none ? one : order < none ? -one : none;
    const Vec<T> w = sign * half_tangent<T>((gap < none ? -gap : gap) + x.softening(i, j), re, im);
    store(X.row(i) + j, re * w);
    store(X.imag(i) + j, im * w);
  }
}

// the skew part added to row i of X, and taken from that in Y
template <typename T>
LOMACS_TARGET void skew_rotation_row(const Angles<T>& x, Planar<T> D, Planar<T> DH, Index i, Planar<T> X, Planar<T> Y) {
  const Vec<T> none{}, one = splat(T(1));
  for (Index j = 0; j < D.width; j += lanes<T>) {
    const Vec<T> re = load(D.row(i) + j) - load(DH.row(i) + j), im = load(D.imag(i) + j) - load(DH.imag(i) + j);
    const Vec<T> sum = splat(x.s[i]) + load(x.s + j);
    const Vec<T> other = load(x.index + j) == splat(x.index[i]) ? none : one;
    const Vec<T> w = other * half_tangent<T>((sum > none ? sum : none) + x.softening(i, j), re, im);
    const Vec<T> hr = load(X.row(i) + j), hi = load(X.imag(i) + j);
    store(X.row(i) + j, hr + re * w);
    store(X.imag(i) + j, hi + im * w);
    store(Y.row(i) + j, hr - re * w);
    store(Y.imag(i) + j, hi - im * w);
  }
}

// out += x in
template <typename T>
LOMACS_TARGET void add_to(T* out, const T* in, Index n, T x = T(1)) {
  Index j = 0;
  for (; j + lanes<T> <= n; j += lanes<T>) store(out + j, load(out + j) + splat(x) * load(in + j));
  for (; j < n; ++j) out[j] += x * in[j];
}

// the largest of n, or NaN
template <typename T>
T largest_of(const T* x, Index n) {
  T largest = 0;
  for (Index j = 0; j < n; ++j) {
    if (!(x[j] <= largest)) largest = x[j];
    if (x[j] != x[j]) return x[j];
  }
  return largest;
}

// the largest row sum of a Hermitian matrix
template <typename T>
LOMACS_TARGET T largest_row(Planar<T> x, Index n, T* sums) {
  for (Index j = 0; j < x.width; j += lanes<T>) {
    Vec<T> total{};
    for (Index i = 0; i < n; ++i) {
      const Vec<T> re = load(x.row(i) + j), im = load(x.imag(i) + j);
      total += square_root<T>((re * re + im * im) + splat(T(least_energy)));
    }
    store(sums + j, total);
  }
  return largest_of(sums, n);
}

// its square sum
template <typename T>
LOMACS_TARGET double energy_of(Planar<T> x, Index rows, Index columns, T* sums) {
  column_energies(x, rows, sums);
  double total = 0;
  for (Index j = 0; j < columns; ++j) total += static_cast<double>(sums[j]);
  return total;
}

template <typename T>
void set_phase(T re, T im, T& c, T& s) {
  const T square = re * re + im * im;
  const bool known = !(square <= T(least_energy));
  const T inverse = known ? T(1) / std::sqrt(square) : T(0);
  c = known ? re * inverse : T(1);
  s = known ? im * inverse : T(0);
}

// Scratch of matrices of n x n.
template <typename T>
struct Squares {
  Index n, rows;
  Planar<T> G, E2, S;
  // of every iteration, or of the last one: what a gradient is made of
  std::vector<Planar<T>> E, F;
  T* sums;
  // of the last inverse root: iterations done, scale, the root of the row sums' bound, and whether that decided
  int used;
  double by, row;
  bool own, early;

  void plan(Arena<T>& a, Index size) {
    n = size, rows = whole_blocks(size);
    for (Planar<T>* x : {&G, &E2, &S}) *x = planar_square(a, n);
    sums = take_row(a, whole_vectors<T>(n));
    keep(a, 1, 2);
  }
  void keep(Arena<T>& a, std::size_t defects, std::size_t factors) {
    E.resize(defects), F.resize(factors);
    for (Planar<T>& x : E) x = planar_square(a, n);
    for (Planar<T>& x : F) x = planar_square(a, n);
  }

  Planar<T> defect(int i) const { return E[static_cast<std::size_t>(i) % E.size()]; }
  Planar<T> factor(int i) const { return F[static_cast<std::size_t>(i) % F.size()]; }
  Planar<T> defect() const { return defect(used); }
  Planar<T> factor() const { return factor(used); }

  // `_inverse_root` of G; whether X times the factor is orthonormal to rounding
  LOMACS_TARGET bool inverse_root(int iterations, double square) {
    hermitian_times(E2, G, G, n);
    row = std::sqrt(static_cast<double>(largest_row(E2, n, sums)));
    const double safe = row <= 2.56 ? 1.0 : 2.56 / row;
    own = safe < square, by = own ? safe : row != row ? row : square;
    const T c = static_cast<T>(by), half = static_cast<T>(0.5 * std::sqrt(by));
    blended(E2, n, c * c, E2, T(-2) * c, G, T(1));
    shifted(defect(0), n, -c, G, T(1));
    shifted(factor(0), n, half, defect(0), 2 * half);
    for (used = 0; used + 1 < iterations; ++used) {
      const Planar<T> before = defect(used), next = defect(used + 1), to = factor(used + 1), from = factor(used);
      early = energy_of(before, n, n, sums) < negligible<T>;
      if (early) return true;
      if (used > 0) hermitian_times(E2, before, before, n);
      shifted(S, n, T(0.25), before, T(0.75));
      hermitian_times(next, E2, S, n);
      combined<false, T>(to, rows, T(0.5), straight(from), next, n, &from, T(1), Part::upper);
      mirror(to);
    }
    early = false;
    return energy_of(defect(), n, n, sums) < negligible<T>;
  }
};

// Powers of a skew-Hermitian X of row sum `row` in its square, which is bounded by the factor `square`:
// (I + X + X^2 / 2) (I - X^4 / 8 + c X^8), where the fourth and the eighth count.
template <typename T>
struct Powers {
  Planar<T> X2, X4, first, second;  // the factors may lie on X2 and on an eighth power
  double row, square;
  bool fourth, eighth;

  double size() const { return row * square; }
  static constexpr double eighth_power = 0.185 / 16;

  // `_unitary` of x by way of X8
  LOMACS_TARGET void unitary(Planar<T> x, Planar<T> X8, Planar<T> out, Index k, T* sums) {
    const double eps = static_cast<double>(std::numeric_limits<T>::epsilon());
    hermitian_times(X2, x, x, k);
    row = static_cast<double>(largest_row(X2, k, sums));
    square = row <= largest_rotation ? 1.0 : largest_rotation / row;
    const double most = size() * size();
    fourth = !(most < eps), eighth = !(most * most < 8 * eps);
    const T c2 = static_cast<T>(square), c1 = static_cast<T>(std::sqrt(square)), e4 = static_cast<T>(square * square);
    if (!fourth) {
      blended(out, k, c1, x, T(0.5) * c2, X2, T(1));
      return;
    }
    hermitian_times(X4, X2, X2, k);
    if (eighth) {
      hermitian_times(X8, X4, X4, k);
      blended(second, k, static_cast<T>(eighth_power) * e4 * e4, X8, T(-0.125) * e4, X4, T(1));
    } else {
      shifted(second, k, T(-0.125) * e4, X4, T(1));
    }
    blended(first, k, c1, x, T(0.5) * c2, X2, T(1));
    times(out, whole_blocks(k), first, second, k);
  }
};

// the diagonal of D, and the energy beside it of its rows and columns
template <typename T>
LOMACS_TARGET void measure(Planar<T> D, Planar<T> DH, Index k, T* s, T* off, T* other) {
  column_energies(D, k, off);
  column_energies(DH, k, other);
  for (Index j = 0; j < whole_vectors<T>(k); ++j) {
    s[j] = j < k ? D.row(j)[j] : T(0);
    const T half = T(0.5) * (off[j] + other[j]) - s[j] * s[j];
    off[j] = half < 0 || j >= k ? T(0) : half;
  }
}

// row i of x times the number re_i + i im_i
template <typename T>
LOMACS_TARGET void turned_rows(Planar<T> x, Index rows, const T* re, const T* im) {
  for (Index i = 0; i < rows; ++i)
    for (Index j = 0; j < x.width; j += lanes<T>) {
      const Vec<T> c = splat(re[i]), d = splat(im[i]), a = load(x.row(i) + j), b = load(x.imag(i) + j);
      store(x.row(i) + j, c * a - d * b);
      store(x.imag(i) + j, c * b + d * a);
    }
}

// conjugate phases of the diagonal of D, into its columns and out
template <typename T>
LOMACS_TARGET void turned_to_real(Planar<T> D, Index k, T* re, T* im) {
  for (Index j = 0; j < k; ++j) {
    set_phase(D.row(j)[j], D.imag(j)[j], re[j], im[j]);
    im[j] = -im[j];
  }
  turned_columns(D, k, re, im);
}

// Factors of one side: its rows, its columns and their product with H.
template <typename T>
struct Columns {
  Index n, rows;
  Planar<T> U, W, Y;

  void plan(Arena<T>& a, Index size, Index k) {
    n = size, rows = whole_blocks(size);
    // adjoints are taken in squares of vectors
    for (Planar<T>* x : {&U, &W, &Y}) *x = planar(a, whole_vectors<T>(n), k);
  }
};

template <typename T>
struct Refinement {
  const RefineSvd<T>& job;
  Index k, krows, rest;
  Columns<T> left, right;
  Squares<T> root, outer;
  Planar<T> H, D, DH, X, Y, A, B, P, Q, P2, Q2, C, X2, X4, X8, kept;
  // of the completion and of a start: columns, basis, transform, cross
  Columns<T> more[2];
  Planar<T> basis[2], freq[2], start_basis[2], start_freq[2], cross, adjoint_span, adjoint_other;
  T *s, *off, *off2, *index, *turn_re, *turn_im, *scale, *energy;
  std::vector<double> bins;
  std::vector<Index> sorted;
  double norm;
  bool hermitian;
  bool projected = false;  // W is that of these factors already

  explicit Refinement(const RefineSvd<T>& j) : job(j), hermitian(j.hermitian) {}

  void plan(Arena<T>& a) {
    k = job.k, krows = whole_blocks(k), rest = job.r - job.k;
    left.plan(a, job.M, k);
    right.plan(a, job.N, k);
    root.plan(a, k);
    // its adjoint is taken in squares of vectors
    H = planar(a, whole_vectors<T>(job.M), job.N);
    for (Planar<T>* x : {&D, &DH, &X, &Y, &A, &B, &P, &Q, &P2, &Q2, &C, &X2, &X4, &X8, &kept}) *x = planar_square(a, k);
    for (T** x : {&s, &off, &off2, &index, &turn_re, &turn_im, &scale, &energy}) *x = take_row(a, whole_vectors<T>(k));
    const Index sizes[] = {job.M, job.N};
    if (rest > 0) outer.plan(a, rest);
    for (int side = 0; side < 2; ++side) {
      start_basis[side] = planar(a, sizes[side], k);
      start_freq[side] = planar(a, sizes[side], k);
      if (rest == 0) continue;
      more[side].plan(a, sizes[side], rest);
      basis[side] = planar(a, sizes[side], rest);
      freq[side] = planar(a, sizes[side], rest);
    }
    if (rest > 0) cross = planar(a, k, rest);
    adjoint_span = planar(a, whole_vectors<T>(k), job.M);
    adjoint_other = planar(a, whole_vectors<T>(k), job.N);
    bins.resize(static_cast<std::size_t>(std::max(job.M, job.N)));
    sorted.resize(bins.size());
  }

  void prepare() {
    for (Index j = 0; j < index_width(); ++j) index[j] = static_cast<T>(j);
  }
  Index index_width() const { return whole_vectors<T>(k); }

  // H / |H| and |H|, at any scale
  LOMACS_TARGET void load_channel(const T* h) {
    load_planar(h, job.N, job.M, job.N, H);
    to_unit_norm();
  }

  LOMACS_TARGET void to_unit_norm() {
    Vec<T> high{}, low{};
    for (Index i = 0; i < job.M; ++i)
      for (Index j = 0; j < 2 * H.width; j += lanes<T>) {
        const Vec<T> x = load(H.row(i) + j);
        high = x > high ? x : high;
        low = x < low ? x : low;
      }
    T peak = 0;
    for (int i = 0; i < lanes<T>; ++i) peak = std::max({peak, high[i], -low[i]});
    int exponent = 0;
    if (peak > 0) std::frexp(peak, &exponent);
    // the power of two at or below the peak, taken out in two halves that are numbers both
    const int down = peak > 0 ? exponent - 1 : 0, first = down / 2;
    const T a = std::ldexp(T(1), -first), b = std::ldexp(T(1), -(down - first));
    Vec<T> total{};
    for (Index i = 0; i < job.M; ++i) {
      Vec<T> part{};
      for (Index j = 0; j < 2 * H.width; j += lanes<T>) {
        const Vec<T> x = load(H.row(i) + j) * splat(a) * splat(b);
        store(H.row(i) + j, x);
        part += x * x;
      }
      total += part;
    }
    const double square = sum<T>(total);
    const double root_of = square == 0 ? 1.0 : std::sqrt(square);
    const T inverse = static_cast<T>(1 / root_of);
    for (Index i = 0; i < job.M; ++i)
      for (Index j = 0; j < 2 * H.width; j += lanes<T>) store(H.row(i) + j, load(H.row(i) + j) * splat(inverse));
    norm = square == 0 ? 0.0 : std::ldexp(root_of, down);
  }

  // P and Q of D, its diagonal in s
  LOMACS_TARGET void rotations(T soft) {
    const Planar<T> turned_over = hermitian ? D : DH;
    if (!hermitian) adjoint_of(D, k, DH);
    measure(D, turned_over, k, s, off, off2);
    const Angles<T> angles{s, off, index, soft};
    for (Index i = 0; i < k; ++i) {
      rotation_row(angles, D, turned_over, i, X);
      if (!hermitian) skew_rotation_row(angles, D, DH, i, X, Y);
    }
    unitary(X, A);
    if (!hermitian) unitary(Y, B);
  }

  LOMACS_TARGET void unitary(Planar<T> x, Planar<T> out) {
    Powers<T> powers{X2, X4, X2, X8, 0, 0, false, false};
    powers.unitary(x, X8, out, k, root.sums);
  }

  // D = (D + D^H) / 2
  LOMACS_TARGET void symmetric() {
    adjoint_of(D, k, DH);
    blended(D, k, T(0.5), D, T(0.5), DH, T(0));
  }

  // D = A^H D B
  LOMACS_TARGET void transform(Planar<T> a, Planar<T> b) {
    adjoint_times(C, krows, a, D, k);
    if (hermitian) hermitian_times(D, C, b, k);
    else times(D, krows, C, b, k);
  }

  // the closing has no use for the rotated core: phases that its diagonal would have moved into Q come out of S
  LOMACS_TARGET void diagonalize(T soft, bool closing = false) {
    if (hermitian) {
      symmetric();
      for (Index n = 0; n < job.sweeps; ++n) {
        rotations(soft);
        if (!closing || n + 1 < job.sweeps) transform(A, A);
        gather(n, P, P2, A);
      }
      return;
    }
    turned_to_real(D, k, turn_re, turn_im);
    // the first turn is the left part of Q
    for (Index j = 0; j < k; ++j) scale[j] = turn_re[j], energy[j] = turn_im[j];
    for (Index n = 0; n < job.sweeps; ++n) {
      rotations(soft);
      if (!closing || n + 1 < job.sweeps) {
        transform(A, B);
        turned_to_real(D, k, turn_re, turn_im);
        turned_columns(B, k, turn_re, turn_im);
      }
      gather(n, P, P2, A);
      if (n == 0) turned_rows(B, k, scale, energy);
      gather(n, Q, Q2, B);
    }
  }

  LOMACS_TARGET void gather(Index n, Planar<T>& all, Planar<T>& spare, Planar<T>& next) {
    if (n == 0) {
      std::swap(all, next);
      return;
    }
    times(spare, krows, all, next, k);
    std::swap(all, spare);
  }

  // X a + r made orthonormal: `_expand` with e = D or D^H
  LOMACS_TARGET void expand(Columns<T>& x, Planar<T> a, Planar<T> b, Planar<T> e, const T* row) {
    const double gain = static_cast<double>(row[2]), bound = static_cast<double>(row[3]);
    times(x.Y, x.rows, x.W, b, k);
    column_energies(x.Y, x.n, off);
    column_energies(e, k, off2);
    double total = 0;
    for (Index j = 0; j < k; ++j) {
      const T value = D.row(j)[j];
      const T inverse = (hermitian && value < 0 ? T(-1) : T(1)) / ((hermitian ? std::fabs(value) : value) + row[1]);
      const T left_over = off[j] - off2[j];
      total += static_cast<double>((left_over < 0 ? T(0) : left_over) * inverse * inverse);
      scale[j] = inverse;
    }
    total *= gain * gain;
    const double most = bound * bound, share = total <= most ? 1.0 : most / total;
    const T weight = static_cast<T>(gain * std::sqrt(share));
    for (Index j = 0; j < k; ++j) scale[j] *= weight;
    times(C, krows, a, e, k);
    scaled_columns(C, k, scale);
    blended(C, k, T(-1), C, T(1), a, T(0));
    scaled_columns(x.Y, x.n, scale);
    combined<false, T>(x.W, x.rows, T(1), straight(x.U), C, k, &x.Y, T(1));
    hermitian_adjoint_times(root.G, x.W, x.W, x.n);
    root.inverse_root(polish_iterations, 2 / (2 + total * share));
    times(x.U, x.rows, x.W, root.factor(), k);
  }

  // W = H V, Z = H^H U, D = U^H W
  LOMACS_TARGET void project() {
    Columns<T>& other = hermitian ? left : right;
    if (!projected) times(left.W, left.rows, H, other.U, job.N);
    projected = false;
    adjoint_times(D, krows, left.U, left.W, job.M);
  }

  LOMACS_TARGET void step(const T* row) {
    project();
    if (!hermitian) adjoint_times(right.W, right.rows, H, left.U, job.M);
    diagonalize(row[0]);
    if (hermitian) {
      expand(left, P, P, D, row);
      return;
    }
    expand(left, P, Q, D, row);
    adjoint_of(D, k, DH);
    expand(right, Q, P, DH, row);
  }

  // `a` such that the columns of x a are orthonormal, into `out`
  LOMACS_TARGET void orthonormalized(const Columns<T>& x, Planar<T> a, Planar<T> out) {
    hermitian_adjoint_times(root.S, x.U, x.U, x.n);
    times(C, krows, root.S, a, k);
    hermitian_adjoint_times(root.G, a, C, k);
    root.inverse_root(close_iterations, 1.0);
    times(out, krows, a, root.factor(), k);
  }

  // one iteration of Björck on x.U by way of y; the defect that it found
  LOMACS_TARGET double straighten(Squares<T>& q, Index n, Index rows, Planar<T>& x, Planar<T>& y) {
    hermitian_product<true, T, false>(q.G, turned(x), x, n);
    shifted(q.S, q.n, T(-1), q.G, T(1));
    const double found = energy_of(q.S, q.n, q.n, q.sums);
    shifted(q.S, q.n, T(-0.5), q.G, T(1.5));
    combined<false, T, false>(y, rows, T(1), straight(x), q.S, q.n);
    std::swap(x, y);
    return found;
  }

  LOMACS_TARGET void permuted(Planar<T> from, const Index* order, Planar<T> to) {
    for (Index i = 0; i < k; ++i)
      for (Index j = 0; j < k; ++j) {
        to.row(i)[j] = from.row(i)[order[j]];
        to.imag(i)[j] = from.imag(i)[order[j]];
      }
  }

  LOMACS_TARGET void rotate(Columns<T>& x, Planar<T> a) {
    times(x.Y, x.rows, x.U, a, k);
    std::swap(x.U, x.Y);
    straighten(root, x.n, x.rows, x.U, x.Y);
  }

  // `refine_close`: S, signed if Hermitian, into `values`
  LOMACS_TARGET void close(T soft, std::int64_t* order, T* values) {
    project();
    // D itself is needed after its rotations
    std::swap(D, kept);
    shifted(D, k, T(1), kept, T(0));
    diagonalize(soft, true);
    std::swap(D, kept);
    orthonormalized(left, P, A);
    if (!hermitian) orthonormalized(right, Q, B);
    const Planar<T> b = hermitian ? A : B;
    times(C, krows, D, b, k);
    for (Index j = 0; j < k; ++j) {
      T re = 0, im = 0;
      for (Index i = 0; i < k; ++i) {
        const T ar = A.row(i)[j], ai = A.imag(i)[j], cr = C.row(i)[j], ci = C.imag(i)[j];
        re += ar * cr + ai * ci;
        im += ar * ci - ai * cr;
      }
      if (hermitian) {
        s[j] = re;
      } else {
        T c, d;
        set_phase(re, im, c, d);
        turn_re[j] = c, turn_im[j] = -d;
        s[j] = std::sqrt(re * re + im * im + T(1e-36));
      }
    }
    std::vector<Index>& places = sorted;
    for (Index j = 0; j < k; ++j) places[static_cast<std::size_t>(j)] = j;
    // NaN goes first, as torch sorts it
    std::stable_sort(places.begin(), places.begin() + k, [&](Index a, Index c) {
      const T x = std::fabs(s[a]), y = std::fabs(s[c]);
      return x > y || (x != x && y == y);
    });
    if (!hermitian) turned_columns(B, k, turn_re, turn_im);
    permuted(A, places.data(), P);
    if (!hermitian) permuted(B, places.data(), Q);
    for (Index j = 0; j < k; ++j) order[j] = places[static_cast<std::size_t>(j)], values[j] = s[order[j]];
    rotate(left, P);
    if (!hermitian) rotate(right, Q);
  }

  static Index reversed(Index i, Index n) {
    Index bin = 0;
    for (Index bit = 1, from = n / 2; bit < n; bit *= 2, from /= 2)
      if (i & bit) bin |= from;
    return bin;
  }

  // f = sum_j x_j exp(-2 pi i j m / n) of a power of two of rows, in bit-reversed order; x conjugately chirped
  LOMACS_TARGET void forward_transform(Planar<T> x, Index n, const T* turns, const T* roots, Planar<T> f) {
    for (Index i = 0; i < n; ++i)
      for (Index v = 0; v < x.width; v += lanes<T>) {
        const Vec<T> a = load(x.row(i) + v), b = load(x.imag(i) + v);
        if (turns == nullptr) {
          store(f.row(i) + v, a);
          store(f.imag(i) + v, b);
        } else {
          const Vec<T> c = splat(turns[2 * i]), d = splat(turns[2 * i + 1]);
          store(f.row(i) + v, c * a + d * b);
          store(f.imag(i) + v, c * b - d * a);
        }
      }
    for (Index half = n / 2; half >= 1; half /= 2)
      for (Index begin = 0; begin < n; begin += 2 * half)
        for (Index j = 0; j < half; ++j) {
          const T* w = roots + 2 * (j * (n / (2 * half)));
          const Vec<T> c = splat(w[0]), d = splat(w[1]);
          for (Index v = 0; v < f.width; v += lanes<T>) {
            T *p = f.row(begin + j) + v, *q = f.row(begin + j + half) + v;
            const Vec<T> pr = load(p), pi = load(p + f.width), qr = load(q), qi = load(q + f.width);
            const Vec<T> re = pr - qr, im = pi - qi;
            store(p, pr + qr);
            store(p + f.width, pi + qi);
            store(q, c * re + d * im);
            store(q + f.width, c * im - d * re);
          }
        }
  }

  // energies of the columns of a chirped DFT in the span of x, added to bins
  void clear_bins() { std::fill(bins.begin(), bins.end(), 0.0); }

  LOMACS_TARGET void add_energies(Planar<T> x, Index n, Index columns, int side, int chirp, Planar<T> f) {
    const T *roots = job.roots[side], *turns = chirp == 0 ? nullptr : job.chirps[side] + 2 * n * (chirp - 1);
    if ((n & (n - 1)) != 0) {
      // no power of two: by the definition, column by column of the basis
      for (Index m = 0; m < n; ++m) {
        double found = 0;
        for (Index v = 0; v < x.width; v += lanes<T>) {
          Vec<T> re{}, im{};
          Index at = 0;
          for (Index j = 0; j < n; ++j) {
            T c = roots[2 * at], d = roots[2 * at + 1];
            if (turns != nullptr) {
              const T e = c * turns[2 * j] - d * turns[2 * j + 1];
              d = c * turns[2 * j + 1] + d * turns[2 * j];
              c = e;
            }
            const Vec<T> a = load(x.row(j) + v), b = load(x.imag(j) + v);
            re += splat(c) * a + splat(d) * b;
            im += splat(c) * b - splat(d) * a;
            at += m;
            if (at >= n) at -= n;
          }
          const Vec<T> square = re * re + im * im;
          for (Index j = 0; j < lanes<T> && v + j < columns; ++j) found += static_cast<double>(square[j]);
        }
        bins[static_cast<std::size_t>(m)] += found / static_cast<double>(n);
      }
      return;
    }
    forward_transform(x, n, turns, roots, f);
    for (Index i = 0; i < n; ++i) {
      const Index bin = reversed(i, n);
      double found = 0;
      for (Index v = 0; v < f.width; v += lanes<T>) {
        const Vec<T> a = load(f.row(i) + v), b = load(f.imag(i) + v);
        const Vec<T> square = a * a + b * b;
        if (columns - v >= lanes<T>) found += sum<T>(square);
        else
          for (Index j = 0; v + j < columns; ++j) found += static_cast<double>(square[j]);
      }
      bins[static_cast<std::size_t>(bin)] += found / static_cast<double>(n);
    }
  }

  // the columns of a chirped DFT of least energy so far
  LOMACS_TARGET void least_columns(Index n, Index columns, int side, int chirp, Planar<T> to) {
    const T *roots = job.roots[side], *turns = chirp == 0 ? nullptr : job.chirps[side] + 2 * n * (chirp - 1);
    for (Index m = 0; m < n; ++m) sorted[static_cast<std::size_t>(m)] = m;
    std::partial_sort(sorted.begin(), sorted.begin() + columns, sorted.begin() + n, [&](Index a, Index b) {
      const double x = bins[static_cast<std::size_t>(a)], y = bins[static_cast<std::size_t>(b)];
      return x < y || (!(y < x) && a < b);
    });
    const T by = static_cast<T>(1 / std::sqrt(static_cast<double>(n)));
    for (Index c = 0; c < columns; ++c) {
      const Index m = sorted[static_cast<std::size_t>(c)];
      Index at = 0;
      for (Index j = 0; j < n; ++j) {
        T re = roots[2 * at], im = roots[2 * at + 1];
        if (turns != nullptr) {
          const T e = re * turns[2 * j] - im * turns[2 * j + 1];
          im = re * turns[2 * j + 1] + im * turns[2 * j];
          re = e;
        }
        to.row(j)[c] = by * re;
        to.imag(j)[c] = by * im;
        at += m;
        if (at >= n) at -= n;
      }
    }
  }

  // the DFT columns with most energy of X (n x columns), `count` of them
  LOMACS_TARGET void strongest_columns(Planar<T> X, Index n, Index columns, int side, Planar<T> f, Index count,
                                       Planar<T> to) {
    clear_bins();
    add_energies(X, n, columns, side, 0, f);
    for (double& x : bins) x = -x;
    least_columns(n, count, side, 0, to);
  }

  // y <- y - span span^H y, by way of x.W
  LOMACS_TARGET void outside(const Columns<T>& span, Columns<T>& x, Planar<T>& y) {
    adjoint_times(cross, krows, span.U, y, x.n);
    combined<false, T>(x.W, x.rows, T(-1), straight(span.U), cross, k, &y, T(1));
    std::swap(x.W, y);
  }

  // `_filled`: x.U made orthonormal, and outside the span where there is one
  LOMACS_TARGET void fill(const Columns<T>* span, Columns<T>& x, Squares<T>& q, int side, Planar<T> free_columns,
                          Planar<T> f) {
    bool done = false, gentle = false;
    for (int turn = 0; turn < 2 && !done; ++turn) {
      hermitian_adjoint_times(q.G, x.U, x.U, x.n);
      done = q.inverse_root(fill_iterations, 1.0);
      times(x.Y, x.rows, x.U, q.factor(), q.n);
      std::swap(x.U, x.Y);
      // what a small factor adds of the span is rounding
      gentle = done && turn == 0 && largest_row(q.factor(), q.n, q.sums) <= 2;
      if (done) break;
      const Planar<T> E = q.defect();
      hermitian_times(q.E2, E, E, q.n);
      shifted(q.S, q.n, T(0.25), E, T(0.75));
      hermitian_times(q.G, q.E2, q.S, q.n);
      clear_bins();
      if (span != nullptr) add_energies(span->U, x.n, k, side, turn + 1, start_freq[side]);
      add_energies(x.U, x.n, q.n, side, turn + 1, f);
      least_columns(x.n, q.n, side, turn + 1, free_columns);
      combined<false, T>(x.Y, x.rows, T(1), straight(free_columns), q.G, q.n, &x.U, T(1));
      std::swap(x.U, x.Y);
      if (span != nullptr) outside(*span, x, x.U);
    }
    if (!done) {
      hermitian_adjoint_times(q.G, x.U, x.U, x.n);
      q.inverse_root(fill_iterations, 1.0);
      times(x.Y, x.rows, x.U, q.factor(), q.n);
      std::swap(x.U, x.Y);
    }
    if (span != nullptr && !gentle) outside(*span, x, x.U);
    if (!(straighten(q, x.n, x.rows, x.U, x.Y) < 1e-6)) straighten(q, x.n, x.rows, x.U, x.Y);
    else if (sizeof(T) > 4) straighten(q, x.n, x.rows, x.U, x.Y);
  }

  LOMACS_TARGET void start(Columns<T>& x, int side) {
    if (job.orthonormal) return;
    column_energies(x.U, x.n, scale);
    for (Index j = 0; j < k; ++j) scale[j] = T(1) / std::sqrt(scale[j] + T(least_energy));
    scaled_columns(x.U, x.n, scale);
    fill(nullptr, x, root, side, start_basis[side], start_freq[side]);
  }

  LOMACS_TARGET void complete(const Columns<T>& span, Columns<T>& x, int side) {
    clear_bins();
    add_energies(span.U, x.n, k, side, 0, start_freq[side]);
    least_columns(x.n, rest, side, 0, x.U);
    outside(span, x, x.U);
    fill(&span, x, outer, side, basis[side], freq[side]);
  }

  LOMACS_TARGET void write(const Columns<T>& x, const Columns<T>& other, T* out) {
    store_planar(x.U, x.n, k, out, job.r);
    if (rest > 0) store_planar(other.U, x.n, rest, out + 2 * k, job.r);
  }

  LOMACS_TARGET void steps(Index count) {
    for (Index n = 0; n < count; ++n) step(job.scalars + 4 * n);
  }

  // soft of the last step, or the untrained one
  T last_soft(Index count) const { return count > 0 ? job.scalars[4 * (count - 1)] : T(0.5); }

  // completion, signs into V, S in the scale of H
  LOMACS_TARGET void finish(Index b) {
    const Index M = job.M, N = job.N, r = job.r;
    T* values = job.outS + b * r;
    if (rest > 0) complete(left, more[0], 0);
    write(left, more[0], job.outU + 2 * b * M * r);
    if (hermitian) {
      for (Index j = 0; j < whole_vectors<T>(k); ++j) scale[j] = j < k && values[j] < 0 ? T(-1) : T(1);
      scaled_columns(left.U, M, scale);
      write(left, more[0], job.outV + 2 * b * N * r);
    } else {
      if (rest > 0) complete(right, more[1], 1);
      write(right, more[1], job.outV + 2 * b * N * r);
    }
    for (Index j = 0; j < k; ++j) values[j] = static_cast<T>(static_cast<double>(std::fabs(values[j])) * norm);
    for (Index j = k; j < r; ++j) values[j] = norm == norm ? T(0) : static_cast<T>(norm);
  }

  LOMACS_TARGET void sample(Index b) {
    const Index M = job.M, N = job.N, r = job.r;
    load_channel(job.H + 2 * b * M * N);
    load_planar(job.U + 2 * b * M * r, r, M, k, left.U);
    start(left, 0);
    if (!hermitian) {
      load_planar(job.V + 2 * b * N * r, r, N, k, right.U);
      start(right, 1);
    }
    steps(job.steps);
    close(last_soft(job.steps), job.order + b * k, job.outS + b * r);
    finish(b);
  }
};

template <typename T>
LOMACS_TARGET void samples(const RefineSvd<T>& job, std::int64_t begin, std::int64_t end) {
  Refinement<T> x(job);
  const Arena<T> arena([&](Arena<T>& a) { x.plan(a); }, true);
  x.prepare();
  for (std::int64_t b = begin; b < end; ++b) x.sample(b);
}

constexpr Index first_columns = 16, scouting_steps = 2;
constexpr double enough_left = 0.005, whitest = 1.5, most_isotropic = 0.4, floors_above = 4.0;

// `approx_svd` of a share of the samples, with the choices of each.
template <typename T>
class Approximation {
 public:
  explicit Approximation(const ApproxSvd<T>& job)
      : job_(job), M_(job.refine.M), N_(job.refine.N), rank_(job.refine.r),
        arena_([this](Arena<T>& a) {
          const Index m = whole_vectors<T>(M_), n = whole_vectors<T>(N_);
          plain_ = planar(a, m, N_);
          adjoint_ = planar(a, n, M_);
          freq_[0] = planar(a, m, N_);
          freq_[1] = planar(a, n, M_);
          sums_ = take_row(a, std::max(m, n));
        }, true) {}

  LOMACS_TARGET void sample(Index b) {
    const ApproxSvd<T>& job = job_;
    const double eps = static_cast<double>(std::numeric_limits<T>::epsilon());
    Index k = job.active > 0 ? job.active : std::min(first_columns, rank_), left = job.refine.steps;
    Stage* now = &stage(k, rank_);
    now->load_channel(job.refine.H + 2 * b * M_ * N_);
    std::int64_t& state = job.state[b];
    now->projected = turned_ = known_ = false;
    state = now->norm - now->norm == 0 ? 0 : -1;
    bool tied = false;
    if (state == 0 && job.form != 0) {
      tied = M_ == N_ && is_hermitian(*now, 100 * eps);
      if (!tied && job.form == 1) state = -2;
      tied = tied && semidefinite(*now, -100 * eps);
    }
    if (state != 0) return refuse(b);
    first_start(*now, now->H, tied, now->left.U, now->right.U, k);
    T* values = job.refine.outS + b * rank_;
    std::vector<std::int64_t>& order = order_;
    order.resize(static_cast<std::size_t>(rank_));
    for (;;) {
      now->hermitian = tied;
      if (job.active == 0 && k < rank_) {
        const Index scout = std::min(scouting_steps, std::max<Index>(left - 1, 0));
        now->steps(scout);
        now->close(now->last_soft(scout), order.data(), values);
        left -= scout;
        if (!enough(*now, tied)) {
          now = &grown(*now, k, tied);
          k = now->k;
          continue;
        }
      }
      now->steps(left);
      now->close(now->last_soft(left), order.data(), values);
      if (tied && job.denoise) {
        const double below = noise_floor(*now);
        // signs of eigenvalues as they are where nothing is subtracted
        if (below > 0)
          for (Index j = 0; j < k; ++j) {
            const T value = std::fabs(values[j]) - static_cast<T>(below);
            values[j] = std::copysign(value > 0 ? value : T(0), values[j]);
          }
      }
      now->finish(b);
      state = 2 * k + tied;
      return;
    }
  }

 private:
  using Stage = Refinement<T>;

  struct Kept {
    RefineSvd<T> job;
    Stage stage;
    Arena<T> arena;

    explicit Kept(const RefineSvd<T>& given)
        : job(given), stage(job), arena([this](Arena<T>& a) { stage.plan(a); }, true) {
      stage.prepare();
    }
  };

  // made when first needed
  Stage& stage(Index k, Index r) {
    for (const std::unique_ptr<Kept>& kept : stages_)
      if (kept->job.k == k && kept->job.r == r) return kept->stage;
    RefineSvd<T> job = job_.refine;
    job.k = k;
    job.r = r;
    stages_.push_back(std::make_unique<Kept>(job));
    return stages_.back()->stage;
  }

  void refuse(Index b) {
    const RefineSvd<T>& job = job_.refine;
    std::fill_n(job.outU + 2 * b * M_ * rank_, 2 * M_ * rank_, T(0));
    std::fill_n(job.outV + 2 * b * N_ * rank_, 2 * N_ * rank_, T(0));
    std::fill_n(job.outS + b * rank_, rank_, T(0));
  }

  // adjoint_ is that of H afterwards
  LOMACS_TARGET bool is_hermitian(Stage& x, double bound) {
    adjoint_of(x.H, M_, adjoint_);
    turned_ = true;
    double square = 0;
    for (Index i = 0; i < M_; ++i) {
      Vec<T> part{};
      for (Index j = 0; j < 2 * x.H.width; j += lanes<T>) {
        const Vec<T> d = load(x.H.row(i) + j) - load(adjoint_.row(i) + j);
        part += d * d;
      }
      square += sum<T>(part);
    }
    return std::sqrt(square) <= bound;
  }

  LOMACS_TARGET bool semidefinite(Stage& x, double bound) {
    const T least = static_cast<T>(bound);
    for (Index j = 0; j < N_; ++j) sums_[j] = x.H.row(j)[j];
    for (Index j = 0; j < N_; ++j)
      if (!(sums_[j] >= least)) return false;
    Vec<T> lowest{};
    for (Index i = 0; i < M_; ++i)
      for (Index j = 0; j < x.H.width; j += lanes<T>) {
        const Vec<T> re = load(x.H.row(i) + j), im = load(x.H.imag(i) + j);
        const Vec<T> minor = splat(sums_[i]) * load(sums_ + j) - re * re - im * im;
        lowest = minor < lowest ? minor : lowest;
      }
    for (int i = 0; i < lanes<T>; ++i)
      if (!(lowest[i] >= least)) return false;
    return true;
  }

  // the DFT columns with most energy of X, `columns` of them, on the left and on the right
  LOMACS_TARGET void first_start(Stage& x, Planar<T> X, bool tied, Planar<T> left, Planar<T> right, Index columns) {
    x.strongest_columns(X, M_, N_, 0, freq_[0], columns, left);
    if (tied) return;
    if (X.data != x.H.data || !turned_) adjoint_of(X, M_, adjoint_);
    turned_ = X.data == x.H.data;
    x.strongest_columns(adjoint_, N_, M_, 1, freq_[1], columns, right);
  }

  LOMACS_TARGET bool enough(Stage& x, bool tied) {
    Columns<T>& other = tied ? x.left : x.right;
    times(x.left.W, x.left.rows, x.H, other.U, N_);
    x.projected = true;
    const double whole = energy_of(x.H, M_, N_, sums_), found = energy_of(x.left.W, M_, x.k, x.off);
    if (std::max(whole - found, 0.0) <= enough_left * enough_left) return true;
    return tied && job_.denoise && noise_floor(x) > 0;
  }

  // `_floor` of H of unit norm under the orthonormal columns of x; 0 where a test fails
  LOMACS_TARGET double noise_floor(Stage& x) {
    const Index M = M_, k = x.k, rest = M - k;
    const double eps = static_cast<double>(std::numeric_limits<T>::epsilon());
    if (rest < std::max<Index>(8, M / 2)) return 0;
    if (!x.projected) times(x.left.W, x.left.rows, x.H, x.left.U, N_);
    x.projected = true;
    adjoint_times(x.D, x.krows, x.left.U, x.left.W, M);
    double highest = -1, lowest = 1;
    for (Index j = 0; j < k; ++j) {
      const double value = static_cast<double>(x.D.row(j)[j]);
      highest = std::max(highest, value), lowest = std::min(lowest, value);
    }
    if (!(lowest >= -100 * eps)) return 0;
    // E = H - T - T^H, T = Z U^H, Z = W - U D / 2
    combined<false, T>(x.left.Y, x.left.rows, T(-0.5), straight(x.left.U), x.D, k, &x.left.W, T(1));
    const double expanded = energy_of(x.H, M, N_, sums_) - 2 * energy_of(x.left.W, M, k, x.off) +
                            energy_of(x.D, k, k, x.off);
    // without forming E, where its energy is far above rounding
    if (expanded > 1e-3 && (M & (M - 1)) == 0) return floor_of_diagonals(x, expanded, highest);
    adjoint_of(x.left.U, M, x.adjoint_span);
    times(plain_, x.left.rows, x.left.Y, x.adjoint_span, k);
    adjoint_of(plain_, M, adjoint_);
    turned_ = false;
    double square = 0, trace = 0;
    for (Index i = 0; i < M; ++i) {
      Vec<T> part{};
      for (Index j = 0; j < 2 * plain_.width; j += lanes<T>) {
        const Vec<T> e = load(x.H.row(i) + j) - load(plain_.row(i) + j) - load(adjoint_.row(i) + j);
        store(plain_.row(i) + j, e);
        part += e * e;
      }
      square += sum<T>(part);
      trace += static_cast<double>(plain_.row(i)[i]);
    }
    const double below = trace / static_cast<double>(rest);
    if (!(trace > 0 && square > 1e4 * eps * eps && static_cast<double>(rest) * square <= whitest * trace * trace &&
          highest > floors_above * below))
      return 0;
    // the deviation E - f (I - U U^H): its energy, its diagonal in the antennas' and in the DFT's domain
    const double size = std::max(square - below * below * static_cast<double>(rest), 0.0);
    if (size <= 1e-3 * square) return below;
    double antennas = 0, bins = 0;
    for (Index i = 0; i < M; ++i) {
      double inside = 0;
      for (Index j = 0; j < k; ++j) {
        const double re = static_cast<double>(x.left.U.row(i)[j]), im = static_cast<double>(x.left.U.imag(i)[j]);
        inside += re * re + im * im;
      }
      const double d = static_cast<double>(plain_.row(i)[i]) + below * (inside - 1);
      antennas += d * d;
    }
    if (!(antennas <= most_isotropic * size)) return 0;
    x.clear_bins();
    x.add_energies(x.left.U, M, k, 0, 0, x.start_freq[0]);
    std::vector<double>&re = sums_of_e_[0], &im = sums_of_e_[1];
    re.assign(static_cast<std::size_t>(M), 0.0);
    im.assign(static_cast<std::size_t>(M), 0.0);
    for (Index i = 0; i < M; ++i) {
      const T *p = plain_.row(i), *q = plain_.imag(i);
      for (Index e = 0; e < M - i; ++e) re[e] += static_cast<double>(p[i + e]), im[e] += static_cast<double>(q[i + e]);
      for (Index e = M - i; e < M; ++e)
        re[e] += static_cast<double>(p[i + e - M]), im[e] += static_cast<double>(q[i + e - M]);
    }
    const T* roots = job_.refine.roots[0];
    for (Index m = 0; m < M; ++m) {
      double g = 0;
      for (Index e = 0, at = 0; e < M; ++e) {
        g += re[e] * static_cast<double>(roots[2 * at]) - im[e] * static_cast<double>(roots[2 * at + 1]);
        at += m;
        if (at >= M) at -= M;
      }
      const double d = g / static_cast<double>(M) + below * (x.bins[static_cast<std::size_t>(m)] - 1);
      bins += d * d;
    }
    return bins <= most_isotropic * size ? below : 0;
  }

  // sum of Re(a_ij conj(b_ij)) over j
  LOMACS_TARGET static double row_inner(Planar<T> a, Planar<T> b, Index i, Index columns) {
    double total = 0;
    for (Index j = 0; j < a.width; j += lanes<T>) {
      const Vec<T> x = load(a.row(i) + j) * load(b.row(i) + j) + load(a.imag(i) + j) * load(b.imag(i) + j);
      if (columns - j >= lanes<T>) total += sum<T>(x);
      else
        for (Index v = 0; j + v < columns; ++v) total += static_cast<double>(x[v]);
    }
    return total;
  }

  // (F^H H F)_mm / n for the DFT F
  LOMACS_TARGET void find_spectrum(Stage& x) {
    const Index M = M_;
    std::vector<T>&re = circular_[0], &im = circular_[1];
    re.assign(static_cast<std::size_t>(M), T(0));
    im.assign(static_cast<std::size_t>(M), T(0));
    for (Index i = 0; i < M; ++i) {
      add_to(re.data(), x.H.row(i) + i, M - i);
      add_to(im.data(), x.H.imag(i) + i, M - i);
      add_to(re.data() + M - i, x.H.row(i), i);
      add_to(im.data() + M - i, x.H.imag(i), i);
    }
    const T* roots = job_.refine.roots[0];
    if (basis_.empty()) {
      basis_.resize(static_cast<std::size_t>(2 * M * M));
      for (Index e = 0; e < M; ++e)
        for (Index m = 0; m < M; ++m) {
          basis_[static_cast<std::size_t>(2 * M * e + m)] = roots[2 * (e * m % M)];
          basis_[static_cast<std::size_t>(2 * M * e + M + m)] = roots[2 * (e * m % M) + 1];
        }
    }
    spectrum_.assign(static_cast<std::size_t>(M), T(0));
    for (Index e = 0; e < M; ++e) {
      add_to(spectrum_.data(), basis_.data() + 2 * M * e, M, re[static_cast<std::size_t>(e)]);
      add_to(spectrum_.data(), basis_.data() + 2 * M * e + M, M, -im[static_cast<std::size_t>(e)]);
    }
    known_ = true;
  }

  // the verdict from the diagonals of E in both domains; Z is x.left.Y
  LOMACS_TARGET double floor_of_diagonals(Stage& x, double square, double highest) {
    const Index M = M_, k = x.k, rest = M - k;
    double trace = 0;
    diagonal_.resize(static_cast<std::size_t>(M));
    for (Index i = 0; i < M; ++i) {
      const double d = static_cast<double>(x.H.row(i)[i]) - 2 * row_inner(x.left.Y, x.left.U, i, k);
      diagonal_[static_cast<std::size_t>(i)] = d;
      trace += d;
    }
    const double below = trace / static_cast<double>(rest);
    if (!(trace > 0 && static_cast<double>(rest) * square <= whitest * trace * trace &&
          highest > floors_above * below))
      return 0;
    const double size = square - below * below * static_cast<double>(rest);
    if (size <= 1e-3 * square) return below;
    double antennas = 0, bins = 0;
    for (Index i = 0; i < M; ++i) {
      const double inside = row_inner(x.left.U, x.left.U, i, k);
      const double d = diagonal_[static_cast<std::size_t>(i)] + below * (inside - 1);
      antennas += d * d;
    }
    if (!(antennas <= most_isotropic * size)) return 0;
    if (!known_) find_spectrum(x);
    const Planar<T> of_z = x.start_freq[0], of_u = x.start_basis[0];
    x.forward_transform(x.left.Y, M, nullptr, job_.refine.roots[0], of_z);
    x.forward_transform(x.left.U, M, nullptr, job_.refine.roots[0], of_u);
    const double by = 1 / static_cast<double>(M);
    for (Index i = 0; i < M; ++i) {
      const double of_h = static_cast<double>(spectrum_[static_cast<std::size_t>(Stage::reversed(i, M))]);
      const double d = by * (of_h - 2 * row_inner(of_z, of_u, i, k)) + below * (by * row_inner(of_u, of_u, i, k) - 1);
      bins += d * d;
    }
    return bins <= most_isotropic * size ? below : 0;
  }

  // a stage of twice as many columns, the new ones from what the old ones leave
  LOMACS_TARGET Stage& grown(Stage& x, Index k, bool tied) {
    const Index next = std::min(2 * k, rank_), extra = next - k;
    Stage& wide = stage(k, next);
    Stage& to = stage(next, rank_);
    if (&wide != &x) {
      copy(x.H, M_, N_, wide.H, 0);
      copy(x.left.U, M_, k, wide.left.U, 0);
      if (!tied) copy(x.right.U, N_, k, wide.right.U, 0);
    }
    wide.projected = x.projected = false;
    // X - U U^H X, and the same less its product with V V^H
    Stage& y = wide;
    Columns<T>& other = tied ? y.left : y.right;
    if (!turned_) adjoint_of(y.H, M_, adjoint_);
    turned_ = true;
    // (U^H X)^H = X^H U
    times(other.W, other.rows, adjoint_, y.left.U, M_);
    adjoint_of(other.W, N_, y.adjoint_other);
    combined<false, T>(plain_, y.left.rows, T(-1), straight(y.left.U), y.adjoint_other, k, &y.H, T(1));
    times(y.left.W, y.left.rows, plain_, other.U, N_);
    adjoint_of(other.U, N_, y.adjoint_other);
    combined<false, T>(freq_[0], y.left.rows, T(-1), straight(y.left.W), y.adjoint_other, k, &plain_, T(1));
    std::swap(plain_, freq_[0]);
    first_start(y, plain_, tied, y.more[0].U, y.more[1].U, extra);
    for (int side = 0; side < (tied ? 1 : 2); ++side) {
      Columns<T>& span = side == 0 ? y.left : y.right;
      y.outside(span, y.more[side], y.more[side].U);
      y.fill(&span, y.more[side], y.outer, side, y.basis[side], y.freq[side]);
      Columns<T>& out = side == 0 ? to.left : to.right;
      copy(span.U, out.n, k, out.U, 0);
      copy(y.more[side].U, out.n, extra, out.U, k);
    }
    copy(y.H, M_, N_, to.H, 0);
    to.norm = x.norm;
    to.projected = false;
    return to;
  }

  // columns of x into those of `to` from `at` on
  LOMACS_TARGET void copy(Planar<T> x, Index rows, Index columns, Planar<T> to, Index at) {
    for (Index i = 0; i < rows; ++i) {
      std::memcpy(to.row(i) + at, x.row(i), sizeof(T) * static_cast<std::size_t>(columns));
      std::memcpy(to.imag(i) + at, x.imag(i), sizeof(T) * static_cast<std::size_t>(columns));
    }
  }

  const ApproxSvd<T>& job_;
  Index M_, N_, rank_;
  Planar<T> plain_, adjoint_, freq_[2];
  T* sums_;
  bool turned_ = false;  // adjoint_ is that of H
  std::vector<std::int64_t> order_;
  std::vector<double> sums_of_e_[2], diagonal_;
  std::vector<T> circular_[2], basis_, spectrum_;
  bool known_ = false;  // spectrum_ is that of H
  std::vector<std::unique_ptr<Kept>> stages_;
  Arena<T> arena_;
};

template <typename T>
LOMACS_TARGET void samples(const ApproxSvd<T>& job, std::int64_t begin, std::int64_t end) {
  Approximation<T> x(job);
  for (std::int64_t b = begin; b < end; ++b) x.sample(b);
}

}  // namespace
}  // namespace LOMACS_ISA
}  // namespace lomacs
