// Global memory in the race build: what a launch may touch, and whether two of its threads touch the same place without
// an order. Never compiled with -fsanitize=thread.
#include <link.h>

#include <algorithm>
#include <unordered_map>

#include "memory.h"
#include "race_check.h"

namespace kvcache::emulation {
namespace {

struct Span {
  const char *begin, *end;
};
// What the running call may touch, each sorted and free of overlaps once `sorted`. No buffer at all: nobody said anything,
// and everything is allowed.
std::vector<Span> readable, writable, constant, hidden;
bool sorted = true;

Range library, arguments;

// Cells of 64 bytes of global memory, for those that the running launch touched.
struct Line {
  uint32_t launch = 0;
  Shadow cells{64};
};
std::unordered_map<uintptr_t, Line> lines;
uintptr_t last_number = ~uintptr_t(0);
Line* last_line = nullptr;
constexpr size_t kMostLines = 1 << 16;  // beyond that the next launch starts afresh

// Blocks of a launch have an order only by atomics: a block that did one on a place where another did one before, behind
// a __threadfence, may read what that one wrote.
struct Released {
  uint32_t launch = 0;
  std::vector<uint32_t> blocks;
};
std::unordered_map<uintptr_t, Released> releases;
std::vector<uint32_t> first_epochs;  // of the launch's blocks, in the order in which they ran
std::vector<uint32_t> acquired;      // blocks whose writes the running one may read; sorted
bool fenced = false;                 // some thread of the running block did a __threadfence

void sort_spans() {
  for (std::vector<Span>* spans : {&readable, &writable, &constant, &hidden}) {
    std::sort(spans->begin(), spans->end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
    std::vector<Span> merged;  // tensors may share memory
    for (const Span& span : *spans) {
      if (!merged.empty() && span.begin < merged.back().end) {
        merged.back().end = std::max(merged.back().end, span.end);
      } else {
        merged.push_back(span);
      }
    }
    *spans = merged;
  }
  sorted = true;
}

// The first span that ends behind `pointer`.
const Span* first_behind(const std::vector<Span>& spans, const char* pointer) {
  auto at =
      std::upper_bound(spans.begin(), spans.end(), pointer, [](const char* p, const Span& s) { return p < s.end; });
  return at == spans.end() ? nullptr : &*at;
}

bool inside(const std::vector<Span>& spans, const char* begin, const char* end) {
  const Span* span = first_behind(spans, begin);
  return span && span->begin <= begin && end <= span->end;
}

std::string nearest_buffer(const char* pointer) {
  const Span* next = first_behind(readable, pointer);
  if (next && next->begin <= pointer) return "across the end of one";
  const Span* before = next ? (next == readable.data() ? nullptr : next - 1) : &readable.back();
  const ptrdiff_t behind = before ? pointer - before->end : PTRDIFF_MAX,
                  ahead = next ? next->begin - pointer : PTRDIFF_MAX;
  return behind <= ahead ? std::to_string(behind) + " bytes behind the end of one"
                         : std::to_string(ahead) + " bytes before the start of one";
}

void check_allowed(const char* pointer, size_t bytes, Access kind, Place place) {
  if (!sorted) sort_spans();
  if (!hidden.empty()) {
    const Span* span = first_behind(hidden, pointer);
    if (span && span->begin < pointer + bytes) {
      fail(std::string(name_of(kind)) + " of a page that does not belong to this call, at " + text(place));
    }
  }
  if (kind != Access::kRead && !constant.empty()) {
    const Span* span = first_behind(constant, pointer);
    if (span && span->begin < pointer + bytes) {
      fail(std::string(name_of(kind)) + " to a read-only buffer at " + text(place));
    }
  }
  if (readable.empty() || inside(kind == Access::kRead ? readable : writable, pointer, pointer + bytes)) return;
  if (inside(readable, pointer, pointer + bytes)) {
    fail(std::string(name_of(kind)) + " to a read-only buffer at " + text(place));
  }
  fail(std::string(name_of(kind)) + " of " + std::to_string(bytes) + " bytes outside of every buffer of the call, " +
       nearest_buffer(pointer) + ", at " + text(place));
}

uint32_t block_of(uint32_t when) {  // which ran at that epoch
  return uint32_t(std::upper_bound(first_epochs.begin(), first_epochs.end(), when) - first_epochs.begin() - 1);
}

bool global_order(const Who& before) {
  if (before.epoch < launch_epoch()) return true;
  if (before.epoch >= block_epoch()) return in_order(before);
  return std::binary_search(acquired.begin(), acquired.end(), block_of(before.epoch));
}

std::string both(Access kind, Place place, const char* earlier, const Who& who) {
  const bool other = who.epoch < block_epoch();
  return std::string("race in global memory: ") + name_of(kind) + " at " + text(place) + ", not in order with " +
         earlier + " by thread " + std::to_string(who.thread) +
         (other ? " of the launch's block number " + std::to_string(block_of(who.epoch)) : "") + " at " +
         text(who.place);
}

void check_order(Cell& cell, Access kind, Place place) {
  if (!(kind == Access::kAtomic && cell.atomic) && !global_order(cell.write)) {
    fail(both(kind, place, cell.atomic ? "an atomic operation" : "the write", cell.write));
  }
  if (kind == Access::kRead) {
    // Of readers in several blocks the first is enough to blame a writer in a third one.
    if (cell.read.epoch < launch_epoch() || cell.read.epoch >= block_epoch()) add(cell.read, place);
    return;
  }
  if (!global_order(cell.read)) fail(both(kind, place, "the read", cell.read));
  if (kind != Access::kAtomic || !cell.atomic) cell.write = {};
  add(cell.write, place);
  cell.atomic = kind == Access::kAtomic;
}

void acquire(uintptr_t address) {
  Released& here = releases[address];
  if (here.launch != launch_epoch()) here = {launch_epoch(), {}};
  const uint32_t block = uint32_t(first_epochs.size() - 1);
  for (const uint32_t other : here.blocks) {
    const auto at = std::lower_bound(acquired.begin(), acquired.end(), other);
    if (at == acquired.end() || *at != other) acquired.insert(at, other);
  }
  if (fenced && (here.blocks.empty() || here.blocks.back() != block)) here.blocks.push_back(block);
}

Line& line_of(uintptr_t number) {
  if (number != last_number) {
    last_line = &lines[number];
    last_number = number;
  }
  return *last_line;
}

Range find_library() {
  Range found;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* result) {
        Range image;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
          char* begin = reinterpret_cast<char*>(info->dlpi_addr + info->dlpi_phdr[i].p_vaddr);
          if (!image.begin) image.begin = begin;
          image.end = begin + info->dlpi_phdr[i].p_memsz;
        }
        if (!image.holds(reinterpret_cast<const void*>(&find_library))) return 0;
        *static_cast<Range*>(result) = image;
        return 1;
      },
      &found);
  return found;
}

}  // namespace

