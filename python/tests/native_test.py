"""The plain binding: ranks as threads, arrays of NumPy, errors, waits."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from ranks import on_ranks

import expar

EXPERTS, TOPK, HIDDEN, TOKENS = 5, 3, 8, 6


def tokens(rank, count=TOKENS):
    return np.random.default_rng(rank).standard_normal((count, HIDDEN)).astype(np.float32)


def routes(rank, count=TOKENS):
    return np.random.default_rng(100 + rank).integers(-1, EXPERTS, (count, TOPK)).astype(np.int32)


def moe(context, layout):
    """Expert e multiplies by e + 1."""
    x, ids = tokens(context.rank), routes(context.rank)
    weights = np.random.default_rng(200 + context.rank).random(ids.shape).astype(np.float32)
    plan = expar.make_plan(context, ids, EXPERTS)
    inbox = expar.dispatch(context, x, weights, plan, layout=layout)
    y = expar.make_outbox(context, inbox, width=HIDDEN)
    packed, results = np.asarray(inbox.packed), np.asarray(y.rows)
    first, _ = plan.local
    for local, rows in enumerate(plan.rows):
        begin = plan.offsets[local]
        results[begin : begin + rows] = (first + local + 1) * packed[begin : begin + rows]
    out = np.empty_like(x)
    expar.combine(context, plan, y, weights, out)
    return x, ids, weights, out


@pytest.mark.parametrize("ranks", [1, 2, 4, 7])
@pytest.mark.parametrize("mapping", [True, False])
def test_tokens_visit_their_experts_and_come_back(ranks, mapping):
    for x, ids, weights, out in on_ranks(ranks, lambda c: moe(c, "expert_major"), mapping=mapping):
        scale = (weights * (ids + 1)).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(out, x * scale, rtol=1e-5, atol=1e-6)


def test_split_phases_give_the_bytes_of_one_call():
    def both(context):
        x, ids = tokens(context.rank), routes(context.rank)
        pending = expar.start_plan(context, ids, EXPERTS)
        plan = pending.finish()
        rows = np.asarray(expar.dispatch(context, x, None, plan, layout="rank_major").packed).copy()
        later = expar.start_dispatch(context, x, None, plan, layout="rank_major")
        del x
        gc.collect()
        return rows, np.asarray(later.finish().packed).copy()

    for rows, later in on_ranks(3, both):
        assert rows.tobytes() == later.tobytes()


def test_memory_stays_while_a_view_of_it_is_held():
    def view(context):
        x = tokens(context.rank, 400)
        ids = np.zeros((400, 1), np.int32)
        plan = expar.make_plan(context, ids, 1)
        packed = np.asarray(expar.dispatch(context, x, None, plan, layout="expert_major").packed)
        gc.collect()
        again = expar.dispatch(context, 0 * x, None, plan, layout="expert_major")
        del again
        return x, packed.copy()

    results = on_ranks(2, view)
    assert (results[1][1] == np.concatenate([x for x, _ in results])).all()


def test_collectives_do_what_they_say():
    def all_of_them(context):
        r, p = context.rank, context.size
        gathered = np.empty((p, 2), np.int64)
        expar.all_gather(context, np.full((1, 2), r, np.int64), gathered)
        total = np.empty(3, np.float32)
        expar.all_reduce(context, np.full((2, 3), r, np.float32), total)
        told = np.full(4, r, np.int32)
        expar.broadcast(context, told, 1)
        begin, end = expar.part_of(7, r, p)
        part = np.empty(end - begin, np.float32)
        expar.reduce_scatter(context, np.ones((1, 7), np.float32), part)
        swapped = np.empty((p, 1), np.float32)
        expar.all_to_all_v(context, np.full((p, 1), r, np.float32), [1] * p, swapped, [1] * p)
        expar.barrier(context)
        return gathered[:, 0].tolist(), total.tolist(), told.tolist(), part.tolist(), swapped[:, 0].tolist()

    for gathered, total, told, part, swapped in on_ranks(3, all_of_them):
        assert gathered == swapped == [0, 1, 2]
        assert total == [6.0] * 3 and told == [1] * 4 and set(part) == {3.0}


def test_groups_and_meshes_are_communicators_of_their_own():
    def grid(context):
        mesh = expar.Mesh(context.communicator, [("dp", 2), ("ep", 2)])
        half = context.communicator.split(context.rank % 2)
        nobody = context.communicator.split(-1)
        parallel = expar.Parallel(context, [("ep", 2), ("tp", 2)])
        return mesh.coordinate("dp"), mesh.group("ep").rank, half.rank, nobody, parallel.tensor.size

    assert on_ranks(4, grid) == [(0, 0, 0, None, 2), (0, 1, 0, None, 2), (1, 0, 1, None, 2), (1, 1, 1, None, 2)]


def test_what_one_rank_does_wrong_every_rank_is_told_and_goes_on():
    def wrong_then_right(context):
        ids = routes(context.rank)
        if context.rank == 1:
            ids[2, 1] = 64
        with pytest.raises(ValueError, match=r"rank 1: plan: ids\[2,1\] = 64 is not below num_experts 5") as caught:
            expar.make_plan(context, ids, EXPERTS)
        assert isinstance(caught.value, expar.BadArgument) and caught.value.rank == 1
        return expar.make_plan(context, routes(context.rank), EXPERTS).experts

    assert on_ranks(3, wrong_then_right) == [EXPERTS] * 3


def test_ranks_that_disagree_are_told_so():
    with pytest.raises(expar.Mismatch, match="width|hidden|rank"):
        on_ranks(2, lambda c: expar.make_plan(c, routes(c.rank)[:, : c.rank + 1].copy(), EXPERTS))


def test_a_late_rank_is_named():
    def late(context):
        if context.rank == 1:
            time.sleep(1)
        expar.barrier(context)

    with pytest.raises(TimeoutError, match="rank 1 is late") as caught:
        on_ranks(2, late, timeout=0.2)
    assert isinstance(caught.value, expar.Timeout) and caught.value.peer == 1


def test_an_exception_of_a_ranks_own_comes_out_as_it_was_raised():
    def fails(context):
        if context.rank == 1:
            raise KeyError("mine")
        expar.barrier(context)

    with pytest.raises(KeyError, match="mine"):
        on_ranks(2, fails)


@pytest.mark.parametrize("kind", expar.errors.BY_CODE.values())
def test_errors_say_where_and_survive_pickling(kind):
    error = pickle.loads(pickle.dumps(kind("it broke", rank=3, peer=1, operation="dispatch")))
    assert str(error) == "rank 3: dispatch: it broke"
    assert (error.message, error.rank, error.peer, error.operation) == ("it broke", 3, 1, "dispatch")


@pytest.mark.parametrize(
    ("x", "why"),
    [
        (np.ones((TOKENS, 2 * HIDDEN), np.float32)[:, ::2], "x is strided"),
        (np.ones((HIDDEN, TOKENS), np.float32).T, "x is strided"),
        (np.ones((TOKENS, HIDDEN), np.float64), "64 bits"),
        (np.ones((1, 1, 1, TOKENS, HIDDEN), np.float32), "5 axes"),
        (np.ones((TOKENS, HIDDEN), np.int32), "neither f32 nor bf16"),
    ],
)
def test_arrays_that_cannot_be_taken_are_refused_by_name(x, why):
    def refused(context):
        plan = expar.make_plan(context, routes(context.rank), EXPERTS)
        with pytest.raises(ValueError, match=why):
            expar.dispatch(context, x, None, plan)
        with pytest.raises(TypeError):
            expar.dispatch(context, [[1.0] * HIDDEN] * TOKENS, None, plan)

    on_ranks(1, refused)


def test_a_read_only_array_is_read_and_not_written():
    x = tokens(0)
    x.flags.writeable = False

    def read(context):
        plan = expar.make_plan(context, routes(0), EXPERTS)
        inbox = expar.dispatch(context, x, None, plan, layout="expert_major")
        y = expar.make_outbox(context, inbox, HIDDEN)
        with pytest.raises((TypeError, ValueError)):
            expar.combine(context, plan, y, expar.unweighted, x)

    on_ranks(1, read)


def test_other_python_threads_run_while_a_rank_waits():
    ticks = []

    def waits(context):
        if context.rank == 1:
            for _ in range(20):
                ticks.append(time.monotonic())
                time.sleep(0.005)
        expar.barrier(context)

    on_ranks(2, waits)
    assert len(ticks) == 20 and ticks[-1] - ticks[0] < 2


INTERRUPTED = """
import os, signal, sys, threading, time
import expar

