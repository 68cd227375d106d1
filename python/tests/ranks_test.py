"""Ranks that torchrun, mpirun or torch.distributed started find each other; groups and meshes are theirs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap

import pytest

BIN = os.path.dirname(sys.executable)

PRELUDE = """
import os, sys, torch, torch.distributed as dist
import expar, expar.torch as ep
torch.set_num_threads(1)

def checked(context):
    "Every rank's tokens visit an expert of every rank and come back."
    p = context.size
    x = torch.arange(3.0 * p).view(p, 3) + 100 * context.rank
    ids = torch.arange(p)[:, None]
    sent = ep.dispatch(x, ids, context=context, experts=p)
    assert sent.rows.shape == (p, 3) and sent.counts.tolist() == [p]
    assert torch.equal(ep.combine(2 * sent.rows, sent), 2 * x)
    return context
"""


def run(command, program, **environment):
    """What ``command`` and the Python program print, and how they end."""
    done = subprocess.run(
        [*command, "-c", PRELUDE + textwrap.dedent(program)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout + done.stderr


def torchrun(ranks, program, **environment):
    return run([f"{BIN}/torchrun", "--standalone", f"--nproc-per-node={ranks}", "--no-python", sys.executable], program, **environment)


@pytest.fixture(scope="module")
def printed():
    """What four ranks of torchrun print, each of them its own line."""
    code, text = torchrun(
        4,
        """
        alone = checked(ep.context())
        assert (alone.size, alone.communicator.transport_name) == (4, "shm")
        dist.init_process_group("gloo")
        r = dist.get_rank()
        both = checked(ep.context())
        assert (both.rank, both.size, ep.communicator().rank) == (r, 4, r)
        print("all ranks", flush=True)

        odd = [dist.new_group([0, 2]), dist.new_group([1, 3])][r % 2]
        half = checked(ep.context(odd))
        assert (half.rank, half.size) == (r // 2, 2)
        print("groups", flush=True)

        mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
        row = checked(ep.context(mesh["ep"]))
        assert (row.rank, row.size) == (r % 2, 2)
        assert ep.communicator(mesh["ep"]) is ep.communicator(mesh["ep"])
        grid = ep.parallel(mesh)
        assert (grid.all.rank, grid.experts.rank, grid.replicas.rank) == (r, r % 2, r // 2) and grid.tensor is None
        checked(grid.experts)
        print("meshes", flush=True)

        def refused(call, why):
            try:
                call()
            except ValueError as error:
                assert why in str(error), error
            else:
                raise AssertionError(why)

        wrong = dist.init_device_mesh("cpu", (4,), mesh_dim_names=("experts",))
        refused(lambda: ep.parallel(wrong), "mesh_dim_names=('dp', 'ep')")
        wrong._device_type = "cuda"
        refused(lambda: ep.context(wrong), "init_device_mesh('cpu', ...)")
        dist.destroy_process_group()
        refused(lambda: ep.context(mesh), "torch.distributed.init_process_group('gloo')")
        print("mistakes", flush=True)
        os._exit(0)  # gloo's threads may abort an interpreter that ends while they let go of a tensor
        """,
    )
    assert code == 0, text
    return text


@pytest.mark.parametrize("what", ["all ranks", "groups", "meshes", "mistakes"])
def test_torchruns_ranks_find_each_other(printed, what):
    assert printed.count(what) == 4


@pytest.mark.parametrize("mpirun", ["mpirun.openmpi", "mpirun.mpich"])
def test_mpirun(mpirun):
    if shutil.which(mpirun) is None:
        # script/bootstrap installs both; whoever runs this file alone need not have them.
        pytest.skip(f"no {mpirun} on this machine")
    options = ["--allow-run-as-root", "--oversubscribe"] if "openmpi" in mpirun else []
    code, text = run(
        [mpirun, *options, "-n", "2", sys.executable],
        """
        context = checked(ep.context())
        assert context.size == 2
        print("fine", flush=True)
        """,
    )
    assert code == 0 and text.count("fine") == 2, text


def test_half_an_environment_is_refused():
    code, text = run([sys.executable], "ep.context()", RANK="1")
    assert code != 0 and "RANK is set but WORLD_SIZE is not" in text, text


def test_a_rank_that_does_not_come_is_named():
    code, text = torchrun(
        2,
        """
        import time
        dist.init_process_group("gloo")
        if dist.get_rank() == 1:
            time.sleep(4)
            sys.exit()
        try:
            ep.context(timeout=0.5)
        except TimeoutError as error:
            print("told", error.peer, error, flush=True)
        """,
    )
    assert "told 1" in text and "ranks [1] are late" in text, text


def test_a_killed_rank_is_named():
    code, text = torchrun(
        3,
        """
        import signal
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which torchrun sends when a rank has died
        try:
            context = ep.context()
            if context.rank == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            expar.barrier(context)
        except ConnectionError as error:
            print("told", error.peer, flush=True)
        """,
    )
    assert code != 0 and text.count("told 2") >= 1, text
