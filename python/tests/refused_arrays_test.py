"""What one rank cannot hand in to a collective call is an error of every rank, and the ranks go on."""

from __future__ import annotations

import numpy as np
import pytest
from ranks import on_ranks

import expar

TOKENS, HIDDEN, EXPERTS, TOPK = 6, 4, 4, 2


def rows(strided=False):
    whole = np.ones((TOKENS, 2 * HIDDEN), np.float32)
    return whole[:, ::2] if strided else whole[:, :HIDDEN].copy()


def chosen(strided=False):
    whole = np.arange(TOKENS * 2 * TOPK, dtype=np.int32).reshape(TOKENS, 2 * TOPK) % EXPERTS
    return whole[:, ::2] if strided else whole[:, ::2].copy()


def weights(strided=False):
    whole = np.ones((TOKENS, 2 * TOPK), np.float32)
    return whole[:, ::2] if strided else whole[:, ::2].copy()


def planned(context):
    return expar.make_plan(context, chosen(), EXPERTS)


def outbox(context, plan, width=HIDDEN):
    y = expar.make_outbox(context, plan, width=width)
    np.asarray(y.rows)[:] = 1
    return y


def fetch(context, wrong):
    plan = planned(context)
    out = np.empty((TOKENS, TOPK, 2), np.float32)[:, :, ::2] if wrong else np.empty((TOKENS, TOPK, 1), np.float32)
    expar.fetch_slots(context, plan, outbox(context, plan, 1), out)


def send(context, wrong, start=False):
    plan = planned(context)
    x = rows(wrong)
    if start:
        expar.start_dispatch(context, x, None, plan).finish()
    else:
        expar.dispatch(context, x, None, plan)


def fetch_sums(context, wrong, start=False):
    plan = planned(context)
    y, out = outbox(context, plan), rows()
    if start:
        expar.start_combine(context, plan, y, weights(wrong), out).finish()
    else:
        expar.combine(context, plan, y, weights(wrong), out)


def bound(context, wrong):
    options = expar.RouterOptions(experts=EXPERTS, topk=TOPK)
    routing = expar.Routing()
    expar.route(context, options, np.ones((TOKENS, EXPERTS), np.float32), routing)
    ids = np.asarray(routing.ids)
    ids = np.repeat(ids, 2, axis=1)[:, ::2] if wrong else ids.copy()
    capacity = expar.CapacityOptions(policy="drop_by_position", factor=2.0)
    expar.bound_rows(context, capacity, EXPERTS, ids, routing, expar.Capacity())


def balanced_route(context, wrong):
    options = expar.RouterOptions(experts=EXPERTS, topk=TOPK, choice="sinkhorn")
    logits = np.ones((TOKENS, 2 * EXPERTS), np.float32)
    expar.route(context, options, logits[:, ::2] if wrong else logits[:, ::2].copy(), expar.Routing())


def layer_forward(context, wrong):
    layer = expar.MoeLayer(context, hidden=HIDDEN, inner=3, router=expar.RouterOptions(experts=EXPERTS, topk=TOPK))
    layer.initialise(1, "layer")
    layer.forward(context, rows(wrong), rows())


def layer_backward(context, wrong):
    layer = expar.MoeLayer(context, hidden=HIDDEN, inner=3, router=expar.RouterOptions(experts=EXPERTS, topk=TOPK))
    layer.initialise(1, "layer")
    record = expar.MoeRecord()
    layer.forward(context, rows(), rows(), record=record)
    layer.backward(context, record, rows(wrong), rows())


CALLS = {
    "broadcast": lambda c, wrong: expar.broadcast(c, rows(wrong), 0),
    "all_gather": lambda c, wrong: expar.all_gather(c, rows(wrong), np.empty((c.size * TOKENS, HIDDEN), np.float32)),
    "all_reduce": lambda c, wrong: expar.all_reduce(c, rows(wrong), np.empty(HIDDEN, np.float32)),
    "reduce_scatter": lambda c, wrong: expar.reduce_scatter(
        c, rows(wrong), np.empty(np.subtract(*expar.part_of(HIDDEN, c.rank, c.size)[::-1]), np.float32)
    ),
    "all_to_all_v": lambda c, wrong: expar.all_to_all_v(c, rows(wrong), [3, 3], rows(), [3, 3]),
    "make_plan": lambda c, wrong: expar.make_plan(c, chosen(wrong), EXPERTS),
    "start_plan": lambda c, wrong: expar.start_plan(c, chosen(wrong), EXPERTS).finish(),
    "dispatch": send,
    "start_dispatch": lambda c, wrong: send(c, wrong, start=True),
    "combine": fetch_sums,
    "start_combine": lambda c, wrong: fetch_sums(c, wrong, start=True),
    "fetch_slots": fetch,
    "bound_rows": bound,
    "route": balanced_route,
    "forward": layer_forward,
    "backward": layer_backward,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_every_rank_hears_of_an_array_that_one_cannot_hand_in(call):
    def body(context):
        call(context, False)  # fits otherwise
        with pytest.raises(expar.BadArgument, match="strided") as raised:
            call(context, context.rank == 1)
        expar.barrier(context)
        return str(raised.value), raised.value.rank

    told = on_ranks(2, body, timeout=20.0)
    assert told[0] == told[1] and told[0][1] == 1
