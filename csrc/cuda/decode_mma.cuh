// Decode attention on tensor cores, for 16-bit storage: the computing side (the frame is decode_kernel.cuh).
//
// Keys are the 16 rows of an mma, the heads of the group its 8 columns: no row is wasted on heads that do not exist.
//   logits^T [16 keys x 8 heads] += K [16 x 16 channels] . Q^T [16 x 8]
//   sums^T [16 channels x 8 heads] += V^T [16 channels x 16 keys] . weights^T [16 keys x 8 heads]
// The logits come out with a key in the row, the second product wants keys in pairs: one movmatrix turns 8 of them, in
// registers. A lane has heads 2t and 2t + 1 throughout (t = lane % 4), so it keeps their softmax state itself.
//
// kMax: head sizes are at most that many (multiples of 16), or exactly that many if kExact. kTiles: tiles of 8 heads that
// a warp computes from the same keys and values.
#pragma once
#include "decode_kernel.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/mma.cuh"
#include "ptx/movmatrix.cuh"

namespace kvcache::cuda {

template <class T, int kMax, bool kExact, int kTiles, bool kSharedParts>
class MmaCore {
 public:
  using Row = uint32_t;
  static constexpr bool kShared = kSharedParts;
  static constexpr int kHeads = 8 * kTiles * (kShared ? kSharedWarps : 1);
  static constexpr int kThreads = kShared ? 32 * kSharedWarps : 128;  // at most
  static constexpr int kBlocks = kShared ? 1 : 2;                     // that the registers of a multiprocessor hold
  static constexpr int kSteps = kMax / 16;                            // of 16 channels
  // Rows in shared memory are an odd number of 16 bytes apart, so that the 8 rows of an ldmatrix lie in different banks.
  static constexpr int kPad = 16;

  __host__ __device__ static int k_dim(const DecodeLaunch& d) { return kExact ? kMax : d.p.view.k_dim; }
  __host__ __device__ static int v_dim(const DecodeLaunch& d) { return kExact ? kMax : d.p.view.v_dim; }
  __host__ __device__ static int64_t part_bytes(const DecodeLaunch& d) {
    return kPart * (2 * int64_t(k_dim(d) + v_dim(d)) + 2 * kPad);
  }
  __host__ __device__ static int query_rows(const DecodeLaunch& d) {
    return ((d.group < kHeads ? d.group : kHeads) + 7) / 8 * 8;
  }
  // Queries [query_rows, k_dim]; later, to merge, [parts (of the sums), parts (that sum), 32 lanes] float4.
  __host__ __device__ static int64_t work_bytes(const DecodeLaunch& d, int parts) {
    const int64_t queries = query_rows(d) * (2 * int64_t(k_dim(d)) + kPad);
    const int64_t merge = kShared ? 0 : int64_t(parts) * parts * 512;
    return queries > merge ? queries : merge;
  }
  __device__ static bool clear_ring(const DecodeLaunch&) { return false; }

  __device__ MmaCore(const DecodeLaunch& d, unsigned char* work, int warp, int lane)
      : work_(work), warp_(warp), lane_(lane), tiles_(0) {
    any_k_stride_ = 2 * k_dim(d) + kPad;
    any_v_stride_ = 2 * v_dim(d) + kPad;
  }

  __device__ __forceinline__ void copy(const DecodeLaunch& d, unsigned char* part, uint32_t row,
                                       uint32_t visible) const {
    char *k = reinterpret_cast<char*>(part), *v = k + kPart * k_stride();
    if constexpr (kExact) {
      copy_equal_rows<kMax / 8>(k, k_stride(), v, v_stride(), d.p.view, row, visible, lane_);
    } else {
      copy_rows<16>(k, k_stride(), d.p.view.k_pages, d.k_pieces, row, visible, lane_);
      copy_rows<16>(v, v_stride(), d.p.view.v_pages, d.v_pieces, row, visible, lane_);
    }
  }

