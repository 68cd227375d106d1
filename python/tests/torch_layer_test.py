"""MoELayer computes what plain PyTorch computes, forward and backward, and the same bytes on any number of ranks."""

from __future__ import annotations

import pickle

import pytest
import torch
from ranks import on_ranks

import expar
from expar.torch import MoELayer
from moe_twin import twin

HIDDEN, INNER, TOKENS = 16, 12, 24

torch.set_num_threads(1)


def batch(seed=0, tokens=TOKENS, dtype=torch.float32):
    """x, dout and a residual of the global batch."""
    made = torch.randn(3, tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))
    return made.to(dtype).unbind(0)


def expect_near(what, got, wanted, tolerance):
    """Relative to the largest number, which is what rounding in a sum is relative to."""
    scale = wanted.abs().max().clamp(min=1e-3)
    worst = ((got.double() - wanted).abs().max() / scale).item()
    assert worst < tolerance, f"{what}: worst difference {worst:.2e} of the largest"


def check_against_twin(tolerance=2e-5, sequence=None, mask=None, forward=None, keeps=None, **options):
    """Outputs, losses and all gradients of one rank, of ``out . dout + 3 aux``."""

    def body(context):
        torch.manual_seed(1)
        layer = MoELayer(HIDDEN, INNER, context=context, **options)
        dtype = layer.dtype
        for name, p in layer.named_parameters():  # biases and gates are worth a test
            if name.endswith("bias"):
                torch.nn.init.normal_(p, std=0.5)
        if layer.selection_bias is not None:
            torch.nn.init.normal_(layer.selection_bias, std=0.05)
        x, dout, residual = batch(dtype=dtype)
        x = x.detach().requires_grad_()
        residual = residual.detach().requires_grad_()
        shape = (-1, sequence or TOKENS, HIDDEN)
        out = layer(x.reshape(shape), mask=mask, residual=residual.reshape(shape)).reshape(TOKENS, HIDDEN)
        aux = layer.aux_loss
        ((out * dout).sum() + 3 * aux).backward()

        p = {n: v.detach().double().requires_grad_() for n, v in layer.named_parameters()}
        x2, residual2 = (v.detach().double().requires_grad_() for v in (x, residual))
        more = {} if keeps is None else {"keeps": keeps(layer)}
        wanted, wanted_aux = twin(context, layer, p, x2, mask, residual2, sequence, **more)
        if mask is None:
            expect_near("aux", aux, wanted_aux, 1e-5)
        ((wanted * dout.double()).sum() + (3 * wanted_aux if mask is None else 0)).backward()
        expect_near("out", out, wanted, tolerance)
        expect_near("dx", x.grad, x2.grad, tolerance)
        expect_near("dresidual", residual.grad, residual2.grad, tolerance)
        for name, parameter in layer.named_parameters():
            wanted_gradient = p[name].grad if p[name].grad is not None else torch.zeros_like(p[name])
            expect_near(name, parameter.grad, wanted_gradient, tolerance)
        return layer

    return on_ranks(1, body)[0]


@pytest.mark.parametrize("preset", expar.router_presets())
def test_every_router_has_the_gradients_of_plain_pytorch(preset):
    experts = {"deepseek_v2": 160, "deepseek_v3": 256}.get(preset, 8)
    losses = {} if preset in ("sinkhorn", "expert_choice") else {"balance": 0.5, "sequence_balance": 0.25}
    weights_on = "input" if preset == "llama4" else "output"
    topk = 1 if preset == "llama4" else 4 if experts > 8 else 2
    check_against_twin(experts=experts, topk=topk, router=preset, weights_on=weights_on, sequence=8, z=0.125, **losses)


@pytest.mark.parametrize("activation", ["swiglu", "clamped_swiglu", "quick_geglu", "geglu", "gelu", "silu", "relu2"])
@pytest.mark.parametrize("bias", [False, True])
def test_every_kind_of_expert_has_the_gradients_of_plain_pytorch(activation, bias):
    check_against_twin(experts=6, topk=2, activation=activation, bias=bias)


@pytest.mark.parametrize("weights_on", ["output", "inner", "input"])
def test_weights_count_where_they_are_asked_to(weights_on):
    check_against_twin(experts=6, topk=2, bias=True, weights_on=weights_on)


