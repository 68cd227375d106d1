// expar: finds the verb, runs it, and turns what happened into an exit status.
#include <cstdlib>
#include <iostream>
#include <optional>
#include <string>
#include <vector>

#include <expar/version.h>

#include "cli/options.h"
#include "cli/output.h"
#include "cli/ranks.h"
#include "cli/verbs.h"

namespace expar::cli {
namespace {

std::vector<Verb> all_verbs() {
  return {train_verb(), run_verb(), bench_verb(), plan_verb(), launch_program(), doctor()};
}

std::vector<std::string> names(const std::vector<Verb>& verbs) {
  std::vector<std::string> result;
  for (const Verb& verb : verbs) result.push_back(verb.name);
  return result;
}

void print_help(const std::vector<Verb>& verbs) {
  std::cout << "Expert-parallel Mixture-of-Experts.\n"
               "Usage: expar VERB [OPTIONS]      expar VERB --help      expar --version\n\n";
  for (const Verb& verb : verbs) {
    std::cout << "  " << verb.name << std::string(10 - verb.name.size(), ' ') << verb.help << "\n";
  }
}

const Verb& find(const std::vector<Verb>& verbs, const std::string& word) {
  for (const Verb& verb : verbs) {
    if (verb.name == word) return verb;
  }
  std::string list;
  for (const std::string& name : names(verbs)) list += (list.empty() ? "" : ", ") + name;
  throw Error(ErrorCode::bad_argument,
              "unknown verb '" + word + "'" + suggestion(word, names(verbs)) + " (verbs: " + list + ")");
}

void execute(const std::vector<std::string>& words) {
  const std::vector<Verb> verbs = all_verbs();
  if (words.empty()) {
    throw Error(ErrorCode::bad_argument, "name a verb; expar --help lists them");
  }
  const std::string& word = words.front();
  if (word == "--help" || word == "-h" || word == "help") return print_help(verbs);
  if (word == "--version") {
    std::cout << "expar " << version() << "\n";
    return;
  }
  const Verb& verb = find(verbs, word);
  const Parsed parsed = parse(verb, {words.begin() + 1, words.end()});
  if (!parsed.help_shown) run(verb, parsed.common, words);
}

/// The job, or one rank alone where the environment is itself the mistake.
Job job_or_alone() {
  try {
    return job_from_environment();
  } catch (const Error&) {
    return {};
  }
}

void tell(const Error& error, const std::vector<std::string>& words) {
  report_error(error);
  const Job job = job_or_alone();
  if (!speaks_for(job, error)) return;
  // Our own launcher says it itself, once it knows what every rank has to say.
  if (job.launcher != "expar" || std::getenv("EXPAR_REPORT_FD") == nullptr) print_error(error);
  const std::string path = find_json(words);
  if (path.empty()) return;
  try {
    check_writable(path);
    write_json(path, to_json(error));
  } catch (const Error& second) {
    if (error.message() != second.message()) print_error(second);
  }
}

int main_of(const std::vector<std::string>& words) {
  try {
    execute(words);
    std::cout.flush();
    if (!std::cout) throw Error(ErrorCode::io, "cannot write to standard output");
    return EXIT_SUCCESS;
  } catch (...) {
    const Error error = current_error();
    tell(error, words);
    return exit_code(error.code());
  }
}

}  // namespace
}  // namespace expar::cli

int main(int argc, char** argv) { return expar::cli::main_of({argv + 1, argv + argc}); }
