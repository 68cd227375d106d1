"""Memory that passes use one after another."""

from __future__ import annotations

import threading
from typing import List, Optional, Sequence

import torch
from torch import Tensor


class Scratch(threading.local):
    """Memory of this thread for gradients until they are rounded to a layer's bf16; all its layers use it. It is kept:
    the first touch of fresh pages takes longer than the pass that writes them."""

    memory: Optional[Tensor] = None

    def gradients(self, parameters: Sequence[Tensor]) -> List[Tensor]:
        """f32 of the shapes of parameters; of those that are f32 themselves, memory of its own."""
        sizes = [0 if p.dtype == torch.float32 else -(-p.numel() // 16) * 16 for p in parameters]  # whole cache lines
        if self.memory is None or self.memory.numel() < sum(sizes):
            self.memory = None
            self.memory = torch.empty(sum(sizes))
        parts = self.memory[: sum(sizes)].split(sizes)
        return [
            torch.empty(p.shape) if p.dtype == torch.float32 else part[: p.numel()].view(p.shape)
            for p, part in zip(parameters, parts)
        ]


rounded_later = Scratch()
