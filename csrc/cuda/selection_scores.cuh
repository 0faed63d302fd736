// What selection_scores and page_scores share. Both are two passes:
//
// 1. Logits: a line per query head, and per piece of it the peak and mass of its softmax (selection_scores_mma.cu,
//    selection_scores_general.cu). Each row of the pool is read once for all query heads of its kv head.
// 2. Vote: merges the parts, turns logits into probabilities and sums them over the heads (`vote` below).
//
// Between the passes stand float32 logits: 32 heads x 128k are 16 MB, which stay in the L2. In 16 bits they would be
// half of that, but wrong by 2^-9 of their size: at a logit of 20 the probabilities would be off by 4 %, more than what
// separates the candidates around the k-th best.
//
// page_scores needs no kernel of its own for pass 1: sum_d max(q_d min_d, q_d max_d) is the product of
// [min(q, 0), max(q, 0)] with a page's [min, max], so bounds are keys twice as wide in pages of one entry.
#pragma once
#include "../core/params.h"
#include "../core/selection_plan.h"
#include "device.cuh"
#include "kernels.h"
#include "ptx/dependent_launch.cuh"
#include "ptx/math.cuh"
#include "types.cuh"

namespace kvcache::cuda {

constexpr float kNegInf = -INFINITY;
constexpr float kLog2E = 1.44269504088896341f;

template <int n>
struct alignas(4 * n) Several {  // neighbouring floats, moved at once
  float x[n];
};

struct LogitsParams {
  const void* pool;            // [., page_size, dim] in `dtype`
  const int32_t* table;        // [rows, heads, table_width] numbers of pages
  const int32_t* counts;       // [rows, heads]
  const int32_t* positions;    // [rows, heads, capacity], or null: whatever is alive is a candidate
  const int32_t *first, *end;  // [rows]
  const int32_t* pages;        // [rows, lists, page_width] columns of the table
  const int32_t* page_counts;  // [rows, lists], or null: all entries count
  Strided4 q;                  // [rows, query_heads, 1, bounds ? dim / 2 : dim]
  DType dtype;
  int32_t rows, heads, lists, group, dim, page_size, table_width;
  int32_t unit;  // entries of `counts` per entry of the pool: 1, or the real page size when the entries are pages
  int64_t capacity, page_width, width;
  bool soft, bounds;
  bool once;    // the pool is too large to stay in the L2: let it pass through
  float scale;  // with log2(e) in it when soft
  SelectionPlan plan;
  float* logits;  // [rows, query_heads, plan.stride]; -inf where no candidate
  float2* parts;  // [rows, query_heads, plan.pieces]; only the pieces that begin below the head's last candidate
  const int32_t* active;  // [rows] or null: rows of 0 are left alone

  __device__ __forceinline__ bool skips(int64_t row) const { return active && active[row] == 0; }
};

void place_scratch(LogitsParams& p, float* scratch);       // plan, once, logits and parts, from the rest
int logits(const LogitsParams& p, Stream stream);          // one of these:
int logits_mma(const LogitsParams& p, Stream stream);      // tensor cores
int logits_general(const LogitsParams& p, Stream stream);  // any dtype, head size and group
bool fits_mma(const LogitsParams& p);

// The candidates of one head. A place is a slot, or a number within the entries of the listed pages.
struct Places {
  const int32_t* table;      // [table_width]
  const int32_t* positions;  // [capacity] or null
  const int32_t* list;       // [page_width] or null
  int64_t n;                 // places that can hold an entry; none beyond
  uint32_t count;            // entries that the head holds
  uint32_t page_size, table_width;
  int32_t first, end;

