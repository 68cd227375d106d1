// What is built in, by name, and the ways for ranks to find each other.
#pragma once

#include <chrono>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <expar/communicator.h>
#include <expar/kernels.h>

namespace expar {

/// The transports and backends of this build that work on this machine. Absent ones are not listed.
/// Cost: each transport is tried, which may take a few system calls.
std::vector<std::string> available_transports();
std::vector<std::string> available_backends();
/// The names of all transports, also of those that do not work here.
std::vector<std::string> known_transports();
/// True where the ranks of `transport` are processes, false where they are threads of one.
/// Throws Error: unsupported (it does not work here: why, and which do).
bool has_processes(std::string_view transport);
/// The instruction sets of a backend that this processor runs, best first; none of a backend that is not there.
std::vector<std::string> available_isas(std::string_view backend);

/// The kernels of `backend`; empty entries are filled from `reference`. `isa` "" takes EXPAR_ISA, else the best.
/// Throws Error: unsupported (no such backend or instruction set here, with those that are).
Kernels find_kernels(std::string_view backend, std::string_view isa = {});

struct RunOptions {
  std::chrono::nanoseconds timeout{0};  // 0: default_timeout()
  /// Off: peers do not address each other's memory and rows travel as messages. For tests, and for machines that forbid
  /// it.
  bool mapping = true;
  std::string transport = {};  // "": "threads" of run_threads(), "shm" of join()
};

/// Runs `rank_main` on `ranks` threads of this process, each with its communicator, and waits. A rank dies when its
/// function leaves or throws; what it throws becomes the cause on all ranks.
/// Throws the job's root cause, after every rank has returned; no_memory is one where a thread cannot be started.
/// Before any starts, Error: bad_argument (no ranks, a timeout below 0, a transport whose ranks are processes),
/// unsupported (no such transport here), as default_timeout().
void run_threads(int ranks, const std::function<void(Communicator)>& rank_main, const RunOptions& options = {});

/// Which job this process belongs to, as its launcher says in the environment.
struct Job {
  std::string launcher;  // "expar", "torchrun", "openmpi", "mpich", "slurm", "none"
  std::string id;        // the same for all ranks of this job and no other job on this host
  int rank = 0;
  int size = 1;
  int local_rank = 0;
  int local_size = 1;
};

/// Reads the variables of `expar launch`, torchrun (and of those who set RANK, WORLD_SIZE and MASTER_PORT themselves),
/// Open MPI, MPICH and Slurm. Without any of them: rank 0 of 1.
/// Throws Error: bad_argument (variables that are missing or contradict each other, naming them and what to type).
Job job_from_environment();

/// Joins the processes of `job`.
/// Collective over the job's processes.
/// Throws Error: bad_argument (no such rank, two processes of one rank, a timeout below 0, a transport whose ranks are
/// threads), unsupported (no such transport here, ranks on several hosts), mismatch (processes disagree on the job, or
/// are other builds of expar), timeout (naming a rank that never came), peer_lost (naming one that died meanwhile), io
/// (sockets, the limit of open files), no_memory, as default_timeout().
/// Cost: one memory mapping and a socket to each other rank.
Communicator join(const Job& job, const RunOptions& options = {});

/// The one line by which a program joins the ranks that a launcher has started with it: `expar launch`, torchrun,
/// mpirun of Open MPI or MPICH, srun. Without a launcher: one rank alone. Programs under it need nothing else.
/// Collective over the job's processes. Throws Error: as job_from_environment() and join().
inline Communicator init(const RunOptions& options = {}) { return join(job_from_environment(), options); }

/// Starts `ranks` processes of `command` on this host in rank order, waits for them, and leaves none behind.
/// Returns the error of the root cause if any failed (a rank that was killed: peer_lost naming it), else nothing.
/// The children find their rank by job_from_environment() and may hand over their error by report_error(). SIGINT and
/// its like go to the children; they take effect here when none is left.
/// Throws Error: bad_argument (no ranks, no program), io (signals or sockets that the system refuses). Returns io too
/// where a process cannot be started.
std::optional<Error> launch(int ranks, const std::vector<std::string>& command);

/// In a process started by launch(): hands the error that ends this rank to the launcher. Elsewhere: does nothing.
void report_error(const Error& error) noexcept;

}  // namespace expar
