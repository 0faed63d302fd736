// Between the two products of prefill attention on tensor cores: logits are adjusted and become weights; and the second product.
#pragma once
#include "prefill_attention_memory.cuh"

namespace kvcache::cuda {

// What is done to single logits: softcap, bias and mask (not plain), positions (where `check`). They leave in base 2,
// except plain ones, which multiply_values scales.
template <class C>
__device__ __forceinline__ void adjust(const AttentionParams& p, const PrefillBlock& block, const MmaMemory<C>& memory,
                                       int stage, int first_row, int first_key, bool check,
                                       float (&scores)[C::kRowTiles][C::kWarpKeys / 8][4]) {
  const int lane = threadIdx.x % 32;
  const int32_t* slots = memory.slot + stage * C::kKeys + first_key + lane % 4 * 2;
  const int32_t* positions = memory.position + stage * C::kKeys + first_key + lane % 4 * 2;
  auto each = [&](auto&& change) {  // change(score, row tile, half, key counted from this lane's first)
#pragma unroll
    for (int j = 0; j < C::kWarpKeys / 8; ++j) {
#pragma unroll
      for (int i = 0; i < C::kRowTiles; ++i) {
#pragma unroll
        for (int x = 0; x < 4; ++x) change(scores[i][j][x], i, x / 2, j * 8 + x % 2);
      }
    }
  };
  if constexpr (!C::kPlain) {
    if (p.softcap > 0) {
      const float to_cap = 2 * kLog2E * p.scale / p.softcap, from_cap = p.softcap * kLog2E;
      each([&](float& x, int, int, int) { x = capped(x, to_cap, from_cap); });
    } else {
      const float factor = p.scale * kLog2E;
      each([&](float& x, int, int, int) { x *= factor; });
    }
    if (p.bias) {
      const float* bias = p.bias + int64_t(block.row) * p.bias_heads * p.view.capacity;
      const float* line[C::kRowTiles][2];
#pragma unroll
      for (int i = 0; i < C::kRowTiles; ++i) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int g = (block.first + first_row + i * 16 + r * 8 + lane / 4) % block.group;
          line[i][r] = bias + shared_head(p.bias_heads, p, block.head, block.head * block.group + g) * p.view.capacity;
        }
      }
      each([&](float& x, int i, int r, int key) { x = fmaxf(kBuried, x + line[i][r][max(slots[key], 0)] * kLog2E); });
    }
  }
  if (check) {
    each([&](float& x, int i, int r, int key) {
      const int m = first_row + i * 16 + r * 8 + lane / 4;
      if (positions[key] > memory.last[m] || positions[key] < memory.start[m]) x = -kInfinity;
    });
  }
  if constexpr (!C::kPlain) {
    if (p.mask) {
      const int64_t line = int64_t(block.row) * p.mask_heads + (p.mask_heads == 1 ? 0 : block.head);
      each([&](float& x, int i, int r, int key) {
        const int m = first_row + i * 16 + r * 8 + lane / 4;
        if (m >= block.rows) return;
        const int token = (block.first + m) / block.group;
        if (!p.mask[(line * p.tokens + token) * p.view.capacity + max(slots[key], 0)]) x = -kInfinity;
      });
    }
  }
}

constexpr float kSlack = 8.0f;  // weights reach 2^8: within fp16, and no bit is lost in a float

// Logits become weights; peak, mass and, where the peak moved, the sums follow.
template <class C>
__device__ __forceinline__ void weigh(float factor, float (&scores)[C::kRowTiles][C::kWarpKeys / 8][4],
                                      MmaSums<C>& sums) {
  float top[C::kRowTiles][2];
  bool moved = false;
#pragma unroll
  for (int i = 0; i < C::kRowTiles; ++i) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float x = -kInfinity;
#pragma unroll
      for (int j = 0; j < C::kWarpKeys / 8; ++j) x = fmaxf(x, fmaxf(scores[i][j][r * 2], scores[i][j][r * 2 + 1]));
      x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, 1));
      x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, 2));
      top[i][r] = fmaxf(x * factor, sums.peak[i][r]);
      moved = moved || top[i][r] > sums.peak[i][r] + kSlack;
    }
  }
  if (__any_sync(kFullWarp, moved)) {
#pragma unroll
    for (int i = 0; i < C::kRowTiles; ++i) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float shrink = fast_exp2(fmaxf(sums.peak[i][r], kFloor) - fmaxf(top[i][r], kFloor));
        sums.peak[i][r] = top[i][r];
        sums.mass[i][r] *= shrink;
#pragma unroll
        for (int n = 0; n < C::kV / 8; ++n) sums.out[i][n][r * 2] *= shrink, sums.out[i][n][r * 2 + 1] *= shrink;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < C::kRowTiles; ++i) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float level = fmaxf(sums.peak[i][r], kFloor);
      float mass = 0;
#pragma unroll
      for (int j = 0; j < C::kWarpKeys / 8; ++j) {
#pragma unroll
        for (int x = r * 2; x < r * 2 + 2; ++x) {
          scores[i][j][x] = fast_exp2(fmaf(scores[i][j][x], factor, -level));
          mass += scores[i][j][x];
        }
      }
      sums.mass[i][r] += mass;
    }
  }
}

// sums += weights . values
template <class C>
__device__ __forceinline__ void multiply_values(const MmaMemory<C>& memory, int stage, int v_dim, int first_key,
                                                const float (&weights)[C::kRowTiles][C::kWarpKeys / 8][4],
                                                MmaSums<C>& sums) {
  using T = typename C::T;
  constexpr int kSteps = C::kWarpKeys / 16;
  const int lane = threadIdx.x % 32;
  const T* values = memory.values(stage);
  uint32_t a[C::kRowTiles][kSteps][4];
#pragma unroll
  for (int i = 0; i < C::kRowTiles; ++i) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        const float (&w)[4] = weights[i][s * 2 + x / 2];
        a[i][s][x] = pack2<T>(w[x % 2 * 2], w[x % 2 * 2 + 1]);
      }
    }
  }
#pragma unroll
  for (int c = 0; c < C::kV / 32; ++c) {
    if (C::kPlain || c * 32 < v_dim) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
#pragma unroll
        for (int n = c * 4; n < c * 4 + 4; n += 2) {
          uint32_t b[4];
          ldmatrix_x4_trans(b, chunk_at(values, first_key + s * 16 + lane % 16, n + lane / 16, memory.v_width));
#pragma unroll
          for (int i = 0; i < C::kRowTiles; ++i) {
            mma_m16n8k16<T>(sums.out[i][n], a[i][s], b[0], b[1]);
            mma_m16n8k16<T>(sums.out[i][n + 1], a[i][s], b[2], b[3]);
          }
        }
      }
    }
  }
}

}  // namespace kvcache::cuda
