// Some ranks of a job as a transport of their own: the job's signals, memory and messages under other numbers.
#pragma once

#include <memory>
#include <vector>

#include <expar/transport.h>

namespace expar {

class GroupTransport final : public Transport {
 public:
  /// `members` are ranks of the job; this one is members[rank]. Board lines begin at `first_line`; `tag_space` keeps
  /// the messages of groups apart that share two ranks.
  GroupTransport(std::shared_ptr<Transport> job, std::vector<int> members, int rank, int first_line,
                 std::uint64_t tag_space);

  std::string_view name() const override { return job_->name(); }
  void publish(int index, const Line& line, std::string_view text) override;
  Line peek(int peer, int index) const override;
  std::string text(int peer, int index) const override;
  Error abort(const Error& cause) override { return job_->abort(cause); }
  std::optional<Error> failure() const override { return job_->failure(); }
  Segment grow(std::size_t bytes) override { return job_->grow(bytes); }
  bool mapped(int peer) const override { return job_->mapped(member(peer)); }
  std::span<std::byte> map(int peer, std::uint32_t id) override { return job_->map(member(peer), id); }
  Ticket start(std::span<const Message> messages) override;
  bool test(Ticket ticket) override { return job_->test(ticket); }

 protected:
  void wait_until(FunctionRef<bool()> done, const Waiting& waiting) override;

 private:
  int member(int rank) const { return members_[static_cast<std::size_t>(rank)]; }

  std::shared_ptr<Transport> job_;
  std::vector<int> members_;
  int first_line_;
  std::uint64_t tag_space_;
};

}  // namespace expar
