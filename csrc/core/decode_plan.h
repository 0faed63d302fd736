// How decode attention on a GPU shares its work among blocks ("workers"), as pure arithmetic for the device and the host.
//
// The entries of a (row, kv head), an "item", are counted in units of 64 entries, at least one, so that an item without
// entries also has somebody who writes its zeros. All units in a row form a line that is cut into equal shares, one for
// each worker: a long item is spread over many workers, many short ones are one worker's share. The size of a plan
// depends on the number of workers alone, and a worker finds everything in its own share.
//
// A kernel trusts a plan for who does what, not for counts: an item's last worker reads up to the count of the moment,
// the others stop there. So a plan made for other counts (a replayed graph) gives the right result, if less evenly.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define KVCACHE_EVERYWHERE __host__ __device__ __forceinline__
#else
#define KVCACHE_EVERYWHERE inline
#endif

namespace kvcache {

// Entries of a unit, a multiple of every kernel's tile; larger only where int32 could not count them.
constexpr int32_t kPlanUnit = 64;
// A worker's share is at least this many entries (if there are as many): a piece of an item costs a partial result.
constexpr int32_t kLeastShare = 128;

struct DecodePlanHead {
  int32_t items, unit;
  int32_t workers;  // that have a share
  int32_t unused[5];
};

// The items first .. last; of the first one only the units from first_unit on, of the last one those before last_end.
struct DecodeShare {
  int32_t first, first_unit, last, last_end;
  int32_t first_from, first_to;  // the workers that share the first item
  int32_t last_to;               // the last worker of the last item, which begins here unless it is also the first item
  int32_t unused;

  KVCACHE_EVERYWHERE bool empty() const { return last < first; }
};

struct DecodePlan {
  DecodePlanHead head;
  DecodeShare shares[1];  // [workers]
};

constexpr int64_t kPlanHeadInts = sizeof(DecodePlanHead) / sizeof(int32_t);
constexpr int64_t kShareInts = sizeof(DecodeShare) / sizeof(int32_t);

// int32 values of one layer's plan, and the number of workers of a plan of that size.
KVCACHE_EVERYWHERE int64_t decode_plan_size(int32_t workers) { return kPlanHeadInts + workers * kShareInts; }
KVCACHE_EVERYWHERE int32_t decode_plan_workers(int64_t size) {
  return size < kPlanHeadInts ? 0 : int32_t((size - kPlanHeadInts) / kShareInts);
}

// Two blocks fit a multiprocessor: one loads while the other ends an item.
KVCACHE_EVERYWHERE int32_t decode_workers(int32_t multiprocessors) {
  return multiprocessors > 0 ? 2 * multiprocessors : 1;
}

// --- the arithmetic of a plan

KVCACHE_EVERYWHERE int32_t plan_unit(int64_t items, int64_t most) {
  int32_t unit = kPlanUnit;
  while (unit < (1 << 30) && items * (most / unit + 1) > (int64_t(1) << 30)) unit *= 2;
  return unit;
}

KVCACHE_EVERYWHERE int32_t plan_units(int64_t entries, int64_t most, int32_t unit) {
  const int64_t n = entries < most ? entries : most;
  return n <= unit ? 1 : int32_t((n + unit - 1) / unit);
}

// Workers that get a share of `total` units.
KVCACHE_EVERYWHERE int32_t plan_busy(int64_t total, int32_t workers, int32_t unit) {
  const int64_t least = unit >= kLeastShare ? 1 : kLeastShare / unit, most = total / least;
  return most < 1 ? (total > 0 ? 1 : 0) : most < workers ? int32_t(most) : workers;
}

// First unit of a worker's share, and the worker whose share holds a unit.
KVCACHE_EVERYWHERE int64_t share_begin(int32_t worker, int64_t total, int32_t busy) { return worker * total / busy; }
KVCACHE_EVERYWHERE int32_t share_of(int64_t unit, int64_t total, int32_t busy) {
  return int32_t(((unit + 1) * busy - 1) / total);
}

// The two halves of a share, given the item (units begin .. begin + units of the line) that holds its first or last unit.
KVCACHE_EVERYWHERE void begin_share(DecodeShare& share, int32_t worker, int64_t total, int32_t busy, int32_t item,
                                    int64_t begin, int32_t units) {
  share.first = item;
  share.first_unit = int32_t(share_begin(worker, total, busy) - begin);
  share.first_from = share_of(begin, total, busy);
  share.first_to = share_of(begin + units - 1, total, busy);
}
KVCACHE_EVERYWHERE void end_share(DecodeShare& share, int32_t worker, int64_t total, int32_t busy, int32_t item,
                                  int64_t begin, int32_t units) {
  share.last = item;
  share.last_end = int32_t(share_begin(worker + 1, total, busy) - begin);
  share.last_to = share_of(begin + units - 1, total, busy);
  share.unused = 0;
}
KVCACHE_EVERYWHERE void empty_share(DecodeShare& share) { share = {0, 0, -1, 0, 0, 0, 0, 0}; }

// --- what a worker does with its share

// One worker's part of an item.
struct DecodePiece {
  int32_t begin, end;  // places: slots, or places in the list of what is read
  int32_t from, to;    // workers that share the item

