// topk: radix select. A candidate's rank is the pair (score, low position first), seen as a 64-bit key; the k-th largest
// key is found digit by digit over 11-bit digits, score first, then position only where scores tie at the border. Every
// pass reads the scores or positions of one head once: O(n), no scratch, no dependence on the order of the entries.
namespace kvcache::cpu::KVCACHE_ISA_NS {

// Order-preserving map of a score to unsigned: larger is better; NaN ranks with -inf, -0 with 0.
static inline uint32_t score_key(float score) {
  uint32_t bits = float_bits(score);
  bits = (bits & 0x7fffffff) > 0x7f800000 ? 0xff800000 : bits;
  bits = bits == 0x80000000 ? 0 : bits;
  return bits ^ (bits & 0x80000000 ? 0xffffffff : 0x80000000);
}

// A low position is better.
static inline uint32_t position_key(int32_t position) { return ~(uint32_t(position) ^ 0x80000000); }

static inline bool is_candidate(int32_t position, int32_t first, int32_t end) {
  return (position >= first) & (position < end);
}

namespace {  // no two instruction sets may share a symbol

// The entries of one head: all of its slots, or those of listed pages. [capacity] arrays.
struct Entries {
  const float* scores;
  const int32_t* positions;
  const int32_t* pages;  // [page_count] ascending, where page_size > 0
  int64_t count, page_count, page_size;
  int32_t first, end;

  template <class F>
  void each(F f) const {  // f(score, position, slot), slots ascending
    if (page_size == 0) {
      for (int64_t i = 0; i < count; ++i) f(scores[i], positions[i], i);
      return;
    }
    for (int64_t i = 0; i < page_count; ++i) {
      const int64_t begin = pages[i] * page_size;
      for (int64_t j = 0; j < page_size && begin + j < count; ++j) {
        f(scores[i * page_size + j], positions[begin + j], begin + j);
      }
    }
  }
};

}  // namespace

struct Border {
  uint32_t score, position;  // keys of the k-th best candidate
  int64_t equal;             // how many candidates with exactly these keys are taken
};

// 0 < k < number of candidates.
static Border find_border(const Entries& entries, int64_t k) {
  enum { kBits = 11, kBuckets = 1 << kBits };
  static const int shifts[] = {21, 10, 0}, widths[] = {11, 11, 10};
  uint32_t histogram[kBuckets];
  Border border = {0, 0, k};
  for (int phase = 0; phase < 2; ++phase) {
    uint32_t known = 0, mask = 0;  // the digits found so far and where they are
    int64_t inside = 0;
    for (int digit = 0; digit < 3; ++digit) {
      const int shift = shifts[digit];
      const uint32_t low = (1u << widths[digit]) - 1;
      memset(histogram, 0, sizeof histogram);
      entries.each([&](float value, int32_t position, int64_t) {
        const uint32_t score = score_key(value);
        const uint32_t key = phase == 0 ? score : position_key(position);
        const bool alive = is_candidate(position, entries.first, entries.end) & (phase == 0 || score == border.score);
        histogram[key >> shift & low] += alive & ((key & mask) == known);
      });
      uint32_t bucket = low;
      while (histogram[bucket] < border.equal) border.equal -= histogram[bucket--];
      known |= bucket << shift;
      mask |= low << shift;
      inside = histogram[bucket];
    }
    if (phase == 0) {
      border.score = known;
      if (inside == border.equal) break;  // no tie is cut: all of them stay, whatever their position (key >= 0)
    } else {
      border.position = known;
    }
  }
  return border;
}

static Entries entries_of(const TopKParams& p, int64_t row, int64_t head) {
  Entries entries = {};
  entries.scores = p.scores + row * p.scores_stride[0] + head * p.scores_stride[1];
  entries.positions = p.positions + row * p.positions_stride[0] + head * p.positions_stride[1];
  entries.count = p.counts[row * p.counts_stride[0] + head * p.counts_stride[1]];
  if (p.page_size > 0) {  // not pages: a list of width 0 has no memory
    entries.pages = p.pages + row * p.pages_stride[0] + head * p.pages_stride[1];
    entries.page_count = p.page_counts[row * p.page_counts_stride[0] + head * p.page_counts_stride[1]];
    entries.page_size = p.page_size;
  }
  entries.first = p.first[row];
  entries.end = p.end[row];
  return entries;
}

static void topk(const TopKParams& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / p.heads, head = item % p.heads;
    const Entries entries = entries_of(p, row, head);
    const int64_t k = p.k[row * p.k_stride[0] + head * p.k_stride[1]];
    int32_t* index = p.index + item * p.width;  // [width]
    int64_t all = 0, candidates = 0;
    entries.each([&](float, int32_t position, int64_t) {
      ++all;
      candidates += is_candidate(position, entries.first, entries.end);
    });
    const int64_t best = k < 0 ? 0 : k < candidates ? k : candidates;
    const int64_t total = all - candidates + best;
    p.index_counts[item] = int32_t(total);
    if (total > p.width) continue;                        // the caller reports it
    Border border = {0, 0, INT64_MAX};                    // everything
    if (best == 0) border = {UINT32_MAX, UINT32_MAX, 0};  // no score maps to it
    if (0 < best && best < candidates) border = find_border(entries, best);
    int64_t taken = 0;
    entries.each([&](float value, int32_t at, int64_t slot) {
      const uint32_t score = score_key(value), position = position_key(at);
      bool take = !is_candidate(at, entries.first, entries.end) | (score > border.score) |
                  ((score == border.score) & (position > border.position));
      if (!take && score == border.score && position == border.position && border.equal > 0) {
        take = true;
        --border.equal;
      }
      if (take) index[taken++] = int32_t(slot);
    });
    for (; taken < p.width; ++taken) index[taken] = -1;
  }
}

}  // namespace kvcache::cpu::KVCACHE_ISA_NS
