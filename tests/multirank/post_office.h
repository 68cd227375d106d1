// Carries frames between the ranks of one process, as a network would: each rank has a thread that delivers to it what
// others have sent, in order.
#pragma once

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include <expar/carried.h>

namespace expar::test {

class PostOffice {
 public:
  explicit PostOffice(int ranks);
  ~PostOffice();
  PostOffice(const PostOffice&) = delete;
  PostOffice& operator=(const PostOffice&) = delete;

  /// Once per rank.
  std::unique_ptr<Transport> transport(int rank);
  /// `rank` is cut off: all others hear of it, after what it has sent so far.
  void lose(int rank, const std::string& why);

 private:
  class Desk;
  struct Item {
    int from;
    std::vector<std::byte> frame;
    std::string lost;  // why, where there is no frame
  };
  struct Box {
    std::mutex mutex;
    std::condition_variable news;
    std::deque<Item> items;
    bool closed = false;
    std::thread postman;
  };

  void drop(int to, Item item);
  void deliver(int rank, const Deliveries& to);
  Error settle(const Error& cause);
  void close(int rank);

  std::deque<Box> boxes_;
  std::mutex mutex_;
  std::optional<Error> first_;  // guarded by mutex_
};

}  // namespace expar::test
