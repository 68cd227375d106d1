// Each rank writes its cause into its own record; one compare-and-swap decides whose counts.
#include "transports/shared/cause.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <string_view>

namespace expar::local {
namespace {

template <std::size_t N>
void put(std::array<char, N>& to, std::string_view text) {
  to.fill('\0');
  text.copy(to.data(), N - 1);
}

template <std::size_t N>
std::string get(const std::array<char, N>& from) {
  return std::string(from.data(), strnlen(from.data(), N));
}

}  // namespace

std::optional<Error> cause(const JobMemory& job) {
  const std::uint32_t by = job.head().cause.load();
  if (by == 0) return std::nullopt;
  // The memory may have been written by a process gone wild: nothing in it is trusted to be in range.
  if (by > static_cast<std::uint32_t>(job.size())) {
    return Error(ErrorCode::internal, "the memory shared by the ranks is damaged");
  }
  const CauseRecord& record = job.of(static_cast<int>(by) - 1).cause;
  const auto code = static_cast<ErrorCode>(std::min(record.code, static_cast<std::uint32_t>(ErrorCode::internal)));
  return Error(code, get(record.message), {record.rank, record.peer, get(record.operation)});
}

Error set_cause(const JobMemory& job, int rank, const Error& error) {
  if (auto already = cause(job)) return *already;
  CauseRecord& record = job.of(rank).cause;
  record.code = static_cast<std::uint32_t>(error.code());
  record.rank = error.rank();
  record.peer = error.peer();
  put(record.operation, error.operation());
  put(record.message, error.message());
  std::uint32_t none = 0;
  job.head().cause.compare_exchange_strong(none, static_cast<std::uint32_t>(rank) + 1);
  ring_bells(job, rank);
  return *cause(job);
}

}  // namespace expar::local
