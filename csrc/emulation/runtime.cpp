// cuda/runtime.h for a device that is only pretended.
#include "../cuda/runtime.h"

#include <cstdio>
#include <cstring>

namespace kvcache::cuda {
namespace {
// Few, so that small tests split their work among several blocks and yet finish soon.
int pretended_multiprocessors = 12;
}  // namespace

int runtime_version() { return 0; }
int driver_version() { return 0; }

int device_count(int* count) {
  *count = 1;
  return 0;
}

int device(int ordinal, Device* result) {
  if (ordinal != 0) return 101;  // cudaErrorInvalidDevice
  *result = {};
  std::strcpy(result->name, "emulated on the host");
  result->major = 9;
  result->multiprocessors = pretended_multiprocessors;
  return 0;
}

int multiprocessors(int) { return pretended_multiprocessors; }

const char* error_string(int error) {
  switch (error) {
    case 0:
      return "no error";
    case 1:
      return "invalid argument";
    case 9:
      return "invalid configuration argument";
    case 101:
      return "invalid device ordinal";
    case 801:
      return "operation not supported";
    default:
      return "unknown error";
  }
}

}  // namespace kvcache::cuda

extern "C" __attribute__((visibility("default"))) void kvcache_emulated_multiprocessors(int count) {
  kvcache::cuda::pretended_multiprocessors = count > 0 ? count : 1;
}
