// The library knows its version.
#include <expar/version.h>
#include <gtest/gtest.h>

#include <string>

TEST(Version, has_three_numbers) {
  const std::string version = expar::version();
  int dots = 0;
  for (char c : version) {
    if (c == '.') {
      ++dots;
    } else {
      EXPECT_TRUE(c >= '0' && c <= '9') << version;
    }
  }
  EXPECT_EQ(dots, 2) << version;
}
