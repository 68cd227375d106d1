// The lists of an inbox.
#include "src/dispatch/lists.h"

#include <algorithm>
#include <vector>

#include "src/dispatch/plan_data.h"
#include "src/util/check.h"

namespace expar {

void write_tags(const Plan& plan, int destination, std::span<const std::int32_t> tokens, const float* weights,
                SlotTag* tags) {
  const ExpertRange range = plan.held_by(destination);
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

Lists::Lists(const Context& context, const Plan& plan, const float* weights)
    : memory_(context.memory()), refs_(memory_.get()), weights_(memory_.get()) {
  const std::size_t most = at(context.size() * plan.data().bound * plan.topk()) + 1;  // of one size for a bound
  refs_.reserve(most);
  weights_.reserve(most);
  refs_.resize(at(plan.received()) + 1);
  weights_.resize(refs_.size());
  const int rank = context.rank();
  const std::size_t nowhere = refs_.size() - 1;
  const std::int64_t tokens = plan.tokens(), topk = plan.topk();
  const SlotRow* slot = plan.slots().data();
  for (std::int32_t token = 0; token < tokens; ++token) {
    for (std::int64_t k = 0; k < topk; ++k, ++slot) {
      const std::size_t position = slot->rank == rank ? at(slot->row) : nowhere;
      refs_[position] = {0, token};
      weights_[position] = weights == nullptr ? 1.0F : weights[token * topk + k];
    }
  }
}

bool Lists::add(const Plan& plan, int source, const SlotTag* tags) {
  const std::int64_t local = plan.local().count, topk = plan.topk();
  const std::int64_t first = plan.sources()[at(source)], end = plan.sources()[at(source + 1)];
  const std::size_t nowhere = refs_.size() - 1;
  // The next position of each local expert. Slots that go elsewhere, half of them and at random, count for an expert
  // after the last, so that there is no branch to mispredict; one for each k, so that they do not wait for each other.
  std::pmr::vector<std::size_t> next(at(local + topk), nowhere, memory_.get());
  for (std::int64_t e = 0; e < local; ++e) next[at(e)] = at(plan.data().source_start_of(source, e));
  for (std::int64_t row = first; row < end; ++row) {
    for (std::int64_t k = 0; k < topk; ++k, ++tags) {
      std::size_t& position = next[std::min(at(tags->expert), at(local + k))];  // -1 is large here
      const std::size_t place = std::min(position, nowhere);
      refs_[place] = {1, static_cast<std::int32_t>(row)};
      weights_[place] = tags->weight;
      ++position;
    }
  }
  const auto counts = plan.counts().subspan(at(source) * at(plan.experts()) + at(plan.local().first), at(local));
  for (std::int64_t e = 0; e < local; ++e) {
    if (next[at(e)] != at(plan.data().source_start_of(source, e) + counts[at(e)])) return false;
  }
  return true;
}

}  // namespace expar
