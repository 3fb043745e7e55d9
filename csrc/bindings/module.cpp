// SPDX-License-Identifier: Apache-2.0
// vericache._C: loading it registers the ops (static initializers of the ops_*.cpp files) and binds the stateful
// classes.
#include <pybind11/pybind11.h>

#include "common/error.h"
#include "common/params.h"
#include "cpu/parallel.h"

namespace py = pybind11;

namespace vericache::bindings {

void bind_runtime(py::module_& m);  // runtime.cpp

namespace {

void raise_as(const char* name, const char* what) {
  const py::object type = py::module_::import("vericache.errors").attr(name);
  PyErr_SetString(type.ptr(), what);
}

}  // namespace
}  // namespace vericache::bindings

PYBIND11_MODULE(_C, m) {
  using namespace vericache;
  m.doc() = "The compiled half of vericache: registers torch.ops.vericache and holds the runtime's classes.";

  // Registered with all modules that share pybind11's internals, torch among them: errors thrown inside torch.ops calls
  // arrive through torch's own bindings, not ours.
  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const CapacityError& e) {
      bindings::raise_as("CapacityError", e.what());
    } catch (const Error& e) {
      bindings::raise_as("KernelError", e.what());
    }
  });

  m.def("num_threads", &cpu::num_threads, "Threads the CPU kernels use.");
  m.def("set_num_threads", &cpu::set_num_threads, py::arg("threads"), py::call_guard<py::gil_scoped_release>(),
        "Set the number of threads the CPU kernels use (at least 1); results do not depend on it.");
  m.def(
      "bf16_packed_bound", [](int64_t elems) { return Bf16PackLayout::make(elems).max_bytes; }, py::arg("elems"),
      "Bytes that a page of `elems` bfloat16 may pack to.");
#ifdef VERICACHE_WITH_CUDA
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif

  bindings::bind_runtime(m);
}
