// Walks the entries that a head reads in tiles of row pointers, and dots such a tile with all queries of its group.
// Shared by decode attention and selection scores. Needs convert.inl before it.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace kvcache::cpu::KVCACHE_ISA_NS {
namespace {

constexpr int kTile =
    128;  // entries; at 128 x float32 a tile of keys and one of values are 64 KB each, well within the L2

// What a walk covers: candidates begin .. end, which are slots, or places in `index` when there is one. An index of
// pages has page_size places for each.
struct Walk {
  const PagedView* view;
  const int32_t* table;      // [table_width]
  const int32_t* positions;  // [capacity]
  const int32_t* index;      // [index_count] or null
  int64_t count;             // entries that the head holds; slots beyond hold garbage
  int32_t window_start;      // INT32_MIN: no window
  int64_t next, end;         // candidates still to visit
  bool keys_only = false;
  bool index_pages = false;

  // The slot of a candidate; beyond the count or negative where there is none.
  int64_t slot(int64_t candidate) const {
    if (!index) return candidate;
    if (!index_pages) return index[candidate];
    const uint32_t place = uint32_t(candidate), size = uint32_t(view->page_size);
    return int64_t(index[place / size]) * size + place % size;
  }
  bool filtered() const { return index || window_start != INT32_MIN; }
};

constexpr int kStreams = 4;  // places of a tile that are fetched in turns, see Ahead

struct Tile {
  int n;            // entries, at most kTile
  bool contiguous;  // candidate i is first + i, and so is its slot
  int64_t first;
  const char* k[kTile + kLanes];  // rows; behind n the last one repeats
  const char* v[kTile + kLanes];
  int32_t slot[kTile], candidate[kTile];  // filled unless contiguous
};

inline void finish_rows(Tile& tile) {
  for (int i = tile.n; i < kTile + kLanes; ++i) tile.k[i] = tile.k[tile.n - 1], tile.v[i] = tile.v[tile.n - 1];
}

// The next tile of visible entries; false when none is left.
inline bool next_tile(Walk& walk, Tile& tile) {
  const PagedView& view = *walk.view;
  const int64_t size = view.page_size;
  const int64_t k_bytes = view.k_dim * element_size(view.dtype), v_bytes = view.v_dim * element_size(view.dtype);
  const char* k_pages = static_cast<const char*>(view.k_pages);
  const char* v_pages = walk.keys_only ? nullptr : static_cast<const char*>(view.v_pages);
  tile.n = 0;
  tile.first = walk.next;
  tile.contiguous = !walk.filtered();
  if (tile.contiguous) {
    int64_t page = walk.next / size, inside = walk.next % size;
    const int n = int(walk.end - walk.next < kTile ? walk.end - walk.next : kTile);
    while (tile.n < n) {
      const int64_t row = walk.table[page] * size + inside;
      const char* k = k_pages + row * k_bytes;
      const char* v = v_pages ? v_pages + row * v_bytes : k;
      for (; inside < size && tile.n < n; ++inside, ++tile.n, k += k_bytes, v += v_bytes)
        tile.k[tile.n] = k, tile.v[tile.n] = v;
      inside = 0;
      ++page;
    }
    walk.next += n;
  } else {
    for (; walk.next < walk.end && tile.n < kTile; ++walk.next) {
      const int64_t slot = walk.slot(walk.next);
      if (slot < 0 || slot >= walk.count || walk.positions[slot] < walk.window_start) continue;
      const uint32_t page = uint32_t(slot) / uint32_t(size);  // half the time of a 64-bit division
      const int64_t row = walk.table[page] * size + (slot - page * size);
      tile.k[tile.n] = k_pages + row * k_bytes;
      tile.v[tile.n] = v_pages ? v_pages + row * v_bytes : tile.k[tile.n];
      tile.slot[tile.n] = int32_t(slot);
      tile.candidate[tile.n++] = int32_t(walk.next);
    }
  }
  if (tile.n == 0) return false;
  finish_rows(tile);
  return true;
}

// Queries of one group as float32, scaled, in the lane order of T's chunks and zero behind dim: [group, chunks, kChunk].
template <class T>
inline void pack_queries(const Strided4& q, int64_t row, int64_t first_head, int group, int dim, float scale,
                         float* packed) {
  const int chunks = (dim + kChunk - 1) / kChunk;
  float plain[256 + kChunk];
  for (int g = 0; g < group; ++g) {
    const int64_t offset = row * q.stride[0] + (first_head + g) * q.stride[1];
    convert_row(plain, DType::kFloat32, static_cast<const char*>(q.data) + offset * element_size(q.dtype), q.dtype,
                dim);
    float* target = packed + int64_t(g) * chunks * kChunk;
    for (int i = 0; i < chunks * kChunk; ++i) {
      target[i / kChunk * kChunk + Storage<T>::lane(i % kChunk)] = i < dim ? plain[i] * scale : 0.0f;
    }
  }
}

// One chunk of dot_rows: sums[h][i] += q[h] . rows[i].
template <class T, int H, bool kRest>
inline __attribute__((always_inline)) void dot_chunk(const char* const* rows, const float* q, int64_t q_stride, int c,
                                                     int rest, Vec (&sums)[kLanes]) {
  constexpr int kRows = kLanes / H;
  Vec q0[H], q1[H];
#pragma GCC unroll 4
  for (int h = 0; h < H; ++h) {
    q0[h] = load(q + h * q_stride + c * kChunk);
    q1[h] = load(q + h * q_stride + c * kChunk + kLanes);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    Vec k0, k1;
    const T* k = reinterpret_cast<const T*>(rows[i]) + c * kChunk;
    if constexpr (kRest) Storage<T>::load_first(k, rest, k0, k1);
    else Storage<T>::load_chunk(k, k0, k1);
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) sums[h * kRows + i] = add_product(k0, q0[h], sums[h * kRows + i]);
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) sums[h * kRows + i] = add_product(k1, q1[h], sums[h * kRows + i]);
  }
}

