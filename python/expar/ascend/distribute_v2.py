"""Dispatch and combine, in one phase each. Collective: every rank of the groups calls them, in the same order."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Optional

import torch
from torch import Tensor

from .. import _native
from .._native import _ascend_Domain as Domain
from .domain import INFO_PER_ROW, WRONG, domain_of, dynamic_scales, most_rows, rows_dtype
from .groups import Group, group_of
from .operators import dense, dtype_name, new_like, operator, results

_DISPATCHED = (
    "expand_x",
    "dynamic_scales",
    "assist_info_for_combine",
    "expert_token_nums",
    "ep_recv_counts",
    "tp_recv_counts",
    "expand_scales",
)


def _dispatched(a: SimpleNamespace) -> dict[str, Any]:
    """Room for what dispatch returns; None: there is no such thing. Raises what WRONG has."""
    domain, elastic, tp = domain_of(a), a.elastic_info is not None, max(a.tp_world_size, 1)
    rows = most_rows(domain, a.expert_ids, elastic)
    experts = domain.experts_per_rank if elastic else domain.local_expert_num
    return {
        "expand_x": a.x.new_empty(tp * rows, a.x.shape[1], dtype=rows_dtype(a.x, a.quant_mode, a.y_dtype)),
        "dynamic_scales": dynamic_scales(a.x, tp * rows, a.quant_mode),
        "assist_info_for_combine": a.x.new_empty(rows * INFO_PER_ROW, dtype=torch.int32),
        "expert_token_nums": a.x.new_empty(experts, dtype=torch.int64),
        "ep_recv_counts": a.x.new_empty(experts * domain.ep_world_size * tp, dtype=torch.int32),
        "tp_recv_counts": a.x.new_empty(tp, dtype=torch.int32),
        "expand_scales": None if a.expert_scales is None else a.x.new_empty(rows, dtype=torch.float32),
    }


def _left(a: SimpleNamespace) -> Domain:
    """This rank among those that are left, where some are out. Raises what WRONG has."""
    if a.elastic_info is None or a.elastic_info[0] == 0:
        return domain_of(a)
    _, ranks, shared_ranks, experts, *numbers = a.elastic_info.tolist()
    return Domain(
        ep_world_size=ranks,
        ep_rank_id=numbers[a.ep_rank_id],
        moe_expert_num=experts,
        shared_expert_num=a.shared_expert_num,
        shared_expert_rank_num=shared_ranks,
    )


def _begin_of(counts: Tensor, left: Domain, a: SimpleNamespace) -> Tensor:
    """What the sources that are left need of room for all."""
    return counts[: left.local_expert_num * left.ep_world_size * max(a.tp_world_size, 1)]


def _options(a: SimpleNamespace) -> _native._ascend_V2Options:
    return _native._ascend_V2Options(
        group_tp=group_of("group_tp", a.group_tp) if a.tp_world_size > 1 and a.group_tp else None,
        tp_world_size=a.tp_world_size,
        tp_rank_id=a.tp_rank_id,
        x_active_mask=dense(a.x_active_mask),
        elastic_info=dense(a.elastic_info),
        performance_info=getattr(a, "performance_info", None),
        zero_expert_num=a.zero_expert_num,
        copy_expert_num=a.copy_expert_num,
        const_expert_num=a.const_expert_num,
        refused=next((f"{name} is given, which expar has not" for name in _REFUSED if _given(a, name)), ""),
    )


# Views of 8 bits as 4, and what torch_npu's page reserves.
_REFUSED = ("x_dtype", "scales_dtype", "activation_scale", "weight_scale", "group_list", "out_dtype", "group_list_type")


def _given(a: SimpleNamespace, name: str) -> bool:
    value = getattr(a, name, None)
    return isinstance(value, Tensor) or bool(value)


@operator(fake=lambda a: results(_dispatched(a)), mutates="performance_info")
def npu_moe_distribute_dispatch_v2(
    x: Tensor,
    expert_ids: Tensor,
    group_ep: Group,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    scales: Optional[Tensor] = None,
    x_active_mask: Optional[Tensor] = None,
    expert_scales: Optional[Tensor] = None,
    elastic_info: Optional[Tensor] = None,
    performance_info: Optional[Tensor] = None,
    group_tp: Group = "",
    tp_world_size: int = 0,
    tp_rank_id: int = 0,
    expert_shard_type: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    quant_mode: int = 0,
    global_bs: int = 0,
    expert_token_nums_type: int = 1,
    comm_alg: str = "",
    zero_expert_num: int = 0,
    copy_expert_num: int = 0,
    const_expert_num: int = 0,
    y_dtype: Optional[torch.dtype] = None,
    x_dtype: Optional[int] = None,
    scales_dtype: Optional[int] = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sends each token to the ranks of its experts.

    x          : [BS, H] f16 or bf16
    expert_ids : [BS, K] int32, different ones in a row
    scales     : smooth scales, f32; expert_scales [BS, K] f32 travel beside the rows
    returns    : expand_x [A, H], local expert by local expert, in each by source rank, then token and slot;
                 dynamic_scales; assist_info_for_combine [A 128] int32; expert_token_nums [LE] int64; ep_recv_counts
                 [LE W] int32; tp_recv_counts; expand_scales [A]. What there is none of has no elements; rows past those
                 that came hold anything
    docs/ascend.md has every parameter. Collective over group_ep, and over a group_tp of 2 ranks.
    Raises BadArgument, Mismatch, Timeout, PeerLost: the same on every rank.
    """
    a = SimpleNamespace(**locals())
    try:
        room, left = _dispatched(a), _left(a)
        written = dict(room)
        written["expert_token_nums"] = room["expert_token_nums"][: left.local_expert_num]
        written["ep_recv_counts"] = _begin_of(room["ep_recv_counts"], left, a)
    except WRONG:
        room = written = dict.fromkeys(_DISPATCHED)
    _native._ascend_moe_distribute_dispatch_v2(
        group_of("group_ep", group_ep),
        domain_of(a),
        _options(a),
        x=dense(x),
        expert_ids=dense(expert_ids),
        scales=dense(scales),
        expert_scales=dense(expert_scales),
        quant_mode=quant_mode,
        y_dtype=dtype_name(y_dtype),
        expert_token_nums_type=expert_token_nums_type,
        **written,
    )
    return results(room)


