// A view of a parameter, in memory of the layer's own or of its caller's.
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

  /// From here on the view is `lent`; where that is absent, of the layer's own memory if it has any.
  void lend(Tensor lent) { view_ = lent.absent() ? memory_.view() : lent; }

  Tensor view() const { return view_; }
  operator Tensor() const { return view_; }
  operator ConstTensor() const { return view_; }
  template <class T>
  T* as() const {
    return view_.as<T>();
  }
  explicit operator bool() const { return !view_.absent(); }
  /// Of the layer's own memory.
  std::size_t bytes() const { return memory_ ? memory_.view().byte_size() : 0; }

 private:
  Array memory_;
  Tensor view_;
};

}  // namespace expar
