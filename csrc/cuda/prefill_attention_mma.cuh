// Prefill attention on tensor cores (mma.sync), online softmax, tiles of entries gathered from pages by cp.async.
//
// A block owns a tile of query rows (tokens with the query heads of their kv head side by side) and walks the tiles of
// entries that one of them sees. Two arrangements: warps own rows and share the entries (kKeyWarps = 1), or all warps have the
// same 16 rows and each takes its 16 entries of every tile, to be merged at the end (kRowWarps = 1: few queries).
// Logits are in base 2. A row's weights are taken against a peak that may lag behind the true one by kSlack: the sums
// need rescaling only when it moves, which is rare after the first tiles, and the result is the same.
#pragma once
#include "prefill_attention.cuh"
#include "ptx/dependent_launch.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/math.cuh"
#include "ptx/mma.cuh"

namespace kvcache::cuda {

constexpr float kSlack = 8.0f;  // weights reach 2^8: within fp16, and no bit is lost in a float

// kV: columns of values that registers are there for. kRowTiles: tiles of 16 query rows of a warp. kPlain: k_dim and
// v_dim are kV, scale is positive, and there is no softcap, bias or mask.
template <class T_, int kV_, int kRowTiles_, int kRowWarps_, int kKeyWarps_, int kKeys_, bool kPlain_>
struct MmaConfig {
  using T = T_;
  static constexpr int kV = kV_, kRowTiles = kRowTiles_, kRowWarps = kRowWarps_, kKeyWarps = kKeyWarps_;
  static constexpr int kKeys = kKeys_, kWarpKeys = kKeys / kKeyWarps;
  static constexpr int kWarps = kRowWarps * kKeyWarps, kThreads = 32 * kWarps;
  static constexpr int kRows = 16 * kRowTiles * kRowWarps, kCopied = kKeys / kWarps;  // entries that a warp copies
  static constexpr bool kPlain = kPlain_;
  static_assert(kWarpKeys % 16 == 0 && (kRowWarps == 1 || kKeyWarps == 1) && kCopied % 8 == 0 && kCopied <= 32);
};

// What stays the same while a block works, in shared memory: the registers are full.
struct MmaFacts {
  PrefillBlock block;
  Entries entries;
  Reach reach, warp_reach[4];
};
static_assert(sizeof(MmaFacts) <= kPrefillFactsBytes);

template <class C>
struct MmaMemory {  // prefill_shared_bytes in core/prefill_tiles.h adds this up
  typename C::T* queries;
  typename C::T* stages;
  int k_width, v_width;
  MmaFacts* facts;
  int32_t *last, *start;     // [rows]
  Bounds *tile, *scan;       // [stages], [2][32]
  int32_t *slot, *position;  // [stages][keys]

