"""Trains a GPT-style model on the bytes of a text, its feed-forward layers spread over ranks as experts.

    torchrun --standalone --nproc-per-node 4 examples/python/train_text.py --text data/kjv.txt --steps 200 --save runs/a
    torchrun --standalone --nproc-per-node 2 examples/python/train_text.py --text data/kjv.txt --steps 300 --resume runs/a

Everything but the experts is data parallel: wrapped in DDP, in FSDP, or averaged by hand (--wrap). ``--layer eager`` trains
the same model with experts of plain PyTorch, all of them on every rank: the same losses but for rounding.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.nn.functional import all_reduce

import expar.torch as ep
from expar import plot
from expar.recorder import Recorder

HIDDEN, INNER, EXPERTS, TOPK, HEADS, LAYERS, CONTEXT, BATCH = 64, 96, 8, 2, 4, 2, 64, 32
BALANCE = 0.01


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.out = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(x.shape))


class EagerMoE(nn.Module):
    """What ep.MoELayer computes, in plain PyTorch: every rank has all experts and runs its own tokens through them."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        # The same numbers to begin with: one rank's layer has all experts.
        drawn = ep.MoELayer(HIDDEN, INNER, EXPERTS, TOPK, context=ep.alone(), seed=seed).state_dict()
        self.router = nn.Parameter(drawn["router.weight"])
        self.up, self.down = nn.Parameter(drawn["experts.up"]), nn.Parameter(drawn["experts.down"])

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, HIDDEN)
        scores = (rows @ self.router.T).softmax(1)
        top, ids = scores.topk(TOPK)
        weights = torch.zeros_like(scores).scatter(1, ids, top / top.sum(1, keepdim=True))
        out = torch.zeros_like(rows)
        for e in range(EXPERTS):
            at = (ids == e).any(1).nonzero().squeeze(1)
            gate, up = (rows[at] @ self.up[e].T).chunk(2, 1)
            out = out.index_add(0, at, weights[at, e, None] * ((F.silu(gate) * up) @ self.down[e].T))
        # Loads and scores of the whole batch.
        counts = torch.bincount(ids.flatten(), minlength=EXPERTS).float()
        dist.all_reduce(counts)
        mean = all_reduce(scores.sum(0)) / (counts.sum() / TOPK)
        self.aux_loss = BALANCE * EXPERTS * (counts / counts.sum() * mean).sum()
        return out.view_as(x)


class Block(nn.Module):
    def __init__(self, moe: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(HIDDEN), Attention()
        self.norm2, self.moe = nn.LayerNorm(HIDDEN), moe

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.moe(self.norm2(x))


class Model(nn.Module):
    def __init__(self, layer: str, mesh: dist.DeviceMesh) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(256, HIDDEN), nn.Embedding(CONTEXT, HIDDEN)
        self.blocks = nn.ModuleList()
        for i in range(LAYERS):
            if layer == "eager":
                moe: nn.Module = EagerMoE(seed=i)
            else:
                moe = ep.MoELayer(HIDDEN, INNER, EXPERTS, TOPK, context=mesh, balance=BALANCE, seed=i)
            self.blocks.append(Block(moe))
        self.norm, self.head = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 256, bias=False)

    def forward(self, bytes_: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each byte but the first given those before it, and the balancing loss."""
        x = self.tokens(bytes_[:, :-1]) + self.places.weight
        for block in self.blocks:
            x = block(x)
        loss = F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), bytes_[:, 1:].flatten())
        return loss, sum(block.moe.aux_loss for block in self.blocks)


def batch_of(text: Tensor, step: int, rank: int, ranks: int) -> Tensor:
    """This rank's share of the sequences of ``step``, which are the same for any number of ranks."""
    starts = torch.randint(len(text) - CONTEXT, (BATCH,), generator=torch.Generator().manual_seed(step))
    mine = starts[BATCH * rank // ranks : BATCH * (rank + 1) // ranks]
    return torch.stack([text[s : s + CONTEXT + 1] for s in mine]).long()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--layer", choices=["expar", "eager"], default="expar")
    parser.add_argument("--wrap", choices=["ddp", "fsdp", "none"], default="ddp")
    parser.add_argument("--save", type=pathlib.Path)
    parser.add_argument("--resume", type=pathlib.Path)
    parser.add_argument("--losses", type=pathlib.Path, help="where rank 0 writes the loss of each step, as JSON")
    parser.add_argument("--loads", help="where rank 0 draws the loads of the first layer's experts, step by step")
    return parser.parse_args()


def train(args: argparse.Namespace) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = dist.init_device_mesh("cpu", (ranks,), mesh_dim_names=("ep",))
    text = torch.frombuffer(bytearray(args.text.read_bytes()), dtype=torch.uint8)

    torch.manual_seed(0)
    model: nn.Module = Model(args.layer, mesh)
    if args.wrap == "ddp":
        model = ep.distributed_data_parallel(model)
    elif args.wrap == "fsdp":
        model = ep.fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    first = 0
    if args.resume:
        weights, moments = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": moments, "step": 0}
        dcp.load(state, checkpoint_id=args.resume)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        first = state["step"]

    layers = [module for module in model.modules() if isinstance(module, ep.MoELayer)]
    recorder = Recorder(LAYERS, EXPERTS)
    losses, began = [], time.monotonic()
    for step in range(first, args.steps):
        loss, aux = model(batch_of(text, step, rank, ranks))
        optimizer.zero_grad()
        (loss + aux).backward()
        if args.wrap == "none":
            ep.average_gradients(model, ep.context(mesh))
        optimizer.step()
        for i, layer in enumerate(layers):
            recorder.record(step, i, layer)
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / ranks)
        if rank == 0 and (step + 1) % 20 == 0:
            print(f"step {step + 1}: loss {losses[-1]:.4f}, {(time.monotonic() - began) / len(losses) * 1000:.0f} ms", flush=True)

    if args.save:
        weights, moments = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": moments, "step": args.steps}, checkpoint_id=args.save)
    if args.losses and rank == 0:
        args.losses.write_text(json.dumps(losses))
    if args.loads and rank == 0:
        plot.load_heatmap(recorder.loads[:, 0], args.loads, rows="step", first=first)
    dist.barrier()


def main() -> None:
    dist.init_process_group("gloo")
    train(arguments())
    dist.destroy_process_group()  # after the model: DDP holds on to the group


if __name__ == "__main__":
    main()
