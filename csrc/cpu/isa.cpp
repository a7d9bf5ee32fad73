#include "cpu/torch.h"

// Like its neighbours this file is compiled once per instruction set; one of the objects has the symbol.
#if !defined(FASTDIFF_AVX2) && !defined(FASTDIFF_AVX512)
// Found at load time, as the kernels are registered: FASTDIFF_ISA may have changed since.
static const fastdiff::Isa registered = fastdiff::selected_isa();

// The instruction set of the registered kernels, by its name in FASTDIFF_ISA.
extern "C" __attribute__((visibility("default"))) const char* fastdiff_instruction_set() {
  switch (registered) {
    case fastdiff::Isa::avx512: return "avx512";
    case fastdiff::Isa::avx2: return "avx2";
    case fastdiff::Isa::baseline: break;
  }
  return "baseline";
}
#endif
