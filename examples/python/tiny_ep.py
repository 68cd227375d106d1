"""Trains the notebook's expert-parallel layer on its toy task, a random linear map, with its settings.

    torchrun --nproc_per_node=2 examples/python/tiny_ep.py
    TB_LOGDIR=runs/tiny torchrun --nproc_per_node=2 examples/python/tiny_ep.py --steps 2000 --seed 0

TensorBoard finds the losses in TB_LOGDIR, which is ./runs/... where it is not set.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch
import torch.distributed as dist

from expar.tutorial import MoEConfig, init_distributed, train_tiny_ep


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-experts", type=int, default=16)
    parser.add_argument("--experts-per-token", type=int, default=2)
    parser.add_argument("--hidden-dim", type=int, default=256)
    parser.add_argument("--max-num-tokens", type=int, default=128)
    parser.add_argument("--capacity-factor", type=float)
    parser.add_argument("--steps", type=int, default=10000)
    parser.add_argument("--bsz", type=int, default=32, help="tokens of each rank and step")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--aux-alpha", type=float, default=1e-2)
    parser.add_argument("--log-interval", type=int, default=1000)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--seed", type=int, help="one target for all ranks; without, each draws its own")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    init_distributed()
    cfg = MoEConfig(
        args.num_experts,
        args.experts_per_token,
        args.hidden_dim,
        args.max_num_tokens,
        in_dtype=torch.float32,
        out_dtype=torch.float32,
        capacity_factor=args.capacity_factor,
    )
    train_tiny_ep(
        cfg,
        steps=args.steps,
        bsz=args.bsz,
        lr=args.lr,
        log_interval=args.log_interval,
        aux_alpha=args.aux_alpha,
        profile=args.profile,
        seed=args.seed,
    )
    if dist.get_rank() == 0:
        print("EP MoE tiny training finished.", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
