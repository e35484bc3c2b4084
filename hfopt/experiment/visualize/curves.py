"""Curves of runs; matplotlib is imported when they are drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hfopt.experiment.metrics import Metric
from hfopt.experiment.store.reader import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = npt.NDArray[Any]
_INK = "#262626"


def plot_runs(runs: Sequence[Run]) -> Figure:
    """Curves of one or several runs: losses, error rate, lambda, rho and CG iterations.

    The left column is drawn against steps, the right one against seconds. Rows that no run has values for are
    left out. Raises ValueError if no run has a single step.
    """
    from matplotlib import pyplot as plt

    runs = [run for run in runs if len(run.steps)]
    if not runs:
        raise ValueError("there is nothing to draw: no run has finished a step")
    metrics = _common(runs)
    panels = [
        ("loss", ("train_loss", "test_loss"), "log"),
        *((_label(metric), (metric.column,), _scale(metric, runs)) for metric in metrics),
        ("λ", ("damping",), "log"),
        ("ρ", ("rho",), "linear"),
        ("CG iterations", ("cg_iterations", "backtracked"), "linear"),
    ]
    drawn = [panel for panel in panels if any(_known(run, name).any() for run in runs for name in panel[1])]
    figure, grid = plt.subplots(
        len(drawn),
        2,
        figsize=(11.0, 0.9 + 1.75 * len(drawn)),
        sharex="col",
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for axes, (label, names, scale) in zip(grid, drawn, strict=True):
        for column, time in zip(axes, ("step", "total_seconds"), strict=True):
            _curves(column, runs, names, time, {m.column: m.factor for m in metrics})
            column.set_yscale(scale)
            column.grid(color="#e6e6e6", linewidth=0.6)
            column.spines[["top", "right"]].set_visible(False)
        axes[0].set_ylabel(label)
        if label == "ρ":
            low, high = _central([run.steps["rho"][_known(run, "rho")] for run in runs])
            axes[0].set_ylim(low, high)
            for column in axes:
                column.axhspan(0.25, 0.75, color="#eeeeee", zorder=0)
    grid[-1, 0].set_xlabel("step")
    grid[-1, 1].set_xlabel("seconds")
    for axes, (_, names, _) in zip(grid, drawn, strict=True):
        if len(names) > 1:
            axes[1].legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.suptitle(", ".join(run.name for run in runs), color=_INK)
    return figure


def _common(runs: Sequence[Run]) -> list[Metric]:
    """The metrics that all runs have; ValueError if their first ones differ, which would be drawn as one."""
    if len({run.metrics[0] for run in runs}) > 1:
        titles = ", ".join(sorted({run.metrics[0].title for run in runs}))
        raise ValueError(f"these runs have different errors: {titles}; draw them apart")
    return [metric for metric in runs[0].metrics if all(metric in run.metrics for run in runs)]


def _label(metric: Metric) -> str:
    if metric.counted:
        return "wrong (%)"
    return f"{metric.name} ({metric.unit})" if metric.unit else metric.name


def _scale(metric: Metric, runs: Sequence[Run]) -> str:
    """Shares are drawn as they are; what is positive and better where it is lower, on a logarithmic axis."""
    values = [run.steps[metric.column][_known(run, metric.column)] for run in runs]
    return "linear" if metric.unit == "%" or metric.better == "higher" or any((v <= 0).any() for v in values) else "log"


def _curves(axes: Axes, runs: Sequence[Run], names: Sequence[str], time: str, factors: Mapping[str, float]) -> None:
    """Columns of each run against `time`: a colour per run, or per column if there is one run."""
    for i, run in enumerate(runs):
        # A row's losses are those before its step, so they stand where the step began.
        start = run.steps[time] - (run.steps["seconds"] if time == "total_seconds" else 0)
        for j, name in enumerate(names):
            known = _known(run, name)
            if not known.any():
                continue
            label = _LABELS.get(name, "")
            pale = len(names) > 1 and j == 0 and len(runs) > 1
            axes.plot(
                start[known],
                run.steps[name][known] * factors.get(name, 1.0),
                color=f"C{i if len(runs) > 1 else j}",
                alpha=0.45 if pale else 1.0,
                linewidth=0.8 if pale else 1.3,
                marker="." if known.sum() < 40 else None,
                markersize=4,
                label=label if len(runs) == 1 else f"{run.name} {label}".rstrip(),
            )


_LABELS = {
    "train_loss": "training",
    "test_loss": "test",
    "cg_iterations": "all",
    "backtracked": "taken",
}


def _known(run: Run, name: str) -> Array:
    """Which rows of a run have a value in a column."""
    values = run.steps[name]
    known: Array = np.isfinite(values) if values.dtype.kind == "f" else values >= 0
    return known


def _central(values: Sequence[Array]) -> tuple[float, float]:
    """Limits that show nearly all of `values`, so that a few extreme ones do not flatten the rest."""
    together = np.concatenate(values)
    low, high = np.percentile(together, [3.0, 97.0])
    return max(min(float(low), 0.0), -1.0) - 0.1, min(max(float(high), 1.0), 2.0) + 0.1
