// The ranges of the pages, and the sizes that follow from a domain.
#include <expar/ascend/domain.h>

#include <algorithm>
#include <limits>

#include "src/ascend/quantise.h"
#include "src/ascend/ranges.h"
#include "src/util/check.h"

namespace expar::ascend {
namespace {

std::int64_t align(std::int64_t bytes, std::int64_t to) { return (bytes + to - 1) / to * to; }

}  // namespace

void check_range(std::string_view parameter, std::int64_t value, std::int64_t least, std::int64_t most) {
  if (value >= least && value <= most) return;
  refuse(std::string(parameter) + " = " + std::to_string(value) + " is not in [" + std::to_string(least) + ", " +
         std::to_string(most) + "]");
}

void check_multiple(std::string_view parameter, std::int64_t value, std::string_view of, std::int64_t divisor) {
  if (divisor != 0 ? value % divisor == 0 : value == 0) return;
  refuse(std::string(parameter) + " = " + std::to_string(value) + " is no multiple of " + std::string(of) + " = " +
         std::to_string(divisor));
}

void Domain::check() const {
  check_range("ep_world_size", ep_world_size, 2, 384);
  check_range("ep_rank_id", ep_rank_id, 0, ep_world_size - 1);
  check_range("moe_expert_num", moe_expert_num, 1, 512);
  check_range("expert_shard_type", expert_shard_type, 0, 0);
  check_range("shared_expert_num", shared_expert_num, 0, 4);
  check_range("shared_expert_rank_num", shared_expert_rank_num, 0, ep_world_size / 2);
  check_multiple("shared_expert_rank_num", shared_expert_rank_num, "shared_expert_num", shared_expert_num);
  check_multiple("moe_expert_num", moe_expert_num, "ep_world_size - shared_expert_rank_num",
                 ep_world_size - shared_expert_rank_num);
  check_range("global_bs", global_bs, 0, std::numeric_limits<std::int32_t>::max());
  check_multiple("global_bs", global_bs, "ep_world_size", ep_world_size);
  check_range("comm_type", comm_type, 0, 0);
  if (!comm_alg.empty()) refuse("comm_alg = \"" + std::string(comm_alg) + "\" is not the empty string");
}

void check_domain(const Context& group_ep, const Domain& domain) {
  domain.check();
  if (domain.ep_world_size != group_ep.size())
    refuse("ep_world_size = " + std::to_string(domain.ep_world_size) + ", but group_ep has " +
           std::to_string(group_ep.size()) + " ranks");
  if (domain.ep_rank_id != group_ep.rank())
    refuse("ep_rank_id = " + std::to_string(domain.ep_rank_id) + ", but this is rank " +
           std::to_string(group_ep.rank()) + " of group_ep");
}

std::int64_t check_rows(const Domain& domain, ConstTensor expand_x, ConstTensor expert_ids) {
  if (expand_x.shape().rank() != 2) refuse("expand_x is " + shown(expand_x) + ", should be [A, H]");
  check_range("A, the rows of expand_x,", expand_x.size(0),
              expand_rows(domain, domain.ep_rank_id, expert_ids.size(0), expert_ids.size(1)),
              std::numeric_limits<std::int32_t>::max());
  return expand_x.size(0);
}

std::int64_t expand_rows(const Domain& domain, std::int64_t rank, std::int64_t bs, std::int64_t k) {
  const std::int64_t sources = domain.ep_world_size, most = domain.max_bs(bs);
  if (!domain.holds_shared(rank)) {
    const std::int64_t experts = domain.experts_per_rank();
    return std::max(most * sources * std::min(experts, k), (experts * sources + kInfoPerRow - 1) / kInfoPerRow);
  }
  const std::int64_t ranks = domain.ranks_per_shared_expert();
  return most * ((sources + ranks - 1) / ranks);
}

std::int64_t message_bytes(std::int64_t h, DType x, std::int64_t quant_mode, std::optional<DType> y_dtype) {
  return message_bytes(checked_quantisation(quant_mode, x, y_dtype), h);
}

std::int64_t quant_expand_bytes(std::int64_t h) { return align(align(h, 32) + align(h, 8) / 8 * 4, 512); }

std::int64_t hccl_buffer_bytes(const Domain& domain, std::int64_t bs, std::int64_t h, std::int64_t k) {
  const std::int64_t most = domain.max_bs(bs);
  return 2 * (domain.experts_per_rank() * most * domain.ep_world_size * align(align(2 * h, 32) + 44, 512) +
              (k + domain.shared_expert_num) * most * align(2 * h, 512));
}

void check_hccl_buffer(const Domain& domain, std::int64_t bs, std::int64_t h, std::int64_t k, std::int64_t megabytes) {
  const std::int64_t needed = hccl_buffer_bytes(domain, bs, h, k), megabyte = std::int64_t{1} << 20;
  check_range("HCCL_BUFFSIZE", megabytes, (needed + megabyte - 1) / megabyte, std::numeric_limits<std::int32_t>::max());
}

}  // namespace expar::ascend
