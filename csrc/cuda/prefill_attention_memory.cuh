// The arrangements of prefill attention on tensor cores, and what their blocks keep in shared memory and registers.
#pragma once
#include "prefill_attention.cuh"
#include "prefill_mma.cuh"

namespace kvcache::cuda {

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

}  // namespace kvcache::cuda
