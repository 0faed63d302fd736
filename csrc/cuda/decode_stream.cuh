// The loading side of decode attention: one warp's way through the entries of its worker's share.
//
// The warp's ring runs across the ends of items, so the memory stays busy while an item is finished. What leads to an
// entry is asked for ahead: the length of the next item while this one is loaded, the list of slots two tiles ahead, the
// table one tile ahead; so the only waits are those of the first tile.
#pragma once
#include "decode_attention.cuh"
#include "ptx/cp_async.cuh"

namespace kvcache::cuda {

// What the computing side must know of 16 entries in the ring.
struct alignas(16) PartNote {
  uint32_t visible;  // a bit for each entry that is read
  uint32_t last;     // the item ends here, for this worker
  int32_t unused[2];
  int32_t slots[kPart];  // where visible
};

// Row: what can number all entries of the pool.
template <class Row>
class EntryStream {
 public:
  __device__ EntryStream(const DecodeLaunch& d, const DecodeShare& share, int unit, int worker, int part, int lane)
      : d_(d), share_(share), unit_(unit), worker_(worker), tile_(d.parts * kPart), mine_(part * kPart + lane % kPart) {
    item_ = share.first;
    const RowHead at = row_head(d.p.view, item_);
    row_ = at.row, head_ = at.head;
    ask_lengths(item_, row_, head_, count_, listed_count_);
    enter(share.first_unit * unit);
  }

  __device__ bool more() const { return item_ <= share_.last; }

  // Notes the next 16 entries and has copy(row, visible) start their copies: lane l (and l + 16) has the row of entry l.
  template <class Copy>
  __device__ __forceinline__ void issue(PartNote* note, int lane, const Copy& copy) {
    const AttentionParams& p = d_.p;
    if (at_ == begin_) {
      const Lengths now = lengths(p, count_, listed_count_);
      count_ = now.count;
      end_ = decode_piece(share_, worker_, item_, unit_, now.places).end;
    }
    const bool seen = at_ + mine_ < end_ && slot_ >= 0 && slot_ < count_ && position_ >= window_;
    const uint32_t visible = __ballot_sync(kFullWarp, seen) & 0xffffu;
    const bool last = at_ + tile_ >= end_;
    if (lane < kPart) note->slots[lane] = slot_;
    if (lane == 0) note->visible = visible, note->last = last;
    if (visible) {
      // An invisible entry's row is not read but has to be a valid one.
      copy(seen ? Row(page_) * Row(p.view.page_size) + Row(inside_) : Row(0), visible);
    }
    if (last) next_item();
    else next_tile();
  }

 private:
  __device__ __forceinline__ void ask_lengths(int item, int row, int head, int32_t& count, int32_t& listed) {
    count = d_.p.view.counts[item];
    listed = d_.p.index ? d_.p.index_counts[index_list(d_.p, row, head)] : 0;
  }

  // The listed number for this lane's place of the tile that begins at `at`.
  __device__ __forceinline__ int32_t ask_list(int at) const {
    const AttentionParams& p = d_.p;
    const int place = p.index_pages ? d_.page_size.quotient(at + mine_) : at + mine_;
    return place < p.index_width ? p.index[index_list(p, row_, head_) * p.index_width + place] : -1;
  }

  __device__ __forceinline__ void enter(int begin) {
    const AttentionParams& p = d_.p;
    begin_ = at_ = begin;
    table_ = p.view.table + int64_t(item_) * p.view.table_width;
    positions_ = p.view.positions + int64_t(item_) * p.view.capacity;
    window_ = p.window_start ? p.window_start[row_] : INT32_MIN;
    if (item_ < share_.last) {
      const bool same_row = head_ + 1 < p.view.heads;
      ask_lengths(item_ + 1, same_row ? row_ : row_ + 1, same_row ? head_ + 1 : 0, next_count_, next_listed_count_);
    }
    if (p.index) {
      listed_ = ask_list(at_);
      ahead_ = ask_list(at_ + tile_);
    }
    look_up();
  }

  __device__ __forceinline__ void next_item() {
    if (++item_ > share_.last) return;
    if (++head_ == d_.p.view.heads) head_ = 0, ++row_;
    count_ = next_count_, listed_count_ = next_listed_count_;
    enter(0);
  }

