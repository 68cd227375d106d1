// The signals that ask a launcher to stop, held back while it has children to take along.
#pragma once

#include <csignal>
#include <vector>

namespace expar::launch_detail {

/// From construction to destruction SIGHUP, SIGINT, SIGQUIT and SIGTERM do not interrupt the
/// calling thread, except those that it ignores anyway, and the ends of children can be waited for.
class HeldSignals {
 public:
  /// Throws Error: io.
  HeldSignals();
  /// What was put back or never taken is delivered now, as if it had just come.
  ~HeldSignals();
  HeldSignals(const HeldSignals&) = delete;
  HeldSignals& operator=(const HeldSignals&) = delete;

  /// The mask before, which children must start with.
  const sigset_t& mask_before() const { return before_; }
  /// Readable while a signal waits.
  int fd() const { return fd_; }
  std::vector<int> take();
  static void put_back(int signal) { raise(signal); }

 private:
  sigset_t before_{};
  struct sigaction child_before_ {};
  int fd_ = -1;
};

}  // namespace expar::launch_detail
