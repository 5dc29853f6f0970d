#include "cpu.h"
#include "gemm/gemm.h"

namespace realign {

Gemm gemm_of_bf16() {
#if defined(REALIGN_X86) || defined(REALIGN_ARM)
  if (cpu().bf16) return gemm_bf16;
#endif
  return nullptr;
}

Gemm gemm_of_f32() {
#if defined(REALIGN_X86)
  if (cpu().level == CpuLevel::avx512) return gemm_f32;
#endif
  return nullptr;
}

}  // namespace realign
