// What the other files share: messages, checks of addresses, the random order.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "collectives.h"
#include "memory.h"
#include "places.h"

namespace kvcache::emulation {

std::string text(Site site) {
  const char* name = site.file ? std::strrchr(site.file, '/') : nullptr;
  return std::string(name ? name + 1 : site.file ? site.file : "?") + ":" + std::to_string(site.line);
}

std::string text_at(const char* what, Site site) { return std::string(what) + " at " + text(site); }

void refuse_width(int width, const char* what, Site site) {
  fail(text_at(what, site) + " has width " + std::to_string(width));
}

void refuse_lane(unsigned lane, const char* what, Site site) {
  fail(text_at(what, site) + " reads lane " + std::to_string(lane) + ", which is outside the mask");
}

void check_aligned(const void* pointer, size_t bytes, const char* what, Site site) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes) {
    fail("misaligned: " + std::string(what) + " at " + text(site) + " needs an address that is a multiple of " +
         std::to_string(bytes));
  }
}

bool is_shared(const void* pointer, size_t bytes) {
  return shared_window().holds(pointer, bytes) || static_shared().holds(pointer, bytes);
}

// KVCACHE_EMULATION_SEED, or the export below
bool random_order = [] {
  const char* seed = std::getenv("KVCACHE_EMULATION_SEED");
  return seed && *seed;
}();

namespace {
uint64_t random_state = random_order ? std::strtoull(std::getenv("KVCACHE_EMULATION_SEED"), nullptr, 10) : 0;
}

uint64_t random_number() {  // splitmix64
  uint64_t x = random_state += 0x9E3779B97F4A7C15u;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  x = (x ^ x >> 27) * 0x94D049BB133111EBu;
  return x ^ x >> 31;
}

namespace {
std::vector<const void*> launched;  // kernels
}

void note_launch(const void* kernel) {
  if (std::find(launched.begin(), launched.end(), kernel) == launched.end()) launched.push_back(kernel);
}

}  // namespace kvcache::emulation

// The kernels that ran so far, one a line, for tests that demand all of them.
extern "C" __attribute__((visibility("default"))) const char* kvcache_emulated_launched() {
  static std::string names;
  names.clear();
  for (const std::string& name : kvcache::emulation::function_names(kvcache::emulation::launched)) names += name + "\n";
  return names.c_str();
}

extern "C" __attribute__((visibility("default"))) void kvcache_emulated_shuffle(int on, uint64_t seed) {
  kvcache::emulation::random_order = on != 0;
  kvcache::emulation::random_state = seed;
}
