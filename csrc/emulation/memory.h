// The memory of the emulated threads: their stacks, and a block's shared memory.
#pragma once
#include <cstddef>
#include <string>

namespace kvcache::emulation {

struct Range {
  char* begin = nullptr;
  char* end = nullptr;
  bool holds(const void* pointer, size_t bytes = 1) const {
    const char* p = static_cast<const char*>(pointer);
    return p >= begin && p < end && bytes <= size_t(end - p);
  }
};

// Stack of thread `number`, with an inaccessible page below.
Range stack_of(unsigned number);
Range all_stacks();

// Dynamic shared memory lies in a window of its own, so that a miss can be told from other accesses.
Range shared_window();
unsigned char* open_shared(size_t bytes);  // for a launch
void poison_shared();                      // before each block: NaN everywhere, and a pattern beyond the end
std::string damage();                      // after it: what was written beyond the end, or ""

// The calling thread's thread-local storage of this library, which is what __shared__ variables are.
Range static_shared();

}  // namespace kvcache::emulation
