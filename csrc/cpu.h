// Which instruction set the kernels use, decided once per process.
#pragma once

namespace realign {

enum class CpuLevel { scalar = 0, avx2 = 1, avx512 = 2 };

struct Cpu {
  CpuLevel level;   // of the row kernels: what the CPU has, or less if REALIGN_CPU asks for less
  bool bf16;        // AVX512_BF16 at level avx512: bf16 conversions, and GEMM with fp32 sums
  bool amx;         // bf16 tiles for that GEMM, which this process may use; not if REALIGN_CPU is set
};

// Throws std::invalid_argument if REALIGN_CPU is none of scalar, avx2, avx512, or names a level
// that this CPU lacks.
const Cpu& cpu();

}  // namespace realign
