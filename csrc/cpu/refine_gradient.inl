// Gradients of the refinement of an SVD. Included inside isa.inl.
// A sample's steps are made anew, each with a record of what its adjoint needs, and walked back from the last one. Their
// values are bit for bit those of the forward, by its own functions: what is handed in belongs to these, and where many
// rotations of nearly equal values would come out otherwise by rounding alone, the gradient would be that of neither.
// Iterations that the forward cut short, as they would not change its values, still count where they change gradients.
// The gradient g of a complex X is such that the loss changes by the sum of Re(conj(g) dX). Where X is Hermitian or
// skew-Hermitian whatever the input, so is what counts of its gradient: the other half is dropped, which makes one
// product of two and halves others.
#include "refine.inl"

namespace lomacs {
namespace LOMACS_ISA {
namespace {

// c = x a [+ y b]
template <typename T>
LOMACS_TARGET void mixed(Planar<T> c, Index rows, T x, Planar<T> a, T y = 0, const Planar<T>* b = nullptr) {
  for (Index i = 0; i < rows; ++i)
    for (Index j = 0; j < 2 * c.width; j += lanes<T>) {
      const Vec<T> first = splat(x) * load(a.row(i) + j);
      store(c.row(i) + j, b == nullptr ? first : first + splat(y) * load(b->row(i) + j));
    }
}

// c = a diag(s) [+ b]
template <typename T>
LOMACS_TARGET void columns_by(Planar<T> c, Index rows, Planar<T> a, const T* s, const Planar<T>* b = nullptr) {
  for (Index i = 0; i < rows; ++i)
    for (Index j = 0; j < c.width; j += lanes<T>) {
      const Vec<T> w = load(s + j), re = w * load(a.row(i) + j), im = w * load(a.imag(i) + j);
      store(c.row(i) + j, b == nullptr ? re : re + load(b->row(i) + j));
      store(c.imag(i) + j, b == nullptr ? im : im + load(b->imag(i) + j));
    }
}

// sums of Re(conj(a) b), or of Im (CROSS), over every column, in short chains
template <bool CROSS, typename T>
LOMACS_TARGET void column_inners(Planar<T> a, Planar<T> b, Index rows, T* out) {
  for (Index j = 0; j < a.width; j += lanes<T>) {
    Vec<T> total{};
    for (Index i = 0; i < rows;) {
      Vec<T> part{};
      for (const Index stop = std::min<Index>(i + 8, rows); i < stop; ++i) {
        const Vec<T> ar = load(a.row(i) + j), ai = load(a.imag(i) + j), br = load(b.row(i) + j), bi = load(b.imag(i) + j);
        if constexpr (CROSS) part += ar * bi - ai * br;
        else part += ar * br + ai * bi;
      }
      total += part;
    }
    store(out + j, total);
  }
}

// c = a diag(s) / |a| for a s that is 0 but at the largest of the column sums of |a|
template <typename T>
LOMACS_TARGET void magnitude_gradient(Planar<T> c, Index n, Planar<T> a, const T* s) {
  for (Index i = 0; i < n; ++i)
    for (Index j = 0; j < a.width; j += lanes<T>) {
      const Vec<T> re = load(a.row(i) + j), im = load(a.imag(i) + j);
      const Vec<T> w = load(s + j) / square_root<T>(re * re + im * im + splat(T(least_energy)));
      store(c.row(i) + j, w * re);
      store(c.imag(i) + j, w * im);
    }
}

// What the pairs of columns add up to.
template <typename T>
struct AngleGradient {
  T *s, *off;
  double soft;
};

// Row i of the adjoint of `rotation_row` (SKEW: of the part that `skew_rotation_row` adds). With z = D_ij + conj(D_ji)
// (SKEW: -), q = sqrt(g^2 + |z|^2) and X_ij = sign z t, t = 1 / (g + q):
//   a = -sign t^2 Re(conj(gX) z),  gz = sign t gX + a z / q,  gg = a (1 + g / q).
// gX is skew-Hermitian, so that gz is Hermitian (SKEW: skew) and both of a pair give the same: twice that of one.
template <bool SKEW, typename T>
LOMACS_TARGET void rotation_gradient_row(const Angles<T>& x, Planar<T> D, Planar<T> DH, Planar<T> gX, Index i, Index k,
                                         Planar<T> gD, AngleGradient<T>& found) {
  const Vec<T> none{}, one = splat(T(1)), two = splat(T(2)), flip = SKEW ? -one : one;
  Vec<T> soft{};
  for (Index j = 0; j < D.width; j += lanes<T>) {
    const Vec<T> re = load(D.row(i) + j) + flip * load(DH.row(i) + j);
    const Vec<T> im = load(D.imag(i) + j) + flip * load(DH.imag(i) + j);
    const Vec<T> at = load(x.index + j) - splat(x.index[i]);
    const Vec<T> gap = SKEW ? splat(x.s[i]) + load(x.s + j) : load(x.s + j) - splat(x.s[i]);
    const Vec<T> order = gap == none ? at : gap;
    Vec<T> sign = SKEW ? (at == none ? none : one) : order > none ? one : order < none ? -one : none;
    // columns that are none
    sign = load(x.index + j) < splat(static_cast<T>(k)) ? sign : none;
    const Vec<T> root = square_root<T>(splat(x.off[i]) + load(x.off + j) + splat(T(least_energy)));
    const Vec<T> size = SKEW ? (gap > none ? gap : none) : gap < none ? -gap : gap;
    const Vec<T> g = size + splat(x.soft) * root + splat(T(1e-12)), q = square_root<T>(g * g + (re * re + im * im));
    const Vec<T> t = sign / (g + q), gr = load(gX.row(i) + j), gi = load(gX.imag(i) + j);
    const Vec<T> a = -t * (t * sign) * (gr * re + gi * im), along = a / q;
    store(gD.row(i) + j, load(gD.row(i) + j) + two * (t * gr + along * re));
    store(gD.imag(i) + j, load(gD.imag(i) + j) + two * (t * gi + along * im));
    const Vec<T> of_g = sign == none ? none : a * (one + g / q);
    // a gap of zero is a corner, a negative sum is cut off
    const Vec<T> of_s = SKEW ? (gap < none ? none : of_g) : gap > none ? of_g : gap < none ? -of_g : none;
    store(found.s + j, load(found.s + j) + two * of_s);
    store(found.off + j, load(found.off + j) + splat(x.soft) * of_g / root);
    soft += of_g * root;
  }
  found.soft += sum<T>(soft);
}

// Scratch of k x k matrices that a step's adjoint is made by way of.
template <typename T>
struct Room {
  Index n, rows;
  Planar<T> a, b, c, d, over, gF, gG;
  T *sums, *share;

  void plan(Arena<T>& arena, Index size) {
    n = size, rows = whole_blocks(size);
    for (Planar<T>* x : {&a, &b, &c, &d, &over, &gF, &gG}) *x = planar_square(arena, n);
    for (T** x : {&sums, &share}) *x = take_row(arena, whole_vectors<T>(n));
  }

  // x (K + sign K^H) [+ y other]
  LOMACS_TARGET void paired(Planar<T> to, T x, Planar<T> K, T sign, T y = 0, const Planar<T>* other = nullptr) {
    adjoint_of(K, n, over);
    for (Index i = 0; i < n; ++i)
      for (Index j = 0; j < 2 * to.width; j += lanes<T>) {
        const Vec<T> both = splat(x) * (load(K.row(i) + j) + splat(sign) * load(over.row(i) + j));
        store(to.row(i) + j, other == nullptr ? both : both + splat(y) * load(other->row(i) + j));
      }
  }

  // sum of Re(conj(x) y)
  LOMACS_TARGET double inner(Planar<T> x, Planar<T> y) {
    column_inners<false>(x, y, n, sums);
    double total = 0;
    for (Index j = 0; j < n; ++j) total += static_cast<double>(sums[j]);
    return total;
  }

