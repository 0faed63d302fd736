// Decode attention without tensor cores, for all that decode_mma.cuh does not take: float32 storage, groups of one, any
// head size up to 256, queries of another type, misaligned memory. The frame is decode_kernel.cuh.
//
// Logits: two lanes for each of the 16 entries, each with every other 16 bytes of the key. Sums: the lanes divide a
// value's channels among them, and entries too if the head is small. Rows in shared memory are padded with zeros to whole
// 16 bytes, so that only the copies care about odd sizes. All arithmetic is in float.
#include "decode_kernel.cuh"

namespace kvcache::cuda {
namespace {

// kOfWarp: heads that a warp computes from the same keys and values.
template <class T, int kOfWarp, bool kSharedParts>
class PlainCore {
 public:
  using Row = int64_t;
  static constexpr bool kShared = kSharedParts;
  static constexpr int kHeads = kOfWarp * (kShared ? kSharedWarps : 1);
  static constexpr int kThreads = kShared ? 32 * kSharedWarps : 128;  // at most
  static constexpr int kBlocks = kShared ? 1 : 2;
  static constexpr int kInPiece = 16 / sizeof(T);         // values
  static constexpr int kPieces = sizeof(T) == 4 ? 2 : 1;  // of a value's row that a lane has at most

  __host__ __device__ static int pieces_of(int dim) { return (dim + kInPiece - 1) / kInPiece; }
  // Two modulo four pieces apart, keys 0 .. 3 of the two halves lie in different banks.
  __host__ __device__ static int k_stride_of(const DecodeLaunch& d) {
    return (pieces_of(d.p.view.k_dim) + 1) / 4 * 64 + 32;
  }
  __host__ __device__ static int v_stride_of(const DecodeLaunch& d) { return pieces_of(d.p.view.v_dim) * 16; }
  __host__ __device__ static int64_t part_bytes(const DecodeLaunch& d) {
    return kPart * int64_t(k_stride_of(d) + v_stride_of(d));
  }
  // Weights [warps, 16 entries, kOfWarp], then queries [heads, k_dim padded]; these make room, to merge, for sums
  // [parts, v_dim padded].
  __host__ __device__ static int64_t weights_bytes(int parts) {
    return int64_t(kShared ? kSharedWarps : parts) * kPart * kOfWarp * sizeof(float);
  }
  __host__ __device__ static int64_t work_bytes(const DecodeLaunch& d, int parts) {
    const int heads = d.group < kHeads ? d.group : kHeads;
    const int64_t queries = int64_t(heads) * pieces_of(d.p.view.k_dim) * kInPiece * sizeof(float);
    const int64_t merge = kShared ? 0 : int64_t(parts) * pieces_of(d.p.view.v_dim) * kInPiece * sizeof(float);
    return weights_bytes(parts) + (queries > merge ? queries : merge);
  }
  // What no copy ever writes must be zero.
  __device__ static bool clear_ring(const DecodeLaunch& d) {
    return d.p.view.k_dim % kInPiece != 0 || d.p.view.v_dim % kInPiece != 0;
  }

  __device__ PlainCore(const DecodeLaunch& d, unsigned char* work, int warp, int lane)
      : weights_(reinterpret_cast<float*>(work) + warp * kPart * kOfWarp),
        work_(reinterpret_cast<float*>(work + weights_bytes(d.parts))),
        warp_(warp),
        lane_(lane),
        k_stride_(k_stride_of(d)),
        v_stride_(v_stride_of(d)),
        k_pieces_(pieces_of(d.p.view.k_dim)),
        v_pieces_(pieces_of(d.p.view.v_dim)),
        lanes_(1),
        heads_(0) {
    while (lanes_ < v_pieces_ && lanes_ < 32) lanes_ *= 2;
    for (int i = lane; i < kPart * kOfWarp; i += 32) weights_[i] = 0.0f;  // those of heads that do not exist are read
  }

