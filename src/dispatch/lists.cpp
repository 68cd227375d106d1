// The lists of an inbox.
#include "src/dispatch/lists.h"

#include <string>

namespace expar {
namespace {

std::size_t at(std::int64_t index) { return static_cast<std::size_t>(index); }

/// Deals out the positions of each local expert to the slots of one source, in order.
class Positions {
 public:
  Positions(const Plan& plan, int source) {
    const ExpertRange local = plan.local();
    const auto counts = plan.counts().subspan(at(source) * at(plan.experts()) + at(local.first), at(local.count));
    for (std::int64_t e = 0; e < local.count; ++e) {
      next_.push_back(plan.source_start(source, e));
      end_.push_back(next_.back() + counts[at(e)]);
    }
  }
  /// -1: no such expert, or more rows for it than the plan says.
  std::int64_t take(std::int32_t expert) {
    if (expert < 0 || at(expert) >= next_.size() || next_[at(expert)] == end_[at(expert)]) return -1;
    return next_[at(expert)]++;
  }
  bool all_taken() const { return next_ == end_; }

 private:
  std::vector<std::int64_t> next_, end_;
};

}  // namespace

void write_tags(const Plan& plan, int destination, std::span<const std::int32_t> tokens, const float* weights,
                SlotTag* tags) {
  const ExpertRange range = experts_of(destination, static_cast<int>(plan.sources().size()) - 1, plan.experts());
  const auto first = static_cast<std::int32_t>(range.first);
  const auto end = static_cast<std::int32_t>(range.first + range.count);
  const std::int64_t topk = plan.topk();
  for (const std::int32_t token : tokens) {
    const std::int32_t* ids = plan.ids().data() + token * topk;
    const float* weight = weights == nullptr ? nullptr : weights + token * topk;
    for (std::int64_t k = 0; k < topk; ++k) {
      const bool there = ids[k] >= first && ids[k] < end;
      *tags++ = {there ? ids[k] - first : -1, weight == nullptr ? 1.0F : weight[k]};
    }
  }
}

std::vector<RowRef> build_lists(const Communicator& communicator, const Plan& plan, const float* weights,
                                const SlotTag* tags) {
  std::vector<RowRef> refs(at(plan.received()), RowRef{0, 0, 0.0F});
  const ExpertRange local = plan.local();
  const std::int64_t topk = plan.topk();
  for (int source = 0; source < communicator.size(); ++source) {
    Positions positions(plan, source);
    bool sane = true;
    if (source == communicator.rank()) {
      for (std::int64_t i = 0; i < plan.tokens() * topk; ++i) {
        const std::int64_t expert = plan.ids()[at(i)] - local.first;
        if (expert < 0 || expert >= local.count) continue;
        refs[at(positions.take(static_cast<std::int32_t>(expert)))] = {0, static_cast<std::int32_t>(i / topk),
                                                                       weights == nullptr ? 1.0F : weights[i]};
      }
    } else {
      for (std::int64_t row = plan.sources()[at(source)]; row < plan.sources()[at(source + 1)]; ++row) {
        for (const SlotTag& tag : std::span(tags + row * topk, at(topk))) {
          if (tag.expert == -1) continue;
          const std::int64_t position = positions.take(tag.expert);
          if (position < 0) {
            sane = false;
            continue;
          }
          refs[at(position)] = {1, static_cast<std::int32_t>(row), tag.weight};
        }
      }
    }
    if (!sane || !positions.all_taken()) {
      communicator.fail(Error(ErrorCode::internal,
                              "rank " + std::to_string(source) + " sent other experts than its plan says",
                              {.rank = communicator.rank(), .peer = source, .operation = "dispatch"}));
    }
  }
  return refs;
}

}  // namespace expar
