"""Checkpoints of activations, which repeat no communication, and of parameters, which load on other meshes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.distributed.checkpoint as dcp
from processes import on_processes
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import expar.torch as ep

HIDDEN, INNER, EXPERTS, TOPK, TOKENS = 16, 8, 5, 2, 12


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(6)
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = ep.GroupedExperts(HIDDEN, INNER, EXPERTS)
        self.experts.init_weights(init_std=0.5)

    def forward(self, x):
        scores, ids = self.gate(x).softmax(1).topk(TOPK)
        order = ids.flatten().argsort(stable=True)
        y = self.experts(x[order // TOPK], ids.flatten().bincount(minlength=EXPERTS))
        return x.index_add(0, order // TOPK, y * scores.flatten()[order, None])


class Layered(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = ep.MoELayer(HIDDEN, INNER, EXPERTS, TOPK, seed=6)

    def forward(self, x):
        return torch.tanh(self.layer(torch.tanh(x)))


def sliced(sizes):
    mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    styles = {("ep",): ep.ExpertParallel, ("tp",): ep.TensorParallel, ("ep", "tp"): ep.ExpertTensorParallel}
    block = Block()
    dims = tuple(name for name in sizes if name != "dp")
    styles[dims]().apply(block.experts, mesh if dims == mesh.mesh_dim_names else mesh[dims])
    return block, mesh.get_local_rank("ep") if "ep" in sizes else 0


class Operators(TorchDispatchMode):
    """Counts the operators of expar that run, and those of PyTorch."""

    def __init__(self):
        super().__init__()
        self.ran = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ran[op.name()] += 1
        return op(*args, **(kwargs or {}))


def recomputed(sizes):
    block, part = sliced(sizes) if sizes else (Layered(), torch.distributed.get_rank())
    x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(part))
    results = []
    for way in (None, {"context_fn": ep.checkpoint_context}, {}):
        block.zero_grad()
        rows = x.clone().requires_grad_()
        with Operators() as counted:
            out = block(rows) if way is None else checkpoint(block, rows, use_reentrant=False, **way)
            out.square().sum().backward()
        gradients = [p.grad for p in block.parameters()]
        local = [g.to_local() if hasattr(g, "to_local") else g for g in gradients]
        results.append((counted.ran, [out.detach(), rows.grad, *local]))
    return results


COMMUNICATE = ["expar::dispatch", "expar::combine", "expar::sum_over", "expar::moe"]


@pytest.mark.parametrize("sizes", [{"ep": 2}, {"tp": 2}, {"ep": 2, "tp": 2}, {}], ids=lambda s: str(s or "layer"))
def test_recomputation_repeats_no_communication_and_changes_no_byte(sizes):
    for plain, selective, everything in on_processes(4 if len(sizes) == 2 else 2, recomputed, sizes):
        for _, got in (selective, everything):
            assert all(torch.equal(a, b) for a, b in zip(got, plain[1]))
        told = [name for name in COMMUNICATE if plain[0][name]]
        assert told
        for name in told:
            assert selective[0][name] == plain[0][name], name
        assert any(everything[0][name] > plain[0][name] for name in told)
        local = "aten::tanh" if not sizes else "expar::grouped_mm"
        assert selective[0][local] == 2 * plain[0][local]


def trained(sizes, path=None, load=None):
    """The block after a step of AdamW, or as a checkpoint has it; the parameters and moments whole."""
    if sizes:
        block, part = sliced(sizes)
    else:
        block, part = Block(), 0
    optimizer = torch.optim.AdamW(block.parameters(), lr=0.1, foreach=False)

    def state():
        return {"model": get_model_state_dict(block), "optimizer": get_optimizer_state_dict(block, optimizer)}

    def step(seed):
        x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(seed))
        block(x).square().sum().backward()
        ep.average_gradients(block)
        optimizer.step()
        optimizer.zero_grad()

    step(part)
    if load is not None:
        with torch.no_grad():
            for p in block.parameters():
                p.add_(1.0)
        held = state()
        dcp.load(held, checkpoint_id=load, no_dist=not sizes)
        set_model_state_dict(block, held["model"])
        set_optimizer_state_dict(block, optimizer, held["optimizer"])
    held = state()
    if path is not None:
        dcp.save(held, checkpoint_id=path, no_dist=not sizes)
    whole = {}
    for name, p in block.named_parameters():
        moments = held["optimizer"]["state"][name]
        for what, value in (("", p.detach()), (".m", moments["exp_avg"]), (".v", moments["exp_avg_sq"])):
            whole[name + what] = value.full_tensor() if hasattr(value, "full_tensor") else value.clone()
    return whole


@pytest.mark.parametrize("first", [{"ep": 2, "tp": 2}, {"dp": 2, "ep": 2}], ids=str)
@pytest.mark.parametrize("then", [{"ep": 2}, {"ep": 4}, {"tp": 2}, {"ep": 1}, {}], ids=str)
def test_a_distributed_checkpoint_of_2x2_ranks_loads_on_others(tmp_path, first, then):
    saved = on_processes(4, trained, first, str(tmp_path))[0]
    ranks = 1
    for size in then.values():
        ranks *= size
    for loaded in on_processes(ranks, trained, then, None, str(tmp_path)):
        assert loaded.keys() == saved.keys()
        for name, value in saved.items():
            assert torch.equal(loaded[name], value), name
