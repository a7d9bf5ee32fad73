#include "host/schedule.h"

#include <cmath>
#include <sstream>

#include "fastdiff/schedule_solver.h"

namespace fastdiff::host {
namespace {

namespace py = pybind11;
using Array = py::array_t<double, py::array::c_style>;

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  text << "integrate_schedule: ";
  (text << ... << parts);
  throw py::value_error(text.str());
}

// A one-dimensional float64 array, copied only where its layout asks for it.
Array vector_of(const char* name, const py::object& value) {
  if (!py::isinstance<py::array>(value)) {
    throw py::type_error(std::string("integrate_schedule: ") + name + " must be a NumPy array; got " +
                         py::str(py::type::of(value).attr("__name__")).cast<std::string>());
  }
  const auto array = py::reinterpret_borrow<py::array>(value);
  if (!array.dtype().equal(py::dtype::of<double>())) {
    throw py::type_error(std::string("integrate_schedule: ") + name + " must be float64; got " + py::str(array.dtype()).cast<std::string>());
  }
  if (array.ndim() != 1) refuse(name, " must have 1 dimension; got ", array.ndim());
  return Array::ensure(array);
}

void check_values(const Array& sigmas, const Array& costs) {
  const double *s = sigmas.data(), *c = costs.data();
  const py::ssize_t intervals = costs.size();
  for (py::ssize_t j = 0; j <= intervals; ++j) {
    if (!std::isfinite(s[j])) refuse("sigmas must be finite; got ", s[j], " at index ", j);
  }
  const bool rising = s[1] > s[0];
  bool any = false;
  for (py::ssize_t j = 0; j < intervals; ++j) {
    if (rising ? s[j + 1] <= s[j] : s[j + 1] >= s[j]) {
      refuse("sigmas must be strictly monotone; got ", s[j], " followed by ", s[j + 1], " at knot ", j);
    }
    if (!std::isfinite(c[j]) || c[j] < 0) refuse("costs must be finite and at least 0; got ", c[j], " at index ", j);
    any |= c[j] > 0;
  }
  if (!any) refuse("costs must not all be 0 in a schedule; got none greater than 0");
}

}  // namespace

py::array_t<double> integrate_schedule(
    const py::object& sigmas, const py::object& costs, py::ssize_t num_steps, const std::string& interpolation) {
  const Array knots = vector_of("sigmas", sigmas), increments = vector_of("costs", costs);
  if (knots.size() < 2) refuse("sigmas must have at least 2 knots; got ", knots.size());
  if (increments.size() != knots.size() - 1) {
    refuse("costs must have ", knots.size() - 1, " elements, one for every interval of sigmas; got ", increments.size());
  }
  if (num_steps < 1) refuse("num_steps must be at least 1; got ", num_steps);
  if (interpolation != "pchip" && interpolation != "linear") refuse("interpolation must be one of 'pchip', 'linear'; got '", interpolation, "'");
  py::array_t<double> levels(num_steps + 1);
  using Problem = FASTDIFF_VARIANT::Schedules<double, double>;
  const Problem problem{knots.data(), increments.data(), levels.mutable_data(), 1, increments.size(), num_steps, interpolation == "pchip"};
  {
    const py::gil_scoped_release release;
    FASTDIFF_VARIANT::solve(problem, [](int64_t count, auto&& body) {
      for (int64_t i = 0; i < count; ++i) body(i);
    });
  }
  // The solver marks bad values by NaN; which they are is looked for only then.
  if (std::isnan(levels.at(0))) check_values(knots, increments);
  return levels;
}

}  // namespace fastdiff::host
