"""Ranks that are processes with a gloo process group, as torchrun starts them, for tests."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import traceback
from typing import Any, Callable

import torch
import torch.distributed as dist


def on_processes(ranks: int, body: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What body(*arguments) returns on each rank. Raises AssertionError with the tracebacks of those that failed."""
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [fork.Pipe(duplex=False) for _ in range(ranks)]
        children = [
            fork.Process(target=_rank_main, args=(rank, ranks, folder, send, body, arguments))
            for rank, (_, send) in enumerate(pipes)
        ]
        for child in children:
            child.start()
        for _, send in pipes:
            send.close()
        results = [_received(receive) for receive, _ in pipes]
        for child in children:
            child.join()
    failures = [f"rank {rank}: {text}" for rank, (good, text) in enumerate(results) if not good]
    assert not failures, "\n".join(failures)
    return [result for _, result in results]


def _received(receive) -> tuple[bool, Any]:
    try:
        return pickle.loads(receive.recv_bytes())
    except EOFError:
        return False, "died"


def _rank_main(rank, ranks, folder, send, body, arguments) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks))
    os.environ["EXPAR_TIMEOUT"] = "60"
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
        result = True, body(*arguments)
        dist.barrier()
    except BaseException:
        result = False, traceback.format_exc()
    send.send_bytes(pickle.dumps(result))
    send.close()
    os._exit(0)  # a failed rank must not wait for the others in a destructor
