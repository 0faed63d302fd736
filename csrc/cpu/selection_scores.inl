// Selection scores: how much the query heads vote for each candidate entry. Memory-bound like decode: every key is read
// once for its whole group; the softmax of each query head then runs over the logits in scratch.
#include "entry_tiles.h"

namespace kvcache::cpu::KVCACHE_ISA_NS {
namespace {

// Hides what is no candidate in a tile of logits [group, kTile] and follows each head's peak and mass.
inline void follow_softmax(const Tile& tile, const int32_t* positions, int32_t first, int32_t last, int group,
                           float* logits, float* peaks, float* masses) {
  int32_t position[kTile];  // whole vectors of them
  memcpy(position, positions + tile.first, size_t(tile.n) * 4);
  for (int i = tile.n; i % kLanes != 0; ++i) position[i] = 0;  // hidden by dot_tile
  for (int g = 0; g < group; ++g) {
    float* line = logits + g * kTile;
    Vec top = splat(-kInfinity);
    for (int i = 0; i < tile.n; i += kLanes) {
      const Vec x = where_between(load(line + i), load_int(position + i), splat_int(first), splat_int(last));
      top = max(top, x);
      store(line + i, x);
    }
    const float old = peaks[g], found = reduce_max(top), peak = found > old ? found : old;
    if (peak == -kInfinity) continue;
    Vec mass = {};
    for (int i = 0; i < tile.n; i += kLanes) mass += exp2(load(line + i) - peak);
    masses[g] = masses[g] * exp2f(old - peak) + reduce_add(mass);
    peaks[g] = peak;
  }
}

template <class T>
inline void selection_items(const SelectionParams& p, int64_t begin, int64_t end) {
  const PagedView& view = p.view;
  const int group = p.query_heads / view.heads;
  const int64_t stride = round_up(view.k_dim, kChunk), k_bytes = view.k_dim * int64_t(sizeof(T));
  Arena arena(Arena::bytes_of(group * stride) + Arena::bytes_of(group * kTile) + 2 * Arena::bytes_of(group));
  float* q = arena.floats(group * stride);
  float* logits = arena.floats(group * kTile);
  float *peaks = arena.floats(group), *masses = arena.floats(group);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / view.heads, head = item % view.heads, count = view.counts[item];
    float* kept = p.scratch + (row * p.query_heads + head * group) * view.capacity;  // [group, capacity]
    // Base 2 for the softmax, natural for the raw vote.
    pack_queries<T>(p.q, row, head * group, group, view.k_dim, p.soft ? p.scale * kLog2E : p.scale, q);
    const int32_t last = p.end[row] > 0 ? p.end[row] - 1 : -1;  // of the candidates' positions
    for (int g = 0; g < group; ++g) peaks[g] = -kInfinity, masses[g] = 0;
    Walk walk{&view,
              view.table + item * view.table_width,
              view.positions + item * view.capacity,
              nullptr,
              count,
              INT32_MIN,
              0,
              count,
              true};
    Tile tiles[2] = {};
    bool more = next_tile(walk, tiles[0]);
    for (int now = 0; more; now ^= 1) {
      const Tile& tile = tiles[now];
      const Tile& following = tiles[now ^ 1];
      more = next_tile(walk, tiles[now ^ 1]);
      dot_tile<T>(tile, Ahead{following.k, more ? k_bytes : 0, head_passes(group)}, q, group, view.k_dim, logits);
      if (p.soft) follow_softmax(tile, walk.positions, p.first[row], last, group, logits, peaks, masses);
      for (int g = 0; g < group; ++g)
        memcpy(kept + g * view.capacity + tile.first, logits + g * kTile, size_t(tile.n) * 4);
    }
    for (int g = 0; g < group && p.soft; ++g) {
      float* line = kept + g * view.capacity;
      // Not exp2(x - log-sum-exp): for logits of 1e5 that sum has lost the mass's digits.
      const Vec level = splat(masses[g] > 0 ? peaks[g] : 0.0f), factor = splat(masses[g] > 0 ? 1.0f / masses[g] : 0.0f);
      int64_t i = 0;
      for (; i + kLanes <= count; i += kLanes) store(line + i, exp2(load(line + i) - level) * factor);
      if (i < count) {
        float lanes[kLanes];
        store(lanes, exp2(load_first(line + i, int(count - i)) - level) * factor);
        memcpy(line + i, lanes, size_t(count - i) * 4);
      }
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
    const int32_t* positions = view.positions + line * view.capacity;                        // [capacity]
    float* scores = p.scores + item * view.capacity;                                         // [capacity]
    const int64_t count = view.counts[line];
    constexpr int kBlock = 8 * kLanes;  // slots whose sums stay in registers
    for (int64_t i = 0; i < count; i += kBlock) {
      const int n = int(count - i < kBlock ? count - i : kBlock);
      float sums[kBlock] = {};
      if (n == kBlock) {
        Vec total[8] = {};
        for (int64_t v = 0; v < voters; ++v)
#pragma GCC unroll 8
          for (int j = 0; j < 8; ++j) total[j] += load(votes + v * view.capacity + i + j * kLanes);
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) store(sums + j * kLanes, total[j]);
      } else {
        for (int64_t v = 0; v < voters; ++v)
          for (int j = 0; j < n; ++j) sums[j] += votes[v * view.capacity + i + j];
      }
      for (int j = 0; j < n; ++j) {
        const bool candidate = positions[i + j] >= p.first[row] && positions[i + j] < p.end[row];
        scores[i + j] = candidate ? sums[j] : -kInfinity;
      }
    }
  }
}

}  // namespace kvcache::cpu::KVCACHE_ISA_NS
