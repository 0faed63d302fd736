// Latent attention without tensor cores, for all that latent_attention_mma.cu does not take: float32 storage, odd widths,
// queries of another type, misaligned memory. All arithmetic is in float.
//
// Logits: two lanes for each of the 16 entries, each with every other channel. Sums: a lane has every 32nd channel.
#include "latent_attention.cuh"

namespace kvcache::cuda {
namespace {

// kOfWarp: query rows that a warp computes from the same entries.
template <class T, int kOfWarp>
class LatentPlainCore {
 public:
  using Row = int64_t;
  static constexpr bool kShared = true;
  static constexpr int kHeads = kOfWarp * kSharedWarps;
  static constexpr int kThreads = 32 * kSharedWarps, kBlocks = 1;
  static constexpr int kChannels = 512 / 32;  // of a lane

  // Bytes from row to row: 16 more than a multiple of 128, so that neighbouring entries lie in different banks.
  __host__ __device__ static int stride_of(int width) { return (width * int(sizeof(T)) + 127) / 128 * 128 + 16; }
  __host__ __device__ static int64_t part_bytes(const DecodeLaunch& d) {
    return kPart * int64_t(stride_of(latent(d).latent) + stride_of(latent(d).rope));
  }
  // Weights [warps, 16 entries, kOfWarp], queries [rows, latent | rope].
  static constexpr int64_t kWeightBytes = int64_t(kSharedWarps) * kPart * kOfWarp * sizeof(float);
  __host__ __device__ static int64_t work_bytes(const DecodeLaunch& d, int) {
    const int64_t rows = d.group < kHeads ? d.group : kHeads;
    return kWeightBytes + rows * (latent(d).latent + latent(d).rope) * sizeof(float);
  }
  __device__ static bool clear_ring(const DecodeLaunch&) { return false; }

  __device__ LatentPlainCore(const DecodeLaunch& d, unsigned char* work, int warp, int lane)
      : weights_(reinterpret_cast<float*>(work) + warp * kPart * kOfWarp),
        queries_(reinterpret_cast<float*>(work + kWeightBytes)),
        warp_(warp),
        lane_(lane),
        rows_(0) {
    for (int i = lane; i < kPart * kOfWarp; i += 32) weights_[i] = 0.0f;  // those of rows that do not exist are read
    (void)d;
  }

  __device__ __forceinline__ void copy(const DecodeLaunch& d, unsigned char* part, int64_t row,
                                       uint32_t visible) const {
    switch (d.grain) {
      case 16:
        return copy_as<16>(d, part, row, visible);
      case 8:
        return copy_as<8>(d, part, row, visible);
      case 4:
        return copy_as<4>(d, part, row, visible);
      default:
        return copy_as<2>(d, part, row, visible);
    }
  }

  // Called by the whole block.
  __device__ void load_queries(const DecodeLaunch& d, const DecodeItem& at) {
    const LatentLaunch& l = latent(d);
    rows_ = (at.heads - warp_ + kSharedWarps - 1) / kSharedWarps;
    const int dim = l.latent + l.rope;
    for (int i = threadIdx.x; i < at.heads * dim; i += blockDim.x) {
      const int h = i / dim, c = i - h * dim;
      const LatentQuery query(l, at, h);
      const void* data = c < l.latent ? d.p.q.data : l.q_rope.data;
      const int64_t from = c < l.latent ? query.latent + c : query.rope + c - l.latent;
      queries_[i] = load_as_float(data, d.p.q.dtype, from);
    }
  }

  __device__ __forceinline__ void reset() {
    seen_ = false;
#pragma unroll
    for (int i = 0; i < kOfWarp; ++i) {
      peak_[i] = -kInfinity, mass_[i] = 0.0f;
#pragma unroll
      for (int j = 0; j < kChannels; ++j) sums_[i][j] = 0.0f;
    }
  }

