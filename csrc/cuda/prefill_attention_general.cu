// Prefill attention without tensor cores: any storage, any head size up to 256, any group, queries of another dtype.
// Everything is a float in shared memory; a thread owns 4 query rows by 2 entries of the scores and 4 rows by up to 16
// columns of the output, so both products reuse what they read from shared memory four times or more.
#include "prefill_attention.cuh"
#include "ptx/dependent_launch.cuh"

namespace kvcache::cuda {
namespace {

constexpr int kRows = 32, kKeys = 32, kThreads = 128;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kBlocks = 2;  // on a multiprocessor; left to itself the compiler wants more there, and spills
#else
constexpr int kBlocks = 0;
#endif
constexpr int kAcross = 16;  // threads beside each other; kThreads / kAcross of them below each other have 4 rows each
constexpr int kWeightStep = kRows + 4;
constexpr int kMaxDim = 256, kColumnTiles = kMaxDim / (4 * kAcross);

struct Memory {  // prefill_general_bytes in core/prefill_tiles.h adds this up
  int k_width, v_width;
  float* queries;  // [kRows][k_width]
  float* tile;     // [kKeys][k_width or v_width]
  float* weights;  // [kKeys][kWeightStep]
  int32_t *last, *start, *slot, *position;
  Bounds* scan;

  __device__ Memory(float* memory, int k_dim, int v_dim) {
    k_width = ((k_dim + 3) & ~3) + 4, v_width = ((v_dim + 3) & ~3) + 4;
    queries = memory;
    tile = queries + kRows * k_width;
    weights = tile + kKeys * max(k_width, v_width);
    scan = reinterpret_cast<Bounds*>(weights + kKeys * kWeightStep);
    last = reinterpret_cast<int32_t*>(scan + 2 * 32);
    start = last + kRows;
    slot = start + kRows;
    position = slot + kKeys;
  }
};

// Entries of a tile as rows of floats, zeros where there is none and behind dim up to whole vectors.
template <class T>
__device__ __forceinline__ void load_tile(const Entries& entries, const int32_t* slots, const void* pool, int dim,
                                          float* tile, int width) {
  const int lane = threadIdx.x % 32;
  for (int i = threadIdx.x / 32; i < kKeys; i += kThreads / 32) {
    const int slot = slots[i];
    const T* line = static_cast<const T*>(pool) + (slot < 0 ? 0 : entries.line(slot) * dim);
    for (int d = lane; d < width - 4; d += 32) tile[i * width + d] = slot >= 0 && d < dim ? to_float(line[d]) : 0.0f;
  }
}

__device__ __forceinline__ void load_queries(const AttentionParams& p, const PrefillBlock& block,
                                             const Memory& memory) {
  const int lane = threadIdx.x % 32;
  for (int m = threadIdx.x / 32; m < kRows; m += kThreads / 32) {
    const bool real = memory.last[m] >= 0;  // padding may hold anything
    const int64_t offset = real ? query_offset(p, block, m) : 0;
    for (int d = lane; d < memory.k_width - 4; d += 32) {
      memory.queries[m * memory.k_width + d] =
          real && d < p.view.k_dim ? load_as_float(p.q.data, p.q.dtype, offset + d) : 0.0f;
    }
  }
}

__device__ __forceinline__ float dot4(float4 a, float4 b, float sum) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

// Logit in base 2 of query row m and entry i of the tile, -inf where hidden.
__device__ __forceinline__ float logit(const AttentionParams& p, const PrefillBlock& block, const Memory& memory, int m,
                                       int i, float product) {
  const int slot = memory.slot[i], position = memory.position[i];
  if (slot < 0 || m >= block.rows || position > memory.last[m] || position < memory.start[m]) return -kInfinity;
  const int token = (block.first + m) / block.group, g = (block.first + m) % block.group;
  if (p.mask) {
    const int64_t line = int64_t(block.row) * p.mask_heads + (p.mask_heads == 1 ? 0 : block.head);
    if (!p.mask[(line * p.tokens + token) * p.view.capacity + slot]) return -kInfinity;
  }
  float x = product * p.scale;
  if (p.softcap > 0) x = tanhf(x / p.softcap) * p.softcap;
  x *= kLog2E;
  if (p.bias) {
    const int head = shared_head(p.bias_heads, p, block.head, block.head * block.group + g);
    x = fmaxf(kBuried, x + p.bias[(int64_t(block.row) * p.bias_heads + head) * p.view.capacity + slot] * kLog2E);
  }
  return x;
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks) prefill_attention_plain(AttentionParams p, PrefillTiles tiles) {
  KVCACHE_DYNAMIC_SHARED(float, shared);
  const int k_dim = p.view.k_dim, v_dim = p.view.v_dim;
  const PrefillBlock block = prefill_block(p, tiles);
  const Entries entries(p, block.item);
  const int pieces = prefill_pieces(tiles, entries.places);
  if (block.piece >= pieces) return;
  const int all_tiles = (entries.places + kKeys - 1) / kKeys, per_piece = (all_tiles + pieces - 1) / pieces;
  const Memory memory(shared, k_dim, v_dim);
  load_limits(p, block, kRows, memory.last, memory.start);
  __syncthreads();
  load_queries(p, block, memory);
  const Reach reach = reach_of(memory.last, memory.start, 0, kRows);

  const int down = threadIdx.x / kAcross * 4, across = threadIdx.x % kAcross;  // first row; entries across, across + 16
  float out[4][kColumnTiles][4] = {}, peak[4], mass[4] = {};
  for (float& x : peak) x = -kInfinity;
  TileScan<kKeys, kThreads> scan(memory.scan, block.piece * per_piece, min((block.piece + 1) * per_piece, all_tiles));
  for (int tile; (tile = scan.pull(entries, reach)) >= 0;) {
    if (threadIdx.x < kKeys) {
      memory.slot[threadIdx.x] = entries.slot(tile * kKeys + threadIdx.x);
      memory.position[threadIdx.x] = entries.position(memory.slot[threadIdx.x]);
    }
    __syncthreads();
    load_tile<T>(entries, memory.slot, p.view.k_pages, k_dim, memory.tile, memory.k_width);
    __syncthreads();

    float scores[4][2] = {};
    for (int d = 0; d < k_dim; d += 4) {
      float4 key[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        key[j] = *reinterpret_cast<const float4*>(memory.tile + (across + j * kAcross) * memory.k_width + d);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float4 query = *reinterpret_cast<const float4*>(memory.queries + (down + i) * memory.k_width + d);
        scores[i][0] = dot4(query, key[0], scores[i][0]);
        scores[i][1] = dot4(query, key[1], scores[i][1]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        scores[i][j] = logit(p, block, memory, down + i, across + j * kAcross, scores[i][j]);
      }
      float top = fmaxf(scores[i][0], scores[i][1]);
#pragma unroll
      for (int distance = 1; distance < kAcross; distance *= 2) {
        top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, distance));
      }
      top = fmaxf(top, peak[i]);
      const float level = fmaxf(top, kFloor), shrink = exp2f(fmaxf(peak[i], kFloor) - level);
      peak[i] = top;
      mass[i] *= shrink;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        scores[i][j] = exp2f(scores[i][j] - level);
        mass[i] += scores[i][j];
      }
#pragma unroll
      for (int c = 0; c < kColumnTiles; ++c) {
#pragma unroll
        for (int x = 0; x < 4; ++x) out[i][c][x] *= shrink;
      }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float4 column{scores[0][j], scores[1][j], scores[2][j], scores[3][j]};
      *reinterpret_cast<float4*>(memory.weights + (across + j * kAcross) * kWeightStep + down) = column;
    }
    __syncthreads();
    load_tile<T>(entries, memory.slot, p.view.v_pages, v_dim, memory.tile, memory.v_width);
    __syncthreads();
    for (int key = 0; key < kKeys; ++key) {
      const float4 weight = *reinterpret_cast<const float4*>(memory.weights + key * kWeightStep + down);
      const float w[4] = {weight.x, weight.y, weight.z, weight.w};
#pragma unroll
      for (int c = 0; c < kColumnTiles; ++c) {
        const int d = (c * kAcross + across) * 4;
        if (d >= v_dim) break;
        const float4 value = *reinterpret_cast<const float4*>(memory.tile + key * memory.v_width + d);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          out[i][c][0] = fmaf(w[i], value.x, out[i][c][0]), out[i][c][1] = fmaf(w[i], value.y, out[i][c][1]);
          out[i][c][2] = fmaf(w[i], value.z, out[i][c][2]), out[i][c][3] = fmaf(w[i], value.w, out[i][c][3]);
        }
      }
    }
    __syncthreads();
  }
  launch_dependents();

