"""The processes of one peer: they sleep until it is their turn."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import pathlib
import tempfile
import time
import traceback
import warnings
from typing import Any, Optional

import torch
import torch.distributed as dist
import torch.multiprocessing  # noqa: F401  (tensors in shared memory travel by name)
from torch import Tensor

from .peer import Layer, Peer
from .task import Task, Weights

_START = 0.002  # seconds in which all ranks of a peer wake


class Failed(Exception):
    """A rank's traceback."""


@dataclasses.dataclass
class Result:
    """What one rank has got."""

    parts: dict[str, Tensor]  # by name: "out", or those of Gradients
    seconds: float
    cpu: float  # seconds of CPU time


class Ranks:
    """Raises Failed where a rank cannot build its layer."""

    def __init__(self, peer: Peer, task: Task, weights: Weights) -> None:
        self.peer = peer
        self.folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("forkserver")
        # What takes seconds to import, once; no threads have started then.
        context.set_forkserver_preload([__name__, "transformers.models.qwen3_moe.modeling_qwen3_moe"])
        self.pipes, self.processes = [], []
        for rank in range(peer.ranks):
            here, there = context.Pipe()
            arguments = (peer, task, weights, rank, self.folder.name, there)
            self.processes.append(context.Process(target=_main, args=arguments, daemon=True))
            self.processes[-1].start()
            there.close()
            self.pipes.append(here)
        self._answers()

    def give(self, x: Tensor, dout: Tensor) -> None:
        """The tokens of all ranks, in shared memory."""
        self._ask("give", x, dout)

    def turn(self, what: str, calls: int) -> tuple[float, float]:
        """Microseconds per call, from the first rank's start to the last one's end, and of CPU time of all ranks. A turn
        of several calls begins with one that is not timed, because others have had the caches."""
        turns = self._ask("turn", what, calls, time.perf_counter() + _START)
        seconds = max(end for _, end, _ in turns) - min(begin for begin, _, _ in turns)
        return seconds / calls * 1e6, sum(cpu for _, _, cpu in turns) / calls * 1e6

    def results(self, what: str) -> list[Result]:
        """Of a call of its own, from each rank."""
        return self._ask("result", what)

    def end(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join()
        self.folder.cleanup()

    def _ask(self, *message: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send(message)
        return self._answers()

    def _answers(self) -> list[Any]:
        answers = []
        for pipe in self.pipes:
            try:
                good, answer = pipe.recv()
            except EOFError:
                good, answer = False, "died"
            if not good:
                self.kill()
                raise Failed(answer)
            answers.append(answer)
        return answers

    def kill(self) -> None:
        """Ends them, also where one waits for another."""
        for process in self.processes:
            process.kill()
        self.end()


class _Rank:
    def __init__(self, peer: Peer, task: Task, weights: Weights, rank: int, folder: str) -> None:
        torch.set_num_threads(peer.threads)
        if peer.ranks > 1:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(peer.ranks), LOCAL_RANK=str(rank))
            os.environ["LOCAL_WORLD_SIZE"] = str(peer.ranks)
            store = pathlib.Path(folder) / "store"
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=peer.ranks)
        self.rank, self.ranks = rank, peer.ranks
        self.layer: Layer = peer.build(task, weights, rank)

    def give(self, x: Tensor, dout: Tensor) -> None:
        self.x, self.dout = (t.chunk(self.ranks)[self.rank] for t in (x, dout))

    def turn(self, what: str, calls: int, start: float) -> tuple[float, float, float]:
        if calls > 1:
            self._call(what)
        else:
            while time.perf_counter() < start:
                pass
        begin, cpu = time.perf_counter(), time.process_time()
        for _ in range(calls):
            self._call(what)
        end, cpu = time.perf_counter(), time.process_time() - cpu
        self.layer.forget()
        return begin, end, cpu

    def result(self, what: str) -> Result:
        begin, cpu = time.perf_counter(), time.process_time()
        out = self._call(what)
        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
        parts = {"out": out} if what == "forward" else vars(self.layer.gradients())
        self.layer.forget()
        return Result(parts, seconds, cpu)

    def _call(self, what: str) -> Optional[Tensor]:
        return self.layer.forward(self.x) if what == "forward" else self.layer.step(self.x, self.dout)


def _main(peer: Peer, task: Task, weights: Weights, rank: int, folder: str, pipe) -> None:
    warnings.simplefilter("ignore")
    try:
        doer = _Rank(peer, task, weights, rank, folder)
        pipe.send((True, None))
        while True:
            name, *arguments = pipe.recv()
            pipe.send((True, getattr(doer, name)(*arguments)))
    except EOFError:
        pass
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    os._exit(0)  # the threads of gloo would outlive what they use
