// What each policy does with the slots that an expert has no room for.
#include "src/capacity/policies.h"

#include <bit>
#include <limits>

#include "src/util/check.h"

namespace expar {
namespace {

struct Candidate {
  std::uint32_t key = 0;
  std::int64_t position = 0;
  /// Better: of a larger score, or of the same and earlier.
  bool operator<(const Candidate& other) const {
    return key != other.key ? key > other.key : position < other.position;
  }
};

/// The token's best expert that has room, that it does not use yet and that it may choose; -1: there is none.
std::int32_t next_choice(std::span<const float> scores, std::span<const std::int32_t> used,
                         std::span<const std::int64_t> room) {
  std::int32_t best = -1;
  for (std::size_t e = 0; e < scores.size(); ++e) {
    const auto expert = static_cast<std::int32_t>(e);
    const bool is_barred = scores[e] == -std::numeric_limits<float>::infinity();
    if (room[e] == 0 || is_barred || std::find(used.begin(), used.end(), expert) != used.end()) continue;
    if (best < 0 || key_of(scores[e]) > key_of(scores[at(best)])) best = expert;
  }
  return best;
}

}  // namespace

void keep_first(const Requests& requests, std::int64_t rows, std::span<std::int32_t> ids) {
  std::vector<std::int64_t> left;
  for (std::int64_t e = 0; e < requests.experts; ++e) left.push_back(requests.granted(e, rows));
  for (std::int32_t& id : ids)
    if (id >= 0 && left[at(id)]-- <= 0) id = -1;
}

std::uint32_t key_of(float score) {
  if (score != score) return 0;
  const auto bits = std::bit_cast<std::uint32_t>(score + 0.0F);  // -0 is 0
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

void keep_best(const Requests& requests, std::int64_t rows, const Routing& routing, std::span<std::int32_t> ids,
               FunctionRef<std::vector<std::uint32_t>(std::vector<std::uint32_t>)> tell) {
  const auto overfull = [&](std::int64_t e) { return requests.total(e) > rows; };
  const float* scores = routing.top.as<float>();
  std::vector<std::vector<std::uint32_t>> own(at(requests.experts));
  for (std::size_t i = 0; i < ids.size(); ++i)
    if (ids[i] >= 0 && overfull(ids[i])) own[at(ids[i])].push_back(key_of(scores[i]));
  std::vector<std::uint32_t> mine;
  for (const auto& keys : own) mine.insert(mine.end(), keys.begin(), keys.end());
  const std::vector<std::uint32_t> all = tell(std::move(mine));

  // The worst that stays, of each expert, by its key and its position among all requests of the expert.
  std::vector<Candidate> last(at(requests.experts), Candidate{0, INT64_MAX});
  std::vector<std::size_t> next(at(requests.ranks()) + 1);  // where each rank's keys of the next expert begin
  for (int rank = 0; rank < requests.ranks(); ++rank) {
    next[at(rank + 1)] = next[at(rank)];
    for (std::int64_t e = 0; e < requests.experts; ++e)
      if (overfull(e)) next[at(rank + 1)] += at(requests.of(rank, e));
  }
  std::vector<Candidate> candidates;
  for (std::int64_t e = 0; e < requests.experts; ++e) {
    if (!overfull(e)) continue;
    candidates.clear();
    for (int rank = 0; rank < requests.ranks(); ++rank)
      for (std::int64_t i = 0; i < requests.of(rank, e); ++i)
        candidates.push_back({all[next[at(rank)]++], static_cast<std::int64_t>(candidates.size())});
    std::nth_element(candidates.begin(), candidates.begin() + rows - 1, candidates.end());
    last[at(e)] = candidates[at(rows - 1)];
  }

  std::vector<std::int64_t> position;
  for (std::int64_t e = 0; e < requests.experts; ++e) position.push_back(requests.below(requests.self, e));
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0) continue;
    const Candidate candidate{key_of(scores[i]), position[at(ids[i])]++};
    if (last[at(ids[i])] < candidate) ids[i] = -1;
  }
}

void reroute(Requests requests, std::int64_t rows, const Routing& routing, std::span<std::int32_t> ids,
             FunctionRef<std::vector<std::int64_t>(std::vector<std::int64_t>)> tell) {
  const std::int64_t topk = routing.weights.size(1), columns = routing.choice_scores.size(1);
  const auto experts = at(requests.experts);
  std::vector<std::int64_t> room(experts, rows);
  std::vector<std::size_t> asking, refused;
  for (std::size_t i = 0; i < ids.size(); ++i)
    if (ids[i] >= 0) asking.push_back(i);
  // Ends: whoever is refused leaves behind an expert that is full.
  for (bool over = true; over;) {
    over = false;
    std::vector<std::int64_t> left(experts), counts(experts);
    for (std::int64_t e = 0; e < requests.experts; ++e) {
      const std::int64_t total = requests.total(e);
      left[at(e)] = requests.granted(e, room[at(e)]);
      over |= total > room[at(e)];
      room[at(e)] -= std::min(total, room[at(e)]);
    }
    refused.clear();
    for (const std::size_t i : asking)
      if (left[at(ids[i])]-- <= 0) refused.push_back(i);
    for (const std::size_t i : refused) ids[i] = -1;
    if (!over) return;

    asking.clear();
    for (const std::size_t i : refused) {
      const auto token = static_cast<std::int64_t>(i) / topk;
      ids[i] = next_choice({routing.choice_scores.as<float>() + token * columns, experts},
                           ids.subspan(at(token * topk), at(topk)), room);
      if (ids[i] < 0) continue;
      asking.push_back(i);
      ++counts[at(ids[i])];
    }
    requests.counts = tell(std::move(counts));
  }
}

}  // namespace expar
