// The reader of *.routes.gz.
#include "io/routes.h"

#include <zlib.h>

#include <cerrno>
#include <cstring>
#include <memory>

#include <nlohmann/json.hpp>

#include <expar/error.h>

namespace expar::io {
namespace {

/// The header lists the lengths of all sequences; beyond this it is something else.
constexpr std::size_t kMaxHeader = std::size_t{16} << 20;
constexpr std::int64_t kMaxExtent = std::int64_t{1} << 32;

class GzipFile {
 public:
  explicit GzipFile(const std::string& path) : path_(path) {
    errno = 0;
    file_ = gzopen(path.c_str(), "rb");
    if (file_ == nullptr) {
      throw Error(ErrorCode::io, "cannot read " + path + ": " + std::strerror(errno == 0 ? ENOMEM : errno));
    }
    gzbuffer(file_, 1 << 17);
  }
  ~GzipFile() { gzclose(file_); }
  GzipFile(const GzipFile&) = delete;
  GzipFile& operator=(const GzipFile&) = delete;

  void read(void* to, std::size_t bytes) {
    constexpr std::size_t kPiece = std::size_t{1} << 30;
    auto* out = static_cast<char*>(to);
    while (bytes > 0) {
      const std::size_t piece = bytes < kPiece ? bytes : kPiece;
      const int got = gzread(file_, out, static_cast<unsigned>(piece));
      if (got <= 0) throw Error(ErrorCode::io, path_ + " is cut short or damaged");
      out += got;
      bytes -= static_cast<std::size_t>(got);
    }
  }

  std::string read_line() {
    std::string line;
    for (char c = 0; line.size() < kMaxHeader;) {
      read(&c, 1);
      if (c == '\n') return line;
      line += c;
    }
    throw Error(ErrorCode::bad_argument, path_ + " does not begin with a line of JSON");
  }

  void skip(std::int64_t bytes) {
    if (gzseek(file_, static_cast<z_off_t>(bytes), SEEK_CUR) < 0) {
      throw Error(ErrorCode::io, path_ + " is cut short or damaged");
    }
  }

 private:
  std::string path_;
  gzFile file_ = nullptr;
};

std::int64_t extent(const nlohmann::json& header, const char* key, const std::string& path) {
  const auto found = header.find(key);
  if (found == header.end() || !found->is_number_integer() || *found < 1 || *found > kMaxExtent) {
    throw Error(ErrorCode::bad_argument, path + ": its header has no whole number '" + key + "' from 1");
  }
  return found->get<std::int64_t>();
}

}  // namespace

Routes read_routes(const std::string& path, std::int64_t layer) {
  GzipFile file(path);
  const auto header = nlohmann::json::parse(file.read_line(), nullptr, false);
  if (!header.is_object()) throw Error(ErrorCode::bad_argument, path + " does not begin with a line of JSON");
  const std::int64_t layers = extent(header, "layers", path);
  Routes routes{.tokens = extent(header, "tokens", path),
                .topk = extent(header, "top_k", path),
                .experts = extent(header, "experts", path),
                .ids = {}};
  if (routes.experts > 256 || routes.topk > routes.experts) {
    throw Error(ErrorCode::bad_argument, path + ": " + std::to_string(routes.topk) + " of " +
                                             std::to_string(routes.experts) + " experts do not fit this format");
  }
  if (layer < 0 || layer >= layers) {
    throw Error(ErrorCode::bad_argument,
                path + " has no layer " + std::to_string(layer) + ", only 0 to " + std::to_string(layers - 1));
  }
  const std::int64_t slots = routes.tokens * routes.topk;
  std::vector<std::uint8_t> bytes(static_cast<std::size_t>(slots));
  file.skip(layer * slots);
  file.read(bytes.data(), bytes.size());
  routes.ids.assign(bytes.begin(), bytes.end());
  for (std::size_t i = 0; i < routes.ids.size(); ++i) {
    if (routes.ids[i] < routes.experts) continue;
    throw Error(ErrorCode::bad_argument,
                path + ": token " + std::to_string(static_cast<std::int64_t>(i) / routes.topk) + " has expert " +
                    std::to_string(routes.ids[i]) + ", not below " + std::to_string(routes.experts));
  }
  return routes;
}

}  // namespace expar::io
