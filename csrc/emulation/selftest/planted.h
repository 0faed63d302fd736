// Small kernels, each once right and once with one bug that the emulation must catch: tests/emulation/test_planted_bugs.py.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "../../cuda/device.cuh"

extern "C" {
// Of the race build.
__attribute__((weak)) void kvcache_emulated_allow(const void* data, size_t bytes, int writable);
__attribute__((weak)) void kvcache_emulated_forget();
__attribute__((weak)) void kvcache_emulated_hide(const void* data, size_t bytes);
__attribute__((weak)) void kvcache_emulated_reveal();
}

namespace kvcache::cuda::planted {

struct Case {
  const char* name;
  std::string (*run)(bool bug);  // "" if all went well
  bool primitive;                // no bug to plant: shows that the emulation computes what a GPU does
  const Case* next;
  static const Case* first;
  Case(const char* name_, std::string (*run_)(bool), bool primitive_ = false)
      : name(name_), run(run_), primitive(primitive_), next(first) {
    first = this;
  }
};

// Memory that the kernels of a case may use, told to the race build. Of the exact size, for ASan.
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t n, bool writable = true) : values_(n) {
    if (kvcache_emulated_allow) kvcache_emulated_allow(values_.data(), n * sizeof(T), writable);
  }
  T* data() { return values_.data(); }
  T& operator[](size_t i) { return values_[i]; }
  size_t size() const { return values_.size(); }

 private:
  std::vector<T> values_;
};

// What a case returns: the launch's error, or whether out[i] is want(i) everywhere.
template <class T, class Want>
std::string verdict(int error, Buffer<T>& out, Want want) {
  if (error) return "CUDA error " + std::to_string(error);
  for (size_t i = 0; i < out.size(); ++i) {
    if (out[i] != T(want(i))) {
      return "wrong result: [" + std::to_string(i) + "] is " + std::to_string(out[i]) + ", not " +
             std::to_string(T(want(i)));
    }
  }
  return "";
}

// The kernel that a case launches: the right one or the one with the bug.
#define KVCACHE_PLANTED(name)                \
  std::string run_##name(bool bug);          \
  const Case case_##name(#name, run_##name); \
  std::string run_##name(bool bug)
#define KVCACHE_PRIMITIVE(name)                                                          \
  std::string run_##name();                                                              \
  const Case case_##name(#name, [](bool) -> std::string { return run_##name(); }, true); \
  std::string run_##name()
#define KVCACHE_PICK(kernel) (bug ? &kernel<true> : &kernel<false>)

}  // namespace kvcache::cuda::planted
