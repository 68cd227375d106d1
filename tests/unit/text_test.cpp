// What of a text is trained on and what is held out; which targets a batch draws, and who holds its tokens.
#include "models/text.h"

#include <algorithm>
#include <cstdio>
#include <set>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "models/batch.h"

namespace expar {
namespace {

constexpr std::int64_t kContext = 5;

bool held_out(std::int64_t position) { return position / Text::kBlock % 10 == 9; }

// As many bytes as asked for, no two neighbours alike.
Text make_text(std::int64_t size) {
  std::vector<std::uint8_t> bytes(static_cast<std::size_t>(size));
  for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<std::uint8_t>(i * 7 + i / 256);
  return {std::move(bytes), kContext, "a test"};
}

std::string message_of(std::int64_t size, std::int64_t context) {
  try {
    Text(std::vector<std::uint8_t>(static_cast<std::size_t>(size)), context, "a.txt");
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::bad_argument);
    return error.message();
  }
  return "";
}

class TextOfSize : public testing::TestWithParam<std::int64_t> {};

TEST_P(TextOfSize, holds_out_every_tenth_block) {
  const Text text = make_text(GetParam());
  std::vector<std::int64_t> expected;
  for (std::int64_t p = 0; p < text.size(); ++p) {
    if (held_out(p)) expected.push_back(p);
  }
  ASSERT_EQ(text.heldout_targets(), static_cast<std::int64_t>(expected.size()));
  for (std::int64_t i = 0; i < text.heldout_targets(); ++i) {
    ASSERT_EQ(text.heldout_target(i), expected[static_cast<std::size_t>(i)]);
  }
}

TEST_P(TextOfSize, trains_on_all_that_touches_no_held_out_byte) {
  const Text text = make_text(GetParam());
  std::vector<std::int64_t> expected;
  for (std::int64_t p = kContext; p < text.size(); ++p) {
    if (!held_out(p) && !held_out(p - kContext)) expected.push_back(p);
  }
  ASSERT_EQ(text.training_targets(), static_cast<std::int64_t>(expected.size()));
  for (std::int64_t i = 0; i < text.training_targets(); ++i) {
    ASSERT_EQ(text.training_target(i), expected[static_cast<std::size_t>(i)]);
  }
}

INSTANTIATE_TEST_SUITE_P(, TextOfSize,
                         testing::Values(Text::kHeldOut + 1, Text::kPeriod, Text::kPeriod + 1, Text::kPeriod + kContext,
                                         Text::kPeriod + kContext + 1, 2 * Text::kPeriod - 1, 250000));

TEST(Text, gives_the_bytes_before_a_target) {
  const Text text = make_text(Text::kPeriod);
  const auto before = text.before(100);
  ASSERT_EQ(before.size(), static_cast<std::size_t>(kContext));
  for (std::int64_t i = 0; i < kContext; ++i) {
    EXPECT_EQ(before[static_cast<std::size_t>(i)], text[100 - kContext + i]);
  }
}

TEST(Text, refuses_what_is_too_short_and_says_so) {
  EXPECT_EQ(message_of(0, kContext),
            "the text 'a.txt' is too short: it has 0 bytes, and the first held-out block begins at byte 73728");
  EXPECT_NE(message_of(Text::kHeldOut, kContext), "");
  EXPECT_EQ(message_of(Text::kHeldOut + 1, kContext), "");
  EXPECT_EQ(message_of(Text::kPeriod, 0), "context 0 is not in 1 ... 8192");
  EXPECT_EQ(message_of(Text::kPeriod, 8193), "context 8193 is not in 1 ... 8192");
  EXPECT_EQ(message_of(Text::kPeriod, 8192), "");
}

TEST(Text, is_read_whole_or_the_reason_is_named) {
  const std::string path = testing::TempDir() + "text_test.txt";
  std::FILE* file = std::fopen(path.c_str(), "wb");
  ASSERT_NE(file, nullptr);
  std::vector<std::uint8_t> bytes(300000);
  for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<std::uint8_t>(i * i);
  std::fwrite(bytes.data(), 1, bytes.size(), file);
  std::fclose(file);
  EXPECT_EQ(read_file(path), bytes);
  bytes.resize(1000);
  EXPECT_EQ(read_file(path, 1000), bytes);
  std::remove(path.c_str());

  for (const auto& [name, reason] :
       {std::pair{path, "No such file or directory"}, std::pair{testing::TempDir(), "Is a directory"}}) {
    try {
      read_file(name);
      ADD_FAILURE() << name << " was read";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::io);
      EXPECT_EQ(error.message(), "cannot read the text '" + name + "': " + reason);
    }
  }
}

TEST(Sampler, draws_every_target_once_before_any_again) {
  for (const std::int64_t targets : {1, 2, 3, 64, 1000, 4097}) {
    const Sampler sampler(targets, 7);
    std::vector<std::vector<std::int64_t>> passes(2);
    for (std::int64_t token = 0; token < 2 * targets; ++token) {
      passes[static_cast<std::size_t>(token / targets)].push_back(sampler.target(token));
    }
    if (targets > 60) {
      EXPECT_NE(passes[0], passes[1]) << targets;
      EXPECT_FALSE(std::is_sorted(passes[0].begin(), passes[0].end()));
    }
    for (const auto& pass : passes) {
      const std::set<std::int64_t> distinct(pass.begin(), pass.end());
      EXPECT_EQ(static_cast<std::int64_t>(distinct.size()), targets);
      EXPECT_EQ(*distinct.begin(), 0);
      EXPECT_EQ(*distinct.rbegin(), targets - 1);
    }
  }
}

TEST(Sampler, depends_on_the_seed_alone) {
  const Sampler a(1000, 1), again(1000, 1), b(1000, 2);
  int equal = 0;
  for (std::int64_t token = 0; token < 1000; ++token) {
    EXPECT_EQ(a.target(token), again.target(token));
    equal += a.target(token) == b.target(token) ? 1 : 0;
  }
  EXPECT_LT(equal, 20);
}

TEST(Sharding, gives_each_token_to_one_rank_and_cuts_shards_alike) {
  for (const std::int64_t shards : {1, 3, 8}) {
    for (const std::int64_t tokens : {8, 13, 64}) {
      const Sharding whole = shard_batch(tokens, shards, 0, 1);
      for (const int ranks : {1, 2, 3, 4, 8, 11}) {
        std::vector<std::int64_t> cuts{0};
        for (int rank = 0; rank < ranks; ++rank) {
          const Sharding part = shard_batch(tokens, shards, rank, ranks);
          EXPECT_EQ(part.first_token, cuts.back());
          for (std::int64_t s = 1; s <= part.local_shards(); ++s) {
            cuts.push_back(part.first_token + part.offsets[static_cast<std::size_t>(s)]);
          }
        }
        EXPECT_EQ(cuts, whole.offsets) << tokens << " tokens, " << shards << " shards, " << ranks << " ranks";
        EXPECT_EQ(cuts.back(), tokens);
      }
    }
  }
}

TEST(Batch, carries_each_target_with_its_context) {
  const Text text = make_text(Text::kPeriod);
  Batch batch;
  batch.positions = {9, 70000, 80000};
  fill_batch(text, batch);
  ASSERT_EQ(batch.targets.size(), 3u);
  ASSERT_EQ(batch.contexts.size(), static_cast<std::size_t>(3 * kContext));
  EXPECT_EQ(batch.targets[1], text[70000]);
  EXPECT_EQ(batch.contexts[0], text[4]);
  EXPECT_EQ(batch.contexts[14], text[79999]);
}

}  // namespace
}  // namespace expar
