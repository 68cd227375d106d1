// The refusals that the operators share.
#include "src/ascend/elements.h"

namespace expar::ascend {
namespace {

std::string of(std::int64_t index) { return std::to_string(index); }

}  // namespace

Array converted(const ConstTensor& tensor, DType dtype) {
  Array out(dtype, tensor.shape());
  for (std::int64_t i = 0; i < tensor.elements(); ++i) set_number(out, i, number(tensor, i));
  return out;
}

void require_range(const std::string& what, std::int64_t value, std::int64_t least, std::int64_t most) {
  if (value >= least && value <= most) return;
  refuse(what + " is " + of(value) + ", should be " +
         (least == most ? of(most) : "from " + of(least) + " to " + of(most)));
}

void require_range(const char* what, std::int64_t i, std::int64_t value, std::int64_t least, std::int64_t most) {
  if (value < least || value > most) require_range(std::string(what) + "[" + of(i) + "]", value, least, most);
}

void require_range(const char* what, std::int64_t row, std::int64_t column, std::int64_t value, std::int64_t least,
                   std::int64_t most) {
  if (value >= least && value <= most) return;
  require_range(std::string(what) + "[" + of(row) + "," + of(column) + "]", value, least, most);
}

void require_axes(const std::string& what, const ConstTensor& tensor, int axes) {
  if (tensor.shape().rank() == axes) return;
  refuse(what + " is " + shown(tensor) + ", should have " + of(axes) + (axes == 1 ? " axis" : " axes"));
}

void require_integers(const std::string& what, const ConstTensor& tensor) {
  if (tensor.dtype() == DType::int32 || tensor.dtype() == DType::int64) return;
  refuse(what + " is " + shown(tensor) + ", should be int32 or int64");
}

void require_numbers(const std::string& what, const ConstTensor& tensor) {
  if (tensor.dtype() == DType::f32 || tensor.dtype() == DType::bf16 || tensor.dtype() == DType::f16) return;
  refuse(what + " is " + shown(tensor) + ", should be f32, bf16 or f16");
}

}  // namespace expar::ascend
