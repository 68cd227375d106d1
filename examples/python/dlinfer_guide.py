"""The program of the guide "All2All EP MoE in dlinfer", steps 1 to 6 and its section on tensor parallelism, on any machine.

    torchrun --standalone --nproc-per-node 8 examples/python/dlinfer_guide.py     (or any number)

Each rank compares what comes out with a model of all experts that it computes alone, in double precision.
"""

import os

import torch
import torch.distributed as dist

import expar.ascend as torch_npu
from expar.dlinfer import MoEConfig, fused_moe_all2all

WORLD = int(os.environ["WORLD_SIZE"])
TOKENS, HIDDEN, INNER, EXPERTS, TOPK = 4 * 32, 16 * WORLD, 96, 2 * WORLD, 2


# Step 3: the experts' kernel. group_list has the rows of each local expert.
def expert_kernel(hidden_states, gate_up_weights, down_weights, context):
    def multiply(rows, weights):
        # The operator wants [L, in, out].
        return torch_npu.npu_grouped_matmul(
            [rows],
            [weights.transpose(1, 2)],
            group_list=context["group_list"],
            split_item=2,
            group_type=0,
            group_list_type=context["group_list_type"],
        )[0]

    return multiply(torch_npu.npu_swiglu(multiply(hidden_states, gate_up_weights), dim=-1), down_weights)


# Step 4: the layer. Experts are functions of `width` columns, and each rank holds some of them.
class MoELayer(torch.nn.Module):
    def __init__(self, moe_config, ep_group, ep_rank, ep_size, width, partition="sliced", columns=slice(None)):
        super().__init__()
        self.moe_config, self.partition, self.columns = moe_config, partition, columns
        self.group = {"ep_group": ep_group, "ep_rank": ep_rank, "ep_size": ep_size}
        self.gate = torch.nn.Linear(HIDDEN, EXPERTS, bias=False)
        held = slice(ep_rank * moe_config.num_local_experts, (ep_rank + 1) * moe_config.num_local_experts)
        self.gate_up_weights = torch.nn.Parameter(torch.randn(EXPERTS, 2 * INNER, width)[held] / width**0.5)
        self.down_weights = torch.nn.Parameter(torch.randn(EXPERTS, width, INNER)[held] / INNER**0.5)

    def forward(self, hidden_states):
        return fused_moe_all2all(
            hidden_states=hidden_states[:, self.columns],
            router_logits=self.gate(hidden_states),
            moe_config=self.moe_config,
            **self.group,
            expert_kernel=expert_kernel,
            expert_kwargs={"gate_up_weights": self.gate_up_weights, "down_weights": self.down_weights},
            normalize_router_logits=True,
            partition=self.partition,
        )


# Step 5: a block that puts the slices of all ranks side by side. The ranks have the same tokens.
class Block(torch.nn.Module):
    def __init__(self, moe, *groups):
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(HIDDEN, num_heads=2)
        self.moe, self.groups = moe, groups

    def forward(self, x):
        x = self.attention(x, x, x, need_weights=False)[0]
        out = self.moe(x)
        for group in self.groups:
            parts = [torch.empty_like(out) for _ in range(dist.get_world_size(group))]
            dist.all_gather(parts, out, group=group)
            out = torch.cat(parts, dim=-1)
        return x + out


class Dense(torch.nn.Module):
    """In place of the layer: every expert on every token, for each of `heads` slices of it by itself."""

    def __init__(self, layer, heads):
        super().__init__()
        self.gate, self.heads = layer.gate, heads
        self.gate_up, self.down = layer.gate_up_weights, layer.down_weights

    def forward(self, x):
        best, ids = self.gate(x).softmax(-1).topk(TOPK)
        weights = torch.zeros(TOKENS, EXPERTS).double().scatter(1, ids, best)
        gate, up = torch.einsum("thd,efd->ethf", x.unflatten(1, (self.heads, -1)), self.gate_up).chunk(2, dim=-1)
        results = torch.einsum("ethf,edf->ethd", torch.nn.functional.silu(gate) * up, self.down)
        return torch.einsum("te,ethd->thd", weights, results).flatten(1)


def seeded(make):
    """The same parameters of the same shapes, on every rank."""
    torch.manual_seed(1)
    return make()


# Step 6: the block against its twin.
def check(name, make_layer, groups, heads):
    block = seeded(lambda: Block(make_layer(), *groups))
    config = MoEConfig(num_experts=EXPERTS, experts_per_token=TOPK, ep_world_size=1)
    twin = seeded(lambda: Block(MoELayer(config, None, 0, 1, HIDDEN // heads))).double()
    twin.moe = Dense(twin.moe, heads)
    x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(2))
    out, wanted = block(x), twin(x.double())
    error = ((out - wanted).abs().max() / wanted.abs().max()).item()
    assert out.shape == wanted.shape and error < 1e-5, f"{name} is wrong by {error:.1e}"
    if dist.get_rank() == 0:
        print(f"{name}: {list(out.shape)}, largest error {error:.1e} of the largest value", flush=True)
    return out


@torch.no_grad()
def main():
    dist.init_process_group("gloo")  # Step 2
    rank = dist.get_rank()
    ep_group = dist.new_group(list(range(WORLD)))
    # Step 1
    config = MoEConfig(num_experts=EXPERTS, experts_per_token=TOPK, ep_world_size=WORLD)
    ep_ranks = config, ep_group, rank, WORLD

    # Experts of slices, as the guide's weights have them; then the usual ones, of whole rows.
    sliced = check(f"slices, EP={WORLD}", lambda: MoELayer(*ep_ranks, HIDDEN // WORLD), [ep_group], heads=WORLD)
    check(f"whole rows, EP={WORLD}", lambda: MoELayer(*ep_ranks, HIDDEN, "gathered"), [ep_group], heads=1)

    # Beside tensor parallelism: ranks 0, 2, 4, ... are one ep group, the others another; each has half of the columns.
    if WORLD % 2 == 0:
        tp_size, ep_size = 2, WORLD // 2
        tp_rank, ep_rank = rank % tp_size, rank // tp_size
        tp_groups = [dist.new_group([i * tp_size + j for j in range(tp_size)]) for i in range(ep_size)]
        ep_groups = [dist.new_group([j + i * tp_size for i in range(ep_size)]) for j in range(tp_size)]
        config = MoEConfig(num_experts=EXPERTS, experts_per_token=TOPK, ep_world_size=ep_size)
        ep_ranks = config, ep_groups[tp_rank], ep_rank, ep_size
        width = HIDDEN // (tp_size * ep_size)
        columns = slice(tp_rank * HIDDEN // tp_size, (tp_rank + 1) * HIDDEN // tp_size)
        out = check(
            f"slices, TP={tp_size} x EP={ep_size}",
            lambda: MoELayer(*ep_ranks, width, "sliced", columns),
            [ep_groups[tp_rank], tp_groups[ep_rank]],
            heads=WORLD,
        )
        assert torch.equal(out, sliced)  # the same bytes, wherever the experts are

    dist.barrier()
    os._exit(0)  # gloo's threads may abort an interpreter that ends while they let go of a tensor


if __name__ == "__main__":
    main()
