"""Keeps the loads, and where they are given the routes, of the newest steps."""

from __future__ import annotations

import dataclasses
import json
import operator
import os
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import checks
from .routes import Routes
from .statistics import balancedness, gini, max_over_mean, rank_loads

_FORMAT = "expar.loads"
_VERSION = 1


@dataclasses.dataclass
class _Step:
    loads: NDArray[np.int64]  # [layers, E]
    ids: list[list[NDArray]]  # of each layer, pieces [T, K]


class Recorder:
    """Loads of expert layers, ``[S, layers, E]``, of the newest S steps: at most `window` of them.

    layers : expert layers of the model
    experts: E, of each layer
    window : steps that are kept, None for all; by default as many as vLLM's ``window_size``

    Not collective: each rank records what it knows. Where ranks know only their own tokens, `merged` adds them up.
    Raises ValueError: a size below 1.
    Cost: 8 layers E bytes per step, and 2 or 4 bytes per slot where routes are recorded.
    """

    def __init__(self, layers: int, experts: int, window: int | None = 1000):
        for name, size in (("layers", layers), ("experts", experts), ("window", 1 if window is None else window)):
            if size < 1:
                raise ValueError(f"{name} = {size}, should be at least 1")
        self.layers = layers
        self.experts = experts
        self.window = window
        self.forgotten: int | None = None  # the newest step that has left the window
        self._window: dict[int, _Step] = {}  # by number, oldest first

    def record(self, step: int, layer: int, load: Any = None, routes: Any = None) -> None:
        """Adds to the loads of one layer in one step. Several calls for one layer and step add up: micro-batches, say.

        step   : one that is in the window, or one after all of them
        load   : [E] counts, from NumPy or PyTorch; or what has them as its ``.load``, such as a MoELayer; None: counted
                 from `routes`
        routes : [T, K] the experts of each token, -1 where a slot was not routed; kept with the step
        Raises ValueError: no such layer, a negative or older step, other shapes, negative or broken numbers; nothing
        has been recorded then.
        """
        if not 0 <= layer < self.layers:
            raise ValueError(f"layer = {layer}, should be from 0 to {self.layers - 1}")
        step = operator.index(step)
        if step < 0:
            raise ValueError(f"step = {step} is negative")
        newest = next(reversed(self._window), None)
        if newest is not None and step < newest and step not in self._window:
            raise ValueError(f"step = {step} is neither in the window nor after its newest, {newest}")
        ids = None if routes is None else self._checked_routes(routes)
        if load is None:
            if ids is None:
                raise ValueError("record needs a load, or routes to count it from")
            load = np.bincount(ids[ids >= 0], minlength=self.experts)
        load = checks.counts(getattr(load, "load", load), (self.experts,), "load")

        kept = self._kept(step)
        kept.loads[layer] += load
        if ids is not None:
            kept.ids[layer].append(ids)

    @property
    def steps(self) -> list[int]:
        """The steps in the window, ascending."""
        return list(self._window)

    @property
    def loads(self) -> NDArray[np.int64]:
        """[S, layers, E] int64, a copy; `steps` says which steps. A layer that recorded nothing in a step has zeros."""
        return np.array([kept.loads for kept in self._window.values()], dtype=np.int64).reshape(
            len(self._window), self.layers, self.experts
        )

    def total(self) -> NDArray[np.int64]:
        """[layers, E] int64, summed over the window: what rebalancers take, such as vLLM's global_expert_load."""
        result = np.zeros((self.layers, self.experts), dtype=np.int64)
        for kept in self._window.values():
            result += kept.loads
        return result

    def max_over_mean(self) -> NDArray[np.float64]:
        """[layers] of the experts' total loads; NaN where nothing was routed."""
        return max_over_mean(self.total())

    def gini(self) -> NDArray[np.float64]:
        """[layers] of the experts' total loads; NaN where nothing was routed."""
        return gini(self.total())

    def balancedness(self, ranks: int) -> float:
        """vLLM's mean over max of the loads of ranks that hold the experts in order, 1 if they are even."""
        return balancedness(rank_loads(self.total(), ranks))

    def routes(self) -> Routes:
        """All recorded routes of the window, step after step: what `write_routes` takes.

        Raises ValueError: none were recorded, or layers differ in their tokens or slots.
        """
        layers = []
        for layer in range(self.layers):
            pieces = [piece for kept in self._window.values() for piece in kept.ids[layer]]
            if not pieces:
                raise ValueError(f"no routes of layer {layer} are in the window: give them to record()")
            if len({piece.shape[1] for piece in pieces}) > 1:
                raise ValueError(f"the routes of layer {layer} differ in their slots per token")
            layers.append(np.concatenate(pieces))
        for layer, ids in enumerate(layers):
            if ids.shape != layers[0].shape:
                raise ValueError(f"layer {layer} has routes {list(ids.shape)}, but layer 0 {list(layers[0].shape)}")
        return Routes(ids=np.stack(layers).astype(np.int32), experts=self.experts)

    @classmethod
    def merged(cls, recorders: Iterable[Recorder]) -> Recorder:
        """The sum of what several ranks recorded, each of its own tokens, with the first one's window.

        Steps that have left the window of any of them are left out: their sum would be that of some ranks only.
        Routes follow one another in the order of the recorders.
        Raises ValueError: none, or they differ in layers or experts.
        """
        recorders = list(recorders)
        if not recorders:
            raise ValueError("there is no recorder to merge")
        first = recorders[0]
        result = cls(first.layers, first.experts, first.window)
        for rank, other in enumerate(recorders):
            if (other.layers, other.experts) != (first.layers, first.experts):
                raise ValueError(
                    f"recorder {rank} has {other.layers} layers of {other.experts} experts, but recorder 0 "
                    f"{first.layers} of {first.experts}"
                )
        forgotten = [other.forgotten for other in recorders if other.forgotten is not None]
        result.forgotten = max(forgotten, default=None)
        for step in sorted({step for other in recorders for step in other.steps}):
            if result.forgotten is not None and step <= result.forgotten:
                continue
            sum_of_ranks = result._kept(step)
            for other in recorders:
                if step not in other._window:
                    continue
                sum_of_ranks.loads += other._window[step].loads
                for all_pieces, pieces in zip(sum_of_ranks.ids, other._window[step].ids):
                    all_pieces.extend(pieces)
        return result

    def write_json(self, path: checks.Path) -> None:
        """Writes steps and loads, not routes, as one object of JSON; whole numbers are exact.

        Keys: format "expar.loads", version 1, layers, experts, window, forgotten, steps [S], loads [S][layers][E].
        Raises OSError: cannot be written.
        """
        value = {
            "format": _FORMAT,
            "version": _VERSION,
            "layers": self.layers,
            "experts": self.experts,
            "window": self.window,
            "forgotten": self.forgotten,
            "steps": self.steps,
            "loads": self.loads.tolist(),
        }
        with open(path, "w", encoding="utf-8") as file:
            json.dump(value, file)
            file.write("\n")

    @classmethod
    def read_json(cls, path: checks.Path) -> Recorder:
        """What write_json wrote.

        Raises OSError: cannot be read. ValueError: cut short, not of this format, or it contradicts itself.
        """
        name = os.fspath(path)
        value = checks.read_object(path)
        if value.get("format") != _FORMAT or value.get("version") != _VERSION:
            raise ValueError(f"{name} is not of the format {_FORMAT}, version {_VERSION}")
        layers = checks.whole_number(value, "layers", 1, name)
        experts = checks.whole_number(value, "experts", 1, name)
        window = None if value.get("window") is None else checks.whole_number(value, "window", 1, name)
        steps = checks.counts(value.get("steps"), (None,), f"{name}: steps")
        # Without steps the lists do not tell their extents.
        shape = (len(steps), layers, experts) if len(steps) else (0,)
        loads = checks.counts(value.get("loads"), shape, f"{name}: loads")
        result = cls.of(steps, loads.reshape(len(steps), layers, experts), window, f"{name}: ")
        if value.get("forgotten") is not None:
            result.forgotten = checks.whole_number(value, "forgotten", 0, name)
        return result

    @classmethod
    def of(cls, steps: ArrayLike, loads: ArrayLike, window: int | None = None, what: str = "") -> Recorder:
        """A recorder of these loads.

        steps : [S], ascending
        loads : [S, layers, E], from 0
        what  : how errors begin
        Raises ValueError: other shapes, negative or broken numbers, steps that do not ascend.
        """
        loads = checks.counts(loads, (None, None, None), f"{what}loads")
        steps = checks.counts(steps, (len(loads),), f"{what}steps")
        if np.any(np.diff(steps) <= 0):
            raise ValueError(f"{what}steps do not ascend")
        result = cls(loads.shape[1], loads.shape[2], window)
        for step, load in zip(steps.tolist(), loads):
            result._kept(step).loads[...] = load
        return result

    def to_tensorboard(self, writer: Any, step: int | None = None) -> None:
        """Adds one step to TensorBoard, under the names that ``expar train --log-dir`` uses.

        ``load/layerL`` is a histogram over the numbers of the experts, ``load/layerL/expertE`` and
        ``load/layerL/max_over_mean`` are curves; the last is left out where nothing was routed.
        writer : a SummaryWriter of torch.utils.tensorboard or tensorboardX
        step   : by default the newest
        Raises ValueError: the step is not in the window.
        """
        if step is None:
            step = next(reversed(self._window), None)
        if step not in self._window:
            raise ValueError(f"step {step} is not in the window")
        number = np.arange(self.experts, dtype=np.float64)
        for layer, load in enumerate(self._window[step].loads):
            tag = f"load/layer{layer}"
            writer.add_histogram_raw(
                tag,
                min=0.0,
                max=float(self.experts),
                num=float(load.sum()),
                sum=float((number * load).sum()),
                sum_squares=float((number * number * load).sum()),
                bucket_limits=(number + 1).tolist(),
                bucket_counts=load.astype(np.float64).tolist(),
                global_step=step,
            )
            for expert, rows in enumerate(load):
                writer.add_scalar(f"{tag}/expert{expert}", float(rows), step)
            if load.any():
                writer.add_scalar(f"{tag}/max_over_mean", float(max_over_mean(load)), step)

    def _checked_routes(self, routes: Any) -> NDArray:
        ids = checks.whole_numbers(routes, "routes")
        if ids.ndim != 2 or ids.shape[1] < 1:
            raise ValueError(f"routes: shape {list(ids.shape)}, should be [T, K]")
        wrong = np.argwhere((ids < -1) | (ids >= self.experts))
        if len(wrong):
            token, slot = (int(i) for i in wrong[0])
            raise ValueError(f"routes[{token}, {slot}] = {ids[token, slot]}, should be -1 or below {self.experts}")
        return ids.astype(np.int16 if self.experts <= 32767 else np.int32)

    def _kept(self, step: int) -> _Step:
        """What the window keeps of a step; it moves on to a new one."""
        if step not in self._window:
            loads = np.zeros((self.layers, self.experts), dtype=np.int64)
            self._window[step] = _Step(loads, ids=[[] for _ in range(self.layers)])
            if self.window is not None and len(self._window) > self.window:
                self.forgotten = next(iter(self._window))
                del self._window[self.forgotten]
        return self._window[step]
