// flatten_ext._C: importing it loads libflatten, which registers torch.ops.flatten; what it offers is facts
// for bug reports. No tensor passes through here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/isa.h"

PYBIND11_MODULE(_C, m) {
  namespace py = pybind11;
  m.doc() = "Loads torch.ops.flatten and reports how it was built.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = FLATTEN_VERSION;
        info["compiler"] = __VERSION__;
        info["built_with_torch"] = FLATTEN_BUILT_WITH_TORCH;
        info["minimum_torch"] = FLATTEN_MINIMUM_TORCH;
        info["cuda_version"] = FLATTEN_CUDA_VERSION;
        info["cuda_archs"] = FLATTEN_CUDA_ARCHS;
        return info;
      },
      "Version, compiler, torch and CUDA this was built with; the CUDA entries are empty without CUDA.");
  m.def("cpu_isa", &flatten::cpu::isa_in_use,
        "The CPU instruction set the kernels in use were compiled for.");
  m.def("cpu_isas", &flatten::cpu::runnable_isas, "The instruction sets this CPU can run, least first.");
}
