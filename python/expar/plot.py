"""Pictures of loads, with matplotlib: which experts and which ranks have how much to do.

Each function returns a ``matplotlib.figure.Figure`` and uses neither pyplot nor a screen: save the figure, or let a
notebook show it. Needs ``pip install matplotlib``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .recorder import Recorder, balancedness, checks, max_over_mean
from .recorder import rank_loads as loads_of_ranks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart with any colour vision: ColorBrewer's RdBu, and of Okabe and Ito's palette (2008) the vermilion.
_MAP = "RdBu_r"
_ORANGE = "#D55E00"
_GREY = "#595959"
# The coldest that has a colour of its own; beyond it experts are as good as idle.
_COLDEST = 1 / 8
# Beyond so many rows their numbers would overlap.
_MOST_NUMBERED = 48


def load_heatmap(
    loads: Any, path: checks.Path | None = None, ax: Axes | None = None, rows: str = "layer", first: int = 0
) -> Figure:
    """Draws the load of each expert in each layer against its layer's mean, and beside it the max/mean of each layer.

    Colours are a scale of doublings around the mean, so that an idle expert stands out as a hot one does.

    loads : a Recorder, of whose window the sum is shown; or [layers, E]; or [S, layers, E], of which the sum is shown;
            for steps in place of layers [S, E], such as ``recorder.loads[:, layer]``, with ``rows="step"``
    path  : also saves the figure there, in the format of its ending
    ax    : draws there, the bars to its right, in place of a new figure
    rows  : what a row is
    first : the number of the first row
    Raises ValueError: other shapes, negative loads, none at all. ImportError: no matplotlib. OSError: not written.
    """
    table = _table(loads)
    mean = table.mean(axis=1, keepdims=True)
    ratio = np.divide(table, mean, out=np.full(table.shape, np.nan), where=mean > 0)
    worst = max_over_mean(table)
    figure, ax = _figure(ax, (9.0, min(3.0 + 0.2 * len(table), 10.0)))

    hottest = max(2.0, float(np.nanmax(worst)))
    image = ax.imshow(
        np.log2(np.maximum(ratio, _COLDEST)),
        cmap=_module("matplotlib").colormaps[_MAP].with_extremes(bad="0.8"),  # rows where nothing was routed
        # Half of the map for each side of the mean, however far each goes.
        norm=_module("matplotlib.colors").TwoSlopeNorm(vmin=np.log2(_COLDEST), vcenter=0, vmax=np.log2(hottest)),
        aspect="auto",
        interpolation="nearest",
        extent=(-0.5, table.shape[1] - 0.5, first + len(table) - 0.5, first - 0.5),
    )
    ax.set_xlabel("expert")
    ax.set_ylabel(rows)
    _whole_ticks(ax.xaxis)
    _whole_ticks(ax.yaxis)

    bars = ax.inset_axes((1.015, 0, 0.15, 1), sharey=ax)
    number = np.arange(first, first + len(table))
    peak = int(np.nanargmax(worst))
    colour = [_ORANGE if i == peak else _GREY for i in range(len(table))]
    drawn = bars.barh(number, np.nan_to_num(worst), height=0.8, color=colour)
    if len(table) <= _MOST_NUMBERED:
        names = ["" if np.isnan(value) else f"{value:.1f}" for value in worst]
        bars.bar_label(drawn, labels=names, padding=2, fontsize=7)
    bars.set_xlim(0, 1.25 * hottest)
    bars.axvline(1, color="black", linewidth=0.8)
    bars.set_xlabel("max/mean")
    bars.tick_params(left=False, labelleft=False)
    bars.spines[["top", "right"]].set_visible(False)

    scale = ax.figure.colorbar(image, cax=ax.inset_axes((1.2, 0, 0.02, 1)), extend="min")
    ticks = np.arange(np.log2(_COLDEST), np.floor(np.log2(hottest)) + 1)
    scale.set_ticks(ticks.tolist(), labels=[f"{2.0**tick:g}" if tick >= 0 else f"1/{2.0**-tick:g}" for tick in ticks])
    scale.set_label(f"load / mean of its {rows}")
    ax.set_title(
        f"Load of {table.shape[1]} experts: max/mean {worst[peak]:.2f} ({rows} {number[peak]}, expert "
        f"{table[peak].argmax()}), {np.nanmean(worst):.2f} on average",
        loc="left",
    )
    return _saved(figure, path)


def rank_loads(
    loads: Any, ranks: int, path: checks.Path | None = None, ax: Axes | None = None, rows: str = "layer", first: int = 0
) -> Figure:
    """Draws the load of each rank in each layer against the layer's mean, where ranks hold the experts in order.

    A layer takes as long as its busiest rank: how far that one is above the mean is what a better placement can gain.

    loads : as for load_heatmap
    ranks : P
    path, ax, rows, first : as for load_heatmap
    Raises: as load_heatmap; ValueError: no ranks.
    """
    table = loads_of_ranks(_table(loads), ranks)
    worst = max_over_mean(table)
    mean = table.mean(axis=1, keepdims=True)
    ratio = np.divide(table, mean, out=np.full(table.shape, np.nan), where=mean > 0)
    figure, ax = _figure(ax, (9.0, 4.0))
    number = np.arange(first, first + len(table))

    ax.vlines(number, 1, worst, color=_ORANGE, linewidth=1.0)
    ax.plot(np.repeat(number, ranks), ratio.ravel(), ".", color=_GREY, alpha=0.6, markersize=6, label="a rank")
    ax.plot(number, worst, "o", color=_ORANGE, markersize=6, label="the busiest, by number")
    ax.axhline(1, color="black", linewidth=0.8)
    if len(table) <= _MOST_NUMBERED:
        for layer, height, busiest in zip(number, worst, table.argmax(axis=1)):
            if not np.isnan(height):
                ax.annotate(f"{busiest}", (layer, height), (0, 5), textcoords="offset points", ha="center", fontsize=7)
    ax.set_xlabel(rows)
    ax.set_ylabel(f"load / mean of its {rows}")
    ax.set_ylim(0, 1.12 * float(np.nanmax(worst)))
    _whole_ticks(ax.xaxis)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="lower right", bbox_to_anchor=(1, 0.98), frameon=False, ncols=2, fontsize=8)
    peak = int(np.nanargmax(worst))
    ax.set_title(
        f"Load of {ranks} ranks: max/mean {worst[peak]:.2f} ({rows} {number[peak]}), "
        f"balancedness {balancedness(table):.2f}",
        loc="left",
    )
    return _saved(figure, path)


def _table(loads: Any) -> NDArray[np.int64]:
    """[rows, E], of which at least one row has a load."""
    if isinstance(loads, Recorder):
        loads = loads.total()
    array = checks.whole_numbers(loads, "loads")
    if array.ndim == 3:
        array = array.sum(axis=0)
    if array.ndim != 2:
        raise ValueError(f"loads: shape {list(array.shape)}, should be [layers, E] or [S, layers, E]")
    array = checks.counts(array, (None, None), "loads")
    if not array.any():
        raise ValueError("there is no load to draw: nothing was routed")
    return array


def _figure(ax: Axes | None, size: tuple[float, float]) -> tuple[Figure, Axes]:
    if ax is not None:
        return ax.figure.figure, ax  # the whole one, where ax lies in a part of it
    figure = _module("matplotlib.figure").Figure(figsize=size, layout="constrained")
    return figure, figure.add_subplot()


def _whole_ticks(axis: Any) -> None:
    axis.set_major_locator(_module("matplotlib.ticker").MaxNLocator(integer=True, nbins=16, min_n_ticks=1))


def _module(name: str) -> Any:
    return checks.needed(name, "matplotlib", "a picture")


def _saved(figure: Figure, path: checks.Path | None) -> Figure:
    if path is not None:
        # Equal loads are equal files: an SVG would say when it was drawn, and by what.
        unsaid = {"Date": None, "Creator": None} if str(path).endswith(".svg") else None
        with _module("matplotlib").rc_context({"svg.hashsalt": "expar"}):
            figure.savefig(path, dpi=150, metadata=unsaid)
    return figure
