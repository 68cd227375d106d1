"""Who computes together: ranks that PyTorch knows, as expar's.

The ranks of a process group on one host share memory, whoever has started them; where they are on several hosts, bytes
travel over the process group.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import secrets
import weakref
from typing import Optional, Union

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .. import Communicator, Context, Job, Parallel, default_timeout, init, join
from ..errors import BadArgument, Timeout
from .agree import told_to_all

Where = Union[None, dist.ProcessGroup, DeviceMesh]

DIMS = ("dp", "ep", "tp")

# What has been joined, as long as its process group lives: by ranks, in their order.
_joined: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_launched: list[Communicator] = []
# As long as these: contexts by their threads, and groups by the dims of a mesh.
_contexts: weakref.WeakKeyDictionary[Communicator, dict[int, Context]] = weakref.WeakKeyDictionary()
_parallels: weakref.WeakKeyDictionary[Context, dict[tuple, Parallel]] = weakref.WeakKeyDictionary()
_alone: dict[int, Context] = {}


def communicator(where: Where = None, *, timeout: Optional[float] = None) -> Communicator:
    """The ranks of a process group or of a whole device mesh, in its order; of None: of the default group or, without
    one, those that a launcher has started with this process (torchrun, mpirun, srun, expar launch), else one alone.

    timeout : seconds that a call may wait; None: EXPAR_TIMEOUT, else 120. Counts where the ranks are joined first.
    Ranks are joined once; later calls return the same. Collective over these ranks.
    Raises BadArgument (this process is none of them; a mesh that is not on the CPU), Timeout (naming a rank that did not
    come), and as expar.join.
    """
    if not dist.is_initialized():
        if where is not None:
            raise BadArgument("torch.distributed is not initialised: call torch.distributed.init_process_group('gloo')")
        if not _launched:
            _launched.append(init(timeout=timeout or 0.0))
        return _launched[0]
    ranks = _ranks_of(where)
    groups = _joined.setdefault(dist.group.WORLD, {})
    if ranks not in groups:
        groups[ranks] = _join(ranks, where, timeout or default_timeout())
    return groups[ranks]


def context(where: Where = None, *, threads: int = 0, timeout: Optional[float] = None) -> Context:
    """The expar.Context of communicator(where): what every operation takes. Made once; later calls return the same.

    threads : of this rank; 0: its share of the cores
    Collective over these ranks.
    """
    joined = communicator(where, timeout=timeout)
    known = _contexts.setdefault(joined, {})
    if threads not in known:
        known[threads] = Context(joined, threads=threads)
    return known[threads]


def alone() -> Context:
    """A context of this process alone, whoever it was started with."""
    process = os.getpid()  # a forked one needs its own
    if process not in _alone:
        _alone[process] = Context(join(Job("alone", secrets.token_hex(16), 0, 1, 0, 1)))
    return _alone[process]


def numbered(
    where: Union[Where, Context],
    rank: Optional[int],
    size: Optional[int],
    names: tuple[str, str] = ("rank", "world_size"),
    among: Optional[Context] = None,
) -> Context:
    """context(where) for a call that also says which rank this is and of how many; None: it does not say.

    where : may be a Context, as it is. None of size 1: this process alone
    names : what the call calls rank and size
    among : who are told what is wrong, where these ranks are some of those who meet next; None: these ranks
    Collective over the ranks, where they are new. Raises BadArgument (a rank or a size that is not theirs: on all who
    are told).
    """
    if isinstance(where, Context):
        found = where
    else:
        found = alone() if where is None and size == 1 else context(where)
    with told_to_all(among or found):
        for name, given, own in zip(names, (rank, size), (found.rank, found.size)):
            if given not in (None, own):
                raise BadArgument(f"{name} is {given}, but this is rank {found.rank} of {found.size}")
    return found


def parallel(mesh: DeviceMesh, *, threads: int = 0, timeout: Optional[float] = None) -> Parallel:
    """The groups of a mesh whose dims are called dp (replicas of the experts), ep (tokens travel among these) and tp
    (slices of the same experts), any of them; a mesh of one unnamed dim is ep. Made once; later calls return the same.

    Collective over the mesh. Raises BadArgument (a dim of another name), and as communicator().
    """
    names = mesh.mesh_dim_names or (("ep",) if mesh.ndim == 1 else None)
    if names is None or any(name not in DIMS for name in names):
        raise BadArgument(
            f"the mesh has dims {names}: name them by what the ranks along them share, "
            "init_device_mesh('cpu', (2, 4), mesh_dim_names=('dp', 'ep')); expar knows dp, ep and tp"
        )
    whole = context(mesh, threads=threads, timeout=timeout)
    known, dims = _parallels.setdefault(whole, {}), tuple(zip(names, mesh.mesh.shape))
    if dims not in known:
        known[dims] = Parallel(whole, list(dims))
    return known[dims]


def first_of(where: Union[Where, Context, Communicator, Parallel]) -> int:
    """The first of these ranks, as PyTorch numbers them: another for ranks that have none in common. 0 where PyTorch does
    not know them."""
    if not dist.is_initialized():
        return 0
    if isinstance(where, (DeviceMesh, dist.ProcessGroup)):
        return min(_ranks_of(where))
    if where is not None and where is _alone.get(os.getpid()):
        return dist.get_rank()
    for ranks, joined in _joined.get(dist.group.WORLD, {}).items():
        if where is joined or any(where is context for context in _contexts.get(joined, {}).values()):
            return min(ranks)
    return 0


def _ranks_of(where: Where) -> tuple[int, ...]:
    if isinstance(where, DeviceMesh):
        if where.device_type != "cpu":
            raise BadArgument(
                f"the mesh is on '{where.device_type}'; expar computes on the CPU: init_device_mesh('cpu', ...)"
            )
        ranks = where.mesh.flatten().tolist()
    else:
        ranks = dist.get_process_group_ranks(where or dist.group.WORLD)
    if dist.get_rank() not in ranks:
        raise BadArgument(f"rank {dist.get_rank()} is none of the ranks {ranks} that are to be joined")
    return tuple(ranks)


def _host() -> str:
    """The same for processes that can share memory and find each other's sockets."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    return f"{boot} {os.readlink('/proc/self/ns/net')} {os.getuid()}"


