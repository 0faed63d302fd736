// Absorbed latent attention (MLA): all query heads of a row against one latent per entry, which is key and value at once.
// Many heads share each entry, so this is a matrix product, bound by multiply-adds: the tiles and panels of prefill
// attention (included before), with a row of the tile holding [latent | rotary key] and its first part serving as the value.
// A tile is read from the pages once for all heads. Logits are in base 2.
#include "attention_plan.h"
#include "entry_tiles.h"
#include "query_tiles.h"

namespace kvcache::cpu::KVCACHE_ISA_NS {
namespace {

constexpr int kLatentKeys = 64;  // of a tile: 64 x 656 floats leave room in the L2 for the queries
constexpr int kMaxLatent = 512, kMaxRope = 128;
constexpr int kLatentStep = 656;  // floats between rows, as kRowStep
static_assert(kLatentStep >= kMaxLatent + kMaxRope && kLatentKeys <= kKeys && kLatentStep / 16 % 2 == 1);

// The parameters as the tiles of prefill attention want them: keys of latent and rope, values of the latent.
inline AttentionParams latent_as_heads(const LatentParams& all) {
  AttentionParams p = all.attention;
  p.view.k_dim = all.attention.view.k_dim + all.attention.view.v_dim;
  p.view.v_dim = all.attention.view.k_dim;
  return p;
}

// Slots and rows of the next tile of a head's entries next .. end - 1.
template <class T>
inline bool next_latents(const LatentParams& all, const Walk& walk, int64_t& next, int64_t end, const Range& reach,
                         KeyTile& tile) {
  const PagedView& view = all.attention.view;
  const int64_t size = view.page_size;
  for (;;) {
    if (next >= end) return false;
    tile.n = int(end - next < kLatentKeys ? end - next : kLatentKeys);
    tile.positions = Range();
    for (int i = 0; i < tile.n; ++i) {
      tile.slot[i] = int32_t(next + i);
      tile.position[i] = walk.positions[next + i];
    }
    tile.positions.add(tile.position, tile.n);
    next += tile.n;
    if (tile.positions.low <= reach.high && tile.positions.high >= reach.low) break;
  }
  const int64_t first = next - tile.n;
  int64_t page = first / size, inside = first % size;
  for (int i = 0; i < tile.n; ++page, inside = 0) {
    const int64_t line = int64_t(walk.table[page]) * size + inside;
    const char* latent = static_cast<const char*>(view.k_pages) + line * view.k_dim * int64_t(sizeof(T));
    const char* rope = static_cast<const char*>(view.v_pages) + line * view.v_dim * int64_t(sizeof(T));
    for (; inside < size && i < tile.n; ++inside, ++i) {
      float* row = tile.keys + i * kLatentStep;
      widen_row<T>(latent, view.dtype, view.k_dim, row);  // may write beyond the latent: before the rest
      widen_row<T>(rope, view.dtype, view.v_dim, row + view.k_dim);
      latent += view.k_dim * int64_t(sizeof(T)), rope += view.v_dim * int64_t(sizeof(T));
    }
  }
  return true;
}

// The logits kept for the statistics, [capacity, query_heads] of one row.
inline float* kept_lines(const LatentParams& all, int64_t row) {
  const AttentionParams& a = all.attention;
  return a.scratch + latent_partial_floats(all) + row * a.view.capacity * a.query_heads;
}

// Entries first .. first + n - 1 count for nothing with the panel's queries.
inline void keep_nothing(const AttentionParams& p, const QueryPanel& panel, int64_t first, int64_t n, float* kept) {
  for (int64_t i = first; i < first + n; ++i) {
    for (int m = 0; m < panel.used; ++m) kept[i * p.query_heads + panel.first + m] = -kInfinity;
  }
}

template <int V>
inline void attend_latents(const AttentionParams& p, const QueryBlock& block, QueryPanel& panel, const KeyTile& tile,
                           float* scores, float* kept) {
  int begin, end;
  score_tile<V, kLatentStep>(p, block, panel, tile, scores, begin, end);
  if (kept) {
    const int64_t first = tile.slot[0];
    keep_nothing(p, panel, first, begin, kept);
    keep_nothing(p, panel, first + end, tile.n - end, kept);
    for (int i = begin; i < end; ++i)
      memcpy(kept + (first + i) * p.query_heads + panel.first, scores + i * V * kLanes, size_t(panel.used) * 4);
  }
  weigh_tile<V, kLatentStep>(p, panel, tile, scores, begin, end);
}

// Output and log-sum-exp of query number `query` of all rows' from its sums [k_dim], which are used up.
inline void finish_latent(const AttentionParams& a, int64_t query, float peak, float mass, float* sums) {
  const int dim = a.view.k_dim;
  const float factor = mass == 0 ? 0.0f : 1.0f / mass;
  for (int i = 0; i < dim; ++i) sums[i] *= factor;
  convert_row(static_cast<char*>(a.out) + query * dim * element_size(a.q.dtype), a.q.dtype, sums, DType::kFloat32, dim);
  a.lse[query] = mass == 0 ? -kInfinity : (peak + log2f(mass)) * kLn2;
}

inline void leave_latents(const LatentParams& all, const QueryBlock& block, int64_t split) {
  const AttentionParams& a = all.attention;
  const int64_t queries = int64_t(a.tokens) * a.query_heads;  // of a row
  const int dim = a.view.k_dim;
  float plain[kMaxLatent];
  for (int i = 0; i < block.panels; ++i) {
    const QueryPanel& panel = block.panel[i];
    const int lanes = panel.vecs * kLanes;
    for (int m = 0; m < panel.used; ++m) {
      const int64_t query = block.token * a.query_heads + panel.first + m, token = query / a.query_heads;
      const bool real = !a.q_positions || a.q_positions[block.row * a.tokens + token] >= 0;
      const bool seen = real && panel.peak[m] != -kInfinity;
      const float peak = seen ? panel.peak[m] : -kInfinity, mass = seen ? panel.mass[m] : 0.0f;
      for (int d = 0; d < dim; ++d) plain[d] = seen ? panel.sums[d * lanes + m] : 0.0f;
      if (a.splits == 1) {
        finish_latent(a, block.row * queries + query, peak, mass, plain);
        continue;
      }
      float* partial = a.scratch + ((block.row * a.splits + split) * queries + query) * (dim + 2);
      partial[0] = peak, partial[1] = mass;
      memcpy(partial + 2, plain, size_t(dim) * 4);
    }
  }
}

template <class T>
inline void latent_items(const LatentParams& all, int64_t begin, int64_t end) {
  const AttentionParams p = latent_as_heads(all);
  const int block_tokens = prefill_query_block(p.query_heads, 1);
  const int64_t blocks = (p.tokens + block_tokens - 1) / block_tokens;
  QueryBlock block;
  block.group = p.query_heads, block.head = 0;
  const int64_t most_tokens = p.tokens < block_tokens ? p.tokens : block_tokens;
  const int64_t most_panels = (most_tokens * block.group + kPanel - 1) / kPanel;
  const int64_t v_rows = round_up(p.view.v_dim, kRows), tile_floats = int64_t(kLatentKeys + kRows) * kLatentStep;
  Arena arena(Arena::bytes_of(tile_floats) + Arena::bytes_of((kLatentKeys + kRows) * kPanel) +
              most_panels * (Arena::bytes_of(p.view.k_dim * kPanel) + Arena::bytes_of(v_rows * kPanel) +
                             4 * Arena::bytes_of(kPanel) + Arena::bytes_of(sizeof(QueryPanel) / 4)));
  KeyTile tile;
  tile.keys = tile.values = arena.floats(tile_floats);
  memset(tile.keys, 0,
         size_t(tile_floats) * 4);  // rows behind the tile's meet arithmetic, though nobody reads the results
  float* scores = arena.floats((kLatentKeys + kRows) * kPanel);
  block.panel = reinterpret_cast<QueryPanel*>(arena.floats(most_panels * int64_t(sizeof(QueryPanel)) / 4));
  for (int64_t i = 0; i < most_panels; ++i) {
    QueryPanel& panel = block.panel[i];
    panel.queries = arena.floats(p.view.k_dim * kPanel), panel.sums = arena.floats(v_rows * kPanel);
    panel.peak = arena.floats(kPanel), panel.mass = arena.floats(kPanel);
    panel.last = reinterpret_cast<int32_t*>(arena.floats(kPanel));
    panel.start = reinterpret_cast<int32_t*>(arena.floats(kPanel));
  }
  float plain[kMaxLatent + kMaxRope + kChunk];
  const auto load_query = [&](int64_t row, int64_t head, int64_t token) -> const float* {
    const auto part = [&](const Strided4& q, int dim, float* to) {
      const int64_t offset = row * q.stride[0] + head * q.stride[1] + token * q.stride[2];
      convert_row(to, DType::kFloat32, element(q.data, q.dtype, offset), q.dtype, dim);
    };
    part(all.attention.q, all.attention.view.k_dim, plain);
    part(all.q_rope, all.attention.view.v_dim, plain + all.attention.view.k_dim);
    return plain;
  };
  for (int64_t item = begin; item < end; ++item) {
    const int64_t line = item / p.splits, split = item % p.splits;
    block.row = line / blocks, block.token = line % blocks * block_tokens;
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
    const Walk walk = head_walk(p, block.row);
    const int64_t share = round_up((walk.count + p.splits - 1) / p.splits, 16);
    int64_t next = split * share < walk.count ? split * share : walk.count;
    const int64_t last = next + share < walk.count ? next + share : walk.count;
    float* kept = p.statistics ? kept_lines(all, block.row) : nullptr;  // then there is one block
    if (kept) {
      for (int i = 0; i < block.panels; ++i) keep_nothing(p, block.panel[i], next, last - next, kept);
    }
    while (next_latents<T>(all, walk, next, last, reach, tile)) {
      for (int i = 0; i < block.panels; ++i) {
        QueryPanel& panel = block.panel[i];
        if (tile.positions.low > panel.upper.high || tile.positions.high < panel.lower.low) continue;
        if (panel.vecs == kVecs) attend_latents<kVecs>(p, block, panel, tile, scores, kept);
        else if (panel.vecs == 2) attend_latents<2>(p, block, panel, tile, scores, kept);
        else attend_latents<1>(p, block, panel, tile, scores, kept);
      }
    }
    leave_latents(all, block, split);
  }
}

}  // namespace

static void latent_attention(const LatentParams& p, int64_t begin, int64_t end) {
  if (begin >= end) return;
  if (p.attention.view.dtype == DType::kFloat32) latent_items<float>(p, begin, end);
  else if (p.attention.view.dtype == DType::kBFloat16) latent_items<BFloat16>(p, begin, end);
  else latent_items<Float16>(p, begin, end);
}

static void latent_combine(const LatentParams& p, int64_t begin, int64_t end) {
  const AttentionParams& a = p.attention;
  const int64_t queries = int64_t(a.tokens) * a.query_heads;
  const int dim = a.view.k_dim;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / queries, query = item % queries;
    const auto partial = [&](int64_t split) {
      return a.scratch + ((row * a.splits + split) * queries + query) * (dim + 2);  // peak, mass, sums [dim]
    };
    float peak = -kInfinity, mass = 0, sums[kMaxLatent] = {};
    for (int s = 0; s < a.splits; ++s) peak = partial(s)[0] > peak ? partial(s)[0] : peak;
    for (int s = 0; s < a.splits; ++s) {
      const float* part = partial(s);
      if (part[0] == -kInfinity) continue;  // it saw nothing: -inf - -inf would be NaN
      const float weight = exp2f(part[0] - peak);
      mass += weight * part[1];
      for (int i = 0; i < dim; ++i) sums[i] += weight * part[2 + i];
    }
    finish_latent(a, item, peak, mass, sums);
  }
}

