// Carried ranks, beyond what every transport promises: peers that lie, carriers that fail, leaving and dying.
#include <expar/carried.h>
#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "tests/contract/transport_suite.h"
#include "tests/multirank/post_office.h"
#include "transports/carried/frame.h"

namespace expar::test {
namespace {

using carried::Frame;

constexpr int kRanks = 3, kSelf = 0, kPeer = 1;

/// Keeps what a rank sends, and lets the test deliver to it.
struct Recorder final : Carrier {
  struct Sent {
    int peer;
    Frame frame;
  };
  void open(const Deliveries& to) override { deliveries = to; }
  void send(int peer, Frame frame) override {
    if (fails) throw std::runtime_error("the cable is out");
    sent.push_back({peer, std::move(frame)});
  }
  Error settle(const Error& cause) override { return verdict(cause); }
  void close(bool failed) override {
    closed = true;
    in_good_order = !failed;
    if (fails) throw std::runtime_error("the cable is out");
  }

  std::optional<Deliveries> deliveries;
  std::vector<Sent> sent;
  std::function<Error(const Error&)> verdict = [](const Error& cause) { return cause; };
  bool fails = false;
  bool closed = false;
  bool in_good_order = false;
};

/// One of three ranks; the others are what the test makes of them.
struct Alone {
  std::shared_ptr<Recorder> carrier = std::make_shared<Recorder>();
  std::unique_ptr<Transport> transport = make_carried("carried", kSelf, kRanks, carrier);

