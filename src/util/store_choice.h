// Chooses how to store by measuring: the wrong way costs 2-3x, and the size alone does not tell which it is.
#pragma once

#include <array>
#include <bit>
#include <chrono>
#include <cstddef>
#include <cstdint>

#include "src/util/copy.h"

namespace expar {

/// Remembers, per power of two of bytes, what each store cost, tries all of them first and again now and then.
class StoreChoice {
 public:
  /// Runs copy(store) with the store that was fastest for about so many bytes.
  template <class Copy>
  void run(std::size_t bytes, Copy copy) {
    Size& size = sizes_[static_cast<std::size_t>(std::bit_width(bytes))];
    const int store = size.next();
    const auto begin = std::chrono::steady_clock::now();
    copy(static_cast<Store>(store));
    const std::chrono::duration<float> took = std::chrono::steady_clock::now() - begin;
    size.learn(store, took.count() / static_cast<float>(bytes));
  }

 private:
  static constexpr std::uint32_t kTrials = 3 * kStores;  // the first rounds try every store
  static constexpr std::uint32_t kPeriod = 64;           // afterwards one copy in so many tries another one
  static constexpr float kFresh = 0.3F;                  // weight of a new measurement

  struct Size {
    int next() const {
      if (runs < kTrials) return static_cast<int>(runs % kStores);
      if (runs % kPeriod == 0) return static_cast<int>(runs / kPeriod % kStores);
      int best = 0;
      for (int store = 1; store < kStores; ++store) {
        if (cost[static_cast<std::size_t>(store)] < cost[static_cast<std::size_t>(best)]) best = store;
      }
      return best;
    }
    void learn(int store, float seconds_per_byte) {
      float& known = cost[static_cast<std::size_t>(store)];
      known = runs < kStores ? seconds_per_byte : known + kFresh * (seconds_per_byte - known);
      ++runs;
    }
    std::array<float, kStores> cost{};
    std::uint32_t runs = 0;
  };
  std::array<Size, 65> sizes_{};
};

}  // namespace expar
