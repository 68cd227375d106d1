"""MoELayer on a device mesh: experts are DTensors, which distributed checkpoints bring to other numbers of ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from processes import on_processes
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import expar
import expar.torch as ep

HIDDEN, INNER, EXPERTS, TOKENS = 16, 12, 8, 24

torch.set_num_threads(1)


def mesh_of(**sizes):
    return init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def layer_of(where, seed=0, experts=EXPERTS, **options):
    return ep.MoELayer(HIDDEN, INNER, experts, 2, context=where, router="deepseek_v3", seed=seed, **options)


def step(layer, part, parts):
    """Output and gradients of this rank's tokens."""
    x, dout = torch.randn(2, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(3)).unbind(0)
    x = x.chunk(parts)[part].clone().requires_grad_()
    layer.zero_grad()
    out = layer(x)
    (out * dout.chunk(parts)[part]).sum().backward()
    grads = [p.grad.to_local() if isinstance(p, DTensor) else p.grad for p in layer.experts.parameters()]
    return [out.detach(), x.grad, *grads]


def on_a_mesh(ranks, compiles=False):
    rank = dist.get_rank()
    layer = layer_of(mesh_of(ep=ranks))
    assert isinstance(layer.experts.up, DTensor) and list(layer.experts.up.placements) == [Shard(0)]
    assert layer.experts.up.shape == (EXPERTS, 2 * INNER, HIDDEN)
    assert isinstance(layer.experts.up.grad, type(None)) and not isinstance(layer.router.weight, DTensor)
    eager, plain = step(layer, rank, ranks), step(layer_of(ep.context()), rank, ranks)
    assert isinstance(layer.experts.up.grad, DTensor)
    assert all(torch.equal(a, b) for a, b in zip(eager, plain))
    if compiles:
        layer.compile(fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(eager, step(layer, rank, ranks)))
    with torch.no_grad():
        out = layer.eval()(torch.ones(2, HIDDEN))
        assert torch.equal(layer.for_inference()(torch.ones(2, HIDDEN)), out)
    return eager


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_experts_on_a_mesh_compute_what_plain_ones_do(ranks):
    results = [torch.cat(parts) for parts in zip(*on_processes(ranks, on_a_mesh, ranks, ranks == 1))]
    for got, wanted in zip(results, on_processes(1, on_a_mesh, 1)[0]):
        assert torch.equal(got, wanted)


def stepped(ranks, folder, saves):
    """One step and a checkpoint of it, or the next step from there."""
    rank = dist.get_rank()
    layer = layer_of(mesh_of(ep=ranks), seed=0 if saves else 5)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    if saves:
        step(layer, rank, ranks)
        layer.router.weight.grad = torch.ones_like(layer.router.weight)  # which nobody averages here
        optimizer.step()
        layer.selection_bias += 0.125
        weights, moments = get_state_dict(layer, optimizer)
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    else:
        weights, moments = get_state_dict(layer, optimizer)
        state = {"model": weights, "optimizer": moments}
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(layer, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    step(layer, rank, ranks)
    layer.router.weight.grad = torch.ones_like(layer.router.weight)
    optimizer.step()
    return step(layer, rank, ranks)


@pytest.mark.parametrize("ranks", [1, 2])
def test_training_goes_on_from_a_checkpoint_of_four_ranks(ranks, tmp_path):
    wanted = [torch.cat(parts) for parts in zip(*on_processes(4, stepped, 4, tmp_path, True))]
    got = [torch.cat(parts) for parts in zip(*on_processes(ranks, stepped, ranks, tmp_path, False))]
    for a, b in zip(got, wanted):
        assert torch.equal(a, b)


def replicated():
    layer = layer_of(mesh_of(dp=2, ep=2))
    assert list(layer.experts.up.placements) == [Replicate(), Shard(0)]
    assert layer.experts.up.to_local().shape[0] == EXPERTS // 2
    step(layer, dist.get_rank(), 4)
    with pytest.raises(expar.BadArgument, match="6 experts on a mesh of .* as many on each rank"):
        layer_of(mesh_of(ep=4), experts=6)
    with pytest.raises(expar.BadArgument, match="DTensors hold whole experts"):
        layer_of(mesh_of(ep=2, tp=2))
    layer_of(ep.parallel(mesh_of(ep=2, tp=2)))


def test_meshes_have_replicas_and_say_what_they_cannot():
    on_processes(4, replicated)
