// Objects in memory that calls give each other: each lives as long as it must, its memory serves the next one.
#pragma once

#include <cstddef>
#include <memory>
#include <memory_resource>
#include <utility>

namespace expar {

/// Keeps the resource alive, which a polymorphic_allocator does not.
template <class T>
class KeptAllocator {
 public:
  using value_type = T;

  explicit KeptAllocator(std::shared_ptr<std::pmr::memory_resource> memory) : memory_(std::move(memory)) {}
  template <class U>
  KeptAllocator(const KeptAllocator<U>& other) : memory_(other.memory()) {}  // NOLINT: what an allocator must have

  T* allocate(std::size_t count) { return static_cast<T*>(memory_->allocate(count * sizeof(T), alignof(T))); }
  void deallocate(T* at, std::size_t count) { memory_->deallocate(at, count * sizeof(T), alignof(T)); }
  const std::shared_ptr<std::pmr::memory_resource>& memory() const { return memory_; }
  template <class U>
  bool operator==(const KeptAllocator<U>& other) const {
    return memory_ == other.memory();
  }

 private:
  std::shared_ptr<std::pmr::memory_resource> memory_;
};

/// A T in `memory`, which may be a context's: the T may outlive it.
template <class T, class... Args>
std::shared_ptr<T> make_kept(const std::shared_ptr<std::pmr::memory_resource>& memory, Args&&... args) {
  return std::allocate_shared<T>(KeptAllocator<T>(memory), std::forward<Args>(args)...);
}

}  // namespace expar
