"""The ranks of a call that names its group three times: the group, the rank in it and its size."""

from __future__ import annotations

from typing import Union

from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from .. import Context
from ..errors import BadArgument
from ..torch import ranks

Group = Union[None, ProcessGroup, DeviceMesh, Context]


def context_of_group(name: str, group: Group, rank: int, size: int) -> Context:
    """The Context of a process group, a mesh of one dim, or a Context as it is; None of size 1: this process alone.

    Collective over the group, where it is new. Raises BadArgument (a rank or a size that are not the group's), and as
    ``expar.torch.context``.
    """
    if isinstance(group, Context):
        context = group
    elif group is None and size == 1:
        context = ranks.alone()
    else:
        context = ranks.context(group)
    if (context.rank, context.size) != (rank, size):
        raise BadArgument(
            f"{name}_rank is {rank} and {name}_size {size}; in {name}_group this is rank {context.rank} of {context.size}"
        )
    return context
