// What every op on the CPU needs of its tensors: checks that name the argument, pointers, aligned scratch.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

namespace lomacs {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const std::vector<std::int64_t>& sizes) {
  std::string text = "(";
  for (std::size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + ")";
}

// the dtypes that an op may ask for
inline const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    default: return "float64";
  }
}

// Complex numbers lie in memory as pairs of real ones: channels and factors may come as either.
inline bool is_complex(const Tensor& x) {
  return x.scalar_type() == ScalarType::ComplexFloat || x.scalar_type() == ScalarType::ComplexDouble;
}

inline ScalarType real_of(const Tensor& x) {
  if (x.scalar_type() == ScalarType::ComplexFloat) return ScalarType::Float;
  return x.scalar_type() == ScalarType::ComplexDouble ? ScalarType::Double : x.scalar_type();
}

// the shape (B, rows, columns) of complex numbers as x holds them
inline std::vector<std::int64_t> shape_as(const Tensor& x, std::int64_t B, std::int64_t rows, std::int64_t columns) {
  std::vector<std::int64_t> shape{B, rows, columns};
  if (!is_complex(x)) shape.push_back(2);
  return shape;
}

// The checks of one op, whose name begins every message.
struct Checks {
  const char* op;

  // the message of a check that holds is never made
  void expect(bool ok, const char* message) const {
    if (!ok) fail(message);
  }
  void expect(bool ok, const std::string& message) const {
    if (!ok) fail(message);
  }
  [[noreturn]] void fail(const std::string& message) const {
    throw std::runtime_error(std::string("lomacs::") + op + ": " + message);
  }

  void real(const char* name, ScalarType dtype) const {
    if (dtype != ScalarType::Float && dtype != ScalarType::Double)
      fail(std::string(name) + " must be float32 or float64");
  }

  // contiguous, on the CPU, of this dtype and shape
  void tensor(const char* name, const Tensor& x, ScalarType dtype, std::initializer_list<std::int64_t> sizes) const {
    tensor(name, x, dtype, sizes.begin(), sizes.end());
  }
  void tensor(const char* name, const Tensor& x, ScalarType dtype, const std::vector<std::int64_t>& sizes) const {
    tensor(name, x, dtype, sizes.data(), sizes.data() + sizes.size());
  }

  // channels, whose sizes are for the caller to look at
  void channels(const Tensor& H) const {
    real("H", real_of(H));
    expect(H.dim() == (is_complex(H) ? 3 : 4), "H must have shape (B, M, N, 2), or (B, M, N) and be complex");
  }

  // B rows of a table of so many
  void scenes(const Tensor& scene, std::int64_t B, std::int64_t rows) const {
    expect(scene.scalar_type() == ScalarType::Long && scene.is_cpu() && scene.is_contiguous() && scene.dim() == 1 &&
               scene.size(0) == B,
           "scene must be a contiguous int64 tensor (B,) on the CPU");
    const auto* found = static_cast<const std::int64_t*>(scene.const_data_ptr());
    for (std::int64_t b = 0; b < B; ++b)
      expect(found[b] >= 0 && found[b] < rows, "scene must name a row of table");
  }

 private:
  void tensor(const char* name, const Tensor& x, ScalarType dtype, const std::int64_t* begin,
              const std::int64_t* end) const {
    const auto given = x.sizes();
    const bool fits = std::equal(given.begin(), given.end(), begin, end);
    if (fits && x.scalar_type() == dtype && x.is_cpu() && x.is_contiguous()) return;
    const std::string who = name;
    if (!fits)
      fail(who + " must have shape " + shape_of({begin, end}) + ", got " + shape_of({given.begin(), given.end()}));
    if (x.scalar_type() != dtype) fail(who + " must be " + name_of(dtype) + " to go with the other arguments");
    if (!x.is_cpu()) fail(who + " must be on the CPU");
    fail(who + " must be contiguous");
  }
};

// Memory of a result on the CPU, like x but for the shape, and the dtype where one is given: without the two
// dispatches of a `new_empty`, which are felt in a call of one sample.
inline Tensor fresh(const Tensor& x, const std::vector<std::int64_t>& sizes, ScalarType dtype) {
  std::vector<std::int64_t> strides(sizes.size());
  // unsigned, because what is too large is for the allocator to refuse
  std::uint64_t stride = 1;
  for (std::size_t i = sizes.size(); i-- > 0; stride *= static_cast<std::uint64_t>(std::max<std::int64_t>(sizes[i], 1)))
    strides[i] = static_cast<std::int64_t>(stride);
  std::int32_t device = 0, index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x.get(), &index));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<std::int64_t>(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<std::int32_t>(torch::stable::detail::from(dtype)), device, index, &made));
  return Tensor(made);
}

inline Tensor fresh(const Tensor& x, const std::vector<std::int64_t>& sizes) {
  return fresh(x, sizes, x.scalar_type());
}

inline Tensor fresh_like(const Tensor& x) {
  const auto sizes = x.sizes();
  return fresh(x, {sizes.begin(), sizes.end()});
}

template <typename T>
const T* pointer(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

// null for an output that is not wanted
template <typename T>
T* output(const Tensor& x, bool wanted = true) {
  return wanted ? static_cast<T*>(x.mutable_data_ptr()) : nullptr;
}

constexpr std::align_val_t cache_line{64};

template <typename T>
T* allocate(std::int64_t n) {
  return static_cast<T*>(::operator new(sizeof(T) * static_cast<std::size_t>(n), cache_line));
}

inline void release(void* p) { ::operator delete(p, cache_line); }

// One allocation of one thread in parts: `plan(arena)` runs twice, to measure and to get what it takes.
template <typename T>
class Arena {
 public:
  template <typename Plan>
  explicit Arena(const Plan& plan, bool zeros = false) {
    plan(*this);
    memory_ = next_ = allocate<T>(size_);
    if (zeros) std::memset(static_cast<void*>(memory_), 0, sizeof(T) * static_cast<std::size_t>(size_));
    plan(*this);
  }
  ~Arena() { release(memory_); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  T* take(std::int64_t n) {
    // odd multiples of a cache line keep equal offsets of two parts from falling together
    const std::int64_t padded = (n + 31) / 32 * 32 + 16;
    T* p = next_;
    if (memory_ != nullptr) next_ += padded;
    else size_ += padded;
    return p;
  }

 private:
  T *memory_ = nullptr, *next_ = nullptr;
  std::int64_t size_ = 0;
};

}  // namespace lomacs
