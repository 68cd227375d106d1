"""MoELayer as PyTorch uses modules: compiled, checked, checkpointed, saved, stepped, and turned into inference."""

from __future__ import annotations

import copy
import gc
import resource

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from ranks import on_ranks

import expar
from expar.torch import MoELayer
from expar.torch.memory import _Memory, recycled
from expar.torch.states import live_states

HIDDEN, INNER, TOKENS = 16, 12, 10

torch.set_num_threads(1)


def layer_of(context, **options):
    return MoELayer(HIDDEN, INNER, 4, 2, context=context, balance=0.5, z=0.125, **options)


def tokens(rank=0, dtype=torch.float32):
    made = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(rank)).to(dtype)
    return made.requires_grad_()


def gradients(layer, x, run=None):
    """Of the sum of squares and losses, after forgetting older ones."""
    layer.zero_grad()
    x.grad = None
    out = (layer if run is None else run)(x)
    ((out * out).sum() + layer.aux_loss).backward()
    return [out.detach(), x.grad] + [p.grad for p in layer.parameters()]


def expect_same(a, b):
    assert len(a) == len(b)
    assert all(torch.equal(s, t) for s, t in zip(a, b))


class Counting:
    """The library's layer, with its passes counted."""

    def __init__(self, native):
        self._native, self.forwards, self.backwards = native, 0, 0

    def __getattr__(self, name):
        return getattr(self._native, name)

    def forward(self, *arguments, **named):
        self.forwards += 1
        return self._native.forward(*arguments, **named)

    def backward(self, *arguments, **named):
        self.backwards += 1
        return self._native.backward(*arguments, **named)


def counted(layer):
    layer._core.native = Counting(layer._core.native)
    return layer._core.native


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16, "shared_inner": 8}])
def test_a_compiled_layer_is_one_graph_and_gives_the_same_bytes(backend, options):
    def body(context):
        layer = layer_of(context, **options)
        torch.compiler.reset()
        compiled = torch.compile(layer, fullgraph=True, backend=backend)
        for seed in range(2):
            x = tokens(seed, layer.dtype)
            expect_same(gradients(layer, x), gradients(layer, x, compiled))
        with torch.no_grad():
            assert torch.equal(compiled(x), layer(x))

    on_ranks(1, body)


def test_layers_are_compiled_together_and_one_by_one():
    def body(context):
        layers = torch.nn.Sequential(*(layer_of(context, seed=seed) for seed in range(3)))
        x = tokens()
        wanted = layers(x)
        torch.compiler.reset()
        assert torch.equal(torch.compile(layers, fullgraph=True, backend="aot_eager")(x), wanted)
        for layer in layers:
            layer.compile(fullgraph=True, backend="aot_eager")
        assert torch.equal(layers(x), wanted)

    on_ranks(1, body)


def test_torch_finds_nothing_wrong_with_the_operators():
    def body(context):
        layer = layer_of(context, shared_inner=8)
        parameters = [p.detach().clone().requires_grad_() for p, _ in layer._parameters_read()]
        nothing = [None] * 6
        for trains in (True, False):
            x = tokens() if trains else tokens().detach()
            given = parameters if trains else [p.detach() for p in parameters]
            arguments = (x, given, None, *nothing, layer._name, TOKENS, trains)
            torch.library.opcheck(torch.ops.expar.moe.default, arguments)
        out, aux, *_, handle = torch.ops.expar.moe(*arguments[:-1], True)
        again = (torch.randn_like(out), torch.ones_like(aux), handle, x, given)
        checks = ("test_schema", "test_faketensor")  # it has no gradient of its own
        torch.library.opcheck(torch.ops.expar.moe_backward.default, again, test_utils=checks)

    on_ranks(1, body)