  // gradient of a Hermitian X from that of its largest row sum, into c
  LOMACS_TARGET void largest_row_gradient(Planar<T> X, double g) {
    const T largest = largest_row(X, n, sums);
    Index ties = 0;
    for (Index j = 0; j < n; ++j) ties += sums[j] == largest;
    for (Index j = 0; j < whole_vectors<T>(n); ++j)
      share[j] = j < n && sums[j] == largest ? static_cast<T>(g / static_cast<double>(ties)) : T(0);
    magnitude_gradient(d, n, X, share);
    paired(c, T(0.5), d, T(1));
  }

  // gX of E = X^2 (3 + X) / 4 in place of gE: with K = gE X and S = (3 + X) / 4, K S + (K S)^H + X K / 4
  LOMACS_TARGET void cubic_gradient(Planar<T> X, Planar<T> g) {
    times(a, rows, g, X, n);
    shifted(b, n, T(0.25), X, T(0.75));
    times(c, rows, a, b, n);
    paired(g, T(1), c, T(1));
    combined<false, T>(g, rows, T(0.25), straight(X), a, n, &g, T(1), Part::upper);
    mirror(g);
  }
};

// `_inverse_root` with what its adjoint needs: the defects E_i and the factors F_i = F_{i-1} (I + E_i / 2).
template <typename T>
struct Root : Squares<T> {
  using Squares<T>::G;
  using Squares<T>::n;
  using Squares<T>::rows;
  using Squares<T>::used;
  using Squares<T>::by;
  using Squares<T>::row;
  Room<T>* room;
  int iterations;
  double given;

  void plan(Arena<T>& a, Room<T>& r, int count) {
    room = &r, iterations = count, n = r.n, rows = r.rows;
    G = planar_square(a, n);
    this->E2 = r.a, this->S = r.b, this->sums = r.sums;
    this->keep(a, static_cast<std::size_t>(count), static_cast<std::size_t>(count));
  }

  LOMACS_TARGET bool record(double square) {
    given = square;
    return this->inverse_root(iterations, square);
  }

  // gE_{i+1} from gF_{i+1}
  LOMACS_TARGET void next_defect_gradient(int i, Planar<T> gF, Planar<T> gE, bool& begun) {
    times(room->a, rows, gF, this->factor(i), n);
    room->paired(gE, T(0.25), room->a, T(1), T(1), begun ? &gE : nullptr);
    begun = true;
  }

  // from those of F, and of E where it is given, that of G into room.gG; returns that of the given square. F_i and E_i
  // commute and are Hermitian, so gF_{i-1} = gF_i + (gF_i E_i + E_i gF_i) / 4 and gE_i += (gF_i F_{i-1} + ...) / 4.
  LOMACS_TARGET double back(Planar<T> gF, const Planar<T>* of_defect = nullptr) {
    Room<T>& r = *room;
    const Planar<T> gE = of_defect == nullptr ? r.gG : *of_defect;
    bool begun = of_defect != nullptr;
    if (this->early) {
      // E_{used+1} is below rounding, its gradient is not
      next_defect_gradient(used, gF, gE, begun);
      r.cubic_gradient(this->defect(), gE);
    }
    for (int i = used; i > 0; --i) {
      next_defect_gradient(i - 1, gF, gE, begun);
      times(r.a, rows, gF, this->defect(i), n);
      r.paired(gF, T(0.25), r.a, T(1), T(1), &gF);
      r.cubic_gradient(this->defect(i - 1), gE);
    }
    mixed(gE, n, static_cast<T>(0.5 * std::sqrt(by)), gF, T(1), begun ? &gE : nullptr);
    const double of_by = 0.5 * r.inner(this->factor(0), gF) / by - r.inner(G, gE);
    mixed(r.gG, n, static_cast<T>(-by), gE);
    if (this->own) {
      hermitian_times(r.a, G, G, n);
      r.largest_row_gradient(r.a, -0.5 * of_by * by / (row * row));
      times(r.a, rows, r.c, G, n);
      r.paired(r.gG, T(1), r.a, T(1), T(1), &r.gG);
      return 0;
    }
    // the smaller of two equal ones is both
    return given == (row <= 2.56 ? 1.0 : 2.56 / row) ? 0.5 * of_by : of_by;
  }
};

// `_unitary` of a skew-Hermitian X: A = (I + c X + c^2 X^2 / 2) (I - c^4 X^4 / 8 + ...), c^2 being `square`.
template <typename T>
struct Unitary {
  Planar<T> X, A;
  Powers<T> powers;

  void plan(Arena<T>& a, Index n) {
    for (Planar<T>* x : {&X, &A, &powers.X2, &powers.X4, &powers.first, &powers.second}) *x = planar_square(a, n);
  }

  LOMACS_TARGET void record(Room<T>& r) { powers.unitary(X, r.a, A, r.n, r.sums); }

  // gX from gA. For a Hermitian Y and Y^2: gY = K + K^H with K = gY^2 Y; for a skew X: gX = -(K - K^H), K = gX^2 X.
  LOMACS_TARGET void back(Room<T>& r, Planar<T> gA, Planar<T> gX) {
    const Index n = r.n;
    const Powers<T>& p = powers;
    const double eps = static_cast<double>(std::numeric_limits<T>::epsilon()), size = p.size(), square = p.square;
    const T c1 = static_cast<T>(std::sqrt(square)), c2 = static_cast<T>(square), e4 = static_cast<T>(square * square);
    if (p.fourth) times(r.d, r.rows, gA, p.second, n);
    else mixed(r.d, n, T(1), gA);
    // the gradients of X^4 / 8 and of X^8 must be below rounding to be left out
    const bool fourth = !(size * std::sqrt(size) < eps);
    if (fourth) {
      if (p.fourth) adjoint_times(r.b, r.rows, p.first, gA, n);
      else adjoint_times(r.b, r.rows, A, gA, n);
      r.paired(r.c, T(0.5), r.b, T(1));
      if (p.fourth && !(size * size * size < eps)) {
        times(r.b, r.rows, r.c, p.X4, n);
        r.paired(r.c, static_cast<T>(Powers<T>::eighth_power) * e4 * e4, r.b, T(1), T(-0.125) * e4, &r.c);
      } else {
        mixed(r.c, n, T(-0.125) * e4, r.c);
      }
      times(r.b, r.rows, r.c, p.X2, n);
      r.paired(r.c, T(1), r.b, T(1));
    }
    r.paired(r.c, T(0.25) * c2, r.d, T(1), T(1), fourth ? &r.c : nullptr);
    times(r.b, r.rows, r.c, X, n);
    mixed(r.b, n, T(-1), r.b, T(0.5) * c1, &r.d);
    r.paired(gX, T(1), r.b, T(-1));
    if (square == 1) return;
    const double of_square = 0.5 * r.inner(X, gX) / square;
    r.largest_row_gradient(p.X2, -of_square * square / p.row);
    times(r.a, r.rows, r.c, X, n);
    r.paired(gX, T(-1), r.a, T(-1), T(1), &gX);
  }
};

// One of the sweeps of `_diagonalize`: rotations of D, and what they have come to.
template <typename T>
struct Sweep {
  Planar<T> D, DH, C, P, Q, B;
  Unitary<T> left, right;
  T *s, *off, *re, *im;  // diagonal, energy beside it, phases taken out

