"""The experts' networks on an inbox: against the formula in double, and its differences; bytes for every P."""

from __future__ import annotations

import numpy as np
import pytest
from ranks import on_ranks, part

import expar

EXPERTS, TOPK, HIDDEN, INNER, TOKENS = 5, 3, 12, 6, 11

SHAPES = [
    {},
    {"bias": True},
    {"activation": "silu", "bias": True, "weights_on": "inner"},
    {"weights_on": "input"},
    {"activation": "clamped_swiglu", "numbers": {"limit": 2.0}, "bias": True},
]


def gated(options):
    return options.get("activation", "swiglu") != "silu"


def batch(options):
    """Of the whole job: tokens, routes, weights of all experts, the gradient of the output."""
    draw = np.random.default_rng(3)
    wide = (2 if gated(options) else 1) * INNER
    values = {
        "x": draw.standard_normal((TOKENS, HIDDEN)),
        "weights": draw.random((TOKENS, TOPK)),
        "up": draw.standard_normal((EXPERTS, wide, HIDDEN)) / 2,
        "down": draw.standard_normal((EXPERTS, HIDDEN, INNER)) / 2,
    }
    if options.get("bias"):
        values["up_bias"] = draw.standard_normal((EXPERTS, wide))
        values["down_bias"] = draw.standard_normal((EXPERTS, HIDDEN))
    ids = draw.integers(-1, EXPERTS, (TOKENS, TOPK)).astype(np.int32)
    dout = draw.standard_normal((TOKENS, HIDDEN)).astype(np.float32)
    return {name: value.astype(np.float32) for name, value in values.items()}, ids, dout


def activated(pre, options):
    if not gated(options):
        return pre / (1 + np.exp(-pre))
    clamped = options.get("activation") == "clamped_swiglu"
    alpha, limit, offset = (1.702, options["numbers"]["limit"], 1) if clamped else (1, np.inf, 0)
    gate, up = np.minimum(pre[:INNER], limit), np.clip(pre[INNER:], -limit, limit)
    return gate / (1 + np.exp(-alpha * gate)) * (up + offset)


def layer(values, ids, options):
    """The formula, slot by slot, in double."""
    v = {name: value.astype(np.float64) for name, value in values.items()}
    out = np.zeros((TOKENS, HIDDEN))
    for t, k in np.argwhere(ids >= 0):
        e, w = ids[t, k], v["weights"][t, k]
        x = w * v["x"][t] if options.get("weights_on") == "input" else v["x"][t]
        pre = v["up"][e] @ x + (v["up_bias"][e] if "up_bias" in v else 0)
        y = v["down"][e] @ activated(pre, options) + (v["down_bias"][e] if "down_bias" in v else 0)
        out[t] += y if options.get("weights_on") == "input" else w * y
    return out


def step(context, options, wants_dx=True):
    """Output, and gradients of x, if it wants one, the weights and this rank's experts."""
    values, ids, dout = batch(options)
    r, p = context.rank, context.size
    x, weights, mine, dout = (part(a, r, p) for a in (values["x"], values["weights"], ids, dout))
    held = {name: part(values[name], r, p) for name in values if name not in ("x", "weights")}
    by_slot = weights if options.get("weights_on", "output") == "output" else expar.unweighted
    shape = expar.ExpertShape(HIDDEN, INNER, **options)
    experts = expar.ExpertWeights(**held)
    record = expar.ExpertsRecord()

    plan = expar.make_plan(context, mine, EXPERTS)
    inbox = expar.dispatch(context, x, weights, plan)
    y = expar.make_outbox(context, inbox, HIDDEN)
    expar.experts_forward(context, shape, experts, inbox, y, record)
    out = np.empty_like(x)
    expar.combine(context, plan, y, by_slot, out)

    returned = expar.dispatch(context, dout, None, plan, lists_of=inbox)
    gradients = {name: np.empty_like(value) for name, value in held.items()}
    dx_rows, dweight_rows = expar.make_outbox(context, inbox, HIDDEN), expar.make_outbox(context, inbox, 1)
    expar.experts_backward(
        context,
        shape,
        experts,
        inbox,
        returned,
        y,
        record,
        expar.ExpertGradients(**gradients),
        dx_rows if wants_dx else None,
        dweight_rows,
        expar.ExpertsScratch(),
    )
    dx, dweights = np.empty_like(x), np.empty((*weights.shape, 1), np.float32)
    if wants_dx:
        expar.combine(context, plan, dx_rows, expar.unweighted, dx)
    expar.fetch_slots(context, plan, dweight_rows, dweights)
    return out, {"x": dx, "weights": dweights[:, :, 0], **gradients}


