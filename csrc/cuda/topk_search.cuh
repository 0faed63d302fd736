// What the kernels of topk share: the entries of a head, the search for the border between the taken and the others, and
// writing out what is taken.
//
// Candidates are ranked by (score, low position first, low number first): three words, read as a number of 96 bits, no
// two alike. The smallest one taken is found digit by digit (11, 11, 10 bits of each word): a histogram of the digit among
// the candidates that agree in all digits so far, and the bin in which the k-th largest lies. The search ends as soon as a
// bin is taken whole: after two or three digits unless scores are equal.
#pragma once
#include <cstddef>

#include "../core/params.h"
#include "block_ranks.cuh"
#include "score_keys.cuh"

namespace kvcache::cuda {

constexpr int kTopKBins = 2048;
constexpr int kTopKBatch = 8;  // entries that a thread loads at once

struct TopKKey {  // of 12 bytes, so that neighbours lie in different banks
  uint32_t score, position, order;
};

// The entries of one head: all slots, or those of listed pages.
struct TopKEntries {
  const float* scores;
  const int32_t *positions, *pages;
  int n, count, page_size, first, end;

  __device__ __forceinline__ TopKEntries(const TopKParams& p, int64_t item) {
    const int64_t row = item / p.heads, head = item - row * p.heads;
    scores = p.scores + row * p.scores_stride[0] + head * p.scores_stride[1];
    positions = p.positions + row * p.positions_stride[0] + head * p.positions_stride[1];
    count = p.counts[row * p.counts_stride[0] + head * p.counts_stride[1]];
    n = count;
    pages = nullptr;
    page_size = p.page_size;
    if (p.page_size > 0) {
      pages = p.pages + row * p.pages_stride[0] + head * p.pages_stride[1];
      n = p.page_counts[row * p.page_counts_stride[0] + head * p.page_counts_stride[1]] * page_size;
    }
    first = p.first[row];
    end = p.end[row];
  }
};

// kBatch neighbours per lane, in the order of BlockRanks.
struct TopKSegment {
  int slot[kTopKBatch];  // -1: no entry
  int position[kTopKBatch];
  float score[kTopKBatch];
};

template <int kWarps>
__device__ __forceinline__ void load_segment(const TopKEntries& entries, int begin, int end, TopKSegment& segment) {
  using Ranks = BlockRanks<kWarps, kTopKBatch>;
#pragma unroll
  for (int j = 0; j < kTopKBatch; ++j) {
    const int i = begin + Ranks::element(int(threadIdx.x) / 32, j);
    int slot = i;
    if (entries.page_size > 0 && i < end) {
      const int line = unsigned(i) / unsigned(entries.page_size);
      slot = entries.pages[line] * entries.page_size + (i - line * entries.page_size);
    }
    const bool alive = i < end && slot < entries.count;
    segment.slot[j] = alive ? slot : -1;
    segment.position[j] = alive ? entries.positions[slot] : 0;
    segment.score[j] = alive ? entries.scores[i] : 0.0f;
  }
}

// f(alive, candidate, key) for every entry among begin .. end - 1; whole warps call it together. kWarps are the block's.
// `segment` holds the first of them.
template <int kWarps, class F>
__device__ __forceinline__ void each_entry(const TopKEntries& entries, int begin, int end, TopKSegment& segment, F f) {
  using Ranks = BlockRanks<kWarps, kTopKBatch>;
  for (int64_t base = begin; base < end; base += Ranks::kSegment) {
    if (base > begin) load_segment<kWarps>(entries, int(base), end, segment);
#pragma unroll
    for (int j = 0; j < kTopKBatch; ++j) {
      const bool alive = segment.slot[j] >= 0;
      const TopKKey key{score_key(segment.score[j]), position_key(segment.position[j]),
                        ~uint32_t(base + Ranks::element(int(threadIdx.x) / 32, j))};
      f(alive, alive && is_candidate(segment.position[j], entries.first, entries.end), key);
    }
  }
}

struct TopKSearch {
  TopKKey border;    // the digits found, zeros behind them: once found, what is not below it is taken
  int digit;         // the next one to find
  int need, inside;  // to be taken among the candidates that agree with the border so far, and how many those are

