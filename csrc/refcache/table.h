// A table of reference log-probs by key: a folder of append-only logs, one per writer, with an
// index in memory. Records that fail their check are never returned, because a wrong value is worse
// than a missing one.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <string>
#include <vector>

#include "refcache/table_index.h"
#include "refcache/table_log.h"

namespace realign {

struct TableStats {
  int64_t records;     // keys in the index
  int64_t logs, bytes;
  int64_t bad;         // records and headers that failed their check
  int64_t torn_bytes;  // bytes after the last whole record of a log
  Repeats repeats;     // of all records that this object has read

  // The logs that are not read, as "PATH is REASON".
  std::vector<std::string> skipped;
};

// Any number of threads may use one Table, and any number of processes one folder. A forked child
// may use the parent's table if no other thread of the parent was in a call at the fork. Throws
// FileError if a system call fails, and std::invalid_argument if an argument is invalid.
class Table {
 public:
  Table(const std::string& folder, const Fingerprint& fingerprint,
        const std::optional<std::string>& writer = std::nullopt, bool read_only = false);
  ~Table();
  Table(const Table&) = delete;
  Table& operator=(const Table&) = delete;

  // Absent keys get NaN and 0 tokens.
  void lookup(const uint8_t* keys,  // (n, 16)
              size_t n,
              double* logps,           // (n,)
              int32_t* tokens) const;  // (n,)

  // Appends the records with new keys in one write, and returns their number. On return they are
  // safe from a crash of the process, and after sync() from a crash of the machine.
  size_t insert(const uint8_t* keys,    // (n, 16)
                const double* logps,    // (n,) finite
                const int32_t* tokens,  // (n,) at least 1
                size_t n);

  // Reads new records of other writers, and returns the number of new keys.
  size_t refresh();

  void sync();
  void close();

  TableStats stats() const;
  size_t size() const { return static_cast<size_t>(stats().records); }
  // Name of the log that this process writes. Empty before the first insert.
  std::optional<std::string> writer() const;

 private:
  class Shared;
  class Exclusive;

  void check_open() const;
  bool own() const;
  bool intact() const;
  std::string path(const std::string& file) const { return folder_ + "/" + file; }
  void read_logs(const Folder& folder);
  bool all_known(const std::vector<Record>& records) const;
  void take_log();
  void take_named(const Folder& folder);
  bool begin_log(File file, const std::string& name);
  void drop_log();
  void append(const std::vector<Record>& records, size_t count);
  void release();

  const std::string folder_;
  const Fingerprint fingerprint_;
  const std::optional<std::string> asked_;
  const bool read_only_;

  // A waiting writer holds the gate, so a stream of lookups cannot block it forever.
  mutable std::mutex gate_;
  mutable std::shared_mutex mutex_;
  bool closed_ = false;
  Index index_;
  std::map<std::string, Log> logs_;  // by file name
  std::map<std::string, std::string> skipped_;  // reasons, by file name
  Repeats repeats_;

  File file_;           // this process's log
  std::string name_;    // file name of this log
  pid_t owner_;         // process that opened the log. A forked child must not write to it.
  int64_t end_ = 0;     // end of the whole records in the log
  std::atomic<bool> folder_synced_{false};
};

struct Compaction {
  int64_t records = 0;  // in the new log
  int64_t bytes_before = 0, bytes_after = 0;
  int64_t logs_merged = 0, logs_in_use = 0;
  int64_t logs_skipped = 0;  // of other users, and files that are no logs
  int64_t bad_dropped = 0, torn_bytes = 0, duplicates_dropped = 0;
};

// Merges this user's logs without a live writer into one. A crash at any point loses no records,
// because the result is on the disk before the first of the merged logs is removed.
Compaction compact_table(const std::string& folder, const Fingerprint& fingerprint);

}  // namespace realign
