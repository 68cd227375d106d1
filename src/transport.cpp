// Transport: what every wait has, whatever carries the bytes: its span in the trace, and its interruption.
#include <expar/transport.h>

namespace expar {
namespace {

/// Waits shorter than this are never asked about: the question may take a lock that others hold for a while.
constexpr Clock::duration kBetweenQuestions = std::chrono::milliseconds(20);

}  // namespace

void Transport::wait(FunctionRef<bool()> done, const Waiting& waiting) {
  if (trace_ == nullptr && !asked_) return wait_until(done, waiting);
  if (done()) return;
  const Phase phase(trace(),
                    {.kind = Span::Kind::wait, .name = waiting.operation, .what = waiting.what, .peer = waiting.peer});
  if (!asked_) return wait_until(done, waiting);
  Deadline question = Clock::now() + kBetweenQuestions;
  wait_until(
      [&] {
        if (done()) return true;
        if (Clock::now() < question) return false;
        if (asked_()) {
          throw abort(Error(ErrorCode::internal, "was interrupted", {rank_, -1, std::string(waiting.operation)}));
        }
        question = Clock::now() + kBetweenQuestions;
        return false;
      },
      waiting);
}

}  // namespace expar
