// cp.async: copies land when they are waited for and not before, so that a missing wait reads poison. In a random order
// half of them land at once, so that one that comes too early overwrites what is still read.
#include <cstring>

#include "scheduler.h"

namespace kvcache::emulation {

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
  if (random_order && random_number() % 2) carry_out(self->copies.back());
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