  __device__ __forceinline__ void next_tile() {
    at_ += tile_;
    if (d_.p.index) {
      listed_ = ahead_;
      ahead_ = ask_list(at_ + tile_);
    }
    look_up();
  }

  // Asks for the page (and position) of this lane's entry. Beyond the count these are whatever the memory holds.
  __device__ __forceinline__ void look_up() {
    const AttentionParams& p = d_.p;
    slot_ = at_ + mine_;
    if (p.index) {
      const int inside = slot_ - d_.page_size.quotient(slot_) * p.view.page_size;
      slot_ = !p.index_pages                                 ? listed_
              : listed_ < 0 || listed_ >= p.view.table_width ? -1
                                                             : listed_ * p.view.page_size + inside;
    }
    const int column = slot_ < 0 ? 0 : d_.page_size.quotient(slot_);
    inside_ = slot_ - column * p.view.page_size;
    const bool there = slot_ >= 0 && column < p.view.table_width;
    page_ = there ? table_[column] : 0;
    position_ = there && p.window_start ? positions_[slot_] : INT32_MAX;
  }

  const DecodeLaunch& d_;
  const DecodeShare& share_;
  const int unit_, worker_, tile_, mine_;  // mine: place of this lane's entry in a tile
  int item_, row_, head_;
  const int32_t *table_, *positions_;  // of the item
  int begin_, at_, end_;               // places: of the piece, and of the tile to load next
  int32_t count_, listed_count_, next_count_, next_listed_count_;
  int32_t window_;
  int32_t listed_ = 0, ahead_ = 0;
  int32_t slot_, page_, inside_, position_;
};

// cp.async with a copy size that is fixed at compile time; 2 bytes are a plain load and store.
template <int kGrain>
__device__ __forceinline__ void copy_grain(char* to, const char* from, bool full) {
  if constexpr (kGrain == 16) cp_async_16(to, from, full);
  else if constexpr (kGrain == 8) cp_async_8(to, from, full);
  else if constexpr (kGrain == 4) cp_async_4(to, from, full);
  else *reinterpret_cast<uint16_t*>(to) = full ? *reinterpret_cast<const uint16_t*>(from) : uint16_t(0);
}

// Rows of 16 entries to shared memory, `stride` bytes apart, each in `pieces` copies of kGrain bytes. Lane l has the row
// of entry l % 16.
template <int kGrain, class Row>
__device__ __forceinline__ void copy_rows(char* to, int stride, const void* pages, const Divisor& pieces, Row row,
                                          uint32_t visible, int lane) {
  constexpr int kAtOnce = kGrain == 16 ? 4 : 1;
  const char* from = static_cast<const char*>(pages);
  const int n = pieces.value;
#pragma unroll kAtOnce
  for (int i = lane; i < lane + kPart * n; i += 32) {
    const int r = min(pieces.quotient(i), kPart - 1), c = i - r * n;
    const Row mine = __shfl_sync(kFullWarp, row, r);
    if (c < n) {
      copy_grain<kGrain>(to + r * stride + c * kGrain, from + uint64_t(mine) * uint32_t(n * kGrain) + c * kGrain,
                         visible >> r & 1);
    }
  }
}

// The same for keys and values of kPieces times 16 bytes each, a power of two.
template <int kPieces>
__device__ __forceinline__ void copy_equal_rows(char* k_to, char* v_to, int stride, const PagedView& view, uint32_t row,
                                                uint32_t visible, int lane) {
  static_assert(32 % kPieces == 0, "whole rows at a time");
  constexpr int kRows = 32 / kPieces;
  const int first = lane / kPieces, inside = lane % kPieces * 16, at = first * stride + inside;
  const char *k = static_cast<const char*>(view.k_pages) + inside, *v = static_cast<const char*>(view.v_pages) + inside;
  visible >>= first;
#pragma unroll
  for (int r = 0; r < kPart; r += kRows) {
    const uint64_t from = uint64_t(__shfl_sync(kFullWarp, row, first + r)) * (kPieces * 16);
    const bool full = visible >> r & 1;
    cp_async_16(k_to + at + r * stride, k + from, full);
    cp_async_16(v_to + at + r * stride, v + from, full);
  }
}

}  // namespace kvcache::cuda
