// Asks the kernel which cores may be used, and how much of them.
#include "transports/shared/cpu.h"

#include <sched.h>

#include <algorithm>
#include <bit>
#include <fstream>
#include <limits>
#include <string>
#include <thread>

namespace expar::local {

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

int quota_cores() {
  std::string group;
  std::ifstream groups("/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    if (line.starts_with("0::")) group = line.substr(3);  // the one hierarchy of cgroup v2
  }
  for (const std::string& folder : {group, std::string("/")}) {
    std::ifstream file("/sys/fs/cgroup" + folder + "/cpu.max");
    double quota = 0;
    double period = 0;
    if (file >> quota >> period && quota > 0 && period > 0) {  // "max" fails to parse: no quota
      return std::max(1, static_cast<int>((quota + period - 1) / period));
    }
  }
  return std::numeric_limits<int>::max();
}

}  // namespace expar::local