  void plan(Arena<T>& a, Index k, bool tied) {
    for (Planar<T>* x : {&D, &C, &P}) *x = planar_square(a, k);
    left.plan(a, k);
    for (T** x : {&s, &off, &re, &im}) *x = take_row(a, whole_vectors<T>(k));
    DH = D;
    if (tied) return;
    for (Planar<T>* x : {&DH, &Q, &B}) *x = planar_square(a, k);
    right.plan(a, k);
  }
};

// `_diagonalize`: P^H D Q = last.
template <typename T>
struct Diagonal {
  std::vector<Sweep<T>> sweeps;
  Planar<T> last;
  T *re, *im;  // the first phases
  const T* index;
  Index k;
  bool tied, closing;  // a closing has no use for the rotated core
  T soft;

  void plan(Arena<T>& a, const RefineSvd<T>& job) {
    k = job.k, tied = job.hermitian;
    sweeps.resize(static_cast<std::size_t>(job.sweeps));
    for (Sweep<T>& x : sweeps) x.plan(a, k, tied);
    last = planar_square(a, k);
    for (T** x : {&re, &im}) *x = take_row(a, whole_vectors<T>(k));
  }

  Planar<T> core() const { return sweeps.front().D; }  // what is to be diagonalised
  Planar<T> P() const { return sweeps.back().P; }
  Planar<T> Q() const { return tied ? P() : sweeps.back().Q; }

  LOMACS_TARGET void find_angles(Sweep<T>& x, T* other) {
    if (!tied) adjoint_of(x.D, k, x.DH);
    measure(x.D, x.DH, k, x.s, x.off, other);
    const Angles<T> angles{x.s, x.off, index, soft};
    for (Index i = 0; i < k; ++i) {
      rotation_row(angles, x.D, x.DH, i, x.left.X);
      if (!tied) skew_rotation_row(angles, x.D, x.DH, i, x.left.X, x.right.X);
    }
  }

  LOMACS_TARGET void record(Room<T>& r, T softening, bool close) {
    soft = softening, closing = close;
    if (tied) r.paired(core(), T(0.5), core(), T(1));
    else turned_to_real(core(), k, re, im);
    for (std::size_t n = 0; n < sweeps.size(); ++n) {
      Sweep<T>& x = sweeps[n];
      const bool end = n + 1 == sweeps.size();
      const Planar<T> next = end ? last : sweeps[n + 1].D;
      find_angles(x, r.sums);
      x.left.record(r);
      const Planar<T> A = x.left.A;
      if (!tied) x.right.record(r);
      if (!end || !closing) {
        adjoint_times(x.C, r.rows, A, x.D, k);
        if (tied) hermitian_times(next, x.C, A, k);
        else times(next, r.rows, x.C, x.right.A, k);
      }
      if (n == 0) mixed(x.P, k, T(1), A);
      else times(x.P, r.rows, sweeps[n - 1].P, A, k);
      if (tied) continue;
      mixed(x.B, k, T(1), x.right.A);
      if (!end || !closing) {
        turned_to_real(next, k, x.re, x.im);
        turned_columns(x.B, k, x.re, x.im);
      }
      if (n > 0) {
        times(x.Q, r.rows, sweeps[n - 1].Q, x.B, k);
        continue;
      }
      mixed(x.Q, k, T(1), x.B);
      turned_rows(x.Q, k, re, im);
    }
  }

  // Adjoint of X = Y diag(conj(z) / |z|), z being the diagonal of Y: what `crosses`, the sums of Im(conj(X) gX) over all
  // that was turned, give along the diagonal of gX, before it is turned back.
  LOMACS_TARGET void turn_back(Planar<T> D, Planar<T> gD, const T* crosses, const T* c, T* d) {
    for (Index j = 0; j < k; ++j) {
      const T size = D.row(j)[j];
      if (size * size > T(least_energy)) gD.imag(j)[j] -= crosses[j] / size;
      d[j] = -d[j];
    }
    turned_columns(gD, k, c, d);
  }

  // gradients of last (where it was made), P and Q to that of the core, into gD; the first three are used up; g holds
  // matrices for the work; returns that of the softening
  LOMACS_TARGET double back(Room<T>& r, Planar<T> gD, Planar<T> gP, Planar<T> gQ, Planar<T> (&g)[4], T* crosses, T* more) {
    double of_soft = 0;
    for (std::size_t n = sweeps.size(); n-- > 0;) {
      Sweep<T>& x = sweeps[n];
      const bool cored = n + 1 < sweeps.size() || !closing;
      const Planar<T> A = x.left.A, next = n + 1 == sweeps.size() ? last : sweeps[n + 1].D;
      Planar<T> gA = g[0], gB = g[1];
      if (n > 0) {
        adjoint_times(gA, r.rows, sweeps[n - 1].P, gP, k);
        adjoint_of(A, k, r.over);
        times(r.a, r.rows, gP, r.over, k);
        mixed(gP, k, T(1), r.a);
      } else {
        mixed(gA, k, T(1), gP);
      }
      if (tied) {
        if (cored) {
          // of A^H D A, Hermitian: 2 D A g and A g A^H
          combined<true, T>(gA, r.rows, T(2), turned(x.C), gD, k, &gA, T(1));
          times(r.a, r.rows, A, gD, k);
          adjoint_of(A, k, r.over);
          hermitian_times(gD, r.a, r.over, k);
        }
        x.left.back(r, gA, g[2]);
        of_soft += angles_back(x, cored, g[2], g[2], gD, crosses, more);
        continue;
      }
      if (n > 0) {
        adjoint_times(gB, r.rows, sweeps[n - 1].Q, gQ, k);
        adjoint_of(x.B, k, r.over);
        times(r.a, r.rows, gQ, r.over, k);
        mixed(gQ, k, T(1), r.a);
      } else {
        mixed(gB, k, T(1), gQ);
        for (Index j = 0; j < k; ++j) more[j] = -im[j];
        turned_rows(gB, k, re, more);
      }
      if (cored) {
        column_inners<true>(next, gD, k, crosses);
        column_inners<true>(x.B, gB, k, more);
        for (Index j = 0; j < k; ++j) crosses[j] += more[j];
        turn_back(next, gD, crosses, x.re, x.im);
        turned_columns(gB, k, x.re, x.im);
        // of C B and A^H D
        combined<true, T>(gB, r.rows, T(1), turned(x.C), gD, k, &gB, T(1));
        adjoint_of(gD, k, r.over);
        times(r.a, r.rows, x.right.A, r.over, k);
        combined<false, T>(gA, r.rows, T(1), straight(x.D), r.a, k, &gA, T(1));
        adjoint_of(r.a, k, r.over);
        times(gD, r.rows, A, r.over, k);
      }
      x.left.back(r, gA, g[2]);
      x.right.back(r, gB, g[3]);
      of_soft += angles_back(x, cored, g[2], g[3], gD, crosses, more);
    }
    if (tied) return of_soft;
    // the first phases are in D by columns and in Q by rows; rows of gQ, as columns of its adjoint
    Sweep<T>& x = sweeps.front();
    adjoint_of(x.Q, k, r.a);
    adjoint_of(gQ, k, r.b);
    column_inners<true>(r.a, r.b, k, more);
    column_inners<true>(x.D, gD, k, crosses);
    for (Index j = 0; j < k; ++j) crosses[j] -= more[j];
    turn_back(x.D, gD, crosses, re, im);
    return of_soft;
  }