// Dots of H queries with kLanes / H rows: every accumulator is one (query, row) pair, and one transposed sum ends them all.
template <class T, int H>
inline void dot_rows(const char* const* rows, const float* q, int dim, float* logits) {
  constexpr int kRows = kLanes / H;
  const int whole = dim / kChunk, rest = dim % kChunk, stride = (dim + kChunk - 1) / kChunk * kChunk;
  Vec sums[kLanes] = {};
  for (int c = 0; c < whole; ++c) dot_chunk<T, H, false>(rows, q, stride, c, 0, sums);
  if (rest) dot_chunk<T, H, true>(rows, q, stride, whole, rest, sums);
  const Vec sum = transpose_sum(sums);
  if constexpr (H == 1) {
    store(logits, sum);
  } else {
    float lanes[kLanes];
    store(lanes, sum);
    for (int h = 0; h < H; ++h) memcpy(logits + h * kTile, lanes + h * kRows, kRows * 4);
  }
}

// The rows of a tile that is read next, asked for at the pace at which the current one is worked through: bursts would fill
// the line buffers and then leave the memory idle. Into the second cache level, where the hardware's prefetcher joins in.
// That one needs a few misses at the start of every 4 KB before it runs ahead, hence the streams: a line of one page, then
// one of the next. (Measured on Zen 3, shuffled pages of 4 KB, GB/s: a page after the other 5, rows in turns 6, lines in
// turns 8, where a plain stream reaches 9.)
struct Ahead {
  const char* const* rows;  // [kTile]
  int64_t bytes;            // of a row; 0: nothing follows
  int pairs, steps;         // of lines, to be asked for in so many steps
  int credit = 0, turn = 0, stream = 0;
  int64_t line = 0;

  Ahead(const char* const* rows, int64_t bytes, int64_t steps)
      : rows(rows), bytes(bytes), pairs(int((bytes + 63) / 64) * (kTile / 2)), steps(int(steps)) {}

  void step() {
    constexpr int kRowsOfStream = kTile / kStreams;
    for (credit += pairs; credit >= steps; credit -= steps) {
      __builtin_prefetch(rows[turn + stream] + line, 0, 2);
      __builtin_prefetch(rows[turn + stream + kRowsOfStream] + line, 0, 2);
      if ((stream += 2 * kRowsOfStream) < kTile) continue;
      stream = 0;
      if ((line += 64) < bytes) continue;
      line = 0;
      ++turn;
    }
  }
};

// Heads that are dotted at once: with more, their queries would not fit the registers beside the sums.
constexpr int kDotHeads = kLanes == 16 ? 4 : 2;

