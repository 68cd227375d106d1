"""SGLang's dumps of loads: what its expert distribution recorder writes and ``--init-expert-location`` takes.

Read at sgl-project/sglang 02295fe (python/sglang/srt/eplb/expert_distribution.py) and 01fec5c (expert_location.py):

- modes ``stat`` and ``stat_approx``: an object with ``logical_count`` [steps, layers, E] int32, summed over ranks, and
  ``rank``, ``average_utilization_rate_over_window``; ``logical_count`` [layers, E] is also taken where it is read
- modes ``per_pass`` and ``per_token``: one file per rank with ``records``, each with ``forward_pass_id`` and
  ``global_physical_count`` [layers, places], and ``last_physical_to_logical_map`` [layers, places]
- ``.pt`` is torch.save of it; ``.json``, which SGLang only reads, has the lists under the same names
"""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np

from . import checks
from .recorder import Recorder


def write_sglang(path: checks.Path, recorder: Recorder) -> None:
    """Writes ``logical_count`` for ``--init-expert-location``: ``.pt`` as SGLang's recorder does, or ``.json``.

    Steps have no numbers in this format. Raises ValueError: another ending, or a load of 2^31 or more in ``.pt``, where
    they are int32. OSError: cannot be written. ImportError: ``.pt`` without PyTorch.
    """
    loads = recorder.loads
    if _is_json(path):
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"logical_count": loads.tolist()}, file)
        return
    _check_ending(path)
    if loads.size and loads.max() > np.iinfo(np.int32).max:
        raise ValueError(f"a load of {loads.max()} does not fit SGLang's int32")
    torch = _torch()
    count = torch.from_numpy(loads.astype(np.int32))
    with open(path, "wb") as file:
        torch.save({"rank": 0, "logical_count": count, "average_utilization_rate_over_window": None}, file)


def read_sglang(path: checks.Path) -> Recorder:
    """Reads any of the dumps above, ``.pt`` or ``.json``, as the steps 0, 1, ... or, where there are ``records``, under
    the numbers of their forward passes. Files of several ranks go to `Recorder.merged`.

    A dump of ``logical_count`` is SGLang's ring of steps as it lies: the oldest is first only while the ring was not
    full, and steps that it had no time for are zeros. Nothing in a ``.pt`` file is run (weights_only).
    Raises OSError: cannot be read. ValueError: cut short, not of this format. ImportError: ``.pt`` without PyTorch.
    """
    name = os.fspath(path)
    value = checks.read_object(path) if _is_json(path) else _load(path)
    if "logical_count" in value:
        count = checks.whole_numbers(value["logical_count"], f"{name}: logical_count")
        if count.ndim == 2:
            count = count[None]
        count = checks.counts(count, (None, None, None), f"{name}: logical_count")
        if 0 in count.shape[1:]:
            raise ValueError(f"{name}: logical_count: shape {list(count.shape)}, should be [steps, layers, E]")
        return Recorder.of(range(len(count)), count)
    if "records" in value:
        return _read_records(value, name)
    raise ValueError(f"{name} has neither logical_count nor records: it is no dump of loads by SGLang")


def _read_records(value: dict, name: str) -> Recorder:
    logical_of = checks.counts(
        value.get("last_physical_to_logical_map"), (None, None), f"{name}: last_physical_to_logical_map"
    )
    if logical_of.size == 0:
        raise ValueError(
            f"{name}: last_physical_to_logical_map: shape {list(logical_of.shape)}, should be [layers, places]"
        )
    records = value["records"]
    if not isinstance(records, list):
        raise ValueError(f"{name}: records are not a list")
    # Every expert has a place, so the last place's number tells how many there are.
    experts = int(logical_of.max()) + 1
    if experts > logical_of.shape[1]:
        raise ValueError(f"{name}: last_physical_to_logical_map names expert {experts - 1}, beyond its places")
    passes: dict = {}
    for i, record in enumerate(records):
        what = f"{name}: records[{i}]"
        if not isinstance(record, dict):
            raise ValueError(f"{what} is not an object")
        step = checks.whole_number(record, "forward_pass_id", 0, what)
        count = checks.counts(record.get("global_physical_count"), logical_of.shape, f"{what}: global_physical_count")
        load = checks.to_logical(count, logical_of, experts)
        passes[step] = passes[step] + load if step in passes else load
    steps = sorted(passes)
    loads = np.array([passes[step] for step in steps]).reshape(len(steps), logical_of.shape[0], experts)
    return Recorder.of(steps, loads)


def _load(path: checks.Path) -> dict:
    name = os.fspath(path)
    _check_ending(path)
    torch = _torch()
    with open(path, "rb") as file:
        try:
            value = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # of many types: cut short, not of PyTorch, or more than weights
            reason = str(error).split("\n")[0][:120]
            raise ValueError(f"{name} is cut short, damaged, or more than tensors and numbers: {reason}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name} holds no object")
    return value


def _is_json(path: checks.Path) -> bool:
    return os.fspath(path).endswith(".json")


def _check_ending(path: checks.Path) -> None:
    if not os.fspath(path).endswith(".pt"):
        raise ValueError(f"{os.fspath(path)} ends neither in .pt nor in .json")


def _torch() -> Any:
    return checks.needed("torch", "torch", "a .pt file")
