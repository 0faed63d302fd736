// Registration of the ops with torch and the argument checks that they share.
#include "torch_ops.h"

#if defined(KVCACHE_EMULATED) || defined(KVCACHE_WITH_CUDA)
#include "../cuda/runtime.h"
#endif

namespace kvcache {

#if defined(KVCACHE_EMULATED)
// What the emulation's race checker knows of memory; not there in its other builds.
extern "C" __attribute__((weak)) void kvcache_emulated_allow(const void* data, size_t bytes, int writable);
extern "C" __attribute__((weak)) void kvcache_emulated_forget();
#endif

namespace {

#if defined(KVCACHE_EMULATED)
constexpr const char *kNamespace = "kvcache_emulated", *kCudaKey = "CPU";
#else
constexpr const char *kNamespace = "kvcache", *kCudaKey = "CUDA";
#endif

abi::Library implementations(const char* key) {
  abi::Library library;
  abi::succeed(abi::aoti_torch_library_init_impl(kNamespace, key, "kvcache", __LINE__, &library), "library");
  return library;
}

}  // namespace

void register_ops() {
  abi::load();
  abi::Library definitions, cpu = implementations("CPU"), cuda = implementations(kCudaKey);
  abi::succeed(abi::aoti_torch_library_init_def(kNamespace, "kvcache", __LINE__, &definitions), "library");
  for (const Op* ops :
       {kStorageOps, kSelectionOps, kSelectTokensOps, kEvictionOps, kAttentionOps, kLatentOps, kRoutingOps}) {
    for (const Op* op = ops; op->name; ++op) {
      abi::succeed(abi::aoti_torch_library_def(definitions, op->schema), op->schema);
      if (op->cpu) abi::succeed(abi::torch_library_impl(cpu, op->name, op->cpu, abi::kCallingConvention), op->name);
      if (op->cuda) abi::succeed(abi::torch_library_impl(cuda, op->name, op->cuda, abi::kCallingConvention), op->name);
    }
  }
}

#if defined(KVCACHE_EMULATED)
// Called once by the tests after loading the library: tests/support/emulation.py.
extern "C" __attribute__((visibility("default"))) const char* kvcache_emulated_register() {
  static std::string error;
  try {
    register_ops();
    return nullptr;
  } catch (const std::exception& failure) {
    error = failure.what();
    return error.c_str();
  }
}
#endif

namespace bindings {

namespace {

struct DTypes {
  int32_t float32 = abi::aoti_torch_dtype_float32(), bfloat16 = abi::aoti_torch_dtype_bfloat16(),
          float16 = abi::aoti_torch_dtype_float16(), float64 = abi::aoti_torch_dtype_float64(),
          int32 = abi::aoti_torch_dtype_int32(), int64 = abi::aoti_torch_dtype_int64(),
          boolean = abi::aoti_torch_dtype_bool(), cpu = abi::aoti_torch_device_type_cpu(),
          cuda = abi::aoti_torch_device_type_cuda();
};

const DTypes& codes() {
  static const DTypes instance;
  return instance;
}

std::string dtype_name(int32_t dtype) {
  const DTypes& c = codes();
  if (dtype == c.float32) return "float32";
  if (dtype == c.bfloat16) return "bfloat16";
  if (dtype == c.float16) return "float16";
  if (dtype == c.float64) return "float64";
  if (dtype == c.int32) return "int32";
  if (dtype == c.int64) return "int64";
  if (dtype == c.boolean) return "bool";
  return "of dtype number " + std::to_string(dtype);
}

std::string list(const int64_t* values, int64_t n) {
  std::string text = "[";
  for (int64_t i = 0; i < n; ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + "]";
}

}  // namespace

std::string head_name(int64_t item, int64_t heads) {
  return "head (" + std::to_string(item / heads) + ", " + std::to_string(item % heads) + ")";
}

Checker::Checker(const char* op, Backend backend) : op_(op), backend_(backend) {
#if defined(KVCACHE_EMULATED)
  if (kvcache_emulated_forget) kvcache_emulated_forget();  // what the call before this one could touch
#endif
}

std::string Checker::place() const {
  return std::string(op_) + ": " + (layer_ < 0 ? "" : "layer " + std::to_string(layer_) + ": ");
}

void Checker::value_error(const std::string& message) const {
  throw std::runtime_error("ValueError: " + place() + message);
}

void Checker::type_error(const std::string& message) const {
  throw std::runtime_error("TypeError: " + place() + message);
}

void Checker::shape(const char* argument, const Tensor& tensor, std::initializer_list<Dim> want) const {
  const int64_t* sizes = tensor.sizes();
  bool same = tensor.dim() == int64_t(want.size());
  int64_t i = 0;
  for (const Dim& dim : want) same = same && (dim.size == kAny || dim.size == sizes[i]), ++i;
  if (same) return;
  std::string needed;
  for (const Dim& dim : want) {
    needed += (needed.empty() ? "" : ", ") + std::string(dim.name);
    if (dim.size != kAny) needed += "=" + std::to_string(dim.size);
  }
  value_error(std::string(argument) + " has shape " + list(sizes, tensor.dim()) + ", needs [" + needed + "]");
}

void Checker::dtype(const char* argument, const Tensor& tensor, int32_t want, const char* name) const {
  if (tensor.dtype() != want) {
    type_error(std::string(argument) + " is " + dtype_name(tensor.dtype()) + ", needs " + name);
  }
}

DType Checker::storage(const char* argument, const Tensor& tensor) const {
  const int32_t dtype = tensor.dtype();
  if (dtype == codes().float32) return DType::kFloat32;
  if (dtype == codes().bfloat16) return DType::kBFloat16;
  if (dtype == codes().float16) return DType::kFloat16;
  type_error(std::string(argument) + " is " + dtype_name(dtype) + ", needs float32, bfloat16 or float16");
}

void Checker::contiguous(const char* argument, const Tensor& tensor) const {
  const int64_t *sizes = tensor.sizes(), *strides = tensor.strides();
  int64_t step = 1;
  bool empty = false, same = true;
  for (int64_t i = tensor.dim(); i-- > 0; step *= sizes[i]) {
    same = same && (sizes[i] == 1 || strides[i] == step);
    empty = empty || sizes[i] == 0;
  }
  if (!same && !empty) {
    value_error(std::string(argument) + " of shape " + list(sizes, tensor.dim()) + " has strides " +
                list(strides, tensor.dim()) + ", needs to be contiguous");
  }
}

void Checker::inner_contiguous(const char* argument, const Tensor& tensor) const {
  const int64_t last = tensor.dim() - 1;
  if (tensor.sizes()[last] > 1 && tensor.strides()[last] != 1) {
    value_error(std::string(argument) + " has strides " + list(tensor.strides(), last + 1) +
                ", needs 1 in the last dimension");
  }
}

void Checker::device(const char* argument, const Tensor& tensor) const {
#if defined(KVCACHE_EMULATED)
  const bool cuda = false;
#else
  const bool cuda = backend_ == Backend::kCuda;
#endif
  if (tensor.device_type() != (cuda ? codes().cuda : codes().cpu)) {
    value_error(std::string(argument) + " is not on the " + (cuda ? "GPU" : "CPU") + " as the others are");
  }
  if (cuda) {
    const int32_t index = tensor.device_index();
    if (device_index_ == -2) device_index_ = index;
    if (index != device_index_) {
      value_error(std::string(argument) + " is on GPU " + std::to_string(index) + ", the others on GPU " +
                  std::to_string(device_index_));
    }
  }
  seen(tensor, true);
}

void Checker::seen([[maybe_unused]] const Tensor& tensor, [[maybe_unused]] bool writable) const {
#if defined(KVCACHE_EMULATED)
  if (!kvcache_emulated_allow) return;
  int64_t last = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    if (tensor.size(i) == 0) return;
    last += (tensor.size(i) - 1) * tensor.strides()[i];
  }
  const DTypes& c = codes();
  const int32_t type = tensor.dtype();
  const size_t width = type == c.boolean                         ? 1
                       : type == c.bfloat16 || type == c.float16 ? 2
                       : type == c.int64 || type == c.float64    ? 8
                                                                 : 4;
  kvcache_emulated_allow(tensor.data<void>(), size_t(last + 1) * width, writable);
#endif
}

Launch::Launch(const Checker& check, [[maybe_unused]] const Tensor& on) : check_(check) {
#if defined(KVCACHE_EMULATED)
  multiprocessors_ = cuda::multiprocessors(0);
#elif defined(KVCACHE_WITH_CUDA)
  if (!abi::aoti_torch_get_current_cuda_stream) check.value_error("this torch was built without CUDA");
  const int32_t index = on.device_index();
  abi::Guard guard;
  abi::succeed(abi::aoti_torch_create_device_guard(index, &guard), "device guard");
  guard_ = guard;
  abi::succeed(abi::aoti_torch_get_current_cuda_stream(index, &stream_), "current stream");
  multiprocessors_ = cuda::multiprocessors(index);
#endif
}

Launch::~Launch() {
  if (guard_) abi::aoti_torch_delete_device_guard(static_cast<abi::Guard>(guard_));
}

void Launch::succeed(int error) const {
  if (error == 0) return;
#if defined(KVCACHE_EMULATED) || defined(KVCACHE_WITH_CUDA)
  throw std::runtime_error("kvcache: " + check_.name() + ": CUDA error " + std::to_string(error) + ": " +
                           cuda::error_string(error));
#endif
}

const int32_t* Checker::int32(const char* argument, const Tensor& tensor, std::initializer_list<Dim> want) const {
  dtype(argument, tensor, codes().int32, "int32");
  shape(argument, tensor, want);
  contiguous(argument, tensor);
  device(argument, tensor);
  return tensor.data<int32_t>();
}

const float* Checker::float32(const char* argument, const Tensor& tensor, std::initializer_list<Dim> want) const {
  dtype(argument, tensor, codes().float32, "float32");
  shape(argument, tensor, want);
  contiguous(argument, tensor);
  device(argument, tensor);
  return tensor.data<float>();
}

const bool* Checker::boolean(const char* argument, const Tensor& tensor, std::initializer_list<Dim> want) const {
  dtype(argument, tensor, codes().boolean, "bool");
  shape(argument, tensor, want);
  contiguous(argument, tensor);
  device(argument, tensor);
  return tensor.data<bool>();
}

Strided4 Checker::strided4(const char* argument, const Tensor& tensor, std::initializer_list<Dim> want) const {
  const DType type = storage(argument, tensor);
  shape(argument, tensor, want);
  inner_contiguous(argument, tensor);
  device(argument, tensor);
  const int64_t* strides = tensor.strides();
  const bool four = want.size() == 4;
  return {tensor.data<void>(), {strides[0], strides[1], four ? strides[2] : 0}, type};
}

const int32_t* Checker::strided_int32(const char* argument, const Tensor& tensor, std::initializer_list<Dim> want,
                                      int64_t (&stride)[2]) const {
  dtype(argument, tensor, codes().int32, "int32");
  shape(argument, tensor, want);
  if (want.size() == 3) inner_contiguous(argument, tensor);
  device(argument, tensor);
  stride[0] = tensor.strides()[0], stride[1] = tensor.strides()[1];
  return tensor.data<int32_t>();
}

const float* Checker::strided_float32(const char* argument, const Tensor& tensor, std::initializer_list<Dim> want,
                                      int64_t (&stride)[2]) const {
  dtype(argument, tensor, codes().float32, "float32");
  shape(argument, tensor, want);
  if (want.size() == 3) inner_contiguous(argument, tensor);
  device(argument, tensor);
  stride[0] = tensor.strides()[0], stride[1] = tensor.strides()[1];
  return tensor.data<float>();
}

PagedView Checker::page_arrays(const Tensor& k_pages, const Tensor* v_pages) const {
  PagedView view{};
  view.dtype = storage("k_pages", k_pages);
  shape("k_pages", k_pages, {{"P", kAny}, {"S", kAny}, {"Dk", kAny}});
  contiguous("k_pages", k_pages);
  device("k_pages", k_pages);
  view.pages = k_pages.size(0);
  view.page_size = int32_t(k_pages.size(1));
  view.k_dim = int32_t(k_pages.size(2));
  if (view.page_size < 1) value_error("k_pages has a page size of 0");
  view.k_pages = const_cast<void*>(k_pages.data<void>());
  if (v_pages) {
    if (storage("v_pages", *v_pages) != view.dtype) {
      type_error("v_pages is " + dtype_name(v_pages->dtype()) + ", needs " + dtype_name(k_pages.dtype()) +
                 " as k_pages has");
    }
    shape("v_pages", *v_pages, {{"P", view.pages}, {"S", view.page_size}, {"Dv", kAny}});
    contiguous("v_pages", *v_pages);
    device("v_pages", *v_pages);
    view.v_dim = int32_t(v_pages->size(2));
    view.v_pages = const_cast<void*>(v_pages->data<void>());
  }
  return view;
}

void Checker::head_sizes(const PagedView& view) const {
  auto check = [&](const char* argument, int64_t size) {
    if (size < 1 || size > kMaxHeadSize) {
      value_error(std::string(argument) + " has head size " + std::to_string(size) + ", needs 1 to " +
                  std::to_string(kMaxHeadSize));
    }
  };
  check("k_pages", view.k_dim);
  if (view.v_pages) check("v_pages", view.v_dim);
}

PagedView Checker::pages(const Tensor& k_pages, const Tensor* v_pages, const Tensor& table,
                         const char* table_name) const {
  PagedView view = page_arrays(k_pages, v_pages);
  this->table(view, table_name, table);
  view.capacity = int64_t(view.table_width) * view.page_size;
  return view;
}

void Checker::table(PagedView& view, const char* name, const Tensor& table) const {
  view.table = int32(name, table, {{"R", kAny}, {"H", kAny}, {"M", kAny}});
  view.rows = int32_t(table.size(0));
  view.heads = int32_t(table.size(1));
  view.table_width = int32_t(table.size(2));
}

void Checker::entries(PagedView& view, const Tensor& counts, const Tensor& positions) const {
  this->counts(view, counts);
  view.positions =
      const_cast<int32_t*>(int32("positions", positions, {{"R", view.rows}, {"H", view.heads}, {"C", view.capacity}}));
}

void Checker::counts(PagedView& view, const Tensor& counts) const {
  view.counts = const_cast<int32_t*>(int32("counts", counts, {{"R", view.rows}, {"H", view.heads}}));
  if (backend_ != Backend::kCpu) return;
  for (int64_t i = 0; i < int64_t(view.rows) * view.heads; ++i) {
    if (view.counts[i] < 0 || view.counts[i] > view.capacity) {
      value_error("counts of " + head_name(i, view.heads) + " is " + std::to_string(view.counts[i]) +
                  ", needs 0 to C=" + std::to_string(view.capacity));
    }
  }
}

void* Checker::bounds(const PagedView& view, const Tensor& bounds) const {
  if (storage("bounds", bounds) != view.dtype) {
    type_error("bounds is " + dtype_name(bounds.dtype()) + ", needs the dtype of the pages");
  }
  shape("bounds", bounds, {{"P", view.pages}, {"2", 2}, {"Dk", view.k_dim}});
  contiguous("bounds", bounds);
  device("bounds", bounds);
  return const_cast<void*>(bounds.data<void>());
}

void Checker::columns(PagedView& view, const Tensor& columns) const {
  view.columns = const_cast<float*>(
      float32("columns", columns, {{"N", kAny}, {"R", view.rows}, {"H", view.heads}, {"C", view.capacity}}));
  view.n_columns = int32_t(columns.size(0));
}

void Checker::page_ids(const PagedView& view, const char* argument, const int32_t* list, int64_t item, int64_t begin,
                       int64_t end) const {
  if (begin >= end) return;
  for (int64_t column = begin / view.page_size; column <= (end - 1) / view.page_size; ++column) {
    if (list[column] < 0 || list[column] >= view.pages) {
      value_error(std::string(argument) + " of " + head_name(item, view.heads) + " holds page " +
                  std::to_string(list[column]) + " in column " + std::to_string(column) +
                  ", needs 0 to P-1=" + std::to_string(view.pages - 1));
    }
  }
}

void Checker::live_pages(const PagedView& view) const {
  if (backend_ != Backend::kCpu) return;
  for (int64_t i = 0; i < int64_t(view.rows) * view.heads; ++i) {
    page_ids(view, "table", view.table + i * view.table_width, i, 0, view.counts[i]);
  }
}

}  // namespace bindings
}  // namespace kvcache
