#include "page_pool.h"

#include <algorithm>
#include <bit>
#include <string>

namespace kvcache {

namespace {

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument("PagePool: " + message); }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

std::string of_list(const TableView& table, int64_t list) {
  return " of head (" + std::to_string(list / table.heads) + ", " + std::to_string(list % table.heads) + ")";
}

}  // namespace

OutOfPages::OutOfPages(int64_t needed_pages, int64_t available_pages)
    : std::runtime_error("out of pages: " + std::to_string(needed_pages) + " needed, " +
                         std::to_string(available_pages) + " available"),
      needed(needed_pages),
      available(available_pages) {}

PagePool::PagePool(int32_t page_size, int64_t limit) : page_size_(page_size), limit_(limit) {
  if (page_size < 1) fail("page_size must be at least 1, got " + std::to_string(page_size));
  if (limit < -1) fail("limit must be -1 (none) or a number of pages, got " + std::to_string(limit));
}

void PagePool::check_page(int64_t page) const {
  if (page < 0 || page >= capacity()) {
    fail("page " + std::to_string(page) + " does not exist, the capacity is " + std::to_string(capacity()));
  }
}

int32_t PagePool::refcount(int64_t page) const {
  check_page(page);
  return references_[page];
}

std::vector<int32_t> PagePool::used_pages() const {
  std::vector<int32_t> pages;
  pages.reserve(used_);
  for (int64_t page = 0; page < capacity(); ++page) {
    if (references_[page] > 0) pages.push_back(int32_t(page));
  }
  return pages;
}

void PagePool::grow(int64_t capacity) {
  if (capacity < this->capacity()) {
    fail("grow to " + std::to_string(capacity) + " pages would shrink it from " + std::to_string(this->capacity()) +
         "; use relocate");
  }
  if (capacity > INT32_MAX) fail("at most 2^31 - 1 pages");
  if (limit_ >= 0 && capacity > limit_) throw OutOfPages(capacity, limit_);
  const int64_t old = this->capacity();
  references_.resize(capacity, 0);
  free_.resize(ceil_div(capacity, 64), 0);
  summary_.resize(ceil_div(int64_t(free_.size()), 64), 0);
  for (int64_t page = old; page < capacity; ++page) mark(page, true);
}

void PagePool::mark(int64_t page, bool free) {
  const size_t word = size_t(page) / 64, group = word / 64;
  const uint64_t bit = uint64_t{1} << (page % 64), word_bit = uint64_t{1} << (word % 64);
  if (free) {
    free_[word] |= bit;
    summary_[group] |= word_bit;
    hint_ = std::min(hint_, group);
  } else {
    free_[word] &= ~bit;
    if (free_[word] == 0) summary_[group] &= ~word_bit;
  }
}

void PagePool::rebuild_bitmaps() {
  free_.assign(ceil_div(capacity(), 64), 0);
  summary_.assign(ceil_div(int64_t(free_.size()), 64), 0);
  hint_ = 0;
  for (int64_t page = 0; page < capacity(); ++page) {
    if (references_[page] == 0) mark(page, true);
  }
}

void PagePool::need(int64_t pages) const {
  if (pages > free_pages()) throw OutOfPages(pages, free_pages());
}

int32_t PagePool::allocate() {  // the caller has asked need()
  while (summary_[hint_] == 0) ++hint_;
  const size_t word = hint_ * 64 + std::countr_zero(summary_[hint_]);
  const int64_t page = int64_t(word) * 64 + std::countr_zero(free_[word]);
  mark(page, false);
  references_[page] = 1;
  ++used_;
  return int32_t(page);
}

int32_t PagePool::add_reference(int32_t page) {
  shared_ += ++references_[page] == 2;
  return references_[page];
}

int32_t PagePool::take_reference(int32_t page) {
  shared_ -= --references_[page] == 1;
  return references_[page];
}

bool PagePool::drop(int32_t page) {
  if (take_reference(page) > 0) return false;
  mark(page, true);
  --used_;
  return true;
}

