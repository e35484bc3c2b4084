"""One style for all pictures: colours that the colour-blind tell apart, quiet axes, whole numbers of steps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from hfopt.experiment.store.reader import SavedRun, read_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

Array = npt.NDArray[Any]
Given = SavedRun | str | Path
P = ParamSpec("P")
R = TypeVar("R")

# Okabe & Ito, "Color Universal Design", 2008, without yellow, which is too pale for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
INK, SOFT, PALE = "#262626", "#767676", "#e6e6e6"
SIGNED, POSITIVE, TIME = "RdBu_r", "Greys", "viridis"
"""Colour maps: of numbers of both signs, of positive ones, and of steps."""
_LATEST = 0.9  # the end of the map of steps that is still dark enough for lines


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Let a function draw in this style, whatever matplotlib's settings are otherwise."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        import matplotlib
        from matplotlib.rcsetup import cycler

        settings: dict[Any, Any] = {
            "axes.prop_cycle": cycler(color=COLOURS),
            "axes.edgecolor": SOFT,
            "axes.labelcolor": INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.titlesize": 10,
            "axes.titlelocation": "left",
            "grid.color": PALE,
            "grid.linewidth": 0.6,
            "xtick.color": SOFT,
            "ytick.color": SOFT,
            "xtick.labelcolor": INK,
            "ytick.labelcolor": INK,
            "font.size": 9,
            "figure.titlesize": 11,
            "figure.facecolor": "white",
            "legend.frameon": False,
            "legend.fontsize": 8.5,
            "lines.linewidth": 1.4,
            "savefig.dpi": 130,
        }
        with matplotlib.rc_context(settings):
            return draw(*args, **kwargs)

    return drawn


def as_run(given: Given) -> SavedRun:
    """A run, or the run of that name or folder."""
    return given if isinstance(given, SavedRun) else read_run(given)


def as_runs(given: Given | Sequence[Given]) -> list[SavedRun]:
    """One or several runs, or their names."""
    return [as_run(given)] if isinstance(given, (SavedRun, str, Path)) else [as_run(one) for one in given]


def as_array(values: Any) -> Array:
    """A tensor or anything like an array as a numpy array."""
    return np.asarray(values.detach().cpu() if isinstance(values, torch.Tensor) else values)


def whole_steps(axes: Axes) -> None:
    """Ticks at whole numbers alone along x."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True, min_n_ticks=1))


def plain_numbers(axes: Axes) -> None:
    """Numbers along a logarithmic y axis as they are, such as 10 and not 10^1."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _place: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def legend_above(axes: Axes, columns: int = 3) -> None:
    """A legend above the panel, where it covers no curve and takes no width from it."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0.0, 1.0),
            ncols=columns,
            borderaxespad=0.1,
            borderpad=0.2,
            handlelength=1.6,
            columnspacing=1.2,
        )


def colours_of_steps(steps: Sequence[int], whole: Sequence[int]) -> tuple[list[Any], ScalarMappable]:
    """A colour per step, dark early and bright late, and what a colour bar over `whole` is made of."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    scale = ListedColormap(colormaps[TIME](np.linspace(0.0, _LATEST, 256)))
    norm = Normalize(min(whole), max(*whole, min(whole) + 1))
    mapped = ScalarMappable(norm, scale)
    return [scale(float(norm(step))) for step in steps], mapped


def bar_of_steps(figure: Figure, mapped: ScalarMappable, axes: Any, steps: Sequence[int]) -> None:
    """A colour bar whose ticks are the steps that are drawn, so far as there is room for them."""
    low, high = mapped.get_clim()
    room = 0.04 * ((high or 0) - (low or 0))
    ticks: list[int] = []
    for step in sorted(evenly(steps, 8), reverse=True):  # the last one is told in any case
        if not ticks or ticks[-1] - step > room:
            ticks.append(step)
    bar = figure.colorbar(mapped, ax=axes, label="step", ticks=ticks, pad=0.02, fraction=0.05)
    bar.outline.set_visible(False)


def evenly(steps: Sequence[int] | Array, most: int) -> list[int]:
    """At most so many of the steps, the first and the last among them."""
    found = [int(step) for step in steps]
    if len(found) <= most:
        return found
    return [found[i] for i in np.linspace(0, len(found) - 1, most).round().astype(int)]


def said_of(run: SavedRun, step: int) -> str:
    """The first metric before an update as words; empty if there was no test."""
    row, metric = run.steps[run.steps["step"] == step], run.metrics[0]
    if not len(row) or not np.isfinite(row[metric.column][0]):
        return ""
    value = metric.quantity(float(row[metric.column][0]))
    return f"{value} wrong" if metric.counted else f"{metric.name} {value}"
