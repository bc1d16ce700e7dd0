// The frequency gate sample by sample: transform, statistics, perceptrons, gate and the way back, and their
// gradients, all in the cache. Included inside isa.inl.
// Spectra lie transposed, in strips of row frequencies, and in the order that the transforms leave.
#include "dual_view.inl"
#include "fft.inl"

namespace lomacs {
namespace LOMACS_ISA {
namespace {

template <typename T>
struct GateScratch {
  // `lanes` columns of the channel
  T* strip;
  // spectra of the channel and of the gradient
  Strips<T> spectrum, other;
  // gate and 1 / |Hf|, a number a frequency, in strips of `lanes`
  T *gate, *inverse;
  // sums over rows that still want summing over lanes
  T* column;
  T *rho, *kappa, *row_hidden, *col_hidden, *row_logits, *col_logits;
  T *row_power, *col_power, *row_shift, *col_shift;
  T *g_rows, *g_cols, *g_row_hidden, *g_col_hidden;
  // a side in the order of its frequencies
  T* natural;
  T* room;
  T* memory = nullptr;
  std::int64_t size = 0;

  GateScratch(const Gate<T>& job, bool backward) {
    const std::int64_t M = job.M, N = job.N, hidden = padded(job.hidden);
    const std::int64_t Mp = padded(M), Np = padded(N);
    for (int round = 0; round < 2; ++round) {
      T* next = memory;
      const auto take = [&](std::int64_t n) {
        T* p = next;
        // odd multiples of a cache line keep equal offsets apart
        const std::int64_t whole = (n + 31) / 32 * 32 + 16;
        next = round ? next + whole : nullptr;
        size = round ? size : size + whole;
        return p;
      };
      strip = take(Mp * strip_row<T>);
      spectrum = {take(Strips<T>::size(N, M)), N};
      other = {take(backward ? Strips<T>::size(N, M) : 0), N};
      gate = take(backward ? Np * Mp : 0);
      inverse = take(backward ? Np * Mp : 0);
      column = take(Np * lanes<T>);
      for (T** p : {&rho, &row_logits, &row_power, &row_shift, &g_rows}) *p = take(Mp);
      for (T** p : {&kappa, &col_logits, &col_power, &col_shift, &g_cols}) *p = take(Np);
      for (T** p : {&row_hidden, &col_hidden, &g_row_hidden, &g_col_hidden}) *p = take(hidden);
      natural = take(std::max(Mp, Np));
      room = take(strip_row<T> * std::max(job.rows->widest(), job.cols->widest()));
      if (round == 0) memory = allocate<T>(size);
    }
    std::memset(memory, 0, sizeof(T) * static_cast<std::size_t>(size));
  }
  ~GateScratch() { release(memory); }
  GateScratch(const GateScratch&) = delete;
  GateScratch& operator=(const GateScratch&) = delete;
};

template <typename T>
LOMACS_INLINE Vec<T> larger(Vec<T> a, Vec<T> b) {
  // NaN of b stays
  return a > b ? a : b;
}

// 1 / sqrt(x) of a positive x
template <typename T>
LOMACS_INLINE Vec<T> inverse_root(Vec<T> x) {
#if LOMACS_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    const Vec<T> y = (Vec<T>)_mm512_rsqrt14_ps((__m512)x);
    return y * (T(1.5) - (T(0.5) * x * y) * y);
  }
#endif
  return T(1) / square_root<T>(x);
}

// 1 / x of an x between 1 and 2^102
template <typename T>
LOMACS_INLINE Vec<T> reciprocal(Vec<T> x) {
#if LOMACS_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    const Vec<T> y = (Vec<T>)_mm512_rcp14_ps((__m512)x);
    return y + y * (T(1) - x * y);
  }
#endif
  return T(1) / x;
}

// y = x W of `count` rows, `width` numbers each
template <typename T>
LOMACS_TARGET void combine_rows(const T* x, const T* W, std::int64_t count, std::int64_t width, T* y) {
  for (std::int64_t j = 0; j < width; j += lanes<T>) {
    Vec<T> total[4] = {};
    std::int64_t i = 0;
    for (; i + 4 <= count; i += 4)
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) total[k] += splat(x[i + k]) * load(W + (i + k) * width + j);
    for (; i < count; ++i) total[0] += splat(x[i]) * load(W + i * width + j);
    store(y + j, (total[0] + total[1]) + (total[2] + total[3]));
  }
}

