#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <utility>

#include "refcache/table.h"

namespace realign {
namespace {

constexpr int64_t kUnit = sizeof(Record);
// Sorts before the logs of writers. If values differ, the value that counted before still counts.
const char kPrefix[] = "+compacted-";
// Larger numbers come from other programs only. They would overflow.
constexpr long long kMostNumber = 1'000'000'000;

// One more than the number of any existing result. A name that is used again could be mistaken for
// the old file.
long long next_number(const std::vector<std::string>& names) {
  long long number = -1;
  for (const std::string& name : names) {
    if (name.rfind(kPrefix, 0) != 0) continue;
    const long long found = std::strtoll(name.c_str() + sizeof(kPrefix) - 1, nullptr, 10);
    if (found < kMostNumber) number = std::max(number, found);
  }
  return number + 1;
}

// Creates the result under a new name.
std::pair<std::string, File> create_result(const Folder& folder, long long number) {
  char name[48];
  File file;
  for (const long long end = number + 100; !file; ++number) {  // others may take a few names
    if (number == end) throw FileError(EAGAIN, folder.path(name), "compacting a table");
    std::snprintf(name, sizeof(name), "%s%05lld.log", kPrefix, number);
    file = create_file(folder, name);
  }
  return {name, std::move(file)};
}

// Readers skip incomplete records, and still find them in the old logs.
void write_result(const Folder& folder, const std::string& name, int fd,
                  const Fingerprint& fingerprint, const std::vector<Record>& records) {
  const Header header = make_header(fingerprint);
  const auto bytes = static_cast<int64_t>(records.size()) * kUnit;
  int code;
  if (write_all(fd, &header, kUnit, code) == kUnit &&
      write_all(fd, records.data(), bytes, code) == bytes) {
    if (fsync(fd) == 0) return;
    code = errno;
  }
  unlinkat(folder.fd(), name.c_str(), 0);
  throw FileError(code, folder.path(name), "compacting a table, which is unchanged");
}

}  // namespace

Compaction compact_table(const std::string& path, const Fingerprint& fingerprint) {
  const Folder folder(path);
  // Each user merges own logs only, and so needs an own lock.
  const std::string guard = ".compact-" + std::to_string(geteuid()) + ".lock";
  std::string refusal;
  Lock lock = Lock::taken;
  const File only = open_locked(folder, guard, true, lock, refusal);
  if (!only) {
    throw FileError(EINVAL, folder.path(guard),
                    "the lock of compactions is " + refusal + ". Remove it, then compact again");
  }
  if (lock == Lock::busy) {
    throw FileError(EWOULDBLOCK, folder.path(guard),
                    "another process is compacting " + path + ". Wait until it has finished");
  }
  if (lock == Lock::unsupported) {
    throw FileError(ENOLCK, folder.path(guard),
                    "this file system has no locks, so logs of live writers cannot be detected. "
                    "Compact a copy on another file system");
  }

  Compaction done;
  Index index;
  Repeats repeats;
  std::vector<Record> kept;
  std::vector<std::pair<std::string, File>> merged;  // the Files hold locks
  const std::vector<std::string> names = folder.logs();
  for (const std::string& name : names) {
    File file = open_locked(folder, name, false, lock, refusal);
    if (!file) {
      done.logs_skipped += !refusal.empty();
      continue;
    }
    if (lock != Lock::taken) {
      ++done.logs_in_use;
      continue;
    }
    Log log;
    read_log(file.fd(), folder.path(name), fingerprint, log, index, repeats, &kept);
    // No record and no header: the file is something else, or its writer has just created it.
    if (log.position == 0) {
      done.logs_skipped += log.size > 0;
      continue;
    }
    done.bytes_before += log.size;
    done.bad_dropped += log.bad + log.late;
    done.torn_bytes += log.torn_bytes;
    merged.emplace_back(name, std::move(file));
  }
  done.records = static_cast<int64_t>(kept.size());
  done.duplicates_dropped = repeats.duplicates;
  done.bytes_after = done.bytes_before;
  const bool clean = done.bad_dropped + done.torn_bytes + done.duplicates_dropped == 0;
  if (merged.empty() || (merged.size() == 1 && clean)) return done;

  const auto [name, result] = create_result(folder, next_number(names));
  write_result(folder, name, result.fd(), fingerprint, kept);
  folder.sync();
  // A reader that misses a removed log now finds its records under the new name.
  for (const auto& log : merged) folder.remove(log.first);
  done.logs_merged = static_cast<int64_t>(merged.size());
  done.bytes_after = kUnit + static_cast<int64_t>(kept.size()) * kUnit;
  return done;
}

}  // namespace realign
