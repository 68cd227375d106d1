// Letters and those who wait for them.
#include "transports/carried/mailbox.h"

#include <cstring>
#include <optional>
#include <utility>

namespace expar::carried {
namespace {

/// The oldest entry of `key`, which is no longer waiting.
template <class Map, class Key>
auto take_first(Map& waiting, const Key& key) {
  using Entry = typename Map::mapped_type::value_type;
  const auto found = waiting.find(key);
  if (found == waiting.end()) return std::optional<Entry>();
  std::optional<Entry> first(std::move(found->second.front()));
  found->second.pop_front();
  if (found->second.empty()) waiting.erase(found);
  return first;
}

}  // namespace

void Letters::add(Letter letter) {
  const std::lock_guard lock(mutex_);
  letters_.push_back(std::move(letter));
}

std::vector<Letter> Letters::take_all() {
  const std::lock_guard lock(mutex_);
  return std::exchange(letters_, {});
}

void Mailbox::post(const Message& message, Ticket ticket) {
  const Key key{message.peer, message.tag};
  if (message.kind == Message::Kind::receive) {
    const Receive receive{message, ticket};
    if (const auto letter = take_first(letters_, key)) {
      hand_over(*letter, receive);
    } else {
      receives_[key].push_back(receive);
    }
    return;
  }
  Frame frame = message_frame(message.tag, {message.data, message.bytes});
  if (message.peer == rank()) {
    const std::size_t offset = read_message_frame(frame).offset;
    come_.add({key, std::move(frame), offset});
  } else {
    send_(message.peer, std::move(frame));
  }
  complete(ticket);  // the frame has it all
}

bool Mailbox::advance() {
  std::vector<Letter> come = come_.take_all();
  for (Letter& letter : come) {
    if (const auto receive = take_first(receives_, letter.key)) {
      hand_over(letter, *receive);
    } else {
      letters_[letter.key].push_back(std::move(letter));
    }
  }
  return !come.empty();
}

void Mailbox::hand_over(const Letter& letter, const Receive& receive) {
  const std::size_t bytes = letter.frame.size() - letter.offset;
  check_size(receive.message, bytes);
  if (bytes > 0) std::memcpy(receive.message.data, letter.frame.data() + letter.offset, bytes);
  complete(receive.ticket);
}

}  // namespace expar::carried
