// choose_victims: the worst candidate of each head over its budget. Minimum of the score, then maximum of the position
// among the equal ones, then its slot: passes without branches, which the compiler vectorises.
namespace kvcache::cpu::KVCACHE_ISA_NS {

static void choose_victims(const VictimParams& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / p.heads, head = item % p.heads;
    const int64_t n = p.counts[row * p.counts_stride[0] + head * p.counts_stride[1]];
    p.victims[item] = -1;
    if (n <= p.budgets[row * p.budgets_stride[0] + head * p.budgets_stride[1]]) continue;
    const int32_t* positions = p.positions + row * p.positions_stride[0] + head * p.positions_stride[1];  // [capacity]
    const int32_t first = p.first[row], last = p.end[row];
    if (!p.scores) {
      int64_t oldest = INT64_MAX;
      for (int64_t i = 0; i < n; ++i) {
        const int64_t key = is_candidate(positions[i], first, last) ? positions[i] : INT64_MAX;
        oldest = key < oldest ? key : oldest;
      }
      if (oldest == INT64_MAX) continue;
      int64_t slot = 0;
      while (positions[slot] != oldest) ++slot;
      p.victims[item] = int32_t(slot);
      continue;
    }
    const float* scores = p.scores + row * p.scores_stride[0] + head * p.scores_stride[1];  // [capacity]
    uint32_t worst = UINT32_MAX;                                                            // no score maps to it
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t key = is_candidate(positions[i], first, last) ? score_key(scores[i]) : UINT32_MAX;
      worst = key < worst ? key : worst;
    }
    if (worst == UINT32_MAX) continue;
    int32_t newest = INT32_MIN;
    for (int64_t i = 0; i < n; ++i) {
      const bool equal = is_candidate(positions[i], first, last) & (score_key(scores[i]) == worst);
      const int32_t key = equal ? positions[i] : INT32_MIN;
      newest = key > newest ? key : newest;
    }
    int64_t slot = 0;
    while (positions[slot] != newest || score_key(scores[slot]) != worst) ++slot;
    p.victims[item] = int32_t(slot);
  }
}

}  // namespace kvcache::cpu::KVCACHE_ISA_NS
