// The pybind11 module fastdiff_kernels._host: what needs no tensor.

#include <pybind11/pybind11.h>

#include "build_report.h"

PYBIND11_MODULE(_host, m) {
  m.doc() = "Build report.";
  m.def("build_report", [] { return FASTDIFF_BUILD_REPORT; }, "What the package was compiled with and for, as JSON.");
}
