// What can be said about the machine's GPUs without torch: for `kvcache doctor`.
#pragma once
#include <cstdint>

namespace kvcache::cuda {

struct Device {
  char name[256];
  int32_t major, minor;  // compute capability
  int32_t multiprocessors;
  int64_t memory;  // bytes
};

// Versions are 1000 * major + 10 * minor. The functions that return int return a CUDA error code, 0 when fine.
int runtime_version();
int driver_version();  // newest CUDA that the driver supports; 0 without a driver
int device_count(int* count);
int device(int ordinal, Device* result);
int multiprocessors(int ordinal);  // looked up once; 1 if that fails
const char* error_string(int error);

}  // namespace kvcache::cuda
