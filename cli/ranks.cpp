// The three ways to run a verb on ranks, and how the error of one rank becomes that of all.
#include "cli/ranks.h"

#include <unistd.h>

#include <algorithm>

#include "cli/output.h"
#include "cli/tracing.h"

namespace expar::cli {
namespace {

/// A launcher has already decided how many ranks there are and that they are processes.
void check_against(const Job& job, const Common& common) {
  const std::string has =
      job.launcher + " has started " + std::to_string(job.size) + (job.size == 1 ? " rank" : " ranks");
  if (common.ranks != 0 && common.ranks != job.size) {
    throw Error(ErrorCode::bad_argument,
                "--ranks = '" + std::to_string(common.ranks) + "' contradicts the launcher: " + has);
  }
  if (!has_processes(common.transport) && job.size > 1) {
    throw Error(ErrorCode::bad_argument,
                "--transport = '" + common.transport + "' contradicts the launcher: " + has + " as processes");
  }
}

/// The name under which this program runs, so that `ps` shows it; it may have been replaced since.
std::string own_program() {
  char path[4096];
  const ssize_t length = readlink("/proc/self/exe", path, sizeof path);
  if (length > 0 && length < static_cast<ssize_t>(sizeof path)) {
    const std::string program(path, static_cast<std::size_t>(length));
    if (access(program.c_str(), X_OK) == 0) return program;
  }
  return "/proc/self/exe";
}

/// An error that this rank found on its own belongs to it; a late or a lost rank is named by all alike.
Error on_rank(const Error& error, int rank) {
  if (error.rank() >= 0 || error.fatal()) return error;
  return {error.code(), error.message(), {.rank = rank, .peer = error.peer(), .operation = error.operation()}};
}

nlohmann::json run_rank(const Verb& verb, const Common& common, const Communicator& communicator) {
  Tracing tracing(communicator, verb.name, common.trace);
  try {
    nlohmann::json result = verb.run(communicator, common);
    tracing.finish();
    return result;
  } catch (...) {
    const Error cause = communicator.transport().abort(on_rank(current_error(), communicator.rank()));
    tracing.keep();
    throw cause;
  }
}

void write_result(const Common& common, const nlohmann::json& result) {
  if (!common.json.empty() && !result.is_null()) write_json(common.json, result);
}

[[noreturn]] void refuse_trace(const Verb& verb) {
  throw Error(ErrorCode::bad_argument, "--trace does not go with " + verb.name + ", which runs no ranks of its own");
}

void run_as_threads(const Verb& verb, const Common& common) {
  nlohmann::json result;
  run_threads(
      std::max(common.ranks, 1),
      [&](Communicator communicator) {
        nlohmann::json mine = run_rank(verb, common, communicator);
        if (communicator.rank() == 0) result = std::move(mine);
      },
      common.run_options());
  write_result(common, result);
}

void run_in_job(const Verb& verb, const Common& common, const Job& job) {
  const Communicator communicator = join(job, common.run_options());
  const nlohmann::json result = run_rank(verb, common, communicator);
  if (job.rank == 0) write_result(common, result);
}

void run_as_processes(const std::vector<std::string>& words, int ranks) {
  std::vector<std::string> command = words;
  command.insert(command.begin(), own_program());
  if (const auto error = launch(ranks, command)) throw *error;
}

}  // namespace

void run(const Verb& verb, const Common& common, const std::vector<std::string>& words) {
  if (!common.json.empty()) check_writable(common.json);
  if (!common.trace.empty()) {
    if (verb.run_alone) refuse_trace(verb);
    check_writable(common.trace);
  }
  if (verb.run_alone) return write_result(common, verb.run_alone(common));
  const bool processes = has_processes(common.transport);
  const Job job = job_from_environment();
  const bool started = job.launcher != "none";
  if (started) check_against(job, common);
  try {
    if (!processes) return run_as_threads(verb, common);
    if (started || common.ranks <= 1) return run_in_job(verb, common, job);
    run_as_processes(words, common.ranks);
  } catch (const Error&) {
    if (!started && !common.trace.empty()) join_kept_traces(verb.name, common.trace, std::max(common.ranks, 1));
    throw;
  }
}

bool speaks_for(const Job& job, const Error& error) {
  const bool alive = error.rank() >= 0 && error.rank() < job.size && error.rank() != error.peer();
  const int speaker = alive ? error.rank() : (error.peer() == 0 ? 1 : 0);
  return job.size == 1 || job.rank == speaker;
}

}  // namespace expar::cli
