// Which cores may be used, and how much of them, as the kernel says.
#pragma once

#include <array>
#include <cstdint>
#include <string>

namespace expar {

/// Cores by number, one bit each.
using CoreSet = std::array<std::uint64_t, 16>;

/// The cores this thread may run on (sched_getaffinity).
CoreSet allowed_cores();
/// At least one.
int count(const CoreSet& cores);

/// The cores' worth of time that the narrowest of this process's control groups (version 2) grants; infinity where none
/// has a quota. `root` stands before the paths of /proc and /sys.
double core_quota(const std::string& root = "");

}  // namespace expar
