// Decode attention: one query per row over ragged pages. Memory-bound, so every key and value is read once for all query
// heads of its group, tile by tile with an online softmax; while a tile's keys are dotted its values are on their way, and
// the next tile's keys while its values are summed. Logits are in base 2: the scale carries log2(e).
#include "attention_plan.h"
#include "entry_tiles.h"

namespace kvcache::cpu::KVCACHE_ISA_NS {
namespace {

// The running softmax of one group over part of its entries.
struct DecodeState {
  float* peak;  // [group] largest logit, base 2
  float* mass;  // [group, kLanes] sum of weights, spread over lanes
  float* sums;  // [group, chunks * kChunk] weighted values, lanes as in the chunks
  bool any;     // an entry was visible, be its logit -inf
};

constexpr int kValues = 32;  // entries that are summed in all heads and chunks before the next: they stay in the first
                             // cache level

// sums[H][..] += weights[H][n] . rows for C chunks, with the accumulators in registers; kRest: the chunk that ends a row.
template <class T, int H, int C, bool kRest>
inline void add_rows(const char* const* rows, int n, Ahead& ahead, const float* weights, int chunk, int rest,
                     int stride, float* sums) {
  Vec total[H][2 * C];
#pragma GCC unroll 8
  for (int h = 0; h < H; ++h)
#pragma GCC unroll 16
    for (int c = 0; c < 2 * C; ++c) total[h][c] = load(sums + h * stride + chunk * kChunk + c * kLanes);
  const auto add = [&](int i) __attribute__((always_inline)) {
    const T* v = reinterpret_cast<const T*>(rows[i]) + chunk * kChunk;
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      Vec row[2];
      if constexpr (kRest) Storage<T>::load_first(v, rest, row[0], row[1]);
      else Storage<T>::load_chunk(v + c * kChunk, row[0], row[1]);
#pragma GCC unroll 8
      for (int h = 0; h < H; ++h) {
        const Vec w = splat(weights[h * kTile + i]);
        total[h][2 * c] = add_product(w, row[0], total[h][2 * c]);
        total[h][2 * c + 1] = add_product(w, row[1], total[h][2 * c + 1]);
      }
    }
  };
  int i = 0;
  for (; i + 4 <= n; i += 4) {
    ahead.step();
    add(i), add(i + 1), add(i + 2), add(i + 3);
  }
  for (; i < n; ++i) add(i);
#pragma GCC unroll 8
  for (int h = 0; h < H; ++h)
#pragma GCC unroll 16
    for (int c = 0; c < 2 * C; ++c) store(sums + h * stride + chunk * kChunk + c * kLanes, total[h][c]);
}

// Chunks of a row that are summed at once: as many as give enough independent sums and fit the registers.
constexpr int chunks_at_once(int heads) { return kLanes == 16 ? (heads == 4 ? 2 : 4) : 4 / heads; }

// Steps that add_tile takes over a whole tile.
inline int64_t value_steps(int group, int dim) {
  const int whole = dim / kChunk, rest = dim % kChunk != 0;
  auto passes = [&](int heads) { return whole / chunks_at_once(heads) + whole % chunks_at_once(heads) + rest; };
  return int64_t(kTile / 4) * (group / 4 * passes(4) + (group >> 1 & 1) * passes(2) + (group & 1) * passes(1));
}

template <class T, int H>
inline void add_heads(const char* const* rows, int n, Ahead& ahead, const float* weights, int dim, float* sums) {
  constexpr int kMost = chunks_at_once(H);
  const int whole = dim / kChunk, rest = dim % kChunk, stride = (dim + kChunk - 1) / kChunk * kChunk;
  int c = 0;
  for (; c + kMost <= whole; c += kMost) add_rows<T, H, kMost, false>(rows, n, ahead, weights, c, 0, stride, sums);
  if constexpr (kMost > 1) {
    for (; c < whole; ++c) add_rows<T, H, 1, false>(rows, n, ahead, weights, c, 0, stride, sums);
  }
  if (rest) add_rows<T, H, 1, true>(rows, n, ahead, weights, c, rest, stride, sums);
}

// sums += weights . values of a tile.
template <class T>
inline void add_tile(const Tile& tile, Ahead ahead, const float* weights, int group, int dim, float* sums) {
  const int stride = (dim + kChunk - 1) / kChunk * kChunk;
  for (int i = 0; i < tile.n; i += kValues) {
    const int n = tile.n - i < kValues ? tile.n - i : kValues;
    const char* const* rows = tile.v + i;
    for (int g = 0; g < group;) {
      const int left = group - g;
      const float* w = weights + g * kTile + i;
      if (left >= 4) add_heads<T, 4>(rows, n, ahead, w, dim, sums + g * stride), g += 4;
      else if (left >= 2) add_heads<T, 2>(rows, n, ahead, w, dim, sums + g * stride), g += 2;
      else add_heads<T, 1>(rows, n, ahead, w, dim, sums + g * stride), g += 1;
    }
  }
}

// Softcap and bias on a tile of logits [group, kTile], in base 2.
inline void adjust_logits(const AttentionParams& p, int64_t row, int64_t head, int group, const Tile& tile,
                          float* logits) {
  for (int g = 0; g < group; ++g) {
    float* line = logits + g * kTile;
    if (p.softcap > 0) {
      const float to_cap = 1.0f / p.softcap, from_cap = p.softcap * kLog2E;  // pack_queries left natural logits
      for (int i = 0; i < tile.n; i += kLanes) store(line + i, tanh(load(line + i) * to_cap) * from_cap);
    }
    if (p.bias) {
      const int64_t bias_head = shared_head(p.bias_heads, p, head, head * group + g);
      const float* bias = p.bias + (row * p.bias_heads + bias_head) * p.view.capacity;  // [capacity]
      if (tile.contiguous) {
        for (int i = 0; i < tile.n; ++i) line[i] += bias[tile.first + i] * kLog2E;
      } else {
        for (int i = 0; i < tile.n; ++i) line[i] += bias[tile.slot[i]] * kLog2E;
      }
    }
  }
  hide_tail(tile, group, logits);
}

// Turns a tile's logits into weights relative to the running peak, and everything summed so far with it.
inline void update_softmax(const Tile& tile, int group, int stride, float* logits, DecodeState& state) {
  for (int g = 0; g < group; ++g) {
    float* line = logits + g * kTile;
    Vec top = load(line);
    for (int i = kLanes; i < tile.n; i += kLanes) top = max(top, load(line + i));
    const float old = state.peak[g], found = reduce_max(top), peak = found > old ? found : old;
    Vec mass = load(state.mass + g * kLanes);
    if (found > old) {
      const Vec shrink = exp2(splat(old - peak));
      mass *= shrink;
      for (int i = 0; i < stride; i += kLanes)
        store(state.sums + g * stride + i, load(state.sums + g * stride + i) * shrink);
      state.peak[g] = peak;
    }
    const Vec level = splat(peak == -kInfinity ? 0.0f : peak);
    for (int i = 0; i < tile.n; i += kLanes) {
      const Vec weight = exp2(load(line + i) - level);
      mass += weight;
      store(line + i, weight);
    }
    store(state.mass + g * kLanes, mass);
  }
}

// The logits kept for the statistics, [candidates] of one query head.
inline float* kept_logits(const AttentionParams& p, int64_t row, int64_t query_head) {
  const int64_t width = p.index ? index_places(p) : p.view.capacity, queries = int64_t(p.view.rows) * p.query_heads;
  const int64_t partials = p.splits > 1 ? queries * p.splits * (p.view.v_dim + 3) : 0;
  return p.scratch + partials + (row * p.query_heads + query_head) * width;
}

template <class T>
inline void decode_part(const AttentionParams& p, int64_t row, int64_t head, Walk walk, float* q, float* logits,
                        DecodeState& state) {
  const int group = p.query_heads / p.view.heads, dim = p.view.v_dim;
  const int stride = int(round_up(dim, kChunk));
  const int64_t first_head = head * group;
  pack_queries<T>(p.q, row, first_head, group, p.view.k_dim, p.softcap > 0 ? p.scale : p.scale * kLog2E, q);
  for (int g = 0; g < group; ++g) state.peak[g] = -kInfinity;
  memset(state.mass, 0, size_t(group) * kLanes * 4);
  memset(state.sums, 0, size_t(group) * stride * 4);
  state.any = false;
  if (p.statistics && walk.filtered()) {
    for (int g = 0; g < group; ++g) {
      float* kept = kept_logits(p, row, first_head + g);
      for (int64_t i = walk.next; i < walk.end; ++i) kept[i] = -kInfinity;
    }
  }
  const int64_t k_bytes = p.view.k_dim * int64_t(sizeof(T)), v_bytes = dim * int64_t(sizeof(T));
  Tile tiles[2] = {};
  bool more = next_tile(walk, tiles[0]);
  for (int now = 0; more; now ^= 1) {
    const Tile& tile = tiles[now];
    state.any = true;
    Ahead values(tile.v, v_bytes, dot_steps(group));
    dot_tile<T>(tile, values, q, group, p.view.k_dim, logits);
    if (p.softcap > 0 || p.bias) adjust_logits(p, row, head, group, tile, logits);
    if (p.statistics) {
      for (int g = 0; g < group; ++g) {
        float* kept = kept_logits(p, row, first_head + g);
        if (tile.contiguous) memcpy(kept + tile.first, logits + g * kTile, size_t(tile.n) * 4);
        else
          for (int i = 0; i < tile.n; ++i) kept[tile.candidate[i]] = logits[g * kTile + i];
      }
    }
    update_softmax(tile, group, stride, logits, state);
    more = next_tile(walk, tiles[now ^ 1]);
    const Tile& following = tiles[now ^ 1];
    add_tile<T>(tile, Ahead(following.k, more ? k_bytes : 0, value_steps(group, dim)), logits, group, dim, state.sums);
  }
}

template <class T>
inline void plain_order(const float* lanes, int dim, float* plain) {
  for (int i = 0; i < dim; ++i) plain[i] = lanes[i / kChunk * kChunk + Storage<T>::lane(i % kChunk)];
}

template <class T>
inline void decode_items(const AttentionParams& p, int64_t begin, int64_t end) {
  const int group = p.query_heads / p.view.heads, dim = p.view.v_dim;
  const int64_t q_stride = round_up(p.view.k_dim, kChunk), v_stride = round_up(dim, kChunk);
  Arena arena(Arena::bytes_of(group * q_stride) + Arena::bytes_of(group * kTile) + Arena::bytes_of(group) +
              Arena::bytes_of(group * kLanes) + Arena::bytes_of(group * v_stride) + Arena::bytes_of(v_stride));
  float* q = arena.floats(group * q_stride);
  float* logits = arena.floats(group * kTile);
  DecodeState state{arena.floats(group), arena.floats(group * kLanes), arena.floats(group * v_stride), false};
  float* plain = arena.floats(v_stride);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t line = item / p.splits, split = item % p.splits;
    const int64_t row = line / p.view.heads, head = line % p.view.heads;
    Walk walk = head_walk(p, line);
    if (p.window_start) walk.window_start = p.window_start[row];
    if (p.splits > 1) {
      const int64_t share = round_up((walk.end + p.splits - 1) / p.splits, 16), last = walk.end;
      walk.next = split * share < last ? split * share : last;
      walk.end = walk.next + share < last ? walk.next + share : last;
    }
    decode_part<T>(p, row, head, walk, q, logits, state);
    for (int g = 0; g < group; ++g) {
      const int64_t query_head = head * group + g;
      const float mass = reduce_add(load(state.mass + g * kLanes));
      plain_order<T>(state.sums + g * v_stride, dim, plain);
      if (p.splits == 1) {
        finish_query(p, row, query_head, 0, state.any, state.peak[g], mass, plain);
        continue;
      }
      float* partial = p.scratch + ((row * p.query_heads + query_head) * p.splits + split) * (dim + 3);
      partial[0] = state.any, partial[1] = state.peak[g], partial[2] = mass;
      memcpy(partial + 3, plain, size_t(dim) * 4);
    }
  }
}

