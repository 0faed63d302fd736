// What the ops that read entries share: the checks of their arguments.
#pragma once
#include <algorithm>
#include <string>
#include <vector>

#include "../core/params.h"
#include "torch_ops.h"

namespace kvcache {
namespace bindings {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t max_count(const PagedView& view) {
  const int64_t items = int64_t(view.rows) * view.heads;
  return items > 0 ? *std::max_element(view.counts, view.counts + items) : 0;
}

// The arguments that the attention ops share, as far as they are there.
class AttentionChecker : public Checker {
 public:
  AttentionChecker(const char* op, Backend backend, AttentionParams& p)
      : Checker(op, backend), p_(p), backend_(backend) {}

  // q [R, Hq, T, Dk], or [R, Hq, Dk] for one token.
  void query(const Tensor& q, bool tokens) {
    const Dim dim{"Dk", p_.view.k_dim};
    p_.q = tokens ? strided4("q", q, {rows(), {"Hq", kAny}, {"T", kAny}, dim})
                  : strided4("q", q, {rows(), {"Hq", kAny}, dim});
    p_.query_heads = int32_t(q.size(1));
    p_.tokens = tokens ? int32_t(q.size(2)) : 1;
    if (p_.view.heads ? p_.query_heads % p_.view.heads != 0 : p_.query_heads != 0) {
      value_error("q has " + std::to_string(p_.query_heads) +
                  " heads, needs a multiple of H=" + std::to_string(p_.view.heads));
    }
  }

  void positions(const Tensor& q_positions) { p_.q_positions = int32("q_positions", q_positions, {rows(), tokens()}); }

  void window(const OptionalTensor& start, bool per_token) {
    if (!start) return;
    p_.window_start =
        per_token ? int32("window_start", *start, {rows(), tokens()}) : int32("window_start", *start, {rows()});
  }

  void sinks(const OptionalTensor& sinks) {
    if (sinks) p_.sinks = float32("sinks", *sinks, {{"Hq", p_.query_heads}});
  }

  void bias(const OptionalTensor& bias) {
    if (!bias) return;
    p_.bias = float32("bias", *bias, {rows(), {"heads", kAny}, capacity()});
    p_.bias_heads = heads_of("bias", *bias, {1, p_.view.heads, p_.query_heads});
  }

  void mask(const OptionalTensor& mask) {
    if (!mask) return;
    p_.mask = boolean("mask", *mask, {rows(), {"heads", kAny}, tokens(), capacity()});
    p_.mask_heads = heads_of("mask", *mask, {1, p_.view.heads});
  }

  void softcap(double softcap) {
    if (!(softcap >= 0)) value_error("softcap is " + std::to_string(softcap) + ", needs 0 (none) or more");
    p_.softcap = float(softcap);
  }

  void index(const OptionalTensor& index, const OptionalTensor& index_counts, bool pages = false) {
    if (index.has_value() != index_counts.has_value()) value_error("index and index_counts need each other");
    if (!index) return;
    p_.index = int32("index", *index, {rows(), {"heads", kAny}, {"K", kAny}});
    p_.index_heads = heads_of("index", *index, {1, p_.view.heads});
    p_.index_width = index->size(2);
    p_.index_counts = int32("index_counts", *index_counts, {rows(), {"heads", p_.index_heads}});
    p_.index_pages = pages;
    if (backend_ != Backend::kCpu) return;
    for (int64_t i = 0; i < int64_t(p_.view.rows) * p_.index_heads; ++i) index_list(i);
  }

 private:
  Dim rows() const { return {"R", p_.view.rows}; }
  Dim tokens() const { return {"T", p_.tokens}; }
  Dim capacity() const { return {"C", p_.view.capacity}; }

  int32_t heads_of(const char* argument, const Tensor& tensor, std::initializer_list<int32_t> choices) const {
    const int64_t heads = tensor.size(1);
    if (std::find(choices.begin(), choices.end(), heads) != choices.end()) return int32_t(heads);
    std::string wanted;
    for (int32_t choice : choices) wanted += (wanted.empty() ? "" : " or ") + std::to_string(choice);
    value_error(std::string(argument) + " has " + std::to_string(heads) + " heads in dimension 1, needs " + wanted);
  }

  // Slots are held by one of the heads that read the list, and none is listed twice.
  void index_list(int64_t i) const {
    const int64_t row = i / p_.index_heads, head = i % p_.index_heads;
    const std::string name = "(" + std::to_string(row) + ", " + std::to_string(head) + ")";
    const int64_t n = p_.index_counts[i];
    if (n < 0 || n > p_.index_width) {
      value_error("index_counts of " + name + " is " + std::to_string(n) +
                  ", needs 0 to K=" + std::to_string(p_.index_width));
    }
    const int32_t* counts = p_.view.counts + row * p_.view.heads;
    const int64_t entries = p_.index_heads == p_.view.heads ? counts[head]
                            : p_.view.heads > 0             ? *std::max_element(counts, counts + p_.view.heads)
                                                            : 0;
    const int64_t room = p_.index_pages ? ceil_div(entries, p_.view.page_size) : entries;
    const char* what = p_.index_pages ? "page" : "slot";
    const int32_t* slots = p_.index + i * p_.index_width;
    bool ascending = true;
    for (int64_t j = 0; j < n; ++j) {
      if (slots[j] < 0 || slots[j] >= room) {
        value_error("index of " + name + " lists " + what + " " + std::to_string(slots[j]) + ", needs a " + what +
                    " below " + std::to_string(room));
      }
      ascending = ascending && (j == 0 || slots[j] > slots[j - 1]);
    }
    if (ascending) return;
    std::vector<int32_t> sorted(slots, slots + n);
    std::sort(sorted.begin(), sorted.end());
    if (auto twice = std::adjacent_find(sorted.begin(), sorted.end()); twice != sorted.end()) {
      value_error("index of " + name + " lists " + what + " " + std::to_string(*twice) + " twice");
    }
  }

  AttentionParams& p_;
  Backend backend_;
};

}  // namespace bindings
}  // namespace kvcache