@pytest.mark.parametrize("gate", [False, True])
def test_shared_and_special_experts_have_the_gradients_of_plain_pytorch(gate):
    check_against_twin(experts=9, topk=3, special=(1, 1, 2), shared_inner=10, shared_gate=gate)


def test_every_loss_has_the_gradient_of_plain_pytorch():
    losses = {"importance": 0.03, "importance_cv": 0.3, "load": 0.2, "load_deviation": 0.1}
    check_against_twin(experts=6, topk=2, balance=0.5, sequence_balance=0.25, z=0.125, sequence=6, **losses)


def test_padding_goes_nowhere():
    mask = torch.ones(TOKENS, dtype=torch.bool)
    mask[::5] = False
    layer = check_against_twin(experts=6, topk=2, mask=mask, shared_inner=10)
    assert layer.load.sum() == 2 * mask.sum()


def test_recomputed_experts_have_the_same_gradients():
    check_against_twin(experts=6, topk=2, recompute=True, shared_inner=10)


def test_bf16_experts_have_the_gradients_of_plain_pytorch_within_rounding():
    # Rows of 12 to 16 products of numbers with 8 bits, rounded at each of the steps in between.
    check_against_twin(tolerance=0.02, experts=6, topk=2, shared_inner=10, dtype=torch.bfloat16)


def test_rows_beyond_a_capacity_are_dropped_and_counted():
    def keeps(layer):
        # By position: an expert takes its first 5 rows in (token, slot) order.
        options = layer.router_options
        with torch.no_grad():
            ids = (batch()[0] @ layer.router.weight.T).topk(options.topk).indices
        taken, kept = [0] * options.experts, {}
        for t in range(TOKENS):
            for k, e in enumerate(ids[t].tolist()):
                taken[e] += 1
                kept[t, k] = taken[e] <= 5
        assert layer.dropped == sum(not v for v in kept.values()) > 0
        assert layer.load.tolist() == taken
        return lambda t, k, e: kept[t, k]

    check_against_twin(experts=6, topk=2, capacity=expar.CapacityOptions("drop_by_position", rows=5), keeps=keeps)


def test_rows_may_travel_in_fewer_bits():
    def body(context):
        torch.manual_seed(0)
        x, dout, _ = batch()
        results = []
        for payload in (None, "bf16"):
            layer = MoELayer(HIDDEN, INNER, 6, 2, context=context, payload=payload, gradient_payload=payload)
            rows = x.detach().requires_grad_()
            out = layer(rows)
            (out * dout).sum().backward()
            results.append((out.detach(), rows.grad))
        for got, wanted in zip(results[1], results[0]):
            assert not torch.equal(got, wanted)
            expect_near("in bf16", got, wanted.double(), 0.02)

    on_ranks(2, body)


def test_a_token_table_routes_by_token_id():
    def body(context):
        layer = MoELayer(
            HIDDEN, INNER, 6, 2, context=context, router=expar.RouterOptions(6, 2, choice="token_table", vocabulary=10)
        )
        tokens = torch.arange(TOKENS) % 10
        layer(batch()[0], tokens=tokens)
        ids = layer.token_table[tokens]
        assert torch.equal(layer.ids.sort(1).values, ids.sort(1).values)
        assert layer.load.tolist() == torch.bincount(ids.flatten(), minlength=6).tolist()

    on_ranks(1, body)


def bytes_of_a_step(ranks, experts=6, **options):
    """out, dx and the experts' gradients of the global batch, and the other gradients summed over ranks."""

    def body(context):
        layer = MoELayer(HIDDEN, INNER, experts, 2, context=context, balance=0.5, z=0.125, **options)
        x, dout, _ = (t.chunk(ranks)[context.rank] for t in batch(dtype=layer.dtype))
        x = x.detach().requires_grad_()
        out = layer(x)
        ((out * dout).sum() + layer.aux_loss / ranks).backward()
        with torch.no_grad():
            assert torch.equal(layer.eval()(x), out), "inference differs"
        return out.detach(), x.grad, layer

    outs, dxs, layers = zip(*on_ranks(ranks, body))
    experts = {n: torch.cat([l.get_parameter(n).grad for l in layers]) for n in ("experts.up", "experts.down")}
    dense = {
        n: sum(l.get_parameter(n).grad.double() for l in layers)
        for n, _ in layers[0].named_parameters()
        if not n.startswith("experts")
    }
    return {"out": torch.cat(outs), "dx": torch.cat(dxs), **experts}, dense, [l.aux_loss for l in layers]


