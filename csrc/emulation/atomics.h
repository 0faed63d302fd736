// Atomics: plain operations, as only one thread runs; the race build knows them from ordinary accesses.
#pragma once
#include "scheduler.h"

namespace kvcache::emulation {
template <class T>
using Same = std::common_type_t<T>;  // not deduced: the value takes the pointer's type, as in CUDA's overloads
}  // namespace kvcache::emulation

#define KVCACHE_ATOMIC(name, expression)                                              \
  template <class T>                                                                  \
  KVCACHE_UNSEEN T name(T* address, kvcache::emulation::Same<T> value KVCACHE_SITE) { \
    using namespace kvcache::emulation;                                               \
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "atomics have 4 or 8 bytes");     \
    check_aligned(address, sizeof(T), #name, site);                                   \
    note(address, sizeof(T), Access::kAtomic, site);                                  \
    const T old = *address;                                                           \
    *address = static_cast<T>(expression);                                            \
    return old;                                                                       \
  }
KVCACHE_ATOMIC(atomicAdd, old + value)
KVCACHE_ATOMIC(atomicSub, old - value)
KVCACHE_ATOMIC(atomicMin, value < old ? value : old)
KVCACHE_ATOMIC(atomicMax, old < value ? value : old)
KVCACHE_ATOMIC(atomicExch, value)
KVCACHE_ATOMIC(atomicAnd, old& value)
KVCACHE_ATOMIC(atomicOr, old | value)
KVCACHE_ATOMIC(atomicXor, old ^ value)
KVCACHE_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
KVCACHE_ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1)
#undef KVCACHE_ATOMIC

template <class T>
KVCACHE_UNSEEN T atomicCAS(T* address, kvcache::emulation::Same<T> compare,
                           kvcache::emulation::Same<T> value KVCACHE_SITE) {
  using namespace kvcache::emulation;
  check_aligned(address, sizeof(T), "atomicCAS", site);
  note(address, sizeof(T), Access::kAtomic, site);
  const T old = *address;
  if (old == compare) *address = value;
  return old;
}

inline void __threadfence_block() {}
KVCACHE_UNSEEN inline void __threadfence() {
  if (kvcache::emulation::checks) kvcache::emulation::checks->fence();
}
KVCACHE_UNSEEN inline void __threadfence_system() { __threadfence(); }
