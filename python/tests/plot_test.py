"""Pictures of loads: what they show, read back from the figure, and what they leave alone."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import numpy as np
import pytest

from expar.recorder import Recorder, Routes, max_over_mean, rank_loads, write_routes

matplotlib = pytest.importorskip("matplotlib", reason="needs matplotlib")
from expar import plot  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402


def some_loads(layers=6, experts=16):
    return np.random.default_rng(0).zipf(1.5, (layers, experts)).clip(0, 1000)


def heatmap_of(figure):
    """The axes of the map, of the bars and of the scale."""
    ax = figure.axes[0]
    return (ax, *ax.child_axes)


def test_a_heatmap_shows_each_load_against_the_mean_of_its_layer():
    loads = some_loads()
    ax, bars, _ = heatmap_of(plot.load_heatmap(loads))
    (image,) = ax.images
    ratio = loads / loads.mean(axis=1, keepdims=True)
    assert np.allclose(image.get_array(), np.log2(np.maximum(ratio, 1 / 8)))
    assert [bar.get_width() for bar in bars.patches] == pytest.approx(list(max_over_mean(loads)))
    assert [text.get_text() for text in bars.texts] == [f"{value:.1f}" for value in max_over_mean(loads)]
    assert (ax.get_xlabel(), ax.get_ylabel(), bars.get_xlabel()) == ("expert", "layer", "max/mean")


def test_the_mean_has_the_colour_of_the_middle():
    ax, _, _ = heatmap_of(plot.load_heatmap([[4, 4, 4, 4], [0, 1, 1, 14]]))
    (image,) = ax.images
    colours = image.cmap(image.norm(image.get_array()))
    assert np.allclose(colours[0], image.cmap(0.5), atol=0.01)
    assert np.allclose(colours[1, 0], image.cmap(0.0)) and np.allclose(colours[1, 3], image.cmap(1.0))


def test_titles_name_the_worst():
    loads = np.full((3, 4), 5)
    loads[1] = [2, 2, 14, 2]
    title = plot.load_heatmap(loads, first=1).axes[0].get_title(loc="left")
    assert title == "Load of 4 experts: max/mean 2.80 (layer 2, expert 2), 1.60 on average"
    title = plot.rank_loads(loads, 2, first=1).axes[0].get_title(loc="left")
    assert title == "Load of 2 ranks: max/mean 1.60 (layer 2), balancedness 0.83"


def test_rows_may_be_steps():
    ax, _, scale = heatmap_of(plot.load_heatmap(some_loads(), rows="step", first=100))
    assert ax.get_ylabel() == "step" and scale.get_ylabel() == "load / mean of its step"
    assert "(step 10" in ax.get_title(loc="left")
    assert sorted(ax.get_ylim()) == [99.5, 105.5]


def test_a_recorder_is_drawn_as_the_sum_of_its_window():
    recorder = Recorder(2, 4)
    for step in range(3):
        for layer in range(2):
            recorder.record(step, layer, [step, 1, 1 + layer, 2])
    images = [plot.load_heatmap(loads).axes[0].images[0] for loads in (recorder, recorder.loads, recorder.total())]
    for image in images[1:]:
        assert np.array_equal(image.get_array(), images[0].get_array())


def test_ranks_are_drawn_against_the_mean_of_their_layer():
    loads = some_loads()
    expected = rank_loads(loads, 4)
    (ax,) = plot.rank_loads(loads, 4).axes
    all_ranks, busiest, _ = ax.lines
    assert np.allclose(all_ranks.get_ydata().reshape(6, 4), expected / expected.mean(axis=1, keepdims=True))
    assert np.allclose(busiest.get_ydata(), max_over_mean(expected))
    assert [text.get_text() for text in ax.texts] == [str(rank) for rank in expected.argmax(axis=1)]


@pytest.mark.parametrize("draw", [plot.load_heatmap, lambda loads, **others: plot.rank_loads(loads, 2, **others)])
def test_pictures_are_saved_and_returned(tmp_path, draw):
    figure = draw(some_loads(), path=tmp_path / "a.png")
    assert isinstance(figure, Figure)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    draw(some_loads(), path=tmp_path / "a.svg")
    picture = (tmp_path / "a.svg").read_text()
    draw(some_loads(), path=tmp_path / "b.svg")
    assert "<svg" in picture and picture == (tmp_path / "b.svg").read_text()


@pytest.mark.parametrize("draw", [plot.load_heatmap, lambda loads, **others: plot.rank_loads(loads, 2, **others)])
def test_axes_of_the_caller_are_drawn_into(draw):
    whole = Figure()
    ax = whole.subfigures(1, 2)[1].subplots()
    assert draw(some_loads(), ax=ax) is whole
    assert ax.get_title(loc="left")
    whole.draw_without_rendering()


@pytest.mark.parametrize("layers, experts", [(1, 1), (1, 4), (60, 384), (200, 8)])
def test_any_shape_can_be_drawn_without_a_warning(tmp_path, layers, experts, recwarn):
    loads = some_loads(layers, experts)
    plot.load_heatmap(loads, tmp_path / "a.png")
    plot.rank_loads(loads, 3, tmp_path / "b.png")
    assert [str(warning.message) for warning in recwarn] == []


def test_a_layer_without_load_stays_grey(tmp_path, recwarn):
    figure = plot.load_heatmap([[0, 0], [3, 1]], tmp_path / "a.png")
    image = figure.axes[0].images[0]
    assert image.get_array().mask.tolist() == [[True, True], [False, False]]
    plot.rank_loads([[0, 0], [3, 1]], 2, tmp_path / "b.png")
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize("draw", [plot.load_heatmap, lambda loads: plot.rank_loads(loads, 2)])
@pytest.mark.parametrize(
    "loads, message",
    [
        ([1, 2], r"loads: shape \[2\], should be \[layers, E\]"),
        ([[1, -2]], "is negative"),
        ([[0, 0]], "nothing was routed"),
        (Recorder(2, 3), "nothing was routed"),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw, loads, message):
    with pytest.raises(ValueError, match=message):
        draw(loads)


def without(module, statements):
    """Runs a program in which `module` cannot be imported; what it says."""
    program = f"import sys; sys.modules[{module!r}] = None; sys.path[:] = {sys.path!r}\n{statements}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)


def test_pyplot_is_never_imported():
    done = without(
        "matplotlib.pyplot", "from expar import plot; plot.load_heatmap([[1, 2]]); plot.rank_loads([[1, 2]], 2)"
    )
    assert done.returncode == 0, done.stderr


def test_a_missing_matplotlib_says_what_to_type():
    done = without("matplotlib", "from expar import plot; plot.load_heatmap([[1, 2]])")
    assert done.stderr.strip().endswith("pip install matplotlib")


def test_a_missing_torch_says_what_to_type(tmp_path):
    done = without(
        "torch",
        f"from expar import recorder; recorder.write_sglang({str(tmp_path / 'a.pt')!r}, recorder.Recorder(1, 1))",
    )
    assert done.stderr.strip().endswith("pip install torch")


def test_the_example_records_a_file_of_routes_and_draws_it(tmp_path):
    ids = np.random.default_rng(0).integers(0, 6, (2, 1000, 2))
    write_routes(tmp_path / "a.routes.gz", Routes(ids=ids, experts=6, header={"first_layer": 1}))
    example = pathlib.Path(__file__).parents[2] / "examples" / "python" / "record_loads.py"
    arguments = [tmp_path / "a.routes.gz", "--ranks", "3", "--output", tmp_path / "made"]
    program = f"import runpy, sys; sys.path[:] = {sys.path!r}; sys.argv = {[str(example), *map(str, arguments)]!r}"
    program += f"; runpy.run_path({str(example)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("4 steps, 2 layers of 6 experts: max/mean 1.0")
    made = sorted(path.name for path in (tmp_path / "made").iterdir())
    assert made == ["experts.png", "loads.json", "ranks.png", "sglang.json", "steps.png"]
    recorder = Recorder.read_json(tmp_path / "made" / "loads.json")
    assert recorder.total().tolist() == [np.bincount(of_layer.ravel(), minlength=6).tolist() for of_layer in ids]
