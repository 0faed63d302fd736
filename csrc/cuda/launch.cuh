// Launches for nvcc: checked, and with as much dynamic shared memory as asked for.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace kvcache::cuda {

// A dim3, or one dimension of any integer type; what does not fit becomes 0, which no launch accepts.
struct Extent {
  dim3 size;
  Extent(dim3 all) : size(all) {}
  template <class I, class = std::enable_if_t<std::is_integral<I>::value>>
  Extent(I n) : size(n > 0 && static_cast<uint64_t>(n) <= 0x7fffffffu ? static_cast<unsigned>(n) : 0u) {}
};

// Whether kernels on this device may start before the one ahead of them ends (programmatic dependent launch, sm_90).
inline bool overlaps_launches() {
  constexpr int kDevices = 64;
  static int known[kDevices] = {};  // 0: not asked yet; a race only asks twice
  int device = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return false;
  if (known[device] == 0) {
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) return false;
    known[device] = major >= 9 ? 2 : 1;
  }
  return known[device] == 2;
}

template <class... P, class... A>
int launch(bool dependent, void (*kernel)(P...), Extent grid, Extent block, size_t shared_bytes, void* stream,
           A&&... arguments) {
  static_assert(sizeof...(P) == sizeof...(A), "the kernel takes another number of arguments");
  cudaError_t error = cudaSuccess;
  constexpr size_t kWithoutAsking = 48 * 1024;
  if (shared_bytes > kWithoutAsking) {
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes));
  }
  if (error == cudaSuccess) {
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid.size;
    config.blockDim = block.size;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &overlap;
    config.numAttrs = dependent && overlaps_launches() ? 1 : 0;
    error = cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...);
  }
  if (error != cudaSuccess) (void)cudaGetLastError();  // not to be found by somebody else's check
  return static_cast<int>(error);
}

}  // namespace kvcache::cuda
