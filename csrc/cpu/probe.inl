// What this machine can do at best, for the "% of limit" of the bench scripts: as simple as can be, so that a kernel is
// compared with the memory and the multipliers and not with another kernel.
#include "simd.h"

namespace kvcache::cpu::KVCACHE_ISA_NS {

// Sums up [bytes / 4] floats; the sum is returned so that the reading cannot be left out. Four pages of memory at a time: where
// the hardware's prefetcher follows several streams that is a quarter more than one after the other (Zen 3: 11 and 9 GB/s).
static double probe_read(const void* data, int64_t bytes) {
  constexpr int kStreams = 4;
  constexpr int64_t kPart = 4096;
  const char* p = static_cast<const char*>(data);
  Vec sums[2 * kStreams] = {};
  const int64_t whole = bytes / (kStreams * kPart) * (kStreams * kPart);
  for (int64_t i = 0; i < whole; i += kStreams * kPart) {
    for (int64_t b = 0; b < kPart; b += 64) {
#pragma GCC unroll 8
      for (int s = 0; s < kStreams; ++s) {
        const char* from = p + i + s * kPart + b;
        __builtin_prefetch(from + kStreams * kPart, 0, 2);
        for (int v = 0; v < 64; v += kLanes * 4) sums[s] += load(reinterpret_cast<const float*>(from + v));
      }
    }
  }
  Vec total = {};
  for (int s = 0; s < 2 * kStreams; ++s) total += sums[s];
  for (int64_t b = whole; b < bytes; b += kLanes * 4) total += load(reinterpret_cast<const float*>(p + b));
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
