// Communicator: the handle of a set of ranks, and its patience.
#include <expar/communicator.h>

#include <cmath>
#include <cstdlib>
#include <utility>

#include "src/communicator/state.h"
#include "src/util/check.h"

namespace expar {
namespace {

constexpr std::chrono::seconds kDefaultTimeout{120};

}  // namespace

std::chrono::nanoseconds default_timeout() {
  const char* text = std::getenv("EXPAR_TIMEOUT");
  if (text == nullptr) return kDefaultTimeout;
  char* end = nullptr;
  const double seconds = std::strtod(text, &end);
  if (end == text || *end != '\0' || !(seconds > 0) || seconds > 1e9) {
    refuse("EXPAR_TIMEOUT is \"" + std::string(text) + "\", not a number of seconds above 0");
  }
  return std::chrono::nanoseconds(std::llround(seconds * 1e9));
}

Communicator::Communicator(std::unique_ptr<Transport> transport, std::chrono::nanoseconds timeout) {
  if (timeout.count() < 0) refuse("the timeout of a communicator is negative");
  timeout_ = timeout.count() > 0 ? timeout : default_timeout();
  state_ = std::make_shared<State>(std::move(transport));
}

Communicator Communicator::with_timeout(std::chrono::nanoseconds timeout) const {
  if (timeout.count() <= 0) refuse("a timeout is not above 0");
  return Communicator(state_, timeout);
}

int Communicator::rank() const { return state_->transport->rank(); }
int Communicator::size() const { return state_->transport->size(); }
int Communicator::job_rank(int rank) const { return state_->job_rank(rank); }
std::string_view Communicator::transport_name() const { return state_->transport->name(); }
Transport& Communicator::transport() const { return *state_->transport; }
Arena& Communicator::arena() const { return state_->arena; }
const std::shared_ptr<std::pmr::memory_resource>& Communicator::memory() const { return state_->memory; }

void Communicator::abort(std::string_view message) const {
  state_->transport->abort(Error(ErrorCode::internal, std::string(message), {.rank = job_rank(rank())}));
}

void Communicator::record(std::shared_ptr<Trace> trace) const { state_->rank->job->record(std::move(trace)); }
Trace* Communicator::trace() const { return state_->rank->job->trace(); }

void Communicator::fail(const Error& cause) const { throw state_->transport->abort(cause); }

void Communicator::blame(int peer, std::string_view operation, std::string_view did, ErrorCode code) const {
  fail(Error(code, "rank " + std::to_string(job_rank(peer)) + " " + std::string(did),
             {.rank = job_rank(rank()), .peer = job_rank(peer), .operation = std::string(operation)}));
}

void Communicator::throw_alike(const Error& error) const {
  const auto of_job = [&](int rank) { return rank < 0 ? rank : job_rank(rank); };
  throw Error(error.code(), error.message(), {of_job(error.rank()), of_job(error.peer()), error.operation()});
}

void Communicator::wait(FunctionRef<bool()> done, const Waiting& waiting) const {
  state_->transport->wait(
      [&] {
        for (InFlight* work : state_->rank->in_flight) work->advance();
        return done();
      },
      waiting);
}

}  // namespace expar