@pytest.mark.parametrize("experts", [6, 3])  # 3: on 4 ranks one has none
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_the_same_bytes_on_any_number_of_ranks(dtype, experts):
    wanted, wanted_dense, wanted_aux = bytes_of_a_step(1, experts, shared_inner=10, dtype=dtype)
    for ranks in (2, 4):
        got, dense, aux = bytes_of_a_step(ranks, experts, shared_inner=10, dtype=dtype)
        for name in wanted:
            assert torch.equal(got[name], wanted[name]), f"{name} on {ranks} ranks"
        for name in wanted_dense:
            expect_near(name, dense[name], wanted_dense[name], 1e-5 if dtype == torch.float32 else 0.02)
        assert all(torch.allclose(a, wanted_aux[0], rtol=1e-6) for a in aux)


def test_the_sum_of_all_ranks_losses_counts_the_auxiliary_loss_once_per_rank():
    def gradients(ranks, factors):
        """Of the router, summed over ranks whose losses count aux so often."""

        def body(context):
            layer = MoELayer(HIDDEN, INNER, 6, 2, context=context, balance=0.5, z=0.125)
            layer(batch()[0].chunk(ranks)[context.rank])
            (factors[context.rank] * layer.aux_loss).backward()
            return layer.router.weight.grad

        return sum(on_ranks(ranks, body))

    for ranks in (1, 2, 4):
        expect_near("router.weight", gradients(ranks, [1.0] * ranks), ranks * gradients(1, [1.0]).double(), 1e-5)
    expect_near("router.weight", gradients(2, [3.0, 0.5]), 3.5 * gradients(1, [1.0]).double(), 1e-5)


def test_slices_of_experts_compute_what_whole_ones_do():
    x, dout, _ = batch()

    def step(layer, x, dout):
        x = x.detach().requires_grad_()
        out = layer(x)
        ((out * dout).sum() + layer.aux_loss / 2).backward()
        return out.detach(), x.grad, layer.experts.up.grad, layer.router.weight.grad

    def whole(context):
        layer = MoELayer(HIDDEN, INNER, 6, 2, context=context, balance=0.5, bias=True)
        return step(layer, x.chunk(2)[context.rank], dout.chunk(2)[context.rank])

    def sliced(context):
        parallel = expar.Parallel(context, [("ep", 2), ("tp", 2)])
        layer = MoELayer(HIDDEN, INNER, 6, 2, context=parallel, balance=0.5, bias=True)
        assert layer.experts.up.shape == (3, INNER, HIDDEN)
        with pytest.raises(expar.BadArgument, match="slices"):
            layer.for_inference()
        part = parallel.experts.rank
        return part, parallel.tensor.rank, step(layer, x.chunk(2)[part], dout.chunk(2)[part])

    wanted = on_ranks(2, whole)
    for part, slice, (out, dx, up, router) in on_ranks(4, sliced):
        expect_near("out", out, wanted[part][0].double(), 1e-5)
        expect_near("dx", dx, wanted[part][1].double(), 1e-5)
        expect_near("router", router, wanted[part][3].double(), 1e-5)
        half = INNER // 2
        mine = wanted[part][2].unflatten(1, (2, INNER))[:, :, slice * half : (slice + 1) * half].flatten(1, 2)
        expect_near("up", up, mine.double(), 1e-5)


def test_parameters_begin_as_those_of_the_library():
    for dtype in (torch.float32, torch.bfloat16):

        def body(context):
            options = {"bias": True, "shared_inner": 10, "dtype": dtype}
            layer = MoELayer(HIDDEN, INNER, 6, 2, context=context, seed=3, prefix="a", **options)
            own = expar.MoeLayer(context, **layer._options)
            own.initialise(3, "a")
            wanted = {p.name: torch.from_dlpack(p.value) for p in own.expert_parameters() + own.dense_parameters()}
            assert list(wanted) == layer._core.names
            assert set(wanted) == {n for n, _ in layer.named_parameters()}
            for name, p in layer.named_parameters():
                assert torch.equal(p.detach(), wanted[name].to(p.dtype)), name

        on_ranks(2, body)


