// What this machine is, as far as a result depends on it.
#pragma once

#include <string>
#include <vector>

#include <nlohmann/json.hpp>

namespace expar::cli {

struct Machine {
  std::string cpu;
  std::string kernel;
  int cores = 0;         // online
  int usable_cores = 0;  // that this process may run on
  double quota = 0;      // cores' worth of time that its control group may use; 0: no limit
  double memory_gib = 0;
  std::string huge_pages;             // "always", "madvise", "never" or "absent"
  std::vector<std::string> features;  // instruction sets that matter here, as the kernel names them

  nlohmann::json json() const;
  std::string str() const;  // one line
};

Machine this_machine();

}  // namespace expar::cli
