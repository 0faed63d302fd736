// Barriers, shuffles, votes and reductions of a warp. The last parameter of each is the line that calls it: the lanes of
// a warp must meet at the same one.
#pragma once
#include "scheduler.h"

inline void __syncthreads(KVCACHE_ONLY_SITE) { kvcache::emulation::barrier("__syncthreads", site); }
inline int __syncthreads_or(int predicate KVCACHE_SITE) {
  return kvcache::emulation::barrier("__syncthreads_or", site, predicate != 0, kvcache::emulation::Reduction::kOr);
}
inline int __syncthreads_and(int predicate KVCACHE_SITE) {
  return kvcache::emulation::barrier("__syncthreads_and", site, predicate != 0, kvcache::emulation::Reduction::kAnd);
}
inline int __syncthreads_count(int predicate KVCACHE_SITE) {
  return kvcache::emulation::barrier("__syncthreads_count", site, predicate != 0);
}
inline void __syncwarp(unsigned mask = 0xffffffffu KVCACHE_SITE) { kvcache::emulation::sync_warp(mask, site); }

// Which lanes happen to run together is not defined; a kernel that asks is wrong.
unsigned __activemask() = delete;

namespace kvcache::emulation {

// CUDA has shuffles of int, long, float and their kin; smaller types are promoted.
template <class T>
using Promoted = decltype(+T());
template <class T>
constexpr bool kShuffled = std::is_arithmetic_v<T> && (sizeof(Promoted<T>) == 4 || sizeof(Promoted<T>) == 8);

[[noreturn]] void refuse_lane(unsigned lane, const char* what, Site site);
template <class T>
KVCACHE_UNSEEN T from_lane(unsigned mask, const Slot* slots, unsigned lane, const char* what, Site site) {
  if (lane >= kWarp || !(mask >> lane & 1)) refuse_lane(lane, what, site);
  return value_of<T>(slots, lane);
}

[[noreturn]] void refuse_width(int width, const char* what, Site site);
inline void check_width(int width, const char* what, Site site) {
  if (width < 1 || width > 32 || (width & (width - 1))) refuse_width(width, what, site);
}

}  // namespace kvcache::emulation

template <class T, class = std::enable_if_t<kvcache::emulation::kShuffled<T>>>
KVCACHE_UNSEEN auto __shfl_sync(unsigned mask, T mine, int source, int width = 32 KVCACHE_SITE) {
  using namespace kvcache::emulation;
  using V = Promoted<T>;
  check_width(width, "__shfl_sync", site);
  const Slot* slots = meet<V>(mask, mine, "__shfl_sync", site);
  return from_lane<V>(mask, slots, (self->lane & ~unsigned(width - 1)) | (source & (width - 1)), "__shfl_sync", site);
}

template <class T, class = std::enable_if_t<kvcache::emulation::kShuffled<T>>>
KVCACHE_UNSEEN auto __shfl_xor_sync(unsigned mask, T mine, int bits, int width = 32 KVCACHE_SITE) {
  using namespace kvcache::emulation;
  using V = Promoted<T>;
  check_width(width, "__shfl_xor_sync", site);
  const Slot* slots = meet<V>(mask, mine, "__shfl_xor_sync", site);
  // A lane of an earlier segment can be read, one of a later segment cannot.
  const unsigned source = self->lane ^ unsigned(bits), last = self->lane | unsigned(width - 1);
  return source > last ? V(mine) : from_lane<V>(mask, slots, source, "__shfl_xor_sync", site);
}

template <class T, class = std::enable_if_t<kvcache::emulation::kShuffled<T>>>
KVCACHE_UNSEEN auto __shfl_up_sync(unsigned mask, T mine, unsigned distance, int width = 32 KVCACHE_SITE) {
  using namespace kvcache::emulation;
  using V = Promoted<T>;
  check_width(width, "__shfl_up_sync", site);
  const Slot* slots = meet<V>(mask, mine, "__shfl_up_sync", site);
  if ((self->lane & unsigned(width - 1)) < distance) return V(mine);
  return from_lane<V>(mask, slots, self->lane - distance, "__shfl_up_sync", site);
}

