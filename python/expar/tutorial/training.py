"""The notebook's toy task: a layer learns a random linear map, on the ranks of torchrun."""

from __future__ import annotations

import os
import time
from typing import Optional

import torch
import torch.distributed as dist
from torch import nn

import expar.torch as ep

from .. import broadcast
from .config import MoEConfig
from .layer import EPMoE


def init_distributed() -> None:
    """A gloo process group of torchrun's ranks, or of this process alone, unless there is one. Collective."""
    if dist.is_initialized():
        return
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:
        alone = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=alone, rank=0, world_size=1)


def train_tiny_ep(
    cfg: MoEConfig,
    steps: int = 10,
    bsz: int = 16,
    lr: float = 5e-4,
    log_interval: int = 1000,
    aux_alpha: float = 1e-2,
    profile: bool = False,
    seed: Optional[int] = None,
) -> None:
    """Fits an EPMoE to y = target_proj(x) of random x, by AdamW on mean square + aux_alpha * auxiliary loss.

    bsz          : tokens of each rank and step
    log_interval : steps between the lines that rank 0 prints; TensorBoard gets every step, in the folder TB_LOGDIR
    profile      : rank 0 prints the time of all steps at the end
    seed         : None is the notebook: each rank draws a target of its own, and as no token tells an expert from
                   which rank it comes, the best that all can learn is the mean of the targets. With a seed the ranks
                   have one target, and runs repeat
    Experts learn by the gradient of the sum of all ranks' losses, the gate by that of their mean; AdamW's steps hardly
    depend on such a factor. Collective. Raises as EPMoE.
    """
    rank = dist.get_rank()
    if seed is not None:
        torch.manual_seed(seed + rank)
    model = EPMoE(cfg, rank, dist.get_world_size())
    context = model.ata.context
    target_proj = nn.Linear(cfg.hidden_dim, cfg.hidden_dim, bias=False).requires_grad_(False)
    alike = [*model.gate.parameters(), *([target_proj.weight] if seed is not None else [])]
    for parameter in alike:
        broadcast(context, parameter.detach(), 0)
    opt = torch.optim.AdamW([*model.gate.parameters(), *model.experts.parameters()], lr=lr, fused=True)
    writer = None
    if rank == 0:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(log_dir=os.environ.get("TB_LOGDIR"))

    start = last = time.perf_counter()
    for step in range(steps):
        x = torch.randn(bsz, cfg.hidden_dim, dtype=cfg.in_dtype)
        y = target_proj(x.float()).to(cfg.out_dtype)
        out_tokens, aux_loss = model(x)
        task_loss = nn.functional.mse_loss(out_tokens.float(), y.float())
        total_loss = task_loss + aux_alpha * aux_loss
        opt.zero_grad(set_to_none=True)
        total_loss.backward()
        ep.average_gradients(model.gate, context)
        opt.step()
        if writer is None:
            continue
        task, aux, total = task_loss.item(), aux_loss.item(), total_loss.item()
        for name, value in (("task", task), ("aux", aux), ("total", total)):
            writer.add_scalar(f"loss/{name}", value, step)
        if step % log_interval == 0:
            now = time.perf_counter()
            interval_s, last = now - last if step > 0 else 0.0, now
            writer.add_scalar("time/interval_s", interval_s, step)
            print(
                f"[step {step:05d}] task={task:.4f} aux={aux:.4f} total={total:.4f} interval_s={interval_s:.2f}",
                flush=True,
            )

    if profile and rank == 0:
        elapsed = time.perf_counter() - start
        each = elapsed / max(steps, 1) * 1000
        print(f"[ep] total {steps} steps time: {elapsed:.2f}s | {each:.2f} ms/step", flush=True)
    dist.barrier()
    if writer is not None:
        writer.close()
