// The frozen network with the angular head: gate, start, refinement and completion of a sample in one visit.
// Included inside isa.inl.
#include "refine.inl"

namespace lomacs {
namespace LOMACS_ISA {
namespace {

// out += in, n numbers at any place
template <typename T>
LOMACS_INLINE void add_run(T* out, const T* in, Index n, T sign) {
  // runs are short: the columns of a panel
  constexpr int bytes = LOMACS_BYTES == 64 ? 32 : LOMACS_BYTES, step = bytes / static_cast<int>(sizeof(T));
  Index j = 0;
  for (; j + step <= n; j += step)
    store_part<T, bytes>(out + j, load_part<T, bytes>(out + j) + sign * load_part<T, bytes>(in + j));
  for (; j < n; ++j) out[j] += sign * in[j];
}

// `AngularGate` of lomacs_fast/reference/angular_gate.py. A lag of (d, e) elements lies in slot (d + rows,
// e + columns), so that those of neighbouring elements are neighbours; in a transform the shift is a sign.
template <typename T>
class AngularGate {
 public:
  explicit AngularGate(const AngularSvd<T>& job)
      : job_(job), M_(job.refine.M), rows_(job.rows), columns_(job.columns), elements_(rows_ * columns_),
        down_(2 * rows_), across_(2 * columns_) {}

  void plan(Arena<T>& a) {
    down_table_ = planar(a, down_, down_);
    across_table_ = planar(a, across_, across_);
    lags_ = planar(a, down_, across_);
    half_ = planar(a, down_, across_);
    W_ = planar(a, elements_, elements_);
    // blocks of rows reach past the last polarisation
    product_ = planar(a, whole_vectors<T>(M_) + block_rows, M_);
    adjoint_ = planar(a, whole_vectors<T>(M_), M_);
    stride_ = whole_vectors<T>(across_) + lanes<T>;
    planes_ = a.take((job_.hidden + 1) * plane());
  }

  void prepare() {
    table(down_, job_.roots[0], down_table_);
    table(across_, job_.roots[1], across_table_);
  }

  // H to W (H - floor I) W^H of its Hermitian part; the floor
  LOMACS_TARGET double filter(Planar<T> H, std::int64_t scene) {
    adjoint_of(H, M_, adjoint_);
    blended(H, M_, T(0.5), H, T(0.5), adjoint_, T(0));
    spectrum(H);
    const double floor = gate(job_.table + scene * job_.hidden);
    weights();
    for (Index i = 0; i < M_; ++i) H.row(i)[i] -= static_cast<T>(floor);
    apply(H);
    adjoint_of(product_, M_, adjoint_);
    apply(adjoint_);
    for (Index i = 0; i < M_; ++i)
      std::memcpy(H.row(i), product_.row(i), sizeof(T) * static_cast<std::size_t>(2 * H.width));
    return floor;
  }

 private:
  Index plane() const { return (down_ + 2) * stride_; }
  T* padded(Index plane_of, Index row) const { return planes_ + plane_of * plane() + row * stride_; }

  // exp(-2 pi i j m / n)
  void table(Index n, const T* roots, Planar<T> to) {
    for (Index j = 0; j < n; ++j)
      for (Index m = 0; m < n; ++m) {
        const Index at = j * m % n;
        to.row(j)[m] = roots[2 * at];
        to.imag(j)[m] = -roots[2 * at + 1];
      }
  }

  // lags_ transformed on both sides
  LOMACS_TARGET void transform() {
    times(half_, whole_blocks(down_), lags_, across_table_, across_);
    times(lags_, whole_blocks(down_), down_table_, half_, down_);
  }

