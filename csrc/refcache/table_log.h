// The log files of a table: their format, and reading.
#pragma once

#include <sys/types.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "refcache/table_files.h"
#include "refcache/table_index.h"

namespace realign {

using Fingerprint = std::array<uint8_t, 16>;

struct Header {
  char magic[8];
  Fingerprint fingerprint;
  uint32_t version;
  uint32_t crc;
};
static_assert(sizeof(Header) == sizeof(Record));

Header make_header(const Fingerprint& fingerprint);
uint32_t record_crc(const Record& record, uint32_t seed);  // seed: crc32c of the fingerprint
std::string hex(const Fingerprint& fingerprint);

// The state of reading a log, and its errors.
struct Log {
  dev_t device = 0;
  ino_t inode = 0;
  int64_t size = 0;
  int64_t position = 0;  // End of the last good record.
  Record last{};         // Record before `position`. Detects a new file with the same inode.
  int64_t bad = 0;       // Records before `position` that failed their check.
  int64_t late = 0;      // Records after it that failed. Tried again: their bytes may arrive late.
  int64_t torn_bytes = 0;
};

// Records whose key was known when they were read.
struct Repeats {
  int64_t duplicates = 0;
  int64_t conflicts = 0;  // duplicates with another value
  double largest_difference = 0;
};

// Adds the records after log.position to the index, and to `kept` unless it is null. If the header
// has another table or version, throws std::invalid_argument for an own file. Returns false for a
// file of another user, whose mistake must not stop this one.
bool read_log(int fd, const std::string& path, const Fingerprint& fingerprint, Log& log,
              Index& index, Repeats& repeats, std::vector<Record>* kept = nullptr);

// Whether the file begins with the header of this table.
bool has_header(int fd, const std::string& path, const Fingerprint& fingerprint);

}  // namespace realign
