// Which pages are free and how many tables hold each of the others. Host side only; the pages' memory is the store's.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace kvcache {

struct OutOfPages : std::runtime_error {
  OutOfPages(int64_t needed_pages, int64_t available_pages);
  int64_t needed, available;
};

// A table [rows, heads, width] of page ids; in each [row, head] the pages come first and -1 fills the rest.
struct TableView {
  int32_t* pages;
  int64_t rows, heads, width;
  int64_t lists() const { return rows * heads; }
  int32_t* list(int64_t i) const { return pages + i * width; }
};

// Pages whose contents must be copied: source[i] onto target[i], before anything is written to target[i].
struct Copies {
  std::vector<int32_t> source, target;
};

// Always hands out the lowest free page, so that equal histories give equal tables. Errors leave the pool and the table
// as they were. Costs are proportional to the pages touched.
class PagePool {
 public:
  // `limit`: most pages that the pool may grow to, -1 for none.
  explicit PagePool(int32_t page_size, int64_t limit = -1);

  int32_t page_size() const { return page_size_; }
  int64_t capacity() const { return int64_t(references_.size()); }
  int64_t used() const { return used_; }
  int64_t free_pages() const { return capacity() - used_; }
  int64_t shared_pages() const { return shared_; }  // pages with more than one reference
  int64_t limit() const { return limit_; }
  int32_t refcount(int64_t page) const;
  std::vector<int32_t> used_pages() const;

  void grow(int64_t capacity);

  // Fresh pages that extend() takes: `added[row]` (or the scalar when null) more entries in every head of a row.
  int64_t pages_needed(const TableView& table, const int32_t* counts, const int32_t* added, int64_t scalar);
  // Makes slots counts .. counts + added - 1 writable: allocates missing pages, replaces shared ones. Only the partially
  // filled last page has contents to copy. Pages already there and not shared are kept, so it may be repeated.
  Copies extend(const TableView& table, const int32_t* counts, const int32_t* added, int64_t scalar);
  // Gives back the pages behind the first ceil(count / page_size); returns how many became free.
  int64_t shrink(const TableView& table, const int32_t* counts);

  void retain(const TableView& table);      // one more reference to every page
  int64_t release(const TableView& table);  // one less, and the table is emptied; returns how many became free
  bool shared(const TableView& table) const;
  // Replaces the shared pages in the page columns begin .. end - 1 of each head by fresh ones.
  Copies unshare(const TableView& table, const int32_t* begin, const int32_t* end);

  // Renames pages so that all ids are below `capacity`, the new capacity. Returns old id -> new id, -1 for free pages;
  // ids below `capacity` stay.
  std::vector<int32_t> relocate(int64_t capacity);

 private:
  struct Plan {
    int64_t needed = 0, copies = 0;
  };
  Plan plan_extend(const TableView& table, const int32_t* counts, const int32_t* added, int64_t scalar);
  void check_pages(const TableView& table) const;
  void check_page(int64_t page) const;
  void need(int64_t pages) const;
  int32_t allocate();
  bool drop(int32_t page);  // true when the page became free
  int32_t add_reference(int32_t page);
  int32_t take_reference(int32_t page);  // both return the page's references afterwards
  void mark(int64_t page, bool free);
  void rebuild_bitmaps();

  int32_t page_size_;
  int64_t limit_, used_ = 0, shared_ = 0;
  std::vector<int32_t> references_;       // [capacity]; 0: free
  std::vector<uint64_t> free_, summary_;  // bit per page: free; bit per word of free_: not zero
  size_t hint_ = 0;                       // no free page lies in a word of summary_ before this one
  std::vector<int32_t> dropped_;          // scratch of plan_extend, kept to avoid allocating per call
};

}  // namespace kvcache
