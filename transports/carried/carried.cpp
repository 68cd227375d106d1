// The transport of a rank whose peers write to its memory by frames; what it shows goes to each of them as one.
#include <expar/carried.h>

#include <deque>
#include <string>

#include "transports/carried/link.h"
#include "transports/shared/board.h"
#include "transports/shared/local_transport.h"

namespace expar {
namespace {

using carried::Link;
using local::Pages;

/// Those who deliver need cores too, so no rank spins while it waits.
constexpr int kNoCores = 0;

class CarriedTransport final : public local::LocalTransport {
 public:
  CarriedTransport(std::string_view name, const std::shared_ptr<Link>& link)
      : LocalTransport(name, link->rank(), link->memory(), kNoCores,
                       std::make_unique<carried::Mailbox>(
                           link->rank(), link->memory().size(), link->letters(),
                           [link](int peer, carried::Frame frame) { link->send(peer, std::move(frame)); })),
        link_(link) {
    self().presence.store(local::Presence::here);
  }

  ~CarriedTransport() override {
    if (!forked()) link_->leave();
  }

  void publish(int index, const Line& line, std::string_view text) override {
    LocalTransport::publish(index, line, text);
    link_->send(carried::line_frame({index, line, local::cut(text)}));
  }

  Error abort(const Error& cause) override { return forked() ? cause : link_->end_job(rank(), cause); }

  Segment grow(std::size_t bytes) override {
    check();
    segments_.push_back(Pages::anonymous(bytes));
    return {static_cast<std::uint32_t>(segments_.size() - 1), segments_.back().bytes()};
  }

  bool mapped(int peer) const override { return peer == rank(); }

  std::span<std::byte> map(int peer, std::uint32_t id) override {
    check();
    const std::string name = "rank " + std::to_string(peer);
    if (!mapped(peer)) throw Error(ErrorCode::internal, name + " is not mapped", {rank(), peer});
    if (id < segments_.size()) return segments_[id].bytes();
    throw Error(ErrorCode::internal, name + " has no segment " + std::to_string(id), {rank(), peer});
  }

 private:
  std::optional<Dead> find_dead() override {
    if (auto lost = link_->find_lost()) return Dead{lost->rank, std::move(lost->why)};
    return std::nullopt;
  }

  std::shared_ptr<Link> link_;
  std::deque<Pages> segments_;
};

}  // namespace

void Deliveries::deliver(int peer, std::vector<std::byte> frame) const { link_->deliver(peer, std::move(frame)); }

void Deliveries::lost(int peer, std::string_view why) const { link_->lose(peer, why); }

void Deliveries::leave() const { link_->leave(); }

std::unique_ptr<Transport> make_carried(std::string_view name, int rank, int size, std::shared_ptr<Carrier> carrier) {
  if (size < 1 || rank < 0 || rank >= size) {
    throw Error(ErrorCode::bad_argument, "there is no rank " + std::to_string(rank) + " of " + std::to_string(size));
  }
  const auto link = std::make_shared<Link>(rank, size, carrier);
  auto transport = std::make_unique<CarriedTransport>(name, link);
  carrier->open(Deliveries(link));
  return transport;
}

}  // namespace expar
