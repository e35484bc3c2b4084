"""Pictures of one sequence: inputs, hidden units, predictions and targets; still, and moving over training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hfopt.experiment.visualize.style import COLOURS, INK, POSITIVE, SIGNED, SOFT, Array, as_array, styled, whole_steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MANY_OUTPUTS = 8


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
        inputs: `(T, V)`, one row of the picture per input; `(T,)` class indices.
        hidden: `(T, h)`, one row per unit; the colours are symmetric about 0.
        predictions: `(T, O)`, after the output nonlinearity.
        targets: `(T, O)` real numbers, or `(T,)` class indices.
        scored: `(T,)` bool, the steps whose predictions count; their targets are shown.
        length: steps of the sequence; what follows is padding and is shaded. Default T.
        title: above the picture.
    """
    return SequencePicture(inputs, hidden, predictions, targets, scored, length=length, title=title).figure


class SequencePicture:
    """The picture of one sequence, whose hidden units and predictions may be replaced by those of another time.

    Args:
        inputs, hidden, predictions, targets, scored, length, title: see :func:`draw_sequence`.
        top: where the colours of the hidden units end; by default their largest modulus.
        limits: of the axis of real predictions; by default what they and the targets need.
    """

    @styled
    def __init__(
        self,
        inputs: Any,
        hidden: Any,
        predictions: Any,
        targets: Any,
        scored: Any,
        *,
        length: int | None = None,
        title: str = "",
        top: float | None = None,
        limits: tuple[float, float] | None = None,
    ) -> None:
        from matplotlib import pyplot as plt

        inputs, hidden, predictions = as_array(inputs), as_array(hidden), as_array(predictions)
        self._targets, scored = as_array(targets), as_array(scored).astype(bool)
        T = len(inputs)
        inputs = inputs.reshape(T, -1)
        length = T if length is None else length
        self._scored = np.flatnonzero(scored)
        self._classes = self._targets.ndim == 1
        self._lines: list[tuple[Any, Any]] = []
        self._numbers: Any = None
        self.figure: Figure = plt.figure(figsize=(8.6, 6.2), layout="constrained")
        heights = [min(2.0, 0.35 * inputs.shape[1] + 0.3), 3.4, 1.7]
        grid = self.figure.add_gridspec(3, 2, width_ratios=[45, 1], height_ratios=heights)
        above = self.figure.add_subplot(grid[0, 0])
        middle = self.figure.add_subplot(grid[1, 0], sharex=above)
        below = self.figure.add_subplot(grid[2, 0], sharex=above)
        bars = [self.figure.add_subplot(grid[i, 1]) for i in range(3)]
        for axes in (above, middle):
            axes.tick_params(labelbottom=False)
        _image(above, bars[0], inputs.T, "input", signed=bool((inputs < 0).any()))
        self._units = _image(middle, bars[1], hidden.T, "hidden unit", signed=True, top=top)
        if self._classes:
            self._answers = _image(below, bars[2], predictions.T, "class", signed=False, top=1.0)
            targets_at = self._targets[self._scored]
            below.plot(self._scored, targets_at, "o", markerfacecolor="none", color=COLOURS[1], label="target")
            below.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), borderaxespad=0.1, borderpad=0.2)
        else:
            self._draw_numbers(below, bars[2], predictions, limits)
        below.set_xlabel("time step")
        below.set_xlim(-0.5, T - 0.5)
        whole_steps(below)
        if length < T:
            for panel in (above, middle, below):
                panel.axvspan(length - 0.5, T - 0.5, color="white", alpha=0.7, linewidth=0)
                panel.axvline(length - 0.5, color=SOFT, linewidth=0.8, linestyle=":")
        self.figure.align_ylabels([above, middle, below])
        self._title = self.figure.suptitle(title, color=INK, x=0.01, ha="left")

    def _draw_numbers(self, axes: Axes, beside: Axes, predictions: Array, limits: tuple[float, float] | None) -> None:
        """Curves of real predictions, and the targets where they count."""
        T, outputs = predictions.shape
        beside.axis("off")
        for output in range(outputs):
            colour = COLOURS[output % len(COLOURS)]
            name = f" {output}" if outputs > 1 else ""
            (line,) = axes.plot(range(T), predictions[:, output], color=colour, alpha=0.6, label=f"prediction{name}")
            (dots,) = axes.plot(self._scored, predictions[self._scored, output], "o", markersize=5, color=colour)
            axes.plot(
                self._scored,
                self._targets[self._scored, output],
                "o",
                markersize=10,
                markerfacecolor="none",
                markeredgecolor=COLOURS[1] if outputs == 1 else colour,
                markeredgewidth=1.5,
                label=f"target{name}",
            )
            self._lines.append((line, dots))
        axes.set_ylabel("output")
        axes.margins(y=0.2)
        if limits is not None:
            axes.set_ylim(*limits)
        if outputs <= _MANY_OUTPUTS:
            axes.legend(
                loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=8, borderaxespad=0.1, borderpad=0.2, handlelength=1.4
            )
        if outputs == 1 and len(self._scored) == 1:
            self._numbers = axes.text(1.0, 1.03, "", transform=axes.transAxes, ha="right", fontsize=8.5, color=INK)
            self._say(predictions)

    def _say(self, predictions: Array) -> None:
        (step,) = self._scored
        said, target = predictions[step, 0], self._targets[step, 0]
        self._numbers.set_text(f"predicted {said:.3f}, target {target:.3f}, error {abs(said - target):.3f}")

    def update(self, hidden: Any, predictions: Any, title: str) -> None:
        """Show other hidden units and predictions of the same sequence."""
        hidden, predictions = as_array(hidden), as_array(predictions)
        self._units.set_data(hidden.T)
        if self._classes:
            self._answers.set_data(predictions.T)
        for output, (line, dots) in enumerate(self._lines):
            line.set_ydata(predictions[:, output])
            dots.set_ydata(predictions[self._scored, output])
        if self._numbers is not None:
            self._say(predictions)
        self._title.set_text(title)


def _image(axes: Axes, bar: Axes, values: Array, label: str, *, signed: bool, top: float | None = None) -> Any:
    """A picture of `values (rows, T)` with its colour bar."""
    top = (float(np.abs(values).max()) or 1.0) if top is None else top
    scale: dict[str, Any] = {"cmap": SIGNED, "vmin": -top} if signed else {"cmap": POSITIVE, "vmin": 0.0}
    image = axes.imshow(values, aspect="auto", vmax=top, interpolation="nearest", **scale)
    axes.grid(visible=False)
    if values.shape[0] <= 10:
        axes.set_yticks(range(values.shape[0]))
    axes.set_ylabel(label)
    axes.figure.colorbar(image, cax=bar).outline.set_visible(False)
    return image