  __device__ MmaMemory(typename C::T* memory, int k_dim, int v_dim, int n) {
    k_width = (k_dim + 63) & ~63, v_width = (v_dim + 63) & ~63;
    queries = memory;
    stages = queries + C::kRows * k_width;
    facts = reinterpret_cast<MmaFacts*>(stages + n * stage_size());
    last = reinterpret_cast<int32_t*>(reinterpret_cast<char*>(facts) + kPrefillFactsBytes);
    start = last + C::kRows;
    tile = reinterpret_cast<Bounds*>(start + C::kRows);
    scan = tile + n;
    slot = reinterpret_cast<int32_t*>(scan + 2 * 32);
    position = slot + n * C::kKeys;
  }
  __device__ int stage_size() const { return C::kKeys * (k_width + v_width); }
  __device__ typename C::T* keys(int stage) const { return stages + stage * stage_size(); }
  __device__ typename C::T* values(int stage) const { return keys(stage) + C::kKeys * k_width; }
};

// One thread's share of a warp's results. Row tile i, half r: row i * 16 + r * 8 + lane / 4.
template <class C>
struct MmaSums {
  float out[C::kRowTiles][C::kV / 8][4];
  float peak[C::kRowTiles][2], mass[C::kRowTiles][2];  // mass: of this thread's columns only, until finished
};

// Rows of zeros where no real query is: padding may hold anything.
template <class C>
__device__ __forceinline__ void copy_queries(const AttentionParams& p, const PrefillBlock& block,
                                             const MmaMemory<C>& memory, int k_dim, bool aligned) {
  using T = typename C::T;
  const int chunks = k_dim / 8;
  for (int i = threadIdx.x; i < C::kRows * chunks; i += C::kThreads) {
    const int m = i / chunks, chunk = i % chunks;
    const bool full = memory.last[m] >= 0;
    const T* from = static_cast<const T*>(p.q.data) + (full ? query_offset(p, block, m) + chunk * 8 : 0);
    T* to = chunk_at(memory.queries, m, chunk, memory.k_width);
    if (aligned) {
      cp_async_16(to, from, full);
    } else {
      for (int j = 0; j < 8; ++j) to[j] = full ? from[j] : T{};
    }
  }
}

// scores = queries . keys
template <class C>
__device__ __forceinline__ void multiply_keys(const MmaMemory<C>& memory, int stage, int k_dim, int first_row,
                                              int first_key, float (&scores)[C::kRowTiles][C::kWarpKeys / 8][4]) {
  using T = typename C::T;
  const int lane = threadIdx.x % 32;
  const T* keys = memory.keys(stage);
  auto step = [&](int s) {
    uint32_t a[C::kRowTiles][4];
#pragma unroll
    for (int i = 0; i < C::kRowTiles; ++i) {
      ldmatrix_x4(a[i], chunk_at(memory.queries, first_row + i * 16 + lane % 16, s * 2 + lane / 16, memory.k_width));
    }
#pragma unroll
    for (int n = 0; n < C::kWarpKeys / 16; ++n) {
      uint32_t b[4];
      ldmatrix_x4(b,
                  chunk_at(keys, first_key + n * 16 + lane / 16 * 8 + lane % 8, s * 2 + lane / 8 % 2, memory.k_width));
#pragma unroll
      for (int i = 0; i < C::kRowTiles; ++i) {
        mma_m16n8k16<T>(scores[i][n * 2], a[i], b[0], b[1]);
        mma_m16n8k16<T>(scores[i][n * 2 + 1], a[i], b[2], b[3]);
      }
    }
  };
  if constexpr (C::kPlain) {
#pragma unroll
    for (int s = 0; s < C::kV / 16; ++s) step(s);
  } else {
#pragma unroll 2
    for (int s = 0; s < k_dim / 16; ++s) step(s);
  }
}

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
    if (p.softcap > 0) {  // tanh(x) = 1 - 2 / (e^2x + 1), to about 1e-7
      const float to_cap = 2 * kLog2E * p.scale / p.softcap, from_cap = p.softcap * kLog2E;
      each([&](float& x, int, int, int) {
        x = from_cap - __fdividef(2 * from_cap, fast_exp2(fminf(x * to_cap, 64.0f)) + 1.0f);
      });
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

template <class C>
__global__ void __launch_bounds__(C::kThreads)
    prefill_attention_mma(AttentionParams p, PrefillTiles tiles, bool aligned_queries) {
  using T = typename C::T;
  KVCACHE_DYNAMIC_SHARED(T, shared);
  const int k_dim = C::kPlain ? C::kV : p.view.k_dim, v_dim = C::kPlain ? C::kV : p.view.v_dim;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const MmaMemory<C> memory(shared, k_dim, v_dim, tiles.stages);
  MmaFacts& facts = *memory.facts;
  const PrefillBlock& block = facts.block;
  const Entries& entries = facts.entries;
  if (threadIdx.x == 0) {
    facts.block = prefill_block(p, tiles);
    facts.entries = Entries(p, block.item);
  }
  __syncthreads();
  const int pieces = prefill_pieces(tiles, entries.places);
  if (block.piece >= pieces) return;
  const int all_tiles = (entries.places + C::kKeys - 1) / C::kKeys, per_piece = (all_tiles + pieces - 1) / pieces;
  load_limits(p, block, C::kRows, memory.last, memory.start);
  __syncthreads();
  copy_queries(p, block, memory, k_dim, aligned_queries);
  const int first_row = C::kRowWarps == 1 ? 0 : warp * C::kRowTiles * 16;
  const int first_key = C::kKeyWarps == 1 ? 0 : warp * C::kWarpKeys;
  const Reach reach = reach_of(memory.last, memory.start, first_row, first_row + C::kRowTiles * 16);
  const Reach block_reach = reach_of(memory.last, memory.start, 0, C::kRows);
  if (lane == 0) facts.warp_reach[warp] = reach;
  if (threadIdx.x == 0) facts.reach = block_reach;
  __syncthreads();

  TileScan<C::kKeys, C::kThreads> scan(memory.scan, block.piece * per_piece,
                                       min((block.piece + 1) * per_piece, all_tiles));
  // The tile to be copied next, and this lane's entry of it. It is looked up one tile ahead, as each look-up waits for
  // the memory twice.
  const int copied = warp * C::kCopied + lane;
  int tile = -1, slot = -1, position = kNowhere;
  int64_t line = -1;
  Bounds bounds{};
  auto look_up = [&] {
    tile = scan.pull(entries, facts.reach);
    if (tile < 0) return;
    bounds = scan.of(tile);
    slot = lane < C::kCopied ? entries.slot(tile * C::kKeys + copied) : -1;
    position = entries.position(slot);
    line = slot < 0 ? -1 : entries.line(slot);
  };
  auto copy = [&](int stage) {  // one group of copies, an empty one behind the last tile
    if (tile >= 0) {
      if (lane < C::kCopied) {
        memory.slot[stage * C::kKeys + copied] = slot;
        memory.position[stage * C::kKeys + copied] = position;
      }
      if (threadIdx.x == 0) memory.tile[stage] = bounds;
      const int first = warp * C::kCopied;
      copy_lines<T, C::kCopied>(static_cast<const T*>(p.view.k_pages), k_dim, k_dim, line, memory.keys(stage), first,
                                memory.k_width);
      copy_lines<T, C::kCopied>(static_cast<const T*>(p.view.v_pages), v_dim, (v_dim + 31) & ~31, line,
                                memory.values(stage), first, memory.v_width);
    }
    cp_async_commit();
  };

  MmaSums<C> sums;
#pragma unroll
  for (int i = 0; i < C::kRowTiles; ++i) {
#pragma unroll
    for (int n = 0; n < C::kV / 8; ++n)
      sums.out[i][n][0] = sums.out[i][n][1] = sums.out[i][n][2] = sums.out[i][n][3] = 0;
    sums.peak[i][0] = sums.peak[i][1] = -kInfinity;
    sums.mass[i][0] = sums.mass[i][1] = 0;
  }
  const float factor = C::kPlain ? p.scale * kLog2E : 1.0f;

  const int ahead = max(1, tiles.stages - 1);  // tiles that are under way while one is worked on
  int under_way = 0, stage = 0, next_stage = 0;
  look_up();
  for (; under_way < ahead && tile >= 0; ++under_way) {
    copy(next_stage);
    next_stage = next_stage + 1 == tiles.stages ? 0 : next_stage + 1;
    look_up();
  }
  for (int i = under_way; i < ahead; ++i) cp_async_commit();
  while (under_way > 0) {
    if (ahead == 2) cp_async_wait<1>();
    else cp_async_wait<0>();
    __syncthreads();                       // this tile is there for all, and the one before is done with
    const bool alone = tiles.stages == 1;  // no room to copy ahead
    if (!alone) {
      under_way += (tile >= 0) - 1;
      copy(next_stage);
      if (tile >= 0) {
        next_stage = next_stage + 1 == tiles.stages ? 0 : next_stage + 1;
        look_up();
      }
    }
    const Bounds here = memory.tile[stage];
    if (!facts.warp_reach[warp].hides(here)) {
      float scores[C::kRowTiles][C::kWarpKeys / 8][4] = {};
      multiply_keys<C>(memory, stage, k_dim, first_row, first_key, scores);
      const bool check = !facts.warp_reach[warp].shows(here);
      if (!C::kPlain || check) adjust<C>(p, block, memory, stage, first_row, first_key, check, scores);
      weigh<C>(factor, scores, sums);
      multiply_values<C>(memory, stage, v_dim, first_key, scores, sums);
    }
    stage = stage + 1 == tiles.stages ? 0 : stage + 1;
    if (alone) {
      __syncthreads();
      under_way = tile >= 0;
      copy(0);
      if (tile >= 0) look_up();
    }
  }
  cp_async_wait<0>();
  launch_dependents();
  if constexpr (C::kKeyWarps == 1) {
    write_rows<C>(p, tiles, block, memory, v_dim, first_row, sums);
  } else {
    __syncthreads();
    merge_rows<C>(p, tiles, block, memory, v_dim, sums);
  }
}

template <class C>
int launch_prefill_mma(const AttentionParams& p, const PrefillTiles& tiles, Stream stream) {
  int64_t together = reinterpret_cast<uintptr_t>(p.q.data);
  for (int64_t stride : p.q.stride) together |= stride * 2;
  return KVCACHE_LAUNCH((prefill_attention_mma<C>), prefill_blocks(p, tiles), C::kThreads, tiles.shared_bytes, stream,
                        p, tiles, together % 16 == 0);
}

template <class T>
int launch_prefill(const AttentionParams& p, const PrefillTiles& tiles, Stream stream) {
  const bool plain = p.scale > 0 && p.softcap == 0 && !p.bias && !p.mask && p.view.k_dim == p.view.v_dim &&
                     p.view.v_dim == tiles.v_width;
  const bool wide = tiles.v_width == 256, narrow = tiles.v_width == 64;
  switch (tiles.kernel) {
    case PrefillKernel::kSmall:
      return wide     ? launch_prefill_mma<MmaConfig<T, 256, 1, 1, 2, 32, false>>(p, tiles, stream)
             : narrow ? launch_prefill_mma<MmaConfig<T, 64, 1, 1, 4, 64, false>>(p, tiles, stream)
                      : launch_prefill_mma<MmaConfig<T, 128, 1, 1, 4, 64, false>>(p, tiles, stream);
    case PrefillKernel::kMiddle:
      return wide     ? (plain ? launch_prefill_mma<MmaConfig<T, 256, 1, 4, 1, 32, true>>(p, tiles, stream)
                               : launch_prefill_mma<MmaConfig<T, 256, 1, 4, 1, 32, false>>(p, tiles, stream))
             : narrow ? (plain ? launch_prefill_mma<MmaConfig<T, 64, 1, 4, 1, 64, true>>(p, tiles, stream)
                               : launch_prefill_mma<MmaConfig<T, 64, 1, 4, 1, 64, false>>(p, tiles, stream))
                      : (plain ? launch_prefill_mma<MmaConfig<T, 128, 1, 4, 1, 64, true>>(p, tiles, stream)
                               : launch_prefill_mma<MmaConfig<T, 128, 1, 4, 1, 64, false>>(p, tiles, stream));
    default:
      return narrow ? (plain ? launch_prefill_mma<MmaConfig<T, 64, 2, 4, 1, 64, true>>(p, tiles, stream)
                             : launch_prefill_mma<MmaConfig<T, 64, 2, 4, 1, 64, false>>(p, tiles, stream))
                    : (plain ? launch_prefill_mma<MmaConfig<T, 128, 2, 4, 1, 64, true>>(p, tiles, stream)
                             : launch_prefill_mma<MmaConfig<T, 128, 2, 4, 1, 64, false>>(p, tiles, stream));
  }
}

}  // namespace kvcache::cuda
