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

// An endless stream of new names by another process must not block a reader. Compactions change the
// names once or twice.
constexpr int kMostListings = 100;

void check_name(const std::string& name) {
  if (plain_name(name)) return;
  std::string shown = name.substr(0, 80);  // in a message, a control character acts on a terminal
  std::replace_if(shown.begin(), shown.end(), [](char c) { return c < ' ' || c > '~'; }, '?');
  throw std::invalid_argument("writer is '" + shown +
                              "'. Use letters, digits, '.', '_' and '-', without a leading dot.");
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
  if (lstat(folder.c_str(), &status) != 0 && errno == ENOENT) {
    if (read_only) {
      throw FileError(ENOENT, folder,
                      "there is no table to read. Check the path, or create the table with a "
                      "writer");
    }
    std::error_code error;
    std::filesystem::create_directories(folder, error);
    if (error) throw FileError(error.value(), folder, "creating the folder of a table");
  }
  const Folder here(folder_);
  int64_t bytes = 0;
  for (const std::string& name : here.logs()) {
    // A hole has a size, but no blocks.
    if (here.status(name, status) && S_ISREG(status.st_mode)) {
      bytes += std::min<int64_t>(status.st_size, int64_t{512} * status.st_blocks);
    }
  }
  index_.reserve(static_cast<size_t>(bytes / kUnit));
  read_logs(here);
  // A second writer with this name fails here instead of at its first insert.
  if (writer && !read_only && logs_.count(*writer + ".log") != 0 &&
      faccessat(here.fd(), (*writer + ".log").c_str(), W_OK, 0) == 0) {
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

// Whether this process's log is unchanged since its last write: not truncated, removed or linked.
bool Table::intact() const {
  struct stat status;
  return own() && fstat(file_.fd(), &status) == 0 && status.st_nlink == 1 &&
         status.st_size == end_;
}

void Table::check_open() const {
  if (closed_) {
    throw std::invalid_argument("the table in " + folder_ + " was closed. Open it again.");
  }
}

// A compaction puts its result in place before it removes the merged logs. Listing a folder is not
// atomic, however, and may see neither. The folder is therefore listed until it stays the same.
void Table::read_logs(const Folder& folder) {
  std::vector<std::string> names = folder.logs();
  for (int listings = 1;; ++listings) {
    for (const std::string& name : names) {
      if (own() && name == name_) continue;
      std::string refusal;
      const File file = open_to_read(folder, name, refusal);
      if (file && !read_log(file.fd(), path(name), fingerprint_, logs_[name], index_, repeats_)) {
        refusal = "a log of another table, written by another user";
      }
      if (refusal.empty()) {
        skipped_.erase(name);
      } else {
        logs_.erase(name);
        skipped_[name] = refusal;
      }
    }
    std::vector<std::string> again = folder.logs();
    if (again == names || listings == kMostListings) break;
    names = std::move(again);
  }
  const auto forget = [&](auto& known) {
    for (auto it = known.begin(); it != known.end();) {
      const bool gone = !std::binary_search(names.begin(), names.end(), it->first);
      it = gone && !(own() && it->first == name_) ? known.erase(it) : std::next(it);
    }
  };
  forget(logs_);
  forget(skipped_);
}

size_t Table::refresh() {
  const Exclusive lock(*this);
  const size_t before = index_.size();
  read_logs(Folder(folder_));
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
// the logs of crashed writers are used again. Files that another user may have made are left as
// they are, so they cannot stop this process.
void Table::take_log() {
  drop_log();
  const Folder folder(folder_);
  if (asked_ && owner_ == getpid()) return take_named(folder);  // the name belongs to the parent
  for (int number = 0; number < 100000; ++number) {
    char name[16];
    std::snprintf(name, sizeof(name), "%05d.log", number);
    std::string refusal;
    Lock lock = Lock::taken;
    File file = open_locked(folder, name, true, lock, refusal);
    if (!file || lock == Lock::busy) continue;
    if (lock == Lock::unsupported) break;
    if (begin_log(std::move(file), name)) return;
  }
  const std::string unique = random_name();
  File file = create_file(folder, unique);
  if (!file) throw FileError(EAGAIN, path(unique), "another process has created this log");
  begin_log(std::move(file), unique);
}

void Table::take_named(const Folder& folder) {
  const std::string name = *asked_ + ".log";
  std::string refusal;
  Lock lock = Lock::taken;
  File file = open_locked(folder, name, true, lock, refusal);
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
  if (file && begin_log(std::move(file), name)) return;
  if (refusal.empty()) refusal = "a file without the header of this table";
  throw FileError(EINVAL, path(name),
                  "log " + *asked_ + " is " + refusal + ", so this process does not write to it. "
                  "Give another writer name, or none");
}

// Truncates a torn record of an earlier writer, writes the header of an empty log, and indexes the
// records. Returns false without a change if the file has other content than a log of this table.
bool Table::begin_log(File file, const std::string& name) {
  struct stat status;
  if (fstat(file.fd(), &status) != 0) throw FileError(errno, path(name), "opening a log");
  int64_t size = status.st_size;
  if (size == 0) {
    const Header header = make_header(fingerprint_);
    int code;
    if (write_all(file.fd(), &header, sizeof(header), code) != sizeof(header)) {
      // Empty again, the next writer can use it. If this fails too, it takes another log.
      if (ftruncate(file.fd(), 0) != 0) code = errno;
      throw FileError(code, path(name), "no record was written");
    }
    size = sizeof(header);
  } else if (!has_header(file.fd(), path(name), fingerprint_)) {
    return false;
  }
  const int64_t whole = size / kUnit * kUnit;
  if (size != whole) {
    if (ftruncate(file.fd(), whole) != 0) throw FileError(errno, path(name), "truncating a log");
    size = whole;
  }
  read_log(file.fd(), path(name), fingerprint_, logs_[name], index_, repeats_);
  skipped_.erase(name);
  file_ = std::move(file);
  name_ = name;
  owner_ = getpid();
  end_ = size;
  folder_synced_ = false;
  return true;
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
    if (folder_due) Folder(folder_).sync();
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
  for (const auto& [name, refusal] : skipped_) {
    stats.skipped.push_back(path(name) + " is " + refusal);
  }
  return stats;
}

std::optional<std::string> Table::writer() const {
  const Shared lock(*this);
  if (!own()) return std::nullopt;
  return name_.substr(0, name_.size() - 4);
}

}  // namespace realign
