"""Pictures of one sequence: inputs, hidden units, predictions and targets; matplotlib is imported when one is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = npt.NDArray[Any]
_INK, _SOFT = "#262626", "#8a8a8a"


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
