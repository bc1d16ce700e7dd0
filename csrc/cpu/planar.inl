// Products of small complex matrices of which every one is planar. Included inside isa.inl.
// A row holds its real parts, then its imaginary parts, both padded to whole vectors; rows are padded to whole
// blocks. Paddings are zero or finite rubbish that no sum reaches.
#include "gram.inl"

namespace lomacs {
namespace LOMACS_ISA {
namespace {

using Index = std::int64_t;

// rows of a block: their accumulators and one row of the right factor fill the registers
constexpr int block_rows = LOMACS_BYTES == 64 ? 8 : 4;

template <typename T>
Index whole_vectors(Index n) {
  return (n + lanes<T> - 1) / lanes<T> * lanes<T>;
}

inline Index whole_blocks(Index n) { return (n + block_rows - 1) / block_rows * block_rows; }

template <typename T>
struct Planar {
  T* data;
  Index width;  // a row's real parts, whole vectors
  Index columns;

  T* row(Index i) const { return data + 2 * width * i; }
  T* imag(Index i) const { return row(i) + width; }
  Index vecs() const { return (columns + lanes<T> - 1) / lanes<T>; }
};

template <typename T>
Planar<T> planar(Arena<T>& arena, Index rows, Index columns) {
  const Index width = whole_vectors<T>(columns);
  return {arena.take(2 * width * whole_blocks(rows)), width, columns};
}

// square: its adjoint is taken in squares of vectors
template <typename T>
Planar<T> planar_square(Arena<T>& arena, Index n) {
  return planar(arena, whole_vectors<T>(n), n);
}

// a left factor: parts of number (i, k) lie at re[i row + k column] and im[i row + k column]
template <typename T>
struct Side {
  const T *re, *im;
  Index row, column;
};

template <typename T>
LOMACS_INLINE Side<T> straight(Planar<T> x) {
  return {x.data, x.data + x.width, 2 * x.width, 1};
}

// to be conjugated
template <typename T>
LOMACS_INLINE Side<T> turned(Planar<T> x) {
  return {x.data, x.data + x.width, 1, 2 * x.width};
}

// vectors of BYTES bytes
template <typename T, int BYTES>
using Piece = typename Simd<T, BYTES>::Vec;

template <typename T, int BYTES>
LOMACS_INLINE Piece<T, BYTES> load_part(const T* p) {
  return *reinterpret_cast<const typename Simd<T, BYTES>::Loose*>(p);
}

template <typename T, int BYTES>
LOMACS_INLINE void store_part(T* p, Piece<T, BYTES> x) {
  *reinterpret_cast<typename Simd<T, BYTES>::Loose*>(p) = x;
}

template <typename T, int BYTES>
LOMACS_INLINE Piece<T, BYTES> splat_part(T x) {
  return x - Piece<T, BYTES>{};
}

template <bool CONJ, int BYTES, typename T>
LOMACS_INLINE void accumulate(Piece<T, BYTES> (&re)[block_rows], Piece<T, BYTES> (&im)[block_rows], const Side<T>& left,
                              Planar<T> right, Index depth, Index i0, Index vec) {
  using V = Piece<T, BYTES>;
  const Index row = left.row, column = left.column, step = 2 * right.width;
  const T *ar = left.re + i0 * row, *ai = left.im + i0 * row;
  const T *br = right.data + vec * lanes<T>, *bi = br + right.width;
  for (; depth > 0; --depth, ar += column, ai += column, br += step, bi += step) {
    const V x = load_part<T, BYTES>(br), y = load_part<T, BYTES>(bi);
#pragma GCC unroll 8
    for (int i = 0; i < block_rows; ++i) {
      const V a = splat_part<T, BYTES>(ar[i * row]), b = splat_part<T, BYTES>(ai[i * row]);
      re[i] += a * x;
      im[i] += a * y;
      if constexpr (CONJ) {
        re[i] += b * y;
        im[i] -= b * x;
      } else {
        re[i] -= b * y;
        im[i] += b * x;
      }
    }
  }
}

// the same with three real products instead of four, whose additions cost nothing beside them where a unit of its
// own makes them; the error is then that of the norms, not of the parts
template <bool CONJ, int BYTES, typename T>
LOMACS_INLINE void accumulate_by_three(Piece<T, BYTES> (&re)[block_rows], Piece<T, BYTES> (&im)[block_rows],
                                       const Side<T>& left, Planar<T> right, Index depth, Index i0, Index vec) {
  using V = Piece<T, BYTES>;
  const Index row = left.row, column = left.column, step = 2 * right.width;
  const T *ar = left.re + i0 * row, *ai = left.im + i0 * row;
  const T *br = right.data + vec * lanes<T>, *bi = br + right.width;
  V first[block_rows] = {};
  for (; depth > 0; --depth, ar += column, ai += column, br += step, bi += step) {
    const V x = load_part<T, BYTES>(br), y = load_part<T, BYTES>(bi), total = x + y, difference = y - x;
#pragma GCC unroll 8
    for (int i = 0; i < block_rows; ++i) {
      V a = splat_part<T, BYTES>(ar[i * row]), b = splat_part<T, BYTES>(ai[i * row]);
#if defined(__x86_64__)
      // added as vectors: the sum of two numbers would have to be spread by the units that multiply
      asm("" : "+v"(a));
#endif
      // (a + ib)(x + iy) = (a + b) x - b (x + y) + i ((a + b) x + a (y - x)), and for a - ib
      im[i] += a * difference;
      if constexpr (CONJ) {
        first[i] += (a - b) * x;
        re[i] += b * total;
      } else {
        first[i] += (a + b) * x;
        re[i] -= b * total;
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < block_rows; ++i) {
    re[i] += first[i];
    im[i] += first[i];
  }
}

// whether `times` and `adjoint_times` take three products
template <typename T>
constexpr bool by_three = LOMACS_BYTES == 64 && sizeof(T) == 4;

// a last vector of which half is enough takes half the time where a vector is made in two passes
constexpr bool by_halves = LOMACS_BYTES == 64;

// rows of a block from i0 on and one vector of columns, or the part of it that BYTES hold
template <bool CONJ, int BYTES, bool THREE, typename T>
LOMACS_INLINE void combined_block(Planar<T> c, T x, const Side<T>& left, Planar<T> right, Index depth,
                                  const Planar<T>* other, T y, Index i0, Index vec) {
  using V = Piece<T, BYTES>;
  V re[block_rows] = {}, im[block_rows] = {};
  if constexpr (THREE) accumulate_by_three<CONJ, BYTES, T>(re, im, left, right, depth, i0, vec);
  else accumulate<CONJ, BYTES, T>(re, im, left, right, depth, i0, vec);
  T* p = c.row(i0) + vec * lanes<T>;
  if (other != nullptr) {
    const T* q = other->row(i0) + vec * lanes<T>;
#pragma GCC unroll 8
    for (int i = 0; i < block_rows; ++i) {
      const V qr = load_part<T, BYTES>(q + i * 2 * other->width);
      const V qi = load_part<T, BYTES>(q + i * 2 * other->width + other->width);
      store_part<T, BYTES>(p + i * 2 * c.width, x * re[i] + y * qr);
      store_part<T, BYTES>(p + i * 2 * c.width + c.width, x * im[i] + y * qi);
    }
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < block_rows; ++i) {
      store_part<T, BYTES>(p + i * 2 * c.width, x * re[i]);
      store_part<T, BYTES>(p + i * 2 * c.width + c.width, x * im[i]);
    }
  }
}

// c = x left right [+ y other]; upper: no vectors left of the diagonal's
template <bool CONJ, typename T, bool THREE = by_three<T>>
LOMACS_TARGET __attribute__((noinline)) void combined(Planar<T> c, Index rows, T x, const Side<T>& left, Planar<T> right,
                                                      Index depth, const Planar<T>* other = nullptr, T y = 0,
                                                      Part part = Part::all) {
  const Index left_over = c.columns % lanes<T>;
  const bool half = by_halves && left_over > 0 && 2 * left_over <= lanes<T>;
  const Index whole_ones = half ? c.vecs() - 1 : c.vecs();
  // rows outside: the left factor may be too large for the nearest cache
  for (Index i0 = 0; i0 < rows; i0 += block_rows) {
    for (Index vec = part == Part::upper ? i0 / lanes<T> : 0; vec < whole_ones; ++vec)
      combined_block<CONJ, LOMACS_BYTES, THREE>(c, x, left, right, depth, other, y, i0, vec);
    if constexpr (by_halves) {
      if (half) combined_block<CONJ, LOMACS_BYTES / 2, THREE>(c, x, left, right, depth, other, y, i0, whole_ones);
    }
  }
}

template <typename T>
LOMACS_INLINE void times(Planar<T> c, Index rows, Planar<T> a, Planar<T> b, Index depth) {
  combined<false, T>(c, rows, T(1), straight(a), b, depth);
}

// c = a^H b; `rows` of c, `depth` rows of a and b
template <typename T>
LOMACS_INLINE void adjoint_times(Planar<T> c, Index rows, Planar<T> a, Planar<T> b, Index depth) {
  combined<true, T>(c, rows, T(1), turned(a), b, depth);
}

// square (i, j) of vectors of `from`, conjugate transposed, to square (j, i) of `to`
template <typename T>
LOMACS_INLINE void adjoint_square(Planar<T> from, Index i, Index j, Planar<T> to) {
  for (int part = 0; part < 2; ++part) {
    Vec<T> x[lanes<T>];
#pragma GCC unroll 16
    for (int n = 0; n < lanes<T>; ++n) x[n] = load(from.row(i * lanes<T> + n) + part * from.width + j * lanes<T>);
    transpose_square<T>(x);
    const Vec<T> sign = splat(part == 0 ? T(1) : T(-1));
#pragma GCC unroll 16
    for (int n = 0; n < lanes<T>; ++n) store(to.row(j * lanes<T> + n) + part * to.width + i * lanes<T>, sign * x[n]);
  }
}

// to = from^H; both hold whole squares of vectors
template <typename T>
LOMACS_TARGET void adjoint_of(Planar<T> from, Index rows, Planar<T> to) {
  for (Index i = 0; i * lanes<T> < rows; ++i)
    for (Index j = 0; j < from.vecs(); ++j) adjoint_square(from, i, j, to);
}

// lower squares of a Hermitian matrix from the upper ones
template <typename T>
LOMACS_TARGET void mirror(Planar<T> x) {
  for (Index j = 1; j < x.vecs(); ++j)
    for (Index i = 0; i < j; ++i) adjoint_square(x, i, j, x);
}

// `combined` where the result is Hermitian, by its upper half; c holds whole squares of vectors
template <bool CONJ, typename T, bool THREE = by_three<T>>
LOMACS_TARGET void hermitian_product(Planar<T> c, const Side<T>& left, Planar<T> right, Index depth) {
  combined<CONJ, T, THREE>(c, whole_blocks(c.columns), T(1), left, right, depth, nullptr, T(0), Part::upper);
  mirror(c);
}

template <typename T>
LOMACS_INLINE void hermitian_times(Planar<T> c, Planar<T> a, Planar<T> b, Index depth) {
  hermitian_product<false, T>(c, straight(a), b, depth);
}

// c = a^H b, which is Hermitian
template <typename T>
LOMACS_INLINE void hermitian_adjoint_times(Planar<T> c, Planar<T> a, Planar<T> b, Index depth) {
  hermitian_product<true, T>(c, turned(a), b, depth);
}

// c = x a + y b + z I, elementwise; c may be a or b
template <typename T>
LOMACS_TARGET void blended(Planar<T> c, Index n, T x, Planar<T> a, T y, Planar<T> b, T z) {
  for (Index i = 0; i < n; ++i)
    for (Index j = 0; j < 2 * c.width; j += lanes<T>)
      store(c.row(i) + j, x * load(a.row(i) + j) + y * load(b.row(i) + j));
  for (Index i = 0; i < n; ++i) c.row(i)[i] += z;
}

// c = x a + z I
template <typename T>
LOMACS_TARGET void shifted(Planar<T> c, Index n, T x, Planar<T> a, T z) {
  for (Index i = 0; i < n; ++i)
    for (Index j = 0; j < 2 * c.width; j += lanes<T>) store(c.row(i) + j, x * load(a.row(i) + j));
  for (Index i = 0; i < n; ++i) c.row(i)[i] += z;
}

// column j of x times s_j
template <typename T>
LOMACS_TARGET void scaled_columns(Planar<T> x, Index rows, const T* s) {
  for (Index i = 0; i < rows; ++i)
    for (Index j = 0; j < x.width; j += lanes<T>) {
      const Vec<T> weight = load(s + j);
      store(x.row(i) + j, weight * load(x.row(i) + j));
      store(x.imag(i) + j, weight * load(x.imag(i) + j));
    }
}

// column j of x times the number re_j + i im_j
template <typename T>
LOMACS_TARGET void turned_columns(Planar<T> x, Index rows, const T* re, const T* im) {
  for (Index i = 0; i < rows; ++i)
    for (Index j = 0; j < x.width; j += lanes<T>) {
      const Vec<T> c = load(re + j), s = load(im + j), a = load(x.row(i) + j), b = load(x.imag(i) + j);
      store(x.row(i) + j, a * c - b * s);
      store(x.imag(i) + j, a * s + b * c);
    }
}

// square sums of the columns, in short chains
template <typename T>
LOMACS_TARGET void column_energies(Planar<T> x, Index rows, T* out) {
  for (Index j = 0; j < x.width; j += lanes<T>) {
    Vec<T> total{};
    for (Index i = 0; i < rows;) {
      Vec<T> part{};
      for (const Index stop = std::min<Index>(i + 8, rows); i < stop; ++i) {
        const Vec<T> a = load(x.row(i) + j), b = load(x.imag(i) + j);
        part += a * a + b * b;
      }
      total += part;
    }
    store(out + j, total);
  }
}

template <typename T>
LOMACS_TARGET void load_planar(const T* x, Index row, Index rows, Index columns, Planar<T> to) {
  for (Index i = 0; i < rows; ++i)
    for (Index j = 0; j < columns; j += lanes<T>) {
      Vec<T> re, im;
      load_complex(x + 2 * (i * row + j), columns - j, re, im);
      store(to.row(i) + j, re);
      store(to.imag(i) + j, im);
    }
}

// `columns` of x to rows of `row` numbers
template <typename T>
LOMACS_TARGET void store_planar(Planar<T> x, Index rows, Index columns, T* to, Index row) {
  for (Index i = 0; i < rows; ++i)
    for (Index j = 0; j < columns; j += lanes<T>)
      store_complex(to + 2 * (i * row + j), columns - j, load(x.row(i) + j), load(x.imag(i) + j));
}

}  // namespace
}  // namespace LOMACS_ISA
}  // namespace lomacs
