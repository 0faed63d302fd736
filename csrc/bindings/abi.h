// The part of torch's stable C ABI (torch/csrc/stable/c/shim.h and torch/csrc/inductor/aoti_torch/c/shim.h, torch >= 2.10)
// that we call. The functions are looked up at import in the torch that the process has already loaded: no torch headers
// at build time, nothing to link, one binary for every torch. tests/bindings compiles abi_check.cpp, which compares each
// declaration with the installed torch's own.
#pragma once
#include <dlfcn.h>

#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace kvcache::abi {

using Handle = struct AtenTensorOpaque*;  // at::Tensor*
using Library = struct TorchLibraryOpaque*;
using Guard = struct DeviceGuardOpaque*;
using List = struct StableListOpaque*;
using Value = uint64_t;  // StableIValue: one slot of the stack that a boxed kernel gets and leaves its results on
using Boxed = void (*)(Value*, uint64_t, uint64_t);
using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);

// X(return type, name, (parameters)); an int result is an error code, 0 when fine.
#define KVCACHE_TORCH_ABI(X)                                                                                          \
  X(uint64_t, aoti_torch_abi_version, ())                                                                             \
  X(int32_t, aoti_torch_library_init_def, (const char*, const char*, uint32_t, Library*))                             \
  X(int32_t, aoti_torch_library_init_impl, (const char*, const char*, const char*, uint32_t, Library*))               \
  X(int32_t, aoti_torch_library_def, (Library, const char*))                                                          \
  X(int32_t, torch_library_impl, (Library, const char*, Boxed, uint64_t))                                             \
  X(int32_t, aoti_torch_delete_tensor_object, (Handle))                                                               \
  X(int32_t, aoti_torch_get_dim, (Handle, int64_t*))                                                                  \
  X(int32_t, aoti_torch_get_sizes, (Handle, int64_t**))                                                               \
  X(int32_t, aoti_torch_get_strides, (Handle, int64_t**))                                                             \
  X(int32_t, aoti_torch_get_dtype, (Handle, int32_t*))                                                                \
  X(int32_t, aoti_torch_get_device_type, (Handle, int32_t*))                                                          \
  X(int32_t, aoti_torch_get_device_index, (Handle, int32_t*))                                                         \
  X(int32_t, torch_get_const_data_ptr, (Handle, const void**))                                                        \
  X(int32_t, torch_get_mutable_data_ptr, (Handle, void**))                                                            \
  X(int32_t, aoti_torch_device_type_cpu, ())                                                                          \
  X(int32_t, aoti_torch_device_type_cuda, ())                                                                         \
  X(int32_t, aoti_torch_dtype_float32, ())                                                                            \
  X(int32_t, aoti_torch_dtype_bfloat16, ())                                                                           \
  X(int32_t, aoti_torch_dtype_float16, ())                                                                            \
  X(int32_t, aoti_torch_dtype_float64, ())                                                                            \
  X(int32_t, aoti_torch_dtype_int32, ())                                                                              \
  X(int32_t, aoti_torch_dtype_int64, ())                                                                              \
  X(int32_t, aoti_torch_dtype_bool, ())                                                                               \
  X(int32_t, aoti_torch_empty_strided, (int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, Handle*)) \
  X(int32_t, aoti_torch_create_device_guard, (int32_t, Guard*))                                                       \
  X(int32_t, aoti_torch_delete_device_guard, (Guard))                                                                 \
  X(int32_t, torch_list_size, (List, size_t*))                                                                        \
  X(int32_t, torch_list_get_item, (List, size_t, Value*))                                                             \
  X(int32_t, torch_delete_list, (List))                                                                               \
  X(int32_t, torch_get_num_threads, (uint32_t*))                                                                      \
  X(int32_t, torch_parallel_for, (int64_t, int64_t, int64_t, ParallelBody, void*))

