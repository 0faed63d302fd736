// Second pass of decode attention: merges the partial results of items that several workers shared, and finishes their
// statistics. Block w does what its worker w left: a slice of the output of each shared item (there are two at most), and
// the statistics of the entries that the worker read.
#include "decode_statistics.cuh"
#include "ptx/dependent_launch.cuh"

namespace kvcache::cuda {
namespace {

constexpr int kWarps = 8;

// Online merge of partial sums of one channel.
struct Merged {
  float peak = -kInfinity, mass = 0.0f, sum = 0.0f;
  bool seen = false;

  __device__ __forceinline__ void add(float other_peak, float other_mass, float other_sum) {
    if (other_mass < 0.0f) return;
    seen = true;
    if (other_peak == -kInfinity) return;  // only entries of weight zero
    const float top = fmaxf(peak, other_peak), mine = exp2f(peak - top), theirs = exp2f(other_peak - top);
    mass = mass * mine + other_mass * theirs;
    sum = sum * mine + other_sum * theirs;
    peak = top;
  }
  __device__ __forceinline__ float state() const { return seen ? mass : -1.0f; }
};

// Where the i-th of the workers that share an item left its part.
__device__ __forceinline__ int64_t partial_of(int from, int i) { return 2 * int64_t(from + i) + (i == 0 ? 1 : 0); }

__device__ __forceinline__ void store_out(const AttentionParams& p, int64_t at, float value) {
  if (p.q.dtype == DType::kFloat32) static_cast<float*>(p.out)[at] = value;
  else if (p.q.dtype == DType::kBFloat16) static_cast<bf16*>(p.out)[at] = from_float<bf16>(value);
  else static_cast<f16*>(p.out)[at] = from_float<f16>(value);
}

// Channels of all heads in pieces of 32; the sharing workers' blocks take turns. A warp merges every eighth part.
__device__ void combine_outputs(const DecodeLaunch& d, int row, int head, int from, int sharing, int turn,
                                float4* merged) {
  const AttentionParams& p = d.p;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, dim = p.view.v_dim;
  const int64_t channels = int64_t(d.group) * dim;
  for (int64_t base = turn * 32; base < channels; base += int64_t(sharing) * 32) {
    const int64_t channel = base + lane;
    const int h = int(min(channel, channels - 1) / dim);
    Merged mine;
#pragma unroll 4
    for (int i = warp; i < sharing; i += kWarps) {
      const int64_t part = partial_of(from, i);
      const float2 state = d.partial_state[part * d.group + h];
      const float sum = channel < channels ? d.partial_out[part * channels + channel] : 0.0f;
      mine.add(state.x, state.y, sum);
    }
    merged[warp * 32 + lane] = make_float4(mine.peak, mine.state(), mine.sum, 0.0f);
    __syncthreads();
    if (warp == 0 && channel < channels) {
      Merged all;
      for (int i = 0; i < kWarps; ++i) {
        const float4 part = merged[i * 32 + lane];
        all.add(part.x, part.y, part.z);
      }
      const int64_t query_head = int64_t(head) * d.group + h;
      const HeadEnd end = end_head(p, int(query_head), all.peak, all.state());
      store_out(p, (int64_t(row) * p.query_heads + query_head) * dim + channel - int64_t(h) * dim,
                all.sum * end.factor);
      if (channel == int64_t(h) * dim) p.lse[int64_t(row) * p.query_heads + query_head] = end.level * kLn2;
    }
    __syncthreads();
  }
}

// Log-sum-exp in base 2 of every head of the item: [group].
__device__ void combine_levels(const DecodeLaunch& d, int head, int from, int sharing, float* levels) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int h = warp; h < d.group; h += kWarps) {
    Merged mine;
    for (int i = lane; i < sharing; i += 32) {
      const float2 state = d.partial_state[partial_of(from, i) * d.group + h];
      mine.add(state.x, state.y, 0.0f);
    }
    for (int distance = 16; distance > 0; distance /= 2) {
      const float peak = __shfl_xor_sync(kFullWarp, mine.peak, distance);
      const float mass = __shfl_xor_sync(kFullWarp, mine.state(), distance);
      mine.add(peak, mass, 0.0f);
    }
    if (lane == 0) levels[h] = end_head(d.p, head * d.group + h, mine.peak, mine.state()).level;
  }
}

__global__ void __launch_bounds__(kWarps * 32) decode_combine_kernel(const __grid_constant__ DecodeLaunch d) {
  __shared__ float4 merged[kWarps * 32];
  KVCACHE_DYNAMIC_SHARED(float, levels);  // [group], for the statistics
  wait_for_dependencies();
  launch_dependents();
  const int worker = blockIdx.x;
  if (d.plan->head.items != d.p.view.rows * d.p.view.heads) return;
  const DecodeShare share = d.plan->shares[worker];
  if (share.empty()) return;
  for (int item = share.first;; item = share.last) {
    const RowHead at = row_head(d.p.view, item);
    // Which places the piece covers matters to the statistics only: its length is not asked for otherwise.
    const Lengths now = d.weights ? lengths_of(d.p, item, at.row, at.head) : Lengths{0, 0};
    const DecodePiece piece = decode_piece(share, worker, item, d.plan->head.unit, now.places);
    if (!piece.whole()) {
      const int sharing = piece.to - piece.from + 1;
      combine_outputs(d, at.row, at.head, piece.from, sharing, worker - piece.from, merged);
      if (d.weights) {
        combine_levels(d, at.head, piece.from, sharing, levels);
        __syncthreads();
        add_statistics(d, item, at.row, at.head, piece.begin, piece.end, now.count, [&](int h) { return levels[h]; });
        __syncthreads();
      }
    }
    if (item == share.last) break;
  }
}

}  // namespace

int decode_combine(const DecodeLaunch& d, void* stream) {
  return KVCACHE_LAUNCH_DEPENDENT(decode_combine_kernel, d.workers, kWarps * 32,
                                  d.weights ? d.group * sizeof(float) : 0, stream, d);
}

}  // namespace kvcache::cuda
