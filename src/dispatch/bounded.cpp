// What a rank shows in the dispatch of a bounded plan, and how it takes what it needs from the others.
#include "src/dispatch/bounded.h"

#include <cstring>
#include <string>

#include "src/dispatch/plan_data.h"
#include "src/util/check.h"
#include "src/util/kept.h"

namespace expar {
namespace {

std::size_t whole_lines(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

[[noreturn]] void disagree(const Communicator& communicator, int source) {
  communicator.blame(source, "dispatch", "sent other experts than its plan says");
}

}  // namespace

Shelf::Shelf(const Context& context, const Operation& operation, const Plan& plan, std::size_t row_bytes)
    : context_(context), operation_(operation), plan_(plan), tokens_(context.memory().get()) {
  tags_at_ = whole_lines(at(plan.experts() + context.size()) * sizeof(std::int32_t));
  rows_at_ = tags_at_ + whole_lines(at(plan.bound() * plan.topk()) * sizeof(SlotTag));
  tokens_.reserve(at(plan.bound()));
  bytes_ = rows_at_ + at(plan.bound()) * row_bytes;
}

Operation::Words Shelf::show(const float* weights) {
  block_ = context_.communicator().arena().allocate(bytes_);
  const auto& own = plan_.data().own;
  std::memcpy(block_.data(), own.data(), own.size() * sizeof own[0]);
  auto* tags = reinterpret_cast<SlotTag*>(block_.data() + tags_at_);
  for (std::size_t i = 0; i < plan_.ids().size(); ++i) {
    tags[i] = {plan_.ids()[i], weights == nullptr ? 1.0F : weights[i]};
  }
  return operation_.show(block_, at(plan_.tokens()));
}

void Shelf::read() {
  const auto whole = [&](int) { return ByteRange{0, bytes_}; };
  reading_.emplace(operation_, block_, whole, whole);
}

Plan Shelf::complete() {
  reading_->finish();
  auto data = make_kept<Plan::Data>(context_.memory(), context_.memory());
  data->bound = plan_.bound();
  data->topk = plan_.topk();
  data->reserve();
  *data = plan_.data();
  expar::complete(operation_, *reading_, *data);
  return Plan(std::move(data));
}

std::span<const std::int32_t> Shelf::take(int source, std::size_t most, SlotTag* tags) {
  const std::uint64_t tokens = first_word(operation_.words(source));
  if (tokens > static_cast<std::uint64_t>(plan_.bound())) {
    context_.communicator().blame(
        source, "dispatch",
        "showed " + std::to_string(tokens) + " tokens, more than the bound of " + std::to_string(plan_.bound()));
  }
  const auto* from = reinterpret_cast<const SlotTag*>(reading_->from(source).data() + tags_at_);
  const ExpertRange local = plan_.local();
  const std::size_t topk = at(plan_.topk());
  tokens_.clear();
  for (std::uint64_t token = 0; token < tokens; ++token, from += topk) {
    // Written ahead, and kept where a slot of the token is for an expert here.
    bool needed = false;
    const bool room = tokens_.size() < most;
    for (std::size_t k = 0; k < topk; ++k) {
      const std::int64_t e = from[k].expert - local.first;
      const bool here = e >= 0 && e < local.count;
      needed = needed || here;
      if (room) tags[k] = {here ? static_cast<std::int32_t>(e) : -1, from[k].weight};
    }
    if (!needed) continue;
    if (!room) disagree(context_.communicator(), source);
    tokens_.push_back(static_cast<std::int32_t>(token));
    tags += topk;
  }
  if (tokens_.size() != most) disagree(context_.communicator(), source);
  return tokens_;
}

}  // namespace expar
