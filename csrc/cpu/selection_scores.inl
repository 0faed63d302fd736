// Selection scores: how much the query heads vote for each candidate. Memory-bound like decode: every key is read once
// for its whole group. A tile of logits becomes weights relative to its own peak at once, while it is in the cache; the
// vote, which reads them anyway, multiplies each tile by what makes the head's weights a softmax. So tiles do not depend on
// each other, and a head can be cut among threads.
//
// Candidates are entries, or pages known by their bounds: sum_d max(q_d min_d, q_d max_d) is the product of
// [min(q, 0), max(q, 0)] with a page's [min, max], so bounds are keys twice as wide in pages of one entry.
#include "attention_plan.h"
#include "entry_tiles.h"

namespace kvcache::cpu::KVCACHE_ISA_NS {
namespace {

static_assert(kTile == kPlaceTile);

// One op's call, of either kind. A place is a slot, a number within the entries of the listed pages, or a column.
struct Election {
  const PagedView* view;
  const Strided4* q;
  const int32_t *first, *end;
  int query_heads;
  float scale;
  bool soft, per_head;
  // Of entries: [rows, per_head ? heads : 1, page_width], and how many; page_counts null: all. (An empty list may be null.)
  const int32_t *pages, *page_counts;
  int64_t page_width;
  const void* bounds;  // of pages; null: entries
  int64_t width;       // places of a line
  float *scores, *scratch;

