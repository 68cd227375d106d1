"""dlinfer's MoE calls against loops over tokens in double precision, forward and backward."""

from __future__ import annotations

import pytest
import torch
from ranks import on_ranks

import expar
import expar.torch as ep
from expar.dlinfer import MoECommType, MoEConfig, MoeMetadata, fused_moe, fused_moe_all2all, moe

TOKENS, HIDDEN, INNER, EXPERTS, TOPK = 7, 16, 6, 4, 2

torch.set_num_threads(1)


def swiglu(gate_up, down, x):
    gate, up = (gate_up @ x).chunk(2)
    return down @ (gate * torch.sigmoid(gate) * up)


def draw(width, seed=5):
    """x, router logits with one expert that nobody takes, experts of that width, a bias, and the output's gradient."""
    g = torch.Generator().manual_seed(seed)
    x, dout = torch.randn(2, TOKENS, HIDDEN, generator=g)
    logits = torch.randn(TOKENS, EXPERTS, generator=g)
    logits[:, 2] = -9
    gate_up = torch.randn(EXPERTS, 2 * INNER, width, generator=g) / 4
    down = torch.randn(EXPERTS, width, INNER, generator=g) / 2
    return x, logits, gate_up, down, torch.randn(HIDDEN, generator=g), dout


def kernel(rows, gate_up_weights, down_weights, context):
    """Row by row in plain PyTorch, with the weights of the expert that group_list says."""
    ends = context["group_list"].cumsum(0) if context["group_list_type"] == 1 else context["group_list"]
    assert ends.tolist() == context["cumsum"].tolist() == context["counts"].cumsum(0).tolist()
    assert len(ends) == len(gate_up_weights) and (ends[-1:] == len(rows)).all()
    experts = torch.bucketize(torch.arange(len(rows)), ends, right=True)
    results = [swiglu(gate_up_weights[e], down_weights[e], row) for e, row in zip(experts.tolist(), rows)]
    nothing = 0 * (gate_up_weights.sum() + down_weights.sum())  # so that weights without rows have gradients too
    return (torch.stack(results) if results else rows) + nothing


def twin(x, logits, gate_up, down, bias, heads, on_input, normalize):
    """[T, H]: each of ``heads`` slices by itself."""
    out = []
    for t in range(len(x)):
        scores = torch.softmax(logits[t], 0) if normalize else logits[t]
        row = 0 if bias is None else bias
        for e in sorted(range(EXPERTS), key=lambda e: -logits[t, e].item())[:TOPK]:
            before, after = (scores[e], 1) if on_input else (1, scores[e])
            row = row + after * torch.cat([swiglu(gate_up[e], down[e], before * part) for part in x[t].chunk(heads)])
        out.append(row)
    return torch.stack(out)


