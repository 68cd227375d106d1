"""Ranks that all have the same tokens: slices of the output against the formula, kernels in Python, joined slices."""

from __future__ import annotations

import numpy as np
import pytest
from ranks import on_ranks, part

import expar

EXPERTS, TOPK, HIDDEN, INNER, TOKENS = 5, 2, 11, 4, 9


def batch():
    draw = np.random.default_rng(8)
    x = draw.standard_normal((TOKENS, HIDDEN)).astype(np.float32)
    ids = draw.integers(-1, EXPERTS, (TOKENS, TOPK)).astype(np.int32)
    weights = draw.random((TOKENS, TOPK)).astype(np.float32)
    return x, ids, weights


def columns(array, context):
    begin, end = expar.part_of(HIDDEN, context.rank, context.size)
    return np.ascontiguousarray(array[..., begin:end])


def times_expert(context):
    """A kernel: expert e multiplies by e + 1."""
    first, count = expar.experts_of(context.rank, context.size, EXPERTS)

    def kernel(batch):
        rows, out = np.asarray(batch.rows), np.asarray(batch.out)
        begin = 0
        for e, end in enumerate(batch.group_list):
            out[begin:end] = (first + e + 1) * rows[begin:end]
            begin = end
        assert len(batch.group_list) == count and begin == len(rows)

    return kernel


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("partition", ["gathered", "sliced"])
@pytest.mark.parametrize("slices", [False, True])
def test_a_kernel_in_python_gives_each_rank_its_slice(ranks, partition, slices):
    x, ids, weights = batch()
    bias = np.arange(HIDDEN, dtype=np.float32)
    wanted = x * ((ids + 1) * weights).sum(axis=1, keepdims=True) + bias

    def body(context):
        moe = expar.HiddenMoe(
            context, hidden=HIDDEN, router=expar.RouterOptions(EXPERTS, TOPK), partition=partition, slices=slices
        )
        assert moe.width == (HIDDEN if partition == "gathered" else -(-HIDDEN // ranks))
        mine = columns(x, context)
        out = np.empty_like(mine)
        for _ in range(2):
            moe.forward(
                context,
                mine if slices else x,
                times_expert(context),
                out,
                ids=ids,
                weights=weights,
                bias=columns(bias, context),
            )
        return out

    out = np.concatenate(on_ranks(ranks, body), axis=1)
    np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-5)


def test_experts_of_the_library_give_the_formula_and_the_same_bytes_on_any_number_of_ranks():
    x, ids, weights = batch()
    draw = np.random.default_rng(9)
    up = draw.standard_normal((EXPERTS, 2 * INNER, HIDDEN)).astype(np.float32)
    down = draw.standard_normal((EXPERTS, HIDDEN, INNER)).astype(np.float32)
    logits = draw.standard_normal((TOKENS, EXPERTS)).astype(np.float32)

    def body(context):
        moe = expar.HiddenMoe(context, hidden=HIDDEN, router=expar.RouterOptions(EXPERTS, TOPK))
        held = expar.ExpertWeights(*(part(w, context.rank, context.size) for w in (up, down)))
        shape = expar.ExpertShape(HIDDEN, INNER)
        out, routed = (np.empty((TOKENS, columns(x, context).shape[1]), np.float32) for _ in range(2))
        moe.forward(context, x, shape, held, out, ids=ids, weights=weights)
        moe.forward(context, x, shape, held, routed, logits=logits)
        return out, routed, np.asarray(moe.routing.ids).copy()

    def joined(ranks):
        outs, routed, chosen = zip(*on_ranks(ranks, body))
        assert all((c == np.argsort(-logits, axis=1)[:, :TOPK]).all() for c in chosen)
        return np.concatenate(outs, axis=1), np.concatenate(routed, axis=1)

    wanted = np.zeros((TOKENS, HIDDEN))
    for t, k in np.argwhere(ids >= 0):
        e = ids[t, k]
        pre = up[e].astype(np.float64) @ x[t]
        h = pre[:INNER] / (1 + np.exp(-pre[:INNER])) * pre[INNER:]
        wanted[t] += weights[t, k] * (down[e] @ h)
    out, routed = joined(1)
    np.testing.assert_allclose(out, wanted, rtol=2e-5, atol=2e-5)
    for ranks in (2, 4):
        other, others = joined(ranks)
        assert other.tobytes() == out.tobytes() and others.tobytes() == routed.tobytes()


def test_joined_slices_are_the_rows_that_are_read_here():
    x, ids, _ = batch()

    def body(context):
        plan = expar.make_replicated_plan(context, ids, EXPERTS)
        whole = np.full_like(x, -1)
        expar.join_slices(context, plan, columns(x, context), whole)
        first, count = plan.local
        here = ((ids >= first) & (ids < first + count)).any(axis=1)
        assert (whole[here] == x[here]).all() and (whole[~here] == -1).all()

    on_ranks(3, body)


def test_what_one_rank_hands_in_wrong_every_rank_is_told_and_goes_on():
    x, ids, weights = batch()

    def body(context):
        plan = expar.make_replicated_plan(context, ids, EXPERTS)
        moe = expar.HiddenMoe(context, hidden=HIDDEN, router=expar.RouterOptions(EXPERTS, TOPK))
        out = np.empty_like(columns(x, context))
        given = np.asfortranarray(x) if context.rank == 1 else x
        with pytest.raises(expar.BadArgument, match="rank 1: .*x is strided") as caught:
            moe.forward(context, given, times_expert(context), out, ids=ids, weights=weights)
        assert caught.value.rank == 1
        with pytest.raises(expar.BadArgument, match="rank 1: .*x is strided"):
            expar.join_slices(context, plan, columns(x, context), np.asfortranarray(x) if context.rank == 1 else x.copy())
        kind = {"partition": "sideways" if context.rank == 1 else "sliced"}
        with pytest.raises(expar.BadArgument, match="rank 1: .*partition is 'sideways', should be one of gathered"):
            expar.HiddenMoe(context, hidden=HIDDEN, router=expar.RouterOptions(EXPERTS, TOPK), **kind)
        moe.forward(context, x, times_expert(context), out, ids=ids, weights=weights)

    on_ranks(3, body)


def test_an_exception_of_a_kernel_comes_out_as_it_was_raised():
    x, ids, weights = batch()
    told = []

    def kernel(batch):
        raise KeyError("mine")

    def body(context):
        moe = expar.HiddenMoe(context, hidden=HIDDEN, router=expar.RouterOptions(EXPERTS, TOPK))
        chosen = kernel if context.rank == 1 else times_expert(context)
        try:
            moe.forward(context, x, chosen, np.empty_like(columns(x, context)), ids=ids, weights=weights)
        except expar.Error as error:
            told.append((context.rank, error.rank, error.message))
            raise

    with pytest.raises(KeyError, match="mine"):
        on_ranks(2, body)
    assert told == [(0, 1, "KeyError: 'mine'")]


def test_a_kernel_that_keeps_an_array_of_its_batch_is_told():
    x, ids, weights = batch()
    kept = []

    def body(context):
        moe = expar.HiddenMoe(context, hidden=HIDDEN, router=expar.RouterOptions(EXPERTS, TOPK))
        moe.forward(context, x, lambda b: kept.append(np.asarray(b.rows)), np.empty_like(x), ids=ids, weights=weights)

    with pytest.raises(expar.BadArgument, match="has kept an array of its batch"):
        on_ranks(1, body)
