// Ascend's operators that make of tokens and their experts the rows that the experts' kernels take.
#pragma once

#include <array>
#include <cstdint>
#include <optional>

#include <expar/context.h>

namespace expar::ascend {

struct InitRouting {
  Array expanded_x;           // [min(N, active_num) K, H] dtype of x, sorted by expert
  Array expanded_row_idx;     // [N K] int32: the place of slot (n, k) is at k N + n
  Array expanded_expert_idx;  // [N K] int32, ascending
};

/// A row for each slot, sorted by expert; slots of one expert keep their order (n, then k).
///   x          : [N, H]  of any dtype
///   row_idx    : [N, K]  int32, k N + n at [n, k]: the row_idx of moe_gating_top_k_softmax
///   expert_idx : [N, K]  int32
/// Not collective. Throws Error: bad_argument (shapes, dtypes, another row_idx, active_num below 0).
/// Cost: a sort of the slots and one copy of the rows. Source: npu_moe_init_routing.
InitRouting moe_init_routing(ConstTensor x, ConstTensor row_idx, ConstTensor expert_idx, std::int64_t active_num);

struct InitRoutingOptions {
  ConstTensor scale = {};                   // quant_mode -1: [N] f32 of the rows, moved with them, or none
                                            //             0: [1] f32
                                            //             1: [1, H] or [experts of the range, H] f32, or none
  ConstTensor offset = {};                  // quant_mode 0: [1] f32
  std::int64_t active_num = -1;             // drop_pad_mode 0: rows at most; -1 and 0: all
  std::int64_t expert_capacity = -1;        // drop_pad_mode 1: C, rows of each expert, from 1 to N
  std::int64_t expert_num = -1;             // E, needed
  std::int64_t drop_pad_mode = 0;           // 0: expert after expert; 1: room for C rows each, what is more is dropped
  std::int64_t expert_tokens_num_type = 0;  // 0 sums so far, 1 counts, 2 pairs (expert, count) of those that have rows
  bool expert_tokens_num_flag = false;      // count at all
  std::int64_t quant_mode = -1;             // -1 none, 0 int8 by scale and offset, 1 int8 with a scale per row,
                                            // 2 fp8_e5m2 and 3 fp8_e4m3 with a scale per 32 values (MX)
  std::optional<std::array<std::int64_t, 2>> active_expert_range = {};  // [first, end); none: [0, E)
  /// expanded_row_idx has 0: the place of each slot, -1 if its expert is out of the range or has no room left, and what
  /// its place would be if it is beyond active_num; 1: the slot of each place.
  std::int64_t row_idx_type = 0;
};

struct InitRoutingV2 {
  Array expanded_x;                    // [rows, H], or [E, C, H]; dtype of x or of quant_mode; zeros where no row is
  Array expanded_row_idx;              // [N K] int32, by slots n K + k
  Array expert_token_cumsum_or_count;  // int64 [experts of the range], for pairs [E, 2], then zeros; with the flag;
                                       // before anything is dropped
  Array expanded_scale;  // quant_mode -1 with scale, and 1: [rows] or [E C] f32; 2, 3: [rows or E C, S] fp8_e8m0
};

/// A row for each slot whose expert is in the range, sorted by expert, quantised; slots of one expert keep their order.
///   x          : [N, H]  of any dtype; f32, bf16 or f16 where it is quantised
///   expert_idx : [N, K]  int32; slots of experts outside of the range have no row
///   rows       : N K or, if less, active_num
///   S          : of ceil(H / 32), the next even number
/// Not collective. Throws Error: bad_argument (shapes, dtypes, an option out of its range or without another it needs).
/// Cost: a sort of the slots and one copy of the rows, two reads where they are quantised by row.
/// Source: npu_moe_init_routing_v2.
InitRoutingV2 moe_init_routing_v2(const Context& context, ConstTensor x, ConstTensor expert_idx,
                                  const InitRoutingOptions& options);

}  // namespace expar::ascend
