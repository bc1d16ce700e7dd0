// lomacs::ortho_refine and lomacs::bjorck on CPU: columns brought towards orthonormal ones, and the gradients.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "simd.h"
#include "tensors.h"
#include "upper.h"

namespace lomacs {
namespace {

// A batch of one factor; g and gsteps, one a sample, are there for the backward alone. Where the forward kept
// the upper half of U^H U - I and the norms of the columns, `many` and `stride` numbers from sample to sample, the
// backward reads them and the refined columns.
template <typename T>
struct FactorOf {
  const T *x, *g;
  T* out;
  double* gsteps;
  std::int64_t rows;
  double step;
  const T* refined;
  T *residual, *norms;
  std::int64_t many, stride;
};

template <typename T>
struct OrthoRefine {
  FactorOf<T> factors[2];
  std::int64_t batch, r;
  bool backward;
};

// A polynomial of degree 4 power in an X of eigenvalues from low to high: with B = sum of base_k X^k,
// A = B^2 + sum of added_k X^k and C = sum of half_k X^k it is (A - C)(A + C) + sum of rest_k X^k.
struct Polynomial {
  double low, high;
  int power;
  std::array<double, 5> base, added, half, rest;
};

template <typename T>
struct Bjorck {
  const T *U, *g;
  T* out;
  std::int64_t M, r, steps;
  int order;
  double bound, c[3];
  bool backward;
  // of all steps, for columns near orthonormal; none where steps are taken one by one
  std::vector<Polynomial> together;
};

}  // namespace
}  // namespace lomacs

#define LOMACS_KERNELS "ortho.inl"
#include "isa.inl"

