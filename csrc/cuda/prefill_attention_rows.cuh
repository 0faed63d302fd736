// How query rows leave prefill attention on tensor cores: their results, or partial ones for the combine pass.
#pragma once
#include "prefill_attention_memory.cuh"

namespace kvcache::cuda {

// Each warp's own rows: final results, or partial ones for the combine pass.
template <class C>
__device__ __forceinline__ void write_rows(const AttentionParams& p, const PrefillTiles& tiles,
                                           const PrefillBlock& block, const MmaMemory<C>& memory, int v_dim,
                                           int first_row, MmaSums<C>& sums) {
  using T = typename C::T;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < C::kRowTiles; ++i) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float mass = sums.mass[i][r];
      mass += __shfl_xor_sync(kFullWarp, mass, 1);
      mass += __shfl_xor_sync(kFullWarp, mass, 2);
      const int m = first_row + i * 16 + r * 8 + lane / 4, row = block.first + m;
      const bool inside = m < block.rows;
      const int token = row / block.group, query_head = block.head * block.group + row % block.group;
      if (tiles.splits > 1) {
        if (!inside) continue;
        const Partial partial = partial_of(p, tiles, block.item, block.piece, row);
        if (lane % 4 == 0) *partial.peak = sums.peak[i][r], *partial.mass = mass;
#pragma unroll
        for (int n = 0; n < C::kV / 8; ++n) {
          if (n * 8 < v_dim) {
            const float2 pair{sums.out[i][n][r * 2], sums.out[i][n][r * 2 + 1]};
            *reinterpret_cast<float2*>(partial.sums + n * 8 + lane % 4 * 2) = pair;
          }
        }
        continue;
      }
      RowEnd end{0.0f, -kInfinity};
      if (inside) end = end_row(p, query_head, memory.last[m] >= 0, sums.peak[i][r], mass);
      if (inside && lane % 4 == 0)
        p.lse[(int64_t(block.row) * p.query_heads + query_head) * p.tokens + token] = end.lse;
      T* out = static_cast<T*>(p.out) + ((int64_t(block.row) * p.tokens + token) * p.query_heads + query_head) * v_dim;
      // Neighbouring lanes swap, so that each has four columns of one of two tiles: 8 bytes at a time.
#pragma unroll
      for (int n = 0; n < C::kV / 8; n += 2) {
        uint32_t word[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float (&x)[4] = sums.out[i][n + j];
          word[j] = end.factor == 0 ? 0u : pack2<T>(x[r * 2] * end.factor, x[r * 2 + 1] * end.factor);
        }
        const bool odd = lane & 1;
        const uint32_t other = __shfl_xor_sync(kFullWarp, odd ? word[0] : word[1], 1);
        if (inside && n * 8 < v_dim) {
          const uint2 both = odd ? uint2{other, word[1]} : uint2{word[0], other};
          *reinterpret_cast<uint2*>(out + (n + (odd ? 1 : 0)) * 8 + lane % 4 / 2 * 4) = both;
        }
      }
    }
  }
}

// All warps have the same 16 rows: through shared memory, where the tiles were.
template <class C>
__device__ __forceinline__ void merge_rows(const AttentionParams& p, const PrefillTiles& tiles,
                                           const PrefillBlock& block, const MmaMemory<C>& memory, int v_dim,
                                           MmaSums<C>& sums) {
  using T = typename C::T;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float* all = reinterpret_cast<float*>(memory.stages);  // [warps][16][v_dim]
  float* ends = all + C::kWarps * 16 * v_dim;            // [warps][16][peak, mass]
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float mass = sums.mass[0][r];
    mass += __shfl_xor_sync(kFullWarp, mass, 1);
    mass += __shfl_xor_sync(kFullWarp, mass, 2);
    const int m = warp * 16 + r * 8 + lane / 4;
    if (lane % 4 == 0) ends[m * 2] = sums.peak[0][r], ends[m * 2 + 1] = mass;
#pragma unroll
    for (int n = 0; n < C::kV / 8; ++n) {
      if (n * 8 < v_dim) {
        const float2 pair{sums.out[0][n][r * 2], sums.out[0][n][r * 2 + 1]};
        *reinterpret_cast<float2*>(all + m * v_dim + n * 8 + lane % 4 * 2) = pair;
      }
    }
  }
  __syncthreads();
  for (int m = warp; m < block.rows; m += C::kWarps) {
    float peak = -kInfinity, mass = 0, weight[C::kWarps];
#pragma unroll
    for (int w = 0; w < C::kWarps; ++w) peak = fmaxf(peak, ends[(w * 16 + m) * 2]);
#pragma unroll
    for (int w = 0; w < C::kWarps; ++w) {
      weight[w] = exp2f(fmaxf(ends[(w * 16 + m) * 2], kFloor) - fmaxf(peak, kFloor));
      mass += ends[(w * 16 + m) * 2 + 1] * weight[w];
    }
    const int row = block.first + m, token = row / block.group;
    const int query_head = block.head * block.group + row % block.group;
    Partial partial{};
    RowEnd end{1.0f, 0.0f};
    if (tiles.splits > 1) {
      partial = partial_of(p, tiles, block.item, block.piece, row);
      if (lane == 0) *partial.peak = peak, *partial.mass = mass;
    } else {
      end = end_row(p, query_head, memory.last[m] >= 0, peak, mass);
      if (lane == 0) p.lse[(int64_t(block.row) * p.query_heads + query_head) * p.tokens + token] = end.lse;
    }
    T* out = static_cast<T*>(p.out) + ((int64_t(block.row) * p.tokens + token) * p.query_heads + query_head) * v_dim;
    for (int d = lane * 2; d < v_dim; d += 64) {
      float2 sum{0.0f, 0.0f};
#pragma unroll
      for (int w = 0; w < C::kWarps; ++w) {
        const float2 x = *reinterpret_cast<const float2*>(all + (w * 16 + m) * v_dim + d);
        sum.x += x.x * weight[w], sum.y += x.y * weight[w];
      }
      if (tiles.splits > 1) *reinterpret_cast<float2*>(partial.sums + d) = sum;
      else
        *reinterpret_cast<uint32_t*>(out + d) = end.factor == 0 ? 0u : pack2<T>(sum.x * end.factor, sum.y * end.factor);
    }
  }
}

}  // namespace kvcache::cuda