// Newer than 2.10: null where torch has none.
#define KVCACHE_TORCH_ABI_OPTIONAL(X) X(int32_t, torch_delete_stable_ivalue, (Value*))

// In libtorch_cuda.so: null where torch was built without CUDA.
#define KVCACHE_TORCH_ABI_CUDA(X) X(int32_t, aoti_torch_get_current_cuda_stream, (int32_t, void**))

#define KVCACHE_DECLARE(result, name, parameters) inline result(*name) parameters = nullptr;
KVCACHE_TORCH_ABI(KVCACHE_DECLARE)
KVCACHE_TORCH_ABI_OPTIONAL(KVCACHE_DECLARE)
KVCACHE_TORCH_ABI_CUDA(KVCACHE_DECLARE)
#undef KVCACHE_DECLARE

// What torch_library_impl wants: the version whose calling convention our kernels follow, not the running torch's.
constexpr uint64_t kCallingConvention = uint64_t{2} << 56 | uint64_t{10} << 48;

inline void load() {
  void* lib = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  if (!lib) throw std::runtime_error("kvcache._C: import torch before kvcache._C");
#define KVCACHE_FIND(result, name, parameters) name = reinterpret_cast<result(*) parameters>(dlsym(lib, #name));
#define KVCACHE_NEED(result, name, parameters) \
  KVCACHE_FIND(result, name, parameters)       \
  if (!name) throw std::runtime_error("kvcache needs torch >= 2.10: this torch has no " #name);
  KVCACHE_TORCH_ABI(KVCACHE_NEED)
  KVCACHE_TORCH_ABI_OPTIONAL(KVCACHE_FIND)
  if (void* cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD)) {
    lib = cuda;
    KVCACHE_TORCH_ABI_CUDA(KVCACHE_FIND)
  }
#undef KVCACHE_NEED
#undef KVCACHE_FIND
}

inline void succeed(int32_t error, const char* what) {
  if (error) throw std::runtime_error(std::string("kvcache: torch failed in ") + what);
}

// Owns its handle.
class Tensor {
 public:
  explicit Tensor(Handle handle) : handle_(handle) {}
  Tensor(Tensor&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Tensor() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }

  Handle release() { return std::exchange(handle_, nullptr); }

  int64_t dim() const {
    int64_t value;
    succeed(aoti_torch_get_dim(handle_, &value), "dim");
    return value;
  }
  const int64_t* sizes() const {
    int64_t* value;
    succeed(aoti_torch_get_sizes(handle_, &value), "sizes");
    return value;
  }
  const int64_t* strides() const {
    int64_t* value;
    succeed(aoti_torch_get_strides(handle_, &value), "strides");
    return value;
  }
  int64_t size(int64_t i) const { return sizes()[i]; }
  int32_t dtype() const {
    int32_t value;
    succeed(aoti_torch_get_dtype(handle_, &value), "dtype");
    return value;
  }
  int32_t device_type() const {
    int32_t value;
    succeed(aoti_torch_get_device_type(handle_, &value), "device_type");
    return value;
  }
  int32_t device_index() const {
    int32_t value;
    succeed(aoti_torch_get_device_index(handle_, &value), "device_index");
    return value;
  }
  template <class T>
  const T* data() const {
    const void* value;
    succeed(torch_get_const_data_ptr(handle_, &value), "data_ptr");
    return static_cast<const T*>(value);
  }
  template <class T>
  T* mutable_data() const {
    void* value;
    succeed(torch_get_mutable_data_ptr(handle_, &value), "data_ptr");
    return static_cast<T*>(value);
  }

 private:
  Handle handle_;
};

using OptionalTensor = std::optional<Tensor>;
using TensorList = std::vector<Tensor>;                  // Tensor[]
using OptionalTensorList = std::vector<OptionalTensor>;  // Tensor?[]

