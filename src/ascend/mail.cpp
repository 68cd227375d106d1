// Mail: rows of bytes dispatched in a bounded plan, so that nobody waits before he has posted.
#include "src/ascend/mail.h"

#include <utility>

#include "src/util/check.h"

namespace expar::ascend {

Inbox CommCmdInfo::take() {
  const std::unique_ptr<PendingDispatch> posted = std::move(posted_);
  if (!posted) refuse("comm_cmd_info holds nothing: its setup was not called, or its teardown has been");
  return posted->finish();
}

CommCmdInfo post(const Context& group_ep, const std::function<Mail()>& write) {
  Mail mail;
  try {
    mail = write();
  } catch (...) {
    return CommCmdInfo(start_dispatch(group_ep.declining(current_error()), {}, {}, {}));
  }
  const std::int64_t rows = std::ssize(mail.experts);
  const auto row_bytes = mail.rows.size(1) * static_cast<std::int64_t>(size_of(mail.rows.dtype()));
  const ConstTensor halves(mail.rows.data(), DType::bf16, {rows, row_bytes / 2});  // dispatch copies them as they are
  const Plan plan = make_bounded_plan(group_ep, ConstTensor(mail.experts.data(), Shape{rows, 1}), mail.bound,
                                      {.experts = mail.first_experts.back(), .first_experts = mail.first_experts});
  return CommCmdInfo(start_dispatch(group_ep, halves, {}, plan, {.alike = mail.alike}));
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
