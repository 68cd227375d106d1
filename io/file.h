// Files as the formats need them: mapped for reading, and replaced as a whole or not at all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include <expar/error.h>

namespace expar::io {

/// io: "cannot write /tmp/a: No space left on device", from an errno.
Error cannot(const std::string& verb, const std::string& path, int reason);

/// A regular file, open for reading. Its mapping costs address space only: nothing is read until it is touched.
/// The file may be replaced (renamed over) meanwhile, but must not be cut short: what touches bytes() then dies of
/// SIGBUS, while read() throws.
class MappedFile {
 public:
  /// Throws Error: io (cannot be read, or is no regular file).
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::string& path() const { return path_; }
  std::uint64_t size() const { return size_; }
  std::span<const std::byte> bytes() const { return {data_, static_cast<std::size_t>(size_)}; }
  /// Copies [offset, offset + to.size()) of the file. Throws Error: io (cannot be read, was cut short).
  void read(std::uint64_t offset, std::span<std::byte> to) const;

 private:
  std::string path_;
  int file_ = -1;
  std::uint64_t size_ = 0;
  const std::byte* data_ = nullptr;
};

/// The whole of a file of text. Throws Error: io (cannot be read, is larger than `limit` bytes).
std::string read_text(const std::string& path, std::uint64_t limit);

/// A file that appears under its name complete and on disk, or not at all: a full disk, an exception or a kill leave
/// the former file as it was. It is written as "<path>.partial" beside it; what a kill leaves there is taken over by
/// the next writer, and two writers at once get an error, not a mixture.
class AtomicFile {
 public:
  /// Throws Error: io (cannot be written, is no regular file, is being written by another).
  explicit AtomicFile(const std::string& path);
  /// Without commit() nothing happened.
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  /// Throws Error: io.
  void write(std::uint64_t offset, std::span<const std::byte> bytes);
  /// Flushes to the disk and takes the name. Throws Error: io.
  void commit();

 private:
  void open();

  std::string shown_;    // the path as it was given
  std::string target_;   // behind symbolic links, so that they stay
  std::string partial_;  // what is written
  int file_ = -1;
};

/// The same for text that is at hand.
void write_text(const std::string& path, std::string_view text);

}  // namespace expar::io