  void deliver(Frame frame) const { carrier->deliveries->deliver(kPeer, std::move(frame)); }
  void lost() const { carrier->deliveries->lost(kPeer, "its connection was closed"); }
  Error wait_in_vain() const {
    return error_of([&] { transport->wait([] { return false; }, for_test(kPeer)); });
  }
};

std::vector<Frame> honest_frames() {
  const std::byte bytes[5]{};
  return {carried::line_frame({3, {.sequence = 1}, "text"}), carried::message_frame(7, bytes),
          carried::cause_frame(Error(ErrorCode::io, "no disk", {1, 2, "save"})), carried::bye_frame(true)};
}

void expect_blamed(const Alone& rank, const std::string& what) {
  ASSERT_TRUE(rank.transport->failure().has_value()) << what;
  const Error error = *rank.transport->failure();
  EXPECT_EQ(error.code(), ErrorCode::internal);
  EXPECT_EQ(error.peer(), kPeer);
  EXPECT_NE(error.message().find("rank 1 sent a frame that cannot be: "), std::string::npos) << error.what();
  EXPECT_NE(error.message().find(what), std::string::npos) << error.what();
}

TEST(CarriedFrames, cut_short_anywhere_are_blamed_on_their_sender) {
  for (const Frame& frame : honest_frames()) {
    for (std::size_t bytes = 0; bytes < frame.size(); ++bytes) {
      const Alone rank;
      // Nothing lies behind the frame that a sanitizer would let pass.
      rank.deliver(Frame(frame.begin(), frame.begin() + static_cast<std::ptrdiff_t>(bytes)));
      expect_blamed(rank, bytes < 8 ? "it has " + std::to_string(bytes) + " bytes" : "bytes too early");
    }
  }
}

TEST(CarriedFrames, that_go_on_behind_their_end_are_blamed_on_their_sender) {
  for (Frame frame : honest_frames()) {
    const Alone rank;
    frame.resize(frame.size() + 3);
    rank.deliver(frame);
    expect_blamed(rank, "it has 3 bytes too many");
  }
}

TEST(CarriedFrames, with_values_that_cannot_be_are_blamed_on_their_sender) {
  const auto frames = honest_frames();
  const Frame &line = frames[0], &message = frames[1], &cause = frames[2], &bye = frames[3];
  const struct {
    const Frame& of;
    std::size_t word;
    std::uint64_t value;
    const char* what;
  } lies[] = {
      {line, 0, 4, "none of this version"},
      {line, 0, ~0ull, "none of this version"},
      {line, 1, kBoardLines, "it shows line 384 of a board of 384"},
      {line, 1, ~0ull, "of a board of 384"},
      {line, 2, ~0ull, "being written"},
      {line, 10, kLineText + 1, "449 bytes of text"},
      {line, 10, ~0ull, "bytes of text"},
      {message, 2, ~0ull, "bytes too early"},
      {message, 2, 4, "1 bytes too many"},
      {cause, 1, 8, "error code 8"},
      {cause, 2, kRanks, "an error names rank 3"},
      {cause, 3, static_cast<std::uint64_t>(-2), "an error names rank -2"},
      {cause, 4, ~0ull, "bytes too early"},
      {cause, 5, ~0ull, "bytes too early"},
      {bye, 1, 2, "neither 0 nor 1"},
  };
  for (const auto& lie : lies) {
    Frame frame = lie.of;
    std::memcpy(frame.data() + 8 * lie.word, &lie.value, 8);
    const Alone rank;
    rank.deliver(frame);
    expect_blamed(rank, lie.what);
  }
}

TEST(CarriedFrames, of_noise_harm_nobody) {
  std::mt19937 draw(5);
  const auto frames = honest_frames();
  const Alone rank;
  for (int i = 0; i < 20'000; ++i) {
    Frame frame = frames[draw() % frames.size()];
    for (unsigned spoiled = draw() % 4; spoiled > 0; --spoiled) {
      frame[draw() % frame.size()] = static_cast<std::byte>(draw());
    }
    rank.deliver(std::move(frame));
  }
  EXPECT_TRUE(rank.transport->failure().has_value());
}

TEST(CarriedFrames, that_cannot_be_end_the_job_on_all_ranks) {
  const Alone rank;
  rank.deliver(Frame(2));
  const Error cause = rank.wait_in_vain();
  ASSERT_EQ(rank.carrier->sent.size(), std::size_t{kRanks - 1});
  for (int peer : {1, 2}) {
    const auto& [to, frame] = rank.carrier->sent[static_cast<std::size_t>(peer - 1)];
    EXPECT_EQ(to, peer);
    EXPECT_STREQ(carried::read_cause_frame(frame, kRanks).what(), cause.what());
  }
}

TEST(Carried, a_peer_whose_connection_ends_has_died) {
  const Alone rank;
  rank.deliver(carried::line_frame({0, {.sequence = 1}, {}}));
  rank.lost();
  const Error error = rank.wait_in_vain();
  EXPECT_EQ(error.code(), ErrorCode::peer_lost);
  EXPECT_EQ(error.peer(), kPeer);
  EXPECT_EQ(error.message(), "rank 1 died (its connection was closed) while rank 0 waited for its line (test)");
}

TEST(Carried, a_peer_whose_connection_ends_after_it_has_said_so_has_left) {
  for (const bool in_exception : {false, true}) {
    const Alone rank;
    rank.deliver(carried::bye_frame(in_exception));
    rank.lost();
    const Error error = rank.wait_in_vain();
    EXPECT_EQ(error.code(), ErrorCode::peer_lost);
    EXPECT_EQ(error.message(), in_exception ? "rank 1 has left because of an exception of its own; rank 0 still waited "
                                              "for its line (test)"
                                            : "rank 1 has left; rank 0 still waited for its line (test)");
  }
}

TEST(Carried, what_a_peer_sent_before_it_died_counts) {
  const Alone rank;
  std::array<std::byte, 5> data{};
  const auto ticket = rank.transport->start(std::array{Message{Message::Kind::receive, kPeer, 7, data.data(), 5}});
  const std::array<std::byte, 5> sent{std::byte{1}, std::byte{2}, std::byte{3}, std::byte{4}, std::byte{5}};
  rank.deliver(carried::message_frame(7, sent));
  rank.lost();
  rank.transport->wait([&] { return rank.transport->test(ticket); }, for_test(kPeer));
  EXPECT_EQ(data, sent);
}

TEST(Carried, a_dead_rank_is_named_alike_on_every_other_one) {
  PostOffice office(kRanks);
  const auto ends = run_as_threads(kRanks, [&](int self) {
    const auto transport = office.transport(self);
    barrier(*transport, 1);
    if (self == kPeer) {
      office.lose(kPeer, "its connection was closed");
      while (!transport->failure()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      return;
    }
    barrier(*transport, 2);
  });
  const Error error = expect_same_error(ends, kPeer);
  EXPECT_EQ(error.code(), ErrorCode::peer_lost);
  EXPECT_EQ(error.peer(), kPeer);
  EXPECT_NE(error.message().find("rank 1 died (its connection was closed)"), std::string::npos) << error.what();
}

TEST(Carried, a_carrier_that_throws_has_lost_its_peers) {
  const Alone rank;
  rank.carrier->fails = true;
  rank.transport->publish(0, {.sequence = 1});
  const Error error = rank.wait_in_vain();
  EXPECT_EQ(error.code(), ErrorCode::peer_lost);
  EXPECT_NE(error.message().find("rank 1 died (the cable is out)"), std::string::npos) << error.what();
}

TEST(Carried, a_carrier_that_throws_when_a_rank_leaves_is_let_go) {
  Alone rank;
  rank.carrier->fails = true;
  rank.transport.reset();
  EXPECT_EQ(rank.carrier.use_count(), 1);
}

TEST(Carried, a_carrier_knows_that_the_job_has_failed_when_a_rank_leaves) {
  Alone rank;
  rank.transport->abort(Error(ErrorCode::internal, "mine"));
  rank.transport.reset();
  EXPECT_TRUE(rank.carrier->closed);
  EXPECT_FALSE(rank.carrier->in_good_order);
}

TEST(Carried, the_settled_cause_is_what_all_throw) {
  const Alone rank;
  rank.carrier->verdict = [](const Error&) { return Error(ErrorCode::io, "rank 2 was first", {2}); };
  EXPECT_EQ(rank.transport->abort(Error(ErrorCode::internal, "mine")).message(), "rank 2 was first");
  EXPECT_EQ(rank.wait_in_vain().message(), "rank 2 was first");
  EXPECT_EQ(carried::read_cause_frame(rank.carrier->sent.back().frame, kRanks).message(), "rank 2 was first");
}

TEST(Carried, a_cause_that_cannot_be_settled_counts_as_it_is) {
  const Alone rank;
  rank.carrier->verdict = [](const Error&) -> Error { throw std::runtime_error("the store has gone"); };
  EXPECT_EQ(rank.transport->abort(Error(ErrorCode::internal, "mine")).message(), "mine");
  EXPECT_EQ(rank.wait_in_vain().message(), "mine");
}

TEST(Carried, a_peers_cause_is_not_settled_again) {
  const Alone rank;
  rank.carrier->verdict = [](const Error&) -> Error { throw std::logic_error("was asked"); };
  rank.deliver(carried::cause_frame(Error(ErrorCode::io, "no disk", {1, 2, "save"})));
  EXPECT_STREQ(rank.wait_in_vain().what(), Error(ErrorCode::io, "no disk", {1, 2, "save"}).what());
  EXPECT_EQ(rank.transport->abort(Error(ErrorCode::internal, "mine")).message(), "no disk");
  EXPECT_TRUE(rank.carrier->sent.empty()) << "who has set the cause tells it to all";
}

TEST(Carried, a_rank_says_that_it_leaves_and_lets_its_carrier_go) {
  Alone rank;
  rank.transport.reset();
  EXPECT_TRUE(rank.carrier->closed);
  EXPECT_TRUE(rank.carrier->in_good_order);
  ASSERT_EQ(rank.carrier->sent.size(), std::size_t{kRanks - 1});
  EXPECT_FALSE(carried::read_bye_frame(rank.carrier->sent[0].frame));
  for (const Frame& frame : honest_frames()) rank.deliver(frame);
  rank.deliver(Frame(2));
  rank.lost();
  EXPECT_EQ(rank.carrier->sent.size(), std::size_t{kRanks - 1}) << "it has left";
}

TEST(Carried, a_rank_may_leave_before_its_transport_goes) {
  Alone rank;
  rank.carrier->deliveries->leave();
  EXPECT_TRUE(rank.carrier->closed);
  EXPECT_EQ(carried::kind_of(rank.carrier->sent.back().frame), carried::FrameKind::bye);
  rank.transport->publish(0, {.sequence = 1});
  rank.transport->abort(Error(ErrorCode::internal, "late"));
  rank.transport.reset();
  EXPECT_EQ(rank.carrier->sent.size(), std::size_t{kRanks - 1});
}

TEST(Carried, what_no_rank_can_be_is_refused) {
  const auto carrier = std::make_shared<Recorder>();
  EXPECT_EQ(refusal_of([&] { make_carried("carried", 3, 3, carrier); }), "there is no rank 3 of 3");
  EXPECT_EQ(refusal_of([&] { make_carried("carried", 0, 0, carrier); }), "there is no rank 0 of 0");
  const Alone rank;
  for (const int peer : {-1, kSelf, kRanks}) {
    const std::string expected = "rank 0 of 3 has no peer " + std::to_string(peer);
    EXPECT_EQ(refusal_of([&] { rank.carrier->deliveries->deliver(peer, {}); }), expected);
    EXPECT_EQ(refusal_of([&] { rank.carrier->deliveries->lost(peer, "gone"); }), expected);
  }
}

}  // namespace
}  // namespace expar::test
