// Communicator: the handle of a set of ranks, and its patience.
#include <expar/communicator.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <numeric>
#include <utility>

#include "src/communicator/state.h"
#include "src/util/check.h"

namespace expar {
namespace {

constexpr std::chrono::seconds kDefaultTimeout{120};
constexpr std::size_t kLargestKept = 4 << 20;  // as libstdc++'s pools at most; more comes from the system

Group whole_job(std::shared_ptr<Transport> transport) {
  std::vector<int> members(static_cast<std::size_t>(transport->size()));
  std::iota(members.begin(), members.end(), 0);
  const int rank = transport->rank();
  return {.transport = std::move(transport), .members = std::move(members), .rank = rank};
}

}  // namespace

RankState::RankState(std::shared_ptr<Transport> transport)
    : arena(std::make_shared<Arena>(std::move(transport))),
      memory(std::make_shared<std::pmr::synchronized_pool_resource>(
          std::pmr::pool_options{.max_blocks_per_chunk = 4, .largest_required_pool_block = kLargestKept})) {}

Communicator::State::State(std::shared_ptr<RankState> r, Group g, std::uint64_t first)
    : rank(std::move(r)),
      group(std::make_shared<const Group>(std::move(g))),
      next(first),
      lowest(first),
      reusable(first) {
  rank->places |= std::uint32_t{1} << group->place;
}

Communicator::State::~State() {
  if (group->place == 0) return;  // nobody else uses the job's lines
  rank->places &= ~(std::uint32_t{1} << group->place);
  rank->last_of_gone = std::max(rank->last_of_gone, next);
}

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
  const std::shared_ptr<Transport> shared = std::move(transport);
  state_ = std::make_shared<State>(std::make_shared<RankState>(shared), whole_job(shared), 1);
}

Communicator Communicator::with_timeout(std::chrono::nanoseconds timeout) const {
  if (timeout.count() <= 0) refuse("a timeout is not above 0");
  Communicator copy = *this;
  copy.timeout_ = timeout;
  return copy;
}

Communicator Communicator::declining(const Error& error) const {
  Communicator copy = *this;
  copy.refusal_ = std::make_shared<const Error>(error);
  return copy;
}

int Communicator::rank() const { return state_->group->rank; }
int Communicator::size() const { return state_->group->size(); }
int Communicator::job_rank(int rank) const { return state_->group->job_rank(rank); }
std::string_view Communicator::transport_name() const { return transport().name(); }
Transport& Communicator::transport() const { return *state_->group->transport; }
bool Communicator::mapped(int peer) const { return transport().mapped(job_rank(peer)); }
Block Communicator::allocate(std::size_t bytes) const { return state_->rank->arena->allocate(bytes, state_->group); }
std::size_t Communicator::arena_bytes() const { return state_->rank->arena->capacity(); }
const std::shared_ptr<std::pmr::memory_resource>& Communicator::memory() const { return state_->rank->memory; }

void Communicator::abort(std::string_view message) const {
  transport().abort(Error(ErrorCode::internal, std::string(message), {.rank = job_rank(rank())}));
}

void Communicator::record(std::shared_ptr<Trace> trace) const { transport().record(std::move(trace)); }
Trace* Communicator::trace() const { return transport().trace(); }
void Communicator::interrupt_by(std::function<bool()> asked) const { transport().interrupt_by(std::move(asked)); }

void Communicator::fail(const Error& cause) const { throw transport().abort(cause); }

void Communicator::blame(int peer, std::string_view operation, std::string_view did, ErrorCode code) const {
  fail(Error(code, "rank " + std::to_string(job_rank(peer)) + " " + std::string(did),
             {.rank = job_rank(rank()), .peer = job_rank(peer), .operation = std::string(operation)}));
}

void Communicator::throw_alike(const Error& error) const {
  const auto of_job = [&](int rank) { return rank < 0 ? rank : job_rank(rank); };
  throw Error(error.code(), error.message(), {of_job(error.rank()), of_job(error.peer()), error.operation()});
}

void Communicator::wait(FunctionRef<bool()> done, const Waiting& waiting) const {
  transport().wait(
      [&] {
        for (InFlight* work : state_->rank->in_flight) work->advance();
        return done();
      },
      waiting);
}

}  // namespace expar