def test_a_selection_bias_follows_the_loads_of_passes_that_went_backward():
    def body(context):
        layer = MoELayer(HIDDEN, INNER, 8, 2, context=context, router="deepseek_v3")
        x = batch()[0].chunk(2)[context.rank]
        counts = torch.zeros(8, dtype=torch.int64)
        for _ in range(2):
            layer(x).sum().backward()
            counts += layer.load
        with torch.no_grad():
            layer.eval()(x)  # does not count
        layer.update_selection_bias(0.25)
        mean = counts.double().mean()
        assert torch.equal(layer.selection_bias, 0.25 * torch.sign(mean - counts).float())
        before = layer.load
        layer(x)
        assert not torch.equal(before, layer.load), "the next pass reads the bias"
        assert torch.equal(layer.to(torch.bfloat16).selection_bias, 0.25 * torch.sign(mean - counts).float())

    on_ranks(2, body)


def test_what_one_rank_finds_wrong_reaches_all_and_leaves_the_layer_usable():
    def body(context):
        layer = MoELayer(HIDDEN, INNER, 6, 2, context=context)
        wrong = torch.full((3, HIDDEN), torch.nan) if context.rank == 1 else torch.zeros(3, HIDDEN)
        with pytest.raises(expar.BadArgument, match=r"rank 1: .*logits\[0,0\] is nan"):
            layer(wrong)
        layer(torch.zeros(3, HIDDEN))

    on_ranks(2, body)


def test_a_pass_goes_where_an_earlier_one_went():
    def body(context):
        layer = MoELayer(HIDDEN, INNER, 6, 2, context=context)
        x = batch()[0].chunk(2)[context.rank]
        out = layer(x)
        assert torch.equal(layer.ids, (x @ layer.router.weight.T).topk(2).indices)
        ids = layer.ids
        assert torch.equal(layer(x, ids=ids), out)
        with torch.no_grad():
            layer.router.weight.neg_()
        layer(x)
        assert not torch.equal(layer.ids, ids)
        layer(x, ids=ids)
        assert torch.equal(layer.ids, ids)
        times = layer.take_times()
        assert times.route > 0 and times.experts > 0
        assert layer.take_times().route == 0

    on_ranks(2, body)


def test_a_rank_may_have_no_tokens():
    def body(context):
        losses = {"balance": 0.5, "sequence_balance": 0.25, "z": 0.1}
        layer = MoELayer(HIDDEN, INNER, 6, 2, context=context, shared_inner=10, **losses)
        for counts in ([0, TOKENS], [0, 0]):
            x = batch()[0][: counts[context.rank]].clone().requires_grad_()
            (layer(x).sum() + layer.aux_loss).backward()
            assert x.grad.shape == x.shape
            assert layer.load.sum() == 2 * sum(counts)
            with torch.no_grad():
                assert layer.eval()(x).shape == x.shape
            layer.train()

    on_ranks(2, body)


def test_mistakes_are_named():
    def body(context):
        with pytest.raises(expar.BadArgument, match="dtype is torch.float16, should be"):
            MoELayer(HIDDEN, INNER, 6, 2, context=context, dtype=torch.float16)
        with pytest.raises(AttributeError):
            MoELayer(HIDDEN, INNER, 6, 2, context=context, ballance=1.0)
        layer = MoELayer(HIDDEN, INNER, 6, 2, context=context)
        with pytest.raises(expar.BadArgument, match=r"x is f32 \[3, 7\], should be f32 \[3, 16\]"):
            layer(torch.zeros(3, 7))
        with pytest.raises(TypeError, match="save its state_dict"):
            pickle.dumps(layer)
        with pytest.raises(expar.BadArgument, match="x is bf16 .* should be f32"):
            layer(torch.zeros(3, HIDDEN, dtype=torch.bfloat16))
        with pytest.raises(expar.BadArgument, match="no selection bias"):
            layer.update_selection_bias(0.1)
        jittery = MoELayer(HIDDEN, INNER, 6, 2, context=context, jitter=0.1).eval()
        with pytest.raises(expar.BadArgument, match="use no_grad"):
            jittery(batch()[0])
        with torch.no_grad():
            jittery(batch()[0])

    on_ranks(1, body)
