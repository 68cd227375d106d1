"""The examples in Python run as their first lines say."""

from __future__ import annotations

import json
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


def test_dlinfer_guide():
    program = f"{ROOT}/examples/python/dlinfer_guide.py"
    command = [f"{BIN}/torchrun", "--standalone", "--nproc-per-node=4", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    names = ["slices, EP=4", "whole rows, EP=4", "slices, TP=2 x EP=2"]
    assert [line.split(": ")[0] for line in done.stdout.splitlines()] == names


def losses(tmp_path, ranks, *arguments):
    """Of each step of examples/python/train_text.py."""
    file = tmp_path / "losses.json"
    program = [f"{ROOT}/examples/python/train_text.py", "--text", f"{ROOT}/data/kjv.txt", "--losses", str(file)]
    command = [f"{BIN}/torchrun", "--standalone", f"--nproc-per-node={ranks}", *program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(file.read_text())


def test_a_model_learns_like_its_eager_twin_and_goes_on_from_its_checkpoint(tmp_path):
    """200 steps on 4 ranks; the twin has experts of plain PyTorch. The first 80 steps
    again without DDP, from step 40 on with FSDP on 2 ranks."""
    whole = losses(tmp_path, 4, "--steps", 200)
    assert len(whole) == 200 and whole[0] > 5.4 and whole[-1] < 2.5
    eager = losses(tmp_path, 4, "--steps", 200, "--layer", "eager")
    # Sums in other orders; a rounding that changes a choice of experts changes more.
    assert max(abs(a - b) for a, b in zip(whole, eager)) < 1e-3

    saved = tmp_path / "saved"
    start = losses(tmp_path, 4, "--steps", 40, "--wrap", "none", "--save", saved)
    resumed = losses(tmp_path, 2, "--steps", 80, "--wrap", "fsdp", "--resume", saved)
    assert len(resumed) == 40
    assert max(abs(a - b) for a, b in zip(whole, start + resumed)) < 1e-4


def logged(tmp_path, launcher, *arguments):
    """What each step of examples/python/finetune_transformers.py has logged."""
    file = tmp_path / "log.json"
    program = [f"{ROOT}/examples/python/finetune_transformers.py", "--text", f"{ROOT}/data/kjv.txt"]
    done = subprocess.run([*launcher, *program, "--losses", str(file), *map(str, arguments)], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(file.read_text())


def test_a_hugging_face_model_learns_as_in_one_process_and_goes_on_from_its_checkpoint(tmp_path):
    """On 2 ranks with expert parallelism."""
    torchrun = [f"{BIN}/torchrun", "--standalone", "--nproc-per-node", "2"]
    eager = logged(tmp_path, [sys.executable], "--output", tmp_path / "eager", "--eager", "--steps", 20)
    run = ["--output", tmp_path / "run", "--save-steps", 10, "--steps"]
    half = logged(tmp_path, torchrun, *run, 10)
    whole = logged(tmp_path, torchrun, *run, 20, "--resume")
    assert eager[0]["loss"] > 5.4 and eager[-1]["loss"] < 3.3
    assert [entry["step"] for entry in whole] == list(range(1, 21)) and whole[:10] == half
    # Sums in other orders; a gradient of another size would show in the norms at once and in the losses soon.
    for found, wanted in zip(whole, eager):
        assert abs(found["loss"] - wanted["loss"]) < 1e-4
        assert abs(found["grad_norm"] - wanted["grad_norm"]) < 1e-3
    assert min(entry["grad_norm"] for entry in eager) > 0.5  # every step was clipped
