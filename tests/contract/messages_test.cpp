// What every transport promises about messages.
#include <expar/transport.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "tests/contract/transport_suite.h"

namespace expar::test {
namespace {

using Bytes = std::vector<std::byte>;

// Bytes that tell sender, receiver, tag and position apart.
Bytes contents(int from, int to, std::uint64_t tag, std::size_t bytes) {
  Bytes data(bytes);
  std::uint64_t state = tag * 1'000'003 + static_cast<std::uint64_t>(from) * 257 + static_cast<std::uint64_t>(to) + 1;
  for (std::size_t i = 0; i < bytes; i += 8) {
    state = state * 6364136223846793005U + 1442695040888963407U;
    std::memcpy(data.data() + i, &state, std::min<std::size_t>(8, bytes - i));
  }
  return data;
}

Message send(int peer, std::uint64_t tag, Bytes& data) {
  return {Message::Kind::send, peer, tag, data.data(), data.size()};
}
Message receive(int peer, std::uint64_t tag, Bytes& data) {
  return {Message::Kind::receive, peer, tag, data.data(), data.size()};
}

void wait_for(Transport& transport, Transport::Ticket ticket, int peer = -1) {
  transport.wait([&] { return transport.test(ticket); },
                 {.peer = peer, .operation = "test", .what = "its message", .limit = std::chrono::seconds(30)});
}

class Messages : public TransportSuite {};

TEST_P(Messages, of_every_size_reach_every_rank) {
  expect_success(run_transports(GetParam(), [](Transport& transport) {
    const int self = transport.rank();
    const int ranks = transport.size();
    std::uint64_t tag = 0;
    for (std::size_t bytes : {0, 1, 15, 16, 17, 1000, 4096, 100'000, 300'007}) {
      ++tag;
      std::vector<Bytes> out;
      std::vector<Bytes> in;
      std::vector<Message> messages;
      for (int peer = 0; peer < ranks; ++peer) {
        out.push_back(contents(self, peer, tag, bytes));
        in.emplace_back(bytes);
      }
      for (int peer = 0; peer < ranks; ++peer) {
        messages.push_back(send(peer, tag, out[static_cast<std::size_t>(peer)]));
        messages.push_back(receive(peer, tag, in[static_cast<std::size_t>(peer)]));
      }
      wait_for(transport, transport.start(messages));
      for (int peer = 0; peer < ranks; ++peer) {
        ASSERT_EQ(in[static_cast<std::size_t>(peer)], contents(peer, self, tag, bytes)) << bytes << " bytes";
      }
    }
  }));
}

TEST_P(Messages, of_one_tag_arrive_in_order) {
  expect_success(run_transports(GetParam(), [](Transport& transport) {
    const int next = (transport.rank() + 1) % transport.size();
    const int previous = (transport.rank() + transport.size() - 1) % transport.size();
    std::vector<Bytes> out;
    std::vector<Bytes> in;
    for (std::size_t i = 0; i < 50; ++i) {
      out.push_back(Bytes(8, static_cast<std::byte>(i)));
      in.emplace_back(8);
    }
    std::vector<Transport::Ticket> tickets;
    for (std::size_t i = 0; i < 50; ++i) tickets.push_back(transport.start(std::array{send(next, 5, out[i])}));
    for (std::size_t i = 0; i < 50; ++i) tickets.push_back(transport.start(std::array{receive(previous, 5, in[i])}));
    for (Transport::Ticket ticket : tickets) wait_for(transport, ticket);
    for (std::size_t i = 0; i < 50; ++i) EXPECT_EQ(in[i], out[i]);
  }));
}

TEST_P(Messages, of_different_tags_may_be_awaited_in_any_order) {
  expect_success(run_transports(GetParam(), [](Transport& transport) {
    // Much more than a ring holds lies before the message that is asked for first.
    constexpr std::uint64_t kTags = 12;
    constexpr std::size_t kBytes = 150'000;
    const int self = transport.rank();
    const int next = (self + 1) % transport.size();
    const int previous = (self + transport.size() - 1) % transport.size();
    std::vector<Bytes> out;
    std::vector<Transport::Ticket> sent;
    for (std::uint64_t tag = 0; tag < kTags; ++tag) out.push_back(contents(self, next, tag, kBytes + tag));
    for (std::uint64_t tag = 0; tag < kTags; ++tag)
      sent.push_back(transport.start(std::array{send(next, tag, out[tag])}));
    for (std::uint64_t tag = kTags; tag-- > 0;) {
      Bytes in(kBytes + tag);
      wait_for(transport, transport.start(std::array{receive(previous, tag, in)}), previous);
      ASSERT_EQ(in, contents(previous, self, tag, kBytes + tag));
    }
    for (Transport::Ticket ticket : sent) wait_for(transport, ticket, next);
  }));
}

TEST_P(Messages, may_come_before_or_after_their_receive) {
  expect_success(run_transports(GetParam(), [](Transport& transport) {
    const int self = transport.rank();
    if (transport.size() == 1) return;
    for (std::uint64_t late : {0u, 1u}) {
      const std::uint64_t tag = 40 + late;
      for (int peer = 0; peer < transport.size(); ++peer) {
        if (peer == 0 && self != 0) {
          if (late == 0) std::this_thread::sleep_for(std::chrono::milliseconds(15));
          Bytes data = contents(self, 0, tag, 70'000);
          wait_for(transport, transport.start(std::array{send(0, tag, data)}), 0);
        } else if (self == 0 && peer != 0) {
          if (late == 1) std::this_thread::sleep_for(std::chrono::milliseconds(15));
          Bytes data(70'000);
          wait_for(transport, transport.start(std::array{receive(peer, tag, data)}), peer);
          ASSERT_EQ(data, contents(peer, 0, tag, 70'000));
        }
      }
      barrier(transport, late + 1);
    }
  }));
}

TEST_P(Messages, survive_a_random_exchange) {
  expect_success(run_transports(GetParam(), [](Transport& transport) {
    const int self = transport.rank();
    const auto ranks = static_cast<std::size_t>(transport.size());
    std::mt19937 shared(7);  // the same draws on every rank
    std::mt19937 own(static_cast<unsigned>(self));
    for (std::uint64_t round = 0; round < 10; ++round) {
      struct Flight {
        Transport::Ticket ticket;
        std::size_t from;
        std::uint64_t tag;
        std::size_t slot;
      };
      struct Planned {
        bool sends;
        std::size_t peer;
        std::uint64_t tag;
        std::size_t bytes;
      };
      std::vector<Planned> planned;
      for (std::size_t from = 0; from < ranks; ++from) {
        for (std::size_t to = 0; to < ranks; ++to) {
          for (std::uint64_t tag = 0; tag < 3; ++tag) {
            const std::size_t bytes = shared() % (shared() % 4 == 0 ? 300'000 : 300);
            if (static_cast<int>(from) == self) planned.push_back({true, to, 100 * round + tag, bytes});
            if (static_cast<int>(to) == self) planned.push_back({false, from, 100 * round + tag, bytes});
          }
        }
      }
      std::shuffle(planned.begin(), planned.end(), own);
      std::vector<Bytes> data(planned.size());
      std::vector<Flight> flights;
      for (std::size_t i = 0; i < planned.size(); ++i) {
        const int peer = static_cast<int>(planned[i].peer);
        data[i] = planned[i].sends ? contents(self, peer, planned[i].tag, planned[i].bytes) : Bytes(planned[i].bytes);
        const Message message =
            planned[i].sends ? send(peer, planned[i].tag, data[i]) : receive(peer, planned[i].tag, data[i]);
        flights.push_back({transport.start(std::array{message}), planned[i].peer, planned[i].tag, i});
      }
      std::shuffle(flights.begin(), flights.end(), own);
      for (const Flight& flight : flights) {
        wait_for(transport, flight.ticket);
        if (planned[flight.slot].sends) continue;
        const int from = static_cast<int>(flight.from);
        ASSERT_EQ(data[flight.slot], contents(from, self, flight.tag, data[flight.slot].size())) << "round " << round;
      }
    }
  }));
}

TEST_P(Messages, whose_ends_disagree_on_the_size_end_the_job) {
  const RankSetup setup = GetParam();
  const auto ends = run_transports(setup, [](Transport& transport) {
    const int last = transport.size() - 1;
    if (transport.rank() == last) {
      Bytes data(100);
      transport.start(std::array{send(0, 9, data)});
    }
    if (transport.rank() == 0) {
      Bytes data(60);
      wait_for(transport, transport.start(std::array{receive(last, 9, data)}));
    }
    transport.wait([] { return false; }, for_test(-1));
  });
  const Error error = expect_same_error(ends);
  EXPECT_EQ(error.code(), ErrorCode::mismatch);
  EXPECT_EQ(error.message(),
            "rank " + std::to_string(setup.ranks - 1) + " sends 100 bytes where rank 0 receives 60 (message 9)");
}

TEST_P(Messages, of_a_rank_that_left_still_arrive) {
  if (GetParam().ranks == 1) return;
  expect_success(run_transports(GetParam(), [](Transport& transport) {
    if (transport.rank() == 1) {
      Bytes data = contents(1, 0, 3, 3000);
      wait_for(transport, transport.start(std::array{send(0, 3, data)}), 0);
    } else if (transport.rank() == 0) {
      std::this_thread::sleep_for(std::chrono::milliseconds(40));
      Bytes data(3000);
      wait_for(transport, transport.start(std::array{receive(1, 3, data)}), 1);
      EXPECT_EQ(data, contents(1, 0, 3, 3000));
    }
  }));
}

INSTANTIATE_TEST_SUITE_P(Transports, Messages, ::testing::ValuesIn(contract_setups()), setup_name);

}  // namespace
}  // namespace expar::test
