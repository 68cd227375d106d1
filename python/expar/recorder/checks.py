"""What is refused at the door: numbers that are no loads, files that are not what they say."""

from __future__ import annotations

import importlib
import json
import os
from typing import Any, Union

import numpy as np
from numpy.typing import NDArray

Path = Union[str, "os.PathLike[str]"]


def numbers(values: Any) -> NDArray:
    """An array of a tensor of any device, or of anything that NumPy takes. Raises ValueError: ragged."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    return np.asarray(values)


def whole_numbers(values: Any, what: str) -> NDArray[np.int64]:
    """The same as int64. Raises ValueError, beginning with `what`: anything but whole numbers of 63 bits."""
    try:
        array = numbers(values)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{what}: not an array of numbers: {error}") from None
    if array.size == 0:
        return array.astype(np.int64)
    if array.dtype.kind == "i" or (array.dtype.kind == "u" and array.max() <= np.iinfo(np.int64).max):
        return array.astype(np.int64)
    # Frameworks count in floats too. Beyond 2^53 they no longer count.
    if array.dtype.kind == "f" and np.all(np.abs(array) <= 2.0**53) and np.all(array == np.rint(array)):
        return array.astype(np.int64)
    raise ValueError(f"{what}: {array.dtype} values that are not all whole numbers of 63 bits")


def counts(values: Any, shape: tuple, what: str) -> NDArray[np.int64]:
    """Whole numbers from 0, of `shape`, where None stands for any extent. Raises ValueError, beginning with `what`."""
    array = whole_numbers(values, what)
    if array.ndim != len(shape) or any(want is not None and want != have for want, have in zip(shape, array.shape)):
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{what}: shape {list(array.shape)}, should be [{wanted}]")
    if array.size and array.min() < 0:
        where = np.unravel_index(int(array.argmin()), array.shape)
        raise ValueError(f"{what}{[int(i) for i in where]} = {array.min()} is negative")
    return array


def whole_number(values: dict, key: str, least: int, what: str) -> int:
    """The value of `key`, from `least`. Raises ValueError, beginning with `what`."""
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{what} has no whole number '{key}' from {least}")
    return value


def parse_object(text: str | bytes, what: str) -> dict:
    """An object of JSON. Raises ValueError, beginning with `what`."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not JSON, or cut short: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{what} is JSON, but not an object")
    return value


def read_object(path: Path) -> dict:
    """The object in a file of JSON. Raises OSError: cannot be read. ValueError: not an object of JSON."""
    with open(path, "rb") as file:
        return parse_object(file.read(), os.fspath(path))


def needed(module: str, package: str, purpose: str) -> Any:
    """Imports what only some callers need. Raises ImportError that says what to type."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{purpose} needs {package}, which cannot be imported ({error}): pip install {package}"
        ) from None


def to_logical(loads: NDArray[np.int64], logical_of: NDArray[np.int64], experts: int) -> NDArray[np.int64]:
    """The loads of experts from those of their replicas.

    loads      : [layers, places]
    logical_of : [layers, places], each in [0, experts)
    returns    : [layers, experts]
    """
    result = np.zeros((loads.shape[0], experts), dtype=np.int64)
    np.add.at(result, (np.arange(loads.shape[0])[:, None], logical_of), loads)
    return result
