// Rows of a bounded plan.
#include "src/dispatch/bounded.h"

#include <cstring>
#include <string>

#include "src/dispatch/plan_data.h"
#include "src/util/kept.h"

namespace expar {
BoundedRows::BoundedRows(const Shipment& shipment) : Carrier(shipment), tokens_(context.memory().get()) {
  tags_at_ = whole_lines(at(plan.experts() + context.size()) * sizeof(std::int32_t));
  rows_at_ = tags_at_ + whole_lines(at(plan.data().bound * plan.topk()) * sizeof(SlotTag));
  bytes_ = rows_at_ + at(plan.data().bound) * payload.row_bytes();
  tokens_.reserve(at(plan.data().bound));
}

Operation::Words BoundedRows::show() {
  shelf_ = context.communicator().allocate(bytes_);
  const auto& own = plan.data().own;
  std::memcpy(shelf_.data(), own.data(), own.size() * sizeof own[0]);
  auto* tags = reinterpret_cast<SlotTag*>(shelf_.data() + tags_at_);
  for (std::size_t i = 0; i < plan.ids().size(); ++i) {
    tags[i] = {plan.ids()[i], weights == nullptr ? 1.0F : weights[i]};
  }
  payload.write(shelf_.data() + rows_at_, x);
  return operation.show(shelf_, at(plan.tokens()));
}

void BoundedRows::send() {
  const auto whole = [&](int) { return ByteRange{0, bytes_}; };
  shelves_.emplace(operation, shelf_, whole, whole);
}

Plan BoundedRows::complete() {
  shelves_->finish();
  auto data = make_kept<Plan::Data>(context.memory(), context);
  data->bound = plan.data().bound;
  data->topk = plan.topk();
  data->reserve();
  *data = plan.data();
  expar::complete(operation, *shelves_, *data);
  room = Room(context.communicator(), data->sources.back(), payload.row_bytes(), tag_bytes);
  return Plan(std::move(data));
}

void BoundedRows::receive() {
  for (int peer = 0; peer < context.size(); ++peer) {
    if (peer == context.rank()) continue;
    const std::int64_t first = plan.sources()[at(peer)];
    const auto tokens = take(peer, at(plan.sources()[at(peer + 1)] - first), room.tags(first));
    copy_rows(room.row(first), shelves_->from(peer).data() + rows_at_, tokens, payload.row_bytes(), Store::cached);
  }
}

void BoundedRows::round_own(std::byte* to) const { payload.read(to, shelf_.data() + rows_at_, x.size(0)); }

/// The tokens of `source` that this rank needs, ascending; their tags go to `tags`, by slot. What a peer wrote is not
/// followed: there are `most` at the most.
std::span<const std::int32_t> BoundedRows::take(int source, std::size_t most, SlotTag* tags) {
  const auto disagree = [&] {
    context.communicator().blame(source, operation.name(), "sent other experts than its plan says");
  };
  const std::uint64_t tokens = first_word(operation.words(source));
  if (tokens > static_cast<std::uint64_t>(plan.data().bound)) {
    context.communicator().blame(
        source, operation.name(),
        "showed " + std::to_string(tokens) + " tokens, more than the bound of " + std::to_string(plan.data().bound));
  }
  const auto* from = reinterpret_cast<const SlotTag*>(shelves_->from(source).data() + tags_at_);
  const ExpertRange local = plan.local();
  const std::size_t topk = at(plan.topk());
  tokens_.clear();
  for (std::uint64_t token = 0; token < tokens; ++token, from += topk) {
    // Written ahead, and kept where a slot of the token is for an expert here.
    bool needed = false;
    const bool fits = tokens_.size() < most;
    for (std::size_t k = 0; k < topk; ++k) {
      const std::int64_t e = from[k].expert - local.first;
      const bool here = e >= 0 && e < local.count;
      needed = needed || here;
      if (fits) tags[k] = {here ? static_cast<std::int32_t>(e) : -1, from[k].weight};
    }
    if (!needed) continue;
    if (!fits) disagree();
    tokens_.push_back(static_cast<std::int32_t>(token));
    tags += topk;
  }
  if (tokens_.size() != most) disagree();
  return tokens_;
}

}  // namespace expar
