// active_rows, gather_rows, scatter_rows: schema, checks and threads. Semantics: python/kvcache/ops/reference.py.
#include "../cpu/kernels.h"
#include "../cuda/kernels.h"
#include "torch_ops.h"

namespace kvcache {
namespace bindings {
namespace {

template <Backend B>
std::tuple<Tensor, Tensor> active_rows(const Tensor& mask) {
  const Checker check("active_rows", B);
  ActiveRowsParams p{};
  p.mask = check.boolean("mask", mask, {{"n", kAny}});
  p.n = mask.size(0);
  const int32_t int32 = abi::aoti_torch_dtype_int32();
  Tensor index = check.empty(mask, {p.n}, int32), count = check.empty(mask, {1}, int32);
  p.index = index.mutable_data<int32_t>();
  p.count = count.mutable_data<int32_t>();
  if constexpr (B == Backend::kCuda) {
    const Launch launch(check, mask);
    launch.succeed(cuda::active_rows(p, launch.stream()));
  } else {
    cpu::table().active_rows(p);
  }
  return {std::move(index), std::move(count)};
}

// What gather and scatter share: x [n, D] and index [m] within -1 .. n-1.
RowsParams rows_params(const Checker& check, Backend backend, const Tensor& x, const Tensor& index) {
  RowsParams p{};
  const DType dtype = check.storage("x", x);
  check.shape("x", x, {{"n", kAny}, {"D", kAny}});
  check.contiguous("x", x);
  check.device("x", x);
  p.x = const_cast<void*>(x.data<void>());
  p.n = x.size(0);
  p.row_bytes = x.size(1) * (dtype == DType::kFloat32 ? 4 : 2);
  p.index = check.int32("index", index, {{"m", kAny}});
  p.count = index.size(0);
  for (int64_t i = 0; i < p.count && backend == Backend::kCpu; ++i) {
    if (p.index[i] < -1 || p.index[i] >= p.n) {
      check.value_error("index holds " + std::to_string(p.index[i]) + ", needs -1 to n-1=" + std::to_string(p.n - 1));
    }
  }
  return p;
}

template <Backend B>
Tensor gather_rows(const Tensor& x, const Tensor& index) {
  const Checker check("gather_rows", B);
  RowsParams p = rows_params(check, B, x, index);
  Tensor picked = check.empty(x, {p.count, x.size(1)}, x.dtype());
  p.picked = picked.mutable_data<void>();
  if constexpr (B == Backend::kCuda) {
    const Launch launch(check, x);
    launch.succeed(cuda::gather_rows(p, launch.stream()));
  } else {
    abi::parallel_for(p.count, grain(p.row_bytes / 4),
                      [&](int64_t begin, int64_t end) { cpu::table().gather_rows(p, begin, end); });
  }
  return picked;
}

template <Backend B>
void scatter_rows(const Tensor& x, const Tensor& rows, const Tensor& index) {
  const Checker check("scatter_rows", B);
  RowsParams p = rows_params(check, B, x, index);
  if (rows.dtype() != x.dtype()) check.type_error("rows has another dtype than x");
  check.shape("rows", rows, {{"m", p.count}, {"D", x.size(1)}});
  check.contiguous("rows", rows);
  check.device("rows", rows);
  p.picked = const_cast<void*>(rows.data<void>());
  if constexpr (B == Backend::kCuda) {
    const Launch launch(check, x);
    launch.succeed(cuda::scatter_rows(p, launch.stream()));
  } else {
    abi::parallel_for(p.count, grain(p.row_bytes / 4),
                      [&](int64_t begin, int64_t end) { cpu::table().scatter_rows(p, begin, end); });
  }
}

}  // namespace
}  // namespace bindings

const Op kRoutingOps[] = {
    {"active_rows", "active_rows(Tensor mask) -> (Tensor, Tensor)", KVCACHE_OP(active_rows)},
    {"gather_rows", "gather_rows(Tensor x, Tensor index) -> Tensor", KVCACHE_OP(gather_rows)},
    {"scatter_rows", "scatter_rows(Tensor(a!) x, Tensor rows, Tensor index) -> ()", KVCACHE_OP(scatter_rows)},
    {},
};

}  // namespace kvcache
