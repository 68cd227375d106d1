// A transport that passes everything on to another one: for tests that look at what goes by, or spoil it.
#pragma once

#include <memory>

#include <expar/transport.h>

namespace expar::test {

class Forwarding : public Transport {
 public:
  explicit Forwarding(std::unique_ptr<Transport> to)
      : Transport(to->name(), to->rank(), to->size()), to_(std::move(to)) {}
  void publish(int index, const Line& line, std::string_view text) override { to_->publish(index, line, text); }
  Line peek(int peer, int index) const override { return to_->peek(peer, index); }
  std::string text(int peer, int index) const override { return to_->text(peer, index); }
  Error abort(const Error& cause) override { return to_->abort(cause); }
  std::optional<Error> failure() const override { return to_->failure(); }
  Segment grow(std::size_t bytes) override { return to_->grow(bytes); }
  bool mapped(int peer) const override { return to_->mapped(peer); }
  std::span<std::byte> map(int peer, std::uint32_t id) override { return to_->map(peer, id); }
  Ticket start(std::span<const Message> messages) override { return to_->start(messages); }
  bool test(Ticket ticket) override { return to_->test(ticket); }

 protected:
  void wait_until(FunctionRef<bool()> done, const Waiting& waiting) override { to_->wait(done, waiting); }

 private:
  std::unique_ptr<Transport> to_;
};

}  // namespace expar::test
