// The Python module kvcache._C: host objects and facts about the build. Tensors go through torch_ops.cpp instead.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>

#include "../core/decode_plan.h"
#include "../core/page_pool.h"
#include "../core/split.h"
#include "../cpu/kernels.h"
#include "torch_ops.h"
#if defined(KVCACHE_WITH_CUDA)
#include "../cuda/runtime.h"
#endif

namespace py = pybind11;
using kvcache::PagePool;

namespace {

// No forcecast: a wrong dtype or layout is a TypeError, never a silent copy that in-place results would vanish into.
using Int32Array = py::array_t<int32_t, py::array::c_style>;

void check_shape(const char* name, const Int32Array& array, std::initializer_list<int64_t> want) {
  bool same = array.ndim() == py::ssize_t(want.size());
  int i = 0;
  for (int64_t size : want) same = same && (size < 0 || array.shape(i) == size), ++i;
  if (same) return;
  std::string got, needed;
  for (i = 0; i < array.ndim(); ++i) got += (i ? ", " : "") + std::to_string(array.shape(i));
  for (int64_t size : want) {
    needed += (needed.empty() ? "" : ", ") + (size < 0 ? std::string("any") : std::to_string(size));
  }
  throw std::invalid_argument(std::string("PagePool: ") + name + " has shape [" + got + "], needs [" + needed + "]");
}

kvcache::TableView table_view(const Int32Array& table, bool writes) {
  check_shape("table", table, {-1, -1, -1});
  if (writes && !table.writeable()) throw std::invalid_argument("PagePool: table is read-only");
  return {const_cast<int32_t*>(table.data()), table.shape(0), table.shape(1), table.shape(2)};
}

const int32_t* per_head(const char* name, const Int32Array& array, const kvcache::TableView& table) {
  check_shape(name, array, {table.rows, table.heads});
  return array.data();
}

// An int for all rows or an array [rows].
struct Added {
  Int32Array array;  // keeps the data alive
  const int32_t* rows = nullptr;
  int64_t scalar = 0;

  Added(const py::object& added, const kvcache::TableView& table) {
    if (py::isinstance<py::int_>(added)) {
      scalar = added.cast<int64_t>();
    } else if (py::isinstance<Int32Array>(added)) {
      array = py::reinterpret_borrow<Int32Array>(added);
      check_shape("added", array, {table.rows});
      rows = array.data();
    } else {
      throw py::type_error("PagePool: added must be an int or a contiguous int32 array [rows]");
    }
  }
};

Int32Array to_array(const std::vector<int32_t>& values) {
  return Int32Array(py::ssize_t(values.size()), values.data());
}

py::tuple to_tuple(const kvcache::Copies& copies) {
  return py::make_tuple(to_array(copies.source), to_array(copies.target));
}

void bind_pool(py::module_& m) {
  static py::handle out_of_pages = py::handle(PyErr_NewExceptionWithDoc(
      "kvcache._C.OutOfPages", "The page pool cannot hand out `needed` pages, only `available` are free.",
      PyExc_RuntimeError, nullptr));
  m.attr("OutOfPages") = out_of_pages;
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const kvcache::OutOfPages& error) {
      py::object instance = out_of_pages(error.what());
      instance.attr("needed") = error.needed;
      instance.attr("available") = error.available;
      PyErr_SetObject(out_of_pages.ptr(), instance.ptr());
    }
  });

  py::class_<PagePool>(
      m, "PagePool",
      "Which pages are free and how many tables hold each of the others. Tables are int32 arrays\n"
      "[rows, heads, width]; in each head the pages come first and -1 fills the rest. Always hands out\n"
      "the lowest free page. A call that raises has changed nothing.")
      .def(py::init<int32_t, int64_t>(), py::arg("page_size"), py::arg("limit_pages") = -1)
      .def_property_readonly("page_size", &PagePool::page_size)
      .def_property_readonly("capacity", &PagePool::capacity)
      .def_property_readonly("used", &PagePool::used)
      .def_property_readonly("free_pages", &PagePool::free_pages)
      .def_property_readonly("shared_pages", &PagePool::shared_pages, "Pages with more than one reference.")
      .def_property_readonly("limit", &PagePool::limit)
      .def("grow", &PagePool::grow, py::arg("capacity"), "Raises OutOfPages beyond the limit.")
      .def("refcount", &PagePool::refcount, py::arg("page"))
      .def("used_pages", [](const PagePool& pool) { return to_array(pool.used_pages()); })
      .def(
          "pages_needed",
          [](PagePool& pool, const Int32Array& table, const Int32Array& counts, const py::object& added) {
            auto view = table_view(table, false);
            Added more(added, view);
            return pool.pages_needed(view, per_head("counts", counts, view), more.rows, more.scalar);
          },
          py::arg("table").noconvert(), py::arg("counts").noconvert(), py::arg("added"),
          "Fresh pages that extend() would take.")
      .def(
          "extend",
          [](PagePool& pool, const Int32Array& table, const Int32Array& counts, const py::object& added) {
            auto view = table_view(table, true);
            Added more(added, view);
            return to_tuple(pool.extend(view, per_head("counts", counts, view), more.rows, more.scalar));
          },
          py::arg("table").noconvert(), py::arg("counts").noconvert(), py::arg("added"),
          "Makes the next `added` slots of every head writable; returns (source, target) of the pages to copy.")
      .def(
          "shrink",
          [](PagePool& pool, const Int32Array& table, const Int32Array& counts) {
            auto view = table_view(table, true);
            return pool.shrink(view, per_head("counts", counts, view));
          },
          py::arg("table").noconvert(), py::arg("counts").noconvert(),
          "Gives back the pages that `counts` entries do not need; returns how many became free.")
      .def(
          "retain", [](PagePool& pool, const Int32Array& table) { pool.retain(table_view(table, false)); },
          py::arg("table").noconvert(), "One more reference to every page of the table.")
      .def(
          "release", [](PagePool& pool, const Int32Array& table) { return pool.release(table_view(table, true)); },
          py::arg("table").noconvert(),
          "Drops one reference of every page and empties the table; returns how many became free.")
      .def(
          "shared", [](const PagePool& pool, const Int32Array& table) { return pool.shared(table_view(table, false)); },
          py::arg("table").noconvert())
      .def(
          "unshare",
          [](PagePool& pool, const Int32Array& table, const Int32Array& begin, const Int32Array& end) {
            auto view = table_view(table, true);
            return to_tuple(pool.unshare(view, per_head("begin", begin, view), per_head("end", end, view)));
          },
          py::arg("table").noconvert(), py::arg("begin").noconvert(), py::arg("end").noconvert(),
          "Replaces the shared pages in page columns begin .. end - 1; returns (source, target) of the pages to copy.")
      .def(
          "relocate", [](PagePool& pool, int64_t capacity) { return to_array(pool.relocate(capacity)); },
          py::arg("capacity"),
          "Renames pages so that all ids are below the new capacity; returns old id -> new id or -1.")
      .def("__repr__", [](const PagePool& pool) {
        return "PagePool(page_size=" + std::to_string(pool.page_size()) + ", used=" + std::to_string(pool.used()) +
               ", capacity=" + std::to_string(pool.capacity()) + ", limit=" + std::to_string(pool.limit()) + ")";
      });
}

