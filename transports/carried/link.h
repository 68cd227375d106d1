// What one rank has of its peers, used by the rank and by those who deliver to it: the job's memory, as the peers'
// frames write it, the letters that have come, and the carrier.
#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <expar/carried.h>

#include "transports/carried/frame.h"
#include "transports/carried/mailbox.h"
#include "transports/shared/job_memory.h"
#include "transports/shared/pages.h"

namespace expar::carried {

struct Lost {
  int rank;
  std::string why;
};

class Link {
 public:
  Link(int rank, int size, std::shared_ptr<Carrier> carrier);

  int rank() const { return rank_; }
  const local::JobMemory& memory() const { return memory_; }
  Letters& letters() { return letters_; }

  // ---- by the rank

  /// To all peers.
  void send(const Frame& frame);
  void send(int peer, Frame frame);
  /// A peer of which nothing will come any more, if there is one.
  std::optional<Lost> find_lost();

  // ---- by who delivers

  void deliver(int peer, Frame frame);
  void lose(int peer, std::string_view why);

  // ---- by both

  /// Says so to all peers and lets the carrier go. Nothing, where the rank has left.
  void leave();

  /// Settles `cause` with the peers, tells them, and returns what is in force. `by`: this rank, or the peer whose
  /// frames the calling thread delivers.
  Error end_job(int by, const Error& cause);

 private:
  void check_peer(int peer) const;
  void take(int peer, Frame frame);
  void mark_lost(int peer, std::string_view why);
  std::shared_ptr<Carrier> carrier();

  int rank_;
  local::Pages pages_;
  local::JobMemory memory_;
  Letters letters_;
  std::mutex mutex_;
  std::shared_ptr<Carrier> carrier_;  // guarded by mutex_, as all below; null once the rank has left
  std::vector<std::optional<std::string>> lost_;
};

}  // namespace expar::carried
