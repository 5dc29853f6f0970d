// CRC-32C (Castagnoli, RFC 3720 B.4), which every header and record of a table carries.
#pragma once

#include <cstddef>
#include <cstdint>

namespace realign {

// Of `data` behind bytes whose CRC is `seed`: crc32c(b, crc32c(a)) is that of a followed by b.
uint32_t crc32c(const void* data, size_t size, uint32_t seed = 0);

// What crc32c takes: the instruction where the CPU has it, tables elsewhere.
uint32_t crc32c_tables(const void* data, size_t size, uint32_t seed);
#if defined(__x86_64__)
uint32_t crc32c_sse42(const void* data, size_t size, uint32_t seed);
#endif

}  // namespace realign
