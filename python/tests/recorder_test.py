"""Loads and routes: what is kept, what comes back from files, and what is refused."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
import subprocess

import numpy as np
import pytest

from expar.recorder import (
    Recorder,
    Routes,
    balancedness,
    from_vllm_window,
    gini,
    max_over_mean,
    mean_over_max,
    rank_loads,
    read_routes,
    read_sglang,
    read_vllm,
    write_routes,
    write_sglang,
    write_vllm,
)

LAYERS, EXPERTS = 3, 8


def some_loads(steps, seed=0):
    return np.random.default_rng(seed).integers(0, 100, (steps, LAYERS, EXPERTS))


def recorder_of(loads, steps=None, window=None):
    recorder = Recorder(LAYERS, EXPERTS, window=window)
    for step, of_step in zip(steps or range(len(loads)), loads):
        for layer, load in enumerate(of_step):
            recorder.record(step, layer, load)
    return recorder


def some_routes(layers=2, tokens=50, topk=3, experts=8, seed=0):
    random = np.random.default_rng(seed)
    ids = np.argsort(random.random((layers, tokens, experts)), axis=-1)[..., :topk].astype(np.int32)
    weights = (random.integers(0, 10001, ids.shape) / 10000).astype(np.float32)
    return Routes(ids=ids, experts=experts, weights=weights, header={"model": "of this test", "seq_lens": [20, 30]})


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and bool(np.all(a == b))


# Statistics


def test_even_loads_have_the_best_of_every_number():
    even = np.full((4, 5), 7)
    assert np.all(max_over_mean(even) == 1) and np.all(mean_over_max(even) == 1) and np.all(gini(even) == 0)
    assert balancedness(even) == 1


def test_one_expert_with_everything_has_the_worst():
    one = np.array([[0, 0, 9, 0]])
    assert max_over_mean(one) == [4] and mean_over_max(one) == [0.25] and gini(one) == [0.75]


def test_gini_is_the_mean_difference_of_all_pairs():
    load = np.array([3, 1, 4, 1, 5, 9])
    differences = sum(abs(int(a) - int(b)) for a in load for b in load) / len(load) ** 2
    assert gini(load) == pytest.approx(differences / (2 * load.mean()), rel=1e-15)


def test_no_load_at_all_is_neither_even_nor_uneven():
    none = np.zeros((2, 4), dtype=np.int64)
    assert all(np.all(np.isnan(number(none))) for number in (max_over_mean, mean_over_max, gini, balancedness))


def test_balancedness_weighs_layers_by_their_loads():
    # Means 2 and 30 over maxima 4 and 30: not the mean of 0.5 and 1.
    assert balancedness([[4, 0], [30, 30]]) == 32 / 34


@pytest.mark.parametrize("experts, ranks", [(8, 3), (8, 8), (3, 5), (7, 1)])
def test_ranks_hold_the_experts_in_order_and_some_hold_none(experts, ranks):
    load = np.arange(1, experts + 1) ** 2
    expected = [sum(load[r * experts // ranks : (r + 1) * experts // ranks]) for r in range(ranks)]
    assert rank_loads(load, ranks).tolist() == expected
    assert rank_loads(np.stack([load, 2 * load]), ranks).tolist() == [expected, [2 * e for e in expected]]


def test_no_ranks_are_refused():
    with pytest.raises(ValueError, match="ranks = 0"):
        rank_loads(np.ones(4), 0)


# The recorder


def test_loads_come_back_by_step_and_layer():
    loads = some_loads(4)
    recorder = recorder_of(loads, steps=[2, 3, 5, 9])
    assert recorder.steps == [2, 3, 5, 9]
    assert same(recorder.loads, loads)
    assert same(recorder.total(), loads.sum(axis=0))
    assert np.array_equal(recorder.max_over_mean(), max_over_mean(loads.sum(axis=0)))
    assert np.array_equal(recorder.gini(), gini(loads.sum(axis=0)))
    assert recorder.balancedness(4) == balancedness(rank_loads(loads.sum(axis=0), 4))


def test_the_window_keeps_the_newest_steps():
    loads = some_loads(7)
    recorder = recorder_of(loads, window=3)
    assert recorder.steps == [4, 5, 6] and recorder.forgotten == 3
    assert same(recorder.loads, loads[4:])


def test_an_older_step_is_refused_but_one_in_the_window_adds_up():
    loads = some_loads(4)
    recorder = recorder_of(loads, window=2)
    recorder.record(2, 1, np.ones(EXPERTS))
    assert same(recorder.loads[0, 1], loads[2, 1] + 1)
    with pytest.raises(ValueError, match="step = 1 is neither in the window nor after its newest, 3"):
        recorder.record(1, 0, loads[1, 0])


def test_an_empty_recorder_has_no_steps():
    recorder = Recorder(LAYERS, EXPERTS)
    assert recorder.loads.shape == (0, LAYERS, EXPERTS) and recorder.steps == []
    assert np.all(np.isnan(recorder.max_over_mean()))


def test_a_layer_hands_in_its_own_load():
    class Layer:
        load = np.arange(EXPERTS)

    recorder = Recorder(1, EXPERTS)
    recorder.record(0, 0, Layer())
    assert recorder.total().tolist() == [list(range(EXPERTS))]


def test_loads_are_copied():
    load = np.ones(EXPERTS, dtype=np.int64)
    recorder = Recorder(1, EXPERTS)
    recorder.record(0, 0, load)
    load[...] = 5
    recorder.loads[...] = 5
    assert np.all(recorder.total() == 1)


@pytest.mark.parametrize("dtype", ["int32", "int64", "float32"])
def test_tensors_of_torch_are_loads_and_routes(dtype):
    torch = pytest.importorskip("torch")
    recorder = Recorder(1, 4)
    recorder.record(0, 0, torch.tensor([1, 0, 2, 3], dtype=getattr(torch, dtype)), torch.tensor([[0, 2], [3, 2]]))
    assert recorder.total().tolist() == [[1, 0, 2, 3]]
    assert recorder.routes().ids.tolist() == [[[0, 2], [3, 2]]]


def test_loads_are_counted_from_routes():
    recorder = Recorder(1, 4)
    recorder.record(0, 0, routes=[[0, 3], [3, -1]])
    assert recorder.total().tolist() == [[1, 0, 0, 2]]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, LAYERS, np.ones(EXPERTS)), f"layer = {LAYERS}, should be from 0 to {LAYERS - 1}"),
        ((0, -1, np.ones(EXPERTS)), "layer = -1"),
        ((-1, 0, np.ones(EXPERTS)), "step = -1 is negative"),
        ((0, 0, np.ones(EXPERTS + 1)), r"load: shape \[9\], should be \[8\]"),
        ((0, 0, -np.ones(EXPERTS)), r"load\[0\] = -1 is negative"),
        ((0, 0, np.full(EXPERTS, 0.5)), "not all whole numbers"),
        ((0, 0, np.full(EXPERTS, np.nan)), "not all whole numbers"),
        ((0, 0, np.full(EXPERTS, 2**63, dtype=np.uint64)), "not all whole numbers"),
        ((0, 0, [[1], [1, 2]]), "load: not an array of numbers"),
        ((0, 0), "needs a load, or routes"),
        ((0, 0, None, [0, 1]), r"routes: shape \[2\], should be \[T, K\]"),
        ((0, 0, None, [[0, EXPERTS]]), r"routes\[0, 1\] = 8, should be -1 or below 8"),
        ((0, 0, None, [[0, -2]]), r"routes\[0, 1\] = -2"),
    ],
)
def test_what_is_no_load_is_refused_and_leaves_nothing(arguments, message):
    recorder = Recorder(LAYERS, EXPERTS)
    with pytest.raises(ValueError, match=message):
        recorder.record(*arguments)
    assert recorder.steps == []


@pytest.mark.parametrize("sizes", [(0, 4, 1), (1, 0, 1), (1, 4, 0)])
def test_sizes_below_one_are_refused(sizes):
    with pytest.raises(ValueError, match="= 0, should be at least 1"):
        Recorder(*sizes)


# Several ranks


def test_ranks_add_up():
    loads = [some_loads(3, seed) for seed in range(4)]
    merged = Recorder.merged(recorder_of(of_rank) for of_rank in loads)
    assert merged.steps == [0, 1, 2]
    assert same(merged.loads, sum(loads))


def test_a_rank_without_tokens_in_a_step_takes_nothing_from_the_others():
    loads = some_loads(3)
    merged = Recorder.merged([recorder_of(loads[:2], steps=[0, 2]), recorder_of(loads[2:], steps=[1])])
    assert merged.steps == [0, 1, 2]
    assert same(merged.loads, loads[[0, 2, 1]])


def test_steps_that_one_rank_has_forgotten_are_left_out():
    loads = some_loads(5)
    merged = Recorder.merged([recorder_of(loads), recorder_of(loads, window=2), recorder_of(loads, window=3)])
    assert merged.steps == [3, 4] and merged.forgotten == 2
    assert same(merged.loads, 3 * loads[3:])


def test_forgotten_steps_are_known_after_a_file(tmp_path):
    loads = some_loads(5)
    recorder_of(loads, window=2).write_json(tmp_path / "rank1.json")
    merged = Recorder.merged([recorder_of(loads), Recorder.read_json(tmp_path / "rank1.json")])
    assert merged.steps == [3, 4]


def test_routes_of_ranks_follow_one_another():
    ranks = [Recorder(1, 4), Recorder(1, 4)]
    ranks[0].record(0, 0, routes=[[0, 1]])
    ranks[1].record(0, 0, routes=[[2, 3], [1, 2]])
    ranks[0].record(1, 0, routes=[[3, 2]])
    assert Recorder.merged(ranks).routes().ids.tolist() == [[[0, 1], [2, 3], [1, 2], [3, 2]]]


def test_ranks_of_different_models_are_refused():
    with pytest.raises(ValueError, match="recorder 1 has 3 layers of 4 experts, but recorder 0 3 of 8"):
        Recorder.merged([Recorder(3, 8), Recorder(3, 4)])
    with pytest.raises(ValueError, match="no recorder"):
        Recorder.merged([])


# JSON


def test_json_is_exact(tmp_path):
    recorder = Recorder(1, 2, window=5)
    recorder.record(2**60 + 1, 0, np.array([2**62 + 1, 3]))
    recorder.write_json(tmp_path / "loads.json")
    again = Recorder.read_json(tmp_path / "loads.json")
    assert again.steps == [2**60 + 1] and again.loads.tolist() == [[[2**62 + 1, 3]]]
    assert (again.layers, again.experts, again.window, again.forgotten) == (1, 2, 5, None)


@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("window", [None, 2])
def test_json_keeps_the_window(tmp_path, steps, window):
    recorder = recorder_of(some_loads(steps), window=window)
    recorder.write_json(tmp_path / "loads.json")
    again = Recorder.read_json(tmp_path / "loads.json")
    assert again.steps == recorder.steps and same(again.loads, recorder.loads)
    assert again.window == window and again.forgotten == recorder.forgotten


def changed_json(tmp_path, **changes):
    path = tmp_path / "loads.json"
    recorder_of(some_loads(2)).write_json(path)
    value = json.loads(path.read_text())
    value.update(changes)
    path.write_text(json.dumps(value))
    return path


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format": "other"}, "is not of the format expar.loads, version 1"),
        ({"version": 2}, "is not of the format expar.loads, version 1"),
        ({"layers": 0}, "no whole number 'layers' from 1"),
        ({"layers": LAYERS + 1}, r"loads: shape \[2, 3, 8\], should be \[2, 4, 8\]"),
        ({"experts": "8"}, "no whole number 'experts' from 1"),
        ({"window": 0}, "no whole number 'window' from 1"),
        ({"forgotten": -1}, "no whole number 'forgotten' from 0"),
        ({"steps": [0]}, r"should be \[1, 3, 8\]"),
        ({"steps": [1, 1]}, "steps do not ascend"),
        ({"steps": [0, 1.5]}, "steps: .* not all whole numbers"),
        ({"steps": None}, "steps"),
        ({"loads": 7}, "loads: shape"),
        ({"loads": [[[0.5] * EXPERTS] * LAYERS] * 2}, "not all whole numbers"),
        ({"loads": [[[-1] * EXPERTS] * LAYERS] * 2}, "is negative"),
        ({"loads": [[[10**30] * EXPERTS] * LAYERS] * 2}, "loads"),
        ({"loads": [["x" * EXPERTS] * LAYERS] * 2}, "loads"),
    ],
)
def test_json_that_contradicts_itself_is_refused(tmp_path, changes, message):
    path = changed_json(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as error:
        Recorder.read_json(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "\x00\xff", "[" * 100000])
def test_what_is_no_json_is_refused(tmp_path, text):
    path = tmp_path / "loads.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match="loads.json"):
        Recorder.read_json(path)


def test_json_is_refused_wherever_it_is_cut(tmp_path):
    recorder = Recorder(1, 2)
    recorder.record(0, 0, [1, 2])
    recorder.write_json(tmp_path / "loads.json")
    whole = (tmp_path / "loads.json").read_bytes()
    for size in range(len(whole) - 1):  # the last byte is the end of the line
        (tmp_path / "cut.json").write_bytes(whole[:size])
        with pytest.raises(ValueError):
            Recorder.read_json(tmp_path / "cut.json")


def test_a_file_that_is_not_there_is_an_os_error(tmp_path):
    for read in (Recorder.read_json, read_routes, read_sglang, read_vllm):
        with pytest.raises(OSError):
            read(tmp_path / "none.json")


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


# TensorBoard


def written_events(tmp_path, recorder, step=None):
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="needs torch and tensorboard")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        recorder.to_tensorboard(writer, step)
    events = accumulator.EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    return events


def test_tensorboard_reads_the_newest_step(tmp_path):
    recorder = recorder_of(some_loads(3), steps=[1, 2, 7])
    events = written_events(tmp_path, recorder)
    for layer, load in enumerate(recorder.loads[-1]):
        tag = f"load/layer{layer}"
        curves = [events.Scalars(f"{tag}/expert{expert}") for expert in range(EXPERTS)]
        assert [[(event.step, event.value) for event in curve] for curve in curves] == [[(7, rows)] for rows in load]
        (uneven,) = events.Scalars(f"{tag}/max_over_mean")
        assert uneven.value == np.float32(max_over_mean(load))
        (histogram,) = events.Histograms(tag)
        assert histogram.histogram_value.bucket == load.tolist()
        assert histogram.histogram_value.bucket_limit == list(range(1, EXPERTS + 1))
        assert histogram.histogram_value.num == load.sum()
    assert set(events.Tags()["histograms"]) == {f"load/layer{layer}" for layer in range(LAYERS)}


def test_tensorboard_reads_any_step_of_the_window_and_no_ratio_of_nothing(tmp_path):
    loads = some_loads(2)
    loads[0, 1] = 0
    recorder = recorder_of(loads)
    events = written_events(tmp_path, recorder, step=0)
    assert "load/layer0/max_over_mean" in events.Tags()["scalars"]
    assert "load/layer1/max_over_mean" not in events.Tags()["scalars"]
    assert events.Scalars("load/layer0/expert0")[0].value == loads[0, 0, 0]


def test_a_step_that_is_not_in_the_window_is_refused():
    with pytest.raises(ValueError, match="step None is not in the window"):
        Recorder(1, 1).to_tensorboard(writer=None)
    with pytest.raises(ValueError, match="step 4 is not in the window"):
        recorder_of(some_loads(2)).to_tensorboard(writer=None, step=4)


# SGLang


@pytest.mark.parametrize("name", ["loads.pt", "loads.json"])
def test_sglang_keeps_loads_and_numbers_steps_anew(tmp_path, name):
    if name.endswith(".pt"):
        pytest.importorskip("torch")
    recorder = recorder_of(some_loads(3), steps=[4, 5, 9])
    write_sglang(tmp_path / name, recorder)
    again = read_sglang(tmp_path / name)
    assert again.steps == [0, 1, 2] and same(again.loads, recorder.loads)


def test_sglang_finds_the_names_and_types_of_its_own_dumps(tmp_path):
    torch = pytest.importorskip("torch")
    loads = some_loads(2)
    write_sglang(tmp_path / "loads.pt", recorder_of(loads))
    dump = torch.load(tmp_path / "loads.pt", weights_only=True)
    assert set(dump) == {"rank", "logical_count", "average_utilization_rate_over_window"}
    assert dump["logical_count"].dtype == torch.int32 and dump["logical_count"].tolist() == loads.tolist()
    write_sglang(tmp_path / "loads.json", recorder_of(loads))
    assert json.loads((tmp_path / "loads.json").read_text()) == {"logical_count": loads.tolist()}


def test_sglang_may_sum_its_steps(tmp_path):
    (tmp_path / "loads.json").write_text(json.dumps({"logical_count": [[1, 2, 3], [4, 5, 6]]}))
    assert read_sglang(tmp_path / "loads.json").loads.tolist() == [[[1, 2, 3], [4, 5, 6]]]


def test_sglang_dumps_passes_of_each_rank(tmp_path):
    torch = pytest.importorskip("torch")
    places = torch.tensor([[0, 1, 2, 0], [2, 1, 0, 1]])

    def dump(rank, counts):
        records = [
            {
                "forward_pass_id": step,
                "rank": rank,
                "gatherer_key": "primary",
                "global_physical_count": torch.tensor(count, dtype=torch.int32),
            }
            for step, count in counts
        ]
        path = tmp_path / f"rank{rank}.pt"
        torch.save({"records": records, "last_physical_to_logical_map": places}, path)
        return path

    first = read_sglang(dump(0, [(3, [[1, 2, 3, 4], [5, 6, 7, 8]]), (4, [[1, 0, 0, 0]] * 2), (4, [[0, 5, 0, 0]] * 2)]))
    second = read_sglang(dump(1, [(3, [[0, 0, 0, 10], [0, 0, 0, 10]])]))
    assert first.steps == [3, 4]
    assert first.loads.tolist() == [[[5, 2, 3], [7, 14, 5]], [[1, 5, 0], [0, 5, 1]]]
    assert Recorder.merged([first, second]).loads[0].tolist() == [[15, 2, 3], [7, 24, 5]]


@pytest.mark.parametrize(
    "value, message",
    [
        ({}, "neither logical_count nor records"),
        ({"logical_count": [1, 2]}, "logical_count: shape"),
        ({"logical_count": [[[-1]]]}, "is negative"),
        ({"logical_count": [[[0.5]]]}, "not all whole numbers"),
        ({"logical_count": [[], []]}, r"should be \[steps, layers, E\]"),
        ({"records": []}, "last_physical_to_logical_map"),
        ({"records": 3, "last_physical_to_logical_map": [[0]]}, "records are not a list"),
        ({"records": [3], "last_physical_to_logical_map": [[0]]}, r"records\[0\] is not an object"),
        ({"records": [{}], "last_physical_to_logical_map": [[0]]}, "no whole number 'forward_pass_id'"),
        (
            {
                "records": [{"forward_pass_id": 0, "global_physical_count": [[1, 2]]}],
                "last_physical_to_logical_map": [[0]],
            },
            r"global_physical_count: shape \[1, 2\], should be \[1, 1\]",
        ),
        ({"records": [], "last_physical_to_logical_map": [[10**9]]}, "beyond its places"),
    ],
)
def test_what_sglang_would_not_write_is_refused(tmp_path, value, message):
    (tmp_path / "loads.json").write_text(json.dumps(value))
    with pytest.raises(ValueError, match=message):
        read_sglang(tmp_path / "loads.json")


def test_a_dump_that_would_run_a_program_is_refused_unrun(tmp_path):
    torch = pytest.importorskip("torch")

    class Program:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it_ran"),)

    torch.save({"logical_count": Program()}, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"logical_count": Program()}, protocol=2))
    for name in ("zip.pt", "plain.pt"):
        with pytest.raises(ValueError, match="more than tensors and numbers"):
            read_sglang(tmp_path / name)
    assert not (tmp_path / "it_ran").exists()


def test_a_dump_that_is_cut_short_is_refused(tmp_path):
    pytest.importorskip("torch")
    write_sglang(tmp_path / "loads.pt", recorder_of(some_loads(2)))
    whole = (tmp_path / "loads.pt").read_bytes()
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.pt").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="cut.pt is cut short"):
            read_sglang(tmp_path / "cut.pt")


def test_a_dump_of_an_unknown_ending_is_refused(tmp_path):
    (tmp_path / "loads.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="ends neither in .pt nor in .json"):
        read_sglang(tmp_path / "loads.bin")
    with pytest.raises(ValueError, match="ends neither in .pt nor in .json"):
        write_sglang(tmp_path / "loads.bin", recorder_of(some_loads(1)))


def test_a_load_beyond_sglang_is_refused(tmp_path):
    recorder = Recorder(1, 1)
    recorder.record(0, 0, [2**31])
    with pytest.raises(ValueError, match="2147483648 does not fit"):
        write_sglang(tmp_path / "loads.pt", recorder)
    assert not (tmp_path / "loads.pt").exists()


# vLLM


def test_vllm_keeps_steps_and_loads(tmp_path):
    recorder = recorder_of(some_loads(3), steps=[4, 5, 9])
    write_vllm(tmp_path / "loads.jsonl", recorder, ranks=4, model="some/model")
    again = read_vllm(tmp_path / "loads.jsonl")
    assert again.steps == [4, 5, 9] and same(again.loads, recorder.loads)
    meta = json.loads((tmp_path / "loads.jsonl").read_text().splitlines()[0])
    assert meta == {
        "record_type": "eplb_load_meta",
        "version": 1,
        "model": "some/model",
        "num_ranks": 4,
        "num_groups": 1,
        "num_nodes": 1,
        "num_layers": LAYERS,
        "num_redundant_experts": 0,
    }


def stats(step=7, expert_load=((10, 1, 5, 2), (2, 8, 1, 3)), p2l_map=((0, 1, 2, 0), (1, 2, 0, 1)), **others):
    values = {
        "record_type": "eplb_load_stats",
        "version": 1,
        "step": step,
        "expert_load": expert_load,
        "p2l_map": p2l_map,
    }
    return json.dumps({**values, **others})


def test_vllm_adds_up_the_places_of_an_expert_under_the_map_of_the_step(tmp_path):
    moved = stats(step=8, p2l_map=((2, 1, 0, 0), (1, 2, 0, 1)))
    (tmp_path / "loads.jsonl").write_text(f'{stats()}\n\n{{"record_type": "session_metadata"}}\n{moved}\n')
    recorder = read_vllm(tmp_path / "loads.jsonl")
    assert recorder.steps == [7, 8]
    assert recorder.loads.tolist() == [[[12, 1, 5], [1, 5, 8]], [[7, 1, 10], [1, 5, 8]]]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "no records eplb_load_stats"),
        ('{"record_type": "eplb_load_meta", "version": 1}', "no records eplb_load_stats"),
        (stats()[:-10], "line 1 of .* is not JSON, or cut short"),
        (stats() + "\n" + stats(), "line 2 of .* has step 7, after 7"),
        (stats(step="7"), "no whole number 'step' from 0"),
        (stats(version=2), "version 2, only 1 is known"),
        (stats(expert_load=((1, 2),)), r"expert_load: shape \[1, 2\], should be \[2, 4\]"),
        (stats(expert_load=((1, 2, 3, 4), (1, 2, 3, -4))), "is negative"),
        (stats(p2l_map=((0, 1, 2, 4), (0, 1, 2, 3))), "p2l_map: shape .* experts up to 4"),
        (stats(p2l_map=()), "p2l_map: shape"),
        (stats() + "\n" + stats(8, p2l_map=((0, 1, 2, 3), (1, 2, 0, 1))), "2 layers of 4 experts, unlike those before"),
    ],
)
def test_statistics_that_vllm_would_not_write_are_refused(tmp_path, text, message):
    (tmp_path / "loads.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_vllm(tmp_path / "loads.jsonl")


def test_the_window_in_vllms_memory_is_read_from_its_oldest_step():
    places = [[0, 1, 2, 0], [2, 1, 0, 1]]
    window = np.arange(3 * 2 * 4).reshape(3, 2, 4).astype(np.int32)
    recorder = from_vllm_window(window, places, window_step=2)
    expected = [
        [[w[0][0] + w[0][3], w[0][1], w[0][2]], [w[1][2], w[1][1] + w[1][3], w[1][0]]] for w in window[[2, 0, 1]]
    ]
    assert recorder.loads.tolist() == np.array(expected).tolist()
    with pytest.raises(ValueError, match="window_step = 3, should be from 0 to below 3"):
        from_vllm_window(window, places, window_step=3)
    with pytest.raises(ValueError, match="expert_load_window: shape"):
        from_vllm_window(window[..., :3], places)


def test_vllm_needs_at_least_one_rank(tmp_path):
    with pytest.raises(ValueError, match="ranks = 0"):
        write_vllm(tmp_path / "loads.jsonl", recorder_of(some_loads(1)), ranks=0)
