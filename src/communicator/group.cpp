// Groups: agreeing on who is in which.
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
    if (std::countr_one(group.places) < kPlaces) continue;
    communicator.throw_alike(Error(ErrorCode::bad_argument,
                                   "group " + std::to_string(number) +
                                       " is one too many: between them its ranks are in " +
                                       std::to_string(kPlaces - 1) + " groups already; let one go before",
                                   {.rank = group.members.front(), .operation = "split"}));
  }
  return groups;
}

}  // namespace

std::uint64_t completed_by_all(const Group& group) {
  std::uint64_t lowest = UINT64_MAX;
  for (int peer = 0; peer < group.size(); ++peer) {
    // The line shows the first operation its rank has not completed; before the first, it shows nothing.
    lowest = std::min(lowest, std::max<std::uint64_t>(1, group.peek(peer, kCompletedLine).sequence));
  }
  return lowest;
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
  Group joined{.transport = state_->group->transport, .members = {}, .place = std::countr_one(mine.places)};
  for (const int member : mine.members) {
    if (member == rank()) joined.rank = joined.size();
    joined.members.push_back(job_rank(member));
  }
  // Lines that a group has left behind carry lower numbers, so nobody takes them for this one's.
  return Communicator(std::make_shared<State>(state_->rank, std::move(joined), mine.last_of_gone + 1), timeout_);
}

}  // namespace expar
