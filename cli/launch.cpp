// expar launch: starts local ranks of any program that uses the library.
#include <algorithm>
#include <memory>

#include "cli/verbs.h"

namespace expar::cli {

Verb launch_program() {
  auto command = std::make_shared<std::vector<std::string>>();
  Verb verb;
  verb.name = "launch";
  verb.help = "Start N local ranks of a program that uses expar.";
  verb.take_command = [command](std::vector<std::string> words) { *command = std::move(words); };
  verb.check = [command](const Common&) {
    if (!command->empty() && !command->front().empty()) return;
    throw Error(ErrorCode::bad_argument, "no program to start: expar launch -n N -- PROGRAM [ARGUMENTS]");
  };
  verb.run_alone = [command](const Common& common) -> nlohmann::json {
    const int ranks = std::max(common.ranks, 1);
    if (const auto error = launch(ranks, *command)) throw *error;
    return {{"ranks", ranks}};
  };
  return verb;
}

}  // namespace expar::cli
