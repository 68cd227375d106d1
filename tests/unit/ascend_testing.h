// What the tests of the operators share: one rank, and random tensors.
#pragma once

#include <cstdint>
#include <functional>
#include <random>
#include <vector>

#include <expar/context.h>
#include <expar/registry.h>

#include "src/ascend/elements.h"

namespace expar::ascend {

/// Runs `body` on one rank of two threads.
inline void on_one_rank(const std::function<void(const Context&)>& body) {
  run_threads(1, [&](Communicator communicator) { body(Context(std::move(communicator), {.threads = 2})); });
}

/// Random numbers that follow from the seed alone.
class Draw {
 public:
  explicit Draw(unsigned seed) : bits_(seed) {}

  /// From `first` to `last`.
  std::int64_t number(std::int64_t first, std::int64_t last) {
    return first + static_cast<std::int64_t>(bits_() % static_cast<unsigned long>(last - first + 1));
  }
  float real() { return normal_(bits_); }
  Array reals(DType dtype, Shape shape) {
    Array array(dtype, shape);
    for (std::int64_t i = 0; i < shape.elements(); ++i) set_number(array, i, real());
    return array;
  }
  Array integers(DType dtype, Shape shape, std::int64_t first, std::int64_t last) {
    Array array(dtype, shape);
    for (std::int64_t i = 0; i < shape.elements(); ++i) set_integer(array, i, number(first, last));
    return array;
  }
  DType dtype() {
    constexpr DType kDTypes[] = {DType::f32, DType::bf16, DType::f16};
    return kDTypes[number(0, 2)];
  }

 private:
  std::mt19937 bits_;
  std::normal_distribution<float> normal_;
};

/// How far a result may be off that was rounded to `dtype` once, relative.
inline double relative(DType dtype) { return dtype == DType::f32 ? 1e-5 : dtype == DType::f16 ? 0x1p-10 : 0x1p-8; }

}  // namespace expar::ascend
