// The entries of a head as prefill attention and column sums walk them: in tiles, by places. A place is a slot, or an
// element of the index list where there is one. Entries lie in any order, so what a tile may contribute is decided by the
// smallest and largest position in it.
#pragma once
#include "../core/params.h"
#include "device.cuh"
#include "typed_memory.cuh"

namespace kvcache::cuda {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_huge_valf();
constexpr float kBuried = -2e38f;        // a bias of -inf: weightless, but the entry was read, which counts for sinks
constexpr float kFloor = -1e38f;         // lowest reference that weights are taken against
constexpr int32_t kNowhere = INT32_MAX;  // position of a place without an entry; above what any query sees

__device__ __forceinline__ int warp_min(int x) { return ~warp_max(~x); }

// The head of an argument [rows, 1 | heads | query_heads, ...] that a query head reads.
__device__ __forceinline__ int shared_head(int argument_heads, const AttentionParams& p, int head, int query_head) {
  return argument_heads == 1 ? 0 : argument_heads == p.query_heads ? query_head : head;
}

// Smallest and largest position of some entries.
struct Bounds {
  int32_t low, high;
};

// What some queries see: of their last visible positions, and of their first ones, the smallest and the largest.
struct Reach {
  int32_t low_last, high_last, low_start, high_start;

  __device__ bool hides(Bounds b) const { return b.low > high_last || b.high < low_start; }
  __device__ bool shows(Bounds b) const { return b.high <= low_last && b.low >= high_start; }
};

// A query that does not exist or is padding has last -1; it is nobody's business what it would see.
__device__ __forceinline__ Reach reach_of(const int32_t* last, const int32_t* start, int begin, int end) {
  Reach reach{INT32_MAX, -1, INT32_MAX, INT32_MIN};
  for (int m = begin + int(threadIdx.x) % 32; m < end; m += 32) {
    if (last[m] < 0) continue;
    reach.low_last = min(reach.low_last, last[m]), reach.high_last = max(reach.high_last, last[m]);
    reach.low_start = min(reach.low_start, start[m]), reach.high_start = max(reach.high_start, start[m]);
  }
  return Reach{warp_min(reach.low_last), warp_max(reach.high_last), warp_min(reach.low_start),
               warp_max(reach.high_start)};
}

struct Entries {
  const int32_t* table;      // [table_width]
  const int32_t* positions;  // [capacity]
  const int32_t* index;      // [places] or null
  int count, places, page_size;

  __device__ Entries(const AttentionParams& p, int64_t item) {
    const PagedView& view = p.view;
    table = view.table + item * view.table_width;
    positions = view.positions + item * view.capacity;
    count = view.counts[item];
    page_size = view.page_size;
    index = nullptr;
    places = count;
    if (p.index) {
      const int64_t list = p.index_heads == view.heads ? item : item / view.heads;
      index = p.index + list * p.index_width;
      places = p.index_counts[list];
    }
  }
  // -1 where there is no entry: behind the last place, or listed for other heads that hold more.
  __device__ int slot(int place) const {
    if (place >= places) return -1;
    const int slot = index ? index[place] : place;
    return slot < count ? slot : -1;
  }
  __device__ int position(int slot) const { return slot < 0 ? kNowhere : positions[slot]; }
  // The entry's page, and the number of its row in the pools.
  __device__ int page(int slot) const { return table[slot / page_size]; }
  __device__ int64_t line_in(int page, int slot) const { return int64_t(page) * page_size + slot % page_size; }
  __device__ int64_t line(int slot) const { return line_in(page(slot), slot); }
};

// Finds the tiles of kKeys places that some query sees. Looks at kChunk tiles at a time.
template <int kKeys, int kThreads>
struct TileScan {
  static constexpr int kChunk = 32, kLanes = 4;
  Bounds* bounds;     // shared, [2][kChunk]: the chunk at hand and the one before
  int end, next;      // tiles; the first that was not looked at
  unsigned left = 0;  // tiles of the chunk at hand that are still to be visited

  __device__ TileScan(Bounds* memory, int first_tile, int end_tile) : bounds(memory), end(end_tile), next(first_tile) {}

  // The next tile, -1 when none is left. All threads of the block call it together and get the same.
  __device__ int pull(const Entries& entries, const Reach& reach) {
    while (left == 0) {
      if (next >= end) return -1;
      look(entries, reach);
    }
    const int t = __ffs(int(left)) - 1;
    left &= left - 1;
    return chunk() + t;
  }
  // Of a tile just pulled.
  __device__ Bounds of(int tile) const { return at_hand()[tile - chunk()]; }

 private:
  // Both follow from `next`, as registers are short where tiles are walked. A chunk and the one after it have different
  // buffers.
  __device__ int chunk() const { return next - kChunk; }
  __device__ Bounds* at_hand() const { return bounds + (next / kChunk & 1) * kChunk; }

  __device__ void look(const Entries& entries, const Reach& reach) {
    next += kChunk;  // with two buffers one barrier is enough: whoever writes the other one has left this one's ballot
    const int chunk = this->chunk();
    Bounds* of_chunk = at_hand();
    const int lane = threadIdx.x % 32;
    for (int t = threadIdx.x / kLanes; t < kChunk; t += kThreads / kLanes) {
      Bounds b{kNowhere, INT32_MIN};
      if (chunk + t < end) {
#pragma unroll
        for (int j = 0; j < kKeys / kLanes; ++j) {
          const int position = entries.position(entries.slot((chunk + t) * kKeys + j * kLanes + lane % kLanes));
          b.low = min(b.low, position), b.high = max(b.high, position);
        }
      }
#pragma unroll
      for (int distance = 1; distance < kLanes; distance *= 2) {
        b.low = min(b.low, __shfl_xor_sync(kFullWarp, b.low, distance));
        b.high = max(b.high, __shfl_xor_sync(kFullWarp, b.high, distance));
      }
      if (lane % kLanes == 0) of_chunk[t] = b;
    }
    __syncthreads();
    left = __ballot_sync(kFullWarp, chunk + lane < end && !reach.hides(of_chunk[lane]));
  }
};

}  // namespace kvcache::cuda
