// Mail: rows of bytes dispatched in a bounded plan, so that nobody waits before he has posted.
#include "src/ascend/mail.h"

#include <algorithm>
#include <string>
#include <utility>

#include "src/util/check.h"

namespace expar::ascend {

Inbox CommCmdInfo::take() {
  if (!posted_) refuse("comm_cmd_info holds nothing: its setup was not called, or its teardown has been");
  return std::exchange(posted_, nullptr)->finish();
}

void CommCmdInfo::check(std::span<const NamedNumber> numbers) const {
  for (const NamedNumber& number : numbers) {
    const auto told =
        std::find_if(numbers_.begin(), numbers_.end(), [&](const NamedNumber& n) { return n.name == number.name; });
    if (told == numbers_.end() || *told == number) continue;
    refuse(std::string(number.name) + " is " + std::to_string(number.value) + ", in the setup it was " +
           std::to_string(told->value));
  }
}

std::vector<NamedNumber> own_numbers(const Domain& domain, std::int64_t bs) {
  return {{"ep_world_size", domain.ep_world_size},
          {"ep_rank_id", domain.ep_rank_id},
          {"moe_expert_num", domain.moe_expert_num},
          {"shared_expert_num", domain.shared_expert_num},
          {"shared_expert_rank_num", domain.shared_expert_rank_num},
          {"global_bs", domain.global_bs},
          {"BS", bs}};
}

CommCmdInfo post(const Context& group_ep, const std::function<Mail()>& write) {
  Mail mail;
  const Context asked = group_ep.attempt([&] { mail = write(); });
  if (asked.declines()) return {start_dispatch(asked, {}, {}, {}), {}};
  const std::int64_t rows = std::ssize(mail.experts);
  const auto row_bytes = mail.rows.size(1) * static_cast<std::int64_t>(size_of(mail.rows.dtype()));
  const ConstTensor halves(mail.rows.data(), DType::bf16, {rows, row_bytes / 2});  // dispatch copies them as they are
  const Plan plan = make_bounded_plan(group_ep, ConstTensor(mail.experts.data(), Shape{rows, 1}), mail.bound,
                                      {.experts = mail.first_experts.back(), .first_experts = mail.first_experts});
  PendingDispatch posted = start_dispatch(group_ep, halves, {}, plan, {.alike = mail.alike});
  mail.alike.insert(mail.alike.end(), mail.own.begin(), mail.own.end());
  return {std::move(posted), std::move(mail.alike)};
}

std::vector<const std::byte*> rows_of(const Inbox& inbox) {
  const Rows rows = inbox.expert_rows();
  const std::size_t row_bytes = at(rows.width) * size_of(rows.dtype);
  std::vector<const std::byte*> found;
  found.reserve(inbox.refs().size());
  for (const RowRef& ref : inbox.refs())
    found.push_back(static_cast<const std::byte*>(rows.base[ref.base]) + at(ref.row) * row_bytes);
  return found;
}

}  // namespace expar::ascend