void start_global_launch(const void* launch_arguments, size_t bytes) {
  if (!library.begin) library = find_library();
  char* begin = static_cast<char*>(const_cast<void*>(launch_arguments));
  arguments = {begin, begin + bytes};
  first_epochs.clear();
  if (lines.size() > kMostLines) lines.clear();
  if (releases.size() > kMostLines) releases.clear();
  last_number = ~uintptr_t(0);
}

void start_global_block() {
  first_epochs.push_back(block_epoch());
  acquired.clear();
  fenced = false;
}

void fence() { fenced = true; }

void access_global(const char* pointer, size_t bytes, Access kind, Place place) {
  if (library.holds(pointer) || arguments.holds(pointer)) return;
  if (all_stacks().holds(pointer))
    fail(std::string(name_of(kind)) + " of another thread's local memory at " + text(place));
  check_allowed(pointer, bytes, kind, place);
  if (kind == Access::kAtomic) acquire(reinterpret_cast<uintptr_t>(pointer));
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  for (uintptr_t done = address; done < address + bytes;) {
    const uintptr_t offset = done % 64, n = std::min<uintptr_t>(64 - offset, address + bytes - done);
    line_of(done / 64).cells.each(offset, n, launch_epoch(), [&](Cell& cell) { check_order(cell, kind, place); });
    done += n;
  }
}

}  // namespace kvcache::emulation

// --- what the bindings and the tests say

using namespace kvcache::emulation;

#define KVCACHE_EXPORT extern "C" __attribute__((visibility("default")))

// The running call may touch this memory, and once there is any such, no other.
KVCACHE_EXPORT void kvcache_emulated_allow(const void* data, size_t bytes, int may_write) {
  if (bytes == 0) return;
  const char* begin = static_cast<const char*>(data);
  readable.push_back({begin, begin + bytes});
  if (may_write) writable.push_back({begin, begin + bytes});
  sorted = false;
}

KVCACHE_EXPORT void kvcache_emulated_forget() {
  readable.clear();
  writable.clear();
}

// Memory that calls must leave alone although it lies in one of their buffers, until the next reveal.
KVCACHE_EXPORT void kvcache_emulated_hide(const void* data, size_t bytes) {
  if (bytes == 0) return;
  const char* begin = static_cast<const char*>(data);
  hidden.push_back({begin, begin + bytes});
  sorted = false;
}

// Memory that calls must not write to, until the next reveal.
KVCACHE_EXPORT void kvcache_emulated_protect(const void* data, size_t bytes) {
  if (bytes == 0) return;
  const char* begin = static_cast<const char*>(data);
  constant.push_back({begin, begin + bytes});
  sorted = false;
}

KVCACHE_EXPORT void kvcache_emulated_reveal() {
  hidden.clear();
  constant.clear();
}
