// The checks that only ask the system: processors, limits, launchers, memory nodes.
#include "cli/checks.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <optional>
#include <sstream>

#include "cli/output.h"

namespace expar::cli {
namespace {

constexpr double kGib = 1 << 30;
/// Below this, arenas of real models do not fit.
constexpr double kLittleMemory = 1 * kGib;
/// A socket and a pidfd to every peer.
constexpr std::uint64_t kFilesPerRank = 2;
/// What a process has open besides: seven to meet, and a few of its own.
constexpr std::uint64_t kOtherFiles = 16;

std::string decimal(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f", value);
  return text;
}

std::string gib(double bytes) { return decimal(bytes / kGib) + " GiB"; }

std::string counted(int count, const char* thing) {
  return std::to_string(count) + " " + thing + (count == 1 ? "" : "s");
}

std::uint64_t limit_of(int resource) {
  rlimit limit{};
  return getrlimit(static_cast<__rlimit_resource>(resource), &limit) == 0 ? limit.rlim_cur : 0;
}

std::string shown_limit(std::uint64_t bytes) {
  return bytes == RLIM_INFINITY ? "no limit" : decimal(static_cast<double>(bytes) / (1 << 20)) + " MiB";
}

bool has_sealed_memory() {
  const int fd = static_cast<int>(syscall(SYS_memfd_create, "expar", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (fd < 0) return false;
  const bool sealed =
      ftruncate(fd, 4096) == 0 && fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0;
  close(fd);
  return sealed;
}

bool has_futex() {
  std::uint32_t word = 1;
  // The word is not 0, so a working futex refuses to sleep.
  return syscall(SYS_futex, &word, FUTEX_WAIT, 0, nullptr, nullptr, 0) != 0 && errno == EAGAIN;
}

bool has_pidfd() {
  const int fd = static_cast<int>(syscall(SYS_pidfd_open, getpid(), 0));
  if (fd >= 0) close(fd);
  return fd >= 0;
}

std::optional<double> number_in(const std::string& path) {
  std::ifstream file(path);
  double value = 0;
  return file >> value ? std::optional(value) : std::nullopt;
}

/// MemAvailable of /proc/meminfo, in bytes.
double available_memory() {
  std::ifstream file("/proc/meminfo");
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with("MemAvailable:")) return std::strtod(line.c_str() + 13, nullptr) * 1024;
  }
  return 0;
}

/// What the narrowest of this process's control groups leaves, in bytes; nothing where none has a limit. Shared memory
/// counts against it.
std::optional<double> left_by_control_groups() {
  std::optional<double> least;
  const auto see = [&](const std::string& folder, const char* limit_file, const char* usage_file) {
    const auto limit = number_in(folder + limit_file);  // "max" is no number
    const auto usage = number_in(folder + usage_file);
    if (!limit || !usage || *limit > 0x1p60) return;  // version 1 says "no limit" by a huge one
    least = std::min(least.value_or(*limit), std::max(0.0, *limit - *usage));
  };
  std::ifstream file("/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    const bool second = line.starts_with("0::");
    const std::size_t at = second ? 3 : line.find(":memory:") + 8;
    if (!second && line.find(":memory:") == std::string::npos) continue;
    for (std::string group = line.substr(at);; group.resize(group.rfind('/'))) {
      if (group == "/") group.clear();
      if (second) {
        see("/sys/fs/cgroup" + group, "/memory.max", "/memory.current");
      } else {
        see("/sys/fs/cgroup/memory" + group, "/memory.limit_in_bytes", "/memory.usage_in_bytes");
      }
      if (group.find('/') == std::string::npos) break;
    }
  }
  return least;
}

bool is_in_path(const std::string& program) {
  const char* path = std::getenv("PATH");
  std::istringstream folders(path == nullptr ? "" : path);
  for (std::string folder; std::getline(folders, folder, ':');) {
    if (access((std::filesystem::path(folder) / program).c_str(), X_OK) == 0) return true;
  }
  return false;
}

/// By name, and by which program each is known.
struct Program {
  const char* launcher;
  std::vector<const char*> names;
};
const std::vector<Program>& programs() {
  static const std::vector<Program> all = {{"openmpi", {"mpirun.openmpi", "orterun", "prterun"}},
                                           {"mpich", {"mpirun.mpich", "mpiexec.hydra"}},
                                           {"torchrun", {"torchrun"}},
                                           {"slurm", {"srun"}}};
  return all;
}

std::vector<std::string> installed_launchers() {
  std::vector<std::string> found = {"expar"};
  for (const Program& program : programs()) {
    if (std::any_of(program.names.begin(), program.names.end(), is_in_path)) found.emplace_back(program.launcher);
  }
  return found;
}

}  // namespace

void Check::note(std::string why, std::string what_to_do) {
  verdict = Verdict::note;
  reason = std::move(why);
  advice = std::move(what_to_do);
}

void Check::problem(std::string why, std::string what_to_do) {
  note(std::move(why), std::move(what_to_do));
  verdict = Verdict::problem;
}

nlohmann::json Check::json() const {
  if (verdict == Verdict::ok) return {{"name", name}, {"verdict", "ok"}, {"found", found}};
  return {{"name", name},
          {"verdict", verdict == Verdict::note ? "note" : "problem"},
          {"found", found},
          {"reason", reason},
          {"advice", advice}};
}

Check check_cores(const Machine& machine, const Common& common) {
  const int cores = machine.usable_cores;
  Check check("cores", std::to_string(cores) + " of " + std::to_string(machine.cores));
  if (machine.quota > 0) check.found += ", a quota of " + decimal(machine.quota);
  if (machine.quota > 0 && machine.quota < cores) {
    check.note("the control group gives time for " + decimal(machine.quota) + " of " + std::to_string(cores) +
                   " cores, and stops all of them when it is used up",
               "start at most " + counted(std::max(1, static_cast<int>(machine.quota)), "rank") +
                   " of one thread, or have the quota raised");
  } else if (common.ranks > cores) {
    check.note(counted(common.ranks, "rank") + " share " + counted(cores, "core") + ": each waits for its turn",
               "for speed start at most " + counted(cores, "rank") + "; for tests this is fine");
  }
  return check;
}

Check check_instruction_sets(const std::string& backend) {
  const std::vector<std::string> isas = available_isas(backend);
  Check check("instruction sets", "has " + joined(isas));
  try {
    check.found += "; takes " + std::string(find_kernels(backend).isa);
  } catch (const Error& error) {
    check.problem(error.message(), "unset EXPAR_ISA, or set it to one of them; what follows was tried without it");
    return check;
  }
  utsname system{};
  const bool x86 = uname(&system) == 0 && std::string(system.machine) == "x86_64";
  if (x86 && backend == "cpu" && isas.size() == 1) {
    check.note("this processor shows no AVX2: GEMMs take several times longer",
               "in a virtual machine, have it show the features of the host's processor");
  }
  return check;
}

Check check_shared_memory() {
  const std::optional<double> left = left_by_control_groups();
  const double memory = left ? std::min(*left, available_memory()) : available_memory();
  const std::uint64_t file_size = limit_of(RLIMIT_FSIZE);
  Check check("shared memory", gib(memory) + " free" + (left ? ", bounded by the control group" : ""));
  check.found +=
      file_size == RLIM_INFINITY ? "; needs nothing of /dev/shm" : "; segments of at most " + shown_limit(file_size);
  if (!has_sealed_memory()) {
    check.problem("the kernel refuses memfd_create with seals, so that processes cannot share memory",
                  "take --transport threads, or allow the call (seccomp of a container)");
  } else if (file_size != RLIM_INFINITY) {
    check.problem("the limit of file sizes holds for shared memory, too: a larger segment kills its rank",
                  "type 'ulimit -f unlimited'");
  } else if (memory < kLittleMemory) {
    check.note("less than " + gib(kLittleMemory) + " is left for arenas and weights",
               left ? "have the control group's limit of memory raised" : "end other programs");
  }
  return check;
}

Check check_address_space() {
  const std::uint64_t limit = limit_of(RLIMIT_AS);
  Check check("address space", shown_limit(limit));
  if (limit != RLIM_INFINITY) {
    check.note("each rank maps the arenas of all others beside its own memory", "type 'ulimit -v unlimited'");
  }
  return check;
}

Check check_locked_memory() { return {"locked memory", shown_limit(limit_of(RLIMIT_MEMLOCK)) + "; expar locks none"}; }

Check check_open_files(const Machine& machine, const Common& common) {
  rlimit files{};
  if (getrlimit(RLIMIT_NOFILE, &files) != 0 || files.rlim_cur == RLIM_INFINITY) return {"open files", "no limit"};
  const std::uint64_t ranks = files.rlim_cur > kOtherFiles ? (files.rlim_cur - kOtherFiles) / kFilesPerRank : 0;
  const int wanted = std::max({common.ranks, machine.usable_cores, 1});
  Check check("open files", std::to_string(files.rlim_cur) + ", enough for " + std::to_string(ranks) +
                                (ranks == 1 ? " rank" : " ranks"));
  if (ranks < static_cast<std::uint64_t>(wanted)) {
    const std::uint64_t least = static_cast<std::uint64_t>(wanted) * kFilesPerRank + kOtherFiles;
    const std::string type = "type 'ulimit -n " + std::to_string(least) + "'";
    check.problem(
        "not enough for " + counted(wanted, "rank"),
        least <= files.rlim_max ? type : "as root " + type + ": the hard limit is " + std::to_string(files.rlim_max));
  }
  return check;
}

Check check_waiting() {
  Check check("waiting", std::string("futex ") + (has_futex() ? "works" : "fails") + ", pidfd " +
                             (has_pidfd() ? "works" : "is missing"));
  if (!has_futex()) {
    check.problem("ranks cannot sleep until another wakes them", "allow the call futex (seccomp of a container)");
  } else if (!has_pidfd()) {
    check.problem("a rank whose forked child outlives it is not noticed to have died before its time limit",
                  "take Linux 5.3 or later, or allow the call pidfd_open (seccomp of a container)");
  }
  try {
    check.found += ", at most " + decimal(std::chrono::duration<double>(default_timeout()).count()) + " s";
  } catch (const Error& error) {
    check.problem(error.message(), "unset EXPAR_TIMEOUT, or set it to seconds; what follows was tried without it");
  }
  return check;
}

nlohmann::json launchers() {
  nlohmann::json object = {{"installed", installed_launchers()}};
  try {
    const Job job = job_from_environment();
    object["environment"] = job.launcher;
    object["rank"] = job.rank;
    object["ranks"] = job.size;
  } catch (const Error& error) {
    object["problem"] = error.message();
  }
  return object;
}

Check check_launchers() {
  Check check("launchers", joined(installed_launchers()) + "; ");
  try {
    const Job job = job_from_environment();
    check.found += job.launcher == "none" ? "none has started this process"
                                          : job.launcher + " has started this as rank " + std::to_string(job.rank) +
                                                " of " + std::to_string(job.size);
  } catch (const Error& error) {
    const std::string& message = error.message();
    const std::size_t end = message.find("; ");  // after it, what to type
    check.found += "the environment contradicts itself";
    check.problem(message.substr(0, end), end == std::string::npos ? "start a new shell" : message.substr(end + 2));
  }
  return check;
}

int numa_nodes() {
  int nodes = 0;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator("/sys/devices/system/node", error)) {
    const std::string name = entry.path().filename();
    nodes +=
        name.starts_with("node") && name.find_first_not_of("0123456789", 4) == std::string::npos && name.size() > 4;
  }
  return std::max(nodes, 1);
}

Check check_numa() {
  const int nodes = numa_nodes();
  Check check("NUMA", counted(nodes, "node"));
  if (nodes > 1) {
    check.note("memory of another node is slower, and expar binds no rank to one",
               "bind each rank: 'mpirun --map-by numa --bind-to numa', or numactl");
  }
  return check;
}

nlohmann::json limits() {
  nlohmann::json object = {{"available_memory", static_cast<std::uint64_t>(available_memory())},
                           {"sealed_memory", has_sealed_memory()},
                           {"futex", has_futex()},
                           {"pidfd", has_pidfd()}};
  const auto add = [&](const char* name, std::uint64_t limit) {
    if (limit != RLIM_INFINITY) object[name] = limit;
  };
  add("open_files", limit_of(RLIMIT_NOFILE));
  add("locked_memory", limit_of(RLIMIT_MEMLOCK));
  add("file_size", limit_of(RLIMIT_FSIZE));
  add("address_space", limit_of(RLIMIT_AS));
  if (const auto left = left_by_control_groups()) object["control_group_memory"] = static_cast<std::uint64_t>(*left);
  return object;
}

}  // namespace expar::cli
