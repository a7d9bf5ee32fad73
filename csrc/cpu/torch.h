#pragma once
// torch's stable headers and the standard library, kept out of the regions compiled for one instruction set; and the choice among them.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

namespace fastdiff {

enum class Isa { baseline, avx2, avx512 };

// The best instruction set that the machine has; FASTDIFF_ISA lowers the choice, for tests.
inline Isa selected_isa() {
  Isa best = Isa::baseline;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = Isa::avx2;
  if (best == Isa::avx2 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    best = Isa::avx512;
  }
#endif
  const char* wanted = std::getenv("FASTDIFF_ISA");
  if (wanted == nullptr) return best;
  const Isa limit = std::strcmp(wanted, "avx512") == 0 ? Isa::avx512 : std::strcmp(wanted, "avx2") == 0 ? Isa::avx2 : Isa::baseline;
  return std::min(best, limit);
}

}  // namespace fastdiff

// Every family is compiled once per instruction set and registers its kernels where it is the selected one.
#if defined(FASTDIFF_AVX512)
#define FASTDIFF_THIS_ISA ::fastdiff::Isa::avx512
#elif defined(FASTDIFF_AVX2)
#define FASTDIFF_THIS_ISA ::fastdiff::Isa::avx2
#else
#define FASTDIFF_THIS_ISA ::fastdiff::Isa::baseline
#endif

#define FASTDIFF_CPU_KERNELS(m)                                                            \
  static void fastdiff_register(torch::stable::detail::StableLibrary& m);                  \
  STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, library) {                                      \
    if (::fastdiff::selected_isa() == FASTDIFF_THIS_ISA) fastdiff_register(library);       \
  }                                                                                        \
  static void fastdiff_register(torch::stable::detail::StableLibrary& m)