def _join(ranks: tuple[int, ...], where: Where, timeout: float) -> Communicator:
    """Ranks tell each other, through the store, where they are and what to call the job."""
    me, store = ranks.index(dist.get_rank()), dist.distributed_c10d._get_default_store()
    meeting = "expar/" + hashlib.sha256(repr(ranks).encode()).hexdigest()
    keys = [f"{meeting}/{rank}" for rank in ranks]
    store.set(keys[me], json.dumps({"host": _host(), "job": secrets.token_hex(16)}))
    try:
        store.wait(keys, datetime.timedelta(seconds=timeout))
    except RuntimeError as error:
        late = [rank for rank, key in zip(ranks, keys) if not store.check([key])]
        raise Timeout(
            f"ranks {late} are late: rank {ranks[me]} has waited {timeout:g} s for them to join; all ranks of "
            f"{list(ranks)} must make this context",
            rank=ranks[me],
            peer=late[0] if late else -1,
            operation="join",
        ) from error
    told = [json.loads(store.get(key)) for key in keys]
    if len({rank["host"] for rank in told}) == 1:
        job = Job("torch", told[0]["job"], me, len(ranks), me, len(ranks))
        return join(job, timeout=timeout)
    from .process_group import communicator_over

    return communicator_over(_group_of(ranks, where), timeout)


def _group_of(ranks: tuple[int, ...], where: Where) -> dist.ProcessGroup:
    if isinstance(where, DeviceMesh):
        if where.ndim == 1:
            return where.get_group()
        if len(ranks) == dist.get_world_size():
            return dist.group.WORLD
        raise BadArgument("a mesh of several dims on several hosts must have all ranks of the job")
    return where or dist.group.WORLD
