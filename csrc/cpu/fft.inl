// Fourier transforms down the columns of a strip: `lanes` columns side by side, real parts of a row and then
// its imaginary parts. Included inside isa.inl after cmatmul.inl.

namespace lomacs {
namespace LOMACS_ISA {
namespace {

template <typename T>
constexpr std::int64_t strip_row = 2 * lanes<T>;

// Rows of a strip; SWAP exchanges real and imaginary parts, which turns a transform into its inverse.
template <bool SWAP, typename T>
struct InStrip {
  T* p;

  LOMACS_INLINE void read(std::int64_t i, Vec<T>& re, Vec<T>& im) const {
    re = load(p + i * strip_row<T> + (SWAP ? lanes<T> : 0));
    im = load(p + i * strip_row<T> + (SWAP ? 0 : lanes<T>));
  }
  LOMACS_INLINE void write(std::int64_t i, Vec<T> re, Vec<T> im) const {
    store(p + i * strip_row<T> + (SWAP ? lanes<T> : 0), re);
    store(p + i * strip_row<T> + (SWAP ? 0 : lanes<T>), im);
  }
};

// Columns of an interleaved matrix that is read, and scaled, by a forward transform.
template <typename T>
struct FromMatrix {
  const T* x;
  std::int64_t columns, count;
  T scale;

  LOMACS_INLINE void read(std::int64_t i, Vec<T>& re, Vec<T>& im) const {
    load_complex(x + 2 * i * columns, count, re, im);
    re *= splat(scale);
    im *= splat(scale);
  }
};

// Columns of an interleaved matrix that an inverse transform writes: swapped back.
template <typename T>
struct ToMatrix {
  T* x;
  std::int64_t columns, count;

