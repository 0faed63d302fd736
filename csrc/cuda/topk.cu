// topk: the slots of the protected entries and of the k best candidates of each head, ascending. Exact for any scores.
//
// Short rows, or so many that every multiprocessor has its own: one block per head searches and writes (topk_search.cuh).
//
// Long rows: three launches of several blocks (tiles) per head.
//   1. topk_count    every tile: histogram of the top 11 bits of its scores, and how many entries are protected.
//   2. topk_collect  every tile adds up the histograms and finds the bin where the border lies. Few candidates in it (the
//                    rule): each tile puts its own on the head's list. Too many: a histogram of their next 11 bits.
//   3. topk_write    every tile finds the border, from the list in shared memory or, in the second case, from all scores
//                    that agree in 22 bits, counts what earlier tiles take, and writes its part of the result.
// No block waits for another, nothing must be zero beforehand, and no order of arrival shows in the result.
//
// Where a head needs more than `width` slots, index_counts says how many, and index holds the first `width` of them.
#include <algorithm>

#include "kernels.h"
#include "memory.cuh"
#include "ptx/dependent_launch.cuh"
#include "topk_search.cuh"

namespace kvcache::cuda {
namespace {

constexpr int kWarps = 16, kThreads = kWarps * 32;
constexpr int kStaged = 4096;                        // candidates that fit into shared memory
constexpr int kSmallWarps = 8, kSmallStaged = 2048;  // short rows: everything fits

// --- one block per head --------------------------------------------------------------------------------------------

__device__ __forceinline__ bool skips(const TopKParams& p, int64_t item) {
  return p.active && p.active[item / p.heads] == 0;
}

__device__ __forceinline__ int needed(const TopKParams& p, int64_t item) {
  const int64_t row = item / p.heads, head = item - row * p.heads;
  return p.k[row * p.k_stride[0] + head * p.k_stride[1]];
}

// After the first histogram: sets the search on its way. Returns how many candidates are to be taken.
template <int kBlockWarps>
__device__ __forceinline__ int start_search(TopKSearch& search, TopKShared& shared, int k) {
  const int candidates = find_bin<kBlockWarps>(shared, k);
  search.border = {0, 0, 0};
  search.digit = 0;
  if (k <= 0) {
    search.nothing();
  } else if (k >= candidates) {
    search.everything();
  } else {
    search.found(shared.bin[0], shared.bin[1], shared.bin[2]);
  }
  return max(0, min(k, candidates));
}

// Histogram of the first digit among the entries begin .. end - 1; returns how many entries are protected there.
template <int kBlockWarps>
__device__ __forceinline__ int count_first_digit(const TopKEntries& entries, TopKShared& shared, int begin, int end) {
  TopKSegment segment;
  load_segment<kBlockWarps>(entries, begin, end, segment);
  clear<kBlockWarps>(shared);
  int kept = 0;
  each_entry<kBlockWarps>(entries, begin, end, segment, [&](bool alive, bool candidate, const TopKKey& key) {
    count_bin(shared.histogram, int(key.score >> 21), candidate);
    kept += alive && !candidate;
  });
  return block_sum<kBlockWarps>(kept, shared.totals);  // also the barrier behind the histogram
}

template <int kBlockWarps>
__global__ __launch_bounds__(kBlockWarps * 32, 1) void topk_block(TopKParams p, int room) {
  wait_for_dependencies();
  launch_dependents();
  KVCACHE_DYNAMIC_SHARED(TopKShared, memory);
  TopKShared& shared = *memory;
  const int64_t item = blockIdx.x;
  if (skips(p, item)) return;
  const TopKEntries entries(p, item);
  TopKSearch search;
  int total = count_first_digit<kBlockWarps>(entries, shared, 0, entries.n);
  total += start_search<kBlockWarps>(search, shared, needed(p, item));
  finish_search<kBlockWarps>(entries, search, shared, -1, room);
  int32_t* index = p.index + item * p.width;  // [width]
  TopKSegment segment;
  load_segment<kBlockWarps>(entries, 0, entries.n, segment);
  write_taken<kBlockWarps>(entries, search, shared, 0, entries.n, segment, 0, index, p.width);
  for (int64_t i = total + int64_t(threadIdx.x); i < p.width; i += kBlockWarps * 32) index[i] = -1;
  if (threadIdx.x == 0) p.index_counts[item] = total;
}

// --- several blocks per head ---------------------------------------------------------------------------------------

struct Header {
  TopKSearch search;
  int total;      // slots that the head needs
  int from_list;  // whether the list holds all that agree with the border
};

// Working memory of one head, laid out by hand: Header | kept [tiles] | sure [tiles] | list [kStaged] | two histograms per
// tile, [tiles][2048] counts of 16 bits each.
struct Scratch {
  static constexpr int64_t kHeaderWords = (sizeof(Header) + 15) / 16 * 4;
  static constexpr int64_t kListWords = kStaged * (sizeof(TopKKey) / 4), kHistogramWords = kTopKBins / 2;

