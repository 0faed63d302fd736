// Which instruction set's kernels run, decided once.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace kvcache::cpu {

#if defined(__x86_64__)
#define KVCACHE_X86 1
namespace v4 {
extern const Table table;
}
namespace v3 {
extern const Table table;
}
#endif
namespace base {
extern const Table table;
}

namespace {

struct Candidate {
  const Table* table;
  const char* name;  // as in -march
  const char* short_name;
  bool available;
};

// Best first. Features by name: g++ 11 does not know __builtin_cpu_supports("x86-64-v3").
const Candidate* candidates(int* n) {
#if KVCACHE_X86
  static const Candidate list[] = {
      {&v4::table, "x86-64-v4", "v4",
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")},
      {&v3::table, "x86-64-v3", "v3",
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
           __builtin_cpu_supports("bmi2")},
      {&base::table, "base", "base", true},
  };
#else
  static const Candidate list[] = {{&base::table, "base", "base", true}};
#endif
  *n = sizeof list / sizeof *list;
  return list;
}

const Table& choose() {
  int n;
  const Candidate* list = candidates(&n);
  const char* wanted = std::getenv("KVCACHE_ISA");
  std::string possible;
  for (int i = n; i-- > 0;) {
    if (list[i].available) possible += (possible.empty() ? "" : ", ") + std::string(list[i].name);
  }
  for (int i = 0; i < n; ++i) {
    if (wanted && *wanted && std::string(wanted) != list[i].name && std::string(wanted) != list[i].short_name) continue;
    if (list[i].available) return *list[i].table;
    if (wanted && *wanted) {
      throw std::runtime_error("KVCACHE_ISA=" + std::string(wanted) +
                               ": this CPU does not have that instruction set; possible here: " + possible);
    }
  }
  throw std::runtime_error("KVCACHE_ISA=" + std::string(wanted ? wanted : "") +
                           ": unknown instruction set; possible here: " + possible);
}

}  // namespace

const Table& table() {
  static const Table& chosen = choose();
  return chosen;
}

int available_isas(const char** names, int capacity) {
  int n, found = 0;
  const Candidate* list = candidates(&n);
  for (int i = n; i-- > 0;) {
    if (list[i].available && found < capacity) names[found++] = list[i].name;
  }
  return found;
}

}  // namespace kvcache::cpu
