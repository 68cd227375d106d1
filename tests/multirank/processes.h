// For tests with several ranks: runs a function on each, as processes or as threads, and tells how each of them ended.
//
//   const auto ends = run_transports({Kind::shm, 4}, [](Transport& transport) { ... EXPECT_EQ(...) ... });
//   expect_success(ends);
//
// Expectations inside the function work as usual: those that fail in a process are handed to the parent and reported by
// expect_success. What the function throws is told to the other ranks (Transport::abort) before its transport goes,
// as run_threads does. To see a death: raise(SIGKILL) in the function and look at Outcome::signal. Values go back to
// the test through Shared<T>, which works for both kinds.
#pragma once

#include <sys/mman.h>

#include <chrono>
#include <functional>
#include <new>
#include <optional>
#include <ostream>
#include <string>
#include <vector>

#include <expar/communicator.h>
#include <expar/transport.h>

namespace expar::test {

/// Carried ranks are threads that reach each other by frames alone.
enum class Kind { threads, shm, carried };

/// Which ranks to run. Printable, so that it can be a test's parameter; name() suits INSTANTIATE_TEST_SUITE_P.
struct RankSetup {
  Kind kind = Kind::threads;
  int ranks = 1;
  bool mapping = true;
  /// The ranks are a group of a job that has one rank more (communicators only).
  bool group = false;
  /// How long a call may wait before it fails with timeout.
  std::chrono::nanoseconds timeout = std::chrono::seconds(30);
  /// When a rank still runs after this, it is killed and counts as hung (processes only).
  std::chrono::nanoseconds patience = std::chrono::seconds(100);

  std::string name() const;  // "shm_4_unmapped", "threads_3_group"
};
std::ostream& operator<<(std::ostream& out, const RankSetup& setup);

/// How one rank ended.
struct Outcome {
  bool returned = false;       // the function returned
  std::optional<Error> error;  // what it threw; anything but an Error becomes internal
  std::string failures;        // its failed expectations (processes; those of threads are the test's own)
  int signal = 0;              // what killed the process
  int exit_code = 0;           // of the process
  bool hung = false;           // ran out of patience

  bool ok() const { return returned && !error && failures.empty() && signal == 0 && exit_code == 0; }
  std::string describe() const;
};

std::vector<Outcome> run_transports(const RankSetup& setup, const std::function<void(Transport&)>& rank_main);
std::vector<Outcome> run_communicators(const RankSetup& setup, const std::function<void(Communicator)>& rank_main);

/// `ranks` children of this process, of which none may have other threads yet. Without any transport: for tests that
/// join by themselves.
std::vector<Outcome> fork_ranks(int ranks, const std::function<void(int rank)>& rank_main,
                                std::chrono::nanoseconds patience = std::chrono::seconds(100));

/// `ranks` threads of this process, without any transport.
std::vector<Outcome> run_as_threads(int ranks, const std::function<void(int rank)>& rank_main);

/// Calls `run` and says how it ended.
Outcome end_of(const std::function<void()>& run);

/// A job id that no other test uses, to be made before forking.
std::string fresh_job_id();

/// Reports every rank that did not return, or that failed an expectation.
void expect_success(const std::vector<Outcome>& outcomes);
/// Reports failed expectations only: for tests in which ranks are meant to throw or die.
void expect_no_failures(const std::vector<Outcome>& outcomes);
/// Every rank but `but` threw, and all threw the same. Returns that error.
Error expect_same_error(const std::vector<Outcome>& outcomes, int but = -1);

/// All combinations: kinds x ranks x mapping on and, where ranks may map others, off; under ThreadSanitizer with many
/// ranks only as threads.
std::vector<RankSetup> all_setups(const std::vector<int>& ranks = {1, 2, 3, 4, 7, 8});
/// Besides, groups of a few sizes.
std::vector<RankSetup> all_communicators();

/// A value that the test and all its ranks see, processes included. T must need no destructor and hold no pointers.
template <class T>
class Shared {
 public:
  Shared() {
    void* memory = mmap(nullptr, sizeof(T), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    value_ = new (memory) T();
  }
  ~Shared() { munmap(value_, sizeof(T)); }
  Shared(const Shared&) = delete;
  Shared& operator=(const Shared&) = delete;
  T& operator*() const { return *value_; }
  T* operator->() const { return value_; }

 private:
  T* value_;
};

}  // namespace expar::test