// Uninitialised, contiguous, on the device of `like`.
template <size_t N>
Tensor empty(const Tensor& like, const int64_t (&sizes)[N], int32_t dtype) {
  int64_t strides[N], step = 1;
  for (size_t i = N; i-- > 0; step *= sizes[i] > 0 ? sizes[i] : 1) strides[i] = step;
  Handle handle = nullptr;
  succeed(aoti_torch_empty_strided(N, sizes, strides, dtype, like.device_type(), like.device_index(), &handle),
          "empty (out of memory?)");
  return Tensor(handle);
}

// Stack slot -> argument. The callee owns tensor handles, the heap cell of an optional, a list and what is in it.
template <class T>
struct Unbox {
  static_assert(std::is_same_v<T, int64_t> || std::is_same_v<T, double> || std::is_same_v<T, bool>);
  static T get(Value value) {
    T argument;
    std::memcpy(&argument, &value, sizeof argument);
    return argument;
  }
};
template <>
struct Unbox<const Tensor&> {
  static Tensor get(Value value) {
    Handle handle;
    std::memcpy(&handle, &value, sizeof handle);
    return Tensor(handle);
  }
};
template <>
struct Unbox<const OptionalTensor&> {
  static OptionalTensor get(Value value) {
    Value* cell;
    std::memcpy(&cell, &value, sizeof cell);
    if (!cell) return std::nullopt;
    OptionalTensor tensor(Unbox<const Tensor&>::get(*cell));
    if (torch_delete_stable_ivalue) {
      torch_delete_stable_ivalue(cell);
    } else {
      delete cell;  // what torch 2.10 .. 2.12's own headers do
    }
    return tensor;
  }
};

template <class T>
struct Unbox<const std::vector<T>&> {
  static std::vector<T> get(Value value) {
    struct Owner {  // also where a call below fails
      List list;
      ~Owner() { torch_delete_list(list); }
    } owner;
    std::memcpy(&owner.list, &value, sizeof owner.list);
    size_t size;
    succeed(torch_list_size(owner.list, &size), "list");
    std::vector<T> items;
    items.reserve(size);
    for (size_t i = 0; i < size; ++i) {
      Value item;
      succeed(torch_list_get_item(owner.list, i, &item), "list");
      items.push_back(Unbox<const T&>::get(item));
    }
    return items;
  }
};

inline void put(Value* slot, Tensor tensor) {
  Handle handle = tensor.release();
  *slot = 0;
  std::memcpy(slot, &handle, sizeof handle);
}
inline void put(Value* stack, std::tuple<Tensor, Tensor> tensors) {
  put(stack, std::move(std::get<0>(tensors)));
  put(stack + 1, std::move(std::get<1>(tensors)));
}

// Box<f>::call is the boxed kernel of a plain function over const Tensor&, const OptionalTensor&, lists of either, int64_t,
// double, bool.
template <auto F>
struct Box;
template <class R, class... A, R (*F)(A...)>
struct Box<F> {
  static void call(Value* stack, uint64_t, uint64_t) { go(stack, std::index_sequence_for<A...>{}); }

 private:
  template <size_t... I>
  static void go(Value* stack, std::index_sequence<I...>) {
    // Braces: in order, and everything is owned before F runs and perhaps throws.
    std::tuple<decltype(Unbox<A>::get(0))...> arguments{Unbox<A>::get(stack[I])...};
    if constexpr (std::is_void_v<R>) {
      F(std::get<I>(arguments)...);
    } else {
      put(stack, F(std::get<I>(arguments)...));
    }
  }
};

// Calls body(begin, end) over pieces of [0, count) of at least `grain` items. The body must not throw.
template <class Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  if (count <= 0) return;
  if (count <= grain) return body(int64_t{0}, count);
  auto call = [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); };
  succeed(torch_parallel_for(0, count, grain > 0 ? grain : 1, call, const_cast<Body*>(&body)), "parallel_for");
}

inline int num_threads() {
  uint32_t threads = 1;
  succeed(torch_get_num_threads(&threads), "num_threads");
  return static_cast<int>(threads);
}

}  // namespace kvcache::abi