  LOMACS_INLINE void write(std::int64_t i, Vec<T> re, Vec<T> im) const {
    store_complex(x + 2 * i * columns, count, im, re);
  }
};

template <typename T>
LOMACS_INLINE void sum_and_difference(Vec<T>& a, Vec<T>& b) {
  const Vec<T> x = a;
  a = x + b;
  b = x - b;
}

// a, b, c, d <- their transform
template <typename T>
LOMACS_INLINE void butterfly4(Vec<T>* re, Vec<T>* im, int a, int b, int c, int d) {
  sum_and_difference<T>(re[a], re[c]);
  sum_and_difference<T>(im[a], im[c]);
  sum_and_difference<T>(re[b], re[d]);
  sum_and_difference<T>(im[b], im[d]);
  sum_and_difference<T>(re[a], re[b]);
  sum_and_difference<T>(im[a], im[b]);
  // c -+ i d
  const Vec<T> r = re[c], i = im[c], x = re[d], y = im[d];
  re[c] = r + y;
  im[c] = i - x;
  re[d] = r - y;
  im[d] = i + x;
  // order 0, 2, 1, 3 lies in a, b, c, d
  std::swap(re[b], re[c]);
  std::swap(im[b], im[c]);
}

template <int R, typename T>
LOMACS_INLINE void butterfly(Vec<T> (&re)[R], Vec<T> (&im)[R], const FftPass<T>& pass) {
  if constexpr (R == 2) {
    sum_and_difference<T>(re[0], re[1]);
    sum_and_difference<T>(im[0], im[1]);
  } else if constexpr (R == 4) {
    butterfly4<T>(re, im, 0, 1, 2, 3);
  } else if constexpr (R == 8) {
    butterfly4<T>(re, im, 0, 2, 4, 6);
    butterfly4<T>(re, im, 1, 3, 5, 7);
    const Vec<T> half = splat(static_cast<T>(0.70710678118654752440));
    const Vec<T> r1 = (re[3] + im[3]) * half, i1 = (im[3] - re[3]) * half;
    const Vec<T> r2 = im[5], i2 = -re[5];
    const Vec<T> r3 = (im[7] - re[7]) * half, i3 = (im[7] + re[7]) * -half;
    const Vec<T> e0 = re[0], f0 = im[0], e1 = re[2], f1 = im[2], e2 = re[4], f2 = im[4], e3 = re[6], f3 = im[6];
    const Vec<T> r0 = re[1], i0 = im[1];
    re[0] = e0 + r0, im[0] = f0 + i0, re[4] = e0 - r0, im[4] = f0 - i0;
    re[1] = e1 + r1, im[1] = f1 + i1, re[5] = e1 - r1, im[5] = f1 - i1;
    re[2] = e2 + r2, im[2] = f2 + i2, re[6] = e2 - r2, im[6] = f2 - i2;
    re[3] = e3 + r3, im[3] = f3 + i3, re[7] = e3 - r3, im[7] = f3 - i3;
  } else {
    // pairs k and R - k: the cosines meet their sum, the sines their difference
    constexpr int half = R / 2;
    const T *cosines = pass.cosines.data(), *sines = pass.sines.data();
    Vec<T> sr[half], si[half], dr[half], di[half];
    const Vec<T> x = re[0], y = im[0];
#pragma GCC unroll 4
    for (int k = 1; k <= half; ++k) {
      sr[k - 1] = re[k] + re[R - k], si[k - 1] = im[k] + im[R - k];
      dr[k - 1] = re[k] - re[R - k], di[k - 1] = im[k] - im[R - k];
      re[0] += sr[k - 1];
      im[0] += si[k - 1];
    }
#pragma GCC unroll 4
    for (int q = 1; q <= half; ++q) {
      Vec<T> ar = x, ai = y, br{}, bi{};
#pragma GCC unroll 4
      for (int k = 1; k <= half; ++k) {
        const Vec<T> c = splat(cosines[q * k % R]), s = splat(sines[q * k % R]);
        ar += c * sr[k - 1], ai += c * si[k - 1];
        br += s * dr[k - 1], bi += s * di[k - 1];
      }
      re[q] = ar + bi, im[q] = ai - br;
      re[R - q] = ar - bi, im[R - q] = ai + br;
    }
  }
}

template <typename T>
LOMACS_INLINE void rotate(Vec<T>& re, Vec<T>& im, const T* w) {
  const Vec<T> wr = splat(w[0]), wi = splat(w[1]), x = re;
  re = x * wr - im * wi;
  im = x * wi + im * wr;
}

// FORWARD: butterflies and then twiddles; otherwise, for the inverse, twiddles first
template <int R, bool FORWARD, typename T, typename From, typename To>
LOMACS_TARGET __attribute__((noinline)) void fft_pass(const FftPass<T>& pass, std::int64_t n, From from,
                                                      To to) {
  const std::int64_t step = pass.step, block = R * step;
  for (std::int64_t j = 0; j < step; ++j) {
    const T* w = pass.twiddles.data() + 2 * (R - 1) * j;
    for (std::int64_t i = j; i < n; i += block) {
      Vec<T> re[R], im[R];
#pragma GCC unroll 8
      for (int k = 0; k < R; ++k) from.read(i + k * step, re[k], im[k]);
      if (!FORWARD && j > 0)
#pragma GCC unroll 8
        for (int k = 1; k < R; ++k) rotate<T>(re[k], im[k], w + 2 * (k - 1));
      butterfly<R, T>(re, im, pass);
      if (FORWARD && j > 0)
#pragma GCC unroll 8
        for (int k = 1; k < R; ++k) rotate<T>(re[k], im[k], w + 2 * (k - 1));
#pragma GCC unroll 8
      for (int k = 0; k < R; ++k) to.write(i + k * step, re[k], im[k]);
    }
  }
}

// the same for any odd radix; `room` holds 2 radix vectors
template <bool FORWARD, typename T, typename Where>
LOMACS_TARGET __attribute__((noinline)) void fft_odd_pass(const FftPass<T>& pass, std::int64_t n, Where rows,
                                                          T* room) {
  const std::int64_t R = pass.radix, step = pass.step, block = R * step, half = R / 2;
  const InStrip<false, T> kept{room};
  for (std::int64_t j = 0; j < step; ++j) {
    const T* w = pass.twiddles.data() + 2 * (R - 1) * j;
    for (std::int64_t i = j; i < n; i += block) {
      const auto read = [&](std::int64_t k, Vec<T>& re, Vec<T>& im) LOMACS_TARGET
          __attribute__((always_inline)) {
        rows.read(i + k * step, re, im);
        if (!FORWARD && j > 0 && k > 0) rotate<T>(re, im, w + 2 * (k - 1));
      };
      const auto write = [&](std::int64_t k, Vec<T> re, Vec<T> im) LOMACS_TARGET
          __attribute__((always_inline)) {
        if (FORWARD && j > 0 && k > 0) rotate<T>(re, im, w + 2 * (k - 1));
        rows.write(i + k * step, re, im);
      };
      Vec<T> x, y, total_re, total_im;
      read(0, x, y);
      total_re = x, total_im = y;
      for (std::int64_t k = 1; k <= half; ++k) {
        Vec<T> ar, ai, br, bi;
        read(k, ar, ai);
        read(R - k, br, bi);
        kept.write(2 * k - 2, ar + br, ai + bi);
        kept.write(2 * k - 1, ar - br, ai - bi);
        total_re += ar + br;
        total_im += ai + bi;
      }
      for (std::int64_t q = 1; q <= half; ++q) {
        Vec<T> ar = x, ai = y, br{}, bi{};
        for (std::int64_t k = 1, at = 0; k <= half; ++k) {
          at = at + q < R ? at + q : at + q - R;
          const Vec<T> c = splat(pass.cosines.data()[at]), s = splat(pass.sines.data()[at]);
          Vec<T> re, im;
          kept.read(2 * k - 2, re, im);
          ar += c * re, ai += c * im;
          kept.read(2 * k - 1, re, im);
          br += s * re, bi += s * im;
        }
        write(q, ar + bi, ai - br);
        write(R - q, ar - bi, ai + br);
      }
      write(0, total_re, total_im);
    }
  }
}

template <bool FORWARD, typename T>
LOMACS_TARGET void fft_in_place(const FftPass<T>& pass, std::int64_t n, T* strip, T* room) {
  const InStrip<!FORWARD, T> rows{strip};
  switch (pass.radix) {
    case 2: return fft_pass<2, FORWARD>(pass, n, rows, rows);
    case 3: return fft_pass<3, FORWARD>(pass, n, rows, rows);
    case 4: return fft_pass<4, FORWARD>(pass, n, rows, rows);
    case 5: return fft_pass<5, FORWARD>(pass, n, rows, rows);
    case 7: return fft_pass<7, FORWARD>(pass, n, rows, rows);
    case 8: return fft_pass<8, FORWARD>(pass, n, rows, rows);
    default: return fft_odd_pass<FORWARD>(pass, n, rows, room);
  }
}

template <typename T>
LOMACS_TARGET void forward_strip(const FftPlan<T>& plan, T* strip, T* room, std::size_t first = 0) {
  for (std::size_t k = first; k < plan.passes.size(); ++k)
    fft_in_place<true>(plan.passes[k], plan.n, strip, room);
}

template <typename T>
LOMACS_TARGET void inverse_strip(const FftPlan<T>& plan, T* strip, T* room, std::size_t last = 0) {
  for (std::size_t k = plan.passes.size(); k-- > last;)
    fft_in_place<false>(plan.passes[k], plan.n, strip, room);
}

// a strip of columns of a matrix; the first pass reads where they lie
template <typename T>
LOMACS_TARGET void forward_columns(const FftPlan<T>& plan, FromMatrix<T> from, T* strip, T* room) {
  const InStrip<false, T> rows{strip};
  const std::int64_t radix = plan.passes.empty() ? 0 : plan.passes[0].radix;
  if (radix == 8) fft_pass<8, true>(plan.passes[0], plan.n, from, rows);
  else if (radix == 4) fft_pass<4, true>(plan.passes[0], plan.n, from, rows);
  else
    for (std::int64_t i = 0; i < plan.n; ++i) {
      Vec<T> re, im;
      from.read(i, re, im);
      rows.write(i, re, im);
    }
  forward_strip(plan, strip, room, radix == 8 || radix == 4);
}

// back to columns of a matrix, unscaled; the last pass writes where they lie
template <typename T>
LOMACS_TARGET void inverse_columns(const FftPlan<T>& plan, T* strip, ToMatrix<T> to, T* room) {
  const InStrip<true, T> rows{strip};
  const std::int64_t radix = plan.passes.empty() ? 0 : plan.passes[0].radix;
  inverse_strip(plan, strip, room, radix == 8 || radix == 4);
  if (radix == 8) fft_pass<8, false>(plan.passes[0], plan.n, rows, to);
  else if (radix == 4) fft_pass<4, false>(plan.passes[0], plan.n, rows, to);
  else
    for (std::int64_t i = 0; i < plan.n; ++i) {
      Vec<T> re, im;
      rows.read(i, re, im);
      to.write(i, re, im);
    }
}

// A matrix in strips: rows rounded up to whole squares.
template <typename T>
struct Strips {
  T* data;
  std::int64_t rows;

  static std::int64_t size(std::int64_t rows, std::int64_t columns) {
    return up(rows) * 2 * up(columns);
  }
  static std::int64_t up(std::int64_t n) { return (n + lanes<T> - 1) / lanes<T> * lanes<T>; }
  T* at(std::int64_t strip, std::int64_t row) const { return data + (strip * up(rows) + row) * strip_row<T>; }
};

template <typename T>
LOMACS_TARGET void transpose_rows(const T* from, T* to) {
#pragma GCC unroll 1
  for (int part = 0; part < strip_row<T>; part += lanes<T>) {
    Vec<T> x[lanes<T>];
#pragma GCC unroll 16
    for (int i = 0; i < lanes<T>; ++i) x[i] = load(from + i * strip_row<T> + part);
    transpose_square<T>(x);
#pragma GCC unroll 16
    for (int i = 0; i < lanes<T>; ++i) store(to + i * strip_row<T> + part, x[i]);
  }
}

}  // namespace
}  // namespace LOMACS_ISA
}  // namespace lomacs