  __device__ __forceinline__ bool done() const { return need == inside; }
  __device__ __forceinline__ void everything() { border = {0, 0, 0}, need = inside = 0; }
  __device__ __forceinline__ void nothing() { border = {~0u, ~0u, ~0u}, need = inside = 0; }  // no score has that key

  __device__ static __forceinline__ uint32_t word(const TopKKey& key, int digit) {
    return digit < 3 ? key.score : digit < 6 ? key.position : key.order;
  }
  __device__ static __forceinline__ int shift(int digit) { return digit % 3 == 0 ? 21 : digit % 3 == 1 ? 10 : 0; }
  __device__ __forceinline__ int bin(const TopKKey& key) const {
    return int(word(key, digit) >> shift(digit)) & (digit % 3 == 2 ? 1023 : 2047);
  }
  // Whether the key has the border's digits before the next one.
  __device__ __forceinline__ bool agrees(const TopKKey& key) const {
    const bool words = (digit < 3 || key.score == border.score) && (digit < 6 || key.position == border.position);
    const uint32_t different = word(key, digit) ^ word(border, digit);
    return words && (digit % 3 == 0 || different >> (digit % 3 == 1 ? 21 : 10) == 0);
  }
  __device__ __forceinline__ void found(int bin, int bin_need, int bin_inside) {
    const uint32_t bits = uint32_t(bin) << shift(digit);
    border.score |= digit < 3 ? bits : 0;
    border.position |= digit >= 3 && digit < 6 ? bits : 0;
    border.order |= digit >= 6 ? bits : 0;
    need = bin_need;
    inside = bin_inside;
    ++digit;
  }
  __device__ __forceinline__ bool takes(const TopKKey& key) const {
    if (key.score != border.score) return key.score > border.score;
    if (key.position != border.position) return key.position > border.position;
    return key.order >= border.order;
  }
};

// Dynamic shared memory of all kernels.
struct TopKShared {
  uint32_t histogram[kTopKBins];
  int totals[32];  // of warps
  int bin[3];      // the bin found, what is needed of it, what is in it
  int staged_so_far;
  TopKKey staged[1];  // [room]

  static constexpr size_t bytes(int room) { return offsetof(TopKShared, staged) + room * sizeof(TopKKey); }
};

template <int kWarps>
__device__ __forceinline__ void clear(TopKShared& shared) {
  for (int i = int(threadIdx.x); i < kTopKBins; i += kWarps * 32) shared.histogram[i] = 0;
  if (threadIdx.x == 0) shared.staged_so_far = 0;
  __syncthreads();
}

// One more in `bin` for each lane that is `active`; the whole warp calls it. Lanes that agree with the first count as one
// addition, so that equal scores do not queue up.
__device__ __forceinline__ void count_bin(uint32_t* histogram, int bin, bool active) {
  const unsigned asking = __ballot_sync(kFullWarp, active);
  if (asking == 0) return;
  const int leader = __ffs(int(asking)) - 1;
  const int first = __shfl_sync(kFullWarp, bin, leader);
  const unsigned same = __ballot_sync(kFullWarp, active && bin == first);
  if (int(threadIdx.x) % 32 == leader) {
    atomicAdd(&histogram[first], unsigned(__popc(same)));
  } else if (active && bin != first) {
    atomicAdd(&histogram[bin], 1u);
  }
}

// Sum over the block; `totals` as in BlockRanks.
template <int kWarps>
__device__ __forceinline__ int block_sum(int value, int* totals) {
  value = warp_sum(value);
  __syncthreads();
  if (threadIdx.x % 32 == 0) totals[threadIdx.x / 32] = value;
  __syncthreads();
  int sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += totals[w];
  return sum;
}

// The bin in which the need-th largest lies, in shared.bin; nothing if there are not that many. Returns the sum of the
// histogram.
template <int kWarps>
__device__ __forceinline__ int find_bin(TopKShared& shared, int need) {
  constexpr int kPerThread = kTopKBins / (kWarps * 32);
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  __syncthreads();                   // the histogram is complete, the totals are free
  int counts[kPerThread], mine = 0;  // of this thread's bins, highest first
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) {
    counts[j] = int(shared.histogram[kTopKBins - 1 - (int(threadIdx.x) * kPerThread + j)]);
    mine += counts[j];
  }
  int above = mine;  // up to and with this thread's
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(kFullWarp, above, distance);
    if (lane >= distance) above += other;
  }
  if (lane == 31) shared.totals[warp] = above;
  __syncthreads();
  int all = 0;
  for (int w = 0; w < kWarps; ++w) {
    const int total = shared.totals[w];
    above += w < warp ? total : 0;
    all += total;
  }
  above -= mine;
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) {
    if (need > above && need <= above + counts[j]) {
      shared.bin[0] = kTopKBins - 1 - (int(threadIdx.x) * kPerThread + j);
      shared.bin[1] = need - above;
      shared.bin[2] = counts[j];
    }
    above += counts[j];
  }
  __syncthreads();
  return all;
}