def body(communicator):
    context = expar.Context(communicator)
    if communicator.rank == 0:
        threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    elif sys.argv[1] == "threads":
        time.sleep(3)
    else:
        input()  # until rank 0 is gone
    expar.barrier(context)

began = time.monotonic()
try:
    if sys.argv[1] == "threads":
        expar.run_threads(2, body)
    else:
        body(expar.init())
except KeyboardInterrupt:
    print("interrupted after", time.monotonic() - began)
except expar.Error as error:
    print("told:", error)
"""


def test_ctrl_c_ends_threads_that_wait():
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, "threads"], capture_output=True, text=True, timeout=60)
    assert "interrupted after" in done.stdout, done.stdout + done.stderr


def test_ctrl_c_ends_a_process_that_waits_and_tells_the_others():
    environment = dict(os.environ, WORLD_SIZE="2", MASTER_PORT=str(20000 + os.getpid() % 20000))
    command = [sys.executable, "-c", INTERRUPTED, "processes"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen(command, env=dict(environment, RANK=str(r)), **pipes) for r in (0, 1)]
    first, second = (rank.communicate("\n", timeout=60)[0] for rank in ranks)
    assert "interrupted after" in first, first
    assert "told: rank 0: " in second and "interrupted" in second, second


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_thousand_lives_leak_nothing():
    def life():
        results = on_ranks(2, lambda c: moe(c, "expert_major")[3])
        assert results[0].shape == (TOKENS, HIDDEN)

    for _ in range(100):
        life()
    gc.collect()
    before, files, threads = resident(), len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(1000):
        life()
    gc.collect()
    assert resident() - before < 4 << 20
    assert len(os.listdir("/proc/self/fd")) <= files and threading.active_count() == threads


def test_stubs_and_docstrings_are_there():
    folder = os.path.dirname(os.path.realpath(expar._native.__file__))
    with open(os.path.join(folder, "_native.pyi")) as file:
        stubs = file.read()
    for name in dir(expar._native):
        thing = getattr(expar._native, name)
        if name.startswith("_") or thing is None:
            continue
        assert thing.__doc__, f"{name} says nothing"
        assert name in stubs
