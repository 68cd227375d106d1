"""Files of routes: what comes back, what is refused, and what the command line makes of them."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess

import numpy as np
import pytest
from recorder_samples import EXPERTS, LAYERS, same, some_routes

from expar.recorder import Recorder, Routes, read_routes, write_routes

# Routes


@pytest.mark.parametrize("name", ["a.routes.gz", "a.routes"])
@pytest.mark.parametrize("with_weights", [True, False])
def test_routes_come_back_as_they_were_written(tmp_path, name, with_weights):
    routes = some_routes()
    if not with_weights:
        routes = Routes(ids=routes.ids, experts=routes.experts)
    write_routes(tmp_path / name, routes)
    again = read_routes(tmp_path / name)
    assert same(again.ids, routes.ids) and again.experts == routes.experts and again.header == routes.header
    assert same(again.weights, routes.weights) if with_weights else again.weights is None
    assert np.array_equal(again.loads(), routes.loads())


def test_the_same_routes_are_the_same_bytes(tmp_path):
    write_routes(tmp_path / "a.routes.gz", some_routes())
    write_routes(tmp_path / "b.routes.gz", some_routes())
    written = (tmp_path / "a.routes.gz").read_bytes()
    assert written == (tmp_path / "b.routes.gz").read_bytes()
    assert written[4:8] == bytes(4)  # where gzip would keep the time


def test_the_bytes_of_routes_are_those_of_the_format(tmp_path):
    routes = Routes(np.array([[[0, 255]], [[1, 2]]]), 256, np.array([[[1.0, 0.0001]], [[0.5, 6.5535]]]))
    write_routes(tmp_path / "a.routes.gz", routes)
    line, _, rest = gzip.decompress((tmp_path / "a.routes.gz").read_bytes()).partition(b"\n")
    assert json.loads(line) == {"layers": 2, "tokens": 1, "top_k": 2, "experts": 256}
    assert rest == bytes([0, 255, 1, 2]) + bytes([0x10, 0x27, 1, 0, 0x88, 0x13, 0xFF, 0xFF])


@pytest.mark.parametrize("name", ["a.routes.gz", "a.routes"])
def test_routes_are_refused_wherever_they_are_cut(tmp_path, name):
    routes = some_routes(layers=1, tokens=5, topk=2)
    write_routes(tmp_path / name, routes)
    whole = (tmp_path / name).read_bytes()
    without_weights = len(whole) - 2 * routes.ids.size if name == "a.routes" else None
    for size in range(len(whole)):
        if size == without_weights:
            continue  # which is a whole file
        (tmp_path / name).write_bytes(whole[:size])
        with pytest.raises(ValueError, match=name):
            read_routes(tmp_path / name)


def test_damaged_routes_are_refused(tmp_path):
    write_routes(tmp_path / "a.routes.gz", some_routes())
    damaged = bytearray((tmp_path / "a.routes.gz").read_bytes())
    damaged[-6] ^= 1  # of the checksum
    (tmp_path / "a.routes.gz").write_bytes(damaged)
    with pytest.raises(ValueError, match="cut short or damaged"):
        read_routes(tmp_path / "a.routes.gz")


def header_of(**changes):
    return json.dumps({"layers": 2, "tokens": 3, "top_k": 2, "experts": 5, **changes}).encode() + b"\n"


@pytest.mark.parametrize(
    "content, message",
    [
        (header_of() + bytes(11), "header promises 12 slots"),
        (header_of(tokens=2**32) + bytes(12), "header promises 17179869184 slots"),
        (header_of(tokens=2**40) + bytes(12), "do not fit this format"),
        (header_of(tokens=-3) + bytes(12), "no whole number 'tokens' from 1"),
        (header_of(layers=True) + bytes(12), "no whole number 'layers' from 1"),
        (header_of(top_k=6) + bytes(36), "6 of 5 experts do not fit this format"),
        (header_of(experts=257) + bytes(12), "2 of 257 experts do not fit"),
        (header_of() + bytes([0, 1, 2, 5] + [0] * 8), "token 1 has expert 5 in layer 0, not below 5"),
        (header_of() + bytes(12 + 24 + 1), "goes on after the weights"),
        (b"no json\n" + bytes(12), "is not JSON"),
        (b"[1]\n" + bytes(12), "not an object"),
        (bytes(1000), "does not begin with a line of JSON"),
        (b"", "does not begin with a line of JSON"),
    ],
)
@pytest.mark.parametrize("packed", [True, False])
def test_routes_that_lie_are_refused(tmp_path, content, message, packed):
    path = tmp_path / "lie.routes"
    path.write_bytes(gzip.compress(content) if packed else content)
    # What is small when packed may promise a little more than there is: then it is read, and found cut short.
    match = f"{message}|cut short" if packed else message
    with pytest.raises(ValueError, match=match):
        read_routes(path)


@pytest.mark.parametrize(
    "routes, message",
    [
        (Routes(np.array([[[0, 4]]]), 4), "token 0 has expert 4 in layer 0, not below 4"),
        (Routes(np.array([[[0, -1]]]), 4), r"ids\[0, 0, 1\] = -1 is negative"),
        (Routes(np.array([[0, 1]]), 4), "ids: shape"),
        (Routes(np.zeros((1, 0, 2), dtype=int), 4), "of at least 1 each"),
        (Routes(np.array([[[0, 1]]]), 257), "2 of 257 experts do not fit"),
        (Routes(np.array([[[0, 1, 0]]]), 2), "3 of 2 experts do not fit"),
        (Routes(np.array([[[0, 1]]]), 4, np.array([[[0.5]]])), "weights: shape"),
        (Routes(np.array([[[0, 1]]]), 4, np.array([[[0.5, 7]]])), "not all are from 0 to 6.5535"),
        (Routes(np.array([[[0, 1]]]), 4, np.array([[[0.5, -0.001]]])), "not all are from 0 to 6.5535"),
        (Routes(np.array([[[0, 1]]]), 4, np.array([[[0.5, np.nan]]])), "not all are from 0 to 6.5535"),
    ],
)
def test_routes_that_the_format_cannot_hold_are_not_written(tmp_path, routes, message):
    with pytest.raises(ValueError, match=message):
        write_routes(tmp_path / "a.routes", routes)
    assert not (tmp_path / "a.routes").exists()


def test_recorded_routes_leave_with_the_window_and_reach_a_file(tmp_path):
    routes = some_routes(layers=LAYERS)
    recorder = Recorder(LAYERS, EXPERTS, window=2)
    for step, tokens in enumerate([slice(0, 10), slice(10, 25), slice(25, 50)]):
        for layer in range(LAYERS):
            recorder.record(step, layer, routes=routes.ids[layer, tokens])
    write_routes(tmp_path / "a.routes.gz", recorder.routes())
    assert same(read_routes(tmp_path / "a.routes.gz").ids, routes.ids[:, 10:])


def test_routes_that_layers_do_not_share_are_refused():
    recorder = Recorder(2, 4)
    with pytest.raises(ValueError, match="no routes of layer 0"):
        recorder.routes()
    recorder.record(0, 0, routes=[[0, 1]])
    with pytest.raises(ValueError, match="no routes of layer 1"):
        recorder.routes()
    recorder.record(0, 1, routes=[[0, 1], [1, 2]])
    with pytest.raises(ValueError, match=r"layer 1 has routes \[2, 2\], but layer 0 \[1, 2\]"):
        recorder.routes()
    recorder.record(0, 0, routes=[[2]])
    with pytest.raises(ValueError, match="layer 0 differ in their slots"):
        recorder.routes()


# The command line, which reads the first layer of a file.


def expar(*arguments):
    command = os.environ.get("EXPAR") or shutil.which("expar")
    if command is None:
        # ctest names it; whoever runs this file alone need not have it.
        pytest.skip("no command expar: put it on PATH, or name it in EXPAR")
    done = subprocess.run([command, *map(str, arguments)], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr


@pytest.mark.parametrize("name", ["a.routes.gz", "a.routes"])
def test_expar_plan_counts_the_rows_of_written_routes(tmp_path, name):
    ranks, tokens, topk, experts, hidden = 4, 40, 3, 10, 64
    routes = some_routes(tokens=ranks * tokens, topk=topk, experts=experts)
    write_routes(tmp_path / name, routes)
    sizes = ("--tokens", tokens, "--topk", topk, "--experts", experts, "--hidden", hidden, "--inner", 32)
    mesh = ("--mesh", f"ep={ranks}", "--dtype", "bf16")
    status, errors = expar("plan", *sizes, *mesh, "--routes", tmp_path / name, "--json", tmp_path / "plan.json")
    assert status == 0, errors
    plan = json.loads((tmp_path / "plan.json").read_text())

    owner = np.repeat(np.arange(ranks), np.diff(np.arange(ranks + 1) * experts // ranks))
    slots = rows = 0
    for token, chosen in enumerate(routes.ids[0]):
        elsewhere = [owner[expert] for expert in chosen if owner[expert] != token // tokens]
        slots += len(elsewhere)
        rows += len(set(elsewhere))
    row_bytes = 2 * hidden
    assert plan["bytes_per_rank"]["ep"] == (rows + slots) * row_bytes / ranks
    assert plan["bytes_per_rank"]["ep_per_slot"] == 2 * slots * row_bytes / ranks


def test_expar_bench_dispatches_written_routes(tmp_path):
    write_routes(tmp_path / "a.routes.gz", some_routes(tokens=64))
    sizes = ("--tokens", 64, "--topk", 3, "--experts", 8, "--hidden", 16)
    arguments = ("--routes", tmp_path / "a.routes.gz", "--json", tmp_path / "bench.json", "--timeout", 30)
    status, errors = expar("bench", "dispatch", "--ranks", 2, *sizes, *arguments)
    assert status == 0, errors
    (row,) = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert row["wrong"] == 0 and row["topk"] == 3
