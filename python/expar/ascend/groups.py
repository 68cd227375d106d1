"""Groups by name: torch_npu's operators name the ranks that they run on, as HCCL does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Union

import torch
import torch.distributed as dist

from .. import Context
from ..errors import BadArgument
from ..torch import ranks
from ..torch.contexts import NAMES, context_of, name_of

if TYPE_CHECKING:
    Group = Union[str, dist.ProcessGroup, Context]
else:
    Group = str  # what an operator is registered with; by_name makes it of the others


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # of a graph that is compiled for these ranks
def get_hccl_comm_name(group: Union[dist.ProcessGroup, Context, None] = None) -> str:
    """What to call these ranks as ``group_ep`` or ``group_tp``; None: the default group.

    It takes the place of ``group._get_backend(torch.device("npu")).get_hccl_comm_name(rank)``. Operators take the group
    itself too. An expar.Context, whose ranks may be threads, is named as long as somebody holds it. Not collective.
    """
    if isinstance(group, Context):
        return str(name_of(group))
    group = group or dist.group.WORLD
    if group is None:
        raise BadArgument("there is no group to name: call torch.distributed.init_process_group('gloo') first")
    return str(group.group_name)


def by_name(value: Any) -> Any:
    """A group's name; anything else as it is."""
    if isinstance(value, Context):
        return get_hccl_comm_name(value)
    return value.group_name if hasattr(value, "group_name") else value


def group_of(what: str, name: Group) -> Context:
    """The ranks of that name. Collective over them where they meet for the first time.

    Raises BadArgument (no such group), and as expar.torch.context.
    """
    name = str(name)
    if name.startswith(NAMES):
        return context_of(name)
    try:
        group = torch.distributed.distributed_c10d._resolve_process_group(name)
    except RuntimeError:
        raise BadArgument(
            f"{what} is '{name}', which no process group here is called: pass the group itself, or what "
            "expar.ascend.get_hccl_comm_name(group) returns"
        ) from None
    return ranks.context(group)
