// Peers that show or send what cannot be: nothing of it is followed, the job ends, and the error names them.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#include <expar/collectives.h>
#include <expar/dispatch.h>

#include "tests/contract/forwarding.h"
#include "tests/multirank/processes.h"
#include "transports/threads/threads.h"

namespace expar::test {
namespace {

constexpr int kRanks = 3, kLiar = 1;

/// What the liar sends, and where its segments end as the others see them, is spoiled from now on.
class Spoiled final : public Forwarding {
 public:
  Spoiled(std::unique_ptr<Transport> to, const std::atomic<bool>& spoil) : Forwarding(std::move(to)), spoil_(spoil) {}
  Ticket start(std::span<const Message> messages) override {
    for (const Message& message : messages) {
      if (spoil_ && rank() == kLiar && message.kind == Message::Kind::send)
        std::memset(message.data, 0xff, message.bytes);
    }
    return Forwarding::start(messages);
  }
  std::span<std::byte> map(int peer, std::uint32_t id) override {
    const std::span<std::byte> all = Forwarding::map(peer, id);
    return spoil_ && peer == kLiar && rank() != kLiar ? all.first(std::min<std::size_t>(all.size(), 64)) : all;
  }

 private:
  const std::atomic<bool>& spoil_;
};

/// Runs `before` honestly and `after` with the liar; all ranks must throw the same. Returns that error.
Error lied_to(bool mapping, const std::function<void(const Context&, const std::function<void()>& lie)>& rank_main) {
  const threads::ThreadsJob job(kRanks, mapping);
  std::atomic<bool> spoil{false};
  std::vector<Outcome> outcomes(kRanks);
  std::vector<std::thread> ranks;
  for (int rank = 0; rank < kRanks; ++rank) {
    ranks.emplace_back([&, rank] {
      outcomes[static_cast<std::size_t>(rank)] = end_of([&] {
        const Context context(Communicator(std::make_unique<Spoiled>(job.transport(rank), spoil)),
                              {.threads = 1, .backend = "reference"});
        rank_main(context, [&] {
          barrier(context);
          spoil = true;
        });
        barrier(context);  // who has noticed nothing is told here
      });
    });
  }
  for (std::thread& rank : ranks) rank.join();
  return expect_same_error(outcomes);
}

const std::vector<std::int32_t> kIds{0, 1, 2, 1, 2, 0};  // [3, 2] of 3 experts

TEST(LyingPeer, sends_counts_that_cannot_be) {
  const Error error = lied_to(false, [](const Context& context, const auto& lie) {
    lie();
    make_plan(context, ConstTensor(kIds.data(), {3, 2}), {.experts = 3});
  });
  EXPECT_EQ(error.code(), ErrorCode::internal);
  EXPECT_NE(error.message().find("rank 1 sent counts that cannot be"), std::string::npos) << error.what();
}

TEST(LyingPeer, sends_rows_for_other_experts_than_its_plan_says) {
  const Error error = lied_to(false, [](const Context& context, const auto& lie) {
    const Plan plan = make_plan(context, ConstTensor(kIds.data(), {3, 2}), {.experts = 3});
    const Array x(DType::f32, {3, 4});
    lie();
    dispatch(context, x, {}, plan);
  });
  EXPECT_EQ(error.code(), ErrorCode::internal);
  EXPECT_NE(error.message().find("rank 1 sent other experts than its plan says"), std::string::npos) << error.what();
}

TEST(LyingPeer, shows_a_block_beyond_its_segment) {
  const Error error = lied_to(true, [](const Context& context, const auto& lie) {
    const Array data(DType::f32, {1000});
    lie();
    broadcast(context, data, kLiar);
  });
  EXPECT_EQ(error.code(), ErrorCode::internal);
  EXPECT_NE(error.message().find("rank 1 showed 4000 bytes at offset"), std::string::npos) << error.what();
  EXPECT_NE(error.message().find("of a segment of 64"), std::string::npos) << error.what();
}

}  // namespace
}  // namespace expar::test