def test_gradients_are_those_of_finite_differences():
    # A difference over 2 eps errs by rounding, 2^-24 / eps for a number about 1 and some ten times that for a sum of
    # many, and by the step itself, eps^2 times a third derivative of about 1: with eps = 2^-7 by 1e-4 and 6e-5.
    def body(context):
        layer = MoELayer(6, 4, 3, 2, context=context, balance=0.5, z=0.125, shared_inner=4)
        names = [name for name, _ in layer.named_parameters()]
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(2)) / 2
        with torch.no_grad():
            top = (x @ layer.router.weight.T).topk(3).values
        assert (top[:, 1] - top[:, 2]).min() > 0.04, "no step of eps changes a choice"

        def compute(x, *parameters):
            out = torch.func.functional_call(layer, dict(zip(names, parameters)), (x,))
            return out, layer.aux_loss

        inputs = (x.requires_grad_(), *(p.detach().clone().requires_grad_() for p in layer.parameters()))
        assert torch.autograd.gradcheck(compute, inputs, eps=2**-7, atol=1e-3, rtol=1e-3, fast_mode=False)

    with pytest.warns(UserWarning, match="double precision"):
        on_ranks(1, body)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_checkpoint_repeats_a_pass_and_gives_the_same_bytes(ranks):
    def body(context):
        # Threads share PyTorch's random numbers, which the jitter is drawn from.
        layer = layer_of(context, jitter=0.1 if ranks == 1 else 0.0)
        x = tokens(context.rank)
        torch.manual_seed(1)
        plain = gradients(layer, x)
        native = counted(layer)
        torch.manual_seed(1)
        again = gradients(layer, x, lambda x: checkpoint(layer, x, use_reentrant=False))
        expect_same(plain, again)
        assert (native.forwards, native.backwards) == (2, 1)

    on_ranks(ranks, body)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_selective_checkpoint_that_keeps_the_operator_repeats_no_communication(ranks):
    def policy(ctx, op, *arguments, **named):
        saved = op is torch.ops.expar.moe.default
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    def body(context):
        layer = layer_of(context)
        x = tokens(context.rank)
        plain = gradients(layer, x)
        native = counted(layer)

        def block(x):
            return layer(x * 1.0)

        again = gradients(
            layer,
            x,
            lambda x: checkpoint(
                block, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
            ),
        )
        expect_same(plain, again)
        assert (native.forwards, native.backwards) == (1, 1)

    on_ranks(ranks, body)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_changed_parameter_is_seen_by_the_next_pass(dtype):
    def body(context):
        layer = layer_of(context, dtype=dtype, shared_inner=8)
        x = tokens(context.rank, dtype)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
        saved = {n: v.clone() for n, v in layer.state_dict().items()}

        def evaluated():
            layer.eval()
            with torch.no_grad():
                out = layer(x)
            layer.train()
            assert torch.equal(out, layer(x).detach()), "training and inference differ"
            return out

        first = evaluated()
        changes = {
            "in place": lambda: layer.experts.up.detach().mul_(2),
            "through data": lambda: setattr(layer.experts.down, "data", 3 * layer.experts.down.data),
            "the router's": lambda: layer.router.weight.detach().neg_(),
            "the shared experts'": lambda: layer.shared.down.detach().neg_(),
            "by an optimizer": lambda: (gradients(layer, x), optimizer.step()),
        }
        seen = [first]
        for what, change in changes.items():
            change()
            out = evaluated()
            assert all(not torch.equal(out, old) for old in seen), what
            seen.append(out)
        layer.load_state_dict(saved)
        assert torch.equal(evaluated(), first), "load_state_dict"
        layer.load_state_dict({n: v if "_extra_state" in n else -v for n, v in saved.items()}, assign=True)
        assert not torch.equal(evaluated(), first), "load_state_dict(assign=True)"

    on_ranks(2, body)


