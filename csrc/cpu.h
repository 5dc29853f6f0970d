// Which instruction set the kernels use, decided once per process.
#pragma once

namespace realign {

// Instruction sets of the row kernels, each with those before it; the names are REALIGN_CPU's.
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
  CpuLevel level;   // of the row kernels: what the CPU has, or less if REALIGN_CPU asks for less
  bool bf16;        // GEMM with fp32 sums: by AVX512_BF16 at level avx512, BFMMLA at level neon
  bool amx;         // bf16 tiles for that GEMM, allowed to this process; not if REALIGN_CPU is set
};

// Throws std::invalid_argument if REALIGN_CPU is none of kLevels, or names a level that this CPU
// lacks.
const Cpu& cpu();

}  // namespace realign