  __device__ __forceinline__ void copy(const DecodeLaunch& d, unsigned char* part, int64_t row,
                                       uint32_t visible) const {
    if (d.grain == 16 && d.k_pieces.value == d.v_pieces.value) {  // the usual sizes
      switch (d.k_pieces.value) {
        case 8:
          return copy_equal<8>(d, part, row, visible);
        case 16:
          return copy_equal<16>(d, part, row, visible);
        case 32:
          return copy_equal<32>(d, part, row, visible);
        default:
          break;
      }
    }
    switch (d.grain) {
      case 16:
        copy_as<16>(d, part, row, visible);
        break;
      case 8:
        copy_as<8>(d, part, row, visible);
        break;
      case 4:
        copy_as<4>(d, part, row, visible);
        break;
      default:
        copy_as<2>(d, part, row, visible);
        break;
    }
  }

  // Called by the whole block.
  __device__ void load_queries(const DecodeLaunch& d, const DecodeItem& at) {
    heads_ = kShared ? (at.heads - warp_ + kSharedWarps - 1) / kSharedWarps : at.heads;
    const int dim = k_pieces_ * kInPiece;
    const int64_t first = at.row * d.p.q.stride[0] + (at.head * int64_t(d.group) + at.first_head) * d.p.q.stride[1];
    for (int i = threadIdx.x; i < at.heads * dim; i += blockDim.x) {
      const int h = i / dim, c = i - h * dim;
      const int64_t from = first + h * d.p.q.stride[1] + c;
      work_[i] = c < d.p.view.k_dim ? load_as_float(d.p.q.data, d.p.q.dtype, from) : 0.0f;
    }
  }

  __device__ __forceinline__ void reset() {
    seen_ = false;
#pragma unroll
    for (int i = 0; i < kOfWarp; ++i) {
      peak_[i] = -kInfinity, mass_[i] = 0.0f;
#pragma unroll
      for (int e = 0; e < kPieces * kInPiece; ++e) sums_[i][e] = 0.0f;
    }
  }

  // 16 entries in shared memory; `place` is that of the first.
  __device__ __forceinline__ void step(const DecodeLaunch& d, const DecodeItem& at, const unsigned char* part,
                                       const PartNote& note, int place) {
    const int key = lane_ / 2;
    const bool shown = note.visible >> key & 1u, stores = d.weights && lane_ % 2 == 0 && place + key < d.places;
    float* kept = stores ? static_cast<float*>(d.weights) +
                               (int64_t(at.item) * d.places + place + key) * d.weight_heads + at.first_head
                         : nullptr;
    if (note.visible == 0) {
      for (int i = 0; kept && i < heads_; ++i) kept[head_of(i)] = -kInfinity;
      return;
    }
    seen_ = true;
    float logits[kOfWarp];
    dot(part, logits);
    __syncwarp();  // the weights before these have been read
#pragma unroll
    for (int i = 0; i < kOfWarp; ++i) {
      if (i >= heads_) break;
      float x = logits[i] + __shfl_xor_sync(kFullWarp, logits[i], 1);
      x = shown ? finish_logit(d, at.row, at.head, at.first_head + head_of(i), note.slots[key], x) : -kInfinity;
      if (kept) kept[head_of(i)] = x;
      float top = x;
#pragma unroll
      for (int distance = 2; distance < 32; distance *= 2) {
        top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, distance));
      }
      const float peak = fmaxf(peak_[i], top), level = peak == -kInfinity ? 0.0f : peak;
      const float shrink = fast_exp2(peak_[i] - level), weight = fast_exp2(x - level);
      peak_[i] = peak;
      mass_[i] = mass_[i] * shrink + weight;
      if (shrink != 1.0f) {
#pragma unroll
        for (int e = 0; e < kPieces * kInPiece; ++e) sums_[i][e] *= shrink;
      }
      if (lane_ % 2 == 0) weights_[key * kOfWarp + i] = weight;
    }
    __syncwarp();
    add(part + kPart * k_stride_);
  }

  __device__ __forceinline__ void leave_state(const DecodeItem&, float* peaks, float* masses) {
    const int base = kShared ? 0 : warp_ * kHeads;
#pragma unroll
    for (int i = 0; i < kOfWarp; ++i) {
      if (i >= heads_) break;
      float mass = mass_[i];
#pragma unroll
      for (int distance = 2; distance < 32; distance *= 2) mass += __shfl_xor_sync(kFullWarp, mass, distance);
      if (lane_ == 0) {
        peaks[base + head_of(i)] = peak_[i];
        masses[base + head_of(i)] = seen_ ? mass : -1.0f;
      }
    }
  }

