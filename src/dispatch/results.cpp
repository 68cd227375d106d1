// Where the K results of each token lie.
#include "src/dispatch/results.h"

#include <cstring>
#include <string>
#include <utility>

#include "src/dispatch/plan_data.h"
#include "src/util/check.h"

namespace expar {
namespace {

/// Rows that `source` has for `expert`.
std::size_t count(const Plan& plan, int source, std::int64_t expert) {
  return at(plan.counts()[at(source) * at(plan.experts()) + at(expert)]);
}

std::size_t count(const Plan& plan, int source, const ExpertRange& range) {
  std::size_t rows = 0;
  for (std::int64_t e = range.first; e < range.first + range.count; ++e) rows += count(plan, source, e);
  return rows;
}

}  // namespace

Results::Results(const Operation& operation, const Plan& plan, const RowOrder& order, const Outbox& own,
                 RowParts&& parts)
    : operation_(operation),
      plan_(plan),
      order_(order),
      own_(own),
      parts_(std::move(parts)),
      slots_(operation.communicator().memory().get()),
      arrived_(at(plan.experts()), nullptr, operation.communicator().memory().get()) {
  exchange();
}

/// Copies what `peer` reads of this rank's results, expert by expert; returns the end of it.
std::byte* Results::stage(int peer, std::byte* stage) const {
  const ByteRange part = parts_.of[at(peer)];
  for (std::int64_t e = 0; e < plan_.local().count; ++e) {
    const std::byte* row = own_.block().data() + at(order_.source_start(peer, e)) * parts_.row_bytes + part.offset;
    for (std::size_t i = count(plan_, peer, plan_.local().first + e); i > 0 && part.bytes > 0; --i) {
      std::memcpy(stage, row, part.bytes);
      row += parts_.row_bytes;
      stage += part.bytes;
    }
  }
  return stage;
}

/// Sends each source that is not mapped its rows, expert by expert: an order that both ends know from the plan.
void Results::exchange() {
  const Communicator& communicator = operation_.communicator();
  const int self = communicator.rank();
  const std::size_t part_bytes = parts_.of[at(self)].bytes;
  std::vector<int> peers;
  std::size_t sent = 0, received = 0;
  for (int peer = 0; peer < communicator.size(); ++peer) {
    if (communicator.mapped(peer)) continue;
    peers.push_back(peer);
    sent += count(plan_, peer, plan_.local()) * parts_.of[at(peer)].bytes;
    received += count(plan_, self, plan_.held_by(peer)) * part_bytes;
  }
  staging_ = operation_.room(sent);
  received_ = operation_.room(received);

  std::byte* staged = staging_.data();
  std::byte* arrival = received_.data();
  for (const int peer : peers) {
    const std::byte* first_sent = staged;
    staged = stage(peer, staged);
    transfers_.send(peer, first_sent, static_cast<std::size_t>(staged - first_sent));

    std::byte* first_received = arrival;
    const ExpertRange theirs = plan_.held_by(peer);
    for (std::int64_t e = theirs.first; e < theirs.first + theirs.count; ++e) {
      arrived_[at(e)] = arrival;
      arrival += count(plan_, self, e) * part_bytes;
    }
    transfers_.receive(peer, first_received, static_cast<std::size_t>(arrival - first_received));
  }
  transfers_.start(operation_);
}

const void* const* Results::finish() {
  transfers_.finish(operation_, "its results");
  const Communicator& communicator = operation_.communicator();
  const std::size_t row_bytes = parts_.row_bytes;
  const ByteRange part = parts_.of[at(communicator.rank())];
  std::pmr::vector<std::span<const std::byte>> outboxes(at(communicator.size()), communicator.memory().get());
  for (int peer = 0; peer < communicator.size(); ++peer) {
    if (peer == communicator.rank()) {
      outboxes[at(peer)] = {own_.block().data(), own_.block().size()};
    } else if (communicator.mapped(peer)) {
      outboxes[at(peer)] = shown_block(operation_, peer);
    }
  }
  slots_.reserve(at(plan_.data().bound * plan_.topk()));
  slots_.assign(plan_.slots().size(), nullptr);
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    const SlotRow slot = plan_.slots()[i];
    if (slot.rank < 0 || part.bytes == 0) continue;
    const std::int64_t expert = plan_.ids()[i];
    if (const std::byte* first = arrived_[at(expert)]) {
      slots_[i] = first + at(slot.row - plan_.data().slot_start_of(expert)) * part.bytes;
      continue;
    }
    const auto outbox = outboxes[at(slot.rank)];
    const std::size_t offset = at(order_.row(slot.row, expert)) * row_bytes;
    if (offset > outbox.size() || row_bytes > outbox.size() - offset) {
      communicator.blame(slot.rank, operation_.name(),
                         "showed an outbox of " + std::to_string(outbox.size()) + " bytes, too small for its plan");
    }
    slots_[i] = outbox.data() + offset + part.offset;
  }
  return slots_.data();
}

}  // namespace expar
