// The probes that share memory with other ranks.
#include "bench/peers.h"

#include <cstring>

#include "bench/timing.h"

namespace expar::bench {
namespace {

std::size_t at(std::int64_t index) { return static_cast<std::size_t>(index); }

std::size_t row_bytes_of(ConstTensor x) { return at(x.size(1)) * size_of(x.dtype()); }

}  // namespace

std::uint64_t use_memory(const void* data, std::size_t bytes) {
  static const auto read = fastest_loops().read;
  return bytes == 0 ? 0 : read(static_cast<const std::byte*>(data), bytes);
}

PeerMemory::PeerMemory(const Context& context, const Block& block) {
  const Communicator& communicator = context.communicator();
  bool all = true;
  for (int peer = 0; peer < context.size(); ++peer) all = all && communicator.mapped(peer);
  const std::vector<std::int64_t> shown = gather_all(
      context, {static_cast<std::int64_t>(block.ref().segment), static_cast<std::int64_t>(block.ref().offset),
                static_cast<std::int64_t>(block.size()), all ? 0 : 1});
  complete_ = true;
  for (int peer = 0; peer < context.size(); ++peer) complete_ = complete_ && shown[at(peer) * 4 + 3] == 0;
  if (!complete_) return;
  for (int peer = 0; peer < context.size(); ++peer) {
    const std::int64_t* where = shown.data() + at(peer) * 4;
    const auto segment =
        communicator.transport().map(communicator.job_rank(peer), static_cast<std::uint32_t>(where[0]));
    memory_.push_back(segment.subspan(at(where[1]), at(where[2])).data());
  }
}

CopyProbe::CopyProbe(const Context& context, ConstTensor x, const Plan& plan)
    : context_(context),
      x_(x),
      plan_(plan),
      block_(context.communicator().allocate(at(plan.unique()) * row_bytes_of(x))),
      peers_(context, block_) {}

void CopyProbe::use() { used_ += use_memory(block_.data(), block_.size()); }

void CopyProbe::copy() {
  const std::size_t row_bytes = row_bytes_of(x_);
  for (int step = 1; step < context_.size(); ++step) {
    const int peer = (context_.rank() + step) % context_.size();
    std::byte* to = peers_.of(peer) + at(plan_.send_row(peer)) * row_bytes;
    for (const std::int32_t token : plan_.sends(peer)) {
      std::memcpy(to, x_.bytes() + at(token) * row_bytes, row_bytes);
      to += row_bytes;
    }
  }
}

FetchProbe::FetchProbe(const Context& context, const Plan& plan, const Outbox& y)
    : context_(context), plan_(plan), row_bytes_(row_bytes_of(y.rows())), peers_(context, y.block()) {}

void FetchProbe::read() {
  for (const SlotRow& slot : plan_.slots()) {
    if (slot.rank < 0) continue;
    used_ += use_memory(peers_.of(slot.rank) + at(slot.row) * row_bytes_, row_bytes_);
  }
}

}  // namespace expar::bench
