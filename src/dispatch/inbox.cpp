// Inbox: what arrived, and the copy of it that a layout packs.
#include <cstring>

#include "src/dispatch/inbox_data.h"
#include "src/dispatch/plan_data.h"

namespace expar {

Inbox::Inbox() = default;
Inbox::Inbox(std::shared_ptr<Data> data) : data_(std::move(data)) {}
Inbox::~Inbox() = default;
Inbox::Inbox(Inbox&&) noexcept = default;
Inbox& Inbox::operator=(Inbox&&) noexcept = default;
const Plan& Inbox::plan() const { return data_->plan; }
ConstTensor Inbox::rows() const { return data_->rows; }
std::span<const RowRef> Inbox::refs() const { return data_->lists->refs(); }
std::span<const float> Inbox::weights() const { return data_->lists->weights(); }
Layout Inbox::layout() const { return data_->layout; }
ConstTensor Inbox::packed() const { return data_->packed; }
std::span<const std::int64_t> Inbox::offsets() const { return data_->order->offsets(); }
Rows Inbox::expert_rows() const {
  return {.base = {data_->x.data(), data_->rows.data()},
          .dtype = data_->rows.dtype(),
          .width = data_->rows.size(1),
          .refs = refs().data()};
}

void Inbox::Data::pack(const Context& context, Layout in, std::int64_t capacity) {
  layout = in;
  order.emplace(plan, context.rank(), layout, capacity);
  if (layout == Layout::indexed) return;
  const std::int64_t width = rows.size(1), experts = plan.local().count;
  const std::size_t row_bytes = at(width) * size_of(rows.dtype());
  packed_block = context.communicator().allocate(at(order->rows()) * row_bytes);
  packed = ConstTensor(packed_block.data(), rows.dtype(), order->shape(width));
  if (layout == Layout::rank_major) {
    for (int s = 0; s < context.size(); ++s) {
      for (std::int64_t e = 0; e < experts; ++e) {
        const std::int64_t first = order->source_start(s, e);
        pack(context, plan.data().source_start_of(s, e), order->offsets()[at(s * experts + e + 1)] - first, first);
      }
    }
    return;
  }
  for (std::int64_t e = 0; e < experts; ++e) {
    const std::int64_t first = order->offsets()[at(e)], count = plan.rows()[at(e)];
    pack(context, plan.offsets()[at(e)], count, first);
    const std::int64_t padding = order->offsets()[at(e + 1)] - first - count;
    std::memset(packed_block.data() + at(first + count) * row_bytes, 0, at(padding) * row_bytes);
  }
}

/// `count` rows of the list, from `first` on, go to the packed rows from `to` on.
void Inbox::Data::pack(const Context& context, std::int64_t first, std::int64_t count, std::int64_t to) {
  const std::int64_t width = rows.size(1);
  const Rows from{
      .base = {x.data(), rows.data()}, .dtype = rows.dtype(), .width = width, .refs = lists->refs().data() + first};
  context.kernels().gather(
      {.rows = from, .count = count, .out = packed_block.data() + at(to * width) * size_of(rows.dtype())},
      context.pool());
}

}  // namespace expar