  // adds to gD, or begins it
  LOMACS_TARGET double angles_back(Sweep<T>& x, bool begun, Planar<T> gP, Planar<T> gQ, Planar<T> gD, T* of_s, T* of_off) {
    const Index width = whole_vectors<T>(k);
    std::fill_n(of_s, width, T(0));
    std::fill_n(of_off, width, T(0));
    if (!begun)
      for (Index i = 0; i < k; ++i) std::fill_n(gD.row(i), 2 * gD.width, T(0));
    const Angles<T> angles{x.s, x.off, index, soft};
    AngleGradient<T> found{of_s, of_off, 0};
    if (!tied) {
      // X + Y and X - Y
      mixed(gP, k, T(1), gP, T(1), &gQ);
      mixed(gQ, k, T(-2), gQ, T(1), &gP);
    }
    for (Index i = 0; i < k; ++i) {
      rotation_gradient_row<false>(angles, x.D, x.DH, gP, i, k, gD, found);
      if (!tied) rotation_gradient_row<true>(angles, x.D, x.DH, gQ, i, k, gD, found);
    }
    // off_i = (|D_i.|^2 + |D_.i|^2) / 2 - s_i^2, which does not depend on s_i; nothing where it was cut off
    for (Index j = 0; j < k; ++j)
      if (x.off[j] == 0) of_off[j] = 0;
    for (Index i = 0; i < k; ++i) {
      const T before = gD.row(i)[i];
      for (Index j = 0; j < gD.width; j += lanes<T>) {
        const Vec<T> w = splat(of_off[i]) + load(of_off + j);
        store(gD.row(i) + j, load(gD.row(i) + j) + w * load(x.D.row(i) + j));
        store(gD.imag(i) + j, load(gD.imag(i) + j) + w * load(x.D.imag(i) + j));
      }
      gD.row(i)[i] = before + of_s[i];
    }
    return found.soft;
  }
};

// A step's scalars, and the gradients of them.
struct StepScalars {
  double soft, mu, gain, bound;
};

// `_expand`: out = Z F(Z^H Z), Z = X (A - A E diag(w)) + Y diag(w), Y = W B.
template <typename T>
struct Expansion {
  Planar<T> Y, Z, AE, C;
  Root<T> root;
  T *inverse, *weight, *left;
  double one, total, share, middle;
  Index n, rows;

  void plan(Arena<T>& a, Room<T>& r, Index size, Index k) {
    n = size, rows = whole_blocks(size);
    for (Planar<T>* x : {&Y, &Z}) *x = planar(a, whole_vectors<T>(n), k);
    for (Planar<T>* x : {&AE, &C}) *x = planar_square(a, k);
    root.plan(a, r, polish_iterations);
    for (T** x : {&inverse, &weight, &left}) *x = take_row(a, whole_vectors<T>(k));
  }

  // `other` is scratch like Y
  LOMACS_TARGET void record(Room<T>& r, Planar<T> X, Planar<T> W, Planar<T> A, Planar<T> B, Planar<T> E, Planar<T> D,
                            const StepScalars& x, bool tied, Planar<T> other, Planar<T> out) {
    const Index k = r.n;
    const T mu = static_cast<T>(x.mu);
    times(Y, rows, W, B, k);
    column_energies(Y, n, left);
    column_energies(E, k, weight);
    one = 0;
    for (Index j = 0; j < k; ++j) {
      const T s = D.row(j)[j];
      inverse[j] = (tied && s < 0 ? T(-1) : T(1)) / ((tied ? std::fabs(s) : s) + mu);
      left[j] -= weight[j];
      one += static_cast<double>((left[j] < 0 ? T(0) : left[j]) * inverse[j] * inverse[j]);
    }
    total = one * (x.gain * x.gain);
    const double most = x.bound * x.bound;
    share = total <= most ? 1.0 : most / total;
    middle = 2 / (2 + total * share);
    const T by = static_cast<T>(x.gain * std::sqrt(share));
    for (Index j = 0; j < k; ++j) weight[j] = inverse[j] * by;
    times(AE, r.rows, A, E, k);
    columns_by(r.a, k, AE, weight);
    blended(C, k, T(-1), r.a, T(1), A, T(0));
    columns_by(other, n, Y, weight);
    combined<false, T>(Z, rows, T(1), straight(X), C, k, &other, T(1));
    hermitian_adjoint_times(root.G, Z, Z, n);
    root.record(middle);
    times(out, rows, Z, root.factor(), k);
  }

  // From g, that of `out`: gX in its place, gW, gA, gB and gE; those of the diagonal of D and of the scalars are added.
  // With gZ = g F + 2 Z gG and gC = X^H gZ:
  //   gX = gZ C^H,  gY = gZ diag(w) + Y diag(2 ge),  gA = gC - gC diag(w) E^H,  gE = -A^H gC diag(w) - E diag(2 ge),
  // ge being the gradient of what is left of the columns' energy, and gw = Re(sum conj(Y) gZ - sum conj(A E) gC).
  LOMACS_TARGET void back(Room<T>& r, Planar<T> g, Planar<T> X, Planar<T> W, Planar<T> A, Planar<T> B, Planar<T> E,
                          Planar<T> D, const StepScalars& x, bool tied, Planar<T> gZ, Planar<T> gW, Planar<T> gA,
                          Planar<T> gB, Planar<T> gE, T* of_s, StepScalars& found) {
    const Index k = r.n;
    adjoint_times(r.a, r.rows, Z, g, n);
    r.paired(r.gF, T(0.5), r.a, T(1));
    const double of_middle = root.back(r.gF);
    times(gZ, rows, g, root.factor(), k);
    combined<false, T>(gZ, rows, T(2), straight(Z), r.gG, k, &gZ, T(1));
    // of C = A - A E diag(w)
    adjoint_times(gA, r.rows, X, gZ, n);
    adjoint_of(C, k, r.over);
    times(g, rows, gZ, r.over, k);
    column_inners<false>(Y, gZ, n, r.sums);
    column_inners<false>(AE, gA, k, r.share);
    double of_weight = 0;
    for (Index j = 0; j < k; ++j) {
      r.sums[j] -= r.share[j];
      of_weight += static_cast<double>(r.sums[j]) * static_cast<double>(inverse[j]);
    }
    // total share is at most bound^2, and middle = 2 / (2 + total share)
    const double root_of = std::sqrt(share), slope = -0.5 * of_middle * middle * middle;
    const double of_share = 0.5 * of_weight * x.gain / root_of + slope * total;
    double of_total = slope * share;
    found.gain += of_weight * root_of;
    if (share < 1) {
      found.bound += of_share * 2 * x.bound / total;
      of_total -= of_share * share / total;
    }
    found.gain += of_total * 2 * x.gain * one;
    const double each = of_total * x.gain * x.gain;
    for (Index j = 0; j < whole_vectors<T>(k); ++j) {
      r.share[j] = 0;
      if (j >= k) continue;
      const double v = static_cast<double>(inverse[j]), energy = static_cast<double>(left[j]);
      double of_inverse = static_cast<double>(r.sums[j]) * x.gain * root_of;
      if (!(energy < 0)) {
        // twice the gradient of |Y_j|^2
        r.share[j] = static_cast<T>(2 * each * v * v);
        of_inverse += each * 2 * energy * v;
      }
      const double change = of_inverse * v * v;
      const T s = D.row(j)[j];
      if (!tied || s != 0) of_s[j] -= static_cast<T>(change);
      found.mu -= tied && s < 0 ? -change : change;
    }
    // of A E: -gC diag(w)
    columns_by(r.c, k, gA, weight);
    adjoint_of(E, k, r.over);
    combined<false, T>(gA, r.rows, T(-1), straight(r.c), r.over, k, &gA, T(1));
    columns_by(r.b, k, E, r.share);
    combined<true, T>(gE, r.rows, T(-1), turned(A), r.c, k, &r.b, T(-1));
    // of Y
    columns_by(gZ, n, gZ, weight);
    columns_by(gZ, n, Y, r.share, &gZ);
    adjoint_times(gB, r.rows, W, gZ, n);
    adjoint_of(B, k, r.over);
    times(gW, rows, gZ, r.over, k);
  }
};

// `_straighten` of Y: Y (3 I - Y^H Y) / 2.
template <typename T>
struct Straightened {
  Planar<T> Y, G;