  __device__ __forceinline__ void finish(const DecodeLaunch& d, const DecodeItem& at, const float* factors) {
    const int base = kShared ? 0 : warp_ * kHeads, dim = v_pieces_ * kInPiece;
#pragma unroll
    for (int i = 0; i < kOfWarp; ++i) {
      if (i >= heads_) break;  // the same for all warps unless shared
      const DecodeTarget target(d, at, head_of(i));
      const float factor = factors[base + head_of(i)];
#pragma unroll
      for (int e = 0; e < kPieces * kInPiece; ++e) {
        float sum = sums_[i][e] * factor;
        for (int distance = lanes_; distance < 32; distance *= 2) sum += __shfl_xor_sync(kFullWarp, sum, distance);
        const int piece = lane_ + e / kInPiece * 32, v = piece * kInPiece + e % kInPiece;
        if (lane_ >= lanes_ || piece >= v_pieces_) continue;
        if (kShared || d.parts == 1) store(d, target, v, sum);
        else work_[warp_ * dim + v] = sum;
      }
      if (kShared || d.parts == 1) continue;
      __syncthreads();
      for (int v = threadIdx.x; v < d.p.view.v_dim; v += blockDim.x) {
        float total = 0.0f;
        for (int j = 0; j < d.parts; ++j) total += work_[j * dim + v];
        store(d, target, v, total);
      }
      __syncthreads();
    }
  }

 private:
  __device__ __forceinline__ int head_of(int i) const { return kShared ? i * kSharedWarps + warp_ : i; }

  template <int kGrain>
  __device__ __forceinline__ void copy_as(const DecodeLaunch& d, unsigned char* part, int64_t row,
                                          uint32_t visible) const {
    char* to = reinterpret_cast<char*>(part);
    copy_rows<kGrain>(to, k_stride_, d.p.view.k_pages, d.k_pieces, row, visible, lane_);
    copy_rows<kGrain>(to + kPart * k_stride_, v_stride_, d.p.view.v_pages, d.v_pieces, row, visible, lane_);
  }

  template <int kCopies>
  __device__ __forceinline__ void copy_equal(const DecodeLaunch& d, unsigned char* part, int64_t row,
                                             uint32_t visible) const {
    char* to = reinterpret_cast<char*>(part);
    copy_equal_rows<kCopies>(to, k_stride_, to + kPart * k_stride_, v_stride_, d.p.view, row, visible, lane_);
  }

  __device__ __forceinline__ static void store(const DecodeLaunch& d, const DecodeTarget& target, int v, float value) {
    if (v >= d.p.view.v_dim) return;
    if (target.partial) target.partial[v] = value;
    else store_out(d.p, target.offset + v, value);
  }

  __device__ __forceinline__ static void read_piece(const unsigned char* from, float (&values)[kInPiece]) {
    if constexpr (sizeof(T) == 4) {
      const float4 x = *reinterpret_cast<const float4*>(from);
      values[0] = x.x, values[1] = x.y, values[2] = x.z, values[3] = x.w;
    } else {
      const uint4 x = *reinterpret_cast<const uint4*>(from);
      unpack2<T>(x.x, values[0], values[1]);
      unpack2<T>(x.y, values[2], values[3]);
      unpack2<T>(x.z, values[4], values[5]);
      unpack2<T>(x.w, values[6], values[7]);
    }
  }

  // This lane's half of the products with key lane / 2.
  __device__ __forceinline__ void dot(const unsigned char* keys, float (&logits)[kOfWarp]) const {
#pragma unroll
    for (int i = 0; i < kOfWarp; ++i) logits[i] = 0.0f;
    const unsigned char* k = keys + lane_ / 2 * k_stride_;
    const int dim = k_pieces_ * kInPiece;
    constexpr int kAtOnce = kOfWarp == 1 ? 4 : 2;
#pragma unroll kAtOnce
    for (int c = lane_ % 2; c < k_pieces_; c += 2) {
      float values[kInPiece];
      read_piece(k + c * 16, values);
#pragma unroll
      for (int i = 0; i < kOfWarp; ++i) {
        if (i >= heads_) break;
        const float4* q = reinterpret_cast<const float4*>(work_ + head_of(i) * dim + c * kInPiece);
#pragma unroll
        for (int e = 0; e < kInPiece; e += 4) {
          const float4 x = q[e / 4];
          logits[i] += values[e] * x.x + values[e + 1] * x.y + values[e + 2] * x.z + values[e + 3] * x.w;
        }
      }
    }
  }

