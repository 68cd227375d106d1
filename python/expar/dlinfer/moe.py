"""dlinfer's MoE operators with ids and weights from the caller's router: whole rows travel to SwiGLU experts."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, Optional, Union

import torch
from torch import Tensor

from .. import Context, all_gather
from ..errors import BadArgument, Unsupported
from ..torch.agree import told_to_all
from ..torch.ranks import Where, alone, numbered
from ..torch.visit import visit_experts


Group = Union[Where, Context]


class MoECommType(enum.Enum):
    """How dlinfer carries rows; here all that go to other ranks go the same way."""

    NAIVE = enum.auto()
    ALLGATHER = enum.auto()
    ALLTOALL = enum.auto()
    MC2 = enum.auto()
    TP = enum.auto()
    UNDEFINED = enum.auto()


@dataclass
class MoeMetadata:
    """What fused_moe is told of the ranks. dlinfer's own does as well: fields are read by their names."""

    max_tokens_across_dp: int = 1
    pad_size: int = 0
    dp_size: int = 1
    tp_size: int = 1
    ep_size: int = 1
    tp_rank: int = 0
    ep_rank: int = 0
    tp_group: Group = None
    ep_group: Group = None
    moe_comm_type: MoECommType = MoECommType.UNDEFINED
    x_active_mask: Optional[Tensor] = None
    moe_group_name: Optional[str] = None
    expert_ids_per_ep_rank: Optional[Tensor] = None
    router_n_groups: int = -1


def fused_moe_all2all(
    hidden_states: Tensor,
    gate_up_weights: Tensor,
    down_weights: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    renormalize: bool,
    ep_size: int,
    ep_rank: int,
    ep_group: Group,
    expert_ids_per_ep_rank: Optional[Tensor] = None,
    chunked_moe_layout: Any = None,
) -> Tensor:
    """out[t] = sum over slots k of topk_weights[t, k] * (down silu(gate x) * up x) of expert topk_ids[t, k].

    hidden_states   : [T, H] f32 or bf16, this rank's own tokens, of any number
    gate_up_weights : [L, 2I, H], gate then up, of this rank's experts: number ep_rank * L and the following
    down_weights    : [L, H, I]
    topk_weights    : [T, K]; left as they are, also where they are renormalised
    topk_ids        : [T, K] integers in [-1, L * ep_size); -1 is not routed. Of experts in several places (EPLB) the
                      number of the place
    renormalize     : each token's weights are divided by their sum
    ep_group        : a process group, a DeviceMesh of one dim, or an expar.Context; None where ep_size is 1
    expert_ids_per_ep_rank : [L * ep_size], the place of each expert on its rank, which is its number modulo L; or None
    chunked_moe_layout : None: any number of experts is one call
    returns         : [T, H]
    Differentiable in hidden_states, the weights of the experts and topk_weights; gradients of experts are those of the
    sum of all ranks' losses. Collective over ep_group, backward too. Raises BadArgument, Unsupported (a chunked layout),
    and as ``expar.torch.visit_experts``, which has its cost.
    """
    context = _ep(ep_group, ep_rank, ep_size)
    return _experts(
        context,
        hidden_states,
        gate_up_weights,
        down_weights,
        topk_weights,
        topk_ids,
        renormalize,
        expert_ids_per_ep_rank,
        chunked_moe_layout,
    )


def fused_moe(
    hidden_states: Tensor,
    gate_up_weights: Tensor,
    down_weights: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    topk: int,
    renormalize: bool,
    moe_metadata: MoeMetadata,
    chunked_moe_layout: Any = None,
) -> Tensor:
    """The same over the ranks of ``moe_metadata``; those of tp_group have the same tokens and share them out.

    hidden_states : [T, H]; topk_weights, topk_ids [T, K], or already this rank's share of them
    moe_metadata  : MoeMetadata or dlinfer's. Of ep_size 1 all experts are here, and nothing communicates. Where tokens
                    are shared out, tp_rank r has the r-th part of T + pad_size rows, of which the padding does not
                    travel. x_active_mask [T] counts with MC2: other tokens have the output 0
    returns       : [T, H], on each rank of tp_group
    For inference where tp_size is more than 1. Collective over ep_group and tp_group. Raises: as fused_moe_all2all.
    """
    m = moe_metadata
    here = m.ep_size <= 1
    context = alone() if here else _ep(m.ep_group, m.ep_rank, m.ep_size)
    x, weights, ids, tp = hidden_states, topk_weights, topk_ids, None
    if not here and m.tp_size > 1:
        tp = numbered(m.tp_group, m.tp_rank, m.tp_size, ("tp_rank", "tp_size"), among=context)
    with told_to_all(context):
        if ids.shape[-1] != topk:
            raise BadArgument(f"topk_ids is {list(ids.shape)}, should be [{x.shape[0]}, {topk}]")
        if not here:
            x, weights, ids = _share(m, x, weights, ids)
    mine = _experts(
        context,
        x,
        gate_up_weights,
        down_weights,
        weights,
        ids,
        renormalize,
        None if here else m.expert_ids_per_ep_rank,
        chunked_moe_layout,
    )
    if tp is None:
        return mine
    out = torch.empty_like(hidden_states)
    all_gather(tp, mine, out)
    return out


def _ep(group: Group, rank: int, size: int) -> Context:
    return numbered(group, rank, size, ("ep_rank", "ep_size"))


def _share(m: MoeMetadata, x: Tensor, weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What of them this rank of tp_group computes."""
    tokens = x.shape[0]
    each = -(-(tokens + m.pad_size) // m.tp_size)
    share = slice(min(m.tp_rank * each, tokens), min((m.tp_rank + 1) * each, tokens))
    routes = share if ids.shape[0] == tokens else slice(0, x[share].shape[0])
    ids = ids[routes]
    if m.moe_comm_type.name == "MC2" and m.x_active_mask is not None:
        ids = ids.masked_fill(~m.x_active_mask[share, None], -1)
    return x[share], weights[routes], ids


def _experts(
    context: Context,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    ids: Tensor,
    renormalize: bool,
    places: Optional[Tensor] = None,
    layout: Any = None,
) -> Tensor:
    local = gate_up.shape[0]
    experts = local * context.size
    with told_to_all(context):
        if layout is not None:
            raise Unsupported("chunked_moe_layout is for weights of 1024 groups a call: hand in [L, 2I, H] and [L, H, I]")
        if weights.shape != ids.shape:
            raise BadArgument(f"topk_weights is {list(weights.shape)}, topk_ids {list(ids.shape)}, should be alike")
        if places is not None and not torch.equal(places.to(torch.int64), torch.arange(experts) % local):
            raise BadArgument(
                f"expert_ids_per_ep_rank is not arange({experts}) % {local}: experts lie on a rank in the order of their "
                "numbers; for other places renumber topk_ids"
            )
    weights = weights.float()
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return visit_experts(x, ids, weights, gate_up, down, context=context, experts=experts)
