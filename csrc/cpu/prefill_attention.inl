// Prefill attention: a block of queries of one kv head, all query heads of its group side by side, against tiles of keys with
// an online softmax. Queries lie in lanes: scores come out as [keys, queries] and outputs as [v_dim, queries], so maxima,
// sums and rescaling work on whole vectors and the two products read keys and values as they are. Logits are in base 2.
#include "attention_plan.h"
#include "entry_tiles.h"
#include "query_tiles.h"

namespace kvcache::cpu::KVCACHE_ISA_NS {
namespace {

constexpr int kKeys = 128;         // of a tile
constexpr float kBuried = -2e38f;  // a bias of -inf: weightless, but the entry was read (that counts for sinks)
constexpr int kMaxDim = 256;

// The queries in the lanes of one panel and what they have summed.
struct QueryPanel {
  int vecs, used;         // vectors of the panel, lanes in use
  int first;              // index in the block of lane 0; query m is token m / group, head m % group
  Range upper, lower;     // of the real queries: last visible and first visible position
  int32_t *last, *start;  // [lanes] the same per lane; a lane without a query sees everything, nobody reads it
  float* queries;         // [k_dim, lanes]
  float *peak, *mass;     // [lanes]
  float* sums;            // [v_dim rounded up to kRows, lanes]

