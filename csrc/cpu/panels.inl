// Products of real matrices under the names of cmatmul.inl, which comes first: overloads on real panels and terms.

namespace lomacs {
namespace LOMACS_ISA {
namespace {

// with more rows GCC keeps accumulators in memory
constexpr int real_rows = LOMACS_ROWS * LOMACS_VECS < 8 ? LOMACS_ROWS * LOMACS_VECS : 8;

template <typename T>
LOMACS_INLINE Vec<T> load_real(const T* p, std::int64_t count) {
  if (__builtin_expect(count >= lanes<T>, 1)) return load(p);
  alignas(LOMACS_BYTES) T buffer[lanes<T>];
  store(buffer, Vec<T>{});
  std::memcpy(buffer, p, sizeof(T) * static_cast<std::size_t>(count));
  return load(buffer);
}

template <typename T>
LOMACS_INLINE void store_real(T* p, std::int64_t count, Vec<T> x) {
  if (__builtin_expect(count >= lanes<T>, 1)) return store(p, x);
  alignas(LOMACS_BYTES) T buffer[lanes<T>];
  store(buffer, x);
  std::memcpy(p, buffer, sizeof(T) * static_cast<std::size_t>(count));
}

// A real matrix in panels of two vectors of columns.
template <typename T>
struct RealPanels {
  T* data;
  std::int64_t rows;

  static constexpr std::int64_t step = 2 * lanes<T>, imag = 0;

  static std::int64_t size(std::int64_t rows, std::int64_t columns) {
    return (columns + step - 1) / step * rows * step;
  }
  T* at(std::int64_t i, std::int64_t vec) const {
    return data + (vec / 2 * rows + i) * step + vec % 2 * lanes<T>;
  }
};

template <typename T>
LOMACS_TARGET void pack(const T* x, std::int64_t rows, std::int64_t columns, RealPanels<T> to) {
  for (std::int64_t j = 0; j < columns; j += lanes<T>) {
    T* p = to.at(0, j / lanes<T>);
    for (std::int64_t i = 0; i < rows; ++i, p += RealPanels<T>::step)
      store(p, load_real(x + i * columns + j, columns - j));
  }
}

template <typename T>
LOMACS_TARGET void adjoint_square(RealPanels<T> from, std::int64_t i, std::int64_t j, RealPanels<T> to) {
  Vec<T> x[lanes<T>];
  const T* p = from.at(i * lanes<T>, j);
#pragma GCC unroll 16
  for (int n = 0; n < lanes<T>; ++n) x[n] = load(p + n * RealPanels<T>::step);
  transpose_square<T>(x);
  T* q = to.at(j * lanes<T>, i);
#pragma GCC unroll 16
  for (int n = 0; n < lanes<T>; ++n) store(q + n * RealPanels<T>::step, x[n]);
}

template <typename T>
LOMACS_TARGET void adjoint(RealPanels<T> from, std::int64_t rows, std::int64_t columns, RealPanels<T> to) {
  for (std::int64_t i = 0; i * lanes<T> < rows; ++i)
    for (std::int64_t j = 0; j * lanes<T> < columns; ++j) adjoint_square(from, i, j, to);
}

template <typename T>
LOMACS_TARGET void mirror(RealPanels<T> x, std::int64_t n) {
  for (std::int64_t j = 1; j * lanes<T> < n; ++j)
    for (std::int64_t i = 0; i < j; ++i) adjoint_square(x, i, j, x);
}

// sum_m x_mk y_mk for every column k, in short chains
template <typename T>
LOMACS_TARGET void column_dots(RealPanels<T> X, const T* y, std::int64_t rows, std::int64_t r, T* dots, T*) {
  for (std::int64_t j = 0; j < r; j += lanes<T>) {
    const T* p = X.at(0, j / lanes<T>);
    Vec<T> total{};
    for (std::int64_t m = 0; m < rows;) {
      Vec<T> part{};
      for (const std::int64_t stop = std::min<std::int64_t>(m + 8, rows); m < stop; ++m)
        part += load(p + m * RealPanels<T>::step) * load_real(y + m * r + j, r - j);
      total += part;
    }
    store(dots + j, total);
  }
}

// Number (i, k) of the left factor lies at a[i row + k column].
template <typename T>
struct RealTerm {
  Left<T> left;
  RealPanels<T> right;
  std::int64_t depth;
};

template <int R, int V, typename T, typename Sink>
LOMACS_INLINE void block(const RealTerm<T>& term, Sink& sink, std::int64_t i0, std::int64_t vec, Ahead& ahead) {
  Ahead::Run run = ahead.next(term.depth);
  const std::int64_t row = term.left.row, column = term.left.column;
  const T* a = term.left.a + i0 * row;
  const T* b = term.right.at(0, vec);
  Vec<T> x[R][V] = {};
  for (std::int64_t k = term.depth; k > 0; --k, a += column, b += RealPanels<T>::step) {
    run.step();
    Vec<T> right[V];
#pragma GCC unroll 2
    for (int j = 0; j < V; ++j) right[j] = load(b + j * lanes<T>);
#pragma GCC unroll 12
    for (int i = 0; i < R; ++i) {
      const Vec<T> left = splat(a[i * row]);
#pragma GCC unroll 2
      for (int j = 0; j < V; ++j) x[i][j] += left * right[j];
    }
  }
  sink.template take<R, V>(x, i0, vec);
}

// the tallest blocks that fit, from i0 on
template <int V, int R = real_rows, typename T, typename Sink>
LOMACS_INLINE void column_of_blocks(std::int64_t rows, const RealTerm<T>& term, Sink& sink, std::int64_t i0,
                                    std::int64_t vec, Ahead& ahead) {
  for (; i0 + R <= rows; i0 += R) block<R, V>(term, sink, i0, vec, ahead);
  if constexpr (R > 1) column_of_blocks<V, (R + 1) / 2>(rows, term, sink, i0, vec, ahead);
}

// sink <- left right; upper: no vectors left of the diagonal's. A real factor is its own conjugate.
template <bool CONJ, typename T, typename Sink>
LOMACS_TARGET __attribute__((noinline)) void product(const RealTerm<T> (&terms)[1], Sink& sink,
                                                     std::int64_t rows, std::int64_t columns, Ahead& ahead,
                                                     Part part = Part::all) {
  const std::int64_t vecs = (columns + lanes<T> - 1) / lanes<T>;
  for (std::int64_t first = 0; first < vecs; first += 2) {
    // rows that need the first vector of the pair, and the second
    const std::int64_t one = part == Part::upper ? std::min(rows, (first + 1) * lanes<T>) : rows;
    const std::int64_t other = part == Part::upper ? std::min(rows, (first + 2) * lanes<T>) : rows;
    if (first + 1 < vecs) {
      column_of_blocks<2>(one, terms[0], sink, 0, first, ahead);
      column_of_blocks<1>(other, terms[0], sink, one, first + 1, ahead);
    } else {
      column_of_blocks<1>(one, terms[0], sink, 0, first, ahead);
    }
  }
}

}  // namespace
}  // namespace LOMACS_ISA
}  // namespace lomacs
