// Gives each rank of a test its transport.
#include <exception>
#include <memory>
#include <thread>

#include "tests/multirank/processes.h"
#include "transports/shm/shm.h"
#include "transports/threads/threads.h"

namespace expar::test {
namespace {

// Runs one rank; what it throws reaches the others before its transport goes.
void run_rank(std::unique_ptr<Transport> transport, const std::function<void(Transport&)>& rank_main) {
  try {
    rank_main(*transport);
  } catch (const Error& error) {
    transport->abort(error);
    throw;
  } catch (const std::exception& error) {
    throw transport->abort(Error(ErrorCode::internal, error.what(), {transport->rank(), -1, {}}));
  }
}

}  // namespace

std::vector<Outcome> run_transports(const RankSetup& setup, const std::function<void(Transport&)>& rank_main) {
  if (setup.kind == Kind::shm) {
    const std::string job = fresh_job_id();
    const auto run = [&](int rank) {
      run_rank(shm::connect({job, rank, setup.ranks, setup.mapping}, setup.timeout), rank_main);
    };
    return fork_ranks(setup.ranks, run, setup.patience);
  }
  const threads::ThreadsJob job(setup.ranks, setup.mapping);
  std::vector<Outcome> outcomes(static_cast<std::size_t>(setup.ranks));
  std::vector<std::thread> running;
  for (int rank = 0; rank < setup.ranks; ++rank) {
    running.emplace_back([&, rank] {
      outcomes[static_cast<std::size_t>(rank)] = end_of([&] { run_rank(job.transport(rank), rank_main); });
    });
  }
  for (std::thread& thread : running) thread.join();
  return outcomes;
}

}  // namespace expar::test