// Adds the probabilities to the statistics of one head, from the logits kept by decode_attention.
inline void add_statistics(const AttentionParams& p, int64_t row, int64_t head) {
  const int group = p.query_heads / p.view.heads;
  const int64_t item = row * p.view.heads + head, first_head = head * group;
  const Walk walk = head_walk(p, item);
  float* statistics = p.statistics + item * p.view.capacity;  // [capacity]
  const float share = p.statistics_max ? 1.0f : 1.0f / float(group);
  auto level = [&](int g) {
    const float lse = p.lse[row * p.query_heads + first_head + g];
    return lse == -kInfinity ? 0.0f : lse * kLog2E;
  };
  if (p.index) {
    for (int64_t i = 0; i < walk.count; ++i) statistics[i] *= p.statistics_decay;
  }
  for (int64_t i = 0; i < walk.end; i += kLanes) {
    const int n = int(walk.end - i < kLanes ? walk.end - i : kLanes);
    Vec reduced = {};
    for (int g = 0; g < group; ++g) {
      const Vec chance = exp2(load_first(kept_logits(p, row, first_head + g) + i, n) - splat(level(g)));
      if (p.statistics_max) reduced = max(reduced, chance);
      else reduced += chance * share;
    }
    float lanes[kLanes];
    if (!p.index) reduced += load_first(statistics + i, n) * p.statistics_decay;
    store(lanes, reduced);
    if (!p.index) {
      memcpy(statistics + i, lanes, size_t(n) * 4);
    } else {
      for (int j = 0; j < n; ++j) {
        const int64_t slot = walk.slot(i + j);
        if (slot >= 0 && slot < walk.count) statistics[slot] += lanes[j];
      }
    }
  }
}

}  // namespace

