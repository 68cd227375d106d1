// A text as bytes: which of them are trained on, and which are held out to judge the result.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <expar/context.h>

namespace expar {

/// Every tenth block of 8 KiB is held out: blocks 9, 19, 29, ... counted from 0. A target is a byte to be predicted
/// from the `context` bytes before it. Training sees no held-out byte, neither as target nor in a context; a held-out
/// target may have bytes of the block before in its context.
class Text {
 public:
  static constexpr std::int64_t kBlock = 8192;
  static constexpr std::int64_t kPeriod = 10 * kBlock;        // one held-out block in each
  static constexpr std::int64_t kHeldOut = kPeriod - kBlock;  // where it begins
  static constexpr std::int64_t kMaxContext = kBlock;

  /// Throws Error: bad_argument (context not in [1, kMaxContext]; no byte would be held out), naming the text as
  /// `name`.
  Text(std::vector<std::uint8_t> bytes, std::int64_t context, std::string_view name);

  std::int64_t size() const { return static_cast<std::int64_t>(bytes_.size()); }
  std::int64_t context() const { return context_; }
  std::uint8_t operator[](std::int64_t position) const { return bytes_[static_cast<std::size_t>(position)]; }

  /// How many targets there are, and where in the text the i-th stands.
  std::int64_t training_targets() const;
  std::int64_t training_target(std::int64_t i) const;
  std::int64_t heldout_targets() const;
  std::int64_t heldout_target(std::int64_t i) const;

  /// The bytes before `position`, [context], the nearest last.
  std::span<const std::uint8_t> before(std::int64_t position) const;

 private:
  std::vector<std::uint8_t> bytes_;
  std::int64_t context_;
};

/// The file's bytes, the same on every rank: rank 0 reads, the others receive.
/// Collective. Throws Error: io (the file cannot be read, with the system's reason), as every collective.
/// Cost: one copy of the file per rank.
std::vector<std::uint8_t> read_text(const Context& context, const std::string& path);

/// The same on one rank alone, or the first `most` bytes. Not collective.
std::vector<std::uint8_t> read_file(const std::string& path, std::size_t most = SIZE_MAX);

}  // namespace expar
