"""Recorded routes, ``*.routes`` and ``*.routes.gz``: which experts a router chose for each token, in each layer.

One line of JSON (layers, tokens, top_k, experts, and whatever else its writer knew), then uint8
ids[layers][tokens][top_k], then, where there are any, little-endian uint16 weights * 10^4 of the same shape; all of it
in gzip, or plain. This is what ``expar plan --routes`` and ``expar bench --routes`` read.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import zlib
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from . import checks

# The limits of the command line's reader (io/routes.cpp).
_MAX_HEADER = 16 << 20
_MAX_EXTENT = 1 << 32
_MAX_EXPERTS = 256
# No stream of deflate makes more of a byte.
_MOST_OF_A_BYTE = 1032
_WEIGHT_ONE = 10000
_PIECE = 1 << 24


@dataclasses.dataclass(frozen=True, eq=False)
class Routes:
    """Routes of some tokens in all layers.

    ids     : [layers, T, K] int32, each in [0, E)
    experts : E
    weights : [layers, T, K] f32, or None where they were not recorded
    header  : what else the file's first line said
    """

    ids: NDArray[np.int32]
    experts: int
    weights: NDArray[np.float32] | None = None
    header: dict = dataclasses.field(default_factory=dict)

    def loads(self) -> NDArray[np.int64]:
        """[layers, E] how many slots chose each expert."""
        return np.stack([np.bincount(ids.ravel(), minlength=self.experts) for ids in self.ids])


def write_routes(path: checks.Path, routes: Routes) -> None:
    """Writes routes, in gzip where the name ends in ``.gz``. Weights are rounded to whole 10^-4.

    Raises ValueError: shapes that differ, more than 256 experts, more slots than experts, an id that is not from 0 to
    below E (the format has no -1), a weight that is not from 0 to 6.5535. OSError: cannot be written.
    """
    ids = checks.counts(routes.ids, (None, None, None), "ids")
    if ids.size == 0:
        raise ValueError(f"ids: shape {list(ids.shape)}, should be [layers, T, K] of at least 1 each")
    layers, tokens, topk = ids.shape
    _check_fit(topk, routes.experts, "routes")
    _check_ids(ids, routes.experts, "ids")
    header = {**routes.header, "layers": layers, "tokens": tokens, "top_k": topk, "experts": routes.experts}
    pieces = [json.dumps(header).encode() + b"\n", ids.astype(np.uint8).tobytes()]
    if routes.weights is not None:
        pieces.append(_weight_bytes(checks.numbers(routes.weights), ids.shape))
    with open(path, "wb") as file:
        if os.fspath(path).endswith(".gz"):
            # Without a time stamp the same routes are the same bytes.
            with gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as packed:
                packed.writelines(pieces)
        else:
            file.writelines(pieces)


def read_routes(path: checks.Path) -> Routes:
    """Reads all layers of a file, in gzip or plain.

    Raises OSError: cannot be read. ValueError: cut short or damaged, not of this format, or an expert that does not
    exist; it says where.
    Cost: 5 bytes per slot, 9 with weights. What a header promises and the file cannot hold is refused before that.
    """
    name = os.fspath(path)
    size = os.stat(path).st_size
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        source = gzip.GzipFile(fileobj=file) if packed else file
        try:
            return _read(source, size * (_MOST_OF_A_BYTE if packed else 1), name)
        except (EOFError, zlib.error, gzip.BadGzipFile):
            raise ValueError(f"{name} is cut short or damaged") from None


def _read(source: Any, most: int, name: str) -> Routes:
    line = source.readline(_MAX_HEADER)
    if not line.endswith(b"\n"):
        raise ValueError(f"{name} does not begin with a line of JSON")
    header = checks.parse_object(line, f"the first line of {name}")
    layers, tokens, topk, experts = (
        checks.whole_number(header, key, 1, f"the first line of {name}")
        for key in ("layers", "tokens", "top_k", "experts")
    )
    if max(layers, tokens) > _MAX_EXTENT:
        raise ValueError(f"the first line of {name}: {layers} layers of {tokens} tokens do not fit this format")
    _check_fit(topk, experts, name)
    slots = layers * tokens * topk
    if len(line) + slots > most:
        raise ValueError(f"{name} is cut short: its header promises {slots} slots")
    shape = (layers, tokens, topk)
    ids = np.frombuffer(_take(source, slots, name), dtype=np.uint8).reshape(shape).astype(np.int32)
    _check_ids(ids, experts, name)
    weights = None
    first = source.read(1)  # ends gzip's checksum too, where there are no weights
    if first:
        stored = np.frombuffer(first + _take(source, 2 * slots - 1, name), dtype="<u2").reshape(shape)
        weights = (stored / _WEIGHT_ONE).astype(np.float32)
        if source.read(1):
            raise ValueError(f"{name} goes on after the weights that its header promises")
    for key in ("layers", "tokens", "top_k", "experts"):
        del header[key]
    return Routes(ids=ids, experts=experts, weights=weights, header=header)


def _take(source: BinaryIO, size: int, name: str) -> bytes:
    """Exactly so many bytes; in pieces, since read() would make room for all of them at once."""
    pieces = []
    while size > 0:
        piece = source.read(min(size, _PIECE))
        if not piece:
            raise ValueError(f"{name} is cut short or damaged")
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def _check_fit(topk: int, experts: int, what: str) -> None:
    if not 1 <= topk <= experts <= _MAX_EXPERTS:
        raise ValueError(f"{what}: {topk} of {experts} experts do not fit this format, which has up to {_MAX_EXPERTS}")


def _check_ids(ids: NDArray, experts: int, what: str) -> None:
    if int(ids.max()) >= experts:
        layer, token, slot = (int(i) for i in np.argwhere(ids >= experts)[0])
        raise ValueError(
            f"{what}: token {token} has expert {ids[layer, token, slot]} in layer {layer}, not below {experts}"
        )


def _weight_bytes(weights: NDArray, shape: tuple) -> bytes:
    if weights.shape != shape:
        raise ValueError(f"weights: shape {list(weights.shape)}, but ids {list(shape)}")
    stored = np.rint(weights.astype(np.float64) * _WEIGHT_ONE)
    if not np.all((stored >= 0) & (stored <= np.iinfo(np.uint16).max)):  # NaN too
        raise ValueError("weights: not all are from 0 to 6.5535")
    return stored.astype("<u2").tobytes()