  int64_t tiles() const { return place_pieces(width, kTile); }
  float* weights(int64_t row, int64_t query_head) const {  // [width], then [tiles] peaks and [tiles] masses
    return scratch + (row * query_heads + query_head) * selection_line_floats(width);
  }
};

inline Election election_of(const SelectionParams& p) {
  const int64_t width = p.page_counts ? p.page_width * p.view.page_size : p.view.capacity;
  return {&p.view, &p.q,          p.first,      p.end,   p.query_heads, p.scale,  p.soft,   p.per_head,
          p.pages, p.page_counts, p.page_width, nullptr, width,         p.scores, p.scratch};
}

inline Election election_of(const PageScoresParams& p) {
  return {&p.view, &p.q,    p.first, p.end,    p.query_heads,      p.scale,  p.soft,   p.per_head,
          nullptr, nullptr, 0,       p.bounds, p.view.table_width, p.scores, p.scratch};
}

// The places of one head that hold something, all of them alive.
struct Places {
  const char* pool;  // [., segment] rows
  int64_t row_bytes;
  int64_t segment;           // rows that lie together: a page's entries
  const int32_t* table;      // [table_width]
  const int32_t* list;       // columns of the table or null: all
  const int32_t* positions;  // [capacity], or null: whatever is there is a candidate
  int64_t n, next;
};

inline Places places_of(const Election& e, int64_t row, int64_t head) {
  const PagedView& view = *e.view;
  const int64_t line = row * view.heads + head, count = view.counts[line], size = view.page_size;
  const int64_t element = view.dtype == DType::kFloat32 ? 4 : 2, dim = e.bounds ? 2 * view.k_dim : view.k_dim;
  Places places = {static_cast<const char*>(e.bounds ? e.bounds : view.k_pages),
                   dim * element,
                   e.bounds ? 1 : size,
                   view.table + line * view.table_width,
                   nullptr,
                   e.bounds ? nullptr : view.positions + line * view.capacity,
                   e.bounds ? (count + size - 1) / size : count,
                   0};
  if (e.page_counts) {
    const int64_t list = e.per_head ? line : row, listed = e.page_counts[list];
    places.list = e.pages + list * e.page_width;
    places.n = listed * size;
    if (listed > 0) {  // only a head's last page may be partly filled
      const int64_t missing = (places.list[listed - 1] + 1) * size - count;
      places.n -= missing > 0 ? missing : 0;
    }
  }
  return places;
}

// The next tile, and the positions [kTile] of its entries (0 where they do not matter).
inline bool next_tile(Places& places, Tile& tile, int32_t* positions) {
  const int64_t left = places.n - places.next;
  const int n = int(left < kTile ? left : kTile);
  if (n <= 0) return false;
  tile.n = 0;
  tile.first = places.next;
  tile.contiguous = true;
  while (tile.n < n) {
    const int64_t place = places.next + tile.n, inside = place % places.segment;
    const int64_t column = places.list ? places.list[place / places.segment] : place / places.segment;
    const char* row = places.pool + (places.table[column] * places.segment + inside) * places.row_bytes;
    const int64_t room = places.segment - inside, wanted = n - tile.n, take = room < wanted ? room : wanted;
    if (places.positions) {
      memcpy(positions + tile.n, places.positions + column * places.segment + inside, size_t(take) * 4);
    } else {
      memset(positions + tile.n, 0, size_t(take) * 4);
    }
    for (int64_t i = 0; i < take; ++i, row += places.row_bytes) tile.k[tile.n++] = row;
  }
  for (int i = n; i < kTile + kLanes; ++i) tile.k[i] = tile.k[n - 1];
  places.next += n;
  return true;
}

// The queries of a group as pack_queries gives them, for bounds twice as wide.
template <class T>
inline void pack_voters(const Election& e, int64_t row, int64_t first_head, int group, float scale, float* packed) {
  const int dim = e.view->k_dim;
  if (!e.bounds) return pack_queries<T>(*e.q, row, first_head, group, dim, scale, packed);
  const int64_t stride = round_up(2 * dim, kChunk);
  float plain[256];
  for (int g = 0; g < group; ++g) {
    const int64_t offset = row * e.q->stride[0] + (first_head + g) * e.q->stride[1];
    convert_row(plain, DType::kFloat32, element(e.q->data, e.q->dtype, offset), e.q->dtype, dim);
    float* target = packed + g * stride;
    for (int i = 0; i < stride; ++i) {
      const float x = i < 2 * dim ? plain[i < dim ? i : i - dim] : 0.0f;
      const bool other_sign = i < dim ? x > 0 : x < 0;  // false for a NaN, which stays in both halves
      target[i / kChunk * kChunk + Storage<T>::lane(i % kChunk)] = other_sign ? 0.0f : x * scale;
    }
  }
}

// Steps of `weigh_tile` over a whole tile.
inline int64_t weigh_steps(int group) { return int64_t(kTile / kChunk) * group; }

// Hides what is no candidate in a tile of logits [group, kTile] and makes weights of them, relative to each head's peak.
inline void weigh_tile(const Tile& tile, int32_t* position, int32_t first, int32_t last, int group, Ahead& ahead,
                       float* logits, float* peaks, float* masses) {
  for (int i = tile.n; i % kLanes != 0; ++i) position[i] = 0;  // hidden by dot_tile
  for (int g = 0; g < group; ++g) {
    float* line = logits + g * kTile;
    Vec top = splat(-kInfinity);
    for (int i = 0; i < tile.n; i += kLanes) {
      const Vec x = where_between(load(line + i), load_int(position + i), splat_int(first), splat_int(last));
      top = max(top, x);
      store(line + i, x);
    }
    peaks[g] = reduce_max(top);
    const Vec level = splat(peaks[g] == -kInfinity ? 0.0f : peaks[g]);
    Vec mass = {};
    for (int i = 0; i < tile.n; i += kLanes) {
      if (i % kChunk == 0) ahead.step();
      const Vec weight = exp2(load(line + i) - level);
      mass += weight;
      store(line + i, weight);
    }
    masses[g] = reduce_add(mass);  // NaN where a logit is, which shall show
  }
}

template <class T>
inline void vote_logits(const Election& e, int64_t begin, int64_t end) {
  const PagedView& view = *e.view;
  const int group = e.query_heads / view.heads, dim = e.bounds ? 2 * view.k_dim : view.k_dim;
  const int64_t stride = round_up(dim, kChunk), row_bytes = dim * int64_t(sizeof(T)), tiles_of_line = e.tiles();
  const int64_t pieces = place_pieces(e.width, kLogitPlaces);
  const int64_t steps = dot_steps(group) + (e.soft ? weigh_steps(group) : 0);
  Arena arena(Arena::bytes_of(group * stride) + Arena::bytes_of(group * kTile) + 2 * Arena::bytes_of(group));
  float* q = arena.floats(group * stride);
  float* logits = arena.floats(group * kTile);
  float *peaks = arena.floats(group), *masses = arena.floats(group);
  for (int64_t item = begin; item < end;) {
    const int64_t line = item / pieces, piece = item % pieces;
    const int64_t left = end - item, taken = left < pieces - piece ? left : pieces - piece;  // of this head
    item += taken;
    const int64_t row = line / view.heads, head = line % view.heads;
    // Base 2 for the softmax, natural for the raw vote.
    pack_voters<T>(e, row, head * group, group, e.soft ? e.scale * kLog2E : e.scale, q);
    // Of the candidates' positions; pages all have 0 here, and all take part.
    const int32_t first = e.bounds ? 0 : e.first[row];
    const int32_t last = e.bounds ? 0 : e.end[row] > 0 ? e.end[row] - 1 : -1;
    Places places = places_of(e, row, head);
    places.next = piece * kLogitPlaces;
    if (const int64_t stop = (piece + taken) * kLogitPlaces; places.n > stop) places.n = stop;
    Tile tiles[2] = {};
    int32_t positions[2][kTile];
    bool more = next_tile(places, tiles[0], positions[0]);
    for (int now = 0; more; now ^= 1) {
      const Tile& tile = tiles[now];
      const Tile& following = tiles[now ^ 1];
      more = next_tile(places, tiles[now ^ 1], positions[now ^ 1]);
      Ahead ahead(following.k, more ? row_bytes : 0, steps);
      dot_tile<T>(tile, ahead, q, group, dim, logits);
      if (e.soft) weigh_tile(tile, positions[now], first, last, group, ahead, logits, peaks, masses);
      for (int g = 0; g < group; ++g) {
        float* kept = e.weights(row, head * group + g);
        memcpy(kept + tile.first, logits + g * kTile, size_t(tile.n) * 4);
        if (!e.soft) continue;
        kept[e.width + tile.first / kTile] = peaks[g];
        kept[e.width + tiles_of_line + tile.first / kTile] = masses[g];
      }
    }
  }
}

inline void vote_logits(const Election& e, int64_t begin, int64_t end) {
  if (begin >= end) return;
  if (e.view->dtype == DType::kFloat32) vote_logits<float>(e, begin, end);
  else if (e.view->dtype == DType::kBFloat16) vote_logits<BFloat16>(e, begin, end);
  else vote_logits<Float16>(e, begin, end);
}

// Replaces the sums of places begin .. begin + n - 1 where something else than the vote decides.
inline void settle(const Election& e, const Places& places, int64_t row, int64_t head, int64_t begin, int n,
                   float* sums) {
  const PagedView& view = *e.view;
  const int32_t first = e.first[row], end = e.end[row];
  if (e.bounds) {  // pages of the sinks and of the local window must be on the shortlist
    const int64_t line = row * view.heads + head, count = view.counts[line];
    for (int i = 0; i < n; ++i) {
      const int64_t slot = (begin + i) * view.page_size;
      const int64_t entries = count - slot < view.page_size ? count - slot : view.page_size;
      const int32_t* positions = view.positions + line * view.capacity + slot;  // [entries]
      bool guarded = false;
      for (int64_t j = 0; j < entries; ++j) guarded |= (positions[j] < first) | (positions[j] >= end);
      if (guarded) sums[i] = kInfinity;
    }
  } else if (places.list) {
    for (int i = 0; i < n; ++i) {
      const int64_t page = (begin + i) / places.segment, inside = (begin + i) % places.segment;
      const int32_t position = places.positions[places.list[page] * places.segment + inside];
      if (position < first || position >= end) sums[i] = -kInfinity;
    }
  } else {
    const int32_t* positions = places.positions + begin;
    for (int i = 0; i < n; ++i) sums[i] = (positions[i] >= first) & (positions[i] < end) ? sums[i] : -kInfinity;
  }
}

// What turns the weights of each tile of a head into a softmax over all tiles: factors [tiles]. Not 2^(peak - log-sum-exp):
// for logits of 1e5 that sum has lost the mass's digits.
inline void softmax_factors(const float* peaks, const float* masses, int64_t tiles, float* factors) {
  float peak = -kInfinity, mass = 0;
  for (int64_t i = 0; i < tiles; ++i) peak = peaks[i] > peak ? peaks[i] : peak;
  const Vec level = splat(peak == -kInfinity ? 0.0f : peak);
  for (int64_t i = 0; i < tiles; i += kLanes) {
    const int n = int(tiles - i < kLanes ? tiles - i : kLanes);
    float lanes[kLanes];
    store(lanes, exp2(load_first(peaks + i, n) - level));
    for (int j = 0; j < n; ++j) factors[i + j] = lanes[j], mass += masses[i + j] * lanes[j];
  }
  const float share = mass == 0 ? 0.0f : 1.0f / mass;
  for (int64_t i = 0; i < tiles; ++i) factors[i] *= share;
}

inline void vote_sums(const Election& e, int64_t begin, int64_t end) {
  const int64_t heads = e.view->heads, tiles = e.tiles(), pieces = place_pieces(e.width, kVotePlaces);
  const int64_t voters = e.per_head ? e.query_heads / heads : e.query_heads, group = e.query_heads / heads;
  Arena arena(Arena::bytes_of(voters * tiles));
  float* factors = arena.floats(voters * tiles);  // [voters, tiles]
  int64_t known = -1;                             // the line whose factors those are
  for (int64_t item = begin; item < end; ++item) {
    const int64_t line = item / pieces, from = item % pieces * kVotePlaces;
    const int64_t row = e.per_head ? line / heads : line, head = e.per_head ? line % heads : 0;
    const int64_t first_voter = head * group;
    if (line != known) {
      known = line;
      for (int64_t v = 0; v < voters; ++v) {
        const float* parts = e.weights(row, first_voter + v) + e.width;
        const int64_t used = place_pieces(places_of(e, row, head + v / group).n, kTile);
        if (e.soft) softmax_factors(parts, parts + tiles, used, factors + v * tiles);
        else
          for (int64_t i = 0; i < used; ++i) factors[v * tiles + i] = 1;
      }
    }
    float* scores = e.scores + line * e.width;  // [width]
    const Places places = places_of(e, row, head);
    const int64_t to = places.n < from + kVotePlaces ? places.n : from + kVotePlaces;
    constexpr int kBlock = 8 * kLanes;  // places whose sums stay in registers
    static_assert(kTile % kBlock == 0);
    for (int64_t i = from; i < to; i += kBlock) {
      const int n = int(to - i < kBlock ? to - i : kBlock);
      float sums[kBlock] = {};
      const float* factor = factors + i / kTile;
      if (n == kBlock) {
        Vec total[8] = {};
        for (int64_t v = 0; v < voters; ++v) {
          const float* weights = e.weights(row, first_voter + v) + i;
          const Vec f = splat(factor[v * tiles]);
#pragma GCC unroll 8
          for (int j = 0; j < 8; ++j) total[j] = fma(load(weights + j * kLanes), f, total[j]);
        }
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) store(sums + j * kLanes, total[j]);
      } else {
        for (int64_t v = 0; v < voters; ++v) {
          const float* weights = e.weights(row, first_voter + v) + i;
          for (int j = 0; j < n; ++j) sums[j] += weights[j] * factor[v * tiles];
        }
      }
      settle(e, places, row, head, i, n, sums);
      memcpy(scores + i, sums, size_t(n) * 4);
    }
  }
}

}  // namespace

static void selection_logits(const SelectionParams& p, int64_t begin, int64_t end) {
  vote_logits(election_of(p), begin, end);
}

static void selection_vote(const SelectionParams& p, int64_t begin, int64_t end) {
  vote_sums(election_of(p), begin, end);
}

}  // namespace kvcache::cpu::KVCACHE_ISA_NS
