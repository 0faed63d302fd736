// cp.async: copies land when they are waited for and not before, so that a missing wait reads poison. In a random order
// half of them land at once, so that one that comes too early overwrites what is still read.
#include <cstring>

#include "memory.h"
#include "scheduler.h"

namespace kvcache::emulation {

void check_aligned(const void* pointer, size_t bytes, const char* what, Site site) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes) {
    fail("misaligned: " + std::string(what) + " at " + text(site) + " needs an address that is a multiple of " +
         std::to_string(bytes));
  }
}

bool is_shared(const void* pointer, size_t bytes) {
  return shared_window().holds(pointer, bytes) || static_shared().holds(pointer, bytes);
}

namespace {
void carry_out(const Copy& copy) {
  if (copy.full) {
    std::memcpy(copy.target, copy.source, copy.bytes);
  } else {
    std::memset(copy.target, 0, copy.bytes);
  }
}
}  // namespace

void copy_issue(void* shared, const void* global, unsigned bytes, bool full, Site site) {
  check_aligned(shared, bytes, "cp_async's shared address", site);
  check_aligned(global, bytes, "cp_async's global address", site);
  if (!is_shared(shared, bytes)) fail("cp_async at " + text(site) + ": the target does not lie in shared memory");
  self->copies.push_back({shared, global, bytes, self->copy_group, full, site});
  if (checks) checks->copy_issued(self->copies.back());
  if (random_order() && random_number() % 2) carry_out(self->copies.back());
}

void copy_commit() { ++self->copy_group; }

void copy_wait(int still_running) {
  std::vector<Copy>& copies = self->copies;
  size_t done = 0;
  for (; done < copies.size(); ++done) {
    const Copy& copy = copies[done];
    if (copy.group + unsigned(still_running) >= self->copy_group) break;
    carry_out(copy);
    if (checks) checks->copy_done(copy);
  }
  copies.erase(copies.begin(), copies.begin() + ptrdiff_t(done));
}

}  // namespace kvcache::emulation
