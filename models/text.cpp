// Reads a text and finds its targets; how they are drawn into batches is batch.cpp's business.
#include "models/text.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>

#include <expar/collectives.h>
#include <expar/operation.h>

namespace expar {
namespace {

[[noreturn]] void cannot_read(const std::string& path, int reason) {
  throw Error(ErrorCode::io, "cannot read the text '" + path + "': " + std::strerror(reason));
}

}  // namespace

Text::Text(std::vector<std::uint8_t> bytes, std::int64_t context, std::string_view name)
    : bytes_(std::move(bytes)), context_(context) {
  if (context < 1 || context > kMaxContext) {
    throw Error(ErrorCode::bad_argument,
                "context " + std::to_string(context) + " is not in 1 ... " + std::to_string(kMaxContext));
  }
  if (size() <= kHeldOut) {
    throw Error(ErrorCode::bad_argument,
                "the text '" + std::string(name) + "' is too short: it has " + std::to_string(size()) +
                    " bytes, and the first held-out block begins at byte " + std::to_string(kHeldOut));
  }
}

std::int64_t Text::training_targets() const {
  const std::int64_t last = std::min(size() % kPeriod, kHeldOut) - context_;
  return size() / kPeriod * (kHeldOut - context_) + std::max<std::int64_t>(0, last);
}

std::int64_t Text::training_target(std::int64_t i) const {
  const std::int64_t each = kHeldOut - context_;
  return i / each * kPeriod + context_ + i % each;
}

std::int64_t Text::heldout_targets() const {
  return size() / kPeriod * kBlock + std::max<std::int64_t>(0, size() % kPeriod - kHeldOut);
}

std::int64_t Text::heldout_target(std::int64_t i) const { return i / kBlock * kPeriod + kHeldOut + i % kBlock; }

std::span<const std::uint8_t> Text::before(std::int64_t position) const {
  return {bytes_.data() + position - context_, static_cast<std::size_t>(context_)};
}

std::vector<std::uint8_t> read_file(const std::string& path, std::size_t most) {
  struct Close {
    void operator()(std::FILE* file) const { std::fclose(file); }
  };
  const std::unique_ptr<std::FILE, Close> file(std::fopen(path.c_str(), "rb"));
  if (!file) cannot_read(path, errno);
  constexpr std::size_t kPiece = 1 << 20;  // a pipe has no size, so it is not asked for
  std::vector<std::uint8_t> bytes;
  for (std::size_t got = 1; got > 0 && bytes.size() < most;) {
    const std::size_t have = bytes.size();
    const std::size_t wanted = std::min(kPiece, most - have);
    bytes.resize(have + wanted);
    errno = 0;
    got = std::fread(bytes.data() + have, 1, wanted, file.get());
    if (got == 0 && std::ferror(file.get()) != 0) cannot_read(path, errno);
    bytes.resize(have + got);
  }
  return bytes;
}

std::vector<std::uint8_t> read_text(const Context& context, const std::string& path) {
  std::vector<std::uint8_t> bytes;
  // What rank 0 throws while it reads reaches every rank, and leaves the communicator usable.
  const auto shown = meet(context.communicator(), Signature("read_text"), [&]() -> Operation::Words {
    if (context.rank() == 0) bytes = read_file(path);
    return {bytes.size()};
  });
  const auto size = static_cast<std::int64_t>(shown[0][0]);
  bytes.resize(static_cast<std::size_t>(size));
  broadcast(context, Tensor(bytes.data(), DType::int8, {size}), 0);
  return bytes;
}

}  // namespace expar
