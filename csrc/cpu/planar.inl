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

  T* row(Index i) const { return data + 2 * width * i; }
  T* imag(Index i) const { return row(i) + width; }
  Index vecs() const { return width / lanes<T>; }
};

template <typename T>
Planar<T> planar(Arena<T>& arena, Index rows, Index columns) {
  const Index width = whole_vectors<T>(columns);
  return {arena.take(2 * width * whole_blocks(rows)), width};
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

template <bool CONJ, typename T>
LOMACS_INLINE void accumulate(Vec<T> (&re)[block_rows], Vec<T> (&im)[block_rows], const Side<T>& left, Planar<T> right,
                              Index depth, Index i0, Index vec) {
  const Index row = left.row, column = left.column, step = 2 * right.width;
  const T *ar = left.re + i0 * row, *ai = left.im + i0 * row;
  const T *br = right.data + vec * lanes<T>, *bi = br + right.width;
  for (; depth > 0; --depth, ar += column, ai += column, br += step, bi += step) {
    const Vec<T> x = load(br), y = load(bi);
#pragma GCC unroll 8
    for (int i = 0; i < block_rows; ++i) {
      const Vec<T> a = splat(ar[i * row]), b = splat(ai[i * row]);
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
template <bool CONJ, typename T>
LOMACS_INLINE void accumulate_by_three(Vec<T> (&re)[block_rows], Vec<T> (&im)[block_rows], const Side<T>& left,
                                       Planar<T> right, Index depth, Index i0, Index vec) {
  const Index row = left.row, column = left.column, step = 2 * right.width;
  const T *ar = left.re + i0 * row, *ai = left.im + i0 * row;
  const T *br = right.data + vec * lanes<T>, *bi = br + right.width;
  Vec<T> first[block_rows] = {};
  for (; depth > 0; --depth, ar += column, ai += column, br += step, bi += step) {
    const Vec<T> x = load(br), y = load(bi), total = x + y, difference = y - x;
#pragma GCC unroll 8
    for (int i = 0; i < block_rows; ++i) {
      const Vec<T> a = splat(ar[i * row]), b = splat(ai[i * row]);
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

// c = x left right [+ y other]
template <bool CONJ, typename T, bool THREE = by_three<T>>
LOMACS_TARGET __attribute__((noinline)) void combined(Planar<T> c, Index rows, T x, const Side<T>& left, Planar<T> right,
                                                      Index depth, const Planar<T>* other = nullptr, T y = 0) {
  for (Index vec = 0; vec < c.vecs(); ++vec)
    for (Index i0 = 0; i0 < rows; i0 += block_rows) {
      Vec<T> re[block_rows] = {}, im[block_rows] = {};
      if constexpr (THREE) accumulate_by_three<CONJ, T>(re, im, left, right, depth, i0, vec);
      else accumulate<CONJ, T>(re, im, left, right, depth, i0, vec);
      T* p = c.row(i0) + vec * lanes<T>;
      if (other != nullptr) {
        const T* q = other->row(i0) + vec * lanes<T>;
#pragma GCC unroll 8
        for (int i = 0; i < block_rows; ++i) {
          store(p + i * 2 * c.width, x * re[i] + y * load(q + i * 2 * other->width));
          store(p + i * 2 * c.width + c.width, x * im[i] + y * load(q + i * 2 * other->width + other->width));
        }
      } else {
#pragma GCC unroll 8
        for (int i = 0; i < block_rows; ++i) {
          store(p + i * 2 * c.width, x * re[i]);
          store(p + i * 2 * c.width + c.width, x * im[i]);
        }
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

// to = from^H; both hold whole squares of vectors
template <typename T>
LOMACS_TARGET void adjoint_of(Planar<T> from, Index rows, Planar<T> to) {
  for (Index i = 0; i * lanes<T> < rows; ++i)
    for (Index j = 0; j < from.vecs(); ++j)
      for (int part = 0; part < 2; ++part) {
        Vec<T> x[lanes<T>];
#pragma GCC unroll 16
        for (int n = 0; n < lanes<T>; ++n)
          x[n] = load(from.row(i * lanes<T> + n) + part * from.width + j * lanes<T>);
        transpose_square<T>(x);
        const Vec<T> sign = splat(part == 0 ? T(1) : T(-1));
#pragma GCC unroll 16
        for (int n = 0; n < lanes<T>; ++n)
          store(to.row(j * lanes<T> + n) + part * to.width + i * lanes<T>, sign * x[n]);
      }
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
