// One sample's stages shared between threads that may come late or not at all.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lomacs {

// The first thread to come leads: it goes through the stages and hands out each one's shares, taking them from
// the first on; the others take them from the last on, so that both meet the same weights call after call.
// Nobody waits for a thread that has not taken a share: a call whose threads never come is done by the leader.
class Team {
 public:
  // whether the caller leads
  bool enter() { return !led_.exchange(true, std::memory_order_acq_rel); }

  // The leader's: work(0) to work(shares - 1), each once.
  template <typename Work>
  void share(std::uint64_t shares, const Work& work) {
    call_ = [](const void* context, std::uint64_t i) { (*static_cast<const Work*>(context))(i); };
    context_ = &work;
    done_.store(0, std::memory_order_relaxed);
    stage_ = (stage_ + 1) % (1u << 30);
    state_.store(packed(stage_, 0, shares), std::memory_order_release);
    while (take(true)) {
    }
    while (done_.load(std::memory_order_acquire) < shares) pause();
  }

  // The others': takes shares until the leader is through, `idle` between them.
  template <typename Idle>
  void follow(const Idle& idle) {
    while (!over_.load(std::memory_order_acquire))
      if (!take(false)) {
        idle();
        pause();
      }
  }

  // the leader is through, by whatever way
  void finish() { over_.store(true, std::memory_order_release); }

 private:
  static std::uint64_t packed(std::uint64_t stage, std::uint64_t low, std::uint64_t high) {
    return stage << 32 | low << 16 | high;
  }

  bool take(bool first) {
    std::uint64_t state = state_.load(std::memory_order_acquire);
    for (;;) {
      const std::uint64_t low = state >> 16 & 0xffff, high = state & 0xffff;
      if (low >= high) return false;
      const std::uint64_t next = first ? state + (1 << 16) : state - 1;
      // a share that is taken keeps its stage from ending, and with it what is called
      if (state_.compare_exchange_weak(state, next, std::memory_order_acq_rel, std::memory_order_acquire)) {
        call_(context_, first ? low : high - 1);
        done_.fetch_add(1, std::memory_order_release);
        return true;
      }
    }
  }

  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#else
    std::this_thread::yield();
#endif
  }

  std::atomic<bool> led_{false}, over_{false};
  std::uint64_t stage_ = 0;
  // of the stage, the first and the end of the shares that nobody has taken
  alignas(64) std::atomic<std::uint64_t> state_{0};
  void (*call_)(const void*, std::uint64_t) = nullptr;
  const void* context_ = nullptr;
  alignas(64) std::atomic<std::uint64_t> done_{0};
};

}  // namespace lomacs