  bool reaches(int32_t position) const { return position <= upper.high && position >= lower.low; }
};

struct KeyTile {
  int n;
  Range positions;
  int32_t slot[kKeys], position[kKeys];
  float *keys, *values;  // [kKeys + kRows, kRowStep]
};

struct QueryBlock {
  int64_t row, head, token;  // first token
  int tokens, group, panels;
  QueryPanel* panel;
};

// Slots of the next tile: those in [next, end) of the head, or of its index list.
inline bool next_keys(const Walk& walk, int64_t& next, KeyTile& tile) {
  tile.n = 0;
  tile.positions = Range();
  for (; next < walk.end && tile.n < kKeys; ++next) {
    const int64_t slot = walk.index ? walk.index[next] : next;
    if (slot < 0 || slot >= walk.count) continue;
    tile.slot[tile.n] = int32_t(slot);
    tile.position[tile.n++] = walk.positions[slot];
  }
  tile.positions.add(tile.position, tile.n);
  return tile.n > 0;
}

template <class T>
inline void load_tile(const Walk& walk, KeyTile& tile) {
  const PagedView& view = *walk.view;
  const int64_t k_bytes = view.k_dim * int64_t(sizeof(T)), v_bytes = view.v_dim * int64_t(sizeof(T));
  int64_t page = -1, first = 0;
  for (int i = 0; i < tile.n; ++i) {
    if (page < 0 || tile.slot[i] < first ||
        tile.slot[i] >= first + view.page_size) {  // a division per page, not per entry
      page = tile.slot[i] / view.page_size;
      first = page * view.page_size;
    }
    const int64_t line = int64_t(walk.table[page]) * view.page_size + tile.slot[i] - first;
    widen_row<T>(static_cast<const char*>(view.k_pages) + line * k_bytes, view.dtype, view.k_dim,
                 tile.keys + i * kRowStep);
    widen_row<T>(static_cast<const char*>(view.v_pages) + line * v_bytes, view.dtype, view.v_dim,
                 tile.values + i * kRowStep);
  }
}

// What the plain product leaves out, on scores [begin .. end, lanes]: softcap, bias, positions, mask.
inline void adjust_scores(const AttentionParams& p, const QueryBlock& block, const QueryPanel& panel,
                          const KeyTile& tile, int begin, int end, bool check_positions, float* scores) {
  const int lanes = panel.vecs * kLanes;
  const int64_t first_head = block.head * block.group;
  if (p.softcap > 0) {
    const float to_cap = 1.0f / p.softcap, from_cap = p.softcap * kLog2E;
    for (int i = begin * lanes; i < end * lanes; i += kLanes)
      store(scores + i, tanh(load(scores + i) * to_cap) * from_cap);
  }
  if (p.bias) {
    const float* rows = p.bias + block.row * p.bias_heads * p.view.capacity;  // [bias_heads, capacity]
    float spread[kPanel] = {};
    for (int i = begin; i < end; ++i) {
      for (int m = 0; m < panel.used; ++m) {
        const int64_t head = shared_head(p.bias_heads, p, block.head, first_head + (panel.first + m) % block.group);
        spread[m] = rows[head * p.view.capacity + tile.slot[i]] * kLog2E;
      }
      float* line = scores + i * lanes;
      for (int j = 0; j < lanes; j += kLanes) store(line + j, max(splat(kBuried), load(line + j) + load(spread + j)));
    }
  }
  if (check_positions) {
    for (int i = begin; i < end; ++i) {
      const Int position = splat_int(tile.position[i]);
      for (int j = 0; j < lanes; j += kLanes) {
        float* x = scores + i * lanes + j;
        store(x, where_between(load(x), position, load_int(panel.start + j), load_int(panel.last + j)));
      }
    }
  }
  if (p.mask) {
    const int64_t line = block.row * p.mask_heads + (p.mask_heads == 1 ? 0 : block.head);
    for (int m = 0; m < panel.used; ++m) {
      const int64_t token = block.token + (panel.first + m) / block.group;
      const bool* seen = p.mask + (line * p.tokens + token) * p.view.capacity;  // [capacity]
      for (int i = begin; i < end; ++i) {
        if (!seen[tile.slot[i]]) scores[i * lanes + m] = -kInfinity;
      }
    }
  }
}

// Logits of a tile, [begin .. end, lanes]. kStep: floats from key to key of the tile. Entries at either end that no query of
// the panel sees are left out: on the diagonal that is half of the tile.
template <int V, int kStep>
inline void score_tile(const AttentionParams& p, const QueryBlock& block, const QueryPanel& panel, const KeyTile& tile,
                       float* scores, int& begin, int& end) {
  constexpr int kWidth = V * kLanes;
  begin = 0, end = tile.n;
  while (end > begin && !panel.reaches(tile.position[end - 1])) --end;
  while (end > begin && !panel.reaches(tile.position[begin])) ++begin;
  const Vec unused[V] = {};
  for (int i = begin; i < end; i += kRows)
    multiply<V>(tile.keys + i * kStep, kStep, 1, panel.queries, p.view.k_dim, nullptr, unused, scores + i * kWidth);
  const bool all_visible = tile.positions.high <= panel.upper.low && tile.positions.low >= panel.lower.high;
  if (!all_visible || p.softcap > 0 || p.bias || p.mask)
    adjust_scores(p, block, panel, tile, begin, end, !all_visible, scores);
}

// Turns logits into weights and adds the weighted values to what has been summed so far.
template <int V, int kStep>
inline void weigh_tile(const AttentionParams& p, QueryPanel& panel, const KeyTile& tile, float* scores, int begin,
                       int end) {
  constexpr int kWidth = V * kLanes;
  Vec shrink[V], level[V], mass[V];
  for (int j = 0; j < V; ++j) {
    const Vec old = load(panel.peak + j * kLanes);
    Vec peak = old, other = old;
    int i = begin;
    for (; i + 1 < end; i += 2) {
      peak = max(peak, load(scores + i * kWidth + j * kLanes));
      other = max(other, load(scores + (i + 1) * kWidth + j * kLanes));
    }
    if (i < end) peak = max(peak, load(scores + i * kWidth + j * kLanes));
    peak = max(peak, other);
    level[j] = max(splat(-1e38f), peak);  // nothing seen yet, or only buried entries: weights of 0 either way
    shrink[j] = exp2(old - level[j]);
    mass[j] = load(panel.mass + j * kLanes) * shrink[j];
    store(panel.peak + j * kLanes, peak);
  }
  for (int i = begin; i < end; ++i) {
    for (int j = 0; j < V; ++j) {
      const Vec weight = exp2(load(scores + i * kWidth + j * kLanes) - level[j]);
      mass[j] += weight;
      store(scores + i * kWidth + j * kLanes, weight);
    }
  }
  for (int j = 0; j < V; ++j) store(panel.mass + j * kLanes, mass[j]);
  for (int d = 0; d < p.view.v_dim; d += kRows) {
    float* sums = panel.sums + d * kWidth;
    multiply<V>(tile.values + begin * kStep + d, 1, kStep, scores + begin * kWidth, end - begin, sums, shrink, sums);
  }
}

template <int V>
inline void attend_tile(const AttentionParams& p, const QueryBlock& block, QueryPanel& panel, const KeyTile& tile,
                        float* scores) {
  int begin, end;
  score_tile<V, kRowStep>(p, block, panel, tile, scores, begin, end);
  weigh_tile<V, kRowStep>(p, panel, tile, scores, begin, end);
}

// Lays out the block's queries in panels and clears their sums. Returns what of the positions they see at most.
// load(row, query_head, token) -> [k_dim] floats.
template <class Load>
inline Range start_block(const AttentionParams& p, QueryBlock& block, const Load& load) {
  const int dim = p.view.k_dim;
  Range reach;
  for (int i = 0; i < block.panels; ++i) {
    QueryPanel& panel = block.panel[i];
    const int lanes = panel.vecs * kLanes;
    panel.upper = panel.lower = Range();
    memset(panel.queries, 0, size_t(dim) * lanes * 4);
    memset(panel.sums, 0, size_t(round_up(p.view.v_dim, kRows)) * lanes * 4);
    for (int m = 0; m < lanes; ++m) {
      panel.peak[m] = -kInfinity, panel.mass[m] = 0;
      panel.last[m] = INT32_MAX, panel.start[m] = INT32_MIN;
      if (m >= panel.used) continue;
      const int64_t token = block.token + (panel.first + m) / block.group, place = block.row * p.tokens + token;
      const int64_t query_head = block.head * block.group + (panel.first + m) % block.group;
      const int32_t last = p.q_positions ? p.q_positions[place] : INT32_MAX;
      if (last < 0) continue;
      panel.last[m] = last;
      if (p.window_start) panel.start[m] = p.window_start[place];
      panel.upper.add(last), panel.lower.add(panel.start[m]);
      reach.add(last), reach.add(panel.start[m]);
      fill_lane(load(block.row, query_head, token), dim, p.softcap > 0 ? p.scale : p.scale * kLog2E, lanes, m,
                panel.queries);
    }
  }
  return reach;
}

inline void finish_block(const AttentionParams& p, const QueryBlock& block) {
  float plain[kMaxDim];
  for (int i = 0; i < block.panels; ++i) {
    const QueryPanel& panel = block.panel[i];
    const int lanes = panel.vecs * kLanes;
    for (int m = 0; m < panel.used; ++m) {
      const int64_t token = block.token + (panel.first + m) / block.group;
      const int64_t query_head = block.head * block.group + (panel.first + m) % block.group;
      const bool real = !p.q_positions || p.q_positions[block.row * p.tokens + token] >= 0;
      const bool weighty = real && panel.peak[m] > -1e38f;
      for (int d = 0; d < p.view.v_dim; ++d) plain[d] = weighty ? panel.sums[d * lanes + m] : 0.0f;
      finish_query(p, block.row, query_head, token, real && panel.peak[m] != -kInfinity,
                   weighty ? panel.peak[m] : -kInfinity, weighty ? panel.mass[m] : 0.0f, plain);
    }
  }
}

template <class T>
inline void prefill_items(const AttentionParams& p, int64_t begin, int64_t end) {
  const int block_tokens = prefill_query_block(p.query_heads, p.view.heads);
  const int64_t blocks = (p.tokens + block_tokens - 1) / block_tokens;
  QueryBlock block;
  block.group = p.query_heads / p.view.heads;
  const int64_t most = int64_t(block_tokens) * block.group, most_panels = (most + kPanel - 1) / kPanel;
  const int64_t v_rows = round_up(p.view.v_dim, kRows);
  Arena arena(2 * Arena::bytes_of((kKeys + kRows) * kRowStep) + Arena::bytes_of((kKeys + kRows) * kPanel) +
              most_panels * (Arena::bytes_of(p.view.k_dim * kPanel) + Arena::bytes_of(v_rows * kPanel) +
                             4 * Arena::bytes_of(kPanel) + Arena::bytes_of(sizeof(QueryPanel) / 4)));
  KeyTile tile;
  tile.keys = arena.floats((kKeys + kRows) * kRowStep), tile.values = arena.floats((kKeys + kRows) * kRowStep);
  memset(tile.keys, 0,
         (kKeys + kRows) * kRowStep * 4);  // padded rows and columns meet arithmetic, though nobody reads the results
  memset(tile.values, 0, (kKeys + kRows) * kRowStep * 4);
  float* scores = arena.floats((kKeys + kRows) * kPanel);
  block.panel = reinterpret_cast<QueryPanel*>(arena.floats(most_panels * int64_t(sizeof(QueryPanel)) / 4));
  for (int64_t i = 0; i < most_panels; ++i) {
    QueryPanel& panel = block.panel[i];  // start_block sets the rest
    panel.queries = arena.floats(p.view.k_dim * kPanel), panel.sums = arena.floats(v_rows * kPanel);
    panel.peak = arena.floats(kPanel), panel.mass = arena.floats(kPanel);
    panel.last = reinterpret_cast<int32_t*>(arena.floats(kPanel));
    panel.start = reinterpret_cast<int32_t*>(arena.floats(kPanel));
  }
  float plain[kMaxDim + kChunk];
  const auto load_query = [&](int64_t row, int64_t query_head, int64_t token) -> const float* {
    const int64_t offset = row * p.q.stride[0] + query_head * p.q.stride[1] + token * p.q.stride[2];
    convert_row(plain, DType::kFloat32, element(p.q.data, p.q.dtype, offset), p.q.dtype, p.view.k_dim);
    return plain;
  };
  for (int64_t item = begin; item < end; ++item) {
    const int64_t line = item / blocks;
    block.row = line / p.view.heads, block.head = line % p.view.heads;
    block.token = item % blocks * block_tokens;
    block.tokens = int(p.tokens - block.token < block_tokens ? p.tokens - block.token : block_tokens);
    const int queries = block.tokens * block.group;
    block.panels = (queries + kPanel - 1) / kPanel;
    for (int i = 0; i < block.panels; ++i) {
      QueryPanel& panel = block.panel[i];
      panel.first = i * kPanel;
      panel.used = queries - panel.first < kPanel ? queries - panel.first : kPanel;
      panel.vecs = (panel.used + kLanes - 1) / kLanes;
    }
    const Range reach = start_block(p, block, load_query);
    Walk walk = head_walk(p, line);
    int64_t next = 0;
    while (next_keys(walk, next, tile)) {
      if (tile.positions.low > reach.high || tile.positions.high < reach.low) continue;
      load_tile<T>(walk, tile);
      for (int i = 0; i < block.panels; ++i) {
        QueryPanel& panel = block.panel[i];
        if (tile.positions.low > panel.upper.high || tile.positions.high < panel.lower.low) continue;
        if (panel.vecs == kVecs) attend_tile<kVecs>(p, block, panel, tile, scores);
        else if (panel.vecs == 2) attend_tile<2>(p, block, panel, tile, scores);
        else attend_tile<1>(p, block, panel, tile, scores);
      }
    }
    finish_block(p, block);
  }
}

}  // namespace

static void prefill_attention(const AttentionParams& p, int64_t begin, int64_t end) {
  if (begin >= end) return;
  if (p.view.dtype == DType::kFloat32) prefill_items<float>(p, begin, end);
  else if (p.view.dtype == DType::kBFloat16) prefill_items<BFloat16>(p, begin, end);
  else prefill_items<Float16>(p, begin, end);
}

}  // namespace kvcache::cpu::KVCACHE_ISA_NS
