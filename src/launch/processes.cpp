// fork, exec, kill and wait for the ranks of a job.
#include "src/launch/processes.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string_view>

#include <expar/error.h>

#include "src/launch/report.h"

extern char** environ;

namespace expar::launch_detail {
namespace {

/// What a child that could not become the program says before it exits.
struct ExecError {
  int rank = 0;
  int number = 0;
};

Error cannot_start(std::string message) { return {ErrorCode::io, std::move(message), {.operation = "launch"}}; }

/// This process's environment, with this job's variables in place of any others of their kind.
std::vector<std::string> environment(int rank, int ranks, const Start& start) {
  const std::string names[] = {
      "EXPAR_JOB=", "EXPAR_RANK=", "EXPAR_SIZE=", "EXPAR_LOCAL_RANK=", "EXPAR_LOCAL_SIZE=", "EXPAR_REPORT_FD="};
  std::vector<std::string> variables;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    bool replaced = false;
    for (const std::string& name : names) {
      replaced = replaced || std::string_view(*entry).starts_with(name);
    }
    if (!replaced) variables.emplace_back(*entry);
  }
  const std::string values[] = {start.job,
                                std::to_string(rank),
                                std::to_string(ranks),
                                std::to_string(rank),
                                std::to_string(ranks),
                                start.report_variable};
  for (std::size_t i = 0; i < std::size(names); ++i) variables.push_back(names[i] + values[i]);
  return variables;
}

std::vector<char*> pointers(std::vector<std::string>& strings) {
  std::vector<char*> result;
  for (std::string& string : strings) result.push_back(string.data());
  result.push_back(nullptr);
  return result;
}

/// In the child. Only calls that are safe after fork() in a process with threads.
[[noreturn]] void become(int rank, pid_t launcher, const Start& start, char* const* command, char* const* variables,
                         int exec_errors) {
  // The launcher may have died before the first line: then nobody would send the signal any more.
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != launcher) _exit(127);
  if (rank != 0) {
    const int null = open("/dev/null", O_RDONLY);
    if (null > 0) {
      dup2(null, STDIN_FILENO);
      close(null);
    }
  }
  fcntl(start.report_fd, F_SETFD, 0);
  sigprocmask(SIG_SETMASK, &start.signals, nullptr);
  execvpe(command[0], command, variables);
  const ExecError error{rank, errno};
  [[maybe_unused]] const ssize_t written = write(exec_errors, &error, sizeof error);
  _exit(127);
}

std::string read_all(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

bool has_variable(pid_t pid, const std::string& variable) {
  const std::string block = '\0' + read_all("/proc/" + std::to_string(pid) + "/environ");
  return block.find('\0' + variable + '\0') != std::string::npos;
}

/// The living children of this process, whoever started them.
std::vector<pid_t> living_children() {
  std::vector<pid_t> children;
  DIR* processes = opendir("/proc");
  if (processes == nullptr) return children;
  while (const dirent* entry = readdir(processes)) {
    const pid_t pid = std::atoi(entry->d_name);
    if (pid <= 0) continue;
    // "PID (NAME) STATE PPID ...", where NAME may hold anything.
    const std::string stat = read_all("/proc/" + std::string(entry->d_name) + "/stat");
    const std::size_t end = stat.rfind(')');
    if (end == std::string::npos || end + 4 >= stat.size()) continue;
    if (std::atoi(stat.c_str() + end + 4) == getpid()) children.push_back(pid);
  }
  closedir(processes);
  return children;
}

void wait_for(pid_t pid) {
  while (waitpid(pid, nullptr, 0) < 0 && errno == EINTR) {
  }
}

}  // namespace