  static int64_t words(int tiles) { return kHeaderWords + tiles * (2 + 2 * kHistogramWords) + kListWords; }
  __device__ __forceinline__ Scratch(void* memory, int64_t item, int tiles) : tiles(tiles) {
    const int64_t head_words = kHeaderWords + tiles * (2 + 2 * kHistogramWords) + kListWords;
    base = static_cast<uint32_t*>(memory) + item * head_words;
  }
  __device__ __forceinline__ Header& header() const { return *reinterpret_cast<Header*>(base); }
  __device__ __forceinline__ int* kept() const { return reinterpret_cast<int*>(base + kHeaderWords); }
  __device__ __forceinline__ int* sure() const { return kept() + tiles; }
  __device__ __forceinline__ TopKKey* list() const { return reinterpret_cast<TopKKey*>(sure() + tiles); }
  // [tiles][2048 / 2]: two bins per word, the even one low
  __device__ __forceinline__ uint32_t* histograms(int digit) const {
    return base + kHeaderWords + 2 * tiles + kListWords + digit * tiles * kHistogramWords;
  }
  uint32_t* base;
  int tiles;
};

// A block's part of a head: a share of the entries that are there, whatever the shapes would allow.
struct TileRange {
  int64_t item;
  int tile, begin, end;
  __device__ __forceinline__ explicit TileRange(int tiles)
      : item(blockIdx.x / unsigned(tiles)), tile(int(blockIdx.x % unsigned(tiles))) {}
  __device__ __forceinline__ void share(int n, int tiles) {
    const int64_t length = ((int64_t(n) + tiles - 1) / tiles + 31) / 32 * 32;
    begin = int(min(int64_t(n), tile * length));
    end = int(min(int64_t(n), (tile + 1) * length));
  }
};

__device__ __forceinline__ void store_histogram(const TopKShared& shared, uint32_t* target) {
  for (int i = int(threadIdx.x); i < kTopKBins / 2; i += kThreads) {
    target[i] = shared.histogram[2 * i] | shared.histogram[2 * i + 1] << 16;
  }
}

// shared.histogram = sum over the tiles.
__device__ __forceinline__ void add_histograms(const uint32_t* histograms, int tiles, TopKShared& shared) {
  constexpr int kBatch = 16;
  for (int word = int(threadIdx.x); word < kTopKBins / 2; word += kThreads) {
    unsigned even = 0, odd = 0;
    for (int begin = 0; begin < tiles; begin += kBatch) {
      uint32_t two[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        two[j] = begin + j < tiles ? histograms[int64_t(begin + j) * (kTopKBins / 2) + word] : 0;
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) even += two[j] & 0xffffu, odd += two[j] >> 16;
    }
    shared.histogram[2 * word] = even;
    shared.histogram[2 * word + 1] = odd;
  }
}

__global__ __launch_bounds__(kThreads, 1) void topk_count(TopKParams p, void* memory, int tiles) {
  wait_for_dependencies();
  launch_dependents();
  KVCACHE_DYNAMIC_SHARED(TopKShared, dynamic);
  TopKShared& shared = *dynamic;
  TileRange range(tiles);
  if (skips(p, range.item)) return;
  const Scratch scratch(memory, range.item, tiles);
  const TopKEntries entries(p, range.item);
  range.share(entries.n, tiles);
  const int kept = count_first_digit<kWarps>(entries, shared, range.begin, range.end);
  store_histogram(shared, scratch.histograms(0) + int64_t(range.tile) * (kTopKBins / 2));
  if (threadIdx.x == 0) scratch.kept()[range.tile] = kept;
}

__global__ __launch_bounds__(kThreads, 1) void topk_collect(TopKParams p, void* memory, int tiles) {
  wait_for_dependencies();
  launch_dependents();
  KVCACHE_DYNAMIC_SHARED(TopKShared, dynamic);
  TopKShared& shared = *dynamic;
  TileRange range(tiles);
  if (skips(p, range.item)) return;
  const Scratch scratch(memory, range.item, tiles);
  const TopKEntries entries(p, range.item);
  range.share(entries.n, tiles);
  const uint32_t* histograms = scratch.histograms(0);
  TopKSegment segment;
  load_segment<kWarps>(entries, range.begin, range.end, segment);  // on its way while the histograms are added up
  int kept = 0;
  for (int t = int(threadIdx.x); t < tiles; t += kThreads) kept += scratch.kept()[t];
  add_histograms(histograms, tiles, shared);
  TopKSearch search;
  int total = block_sum<kWarps>(kept, shared.totals);
  total += start_search<kWarps>(search, shared, needed(p, range.item));
  // What is certain to be taken from this tile, and how many of the border's bin lie in the tiles before it.
  const bool cut = !search.done(), from_list = search.inside <= kStaged;
  const int bin = int(search.border.score >> 21), lowest = cut ? bin + 1 : bin;
  int above = 0, before = 0;
  for (int word = int(threadIdx.x); word < kTopKBins / 2; word += kThreads) {
    const uint32_t two = histograms[int64_t(range.tile) * (kTopKBins / 2) + word];
    above += (2 * word >= lowest ? int(two & 0xffffu) : 0) + (2 * word + 1 >= lowest ? int(two >> 16) : 0);
  }
  for (int t = int(threadIdx.x); cut && t < range.tile; t += kThreads) {
    before += int(histograms[int64_t(t) * (kTopKBins / 2) + bin / 2] >> (bin % 2 * 16) & 0xffffu);
  }
  above = block_sum<kWarps>(above, shared.totals);
  before = block_sum<kWarps>(before, shared.totals);
  if (threadIdx.x == 0) {
    scratch.sure()[range.tile] = scratch.kept()[range.tile] + above;
    if (range.tile == 0) scratch.header() = {search, total, from_list};
  }
  if (!cut) return;
  clear<kWarps>(shared);
  each_entry<kWarps>(entries, range.begin, range.end, segment, [&](bool, bool candidate, const TopKKey& key) {
    const bool agrees = candidate && search.agrees(key);
    if (!from_list) {
      count_bin(shared.histogram, search.bin(key), agrees);
    } else if (agrees) {
      scratch.list()[before + atomicAdd(&shared.staged_so_far, 1)] = key;
    }
  });
  if (from_list) return;
  __syncthreads();
  store_histogram(shared, scratch.histograms(1) + int64_t(range.tile) * (kTopKBins / 2));
}

__global__ __launch_bounds__(kThreads, 1) void topk_write(TopKParams p, void* memory, int tiles) {
  wait_for_dependencies();
  launch_dependents();
  KVCACHE_DYNAMIC_SHARED(TopKShared, dynamic);
  TopKShared& shared = *dynamic;
  TileRange range(tiles);
  if (skips(p, range.item)) return;
  const Scratch scratch(memory, range.item, tiles);
  const TopKEntries entries(p, range.item);
  range.share(entries.n, tiles);
  TopKSegment segment;
  load_segment<kWarps>(entries, range.begin, range.end, segment);  // needed last, asked for first
  const Header header = scratch.header();
  TopKSearch search = header.search;
  const bool cut = !search.done();
  int staged = -1, offset = 0;
  if (cut && header.from_list) {
    staged = search.inside;
    for (int i = int(threadIdx.x); i < staged; i += kThreads) shared.staged[i] = scratch.list()[i];
  } else if (cut) {
    add_histograms(scratch.histograms(1), tiles, shared);
    find_bin<kWarps>(shared, search.need);
    search.found(shared.bin[0], shared.bin[1], shared.bin[2]);
  }
  staged = finish_search<kWarps>(entries, search, shared, staged, kStaged);
  if (cut && !header.from_list) {
    TopKSegment earlier;
    load_segment<kWarps>(entries, 0, range.begin, earlier);
    each_entry<kWarps>(entries, 0, range.begin, earlier, [&](bool alive, bool candidate, const TopKKey& key) {
      offset += alive && (!candidate || search.takes(key));
    });
  } else {
    for (int t = int(threadIdx.x); t < range.tile; t += kThreads) offset += scratch.sure()[t];
    for (int i = int(threadIdx.x); i < staged; i += kThreads) {
      offset += int(~shared.staged[i].order) < range.begin && search.takes(shared.staged[i]);
    }
  }
  offset = block_sum<kWarps>(offset, shared.totals);
  int32_t* index = p.index + range.item * p.width;  // [width]
  write_taken<kWarps>(entries, search, shared, range.begin, range.end, segment, offset, index, p.width);
  for (int64_t i = header.total + int64_t(range.tile) * kThreads + threadIdx.x; i < p.width; i += tiles * kThreads) {
    index[i] = -1;
  }
  if (range.tile == 0 && threadIdx.x == 0) p.index_counts[range.item] = header.total;
}

// --- choice --------------------------------------------------------------------------------------------------------

int64_t scores_width(const TopKParams& p) { return p.page_size > 0 ? p.page_width * p.page_size : p.capacity; }

// Tiles per head, 1: a block of its own does all. As many as fill a large GPU, but each adds up the histograms of all.
int choose_tiles(const TopKParams& p) {
  constexpr int64_t kAlone = 16384, kTile = 4096, kLongestTile = 32768, kMostTiles = 64, kBlocks = 264;
  const int64_t items = int64_t(p.rows) * p.heads, width = scores_width(p);
  if (width <= kAlone || items > kBlocks / 2) return 1;
  const int64_t wanted = std::min({ceil_div(width, kTile), kBlocks / items, kMostTiles});
  return int(std::max(wanted, ceil_div(width, kLongestTile)));  // counts of a tile have 16 bits
}

}  // namespace

int64_t topk_scratch(const TopKParams& p) {
  const int tiles = choose_tiles(p);
  return tiles == 1 ? 0 : int64_t(p.rows) * p.heads * Scratch::words(tiles) * int64_t(sizeof(uint32_t));
}

int topk(const TopKParams& p, void* scratch, Stream stream) {
  const int64_t items = int64_t(p.rows) * p.heads;
  if (items == 0) return 0;
  const int tiles = choose_tiles(p);
  const int64_t blocks = items * tiles;
  if (blocks > INT32_MAX || scores_width(p) > INT32_MAX - kThreads * kTopKBatch) return kInvalidConfiguration;
  const dim3 grid{unsigned(blocks)};
  if (tiles == 1 && scores_width(p) <= kSmallStaged) {
    return KVCACHE_LAUNCH_DEPENDENT(topk_block<kSmallWarps>, grid, dim3(kSmallWarps * 32),
                                    TopKShared::bytes(kSmallStaged), stream, p, kSmallStaged);
  }
  if (tiles == 1) {
    return KVCACHE_LAUNCH_DEPENDENT(topk_block<kWarps>, grid, dim3(kThreads), TopKShared::bytes(kStaged), stream, p,
                                    kStaged);
  }
  constexpr size_t kCounting = TopKShared::bytes(0);
  int error = KVCACHE_LAUNCH_DEPENDENT(topk_count, grid, dim3(kThreads), kCounting, stream, p, scratch, tiles);
  if (error) return error;
  error = KVCACHE_LAUNCH_DEPENDENT(topk_collect, grid, dim3(kThreads), kCounting, stream, p, scratch, tiles);
  if (error) return error;
  return KVCACHE_LAUNCH_DEPENDENT(topk_write, grid, dim3(kThreads), TopKShared::bytes(kStaged), stream, p, scratch,
                                  tiles);
}

}  // namespace kvcache::cuda
