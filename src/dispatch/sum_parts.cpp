// The sum over slices: every row by one rank, which reads the parts where they lie.
#include "src/dispatch/sum_parts.h"

#include <algorithm>
#include <cstring>

#include <expar/collectives.h>

#include "src/dispatch/plan_data.h"
#include "src/util/check.h"
#include "src/util/shown.h"

namespace expar {
namespace {

const void* from_row(const ConstTensor& rows, const Part& part) {
  return rows.absent() ? nullptr : rows.rows(part.begin, part.end - part.begin).data();
}

/// Rows `own` of all parts, each rank's in its place, become their sum in `to`, which may be one of them.
void add(const Context& context, const Plan& plan, const Reading& parts, const Part& own, const CombineOptions& options,
         Tensor to) {
  const std::int64_t count = to.size(0);
  const int ranks = context.size();
  std::pmr::vector<const void*> slots(context.memory().get());
  slots.reserve(at(std::max(plan.data().bound + ranks, count * ranks)));  // the same for all batches of a bound
  const std::size_t row_bytes = at(to.size(1)) * size_of(to.dtype());
  for (std::int64_t t = 0; t < count; ++t) {
    for (int rank = 0; rank < ranks; ++rank) slots.push_back(parts.from(rank).data() + at(t) * row_bytes);
  }
  context.kernels().reduce({.tokens = count,
                            .topk = ranks,
                            .width = to.size(1),
                            .dtype = to.dtype(),
                            .slots = slots.data(),
                            .shared = static_cast<const float*>(from_row(options.shared, own)),
                            .shared_weights = static_cast<const float*>(from_row(options.shared_weights, own)),
                            .residual = from_row(options.residual, own),
                            .out = to.data()},
                           context.pool());
}

}  // namespace

void sum_parts(const Context& context, const Plan& plan, std::int64_t width, DType dtype, Tensor out,
               const CombineOptions& options, FunctionRef<void(Tensor)> write) {
  const Phase phase(context.trace(), operation_span("sum_parts"));
  const Communicator& communicator = context.communicator();
  const int self = context.rank(), ranks = context.size();
  const std::int64_t tokens = plan.tokens();
  Signature signature("sum_parts");
  signature.with("tokens", tokens).with("hidden", width).with("dtype", static_cast<std::int64_t>(dtype));
  Operation operation(communicator, signature);
  Block block;
  Tensor part;
  operation.ready([&] {
    block = communicator.allocate(at(tokens * width) * size_of(dtype));
    part = Tensor(block.data(), dtype, {tokens, width});
    write(part);
    return operation.show(block);
  });
  operation.meet();

  const std::size_t row_bytes = at(width) * size_of(dtype);
  const auto of = [&](int rank) {  // which rows of every block it adds up
    const Part rows = part_of(tokens, rank, ranks);
    return ByteRange{at(rows.begin) * row_bytes, at(rows.end - rows.begin) * row_bytes};
  };
  const auto own = [&](int) { return of(self); };
  Reading parts(operation, block, own, of);
  parts.finish();
  // The sums take the place of this rank's own part of them, which nobody else reads.
  const Part rows = part_of(tokens, self, ranks);
  add(context, plan, parts, rows, options, part.rows(rows.begin, rows.end - rows.begin));
  operation.gave_all();

  Reading sums(operation, block, of, own);
  for (int rank = 0; rank < ranks; ++rank) operation.await_given(rank, "its sums");
  sums.finish();
  for (int rank = 0; rank < ranks; ++rank) {
    const auto summed = sums.from(rank);
    if (!summed.empty()) std::memcpy(out.bytes() + of(rank).offset, summed.data(), summed.size());
  }
  if (!options.norm.y.absent()) rms_norm(context, out, options.norm);
  operation.complete();
}

}  // namespace expar
