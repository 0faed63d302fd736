// The race build's view of memory. The kernels are compiled with -fsanitize=thread, whose calls race_hooks.cpp turns into
// access(); here is decided whether two accesses to the same place have an order.
//
// Time in a block: `epoch` counts __syncthreads, over all blocks and launches; within an epoch only the lanes of one
// warp can be in order, through __syncwarp. Shuffles, votes and the like order nothing, as on a GPU.
#pragma once
#include <memory>
#include <string>

#include "places.h"
#include "scheduler.h"

namespace kvcache::emulation {

// Those who accessed a place and are not in order with one another, in practice one thread or many readers.
struct Who {
  uint32_t epoch = 0;  // 0: nobody
  uint32_t clock = 0;  // the newest of the lanes' own
  uint32_t lanes = 0;
  uint16_t thread = 0;  // the last of them
  uint8_t warp = 0;
  bool several_warps = false;
  Place place = 0;
};

struct Cell {  // of one word or one byte
  Who write, read;
  bool atomic = false;     // the writes are
  bool in_flight = false;  // an asynchronous copy was issued, not waited for
};

// Cells of some consecutive memory: one per word, until parts of it are accessed.
class Shadow {
 public:
  explicit Shadow(size_t bytes) : words_((bytes + 3) / 4), split_((bytes + 3) / 4) {}
  template <class Body>
  void each(size_t offset, size_t bytes, uint32_t first_epoch, Body body) {
    for (const size_t end = offset + bytes; offset < end;) {
      const size_t word = offset / 4, next = (word + 1) * 4;
      const bool whole = offset % 4 == 0 && next <= end;
      if (split_[word] < first_epoch) {
        if (whole) {
          body(words_[word]);
          offset = next;
          continue;
        }
        split(word, first_epoch);
      }
      for (; offset < next && offset < end; ++offset) body(bytes_[offset]);
    }
  }

 private:
  void split(size_t word, uint32_t epoch) {
    if (bytes_.empty()) bytes_.resize(words_.size() * 4);
    for (size_t i = 0; i < 4; ++i) bytes_[word * 4 + i] = words_[word];
    split_[word] = epoch;
  }
  std::vector<Cell> words_, bytes_;
  std::vector<uint32_t> split_;  // epoch since which the bytes count
};

// The present, for the running thread.
uint32_t epoch();
uint32_t block_epoch();            // the first of this block
uint32_t launch_epoch();           // the first of this launch
bool in_order(const Who& before);  // its accesses, within this block, happened before whatever the thread does now
void add(Who& who, Place place);

void access(const void* pointer, size_t bytes, Access kind, Place place);

// Global memory: race_global.cpp
void start_global_launch(const void* arguments, size_t bytes);
void start_global_block();
void access_global(const char* pointer, size_t bytes, Access kind, Place place);
void fence();  // __threadfence by the running thread

const char* name_of(Access kind);

}  // namespace kvcache::emulation
