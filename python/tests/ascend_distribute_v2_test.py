"""npu_moe_distribute_dispatch_v2, _combine_v2 and _combine_add_rms_norm, on threads as ranks."""

from __future__ import annotations

import time

import pytest
import torch
from ascend_samples import EXPERTS, HIDDEN, ROUNDED, TOKENS, TOPK, as_faked, domain, sample, times_number
from ranks import on_ranks

import expar
import expar.ascend as npu


def there_and_back(context, **options):
    x, ids, scales = sample(context)
    told = domain(context, **options)
    sent = as_faked(npu.npu_moe_distribute_dispatch_v2, x, ids, **told)
    results = times_number(sent[0], sent[3], context.rank * len(sent[3]))
    out = as_faked(npu.npu_moe_distribute_combine_v2, results, ids, sent[2], sent[4], scales, **told)
    return x, ids, scales, sent, out


def test_experts_that_multiply_give_the_weighted_sum_of_their_numbers():
    for x, ids, scales, _, out in on_ranks(4, there_and_back):
        want = x.float() * (scales * (ids + 1)).sum(1, keepdim=True)
        torch.testing.assert_close(out.float(), want, **ROUNDED)
        assert out.dtype == x.dtype


def test_shared_experts_count_once_beside_the_others():
    def body(context):
        x, ids, scales = sample(context)
        told = domain(context, shared_expert_num=1, shared_expert_rank_num=1)
        sent = npu.npu_moe_distribute_dispatch_v2(x, ids, **told)
        out = npu.npu_moe_distribute_combine_v2(sent[0], ids, sent[2], sent[4], scales, **told)
        return x, scales, sent[3], out

    for rank, (x, scales, counts, out) in enumerate(on_ranks(4, body)):
        torch.testing.assert_close(out.float(), x.float() * (1 + scales.sum(1, keepdim=True)), **ROUNDED)
        assert len(counts) == (1 if rank == 0 else 4) and (rank > 0 or counts.item() == 4 * TOKENS)


def test_rows_come_expert_by_expert_and_rank_by_rank_with_their_weights():
    def body(context):
        x, ids, scales = sample(context)
        return x, ids, scales, as_faked(
            npu.npu_moe_distribute_dispatch_v2, x, ids, expert_scales=scales, **domain(context)
        )

    results = on_ranks(3, body)
    for rank, (*_, (rows, dynamic, info, counts, received, tp, weights)) in enumerate(results):
        mine = [
            (e, r, t, k)
            for e in range(4 * rank, 4 * rank + 4)
            for r, (_, ids, *_) in enumerate(results)
            for t, k in (ids == e).nonzero().tolist()
        ]
        assert info[: 3 * len(mine)].view(-1, 3).tolist() == [[r, t, k] for _, r, t, k in mine]
        assert torch.equal(rows[: len(mine)], torch.stack([results[r][0][t] for _, r, t, _ in mine]))
        assert weights[: len(mine)].tolist() == [results[r][2][t, k].item() for _, r, t, k in mine]
        assert counts.tolist() == [sum(e == 4 * rank + i for e, *_ in mine) for i in range(4)]
        assert received[-1] == len(mine) == tp.item() and len(received) == 4 * 3 and dynamic.numel() == 0


