"""Pictures of runs and of sequences; matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from hfopt.measure import Measure
from hfopt.runreader import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = npt.NDArray[Any]
_INK, _SOFT = "#262626", "#8a8a8a"


def plot_runs(runs: Sequence[Run]) -> Figure:
    """Curves of one or several runs: losses, error rate, lambda, rho and CG iterations.

    The left column is drawn against steps, the right one against seconds. Rows that no run has values for are
    left out. Raises ValueError if no run has a single step.
    """
    from matplotlib import pyplot as plt

    runs = [run for run in runs if len(run.steps)]
    if not runs:
        raise ValueError("there is nothing to draw: no run has finished a step")
    measures = {Measure.of(run.configuration) for run in runs}
    if len(measures) > 1:
        raise ValueError(
            f"these runs have different errors: {', '.join(sorted(m.title for m in measures))}; draw them apart"
        )
    (measure,) = measures
    panels = [
        ("loss", ("train_loss", "test_loss"), "log"),
        ("wrong (%)" if measure.name is None else measure.name, ("error_rate",), "log" if measure.name else "linear"),
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
            _curves(column, runs, names, time)
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


def draw_sequence(
    *,
    inputs: Any,
    hidden: Any,
    predictions: Any,
    targets: Any,
    scored: Any,
    length: int | None = None,
    title: str = "",
) -> Figure:
    """One sequence in one picture: inputs, hidden units, predictions and targets, time to the right.

    Tensors and arrays are both taken.

    Args:
        inputs: `(T, V)`, one row of the picture per input.
        hidden: `(T, h)`, one row per unit; the colours are symmetric about 0.
        predictions: `(T, O)`, after the output nonlinearity.
        targets: `(T, O)` real numbers, or `(T,)` class indices.
        scored: `(T,)` bool, the steps whose predictions count; their targets are shown.
        length: steps of the sequence; what follows is padding and is shaded. Default T.
        title: above the picture.
    """
    from matplotlib import pyplot as plt

    inputs, hidden, predictions = _array(inputs), _array(hidden), _array(predictions)
    targets, scored = _array(targets), _array(scored)
    T, V = inputs.shape
    length = T if length is None else length
    outputs = predictions.shape[1]
    classes = targets.ndim == 1
    figure = plt.figure(figsize=(9.0, 6.5), layout="constrained")
    heights = [min(2.0, 0.35 * V + 0.3), 3.2, 1.6]
    grid = figure.add_gridspec(3, 2, width_ratios=[45, 1], height_ratios=heights)
    above = figure.add_subplot(grid[0, 0])
    middle = figure.add_subplot(grid[1, 0], sharex=above)
    below = figure.add_subplot(grid[2, 0], sharex=above)
    bars = [figure.add_subplot(grid[i, 1]) for i in range(3)]
    for axes in (above, middle):
        axes.tick_params(labelbottom=False)
    _image(above, bars[0], inputs.T, "input", signed=bool((inputs < 0).any()))
    _image(middle, bars[1], hidden.T, "hidden unit", signed=True)
    if classes:
        _image(below, bars[2], predictions.T, "class (○ target)", signed=False)
        steps = np.flatnonzero(scored)
        below.plot(steps, targets[steps], "o", markerfacecolor="none", color="tab:red", label="target")
    else:
        for output in range(outputs):
            colour = f"C{output % 10}"
            name = f" {output}" if outputs > 1 else ""
            steps = np.flatnonzero(scored)
            below.plot(range(T), predictions[:, output], color=colour, label=f"prediction{name}")
            below.plot(
                steps,
                targets[steps, output],
                "o",
                markerfacecolor="none",
                color=colour,
                label=f"target{name}",
            )
            below.plot(steps, predictions[steps, output], ".", color=colour)
        below.set_ylabel("output")
        below.margins(y=0.15)
        below.spines[["top", "right"]].set_visible(False)
        bars[2].axis("off")
        if outputs == 1 and scored.sum() == 1:
            (step,) = np.flatnonzero(scored)
            numbers = f"predicted {predictions[step, 0]:.3f}\ntarget {targets[step, 0]:.3f}"
            bars[2].text(0.0, 0.02, numbers, transform=bars[2].transAxes, fontsize="small", color=_INK)
        if outputs <= 8:
            bars[2].legend(*below.get_legend_handles_labels(), frameon=False, fontsize="small", loc="upper left")
    below.set_xlabel("step")
    below.set_xlim(-0.5, T - 0.5)
    if length < T:
        for panel in (above, middle, below):
            panel.axvspan(length - 0.5, T - 0.5, color="white", alpha=0.7, linewidth=0)
            panel.axvline(length - 0.5, color=_SOFT, linewidth=0.8, linestyle=":")
    figure.suptitle(title, color=_INK)
    return figure


def _array(values: Any) -> Array:
    """A tensor or anything like an array as a numpy array."""
    return np.asarray(values.detach().cpu() if isinstance(values, torch.Tensor) else values)


def _image(axes: Axes, bar: Axes, values: Array, label: str, *, signed: bool) -> None:
    """A picture of `values (rows, T)` with its colour bar."""
    top = float(np.abs(values).max()) or 1.0
    if signed:
        image = axes.imshow(values, aspect="auto", cmap="RdBu_r", vmin=-top, vmax=top, interpolation="nearest")
    else:
        image = axes.imshow(values, aspect="auto", cmap="Greys", vmin=0.0, vmax=top, interpolation="nearest")
    if values.shape[0] <= 10:
        axes.set_yticks(range(values.shape[0]))
    axes.set_ylabel(label)
    axes.figure.colorbar(image, cax=bar)


def _curves(axes: Axes, runs: Sequence[Run], names: Sequence[str], time: str) -> None:
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
                run.steps[name][known] * (Measure.of(run.configuration).factor if name == "error_rate" else 1.0),
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
