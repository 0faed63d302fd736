// Column sums: the attention mass that each entry received, a second pass over q . k given the log-sum-exp. Entries lie in
// lanes, so the sum over queries is a vector addition; memory stays linear in the length. Logits are in base 2.
#include "attention_plan.h"
#include "entry_tiles.h"
#include "query_tiles.h"

namespace kvcache::cpu::KVCACHE_ISA_NS {
namespace {

constexpr int kQueryRows = 64;  // queries taken at a time

struct KeyBlock {
  int n;          // entries of the block, at most kColumnBlock
  int64_t first;  // slot
  Range positions;
  int32_t position[kColumnBlock];
  float* keys;  // [kColumnBlock / kPanel] panels of [k_dim, kPanel]
};

struct QueryRows {
  int n;
  Range last, start;
  float* queries;           // [kQueryRows, kRowStep]
  float level[kQueryRows];  // log-sum-exp, base 2
  int place[kQueryRows];    // token, counted from the first one of the stretch
  int32_t last_of[kQueryRows], start_of[kQueryRows];
  const bool* mask[kQueryRows];  // [capacity] or null
};

template <class T>
inline void load_keys(const PagedView& view, const int32_t* table, KeyBlock& block) {
  memset(block.keys, 0, size_t(view.k_dim) * kColumnBlock * 4);
  float plain[256 + kChunk];
  for (int i = 0; i < block.n; ++i) {
    const int64_t slot = block.first + i,
                  line = int64_t(table[slot / view.page_size]) * view.page_size + slot % view.page_size;
    widen_row<T>(static_cast<const char*>(view.k_pages) + line * view.k_dim * int64_t(sizeof(T)), view.dtype,
                 view.k_dim, plain);
    fill_lane(plain, view.k_dim, 1.0f, kPanel, i % kPanel, block.keys + int64_t(i / kPanel) * view.k_dim * kPanel);
  }
}

// Up to kQueryRows queries of one head that count, from `token` on and before `end`. Moves `token` behind them.
inline void next_queries(const ColumnSumsParams& c, int64_t row, int64_t head, int64_t query_head,
                         const KeyBlock& block, int64_t& token, int64_t end, QueryRows& rows) {
  const AttentionParams& p = c.attention;
  const int64_t mask_line = row * p.mask_heads + (p.mask_heads == 1 ? 0 : head);
  const float factor = p.softcap > 0 ? p.scale : p.scale * kLog2E;
  const int64_t first = token;
  rows.n = 0;
  rows.last = rows.start = Range();
  for (; token < end && rows.n < kQueryRows; ++token) {
    const int64_t place = row * p.tokens + token;
    const int32_t last = p.q_positions ? p.q_positions[place] : INT32_MAX;
    const int32_t start = p.window_start ? p.window_start[place] : INT32_MIN;
    const float lse = c.lse[(row * p.query_heads + query_head) * p.tokens + token];
    if (last < block.positions.low || start > block.positions.high || lse == -kInfinity) continue;
    float* target = rows.queries + rows.n * kRowStep;
    const int64_t offset = row * p.q.stride[0] + query_head * p.q.stride[1] + token * p.q.stride[2];
    convert_row(target, DType::kFloat32, element(p.q.data, p.q.dtype, offset), p.q.dtype, p.view.k_dim);
    for (int i = 0; i < p.view.k_dim; ++i) target[i] *= factor;
    rows.level[rows.n] = lse * kLog2E;
    rows.place[rows.n] = int(token - first);
    rows.last_of[rows.n] = last, rows.start_of[rows.n] = start;
    rows.last.add(last), rows.start.add(start);
    rows.mask[rows.n++] = p.mask ? p.mask + (mask_line * p.tokens + token) * p.view.capacity : nullptr;
  }
}

// mass[kColumnBlock] += exp2(logit - level) of the rows; or, with `top` [kQueryRows, kColumnBlock], the larger of that and
// what is there for each row's place.
inline void add_mass(const AttentionParams& p, const KeyBlock& block, const QueryRows& rows, const float* bias,
                     float* mass, float* top) {
  const bool all_visible = block.positions.high <= rows.last.low && block.positions.low >= rows.start.high;
  const float to_cap = p.softcap > 0 ? 1.0f / p.softcap : 0.0f, from_cap = p.softcap * kLog2E;
  const Vec unused[kVecs] = {};
  for (int first = 0; first < block.n; first += kPanel) {
    const float* panel = block.keys + int64_t(first) * p.view.k_dim;
    for (int i = 0; i < rows.n; i += kRows) {
      float logits[kRows * kPanel];
      multiply<kVecs>(rows.queries + i * kRowStep, kRowStep, 1, panel, p.view.k_dim, nullptr, unused, logits);
      const int n = rows.n - i < kRows ? rows.n - i : kRows;
      for (int j = 0; j < kVecs; ++j) {
        float* target = mass + first + j * kLanes;
        Vec total = load(target);
        for (int r = 0; r < n; ++r) {
          Vec x = load(logits + r * kPanel + j * kLanes);
          if (p.softcap > 0) x = tanh(x * to_cap) * from_cap;
          if (bias) x += load(bias + first + j * kLanes);
          if (!all_visible) {
            x = where_between(x, load_int(block.position + first + j * kLanes), splat_int(rows.start_of[i + r]),
                              splat_int(rows.last_of[i + r]));
          }
          x = exp2(x - rows.level[i + r]);
          if (rows.mask[i + r]) {
            const bool* seen = rows.mask[i + r] + block.first + first + j * kLanes;
            for (int l = 0; l < kLanes && first + j * kLanes + l < block.n; ++l) x[l] = seen[l] ? x[l] : 0.0f;
          }
          if (top) {
            float* largest = top + rows.place[i + r] * kColumnBlock + first + j * kLanes;
            store(largest, max(load(largest), x));
          } else {
            total += x;
          }
        }
        store(target, total);
      }
    }
  }
}

template <class T>
inline void column_items(const ColumnSumsParams& c, int64_t begin, int64_t end) {
  const AttentionParams& p = c.attention;
  const int64_t blocks = (p.view.capacity + kColumnBlock - 1) / kColumnBlock;
  const int group = p.query_heads / p.view.heads;
  static_assert(kColumnBlock % kPanel == 0 && kQueryRows % kRows == 0);
  Arena arena(Arena::bytes_of(p.view.k_dim * kColumnBlock) + Arena::bytes_of(kQueryRows * kRowStep) +
              Arena::bytes_of(kQueryRows * kColumnBlock));
  KeyBlock block;
  QueryRows rows;
  block.keys = arena.floats(p.view.k_dim * kColumnBlock);
  rows.queries = arena.floats(kQueryRows * kRowStep);
  float* top = arena.floats(kQueryRows * kColumnBlock);  // [kQueryRows, kColumnBlock], weights of a stretch
  memset(rows.queries, 0, kQueryRows * kRowStep * 4);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t line = item / blocks, row = line / p.view.heads, head = line % p.view.heads;
    block.first = item % blocks * kColumnBlock;
    const int64_t left = p.view.counts[line] - block.first;
    if (left <= 0) continue;
    block.n = int(left < kColumnBlock ? left : kColumnBlock);
    block.positions = Range();
    memset(block.position, 0, sizeof block.position);
    memcpy(block.position, p.view.positions + line * p.view.capacity + block.first, size_t(block.n) * 4);
    block.positions.add(block.position, block.n);
    load_keys<T>(p.view, p.view.table + line * p.view.table_width, block);
    float reduced[kColumnBlock] = {}, bias_lanes[kColumnBlock] = {};
    const int64_t start = c.query_begin ? c.query_begin[row] : 0;
    // The mean over the group may be taken at the end; the maximum belongs to each query, so that how a prompt is cut
    // into pieces does not matter: stretches of queries small enough to keep every weight.
    const int64_t stretch = c.reduce_max ? kQueryRows : (p.tokens > start ? p.tokens - start : 1);
    for (int64_t from = start; from < p.tokens; from += stretch) {
      const int64_t to = from + stretch < p.tokens ? from + stretch : p.tokens;
      if (c.reduce_max) memset(top, 0, sizeof(float) * kQueryRows * kColumnBlock);
      for (int g = 0; g < group; ++g) {
        const int64_t query_head = head * group + g;
        if (p.bias) {
          const float* bias =
              p.bias + (row * p.bias_heads + shared_head(p.bias_heads, p, head, query_head)) * p.view.capacity;
          for (int i = 0; i < block.n; ++i) bias_lanes[i] = bias[block.first + i] * kLog2E;
        }
        float mass[kColumnBlock] = {};
        for (int64_t token = from; token < to;) {
          next_queries(c, row, head, query_head, block, token, to, rows);
          add_mass(p, block, rows, p.bias ? bias_lanes : nullptr, mass, c.reduce_max ? top : nullptr);
        }
        for (int i = 0; i < block.n; ++i) reduced[i] += mass[i] / float(group);
      }
      for (int q = 0; c.reduce_max && q < kQueryRows; ++q) {
        for (int i = 0; i < block.n; ++i) reduced[i] += top[q * kColumnBlock + i];
      }
    }
    memcpy(c.sums + line * p.view.capacity + block.first, reduced, size_t(block.n) * 4);
  }
}

}  // namespace

static void column_sums(const ColumnSumsParams& p, int64_t begin, int64_t end) {
  if (begin >= end) return;
  const DType dtype = p.attention.view.dtype;
  if (dtype == DType::kFloat32) column_items<float>(p, begin, end);
  else if (dtype == DType::kBFloat16) column_items<BFloat16>(p, begin, end);
  else column_items<Float16>(p, begin, end);
}

}  // namespace kvcache::cpu::KVCACHE_ISA_NS