  void plan(Arena<T>& a, Index n, Index k) {
    Y = planar(a, whole_vectors<T>(n), k);
    G = planar_square(a, k);
  }
  // the square of the defect
  LOMACS_TARGET double measure(Room<T>& r, Index n) {
    hermitian_product<true, T, false>(G, turned(Y), Y, n);
    shifted(r.a, r.n, T(-1), G, T(1));
    return energy_of(r.a, r.n, r.n, r.sums);
  }
  LOMACS_TARGET void record(Room<T>& r, Index n, Planar<T> out) {
    shifted(r.a, r.n, T(-0.5), G, T(1.5));
    combined<false, T, false>(out, whole_blocks(n), T(1), straight(Y), r.a, r.n);
  }
  // gY = g (3 I - G) / 2 - Y (K + K^H) / 2, K = Y^H g
  LOMACS_TARGET void back(Room<T>& r, Index n, Planar<T> g, Planar<T> to) {
    adjoint_times(r.a, r.rows, Y, g, n);
    r.paired(r.b, T(0.5), r.a, T(1));
    shifted(r.a, r.n, T(-0.5), G, T(1.5));
    times(to, whole_blocks(n), g, r.a, r.n);
    combined<false, T>(to, whole_blocks(n), T(-1), straight(Y), r.b, r.n, &to, T(1));
  }
};

// A round of `_filled`: X F(X^H X), and where that left directions without length, columns in their place.
template <typename T>
struct Round {
  Planar<T> X, made, free_columns, cross;
  Root<T> root;
  Arena<T> arena;

  Round(Room<T>& r, Index n, Index c, Index k)
      : arena([&](Arena<T>& a) {
          for (Planar<T>* x : {&X, &made, &free_columns}) *x = planar(a, whole_vectors<T>(n), c);
          if (k > 0) cross = planar(a, whole_vectors<T>(k), c);
          root.plan(a, r, fill_iterations);
        }, true) {}
};

// `_filled` of c columns, outside of k others where there are some.
template <typename T>
struct Filling {
  Index n, c, k;
  int side, used;
  bool gentle;  // the last part of the span is rounding and stays
  Room<T>* room;
  std::vector<std::unique_ptr<Round<T>>> rounds;
  Straightened<T> straight_ones[2];
  Planar<T> freq, other, adjoint, cross_before;

  void plan(Arena<T>& a, Room<T>& r, Index size, Index columns, Index span, int at) {
    room = &r, n = size, c = columns, k = span, side = at;
    for (Straightened<T>& x : straight_ones) x.plan(a, n, c);
    other = planar(a, whole_vectors<T>(n), c);
    freq = planar(a, whole_vectors<T>(n), std::max(c, k));
    if (k == 0) return;
    adjoint = planar(a, whole_vectors<T>(c), k);
    cross_before = planar(a, whole_vectors<T>(k), c);
  }

  Round<T>& round(int i) {
    while (static_cast<int>(rounds.size()) <= i) rounds.push_back(std::make_unique<Round<T>>(*room, n, c, k));
    return *rounds[static_cast<std::size_t>(i)];
  }
  // what is to be filled
  Planar<T> source() { return round(0).X; }

  // to = x - U cross, cross = U^H x
  LOMACS_TARGET void outside(Planar<T> U, Planar<T> x, Planar<T> cross, Planar<T> to) {
    adjoint_times(cross, whole_blocks(k), U, x, n);
    combined<false, T>(to, whole_blocks(n), T(-1), straight(U), cross, k, &x, T(1));
  }
  // gx = g - U L in place of g where it is wanted, gU -= g cross^H + x L^H, L = U^H g
  LOMACS_TARGET void outside_back(Planar<T> U, Planar<T> x, Planar<T> cross, Planar<T> g, Planar<T> gU, Planar<T> by,
                                  bool wanted = true) {
    adjoint_of(cross, k, adjoint);
    combined<false, T>(gU, whole_blocks(n), T(-1), straight(g), adjoint, c, &gU, T(1));
    adjoint_times(by, whole_blocks(k), U, g, n);
    adjoint_of(by, k, adjoint);
    combined<false, T>(gU, whole_blocks(n), T(-1), straight(x), adjoint, c, &gU, T(1));
    if (wanted) combined<false, T>(g, whole_blocks(n), T(-1), straight(U), by, k, &g, T(1));
  }

  Planar<T> transform(Index columns) const { return {freq.data, whole_vectors<T>(columns), columns}; }

  LOMACS_TARGET void record(Refinement<T>& base, const Planar<T>* U, Planar<T> out) {
    Room<T>& r = *room;
    for (used = 0;; ++used) {
      Round<T>& x = round(used);
      hermitian_adjoint_times(x.root.G, x.X, x.X, n);
      const bool done = x.root.record(1.0);
      times(x.made, whole_blocks(n), x.X, x.root.factor(), c);
      gentle = done && used == 0 && largest_row(x.root.factor(), c, r.sums) <= 2;
      if (done || used == 2) break;
      const Planar<T> E = x.root.defect();
      hermitian_times(r.a, E, E, c);
      shifted(r.b, c, T(0.25), E, T(0.75));
      hermitian_times(r.c, r.a, r.b, c);
      base.clear_bins();
      if (U != nullptr) base.add_energies(*U, n, k, side, used + 1, transform(k));
      base.add_energies(x.made, n, c, side, used + 1, transform(c));
      base.least_columns(n, c, side, used + 1, x.free_columns);
      combined<false, T>(x.made, whole_blocks(n), T(1), straight(x.free_columns), r.c, c, &x.made, T(1));
      hand_on(x, U, round(used + 1).X, false);
    }
    hand_on(round(used), U, straight_ones[0].Y, gentle);
    const bool once = straight_ones[0].measure(r, n) < 1e-6 && sizeof(T) == 4;
    straight_ones[0].record(r, n, straight_ones[1].Y);
    straight_ones[1].measure(r, n);
    if (once) mixed(out, n, T(1), straight_ones[1].Y);
    else straight_ones[1].record(r, n, out);
  }

  LOMACS_TARGET void hand_on(Round<T>& x, const Planar<T>* U, Planar<T> to, bool as_it_is) {
    if (U != nullptr && !as_it_is) outside(*U, x.made, x.cross, to);
    else mixed(to, n, T(1), x.made);
  }

  // g to the gradient of the source, in its place; that of U is added to gU; `by` as large as cross
  LOMACS_TARGET void back(Planar<T> g, const Planar<T>* U, Planar<T> gU, Planar<T> by) {
    Room<T>& r = *room;
    straight_ones[1].back(r, n, g, other);
    straight_ones[0].back(r, n, other, g);
    for (int i = used; i >= 0; --i) {
      Round<T>& x = round(i);
      const bool filled = i < used;
      if (U != nullptr && (filled || !gentle)) outside_back(*U, x.made, x.cross, g, gU, by);
      if (filled) {
        adjoint_times(r.a, r.rows, x.free_columns, g, n);
        r.paired(r.gG, T(0.5), r.a, T(1));
        r.cubic_gradient(x.root.defect(), r.gG);
      }
      adjoint_times(r.a, r.rows, x.X, g, n);
      r.paired(r.gF, T(0.5), r.a, T(1));
      x.root.back(r.gF, filled ? &r.gG : nullptr);
      times(other, whole_blocks(n), g, x.root.factor(), c);
      combined<false, T>(g, whole_blocks(n), T(2), straight(x.X), r.gG, c, &other, T(1));
    }
  }
};

// One side of `refine_close`: A = P F((X P)^H X P) and X A straightened.
template <typename T>
struct ClosingSide {
  Planar<T> gram, product, A, sorted;
  Root<T> root;
  Straightened<T> straightened;
  Index n, rows;

  void plan(Arena<T>& a, Room<T>& r, Index size, Index k) {
    n = size, rows = whole_blocks(size);
    for (Planar<T>* x : {&gram, &product, &A, &sorted}) *x = planar_square(a, k);
    root.plan(a, r, close_iterations);
    straightened.plan(a, n, k);
  }

