// Pass 1 without tensor cores: any storage type, query type, head size and group.
//
// A tile of keys is widened to float in shared memory; then a lane owns a key and multiplies it with four query heads at
// once, so that a word read from shared memory serves four products. The softmax parts come from a second look at the
// logits, which are then still in the L1 or L2.
#include "selection_scores.cuh"

namespace kvcache::cuda {
namespace {

constexpr int kThreads = 128, kQuad = 4;
constexpr int kHeads = 16;  // query heads whose vectors lie in shared memory at a time

template <class T>
struct alignas(4 * sizeof(T)) Four {
  T x[4];
};

// Within the 99 KB of shared memory that sm_86, 89 and 120 offer; page_scores has vectors of up to 512.
__host__ __device__ constexpr int tile_keys(int dim) { return dim <= 256 ? 64 : 32; }
// Floats from one vector to the next: whole quads, and lanes that read at this distance meet different banks.
__host__ __device__ constexpr int vector_line(int dim) { return (dim + 3) / 4 * 4 + 4; }

inline int64_t shared_bytes(int dim) {
  return int64_t(tile_keys(dim) + kHeads) * vector_line(dim) * 4 + tile_keys(dim) * 9;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 3) logits_general_kernel(LogitsParams p, bool quads) {
  KVCACHE_DYNAMIC_SHARED(float, shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  wait_for_dependencies();

  const BlockPlace at = place_of_block(p);
  if (p.skips(at.row)) return;
  const Places places = places_of(p, at.row, at.head);
  const int64_t begin = at.piece * p.plan.piece;
  if (begin >= places.n) return;
  const int64_t end = begin + p.plan.piece < places.n ? begin + p.plan.piece : places.n;

  const int count = tile_keys(p.dim), line = vector_line(p.dim), width = line - 4;
  float* keys = shared;                                                    // [count, line]
  float* queries = keys + count * line;                                    // [kHeads, line]
  int64_t* entries = reinterpret_cast<int64_t*>(queries + kHeads * line);  // [count]; -1: none
  bool* candidates = reinterpret_cast<bool*>(entries + count);             // [count]
  const int64_t first_line = at.item * p.group;
  const T* pool = static_cast<const T*>(p.pool);

  auto load_queries = [&](int first) {
    for (int i = threadIdx.x; i < kHeads * width; i += kThreads) {
      const int g = first + i / width, d = i % width;
      queries[i / width * line + d] =
          g < p.group && d < p.dim ? query_element(p, at.row, at.head * p.group + g, d) : 0.0f;
    }
  };
  load_queries(0);

  for (int64_t tile = begin; tile < end; tile += count) {
    __syncthreads();  // the tile before has been read
    if (int(threadIdx.x) < count) {
      const int64_t place = tile + threadIdx.x, slot = place < end ? places.slot(place) : -1;
      entries[threadIdx.x] = slot >= 0 ? places.entry(slot) : -1;
      candidates[threadIdx.x] = places.candidate(slot);
    }
    __syncthreads();
    if (quads) {
#pragma unroll 4
      for (int i = threadIdx.x; i < count * (width / 4); i += kThreads) {
        const int key = i / (width / 4), d = i % (width / 4) * 4;
        Four<T> from{};
        if (entries[key] >= 0) from = *reinterpret_cast<const Four<T>*>(pool + entries[key] * p.dim + d);
        *reinterpret_cast<float4*>(keys + key * line + d) =
            make_float4(to_float(from.x[0]), to_float(from.x[1]), to_float(from.x[2]), to_float(from.x[3]));
      }
    } else {
#pragma unroll 4
      for (int i = threadIdx.x; i < count * width; i += kThreads) {
        const int key = i / width, d = i % width;
        keys[key * line + d] = entries[key] >= 0 && d < p.dim ? to_float(pool[entries[key] * p.dim + d]) : 0.0f;
      }
    }
    for (int first = 0; first < p.group; first += kHeads) {
      if (p.group > kHeads) {
        __syncthreads();  // the heads before have been read
        load_queries(first);
      }
      __syncthreads();
      const int heads = p.group - first < kHeads ? p.group - first : kHeads, halves = count / 32;
      for (int unit = warp; unit < (heads + kQuad - 1) / kQuad * halves; unit += kThreads / 32) {
        const int key = unit % halves * 32 + lane, g = unit / halves * kQuad;
        const float *k = keys + key * line, *q = queries + g * line;
        float sum[kQuad] = {};
        for (int d = 0; d < width; d += 4) {
          const float4 a = *reinterpret_cast<const float4*>(k + d);
#pragma unroll
          for (int h = 0; h < kQuad; ++h) {
            const float4 b = *reinterpret_cast<const float4*>(q + h * line + d);
            sum[h] += a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
          }
        }
#pragma unroll
        for (int h = 0; h < kQuad; ++h) {
          const int64_t place = tile + key;
          if (g + h < heads && place < p.plan.stride && place < begin + p.plan.piece) {
            p.logits[(first_line + first + g + h) * p.plan.stride + place] =
                candidates[key] ? sum[h] * p.scale : kNegInf;
          }
        }
      }
    }
  }
  launch_dependents();
  if (!p.soft) return;
  __syncthreads();
  write_parts(p, first_line, at.piece, begin, end);
}

}  // namespace

int logits_general(const LogitsParams& p, Stream stream) {
  const int64_t blocks = int64_t(p.rows) * p.heads * p.plan.pieces, shared = shared_bytes(p.dim);
  const int64_t element = p.dtype == DType::kFloat32 ? 4 : 2;
  const bool quads = p.dim % 4 == 0 && reinterpret_cast<uintptr_t>(p.pool) % (4 * element) == 0;
  switch (p.dtype) {
    case DType::kFloat32:
      return KVCACHE_LAUNCH_DEPENDENT(logits_general_kernel<float>, blocks, kThreads, shared, stream, p, quads);
    case DType::kBFloat16:
      return KVCACHE_LAUNCH_DEPENDENT(logits_general_kernel<bf16>, blocks, kThreads, shared, stream, p, quads);
    default:
      return KVCACHE_LAUNCH_DEPENDENT(logits_general_kernel<f16>, blocks, kThreads, shared, stream, p, quads);
  }
}

}  // namespace kvcache::cuda
