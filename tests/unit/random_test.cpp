// Random numbers: which they are, how they are distributed, that streams differ.
#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include <expar/random.h>

namespace expar {
namespace {

TEST(Random, gives_the_same_numbers_for_the_same_words) {
  // Checkpoints and losses of the past rely on these values.
  const Random random(1, "layers.0.experts.5.up");
  EXPECT_EQ(random.bits(0), 595616214712964888U);
  EXPECT_EQ(random.bits(1000000007), 6660073267603216643U);
  EXPECT_EQ(random.uniform(2), 0x1.6a0edap-1F);
  EXPECT_EQ(random.normal(3), -0x1.8634ccp-2F);
}

TEST(Random, gives_other_numbers_for_another_seed_stream_or_index) {
  std::set<std::uint64_t> seen;
  for (const std::uint64_t seed : {0, 1, 2})
    for (const char* stream : {"", "a", "b", "ab", "ba"})
      for (std::uint64_t i = 0; i < 100; ++i) seen.insert(Random(seed, stream).bits(i));
  EXPECT_EQ(seen.size(), 3 * 5 * 100U);
}

TEST(Random, is_uniform_on_the_unit_interval) {
  const Random random(2, "uniform");
  constexpr int kCount = 100000;
  double sum = 0;
  int bins[10] = {};
  for (int i = 0; i < kCount; ++i) {
    const float u = random.uniform(static_cast<std::uint64_t>(i));
    ASSERT_GE(u, 0.0F);
    ASSERT_LT(u, 1.0F);
    sum += u;
    ++bins[static_cast<int>(u * 10)];
  }
  EXPECT_NEAR(sum / kCount, 0.5, 0.005);                              // five deviations
  for (const int bin : bins) EXPECT_NEAR(bin, kCount / 10.0, 475.0);  // five deviations
}

TEST(Random, is_normal_with_mean_0_and_variance_1) {
  const Random random(3, "normal");
  constexpr int kCount = 100000;
  double sum = 0, squares = 0, fourths = 0;
  for (int i = 0; i < kCount; ++i) {
    const double n = random.normal(static_cast<std::uint64_t>(i));
    ASSERT_TRUE(std::isfinite(n));
    sum += n;
    squares += n * n;
    fourths += n * n * n * n;
  }
  EXPECT_NEAR(sum / kCount, 0.0, 0.016);  // five deviations each
  EXPECT_NEAR(squares / kCount, 1.0, 0.0225);
  EXPECT_NEAR(fourths / kCount, 3.0, 0.155);
}

}  // namespace
}  // namespace expar
