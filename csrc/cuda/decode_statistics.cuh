// Attention probabilities for the policies: decode attention leaves every entry's weight for each query head, and once
// the log-sum-exps are known the probabilities are reduced over the group and added to the statistics.
//
// The tensor-core kernels leave weights of 16 bits, so that a group of 8 costs less than 8 % of the keys' and values'
// traffic: a half of 15 bits, relative to a power of two of its own for each 16 entries and head. That power is an int16
// too, and its 16 bits are where the 16 halves, which are never negative, have their sign. Error: 2^-12 relative to the
// probability, about 2^-31 relative to the largest one of the 16. Logits beyond +-180,000 count as no probability.
// The plain kernels leave the logits (base 2) in float.
#pragma once
#include "decode_attention.cuh"
#include "ptx/math.cuh"
#include "types.cuh"

namespace kvcache::cuda {

// A weight is 2^(logit - 8 * power + kWeightBits): the largest of 16 entries is in 2^6 .. 2^14.
constexpr int kWeightBits = 14;

__device__ __forceinline__ int weight_power(float top) {
  return top == -kInfinity ? 0 : static_cast<int>(fminf(fmaxf(ceilf(top * 0.125f), -32768.0f), 32767.0f));
}
__device__ __forceinline__ float half_weight(float logit, int power) {
  return fminf(fast_exp2(logit - static_cast<float>(8 * power - kWeightBits)), 65504.0f);
}
// The sign bits of two neighbouring heads' halves for entry `i` of the 16.
__device__ __forceinline__ uint32_t power_bits(int power0, int power1, int i) {
  return (static_cast<uint32_t>(power0) >> i & 1u) << 15 | (static_cast<uint32_t>(power1) >> i & 1u) << 31;
}

// statistics *= decay for the slots begin .. end - 1. Called by a whole block.
__device__ inline void decay_statistics(const DecodeLaunch& d, int item, int begin, int end) {
  float* statistics = d.p.statistics + int64_t(item) * d.p.view.capacity;  // [capacity]
  for (int i = begin + int(threadIdx.x); i < end; i += blockDim.x) statistics[i] *= d.p.statistics_decay;
}

// The slot that a place stands for, -1 if it holds no entry.
__device__ __forceinline__ int slot_of(const DecodeLaunch& d, int row, int head, int place, int count) {
  const AttentionParams& p = d.p;
  if (!p.index) return place;
  const int listed = p.index_pages ? d.page_size.quotient(place) : place;
  int slot = p.index[index_list(p, row, head) * p.index_width + listed];
  if (p.index_pages && slot >= 0) {
    if (slot >= p.view.table_width) return -1;
    slot = slot * p.view.page_size + place - listed * p.view.page_size;
  }
  return slot < count ? slot : -1;
}

// Adds the probabilities of the places begin .. end - 1 to the statistics; begin is a multiple of 32. level(h): the
// log-sum-exp of the group's query head h in base 2. Called by a whole block.
template <bool kHalf, class Level>
__device__ __forceinline__ void add_statistics_as(const DecodeLaunch& d, int item, int row, int head, int begin,
                                                  int end, int count, const Level& level) {
  constexpr int kAtOnce = 4;  // loads under way for each lane
  const int lane = threadIdx.x % 32, step = blockDim.x * kAtOnce;
  const int64_t stride = d.weight_heads;
  float* statistics = d.p.statistics + int64_t(item) * d.p.view.capacity;  // [capacity]
  const float share = 1.0f / static_cast<float>(d.group);
  for (int base = begin + int(threadIdx.x / 32) * 32 * kAtOnce; base < end; base += step) {
    float sum[kAtOnce] = {}, old[kAtOnce];
    int slot[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int place = base + i * 32 + lane;
      slot[i] = place < end ? slot_of(d, row, head, place, count) : -1;
      old[i] = slot[i] >= 0 ? statistics[slot[i]] : 0.0f;
    }
    for (int h = 0; h < d.group; h += kHalf ? 2 : 1) {
      uint32_t word[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int64_t at = (int64_t(item) * d.places + base + i * 32 + lane) * stride + h;
        const bool written = (base + i * 32 + lane) / kPart * kPart < end;  // parts are written as a whole
        word[i] = written ? static_cast<const uint32_t*>(d.weights)[kHalf ? at / 2 : at] : 0;
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
        for (int j = 0; j < (kHalf ? 2 : 1); ++j) {
          const float of_head = h + j < d.group ? level(h + j) : 0.0f, above = of_head == -kInfinity ? 0.0f : of_head;
          float chance;
          if constexpr (kHalf) {
            const uint32_t bits = j ? word[i] >> 16 : word[i] & 0xffffu;
            const uint32_t signs = __ballot_sync(kFullWarp, bits >> 15);
            const int power = static_cast<int16_t>(signs >> (lane & 16) & 0xffffu);
            const float weight = to_float(f16{static_cast<uint16_t>(bits & 0x7fffu)});
            // Without an entry of any weight the power is 0, which may be infinitely more than the log-sum-exp.
            chance = weight == 0.0f ? 0.0f : weight * fast_exp2(static_cast<float>(8 * power - kWeightBits) - above);
          } else {
            chance = fast_exp2(__uint_as_float(word[i]) - above);
          }
          if (h + j < d.group) sum[i] = d.p.statistics_max ? fmaxf(sum[i], chance) : sum[i] + chance * share;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (slot[i] < 0) continue;
      statistics[slot[i]] = sum[i] + (d.p.index ? old[i] : old[i] * d.p.statistics_decay);
    }
  }
}

template <class Level>
__device__ __forceinline__ void add_statistics(const DecodeLaunch& d, int item, int row, int head, int begin, int end,
                                               int count, const Level& level) {
  if (d.half_weights) add_statistics_as<true>(d, item, row, head, begin, end, count, level);
  else add_statistics_as<false>(d, item, row, head, begin, end, count, level);
}

}  // namespace kvcache::cuda
