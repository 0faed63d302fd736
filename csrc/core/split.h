// Into how many pieces decode attention cuts the entries of a head, so that few heads still occupy all threads.
#pragma once
#include <algorithm>
#include <cstdint>

namespace kvcache {

// Smallest number of pieces whose parallel efficiency is within 5 % of the best; every piece keeps at least
// kEntriesPerSplit entries, since each costs a partial result and a share of the combine pass.
inline int32_t decode_splits(int64_t threads, int64_t rows, int64_t heads, int64_t max_count) {
  constexpr int64_t kEntriesPerSplit = 256, kMaxSplits = 64;
  const int64_t items = rows * heads;
  const int64_t most = std::min(max_count / kEntriesPerSplit, kMaxSplits);
  if (items <= 0 || threads <= 1 || most <= 1) return 1;
  auto efficiency = [&](int64_t splits) {
    const int64_t work = items * splits, waves = (work + threads - 1) / threads;
    return double(work) / double(waves * threads);
  };
  double best = 0;
  for (int64_t s = 1; s <= most; ++s) best = std::max(best, efficiency(s));
  for (int64_t s = 1; s <= most; ++s) {
    if (efficiency(s) >= 0.95 * best) return int32_t(s);
  }
  return 1;
}

}  // namespace kvcache
