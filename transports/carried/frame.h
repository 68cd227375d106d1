// What ranks say to each other as frames of bytes; reading one trusts nothing in it.
//
// A frame is words of 64 bits, in the byte order of the machine, then bytes up to its end. The first word names
// protocol, version and kind.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include <expar/transport.h>

namespace expar::carried {

using Frame = std::vector<std::byte>;

enum class FrameKind : std::uint8_t { line, message, cause, bye };

/// A line that the sender shows.
struct ShownLine {
  int index = 0;
  Line line;
  std::string_view text;  // within the frame
};

/// The head of a message; its bytes are the rest of the frame.
struct MessageHead {
  std::uint64_t tag = 0;
  std::size_t offset = 0;  // of the first byte, within the frame
};

Frame line_frame(const ShownLine& shown);
Frame message_frame(std::uint64_t tag, std::span<const std::byte> bytes);
/// The job's cause, settled.
Frame cause_frame(const Error& cause);
/// The sender leaves, perhaps because of an exception.
Frame bye_frame(bool in_exception);

/// All throw Error internal, which completes "rank 3 sent a frame that cannot be: ".
FrameKind kind_of(std::span<const std::byte> frame);
ShownLine read_line_frame(std::span<const std::byte> frame);
MessageHead read_message_frame(std::span<const std::byte> frame);
/// `size`: how many ranks there are to be named.
Error read_cause_frame(std::span<const std::byte> frame, int size);
bool read_bye_frame(std::span<const std::byte> frame);

}  // namespace expar::carried