def _home(a: SimpleNamespace) -> Any:
    """Room for the tokens. Raises what WRONG has."""
    return a.expand_x.new_empty(a.expert_ids.shape[0], a.expand_x.shape[1])


def _results(a: SimpleNamespace) -> _native._ascend_CombineV2:
    counts = dense(a.ep_send_counts)
    try:
        counts = _begin_of(counts, _left(a), a) if a.elastic_info is not None else counts
    except WRONG:
        pass  # the library says so
    return _native._ascend_CombineV2(
        expand_x=dense(a.expand_x),
        expert_ids=dense(a.expert_ids),
        ep_send_counts=counts,
        tp_send_counts=dense(a.tp_send_counts),
        expert_scales=dense(a.expert_scales),
        shared_expert_x=dense(a.shared_expert_x),
        ori_x=dense(a.ori_x),
        const_expert_alpha_1=dense(a.const_expert_alpha_1),
        const_expert_alpha_2=dense(a.const_expert_alpha_2),
        const_expert_v=dense(a.const_expert_v),
        comm_quant_mode=a.comm_quant_mode,
    )


@operator(fake=_home, mutates="performance_info")
def npu_moe_distribute_combine_v2(
    expand_x: Tensor,
    expert_ids: Tensor,
    assist_info_for_combine: Tensor,
    ep_send_counts: Tensor,
    expert_scales: Optional[Tensor],
    group_ep: Group,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    tp_send_counts: Optional[Tensor] = None,
    x_active_mask: Optional[Tensor] = None,
    expand_scales: Optional[Tensor] = None,
    shared_expert_x: Optional[Tensor] = None,
    elastic_info: Optional[Tensor] = None,
    ori_x: Optional[Tensor] = None,
    const_expert_alpha_1: Optional[Tensor] = None,
    const_expert_alpha_2: Optional[Tensor] = None,
    const_expert_v: Optional[Tensor] = None,
    performance_info: Optional[Tensor] = None,
    group_tp: Group = "",
    tp_world_size: int = 0,
    tp_rank_id: int = 0,
    expert_shard_type: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    global_bs: int = 0,
    comm_quant_mode: int = 0,
    comm_alg: str = "",
    zero_expert_num: int = 0,
    copy_expert_num: int = 0,
    const_expert_num: int = 0,
) -> Tensor:
    """Brings the results home: out[t] = the sum over k of expert_scales[t, k] * the result of (t, k), then those of the
    shared experts, then shared_expert_x; in f32, rounded once.

    expand_x       : [A, H] f16 or bf16, results in the order of dispatch's expand_x
    ep_send_counts : dispatch's ep_recv_counts; tp_send_counts its tp_recv_counts. assist_info_for_combine and
                     expand_scales are not read
    expert_scales  : [BS, K] f32; None: each is 1
    returns        : [BS, H]
    Collective, and raises, as npu_moe_distribute_dispatch_v2.
    """
    a = SimpleNamespace(**locals())
    try:
        out = _home(a)
    except WRONG:
        out = None
    _native._ascend_moe_distribute_combine_v2(
        group_of("group_ep", group_ep), domain_of(a), _options(a), _results(a), out
    )
    return out