// W += x^T y
template <typename T>
LOMACS_TARGET void add_outer(const T* x, const T* y, std::int64_t count, std::int64_t width, T* W) {
  for (std::int64_t j = 0; j < width; j += lanes<T>) {
    const Vec<T> right = load(y + j);
    for (std::int64_t i = 0; i < count; ++i) {
      T* p = W + i * width + j;
      store(p, load(p) + splat(x[i]) * right);
    }
  }
}

// What a sample is multiplied by: `power` of two, so that no square leaves the precision, then `down`; what it
// should have been is `up` times that. With normalize `up` is 1 and `down` holds 1 / norm, 1 for a zero sample.
struct Scale {
  double power, down, up, norm;
};

template <typename T>
LOMACS_TARGET Scale survey(const T* x, std::int64_t count, bool normalize) {
  const std::int64_t whole = count / (4 * lanes<T>) * (4 * lanes<T>);
  Vec<T> top[4] = {}, square[4] = {};
  for (std::int64_t i = 0; i < whole; i += 4 * lanes<T>)
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const Vec<T> v = load(x + i + k * lanes<T>);
      top[k] = larger<T>(larger<T>(v, -v), top[k]);
      square[k] += v * v;
    }
  const Vec<T> most = larger<T>(larger<T>(top[0], top[1]), larger<T>(top[2], top[3]));
  double peak = 0, squares = sum<T>((square[0] + square[1]) + (square[2] + square[3]));
  for (int i = 0; i < lanes<T>; ++i) peak = std::max(peak, static_cast<double>(most[i]));
  for (std::int64_t i = whole; i < count; ++i) {
    const double v = x[i];
    peak = std::max(peak, std::abs(v));
    squares += v * v;
  }
  // squares of numbers a rounding error below the peak must stay, too
  constexpr bool single = sizeof(T) == 4;
  double power = 1;
  if (peak > 0 && !(peak >= (single ? 0x1p-16 : 0x1p-300) && peak <= (single ? 0x1p40 : 0x1p300)) &&
      peak <= std::numeric_limits<double>::max()) {
    power = std::ldexp(1.0, std::min(-std::ilogb(peak), single ? 100 : 900));
    squares = 0;
    for (std::int64_t i = 0; i < count; ++i) {
      const double v = static_cast<double>(x[i]) * power;
      squares += v * v;
    }
  }
  if (!normalize) return {power, 1, 1 / power, 0};
  const double norm = std::sqrt(squares);
  return {power, norm != 0 ? 1 / norm : 1, 1, norm / power};
}

// spectrum <- transform down the columns of the interleaved x, times scale
template <typename T>
LOMACS_TARGET void transform(const Gate<T>& job, const T* x, T scale, Strips<T> to, const GateScratch<T>& s) {
  // what lies beyond the last row enters the sums over rows
  const std::int64_t M = job.M, N = job.N, beyond = Strips<T>::up(M) - M;
  std::memset(s.strip + M * strip_row<T>, 0, sizeof(T) * static_cast<std::size_t>(beyond * strip_row<T>));
  for (std::int64_t j = 0; j < N; j += lanes<T>) {
    forward_columns(*job.rows, FromMatrix<T>{x + 2 * j, N, N - j, scale}, s.strip, s.room);
    for (std::int64_t i = 0; i < M; i += lanes<T>)
      transpose_rows(s.strip + i * strip_row<T>, to.at(i / lanes<T>, j));
  }
}

// interleaved x <- transform back of the spectrum
template <typename T>
LOMACS_TARGET void transform_back(const Gate<T>& job, Strips<T> from, T* x, const GateScratch<T>& s) {
  for (std::int64_t j = 0; j < job.N; j += lanes<T>) {
    for (std::int64_t i = 0; i < job.M; i += lanes<T>)
      transpose_rows(from.at(i / lanes<T>, j), s.strip + i * strip_row<T>);
    inverse_columns(*job.rows, s.strip, ToMatrix<T>{x + 2 * j, job.N, job.N - j}, s.room);
  }
}

