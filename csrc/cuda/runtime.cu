#include "runtime.h"

#include <cuda_runtime.h>

#include <atomic>
#include <cstring>

namespace kvcache::cuda {

int runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int device_count(int* count) {
  *count = 0;
  const cudaError_t error = cudaGetDeviceCount(count);
  if (error != cudaSuccess) (void)cudaGetLastError();  // not to be found by somebody else's check
  return static_cast<int>(error);
}

int device(int ordinal, Device* result) {
  cudaDeviceProp properties;
  const cudaError_t error = cudaGetDeviceProperties(&properties, ordinal);
  if (error != cudaSuccess) return static_cast<int>(error);
  std::memcpy(result->name, properties.name, sizeof result->name);
  result->name[sizeof result->name - 1] = 0;
  result->major = properties.major;
  result->minor = properties.minor;
  result->multiprocessors = properties.multiProcessorCount;
  result->memory = static_cast<int64_t>(properties.totalGlobalMem);
  return 0;
}

int multiprocessors(int ordinal) {
  constexpr int kKnown = 64;
  static std::atomic<int> known[kKnown];
  int count = ordinal >= 0 && ordinal < kKnown ? known[ordinal].load(std::memory_order_relaxed) : 0;
  if (count == 0) {
    if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, ordinal) != cudaSuccess) count = 1;
    if (ordinal >= 0 && ordinal < kKnown) known[ordinal].store(count, std::memory_order_relaxed);
  }
  return count;
}

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace kvcache::cuda
