// Result files, error objects and the one line on stderr.
#include "cli/output.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "io/file.h"

namespace expar::cli {
namespace {

/// False for a terminal, a pipe, and for /dev/stdout even where that is a file: it has other text in it.
bool is_regular_or_new(const std::string& path) {
  if (path.starts_with("/dev/") || path.starts_with("/proc/")) return false;
  struct stat status {};
  return stat(path.c_str(), &status) != 0 ? errno == ENOENT : S_ISREG(status.st_mode);
}

/// The file behind symbolic links, so that they stay.
std::string resolved(const std::string& path) {
  std::error_code error;
  const auto target = std::filesystem::weakly_canonical(path, error);
  return error ? path : target.string();
}

void write_text(const std::string& path, const std::string& text, const std::string& shown) {
  errno = 0;
  std::ofstream file(path, std::ios::binary | std::ios::app);
  file << text;
  file.close();
  if (!file) throw io::cannot("write", shown, errno == 0 ? EIO : errno);
}

}  // namespace

std::string joined(const std::vector<std::string>& words) {
  std::string line;
  for (const std::string& word : words) line += (line.empty() ? "" : ", ") + word;
  return line;
}

void write_json(const std::string& path, const nlohmann::json& object) {
  // Text from outside (a path in a message) need not be UTF-8.
  write_file(path, object.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n");
}

void write_file(const std::string& path, const std::string& text) {
  if (!is_regular_or_new(path)) return write_text(path, text, path);
  const std::string target = resolved(path);
  const std::string fresh = target + "." + std::to_string(getpid()) + ".new";
  try {
    write_text(fresh, text, path);
    if (std::rename(fresh.c_str(), target.c_str()) != 0) throw io::cannot("write", path, errno);
  } catch (...) {
    unlink(fresh.c_str());
    throw;
  }
}

void check_writable(const std::string& path) {
  struct stat status {};
  if (stat(path.c_str(), &status) == 0 && S_ISDIR(status.st_mode)) {
    throw io::cannot("write", path, EISDIR);
  }
  if (!is_regular_or_new(path)) {
    if (access(path.c_str(), W_OK) != 0) throw io::cannot("write", path, errno);
    return;
  }
  const std::filesystem::path folder = std::filesystem::path(resolved(path)).parent_path();
  if (access(folder.empty() ? "." : folder.c_str(), W_OK | X_OK) != 0) {
    throw io::cannot("write", path, errno);
  }
}

nlohmann::json to_json(const Error& error) {
  return {{"error",
           {{"code", name(error.code())},
            {"rank", error.rank()},
            {"peer", error.peer()},
            {"operation", error.operation()},
            {"message", error.message()}}}};
}

void print_error(const Error& error) {
  std::string line = std::string("expar: ") + error.what();
  for (char& letter : line) {
    if (letter == '\n' || letter == '\r') letter = ' ';
  }
  line += '\n';
  // One write, so that lines of several processes do not mix.
  std::fflush(stdout);
  std::fwrite(line.data(), 1, line.size(), stderr);
}

}  // namespace expar::cli