// Dots of H heads with kLanes rows, in H parts.
template <class T, int H>
inline void dot_heads(const char* const* rows, Ahead& ahead, const float* q, int dim, float* logits) {
  for (int i = 0; i < kLanes; i += kLanes / H) {
    ahead.step();
    dot_rows<T, H>(rows + i, q, dim, logits + i);
  }
}

// Steps that dot_tile takes over a whole tile.
inline int64_t dot_steps(int group) { return int64_t(kTile / kLanes) * group; }

// -inf in the lanes between a tile's last entry and the end of its vector.
inline void hide_tail(const Tile& tile, int group, float* logits) {
  for (int g = 0; g < group; ++g) {
    for (int i = tile.n; i % kLanes != 0; ++i) logits[g * kTile + i] = -kInfinity;
  }
}

// logits[group][kTile] = q . k for a tile, -inf behind its entries up to a whole vector.
template <class T>
inline void dot_tile(const Tile& tile, Ahead& ahead, const float* q, int group, int dim, float* logits) {
  const int stride = (dim + kChunk - 1) / kChunk * kChunk;
  for (int i = 0; i < tile.n; i += kLanes) {
    for (int g = 0; g < group;) {
      const int left = group - g;
      const float* heads = q + g * stride;
      float* to = logits + g * kTile + i;
      if (left >= kDotHeads) dot_heads<T, kDotHeads>(tile.k + i, ahead, heads, dim, to), g += kDotHeads;
      else if (left >= 2) dot_heads<T, 2>(tile.k + i, ahead, heads, dim, to), g += 2;
      else dot_heads<T, 1>(tile.k + i, ahead, heads, dim, to), g += 1;
    }
  }
  hide_tail(tile, group, logits);
}

// Writes a query's output and log-sum-exp; `sums` is [v_dim] in plain order and is used up. `any`: it read an entry.
inline void finish_query(const AttentionParams& p, int64_t row, int64_t query_head, int64_t token, bool any, float peak,
                         float mass, float* sums) {
  const int dim = p.view.v_dim;
  if (p.sinks && any) {
    const float sink = p.sinks[query_head] * kLog2E, top = sink > peak ? sink : peak;
    const float shrink = peak == -kInfinity ? 0.0f : exp2f(peak - top);
    mass = mass * shrink + (top == -kInfinity ? 0.0f : exp2f(sink - top));
    for (int i = 0; i < dim; ++i) sums[i] *= shrink;
    peak = top;
  }
  const float factor = mass == 0 ? 0.0f : 1.0f / mass;
  for (int i = 0; i < dim; ++i) sums[i] *= factor;
  const int64_t place = (row * p.tokens + token) * p.query_heads + query_head;
  convert_row(static_cast<char*>(p.out) + place * dim * element_size(p.q.dtype), p.q.dtype, sums, DType::kFloat32, dim);
  p.lse[(row * p.query_heads + query_head) * p.tokens + token] = mass == 0 ? -kInfinity : (peak + log2f(mass)) * kLn2;
}

// All candidates of one (row, head), without a window.
inline Walk head_walk(const AttentionParams& p, int64_t item) {
  const int64_t row = item / p.view.heads, head = item % p.view.heads;
  const int64_t list = row * p.index_heads + (p.index_heads == 1 ? 0 : head);
  Walk walk;
  walk.view = &p.view;
  walk.table = p.view.table + item * p.view.table_width;
  walk.positions = p.view.positions + item * p.view.capacity;
  walk.index = p.index ? p.index + list * p.index_width : nullptr;
  walk.count = p.view.counts[item];
  walk.window_start = INT32_MIN;
  walk.next = 0;
  walk.index_pages = p.index && p.index_pages;
  walk.end = !p.index ? walk.count : p.index_counts[list] * (p.index_pages ? int64_t(p.view.page_size) : 1);
  return walk;
}

// The head of a [rows, 1 | heads | query_heads, ...] argument that a query head reads.
inline int64_t shared_head(int32_t argument_heads, const AttentionParams& p, int64_t head, int64_t query_head) {
  return argument_heads == 1 ? 0 : argument_heads == p.query_heads ? query_head : head;
}

}  // namespace
}  // namespace kvcache::cpu::KVCACHE_ISA_NS
