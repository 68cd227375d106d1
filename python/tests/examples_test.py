"""The examples in Python run as their first lines say."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BIN = os.path.dirname(sys.executable)


@pytest.mark.parametrize(
    "launcher", [[], [os.environ["EXPAR"], "launch", "-n", "3", "--"]], ids=["alone", "expar_launch"]
)
def test_dispatch(launcher):
    done = subprocess.run(
        [*launcher, sys.executable, f"{ROOT}/examples/python/dispatch.py"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("rows for") == (3 if launcher else 1)
