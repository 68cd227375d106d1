// Operation: one collective on this rank, from taking its number to touching no peer any more.
#include <expar/operation.h>

#include <algorithm>
#include <bit>
#include <exception>
#include <new>

#include "src/communicator/state.h"
#include "src/util/mix.h"

namespace expar {
namespace {

// Words of a ready line: the signature's hash, 0 or the code of an error and where it arose, then what the operation
// shows.
constexpr std::size_t kHashWord = 0;
constexpr std::size_t kStatusWord = 1;
constexpr std::size_t kFirstUserWord = 2;

/// What cannot be started, and why. An error that another operation found keeps the rank that it names.
struct Status {
  ErrorCode code;
  int rank;

  std::uint64_t word() const { return (static_cast<std::uint64_t>(rank) << 32) + static_cast<std::uint64_t>(code) + 1; }
  static Status of(std::uint64_t word) {
    return {static_cast<ErrorCode>((word & 0xffffffff) - 1), static_cast<int>(word >> 32)};
  }
};

std::uint64_t mix_text(std::uint64_t hash, std::string_view text) {
  for (const char c : text) hash = mix(hash, static_cast<unsigned char>(c));
  return hash;
}

}  // namespace

Signature& Signature::with(std::string_view field, std::int64_t value) {
  fields_.at(count_++) = {field, value};
  return *this;
}

Signature& Signature::with_real(std::string_view field, double value) {
  fields_.at(count_++) = {field, std::bit_cast<std::int64_t>(value), true};
  return *this;
}

Signature& Signature::with_list(std::string_view field, std::span<const std::int64_t> values) {
  std::uint64_t hash = mix(0, static_cast<std::uint64_t>(values.size()));
  for (const std::int64_t value : values) hash = mix(hash, static_cast<std::uint64_t>(value));
  return with(field, static_cast<std::int64_t>(hash >> 1));
}

std::uint64_t Signature::hash() const {
  std::uint64_t hash = mix_text(0, operation_);
  for (std::size_t i = 0; i < count_; ++i)
    hash = mix(mix_text(hash, fields_[i].name), static_cast<std::uint64_t>(fields_[i].value));
  return hash;
}

std::string Signature::str() const {
  std::string text(operation_);
  for (std::size_t i = 0; i < count_; ++i) {
    const auto& [name, value, is_real] = fields_[i];
    text += (i == 0 ? " (" : ", ") + std::string(name) + " " +
            (is_real ? std::to_string(std::bit_cast<double>(value)) : std::to_string(value));
  }
  return count_ == 0 ? text : text + ")";
}

Operation::Operation(const Communicator& communicator, const Signature& signature)
    : communicator_(communicator),
      signature_(signature),
      lines_(communicator_.state_->group->members.size(), communicator.memory().get()),
      words_(lines_.size(), communicator.memory().get()),
      missing_(communicator.size()),
      unwinding_(std::uncaught_exceptions()) {
  auto& state = *communicator_.state_;
  const Group& group = *state.group;
  if (const auto failure = communicator.transport().failure()) throw *failure;
  if (state.next - state.lowest >= group.slots()) {
    communicator_.fail(
        Error(ErrorCode::bad_argument,
              std::to_string(group.slots()) + " operations are in flight; finish one before the next is started",
              {.rank = communicator_.job_rank(communicator_.rank()), .operation = std::string(name())}));
  }
  sequence_ = state.next++;
  ready_line_ = state.ready_line(sequence_);
  given_line_ = state.given_line(sequence_);
  state.open |= state.open_bit(sequence_);

  // The lines of this operation were those of the one `slots` before it: nobody may still read them.
  if (sequence_ < state.reusable + group.slots()) return;
  for (int peer = 0; peer < group.size(); ++peer) {
    const auto finished = [&] { return group.peek(peer, kCompletedLine).sequence + group.slots() > sequence_; };
    communicator_.wait(finished, waiting(peer, "to finish an earlier operation"));
  }
  state.reusable = completed_by_all(group);
}

Operation::~Operation() {
  if (completed_) return;
  auto& state = *communicator_.state_;
  if (work_ != nullptr) std::erase(state.rank->in_flight, work_);
  // While an exception unwinds, it is the cause, and whoever catches it at the rank's end tells the others.
  if (communicator_.transport().failure() || std::uncaught_exceptions() > unwinding_) return;
  communicator_.transport().abort(
      Error(ErrorCode::internal, "left " + signature_.str() + " before it was finished",
            {.rank = communicator_.job_rank(communicator_.rank()), .operation = std::string(name())}));
}

Operation::Words Operation::show(Block& block, std::uint64_t first, std::uint64_t second) const {
  block.last_use_ = std::max(block.last_use_, sequence_);
  return {block.ref().segment, block.ref().offset, block.size(), first, second};
}

Block Operation::room(std::size_t bytes) const {
  if (bytes == 0) return {};
  Block block = communicator_.allocate(bytes);
  block.last_use_ = sequence_;
  return block;
}

std::uint64_t Operation::number() const {
  return sequence_ * kPlaces + static_cast<std::uint64_t>(communicator_.state_->group->place);
}

void Operation::ready(FunctionRef<Words()> prepare) {
  Line line{.sequence = sequence_};
  std::string text;
  line.words[kHashWord] = signature_.hash();
  const auto refuse = [&](ErrorCode code, std::string message, int rank = -1) {
    line.words[kStatusWord] = Status{code, rank < 0 ? communicator_.job_rank(communicator_.rank()) : rank}.word();
    text = std::move(message);
  };
  try {
    if (communicator_.declines()) throw Error(*communicator_.refusal_);
    const Words words = prepare();
    std::copy(words.begin(), words.end(), line.words.begin() + kFirstUserWord);
  } catch (const Error& error) {
    if (error.fatal() || communicator_.transport().failure()) throw;
    refuse(error.code(), error.message(), error.rank());
  } catch (const std::bad_alloc&) {
    refuse(ErrorCode::no_memory, "no memory to start " + signature_.str());
  }
  communicator_.state_->group->publish(ready_line_, line, text);
}

bool Operation::seen(int peer) {
  auto& line = lines_[static_cast<std::size_t>(peer)];
  if (line.sequence == sequence_) return true;
  line = communicator_.state_->group->peek(peer, ready_line_);
  if (line.sequence != sequence_) return false;
  std::copy_n(line.words.begin() + kFirstUserWord, words_[0].size(), words_[static_cast<std::size_t>(peer)].begin());
  --missing_;
  return true;
}

bool Operation::agreed() {
  for (int peer = 0; missing_ > 0 && peer < communicator_.size(); ++peer) {
    if (!seen(peer)) return false;
  }
  return std::all_of(lines_.begin(), lines_.end(), [&](const Line& line) {
    return line.words[kStatusWord] == 0 && line.words[kHashWord] == lines_[0].words[kHashWord];
  });
}

void Operation::meet() {
  const auto unseen = [&](int job_rank) {
    const auto& members = communicator_.state_->group->members;
    const auto found = std::find(members.begin(), members.end(), job_rank);
    return found != members.end() && !seen(static_cast<int>(found - members.begin()));
  };
  const FunctionRef<bool(int)> awaited(unseen);
  for (int peer = 0; missing_ > 0 && peer < communicator_.size(); ++peer) {
    if (seen(peer)) continue;
    Waiting wait = waiting(peer, "to start");
    wait.awaited = &awaited;
    communicator_.wait([&] { return seen(peer); }, wait);
  }
  check_agreement();
}

void Operation::check_agreement() {
  for (int rank = 0; rank < communicator_.size(); ++rank) {
    const std::uint64_t status = lines_[static_cast<std::size_t>(rank)].words[kStatusWord];
    if (status == 0) continue;
    const std::string message = communicator_.state_->group->text(rank, ready_line_);
    complete();
    const auto [code, named] = Status::of(status);
    throw Error(code, message, {.rank = named, .operation = std::string(name())});
  }
  for (int rank = 1; rank < communicator_.size(); ++rank) {
    if (lines_[static_cast<std::size_t>(rank)].words[kHashWord] != lines_[0].words[kHashWord]) throw_mismatch(rank);
  }
}

void Operation::throw_mismatch(int other) {
  // Every rank has seen the same lines and comes here; the descriptions travel only now that they are needed.
  const Group& group = *communicator_.state_->group;
  group.publish(given_line_, Line{.sequence = sequence_}, signature_.str());
  await_given(0, "to say what it is doing");
  await_given(other, "to say what it is doing");
  const auto runs = [&](int rank) {
    return "rank " + std::to_string(group.job_rank(rank)) + " runs " + group.text(rank, given_line_);
  };
  const std::string message = "ranks disagree: " + runs(0) + ", " + runs(other);
  complete();
  communicator_.throw_alike(Error(ErrorCode::mismatch, message, {.rank = other, .peer = 0}));
}

void Operation::gave_all() { communicator_.state_->group->publish(given_line_, Line{.sequence = sequence_}); }

bool Operation::has_given(int peer) const {
  return communicator_.state_->group->peek(peer, given_line_).sequence == sequence_;
}

void Operation::await_given(int peer, std::string_view what) {
  communicator_.wait([&] { return has_given(peer); }, waiting(peer, what));
}

void Operation::complete() {
  if (completed_) return;
  completed_ = true;
  auto& state = *communicator_.state_;
  if (work_ != nullptr) std::erase(state.rank->in_flight, work_);
  state.open &= ~state.open_bit(sequence_);
  if (sequence_ != state.lowest) return;
  while (state.lowest < state.next && (state.open & state.open_bit(state.lowest)) == 0) ++state.lowest;
  state.group->publish(kCompletedLine, Line{.sequence = state.lowest});
}

void Operation::keep_advancing(InFlight* work) {
  work_ = work;
  communicator_.state_->rank->in_flight.push_back(work);
}

Waiting Operation::waiting(int peer, std::string_view what) const {
  return {.peer = communicator_.job_rank(peer), .operation = name(), .what = what, .limit = communicator_.timeout()};
}

std::pmr::vector<Operation::Words> meet(const Communicator& communicator, const Signature& signature,
                                        FunctionRef<Operation::Words()> prepare) {
  Operation operation(communicator, signature);
  operation.ready(prepare);
  operation.meet();
  operation.complete();
  std::pmr::vector<Operation::Words> words(communicator.memory().get());
  for (int rank = 0; rank < communicator.size(); ++rank) words.push_back(operation.words(rank));
  return words;
}

}  // namespace expar
