// The log files of a table: format, opening, locking, reading and writing.
#pragma once

#include <sys/types.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "refcache/table_index.h"

namespace realign {

using Fingerprint = std::array<uint8_t, 16>;

// A failed system call: OSError(code, what(), path) in Python.
class FileError : public std::runtime_error {
 public:
  // `what` is the operation. The message of the system and, for some codes, a remedy are appended.
  FileError(int code, const std::string& path, const std::string& what);
  int code() const { return code_; }
  const std::string& path() const { return path_; }

 private:
  int code_;
  std::string path_;
};

// A file descriptor. Closing it releases its lock, unless a forked child has a copy.
class File {
 public:
  File() = default;
  explicit File(int fd) : fd_(fd) {}
  ~File() { close(); }
  File(File&& other) noexcept : fd_(other.fd_) { other.fd_ = -1; }
  File& operator=(File&& other) noexcept;
  void close();
  int fd() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }

 private:
  int fd_ = -1;
};

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

// Adds the records after log.position to the index, and to `kept` unless it is null. Throws
// std::invalid_argument if the log has another table or version.
void read_log(int fd, const std::string& path, const Fingerprint& fingerprint, Log& log,
              Index& index, Repeats& repeats, std::vector<Record>* kept = nullptr);

// File names of the logs, sorted.
std::vector<std::string> list_logs(const std::string& folder);

// Opens for reading. Returns an empty File if the path does not exist.
File open_to_read(const std::string& path);

enum class Lock { taken, busy, unsupported };

// Opens for appending, with the lock that marks the writer. If the path does not exist, creates the
// file if `create` is set, and else returns an empty File.
File open_locked(const std::string& path, bool create, Lock& lock);

// Writes `size` bytes and returns the number of bytes written. Does not throw: if the number is
// smaller than `size`, `code` is the errno.
int64_t write_all(int fd, const void* data, int64_t size, int& code);

void sync_folder(const std::string& folder);

}  // namespace realign
