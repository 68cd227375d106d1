"""Llama 4, whose experts transformers computes apart from its registry: for every token, weighed before the experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .forward import travel


def block_forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """What takes the place of Llama4TextMoe.forward: only the chosen experts' rows travel and are computed.

    hidden_states : [..., H] · returns ([T, H], router logits [T, E]). Collective, as experts_forward.
    """
    x = hidden_states.reshape(-1, self.hidden_dim)
    scores, logits = self.router(x)
    ids = torch.topk(logits, self.top_k, dim=1).indices
    routed = travel(self.experts, x, ids, scores.gather(1, ids).float(), before=True)
    return self.shared_expert(x) + routed, logits
