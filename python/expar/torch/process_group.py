"""Ranks on several hosts: what they show and send each other travels over a ``torch.distributed.ProcessGroup`` of gloo.

Each peer has a thread that sends to it what is queued and a thread that receives. All else (waiting, errors, deaths) is
the library's, as for ranks that share memory: ``expar.make_carried``.
"""

from __future__ import annotations

import atexit
import datetime
import json
import re
import threading
import time
import weakref
from queue import SimpleQueue
from typing import Optional

import torch
import torch.distributed as dist

from .. import Communicator, Deliveries, make_carried
from ..errors import BY_CODE, Error, Unsupported

# A frame travels as a head, its length and its first bytes, and then the rest of it. Most have none.
_HEAD = 128
_ROOM = _HEAD - 8
_END = -1  # in place of a length: nothing follows

# The first tag; every communicator of a group has one more. Other messages of the group must not have them.
_TAGS = 0x65787000
_made: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

# A rank hears from its peers as late as they like: how long to wait is the communicator's affair.
_FOREVER = datetime.timedelta(days=3650)
_SOON = 5.0  # seconds to send what is queued when a rank leaves, and to hear that the others have noticed

_open: set[_Carrier] = set()
_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


def communicator_over(group: dist.ProcessGroup, timeout: Optional[float] = None) -> Communicator:
    """The ranks of ``group``, in its order, as a communicator whose bytes travel over it, wherever they run.

    timeout : seconds that a call may wait; None: EXPAR_TIMEOUT, else 120
    All ranks of the group make its communicators in the same order; none waits for the others here. The group may be
    used for other things meanwhile. Let the communicator go before ``destroy_process_group``.
    Raises Unsupported (the group moves no tensors of the CPU by gloo: what to type), BadArgument (a timeout below 0).
    Cost: two threads for each other rank; a line shown is a message to each of them.
    """
    _require_gloo(group)
    number = _made[group] = _made.get(group, -1) + 1
    carrier = _Carrier(group, _TAGS + number)
    return make_carried(carrier, group.rank(), group.size(), timeout=timeout or 0.0)


def _require_gloo(group: dist.ProcessGroup) -> None:
    try:
        backend = group._get_backend(torch.device("cpu")).name()
    except RuntimeError:
        backend = "nothing"
    if backend != "gloo":
        raise Unsupported(
            f"process group '{group.group_name}' has {backend} for tensors of the CPU, should have gloo: call "
            "torch.distributed.init_process_group('cpu:gloo,cuda:nccl'), or pass "
            "torch.distributed.new_group(backend='gloo')"
        )


class _Carrier:
    """What expar.make_carried asks for."""

    def __init__(self, group: dist.ProcessGroup, tag: int) -> None:
        self._group, self._tag = group, tag
        self._queues = {peer: SimpleQueue() for peer in range(group.size()) if peer != group.rank()}
        self._senders: list[threading.Thread] = []
        self._store = dist.distributed_c10d._get_default_store()

    def open(self, deliveries: Deliveries) -> None:
        self.leave = deliveries.leave
        _open.add(self)
        for peer, queue in self._queues.items():
            wire = _Wire(self._group, peer, self._tag)
            self._senders.append(_start(_send_all, wire, queue))
            _start(_receive_all, wire, queue, deliveries)

    def send(self, peer: int, frame: object) -> None:
        self._queues[peer].put(torch.from_dlpack(frame))

    def settle(self, error: Error) -> Error:
        """Whose error comes to the store first is everyone's."""
        mine = json.dumps([error.code, error.message, error.rank, error.peer, error.operation])
        key = f"expar/{self._group.group_name}/{self._tag}/cause"
        code, *rest = json.loads(self._store.compare_set(key, "", mine))
        return BY_CODE[code](*rest)

    def close(self, failed: bool) -> None:
        _open.discard(self)
        for queue in self._queues.values():
            queue.put(None)
        if not failed:  # else a peer may never take what is sent to it
            _join(self._senders)


class _Wire:
    """One peer of a group, and a tag."""

    def __init__(self, group: dist.ProcessGroup, peer: int, tag: int) -> None:
        self.peer = peer
        self._group, self._tag = group, tag

    def send(self, tensor: torch.Tensor) -> None:
        self._group.send([tensor], self.peer, self._tag).wait(_FOREVER)

    def receive(self, tensor: torch.Tensor) -> None:
        self._group.recv([tensor], self.peer, self._tag).wait(_FOREVER)


def _bytes(size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.uint8, device="cpu")


def _send_all(wire: _Wire, queue: SimpleQueue) -> None:
    """Sends what is queued, up to None."""
    head = _bytes(_HEAD)
    length = head[:8].view(torch.int64)
    try:
        while (frame := queue.get()) is not None:
            length.fill_(len(frame))
            head[8 : 8 + len(frame)] = frame[:_ROOM]
            wire.send(head)
            if len(frame) > _ROOM:
                wire.send(frame[_ROOM:])
        length.fill_(_END)
        wire.send(head)
    except RuntimeError:  # the connection is gone, as the other thread says once all that came before is delivered
        while queue.get() is not None:
            pass


def _receive_all(wire: _Wire, queue: SimpleQueue, deliveries: Deliveries) -> None:
    """Delivers what comes, up to the end that the peer sends, and answers with one."""
    head = _bytes(_HEAD)
    length = head[:8].view(torch.int64)
    try:
        wire.receive(head)
        while (size := int(length)) != _END:
            frame = _bytes(size)
            frame[:_ROOM] = head[8 : 8 + size]
            if size > _ROOM:
                wire.receive(frame[_ROOM:])
            deliveries.deliver(wire.peer, frame)
            wire.receive(head)
    except RuntimeError as error:
        deliveries.lost(wire.peer, _in_short(error))
    finally:
        queue.put(None)


def _in_short(error: RuntimeError) -> str:
    """What gloo has to say, without where in its source."""
    return re.sub(r"^\[\S*\]\s*", "", str(error)).split(". ")[0]


def _start(work, *arguments) -> threading.Thread:
    thread = threading.Thread(target=work, args=arguments, name=f"expar{work.__name__}", daemon=True)
    _threads.add(thread)
    thread.start()
    return thread


def _join(threads) -> None:
    deadline = time.monotonic() + _SOON
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(max(0.0, deadline - time.monotonic()))


@atexit.register
def _leave() -> None:
    """A thread that is still in gloo when the interpreter goes would end the process by force."""
    for carrier in list(_open):
        carrier.leave()
    _join(list(_threads))
