// The sentences of refusals.
#include "src/util/check.h"

#include <algorithm>

namespace expar {

void refuse(const std::string& message) { throw Error(ErrorCode::bad_argument, message); }

std::string shown(const ConstTensor& tensor) { return std::string(name(tensor.dtype())) + " " + tensor.shape().str(); }

std::string shown(std::span<const std::int64_t> values) {
  std::string text;
  for (const std::int64_t value : values) text += (text.empty() ? "" : ", ") + std::to_string(value);
  return text;
}

void require(const std::string& what, const ConstTensor& tensor, DType dtype, const Shape& shape) {
  if (tensor.dtype() == dtype && tensor.shape() == shape) return;
  refuse(what + " is " + shown(tensor) + ", should be " + std::string(name(dtype)) + " " + shape.str());
}

void require_rows(const std::string& what, const ConstTensor& tensor) {
  if (tensor.dtype() == DType::f32 || tensor.dtype() == DType::bf16) return;
  refuse(what + " is " + std::string(name(tensor.dtype())) + ", neither f32 nor bf16");
}

void require_experts(const std::string& what, const ConstTensor& ids, std::int64_t experts, std::int64_t least) {
  const std::int64_t topk = ids.size(1);
  for (std::int64_t i = 0; i < ids.elements(); ++i) {
    const std::int32_t id = ids.as<std::int32_t>()[i];
    if (id >= least && id < experts) continue;
    refuse(what + "[" + std::to_string(i / topk) + "," + std::to_string(i % topk) + "] = " + std::to_string(id) +
           " is no expert below " + std::to_string(experts) + (least < 0 ? " and not -1" : ""));
  }
}

void require_ascending(const std::string& what, std::span<const std::int64_t> bounds, std::int64_t tokens) {
  if (!bounds.empty() && bounds.front() == 0 && bounds.back() == tokens &&
      std::is_sorted(bounds.begin(), bounds.end())) {
    return;
  }
  refuse(what + " are [" + shown(bounds) + "], should ascend from 0 to the " + std::to_string(tokens) +
         " tokens of this rank");
}

}  // namespace expar