static void latent_statistics(const LatentParams& p, int64_t begin, int64_t end) {
  const AttentionParams& a = p.attention;
  const int64_t blocks = (a.view.capacity + kLatentColumns - 1) / kLatentColumns, heads = a.query_heads;
  const int64_t whole = heads / kLanes * kLanes;
  Arena arena(Arena::bytes_of(heads + kLanes));
  float* level = arena.floats(heads + kLanes);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / blocks, count = a.view.counts[row], first = item % blocks * kLatentColumns;
    const int64_t last = first + kLatentColumns < count ? first + kLatentColumns : count;
    if (first >= last) continue;
    for (int64_t h = 0; h < heads + kLanes; ++h) {
      const float lse = h < heads ? a.lse[row * heads + h] : 0.0f;
      level[h] = lse == -kInfinity ? 0.0f : lse * kLog2E;
    }
    const float* kept = kept_lines(p, row);  // [capacity, heads]
    float* statistics = a.statistics + row * a.view.capacity;
    for (int64_t i = first; i < last; ++i) {
      const float* line = kept + i * heads;
      Vec total = {};
      const auto add = [&](Vec logits, int64_t h) {
        const Vec chance = exp2(logits - load(level + h));
        total = a.statistics_max ? max(total, chance) : total + chance;
      };
      for (int64_t h = 0; h < whole; h += kLanes) add(load(line + h), h);
      if (whole < heads) {
        float rest[kLanes];
        for (int j = 0; j < kLanes; ++j) rest[j] = whole + j < heads ? line[whole + j] : -kInfinity;
        add(load(rest), whole);
      }
      const float chance = a.statistics_max ? reduce_max(total) : reduce_add(total) / float(heads);
      statistics[i] = statistics[i] * a.statistics_decay + chance;
    }
  }
}

}  // namespace kvcache::cpu::KVCACHE_ISA_NS
