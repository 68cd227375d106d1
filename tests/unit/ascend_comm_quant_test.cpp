// The results' int8 against its formula in plain loops.
#include "src/ascend/comm_quant.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include <expar/random.h>

namespace expar::ascend {
namespace {

constexpr std::int64_t kWidth = 1030;  // the last block is not whole

template <class E>
std::vector<E> sample() {
  const Random random(5, "results");
  std::vector<E> x;
  for (std::int64_t i = 0; i < kWidth; ++i) x.emplace_back(random.normal(static_cast<std::uint64_t>(i)));
  for (std::int64_t i = 8; i < 16; ++i) x[static_cast<std::size_t>(i)] = E(0.0F);
  // Halves of a step: max 127 makes the scale 1.
  for (std::int64_t i = 16; i < 24; ++i) x[static_cast<std::size_t>(i)] = E(static_cast<float>(i) - 19.5F);
  x[16] = E(-127.0F);
  x[25] = E(std::numeric_limits<float>::infinity());
  x[33] = E(std::numeric_limits<float>::quiet_NaN());
  return x;
}

template <class E>
void expect_the_formula(const std::vector<E>& x) {
  std::vector<std::byte> row(2 * 2048);
  Pool pool(1);
  const auto bytes = static_cast<std::int64_t>(row.size());
  comm_quantise(pool, ConstTensor(x.data(), Shape{1, kWidth}), Tensor(row.data(), DType::int8, Shape{1, bytes}));
  const auto* const scales = reinterpret_cast<const E*>(row.data() + 1056);
  std::vector<E> back(x.size());
  comm_dequantise(row.data(), Tensor(back.data(), Shape{kWidth}));
  for (std::size_t first = 0; first < x.size(); first += 8) {
    float most = 0;
    bool finite = true;
    for (std::size_t i = first; i < std::min(first + 8, x.size()); ++i) {
      finite = finite && std::isfinite(static_cast<float>(x[i]));
      most = std::max(most, std::fabs(static_cast<float>(x[i])));
    }
    const float scale = finite ? most / 127 : std::numeric_limits<float>::quiet_NaN();
    const auto stored = static_cast<float>(scales[first / 8]);
    EXPECT_TRUE(finite ? stored == static_cast<float>(E(scale)) : std::isnan(stored)) << first;
    for (std::size_t i = first; i < std::min(first + 8, x.size()); ++i) {
      const int q =
          scale > 0 ? static_cast<int>(std::clamp(std::nearbyint(static_cast<float>(x[i]) / scale), -127.0F, 127.0F))
                    : 0;
      EXPECT_EQ(std::to_integer<std::uint8_t>(row[i]), static_cast<std::uint8_t>(q)) << i;
      const auto value = static_cast<float>(back[i]);
      EXPECT_TRUE(finite ? value == static_cast<float>(E(static_cast<float>(q) * stored)) : std::isnan(value)) << i;
    }
  }
}

TEST(CommQuant, has_a_scale_for_each_8_values) {
  expect_the_formula(sample<bf16>());
  expect_the_formula(sample<f16>());
}

TEST(CommQuant, keeps_within_127_where_a_scale_is_subnormal) {
  std::vector<bf16> x(kWidth);
  for (std::size_t i = 0; i < x.size(); ++i) x[i].bits = static_cast<std::uint16_t>((i * 37) % 128);  // subnormals
  expect_the_formula(x);
}

}  // namespace
}  // namespace expar::ascend
