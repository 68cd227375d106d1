"""Selective activation checkpointing: what has been communicated is kept, what can be computed is computed again.

::

    torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False, context_fn=expar.torch.checkpoint_context)
"""

from __future__ import annotations

from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

# Operators of expar that stay on their rank; whatever else there is communicates.
LOCAL = frozenset({"expar::grouped_mm", "expar::activate", "expar::copy_over"})


def checkpoint_policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """MUST_SAVE for every operator of expar that communicates, PREFER_RECOMPUTE for all others.

    For torch.utils.checkpoint.create_selective_checkpoint_contexts, or to be asked first by a policy of one's own.
    """
    name = op.name() if hasattr(op, "namespace") else ""
    if name.startswith("expar::") and name.split(".")[0] not in LOCAL:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_context() -> tuple[Any, Any]:
    """The ``context_fn`` of torch.utils.checkpoint.checkpoint(..., use_reentrant=False) that repeats no communication.

    The rows that arrived at this rank and those that came home stay in memory; routers, experts and all else run again.
    """
    return create_selective_checkpoint_contexts(checkpoint_policy)
