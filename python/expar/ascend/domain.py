"""Who holds which expert, and the sizes that follow, as they are told to operators."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Optional

import torch
from torch import Tensor

from .. import _native
from .._native import _ascend_Domain as Domain
from ..errors import BadArgument
from .operators import DTYPES, dtype_name

# assist_info_for_combine has so many numbers for each row of expand_x.
INFO_PER_ROW = 128

_TOLD = (
    "ep_world_size",
    "ep_rank_id",
    "moe_expert_num",
    "expert_shard_type",
    "shared_expert_num",
    "shared_expert_rank_num",
    "global_bs",
    "comm_type",
    "comm_alg",
)

# What reckoning with wrong sizes may raise. Who must not raise it alone leaves it to the library, which tells all ranks.
WRONG = (ValueError, IndexError, TypeError, RuntimeError)


def domain_of(a: SimpleNamespace) -> Domain:
    """Of an operator's arguments."""
    return Domain(**{name: getattr(a, name) for name in _TOLD if hasattr(a, name)})


def rows_dtype(x: Tensor, quant_mode: int, y_dtype: Optional[torch.dtype]) -> torch.dtype:
    """Of dispatched values. Raises BadArgument."""
    if y_dtype not in (None, *DTYPES):
        raise BadArgument(f"y_dtype is {y_dtype}, should be one of {', '.join(map(str, DTYPES))}")
    if quant_mode == 0:
        return x.dtype
    return y_dtype or (torch.int8 if quant_mode in (1, 2) else torch.float8_e4m3fn)


def dynamic_scales(x: Tensor, rows: int, quant_mode: int) -> Optional[Tensor]:
    """Room for the scales of so many rows; None: the mode has none."""
    h = x.shape[1]
    if quant_mode == 2:
        return x.new_empty(rows, dtype=torch.float32)
    if quant_mode == 3:
        return x.new_empty(rows, (h + 127) // 128, dtype=torch.float32)
    if quant_mode == 4:
        return x.new_empty(rows, (h + 63) // 64 * 2, dtype=torch.float8_e8m0fnu)
    return None


def message_elements(x: Tensor, quant_mode: int, y_dtype: Optional[torch.dtype]) -> int:
    """Of a row of y. Raises BadArgument."""
    size = _native._ascend_message_bytes(x.shape[1], str(dtype_name(x.dtype)), quant_mode, dtype_name(y_dtype))
    return size // rows_dtype(x, quant_mode, y_dtype).itemsize


def most_rows(domain: Domain, expert_ids: Tensor, elastic: bool = False) -> int:
    """A of this rank; if ranks may be out, of any rank that it may turn into. Raises BadArgument."""
    ranks = [0, domain.ep_world_size - 1] if elastic else [domain.ep_rank_id]
    return max(_native._ascend_expand_rows(domain, rank, *expert_ids.shape) for rank in ranks)
