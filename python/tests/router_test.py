"""Losses of the router and its gradient, against the formula in double and its differences; small names."""

from __future__ import annotations

import numpy as np
import pytest
from ranks import on_ranks, part

import expar

EXPERTS, TOPK, TOKENS, BALANCE, Z = 6, 2, 10, 0.3, 0.1


def arrays():
    draw = np.random.default_rng(11)
    logits = 2 * draw.standard_normal((TOKENS, EXPERTS)).astype(np.float32)
    return logits, draw.standard_normal((TOKENS, TOPK)).astype(np.float32)


def formula(logits, ids):
    """Weights [T, K] and the sum of the losses, of the whole batch."""
    z = logits.astype(np.float64)
    logsumexp = np.log(np.exp(z).sum(axis=1))
    p = np.exp(z - logsumexp[:, None])
    chosen = np.take_along_axis(p, ids, axis=1)
    fraction = np.bincount(ids.ravel(), minlength=EXPERTS) / ids.size
    balance = BALANCE * EXPERTS * (fraction * p.mean(axis=0)).sum()
    return chosen / chosen.sum(axis=1, keepdims=True), balance + Z * (logsumexp**2).mean()


def test_losses_and_gradients_are_those_of_the_formula():
    logits, dweights = arrays()
    options = expar.RouterOptions(EXPERTS, TOPK, balance=BALANCE, z=Z)

    def body(context):
        mine, dmine = (part(a, context.rank, context.size) for a in (logits, dweights))
        routing = expar.Routing()
        expar.route(context, options, mine, routing)
        ids = np.asarray(routing.ids).copy()
        plan = expar.make_plan(context, ids, EXPERTS)
        losses = expar.router_losses(context, options, routing, list(plan.expert_totals))
        dlogits = np.empty_like(mine)
        expar.route_backward(context, options, routing, losses, dmine, dlogits)
        return ids, np.asarray(routing.weights).copy(), losses.total, dlogits

    ids, weights, totals, dlogits = zip(*on_ranks(2, body))
    ids, weights, dlogits = (np.concatenate(a) for a in (ids, weights, dlogits))
    wanted_weights, wanted_total = formula(logits, ids)
    np.testing.assert_allclose(weights, wanted_weights, rtol=1e-5)
    np.testing.assert_allclose(totals, wanted_total, rtol=1e-5)
    assert totals[0] == totals[1]
    draw = np.random.default_rng(12)
    for _ in range(3):
        direction = draw.standard_normal(logits.shape)

        def loss(step):
            weights, total = formula(logits + step * direction, ids)
            return (weights * dweights).sum() + total

        wanted = (loss(1e-5) - loss(-1e-5)) / 2e-5
        np.testing.assert_allclose((dlogits * direction).sum(), wanted, rtol=1e-4, atol=1e-5)


def test_small_names_say_what_the_library_says():
    assert expar.size_of("bf16") == 2 and expar.size_of("int64") == 8
    with pytest.raises(ValueError, match="f64.*f32, bf16"):
        expar.size_of("f64")
    assert expar.parse_mesh("dp=2,ep=4") == [("dp", 2), ("ep", 4)]
    assert expar.is_collective("sinkhorn") and not expar.is_collective("scores")
    assert expar.exit_code("timeout") == 4 and expar.exit_code(expar.Mismatch.code) == 3
    assert set(expar.available_transports()) <= set(expar.known_transports())
    assert expar.has_processes("shm") and not expar.has_processes("threads")
    with pytest.raises(ValueError, match="policy"):
        expar.CapacityOptions(rows=4).validate()