  LOMACS_TARGET void orthonormalize(Room<T>& r, Planar<T> X, Planar<T> P) {
    const Index k = r.n;
    hermitian_adjoint_times(gram, X, X, n);
    times(product, r.rows, gram, P, k);
    hermitian_adjoint_times(root.G, P, product, k);
    root.record(1.0);
    times(A, r.rows, P, root.factor(), k);
  }
  LOMACS_TARGET void rotate(Room<T>& r, Planar<T> X, const std::int64_t* order, Planar<T> out) {
    for (Index i = 0; i < r.n; ++i)
      for (Index j = 0; j < r.n; ++j) {
        sorted.row(i)[j] = A.row(i)[order[j]];
        sorted.imag(i)[j] = A.imag(i)[order[j]];
      }
    times(straightened.Y, rows, X, sorted, r.n);
    straightened.measure(r, n);
    straightened.record(r, n, out);
  }
  // g of what came out to gX in its place, and gA
  LOMACS_TARGET void rotate_back(Room<T>& r, Planar<T> X, const std::int64_t* order, Planar<T> g, Planar<T> gA,
                                 Planar<T> other) {
    straightened.back(r, n, g, other);
    adjoint_times(r.a, r.rows, X, other, n);
    for (Index i = 0; i < r.n; ++i)
      for (Index j = 0; j < r.n; ++j) {
        gA.row(i)[order[j]] = r.a.row(i)[j];
        gA.imag(i)[order[j]] = r.a.imag(i)[j];
      }
    adjoint_of(sorted, r.n, r.over);
    times(g, rows, other, r.over, r.n);
  }
  // gA to gP; adds to gX
  LOMACS_TARGET void orthonormalize_back(Room<T>& r, Planar<T> X, Planar<T> P, Planar<T> gA, Planar<T> gP, Planar<T> gX) {
    const Index k = r.n;
    adjoint_times(r.a, r.rows, P, gA, k);
    r.paired(r.gF, T(0.5), r.a, T(1));
    root.back(r.gF);
    times(gP, r.rows, gA, root.factor(), k);
    combined<false, T>(gP, r.rows, T(2), straight(product), r.gG, k, &gP, T(1));
    times(r.a, r.rows, P, r.gG, k);
    adjoint_of(P, k, r.over);
    hermitian_times(r.b, r.a, r.over, k);
    combined<false, T>(gX, rows, T(2), straight(X), r.b, k, &gX, T(1));
  }
};

// What a step's adjoint needs of the step.
template <typename T>
struct Record {
  Planar<T> W, Z;
  Diagonal<T> diagonal;
  Expansion<T> left, right;
};

// bytes of records that are kept at once: the steps before them are made a second time
constexpr Index kept_bytes = 4 << 20;

// The gradient of `refine_svd`, sample by sample.
template <typename T>
class RefinementGradient {
 public:
  explicit RefinementGradient(const RefineGradient<T>& job)
      : job_(job), shape_(job.refine), k_(shape_.k), rest_(shape_.r - shape_.k), tied_(shape_.hermitian), base_(shape_),
        arena_([this](Arena<T>& a) { plan(a); }, true) {
    base_.prepare();
    closing_.index = base_.index;
    for (Record<T>& x : records_) x.diagonal.index = base_.index;
  }

  LOMACS_TARGET void sample(Index b) {
    const Index M = shape_.M, N = shape_.N, r = shape_.r, steps = shape_.steps;
    base_.load_channel(shape_.H + 2 * b * M * N);
    begun_ = false;
    scalars_.assign(static_cast<std::size_t>(steps), {0, 0, 0, 0});
    const T* given[] = {shape_.U + 2 * b * M * r, tied_ ? nullptr : shape_.V + 2 * b * N * r};
    const T* grads[] = {job_.gU + 2 * b * M * r, job_.gV + 2 * b * N * r};
    for (int side = 0; side < 2; ++side) load_planar(grads[side], r, rows(side), r, seeds_[side]);
    for (int side = 0; side < sides(); ++side) start(given[side], side);
    const Index kept = static_cast<Index>(records_.size());
    for (Index t = 0; t < steps; ++t) record(t, records_[static_cast<std::size_t>(t % kept)]);
    close(job_.order + b * k_, job_.gS + b * r);
    for (Index t = steps; t-- > 0;) {
      Record<T>& x = records_[static_cast<std::size_t>(t % kept)];
      if (t + kept < steps) record(t, x);
      step_back(t, x);
    }
    T* outs[] = {job_.outU + 2 * b * M * r, job_.outV + 2 * b * N * r};
    for (int side = 0; side < sides(); ++side) {
      start_back(side);
      std::fill_n(outs[side], 2 * rows(side) * r, T(0));
      store_planar(grad_[side], rows(side), k_, outs[side], r);
    }
    write_channel(job_.outH + 2 * b * M * N);
    for (Index t = 0; t < steps; ++t) {
      const StepScalars& x = scalars_[static_cast<std::size_t>(t)];
      double* to = job_.partial + 4 * (steps * b + t);
      to[0] = x.soft, to[1] = x.mu, to[2] = x.gain, to[3] = x.bound;
    }
  }

 private:
  Index rows(int side) const { return side == 0 ? shape_.M : shape_.N; }
  int sides() const { return tied_ ? 1 : 2; }
  Planar<T>& state(Index t, int side) { return states_[static_cast<std::size_t>(2 * t + side)]; }
  Planar<T> scratch(int side) { return side == 0 ? base_.left.Y : base_.right.Y; }
  // its adjoint, with as many columns as H
  Planar<T> turned_over(Planar<T> x) {
    adjoint_of(x, shape_.N, base_.adjoint_other);
    return base_.adjoint_other;
  }

  void plan(Arena<T>& a) {
    base_.plan(a);
    room_.plan(a, k_);
    if (rest_ > 0) outer_.plan(a, rest_);
    const Index tall = std::max(shape_.M, shape_.N), each = 2 * static_cast<Index>(sizeof(T)) * k_ *
        ((tied_ ? 13 : 21) * shape_.sweeps * k_ + sides() * (10 * k_ + 3 * tall));
    records_.resize(static_cast<std::size_t>(std::clamp<Index>(kept_bytes / each, 1, std::max<Index>(shape_.steps, 1))));
    states_.resize(static_cast<std::size_t>(2 * (shape_.steps + 1)));
    for (Record<T>& x : records_) {
      x.W = planar(a, whole_vectors<T>(shape_.M), k_);
      x.diagonal.plan(a, shape_);
      x.left.plan(a, room_, shape_.M, k_);
      if (tied_) continue;
      x.Z = planar(a, whole_vectors<T>(shape_.N), k_);
      x.right.plan(a, room_, shape_.N, k_);
    }
    closing_.plan(a, shape_);
    core_ = planar_square(a, k_);
    channel_ = planar(a, whole_vectors<T>(shape_.M), shape_.N);
    for (int side = 0; side < 2; ++side) {
      const Index n = rows(side);
      seeds_[side] = planar(a, whole_vectors<T>(n), shape_.r);
      if (side >= sides()) break;
      for (Index t = 0; t <= shape_.steps; ++t) state(t, side) = planar(a, whole_vectors<T>(n), k_);
      closings_[side].plan(a, room_, n, k_);
      if (!shape_.orthonormal) {
        starts_[side].plan(a, room_, n, k_, 0, side);
        raw_[side] = planar(a, whole_vectors<T>(n), k_);
        for (T** x : {&energies_[side], &lengths_[side]}) *x = take_row(a, whole_vectors<T>(k_));
      }
      if (rest_ > 0) {
        completions_[side].plan(a, outer_, n, rest_, k_, side);
        for (Planar<T>* x : {&more_[side], &of_more_[side]}) *x = planar(a, whole_vectors<T>(n), rest_);
      }
      grad_[side] = planar(a, whole_vectors<T>(n), k_);
      of_product_[side] = planar(a, whole_vectors<T>(n), k_);
      work_[side] = planar(a, whole_vectors<T>(n), k_);
    }
    if (rest_ > 0) by_ = planar(a, whole_vectors<T>(k_), rest_);
    for (Planar<T>* x : {&gP_, &gQ_, &gD_, &g_[0], &g_[1], &g_[2], &g_[3]}) *x = planar_square(a, k_);
    for (T** x : {&first_, &second_, &of_s_, &of_s_imag_}) *x = take_row(a, whole_vectors<T>(std::max(k_, rest_)));
  }