// Carries the search to its end. staged: candidates that lie in shared memory already, all that agree with the border so
// far; -1: none do, they are staged as soon as `room` holds them. Returns how many are staged in the end, -1 for none.
template <int kWarps>
__device__ __forceinline__ int finish_search(const TopKEntries& entries, TopKSearch& search, TopKShared& shared,
                                             int staged, int room) {
  while (!search.done()) {
    clear<kWarps>(shared);
    if (staged >= 0) {
      for (int base = 0; base < staged; base += kWarps * 32) {
        const int i = base + int(threadIdx.x);
        const TopKKey key = i < staged ? shared.staged[i] : TopKKey{0, 0, 0};
        count_bin(shared.histogram, search.bin(key), i < staged && search.agrees(key));
      }
    } else {
      const bool stage = search.inside <= room;
      TopKSegment segment;
      load_segment<kWarps>(entries, 0, entries.n, segment);
      each_entry<kWarps>(entries, 0, entries.n, segment, [&](bool, bool candidate, const TopKKey& key) {
        const bool agrees = candidate && search.agrees(key);
        count_bin(shared.histogram, search.bin(key), agrees);
        if (stage && agrees) shared.staged[atomicAdd(&shared.staged_so_far, 1)] = key;
      });
      if (stage) staged = search.inside;
    }
    find_bin<kWarps>(shared, search.need);
    search.found(shared.bin[0], shared.bin[1], shared.bin[2]);
  }
  return staged;
}

// Writes the slots that are taken among the entries begin .. end - 1 to index[offset ...), up to `width`. `segment` holds
// the first of them.
template <int kWarps>
__device__ __forceinline__ void write_taken(const TopKEntries& entries, const TopKSearch& search, TopKShared& shared,
                                            int begin, int end, TopKSegment& segment, int offset, int32_t* index,
                                            int64_t width) {
  using Ranks = BlockRanks<kWarps, kTopKBatch>;
  const int warp = int(threadIdx.x) / 32;
  for (int64_t base = begin; base < end; base += Ranks::kSegment) {
    if (base > begin) load_segment<kWarps>(entries, int(base), end, segment);
    bool taken[kTopKBatch];
    int rank[kTopKBatch];
#pragma unroll
    for (int j = 0; j < kTopKBatch; ++j) {
      const TopKKey key{score_key(segment.score[j]), position_key(segment.position[j]),
                        ~uint32_t(base + Ranks::element(warp, j))};
      taken[j] =
          segment.slot[j] >= 0 && (!is_candidate(segment.position[j], entries.first, entries.end) || search.takes(key));
    }
    const int all = Ranks::rank(warp, taken, rank, shared.totals);
#pragma unroll
    for (int j = 0; j < kTopKBatch; ++j) {
      if (taken[j] && offset + rank[j] < width) index[offset + rank[j]] = segment.slot[j];
    }
    offset += all;
  }
}

}  // namespace kvcache::cuda
