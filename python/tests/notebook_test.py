"""expar.tutorial against the notebook itself, whose code is read from the folder EXPAR_SEEDS where that is set."""

from __future__ import annotations

import contextlib
import io
import os
import pathlib
import re
import sys
import types

import pytest
import torch
import torch.distributed as dist
from processes import on_processes
from torch.nn.parallel import DistributedDataParallel

import expar.tutorial

HIDDEN, TOKENS = 32, 12


@pytest.fixture(scope="module")
def notebook():
    """A module of the cells that define something."""
    file = pathlib.Path(os.environ.get("EXPAR_SEEDS", "")) / "aiinfra_distributed_moe.md"
    if not file.is_file():
        pytest.skip("EXPAR_SEEDS names no folder that has aiinfra_distributed_moe.md")
    cells = re.findall(r"^```\n(.*?)^```$", file.read_text(errors="replace"), flags=re.S | re.M)
    names = r"^(class|def) (MoEConfig|PyTorchAllToAll|EPMoE|train_tiny_ep)\b"
    module = sys.modules["notebook"] = types.ModuleType("notebook")  # where dataclasses look their module up
    for cell in cells:
        if re.search(names, cell, flags=re.M):
            exec(compile(cell, str(file), "exec"), module.__dict__)
    return module


def config(source, experts=8):
    return source.MoEConfig(experts, 2, HIDDEN, 16, in_dtype=torch.float32, out_dtype=torch.float32)


def step(source):
    """Output, auxiliary loss, and gradients of x, gate and experts, from a seed of this rank's."""
    rank = dist.get_rank()
    torch.manual_seed(rank)
    moe = source.EPMoE(config(source), rank, dist.get_world_size())
    drawn = moe.state_dict()
    if dist.get_world_size() > 1:
        moe.gate = DistributedDataParallel(moe.gate)
    x = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    out, aux = moe(x)
    ((out * torch.randn(TOKENS, HIDDEN)).sum() + aux).backward()
    return drawn, [out.detach(), aux.detach(), x.grad, *(p.grad for p in moe.parameters())]


@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_outputs_and_gradients_are_the_notebooks(notebook, ranks):
    for ours, theirs in zip(on_processes(ranks, step, expar.tutorial), on_processes(ranks, step, notebook)):
        assert ours[0].keys() == theirs[0].keys()
        assert all(ours[0][name].equal(value) for name, value in theirs[0].items())
        for found, wanted in zip(ours[1], theirs[1], strict=True):
            if wanted is None:  # an expert that nobody chose
                assert found is None
                continue
            # Two f32 sums of at most 4 HIDDEN products, four deep, each as far from the true one.
            largest = max(1, wanted.abs().max().item())
            torch.testing.assert_close(found, wanted, rtol=0, atol=2 * 4 * 4 * HIDDEN * 2**-24 * largest)


def lines_of(source, folder, seed):
    torch.manual_seed(seed + dist.get_rank())
    os.environ["TB_LOGDIR"] = folder
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        source.train_tiny_ep(config(source), steps=8, bsz=TOKENS, lr=5e-3, log_interval=1, profile=True)
    return printed.getvalue().splitlines()


def lines_on_our_layer(notebook, folder, seed):
    """Of the notebook's own training, as its user would import ours."""
    notebook.MoEConfig, notebook.EPMoE = expar.tutorial.MoEConfig, expar.tutorial.EPMoE
    return lines_of(notebook, folder, seed)


def assert_alike(ours, theirs):
    """The lines but for what depends on time, and the losses to their four digits, but for rounding."""
    number = re.compile(r"\d+\.\d+")
    for line, other in zip(ours, theirs, strict=True):
        assert number.sub("", line) == number.sub("", other)
        if line.startswith("[step"):
            pairs = zip(number.findall(line)[:-1], number.findall(other)[:-1], strict=True)
            assert all(abs(float(a) - float(b)) < 2e-4 for a, b in pairs), (line, other)


@pytest.mark.parametrize("ranks", [1, 2])
def test_training_prints_the_notebooks_lines(notebook, tmp_path, ranks):
    theirs, *silent = on_processes(ranks, lines_of, notebook, str(tmp_path), 5)
    assert len(theirs) == 9 and not any(silent)
    for body, source in ((lines_of, expar.tutorial), (lines_on_our_layer, notebook)):
        ours, *silent = on_processes(ranks, body, source, str(tmp_path), 5)
        assert_alike(ours, theirs)
        assert not any(silent)
