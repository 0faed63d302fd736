// What -fsanitize=bounds, alignment, ... make the compiler call, in the layout of its reports (GCC's ubsan.cc).
#include <cstdio>
#include <cstdlib>

#include "scheduler.h"

namespace {

struct Location {
  const char* file;
  uint32_t line, column;
};
struct Type {
  uint16_t kind, info;
  char name[1];
};
struct Report {  // all begin with the location
  Location location;
};
struct BoundsReport {
  Location location;
  const Type *array, *index;
};
struct AlignmentReport {
  Location location;
  const Type* type;
  uint8_t log_alignment, kind;
};

[[noreturn]] void report(const Location& location, const std::string& what) {
  const std::string where = kvcache::emulation::text({location.file, int(location.line)});
  if (kvcache::emulation::self) kvcache::emulation::fail(what + " at " + where);
  // Between kernels, in code that must not throw here.
  std::fprintf(stderr, "%s at %s\n", what.c_str(), where.c_str());
  std::abort();
}

}  // namespace

extern "C" {

void __ubsan_handle_out_of_bounds(BoundsReport* data, uintptr_t index) {
  report(data->location,
         "index " + std::to_string(intptr_t(index)) + " is outside of the array " + std::string(data->array->name));
}
void __ubsan_handle_type_mismatch_v1(AlignmentReport* data, uintptr_t pointer) {
  const size_t alignment = size_t(1) << data->log_alignment;
  if (pointer % alignment == 0) report(data->location, "access through a null pointer");
  report(data->location, "misaligned access to " + std::string(data->type->name) +
                             ", whose address must be a multiple of " + std::to_string(alignment));
}
void __ubsan_handle_add_overflow(Report* data, uintptr_t, uintptr_t) {
  report(data->location, "integer overflow in +");
}
void __ubsan_handle_sub_overflow(Report* data, uintptr_t, uintptr_t) {
  report(data->location, "integer overflow in -");
}
void __ubsan_handle_mul_overflow(Report* data, uintptr_t, uintptr_t) {
  report(data->location, "integer overflow in *");
}
void __ubsan_handle_negate_overflow(Report* data, uintptr_t) { report(data->location, "integer overflow in unary -"); }
void __ubsan_handle_divrem_overflow(Report* data, uintptr_t, uintptr_t) {
  report(data->location, "integer division by zero, or overflow of it");
}
void __ubsan_handle_shift_out_of_bounds(Report* data, uintptr_t, uintptr_t) {
  report(data->location, "shift by less than 0 or by all bits or more");
}
}
