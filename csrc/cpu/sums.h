// Sums over the samples of a batch, in an order that no number of threads changes: chunks of a fixed size,
// each summed in order, then the chunks in order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace lomacs {

// samples of a chunk: few enough chunks that their sums stay small, enough for many threads
inline std::int64_t chunk_of(std::int64_t B) { return std::max<std::int64_t>(1, (B + 31) / 32); }

// tasks of this many operations that are worth a thread: about 20 us
inline std::int64_t share_of(std::int64_t operations) {
  return std::max<std::int64_t>(1, (1 << 19) / std::max<std::int64_t>(1, operations));
}

}  // namespace lomacs
