// The part of a matrix that a rank holds where experts lie in slices.
#include "src/layer/part.h"

#include <cstring>

namespace expar {

void take_part(const MatrixPart& of, ConstTensor whole, Tensor part) {
  const std::size_t size = size_of(whole.dtype());
  const std::size_t bytes = static_cast<std::size_t>(of.columns.count) * size;
  for (std::int64_t r = 0; r < of.shape()[0]; ++r) {
    std::memcpy(part.bytes() + static_cast<std::size_t>(r) * bytes,
                whole.bytes() + static_cast<std::size_t>(of.start(r)) * size, bytes);
  }
}

}  // namespace expar
