#include "cpu.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>

#include "gemm/gemm_amx.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(REALIGN_ARM) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace realign {
namespace {

Cpu probe() {
  Cpu found{CpuLevel::scalar, false, false};
#if defined(__x86_64__)
  __builtin_cpu_init();  // also checks that the system saves the wide registers
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
#elif defined(REALIGN_ARM)
  found.level = CpuLevel::neon;
#if defined(__linux__)
  found.bf16 = getauxval(AT_HWCAP2) & HWCAP2_BF16;
#endif
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
  std::string names;
  for (const char* known : kLevels) names += (names.empty() ? "" : ", ") + std::string(known);
  const auto* place = std::find(std::begin(kLevels), std::end(kLevels), name);
  if (place == std::end(kLevels)) {
    throw std::invalid_argument("REALIGN_CPU=" + name + " is unknown. Use one of " + names + ".");
  }
  const auto level = static_cast<CpuLevel>(place - kLevels);
  if (level > found.level) {
    throw std::invalid_argument("REALIGN_CPU=" + name + " is not supported by this CPU");
  }
  found.bf16 = found.bf16 && level == found.level;  // bf16 needs the highest level
  found.level = level;
  found.amx = false;  // no level of REALIGN_CPU includes AMX
  return found;
}

}  // namespace

const Cpu& cpu() {
  static const Cpu decided = decide();  // not initialized by a call that throws
  return decided;
}

}  // namespace realign