  // the angular spectrum into the real parts of lags_, but for a sign in every other angle
  LOMACS_TARGET void spectrum(Planar<T> H) {
    for (Index d = 0; d < down_; ++d) std::fill_n(lags_.row(d), 2 * lags_.width, T(0));
    for (Index p = 0; p < job_.polarisations; ++p)
      for (Index i = 0; i < elements_; ++i) {
        const Index down = i / columns_, across = i % columns_;
        const T* re = H.row(p * elements_ + i) + p * elements_;
        for (Index j = 0; j < rows_; ++j, re += columns_) {
          // by symmetry the conjugates have the opposite lag
          T* to = lags_.row(j - down + rows_) + columns_ - across;
          add_run(to, re, columns_, T(1));
          add_run(to + lags_.width, re + H.width, columns_, T(-1));
        }
      }
    transform();
  }

  T sign_of(Index g, Index h) const { return (g + h) % 2 == 0 ? T(1) : T(-1); }

  // wraps a plane of numbers around
  LOMACS_TARGET void wrap(Index plane_of) {
    for (Index g = 1; g <= down_; ++g) {
      T* row = padded(plane_of, g);
      row[0] = row[across_];
      row[across_ + 1] = row[1];
    }
    const std::size_t bytes = sizeof(T) * static_cast<std::size_t>(stride_);
    std::memcpy(padded(plane_of, 0), padded(plane_of, down_), bytes);
    std::memcpy(padded(plane_of, down_ + 1), padded(plane_of, 1), bytes);
  }

  // 3 x 3 taps around (g, h), h the first of a vector, in plane `plane_of`
  LOMACS_INLINE Vec<T> around(Index plane_of, Index g, Index h, const T* taps) const {
    Vec<T> total{};
    for (int u = 0; u < 3; ++u) {
      const T* row = padded(plane_of, g + u) + h;
      for (int v = 0; v < 3; ++v) total += splat(taps[3 * u + v]) * load(row + v);
    }
    return total;
  }

  // the gate in place of the spectrum, with the signs and the scale of what is transformed next; the floor
  LOMACS_TARGET double gate(const T* bias) {
    const T* numbers = job_.numbers;
    const double by = 1 / static_cast<double>(elements_ * job_.polarisations), angles = static_cast<double>(down_ * across_);
    double least = 0, mean = 0;
    bool first = true, known = true;
    for (Index g = 0; g < down_; ++g)
      for (Index h = 0; h < across_; ++h) {
        const double power = by * static_cast<double>(sign_of(g, h) * lags_.row(g)[h]);
        known = known && power == power;
        if (first || power < least) least = power;
        first = false;
        mean += power / angles;
        lags_.imag(g)[h] = static_cast<T>(power);
      }
    const double floor = known ? std::max(static_cast<double>(numbers[0]) * least, 0.0) : mean;
    const T under = static_cast<T>(floor + 1e-6 * std::max(mean, 0.0) + 1e-20);
    for (Index g = 0; g < down_; ++g)
      for (Index h = 0; h < across_; ++h) {
        const T above = lags_.imag(g)[h] / under - T(1 - least_above);
        padded(0, g + 1)[h + 1] = std::log(above < T(least_above) ? T(least_above) : above);
      }
    wrap(0);
    for (Index c = 0; c < job_.hidden; ++c) {
      for (Index g = 0; g < down_; ++g)
        for (Index h = 0; h < across_; h += lanes<T>) {
          const Vec<T> x = around(0, g, h, job_.first + 9 * c) + splat(bias[c]);
          store(padded(c + 1, g + 1) + h + 1, x < Vec<T>{} ? Vec<T>{} : x);
        }
      wrap(c + 1);
    }
    const T scale = static_cast<T>(1 / angles);
    for (Index g = 0; g < down_; ++g) {
      for (Index h = 0; h < across_; h += lanes<T>) {
        Vec<T> x = splat(numbers[1]) * load(padded(0, g + 1) + h + 1) + splat(numbers[2] + numbers[3]);
        for (Index c = 0; c < job_.hidden; ++c) x += around(c + 1, g, h, job_.second + 9 * c);
        store(lags_.row(g) + h, x);
        store(lags_.imag(g) + h, Vec<T>{});
      }
      for (Index h = 0; h < across_; ++h)
        lags_.row(g)[h] = sign_of(g, h) * scale / (T(1) + std::exp(-lags_.row(g)[h]));
    }
    return floor;
  }