@pytest.mark.parametrize("ranks", [1, 2, 4])  # on 4 each holds a single expert, of which one has no rows
@pytest.mark.parametrize("partition", ["sliced", "gathered"])
@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_joined_slices_and_summed_gradients_are_those_of_a_loop_over_tokens(ranks, partition, on_input, normalize):
    heads = ranks if partition == "sliced" else 1
    drawn = draw(HIDDEN // heads)
    leaves = [tensor.double().requires_grad_() for tensor in drawn[:5]]
    wanted = twin(*leaves, heads, on_input, normalize)
    wanted.backward(drawn[5].double())

    def rank_main(context):
        mine = slice(context.rank * EXPERTS // ranks, (context.rank + 1) * EXPERTS // ranks)
        columns = slice(context.rank * HIDDEN // ranks, (context.rank + 1) * HIDDEN // ranks)
        x, logits, bias = (drawn[i].clone().requires_grad_() for i in (0, 1, 4))
        gate_up, down = (drawn[i][mine].clone().requires_grad_() for i in (2, 3))
        kwargs = {"gate_up_weights": gate_up, "down_weights": down}
        out = fused_moe_all2all(
            hidden_states=x,
            router_logits=logits,
            moe_config=MoEConfig(EXPERTS, TOPK, ranks),
            ep_group=context,
            ep_rank=context.rank,
            ep_size=ranks,
            expert_kernel=kernel if on_input else cumulative,
            expert_kwargs=kwargs if on_input else {**kwargs, "group_list_type": 0},
            apply_router_weight_on_input=on_input,
            normalize_router_logits=normalize,
            bias=bias[columns] if on_input else bias,
            partition=partition,
        )
        out.backward(drawn[5][:, columns])
        return out.detach(), x.grad, logits.grad, bias.grad, gate_up.grad, down.grad

    def cumulative(rows, group_list_type, **others):
        assert group_list_type == others["context"]["group_list_type"] == 0
        return kernel(rows, **others)

    out, dx, dlogits, dbias, dgate_up, down = zip(*on_ranks(ranks, rank_main))
    got = [torch.cat(out, 1), sum(dx), sum(dlogits), sum(dbias), torch.cat(dgate_up), torch.cat(down)]
    grads = [leaves[i].grad for i in (0, 1, 4, 2, 3)]
    for name, a, b in zip(("out", "dx", "dlogits", "dbias", "dgate_up", "ddown"), got, [wanted, *grads]):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5, msg=lambda text: f"{name}: {text}")


def test_slices_may_be_of_each_rank_s_own_tokens_of_any_number():
    drawn = draw(HIDDEN // 2)
    tokens = {0: slice(0, 0), 1: slice(2, 7)}

    def rank_main(context):
        mine = tokens[context.rank]
        held = slice(2 * context.rank, 2 * context.rank + 2)
        return fused_moe_all2all(
            drawn[0][mine],
            drawn[1][mine],
            moe_config=MoEConfig(EXPERTS, TOPK, 2),
            ep_group=context,
            ep_rank=context.rank,
            ep_size=2,
            expert_kernel=kernel,
            expert_kwargs={"gate_up_weights": drawn[2][held], "down_weights": drawn[3][held]},
        )

    none, some = on_ranks(2, rank_main)
    assert none.shape == (0, HIDDEN // 2)
    wanted = twin(*(t.double() for t in drawn[:4]), None, 2, False, False)[2:7, HIDDEN // 2 :]
    torch.testing.assert_close(some.double(), wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gathered_slices_are_the_same_bytes_on_any_number_of_ranks(dtype):
    drawn = [t.to(dtype) for t in draw(HIDDEN)]

    def rank_main(context):
        def experts(rows, gate_up, down, **told):
            counts = told["context"]["counts"]
            hidden = ep.activate(ep.grouped_mm(rows, gate_up, counts, context=context), "swiglu", context=context)
            return ep.grouped_mm(hidden, down, counts, context=context)

        held = slice(context.rank * EXPERTS // context.size, (context.rank + 1) * EXPERTS // context.size)
        kwargs = {"gate_up": drawn[2][held], "down": drawn[3][held]}
        return call(
            context,
            hidden_states=drawn[0],
            bias=drawn[4],
            expert_kernel=experts,
            expert_kwargs=kwargs,
            partition="gathered",
        )

    one = rank_main(ep.alone())
    assert one.dtype == dtype
    for ranks in (2, 4):
        assert torch.equal(torch.cat(on_ranks(ranks, rank_main), 1), one)


def call(context, **changes):
    x, logits, gate_up, down, _, _ = draw(HIDDEN // context.size)
    arguments = {
        "hidden_states": x,
        "router_logits": logits,
        "moe_config": MoEConfig(EXPERTS, TOPK, context.size),
        "ep_group": context,
        "ep_rank": context.rank,
        "ep_size": context.size,
        "expert_kernel": lambda rows, context: rows,
    }
    return fused_moe_all2all(**{**arguments, **changes})


def test_what_cannot_be_says_what_to_do():
    def rank_main(context):
        def refused(match, error=expar.BadArgument, **changes):
            with pytest.raises(error, match=match):
                call(context, **changes)

        refused("hidden size must be divisible by ep_size: 15 columns for 2 ranks", hidden_states=torch.zeros(7, 15))
        refused(r"router_logits \[7, 3\]; they should be \[T, H\] and \[T, 4\]", router_logits=torch.zeros(7, 3))
        refused("quant_type is 'w8a8'", expar.Unsupported, quant_type="w8a8")
        refused(r"bias is \[3\], should be \[8\], or \[16\]", bias=torch.zeros(3))
        refused("group_list_type is 2", expert_kwargs={"group_list_type": 2})
        refused("partition is 'whole'", partition="whole")
        refused("experts_per_token is 5", moe_config=MoEConfig(EXPERTS, 5, 2))
        refused("^rank 0: ep_rank is 7, but this is rank 0 of 2", ep_rank=7)
        refused(r"returned \[0, 8\], should be \[\d+, 8\]", expert_kernel=lambda rows, context: rows[:0])

    on_ranks(2, rank_main)
    with pytest.raises(expar.BadArgument, match=r"num_experts \(5\) must be divisible by ep_world_size \(2\)"):
        MoEConfig(5, 2, 2)


def test_what_one_rank_does_wrong_all_are_told_and_go_on():
    def rank_main(context):
        def refused(match, error=expar.BadArgument, **changes):
            with pytest.raises(error, match=match) as caught:
                call(context, **(changes if context.rank == 1 else {}))
            assert caught.value.rank == 1
            assert call(context).shape == (TOKENS, HIDDEN // 2)

        refused("^rank 1: .*hidden size must be divisible by ep_size", hidden_states=torch.zeros(7, 15))
        refused("^rank 1: .*quant_type is 'w8a8'", expar.Unsupported, quant_type="w8a8")
        refused(r"^rank 1: .*expert_kernel returned \[0, 8\]", expert_kernel=lambda rows, context: rows[:0])
        refused("^rank 1: .*should be float32 or bfloat16", expert_kernel=lambda rows, context: rows.double())
        refused("^rank 1: .*ep_rank is 0, but this is rank 1 of 2", ep_rank=0)
        refused("^rank 1: .*ep_size is 4, but this is rank 1 of 2", ep_size=4)

    on_ranks(2, rank_main, timeout=5)


def test_an_exception_of_one_rank_s_kernel_is_internal_to_the_others():
    def kernel(rows, context):
        raise IndexError("no such expert")

    def rank_main(context):
        wrong = {"expert_kernel": kernel} if context.rank == 1 else {}
        told = "^rank 1: .*IndexError: no such expert"
        with pytest.raises(IndexError if wrong else expar.Internal, match="^no such expert" if wrong else told):
            call(context, **wrong)
        assert call(context).shape == (TOKENS, HIDDEN // 2)

    on_ranks(2, rank_main, timeout=5)


@pytest.mark.parametrize("how", ["as many for each expert", "others", "fewer tokens"])
def test_gathering_slices_of_different_tokens_is_told_to_all(how):
    def rank_main(context):
        logits = torch.eye(TOKENS, EXPERTS)
        if context.rank == 1:
            others = {
                "as many for each expert": logits.flip(0),
                "others": logits + torch.arange(EXPERTS),
                "fewer tokens": logits[:-1],
            }
            logits = others[how]
        with pytest.raises(expar.Mismatch, match="all ranks of the ep group hand in the same tokens"):
            call(context, hidden_states=torch.ones(len(logits), HIDDEN), router_logits=logits, partition="gathered")
        assert call(context, partition="gathered").shape == (TOKENS, HIDDEN // 2)

    on_ranks(2, rank_main)


# dlinfer's own operators: ids and weights from the caller, whole rows.

STARTS = {1: [0, 7], 2: [0, 3, 7], 4: [0, 3, 3, 4, 7]}


def routed(logits, renormalize):
    weights, ids = logits.softmax(-1).topk(TOPK)
    return weights / weights.sum(-1, keepdim=True) if renormalize else weights, ids


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("renormalize", [False, True])
def test_whole_rows_visit_experts_by_id_also_where_a_rank_holds_one(ranks, renormalize):
    drawn = draw(HIDDEN)
    leaves = [tensor.double().requires_grad_() for tensor in drawn[:4]]
    weights, ids = routed(leaves[1], renormalize)
    wanted = torch.stack(
        [
            sum(weights[t, k] * swiglu(leaves[2][e], leaves[3][e], leaves[0][t]) for k, e in enumerate(ids[t].tolist()))
            for t in range(TOKENS)
        ]
    )
    wanted.backward(drawn[5].double())

    def rank_main(context):
        mine = slice(*STARTS[ranks][context.rank : context.rank + 2])
        held = slice(context.rank * EXPERTS // ranks, (context.rank + 1) * EXPERTS // ranks)
        x, logits = (drawn[i][mine].clone().requires_grad_() for i in (0, 1))
        gate_up, down = (drawn[i][held].clone().requires_grad_() for i in (2, 3))
        weights, ids = routed(logits, False)
        before = weights.detach().clone()
        local = torch.arange(EXPERTS) % (EXPERTS // ranks)
        out = moe.fused_moe_all2all(
            x, gate_up, down, weights, ids, renormalize, ranks, context.rank, context, local.to(torch.int32)
        )
        assert torch.equal(weights, before)
        out.backward(drawn[5][mine])
        return out.detach(), x.grad, logits.grad, gate_up.grad, down.grad

    for got, want in zip(zip(*on_ranks(ranks, rank_main)), [wanted, *(leaf.grad for leaf in leaves)]):
        torch.testing.assert_close(torch.cat(got).double(), want, rtol=2e-5, atol=2e-5)


def on_one_rank(drawn, weights, ids):
    return moe.fused_moe_all2all(drawn[0], drawn[2], drawn[3], weights, ids, False, 1, 0, None)


def test_an_expert_in_two_places_gives_the_bytes_of_one():
    drawn = draw(HIDDEN)
    weights, ids = routed(drawn[1], False)
    held = [[0, 3, 1], [2, 0, 3]]  # logical experts of each rank's places
    place = torch.tensor([[0, 4], [2, 2], [3, 3], [1, 5]])  # of the first and of the second copy

    def rank_main(context):
        mine = slice(context.rank, None, 2)
        copies = torch.arange(TOKENS)[mine] % 2
        experts = [w[held[context.rank]] for w in drawn[2:4]]
        physical = place[ids[mine], copies[:, None]]
        return moe.fused_moe_all2all(drawn[0][mine], *experts, weights[mine], physical, False, 2, context.rank, context)

    alone = on_one_rank(drawn, weights, ids)
    for rank, out in enumerate(on_ranks(2, rank_main)):
        assert torch.equal(out, alone[rank::2])


@pytest.mark.parametrize("shared_already", [False, True])
def test_ranks_with_the_same_tokens_share_them_out_and_all_get_the_whole(shared_already):
    """Two of four ranks along tp: 7 tokens are 4 and 3; with 1 row of padding they are even. Token 5 is not active."""
    drawn = draw(HIDDEN)
    active = torch.tensor([True] * 5 + [False] + [True])
    weights, ids = routed(drawn[1], True)
    out = on_one_rank(drawn, weights, ids.masked_fill(~active[:, None], -1))
    assert not out[5].any()

    def rank_main(context):
        tp = context.on(context.communicator.split(context.rank // 2, context.rank))
        padded = [torch.nn.functional.pad(t, (0, 0, 0, 1)) for t in (weights, ids)]
        routes = [t[4 * tp.rank : 4 * tp.rank + 4] for t in padded] if shared_already else [weights, ids]
        told = MoeMetadata(
            pad_size=1,
            tp_size=2,
            tp_rank=tp.rank,
            tp_group=tp,
            ep_size=4,
            ep_rank=context.rank,
            ep_group=context,
            moe_comm_type=MoECommType.MC2,
            x_active_mask=active,
        )
        held = slice(context.rank, context.rank + 1)
        return fused_moe(drawn[0], drawn[2][held], drawn[3][held], *routes, TOPK, False, told)

    for got in on_ranks(4, rank_main):
        assert torch.equal(got, out)
    assert torch.equal(
        fused_moe(drawn[0], drawn[2], drawn[3], weights, ids, TOPK, False, MoeMetadata()), on_one_rank(drawn, weights, ids)
    )


def test_layouts_of_weights_that_nothing_here_has_are_refused():
    drawn = draw(HIDDEN)
    weights, ids = routed(drawn[1], False)
    with pytest.raises(expar.Unsupported, match="chunked_moe_layout"):
        moe.fused_moe_all2all(drawn[0], drawn[2], drawn[3], weights, ids, False, 1, 0, None, None, object())
    with pytest.raises(expar.BadArgument, match=r"expert_ids_per_ep_rank is not arange\(4\) % 4"):
        moe.fused_moe_all2all(drawn[0], drawn[2], drawn[3], weights, ids, False, 1, 0, None, torch.tensor([1, 0, 2, 3]))
    with pytest.raises(expar.BadArgument, match=r"topk_weights is \[7, 2\], topk_ids \[7, 1\]"):
        moe.fused_moe_all2all(drawn[0], drawn[2], drawn[3], weights, ids[:, :1], False, 1, 0, None)
    with pytest.raises(expar.BadArgument, match=r"should be \[7, 3\]"):
        fused_moe(drawn[0], drawn[2], drawn[3], weights, ids, 3, False, MoeMetadata())


def test_what_one_rank_tells_fused_moe_wrongly_all_are_told_and_go_on():
    drawn = draw(HIDDEN)
    weights, ids = routed(drawn[1], False)

    def rank_main(context):
        tp = context.on(context.communicator.split(context.rank // 2, context.rank))

        def run(topk=TOPK, down=drawn[3], **changes):
            told = {
                "tp_size": 2,
                "tp_rank": tp.rank,
                "tp_group": tp,
                "ep_size": 4,
                "ep_rank": context.rank,
                "ep_group": context,
                "moe_comm_type": MoECommType.MC2,
            }
            held = slice(context.rank, context.rank + 1)
            return fused_moe(
                drawn[0], drawn[2][held], down[held], weights, ids, topk, False, MoeMetadata(**{**told, **changes})
            )

        def refused(match, error=expar.BadArgument, own=None, **changes):
            with pytest.raises(own if own and context.rank == 3 else error, match=match):
                run(**(changes if context.rank == 3 else {}))
            assert run().shape == (TOKENS, HIDDEN)

        refused(r"^rank 3: .*topk_ids is \[7, 2\], should be \[7, 3\]", topk=3)
        refused("^rank 3: .*ep_rank is 0, but this is rank 3 of 4", ep_rank=0)
        refused("^rank 3: .*tp_rank is 0, but this is rank 1 of 2", tp_rank=0)
        refused(r"^rank 3: .*down \[1, 16\]; should be \[T, H\] and \[L, H, F\]", down=drawn[3][..., 0])
        refused("size of tensor", expar.Internal, RuntimeError, x_active_mask=torch.ones(6, dtype=torch.bool))

    on_ranks(4, rank_main, timeout=5)
