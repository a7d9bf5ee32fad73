#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>

namespace fastdiff::host {

// Levels [num_steps + 1] of equal running sum of sqrt(cost) for one schedule, in float64, without torch.
pybind11::array_t<double> integrate_schedule(
    const pybind11::object& sigmas, const pybind11::object& costs, pybind11::ssize_t num_steps, const std::string& interpolation);

}  // namespace fastdiff::host
