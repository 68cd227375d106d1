"""``generate`` over ranks: passes are collective, so a rank that has its tokens takes part until all have theirs."""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch

from .. import Context, all_reduce


@dataclass(frozen=True)
class Together:
    """``model.expar_ranks``: who generates in step."""

    context: Context

    def __deepcopy__(self, memo: dict[int, object]) -> Together:
        return self  # copies of a model live on the same ranks


def generate_together(model: Any, context: Context) -> None:
    """Makes ``model.generate`` transformers' own with synced_gpus=True, over the ranks of ``context`` by expar, so that
    it needs no torch.distributed. A rank's tokens are those that it would generate alone."""
    model.expar_ranks = Together(context)
    model.generate = MethodType(_generate, model)
    model._has_unfinished_sequences = MethodType(_has_unfinished_sequences, model)


def _generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("synced_gpus") is None:
        kwargs["synced_gpus"] = True
    return type(self).generate(self, *args, **kwargs)


def _has_unfinished_sequences(self: Any, this_peer_finished: bool, synced_gpus: bool, device: torch.device) -> bool:
    """Where this rank has finished it returns once all have: False."""
    if not synced_gpus:
        return not this_peer_finished
    unfinished = _any(self.expar_ranks.context, not this_peer_finished)
    while unfinished and this_peer_finished:
        # The others' next pass, of a token that does not count: this rank's own cache may be full.
        self(torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
        unfinished = _any(self.expar_ranks.context, False)
    return unfinished


def _any(context: Context, mine: bool) -> bool:
    """Whether it is so on some rank. Collective."""
    found = torch.empty(1)
    all_reduce(context, torch.tensor([[float(mine)]]), found)
    return bool(found > 0)