#if defined(KVCACHE_WITH_CUDA)
std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}
#endif

py::dict cuda_info() {
  py::dict info;
  py::list devices;
  info["runtime"] = py::none();
  info["driver"] = py::none();
  info["error"] = py::none();
#if defined(KVCACHE_WITH_CUDA)
  namespace cuda = kvcache::cuda;
  info["compiled"] = true;
  info["archs"] = KVCACHE_CUDA_ARCHS;
  info["runtime"] = version_text(cuda::runtime_version());
  const int driver = cuda::driver_version();
  int count = 0;
  if (driver == 0) {
    info["error"] = "no NVIDIA driver on this machine";
  } else {
    info["driver"] = version_text(driver);
    if (int error = cuda::device_count(&count)) {
      info["error"] = std::string(cuda::error_string(error));
    } else if (count == 0) {
      info["error"] = "the NVIDIA driver finds no GPU";
    }
  }
  for (int i = 0; i < count; ++i) {
    cuda::Device device{};
    if (int error = cuda::device(i, &device)) {
      info["error"] = "device " + std::to_string(i) + ": " + cuda::error_string(error);
      continue;
    }
    py::dict entry;
    entry["name"] = std::string(device.name);
    entry["capability"] = py::make_tuple(device.major, device.minor);
    entry["multiprocessors"] = device.multiprocessors;
    entry["memory"] = device.memory;
    devices.append(entry);
  }
#else
  info["compiled"] = false;
  info["archs"] = "";
  info["error"] = "kvcache was built without nvcc";
#endif
  info["devices"] = devices;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native part of kvcache. Import torch first.";
  m.attr("isa") = kvcache::cpu::table().isa;  // throws for a bad KVCACHE_ISA
  const char* names[8];
  const int n = kvcache::cpu::available_isas(names, 8);
  py::tuple isas(n);
  for (int i = 0; i < n; ++i) isas[i] = py::str(names[i]);
  m.attr("available_isas") = isas;
  kvcache::register_ops();
  bind_pool(m);
  m.def("cuda_info", &cuda_info, "What this build and this machine know about CUDA; `error` says what is missing.");
  m.def("decode_splits", &kvcache::decode_splits, py::arg("threads"), py::arg("rows"), py::arg("heads"),
        py::arg("max_count"), "Pieces that decode attention cuts each head's entries into (csrc/core/split.h).");
  m.def(
      "decode_block",
      [](int64_t part_bytes, int64_t limit, int32_t most_blocks, int64_t fixed) {
        const kvcache::DecodeBlock block =
            kvcache::decode_block(part_bytes, limit, most_blocks, [fixed](int32_t) { return fixed; });
        return py::make_tuple(block.parts, block.stages, block.blocks);
      },
      py::arg("part_bytes"), py::arg("limit"), py::arg("most_blocks"), py::arg("fixed"),
      "Loading warps, stages of each and blocks on a multiprocessor of decode attention (csrc/core/decode_plan.h).");
  m.def(
      "probe_read",
      [](uintptr_t address, int64_t bytes) {
        return kvcache::cpu::table().probe_read(reinterpret_cast<const void*>(address), bytes);
      },
      py::arg("address"), py::arg("bytes"), py::call_guard<py::gil_scoped_release>(),
      "Streams through memory, for bench/: what this machine can read. `bytes` is a multiple of 4096.");
  m.def(
      "probe_fma", [](int64_t iterations) { return kvcache::cpu::table().probe_fma(iterations); },
      py::arg("iterations"), py::call_guard<py::gil_scoped_release>(),
      "Multiply-adds in registers, for bench/: what this machine can compute. Returns the operations done.");
}