template <class T, class = std::enable_if_t<kvcache::emulation::kShuffled<T>>>
KVCACHE_UNSEEN auto __shfl_down_sync(unsigned mask, T mine, unsigned distance, int width = 32 KVCACHE_SITE) {
  using namespace kvcache::emulation;
  using V = Promoted<T>;
  check_width(width, "__shfl_down_sync", site);
  const Slot* slots = meet<V>(mask, mine, "__shfl_down_sync", site);
  if ((self->lane & unsigned(width - 1)) + distance >= unsigned(width)) return V(mine);
  return from_lane<V>(mask, slots, self->lane + distance, "__shfl_down_sync", site);
}

namespace kvcache::emulation {

// The last lane folds the values into slot `first lane of the mask`; V is what was handed in.
template <class V, class Fold>
KVCACHE_UNSEEN void fold(Slot* slots, unsigned mask, V start, Fold step) {
  for (unsigned rest = mask; rest; rest &= rest - 1) {
    const unsigned lane = __builtin_ctz(rest);
    start = step(start, value_of<V>(slots, lane), lane);
  }
  __builtin_memcpy(slots[__builtin_ctz(mask)].bytes, &start, sizeof start);
}

KVCACHE_UNSEEN inline unsigned ballot(unsigned mask, int predicate, const char* what, Site site) {
  const Slot* slots = meet<unsigned>(mask, predicate != 0, what, site, [](Slot* all, unsigned m) {
    fold<unsigned>(all, m, 0u, [](unsigned sum, unsigned vote, unsigned lane) { return sum | vote << lane; });
  });
  return value_of<unsigned>(slots, __builtin_ctz(mask));
}

}  // namespace kvcache::emulation

KVCACHE_UNSEEN inline unsigned __ballot_sync(unsigned mask, int predicate KVCACHE_SITE) {
  return kvcache::emulation::ballot(mask, predicate, "__ballot_sync", site);
}
KVCACHE_UNSEEN inline int __any_sync(unsigned mask, int predicate KVCACHE_SITE) {
  return kvcache::emulation::ballot(mask, predicate, "__any_sync", site) != 0;
}
KVCACHE_UNSEEN inline int __all_sync(unsigned mask, int predicate KVCACHE_SITE) {
  return kvcache::emulation::ballot(mask, predicate, "__all_sync", site) == mask;
}

template <class T, class = std::enable_if_t<kvcache::emulation::kShuffled<T>>>
KVCACHE_UNSEEN unsigned __match_any_sync(unsigned mask, T mine KVCACHE_SITE) {
  using namespace kvcache::emulation;
  const Slot* slots = meet<T>(mask, mine, "__match_any_sync", site);
  unsigned same = 0;
  for (unsigned rest = mask; rest; rest &= rest - 1) {
    const unsigned lane = __builtin_ctz(rest);
    if (!__builtin_memcmp(slots[lane].bytes, &mine, sizeof mine)) same |= 1u << lane;  // bits: NaN matches itself
  }
  return same;
}

#define KVCACHE_REDUCE(name, T, start, expression)                                   \
  KVCACHE_UNSEEN inline T name(unsigned mask, T mine KVCACHE_SITE) {                 \
    using namespace kvcache::emulation;                                              \
    const Slot* slots = meet<T>(mask, mine, #name, site, [](Slot* all, unsigned m) { \
      fold<T>(all, m, start, [](T a, T b, unsigned) -> T { return expression; });    \
    });                                                                              \
    return value_of<T>(slots, __builtin_ctz(mask));                                  \
  }
KVCACHE_REDUCE(__reduce_add_sync, unsigned, 0u, a + b)
KVCACHE_REDUCE(__reduce_min_sync, unsigned, ~0u, b < a ? b : a)
KVCACHE_REDUCE(__reduce_max_sync, unsigned, 0u, a < b ? b : a)
KVCACHE_REDUCE(__reduce_and_sync, unsigned, ~0u, a& b)
KVCACHE_REDUCE(__reduce_or_sync, unsigned, 0u, a | b)
KVCACHE_REDUCE(__reduce_xor_sync, unsigned, 0u, a ^ b)
KVCACHE_REDUCE(__reduce_add_sync, int, 0, int(unsigned(a) + unsigned(b)))
KVCACHE_REDUCE(__reduce_min_sync, int, INT32_MAX, b < a ? b : a)
KVCACHE_REDUCE(__reduce_max_sync, int, INT32_MIN, a < b ? b : a)
#undef KVCACHE_REDUCE
