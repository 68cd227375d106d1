"""The operators of expar.ascend that one rank computes alone, beside their formulas in PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import expar
import expar.ascend as npu

ops = torch.ops.expar_ascend
G = torch.Generator()


@pytest.fixture(autouse=True)
def same_numbers():
    G.manual_seed(3)


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=G).to(dtype)


def experts_of(tokens, topk, experts, dtype=torch.int32):
    return torch.stack([torch.randperm(experts, generator=G)[:topk] for _ in range(tokens)]).to(dtype)


def checked(call, *args, **kwargs):
    """What the operator returns, and that a fake one has its shapes and dtypes, gradients and graphs included."""
    name = call.__name__
    torch.library.opcheck(
        getattr(ops, name).default,
        args,
        kwargs,
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static", "test_autograd_registration"),
    )
    return call(*args, **kwargs)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_instances_are_chosen_by_rank_or_by_token(dtype):
    table = torch.tensor([[1, 0, 9, 9], [2, 3, 9, 0], [3, 4, 7, 1]], dtype=torch.int32)
    ids = torch.tensor([[0, 1], [1, 2], [2, 0]], dtype=dtype)
    by_rank = [checked(npu.npu_moe_eplb_update_expert, ids, table, rank, 8).tolist() for rank in (0, 7)]
    assert by_rank == [[[0, 3], [3, 4], [4, 0]], [[0, 9], [9, 1], [1, 0]]]
    by_token = npu.npu_moe_eplb_update_expert(ids.t().contiguous().t(), table, 0, 8, balance_mode=1)
    assert by_token.tolist() == [[0, 3], [9, 7], [1, 0]] and by_token.dtype == dtype


def test_slots_that_count_little_are_dropped():
    table = torch.tensor([[1, 5], [1, 6], [1, 7]], dtype=torch.int32)
    scales = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.8, 0.2]])
    ids, mask = checked(
        npu.npu_moe_update_expert,
        experts_of(3, 2, 3),
        table,
        expert_scales=scales,
        pruning_threshold=torch.tensor([0.0, 0.3]),
        active_mask=torch.tensor([True, True, False]),
        balance_mode=1,
    )
    assert mask.tolist() == [[True, False], [True, True], [False, False]] and ids.min() >= 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_softmax_gating(dtype):
    x, finished = normal(5, 8, dtype=dtype), torch.tensor([False, True, False, False, False])
    y, experts, rows = checked(npu.npu_moe_gating_top_k_softmax, x, finished, 3)
    want = x.float().softmax(-1).topk(3)
    torch.testing.assert_close(y, want.values.to(dtype))
    assert torch.equal(experts.long(), want.indices.masked_fill(finished[:, None], 8))
    assert torch.equal(rows.long(), torch.arange(15).view(3, 5).t())


def test_gating_with_groups_and_a_bias():
    x, bias = normal(6, 8), normal(8)
    y, experts, scores = checked(
        npu.npu_moe_gating_top_k,
        x,
        2,
        bias=bias,
        k_group=2,
        group_count=4,
        group_select_mode=1,
        norm_type=1,
        out_flag=True,
        routed_scaling_factor=2.5,
    )
    s = x.sigmoid()
    biased = (s + bias).view(6, 4, 2)
    best = biased.sum(-1).topk(2).indices
    masked = torch.full_like(biased, -torch.inf).scatter(1, best[..., None].expand(-1, -1, 2), 0) + biased
    chosen = masked.flatten(1).topk(2).indices
    assert torch.equal(experts.long(), chosen)
    weights = s.gather(1, chosen)
    torch.testing.assert_close(y, 2.5 * weights / weights.sum(1, keepdim=True))
    torch.testing.assert_close(scores, s)
    assert npu.npu_moe_gating_top_k(x, 2)[2].numel() == 0


def test_tokens_go_where_a_table_says():
    x, table = normal(3, 4), torch.tensor([[2, 0], [1, 3]])
    _, experts, _ = checked(npu.npu_moe_gating_top_k, x, 2, input_ids=torch.tensor([1, 0, 1]), tid2eid=table)
    assert [sorted(row) for row in experts.tolist()] == [[1, 3], [0, 2], [1, 3]]


@pytest.mark.parametrize(("kept", "left"), [(None, 12), (7, 7), (-2, 10), (99, 12)])
def test_rows_are_permuted_and_back(kept, left):
    tokens, ids = normal(6, 5).requires_grad_(), experts_of(6, 2, 4, torch.int64)
    rows, places = checked(npu.npu_moe_token_permute, tokens, ids, kept)
    order = ids.flatten().argsort(stable=True)
    assert torch.equal(rows, tokens[order // 2][:left]) and torch.equal(places.long(), order.argsort())

    probs = torch.rand(6, 2, generator=G).requires_grad_()
    out = checked(npu.npu_moe_token_unpermute, rows.detach().requires_grad_(), places, probs)
    kept_slots = (places < left).view(6, 2)
    torch.testing.assert_close(out, tokens * (probs * kept_slots).sum(1, keepdim=True))


def test_gradients_of_permuting_are_those_of_indexing():
    tokens, ids, probs = normal(6, 5), experts_of(6, 2, 4), torch.rand(6, 2, generator=G)
    dout = normal(6, 5)

    def gradients(through):
        x, p = tokens.clone().requires_grad_(), probs.clone().requires_grad_()
        through(x, p).backward(dout)
        return x.grad, p.grad

    def ours(x, p):
        rows, places = npu.npu_moe_token_permute(x, ids)
        return npu.npu_moe_token_unpermute(rows.square(), places, p)

    for got, want in zip(gradients(ours), gradients(lambda x, p: (x.square()[:, None] * p[..., None]).sum(1))):
        torch.testing.assert_close(got, want)
    dx = npu.npu_moe_token_permute_grad(tokens, normal(6, 5), ids[:, :1], torch.arange(6, dtype=torch.int32))
    assert dx.shape == tokens.shape


def test_rows_are_rerouted_from_ranks_to_experts():
    counts = torch.tensor([[2, 0, 1], [1, 3, 0]], dtype=torch.int32)
    tokens, scales = normal(7, 4, dtype=torch.bfloat16), normal(7)
    rows, moved, places, numbers = checked(npu.npu_moe_re_routing, tokens, counts, per_token_scales=scales)
    assert places.tolist() == [0, 1, 3, 4, 5, 6, 2] and numbers.tolist() == [3, 3, 1]
    assert torch.equal(rows, tokens[places]) and torch.equal(moved, scales[places])
    assert npu.npu_moe_re_routing(tokens, counts, expert_token_num_type=0)[3].tolist() == [3, 6, 7]


def test_tokens_are_rebuilt_with_skips_and_biases():
    n, k, e = 4, 2, 3
    rows, skip1, skip2, bias = normal(n * k, 5), normal(n, 5), normal(n, 5), normal(e, 5)
    scales, experts = torch.rand(n, k, generator=G), experts_of(n, k, e)
    row_of = torch.randperm(n * k, generator=G).int()
    out = checked(npu.npu_moe_finalize_routing, rows, skip1, skip2, bias, scales, row_of, experts)
    slots = row_of.view(k, n).t().long()
    want = skip1 + skip2 + (scales[..., None] * (rows[slots] + bias[experts.long()])).sum(1)
    torch.testing.assert_close(out, want)
    alone = npu.npu_moe_finalize_routing(rows, None, None, None, None, row_of, None)
    assert torch.equal(alone, rows[row_of.long()])


def test_experts_rows_are_counted():
    counts = checked(npu.npu_moe_compute_expert_tokens, torch.tensor([0, 0, 2, 2, 3], dtype=torch.int32), 5)
    assert counts.tolist() == [2, 2, 4, 5, 5] and counts.dtype == torch.int32


def test_rows_from_routes():
    x, ids = normal(4, 6), experts_of(4, 2, 5)
    row_idx = torch.arange(8, dtype=torch.int32).view(2, 4).t()
    rows, places, experts = checked(npu.npu_moe_init_routing, x, row_idx, ids, 3)
    order = ids.flatten().argsort(stable=True)
    assert torch.equal(rows, x[order // 2][:6]) and torch.equal(experts, ids.flatten()[order])
    assert torch.equal(places.view(2, 4).t().flatten().long(), order.argsort())


@pytest.mark.parametrize("mode", [-1, 0, 1, 2, 3])
@pytest.mark.parametrize("pad", [0, 1])
@pytest.mark.parametrize("counts", [None, 0, 1, 2])
def test_rows_from_routes_with_capacity_and_quantisation(mode, pad, counts):
    x, ids = normal(6, 64), experts_of(6, 2, 4)
    scale = {-1: torch.rand(6, generator=G), 0: torch.tensor([50.0]), 1: torch.rand(1, 64, generator=G)}.get(mode)
    told = dict(expert_num=4, quant_mode=mode, drop_pad_mode=pad, scale=scale, expert_capacity=3 if pad else -1)
    told["offset"] = torch.zeros(1) if mode == 0 else None
    told |= {} if counts is None else dict(expert_tokens_num_flag=True, expert_tokens_num_type=counts)
    rows, places, numbers, scales = checked(npu.npu_moe_init_routing_v2, x, ids, **told)

    per_expert = ids.flatten().bincount(minlength=4)
    pairs = torch.stack([torch.arange(4), per_expert], 1)
    want = {None: torch.empty(0), 0: per_expert.cumsum(0), 1: per_expert, 2: pairs}[counts]
    assert torch.equal(numbers, want.to(numbers.dtype))

    order = ids.flatten().argsort(stable=True)
    moved = places.long() >= 0
    flat = rows.flatten(0, -2).float()
    tokens = torch.arange(12)[moved] // 2
    if mode == -1:
        assert torch.equal(flat[places[moved].long()], x[tokens])
        assert torch.equal(scales[places[moved].long()], scale[tokens])
    if mode == 1:
        back = flat * scales[:, None]
        wanted = x * scale
        assert ((back[places[moved].long()] - wanted[tokens]).abs() <= wanted.abs().max() / 250).all()
    if not pad:
        assert torch.equal(places.long(), order.argsort())


def test_a_range_of_experts_has_rows():
    x, ids = normal(6, 8), experts_of(6, 2, 4)
    rows, places, counts, _ = checked(
        npu.npu_moe_init_routing_v2,
        x,
        ids,
        expert_num=4,
        active_expert_range=[1, 3],
        expert_tokens_num_flag=True,
        expert_tokens_num_type=1,
        active_num=5,
        row_idx_type=1,
    )
    assert counts.tolist() == [(ids == 1).sum(), (ids == 2).sum()] and rows.shape == (5, 8) and places.shape == (12,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [-1, 0, 1])
def test_swiglu_and_its_gradient(dtype, dim):
    x = normal(4, 6, 8, dtype=dtype).requires_grad_()
    got = checked(npu.npu_swiglu, x, dim)
    twin = x.detach().double().requires_grad_()
    a, b = twin.chunk(2, dim)
    want = F.silu(a) * b
    dout = normal(*got.shape, dtype=dtype)
    got.backward(dout)
    want.backward(dout.double())
    torch.testing.assert_close(got.double(), want, rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(x.grad.double(), twin.grad, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("interleaved", [True, False])
def test_the_clipped_activation(interleaved):
    x = 5 * normal(6, 8)
    out = checked(npu.npu_clipped_swiglu, x, group_index=torch.tensor([3, 2]), interleaved=interleaved)
    a, b = (x[:, ::2], x[:, 1::2]) if interleaved else x.chunk(2, 1)
    a, b = a.clamp(max=7), b.clamp(-7, 7)
    want = a * torch.sigmoid(1.702 * a) * (b + 1)
    torch.testing.assert_close(out[:5], want[:5])
    assert (out[5] == 0).all()


def test_quantised_activations():
    x, smooth = normal(6, 8), torch.rand(2, 4, generator=G)
    y, scale = checked(
        npu.npu_swiglu_quant, x, smooth_scales=smooth, group_index=torch.tensor([2, 6]), activate_left=True, quant_mode=1
    )
    a, b = x.chunk(2, 1)
    want = F.silu(a) * b * smooth[[0, 0, 1, 1, 1, 1]]
    assert ((y * scale[:, None] - want).abs() <= want.abs().amax(1, keepdim=True) / 250).all()
    static = npu.npu_swiglu_quant(x, smooth_scales=torch.full((4,), 20.0), offsets=torch.ones(4))
    assert torch.equal(static[0], (F.silu(b) * a * 20 + 1).round().clamp(-128, 127).to(torch.int8))
    assert static[1].numel() == 0

    sums = torch.randint(-500, 500, (6, 8), generator=G, dtype=torch.int32)
    columns, rows = torch.rand(8, generator=G) / 100, torch.rand(6, generator=G)
    y, scale = checked(
        npu.npu_dequant_swiglu_quant, sums, weight_scale=columns, activation_scale=rows, activate_left=True, quant_mode=1
    )
    a, b = (sums * columns * rows[:, None]).chunk(2, 1)
    want = F.silu(a) * b
    assert ((y * scale[:, None] - want).abs() <= want.abs().amax(1, keepdim=True) / 250).all()


def grouped(x, w, counts, bias=None):
    parts = [rows @ w[e] + (0 if bias is None else bias[e]) for e, rows in enumerate(x.split(counts))]
    return torch.cat(parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products_and_their_gradients(dtype):
    counts = [3, 0, 4]
    leaves = [normal(7, 8, dtype=dtype), normal(3, 8, 6, dtype=dtype), normal(3, 6, dtype=dtype)]
    ours = [t.clone().requires_grad_() for t in leaves]
    twin = [t.double().requires_grad_() for t in leaves]
    (y,) = npu.npu_grouped_matmul(
        [ours[0]], [ours[1]], bias=[ours[2]], group_list=torch.tensor(counts), group_type=0, group_list_type=1, split_item=2
    )
    want = grouped(twin[0], twin[1], counts, twin[2])
    dy = normal(7, 6, dtype=dtype)
    y.backward(dy)
    want.backward(dy.double())
    near = {"rtol": 2**-6, "atol": 2**-6} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(y.double(), want, **near)
    for got, wanted in zip(ours, twin):
        torch.testing.assert_close(got.grad.double(), wanted.grad, **near)

    (sums,) = npu.npu_grouped_matmul([leaves[0]], [leaves[1]], group_list=[3, 3, 7])
    torch.testing.assert_close(sums.double(), grouped(leaves[0].double(), leaves[1].double(), counts), **near)


def test_groups_of_what_is_summed_give_the_gradient_of_matrices():
    x, dy = normal(7, 8).requires_grad_(), normal(7, 6).requires_grad_()
    (dw,) = npu.npu_grouped_matmul([x.t()], [dy], group_list=torch.tensor([3, 3, 7]), group_type=2, split_item=3)
    twins = [t.detach().double().requires_grad_() for t in (x, dy)]
    want = torch.stack([twins[0][a:b].t() @ twins[1][a:b] for a, b in ((0, 3), (3, 3), (3, 7))])
    torch.testing.assert_close(dw.double(), want, rtol=1e-5, atol=1e-5)
    g = normal(3, 8, 6)
    dw.backward(g)
    want.backward(g.double())
    torch.testing.assert_close(x.grad.double(), twins[0].grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dy.grad.double(), twins[1].grad, rtol=1e-5, atol=1e-5)


def test_grouped_products_of_int8_are_exact():
    x, w = (torch.randint(-128, 128, shape, generator=G, dtype=torch.int8) for shape in ((5, 64), (2, 64, 3)))
    groups = torch.tensor([2, 5])
    (sums,) = npu.npu_grouped_matmul([x], [w], group_list=groups, group_type=0, output_dtype=torch.int32)
    assert torch.equal(sums, grouped(x.int(), w.int(), [2, 3]))
    scale, rows = torch.rand(2, 3, generator=G), torch.rand(5, generator=G)
    (y,) = npu.npu_grouped_matmul(
        [x], [w], scale=[scale], per_token_scale=[rows], group_list=groups, group_type=0, output_dtype=torch.bfloat16
    )
    want = sums * scale[[0, 0, 1, 1, 1]] * rows[:, None]
    torch.testing.assert_close(y.float(), want, rtol=2**-8, atol=1e-3)


def test_the_grouped_products_graph_has_its_shapes():
    x, w, groups = normal(7, 8).requires_grad_(), normal(3, 8, 6).requires_grad_(), torch.tensor([3, 3, 7])
    rows = x.detach()
    for args in (
        (x, w, None, None, None, groups, 0, 0, torch.bfloat16),
        (rows.t(), rows, None, None, None, groups, 2, 0, None),
    ):
        tests = "test_schema", "test_faketensor", "test_aot_dispatch_static"
        torch.library.opcheck(ops.grouped_matmul.default, args, test_utils=tests)


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda x: npu.npu_moe_token_permute(x, x.int(), None, True), "padded_mode is True, should be False"),
        (lambda x: npu.npu_moe_token_unpermute(x, x.int(), restore_shape=[1]), "restore_shape is \\[1\\]"),
        (lambda x: npu.npu_swiglu_quant(x, dst_type=torch.quint4x2), "dst_type is torch.quint4x2"),
        (lambda x: npu.npu_dequant_swiglu_quant(x, swiglu_mode=1), "swiglu_mode is 1, should be 0"),
        (lambda x: npu.npu_grouped_matmul([x, x], [x], group_list=[1], group_type=0), "x is a list of 2 tensors"),
        (lambda x: npu.npu_grouped_matmul([x], [x], group_list=torch.ones(1), group_type=-1), "group_type is -1"),
        (lambda x: npu.npu_grouped_matmul([x], [x], group_list=[1], act_type=1), "act_type is 1"),
        (lambda x: npu.npu_grouped_matmul([x], [x], group_list=[1], antiquant_scale=[x]), "antiquant_scale is"),
        (lambda x: npu.npu_grouped_matmul(x, x, group_list=[1]), "takes lists of one tensor"),
        (lambda x: npu.npu_swiglu(x, 5), "dim"),
        (lambda x: npu.npu_moe_eplb_update_expert(x[:, :2].int(), x.int(), 0, 1), "world_size is 1"),
    ],
)
def test_what_there_is_not_is_refused_by_name(call, why):
    with pytest.raises(expar.BadArgument, match=why):
        call(torch.ones(2, 4))


def test_an_operator_without_gradient_says_so():
    x = normal(2, 4).requires_grad_()
    with pytest.raises(RuntimeError, match="npu_moe_gating_top_k_softmax"):
        npu.npu_moe_gating_top_k_softmax(x)[0].sum().backward()
