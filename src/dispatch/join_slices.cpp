// Rebuilds the rows of a replicated plan from the slices of all ranks.
#include <cstring>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <expar/partition.h>

#include "src/dispatch/plan_data.h"
#include "src/util/check.h"
#include "src/util/copy.h"
#include "src/util/shown.h"

namespace expar {
namespace {

std::int64_t width(const Part& part) { return part.end - part.begin; }

void validate(const Context& context, const Plan& plan, ConstTensor slices, Tensor x) {
  if (plan.data().failure) throw *plan.data().failure;
  if (!plan.data().replicated) refuse("slices are of a replicated plan");
  require_rows("x", x);
  if (x.shape().rank() != 2 || x.size(0) != plan.tokens())
    refuse("x is " + shown(x) + ", should be [" + std::to_string(plan.tokens()) + ", H]");
  require("slices", slices, x.dtype(), {plan.tokens(), width(part_of(x.size(1), context.rank(), context.size()))});
}

/// The tokens that experts of this rank read, ascending.
std::vector<std::int32_t> read_here(const Plan& plan, int rank) {
  std::vector<std::int32_t> tokens;
  const SlotRow* slot = plan.slots().data();
  for (std::int32_t t = 0; t < plan.tokens(); ++t) {
    bool here = false;
    for (std::int64_t k = 0; k < plan.topk(); ++k, ++slot) here = here || slot->rank == rank;
    if (here) tokens.push_back(t);
  }
  return tokens;
}

}  // namespace

void join_slices(const Context& context, const Plan& plan, ConstTensor slices, Tensor x) {
  const Phase phase(context.trace(), operation_span("join_slices"));
  const Communicator& communicator = context.communicator();
  const int self = context.rank(), ranks = context.size();
  Signature signature("join_slices");
  signature.with("hidden", x.shape().rank() == 2 ? x.size(1) : 0).with("dtype", static_cast<std::int64_t>(x.dtype()));
  signature.with("plan", plan ? static_cast<std::int64_t>(plan.id()) : 0);
  Operation operation(communicator, signature);

  const auto bytes_of = [&](int rank) { return at(width(part_of(x.size(1), rank, ranks))) * size_of(x.dtype()); };
  std::vector<std::int32_t> here;
  std::vector<ByteRange> wants, gives;
  Block block;
  // Each rank shows, for one rank after the other, its slices of the tokens that this one reads: as many on all ranks.
  operation.ready([&] {
    validate(context, plan, slices, x);
    here = read_here(plan, self);
    const auto read_by = [&](int rank) { return rank == self ? std::span(std::as_const(here)) : plan.sends(rank); };
    std::size_t before_self = 0, total = 0;
    for (int rank = 0; rank < ranks; ++rank) {
      if (rank == self) before_self = total;
      gives.push_back({total * bytes_of(self), read_by(rank).size() * bytes_of(self)});
      total += read_by(rank).size();
    }
    block = communicator.allocate(total * bytes_of(self));
    for (int rank = 0; rank < ranks; ++rank) {
      wants.push_back({before_self * bytes_of(rank), here.size() * bytes_of(rank)});
      copy_rows(block.data() + gives[at(rank)].offset, slices.bytes(), read_by(rank), bytes_of(self), Store::cached);
    }
    return operation.show(block);
  });
  operation.meet();
  Reading reading(
      operation, block, [&](int rank) { return wants[at(rank)]; }, [&](int rank) { return gives[at(rank)]; });
  reading.finish();

  const std::size_t row_bytes = at(x.size(1)) * size_of(x.dtype());
  for (int rank = 0; rank < ranks; ++rank) {
    const std::size_t bytes = bytes_of(rank);
    if (bytes == 0) continue;
    std::byte* const column = x.bytes() + at(part_of(x.size(1), rank, ranks).begin) * size_of(x.dtype());
    const std::byte* from = reading.from(rank).data();
    for (const std::int32_t token : here) {
      std::memcpy(column + at(token) * row_bytes, from, bytes);
      from += bytes;
    }
  }
  operation.complete();
}

}  // namespace expar
