// What the real stems share: tokens of one sample with channels as rows, so that every pass and every product
// runs over whole vectors of tokens; layer normalisation; fast exponentials. Included inside isa.inl.
#include "matmul.inl"

namespace lomacs {
namespace LOMACS_ISA {
namespace {

constexpr double log2_e = 1.44269504088896340736, ln_2 = 0.693147180559945309417;

// Tokens of the next sample and what this one will write, asked for so many lines at a time at `stops` places.
template <typename T>
struct TokensAhead {
  Ahead ahead;
  std::int64_t lines = 0;

  template <typename Job>
  void look_ahead(const Job& job, std::int64_t b, T* out, std::int64_t stops) {
    const std::int64_t size = job.tokens * job.d;
    const std::size_t bytes = sizeof(T) * static_cast<std::size_t>(size);
    ahead = Ahead();
    if (b + 1 < job.batch) {
      if (job.gy != nullptr) ahead.add(job.gy + (b + 1) * size, bytes);
      ahead.add(job.x + (b + 1) * size, bytes);
    }
    if (out != nullptr) ahead.add(out + b * size, bytes);
    lines = 3 * static_cast<std::int64_t>(bytes) / (64 * stops) + 1;
  }
};

// adding it leaves the nearest whole number, with the exponent's bias, in the low bits
template <typename T>
constexpr T to_whole = sizeof(T) == 4 ? T(12582912 + 127) : T(6755399441055744 + 1023);

// 2^(n + f) for f in [-1/2, 1/2] and `moved` = n + to_whole
template <typename T>
LOMACS_INLINE Vec<T> power_of_two(Vec<T> moved, Vec<T> f) {
  using Mask = typename Simd<T, LOMACS_BYTES>::Mask;
  // (ln 2)^n / n!
  constexpr double c[] = {1.0,
                          0.693147180559945309417,
                          0.240226506959100712334,
                          0.0555041086648215799531,
                          0.00961812910762847716198,
                          0.00133335581464284434234,
                          0.000154035303933816099544,
                          0.0000152527338040598402800,
                          0.00000132154867901443094884,
                          1.01780860092396997275e-7,
                          7.05491162080112332987e-9,
                          4.44553827187081149759e-10,
                          2.56784359934882051420e-11,
                          1.36914888539041288808e-12};
  constexpr int degree = sizeof(T) == 4 ? 7 : 13;
  Vec<T> p = splat(static_cast<T>(c[degree]));
#pragma GCC unroll 16
  for (int n = degree - 1; n >= 0; --n) p = p * f + splat(static_cast<T>(c[n]));
  return p * (Vec<T>)((Mask)moved << (sizeof(T) == 4 ? 23 : 52));
}

// 2^x for x <= 126 (1022), to 2 eps; 2^-126 (2^-1022) below that; NaN passes
template <typename T>
LOMACS_INLINE Vec<T> exp2_of(Vec<T> x) {
  const Vec<T> low = splat<T>(sizeof(T) == 4 ? T(-126) : T(-1022));
  x = x < low ? low : x;
  const Vec<T> moved = x + splat(to_whole<T>);
  return power_of_two<T>(moved, x - (moved - splat(to_whole<T>)));
}

// 1 / (1 + e^-x), to 3 eps
template <typename T>
LOMACS_INLINE Vec<T> sigmoid_of(Vec<T> x) {
  constexpr bool single = sizeof(T) == 4;
  const Vec<T> most = splat<T>(single ? T(87) : T(708));
  x = x > most ? most : x < -most ? -most : x;
  const Vec<T> moved = splat(to_whole<T>) - x * splat(static_cast<T>(log2_e));
  const Vec<T> n = moved - splat(to_whole<T>);
  // ln 2 in two parts, the first times n exact
  constexpr T high = single ? T(0.693145751953125) : T(0.6931471805592082);
  constexpr T rest = single ? T(1.4286068203094173e-06) : T(7.371002565167799e-13);
  const Vec<T> f = -(x + n * splat(high)) - n * splat(rest);
  return splat<T>(1) / (splat<T>(1) + power_of_two<T>(moved, f * splat(static_cast<T>(log2_e))));
}

// `to` (columns x vectors(rows)) = from^T, zeros beyond its rows
template <typename T>
LOMACS_TARGET __attribute__((noinline)) void tokens_to_rows(const T* from, std::int64_t from_row, std::int64_t rows,
                                                            std::int64_t columns, T* to, std::int64_t to_row) {
  for (std::int64_t j = 0; j < columns; j += lanes<T>) {
    const std::int64_t width = std::min<std::int64_t>(lanes<T>, columns - j);
    const Tail<T> tail(width % lanes<T>);
    for (std::int64_t i = 0; i < vectors(rows); i += lanes<T>) {
      const std::int64_t height = std::min<std::int64_t>(lanes<T>, rows - i);
      const T* p = from + i * from_row + j;
      Vec<T> x[lanes<T>];
      if (__builtin_expect(height == lanes<T> && width == lanes<T>, 1)) {
#pragma GCC unroll 16
        for (int n = 0; n < lanes<T>; ++n) x[n] = load(p + n * from_row);
        transpose_square<T>(x);
#pragma GCC unroll 16
        for (int n = 0; n < lanes<T>; ++n) store(to + (j + n) * to_row + i, x[n]);
      } else {
        alignas(LOMACS_BYTES) T square[lanes<T> * lanes<T>] = {};
        for (std::int64_t n = 0; n < height; ++n)
          store(square + n * lanes<T>, width == lanes<T> ? load(p + n * from_row) : tail.load(p + n * from_row));
        for (std::int64_t n = 0; n < width; ++n)
          for (std::int64_t m = 0; m < lanes<T>; ++m) to[(j + n) * to_row + i + m] = square[m * lanes<T> + n];
      }
    }
  }
}

// `to` (rows x columns) = from^T, plus `add` where there is one; `from` holds whole vectors of `rows`
template <typename T>
LOMACS_TARGET __attribute__((noinline)) void rows_to_tokens(const T* from, std::int64_t from_row, std::int64_t rows,
                                                            std::int64_t columns, const T* add, T* to,
                                                            std::int64_t to_row) {
  for (std::int64_t j = 0; j < columns; j += lanes<T>) {
    const std::int64_t width = std::min<std::int64_t>(lanes<T>, columns - j);
    const Tail<T> tail(width % lanes<T>);
    for (std::int64_t i = 0; i < rows; i += lanes<T>) {
      const std::int64_t height = std::min<std::int64_t>(lanes<T>, rows - i);
      T* q = to + i * to_row + j;
      Vec<T> x[lanes<T>];
      if (__builtin_expect(height == lanes<T> && width == lanes<T>, 1)) {
#pragma GCC unroll 16
        for (int n = 0; n < lanes<T>; ++n) x[n] = load(from + (j + n) * from_row + i);
        transpose_square<T>(x);
        if (add != nullptr)
#pragma GCC unroll 16
          for (int n = 0; n < lanes<T>; ++n) x[n] += load(add + (i + n) * to_row + j);
#pragma GCC unroll 16
        for (int n = 0; n < lanes<T>; ++n) store(q + n * to_row, x[n]);
      } else {
        for (std::int64_t m = 0; m < height; ++m)
          for (std::int64_t n = 0; n < width; ++n) {
            const T value = from[(j + n) * from_row + i + m];
            q[m * to_row + n] = add == nullptr ? value : value + add[(i + m) * to_row + j + n];
          }
      }
    }
  }
}

// Layer normalisation over the rows of x (d x tokens, whole vectors): x <- (x - mean) / deviation, and that
// times the weight plus the bias to `to`, which may be x. `inverse` is 1 / deviation a token.
template <typename T>
LOMACS_TARGET __attribute__((noinline)) void normalise(T* x, std::int64_t row, std::int64_t d, std::int64_t tokens,
                                                       const T* weight, const T* bias, T eps, T* inverse, T* to,
                                                       std::int64_t to_row) {
  const T share = T(1) / static_cast<T>(d);
  for (std::int64_t t = 0; t < tokens; t += lanes<T>) {
    Vec<T> part[4] = {};
    std::int64_t c = 0;
    for (; c + 4 <= d; c += 4)
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) part[n] += load(x + (c + n) * row + t);
    for (; c < d; ++c) part[0] += load(x + c * row + t);
    const Vec<T> mean = ((part[0] + part[1]) + (part[2] + part[3])) * splat(share);
    for (Vec<T>& p : part) p = Vec<T>{};
    for (c = 0; c + 4 <= d; c += 4)
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) {
        const Vec<T> e = load(x + (c + n) * row + t) - mean;
        store(x + (c + n) * row + t, e);
        part[n] += e * e;
      }
    for (; c < d; ++c) {
      const Vec<T> e = load(x + c * row + t) - mean;
      store(x + c * row + t, e);
      part[0] += e * e;
    }
    const Vec<T> variance = ((part[0] + part[1]) + (part[2] + part[3])) * splat(share) + splat(eps);
    const Vec<T> scale = splat<T>(1) / square_root<T>(variance);
    store(inverse + t, scale);
    for (c = 0; c < d; ++c) {
      const Vec<T> e = load(x + c * row + t) * scale;
      store(x + c * row + t, e);
      const T b = bias == nullptr ? T(0) : bias[c];
      store(to + c * to_row + t, e * splat(weight[c]) + splat(b));
    }
  }
}

// The gradient of what `normalise` gave, in place; x as it left it. Sums over tokens are added to the vectors
// of gw and gb, one a channel.
template <typename T>
LOMACS_TARGET __attribute__((noinline)) void normalise_backward(T* g, std::int64_t g_row, const T* x, std::int64_t row,
                                                                std::int64_t d, std::int64_t tokens, const T* weight,
                                                                const T* inverse, T* gw, T* gb) {
  const T share = T(1) / static_cast<T>(d);
  for (std::int64_t t = 0; t < tokens; t += lanes<T>) {
    Vec<T> sum[2] = {}, dot[2] = {};
    for (std::int64_t c = 0; c < d; ++c) {
      const Vec<T> e = load(g + c * g_row + t), h = load(x + c * row + t), w = e * splat(weight[c]);
      sum[c % 2] += w;
      dot[c % 2] += w * h;
      if (gw != nullptr) {
        store(gw + 16 * c, load(gw + 16 * c) + e * h);
        store(gb + 16 * c, load(gb + 16 * c) + e);
      }
    }
    const Vec<T> mean = (sum[0] + sum[1]) * splat(share), slope = (dot[0] + dot[1]) * splat(share);
    const Vec<T> scale = load(inverse + t);
    for (std::int64_t c = 0; c < d; ++c) {
      const Vec<T> w = load(g + c * g_row + t) * splat(weight[c]);
      store(g + c * g_row + t, (w - mean - load(x + c * row + t) * slope) * scale);
    }
  }
}

}  // namespace
}  // namespace LOMACS_ISA
}  // namespace lomacs
