// A directory for the files of one test, and what an operation on them says.
#pragma once

#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <string>

#include <expar/error.h>
#include <gtest/gtest.h>

namespace expar {

class Directory {
 public:
  Directory() {
    std::string pattern = testing::TempDir() + "expar_files_XXXXXX";
    path_ = mkdtemp(pattern.data());
  }
  ~Directory() { std::filesystem::remove_all(path_); }
  Directory(const Directory&) = delete;
  Directory& operator=(const Directory&) = delete;

  std::string operator/(const std::string& name) const { return path_ + "/" + name; }
  const std::string& path() const { return path_; }
  /// Writes a file; returns its path.
  std::string put(const std::string& name, const std::string& bytes) const {
    std::ofstream(*this / name, std::ios::binary) << bytes;
    return *this / name;
  }
  std::string get(const std::string& name) const {
    std::ifstream file(*this / name, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  std::size_t count() const {
    const auto files = std::filesystem::directory_iterator(path_);
    return static_cast<std::size_t>(std::distance(begin(files), end(files)));
  }

 private:
  std::string path_;
};

/// "io: ..." as it was thrown, with the directory's path left out; "accepted" if nothing was.
inline std::string refusal_of(const Directory& directory, const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    std::string text = std::string(name(error.code())) + ": " + error.message();
    const std::string prefix = directory.path() + "/";
    for (std::size_t at = 0; (at = text.find(prefix, at)) != std::string::npos;) text.erase(at, prefix.size());
    return text;
  }
  return "accepted";
}

/// A safetensors file of a header as it stands and bytes after it.
inline std::string file_of(const std::string& header, std::size_t data_bytes) {
  std::string file;
  for (std::size_t i = 0; i < 8; ++i) file += static_cast<char>(header.size() >> (8 * i));
  return file + header + std::string(data_bytes, 'x');
}

}  // namespace expar
