// Latent attention on tensor cores, for 16-bit storage and queries of the same type: the computing side, as decode_mma.cuh
// does it, with one array for keys and values.
//   logits^T [16 entries x 8 rows] += [latents | ropes] [16 x 16 channels] . queries^T [16 x 8]
//   sums^T [16 channels x 8 rows] += latents^T [16 channels x 16 entries] . weights^T [16 x 8]
// 8 warps have 8 query rows each. Where there are fewer rows, several warps share 8 of them: each computes their logits and
// sums its slice of the channels.
#include "latent_attention.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/mma.cuh"
#include "ptx/movmatrix.cuh"

namespace kvcache::cuda {
namespace {

template <class T>
class LatentMmaCore {
 public:
  using Row = uint32_t;
  static constexpr bool kShared = true;
  static constexpr int kHeads = 8 * kSharedWarps;
  static constexpr int kThreads = 32 * kSharedWarps, kBlocks = 1;
  static constexpr int kSteps = 512 / 16;  // of 16 channels

  // Bytes from row to row in shared memory, an odd number of 16: the 8 rows of an ldmatrix lie in different banks.
  __host__ __device__ static int stride_of(const DecodeLaunch& d) {
    return 2 * (latent(d).latent + latent(d).rope) + 16;
  }
  __host__ __device__ static int64_t part_bytes(const DecodeLaunch& d) { return kPart * int64_t(stride_of(d)); }
  // Queries [rows, latent | rope].
  __host__ __device__ static int64_t work_bytes(const DecodeLaunch& d, int) {
    return int64_t((d.group < kHeads ? d.group : kHeads) + 7) / 8 * 8 * stride_of(d);
  }
  __device__ static bool clear_ring(const DecodeLaunch&) { return false; }

  __device__ LatentMmaCore(const DecodeLaunch& d, unsigned char* work, int warp, int lane)
      : work_(work), warp_(warp), lane_(lane), stride_(stride_of(d)), tile_(0), has_(false), first_(0), steps_(0) {}

  __device__ __forceinline__ void copy(const DecodeLaunch& d, unsigned char* part, uint32_t row,
                                       uint32_t visible) const {
    char* to = reinterpret_cast<char*>(part);
    copy_rows<16>(to, stride_, d.p.view.k_pages, d.k_pieces, row, visible, lane_);
    copy_rows<16>(to + 2 * latent(d).latent, stride_, d.p.view.v_pages, d.v_pieces, row, visible, lane_);
  }

  // Called by the whole block. Rows beyond the queries are zeros.
  __device__ void load_queries(const DecodeLaunch& d, const DecodeItem& at) {
    const LatentLaunch& l = latent(d);
    const int tiles = (at.heads + 7) / 8, steps = l.latent / 16;
    int slices = kSharedWarps;  // that the channels are divided into
    while (slices > 1 && kSharedWarps / slices < tiles) slices /= 2;
    const int sharing = kSharedWarps / slices, share = (steps + slices - 1) / slices;
    tile_ = warp_ % sharing;
    has_ = tile_ < tiles;
    first_ = min(warp_ / sharing * share, steps);
    steps_ = min(share, steps - first_);
    const int of_latent = l.latent / 8, pieces = of_latent + l.rope / 8;
    for (int i = threadIdx.x; i < tiles * 8 * pieces; i += blockDim.x) {
      const int h = i / pieces, c = i - h * pieces;
      uint4 values = make_uint4(0, 0, 0, 0);
      if (h < at.heads) {
        const LatentQuery query(l, at, h);
        const T* from = c < of_latent ? static_cast<const T*>(d.p.q.data) + query.latent + c * 8
                                      : static_cast<const T*>(l.q_rope.data) + query.rope + (c - of_latent) * 8;
        values = load_eight(from, d.aligned_q);
      }
      *reinterpret_cast<uint4*>(work_ + h * stride_ + c * 16) = values;
    }
  }

  __device__ __forceinline__ void reset() {
    seen_ = false;
#pragma unroll
    for (int j = 0; j < 2; ++j) peak_[j] = -kInfinity, mass_[j] = 0.0f;
#pragma unroll
    for (int m = 0; m < kSteps; ++m) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sums_[m][j] = 0.0f;
    }
  }

