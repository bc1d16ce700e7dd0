// Lengths of a discrete Fourier transform as passes of small radices: what every instruction set shares.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

namespace lomacs {

// One pass: blocks of `radix` times `step` numbers, of which every step-th go through a butterfly.
template <typename T>
struct FftPass {
  std::int64_t radix, step;
  // radix - 1 complex factors for each of the `step` butterflies of a block
  std::vector<T> twiddles;
  // cos and sin of 2 pi k / radix, for odd radices
  std::vector<T> cosines, sines;
};

// Forward: passes in order, decimated in frequency; position p then holds frequency `frequency[p]`.
// The inverse undoes them in turn, so that no spectrum is ever reordered.
template <typename T>
struct FftPlan {
  std::int64_t n;
  std::vector<FftPass<T>> passes;
  std::vector<std::int64_t> frequency;

  // the widest radix; scratch for that many numbers
  std::int64_t widest() const {
    std::int64_t width = 1;
    for (const FftPass<T>& pass : passes) width = std::max(width, pass.radix);
    return width;
  }

  // the plan of a length, made once: its sines cost as much as a small transform
  static std::shared_ptr<const FftPlan> of(std::int64_t length) {
    static std::mutex mutex;
    static std::map<std::int64_t, std::shared_ptr<const FftPlan>> plans;
    const std::lock_guard<std::mutex> guard(mutex);
    // lengths without end would be kept without end
    if (plans.size() > 64) plans.clear();
    std::shared_ptr<const FftPlan>& plan = plans[length];
    if (plan == nullptr) plan = std::make_shared<const FftPlan>(length);
    return plan;
  }

  explicit FftPlan(std::int64_t length) : n(length), frequency(static_cast<std::size_t>(length)) {
    std::vector<std::int64_t> radices;
    std::int64_t rest = n, twos = 0;
    for (; rest % 2 == 0; rest /= 2) ++twos;
    // eights, but 4 x 4 for what 8 x 2 would be
    for (; twos >= 3 && twos != 4; twos -= 3) radices.push_back(8);
    for (; twos >= 2; twos -= 2) radices.push_back(4);
    if (twos) radices.push_back(2);
    for (std::int64_t p = 3; rest > 1; p += 2)
      for (; rest % p == 0; rest /= p) radices.push_back(p);

    std::int64_t block = n;
    for (const std::int64_t radix : radices) {
      FftPass<T> pass{radix, block / radix, {}, {}, {}};
      const double angle = 2 * 3.14159265358979323846 / static_cast<double>(block);
      for (std::int64_t j = 0; j < pass.step; ++j)
        for (std::int64_t k = 1; k < radix; ++k) {
          const double a = angle * static_cast<double>(j * k);
          pass.twiddles.push_back(static_cast<T>(std::cos(a)));
          pass.twiddles.push_back(static_cast<T>(-std::sin(a)));
        }
      for (std::int64_t k = 0; radix % 2 && k < radix; ++k) {
        const double a = angle * static_cast<double>(pass.step * k);
        pass.cosines.push_back(static_cast<T>(std::cos(a)));
        pass.sines.push_back(static_cast<T>(std::sin(a)));
      }
      passes.push_back(pass);
      block = pass.step;
    }
    for (std::int64_t p = 0; p < n; ++p) {
      std::int64_t f = 0, weight = 1, at = p;
      for (const FftPass<T>& pass : passes) {
        f += weight * (at / pass.step);
        at %= pass.step;
        weight *= pass.radix;
      }
      frequency[static_cast<std::size_t>(p)] = f;
    }
  }
};

}  // namespace lomacs