// the sum of the lanes of every x
template <typename T>
LOMACS_INLINE Vec<T> sums_of_lanes(Vec<T> (&x)[lanes<T>]) {
  transpose_square<T>(x);
#pragma GCC unroll 4
  for (int width = lanes<T> / 2; width > 0; width /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  return x[0];
}

// to[n] = factor times the sum of the lanes of row n
template <typename T>
LOMACS_TARGET void sum_lanes(const T* rows, std::int64_t n, double factor, T* to) {
  for (std::int64_t j = 0; j < n; j += lanes<T>) {
    Vec<T> x[lanes<T>];
#pragma GCC unroll 16
    for (int i = 0; i < lanes<T>; ++i) x[i] = load(rows + (j + i) * lanes<T>);
    store(to + j, sums_of_lanes<T>(x) * splat(static_cast<T>(factor)));
  }
}

// y = W x of a W as it is given, (n, width) without padding; y is padded, with zeros
template <typename T>
LOMACS_TARGET void dot_rows(const T* W, std::int64_t n, std::int64_t width, const T* x, T* y) {
  const std::int64_t whole = width / lanes<T> * lanes<T>;
  const Tail<T> tail(width - whole);
  for (std::int64_t i = 0; i < n; i += lanes<T>, W += lanes<T> * width) {
    Vec<T> total[lanes<T>] = {};
    const auto add = [&](int k) LOMACS_TARGET {
      const T* row = W + k * width;
      for (std::int64_t j = 0; j < whole; j += lanes<T>) total[k] += load(row + j) * load(x + j);
      if (whole < width) total[k] += tail.load(row + whole) * tail.load(x + whole);
    };
    if (i + lanes<T> <= n) {
#pragma GCC unroll 16
      for (int k = 0; k < lanes<T>; ++k) add(k);
    } else {
      for (int k = 0; k < n - i; ++k) add(k);
    }
    store(y + i, sums_of_lanes<T>(total));
  }
}

// exp(-logit / T) as a number in [1, 2) times a power of two: their product spans what no exponential could
template <typename T>
LOMACS_TARGET void powers(const T* logits, std::int64_t n, double temperature, T* power, T* shift) {
  for (std::int64_t i = 0; i < n; ++i) {
    const double x = static_cast<double>(logits[i]) * (-1.44269504088896340736 / temperature);
    const double whole = std::floor(x);
    shift[i] = static_cast<T>(whole);
    power[i] = std::isinf(x) ? T(1) : std::exp2(static_cast<T>(x - whole));
  }
}

template <typename T>
LOMACS_INLINE Vec<T> sigmoid(Vec<T> row_power, Vec<T> row_shift, T col_power, T col_shift) {
  using Mask = typename Simd<T, LOMACS_BYTES>::Mask;
  constexpr int limit = sizeof(T) == 4 ? 120 : 1000, bias = sizeof(T) == 4 ? 127 : 1023;
  constexpr int mantissa = sizeof(T) == 4 ? 23 : 52;
  const Vec<T> most = splat(static_cast<T>(limit)), sum = row_shift + splat(col_shift);
  Vec<T> k = sum <= most ? sum : most;
  k = k < -most ? -most : k;
  const Mask bits = (__builtin_convertvector(k, Mask) + bias) << mantissa;
  Vec<T> scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  const Vec<T> gate = reciprocal<T>(T(1) + row_power * splat(col_power) * scale);
  // a gate that rounds to zero passes nothing of a channel of any size; NaN stays
  return sum > most ? Vec<T>{} : gate;
}

// Spectrum of x, its statistics, both perceptrons and the factors of the gate; for gradients `inverse` too.
template <typename T, bool BACKWARD>
LOMACS_TARGET Scale measure(const Gate<T>& job, std::int64_t b, const GateScratch<T>& s) {
  const std::int64_t M = job.M, N = job.N;
  const T* x = job.H + 2 * b * M * N;
  const Scale scale = survey(x, 2 * M * N, job.normalize);
  std::vector<T> scaled;
  if (scale.power != 1) {
    scaled.assign(x, x + 2 * M * N);
    for (T& value : scaled) value *= static_cast<T>(scale.power);
    x = scaled.data();
  }
  transform(job, x, static_cast<T>(scale.down * job.ortho), s.spectrum, s);
  const Vec<T> tiny = splat(std::numeric_limits<T>::min());
  for (std::int64_t k = 0; k * lanes<T> < M; ++k) {
    T* p = s.spectrum.at(k, 0);
    forward_strip(*job.cols, p, s.room);
    Vec<T> total{};
    T* inverse = s.inverse + k * padded(N) * lanes<T>;
    for (std::int64_t n = 0; n < N; ++n, p += strip_row<T>) {
      const Vec<T> re = load(p), im = load(p + lanes<T>);
      const Vec<T> square = re * re + im * im;
      // 1 / |z| is finite at 0, so that z / |z| is 0 there
      const Vec<T> y = inverse_root<T>(larger<T>(tiny, square));
      const Vec<T> size = square * y;
      if constexpr (BACKWARD) store(inverse + n * lanes<T>, y);
      total += size;
      T* c = s.column + n * lanes<T>;
      store(c, k ? load(c) + size : size);
    }
    store(s.rho + k * lanes<T>, total * splat(static_cast<T>(scale.up / static_cast<double>(N))));
  }
  sum_lanes(s.column, N, scale.up / static_cast<double>(M), s.kappa);
  const auto perceptron = [&](const Perceptron<T>& p, const T* in, T* hidden, T* logits, T* power,
                              T* shift) LOMACS_TARGET {
    for (std::int64_t k = 0; k < p.n; ++k) s.natural[p.frequency[k]] = in[k];
    dot_rows(p.first, p.hidden, p.n, s.natural, hidden);
    for (std::int64_t k = 0; k < p.hidden; ++k) hidden[k] = hidden[k] < 0 ? 0 : hidden[k];
    dot_rows(p.second, p.n, p.hidden, hidden, s.natural);
    for (std::int64_t k = 0; k < p.n; ++k) logits[k] = s.natural[p.frequency[k]];
    powers(logits, p.n, job.temperature, power, shift);
  };
  perceptron(*job.row_mlp, s.rho, s.row_hidden, s.row_logits, s.row_power, s.row_shift);
  perceptron(*job.col_mlp, s.kappa, s.col_hidden, s.col_logits, s.col_power, s.col_shift);
  return scale;
}

// row of a kept strip: 16 real parts, 16 imaginary parts
constexpr std::int64_t kept_row = 32;

// strip k of a kept spectrum of N columns
template <typename T>
LOMACS_INLINE T* kept_strip(T* spectrum, std::int64_t k, std::int64_t N) {
  return spectrum + k * lanes<T> / 16 * N * kept_row + k * lanes<T> % 16;
}

// what the gradients read beside the spectrum
template <typename T>
LOMACS_TARGET void keep_statistics(const Gate<T>& job, const Kept<T>& kept, const Scale& scale,
                                   const GateScratch<T>& s) {
  const std::int64_t N = job.N;
  std::copy_n(s.rho, padded(job.M), kept.rho);
  std::copy_n(s.kappa, padded(N), kept.kappa);
  std::copy_n(s.row_hidden, padded(job.row_mlp->hidden), kept.row_hidden);
  std::copy_n(s.col_hidden, padded(job.col_mlp->hidden), kept.col_hidden);
  std::fill_n(kept.up, 16, static_cast<T>(scale.up));
  // strips that no row frequency reaches
  for (std::int64_t k = (job.M + lanes<T> - 1) / lanes<T>; k * lanes<T> < padded(job.M); ++k) {
    T* p = kept_strip(kept.spectrum, k, N);
    for (std::int64_t n = 0; n < N; ++n, p += kept_row) store(p, Vec<T>{}), store(p + 16, Vec<T>{});
  }
}

template <bool KEEP, typename T>
LOMACS_TARGET void gate_sample(const Gate<T>& job, std::int64_t b, const GateScratch<T>& s) {
  const std::int64_t M = job.M, N = job.N;
  const Scale scale = measure<T, false>(job, b, s);
  if (job.norms) job.norms[b] = static_cast<T>(scale.norm);
  T* spectrum = nullptr;
  if constexpr (KEEP) {
    const Kept<T> kept = job.kept_of(b);
    keep_statistics(job, kept, scale, s);
    spectrum = kept.spectrum;
  }
  const Vec<T> back = splat(static_cast<T>(scale.up * job.ortho));
  for (std::int64_t k = 0; k * lanes<T> < M; ++k) {
    const Vec<T> power = load(s.row_power + k * lanes<T>);
    const Vec<T> shift = load(s.row_shift + k * lanes<T>);
    T *p = s.spectrum.at(k, 0), *keep = KEEP ? kept_strip(spectrum, k, N) : nullptr;
    for (std::int64_t n = 0; n < N; ++n, p += strip_row<T>) {
      const Vec<T> gate = sigmoid<T>(power, shift, s.col_power[n], s.col_shift[n]), through = gate * back;
      const Vec<T> re = load(p), im = load(p + lanes<T>);
      store(p, re * through);
      store(p + lanes<T>, im * through);
      if constexpr (KEEP) {
        const Vec<T> slope = gate * (T(1) - gate);
        store(keep, re * slope);
        store(keep + 16, im * slope);
        keep += kept_row;
      }
    }
    inverse_strip(*job.cols, s.spectrum.at(k, 0), s.room);
  }
  transform_back(job, s.spectrum, job.Hd + 2 * b * M * N, s);
}

// gradients of one perceptron from that of its logits; the gradient of its input takes the place of that
template <typename T>
LOMACS_TARGET void perceptron_back(const Perceptron<T>& p, const T* in, const T* hidden, T* g, T* g_hidden,
                                   T* gw1, T* gw2, bool gh) {
  combine_rows(g, p.w2.data(), p.n, padded(p.hidden), g_hidden);
  for (std::int64_t k = 0; k < padded(p.hidden); ++k) g_hidden[k] = hidden[k] > 0 ? g_hidden[k] : 0;
  if (gw1 != nullptr) {
    add_outer(g, hidden, p.n, padded(p.hidden), gw2);
    add_outer(g_hidden, in, p.hidden, padded(p.n), gw1);
  }
  if (gh) combine_rows(g_hidden, p.w1.data(), p.hidden, padded(p.n), g);
}

// gradients of sample b from that of its result, gHd
template <typename T>
LOMACS_TARGET void gate_sample_back(const Gate<T>& job, std::int64_t b, const T* gHd, const GateScratch<T>& s,
                                    const GateSums<T>& sums) {
  const std::int64_t M = job.M, N = job.N, width = padded(N) * lanes<T>;
  const Scale scale = measure<T, true>(job, b, s);
  transform(job, gHd, static_cast<T>(job.ortho), s.other, s);

  const Vec<T> factor = splat(static_cast<T>(scale.up / job.temperature));
  // Re <F, gate gY>: the part of the norm's gradient that the statistics do not give
  Vec<T> dot{};
  for (std::int64_t k = 0; k * lanes<T> < M; ++k) {
    T* q = s.other.at(k, 0);
    forward_strip(*job.cols, q, s.room);
    const Vec<T> power = load(s.row_power + k * lanes<T>);
    const Vec<T> shift = load(s.row_shift + k * lanes<T>);
    const T* p = s.spectrum.at(k, 0);
    Vec<T> total{}, dots{};
    for (std::int64_t n = 0; n < N; ++n, p += strip_row<T>, q += strip_row<T>) {
      const Vec<T> gate = sigmoid<T>(power, shift, s.col_power[n], s.col_shift[n]);
      store(s.gate + k * width + n * lanes<T>, gate);
      const Vec<T> passed = (load(p) * load(q) + load(p + lanes<T>) * load(q + lanes<T>)) * gate;
      const Vec<T> g = passed * (T(1) - gate) * factor;
      dots += passed;
      total += g;
      T* c = s.column + n * lanes<T>;
      store(c, k ? load(c) + g : g);
    }
    store(s.g_rows + k * lanes<T>, total);
    dot += dots;
  }
  sum_lanes(s.column, N, 1, s.g_cols);
  perceptron_back(*job.row_mlp, s.rho, s.row_hidden, s.g_rows, s.g_row_hidden, sums.row_w1, sums.row_w2,
                  job.gH != nullptr);
  perceptron_back(*job.col_mlp, s.kappa, s.col_hidden, s.g_cols, s.g_col_hidden, sums.col_w1, sums.col_w2,
                  job.gH != nullptr);
  if (job.gH == nullptr) return;

  double along = 0, shrink = 1;
  if (job.normalize) {
    // X = H / |H|: what of the gradient lies along X is lost, and the norm has a gradient of its own
    along = sum<T>(dot);
    for (std::int64_t m = 0; m < M; ++m) along += static_cast<double>(s.g_rows[m]) * s.rho[m];
    for (std::int64_t n = 0; n < N; ++n) along += static_cast<double>(s.g_cols[n]) * s.kappa[n];
    shrink = scale.norm != 0 ? 1 / scale.norm : 1;
    along = -along + (job.gnorms ? static_cast<double>(job.gnorms[b]) * scale.norm : 0);
  }
  const Vec<T> straight = splat(static_cast<T>(shrink * job.ortho));
  const Vec<T> back = splat(static_cast<T>(along * shrink * job.ortho));
  for (std::int64_t n = 0; n < N; ++n)
    s.g_cols[n] = static_cast<T>(static_cast<double>(s.g_cols[n]) / static_cast<double>(M));
  for (std::int64_t k = 0; k * lanes<T> < M; ++k) {
    const Vec<T> g_row = load(s.g_rows + k * lanes<T>) * splat(static_cast<T>(1 / static_cast<double>(N)));
    const T* p = s.spectrum.at(k, 0);
    T* q = s.other.at(k, 0);
    for (std::int64_t n = 0; n < N; ++n, p += strip_row<T>, q += strip_row<T>) {
      const std::int64_t at = k * width + n * lanes<T>;
      const Vec<T> gate = load(s.gate + at) * straight;
      const Vec<T> radial = (g_row + splat(s.g_cols[n])) * load(s.inverse + at) * straight + back;
      store(q, gate * load(q) + radial * load(p));
      store(q + lanes<T>, gate * load(q + lanes<T>) + radial * load(p + lanes<T>));
    }
    inverse_strip(*job.cols, s.other.at(k, 0), s.room);
  }
  transform_back(job, s.other, job.gH + 2 * b * M * N, s);
}

template <typename T>
LOMACS_TARGET void gate_samples(const Gate<T>& job, std::int64_t begin, std::int64_t end) {
  const GateScratch<T> scratch(job, false);
  for (std::int64_t b = begin; b < end; ++b) gate_sample<false>(job, b, scratch);
}

template <typename T>
LOMACS_TARGET void gate_and_project_samples(const Gate<T>& job, const Projection<T>& projection, T* X,
                                            std::int64_t begin, std::int64_t end) {
  const GateScratch<T> scratch(job, false);
  ProjectionScratch<T> more(projection);
  const std::int64_t M = job.M, d = projection.d, whole = 2 * M * job.N, tokens = M * d;
  for (std::int64_t b = begin; b < end; ++b) {
    if (job.kept != nullptr) gate_sample<true>(job, b, scratch);
    else gate_sample<false>(job, b, scratch);
    Ahead ahead;
    if (b + 1 < end) {
      const T* kept = job.kept ? job.kept_of(b + 1).spectrum : nullptr;
      ahead = ahead_of<T>(M, d, {{X + (b + 1) * tokens, tokens}, {job.Hd + (b + 1) * whole, whole},
                                 {kept, job.kept_size()}, {job.H + (b + 1) * whole, whole}});
    }
    project_rows<true>(projection, job.Hd + b * whole, 0, M, X + b * tokens, more, &ahead);
  }
}

template <typename T>
LOMACS_TARGET void project_part(const Projection<T>& projection, const T* Hd, std::int64_t begin, std::int64_t end,
                                T* X) {
  ProjectionScratch<T> scratch(projection);
  project_rows(projection, Hd, begin, end, X, scratch);
}

template <typename T>
LOMACS_INLINE void clear_sums(const Gate<T>& job, const GateSums<T>& sums) {
  const std::int64_t count = job.row_mlp->sums() + job.col_mlp->sums();
  if (sums.row_w1 != nullptr) std::memset(sums.row_w1, 0, sizeof(T) * static_cast<std::size_t>(count));
}

// chunks of samples; each has its own sums of the gradients of the weights
template <typename T>
LOMACS_TARGET void gate_chunks_back(const Gate<T>& job, std::int64_t B, std::int64_t begin, std::int64_t end) {
  const GateScratch<T> scratch(job, true);
  for (std::int64_t c = begin; c < end; ++c) {
    const GateSums<T> sums = job.sums_of(c);
    clear_sums(job, sums);
    const std::int64_t stop = std::min(B, (c + 1) * job.chunk);
    for (std::int64_t b = c * job.chunk; b < stop; ++b)
      gate_sample_back(job, b, job.gHd + 2 * b * job.M * job.N, scratch, sums);
  }
}

// The same from the gradient gX of the tokens and `more`, that of Hd itself: their sum stays in the cache.
template <typename T>
LOMACS_TARGET void front_chunks_back(const Gate<T>& job, const Projection<T>& projection, const T* gX, const T* more,
                                     T* projection_sums, std::int64_t B, std::int64_t begin, std::int64_t end) {
  const GateScratch<T> scratch(job, true);
  ProjectionScratch<T> other(projection);
  const std::int64_t whole = 2 * job.M * job.N, tokens = job.M * projection.d;
  const Memory<T> gHd(whole);
  for (std::int64_t c = begin; c < end; ++c) {
    const GateSums<T> sums = job.sums_of(c);
    clear_sums(job, sums);
    T* own = projection_sums ? projection_sums + c * projection.sums() : nullptr;
    const std::int64_t from = c * job.chunk, stop = std::min(B, from + job.chunk);
    for (std::int64_t b = from; b < stop; ++b) {
      const bool last = b + 1 == B;
      const T *g = gX + b * tokens, *x = job.Hd + b * whole, *y = more ? more + b * whole : nullptr;
      Ahead of_weight = ahead_of<T>(projection.d, whole / job.M, {{job.H + b * whole, whole}, {y, whole}});
      Ahead of_channel = ahead_of<T>(job.M, whole / job.M, {{last ? nullptr : g + tokens, tokens},
                                                                    {last ? nullptr : x + whole, whole}});
      project_sample_back<true>(projection, g, x, y, gHd.p, own, b == from, other, &of_weight, &of_channel);
      gate_sample_back(job, b, gHd.p, scratch, sums);
    }
  }
}

// gradients g of the logits of one sample, rows and then columns, from that of its result and what its forward kept
template <typename T>
LOMACS_TARGET void logits_back(const Gate<T>& job, const T* gHd, const Kept<T>& kept, const GateScratch<T>& s, T* g) {
  const std::int64_t M = job.M, N = job.N;
  transform(job, gHd, static_cast<T>(job.ortho), s.spectrum, s);
  const T factor = static_cast<T>(static_cast<double>(*kept.up) / job.temperature);
  for (std::int64_t k = 0; k * lanes<T> < M; ++k) {
    const T *q = s.spectrum.at(k, 0), *p = kept_strip(kept.spectrum, k, N);
    forward_strip(*job.cols, s.spectrum.at(k, 0), s.room);
    Vec<T> total{};
    for (std::int64_t n = 0; n < N; ++n, p += kept_row, q += strip_row<T>) {
      const Vec<T> x = load(p) * load(q) + load(p + 16) * load(q + lanes<T>);
      total += x;
      T* c = s.column + n * lanes<T>;
      store(c, k ? load(c) + x : x);
    }
    store(g + k * lanes<T>, total * splat(factor));
  }
  sum_lanes(s.column, N, static_cast<double>(factor), g + padded(M));
}

// gradients of the weights of one perceptron from those of its logits, n samples as the depth of products; `in` and
// `hidden` of a sample lie `kept_size` from those of the next
template <typename T>
LOMACS_TARGET void perceptron_block_back(const Perceptron<T>& p, const T* in, const T* hidden, std::int64_t kept_size,
                                         const T* g, std::int64_t g_row, std::int64_t n, T* g_hidden, T* gw1, T* gw2) {
  const std::int64_t np = padded(p.n), hp = padded(p.hidden);
  matmul<T>({g, g_row, 1}, {p.w2.data(), hp}, g_hidden, hp, n, hp, p.n);
  for (std::int64_t b = 0; b < n; ++b)
    for (std::int64_t k = 0; k < hp; ++k)
      if (!(hidden[b * kept_size + k] > 0)) g_hidden[b * hp + k] = 0;
  matmul<T>({g, 1, g_row}, {hidden, kept_size}, gw2, hp, p.n, hp, n);
  matmul<T>({g_hidden, 1, hp}, {in, kept_size}, gw1, np, p.hidden, np, n);
}

template <typename T>
LOMACS_TARGET void perceptron_blocks_back(const Gate<T>& job, const T* logits, std::int64_t block, std::int64_t B,
                                          std::int64_t begin, std::int64_t end) {
  const Memory<T> g_hidden(block * padded(job.hidden));
  const std::int64_t size = job.kept_size(), row = job.logits();
  for (std::int64_t c = begin; c < end; ++c) {
    const std::int64_t b = c * block, n = std::min(block, B - b);
    const Kept<T> kept = job.kept_of(b);
    const GateSums<T> sums = job.sums_of(c);
    const T* g = logits + b * row;
    perceptron_block_back(*job.row_mlp, kept.rho, kept.row_hidden, size, g, row, n, g_hidden.p, sums.row_w1,
                          sums.row_w2);
    perceptron_block_back(*job.col_mlp, kept.kappa, kept.col_hidden, size, g + padded(job.M), row, n, g_hidden.p,
                          sums.col_w1, sums.col_w2);
  }
}

// As `front_chunks_back`, from what the forward kept: gradients of the projection's weights and of the logits.
template <typename T>
LOMACS_TARGET void kept_chunks_back(const Gate<T>& job, const Projection<T>& projection, const T* gX, const T* more,
                                    T* projection_sums, T* logits, std::int64_t B, std::int64_t begin,
                                    std::int64_t end) {
  const GateScratch<T> scratch(job, false);
  ProjectionScratch<T> other(projection);
  const std::int64_t whole = 2 * job.M * job.N, tokens = job.M * projection.d;
  const Memory<T> gHd(whole);
  for (std::int64_t c = begin; c < end; ++c) {
    T* own = projection_sums ? projection_sums + c * projection.sums() : nullptr;
    const std::int64_t from = c * job.chunk, stop = std::min(B, from + job.chunk);
    for (std::int64_t b = from; b < stop; ++b) {
      const bool last = b + 1 == B;
      const T *g = gX + b * tokens, *x = job.Hd + b * whole, *y = more ? more + b * whole : nullptr;
      Ahead of_weight = ahead_of<T>(projection.d, whole / job.M, {{y, whole}});
      Ahead of_channel = ahead_of<T>(job.M, whole / job.M, {{last ? nullptr : g + tokens, tokens},
                                                                    {last ? nullptr : x + whole, whole},
                                                                    {job.kept_of(b).spectrum, job.kept_size()}});
      project_sample_back<true>(projection, g, x, y, gHd.p, own, b == from, other, &of_weight, &of_channel);
      logits_back(job, gHd.p, job.kept_of(b), scratch, logits + b * job.logits());
    }
  }
}

}  // namespace
}  // namespace LOMACS_ISA
}  // namespace lomacs
