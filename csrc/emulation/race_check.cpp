// Races and reads of uninitialised data in shared memory. Never compiled with -fsanitize=thread.
#include "race_check.h"

#include <algorithm>

#include "memory.h"

namespace kvcache::emulation {
namespace {

// What the lanes of a warp know of one another. Clocks are numbers of the warp's __syncwarp calls.
struct WarpClock {
  uint32_t now;                 // __syncwarp calls so far
  uint32_t all_seen;            // accesses with an older clock are in the past of every lane
  uint32_t own[kWarp];          // the last call that the lane took part in
  uint32_t seen[kWarp][kWarp];  // [lane][other]: accesses of `other` up to this clock are in the past of `lane`
};

WarpClock clocks[kMaxWarps];
uint32_t now = 1, first_of_block = 1, first_of_launch = 1;
std::unique_ptr<Shadow> dynamic_cells, static_cells;

void start_launch(const void* arguments, size_t bytes) {
  first_of_launch = ++now;
  if (!dynamic_cells) dynamic_cells = std::make_unique<Shadow>(kMaxShared);
  if (!static_cells) {
    const Range variables = static_shared();
    static_cells = std::make_unique<Shadow>(size_t(variables.end - variables.begin));
  }
  start_global_launch(arguments, bytes);
}

void start_block() {
  first_of_block = ++now;
  for (unsigned w = 0; w < (block.threads + kWarp - 1) / kWarp; ++w) clocks[w] = {1, 1, {}, {}};
  for (unsigned w = 0; w < (block.threads + kWarp - 1) / kWarp; ++w) {
    for (uint32_t& own : clocks[w].own) own = 1;
  }
  start_global_block();
}

void warp_synced(unsigned warp, unsigned mask) {
  WarpClock& c = clocks[warp];
  const uint32_t before = c.now++;
  if (mask == ~0u) c.all_seen = c.now;
  uint32_t joined[kWarp] = {};
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    c.own[lane] = c.now;
    if (mask == ~0u) continue;
    for (unsigned other = 0; other < kWarp; ++other) joined[other] = std::max(joined[other], c.seen[lane][other]);
  }
  if (mask == ~0u) return;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    for (unsigned other = 0; other < kWarp; ++other) c.seen[lane][other] = mask >> other & 1 ? before : joined[other];
  }
}

std::string both(const char* what, Access kind, Place place, const char* earlier, const Who& who) {
  return std::string("race in ") + what + " memory: " + name_of(kind) + " at " + text(place) + ", not in order with " +
         earlier + " by thread " + std::to_string(who.thread) + " at " + text(who.place);
}

void check(Cell& cell, const char* what, Access kind, Place place) {
  if (cell.in_flight && cell.write.epoch < first_of_block) cell.in_flight = false;  // a thread of another block left it
  if (cell.in_flight) {
    fail(std::string(name_of(kind)) + " of " + what + " memory at " + text(place) +
         ", which an asynchronous copy issued by thread " + std::to_string(cell.write.thread) + " at " +
         text(cell.write.place) + " still fills: it was not waited for");
  }
  const bool written = cell.write.epoch >= first_of_block;
  if (written && !(kind == Access::kAtomic && cell.atomic) && !in_order(cell.write)) {
    fail(both(what, kind, place, cell.atomic ? "an atomic operation" : "the write", cell.write));
  }
  if (kind == Access::kRead) {
    if (!written) {
      fail(std::string("read of uninitialised ") + what + " memory at " + text(place) +
           " (or of what another thread writes later, without a barrier in between)");
    }
    add(cell.read, place);
    return;
  }
  if (kind == Access::kAtomic && !written) {
    fail(std::string("atomic operation on uninitialised ") + what + " memory at " + text(place));
  }
  if (cell.read.epoch >= first_of_block && !in_order(cell.read)) fail(both(what, kind, place, "the read", cell.read));
  if (kind == Access::kAtomic) {
    if (!cell.atomic) cell.write = {};
    add(cell.write, place);
  } else {
    cell.write = {};
    add(cell.write, place);
  }
  cell.atomic = kind == Access::kAtomic;
}

