"""The loads that a recorder keeps, their statistics, its own file, and what TensorBoard shows."""

from __future__ import annotations

import json

import numpy as np
import pytest
from recorder_samples import EXPERTS, LAYERS, recorder_of, same, some_loads

from expar.recorder import (
    Recorder,
    balancedness,
    gini,
    max_over_mean,
    mean_over_max,
    rank_loads,
    read_routes,
    read_sglang,
    read_vllm,
)

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
