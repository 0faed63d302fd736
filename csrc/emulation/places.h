// Where in the kernel's source something happened, kept in 8 bytes.
#pragma once
#include <string>

#include "scheduler.h"

namespace kvcache::emulation {

// A program counter, or with the highest bit the number of a Site.
using Place = uint64_t;

inline Place place_of(const void* return_address) { return reinterpret_cast<uintptr_t>(return_address); }
Place place_of(Site site);
// file:line; of a program counter with the lines that it was inlined from.
std::string text(Place place);

// Without their namespaces and parameters.
std::vector<std::string> function_names(const std::vector<const void*>& functions);

}  // namespace kvcache::emulation
