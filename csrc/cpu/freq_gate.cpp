// lomacs::freq_gate on CPU, lomacs::gate_project, which goes on to the tokens of both views while a gated channel is
// in the cache, and the gradients of both; lomacs::gate_project_kept leaves what the weights' gradients read.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "dual_view.h"
#include "fft.h"
#include "simd.h"
#include "stages.h"
#include "sums.h"
#include "tensors.h"
#include "tokens.h"

namespace lomacs {
namespace {

// whole vectors of any instruction set
std::int64_t padded(std::int64_t n) { return (n + 15) / 16 * 16; }

// One perceptron: `first` (hidden, n), null where only gradients from what a forward kept are wanted, and `second`
// (n, hidden), as they are given. The spectrum's number k belongs to frequency[k].
template <typename T>
struct Perceptron {
  std::int64_t n, hidden;
  const T *first, *second;
  const std::int64_t* frequency;
  // for the gradients, n in the order of the spectrum, rows padded to whole vectors: (hidden, n), (n, hidden)
  std::vector<T> w1, w2;

  Perceptron(const T* first, const T* second, std::int64_t hidden, const std::vector<std::int64_t>& frequency,
             bool backward)
      : n(static_cast<std::int64_t>(frequency.size())),
        hidden(hidden),
        first(first),
        second(second),
        frequency(frequency.data()) {
    if (!backward) return;
    const std::int64_t np = padded(n), hp = padded(hidden);
    w2.resize(static_cast<std::size_t>(n * hp));
    if (first != nullptr) w1.resize(static_cast<std::size_t>(hidden * np));
    for (std::int64_t p = 0; p < n; ++p) {
      const std::int64_t f = frequency[static_cast<std::size_t>(p)];
      for (std::int64_t k = 0; k < hidden; ++k) w2[static_cast<std::size_t>(p * hp + k)] = second[f * hidden + k];
      for (std::int64_t k = 0; first != nullptr && k < hidden; ++k)
        w1[static_cast<std::size_t>(k * np + p)] = first[k * n + f];
    }
  }
  std::int64_t sums() const { return hidden * padded(n) + n * padded(hidden); }
};

// Where a chunk adds the gradients of the weights, in the perceptrons' padded order; null where not wanted.
template <typename T>
struct GateSums {
  T *row_w1, *row_w2, *col_w1, *col_w2;
};

// What a forward keeps of a sample for the gradients of the weights: its spectrum times gate (1 - gate), in strips of
// 16 row frequencies whatever the instruction set, what both perceptrons read and their hidden numbers, and the scale.
template <typename T>
struct Kept {
  T *spectrum, *rho, *kappa, *row_hidden, *col_hidden, *up;

  Kept(T* p, std::int64_t M, std::int64_t N, std::int64_t row_hidden, std::int64_t col_hidden)
      : spectrum(p),
        rho(p + 2 * padded(M) * N),
        kappa(rho + padded(M)),
        row_hidden(kappa + padded(N)),
        col_hidden(this->row_hidden + padded(row_hidden)),
        up(this->col_hidden + padded(col_hidden)) {}
  // numbers of a sample
  static std::int64_t size(std::int64_t M, std::int64_t N, std::int64_t row_hidden, std::int64_t col_hidden) {
    return 2 * padded(M) * N + padded(M) + padded(N) + padded(row_hidden) + padded(col_hidden) + 16;
  }
};

// Pointers to contiguous batches; what is not wanted is null.
template <typename T>
struct Gate {
  const T *H, *gHd, *gnorms;
  T *Hd, *norms, *gH, *sums, *kept;
  std::int64_t M, N, hidden, chunk;
  double temperature, ortho;
  bool normalize;
  const FftPlan<T> *rows, *cols;
  const Perceptron<T> *row_mlp, *col_mlp;

