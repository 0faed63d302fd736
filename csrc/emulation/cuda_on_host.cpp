// The scheduler of scheduler.h. Never compiled with -fsanitize=thread.
#include "cuda_on_host.h"

#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>

#include "context.h"
#include "memory.h"
#include "places.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace kvcache::emulation {

Fiber* self = nullptr;
Block block{};
const Checks* checks = nullptr;

namespace {

struct Thread : Fiber {
  Context context;
  void* fake_stack;  // ASan's
};

struct Warp {
  unsigned exist, alive, fresh, ready, at_barrier;  // lanes
  std::vector<std::unique_ptr<Meeting>> meetings;   // one per mask that was seen
  Meeting* last;                                    // used
  unsigned open;                                    // meetings that somebody waits in
};

struct Barrier {
  unsigned waiting;
  const char* what;
  Site site;
  int sum, result;
};

Thread threads[kMaxThreads];
Warp warps[kMaxWarps];
unsigned ready_warps, current_warp, n_warps, live;
Barrier the_barrier;
Context main_context;

unsigned grid_limit = 65535;  // of y and z

std::string error;
const void* the_kernel;
void (*kernel_body)(void*);
void* kernel_arguments;
std::mutex launching;

Thread* me() { return static_cast<Thread*>(self); }

bool same(const char* a, const char* b) { return a == b || !std::strcmp(a, b); }
bool same(Site a, Site b) { return a.line == b.line && same(a.file, b.file); }

#if defined(__SANITIZE_ADDRESS__)
void* main_fake_stack = nullptr;
const void* main_stack = nullptr;
size_t main_stack_bytes = 0;
#endif

void entry();

void switch_to(Thread* next, [[maybe_unused]] bool forever = false) {  // null: back to run_block
  Thread* from = me();
  if (next && (warps[next->warp].fresh >> next->lane & 1)) {
    warps[next->warp].fresh &= ~(1u << next->lane);
    const Range stack = stack_of(next->number);
    make_context(&next->context, stack.begin, stack.end, entry);
  }
#if defined(__SANITIZE_ADDRESS__)
  void** save = forever ? nullptr : from ? &from->fake_stack : &main_fake_stack;
  if (next) {
    const Range stack = stack_of(next->number);
    __sanitizer_start_switch_fiber(save, stack.begin, size_t(stack.end - stack.begin));
  } else {
    __sanitizer_start_switch_fiber(save, main_stack, main_stack_bytes);
  }
#endif
  self = next;
  switch_context(from ? &from->context : &main_context, next ? next->context : main_context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from ? from->fake_stack : main_fake_stack, nullptr, nullptr);
#endif
}

[[noreturn]] void deadlock() {
  struct Where {
    const char* what;
    Site site;
    int n;
  };
  std::vector<Where> places;
  int exited = 0;
  for (unsigned i = 0; i < block.threads; ++i) {
    const Thread& t = threads[i];
    if (!(warps[t.warp].alive >> t.lane & 1)) {
      ++exited;
      continue;
    }
    size_t k = 0;
    while (k < places.size() && !(places[k].what == t.what && same(places[k].site, t.site))) ++k;
    if (k == places.size()) places.push_back({t.what, t.site, 0});
    ++places[k].n;
  }
  std::string message = "deadlock:";
  for (const Where& place : places)
    message += " " + std::to_string(place.n) + " thread(s) wait in " + text_at(place.what, place.site) + ";";
  message += " " + std::to_string(exited) + " thread(s) have exited";
  fail(message);
}

unsigned pick(unsigned mask, unsigned after) {  // the next set bit after `after`, round and round, or any of them
  if (random_order) {
    for (unsigned skip = unsigned(random_number() % unsigned(__builtin_popcount(mask))); skip; --skip) mask &= mask - 1;
    return unsigned(__builtin_ctz(mask));
  }
  const unsigned above = mask & ~((2u << after) - 1);
  return unsigned(__builtin_ctz(above ? above : mask));
}

Thread* next_ready() {
  Warp* warp = &warps[current_warp];
  unsigned lane = self ? self->lane : kWarp - 1;
  if (!warp->ready || random_order) {
    if (!warp->ready) ready_warps &= ~(1u << current_warp);
    if (!ready_warps) {
      if (!live) return nullptr;
      deadlock();
    }
    current_warp = pick(ready_warps, current_warp);
    warp = &warps[current_warp];
    lane = kWarp - 1;
  }
  lane = pick(warp->ready, lane);
  warp->ready &= ~(1u << lane);
  return &threads[current_warp * kWarp + lane];
}

void wait(const char* what, Site site) {  // somebody else makes it ready again
  self->what = what;
  self->site = site;
  Thread* next = next_ready();
  if (next != self) switch_to(next);
}

void release_barrier() {
  the_barrier.result = the_barrier.sum;
  the_barrier.waiting = 0;
  for (unsigned w = 0; w < n_warps; ++w) {
    if (!warps[w].at_barrier) continue;
    warps[w].ready |= warps[w].at_barrier;
    warps[w].at_barrier = 0;
    ready_warps |= 1u << w;
  }
  if (checks) checks->barrier();
}

void leave() {  // the thread's kernel has returned
  Warp& warp = warps[self->warp];
  const unsigned bit = 1u << self->lane;
  warp.alive &= ~bit;
  --live;
  for (const auto& meeting : warp.meetings) {
    if (meeting->arrived && (meeting->mask & bit)) {
      fail("lane " + std::to_string(self->lane) + " exits while other lanes of its warp wait for it in " +
           text_at(meeting->what, meeting->site));
    }
  }
  if (live && the_barrier.waiting == live) release_barrier();
}

void entry() {
#if defined(__SANITIZE_ADDRESS__)
  if (main_stack) {
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
  } else {
    __sanitizer_finish_switch_fiber(nullptr, &main_stack, &main_stack_bytes);
  }
#endif
  kernel_body(kernel_arguments);
  leave();
  switch_to(next_ready(), true);
  __builtin_unreachable();
}

void run_block() {
  const dim3 size = block.size;
  the_barrier = {};
  live = block.threads;
  n_warps = (block.threads + kWarp - 1) / kWarp;
  ready_warps = n_warps == kMaxWarps ? ~0u : (1u << n_warps) - 1;
  current_warp = 0;
  for (unsigned w = 0; w < n_warps; ++w) {
    const unsigned lanes = block.threads - w * kWarp;
    Warp& warp = warps[w];
    warp.exist = warp.alive = warp.fresh = warp.ready = lanes >= kWarp ? ~0u : (1u << lanes) - 1;
    warp.at_barrier = 0;
    for (const auto& meeting : warp.meetings) meeting->arrived = 0;
    if (warp.meetings.empty()) {
      warp.meetings.push_back(std::make_unique<Meeting>());
      warp.meetings.back()->mask = ~0u;
    }
    warp.last = warp.meetings.front().get();
    warp.open = 0;
  }
  for (unsigned i = 0; i < block.threads; ++i) {
    Thread& t = threads[i];
    t.number = i;
    t.warp = i / kWarp;
    t.lane = i % kWarp;
    t.thread = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    t.what = "start";
    t.copies.clear();
    t.copy_group = 0;
    t.fake_stack = nullptr;
  }
  poison_shared();
  if (checks) checks->block();
  error.clear();
  switch_to(next_ready());
  if (error.empty() && !damage().empty()) error = ": " + damage();
  if (error.empty()) return;
  const uint3 index = block.index;
#if defined(__SANITIZE_ADDRESS__)
  const Range stacks = all_stacks();  // the abandoned frames' red zones
  ASAN_UNPOISON_MEMORY_REGION(stacks.begin, size_t(stacks.end - stacks.begin));
#endif
  throw std::runtime_error("emulated kernel " + function_names({the_kernel})[0] + ", block (" +
                           std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) +
                           ")" + error);
}

}  // namespace

