// choose_victims: the worst candidate of each head over its budget, in one pass. Each lane keeps the worst of its slots:
// the smallest key, the highest position among equal keys, then the first slot.
#include "simd.h"

namespace kvcache::cpu::KVCACHE_ISA_NS {

namespace {  // no two instruction sets may share a symbol

// A key is smaller where the score is, as a signed number: NaN as -inf, -0 as 0. INT32_MAX does not occur.
inline Int victim_key(Vec score) {
  Int bits = (Int)score;
  bits = (bits & INT32_MAX) > 0x7f800000 ? splat_int(int32_t(0xff800000)) : bits;
  bits = bits == INT32_MIN ? Int{} : bits;
  return bits ^ (bits >> 31 & INT32_MAX);
}

struct WorstOfLanes {
  Int key = splat_int(INT32_MAX), position = splat_int(INT32_MIN), slot{};

  // Slots first_slot .. of kLanes entries; without scores the key is the position.
  void offer(Int entry_key, Int entry_position, int32_t first_slot, Int first, Int end) {
    Int lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    const Int candidate = (entry_position >= first) & (entry_position < end);
    const Int own = candidate ? entry_key : splat_int(INT32_MAX);
    const Int worse = (own < key) | ((own == key) & candidate & (entry_position > position));
    key = worse ? own : key;
    position = worse ? entry_position : position;
    slot = worse ? lane + first_slot : slot;
  }
  int32_t best() const {
    int found = 0;
    for (int i = 1; i < kLanes; ++i) {
      const bool equal = key[i] == key[found] && position[i] == position[found];
      if (key[i] < key[found] || (key[i] == key[found] && position[i] > position[found]) ||
          (equal && slot[i] < slot[found])) {
        found = i;
      }
    }
    return key[found] == INT32_MAX ? -1 : slot[found];
  }
};

// positions, scores [n]; scores null: the oldest is the worst.
inline int32_t worst_slot(const int32_t* positions, const float* scores, int64_t n, int32_t first, int32_t end) {
  WorstOfLanes worst;
  const Int low = splat_int(first), high = splat_int(end);
  int64_t i = 0;
  if (scores) {
    for (; i + kLanes <= n; i += kLanes) {
      worst.offer(victim_key(load(scores + i)), load_int(positions + i), int32_t(i), low, high);
    }
  } else {
    for (; i + kLanes <= n; i += kLanes) {
      worst.offer(load_int(positions + i), load_int(positions + i), int32_t(i), low, high);
    }
  }
  if (i < n) {
    Int position = splat_int(INT32_MAX);  // never below `end`
    Vec score{};
    for (int j = 0; i + j < n; ++j) {
      position[j] = positions[i + j];
      if (scores) score[j] = scores[i + j];
    }
    worst.offer(scores ? victim_key(score) : position, position, int32_t(i), low, high);
  }
  return worst.best();
}

}  // namespace

static void choose_victims(const VictimParams& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / p.heads, head = item % p.heads;
    const int64_t n = p.counts[row * p.counts_stride[0] + head * p.counts_stride[1]];
    p.victims[item] = -1;
    if (n <= p.budgets[row * p.budgets_stride[0] + head * p.budgets_stride[1]]) continue;
    const float* scores = p.scores ? p.scores + row * p.scores_stride[0] + head * p.scores_stride[1] : nullptr;
    p.victims[item] = worst_slot(p.positions + row * p.positions_stride[0] + head * p.positions_stride[1], scores, n,
                                 p.first[row], p.end[row]);
  }
}

}  // namespace kvcache::cpu::KVCACHE_ISA_NS
