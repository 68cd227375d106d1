"""Zero, copy and constant experts against their formula in double, and the differences of it; random numbers by name."""

from __future__ import annotations

import numpy as np
import pytest
from ranks import on_ranks

import expar

TOKENS, TOPK, HIDDEN, FIRST = 9, 3, 8, 4
EXPERTS = {"zero": 1, "copy": 2, "constant": 2}


def arrays():
    draw = np.random.default_rng(4)
    values = {
        "x": draw.standard_normal((TOKENS, HIDDEN)),
        "weights": draw.random((TOKENS, TOPK)),
        "mix": draw.standard_normal((2, 2, HIDDEN)) / 2,
        "value": draw.standard_normal((2, HIDDEN)),
    }
    ids = draw.integers(-1, FIRST + 5, (TOKENS, TOPK)).astype(np.int32)
    dout = draw.standard_normal((TOKENS, HIDDEN)).astype(np.float32)
    return {name: value.astype(np.float32) for name, value in values.items()}, ids, dout


def formula(values, ids):
    v = {name: value.astype(np.float64) for name, value in values.items()}
    out = np.zeros((TOKENS, HIDDEN))
    for t, k in np.argwhere(ids > FIRST):  # the first one is zero
        x, which = v["x"][t], ids[t, k] - FIRST - 3
        y = x
        if which >= 0:
            share = 1 / (1 + np.exp((v["mix"][which, 1] - v["mix"][which, 0]) @ x))
            y = share * x + (1 - share) * v["value"][which]
        out[t] += v["weights"][t, k] * y
    return out


def special_pass(values, ids):
    v = values
    return expar.SpecialPass(expar.SpecialExperts(**EXPERTS), FIRST, v["x"], ids, v["weights"], v["mix"], v["value"])


def test_what_special_experts_give_is_added():
    values, ids, _ = arrays()

    def body(context):
        out = np.ones((TOKENS, HIDDEN), np.float32)
        expar.add_special(context, special_pass(values, ids), out)
        return out

    [out] = on_ranks(1, body)
    np.testing.assert_allclose(out, 1 + formula(values, ids), rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_differences():
    values, ids, dout = arrays()

    def body(context):
        gradients = {name: np.zeros_like(values[name]) for name in ("x", "weights")}
        shared = {name: np.empty((2, *values[name].shape), np.float32) for name in ("mix", "value")}
        expar.special_backward(
            context,
            special_pass(values, ids),
            dout,
            gradients["x"],
            gradients["weights"],
            shared["mix"],
            shared["value"],
            shards=[0, 4, TOKENS],
        )
        return {**gradients, **{name: value.sum(axis=0) for name, value in shared.items()}}

    [gradients] = on_ranks(1, body)
    draw = np.random.default_rng(6)
    for name, value in values.items():
        direction = draw.standard_normal(value.shape)

        def loss(step, name=name, value=value, direction=direction):
            return (dout * formula({**values, name: value + step * direction}, ids)).sum()

        wanted = (loss(1e-5) - loss(-1e-5)) / 2e-5
        np.testing.assert_allclose((gradients[name] * direction).sum(), wanted, rtol=1e-4, atol=1e-5, err_msg=name)


def test_an_id_that_is_no_expert_is_refused():
    values, ids, _ = arrays()
    ids[2, 1] = FIRST + 5

    def body(context):
        with pytest.raises(expar.BadArgument, match=r"ids\[2,1\] = 9 is no expert below 9"):
            expar.add_special(context, special_pass(values, ids), np.zeros((TOKENS, HIDDEN), np.float32))

    on_ranks(1, body)


def test_random_numbers_depend_on_seed_stream_and_index_alone():
    one, again = expar.Random(7, "layers.0.experts.5.up"), expar.Random(7, "layers.0.experts.5.up")
    assert [one.bits(i) for i in (3, 1, 2)] == [again.bits(i) for i in (3, 1, 2)]
    others = {expar.Random(8, "layers.0.experts.5.up").bits(1), expar.Random(7, "layers.0.experts.6.up").bits(1)}
    assert len(others | {one.bits(1), one.bits(2)}) == 4
    uniform = np.array([one.uniform(i) for i in range(4000)])
    normal = np.array([one.normal(i) for i in range(4000)])
    assert 0 <= uniform.min() and uniform.max() < 1
    # Six standard deviations of the means.
    assert abs(uniform.mean() - 0.5) < 6 / np.sqrt(12 * 4000) and abs(normal.mean()) < 6 / np.sqrt(4000)
    assert abs(normal.var() - 1) < 6 * np.sqrt(2 / 4000)
