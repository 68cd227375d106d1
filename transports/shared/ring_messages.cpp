// The state machine of messages: headers, pieces, matching.
#include "transports/shared/ring_messages.h"

#include <algorithm>
#include <cstring>

namespace expar::local {
namespace {

struct Header {
  std::uint64_t tag;
  std::uint64_t bytes;
};

/// Headers start at multiples of their size, so that a free gap of that size always holds a whole one.
std::size_t padding(std::size_t bytes) { return (sizeof(Header) - bytes % sizeof(Header)) % sizeof(Header); }

template <class Posted>
auto first_with_tag(Posted& posted, std::uint64_t tag) {
  return std::find_if(posted.begin(), posted.end(), [tag](const auto& entry) { return entry.message.tag == tag; });
}

}  // namespace

RingMessages::RingMessages(const JobMemory& job, int rank) : Messages(rank, job.size()), job_(job) {
  peers_.reserve(static_cast<std::size_t>(job.size()));
  for (int peer = 0; peer < job.size(); ++peer) peers_.emplace_back(job, rank, peer);
}

void RingMessages::post(const Message& message, Ticket ticket) {
  Peer& peer = peers_[static_cast<std::size_t>(message.peer)];
  if (message.kind == Message::Kind::send) {
    peer.sends.push_back({message, ticket});
  } else {
    peer.receives.push_back({message, ticket});
  }
}

bool RingMessages::advance() {
  bool moved = false;
  for (int other = 0; other < job_.size() && !idle(); ++other) {
    Peer& peer = peers_[static_cast<std::size_t>(other)];
    if (other == rank()) {
      moved |= advance_self(peer);
      continue;
    }
    moved |= advance_sends(peer, other);
    moved |= advance_receives(peer, other);
  }
  return moved;
}

bool RingMessages::advance_self(Peer& self) {
  bool moved = false;
  for (auto receive = self.receives.begin(); receive != self.receives.end();) {
    const auto send = first_with_tag(self.sends, receive->message.tag);
    if (send == self.sends.end()) {
      ++receive;
      continue;
    }
    check_size(receive->message, send->message.bytes);
    if (send->message.bytes > 0) {
      std::memmove(receive->message.data, send->message.data, send->message.bytes);
    }
    complete(send->ticket);
    complete(receive->ticket);
    self.sends.erase(send);
    receive = self.receives.erase(receive);
    moved = true;
  }
  return moved;
}

bool RingMessages::advance_sends(Peer& peer, int to) {
  bool moved = false;
  while (!peer.sends.empty()) {
    Send& send = peer.sends.front();
    const Message& message = send.message;
    if (!send.header_sent) {
      if (peer.out.space() < sizeof(Header)) break;
      const Header header{message.tag, message.bytes};
      peer.out.write(reinterpret_cast<const std::byte*>(&header), sizeof header);
      send.header_sent = moved = true;
    }
    const std::size_t n = peer.out.write(message.data + send.sent, message.bytes - send.sent);
    send.sent += n;
    moved |= n > 0;
    if (send.sent < message.bytes) break;
    // Space comes in multiples of a header and so does what is written up to here: the padding fits.
    peer.out.skip(padding(message.bytes));
    complete(send.ticket);
    peer.sends.pop_front();
  }
  if (moved) {
    peer.out.commit();
    ring_bell(job_, to);
  }
  return moved;
}

// Takes the next header if something is to be done about it.
bool RingMessages::begin_incoming(Peer& peer) {
  if (peer.receives.empty() || peer.in.available() < sizeof(Header)) return false;
  Header header;
  peer.in.look(reinterpret_cast<std::byte*>(&header), sizeof header);
  peer.in.skip(sizeof header);
  Incoming incoming{header.tag, header.bytes, 0, std::nullopt};
  const auto receive = first_with_tag(peer.receives, header.tag);
  if (receive != peer.receives.end()) {
    check_size(receive->message, header.bytes);
    incoming.target = *receive;
    peer.receives.erase(receive);
  } else {
    peer.aside.push_back({header.tag, {}, false});
  }
  peer.incoming = incoming;
  return true;
}

bool RingMessages::advance_receives(Peer& peer, int from) {
  bool moved = match_aside(peer);
  bool consumed = false;
  while (peer.incoming || begin_incoming(peer)) {
    Incoming& incoming = *peer.incoming;
    const std::size_t n = std::min(peer.in.available(), incoming.bytes - incoming.received);
    if (incoming.target) {
      peer.in.look(incoming.target->message.data + incoming.received, n);
    } else {
      // Grows with what has come, not with what the header claims.
      std::vector<std::byte>& data = peer.aside.back().data;
      data.resize(incoming.received + n);
      peer.in.look(data.data() + incoming.received, n);
    }
    incoming.received += n;
    peer.in.skip(n);
    consumed = true;
    if (incoming.received < incoming.bytes) break;
    // The padding was written together with the last byte.
    peer.in.skip(padding(incoming.bytes));
    if (incoming.target) {
      complete(incoming.target->ticket);
    } else {
      peer.aside.back().complete = true;
    }
    peer.incoming.reset();
    match_aside(peer);
  }
  if (consumed) {
    peer.in.commit();
    ring_bell(job_, from);
  }
  return moved || consumed;
}

bool RingMessages::match_aside(Peer& peer) {
  bool moved = false;
  for (auto aside = peer.aside.begin(); aside != peer.aside.end();) {
    const auto receive = first_with_tag(peer.receives, aside->tag);
    if (!aside->complete || receive == peer.receives.end()) {
      ++aside;
      continue;
    }
    check_size(receive->message, aside->data.size());
    if (!aside->data.empty()) {
      std::memcpy(receive->message.data, aside->data.data(), aside->data.size());
    }
    complete(receive->ticket);
    peer.receives.erase(receive);
    aside = peer.aside.erase(aside);
    moved = true;
  }
  return moved;
}

}  // namespace expar::local