  // Called by the whole block. Rows beyond the heads are zeros.
  __device__ void load_queries(const DecodeLaunch& d, const DecodeItem& at) {
    const int pieces = k_dim(d) / 8, rows = (at.heads + 7) / 8 * 8;
    tiles_ = kShared ? (rows / 8 - warp_ + kSharedWarps - 1) / kSharedWarps : rows / 8;
    const T* q = static_cast<const T*>(d.p.q.data) + at.row * d.p.q.stride[0] +
                 (at.head * int64_t(d.group) + at.first_head) * d.p.q.stride[1];
    for (int i = threadIdx.x; i < rows * pieces; i += blockDim.x) {
      const int h = i / pieces, c = i - h * pieces;
      uint4 values = make_uint4(0, 0, 0, 0);
      if (h < at.heads) {
        const T* from = q + h * d.p.q.stride[1] + c * 8;
        values = load_eight(from, d.aligned_q);
      }
      *reinterpret_cast<uint4*>(work_ + h * k_stride() + c * 16) = values;
    }
  }

  __device__ __forceinline__ void reset() {
    seen_ = false;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) peak_[n][j] = -kInfinity, mass_[n][j] = 0.0f;
#pragma unroll
      for (int m = 0; m < kSteps; ++m) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums_[n][m][j] = 0.0f;
      }
    }
  }

  // 16 entries in shared memory; `place` is that of the first.
  __device__ __forceinline__ void step(const DecodeLaunch& d, const DecodeItem& at, const unsigned char* part,
                                       const PartNote& note, int place) {
    const uint32_t visible = note.visible;
    if (visible == 0) {
      if (d.weights) store_nothing(d, at, place);
      return;
    }
    seen_ = true;
    float logits[kTiles][4];  // keys g, g and g + 8, g + 8; heads 2t, 2t + 1 alternating
    dot(d, part, logits);
    finish_logits(d, at, note, visible, logits);
    float tops[kTiles][2];
    find_tops(logits, tops);
    if (d.weights) store_weights(d, at, place, logits, tops);
    uint32_t weights[kTiles][2];
    update_softmax(tops, logits, weights);
    add(d, part + kPart * k_stride(), weights);
  }

  __device__ __forceinline__ void leave_state(const DecodeItem& at, float* peaks, float* masses) {
    const int base = kShared ? 0 : warp_ * kHeads;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if (!has(n)) continue;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float mass = mass_[n][j];
#pragma unroll
        for (int distance = 4; distance < 32; distance *= 2) mass += __shfl_xor_sync(kFullWarp, mass, distance);
        const int h = head_of(n) + j;
        if (lane_ < 4 && h < at.heads) {
          peaks[base + h] = peak_[n][j];
          masses[base + h] = seen_ ? mass : -1.0f;
        }
      }
    }
  }

  __device__ __forceinline__ void finish(const DecodeLaunch& d, const DecodeItem& at, const float* factors) {
    const int base = kShared ? 0 : warp_ * kHeads;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if (!has(n)) continue;  // the same for all warps unless shared
      const int h = head_of(n);
      const float factor0 = h < at.heads ? factors[base + h] : 0.0f;
      const float factor1 = h + 1 < at.heads ? factors[base + h + 1] : 0.0f;
      const DecodeTarget target0(d, at, h < at.heads ? h : 0), target1(d, at, h + 1 < at.heads ? h + 1 : 0);
      const auto store = [&](int m, const float (&sums)[4]) {
        const int v = m * 16 + lane_ / 4;
        if (h < at.heads) target0.template store<T>(d, v, sums[0]), target0.template store<T>(d, v + 8, sums[2]);
        if (h + 1 < at.heads) target1.template store<T>(d, v, sums[1]), target1.template store<T>(d, v + 8, sums[3]);
      };
#pragma unroll
      for (int m = 0; m < kSteps; ++m) {
        float (&sums)[4] = sums_[n][m];
        sums[0] *= factor0, sums[1] *= factor1, sums[2] *= factor0, sums[3] *= factor1;
        if (kShared || d.parts == 1) {
          if (m < v_steps(d)) store(m, sums);
          continue;
        }
        // Each warp gathers one of `parts` neighbouring tiles of channels from all of them.
        float4* merge = reinterpret_cast<float4*>(work_);
        const int turn = m & (d.parts - 1);
        merge[(warp_ * d.parts + turn) * 32 + lane_] = make_float4(sums[0], sums[1], sums[2], sums[3]);
        if ((turn != d.parts - 1 && m != kSteps - 1) || m - turn >= v_steps(d)) continue;
        __syncthreads();
        const int tile = m - turn + warp_;
        if (tile < v_steps(d) && warp_ <= turn) {
          float total[4] = {};
          for (int i = 0; i < d.parts; ++i) {
            const float4 from = merge[(i * d.parts + warp_) * 32 + lane_];
            total[0] += from.x, total[1] += from.y, total[2] += from.z, total[3] += from.w;
          }
          store(tile, total);
        }
        __syncthreads();
      }
    }
  }

 private:
  __device__ __forceinline__ static int k_steps(const DecodeLaunch& d) { return kExact ? kSteps : k_dim(d) / 16; }
  __device__ __forceinline__ static int v_steps(const DecodeLaunch& d) { return kExact ? kSteps : v_dim(d) / 16; }
  // Bytes of a row in shared memory.
  __device__ __forceinline__ int k_stride() const { return kExact ? 2 * kMax + kPad : any_k_stride_; }
  __device__ __forceinline__ int v_stride() const { return kExact ? 2 * kMax + kPad : any_v_stride_; }
  // Whether the warp has a tile n.
  __device__ __forceinline__ bool has(int n) const { return (!kShared && n == 0) || n < tiles_; }
  // Tile n of this warp among the pass's tiles of 8 heads, and the lane's first head of it.
  __device__ __forceinline__ int tile_of(int n) const { return kShared ? n * kSharedWarps + warp_ : n; }
  __device__ __forceinline__ int head_of(int n) const { return tile_of(n) * 8 + lane_ % 4 * 2; }

  __device__ __forceinline__ void dot(const DecodeLaunch& d, const unsigned char* keys, float (&logits)[kTiles][4]) {
    constexpr int kChains = kTiles == 1 ? 2 : 1;  // an mma waits for the one before it in its chain
    float sums[kChains][kTiles][4] = {};
    const unsigned char* k = keys + (lane_ % 16) * k_stride() + lane_ / 16 * 16;
    const unsigned char* q = work_ + (lane_ % 8) * k_stride() + lane_ / 8 % 2 * 16;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if (i >= k_steps(d)) break;
      uint32_t key[4];  // 8 x 8 tiles: keys 0 .. 7 and 8 .. 15, then the same for the channels 8 .. 15
      ldmatrix_x4(key, k + i * 32);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        if (!has(n)) break;
        uint32_t query[2];
        ldmatrix_x2(query, q + tile_of(n) * 8 * k_stride() + i * 32);
        mma_m16n8k16<T>(sums[i % kChains][n], key, query[0], query[1]);
      }
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) logits[n][j] = kChains == 1 ? sums[0][n][j] : sums[0][n][j] + sums[kChains - 1][n][j];
    }
  }

  // Scale, softcap and bias; base 2; -inf where hidden.
  __device__ __forceinline__ void finish_logits(const DecodeLaunch& d, const DecodeItem& at, const PartNote& note,
                                                uint32_t visible, float (&logits)[kTiles][4]) {
    const bool plain = d.p.softcap == 0.0f && !d.p.bias;
    const float scale = d.p.scale * kLog2E;
    const bool shown[2] = {(visible >> lane_ / 4 & 1u) != 0, (visible >> (lane_ / 4 + 8) & 1u) != 0};
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float x = logits[n][j] * scale;
        if (!plain && shown[j / 2]) {
          const int in_group = at.first_head + head_of(n) + j % 2;
          x = finish_logit(d, at.row, at.head, in_group, note.slots[lane_ / 4 + j / 2 * 8], logits[n][j]);
        }
        logits[n][j] = shown[j / 2] ? x : -kInfinity;
      }
    }
  }

  // The largest logit of the lane's heads.
  __device__ __forceinline__ void find_tops(const float (&logits)[kTiles][4], float (&tops)[kTiles][2]) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if (!has(n)) break;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float top = fmaxf(logits[n][j], logits[n][2 + j]);
