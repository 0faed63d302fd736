// Moving a head's last entry into another slot, in pieces that threads share: overwrite and evict.
#pragma once
#include "page_bounds.cuh"

namespace kvcache::cuda {

// Where one head's entries are. The page arrays are those of a PagedView, in units of Unit.
template <class Unit>
struct HeadEntries {
  Unit *k_pages, *v_pages;  // [pages, page_size, k_units], [pages, page_size, v_units]
  const int32_t* table;     // [table_width]
  int32_t* positions;       // [capacity]
  float* columns;           // [n_columns, capacity], column_step apart
  int64_t column_step;
  int page_size, k_units, v_units;

  // Unit `part` of an entry: keys first, then values.
  __device__ __forceinline__ Unit* unit(unsigned part, int slot) const {
    const bool keys = part < unsigned(k_units);
    const int row_units = keys ? k_units : v_units;
    Unit* pages = keys ? k_pages + part : v_pages + (part - k_units);
    return pages + entry_offset(table, slot, page_size, row_units);
  }
  // Part 0 is the position, part 1 + c column c.
  __device__ __forceinline__ void move_beside(unsigned part, int victim, int last) const {
    if (part == 0) {
      positions[victim] = positions[last];
    } else {
      float* column = columns + int64_t(part - 1) * column_step;
      column[victim] = column[last];
    }
  }
};

constexpr int kBoundBatch = 8;  // keys that a thread reads at once

// Part of 2 * (dim / n) parts of: bounds of the victim's page and of the page that the last entry left, from what they
// hold now, that is `last` entries of the head. A page that holds nothing any more keeps its own.
template <class T, int n>
__device__ __forceinline__ void bound_changed_page(unsigned part, const T* k_pages, T* bounds, const int32_t* table,
                                                   int page_size, int dim, int victim, int last) {
  const unsigned units = unsigned(dim) / n;
  const int of_victim = victim / page_size, of_last = last / page_size;
  const bool second = part >= units;
  if (second && of_last == of_victim) return;
  const int column = second ? of_last : of_victim, live = min(page_size, last - column * page_size);
  if (live <= 0) return;
  const int64_t page = table[column];
  const int channel = int(second ? part - units : part) * n;
  ChannelBounds<T, n> found;
  found.start();
  found.template include_rows<kBoundBatch>(k_pages + page * page_size * dim + channel, live, dim);
  found.store(bounds + page * 2 * dim + channel, dim);
}

}  // namespace kvcache::cuda
