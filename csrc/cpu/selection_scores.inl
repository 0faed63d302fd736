// Selection scores: how much the query heads vote for each candidate entry. Memory-bound like decode: every key is read
// once for its whole group; the softmax of each query head then runs over the logits in scratch.
#include "entry_tiles.h"

namespace kvcache::cpu::KVCACHE_ISA_NS {
namespace {

template <class T>
inline void selection_items(const SelectionParams& p, int64_t begin, int64_t end) {
  const PagedView& view = p.view;
  const int group = p.query_heads / view.heads;
  const int64_t stride = round_up(view.k_dim, kChunk);
  Arena arena(Arena::bytes_of(group * stride) + Arena::bytes_of(group * kTile));
  float* q = arena.floats(group * stride);
  float* logits = arena.floats(group * kTile);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / view.heads, head = item % view.heads, count = view.counts[item];
    float* kept = p.scratch + (row * p.query_heads + head * group) * view.capacity;  // [group, capacity]
    // Base 2 for the softmax, natural for the raw vote.
    pack_queries<T>(p.q, row, head * group, group, view.k_dim, p.soft ? p.scale * kLog2E : p.scale, q);
    Walk walk{&view, view.table + item * view.table_width, view.positions + item * view.capacity, nullptr, count, INT32_MIN, 0,
              count};
    walk.keys_only = true;
    Tile tiles[2] = {};
    bool more = next_tile(walk, tiles[0]);
    for (int now = 0; more; now ^= 1) {
      const Tile& tile = tiles[now];
      more = next_tile(walk, tiles[now ^ 1]);
      const Tile& following = tiles[now ^ 1];
      const Ahead ahead{following.k, more ? view.k_dim * int64_t(sizeof(T)) : 0, head_passes(group)};
      dot_tile<T>(tile, ahead, q, group, view.k_dim, logits);
      for (int g = 0; g < group; ++g) memcpy(kept + g * view.capacity + tile.first, logits + g * kTile, size_t(tile.n) * 4);
    }
    // Whatever is no candidate drops out of every head's vote.
    for (int g = 0; g < group; ++g) {
      float* line = kept + g * view.capacity;
      const int32_t low = p.first[row], high = p.end[row];
      float peak = -kInfinity, sum = 0;
      for (int64_t i = 0; i < count; ++i) {
        const bool candidate = walk.positions[i] >= low && walk.positions[i] < high;
        line[i] = candidate ? line[i] : -kInfinity;
        peak = line[i] > peak ? line[i] : peak;
      }
      if (!p.soft) continue;
      const Vec level = splat(peak == -kInfinity ? 0.0f : peak);
      Vec total = {};
      int64_t i = 0;
      for (; i + kLanes <= count; i += kLanes) {
        const Vec weight = exp2(load(line + i) - level);
        total += weight;
        store(line + i, weight);
      }
      sum = reduce_add(total);
      if (i < count) {
        float lanes[kLanes];
        store(lanes, exp2(load_first(line + i, int(count - i)) - level));
        for (int j = 0; i + j < count; ++j) line[i + j] = lanes[j], sum += lanes[j];
      }
      const float factor = sum > 0 ? 1.0f / sum : 0.0f;
      for (i = 0; i < count; ++i) line[i] *= factor;
    }
  }
}

}  // namespace

static void selection_logits(const SelectionParams& p, int64_t begin, int64_t end) {
  if (begin >= end) return;
  if (p.view.dtype == DType::kFloat32) selection_items<float>(p, begin, end);
  else if (p.view.dtype == DType::kBFloat16) selection_items<BFloat16>(p, begin, end);
  else selection_items<Float16>(p, begin, end);
}

static void selection_vote(const SelectionParams& p, int64_t begin, int64_t end) {
  const PagedView& view = p.view;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = p.per_head ? item / view.heads : item, head = p.per_head ? item % view.heads : 0;
    const int64_t voters = p.per_head ? p.query_heads / view.heads : p.query_heads, line = row * view.heads + head;
    const float* votes = p.scratch + (row * p.query_heads + head * voters) * view.capacity;  // [voters, capacity]
    const int32_t* positions = view.positions + line * view.capacity;
    float* scores = p.scores + item * view.capacity;  // [capacity]
    const int64_t count = view.counts[line];
    for (int64_t i = 0; i < count; ++i) scores[i] = 0.0f;
    for (int64_t v = 0; v < voters; ++v) {
      for (int64_t i = 0; i < count; ++i) scores[i] += votes[v * view.capacity + i];
    }
    for (int64_t i = 0; i < count; ++i) {
      if (positions[i] < p.first[row] || positions[i] >= p.end[row]) scores[i] = -kInfinity;
    }
  }
}

}  // namespace kvcache::cpu::KVCACHE_ISA_NS
