#include "refcache/table_log.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "refcache/crc32c.h"

namespace realign {
namespace {

constexpr char kMagic[8] = {'R', 'A', 'L', 'N', 'R', 'E', 'F', '1'};
constexpr uint32_t kVersion = 1;
constexpr int64_t kUnit = sizeof(Record);
constexpr int64_t kChunk = 1 << 15;  // records read at once: 1 MiB
constexpr int64_t kBatch = 64;       // records whose slots are prefetched together

bool good(const Record& record, uint32_t seed) {
  return record_crc(record, seed) == record.crc && record.tokens >= 1 &&
         std::isfinite(record.logp);
}

int64_t read_at(int fd, const std::string& path, void* data, int64_t size, int64_t offset) {
  int64_t done = 0;
  while (done < size) {
    const ssize_t got = pread(fd, static_cast<char*>(data) + done, static_cast<size_t>(size - done),
                              static_cast<off_t>(offset + done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw FileError(errno, path, "reading a log");
    if (got == 0) break;  // the file was truncated meanwhile
    done += got;
  }
  return done;
}

enum class Kind { intact, damaged, foreign };

// The kind of a header. Throws for an own log of another table or version.
Kind check_header(const Record& raw, const std::string& path, const Fingerprint& fingerprint,
                  bool own) {
  Header header;
  std::memcpy(&header, &raw, sizeof(header));
  if (crc32c(&header, sizeof(header) - 4) != header.crc ||
      std::memcmp(header.magic, kMagic, sizeof(kMagic)) != 0) {
    return Kind::damaged;
  }
  if (header.version == kVersion && header.fingerprint == fingerprint) return Kind::intact;
  if (!own) return Kind::foreign;
  if (header.version != kVersion) {
    throw std::invalid_argument(path + " has version " + std::to_string(header.version) +
                                " of the format, but this version of realign supports only " +
                                std::to_string(kVersion) +
                                ". Update realign, or use another folder.");
  }
  throw std::invalid_argument(
      path + " belongs to the table with fingerprint " + hex(header.fingerprint) + ", not " +
      hex(fingerprint) +
      ". Its values are for another model or data. Use another folder, or delete this one.");
}

// The end of a hole at this offset. Records in a hole are zeros, hence bad. Another user can make a
// file of 8 EB without space on the disk, and reading it would take centuries.
int64_t after_hole(int fd, int64_t at, int64_t end) {
#if defined(SEEK_DATA)
  const off_t data = lseek(fd, static_cast<off_t>(at), SEEK_DATA);
  if (data < 0) return errno == ENXIO ? end : at;
  return std::min(end, std::max(at, static_cast<int64_t>(data) / kUnit * kUnit));
#else
  return at;
#endif
}

}  // namespace

Header make_header(const Fingerprint& fingerprint) {
  Header header{};
  std::memcpy(header.magic, kMagic, sizeof(kMagic));
  header.fingerprint = fingerprint;
  header.version = kVersion;
  header.crc = crc32c(&header, sizeof(header) - 4);
  return header;
}

uint32_t record_crc(const Record& record, uint32_t seed) {
  return crc32c(&record, sizeof(record) - 4, seed);
}

std::string hex(const Fingerprint& fingerprint) {
  static const char digits[] = "0123456789abcdef";
  std::string text;
  for (const uint8_t byte : fingerprint) {
    text += digits[byte >> 4];
    text += digits[byte & 15];
  }
  return text;
}

bool has_header(int fd, const std::string& path, const Fingerprint& fingerprint) {
  const Header expected = make_header(fingerprint);
  Header header;
  return read_at(fd, path, &header, kUnit, 0) == kUnit &&
         std::memcmp(&header, &expected, sizeof(header)) == 0;
}

bool read_log(int fd, const std::string& path, const Fingerprint& fingerprint, Log& log,
              Index& index, Repeats& repeats, std::vector<Record>* kept) {
  struct stat status;
  if (fstat(fd, &status) != 0) throw FileError(errno, path, "reading a log");
  const int64_t size = status.st_size;
  Record first;
  // The file may have been replaced or truncated. A new file may have the inode number of the old
  // one, so the record before the position is compared as well.
  const bool same = log.device == status.st_dev && log.inode == status.st_ino &&
                    size >= log.position &&
                    (log.position == 0 ||
                     (read_at(fd, path, &first, kUnit, log.position - kUnit) == kUnit &&
                      std::memcmp(&first, &log.last, kUnit) == 0));
  if (!same) log = Log{};
  log.device = status.st_dev;
  log.inode = status.st_ino;
  log.size = size;
  log.torn_bytes = size % kUnit;
  log.late = 0;
  const int64_t end = size - log.torn_bytes;
  if (log.position == end) return true;

  const uint32_t seed = crc32c(fingerprint.data(), fingerprint.size());
  std::vector<Record> chunk(static_cast<size_t>(std::min(kChunk, (end - log.position) / kUnit)));
  for (int64_t at = log.position; at < end;) {
    const auto room = static_cast<int64_t>(chunk.size()) * kUnit;
    const int64_t got = read_at(fd, path, chunk.data(), std::min(room, end - at), at) / kUnit;
    if (got == 0) break;
    const int64_t before = log.position;
    for (int64_t start = 0; start < got; start += kBatch) {
      const int64_t stop = std::min(got, start + kBatch);
      size_t places[kBatch];
      bool passed[kBatch];
      index.reserve(index.size() + static_cast<size_t>(stop - start));
      for (int64_t i = start; i < stop; ++i) {
        passed[i - start] = good(chunk[i], seed);
        places[i - start] = index.place(chunk[i].key);
        index.prefetch(places[i - start]);
      }
      for (int64_t i = start; i < stop; ++i, at += kUnit) {
        const Record& record = chunk[i];
        const bool is_header = at == 0;
        if (is_header) {
          const Kind kind = check_header(record, path, fingerprint, own_file(status));
          if (kind == Kind::foreign) return false;
          passed[i - start] = kind == Kind::intact;
        }
        if (!passed[i - start]) {
          ++log.late;
          continue;
        }
        if (!is_header) {
          bool added;
          const Record* there = index.insert(record, places[i - start], added);
          if (added && kept != nullptr) kept->push_back(record);
          if (!added) {
            ++repeats.duplicates;
            const double difference = std::abs(there->logp - record.logp);
            repeats.conflicts += difference != 0 || there->tokens != record.tokens;
            repeats.largest_difference = std::max(repeats.largest_difference, difference);
          }
        }
        log.bad += log.late;
        log.late = 0;
        log.position = at + kUnit;
        log.last = record;
      }
    }
    if (log.position == before) {  // no good record
      const int64_t next = after_hole(fd, at, end);
      log.late += (next - at) / kUnit;
      at = next;
    }
  }
  return true;
}

}  // namespace realign
