// Lines and texts that one rank writes and all read, consistent without a lock.
#pragma once

#include <string>
#include <string_view>

#include "transports/shared/job_memory.h"

namespace expar::local {

/// A line while it is being rewritten; readers take it for "nothing yet".
inline constexpr std::uint64_t kBeingWritten = ~std::uint64_t{0};

/// Stores the line, its sequence last and with sequential consistency, so that a sleeper's flag may be read next.
void write_line(RankArea& area, int index, const Line& line);
/// At most kLineText bytes of `text`, ending between characters.
std::string_view cut(std::string_view text);
/// Longer texts are cut. Call before write_line, which makes it visible.
void write_text(RankArea& area, int index, std::string_view text);

/// The line as it is; all zero while it is being rewritten.
Line read_line(const RankArea& area, int index);
std::string read_text(const RankArea& area, int index);

}  // namespace expar::local
