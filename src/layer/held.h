// A view of a parameter, and the memory that it lies in.
#pragma once

#include <cstddef>
#include <utility>

#include <expar/tensor.h>

namespace expar {

/// Absent until something is assigned.
class Held {
 public:
  Held() = default;
  explicit Held(Array memory) : memory_(std::move(memory)), view_(memory_.view()) {}

  Tensor view() const { return view_; }
  operator Tensor() const { return view_; }
  operator ConstTensor() const { return view_; }
  template <class T>
  T* as() const {
    return view_.as<T>();
  }
  explicit operator bool() const { return !view_.absent(); }
  std::size_t bytes() const { return memory_ ? memory_.view().byte_size() : 0; }

 private:
  Array memory_;
  Tensor view_;
};

}  // namespace expar
