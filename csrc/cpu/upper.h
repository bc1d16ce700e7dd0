// The upper half of a Hermitian matrix as a forward keeps it for its backward.
#pragma once

#include <cstdint>

namespace lomacs {

// Whatever the instruction set: blocks of 16 columns, each of the rows down to the end of the diagonal's square, a row
// 16 real parts, then as many imaginary ones. Left of the diagonal there may be anything finite.
template <typename T>
struct Upper {
  T* data = nullptr;

  static constexpr std::int64_t block = 16, step = 2 * block, imag = block;

  static std::int64_t size(std::int64_t n) { return before((n + block - 1) / block) * step; }
  // rows of the blocks before this one, and of this one
  static std::int64_t before(std::int64_t number) { return number * (number + 1) / 2 * block; }
  static std::int64_t rows(std::int64_t number) { return (number + 1) * block; }
  T* at(std::int64_t i, std::int64_t column) const {
    return data + (before(column / block) + i) * step + column % block;
  }
};

}  // namespace lomacs
