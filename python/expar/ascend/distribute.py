"""Dispatch and combine in two phases each: a setup posts what this rank sends and returns at once, its teardown waits for
what the others have posted.

Collective: every rank of the group calls all four in this order, with the same domain, K, H, dtypes and modes. What is
wrong with a setup's arguments on one rank is raised by its teardown, on every rank; what is wrong with a teardown's own,
on that rank alone.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from .. import _native
from ..torch.states import attach, fake_handle, state_of
from .domain import INFO_PER_ROW, WRONG, domain_of, dynamic_scales, message_elements, most_rows, rows_dtype
from .groups import Group, group_of
from .operators import dense, dtype_name, new_like, operator, results


class _Posted(NamedTuple):
    """What comm_cmd_info stands for: what was posted, and the memory that the other ranks read."""

    info: _native._ascend_CommCmdInfo
    sent: Tensor

    def of(self, tensor: Tensor) -> Any:
        """What the setup sent, where this is it: a copy of it, in a graph or without strides, is it too."""
        alike = (tensor.shape, tensor.dtype) == (self.sent.shape, self.sent.dtype)
        return self.sent if alike else dense(tensor)


def _comm_cmd_info(posted: _Posted) -> Tensor:
    return attach(posted).view(torch.int32)


def _fake_comm_cmd_info(like: Tensor) -> Tensor:
    return fake_handle(like).view(torch.int32)


def _posted(comm_cmd_info: Tensor) -> _Posted:
    """Raises BadArgument (no such tensor of a setup)."""
    posted: _Posted = state_of(comm_cmd_info)
    return posted


def _messages(a: SimpleNamespace) -> Any:
    """Room for y and expand_idx. Raises what WRONG has."""
    tokens, topk = a.expert_ids.shape
    elements = message_elements(a.x, a.quant_mode, a.y_dtype)
    return (
        a.x.new_empty(
            tokens * (topk + a.shared_expert_num), elements, dtype=rows_dtype(a.x, a.quant_mode, a.y_dtype)
        ),
        a.x.new_empty(tokens * topk, dtype=torch.int32),
    )


@operator(fake=lambda a: (*_messages(a), _fake_comm_cmd_info(a.x)))
def npu_moe_distribute_dispatch_setup(
    x: Tensor,
    expert_ids: Tensor,
    group_ep: Group,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    scales: Optional[Tensor] = None,
    x_active_mask: Optional[Tensor] = None,
    expert_shard_type: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    quant_mode: int = 0,
    global_bs: int = 0,
    comm_type: int = 0,
    comm_alg: str = "",
    y_dtype: Optional[torch.dtype] = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantises the rows of x and posts them.

    x          : [BS, H] f16 or bf16
    expert_ids : [BS, K] int32, different ones in a row
    scales     : smooth scales, f32; x_active_mask [BS] bool, True before False
    returns    : y, the rows as they travel, which must stay as it is until the teardown; expand_idx [BS K] int32; and
                 comm_cmd_info int32, which stands for what was posted: dropped before its teardown, it ends the job
    docs/ascend.md has every parameter. The group's first operator waits for all of its ranks, a setup too.
    """
    a = SimpleNamespace(**locals())
    try:
        y, expand_idx = _messages(a)
        written = {"y": y, "expand_idx": expand_idx}
    except WRONG:
        y, expand_idx = x.new_empty(0), x.new_empty(0, dtype=torch.int32)
        written = {"y": None, "expand_idx": None}
    info = _native._ascend_moe_distribute_dispatch_setup(
        group_of("group_ep", group_ep),
        domain_of(a),
        x=dense(x),
        expert_ids=dense(expert_ids),
        scales=dense(scales),
        x_active_mask=dense(x_active_mask),
        quant_mode=quant_mode,
        y_dtype=dtype_name(y_dtype),
        **written,
    )
    return y, expand_idx, _comm_cmd_info(_Posted(info, y.detach()))


def _arrived(a: SimpleNamespace) -> dict[str, Any]:
    """Room for what the teardown returns; None: there is no such thing. Raises what WRONG has."""
    domain = domain_of(a)
    rows = most_rows(domain, a.expert_ids)
    return {
        "expand_x": a.x.new_empty(rows, a.x.shape[1], dtype=a.y.dtype),
        "dynamic_scales": dynamic_scales(a.x, rows, a.quant_mode),
        "assist_info_for_combine": a.x.new_empty(rows * INFO_PER_ROW, dtype=torch.int32),
        "expert_token_nums": a.x.new_empty(domain.local_expert_num, dtype=torch.int64),
    }


