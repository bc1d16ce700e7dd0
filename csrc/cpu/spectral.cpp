// lomacs::spectral_calibrate and lomacs::svd_tail on CPU: the spectrum measured in the factors, and the network's
// tail of normalisation, sort, refinement and calibration in one visit of every sample.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "simd.h"
#include "stages.h"
#include "tensors.h"
#include "upper.h"

namespace lomacs {
namespace {

// Forward where S is there; else gradients of what is there, from g.
template <typename T>
struct Calibrate {
  const T *U, *H, *V, *S_pred, *g;
  T *S, *gU, *gH, *gV, *gS;
  double* gtau;
  std::int64_t M, N, r;
  double tau;
};

// Raw factors, and the results oU, oS, oV; where gU, gS and gV are there, the gradients of the inputs instead. Where
// kept is there, the forward leaves in it what the backward then reads beside the results U_out and V_out.
template <typename T>
struct Tail {
  const T *U, *V, *S_pred, *H, *gU, *gS, *gV, *U_out, *V_out;
  T *oU, *oS, *oV, *oH, *kept;
  double* gscalars;
  std::int64_t M, N, r;
  double a, b, tau;
};

}  // namespace
}  // namespace lomacs

namespace lomacs {
namespace {

// What the forward of a sample keeps: the upper halves of U^H U - I of both factors, H V, the measured diagonal, and
// of each factor by column the reciprocals of norms that normalise and differentiate, raw and refined.
template <typename T>
struct Kept {
  Upper<T> residuals[2];
  T *W = nullptr, *z = nullptr, *columns[2] = {};

  static std::int64_t size(std::int64_t M, std::int64_t r) { return 2 * Upper<T>::size(r) + 2 * M * r + 10 * r; }
  Kept() = default;
  Kept(T* p, std::int64_t M, std::int64_t r)
      : residuals{{p}, {p + Upper<T>::size(r)}},
        W(p + 2 * Upper<T>::size(r)),
        z(W + 2 * M * r),
        columns{z + 2 * r, z + 6 * r} {}
};

}  // namespace
}  // namespace lomacs

#define LOMACS_KERNELS "spectral.inl"
#include "isa.inl"

