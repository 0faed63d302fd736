// What -fsanitize=thread makes the compiler call. The kernels are linked with these instead of libtsan. Never compiled
// with -fsanitize=thread itself.
#include <cstring>

#include "race_check.h"

using kvcache::emulation::Access;

#define KVCACHE_HERE kvcache::emulation::place_of(__builtin_return_address(0))
#define KVCACHE_HOOKS(n)                                                                                             \
  void __tsan_read##n(void* p) { kvcache::emulation::access(p, n, Access::kRead, KVCACHE_HERE); }                    \
  void __tsan_write##n(void* p) { kvcache::emulation::access(p, n, Access::kWrite, KVCACHE_HERE); }                  \
  void __tsan_unaligned_read##n(void* p) { kvcache::emulation::access(p, n, Access::kRead, KVCACHE_HERE); }          \
  void __tsan_unaligned_write##n(void* p) { kvcache::emulation::access(p, n, Access::kWrite, KVCACHE_HERE); }        \
  void __tsan_volatile_read##n(void* p) { kvcache::emulation::access(p, n, Access::kRead, KVCACHE_HERE); }           \
  void __tsan_volatile_write##n(void* p) { kvcache::emulation::access(p, n, Access::kWrite, KVCACHE_HERE); }         \
  void __tsan_unaligned_volatile_read##n(void* p) { kvcache::emulation::access(p, n, Access::kRead, KVCACHE_HERE); } \
  void __tsan_unaligned_volatile_write##n(void* p) { kvcache::emulation::access(p, n, Access::kWrite, KVCACHE_HERE); }

extern "C" {

KVCACHE_HOOKS(1)
KVCACHE_HOOKS(2)
KVCACHE_HOOKS(4)
KVCACHE_HOOKS(8)
KVCACHE_HOOKS(16)
void __tsan_read_range(void* p, long n) { kvcache::emulation::access(p, size_t(n), Access::kRead, KVCACHE_HERE); }
void __tsan_write_range(void* p, long n) { kvcache::emulation::access(p, size_t(n), Access::kWrite, KVCACHE_HERE); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}

// What memcpy and the like are in the kernels (cuda_on_host.h): the compiler reports no calls of those.
void* kvcache_memcpy(void* to, const void* from, size_t n) {
  kvcache::emulation::access(from, n, Access::kRead, KVCACHE_HERE);
  kvcache::emulation::access(to, n, Access::kWrite, KVCACHE_HERE);
  return std::memcpy(to, from, n);
}
void* kvcache_memmove(void* to, const void* from, size_t n) {
  kvcache::emulation::access(from, n, Access::kRead, KVCACHE_HERE);
  kvcache::emulation::access(to, n, Access::kWrite, KVCACHE_HERE);
  return std::memmove(to, from, n);
}
void* kvcache_memset(void* to, int value, size_t n) {
  kvcache::emulation::access(to, n, Access::kWrite, KVCACHE_HERE);
  return std::memset(to, value, n);
}
}