  // W from the gate
  LOMACS_TARGET void weights() {
    transform();
    const std::size_t bytes = sizeof(T) * static_cast<std::size_t>(columns_);
    for (Index i = 0; i < elements_; ++i) {
      const Index down = i / columns_, across = i % columns_;
      for (Index j = 0; j < rows_; ++j) {
        const T* from = lags_.row(j - down + rows_) + columns_ - across;
        std::memcpy(W_.row(i) + j * columns_, from, bytes);
        std::memcpy(W_.imag(i) + j * columns_, from + lags_.width, bytes);
      }
    }
  }

  static Planar<T> from_row(Planar<T> x, Index i) { return {x.row(i), x.width, x.columns}; }

  // product_ = W x, polarisation by polarisation
  LOMACS_TARGET void apply(Planar<T> x) {
    for (Index p = 0; p < job_.polarisations; ++p)
      times(from_row(product_, p * elements_), whole_blocks(elements_), W_, from_row(x, p * elements_), elements_);
  }

  const AngularSvd<T>& job_;
  Index M_, rows_, columns_, elements_, down_, across_, stride_ = 0;
  Planar<T> down_table_, across_table_, lags_, half_, W_, product_, adjoint_;
  T* planes_ = nullptr;
};

template <typename T>
LOMACS_TARGET void samples(const AngularSvd<T>& job, std::int64_t begin, std::int64_t end) {
  const RefineSvd<T>& shape = job.refine;
  const std::int64_t M = shape.M, N = shape.N, r = shape.r, k = shape.k;
  Refinement<T> x(shape);
  AngularGate<T> gate(job);
  Planar<T> adjoint{}, freq[2];
  const Arena<T> arena([&](Arena<T>& a) {
    x.plan(a);
    freq[0] = planar(a, M, N);
    if (x.hermitian) {
      gate.plan(a);
    } else {
      adjoint = planar(a, whole_vectors<T>(N), M);
      freq[1] = planar(a, N, M);
    }
  }, true);
  x.prepare();
  if (x.hermitian) gate.prepare();
  for (std::int64_t b = begin; b < end; ++b) {
    x.load_channel(shape.H + 2 * b * M * N);
    const double whole = x.norm;
    T* values = shape.outS + b * r;
    if (whole - whole != 0) {
      const T nan = std::numeric_limits<T>::quiet_NaN();
      std::fill_n(shape.outU + 2 * b * M * r, 2 * M * r, nan);
      std::fill_n(shape.outV + 2 * b * N * r, 2 * N * r, nan);
      std::fill_n(values, r, nan);
      continue;
    }
    double floor = 0;
    if (x.hermitian) {
      floor = gate.filter(x.H, job.scene[b]);
      x.to_unit_norm();
    } else {
      x.norm = whole > 0 ? 1.0 : 0.0;
    }
    x.strongest_columns(x.H, M, N, 0, freq[0], k, x.left.U);
    if (!x.hermitian) {
      adjoint_of(x.H, M, adjoint);
      x.strongest_columns(adjoint, N, M, 1, freq[1], k, x.right.U);
    }
    x.projected = false;
    x.steps(shape.steps);
    x.close(x.last_soft(shape.steps), shape.order + b * k, values);
    x.finish(b);
    const double gain = static_cast<double>(job.numbers[4]), share = static_cast<double>(job.numbers[5]);
    for (std::int64_t j = 0; j < k; ++j)
      values[j] = static_cast<T>(std::max(static_cast<double>(values[j]) * gain - share * floor, 0.0) * whole);
  }
}

}  // namespace
}  // namespace LOMACS_ISA
}  // namespace lomacs
