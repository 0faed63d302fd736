// Pass 1 on tensor cores: logits of a group's query heads over one piece of the candidates of a head.
//
// Keys are the 16 rows of mma.m16n8k16 and query heads its 8 columns, so that a group of 8 wastes nothing and no key is
// read twice. Every warp has a ring of tiles of 16 keys of its own, filled by cp.async, and meets nobody before the end.
// What a tile needs from the tables is looked up one step before its copies are issued: at that pace (a step is about
// 1 us when the memory is busy) their latency is covered.
#include "ptx/cache_hint.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/mma.cuh"
#include "selection_scores.cuh"

namespace kvcache::cuda {
namespace {

constexpr int kTile = 16, kColumns = 8;

// Three blocks of this fit a multiprocessor of sm_90 (two at 192), one every other.
template <int kDim>
struct Shape {
  static constexpr int kWarps = kDim > 256 ? 2 : 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kLine =
      kDim + 8;  // elements; an odd number of 16 bytes: the rows of ldmatrix meet different banks
  static constexpr int kTileBytes = kTile * kLine * 2;
  static constexpr int kStages = kTileBytes * 8 <= 19456 ? 8 : kTileBytes * 2 > 19456 ? 2 : 19456 / kTileBytes;
  static constexpr int kQueryDim = (kDim + 31) / 32 * 32;
  static constexpr int kQueryLine = kQueryDim + 8;
  static_assert(kLine / 8 % 2 == 1 && kQueryLine / 8 % 2 == 1, "bank conflicts");

  static int64_t shared_bytes(int group) {
    const int lines = (group + kColumns - 1) / kColumns * kColumns;
    return kWarps * kStages * (kTileBytes + 4) + lines * kQueryLine * 2 + kWarps * kColumns * 8;
  }
};

// What sm_86, 89 and 120 offer a block; beyond it the general kernel takes over.
constexpr int64_t kMostShared = 99 * 1024;

// kFew: a group of at most 8, whose queries stay in registers.
template <class T, int kDim, bool kFew>
__global__ void __launch_bounds__(Shape<kDim>::kThreads, 3) logits_mma_kernel(LogitsParams p) {
  using S = Shape<kDim>;
  constexpr int kSteps = kDim / 16;
  KVCACHE_DYNAMIC_SHARED(char, shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  wait_for_dependencies();

  const BlockPlace at = place_of_block(p);
  if (p.skips(at.row)) return;
  const Places places = places_of(p, at.row, at.head);
  const int64_t begin = at.piece * p.plan.piece;
  if (begin >= places.n) return;
  const int64_t left = places.n - begin;
  const int end = int(left < p.plan.piece ? left : p.plan.piece);  // counted from begin, as everything below

  T* ring = reinterpret_cast<T*>(shared) + warp * S::kStages * kTile * S::kLine;     // [stages][16][kLine]
  T* query = reinterpret_cast<T*>(shared + S::kWarps * S::kStages * S::kTileBytes);  // [lines][kQueryLine]
  const int lines = kFew ? kColumns : (p.group + kColumns - 1) / kColumns * kColumns;
  float2* merged = reinterpret_cast<float2*>(query + lines * S::kQueryLine);                         // [warps][8]
  uint32_t* masks = reinterpret_cast<uint32_t*>(merged + S::kWarps * kColumns) + warp * S::kStages;  // [stages]

  // The key that this lane looks up in a tile (lanes 16 .. 31 repeat 0 .. 15).
  struct Found {
    int64_t entry;
    bool candidate;
  };
  const int tiles = (end + kTile - 1) / kTile;
  auto look_up = [&](int tile) {
    const int place = tile * kTile + lane % kTile;
    const int64_t slot = place < end ? places.slot(begin + place) : -1;
    return Found{slot >= 0 ? places.entry(slot) : -1, places.candidate(slot)};
  };
  const T* pool = static_cast<const T*>(p.pool);
  const uint64_t policy = l2_policy(p.once);
  auto issue = [&](int stage, const Found& found) {
    const uint32_t mask = __ballot_sync(kFullWarp, found.candidate);
    if (lane == 0) masks[stage] = mask;
    T* tile = ring + stage * kTile * S::kLine;
    constexpr int kChunks = kDim / 8;  // of 16 bytes, per row
#pragma unroll
    for (int i = 0; i < kTile * kChunks / 32; ++i) {
      const int r = (lane + 32 * i) / kChunks, c = (lane + 32 * i) % kChunks * 8;
      const int64_t entry = __shfl_sync(kFullWarp, found.entry, r);
      const bool full = entry >= 0 && c < p.dim;
      cp_async_16_hinted(tile + r * S::kLine + c, pool + (full ? entry * p.dim + c : 0), full, policy);
    }
  };

#pragma unroll
  for (int s = 0; s < S::kStages - 1; ++s) {
    if (warp + s * S::kWarps < tiles) issue(s, look_up(warp + s * S::kWarps));
    cp_async_commit();
  }
  Found next = look_up(warp + (S::kStages - 1) * S::kWarps);

  for (int i = threadIdx.x; i < lines * S::kQueryDim; i += S::kThreads) {
    const int g = i / S::kQueryDim, d = i % S::kQueryDim;
    const float x = g < p.group && d < p.dim ? query_element(p, at.row, at.head * p.group + g, d) : 0.0f;
    query[g * S::kQueryLine + d] = from_float<T>(x);  // exact: it comes from this type
  }
  __syncthreads();
  [[maybe_unused]] uint32_t b[kFew ? kSteps + 1 : 1][2];  // one more: ldmatrix brings two steps
  const T* query_rows = query + lane % 8 * S::kQueryLine + lane / 8 * 8;
  if constexpr (kFew) {
#pragma unroll
    for (int k = 0; k < kSteps; k += 2) {
      uint32_t two[4];
      ldmatrix_x4(two, query_rows + k * 16);
      b[k][0] = two[0], b[k][1] = two[1], b[k + 1][0] = two[2], b[k + 1][1] = two[3];
    }
  }

  const int64_t first_line = at.item * p.group;
  float* out = p.logits + first_line * p.plan.stride + begin;  // [group, stride]
  const int64_t room = p.plan.stride - begin;
  float peak[2] = {kNegInf, kNegInf}, mass[2] = {};  // of this lane's two heads over its rows; kFew
  int stage = 0;
  for (int tile = warp; tile < tiles; tile += S::kWarps) {
    cp_async_wait<S::kStages - 2>();
    __syncwarp();  // the tile is there for all lanes, and all have left the one whose place the next copies take
    const int ahead = tile + (S::kStages - 1) * S::kWarps, spare = stage == 0 ? S::kStages - 1 : stage - 1;
    if (ahead < tiles) issue(spare, next);
    cp_async_commit();
    next = look_up(ahead + S::kWarps);

    const uint32_t mask = masks[stage];
    const T* rows = ring + (stage * kTile + lane % 16) * S::kLine + lane / 16 * 8;
    for (int h = 0; h < (kFew ? 1 : lines); h += kColumns) {
      float c[4] = {};
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        uint32_t a[4];
        ldmatrix_x4(a, rows + k * 16);
        if constexpr (kFew) {
          mma_m16n8k16<T>(c, a, b[k][0], b[k][1]);
        } else {
          uint32_t one[2];
          ldmatrix_x2(one, query + (h + lane % 8) * S::kQueryLine + k * 16 + lane / 8 % 2 * 8);
          mma_m16n8k16<T>(c, a, one[0], one[1]);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // row lane / 4 (+ 8), head lane % 4 * 2 (+ 1)
        const int r = lane / 4 + i / 2 * 8, g = h + lane % 4 * 2 + i % 2;
        c[i] = mask >> r & 1 ? c[i] * p.scale : kNegInf;
        if (g < p.group && tile * kTile + r < room) out[g * p.plan.stride + tile * kTile + r] = c[i];
      }
      if (kFew && p.soft) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float top = fmaxf(peak[j], fmaxf(c[j], c[j + 2])), base = top == kNegInf ? 0.0f : top;
          mass[j] = mass[j] * fast_exp2(peak[j] - base) + fast_exp2(c[j] - base) + fast_exp2(c[j + 2] - base);
          peak[j] = top;
        }
      }
    }
    stage = stage == S::kStages - 1 ? 0 : stage + 1;
  }
  launch_dependents();
  if (!p.soft) return;
  if constexpr (kFew) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      merge_softmax_lanes<16, 4>(peak[j], mass[j]);
      if (lane < 4) merged[warp * kColumns + lane * 2 + j] = make_float2(peak[j], mass[j]);
    }
    __syncthreads();
    if (int(threadIdx.x) < p.group) {
      float all_peak = kNegInf, all_mass = 0;
#pragma unroll
      for (int w = 0; w < S::kWarps; ++w) {
        const float2 part = merged[w * kColumns + threadIdx.x];
        merge_softmax(all_peak, all_mass, part.x, part.y);
      }
      p.parts[(first_line + threadIdx.x) * p.plan.pieces + at.piece] = make_float2(all_peak, all_mass);
    }
  } else {
    __syncthreads();
    write_parts(p, first_line, at.piece, begin, begin + end);
  }
}

