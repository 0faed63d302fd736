// Column sums without tensor cores: any storage, any head size up to 256, queries of another dtype. Laid out as the
// tensor-core kernel, with floats in shared memory; a thread owns 4 entries by 2 queries of the products.
#include "column_sums.cuh"
#include "ptx/dependent_launch.cuh"

namespace kvcache::cuda {
namespace {

constexpr int kEntries = 32, kQueries = 32, kThreads = 128;
// Blocks per multiprocessor: 128 registers do without spills on sm_90 only (make kernel-report).
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr int kBlocks = 4;
#else
constexpr int kBlocks = 3;
#endif
constexpr int kAcross = 16;  // threads beside each other: queries across, across + 16

struct Memory {  // column_tiles in core/prefill_tiles.h adds this up
  int width;
  float *keys, *queries;  // [32][width]
  Reach* scan;            // [2][32]
  int32_t *last, *start;  // [kQueries]
  float* level;           // [kQueries]
  int32_t* position;      // [kEntries]

  __device__ Memory(float* memory, int dim) {
    width = ((dim + 3) & ~3) + 4;
    keys = memory;
    queries = keys + kEntries * width;
    scan = reinterpret_cast<Reach*>(queries + kQueries * width);
    last = reinterpret_cast<int32_t*>(scan + 2 * 32);
    start = last + kQueries;
    level = reinterpret_cast<float*>(start + kQueries);
    position = reinterpret_cast<int32_t*>(level + kQueries);
  }
};

template <class T>
__device__ __forceinline__ void load_entries(const AttentionParams& p, const ColumnBlock& block, const Memory& memory) {
  const PagedView& view = p.view;
  const int lane = threadIdx.x % 32, dim = view.k_dim;
  for (int m = threadIdx.x / 32; m < kEntries; m += kThreads / 32) {
    const int slot = block.first + m;
    const bool alive = m < block.entries;
    const T* line = static_cast<const T*>(view.k_pages);
    if (alive) {
      const int page = slot / view.page_size;
      const int64_t id = view.table[block.item * view.table_width + page];
      line += (id * view.page_size + slot - page * view.page_size) * dim;
    }
    for (int d = lane; d < memory.width - 4; d += 32) {
      memory.keys[m * memory.width + d] = alive && d < dim ? to_float(line[d]) : 0.0f;
    }
    if (lane == 0) memory.position[m] = alive ? view.positions[block.item * view.capacity + slot] : kNowhere;
  }
}

__device__ __forceinline__ void load_queries(const ColumnSumsParams& sums, const ColumnBlock& block,
                                             const QueryRange& range, int tile, int query_head, const Memory& memory) {
  const AttentionParams& p = sums.attention;
  const int lane = threadIdx.x % 32;
  for (int i = threadIdx.x / 32; i < kQueries; i += kThreads / 32) {
    const int token = tile * kQueries + i;
    const ColumnQuery query = column_query(sums, range, block.row, query_head, token);
    const bool real = query.level != kInfinity;  // padding may hold anything
    const int64_t offset = real ? block.row * p.q.stride[0] + query_head * p.q.stride[1] + token * p.q.stride[2] : 0;
    for (int d = lane; d < memory.width - 4; d += 32) {
      memory.queries[i * memory.width + d] =
          real && d < p.view.k_dim ? load_as_float(p.q.data, p.q.dtype, offset + d) : 0.0f;
    }
    if (lane == 0) memory.last[i] = query.last, memory.start[i] = query.start, memory.level[i] = query.level;
  }
}

__device__ __forceinline__ float weight(const AttentionParams& p, const ColumnBlock& block, const Memory& memory, int m,
                                        int i, int token, int query_head, float product) {
  const int position = memory.position[m];
  const float level = memory.level[i];
  if (m >= block.entries || level == kInfinity || position > memory.last[i] || position < memory.start[i]) return 0;
  const int slot = block.first + m;
  if (p.mask) {
    const int64_t line = int64_t(block.row) * p.mask_heads + (p.mask_heads == 1 ? 0 : block.head);
    if (!p.mask[(line * p.tokens + token) * p.view.capacity + slot]) return 0;
  }
  float x = product * p.scale;
  if (p.softcap > 0) x = tanhf(x / p.softcap) * p.softcap;
  if (p.bias) {
    const int head = shared_head(p.bias_heads, p, block.head, query_head);
    x += p.bias[(int64_t(block.row) * p.bias_heads + head) * p.view.capacity + slot];
  }
  return exp2f(fmaf(x, kLog2E, -level));
}

__device__ __forceinline__ float dot4(float4 a, float4 b, float sum) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks) column_sums_plain(ColumnSumsParams sums, ColumnTiles tiles) {
  KVCACHE_DYNAMIC_SHARED(float, shared);
  const AttentionParams& p = sums.attention;
  const Memory memory(shared, p.view.k_dim);
  const ColumnBlock block = column_block(sums, tiles);
  const QueryRange range = query_range(sums, tiles, block.row);
  if (block.entries <= 0 || block.piece >= range.pieces) {  // add_pieces reads neither
    const int m = threadIdx.x;
    if (tiles.splits == 1 && m < kEntries && block.first + m < p.view.capacity) sums_of(sums, tiles, block)[m] = 0;
    return;
  }
  load_entries<T>(p, block, memory);
  __syncthreads();
  const int lane = threadIdx.x % 32;
  const bool alive = lane < block.entries;
  const Bounds bounds{warp_min(memory.position[lane]), warp_max(alive ? memory.position[lane] : INT32_MIN)};

  const int down = threadIdx.x / kAcross * 4, across = threadIdx.x % kAcross;  // first entry
  const int per_piece = (range.tiles - range.first_tile + range.pieces - 1) / range.pieces;
  const int first_tile = range.first_tile + block.piece * per_piece;
  QueryScan<kQueries, kThreads> scan(memory.scan, first_tile, min(first_tile + per_piece, range.tiles));
  float total[4] = {};
  for (int tile; (tile = scan.pull(p, range, block.row, bounds)) >= 0;) {
    float top[4][2] = {};
    for (int g = 0; g < block.group; ++g) {
      const int query_head = block.head * block.group + g;
      load_queries(sums, block, range, tile, query_head, memory);
      __syncthreads();
      float products[4][2] = {};
      for (int d = 0; d < p.view.k_dim; d += 4) {
        float4 query[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          query[j] = *reinterpret_cast<const float4*>(memory.queries + (across + j * kAcross) * memory.width + d);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float4 key = *reinterpret_cast<const float4*>(memory.keys + (down + i) * memory.width + d);
          products[i][0] = dot4(key, query[0], products[i][0]);
          products[i][1] = dot4(key, query[1], products[i][1]);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int query = across + j * kAcross;
          const float x =
              weight(p, block, memory, down + i, query, tile * kQueries + query, query_head, products[i][j]);
          if (sums.reduce_max) top[i][j] = fmaxf(top[i][j], x);
          else total[i] += x;
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) total[i] += top[i][0] + top[i][1];
  }
  launch_dependents();

  float* target = sums_of(sums, tiles, block);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int distance = 1; distance < kAcross; distance *= 2) {
      total[i] += __shfl_xor_sync(kFullWarp, total[i], distance);
    }
    const int m = down + i;
    if (across == 0 && block.first + m < p.view.capacity) {
      target[m] = m >= block.entries ? 0.0f : sums.reduce_max ? total[i] : total[i] / block.group;
    }
  }
}

template <class T>
int launch_columns(const ColumnSumsParams& sums, const ColumnTiles& tiles, Stream stream) {
  return KVCACHE_LAUNCH(column_sums_plain<T>, column_blocks(sums, tiles), kThreads, tiles.shared_bytes, stream, sums,
                        tiles);
}

}  // namespace

int column_sums_general(const ColumnSumsParams& sums, const ColumnTiles& tiles, Stream stream) {
  switch (sums.attention.view.dtype) {
    case DType::kFloat32:
      return launch_columns<float>(sums, tiles, stream);
    case DType::kBFloat16:
      return launch_columns<bf16>(sums, tiles, stream);
    default:
      return launch_columns<f16>(sums, tiles, stream);
  }
}

}  // namespace kvcache::cuda
