// Writes down what peers say in their frames, as if they had shared the memory.
#include "transports/carried/link.h"

#include <exception>
#include <utility>

#include "transports/shared/board.h"
#include "transports/shared/cause.h"

namespace expar::carried {
namespace {

using local::JobMemory;
using local::Presence;

constexpr std::size_t kNoRings = 0;

std::string name_of(int rank) { return "rank " + std::to_string(rank); }

}  // namespace

Link::Link(int rank, int size, std::shared_ptr<Carrier> carrier)
    : rank_(rank),
      pages_(local::Pages::anonymous(JobMemory::bytes(size, kNoRings))),
      memory_(pages_.bytes(), size, kNoRings),
      carrier_(std::move(carrier)),
      lost_(static_cast<std::size_t>(size)) {}

std::shared_ptr<Carrier> Link::carrier() {
  const std::lock_guard lock(mutex_);
  return carrier_;
}

void Link::send(const Frame& frame) {
  for (int peer = 0; peer < memory_.size(); ++peer) {
    if (peer != rank_) send(peer, frame);
  }
}

void Link::send(int peer, Frame frame) {
  try {
    if (const auto to = carrier()) to->send(peer, std::move(frame));
  } catch (...) {
    mark_lost(peer, current_error().message());
  }
}

std::optional<Lost> Link::find_lost() {
  const std::lock_guard lock(mutex_);
  for (std::size_t peer = 0; peer < lost_.size(); ++peer) {
    if (lost_[peer]) return Lost{static_cast<int>(peer), *lost_[peer]};
  }
  return std::nullopt;
}

void Link::leave() {
  send(bye_frame(std::uncaught_exceptions() > 0));
  std::shared_ptr<Carrier> last;
  {
    const std::lock_guard lock(mutex_);
    last.swap(carrier_);
  }
  try {
    if (last) last->close(local::cause(memory_).has_value());
  } catch (...) {  // the rank leaves all the same
  }
}

void Link::deliver(int peer, Frame frame) {
  check_peer(peer);
  try {
    take(peer, std::move(frame));
  } catch (const Error& error) {
    end_job(peer, Error(error.code(), name_of(peer) + " sent a frame that cannot be: " + error.message(),
                        {.rank = rank_, .peer = peer}));
  } catch (...) {
    end_job(peer, current_error({.rank = rank_, .peer = peer}));
  }
  ring_bell(memory_, rank_);
}

void Link::take(int peer, Frame frame) {
  local::RankArea& area = memory_.of(peer);
  switch (kind_of(frame)) {
    case FrameKind::line: {
      const ShownLine shown = read_line_frame(frame);
      write_text(area, shown.index, shown.text);
      write_line(area, shown.index, shown.line);
      break;
    }
    case FrameKind::message: {
      const MessageHead head = read_message_frame(frame);
      if (!local::cause(memory_)) letters_.add({{peer, head.tag}, std::move(frame), head.offset});
      break;
    }
    case FrameKind::cause:
      set_cause(memory_, peer, read_cause_frame(frame, memory_.size()));
      break;
    case FrameKind::bye:
      area.presence.store(read_bye_frame(frame) ? Presence::left_in_exception : Presence::left);
      break;
  }
}

void Link::lose(int peer, std::string_view why) {
  check_peer(peer);
  // A rank that leaves says so before its connections close.
  const Presence presence = memory_.of(peer).presence.load();
  if (presence != Presence::left && presence != Presence::left_in_exception) mark_lost(peer, why);
  ring_bell(memory_, rank_);
}

void Link::mark_lost(int peer, std::string_view why) {
  const std::lock_guard lock(mutex_);
  auto& lost = lost_[static_cast<std::size_t>(peer)];
  if (!lost) lost = why;
}

Error Link::end_job(int by, const Error& cause) {
  if (const auto already = local::cause(memory_)) return *already;
  Error settled = cause;
  try {
    if (const auto judge = carrier()) settled = judge->settle(cause);
  } catch (...) {  // who cannot ask keeps its own
  }
  const Error in_force = set_cause(memory_, by, settled);
  send(cause_frame(in_force));
  return in_force;
}

void Link::check_peer(int peer) const {
  if (peer >= 0 && peer < memory_.size() && peer != rank_) return;
  throw Error(ErrorCode::bad_argument,
              name_of(rank_) + " of " + std::to_string(memory_.size()) + " has no peer " + std::to_string(peer));
}

}  // namespace expar::carried