namespace lomacs {
namespace {

template <typename T>
void run(const Calibrate<T>& job, std::int64_t B) {
  const Isa isa = choose_isa();
  // a share of less than about 20 us is not worth a thread
  const std::int64_t grain = std::max<std::int64_t>(1, (1 << 18) / (job.M * job.N * job.r));
  torch::stable::parallel_for(0, B, grain, [&](std::int64_t begin, std::int64_t end) {
    LOMACS_DISPATCH(isa, calibrate_samples(job, begin, end));
  });
}

template <typename T>
void run(const Tail<T>& job, std::int64_t B) {
  const Isa isa = choose_isa();
  const std::int64_t grain = std::max<std::int64_t>(1, (1 << 17) / (job.M * job.N * job.r));
  torch::stable::parallel_for(0, B, grain, [&](std::int64_t begin, std::int64_t end) {
    LOMACS_DISPATCH(isa, tail_samples(job, begin, end));
  });
}

void check_problem(const Checks& checks, const char* left, const Tensor& U, const char* right, const Tensor& V,
                   const Tensor& S_pred, const Tensor& H) {
  const ScalarType dtype = S_pred.scalar_type();
  checks.real("S_pred", dtype);
  checks.expect(S_pred.dim() == 2, "S_pred must have shape (B, r)");
  checks.expect(H.dim() == 4, "H must have shape (B, M, N, 2)");
  const std::int64_t B = S_pred.size(0), r = S_pred.size(1), M = H.size(1), N = H.size(2);
  checks.expect(M > 0 && N > 0 && r > 0, "no dimension but the batch may be empty");
  checks.tensor(left, U, dtype, {B, M, r, 2});
  checks.tensor(right, V, dtype, {B, N, r, 2});
  checks.tensor("S_pred", S_pred, dtype, {B, r});
  checks.tensor("H", H, dtype, {B, M, N, 2});
}

void check_tau(const Checks& checks, const Tensor& tau) {
  checks.tensor("tau", tau, ScalarType::Double, std::vector<std::int64_t>(tau.dim() == 0 ? 0 : 1, 1));
}

template <typename T>
Calibrate<T> calibrate_job(const Tensor& U, const Tensor& H, const Tensor& V, const Tensor& S_pred,
                           const Tensor& tau) {
  Calibrate<T> job{};
  job.U = pointer<T>(U), job.H = pointer<T>(H), job.V = pointer<T>(V), job.S_pred = pointer<T>(S_pred);
  job.M = H.size(1), job.N = H.size(2), job.r = S_pred.size(1);
  job.tau = *pointer<double>(tau);
  return job;
}

template <typename T>
Tensor calibrate(const Tensor& U, const Tensor& H, const Tensor& V, const Tensor& S_pred, const Tensor& tau) {
  Tensor S = fresh_like(S_pred);
  Calibrate<T> job = calibrate_job<T>(U, H, V, S_pred, tau);
  job.S = output<T>(S);
  if (S_pred.size(0) > 0) run(job, S_pred.size(0));
  return S;
}

Tensor spectral_calibrate(const Tensor& U, const Tensor& H, const Tensor& V, const Tensor& S_pred,
                          const Tensor& tau) {
  constexpr Checks checks{"spectral_calibrate"};
  check_problem(checks, "U", U, "V", V, S_pred, H);
  check_tau(checks, tau);
  if (S_pred.scalar_type() == ScalarType::Float) return calibrate<float>(U, H, V, S_pred, tau);
  return calibrate<double>(U, H, V, S_pred, tau);
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> calibrate_backward(const Tensor& g, const Tensor& U,
                                                                      const Tensor& H, const Tensor& V,
                                                                      const Tensor& S_pred, const Tensor& tau,
                                                                      bool gu, bool gh, bool gv) {
  const std::int64_t B = S_pred.size(0);
  const auto like = [&](const Tensor& x, bool wanted) {
    return wanted ? fresh_like(x) : fresh(x, {0});
  };
  Tensor gU = like(U, gu), gH = like(H, gh), gV = like(V, gv), gS = like(S_pred, true), gtau = like(tau, true);
  std::vector<double> samples(static_cast<std::size_t>(B));
  Calibrate<T> job = calibrate_job<T>(U, H, V, S_pred, tau);
  job.g = pointer<T>(g);
  job.gU = output<T>(gU, gu), job.gH = output<T>(gH, gh), job.gV = output<T>(gV, gv), job.gS = output<T>(gS);
  job.gtau = samples.data();
  if (B > 0) run(job, B);
  // in the order of the samples, whatever thread had them
  double total = 0;
  for (const double part : samples) total += part;
  *output<double>(gtau) = total;
  return {gU, gH, gV, gS, gtau};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> spectral_calibrate_backward(
    const Tensor& g, const Tensor& U, const Tensor& H, const Tensor& V, const Tensor& S_pred, const Tensor& tau,
    bool gu, bool gh, bool gv) {
  constexpr Checks checks{"spectral_calibrate_backward"};
  check_problem(checks, "U", U, "V", V, S_pred, H);
  check_tau(checks, tau);
  checks.tensor("g", g, S_pred.scalar_type(), {S_pred.size(0), S_pred.size(1)});
  if (S_pred.scalar_type() == ScalarType::Float)
    return calibrate_backward<float>(g, U, H, V, S_pred, tau, gu, gh, gv);
  return calibrate_backward<double>(g, U, H, V, S_pred, tau, gu, gh, gv);
}

template <typename T>
Tail<T> tail_job(const Tensor& U, const Tensor& V, const Tensor& S_pred, const Tensor& H, const Tensor& scalars) {
  Tail<T> job{};
  job.U = pointer<T>(U), job.V = pointer<T>(V), job.S_pred = pointer<T>(S_pred), job.H = pointer<T>(H);
  job.M = H.size(1), job.N = H.size(2), job.r = S_pred.size(1);
  const double* values = pointer<double>(scalars);
  job.a = values[0], job.b = values[1], job.tau = values[2];
  return job;
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> tail(const Tensor& U, const Tensor& V, const Tensor& S_pred, const Tensor& H,
                                        const Tensor& scalars, Tensor* kept) {
  Tensor oU = fresh_like(U), oV = fresh_like(V);
  Tensor oS = fresh_like(S_pred);
  Tail<T> job = tail_job<T>(U, V, S_pred, H, scalars);
  job.oU = output<T>(oU), job.oS = output<T>(oS), job.oV = output<T>(oV);
  if (kept) job.kept = output<T>(*kept);
  if (S_pred.size(0) > 0) run(job, S_pred.size(0));
  return {oU, oS, oV};
}

void check_tail(const Checks& checks, const Tensor& U_raw, const Tensor& V_raw, const Tensor& S_pred,
                const Tensor& H, const Tensor& scalars) {
  check_problem(checks, "U_raw", U_raw, "V_raw", V_raw, S_pred, H);
  checks.tensor("scalars", scalars, ScalarType::Double, {3});
}

std::tuple<Tensor, Tensor, Tensor> svd_tail(const Tensor& U_raw, const Tensor& V_raw, const Tensor& S_pred,
                                            const Tensor& H, const Tensor& scalars) {
  check_tail(Checks{"svd_tail"}, U_raw, V_raw, S_pred, H, scalars);
  if (S_pred.scalar_type() == ScalarType::Float) return tail<float>(U_raw, V_raw, S_pred, H, scalars, nullptr);
  return tail<double>(U_raw, V_raw, S_pred, H, scalars, nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> svd_tail_kept(const Tensor& U_raw, const Tensor& V_raw,
                                                         const Tensor& S_pred, const Tensor& H,
                                                         const Tensor& scalars) {
  check_tail(Checks{"svd_tail_kept"}, U_raw, V_raw, S_pred, H, scalars);
  const bool single = S_pred.scalar_type() == ScalarType::Float;
  Tensor kept = fresh(S_pred, {S_pred.size(0), Kept<float>::size(H.size(1), S_pred.size(1))});
  auto [U, S, V] = single ? tail<float>(U_raw, V_raw, S_pred, H, scalars, &kept)
                          : tail<double>(U_raw, V_raw, S_pred, H, scalars, &kept);
  return {U, S, V, kept};
}

// What the forward kept and its factors, or nothing.
struct KeptTail {
  const Tensor *U, *V, *kept;
};

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> tail_backward(const Tensor& gU, const Tensor& gS,
                                                                 const Tensor& gV, const Tensor& U,
                                                                 const Tensor& V, const Tensor& S_pred,
                                                                 const Tensor& H, const Tensor& scalars, bool gh,
                                                                 const KeptTail* kept) {
  const std::int64_t B = S_pred.size(0);
  Tensor oU = fresh_like(U), oV = fresh_like(V);
  Tensor oS = fresh_like(S_pred);
  Tensor oH = gh ? fresh_like(H) : fresh(H, {0});
  Tensor gscalars = fresh_like(scalars);
  std::vector<double> samples(static_cast<std::size_t>(3 * B));
  Tail<T> job = tail_job<T>(U, V, S_pred, H, scalars);
  job.gU = pointer<T>(gU), job.gS = pointer<T>(gS), job.gV = pointer<T>(gV);
  job.oU = output<T>(oU), job.oS = output<T>(oS), job.oV = output<T>(oV), job.oH = output<T>(oH, gh);
  job.gscalars = samples.data();
  if (kept) {
    // read alone
    job.kept = const_cast<T*>(pointer<T>(*kept->kept));
    job.U_out = pointer<T>(*kept->U), job.V_out = pointer<T>(*kept->V);
  }
  if (B > 0) run(job, B);
  // in the order of the samples, whatever thread had them
  double total[3] = {};
  for (std::size_t i = 0; i < samples.size(); ++i) total[i % 3] += samples[i];
  std::copy(total, total + 3, output<double>(gscalars));
  return {oU, oV, oS, oH, gscalars};
}

void check_tail_backward(const Checks& checks, const Tensor& gU, const Tensor& gS, const Tensor& gV,
                         const Tensor& U_raw, const Tensor& V_raw, const Tensor& S_pred, const Tensor& H,
                         const Tensor& scalars) {
  check_tail(checks, U_raw, V_raw, S_pred, H, scalars);
  const ScalarType dtype = S_pred.scalar_type();
  const std::int64_t B = S_pred.size(0), r = S_pred.size(1);
  checks.tensor("gU", gU, dtype, {B, H.size(1), r, 2});
  checks.tensor("gS", gS, dtype, {B, r});
  checks.tensor("gV", gV, dtype, {B, H.size(2), r, 2});
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> svd_tail_backward(const Tensor& gU, const Tensor& gS,
                                                                     const Tensor& gV, const Tensor& U_raw,
                                                                     const Tensor& V_raw, const Tensor& S_pred,
                                                                     const Tensor& H, const Tensor& scalars,
                                                                     bool gh) {
  check_tail_backward(Checks{"svd_tail_backward"}, gU, gS, gV, U_raw, V_raw, S_pred, H, scalars);
  if (S_pred.scalar_type() == ScalarType::Float)
    return tail_backward<float>(gU, gS, gV, U_raw, V_raw, S_pred, H, scalars, gh, nullptr);
  return tail_backward<double>(gU, gS, gV, U_raw, V_raw, S_pred, H, scalars, gh, nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> svd_tail_kept_backward(
    const Tensor& gU, const Tensor& gS, const Tensor& gV, const Tensor& U_raw, const Tensor& V_raw,
    const Tensor& S_pred, const Tensor& H, const Tensor& scalars, const Tensor& U, const Tensor& V,
    const Tensor& kept, bool gh) {
  constexpr Checks checks{"svd_tail_kept_backward"};
  check_tail_backward(checks, gU, gS, gV, U_raw, V_raw, S_pred, H, scalars);
  const ScalarType dtype = S_pred.scalar_type();
  const std::int64_t B = S_pred.size(0), r = S_pred.size(1), M = H.size(1);
  checks.tensor("U", U, dtype, {B, M, r, 2});
  checks.tensor("V", V, dtype, {B, H.size(2), r, 2});
  checks.tensor("kept", kept, dtype, {B, Kept<float>::size(M, r)});
  const KeptTail given{&U, &V, &kept};
  if (dtype == ScalarType::Float)
    return tail_backward<float>(gU, gS, gV, U_raw, V_raw, S_pred, H, scalars, gh, &given);
  return tail_backward<double>(gU, gS, gV, U_raw, V_raw, S_pred, H, scalars, gh, &given);
}

}  // namespace
}  // namespace lomacs

namespace lomacs {

template <typename T>
TailStage<T> stages::tail(std::int64_t M, std::int64_t N, std::int64_t r, double a, double b, double tau) {
  const Isa isa = choose_isa();
  return [=](const T* U, const T* V, const T* S, const T* Hd, std::int64_t n, T* oU, T* oS, T* oV, Team* team) {
    Tail<T> job{};
    job.U = U, job.V = V, job.S_pred = S, job.H = Hd;
    job.oU = oU, job.oS = oS, job.oV = oV;
    job.M = M, job.N = N, job.r = r, job.a = a, job.b = b, job.tau = tau;
    if (team != nullptr) LOMACS_DISPATCH(isa, tail_of_one(job, *team));
    else LOMACS_DISPATCH(isa, tail_samples(job, 0, n));
  };
}

template TailStage<float> stages::tail(std::int64_t, std::int64_t, std::int64_t, double, double, double);
template TailStage<double> stages::tail(std::int64_t, std::int64_t, std::int64_t, double, double, double);

}  // namespace lomacs

STABLE_TORCH_LIBRARY_IMPL(lomacs, CPU, m) {
  m.impl("spectral_calibrate", TORCH_BOX(&lomacs::spectral_calibrate));
  m.impl("spectral_calibrate_backward", TORCH_BOX(&lomacs::spectral_calibrate_backward));
  m.impl("svd_tail", TORCH_BOX(&lomacs::svd_tail));
  m.impl("svd_tail_backward", TORCH_BOX(&lomacs::svd_tail_backward));
  m.impl("svd_tail_kept", TORCH_BOX(&lomacs::svd_tail_kept));
  m.impl("svd_tail_kept_backward", TORCH_BOX(&lomacs::svd_tail_kept_backward));
}