@pytest.mark.parametrize("options", SHAPES)
def test_the_other_gradients_need_none_of_x(options):
    _, with_x = joined(on_ranks(2, lambda c: step(c, options)))
    _, without = joined(on_ranks(2, lambda c: step(c, options, wants_dx=False)))
    assert all(np.array_equal(with_x[name], without[name]) for name in with_x if name != "x")


def joined(results):
    outs, gradients = zip(*results)
    return np.concatenate(outs), {name: np.concatenate([g[name] for g in gradients]) for name in gradients[0]}


@pytest.mark.parametrize("options", SHAPES)
def test_outputs_are_those_of_the_formula_and_gradients_those_of_its_differences(options):
    values, ids, dout = batch(options)
    out, gradients = joined(on_ranks(2, lambda c: step(c, options)))
    np.testing.assert_allclose(out, layer(values, ids, options), rtol=2e-5, atol=2e-5)
    draw = np.random.default_rng(5)
    for name, value in values.items():
        for _ in range(3):
            direction = draw.standard_normal(value.shape)

            def loss(step, name=name, value=value, direction=direction):
                return (dout * layer({**values, name: value + step * direction}, ids, options)).sum()

            wanted = (loss(1e-5) - loss(-1e-5)) / 2e-5
            np.testing.assert_allclose((gradients[name] * direction).sum(), wanted, rtol=1e-4, atol=1e-4, err_msg=name)


def test_any_number_of_ranks_gives_the_same_bytes():
    options = SHAPES[1]
    out, gradients = joined(on_ranks(1, lambda c: step(c, options)))
    for ranks in (2, 4):
        other, others = joined(on_ranks(ranks, lambda c: step(c, options)))
        assert other.tobytes() == out.tobytes()
        assert all(others[name].tobytes() == gradients[name].tobytes() for name in gradients)


def refused(change, why):
    """A forward pass where ``change`` has spoilt one thing raises a sentence that says so."""
    values, ids, _ = batch({})

    def body(context):
        plan = expar.make_plan(context, ids, EXPERTS, alignment=change.get("alignment", 1))
        inbox = expar.dispatch(context, values["x"], None, plan)
        y = expar.make_outbox(context, inbox, change.get("width", HIDDEN))
        up, down = (change.get(name, values[name]) for name in ("up", "down"))
        shape = expar.ExpertShape(HIDDEN, INNER, bias=change.get("bias", False))
        with pytest.raises(expar.BadArgument, match=why):
            expar.experts_forward(context, shape, expar.ExpertWeights(up, down), inbox, y, expar.ExpertsRecord())

    on_ranks(1, body)


def test_what_disagrees_with_the_shape_is_refused_by_name():
    up = batch({})[0]["up"]
    refused({"up": up[:4].copy()}, r"up is f32 \[4, 12, 12\], should be f32 \[5, 12, 12\]")
    refused({"down": up}, r"down is f32 \[5, 12, 12\], should be f32 \[5, 12, 6\]")
    refused({"up": up.astype(np.float16)}, "up is f16")
    refused({"bias": True}, "up_bias")
    refused({"width": 5}, "y is")
    refused({"alignment": 4}, "alignment 1")
    with pytest.raises(ValueError, match="inner is 0, must be at least 1"):
        expar.ExpertShape(4, 0)
    with pytest.raises(ValueError, match="activation is 'swigloo', should be one of swiglu"):
        expar.ExpertShape(4, 4, activation="swigloo")
