// Memory that a peer offers is looked at before it is mapped.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>

#include <expar/error.h>

#include "transports/shm/sealed.h"
#include "transports/shm/segments.h"

namespace expar::shm {
namespace {

struct Offer {
  std::uint64_t id;
  std::uint64_t bytes;
};

/// Rank 0's view of a peer, rank 1, whose end of the socket is the test's.
class OfferedMemory : public ::testing::Test {
 protected:
  void SetUp() override {
    std::array<int, 2> ends{};
    ASSERT_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends.data()), 0);
    std::vector<Fd> mesh(2);
    mesh[1] = Fd(ends[0]);
    peer_ = Fd(ends[1]);
    peers_ = Peers(0, std::move(mesh), std::array<pid_t, 2>{});
  }
  void offer(const Offer& offer, int file) { ASSERT_EQ(send_packet(peer_.get(), bytes_of(offer), file), Sent::yes); }
  ErrorCode refused() {
    try {
      segments_.receive(peers_, 1);
    } catch (const Error& error) {
      return error.code();
    }
    ADD_FAILURE() << "was accepted";
    return ErrorCode::io;
  }

  Fd peer_;
  Peers peers_;
  Segments segments_{0, 2};
};

TEST_F(OfferedMemory, that_is_sealed_is_mapped) {
  const Fd file = make_sealed(8192);
  ASSERT_EQ(pwrite(file.get(), "x", 1, 8000), 1);
  offer({0, 8192}, file.get());
  segments_.receive(peers_, 1);
  ASSERT_EQ(segments_.find(1, 0).size(), 8192U);
  EXPECT_EQ(segments_.find(1, 0)[8000], std::byte{'x'});
  EXPECT_TRUE(segments_.find(1, 1).empty());
}

TEST_F(OfferedMemory, that_could_shrink_is_refused) {
  const Fd file(memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  ASSERT_EQ(ftruncate(file.get(), 4096), 0);
  offer({0, 4096}, file.get());
  EXPECT_EQ(refused(), ErrorCode::internal);
}

TEST_F(OfferedMemory, that_is_smaller_than_said_is_refused) {
  const Fd file = make_sealed(4096);
  offer({0, 8192}, file.get());
  EXPECT_EQ(refused(), ErrorCode::internal);
}

TEST_F(OfferedMemory, that_comes_out_of_order_is_refused) {
  const Fd file = make_sealed(4096);
  offer({1, 4096}, file.get());
  EXPECT_EQ(refused(), ErrorCode::internal);
}

TEST_F(OfferedMemory, that_is_no_memory_is_refused) {
  std::array<int, 2> ends{};
  ASSERT_EQ(pipe(ends.data()), 0);
  const Fd in(ends[0]);
  const Fd out(ends[1]);
  offer({0, 4096}, in.get());
  EXPECT_EQ(refused(), ErrorCode::internal);
}

TEST_F(OfferedMemory, without_a_file_is_refused) {
  offer({0, 4096}, -1);
  EXPECT_EQ(refused(), ErrorCode::internal);
}

TEST(SealedMemory, can_change_its_size_no_more) {
  const Fd file = make_sealed(4096);
  EXPECT_TRUE(is_sealed(file.get(), 4096));
  EXPECT_NE(ftruncate(file.get(), 100), 0);
  EXPECT_NE(ftruncate(file.get(), 8192), 0);
  EXPECT_NE(fcntl(file.get(), F_ADD_SEALS, F_SEAL_WRITE), 0);
}

}  // namespace
}  // namespace expar::shm