PagePool::Plan PagePool::plan_extend(const TableView& table, const int32_t* counts, const int32_t* added,
                                     int64_t scalar) {
  Plan plan;
  dropped_.clear();
  std::string error;
  for (int64_t i = 0; i < table.lists() && error.empty(); ++i) {
    const int64_t count = counts[i], more = added ? added[i / table.heads] : scalar;
    if (count < 0 || more < 0) {
      error = "count " + std::to_string(count) + " and added " + std::to_string(more) + of_list(table, i) +
              " must not be negative";
      break;
    }
    if (more == 0) continue;
    const int64_t begin = count / page_size_, end = ceil_div(count + more, page_size_);
    if (end > table.width) {
      error = std::to_string(count + more) + " entries" + of_list(table, i) + " need a table of width " +
              std::to_string(end) + ", it has " + std::to_string(table.width);
      break;
    }
    const int32_t* list = table.list(i);
    for (int64_t column = begin; column < end; ++column) {
      const int32_t page = list[column];
      const bool partial = column == begin && count % page_size_ != 0;
      if (page < 0 && !partial) {
        ++plan.needed;
        continue;
      }
      if (page < 0 || page >= capacity() || references_[page] == 0) {
        error = "table names page " + std::to_string(page) + of_list(table, i) + ", which is not in use";
        break;
      }
      if (references_[page] > 1) {
        ++plan.needed;
        plan.copies += partial;
        --references_[page];  // the next head that shares it may be its only owner by then
        dropped_.push_back(page);
      }
    }
  }
  for (int32_t page : dropped_) ++references_[page];
  if (!error.empty()) fail(error);
  return plan;
}

int64_t PagePool::pages_needed(const TableView& table, const int32_t* counts, const int32_t* added, int64_t scalar) {
  return plan_extend(table, counts, added, scalar).needed;
}

Copies PagePool::extend(const TableView& table, const int32_t* counts, const int32_t* added, int64_t scalar) {
  const Plan plan = plan_extend(table, counts, added, scalar);
  Copies copies;
  if (plan.needed == 0) return copies;
  need(plan.needed);
  copies.source.reserve(plan.copies);
  copies.target.reserve(plan.copies);
  for (int64_t i = 0; i < table.lists(); ++i) {
    const int64_t count = counts[i], more = added ? added[i / table.heads] : scalar;
    if (more == 0) continue;
    const int64_t begin = count / page_size_, end = ceil_div(count + more, page_size_);
    int32_t* list = table.list(i);
    for (int64_t column = begin; column < end; ++column) {
      const int32_t old = list[column];
      if (old >= 0 && references_[old] == 1) continue;
      list[column] = allocate();
      if (old < 0) continue;
      take_reference(old);
      if (column == begin && count % page_size_ != 0) {
        copies.source.push_back(old);
        copies.target.push_back(list[column]);
      }
    }
  }
  return copies;
}

void PagePool::check_pages(const TableView& table) const {
  for (int64_t i = 0; i < table.lists() * table.width; ++i) {
    const int32_t page = table.pages[i];
    if (page < 0) continue;
    if (page >= capacity() || references_[page] == 0) {
      fail("table names page " + std::to_string(page) + of_list(table, i / table.width) + ", which is not in use");
    }
  }
}

int64_t PagePool::shrink(const TableView& table, const int32_t* counts) {
  for (int64_t i = 0; i < table.lists(); ++i) {
    if (counts[i] < 0) fail("count " + std::to_string(counts[i]) + of_list(table, i) + " must not be negative");
    for (int64_t column = ceil_div(counts[i], page_size_); column < table.width; ++column) {
      const int32_t page = table.list(i)[column];
      if (page < 0) break;
      if (page >= capacity() || references_[page] == 0) {
        fail("table names page " + std::to_string(page) + of_list(table, i) + ", which is not in use");
      }
    }
  }
  int64_t freed = 0;
  for (int64_t i = 0; i < table.lists(); ++i) {
    int32_t* list = table.list(i);
    for (int64_t column = ceil_div(counts[i], page_size_); column < table.width && list[column] >= 0; ++column) {
      freed += drop(list[column]);
      list[column] = -1;
    }
  }
  return freed;
}