  // 16 entries in shared memory; `place` is that of the first.
  __device__ __forceinline__ void step(const DecodeLaunch& d, const DecodeItem& at, const unsigned char* part,
                                       const PartNote& note, int place) {
    if (!has_) return;
    if (note.visible == 0) {
      if (d.weights && first_ == 0)
        store_pair(d, at, place + lane_ / 4, 0u), store_pair(d, at, place + lane_ / 4 + 8, 0u);
      return;
    }
    seen_ = true;
    float logits[4];  // entries g, g and g + 8, g + 8; rows 2t, 2t + 1 alternating
    dot(d, part, logits);
    float tops[2];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int entry = lane_ / 4 + j / 2 * 8;
      const bool shown = note.visible >> entry & 1u;
      logits[j] =
          shown ? latent_logit(latent(d), at, at.first_head + row() + j % 2, note.slots[entry], logits[j]) : -kInfinity;
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float top = fmaxf(logits[j], logits[2 + j]);
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2) top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, distance));
      tops[j] = top;
    }
    if (d.weights && first_ == 0) {
      const int power[2] = {weight_power(tops[0]), weight_power(tops[1])};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int entry = lane_ / 4 + i * 8;
        const float lo = half_weight(logits[2 * i], power[0]), hi = half_weight(logits[2 * i + 1], power[1]);
        store_pair(d, at, place + entry, pack2<f16>(lo, hi) | power_bits(power[0], power[1], entry));
      }
    }
    uint32_t weights[2];
    update_softmax(tops, logits, weights);
    add(part, weights);
  }

  __device__ __forceinline__ void leave_state(const DecodeItem& at, float* peaks, float* masses) {
    if (!has_) return;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float mass = mass_[j];
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2) mass += __shfl_xor_sync(kFullWarp, mass, distance);
      const int h = row() + j;
      if (lane_ < 4 && h < at.heads && first_ == 0) {
        peaks[h] = peak_[j];
        masses[h] = seen_ ? mass : -1.0f;
      }
    }
  }

  __device__ __forceinline__ void finish(const DecodeLaunch& d, const DecodeItem& at, const float* factors) {
    if (!has_) return;
    const int h = row();
    const bool both = h + 1 < at.heads;
    if (h >= at.heads) return;
    const float factor0 = factors[h], factor1 = both ? factors[h + 1] : 0.0f;
    const DecodeTarget target0(d, at, h), target1(d, at, both ? h + 1 : h);
#pragma unroll
    for (int m = 0; m < kSteps; ++m) {
      if (m >= steps_) break;
      const int v = (first_ + m) * 16 + lane_ / 4;
      target0.template store<T>(d, v, sums_[m][0] * factor0);
      target0.template store<T>(d, v + 8, sums_[m][2] * factor0);
      if (!both) continue;
      target1.template store<T>(d, v, sums_[m][1] * factor1);
      target1.template store<T>(d, v + 8, sums_[m][3] * factor1);
    }
  }

 private:
  // The first of the lane's two query rows in the pass.
  __device__ __forceinline__ int row() const { return tile_ * 8 + lane_ % 4 * 2; }

  __device__ __forceinline__ void dot(const DecodeLaunch& d, const unsigned char* part, float (&logits)[4]) const {
    float sums[2][4] = {};  // two chains: an mma waits for the one before it
    const unsigned char* k = part + lane_ % 16 * stride_ + lane_ / 16 * 16;
    const unsigned char* q = work_ + (tile_ * 8 + lane_ % 8) * stride_ + lane_ / 8 % 2 * 16;
    const int steps = (latent(d).latent + latent(d).rope) / 16;
    const auto one = [&](int i, float (&chain)[4]) {
      uint32_t key[4], query[2];
      ldmatrix_x4(key, k + i * 32);
      ldmatrix_x2(query, q + i * 32);
      mma_m16n8k16<T>(chain, key, query[0], query[1]);
    };
    int i = 0;
#pragma unroll 2
    for (; i + 2 <= steps; i += 2) one(i, sums[0]), one(i + 1, sums[1]);
    if (i < steps) one(i, sums[0]);
#pragma unroll
    for (int j = 0; j < 4; ++j) logits[j] = sums[0][j] + sums[1][j];
  }

  // Turns logits into the second operand of the other product, and what has been summed so far with them.
  __device__ __forceinline__ void update_softmax(const float (&tops)[2], float (&logits)[4], uint32_t (&weights)[2]) {
    float shrink[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float peak = fmaxf(peak_[j], tops[j]), level = peak == -kInfinity ? 0.0f : peak;
      shrink[j] = fast_exp2(peak_[j] - level);
      logits[j] = fast_exp2(logits[j] - level);
      logits[2 + j] = fast_exp2(logits[2 + j] - level);
      mass_[j] = mass_[j] * shrink[j] + (logits[j] + logits[2 + j]);
      peak_[j] = peak;
    }
    if (__any_sync(kFullWarp, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
      for (int m = 0; m < kSteps; ++m) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums_[m][j] *= shrink[j % 2];
      }
    }
    weights[0] = transpose_8x8(pack2<T>(logits[0], logits[1]));
    weights[1] = transpose_8x8(pack2<T>(logits[2], logits[3]));
  }

  __device__ __forceinline__ void add(const unsigned char* part, const uint32_t (&weights)[2]) {
    const unsigned char* v = part + (lane_ % 8 + lane_ / 16 * 8) * stride_ + lane_ / 8 % 2 * 16 + first_ * 32;
#pragma unroll
    for (int m = 0; m < kSteps; ++m) {
      if (m >= steps_) break;
      uint32_t value[4];  // transposed 8 x 8 tiles: channels 0 .. 7 and 8 .. 15, then the same for the entries 8 .. 15
      ldmatrix_x4_trans(value, v + m * 32);
      mma_m16n8k16<T>(sums_[m], value, weights[0], weights[1]);
    }
  }

  // Two query rows' halves for one entry: decode_statistics.cuh.
  __device__ __forceinline__ void store_pair(const DecodeLaunch& d, const DecodeItem& at, int place,
                                             uint32_t pair) const {
    const int in_group = at.first_head + row();
    if (place >= d.places || in_group >= d.weight_heads) return;
    static_cast<uint32_t*>(d.weights)[((int64_t(at.item) * d.places + place) * d.weight_heads + in_group) / 2] = pair;
  }

  unsigned char* const work_;
  const int warp_, lane_, stride_;
  int tile_;                 // of 8 query rows
  bool has_, seen_;          // any rows; an entry
  int first_, steps_;        // the warp's slice of the channels, in 16
  float peak_[2], mass_[2];  // mass: of this lane's entries
  float sums_[kSteps][4];    // channels g, g and g + 8, g + 8; rows 2t, 2t + 1 alternating
};

template <class T>
__global__ void __launch_bounds__(LatentMmaCore<T>::kThreads, LatentMmaCore<T>::kBlocks)
    latent_mma_kernel(const __grid_constant__ LatentLaunch d) {
  KVCACHE_DYNAMIC_SHARED(unsigned char, shared);
  decode_worker<LatentMmaCore<T>>(d, shared);
}

template <class T>
int launch_of(const LatentLaunch& d, int64_t shared_bytes, void* stream) {
  return KVCACHE_LAUNCH_DEPENDENT(latent_mma_kernel<T>, d.workers, kSharedWarps * 32, shared_bytes, stream, d);
}

}  // namespace

DecodeNeeds latent_needs_mma(const LatentLaunch& d, int64_t limit) {
  return decode_needs<LatentMmaCore<bf16>>(d, limit);  // the other type is as large
}

int latent_on_mma(const LatentLaunch& d, int64_t shared_bytes, void* stream) {
  return d.p.view.dtype == DType::kBFloat16 ? launch_of<bf16>(d, shared_bytes, stream)
                                            : launch_of<f16>(d, shared_bytes, stream);
}

}  // namespace kvcache::cuda
