// CUDA's built-in vector types, with CUDA's alignments.
#pragma once

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

#define KVCACHE_VECTOR_TYPES(T, name, align2, align4)        \
  struct name##1 { T x; };                                   \
  struct alignas(align2) name##2 { T x, y; };                \
  struct alignas(align4) name##4 { T x, y, z, w; };          \
  inline name##1 make_##name##1(T x) { return {x}; }         \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

KVCACHE_VECTOR_TYPES(signed char, char, 2, 4)
KVCACHE_VECTOR_TYPES(unsigned char, uchar, 2, 4)
KVCACHE_VECTOR_TYPES(short, short, 4, 8)
KVCACHE_VECTOR_TYPES(unsigned short, ushort, 4, 8)
KVCACHE_VECTOR_TYPES(int, int, 8, 16)
KVCACHE_VECTOR_TYPES(unsigned, uint, 8, 16)
KVCACHE_VECTOR_TYPES(float, float, 8, 16)
KVCACHE_VECTOR_TYPES(long long, longlong, 16, 16)
KVCACHE_VECTOR_TYPES(unsigned long long, ulonglong, 16, 16)
KVCACHE_VECTOR_TYPES(double, double, 16, 16)
#undef KVCACHE_VECTOR_TYPES

struct int3 {
  int x, y, z;
};
struct float3 {
  float x, y, z;
};
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
inline int3 make_int3(int x, int y, int z) { return {x, y, z}; }
inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }
