#include "cpu.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "gemm_amx.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace realign {
namespace {

Cpu probe() {
  Cpu found{CpuLevel::scalar, false, false};
#if defined(__x86_64__)
  __builtin_cpu_init();  // its answers include whether the system saves the wide registers
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    found.level = CpuLevel::avx2;
  }
  if (found.level == CpuLevel::avx2 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    found.level = CpuLevel::avx512;
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    found.bf16 = __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 5 & 1);
    const bool tiles = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx >> 22 & 1);
    found.amx = found.bf16 && tiles;
  }
#endif
  return found;
}

Cpu decide() {
  Cpu found = probe();
  const char* asked = std::getenv("REALIGN_CPU");
  if (asked == nullptr || *asked == '\0') {
#if defined(REALIGN_X86)
    found.amx = found.amx && amx_granted();
#endif
    return found;
  }
  const std::string name(asked);
  CpuLevel level;
  if (name == "scalar") {
    level = CpuLevel::scalar;
  } else if (name == "avx2") {
    level = CpuLevel::avx2;
  } else if (name == "avx512") {
    level = CpuLevel::avx512;
  } else {
    throw std::invalid_argument("REALIGN_CPU=" + name + ": use scalar, avx2 or avx512");
  }
  if (level > found.level) {
    throw std::invalid_argument("REALIGN_CPU=" + name + ": this CPU does not have it");
  }
  found.level = level;
  found.amx = false;  // AVX-512 was asked for, and nothing beyond it
  found.bf16 = found.bf16 && level == CpuLevel::avx512;
  return found;
}

}  // namespace

const Cpu& cpu() {
  static const Cpu decided = decide();  // a throw leaves it undecided, so every call throws
  return decided;
}

}  // namespace realign
