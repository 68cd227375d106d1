// Random numbers that depend on what they are for, not on who draws them: keyed by (seed, stream, index).
#pragma once

#include <cstdint>
#include <string_view>

namespace expar {

/// A stream of numbers, any of which can be had without the others. `stream` names what they are for
/// ("layers.0.experts.5.up"), so that a value is the same on whichever rank it is drawn.
class Random {
 public:
  Random(std::uint64_t seed, std::string_view stream);
  std::uint64_t bits(std::uint64_t index) const;
  /// In [0, 1), 24 bits.
  float uniform(std::uint64_t index) const;
  /// Mean 0, variance 1 (Box & Muller 1958).
  float normal(std::uint64_t index) const;

 private:
  std::uint64_t key_;
};

}  // namespace expar
