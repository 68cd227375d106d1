"""Memory that outlives its tensor, for results that every pass makes anew."""

from __future__ import annotations

import math
import threading
import weakref
from collections import deque
from typing import Sequence

import torch


class _Memory:
    """Blocks of bytes. What is kept and what is in use are together never more than was in use at one time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._freed: deque[torch.Tensor] = deque()  # blocks are freed in the middle of anything, also of take
        self._kept: dict[int, list[torch.Tensor]] = {}  # by size, first the one not taken for longest
        self._used = self._most = 0

    def take(self, size: int) -> torch.Tensor:
        with self._lock:
            while self._freed:
                block = self._freed.popleft()
                self._kept.setdefault(len(block), []).append(block)
                self._used -= len(block)
            self._used += size
            self._most = max(self._most, self._used)
            same = self._kept.pop(size, [])
            if not same:
                self._drop()
                return torch.empty(size, dtype=torch.uint8)
            block = same.pop()
            if same:
                self._kept[size] = same
            return block

    def _drop(self) -> None:
        """What is too much now, of the sizes first that were not taken for longest."""
        excess = self._used - self._most + sum(size * len(blocks) for size, blocks in self._kept.items())
        while excess > 0:
            size, blocks = next(iter(self._kept.items()))
            blocks.pop()
            excess -= size
            if not blocks:
                del self._kept[size]

    def free(self, block: torch.Tensor) -> None:
        self._freed.append(block)

    def kept(self) -> int:
        """Bytes that wait to be taken, for tests."""
        return sum(len(block) for blocks in (self._freed, *self._kept.values()) for block in blocks)


_memory = _Memory()


def recycled(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """torch.empty(shape, dtype=dtype); when the tensor and all its views are gone, the next one of that size gets its
    memory.

    The first touch of fresh pages takes longer than most passes over them, and gradients are freed in every step. As
    much as was in use at one time stays with the process.
    """
    size = math.prod(shape) * dtype.itemsize
    if size == 0:
        return torch.empty(shape, dtype=dtype)
    block = _memory.take(size)
    memory = block.numpy()
    weakref.finalize(memory, _memory.free, block).atexit = False
    return torch.from_numpy(memory).view(dtype).view(shape)


def rounded(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Itself where it is of that dtype, else a copy in recycled memory."""
    return tensor if tensor.dtype == dtype else recycled(tensor.shape, dtype).copy_(tensor)
