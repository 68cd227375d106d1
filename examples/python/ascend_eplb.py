"""The example of torch_npu's npu_moe_eplb_update_expert, on processes instead of NPUs: two ranks hold a shared expert, the
others an instance of one of E experts each; tokens go to K of them as int8, and back.

    python examples/python/ascend_eplb.py [--ranks 16] [--bs 8] [--h 7168] [--k 8] [--compile [BACKEND]]

With --compile the model is compiled as one graph, which the pages call graph mode.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from ascend_sample import run_ranks, sample, worst_error

import expar.ascend as torch_npu

parser = argparse.ArgumentParser()
parser.add_argument("--ranks", type=int, default=16)
parser.add_argument("--bs", type=int, default=8)
parser.add_argument("--h", type=int, default=7168)
parser.add_argument("--k", type=int, default=8)
parser.add_argument("--compile", nargs="?", const="aot_eager", metavar="BACKEND")
options = parser.parse_args()

ep_world_size, tp_world_size, shared_expert_rank_num = options.ranks, 1, 2
moe_expert_num = ep_world_size - shared_expert_rank_num
quant_mode = 2


class Model(torch.nn.Module):
    """Instances of the chosen experts, there and back."""

    def forward(self, x, expert_ids, eplb_table, scales, expert_scales, group_ep, group_tp, rank):
        told = dict(
            group_ep=group_ep,
            group_tp=group_tp,
            ep_world_size=ep_world_size,
            tp_world_size=tp_world_size,
            ep_rank_id=rank // tp_world_size,
            tp_rank_id=rank % tp_world_size,
            expert_shard_type=0,
            shared_expert_rank_num=shared_expert_rank_num,
            moe_expert_num=moe_expert_num,
            global_bs=options.bs * ep_world_size,
        )
        balanced_expert_ids = torch_npu.npu_moe_eplb_update_expert(
            expert_ids=expert_ids,
            eplb_table=eplb_table,
            local_rank_id=rank // tp_world_size,
            world_size=ep_world_size,
            balance_mode=0,
        )
        expand_x, _, assist_info_for_combine, _, ep_recv_counts, tp_recv_counts, _ = (
            torch_npu.npu_moe_distribute_dispatch_v2(
                x=x, expert_ids=balanced_expert_ids, scales=scales, quant_mode=quant_mode, **told
            )
        )
        expand_x = expand_x.to(torch.bfloat16)  # your experts instead
        return torch_npu.npu_moe_distribute_combine_v2(
            expand_x=expand_x,
            expert_ids=balanced_expert_ids,
            assist_info_for_combine=assist_info_for_combine,
            ep_send_counts=ep_recv_counts,
            tp_send_counts=tp_recv_counts,
            expert_scales=expert_scales,
            **told,
        )


def run_rank(rank: int) -> float:
    groups = [dist.new_group(range(ep_world_size), backend="gloo")]
    groups += [dist.new_group([one], backend="gloo") for one in range(ep_world_size)]
    ep_group, tp_group = groups[0], groups[1 + rank]

    tokens = sample(rank, options.bs, options.h, options.k, moe_expert_num)
    eplb_table = torch.tensor([[1, expert] for expert in range(moe_expert_num)], dtype=torch.int32)
    model = Model()
    if options.compile:
        model = torch.compile(model, backend=options.compile, fullgraph=True, dynamic=False)
    out = model(
        tokens.x,
        tokens.expert_ids,
        eplb_table,
        tokens.scales,
        tokens.expert_scales,
        torch_npu.get_hccl_comm_name(ep_group),
        torch_npu.get_hccl_comm_name(tp_group),
        rank,
    )
    return worst_error(tokens, out, shared=1)


errors = run_ranks(ep_world_size, run_rank)
worst = max(errors)
print(f"{options.bs} tokens of each of {len(errors)} ranks are back, {options.compile or 'operator by operator'}")
print(f"the worst error is {worst:.2f} of what rounding may do")
raise SystemExit(worst > 1)