  std::int64_t kept_size() const { return Kept<T>::size(M, N, row_mlp->hidden, col_mlp->hidden); }
  Kept<T> kept_of(std::int64_t b) const {
    return {kept + b * kept_size(), M, N, row_mlp->hidden, col_mlp->hidden};
  }
  // numbers of the gradients of both sides' logits of a sample
  std::int64_t logits() const { return padded(M) + padded(N); }

  GateSums<T> sums_of(std::int64_t chunk) const {
    if (sums == nullptr) return {};
    T* p = sums + chunk * (row_mlp->sums() + col_mlp->sums());
    T* q = p + row_mlp->sums();
    return {p, p + row_mlp->hidden * padded(M), q, q + col_mlp->hidden * padded(N)};
  }
};

}  // namespace
}  // namespace lomacs

#define LOMACS_KERNELS "freq_gate.inl"
#include "isa.inl"

namespace lomacs {
namespace {

struct Weights {
  const Tensor &row_w1, &row_w2, &col_w1, &col_w2;
};

struct Sizes {
  std::int64_t B, M, N, row_hidden, col_hidden;
};

Sizes sizes_of(const Checks& checks, const Tensor& H, const Weights& w, double temperature) {
  checks.expect(H.dim() == 4, "H must have shape (B, M, N, 2)");
  checks.expect(w.row_w1.dim() == 2 && w.col_w1.dim() == 2,
                "row_w1 must have shape (hidden, M), col_w1 (hidden, N)");
  const Sizes z{H.size(0), H.size(1), H.size(2), w.row_w1.size(0), w.col_w1.size(0)};
  const ScalarType dtype = H.scalar_type();
  checks.expect(z.M > 0 && z.N > 0 && z.row_hidden > 0 && z.col_hidden > 0,
                "no dimension but the batch may be empty");
  checks.expect(temperature > 0, "temperature must be positive");
  checks.real("H", dtype);
  checks.tensor("H", H, dtype, {z.B, z.M, z.N, 2});
  checks.tensor("row_w1", w.row_w1, dtype, {z.row_hidden, z.M});
  checks.tensor("row_w2", w.row_w2, dtype, {z.M, z.row_hidden});
  checks.tensor("col_w1", w.col_w1, dtype, {z.col_hidden, z.N});
  checks.tensor("col_w2", w.col_w2, dtype, {z.N, z.col_hidden});
  return z;
}

// What a call holds for all its samples.
template <typename T>
struct Front {
  std::shared_ptr<const FftPlan<T>> rows, cols;
  Perceptron<T> row_mlp, col_mlp;
  Gate<T> job{};