void fail(const std::string& why) {
  if (!self) throw std::runtime_error("emulation: " + why);
  error = ", thread " + std::to_string(self->number) + ": " + why;
  switch_to(nullptr, true);
  __builtin_unreachable();
}

int barrier(const char* what, Site site, int value, Reduction reduction) {
  if (!the_barrier.waiting) {
    the_barrier.what = what;
    the_barrier.site = site;
    the_barrier.sum = value;
  } else if (!same(the_barrier.site, site)) {
    fail("divergent barrier: " + text_at(what, site) + ", while other threads wait in " +
         text_at(the_barrier.what, the_barrier.site));
  } else {
    int& sum = the_barrier.sum;
    sum = reduction == Reduction::kSum ? sum + value : reduction == Reduction::kAnd ? sum & value : sum | value;
  }
  Warp& warp = warps[self->warp];
  warp.at_barrier |= 1u << self->lane;
  if (++the_barrier.waiting == live) {
    release_barrier();
    if (!random_order) {  // this one goes straight on
      warp.ready &= ~(1u << self->lane);
      return the_barrier.result;
    }
  }
  wait(what, site);
  return the_barrier.result;
}

namespace {

[[gnu::cold]] void refuse(const Warp& warp, unsigned mask, const char* what, Site site) {
  if (!(mask >> self->lane & 1)) {
    fail(text_at(what, site) + ": the calling lane " + std::to_string(self->lane) + " is not in the mask");
  }
  const unsigned missing = mask & ~warp.alive;
  fail(text_at(what, site) + ": lane " + std::to_string(__builtin_ctz(missing)) + " of the mask " +
       (missing & warp.exist ? "has exited" : "does not exist in this block"));
}

Meeting* meeting_of(Warp& warp, unsigned mask, const char* what, Site site) {
  Meeting* found = nullptr;
  for (const auto& meeting : warp.meetings) {
    if (meeting->mask == mask) {
      found = meeting.get();
    } else if ((meeting->arrived & mask) && (meeting->mask >> self->lane & 1)) {
      // This lane waits for one that waits for this lane somewhere else. One that waits for others only comes later.
      fail("lanes of one warp meet under different masks: " + text_at(what, site) + " and " +
           text_at(meeting->what, meeting->site));
    }
  }
  if (!found) {
    warp.meetings.push_back(std::make_unique<Meeting>());
    found = warp.meetings.back().get();
    found->mask = mask;
  }
  return warp.last = found;
}

}  // namespace

