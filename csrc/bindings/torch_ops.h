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
  abi::Boxed cpu, cuda;  // null: not in this build
};
// The two forms of an op's function, which is a template over the Backend. Under KVCACHE_EMULATED (csrc/emulation) the
// CUDA form is all there is; its kernels run on the host then, over CPU tensors, as torch.ops.kvcache_emulated.
#if defined(KVCACHE_EMULATED)
#define KVCACHE_OP(function) nullptr, abi::Box<bindings::function<bindings::Backend::kCuda>>::call
#elif defined(KVCACHE_WITH_CUDA)
#define KVCACHE_OP(function)                                   \
  abi::Box<bindings::function<bindings::Backend::kCpu>>::call, \
      abi::Box<bindings::function<bindings::Backend::kCuda>>::call
#else
#define KVCACHE_OP(function) abi::Box<bindings::function<bindings::Backend::kCpu>>::call, nullptr
#endif
// What each file contributes, ended by an entry without a name.
extern const Op kStorageOps[], kSelectionOps[], kSelectTokensOps[], kEvictionOps[], kAttentionOps[], kLatentOps[],
    kRoutingOps[];

namespace bindings {

using abi::OptionalTensor;
using abi::OptionalTensorList;
using abi::Tensor;
using abi::TensorList;

enum class Backend { kCpu, kCuda };

constexpr int64_t kAny = -1;

struct Dim {
  const char* name;
  int64_t size;  // kAny: whatever it is
};

// The checks of one call. Contents of tensors are looked at on the CPU only: on a GPU that would be a round trip.
class Checker {
 public:
  Checker(const char* op, Backend backend);

  std::string name() const { return op_; }
  // The arguments looked at from now on are entry `layer` of their lists: messages say so.
  void in_layer(int64_t layer) { layer_ = layer; }
  [[noreturn]] void value_error(const std::string& message) const;
  [[noreturn]] void type_error(const std::string& message) const;

  void shape(const char* argument, const Tensor& tensor, std::initializer_list<Dim> want) const;
  void contiguous(const char* argument, const Tensor& tensor) const;
  void inner_contiguous(const char* argument, const Tensor& tensor) const;
  void device(const char* argument, const Tensor& tensor) const;    // that of the first tensor seen
  DType storage(const char* argument, const Tensor& tensor) const;  // float32, bfloat16 or float16

  // Contiguous, of the given shape, on the device of the others.
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
  // The table [R, H, M] alone: rows, heads and table_width of the view.
  void table(PagedView& view, const char* name, const Tensor& table) const;
  // Smallest and largest key of each page, [P, 2, Dk], in the pages' dtype.
  void* bounds(const PagedView& view, const Tensor& bounds) const;
  // counts [R, H] within 0 .. C of such a view; entries: and positions [R, H, C].
  void counts(PagedView& view, const Tensor& counts) const;
  void entries(PagedView& view, const Tensor& counts, const Tensor& positions) const;
  void columns(PagedView& view, const Tensor& columns) const;
  // Page ids of slots begin .. end - 1 of a list (one head's line of a table) exist.
  void page_ids(const PagedView& view, const char* argument, const int32_t* list, int64_t item, int64_t begin,
                int64_t end) const;
  void live_pages(const PagedView& view) const;  // page_ids of all entries

  // Uninitialised memory on the device of `like`.
  template <size_t N>
  Tensor empty(const Tensor& like, const int64_t (&sizes)[N], int32_t dtype) const {
    Tensor tensor = abi::empty(like, sizes, dtype);
    seen(tensor, true);
    return tensor;
  }
  // `bytes` of it, aligned for anything; a tensor without memory if there is nothing to hold.
  Tensor scratch(const Tensor& like, int64_t bytes) const {
    return empty(like, {(bytes + 3) / 4}, abi::aoti_torch_dtype_float32());
  }

 private:
  std::string place() const;  // "append: ", "evict: layer 3: "
  void dtype(const char* argument, const Tensor& tensor, int32_t want, const char* name) const;
  void seen(const Tensor& tensor, bool writable) const;  // tells the emulation what the kernels may touch

  const char* op_;
  Backend backend_;
  int64_t layer_ = -1;
  mutable int32_t device_index_ = -2;  // of the first tensor seen; -2: none yet
};

// Makes the device of `on` current and finds torch's stream there, for the time of a call. CUDA only.
class Launch {
 public:
  Launch(const Checker& check, const Tensor& on);
  ~Launch();
  Launch(const Launch&) = delete;

  void* stream() const { return stream_; }
  int multiprocessors() const { return multiprocessors_; }
  void succeed(int error) const;  // throws what CUDA says

 private:
  const Checker& check_;
  void *guard_ = nullptr, *stream_ = nullptr;
  int multiprocessors_ = 1;
};

std::string head_name(int64_t item, int64_t heads);  // "head (row, head)"

// Items per thread so that a piece moves at least a few thousand elements: below that waking a thread costs more.
inline int64_t grain(int64_t elements_per_item) {
  constexpr int64_t kElements = 32768;
  return elements_per_item >= kElements ? 1 : kElements / (elements_per_item > 0 ? elements_per_item : 1);
}

}  // namespace bindings
}  // namespace kvcache
