"""With DDP around the dense part, with FSDP and with neither: the gradients of one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from processes import on_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import expar
import expar.torch as ep

TOKENS, TOPK, EXPERTS, HIDDEN, INNER, STEPS, LIMIT = 16, 2, 5, 16, 8, 2, 0.1


class Block(nn.Module):
    """Two dense layers, a router in plain PyTorch, and experts."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = ep.GroupedExperts(HIDDEN, INNER, EXPERTS)
        self.experts.init_weights(init_std=0.5)

    def forward(self, x):
        h = self.norm(x)
        scores, ids = self.gate(h).softmax(1).topk(TOPK)
        order = ids.flatten().argsort(stable=True)
        y = self.experts(h[order // TOPK], ids.flatten().bincount(minlength=EXPERTS))
        return x.index_add(0, order // TOPK, y * scores.flatten()[order, None])


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(HIDDEN, 3)
        self.unused = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, x):
        return self.head(self.blocks(x)).square().mean()


def model(seed=2):
    torch.manual_seed(seed)
    return Model()


def batch(rank, ranks):
    g = torch.Generator().manual_seed(9)
    return torch.randn(STEPS, TOKENS, HIDDEN, generator=g)[:, TOKENS * rank // ranks : TOKENS * (rank + 1) // ranks]


def gradients_of(module):
    whole = {}
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad
            gradient = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            whole[name.removeprefix("module.")] = gradient.clone()
    return whole


def one_process():
    module = model()
    for x in batch(0, 1):
        module(x).backward()
    return gradients_of(module), nn.utils.clip_grad_norm_(module.parameters(), LIMIT), gradients_of(module)


def parallelised(mesh, seed=2):
    """The model with its experts on the dims ep and tp of the mesh."""
    module = model(seed)
    dims = tuple(name for name in mesh.mesh_dim_names if name != "dp")
    styles = {("ep",): ep.ExpertParallel, ("tp",): ep.TensorParallel, ("ep", "tp"): ep.ExpertTensorParallel}
    style = styles[dims]()
    for block in module.blocks:
        style.apply(block.experts, mesh[dims] if dims != mesh.mesh_dim_names else mesh)
    return module


def on_ranks(sizes, way):
    mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    data = tuple(name for name in sizes if name != "tp")
    place, places = 0, 1
    for name in data:
        place, places = place * sizes[name] + mesh.get_local_rank(name), places * sizes[name]
    # Replicas need not begin alike under DDP, which sees to that.
    module = parallelised(mesh, seed=2 if way != "ddp" or "dp" not in sizes else 2 + mesh.get_local_rank("dp"))
    if way == "ddp":
        module = ep.distributed_data_parallel(module)
        with module.no_sync():
            module(batch(place, places)[0]).backward()
        module(batch(place, places)[1]).backward()
    elif way == "fsdp":
        where = mesh if data == mesh.mesh_dim_names else mesh[data]  # two dims: replicas of what is sharded
        for block in module.blocks:
            ep.fully_shard(block, mesh=where)
        ep.fully_shard(module, mesh=where)
        for x in batch(place, places):
            module(x).backward()
    else:
        for x in batch(place, places):
            module(x).backward()
        ep.average_gradients(module)
    return gradients_of(module), ep.clip_gradients(module, LIMIT), gradients_of(module)


@pytest.mark.parametrize("way", ["ddp", "fsdp", "neither"])
@pytest.mark.parametrize(
    "sizes", [{"ep": 2}, {"ep": 4}, {"dp": 2, "ep": 2}, {"ep": 2, "tp": 2}, {"dp": 2, "tp": 2}], ids=str
)
def test_gradients_and_their_norm_are_those_of_one_process(sizes, way):
    ranks = 1
    for size in sizes.values():
        ranks *= size
    ((gradients, norm, clipped),) = on_processes(1, one_process)
    assert norm > 2 * LIMIT
    results = on_processes(ranks, on_ranks, sizes, way)
    for got in results:
        assert torch.equal(got[1], results[0][1])
        torch.testing.assert_close(got[1], norm, rtol=2e-5, atol=0)
        for found, wanted in ((got[0], gradients), (got[2], clipped)):
            assert found.keys() == wanted.keys()
            for name, want in wanted.items():
                torch.testing.assert_close(found[name], want, rtol=2e-5, atol=2e-6, msg=lambda text: f"{name}: {text}")


class Layered(nn.Module):
    """The library's own layer between dense ones, with a loss of its router where the ranks are one group."""

    def __init__(self, where, balance, experts):
        super().__init__()
        torch.manual_seed(4)
        self.norm = nn.LayerNorm(HIDDEN)
        self.layer = ep.MoELayer(HIDDEN, INNER, experts, TOPK, context=where, balance=balance, shared_inner=4)
        self.head = nn.Linear(HIDDEN, 3)

    def forward(self, x):
        out = self.head(x + self.layer(self.norm(x))).square().mean()
        return out + self.layer.aux_loss


def layered(sizes, way, balance, experts):
    mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    # DTensors where each rank has as many, else plain parameters.
    module = Layered(mesh if experts == 4 else ep.parallel(mesh), balance, experts)
    if way == "ddp":
        module = ep.distributed_data_parallel(module)
    elif way == "fsdp":
        ep.fully_shard(module)
    for x in batch(dist.get_rank(), dist.get_world_size()):
        module(x).backward()
    if way == "neither":
        ep.average_gradients(module)
    return gradients_of(module), ep.clip_gradients(module, LIMIT)


@pytest.mark.parametrize("way", ["ddp", "fsdp", "neither"])
@pytest.mark.parametrize("sizes", [{"ep": 2}, {"ep": 4}, {"dp": 2, "ep": 2}], ids=str)
@pytest.mark.parametrize("experts", [4, EXPERTS])
def test_gradients_of_the_layer_and_their_norm_are_those_of_one_process(sizes, way, experts):
    balance = 0.0 if "dp" in sizes else 0.5
    ((expected, wanted_norm),) = on_processes(1, layered, {"ep": 1}, "neither", balance, experts)
    results = on_processes(4 if len(sizes) > 1 else sizes["ep"], layered, sizes, way, balance, experts)
    for _, norm in results:
        torch.testing.assert_close(norm, wanted_norm, rtol=2e-5, atol=0)
    for name, want in expected.items():
        found = [rank[name] for rank, _ in results]
        if "experts." in name and experts != 4:
            found = [torch.cat(found[i : i + sizes["ep"]]) for i in range(0, len(found), sizes["ep"])]
        for got in found:
            torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6, msg=lambda text: f"{name}: {text}")


def many_steps():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    assert ep.context(mesh) is ep.context() and ep.parallel(mesh) is ep.parallel(mesh)
    module = parallelised(mesh)
    for _ in range(20):
        module.zero_grad()
        module(batch(0, 4)[0]).backward()
        ep.average_gradients(module)


def test_a_job_of_many_steps_makes_its_groups_once():
    on_processes(4, many_steps)


def partial_groups():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    module = parallelised(mesh)
    with pytest.raises(expar.BadArgument, match="over 2 ranks, which are only some of those that share experts"):
        ep.distributed_data_parallel(module, process_group=mesh["dp"].get_group())
    module = parallelised(mesh)
    wrapped = ep.distributed_data_parallel(module)
    wrapped(batch(0, 4)[0]).backward()
    with pytest.raises(expar.BadArgument, match="average its gradients already"):
        ep.average_gradients(wrapped)
    with pytest.raises(expar.BadArgument, match="averaged over 4 ranks already, and now should be over 2"):
        ep.fully_shard(module, mesh=mesh["ep"])


def test_groups_that_hold_a_part_of_those_that_share_experts_are_refused():
    on_processes(4, partial_groups)


def some_unused():
    module = nn.Linear(3, 2)
    module.never = nn.Parameter(torch.ones(1))
    module.first = nn.Parameter(torch.ones(1))
    loss = module(torch.full((1, 3), 1.0 + dist.get_rank())).sum()
    (loss * module.first if dist.get_rank() == 0 else loss).sum().backward()
    ep.average_gradients(module)
    return {name: None if p.grad is None else p.grad.tolist() for name, p in module.named_parameters()}


def test_a_parameter_that_some_ranks_have_used_has_a_gradient_on_all():
    first, second = on_processes(2, some_unused)
    assert first == second
    assert first["never"] is None and first["first"] is not None and first["bias"] == [1.0, 1.0]
    assert first["weight"] == [[1.5] * 3] * 2


def replicated():
    """However a layer is told of its ranks, replicas of it get the mean of both ranks' gradients."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "ep"))
    row = mesh["ep"]
    for where in (mesh, row, row.get_group(), ep.context(row), ep.communicator(row), ep.alone()):
        layer = ep.MoELayer(HIDDEN, INNER, 4, 2, context=where)
        for parameter in layer.experts.parameters():
            parameter.requires_grad_(False)  # until after the wrapping
        wrapped = ep.distributed_data_parallel(layer)
        for parameter in layer.experts.parameters():
            parameter.requires_grad_(True)
        wrapped(batch(dist.get_rank(), 2)[0]).sum().backward()
        grad = layer.experts.up.grad
        grad = grad.to_local() if isinstance(grad, DTensor) else grad
        alone = ep.MoELayer(HIDDEN, INNER, 4, 2, context=ep.alone())
        (sum(alone(batch(r, 2)[0]).sum() for r in (0, 1)) / 2).backward()
        torch.testing.assert_close(grad, alone.experts.up.grad)

    own = ep.MoELayer(HIDDEN, INNER, 4, 2, context=expar.Context(ep.alone().communicator))
    with pytest.raises(ValueError, match="several ranks say that they hold the same part"):
        ep.distributed_data_parallel(own)


def test_replicas_are_told_apart_however_a_layer_was_given_its_ranks():
    on_processes(2, replicated)
