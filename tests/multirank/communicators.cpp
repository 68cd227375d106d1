// Gives each rank of a test its communicator.
#include <exception>
#include <thread>

#include <gtest/gtest.h>

#include "tests/multirank/processes.h"
#include "transports/shm/shm.h"
#include "transports/threads/threads.h"

namespace expar::test {
namespace {

// Runs one rank; what it throws reaches the others before its communicator goes.
void run_rank(const Communicator& communicator, const std::function<void(Communicator)>& rank_main) {
  try {
    rank_main(communicator);
  } catch (const Error& error) {
    communicator.transport().abort(error);
    throw;
  } catch (const std::exception& error) {
    throw communicator.transport().abort(Error(ErrorCode::internal, error.what(), {communicator.rank(), -1, {}}));
  }
}

}  // namespace

namespace {

/// One rank more than the group has, which leaves as soon as the others are one.
std::vector<Outcome> run_group(RankSetup setup, const std::function<void(Communicator)>& rank_main) {
  const int members = setup.ranks;
  setup.ranks += 1;
  setup.group = false;
  std::vector<Outcome> outcomes = run_communicators(setup, [&](const Communicator& job) {
    if (const Communicator group = job.split(job.rank() < members ? 0 : -1)) rank_main(group);
  });
  EXPECT_TRUE(outcomes.back().ok()) << outcomes.back().describe();
  outcomes.pop_back();
  return outcomes;
}

}  // namespace

std::vector<Outcome> run_communicators(const RankSetup& setup, const std::function<void(Communicator)>& rank_main) {
  if (setup.group) return run_group(setup, rank_main);
  if (setup.kind == Kind::shm) {
    const std::string job = fresh_job_id();
    const auto run = [&](int rank) {
      auto transport = shm::connect({job, rank, setup.ranks, setup.mapping}, setup.timeout);
      run_rank(Communicator(std::move(transport), {setup.timeout}), rank_main);
    };
    return fork_ranks(setup.ranks, run, setup.patience);
  }
  const threads::ThreadsJob job(setup.ranks, setup.mapping);
  std::vector<Outcome> outcomes(static_cast<std::size_t>(setup.ranks));
  std::vector<std::thread> running;
  for (int rank = 0; rank < setup.ranks; ++rank) {
    running.emplace_back([&, rank] {
      outcomes[static_cast<std::size_t>(rank)] =
          end_of([&] { run_rank(Communicator(job.transport(rank), {setup.timeout}), rank_main); });
    });
  }
  for (std::thread& thread : running) thread.join();
  return outcomes;
}

}  // namespace expar::test
