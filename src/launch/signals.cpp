// Signals read from a descriptor instead of a handler, so that nothing global is needed.
#include "src/launch/signals.h"

#include <sys/signalfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>

#include <expar/error.h>

namespace expar::launch_detail {

HeldSignals::HeldSignals() {
  sigset_t held;
  sigemptyset(&held);
  for (const int signal : {SIGHUP, SIGINT, SIGQUIT, SIGTERM}) {
    struct sigaction action {};
    sigaction(signal, nullptr, &action);
    // nohup and background jobs ignore some: their ranks must not get them from here.
    if (action.sa_handler != SIG_IGN) sigaddset(&held, signal);
  }
  fd_ = signalfd(-1, &held, SFD_CLOEXEC | SFD_NONBLOCK);
  if (fd_ < 0) {
    throw Error(ErrorCode::io, std::string("cannot wait for signals: ") + std::strerror(errno),
                {.operation = "launch"});
  }
  pthread_sigmask(SIG_BLOCK, &held, &before_);
  // A process that ignores SIGCHLD never learns how its children ended.
  struct sigaction child {};
  child.sa_handler = SIG_DFL;
  sigaction(SIGCHLD, nullptr, &child_before_);
  if (child_before_.sa_handler == SIG_IGN) sigaction(SIGCHLD, &child, nullptr);
}

HeldSignals::~HeldSignals() {
  sigaction(SIGCHLD, &child_before_, nullptr);
  close(fd_);
  pthread_sigmask(SIG_SETMASK, &before_, nullptr);
}

std::vector<int> HeldSignals::take() {
  std::vector<int> signals;
  signalfd_siginfo info;
  while (read(fd_, &info, sizeof info) == static_cast<ssize_t>(sizeof info)) {
    signals.push_back(static_cast<int>(info.ssi_signo));
  }
  return signals;
}

}  // namespace expar::launch_detail