// Calls body(cell, kind of memory) for each cell of shared memory; false if it is not shared memory.
template <class Body>
bool each_shared(const void* pointer, size_t bytes, Place place, Body body) {
  const char* p = static_cast<const char*>(pointer);
  if (shared_window().holds(p)) {
    const ptrdiff_t offset = p - reinterpret_cast<const char*>(block.shared);
    if (offset < 0 || size_t(offset) + bytes > block.shared_bytes) {
      fail("access beyond dynamic shared memory at " + text(place) + ": " + std::to_string(bytes) +
           " bytes at offset " + std::to_string(offset) + " of " + std::to_string(block.shared_bytes));
    }
    dynamic_cells->each(size_t(offset), bytes, first_of_block, [&](Cell& cell) { body(cell, "dynamic shared"); });
    return true;
  }
  const Range variables = static_shared();
  if (!variables.holds(p, bytes)) return false;
  static_cells->each(size_t(p - variables.begin), bytes, first_of_block,
                     [&](Cell& cell) { body(cell, "static shared"); });
  return true;
}

void copy_issued(const Copy& copy) {
  const Place place = place_of(copy.site);
  each_shared(copy.target, copy.bytes, place, [&](Cell& cell, const char* what) {
    check(cell, what, Access::kWrite, place);
    cell.in_flight = true;
  });
  if (copy.full) access_global(static_cast<const char*>(copy.source), copy.bytes, Access::kRead, place);
}

void copy_done(const Copy& copy) {
  const Place place = place_of(copy.site);
  each_shared(copy.target, copy.bytes, place, [&](Cell& cell, const char*) {
    cell.in_flight = false;
    cell.write = {};
    add(cell.write, place);
  });
}

const Checks race_checks{
    start_launch,
    start_block,
    [] { ++now; },
    warp_synced,
    [](const void* pointer, size_t bytes, Access kind, Site site) { access(pointer, bytes, kind, place_of(site)); },
    copy_issued,
    copy_done,
    fence};
const bool installed = (checks = &race_checks, true);

}  // namespace

uint32_t epoch() { return now; }
uint32_t block_epoch() { return first_of_block; }
uint32_t launch_epoch() { return first_of_launch; }

const char* name_of(Access kind) {
  return kind == Access::kRead ? "read" : kind == Access::kWrite ? "write" : "atomic operation";
}

bool in_order(const Who& before) {
  if (before.epoch < now) return true;
  if (before.several_warps || before.warp != self->warp) return false;
  const WarpClock& c = clocks[before.warp];
  if (before.clock < c.all_seen) return true;
  for (uint32_t rest = before.lanes & ~(1u << self->lane); rest; rest &= rest - 1) {
    if (c.seen[self->lane][__builtin_ctz(rest)] < before.clock) return false;
  }
  return true;
}

void add(Who& who, Place place) {
  const uint32_t clock = clocks[self->warp].own[self->lane], bit = 1u << self->lane;
  if (who.epoch == now && who.epoch >= first_of_block && !in_order(who)) {
    who.several_warps |= who.warp != self->warp;
    who.lanes |= bit;
    who.clock = std::max(who.clock, clock);
    who.warp = uint8_t(self->warp);
  } else {
    who = {now, clock, bit, 0, uint8_t(self->warp), false, 0};
  }
  who.thread = uint16_t(self->number);
  who.place = place;
}

void access(const void* pointer, size_t bytes, Access kind, Place place) {
  if (!self || bytes == 0) return;
  if (stack_of(self->number).holds(pointer)) return;
  if (each_shared(pointer, bytes, place, [&](Cell& cell, const char* what) { check(cell, what, kind, place); })) return;
  access_global(static_cast<const char*>(pointer), bytes, kind, place);
}

}  // namespace kvcache::emulation
