"""Processes that Python starts: they join, their errors come back, Ctrl-C reaches them, none is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

import expar


def program(body):
    return [sys.executable, "-c", "import os, sys, expar\n" + textwrap.dedent(body)]


def test_launched_processes_are_ranks_of_one_job(tmp_path):
    expar.launch(3, program(f"open('{tmp_path}/' + str(expar.init().rank), 'w').write(str(expar.init().size))"))
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"0": "3", "1": "3", "2": "3"}


def test_the_root_cause_is_raised():
    with pytest.raises(expar.Internal, match="rank 1 exited with status 3"):
        expar.launch(2, program("sys.exit(3 if expar.job_from_environment().rank == 1 else 0)"))
    with pytest.raises(ConnectionError, match="rank 0"):
        expar.launch(1, program("os.kill(os.getpid(), 9)"))
    with pytest.raises(ValueError, match="0 ranks cannot be started"):
        expar.launch(0, ["true"])
    with pytest.raises(OSError, match="no-such-program"):
        expar.launch(1, ["/no-such-program"])


def test_an_uncaught_exception_comes_back_as_the_root_cause():
    with pytest.raises(expar.BadArgument, match="ids.* = 9") as caught:
        expar.launch(
            2,
            program(
                """
                import numpy as np
                context = expar.Context(expar.init())
                expar.make_plan(context, np.full((4, 2), 9 if context.rank == 1 else 0, np.int32), 8)
                """
            ),
        )
    assert caught.value.rank == 1
    with pytest.raises(expar.Internal, match="rank 0: ZeroDivisionError"):
        expar.launch(2, program("1 / expar.init().rank"))


def test_an_error_that_is_reported_comes_back_whole():
    with pytest.raises(expar.Internal, match="rank 1: KeyError: 'mine'") as caught:
        expar.launch(
            2,
            program(
                """
                communicator = expar.init()
                try:
                    if communicator.rank == 1:
                        raise KeyError("mine")
                except KeyError as error:
                    expar.report_error(error)
                    sys.exit(70)
                """
            ),
        )
    assert caught.value.rank == 1
    expar.report_error(ValueError("nobody has launched this process"))
    with pytest.raises(TypeError, match="exception"):
        expar.report_error("it broke")


INTERRUPTED = """
import os, sys, threading, time
import expar
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()  # which the system may give the signal to
try:
    expar.launch(2, [sys.executable, "-c", f"open('{sys.argv[1]}/' + str(__import__('os').getpid()), 'w'); "
                                            "__import__('time').sleep(60)"])
except KeyboardInterrupt:
    print("interrupted", flush=True)
time.sleep(0.1)
print("once", flush=True)
"""


def test_ctrl_c_goes_to_the_processes_and_none_is_left(tmp_path):
    launcher = subprocess.Popen([sys.executable, "-c", INTERRUPTED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    limit = time.monotonic() + 30
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < limit:
        time.sleep(0.02)
    os.kill(launcher.pid, signal.SIGINT)
    printed, _ = launcher.communicate(timeout=30)
    assert printed == "interrupted\nonce\n"
    pids = [int(file.name) for file in tmp_path.iterdir()]
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
