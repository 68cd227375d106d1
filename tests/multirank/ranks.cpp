// Gives each rank of a test its transport, or the communicator on it.
#include <algorithm>
#include <exception>
#include <memory>
#include <thread>

#include <gtest/gtest.h>

#include "tests/multirank/post_office.h"
#include "tests/multirank/processes.h"
#include "transports/shm/shm.h"
#include "transports/threads/threads.h"

namespace expar::test {
namespace {

/// What `rank_main` throws reaches the other ranks before this one's transport goes.
void tell_of_exceptions(Transport& transport, const std::function<void()>& rank_main) {
  try {
    rank_main();
  } catch (const Error& error) {
    transport.abort(error);
    throw;
  } catch (const std::exception& error) {
    throw transport.abort(Error(ErrorCode::internal, error.what(), {transport.rank(), -1, {}}));
  }
}

std::vector<Outcome> run_ranks(const RankSetup& setup,
                               const std::function<void(std::unique_ptr<Transport>)>& rank_main) {
  if (setup.kind == Kind::shm) {
    const std::string job = fresh_job_id();
    const auto run = [&](int rank) { rank_main(shm::connect({job, rank, setup.ranks, setup.mapping}, setup.timeout)); };
    return fork_ranks(setup.ranks, run, setup.patience);
  }
  if (setup.kind == Kind::carried) {
    PostOffice office(setup.ranks);
    return run_as_threads(setup.ranks, [&](int rank) { rank_main(office.transport(rank)); });
  }
  const threads::ThreadsJob job(setup.ranks, setup.mapping);
  return run_as_threads(setup.ranks, [&](int rank) { rank_main(job.transport(rank)); });
}

/// One rank more than the group has, which leaves as soon as the others are one.
std::vector<Outcome> run_group(RankSetup setup, const std::function<void(Communicator)>& rank_main) {
  const int members = setup.ranks;
  setup.ranks += 1;
  setup.group = false;
  std::vector<Outcome> outcomes = run_communicators(setup, [&](const Communicator& job) {
    if (const Communicator group = job.split(job.rank() < members ? 0 : -1)) rank_main(group);
  });
  const Outcome outsider = outcomes.back();
  outcomes.pop_back();
  // It may still be leaving when a member ends the job.
  const bool told = outsider.error && std::any_of(outcomes.begin(), outcomes.end(), [&](const Outcome& member) {
                      return member.error && member.error->message() == outsider.error->message();
                    });
  EXPECT_TRUE(outsider.ok() || told) << outsider.describe();
  return outcomes;
}

}  // namespace

std::vector<Outcome> run_as_threads(int ranks, const std::function<void(int rank)>& rank_main) {
  std::vector<Outcome> outcomes(static_cast<std::size_t>(ranks));
  std::vector<std::thread> running;
  for (int rank = 0; rank < ranks; ++rank) {
    running.emplace_back([&, rank] { outcomes[static_cast<std::size_t>(rank)] = end_of([&] { rank_main(rank); }); });
  }
  for (std::thread& thread : running) thread.join();
  return outcomes;
}

std::vector<Outcome> run_transports(const RankSetup& setup, const std::function<void(Transport&)>& rank_main) {
  return run_ranks(setup, [&](const std::unique_ptr<Transport>& transport) {
    tell_of_exceptions(*transport, [&] { rank_main(*transport); });
  });
}

std::vector<Outcome> run_communicators(const RankSetup& setup, const std::function<void(Communicator)>& rank_main) {
  if (setup.group) return run_group(setup, rank_main);
  return run_ranks(setup, [&](std::unique_ptr<Transport> transport) {
    const Communicator communicator(std::move(transport), {setup.timeout});
    tell_of_exceptions(communicator.transport(), [&] { rank_main(communicator); });
  });
}

}  // namespace expar::test
