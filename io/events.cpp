// The writer of event files: protocol buffers by hand, in TFRecord frames.
#include "io/events.h"

#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <bit>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>

#include <expar/error.h>

#include "io/file.h"

namespace expar::io {
namespace {

static_assert(std::endian::native == std::endian::little, "event files are little-endian, and so are numbers here");

// ---- the wire format of protocol buffers

enum class Wire : std::uint8_t { varint = 0, fixed64 = 1, bytes = 2, fixed32 = 5 };

template <class T>
void put_raw(std::string& to, T value) {
  char raw[sizeof value];
  std::memcpy(raw, &value, sizeof value);
  to.append(raw, sizeof raw);
}

void put_varint(std::string& to, std::uint64_t value) {
  for (; value >= 0x80; value >>= 7) to += static_cast<char>(value | 0x80);
  to += static_cast<char>(value);
}

void put_key(std::string& to, unsigned field, Wire wire) { put_varint(to, field << 3 | static_cast<unsigned>(wire)); }

void put(std::string& to, unsigned field, double value) {
  put_key(to, field, Wire::fixed64);
  put_raw(to, value);
}

void put(std::string& to, unsigned field, float value) {
  put_key(to, field, Wire::fixed32);
  put_raw(to, value);
}

void put(std::string& to, unsigned field, std::int64_t value) {
  put_key(to, field, Wire::varint);
  put_varint(to, static_cast<std::uint64_t>(value));
}

void put(std::string& to, unsigned field, std::string_view bytes) {
  put_key(to, field, Wire::bytes);
  put_varint(to, bytes.size());
  to += bytes;
}

void put(std::string& to, unsigned field, const std::vector<double>& values) {
  put(to, field, std::string_view(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(double)));
}

// Numbers of fields in tensorflow/core/util/event.proto and tsl/protobuf/histogram.proto, summary.proto.
constexpr unsigned kEventWallTime = 1, kEventStep = 2, kEventFileVersion = 3, kEventSummary = 5;
constexpr unsigned kSummaryValue = 1;
constexpr unsigned kValueTag = 1, kValueNumber = 2, kValueHistogram = 5;
constexpr unsigned kMin = 1, kMax = 2, kNum = 3, kSum = 4, kSumSquares = 5, kBucketLimit = 6, kBucket = 7;

std::string begin_event() {
  const std::chrono::duration<double> now = std::chrono::system_clock::now().time_since_epoch();
  std::string bytes;
  put(bytes, kEventWallTime, now.count());
  return bytes;
}

// ---- frames

constexpr std::array<std::uint32_t, 256> kCrcOfByte = [] {
  std::array<std::uint32_t, 256> table{};
  for (std::uint32_t byte = 0; byte < table.size(); ++byte) {
    std::uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ ((crc & 1) != 0 ? 0x82f63b78U : 0U);
    table[byte] = crc;
  }
  return table;
}();

/// TFRecord stores checksums like this because a checksum of bytes that hold their own checksum is a weak one.
std::uint32_t masked_crc(std::string_view bytes) { return std::rotr(crc32c(bytes), 15) + 0xa282ead8U; }

/// uint64 length, its checksum, the bytes, their checksum.
std::string framed(const std::string& bytes) {
  std::string frame;
  put_raw(frame, static_cast<std::uint64_t>(bytes.size()));
  put_raw(frame, masked_crc(frame));
  frame += bytes;
  put_raw(frame, masked_crc(bytes));
  return frame;
}

// ---- files

std::string host_name() {
  char name[256] = {};
  if (gethostname(name, sizeof name - 1) != 0 || name[0] == '\0') return "localhost";
  return name;
}

/// A file that was not there before; `path` becomes its name.
int create_file(const std::string& directory, std::string& path) {
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(now).count();
  const std::string stem = (std::filesystem::path(directory) / "events.out.tfevents.").string() +
                           std::to_string(seconds) + "." + host_name() + "." + std::to_string(getpid()) + ".";
  for (int n = 0;; ++n) {
    path = stem + std::to_string(n);
    const int file = open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (file >= 0) return file;
    if (errno != EEXIST) throw cannot("write", path, errno);
  }
}

}  // namespace

std::uint32_t crc32c(std::string_view bytes) {
  std::uint32_t crc = ~0U;
  for (const char c : bytes) crc = crc >> 8 ^ kCrcOfByte[(crc ^ static_cast<unsigned char>(c)) & 0xff];
  return ~crc;
}

Histogram histogram_of_counts(std::span<const std::int64_t> counts) {
  Histogram result;
  result.max = static_cast<double>(counts.size());
  for (std::size_t i = 0; i < counts.size(); ++i) {
    const auto number = static_cast<double>(i);
    const auto count = static_cast<double>(counts[i]);
    result.num += count;
    result.sum += number * count;
    result.sum_squares += number * number * count;
    result.bucket_limit.push_back(number + 1);
    result.bucket.push_back(count);
  }
  return result;
}

void Summary::scalar(std::string_view tag, float value) {
  std::string bytes;
  put(bytes, kValueNumber, value);
  add(tag, bytes);
}

void Summary::histogram(std::string_view tag, const Histogram& histogram) {
  std::string bytes;
  put(bytes, kMin, histogram.min);
  put(bytes, kMax, histogram.max);
  put(bytes, kNum, histogram.num);
  put(bytes, kSum, histogram.sum);
  put(bytes, kSumSquares, histogram.sum_squares);
  put(bytes, kBucketLimit, histogram.bucket_limit);
  put(bytes, kBucket, histogram.bucket);
  std::string value;
  put(value, kValueHistogram, std::string_view(bytes));
  add(tag, value);
}

void Summary::add(std::string_view tag, std::string_view value) {
  std::string bytes;
  put(bytes, kValueTag, tag);
  bytes += value;
  put(bytes_, kSummaryValue, std::string_view(bytes));
}

void prepare_log_directory(const std::string& directory) {
  std::error_code error;
  std::filesystem::create_directories(directory, error);
  if (error) throw cannot("make the directory", directory, error.value());
  if (!std::filesystem::is_directory(directory, error)) throw cannot("make the directory", directory, ENOTDIR);
  // Permissions do not tell everything, so try.
  const std::string probe = (std::filesystem::path(directory) / (".expar." + std::to_string(getpid()))).string();
  const int file = open(probe.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0666);
  if (file < 0) throw cannot("write in", directory, errno);
  close(file);
  unlink(probe.c_str());
}

EventWriter::EventWriter(const std::string& directory) {
  prepare_log_directory(directory);
  file_ = create_file(directory, path_);
  try {
    std::string first = begin_event();
    put(first, kEventFileVersion, std::string_view("brain.Event:2"));
    append(first);
  } catch (...) {
    close(file_);
    throw;
  }
}

EventWriter::~EventWriter() { close(file_); }

void EventWriter::write(std::int64_t step, const Summary& summary) {
  std::string bytes = begin_event();
  put(bytes, kEventStep, step);
  put(bytes, kEventSummary, std::string_view(summary.bytes()));
  append(bytes);
}

void EventWriter::append(const std::string& event) {
  const std::string frame = framed(event);
  std::string_view rest = frame;
  while (!rest.empty()) {
    const ssize_t written = ::write(file_, rest.data(), rest.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) throw cannot("write", path_, errno);
    rest.remove_prefix(static_cast<std::size_t>(written));
  }
}

}  // namespace expar::io
