#include "memory.h"

#include <link.h>
#include <sys/mman.h>

#include <cstring>
#include <new>

#include "scheduler.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace kvcache::emulation {
namespace {

constexpr size_t kPage = 4096, kStackBytes = 256 * 1024;
// One page more between stacks: powers of two would put all of them into the same few sets of the caches.
constexpr size_t kStackStride = kStackBytes + 2 * kPage;
constexpr size_t kBefore = 64 * 1024, kWindow = 512 * 1024, kCanary = 2048;
constexpr unsigned char kPattern = 0xA5;

char* reserve(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(memory);
}

char* stacks() {
  static char* const memory = [] {
    char* all = reserve(kMaxThreads * kStackStride);
    for (unsigned i = 0; i < kMaxThreads; ++i) mprotect(all + i * kStackStride, kPage, PROT_NONE);
    return all;
  }();
  return memory;
}

char* window() {
  static char* const memory = reserve(kBefore + kWindow);
  return memory;
}

size_t opened = 0;  // bytes of the running launch

thread_local char probe = 0;  // makes the library have thread-local storage even without a __shared__ variable

// Where the library's thread-local block begins and ends, relative to `probe`: the same for all threads.
struct Layout {
  ptrdiff_t begin = 0, end = 0;
};

Layout find_layout() {
  probe = 1;  // an access, so that this thread has the block
  Layout layout;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* result) {
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          if (info->dlpi_phdr[i].p_type != PT_TLS || !info->dlpi_tls_data) continue;
          char* begin = static_cast<char*>(info->dlpi_tls_data);
          char* end = begin + info->dlpi_phdr[i].p_memsz;
          if (&probe < begin || &probe >= end) continue;
          *static_cast<Layout*>(result) = {begin - &probe, end - &probe};
          return 1;
        }
        return 0;
      },
      &layout);
  return layout;
}

}  // namespace

Range stack_of(unsigned number) {
  char* bottom = stacks() + number * kStackStride + kPage;
  // Tops at different places of a page, too.
  return {bottom, bottom + kStackBytes + kPage - (number % 8) * 512};
}

Range all_stacks() { return {stacks(), stacks() + kMaxThreads * kStackStride}; }

Range shared_window() { return {window(), window() + kBefore + kWindow}; }

unsigned char* open_shared(size_t bytes) {
  char* start = window() + kBefore;
#if defined(__SANITIZE_ADDRESS__)
  ASAN_POISON_MEMORY_REGION(window(), kBefore + kWindow);
  ASAN_UNPOISON_MEMORY_REGION(start, bytes);
#endif
  opened = bytes;
  return reinterpret_cast<unsigned char*>(start);
}

void poison_shared() {
  char* start = window() + kBefore;
  std::memset(start, 0xFF, opened);
#if !defined(__SANITIZE_ADDRESS__)
  std::memset(start - kCanary, kPattern, kCanary);
  std::memset(start + opened, kPattern, kCanary);
#endif
  const Range variables = static_shared();
  std::memset(variables.begin, 0xFF, size_t(variables.end - variables.begin));
}

std::string damage() {
#if !defined(__SANITIZE_ADDRESS__)
  const char* start = window() + kBefore;
  const char* const ends[2][2] = {{start - kCanary, start}, {start + opened, start + opened + kCanary}};
  for (const auto& [begin, end] : ends) {
    for (const char* p = begin; p < end; ++p) {
      if (static_cast<unsigned char>(*p) != kPattern) {
        return "dynamic shared memory overrun: something wrote to offset " + std::to_string(p - start) + " of " +
               std::to_string(opened);
      }
    }
  }
#endif
  return "";
}

Range static_shared() {
  static const Layout layout = find_layout();
  return {&probe + layout.begin, &probe + layout.end};
}

}  // namespace kvcache::emulation