  // 16 entries in shared memory; `place` is that of the first.
  __device__ __forceinline__ void step(const DecodeLaunch& d, const DecodeItem& at, const unsigned char* part,
                                       const PartNote& note, int place) {
    const int entry = lane_ / 2;
    const bool shown = note.visible >> entry & 1u, stores = d.weights && lane_ % 2 == 0 && place + entry < d.places;
    float* kept = stores ? static_cast<float*>(d.weights) +
                               (int64_t(at.item) * d.places + place + entry) * d.weight_heads + at.first_head
                         : nullptr;
    if (note.visible == 0) {
      for (int i = 0; kept && i < rows_; ++i) kept[row_of(i)] = -kInfinity;
      return;
    }
    seen_ = true;
    float logits[kOfWarp];
    dot(latent(d), part, logits);
    __syncwarp();  // the weights before these have been read
#pragma unroll
    for (int i = 0; i < kOfWarp; ++i) {
      if (i >= rows_) break;
      float x = logits[i] + __shfl_xor_sync(kFullWarp, logits[i], 1);
      x = shown ? latent_logit(latent(d), at, at.first_head + row_of(i), note.slots[entry], x) : -kInfinity;
      if (kept) kept[row_of(i)] = x;
      float top = x;
#pragma unroll
      for (int distance = 2; distance < 32; distance *= 2) top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, distance));
      const float peak = fmaxf(peak_[i], top), level = peak == -kInfinity ? 0.0f : peak;
      const float shrink = fast_exp2(peak_[i] - level), weight = fast_exp2(x - level);
      peak_[i] = peak;
      mass_[i] = mass_[i] * shrink + weight;
      if (shrink != 1.0f) {
#pragma unroll
        for (int j = 0; j < kChannels; ++j) sums_[i][j] *= shrink;
      }
      if (lane_ % 2 == 0) weights_[entry * kOfWarp + i] = weight;
    }
    __syncwarp();
    add(latent(d), part);
  }

  __device__ __forceinline__ void leave_state(const DecodeItem&, float* peaks, float* masses) {
#pragma unroll
    for (int i = 0; i < kOfWarp; ++i) {
      if (i >= rows_) break;
      float mass = mass_[i];
#pragma unroll
      for (int distance = 2; distance < 32; distance *= 2) mass += __shfl_xor_sync(kFullWarp, mass, distance);
      if (lane_ == 0) {
        peaks[row_of(i)] = peak_[i];
        masses[row_of(i)] = seen_ ? mass : -1.0f;
      }
    }
  }

  __device__ __forceinline__ void finish(const DecodeLaunch& d, const DecodeItem& at, const float* factors) {
#pragma unroll
    for (int i = 0; i < kOfWarp; ++i) {
      if (i >= rows_) break;
      const DecodeTarget target(d, at, row_of(i));
      const float factor = factors[row_of(i)];
#pragma unroll
      for (int j = 0; j < kChannels; ++j) {
        const int v = lane_ + j * 32;
        if (v >= latent(d).latent) break;
        if (target.partial) target.partial[v] = sums_[i][j] * factor;
        else store_out(d.p, target.offset + v, sums_[i][j] * factor);
      }
    }
  }

 private:
  __device__ __forceinline__ int row_of(int i) const { return i * kSharedWarps + warp_; }

  template <int kGrain>
  __device__ __forceinline__ void copy_as(const DecodeLaunch& d, unsigned char* part, int64_t row,
                                          uint32_t visible) const {
    char* to = reinterpret_cast<char*>(part);
    const int k_stride = stride_of(latent(d).latent);
    copy_rows<kGrain>(to, k_stride, d.p.view.k_pages, d.k_pieces, row, visible, lane_);
    copy_rows<kGrain>(to + kPart * k_stride, stride_of(latent(d).rope), d.p.view.v_pages, d.v_pieces, row, visible,
                      lane_);
  }

