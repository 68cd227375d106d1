// The processes of one job: started in rank order, watched, ended, with nothing of them left
// behind.
#pragma once

#include <sys/types.h>

#include <csignal>
#include <string>
#include <vector>

namespace expar::launch_detail {

/// How to start the ranks of a job.
struct Start {
  std::vector<std::string> command;
  std::string job;              // the same for all ranks, and of no other job
  std::string report_variable;  // what the ranks find in kReportVariable
  int report_fd = -1;           // the one descriptor they inherit beside stdin, stdout and stderr
  sigset_t signals{};           // the signal mask they start with
};

/// Direct children of this process, one for each rank. The kernel kills them when the thread that
/// started them ends, whatever ends it; the destructor kills and reaps those that still run.
class Processes {
 public:
  struct Exit {
    int rank = 0;
    int status = 0;  // as waitpid gives it
  };

  /// Throws Error: io (no more processes, or the program cannot be started; it names the rank or
  /// the program).
  Processes(int ranks, const Start& start);
  ~Processes();
  Processes(const Processes&) = delete;
  Processes& operator=(const Processes&) = delete;

  int running() const { return running_; }
  /// Descriptors that become readable when a child ends; empty where the system has none, so that
  /// waits must be short.
  const std::vector<int>& pidfds() const { return pidfds_; }
  /// The children that have ended since the last call. Never waits.
  std::vector<Exit> reap();
  void signal(int number);
  /// Kills what still runs and waits for it, then does the same to what the children have left:
  /// processes of this job that were handed up to this one. Others' processes are not touched.
  void end();

 private:
  void start_rank(int rank, const Start& start, int exec_errors);
  void check_started(const std::string& program, int exec_errors);
  void end_orphans();

  std::string job_;
  std::vector<pid_t> pids_;  // by rank; 0 once reaped
  std::vector<int> pidfds_;
  int running_ = 0;
  int was_subreaper_ = 0;
};

}  // namespace expar::launch_detail
