"""From tokens and their experts to the rows that the experts' kernels take. Not collective; all raise BadArgument."""

from __future__ import annotations

from typing import Optional, Sequence

import torch
from torch import Tensor

from .. import _native
from ..torch import alone
from .operators import dense, operator, refuse_unless, taken


@operator(
    fake=lambda a: (
        a.x.new_empty(min(a.x.shape[0], a.active_num) * a.expert_idx.shape[1], a.x.shape[1]),
        a.expert_idx.new_empty(a.expert_idx.numel()),
        a.expert_idx.new_empty(a.expert_idx.numel()),
    )
)
def npu_moe_init_routing(
    x: Tensor, row_idx: Tensor, expert_idx: Tensor, active_num: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A row for each slot, sorted by expert; slots of one expert keep their order.

    x          : [N, H] of any dtype
    row_idx    : [N, K] int32, k N + n at [n, k]: that of npu_moe_gating_top_k_softmax
    expert_idx : [N, K] int32
    returns    : expanded_x [min(N, active_num) K, H]; expanded_row_idx [N K] int32, the place of slot (n, k) at k N + n;
                 expanded_expert_idx [N K] int32, ascending
    """
    made = _native._ascend_moe_init_routing(dense(x), dense(row_idx), dense(expert_idx), active_num)
    rows, places, experts = map(taken, made)
    return rows, places, experts


# Of quant_mode.
_DTYPES = {0: torch.int8, 1: torch.int8, 2: torch.float8_e5m2, 3: torch.float8_e4m3fn}


def _routed(a):
    slots, (first, end) = a.expert_idx.numel(), a.active_expert_range or (0, a.expert_num)
    pads, mode, h = a.drop_pad_mode == 1, a.quant_mode, a.x.shape[1]
    rows = a.expert_num * a.expert_capacity if pads else min(a.active_num, slots) if a.active_num > 0 else slots
    counts = 0 if not a.expert_tokens_num_flag else (a.expert_num, 2) if a.expert_tokens_num_type == 2 else end - first
    if mode >= 2:
        scale = a.x.new_empty(rows, (h + 63) // 64 * 2, dtype=torch.float8_e8m0fnu)
    else:
        scale = a.x.new_empty(rows if mode == 1 or (mode == -1 and a.scale is not None) else 0, dtype=torch.float32)
    return (
        a.x.new_empty((a.expert_num, a.expert_capacity, h) if pads else (rows, h), dtype=_DTYPES.get(mode, a.x.dtype)),
        a.expert_idx.new_empty(slots),
        a.x.new_empty(counts, dtype=torch.int64 if a.expert_tokens_num_flag else torch.float32),
        scale,
    )


@operator(fake=_routed)
def npu_moe_init_routing_v2(
    x: Tensor,
    expert_idx: Tensor,
    *,
    scale: Optional[Tensor] = None,
    offset: Optional[Tensor] = None,
    active_num: int = -1,
    expert_capacity: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range: Optional[Sequence[int]] = None,
    row_idx_type: int = 0,
    x_dtype: Optional[int] = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A row for each slot whose expert is in the range, sorted by expert, quantised; slots of one expert keep their order.

    x          : [N, H] of any dtype; f32, bf16 or f16 where it is quantised
    expert_idx : [N, K] int32
    scale      : quant_mode -1 [N] f32, moved with the rows; 0 [1]; 1 [1, H] or [experts of the range, H]
    returns    : expanded_x [rows, H], or with drop_pad_mode 1 [E, C, H]; expanded_row_idx [N K] int32;
                 expert_token_cumsum_or_count int64, with the flag; expanded_scale. What there is none of has no elements
    docs/ascend.md has every parameter.
    """
    refuse_unless(x_dtype=(x_dtype, None))
    made = _native._ascend_moe_init_routing_v2(
        alone(),
        dense(x),
        dense(expert_idx),
        scale=dense(scale),
        offset=dense(offset),
        active_num=active_num,
        expert_capacity=expert_capacity,
        expert_num=expert_num,
        drop_pad_mode=drop_pad_mode,
        expert_tokens_num_type=expert_tokens_num_type,
        expert_tokens_num_flag=expert_tokens_num_flag,
        quant_mode=quant_mode,
        active_expert_range=list(active_expert_range) if active_expert_range else None,
        row_idx_type=row_idx_type,
    )
    rows, places, counts, scales = map(taken, made)
    return rows, places, counts, scales