Meeting* arrive(unsigned mask, const char* what, Site site) {
  Warp& warp = warps[self->warp];
  const unsigned bit = 1u << self->lane;
  if (!(mask & bit) || (mask & ~warp.alive)) refuse(warp, mask, what, site);
  Meeting* found = warp.last;
  // Nobody waits anywhere else: nothing to compare with.
  if (found->mask != mask || warp.open > (found->arrived ? 1u : 0u)) found = meeting_of(warp, mask, what, site);
  if (!found->arrived) {
    found->what = what;
    found->site = site;
    ++warp.open;
  } else if (!same(found->site, site) || !same(found->what, what)) {
    fail("divergent warp collective: " + text_at(what, site) + ", while other lanes wait in " +
         text_at(found->what, found->site));
  }
  found->arrived |= bit;
  return found;
}

Slot* complete(Meeting* meeting, void (*finish)(Slot*, unsigned mask)) {
  Slot* const slots = meeting->slots[meeting->turn];
  if (meeting->arrived != meeting->mask) {
    wait(meeting->what, meeting->site);
    return slots;
  }
  if (finish) finish(slots, meeting->mask);
  const unsigned bit = 1u << self->lane;
  meeting->arrived = 0;
  meeting->turn ^= 1;
  --warps[self->warp].open;
  warps[self->warp].ready |= meeting->mask & ~bit;
  ready_warps |= 1u << self->warp;
  if (random_order) {  // otherwise this one goes straight on
    warps[self->warp].ready |= bit;
    wait(meeting->what, meeting->site);
  }
  return slots;
}

void sync_warp(unsigned mask, Site site) {
  complete(arrive(mask, "__syncwarp", site), [](Slot*, unsigned all) {
    if (checks) checks->sync_warp(self->warp, all);
  });
}

int run(const void* kernel, void (*body)(void*), void* arguments, size_t arguments_bytes, dim3 grid, dim3 size,
        size_t shared_bytes) {
  constexpr int kInvalidValue = 1, kInvalidConfiguration = 9;  // cudaErrorInvalid...
  const uint64_t n = uint64_t(size.x) * size.y * size.z;
  if (shared_bytes > kMaxShared) return kInvalidValue;
  if (n == 0 || n > kMaxThreads || size.x > 1024 || size.y > 1024 || size.z > 64) return kInvalidConfiguration;
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > grid_limit || grid.z > grid_limit) {
    return kInvalidConfiguration;
  }
  std::lock_guard<std::mutex> lock(launching);
  note_launch(kernel);
  the_kernel = kernel;
  kernel_body = body;
  kernel_arguments = arguments;
  block = {{0, 0, 0}, grid, size, unsigned(n), open_shared(shared_bytes), shared_bytes};
#if defined(__SANITIZE_ADDRESS__)
  main_stack = nullptr;
#endif
  if (checks) checks->launch(arguments, arguments_bytes);
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  const uint64_t start = random_order ? random_number() % blocks : 0;
  const bool backwards = random_order && random_number() % 2;
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t k = ((backwards ? blocks - 1 - i : i) + start) % blocks;
    block.index = {unsigned(k % grid.x), unsigned(k / grid.x % grid.y), unsigned(k / (uint64_t(grid.x) * grid.y))};
    run_block();
  }
  return 0;
}

}  // namespace kvcache::emulation

// Lets a test find with few blocks what a GPU would refuse with many.
extern "C" __attribute__((visibility("default"))) void kvcache_emulated_grid_limit(unsigned limit) {
  kvcache::emulation::grid_limit = limit;
}
