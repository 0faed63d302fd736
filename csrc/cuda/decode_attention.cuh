// What the kernels of decode attention share: the arguments of a launch and the lengths of heads.
//
// A block is a worker of core/decode_plan.h. It takes the items (rows' kv heads) of its share one after the other, in
// tiles; each of its loading warps has 16 entries of a tile, its part. Places number what an item reads: slots, or the
// places of the list that names the slots.
#pragma once
#include "../core/decode_plan.h"
#include "../core/divide.h"
#include "../core/params.h"
#include "device.cuh"
#include "typed_memory.cuh"

namespace kvcache::cuda {

constexpr int kPart = 16;  // entries
constexpr float kLog2E = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;
constexpr float kInfinity = __builtin_huge_valf();

struct DecodeLaunch {
  AttentionParams p;
  const DecodePlan* plan;
  int32_t workers;
  int32_t group;          // query heads of a kv head
  int32_t parts, stages;  // of a block's shared memory
  Divisor page_size;
  float scale_in_cap;  // scale / softcap
  float2*
      partial_state;  // [2 * workers, group] largest logit (base 2), sum of weights; the sum is -1 if no entry was seen
  float* partial_out;  // [2 * workers, group, v_dim] weighted sums
  // For the statistics, [rows * heads, places, weight_heads], or null. See decode_statistics.cuh.
  void* weights;
  int64_t places;
  int32_t weight_heads;
  bool half_weights;
  bool aligned_q;              // 16 bytes at a time
  bool shared_parts;           // large groups: divide the heads among the warps (if the queries fit)
  int32_t grain;               // bytes that can be copied at once from the pages: 16, 8, 4 or 2
  Divisor k_pieces, v_pieces;  // of that size in a row
};

// How many places an item has, and how many entries its head holds.
struct Lengths {
  int32_t places, count;
};

__device__ __forceinline__ int64_t index_list(const AttentionParams& p, int row, int head) {
  return int64_t(row) * p.index_heads + (p.index_heads == 1 ? 0 : head);
}

// A count of `listed` may exceed the list's width: topk then reports what it would have needed.
__device__ __forceinline__ Lengths lengths(const AttentionParams& p, int32_t count, int32_t listed) {
  count = max(count, 0);
  if (p.index == nullptr) return {count, count};
  const int32_t width = p.index_pages ? min(int64_t(p.view.table_width), p.index_width) : p.index_width;
  const int32_t n = max(min(listed, width), 0);
  return {p.index_pages ? n * p.view.page_size : n, count};
}

__device__ __forceinline__ Lengths lengths_of(const AttentionParams& p, int item, int row, int head) {
  return lengths(p, p.view.counts[item], p.index ? p.index_counts[index_list(p, row, head)] : 0);
}

// Result of a query head: the factor of its sums and its log-sum-exp in base 2. `mass` < 0: it saw no entry.
struct HeadEnd {
  float factor, level;
};
__device__ __forceinline__ HeadEnd end_head(const AttentionParams& p, int query_head, float peak, float mass) {
  if (mass < 0.0f) return {0.0f, -kInfinity};
  float shrink = 1.0f;
  if (p.sinks) {
    const float sink = p.sinks[query_head] * kLog2E, top = fmaxf(sink, peak);
    shrink = peak == -kInfinity ? 0.0f : exp2f(peak - top);
    mass = mass * shrink + (sink == -kInfinity ? 0.0f : exp2f(sink - top));
    peak = top;
  }
  if (mass == 0.0f) return {0.0f, -kInfinity};
  return {shrink / mass, peak + log2f(mass)};
}

// Softcap and bias on the product of a query head (number `in_group` of the kv head's) and a visible slot's key: base 2.
__device__ __forceinline__ float finish_logit(const DecodeLaunch& d, int row, int head, int in_group, int slot,
                                              float x) {
  const AttentionParams& p = d.p;
  if (p.softcap > 0.0f) x = tanhf(x * d.scale_in_cap) * (p.softcap * kLog2E);
  else x *= p.scale * kLog2E;
  if (p.bias && in_group < d.group) {
    const int query_head = head * d.group + in_group;
    const int bias_head = p.bias_heads == 1 ? 0 : p.bias_heads == p.query_heads ? query_head : head;
    x += kLog2E * p.bias[(int64_t(row) * p.bias_heads + bias_head) * p.view.capacity + slot];
  }
  return x;
}

__device__ __forceinline__ void store_out(const AttentionParams& p, int64_t at, float value) {
  store_as(p.out, p.q.dtype, at, value);
}

// The plain division: only where an item begins.
struct RowHead {
  int row, head;
};
__device__ __forceinline__ RowHead row_head(const PagedView& view, int item) {
  const int row = item / view.heads;
  return {row, item - row * view.heads};
}

int64_t shared_memory_limit();  // dynamic shared memory that a block of the current device can have

// Launches of the kernels in the other files; block sizes and shared memory are theirs.
struct DecodeNeeds {
  DecodeBlock block;
  int64_t shared_bytes;
};
DecodeNeeds decode_needs_bf16(const DecodeLaunch& d, int64_t limit);
DecodeNeeds decode_needs_f16(const DecodeLaunch& d, int64_t limit);
DecodeNeeds decode_needs_plain(const DecodeLaunch& d, int64_t limit);
int decode_on_bf16(const DecodeLaunch& d, int64_t shared_bytes, void* stream);
int decode_on_f16(const DecodeLaunch& d, int64_t shared_bytes, void* stream);
int decode_on_plain(const DecodeLaunch& d, int64_t shared_bytes, void* stream);
int decode_combine(const DecodeLaunch& d, void* stream);

}  // namespace kvcache::cuda
