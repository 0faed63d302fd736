// Prefill attention on tensor cores (mma.sync), online softmax, tiles of entries gathered from pages by cp.async.
//
// A block owns a tile of query rows (tokens with the query heads of their kv head side by side) and walks the tiles of
// entries that one of them sees. Two arrangements: warps own rows and share the entries (kKeyWarps = 1), or all warps have the
// same 16 rows and each takes its 16 entries of every tile, to be merged at the end (kRowWarps = 1: few queries).
// Logits are in base 2. A row's weights are taken against a peak that may lag behind the true one by kSlack: the sums
// need rescaling only when it moves, which is rare after the first tiles, and the result is the same.
#pragma once
#include "prefill_attention_rows.cuh"
#include "prefill_attention_scores.cuh"
#include "ptx/dependent_launch.cuh"

namespace kvcache::cuda {

// Rows of zeros where no real query is: padding may hold anything.
template <class C>
__device__ __forceinline__ void copy_queries(const AttentionParams& p, const PrefillBlock& block,
                                             const MmaMemory<C>& memory, int k_dim, bool aligned) {
  using T = typename C::T;
  const int chunks = k_dim / 8;
  for (int i = threadIdx.x; i < C::kRows * chunks; i += C::kThreads) {
    const int m = i / chunks, chunk = i % chunks;
    const bool full = memory.last[m] >= 0;
    const T* from = static_cast<const T*>(p.q.data) + (full ? query_offset(p, block, m) + chunk * 8 : 0);
    T* to = chunk_at(memory.queries, m, chunk, memory.k_width);
    if (aligned) {
      cp_async_16(to, from, full);
    } else {
      for (int j = 0; j < 8; ++j) to[j] = full ? from[j] : T{};
    }
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads)
    prefill_attention_mma(AttentionParams p, PrefillTiles tiles, bool aligned_queries) {
  using T = typename C::T;
  KVCACHE_DYNAMIC_SHARED(T, shared);
  const int k_dim = C::kPlain ? C::kV : p.view.k_dim, v_dim = C::kPlain ? C::kV : p.view.v_dim;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const MmaMemory<C> memory(shared, k_dim, v_dim, tiles.stages);
  MmaFacts& facts = *memory.facts;
  const PrefillBlock& block = facts.block;
  const Entries& entries = facts.entries;
  if (threadIdx.x == 0) {
    facts.block = prefill_block(p, tiles);
    facts.entries = Entries(p, block.item);
  }
  __syncthreads();
  const int pieces = prefill_pieces(tiles, entries.places);
  if (block.piece >= pieces) return;
  const int all_tiles = (entries.places + C::kKeys - 1) / C::kKeys, per_piece = (all_tiles + pieces - 1) / pieces;
  load_limits(p, block, C::kRows, memory.last, memory.start);
  __syncthreads();
  copy_queries(p, block, memory, k_dim, aligned_queries);
  const int first_row = C::kRowWarps == 1 ? 0 : warp * C::kRowTiles * 16;
  const int first_key = C::kKeyWarps == 1 ? 0 : warp * C::kWarpKeys;
  const Reach reach = reach_of(memory.last, memory.start, first_row, first_row + C::kRowTiles * 16);
  const Reach block_reach = reach_of(memory.last, memory.start, 0, C::kRows);
  if (lane == 0) facts.warp_reach[warp] = reach;
  if (threadIdx.x == 0) facts.reach = block_reach;
  __syncthreads();

  TileScan<C::kKeys, C::kThreads> scan(memory.scan, block.piece * per_piece,
                                       min((block.piece + 1) * per_piece, all_tiles));
  // The tile to be copied next, and this lane's entry of it. It is looked up one tile ahead, as each look-up waits for
  // the memory twice.
  const int copied = warp * C::kCopied + lane;
  int tile = -1, slot = -1, position = kNowhere;
  int64_t line = -1;
  auto look_up = [&] {
    tile = scan.pull(entries, facts.reach);
    if (tile < 0) return;
    slot = lane < C::kCopied ? entries.slot(tile * C::kKeys + copied) : -1;
    position = entries.position(slot);
    line = slot < 0 ? -1 : entries.line(slot);
  };
  auto copy = [&](int stage) {  // one group of copies, an empty one behind the last tile
    if (tile >= 0) {
      if (lane < C::kCopied) {
        memory.slot[stage * C::kKeys + copied] = slot;
        memory.position[stage * C::kKeys + copied] = position;
      }
      if (threadIdx.x == 0) memory.tile[stage] = scan.of(tile);
      const int first = warp * C::kCopied;
      copy_rows<T, C::kCopied>(static_cast<const T*>(p.view.k_pages), k_dim, k_dim, line < 0 ? -1 : line * k_dim,
                               memory.keys(stage), first, memory.k_width);
      copy_rows<T, C::kCopied>(static_cast<const T*>(p.view.v_pages), v_dim, (v_dim + 31) & ~31,
                               line < 0 ? -1 : line * v_dim, memory.values(stage), first, memory.v_width);
    }
    cp_async_commit();
  };

  MmaSums<C> sums;
#pragma unroll
  for (int i = 0; i < C::kRowTiles; ++i) {
#pragma unroll
    for (int n = 0; n < C::kV / 8; ++n)
      sums.out[i][n][0] = sums.out[i][n][1] = sums.out[i][n][2] = sums.out[i][n][3] = 0;
    sums.peak[i][0] = sums.peak[i][1] = -kInfinity;
    sums.mass[i][0] = sums.mass[i][1] = 0;
  }
  const float factor = C::kPlain ? p.scale * kLog2E : 1.0f;

  // One loop for the filling of the ring (step < 0) too: the code of a look-up and a copy is long. Where there is room for a
  // single tile, it is copied in the step that needs it.
  const int ahead = tiles.stages - 1;  // tiles that are under way while one is worked on
  int under_way = 0, stage = 0;
  for (int step = -1 - ahead;; ++step) {
    if (step >= 0) {
      if (under_way == 0 && tile < 0) break;
      if (ahead == 2) cp_async_wait<1>();
      else if (ahead == 1) cp_async_wait<0>();
      __syncthreads();  // this step's tile is there for all, and the one before is done with
    }
    if (step >= -ahead) {
      const int next = stage + under_way;
      copy(next < tiles.stages ? next : next - tiles.stages);
      if (tile >= 0) ++under_way;
    }
    if (tile >= 0 || step < -ahead) look_up();
    if (step < 0) continue;
    if (ahead == 0) {
      cp_async_wait<0>();
      __syncthreads();
    }
    --under_way;
    const Bounds here = memory.tile[stage];
    if (!facts.warp_reach[warp].hides(here)) {
      float scores[C::kRowTiles][C::kWarpKeys / 8][4];
      multiply_rows<T, C::kRowTiles, C::kWarpKeys, C::kPlain ? C::kV : 0>(memory.queries, first_row, memory.keys(stage),
                                                                          first_key, memory.k_width, k_dim, scores);
      const bool check = !facts.warp_reach[warp].shows(here);
      if (!C::kPlain || check) adjust<C>(p, block, memory, stage, first_row, first_key, check, scores);
      weigh<C>(factor, scores, sums);
      multiply_values<C>(memory, stage, v_dim, first_key, scores, sums);
    }
    stage = stage + 1 == tiles.stages ? 0 : stage + 1;
  }
  cp_async_wait<0>();
  launch_dependents();
  if constexpr (C::kKeyWarps == 1) {
    write_rows<C>(p, tiles, block, memory, v_dim, first_row, sums);
  } else {
    __syncthreads();
    merge_rows<C>(p, tiles, block, memory, v_dim, sums);
  }
}

template <class C>
int launch_prefill_mma(const AttentionParams& p, const PrefillTiles& tiles, Stream stream) {
  int64_t together = reinterpret_cast<uintptr_t>(p.q.data);
  for (int64_t stride : p.q.stride) together |= stride * 2;
  return KVCACHE_LAUNCH((prefill_attention_mma<C>), prefill_blocks(p, tiles), C::kThreads, tiles.shared_bytes, stream,
                        p, tiles, together % 16 == 0);
}

template <class T>
int launch_prefill(const AttentionParams& p, const PrefillTiles& tiles, Stream stream) {
  const bool plain = p.scale > 0 && p.softcap == 0 && !p.bias && !p.mask && p.view.k_dim == p.view.v_dim &&
                     p.view.v_dim == tiles.v_width;
  const bool wide = tiles.v_width == 256, narrow = tiles.v_width == 64;
  switch (tiles.kernel) {
    case PrefillKernel::kSmall:
      return wide     ? launch_prefill_mma<MmaConfig<T, 256, 1, 1, 2, 32, false>>(p, tiles, stream)
             : narrow ? launch_prefill_mma<MmaConfig<T, 64, 1, 1, 4, 64, false>>(p, tiles, stream)
                      : launch_prefill_mma<MmaConfig<T, 128, 1, 1, 4, 64, false>>(p, tiles, stream);
    case PrefillKernel::kMiddle:
      return wide     ? (plain ? launch_prefill_mma<MmaConfig<T, 256, 1, 4, 1, 32, true>>(p, tiles, stream)
                               : launch_prefill_mma<MmaConfig<T, 256, 1, 4, 1, 32, false>>(p, tiles, stream))
             : narrow ? (plain ? launch_prefill_mma<MmaConfig<T, 64, 1, 4, 1, 64, true>>(p, tiles, stream)
                               : launch_prefill_mma<MmaConfig<T, 64, 1, 4, 1, 64, false>>(p, tiles, stream))
                      : (plain ? launch_prefill_mma<MmaConfig<T, 128, 1, 4, 1, 64, true>>(p, tiles, stream)
                               : launch_prefill_mma<MmaConfig<T, 128, 1, 4, 1, 64, false>>(p, tiles, stream));
    default:
      return narrow ? (plain ? launch_prefill_mma<MmaConfig<T, 64, 2, 4, 1, 64, true>>(p, tiles, stream)
                             : launch_prefill_mma<MmaConfig<T, 64, 2, 4, 1, 64, false>>(p, tiles, stream))
                    : (plain ? launch_prefill_mma<MmaConfig<T, 128, 2, 4, 1, 64, true>>(p, tiles, stream)
                             : launch_prefill_mma<MmaConfig<T, 128, 2, 4, 1, 64, false>>(p, tiles, stream));
  }
}

}  // namespace kvcache::cuda
