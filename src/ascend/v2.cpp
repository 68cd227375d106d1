// What dispatch_v2 and combine_v2 make of their options.
#include "src/ascend/v2.h"

#include <algorithm>
#include <chrono>
#include <string>

#include <expar/collectives.h>

#include "src/ascend/elements.h"
#include "src/ascend/limits.h"

namespace expar::ascend {
namespace {

std::int64_t now() { return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1); }

/// elastic_info in words.
Left left_of(const Domain& domain, ConstTensor elastic_info) {
  const std::int64_t ranks = domain.ep_world_size;
  check_values(domain, kOnePhase);
  require("elastic_info", elastic_info, DType::int32, {4 + 2 * ranks});
  const auto* const info = elastic_info.as<std::int32_t>();
  require_range("elastic_info", 0, info[0], 0, 1);
  if (info[0] == 0) return {domain, {}};
  require_range("elastic_info", 1, info[1], 2, ranks);
  require_range("ep_rank_id", domain.ep_rank_id, 0, ranks - 1);
  const auto* const numbers = info + 4;
  const auto* const ranks_of = numbers + ranks;
  for (std::int64_t number = 0; number < info[1]; ++number) {
    require_range("elastic_info", 4 + ranks + number, ranks_of[number], 0, ranks - 1);
    require_range("elastic_info", 4 + ranks_of[number], numbers[ranks_of[number]], number, number);
  }
  const auto left_count = std::count_if(numbers, numbers + ranks, [](std::int32_t number) { return number >= 0; });
  require_range("ranks of elastic_info that have a number", left_count, info[1], info[1]);
  require_range("elastic_info", 4 + domain.ep_rank_id, numbers[domain.ep_rank_id], 0, info[1] - 1);
  Left left{domain, {ranks_of, ranks_of + info[1]}};
  left.domain.ep_world_size = info[1];
  left.domain.shared_expert_rank_num = info[2];
  left.domain.moe_expert_num = info[3];
  left.domain.ep_rank_id = numbers[domain.ep_rank_id];
  left.domain.global_bs = domain.global_bs / ranks * info[1];
  check_values(left.domain, kOnePhase);
  require_range("experts of a rank by elastic_info", left.domain.experts_per_rank(), domain.experts_per_rank(),
                domain.experts_per_rank());
  return left;
}

void check_options(const Domain& domain, const V2Options& options) {
  require_range("tp_world_size", options.tp_world_size, 0, 2);
  require_range("zero_expert_num", options.zero_expert_num, 0, 1024);
  require_range("copy_expert_num", options.copy_expert_num, 0, 1024);
  require_range("const_expert_num", options.const_expert_num, 0, 1024);
  if (tp_ranks(options) == 1) return;
  if (options.group_tp == nullptr) refuse("group_tp is absent: tp_world_size is 2");
  require_range("ranks of group_tp", options.group_tp->size(), 2, 2);
  require_range("tp_rank_id", options.tp_rank_id, options.group_tp->rank(), options.group_tp->rank());
  require_range("experts of a rank beside tp_world_size 2", domain.experts_per_rank(), 1, 1);
  if (!options.elastic_info.absent()) refuse("elastic_info and tp_world_size 2 exclude each other");
}

/// What comm_alg "hierarchy" does without on the pages.
void check_hierarchy(const Domain& domain, const V2Options& options) {
  require_range("ep_world_size under comm_alg \"hierarchy\"", domain.ep_world_size, 16, 256);
  require_range("ep_world_size % 16 under comm_alg \"hierarchy\"", domain.ep_world_size % 16, 0, 0);
  require_range("tp_world_size under comm_alg \"hierarchy\"", options.tp_world_size, 0, 1);
  require_range("shared_expert_rank_num under comm_alg \"hierarchy\"", domain.shared_expert_rank_num, 0, 0);
  require_range("axes of x_active_mask under comm_alg \"hierarchy\"", options.x_active_mask.shape().rank(), 0, 1);
  require_range("experts of a rank times ep_world_size under comm_alg \"hierarchy\"",
                domain.experts_per_rank() * domain.ep_world_size, 1, 2048);
  require_range("special experts under comm_alg \"hierarchy\"",
                options.zero_expert_num + options.copy_expert_num + options.const_expert_num, 0, 0);
  if (!options.performance_info.absent()) refuse("performance_info is given, comm_alg \"hierarchy\" has none");
}

}  // namespace

std::int64_t tp_ranks(const V2Options& options) { return std::max<std::int64_t>(options.tp_world_size, 1); }

Left ranks_left(const Context& group_ep, const Domain& domain, const V2Options& options) {
  const Left left = options.elastic_info.absent() ? Left{domain, {}} : left_of(domain, options.elastic_info);
  check_domain(group_ep, left.domain, kOnePhase);
  check_options(left.domain, options);
  if (domain.comm_alg == "hierarchy") check_hierarchy(domain, options);
  if (!options.performance_info.absent())
    require("performance_info", options.performance_info, DType::int64, {domain.ep_world_size});
  return left;
}

Copies copies_of(const Domain& domain, const V2Options& options, ConstTensor expert_ids) {
  return copies_of(domain, expert_ids, options.x_active_mask, true,
                   options.zero_expert_num + options.copy_expert_num + options.const_expert_num);
}

Inbox exchange(const Context& group_ep, const V2Options& options, const std::function<Mail()>& write) {
  CommCmdInfo posted = post(group_ep, [&] {
    Mail mail = write();
    const std::int64_t special =
        options.zero_expert_num << 40 | options.copy_expert_num << 20 | options.const_expert_num;
    mail.alike.insert(mail.alike.end(), {{"special_experts", special},
                                         {"tp_world_size", options.tp_world_size},
                                         {"performance_info", !options.performance_info.absent()}});
    return mail;
  });
  const std::int64_t since = now();
  Inbox inbox = posted.take();
  if (options.performance_info.absent()) return inbox;
  // Ranks of one host share a clock: a rank has waited for another from when it had posted to when that one had.
  const Array posts(DType::int64, {group_ep.size()});
  all_gather(group_ep, ConstTensor(&since, {1}), posts);
  const ConstTensor& elastic = options.elastic_info;
  const bool some_out = !elastic.absent() && elastic.as<std::int32_t>()[0] != 0;
  for (int source = 0; source < group_ep.size(); ++source) {
    const std::int64_t rank =
        some_out ? elastic.as<std::int32_t>()[4 + options.performance_info.size(0) + source] : source;
    const std::int64_t waited = std::max<std::int64_t>(posts.as<std::int64_t>()[source] - since, 0);
    options.performance_info.as<std::int64_t>()[rank] += waited / 1000;
  }
  return inbox;
}

void with_tp(const V2Options& options, const std::function<void()>& work, const std::function<void()>& share) {
  if (options.group_tp == nullptr || options.group_tp->size() == 1) return work();
  try {
    work();
  } catch (...) {
    barrier(options.group_tp->declining(current_error()));  // throws, here and wherever `share` begins
  }
  if (options.tp_world_size == 2) share();
}

}  // namespace expar::ascend