def test_parameters_of_another_precision_are_read_in_that_of_the_layer():
    def body(context):
        layer = layer_of(context, dtype=torch.bfloat16)
        x = tokens(0, torch.bfloat16)
        wanted = gradients(layer, x)
        layer.float()  # masters, which hold the same numbers
        got = gradients(layer, x)
        expect_same(wanted[:2], got[:2])
        assert all(g.dtype == torch.float32 for g in got[2:])
        layer.bfloat16()  # the router too
        assert layer(x).dtype == torch.bfloat16
        assert all(g.dtype == torch.bfloat16 for g in gradients(layer, x))

    on_ranks(1, body)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{"shared_inner": 8, "shared_gate": True, "bias": True}, {"router": "deepseek_v3"}, {"special": (0, 0, 1)}],
)
def test_a_layer_for_inference_gives_the_same_bytes_and_holds_no_parameters(dtype, options):
    def body(context):
        layer = layer_of(context, dtype=dtype, **options)
        if layer.selection_bias is not None:
            layer.selection_bias += torch.tensor([0.5, -0.5, 0.25, 0])
        x = tokens(context.rank, dtype).detach()
        with torch.no_grad():
            wanted = layer.eval()(x)
        assert layer.for_inference() is layer
        assert torch.equal(layer(x), wanted)
        assert list(layer.parameters()) == []
        assert layer.aux_loss == 0
        with pytest.raises(expar.BadArgument, match="inference alone by for_inference"):
            layer.train()(x)

    on_ranks(2, body)


def test_a_state_dict_holds_this_ranks_experts():
    def body(context):
        layer = layer_of(context, router="deepseek_v3")
        state = layer.state_dict()
        assert sorted(state) == [
            "experts._extra_state", "experts.down", "experts.up", "router.weight", "selection_bias"
        ]
        assert state["experts.up"].shape == (2, 2 * INNER, HIDDEN)
        other = layer_of(context, router="deepseek_v3", seed=5)
        other.load_state_dict(state)
        x = tokens(context.rank)
        expect_same(gradients(layer, x), gradients(other, x))
        states[context.rank] = torch.nn.Sequential(layer).state_dict()
        expar.barrier(context)
        r = context.rank
        with pytest.raises(ValueError, match=f"holds part {1 - r} of 2 of the experts, .* this rank part {r} of 2"):
            torch.nn.Sequential(other).load_state_dict(states[1 - context.rank])

    states = {}
    on_ranks(2, body)


def test_a_copy_is_a_layer_of_its_own():
    def body(context):
        layer = layer_of(context, router="deepseek_v3")
        x = tokens(context.rank)
        wanted = gradients(layer, x)
        copied = copy.deepcopy(torch.nn.Sequential(layer))[0]
        expect_same(gradients(copied, x), wanted)
        with torch.no_grad():
            copied.experts.up.zero_()
        expect_same(gradients(layer, x), wanted)
        copied.load_state_dict(layer.state_dict())
        expect_same(gradients(copied, x), wanted)
        with pytest.raises(expar.BadArgument, match="copy it before"):
            copy.deepcopy(layer.for_inference())

    on_ranks(2, body)


def test_an_inference_pass_has_no_gradient_and_an_evaluation_with_gradients_has():
    def body(context):
        layer = layer_of(context).eval()
        x = tokens()
        before = live_states()
        with torch.no_grad():
            out = layer(x)
        assert not out.requires_grad
        assert live_states() == before
        layer(x).sum().backward()
        assert x.grad.abs().sum() > 0

    on_ranks(1, body)


def test_a_graph_that_is_retained_goes_backward_twice():
    def body(context):
        layer = layer_of(context, jitter=0.1)
        x = tokens(context.rank)
        out = layer(x)
        loss = (out * out).sum() + layer.aux_loss
        loss.backward(retain_graph=True)
        once = [t.grad.clone() for t in (x, *layer.parameters())]
        loss.backward()
        assert all(torch.equal(2 * a, t.grad) for a, t in zip(once, (x, *layer.parameters())))
        assert layer._core.counts == layer.load.tolist(), "its loads count once"

    on_ranks(2, body)


