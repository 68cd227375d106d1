// The ranges of a domain, and the sizes that follow from one.
#include <gtest/gtest.h>

#include <expar/ascend/domain.h>

#include "tests/error_of.h"

namespace expar::ascend {
namespace {

/// 8 ranks, of which 2 hold two shared experts.
Domain usual() {
  Domain domain;
  domain.ep_world_size = 8;
  domain.moe_expert_num = 12;
  domain.shared_expert_num = 2;
  domain.shared_expert_rank_num = 2;
  return domain;
}

TEST(Domain, refuses_each_value_that_the_pages_do_not_allow) {
  struct Wrong {
    void (*change)(Domain&);
    const char* says;
  };
  const Wrong all[] = {
      {[](Domain& d) { d.ep_world_size = 1; }, "ep_world_size is 1, should be from 2 to 384"},
      {[](Domain& d) { d.ep_world_size = 385; }, "ep_world_size is 385, should be from 2 to 384"},
      {[](Domain& d) { d.ep_rank_id = 8; }, "ep_rank_id is 8, should be from 0 to 7"},
      {[](Domain& d) { d.ep_rank_id = -1; }, "ep_rank_id is -1, should be from 0 to 7"},
      {[](Domain& d) { d.moe_expert_num = 0; }, "moe_expert_num is 0, should be from 1 to 512"},
      {[](Domain& d) { d.moe_expert_num = 516; }, "moe_expert_num is 516, should be from 1 to 512"},
      {[](Domain& d) { d.moe_expert_num = 13; },
       "moe_expert_num is 13, should be a multiple of ep_world_size - shared_expert_rank_num, 6"},
      {[](Domain& d) { d.expert_shard_type = 1; }, "expert_shard_type is 1, should be 0"},
      {[](Domain& d) { d.shared_expert_num = 5; }, "shared_expert_num is 5, should be from 0 to 4"},
      {[](Domain& d) { d.shared_expert_num = -1; }, "shared_expert_num is -1, should be from 0 to 4"},
      {[](Domain& d) { d.shared_expert_num = 0; },
       "shared_expert_rank_num is 2, should be a multiple of shared_expert_num, 0"},
      {[](Domain& d) { d.shared_expert_rank_num = 3; },
       "shared_expert_rank_num is 3, should be a multiple of shared_expert_num, 2"},
      {[](Domain& d) { d.shared_expert_rank_num = 6; }, "shared_expert_rank_num is 6, should be from 0 to 4"},
      {[](Domain& d) { d.global_bs = -8; }, "global_bs is -8, should be from 0 to 4096"},
      {[](Domain& d) { d.global_bs = 12; }, "global_bs is 12, should be a multiple of ep_world_size, 8"},
      {[](Domain& d) { d.comm_type = 2; }, "comm_type is 2, should be 0"},
      {[](Domain& d) { d.comm_alg = "fullmesh"; }, "comm_alg is \"fullmesh\", should be one of \"\""},
  };
  EXPECT_NO_THROW(usual().check());
  for (const Wrong& wrong : all) {
    Domain domain = usual();
    wrong.change(domain);
    EXPECT_EQ(test::refusal_of([&] { domain.check(); }), wrong.says);
  }
}

TEST(Domain, has_room_for_the_rows_of_every_kind_of_rank) {
  const Domain domain = usual();
  EXPECT_EQ(expand_rows(domain, 0, 5, 3), 5 * 8 * 2 / 2);
  EXPECT_EQ(expand_rows(domain, 2, 5, 3), 5 * 8 * 2) << "two experts";
  EXPECT_EQ(expand_rows(domain, 2, 5, 1), 5 * 8) << "one slot";
  Domain ragged = domain;
  ragged.global_bs = 8 * 9;
  EXPECT_EQ(expand_rows(ragged, 0, 5, 3), 9 * 8 * 2 / 2);
  EXPECT_EQ(expand_rows(ragged, 7, 5, 3), 9 * 8 * 2);
  // Two ranks of one shared expert do not divide five: rank 0 serves 0, 2 and 4, which the pages' 5 W / 2 is too few
  // for.
  Domain odd = domain;
  odd.ep_world_size = 5;
  odd.shared_expert_num = 1;
  EXPECT_EQ(expand_rows(odd, 0, 5, 3), 5 * 3);
  // 512 experts of one rank need more of assist_info_for_combine than one row has.
  Domain dense;
  dense.ep_world_size = 2;
  dense.moe_expert_num = 512;
  dense.shared_expert_rank_num = 1;
  EXPECT_EQ(expand_rows(dense, 1, 1, 1), 512 * 2 / kInfoPerRow);
}

TEST(Domain, has_rows_of_whole_512_bytes) {
  EXPECT_EQ(message_bytes(1024, DType::bf16, 0), 2048);
  EXPECT_EQ(message_bytes(1032, DType::bf16, 0), 2560);
  EXPECT_EQ(message_bytes(1024, DType::bf16, 1), 1024);
  EXPECT_EQ(message_bytes(1024, DType::bf16, 2), 1536) << "a scale";
  EXPECT_EQ(message_bytes(7168, DType::bf16, 2), 7680);
  EXPECT_EQ(message_bytes(7168, DType::bf16, 3), 7680) << "56 scales of 4 bytes";
  EXPECT_EQ(message_bytes(7168, DType::bf16, 4), 7680) << "224 scales of a byte";
  EXPECT_EQ(quant_expand_bytes(7168), 7168 + 7168 / 8 * 4);
}

TEST(Domain, sends_about_half_the_bytes_in_int8) {
  const auto part = [](std::int64_t h) {
    return static_cast<double>(message_bytes(h, DType::bf16, 2)) /
           static_cast<double>(message_bytes(h, DType::bf16, 0));
  };
  EXPECT_LT(part(7168), 0.54);
  EXPECT_EQ(part(1024), 0.75) << "the scale takes another 512";
}

TEST(Domain, knows_the_pages_own_sizes_of_a_row) {
  const std::int64_t at_1032[] = {1280, 1536, 1536, 1536, 1536}, at_7168[] = {7168, 7168, 7680, 7680, 7680};
  for (std::int64_t mode = 0; mode < 5; ++mode) {
    EXPECT_EQ(token_msg_size(1032, mode), at_1032[mode]);
    EXPECT_EQ(token_msg_size(7168, mode), at_7168[mode]);
  }
  EXPECT_EQ(test::refusal_of([] { token_msg_size(7168, 5); }), "quant_mode is 5, should be from 0 to 4");
}

TEST(Domain, knows_the_buffer_that_the_pages_ask_for) {
  Domain domain;
  domain.ep_world_size = 16;
  domain.moe_expert_num = 16;
  domain.global_bs = 64 * 16;
  EXPECT_EQ(hccl_buffer_bytes(domain, 64, 1024, 8), 2 * (1 * 64 * 16 * 2560 + (8 + 1) * 64 * 2048));
  EXPECT_NO_THROW(check_hccl_buffer(domain, 64, 1024, 8, 200));
  EXPECT_EQ(test::refusal_of([&] { check_hccl_buffer(domain, 64, 1024, 8, 7); }),
            "HCCL_BUFFSIZE is 7, should be from 8 to 2147483647");
  EXPECT_EQ(test::refusal_of([&] { check_hccl_buffer(domain, 64, 1 << 24, 8, 7); }),
            "H is 16777216, should be from 1024 to 8192");
  domain.global_bs = 16;
  EXPECT_EQ(hccl_buffsize(domain, 1, 1024, 1), 2) << "the least there is";
}

}  // namespace
}  // namespace expar::ascend
