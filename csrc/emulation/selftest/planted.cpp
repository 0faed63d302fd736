#include "planted.h"

#include <exception>

namespace kvcache::cuda::planted {
const Case* Case::first = nullptr;
}

// Null if the case ran and its result was right, else what was wrong; "no such case".
extern "C" __attribute__((visibility("default"))) const char* kvcache_emulated_planted(const char* name, int bug) {
  using kvcache::cuda::planted::Case;
  static std::string message;
  for (const Case* c = Case::first; c; c = c->next) {
    if (std::string(name) != c->name) continue;
    if (kvcache_emulated_forget) kvcache_emulated_forget();
    if (kvcache_emulated_reveal) kvcache_emulated_reveal();
    try {
      message = c->run(bug != 0);
    } catch (const std::exception& error) {
      message = error.what();
    }
    return message.empty() ? nullptr : message.c_str();
  }
  return "no such case";
}

// Their names, one a line: of the bugs or of the primitives.
extern "C" __attribute__((visibility("default"))) const char* kvcache_emulated_planted_names(int primitives) {
  static std::string names;
  names.clear();
  for (auto* c = kvcache::cuda::planted::Case::first; c; c = c->next) {
    if (c->primitive == (primitives != 0)) names += std::string(c->name) + "\n";
  }
  return names.c_str();
}
