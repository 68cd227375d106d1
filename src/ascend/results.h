// The way of the experts' results back to their tokens, and the sums that they end in.
#pragma once

#include <cstdint>

#include <expar/ascend/domain.h>
#include <expar/context.h>
#include <expar/dispatch.h>

#include "src/ascend/copies.h"
#include "src/ascend/mail.h"

namespace expar::ascend {

/// What a combine is given.
struct Returned {
  ConstTensor expand_x;    // [A, H] f16 or bf16
  ConstTensor expert_ids;  // [BS, K]
  ConstTensor prefix;      // int32: [LE, W] rows summed up to and with each block; there may be more behind
  std::int64_t comm_quant_mode;
};

/// What is compared between ranks and between setup and teardown.
std::vector<NamedNumber> numbers_of(const Returned& returned);

/// The results and where each came from; with comm_quant_mode 2 as int8 in quant [A, quant_expand_bytes].
/// `name` is that of prefix. Throws Error: bad_argument.
Mail write_results(const Context& group_ep, const Domain& domain, const Returned& returned, const char* name,
                   Tensor quant);

/// Experts that need no rank, by id: from moe_expert_num on zeros, then copies, then constants.
struct NoRank {
  std::int64_t zero = 0, copy = 0, constant = 0;
  ConstTensor ori_x = {};                  // [BS, H] what copies give back
  ConstTensor alpha_1 = {}, alpha_2 = {};  // [constant, H]
  ConstTensor v = {};                      // [constant, H]

  std::int64_t count() const { return zero + copy + constant; }
};

/// `tensor` [BS, H] or [a, b, H] with a b = BS, of out's dtype, as [BS, H]; absent where it is. Throws Error:
/// bad_argument.
ConstTensor flat(const char* name, ConstTensor tensor, ConstTensor out);

/// What is summed besides the results of other ranks.
struct Summed {
  ConstTensor expert_ids;
  ConstTensor expert_scales;         // [BS, K] f32; absent: 1
  ConstTensor shared_expert_x = {};  // [BS, H]; absent: nothing
  ConstTensor residual = {};         // [BS, H]; absent: nothing
  NoRank no_rank = {};
};

/// Throws unless what came are the results of these copies. Error: bad_argument.
void check_results(const Domain& domain, const Copies& copies, const Inbox& inbox);

/// out [BS, H] = the results of a token's slots times their scales, slot by slot, then those of its shared experts,
/// then shared_expert_x, then the residual; in f32, rounded once.
void sum_results(const Context& context, const Domain& domain, const Copies& copies, const Inbox& inbox,
                 std::int64_t comm_quant_mode, const Summed& summed, Tensor out);

}  // namespace expar::ascend
