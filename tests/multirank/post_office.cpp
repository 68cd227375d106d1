// Queues between threads.
#include "tests/multirank/post_office.h"

#include <utility>

namespace expar::test {

/// Where one rank posts and is posted to.
class PostOffice::Desk final : public Carrier {
 public:
  Desk(PostOffice& office, int rank) : office_(office), rank_(rank) {}
  void open(const Deliveries& to) override {
    office_.boxes_[static_cast<std::size_t>(rank_)].postman =
        std::thread([&office = office_, rank = rank_, to] { office.deliver(rank, to); });
  }
  void send(int peer, std::vector<std::byte> frame) override { office_.drop(peer, {rank_, std::move(frame), {}}); }
  Error settle(const Error& cause) override { return office_.settle(cause); }
  void close(bool /*failed*/) override { office_.close(rank_); }

 private:
  PostOffice& office_;
  int rank_;
};

PostOffice::PostOffice(int ranks) : boxes_(static_cast<std::size_t>(ranks)) {}

PostOffice::~PostOffice() {
  for (std::size_t rank = 0; rank < boxes_.size(); ++rank) {
    close(static_cast<int>(rank));
    if (boxes_[rank].postman.joinable()) boxes_[rank].postman.join();
  }
}

std::unique_ptr<Transport> PostOffice::transport(int rank) {
  return make_carried("carried", rank, static_cast<int>(boxes_.size()), std::make_shared<Desk>(*this, rank));
}

void PostOffice::lose(int rank, const std::string& why) {
  for (std::size_t to = 0; to < boxes_.size(); ++to) {
    if (static_cast<int>(to) != rank) drop(static_cast<int>(to), {rank, {}, why});
  }
}

void PostOffice::drop(int to, Item item) {
  Box& box = boxes_[static_cast<std::size_t>(to)];
  {
    const std::lock_guard lock(box.mutex);
    box.items.push_back(std::move(item));
  }
  box.news.notify_one();
}

void PostOffice::deliver(int rank, const Deliveries& to) {
  Box& box = boxes_[static_cast<std::size_t>(rank)];
  for (;;) {
    std::unique_lock lock(box.mutex);
    box.news.wait(lock, [&] { return box.closed || !box.items.empty(); });
    if (box.closed) return;
    std::deque<Item> items = std::exchange(box.items, {});
    lock.unlock();
    for (Item& item : items) {
      if (item.lost.empty()) {
        to.deliver(item.from, std::move(item.frame));
      } else {
        to.lost(item.from, item.lost);
      }
    }
  }
}

Error PostOffice::settle(const Error& cause) {
  const std::lock_guard lock(mutex_);
  if (!first_) first_ = cause;
  return *first_;
}

void PostOffice::close(int rank) {
  Box& box = boxes_[static_cast<std::size_t>(rank)];
  {
    const std::lock_guard lock(box.mutex);
    box.closed = true;
  }
  box.news.notify_one();
}

}  // namespace expar::test
