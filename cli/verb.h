// What a verb of the command line is: a name, its flags, and what every rank does. The frame does the rest: ranks,
// launching, errors, exit codes and --json. A new verb is one file and one line in main.cpp.
#pragma once

#include <chrono>
#include <functional>
#include <string>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <expar/communicator.h>
#include <expar/context.h>
#include <expar/registry.h>

namespace expar::cli {

/// The flags that every verb has, as they were given.
struct Common {
  int ranks = 0;  // 0: not given. A rank asks its communicator instead
  std::string transport = "shm";
  int threads = 0;     // of each rank; 0: not given
  double timeout = 0;  // seconds; 0: not given
  std::string backend = "cpu";
  std::string json;   // path; empty: not given
  std::string trace;  // likewise

  RunOptions run_options() const;
  ContextOptions context_options() const;
};

/// A verb has either `run` or `run_alone`. The functions share their flags by capturing one object:
///   auto options = std::make_shared<TrainOptions>();
struct Verb {
  std::string name;
  std::string help;

  /// Adds the verb's own flags. Called once, first.
  std::function<void(CLI::App&)> add_options = [](CLI::App&) {};

  /// How many ranks the verb's own flags ask for; 0: as many as there are. What --ranks or a launcher says must agree.
  std::function<std::int64_t()> ranks = [] { return 0; };

  /// Looks at all flags together; throws Error bad_argument. Called before any rank starts, then once in every process.
  std::function<void(const Common&)> check = [](const Common&) {};

  /// What every rank does; throws what it likes, and all ranks end with that cause. What rank 0 returns goes to
  /// --json. Under `threads` it runs on all ranks at once: it must not write to what the functions share.
  std::function<nlohmann::json(const Communicator&, const Common&)> run;

  /// The same for a verb that has no ranks of its own: one call, in this process. There is nothing to --trace then.
  std::function<nlohmann::json(const Common&)> run_alone;

  /// For a verb that takes a program and its arguments after "--": gets them before check().
  std::function<void(std::vector<std::string>)> take_command;
};

/// Checks for CLI::Option::check that refuse with a sentence: "--steps = 'ten' is not a whole number from 1".
CLI::Validator whole_number(std::int64_t least, std::int64_t most = INT64_MAX);
/// A finite number above `bound`, or from `bound` where `inclusive`.
CLI::Validator number_above(double bound, bool inclusive = false);
/// One of `names`; suggests the nearest.
CLI::Validator one_of(std::vector<std::string> names);

}  // namespace expar::cli
