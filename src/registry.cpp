// The one place that knows transports and backends by name.
#include <expar/registry.h>

#include <exception>
#include <optional>
#include <system_error>
#include <thread>
#include <utility>

#include "transports/threads/threads.h"

namespace expar {

std::vector<std::string> available_transports() { return {"threads"}; }

namespace {

void run_rank(const threads::ThreadsJob& job, int rank, const std::function<void(Communicator)>& rank_main,
              const RunOptions& options) {
  try {
    // Kept until the cause is recorded: a rank that seems to leave cleanly would hide why it failed.
    const Communicator communicator(job.transport(rank), {options.timeout});
    try {
      rank_main(communicator);
    } catch (const Error& error) {
      job.abort(rank, error);
    } catch (const std::exception& error) {
      job.abort(rank, Error(ErrorCode::internal, error.what(), {rank}));
    } catch (...) {
      job.abort(rank, Error(ErrorCode::internal, "threw something that is not a std::exception", {rank}));
    }
  } catch (const Error& error) {
    job.abort(rank, error);
  } catch (const std::exception& error) {
    job.abort(rank, Error(ErrorCode::internal, error.what(), {rank}));
  }
}

}  // namespace

void run_threads(int ranks, const std::function<void(Communicator)>& rank_main, const RunOptions& options) {
  const threads::ThreadsJob job(ranks, options.mapping);
  std::vector<std::thread> running;
  running.reserve(static_cast<std::size_t>(ranks));
  for (int rank = 0; rank < ranks; ++rank) {
    try {
      running.emplace_back([&, rank] { run_rank(job, rank, rank_main, options); });
    } catch (const std::system_error& error) {
      job.abort(rank, Error(ErrorCode::no_memory, std::string("cannot start a thread: ") + error.what(), {rank}));
      break;
    }
  }
  for (std::thread& thread : running) thread.join();
  if (auto cause = job.failure()) throw *cause;
}

}  // namespace expar
