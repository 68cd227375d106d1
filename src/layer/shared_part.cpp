// What shared experts are to a layer: their rows without padding, and the memory of their gradients.
#include "src/layer/shared_part.h"

#include <cstring>

#include "src/layer/convert.h"

namespace expar {
namespace {

/// The rows with zeros in place of padding, of which the experts make zeros, forwards and backwards.
ConstTensor without_padding(const ConstTensor& rows, const ConstTensor& mask, Buffer& memory) {
  if (mask.absent()) return rows;
  const Tensor copy = memory.view(rows.dtype(), rows.shape());
  std::memset(copy.data(), 0, copy.byte_size());
  for (std::int64_t t = 0; t < rows.size(0); ++t) {
    if (mask.as<std::int8_t>()[t] == 0) continue;
    const ConstTensor row = rows.rows(t, 1);
    std::memcpy(copy.rows(t, 1).data(), row.data(), row.byte_size());
  }
  return copy;
}

}  // namespace

ConstTensor SharedPart::for_gate(const Context& context, ConstTensor x) {
  return gate_ ? in_f32(x, wide_x_, context.pool()) : ConstTensor();
}

void SharedPart::forward(const Context& context, const SharedWeights& weights, ConstTensor x, ConstTensor mask,
                         SharedRecord& record) {
  const ConstTensor rows = without_padding(x, mask, x_);
  shared_forward(context, shape_, weights, rows, for_gate(context, rows), record);
}

Tensor SharedPart::backward(const Context& context, const SharedWeights& weights, const MoeRecord& record,
                            ConstTensor dout, const SharedRecord& made) {
  const ConstTensor& mask = record.routing.mask;
  const ConstTensor rows = without_padding(record.kept->x, mask, x_);
  const auto shards = static_cast<std::int64_t>(record.kept->shards.size()) - 1;
  gradients_.up = up_.view(DType::f32, {shards, shape_.up_rows(), shape_.hidden});
  gradients_.down = down_.view(DType::f32, {shards, shape_.hidden, shape_.inner});
  if (gate_) gradients_.gate = gate_memory_.view(DType::f32, {shards, shape_.hidden});
  return shared_backward(context, shape_, weights, rows, for_gate(context, rows), record.kept->shards,
                         without_padding(dout, mask, dout_), made, gradients_, scratch_);
}

}  // namespace expar
