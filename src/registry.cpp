// The one place that knows transports and backends by name.
#include <expar/registry.h>

#include <cstdlib>
#include <memory>
#include <string>
#include <system_error>
#include <thread>
#include <utility>

#include "backends/cpu/cpu.h"
#include "backends/reference/reference.h"
#include "src/util/fallback.h"
#include "transports/shm/shm.h"
#include "transports/threads/threads.h"

namespace expar {

namespace {

struct Backend {
  std::string_view name;
  std::vector<const Kernels*> tables;  // best first
};

/// A way for ranks to reach each other. Its ranks are threads or processes; one that is not built has neither.
struct TransportRow {
  std::string_view name;
  std::string (*missing)() = nullptr;  // why it does not work here, empty where it does; null: it always does
  std::unique_ptr<Transport> (*of_thread)(const threads::ThreadsJob& job, int rank) = nullptr;
  std::unique_ptr<Transport> (*of_process)(const Job& job, bool mapping, std::chrono::nanoseconds timeout) = nullptr;
};

std::unique_ptr<Transport> join_host(const Job& job, bool mapping, std::chrono::nanoseconds timeout) {
  if (job.local_size != job.size) {
    throw Error(ErrorCode::unsupported,
                "transport shm connects ranks of one host; " + std::to_string(job.size) + " ranks of job '" + job.id +
                    "' run on several (" + std::to_string(job.local_size) +
                    " of them here): start them all on this one, as 'expar launch -n " + std::to_string(job.size) +
                    " -- PROGRAM' does",
                {job.rank, -1, "join"});
  }
  return shm::connect({.job = job.id, .rank = job.rank, .size = job.size, .mapping = mapping}, timeout);
}

constexpr TransportRow kTransports[] = {
    {.name = "threads", .of_thread = [](const threads::ThreadsJob& job, int rank) { return job.transport(rank); }},
    {.name = "shm", .missing = shm::missing, .of_process = join_host},
    {.name = "mpi", .missing = [] { return std::string("no option of this build adds it"); }},
};

std::vector<Backend> backends() { return {{"cpu", cpu_kernels()}, {"reference", {&reference_kernels()}}}; }

std::string list(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

std::string missing(const TransportRow& row) { return row.missing == nullptr ? "" : row.missing(); }

const TransportRow& find_transport(std::string_view name) {
  std::string why = "expar knows none of this name";
  for (const TransportRow& row : kTransports) {
    if (row.name != name) continue;
    why = missing(row);
    if (why.empty()) return row;
  }
  throw Error(ErrorCode::unsupported, "there is no transport \"" + std::string(name) + "\" here: " + why +
                                          "; there are " + list(available_transports()) + ": use one of them");
}

}  // namespace

std::vector<std::string> available_transports() {
  std::vector<std::string> names;
  for (const TransportRow& row : kTransports) {
    if (missing(row).empty()) names.emplace_back(row.name);
  }
  return names;
}

std::vector<std::string> known_transports() {
  std::vector<std::string> names;
  for (const TransportRow& row : kTransports) names.emplace_back(row.name);
  return names;
}

bool has_processes(std::string_view transport) { return find_transport(transport).of_process != nullptr; }

std::vector<std::string> available_backends() {
  std::vector<std::string> names;
  for (const Backend& backend : backends()) names.emplace_back(backend.name);
  return names;
}

std::vector<std::string> available_isas(std::string_view wanted) {
  std::vector<std::string> names;
  for (const Backend& backend : backends()) {
    if (backend.name != wanted) continue;
    for (const Kernels* table : backend.tables) names.emplace_back(table->isa);
  }
  return names;
}

Kernels find_kernels(std::string_view wanted, std::string_view isa) {
  const char* forced = std::getenv("EXPAR_ISA");
  const std::string_view wanted_isa = isa.empty() && forced != nullptr ? forced : isa;
  for (const Backend& backend : backends()) {
    if (backend.name != wanted) continue;
    for (const Kernels* table : backend.tables) {
      if (wanted_isa.empty() || table->isa == wanted_isa) return with_fallback(*table, reference_kernels());
    }
    throw Error(ErrorCode::unsupported, "backend \"" + std::string(wanted) + "\" has no instruction set \"" +
                                            std::string(wanted_isa) + "\" here; it has " +
                                            list(available_isas(wanted)));
  }
  throw Error(ErrorCode::unsupported, "there is no backend \"" + std::string(wanted) + "\" in this build; there are " +
                                          list(available_backends()));
}

namespace {

std::chrono::nanoseconds timeout_of(const RunOptions& options) {
  if (options.timeout.count() < 0) throw Error(ErrorCode::bad_argument, "the timeout of a job is negative");
  return options.timeout.count() > 0 ? options.timeout : default_timeout();
}

void run_rank(const threads::ThreadsJob& job, const TransportRow& row, int rank,
              const std::function<void(Communicator)>& rank_main, std::chrono::nanoseconds timeout) {
  Communicator communicator;  // kept until the cause is recorded: a rank that seems to leave hides why it failed
  try {
    communicator = Communicator(row.of_thread(job, rank), {timeout});
    rank_main(communicator);
  } catch (...) {
    job.abort(rank, current_error({rank}));
  }
}

}  // namespace

void run_threads(int ranks, const std::function<void(Communicator)>& rank_main, const RunOptions& options) {
  const auto timeout = timeout_of(options);
  const TransportRow& row = find_transport(options.transport.empty() ? "threads" : options.transport);
  if (row.of_thread == nullptr) {
    throw Error(ErrorCode::bad_argument,
                "the ranks of transport \"" + options.transport + "\" are processes, which join() connects");
  }
  const threads::ThreadsJob job(ranks, options.mapping);
  std::vector<std::thread> running;
  running.reserve(static_cast<std::size_t>(ranks));
  for (int rank = 0; rank < ranks; ++rank) {
    try {
      running.emplace_back([&, rank] { run_rank(job, row, rank, rank_main, timeout); });
    } catch (const std::system_error& error) {
      job.abort(rank, Error(ErrorCode::no_memory, std::string("cannot start a thread: ") + error.what(), {rank}));
      break;
    }
  }
  for (std::thread& thread : running) thread.join();
  if (auto cause = job.failure()) throw *cause;
}

Communicator join(const Job& job, const RunOptions& options) {
  const auto timeout = timeout_of(options);
  const TransportRow& row = find_transport(options.transport.empty() ? "shm" : options.transport);
  if (row.of_process == nullptr) {
    throw Error(ErrorCode::bad_argument,
                "the ranks of transport \"" + options.transport + "\" are threads, which run_threads() starts");
  }
  return Communicator(row.of_process(job, options.mapping, timeout), {timeout});
}

}  // namespace expar
