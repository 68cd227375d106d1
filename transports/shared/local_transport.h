// The part that all transports have in common: signals and waiting over a job's memory, and the rules of messages.
//
// Leaves to them: where that memory comes from (ranks of one host share it; a rank whose peers are far has it alone,
// and what they show is written there for them), how bytes of messages travel, how a dead rank is noticed, and the
// arena.
#pragma once

#include <sys/types.h>

#include <bitset>
#include <memory>
#include <optional>
#include <string>

#include <expar/transport.h>

#include "transports/shared/job_memory.h"
#include "transports/shared/messages.h"

namespace expar::local {

class LocalTransport : public Transport {
 public:
  void publish(int index, const Line& line, std::string_view text) override;
  Line peek(int peer, int index) const override;
  std::string text(int peer, int index) const override;
  Error abort(const Error& cause) override;
  std::optional<Error> failure() const override;
  Ticket start(std::span<const Message> messages) override;
  bool test(Ticket ticket) override;

 protected:
  struct Dead {
    int rank;
    std::string trace;  // what is known of it
  };

  /// `cores`: how many cores the ranks of this job share.
  LocalTransport(std::string_view name, int rank, const JobMemory& job, int cores, std::unique_ptr<Messages> messages);

  void wait_until(FunctionRef<bool()> done, const Waiting& waiting) override;

  /// A rank that died, if one has. Called every millisecond or so of waiting.
  virtual std::optional<Dead> find_dead() = 0;

  /// Says that this rank leaves, so that nobody takes it for dead; first thing in a destructor. Not if the destructor
  /// is that of a copy, in a process that the rank has forked.
  void leave();
  /// True in a process that the rank has forked, whose copy of this object is no rank.
  bool forked() const;
  /// Throws the job's cause if there is one.
  void check() const;

  const JobMemory& job() const { return job_; }
  RankArea& self() const { return job_.of(rank()); }

 private:
  class Sleep;
  bool advance_messages();
  bool done_or_lost(FunctionRef<bool()> done, const Waiting& waiting, Deadline deadline);
  bool sleep(FunctionRef<bool()> done, Clock::duration limit);
  std::optional<Error> find_lost(const Waiting& waiting, Deadline deadline);

  JobMemory job_;
  std::unique_ptr<Messages> messages_;
  bool spins_;
  pid_t owner_;
  std::bitset<kBoardLines> has_text_;  // lines whose text must be cleared when the next has none
};

}  // namespace expar::local