template <class T, int kDim>
int launch_mma(const LogitsParams& p, Stream stream) {
  using S = Shape<kDim>;
  const int64_t blocks = int64_t(p.rows) * p.heads * p.plan.pieces, shared = S::shared_bytes(p.group);
  return p.group <= kColumns
             ? KVCACHE_LAUNCH_DEPENDENT((logits_mma_kernel<T, kDim, true>), blocks, S::kThreads, shared, stream, p)
             : KVCACHE_LAUNCH_DEPENDENT((logits_mma_kernel<T, kDim, false>), blocks, S::kThreads, shared, stream, p);
}

// Head sizes, and for page_scores twice those; what lies between them takes the next one and reads zeros behind its end.
struct Instance {
  int dim;
  int64_t (*shared_bytes)(int group);
  int (*bf16_kernel)(const LogitsParams&, Stream);
  int (*f16_kernel)(const LogitsParams&, Stream);
};
template <int kDim>
constexpr Instance kInstance = {kDim, Shape<kDim>::shared_bytes, launch_mma<bf16, kDim>, launch_mma<f16, kDim>};
const Instance kInstances[] = {kInstance<64>,  kInstance<80>,  kInstance<96>,  kInstance<128>,
                               kInstance<192>, kInstance<256>, kInstance<384>, kInstance<512>};

const Instance* find(int dim) {
  for (const Instance& instance : kInstances) {
    if (dim <= instance.dim) return &instance;
  }
  return nullptr;
}

}  // namespace

bool fits_mma(const LogitsParams& p) {
  const Instance* instance = find(p.dim);
  return instance && p.dtype != DType::kFloat32 && p.q.dtype == p.dtype && p.dim % 8 == 0 &&
         reinterpret_cast<uintptr_t>(p.pool) % 16 == 0 && instance->shared_bytes(p.group) <= kMostShared;
}

int logits_mma(const LogitsParams& p, Stream stream) {
  const Instance* instance = find(p.dim);
  return (p.dtype == DType::kBFloat16 ? instance->bf16_kernel : instance->f16_kernel)(p, stream);
}

}  // namespace kvcache::cuda
