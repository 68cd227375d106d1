"""SGLang's and vLLM's files of loads: what comes back, and what is refused."""

from __future__ import annotations

import json
import os
import pickle

import numpy as np
import pytest
from recorder_samples import LAYERS, recorder_of, same, some_loads

from expar.recorder import Recorder, from_vllm_window, read_sglang, read_vllm, write_sglang, write_vllm

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