  // the columns handed in, at unit length, made orthonormal
  LOMACS_TARGET void start(const T* given, int side) {
    if (shape_.orthonormal) {
      load_planar(given, shape_.r, rows(side), k_, state(0, side));
      return;
    }
    Filling<T>& x = starts_[side];
    load_planar(given, shape_.r, rows(side), k_, raw_[side]);
    column_energies(raw_[side], rows(side), energies_[side]);
    for (Index j = 0; j < k_; ++j) lengths_[side][j] = T(1) / std::sqrt(energies_[side][j] + T(least_energy));
    columns_by(x.source(), rows(side), raw_[side], lengths_[side]);
    x.record(base_, nullptr, state(0, side));
  }

  // gX_j = w_j g_j - X_j w_j^3 Re(conj(X_j) g_j), w = (|X_j|^2 + TINY)^(-1/2)
  LOMACS_TARGET void start_back(int side) {
    if (shape_.orthonormal) return;
    const Index n = rows(side);
    const T* w = lengths_[side];
    starts_[side].back(grad_[side], nullptr, {}, {});
    columns_by(grad_[side], n, grad_[side], w);
    column_inners<false>(raw_[side], grad_[side], n, first_);
    for (Index j = 0; j < k_; ++j) first_[j] *= -w[j] * w[j];
    columns_by(grad_[side], n, raw_[side], first_, &grad_[side]);
  }

  StepScalars scalars_of(Index t) const {
    const T* x = shape_.scalars + 4 * t;
    return {static_cast<double>(x[0]), static_cast<double>(x[1]), static_cast<double>(x[2]), static_cast<double>(x[3])};
  }

  // step t, from its state to the next one
  LOMACS_TARGET void record(Index t, Record<T>& x) {
    const StepScalars row = scalars_of(t);
    const Planar<T> U = state(t, 0), V = state(t, sides() - 1);
    Diagonal<T>& d = x.diagonal;
    times(x.W, whole_blocks(shape_.M), base_.H, V, shape_.N);
    adjoint_times(d.core(), room_.rows, U, x.W, shape_.M);
    if (!tied_) adjoint_times(x.Z, whole_blocks(shape_.N), base_.H, U, shape_.M);
    d.record(room_, static_cast<T>(row.soft), false);
    x.left.record(room_, U, x.W, d.P(), d.Q(), d.last, d.last, row, tied_, scratch(0), state(t + 1, 0));
    if (tied_) return;
    adjoint_of(d.last, k_, base_.DH);
    x.right.record(room_, V, x.Z, d.Q(), d.P(), base_.DH, d.last, row, false, scratch(1), state(t + 1, 1));
  }

  // From grad_, those of its state after the step: grad_ before it. W = H V, Z = H^H U, D = U^H W give
  //   gW += U gD,  gU += W gD^H + H gZ,  gV += H^H gW,  gH += gW V^H + U gZ^H.
  LOMACS_TARGET void step_back(Index t, Record<T>& x) {
    const Index M = shape_.M, N = shape_.N;
    const StepScalars row = scalars_of(t);
    StepScalars& found = scalars_[static_cast<std::size_t>(t)];
    const Planar<T> U = state(t, 0), V = state(t, sides() - 1);
    Diagonal<T>& d = x.diagonal;
    std::fill_n(of_s_, whole_vectors<T>(k_), T(0));
    x.left.back(room_, grad_[0], U, x.W, d.P(), d.Q(), d.last, d.last, row, tied_, work_[0], of_product_[0], gP_, gQ_, gD_,
                of_s_, found);
    if (tied_) {
      mixed(gP_, k_, T(1), gP_, T(1), &gQ_);
      room_.paired(gD_, T(0.5), gD_, T(1));
    } else {
      adjoint_of(d.last, k_, base_.DH);
      x.right.back(room_, grad_[1], V, x.Z, d.Q(), d.P(), base_.DH, d.last, row, false, work_[1], of_product_[1], g_[0],
                   g_[1], g_[2], of_s_, found);
      mixed(gQ_, k_, T(1), gQ_, T(1), &g_[0]);
      mixed(gP_, k_, T(1), gP_, T(1), &g_[1]);
      adjoint_of(g_[2], k_, room_.over);
      mixed(gD_, k_, T(1), gD_, T(1), &room_.over);
    }
    for (Index j = 0; j < k_; ++j) gD_.row(j)[j] += of_s_[j];
    found.soft += d.back(room_, gD_, gP_, gQ_, g_, first_, second_);
    project_back(U, V, x.W, true);
    if (tied_) return;
    combined<false, T>(grad_[0], whole_blocks(M), T(1), straight(base_.H), of_product_[1], N, &grad_[0], T(1));
    combined<false, T>(channel_, whole_blocks(M), T(1), straight(U), turned_over(of_product_[1]), k_, &channel_, T(1));
  }

  // of W and of D = U^H W: adds to grad_ and to that of H; of_product_[0] holds what else is known of gW
  LOMACS_TARGET void project_back(Planar<T> U, Planar<T> V, Planar<T> W, bool known) {
    const Index M = shape_.M, N = shape_.N;
    const Planar<T> gW = of_product_[0], gV = grad_[sides() - 1];
    combined<false, T>(gW, whole_blocks(M), T(1), straight(U), gD_, k_, known ? &gW : nullptr, T(1));
    adjoint_of(gD_, k_, room_.over);
    combined<false, T>(grad_[0], whole_blocks(M), T(1), straight(W), room_.over, k_, &grad_[0], T(1));
    combined<true, T>(gV, whole_blocks(N), T(1), turned(base_.H), gW, M, &gV, T(1));
    combined<false, T>(channel_, whole_blocks(M), T(1), straight(gW), turned_over(V), k_, begun_ ? &channel_ : nullptr, T(1));
    begun_ = true;
  }