  // The slot at a place, or -1.
  __device__ __forceinline__ int64_t slot(int64_t place) const {
    if (place >= n) return -1;
    if (!list) return place;
    const uint32_t column = list[uint32_t(place) / page_size];
    const uint32_t slot = column * page_size + uint32_t(place) % page_size;
    return column < table_width && slot < count ? int64_t(slot) : -1;
  }
  // Where the pool holds a slot's entry, in entries.
  __device__ __forceinline__ int64_t entry(int64_t slot) const {
    return int64_t(table[uint32_t(slot) / page_size]) * page_size + uint32_t(slot) % page_size;
  }
  __device__ __forceinline__ bool candidate(int64_t slot) const {
    if (slot < 0) return false;
    if (!positions) return true;
    const int32_t position = positions[slot];
    return position >= first && position < end;
  }
};

__device__ __forceinline__ Places places_of(const LogitsParams& p, int64_t row, int64_t head) {
  const int64_t line = row * p.heads + head, list = row * p.lists + (p.lists == 1 ? 0 : head);
  Places places;
  places.table = p.table + line * p.table_width;
  places.positions = p.positions ? p.positions + line * p.capacity : nullptr;
  places.list = p.page_counts ? p.pages + list * p.page_width : nullptr;
  places.count = p.heads > 0 ? (uint32_t(p.counts[line]) + uint32_t(p.unit - 1)) / uint32_t(p.unit) : 0;
  places.n = p.heads == 0 ? 0 : p.page_counts ? int64_t(p.page_counts[list]) * p.page_size : int64_t(places.count);
  places.n = places.n < p.width ? places.n : p.width;
  places.page_size = p.page_size;
  places.table_width = p.table_width;
  places.first = p.first[row];
  places.end = p.end[row];
  return places;
}

// Which piece of which head this block of pass 1 takes. Divisions of 32 bits: those of 64 are calls.
struct BlockPlace {
  int64_t piece, item, row, head;  // item: row * heads + head
};

__device__ __forceinline__ BlockPlace place_of_block(const LogitsParams& p) {
  const uint32_t pieces = uint32_t(p.plan.pieces), item = blockIdx.x / pieces;
  return {blockIdx.x % pieces, item, item / uint32_t(p.heads), item % uint32_t(p.heads)};
}

// Element d of the vector that a pool's entry is multiplied with.
__device__ __forceinline__ float query_element(const LogitsParams& p, int64_t row, int64_t query_head, int d) {
  const bool upper = p.bounds && d >= p.dim / 2;
  const int64_t at = row * p.q.stride[0] + query_head * p.q.stride[1] + (upper ? d - p.dim / 2 : d);
  const float x = p.q.dtype == DType::kFloat32    ? static_cast<const float*>(p.q.data)[at]
                  : p.q.dtype == DType::kBFloat16 ? to_float(static_cast<const bf16*>(p.q.data)[at])
                                                  : to_float(static_cast<const f16*>(p.q.data)[at]);
  if (!p.bounds) return x;
  return upper ? (x < 0 ? 0.0f : x) : (x > 0 ? 0.0f : x);  // a NaN stays one in both
}

// Adds a part of a softmax (base 2) to another. A NaN, also from inf - inf, stays in the mass.
__device__ __forceinline__ void merge_softmax(float& peak, float& mass, float other_peak, float other_mass) {
  const float top = fmaxf(peak, other_peak), base = top == kNegInf ? 0.0f : top;
  mass = mass * fast_exp2(peak - base) + other_mass * fast_exp2(other_peak - base);
  peak = top;
}

template <int kFrom = 16, int kTo = 1>
__device__ __forceinline__ void merge_softmax_lanes(float& peak, float& mass) {
#pragma unroll
  for (int d = kFrom; d >= kTo; d /= 2) {
    const float other_peak = __shfl_xor_sync(~0u, peak, d), other_mass = __shfl_xor_sync(~0u, mass, d);
    merge_softmax(peak, mass, other_peak, other_mass);
  }
}

// The softmax part of places begin .. end - 1 of every query head of a group, from the logits that this block has
// written there. Before: __syncthreads().
__device__ __forceinline__ void write_parts(const LogitsParams& p, int64_t first_line, int64_t piece, int64_t begin,
                                            int64_t end) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  for (int g = warp; g < p.group; g += warps) {
    const float* line = p.logits + (first_line + g) * p.plan.stride;
    float peak = kNegInf, mass = 0;
#pragma unroll 8
    for (int64_t i = begin + lane; i < end; i += 32) merge_softmax(peak, mass, line[i], 1.0f);
    merge_softmax_lanes(peak, mass);
    if (lane == 0) p.parts[(first_line + g) * p.plan.pieces + piece] = make_float2(peak, mass);
  }
}

constexpr int kVoteThreads = 256;

// Of pass 2: what its softmax needs for every voter.
inline int64_t vote_shared(const LogitsParams& p, bool per_head) {
  return 2 * int64_t{sizeof(float)} * p.group * (per_head ? 1 : p.heads);
}

