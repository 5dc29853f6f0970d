#include "refcache/table_files.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

namespace realign {
namespace {

// A pipe, or a file with a lease, would block without O_NONBLOCK. A terminal could become the
// controlling one without O_NOCTTY.
constexpr int kCareful = O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC | O_NOCTTY;
// Another process may replace a file between its opening and its lock. Compactions do so a few
// times a second at most.
constexpr int kMostTries = 100;

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

std::string unsuitable(mode_t mode) {
  if (S_ISREG(mode)) return "";
  if (S_ISLNK(mode)) return "a symbolic link";
  if (S_ISFIFO(mode)) return "a pipe";
  if (S_ISDIR(mode)) return "a folder";
  return S_ISSOCK(mode) ? "a socket" : "a device";
}

// Opens an existing file of the folder, see open_to_read.
File open_file(const Folder& folder, const std::string& name, int flags, std::string& refusal) {
  int fd;
  do {
    fd = openat(folder.fd(), name.c_str(), flags | kCareful);
  } while (fd < 0 && errno == EINTR);
  File file(fd);
  struct stat status;
  refusal.clear();
  if (file) {
    if (fstat(fd, &status) != 0) throw FileError(errno, folder.path(name), "opening a log");
    refusal = unsuitable(status.st_mode);
    return refusal.empty() ? std::move(file) : File();
  }
  switch (errno) {
    case ENOENT:
    case ESTALE:
      return File();
    case EACCES:
    case EPERM:
      refusal = "not accessible to this user";
      return File();
    case EWOULDBLOCK:
      refusal = "leased by another process";
      return File();
    case ELOOP:   // a link
    case EMLINK:  // a link, on FreeBSD
    case ENXIO:   // a socket
    case EISDIR:
      if (folder.status(name, status)) refusal = unsuitable(status.st_mode);
      return File();
    default:
      throw FileError(errno, folder.path(name), "opening a log");
  }
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

Folder::Folder(const std::string& path) : path_(path) {
  File file(open(path.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
  if (file) stream_.reset(fdopendir(file.fd()));
  if (stream_) {
    file.release();
    return;
  }
  const int code = errno;
  struct stat status;
  if (lstat(path.c_str(), &status) == 0 && S_ISLNK(status.st_mode)) {
    throw FileError(ENOTDIR, path,
                    "the folder of a table is a symbolic link, which may lead anywhere. Remove it");
  }
  throw FileError(code, path, "opening a table");
}

std::vector<std::string> Folder::logs() const {
  rewinddir(stream_.get());
  std::vector<std::string> names;
  int code = 0;
  for (;;) {
    errno = 0;
    const dirent* entry = readdir(stream_.get());
    if (entry == nullptr) {
      code = errno;
      break;
    }
    const std::string name(entry->d_name);
    const bool is_log = name.size() > 4 && name.compare(name.size() - 4, 4, ".log") == 0;
    if (is_log && plain_name(name[0] == '+' ? name.substr(1) : name)) names.push_back(name);
  }
  if (code != 0 && code != ENOENT) {  // ENOENT: the folder was removed
    throw FileError(code, path_, "listing a table");
  }
  std::sort(names.begin(), names.end());
  return names;
}

bool Folder::status(const std::string& name, struct stat& status) const {
  if (fstatat(fd(), name.c_str(), &status, AT_SYMLINK_NOFOLLOW) == 0) return true;
  if (errno == ENOENT || errno == ESTALE) return false;
  throw FileError(errno, path(name), "opening a log");
}

void Folder::remove(const std::string& name) const {
  if (unlinkat(fd(), name.c_str(), 0) != 0) {
    throw FileError(errno, path(name), "removing a merged log");
  }
}

void Folder::sync() const {
  if (fsync(fd()) != 0) throw FileError(errno, path_, "syncing a table");
}

bool plain_name(const std::string& name) {
  static const char allowed[] =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-";
  return !name.empty() && name[0] != '.' && name.find_first_not_of(allowed) == std::string::npos;
}

bool own_file(const struct stat& status) {
  return status.st_nlink == 1 && status.st_uid == geteuid();
}

File open_to_read(const Folder& folder, const std::string& name, std::string& refusal) {
  return open_file(folder, name, O_RDONLY, refusal);
}

File create_file(const Folder& folder, const std::string& name) {
  const int flags = O_RDWR | O_APPEND | O_CREAT | O_EXCL | kCareful;
  int fd;
  do {
    fd = openat(folder.fd(), name.c_str(), flags, 0666);
  } while (fd < 0 && errno == EINTR);
  if (fd < 0 && errno != EEXIST) {
    throw FileError(errno, folder.path(name), "opening a log for writing");
  }
  return File(fd);
}

File open_locked(const Folder& folder, const std::string& name, bool create, Lock& lock,
                 std::string& refusal) {
  for (int tries = 0; tries < kMostTries; ++tries) {
    File file = open_file(folder, name, O_RDWR | O_APPEND, refusal);
    struct stat held, named;
    if (file) {
      if (fstat(file.fd(), &held) != 0) throw FileError(errno, folder.path(name), "opening a log");
      if (held.st_nlink == 0) continue;
      if (!own_file(held)) {
        refusal = held.st_nlink > 1 ? "a file with several hard links" : "a log of another user";
        return File();
      }
    } else {
      if (!create || !refusal.empty()) return file;
      file = create_file(folder, name);
      if (!file) continue;
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
        throw FileError(errno, folder.path(name), "locking a log");
      }
      return file;
    }
    // A compaction may have removed the file between the two calls. Then it is opened again.
    if (fstat(file.fd(), &held) != 0) throw FileError(errno, folder.path(name), "locking a log");
    if (folder.status(name, named) && held.st_dev == named.st_dev && held.st_ino == named.st_ino) {
      return file;
    }
  }
  refusal = "a log that another process replaces all the time";
  return File();
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

}  // namespace realign
