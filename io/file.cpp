// Files of the operating system: open, mapped, locked, renamed.
#include "io/file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>

namespace expar::io {
namespace {

/// Linux moves no more than 2 GiB per call.
constexpr std::size_t kMaxPiece = std::size_t{1} << 30;

Error no_file(const std::string& path) { return {ErrorCode::io, path + " is not a regular file"}; }

int flush(int file) {
  while (fsync(file) != 0) {
    if (errno != EINTR) return errno;
  }
  return 0;
}

/// A new name is on disk once its directory is. File systems that cannot flush one say EINVAL.
int flush_directory_of(const std::string& path) {
  const std::string parent = std::filesystem::path(path).parent_path().string();
  const int directory = ::open(parent.empty() ? "." : parent.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (directory < 0) return errno == EACCES ? 0 : errno;  // one may write where one may not list
  const int reason = flush(directory);
  close(directory);
  return reason == EINVAL ? 0 : reason;
}

}  // namespace

Error cannot(const std::string& verb, const std::string& path, int reason) {
  return {ErrorCode::io, "cannot " + verb + " " + path + ": " + std::strerror(reason)};
}

MappedFile::MappedFile(const std::string& path) : path_(path) {
  // Without O_NONBLOCK a named pipe would wait here for its writer.
  file_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file_ < 0) throw cannot("read", path, errno);
  struct stat status {};
  if (fstat(file_, &status) != 0 || !S_ISREG(status.st_mode)) {
    close(file_);
    throw no_file(path);
  }
  size_ = static_cast<std::uint64_t>(status.st_size);
  if (size_ == 0) return;
  void* data = mmap(nullptr, static_cast<std::size_t>(size_), PROT_READ, MAP_PRIVATE, file_, 0);
  if (data == MAP_FAILED) {
    const int reason = errno;
    close(file_);
    throw cannot("map", path, reason);
  }
  data_ = static_cast<const std::byte*>(data);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) munmap(const_cast<std::byte*>(data_), static_cast<std::size_t>(size_));
  close(file_);
}

void MappedFile::read(std::uint64_t offset, std::span<std::byte> to) const {
  while (!to.empty()) {
    const ssize_t got = pread(file_, to.data(), std::min(to.size(), kMaxPiece), static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw cannot("read", path_, errno);
    if (got == 0) throw Error(ErrorCode::io, path_ + " was cut short while it was being read");
    to = to.subspan(static_cast<std::size_t>(got));
    offset += static_cast<std::uint64_t>(got);
  }
}

std::string read_text(const std::string& path, std::uint64_t limit) {
  const MappedFile file(path);
  if (file.size() > limit) {
    throw Error(ErrorCode::io, path + " has " + std::to_string(file.size()) + " bytes, more than the " +
                                   std::to_string(limit) + " that such a file may have");
  }
  std::string text(static_cast<std::size_t>(file.size()), '\0');
  file.read(0, std::as_writable_bytes(std::span(text)));
  return text;
}

AtomicFile::AtomicFile(const std::string& path) : shown_(path) {
  std::error_code error;
  const auto resolved = std::filesystem::weakly_canonical(path, error);
  target_ = error ? path : resolved.string();
  partial_ = target_ + ".partial";
  struct stat status {};
  if (stat(target_.c_str(), &status) == 0 && !S_ISREG(status.st_mode)) throw no_file(path);
  open();
}

void AtomicFile::open() {
  constexpr int kTries = 100;
  for (int i = 0; i < kTries; ++i) {
    file_ = ::open(partial_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0666);
    if (file_ < 0) throw cannot("write", shown_, errno);
    int reason = 0;
    if (flock(file_, LOCK_EX | LOCK_NB) != 0) reason = errno;
    struct stat mine {
    }, named{};
    const bool is_file = fstat(file_, &mine) == 0 && S_ISREG(mine.st_mode);
    const bool is_named =
        stat(partial_.c_str(), &named) == 0 && mine.st_dev == named.st_dev && mine.st_ino == named.st_ino;
    // Some file systems have no locks; there the caller is trusted to be alone.
    if (reason != EWOULDBLOCK && is_file && is_named) {
      if (ftruncate(file_, 0) == 0) return;
      reason = errno;
    }
    close(file_);
    file_ = -1;
    if (!is_file) throw no_file(partial_);
    if (reason == EWOULDBLOCK) throw Error(ErrorCode::io, "cannot write " + shown_ + ": another process is writing it");
    if (is_named) throw cannot("write", shown_, reason);
    // Its writer finished between open and lock: the name now stands for another file, or none.
  }
  throw Error(ErrorCode::io, "cannot write " + shown_ + ": others write it again and again");
}

AtomicFile::~AtomicFile() {
  if (file_ < 0) return;
  unlink(partial_.c_str());
  close(file_);
}

void AtomicFile::write(std::uint64_t offset, std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t put = pwrite(file_, bytes.data(), std::min(bytes.size(), kMaxPiece), static_cast<off_t>(offset));
    if (put < 0 && errno == EINTR) continue;
    if (put <= 0) throw cannot("write", shown_, put == 0 ? EIO : errno);
    bytes = bytes.subspan(static_cast<std::size_t>(put));
    offset += static_cast<std::uint64_t>(put);
  }
}

void AtomicFile::commit() {
  if (const int reason = flush(file_); reason != 0) throw cannot("write", shown_, reason);
  if (std::rename(partial_.c_str(), target_.c_str()) != 0) throw cannot("write", shown_, errno);
  close(file_);
  file_ = -1;
  if (const int reason = flush_directory_of(target_); reason != 0) throw cannot("write", shown_, reason);
}

void write_text(const std::string& path, std::string_view text) {
  AtomicFile file(path);
  file.write(0, std::as_bytes(std::span(text)));
  file.commit();
}

}  // namespace expar::io
