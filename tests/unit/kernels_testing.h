// What the tests of kernels share: the tables under test, random operands, comparisons that print the worst element.
#pragma once

#include <expar/kernels.h>

#include <gtest/gtest.h>

#include <cfenv>
#include <cmath>
#include <cstring>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "backends/cpu/cpu.h"
#include "backends/reference/reference.h"
#include "src/util/processor.h"
#include "tests/elements.h"

namespace expar {

constexpr double kEpsF32 = 0x1p-24;    // half a unit in the last place, relative
constexpr double kEpsBf16 = 0x1p-8;    // a whole one: the f32 before it may lie on the other side of a tie
constexpr double kFlushed = 0x1p-125;  // what results near the smallest normal may lose to flush-to-zero

inline double rounding(DType dtype) { return dtype == DType::bf16 ? kEpsBf16 : kEpsF32; }

/// Every table that runs on this machine: reference, then the cpu's instruction sets.
inline std::vector<const Kernels*> tables() {
  std::vector<const Kernels*> all = {&reference_kernels()};
  for (const Kernels* k : cpu_kernels()) all.push_back(k);
  return all;
}

inline std::string label(const Kernels& k) { return std::string(k.name) + "_" + k.isa; }

class EveryTable : public ::testing::TestWithParam<const Kernels*> {
 public:
  const Kernels& kernels() const { return *GetParam(); }
};
#define EXPAR_FOR_EVERY_TABLE(suite)                                    \
  class suite : public EveryTable {};                                   \
  INSTANTIATE_TEST_SUITE_P(table, suite, ::testing::ValuesIn(tables()), \
                           [](const auto& tested) { return label(*tested.param); })

/// Memory of `count` elements of f32 or bf16; reads as float.
struct Operand {
  Operand() = default;
  Operand(DType type, std::int64_t count) : dtype(type), memory(type, {count}) {
    // Whatever a kernel forgets to write stays NaN.
    std::memset(memory.view().data(), 0xff, memory.view().byte_size());
  }

  static Operand random(DType type, std::int64_t count, unsigned seed, float range = 1) {
    const FloatMode mode;  // the same operands whatever mode a test has set
    Operand o(type, count);
    std::mt19937 bits(seed);
    for (std::int64_t i = 0; i < count; ++i) {
      o.set(i, range * (static_cast<float>(bits() >> 8) * 0x1p-23F - 1));
    }
    return o;
  }

  float operator[](std::int64_t i) const { return test::value(memory, i); }
  void set(std::int64_t i, float value) { test::set(memory, i, value); }
  void* data() { return memory.view().data(); }
  const void* data() const { return memory.view().data(); }
  float* f32() { return memory.as<float>(); }
  std::int64_t count() const { return memory.view().elements(); }
  std::string bytes() const {
    return {reinterpret_cast<const char*>(memory.view().bytes()), memory.view().byte_size()};
  }

  DType dtype = DType::f32;
  Array memory;
};

/// FNV-1a.
inline std::uint64_t hash_of(const std::string& bytes) {
  std::uint64_t hash = 0xcbf29ce484222325u;
  for (const char byte : bytes) hash = (hash ^ static_cast<unsigned char>(byte)) * 0x100000001b3u;
  return hash;
}

/// How this thread rounds now, by what it does: fegetround() alone does not see every mode register.
inline std::string rounding_in_force() {
  volatile float one = 1, little = 0x1p-30F, tiny = 0x1p-140F;
  std::string text = one + little > 1 ? "up" : -one - little < -1 ? "down" : one - little < 1 ? "zero" : "nearest";
  return text + (tiny * 2 == 0 ? ", flushing" : "");
}

/// Runs `bytes` in several modes of the caller: the result must not change, nor the mode.
template <class F>
void expect_the_same_in_every_mode(F bytes) {
  const std::string wanted = bytes();
  for (const int rounding : {FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO}) {
    std::fesetround(rounding);
    const std::string before = rounding_in_force(), got = bytes(), after = rounding_in_force();
    std::fesetround(FE_TONEAREST);
    EXPECT_TRUE(got == wanted) << before;
    EXPECT_EQ(after, before);
  }
  {
    const FloatMode flushing;
    const std::string before = rounding_in_force();
    EXPECT_TRUE(bytes() == wanted) << before;
    EXPECT_EQ(rounding_in_force(), before);
  }
}

/// Keeps the element that exceeds its tolerance most; a test ends with EXPECT_TRUE(worst.good()) << worst.
class Worst {
 public:
  void see(std::int64_t at, double got, double wanted, double tolerance) {
    const double excess = std::abs(got - wanted) / tolerance;
    if (excess <= excess_) return;  // NaN passes on to the assignment
    if (std::isnan(excess_)) return;
    excess_ = excess;
    text_.str({});
    text_ << "worst element " << at << ": got " << got << ", wanted " << wanted << ", off by " << excess
          << " tolerances of " << tolerance;
  }
  bool good() const { return excess_ <= 1; }
  friend std::ostream& operator<<(std::ostream& out, const Worst& w) { return out << w.text_.str(); }

 private:
  double excess_ = 0;
  std::ostringstream text_;
};

}  // namespace expar