Processes::Processes(int ranks, const Start& start) : job_(start.job) {
  prctl(PR_GET_CHILD_SUBREAPER, &was_subreaper_);
  // What a rank leaves behind when it dies comes to this process instead of to init.
  prctl(PR_SET_CHILD_SUBREAPER, 1);
  int pipe_ends[2];
  try {
    if (pipe2(pipe_ends, O_CLOEXEC) != 0) {
      throw cannot_start(std::string("cannot make a pipe: ") + std::strerror(errno));
    }
    pids_.resize(static_cast<std::size_t>(ranks));
    try {
      for (int rank = 0; rank < ranks; ++rank) start_rank(rank, start, pipe_ends[1]);
    } catch (...) {
      close(pipe_ends[0]);
      close(pipe_ends[1]);
      throw;
    }
    close(pipe_ends[1]);
    check_started(start.command.front(), pipe_ends[0]);
  } catch (...) {
    end();
    throw;
  }
}

Processes::~Processes() { end(); }

void Processes::start_rank(int rank, const Start& start, int exec_errors) {
  // All memory is taken before fork(): another thread may hold the allocator's lock.
  std::vector<std::string> command = start.command;
  std::vector<std::string> variables = environment(rank, static_cast<int>(pids_.size()), start);
  const std::vector<char*> command_pointers = pointers(command);
  const std::vector<char*> variable_pointers = pointers(variables);
  const pid_t launcher = getpid();
  const pid_t pid = fork();
  if (pid == 0) {
    become(rank, launcher, start, command_pointers.data(), variable_pointers.data(), exec_errors);
  }
  if (pid < 0) {
    throw cannot_start("cannot start rank " + std::to_string(rank) + ": " + std::strerror(errno));
  }
  pids_[static_cast<std::size_t>(rank)] = pid;
  ++running_;
  const long pidfd = syscall(SYS_pidfd_open, pid, 0);
  if (pidfd >= 0) pidfds_.push_back(static_cast<int>(pidfd));
}

/// Returns once every child has become the program: the pipe closes when exec succeeds.
void Processes::check_started(const std::string& program, int exec_errors) {
  ExecError error;
  ssize_t bytes = 0;
  while ((bytes = read(exec_errors, &error, sizeof error)) < 0 && errno == EINTR) {
  }
  close(exec_errors);
  if (bytes == static_cast<ssize_t>(sizeof error)) {
    throw cannot_start("cannot start " + program + ": " + std::strerror(error.number));
  }
  if (pidfds_.size() == pids_.size()) return;
  for (const int fd : pidfds_) close(fd);
  pidfds_.clear();
}

std::vector<Processes::Exit> Processes::reap() {
  std::vector<Exit> exits;
  for (std::size_t rank = 0; rank < pids_.size(); ++rank) {
    if (pids_[rank] == 0) continue;
    int status = 0;
    const pid_t pid = waitpid(pids_[rank], &status, WNOHANG);
    if (pid == 0 || (pid < 0 && errno == EINTR)) continue;
    // Reaped by another thread of the caller: it has ended, but how is not known.
    if (pid < 0) status = W_EXITCODE(255, 0);
    pids_[rank] = 0;
    --running_;
    if (!pidfds_.empty()) {
      close(pidfds_[rank]);
      pidfds_[rank] = -1;  // poll ignores it
    }
    exits.push_back({static_cast<int>(rank), status});
  }
  return exits;
}

void Processes::signal(int number) {
  for (const pid_t pid : pids_) {
    if (pid != 0) kill(pid, number);
  }
}

void Processes::end() {
  signal(SIGKILL);
  for (pid_t& pid : pids_) {
    if (pid != 0) wait_for(pid);
    pid = 0;
  }
  running_ = 0;
  for (const int fd : pidfds_) {
    if (fd >= 0) close(fd);
  }
  pidfds_.clear();
  end_orphans();
  prctl(PR_SET_CHILD_SUBREAPER, was_subreaper_);
}

void Processes::end_orphans() {
  // Without any child at all there is nothing to look for.
  siginfo_t info{};
  if (waitid(P_ALL, 0, &info, WEXITED | WNOHANG | WNOWAIT) != 0 && errno == ECHILD) return;
  // An orphan's own children come up when it dies, so look until there are none.
  for (bool found = true; found;) {
    found = false;
    for (const pid_t pid : living_children()) {
      if (!has_variable(pid, "EXPAR_JOB=" + job_)) continue;
      kill(pid, SIGKILL);
      wait_for(pid);
      found = true;
    }
  }
}

}  // namespace expar::launch_detail
