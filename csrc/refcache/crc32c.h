// CRC-32C (Castagnoli, RFC 3720 B.4), the checksum of headers and records of a table.
#pragma once

#include <cstddef>
#include <cstdint>

namespace realign {

// CRC of `data`, continued from `seed`: crc32c(b, crc32c(a)) is the CRC of a followed by b.
uint32_t crc32c(const void* data, size_t size, uint32_t seed = 0);

// Implementations of crc32c: the CPU's instruction if available, else tables.
uint32_t crc32c_tables(const void* data, size_t size, uint32_t seed);
#if defined(__x86_64__)
uint32_t crc32c_sse42(const void* data, size_t size, uint32_t seed);
#endif

}  // namespace realign
