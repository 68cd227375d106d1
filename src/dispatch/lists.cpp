// The lists of an inbox.
#include "src/dispatch/lists.h"

#include <algorithm>
#include <string>

namespace expar {
namespace {

std::size_t at(std::int64_t index) { return static_cast<std::size_t>(index); }

/// Deals out the positions of each local expert to the slots of one source, in order. Half of all slots go elsewhere,
/// at random: they take the position after the last, so that there is no branch to mispredict.
class Positions {
 public:
  Positions(const Plan& plan, int source) : elsewhere_(at(plan.local().count)) {
    const ExpertRange local = plan.local();
    const auto counts = plan.counts().subspan(at(source) * at(plan.experts()) + at(local.first), at(local.count));
    for (std::int64_t e = 0; e < local.count; ++e) {
      next_.push_back(plan.source_start(source, e));
      end_.push_back(next_.back() + counts[at(e)]);
    }
    next_.push_back(plan.received());
    end_.push_back(plan.received());
  }
  /// Never beyond the positions of the expert, whatever is asked.
  std::size_t take(std::int64_t expert) {
    const std::size_t e = std::min(at(expert), elsewhere_);  // negative numbers are large here
    const std::int64_t position = next_[e];
    const bool left = position < end_[e];
    refused_ += !left && expert != -1;
    next_[e] += left;
    return at(left ? position : end_[elsewhere_]);
  }
  bool all_taken() const { return refused_ == 0 && next_ == end_; }

 private:
  std::size_t elsewhere_;
  std::vector<std::int64_t> next_, end_;  // [L + 1]
  std::int64_t refused_ = 0;
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
  std::vector<RowRef> refs(at(plan.received()) + 1, RowRef{0, 0, 0.0F});
  const ExpertRange local = plan.local();
  const std::int64_t topk = plan.topk();
  for (int source = 0; source < communicator.size(); ++source) {
    Positions positions(plan, source);
    if (source == communicator.rank()) {
      const std::int32_t* id = plan.ids().data();
      for (std::int32_t token = 0; token < plan.tokens(); ++token) {
        for (std::int64_t k = 0; k < topk; ++k, ++id) {
          const std::int64_t expert = *id - local.first;
          const bool here = expert >= 0 && expert < local.count;
          refs[positions.take(here ? expert : -1)] = {0, token, weights == nullptr ? 1.0F : weights[token * topk + k]};
        }
      }
    } else {
      const SlotTag* tag = tags + plan.sources()[at(source)] * topk;
      for (std::int64_t row = plan.sources()[at(source)]; row < plan.sources()[at(source + 1)]; ++row) {
        for (std::int64_t k = 0; k < topk; ++k, ++tag) {
          refs[positions.take(tag->expert)] = {1, static_cast<std::int32_t>(row), tag->weight};
        }
      }
    }
    if (!positions.all_taken()) {
      communicator.fail(Error(ErrorCode::internal,
                              "rank " + std::to_string(source) + " sent other experts than its plan says",
                              {.rank = communicator.rank(), .peer = source, .operation = "dispatch"}));
    }
  }
  refs.pop_back();  // what took no position
  return refs;
}

}  // namespace expar