#pragma unroll
        for (int distance = 4; distance < 32; distance *= 2) {
          top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, distance));
        }
        tops[n][j] = top;
      }
    }
  }

  // Turns logits into the second operand of the other product, and what has been summed so far with them.
  __device__ __forceinline__ void update_softmax(const float (&tops)[kTiles][2], float (&logits)[kTiles][4],
                                                 uint32_t (&weights)[kTiles][2]) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if (!has(n)) break;
      float shrink[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float peak = fmaxf(peak_[n][j], tops[n][j]), level = peak == -kInfinity ? 0.0f : peak;
        shrink[j] = fast_exp2(peak_[n][j] - level);
        logits[n][j] = fast_exp2(logits[n][j] - level);
        logits[n][2 + j] = fast_exp2(logits[n][2 + j] - level);
        mass_[n][j] = mass_[n][j] * shrink[j] + (logits[n][j] + logits[n][2 + j]);
        peak_[n][j] = peak;
      }
      if (__any_sync(kFullWarp, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
        for (int m = 0; m < kSteps; ++m) {
#pragma unroll
          for (int j = 0; j < 4; ++j) sums_[n][m][j] *= shrink[j % 2];
        }
      }
      weights[n][0] = transpose_8x8(pack2<T>(logits[n][0], logits[n][1]));
      weights[n][1] = transpose_8x8(pack2<T>(logits[n][2], logits[n][3]));
    }
  }

  __device__ __forceinline__ void add(const DecodeLaunch& d, const unsigned char* values,
                                      const uint32_t (&weights)[kTiles][2]) {
    const unsigned char* v = values + (lane_ % 8 + lane_ / 16 * 8) * v_stride() + lane_ / 8 % 2 * 16;
#pragma unroll
    for (int m = 0; m < kSteps; ++m) {
      if (m >= v_steps(d)) break;
      uint32_t value[4];  // transposed 8 x 8 tiles: channels 0 .. 7 and 8 .. 15, then the same for the keys 8 .. 15
      ldmatrix_x4_trans(value, v + m * 32);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        if (!has(n)) break;
        mma_m16n8k16<T>(sums_[n][m], value, weights[n][0], weights[n][1]);
      }
    }
  }

  // Two heads' halves for one entry: decode_statistics.cuh.
  __device__ __forceinline__ static void store_pair(const DecodeLaunch& d, const DecodeItem& at, int place, int h,
                                                    uint32_t pair) {
    const int in_group = at.first_head + h;
    if (place >= d.places || in_group >= d.weight_heads) return;
    static_cast<uint32_t*>(d.weights)[((int64_t(at.item) * d.places + place) * d.weight_heads + in_group) / 2] = pair;
  }
  __device__ __forceinline__ void store_weights(const DecodeLaunch& d, const DecodeItem& at, int place,
                                                const float (&logits)[kTiles][4],
                                                const float (&tops)[kTiles][2]) const {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if (!has(n)) break;
      const int power[2] = {weight_power(tops[n][0]), weight_power(tops[n][1])};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int key = lane_ / 4 + i * 8;
        const float lo = half_weight(logits[n][2 * i], power[0]), hi = half_weight(logits[n][2 * i + 1], power[1]);
        store_pair(d, at, place + key, head_of(n), pack2<f16>(lo, hi) | power_bits(power[0], power[1], key));
      }
    }
  }
  __device__ void store_nothing(const DecodeLaunch& d, const DecodeItem& at, int place) const {
    for (int n = 0; n < tiles_; ++n) {
      for (int i = 0; i < 2; ++i) store_pair(d, at, place + lane_ / 4 + i * 8, head_of(n), 0u);
    }
  }

  unsigned char* work_;
  const int warp_, lane_;
  int any_k_stride_, any_v_stride_;
  int tiles_;                                // of 8 heads, that this warp has
  bool seen_;                                // an entry
  float peak_[kTiles][2], mass_[kTiles][2];  // mass: of this lane's keys
  float sums_[kTiles][kSteps][4];            // channels g, g and g + 8, g + 8; heads 2t, 2t + 1 alternating
};