// sum += what all voters have for the places at x. x [voters, stride]; levels, factors [voters], when soft
template <bool kSoft, int kEach>
__device__ __forceinline__ void add_votes(const float* x, int64_t stride, int voters, const float* levels,
                                          const float* factors, float (&sum)[kEach]) {
  constexpr int kBatch = 8;  // loads under way
  for (int first = 0; first < voters; first += kBatch) {
    Several<kEach> logit[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int v = first + b < voters ? first + b : voters - 1;
      logit[b] = *reinterpret_cast<const Several<kEach>*>(x + v * stride);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const bool real = first + b < voters;
      const float level = kSoft && real ? levels[first + b] : 0, factor = kSoft && real ? factors[first + b] : 0;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const float votes = kSoft ? fast_exp2(logit[b].x[i] - level) * factor : logit[b].x[i];
        sum[i] += real ? votes : 0;
      }
    }
  }
}

// Pass 2: kEach neighbouring places per thread. kind(places, row, head, place, score) says whether a place gets the sum of
// its votes; otherwise it sets the score. Dynamic shared
// memory: vote_shared() bytes.
template <int kEach, class Kind>
__device__ __forceinline__ void vote(const LogitsParams& p, bool per_head, uint32_t chunks, const Kind& kind,
                                     float* scores) {
  KVCACHE_DYNAMIC_SHARED(float, shared);
  const uint32_t line = blockIdx.x / chunks, heads = per_head ? p.heads : 1;
  const int64_t row = line / heads, head = line % heads, begin = int64_t(blockIdx.x % chunks) * (kEach * kVoteThreads);
  const int voters = per_head ? p.group : p.group * p.heads;
  const int64_t first_line = (row * p.heads + head) * p.group;
  float *levels = shared, *factors = shared + voters;  // [voters]
  // Nothing here was written by pass 1 up to the wait, so it can be looked up while that ends.
  const Places places = places_of(p, row, head);
  const int64_t place = begin + threadIdx.x * kEach;
  float result[kEach];
  bool voted[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    result[i] = kNegInf;
    voted[i] = place + i < places.n && kind(places, row, head, place + i, result[i]) && voters > 0;
  }
  wait_for_dependencies();
  launch_dependents();
  if (p.skips(row)) return;
  if (begin < places.n) {
    if (p.soft) {
      // Eight lanes per head, so that one wait for the memory serves 32 heads.
      const uint32_t used = (uint32_t(places.n) - 1) / uint32_t(p.plan.piece) + 1;
      for (int first = 0; first < voters; first += kVoteThreads / 8) {
        const int v = first + threadIdx.x / 8;
        float peak = kNegInf, mass = 0;
        if (v < voters) {
          const float2* parts = p.parts + (first_line + v) * p.plan.pieces;  // [pieces]
#pragma unroll 8
          for (uint32_t i = threadIdx.x % 8; i < used; i += 8) merge_softmax(peak, mass, parts[i].x, parts[i].y);
        }
        merge_softmax_lanes<4>(peak, mass);
        if (v < voters && threadIdx.x % 8 == 0) {
          // Not exp2(x - log-sum-exp): for logits of 1e5 that sum has lost the mass's digits.
          levels[v] = peak == kNegInf ? 0.0f : peak;
          factors[v] = mass == 0 ? 0.0f : 1 / mass;
        }
      }
      __syncthreads();
    }
    if (place < places.n) {
      float sum[kEach] = {};
      const float* x = p.logits + first_line * p.plan.stride + place;  // [voters, stride]
      if (p.soft) add_votes<true>(x, p.plan.stride, voters, levels, factors, sum);
      else add_votes<false>(x, p.plan.stride, voters, levels, factors, sum);
#pragma unroll
      for (int i = 0; i < kEach; ++i) result[i] = voted[i] ? sum[i] : result[i];
    }
  }
  float* out = scores + int64_t(line) * p.width + place;
  if (kEach > 1 && uint32_t(p.width) % kEach == 0) {
    Several<kEach> all;
#pragma unroll
    for (int i = 0; i < kEach; ++i) all.x[i] = result[i];
    if (place < p.width) *reinterpret_cast<Several<kEach>*>(out) = all;
  } else {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (place + i < p.width) out[i] = result[i];
    }
  }
}

// Few places are spread over as many blocks as possible.
inline bool vote_one_each(int64_t lines, int64_t width) { return lines * width < 64 * 1024; }

}  // namespace kvcache::cuda