#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int distance = 1; distance < kAcross; distance *= 2) {
      mass[i] += __shfl_xor_sync(kFullWarp, mass[i], distance);
    }
    const int m = down + i, row = block.first + m;
    if (m >= block.rows) continue;
    const int token = row / block.group, query_head = block.head * block.group + row % block.group;
    float* partial = nullptr;
    RowEnd end{1.0f, 0.0f};
    if (tiles.splits > 1) {
      const Partial part = partial_of(p, tiles, block.item, block.piece, row);
      partial = part.sums;
      if (across == 0) *part.peak = peak[i], *part.mass = mass[i];
    } else {
      end = end_row(p, query_head, memory.last[m] >= 0, peak[i], mass[i]);
      if (across == 0) p.lse[(int64_t(block.row) * p.query_heads + query_head) * p.tokens + token] = end.lse;
    }
    const int64_t place = ((int64_t(block.row) * p.tokens + token) * p.query_heads + query_head) * v_dim;
#pragma unroll
    for (int c = 0; c < kColumnTiles; ++c) {
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        const int d = (c * kAcross + across) * 4 + x;
        if (d >= v_dim) continue;
        if (partial) partial[d] = out[i][c][x];
        else store_as(p.out, p.q.dtype, place + d, end.factor == 0 ? 0.0f : out[i][c][x] * end.factor);
      }
    }
  }
}

template <class T>
int launch_general(const AttentionParams& p, const PrefillTiles& tiles, Stream stream) {
  return KVCACHE_LAUNCH(prefill_attention_plain<T>, prefill_blocks(p, tiles), kThreads, tiles.shared_bytes, stream, p,
                        tiles);
}

}  // namespace

int prefill_attention_general(const AttentionParams& p, const PrefillTiles& tiles, Stream stream) {
  switch (p.view.dtype) {
    case DType::kFloat32:
      return launch_general<float>(p, tiles, stream);
    case DType::kBFloat16:
      return launch_general<bf16>(p, tiles, stream);
    default:
      return launch_general<f16>(p, tiles, stream);
  }
}

}  // namespace kvcache::cuda
