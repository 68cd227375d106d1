"""RMSNorm against its formula in double, alone and after a combine; its gradient against differences."""

from __future__ import annotations

import numpy as np
import pytest
from ranks import on_ranks

import expar

TOKENS, HIDDEN, EPSILON = 7, 19, 1e-5


def arrays():
    draw = np.random.default_rng(1)
    x, residual, dy = (draw.standard_normal((TOKENS, HIDDEN)).astype(np.float32) for _ in range(3))
    return x, draw.random(HIDDEN).astype(np.float32), residual, dy


def formula(x, gain):
    x, gain = x.astype(np.float64), gain.astype(np.float64)
    scale = 1 / np.sqrt((x * x).mean(axis=1) + EPSILON)
    return x * scale[:, None] * gain, scale


def test_rows_are_normed_by_the_formula():
    x, gain, _, _ = arrays()
    wanted, wanted_scale = formula(x, gain)

    def body(context):
        y, scale = np.empty_like(x), np.empty(TOKENS, np.float32)
        expar.rms_norm(context, x, expar.RmsNorm(gain, y, scale=scale, epsilon=EPSILON))
        in_place = x.copy()
        expar.rms_norm(context, in_place, expar.RmsNorm(gain, in_place, epsilon=EPSILON))
        assert in_place.tobytes() == y.tobytes()
        return y, scale

    [(y, scale)] = on_ranks(1, body)
    np.testing.assert_allclose(y, wanted, rtol=1e-6)
    np.testing.assert_allclose(scale, wanted_scale, rtol=1e-6)


def test_gradients_are_those_of_differences():
    x, gain, residual, dy = arrays()

    def body(context):
        scale = formula(x, gain)[1].astype(np.float32)
        dx, dgain, alone = np.empty_like(x), np.empty((2, HIDDEN), np.float32), np.empty((1, HIDDEN), np.float32)
        expar.rms_norm_backward(context, x, gain, scale, dy, residual, dx, dgain, shards=[0, 3, TOKENS])
        without = np.empty_like(x)
        expar.rms_norm_backward(context, x, gain, scale, dy, None, without, alone)
        np.testing.assert_allclose(dx, without + residual, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(dgain.sum(axis=0), alone[0], rtol=1e-5, atol=1e-6)
        return without, dgain

    [(dx, dgain)] = on_ranks(1, body)
    draw = np.random.default_rng(2)
    for _ in range(3):
        along_x, along_gain = draw.standard_normal(x.shape), draw.standard_normal(HIDDEN)

        def loss(step, rows=slice(None)):
            return (dy * formula(x + step * along_x, gain)[0])[rows].sum()

        np.testing.assert_allclose((dx * along_x).sum(), (loss(1e-5) - loss(-1e-5)) / 2e-5, rtol=1e-5, atol=1e-5)
        for shard, rows in enumerate((slice(0, 3), slice(3, TOKENS))):
            wanted = (dy[rows] * formula(x[rows], along_gain)[0]).sum()
            np.testing.assert_allclose((dgain[shard] * along_gain).sum(), wanted, rtol=1e-5, atol=1e-5)


def test_the_norm_of_a_combine_is_that_of_its_output():
    x, gain, residual, _ = arrays()
    ids = np.arange(TOKENS, dtype=np.int32)[:, None] % 3

    def body(context):
        plan = expar.make_plan(context, ids, 3)
        inbox = expar.dispatch(context, x, None, plan, layout="expert_major")
        y = expar.make_outbox(context, inbox, HIDDEN)
        np.asarray(y.rows)[:] = np.asarray(inbox.packed)
        out, normed, later = np.empty_like(x), np.empty_like(x), np.empty_like(x)
        norm = expar.RmsNorm(gain, normed, epsilon=EPSILON)
        expar.combine(context, plan, y, expar.unweighted, out, residual=residual, norm=norm)
        expar.rms_norm(context, out, expar.RmsNorm(gain, later, epsilon=EPSILON))
        assert later.tobytes() == normed.tobytes()
        np.testing.assert_allclose(normed, formula(x + residual, gain)[0], rtol=1e-5, atol=1e-6)

    on_ranks(2, body)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"gain": 3}, r"gain is f32 \[3\], should be f32 \[19\]"),
        ({"scale": 3}, r"scale is f32 \[3\], should be f32 \[7\]"),
        ({"dgain": (2, HIDDEN)}, "dgain is"),
        ({"dx": (TOKENS, 3)}, "dx is"),
        ({"shards": [0, 9]}, "shards should ascend from 0 to the 7 tokens"),
        ({"shards": []}, "shards should ascend"),
    ],
)
def test_shapes_that_disagree_are_refused_by_name(change, why):
    x, _, _, dy = arrays()
    gain, scale = (np.ones(change.get(name, n), np.float32) for name, n in (("gain", HIDDEN), ("scale", TOKENS)))
    dx, dgain = (np.ones(change.get(n, s), np.float32) for n, s in (("dx", x.shape), ("dgain", (1, HIDDEN))))

    def body(context):
        with pytest.raises(expar.BadArgument, match=why):
            expar.rms_norm_backward(context, x, gain, scale, dy, None, dx, dgain, shards=change.get("shards"))

    on_ranks(1, body)
