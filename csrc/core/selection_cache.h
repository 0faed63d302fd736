// The rule of TokenSelect's Selection Cache (arXiv 2411.02886, Algorithm 1), the same on the CPU and on a GPU: whether a row
// chooses its entries anew in a decode step or goes on with the list it has.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define KVCACHE_RULE __host__ __device__
#else
#define KVCACHE_RULE
#endif

namespace kvcache {

enum SelectionChoice : int32_t { kReadsAll = 0, kSelects = 1, kReuses = 2 };

struct SelectionRow {
  bool asks;       // whether the row has a real query in this step
  int32_t held;    // entries that it holds, those of this step included
  int32_t at;      // entries that it held when it last chose; 0: it never did
  int32_t until;   // its list covers the slots from there on not yet
  int32_t listed;  // slots in the list
};

// `most`: sinks + k + local, which a row must exceed to choose at all; `width`: slots that a list has room for.
// static: an inline function would be a weak symbol that the instruction sets share.
[[maybe_unused]] KVCACHE_RULE static SelectionChoice selection_choice(const SelectionRow& row, int64_t most,
                                                                      int32_t local, int64_t width, float reuse,
                                                                      float similarity) {
  if (!row.asks || row.held <= most) return kReadsAll;
  // A list gains every token that leaves the window: after `local` of them it is made anew, unless it is for good.
  const bool expired = reuse > -1.0f && row.held - row.at > local;
  const bool full = int64_t(row.listed) + row.held - row.until > width;
  return row.at <= 0 || similarity < reuse || expired || full ? kSelects : kReuses;
}

// Slots by which a list grows (or shrinks: an undone step had more) when its row goes on with it.
[[maybe_unused]] KVCACHE_RULE static int32_t selection_growth(const SelectionRow& row, int64_t width) {
  const int64_t wanted = int64_t(row.held) - row.until, room = width - row.listed;
  const int64_t growth = wanted < room ? wanted : room;
  return int32_t(growth < -row.listed ? -row.listed : growth);
}

}  // namespace kvcache
