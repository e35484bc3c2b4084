"""Piano rolls as pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import pyplot as plt

from corpora.music.rolls import LOWEST, Roll

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_rolls(rolls: Mapping[str, Roll], *, steps_per_beat: int = 2, title: str = "") -> Figure:
    """Piano rolls below each other under their names: pitch upwards, with the Cs marked, and time to the right.

    Args:
        rolls: each (T, 88), by what stands above it.
        steps_per_beat: frames in a quarter note; the axis counts those.
        title: of the whole figure.
    """
    sounding = [np.flatnonzero(roll.any(0)) for roll in rolls.values()]
    pitches = np.concatenate([*sounding, [39]])  # middle C, if nothing sounds
    low, high = int(pitches.min()) - 1, int(pitches.max()) + 1
    figure, grid = plt.subplots(
        len(rolls), 1, figsize=(10.0, 0.6 + 2.1 * len(rolls)), squeeze=False, sharey=True, layout="constrained"
    )
    for axes, (name, roll) in zip(grid[:, 0], rolls.items(), strict=True):
        shown = np.asarray(roll).T[low : high + 1]
        extent = (0, len(roll) / steps_per_beat, low - 0.5, high + 0.5)
        axes.imshow(
            shown, aspect="auto", origin="lower", cmap="Blues", vmin=0, vmax=1, extent=extent, interpolation="nearest"
        )
        cs = [p for p in range(low, high + 1) if (p + LOWEST) % 12 == 0]
        axes.set_yticks(cs, [f"C{(p + LOWEST) // 12 - 1}" for p in cs])
        axes.grid(axis="y", linewidth=0.4)
        axes.set_title(name, loc="left", fontsize="medium")
    grid[-1, 0].set_xlabel("quarter notes")
    if title:
        figure.suptitle(title)
    return figure
