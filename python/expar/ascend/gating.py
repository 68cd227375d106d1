"""From logits to experts."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from .. import _native
from ..torch import alone
from .operators import dense, operator, taken


def _chosen(a, dtype=None):
    return a.x.new_empty(a.x.shape[0], a.k, dtype=dtype or a.x.dtype)


@operator(fake=lambda a: (_chosen(a), _chosen(a, torch.int32), _chosen(a, torch.int32)))
def npu_moe_gating_top_k_softmax(
    x: Tensor, finished: Optional[Tensor] = None, k: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest of softmax(x), the softmax over all experts.

    x        : [N, E] f32, bf16 or f16
    finished : [N] bool; there every expert_idx is E, which is no expert
    returns  : y [N, k], best first; expert_idx int32, ties to the lower expert; row_idx int32 for npu_moe_init_routing
    Not collective. Raises BadArgument.
    """
    y, expert_idx, row_idx = _native._ascend_moe_gating_top_k_softmax(alone(), dense(x), dense(finished), k)
    return taken(y), taken(expert_idx), taken(row_idx)


@operator(
    fake=lambda a: (
        _chosen(a),
        _chosen(a, torch.int32),
        a.x.new_empty(a.x.shape if a.out_flag else 0, dtype=torch.float32),
    )
)
def npu_moe_gating_top_k(
    x: Tensor,
    k: int,
    *,
    bias: Optional[Tensor] = None,
    input_ids: Optional[Tensor] = None,
    tid2eid: Optional[Tensor] = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest scores and biases in a token's best groups, and their weights, in f32.

    x         : [N, E] f32, bf16 or f16
    bias      : [E], added for the choice alone
    input_ids : [N] with tid2eid [V, k]: tokens go where the table says
    norm_type : scores are 0 softmax, 1 sigmoid; those chosen are divided by their sum + eps with 1 or renorm 1
    returns   : y [N, k], expert_idx [N, k] int32, and the scores [N, E] f32, of no elements without out_flag
    Not collective. No gradient. Raises BadArgument.
    """
    y, expert_idx, out = _native._ascend_moe_gating_top_k(
        alone(),
        dense(x),
        k,
        bias=dense(bias),
        input_ids=dense(input_ids),
        tid2eid=dense(tid2eid),
        k_group=k_group,
        group_count=group_count,
        group_select_mode=group_select_mode,
        renorm=renorm,
        norm_type=norm_type,
        out_flag=out_flag,
        routed_scaling_factor=routed_scaling_factor,
        eps=eps,
    )
    return taken(y), taken(expert_idx), taken(out)
