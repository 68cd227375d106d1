"""From experts to the instances of them."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from .. import _native
from .operators import dense, new_like, operator, taken


@operator(fake=lambda a: new_like(a.expert_ids))
def npu_moe_eplb_update_expert(
    expert_ids: Tensor, eplb_table: Tensor, local_rank_id: int, world_size: int, *, balance_mode: int = 0
) -> Tensor:
    """Which instance of its expert each slot goes to: the expert_ids of the dispatch that follows.

    expert_ids : [BS, K] int32 or int64
    eplb_table : [E, F] int32; row e is the number of its instances c, then the c instances
    balance_mode : 0 by rank, 1 by token, 2 (expar's own) by rank as evenly as can be
    returns    : [BS, K] of expert_ids' dtype
    Not collective. Raises BadArgument, naming the parameter, its value and its range.
    """
    return taken(
        _native._ascend_moe_eplb_update_expert(
            dense(expert_ids), dense(eplb_table), local_rank_id, world_size, balance_mode
        )
    )


@operator(fake=lambda a: (new_like(a.expert_ids), new_like(a.expert_ids, torch.bool)))
def npu_moe_update_expert(
    expert_ids: Tensor,
    eplb_table: Tensor,
    *,
    expert_scales: Optional[Tensor] = None,
    pruning_threshold: Optional[Tensor] = None,
    active_mask: Optional[Tensor] = None,
    local_rank_id: int = -1,
    world_size: int = -1,
    balance_mode: int = 0,
) -> tuple[Tensor, Tensor]:
    """npu_moe_eplb_update_expert, which also drops slots that count little: of token t, where active_mask has it, slot k
    stays if expert_scales[t, k] >= pruning_threshold[k] * sum of expert_scales[t].

    expert_scales : [BS, K] f32, bf16 or f16, descending in each row; with pruning_threshold [K] or [1, K] f32
    active_mask   : [BS] bool, True before False
    returns       : balanced_expert_ids [BS, K], and balanced_active_mask [BS, K] bool, the x_active_mask of the dispatch
    Not collective. Raises BadArgument, naming the parameter, its value and its range.
    """
    ids, mask = _native._ascend_moe_update_expert(
        dense(expert_ids),
        dense(eplb_table),
        expert_scales=dense(expert_scales),
        pruning_threshold=dense(pruning_threshold),
        active_mask=dense(active_mask),
        local_rank_id=local_rank_id,
        world_size=world_size,
        balance_mode=balance_mode,
    )
    return taken(ids), taken(mask).view(torch.bool)
