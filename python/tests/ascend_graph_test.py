"""torch_npu's operators in graphs of torch.compile, on processes with a process group."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from processes import on_processes

import expar.ascend as npu

EXPERTS, TOKENS, HIDDEN, TOPK = 4, 5, 1024, 2


def told():
    return dict(ep_world_size=dist.get_world_size(), ep_rank_id=dist.get_rank(), moe_expert_num=EXPERTS)


def one_phase(x, ids, scales, group, waited):
    sent = npu.npu_moe_distribute_dispatch_v2(
        x, ids, group_ep=group, quant_mode=2, expert_scales=scales, performance_info=waited, **told()
    )
    rows = sent[0].to(x.dtype) * sent[1][:, None].to(x.dtype)
    return npu.npu_moe_distribute_combine_v2(
        npu.npu_swiglu(torch.cat([rows, rows], 1)), ids, sent[2], sent[4], scales, group_ep=group, **told()
    )


def two_phases(x, ids, scales, group, _):
    y, idx, info = npu.npu_moe_distribute_dispatch_setup(x, ids, group, **told())
    own = x.float().square().sum()
    rows, _, assist, _ = npu.npu_moe_distribute_dispatch_teardown(x, y, ids, info, group, **told())
    results = rows * 2
    q, info = npu.npu_moe_distribute_combine_setup(results, ids, assist, group, **told())
    return npu.npu_moe_distribute_combine_teardown(results, q, ids, idx, scales, info, group, **told()) + own.to(x.dtype)


def compiled_and_not(layer, backend, named):
    g = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(TOKENS, HIDDEN, generator=g).bfloat16()
    ids = torch.stack([torch.randperm(EXPERTS, generator=g)[:TOPK] for _ in range(TOKENS)]).int()
    scales, waited = torch.rand(TOKENS, TOPK, generator=g), torch.zeros(2, dtype=torch.int64)
    group = npu.get_hccl_comm_name(dist.group.WORLD) if named else dist.group.WORLD
    graph = torch.compile(layer, backend=backend, fullgraph=True, dynamic=False)
    eager = layer(x, ids, scales, group, None)
    same = [torch.equal(eager, graph(x, ids, scales, group, None))]
    if layer is one_phase:
        same += [torch.equal(eager, graph(x, ids, scales, group, waited)), waited.min().item() >= 0]
    return all(same)


@pytest.mark.parametrize(
    ("layer", "backend", "named"),
    [(one_phase, "aot_eager", True), (two_phases, "aot_eager", False), (two_phases, "inductor", True)],
    ids=["one_phase", "two_phases_of_a_group", "two_phases_by_inductor"],
)
def test_a_graph_gives_the_bytes_of_its_operators(layer, backend, named):
    assert on_processes(2, compiled_and_not, layer, backend, named) == [True] * 2
