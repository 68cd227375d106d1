// The largest of the values that it is offered, in descending order.
#pragma once

#include <cstdint>

namespace expar {

/// Keeps up to `most` of them. Offered in ascending order of their ids, ties go to the lower id. A value that is no
/// number is taken only while there is room.
class TopK {
 public:
  /// Writes into ids [most]; values [most] is scratch.
  TopK(std::int64_t most, std::int32_t* ids, double* values) : most_(most), ids_(ids), values_(values) {}

  void offer(std::int32_t id, double value) {
    std::int64_t place = found_;
    while (place > 0 && value > values_[place - 1]) --place;
    if (place == most_) return;
    if (found_ < most_) ++found_;
    for (std::int64_t k = found_ - 1; k > place; --k) {
      values_[k] = values_[k - 1];
      ids_[k] = ids_[k - 1];
    }
    values_[place] = value;
    ids_[place] = id;
  }
  std::int64_t found() const { return found_; }

 private:
  std::int64_t most_, found_ = 0;
  std::int32_t* ids_;
  double* values_;
};

}  // namespace expar