def test_two_passes_are_in_flight_at_once():
    def body(context):
        layer = layer_of(context)
        xs = [tokens(2 * i + context.rank) for i in range(2)]
        wanted = [gradients(layer, x)[:2] for x in xs]
        outs = []
        for x in xs:
            x.grad = None
            outs.append((layer(x), layer.aux_loss))
        for out, aux in outs:
            ((out * out).sum() + aux).backward()
        for x, (_, dx) in zip(xs, wanted):
            assert torch.equal(x.grad, dx)

    on_ranks(2, body)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_stay_as_they_are_when_another_layer_goes_backward(dtype):
    def body(context):
        first, second = (layer_of(context, seed=s, bias=True, activation="gelu", dtype=dtype) for s in (1, 2))
        held = gradients(first, tokens(0, dtype))
        before = [g.clone() for g in held]
        gradients(second, tokens(1, dtype))
        expect_same(held, before)

    on_ranks(1, body)


def test_memory_of_gradients_is_used_again_when_they_are_gone_and_not_before():
    first = recycled((40, 16), torch.bfloat16)
    second = recycled((40, 16), torch.bfloat16)
    places = {first.data_ptr(), second.data_ptr()}
    assert len(places) == 2
    row = second[3].fill_(1)
    del first, second
    third, fourth = recycled((16, 20), torch.float32), recycled((16, 20), torch.float32).zero_()
    assert third.data_ptr() in places and fourth.data_ptr() not in places
    assert bool((row == 1).all())


def test_memory_that_is_kept_is_never_more_than_was_in_use_at_one_time():
    memory = _Memory()

    def use(*sizes):
        blocks = [memory.take(size) for size in sizes]
        places = {block.data_ptr() for block in blocks}
        for block in blocks:
            memory.free(block)
        return places

    for size in range(1000, 1050):
        use(size)
        assert memory.kept() <= size
    first = use(1000, 500, 500)
    assert memory.kept() == 2000
    assert use(1000, 500, 500) == first
    use(1600)
    assert memory.kept() == 1600  # 400 would be left, and nothing is as small


def test_a_layer_that_was_made_without_memory_begins_as_any_other():
    def body(context):
        with torch.device("meta"):
            layer = layer_of(context, router="deepseek_v3")
        assert layer.experts.up.is_meta
        layer.to_empty(device="cpu").reset_parameters(0)
        x = tokens(context.rank)
        expect_same(gradients(layer, x), gradients(layer_of(context, router="deepseek_v3"), x))

    on_ranks(2, body)


def test_layers_that_are_gone_leave_nothing():
    def body(context):
        def cycles(count):
            for _ in range(count):
                gradients(layer_of(context, shared_inner=8), tokens(context.rank))
            gc.collect()
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        before = cycles(100)
        assert cycles(300) - before < 2048, "kilobytes"

    on_ranks(2, body)
    gc.collect()
    assert live_states() == 0


def test_a_thousand_steps_leak_nothing():
    def body(context):
        layer = layer_of(context, shared_inner=8)
        x = tokens(context.rank)

        def steps(count):
            for _ in range(count):
                gradients(layer, x)
            gc.collect()
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        steps(200)
        before = steps(1)
        assert steps(1000) - before < 4096, "kilobytes"
        layer.aux_loss = None

    on_ranks(2, body)
    gc.collect()
    assert live_states() == 0


def test_slices_shake_the_same_tokens_alike():
    def body(context):
        torch.manual_seed(context.rank)
        parallel = expar.Parallel(context, [("tp", 2)])
        layer = MoELayer(HIDDEN, INNER, 4, 2, context=parallel, jitter=0.5)
        layer(torch.randn(32, HIDDEN, generator=torch.Generator().manual_seed(1)))
        chosen[context.rank] = layer.ids

    chosen = {}
    on_ranks(2, body)
    assert torch.equal(chosen[0], chosen[1])
