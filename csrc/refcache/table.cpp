#include "refcache/table.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <limits>
#include <random>
#include <system_error>
#include <utility>

#include "refcache/crc32c.h"

namespace realign {
namespace {

constexpr size_t kBatch = 64;  // keys whose slots are prefetched together
constexpr int64_t kUnit = sizeof(Record);

void check_name(const std::string& name) {
  static const char allowed[] =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-";
  if (name.empty() || name[0] == '.' || name.find_first_not_of(allowed) != std::string::npos) {
    throw std::invalid_argument("writer is '" + name +
                                "'. Use letters, digits, '.', '_' and '-', without a leading dot.");
  }
}

std::string random_name() {
  std::random_device random;
  char name[32];
  std::snprintf(name, sizeof(name), "w-%08x%08x.log", random(), random());
  return name;
}

}  // namespace

class Table::Shared {
 public:
  explicit Shared(const Table& table) {
    std::lock_guard<std::mutex> gate(table.gate_);
    lock_ = std::shared_lock<std::shared_mutex>(table.mutex_);
  }

 private:
  std::shared_lock<std::shared_mutex> lock_;
};

class Table::Exclusive {
 public:
  explicit Exclusive(const Table& table) : gate_(table.gate_), lock_(table.mutex_) {}

 private:
  std::lock_guard<std::mutex> gate_;
  std::lock_guard<std::shared_mutex> lock_;
};

Table::Table(const std::string& folder, const Fingerprint& fingerprint,
             const std::optional<std::string>& writer, bool read_only)
    : folder_(folder),
      fingerprint_(fingerprint),
      asked_(writer),
      read_only_(read_only),
      owner_(getpid()) {
  if (writer) check_name(*writer);
  struct stat status;
  if (stat(folder.c_str(), &status) != 0) {
    const int code = errno;
    if (read_only && code == ENOENT) {
      throw FileError(code, folder,
                      "there is no table to read. Check the path, or create the table with a "
                      "writer");
    }
    if (code != ENOENT) throw FileError(code, folder, "opening a table");
    std::error_code error;
    std::filesystem::create_directories(folder, error);
    if (error) throw FileError(error.value(), folder, "creating the folder of a table");
  } else if (!S_ISDIR(status.st_mode)) {
    throw FileError(ENOTDIR, folder, "opening a table");
  }
  int64_t bytes = 0;
  for (const std::string& name : list_logs(folder_)) {
    if (stat(path(name).c_str(), &status) == 0) bytes += status.st_size;
  }
  index_.reserve(static_cast<size_t>(bytes / kUnit));
  read_logs();
  // A second writer with this name fails here instead of at its first insert.
  if (writer && !read_only && logs_.count(*writer + ".log") != 0 &&
      access(path(*writer + ".log").c_str(), W_OK) == 0) {
    take_log();
  }
}

Table::~Table() {
  try {
    close();
  } catch (const std::exception&) {
    release();  // a destructor cannot report the error
  }
}

bool Table::own() const { return file_ && owner_ == getpid(); }

// Whether this process's log is unchanged since its last write: not truncated, not removed.
bool Table::intact() const {
  struct stat status;
  return own() && fstat(file_.fd(), &status) == 0 && status.st_nlink > 0 &&
         status.st_size == end_;
}

void Table::check_open() const {
  if (closed_) {
    throw std::invalid_argument("the table in " + folder_ + " was closed. Open it again.");
  }
}

// A compaction puts its result in place before it removes the merged logs. Listing a folder is not
// atomic, however, and may see neither. The folder is therefore listed until it stays the same.
void Table::read_logs() {
  std::vector<std::string> names = list_logs(folder_);
  for (;;) {
    for (const std::string& name : names) {
      if (own() && name == name_) continue;
      const File file = open_to_read(path(name));
      if (file) read_log(file.fd(), path(name), fingerprint_, logs_[name], index_, repeats_);
    }
    std::vector<std::string> again = list_logs(folder_);
    if (again == names) break;
    names = std::move(again);
  }
  for (auto it = logs_.begin(); it != logs_.end();) {
    const bool gone = !std::binary_search(names.begin(), names.end(), it->first);
    it = gone && !(own() && it->first == name_) ? logs_.erase(it) : std::next(it);
  }
}

size_t Table::refresh() {
  const Exclusive lock(*this);
  const size_t before = index_.size();
  read_logs();
  return index_.size() - before;
}

void Table::lookup(const uint8_t* keys, size_t n, double* logps, int32_t* tokens) const {
  const Shared lock(*this);
  size_t places[kBatch];
  for (size_t start = 0; start < n; start += kBatch) {
    const size_t stop = std::min(n, start + kBatch);
    for (size_t i = start; i < stop; ++i) {
      places[i - start] = index_.place(keys + 16 * i);
      index_.prefetch(places[i - start]);
    }
    for (size_t i = start; i < stop; ++i) {
      const Record* record = index_.find(keys + 16 * i, places[i - start]);
      logps[i] = record ? record->logp : std::numeric_limits<double>::quiet_NaN();
      tokens[i] = record ? record->tokens : 0;
    }
  }
}

bool Table::all_known(const std::vector<Record>& records) const {
  return std::all_of(records.begin(), records.end(), [&](const Record& record) {
    return index_.find(record.key, index_.place(record.key)) != nullptr;
  });
}

size_t Table::insert(const uint8_t* keys, const double* logps, const int32_t* tokens, size_t n) {
  // Copied first, so that the values that are checked are also those that are written. Other
  // threads may change the arrays.
  std::vector<Record> records(n);
  const uint32_t seed = crc32c(fingerprint_.data(), fingerprint_.size());
  for (size_t i = 0; i < n; ++i) {
    Record& record = records[i];
    std::memcpy(record.key, keys + 16 * i, 16);
    record.logp = logps[i];
    record.tokens = tokens[i];
    if (!std::isfinite(record.logp)) {
      throw std::invalid_argument("logps[" + std::to_string(i) + "] is " +
                                  std::to_string(record.logp) +
                                  ", but must be finite. Nothing was written.");
    }
    if (record.tokens < 1) {
      throw std::invalid_argument("tokens[" + std::to_string(i) + "] is " +
                                  std::to_string(record.tokens) +
                                  ", but must be at least 1. Nothing was written.");
    }
    record.crc = record_crc(record, seed);
  }

  const Exclusive lock(*this);
  check_open();
  if (read_only_) {
    throw std::invalid_argument("the table in " + folder_ +
                                " was opened with read_only=True. Open it without read_only to "
                                "insert.");
  }
  if (!intact()) {
    if (all_known(records)) return 0;
    take_log();
  }
  index_.reserve(index_.size() + n);
  std::vector<size_t> places(n);
  for (size_t i = 0; i < n; ++i) {
    places[i] = index_.place(records[i].key);
    index_.prefetch(places[i]);
  }
  std::vector<Record*> slots;
  slots.reserve(n);
  size_t count = 0;
  for (size_t i = 0; i < n; ++i) {
    bool added;
    Record* const slot = index_.insert(records[i], places[i], added);
    if (!added) continue;
    slots.push_back(slot);
    records[count++] = records[i];
  }
  if (count == 0) return 0;
  const int64_t start = end_;
  try {
    append(records, count);
  } catch (...) {
    const auto kept = static_cast<size_t>((end_ - start) / kUnit);
    for (size_t i = count; i > kept; --i) index_.take_back(slots[i - 1]);
    throw;
  }
  return count;
}

// Writes `count` records at `end_`. After an error the whole records that were written are kept,
// and `end_` includes them.
void Table::append(const std::vector<Record>& records, size_t count) {
  int code;
  const auto bytes = static_cast<int64_t>(count) * kUnit;
  const int64_t done = write_all(file_.fd(), records.data(), bytes, code);
  const int64_t whole = done / kUnit;
  Log& log = logs_[name_];
  if (whole > 0) {
    end_ += whole * kUnit;
    log.bad += log.late;
    log.late = 0;
    log.position = log.size = end_;
    log.last = records[static_cast<size_t>(whole) - 1];
  }
  if (done == bytes) return;
  // If truncation fails too, intact() is false, and the next insert truncates the log first.
  if (done % kUnit != 0 && ftruncate(file_.fd(), end_) != 0) log.torn_bytes = done % kUnit;
  throw FileError(code, path(name_),
                  std::to_string(whole) + " of " + std::to_string(count) +
                      " records were written and are kept");
}

// Takes a log for this process: the requested name, or else the lowest number without a writer. So
// the logs of crashed writers are used again.
void Table::take_log() {
  drop_log();
  Lock lock;
  if (asked_ && owner_ == getpid()) {  // in a forked child the name belongs to the parent
    const std::string name = *asked_ + ".log";
    File file = open_locked(path(name), true, lock);
    if (lock == Lock::busy) {
      throw FileError(EWOULDBLOCK, path(name),
                      "log " + *asked_ + " of " + folder_ +
                          " is being written by another process. Give each writer a different "
                          "name, or none");
    }
    if (lock == Lock::unsupported) {
      throw FileError(ENOLCK, path(name),
                      "this file system has no locks, so a named log is not safe from a second "
                      "writer. Omit the writer name");
    }
    return begin_log(std::move(file), name);
  }
  for (int number = 0; number < 100000; ++number) {
    char name[16];
    std::snprintf(name, sizeof(name), "%05d.log", number);
    File file;
    try {
      file = open_locked(path(name), true, lock);
    } catch (const FileError& error) {
      // A log of another user is skipped. A folder that is not writable is an error.
      if (error.code() != EACCES || access(path(name).c_str(), F_OK) != 0) throw;
      continue;
    }
    if (lock == Lock::taken) return begin_log(std::move(file), name);
    if (lock == Lock::unsupported) {
      const std::string unique = random_name();
      const int flags = O_RDWR | O_APPEND | O_CLOEXEC | O_CREAT | O_EXCL;
      file = File(open(path(unique).c_str(), flags, 0666));
      if (!file) throw FileError(errno, path(unique), "opening a log for writing");
      return begin_log(std::move(file), unique);
    }
  }
  throw FileError(EAGAIN, folder_, "all log numbers are taken by writers");
}

// Truncates a torn record of an earlier writer, writes the header if needed, and indexes the rest.
void Table::begin_log(File file, const std::string& name) {
  struct stat status;
  if (fstat(file.fd(), &status) != 0) throw FileError(errno, path(name), "opening a log");
  int64_t size = status.st_size;
  const int64_t whole = size / kUnit * kUnit;
  if (size != whole) {
    if (ftruncate(file.fd(), whole) != 0) throw FileError(errno, path(name), "truncating a log");
    size = whole;
  }
  if (size == 0) {
    const Header header = make_header(fingerprint_);
    int code;
    if (write_all(file.fd(), &header, sizeof(header), code) != sizeof(header)) {
      // The next writer that opens the log truncates the partial header.
      throw FileError(code, path(name), "no record was written");
    }
    size = sizeof(header);
  }
  read_log(file.fd(), path(name), fingerprint_, logs_[name], index_, repeats_);
  file_ = std::move(file);
  name_ = name;
  owner_ = getpid();
  end_ = size;
  folder_synced_ = false;
}

void Table::drop_log() {
  // Unlocks explicitly, because a forked child may hold a copy of the descriptor.
  if (own()) flock(file_.fd(), LOCK_UN);
  file_.close();
}

void Table::sync() {
  File copy;  // synced outside the lock, which would block inserts for milliseconds
  std::string synced;
  {
    const Shared lock(*this);
    check_open();
    if (!own()) return;
    synced = path(name_);
    copy = File(fcntl(file_.fd(), F_DUPFD_CLOEXEC, 0));
  }
  const bool folder_due = !folder_synced_.exchange(true);
#if !defined(__linux__)
  const auto fdatasync = fsync;
#endif
  try {
    if (!copy || fdatasync(copy.fd()) != 0) throw FileError(errno, synced, "syncing a log");
    if (folder_due) sync_folder(folder_);
  } catch (const FileError&) {
    folder_synced_ = false;
    throw;
  }
}

void Table::close() {
  {
    const Shared lock(*this);
    if (closed_) return;
  }
  try {
    sync();
  } catch (const FileError&) {
    release();
    throw;
  }
  release();
}

void Table::release() {
  const Exclusive lock(*this);
  closed_ = true;
  drop_log();
}

TableStats Table::stats() const {
  const Shared lock(*this);
  TableStats stats{};
  stats.records = static_cast<int64_t>(index_.size());
  stats.logs = static_cast<int64_t>(logs_.size());
  for (const auto& [name, log] : logs_) {
    stats.bytes += log.size;
    stats.bad += log.bad + log.late;
    stats.torn_bytes += log.torn_bytes;
  }
  stats.repeats = repeats_;
  return stats;
}

std::optional<std::string> Table::writer() const {
  const Shared lock(*this);
  if (!own()) return std::nullopt;
  return name_.substr(0, name_.size() - 4);
}

}  // namespace realign