  Front(const Sizes& z, const Tensor& H, const Weights& w, double temperature, bool normalize, bool backward = false)
      : Front(z, pointer<T>(w.row_w1), pointer<T>(w.row_w2), pointer<T>(w.col_w1), pointer<T>(w.col_w2),
              temperature, backward) {
    job.H = pointer<T>(H), job.normalize = normalize;
  }
  Front(const Sizes& z, const T* row_w1, const T* row_w2, const T* col_w1, const T* col_w2, double temperature,
        bool backward = false)
      : rows(FftPlan<T>::of(z.M)),
        cols(FftPlan<T>::of(z.N)),
        row_mlp(row_w1, row_w2, z.row_hidden, rows->frequency, backward),
        col_mlp(col_w1, col_w2, z.col_hidden, cols->frequency, backward) {
    job.M = z.M, job.N = z.N, job.hidden = std::max(z.row_hidden, z.col_hidden), job.chunk = chunk_of_weights(z.B);
    job.temperature = temperature;
    job.ortho = 1 / std::sqrt(static_cast<double>(z.M) * static_cast<double>(z.N));
    job.rows = rows.get(), job.cols = cols.get(), job.row_mlp = &row_mlp, job.col_mlp = &col_mlp;
  }
  Front(const Front&) = delete;
};

std::int64_t kept_size(const Sizes& z) { return Kept<float>::size(z.M, z.N, z.row_hidden, z.col_hidden); }

// about 30 operations a number for each of the transforms
std::int64_t operations(const Sizes& z) { return 60 * z.M * z.N; }

template <typename T>
void forward(const Sizes& z, Front<T>& front, Tensor& Hd, Tensor& norms, bool normalize) {
  Gate<T>& job = front.job;
  job.Hd = output<T>(Hd), job.norms = output<T>(norms, normalize);
  const Isa isa = choose_isa();
  torch::stable::parallel_for(0, z.B, share_of(operations(z)), [&](std::int64_t begin, std::int64_t end) {
    LOMACS_DISPATCH(isa, gate_samples(job, begin, end));
  });
}

// samples of which the gradients of the perceptrons are one product
constexpr std::int64_t samples_of_block = 16;

template <typename T>
void unpack(const double* sums, const Perceptron<T>& p, const std::vector<std::int64_t>& frequency, T* gw1,
            T* gw2) {
  const std::int64_t np = padded(p.n), hp = padded(p.hidden);
  const double* second = sums + p.hidden * np;
  for (std::int64_t i = 0; i < p.n; ++i)
    for (std::int64_t k = 0; k < p.hidden; ++k) {
      const std::int64_t f = frequency[static_cast<std::size_t>(i)];
      gw1[k * p.n + f] = static_cast<T>(sums[k * np + i]);
      gw2[f * p.hidden + k] = static_cast<T>(second[i * hp + k]);
    }
}

// Gradients of the perceptrons' weights from the sums of all chunks.
template <typename T>
void gate_gradients(const Front<T>& front, const T* partial, std::int64_t chunks, const std::vector<Tensor>& gw) {
  const std::int64_t rows = front.row_mlp.sums(), count = rows + front.col_mlp.sums();
  std::vector<double> total(static_cast<std::size_t>(count));
  torch::stable::parallel_for(0, count, share_of(chunks), [&](std::int64_t begin, std::int64_t end) {
    sum_of_chunks(partial + begin, count, chunks, end - begin, 1, total.data() + begin);
  });
  unpack(total.data(), front.row_mlp, front.rows->frequency, output<T>(gw[0]), output<T>(gw[1]));
  unpack(total.data() + rows, front.col_mlp, front.cols->frequency, output<T>(gw[2]), output<T>(gw[3]));
}

template <typename T>
void backward(const Sizes& z, Front<T>& front, Tensor& gH, const std::vector<Tensor>& gw, bool gh,
              bool weights) {
  Gate<T>& job = front.job;
  const std::int64_t chunks = (z.B + job.chunk - 1) / job.chunk;
  const Memory<T> partial(weights ? chunks * (front.row_mlp.sums() + front.col_mlp.sums()) : 0);
  job.gH = output<T>(gH, gh), job.sums = weights ? partial.p : nullptr;
  const Isa isa = choose_isa();
  const std::int64_t grain = share_of(2 * job.chunk * operations(z));
  torch::stable::parallel_for(0, chunks, grain, [&](std::int64_t begin, std::int64_t end) {
    LOMACS_DISPATCH(isa, gate_chunks_back(job, z.B, begin, end));
  });
  if (weights) gate_gradients(front, job.sums, chunks, gw);
}

std::tuple<Tensor, Tensor> freq_gate(const Tensor& H, const Tensor& row_w1, const Tensor& row_w2,
                                     const Tensor& col_w1, const Tensor& col_w2, double temperature,
                                     bool normalize) {
  constexpr Checks checks{"freq_gate"};
  const Weights w{row_w1, row_w2, col_w1, col_w2};
  const Sizes z = sizes_of(checks, H, w, temperature);
  Tensor Hd = fresh(H, {z.B, z.M, z.N, 2});
  Tensor norms = fresh(H, {normalize ? z.B : 0});
  const auto run = [&]<typename T>(T) {
    Front<T> front(z, H, w, temperature, normalize);
    forward(z, front, Hd, norms, normalize);
  };
  if (H.scalar_type() == ScalarType::Float) run(float{});
  else run(double{});
  return {Hd, norms};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> freq_gate_backward(
    const Tensor& gHd, const std::optional<Tensor>& gnorms, const Tensor& H, const Tensor& row_w1,
    const Tensor& row_w2, const Tensor& col_w1, const Tensor& col_w2, double temperature, bool normalize,
    bool gh, bool gw) {
  constexpr Checks checks{"freq_gate_backward"};
  const Weights w{row_w1, row_w2, col_w1, col_w2};
  const Sizes z = sizes_of(checks, H, w, temperature);
  const ScalarType dtype = H.scalar_type();
  checks.tensor("gHd", gHd, dtype, {z.B, z.M, z.N, 2});
  const bool of_norms = normalize && gnorms.has_value();
  if (of_norms) checks.tensor("gnorms", *gnorms, dtype, {z.B});
  const auto make = [&](bool wanted, const std::vector<std::int64_t>& sizes) {
    return wanted ? fresh(H, sizes) : fresh(H, {0});
  };
  Tensor gH = make(gh, {z.B, z.M, z.N, 2});
  const std::vector<Tensor> of_weights{make(gw, {z.row_hidden, z.M}), make(gw, {z.M, z.row_hidden}),
                                       make(gw, {z.col_hidden, z.N}), make(gw, {z.N, z.col_hidden})};
  const auto run = [&]<typename T>(T) {
    Front<T> front(z, H, w, temperature, normalize, true);
    front.job.gHd = pointer<T>(gHd), front.job.gnorms = of_norms ? pointer<T>(*gnorms) : nullptr;
    backward(z, front, gH, of_weights, gh, gw);
  };
  if (dtype == ScalarType::Float) run(float{});
  else run(double{});
  return {gH, of_weights[0], of_weights[1], of_weights[2], of_weights[3]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> front(const char* name, const Tensor& H, const Weights& w,
                                                 double temperature, bool normalize, const Tensor& weight,
                                                 const Tensor& bias, const Tensor& pos, bool keep) {
  const Checks checks{name};
  const Sizes z = sizes_of(checks, H, w, temperature);
  const ScalarType dtype = H.scalar_type();
  checks.expect(z.M > 1 && z.N > 1, "M and N must be at least 2");
  checks.expect(weight.dim() == 2 && weight.size(0) > 0, "weight must have shape (d, 4N)");
  const std::int64_t d = weight.size(0);
  checks.tensor("weight", weight, dtype, {d, 4 * z.N});
  checks.tensor("bias", bias, dtype, {d});
  checks.tensor("pos", pos, dtype, {1, z.M, d});
  Tensor X = fresh(H, {z.B, z.M, d});
  Tensor Hd = fresh(H, {z.B, z.M, z.N, 2});
  Tensor norms = fresh(H, {normalize ? z.B : 0});
  Tensor kept = fresh(H, {keep ? z.B : 0, kept_size(z)});
  const Isa isa = choose_isa();
  const auto run = [&]<typename T>(T) {
    Front<T> front(z, H, w, temperature, normalize);
    Gate<T>& job = front.job;
    job.Hd = output<T>(Hd), job.norms = output<T>(norms, normalize), job.kept = output<T>(kept, keep);
    Projection<T> projection(pointer<T>(weight), z.M, z.N, d);
    projection.forward(pointer<T>(bias), pointer<T>(pos));
    T* x = output<T>(X);
    torch::stable::parallel_for(0, z.B, share_of(operations(z)), [&](std::int64_t begin, std::int64_t end) {
      LOMACS_DISPATCH(isa, gate_and_project_samples(job, projection, x, begin, end));
    });
  };
  if (dtype == ScalarType::Float) run(float{});
  else run(double{});
  return {X, Hd, norms, kept};
}

std::tuple<Tensor, Tensor, Tensor> gate_project(const Tensor& H, const Tensor& row_w1, const Tensor& row_w2,
                                                const Tensor& col_w1, const Tensor& col_w2, double temperature,
                                                bool normalize, const Tensor& weight, const Tensor& bias,
                                                const Tensor& pos) {
  const auto [X, Hd, norms, _] =
      front("gate_project", H, {row_w1, row_w2, col_w1, col_w2}, temperature, normalize, weight, bias, pos, false);
  return {X, Hd, norms};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gate_project_kept(const Tensor& H, const Tensor& row_w1,
                                                             const Tensor& row_w2, const Tensor& col_w1,
                                                             const Tensor& col_w2, double temperature, bool normalize,
                                                             const Tensor& weight, const Tensor& bias,
                                                             const Tensor& pos) {
  return front("gate_project_kept", H, {row_w1, row_w2, col_w1, col_w2}, temperature, normalize, weight, bias, pos,
               true);
}

using FrontGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

FrontGradients gate_project_backward(const Tensor& gX, const std::optional<Tensor>& gHd,
                                     const std::optional<Tensor>& gnorms, const Tensor& H, const Tensor& row_w1,
                                     const Tensor& row_w2, const Tensor& col_w1, const Tensor& col_w2,
                                     double temperature, bool normalize, const Tensor& weight, const Tensor& Hd,
                                     bool gh, bool of_gate, bool of_projection) {
  constexpr Checks checks{"gate_project_backward"};
  const Weights w{row_w1, row_w2, col_w1, col_w2};
  const Sizes z = sizes_of(checks, H, w, temperature);
  const ScalarType dtype = H.scalar_type();
  checks.expect(z.M > 1 && z.N > 1, "M and N must be at least 2");
  checks.expect(weight.dim() == 2 && weight.size(0) > 0, "weight must have shape (d, 4N)");
  const std::int64_t d = weight.size(0);
  checks.tensor("weight", weight, dtype, {d, 4 * z.N});
  checks.tensor("gX", gX, dtype, {z.B, z.M, d});
  checks.tensor("Hd", Hd, dtype, {z.B, z.M, z.N, 2});
  if (gHd) checks.tensor("gHd", *gHd, dtype, {z.B, z.M, z.N, 2});
  const bool of_norms = normalize && gnorms.has_value();
  if (of_norms) checks.tensor("gnorms", *gnorms, dtype, {z.B});
  const auto make = [&](bool wanted, const std::vector<std::int64_t>& sizes) {
    return wanted ? fresh(H, sizes) : fresh(H, {0});
  };
  Tensor gH = make(gh, {z.B, z.M, z.N, 2});
  const std::vector<Tensor> of_weights{make(of_gate, {z.row_hidden, z.M}), make(of_gate, {z.M, z.row_hidden}),
                                       make(of_gate, {z.col_hidden, z.N}), make(of_gate, {z.N, z.col_hidden})};
  Tensor gweight = make(of_projection, {d, 4 * z.N}), gbias = make(of_projection, {d});
  Tensor gpos = make(of_projection, {1, z.M, d});
  const Isa isa = choose_isa();
  const auto run = [&]<typename T>(T) {
    Front<T> front(z, H, w, temperature, normalize, true);
    const Projection<T> projection(pointer<T>(weight), z.M, z.N, d);
    Gate<T>& job = front.job;
    const std::int64_t chunks = (z.B + job.chunk - 1) / job.chunk;
    const Memory<T> gate_sums(of_gate ? chunks * (front.row_mlp.sums() + front.col_mlp.sums()) : 0);
    const Memory<T> sums(of_projection ? chunks * projection.sums() : 0);
    // read alone
    job.Hd = const_cast<T*>(pointer<T>(Hd));
    job.gnorms = of_norms ? pointer<T>(*gnorms) : nullptr;
    job.gH = output<T>(gH, gh), job.sums = of_gate ? gate_sums.p : nullptr;
    const T *g = pointer<T>(gX), *more = gHd ? pointer<T>(*gHd) : nullptr;
    T* to = of_projection ? sums.p : nullptr;
    torch::stable::parallel_for(0, chunks, share_of(2 * job.chunk * operations(z)),
                                [&](std::int64_t begin, std::int64_t end) {
                                  LOMACS_DISPATCH(isa, front_chunks_back(job, projection, g, more, to, z.B, begin, end));
                                });
    if (of_gate) gate_gradients(front, job.sums, chunks, of_weights);
    if (!of_projection) return;
    projection_gradients(projection, to, chunks, output<T>(gweight), output<T>(gbias), output<T>(gpos));
  };
  if (dtype == ScalarType::Float) run(float{});
  else run(double{});
  return {gH, of_weights[0], of_weights[1], of_weights[2], of_weights[3], gweight, gbias, gpos};
}

using KeptGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

KeptGradients gate_project_kept_backward(const Tensor& gX, const std::optional<Tensor>& gHd, const Tensor& row_w2,
                                         const Tensor& col_w2, double temperature, const Tensor& weight,
                                         const Tensor& Hd, const Tensor& kept, bool of_projection) {
  constexpr Checks checks{"gate_project_kept_backward"};
  const ScalarType dtype = Hd.scalar_type();
  checks.real("Hd", dtype);
  checks.expect(Hd.dim() == 4 && Hd.size(1) > 1 && Hd.size(2) > 1,
                "Hd must have shape (B, M, N, 2), M and N at least 2");
  checks.expect(row_w2.dim() == 2 && row_w2.size(1) > 0 && col_w2.dim() == 2 && col_w2.size(1) > 0,
                "row_w2 must have shape (M, hidden), col_w2 (N, hidden)");
  checks.expect(weight.dim() == 2 && weight.size(0) > 0, "weight must have shape (d, 4N)");
  checks.expect(temperature > 0, "temperature must be positive");
  const Sizes z{Hd.size(0), Hd.size(1), Hd.size(2), row_w2.size(1), col_w2.size(1)};
  const std::int64_t d = weight.size(0);
  checks.tensor("Hd", Hd, dtype, {z.B, z.M, z.N, 2});
  checks.tensor("row_w2", row_w2, dtype, {z.M, z.row_hidden});
  checks.tensor("col_w2", col_w2, dtype, {z.N, z.col_hidden});
  checks.tensor("weight", weight, dtype, {d, 4 * z.N});
  checks.tensor("gX", gX, dtype, {z.B, z.M, d});
  if (gHd) checks.tensor("gHd", *gHd, dtype, {z.B, z.M, z.N, 2});
  checks.tensor("kept", kept, dtype, {z.B, kept_size(z)});
  const auto make = [&](bool wanted, const std::vector<std::int64_t>& sizes) {
    return wanted ? fresh(Hd, sizes) : fresh(Hd, {0});
  };
  const std::vector<Tensor> of_weights{make(true, {z.row_hidden, z.M}), make(true, {z.M, z.row_hidden}),
                                       make(true, {z.col_hidden, z.N}), make(true, {z.N, z.col_hidden})};
  Tensor gweight = make(of_projection, {d, 4 * z.N}), gbias = make(of_projection, {d});
  Tensor gpos = make(of_projection, {1, z.M, d});
  const Isa isa = choose_isa();
  const auto run = [&]<typename T>(T) {
    const T* none = nullptr;
    Front<T> front(z, none, pointer<T>(row_w2), none, pointer<T>(col_w2), temperature, true);
    const Projection<T> projection(pointer<T>(weight), z.M, z.N, d);
    Gate<T>& job = front.job;
    // read alone
    job.Hd = const_cast<T*>(pointer<T>(Hd)), job.kept = const_cast<T*>(pointer<T>(kept));
    const std::int64_t chunks = (z.B + job.chunk - 1) / job.chunk;
    const std::int64_t block = std::max(samples_of_block, job.chunk), blocks = (z.B + block - 1) / block;
    const Memory<T> of_logits(z.B * job.logits());
    const Memory<T> gate_sums(blocks * (front.row_mlp.sums() + front.col_mlp.sums()));
    const Memory<T> sums(of_projection ? chunks * projection.sums() : 0);
    job.sums = gate_sums.p;
    const T *g = pointer<T>(gX), *more = gHd ? pointer<T>(*gHd) : nullptr;
    T *to = of_projection ? sums.p : nullptr, *logits = of_logits.p;
    torch::stable::parallel_for(
        0, chunks, share_of(job.chunk * operations(z)), [&](std::int64_t begin, std::int64_t end) {
          LOMACS_DISPATCH(isa, kept_chunks_back(job, projection, g, more, to, logits, z.B, begin, end));
        });
    const std::int64_t products = 3 * block * (z.M * z.row_hidden + z.N * z.col_hidden);
    torch::stable::parallel_for(0, blocks, share_of(products / 16), [&](std::int64_t begin, std::int64_t end) {
      LOMACS_DISPATCH(isa, perceptron_blocks_back(job, logits, block, z.B, begin, end));
    });
    gate_gradients(front, job.sums, blocks, of_weights);
    if (!of_projection) return;
    projection_gradients(projection, to, chunks, output<T>(gweight), output<T>(gbias), output<T>(gpos));
  };
  if (dtype == ScalarType::Float) run(float{});
  else run(double{});
  return {of_weights[0], of_weights[1], of_weights[2], of_weights[3], gweight, gbias, gpos};
}

}  // namespace
}  // namespace lomacs

namespace lomacs {

template <typename T>
FrontStage<T> stages::front(const FrontWeights<T>& w) {
  const Sizes z{0, w.M, w.N, w.row_hidden, w.col_hidden};
  const auto front = std::make_shared<const Front<T>>(z, w.row_w1, w.row_w2, w.col_w1, w.col_w2, w.temperature);
  const auto projection = std::make_shared<const Projection<T>>(w.M, w.N, w.d, w.raw, w.pooled, w.pos);
  const Isa isa = choose_isa();
  const auto gate = [front](const T* H, T* Hd, T* norms) {
    Gate<T> job = front->job;
    job.H = H, job.Hd = Hd, job.norms = norms, job.normalize = true;
    return job;
  };
  return {[=](const T* H, std::int64_t n, T* Hd, T* norms, T* X) {
            const Gate<T> job = gate(H, Hd, norms);
            LOMACS_DISPATCH(isa, gate_and_project_samples(job, *projection, X, 0, n));
          },
          [=](const T* H, T* Hd, T* norm) {
            const Gate<T> job = gate(H, Hd, norm);
            LOMACS_DISPATCH(isa, gate_samples(job, 0, 1));
          },
          [=](const T* Hd, std::int64_t begin, std::int64_t end, T* X) {
            LOMACS_DISPATCH(isa, project_part(*projection, Hd, begin, end, X));
          }};
}

template FrontStage<float> stages::front(const FrontWeights<float>&);
template FrontStage<double> stages::front(const FrontWeights<double>&);

}  // namespace lomacs

STABLE_TORCH_LIBRARY_IMPL(lomacs, CPU, m) {
  m.impl("freq_gate", TORCH_BOX(&lomacs::freq_gate));
  m.impl("freq_gate_backward", TORCH_BOX(&lomacs::freq_gate_backward));
  m.impl("gate_project", TORCH_BOX(&lomacs::gate_project));
  m.impl("gate_project_backward", TORCH_BOX(&lomacs::gate_project_backward));
  m.impl("gate_project_kept", TORCH_BOX(&lomacs::gate_project_kept));
  m.impl("gate_project_kept_backward", TORCH_BOX(&lomacs::gate_project_kept_backward));
}
