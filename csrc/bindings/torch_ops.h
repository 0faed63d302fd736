// Shared by the torch_ops_*.cpp files: argument checks and the list of ops.
//
// Checks happen before anything is written. A message starts with "ValueError: " or "TypeError: ", from which
// python/kvcache/ops raises that exception; torch itself only passes on RuntimeError.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <string>

#include "../core/paged_view.h"
#include "abi.h"

namespace kvcache {

void register_ops();  // in torch_ops.cpp; once, at import

struct Op {
  const char *name, *schema;
  abi::Boxed cpu;
};
// What each file contributes, ended by an entry without a name.
extern const Op kStorageOps[], kSelectionOps[], kAttentionOps[];

namespace bindings {

using abi::OptionalTensor;
using abi::Tensor;

constexpr int64_t kAny = -1;

struct Dim {
  const char* name;
  int64_t size;  // kAny: whatever it is
};

// The checks of one call.
class Checker {
 public:
  explicit Checker(const char* op) : op_(op) {}

  [[noreturn]] void value_error(const std::string& message) const;
  [[noreturn]] void type_error(const std::string& message) const;

  void shape(const char* argument, const Tensor& tensor, std::initializer_list<Dim> want) const;
  void contiguous(const char* argument, const Tensor& tensor) const;
  void inner_contiguous(const char* argument, const Tensor& tensor) const;
  void cpu(const char* argument, const Tensor& tensor) const;
  DType storage(const char* argument, const Tensor& tensor) const;  // float32, bfloat16 or float16

  // Contiguous, of the given shape, on the CPU.
  const int32_t* int32(const char* argument, const Tensor& tensor, std::initializer_list<Dim> want) const;
  const float* float32(const char* argument, const Tensor& tensor, std::initializer_list<Dim> want) const;
  const bool* boolean(const char* argument, const Tensor& tensor, std::initializer_list<Dim> want) const;
  // [a, b, c, d], or [a, b, d] with c = 1, with any strides but the innermost.
  Strided4 strided4(const char* argument, const Tensor& tensor, std::initializer_list<Dim> want) const;
  // Any strides but those of a third dimension; `stride` gets the first two.
  const int32_t* strided_int32(const char* argument, const Tensor& tensor, std::initializer_list<Dim> want,
                               int64_t (&stride)[2]) const;
  const float* strided_float32(const char* argument, const Tensor& tensor, std::initializer_list<Dim> want,
                               int64_t (&stride)[2]) const;

  // The page arrays; v_pages is null for ops that read keys only.
  PagedView page_arrays(const Tensor& k_pages, const Tensor* v_pages) const;
  // What the attention kernels can read. Storing has no limit: MLA caches latents wider than any head.
  static constexpr int64_t kMaxHeadSize = 256;
  void head_sizes(const PagedView& view) const;
  // ... and the table that names the pages.
  PagedView pages(const Tensor& k_pages, const Tensor* v_pages, const Tensor& table,
                  const char* table_name = "table") const;
  // counts [R, H] within 0 .. C and positions [R, H, C] of such a view.
  void entries(PagedView& view, const Tensor& counts, const Tensor& positions) const;
  void columns(PagedView& view, const Tensor& columns) const;
  // Page ids of slots begin .. end - 1 of a list (one head's line of a table) exist.
  void page_ids(const PagedView& view, const char* argument, const int32_t* list, int64_t item, int64_t begin,
                int64_t end) const;
  void live_pages(const PagedView& view) const;  // page_ids of all entries

 private:
  void dtype(const char* argument, const Tensor& tensor, int32_t want, const char* name) const;
  const char* op_;
};

std::string head_name(int64_t item, int64_t heads);  // "head (row, head)"

// Items per thread so that a piece moves at least a few thousand elements: below that waking a thread costs more.
inline int64_t grain(int64_t elements_per_item) {
  constexpr int64_t kElements = 32768;
  return elements_per_item >= kElements ? 1 : kElements / (elements_per_item > 0 ? elements_per_item : 1);
}

}  // namespace bindings
}  // namespace kvcache
