// Copies of rows: the same bytes whichever way they are stored, and the way that was fastest.
#include "src/util/copy.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "src/util/store_choice.h"

namespace expar {
namespace {

constexpr Store kAll[] = {Store::cached, Store::string, Store::streaming};

TEST(CopyRows, give_the_same_bytes_by_every_store) {
  static_assert(std::size(kAll) == kStores);
  const std::vector<std::int32_t> rows{4, 0, 0, 3};
  // Around one and several cache lines, and odd tails behind them.
  for (const std::size_t bytes : {0, 1, 2, 3, 31, 63, 64, 65, 127, 128, 129, 191, 192, 1000, 4096, 4103}) {
    std::vector<std::byte> from(5 * bytes + 1);
    for (std::size_t i = 0; i < from.size(); ++i) from[i] = static_cast<std::byte>(i * 31 + i / 256);
    for (const std::size_t misaligned : {0, 1, 8, 60}) {
      for (const Store store : kAll) {
        alignas(64) static std::array<std::byte, 1 << 15> to;
        to.fill(std::byte{0xee});
        std::byte* const first = to.data() + 64 + misaligned;
        copy_rows(first, from.data() + 1, rows, bytes, store);
        const auto at = [&] {
          return testing::Message() << bytes << " bytes, store " << static_cast<int>(store) << ", " << misaligned
                                    << " bytes off a line";
        };
        for (std::size_t i = 0; i < rows.size(); ++i) {
          const auto row = static_cast<std::size_t>(rows[i]);
          EXPECT_EQ(std::memcmp(first + i * bytes, from.data() + 1 + row * bytes, bytes), 0) << at() << ", row " << i;
        }
        EXPECT_TRUE(std::all_of(to.data(), first, [](std::byte b) { return b == std::byte{0xee}; })) << at();
        EXPECT_TRUE(std::all_of(first + rows.size() * bytes, to.data() + to.size(), [](std::byte b) {
          return b == std::byte{0xee};
        })) << at();
      }
    }
  }
}

/// How often each store was taken in 60 copies of which all but those of `fastest` take long.
std::array<int, kStores> taken(Store fastest) {
  StoreChoice choice;
  std::array<int, kStores> times{};
  for (int i = 0; i < 60; ++i) {
    choice.run(100, [&](Store store) {
      if (store != fastest) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      ++times[static_cast<std::size_t>(store)];
    });
  }
  return times;
}

TEST(StoreChoice, takes_the_fastest_store_once_it_has_tried_all) {
  for (const Store fastest : kAll) {
    int most = 0;
    for (int attempt = 0; attempt < 5 && most < 40; ++attempt) {  // the machine may be busy with other things
      const std::array<int, kStores> times = taken(fastest);
      EXPECT_GE(*std::min_element(times.begin(), times.end()), 3);
      most = times[static_cast<std::size_t>(fastest)];
    }
    EXPECT_GE(most, 40) << "store " << static_cast<int>(fastest);
  }
}

}  // namespace
}  // namespace expar
