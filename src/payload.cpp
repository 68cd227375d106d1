// What follows from the table of payloads.
#include <algorithm>

#include <expar/kernels.h>

namespace expar {
namespace {

constexpr bool each_dtype_once() {
  for (const Payload& a : kPayloads) {
    for (const Payload& b : kPayloads) {
      if (&a != &b && a.dtype == b.dtype) return false;
    }
  }
  return true;
}
static_assert(each_dtype_once(), "a payload is named by its dtype");

}  // namespace

const Payload* find_payload(DType dtype) {
  const auto* const found =
      std::find_if(std::begin(kPayloads), std::end(kPayloads), [&](const Payload& p) { return p.dtype == dtype; });
  return found == std::end(kPayloads) ? nullptr : found;
}

std::int64_t scale_group(DType payload, std::int64_t width) {
  const std::int64_t group = find_payload(payload)->group;
  return group == 0 ? width : group;
}

std::int64_t scales_of(DType payload, std::int64_t width) {
  if (find_payload(payload)->limit == 0 || width == 0) return 0;
  const std::int64_t group = scale_group(payload, width);
  return (width + group - 1) / group;
}

std::int64_t payload_bytes(DType payload, std::int64_t width) {
  const auto value = static_cast<std::int64_t>(size_of(payload));
  return (scales_of(payload, width) * 4 + width * value + 3) / 4 * 4;
}

}  // namespace expar
