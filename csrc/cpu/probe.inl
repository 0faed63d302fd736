// What this machine can do at best, for the "% of limit" of the bench scripts: as simple as can be, so that a kernel is
// compared with the memory and the multipliers and not with another kernel.
#include "simd.h"

namespace kvcache::cpu::KVCACHE_ISA_NS {

// Streams through [bytes / 4] floats; the sum is returned so that the reading cannot be left out.
static double probe_read(const void* data, int64_t bytes) {
  constexpr int kStreams = 8;
  constexpr int64_t kAhead = 2048;  // bytes; a little better here than the hardware's prefetcher alone
  const float* p = static_cast<const float*>(data);
  Vec sums[kStreams] = {};
  for (int64_t i = 0; i + kStreams * kLanes <= bytes / 4; i += kStreams * kLanes) {
    for (int64_t b = 0; b < kStreams * kLanes * 4; b += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(p + i) + b + kAhead, 0, 3);
#pragma GCC unroll 8
    for (int s = 0; s < kStreams; ++s) sums[s] += load(p + i + s * kLanes);
  }
  Vec total = {};
  for (int s = 0; s < kStreams; ++s) total += sums[s];
  return reduce_add(total);
}

// Independent chains of multiply-adds in registers; returns the floating-point operations done.
static int64_t probe_fma(int64_t iterations) {
  constexpr int kChains = kLanes == 4 ? 8 : 12;  // enough to hide the latency of 4 in two units
  Vec x[kChains];
  for (int i = 0; i < kChains; ++i) x[i] = splat(float(i));
  const Vec factor = splat(0.5f);
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) x[i] = fma(x[i], factor, factor);
  }
  Vec total = {};
  for (int i = 0; i < kChains; ++i) total += x[i];
  volatile float keep = reduce_add(total);
  (void)keep;
  return iterations * kChains * kLanes * 2;
}

}  // namespace kvcache::cpu::KVCACHE_ISA_NS
