// What every transport promises about signals and the arena, with and without mapping.
#include <expar/transport.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <ctime>
#include <string>
#include <thread>

#include "tests/contract/transport_suite.h"

namespace expar::test {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

class Signals : public TransportSuite {};

// 1 to 20 times the same letter, which tells how many times.
std::string text_of(std::uint64_t round) {
  const std::size_t length = round % 20 + 1;
  return std::string(length, static_cast<char>('a' + length % 20));
}

TEST_P(Signals, lines_and_texts_reach_every_rank_in_order) {
  expect_success(run_transports(GetParam(), [](Transport& transport) {
    for (std::uint64_t round = 1; round <= 200; ++round) {
      const int index = static_cast<int>(round % 2);  // two lines in turn: the other one may still be read
      Line line{.sequence = round};
      for (std::size_t i = 0; i < line.words.size(); ++i) line.words[i] = 1000 * round + 7 * rank_of(transport) + i;
      const std::string text = round % 3 == 0 ? "round " + std::to_string(round) : "";
      transport.publish(index, line, text);
      for (int peer = 0; peer < transport.size(); ++peer) {
        transport.wait([&] { return transport.peek(peer, index).sequence >= round; }, for_test(peer));
        const Line seen = transport.peek(peer, index);
        ASSERT_EQ(seen.sequence, round);
        for (std::size_t i = 0; i < seen.words.size(); ++i) {
          ASSERT_EQ(seen.words[i], 1000 * round + 7 * static_cast<std::uint64_t>(peer) + i);
        }
        ASSERT_EQ(transport.text(peer, index), text);
      }
    }
  }));
}

TEST_P(Signals, every_line_of_the_board_is_its_own) {
  expect_success(run_transports(GetParam(), [](Transport& transport) {
    for (int index = 0; index < kBoardLines - 1; ++index) {
      EXPECT_EQ(transport.peek(transport.rank(), index).sequence, 0u);
      transport.publish(index, {.sequence = static_cast<std::uint64_t>(index) + 1, .words = {rank_of(transport)}});
    }
    barrier(transport, 1);
    for (int peer = 0; peer < transport.size(); ++peer) {
      for (int index = 0; index < kBoardLines - 1; ++index) {
        const Line line = transport.peek(peer, index);
        EXPECT_EQ(line.sequence, static_cast<std::uint64_t>(index) + 1);
        EXPECT_EQ(line.words[0], static_cast<std::uint64_t>(peer));
      }
    }
  }));
}

TEST_P(Signals, a_line_is_never_seen_half_written) {
  expect_success(run_transports(GetParam(), [](Transport& transport) {
    constexpr std::uint64_t kRounds = 3000;
    const int last = transport.size() - 1;
    if (transport.rank() == 0) {
      for (std::uint64_t round = 1; round <= kRounds; ++round) {
        Line line{.sequence = round};
        line.words.fill(round * 3);
        transport.publish(0, line, text_of(round));
        if (round % 64 == 0) std::this_thread::yield();
      }
    }
    std::uint64_t newest = 0;
    transport.wait(
        [&] {
          const Line line = transport.peek(0, 0);
          if (line.sequence == 0) return false;
          EXPECT_GE(line.sequence, newest);
          newest = line.sequence;
          for (std::uint64_t word : line.words) EXPECT_EQ(word, 3 * newest);
          const std::string text = transport.text(0, 0);
          if (!text.empty()) {
            EXPECT_EQ(text, std::string(text.size(), static_cast<char>('a' + text.size() % 20)));
          }
          return line.sequence == kRounds;
        },
        for_test(last == 0 ? -1 : 0));
    barrier(transport, 1);
  }));
}

TEST_P(Signals, long_texts_are_cut_between_characters) {
  expect_success(run_transports(GetParam(), [](Transport& transport) {
    const std::string exact(kLineText, 'x');
    transport.publish(0, {.sequence = 1}, exact);
    EXPECT_EQ(transport.text(transport.rank(), 0), exact);
    transport.publish(0, {.sequence = 2}, exact + "y");
    EXPECT_EQ(transport.text(transport.rank(), 0), exact);
    transport.publish(0, {.sequence = 3}, std::string(kLineText - 1, 'x') + "\xC3\xA9");
    EXPECT_EQ(transport.text(transport.rank(), 0), std::string(kLineText - 1, 'x'));
    transport.publish(0, {.sequence = 4}, "short");
    EXPECT_EQ(transport.text(transport.rank(), 0), "short");
    transport.publish(0, {.sequence = 5});
    EXPECT_EQ(transport.text(transport.rank(), 0), "");
  }));
}

TEST_P(Signals, a_thousand_barriers_let_nobody_through_early) {
  Shared<std::atomic<std::uint64_t>> entered;
  expect_success(run_transports(GetParam(), [&](Transport& transport) {
    const std::uint64_t ranks = static_cast<std::uint64_t>(transport.size());
    for (std::uint64_t round = 1; round <= 1000; ++round) {
      entered->fetch_add(1);
      barrier(transport, round);
      ASSERT_GE(entered->load(), round * ranks);
      ASSERT_LT(entered->load(), (round + 1) * ranks);
    }
  }));
}

TEST_P(Signals, a_wait_whose_condition_holds_never_fails) {
  const auto ends = run_transports(GetParam(), [](Transport& transport) {
    transport.abort(Error(ErrorCode::internal, "over", {transport.rank(), -1, "test"}));
    transport.wait([] { return true; }, for_test(-1, {}));
    EXPECT_THROW(transport.wait([] { return false; }, for_test(-1)), Error);
  });
  expect_success(ends);
}

INSTANTIATE_TEST_SUITE_P(Transports, Signals, ::testing::ValuesIn(contract_setups()), setup_name);

class ArenaSeam : public TransportSuite {};

TEST_P(ArenaSeam, peers_read_and_write_each_others_segments) {
  expect_success(run_transports(GetParam(), [](Transport& transport) {
    const int ranks = transport.size();
    constexpr std::uint64_t kSegments = 3;
    std::vector<Segment> mine;
    for (std::uint64_t round = 1; round <= kSegments; ++round) {
      const Segment segment = transport.grow(5000 * round);
      ASSERT_GE(segment.bytes.size(), 5000 * round);
      for (std::byte b : segment.bytes) ASSERT_EQ(b, std::byte{0});
      std::memset(segment.bytes.data(), transport.rank() + 1, 5000 * round);
      mine.push_back(segment);
      transport.publish(0, {.sequence = round, .words = {segment.id, segment.bytes.size()}});
      for (int peer = 0; peer < ranks; ++peer) {
        transport.wait([&] { return transport.peek(peer, 0).sequence >= round; }, for_test(peer));
        if (!transport.mapped(peer)) {
          EXPECT_THROW(transport.map(peer, segment.id), Error);
          continue;
        }
        const Line line = transport.peek(peer, 0);
        const auto bytes = transport.map(peer, static_cast<std::uint32_t>(line.words[0]));
        ASSERT_EQ(bytes.size(), line.words[1]);
        EXPECT_EQ(bytes[5000 * round - 1 - static_cast<std::size_t>(peer) % 7], static_cast<std::byte>(peer + 1));
        bytes[100 + static_cast<std::size_t>(transport.rank())] = static_cast<std::byte>(transport.rank() + 100);
      }
      // A second barrier before the line is used again.
      transport.publish(1, {.sequence = round});
      for (int peer = 0; peer < ranks; ++peer) {
        transport.wait([&] { return transport.peek(peer, 1).sequence >= round; }, for_test(peer));
        if (transport.mapped(peer)) {
          EXPECT_EQ(segment.bytes[100 + static_cast<std::size_t>(peer)], static_cast<std::byte>(peer + 100));
        }
      }
    }
    EXPECT_NE(mine[0].id, mine[1].id);
    EXPECT_TRUE(transport.mapped(transport.rank()));
    EXPECT_EQ(transport.map(transport.rank(), mine[1].id).data(), mine[1].bytes.data());
  }));
}

TEST_P(ArenaSeam, a_segment_grows_while_others_wait) {
  expect_success(run_transports(GetParam(), [](Transport& transport) {
    if (transport.rank() == 0) {
      std::this_thread::sleep_for(milliseconds(30));
      const Segment segment = transport.grow(std::size_t{3} << 20);
      segment.bytes[77] = std::byte{9};
      transport.publish(0, {.sequence = 1, .words = {segment.id}});
    }
    transport.wait([&] { return transport.peek(0, 0).sequence == 1; }, for_test(0));
    if (transport.mapped(0)) {
      EXPECT_EQ(transport.map(0, static_cast<std::uint32_t>(transport.peek(0, 0).words[0]))[77], std::byte{9});
    }
    barrier(transport, 1);
  }));
}

TEST_P(ArenaSeam, many_segments_may_wait_to_be_mapped) {
  expect_success(run_transports(GetParam(), [](Transport& transport) {
    constexpr std::uint32_t kSegments = 300;
    for (std::uint32_t i = 0; i < kSegments; ++i) transport.grow(1).bytes[0] = static_cast<std::byte>(i % 251);
    barrier(transport, 1);
    for (int peer = 0; peer < transport.size(); ++peer) {
      if (!transport.mapped(peer)) continue;
      for (std::uint32_t i : {kSegments - 1, 0u, 17u}) {
        ASSERT_EQ(transport.map(peer, i)[0], static_cast<std::byte>(i % 251));
      }
    }
    barrier(transport, 2);
  }));
}

TEST_P(ArenaSeam, a_segment_that_does_not_exist_is_an_error) {
  expect_success(run_transports(GetParam(), [](Transport& transport) {
    transport.grow(10);
    barrier(transport, 1);
    for (int peer = 0; peer < transport.size(); ++peer) {
      const Error error = error_of([&] { transport.map(peer, 7); });
      EXPECT_EQ(error.code(), ErrorCode::internal) << error.what();
    }
    barrier(transport, 2);
  }));
}

TEST_P(ArenaSeam, too_much_memory_is_no_memory_and_leaves_the_job_usable) {
  expect_success(run_transports(GetParam(), [](Transport& transport) {
    for (const std::size_t bytes : {std::size_t{1} << 50, ~std::size_t{0}}) {
      const Error error = error_of([&] { transport.grow(bytes); });
      EXPECT_EQ(error.code(), ErrorCode::no_memory) << error.what();
    }
    EXPECT_GE(transport.grow(1).bytes.size(), 1u);
    barrier(transport, 1);
  }));
}

INSTANTIATE_TEST_SUITE_P(Transports, ArenaSeam, ::testing::ValuesIn(contract_setups()), setup_name);

}  // namespace
}  // namespace expar::test
