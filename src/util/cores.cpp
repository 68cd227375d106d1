// Asks the kernel which cores may be used, and how much of them.
#include "src/util/cores.h"

#include <sched.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <fstream>
#include <limits>
#include <thread>

#include <expar/pool.h>

namespace expar {
namespace {

constexpr double kNoQuota = std::numeric_limits<double>::infinity();

/// "150000 100000": so many microseconds of every so many. "max 100000" is no number: no quota.
double quota_in(const std::string& path) {
  double quota = 0, period = 0;
  std::ifstream file(path);
  return file >> quota >> period && quota > 0 && period > 0 ? quota / period : kNoQuota;
}

}  // namespace

CoreSet allowed_cores() {
  CoreSet cores{};
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0) {
    for (std::size_t core = 0; core < 64 * cores.size() && core < CPU_SETSIZE; ++core) {
      if (CPU_ISSET(core, &set)) cores[core / 64] |= std::uint64_t{1} << (core % 64);
    }
  } else {
    // More cores than cpu_set_t has bits: only their number matters.
    const std::size_t n = std::max(1u, std::thread::hardware_concurrency());
    for (std::size_t core = 0; core < std::min(n, 64 * cores.size()); ++core) {
      cores[core / 64] |= std::uint64_t{1} << (core % 64);
    }
  }
  return cores;
}

int count(const CoreSet& cores) {
  int n = 0;
  for (std::uint64_t word : cores) n += std::popcount(word);
  return std::max(n, 1);
}

double core_quota(const std::string& root) {
  std::ifstream groups(root + "/proc/self/cgroup");
  double least = kNoQuota;
  for (std::string line; std::getline(groups, line);) {
    if (!line.starts_with("0::/")) continue;  // the one hierarchy of version 2
    // From the group up to the root of all, which is where a container finds its own.
    for (std::size_t end = line.size(); end != std::string::npos; end = line.rfind('/', end - 1)) {
      least = std::min(least, quota_in(root + "/sys/fs/cgroup" + line.substr(3, end - 3) + "/cpu.max"));
    }
  }
  return least;
}

int Cores::usable() const { return quota < allowed ? static_cast<int>(std::ceil(quota)) : allowed; }

Cores available_cores() { return {.allowed = count(allowed_cores()), .quota = core_quota()}; }

}  // namespace expar
