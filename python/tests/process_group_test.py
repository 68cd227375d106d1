"""Ranks that share nothing but a process group: results, deaths, late ranks, ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist

import expar
import expar.torch as ep
from expar.torch import ranks
from expar.torch.process_group import communicator_over

FORK = multiprocessing.get_context("fork")


def be_rank(rank, count, path, body, pipe):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/meeting", rank=rank, world_size=count)
    try:
        result = body(communicator_over(dist.group.WORLD, timeout=30))
    except Exception as error:
        result = error
    pipe.send(result)
    pipe.recv()  # until all have said how they ended


def on_processes(count, path, body):
    """What body(communicator) returns or raises on each of ``count`` processes; None of one that was killed."""
    ends = []
    for rank in range(count):
        mine, theirs = FORK.Pipe()
        process = FORK.Process(target=be_rank, args=(rank, count, path, body, theirs), daemon=True)
        process.start()
        theirs.close()
        ends.append((process, mine))
    results = []
    for process, pipe in ends:
        try:
            assert pipe.poll(60), "it hangs"
            results.append(pipe.recv())
        except (EOFError, ConnectionError):
            results.append(None)
    for (process, pipe), result in zip(ends, results):
        if result is not None:
            pipe.send("end")
        process.join(20)
        assert process.exitcode is not None, "it does not end"
    return results


def moe(communicator):
    """A few steps of tokens that visit experts, each of which multiplies by its number."""
    context = expar.Context(communicator, threads=1)
    outs = []
    for step in range(3):
        draw = np.random.default_rng(10 * step + context.rank)
        x = draw.standard_normal((5 + 3 * context.rank, 700)).astype(np.float32)
        ids = draw.integers(-1, 7, (len(x), 3)).astype(np.int32)
        weights = draw.random(ids.shape).astype(np.float32)
        plan = expar.make_plan(context, ids, 7)
        inbox = expar.dispatch(context, x, weights, plan, layout="expert_major")
        y = expar.make_outbox(context, inbox, width=700)
        packed, results = np.asarray(inbox.packed), np.asarray(y.rows)
        for local, rows in enumerate(plan.rows):
            begin = plan.offsets[local]
            results[begin : begin + rows] = (plan.local[0] + local + 1) * packed[begin : begin + rows]
        out = np.empty_like(x)
        expar.combine(context, plan, y, weights, out)
        outs.append(out.tobytes())
    return outs


@pytest.mark.parametrize("count", [1, 2, 3])
def test_results_are_the_bytes_of_ranks_that_are_threads(count, tmp_path):
    wanted = [None] * count
    expar.run_threads(count, lambda c: wanted.__setitem__(c.rank, moe(c)))
    assert on_processes(count, tmp_path, moe) == wanted


def test_ranks_of_several_hosts_are_joined_by_their_process_group(tmp_path):
    def body(_):
        ranks._host = lambda: f"host {dist.get_rank() // 2}"
        context = ep.context(timeout=30)
        x = torch.arange(9.0).view(3, 3) + 100 * context.rank
        sent = ep.dispatch(x, torch.arange(3)[:, None], context=context, experts=3)
        return context.communicator.transport_name, torch.equal(ep.combine(2 * sent.rows, sent), 2 * x)

    assert on_processes(3, tmp_path, body) == [("carried", True)] * 3


def expect_same_error(results, but=None):
    errors = [result for rank, result in enumerate(results) if rank != but]
    assert all(isinstance(error, expar.Error) for error in errors), errors
    assert len({str(error) for error in errors}) == 1, errors
    return errors[0]


def test_a_killed_rank_is_named_by_every_other_one(tmp_path):
    def body(communicator):
        context = expar.Context(communicator, threads=1)
        expar.barrier(context)
        if context.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        expar.barrier(context)

    error = expect_same_error(on_processes(3, tmp_path, body), but=1)
    assert isinstance(error, expar.PeerLost) and isinstance(error, ConnectionError)
    assert error.peer == 1 and "rank 1 died (" in str(error) and "by peer" in str(error)


def test_a_late_rank_is_named_by_all(tmp_path):
    def body(communicator):
        context = expar.Context(communicator.with_timeout(0.4), threads=1)
        expar.barrier(context)
        if context.rank == 2:
            time.sleep(1)
        expar.barrier(context)

    error = expect_same_error(on_processes(3, tmp_path, body))
    assert isinstance(error, expar.Timeout) and isinstance(error, TimeoutError)
    assert error.peer == 2 and "rank 2 is late" in str(error)


def test_a_failed_communicator_goes_without_waiting_for_a_rank_that_hangs(tmp_path):
    def body(communicator):
        context = expar.Context(communicator, threads=1)
        expar.barrier(context)
        context = context.with_timeout(0.3)
        if context.rank == 1:
            pids.put(os.getpid())
            os.kill(os.getpid(), signal.SIGSTOP)
        with pytest.raises(expar.Timeout, match="rank 1 is late"):
            expar.barrier(context)
        start = time.monotonic()
        del communicator, context
        waited = time.monotonic() - start
        os.kill(pids.get(), signal.SIGKILL)
        return waited

    pids = FORK.SimpleQueue()
    waited, killed = on_processes(2, tmp_path, body)
    assert waited < 2 and killed is None


def test_ctrl_c_ends_the_wait_of_every_rank(tmp_path):
    def body(communicator):
        context = expar.Context(communicator, threads=1)
        expar.barrier(context)
        if context.rank == 0:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
            with pytest.raises(KeyboardInterrupt):
                expar.barrier(context)
            return "interrupted"
        if context.rank == 1:
            time.sleep(0.5)
        expar.barrier(context)

    interrupted, *others = on_processes(3, tmp_path, body)
    assert interrupted == "interrupted"
    error = expect_same_error(others)
    assert error.rank == 0 and "was interrupted" in str(error)


def test_a_rank_that_leaves_is_missed_only_where_it_is_waited_for(tmp_path):
    def body(communicator):
        context = expar.Context(communicator, threads=1)
        group = communicator.split(0 if context.rank else 1)
        if context.rank == 0:
            return "left"
        del communicator
        for _ in range(20):
            expar.barrier(expar.Context(group, threads=1))
            time.sleep(0.005)
        expar.barrier(context)

    left, *others = on_processes(3, tmp_path, body)
    assert left == "left"
    error = expect_same_error(others)
    assert isinstance(error, expar.PeerLost) and "rank 0 has left" in str(error)


def test_several_communicators_of_a_group_live_beside_each_other_and_leave_no_thread(tmp_path):
    def ours():
        return [thread for thread in threading.enumerate() if thread.name.startswith("expar")]

    def body(first):
        second = communicator_over(dist.group.WORLD)
        assert first.timeout == 30 and second.timeout == expar.default_timeout() and len(ours()) == 8
        for communicator in (first, second, first):
            expar.barrier(expar.Context(communicator, threads=1))
        dist.barrier()
        del first, communicator
        expar.barrier(expar.Context(second, threads=1))
        del second
        for _ in range(10):
            expar.barrier(expar.Context(communicator_over(dist.group.WORLD), threads=1))
        deadline = time.monotonic() + 10
        while ours() and time.monotonic() < deadline:
            time.sleep(0.01)
        return len(ours())

    assert on_processes(3, tmp_path, body) == [0, 0, 0]


def test_processes_end_in_good_order_with_a_communicator_still_there(tmp_path):
    program = f"""
        import sys, time, torch, torch.distributed as dist, expar
        from expar.torch.process_group import communicator_over
        torch.set_num_threads(1)
        rank = int(sys.argv[1])
        dist.init_process_group("gloo", init_method="file://{tmp_path}/meeting", rank=rank, world_size=3)
        communicator = communicator_over(dist.group.WORLD, timeout=20)
        group = communicator.split(min(rank, 1))
        if rank > 0:
            time.sleep(0.5)  # the first one has gone
            expar.barrier(expar.Context(group, threads=1))
        if rank == 2:
            dist.destroy_process_group()
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    processes = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(3)
    ]
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (0, "", "")


def test_a_group_without_gloo_says_what_to_type():
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with pytest.raises(expar.Unsupported, match="has fake for tensors of the CPU.*new_group\\(backend='gloo'\\)"):
            communicator_over(dist.group.WORLD)
    finally:
        dist.destroy_process_group()