static void decode_attention(const AttentionParams& p, int64_t begin, int64_t end) {
  if (begin >= end) return;
  if (p.view.dtype == DType::kFloat32) decode_items<float>(p, begin, end);
  else if (p.view.dtype == DType::kBFloat16) decode_items<BFloat16>(p, begin, end);
  else decode_items<Float16>(p, begin, end);
}

static void decode_combine(const AttentionParams& p, int64_t begin, int64_t end) {
  const int group = p.query_heads / p.view.heads, dim = p.view.v_dim;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / p.view.heads, head = item % p.view.heads;
    for (int g = 0; g < group && p.splits > 1; ++g) {
      const int64_t query_head = head * group + g;
      const float* partials =
          p.scratch + (row * p.query_heads + query_head) * p.splits * (dim + 3);  // [splits, dim + 3]
      float peak = -kInfinity, mass = 0, sums[256] = {};
      bool any = false;
      for (int s = 0; s < p.splits; ++s) {
        const float* partial = partials + s * (dim + 3);
        any |= partial[0] != 0;
        peak = partial[1] > peak ? partial[1] : peak;
      }
      for (int s = 0; s < p.splits; ++s) {
        const float* partial = partials + s * (dim + 3);
        if (partial[1] == -kInfinity) continue;
        const float weight = exp2f(partial[1] - peak);
        mass += weight * partial[2];
        for (int i = 0; i < dim; ++i) sums[i] += weight * partial[3 + i];
      }
      finish_query(p, row, query_head, 0, any, peak, mass, sums);
    }
    if (p.statistics) add_statistics(p, row, head);
  }
}

}  // namespace kvcache::cpu::KVCACHE_ISA_NS
