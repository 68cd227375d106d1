// include/expar/registry.h
#include <expar/registry.h>

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <thread>

#include "python/src/bind.h"
#include "python/src/error.h"
#include "python/src/interrupt.h"

namespace expar::python {
namespace {

using namespace nb::literals;

/// One call of run_threads: the ranks, and the Python exceptions that ended some.
class Threads {
 public:
  Threads(int ranks, nb::callable rank_main) : rank_main_(std::move(rank_main)) {
    failures_.resize(static_cast<std::size_t>(std::max(ranks, 0)));
  }

  /// With the GIL, which it releases while it waits.
  void run(int ranks, const RunOptions& options) {
    std::thread all([&] {
      try {
        run_threads(
            ranks, [&](Communicator communicator) { run_rank(std::move(communicator)); }, options);
      } catch (...) {
        outcome_ = std::current_exception();
      }
      const std::lock_guard lock(mutex_);
      ended_ = true;
      changed_.notify_all();
    });
    while (!await_end()) {
      if (PyErr_CheckSignals() == 0 || interrupt_) continue;
      interrupt_.emplace();
      *stop_ = true;
    }
    all.join();
    if (interrupt_) throw *interrupt_;
    rethrow();
  }

 private:
  void run_rank(Communicator communicator) {
    make_interruptible(communicator, stop_);
    const int rank = communicator.rank();
    const nb::gil_scoped_acquire gil;
    try {
      rank_main_(std::move(communicator));
    } catch (const nb::python_error& error) {
      failures_[static_cast<std::size_t>(rank)].emplace(error);
      throw as_error(error, rank);
    }
  }

  bool await_end() {
    const nb::gil_scoped_release no_gil;
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, std::chrono::milliseconds(50), [&] { return ended_; });
  }

  /// The root cause; an exception of the program's own as it was raised.
  void rethrow() {
    if (!outcome_) return;
    try {
      std::rethrow_exception(outcome_);
    } catch (const Error& error) {
      const auto rank = static_cast<std::size_t>(error.rank());
      if (error.rank() >= 0 && rank < failures_.size() && failures_[rank]) throw *failures_[rank];
      throw;
    }
  }

  nb::callable rank_main_;
  std::vector<std::optional<nb::python_error>> failures_;  // of each rank
  std::optional<nb::python_error> interrupt_;
  std::shared_ptr<std::atomic<bool>> stop_ = std::make_shared<std::atomic<bool>>(false);
  std::exception_ptr outcome_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool ended_ = false;
};

RunOptions run_options(double timeout, bool mapping, const std::string& transport) {
  return {.timeout = seconds(timeout), .mapping = mapping, .transport = transport};
}

Communicator joined(const Job& job, const RunOptions& options) {
  Communicator communicator = join(job, options);
  make_interruptible(communicator);
  return communicator;
}

}  // namespace

void bind_registry(nb::module_& m) {
  m.def("available_transports", &available_transports, "The transports of this build that work on this machine.");
  m.def("known_transports", &known_transports, "The names of all transports, also of those that do not work here.");
  m.def(
      "has_processes", [](const std::string& transport) { return has_processes(transport); }, "transport"_a,
      "Whether the ranks of a transport are processes, or threads of one. Raises Unsupported (it does not work here).");
  m.def("available_backends", &available_backends, "The backends of this build that work on this machine.");
  m.def(
      "available_isas", [](const std::string& backend) { return available_isas(backend); }, "backend"_a = "cpu",
      "The instruction sets of a backend that this processor runs, best first.");

  nb::class_<Job>(m, "Job", "Which job this process belongs to.")
      .def(
          "__init__",
          [](Job* self, std::string launcher, std::string id, int rank, int size, int local_rank, int local_size) {
            new (self) Job{std::move(launcher), std::move(id), rank, size, local_rank, local_size};
          },
          "launcher"_a, "id"_a, "rank"_a, "size"_a, "local_rank"_a, "local_size"_a)
      .def_ro("launcher", &Job::launcher)
      .def_ro("id", &Job::id, "The same for all ranks of this job and no other job on this host.")
      .def_ro("rank", &Job::rank)
      .def_ro("size", &Job::size)
      .def_ro("local_rank", &Job::local_rank)
      .def_ro("local_size", &Job::local_size);
  m.def("job_from_environment", &job_from_environment, R"(
Reads the variables of ``expar launch``, torchrun, Open MPI, MPICH and Slurm; without any: rank 0 of 1.

Raises BadArgument (variables that are missing or contradict each other, with what to type).)");

  m.def(
      "join",
      [](const Job& job, double timeout, bool mapping, const std::string& transport) {
        return joined(job, run_options(timeout, mapping, transport));
      },
      "job"_a, nb::kw_only(), "timeout"_a = 0.0, "mapping"_a = true, "transport"_a = "", Waits(), R"(
Joins the processes of ``job``.

timeout   : seconds that a call may wait; 0 is EXPAR_TIMEOUT, else 120
mapping   : off: rows travel as messages and not through shared memory
transport : "" is "shm"
Collective over the job's processes.
Raises BadArgument, Unsupported, Mismatch, Timeout (naming a rank that never came), PeerLost, IoError, NoMemory.)");
  m.def(
      "init",
      [](double timeout, bool mapping, const std::string& transport) {
        return joined(job_from_environment(), run_options(timeout, mapping, transport));
      },
      nb::kw_only(), "timeout"_a = 0.0, "mapping"_a = true, "transport"_a = "", Waits(), R"(
Joins the ranks that a launcher has started with this process: ``expar launch``, torchrun, mpirun, srun. Without a
launcher: one rank alone.

Collective over the job's processes. Raises: as job_from_environment() and join().)");
  m.def(
      "run_threads",
      [](int ranks, nb::typed<nb::callable, nb::object(Communicator)> rank_main, double timeout, bool mapping,
         const std::string& transport) {
        Threads(ranks, std::move(rank_main)).run(ranks, run_options(timeout, mapping, transport));
      },
      "ranks"_a, "rank_main"_a, nb::kw_only(), "timeout"_a = 0.0, "mapping"_a = true, "transport"_a = "", R"(
Runs ``rank_main(communicator)`` on ``ranks`` threads of this process and waits.

Raises the job's root cause, after every rank has ended: an exception of rank_main's own as it was raised; the other
ranks see it as Internal. Ctrl-C ends all ranks at their next wait.)");
}

}  // namespace expar::python