namespace lomacs {
namespace {

// a share of less than about 20 us is not worth a thread
std::int64_t grain(std::int64_t macs) { return std::max<std::int64_t>(1, (1 << 20) / std::max<std::int64_t>(macs, 1)); }

template <typename T>
void run(const OrthoRefine<T>& job, std::int64_t count) {
  const Isa isa = choose_isa();
  const std::int64_t rows = std::max(job.factors[0].rows, job.factors[1].rows);
  torch::stable::parallel_for(0, count, grain(6 * rows * job.r * job.r), [&](std::int64_t begin, std::int64_t end) {
    LOMACS_DISPATCH(isa, ortho_refine_factors(job, begin, end));
  });
}

template <typename T>
void run(const Bjorck<T>& job, std::int64_t count) {
  const Isa isa = choose_isa();
  const std::int64_t macs = 6 * job.M * job.r * job.r * (job.steps + 1);
  torch::stable::parallel_for(0, count, grain(macs), [&](std::int64_t begin, std::int64_t end) {
    LOMACS_DISPATCH(isa, bjorck_samples(job, begin, end));
  });
}

Tensor shaped_like(const Tensor& x) { return fresh_like(x); }

// of a factor like U, with so many rows
std::vector<std::int64_t> shape_of_factor(const Tensor& U, std::int64_t rows) {
  return shape_as(U, U.size(0), rows, U.size(2));
}

void check_factor(const Checks& checks, const Tensor& U) {
  checks.real("U", real_of(U));
  const bool pairs = U.dim() == 4 && U.size(3) == 2 && !is_complex(U);
  checks.expect(pairs || (U.dim() == 3 && is_complex(U)), "U must have shape (B, M, r, 2), or (B, M, r) and be complex");
  checks.expect(U.size(1) > 0 && U.size(2) > 0, "no dimension but the batch may be empty");
  checks.tensor("U", U, U.scalar_type(), shape_of_factor(U, U.size(1)));
}

void check_refine(const Checks& checks, const Tensor& U, const std::optional<Tensor>& V, const Tensor& steps) {
  check_factor(checks, U);
  if (V.has_value()) {
    checks.expect(V->dim() == U.dim() && V->size(1) > 0, "V must have shape (B, N, r, 2), or (B, N, r) and be complex");
    checks.tensor("V", *V, U.scalar_type(), shape_of_factor(U, V->size(1)));
  }
  checks.tensor("steps", steps, ScalarType::Double, {V.has_value() ? 2 : 1});
}

template <typename T>
OrthoRefine<T> refine_job(const Tensor& U, const std::optional<Tensor>& V, const Tensor& steps, Tensor& outU,
                          Tensor& outV) {
  OrthoRefine<T> job{};
  const double* step = pointer<double>(steps);
  job.batch = U.size(0), job.r = U.size(2);
  job.factors[0] = {pointer<T>(U), nullptr, output<T>(outU), nullptr, U.size(1), step[0], nullptr, nullptr,
                    nullptr, 0, 0};
  if (V.has_value())
    job.factors[1] = {pointer<T>(*V), nullptr, output<T>(outV), nullptr, V->size(1), step[1], nullptr, nullptr,
                      nullptr, 0, 0};
  return job;
}

// where the forward leaves what the backward reads: residuals (B, factors, of Upper) and norms (B, factors, r)
template <typename T>
void keep(OrthoRefine<T>& job, std::int64_t factors, const Tensor& residuals, const Tensor& norms) {
  for (std::int64_t f = 0; f < factors; ++f) {
    job.factors[f].residual = output<T>(residuals) + f * Upper<T>::size(job.r);
    job.factors[f].norms = output<T>(norms) + f * job.r;
    job.factors[f].many = factors * Upper<T>::size(job.r);
    job.factors[f].stride = factors * job.r;
  }
}

template <typename T>
std::tuple<Tensor, Tensor> refine(const Tensor& U, const std::optional<Tensor>& V, const Tensor& steps) {
  Tensor outU = shaped_like(U), outV = V.has_value() ? shaped_like(*V) : fresh(U, {0});
  const OrthoRefine<T> job = refine_job<T>(U, V, steps, outU, outV);
  if (job.batch > 0) run(job, job.batch * (V.has_value() ? 2 : 1));
  return {outU, outV};
}

std::tuple<Tensor, Tensor> ortho_refine(const Tensor& U, const std::optional<Tensor>& V, const Tensor& steps) {
  check_refine(Checks{"ortho_refine"}, U, V, steps);
  return real_of(U) == ScalarType::Float ? refine<float>(U, V, steps) : refine<double>(U, V, steps);
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor> refine_kept(const Tensor& U, const std::optional<Tensor>& V,
                                                       const Tensor& steps) {
  const std::int64_t factors = V.has_value() ? 2 : 1, B = U.size(0), r = U.size(2);
  Tensor outU = shaped_like(U), outV = V.has_value() ? shaped_like(*V) : fresh(U, {0});
  Tensor residuals = fresh(U, {B, factors, Upper<T>::size(r)}, real_of(U));
  Tensor norms = fresh(U, {B, factors, r}, real_of(U));
  OrthoRefine<T> job = refine_job<T>(U, V, steps, outU, outV);
  keep(job, factors, residuals, norms);
  if (B > 0) run(job, B * factors);
  return {outU, outV, residuals, norms};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ortho_refine_kept(const Tensor& U, const std::optional<Tensor>& V,
                                                             const Tensor& steps) {
  check_refine(Checks{"ortho_refine_kept"}, U, V, steps);
  return real_of(U) == ScalarType::Float ? refine_kept<float>(U, V, steps) : refine_kept<double>(U, V, steps);
}

// What the forward kept and the refined factors, or nothing.
struct Kept {
  const Tensor *U, *V, *residuals, *norms;
};

template <typename T>
std::tuple<Tensor, Tensor, Tensor> refine_backward(const Tensor& gU, const std::optional<Tensor>& gV,
                                                   const Tensor& U, const std::optional<Tensor>& V,
                                                   const Tensor& steps, const Kept* kept) {
  Tensor outU = shaped_like(U), outV = V.has_value() ? shaped_like(*V) : fresh(U, {0});
  Tensor gsteps = shaped_like(steps);
  OrthoRefine<T> job = refine_job<T>(U, V, steps, outU, outV);
  const std::int64_t factors = V.has_value() ? 2 : 1;
  std::vector<double> samples(static_cast<std::size_t>(factors * job.batch));
  job.backward = true;
  job.factors[0].g = pointer<T>(gU);
  job.factors[0].gsteps = samples.data();
  if (V.has_value()) {
    job.factors[1].g = pointer<T>(*gV);
    job.factors[1].gsteps = samples.data() + job.batch;
  }
  if (kept) {
    keep(job, factors, *kept->residuals, *kept->norms);
    job.factors[0].refined = pointer<T>(*kept->U);
    if (V.has_value()) job.factors[1].refined = pointer<T>(*kept->V);
  }
  if (job.batch > 0) run(job, factors * job.batch);
  // in the order of the samples, whatever thread had them
  for (std::int64_t f = 0; f < factors; ++f) {
    double total = 0;
    for (std::int64_t b = 0; b < job.batch; ++b) total += job.factors[f].gsteps[b];
    output<double>(gsteps)[f] = total;
  }
  return {outU, outV, gsteps};
}

void check_refine_backward(const Checks& checks, const Tensor& gU, const std::optional<Tensor>& gV, const Tensor& U,
                           const std::optional<Tensor>& V, const Tensor& steps) {
  check_refine(checks, U, V, steps);
  checks.expect(gV.has_value() == V.has_value(), "gV must be given where V is, and nowhere else");
  checks.tensor("gU", gU, U.scalar_type(), shape_of_factor(U, U.size(1)));
  if (V.has_value()) checks.tensor("gV", *gV, U.scalar_type(), shape_of_factor(U, V->size(1)));
}

std::tuple<Tensor, Tensor, Tensor> ortho_refine_backward(const Tensor& gU, const std::optional<Tensor>& gV,
                                                         const Tensor& U, const std::optional<Tensor>& V,
                                                         const Tensor& steps) {
  check_refine_backward(Checks{"ortho_refine_backward"}, gU, gV, U, V, steps);
  if (real_of(U) == ScalarType::Float) return refine_backward<float>(gU, gV, U, V, steps, nullptr);
  return refine_backward<double>(gU, gV, U, V, steps, nullptr);
}

std::tuple<Tensor, Tensor, Tensor> ortho_refine_kept_backward(
    const Tensor& gU, const std::optional<Tensor>& gV, const Tensor& U, const std::optional<Tensor>& V,
    const Tensor& steps, const Tensor& U_out, const Tensor& V_out, const Tensor& residuals, const Tensor& norms) {
  constexpr Checks checks{"ortho_refine_kept_backward"};
  check_refine_backward(checks, gU, gV, U, V, steps);
  const std::int64_t factors = V.has_value() ? 2 : 1, B = U.size(0), r = U.size(2);
  checks.tensor("U_out", U_out, U.scalar_type(), shape_of_factor(U, U.size(1)));
  if (V.has_value()) checks.tensor("V_out", V_out, U.scalar_type(), shape_of_factor(U, V->size(1)));
  checks.tensor("residuals", residuals, real_of(U), {B, factors, Upper<float>::size(r)});
  checks.tensor("norms", norms, real_of(U), {B, factors, r});
  const Kept kept{&U_out, &V_out, &residuals, &norms};
  if (real_of(U) == ScalarType::Float) return refine_backward<float>(gU, gV, U, V, steps, &kept);
  return refine_backward<double>(gU, gV, U, V, steps, &kept);
}

// a polynomial's coefficients from the highest on, `count` of those of its square root
std::vector<double> square_root_of(const std::vector<double>& p, int count) {
  std::vector<double> q(count);
  for (int n = 0; n < count; ++n) {
    double rest = p[n];
    for (int i = 1; i < n; ++i) rest -= q[i] * q[n - i];
    q[n] = n == 0 ? std::sqrt(rest) : rest / (2 * q[0]);
  }
  return q;
}

// Coefficients of the products from c, those of the polynomial, with A's constant. What p - A^2 has above X^power
// is -C^2, and what A has there is B^2. False where p - A^2 does not begin with a negative number.
bool factor(const std::vector<double>& c, double constant, Polynomial& fit) {
  const int m = fit.power;
  std::vector<double> high(c.rbegin(), c.rend());
  std::vector<double> a = square_root_of(high, 2 * m);
  a.push_back(constant);
  std::vector<double> rest(high.begin() + 2 * m, high.end());
  for (int n = 0; n <= 2 * m; ++n)
    for (int i = n; i <= 2 * m; ++i) rest[n] -= a[i] * a[2 * m + n - i];
  if (!(rest[0] < 0)) return false;
  std::vector<double> turned(rest);
  for (double& x : turned) x = -x;
  std::vector<double> half = square_root_of(turned, m), base = square_root_of(a, m + 1);
  half.push_back(0);
  fit.base = fit.added = fit.half = fit.rest = {};
  for (int k = 0; k <= m; ++k) {
    fit.base[k] = base[m - k];
    fit.half[k] = half[m - k];
    fit.rest[k] = rest[2 * m - k];
    if (k < m) fit.added[k] = a[2 * m - k];
    for (int i = 0; i <= k; ++i) {
      fit.rest[k] += half[m - i] * half[m - (k - i)];
      if (k < m) fit.added[k] -= base[m - i] * base[m - (k - i)];
    }
  }
  return true;
}

// what the parts of the sums come to, at most: rounding is in proportion
double size_of(const Polynomial& fit) {
  const double x = std::max(-fit.low, fit.high);
  double base = 0, added = 0, half = 0, rest = 0, power = 1;
  for (int k = 0; k <= fit.power; ++k, power *= x) {
    base += std::abs(fit.base[k]) * power;
    added += std::abs(fit.added[k]) * power;
    half += std::abs(fit.half[k]) * power;
    rest += std::abs(fit.rest[k]) * power;
  }
  return std::pow(base * base + added + half, 2) + rest;
}

// All steps as one polynomial in X = U^H U - I: it takes the Chebyshev points' values, and its relative error is at
// most 2e-8, for every number of steps and both orders, as these converge to (I + X)^-1/2.
Polynomial all_steps(std::int64_t steps, const double (&c)[3], Polynomial fit) {
  constexpr int points = 32;
  const int degree = 4 * fit.power;
  const double pi = std::acos(-1.0), middle = (fit.high + fit.low) / 2, radius = (fit.high - fit.low) / 2;
  std::vector<double> chebyshev(degree + 1);
  for (int n = 0; n < points; ++n) {
    const double angle = pi * (n + 0.5) / points;
    double g = 1 + middle + radius * std::cos(angle), value = 1;
    for (std::int64_t i = 0; i < steps; ++i) {
      const double q = c[0] + g * (c[1] + g * c[2]);
      value *= q;
      g *= q * q;
    }
    for (int k = 0; k <= degree; ++k) chebyshev[k] += (k ? 2.0 : 1.0) / points * value * std::cos(k * angle);
  }
  // of few steps it is nothing, and the square root asks for more than nothing
  chebyshev[degree] = std::max(chebyshev[degree], 1e-9);
  // T_k((x - middle) / radius) in powers of x
  std::vector<double> last(degree + 1), now(degree + 1), next(degree + 1), powers(degree + 1);
  now[0] = 1;
  for (int k = 0; k <= degree; ++k) {
    for (int i = 0; i <= k; ++i) powers[i] += chebyshev[k] * now[i];
    const double twice = k ? 2 : 1;
    for (int i = 0; i <= degree; ++i)
      next[i] = twice / radius * ((i ? now[i - 1] : 0.0) - middle * now[i]) - (k ? last[i] : 0.0);
    last = now;
    now = next;
  }
  Polynomial best = fit;
  double least = std::numeric_limits<double>::infinity();
  for (int n = 0; n <= 40; ++n) {
    if (!factor(powers, 0.05 * n, fit) || !(size_of(fit) < least)) continue;
    least = size_of(fit);
    best = fit;
  }
  return best;
}

// by the products they take; a thread keeps those of its last call
const std::vector<Polynomial>& polynomials_of(std::int64_t steps, int order, const double (&c)[3]) {
  thread_local std::vector<Polynomial> kept;
  thread_local std::int64_t kept_steps = 0;
  thread_local int kept_order = 0;
  if (kept_steps != steps || kept_order != order) {
    kept.clear();
    for (const auto& [low, high, power] : {std::tuple{-0.27, 0.33, 2}, {-0.48, 0.56, 3}, {-0.62, 0.62, 4}})
      kept.push_back(all_steps(steps, c, {low, high, power, {}, {}, {}, {}}));
    kept_steps = steps;
    kept_order = order;
  }
  return kept;
}

template <typename T>
Tensor iterate(const Tensor* g, const Tensor& U, std::int64_t steps, std::int64_t order) {
  Tensor out = shaped_like(U);
  Bjorck<T> job{};
  job.U = pointer<T>(U), job.g = g ? pointer<T>(*g) : nullptr, job.out = output<T>(out);
  job.M = U.size(1), job.r = U.size(2), job.steps = steps, job.order = static_cast<int>(order);
  job.backward = g != nullptr;
  if (order == 1) job.bound = 1.6, job.c[0] = 1.5, job.c[1] = -0.5;
  else job.bound = 1.5, job.c[0] = 1.875, job.c[1] = -1.25, job.c[2] = 0.375;
  // three steps and more need more products one by one
  if (sizeof(T) == 4 && !g && steps > 2) job.together = polynomials_of(steps, job.order, job.c);
  if (U.size(0) > 0) run(job, U.size(0));
  return out;
}

void check_bjorck(const Checks& checks, const Tensor& U, std::int64_t steps, std::int64_t order) {
  check_factor(checks, U);
  checks.expect(!is_complex(U), "U must have shape (B, M, r, 2)");
  checks.expect(U.size(1) >= U.size(2), "U must have at least as many rows as columns");
  checks.expect(steps >= 0, "steps must be at least 0, got " + std::to_string(steps));
  checks.expect(order == 1 || order == 2, "order must be 1 or 2, got " + std::to_string(order));
}

Tensor bjorck(const Tensor& U, std::int64_t steps, std::int64_t order) {
  check_bjorck(Checks{"bjorck"}, U, steps, order);
  const bool single = U.scalar_type() == ScalarType::Float;
  return single ? iterate<float>(nullptr, U, steps, order) : iterate<double>(nullptr, U, steps, order);
}

Tensor bjorck_backward(const Tensor& g, const Tensor& U, std::int64_t steps, std::int64_t order) {
  constexpr Checks checks{"bjorck_backward"};
  check_bjorck(checks, U, steps, order);
  checks.tensor("g", g, U.scalar_type(), {U.size(0), U.size(1), U.size(2), 2});
  const bool single = U.scalar_type() == ScalarType::Float;
  return single ? iterate<float>(&g, U, steps, order) : iterate<double>(&g, U, steps, order);
}

}  // namespace
}  // namespace lomacs

STABLE_TORCH_LIBRARY_IMPL(lomacs, CPU, m) {
  m.impl("ortho_refine", TORCH_BOX(&lomacs::ortho_refine));
  m.impl("ortho_refine_backward", TORCH_BOX(&lomacs::ortho_refine_backward));
  m.impl("ortho_refine_kept", TORCH_BOX(&lomacs::ortho_refine_kept));
  m.impl("ortho_refine_kept_backward", TORCH_BOX(&lomacs::ortho_refine_kept_backward));
  m.impl("bjorck", TORCH_BOX(&lomacs::bjorck));
  m.impl("bjorck_backward", TORCH_BOX(&lomacs::bjorck_backward));
}
