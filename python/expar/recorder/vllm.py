"""vLLM's loads: the window in the memory of its balancer, and files of load statistics.

Read at vllm-project/vllm 50feac9 and 0014ec6 (vllm/distributed/eplb/eplb_state.py): ``expert_load_window``
[window, layers, places] int32, ``expert_load_window_step`` where the next step goes, ``physical_to_logical_map``
[layers, places]. These versions write no loads to files. The files are those of pull request 41141 (offline EPLB, open
in May 2026, version 1 of its records), one object of JSON per line: first ``eplb_load_meta`` (model, num_ranks,
num_groups, num_nodes, num_layers, num_redundant_experts), then ``eplb_load_stats`` (step, expert_load [layers, places],
p2l_map [layers, places]).
"""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import checks
from .recorder import Recorder


def from_vllm_window(expert_load_window: Any, physical_to_logical_map: Any, window_step: int = 0) -> Recorder:
    """The loads in the memory of one of vLLM's ranks, as the steps 0, 1, ..., oldest first.

    expert_load_window      : [window, layers, places]
    physical_to_logical_map : [layers, places]
    window_step             : its expert_load_window_step, the oldest of a full window
    Raises ValueError: other shapes, an expert beyond the places, a step outside the window.
    """
    logical_of = _checked_map(physical_to_logical_map, "physical_to_logical_map")
    window = checks.counts(expert_load_window, (None, *logical_of.shape), "expert_load_window")
    if len(window) == 0 or not 0 <= window_step < len(window):
        raise ValueError(f"window_step = {window_step}, should be from 0 to below {len(window)}")
    experts = int(logical_of.max()) + 1
    ordered = np.roll(window, -window_step, axis=0)
    return Recorder.of(range(len(window)), np.stack([checks.to_logical(load, logical_of, experts) for load in ordered]))


def write_vllm(
    path: checks.Path, recorder: Recorder, ranks: int, nodes: int = 1, groups: int = 1, model: str = ""
) -> None:
    """Writes load statistics as if every expert had one place, in order.

    ranks  : num_ranks of the meta record; nodes and groups (of experts) likewise
    Raises ValueError: a number below 1. OSError: cannot be written.
    """
    for name, number in (("ranks", ranks), ("nodes", nodes), ("groups", groups)):
        if number < 1:
            raise ValueError(f"{name} = {number}, should be at least 1")
    meta = {
        "record_type": "eplb_load_meta",
        "version": 1,
        "model": model,
        "num_ranks": ranks,
        "num_groups": groups,
        "num_nodes": nodes,
        "num_layers": recorder.layers,
        "num_redundant_experts": 0,
    }
    places = [list(range(recorder.experts))] * recorder.layers
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(meta) + "\n")
        for step, load in zip(recorder.steps, recorder.loads):
            stats = {"record_type": "eplb_load_stats", "version": 1, "step": step}
            file.write(json.dumps({**stats, "expert_load": load.tolist(), "p2l_map": places}) + "\n")


def read_vllm(path: checks.Path) -> Recorder:
    """Reads load statistics; the loads of an expert's places are added up, under the map of their own step.

    Records of other types are passed over, and so is the meta record's absence: earlier files had none.
    Raises OSError: cannot be read. ValueError: a line that is no record, a step that does not follow, other shapes.
    """
    name = os.fspath(path)
    steps: list[int] = []
    loads: list[NDArray[np.int64]] = []
    experts = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            what = f"line {number} of {name}"
            record = checks.parse_object(line, what)
            if record.get("record_type") != "eplb_load_stats":
                continue
            if record.get("version") != 1:
                raise ValueError(f"{what} has version {record.get('version')!r}, only 1 is known")
            step = checks.whole_number(record, "step", 0, what)
            if steps and step <= steps[-1]:
                raise ValueError(f"{what} has step {step}, after {steps[-1]}")
            logical_of = _checked_map(record.get("p2l_map"), f"{what}: p2l_map")
            load = checks.counts(record.get("expert_load"), logical_of.shape, f"{what}: expert_load")
            experts = experts or int(logical_of.max()) + 1
            if int(logical_of.max()) + 1 != experts or (loads and len(load) != len(loads[0])):
                raise ValueError(
                    f"{what} has {len(load)} layers of {int(logical_of.max()) + 1} experts, unlike those before"
                )
            steps.append(step)
            loads.append(checks.to_logical(load, logical_of, experts))
    if not steps:
        raise ValueError(f"{name} has no records eplb_load_stats")
    return Recorder.of(steps, np.stack(loads))


def _checked_map(values: Any, what: str) -> NDArray[np.int64]:
    logical_of = checks.counts(values, (None, None), what)
    if logical_of.size == 0 or logical_of.max() >= logical_of.shape[1]:
        raise ValueError(
            f"{what}: shape {list(logical_of.shape)} with experts up to {logical_of.max(initial=0)}, should be "
            "[layers, places] with a place for every expert"
        )
    return logical_of
