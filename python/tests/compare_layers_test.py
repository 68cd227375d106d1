"""bench/compare_layers.py at a size that says nothing about speed: all peers that are here compute the same."""

import dataclasses
import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest
import torch

BENCH = pathlib.Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))

from peers import notebook_layer, task  # noqa: E402

NOTEBOOK = """
Some words.

```
{imports}
class MoEConfig:
    pass
class PyTorchAllToAll:
    pass
```

```
raise RuntimeError("a cell that defines none of them is not run")
```

```
class EPMoE:
    pass
```
"""


def test_all_peers_agree_and_the_report_has_every_row(tmp_path):
    report_file = tmp_path / "report.json"
    shape = "--hidden 32 --inner 16 --experts 4 --topk 2 --tokens 6 --seconds 0 --size qwen3 notebook"
    program = [sys.executable, BENCH / "compare_layers.py", *shape.split(), "--json", report_file]
    done = subprocess.run(program, text=True, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(report_file.read_text())
    assert report["machine"]["cores"] > 0

    rows = report["rows"]
    wanted = [(dtype, what, ranks) for dtype in ("bf16", "f32") for what in ("forward", "step") for ranks in (1, 2)]
    assert [(r["dtype"], r["what"].removeprefix("layer_"), r["ranks"]) for r in rows] == wanted
    assert all(r["wrong"] == 0 and r["p50_us"] > 0 and r["tokens"] * r["ranks"] == 12 for r in rows)
    for row in rows:
        peers = {"gloo", "expar_1_rank", "expar_2_ranks"} - {"expar_1_rank" if row["ranks"] == 1 else "expar_2_ranks"}
        if row["dtype"] == "bf16" and importlib.util.find_spec("transformers"):
            peers |= {"transformers_eager", "transformers_grouped_mm"}
        assert peers <= set(row["peers"])
        for peer in row["peers"].values():
            assert peer["wrong"] == 0
            assert peer["ratio"] == pytest.approx(peer["p50_us"] / row["p50_us"])
    for size in ("qwen3", "notebook"):
        assert "--notebook FILE" in report["absent"][size]["notebook"]


def test_a_token_that_went_to_another_expert_is_wrong():
    small = task.Task(tokens=4, hidden=16, inner=8, experts=8, topk=2, dtype="bf16")
    weights = task.draw_weights(small, seed=1)
    x, dout = task.draw_tokens(small, weights, seed=2)
    right, gradients = task.expected(small, weights, x, dout)
    assert task.count_wrong(small, right.bfloat16(), right) == 0
    swapped = dataclasses.replace(weights, down=weights.down.roll(1, 0))
    other, other_gradients = task.expected(small, swapped, x, dout)
    assert task.count_wrong(small, other, right) == small.total
    assert task.count_wrong(small, other_gradients.dx, gradients.dx) == small.total
    assert task.count_wrong(small, other_gradients.up, gradients.up) > 0
    assert task.count_wrong(small, -gradients.up, gradients.up) == gradients.up.any(1).sum()
    assert task.count_wrong(small, right * float("nan"), right) == small.total


@pytest.mark.parametrize("kind", ["md", "ipynb"])
def test_of_a_notebook_the_cells_with_its_classes_are_run_and_no_others(tmp_path, kind):
    file = tmp_path / f"notebook.{kind}"
    text = NOTEBOOK.format(imports="import torch")
    if kind == "ipynb":
        cells = [{"cell_type": "code", "source": [part]} for part in text.split("```")[1::2]]
        text = json.dumps({"cells": [{"cell_type": "markdown", "source": ["class EPMoE"]}, *cells]})
    file.write_text(text)
    made = notebook_layer.classes(str(file))
    assert all(isinstance(made[name], type) for name in notebook_layer.CLASSES)
    assert made["torch"] is torch


def test_a_notebook_without_one_of_its_classes_is_named(tmp_path):
    file = tmp_path / "other.md"
    file.write_text(NOTEBOOK.format(imports="").replace("class EPMoE", "class Other"))
    with pytest.raises(ValueError, match="other.md has no cell with class EPMoE"):
        notebook_layer.classes(str(file))
