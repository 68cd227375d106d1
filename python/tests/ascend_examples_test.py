"""The examples of expar.ascend, on as many ranks as ASCEND_RANKS says: 4, or the pages' own 16 under script/test --all."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

EXAMPLES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "examples", "python")
RANKS = int(os.environ.get("ASCEND_RANKS", "4"))


@pytest.mark.parametrize(
    "arguments", [["ascend_distribute.py"], ["ascend_eplb.py"], ["ascend_eplb.py", "--compile"]], ids=" ".join
)
def test_every_rank_gets_its_tokens_back(arguments):
    program, *options = arguments
    fewer = ["--ranks", str(RANKS), "--k", "2"] if RANKS < 16 else []
    command = [sys.executable, os.path.join(EXAMPLES, program), *fewer, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    first, last = done.stdout.splitlines()
    assert len(first.split()) == 6 + RANKS if "rows" in first else f"{RANKS} ranks" in first
    assert last.startswith("the worst error is")