  KVCACHE_EVERYWHERE bool whole() const { return from == to; }
  // Where the piece leaves its partial result: two places for each worker, as only a share's first item can have begun
  // before it and only its last one can end after it.
  KVCACHE_EVERYWHERE int32_t partial(int32_t worker) const { return 2 * worker + (worker == from ? 1 : 0); }
};

// Part of `item` in a share, for the item's number of places at the moment.
KVCACHE_EVERYWHERE DecodePiece decode_piece(const DecodeShare& share, int32_t worker, int32_t item, int32_t unit,
                                            int32_t places) {
  DecodePiece piece;
  piece.from = item == share.first ? share.first_from : worker;
  piece.to = item == share.first ? share.first_to : item == share.last ? share.last_to : worker;
  const int64_t begin = item == share.first ? int64_t(share.first_unit) * unit : 0;
  const int64_t end = piece.to == worker ? places : int64_t(share.last_end) * unit;
  piece.begin = int32_t(begin < places ? begin : places);
  piece.end = int32_t(end < places ? end : places);
  if (piece.end < piece.begin) piece.end = piece.begin;
  return piece;
}

// --- the planner on the host, one item after the other: what the device's must agree with

inline void plan_decode_on_host(const int32_t* counts, int32_t items, int32_t added, int64_t most, int32_t workers,
                                int32_t* out) {
  DecodePlan& plan = *reinterpret_cast<DecodePlan*>(out);
  const int32_t unit = plan_unit(items, most);
  int64_t total = 0;
  for (int32_t i = 0; i < items; ++i) total += plan_units(int64_t(counts[i]) + added, most, unit);
  const int32_t busy = plan_busy(total, workers, unit);
  plan.head = {items, unit, busy, {}};
  for (int32_t w = 0; w < workers; ++w) empty_share(plan.shares[w]);
  int64_t begin = 0;
  for (int32_t i = 0, w = 0; i < items; ++i) {
    const int32_t units = plan_units(int64_t(counts[i]) + added, most, unit);
    if (w > 0 && share_begin(w, total, busy) > begin) --w;  // it began before this item
    for (; w < busy && share_begin(w, total, busy) < begin + units; ++w) {
      const int64_t first = share_begin(w, total, busy), end = share_begin(w + 1, total, busy);
      if (first >= begin) begin_share(plan.shares[w], w, total, busy, i, begin, units);
      if (end <= begin + units) end_share(plan.shares[w], w, total, busy, i, begin, units);
    }
    begin += units;
  }
}

// --- how a block is laid out in shared memory

struct DecodeBlock {
  int32_t parts;   // warps that load, 16 entries each at a time
  int32_t stages;  // of the ring of each
  int32_t blocks;  // that fit a multiprocessor
};

// `part_bytes`: keys and values of 16 entries. `fixed(parts)` bytes are needed besides. `limit`: what one block may have;
// a multiprocessor has 1 KB more, and every block takes 1 KB for the system; its registers hold `most_blocks`. Wanted are 64 KB under way, which covers the
// latency of an H200's memory, and then as many warps as there can be.
template <class Fixed>
DecodeBlock decode_block(int64_t part_bytes, int64_t limit, int32_t most_blocks, Fixed fixed) {
  constexpr int64_t kSystem = 1024, kUnderWay = 64 * 1024;
  DecodeBlock best{0, 0, 0};
  int64_t best_score[3] = {-1, -1, -1};
  for (int32_t blocks = most_blocks; blocks >= 1; --blocks) {
    const int64_t room = (limit + kSystem) / blocks - kSystem;
    for (int32_t parts = 4; parts >= 1; parts /= 2) {
      int32_t stages = 6;
      while (stages > 1 && stages * parts * part_bytes + fixed(parts) > room) --stages;
      if (stages < 2) continue;
      const int64_t under_way = int64_t(blocks) * (stages - 1) * parts * part_bytes;
      const int64_t score[3] = {under_way < kUnderWay ? under_way : kUnderWay, blocks * parts, stages};
      int i = 0;
      while (i < 2 && score[i] == best_score[i]) ++i;
      if (score[i] <= best_score[i]) continue;
      for (i = 0; i < 3; ++i) best_score[i] = score[i];
      best = {parts, stages, blocks};
    }
  }
  return best;
}

}  // namespace kvcache
