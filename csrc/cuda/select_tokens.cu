// A decode step of TokenSelect: one block per row compares its query with the one that made its list, lengthens the list or
// asks for a new one; then the kernels of page_scores, selection_scores and topk run, in which the blocks of rows that go
// on with their list return at once. Which rows those are never leaves the device.
#include "../core/selection_cache.h"
#include "block_sum.cuh"
#include "device.cuh"
#include "kernels.h"
#include "types.cuh"

namespace kvcache::cuda {
namespace {

constexpr int kThreads = 256;

// What the passes hand on. Sizes depend on shapes alone.
struct Hand {
  // [rows] each
  int32_t *active, *first, *end, *k;
  int32_t *held_pages, *zero, *all_pages, *k_pages, *listed;
  int32_t* numbers;    // [columns]
  int32_t* pages;      // [rows, width of the shortlist]
  float* page_scores;  // [rows, columns]
  float* scores;       // [rows, places]
  char *page_work, *page_topk_work, *work, *topk_work;
  int64_t bytes;
};

int64_t shortlist_of(const SelectTokensParams& p) {
  return p.shortlist < p.view.table_width ? p.shortlist : p.view.table_width;
}

PageScoresParams bound_params(const SelectTokensParams& p, const Hand& hand) {
  PageScoresParams b{};
  b.view = p.view;
  b.bounds = p.bounds;
  b.q = p.q;
  b.first = hand.first;
  b.end = hand.end;
  b.query_heads = p.query_heads;
  b.scale = p.scale;
  b.soft = p.soft;
  b.scores = hand.page_scores;
  b.scratch = reinterpret_cast<float*>(hand.page_work);
  b.active = hand.active;
  return b;
}

// To topk a page is an entry whose position is its column, and all are candidates.
TopKParams page_params(const SelectTokensParams& p, const Hand& hand) {
  TopKParams t{};
  t.rows = p.view.rows;
  t.heads = 1;
  t.scores = hand.page_scores;
  t.scores_stride[0] = t.capacity = p.view.table_width;
  t.counts = hand.held_pages;
  t.counts_stride[0] = 1;
  t.positions = hand.numbers;
  t.k = hand.k_pages;
  t.k_stride[0] = 1;
  t.first = hand.zero;
  t.end = hand.all_pages;
  t.width = shortlist_of(p);
  t.index = hand.pages;
  t.index_counts = hand.listed;
  t.active = hand.active;
  return t;
}

SelectionParams vote_params(const SelectTokensParams& p, const Hand& hand) {
  SelectionParams s{};
  s.view = p.view;
  s.q = p.q;
  s.first = hand.first;
  s.end = hand.end;
  s.query_heads = p.query_heads;
  s.scale = p.scale;
  s.soft = p.soft;
  if (p.bounds) {
    s.pages = hand.pages;
    s.page_counts = hand.listed;
    s.page_width = shortlist_of(p);
  }
  s.scores = hand.scores;
  s.scratch = reinterpret_cast<float*>(hand.work);
  s.active = hand.active;
  return s;
}

TopKParams entry_params(const SelectTokensParams& p, const Hand& hand) {
  const PagedView& view = p.view;
  TopKParams t{};
  t.rows = view.rows;
  t.heads = 1;
  t.scores = hand.scores;
  t.scores_stride[0] = p.bounds ? shortlist_of(p) * view.page_size : view.capacity;
  t.counts = view.counts;
  t.counts_stride[0] = view.heads;
  t.positions = view.positions;
  t.positions_stride[0] = int64_t(view.heads) * view.capacity;
  t.capacity = view.capacity;
  t.k = hand.k;
  t.k_stride[0] = 1;
  t.first = hand.first;
  t.end = hand.end;
  if (p.bounds) {
    t.pages = hand.pages;
    t.pages_stride[0] = t.page_width = shortlist_of(p);
    t.page_counts = hand.listed;
    t.page_counts_stride[0] = 1;
    t.page_size = view.page_size;
  }
  t.width = p.width;
  t.index = p.index;
  t.index_counts = p.index_counts;
  t.active = hand.active;
  return t;
}

// `memory` null: only its size is asked for.
Hand place(const SelectTokensParams& p, void* memory) {
  const int64_t rows = p.view.rows, columns = p.view.table_width, listed = p.bounds ? shortlist_of(p) : 0;
  Hand hand{};
  char* base = static_cast<char*>(memory);
  auto take = [&](int64_t bytes) {
    char* start = base ? base + hand.bytes : nullptr;
    hand.bytes += (bytes + 127) / 128 * 128;
    return start;
  };
  auto ints = [&](int64_t n) { return reinterpret_cast<int32_t*>(take(4 * n)); };
  for (int32_t** x : {&hand.active, &hand.first, &hand.end, &hand.k}) *x = ints(rows);
  if (p.bounds) {
    for (int32_t** x : {&hand.held_pages, &hand.zero, &hand.all_pages, &hand.k_pages, &hand.listed}) *x = ints(rows);
    hand.numbers = ints(columns);
    hand.pages = ints(rows * listed);
    hand.page_scores = reinterpret_cast<float*>(take(4 * rows * columns));
    hand.page_work = take(page_scores_scratch(bound_params(p, hand)));
    hand.page_topk_work = take(topk_scratch(page_params(p, hand)));
  }
  hand.scores = reinterpret_cast<float*>(take(4 * rows * (p.bounds ? listed * p.view.page_size : p.view.capacity)));
  // What these look like does not depend on where the list of pages lies, only on whether there is one.
  SelectionParams votes = vote_params(p, hand);
  if (p.bounds) votes.page_counts = reinterpret_cast<const int32_t*>(p.bounds);
  hand.work = take(selection_scores_scratch(votes));
  hand.topk_work = take(topk_scratch(entry_params(p, hand)));
  return hand;
}

// Element i of a row's query without its rotation, rounded as the query is.
template <class T>
__device__ __forceinline__ T plain_element(const SelectTokensParams& p, int64_t row, int i) {
  const int dim = p.view.k_dim, half = p.half, d = i % dim;
  const T* head = static_cast<const T*>(p.q.data) + row * p.q.stride[0] + i / dim * p.q.stride[1];
  if (!p.cos || d >= 2 * half) return head[d];
  const int angle = d < half ? d : d - half;
  const float cos = p.cos[row * half + angle], sin = p.sin[row * half + angle];
  const float a = to_float(head[angle]), b = to_float(head[half + angle]);
  return from_float<T>(d < half ? a * cos - b * sin : b * cos + a * sin);
}

template <class T>
__device__ __forceinline__ float cosine(const SelectTokensParams& p, int64_t row, float* shared) {
  const int n = p.query_heads * p.view.k_dim;
  const T* known = static_cast<const T*>(p.query) + row * n;
  float a_square = 0, b_square = 0;
  for (int i = threadIdx.x; i < n; i += kThreads) {
    const float a = to_float(plain_element<T>(p, row, i)), b = to_float(known[i]);
    a_square += a * a;
    b_square += b * b;
  }
  constexpr float kLeast = 1e-8f;  // as query_similarity
  const float a_length = fmaxf(sqrtf(block_sum<kThreads>(a_square, shared)), kLeast);
  const float b_length = fmaxf(sqrtf(block_sum<kThreads>(b_square, shared)), kLeast);
  float product = 0;
  for (int i = threadIdx.x; i < n; i += kThreads) {
    product += to_float(plain_element<T>(p, row, i)) / a_length * (to_float(known[i]) / b_length);
  }
  return block_sum<kThreads>(product, shared);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4) select_begin_kernel(SelectTokensParams p, Hand hand) {
  KVCACHE_DYNAMIC_SHARED(float, shared);
  const int64_t row = blockIdx.x, most = int64_t(p.sinks) + p.k + p.local;
  const int32_t position = p.q_positions[row];
  const SelectionRow now = {position >= 0, p.view.counts[row * p.view.heads], p.at[row], p.until[row],
                            p.index_counts[row]};
  const bool compares = now.asks && now.held > most && now.at > 0;
  const float similarity = compares ? cosine<T>(p, row, shared) : 0.0f;  // whole blocks take a branch
  const SelectionChoice choice = selection_choice(now, most, p.local, p.width, p.reuse, similarity);
  const int32_t growth = choice == kSelects ? 0 : selection_growth(now, p.width);
  __syncthreads();  // everybody has read the state
  if (choice == kSelects) {
    const int n = p.query_heads * p.view.k_dim;
    T* known = static_cast<T*>(p.query) + row * n;
    for (int i = threadIdx.x; i < n; i += kThreads) known[i] = plain_element<T>(p, row, i);
  } else {
    int32_t* list = p.index + row * p.width + now.listed;
    for (int32_t i = threadIdx.x; i < growth; i += kThreads) list[i] = now.until + i;
  }
  if (hand.numbers) {
    const int64_t step = int64_t(gridDim.x) * kThreads;
    for (int64_t i = row * kThreads + threadIdx.x; i < p.view.table_width; i += step) hand.numbers[i] = int32_t(i);
  }
  if (threadIdx.x > 0) return;
  const int32_t start = position + 1 - p.local;
  hand.active[row] = choice == kSelects;
  hand.first[row] = p.sinks;
  hand.end[row] = start > p.sinks ? start : p.sinks;
  hand.k[row] = p.k;
  if (hand.numbers) {
    hand.held_pages[row] = (now.held + p.view.page_size - 1) / p.view.page_size;
    hand.zero[row] = 0;
    hand.all_pages[row] = p.view.table_width;
    hand.k_pages[row] = int32_t(p.shortlist < p.view.table_width ? p.shortlist : p.view.table_width);
  }
  if (choice == kSelects) {
    p.at[row] = now.held;
    p.until[row] = now.held;
  } else {
    p.index_counts[row] = now.listed + growth;
    p.until[row] = now.until + growth;
  }
  if (choice != kReadsAll) atomicAdd(p.events + (choice == kSelects ? 0 : 1), 1);
}

}  // namespace

int64_t select_tokens_scratch(const SelectTokensParams& p) { return place(p, nullptr).bytes; }

int select_tokens(const SelectTokensParams& p, void* scratch, Stream stream) {
  if (int64_t(p.view.rows) * p.view.heads * p.query_heads == 0) return 0;
  const Hand hand = place(p, scratch);
  constexpr int64_t kShared = kThreads / 32 * sizeof(float);
  int error = 0;
  switch (p.q.dtype) {
    case DType::kFloat32:
      error = KVCACHE_LAUNCH(select_begin_kernel<float>, p.view.rows, kThreads, kShared, stream, p, hand);
      break;
    case DType::kBFloat16:
      error = KVCACHE_LAUNCH(select_begin_kernel<bf16>, p.view.rows, kThreads, kShared, stream, p, hand);
      break;
    default:
      error = KVCACHE_LAUNCH(select_begin_kernel<f16>, p.view.rows, kThreads, kShared, stream, p, hand);
  }
  if (error == 0 && p.bounds) error = page_scores(bound_params(p, hand), stream);
  if (error == 0 && p.bounds) error = topk(page_params(p, hand), hand.page_topk_work, stream);
  if (error == 0) error = selection_scores(vote_params(p, hand), stream);
  if (error == 0) error = topk(entry_params(p, hand), hand.topk_work, stream);
  return error;
}

}  // namespace kvcache::cuda
