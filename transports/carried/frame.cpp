// Words and bytes, written one after another and read back within their bounds.
#include "transports/carried/frame.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "transports/shared/board.h"

namespace expar::carried {
namespace {

/// "expar", version 1; the kind is added. The lowest byte is the kind's.
constexpr std::uint64_t kFirstWord = 0x6578706172'0001'00;
constexpr std::uint64_t kKinds = 4;

[[noreturn]] void refuse(const std::string& what) { throw Error(ErrorCode::internal, what); }

class Writer {
 public:
  explicit Writer(FrameKind kind, std::size_t bytes = 0) {
    frame_.reserve(16 * sizeof(std::uint64_t) + bytes);
    word(kFirstWord + static_cast<std::uint64_t>(kind));
  }
  Writer& word(std::uint64_t value) { return bytes(std::as_bytes(std::span(&value, 1))); }
  Writer& bytes(std::span<const std::byte> bytes) {
    frame_.insert(frame_.end(), bytes.begin(), bytes.end());
    return *this;
  }
  Writer& text(std::string_view text) { return bytes(std::as_bytes(std::span(text))); }
  Frame frame() && { return std::move(frame_); }

 private:
  Frame frame_;
};

class Reader {
 public:
  /// Stands behind the first word.
  explicit Reader(std::span<const std::byte> frame) : rest_(frame) { word(); }

  std::uint64_t word() {
    std::uint64_t value = 0;
    const auto from = bytes(sizeof value);
    std::memcpy(&value, from.data(), sizeof value);
    return value;
  }
  std::span<const std::byte> bytes(std::size_t count) {
    if (count > rest_.size()) refuse("it ends " + std::to_string(count - rest_.size()) + " bytes too early");
    const auto taken = rest_.first(count);
    rest_ = rest_.subspan(count);
    return taken;
  }
  std::string_view text(std::size_t count) {
    const auto from = bytes(count);
    return {reinterpret_cast<const char*>(from.data()), from.size()};
  }
  std::size_t left() const { return rest_.size(); }
  void end() const {
    if (!rest_.empty()) refuse("it has " + std::to_string(rest_.size()) + " bytes too many");
  }

 private:
  std::span<const std::byte> rest_;
};

}  // namespace

Frame line_frame(const ShownLine& shown) {
  Writer writer(FrameKind::line, shown.text.size());
  writer.word(static_cast<std::uint64_t>(shown.index)).word(shown.line.sequence);
  for (const std::uint64_t word : shown.line.words) writer.word(word);
  return std::move(writer.word(shown.text.size()).text(shown.text)).frame();
}

Frame message_frame(std::uint64_t tag, std::span<const std::byte> bytes) {
  Writer writer(FrameKind::message, bytes.size());
  return std::move(writer.word(tag).word(bytes.size()).bytes(bytes)).frame();
}

Frame cause_frame(const Error& cause) {
  Writer writer(FrameKind::cause, cause.operation().size() + cause.message().size());
  writer.word(static_cast<std::uint64_t>(cause.code()));
  writer.word(static_cast<std::uint64_t>(cause.rank())).word(static_cast<std::uint64_t>(cause.peer()));
  writer.word(cause.operation().size()).word(cause.message().size());
  return std::move(writer.text(cause.operation()).text(cause.message())).frame();
}

Frame bye_frame(bool in_exception) {
  Writer writer(FrameKind::bye);
  return std::move(writer.word(in_exception ? 1 : 0)).frame();
}

FrameKind kind_of(std::span<const std::byte> frame) {
  std::uint64_t first = 0;
  if (frame.size() < sizeof first) refuse("it has " + std::to_string(frame.size()) + " bytes");
  std::memcpy(&first, frame.data(), sizeof first);
  if (first - kFirstWord >= kKinds) refuse("it is none of this version of expar, which all ranks must have");
  return static_cast<FrameKind>(first - kFirstWord);
}

ShownLine read_line_frame(std::span<const std::byte> frame) {
  Reader reader(frame);
  const std::uint64_t index = reader.word();
  if (index >= kBoardLines) {
    refuse("it shows line " + std::to_string(index) + " of a board of " + std::to_string(kBoardLines));
  }
  ShownLine shown{.index = static_cast<int>(index), .line = {.sequence = reader.word()}, .text = {}};
  if (shown.line.sequence == local::kBeingWritten) refuse("it shows a line that is being written");
  for (std::uint64_t& word : shown.line.words) word = reader.word();
  const std::uint64_t text = reader.word();
  if (text > kLineText) refuse("it has " + std::to_string(text) + " bytes of text beside a line");
  shown.text = reader.text(text);
  reader.end();
  return shown;
}

MessageHead read_message_frame(std::span<const std::byte> frame) {
  Reader reader(frame);
  const std::uint64_t tag = reader.word();
  const std::uint64_t bytes = reader.word();
  const std::size_t offset = frame.size() - reader.left();
  reader.bytes(bytes);
  reader.end();
  return {.tag = tag, .offset = offset};
}

Error read_cause_frame(std::span<const std::byte> frame, int size) {
  Reader reader(frame);
  const std::uint64_t code = reader.word();
  if (code > static_cast<std::uint64_t>(ErrorCode::internal)) refuse("error code " + std::to_string(code));
  const auto rank = [&] {
    const auto named = static_cast<std::int64_t>(reader.word());
    if (named < -1 || named >= size) refuse("an error names rank " + std::to_string(named));
    return static_cast<int>(named);
  };
  Error::Where where;
  where.rank = rank();
  where.peer = rank();
  const std::uint64_t operation = reader.word();
  const std::uint64_t message = reader.word();
  where.operation = reader.text(operation);
  const std::string words(reader.text(message));
  reader.end();
  return Error(static_cast<ErrorCode>(code), words, std::move(where));
}

bool read_bye_frame(std::span<const std::byte> frame) {
  Reader reader(frame);
  const std::uint64_t in_exception = reader.word();
  if (in_exception > 1) refuse("it leaves with " + std::to_string(in_exception) + ", neither 0 nor 1");
  reader.end();
  return in_exception == 1;
}

}  // namespace expar::carried
