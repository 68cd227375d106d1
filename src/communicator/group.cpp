// Groups: agreeing on who is in which, and passing on what a group asks of its job.
#include "src/communicator/group.h"

#include <algorithm>
#include <bit>
#include <map>
#include <string>
#include <utility>

#include "src/communicator/state.h"
#include "src/util/check.h"

namespace expar {
namespace {

constexpr int kTagBits = 56;  // more operations than a job can have

/// What a rank says when a communicator is split.
struct Wish {
  int group = 0;
  int key = 0;
  std::uint32_t places = 0;
  std::uint64_t last_of_gone = 0;

  Operation::Words words() const {
    return {static_cast<std::uint32_t>(group), static_cast<std::uint32_t>(key), places, last_of_gone};
  }
  static Wish of(const Operation::Words& words) {
    return {static_cast<int>(words[0]), static_cast<int>(words[1]), static_cast<std::uint32_t>(words[2]), words[3]};
  }
};

struct Planned {
  std::vector<int> members;
  std::uint32_t places = 0;  // that at least one member has taken
  std::uint64_t last_of_gone = 0;
};

/// Every rank plans all groups from the same wishes, so that all find the same error.
std::map<int, Planned> plan_groups(const Communicator& communicator, const std::vector<Wish>& wishes) {
  std::map<int, Planned> groups;
  for (std::size_t rank = 0; rank < wishes.size(); ++rank) {
    const Wish& wish = wishes[rank];
    if (wish.group < 0) continue;
    Planned& group = groups[wish.group];
    group.members.push_back(static_cast<int>(rank));
    group.places |= wish.places;
    group.last_of_gone = std::max(group.last_of_gone, wish.last_of_gone);
  }
  for (auto& [number, group] : groups) {
    std::stable_sort(group.members.begin(), group.members.end(), [&](int a, int b) {
      return wishes[static_cast<std::size_t>(a)].key < wishes[static_cast<std::size_t>(b)].key;
    });
    if (std::countr_one(group.places) < kGroups) continue;
    communicator.throw_alike(Error(ErrorCode::bad_argument,
                                   "group " + std::to_string(number) +
                                       " is one too many: between them its ranks are in " + std::to_string(kGroups) +
                                       " groups already; let one go before",
                                   {.rank = group.members.front(), .operation = "split"}));
  }
  return groups;
}

}  // namespace

GroupTransport::GroupTransport(std::shared_ptr<Transport> job, std::vector<int> members, int rank, int first_line,
                               std::uint64_t tag_space)
    : Transport(rank, static_cast<int>(members.size())),
      job_(std::move(job)),
      members_(std::move(members)),
      first_line_(first_line),
      tag_space_(tag_space) {}

void GroupTransport::publish(int index, const Line& line, std::string_view text) {
  job_->publish(first_line_ + index, line, text);
}

Line GroupTransport::peek(int peer, int index) const { return job_->peek(member(peer), first_line_ + index); }

std::string GroupTransport::text(int peer, int index) const { return job_->text(member(peer), first_line_ + index); }

Transport::Ticket GroupTransport::start(std::span<const Message> messages) {
  std::vector<Message> of_job(messages.begin(), messages.end());
  for (Message& message : of_job) {
    message.peer = member(message.peer);
    message.tag = tag_space_ << kTagBits | (message.tag & ((std::uint64_t{1} << kTagBits) - 1));
  }
  return job_->start(of_job);
}

void GroupTransport::wait_until(FunctionRef<bool()> done, const Waiting& waiting) {
  Waiting of_job = waiting;
  if (waiting.peer >= 0) of_job.peer = member(waiting.peer);
  const auto is_awaited = [&](int rank) {
    const auto found = std::find(members_.begin(), members_.end(), rank);
    return found != members_.end() && (*waiting.awaited)(static_cast<int>(found - members_.begin()));
  };
  const FunctionRef<bool(int)> awaited(is_awaited);
  if (waiting.awaited != nullptr) of_job.awaited = &awaited;
  job_->wait(done, of_job);
}

Communicator::State::State(const State& whole, const std::vector<int>& m, int own, int p, std::uint64_t first)
    : transport(std::make_shared<GroupTransport>(whole.rank->job, m, own, lines_of(kSlots) + p * lines_of(kGroupSlots),
                                                 static_cast<std::uint64_t>(p) + 1)),
      rank(whole.rank),
      arena(whole.arena, transport),
      memory(whole.memory),
      slots(kGroupSlots),
      members(m),
      place(p),
      next(first),
      lowest(first),
      reusable(first) {
  rank->places |= std::uint32_t{1} << place;
}

Communicator::State::~State() {
  if (place < 0) return;
  rank->places &= ~(std::uint32_t{1} << place);
  rank->last_of_gone = std::max(rank->last_of_gone, next);
}

Communicator Communicator::split(int group, int key) const {
  const Wish wish{group, key, state_->rank->places, state_->rank->last_of_gone};
  std::vector<Wish> wishes;
  for (const Operation::Words& words : meet(*this, Signature("split"), [&] {
         if (group < -1) refuse("group is " + std::to_string(group) + ", below -1");
         return wish.words();
       })) {
    wishes.push_back(Wish::of(words));
  }
  const std::map<int, Planned> groups = plan_groups(*this, wishes);
  if (group < 0) return {};

  const Planned& mine = groups.at(group);
  const auto own = std::find(mine.members.begin(), mine.members.end(), rank()) - mine.members.begin();
  std::vector<int> members;
  for (const int member : mine.members) members.push_back(job_rank(member));
  // Lines that a group has left behind carry lower numbers, so nobody takes them for this one's.
  return Communicator(std::make_shared<State>(*state_, members, static_cast<int>(own), std::countr_one(mine.places),
                                              mine.last_of_gone + 1),
                      timeout_);
}

}  // namespace expar