def _normed(a: SimpleNamespace) -> Any:
    """Room for y, rstd and x. Raises what WRONG has."""
    tokens, x = a.expert_ids.shape[0], a.expand_x
    each = x.new_empty(tokens, 1, x.shape[1], dtype=torch.bfloat16)
    return each, x.new_empty(tokens, 1, 1, dtype=torch.float32), new_like(each)


@operator(fake=_normed)
def npu_moe_distribute_combine_add_rms_norm(
    expand_x: Tensor,
    expert_ids: Tensor,
    expand_idx: Tensor,
    ep_send_counts: Tensor,
    expert_scales: Tensor,
    residual_x: Tensor,
    gamma: Tensor,
    group_ep: Group,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    tp_send_counts: Optional[Tensor] = None,
    x_active_mask: Optional[Tensor] = None,
    activation_scale: Optional[Tensor] = None,
    weight_scale: Optional[Tensor] = None,
    group_list: Optional[Tensor] = None,
    expand_scales: Optional[Tensor] = None,
    shared_expert_x: Optional[Tensor] = None,
    elastic_info: Optional[Tensor] = None,
    ori_x: Optional[Tensor] = None,
    const_expert_alpha_1: Optional[Tensor] = None,
    const_expert_alpha_2: Optional[Tensor] = None,
    const_expert_v: Optional[Tensor] = None,
    group_tp: Group = "",
    tp_world_size: int = 0,
    tp_rank_id: int = 0,
    expert_shard_type: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    global_bs: int = 0,
    out_dtype: int = 0,
    comm_quant_mode: int = 0,
    group_list_type: int = 0,
    comm_alg: str = "",
    norm_eps: float = 1e-6,
    zero_expert_num: int = 0,
    copy_expert_num: int = 0,
    const_expert_num: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """npu_moe_distribute_combine_v2, the residual, and RMSNorm: x = combined + residual_x, rstd = 1 / sqrt(mean(x^2) +
    norm_eps), y = x rstd gamma. bf16 alone.

    residual_x : [BS, 1, H]; gamma : [H]; expand_idx : dispatch's assist_info_for_combine, which is not read
    returns    : y [BS, 1, H], rstd [BS, 1, 1] f32, x [BS, 1, H]
    Collective, and raises, as npu_moe_distribute_dispatch_v2.
    """
    a = SimpleNamespace(**locals())
    try:
        y, rstd, x = _normed(a)
    except WRONG:
        y = rstd = x = None
    _native._ascend_moe_distribute_combine_add_rms_norm(
        group_of("group_ep", group_ep),
        domain_of(a),
        _options(a),
        _results(a),
        residual_x=dense(residual_x),
        gamma=dense(gamma),
        norm_eps=norm_eps,
        y=y,
        rstd=rstd,
        x=x,
    )
    return y, rstd, x
