"""Curves of runs over training: losses, errors, lambda, rho, CG; of one run, or of several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hfopt.experiment.metrics import Metric
from hfopt.experiment.store.reader import SavedRun
from hfopt.experiment.visualize.style import (
    COLOURS,
    INK,
    SOFT,
    Array,
    Given,
    as_runs,
    legend_above,
    plain_numbers,
    styled,
    whole_steps,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Against = Literal["step", "seconds", "products"]
_AXES = {"step": "step", "seconds": "seconds of training", "products": "curvature products"}
_LABELS = {"train_loss": "training", "test_loss": "test", "cg_iterations": "run", "backtracked": "taken"}
# Where there are two columns in a panel, the first is drawn pale behind the second.
_PANELS = (
    ("loss", ("train_loss", "test_loss"), "log"),
    ("λ, damping", ("damping",), "log"),
    ("ρ, decrease over\npredicted", ("rho",), "linear"),
    ("CG iterations", ("cg_iterations", "backtracked"), "linear"),
)
_FEW = 40  # points that are still marked one by one


@styled
def plot_runs(runs: Given | Sequence[Given], against: Sequence[Against] = ("step", "seconds")) -> Figure:
    """Curves of one or several runs: losses, errors, lambda, rho and CG iterations.

    A row's losses and errors are those before its update, and stand where the update began. Rows of panels that no run
    has values for are left out. The threshold of the error is dashed. Between 1/4 and 3/4, shaded, rho leaves lambda as
    it is, if Levenberg and Marquardt's rule chooses it.

    Args:
        runs: a run or several, or their names.
        against: what the columns are drawn against: "step", "seconds" and "products" (of curvature, all so far).

    Raises:
        ValueError: no run has a single step, runs have different errors, or something else to draw against.
    """
    found = [run for run in as_runs(runs) if len(run.steps)]
    if not found:
        raise ValueError("there is nothing to draw: no run has finished a step")
    metrics = _common(found)
    errors = [(_label(m), (m.column,), _scale(m, found)) for m in metrics]
    return _panels(found, [_PANELS[0], *errors, *_PANELS[1:]], against, metrics)


@styled
def compare_runs(runs: Sequence[Given]) -> Figure:
    """Test loss and errors of several runs against steps, seconds and curvature products.

    Products are left out if no run has any. Raises ValueError as :func:`plot_runs` does.
    """
    found = [run for run in as_runs(runs) if len(run.steps)]
    if not found:
        raise ValueError("there is nothing to draw: no run has finished a step")
    metrics = _common(found)
    errors = [(_label(m), (m.column,), _scale(m, found)) for m in metrics]
    against: list[Against] = ["step", "seconds"]
    if any((run.steps["products"] > 0).any() for run in found):
        against.append("products")
    return _panels(found, [("test loss", ("test_loss",), "log"), *errors], against, metrics)


def _panels(
    runs: Sequence[SavedRun],
    panels: Sequence[tuple[str, tuple[str, ...], str]],
    against: Sequence[Against],
    metrics: Sequence[Metric],
) -> Figure:
    """A grid: a row per panel, a column per thing to draw against."""
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    unknown = [name for name in against if name not in _AXES]
    if unknown or not against:
        raise ValueError(f"against={list(against)}: choose from {', '.join(map(repr, _AXES))}")
    drawn = [panel for panel in panels if any(_known(run, name).any() for run in runs for name in panel[1])]
    figure, grid = plt.subplots(
        len(drawn),
        len(against),
        figsize=(1.5 + 3.9 * len(against), 1.0 + 1.75 * len(drawn)),
        sharex="col",
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    factors = {metric.column: metric.factor for metric in metrics}
    for axes, (label, names, scale) in zip(grid, drawn, strict=True):
        for column, time in zip(axes, against, strict=True):
            for i, run in enumerate(runs):
                _curves(column, run, i if len(runs) > 1 else None, names, time, scale, factors)
            column.set_yscale(scale)
            if scale == "log" and factors.get(names[0], 1.0) != 1.0:
                plain_numbers(column)
            if names[0] == "cg_iterations":
                column.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
            if time != "seconds":
                whole_steps(column)
        axes[0].set_ylabel(label)
        _extras(axes, runs, names, metrics)
        if len(runs) == 1:
            legend_above(axes[0])
    for column, time in zip(grid[-1], against, strict=True):
        column.set_xlabel(_AXES[time])
    figure.align_ylabels(grid[:, 0])
    if len(runs) == 1:
        figure.suptitle(runs[0].name, color=INK, x=0.01, ha="left")
    else:
        lines = [Line2D([], [], color=COLOURS[i % len(COLOURS)], linestyle=_dash(i)) for i in range(len(runs))]
        figure.legend(lines, [run.name for run in runs], loc="outside upper left", ncols=2 if len(runs) > 1 else 1)
    return figure


def _curves(
    axes: Axes,
    run: SavedRun,
    place: int | None,
    names: Sequence[str],
    time: Against,
    scale: str,
    factors: dict[str, float],
) -> None:
    """Columns of a run; `place` is its place among several, whose colour and dashes it has."""
    start = _start(run, time)
    if time == "products" and not start.any():  # of an optimizer that needs none
        return
    for j, name in enumerate(names):
        known = _known(run, name)
        if not known.any():
            continue
        values = run.steps[name][known] * factors.get(name, 1.0)
        pale = len(names) > 1 and j == 0
        colour = COLOURS[(0 if place is None else place) % len(COLOURS)]
        few = known.sum() <= _FEW
        options: dict[str, Any] = {
            "color": colour,
            "alpha": 0.45 if pale else 1.0,
            "linewidth": 1.0 if pale else 1.5,
            "linestyle": "-" if place is None else _dash(place),
            "marker": "." if few else None,
            "markersize": 5,
            "label": _LABELS.get(name, ""),
        }
        if scale == "log" and (values == 0).any() and (values > 0).any():
            # What is zero has no place on a logarithmic axis; it is shown at the lower edge.
            least = values[values > 0].min() / 2
            axes.plot(start[known][values == 0], np.full((values == 0).sum(), least), "v", color=colour, markersize=4)
            values = np.where(values == 0, least, values)
        axes.plot(start[known], values, **options)


def _extras(row: Sequence[Axes], runs: Sequence[SavedRun], names: Sequence[str], metrics: Sequence[Metric]) -> None:
    """What a panel shows besides curves: the threshold, where rho leaves lambda, limits that show most values."""
    if names == (metrics[0].column,):
        bounds = {run.configuration.get("driver", {}).get("threshold") for run in runs}
        bound = bounds.pop() if len(bounds) == 1 else None
        if isinstance(bound, float) and bound > 0:
            for axes in row:
                axes.axhline(bound * metrics[0].factor, color=SOFT, linestyle=(0, (4, 3)), linewidth=1.0, zorder=1)
            row[0].annotate(
                f"threshold {metrics[0].quantity(bound, 0)}",
                (0.01, bound * metrics[0].factor),
                xycoords=("axes fraction", "data"),
                xytext=(0, 2),
                textcoords="offset points",
                color=SOFT,
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
            )
    if names == ("rho",):
        row[0].set_ylim(*_central([run.steps["rho"][_known(run, "rho")] for run in runs]))
        rules = {str(run.configuration.get("optimizer", {}).get("damping") or {}) for run in runs}
        if all("LevenbergMarquardt" in rule for rule in rules):
            for axes in row:
                axes.axhspan(0.25, 0.75, color=SOFT, alpha=0.15, linewidth=0, zorder=0)
            if len(runs) == 1:
                from matplotlib.patches import Patch

                handle = Patch(color=SOFT, alpha=0.15, linewidth=0)
                row[0].legend(
                    [handle],
                    ["λ stays; it falls if ρ is above, and rises if below"],
                    loc="lower left",
                    bbox_to_anchor=(0.0, 1.0),
                    borderaxespad=0.1,
                    borderpad=0.2,
                    handlelength=1.6,
                )


def _start(run: SavedRun, time: Against) -> Array:
    """Where the update of each row began."""
    if time == "step":
        steps: Array = run.steps["step"]
        return steps
    spent = np.maximum(run.steps["products"], 0) if time == "products" else run.steps["seconds"]
    total = run.steps["total_seconds"] if time == "seconds" else np.cumsum(spent)
    began: Array = total - spent
    return began


def _dash(place: int) -> Any:
    """Beyond the colours, lines are told apart by dashes."""
    return ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (5, 1.5, 1.5, 1.5)))[place // len(COLOURS) % 4]


def _common(runs: Sequence[SavedRun]) -> list[Metric]:
    """The metrics that all runs have; ValueError if their first ones differ, which would be drawn as one."""
    if len({run.metrics[0] for run in runs}) > 1:
        titles = ", ".join(sorted({run.metrics[0].title for run in runs}))
        raise ValueError(f"these runs have different errors: {titles}; draw them apart")
    return [metric for metric in runs[0].metrics if all(metric in run.metrics for run in runs)]


def _label(metric: Metric) -> str:
    if metric.counted:
        return "wrong (%)"
    return f"{metric.name} ({metric.unit})" if metric.unit else metric.name


def _scale(metric: Metric, runs: Sequence[SavedRun]) -> str:
    """What is positive and better where it is lower has a logarithmic axis."""
    values = [run.steps[metric.column][_known(run, metric.column)] for run in runs]
    positive = any((v > 0).any() for v in values) and not any((v < 0).any() for v in values)
    return "log" if metric.better == "lower" and positive else "linear"


def _known(run: SavedRun, name: str) -> Array:
    """Which rows of a run have a value in a column."""
    values = run.steps[name]
    known: Array = np.isfinite(values) if values.dtype.kind == "f" else values >= 0
    return known


def _central(values: Sequence[Array]) -> tuple[float, float]:
    """Limits that show nearly all of `values`, so that a few extreme ones do not flatten the rest."""
    together = np.concatenate(values)
    low, high = np.percentile(together, [3.0, 97.0])
    return max(min(float(low), 0.0), -1.0) - 0.1, min(max(float(high), 1.0), 2.0) + 0.1
