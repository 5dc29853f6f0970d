// Files in the folder of a table. Other users may write to the folder. So nothing here follows a
// link, waits for a pipe, or writes to a file of another user.
#pragma once

#include <dirent.h>
#include <sys/stat.h>
#include <sys/types.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace realign {

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
  void release() { fd_ = -1; }  // another object closes it
  int fd() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }

 private:
  int fd_ = -1;
};

// The open folder of a table, for one thread. Names are relative to the open folder, so a link that
// replaces its path later has no effect.
class Folder {
 public:
  // Throws FileError if the path is absent, not a folder, or a symbolic link. Its parents may be
  // links.
  explicit Folder(const std::string& path);

  int fd() const { return dirfd(stream_.get()); }
  std::string path(const std::string& name) const { return path_ + "/" + name; }

  // Names of the logs, sorted. A name with other characters than the program uses is no log.
  std::vector<std::string> logs() const;

  // The state of a file, without following a link. Returns false if it is absent.
  bool status(const std::string& name, struct stat& status) const;

  void remove(const std::string& name) const;
  void sync() const;

 private:
  struct Close {
    void operator()(DIR* stream) const { closedir(stream); }
  };

  std::string path_;
  std::unique_ptr<DIR, Close> stream_;
};

// Whether a name consists of letters, digits, '.', '_' and '-', without a leading dot.
bool plain_name(const std::string& name);

// Whether only this user can have put content into the file: own, and with one hard link. A second
// link may be a file outside of the folder.
bool own_file(const struct stat& status);

// Opens for reading. The File is empty if the log is absent, or if it is not used. Then `refusal`
// has the reason: a link, a pipe, a folder, a device, or no permission.
File open_to_read(const Folder& folder, const std::string& name, std::string& refusal);

enum class Lock { taken, busy, unsupported };

// Opens for appending, with the lock that marks the writer. If the file is absent, creates it if
// `create` is set, and else returns an empty File. Refuses also a file of another user and a file
// with several hard links.
File open_locked(const Folder& folder, const std::string& name, bool create, Lock& lock,
                 std::string& refusal);

// Creates a file for appending. The File is empty if the name exists.
File create_file(const Folder& folder, const std::string& name);

// Writes `size` bytes and returns the number of bytes written. Does not throw: if the number is
// smaller than `size`, `code` is the errno.
int64_t write_all(int fd, const void* data, int64_t size, int& code);

}  // namespace realign
