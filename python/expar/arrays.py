"""What the package takes and gives as arrays, for type checkers."""

from __future__ import annotations

from typing import Any, Protocol


class Array(Protocol):
    """An array of NumPy, PyTorch or any other framework: what hands out its memory by DLPack.

    Arrays that expar returns are views of its memory: ``np.asarray(array)`` or ``torch.from_dlpack(array)``.
    """

    def __dlpack__(self) -> Any: ...

    def __dlpack_device__(self) -> Any: ...