  __device__ __forceinline__ void add(const unsigned char* values) {
    const int piece = lane_ & (lanes_ - 1);
    constexpr int kAtOnce = kOfWarp == 1 ? 4 : 1;
#pragma unroll kAtOnce
    for (int key = lane_ / lanes_; key < kPart; key += 32 / lanes_) {
      float weights[kOfWarp];
#pragma unroll
      for (int i = 0; i < kOfWarp; ++i) weights[i] = weights_[key * kOfWarp + i];
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        if (piece + j * 32 >= v_pieces_) break;
        float row[kInPiece];
        read_piece(values + key * v_stride_ + (piece + j * 32) * 16, row);
#pragma unroll
        for (int i = 0; i < kOfWarp; ++i) {
          if (i >= heads_) break;
#pragma unroll
          for (int e = 0; e < kInPiece; ++e) sums_[i][j * kInPiece + e] += weights[i] * row[e];
        }
      }
    }
  }

  float* const weights_;  // [16, kOfWarp]
  float* const work_;
  const int warp_, lane_;
  const int k_stride_, v_stride_;  // bytes of a row in shared memory
  const int k_pieces_, v_pieces_;  // 16 bytes each
  int lanes_;                      // that share a value's row: a power of two
  int heads_;                      // of this warp
  bool seen_;                      // an entry
  float peak_[kOfWarp], mass_[kOfWarp];
  float sums_[kOfWarp][kPieces * kInPiece];
};

template <class T, int kOfWarp, bool kShared>
__global__ void __launch_bounds__((PlainCore<T, kOfWarp, kShared>::kThreads), (PlainCore<T, kOfWarp, kShared>::kBlocks))
    decode_plain_kernel(const __grid_constant__ DecodeLaunch d) {
  KVCACHE_DYNAMIC_SHARED(unsigned char, shared);
  decode_worker<PlainCore<T, kOfWarp, kShared>>(d, shared);
}

template <class T, int kOfWarp, bool kShared>
struct PlainVariant {
  static DecodeNeeds needs(const DecodeLaunch& d, int64_t limit) {
    return decode_needs<PlainCore<T, kOfWarp, kShared>>(d, limit);
  }
  static int launch(const DecodeLaunch& d, int64_t shared_bytes, void* stream) {
    return KVCACHE_LAUNCH_DEPENDENT((decode_plain_kernel<T, kOfWarp, kShared>), d.workers,
                                    (kShared ? kSharedWarps : d.parts) * 32, shared_bytes, stream, d);
  }
};

template <class T>
DecodeNeeds needs_of(const DecodeLaunch& d, int64_t limit) {
  if (d.group == 1) return PlainVariant<T, 1, false>::needs(d, limit);
  if (d.group <= 8 || !d.shared_parts) return PlainVariant<T, 8, false>::needs(d, limit);
  return PlainVariant<T, 8, true>::needs(d, limit);
}

template <class T>
int launch_of(const DecodeLaunch& d, int64_t shared_bytes, void* stream) {
  if (d.group == 1) return PlainVariant<T, 1, false>::launch(d, shared_bytes, stream);
  if (d.group <= 8 || !d.shared_parts) return PlainVariant<T, 8, false>::launch(d, shared_bytes, stream);
  return PlainVariant<T, 8, true>::launch(d, shared_bytes, stream);
}

}  // namespace

DecodeNeeds decode_needs_plain(const DecodeLaunch& d, int64_t limit) {
  if (d.p.view.dtype == DType::kFloat32) return needs_of<float>(d, limit);
  if (d.p.view.dtype == DType::kBFloat16) return needs_of<bf16>(d, limit);
  return needs_of<f16>(d, limit);
}

int decode_on_plain(const DecodeLaunch& d, int64_t shared_bytes, void* stream) {
  if (d.p.view.dtype == DType::kFloat32) return launch_of<float>(d, shared_bytes, stream);
  if (d.p.view.dtype == DType::kBFloat16) return launch_of<bf16>(d, shared_bytes, stream);
  return launch_of<f16>(d, shared_bytes, stream);
}

}  // namespace kvcache::cuda
