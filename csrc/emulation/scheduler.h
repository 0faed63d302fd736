// How the emulated threads of a block take turns. Test builds only.
//
// Every CUDA thread is a fiber of the calling thread. A fiber runs until it has to wait in a barrier or a warp
// collective; then the next lane of its warp goes on, and the next warp when no lane can. Blocks run one after another.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "vector_types.h"

// Bookkeeping is not the kernel's memory traffic: the race build must not see it.
#if defined(__SANITIZE_THREAD__)
#define KVCACHE_UNSEEN __attribute__((no_sanitize("thread")))
#else
#define KVCACHE_UNSEEN
#endif
#define KVCACHE_SITE , ::kvcache::emulation::Site site = {__builtin_FILE(), __builtin_LINE()}
#define KVCACHE_ONLY_SITE ::kvcache::emulation::Site site = {__builtin_FILE(), __builtin_LINE()}
#define KVCACHE_AT_SITE , site

namespace kvcache::emulation {

constexpr unsigned kWarp = 32, kMaxThreads = 1024, kMaxWarps = kMaxThreads / kWarp;
constexpr size_t kMaxShared = 227 * 1024;  // dynamic shared memory of a block on sm_90

struct Site {
  const char* file;
  int line;
};

struct Copy {  // an asynchronous copy under way
  void* target;
  const void* source;
  uint32_t bytes, group;
  bool full;
  Site site;
};

struct Fiber {
  uint3 thread;  // threadIdx
  uint32_t number, warp, lane;
  const char* what;  // it waits in
  Site site;
  std::vector<Copy> copies;  // issued and not waited for, oldest first
  uint32_t copy_group;       // that the next copies belong to
};

struct Block {
  uint3 index;
  dim3 grid, size;
  unsigned threads;
  unsigned char* shared;  // dynamic shared memory
  size_t shared_bytes;
};

extern Fiber* self;  // null outside of kernels
extern Block block;

[[noreturn]] void fail(const std::string& why);  // ends the launch with an exception
std::string text(Site site);
std::string text_at(const char* what, Site site);
extern bool random_order;  // threads, warps and blocks run in one
uint64_t random_number();

// --- what waits

enum class Reduction { kSum, kAnd, kOr };
int barrier(const char* what, Site site, int value = 0, Reduction reduction = Reduction::kSum);

// A warp collective: every lane of the mask hands in up to 64 bytes, the last one to come lets all go on, and all read
// the table. It stays valid until the lane's next collective.
struct alignas(64) Slot {
  unsigned char bytes[64];
};
struct Meeting {
  unsigned mask = 0, arrived = 0, turn = 0;
  const char* what = nullptr;
  Site site{};
  // Two tables: nobody comes to the next collective but one before all have left this one.
  Slot slots[2][kWarp];
};
Meeting* arrive(unsigned mask, const char* what, Site site);
// `finish` is called once, by the last lane, when the table is complete.
Slot* complete(Meeting* meeting, void (*finish)(Slot*, unsigned mask) = nullptr);
void sync_warp(unsigned mask, Site site);

template <class T>
KVCACHE_UNSEEN T value_of(const Slot* slots, unsigned lane) {
  T value;
  __builtin_memcpy(&value, slots[lane].bytes, sizeof value);
  return value;
}
template <class T>
KVCACHE_UNSEEN Slot* meet(unsigned mask, const T& mine, const char* what, Site site,
                          void (*finish)(Slot*, unsigned mask) = nullptr) {
  static_assert(sizeof(T) <= sizeof(Slot));
  Meeting* meeting = arrive(mask, what, site);
  __builtin_memcpy(meeting->slots[meeting->turn][self->lane].bytes, &mine, sizeof mine);
  return complete(meeting, finish);
}

void copy_issue(void* shared, const void* global, unsigned bytes, bool full, Site site);
void copy_commit();
void copy_wait(int still_running);

void check_aligned(const void* pointer, size_t bytes, const char* what, Site site);
bool is_shared(const void* pointer, size_t bytes);

// --- checks of the race build

enum class Access { kRead, kWrite, kAtomic };
struct Checks {
  void (*launch)(const void* arguments, size_t bytes);
  void (*block)();
  void (*barrier)();
  void (*sync_warp)(unsigned warp, unsigned mask);
  void (*access)(const void* pointer, size_t bytes, Access access, Site site);
  void (*copy_issued)(const Copy& copy);
  void (*copy_done)(const Copy& copy);
  void (*fence)();
};
extern const Checks* checks;  // null in the other builds

inline void note(const void* pointer, size_t bytes, Access access, Site site) {
  if (checks) checks->access(pointer, bytes, access, site);
}

// --- launches

// The same as in cuda/launch.cuh.
struct Extent {
  dim3 size;
  Extent(dim3 all) : size(all) {}
  template <class I, class = std::enable_if_t<std::is_integral_v<I>>>
  Extent(I n) : size(n > 0 && static_cast<uint64_t>(n) <= 0x7fffffffu ? static_cast<unsigned>(n) : 0u) {}
};

void note_launch(const void* kernel);
int run(const void* kernel, void (*body)(void*), void* arguments, size_t arguments_bytes, dim3 grid, dim3 size,
        size_t shared_bytes);

template <class... P, class... A>
int launch(void (*kernel)(P...), Extent grid, Extent size, size_t shared_bytes, void*, A&&... arguments) {
  static_assert(sizeof...(P) == sizeof...(A), "the kernel takes another number of arguments");
  struct Call {
    void (*kernel)(P...);
    std::tuple<std::decay_t<P>...> arguments;
    static void body(void* call) { std::apply(static_cast<Call*>(call)->kernel, static_cast<Call*>(call)->arguments); }
  } call{kernel, {static_cast<P>(arguments)...}};
  return run(reinterpret_cast<const void*>(kernel), &Call::body, &call, sizeof call, grid.size, size.size,
             shared_bytes);
}

}  // namespace kvcache::emulation