template <class T, int kMax, bool kExact, int kTiles, bool kShared>
__global__ void __launch_bounds__((MmaCore<T, kMax, kExact, kTiles, kShared>::kThreads),
                                  (MmaCore<T, kMax, kExact, kTiles, kShared>::kBlocks))
    decode_mma_kernel(const __grid_constant__ DecodeLaunch d) {
  KVCACHE_DYNAMIC_SHARED(unsigned char, shared);
  decode_worker<MmaCore<T, kMax, kExact, kTiles, kShared>>(d, shared);
}

template <class T, int kMax, bool kExact, int kTiles, bool kShared>
struct MmaVariant {
  static DecodeNeeds needs(const DecodeLaunch& d, int64_t limit) {
    return decode_needs<MmaCore<T, kMax, kExact, kTiles, kShared>>(d, limit);
  }
  static int launch(const DecodeLaunch& d, int64_t shared_bytes, void* stream) {
    const int warps = kShared ? kSharedWarps : d.parts;
    return KVCACHE_LAUNCH_DEPENDENT((decode_mma_kernel<T, kMax, kExact, kTiles, kShared>), d.workers, warps * 32,
                                    shared_bytes, stream, d);
  }
};

// How many tiles of heads one warp can have: what the registers hold without spilling.
template <class T, int kMax, bool kExact, class Use>
auto with_tiles(const DecodeLaunch& d, const Use& use) {
  constexpr int kMost = kMax <= 128 ? 2 : 1;
  if constexpr (kExact && kMost > 1) {
    if (d.group <= 8) return use(MmaVariant<T, kMax, kExact, 1, false>());
  }
  if (d.group <= 8 * kMost) return use(MmaVariant<T, kMax, kExact, kMost, false>());
  return use(MmaVariant<T, kMax, kExact, kMost, true>());
}

// use(variant) for the head sizes and the group of a launch.
template <class T, class Use>
auto with_mma(const DecodeLaunch& d, const Use& use) {
  const int k = d.p.view.k_dim, v = d.p.view.v_dim;
  if (k == 64 && v == 64) return with_tiles<T, 64, true>(d, use);
  if (k == 128 && v == 128) return with_tiles<T, 128, true>(d, use);
  if (k == 256 && v == 256) return with_tiles<T, 256, true>(d, use);
  if (k <= 128 && v <= 128) return with_tiles<T, 128, false>(d, use);
  return with_tiles<T, 256, false>(d, use);
}

template <class T>
DecodeNeeds mma_needs(const DecodeLaunch& d, int64_t limit) {
  return with_mma<T>(d, [&](auto variant) { return variant.needs(d, limit); });
}
template <class T>
int decode_on_mma(const DecodeLaunch& d, int64_t shared_bytes, void* stream) {
  return with_mma<T>(d, [&](auto variant) { return variant.launch(d, shared_bytes, stream); });
}

}  // namespace kvcache::cuda
