// The machine as /proc and /sys show it.
#include "cli/machine.h"

#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <sstream>

#include <expar/pool.h>

namespace expar::cli {
namespace {

const char* const kFeatures[] = {"sse4_2",      "avx",      "avx2",     "fma",         "f16c",
                                 "avx512f",     "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16",
                                 "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8"};

/// The text after "name : " in a line of /proc/cpuinfo.
std::string cpu_field(const std::string& name) {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const std::size_t colon = line.find(':');
    if (line.starts_with(name) && colon != std::string::npos && colon + 2 <= line.size()) {
      return line.substr(colon + 2);
    }
  }
  return {};
}

std::vector<std::string> features() {
  std::istringstream flags(cpu_field("flags"));
  std::vector<std::string> all;
  for (std::string flag; flags >> flag;) all.push_back(flag);
  std::vector<std::string> found;
  for (const char* feature : kFeatures) {
    if (std::find(all.begin(), all.end(), feature) != all.end()) found.emplace_back(feature);
  }
  return found;
}

std::string huge_pages() {
  std::ifstream file("/sys/kernel/mm/transparent_hugepage/enabled");
  std::string line;
  if (!std::getline(file, line)) return "absent";
  const std::size_t open = line.find('[');
  const std::size_t close = line.find(']');
  return open < close && close != std::string::npos ? line.substr(open + 1, close - open - 1) : "absent";
}

}  // namespace

Machine this_machine() {
  Machine machine;
  machine.cpu = cpu_field("model name");
  utsname system{};
  if (uname(&system) == 0) machine.kernel = std::string(system.sysname) + " " + system.release;
  machine.cores = static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
  const Cores cores = available_cores();
  machine.usable_cores = cores.allowed;
  if (std::isfinite(cores.quota)) machine.quota = cores.quota;
  machine.memory_gib =
      static_cast<double>(sysconf(_SC_PHYS_PAGES)) * static_cast<double>(sysconf(_SC_PAGESIZE)) / (1 << 30);
  machine.huge_pages = huge_pages();
  machine.features = features();
  return machine;
}

nlohmann::json Machine::json() const {
  nlohmann::json object = {{"cpu", cpu},
                           {"kernel", kernel},
                           {"cores", cores},
                           {"usable_cores", usable_cores},
                           {"memory_gib", memory_gib},
                           {"huge_pages", huge_pages},
                           {"features", features}};
  if (quota > 0) object["quota_cores"] = quota;
  return object;
}

std::string Machine::str() const {
  char text[256];
  std::snprintf(text, sizeof text, "%s, %d of %d cores, %.1f GiB, %s", cpu.c_str(), usable_cores, cores, memory_gib,
                kernel.c_str());
  return text;
}

}  // namespace expar::cli
