// The instruction set that the kernels use, decided once per process.
#pragma once

namespace realign {

// Instruction sets of the row kernels, each including the previous ones, with the names of
// REALIGN_CPU.
#if defined(REALIGN_X86)
enum class CpuLevel { scalar, avx2, avx512 };
constexpr const char* kLevels[] = {"scalar", "avx2", "avx512"};
#elif defined(REALIGN_ARM)
enum class CpuLevel { scalar, neon };
constexpr const char* kLevels[] = {"scalar", "neon"};
#else
enum class CpuLevel { scalar };
constexpr const char* kLevels[] = {"scalar"};
#endif

struct Cpu {
  CpuLevel level;  // Level of the row kernels: that of the CPU, or a lower one set by REALIGN_CPU.
  bool bf16;       // bf16 GEMM with fp32 sums: AVX512_BF16 at level avx512, BFMMLA at level neon.
  bool amx;        // That GEMM uses AMX, if the system allows it and REALIGN_CPU is not set.
};

// Throws std::invalid_argument if REALIGN_CPU is not in kLevels, or is a level that this CPU lacks.
const Cpu& cpu();

}  // namespace realign
