#include "refcache/table_log.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <utility>

#include "refcache/crc32c.h"

namespace realign {
namespace {

constexpr char kMagic[8] = {'R', 'A', 'L', 'N', 'R', 'E', 'F', '1'};
constexpr uint32_t kVersion = 1;
constexpr int64_t kUnit = sizeof(Record);
constexpr int64_t kChunk = 1 << 15;  // records read at once: 1 MiB
constexpr int64_t kBatch = 64;       // records whose slots are prefetched together

std::string remedy(int code) {
  switch (code) {
    case ENOSPC:
    case EDQUOT:
      return ". Free space on that file system, then insert again";
    case EFBIG:
      return ". Raise the limit on file sizes (ulimit -f), then insert again";
    case EACCES:
    case EPERM:
    case EROFS:
      return ". Choose a writable folder, or make this one writable";
    case ENOTDIR:
    case EEXIST:
      return ". A table is a folder. Choose another path";
    case EMFILE:
      return ". Raise the limit on open files (ulimit -n)";
    default:
      return "";
  }
}

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

// Whether the header is intact. Throws for the header of another table or version.
bool check_header(const Record& raw, const std::string& path, const Fingerprint& fingerprint) {
  Header header;
  std::memcpy(&header, &raw, sizeof(header));
  if (crc32c(&header, sizeof(header) - 4) != header.crc ||
      std::memcmp(header.magic, kMagic, sizeof(kMagic)) != 0) {
    return false;
  }
  if (header.version != kVersion) {
    throw std::invalid_argument(path + " has version " + std::to_string(header.version) +
                                " of the format, but this version of realign supports only " +
                                std::to_string(kVersion) +
                                ". Update realign, or use another folder.");
  }
  if (header.fingerprint != fingerprint) {
    throw std::invalid_argument(
        path + " belongs to the table with fingerprint " + hex(header.fingerprint) + ", not " +
        hex(fingerprint) +
        ". Its values are for another model or data. Use another folder, or delete this one.");
  }
  return true;
}

}  // namespace

FileError::FileError(int code, const std::string& path, const std::string& what)
    : std::runtime_error(what + ": " + std::strerror(code) + remedy(code)),
      code_(code),
      path_(path) {}

File& File::operator=(File&& other) noexcept {
  std::swap(fd_, other.fd_);
  return *this;
}

void File::close() {
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
}

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

void read_log(int fd, const std::string& path, const Fingerprint& fingerprint, Log& log,
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
  if (log.position == end) return;

  const uint32_t seed = crc32c(fingerprint.data(), fingerprint.size());
  std::vector<Record> chunk(static_cast<size_t>(std::min(kChunk, (end - log.position) / kUnit)));
  for (int64_t at = log.position; at < end;) {
    const auto room = static_cast<int64_t>(chunk.size()) * kUnit;
    const int64_t got = read_at(fd, path, chunk.data(), std::min(room, end - at), at) / kUnit;
    if (got == 0) break;
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
        if (is_header ? !check_header(record, path, fingerprint) : !passed[i - start]) {
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
  }
}

std::vector<std::string> list_logs(const std::string& folder) {
  DIR* stream = opendir(folder.c_str());
  if (stream == nullptr) throw FileError(errno, folder, "listing a table");
  std::vector<std::string> names;
  int code = 0;
  for (;;) {
    errno = 0;
    const dirent* entry = readdir(stream);
    if (entry == nullptr) {
      code = errno;
      break;
    }
    const std::string name(entry->d_name);
    if (name.size() > 4 && name[0] != '.' && name.compare(name.size() - 4, 4, ".log") == 0) {
      names.push_back(name);
    }
  }
  closedir(stream);
  if (code != 0) throw FileError(code, folder, "listing a table");
  std::sort(names.begin(), names.end());
  return names;
}

File open_to_read(const std::string& path) {
  int fd;
  do {
    fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  } while (fd < 0 && errno == EINTR);
  if (fd < 0 && errno != ENOENT && errno != ESTALE) throw FileError(errno, path, "opening a log");
  return File(fd);
}

File open_locked(const std::string& path, bool create, Lock& lock) {
  for (;;) {
    const int flags = O_RDWR | O_APPEND | O_CLOEXEC | (create ? O_CREAT : 0);
    File file(open(path.c_str(), flags, 0666));
    if (!file) {
      if (errno == EINTR) continue;
      if (errno == ENOENT && !create) return file;
      throw FileError(errno, path, "opening a log for writing");
    }
    int result;
    do {
      result = flock(file.fd(), LOCK_EX | LOCK_NB);
    } while (result != 0 && errno == EINTR);
    lock = Lock::taken;
    if (result != 0) {
      if (errno == EWOULDBLOCK) {
        lock = Lock::busy;
      } else if (errno == ENOLCK || errno == ENOSYS || errno == EOPNOTSUPP) {
        lock = Lock::unsupported;
      } else {
        throw FileError(errno, path, "locking a log");
      }
      return file;
    }
    // A compaction may have removed the file between the two calls. Then it is opened again.
    struct stat held, named;
    if (fstat(file.fd(), &held) != 0) throw FileError(errno, path, "locking a log");
    if (stat(path.c_str(), &named) == 0 && held.st_dev == named.st_dev &&
        held.st_ino == named.st_ino) {
      return file;
    }
  }
}

int64_t write_all(int fd, const void* data, int64_t size, int& code) {
  int64_t done = 0;
  code = 0;
  while (done < size) {
    const ssize_t put =
        write(fd, static_cast<const char*>(data) + done, static_cast<size_t>(size - done));
    if (put > 0) {
      done += put;
    } else if (put == 0 || errno != EINTR) {
      code = put == 0 ? ENOSPC : errno;
      break;
    }
  }
  return done;
}

void sync_folder(const std::string& folder) {
  const File file(open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!file || fsync(file.fd()) != 0) throw FileError(errno, folder, "syncing a table");
}

}  // namespace realign
