// Vectors of any width by the vector extensions of GCC and Clang, and the choice of instruction set at run time.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

namespace lomacs {

enum class Isa { portable, avx2, avx512 };

inline bool has(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == Isa::avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return isa == Isa::portable;
}

// Whether vectors are added beside multiplications, not in their turn, so that a sum more for a product less pays;
// LOMACS_FAST_PAIRS=0 or 1 decides instead.
inline bool adds_beside() {
  const char* name = std::getenv("LOMACS_FAST_PAIRS");
  if (name == nullptr || *name == '\0') {
#if defined(__x86_64__)
    static const bool amd = __builtin_cpu_is("amd");
    return amd;
#else
    return false;
#endif
  }
  if (std::strcmp(name, "0") != 0 && std::strcmp(name, "1") != 0)
    throw std::runtime_error(std::string("LOMACS_FAST_PAIRS must be 0 or 1, got ") + name);
  return *name == '1';
}

// the widest set that this processor has, or the one that LOMACS_FAST_ISA names
inline Isa choose_isa() {
  // an error of a thread's would have no message
  adds_beside();
  const char* name = std::getenv("LOMACS_FAST_ISA");
  if (name == nullptr || *name == '\0') {
    static const Isa best = has(Isa::avx512) ? Isa::avx512 : has(Isa::avx2) ? Isa::avx2 : Isa::portable;
    return best;
  }
  const std::string forced = name;
  Isa isa;
  if (forced == "portable") isa = Isa::portable;
  else if (forced == "avx2") isa = Isa::avx2;
  else if (forced == "avx512") isa = Isa::avx512;
  else throw std::runtime_error("LOMACS_FAST_ISA must be portable, avx2 or avx512, got " + forced);
  if (!has(isa)) throw std::runtime_error("LOMACS_FAST_ISA is " + forced + ", which this processor lacks");
  return isa;
}

template <typename T, int BYTES>
struct Simd {
  using Index = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;
  typedef T Vec __attribute__((vector_size(BYTES)));
  typedef Index Mask __attribute__((vector_size(BYTES)));
  // for loads and stores that know no more than the alignment of T
  typedef T Loose __attribute__((vector_size(BYTES), aligned(alignof(T)), may_alias));
};

// What the next sample will read, brought into the cache a little at a time by the products of this one: a line a
// round of their loops, since lines asked for at once wait for each other and the multipliers for them.
class Ahead {
 public:
  // how many cache lines a block of a product
  explicit Ahead(std::int64_t lines = 16) : lines_(lines) {}

  // stretches of so many bytes, `stride` bytes from the beginning of one to that of the next
  void add(const void* p, std::size_t bytes, std::int64_t stretches = 1, std::size_t stride = 0) {
    const char* at = static_cast<const char*>(p);
    ranges_[count_++] = {at, at, at + bytes, stretches, stride};
  }

  // so many lines at once
  void fetch(std::int64_t lines) {
    for (; lines > 0 && count_ > 0; --lines) {
      __builtin_prefetch(ranges_[count_ - 1].at, 0, 2);
      advance(64);
    }
  }

  // A block's part. `step` is called once a round, as often as `next` was told, and may run past a stretch's end.
  struct Run {
    const char* at;
    std::int64_t pace;

    void step() {
      __builtin_prefetch(at, 0, 2);
      at += pace;
    }
  };
  Run next(std::int64_t rounds) {
    if (count_ == 0) return {reinterpret_cast<const char*>(this), 0};
    // of short loops the first rounds have no room for all
    fetch(lines_ - rounds);
    if (count_ == 0) return {reinterpret_cast<const char*>(this), 0};
    const std::int64_t bytes = 64 * std::min(lines_, rounds);
    const Run run{ranges_[count_ - 1].at, bytes / rounds};
    advance(bytes);
    return run;
  }

 private:
  struct Range {
    const char *begin, *at, *end;
    std::int64_t stretches;
    std::size_t stride;
  };
  void advance(std::int64_t bytes) {
    Range& range = ranges_[count_ - 1];
    range.at += bytes;
    if (range.at < range.end) return;
    if (--range.stretches <= 0) {
      --count_;
      return;
    }
    range.begin += range.stride;
    range.end += range.stride;
    range.at = range.begin;
  }

  Range ranges_[12];
  std::int64_t lines_;
  int count_ = 0;
};

}  // namespace lomacs

// calls a function of the namespace of an instruction set
#if defined(__x86_64__)
#define LOMACS_DISPATCH(isa, call)             \
  do {                                         \
    if ((isa) == Isa::avx512) avx512::call;    \
    else if ((isa) == Isa::avx2) avx2::call;   \
    else portable::call;                       \
  } while (false)
#else
#define LOMACS_DISPATCH(isa, call) ((void)(isa), portable::call)
#endif

#if defined(__clang__)
#define LOMACS_SHUFFLE(T, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define LOMACS_SHUFFLE(T, a, b, ...) \
  __builtin_shuffle(a, b, typename Simd<T, LOMACS_BYTES>::Mask{__VA_ARGS__})
#endif
