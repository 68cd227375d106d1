"""What an operator leaves for its backward pass and PyTorch cannot hold, tied to the life of a tensor.

An operator returns a handle among its tensors: its bits are the state's number. Autograd, compiled graphs and activation
checkpoints keep the handle as they keep any tensor, and with its memory goes the state.

The number is spelt as a float64: all numbers below 2^52 are then values next to 0, so that whoever compares two runs of
an operator, as torch.library.opcheck does, finds their handles alike.
"""

from __future__ import annotations

import atexit
import itertools
import weakref
from typing import Any

import numpy as np
import torch

from ..errors import BadArgument

_states: dict[int, Any] = {}
_numbers = itertools.count(1)
# The interpreter ends without telling who still holds a graph.
atexit.register(_states.clear)


def attach(state: Any) -> torch.Tensor:
    """A handle [1] float64 that keeps ``state`` until its memory is freed."""
    number = next(_numbers)
    memory = np.array([number], np.int64)
    _states[number] = state
    weakref.finalize(memory, _states.pop, number).atexit = False
    return torch.from_numpy(memory).view(torch.float64)


def fake_handle(like: torch.Tensor) -> torch.Tensor:
    """The same where operators are only traced."""
    return like.new_empty(1, dtype=torch.float64)


def state_of(handle: torch.Tensor) -> Any:
    """Raises BadArgument where the handle's own memory is gone, or it comes from an operator that was only traced."""
    try:
        return _states[handle.view(torch.int64).item()]
    except KeyError:
        raise BadArgument("this handle's pass is over: keep the tensor that the operator returned") from None


def live_states() -> int:
    """How many states there are, for tests of leaks."""
    return len(_states)