  // `refine_close` and what follows it, and back to the state before it
  LOMACS_TARGET void close(const std::int64_t* order, const T* gS) {
    const Index M = shape_.M, steps = shape_.steps, k = k_;
    Room<T>& r = room_;
    const Planar<T> U = state(steps, 0), V = state(steps, sides() - 1), W = base_.left.W, C = base_.C;
    ClosingSide<T>&left = closings_[0], &right = closings_[sides() - 1];
    times(W, whole_blocks(M), base_.H, V, shape_.N);
    adjoint_times(core_, r.rows, U, W, M);
    if (tied_) r.paired(core_, T(0.5), core_, T(1));
    mixed(closing_.core(), k, T(1), core_);
    closing_.record(r, static_cast<T>(steps > 0 ? scalars_of(steps - 1).soft : 0.5), true);
    left.orthonormalize(r, U, closing_.P());
    if (!tied_) right.orthonormalize(r, V, closing_.Q());
    // s = diag(A^H D B), the gradients of its parts in of_s_
    times(C, r.rows, core_, right.A, k);
    column_inners<false>(left.A, C, k, first_);
    column_inners<true>(left.A, C, k, second_);
    of_norm_ = 0;
    for (Index j = 0; j < k; ++j) {
      const Index from = order[j];
      const double re = static_cast<double>(first_[from]), im = tied_ ? 0.0 : static_cast<double>(second_[from]);
      const double size = tied_ ? std::fabs(re) : std::sqrt(re * re + im * im + 1e-36), g = static_cast<double>(gS[j]);
      of_norm_ += g * size;
      const double by = size > 0 ? g * base_.norm / size : size == 0 ? 0.0 : size;
      of_s_[from] = static_cast<T>(by * re);
      of_s_imag_[from] = static_cast<T>(by * im);
    }
    if (tied_) {
      // V = U diag(sign)
      for (Index j = 0; j < shape_.r; ++j) {
        const T sign = j < k && first_[order[j]] < 0 ? T(-1) : T(1);
        for (Index i = 0; i < M; ++i) {
          seeds_[0].row(i)[j] += sign * seeds_[1].row(i)[j];
          seeds_[0].imag(i)[j] += sign * seeds_[1].imag(i)[j];
        }
      }
    } else {
      for (Index j = 0; j < k; ++j) {
        const T re = first_[j], im = second_[j];
        set_phase(re, im, first_[j], second_[j]);
        second_[j] = -second_[j];
      }
      turned_columns(right.A, k, first_, second_);
      turned_columns(C, k, first_, second_);
    }
    const Planar<T> gA[] = {g_[0], g_[1]};
    for (int side = 0; side < sides(); ++side) {
      const Planar<T> X = state(steps, side);
      closings_[side].rotate(r, X, order, work_[side]);
      take_seeds(side);
      closings_[side].rotate_back(r, X, order, grad_[side], gA[side], scratch(side));
    }
    if (tied_) {
      // gA += 2 D A diag(gs), gD = A diag(gs) A^H
      for (Index j = 0; j < k; ++j) first_[j] = 2 * of_s_[j];
      columns_by(gA[0], k, C, first_, &gA[0]);
      columns_by(r.a, k, left.A, of_s_);
      adjoint_of(left.A, k, r.over);
      hermitian_times(core_, r.a, r.over, k);
    } else {
      // s, C and B with the phases of s taken out of B; gs_j -= i Im(sum conj(B) gB)_j / |s_j|, see turn_back
      column_inners<true>(right.A, gA[1], k, r.sums);
      for (Index j = 0; j < k; ++j) {
        const T c = first_[j], d = second_[j], re = of_s_[j], im = of_s_imag_[j];
        // conj(c + id) is the phase of s
        const T size = phase_sizes(left.A, C, j);
        of_s_[j] = re * c - im * d;
        of_s_imag_[j] = size * size > T(least_energy) ? -r.sums[j] / size : T(0);
      }
      // gA += C diag(conj(gs)), gC = A diag(gs)
      mixed(r.a, k, T(1), C);
      for (Index j = 0; j < k; ++j) r.sums[j] = -of_s_imag_[j];
      turned_columns(r.a, k, of_s_, r.sums);
      mixed(gA[0], k, T(1), gA[0], T(1), &r.a);
      mixed(r.a, k, T(1), left.A);
      turned_columns(r.a, k, of_s_, of_s_imag_);
      combined<true, T>(gA[1], r.rows, T(1), turned(core_), r.a, k, &gA[1], T(1));
      adjoint_of(right.A, k, r.over);
      times(core_, r.rows, r.a, r.over, k);
      for (Index j = 0; j < k; ++j) second_[j] = -second_[j];
      turned_columns(gA[1], k, first_, second_);
      right.orthonormalize_back(r, V, closing_.Q(), gA[1], gQ_, grad_[1]);
    }
    left.orthonormalize_back(r, U, closing_.P(), gA[0], gP_, grad_[0]);
    const double of_soft = closing_.back(r, gD_, gP_, gQ_, g_, first_, second_);
    if (steps > 0) scalars_.back().soft += of_soft;
    mixed(gD_, k, T(1), gD_, T(1), &core_);
    project_back(U, V, W, false);
  }

  // |s_j| where the phases are taken out: the real part of the sum of conj(A) C over column j
  T phase_sizes(Planar<T> A, Planar<T> C, Index j) const {
    T total = 0;
    for (Index i = 0; i < k_; ++i) total += A.row(i)[j] * C.row(i)[j] + A.imag(i)[j] * C.imag(i)[j];
    return total;
  }

  // gradients of the active columns into grad_, and to them those of the completion beside them
  LOMACS_TARGET void take_seeds(int side) {
    const Planar<T> from = seeds_[side], to = grad_[side];
    for (Index i = 0; i < rows(side); ++i)
      for (Index j = 0; j < k_; ++j) {
        to.row(i)[j] = from.row(i)[j];
        to.imag(i)[j] = from.imag(i)[j];
      }
    if (rest_ == 0) return;
    const Planar<T> U = work_[side];
    Filling<T>& x = completions_[side];
    base_.clear_bins();
    base_.add_energies(U, x.n, k_, side, 0, x.transform(k_));
    base_.least_columns(x.n, rest_, side, 0, more_[side]);
    x.outside(U, more_[side], x.cross_before, x.source());
    x.record(base_, &U, of_more_[side]);
    const Planar<T> g = of_more_[side];
    for (Index i = 0; i < x.n; ++i)
      for (Index j = 0; j < rest_; ++j) {
        g.row(i)[j] = from.row(i)[k_ + j];
        g.imag(i)[j] = from.imag(i)[k_ + j];
      }
    x.back(g, &U, to, by_);
    x.outside_back(U, more_[side], x.cross_before, g, to, by_, false);
  }

  // from that of H / |H| and of |H|
  LOMACS_TARGET void write_channel(T* out) {
    const double norm = base_.norm, along = channel_inner();
    const double by = norm == 0 ? 1.0 : 1 / norm, of_h = norm == 0 ? 0.0 : of_norm_ - along / norm;
    mixed(channel_, shape_.M, static_cast<T>(by), channel_, static_cast<T>(of_h), &base_.H);
    store_planar(channel_, shape_.M, shape_.N, out, shape_.N);
  }

  // sum of Re(conj(H) gH), by rows: a row of sums would be as wide as H
  LOMACS_TARGET double channel_inner() const {
    double total = 0;
    for (Index i = 0; i < shape_.M; ++i)
      for (Index j = 0; j < shape_.N; ++j)
        total += static_cast<double>(base_.H.row(i)[j]) * static_cast<double>(channel_.row(i)[j]) +
                 static_cast<double>(base_.H.imag(i)[j]) * static_cast<double>(channel_.imag(i)[j]);
    return total;
  }

  const RefineGradient<T>& job_;
  const RefineSvd<T>& shape_;
  Index k_, rest_;
  bool tied_, begun_ = false;  // channel_ holds something
  Refinement<T> base_;
  Room<T> room_, outer_;
  std::vector<Record<T>> records_;
  std::vector<Planar<T>> states_;
  std::vector<StepScalars> scalars_;  // their gradients
  Diagonal<T> closing_;
  ClosingSide<T> closings_[2];
  Filling<T> starts_[2], completions_[2];
  Planar<T> channel_, core_, seeds_[2], raw_[2], more_[2], of_more_[2], grad_[2], of_product_[2], work_[2], by_, gP_, gQ_, gD_, g_[4];
  T *energies_[2], *lengths_[2], *first_, *second_, *of_s_, *of_s_imag_;
  double of_norm_ = 0;
  Arena<T> arena_;
};

template <typename T>
LOMACS_TARGET void samples(const RefineGradient<T>& job, std::int64_t begin, std::int64_t end) {
  RefinementGradient<T> x(job);
  for (std::int64_t b = begin; b < end; ++b) x.sample(b);
}

}  // namespace
}  // namespace LOMACS_ISA
}  // namespace lomacs
