// Compiles only if abi.h declares every function exactly as the installed torch does (tests/bindings/test_abi.py).
#define USE_CUDA
#include <torch/csrc/stable/c/shim.h>

#include <type_traits>

#include "abi.h"

namespace {

// The opaque handle types differ in name only.
template <class T>
struct Same {
  using type = T;
};
template <>
struct Same<kvcache::abi::Handle> {
  using type = ::AtenTensorHandle;
};
template <>
struct Same<kvcache::abi::Handle*> {
  using type = ::AtenTensorHandle*;
};
template <>
struct Same<kvcache::abi::Guard> {
  using type = ::DeviceGuardHandle;
};
template <>
struct Same<kvcache::abi::Guard*> {
  using type = ::DeviceGuardHandle*;
};
template <>
struct Same<kvcache::abi::Library> {
  using type = ::TorchLibraryHandle;
};
template <>
struct Same<kvcache::abi::Library*> {
  using type = ::TorchLibraryHandle*;
};

template <>
struct Same<kvcache::abi::List> {
  using type = ::StableListHandle;
};

template <class F>
struct Function;
template <class R, class... A>
struct Function<R(A...)> {
  using type = typename Same<R>::type(typename Same<A>::type...);
};

}  // namespace

namespace kvcache::abi {

static_assert(std::is_same_v<Value, ::StableIValue>);

#define KVCACHE_CHECK(result, name, parameters) \
  static_assert(std::is_same_v<Function<result parameters>::type, decltype(::name)>, #name);
KVCACHE_TORCH_ABI(KVCACHE_CHECK)
KVCACHE_TORCH_ABI_CUDA(KVCACHE_CHECK)
#if TORCH_FEATURE_VERSION >= TORCH_VERSION_2_13_0
KVCACHE_TORCH_ABI_OPTIONAL(KVCACHE_CHECK)
#endif

}  // namespace kvcache::abi

int main() {}
