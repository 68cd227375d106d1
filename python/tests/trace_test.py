"""What ranks record of their time, and the file that is made of it."""

from __future__ import annotations

import json
import pickle
import time

import numpy as np
import pytest
from ranks import on_ranks

import expar


def recorded(context):
    trace = expar.Trace()
    context.communicator.record(trace)
    assert context.trace is trace and context.communicator.trace is trace
    if context.rank == 1:
        time.sleep(0.02)
    with expar.Phase(trace, "sum"):
        expar.all_reduce(context, np.ones((1, 4), np.float32), np.empty(4, np.float32))
    context.communicator.record(None)
    expar.barrier(context)
    assert context.trace is None
    return trace


def test_a_rank_records_its_phases_its_operations_and_whom_it_waits_for():
    before = time.monotonic_ns()
    traces = on_ranks(2, recorded)
    for trace in traces:
        assert [span.name for span in trace.spans if span.kind == "phase"] == ["sum"]
        assert "all_reduce" in {span.name for span in trace.spans if span.kind == "operation"}
        assert not any(span.name == "barrier" for span in trace.spans) and trace.left_out == 0
        assert all(before <= span.start <= span.end <= time.monotonic_ns() for span in trace.spans)
    waits = [span for span in traces[0].spans if span.kind == "wait"]
    assert any(span.peer == 1 and span.end - span.start > 5_000_000 for span in waits)


def test_the_file_has_a_row_for_each_rank(tmp_path):
    traces = on_ranks(2, recorded)
    spans = pickle.loads(pickle.dumps(traces[1].spans))
    assert spans == traces[1].spans
    expar.write_trace(tmp_path / "trace.json", {0: traces[0], 1: spans}, job='a "job"')
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {(e["name"], e["tid"]): e["args"]["name"] for e in events if e["ph"] == "M" and "name" in e["args"]}
    assert names == {("process_name", 0): 'a "job"', ("thread_name", 0): "rank 0", ("thread_name", 1): "rank 1"}
    for rank, trace in enumerate(traces):
        mine = [e for e in events if e["ph"] == "X" and e["tid"] == rank]
        assert [e["cat"] for e in mine] == [span.kind for span in trace.spans]
        assert [e["dur"] * 1000 for e in mine] == pytest.approx([s.end - s.start for s in trace.spans], abs=1e-3)
    assert any(e["name"] == "wait for rank 1" and e["args"]["peer"] == 1 for e in events if e["tid"] == 0)


def test_what_has_no_room_is_counted_and_told(tmp_path):
    trace = expar.Trace(capacity=2)
    for name in ("first", "second", "third"):
        with expar.Phase(trace, name):
            pass
    trace.add(expar.Span("fourth", 1, 2))
    assert [span.name for span in trace.spans] == ["first", "second"] and trace.left_out == 2
    expar.write_trace(tmp_path / "trace.json", {0: trace})
    assert "2 later spans are left out" in (tmp_path / "trace.json").read_text()


def test_phases_end_where_an_exception_passes_and_may_have_no_trace():
    trace = expar.Trace()
    with pytest.raises(KeyError), expar.Phase(trace, "fails"), expar.Phase(None, "nothing"):
        raise KeyError
    assert [span.name for span in trace.spans] == ["fails"]
    with pytest.raises(ValueError, match="kind is 'lunch', should be one of phase"):
        expar.Span("x", 0, 1, kind="lunch")
