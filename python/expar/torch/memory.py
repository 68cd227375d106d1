"""Memory that outlives its tensor, for results that every pass makes anew."""

from __future__ import annotations

import math
import weakref
from typing import Sequence

import torch

# By size in bytes: what nobody uses now.
_kept: dict[int, list[torch.Tensor]] = {}


def recycled(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """torch.empty(shape, dtype=dtype); when the tensor and all its views are gone, the next one of that size gets its
    memory.

    The first touch of fresh pages takes longer than most passes over them, and gradients are freed in every step. What
    is kept never exceeds what was in use at one time.
    """
    size = math.prod(shape) * dtype.itemsize
    if size == 0:
        return torch.empty(shape, dtype=dtype)
    kept = _kept.setdefault(size, [])
    try:
        block = kept.pop()  # threads may take turns between a look and a pop
    except IndexError:
        block = torch.empty(size, dtype=torch.uint8)
    memory = block.numpy()
    weakref.finalize(memory, kept.append, block).atexit = False
    return torch.from_numpy(memory).view(dtype).view(shape)


def rounded(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Itself where it is of that dtype, else a copy in recycled memory."""
    return tensor if tensor.dtype == dtype else recycled(tensor.shape, dtype).copy_(tensor)
