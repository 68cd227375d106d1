"""Tokens to experts and back in the notebook's form: padded buffers, and a line of metadata beside each row.

Both ways are an expar dispatch. What else the metadata says of a row travels beside it, as the bits of its weight.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

import expar.torch as ep
from expar.torch.agree import told_to_all
from expar.torch.ranks import numbered

from ..errors import BadArgument
from .config import MoEConfig, keep_within

# Smaller numbers have the bits of a finite float32.
_NUMBERS = 0x7F800000


class PyTorchAllToAll:
    """Carries rows once to each rank that holds one of their experts, and results back. For any number of ranks."""

    META_DIM = 5  # global_exp, src_rank, src_token, src_k, pad

    def __init__(self, cfg: MoEConfig, rank: Optional[int] = None, world_size: Optional[int] = None) -> None:
        """rank, world_size: of torch.distributed, which is the default. Collective.

        Raises BadArgument (ranks that cannot hold as many experts each; buffers too large to number their rows).
        """
        self.context = numbered(None, rank, world_size)
        self.cfg = cfg
        self.rank, self.world_size = self.context.rank, self.context.size
        if cfg.num_experts % self.world_size != 0:
            raise BadArgument(f"num_experts is {cfg.num_experts}, should be divisible by the {self.world_size} ranks")
        self.num_local_experts = cfg.num_experts // self.world_size
        self.max_recv = cfg.max_num_tokens * self.world_size
        if self.max_recv * cfg.experts_per_token >= _NUMBERS:
            raise BadArgument(f"max_num_tokens is {cfg.max_num_tokens}, too large to number the slots of all ranks")

    def dispatch(self, dp_x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows for this rank's experts, in the order of (rank, token, k) each.

        dp_x    : [T, H], T up to max_num_tokens and different on each rank
        indices : [T, K] integers in [-1, E); -1 goes nowhere. Slots beyond the configuration's capacity are left out
        returns : expert_num_tokens [L] int32, expert_x [L, max_recv, H] of in_dtype, expert_meta [L, max_recv, 5]
                  int32; zeros behind the rows of an expert
        Differentiable in dp_x. Collective, backward too: the loss of a rank that got no rows uses expert_x as well.
        Raises BadArgument (too many tokens), and as expar.torch.dispatch.
        """
        cfg = self.cfg
        with told_to_all(self.context):
            if indices.dim() != 2 or indices.shape[0] != dp_x.shape[0]:
                shapes = f"dp_x is {list(dp_x.shape)}, indices {list(indices.shape)}"
                raise BadArgument(f"{shapes}; should be [T, H] and [T, K]")
            tokens, topk = indices.shape
            if tokens > cfg.max_num_tokens:
                raise BadArgument(f"{tokens} tokens, max_num_tokens is {cfg.max_num_tokens}: raise it")
        places = torch.arange(tokens * topk, dtype=torch.int32) + self.rank * cfg.max_num_tokens * topk
        ids = keep_within(cfg.capacity(tokens), indices)
        sent = self._send(dp_x.to(cfg.in_dtype), ids, places.view(tokens, topk), cfg.num_experts)
        most = max(sent.counts.tolist())
        with told_to_all(self.context):
            if most > self.max_recv:
                raise BadArgument(f"an expert got {most} rows, room is for {self.max_recv}: some token chose it twice")
        experts = torch.arange(self.num_local_experts).repeat_interleave(sent.counts)
        slots = sent.weights.view(torch.int32)
        columns = [
            experts + self.rank * self.num_local_experts,
            slots // (cfg.max_num_tokens * topk),
            slots // topk % cfg.max_num_tokens,
            slots % topk,
            torch.zeros_like(slots),
        ]
        first = sent.counts.cumsum(0) - sent.counts
        at = torch.arange(len(experts)) - first[experts] + experts * self.max_recv
        x, meta = (
            rows.new_zeros(self.num_local_experts * self.max_recv, rows.shape[1])
            .index_copy_(0, at, rows)
            .view(self.num_local_experts, self.max_recv, -1)
            for rows in (sent.rows.to(cfg.in_dtype), torch.stack(columns, 1).to(torch.int32))
        )
        return sent.counts.to(torch.int32), x, meta

    def combine(
        self, out_tokens: Tensor, weights: Tensor, expert_meta: Tensor, expert_y: Tensor, expert_num_tokens: Tensor
    ) -> Tensor:
        """out_tokens plus, for each token, its experts' results times their weights, in the order of k, in float32.

        out_tokens        : [max_num_tokens, H] or [T, H], what results are added to
        weights           : [T, K], of the tokens that this rank sent
        expert_meta       : [L, max_recv, 5] of dispatch: each row goes where its line says
        expert_y          : [L, max_recv, H] results
        expert_num_tokens : [L] of dispatch
        returns           : as out_tokens, a new tensor
        Differentiable in out_tokens, weights and expert_y. Collective, backward too. Raises as expar.torch.dispatch.
        """
        topk = weights.shape[1]
        filled = torch.arange(expert_y.shape[1]) < expert_num_tokens[:, None]
        y, meta = expert_y[filled], expert_meta[filled]
        if torch.is_grad_enabled() and not y.requires_grad:
            y.requires_grad_()  # a rank whose experts had no rows goes backward with the others
        home = self._send(y, meta[:, 1:2], meta[:, 2:3] * topk + meta[:, 3:4], self.world_size)
        slots = home.weights.view(torch.int32).long()
        order = slots.argsort()
        slots, rows = slots[order], home.rows[order].float()
        total = torch.zeros_like(out_tokens, dtype=torch.float32)
        total = total.index_add(0, slots // topk, rows * weights.float().flatten()[slots, None])
        return (total + out_tokens.float()).to(out_tokens.dtype)

    def _send(self, rows: Tensor, ids: Tensor, numbers: Tensor, experts: int) -> ep.Dispatched:
        """Rows of float16 travel as such and arrive as float32, which holds them exactly."""
        half = rows.dtype == torch.float16
        return ep.dispatch(
            rows.float() if half else rows,
            ids,
            numbers.to(torch.int32).view(torch.float32),
            context=self.context,
            experts=experts,
            payload="f16" if half else None,
        )