  // This lane's half of the products with entry lane / 2.
  __device__ __forceinline__ void dot(const LatentLaunch& d, const unsigned char* part,
                                      float (&logits)[kOfWarp]) const {
#pragma unroll
    for (int i = 0; i < kOfWarp; ++i) logits[i] = 0.0f;
    const int k_stride = stride_of(d.latent), dim = d.latent + d.rope;
    const auto add_products = [&](const unsigned char* from, const float* queries, int width) {
      const T* row = reinterpret_cast<const T*>(from);
#pragma unroll 4
      for (int c = lane_ % 2; c < width; c += 2) {
        const float x = to_float(row[c]);
#pragma unroll
        for (int i = 0; i < kOfWarp; ++i) {
          if (i >= rows_) break;
          logits[i] += x * queries[row_of(i) * dim + c];
        }
      }
    };
    add_products(part + lane_ / 2 * k_stride, queries_, d.latent);
    add_products(part + kPart * k_stride + lane_ / 2 * stride_of(d.rope), queries_ + d.latent, d.rope);
  }

  __device__ __forceinline__ void add(const LatentLaunch& d, const unsigned char* part) {
    const int k_stride = stride_of(d.latent);
    for (int entry = 0; entry < kPart; ++entry) {
      const T* row = reinterpret_cast<const T*>(part + entry * k_stride);
      float weights[kOfWarp];
#pragma unroll
      for (int i = 0; i < kOfWarp; ++i) weights[i] = weights_[entry * kOfWarp + i];
#pragma unroll
      for (int j = 0; j < kChannels; ++j) {
        const int c = lane_ + j * 32;
        if (c >= d.latent) break;
        const float x = to_float(row[c]);
#pragma unroll
        for (int i = 0; i < kOfWarp; ++i) sums_[i][j] += weights[i] * x;
      }
    }
  }

  float* const weights_;  // [16, kOfWarp]
  float* const queries_;  // [rows, latent | rope]
  const int warp_, lane_;
  int rows_;   // of this warp
  bool seen_;  // an entry
  float peak_[kOfWarp], mass_[kOfWarp];
  float sums_[kOfWarp][kChannels];
};

template <class T, int kOfWarp>
__global__ void __launch_bounds__((LatentPlainCore<T, kOfWarp>::kThreads), (LatentPlainCore<T, kOfWarp>::kBlocks))
    latent_plain_kernel(const __grid_constant__ LatentLaunch d) {
  KVCACHE_DYNAMIC_SHARED(unsigned char, shared);
  decode_worker<LatentPlainCore<T, kOfWarp>>(d, shared);
}

template <class T>
DecodeNeeds needs_of(const LatentLaunch& d, bool few, int64_t limit) {
  return few ? decode_needs<LatentPlainCore<T, 1>>(d, limit) : decode_needs<LatentPlainCore<T, 4>>(d, limit);
}

template <class T>
int launch_of(const LatentLaunch& d, bool few, int64_t shared_bytes, void* stream) {
  constexpr int kThreads = kSharedWarps * 32;
  return few ? KVCACHE_LAUNCH_DEPENDENT((latent_plain_kernel<T, 1>), d.workers, kThreads, shared_bytes, stream, d)
             : KVCACHE_LAUNCH_DEPENDENT((latent_plain_kernel<T, 4>), d.workers, kThreads, shared_bytes, stream, d);
}

}  // namespace

DecodeNeeds latent_needs_plain(const LatentLaunch& d, bool few, int64_t limit) {
  if (d.p.view.dtype == DType::kFloat32) return needs_of<float>(d, few, limit);
  if (d.p.view.dtype == DType::kBFloat16) return needs_of<bf16>(d, few, limit);
  return needs_of<f16>(d, few, limit);
}

int latent_on_plain(const LatentLaunch& d, bool few, int64_t shared_bytes, void* stream) {
  if (d.p.view.dtype == DType::kFloat32) return launch_of<float>(d, few, shared_bytes, stream);
  if (d.p.view.dtype == DType::kBFloat16) return launch_of<bf16>(d, few, shared_bytes, stream);
  return launch_of<f16>(d, few, shared_bytes, stream);
}

}  // namespace kvcache::cuda
