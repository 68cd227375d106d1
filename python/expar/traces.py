"""Traces as Perfetto and Chrome show them: a row for each rank, the spans of its time on it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping

from ._native import Span, Trace

_JOB = 1  # the one "process" of the file; its "threads" are the ranks


def _microseconds(ns: int) -> str:
    """Exact to the nanosecond: a float would make neighbours overlap."""
    return f"{ns // 1000}.{ns % 1000:03d}"


def _place(rank: int) -> str:
    return f'"pid":{_JOB},"tid":{rank}'


def _metadata(what: str, rank: int, arguments: dict[str, object]) -> str:
    return f'{{"ph":"M","name":"{what}",{_place(rank)},"args":{json.dumps(arguments)}}}'


def _event(span: Span, rank: int) -> str:
    title, arguments = span.name, ""
    if span.kind == "wait":
        told: dict[str, object] = {"operation": span.name, "what": span.what}
        title = "wait"
        if span.peer >= 0:
            title, told["peer"] = f"wait for rank {span.peer}", span.peer
        arguments = f',"args":{json.dumps(told)}'
    return (
        f'{{"ph":"X","name":{json.dumps(title)},"cat":"{span.kind}",{_place(rank)},'
        f'"ts":{_microseconds(span.start)},"dur":{_microseconds(span.end - span.start)}{arguments}}}'
    )


def _row(spans: Trace | Iterable[Span], rank: int) -> list[str]:
    left_out = 0
    if isinstance(spans, Trace):
        left_out, spans = spans.left_out, spans.spans
    row = [
        _metadata("thread_name", rank, {"name": f"rank {rank}"}),
        _metadata("thread_sort_index", rank, {"sort_index": rank}),
    ]
    end = 0
    for span in spans:
        row.append(_event(span, rank))
        end = span.end
    if left_out:
        name, told = json.dumps(f"{left_out} later spans are left out"), json.dumps({"left_out": left_out})
        row.append(f'{{"ph":"i","s":"t","name":{name},{_place(rank)},"ts":{_microseconds(end)},"args":{told}}}')
    return row


def write_trace(
    path: str | os.PathLike[str], traces: Mapping[int, Trace | Iterable[Span]], *, job: str = "expar"
) -> None:
    """Writes the file that ``--trace`` of the ``expar`` command writes, for https://ui.perfetto.dev.

    traces : of each rank that is to be shown, its Trace or spans; processes send each other ``trace.spans``, by pickle
    Not collective. Raises OSError.
    """
    events = [_metadata("process_name", 0, {"name": job})]
    for rank, spans in sorted(traces.items(), key=lambda item: item[0]):
        events += _row(spans, rank)
    with open(path, "w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit":"ms","traceEvents":[\n' + ",\n".join(events) + "\n]}\n")
