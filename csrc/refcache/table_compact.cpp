#include <dirent.h>
#include <fcntl.h>
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

// One more than the number of any existing result. A name that is used again could be mistaken for
// the old file.
std::string fresh_name(const std::vector<std::string>& names) {
  long number = -1;
  for (const std::string& name : names) {
    if (name.rfind(kPrefix, 0) == 0) {
      number = std::max(number, std::strtol(name.c_str() + sizeof(kPrefix) - 1, nullptr, 10));
    }
  }
  char name[48];
  std::snprintf(name, sizeof(name), "%s%05ld.log", kPrefix, number + 1);
  return name;
}

// Removes the partial results of crashed compactions.
void remove_partial(const std::string& folder) {
  DIR* stream = opendir(folder.c_str());
  if (stream == nullptr) throw FileError(errno, folder, "listing a table");
  const std::string start = std::string(".") + kPrefix;
  while (const dirent* entry = readdir(stream)) {
    const std::string name(entry->d_name);
    if (name.rfind(start, 0) == 0) unlink((folder + "/" + name).c_str());
  }
  closedir(stream);
}

void write_log(const std::string& path, const Fingerprint& fingerprint,
               const std::vector<Record>& records) {
  const File file(open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666));
  if (!file) throw FileError(errno, path, "compacting a table");
  const Header header = make_header(fingerprint);
  const auto bytes = static_cast<int64_t>(records.size()) * kUnit;
  int code;
  if (write_all(file.fd(), &header, kUnit, code) == kUnit &&
      write_all(file.fd(), records.data(), bytes, code) == bytes) {
    if (fsync(file.fd()) == 0) return;
    code = errno;
  }
  unlink(path.c_str());
  throw FileError(code, path, "compacting a table, which is unchanged");
}

}  // namespace

Compaction compact_table(const std::string& folder, const Fingerprint& fingerprint) {
  const std::string guard = folder + "/.compact.lock";
  Lock lock;
  const File only = open_locked(guard, true, lock);
  if (lock == Lock::busy) {
    throw FileError(EWOULDBLOCK, guard,
                    "another process is compacting " + folder + ". Wait until it has finished");
  }
  if (lock == Lock::unsupported) {
    throw FileError(ENOLCK, guard,
                    "this file system has no locks, so logs of live writers cannot be detected. "
                    "Compact a copy on another file system");
  }
  remove_partial(folder);

  Compaction done;
  Index index;
  Repeats repeats;
  std::vector<Record> kept;
  std::vector<std::pair<std::string, File>> merged;  // the Files hold locks
  const std::vector<std::string> names = list_logs(folder);
  for (const std::string& name : names) {
    const std::string path = folder + "/" + name;
    File file = open_locked(path, false, lock);
    if (!file) continue;
    if (lock != Lock::taken) {
      ++done.logs_in_use;
      continue;
    }
    Log log;
    read_log(file.fd(), path, fingerprint, log, index, repeats, &kept);
    done.bytes_before += log.size;
    done.bad_dropped += log.bad + log.late;
    done.torn_bytes += log.torn_bytes;
    merged.emplace_back(path, std::move(file));
  }
  done.records = static_cast<int64_t>(kept.size());
  done.duplicates_dropped = repeats.duplicates;
  done.bytes_after = done.bytes_before;
  const bool clean = done.bad_dropped + done.torn_bytes + done.duplicates_dropped == 0;
  if (merged.empty() || (merged.size() == 1 && clean)) return done;

  const std::string name = fresh_name(names), result = folder + "/" + name;
  const std::string partial = folder + "/." + name + ".partial";
  write_log(partial, fingerprint, kept);
  if (rename(partial.c_str(), result.c_str()) != 0) {
    throw FileError(errno, result, "compacting a table");
  }
  sync_folder(folder);
  // A reader that misses a removed log now finds its records under the new name.
  for (const auto& log : merged) {
    if (unlink(log.first.c_str()) != 0) throw FileError(errno, log.first, "removing a merged log");
  }
  done.logs_merged = static_cast<int64_t>(merged.size());
  done.bytes_after = kUnit + static_cast<int64_t>(kept.size()) * kUnit;
  return done;
}

}  // namespace realign
