// Where the K results of each token lie.
#include "src/dispatch/results.h"

#include <cstring>
#include <string>

#include "src/util/shown.h"

namespace expar {
namespace {

std::size_t at(std::int64_t index) { return static_cast<std::size_t>(index); }

/// Exchanges results with the ranks that are not mapped: each sends a source its rows, expert by expert, which both
/// ends can work out from the plan. base[e]: where outbox row 0 of expert e's rank would lie in what arrived.
class Exchange {
 public:
  Exchange(const Communicator& communicator, const Operation& operation, const Plan& plan, const Outbox& own,
           std::size_t row_bytes)
      : communicator_(communicator), plan_(plan), row_bytes_(row_bytes), tag_(operation.sequence()) {
    std::size_t out = 0, in = 0;
    for_each_peer([&](int peer) {
      out += rows_for(peer);
      in += rows_from(peer);
    });
    staging_.resize(out * row_bytes);
    received.resize(in * row_bytes);
    start_.resize(at(plan.experts()));
    out = in = 0;
    for_each_peer([&](int peer) {
      const std::size_t sent = rows_for(peer), got = rows_from(peer);
      stage(peer, own, staging_.data() + out * row_bytes);
      expect(peer, received.data() + in * row_bytes);
      if (sent > 0)
        messages_.push_back({Message::Kind::send, peer, tag_, staging_.data() + out * row_bytes, sent * row_bytes});
      if (got > 0)
        messages_.push_back({Message::Kind::receive, peer, tag_, received.data() + in * row_bytes, got * row_bytes});
      out += sent;
      in += got;
    });
    if (messages_.empty()) return;
    const auto ticket = communicator.transport().start(messages_);
    communicator.wait([&] { return communicator.transport().test(ticket); }, operation.waiting(-1, "its results"));
  }

  /// Where the `nth` row of this rank for `expert` arrived.
  const std::byte* row(std::int64_t expert, std::int64_t nth) const {
    return start_[at(expert)] + at(nth) * row_bytes_;
  }

  std::vector<std::byte> received;

 private:
  template <class Visit>
  void for_each_peer(Visit visit) const {
    for (int peer = 0; peer < communicator_.size(); ++peer) {
      if (!communicator_.transport().mapped(peer)) visit(peer);
    }
  }
  std::int32_t count(int source, std::int64_t expert) const {
    return plan_.counts()[at(source) * at(plan_.experts()) + at(expert)];
  }
  std::size_t rows_between(int source, const ExpertRange& range) const {
    std::int64_t rows = 0;
    for (std::int64_t e = range.first; e < range.first + range.count; ++e) rows += count(source, e);
    return at(rows);
  }
  std::size_t rows_for(int source) const { return rows_between(source, plan_.local()); }
  std::size_t rows_from(int owner) const {
    return rows_between(communicator_.rank(), experts_of(owner, communicator_.size(), plan_.experts()));
  }

  void stage(int source, const Outbox& own, std::byte* to) const {
    const ExpertRange local = plan_.local();
    for (std::int64_t e = 0; e < local.count; ++e) {
      const std::size_t bytes = at(count(source, local.first + e)) * row_bytes_;
      if (bytes > 0) std::memcpy(to, own.block().data() + at(plan_.source_start(source, e)) * row_bytes_, bytes);
      to += bytes;
    }
  }
  void expect(int owner, const std::byte* from) {
    const ExpertRange range = experts_of(owner, communicator_.size(), plan_.experts());
    for (std::int64_t e = range.first; e < range.first + range.count; ++e) {
      start_[at(e)] = from;
      from += at(count(communicator_.rank(), e)) * row_bytes_;
    }
  }

  const Communicator& communicator_;
  const Plan& plan_;
  std::size_t row_bytes_;
  std::uint64_t tag_;
  std::vector<std::byte> staging_;
  std::vector<const std::byte*> start_;  // [E]
  std::vector<Message> messages_;
};

}  // namespace

Results::Results(const Communicator& communicator, const Operation& operation, const Plan& plan, const Outbox& own,
                 std::size_t row_bytes) {
  auto& transport = communicator.transport();
  std::vector<std::span<const std::byte>> outboxes(at(communicator.size()));
  bool all_mapped = true;
  for (int peer = 0; peer < communicator.size(); ++peer) {
    if (!transport.mapped(peer)) {
      all_mapped = false;
    } else if (peer == communicator.rank()) {
      outboxes[at(peer)] = {own.block().data(), own.block().size()};
    } else {
      outboxes[at(peer)] = shown_block(communicator, operation, peer);
    }
  }
  std::optional<Exchange> exchange;
  if (!all_mapped) exchange.emplace(communicator, operation, plan, own, row_bytes);

  slots_.resize(plan.slots().size());
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    const SlotRow slot = plan.slots()[i];
    if (slot.rank < 0) continue;
    if (!transport.mapped(slot.rank)) {
      const std::int64_t expert = plan.ids()[i];
      slots_[i] = exchange->row(expert, slot.row - plan.slot_start(expert));
      continue;
    }
    const auto outbox = outboxes[at(slot.rank)];
    const std::size_t offset = at(slot.row) * row_bytes;
    if (offset > outbox.size() || row_bytes > outbox.size() - offset) {
      communicator.fail(Error(ErrorCode::internal,
                              "rank " + std::to_string(slot.rank) + " showed an outbox of " +
                                  std::to_string(outbox.size()) + " bytes, too small for its plan",
                              {.rank = communicator.rank(),
                               .peer = slot.rank,
                               .operation = std::string(operation.waiting(-1, "").operation)}));
    }
    slots_[i] = outbox.data() + offset;
  }
  if (exchange) received_ = std::move(exchange->received);
}

}  // namespace expar
