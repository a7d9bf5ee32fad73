#pragma once
// Registers of the variant's width, for loops in which sums have to stay in registers: compilers keep arrays of these there, not arrays of
// numbers. To be included between variant_begin.h and variant_end.h, after cpu/common.h.

#include "cpu/common.h"

namespace fastdiff::FASTDIFF_VARIANT {

#if defined(FASTDIFF_AVX512)
constexpr int64_t kLaneBytes = 64;
#elif defined(FASTDIFF_AVX2)
constexpr int64_t kLaneBytes = 32;
#else
constexpr int64_t kLaneBytes = 16;
#endif

template <class A>
constexpr int64_t kLanes = kLaneBytes / int64_t{sizeof(A)};

template <class A>
struct LanesOf {
  typedef A type __attribute__((vector_size(kLaneBytes)));
};
template <class A>
using Lanes = typename LanesOf<A>::type;

template <class A>
FD_INLINE void load_lanes(const A* from, Lanes<A>& to) {
  memcpy(&to, from, kLaneBytes);
}

template <class A>
FD_INLINE void store_lanes(const Lanes<A>& from, A* to) {
  memcpy(to, &from, kLaneBytes);
}

template <class A, int64_t kCount>
struct Vector {
  typedef A type __attribute__((vector_size(kCount * sizeof(A))));
};

// By halves: a compiler that keeps to the order of additions would add one after the other.
template <class A, int64_t kCount = kLanes<A>>
FD_INLINE A sum_of_lanes(const typename Vector<A, kCount>::type& v) {
  if constexpr (kCount == 2) {
    return v[0] + v[1];
  } else {
    typename Vector<A, kCount / 2>::type low, high;
    memcpy(&low, &v, sizeof low);
    memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
    return sum_of_lanes<A, kCount / 2>(low + high);
  }
}

// Element j of the two results is that of a for which j has no bit kStep, and that of b for which it has; the others change places.
template <class A, int64_t kStep, int64_t... kIndex>
FD_INLINE void exchange(Lanes<A>& a, Lanes<A>& b, std::integer_sequence<int64_t, kIndex...>) {
  constexpr int64_t width = kLanes<A>;
#if defined(__clang__)
  const Lanes<A> low = __builtin_shufflevector(a, b, (kIndex & kStep ? width + kIndex - kStep : kIndex)...);
  b = __builtin_shufflevector(a, b, (kIndex & kStep ? width + kIndex : kIndex + kStep)...);
#else
  typedef typename Vector<std::conditional_t<sizeof(A) == 8, int64_t, int32_t>, width>::type Index;
  const Lanes<A> low = __builtin_shuffle(a, b, Index{(kIndex & kStep ? width + kIndex - kStep : kIndex)...});
  b = __builtin_shuffle(a, b, Index{(kIndex & kStep ? width + kIndex : kIndex + kStep)...});
#endif
  a = low;
}

template <class A, int64_t kStep = kLanes<A> / 2>
FD_INLINE void transpose(Lanes<A> (&rows)[kLanes<A>]) {
  for (int64_t i = 0; i < kLanes<A>; ++i) {
    if (!(i & kStep)) exchange<A, kStep>(rows[i], rows[i + kStep], std::make_integer_sequence<int64_t, kLanes<A>>());
  }
  if constexpr (kStep > 1) transpose<A, kStep / 2>(rows);
}

// e^x where it is a normal number: for x between -87 and 88.
FD_INLINE void exp_of_normal(const Lanes<float>& x, Lanes<float>& y) {
  typedef typename Vector<int32_t, kLanes<float>>::type Integers;
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
  const Lanes<float> shifted = x * 1.44269504f + 12582912.0f;
  const Lanes<float> n = shifted - 12582912.0f;
  const Lanes<float> r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  const Lanes<float> p = 1.0f + r * (1.0f + r * (0.5f + r * (1.0f / 6 + r * (1.0f / 24 + r * (1.0f / 120 + r * (1.0f / 720 + r * (1.0f / 5040)))))));
  // p lies in [0.7, 1.42]: its exponent takes an addition.
  y = (Lanes<float>)((Integers)p + ((Integers)shifted << 23));
}

FD_INLINE void exp_of_normal(const Lanes<double>& x, Lanes<double>& y) {
  Lanes<double> powers{};
  for (int64_t i = 0; i < kLanes<double>; ++i) powers[i] = std::exp(x[i]);
  y = powers;
}

// e^x for x at most 0; results below the normal range are zero.
FD_INLINE void exp_of_nonpositive(const Lanes<float>& x, Lanes<float>& y) {
  Lanes<float> power;
  exp_of_normal(x < -87.0f ? Lanes<float>{} - 87.0f : x, power);
  y = x < -87.0f ? Lanes<float>{} : (x == x ? power : x);
}

FD_INLINE void exp_of_nonpositive(const Lanes<double>& x, Lanes<double>& y) { exp_of_normal(x, y); }

// Calls body(i, n) for [0, count) in order, n numbers at a time: as many as lanes, at the end perhaps fewer.
template <class A, class F>
FD_INLINE void for_each_lanes(int64_t count, F&& body) {
  constexpr int64_t width = kLanes<A>;
  int64_t i = 0;
  for (; i + width <= count; i += width) body(i, width);
  if (i < count) body(i, count - i);
}

// The first n lanes; the others are zero.
template <class T>
FD_INLINE void load_some(const T* from, int64_t n, Lanes<Acc<T>>& to) {
  Acc<T> line[kLanes<Acc<T>>] = {};
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) line[k] = load(from[k]);
  load_lanes(line, to);
}

template <class T>
FD_INLINE void store_some(const Lanes<Acc<T>>& from, int64_t n, T* to) {
  Acc<T> line[kLanes<Acc<T>>];
  store_lanes(from, line);
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) to[k] = store<T>(line[k]);
}

// The sum of term(x) over count numbers, the term taking lanes or one number; count at most a few thousand.
template <class A, class F>
FD_INLINE A sum_in_lanes(const A* x, int64_t count, F&& term) {
  constexpr int64_t width = kLanes<A>;
  Lanes<A> sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * width <= count; i += 4 * width) {
    for (int64_t k = 0; k < 4; ++k) {
      Lanes<A> v;
      load_lanes(x + i + k * width, v);
      sums[k] += term(v);
    }
  }
  for (; i + width <= count; i += width) {
    Lanes<A> v;
    load_lanes(x + i, v);
    sums[0] += term(v);
  }
  A total = sum_of_lanes<A>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < count; ++i) total += term(x[i]);
  return total;
}

// The sums of x and of x y over count numbers, count at most a few thousand.
template <class A>
FD_INLINE void sums_and_products(const A* x, const A* y, int64_t count, A& sum, A& product) {
  constexpr int64_t width = kLanes<A>;
  Lanes<A> sums{}, products{};
  int64_t i = 0;
  for (; i + width <= count; i += width) {
    Lanes<A> u, v;
    load_lanes(x + i, u);
    load_lanes(y + i, v);
    sums += u;
    products += u * v;
  }
  sum = sum_of_lanes<A>(sums);
  product = sum_of_lanes<A>(products);
  for (; i < count; ++i) {
    sum += x[i];
    product += x[i] * y[i];
  }
}

}  // namespace fastdiff::FASTDIFF_VARIANT
