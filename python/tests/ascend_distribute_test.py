"""The split-phase operators of torch_npu, on threads as ranks."""

from __future__ import annotations

import pytest
import torch
from ascend_samples import ROUNDED, TOKENS, TOPK, as_faked, domain, sample, times_number
from ranks import on_ranks

import expar
import expar.ascend as npu
from expar.torch.states import live_states

H = 1024


def there_and_back(context, *, quant_mode=0, comm_quant_mode=0, strided=False, **options):
    x, ids, scales = (t.t().contiguous().t() if strided else t for t in sample(context))
    told = domain(context, **options)
    y, idx, info = as_faked(npu.npu_moe_distribute_dispatch_setup, x, ids, quant_mode=quant_mode, **told)
    sent = as_faked(npu.npu_moe_distribute_dispatch_teardown, x, y, ids, info, quant_mode=quant_mode, **told)
    rows = sent[0] if sent[1].numel() == 0 else sent[0].bfloat16() * sent[1].bfloat16()[:, None]
    results = times_number(rows, sent[3], context.rank * len(sent[3]))
    results = results.t().contiguous().t() if strided else results
    told["comm_quant_mode"] = comm_quant_mode
    quantised, info = as_faked(npu.npu_moe_distribute_combine_setup, results, ids, sent[2], **told)
    out = as_faked(npu.npu_moe_distribute_combine_teardown, results, quantised, ids, idx, scales, info, **told)
    return x, ids, scales, (y, idx, *sent), out


@pytest.mark.parametrize("strided", [False, True])
def test_experts_that_multiply_give_the_weighted_sum_of_their_numbers(strided):
    for x, ids, scales, (y, idx, *_), out in on_ranks(4, lambda c: there_and_back(c, strided=strided)):
        torch.testing.assert_close(out.float(), x.float() * (scales * (ids + 1)).sum(1, keepdim=True), **ROUNDED)
        slots = ids.flatten().tolist()
        assert idx.tolist() == [slots[:i].count(e) for i, e in enumerate(slots)]
        assert torch.equal(y[: TOKENS * TOPK, :H], x.repeat_interleave(TOPK, 0))


@pytest.mark.parametrize("modes", [{"quant_mode": 2}, {"comm_quant_mode": 2}])
def test_rows_travel_as_int8(modes):
    for x, ids, scales, _, out in on_ranks(2, lambda c: there_and_back(c, **modes)):
        factors = scales * (ids + 1)
        # A row's or a block's largest value over 254 is the most that rounding changes.
        bound = x.float().abs().amax(1, keepdim=True) * factors.sum(1, keepdim=True) * (1 / 254 + 2**-7)
        assert ((out.float() - x.float() * factors.sum(1, keepdim=True)).abs() <= bound).all()


def test_the_bytes_are_those_of_one_phase():
    def both(context):
        x, ids, scales, sent, out = there_and_back(context)
        told = domain(context)
        rows = npu.npu_moe_distribute_dispatch_v2(x, ids, **told)
        count = int(rows[3].sum())
        results = times_number(rows[0], rows[3], context.rank * len(rows[3]))
        again = npu.npu_moe_distribute_combine_v2(results, ids, rows[2], rows[4], scales, **told)
        return torch.equal(sent[2][:count], rows[0][:count]), torch.equal(out, again)

    assert on_ranks(3, both) == [(True, True)] * 3


def test_results_may_be_written_over_once_they_are_posted():
    def body(context):
        x, ids, scales = sample(context)
        told = domain(context)
        y, idx, info = npu.npu_moe_distribute_dispatch_setup(x, ids, **told)
        rows, _, assist, _ = npu.npu_moe_distribute_dispatch_teardown(x, y, ids, info, **told)
        quantised, info = npu.npu_moe_distribute_combine_setup(rows, ids, assist, **told)
        rows.zero_()
        return x, scales, npu.npu_moe_distribute_combine_teardown(rows, quantised, ids, idx, scales, info, **told)

    for x, scales, out in on_ranks(2, body):
        torch.testing.assert_close(out.float(), x.float() * scales.sum(1, keepdim=True), **ROUNDED)


def test_what_a_setup_leaves_goes_with_its_tensors():
    before = live_states()
    on_ranks(2, there_and_back)
    assert live_states() == before


def test_own_work_goes_on_between_the_phases():
    """No rank waits in a setup: the last one to post is heard of in the teardowns alone."""

    def body(context):
        x, ids, _ = sample(context)
        told = domain(context)
        posted = []
        for _ in range(2):  # two layers under way at once
            y, _, info = npu.npu_moe_distribute_dispatch_setup(x, ids, **told)
            posted.append((y, info))
        return [npu.npu_moe_distribute_dispatch_teardown(x, y, ids, info, **told)[3].tolist() for y, info in posted]

    for first, second in on_ranks(2, body):
        assert first == second


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"quant_mode": 7}, "quant_mode is 7"),
        ({"x": torch.ones(TOKENS, H)}, "x is f32"),
        ({"expert_ids": torch.ones(TOKENS, TOPK, 1, 1, 1, dtype=torch.int32)}, "expert_ids has 5 axes"),
        ({"y_dtype": torch.int32, "quant_mode": 2}, "y_dtype"),
    ],
)
def test_what_is_wrong_with_one_setup_every_teardown_raises(wrong, why):
    def body(context):
        x, ids, _ = sample(context)
        right = dict(domain(context), x=x, expert_ids=ids)
        mine = {**right, **(wrong if context.rank == 1 else {})}
        y, _, info = npu.npu_moe_distribute_dispatch_setup(**mine)
        with pytest.raises(expar.BadArgument, match=why):
            npu.npu_moe_distribute_dispatch_teardown(**right, y=y, comm_cmd_info=info)
        return there_and_back(context)[-1].shape

    assert on_ranks(3, body, timeout=20) == [(TOKENS, H)] * 3


def test_a_teardowns_own_mistakes_are_its_ranks_alone():
    def body(context):
        x, ids, _ = sample(context)
        told = domain(context)
        y, _, info = npu.npu_moe_distribute_dispatch_setup(x, ids, **told)
        if context.rank == 1:
            with pytest.raises(expar.BadArgument, match="in the setup it was 0"):
                npu.npu_moe_distribute_dispatch_teardown(x, y.to(torch.int8), ids, info, quant_mode=2, **told)
            with pytest.raises(expar.BadArgument, match="comm_cmd_info holds nothing"):
                npu.npu_moe_distribute_dispatch_teardown(x, y, ids, info, **told)
        else:
            npu.npu_moe_distribute_dispatch_teardown(x, y, ids, info, **told)
        return there_and_back(context)[-1].shape

    assert on_ranks(2, body, timeout=20) == [(TOKENS, H)] * 2
