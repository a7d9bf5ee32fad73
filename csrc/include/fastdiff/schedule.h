#pragma once
// Schedules by cost integration: an interval's cost from raw network outputs, and levels of equal running sum of sqrt(cost).

#include <cmath>
#include <cstdint>

#include "fastdiff/macros.h"

namespace fastdiff::FASTDIFF_VARIANT {

// sigma_low (s(x, sigma_low) - s(x, sigma_high)) = raw * (F_low - F_high) + raw_high * F_high - input * x.
struct CostFactors {
  double raw, raw_high, input;
};

// In float64, since the two levels of a fine grid nearly cancel.
FD_INLINE CostFactors cost_factors(double sigma_low, double sigma_high, double sigma_data) {
  const double variance_low = sigma_low * sigma_low + sigma_data * sigma_data;
  const double variance_high = sigma_high * sigma_high + sigma_data * sigma_data;
  const double raw = sigma_data / sqrt(variance_low);
  return {
      raw,
      raw - sigma_low / sigma_high * (sigma_data / sqrt(variance_high)),
      sigma_low * (sigma_high - sigma_low) * (sigma_high + sigma_low) / (variance_low * variance_high),
  };
}

template <class A>
FD_INLINE A cost_term(A x, A raw_low, A raw_high, A raw_factor, A high_factor, A input_factor) {
  const A difference = raw_factor * (raw_low - raw_high) + (high_factor * raw_high - input_factor * x);
  return difference * difference;
}

// Smaller costs count as this much, so that the running sum can be inverted: a fraction of the largest, and a normal number.
FD_INLINE double cost_floor(double largest) {
  const double floor = 1e-12 * largest;
  return floor < 0x1p-1022 ? 0x1p-1022 : floor;
}

// One schedule: intervals + 1 strictly monotone levels, and the cost of every interval between two.
template <class S, class C>
struct Knots {
  const S* sigmas;
  const C* costs;
  int64_t intervals;
  double floor;
  bool cubic;

  FD_INLINE double width(int64_t j) const {
    const double cost = static_cast<double>(costs[j]);
    return sqrt(cost < floor ? floor : cost);
  }
  FD_INLINE double rise(int64_t j) const { return static_cast<double>(sigmas[j + 1]) - static_cast<double>(sigmas[j]); }
};

// The one-sided three-point slope at an end, zero where it would turn the curve back.
FD_INLINE double end_slope(double width, double next_width, double secant, double next_secant) {
  const double slope = ((2 * width + next_width) * secant - width * next_secant) / (width + next_width);
  return slope * secant > 0 ? slope : 0;
}

// Slope at knot k of the monotone cubic through (running sum, sigma): Fritsch and Butland's weighted harmonic mean of the secants.
template <class S, class C>
FD_INLINE double knot_slope(const Knots<S, C>& knots, int64_t k) {
  const int64_t last = knots.intervals - 1;
  const int64_t left = k == 0 ? 0 : k - 1, right = k > last ? last : k;
  const double width_left = knots.width(left), width_right = knots.width(right);
  const double secant_left = knots.rise(left) / width_left, secant_right = knots.rise(right) / width_right;
  if (last == 0) return secant_left;
  if (k == 0) return end_slope(width_left, knots.width(1), secant_left, knots.rise(1) / knots.width(1));
  if (k > last) return end_slope(width_right, knots.width(last - 1), secant_right, knots.rise(last - 1) / knots.width(last - 1));
  const double weight_left = width_left + 2 * width_right, weight_right = 2 * width_left + width_right;
  return (weight_left + weight_right) / (weight_left / secant_left + weight_right / secant_right);
}

// The level at `offset` of running sum into interval j.
template <class S, class C>
FD_INLINE double level_in(const Knots<S, C>& knots, int64_t j, double offset) {
  const double start = static_cast<double>(knots.sigmas[j]), end = static_cast<double>(knots.sigmas[j + 1]);
  const double rise = end - start, width = knots.width(j), ratio = offset / width;
  const double t = ratio < 0 ? 0 : (ratio > 1 ? 1 : ratio);
  double level = start + t * rise;
  if (knots.cubic) {
    const double slope0 = knot_slope(knots, j) * width, slope1 = knot_slope(knots, j + 1) * width;
    level = start + t * (slope0 + t * (3 * rise - 2 * slope0 - slope1 + t * (slope0 + slope1 - 2 * rise)));
  }
  // Rounding must not carry a level past its neighbours in the next interval.
  const double lowest = rise > 0 ? start : end, highest = rise > 0 ? end : start;
  return level < lowest ? lowest : (level > highest ? highest : level);
}

// The running sum at step i of n.
FD_INLINE double target_length(int64_t i, int64_t n, double total) { return static_cast<double>(i) / static_cast<double>(n) * total; }

// The first step whose running sum is at least `length`.
FD_INLINE int64_t first_step_at(double length, int64_t n, double total) {
  int64_t i = static_cast<int64_t>(length / total * static_cast<double>(n));
  while (i > 0 && target_length(i - 1, n, total) >= length) --i;
  while (i <= n && target_length(i, n, total) < length) ++i;
  return i;
}

}  // namespace fastdiff::FASTDIFF_VARIANT