void PagePool::retain(const TableView& table) {
  check_pages(table);
  for (int64_t i = 0; i < table.lists() * table.width; ++i) {
    if (table.pages[i] >= 0) add_reference(table.pages[i]);
  }
}

int64_t PagePool::release(const TableView& table) {
  check_pages(table);
  // A page that the table names more often than it has references: undo, then complain.
  int64_t freed = 0, i = 0;
  const int64_t n = table.lists() * table.width;
  for (; i < n; ++i) {
    const int32_t page = table.pages[i];
    if (page < 0) continue;
    if (references_[page] == 0) break;
    take_reference(page);
  }
  if (i < n) {
    const int32_t page = table.pages[i];
    for (int64_t j = 0; j < i; ++j) {
      if (table.pages[j] >= 0) add_reference(table.pages[j]);
    }
    fail("table names page " + std::to_string(page) + " more often than it is held (double free)");
  }
  for (i = 0; i < n; ++i) {
    const int32_t page = table.pages[i];
    if (page < 0) continue;
    table.pages[i] = -1;
    const size_t word = size_t(page) / 64;
    if (references_[page] == 0 && !(free_[word] >> (page % 64) & 1)) {
      mark(page, true);
      --used_;
      ++freed;
    }
  }
  return freed;
}

bool PagePool::shared(const TableView& table) const {
  check_pages(table);
  for (int64_t i = 0; i < table.lists() * table.width; ++i) {
    if (table.pages[i] >= 0 && references_[table.pages[i]] > 1) return true;
  }
  return false;
}

Copies PagePool::unshare(const TableView& table, const int32_t* begin, const int32_t* end) {
  Copies copies;
  dropped_.clear();
  std::string error;
  for (int64_t i = 0; i < table.lists() && error.empty(); ++i) {
    if (begin[i] < 0 || end[i] > table.width) {
      error = "page columns " + std::to_string(begin[i]) + " to " + std::to_string(end[i]) + of_list(table, i) +
              " are not within a table of width " + std::to_string(table.width);
      break;
    }
    for (int64_t column = begin[i]; column < end[i]; ++column) {
      const int32_t page = table.list(i)[column];
      if (page < 0) continue;
      if (page >= capacity() || references_[page] == 0) {
        error = "table names page " + std::to_string(page) + of_list(table, i) + ", which is not in use";
        break;
      }
      if (references_[page] > 1) {
        --references_[page];
        dropped_.push_back(page);
      }
    }
  }
  for (int32_t page : dropped_) ++references_[page];
  if (!error.empty()) fail(error);
  if (dropped_.empty()) return copies;
  need(int64_t(dropped_.size()));
  for (int64_t i = 0; i < table.lists(); ++i) {
    int32_t* list = table.list(i);
    for (int64_t column = begin[i]; column < end[i]; ++column) {
      const int32_t old = list[column];
      if (old < 0 || references_[old] == 1) continue;
      list[column] = allocate();
      take_reference(old);
      copies.source.push_back(old);
      copies.target.push_back(list[column]);
    }
  }
  return copies;
}

std::vector<int32_t> PagePool::relocate(int64_t capacity) {
  if (capacity < 0) fail("capacity must not be negative, got " + std::to_string(capacity));
  if (used_ > capacity) {
    fail("relocate to " + std::to_string(capacity) + " pages, but " + std::to_string(used_) + " are in use");
  }
  std::vector<int32_t> renamed(references_.size(), -1);
  const int64_t kept = std::min(capacity, this->capacity());
  for (int64_t page = 0; page < kept; ++page) {
    if (references_[page] > 0) renamed[page] = int32_t(page);
  }
  int64_t target = 0;
  for (int64_t page = kept; page < this->capacity(); ++page) {
    if (references_[page] == 0) continue;
    while (references_[target] > 0) ++target;
    references_[target] = references_[page];
    renamed[page] = int32_t(target);
  }
  if (capacity > this->capacity()) {
    grow(capacity);
    return renamed;
  }
  references_.resize(capacity);
  rebuild_bitmaps();
  return renamed;
}

}  // namespace kvcache
