// What the real stems share outside the vectorised code: padded rows, sums over samples in a fixed order, dtypes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "sums.h"
#include "tensors.h"

namespace lomacs {

// numbers of a row that holds whole vectors of every instruction set
inline std::int64_t vectors(std::int64_t n) { return (n + 15) / 16 * 16; }

// samples of a chunk: their sums are as large as the weights, so a few samples share them at least
inline std::int64_t tokens_chunk(std::int64_t batch) { return std::max<std::int64_t>(4, chunk_of(batch)); }

// sums kept as vectors of `lanes` parts, 16 apart: to[0..n) = the sum over parts and chunks
template <typename T>
void sum_of_lanes(const T* from, std::int64_t stride, std::int64_t chunks, std::int64_t n, T* to) {
  for (std::int64_t i = 0; i < n; ++i) {
    double total = 0;
    for (std::int64_t c = 0; c < chunks; ++c)
      for (int j = 0; j < 16; ++j) total += static_cast<double>(from[c * stride + 16 * i + j]);
    to[i] = static_cast<T>(total);
  }
}

inline bool is_half(ScalarType dtype) { return dtype == ScalarType::BFloat16 || dtype == ScalarType::Half; }

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    default: return "another dtype";
  }
}

struct RealChecks {
  Checks checks;
  ScalarType dtype;

  RealChecks(const char* op, const Tensor& x) : checks{op}, dtype(x.scalar_type()) {
    checks.expect(dtype == ScalarType::Float || dtype == ScalarType::Double || is_half(dtype),
                  "x must be float32, float64, bfloat16 or float16");
  }

  // contiguous, on the CPU, of x's dtype and this shape; the message is made when it is needed
  void tensor(const char* name, const Tensor& t, std::initializer_list<std::int64_t> sizes) const {
    const auto got = t.sizes();
    if (std::equal(got.begin(), got.end(), sizes.begin(), sizes.end()) && t.scalar_type() == dtype &&
        t.is_cpu() && t.is_contiguous())
      return;
    if (t.scalar_type() != dtype)
      checks.fail(std::string(name) + " must be " + dtype_name(dtype) + " as x is, got " +
                  dtype_name(t.scalar_type()));
    checks.tensor(name, t, dtype, sizes);
  }

  void norm(std::int64_t d, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
            double eps) const {
    checks.expect(!weight || eps > 0, "eps must be positive");
    checks.expect(weight || !bias, "norm_bias goes with norm_weight");
    if (weight) tensor("norm_weight", *weight, {d});
    if (bias) tensor("norm_bias", *bias, {d});
  }

  // nothing has a dimension of 0 but the batch
  void filled(std::initializer_list<std::int64_t> sizes) const {
    for (std::int64_t n : sizes) checks.expect(n > 0, "no dimension but the batch may be empty");
  }
};

// half precision as single; anything else as it is
inline Tensor widened(const Tensor& t) {
  return is_half(t.scalar_type()) ? torch::stable::to(t, ScalarType::Float) : t;
}

inline std::optional<Tensor> widened(const std::optional<Tensor>& t) {
  return t ? std::optional<Tensor>(widened(*t)) : t;
}

inline Tensor narrowed(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

// Aligned memory, not initialised.
template <typename T>
struct Memory {
  T* p;
  explicit Memory(std::int64_t n) : p(allocate<T>(std::max<std::int64_t>(n, 1))) {}
  ~Memory() { release(p); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
};

}  // namespace lomacs