@operator(fake=lambda a: results(_arrived(a)))
def npu_moe_distribute_dispatch_teardown(
    x: Tensor,
    y: Tensor,
    expert_ids: Tensor,
    comm_cmd_info: Tensor,
    group_ep: Group,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    expert_shard_type: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    quant_mode: int = 0,
    global_bs: int = 0,
    expert_token_nums_type: int = 1,
    comm_type: int = 0,
    comm_alg: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Waits until the rows of all ranks are there and unpacks them.

    x, y, expert_ids, comm_cmd_info : those of the setup
    returns : expand_x [A, H] of y's dtype, local expert by local expert, in each by source rank, then token and slot;
              dynamic_scales, of no elements where the mode has none; assist_info_for_combine [A 128] int32;
              expert_token_nums [LE] int64. Rows past those that came hold anything
    """
    a = SimpleNamespace(**locals())
    posted = _posted(comm_cmd_info)
    try:
        room = _arrived(a)
    except WRONG:
        room = dict.fromkeys(("expand_x", "dynamic_scales", "assist_info_for_combine", "expert_token_nums"))
    _native._ascend_moe_distribute_dispatch_teardown(
        group_of("group_ep", group_ep),
        domain_of(a),
        x=dense(x),
        y=posted.of(y),
        expert_ids=dense(expert_ids),
        comm_cmd_info=posted.info,
        quant_mode=quant_mode,
        y_dtype=dtype_name(y.dtype) if quant_mode else None,
        expert_token_nums_type=expert_token_nums_type,
        **room,
    )
    return results(room)


def _rows_to_send(a: SimpleNamespace) -> Any:
    """A copy of the rows that came. A graph may write elsewhere what the teardown is given, and the memory of what the
    setup is given over again before the other ranks have read it."""
    expand_x = dense(a.expand_x)
    try:
        blocks = domain_of(a).local_expert_num * a.ep_world_size
        rows = int(a.assist_info_for_combine[blocks - 1])
        sent = new_like(expand_x)
        sent[:rows] = expand_x[:rows]
    except WRONG:
        return expand_x  # the library says what is wrong, on every rank
    return sent


def _quantised(a: SimpleNamespace) -> Tensor:
    """Room for quant_expand_x. Raises what WRONG has."""
    rows, h = a.expand_x.shape
    return torch.empty(rows, _native._ascend_quant_expand_bytes(h), dtype=torch.int8, device=a.expand_x.device)


@operator(fake=lambda a: (_quantised(a), _fake_comm_cmd_info(a.expand_x)))
def npu_moe_distribute_combine_setup(
    expand_x: Tensor,
    expert_ids: Tensor,
    assist_info_for_combine: Tensor,
    group_ep: Group,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    expert_shard_type: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    global_bs: int = 0,
    comm_quant_mode: int = 0,
    comm_type: int = 0,
    comm_alg: str = "",
) -> tuple[Tensor, Tensor]:
    """Posts each result to where its row came from.

    expand_x : [A, H] f16 or bf16, in the order of the dispatch's
    returns  : quant_expand_x [A, ...] int8, the rows as they travel with comm_quant_mode 2, else anything; and
               comm_cmd_info, as of the other setup
    Cost: one more copy of the rows than in C++.
    """
    a = SimpleNamespace(**locals())
    try:
        quant_expand_x = written = _quantised(a)
    except WRONG:
        quant_expand_x, written = torch.empty(0, dtype=torch.int8), None
    sent = dense(expand_x) if comm_quant_mode else _rows_to_send(a)
    info = _native._ascend_moe_distribute_combine_setup(
        group_of("group_ep", group_ep),
        domain_of(a),
        expand_x=sent,
        expert_ids=dense(expert_ids),
        assist_info_for_combine=dense(assist_info_for_combine),
        comm_quant_mode=comm_quant_mode,
        quant_expand_x=written,
    )
    return quant_expand_x, _comm_cmd_info(_Posted(info, quant_expand_x.detach() if comm_quant_mode else sent))


@operator(fake=lambda a: a.expand_x.new_empty(a.expert_ids.shape[0], a.expand_x.shape[1]))
def npu_moe_distribute_combine_teardown(
    expand_x: Tensor,
    quant_expand_x: Tensor,
    expert_ids: Tensor,
    expand_idx: Tensor,
    expert_scales: Tensor,
    comm_cmd_info: Tensor,
    group_ep: Group,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    x_active_mask: Optional[Tensor] = None,
    shared_expert_x: Optional[Tensor] = None,
    expert_shard_type: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    global_bs: int = 0,
    comm_quant_mode: int = 0,
    comm_type: int = 0,
    comm_alg: str = "",
) -> Tensor:
    """Waits for the results and sums them: out[t] = the sum over k of expert_scales[t, k] * the result of (t, k), then
    those of the shared experts, then shared_expert_x; in f32, rounded once.

    expand_x, quant_expand_x, expert_ids, comm_cmd_info : those of the setup; expand_idx of dispatch_setup
    expert_scales : [BS, K] f32
    returns       : [BS, H]
    """
    a = SimpleNamespace(**locals())
    posted = _posted(comm_cmd_info)
    try:
        out = a.expand_x.new_empty(expert_ids.shape[0], expand_x.shape[1])
    except WRONG:
        out = expand_x.new_empty(0)
    _native._ascend_moe_distribute_combine_teardown(
        group_of("group_ep", group_ep),
        domain_of(a),
        expand_x=dense(expand_x) if comm_quant_mode else posted.of(expand_x),
        quant_expand_x=posted.of(quant_expand_x) if comm_quant_mode else None,
        expert_ids=dense(expert_ids),
        expand_idx=dense(expand_idx),
        expert_scales=dense(expert_scales),
        comm_cmd_info=posted.info,
        x_active_mask=dense(x_active_mask),
        shared_expert_x=dense(shared_expert_x),
        comm_quant_mode=comm_quant_mode,
        out=out,
    )
    return out
