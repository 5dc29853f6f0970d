// Compiled for SSE4.2 and called only if the CPU has it. So nothing here may be inline and shared
// with other files.
#include <nmmintrin.h>

#include <cstring>

#include "refcache/crc32c.h"

namespace realign {

uint32_t crc32c_sse42(const void* data, size_t size, uint32_t seed) {
  const auto* bytes = static_cast<const uint8_t*>(data);
  uint64_t crc = static_cast<uint32_t>(~seed);
  for (; size >= 8; size -= 8, bytes += 8) {
    uint64_t word;
    std::memcpy(&word, bytes, 8);
    crc = _mm_crc32_u64(crc, word);
  }
  auto narrow = static_cast<uint32_t>(crc);
  if (size >= 4) {  // the last 4 of a record's 28 bytes
    uint32_t word;
    std::memcpy(&word, bytes, 4);
    narrow = _mm_crc32_u32(narrow, word);
    size -= 4;
    bytes += 4;
  }
  for (; size > 0; --size, ++bytes) narrow = _mm_crc32_u8(narrow, *bytes);
  return ~narrow;
}

}  // namespace realign
