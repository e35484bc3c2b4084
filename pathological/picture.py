"""One sequence as a picture; the only file here that needs matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib import pyplot as plt

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pathological.batch import Batch
    from pathological.problem import Problem


def draw_sequence(problem: Problem, batch: Batch, b: int = 0) -> Figure:
    """Inputs (grey, one row per input) and targets of sequence ``b``, time to the right.

    Raises:
        IndexError: the minibatch has no sequence ``b``.
    """
    sequences = batch.inputs.shape[1]
    if not -sequences <= b < sequences:
        raise IndexError(f"b is {b}, but the minibatch has {sequences} sequences")
    inputs = batch.inputs[:, b].cpu().double().numpy()
    targets = batch.targets[:, b].cpu().double().numpy()
    scored = batch.mask[:, b].cpu().numpy()
    end = int(batch.lengths[b])
    where = np.flatnonzero(scored)

    figure, (above, below) = plt.subplots(
        2, 1, sharex=True, figsize=(9.0, 3.6), height_ratios=[2, 1], layout="constrained"
    )
    above.imshow(inputs.T, aspect="auto", cmap="gray", interpolation="nearest")
    above.set_ylabel("input")
    if inputs.shape[1] <= 10:
        above.set_yticks(range(inputs.shape[1]))
    below.plot(where, targets[where], "k.", markersize=4 if where.size > 1 else 8)
    below.set_ylabel("target")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.axvline(end - 0.5, color="tab:red", linewidth=1)
    below.set_xlim(-0.5, inputs.shape[0] - 0.5)
    figure.suptitle(f"{problem.name}, {problem.form} form, T = {problem.T}: sequence {b} of {end} steps")
    return figure
