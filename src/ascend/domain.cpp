// The ranges of the pages, and the sizes that follow from a domain.
#include <expar/ascend/domain.h>

#include <algorithm>
#include <limits>
#include <string>

#include "src/ascend/elements.h"
#include "src/ascend/limits.h"
#include "src/ascend/quantise.h"

namespace expar::ascend {
namespace {

constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();

std::int64_t align(std::int64_t bytes, std::int64_t to) { return (bytes + to - 1) / to * to; }

void require_multiple(const std::string& what, std::int64_t value, const std::string& of, std::int64_t divisor) {
  if (divisor != 0 ? value % divisor == 0 : value == 0) return;
  refuse(what + " is " + std::to_string(value) + ", should be a multiple of " + of + ", " + std::to_string(divisor));
}

constexpr std::string_view kNoChoice[] = {""};
constexpr std::string_view kWays[] = {"", "fullmesh", "fullmesh_v1", "fullmesh_v2", "hierarchy"};

}  // namespace

const Limits kTwoPhases = {384, 512, true, kNoChoice};
const Limits kOnePhase = {768, 1024, false, kWays};

void check_values(const Domain& d, const Limits& limits) {
  require_range("ep_world_size", d.ep_world_size, 2, limits.ranks);
  require_range("ep_rank_id", d.ep_rank_id, 0, d.ep_world_size - 1);
  require_range("moe_expert_num", d.moe_expert_num, 1, limits.experts);
  require_range("expert_shard_type", d.expert_shard_type, 0, 0);
  require_range("shared_expert_num", d.shared_expert_num, 0, 4);
  require_range("shared_expert_rank_num", d.shared_expert_rank_num, 0,
                limits.shared_halves ? d.ep_world_size / 2 : d.ep_world_size - 1);
  require_multiple("shared_expert_rank_num", d.shared_expert_rank_num, "shared_expert_num", d.shared_expert_num);
  require_multiple("moe_expert_num", d.moe_expert_num, "ep_world_size - shared_expert_rank_num",
                   d.ep_world_size - d.shared_expert_rank_num);
  require_range("global_bs", d.global_bs, 0, 512 * d.ep_world_size);
  require_multiple("global_bs", d.global_bs, "ep_world_size", d.ep_world_size);
  require_range("comm_type", d.comm_type, 0, 0);
  if (std::find(limits.comm_algs.begin(), limits.comm_algs.end(), d.comm_alg) == limits.comm_algs.end()) {
    std::string known;
    for (const std::string_view one : limits.comm_algs)
      known += (known.empty() ? "\"" : ", \"") + std::string(one) + '"';
    refuse("comm_alg is \"" + std::string(d.comm_alg) + "\", should be one of " + known);
  }
}

void Domain::check() const { check_values(*this, kTwoPhases); }

void check_domain(const Context& group_ep, const Domain& domain, const Limits& limits) {
  check_values(domain, limits);
  if (domain.ep_world_size != group_ep.size())
    refuse("ep_world_size is " + std::to_string(domain.ep_world_size) + ", but group_ep has " +
           std::to_string(group_ep.size()) + " ranks");
  if (domain.ep_rank_id != group_ep.rank())
    refuse("ep_rank_id is " + std::to_string(domain.ep_rank_id) + ", but this is rank " +
           std::to_string(group_ep.rank()) + " of group_ep");
}

std::int64_t check_rows(const Domain& domain, ConstTensor expand_x, ConstTensor expert_ids) {
  if (expand_x.shape().rank() != 2) refuse("expand_x is " + shown(expand_x) + ", should be [A, H]");
  require_range("A, the rows of expand_x,", expand_x.size(0),
                expand_rows(domain, domain.ep_rank_id, expert_ids.size(0), expert_ids.size(1)), kMost);
  return expand_x.size(0);
}

std::int64_t expand_rows(const Domain& domain, std::int64_t rank, std::int64_t bs, std::int64_t k) {
  const std::int64_t sources = domain.ep_world_size, most = domain.max_bs(bs), experts = domain.local_expert_num(rank);
  const std::int64_t ranks = std::max<std::int64_t>(domain.ranks_per_shared_expert(), 1);
  const std::int64_t come =
      domain.holds_shared(rank) ? most * ((sources + ranks - 1) / ranks) : most * sources * std::min(experts, k);
  return std::max(come, (experts * sources + kInfoPerRow - 1) / kInfoPerRow);
}

std::int64_t message_bytes(std::int64_t h, DType x, std::int64_t quant_mode, std::optional<DType> y_dtype) {
  return message_bytes(checked_quantisation(quant_mode, x, y_dtype), h);
}

std::int64_t token_msg_size(std::int64_t h, std::int64_t quant_mode) {
  require_range("quant_mode", quant_mode, 0, 4);
  const std::int64_t sizes[] = {align(h, 256), align(h, 512), align(align(h, 32) + 4, 512),
                                align(align(h, 128) + (h + 127) / 128, 512),
                                align(align(h, 128) + align((h + 31) / 32, 2), 512)};
  return sizes[quant_mode];
}

std::int64_t quant_expand_bytes(std::int64_t h) { return align(align(h, 32) + align(h, 8) / 8 * 4, 512); }

std::int64_t hccl_buffer_bytes(const Domain& domain, std::int64_t bs, std::int64_t h, std::int64_t k) {
  const std::int64_t most = domain.max_bs(bs);
  return 2 * (domain.experts_per_rank() * most * domain.ep_world_size * align(align(2 * h, 32) + 44, 512) +
              (k + domain.shared_expert_num) * most * align(2 * h, 512));
}

std::int64_t hccl_buffsize(const Domain& domain, std::int64_t bs, std::int64_t h, std::int64_t k) {
  const std::int64_t megabyte = std::int64_t{1} << 20;
  return std::max<std::int64_t>((hccl_buffer_bytes(domain, bs, h, k) + megabyte - 1) / megabyte, 2);
}

void check_hccl_buffer(const Domain& domain, std::int64_t bs, std::int64_t h, std::int64_t k, std::int64_t megabytes) {
  domain.check();
  require_range("BS", bs, 1, 512);
  require_range("H", h, 1024, 8192);
  require_range("K", k, 1, 16);
  require_range("HCCL_BUFFSIZE", megabytes, hccl_buffsize(domain, bs, h, k), kMost);
}

}  // namespace expar::ascend
