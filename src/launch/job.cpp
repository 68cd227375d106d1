// job_from_environment(): which job, which rank and of how many, in the words of five launchers.
#include <unistd.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <optional>
#include <string>
#include <string_view>

#include <expar/registry.h>

namespace expar {
namespace {

using Text = std::optional<std::string>;

Text variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? Text() : Text(value);
}

/// What a launcher is called, how its ranks are started, and the variables that show that it has been at work.
struct Launcher {
  const char* name;
  const char* start;
  std::array<const char*, 3> shown_by;  // null where it has fewer
};
constexpr Launcher kExpar{"expar", "expar launch -n N -- PROGRAM", {"EXPAR_JOB", "EXPAR_RANK", "EXPAR_SIZE"}};
constexpr Launcher kTorchrun{
    "torchrun", "torchrun --nproc-per-node N --no-python PROGRAM", {"TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE"}};
constexpr Launcher kOpenMpi{"openmpi", "mpirun -n N PROGRAM", {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"}};
constexpr Launcher kMpich{"mpich", "mpiexec -n N PROGRAM", {"PMI_RANK", "PMI_SIZE"}};
constexpr Launcher kSlurm{"slurm", "srun -n N PROGRAM", {"SLURM_PROCID"}};

bool is_shown(const Launcher& launcher) {
  return std::any_of(launcher.shown_by.begin(), launcher.shown_by.end(),
                     [](const char* name) { return name != nullptr && variable(name); });
}

/// "env -u A -u B PROGRAM": the program without the variables of this launcher.
std::string without(const Launcher& launcher) {
  std::string command = "env";
  for (const char* name : launcher.shown_by) {
    if (name != nullptr && variable(name)) command += std::string(" -u ") + name;
  }
  return command + " PROGRAM";
}

[[noreturn]] void fail(const std::string& message) {
  throw Error(ErrorCode::bad_argument, message, {.operation = "join"});
}

[[noreturn]] void refuse(const Launcher& launcher, const std::string& message) {
  fail(message + "; to start N ranks type '" + launcher.start + "', to run one alone '" + without(launcher) + "'");
}

std::string shown(const char* name, const std::string& value) { return std::string(name) + " = '" + value + "'"; }

std::optional<int> number(const Launcher& launcher, const char* name) {
  if (name == nullptr) return std::nullopt;
  const Text value = variable(name);
  if (!value) return std::nullopt;
  int result = 0;
  const char* end = value->data() + value->size();
  const auto parsed = std::from_chars(value->data(), end, result);
  if (parsed.ec != std::errc{} || parsed.ptr != end || result < 0) {
    refuse(launcher, shown(name, *value) + " is not a whole number");
  }
  return result;
}

int required(const Launcher& launcher, const char* name, const char* because) {
  const std::optional<int> value = number(launcher, name);
  if (!value) refuse(launcher, std::string(because) + " is set but " + name + " is not");
  return *value;
}

/// The names of a launcher's four numbers; null where it has none.
struct Names {
  const char* rank;
  const char* size;
  const char* local_rank = nullptr;
  const char* local_size = nullptr;
};

void check_below(const Launcher& launcher, const char* rank_name, int rank, const char* size_name, int size) {
  if (size >= 1 && rank < size) return;
  refuse(launcher, shown(rank_name, std::to_string(rank)) + " is not below " + shown(size_name, std::to_string(size)));
}

/// Without the local variables all ranks are taken to be on this host.
Job job_of(const Launcher& launcher, std::string id, const Names& names) {
  Job job{.launcher = launcher.name, .id = std::move(id)};
  job.rank = required(launcher, names.rank, names.size);
  job.size = required(launcher, names.size, names.rank);
  check_below(launcher, names.rank, job.rank, names.size, job.size);
  const std::optional<int> local_rank = number(launcher, names.local_rank);
  const std::optional<int> local_size = number(launcher, names.local_size);
  job.local_rank = local_rank.value_or(job.rank);
  job.local_size = local_size.value_or(job.size);
  if (local_rank.has_value() != local_size.has_value()) {
    refuse(launcher, std::string(local_rank ? names.local_rank : names.local_size) + " is set but " +
                         (local_rank ? names.local_size : names.local_rank) + " is not");
  }
  if (local_rank) check_below(launcher, names.local_rank, *local_rank, names.local_size, *local_size);
  if (job.local_size > job.size) {
    refuse(launcher, shown(names.local_size, std::to_string(job.local_size)) + " is above " +
                         shown(names.size, std::to_string(job.size)));
  }
  return job;
}

Job expar_job() {
  const Text id = variable("EXPAR_JOB");
  if (!id || id->empty()) {
    refuse(kExpar, "EXPAR_RANK or EXPAR_SIZE is set but EXPAR_JOB, the name of the job, is not");
  }
  return job_of(kExpar, "expar:" + *id, {"EXPAR_RANK", "EXPAR_SIZE", "EXPAR_LOCAL_RANK", "EXPAR_LOCAL_SIZE"});
}

/// Also of those who set torchrun's variables by hand: then the port of rank 0, which nobody else can have, names the
/// job.
Job torchrun_job() {
  const Text run = variable("TORCHELASTIC_RUN_ID");
  const Text port = variable("MASTER_PORT");
  required(kTorchrun, "RANK", run ? "TORCHELASTIC_RUN_ID" : "WORLD_SIZE");
  required(kTorchrun, "WORLD_SIZE", "RANK");
  if (!run && !port) {
    refuse(kTorchrun,
           "RANK and WORLD_SIZE are set but neither TORCHELASTIC_RUN_ID nor MASTER_PORT, which name the job");
  }
  // Every run without a name of its own is called "none": the port tells them apart. A restart must
  // not meet what is left of the run before.
  const std::string id = "torchrun:" + run.value_or("") + ":" + port.value_or("") + ":" +
                         variable("TORCHELASTIC_RESTART_COUNT").value_or("0");
  return job_of(kTorchrun, id, {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"});
}

Job openmpi_job() {
  Text space = variable("PMIX_NAMESPACE");
  if (!space) space = variable("OMPI_MCA_ess_base_jobid");  // Open MPI before 4.1
  if (!space || space->empty()) {
    refuse(kOpenMpi,
           "OMPI_COMM_WORLD_RANK or OMPI_COMM_WORLD_SIZE is set but PMIX_NAMESPACE, the name of the job, is not");
  }
  return job_of(
      kOpenMpi, "openmpi:" + *space,
      {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"});
}

std::string read_all(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

/// Fields of /proc/PID/stat after the name, which may hold anything: [0] is the state, [1] the
/// parent, [19] the start.
std::string stat_field(long pid, int index) {
  const std::string stat = read_all("/proc/" + std::to_string(pid) + "/stat");
  const std::size_t name_end = stat.rfind(')');
  if (name_end == std::string::npos) return {};
  std::size_t at = name_end + 2;
  for (; index > 0 && at != std::string::npos; --index) {
    at = stat.find(' ', at);
    if (at != std::string::npos) ++at;
  }
  return at == std::string::npos ? std::string() : stat.substr(at, stat.find(' ', at) - at);
}

/// Hydra gives the ranks of a host no common name, but one parent. It may stand several processes
/// above, since a rank can be started by a shell. A process of another user shows no environment:
/// it is no rank of this job.
std::string hydra_id() {
  for (long pid = getppid(); pid > 0;) {
    const std::string block = '\0' + read_all("/proc/" + std::to_string(pid) + "/environ");
    const std::string start = stat_field(pid, 19);
    if (start.empty()) break;
    if (block.find(std::string("\0PMI_RANK=", 10)) == std::string::npos) {
      return "mpich:" + std::to_string(pid) + ":" + start;
    }
    const std::string parent = stat_field(pid, 1);
    pid = parent.empty() ? 0 : std::atol(parent.c_str());
  }
  refuse(kMpich, "PMI_RANK is set but no process above this one is without it: this is no MPICH job");
}

/// What Slurm calls a step but is none: the shell of salloc and the script of sbatch are one
/// process of the whole allocation's size. Source: slurm.h, SLURM_INTERACTIVE_STEP and above.
constexpr std::uint64_t kFirstSpecialStep = 0xfffffffaU;

std::optional<Job> slurm_job() {
  const Text step = variable("SLURM_STEP_ID");
  const Text id = variable("SLURM_JOB_ID");
  if (!step || !id || !variable("SLURM_PROCID")) return std::nullopt;
  if (std::strtoull(step->c_str(), nullptr, 10) >= kFirstSpecialStep) return std::nullopt;
  const char* size = variable("SLURM_STEP_NUM_TASKS") ? "SLURM_STEP_NUM_TASKS" : "SLURM_NTASKS";
  // How many tasks this host has stands in SLURM_STEP_TASKS_PER_NODE, as "2(x3),1" with one item
  // for each host.
  Job job = job_of(kSlurm, "slurm:" + *id + ":" + *step, {"SLURM_PROCID", size});
  const std::optional<int> local_rank = number(kSlurm, "SLURM_LOCALID");
  const Text tasks = variable("SLURM_STEP_TASKS_PER_NODE");
  if (!local_rank || !tasks) return job;
  int node = number(kSlurm, "SLURM_NODEID").value_or(0);
  const char* at = tasks->c_str();
  while (*at != '\0') {
    char* end = nullptr;
    const long count = std::strtol(at, &end, 10);
    long times = 1;
    if (std::string_view(end).starts_with("(x")) times = std::strtol(end + 2, &end, 10);
    if (*end == ')') ++end;
    if (end == at) break;
    if (node < times) {
      job.local_rank = *local_rank;
      job.local_size = static_cast<int>(count);
      check_below(kSlurm, "SLURM_LOCALID", job.local_rank, "SLURM_STEP_TASKS_PER_NODE", job.local_size);
      return job;
    }
    node -= static_cast<int>(times);
    at = *end == ',' ? end + 1 : end;
  }
  refuse(kSlurm, shown("SLURM_STEP_TASKS_PER_NODE", *tasks) + " has no entry for SLURM_NODEID = '" +
                     variable("SLURM_NODEID").value_or("0") + "'");
}

Job mpich_job() { return job_of(kMpich, "", {"PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"}); }

/// A launcher may start one of its processes on each node, or just one, to start the ranks there: then the job is that
/// of the inner one.
bool may_have_started(const Job& outer, const Job& inner) {
  if (outer.size == 1 || (outer.rank == inner.rank && outer.size == inner.size)) return true;
  return inner.local_size * outer.size == inner.size && inner.rank / inner.local_size == outer.rank;
}

[[noreturn]] void contradiction(const Launcher& inner, const Job& a, const Launcher& outer, const Job& b) {
  const auto says = [](const Job& job) {
    return job.launcher + " says that this is rank " + std::to_string(job.rank) + " of " + std::to_string(job.size);
  };
  std::string command = outer.start;
  command.replace(command.find("PROGRAM"), std::string_view("PROGRAM").size(), without(inner));
  fail("two launchers contradict each other: " + says(a) + ", " + says(b) + "; use one of them: type '" + inner.start +
       "' or '" + command + "'");
}

}  // namespace

Job job_from_environment() {
  struct Way {
    const Launcher& launcher;
    Job (*job)();
  };
  // The innermost launcher first: torchrun and mpirun are themselves started by srun, never the
  // other way round.
  std::optional<Job> found;
  const Launcher* inner = nullptr;
  for (const Way& way :
       {Way{kExpar, expar_job}, Way{kTorchrun, torchrun_job}, Way{kOpenMpi, openmpi_job}, Way{kMpich, mpich_job}}) {
    if (!is_shown(way.launcher)) continue;
    Job job = way.job();
    if (found && !may_have_started(job, *found)) contradiction(*inner, *found, way.launcher, job);
    if (found) continue;
    found = std::move(job);
    inner = &way.launcher;
  }
  // Inside an allocation of Slurm's the step may be that of the other launcher's own processes: it contradicts nobody.
  if (!found) return slurm_job().value_or(Job{.launcher = "none", .id = "alone:" + std::to_string(getpid())});
  if (inner != &kMpich) return *found;
  // srun starts MPICH programs too, and then the job has a name.
  const std::optional<Job> slurm = slurm_job();
  if (slurm && slurm->rank == found->rank && slurm->size == found->size) return *slurm;
  found->id = hydra_id();
  return *found;
}

}  // namespace expar
