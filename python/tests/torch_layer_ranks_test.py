"""MoELayer on processes of a process group: the bytes of one, and averaged gradients those of one."""

from __future__ import annotations

import pytest
import torch
from processes import on_processes
from torch import nn

import expar
import expar.torch as ep

HIDDEN, INNER, EXPERTS, TOKENS = 16, 12, 6, 24

torch.set_num_threads(1)


def batch():
    return torch.randn(2, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(3)).unbind(0)


def on_one(body, *arguments):
    """What body(context, ...) returns in this process alone."""
    results = []
    expar.run_threads(1, lambda c: results.append(body(expar.Context(c, threads=1), *arguments)))
    return results[0]


def step(context, part, parts):
    """Output, gradient of the input and of the experts, of this rank's tokens."""
    layer = ep.MoELayer(HIDDEN, INNER, EXPERTS, 2, context=context, router="qwen3_moe", balance=0.5)
    x, dout = (t.chunk(parts)[part].clone() for t in batch())
    x.requires_grad_()
    out = layer(x)
    ((out * dout).sum() + layer.aux_loss / parts).backward()
    return [out.detach(), x.grad, layer.experts.up.grad, layer.experts.down.grad]


def rank_step(ranks):
    return step(None, torch.distributed.get_rank(), ranks)


@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_give_the_bytes_of_one(ranks):
    wanted = on_one(step, 0, 1)
    for got, one in zip(zip(*on_processes(ranks, rank_step, ranks)), wanted):
        assert torch.equal(torch.cat(got), one)


def trained(context, part, parts, wrap=lambda model: model):
    """The gradients of the mean loss of a small model."""
    torch.manual_seed(1)
    layer = ep.MoELayer(HIDDEN, INNER, EXPERTS, 2, context=context, balance=0.5, z=0.1, shared_inner=8)
    model = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), layer, nn.Linear(HIDDEN, HIDDEN))
    wrapped = wrap(model)
    x, target = (t.chunk(parts)[part] for t in batch())
    loss = ((wrapped(x) - target) ** 2).mean() + layer.aux_loss
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def averaged(ranks):
    return trained(None, torch.distributed.get_rank(), ranks, ep.distributed_data_parallel)


@pytest.mark.parametrize("ranks", [2, 4])
def test_averaged_gradients_are_those_of_one_process(ranks):
    wanted = on_one(trained, 0, 1)
    results = on_processes(ranks, averaged, ranks)
    for name, one in wanted.items():
        mine = [result[name] for result in results]
        got = torch.cat(mine) if name.startswith("1.experts") else mine[0]
        torch.testing.assert_close(got, one, rtol=1e-4, atol=1e-6, msg=lambda text: f"{name}: {text}")
