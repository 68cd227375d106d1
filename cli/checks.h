// What `expar doctor` looks at: each check says what it found, whether that is a problem, and what to do about it.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include "cli/machine.h"
#include "cli/verb.h"

namespace expar::cli {

/// A note is about speed or room; a problem is something that fails.
enum class Verdict { ok, note, problem };

struct Check {
  std::string name;  // "shared memory"
  std::string found;
  Verdict verdict = Verdict::ok;
  std::string reason;  // of a note or a problem
  std::string advice;  // what to do about it

  Check(std::string what, std::string seen = {}) : name(std::move(what)), found(std::move(seen)) {}
  void note(std::string why, std::string what_to_do);
  void problem(std::string why, std::string what_to_do);
  nlohmann::json json() const;
};

// The system, as far as it can be asked. What is measured or tried lies in doctor.cpp.
Check check_cores(const Machine& machine, const Common& common);
Check check_instruction_sets(const std::string& backend);
Check check_shared_memory();
Check check_address_space();
Check check_locked_memory();
Check check_open_files(const Machine& machine, const Common& common);
Check check_waiting();
Check check_launchers();
Check check_numa();

/// The same facts as numbers and words for programs; what has no limit is absent.
nlohmann::json limits();
nlohmann::json launchers();
int numa_nodes();

}  // namespace expar::cli
