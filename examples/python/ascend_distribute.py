"""The example of torch_npu's npu_moe_distribute_{dispatch,combine}_{setup,teardown}, on processes instead of NPUs: tokens of
each rank go to K experts as int8 with a scale each, and back.

    python examples/python/ascend_distribute.py [--ranks 16] [--bs 64] [--h 1024] [--k 8]
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from ascend_sample import run_ranks, sample, worst_error

import expar.ascend as torch_npu

parser = argparse.ArgumentParser()
parser.add_argument("--ranks", type=int, default=16)
parser.add_argument("--bs", type=int, default=64)
parser.add_argument("--h", type=int, default=1024)
parser.add_argument("--k", type=int, default=8)
options = parser.parse_args()

ep_world_size = moe_expert_num = options.ranks
quant_mode = 2


def run_rank(rank: int) -> tuple[int, float]:
    ep_group = dist.new_group(range(ep_world_size), backend="gloo")
    told = dict(
        group_ep=torch_npu.get_hccl_comm_name(ep_group),
        ep_world_size=ep_world_size,
        ep_rank_id=rank,
        moe_expert_num=moe_expert_num,
        expert_shard_type=0,
        shared_expert_rank_num=0,
        global_bs=options.bs * ep_world_size,
    )
    tokens = sample(rank, options.bs, options.h, options.k, moe_expert_num)
    x, expert_ids = tokens.x, tokens.expert_ids

    y, expand_idx, comm_cmd_info = torch_npu.npu_moe_distribute_dispatch_setup(
        x=x, expert_ids=expert_ids, scales=tokens.scales, quant_mode=quant_mode, **told
    )
    # Work of one's own goes here, while the rows travel.
    expand_x, dynamic_scales, assist_info_for_combine, expert_token_nums = (
        torch_npu.npu_moe_distribute_dispatch_teardown(
            x=x, y=y, expert_ids=expert_ids, comm_cmd_info=comm_cmd_info, quant_mode=quant_mode, **told
        )
    )
    expand_x = expand_x.to(torch.bfloat16)  # your experts instead

    quant_expand_x, comm_cmd_info = torch_npu.npu_moe_distribute_combine_setup(
        expand_x=expand_x,
        expert_ids=expert_ids,
        assist_info_for_combine=assist_info_for_combine,
        comm_quant_mode=0,
        **told,
    )
    # And here.
    out = torch_npu.npu_moe_distribute_combine_teardown(
        expand_x=expand_x,
        quant_expand_x=quant_expand_x,
        expert_ids=expert_ids,
        expand_idx=expand_idx,
        expert_scales=tokens.expert_scales,
        comm_cmd_info=comm_cmd_info,
        comm_quant_mode=0,
        **told,
    )
    return int(expert_token_nums.sum()), worst_error(tokens, out, shared=0)


rows, errors = zip(*run_ranks(ep_world_size, run_rank))
print("rows that came to each rank:", *rows)
worst = max(errors)
print(f"the worst error is {worst:.2f} of what rounding may do")
raise SystemExit(worst > 1)
