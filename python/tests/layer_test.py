"""The layer through the plain binding, on NumPy arrays."""

from __future__ import annotations

import copy
import gc

import numpy as np
import pytest
from ranks import on_ranks

import expar

EXPERTS, TOPK, HIDDEN, INNER, TOKENS = 4, 2, 16, 12, 9


def options(**changes):
    router = expar.RouterOptions(EXPERTS, TOPK, balance=0.5, z=0.25)
    return {"hidden": HIDDEN, "inner": INNER, "router": router, **changes}


def arrays(rank=0):
    """x and dout of one rank."""
    return np.random.default_rng(rank).standard_normal((2, TOKENS, HIDDEN)).astype(np.float32)


def values(layer):
    return {p.name: np.asarray(p.value) for p in layer.expert_parameters() + layer.dense_parameters()}


def eager(p, x):
    """The layer of one rank in NumPy: softmax over the chosen, SwiGLU."""
    logits = x @ p["router.weight"].T
    out = np.zeros_like(x)
    for t, row in enumerate(x):
        chosen = np.argsort(-logits[t], kind="stable")[:TOPK]
        weights = np.exp(logits[t, chosen] - logits[t, chosen].max())
        for e, weight in zip(chosen, weights / weights.sum()):
            gate, up = np.split(p["experts.up"][e] @ row, 2)
            out[t] += weight * (p["experts.down"][e] @ (gate / (1 + np.exp(-gate)) * up))
    return out


def test_a_layer_computes_what_numpy_computes():
    def body(context):
        layer = expar.MoeLayer(context, **options())
        layer.initialise(3, "layers.0")
        x, _ = arrays()
        out = np.empty_like(x)
        layer.forward(context, x, out)
        np.testing.assert_allclose(out, eager(values(layer), x), rtol=1e-4, atol=1e-5)
        assert list(layer.inference_record().plan.expert_totals) == list(
            np.bincount(np.asarray(layer.inference_record().routing.ids).ravel(), minlength=EXPERTS)
        )

    on_ranks(1, body)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_layer_on_arrays_of_the_caller_gives_the_bytes_of_one_with_its_own(ranks):
    def body(context):
        own = expar.MoeLayer(context, **options(shared_inner=8))
        own.initialise(3, "a")
        lent = expar.MoeLayer(context, **options(shared_inner=8, lent=True))
        memory = {
            p.name: np.zeros(p.shape, np.float32) for p in lent.expert_parameters() + lent.dense_parameters()
        }
        gradients = {name: np.zeros_like(memory[name]) for name in ("experts.up", "experts.down")}
        lent.lend(memory, gradients)
        lent.initialise(3, "a")
        results = []
        for layer in (own, lent):
            x, dout = arrays(context.rank)
            out, dx = np.empty_like(x), np.empty_like(x)
            record = expar.MoeRecord()
            layer.forward(context, x, out, record=record)
            del x
            gc.collect()  # the record keeps what backward reads
            layer.backward(context, record, dout, dx)
            results.append([out, dx, *map(np.array, layer.dense_shard_gradients()), record.losses.total])
            results[-1] += [np.array(p.gradient) for p in layer.expert_parameters()]
            assert record.losses.tokens == ranks * TOKENS
        for a, b in zip(*results):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(gradients["experts.up"], results[0][-2])

    on_ranks(ranks, body)


def test_losses_count_as_often_as_their_gradient_says():
    def body(context):
        layer = expar.MoeLayer(context, **options())
        layer.initialise(3, "a")
        x, dout = arrays()
        dout[:] = 0
        out, dx, record = np.empty_like(x), np.empty_like(x), expar.MoeRecord()
        layer.forward(context, x, out, record=record)
        results = []
        for factor in (1, 4, 1):
            layer.backward(context, record, dout, dx, loss_gradient=factor)
            results.append(dx.copy())
        np.testing.assert_array_equal(4 * results[0], results[1])
        np.testing.assert_array_equal(results[0], results[2])
        assert results[0].any()

    on_ranks(1, body)


def test_an_optimizer_steps_on_the_parameters_of_a_layer():
    def body(context):
        layer = expar.MoeLayer(context, **options())
        layer.initialise(3, "a")
        x, dout = arrays()
        out, dx, record = np.empty_like(x), np.empty_like(x), expar.MoeRecord()
        layer.forward(context, x, out, record=record)
        layer.backward(context, record, dout, dx)
        parameters = layer.expert_parameters("a")
        before = [np.array(p.value) for p in parameters]
        adamw = expar.AdamW()
        adamw.step(context, parameters, 0.125)
        assert adamw.steps == 1
        for p, was, (m, _) in zip(parameters, before, adamw.moments(parameters)):
            gradient = np.array(p.gradient)
            steps = (was - np.asarray(p.value))[gradient != 0]
            np.testing.assert_allclose(steps, 0.125 * np.sign(gradient[gradient != 0]), rtol=1e-2)
            assert np.asarray(m).any()

    on_ranks(1, body)


def test_a_router_decides_alone():
    def body(context):
        logits = np.random.default_rng(5).standard_normal((TOKENS, 6)).astype(np.float32)
        routing = expar.Routing()
        router = expar.RouterOptions(6, 2, score="sigmoid", selection_bias=True)
        bias = np.zeros(6, np.float32)
        expar.route(context, router, logits, routing, selection_bias=bias)
        np.testing.assert_array_equal(np.asarray(routing.ids), np.argsort(-logits, axis=1, kind="stable")[:, :2])
        counts = np.bincount(np.asarray(routing.ids).ravel(), minlength=6)
        capacity = expar.Capacity()
        expar.bound_rows(context, expar.CapacityOptions("drop_by_position", rows=2), 6, routing.ids, routing, capacity)
        assert capacity.chosen == list(counts)
        assert capacity.dropped == list(np.maximum(counts - 2, 0))
        expar.update_selection_bias(bias, list(counts), 0.5)
        np.testing.assert_array_equal(bias, 0.5 * np.sign(counts.mean() - counts).astype(np.float32))

    on_ranks(1, body)


def test_options_are_named_and_refused_by_name():
    router = expar.RouterOptions(8, 2, balance=0.01, choice="token_table")
    assert (router.experts, router.topk, router.choice, router.score) == (8, 2, "token_table", "softmax")
    assert copy.deepcopy(router).choice == "token_table"
    with pytest.raises(expar.BadArgument, match="choice is 'best', should be one of scores, logits, "):
        router.choice = "best"
    with pytest.raises(AttributeError):
        expar.RouterOptions(8, 2, ballance=0.01)
    with pytest.raises(expar.BadArgument, match="mixtral"):
        expar.router_preset("dense", 8, 2)
    assert {"mixtral", "deepseek_v3"} <= set(expar.router_presets())
    with pytest.raises(expar.BadArgument, match="activation is 'relu', should be one of swiglu, "):
        on_ranks(1, lambda context: expar.MoeLayer(context, **options(activation="relu")))
    with pytest.raises(expar.BadArgument, match="drop_by_position"):
        expar.CapacityOptions("drop")
