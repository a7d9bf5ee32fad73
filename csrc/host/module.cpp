// The pybind11 module fastdiff_kernels._host: what needs no tensor.

#include <pybind11/pybind11.h>

#include "build_report.h"
#include "host/schedule.h"

PYBIND11_MODULE(_host, m) {
  m.doc() = "Build report and the float64 schedule solver.";
  m.def("build_report", [] { return FASTDIFF_BUILD_REPORT; }, "What the package was compiled with and for, as JSON.");
  m.def("integrate_schedule", &fastdiff::host::integrate_schedule, pybind11::arg("sigmas"), pybind11::arg("costs"),
        pybind11::arg("num_steps"), pybind11::arg("interpolation") = "pchip",
        "Levels [num_steps + 1] of equal running sum of sqrt(cost) between knots sigmas [K + 1] with costs [K], float64 arrays; what\n"
        "fastdiff_kernels.ops.integrate_schedule computes, without torch. interpolation: 'pchip' or 'linear'. Raises TypeError, ValueError.");
}
