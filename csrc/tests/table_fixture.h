// Helpers for the tests of the table: batches of records with values derived from their keys, and
// system calls that can be made to fail. Included once.
#pragma once

#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "check.h"
#include "refcache/table.h"

// Replacements of the C library's functions that let a test make system calls fail.
static int flock_error = 0, truncate_error = 0, sync_error = 0;
static bool fake_sync = false;  // 20 ms each
static int unlink_error = 0, empty_listings = 0;
static const char* vanishing = nullptr;  // a file replaced between its opening and the lock
static bool keeps_vanishing = false, flips_listings = false;

static int refuse(int error, long result) {
  if (error == 0) return static_cast<int>(result);
  errno = error;
  return -1;
}

extern "C" int flock(int fd, int how) {
  if (vanishing != nullptr) {
    unlinkat(AT_FDCWD, vanishing, 0);
    close(open(vanishing, O_CREAT | O_WRONLY, 0666));
    if (!keeps_vanishing) vanishing = nullptr;
  }
  return refuse(flock_error, flock_error ? 0 : syscall(SYS_flock, fd, how));
}
extern "C" int ftruncate(int fd, off_t size) noexcept {
  return refuse(truncate_error, truncate_error ? 0 : syscall(SYS_ftruncate, fd, size));
}
extern "C" int fdatasync(int fd) {
  return refuse(sync_error, sync_error || fake_sync ? 0 : syscall(SYS_fdatasync, fd));
}
extern "C" int fsync(int fd) { return fake_sync ? 0 : static_cast<int>(syscall(SYS_fsync, fd)); }
extern "C" dirent* readdir(DIR* stream) {
  static const auto next = reinterpret_cast<dirent* (*)(DIR*)>(dlsym(RTLD_NEXT, "readdir"));
  static int listings = 0;
  const bool empty = empty_listings > 0 || (flips_listings && listings % 2 == 1);
  if (empty_listings > 0) --empty_listings;
  dirent* const entry = empty ? nullptr : next(stream);
  if (flips_listings) listings += entry == nullptr;  // by one thread
  return entry;
}
extern "C" int unlinkat(int folder, const char* name, int flags) noexcept {
  return refuse(unlink_error, unlink_error ? 0 : syscall(SYS_unlinkat, folder, name, flags));
}

namespace realign {

inline std::string root;  // the working folder
const Fingerprint kPrint = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};

// Records starting with number `first`, with consecutive keys, and values derived from them.
struct Batch {
  std::vector<uint8_t> keys;
  std::vector<double> logps;
  std::vector<int32_t> tokens;
  Batch(int64_t first, int64_t count)
      : keys(static_cast<size_t>(16 * count)), logps(keys.size() / 16), tokens(logps.size()) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t number = first + i;
      std::memcpy(keys.data() + 16 * i, &number, 8);
      logps[i] = -1.0 / static_cast<double>(number + 3);
      tokens[i] = static_cast<int32_t>(number % 1000 + 1);
    }
  }
};

inline size_t insert(Table& table, int64_t first, int64_t count) {
  const Batch batch(first, count);
  return table.insert(batch.keys.data(), batch.logps.data(), batch.tokens.data(),
                      static_cast<size_t>(count));
}

// The number of these records in the table. A wrong value is a failure.
inline int64_t count_right(const Table& table, int64_t first, int64_t count) {
  const Batch batch(first, count);
  std::vector<double> logps(batch.logps.size());
  std::vector<int32_t> tokens(batch.logps.size());
  table.lookup(batch.keys.data(), static_cast<size_t>(count), logps.data(), tokens.data());
  int64_t right = 0;
  for (size_t i = 0; i < logps.size(); ++i) {
    const bool absent = std::isnan(logps[i]) && tokens[i] == 0;
    const bool same = logps[i] == batch.logps[i] && tokens[i] == batch.tokens[i];
    expect(absent || same, "a wrong value from key " + std::to_string(first));
    right += same;
  }
  return right;
}

inline std::string fresh(const std::string& name) {
  const std::string folder = root + "/" + name;
  std::filesystem::remove_all(folder);
  return folder;
}

inline std::vector<uint8_t> read_file(const std::string& path) {
  std::vector<uint8_t> bytes(std::filesystem::file_size(path));
  if (bytes.empty()) return bytes;  // fread takes no null pointer
  FILE* file = std::fopen(path.c_str(), "rb");
  expect(std::fread(bytes.data(), 1, bytes.size(), file) == bytes.size(), "reading " + path);
  std::fclose(file);
  return bytes;
}

inline void write_file(const std::string& path, const std::vector<uint8_t>& bytes) {
  FILE* file = std::fopen(path.c_str(), "wb");
  const size_t size = bytes.size();
  expect(size == 0 || std::fwrite(bytes.data(), 1, size, file) == size, "writing " + path);
  std::fclose(file);
}

}  // namespace realign