@pytest.mark.parametrize(
    ("mode", "dtype", "scales"),
    [(2, torch.int8, 1), (2, torch.float8_e4m3fn, 1), (3, torch.float8_e5m2, 8), (4, torch.float8_e4m3fn, 32)],
)
def test_quantised_rows_times_their_scales_are_the_rows(mode, dtype, scales):
    def body(context):
        x, ids, weights = sample(context)
        told = domain(context)
        sent = as_faked(npu.npu_moe_distribute_dispatch_v2, x, ids, quant_mode=mode, y_dtype=dtype, **told)
        rows = sent[0].float() * sent[1].float().view(len(sent[0]), scales, 1).expand(-1, -1, HIDDEN // scales).flatten(1)
        return x, weights, sent, npu.npu_moe_distribute_combine_v2(
            rows.bfloat16(), ids, sent[2], sent[4], weights, **told
        )

    for x, weights, sent, out in on_ranks(2, body):
        assert sent[0].dtype == dtype and sent[1].numel() == len(sent[0]) * scales
        want = x.float() * weights.sum(1, keepdim=True)
        assert ((out.float() - want).abs() <= 0.15 * want.abs() + 0.1).all()


def test_a_norm_follows():
    def body(context):
        x, ids, scales = sample(context)
        told = domain(context)
        sent = npu.npu_moe_distribute_dispatch_v2(x, ids, **told)
        gamma, residual = torch.linspace(0.5, 2, HIDDEN).bfloat16(), torch.randn(TOKENS, 1, HIDDEN).bfloat16()
        results = sent[0], ids, sent[2], sent[4], scales
        told["norm_eps"] = 1e-5
        out = as_faked(npu.npu_moe_distribute_combine_add_rms_norm, *results, residual, gamma, **told)
        return x, scales, gamma, residual, out

    for x, scales, gamma, residual, (y, rstd, normed) in on_ranks(2, body):
        want = x.float() * scales.sum(1, keepdim=True) + residual[:, 0].float()
        torch.testing.assert_close(normed[:, 0].float(), want, **ROUNDED)
        factor = (normed.float().square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        torch.testing.assert_close(rstd, factor)
        torch.testing.assert_close(y.float(), normed.float() * factor * gamma.float(), **ROUNDED)


def test_ranks_that_are_out_leave_the_others_their_experts():
    """Four ranks were; the second is out."""

    def body(context):
        rank = [0, 2, 3][context.rank]
        x, ids, scales = sample(context, experts=9)
        info = torch.tensor([1, 3, 0, 9, 0, -1, 1, 2, 0, 2, 3, 0], dtype=torch.int32)
        told = domain(context, ep_world_size=4, ep_rank_id=rank, elastic_info=info)
        sent = as_faked(npu.npu_moe_distribute_dispatch_v2, x, ids, **told)
        results = times_number(sent[0], sent[3][:3], 3 * context.rank)
        return x, ids, scales, sent, npu.npu_moe_distribute_combine_v2(results, ids, sent[2], sent[4], scales, **told)

    for x, ids, scales, sent, out in on_ranks(3, body):
        want = x.float() * (scales * (ids + 1)).sum(1, keepdim=True)
        torch.testing.assert_close(out.float(), want, **ROUNDED)
        assert len(sent[4]) == 3 * 4 and set(sent[2][: 3 * sent[4][8] : 3].tolist()) <= {0, 2, 3}


def test_tensor_parallel_ranks_share_rows():
    """Two groups of two ranks with the same expert; each has a half of every result."""

    def body(context):
        ep = context.on(context.communicator.split(context.rank % 2))
        tp = context.on(context.communicator.split(context.rank // 2))
        x, ids, scales = sample(context, experts=2 + TOPK)
        ids = ids % 2
        ids[:, 1] = 1 - ids[:, 0]
        told = domain(ep, moe_expert_num=2, group_tp=tp, tp_world_size=2, tp_rank_id=tp.rank)
        ids, scales = ids[:, :2].contiguous(), scales[:, :2].contiguous()
        sent = as_faked(npu.npu_moe_distribute_dispatch_v2, x, ids, **told)
        results = sent[0] / 2
        out = npu.npu_moe_distribute_combine_v2(
            results, ids, sent[2], sent[4], scales, tp_send_counts=sent[5], **told
        )
        return x, scales, sent, out

    for x, scales, sent, out in on_ranks(4, body):
        torch.testing.assert_close(out.float(), x.float() * scales.sum(1, keepdim=True), **ROUNDED)
        assert sent[5].tolist() == [2 * TOKENS] * 2 and len(sent[4]) == 4 and len(sent[0]) == 2 * 2 * TOKENS


def test_masked_slots_and_special_experts_stay_at_home():
    def body(context):
        x, ids, scales = sample(context, experts=EXPERTS + 2)  # the last two: zeros, and a copy
        mask = torch.rand(ids.shape, generator=torch.Generator().manual_seed(7)) < 0.7
        told = domain(context, x_active_mask=mask, zero_expert_num=1, copy_expert_num=1)
        sent = npu.npu_moe_distribute_dispatch_v2(x, ids, **told)
        out = npu.npu_moe_distribute_combine_v2(sent[0], ids, sent[2], sent[4], scales, ori_x=x, **told)
        return x, ids, scales, mask, out

    for x, ids, scales, mask, out in on_ranks(2, body):
        want = x.float() * (scales * mask * (ids != EXPERTS)).sum(1, keepdim=True)
        torch.testing.assert_close(out.float(), want, **ROUNDED)


def test_tensors_with_strides_are_taken():
    def body(context):
        x, ids, scales = sample(context)
        told = domain(context)
        strided = [t.t().contiguous().t() for t in (x, ids, scales)]
        outs = []
        for tokens, experts, weights in ((x, ids, scales), strided):
            sent = npu.npu_moe_distribute_dispatch_v2(tokens, experts, **told)
            rows = sent[0] if tokens is x else sent[0].t().contiguous().t()
            outs.append(npu.npu_moe_distribute_combine_v2(rows, experts, sent[2], sent[4], weights, **told))
        return outs

    for dense, strided in on_ranks(2, body):
        assert torch.equal(dense, strided)


def test_ranks_learn_whom_they_waited_for():
    def body(context):
        x, ids, _ = sample(context)
        waited = torch.zeros(3, dtype=torch.int64)
        expar.barrier(context)
        if context.rank == 2:
            time.sleep(0.1)
        npu.npu_moe_distribute_dispatch_v2(x, ids, performance_info=waited, **domain(context))
        return waited.tolist()

    for rank, waited in enumerate(on_ranks(3, body)):
        assert waited[rank] == 0 and (rank == 2 or waited[2] > 50_000)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"quant_mode": 6}, "quant_mode is 6"),
        ({"y_dtype": torch.int16, "quant_mode": 2}, "int16"),
        ({"x_dtype": 1}, "x_dtype is given"),
        ({"shared_expert_num": 0, "shared_expert_rank_num": 1}, "shared_expert_rank_num is 1"),
        ({"ep_world_size": 0}, "ep_world_size is 0"),
        ({"global_bs": 10**15}, "global_bs"),
        ({"x": torch.ones(TOKENS, HIDDEN, dtype=torch.float64)}, "x has a dtype of 64 bits"),
        ({"x": torch.ones(HIDDEN).bfloat16()}, "x is"),
        ({"elastic_info": torch.ones(3, dtype=torch.int32)}, "elastic_info is int32 \\[3\\]"),
        ({"performance_info": torch.zeros(6, dtype=torch.int64)[::2]}, "performance_info is strided"),
    ],
)
def test_what_one_rank_does_wrong_every_rank_is_told_and_goes_on(wrong, why):
    def body(context):
        x, ids, _ = sample(context)
        right = dict(domain(context), x=x, expert_ids=ids)
        if "performance_info" in wrong:
            right["performance_info"] = torch.zeros(3, dtype=torch.int64)
        with pytest.raises(expar.BadArgument, match=why) as caught:
            npu.npu_moe_distribute_dispatch_v2(**{**right, **(wrong if context.rank == 1 else {})})
        return caught.value.rank, there_and_back(context)[-1]

    results = on_ranks(3, body, timeout=20)
    assert [rank for rank, _ in results] == [1] * 3


def test_a_group_that_nobody_knows_is_refused_by_name():
    with pytest.raises(expar.BadArgument, match="group_ep is 'world', which no process group here is called"):
        on_ranks(2, lambda c: npu.npu_moe_distribute_dispatch_v2(*sample(c)[:2], **domain(c, group_ep="world")))
    with pytest.raises(expar.BadArgument, match="init_process_group"):
        npu.get_hccl_comm_name()
