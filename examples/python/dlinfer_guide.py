"""The program of the guide "All2All EP MoE in dlinfer", steps 1 to 6 and its section on tensor parallelism, on any machine.

    torchrun --standalone --nproc-per-node 4 examples/python/dlinfer_guide.py     (or 8, 2, 1)

Each rank compares what it has joined with an MoE of all experts that it computes alone, in double precision.
"""

import os

import torch
import torch.distributed as dist

import expar.torch as ep
from expar.dlinfer import MoEConfig, fused_moe_all2all

HIDDEN, INNER, TOKENS, EXPERTS, TOPK = 64, 96, 4 * 32, 8, 2


def draw(what, *shape):
    """The same numbers on every rank, so that all agree on the model."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(what)) / shape[-1] ** 0.5


# Step 3: the experts' kernel. group_list has the rows of each local expert.
def expert_kernel(hidden_states, gate_up_weights, down_weights, context):
    def multiply(rows, weights):
        return ep.grouped_mm(rows, weights, context["group_list"], context=ep.alone())

    hidden = ep.activate(multiply(hidden_states, gate_up_weights), "swiglu", context=ep.alone())
    return multiply(hidden, down_weights)


# Step 4: the layer. Experts are functions of `width` columns, and each rank holds some of them.
class MoELayer(torch.nn.Module):
    def __init__(self, moe_config, ep_group, ep_rank, ep_size, width, partition):
        super().__init__()
        self.group = {"ep_group": ep_group, "ep_rank": ep_rank, "ep_size": ep_size}
        self.moe_config, self.partition = moe_config, partition
        held = slice(ep_rank * moe_config.num_local_experts, (ep_rank + 1) * moe_config.num_local_experts)
        self.gate_up_weights = torch.nn.Parameter(draw(1, EXPERTS, 2 * INNER, width)[held])
        self.down_weights = torch.nn.Parameter(draw(2, EXPERTS, width, INNER)[held])

    def forward(self, hidden_states, router_logits):
        return fused_moe_all2all(
            hidden_states=hidden_states,
            router_logits=router_logits,
            moe_config=self.moe_config,
            **self.group,
            expert_kernel=expert_kernel,
            expert_kwargs={"gate_up_weights": self.gate_up_weights, "down_weights": self.down_weights},
            normalize_router_logits=True,
            partition=self.partition,
        )


# Step 5: the slices of all ranks side by side.
def join(part, group):
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, dim=-1)


def dense(x, logits, heads):
    """Every expert on every token, for each of `heads` slices of x by itself."""
    weights = torch.zeros(TOKENS, EXPERTS).double()
    best, ids = logits.double().softmax(-1).topk(TOPK)
    weights.scatter_(1, ids, best)
    gate_up, down = draw(1, EXPERTS, 2 * INNER, HIDDEN // heads), draw(2, EXPERTS, HIDDEN // heads, INNER)
    slices = x.double().unflatten(1, (heads, -1))
    gate, up = torch.einsum("thd,efd->ethf", slices, gate_up.double()).chunk(2, dim=-1)
    results = torch.einsum("ethf,edf->ethd", torch.nn.functional.silu(gate) * up, down.double())
    return torch.einsum("te,ethd->thd", weights, results).flatten(1)


def check(name, out, wanted):
    error = ((out - wanted).abs().max() / wanted.abs().max()).item()
    assert out.shape == wanted.shape and error < 1e-5, f"{name} is wrong by {error:.1e}"
    if dist.get_rank() == 0:
        print(f"{name}: {list(out.shape)}, largest error {error:.1e} of the largest value", flush=True)


@torch.no_grad()
def main():
    dist.init_process_group("gloo")  # Step 2
    rank, world = dist.get_rank(), dist.get_world_size()
    x = draw(3, TOKENS, HIDDEN) * HIDDEN**0.5
    logits = x @ draw(4, EXPERTS, HIDDEN).T

    # Steps 1, 4 and 6: all ranks in one ep group. In slices, as the guide has its weights, and as a usual MoE.
    config = MoEConfig(num_experts=EXPERTS, experts_per_token=TOPK, ep_world_size=world)
    ep_group = dist.new_group(list(range(world)))
    layer = MoELayer(config, ep_group, rank, world, HIDDEN // world, "sliced")
    sliced = layer(x, logits)
    assert sliced.shape == (TOKENS, HIDDEN // world)
    sliced = join(sliced, ep_group)
    check(f"experts of slices, EP={world}", sliced, dense(x, logits, heads=world))
    layer = MoELayer(config, ep_group, rank, world, HIDDEN, "gathered")
    check(f"experts of whole rows, EP={world}", join(layer(x, logits), ep_group), dense(x, logits, heads=1))

    # Beside tensor parallelism: ranks 0, 2, 4, ... are one ep group, the others another; each has half of the columns.
    if world % 2 == 0:
        tp_size, ep_size = 2, world // 2
        tp_rank, ep_rank = rank % tp_size, rank // tp_size
        tp_groups = [dist.new_group([i * tp_size + j for j in range(tp_size)]) for i in range(ep_size)]
        ep_groups = [dist.new_group([j + i * tp_size for i in range(ep_size)]) for j in range(tp_size)]
        config = MoEConfig(num_experts=EXPERTS, experts_per_token=TOPK, ep_world_size=ep_size)
        layer = MoELayer(config, ep_groups[tp_rank], ep_rank, ep_size, HIDDEN // (tp_size * ep_size), "sliced")
        mine = x.chunk(tp_size, dim=-1)[tp_rank]
        out = join(join(layer(mine, logits), ep_groups[tp_rank]), tp_groups[ep_rank])
        check(f"experts of slices, TP={tp_size} x EP={ep_size}", out, dense(x, logits, heads=world))
        assert torch.equal(out, sliced)  # the same bytes, wherever the experts are

    dist.barrier()
    os._exit(0)  # gloo's threads may abort an interpreter that ends while they let go of a tensor


if __name__ == "__main__":
    main()
