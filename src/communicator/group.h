// The ranks of a communicator as data: who they are in the job, and which of its lines are theirs.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include <expar/transport.h>

namespace expar {

/// A communicator has one line that tells what it has completed, and two for each operation in flight.
inline constexpr int kCompletedLine = 0;
constexpr int lines_of(std::uint64_t slots) { return static_cast<int>(1 + 2 * slots); }

/// Operations in flight at once, of the job and of a group of its ranks.
inline constexpr std::uint64_t kSlots = 64;
inline constexpr std::uint64_t kGroupSlots = 8;

/// Groups that a rank can be in at once, the job being one.
inline constexpr int kPlaces = 16;
static_assert(lines_of(kSlots) + (kPlaces - 1) * lines_of(kGroupSlots) <= kBoardLines);

/// Ranks are called by their numbers here; the transport hears of those of the job.
struct Group {
  std::shared_ptr<Transport> transport;
  std::vector<int> members;  // [size] ranks of the job
  int rank = 0;              // this one's number here
  int place = 0;             // whose lines are used; the job's is 0

  int size() const { return static_cast<int>(members.size()); }
  int job_rank(int member) const { return members[static_cast<std::size_t>(member)]; }
  std::uint64_t slots() const { return place == 0 ? kSlots : kGroupSlots; }

  Line peek(int peer, int line) const { return transport->peek(job_rank(peer), first_line() + line); }
  std::string text(int peer, int line) const { return transport->text(job_rank(peer), first_line() + line); }
  void publish(int line, const Line& shown, std::string_view text = {}) const {
    transport->publish(first_line() + line, shown, text);
  }

 private:
  int first_line() const { return place == 0 ? 0 : lines_of(kSlots) + (place - 1) * lines_of(kGroupSlots); }
};

/// The operations that every rank has completed are those before the returned one.
std::uint64_t completed_by_all(const Group& group);

}  // namespace expar
