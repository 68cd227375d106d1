"""Tokens to experts and back, in the shape of torchtitan's token dispatchers."""

from __future__ import annotations

from typing import NamedTuple, Optional

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .. import Context
from ..errors import BadArgument
from . import ranks
from .ops import Dispatched, combine, dispatch
from .styles import first_experts


class Metadata(NamedTuple):
    """What dispatch leaves for combine."""

    sent: Dispatched
    scores: Optional[Tensor]  # [T, K] f32, where combine weighs by them


class TokenDispatcher:
    """Carries each rank's tokens to the ranks along ep that hold their experts, and the results back.

    num_experts          : E, over all ranks; each rank holds the part of them that DTensor's Shard(0) gives it
    top_k                : K
    score_before_experts : rows are multiplied by their scores before the experts, else the results after them
    It has no state of a call: what combine needs is in the metadata. Before wire_meshes all experts are this rank's.
    """

    def __init__(self, num_experts: int, top_k: int, *, score_before_experts: bool = False) -> None:
        self.num_experts = num_experts
        self.top_k = top_k
        self.score_before_experts = score_before_experts
        self.wire_meshes(ep_mesh=None)

    def wire_meshes(self, *, ep_mesh: Optional[DeviceMesh]) -> None:
        """The ranks that share the experts: a mesh of one dim on the CPU; None: this rank alone. Collective over it."""
        if ep_mesh is not None and ep_mesh.ndim != 1:
            raise BadArgument(f"ep_mesh has dims {ep_mesh.mesh_dim_names}, should have one: hand in mesh['ep']")
        self.ep_mesh = ep_mesh
        self._context: Context = ranks.alone() if ep_mesh is None else ranks.context(ep_mesh)
        self._first_experts = first_experts(self.num_experts, self._context.size)

    def dispatch(
        self, x: Tensor, scores: Tensor, ids: Tensor, num_local_tokens_per_expert: Optional[Tensor] = None
    ) -> tuple[Tensor, Tensor, Metadata]:
        """Rows for this rank's experts.

        x       : [T, H] f32 or bf16
        scores  : [T, K]; f32 in use
        ids     : [T, K] integers in [-1, E); -1 is not routed
        num_local_tokens_per_expert : not needed, the ids tell
        returns : (routed [R, H] expert by expert, tokens_per_expert [L] int64, metadata)
        Differentiable in x and scores. Collective over ep_mesh, backward too. Raises as ``expar.torch.dispatch``.
        """
        if ids.shape != (x.shape[0], self.top_k) or scores.shape != ids.shape:
            raise BadArgument(
                f"x is {list(x.shape)}, scores {list(scores.shape)}, ids {list(ids.shape)}; the last two should be "
                f"[{x.shape[0]}, {self.top_k}]"
            )
        scores = scores.float()
        before = self.score_before_experts
        sent = dispatch(
            x,
            ids,
            scores if before else None,
            context=self._context,
            experts=self.num_experts,
            first_experts=self._first_experts,
        )
        if not before:
            return sent.rows, sent.counts, Metadata(sent, scores)
        return (sent.rows * sent.weights[:, None]).to(x.dtype), sent.counts, Metadata(sent, None)

    def combine(self, routed_out: Tensor, metadata: Metadata, x: Tensor) -> Tensor:
        """out [T, H] = for each token the sum of its experts' results, in slot order, weighed unless the rows were.

        routed_out : [R, H], row i the result of ``routed[i]``
        x          : [T, H], what was dispatched; nothing of it is read
        Differentiable in routed_out and the scores. Collective, backward too. Raises as ``expar.torch.combine``.
        """
        return combine(routed_out, metadata.sent, metadata.scores)
