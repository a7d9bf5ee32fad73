#pragma once
// Cost integration on a CPU. Intervals are summed in chunks, side by side; only chunks in which a level falls are then walked.

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "fastdiff/schedule.h"

namespace fastdiff::FASTDIFF_VARIANT {

constexpr int64_t kIntervalsPerChunk = 1024;

// What one pass over a chunk tells; `before` is the running sum at its first knot.
struct IntervalChunk {
  double length, lowest, highest, before;
  int64_t rising, falling;
};

template <class S, class C>
FD_INLINE IntervalChunk summarise(const Knots<S, C>& knots, int64_t begin, int64_t end) {
  double length = 0, lowest = std::numeric_limits<double>::infinity(), highest = 0;
  const C* costs = knots.costs;
#pragma omp simd reduction(+ : length) reduction(min : lowest) reduction(max : highest)
  for (int64_t j = begin; j < end; ++j) {
    const double cost = static_cast<double>(costs[j]);
    lowest = cost < lowest ? cost : lowest;
    highest = cost > highest ? cost : highest;
    length += std::sqrt(cost < knots.floor ? knots.floor : cost);
  }
  // In the width of the levels, so that the comparisons need no widening.
  using Count = std::conditional_t<sizeof(S) == 8, int64_t, int32_t>;
  Count rising = 0, falling = 0;
  const S* sigmas = knots.sigmas;
#pragma omp simd reduction(+ : rising, falling)
  for (int64_t j = begin; j < end; ++j) {
    rising += sigmas[j + 1] > sigmas[j];
    falling += sigmas[j + 1] < sigmas[j];
  }
  return {length, lowest, highest, 0, rising, falling};
}

// A batch of schedules of which none is empty.
template <class S, class C>
struct Schedules {
  const S* sigmas;  // [batch, intervals + 1]
  const C* costs;   // [batch, intervals]
  S* levels;        // [batch, steps + 1]
  int64_t batch, intervals, steps;
  bool cubic;

  int64_t chunks() const { return (intervals + kIntervalsPerChunk - 1) / kIntervalsPerChunk; }
  Knots<S, C> knots(int64_t b, double floor) const { return {sigmas + b * (intervals + 1), costs + b * intervals, intervals, floor, cubic}; }
  int64_t chunk_end(int64_t c) const { return c + 1 == chunks() ? intervals : (c + 1) * kIntervalsPerChunk; }
};

// One schedule's length and floor; a length of NaN where its knots or costs are not valid.
struct Totals {
  double length, floor;
};

// Turns the chunks' own lengths into running sums.
template <class S, class C>
Totals accumulate(const Schedules<S, C>& schedules, int64_t b, IntervalChunk* chunks) {
  const int64_t count = schedules.chunks();
  double highest = 0, unfloored = 0;
  int64_t rising = 0, falling = 0;
  for (int64_t c = 0; c < count; ++c) {
    highest = chunks[c].highest > highest ? chunks[c].highest : highest;
    unfloored += chunks[c].length;
    rising += chunks[c].rising;
    falling += chunks[c].falling;
  }
  const double floor = cost_floor(highest);
  const auto knots = schedules.knots(b, floor);
  // The square root of a negative cost is NaN; what is left to exclude is infinity and zero.
  const bool valid = (rising == schedules.intervals || falling == schedules.intervals) && std::isfinite(unfloored) && highest > 0 &&
                     std::isfinite(knots.sigmas[0]) && std::isfinite(knots.sigmas[schedules.intervals]);
  if (!valid) return {std::numeric_limits<double>::quiet_NaN(), floor};
  double before = 0;
  for (int64_t c = 0; c < count; ++c) {
    if (chunks[c].lowest < floor) chunks[c].length = summarise(knots, c * kIntervalsPerChunk, schedules.chunk_end(c)).length;
    chunks[c].before = before;
    before += chunks[c].length;
  }
  return {before, floor};
}

// Writes the inner levels that fall into chunk c.
template <class S, class C>
void fill_levels(const Schedules<S, C>& schedules, int64_t b, const IntervalChunk* chunks, int64_t c, const Totals& totals) {
  const int64_t steps = schedules.steps;
  const bool is_last = c + 1 == schedules.chunks();
  const int64_t first = first_step_at(chunks[c].before, steps, totals.length);
  const int64_t last = is_last ? steps : first_step_at(chunks[c + 1].before, steps, totals.length);
  int64_t i = first > 1 ? first : 1;
  const int64_t stop = last < steps ? last : steps;
  if (i >= stop) return;
  const auto knots = schedules.knots(b, totals.floor);
  S* levels = schedules.levels + b * (steps + 1);
  const int64_t end = schedules.chunk_end(c);
  double before = chunks[c].before;
  for (int64_t j = c * kIntervalsPerChunk; i < stop && j < end; ++j) {
    const double after = before + knots.width(j);
    for (; i < stop; ++i) {
      const double target = target_length(i, steps, totals.length);
      // The chunk's own sum may round differently from this one; what is left over belongs to the last interval.
      if (target >= after && j + 1 < end) break;
      levels[i] = static_cast<S>(level_in(knots, j, target - before));
    }
    before = after;
  }
}

// parallel_for(count, body) calls body(i) for every i below count, in any order. Invalid schedules get NaN.
template <class S, class C, class ParallelFor>
void solve(const Schedules<S, C>& schedules, ParallelFor&& parallel_for) {
  const int64_t batch = schedules.batch, count = schedules.chunks(), steps = schedules.steps;
  std::vector<IntervalChunk> chunks(batch * count);
  std::vector<Totals> totals(batch);
  parallel_for(batch * count, [&](int64_t i) {
    const int64_t b = i / count, c = i % count;
    chunks[i] = summarise(schedules.knots(b, -std::numeric_limits<double>::infinity()), c * kIntervalsPerChunk, schedules.chunk_end(c));
  });
  parallel_for(batch, [&](int64_t b) { totals[b] = accumulate(schedules, b, &chunks[b * count]); });
  parallel_for(batch * count, [&](int64_t i) {
    const int64_t b = i / count, c = i % count;
    S* levels = schedules.levels + b * (steps + 1);
    if (std::isnan(totals[b].length)) {
      for (int64_t k = 0; c == 0 && k <= steps; ++k) levels[k] = std::numeric_limits<S>::quiet_NaN();
      return;
    }
    if (c == 0) {
      levels[0] = schedules.sigmas[b * (schedules.intervals + 1)];
      levels[steps] = schedules.sigmas[b * (schedules.intervals + 1) + schedules.intervals];
    }
    fill_levels(schedules, b, &chunks[b * count], c, totals[b]);
  });
}

}  // namespace fastdiff::FASTDIFF_VARIANT
